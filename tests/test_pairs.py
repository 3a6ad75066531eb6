"""Parallel text becomes tokens in one file, and batches of them."""

import gzip
import itertools
import os
import re
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import inputs.pairs as C
from conftest import SENTENCES, corpus_of
from inputs.text import BOS, EOS, MAX_LENGTH, PAD, open_tokenizer

BOTH = ("de", "en")
NAMES = ("Rss", "Anonymous")  # of a mapping in /proc/self/smaps


def batches_of(lengths, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return C.make_batches(torch.tensor(lengths), tokens, generator)


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=60),
    tokens=st.integers(1, 300), seed=st.integers(0, 9),
)  # fmt: skip
def test_batches_have_every_pair_once_and_no_more_tokens_than_asked(sizes, tokens, seed):
    lengths, batches = torch.tensor(sizes), batches_of(sizes, tokens, seed)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(sizes)))
    assert all(len(batch) for batch in batches)
    for batch in batches:
        padded = len(batch) * int(lengths[batch].amax(dim=0).sum())
        assert padded <= tokens or len(batch) == 1
    again = batches_of(sizes, tokens, seed)
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in batches]


@pytest.mark.parametrize(("tokens", "sizes"), [(9, 1), (19, 1), (20, 2), (29, 2), (30, 3)])
def test_a_batch_has_as_many_pairs_as_fit(tokens, sizes):
    batches = batches_of([(4, 6)] * 6, tokens)
    assert [len(batch) for batch in batches] == [sizes] * (6 // sizes)


def test_pairs_are_sorted_by_their_longer_side():
    random = Random(0)
    lengths = [(random.randrange(1, 30), random.randrange(1, 30)) for _ in range(500)]
    batches = batches_of(lengths, 200)
    longer = ([max(lengths[i]) for i in batch.tolist()] for batch in batches)
    ranges = sorted((min(each), max(each)) for each in longer)
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(ranges))


def test_batches_are_full_differ_by_epoch_and_come_in_random_order():
    random = Random(0)
    sizes = [(n := random.randrange(5, 30), n + random.randrange(-2, 3)) for _ in range(5000)]
    lengths, batches = torch.tensor(sizes), batches_of(sizes, 2000)
    padded = [len(batch) * int(lengths[batch].amax(dim=0).sum()) for batch in batches]
    assert lengths.sum() > 0.93 * sum(padded)
    assert sorted(padded)[len(padded) // 10] > 1900
    shapes = {(len(batch), *lengths[batch].amax(dim=0).tolist()) for batch in batches}
    assert len(shapes) < 3 * 30
    other = batches_of(sizes, 2000, seed=1)
    assert {tuple(b.tolist()) for b in batches} != {tuple(b.tolist()) for b in other}
    longest, others = ([int(lengths[batch].max()) for batch in each] for each in (batches, other))
    steps = [abs(a - b) for a, b in itertools.pairwise(longest)]
    assert sum(steps) / len(steps) > (max(longest) - min(longest)) / 5  # 1/3 of it on average
    assert sum(a == b for a, b in zip(longest, others, strict=False)) < len(longest) / 3


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=6), min_size=2, max_size=12))
def test_sequences_are_those_of_the_pairs_with_padding_after_them(sides):
    pairs = list(zip(sides[::2], sides[1::2], strict=False))
    corpus = corpus_of(pairs)
    assert corpus.lengths.tolist() == [[len(a), len(b)] for a, b in pairs]
    rows = torch.arange(len(pairs)).flip(0)
    for side in (0, 1):
        expected = [pair[side] for pair in reversed(pairs)]
        width = max(map(len, expected))
        found = corpus.sequences(rows, side)
        assert found.tolist() == [ids + [PAD] * (width - len(ids)) for ids in expected]
        assert found.dtype == torch.int64


def encoded(tokenizer, pairs, folder):
    C.encode(tokenizer, pairs, folder / "some", len(pairs))
    return C.open_corpus(folder / "some")


def test_an_encoded_corpus_is_that_of_each_pair_in_turn(words, tmp_path, monkeypatch):
    monkeypatch.setattr(C, "CHUNK", 3)
    corpus = encoded(words, SENTENCES * 2, tmp_path)
    assert len(corpus.lengths) == 8
    for row, (source, target) in enumerate(SENTENCES * 2):
        ids, labels = (corpus.sequences(torch.tensor([row]), side)[0].tolist() for side in (0, 1))
        assert (ids[-1], labels[0], labels[-1]) == (EOS, BOS, EOS)
        assert (words.decode(ids[:-1]), words.decode(labels[1:-1])) == (source, target)
    assert (tmp_path / "some.tokens").stat().st_size == 4 * len(corpus.tokens)


