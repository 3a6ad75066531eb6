"""Parallel text of any size as one flat file of tokens, made once and mapped into memory.

translation.py uses it. A corpus is a folder with train.de, val.de, test*.de and the same with .en
(or other languages): UTF-8, one sentence per line, line n of one the translation of line n of the
other, plain or gzipped. It is read as a stream, so millions of pairs need no more memory than a
thousand; all processes of a machine share the mapped file.
"""

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers import __version__ as VERSION
from torch import Tensor
from tqdm import tqdm

from inputs.text import (
    BOS,
    EOS,
    LONGEST,
    MAX_LENGTH,
    PAD,
    Pair,
    examine,
    make_once,
    make_tokenizer,
    map_numbers,
    read_lines,
    visible,
)

UNBROKEN = re.compile(r"\S{1000}")  # training the tokenizer takes too long on endless words
SAMPLE = 500_000  # pairs to train the tokenizer on, at most
CHUNK = 10_000  # pairs encoded at once

Tests = dict[str, list[Pair]]


def read_pairs(folder: Path, split: str, languages: Sequence[str]) -> Iterator[Pair]:
    """Read the pairs of a split. Raises OSError if one side has more lines than the other."""
    sides = [read_lines(folder / f"{split}.{language}") for language in languages]
    try:
        yield from zip(*sides, strict=True)
    except ValueError:
        names = " and ".join(f"{split}.{language}" for language in languages)
        raise OSError(f"{folder}: {names} have different numbers of lines") from None


