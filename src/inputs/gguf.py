"""GGUF: a language model in one file, as llama.cpp writes it.

pretrained.py uses it. After a head that counts them come facts about the model, then the name,
shape, kind and place of each tensor, then the tensors. Their weights may have been rounded to 4 or
8 bits, in blocks of 32 that share a scale.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Callable
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from torch import Tensor

BLOCK = 32  # weights that share a scale
MOST = 1 << 22  # tensors, facts, or values in one; Llama 3 has 280,147 merges
NUMBERS = {  # kinds of numbers among the facts, and their codes
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TEXT, ARRAY = 8, 9  # the other kinds
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that stand for themselves, whatever is around them

# The pieces within which tokens were learned, for each name that llama.cpp gives them. An
# apostrophe goes with the letters after it, and spaces with what follows them.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit is a piece


class Stored(NamedTuple):
    """A tensor in a file: its shape is known, its numbers are still to be read."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # in float32, and a copy: the file may change later


class Reader:
    """Reads values one after another, and never beyond the end."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.place = 0

    def take(self, size: int) -> memoryview:
        """Return the next bytes."""
        if size > len(self.content) - self.place:
            raise ValueError("it ends too early")
        found = self.content[self.place : self.place + size]
        self.place += size
        return found

    def number(self, code: str) -> Any:
        """Return the next number; `code` is that of `struct`."""
        (found,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return found

    def count(self) -> int:
        """Return how many of something follow."""
        found = self.number("Q")
        if found > MOST:
            raise ValueError(f"it has {found:,} of something: more than any model")
        return found

    def text(self) -> str:
        """Return the next text."""
        return bytes(self.take(self.number("Q"))).decode()

    def value(self) -> Any:
        """Return the next value: a number, a text, or an array of either."""
        kind = self.number("I")
        if kind != ARRAY:
            return self.text() if kind == TEXT else self.number(code_of(kind))
        kind = self.number("I")
        count = self.count()
        if kind == TEXT:
            return [self.text() for _ in range(count)]
        code = code_of(kind)
        return np.frombuffer(self.take(count * struct.calcsize(f"<{code}")), f"<{code}")


def code_of(kind: int) -> str:
    """Return the code that `struct` and NumPy have for a kind of number."""
    if kind not in NUMBERS:
        raise ValueError(f"it has a value of the unknown kind {kind}")
    return NUMBERS[kind]


def dequantize_q4_0(blocks: np.ndarray) -> np.ndarray:
    """Return weights from 4 bits each: (bits - 8) * scale."""
    scale = blocks[:, :2].view("<f2").astype(np.float32)
    return (halves(blocks[:, 2:]) - 8) * scale


def dequantize_q4_1(blocks: np.ndarray) -> np.ndarray:
    """Return weights from 4 bits each: bits * scale + least."""
    scale = blocks[:, :2].view("<f2").astype(np.float32)
    least = blocks[:, 2:4].view("<f2").astype(np.float32)
    return halves(blocks[:, 4:]) * scale + least


def dequantize_q8_0(blocks: np.ndarray) -> np.ndarray:
    """Return weights from 8 bits each, with a sign: bits * scale."""
    scale = blocks[:, :2].view("<f2").astype(np.float32)
    return blocks[:, 2:].view(np.int8) * scale


def halves(packed: np.ndarray) -> np.ndarray:
    """Return 4 bits of each byte, then the other 4: the second half of a block."""
    return np.concatenate((packed & 15, packed >> 4), axis=1).astype(np.float32)


class Kind(NamedTuple):
    """How weights are stored."""

    weights: int  # in a block
    size: int  # of a block, in bytes
    decode: Callable[[np.ndarray], np.ndarray]  # blocks (n, size) to new float32 (n, weights)


KINDS = {
    0: Kind(1, 4, lambda blocks: blocks.view("<f4").astype(np.float32)),
    1: Kind(1, 2, lambda blocks: blocks.view("<f2").astype(np.float32)),
    2: Kind(BLOCK, 18, dequantize_q4_0),
    3: Kind(BLOCK, 20, dequantize_q4_1),
    8: Kind(BLOCK, 34, dequantize_q8_0),
}


def decode(content: np.ndarray, kind: Kind, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of this shape that the bytes hold."""
    weights = kind.decode(content.reshape(-1, kind.size))
    return torch.from_numpy(weights.reshape(shape))


