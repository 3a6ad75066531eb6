#!/usr/bin/env python3
"""The Transformer learns to translate from your own parallel text: all that real work adds.

Run `poetry run src/translation.py --data DIR --from de --to en`, with a folder of train.de, val.de,
test*.de and the same with .en: one sentence per line, plain or gzipped. It trains the network of
transformer.py with a checkpoint after each epoch and at Ctrl-C (`--resume` continues), and measures
BLEU of a beam search. Results go to runs/translation/, where `--translate "ein Hund"` finds them.
`poetry run torchrun --nproc-per-node 2 src/translation.py …` trains with two processes.
"""

import argparse
import gzip
import io
import json
import math
import os
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from sacrebleu.metrics import BLEU
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from attention import draw_heads, padding_mask
from transformer import (
    BOS,
    EOS,
    MAX_LENGTH,
    PAD,
    DecoderLayer,
    EncoderLayer,
    Sizes,
    Transformer,
    cached,
    learning_rate,
)

OUT = Path(__file__).resolve().parent.parent / "runs/translation"
RANGES = {
    "d_model": (1, 4096), "num_heads": (1, 64), "num_layers": (1, 48), "d_ff": (1, 16_384),
    "dropout": (0, 0.9), "norm_first": (False, True), "vocab_size": (1, 100_000),
    "batch_tokens": (1, 1_000_000), "warmup": (1, 1_000_000), "epochs": (1, 10_000),
}  # fmt: skip

Pair = tuple[str, str]  # source and target
Ids = list[int]
Encoded = Sequence[tuple[Ids, Ids]]  # tokens of source and target


@dataclass(frozen=True)
class Settings(Sizes):
    """Sizes of the network and of its training. Raises ValueError if one is out of range."""

    d_model: int = 256
    num_layers: int = 3
    d_ff: int = 512
    dropout: float = 0.2
    norm_first: bool = True
    vocab_size: int = 6000  # at most
    batch_tokens: int = 4096  # of source and target, with padding
    warmup: int = 800  # steps
    epochs: int = 13

    def __post_init__(self) -> None:
        """Check the ranges, so that no option or file asks for more memory than there can be."""
        for name, value in asdict(self).items():
            lowest, highest = RANGES[name]
            if not lowest <= value <= highest:
                raise ValueError(f"{name} must be between {lowest:,} and {highest:,}")
        if self.d_model % self.num_heads:
            raise ValueError("d_model must be divisible by num_heads")


def change_settings(settings: Settings, changes: Sequence[str]) -> Settings:
    """Change settings, each by `name=value`. Raises ValueError for an invalid one."""
    values = asdict(settings)
    for name, _, text in (change.partition("=") for change in changes):
        if name not in values:
            raise ValueError(f"unknown setting {name}")
        parse = type(values[name])
        try:
            values[name] = {"true": True, "false": False}[text] if parse is bool else parse(text)
        except (KeyError, ValueError):
            raise ValueError(f"invalid value for {name}: {text[:20]!r}") from None
    return Settings(**values)


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
    loss: float = 0.0  # summed over the tokens of the epoch
    count: int = 0  # of these tokens
    best: float = math.inf
    rows: list[Epoch] = field(default_factory=list)


def read_lines(path: Path) -> list[str]:
    """Read the lines of `path` or `path`.gz, UTF-8. Raises OSError if that can't be done."""
    zipped = path.with_name(path.name + ".gz")
    path = zipped if zipped.exists() else path
    try:
        raw = gzip.decompress(path.read_bytes()) if path is zipped else path.read_bytes()
        return raw.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except (EOFError, gzip.BadGzipFile, ValueError, zlib.error) as error:
        raise OSError(f"{path} is broken: {error}") from error


