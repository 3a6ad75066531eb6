"""A long run: stopped or killed at any step and resumed, it ends as if nothing had happened.

A training script on it looks like any other:

    run = Run(out, model, [optimizer], settings, epochs=10)
    run.resume()
    with run.stoppable():
        while not run.ended:
            for batch in run.steps(batches):  # from the checkpoint on
                ...  # forward, loss, zero_grad, backward, step
                run.add(loss, count)
            run.end_epoch(validation_loss)

Each of several processes does all of that; what is saved and printed comes from the first.
"""

import io
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from running.processes import by_each, by_first, catching_signals, gather, rank_and_world, say
from running.shell import Model, Stopped, clear_parts, refusing, write

NEWEST = "checkpoint.pt"
BEFORE = "checkpoint-before.pt"
FILES = (NEWEST, BEFORE, "metrics.json", "losses.png")
Batch = TypeVar("Batch")


class Epoch(NamedTuple):
    """The numbers of one epoch."""

    epoch: int
    training_loss: float
    validation_loss: float
    seconds: float


@dataclass
class Progress:
    """How far a run is; with the seed, it determines all randomness."""

    epoch: int = 0  # epochs that have ended
    batch: int = 0  # the next one in the epoch
    step: int = 0
    loss: float = 0.0  # of the epoch, summed
    count: int = 0  # of what it was summed over
    seconds: float = 0.0  # of the epoch
    best: float = math.inf  # the lowest validation loss whose weights are saved
    rows: list[Epoch] = field(default_factory=list)


class OtherRun(OSError):
    """A checkpoint is whole, but of a run with other settings."""