def find_tests(folder: Path, languages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the splits test* that have both sides, and of those that have one."""
    files = {path.name.removesuffix(".gz") for path in folder.glob("test*")}
    sides = [
        {name.removesuffix(f".{language}") for name in files if name.endswith(f".{language}")}
        for language in languages
    ]
    return sorted(sides[0] & sides[1]), sorted(sides[0] ^ sides[1])


def read_tests(folder: Path, languages: Sequence[str]) -> Tests:
    """Read every test that has both sides. Raises OSError if one is broken, or has no sentences."""
    names, _ = find_tests(folder, languages)
    tests = {name: [*read_pairs(folder, name, languages)] for name in names}
    for name, pairs in (tests or {"test*": []}).items():
        if not any(all(map(visible, pair)) for pair in pairs):
            source, target = (f"{name}.{language}" for language in languages)
            raise OSError(f"{folder} needs sentences in {source} and {target}")
    return tests


def count_seen(folder: Path, languages: Sequence[str], tests: Tests) -> dict[str, int]:
    """Return how many sources of each test also stand in the training text."""
    sources = {name: {source for source, _ in pairs} for name, pairs in tests.items()}
    wanted = set().union(*sources.values())
    seen = {line for line in read_lines(folder / f"train.{languages[0]}") if line in wanted}
    return {name: len(lines & seen) for name, lines in sources.items()}


def usable(pair: Pair) -> bool:
    """Return whether neither side is empty, too long, or unbroken for too long."""
    return all(
        visible(text) and len(text) < LONGEST and not (len(text) >= 1000 and UNBROKEN.search(text))
        for text in pair
    )


@dataclass(frozen=True)
class Corpus:
    """The tokens of N pairs, end to end: source 0, target 0, source 1 and so on.

    A source ends in EOS; a target begins with BOS and ends in EOS.
    """

    tokens: Tensor  # (all of them,) int32
    offsets: Tensor  # (2N + 1,) int64: where each sequence begins, and the end

    @cached_property
    def lengths(self) -> Tensor:
        """Return the lengths (N, 2) of sources and targets."""
        return self.offsets.diff().view(-1, 2)

    def to(self, device: torch.device) -> "Corpus":
        """Move the tokens to a device; the offsets stay, as batches are made on the CPU."""
        return Corpus(self.tokens.to(device), self.offsets)

    def sequences(self, rows: Tensor, side: int) -> Tensor:
        """Return the sources (side 0) or targets (1) of pairs (B,), with PAD after them: (B, T)."""
        start, end = (self.offsets[2 * rows + i].unsqueeze(1) for i in (side, side + 1))
        index = start + torch.arange(int((end - start).max()))  # (B, T)
        index = index.masked_fill(index >= end, -1)
        if self.tokens.is_cuda:
            index = index.pin_memory()  # else the copy waits until the GPU is idle
        index = index.to(self.tokens.device, non_blocking=True)
        return torch.where(index < 0, PAD, self.tokens[index.clamp(min=0)]).long()


def encode(tokenizer: Tokenizer, pairs: Iterable[Pair], path: Path, total: int) -> None:
    """Encode usable pairs of at most MAX_LENGTH tokens per side to `path`.tokens and .offsets."""
    offsets = array("q", [0])
    stream = iter(pairs)
    bar = tqdm(total=total, desc=f"encoding {path.name}", unit=" pairs", leave=False, disable=None)
    with path.with_suffix(".tokens").open("wb") as file:
        while chunk := list(islice(stream, CHUNK)):
            kept = [text for pair in chunk if usable(pair) for text in pair]
            encodings = iter(tokenizer.encode_batch_fast(kept))
            ids = array("i")
            for source, target in zip(encodings, encodings, strict=True):
                if max(len(source), len(target)) < MAX_LENGTH:
                    ids.extend([*source.ids, EOS, BOS, *target.ids, EOS])
                    middle = offsets[-1] + len(source) + 1
                    offsets.extend((middle, middle + len(target) + 2))
            ids.tofile(file)
            bar.update(len(chunk))
    bar.close()
    path.with_suffix(".offsets").write_bytes(offsets)


def open_corpus(path: Path) -> Corpus:
    """Map the files that `encode` wrote. Raises OSError if they are broken."""
    try:
        tokens, offsets = (
            torch.from_numpy(map_numbers(path.with_suffix(ending), dtype))
            for ending, dtype in ((".tokens", np.int32), (".offsets", np.int64))
        )
        if offsets[-1] != len(tokens) or offsets.diff().min() < 0:
            raise ValueError("the sequences don't fit the tokens")
    except (IndexError, OSError, RuntimeError, ValueError) as error:
        raise OSError(f"{path}.tokens is broken; delete {path.parent} to make it again") from error
    return Corpus(tokens, offsets)


def prepare_corpus(
    folder: Path, languages: Sequence[str], vocab_size: int, cache: Path
) -> tuple[Path, dict[str, int]]:
    """Learn a tokenizer and encode train and val, unless `cache` holds them already.

    Returns the folder in `cache`, named after a digest of its sources and settings, and the numbers
    of pairs in the text. Raises OSError if the text is missing, broken, or unusable.
    """
    name = f"{vocab_size} {MAX_LENGTH} {SAMPLE} {LONGEST} {UNBROKEN.pattern} NFC {VERSION}"
    counts = {}
    for split in ("train", "val"):
        found = [examine(folder / f"{split}.{language}") for language in languages]
        (counts[split], _), (lines, _) = found
        if counts[split] != lines:
            names = " and ".join(f"{split}.{language}" for language in languages)
            raise OSError(f"{folder}: {names} have {counts[split]} and {lines} lines")
        name += "".join(digest for _, digest in found)
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]

    def make(part: Path) -> None:
        stride = 1 + counts["train"] // SAMPLE
        sample = islice(read_pairs(folder, "train", languages), 0, None, stride)
        tokenizer = make_tokenizer(
            (text for pair in sample if usable(pair) for text in pair), vocab_size
        )
        (part / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        for split, count in counts.items():
            encode(tokenizer, read_pairs(folder, split, languages), part / split, count)
            if not (part / f"{split}.tokens").stat().st_size:
                raise OSError(
                    f"{folder}: {split}.* has no sentences of at most {MAX_LENGTH} tokens"
                )

    return make_once(cache, digest, make), counts


def cut(lengths: Tensor, tokens: int) -> list[int]:
    """Cut sequences of lengths (N, 2) where a batch is full; return where each batch ends.

    A batch has at most `tokens` tokens with padding, or one pair.
    """
    sides = lengths.numpy()
    ends = []
    start = 0
    while start < len(sides):
        most = tokens // int(sides[start].sum()) + 1
        widths = np.maximum.accumulate(sides[start : start + most]).sum(axis=1)
        fit = widths * np.arange(1, len(widths) + 1) <= tokens
        start += max(1, int(fit.sum()))
        ends.append(start)
    return ends


def make_batches(lengths: Tensor, tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Group pairs of similar length into batches of at most `tokens` tokens, in random order.

    The lengths are (N, 2). Sorted like this, batches have few different shapes to prepare for.
    """
    random = torch.rand(len(lengths), generator=generator)
    order = (lengths.amax(dim=1) + random).argsort(stable=True)  # alike in all processes
    batches = order.tensor_split(cut(lengths[order], tokens)[:-1])
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
