#!/usr/bin/env python3
"""Measure gpt.py beside `transformers`' LlamaForCausalLM and beside one large matrix product.

    make bench

The same weights learn from the same windows, in turn in one process. Then SmolLM2 (make smollm2)
writes with both. Prints medians of rounds after a warm-up. Without `transformers` (make
oracle-ready), only gpt.py is measured.
"""

import importlib
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
script = importlib.import_module("gpt")
documents = importlib.import_module("inputs.documents")
sampling = importlib.import_module("decoding.sampling")

ROUNDS, STEPS = 5, 4
SMOLLM2 = ROOT / "data" / "smollm2"
WRITTEN = 64  # tokens
SIDE = 1024  # of the matrices of the large product


def open_theirs(ours: nn.Module) -> nn.Module | None:
    """Let `transformers` open what gpt.py saves; return None where it isn't installed."""
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        return None
    tokenizer = documents.learn_tokenizer(["x = 1\n"], 300)
    with tempfile.TemporaryDirectory() as folder:
        script.save_model(Path(folder), ours, script.own_texts(tokenizer))
        return LlamaForCausalLM.from_pretrained(folder)


def train(predict: Callable[[Tensor], Tensor], model: nn.Module, windows: Tensor) -> float:
    """Train with AdamW on windows (STEPS, B, T + 1); return the mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    total = 0.0
    for batch in windows:
        logits = predict(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(windows)


def multiply() -> float:
    """Multiply large matrices; return the operations per second."""
    A, B = torch.randn(2, SIDE, SIDE)
    start = time.perf_counter()
    A @ B
    return 2 * SIDE**3 / (time.perf_counter() - start)


def in_turn(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each of the works; they have to give the same."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + ROUNDS):
        results = []
        for name, work in works.items():
            start = time.perf_counter()
            results.append(work())
            seconds[name].append(time.perf_counter() - start)
        assert all(result == results[0] for result in results), f"not the same work: {results}"
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def write_ours(model: nn.Module, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return the likeliest tokens that continue prompts of one length, with the cache."""
    seeds = range(len(prompts))
    context = len(prompts[0]) + count
    greedy = sampling.Sampling(temperature=0.0)
    columns = sampling.next_tokens(model, prompts, greedy, seeds, context, end=-1)
    return [list(row) for row in zip(*columns, strict=True)]


def write_theirs(model: nn.Module, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Do the same with `generate` of `transformers`."""
    tokens = torch.tensor(prompts)
    found = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False
    )
    return found[:, len(prompts[0]) :].tolist()


def measure_published() -> None:
    """Print how fast SmolLM2 is opened, reads a prompt and writes."""
    if not any(SMOLLM2.glob("*.gguf")):
        print("\nSmolLM2 is not here (make smollm2)")
        return
    start = time.perf_counter()
    ours, published = script.open_model(SMOLLM2)
    print(f"\nSmolLM2: opened in {time.perf_counter() - start:.1f} s")
    command = [
        sys.executable,
        script.__file__,
        "--model",
        SMOLLM2,
        "--write",
        "Once",
        "--stop",
        ".",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # kB, on Linux
    print(f"--write takes {peak:.2f} GB at most\n")
    theirs = open_theirs(ours)
    if theirs is None:
        return
    theirs.generation_config.eos_token_id = None  # neither ends before `count`
    text = (ROOT / "docs" / "1-hello.md").read_text(encoding="utf-8")
    ids = published.tokenizer.encode(text).ids
    print("prompts  tokens  written  transformers   gpt.py  ratio")
    for B, T, count in ((1, 32, WRITTEN), (8, 32, WRITTEN), (1, 1000, 1)):
        prompts = [ids[i * T : (i + 1) * T] for i in range(B)]
        step = in_turn(
            {
                "theirs": lambda prompts=prompts, count=count: write_theirs(theirs, prompts, count),
                "ours": lambda prompts=prompts, count=count: write_ours(ours, prompts, count),
            }
        )
        speeds = [B * count / step[name] for name in ("theirs", "ours")]
        times = [f"{speed:6.1f} /s" if count > 1 else f"{1 / speed:7.2f} s" for speed in speeds]
        ratio = speeds[1] / speeds[0]
        print(f"{B:7}  {T:6}  {count:7}  {times[0]:>12}  {times[1]:>7}  {ratio:5.2f}")


def main() -> None:
    """Print the tables."""
    settings = script.Settings()
    torch.manual_seed(0)
    ours = script.GPT(settings.sizes(settings.vocab_size))
    for parameter in ours.parameters():  # with nothing at 0
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    shape = (STEPS, settings.batch_size, settings.context + 1)
    windows = torch.randint(settings.vocab_size, shape)
    works = {"gpt.py": lambda: train(ours, ours, windows)}
    theirs = open_theirs(ours)
    if theirs is None:
        print("transformers is not installed (make oracle-ready): only gpt.py is measured")
    else:
        predict = lambda tokens: theirs(tokens, use_cache=False).logits  # noqa: E731
        works["LlamaForCausalLM"] = lambda: train(predict, theirs, windows)
    seconds = {name: [] for name in works}
    products = []
    for _ in range(1 + ROUNDS):
        losses = []
        for name, work in works.items():
            start = time.perf_counter()
            losses.append(work())
            seconds[name].append((time.perf_counter() - start) / STEPS)
        products.append(multiply())
        assert math.isclose(losses[0], losses[-1], rel_tol=1e-3), f"not the same work: {losses}"
    step = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    tokens = settings.batch_size * settings.context
    weights = sum(p.numel() for p in ours.parameters()) - ours.embedding.weight.numel()
    attention = 2 * settings.num_layers * settings.d_model * settings.context  # half is masked
    operations = 3 * tokens * (2 * weights + attention)
    limit = statistics.median(products[1:])
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; steps of {tokens:,}")
    print(f"tokens, medians of {ROUNDS} rounds\n")
    print("                   ms per step  tokens/s  of a large product")
    for name, each in step.items():
        share = operations / each / limit
        print(f"{name:17}  {1000 * each:11.1f}  {tokens / each:8,.0f}  {share:18.0%}")
    if theirs is not None:
        print(f"gpt.py is {step['LlamaForCausalLM'] / step['gpt.py']:.2f} times as fast")
    measure_published()


if __name__ == "__main__":
    main()
