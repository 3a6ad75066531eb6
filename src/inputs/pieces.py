r"""A text becomes tokens: each distinct piece of it is encoded once, by all cores.

documents.py uses it. Byte-pair encoding never looks beyond a piece, such as a word with the space
before it, and a text repeats its pieces: most of Python's are among some ten thousand. So a piece
that was encoded before is only looked up, which is ten times as fast as the tokenizer itself.
"""

import os
import re
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Protocol, TypeVar

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

from inputs.text import open_tokenizer

# The pieces within which tokens are learned: a line break with the indentation after it, a word, a
# digit, and signs, each with a space before it.
PIECES = r"\n[ \t]*| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
# Python's `re` compares the characters of these with each range in turn, which takes too long. Of
# those between them, such as emoji, none is a letter, a number or a space.
RARE = re.compile("[\U00010000-\U0001f2ff\U0001fb00-\U0010ffff]")
KNOWN = 1 << 26  # characters in the pieces that one process remembers, at most
OVERHEAD = 100  # what remembering a piece costs besides, in characters

AnyJob = TypeVar("AnyJob", bound="HasTexts")


class HasTexts(Protocol):
    """Anything that holds texts to encode."""

    @property
    def texts(self) -> Sequence[str]:
        """Return the texts."""


@cache
def python_pieces() -> re.Pattern[str]:
    r"""Return PIECES for Python's `re`, which knows no \p{L}.

    The tokenizer itself says what it takes for a letter, a number or a space.
    """
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))

    def ranges(kind: str) -> str:
        others = pre_tokenizers.Split(Regex(f"[^{kind}]+"), "removed")
        runs = [run for run, _ in others.pre_tokenize_str(characters)]
        return "".join(rf"\u{ord(run[0]):04x}-\u{ord(run[-1]):04x}" for run in runs)

    letter = ranges(r"\p{L}")
    number = ranges(r"\p{N}")
    space = ranges(r"\s")
    return re.compile(
        rf"\n[ \t]*| ?[{letter}]+| ?[{number}]| ?[^{space}{letter}{number}]+|[{space}]+"
    )


class Encoder:
    """Encodes texts as the tokenizer does, with a mark before each.

    Tokens are bytes of `dtype`. If `by_pieces`, the tokenizer has to split texts by PIECES.
    """

    def __init__(self, tokenizer: Tokenizer, mark: int, dtype: np.dtype, by_pieces: bool) -> None:
        self.tokenizer = tokenizer
        self.mark = mark
        self.dtype = dtype
        self.by_pieces = by_pieces
        self.known: dict[str, bytes] = {}  # tokens of pieces
        self.size = 0  # of what is known, in characters

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the tokens of each text."""
        mark = self.pack([self.mark])
        pieces = [self.split(text) for text in texts]
        self.learn({*chain.from_iterable(pieces)})
        return [mark + b"".join(map(self.known.__getitem__, each)) for each in pieces]

    def split(self, text: str) -> list[str]:
        """Return the parts of a text that are encoded apart."""
        if not self.by_pieces or RARE.search(text):
            return [text]
        return python_pieces().findall(text)

    def learn(self, pieces: set[str]) -> None:
        """Encode those of some pieces that are not known; forget the others when they are many."""
        if self.size > KNOWN:
            self.known.clear()
            self.size = 0
        new = [piece for piece in pieces if piece not in self.known]
        for piece, encoding in zip(new, self.tokenizer.encode_batch_fast(new), strict=True):
            self.known[piece] = self.pack(encoding.ids)
            self.size += OVERHEAD + len(piece)

    def pack(self, ids: Sequence[int]) -> bytes:
        """Return tokens as bytes."""
        return np.array(ids, self.dtype).tobytes()


def serve(pipe: Connection, tokenizer: str, mark: int, dtype: np.dtype, by_pieces: bool) -> None:
    """Encode the texts that come through a pipe, until the other process closes it, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process
    encoder = Encoder(open_tokenizer(tokenizer), mark, dtype, by_pieces)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(encoder.encode(pipe.recv()))


@contextmanager
def serving(encoder: Encoder, count: int) -> Iterator[list[Connection]]:
    """Start processes that encode like this encoder; yield the pipes to them."""
    context = get_context("spawn")  # a copy of a process with threads might wait for them forever
    pipes = []
    processes = []
    what = encoder.tokenizer.to_str(), encoder.mark, encoder.dtype, encoder.by_pieces
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            pipes.append(ours)
            processes.append(context.Process(target=serve, args=(theirs, *what), daemon=True))
            processes[-1].start()
            theirs.close()  # so that the pipe closes when its process ends
        yield pipes
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise OSError("a process that encoded the text was killed: is memory short?") from None
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def encode_by_all(
    encoder: Encoder, jobs: Iterable[AnyJob], processes: int
) -> Iterator[tuple[AnyJob, list[bytes]]]:
    """Yield each of the jobs, in their order, with the tokens of its texts.

    Raises OSError if a process is killed.
    """
    if processes == 1:
        for job in jobs:
            yield job, encoder.encode(job.texts)
        return
    with serving(encoder, processes) as pipes:
        waiting: deque[tuple[AnyJob, Connection]] = deque()
        for number, job in enumerate(jobs):
            pipe = pipes[number % processes]
            if len(waiting) == processes:
                first, its_pipe = waiting.popleft()
                done = its_pipe.recv()
                pipe.send(job.texts)  # at once, so that its process does not wait
                waiting.append((job, pipe))
                yield first, done
            else:
                pipe.send(job.texts)
                waiting.append((job, pipe))
        for job, pipe in waiting:
            yield job, pipe.recv()


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
