#!/usr/bin/env python3
"""The Transformer learns to translate, with everything that real work needs.

Run `poetry run src/translation.py`. It learns phrases that Babel makes in German and English, in
about two minutes. `--data DIR` gives it your own parallel text: train.de, val.de, test*.de and the
same with .en, one sentence per line, plain or gzipped, of any size. It saves a checkpoint every few
minutes, after each epoch, and on Ctrl-C or SIGTERM (`--resume` continues), and tests the network.
Results go to runs/translation/, where `--translate "vor 3 Tagen"` finds them.
`poetry run torchrun --nproc-per-node 2 src/translation.py ...` trains with two processes.
"""

import argparse
import copy
import io
import json
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import category, normalize

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.bleu import BLEUScore
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from attention import draw_heads
from decoding.search import autocast, translate
from inputs.pairs import (
    Corpus,
    Pair,
    Tests,
    count_seen,
    cut,
    find_tests,
    make_batches,
    open_corpus,
    prepare_corpus,
    read_tests,
)
from inputs.phrases import check_languages, phrases_name, write_phrases
from inputs.text import BOS, EOS, MAX_LENGTH, PAD, decode_lines, open_tokenizer
from running.processes import (
    alone,
    by_first,
    catching_signals,
    gather,
    joined_processes,
    rank_and_world,
)
from running.shell import (
    clear_parts,
    command,
    make_parser,
    number,
    open_weights,
    printable,
    read_weights,
    refusing,
    save_weights,
    write,
)
from transformer import (
    DecoderLayer,
    EncoderLayer,
    Sizes,
    Transformer,
    learning_rate,
    look_inside,
)

FONTS = (  # the first that has a character draws it
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "PingFang SC",
    "Yu Gothic", "Malgun Gothic", "Microsoft YaHei", "WenQuanYi Zen Hei", "Noto Sans Devanagari",
    "Noto Sans Thai",
)  # fmt: skip
RESULTS = ("checkpoint.pt", "model.safetensors", "metrics.json", "losses.png", "attention.png")
UNSPACED = {"ja", "th", "yue", "km", "lo", "my"}  # languages that put no spaces between words
RANGES: dict[str, tuple[float, float, str]] = {
    "d_model": (1, 4096, "size of the vectors"),
    "num_heads": (1, 64, "heads of each attention"),
    "num_layers": (1, 48, "layers of the encoder, and of the decoder"),
    "d_ff": (1, 16_384, "size inside the feed-forward network"),
    "dropout": (0.0, 0.9, "share of numbers set to 0 in training"),
    "smoothing": (0.0, 0.9, "share of each label spread over all tokens, section 5.4"),
    "norm_first": (False, True, "put LayerNorm before each sublayer, not after it"),
    "vocab_size": (300, 100_000, "tokens in the vocabulary, at most"),
    "batch_tokens": (1, 1_000_000, "tokens per step, source and target, with padding"),
    "part_tokens": (1, 1_000_000, "tokens that a process computes at once"),
    "warmup": (1, 1_000_000, "steps during which the learning rate rises"),
    "epochs": (1, 10_000, "passes over the text"),
    "average": (1, 100, "last epochs whose weights are averaged, section 6.1; with 1, the learning "
                "rate falls to 0 instead"),
}  # fmt: skip


@dataclass(frozen=True)
class Settings(Sizes):
    """Sizes of the network and of its training. Raises ValueError if one is out of range."""

    d_model: int = 256
    num_layers: int = 3
    d_ff: int = 512
    dropout: float = 0.3
    smoothing: float = 0.2
    norm_first: bool = True
    vocab_size: int = 6000
    batch_tokens: int = 2048
    part_tokens: int = 8192
    warmup: int = 1200
    epochs: int = 18
    average: int = 1

    def __post_init__(self) -> None:
        """Check the ranges, so that no option or file can ask for an absurd amount of memory."""
        for name, value in asdict(self).items():
            lowest, highest, _ = RANGES[name]
            if type(value) is not type(lowest):
                raise ValueError(f"{flag(name)}: {value!r} is not of the right kind")
            if not lowest <= value <= highest:
                raise ValueError(f"{flag(name)}: must be between {lowest:,} and {highest:,}")
        if self.d_model % self.num_heads:
            raise ValueError(f"{flag('d_model')}: must be divisible by num_heads {self.num_heads}")


