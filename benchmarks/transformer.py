#!/usr/bin/env python3
"""Measure transformer.py beside PyTorch's nn.Transformer and beside the matrix products alone.

    make bench

The same weights learn from the same batches of dates, in turn in one process; around nn.Transformer
go the same embedding, positions and output. Prints medians of rounds after a warm-up.
"""

import copy
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
script = importlib.import_module("transformer")

ROUNDS, STEPS = 5, 20
Batch = tuple[Tensor, Tensor]
Product = tuple[int, int, int, int]  # b times (m, k) by (k, n)


class PyTorchs(nn.Module):
    """nn.Transformer with the weights of ours and the same things around it."""

    def __init__(self, ours: nn.Module, sizes: script.Sizes) -> None:
        super().__init__()
        self.embedding, self.positions = copy.deepcopy(ours.embedding), ours.positions
        self.layers = nn.Transformer(
            sizes.d_model, sizes.num_heads, sizes.num_layers, sizes.num_layers, sizes.d_ff,
            dropout=0.0, batch_first=True,
        )  # fmt: skip
        self.layers.encoder.norm = self.layers.decoder.norm = None  # the paper has none
        others = [*self.layers.encoder.layers, *self.layers.decoder.layers]
        for layer, other in zip([*ours.encoder, *ours.decoder], others, strict=True):
            self.copy(layer.self_attention, other.self_attn)
            if hasattr(layer, "cross_attention"):
                self.copy(layer.cross_attention, other.multihead_attn)
                other.norm3.load_state_dict(layer.norm3.state_dict())
            other.linear1.load_state_dict(layer.feed_forward[0].state_dict())
            other.linear2.load_state_dict(layer.feed_forward[2].state_dict())
            other.norm1.load_state_dict(layer.norm1.state_dict())
            other.norm2.load_state_dict(layer.norm2.state_dict())
        self.to(ours.positions.device)

    @staticmethod
    def copy(heads: nn.Module, other: nn.MultiheadAttention) -> None:
        """Copy the weights of attention; its biases, which ours has not, stay 0."""
        W_qkv = torch.cat([W.weight.detach() for W in (heads.W_q, heads.W_k, heads.W_v)])
        other.in_proj_weight.data.copy_(W_qkv)
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


def draw(device: str) -> tuple[int, list[Batch]]:
    """Return the size of the vocabulary, and STEPS batches of dates of like length."""
    days, _, _ = script.split_days()
    pairs = script.sample_dates(days[: STEPS * script.BATCH_SIZE], Random(0))
    pairs.sort(key=lambda pair: len(pair[0]))
    vocabulary = script.make_vocabulary(pairs)
    starts = range(0, len(pairs), script.BATCH_SIZE)
    batches = [script.make_batch(pairs[i : i + script.BATCH_SIZE], vocabulary) for i in starts]
    return 4 + len(vocabulary), [(a.to(device), b.to(device)) for a, b in batches]


def products_of(sizes: script.Sizes, vocab_size: int, B: int, S: int, T: int) -> list[Product]:
    """Return the products of a forward pass over source (B, S) and target (B, T)."""
    d, d_ff, H = sizes.d_model, sizes.d_ff, sizes.num_heads

    def attend(T: int, S: int) -> list[Product]:
        return [(B * H, T, d // H, S), (B * H, T, S, d // H), (1, B * T, d, d)]

    def feed_forward(T: int) -> list[Product]:
        return [(1, B * T, d, d_ff), (1, B * T, d_ff, d)]

    encoder = [(1, B * S, d, d)] * 3 + attend(S, S) + feed_forward(S)
    cross = [(1, B * T, d, d), (1, B * S, d, d), (1, B * S, d, d), *attend(T, S)]
    decoder = [(1, B * T, d, d)] * 3 + attend(T, T) + cross + feed_forward(T)
    return sizes.num_layers * (encoder + decoder) + [(1, B * T, d, vocab_size)]


def multiply(products: Sequence[Product], operands: dict[Product, list[Tensor]]) -> None:
    """Do the products, forward and backward, and nothing else."""
    for product in products:
        x, W, gradient = operands[product]
        x @ W
        gradient @ W.mT
        x.mT @ gradient


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]) -> float:
    """Train on the batches as the script does; return the mean loss."""
    total = 0.0
    for source, target in batches:
        logits = model(source, target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(batches)


def in_turn(*works: Callable[[], object]) -> tuple[list[float], list[object]]:
    """Do the works one after the other, for a warm-up and ROUNDS.

    Returns the median seconds of each, and what they returned in the last round.
    """
    rounds = []
    for _ in range(1 + ROUNDS):
        rounds.append([])
        returned = []
        for work in works:
            start = time.perf_counter()
            returned.append(work())
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            rounds[-1].append(time.perf_counter() - start)
    return [statistics.median(column) for column in zip(*rounds[1:], strict=True)], returned


def main() -> None:
    """Print the table."""
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    vocab_size, batches = draw(device)
    torch.manual_seed(0)
    ours = script.Transformer(vocab_size, script.Sizes()).to(device)
    works = []
    for model in (PyTorchs(ours, script.Sizes()), ours):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, 1e-3, betas=(0.9, 0.98), eps=1e-9, fused=True)
        works.append(lambda model=model, optimizer=optimizer: train(model, optimizer, batches))
    products = []
    for source, target in batches:
        products += products_of(script.Sizes(), vocab_size, *source.shape, target.shape[1] - 1)
    operands = {
        (b, m, k, n): [
            torch.randn(shape if b > 1 else shape[1:], device=device)
            for shape in ((b, m, k), (b, k, n), (b, m, n))
        ]
        for b, m, k, n in products
    }
    (theirs, mine, limit), losses = in_turn(*works, lambda: multiply(products, operands))
    assert math.isclose(losses[0], losses[1], rel_tol=0.01), f"not the same work: {losses}"
    tokens = sum(source.numel() + target.numel() for source, target in batches)
    print(f"PyTorch {torch.__version__} on {device}, {torch.get_num_threads()} threads;")
    print(f"milliseconds per step of {tokens // STEPS} tokens, medians of {ROUNDS} rounds\n")
    print("nn.Transformer   ours  ratio  tokens/s  products alone  products/ours")
    print(
        f"{1000 * theirs / STEPS:14.1f} {1000 * mine / STEPS:6.1f} {theirs / mine:6.2f} "
        f"{tokens / mine:9,.0f} {1000 * limit / STEPS:15.1f} {limit / mine:14.0%}"
    )


if __name__ == "__main__":
    main()