def read_corpus(folder: Path, languages: Sequence[str]) -> dict[str, list[Pair]]:
    """Read train, val and every test* of two languages. Raises OSError if one is broken."""
    corpus, ending = {}, f".{languages[0]}"
    found = {path.name.removesuffix(".gz") for path in folder.glob("test*")}
    tests = sorted(name.removesuffix(ending) for name in found if name.endswith(ending))
    for split in ("train", "val", *tests):
        source, target = (read_lines(folder / f"{split}.{language}") for language in languages)
        if len(source) != len(target):
            names = " and ".join(f"{split}.{language}" for language in languages)
            raise OSError(f"{folder}: {names} have {len(source)} and {len(target)} lines")
        corpus[split] = list(zip(source, target, strict=True))
    for splits in (["train"], ["val"], tests):
        pairs = [pair for split in splits for pair in corpus[split]]
        if not any(source.strip() and target.strip() for source, target in pairs):
            raise OSError(f"{folder} needs sentences in train.*, val.* and test*.*")
    return corpus


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn byte-pair encoding (Sennrich et al. 2016) within words.

    It starts from bytes, so that every text can be encoded and comes back as it was.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, marks = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return open_tokenizer(tokenizer.to_str())


def open_tokenizer(text: str) -> Tokenizer:
    """Make a tokenizer that takes `<s>` in a text for what it is: three characters."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[tuple[Ids, Ids]]:
    """Return the tokens of source and target, which end in EOS; the target begins with BOS.

    Leaves out the pairs of which a side is empty or longer than MAX_LENGTH.
    """
    sources, targets = (tokenizer.encode_batch_fast([*side]) for side in zip(*pairs, strict=True))
    return [
        ([*source.ids, EOS], [BOS, *target.ids, EOS])
        for pair, source, target in zip(pairs, sources, targets, strict=True)
        if all(map(str.strip, pair)) and max(len(source), len(target)) < MAX_LENGTH
    ]


def make_batches(pairs: Encoded, tokens: int, random: Random) -> list[list[int]]:
    """Group the indices of pairs of like length: at most `tokens` per batch, with padding."""
    lengths = [(len(source), len(target)) for source, target in pairs]
    order = random.sample(range(len(pairs)), len(pairs))  # what is as long, stays as random
    batches: list[list[int]] = [[]]
    widest = (0, 0)
    for i in sorted(order, key=lambda i: sum(lengths[i])):
        widest = (max(widest[0], lengths[i][0]), max(widest[1], lengths[i][1]))
        if batches[-1] and (len(batches[-1]) + 1) * sum(widest) > tokens:
            batches.append([])
            widest = lengths[i]
        batches[-1].append(i)
    random.shuffle(batches)
    return batches


def pad(sequences: Iterable[Ids], device: torch.device) -> Tensor:
    """Make a tensor (B, T) of sequences, with PAD after their end."""
    rows = [torch.tensor(ids) for ids in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=PAD).to(device)


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


@dataclass
class Run:
    """A training: its identity, which no `--resume` may change, and its state."""

    identity: dict[str, Any]
    settings: Settings
    tokenizer: Tokenizer
    model: Transformer
    optimizer: torch.optim.Optimizer
    progress: Progress


def autocast(device: torch.device) -> torch.autocast:
    """Compute products in bfloat16 where the GPU can; older ones only emulate it, slowly."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def batch_loss(model: nn.Module, pairs: Encoded, device: torch.device, smoothing: float) -> Tensor:
    """Return the cross-entropy in nats, summed over the tokens of the targets."""
    source, target = (pad(side, device) for side in zip(*pairs, strict=True))
    with autocast(device):
        logits, labels = model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten()
        return F.cross_entropy(
            logits, labels, ignore_index=PAD, reduction="sum", label_smoothing=smoothing
        )


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process among those of torchrun, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def train_epoch(run: Run, model: nn.Module, pairs: Encoded, signals: Sequence[int]) -> bool:
    """Train from progress.batch on to the end of the epoch; return whether a signal stopped it.

    Each of several processes takes its share of every batch; a signal to one of them stops all.
    Raises FloatingPointError if the loss is not finite.
    """
    progress, settings, device = run.progress, run.settings, run.model.positions.device
    rank, world = rank_and_world()
    random = Random(f"{progress.seed} {progress.epoch}")
    batches = make_batches(pairs, settings.batch_tokens, random)
    if progress.batch == 0:
        progress.loss, progress.count = 0.0, 0
    stopped = False
    model.train()
    bar = tqdm(
        total=len(batches), initial=progress.batch, leave=False, disable=None if rank == 0 else True
    )
    while progress.batch < len(batches) and not stopped:
        batch = batches[progress.batch]
        # An empty share becomes a target without labels, which adds nothing to the loss.
        share = [pairs[i] for i in batch[rank::world]] or [([EOS], [BOS, PAD])]
        count = sum(len(pairs[i][1]) - 1 for i in batch)
        rate = learning_rate(progress.step + 1, settings.d_model, settings.warmup)
        remaining = 1 - (progress.epoch + progress.batch / len(batches)) / settings.epochs
        for group in run.optimizer.param_groups:
            group["lr"] = rate * remaining  # falls to 0, which the paper's does not
        torch.manual_seed(hash((progress.seed, progress.step, rank)) % 2**63)
        loss = batch_loss(model, share, device, smoothing=0.1)
        run.optimizer.zero_grad()
        (loss * world / count).backward()  # DDP averages the gradients over the processes
        run.optimizer.step()
        sums = torch.stack((loss.detach(), loss.new_tensor(len(signals))))
        if world > 1:
            dist.all_reduce(sums)
        total, stopped = sums[0].item(), sums[1].item() > 0
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss became {total}; a longer warmup may help")
        progress.loss += total
        progress.count += count
        progress.step += 1
        progress.batch += 1
        bar.update()
    bar.close()
    if progress.batch == len(batches):
        progress.epoch, progress.batch = progress.epoch + 1, 0
    return stopped