def flag(name: str) -> str:
    """Return the option of a setting."""
    return f"--{name.replace('_', '-')}"


PRESETS = {
    "phrases": Settings(
        d_model=128, num_layers=2, d_ff=256, dropout=0.0, smoothing=0.1,
        vocab_size=600, warmup=400, epochs=1,
    ),
    "small": Settings(),
    "base": Settings(  # table 3 and section 5 of the paper; 18 epochs of WMT 2014 are 100,000 steps
        d_model=512, num_heads=8, num_layers=6, d_ff=2048, dropout=0.1, smoothing=0.1,
        norm_first=False, vocab_size=37_000, batch_tokens=50_000, warmup=4000, epochs=18, average=5,
    ),
}  # fmt: skip


class PreNormEncoderLayer(EncoderLayer):
    """x + dropout(sublayer(LayerNorm(x))) is easier to train when deep (Xiong et al. 2020)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return x (B, S, d_model) after the layer; the mask broadcasts to (B, S, S)."""
        h = self.norm1(x)
        x = x + self.dropout(self.self_attention(h, h, h, mask))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class PreNormDecoderLayer(DecoderLayer):
    """The same with attention to the memory, the encoder's output, in between."""

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """Return x (B, T, d_model) after the layer; the memory is (B, S, d_model)."""
        h = self.norm1(x)
        x = x + self.dropout(self.self_attention(h, h, h, mask))
        h = self.norm2(x)
        x = x + self.dropout(self.cross_attention(h, memory, memory, memory_mask))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class PreNormTransformer(Transformer):
    """A Transformer of pre-norm layers; their sums need a final norm."""

    encoder_layer = PreNormEncoderLayer
    decoder_layer = PreNormDecoderLayer

    def __init__(self, vocab_size: int, sizes: Sizes) -> None:
        super().__init__(vocab_size, sizes)
        self.encoder_norm = nn.LayerNorm(sizes.d_model)
        self.decoder_norm = nn.LayerNorm(sizes.d_model)

    def encode(self, source: Tensor) -> Tensor:
        """Return the memory (B, S, d_model) of the source (B, S)."""
        return self.encoder_norm(super().encode(source))

    def to_logits(self, x: Tensor) -> Tensor:
        """Compare x (B, T, d_model) with all embeddings: logits (B, T, V)."""
        return super().to_logits(self.decoder_norm(x))


def make_model(settings: Settings, tokenizer: Tokenizer) -> Transformer:
    """Make a network with random weights."""
    network = PreNormTransformer if settings.norm_first else Transformer
    return network(tokenizer.get_vocab_size(), settings)


def save_model(path: Path, model: Transformer, tokenizer: Tokenizer, settings: Settings) -> None:
    """Write everything needed for translation to one file."""
    about = {"settings": json.dumps(asdict(settings)), "tokenizer": tokenizer.to_str()}
    save_weights(path, model, about)


def average_weights(model: Transformer, epoch: int, count: int, folder: Path) -> Transformer:
    """Save the weights of an epoch; return a network with the mean of the last `count` epochs'.

    Raises OSError if they can't be written or read.
    """
    last = range(max(1, epoch - count + 1), epoch + 1)
    paths = [folder / f"weights-{n % count}.safetensors" for n in last]
    paths[-1].unlink(missing_ok=True)  # if the write fails, no old epoch's may remain
    clear_parts(paths[-1])
    save_weights(paths[-1], model, {})
    with refusing(folder, "the weights of the last epochs can't be averaged"):
        states = [read_weights(path)[0] for path in paths]
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    average = copy.deepcopy(model)
    average.load_state_dict(mean)
    return average


def open_model(path: Path) -> tuple[Transformer, Tokenizer]:
    """Read a file that `save_model` wrote. Raises OSError if `path` is not such a file."""

    def make(about: dict[str, str]) -> Transformer:
        settings = Settings(**json.loads(about["settings"]))
        tokenizer = open_tokenizer(about["tokenizer"])
        if sorted(tokenizer.get_vocab().values()) != [*range(tokenizer.get_vocab_size())]:
            raise ValueError("the tokens of its vocabulary aren't numbered from 0 on")
        return make_model(settings, tokenizer)

    model, about = open_weights(path, make)
    return model, open_tokenizer(about["tokenizer"])


