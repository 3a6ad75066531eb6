"""Lines of any text file, the tokenizer that turns them into numbers, and seals for the numbers.

A file is UTF-8, plain or gzipped, and read as a stream, so its size does not matter. pairs.py,
documents.py and the lessons from transformer.py on use it.
"""

import codecs
import errno
import gzip
import hashlib
import json
import os
import shutil
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = range(3)  # the marks <pad>, <s> and </s>: padding, beginning and end of a sequence
MAX_LENGTH = 256  # tokens in a sequence, with its end
LONGEST = 5000  # characters in a line; 256 tokens have fewer
POINTER = b"version https://git-lfs.github.com/spec/"  # in place of a file that was not fetched
Pair = tuple[str, str]  # source and target: a date and its ISO form, or a sentence and another


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open `path` or `path`.gz. Raises OSError if both are there, or the file is broken."""
    zipped = path.with_name(path.name + ".gz")
    if path.exists() and zipped.exists():
        raise OSError(f"{path} and {zipped.name} are both there: delete one of them")
    with open_file(zipped if zipped.exists() else path) as file:
        yield file


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file, which is unpacked if its name ends in .gz. Raises OSError if it is broken."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a plain file")
    try:
        with path.open("rb") as file:
            if file.peek(len(POINTER)).startswith(POINTER):
                raise OSError(f"{path} is only a pointer of Git LFS: run git lfs pull")
            zipped = path.suffix == ".gz"
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OSError(f"{path} is broken: {error}") from error


def decode_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Decode lines, with composed accents (NFC); a line is cut off after 4 * LONGEST bytes.

    Raises OSError if one isn't UTF-8, or if there are carriage returns in place of line feeds.
    """
    for number in count(1):
        line = file.readline(4 * LONGEST)
        if not line:
            return
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(4 * LONGEST)
        if number == 1 and b"\r" in line and not rest.endswith(b"\n"):
            raise OSError(f"{name}: its lines end in carriage returns; use line feeds")
        # A character cut in two is ignored: its line is too long anyway.
        errors = "strict" if len(line) < 4 * LONGEST else "ignore"
        try:
            text = line.decode("utf-8-sig", errors)
        except UnicodeDecodeError:
            raise OSError(f"{name}, line {number}: not UTF-8") from None
        yield unicodedata.normalize("NFC", text.removesuffix("\n").removesuffix("\r"))


def read_lines(path: Path) -> Iterator[str]:
    """Read the lines of `path` or `path`.gz."""
    with open_text(path) as file:
        yield from decode_lines(file, str(path))


def examine(path: Path) -> tuple[int, str]:
    """Return the number of lines of `path` or `path`.gz, and a digest of its content.

    Raises OSError if it isn't UTF-8, or has carriage returns in place of line feeds.
    """
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 0
    last = b"\n"
    with open_text(path) as file:
        while block := file.read(1 << 20):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n") + 1
                raise OSError(f"{path}, line {line}: not UTF-8") from None
            if lines == 0 and b"\r" in block and b"\n" not in block:
                raise OSError(f"{path}: its lines end in carriage returns; use line feeds")
            digest.update(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n"), digest.hexdigest()


def visible(text: str) -> bool:
    """Return whether a text has anything but spaces and characters that show nothing."""
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file's content."""
    result = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            result = zlib.crc32(block, result)
    return result


def seal(folder: Path) -> None:
    """Flush the files of a folder, and record their sizes, times and checksums in sums.json."""
    sums = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        sums[path.name] = [path.stat().st_size, path.stat().st_mtime_ns, checksum(path)]
    with (folder / "sums.json").open("w", encoding="utf-8") as sealed:
        json.dump(sums, sealed)
        sealed.flush()
        os.fsync(sealed.fileno())


def check_seal(folder: Path) -> None:
    """Raise OSError unless the files of a folder are those that were sealed.

    A file with the same size and time counts as the same; only if its time differs, as in a copy,
    is all of it read.
    """
    try:
        sums = json.loads((folder / "sums.json").read_bytes())
        for name, (size, time, crc) in sums.items():
            path = folder / name
            state = path.stat()
            same = path.is_file() and state.st_size == size
            if not same or (state.st_mtime_ns != time and checksum(path) != crc):
                raise ValueError(f"{name} has changed")
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise OSError(f"{folder} is broken; delete it to make it again: {error}") from error


def make_once(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Let `make` fill the folder `name` in `cache`, unless that was done before; return the folder.

    What was cut short is made again. Raises OSError if the files have changed since, or if they
    can't be written; then nothing is left of them.
    """
    folder = cache / name
    if not folder.exists():
        part = cache / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            make(part)
            seal(part)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            if error.errno == errno.ENOSPC:
                raise OSError(f"no space left for {folder}: free some, or choose --out") from error
            raise
        part.replace(folder)
    check_seal(folder)
    return folder


def map_numbers(path: Path, dtype: np.dtype | type) -> np.ndarray:
    """Map a file of numbers into memory, which all processes of a machine share.

    A process that wrote to them would get pages of its own. Raises ValueError if it has none.
    """
    return np.memmap(path, dtype, mode="c")


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
