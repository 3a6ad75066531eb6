"""Any file, zipped with a language model: the likelier a token, the fewer bits it costs.

gpt.py uses it. Zipping and unzipping let the network predict each next token in the very same
steps, so that it predicts the same, bit for bit. A file is a list of items: tokens, and bytes that
the tokenizer can't give back. A number below the vocabulary's size V is a token; V + b is byte b.
"""

import hashlib
import struct
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from decoding.cache import Cache
from decoding.coder import Decoder, Encoder, cumulate, token_frequencies
from decoding.sampling import LanguageModel

MAGIC = b"GPTz"
VERSION = 2
START = struct.Struct("<4sBI")  # MAGIC, VERSION, and a checksum of all that follows
FIELDS = struct.Struct("<8sQQIB")  # of Header, and the length of its conditions
# Under others, numbers may be rounded otherwise, or a text cut into other tokens.
CONDITIONS = ("torch", "tokenizers", "--device", "OMP_NUM_THREADS")
ANY_BYTE = cumulate(np.ones(256, dtype=np.int64))
LONGEST_WINDOW = 8192  # tokens: of a longer context, the attention would take too much memory
TIMED = 5  # steps, after one to warm up


class PublishedModel(LanguageModel, Protocol):
    """A network with sizes, `context` and `vocab_size` among them, such as that of gpt.py."""

    @property
    def sizes(self) -> Any:
        """Return the sizes."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by their names."""


def escaped(vocab_size: int, text: str) -> list[int]:
    """Return the bytes of a text as items."""
    return [vocab_size + byte for byte in text.encode(errors="surrogateescape")]


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Return the tokens of a text, or None if decoding them doesn't restore it."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return ids if tokenizer.decode(ids, skip_special_tokens=False) == text else None


def text_items(tokenizer: Tokenizer, vocab_size: int, text: str) -> list[int]:
    """Return the items of a text, which is halved as long as decoding doesn't restore it.

    Some tokenizers turn a letter and its accent into one character.
    """
    tokens = tokens_of(tokenizer, text)
    if tokens is not None:
        return tokens
    if len(text) == 1:
        return escaped(vocab_size, text)
    middle = len(text) // 2
    first = text_items(tokenizer, vocab_size, text[:middle])
    return first + text_items(tokenizer, vocab_size, text[middle:])


def to_bytes(tokenizer: Tokenizer, vocab_size: int, items: Sequence[int]) -> bytes:
    """Return the bytes of a file, given its items."""
    content = bytearray()
    for is_token, run in groupby(items, lambda item: item < vocab_size):
        if is_token:
            text = tokenizer.decode([*run], skip_special_tokens=False)
            content += text.encode()
        else:
            content += bytes(item - vocab_size for item in run)
    return bytes(content)


def to_items(tokenizer: Tokenizer, vocab_size: int, content: bytes) -> list[int]:
    """Return the tokens of any bytes, and between them the bytes that no tokens give back.

    These bytes are no UTF-8, or of characters that the vocabulary lacks and a tokenizer drops.
    """
    text = content.decode(errors="surrogateescape")  # a surrogate for each byte that isn't UTF-8
    lost = {
        character
        for character in set(text)
        if "\ud800" <= character <= "\udfff" or tokens_of(tokenizer, character) is None
    }
    items = []
    for is_lost, characters in groupby(text, lost.__contains__):
        piece = "".join(characters)
        if is_lost:
            items += escaped(vocab_size, piece)
        else:
            items += text_items(tokenizer, vocab_size, piece)
    if to_bytes(tokenizer, vocab_size, items) == content:
        return items
    return escaped(vocab_size, text)


def to_symbols(items: Sequence[int], vocab_size: int) -> list[int]:
    """Return what the coder codes: a token, or the symbol `vocab_size` and a byte."""
    symbols = []
    for item in items:
        if item < vocab_size:
            symbols.append(item)
        else:
            symbols.extend([vocab_size, item - vocab_size])
    return symbols


def predict(model: PublishedModel, tokens: Sequence[int | None], cache: Cache) -> np.ndarray:
    """Return the cumulative frequencies of what follows these tokens, and those in the cache."""
    device = next(model.parameters()).device
    positions = torch.arange(cache.length + len(tokens), device=device)
    x = model.hidden(torch.tensor([tokens], device=device), positions, None)
    return token_frequencies(model.to_logits(x[0, -1]))


@torch.inference_mode()
def predictions(model: PublishedModel, mark_id: int) -> Generator[np.ndarray, int | None, None]:
    """Yield the cumulative frequencies of each next token, and be sent the one that comes.

    As when its bits are measured, a text is cut into windows of the context's size. They don't
    overlap: at the start of one, the network knows only the token before, at first the mark.
    """
    model.eval()
    token: int | None = mark_id
    while True:
        with Cache(cast(nn.Module, model)) as cache:
            for _ in range(min(model.sizes.context, LONGEST_WINDOW)):
                token = yield predict(model, [token], cache)