@torch.inference_mode()
def evaluate(model: Transformer, pairs: Encoded, tokens: int) -> float:
    """Return the mean cross-entropy of the target's tokens, in nats.

    Raises FloatingPointError if it is not finite.
    """
    device, total, count = model.eval().positions.device, 0.0, 0
    for batch in make_batches(pairs, tokens, Random(0)):
        total += batch_loss(model, [pairs[i] for i in batch], device, smoothing=0.0).item()
        count += sum(len(pairs[i][1]) - 1 for i in batch)
    if not math.isfinite(total):
        raise FloatingPointError(f"the validation loss became {total}; a longer warmup may help")
    return total / count


@torch.inference_mode()
def beam_search(
    model: Transformer, source: Tensor, beam: int, alpha: float = 0.6, use_cache: bool = True
) -> list[Ids]:
    """Search the likeliest target of each source (B, S); return their tokens without EOS.

    Keeps the `beam` likeliest unfinished targets of each source, and the best finished one by
    log P / ((5 + length) / 6)^alpha, equation 14 of Wu et al. 2016 (arXiv 1609.08144). A target has
    at most twice as many tokens as its source, plus 20; one cut there counts if none is finished.
    """
    B, device = len(source), source.device
    limit = (2 * (source != PAD).sum(dim=1) + 20).clamp(max=MAX_LENGTH)  # (B,)
    longest = int(limit.max())
    penalty = ((5 + torch.arange(longest + 1, device=device)) / 6) ** alpha  # of each length
    memory = model.eval().encode(source).repeat_interleave(beam, dim=0)  # (B * beam, S, d_model)
    memory_mask = padding_mask(source, PAD).repeat_interleave(beam, dim=0)
    likeliest = torch.arange(B, device=device) * beam  # its row among the targets of a source
    target = torch.full((B * beam, 1), BOS, device=device)
    score = torch.full((B, beam), -math.inf, device=device)  # log P of the unfinished
    score[:, 0] = 0.0  # all begin alike, so only one may count
    best = torch.full((B,), -math.inf, device=device)  # score of the finished
    found = torch.full((B, longest), PAD, device=device)
    names = ("self_attention.W_k", "self_attention.W_v")
    own = [layer.get_submodule(name) for layer in model.decoder for name in names]
    with ExitStack() as stack:
        kept = stack.enter_context(cached(model)) if use_cache else {}
        for length in range(1, longest + 1):
            start = length - 1 if use_cache else 0
            logits = model.decode(target[:, start:], memory, memory_mask, start)[:, -1]
            log_probabilities = logits.float().log_softmax(dim=-1).view(B, beam, -1)
            total = score.unsqueeze(-1) + log_probabilities  # (B, beam, V)

            ended, which = (total[..., EOS] / penalty[length]).max(dim=1)
            better = (ended > best) & (length <= limit)
            best = torch.where(better, ended, best)
            found[better, : length - 1] = target[(likeliest + which)[better], 1:]

            total[..., [PAD, BOS, EOS]] = -math.inf  # the others go on
            score, top = total.flatten(1).topk(beam)
            rows = (likeliest.unsqueeze(1) + top // total.shape[-1]).flatten()
            target = torch.cat((target[rows], (top % total.shape[-1]).view(-1, 1)), dim=1)
            cut = (length == limit) & best.isinf()
            found[cut, :length] = target[likeliest[cut], 1:]
            # No continuation can be better: log P only falls, and the penalty ends at the limit's.
            if ((best >= score[:, 0] / penalty[limit]) | (length >= limit)).all():
                break
            for W in own if use_cache else ():
                kept[W] = kept[W][rows]  # those of the memory are the same for a whole beam
            memory = memory[:, :0] if use_cache else memory
    return [[i for i in ids if i != PAD] for ids in found.tolist()]


def translate(
    model: Transformer, tokenizer: Tokenizer, lines: Sequence[str], beam: int
) -> list[str | None]:
    """Translate lines; an empty one stays empty, and one that is too long becomes None."""
    ids = [[*encoding.ids, EOS] for encoding in tokenizer.encode_batch_fast([*lines])]
    found = [None if len(line) > MAX_LENGTH else "" for line in ids]
    order = [i for i, line in enumerate(lines) if line.strip() and found[i] is not None]
    order.sort(key=lambda i: len(ids[i]))
    device = model.positions.device
    for start in range(0, len(order), 100):
        rows = order[start : start + 100]
        with autocast(device):
            targets = beam_search(model, pad((ids[i] for i in rows), device), beam)
        for i, text in zip(rows, tokenizer.decode_batch(targets), strict=True):
            found[i] = text
    return found


def bleu(tests: dict[str, list[Pair]], found: dict[str, list[str]]) -> dict[str, float]:
    """Return BLEU of each test by sacrebleu (Post 2018), named by the test and the signature."""
    scores = {}
    for name, pairs in tests.items():
        for metric in (BLEU(), BLEU(lowercase=True)):
            score = metric.corpus_score(found[name], [[target for _, target in pairs]]).score
            scores[f"{name} {metric.get_signature()}"] = score
    return scores


def draw_losses(rows: Sequence[Epoch]) -> bytes:
    """Draw the losses by epoch: a PNG."""
    epochs, training, validation, _ = zip(*rows, strict=True)
    figure, png = Figure(figsize=(6, 4), layout="constrained"), io.BytesIO()
    axes = figure.add_subplot(xlabel="epoch", ylabel="nats per token")
    axes.plot(epochs, training, "o-", label="training loss, labels smoothed")
    axes.plot(epochs, validation, "o-", label="validation loss")
    axes.legend()
    axes.locator_params(axis="x", integer=True)
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


@torch.inference_mode()
def draw_attention(model: Transformer, tokenizer: Tokenizer, pair: Pair) -> bytes:
    """Draw where each head of the last layer looks to predict each token: a PNG."""
    ((source, target),) = encode(tokenizer, [pair])
    kept: list[Tensor] = []
    heads = model.eval().decoder[-1].get_submodule("cross_attention")
    hook = heads.register_forward_hook(lambda heads, inputs, _: kept.append(heads.weights(*inputs)))
    model(*(pad([ids], model.positions.device) for ids in (source, target[:-1])))
    hook.remove()
    columns, rows = (  # a $ would begin a formula
        [tokenizer.decode([i]).replace("$", r"\$") for i in ids[:-1]] + ["end"]
        for ids in (source, target[1:])
    )
    return draw_heads(kept[0][0].cpu(), rows, columns)


def printable(text: object) -> str:
    """Return text without control characters, which could steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def write(path: Path, content: bytes) -> None:
    """Write a temporary file, then rename it, so that a crash never leaves a partial file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def refusing(path: Path, message: str) -> Iterator[None]:
    """Turn every error into an OSError: a broken or foreign file fails in many ways."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, FileNotFoundError | ValueError)
        reason = str(error).partition("\n")[0] if known else "it is broken, or another script's"
        raise OSError(f"{message}: {path}: {reason}") from error


def save_model(path: Path, model: Transformer, tokenizer: Tokenizer, settings: Settings) -> None:
    """Write all that it takes to translate into one file."""
    about = {"settings": json.dumps(asdict(settings)), "tokenizer": tokenizer.to_str()}
    write(path, safetensors.torch.save(model.state_dict(), about))


def open_model(path: Path) -> tuple[Transformer, Tokenizer]:
    """Read what `save_model` wrote. Raises OSError if `path` is not such a file."""
    with refusing(path, "no model saved by this script, train one first"):
        with safetensors.safe_open(path, "pt") as file:
            about, names = file.metadata(), set(file.keys())
            weights = {name: file.get_tensor(name) for name in names}
        tokenizer = open_tokenizer(about["tokenizer"])
        settings = Settings(**json.loads(about["settings"]))
        with torch.device("meta"):  # takes no memory, whatever the settings say
            expected = make_model(settings, tokenizer).state_dict()
        if any(weights[name].shape != x.shape for name, x in expected.items()):
            raise ValueError("its weights have other sizes than its settings")
        if not all(x.isfinite().all() for x in weights.values()):
            raise ValueError("some of its weights are not finite")
        model = make_model(settings, tokenizer)
        model.load_state_dict(weights)
    return model, tokenizer


def save_checkpoint(path: Path, run: Run) -> None:
    """Write all that it takes to continue as if nothing had happened."""
    state = {"run": run.identity, "tokenizer": run.tokenizer.to_str()}
    state |= {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    rows = [list(row) for row in run.progress.rows]  # for torch.load knows no NamedTuple
    buffer = io.BytesIO()
    torch.save(state | {"progress": asdict(run.progress) | {"rows": rows}}, buffer)
    write(path, buffer.getvalue())


def open_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises OSError if `path` is not such a file or that of another run.
    """
    with refusing(path, "nothing to resume"):
        with zipfile.ZipFile(path) as file:  # torch.load does not compare the checksums
            if file.testzip():
                raise ValueError("it is broken: a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        changes = [name for name in identity if state["run"].get(name) != identity[name]]
        before = ", ".join(f"{name} was {state['run'].get(name)}" for name in changes)
    if changes:
        raise OSError(f"{path} is of another run: {before}")
    return state


def prepare(
    path: Path, identity: dict[str, Any], pairs: Sequence[Pair], device: torch.device
) -> Run:
    """Begin a run, or take up that of the checkpoint. Raises OSError if that can't be done.

    The first of several processes learns the tokenizer, from the pairs, for all of them.
    """
    settings = Settings(**{name: identity[name] for name in RANGES})
    state, text = open_checkpoint(path, identity) if path.exists() else None, ""
    with refusing(path, "nothing to resume") if state else nullcontext():
        if state:
            text = state["tokenizer"]
        elif rank_and_world()[0] == 0:
            sentences = (sentence for pair in pairs for sentence in pair)
            text = make_tokenizer(sentences, settings.vocab_size).to_str()
        tokenizer, progress = open_tokenizer(gather(text)[0]), Progress(identity["seed"])
        torch.manual_seed(progress.seed)
        model = make_model(settings, tokenizer).to(device)
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            progress = Progress(**state["progress"])
            progress.rows = [Epoch(*row) for row in progress.rows]
            if len(progress.rows) != progress.epoch:
                raise ValueError("epochs are missing")
    return Run(identity, settings, tokenizer, model, optimizer, progress)


def fit(
    run: Run, pairs: Encoded, validation: Encoded, out: Path, signals: Sequence[int]
) -> Iterator[Epoch]:
    """Train to the last epoch or a signal; save, then yield the numbers of each epoch.

    Only the first of several processes saves and yields.
    """
    progress, model = run.progress, cast(nn.Module, run.model)
    if dist.is_initialized():
        model = DistributedDataParallel(run.model, broadcast_buffers=False)
    stopped = False
    while progress.epoch < run.settings.epochs and not stopped:
        epoch, start = progress.epoch, time.perf_counter()
        stopped = train_epoch(run, model, pairs, signals)
        if rank_and_world()[0] > 0:
            continue
        if progress.epoch > epoch:
            training_loss = progress.loss / progress.count
            loss = evaluate(run.model, validation, run.settings.batch_tokens)
            seconds = time.perf_counter() - start
            progress.rows.append(Epoch(progress.epoch, training_loss, loss, seconds))
            if loss < progress.best:
                progress.best = loss
                save_model(out / "model.safetensors", run.model, run.tokenizer, run.settings)
        save_checkpoint(out / "checkpoint.pt", run)
        if progress.epoch > epoch:
            yield progress.rows[-1]


def join_processes(device: torch.device) -> None:
    """Let the processes that torchrun has started find each other."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)  # else all talk by way of the first GPU
    dist.init_process_group()


def gather(mine: object) -> list[Any]:
    """Return what each of the processes passes, in all of them."""
    everyone = [mine] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, mine)
    return everyone


@contextmanager
def catching_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that no step is left half done; a second one ends at once."""
    signals: list[int] = []

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def catch(number: int, frame: object) -> None:
        signals.append(number)
        if not dist.is_initialized():  # torchrun sends its processes a second one by itself
            restore()

    old = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        restore()


def show_translations(model: Transformer, tokenizer: Tokenizer, text: str, beam: int) -> int:
    """Print the translation of a text, or of lines if it is `-`; return 1 if one is too long."""
    # Bytes that are not UTF-8 become surrogates in an argument.
    lines = iter([text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")])
    at_once, number, status = 1000, 0, 0
    if text == "-":
        if sys.stdin is None:
            raise OSError("there is no standard input")
        at_once = 1 if sys.stdin.isatty() else 1000  # a person waits for each answer
        lines = io.TextIOWrapper(sys.stdin.buffer, "utf-8-sig", errors="replace", newline="\n")
    while chunk := [line.rstrip("\r\n") for line in islice(lines, at_once)]:
        for found in translate(model, tokenizer, chunk, beam):
            number += 1
            if found is None:
                status = 1
                print(f"line {number} is longer than {MAX_LENGTH} tokens", file=sys.stderr)
            print((found or "").replace("\n", " "), flush=True)
    return status


def show_training(run: Run, corpus: dict[str, list[Pair]], out: Path) -> int:
    """Train and print a line per epoch; return the signal that stopped it, or 0."""
    pairs, validation = (encode(run.tokenizer, corpus[split]) for split in ("train", "val"))
    if not pairs or not validation:
        raise OSError("all sentences of train.* or val.* are too long")
    if len(set(gather((run.progress.step, len(pairs))))) > 1:
        raise OSError("the processes have read different files")
    if rank_and_world()[0] == 0:
        left_out, parameters = len(corpus["train"]) - len(pairs), list(run.model.parameters())
        if left_out:
            print(f"{left_out:,} pairs are left out: empty, or longer than {MAX_LENGTH} tokens")
        count, device = sum(p.numel() for p in parameters), parameters[0].device
        print(f"{count:,} parameters on {device}, {len(pairs):,} pairs per epoch\n")
        print("epoch  training loss  validation loss  seconds", flush=True)
    with catching_signals() as signals:
        for row in fit(run, pairs, validation, out, signals):
            print("{:5}  {:13.4f}  {:15.4f}  {:7.1f}".format(*row), flush=True)
    if not signals and run.progress.epoch == run.settings.epochs:
        return 0
    return (signals or [signal.SIGTERM])[0]  # another process got it


def save_results(
    run: Run, corpus: dict[str, list[Pair]], beam: int, out: Path
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Test the best network and save what comes of it; return scores and translations."""
    model, tokenizer = open_model(out / "model.safetensors")
    model.to(run.model.positions.device)
    tests = {name: pairs for name, pairs in corpus.items() if name.startswith("test")}
    found = {
        name: [text or "" for text in translate(model, tokenizer, [*sources], beam)]
        for name, (sources, _) in ((name, zip(*tests[name], strict=True)) for name in tests)
    }
    scores = bleu(tests, found)
    metrics = {
        "settings": run.identity | {"beam": beam}, "test": scores, "epochs": run.progress.rows,
        "torch": torch.__version__, "python": sys.version.split()[0],
    }  # fmt: skip
    write(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    write(out / "losses.png", draw_losses(run.progress.rows))
    example = next(pair for pair in corpus["val"] if encode(tokenizer, [pair]))
    write(out / "attention.png", draw_attention(model, tokenizer, example))
    return scores, found


def show_results(
    corpus: dict[str, list[Pair]], scores: dict[str, float], found: dict[str, list[str]]
) -> None:
    """Print the scores, and three examples of each test."""
    for name, score in scores.items():
        test, signature = name.rsplit(" ", 1)
        print(f"{printable(test)}: BLEU {score:.2f}  {signature}")
    for name, texts in found.items():
        for (source, target), text in list(zip(corpus[name], texts, strict=True))[:3]:
            print(f"\n  {printable(source)}\n  {printable(text)}")
            print(f"  {printable(target)} (reference)")


def usable_device(name: str) -> torch.device:
    """Parse --device; argparse refuses the option unless a tensor can be made there."""
    if name != "cpu" and "LOCAL_RANK" in os.environ:  # a GPU for each process, and no other
        name = f"{name.partition(':')[0]}:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # each kind of device fails in its own way
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{name!r} can't be used here: {reason}") from None
    return torch.device(name)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add, once = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--data", type=Path, help="folder of parallel text to train on")
    add("--from", dest="source", default="de", help="ending of the files to translate from")
    add("--to", dest="target", default="en", help="ending of the files to translate to")
    names = ", ".join(RANGES)
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help=f"change {names}")
    add("--seed", type=int, default=0, help="fixes every random choice")
    add("--device", type=usable_device, default=device, help="where to compute")
    add("--out", type=Path, default=OUT, help="folder for the results")
    once("--resume", action="store_true", help="continue from a checkpoint, if there is one")
    once("--restart", action="store_true", help="discard a checkpoint")
    add("--translate", metavar="TEXT", help="translate and exit; - reads lines")
    add("--beam", type=int, default=4, help="beam width: unfinished translations to keep")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, test and save, or translate; return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook, nor if stdout is closed
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    parser = make_parser()
    args = parser.parse_args(argv)
    if not 1 <= args.beam <= 100:
        parser.error("argument --beam: must be between 1 and 100")
    if not 0 <= args.seed < 2**63:
        parser.error("argument --seed: must be between 0 and 2**63 - 1")
    if args.translate is None and not (args.data and args.data.is_dir()):
        parser.error(f"argument --data: must be a folder of text to train on, got {args.data}")
    try:
        settings = change_settings(Settings(), args.set)
    except ValueError as error:
        parser.error(f"argument --set: {error}")
    started, model_path = time.perf_counter(), args.out / "model.safetensors"
    try:
        if args.translate is not None:
            model, tokenizer = open_model(model_path)
            return show_translations(model.to(args.device), tokenizer, args.translate, args.beam)
        languages, checkpoint = [args.source, args.target], args.out / "checkpoint.pt"
        corpus = read_corpus(args.data, languages)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.restart:
            checkpoint.unlink(missing_ok=True)
        elif checkpoint.exists() and not args.resume:
            raise OSError(f"{checkpoint} exists: --resume continues it, --restart discards it")
        elif args.resume and not checkpoint.exists():
            print(f"no {printable(checkpoint)} yet, so from the beginning", file=sys.stderr)
        if "WORLD_SIZE" in os.environ:
            join_processes(args.device)
        identity = {"seed": args.seed, "data": str(args.data), "languages": languages}
        identity |= asdict(settings)
        run = prepare(checkpoint, identity, corpus["train"], args.device)
        stopped, rank = show_training(run, corpus, args.out), rank_and_world()[0]
        if dist.is_initialized():
            dist.destroy_process_group()
        if stopped:
            if rank == 0:
                print(f"{parser.prog}: stopped; use --resume to continue", file=sys.stderr)
            return 128 + stopped
        if rank == 0:
            scores, found = save_results(run, corpus, args.beam, args.out)
            show_results(corpus, scores, found)
            print(f"\nSaved in {printable(args.out)} after {time.perf_counter() - started:.1f} s")
        print(end="", flush=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0] if isinstance(error, RuntimeError) else error
        print(f"{parser.prog}: {printable(reason)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
