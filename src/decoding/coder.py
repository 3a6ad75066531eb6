"""An arithmetic coder (Witten, Neal and Cleary 1987): what is likely costs few bits.

A message is an interval. At first it holds all numbers from 0 to 1. Each symbol narrows it to the
symbol's own part, which is as large as the symbol is likely. Any number in the last interval tells
the whole message, and one with -log2(its width) binary digits, or two more, is always there. The
decoder is told the number, sees whose part it lies in, and narrows its interval in the same way.

zipping.py uses it. All is done in whole numbers: 1 is WHOLE, and an interval that has become small
is doubled, since the digits that it was too large for before are certain by then.
"""

from collections.abc import Iterator
from itertools import chain, repeat

import numpy as np
from torch import Tensor

PRECISION = 64  # bits of the ends of an interval; frequencies may sum to a quarter of it
WHOLE = 1 << PRECISION
HALF = WHOLE // 2
QUARTER = WHOLE // 4
TOTAL = 1 << 32  # of the frequencies of a network


def cumulate(frequencies: np.ndarray) -> np.ndarray:
    """Return where the part of each symbol begins, and the last ends: (n,) -> (n + 1,)."""
    cumulative = np.zeros(len(frequencies) + 1, dtype=np.int64)
    np.cumsum(frequencies, out=cumulative[1:])
    return cumulative


def token_frequencies(logits: Tensor) -> np.ndarray:
    """Turn the logits (V,) of a network into cumulative frequencies (V + 2,), TOTAL at most.

    Each token has 1 at least, so that it can be coded. One symbol more, of frequency 1, is for what
    is no token. Raises FloatingPointError if a logit is not finite.
    """
    symbols = len(logits) + 1
    probability = logits.cpu().double().softmax(dim=-1).numpy()
    if not np.isfinite(probability[0]):
        raise FloatingPointError("the network predicts what is not finite")
    frequencies = np.ones(symbols, dtype=np.int64)
    frequencies[:-1] += (probability * (TOTAL - symbols)).astype(np.int64)
    return cumulate(frequencies)


class Interval:
    """The numbers from `low` up to, but without, `high`. All of them begin with the bits so far."""

    def __init__(self) -> None:
        self.low = 0
        self.high = WHOLE

    def narrow(self, symbol: int, cumulative: np.ndarray) -> None:
        """Keep the symbol's part. Raises ValueError if its frequency is 0."""
        start, end, total = (int(cumulative[place]) for place in (symbol, symbol + 1, -1))
        if start == end:
            raise ValueError(f"symbol {symbol} has frequency 0")
        width = self.high - self.low
        self.high = self.low + width * end // total
        self.low = self.low + width * start // total

    def doublings(self) -> Iterator[int]:
        """Double the interval while it fits into a half; yield where that half began.

        A lower half, at 0, means that the next bit is 0; an upper one, at HALF, that it is 1. From
        the middle one, at QUARTER, it follows that the next two bits are 01 or 10.
        """
        while True:
            if self.high <= HALF:
                begin = 0
            elif self.low >= HALF:
                begin = HALF
            elif self.low >= QUARTER and self.high <= QUARTER + HALF:
                begin = QUARTER
            else:
                return
            self.low = 2 * (self.low - begin)
            self.high = 2 * (self.high - begin)
            yield begin


class Encoder:
    """Turns symbols into bytes."""

    def __init__(self) -> None:
        self.interval = Interval()
        self.bits = bytearray()  # each is 0 or 1
        self.waiting = 0  # bits that will be the opposite of the next one

    def encode(self, symbol: int, cumulative: np.ndarray) -> None:
        """Append a symbol, given the cumulative frequencies of all symbols that could be there."""
        self.interval.narrow(symbol, cumulative)
        for begin in self.interval.doublings():
            if begin == QUARTER:
                self.waiting += 1
            else:
                self.put(begin == HALF)

    def put(self, bit: bool) -> None:
        """Append a bit, and those that waited for it."""
        self.bits.append(bit)
        self.bits.extend([not bit] * self.waiting)
        self.waiting = 0

    def finish(self) -> bytes:
        """Return the bytes of all symbols: the bits, and two of a quarter inside the interval."""
        self.waiting += 1
        self.put(self.interval.low >= QUARTER)
        return np.packbits(np.frombuffer(self.bits, dtype=np.uint8)).tobytes()


class Decoder:
    """Turns bytes back into symbols, given for each one the cumulative frequencies it had."""

    def __init__(self, content: bytes) -> None:
        self.interval = Interval()
        bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8)).tobytes()
        self.bits = chain(bits, repeat(0, PRECISION))  # after the end, they don't matter
        self.number = 0  # lies in the interval
        for _ in range(PRECISION):
            self.shift_in()

    def shift_in(self) -> None:
        """Double the number, and add the next bit. Raises ValueError if there is none."""
        bit = next(self.bits, None)
        if bit is None:
            raise ValueError("there are more symbols than the bytes tell")
        self.number = 2 * self.number + bit

    def decode(self, cumulative: np.ndarray) -> int:
        """Return the next symbol."""
        width = self.interval.high - self.interval.low
        total = int(cumulative[-1])
        # The last place whose share of the width, rounded down as in `narrow`, is not beyond.
        place = ((self.number - self.interval.low + 1) * total - 1) // width
        symbol = int(np.searchsorted(cumulative, place, side="right")) - 1
        self.interval.narrow(symbol, cumulative)
        for begin in self.interval.doublings():
            self.number -= begin
            self.shift_in()
        return symbol
