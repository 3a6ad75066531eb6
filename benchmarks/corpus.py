#!/usr/bin/env python3
"""Measure what translation.py needs for texts of growing size.

    poetry run benchmarks/corpus.py DIR

DIR holds a parallel text, train.de, train.en, val.de and val.en, plain or gzipped. Random lines of
it are joined to pairs of about 60 tokens in all. For each number of pairs, two processes one after
the other start a training: the first learns the tokenizer and encodes the text, the second finds
that done. Prints a table.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
corpus = importlib.import_module("corpus")
script = importlib.import_module("translation")

PAIRS = (29_000, 290_000, 4_500_000)
LANGUAGES = ("de", "en")
STEPS = 40


def make_text(folder: Path, source: Path, pairs: int) -> None:
    """Write a text of pairs, each of two random pairs of the source joined."""
    folder.mkdir()
    (train, val), random = (
        ([*corpus.read_pairs(source, split, LANGUAGES)] for split in ("train", "val")),
        Random(0),
    )
    for split, lines, count in (("train", train, pairs), ("val", val, 1000)):
        files = [(folder / f"{split}.{language}").open("w") for language in LANGUAGES]
        for _ in range(count):
            one, two = random.choices(lines, k=2)
            for file, a, b in zip(files, one, two, strict=True):
                file.write(f"{a} {b}\n")
        for file in files:
            file.close()


def memory() -> int:
    """Return the resident memory of this process that is no mapped file, in bytes (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


def measure(folder: Path, out: Path) -> None:
    """Start a training, and print what it took as JSON."""
    start, settings, device = time.perf_counter(), script.PRESETS["small"], torch.device("cpu")
    encoded, _ = corpus.prepare_corpus(folder, LANGUAGES, settings.vocab_size, out)
    peak, prepared = memory(), time.perf_counter() - start
    tokenizer = corpus.open_tokenizer((encoded / "tokenizer.json").read_text(encoding="utf-8"))
    train = corpus.open_corpus(encoded / "train")
    run = script.begin(out / "none", {"seed": 0} | asdict(settings), tokenizer, device)
    seconds, before = [], time.perf_counter()
    for _ in script.train_epoch(run, run.model, train, []):
        if not seconds:
            first = time.perf_counter() - start
        seconds.append(time.perf_counter() - before)
        before, peak = time.perf_counter(), max(peak, memory())
        if len(seconds) == STEPS:
            break
    before = time.perf_counter()
    batches = script.make_batches(train.lengths, settings.batch_tokens, torch.Generator())
    batching = time.perf_counter() - before
    widths = torch.stack([len(rows) * train.lengths[rows].amax(dim=0).sum() for rows in batches])
    print(json.dumps({
        "prepared": prepared, "first": first, "step": statistics.median(seconds[5:]),
        "memory": peak, "batching": batching, "fill": (train.lengths.sum() / widths.sum()).item(),
        "tokens": len(train.tokens) / len(train.lengths),
        "shapes": len({(len(rows), *train.lengths[rows].amax(dim=0).tolist()) for rows in batches}),
    }))  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of a parallel text")
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS, help="sizes to measure")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the folder of a child
    args = parser.parse_args()
    if args.measure:
        measure(args.data, args.measure)
        return
    print("           tokens     s to first step    s for the   fill    shapes      ms   MB that")
    print("    pairs  per pair   first    second    batches               a step   no file holds")
    for pairs in args.pairs:
        with tempfile.TemporaryDirectory() as folder:
            text, out = Path(folder) / "text", Path(folder) / "out"
            make_text(text, args.data, pairs)
            command = [sys.executable, __file__, str(text), "--measure", str(out)]
            first, second = (
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(2)
            )
        print(
            f"{pairs:9,} {first['tokens']:9.1f} {first['first']:7.1f} {second['first']:9.1f} "
            f"{first['batching']:10.2f} {first['fill']:6.1%} {first['shapes']:9} "
            f"{1000 * first['step']:7.0f} {max(first['memory'], second['memory']) / 1e6:9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
