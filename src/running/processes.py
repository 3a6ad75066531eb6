"""Several processes that work as one, the folder of a run, and the signals that may stop it.

runs.py, gpt.py and translation.py use it. The processes are those that torchrun starts. One of them
does what may be done only once, and the others wait for its outcome.
"""

import datetime
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Generic, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.distributed.nn  # before DDP does: its functions keep a group that exists by then
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from running.shell import Stopped, first_line, printable

Result = TypeVar("Result")
LOST = datetime.timedelta(minutes=10)  # a process that is silent for so long is lost
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process


def own_store(store: dist.Store, rank: int, world: int) -> dist.Store:
    """Return a section of torchrun's key-value store that only the processes of this start use.

    When torchrun restarts processes, it keeps the store, and the addresses of the dead ones stay in
    it (https://github.com/pytorch/pytorch/issues/135712). TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for
    torchrun would avoid that, too, but one has to know of it. So the first process makes up a name
    for a section, and the others ask it for that name. Each question has a random key, so that no
    earlier answer is taken for this one's. Raises TimeoutError if a process is lost.
    """
    if rank > 0:
        question = uuid4().hex
        store.set(f"question of {rank}", question)
        name = store.get(question).decode()  # waits for the answer
        store.set(f"{name} is known to {rank}", "")
    else:
        name = uuid4().hex
        end = time.monotonic() + LOST.total_seconds()
        while not all(store.check([f"{name} is known to {other}"]) for other in range(1, world)):
            if time.monotonic() > end:
                raise TimeoutError("a process was lost before all had started")
            for other in range(1, world):  # the question may still be that of a dead process
                store.set(store.get(f"question of {other}").decode(), name)
            time.sleep(0.1)
    return dist.PrefixStore(name, store)


@contextmanager
def joined_processes(device: torch.device) -> Iterator[None]:
    """Connect the processes that torchrun has started, if it has; disconnect them at the end.

    Raises OSError if the environment names some of what torchrun would tell a process, not all.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    missing = ", ".join(name for name in NEEDED if not os.environ.get(name))
    if missing:
        raise OSError(f"WORLD_SIZE is set without {missing}: start several processes with torchrun")
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)  # else all communicate via the first GPU
    store, rank, world = next(dist.rendezvous("env://", timeout=LOST))
    store = own_store(store, rank, world)
    # gloo sends objects, such as those of by_first, even if the gradients are on GPUs.
    backends = {"cpu": "gloo", device.type: dist.get_default_backend_for_device(device)}
    names = ",".join(map(":".join, backends.items()))
    dist.init_process_group(names, store=store, rank=rank, world_size=world, timeout=LOST)
    # Disconnecting ends the group's threads, too: at Python's exit, they could abort the process.
    # After another error, it would wait for what is still being sent.
    try:
        yield
    except (OSError, FloatingPointError, Stopped):
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process among those of torchrun, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def synced(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Let DDP average the gradients of the processes with the last part of a batch only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def own_parts(model: nn.Module, batch: Tensor, most: int) -> Iterator[tuple[Tensor, float]]:
    """Yield the rows of a batch that this process computes, at most so many at once.

    Each part has a weight. With the mean losses of the parts times their weights, the gradients
    add up to that of the mean over the batch, once DDP has averaged those of the processes.
    """
    rank, world = rank_and_world()
    share = batch[rank::world]
    weight = world / len(batch)
    if len(share) == 0:  # takes part, and adds nothing
        share = batch[:1]
        weight = 0.0
    parts = share.split(most)
    for n, part in enumerate(parts, start=1):
        with synced(model, last=n == len(parts)):
            yield part, weight * len(part)


def say(text: object) -> None:
    """Print a line on stderr, in the first process only."""
    if rank_and_world()[0] == 0:
        print(printable(text), file=sys.stderr)


def gather(mine: object) -> list[Any]:
    """Return to every process the list of the objects that the processes pass."""
    everyone = [mine] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, mine)
    return everyone


@dataclass
class Outcome(Generic[Result]):
    """What one process tells the others of its work: the result, or what the error says."""

    result: Result | None = None
    error: str = ""

    def unwrap(self) -> Result:
        """Return the result. Raises OSError if there was an error in the other process."""
        if self.error:
            raise OSError(self.error)
        return cast(Result, self.result)


def describe(error: BaseException) -> str:
    """Return what other processes are told of an error."""
    return first_line(error) or type(error).__name__


def by_first(make: Callable[[], Result]) -> Result:
    """Let the first process make something; return it, or raise its error, in all of them."""
    if not dist.is_initialized():
        return make()
    return tell_others(make) if dist.get_rank() == 0 else hear_of_first()


def tell_others(make: Callable[[], Result]) -> Result:
    """Make something, and broadcast what became of it.

    The others hear once a minute that it isn't done. So they can wait for hours, and yet notice
    within ten minutes if this process or its machine is lost.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(make())
        except BaseException as error:  # the others must hear of every one
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    while not wait([future], timeout=60).done:
        dist.broadcast_object_list([None])
    error = future.exception()
    outcome = Outcome(error=describe(error)) if error else Outcome(future.result())
    dist.broadcast_object_list([outcome])
    return future.result()


def hear_of_first() -> Any:
    """Wait for what the first process broadcasts."""
    heard: list[Outcome | None] = [None]
    while heard[0] is None:
        dist.broadcast_object_list(heard)
    return heard[0].unwrap()


def by_each(make: Callable[[], Result]) -> Result:
    """Let every process make something; if one of them fails, all raise OSError."""
    mine: Outcome[Result] = Outcome()
    try:
        mine.result = make()
    except OSError as caught:
        mine.error = describe(caught)
    for error in gather(mine.error):
        if error:
            raise OSError(error)
    return mine.unwrap()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a folder that another run uses; the lock dies with the first process."""
    lock = FileLock(folder / "lock", thread_local=False)  # by_first may work in a thread

    def acquire() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OSError(f"another run is using {folder}") from None

    by_first(acquire)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def catching_signals() -> Iterator[list[int]]:
    """Collect signals to stop, so that no step is left half done.

    These are Ctrl-C, SIGTERM, SIGUSR1, which a scheduler may send before its time is up, and
    SIGHUP, which a terminal sends as it closes; nohup ignores that. A second one ends a process at
    once, unless it is one of several.
    """
    signals: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if os.name == "posix":
        others = (signal.SIGHUP, signal.SIGUSR1)
        numbers += [number for number in others if signal.getsignal(number) == signal.SIG_DFL]

    old: dict[int, Any] = {}  # the handlers before

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def catch(number: int, frame: object) -> None:
        signals.append(number)
        if not dist.is_initialized():  # else one may come from the scheduler and one from torchrun
            restore()

    try:
        for number in numbers:
            old[number] = signal.getsignal(number)
            signal.signal(number, catch)
        yield signals
    finally:
        restore()
