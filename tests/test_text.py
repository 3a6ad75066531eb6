"""Lines of text, and the tokenizer."""

import gzip

from hypothesis import given, settings
from hypothesis import strategies as st

import inputs.text as T
from conftest import SENTENCES
from inputs.pairs import usable
from inputs.text import EOS

texts = st.text() | st.text("<s>/pad\x00\x85\u2028 \t\r\née\u0301ß") | st.sampled_from(SENTENCES[0])


@settings(deadline=None, max_examples=100)
@given(text=texts)
def test_any_text_comes_back_as_it_was(words, text):
    ids = words.encode(text).ids
    assert words.decode(ids) == text
    assert all(EOS < i < words.get_vocab_size() for i in ids)


def test_words_are_learned_but_not_across_spaces_and_digits_stay_alone():
    sentences = [text for pair in SENTENCES for text in pair] + ["am 12.12.2012"] * 50
    words = T.make_tokenizer(sentences, 320)
    assert words.get_vocab_size() <= 320
    assert len(words.encode(SENTENCES[0][0]).ids) <= len(SENTENCES[0][0]) / 2
    assert all(" " not in words.decode([i])[1:] for i in range(words.get_vocab_size()))
    assert [words.decode([i]) for i in words.encode("2012").ids] == list("2012")


def test_a_line_without_an_end_is_cut_as_it_is_read(tmp_path):
    long = "ü" * 100_000
    (tmp_path / "a").write_text(f"one\n{long}\ntwo\n{long}", encoding="utf-8")
    one, cut, two, last = T.read_lines(tmp_path / "a")
    assert (one, two) == ("one", "two")
    for line in (cut, last):
        assert T.LONGEST <= len(line) < 5 * T.LONGEST
        assert not usable((line, "a"))


def test_only_a_line_feed_ends_a_line_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes("one\x0b\x1c\u2028 still\n\ntwo".encode())
    assert [*T.read_lines(tmp_path / "a")] == ["one\x0b\x1c\u2028 still", "", "two"]
    assert T.examine(tmp_path / "a")[0] == 3
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbffrom\r\nWindows\r\n")
    assert [*T.read_lines(tmp_path / "b")] == ["from", "Windows"]
    assert T.examine(tmp_path / "b")[0] == 2


def test_a_file_that_grows_without_end_when_unpacked_takes_no_memory(tmp_path):
    """As a line of zeros does; reading it stops when it is asked to."""
    with gzip.open(tmp_path / "a.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    (line,) = T.read_lines(tmp_path / "a")
    assert len(line) < 5 * T.LONGEST
    assert T.examine(tmp_path / "a")[0] == 1
