#!/usr/bin/env python3
"""Measure attention.py beside nn.MultiheadAttention and F.scaled_dot_product_attention.

    make bench

The same weights, on the same words, in turn in one process: multi-head attention by the written-out
formula and with PyTorch's fused kernel, PyTorch's own module, and the fused kernel alone, on
queries, keys and values that are there already. Checks that outputs and gradients agree, prints
medians and peak memory, and draws them in runs/benchmarks/attention.png.
"""

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler's own

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
attention = importlib.import_module("attention")

D_MODEL, NUM_HEADS = 512, 8  # as in the paper's base model
LENGTHS = (16, 64, 256, 1024, 4096)  # T
NAMES = ("formula", "ours", "nn.MHA", "F.sdpa")
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 2.0, 5, 300  # to measure one length for
Work = Callable[[], Tensor]


def make_works(
    T: int, batch: int, device: str, dtype: torch.dtype, backward: bool
) -> tuple[dict[str, Work], Work]:
    """Return what is measured, and what F.sdpa's output is to be: all (batch, T, D_MODEL).

    Each returns its output or, with `backward`, the gradient of what goes in.
    """
    torch.manual_seed(0)
    ours = attention.MultiHeadAttention(D_MODEL, NUM_HEADS).to(device, dtype)
    theirs = nn.MultiheadAttention(D_MODEL, NUM_HEADS, bias=False, batch_first=True)
    theirs = theirs.to(device, dtype).train(backward)
    x, gradient = torch.randn(2, batch, T, D_MODEL, device=device, dtype=dtype)
    with torch.no_grad():
        matrices = (ours.W_q.weight, ours.W_k.weight, ours.W_v.weight)
        theirs.in_proj_weight.copy_(torch.cat(matrices))
        theirs.out_proj.weight.copy_(ours.W_o.weight)
        QKV = torch.stack(ours.split_heads(x, x, x, None)[:3])  # (3, batch, H, T, d_k)
    x, QKV = x.requires_grad_(backward), QKV.requires_grad_(backward)
    heads = gradient.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2).contiguous()
    parameters = (*ours.parameters(), *theirs.parameters())

    def formula() -> Tensor:
        Q, K, V, _ = ours.split_heads(x, x, x, None)
        output, _ = attention.scaled_dot_product_attention(Q, K, V)
        return ours.W_o(output.transpose(1, 2).flatten(2))

    def work(forward: Work, source: Tensor, gradient: Tensor) -> Work:
        def both() -> Tensor:
            forward().backward(gradient)
            found = source.grad
            for tensor in (source, *parameters):
                tensor.grad = None
            return found

        return both if backward else torch.no_grad()(forward)

    return {
        "formula": work(formula, x, gradient),
        "ours": work(lambda: ours(x, x, x), x, gradient),
        "nn.MHA": work(lambda: theirs(x, x, x, need_weights=False)[0], x, gradient),
        "F.sdpa": work(lambda: F.scaled_dot_product_attention(*QKV), QKV, heads),
    }, work(lambda: attention.scaled_dot_product_attention(*QKV)[0], QKV, heads)


def check(works: dict[str, Work], alone: Work, dtype: torch.dtype) -> None:
    """Assert that they give the same as the formula, all of it or, for F.sdpa, alone."""
    for name in NAMES[1:]:
        expected = (alone if name == "F.sdpa" else works["formula"])().float()
        error = ((works[name]().float() - expected).norm() / expected.norm()).item()
        assert error < (1e-4 if dtype == torch.float32 else 3e-2), f"{name} is off by {error:.1e}"


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def in_turn(works: Sequence[Work]) -> list[list[float]]:
    """Do the works one after the other, again and again; return the seconds (works, rounds)."""
    rounds, start = [], time.perf_counter()
    while len(rounds) < MIN_ROUNDS or (
        time.perf_counter() - start < SECONDS and len(rounds) < MAX_ROUNDS
    ):
        rounds.append([])
        for work in works:
            before = time.perf_counter()
            work()
            synchronize()
            rounds[-1].append(time.perf_counter() - before)
    return list(zip(*rounds, strict=True))


def peak_memory(work: Work, device: str) -> int:
    """Return the bytes that PyTorch holds at once for a piece of work, at most."""
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        work()
        return torch.accelerator.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events))


def compare(
    device: str, dtype: torch.dtype, backward: bool
) -> tuple[list[list[float]], list[list[float]]]:
    """Measure all lengths and print tables; return seconds and bytes, (lengths, NAMES)."""
    batch, n = (1, 1024) if device == "cpu" else (4, 8192)
    square = torch.randn(n, n, device=device, dtype=dtype)
    seconds, memory = [], []
    names = "".join(f"{name:>9}" for name in NAMES)
    print(f"\n{'forward and backward' if backward else 'forward'}, {dtype}, batch of {batch}")
    print(f"{'milliseconds':>41}{'times as long as ours':>29}{'ours, against a':>20}")
    print(f"    T{names}{'formula':>12}{'nn.MHA':>9}   GFLOP/s  large product")
    for T in LENGTHS:
        works, alone = make_works(T, batch, device, dtype, backward)
        check(works, alone, dtype)  # and warm up
        # Ratios are taken within a round, because whatever else the machine does slows all of it.
        times = torch.tensor(in_turn([*works.values(), lambda: square @ square]))
        seconds.append(times[:4].median(dim=1).values.tolist())
        memory.append([peak_memory(work, device) for work in works.values()])
        formula, _, theirs, _, product = (times / times[1]).median(dim=1).values.tolist()
        operations = (3 if backward else 1) * batch * (8 * T * D_MODEL**2 + 4 * T**2 * D_MODEL)
        share = product * operations / (2 * n**3)
        print(
            f"{T:5}" + "".join(f"{1e3 * s:9.2f}" for s in seconds[-1])
            + f"{formula:12.2f}{theirs:9.2f}{operations / seconds[-1][1] / 1e9:10.0f}{share:15.0%}"
        )  # fmt: skip
    print(f"{'MiB at most':>41}\n    T{names}")
    for T, row in zip(LENGTHS, memory, strict=True):
        print(f"{T:5}" + "".join(f"{size / 2**20:9.1f}" for size in row))
    return seconds, memory


def draw(results: dict[str, tuple[list[list[float]], list[list[float]]]]) -> Figure:
    """Draw time and memory against T, a row of panels for each result."""
    figure = Figure(figsize=(9, 3.5 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    for row, (title, tables) in zip(panels, results.items(), strict=True):
        for axes, table, unit in zip(row, tables, ("seconds", "bytes at most"), strict=True):
            axes.loglog(LENGTHS, table, "o-", label=NAMES)
            axes.set(title=title, xlabel="T", ylabel=unit)
            axes.set_xticks(LENGTHS, LENGTHS, minor=False)
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
    panels[0, 0].legend()
    return figure


def main() -> None:
    """Print the tables and save the plot."""
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    print(f"d_model {D_MODEL}, {NUM_HEADS} heads; PyTorch {torch.__version__} on {device},")
    print(f"{torch.get_num_threads()} threads; medians, all in turn.")
    results = {}
    for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
        for backward in (False, True):
            title = f"forward{' and backward' if backward else ''}, {dtype}"
            results[title] = compare(device, dtype, backward)
    out = ROOT / "runs/benchmarks"
    out.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(out / "attention.png", dpi=120)
    print(f"\nDrawn in {out / 'attention.png'}")


if __name__ == "__main__":
    main()
