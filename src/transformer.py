#!/usr/bin/env python3
"""The whole Transformer learns to read dates in many languages, or to translate your own text.

Run `poetry run src/transformer.py`. It is the network of Vaswani et al. 2017, "Attention Is All You
Need" (arXiv 1706.03762), on the attention of attention.py, and reads `12 de octubre de 1968` as
`1968-10-12` after about 130 s. With `--data DIR --from de --to en` it learns from train.de and on
instead. Results go to runs/transformer/, where `--translate "12 mars 2021"` finds them and
`--resume` goes on. `poetry run torchrun --nproc-per-node 2 src/transformer.py` uses two processes.
"""

import argparse
import datetime
import functools
import gzip
import io
import json
import math
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from random import Random

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from babel.dates import format_date, get_date_format
from matplotlib.figure import Figure
from sacrebleu.metrics import BLEU
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from attention import Attended, MultiHeadAttention, causal_mask, positional_encoding, write

OUT = Path(__file__).resolve().parent.parent / "runs/transformer"
PAD, BOS, EOS = range(3)  # what no text holds: padding, beginning and end of a sequence
MAX_LENGTH = 256  # tokens in a sequence, with its end
LANGUAGES = (
    "ar", "bg", "cs", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "hu",
    "it", "ja", "ka", "ko", "nl", "pl", "pt", "ru", "sv", "th", "tr", "uk", "zh",
)  # fmt: skip
FIRST_DAY, DAYS = datetime.date(1900, 1, 1), 73_049  # up to the end of 2099
TEST_DAYS, VALIDATION_DAYS = 5000, 1000  # on which no training date falls, in any language
EXAMPLE = ("sábado, 12 de octubre de 1968", "1968-10-12")  # to draw

Pair = tuple[str, str]  # source and target
Ids = list[int]


@dataclass(frozen=True)
class Settings:
    """What shapes the network and its training. These are for dates."""

    d_model: int = 64
    num_heads: int = 4
    num_layers: int = 2
    d_ff: int = 256
    dropout: float = 0.0
    norm_first: bool = False
    vocab_size: int = 2000  # at most
    batch_tokens: int = 4096  # of source and target, with padding
    warmup: int = 400  # steps
    epochs: int = 4
    epoch_dates: int = 50_000  # that are drawn anew in each


TEXT = Settings(
    d_model=256, num_layers=3, d_ff=512, dropout=0.2, norm_first=True, vocab_size=6000, warmup=800,
    epochs=13,
)  # fmt: skip


def change_settings(settings: Settings, changes: Sequence[str]) -> Settings:
    """Change settings, each by `name=value`. Raises ValueError if one makes no sense."""
    values = asdict(settings)
    for name, _, text in (change.partition("=") for change in changes):
        kind = type(values.get(name, ""))
        try:
            value = {"true": True, "false": False}[text] if kind is bool else kind(text)
            lowest, highest = (0, 0.9) if name == "dropout" else (kind is int, math.inf)
            if not lowest <= value <= highest:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{name}={text} is no setting, or no value for it") from None
        values[name] = value
    if values["d_model"] % values["num_heads"]:
        raise ValueError("d_model can't be divided into num_heads")
    return Settings(**values)


@dataclass(frozen=True)
class Corpus:
    """Pairs to learn from in each epoch, to validate on, and to test on by name."""

    train: Callable[[int], list[Pair]]
    validation: list[Pair]
    tests: dict[str, list[Pair]]


@dataclass
class Progress:
    """Where a training stands. All that is random follows from this."""

    seed: int
    epoch: int = 0
    batch: int = 0  # that comes next in the epoch
    step: int = 0
    loss: float = 0.0  # summed over the tokens of the epoch
    count: int = 0  # of these tokens
    best: float = math.inf
    rows: list[list[float]] = field(default_factory=list)  # epoch, losses, seconds


@functools.cache
def date_forms(language: str) -> list[str]:
    """Return the medium, long and full pattern of Unicode's CLDR that can be read in one way only.

    A date with slashes can't, for 1/2/1968 is two days, unless it begins with the year.
    """
    forms = [get_date_format(form, language).pattern for form in ("medium", "long", "full")]
    return [form for form in forms if form.startswith("y") or "/" not in form]