class Head(NamedTuple):
    """What a file says about a tensor."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    size: int  # in bytes
    place: int  # where it begins, counted from where the tensors begin


def read_head(reader: Reader) -> Head:
    """Read what the file says about the next tensor."""
    name = reader.text()
    num_dimensions = reader.number("I")
    if not 1 <= num_dimensions <= 4:
        raise ValueError(f"{name} has {num_dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(num_dimensions))[::-1]
    number = reader.number("I")
    if number not in KINDS:
        raise ValueError(f"{name} is of kind {number}: not F32, F16, Q4_0, Q4_1 or Q8_0")
    kind = KINDS[number]
    if shape[-1] % kind.weights:
        raise ValueError(f"the rows of {name} are no whole blocks")
    size = math.prod(shape) // kind.weights * kind.size
    return Head(name, shape, kind, size, reader.number("Q"))


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Open a file: facts and tensors, by the names that they have in it.

    It is mapped into memory, not read. What its counts and sizes ask for is compared with its own
    size first. Raises OSError or ValueError if it is broken, or holds other kinds of weights.
    """
    with path.open("rb") as file:
        reader = Reader(memoryview(mmap(file.fileno(), 0, access=ACCESS_READ)))
    if reader.take(4) != b"GGUF":
        raise ValueError("it is no GGUF file")
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, not 2 or 3")
    num_tensors = reader.count()
    num_facts = reader.count()
    facts: dict[str, Any] = {}
    for _ in range(num_facts):
        name = reader.text()
        facts[name] = reader.value()
    heads = [read_head(reader) for _ in range(num_tensors)]
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    reader.take(-reader.place % alignment)
    return facts, locate(heads, np.frombuffer(reader.content, np.uint8, offset=reader.place))


def locate(heads: list[Head], data: np.ndarray) -> dict[str, Stored]:
    """Return the tensors by their names. Together they take no more bytes than there are."""
    if sum(head.size for head in heads) > len(data):
        raise ValueError("its tensors are larger than the file")
    tensors = {}
    for name, shape, kind, size, place in heads:
        if place + size > len(data):
            raise ValueError(f"{name} lies beyond its end")
        if name in tensors:
            raise ValueError(f"it has {name} twice")
        content = data[place : place + size]
        tensors[name] = Stored(shape, partial(decode, content, kind, shape))
    return tensors


def make_pre_tokenizer(name: str | None) -> pre_tokenizers.PreTokenizer:
    """Return what cuts a text into the pieces within which tokens were learned."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    patterns = {"llama-bpe": LLAMA_3, "qwen2": QWEN_2}
    if name not in patterns:  # llama.cpp cuts otherwise by default
        raise ValueError(f"its tokenizer.ggml.pre is {name!r}: not smollm, qwen2, llama-bpe, gpt-2")
    pieces = pre_tokenizers.Split(Regex(patterns[name]), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pieces, bytes_of])


def make_tokenizer(facts: dict[str, Any]) -> Tokenizer:
    """Make the tokenizer of a file from its facts. Raises ValueError if it is of another kind."""
    model = facts.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(f"its tokenizer.ggml.model is {model!r}, not 'gpt2'")
    pre = facts.get("tokenizer.ggml.pre")
    tokens = texts(facts, "tokenizer.ggml.tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ValueError("its vocabulary names a token twice")
    merges = []
    for merge in texts(facts, "tokenizer.ggml.merges"):
        first, second = merge.split(" ")
        merges.append((first, second))
    whole_words = pre == "llama-bpe"  # that are tokens need no merges
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = make_pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.encode_special_tokens = True  # one in a text is plain text
    kinds = facts.get("tokenizer.ggml.token_type", [1] * len(tokens))
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer


def texts(facts: dict[str, Any], name: str) -> list[str]:
    """Return a fact that has to be a list of texts."""
    found = facts.get(name)
    if not isinstance(found, list):
        raise ValueError(f"it lacks {name}")
    return found
