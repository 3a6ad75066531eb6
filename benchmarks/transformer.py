#!/usr/bin/env python3
"""Measure transformer.py beside PyTorch's nn.Transformer and beside the matrix products alone.

    make bench

The same weights learn from the same batches in the same loop, in turn in one process; around
nn.Transformer go the same embedding, positions and output. Then the script decodes with and without
its cache. Prints medians of rounds after a warm-up.
"""

import copy
import importlib
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
script = importlib.import_module("transformer")

ROUNDS = 3
DATES = script.Settings(epoch_dates=1500)
TEXT = replace(script.TEXT, dropout=0.0)  # PyTorch's has dropout in more places
SENTENCES, WORDS = 300, (8, 28)  # of the text, and how many tokens one has
DECODED = 64  # tokens
BATCHES = (1, 8, 32)  # sentences to decode at once

Pairs = list[tuple[list[int], list[int]]]
Product = tuple[int, int, int, int]  # b times (m, k) by (k, n)


class PyTorchs(nn.Module):
    """nn.Transformer, post-norm, with the weights of ours and the same things around it."""

    def __init__(self, ours: nn.Module, settings: script.Settings) -> None:
        super().__init__()
        self.embedding, self.positions = copy.deepcopy(ours.embedding), ours.positions
        self.layers = nn.Transformer(
            settings.d_model, settings.num_heads, settings.num_layers, settings.num_layers,
            settings.d_ff, dropout=0.0, batch_first=True,
        )  # fmt: skip
        self.layers.encoder.norm = self.layers.decoder.norm = None
        others = [*self.layers.encoder.layers, *self.layers.decoder.layers]
        for layer, other in zip([*ours.encoder, *ours.decoder], others, strict=True):
            self.copy(layer.self_attention, other.self_attn)
            if hasattr(layer, "cross_attention"):
                self.copy(layer.cross_attention, other.multihead_attn)
            other.linear1.load_state_dict(layer.feed_forward[0].state_dict())
            other.linear2.load_state_dict(layer.feed_forward[2].state_dict())
            for i, add_norm in enumerate(layer.norms, start=1):
                getattr(other, f"norm{i}").load_state_dict(add_norm.norm.state_dict())
        self.to(ours.positions.device)

    @staticmethod
    def copy(heads: nn.Module, other: nn.MultiheadAttention) -> None:
        """Copy the weights of attention; its biases, which ours has not, stay 0."""
        other.in_proj_weight.data.copy_(heads.W_qkv.weight)
        other.out_proj.weight.data.copy_(heads.W_o.weight)
        for bias in (other.in_proj_bias, other.out_proj.bias):
            nn.init.zeros_(bias).requires_grad_(False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Do what ours does."""
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return x + self.positions[: tokens.shape[1]]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Do what ours does; PyTorch's masks are True where nothing may be attended to."""
        padding = source == script.PAD
        future = ~script.causal_mask(target.shape[1], target.device)
        x = self.layers(
            self.embed(source), self.embed(target), tgt_mask=future, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return x @ self.embedding.weight.T


def draw_dates() -> tuple[int, Pairs]:
    """Return the size of the vocabulary, and the tokens of dates."""
    pairs = script.date_corpus(DATES, seed=0).train(0)
    texts = (text for pair in pairs for text in pair)
    tokenizer = script.make_tokenizer(texts, DATES.vocab_size, words=False)
    return tokenizer.get_vocab_size(), script.encode(tokenizer, pairs)


def draw_sentences() -> tuple[int, Pairs]:
    """Return the same for sentences of random tokens."""
    random, pairs = Random(0), []
    for _ in range(SENTENCES):
        length = random.randint(*WORDS)
        source, target = (
            random.choices(range(3, TEXT.vocab_size), k=length - side) for side in (0, 1)
        )
        pairs.append(([*source, script.EOS], [script.BOS, *target, script.EOS]))
    return TEXT.vocab_size, pairs


def products_of(
    settings: script.Settings, vocab_size: int, B: int, S: int, T: int
) -> list[Product]:
    """Return the products of a forward pass over source (B, S) and target (B, T)."""
    d, d_ff, H = settings.d_model, settings.d_ff, settings.num_heads

    def attend(T: int, S: int) -> list[Product]:
        return [(B * H, T, d // H, S), (B * H, T, S, d // H), (1, B * T, d, d)]

    def feed_forward(T: int) -> list[Product]:
        return [(1, B * T, d, d_ff), (1, B * T, d_ff, d)]

    encoder = [(1, B * S, d, 3 * d), *attend(S, S), *feed_forward(S)]
    cross = [(1, B * T, d, d), (1, B * S, d, 2 * d), *attend(T, S)]
    decoder = [(1, B * T, d, 3 * d), *attend(T, T), *cross, *feed_forward(T)]
    return settings.num_layers * (encoder + decoder) + [(1, B * T, d, vocab_size)]


def multiply(products: Sequence[Product], operands: dict[Product, list[Tensor]]) -> None:
    """Do the products, forward and backward, and nothing else."""
    for product in products:
        x, W, gradient = operands[product]
        x @ W
        gradient @ W.mT
        x.mT @ gradient


def in_turn(*works: Callable[[], object]) -> tuple[list[float], list[list[object]]]:
    """Do the works one after the other, for a warm-up and ROUNDS.

    Returns the median seconds of each, and what they returned in each round.
    """
    rounds, returned = [], []
    for _ in range(1 + ROUNDS):
        rounds.append([])
        returned.append([])
        for work in works:
            start = time.perf_counter()
            returned[-1].append(work())
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            rounds[-1].append(time.perf_counter() - start)
    return [statistics.median(column) for column in zip(*rounds[1:], strict=True)], returned


def compare(
    name: str, settings: script.Settings, vocab_size: int, pairs: Pairs, device: str
) -> nn.Module:
    """Measure an epoch of training, print a line, and return the network."""
    torch.manual_seed(0)
    sizes = (settings.d_model, settings.num_heads, settings.num_layers, settings.d_ff)
    ours = script.Transformer(vocab_size, *sizes, dropout=0.0).to(device)
    works = []
    for model in (PyTorchs(ours, settings), ours):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.98), eps=1e-9, fused=True)
        progress = script.Progress(seed=0)

        def epoch(model=model, optimizer=optimizer, progress=progress) -> float:
            progress.batch, progress.loss, progress.count = 0, 0.0, 0
            script.train_epoch(model, optimizer, pairs, settings, progress, threading.Event())
            return progress.loss / progress.count

        works.append(epoch)

    batches = script.make_batches(pairs, settings.batch_tokens, Random("0 0"))
    products = []
    for batch in batches:
        S, T = (max(len(pairs[i][side]) for i in batch) - side for side in (0, 1))
        products += products_of(settings, vocab_size, len(batch), S, T)
    operands = {
        (b, m, k, n): [
            torch.randn(shape if b > 1 else shape[1:], device=device)
            for shape in ((b, m, k), (b, k, n), (b, m, n))
        ]
        for b, m, k, n in products
    }
    (theirs, mine, limit), losses = in_turn(*works, lambda: multiply(products, operands))
    for a, b, _ in losses:
        assert math.isclose(a, b, rel_tol=0.01), f"that is not the same work: {losses}"
    tokens = sum(len(source) + len(target) - 1 for source, target in pairs)
    print(
        f"{name}  {len(batches):5} {1000 * theirs / len(batches):15.1f} "
        f"{1000 * mine / len(batches):6.1f} {theirs / mine:6.2f} {tokens / mine:9,.0f} "
        f"{1000 * limit / len(batches):6.1f} {limit / mine:11.0%}  "
        f"{losses[-1][0]:.5f} and {losses[-1][1]:.5f}"
    )
    return ours


@torch.no_grad()
def decode(model: nn.Module, B: int, device: str) -> None:
    """Measure decoding with and without the cache, and print a line."""
    model.embedding.weight[: script.EOS + 1] = 0  # so that nothing ends early
    S = (DECODED - 20) // 2  # for a target is at most twice as long, and 20 tokens
    source = torch.randint(3, len(model.embedding.weight), (B, S), device=device)
    (slow, fast), found = in_turn(
        lambda: script.search(model, source, beam=1, use_cache=False),
        lambda: script.search(model, source, beam=1),
    )
    assert found[0][0] == found[0][1], "the cache changes what is decoded"
    assert {len(ids) for ids in found[0][1]} == {DECODED}
    print(f"{B:5} {1000 * slow:14.0f} {1000 * fast:11.0f} {slow / fast:7.1f}")


def main() -> None:
    """Print the tables."""
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    print(f"PyTorch {torch.__version__} on {device}, {torch.get_num_threads()} threads;")
    print(f"milliseconds, medians of {ROUNDS}; products as the script does them, and in float32.\n")
    print(
        "data  products  steps  nn.Transformer   ours  ratio  tokens/s  limit  limit/ours  losses"
    )
    for name, settings, data in (("dates", DATES, draw_dates()), ("text", TEXT, draw_sentences())):
        for kind in ("bfloat16",) if device == "cuda" else ("bfloat16", "float32"):
            if device == "cpu":
                precision = "medium" if kind == "bfloat16" else "highest"
                torch.set_float32_matmul_precision(precision)
                torch.backends.cuda.enable_flash_sdp(kind == "float32")
            model = compare(f"{name:5} {kind:8}", settings, *data, device)
    print(f"\nDecoding {DECODED} tokens with the network for text, in float32:")
    print("batch  without cache  with cache   ratio")
    for B in BATCHES:
        decode(model, B, device)


if __name__ == "__main__":
    main()
