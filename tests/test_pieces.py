"""Pieces of a text, encoded once and by several processes, have the tokenizer's own tokens."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inputs import pieces as P
from inputs.documents import Job, learn_tokenizer

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Größe:\n    total = 100\n" * 3
DTYPE = np.dtype(np.uint16)
# Where Python's `re` and the tokenizer could differ on letters, numbers and spaces.
SIGNS = "aé\u0301ßⅧ²½٣一\x1c\x85\xa0\u2028\u200b_ \t\r\n,'…🎉𝐀🄀𠀀\U0001fbf0\uffff"
texts = st.text() | st.text(SIGNS) | st.sampled_from([TEXT, P.PIECES])


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer([TEXT], 300)


def numbers(encoded):
    return [np.frombuffer(each, DTYPE).tolist() for each in encoded]


def expected(tokenizer, texts):
    return [[7, *tokenizer.encode(text).ids] for text in texts]


@settings(deadline=None)
@given(st.lists(texts, max_size=4), st.booleans())
@example([SIGNS, *SIGNS], True)
def test_the_tokens_of_pieces_are_those_of_the_tokenizer(tokenizer, texts, by_pieces):
    encoder = P.Encoder(tokenizer, 7, DTYPE, by_pieces)
    for _ in range(2):  # now they are known
        assert numbers(encoder.encode(texts)) == expected(tokenizer, texts)


def test_each_piece_is_encoded_once_until_too_many_are_known(tokenizer, monkeypatch):
    encoder = P.Encoder(tokenizer, 7, DTYPE, by_pieces=True)
    encoder.encode([TEXT])
    assert len(encoder.known) < len(P.python_pieces().findall(TEXT)) / 2
    before = {*encoder.known}
    encoder.encode(["add new"])
    assert {*encoder.known} == before | {"add", " new"}
    monkeypatch.setattr(P, "KNOWN", 100)
    assert numbers(encoder.encode(["add"])) == expected(tokenizer, ["add"])
    assert {*encoder.known} == {"add"}


def jobs(count):
    return [Job([False, True], [f"x = {n}\n", TEXT[n:]]) for n in range(count)]


def test_several_processes_encode_the_same_in_the_same_order(tokenizer):
    encoder = P.Encoder(tokenizer, 7, DTYPE, by_pieces=True)
    given = jobs(7)
    found = list(P.encode_by_all(encoder, given, 2))
    assert [job for job, _ in found] == given
    for job, encoded in found:
        assert numbers(encoded) == expected(tokenizer, job.texts)
    assert list(P.encode_by_all(encoder, iter(given), 1)) == found


def test_a_killed_process_is_told_of(tokenizer):
    encoder = P.Encoder(tokenizer, 7, DTYPE, by_pieces=True)
    found = P.encode_by_all(encoder, jobs(1000), 1 + 1)
    next(found)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(OSError, match="was killed: is memory short") as caught:
        list(found)
    assert not isinstance(caught.value, BrokenPipeError)  # which would pass for `| head`