def sample_dates(days: Sequence[int], languages: Sequence[str], random: Random) -> list[Pair]:
    """Write days, counted from FIRST_DAY, as people do in the language that goes with each."""
    pairs = []
    for day, language in zip(days, languages, strict=True):
        date, form = FIRST_DAY + datetime.timedelta(days=day), random.choice(date_forms(language))
        pairs.append((format_date(date, form, language), date.isoformat()))
    return pairs


def date_corpus(settings: Settings, seed: int) -> Corpus:
    """Split the days, so that the network has seen none of those that it is tested on."""
    days = Random(0).sample(range(DAYS), DAYS)
    tests, days = days[:TEST_DAYS], days[TEST_DAYS:]
    validation, days = days[:VALIDATION_DAYS], days[VALIDATION_DAYS:]

    def draw(days: Sequence[int], random: Random) -> list[Pair]:
        return sample_dates(days, random.choices(LANGUAGES, k=len(days)), random)

    def train(epoch: int) -> list[Pair]:
        random = Random(f"{seed} {epoch}")
        return draw(random.choices(days, k=settings.epoch_dates), random)

    split = {language: tests[i :: len(LANGUAGES)] for i, language in enumerate(LANGUAGES)}
    tests = {
        name: sample_dates(days, [name] * len(days), Random(2)) for name, days in split.items()
    }
    return Corpus(train, draw(validation, Random(1)), tests)


def read_lines(path: Path) -> list[str]:
    """Read the lines of `path` or `path`.gz, UTF-8. Raises OSError if that can't be done."""
    zipped = path.with_name(path.name + ".gz")
    path = zipped if zipped.exists() else path
    try:
        raw = gzip.decompress(path.read_bytes()) if path is zipped else path.read_bytes()
        return raw.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, zlib.error) as error:
        raise OSError(f"{path} is broken: {error}") from error


def read_pairs(folder: Path, split: str, languages: Sequence[str]) -> list[Pair]:
    """Read a split, one sentence a line. Raises OSError if its two files don't go together."""
    source, target = (read_lines(folder / f"{split}.{language}") for language in languages)
    if len(source) != len(target):
        names = " and ".join(f"{split}.{language}" for language in languages)
        raise OSError(f"{folder}: {names} have {len(source)} and {len(target)} lines")
    return list(zip(source, target, strict=True))


def text_corpus(folder: Path, languages: Sequence[str]) -> Corpus:
    """Read train.*, val.* and every test*.* of two languages. Raises OSError if one is broken."""
    train, validation = (read_pairs(folder, split, languages) for split in ("train", "val"))
    ending = f".{languages[0]}"
    found = {path.name.removesuffix(".gz") for path in folder.glob("test*")}
    names = sorted(name.removesuffix(ending) for name in found if name.endswith(ending))
    tests = {name: read_pairs(folder, name, languages) for name in names}
    for pairs in (train, validation, [pair for test in tests.values() for pair in test]):
        if not any(source.strip() and target.strip() for source, target in pairs):
            raise OSError(f"{folder} needs sentences in train.*, val.* and test*.*")
    return Corpus(lambda epoch: train, validation, tests)


