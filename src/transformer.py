#!/usr/bin/env python3
"""The Transformer of "Attention Is All You Need" learns to read dates in 26 languages.

Run `poetry run src/transformer.py`. It builds the network of Vaswani et al. 2017 (arXiv 1706.03762)
on the attention of attention.py, and trains it to read `12 de octubre de 1968` as `1968-10-12`, in
about 70 s. Results go to runs/transformer/, where `--read "12 mars 2021"` finds them.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from attention import MultiHeadAttention, causal_mask, draw_heads, padding_mask, positional_encoding
from decoding.cache import Cache
from inputs.dates import normalize, sample_dates, share_exact, show_answer, show_test, split_days
from inputs.text import BOS, EOS, MAX_LENGTH, PAD, Pair
from running.shell import command, make_parser, number, open_weights, printable, save_weights, write

UNKNOWN = 3  # the token of a character that the vocabulary lacks
BATCHES = 625  # in an epoch
BATCH_SIZE = 64  # dates
WARMUP = 400  # steps
EXAMPLE = ("12 de octubre de 1968", "1968-10-12")  # to draw


class Epoch(NamedTuple):
    """The results of one epoch."""

    loss: float  # labels smoothed
    accuracy: float  # of the validation dates
    seconds: float


def make_vocabulary(pairs: Sequence[Pair]) -> dict[str, int]:
    """Number the characters of the texts, after PAD, BOS, EOS and UNKNOWN."""
    characters = sorted({c for text, iso in pairs for c in normalize(text) + iso})
    return {c: i for i, c in enumerate(characters, start=4)}


def encode(text: str, vocabulary: dict[str, int]) -> Tensor:
    """Return the tokens (S,) of a text, one per character of `normalize`, with EOS at the end."""
    return torch.tensor([vocabulary.get(c, UNKNOWN) for c in normalize(text)] + [EOS])


def make_batch(pairs: Sequence[Pair], vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Return the tokens of sources (B, S), padded, and of targets (B, T), which begin with BOS."""
    sources = [encode(text, vocabulary) for text, _ in pairs]
    targets = [F.pad(encode(iso, vocabulary), (1, 0), value=BOS) for _, iso in pairs]
    return pad_sequence(sources, batch_first=True, padding_value=PAD), torch.stack(targets)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a network. These are for dates."""

    d_model: int = 64
    num_heads: int = 4
    num_layers: int = 2
    d_ff: int = 256
    dropout: float = 0.0


class FeedForward(nn.Sequential):
    """max(0, xW₁ + b₁)W₂ + b₂ at each position, section 3.3."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each as LayerNorm(x + sublayer(x)), section 3.1."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(sizes.d_model, sizes.num_heads)
        self.feed_forward = FeedForward(sizes.d_model, sizes.d_ff)
        self.norm1 = nn.LayerNorm(sizes.d_model)
        self.norm2 = nn.LayerNorm(sizes.d_model)
        self.dropout = nn.Dropout(sizes.dropout)  # section 5.4

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return x (B, S, d_model) after the layer; the mask broadcasts to (B, S, S)."""
        x = self.norm1(x + self.dropout(self.self_attention(x, x, x, mask)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(nn.Module):
    """The same with attention to the memory, the encoder's output, in between."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(sizes.d_model, sizes.num_heads)
        self.cross_attention = MultiHeadAttention(sizes.d_model, sizes.num_heads)
        self.feed_forward = FeedForward(sizes.d_model, sizes.d_ff)
        self.norm1 = nn.LayerNorm(sizes.d_model)
        self.norm2 = nn.LayerNorm(sizes.d_model)
        self.norm3 = nn.LayerNorm(sizes.d_model)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """Return x (B, T, d_model) after the layer; masks broadcast to (B, T, T) and (B, T, S)."""
        x = self.norm1(x + self.dropout(self.self_attention(x, x, x, mask)))
        x = self.norm2(x + self.dropout(self.cross_attention(x, memory, memory, memory_mask)))
        return self.norm3(x + self.dropout(self.feed_forward(x)))


