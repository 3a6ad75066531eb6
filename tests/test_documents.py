"""Documents: split by name, restored by the tokenizer, visited by windows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inputs import documents as D

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Sum:\n    total = 100\n" * 3


@pytest.fixture(scope="module")
def tokenizer():
    return D.learn_tokenizer([TEXT], 300)


def test_a_document_stays_on_its_side_whatever_else_there_is():
    names = [f"a folder/ü{n}.py" for n in range(4000)]
    share = sum(map(D.is_held_out, names)) / len(names)
    assert share == pytest.approx(1 / 16, rel=0.2)
    held_out = [n for n in range(50) if D.is_held_out(names[n])]
    assert held_out == [4, 5, 26, 37, 43, 47]  # on any machine, in any version


def test_files_are_read_byte_for_byte_in_the_order_of_their_names(tmp_path):
    contents = {}
    for n in range(60):
        name = f"{'' if n % 3 else 'folder/'}file{n:02}.py"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        contents[name] = f"# {n} ü\r\n"
        (tmp_path / name).write_bytes(contents[name].encode())
    for name in ("test/a.py", "folder/tests/b.py", "site-packages/c/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("excluded")
    (tmp_path / "other.txt").write_text("another kind")
    (tmp_path / "latin.py").write_bytes(b"\xfc")
    (tmp_path / "folder.py").mkdir()
    found = D.read_documents(tmp_path)
    held_out = [text for name, text in sorted(contents.items()) if D.is_held_out(name)]
    training = [text for name, text in sorted(contents.items()) if not D.is_held_out(name)]
    assert found == D.Documents(training, held_out)


def test_the_standard_library_is_there():
    names = [path.name for path in D.standard_library().glob("*.py")]
    assert {"bisect.py", "this.py", "typing.py"} <= {*names}


def test_data_without_documents_is_refused(tmp_path):
    with pytest.raises(OSError, match="has no text in"):
        D.read_documents(tmp_path)
    (tmp_path / "one.py").write_text("x = 1")
    assert not D.is_held_out("one.py")
    with pytest.raises(OSError, match="has too few"):
        D.read_documents(tmp_path)


@given(st.text())
def test_decoding_restores_any_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert D.MARK_ID not in ids


def test_a_line_break_and_its_indentation_are_one_token_at_most(tokenizer):
    tokens = tokenizer.encode("\n    return 100 + a").tokens
    assert tokens[:2] == ["ĊĠĠĠĠ", "return"]
    assert [token.strip("Ġ") for token in tokens[2:5]] == ["1", "0", "0"]


def test_each_document_follows_a_mark(tokenizer):
    documents = D.encode_documents(tokenizer, [TEXT, "", D.MARK])
    assert [ids[0].item() for ids in documents] == [D.MARK_ID] * 3
    assert [tokenizer.decode(ids[1:].tolist()) for ids in documents] == [TEXT, "", D.MARK]


@given(st.integers(1, 20), st.integers(0, 200), st.integers(1, 300), st.integers(0, 5))
def test_windows_visit_all_of_the_text_in_each_pass(width, more, count, seed):
    length = width + more
    starts = D.draw_windows(length, width, count, seed)
    assert len(starts) == count
    assert starts.min() >= 0
    assert starts.max() + width <= length
    longer = D.draw_windows(length, width, count + 100, seed)
    assert torch.equal(longer[:count], starts)
    first = starts[: max(1, min(count, more // width))].sort().values
    assert (first.diff() >= width).all()  # none overlap


def test_windows_are_shuffled_and_cut_elsewhere_in_the_next_pass():
    starts = D.draw_windows(1000, 10, 198, seed=0).view(2, 99)
    for row in starts:
        assert row.tolist() != row.sort().values.tolist()
        assert (row.sort().values.diff() == 10).all()
    assert starts[0].min() != starts[1].min()
    assert not torch.equal(D.draw_windows(1000, 10, 99, seed=1), starts[0])


def plain_shared_run(sample, text):
    runs = [
        end - start
        for start in range(len(sample))
        for end in range(start + D.GRAM, len(sample) + 1)
        if sample[start:end] in text
    ]
    return max(runs, default=0)


@given(st.lists(st.text("ab", max_size=30), max_size=3), st.text("ab", max_size=60))
def test_the_longest_shared_run_is_found(samples, text):
    expected = [plain_shared_run(sample, text) for sample in samples]
    assert D.longest_shared_runs(samples, text) == expected