def code_items(
    model: PublishedModel, mark_id: int, count: int, code: Callable[[np.ndarray], int]
) -> list[int]:
    """Let `code` encode or decode each symbol, given cumulative frequencies; return the items.

    The symbol V announces a byte; all bytes are equally likely. The network sees neither.
    """
    escape = model.sizes.vocab_size
    items = []
    symbol = None  # which starts a generator
    with closing(predictions(model, mark_id)) as predicted:
        for _ in tqdm(range(count), unit=" tokens", leave=False, disable=None):
            if symbol != escape:
                cumulative = predicted.send(symbol)
            symbol = code(cumulative)
            items.append(escape + code(ANY_BYTE) if symbol == escape else symbol)
    return items


@torch.inference_mode()
def measure_step(model: PublishedModel, mark_id: int, count: int) -> float:
    """Return how many seconds one of `count` steps takes on average, as one in the middle does."""
    model.eval()
    window = min(count, model.sizes.context, LONGEST_WINDOW)
    seconds = []
    with Cache(cast(nn.Module, model)) as cache:
        predict(model, [mark_id] * (window // 2 + 1), cache)
        for _ in range(TIMED):
            start = time.perf_counter()
            predict(model, [mark_id], cache)
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def make_digest(model: PublishedModel, tokenizer: Tokenizer, mark_id: int) -> bytes:
    """Return 8 bytes that tell a network, its sizes and its tokenizer from all others."""
    digest = hashlib.sha256(f"{model.sizes} {mark_id} {tokenizer.to_str()}".encode())
    for name, tensor in model.state_dict().items():
        numbers = tensor.cpu().contiguous().flatten()
        digest.update(name.encode())
        digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.digest()[:8]


def read_conditions(model: PublishedModel) -> list[str]:
    """Return the values of CONDITIONS."""
    device = next(model.parameters()).device
    threads = str(torch.get_num_threads())
    return [torch.__version__, tokenizers.__version__, device.type, threads]


class Header(NamedTuple):
    """What a zipped file says about itself, so that no other network unzips it."""

    digest: bytes  # of the network
    items: int
    length: int  # bytes of the file
    checksum: int  # of the file
    conditions: list[str]  # the values of CONDITIONS


def pack(header: Header, coded: bytes) -> bytes:
    """Return the bytes of a zipped file."""
    conditions = " ".join(header.conditions).encode()
    fields = FIELDS.pack(*header[:4], len(conditions))
    rest = fields + conditions + coded
    return START.pack(MAGIC, VERSION, zlib.crc32(rest)) + rest


def unpack(zipped: bytes) -> tuple[Header, bytes]:
    """Return the header of a zipped file, and what was coded. Raises ValueError if it is broken."""
    if len(zipped) < START.size or not zipped.startswith(MAGIC):
        raise ValueError("it was not zipped by this script")
    _, version, sum_of_rest = START.unpack_from(zipped)
    if version != VERSION:
        raise ValueError(f"it has version {version} of the format; this is version {VERSION}")
    rest = zipped[START.size :]
    if zlib.crc32(rest) != sum_of_rest:
        raise ValueError("it is broken: its checksum is wrong")
    digest, items, length, checksum, size = FIELDS.unpack_from(rest)
    end = FIELDS.size + size
    conditions = rest[FIELDS.size : end].decode().split()
    return Header(digest, items, length, checksum, conditions), rest[end:]


def zip_bytes(
    model: PublishedModel,
    tokenizer: Tokenizer,
    mark_id: int,
    content: bytes,
    announce: Callable[[float], None],
) -> bytes:
    """Zip any bytes; first, tell `announce` how many seconds that will take.

    Raises FloatingPointError if what the network predicts is not finite.
    """
    vocab_size = model.sizes.vocab_size
    items = to_items(tokenizer, vocab_size, content)
    announce(measure_step(model, mark_id, len(items)) * len(items))
    symbols = iter(to_symbols(items, vocab_size))
    encoder = Encoder()

    def code(cumulative: np.ndarray) -> int:
        symbol = next(symbols)
        encoder.encode(symbol, cumulative)
        return symbol

    code_items(model, mark_id, len(items), code)
    digest = make_digest(model, tokenizer, mark_id)
    conditions = read_conditions(model)
    header = Header(digest, len(items), len(content), zlib.crc32(content), conditions)
    return pack(header, encoder.finish())


def unzip_bytes(
    model: PublishedModel,
    tokenizer: Tokenizer,
    mark_id: int,
    zipped: bytes,
    announce: Callable[[float], None],
) -> bytes:
    """Return the bytes that `zip_bytes` has zipped.

    Raises ValueError if they are broken, or were zipped with another network or elsewhere.
    """
    header, coded = unpack(zipped)
    for name, then, now in zip(CONDITIONS, header.conditions, read_conditions(model), strict=True):
        if then != now:
            raise ValueError(f"it needs {name} {then}, not {now}")
    if header.digest != make_digest(model, tokenizer, mark_id):
        raise ValueError("it was zipped with another network")
    announce(measure_step(model, mark_id, header.items) * header.items)
    items = code_items(model, mark_id, header.items, Decoder(coded).decode)
    content = to_bytes(tokenizer, model.sizes.vocab_size, items)
    if len(content) != header.length or zlib.crc32(content) != header.checksum:
        raise ValueError("this machine computes something else than the one that zipped it")
    return content