class Epoch(NamedTuple):
    """The numbers of one epoch."""

    epoch: int
    training_loss: float  # labels smoothed
    validation_loss: float
    seconds: float


@dataclass
class Progress:
    """State of a run; it determines all randomness."""

    seed: int
    epoch: int = 0
    batch: int = 0  # the next one in the epoch
    step: int = 0
    loss: float = 0.0  # summed over the labels of the epoch
    count: int = 0  # of these labels
    seconds: float = 0.0  # of the epoch
    best: float = math.inf
    rows: list[Epoch] = field(default_factory=list)


@dataclass
class Run:
    """A training run: its identity, which `--resume` must not change, and its state."""

    identity: dict[str, Any]
    settings: Settings
    tokenizer: Tokenizer
    model: Transformer
    optimizer: torch.optim.Optimizer
    progress: Progress


def batch_loss(model: nn.Module, corpus: Corpus, rows: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of some pairs in nats, summed over the tokens of the targets."""
    source = corpus.sequences(rows, 0)
    target = corpus.sequences(rows, 1)
    with autocast(source.device):
        logits = model(source, target[:, :-1]).flatten(0, 1)
        labels = target[:, 1:].flatten()
        return F.cross_entropy(
            logits, labels, ignore_index=PAD, reduction="sum", label_smoothing=smoothing
        )


def synced(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Let DDP average the gradients of the processes with the last part of a batch only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def add_gradients(
    model: nn.Module, corpus: Corpus, batch: Tensor, count: int, settings: Settings
) -> Tensor:
    """Add the gradient of the mean loss of a batch with `count` labels; return the summed loss.

    Each of several processes takes its share, in parts that fit into memory, and returns its own
    loss. DDP averages the gradients once, with the last part.
    """
    rank, world = rank_and_world()
    share = batch[rank::world]
    weight = world / count
    if len(share) == 0:  # takes part, and adds nothing
        share = batch[:1]
        weight = 0.0
    parts = share.tensor_split(cut(corpus.lengths[share], settings.part_tokens)[:-1])
    total = torch.zeros((), device=corpus.tokens.device)
    for n, part in enumerate(parts, start=1):
        with synced(model, last=n == len(parts)):
            loss = batch_loss(model, corpus, part, settings.smoothing)
            (loss * weight).backward()
        total = total + loss.detach() * (weight > 0)
    return total


def train_epoch(
    run: Run, model: nn.Module, corpus: Corpus, signals: Sequence[int]
) -> Iterator[bool]:
    """Train from progress.batch on to the end of the epoch.

    Yields, after a step, whether one of the processes has received a signal. Raises
    FloatingPointError if the loss is not finite.
    """
    progress = run.progress
    settings = run.settings
    device = corpus.tokens.device
    rank, world = rank_and_world()
    look = 1 if device.type == "cpu" else 10  # steps; asking a GPU for a number makes it wait
    generator = torch.Generator().manual_seed(hash((progress.seed, progress.epoch)) % 2**63)
    batches = make_batches(corpus.lengths, settings.batch_tokens, generator)
    losses = torch.zeros((), device=device)  # summed since the last look
    if progress.batch == 0:
        progress.loss = 0.0
        progress.count = 0
        progress.seconds = 0.0
    model.train()
    bar = tqdm(
        total=int((corpus.lengths[:, 1] - 1).sum()), initial=progress.count, unit="token",
        unit_scale=True, leave=False, disable=None if rank == 0 else True,
    )  # fmt: skip
    while progress.batch < len(batches):
        batch = batches[progress.batch]
        count = int((corpus.lengths[batch, 1] - 1).sum())
        rate = learning_rate(progress.step + 1, settings.d_model, settings.warmup)
        if settings.average == 1:  # falls to 0, which the paper's does not
            rate *= 1 - (progress.epoch + progress.batch / len(batches)) / settings.epochs
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(hash((progress.seed, progress.step, rank)) % 2**63)
        run.optimizer.zero_grad()
        losses = losses + add_gradients(model, corpus, batch, count, settings)
        run.optimizer.step()
        progress.count += count
        progress.step += 1
        progress.batch += 1
        bar.update(count)
        if progress.batch % look == 0 or progress.batch == len(batches):
            sums = torch.stack((losses, losses.new_tensor(len(signals))))
            if world > 1:
                dist.all_reduce(sums)
            loss, stop = sums.tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss became {loss}; a longer warmup may help")
            progress.loss += loss
            bar.set_postfix(loss=progress.loss / progress.count)
            losses = losses.new_zeros(())
            yield stop > 0
    bar.close()


@torch.inference_mode()
def mean_loss(model: Transformer, corpus: Corpus, tokens: int) -> float:
    """Return the mean cross-entropy of the targets' tokens, in nats.

    Raises FloatingPointError if it is not finite.
    """
    model.eval()
    batches = make_batches(corpus.lengths, tokens, torch.Generator().manual_seed(0))
    total = sum(batch_loss(model, corpus, rows, smoothing=0.0).item() for rows in batches)
    if not math.isfinite(total):
        raise FloatingPointError(f"the validation loss became {total}; a longer warmup may help")
    return total / int((corpus.lengths[:, 1] - 1).sum())


def draw_losses(rows: Sequence[Epoch]) -> bytes:
    """Draw the losses by epoch: a PNG."""
    epochs, training, validation, _ = zip(*rows, strict=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="nats per token")
    axes.plot(epochs, training, "o-", label="training loss, labels smoothed")
    axes.plot(epochs, validation, "o-", label="validation loss")
    axes.legend()
    axes.locator_params(axis="x", integer=True)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def draw_attention(model: Transformer, tokenizer: Tokenizer, pair: Pair) -> bytes:
    """Draw where each head of the last layer looks to predict each token: a PNG."""
    ids = [encoding.ids[: MAX_LENGTH - 2] for encoding in tokenizer.encode_batch([*pair])]
    device = model.positions.device
    source = torch.tensor([[*ids[0], EOS]], device=device)
    target = torch.tensor([[BOS, *ids[1]]], device=device)
    weights = look_inside(model, source, target)
    last = f"decoder.{len(model.decoder) - 1}.cross_attention"
    columns, rows = (  # a $ would begin a formula
        [tokenizer.decode([i]).replace("$", r"\$") for i in row] + ["end"] for row in ids
    )
    installed = {font.name for font in fontManager.ttflist}
    families = [name for name in FONTS if name in installed]
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that none of the fonts has becomes a box
        return draw_heads(weights[last][0].cpu(), rows, columns)


def save_checkpoint(path: Path, run: Run) -> None:
    """Write everything needed to continue as if nothing had happened.

    Raises FloatingPointError if the weights are not finite; those in the file may still be.
    """
    if not all(parameter.isfinite().all() for parameter in run.model.parameters()):
        raise FloatingPointError("the weights are no longer finite; a longer warmup may help")
    state = {"run": run.identity, "model": run.model.state_dict()}
    state["optimizer"] = run.optimizer.state_dict()
    rows = [list(row) for row in run.progress.rows]  # torch.load rejects a NamedTuple
    buffer = io.BytesIO()
    torch.save(state | {"progress": asdict(run.progress) | {"rows": rows}}, buffer)
    write(path, buffer.getvalue())


def open_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises OSError if `path` is not such a file, or belongs to another run.
    """
    with refusing(path, "nothing to resume"):
        with zipfile.ZipFile(path) as file:  # torch.load doesn't verify the checksums
            if file.testzip():
                raise ValueError("it is broken: a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        changes = [name for name in identity if state["run"].get(name) != identity[name]]
        before = ", ".join(f"{name} was {state['run'].get(name)}" for name in changes)
    if changes:
        raise OSError(f"{path} belongs to another run: {before}")
    return state


def begin(
    path: Path,
    identity: dict[str, Any],
    settings: Settings,
    tokenizer: Tokenizer,
    device: torch.device,
) -> Run:
    """Begin a run, or continue the one in the checkpoint. Raises OSError if that fails."""
    progress = Progress(identity["seed"])
    torch.manual_seed(progress.seed)
    model = make_model(settings, tokenizer).to(device)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
    if path.exists():
        state = open_checkpoint(path, identity)
        with refusing(path, "nothing to resume"):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            progress = Progress(**state["progress"])
            progress.rows = [Epoch(*row) for row in progress.rows]
            if len(progress.rows) != progress.epoch:
                raise ValueError("epochs are missing")
    return Run(identity, settings, tokenizer, model, optimizer, progress)


@contextmanager
def going_on() -> Iterator[None]:
    """Report a failed write, as on a full disk; training goes on, and saves again later."""
    try:
        yield
    except OSError as error:
        print(f"{printable(error)}; training goes on", file=sys.stderr)


def finish_epoch(run: Run, validation: Corpus, out: Path) -> None:
    """Evaluate, and save the network if it is the best so far, the checkpoint, and the losses."""
    progress = run.progress
    settings = run.settings
    progress.epoch += 1
    progress.batch = 0
    training_loss = progress.loss / progress.count
    model = run.model
    if settings.average > 1:
        with going_on():
            model = average_weights(model, progress.epoch, settings.average, out)
    loss = mean_loss(model, validation, settings.part_tokens)
    progress.rows.append(Epoch(progress.epoch, training_loss, loss, progress.seconds))
    with nullcontext() if progress.epoch == settings.epochs else going_on():
        if loss < progress.best:
            save_model(out / "model.safetensors", model, run.tokenizer, settings)
            progress.best = loss
        save_checkpoint(out / "checkpoint.pt", run)
        save_metrics(run, {}, out)


def fit(
    run: Run, corpus: Corpus, validation: Corpus, out: Path, minutes: float, signals: Sequence[int]
) -> Iterator[Epoch]:
    """Train to the last epoch or a signal; yield the numbers of each epoch once they are saved.

    Only the first of several processes saves, after each epoch and every `minutes` minutes.
    """
    progress = run.progress
    model: nn.Module = run.model
    first = rank_and_world()[0] == 0
    if dist.is_initialized():
        model = DistributedDataParallel(run.model)
    saved = time.monotonic()
    while progress.epoch < run.settings.epochs:
        clock = time.monotonic()
        for stop in train_epoch(run, model, corpus, signals):
            now = time.monotonic()
            progress.seconds += now - clock
            clock = now
            if stop:
                by_first(lambda: save_checkpoint(out / "checkpoint.pt", run))
                return
            if first and now - saved > 60 * minutes:
                with going_on():
                    save_checkpoint(out / "checkpoint.pt", run)
                saved = now
        by_first(lambda: finish_epoch(run, validation, out))
        if first:
            yield progress.rows[-1]
        else:
            progress.epoch += 1
            progress.batch = 0


def save_metrics(run: Run, scores: dict[str, Any], out: Path) -> None:
    """Save the settings, the numbers of the epochs and the scores, and draw the losses."""
    rows = [row._asdict() for row in run.progress.rows]
    metrics = {"settings": run.identity, "test": scores, "epochs": rows}
    metrics |= {"torch": torch.__version__, "python": sys.version.split()[0]}
    write(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    write(out / "losses.png", draw_losses(run.progress.rows))


def bleu_tokenizer(language: str) -> str:
    """Return how BLEU finds the words of a language: in most, by spaces and punctuation."""
    code = re.split("[-_]", language)[0].lower()
    return {"zh": "zh"}.get(code, "char" if code in UNSPACED else "13a")


def score(pairs: Sequence[Pair], found: Sequence[str], language: str) -> dict[str, float]:
    """Return the share of exact translations, and BLEU and chrF by sacrebleu (Post 2018).

    Their names include sacrebleu's signature, so that others can compute the same scores.
    """
    words = bleu_tokenizer(language)
    targets = [target for _, target in pairs]
    exact = [target == text for target, text in zip(targets, found, strict=True)]
    scores = {"exactly": 100 * sum(exact) / len(exact)}
    for metric in (BLEU(tokenize=words), BLEU(tokenize=words, lowercase=True), CHRF()):
        result = metric.corpus_score(found, [targets])
        name = f"{type(metric).__name__}  {metric.get_signature()}"
        if isinstance(result, BLEUScore) and not result.totals[-1]:
            name += "  (which is 0 if no translation has four words)"
        scores[name] = result.score
    return scores


def save_results(
    run: Run, tests: Tests, beam: int, out: Path
) -> tuple[dict[str, dict[str, float]], dict[str, list[str | None]]]:
    """Test the best network and save the results; return scores and translations.

    A sentence that is too long, whose translation is None, is scored as empty.
    """
    model, tokenizer = open_model(out / "model.safetensors")
    model.to(run.model.positions.device)
    scores = {}
    found = {}
    for name, pairs in tests.items():
        sources = [source for source, _ in pairs]
        found[name] = translate(model, tokenizer, sources, beam)
        texts = [text or "" for text in found[name]]
        scores[name] = score(pairs, texts, run.identity["languages"][1])
    save_metrics(run, {"beam": beam} | scores, out)
    example = next(pair for pair in next(iter(tests.values())) if all(map(str.strip, pair)))
    write(out / "attention.png", draw_attention(model, tokenizer, example))
    return scores, found


def show_translations(model: Transformer, tokenizer: Tokenizer, text: str, beam: int) -> int:
    """Print the translation of a text, or of lines if it is `-`; return 1 if one is too long."""
    lines: Iterator[str] = iter([normalize("NFC", text)])
    at_once = 1
    if text == "-":
        if sys.stdin is None:
            raise OSError("there is no standard input")
        lines = decode_lines(sys.stdin.buffer, "standard input")
        at_once = 1 if sys.stdin.isatty() else 1000  # a person waits for each answer
    elif any(category(character) == "Cs" for character in text):  # a byte that isn't UTF-8
        raise OSError("the text of --translate is not UTF-8")
    done = 0
    status = 0
    quiet = text != "-" or sys.stdout.isatty()
    bar = tqdm(unit=" lines", leave=False, disable=quiet or None)
    while chunk := list(islice(lines, at_once)):
        for found in translate(model, tokenizer, chunk, beam):
            done += 1
            if found is None:
                status = 1
                print(f"line {done} is longer than {MAX_LENGTH} tokens", file=sys.stderr)
            print((found or "").replace("\n", " "), flush=True)
        bar.update(len(chunk))
    bar.close()
    return status


def check_checkpoint(checkpoint: Path, resume: bool, restart: bool) -> None:
    """Refuse to begin over a checkpoint without being told to. Raises OSError."""
    again = os.environ.get("TORCHELASTIC_MAX_RESTARTS")
    machines = os.environ.get("GROUP_WORLD_SIZE")
    if restart and (again not in (None, "0") or machines not in (None, "1")):
        raise OSError("--restart would begin anew each time torchrun restarts: use --resume")
    if checkpoint.exists() and not (resume or restart):
        raise OSError(f"{checkpoint} exists: --resume continues it, --restart begins anew")
    if resume and not checkpoint.exists():
        print(f"no {printable(checkpoint)} yet: starting a new run", file=sys.stderr)


def set_aside(out: Path, resume: bool) -> None:
    """Move an earlier run's results to previous/, lest they pass for the new one's.

    What previous/ held is overwritten. A run that is resumed keeps its results.
    """
    for name in RESULTS:
        clear_parts(out / name)
    if resume and (out / "checkpoint.pt").exists():
        return
    found = [out / name for name in RESULTS if (out / name).is_file()]
    if found:
        (out / "previous").mkdir(exist_ok=True)
    for path in found:
        path.replace(out / "previous" / path.name)


def open_data(folder: Path | None, languages: Sequence[str], out: Path) -> tuple[Path, Tests]:
    """Return the folder of the text, and its tests; without a folder, phrases are written first."""
    if folder is None:
        folder = out / phrases_name(languages)
        write_phrases(folder, languages)
    for name in find_tests(folder, languages)[1]:
        print(f"{printable(name)} is left out: it has only one side", file=sys.stderr)
    return folder, read_tests(folder, languages)


def show_training(
    run: Run, encoded: Path, counts: dict[str, int], out: Path, minutes: float
) -> int:
    """Train on the encoded text, and print a line per epoch; return the signal that stopped it."""
    device = run.model.positions.device
    corpus, validation = (open_corpus(encoded / split).to(device) for split in ("train", "val"))
    if len(set(gather((run.progress.step, len(corpus.lengths))))) > 1:
        raise OSError(f"the processes do not see the same {out}")
    if rank_and_world()[0] == 0:
        count = sum(p.numel() for p in run.model.parameters())
        for split, kept in (("train", corpus), ("val", validation)):
            if left_out := counts[split] - len(kept.lengths):
                print(f"{left_out:,} pairs of {split} are left out: empty, or too long")
        print(f"{count:,} parameters on {device}, {len(corpus.lengths):,} pairs per epoch\n")
        print("epoch  training loss  validation loss  seconds", flush=True)
    with catching_signals() as signals:
        for row in fit(run, corpus, validation, out, minutes, signals):
            print("{:5}  {:13.4f}  {:15.4f}  {:7.1f}".format(*row), flush=True)
    if run.progress.epoch == run.settings.epochs:
        return 0
    return (signals or [signal.SIGTERM])[0]  # another process got it


def show_results(
    run: Run, folder: Path, tests: Tests, beam: int, out: Path, started: float
) -> None:
    """Test the best network; print the scores, three examples of each test, and the seconds."""
    scores, found = save_results(run, tests, beam, out)
    seen = count_seen(folder, run.identity["languages"], tests)
    for name, pairs in tests.items():
        print(f"\n{printable(name)}: {len(pairs):,} sentences")
        if too_long := found[name].count(None):
            print(f"{too_long:,} of them are longer than {MAX_LENGTH} tokens, and count as empty")
        if seen[name]:
            print(f"{seen[name]:,} of their sources stand in the training text, too")
        for metric, value in scores[name].items():
            print(f"{value:7.2f}  {metric}")
        for (source, target), text in list(zip(pairs, found[name], strict=True))[:3]:
            print(f"\n  {printable(source)}\n  {printable(text or '')}")
            print(f"  {printable(target)} (reference)")
    print(f"\nSaved in {printable(out)} after {time.perf_counter() - started:.1f} s", flush=True)


def existing_folder(text: str) -> Path:
    """Parse --data."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder of parallel text, got {text!r}")
    return Path(text)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Parse the command line; the settings begin as those of a preset."""
    parser = make_parser(__doc__, "translation")
    add = parser.add_argument
    once = parser.add_mutually_exclusive_group().add_argument
    add("--data", type=existing_folder, metavar="DIR", help="parallel text; without it, phrases")
    add("--from", dest="source", default="de", help="language to translate from")
    add("--to", dest="target", default="en", help="language to translate to")
    once("--resume", action="store_true", help="continue from a checkpoint, if there is one")
    once("--restart", action="store_true", help="begin anew; old results move to previous/")
    add("--save-minutes", type=number(0.0, 1e6), default=10.0, help="between checkpoints")
    add("--translate", metavar="TEXT", help="translate and exit; - reads stdin")
    add("--beam", type=number(1, 100), default=4, help="unfinished translations to keep")
    add("--preset", choices=PRESETS, help="set of settings; small with --data, else phrases")
    group = parser.add_argument_group("settings, in the presets phrases | small | base")
    for name, (low, high, text) in RANGES.items():
        values = " | ".join(str(getattr(preset, name)) for preset in PRESETS.values())
        kind: dict[str, Any] = {"type": number(low, high), "metavar": "N"}
        if isinstance(low, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        about = f"{text} ({values})"
        group.add_argument(flag(name), default=argparse.SUPPRESS, help=about, **kind)
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset or ("small" if args.data else "phrases")]
    changes = {name: value for name, value in vars(args).items() if name in RANGES}
    try:
        if not args.data:
            check_languages([args.source, args.target])
        return args, replace(preset, **changes)
    except ValueError as error:
        parser.error(f"argument {error}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, test and save, or translate; return the exit status."""
    started = time.perf_counter()
    args, settings = parse(argv)
    out = args.out
    if args.translate is not None:
        model, tokenizer = open_model(out / "model.safetensors")
        return show_translations(model.to(args.device), tokenizer, args.translate, args.beam)
    languages = [args.source, args.target]
    checkpoint = out / "checkpoint.pt"
    out.mkdir(parents=True, exist_ok=True)
    with joined_processes(args.device), alone(out):
        by_first(lambda: check_checkpoint(checkpoint, args.resume, args.restart))
        folder, tests = by_first(lambda: open_data(args.data, languages, out))
        encoded, counts = by_first(
            lambda: prepare_corpus(folder, languages, settings.vocab_size, out / "corpus")
        )
        tokenizer = open_tokenizer((encoded / "tokenizer.json").read_text(encoding="utf-8"))
        identity = {"seed": args.seed, "languages": languages, "text": encoded.name}
        identity |= asdict(settings)
        by_first(lambda: set_aside(out, args.resume))
        run = begin(checkpoint, identity, settings, tokenizer, args.device)
        stopped = show_training(run, encoded, counts, out, args.save_minutes)
        if not stopped:
            by_first(lambda: show_results(run, folder, tests, args.beam, out, started))
        elif rank_and_world()[0] == 0:
            print("translation.py: stopped; use --resume to continue", file=sys.stderr)
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    raise SystemExit(main())
