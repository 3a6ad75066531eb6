#!/usr/bin/env python3
"""Measure gpt.py beside `transformers`' LlamaForCausalLM and beside one large matrix product.

    make bench

The same weights learn from the same windows, in turn in one process. Then SmolLM2 (make smollm2)
writes with both. Prints medians of rounds after a warm-up. Without `transformers` (make
oracle-ready), only gpt.py is measured.
"""

import copy
import importlib
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
script = importlib.import_module("gpt")
documents = importlib.import_module("inputs.documents")
sampling = importlib.import_module("decoding.sampling")
search = importlib.import_module("decoding.search")

ROUNDS = 5
STEPS = 4  # of the smallest network in a round; one of the others
SMOLLM2 = ROOT / "data" / "smollm2"
WRITTEN = 64  # tokens
CPU_SIDE = 1024  # of the matrices of the large product
GPU_SIDE = 8192


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


def predict(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits of either network."""
    return model(tokens) if isinstance(model, script.GPT) else model(tokens, use_cache=False).logits


def make_training(
    loss_of: Callable[[Tensor], Tensor], model: nn.Module, windows: Tensor
) -> Callable[[], float]:
    """Return what trains on windows (steps, B, T + 1) with AdamW, and returns the mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def train() -> float:
        losses = []
        for batch in windows:
            with search.autocast(windows.device):
                loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()  # waits for a GPU

    return train


def multiply(device: torch.device) -> float:
    """Multiply large matrices in the precision of training; return the operations per second."""
    side = CPU_SIDE if device.type == "cpu" else GPU_SIDE
    A, B = torch.randn(2, side, side, device=device)
    with search.autocast(device):
        A, B = (A @ torch.eye(side, device=device) for A in (A, B))  # to that precision
        (A @ B).flatten()[0].item()
        start = time.perf_counter()
        (A @ B).flatten()[0].item()
    return 2 * side**3 / (time.perf_counter() - start)


def count_operations(settings: script.Settings, model: nn.Module, tokens: int) -> int:
    """Return how many operations the products of a step need: 2 forward, 4 backward per weight."""
    weights = sum(p.numel() for p in model.parameters())
    if not settings.tied:
        weights -= model.embedding.weight.numel()  # takes rows, multiplies nothing
    attention = 2 * settings.num_layers * settings.d_model * settings.context  # half is masked
    return 3 * tokens * (2 * weights + attention)


def make_works(
    settings: script.Settings, windows: Tensor
) -> tuple[nn.Module, dict[str, Callable[[], float]]]:
    """Return gpt.py's network, and trainings of it and of theirs, eager and compiled."""
    torch.manual_seed(0)
    ours = script.GPT(settings.sizes(settings.vocab_size))
    for parameter in ours.parameters():  # with nothing at 0
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    models = {"gpt.py": ours, "LlamaForCausalLM": open_theirs(ours)}
    works = {}
    for name, model in models.items():
        for kind, prepare in (("", lambda loss_of: loss_of), (", compiled", torch.compile)):
            if model is None:
                continue
            own = copy.deepcopy(model).to(windows.device)
            loss_of = prepare(partial(script.next_token_loss, partial(predict, own)))
            works[name + kind] = make_training(loss_of, own, windows)
    return ours, works


def measure_training(name: str, settings: script.Settings, B: int, device: torch.device) -> None:
    """Print the speed of training with B windows at once."""
    steps = STEPS if name == "tiny" else 1
    shape = (steps, B, settings.context + 1)
    windows = torch.randint(settings.vocab_size, shape, device=device)
    model, works = make_works(settings, windows)
    tokens = B * settings.context
    operations = count_operations(settings, model, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    products = []
    for _ in range(1 + ROUNDS):
        losses = []
        for work, train in works.items():
            start = time.perf_counter()
            losses.append(train())
            seconds[work].append((time.perf_counter() - start) / steps)
        products.append(multiply(device))
        assert all(math.isclose(loss, losses[0], rel_tol=1e-2) for loss in losses), (
            f"not the same work: {losses}"
        )
    limit = statistics.median(products[1:])
    for work, each in seconds.items():
        step = statistics.median(each[1:])
        speed = operations / step
        print(
            f"{name:6}  {B:2} x {settings.context:5,}  {work:26}  {1000 * step:11.1f}"
            f"  {tokens / step:9,.0f}  {speed / 1e12:7.2f}  {speed / limit:15.0%}",
            flush=True,
        )


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
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if open_theirs(script.GPT(script.Sizes(264, 8, 1, 2, 2, 4, 16, 64, tied=False))) is None:
        print("transformers is not installed (make oracle-ready): only gpt.py is measured")
    print(f"PyTorch {torch.__version__} on {device}, {torch.get_num_threads()} threads;")
    print(f"medians of {ROUNDS} rounds\n")
    print(
        "preset  windows     network                     ms per step   tokens/s  TFLOP/s"
        "  of a large product"
    )
    for name in ("tiny", "small", "base"):
        settings = script.PRESETS[name]
        B = min(settings.batch_size, settings.part_size)
        if device.type == "cpu" and name == "base":
            B = 1  # a step takes seconds
        measure_training(name, settings, B, device)
    measure_published()


if __name__ == "__main__":
    main()
