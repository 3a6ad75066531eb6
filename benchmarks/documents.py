#!/usr/bin/env python3
"""Measure what gpt.py needs for texts of growing size.

    poetry run benchmarks/documents.py --sizes 20 400

The texts are made of the Python files of the environment, in a temporary folder. For each size, two
processes one after the other start a training: the first learns the tokenizer and encodes the text,
the second finds that done. The second's share of the mapped tokens is half of them, as the
benchmark itself has mapped them, too. Then the text is encoded once more, with that tokenizer, and
steps of training on all texts are taken in turn, in one process. Prints a table; what it says of
40 GB is computed, by a straight line. On a shared machine, the seconds of the cores say more than
those of the clock.
"""

import argparse
import importlib
import json
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from threading import Event, Thread

import numpy as np
import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
documents = importlib.import_module("inputs.documents")

MB = 1e6
FAR = 40_000  # MB, which are computed
STEPS = 20
ROUNDS = 7


def make_text(folder: Path, size: float) -> None:
    """Copy random Python files of the environment to a folder, of `size` bytes in all."""
    paths = [*Path(sysconfig.get_paths()["purelib"]).rglob("*.py")]
    Random(0).shuffle(paths)
    number = 0
    while size > 0:  # a file more than once if there are too few
        path = paths[number % len(paths)]
        target = folder / f"{number % 100:02}" / f"{number}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        size -= path.stat().st_size
        number += 1


def memory(process: int | str) -> int:
    """Return the resident memory of a process that is no mapped file, in bytes (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0])


def cpu_seconds() -> float:
    """Return what this process has used of the cores, and those that it started and that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def share_of_mapping(path: Path) -> int:
    """Return this process's share of the resident pages of a mapped file, in bytes (Linux)."""
    text = Path("/proc/self/smaps").read_text().partition(f"{path}\n")[2]
    return 1024 * int(text.partition("Pss:")[2].split()[0])


class Peak(Thread):
    """Watches the memory of this process and of those that it started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.ended = Event()

    def run(self) -> None:
        ended = False
        while not ended:
            ended = self.ended.wait(0.2)
            total = memory("self")
            for child in multiprocessing.active_children():
                with suppress(OSError, KeyError):
                    total += memory(child.pid)
            self.bytes = max(self.bytes, total)


def start(text: Path, cache: Path) -> None:
    """Start like a training, and print what it took as JSON."""
    script = importlib.import_module("gpt")
    peak = Peak()
    peak.start()
    cpu = cpu_seconds()
    before = time.perf_counter()
    where = documents.Text(text, ("*.py",))
    folder = documents.prepare_documents(where, script.Settings().vocab_size, cache)
    corpus, _ = documents.open_corpus(folder)
    seconds = time.perf_counter() - before
    cpu = cpu_seconds() - cpu
    corpus.tokens.view(torch.uint8).max()  # reads the whole file
    peak.ended.set()
    peak.join()
    print(json.dumps({
        "folder": str(folder), "seconds": seconds, "memory": peak.bytes,
        "cpu": cpu, "share": share_of_mapping(folder / "train.tokens"),
    }))  # fmt: skip


def measure_start(text: Path, cache: Path) -> dict:
    """Start in a process of its own; return what it has printed."""
    command = [sys.executable, __file__, "--text", str(text), "--cache", str(cache)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def measure_encoding(text: Path, tokenizer: Tokenizer) -> float:
    """Return the seconds that encoding takes, with a tokenizer that was learned before."""
    listing = documents.list_files(documents.Text(text, ("*.py",)))
    encoder = documents.Encoder(tokenizer, documents.MARK_ID, np.dtype(np.uint16), by_pieces=True)
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        documents.encode_listing(listing, encoder, Path(folder))
        return time.perf_counter() - before


def measure_steps(folders: list[Path]) -> list[float]:
    """Return the median seconds of a step of training on each of the texts, taken in turn."""
    script = importlib.import_module("gpt")
    settings = script.Settings()
    width = settings.context + 1
    torch.manual_seed(0)
    model = script.GPT(settings.sizes(settings.vocab_size))
    optimizers = script.make_optimizers(model, settings)
    texts = [documents.open_corpus(folder)[0].tokens for folder in folders]
    orders = [documents.Windows(len(tokens), width, seed=0) for tokens in texts]
    seconds: list[list[float]] = [[] for _ in folders]
    for step in range(ROUNDS * STEPS):
        for tokens, order, taken in zip(texts, orders, seconds, strict=True):
            before = time.perf_counter()
            starts = order.draw(step * settings.batch_size, settings.batch_size)
            windows = tokens[starts.unsqueeze(1) + torch.arange(width)].long()
            logits = model(windows[:, :-1])
            labels = windows[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            taken.append(time.perf_counter() - before)
    return [statistics.median(each[STEPS:]) for each in seconds]


def measure(size: float, folder: Path) -> dict:
    """Make a text, and start on it twice."""
    text = folder / f"text-{size:g}"
    make_text(text, size * MB)
    names = [*text.rglob("*.py")]
    bytes_ = sum(path.stat().st_size for path in names)
    first = measure_start(text, folder / "cache")
    corpus, tokenizer = documents.open_corpus(Path(first["folder"]))
    corpus.tokens.view(torch.uint8).max()  # this process holds the file, too
    second = measure_start(text, folder / "cache")
    mapped = corpus.tokens.numel() * corpus.tokens.element_size()
    return {
        "folder": Path(first["folder"]), "MB": bytes_ / MB, "files": len(names),
        "first": first["seconds"], "cpu": first["cpu"], "second": second["seconds"],
        "encoding": measure_encoding(text, tokenizer),
        "memory": max(first["memory"], second["memory"]) / MB, "later": second["memory"] / MB,
        "tokens": mapped / MB, "share": second["share"] / mapped,
    }  # fmt: skip


def extend(rows: list[dict]) -> dict:
    """Return what a straight line through the smallest and the largest text says of FAR."""
    low, high = rows[0], rows[-1]
    ratio = (FAR - low["MB"]) / (high["MB"] - low["MB"])
    names = ("files", "first", "cpu", "encoding", "second", "memory", "later", "tokens")
    return {"MB": FAR} | {name: low[name] + ratio * (high[name] - low[name]) for name in names}


def show(row: dict, note: str) -> None:
    """Print a row of the table."""
    print(
        f"{row['MB']:8,.0f} {row['files']:10,.0f} {row['first']:9,.1f} {row['cpu']:9,.1f}"
        f" {row['encoding']:9,.1f} {row['MB'] / row['encoding']:6.1f} {row['second']:9.2f}"
        f" {row['memory']:7,.0f} {row['later']:7,.0f}"
        f" {row['tokens']:10,.0f} {note}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[20.0], help="of the texts, in MB"
    )
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)  # of a child
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.text:
        start(args.text, args.cache)
        return
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    print("                    first start              encoding    second  MB without files")
    print(
        "      MB      files         s     CPU s         s   MB/s         s   first  second"
        "  MB tokens share"
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(size, Path(folder)) for size in args.sizes]
        for row in rows:
            show(row, f"{row['share']:5.0%}")
        if len(rows) > 1:
            show(extend(rows), "(computed)")
        steps = measure_steps([row["folder"] for row in rows])
    print("\n      MB  ms per step")
    for row, seconds in zip(rows, steps, strict=True):
        print(f"{row['MB']:8,.0f} {1000 * seconds:12.1f}")


if __name__ == "__main__":
    main()