@pytest.mark.parametrize("nothing", ["", "\t\xa0"])
def test_pairs_with_a_side_that_is_empty_or_too_long_are_left_out(words, tmp_path, nothing):
    longest, longer = "x " * (MAX_LENGTH // 2 - 1) + "x", "x " * (MAX_LENGTH // 2)
    assert [len(words.encode(text).ids) for text in (longest, longer)] == [255, 256]
    pairs = [("ein", nothing), SENTENCES[0], (nothing, "a"), (longest, longest)]
    pairs += [(longest, longer), (longer, longest), (nothing, nothing)]
    pairs += [("x" * 1000, "a"), ("a " * 3000, "a"), ("\u200b", "a")]
    corpus = encoded(words, pairs, tmp_path)
    expected = encoded(words, [pairs[1], pairs[3]], tmp_path)
    assert torch.equal(corpus.tokens, expected.tokens)
    assert len(corpus.lengths) == 2


# A folder


def prepare(folder, cache, languages=BOTH, vocab_size=320):
    return C.prepare_corpus(folder, languages, vocab_size, cache)


def test_plain_and_gzipped_text_is_encoded_once_and_found_by_its_content(
    text_folder, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    path, count = prepare(text_folder, cache)
    assert len(flushed) == len([*path.iterdir()])  # each file, lest a power cut leaves it empty
    assert count == {"train": 30 * len(SENTENCES), "val": 2}
    assert {p.name for p in path.iterdir()} == {
        "sums.json", "tokenizer.json", "train.tokens", "train.offsets", "val.tokens", "val.offsets",
    }  # fmt: skip
    tokenizer = open_tokenizer((path / "tokenizer.json").read_text())
    corpus = C.open_corpus(path / "val")
    ids = corpus.sequences(torch.tensor([1]), 0)[0, :-1].tolist()
    assert tokenizer.decode(ids) == SENTENCES[1][0]

    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    moved = text_folder.rename(tmp_path / "moved")
    for name in ("train.de", "train.en"):  # not gzipped any more
        packed = moved / f"{name}.gz"
        (moved / name).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert prepare(moved, cache) == (path, count)
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before

    assert prepare(moved, cache, vocab_size=300)[0] != path
    assert prepare(moved, cache, ("en", "de"))[0] != path
    lines = (moved / "val.en").read_text().replace("dog", "cat")
    (moved / "val.en").write_text(lines)
    assert prepare(moved, cache)[0] != path


def test_an_encoding_that_was_cut_short_is_made_again(text_folder, tmp_path, monkeypatch):
    encode = C.encode

    def killed(*arguments):
        encode(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(C, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(text_folder, tmp_path / "cache")
    (part,) = (tmp_path / "cache").iterdir()
    assert part.suffix == ".part"
    monkeypatch.undo()
    path, _ = prepare(text_folder, tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == [path]


@pytest.mark.parametrize("name", ["train.tokens", "val.offsets"])
@pytest.mark.parametrize("size", [0, 8])
def test_a_broken_encoding_is_named(text_folder, tmp_path, name, size):
    path, _ = prepare(text_folder, tmp_path / "cache")
    (path / name).write_bytes((path / name).read_bytes()[:size])
    with pytest.raises(OSError, match=re.escape(str(path))):
        C.open_corpus(path / name.partition(".")[0])


def test_offsets_that_fall_are_refused(tmp_path):
    np.arange(9, dtype=np.int32).tofile(tmp_path / "some.tokens")
    np.array([0, 7, 3, 8, 9]).tofile(tmp_path / "some.offsets")
    with pytest.raises(OSError, match=r"some\.tokens is broken"):
        C.open_corpus(tmp_path / "some")


@pytest.mark.parametrize(
    ("name", "value"),
    [("LONGEST", 4000), ("UNBROKEN", re.compile("x")), ("SAMPLE", 50), ("VERSION", "0.0")],
)
def test_text_that_would_be_encoded_otherwise_is_encoded_anew(
    text_folder, tmp_path, monkeypatch, name, value
):
    before, _ = prepare(text_folder, tmp_path / "cache")
    monkeypatch.setattr(C, name, value)
    assert prepare(text_folder, tmp_path / "cache")[0] != before


@pytest.mark.parametrize("name", ["train.tokens", "val.offsets", "tokenizer.json", "sums.json"])
@pytest.mark.parametrize("how", ["flipped", "empty", "missing", "folder"])
def test_an_encoding_that_has_changed_is_refused(text_folder, tmp_path, name, how):
    path, _ = prepare(text_folder, tmp_path / "cache")
    content = bytearray((path / name).read_bytes())
    (path / name).unlink()
    if how == "folder":
        (path / name).mkdir()
    elif how != "missing":
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content if how == "flipped" else b"")
    with pytest.raises(OSError, match=f"{path.name} is broken; delete it to make it again"):
        prepare(text_folder, tmp_path / "cache")


def test_an_encoding_that_was_copied_is_the_same(text_folder, tmp_path):
    path, counts = prepare(text_folder, tmp_path / "cache")
    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copytree(path, copied / path.name, copy_function=shutil.copyfile)
    assert prepare(text_folder, copied) == (copied / path.name, counts)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_the_tokens_stay_in_the_file_which_all_processes_share(tmp_path):
    torch.arange(1_000_000, dtype=torch.int32).numpy().tofile(tmp_path / "train.tokens")
    offsets = torch.arange(0, 1_000_001, 10)
    offsets.numpy().tofile(tmp_path / "train.offsets")
    corpus = C.open_corpus(tmp_path / "train").to(torch.device("cpu"))
    assert corpus.sequences(torch.arange(50_000), 0).sum() > 0
    assert corpus.tokens.sum() == 1_000_000 * 999_999 // 2
    mapping = Path("/proc/self/smaps").read_text().partition(f"{tmp_path}/train.tokens\n")[2]
    held = {name: int(re.search(rf"^{name}: +(\d+) kB", mapping, re.M)[1]) for name in NAMES}
    assert held["Rss"] >= 4_000_000 // 1024
    assert held["Anonymous"] == 0  # no page is this process's own


def test_the_tokenizer_is_learned_from_a_bounded_sample(text_folder, tmp_path, monkeypatch):
    seen = []
    make_tokenizer = C.make_tokenizer
    monkeypatch.setattr(C, "SAMPLE", 50)
    monkeypatch.setattr(
        C, "make_tokenizer", lambda texts, size: make_tokenizer(seen.extend(texts) or seen, size)
    )
    prepare(text_folder, tmp_path / "cache")
    assert len(seen) == 2 * 40  # every third of 120 pairs
    assert len(set(seen)) == 2 * len(SENTENCES)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def shorten(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("val.de", Path.unlink, "val.de"),
        ("train.en.gz", Path.unlink, "train.en"),
        ("train.de.gz", shorten, "train.de.gz is broken"),
        ("train.de.gz", lambda path: path.write_bytes(b"404"), "train.de.gz is broken"),
        ("val.en", lambda path: path.write_bytes(b"a\n\xff\xfe\n"), "val.en, line 2: not UTF-8"),
        ("val.en", lambda path: path.write_text("a\nb", "utf-16"), "val.en, line 1: not UTF-8"),
        ("val.en", lambda path: path.write_bytes(b"a\rb\r"), "val.en: its lines end in carriage"),
        (
            "val.en",
            lambda path: path.with_name("val.en.gz").touch(),
            "val.en and val.en.gz are",
        ),
        ("val.en", lambda path: path.unlink() or os.mkfifo(path), "val.en is not a plain file"),
        ("val.en", lambda path: path.write_text(LFS), "val.en is only a pointer of Git LFS"),
        ("train.en.gz", lambda path: path.write_text(LFS), "train.en.gz is only a pointer of Git"),
        ("val.en", lambda path: path.write_text("one\n"), "val.de and val.en have 2 and 1 lines"),
    ],
    ids=range(12),
)
def test_broken_text_is_named(text_folder, tmp_path, name, spoil, message):
    spoil(text_folder / name)
    with pytest.raises(OSError, match=message) as caught:
        prepare(text_folder, tmp_path / "cache")
    assert str(text_folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("content", [None, b"", b"\n\n"])
def test_a_split_without_sentences_is_refused(text_folder, tmp_path, split, content):
    for path in text_folder.glob(f"{split}.*"):
        path.unlink()
        if content is not None:
            (text_folder / path.name.removesuffix(".gz")).write_bytes(content)
    with pytest.raises(OSError, match=re.escape(str(text_folder))):
        prepare(text_folder, tmp_path / "cache")


def test_a_test_without_sentences_is_named(text_folder):
    assert [*C.read_tests(text_folder, BOTH)] == ["test.more", "test2016"]
    for language in BOTH:
        (text_folder / f"test2016.{language}").write_text("\n \n\u200b\n", encoding="utf-8")
    with pytest.raises(OSError, match=r"needs sentences in test2016\.de and test2016\.en"):
        C.read_tests(text_folder, BOTH)
    for language in BOTH:
        (text_folder / f"test2016.{language}").write_bytes(b"a\rb\r")
    with pytest.raises(OSError, match=r"test2016\.de: its lines end in carriage returns"):
        C.read_tests(text_folder, BOTH)
    for path in text_folder.glob("test*"):
        path.unlink()
    with pytest.raises(OSError, match=r"needs sentences in test\*\.de and test\*\.en"):
        C.read_tests(text_folder, BOTH)


def test_pairs_are_read_until_one_side_ends_before_the_other(text_folder):
    assert [*C.read_pairs(text_folder, "val", BOTH)] == SENTENCES[:2]
    assert [*C.read_pairs(text_folder, "val", ("en", "de"))] == [(b, a) for a, b in SENTENCES[:2]]
    (text_folder / "val.de").write_text("one\n")
    with pytest.raises(OSError, match=r"val\.de and val\.en have different numbers of lines"):
        [*C.read_pairs(text_folder, "val", BOTH)]
