"""Whole files as the documents of a language model: split, encoded end to end, cut into windows.

gpt.py uses it. A text is a folder of files, a file, or lines of JSON, of any size. By default, the
documents are the standard library of the Python that runs, so nothing has to be downloaded. A text
is read as a stream and encoded once, into a file that all processes map into memory.
"""

import hashlib
import io
import json
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import __version__ as VERSION
from torch import Tensor
from tqdm import tqdm

from inputs.pieces import PIECES, Encoder, cores, encode_by_all
from inputs.text import make_once, map_numbers, open_file, open_tokenizer

MARK = "<|endoftext|>"  # stands before each document, and so also after one
MARK_ID = 0
ONE_IN = 16  # documents is held out
PART = 1 << 20  # characters: a longer document is cut into several
LINE = 1 << 27  # bytes in a line of JSON, at most
JOB = 1 << 20  # characters encoded at once
ALONE = 1 << 25  # bytes of text that one process encodes before others would have started
LEARNED = 1 << 25  # characters from which the tokenizer is learned, at most
MEASURED = 1 << 21  # held-out bytes that are measured, at most
GIVEN = 1 << 24  # characters of the training text that samples and compressors get, at most
SHUFFLED = 1 << 18  # windows whose order is kept in memory, at most
ROUNDS = 4  # of shuffling more windows
GRAM = 8  # characters: shorter runs are no sign that a text was learned by heart
EXCLUDED = frozenset({  # folders of the standard library with tests and tables, or not part of it
    "site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data",
})  # fmt: skip
# Learning takes too long on endless words, signs and spaces.
ENDLESS = re.compile(r"[^\W\d_]{1000,}|[^\w\s]{1000,}|\s{1000,}")


class Text(NamedTuple):
    """Where a text is: a file, or those files of a folder that match one of the globs.

    Folders with the names in `excluded` are left out.
    """

    path: Path
    globs: tuple[str, ...]
    excluded: frozenset[str] = frozenset()


class NotText(OSError):
    """A file is whole, but not text in UTF-8."""


@dataclass(frozen=True)
class Listing:
    """The files of a text, and a digest of their names, sizes and times."""

    about: str  # for a person
    folder: Path
    names: list[str]  # from the folder on, with /
    alone: bool  # whether the text is a file, not a folder
    size: int  # bytes
    digest: str
    left_out: Counter[str]  # how many of what


def standard_library() -> Text:
    """Return where the standard library is."""
    return Text(Path(sysconfig.get_paths()["stdlib"]), ("*.py",), EXCLUDED)


def is_held_out(name: str) -> bool:
    """Return whether a document is held out, by its path, or by its text if it is a line of JSON.

    The path begins at the data's root and has /. No other document affects the result, so a
    document stays where it is.
    """
    digest = hashlib.sha256(name.encode(errors="surrogateescape"))
    return int(digest.hexdigest(), 16) % ONE_IN == 0


def find_names(text: Text, left_out: Counter[str]) -> Iterator[str]:
    """Yield the paths of a folder's files, from the folder on; count hidden folders.

    Of a path, all or the last part must match one of the globs.
    """
    matches = re.compile("|".join(map(translate, text.globs))).match
    for folder, inner, files in os.walk(text.path):
        hidden = {name for name in inner if name.startswith(".")}
        left_out["hidden folders"] += len(hidden)
        inner[:] = [name for name in inner if name not in hidden | text.excluded]
        within = Path(folder).relative_to(text.path).as_posix()
        prefix = "" if within == "." else f"{within}/"
        for name in files:
            if matches(name) or matches(prefix + name):
                yield prefix + name


def list_files(text: Text) -> Listing:
    """List the files of a text, in the order of their paths. Raises OSError if it isn't there."""
    left_out: Counter[str] = Counter()
    alone = not text.path.is_dir()
    folder = text.path.parent if alone else text.path
    found = [text.path.name] if alone else sorted(find_names(text, left_out))
    digest = hashlib.sha256()
    start = os.path.join(folder, "")
    names = []
    size = 0
    for name in found:
        try:
            state = os.stat(f"{start}{name}")  # a Path would take as long as all else
        except OSError:
            if alone:
                raise
            left_out["files that can't be read"] += 1
            continue
        if not (stat.S_ISREG(state.st_mode) or alone):
            left_out["files that can't be read"] += 1
            continue
        names.append(name)
        size += state.st_size
        known = f"{name}\0{state.st_size} {state.st_mtime_ns}\n"
        digest.update(known.encode(errors="surrogateescape"))
    about = str(text.path) if alone else f"{text.path} ({' '.join(text.globs)})"
    return Listing(about, folder, names, alone, size, digest.hexdigest(), left_out)