class Run(Generic[Model]):
    """A training run in a folder.

    `settings` and `seed` must stay the same when it is resumed. `conditions`, the device and the
    number of processes may change, although numbers are then rounded in another way.
    """

    def __init__(
        self,
        out: Path,
        model: Model,
        optimizers: Sequence[Optimizer],
        settings: dict[str, Any],
        epochs: int,
        seed: int = 0,
        conditions: dict[str, Any] | None = None,
        save_minutes: float = 10.0,
    ) -> None:
        self.out = out
        self.model = model
        self.optimizers = optimizers
        self.epochs = epochs
        self.seed = seed
        self.save_minutes = save_minutes
        self.device = next(model.parameters()).device
        self.settings = {"seed": seed} | settings
        self.conditions = {"device": self.device.type, "processes": rank_and_world()[1]}
        self.conditions |= conditions or {}
        self.progress = Progress()
        self.losses = torch.zeros((), device=self.device)  # since the last look
        self.signals: list[int] = []
        self.saved = time.monotonic()
        self.newest_is_whole = False

    @property
    def ended(self) -> bool:
        """Whether the last epoch has ended."""
        return self.progress.epoch >= self.epochs

    @property
    def in_last_epoch(self) -> bool:
        """Whether this is the last epoch."""
        return self.progress.epoch == self.epochs - 1

    def derive_seed(self, *numbers: int) -> int:
        """Return a seed that follows from that of the run and some numbers."""
        return Random(" ".join(map(str, (self.seed, *numbers)))).getrandbits(63)

    def epoch_generator(self) -> torch.Generator:
        """Return a generator for the batches of this epoch, alike in all processes."""
        return torch.Generator().manual_seed(self.derive_seed(self.progress.epoch))

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let a signal stop the run after a step, not within one."""
        with catching_signals() as self.signals:
            yield

    def steps(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the batches of this epoch, from the next one on, each with a seed of its own.

        After a step, the losses are summed up, and every few minutes a checkpoint is saved. Raises
        Stopped, once that is saved, if a process has received a signal, and FloatingPointError if
        the loss is not finite.
        """
        progress = self.progress
        rank, _ = rank_and_world()
        look = 1 if self.device.type == "cpu" else 10  # asking a GPU for a number makes it wait
        clock = time.monotonic()
        with tqdm(
            total=len(batches), initial=progress.batch, unit="step", leave=False,
            disable=None if rank == 0 else True,
        ) as bar:  # fmt: skip
            while progress.batch < len(batches):
                torch.manual_seed(self.derive_seed(progress.step, rank))
                yield batches[progress.batch]
                progress.batch += 1
                progress.step += 1
                now = time.monotonic()
                progress.seconds += now - clock
                clock = now
                bar.update()
                if progress.batch % look == 0 or progress.batch == len(batches):
                    signaled = self.sum_up()
                    bar.set_postfix(loss=progress.loss / progress.count)
                    self.save_or_stop(signaled)

    def add(self, loss: Tensor, count: int) -> None:
        """Add the loss of a step, summed over what this process has computed.

        `count` is what all processes together have summed it over, such as tokens.
        """
        self.losses = self.losses + loss.detach()
        self.progress.count += count

    def sum_up(self) -> bool:
        """Add up the losses of all processes; return whether one of them has received a signal."""
        sums = torch.stack((self.losses, self.losses.new_tensor(len(self.signals))))
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, signals = sums.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss}; a lower learning rate may help")
        self.progress.loss += loss
        self.losses = self.losses.new_zeros(())
        return signals > 0

    def save_or_stop(self, signaled: bool) -> None:
        """Save every few minutes, and after a signal; then stop."""
        if signaled:
            by_first(self.save)
            say(f"{Path(sys.argv[0]).name}: stopped; use --resume to continue")
            raise Stopped(next(number for each in gather(self.signals) for number in each))
        now = time.monotonic()
        if rank_and_world()[0] == 0 and now - self.saved > 60 * self.save_minutes:
            self.saved = now
            with going_on():
                self.save()

    def mark_best(self, validation_loss: float) -> None:
        """Note that the weights with this loss, the lowest so far, are saved."""
        self.progress.best = validation_loss

    def end_epoch(self, validation_loss: float) -> None:
        """Note the losses of the epoch, and save the checkpoint, metrics.json and losses.png."""
        strict = self.in_last_epoch
        old = self.progress
        row = Epoch(old.epoch + 1, old.loss / old.count, validation_loss, old.seconds)
        rows = [*old.rows, row]
        self.progress = Progress(epoch=row.epoch, step=old.step, best=old.best, rows=rows)

        def save() -> None:
            with going_on(strict):
                self.save()
                self.save_metrics()

        by_first(save)

    def save(self) -> None:
        """Write a checkpoint; the one before is kept. Raises FloatingPointError like `pack`."""
        content = self.pack()
        before = self.out / BEFORE if self.newest_is_whole else None  # else that is the whole one
        write(self.out / NEWEST, content, before)
        self.newest_is_whole = True

    def keep(self, name: str) -> None:
        """Write a checkpoint of this name, too, which later ones don't replace.

        Renamed to checkpoint.pt, it resumes the run from there. Each process has to call it.
        """
        self.sum_up()  # the losses since the last look belong to it

        def save() -> None:
            with going_on(strict=self.in_last_epoch):
                write(self.out / name, self.pack())

        by_first(save)

    def learned(self) -> dict[str, Tensor]:
        """Return what training changes, by name: all but weights that need no gradient."""
        parameters = self.model.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in parameters if not parameter.requires_grad}
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in frozen}

    def pack(self) -> bytes:
        """Return everything needed to continue, as a file's content.

        Raises FloatingPointError if the weights are not finite; those in a file may still be.
        """
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise FloatingPointError(
                "the weights are no longer finite; a lower learning rate may help"
            )
        rows = [list(row) for row in self.progress.rows]  # torch.load rejects a NamedTuple
        state = {
            "settings": self.settings,
            "conditions": self.conditions,
            "progress": asdict(self.progress) | {"rows": rows},
            "model": self.learned(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def save_metrics(self, **results: Any) -> None:
        """Save the settings, the numbers of the epochs and results, and draw the losses."""
        rows = [row._asdict() for row in self.progress.rows]
        metrics = {"settings": self.settings | self.conditions} | results | {"epochs": rows}
        metrics |= {"torch": torch.__version__, "python": sys.version.split()[0]}
        write(self.out / "metrics.json", json.dumps(metrics, indent=1).encode())
        write(self.out / "losses.png", draw_losses(self.progress.rows))

    def resume(self) -> None:
        """Continue from the newest checkpoint that is whole, if there is one.

        Raises OSError if all are broken, if it is another run's, or another process's differs.
        """
        by_each(self.load_newest)
        if len(set(gather(self.progress.step))) > 1:
            raise OSError(f"the processes do not see the same {self.out}")

    def load_newest(self) -> None:
        """Load the newest checkpoint, or the one before if that is broken."""
        paths = find_checkpoints(self.out)
        if not paths:
            return
        try:
            self.load(paths[0])
        except OtherRun:
            raise
        except OSError as error:
            if len(paths) == 1:
                raise
            say(f"{error}; trying {paths[1].name}")
            self.load(paths[1])

    def load(self, path: Path) -> None:
        """Load a checkpoint. Raises OSError if it is broken, or another run's."""
        with refusing(path, "nothing to resume"):
            state = read_checkpoint(path)
            changes = list_changes(state["settings"], self.settings)
            if not changes:
                if state["model"].keys() != self.learned().keys():
                    raise ValueError("its weights have other names")
                # Not strict, since frozen weights are not in the file.
                self.model.load_state_dict(state["model"], strict=False)
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
                    check_moments(optimizer)
                self.progress = Progress(**state["progress"])
                self.progress.rows = [Epoch(*row) for row in self.progress.rows]
                if len(self.progress.rows) != self.progress.epoch:
                    raise ValueError("epochs are missing")
            other = list_changes(state["conditions"], self.conditions)
        if changes:
            raise OtherRun(f"{path} belongs to another run: {', '.join(changes)}")
        if other:
            say(f"not bit for bit as before, since {', '.join(other)}")
        self.newest_is_whole = path.name == NEWEST


def list_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say which values are not as they were."""
    return [
        f"{name} was {before.get(name)}, not {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `Run.save` wrote. Raises an error of some kind if it is broken."""
    with zipfile.ZipFile(path) as file:  # torch.load doesn't verify the checksums
        if file.testzip():
            raise ValueError("it is broken: a checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_moments(optimizer: Optimizer) -> None:
    """Raise ValueError if one is missing or has another shape, lest a step crash."""
    if len({frozenset(moments) for moments in optimizer.state.values()}) > 1:
        raise ValueError("not all parameters have the same moments")
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            shape = () if name == "step" else parameter.shape
            if isinstance(moment, Tensor) and moment.shape != shape:
                raise ValueError(f"{name} of its optimizer has another shape than its parameter")


def find_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest first.

    Raises OSError if one is not a plain file: a link to nowhere may mean that a disk is missing.
    """
    paths = [out / name for name in (NEWEST, BEFORE) if os.path.lexists(out / name)]
    for path in paths:
        if not path.is_file():
            missing = path.is_symlink() and not path.exists()
            raise OSError(f"{path} is {'a link to nowhere' if missing else 'not a plain file'}")
    return paths


def check_start(out: Path, resume: bool, restart: bool) -> None:
    """Refuse to begin over a checkpoint without being told to. Raises OSError."""
    again = os.environ.get("TORCHELASTIC_MAX_RESTARTS")
    machines = os.environ.get("GROUP_WORLD_SIZE")
    if restart and (again not in (None, "0") or machines not in (None, "1")):
        raise OSError("--restart would begin anew each time torchrun restarts: use --resume")
    found = find_checkpoints(out)
    if found and not (resume or restart):
        raise OSError(f"{found[0]} exists: --resume continues it, --restart begins anew")
    if resume and not found:
        say(f"no {out / NEWEST} yet: starting a new run")


def set_aside(out: Path, names: Sequence[str], resume: bool) -> None:
    """Move an earlier run's files to previous/, lest they pass for the new one's.

    These are those of every run, and `names`. What previous/ held is overwritten. A run that is
    resumed keeps its files.
    """
    paths = [out / name for name in (*FILES, *names)]
    for path in paths:
        clear_parts(path)
    if resume and find_checkpoints(out):
        return
    found = [path for path in paths if path.is_file()]
    if found:
        (out / "previous").mkdir(exist_ok=True)
    for path in found:
        path.replace(out / "previous" / path.name)


@contextmanager
def going_on(strict: bool = False) -> Iterator[None]:
    """Report a failed write, as on a full disk, unless it is strict; training goes on."""
    try:
        yield
    except OSError as error:
        if strict:
            raise
        say(f"{error}; training goes on")


def draw_losses(rows: Sequence[Epoch]) -> bytes:
    """Draw the losses by epoch: a PNG."""
    epochs, training, validation, _ = zip(*rows, strict=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
    axes.plot(epochs, training, "o-", label="training loss")
    axes.plot(epochs, validation, "o-", label="validation loss")
    axes.legend()
    axes.locator_params(axis="x", integer=True)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