class Transformer(nn.Module):
    """Encoder and decoder of section 3, for sequences of up to MAX_LENGTH tokens.

    Source, target and output share one embedding, section 3.4. Its initial std is 1/√d_model: times
    √d_model it is about as large as the positions, and the first logits have variance 1.
    """

    encoder_layer: type[nn.Module] = EncoderLayer
    decoder_layer: type[nn.Module] = DecoderLayer

    def __init__(self, vocab_size: int, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, sizes.d_model)
        self.positions = nn.Buffer(positional_encoding(MAX_LENGTH, sizes.d_model), persistent=False)
        self.dropout = nn.Dropout(sizes.dropout)
        self.encoder = nn.ModuleList(self.encoder_layer(sizes) for _ in range(sizes.num_layers))
        self.decoder = nn.ModuleList(self.decoder_layer(sizes) for _ in range(sizes.num_layers))
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # As parts of one matrix (3 d_model, d_model), as nn.Transformer draws them.
                part = name.endswith(("W_q.weight", "W_k.weight", "W_v.weight"))
                nn.init.xavier_uniform_(parameter, gain=0.5**0.5 if part else 1.0)
        nn.init.normal_(self.embedding.weight, std=sizes.d_model**-0.5)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Return embeddings plus positions from `start` on: (B, T) -> (B, T, d_model).

        Sections 3.4 and 3.5. Raises ValueError if there are more than MAX_LENGTH.
        """
        end = start + tokens.shape[1]
        if end > MAX_LENGTH:
            raise ValueError(f"{end} tokens are more than {MAX_LENGTH}")
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(x + self.positions[start:end])

    def encode(self, source: Tensor) -> Tensor:
        """Return the memory (B, S, d_model) of the source (B, S)."""
        x = self.embed(source)
        mask = padding_mask(source, PAD)
        for layer in self.encoder:
            x = layer(x, mask)
        return x

    def decode(self, target: Tensor, memory: Tensor, memory_mask: Tensor, start: int = 0) -> Tensor:
        """Return the logits (B, T, V) of the token after each one of the target (B, T).

        The target needs no padding mask: padding stands at its end, where the causal mask hides it.
        With a `Cache`, pass only the new part of the target, which begins at `start`.
        """
        x = self.embed(target, start)
        mask = causal_mask(start + target.shape[1], target.device)[start:]
        for layer in self.decoder:
            x = layer(x, mask, memory, memory_mask)
        return self.to_logits(x)

    def to_logits(self, x: Tensor) -> Tensor:
        """Compare x (B, T, d_model) with all embeddings: logits (B, T, V)."""
        return F.linear(x, self.embedding.weight)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the token after each one of the target (B, T)."""
        return self.decode(target, self.encode(source), padding_mask(source, PAD))


@torch.inference_mode()
def generate(model: Transformer, source: Tensor, limit: int = 20) -> list[list[int]]:
    """Generate a target for each source (B, S), taking the likeliest next token at each step.

    Returns the tokens between BOS and EOS, at most `limit` of them.
    """
    memory = model.eval().encode(source)
    memory_mask = padding_mask(source, PAD)
    target = torch.full((len(source), 1), BOS, device=source.device)
    for _ in range(limit):
        logits = model.decode(target, memory, memory_mask)  # (B, T, V)
        target = torch.cat((target, logits[:, -1:].argmax(dim=-1)), dim=1)
        if (target == EOS).any(dim=1).all():
            break
    return cut_off_ends(target)


@torch.inference_mode()
def generate_cached(model: Transformer, source: Tensor, limit: int = 20) -> list[list[int]]:
    """Generate the same as `generate`; each step computes only the new token's keys and values."""
    memory = model.eval().encode(source)
    memory_mask = padding_mask(source, PAD)
    target = torch.full((len(source), 1), BOS, device=source.device)
    with Cache(model, memory):
        for t in range(limit):
            logits = model.decode(target[:, t:], memory, memory_mask, start=t)  # (B, 1, V)
            target = torch.cat((target, logits.argmax(dim=-1)), dim=1)
            if (target == EOS).any(dim=1).all():
                break
    return cut_off_ends(target)


def cut_off_ends(target: Tensor) -> list[list[int]]:
    """Return the tokens of targets (B, T) without BOS, each up to its first EOS."""
    rows = target[:, 1:].tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def learning_rate(step: int, d_model: int, warmup: int) -> float:
    """Return the learning rate of a step, counted from 1: equation 3, section 5.3."""
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


def train(
    model: Transformer, vocabulary: dict[str, int], epochs: int, seed: int
) -> Iterator[Epoch]:
    """Train on dates drawn anew in each epoch; yield its results.

    The loss is the mean with smoothed labels, in nats per token; the accuracy is the share of the
    validation dates predicted exactly. Raises FloatingPointError if the loss is not finite.
    """
    days, validation_days, _ = split_days()
    d_model = model.embedding.embedding_dim
    validation = sample_dates(validation_days, Random(1))
    optimizer = torch.optim.Adam(model.parameters(), 1.0, betas=(0.9, 0.98), eps=1e-9, fused=True)
    schedule = LambdaLR(  # which also falls to 0 at the end
        optimizer,
        lambda step: learning_rate(step + 1, d_model, WARMUP) * (1 - step / (epochs * BATCHES)),
    )
    for epoch in range(epochs):
        start = time.perf_counter()
        total = 0.0
        random = Random(f"{seed} {epoch}")
        pairs = sample_dates(random.choices(days, k=BATCHES * BATCH_SIZE), random)
        pairs.sort(key=lambda pair: len(pair[0]))  # similar lengths need little padding
        model.train()
        for n in tqdm(random.sample(range(BATCHES), BATCHES), leave=False, disable=None):
            batch = make_batch(pairs[n * BATCH_SIZE : (n + 1) * BATCH_SIZE], vocabulary)
            source, target = (tokens.to(model.positions.device) for tokens in batch)
            logits = model(source, target[:, :-1])
            labels = target[:, 1:]  # shifted by one: after each token comes the next
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            if not math.isfinite(total):
                raise FloatingPointError(f"the loss became {loss.item()}")
        found = read(model, vocabulary, [text for text, _ in validation])
        seconds = time.perf_counter() - start
        yield Epoch(total / BATCHES, share_exact(validation, found), seconds)


