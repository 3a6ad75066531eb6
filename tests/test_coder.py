"""The arithmetic coder: it gives back any symbols, and takes the bits that theory promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from decoding.coder import (
    TOTAL,
    WHOLE,
    Decoder,
    Encoder,
    Interval,
    cumulate,
    token_frequencies,
)

FREQUENCY = st.one_of(st.integers(0, 9), st.integers(0, TOTAL // 8))
STEP = (  # frequencies, and a symbol that has one
    st.lists(FREQUENCY, min_size=1, max_size=8)
    .filter(any)
    .flatmap(
        lambda frequencies: st.tuples(
            st.just(frequencies),
            st.sampled_from([n for n, frequency in enumerate(frequencies) if frequency]),
        )
    )
)


def encode(steps):
    encoder = Encoder()
    for frequencies, symbol in steps:
        encoder.encode(symbol, cumulate(frequencies))
    return encoder.finish()


@given(st.lists(STEP, max_size=50))
@example([([1, 2, 1], 1)] * 500 + [([1, 2, 1], 2)])  # always around the middle
@example([([1, TOTAL - 2, 1], n % 3) for n in range(90)])
@example([([TOTAL - 1, 1], 0)] * 500)
def test_symbols_come_back_from_as_many_bits_as_they_surprise(steps):
    content = encode(steps)
    decoder = Decoder(content)
    assert [decoder.decode(cumulate(f)) for f, _ in steps] == [symbol for _, symbol in steps]
    ideal = sum(math.log2(sum(f)) - math.log2(f[symbol]) for f, symbol in steps)
    assert ideal - 1e-6 <= 8 * len(content) < ideal + 2 + 8 + 1e-6


def test_equally_likely_halves_are_the_bits_themselves():
    content = encode([([1, 1], bit) for bit in (1, 0, 1, 1)])
    assert content == bytes([0b1011_01_00])  # 01: a quarter inside what is left
    content = encode([([3, 1], 0), ([3, 1], 1)])  # 0 to 3/4, then 9/16 to 12/16
    assert content == bytes([0b101_00000])  # 10/16 to 11/16 lies inside
    assert encode([]) == bytes([0b01_000000])


def test_an_interval_keeps_the_part_of_its_symbol():
    parts = np.array([0, 1, 3, 4])
    for symbol, expected in enumerate([(1000, 1250), (1250, 1750), (1750, 2000)]):
        interval = Interval()
        interval.low, interval.high = 1000, 2000
        interval.narrow(symbol, parts)
        assert (interval.low, interval.high) == expected
        assert {type(interval.low), type(interval.high)} == {int}
    interval.low, interval.high = 1000, 1010
    interval.narrow(1, parts)
    assert (interval.low, interval.high) == (1002, 1007)  # 2.5 and 7.5, rounded down
    interval = Interval()
    for total, part in ((3, (WHOLE // 3, WHOLE * 2 // 3)), (TOTAL, None)):
        interval.narrow(1, cumulate([1, 1, total - 2]))
        assert part in (None, (interval.low, interval.high))  # rounded down, without loss
    width = WHOLE * 2 // 3 - WHOLE // 3
    assert interval.low == WHOLE // 3 + width // TOTAL
    assert interval.high == WHOLE // 3 + width * 2 // TOTAL


def test_an_empty_part_is_refused_and_leaves_the_interval():
    interval = Interval()
    interval.narrow(1, np.array([0, 1, 3, 4]))
    low, high = interval.low, interval.high
    with pytest.raises(ValueError):
        interval.narrow(1, np.array([0, 1, 1, 2]))
    assert (interval.low, interval.high) == (low, high)


def test_a_symbol_that_can_not_be_there_is_refused():
    with pytest.raises(ValueError, match="symbol 1 has frequency 0"):
        encode([([1, 0, 1], 1)])


def test_decoding_ends_where_the_bytes_do():
    decoder = Decoder(encode([([1, 1], 1)] * 5))
    with pytest.raises(ValueError, match="more symbols than the bytes tell"):
        for _ in range(1000):
            decoder.decode(cumulate([1, 1]))


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=30))
def test_frequencies_are_the_probabilities_and_none_is_0(logits):
    cumulative = token_frequencies(torch.tensor(logits))
    frequencies = np.diff(cumulative)
    weights = np.exp(np.array(logits, dtype=np.float64) - max(logits))
    expected = weights / weights.sum() * (TOTAL - len(logits) - 1)
    assert cumulative[0] == 0
    assert len(frequencies) == len(logits) + 1
    assert frequencies[-1] == 1
    assert frequencies.min() == 1
    assert (np.abs(frequencies[:-1] - 0.5 - expected) < 0.51).all()  # 1 more, rounded down
    assert TOTAL - len(logits) <= cumulative[-1] <= TOTAL


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(wrong):
    with pytest.raises(FloatingPointError, match="not finite"):
        token_frequencies(torch.tensor([0.0, wrong, 1.0]))