def read_parts(stream: TextIO) -> Iterator[str]:
    """Yield a text in parts of at most PART characters, cut after a line break if there is one."""
    text = stream.read(PART)
    while len(text) == PART:
        end = text.rfind("\n") + 1 or PART
        yield text[:end]
        text = text[end:] + stream.read(end)
    yield text


def read_file(path: Path) -> Iterator[str]:
    """Yield the parts of a file. Raises OSError if it is broken, or NotText, perhaps midway."""
    try:
        with open_file(path) as file:
            for part in read_parts(io.TextIOWrapper(file, encoding="utf-8", newline="")):
                if "\0" in part:
                    raise NotText(f"{path} is not text: it has bytes of value 0")
                yield part
    except UnicodeDecodeError:
        raise NotText(f"{path} is not text in UTF-8") from None


def read_whole(path: Path) -> Iterator[str]:
    """Yield the parts of a file. Raises OSError before the first one if any part is broken."""
    start = [*islice(read_file(path), 2)]
    if len(start) == 1:
        yield from start
        return
    for _ in read_file(path):  # too long to be kept until its end is known
        pass
    yield from read_file(path)


def read_halves(path: Path) -> Iterator[tuple[bool, str]]:
    """Yield the parts of a file that stands alone; the last 1 / ONE_IN of it is held out."""
    length = sum(map(len, read_file(path)))
    left = length - length // ONE_IN
    for part in read_file(path):
        cut = min(left, len(part))
        left -= cut
        if 0 < cut < len(part):
            cut = part.find("\n", cut, -1) + 1 or cut
        if cut:
            yield False, part[:cut]
        if cut < len(part):
            yield True, part[cut:]


