#!/usr/bin/env python3
"""Measure what translation.py needs for texts of growing size.

    poetry run benchmarks/corpus.py --data DIR --pairs 29000 290000 4500000

DIR holds a parallel text, train.de, train.en, val.de and val.en, plain or gzipped; without it,
phrases are made. Two random pairs of it are joined to one, of about 60 tokens where sentences are
as long as captions. For each number of pairs, two processes one after the other start a training:
the first learns the tokenizer and encodes the text, the second finds that done. The second's share
of the mapped tokens is half of them, as the benchmark itself has mapped them, too. Prints a table.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
corpus = importlib.import_module("inputs.pairs")
phrases = importlib.import_module("inputs.phrases")
script = importlib.import_module("translation")

PAIRS = (29_000, 290_000)
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


def share_of_mapping(path: Path) -> int:
    """Return this process's share of the resident pages of a mapped file, in bytes (Linux).

    A page that two processes have mapped counts half in each.
    """
    text = Path("/proc/self/smaps").read_text().partition(str(path))[2]
    return 1024 * int(text.partition("Pss:")[2].split()[0])


def measure(folder: Path, out: Path) -> None:
    """Start a training, and print what it took as JSON."""
    start, settings, device = time.perf_counter(), script.PRESETS["small"], torch.device("cpu")
    encoded, _ = corpus.prepare_corpus(folder, LANGUAGES, settings.vocab_size, out)
    peak, prepared = memory(), time.perf_counter() - start
    train, _, tokenizer = script.open_encoded(encoded, device)
    run = script.make_run(out, settings, {}, tokenizer, device, seed=0, save_minutes=10)
    before = time.perf_counter()
    batches = script.make_batches(train.lengths, settings.batch_tokens, torch.Generator())
    batching = time.perf_counter() - before
    (optimizer,) = run.optimizers
    seconds, before = [], time.perf_counter()
    for batch in run.steps(batches[:STEPS]):
        count = int((train.lengths[batch, 1] - 1).sum())
        optimizer.zero_grad()
        loss = script.add_gradients(run.model, train, batch, count, settings)
        optimizer.step()
        run.add(loss, count)
        if not seconds:
            first = time.perf_counter() - start
        seconds.append(time.perf_counter() - before)
        before, peak = time.perf_counter(), max(peak, memory())
    train.tokens.sum()  # reads the whole file
    held = share_of_mapping(encoded / "train.tokens")
    widths = torch.stack([len(rows) * train.lengths[rows].amax(dim=0).sum() for rows in batches])
    print(json.dumps({
        "prepared": prepared, "first": first, "step": statistics.median(seconds[5:]),
        "memory": peak, "batching": batching, "fill": (train.lengths.sum() / widths.sum()).item(),
        "tokens": len(train.tokens) / len(train.lengths), "held": held,
        "shapes": len({(len(rows), *train.lengths[rows].amax(dim=0).tolist()) for rows in batches}),
    }))  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="parallel text; else phrases")
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS, help="sizes to measure")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the folder of a child
    args = parser.parse_args()
    if args.measure:
        measure(args.data, args.measure)
        return
    print("             tokens   s to first step    s for                ms MB no   MB of")
    print("    pairs  per pair  first    second  batches   fill shapes a step  file  tokens share")
    for pairs in args.pairs:
        with tempfile.TemporaryDirectory() as folder:
            text, out = Path(folder) / "text", Path(folder) / "out"
            source = args.data or Path(folder) / "phrases"
            if not args.data:
                phrases.write_phrases(source, LANGUAGES)
            make_text(text, source, pairs)
            command = [sys.executable, __file__, "--data", str(text), "--measure", str(out)]

            def start(command: list[str] = command) -> dict[str, float]:
                return json.loads(
                    subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                )

            first = start()
            (tokens,) = out.glob("*/train.tokens")
            mapped = corpus.open_corpus(tokens.with_suffix("")).tokens
            mapped.sum()  # this process holds the file, too
            second = start()
        print(
            f"{pairs:9,} {first['tokens']:9.1f} {first['first']:6.1f} {second['first']:9.1f} "
            f"{first['batching']:8.2f} {first['fill']:6.1%} {first['shapes']:6} "
            f"{1000 * first['step']:6.0f} {max(first['memory'], second['memory']) / 1e6:5.0f} "
            f"{4 * len(mapped) / 1e6:7.1f} {second['held'] / len(mapped) / 4:5.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
