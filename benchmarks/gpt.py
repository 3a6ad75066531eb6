#!/usr/bin/env python3
"""Measure gpt.py beside `transformers`' LlamaForCausalLM and beside one large matrix product.

    make bench

The same weights learn from the same windows, in turn in one process. Prints medians of rounds after
a warm-up. Without `transformers` (make oracle-ready), only gpt.py is measured.
"""

import importlib
import math
import statistics
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

ROUNDS, STEPS = 5, 4
SIDE = 1024  # of the matrices of the large product


def open_theirs(ours: nn.Module) -> nn.Module | None:
    """Let `transformers` open what gpt.py saves; return None where it isn't installed."""
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        return None
    tokenizer = documents.learn_tokenizer(["x = 1\n"], 300)
    with tempfile.TemporaryDirectory() as folder:
        script.save_model(Path(folder), ours, tokenizer)
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


def main() -> None:
    """Print the table."""
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


if __name__ == "__main__":
    main()