def parse_line(line: bytes) -> str | None:
    """Return the text of a line of JSON, or None if it has none."""
    try:
        text = json.loads(line)["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return text


def read_json(path: Path, left_out: Counter[str]) -> Iterator[tuple[bool, str]]:
    """Yield the field `text` of each line as a document; count the lines without one.

    Raises OSError before the first one if the file is broken.
    """
    if path.suffix == ".gz":
        with open_file(path) as file:
            while file.read(PART):
                pass
    with open_file(path) as file:
        while line := file.readline(LINE):
            whole = len(line) < LINE or line.endswith(b"\n")
            if not whole:
                skip_line(file)
            text = parse_line(line) if whole else None
            if text is not None:
                held_out = is_held_out(text)
                for part in read_parts(io.StringIO(text, newline="")):
                    yield held_out, part
            elif line.strip():
                left_out["lines without a text"] += 1


def skip_line(file: BinaryIO) -> None:
    """Read on to the end of a line."""
    rest = b" "
    while rest and not rest.endswith(b"\n"):
        rest = file.readline(PART)


def read_documents(listing: Listing, left_out: Counter[str]) -> Iterator[tuple[bool, str]]:
    """Yield whether a document is held out, and its text, for all documents of a text.

    A file that is broken or no text is left out and counted. Raises OSError if such a file stands
    alone.
    """
    for name in listing.names:
        path = listing.folder / name
        try:
            if name.removesuffix(".gz").endswith(".jsonl"):
                yield from read_json(path, left_out)
            elif listing.alone:
                yield from read_halves(path)
            else:
                held_out = is_held_out(name)
                for part in read_whole(path):
                    yield held_out, part
        except NotText:
            if listing.alone:
                raise
            left_out["files that are not text in UTF-8"] += 1
        except OSError:
            if listing.alone:
                raise
            left_out["files that can't be read"] += 1


def sample_texts(texts: Iterable[str]) -> list[str]:
    """Return every fourth text, or every 8th, 16th and so on if they would exceed LEARNED."""
    stride = 4
    kept: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        if number % stride:
            continue
        kept.append(ENDLESS.sub("", text))
        size += len(kept[-1])
        while size > LEARNED:
            kept = kept[::2]
            stride *= 2
            size = sum(map(len, kept))
    return kept


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


class Job(NamedTuple):
    """Documents that are encoded at once."""

    held_out: list[bool]
    texts: list[str]


def gather_jobs(documents: Iterable[tuple[bool, str]]) -> Iterator[Job]:
    """Yield documents in groups of about JOB characters."""
    job = Job([], [])
    size = 0
    for held_out, text in documents:
        job.held_out.append(held_out)
        job.texts.append(text)
        size += len(text)
        if size >= JOB:
            yield job
            job = Job([], [])
            size = 0
    if job.texts:
        yield job


def encode_documents(
    documents: Iterable[tuple[bool, str]], encoder: Encoder, folder: Path, size: int | None
) -> tuple[int, int]:
    """Write the tokens of documents, end to end, to train.tokens and held-out.tokens in a folder.

    held-out.ends gets the tokens and bytes (N, 2) up to the end of each one that is held out. The
    text has `size` bytes, if that is known. Return the bytes for training, and those held out.
    """
    training_bytes = 0
    ends = np.zeros(2, np.int64)
    processes = 1 if size is not None and size < ALONE else cores()
    with (
        (folder / "train.tokens").open("wb") as training,
        (folder / "held-out.tokens").open("wb") as validation,
        (folder / "held-out.ends").open("wb") as all_ends,
        tqdm(
            total=size, desc="encoding", unit="B", unit_scale=True, leave=False, disable=None
        ) as bar,
    ):  # fmt: skip
        for job, encoded in encode_by_all(encoder, gather_jobs(documents), processes):
            for held_out, text, tokens in zip(job.held_out, job.texts, encoded, strict=True):
                length = len(text.encode())
                bar.update(length)
                if held_out:
                    validation.write(tokens)
                    ends += len(tokens) // encoder.dtype.itemsize, length
                    all_ends.write(ends.tobytes())
                else:
                    training.write(tokens)
                    training_bytes += length
    return training_bytes, int(ends[1])


def prepare_documents(
    text: Text,
    vocab_size: int,
    cache: Path,
    tokenizer: Tokenizer | None = None,
    mark: int = MARK_ID,
) -> Path:
    """Encode a text, unless `cache` holds its tokens already; return their folder in `cache`.

    A tokenizer of `vocab_size` tokens is learned, unless one is given, with its mark between
    documents. The folder's name is a digest of all that matters. Raises OSError if nothing
    is there to train on or to be held out, or if a file that stands alone is broken.
    """
    listing = list_files(text)
    given = None if tokenizer is None else tokenizer.to_str()
    matters = (
        VERSION, vocab_size, given, mark, listing.digest, text.globs, sorted(text.excluded), PIECES,
        ENDLESS.pattern, ONE_IN, PART, LINE, LEARNED,
    )  # fmt: skip
    name = hashlib.sha256(repr(matters).encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        used = tokenizer or learn_from(listing, vocab_size)
        (folder / "tokenizer.json").write_text(used.to_str(), encoding="utf-8")
        few = max(used.get_vocab().values()) < 1 << 16
        dtype = np.dtype(np.uint16 if few else np.uint32)
        encoder = Encoder(used, mark, dtype, by_pieces=tokenizer is None)
        about = encode_listing(listing, encoder, folder)
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")

    return make_once(cache, name, make)


def learn_from(listing: Listing, vocab_size: int) -> Tokenizer:
    """Learn a tokenizer from a bounded share of the text for training."""
    documents = read_documents(listing, Counter())
    sample = sample_texts(part for held_out, part in documents if not held_out)
    return learn_tokenizer(sample, vocab_size)


def encode_listing(listing: Listing, encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Write the tokens of all documents to a folder; return what else is known of them.

    Raises OSError if nothing is there to train on or to be held out.
    """
    left_out = listing.left_out.copy()
    documents = read_documents(listing, left_out)
    zipped = any(name.endswith(".gz") for name in listing.names)
    training_bytes, held_out_bytes = encode_documents(
        documents, encoder, folder, None if zipped else listing.size
    )
    without = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
    besides = f"; left out: {without}" if without else ""
    if not training_bytes:
        raise OSError(f"{listing.about} has no text to train on{besides}")
    if not held_out_bytes:
        raise OSError(
            f"{listing.about} has too few documents: one in {ONE_IN}, on average, is held out"
            f"{besides}"
        )
    return {
        "dtype": encoder.dtype.name,
        "mark": encoder.mark,
        "training_bytes": training_bytes,
        "left_out": without,
    }


@dataclass(frozen=True)
class Corpus:
    """The documents of a text as tokens."""

    tokens: Tensor  # of all documents for training, end to end: uint16 or uint32, a mapped file
    mark: int  # before each document
    training_bytes: int  # of their text
    held_out: list[Tensor]  # documents that are measured, int64: all, or evenly spread ones
    held_out_bytes: int  # of their text
    left_out: str  # the parts of the text that are not used
    digest: str  # of all tokens


def open_corpus(folder: Path) -> tuple[Corpus, Tokenizer]:
    """Open what `prepare_documents` made. Raises OSError if it is broken."""
    try:
        about = json.loads((folder / "about.json").read_bytes())
        sums = json.loads((folder / "sums.json").read_bytes())
        tokenizer = open_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
        dtype = np.dtype(about["dtype"])
        tokens = torch.from_numpy(map_numbers(folder / "train.tokens", dtype))
        validation = map_numbers(folder / "held-out.tokens", dtype)
        ends = map_numbers(folder / "held-out.ends", np.int64).reshape(-1, 2)
        held_out, held_out_bytes = choose_held_out(validation, ends)
        digest = " ".join(f"{sums[f'{name}.tokens'][2]:08x}" for name in ("train", "held-out"))
        return Corpus(
            tokens, about["mark"], about["training_bytes"], held_out, held_out_bytes,
            about["left_out"], digest,
        ), tokenizer  # fmt: skip
    except Exception as error:  # tokenizers raises no other kind
        raise OSError(f"{folder} is broken; delete it to make it again: {error}") from error


def choose_held_out(tokens: np.ndarray, ends: np.ndarray) -> tuple[list[Tensor], int]:
    """Return documents that are held out, of about MEASURED bytes at most, and their bytes.

    `ends` has the tokens and bytes (N, 2) up to the end of each document.
    """
    chosen = []
    size = 0
    stride = 1 + int(ends[-1, 1]) // MEASURED
    with_text = np.flatnonzero(np.diff(ends[:, 1], prepend=0))
    for number in with_text[::stride].tolist():
        start, before = ends[number - 1] if number else (0, 0)
        end, after = ends[number]
        chosen.append(torch.from_numpy(tokens[start:end].astype(np.int64)))
        size += int(after - before)
        if size >= MEASURED:
            break
    return chosen, size


def training_text(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Return the text of the first documents for training, GIVEN characters at most."""
    tokens = corpus.tokens[:GIVEN].numpy()  # each is a byte at least
    texts = []
    size = 0
    for document in np.split(tokens, np.flatnonzero(tokens == corpus.mark)):
        texts.append(tokenizer.decode(document[1:].tolist()))  # without the mark
        size += len(texts[-1])
        if size >= GIVEN:
            break
    return "".join(texts)[:GIVEN]


class Windows:
    """Where windows of `width` tokens begin in a text of `length`, in random order, without end.

    Each pass over the text visits all its windows. They don't overlap, and the next pass cuts the
    text elsewhere. All follows from the seed.
    """

    def __init__(self, length: int, width: int, seed: int) -> None:
        self.length = length
        self.width = width
        self.seed = seed
        self.begin(0, 0)

    def begin(self, number: int, first: int) -> None:
        """Begin pass `number`, whose first window has the number `first` in all passes."""
        self.number = number
        self.first = first
        random = torch.Generator().manual_seed(Random(f"{self.seed} {number}").getrandbits(63))
        rest = self.length - self.width
        self.offset = int(torch.randint(min(self.width, rest + 1), (), generator=random))
        self.count = (rest - self.offset) // self.width + 1
        few = self.count <= SHUFFLED  # of more, each place is computed as it is needed
        self.order = torch.randperm(self.count, generator=random) if few else None

    def draw(self, first: int, count: int) -> Tensor:
        """Return where the windows from number `first` on begin: (count,)."""
        return torch.tensor([self.start(number) for number in range(first, first + count)])

    def start(self, number: int) -> int:
        """Return where the window with a number begins."""
        if number < self.first:
            self.begin(0, 0)
        while number >= self.first + self.count:
            self.begin(self.number + 1, self.first + self.count)
        place = number - self.first
        if self.order is None:
            place = shuffle(place, self.count, f"{self.seed} {self.number}")
        else:
            place = int(self.order[place])
        return self.offset + place * self.width


def shuffle(number: int, count: int, seed: str) -> int:
    """Return a number's place in a random order of range(count), without making that order.

    A Feistel network (Luby and Rackoff 1988) shuffles the numbers below a power of 4 that is at
    least `count`: each round can be undone, so no two numbers get the same place. A place beyond
    `count` is shuffled again, until it is none (Black and Rogaway 2002).
    """
    bits = ((count - 1).bit_length() + 1) // 2
    mask = (1 << bits) - 1
    place = number
    while True:
        left = place >> bits
        right = place & mask
        for step in range(ROUNDS):
            digest = hashlib.blake2b(f"{seed} {step} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        place = left << bits | right
        if place < count:
            return place


def longest_shared_runs(samples: Sequence[str], text: str) -> list[int]:
    """Return the length of the longest run of characters that each sample shares with a text.

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
    """Return the GRAM characters from each place of a text on, as one number."""
    characters = np.frombuffer(text.encode("latin-1", "replace"), np.uint8)
    if len(characters) < GRAM:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(characters, GRAM)
    return np.ascontiguousarray(windows).view(np.uint64).ravel()
