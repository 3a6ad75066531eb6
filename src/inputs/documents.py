"""Whole files as the documents of a language model: split, encoded end to end, cut into windows.

gpt.py uses it. Without a folder of one's own, the documents are the standard library of the Python
that runs: nothing has to be downloaded.
"""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from inputs.text import open_tokenizer

MARK = "<|endoftext|>"  # stands before each document, and so also after one
MARK_ID = 0
ONE_IN = 16  # documents is held out
GRAM = 8  # characters: shorter runs are no sign that a text was learned by heart
EXCLUDED = {  # folders of the standard library that hold tests and tables, or are not part of it
    "site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data",
}  # fmt: skip
# The pieces within which tokens are learned: a line break with the indentation after it, a word, a
# digit, and signs, each with a space before it.
PIECES = r"\n[ \t]*| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass(frozen=True)
class Documents:
    """The texts of files, split for training and to be held out."""

    training: list[str]
    held_out: list[str]


def standard_library() -> Path:
    """Return the folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(name: str) -> bool:
    """Return whether the document with this path, with / and from the data's root on, is held out.

    So it stays where it is, whatever other documents there are.
    """
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % ONE_IN == 0


def read_documents(root: Path) -> Documents:
    """Read the .py files below a folder that are UTF-8, in the order of their paths.

    Raises OSError unless there are some for training, and some to be held out.
    """
    documents = Documents([], [])
    names = [path.relative_to(root) for path in root.rglob("*.py") if path.is_file()]
    for name in sorted(path.as_posix() for path in names if not EXCLUDED & {*path.parts[:-1]}):
        try:
            text = (root / name).read_bytes().decode()
        except UnicodeDecodeError:
            continue
        split = documents.held_out if is_held_out(name) else documents.training
        split.append(text)
    if not any(documents.training):
        raise OSError(f"{root} has no text in .py files to train on")
    if not any(documents.held_out):
        raise OSError(f"{root} has too few .py files: one in {ONE_IN}, on average, is held out")
    return documents


def learn_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learn byte-pair encoding (Sennrich et al. 2016) within PIECES, for any text.

    It starts from bytes, so decoding gives back whatever was encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[MARK], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return open_tokenizer(tokenizer.to_str())


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], mark: int = MARK_ID
) -> list[Tensor]:
    """Return the tokens of each text, with the mark before them."""
    encodings = tokenizer.encode_batch_fast([*texts])
    return [torch.tensor([mark, *encoding.ids]) for encoding in encodings]


def draw_windows(length: int, width: int, count: int, seed: int) -> Tensor:
    """Draw where windows of a text of `length` tokens begin: (count,).

    Each pass over the text visits all its windows, in random order. They don't overlap, and the
    next pass cuts the text elsewhere.
    """
    passes: list[Tensor] = []
    drawn = 0
    while drawn < count:
        random = torch.Generator().manual_seed(Random(f"{seed} {len(passes)}").getrandbits(63))
        first = int(torch.randint(min(width, length - width + 1), (), generator=random))
        starts = torch.arange(first, length - width + 1, width)
        passes.append(starts[torch.randperm(len(starts), generator=random)])
        drawn += len(starts)
    return torch.cat(passes)[:count]


def longest_shared_runs(samples: Sequence[str], text: str) -> list[int]:
    """Return how many characters the longest run has that each sample shares with the text.

    A run of fewer than GRAM counts as 0, and characters beyond Latin-1 count as alike.
    """
    of_text = grams(text)
    order = of_text.argsort()
    ordered = of_text[order]
    ending = np.zeros(len(of_text) + 1, dtype=np.int32)  # length of the run that ends at each place
    lengths = []
    for sample in samples:
        longest = 0
        before = order[:0]  # places in the text of the gram before
        for gram in grams(sample):
            first = ordered.searchsorted(gram, "left")
            end = ordered.searchsorted(gram, "right")
            places = order[first:end]
            runs = ending[places - 1] + 1  # place -1 is the last, at which no run ends
            ending[before] = 0
            ending[places] = runs
            before = places
            longest = max(longest, int(runs.max(initial=0)))
        ending[before] = 0
        lengths.append(longest + GRAM - 1 if longest else 0)
    return lengths


def grams(text: str) -> np.ndarray:
    """Return each GRAM characters of a text, from each place on, as one number."""
    characters = np.frombuffer(text.encode("latin-1", "replace"), np.uint8)
    if len(characters) < GRAM:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(characters, GRAM)
    return np.ascontiguousarray(windows).view(np.uint64).ravel()