def read(model: Transformer, vocabulary: dict[str, int], texts: Sequence[str]) -> list[str]:
    """Return the network's prediction for each of the texts."""
    characters = {i: c for c, i in vocabulary.items()}
    found = []
    for start in range(0, len(texts), 500):
        sources = [encode(text, vocabulary) for text in texts[start : start + 500]]
        source = pad_sequence(sources, batch_first=True, padding_value=PAD)
        tokens = generate_cached(model, source.to(model.positions.device))
        found += ["".join(characters.get(i, "?") for i in row) for row in tokens]
    return found


@torch.inference_mode()
def look_inside(model: Transformer, source: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the weights (B, H, T, S) of each attention, by its name: decoder.1.cross_attention."""
    weights = {}
    names = {m: name for name, m in model.named_modules() if isinstance(m, MultiHeadAttention)}

    def keep(heads: MultiHeadAttention, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        weights[names[heads]] = heads.weights(*inputs)

    hooks = [heads.register_forward_hook(keep) for heads in names]
    try:
        model.eval()(source, target)
    finally:
        for hook in hooks:
            hook.remove()
    return weights


def draw_attention(model: Transformer, vocabulary: dict[str, int], pair: Pair) -> bytes:
    """Draw where each head of the last layer looks in a text to predict its date: a PNG."""
    device = model.positions.device
    source, target = make_batch([pair], vocabulary)
    weights = look_inside(model, source.to(device), target[:, :-1].to(device))
    last = f"decoder.{len(model.decoder) - 1}.cross_attention"
    text, iso = pair
    return draw_heads(weights[last][0], [*iso, "∎"], [*normalize(text), "∎"])


def open_model(path: Path) -> tuple[Transformer, dict[str, int]]:
    """Read the network and the vocabulary that `main` saved. Raises OSError if `path` has none."""

    def make(about: dict[str, str]) -> Transformer:
        return Transformer(4 + len(about["characters"]), Sizes())

    model, about = open_weights(path, make)
    return model, {c: i for i, c in enumerate(about["characters"], start=4)}


def save(model: Transformer, vocabulary: dict[str, int], metrics: object, out: Path) -> None:
    """Save the network with its vocabulary, a picture of where it looks, and the metrics."""
    about = {"characters": "".join(vocabulary)}
    save_weights(out / "model.safetensors", model, about)
    write(out / "attention.png", draw_attention(model, vocabulary, EXAMPLE))
    write(out / "metrics.json", json.dumps(metrics, indent=1, default=str).encode())


def readable(text: str) -> str:
    """Parse --read."""
    if not 0 < len(normalize(text)) < MAX_LENGTH:
        raise argparse.ArgumentTypeError(f"must have 1 to {MAX_LENGTH - 1} characters")
    return text


def show_training(epochs: Iterator[Epoch]) -> list[Epoch]:
    """Print the results of each epoch as it ends; return them all."""
    print("epoch  training loss  validation accuracy  seconds", flush=True)
    rows = []
    for row in epochs:
        rows.append(row)
        print("{:5}  {:13.4f}  {:19.2%}  {:7.1f}".format(len(rows), *row), flush=True)
    return rows


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, test and save, or read a date; return the exit status."""
    started = time.perf_counter()
    parser = make_parser(__doc__, "transformer")
    add = parser.add_argument
    add("--read", type=readable, metavar="DATE", help="read a date with the saved network")
    add("--epochs", type=number(1, 1000), default=3, help=f"of {BATCHES * BATCH_SIZE:,} dates")
    args = parser.parse_args(argv)
    if args.read is not None:
        model, vocabulary = open_model(args.out / "model.safetensors")
        (answer,) = read(model.to(args.device), vocabulary, [args.read])
        return show_answer(args.read, answer, vocabulary)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    days, _, test_days = split_days()
    vocabulary = make_vocabulary(sample_dates(days[:20_000], Random(0)))
    model = Transformer(4 + len(vocabulary), Sizes()).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}\n")
    rows = show_training(train(model, vocabulary, args.epochs, args.seed))
    pairs = sample_dates(test_days, Random(2))
    found = read(model, vocabulary, [text for text, _ in pairs])
    settings = vars(args) | {"torch": torch.__version__, "python": sys.version.split()[0]}
    metrics = {"settings": settings, "epochs": rows, "accuracy": share_exact(pairs, found)}
    save(model, vocabulary, metrics, args.out)
    show_test(pairs, found)
    print(f"\nSaved in {printable(args.out)} after {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
