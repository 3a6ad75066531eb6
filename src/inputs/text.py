"""Lines of any text file, and the tokenizer that turns them into numbers.

A file is UTF-8, plain or gzipped, and read as a stream, so its size does not matter. pairs.py and
the lessons from transformer.py on use it.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = range(3)  # the marks <pad>, <s> and </s>: padding, beginning and end of a sequence
MAX_LENGTH = 256  # tokens in a sequence, with its end
LONGEST = 5000  # characters in a line; 256 tokens have fewer
Pair = tuple[str, str]  # source and target: a date and its ISO form, or a sentence and another


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open `path`.gz, or else `path`; turn the errors of a broken file into OSError."""
    zipped = path.with_name(path.name + ".gz")
    path = zipped if zipped.exists() else path
    try:
        with gzip.open(path) if path == zipped else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, zlib.error) as error:
        raise OSError(f"{path} is broken: {error}") from error


def read_lines(path: Path) -> Iterator[str]:
    """Read the lines of `path` or `path`.gz; a line is cut off after 4 * LONGEST bytes."""
    with open_text(path) as file:
        while line := file.readline(4 * LONGEST):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(4 * LONGEST)
            # A character cut in two is ignored: its line is too long anyway.
            text = line.decode("utf-8-sig", "strict" if len(line) < 4 * LONGEST else "ignore")
            yield text.removesuffix("\n").removesuffix("\r")


def examine(path: Path) -> tuple[int, str]:
    """Return the number of lines of `path` or `path`.gz, and a digest of its content."""
    digest = hashlib.sha256()
    lines = 0
    last = b"\n"
    with open_text(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n"), digest.hexdigest()


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn byte-pair encoding (Sennrich et al. 2016) within words; each digit is one token.

    It starts from bytes, so any text can be encoded, and decoding restores it unchanged.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    marks = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return open_tokenizer(tokenizer.to_str())


def open_tokenizer(text: str) -> Tokenizer:
    """Make a tokenizer that treats `<s>` in a text as plain text: three characters."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer
