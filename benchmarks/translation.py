#!/usr/bin/env python3
"""Measure training and decoding of translation.py beside PyTorch's nn.Transformer.

    poetry run benchmarks/translation.py

The same weights learn from the same batches in the same loop, in turn in one process; around
nn.Transformer go the same embedding, positions and output. Then the script decodes with and without
its cache, and trains a network of the paper's base size, eager and compiled. Prints medians of
rounds after a warm-up.
"""

import copy
import importlib
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
attention = importlib.import_module("attention")
search = importlib.import_module("decoding.search")
runs = importlib.import_module("running.runs")
script = importlib.import_module("translation")

ROUNDS = 3
SETTINGS = replace(script.PRESETS["small"], dropout=0.0)  # PyTorch's has dropout in more places
SENTENCES, WORDS = 300, (8, 28)  # and how many tokens one has
DECODED = 64  # tokens
BATCHES = (1, 8, 32)  # sentences to decode at once
BEAMS = (1, 4)
BASE = replace(script.PRESETS["base"], part_tokens=2000)  # that many at once; a GPU takes more
STEP_TOKENS, STEPS = 50_000, 100_000  # of the paper's base training, section 5


class PyTorchs(nn.Module):
    """nn.Transformer, norm first, with the weights of ours and the same things around it."""

    def __init__(self, ours: nn.Module, settings: script.Settings) -> None:
        super().__init__()
        self.embedding, self.positions = copy.deepcopy(ours.embedding), ours.positions
        self.layers = nn.Transformer(
            settings.d_model, settings.num_heads, settings.num_layers, settings.num_layers,
            settings.d_ff, dropout=0.0, batch_first=True, norm_first=True,
        )  # fmt: skip
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
        self.layers.encoder.norm.load_state_dict(ours.encoder_norm.state_dict())
        self.layers.decoder.norm.load_state_dict(ours.decoder_norm.state_dict())
        self.to(ours.positions.device)

    @staticmethod
    def copy(heads: nn.Module, other: nn.MultiheadAttention) -> None:
        """Copy the weights of attention; its biases, which ours has not, stay 0."""
        matrices = [heads.W_q.weight, heads.W_k.weight, heads.W_v.weight]
        other.in_proj_weight.data.copy_(torch.cat(matrices))
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
        future = ~attention.causal_mask(target.shape[1], target.device)
        x = self.layers(
            self.embed(source), self.embed(target), tgt_mask=future, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return x @ self.embedding.weight.T


def draw_corpus(count: int, words: tuple[int, int], device: str) -> script.Corpus:
    """Return sentences of random tokens, and their translations, which are equally long."""
    random, sides = Random(0), []
    for _ in range(count):
        length = random.randint(*words)
        source, target = (
            random.choices(range(3, SETTINGS.vocab_size), k=length - side) for side in (0, 1)
        )
        sides += [[*source, script.EOS], [script.BOS, *target, script.EOS]]
    tokens = torch.tensor([i for ids in sides for i in ids], dtype=torch.int32, device=device)
    return script.Corpus(tokens, torch.tensor([0, *map(len, sides)]).cumsum(dim=0))


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


def product_speed(device: str) -> float:
    """Return the operations per second of one large product in the precision of training."""
    x = torch.randn(4096, 4096, device=device)
    with search.autocast(x.device):
        ((seconds,), _) = in_turn(lambda: x @ x)
    return 2 * len(x) ** 3 / seconds


def operations(work: Callable[[], object]) -> int:
    """Count the operations of the products in a piece of work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def compare(limit: float, device: str) -> nn.Module:
    """Measure an epoch of training, print a line, and return the script."""
    torch.manual_seed(0)
    ours = script.PreNormTransformer(SETTINGS.vocab_size, SETTINGS).to(device)
    works, corpus = [], draw_corpus(SENTENCES, WORDS, device)
    for model in (PyTorchs(ours, SETTINGS), ours):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.98), eps=1e-9, fused=True)
        run = script.Run(Path(), model, [optimizer], {}, epochs=1)

        def epoch(run: script.Run = run) -> float:
            run.progress = runs.Progress()  # the same batches each time
            script.train_epoch(run, run.model, corpus, SETTINGS)
            return run.progress.loss / run.progress.count

        works.append(epoch)
    (theirs, mine), losses = in_turn(*works)
    for a, b in losses:
        assert math.isclose(a, b, rel_tol=0.01), f"that is not the same work: {losses}"
    batches, count = run.progress.batch, int(corpus.lengths.sum()) - SENTENCES
    print(
        f"{batches:5} {1000 * theirs / batches:15.1f} {1000 * mine / batches:6.1f} "
        f"{theirs / mine:6.2f} {count / mine:9,.0f} {operations(works[-1]) / mine / limit:14.0%}"
        f"  {losses[-1][0]:.5f} and {losses[-1][1]:.5f}"
    )
    return ours


def train_base(limit: float, device: str) -> None:
    """Measure steps of the paper's base size, eager and compiled, and print a line for each."""
    part = BASE.part_tokens if device == "cpu" else STEP_TOKENS // 2
    corpus = draw_corpus(part // 60, (30, 30), device)
    rows, count = torch.arange(len(corpus.lengths)), int(corpus.lengths.sum())
    for name, prepare in (("eager", lambda model: model), ("compiled", torch.compile)):
        model = script.Transformer(BASE.vocab_size, BASE).to(device)
        optimizer = torch.optim.Adam(model.parameters(), 1e-5, fused=True)
        work = prepare(model)

        def step(model: nn.Module = work, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            script.batch_loss(model, corpus, rows, smoothing=0.1).backward()
            optimizer.step()

        if name == "eager":
            each = operations(step) / count
        ((seconds,), _) = in_turn(step)
        speed, days = count / seconds, STEPS * STEP_TOKENS * seconds / count / 86_400
        print(
            f"{name:8} {count:7,} {1000 * seconds:9.1f} {speed:9,.0f} {each * speed / 1e12:8.2f} "
            f"{each * speed / limit:14.0%} {days:22.1f}"
        )


@torch.no_grad()
def decode(model: nn.Module, B: int, beam: int, device: str) -> None:
    """Measure decoding with and without the cache, and print a line."""
    S = (DECODED - 20) // 2  # for a target is at most twice as long, and 20 tokens
    source = torch.randint(3, SETTINGS.vocab_size, (B, S), device=device)
    (slow, fast), found = in_turn(
        lambda: search.search(search.plain_decoder(model, source, beam), source, beam, 1.2),
        lambda: search.beam_search(model, source, beam),
    )
    assert found[0][0] == found[0][1], "the cache changes what is decoded"
    assert {len(ids) for ids in found[0][1]} == {DECODED}
    times = f"{1000 * slow:14.0f} {1000 * fast:11.0f} {slow / fast:6.1f}"
    print(f"{beam:4} {B:10} {times} {B / fast:12.1f}")


def without_end(model: nn.Module) -> None:
    """Keep the network from predicting EOS, so that all it decodes is equally long."""
    to_logits, mask = model.to_logits, torch.zeros(SETTINGS.vocab_size)
    mask[script.EOS] = -math.inf
    mask = mask.to(model.positions.device)
    model.to_logits = lambda x: to_logits(x) + mask


def main() -> None:
    """Print the tables."""
    warnings.filterwarnings("ignore", message="enable_nested_tensor")
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    limit = product_speed(device)
    print(f"PyTorch {torch.__version__} on {device}, {torch.get_num_threads()} threads;")
    print(f"a product of 4096 x 4096 runs at {limit / 1e12:.2f} TFLOP/s.")
    print(f"Milliseconds per step, medians of {ROUNDS}.\n")
    print("steps  nn.Transformer   ours  ratio  tokens/s  share of that  losses")
    model = compare(limit, device)
    without_end(model)
    print(f"\nDecoding {DECODED} tokens, milliseconds:")
    print("beam  sentences  without cache  with cache  ratio  sentences/s")
    for beam in BEAMS:
        for B in BATCHES:
            decode(model, B, beam, device)
    print(f"\nPreset base; {STEPS:,} steps of {STEP_TOKENS:,} tokens are the paper's training:")
    print("          tokens  ms a step  tokens/s  TFLOP/s  share of that  days for the training")
    train_base(limit, device)


if __name__ == "__main__":
    main()