def make_tokenizer(texts: Iterable[str], vocab_size: int, words: bool) -> Tokenizer:
    """Learn byte-pair encoding (Sennrich et al. 2016) within words, or just whole characters.

    It starts from bytes, so that every text can be encoded and comes back as it was.
    """
    tokenizer = Tokenizer(models.BPE())
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    apart = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.pre_tokenizer = in_bytes if words else pre_tokenizers.Sequence([apart, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
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


def make_batches(pairs: Sequence[tuple[Ids, Ids]], tokens: int, random: Random) -> list[list[int]]:
    """Group the indices of pairs of like length: at most `tokens` a batch, with padding."""
    lengths = [(len(source), len(target)) for source, target in pairs]
    batches, widths = [[]], (0, 0)
    for i in sorted(range(len(pairs)), key=lambda i: (sum(lengths[i]), random.random())):
        widths = tuple(map(max, widths, lengths[i]))
        if batches[-1] and (len(batches[-1]) + 1) * sum(widths) > tokens:
            batches.append([])
            widths = lengths[i]
        batches[-1].append(i)
    random.shuffle(batches)
    return batches


def pad(sequences: Iterable[Ids], device: torch.device) -> Tensor:
    """Make a tensor (B, T) of sequences, with PAD after their end."""
    rows = [torch.tensor(ids) for ids in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=PAD).to(device)


@dataclass
class Cache:
    """Keys and values (2, B, H, T, d_k) that a layer of the decoder need not compute again."""

    target: Tensor | None = None  # of the tokens so far
    memory: Tensor | None = None


class Dropout(nn.Dropout):
    """nn.Dropout, on a CPU with p in 256ths: its own mask would take a fifth of a step on text."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share p of its numbers set to 0 and the others scaled up."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        keep = 256 - round(256 * self.p)
        integers = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = integers.view(torch.uint8)[: x.numel()].view_as(x) < keep  # a random byte each
        return x * kept.to(x.dtype).mul_(256 / keep)


class AddNorm(nn.Module):
    """LayerNorm(x + dropout(sublayer(x))), sections 3.1 and 5.4; or the norm goes first.

    x + dropout(sublayer(LayerNorm(x))) is easier to train when deep (Xiong et al. 2020).
    """

    def __init__(self, d_model: int, dropout: float, norm_first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)
        self.norm_first = norm_first

    def before(self, x: Tensor) -> Tensor:
        """Return what the sublayer gets of x (B, T, d_model)."""
        return self.norm(x) if self.norm_first else x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of x and what the sublayer made of it, y."""
        x = x + self.dropout(y)
        return x if self.norm_first else self.norm(x)


class FeedForward(nn.Sequential):
    """max(0, xW₁ + b₁)W₂ + b₂ for each position alone, section 3.3."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, section 3.1."""

    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, dropout: float, norm_first: bool
    ) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, num_heads)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.norms = nn.ModuleList(AddNorm(d_model, dropout, norm_first) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return x (B, S, d_model) after the layer; the mask broadcasts to (B, S, S)."""
        h = self.norms[0].before(x)
        x = self.norms[0].after(x, self.self_attention(h, h, h, mask)[0])
        return self.norms[1].after(x, self.feed_forward(self.norms[1].before(x)))


class DecoderLayer(nn.Module):
    """The same with attention to the memory, the output of the encoder, in between."""

    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, dropout: float, norm_first: bool
    ) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, num_heads)
        self.cross_attention = MultiHeadAttention(d_model, num_heads)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.norms = nn.ModuleList(AddNorm(d_model, dropout, norm_first) for _ in range(3))

    def forward(
        self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor, cache: Cache,
        need_weights: bool,
    ) -> Attended:  # fmt: skip
        """Return x (B, T, d_model) after the layer, and the weights (B, H, T, S) on the memory.

        x goes on from the cache, which grows by it; the mask is (T, T and all before it).
        """
        QKV = self.self_attention.project(self.norms[0].before(x), 0, 3)
        Q, KV = QKV[0], QKV[1:]
        cache.target = KV if cache.target is None else torch.cat((cache.target, KV), dim=-2)
        x = self.norms[0].after(x, self.self_attention.attend(Q, *cache.target, mask)[0])

        (Q,) = self.cross_attention.project(self.norms[1].before(x), 0, 1)
        if cache.memory is None:
            cache.memory = self.cross_attention.project(memory, 1, 3)
        attend = self.cross_attention.attend
        attended, weights = attend(Q, *cache.memory, memory_mask, need_weights)
        x = self.norms[1].after(x, attended)
        return self.norms[2].after(x, self.feed_forward(self.norms[2].before(x))), weights


class Transformer(nn.Module):
    """Encoder and decoder of section 3, for sequences of up to MAX_LENGTH tokens.

    Source, target and output share one embedding (3.4). It starts at 1/√d_model, so that multiplied
    by √d_model it is as large as the positions, and the first logits have a variance of about 1.
    """

    def __init__(
        self, vocab_size: int, d_model: int, num_heads: int, num_layers: int, d_ff: int,
        dropout: float, norm_first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = Dropout(dropout)
        layer = (d_model, num_heads, d_ff, dropout, norm_first)
        self.encoder = nn.ModuleList(EncoderLayer(*layer) for _ in range(num_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*layer) for _ in range(num_layers))
        norms = [nn.LayerNorm(d_model) if norm_first else nn.Identity() for _ in range(2)]
        self.encoder_norm, self.decoder_norm = norms  # a sum that no norm has come after
        self.register_buffer(
            "positions", positional_encoding(MAX_LENGTH, d_model), persistent=False
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Return embeddings with positions from `start` on, 3.4 and 3.5: (B, T) -> (B, T, d_model).

        Raises ValueError if there are more than MAX_LENGTH.
        """
        end = start + tokens.shape[1]
        if end > MAX_LENGTH:
            raise ValueError(f"{end} tokens are more than {MAX_LENGTH}")
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(x + self.positions[start:end])

    def encode(self, source: Tensor) -> Tensor:
        """Return the memory (B, S, d_model) of the source (B, S)."""
        x, mask = self.embed(source), (source != PAD).unsqueeze(1)  # (B, 1, S)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x)

    def decode(
        self, target: Tensor, memory: Tensor, source: Tensor, caches: Sequence[Cache] | None = None,
        need_weights: bool = False,
    ) -> Attended:  # fmt: skip
        """Return the logits (B, T, V) of the token after each one of the target (B, T).

        With caches, one a layer, the target goes on from where they end, and they grow. The last
        layer's weights (B, H, T, S) come with them if they are asked for. The target needs no mask
        for padding: it stands at the end, where the causal mask hides it.
        """
        caches = caches or [Cache() for _ in self.decoder]
        start = 0 if caches[0].target is None else caches[0].target.shape[-2]
        mask = causal_mask(start + target.shape[1], target.device)[start:]
        memory_mask = (source != PAD).unsqueeze(1)  # (B, 1, S)
        x = self.embed(target, start)
        for layer, cache in zip(self.decoder, caches, strict=True):
            x, weights = layer(x, mask, memory, memory_mask, cache, need_weights)
        return F.linear(self.decoder_norm(x), self.embedding.weight), weights

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the token after each one of the target (B, T)."""
        return self.decode(target, self.encode(source), source)[0]


def make_model(settings: Settings, tokenizer: Tokenizer) -> Transformer:
    """Make a network with the sizes of the settings. Raises ValueError if they don't fit."""
    sizes = ("d_model", "num_heads", "num_layers", "d_ff", "dropout", "norm_first")
    return Transformer(tokenizer.get_vocab_size(), *(getattr(settings, name) for name in sizes))


def rate(step: int, d_model: int, warmup: int) -> float:
    """Return the learning rate of a step, from 1 on: equation 3 in section 5.3."""
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, pairs: Sequence[tuple[Ids, Ids]],
    settings: Settings, progress: Progress, interrupted: threading.Event,
) -> bool:  # fmt: skip
    """Train on an epoch from progress.batch on; return False if it was interrupted before the end.

    Each of several processes does its share of every batch. Raises FloatingPointError if the loss
    is no longer a finite number.
    """
    device = next(model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    random = Random(f"{progress.seed} {progress.epoch}")
    batches = make_batches(pairs, settings.batch_tokens, random)
    model.train()
    bar = tqdm(
        batches[progress.batch :], initial=progress.batch, total=len(batches), unit="batch",
        leave=False, disable=None if rank == 0 else True,
    )  # fmt: skip
    for batch in bar:
        share = [pairs[i] for i in batch[rank::world]] or [([PAD], [PAD, PAD])]
        source, target = (pad(side, device) for side in zip(*share, strict=True))
        count = sum(len(pairs[i][1]) - 1 for i in batch)
        torch.manual_seed(hash((progress.seed, progress.step, rank)) % 2**63)
        left = 1 - (progress.epoch + progress.batch / len(batches)) / settings.epochs
        for group in optimizer.param_groups:  # falls to 0, which the paper's rate alone does not
            group["lr"] = left * rate(progress.step + 1, settings.d_model, settings.warmup)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(source, target[:, :-1])
            loss = F.cross_entropy(
                logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, reduction="sum",
                label_smoothing=0.1,
            ) / count  # fmt: skip
        optimizer.zero_grad()
        (loss * world).backward()  # for the gradients are averaged over the processes
        optimizer.step()
        if world > 1:
            dist.all_reduce(loss.detach_())
        mean = loss.item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss became {mean}; a longer warmup may help")
        progress.loss += mean * count
        progress.count += count
        progress.step += 1
        progress.batch += 1
        if rank == 0 and interrupted.is_set():
            return progress.batch == len(batches)
    return True


@torch.inference_mode()
def evaluate(model: Transformer, pairs: Sequence[tuple[Ids, Ids]], tokens: int) -> float:
    """Return the mean cross-entropy of the target's tokens, in nats."""
    device, total, count = model.embedding.weight.device, 0.0, 0
    model.eval()
    for batch in make_batches(pairs, tokens, Random(0)):
        source, target = (pad((pairs[i][side] for i in batch), device) for side in (0, 1))
        logits, labels = model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten()
        total += F.cross_entropy(logits, labels, ignore_index=PAD, reduction="sum").item()
        count += (labels != PAD).sum().item()
    return total / count


@torch.inference_mode()
def search(
    model: Transformer, source: Tensor, beam: int, alpha: float = 0.6, use_cache: bool = True
) -> list[Ids]:
    """Find the likeliest targets of the source (B, S), without BOS and EOS; beam 1 is greedy.

    Keeps the `beam` best at every step by log P / lp, where lp = ((5 + length) / 6)^alpha, equation
    14 of Wu et al. 2016. A target is at most twice as long as the longest source, plus 20 tokens.
    """
    B, limit = len(source), min(2 * source.shape[1] + 20, MAX_LENGTH)
    first = torch.arange(B, device=source.device).unsqueeze(1) * beam  # row of a source's best
    memory = model.eval().encode(source).repeat_interleave(beam, dim=0)
    source = source.repeat_interleave(beam, dim=0)
    caches = [Cache() for _ in model.decoder] if use_cache else None
    target = torch.full((B * beam, 1), BOS, device=source.device)
    score = torch.full((B, beam), -math.inf, device=source.device)
    score[:, 0] = 0.0  # all are the same now, so that the others must not count
    length = torch.zeros(B, beam, device=source.device)
    done = torch.zeros(B, beam, dtype=torch.bool, device=source.device)
    for _ in range(limit):
        logits, _ = model.decode(target[:, -1:] if use_cache else target, memory, source, caches)
        step = logits[:, -1].float().log_softmax(dim=-1).view(B, beam, -1)  # (B, beam, V)
        step[done] = -math.inf
        step[..., PAD] = torch.where(done, 0.0, -math.inf)  # nothing but PAD comes after the end
        length += ~done
        penalty = ((5 + length) / 6) ** alpha
        total = score.unsqueeze(-1) + step
        _, best = (total / penalty.unsqueeze(-1)).flatten(1).topk(beam)
        score = total.flatten(1).gather(1, best)
        parent, token = best // step.shape[-1], best % step.shape[-1]
        done, length = done.gather(1, parent) | (token == EOS), length.gather(1, parent)
        rows = (first + parent).flatten()
        target = torch.cat((target[rows], token.view(-1, 1)), dim=1)
        if done.all():
            break
        for cache in caches or ():
            cache.target = cache.target[:, rows]
    return [[i for i in ids if i > EOS] for ids in target[::beam].tolist()]


def translate(
    model: Transformer, tokenizer: Tokenizer, lines: Sequence[str], beam: int
) -> list[str | None]:
    """Translate lines; an empty one stays empty, and one that is too long becomes None."""
    ids = [[*encoding.ids, EOS] for encoding in tokenizer.encode_batch_fast(lines)]
    device = model.embedding.weight.device
    found = [None if len(line) > MAX_LENGTH else "" for line in ids]
    order = [i for i, line in enumerate(lines) if line.strip() and found[i] is not None]
    order.sort(key=lambda i: len(ids[i]))
    for start in range(0, len(order), 100):
        rows = order[start : start + 100]
        targets = search(model, pad((ids[i] for i in rows), device), beam)
        for i, text in zip(rows, tokenizer.decode_batch(targets), strict=True):
            found[i] = text
    return found


def draw_losses(rows: Sequence[Sequence[float]]) -> Figure:
    """Draw the losses by epoch."""
    epoch, training, validation, _ = zip(*rows, strict=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots(subplot_kw={"xlabel": "epoch", "ylabel": "nats a token"})
    axes.plot(epoch, training, "o-", epoch, validation, "o-")
    axes.legend(["training loss, labels smoothed", "validation loss"])
    axes.locator_params(axis="x", integer=True)
    return figure


@torch.inference_mode()
def draw_attention(model: Transformer, tokenizer: Tokenizer, text: str, answer: str) -> Figure:
    """Draw where the last layer looks in the text to write each token: the mean of its heads."""
    device = model.embedding.weight.device
    source, target = encode(tokenizer, [(text, answer)])[0]
    x, y = pad([source], device), pad([target[:-1]], device)
    _, weights = model.eval().decode(y, model.encode(x), x, need_weights=True)
    names = [[tokenizer.decode([i]) for i in ids[:-1]] + ["end"] for ids in (source, target[1:])]
    figure = Figure(figsize=(1 + len(source) / 4, 1 + len(target) / 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(weights[0].mean(dim=0).cpu().numpy(), cmap="Blues")
    axes.set_xticks(range(len(names[0])), names[0], parse_math=False)
    axes.set_yticks(range(len(names[1])), names[1], parse_math=False)
    axes.set(xlabel="looks at", ylabel="writes")
    return figure


def speed_up(model: Transformer) -> None:
    """Let a CPU that has bfloat16 use it for large products; fused attention is slow with it."""
    if model.embedding.weight.device.type == "cpu" and model.embedding.embedding_dim >= 256:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.enable_flash_sdp(False)  # named for CUDA, but a CPU obeys as well


def save_model(path: Path, model: Transformer, tokenizer: Tokenizer, settings: Settings) -> None:
    """Write all that it takes to translate into one file."""
    about = {"settings": json.dumps(asdict(settings)), "tokenizer": tokenizer.to_str()}
    write(path, safetensors.torch.save(model.state_dict(), about))


def open_model(path: Path) -> tuple[Transformer, Tokenizer]:
    """Read what `save_model` wrote. Raises OSError if `path` is not such a file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
            tokenizer = open_tokenizer(about["tokenizer"])
            model = make_model(Settings(**json.loads(about["settings"])), tokenizer)
            model.load_state_dict({name: file.get_tensor(name) for name in model.state_dict()})
    except Exception as error:  # a broken file can fail in many ways
        reason = str(error).partition("\n")[0]
        raise OSError(f"no model of this script, train one first: {path}: {reason}") from error
    return model, tokenizer


def save_checkpoint(
    path: Path, run: dict[str, object], progress: Progress, tokenizer: Tokenizer, model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """Write all that it takes to go on as if nothing had happened."""
    state = {
        "run": run, "progress": asdict(progress), "tokenizer": tokenizer.to_str(),
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def open_checkpoint(path: Path, run: dict[str, object]) -> dict[str, object] | None:
    """Read what `save_checkpoint` wrote; None if it never did.

    Raises OSError if `path` is not such a file or that of another run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        old = state["run"]
    except FileNotFoundError:
        return None
    except Exception as error:  # a broken file can fail in many ways
        reason = str(error).partition("\n")[0] or "it is cut short"
        raise OSError(f"nothing to resume: {path}: {reason}") from error
    changes = [f"{name} was {old.get(name)}" for name in run if old.get(name) != run[name]]
    if changes:
        raise OSError(f"{path} is of another run: {', '.join(changes)}")
    return state


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event, so that no step is left half done."""
    event = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def print_translations(
    model: Transformer, tokenizer: Tokenizer, lines: Iterable[str], beam: int
) -> None:
    """Print the translation of each line; nothing for one that is too long."""
    lines, number = iter(lines), 0
    while chunk := [line.rstrip("\r\n") for line in islice(lines, 1000)]:
        for text in translate(model, tokenizer, chunk, beam):
            number += 1
            if text is None:
                print(f"line {number} is longer than {MAX_LENGTH} tokens", file=sys.stderr)
            print((text or "").replace("\n", " "), flush=True)


def print_dates(tests: dict[str, list[Pair]], found: dict[str, list[str]]) -> dict[str, float]:
    """Print how many dates were read exactly, and examples, mistakes first; return the shares."""
    rows = [
        (language, text, guess, answer)
        for language, pairs in tests.items()
        for (text, answer), guess in zip(pairs, found[language], strict=True)
    ]
    wrong = [row for row in rows if row[2] != row[3]]
    exact = {"all": 1 - len(wrong) / len(rows)}
    for language, pairs in tests.items():
        exact[language] = 1 - sum(row[0] == language for row in wrong) / len(pairs)
    print(f"\nTest: {exact['all']:.2%} of {len(rows):,} dates exactly, on days never trained on")
    for start in range(0, len(tests), 9):
        names = list(tests)[start : start + 9]
        print("  ".join(f"{name} {exact[name]:6.1%}" for name in names))
    print()
    for language, text, guess, answer in (wrong + rows[:: len(rows) // 6 + 1])[:12]:
        print(f"{language}  {guess}  {'' if guess == answer else f'not {answer}':14}  {text}")
    return exact


def print_bleu(tests: dict[str, list[Pair]], found: dict[str, list[str]]) -> dict[str, float]:
    """Print BLEU by sacrebleu (Post 2018) with its signature, and examples; return the scores."""
    scores = {}
    for name, pairs in tests.items():
        sources, answers = zip(*pairs, strict=True)
        for metric in (BLEU(), BLEU(lowercase=True)):
            score = metric.corpus_score(found[name], [answers]).score
            scores[f"{name} {metric.get_signature()}"] = score
            print(f"{name}: BLEU {score:.2f}  {metric.get_signature()}")
        for example in list(zip(sources, found[name], answers, strict=True))[:3]:
            print("\n  {}\n  {}\n  {} (reference)".format(*example))
    return scores


def main(argv: Sequence[str] | None = None) -> int:
    """Train, test and save, or translate; return the exit status."""
    sys.stdout.reconfigure(encoding="utf-8")  # also into a pipe, or an old console
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    parser.add_argument("--data", type=Path, help="folder of parallel text; else dates")
    parser.add_argument("--from", dest="source", default="de", help="ending of the files to read")
    parser.add_argument("--to", dest="target", default="en", help="ending of the files to write")
    names = ", ".join(asdict(Settings()))
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help=f"change {names}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--device", default=device, help="where to compute")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="go on from a checkpoint, if any")
    parser.add_argument("--translate", metavar="TEXT", help="only translate; - reads lines")
    parser.add_argument("--beam", type=int, default=4, help="translations to keep in view")
    args = parser.parse_args(argv)
    if args.beam < 1 or not 0 <= args.seed < 2**63:
        parser.error("--beam from 1, --seed from 0, please")
    if args.data and not args.data.is_dir():
        parser.error(f"argument --data: there is no folder {args.data}")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        parser.error(f"argument --device: {args.device!r} can't be used here")
    try:
        settings = change_settings(TEXT if args.data else Settings(), args.set)
    except ValueError as error:
        parser.error(f"argument --set: {error}")
    started, model_path = time.perf_counter(), args.out / "model.safetensors"
    checkpoint, main_process = args.out / "checkpoint.pt", os.environ.get("RANK", "0") == "0"
    try:
        if args.translate is not None:
            model, tokenizer = open_model(model_path)
            speed_up(model.to(device))
            lines = [args.translate]
            if args.translate == "-":
                lines = io.TextIOWrapper(sys.stdin.buffer, "utf-8", errors="replace", newline="\n")
            print_translations(model, tokenizer, lines, args.beam)
            return 0

        args.out.mkdir(parents=True, exist_ok=True)
        languages = (args.source, args.target)
        run = asdict(settings) | {"seed": args.seed, "data": str(args.data), "languages": languages}
        state = open_checkpoint(checkpoint, run) if args.resume else None
        if args.resume and not state and main_process:
            print(f"{parser.prog}: no {checkpoint} yet, so from the beginning", file=sys.stderr)
        if args.data:
            corpus = text_corpus(args.data, languages)
        else:
            corpus = date_corpus(settings, args.seed)
        first = corpus.train(0)
        if state:
            tokenizer = open_tokenizer(state["tokenizer"])
        else:
            texts = (text for pair in first for text in pair)
            tokenizer = make_tokenizer(texts, settings.vocab_size, words=bool(args.data))
        pairs, validation = encode(tokenizer, first), encode(tokenizer, corpus.validation)
        if not pairs or not validation:
            raise OSError(f"{args.data}: all sentences of train.* or val.* are too long")

        if "WORLD_SIZE" in os.environ:
            dist.init_process_group()
            if device.type != "cpu":
                device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.manual_seed(args.seed)
        model, progress = make_model(settings, tokenizer).to(device), Progress(args.seed)
        speed_up(model)
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            progress = Progress(**state["progress"])
        trained = DistributedDataParallel(model) if dist.is_initialized() else model
        if main_process:
            if len(pairs) < len(first):
                left_out = f"{len(first) - len(pairs):,} of {len(first):,} pairs are left out"
                print(f"{left_out}: empty, or longer than {MAX_LENGTH} tokens")
            parameters = sum(p.numel() for p in model.parameters())
            print(f"{parameters:,} parameters on {device}, {len(pairs):,} pairs an epoch\n")
            print("epoch  training loss  validation loss  seconds")
        with interruptible() as interrupted:
            while progress.epoch < settings.epochs:
                start = time.perf_counter()
                if not args.data and progress.epoch:
                    pairs = encode(tokenizer, corpus.train(progress.epoch))
                if train_epoch(trained, optimizer, pairs, settings, progress, interrupted):
                    training = progress.loss / progress.count
                    progress.epoch, progress.batch = progress.epoch + 1, 0
                    progress.loss = progress.count = 0
                    if main_process:
                        loss = evaluate(model, validation, settings.batch_tokens)
                        seconds = time.perf_counter() - start
                        progress.rows.append([progress.epoch, training, loss, seconds])
                        row = "{:5}  {:13.4f}  {:15.4f}  {:7.1f}".format(*progress.rows[-1])
                        print(row, flush=True)
                        if loss < progress.best:
                            progress.best = loss
                            save_model(model_path, model, tokenizer, settings)
                if main_process:
                    save_checkpoint(checkpoint, run, progress, tokenizer, model, optimizer)
                    if interrupted.is_set():
                        print(f"{parser.prog}: stopped; --resume goes on", file=sys.stderr)
                        return 130
        if dist.is_initialized():
            dist.destroy_process_group()
        if not main_process:
            return 0

        model, tokenizer = open_model(model_path)
        found = {}
        for name, pairs in corpus.tests.items():
            texts = translate(model.to(device), tokenizer, [text for text, _ in pairs], args.beam)
            found[name] = [text or "" for text in texts]
        scores = (print_bleu if args.data else print_dates)(corpus.tests, found)
        metrics = {
            "settings": run, "torch": torch.__version__, "python": sys.version.split()[0],
            "epochs": progress.rows, "test": scores, "seconds": time.perf_counter() - started,
        }  # fmt: skip
        write(args.out / "metrics.json", json.dumps(metrics, indent=1).encode())
        write(args.out / "losses.png", draw_losses(progress.rows))
        known = (pair for pair in corpus.validation if encode(tokenizer, [pair]))
        example = next(known) if args.data else EXAMPLE
        write(args.out / "attention.png", draw_attention(model, tokenizer, *example))
        print(f"\nSaved in {args.out} after {metrics['seconds']:.1f} s")
    except (OSError, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
