"""Documents: found, split by name, encoded once, visited by windows."""

import errno
import gzip
import json
import os
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inputs import documents as D

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Sum:\n    total = 100\n" * 3
BROKEN = gzip.compress(b"x = 1\n" * 1000)[:-9]


@pytest.fixture(scope="module")
def tokenizer():
    return D.learn_tokenizer([TEXT], 300)


def test_a_document_stays_on_its_side_whatever_else_there_is():
    names = [f"a folder/ü{n}.py" for n in range(4000)]
    share = sum(map(D.is_held_out, names)) / len(names)
    assert share == pytest.approx(1 / 16, rel=0.2)
    held_out = [n for n in range(50) if D.is_held_out(names[n])]
    assert held_out == [4, 5, 26, 37, 43, 47]  # on any machine, in any version


def save(folder, contents):
    """Write files, whose names may have folders."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def read(path, *globs, excluded=()):
    """Return the texts for training, those held out, and what is left out."""
    listing = D.list_files(D.Text(path, globs or ("*.py",), frozenset(excluded)))
    left_out = listing.left_out.copy()
    documents = list(D.read_documents(listing, left_out))
    training, held_out = ([text for side, text in documents if side == want] for want in (0, 1))
    return training, held_out, {what: count for what, count in left_out.items() if count}


def test_files_are_read_byte_for_byte_in_the_order_of_their_names(tmp_path):
    contents = {f"{'' if n % 3 else 'folder/'}file{n:02}.py": f"# {n} ü\r\n" for n in range(60)}
    contents["folder/empty.py"] = ""
    save(tmp_path, contents)
    save(tmp_path, {"test/a.py": "", "folder/tests/b.py": "", "other.txt": "another kind"})
    (tmp_path / "folder.py").mkdir()
    training, held_out, left_out = read(tmp_path, excluded=("test", "tests"))
    assert held_out == [text for name, text in sorted(contents.items()) if D.is_held_out(name)]
    assert training == [text for name, text in sorted(contents.items()) if not D.is_held_out(name)]
    assert left_out == {}


def test_what_is_hidden_broken_or_no_text_is_left_out_and_counted(tmp_path):
    save(tmp_path, {
        ".git/a.py": "hidden", "b/.venv/c/d.py": "hidden", "latin.py": b"\xfc", "nul.py": b"a\0b",
        "late.py": b"x" * 3 * D.PART + b"\xff", "good.py": "good",
    })  # fmt: skip
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "nowhere.py").symlink_to("missing")
    training, held_out, left_out = read(tmp_path)
    assert training + held_out == ["good"]
    assert left_out == {
        "hidden folders": 2, "files that are not text in UTF-8": 3, "files that can't be read": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("globs", "found"),
    [
        (("*.md",), ["a.md", "b/c.md"]),
        (("*.md", "*.txt"), ["a.md", "b/c.md", "b/d.txt"]),
        (("b/*",), ["b/c.md", "b/d.txt", "b/e.py"]),
        (("?.py",), ["b/e.py"]),
    ],
)
def test_globs_choose_names_or_paths(tmp_path, globs, found):
    save(tmp_path, {name: name for name in ("a.md", "b/c.md", "b/d.txt", "b/e.py")})
    assert D.list_files(D.Text(tmp_path, globs)).names == found


def test_files_may_be_gzipped_and_broken_ones_are_left_out(tmp_path):
    good = "x = 1\n" * 1000
    save(tmp_path, {
        "good.txt.gz": gzip.compress(good.encode()), "cut.txt.gz": BROKEN, "no.txt.gz": b"404",
        "behind.txt.gz": gzip.compress(b"good") + b"garbage",
        "large.txt.gz": gzip.compress(b"x\n" * D.PART)[:-9],
    })  # fmt: skip
    training, held_out, left_out = read(tmp_path, "*.txt.gz")
    assert training + held_out == [good]
    assert left_out == {"files that can't be read": 4}


def line(text):
    return json.dumps({"text": text, "other": 1}) + "\n"


@pytest.mark.parametrize("zipped", [False, True])
def test_lines_of_json_are_split_by_their_text(tmp_path, zipped):
    texts = [f"line {n}\nü\r\n" for n in range(60)] + ["", "x" * D.PART + "yz"]
    content = "".join(map(line, texts))
    content += '\n{"text": 1}\n{"no": "text"}\n[1]\n{"text": "\\ud800"}\nbroken\n' + "[" * 10**5
    name = "some.jsonl.gz" if zipped else "some.jsonl"
    save(tmp_path, {name: gzip.compress(content.encode()) if zipped else content})
    training, held_out, left_out = read(tmp_path / name)
    cut = [*texts[:-1], "x" * D.PART, "yz"]
    assert D.is_held_out(texts[-1])  # as one text
    assert held_out == [text for text in cut[:-2] if D.is_held_out(text)] + cut[-2:]
    assert training == [text for text in cut[:-2] if not D.is_held_out(text)]
    assert left_out == {"lines without a text": 6}
    assert read(tmp_path, "*.jsonl*") == (training, held_out, left_out)


def test_a_line_of_json_that_is_too_long_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "LINE", 100)
    save(tmp_path, {"some.jsonl": line("a") + line("b" * 300) + line("c") + line("d" * 71)})
    training, held_out, left_out = read(tmp_path / "some.jsonl")
    assert sorted(training + held_out) == ["a", "c", "d" * 71]
    assert left_out == {"lines without a text": 1}


@settings(deadline=None)
@given(st.text("ab\n", max_size=60))
def test_a_long_text_is_cut_after_line_breaks(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(D, "PART", 8)
        parts = list(D.read_parts(D.io.StringIO(text, newline="")))
    assert "".join(parts) == text
    assert all(len(part) <= 8 for part in parts)
    assert all(part.endswith("\n") for part in parts[:-1] if "\n" in part)


@pytest.mark.parametrize("part", [100, 1 << 20])
def test_the_last_of_a_file_that_stands_alone_is_held_out(tmp_path, monkeypatch, part):
    monkeypatch.setattr(D, "PART", part)
    content = "".join(f"line {n}\n" for n in range(1000))
    save(tmp_path, {"some.txt": content, "latin.txt": b"\xfc", "cut.txt.gz": BROKEN})
    training, held_out, _ = read(tmp_path / "some.txt")
    assert "".join(training + held_out) == content
    assert 0 <= len(content) / 16 - len("".join(held_out)) < 10
    assert training[-1].endswith("\n")
    with pytest.raises(OSError, match=r"latin\.txt is not text in UTF-8"):
        read(tmp_path / "latin.txt")
    with pytest.raises(OSError, match=r"cut\.txt\.gz is broken"):
        read(tmp_path / "cut.txt.gz")
    with pytest.raises(OSError, match="missing"):
        read(tmp_path / "missing.txt")


def test_the_standard_library_is_there():
    names = D.list_files(D.standard_library()).names
    assert {"bisect.py", "this.py", "typing.py", "json/decoder.py"} <= {*names}
    assert not any(name.startswith(("test/", "encodings/")) for name in names)


def test_the_tokenizer_is_learned_from_a_bounded_share(monkeypatch):
    texts = [f"{n:03}" for n in range(64)]
    assert D.sample_texts(texts) == texts[::4]
    endless = ["a" * 5000, " " * 1000 + "b", "+" * 999]
    assert D.sample_texts(text for each in endless for text in [each] * 4) == ["", "b", "+" * 999]
    monkeypatch.setattr(D, "LEARNED", 12)
    assert D.sample_texts(texts) == texts[::16]


@settings(deadline=None)
@given(st.text())
def test_decoding_restores_any_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert D.MARK_ID not in ids


def test_a_line_break_and_its_indentation_are_one_token_at_most(tokenizer):
    tokens = tokenizer.encode("\n    return 100 + a").tokens
    assert tokens[:2] == ["ĊĠĠĠĠ", "return"]
    assert [token.strip("Ġ") for token in tokens[2:5]] == ["1", "0", "0"]


# Encoded


@pytest.fixture
def folder(tmp_path):
    """A folder of small files."""
    save(tmp_path / "data", {f"{n}.py": f"x{n} = 'für {n}'\n{TEXT}" for n in range(40)})
    return tmp_path / "data"


def prepare(folder, *globs, vocab_size=300, **options):
    text = D.Text(folder, globs or ("*.py",))
    return D.prepare_documents(text, vocab_size, folder.parent / "cache", **options)


def test_a_text_is_encoded_with_a_mark_before_each_document(folder, monkeypatch):
    monkeypatch.setattr(D, "JOB", 500)
    training, held_out, _ = read(folder)
    corpus, tokenizer = D.open_corpus(prepare(folder))
    assert tokenizer.to_str() == D.learn_tokenizer(training[::4], 300).to_str()
    expected = [token for text in training for token in [D.MARK_ID, *tokenizer.encode(text).ids]]
    assert corpus.tokens.tolist() == expected
    assert corpus.tokens.dtype == torch.uint16
    decoded = [tokenizer.decode(ids[1:].tolist()) for ids in corpus.held_out]
    assert (decoded, {int(ids[0]) for ids in corpus.held_out}) == (held_out, {D.MARK_ID})
    assert corpus.held_out_bytes == len("".join(held_out).encode())
    assert corpus.training_bytes == len("".join(training).encode())
    assert D.training_text(corpus, tokenizer) == "".join(training)
    monkeypatch.setattr(D, "GIVEN", 500)
    assert D.training_text(corpus, tokenizer) == "".join(training)[:500]


def test_several_processes_make_the_same_files(folder, monkeypatch):
    first, _ = D.open_corpus(prepare(folder))
    monkeypatch.setattr(D, "ALONE", 0)
    monkeypatch.setattr(D, "JOB", 500)
    monkeypatch.setattr(D, "cores", lambda: 2)
    second, _ = D.open_corpus(prepare(folder, "[0-9]*.py"))
    assert torch.equal(first.tokens, second.tokens)
    assert first.digest == second.digest


def test_a_tokenizer_that_is_given_is_used_with_its_mark(folder):
    other = D.learn_tokenizer(["für " * 9], 280)
    corpus, tokenizer = D.open_corpus(prepare(folder, tokenizer=other, mark=5))
    training, _, _ = read(folder)
    assert tokenizer.to_str() == other.to_str()
    assert corpus.tokens[:9].tolist() == [5, *other.encode(training[0]).ids][:9]
    assert D.training_text(corpus, tokenizer) == "".join(training)


def test_what_matters_for_the_tokens_is_encoded_anew(folder):
    found = prepare(folder)
    before = (found / "train.tokens").stat().st_mtime_ns
    assert prepare(folder) == found
    assert (found / "train.tokens").stat().st_mtime_ns == before
    other = D.learn_tokenizer([TEXT], 280)
    others = [
        prepare(folder, vocab_size=290),
        prepare(folder, "*.p*"),
        prepare(folder, tokenizer=other),
    ]
    others.append(prepare(folder, tokenizer=other, mark=3))
    path = folder / "3.py"
    state = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    others.append(prepare(folder))
    path.write_bytes(path.read_bytes() + b"#")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    others.append(prepare(folder))
    path.rename(folder / "3a.py")
    others.append(prepare(folder))
    assert len({found, *others}) == 8
    same, changed = D.open_corpus(others[4])[0], D.open_corpus(others[5])[0]
    assert same.digest == D.open_corpus(found)[0].digest  # a new time alone changes no token
    assert changed.digest != same.digest


@pytest.mark.parametrize("name", ["train.tokens", "held-out.ends", "tokenizer.json", "about.json"])
def test_an_encoding_that_has_changed_is_refused(folder, name):
    found = prepare(folder)
    (found / name).write_bytes((found / name).read_bytes()[:-1])
    with pytest.raises(OSError, match="is broken; delete it to make it again"):
        prepare(folder)
    with pytest.raises(OSError, match="is broken; delete it to make it again"):
        D.open_corpus(found)


def test_a_full_disk_is_told_of_and_nothing_stays(folder, monkeypatch):
    def fill(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(D, "encode_documents", fill)
    with pytest.raises(OSError, match=r"no space left for .*cache/.*: free some"):
        prepare(folder)
    assert list((folder.parent / "cache").iterdir()) == []


def test_an_encoding_that_was_cut_short_is_made_again(folder, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(D, "encode_documents", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder)
    monkeypatch.undo()
    found = prepare(folder)
    assert list((folder.parent / "cache").iterdir()) == [found]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, r"data \(\*\.py\) has no text to train on$"),
        ({"a.py": b"\xff", "b.py": ""}, "no text to train on; left out: 1 files that are not text"),
        ({"one.py": "x = 1"}, "has too few documents"),
    ],
)
def test_a_folder_without_documents_is_refused(tmp_path, contents, message):
    (tmp_path / "data").mkdir()
    save(tmp_path / "data", contents)
    with pytest.raises(OSError, match=message):
        prepare(tmp_path / "data")
    assert list((tmp_path / "cache").iterdir()) == []


def test_of_much_that_is_held_out_some_is_measured(monkeypatch):
    tokens = np.arange(100, dtype=np.uint16)
    ends = np.stack([np.arange(1, 51) * 2, np.arange(1, 51) * 10], axis=1)
    chosen, size = D.choose_held_out(tokens, ends)
    assert (torch.cat(chosen).tolist(), size) == (list(range(100)), 500)
    monkeypatch.setattr(D, "MEASURED", 100)
    chosen, size = D.choose_held_out(tokens, ends)
    assert [each.tolist() for each in chosen] == [[2 * n, 2 * n + 1] for n in range(0, 50, 6)]
    assert size == 90


# Windows


def drawn(length, width, count, seed):
    """Draw all windows at once, as is simplest."""
    passes = []
    while sum(map(len, passes)) < count:
        random = torch.Generator().manual_seed(Random(f"{seed} {len(passes)}").getrandbits(63))
        first = int(torch.randint(min(width, length - width + 1), (), generator=random))
        starts = torch.arange(first, length - width + 1, width)
        passes.append(starts[torch.randperm(len(starts), generator=random)])
    return torch.cat(passes)[:count]


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 200), st.integers(1, 300), st.integers(0, 5))
def test_few_windows_come_in_the_order_of_a_permutation(width, more, count, seed):
    windows = D.Windows(width + more, width, seed)
    found = windows.draw(0, count)
    assert torch.equal(found, drawn(width + more, width, count, seed))
    middle = count // 2
    assert torch.equal(windows.draw(middle, count - middle), found[middle:])  # as resumed


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 200), st.integers(0, 5))
def test_many_windows_are_visited_once_in_each_pass(width, more, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(D, "SHUFFLED", 0)
        length = width + more
        expected = D.Windows(length, width, seed)
        number = 0
        for _ in range(3):
            assert expected.order is None
            found = sorted(expected.draw(number, expected.count).tolist())
            assert found == list(range(expected.offset, length - width + 1, width))
            number += expected.count
            expected.start(number)


def test_windows_are_shuffled_and_cut_elsewhere_in_the_next_pass(monkeypatch):
    for most in (1000, 0):
        monkeypatch.setattr(D, "SHUFFLED", most)
        starts = D.Windows(10_000, 10, seed=0).draw(0, 2 * 999).view(2, 999)
        for row in starts.float():
            place = torch.arange(999.0)
            assert torch.corrcoef(torch.stack([row, place]))[0, 1].abs() < 0.1
            assert torch.corrcoef(torch.stack([row[1:], row[:-1]]))[0, 1].abs() < 0.1
        assert starts[0].min() != starts[1].min()
        assert not torch.equal(D.Windows(10_000, 10, seed=1).draw(0, 999), starts[0])


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(0, 99))
def test_shuffling_is_a_permutation(count, seed):
    assert sorted(D.shuffle(n, count, str(seed)) for n in range(count)) == list(range(count))


def plain_shared_run(sample, text):
    runs = [
        end - start
        for start in range(len(sample))
        for end in range(start + D.GRAM, len(sample) + 1)
        if sample[start:end] in text
    ]
    return max(runs, default=0)


@settings(deadline=None)
@given(st.lists(st.text("ab", max_size=30), max_size=3), st.text("ab", max_size=60))
def test_the_longest_shared_run_is_found(samples, text):
    expected = [plain_shared_run(sample, text) for sample in samples]
    assert D.longest_shared_runs(samples, text) == expected
