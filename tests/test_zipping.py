"""Files zipped with a language model: any bytes come back, and the size is what --bits says."""

import copy
import os
import re
import shutil
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import decoding.zipping as Z
import gpt as G
from decoding.coder import TOTAL
from inputs.documents import MARK_ID, learn_tokenizer
from inputs.text import open_tokenizer
from make_models import MODELS, TEXT, draw_weights

V = 300  # at least as many as any tokenizer has
SIZES = G.Sizes(V, 16, 2, 4, 2, 4, 24, 16, tied=False)
MIXED = TEXT.encode() + b"\xff\0\r\n" + "für 日本 🎉".encode() + b"\xe6\x97\x80\n" * 3


def lacking_bytes():
    """Make a tokenizer that drops ü, and all else that is not in TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return open_tokenizer(tokenizer.to_str())


def composing():
    """Make a tokenizer that composes accents, and so gives back other bytes."""
    tokenizer = learn_tokenizer([TEXT], V)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


TOKENIZERS = {
    "whole": learn_tokenizer([TEXT], V),
    "lacking bytes": lacking_bytes(),
    "composing": composing(),
}
PIECES = st.one_of(
    st.binary(max_size=8),
    st.text(max_size=8).map(str.encode),
    st.sampled_from(["def add", "e\u0301", "für", "<s>", "\ufffd", "\r\n\0"]).map(str.encode),
)


@pytest.fixture(scope="module")
def model():
    return draw_weights(G.GPT(SIZES))


def zip_bytes(model, content, tokenizer=TOKENIZERS["whole"], announce=lambda _: None):
    return Z.zip_bytes(model, tokenizer, MARK_ID, content, announce)


def unzip_bytes(model, content, tokenizer=TOKENIZERS["whole"], announce=lambda _: None):
    return Z.unzip_bytes(model, tokenizer, MARK_ID, content, announce)


# Items


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(pieces=st.lists(PIECES, max_size=8))
def test_any_bytes_come_back_from_their_items(tokenizer, pieces):
    content = b"".join(pieces)
    items = Z.to_items(tokenizer, V, content)
    assert Z.to_bytes(tokenizer, V, items) == content


def test_only_what_no_tokens_give_back_is_a_byte():
    whole, lacking, composes = TOKENIZERS.values()
    assert Z.to_items(whole, V, TEXT.encode()) == whole.encode(TEXT).ids
    wrong = b"\xff\xed\xa0\x80"  # a surrogate is no character of UTF-8
    a, b = whole.encode("def ü").ids, whole.encode("日").ids
    expected = [*a, *(V + byte for byte in wrong), *b]
    assert Z.to_items(whole, V, "def ü".encode() + wrong + "日".encode()) == expected

    assert lacking.encode("clüass").ids == lacking.encode("class").ids  # dropped in silence
    expected = [*lacking.encode("cl").ids, V + 0xC3, V + 0xBC, *lacking.encode("ass").ids]
    assert Z.to_items(lacking, V, "clüass".encode()) == expected

    text = TEXT + "e\u0301" + TEXT
    assert composes.decode(composes.encode(text).ids) != text
    items = Z.to_items(composes, V, text.encode())
    assert max(items) < V
    assert len(items) < len(composes.encode(text).ids) + 20


def test_where_pieces_do_not_fit_together_all_are_bytes():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    content = b"a b a"  # decoded with a space between all tokens
    assert Z.to_items(tokenizer, V, content) == [0, *(V + byte for byte in b" b "), 0]
    assert Z.to_items(tokenizer, V, b"aa") == [V + ord("a")] * 2


# Predictions


def test_frequencies_are_those_of_windows_that_do_not_overlap(model):
    torch.manual_seed(1)
    tokens = torch.randint(V, (40,)).tolist()
    ids = torch.tensor([MARK_ID, *tokens])
    uncached = copy.deepcopy(model)
    with closing(Z.predictions(model, MARK_ID)) as predicted:
        for t, token in enumerate([None, *tokens]):
            frequencies = np.diff(predicted.send(token))
            begin = t // SIZES.context * SIZES.context
            logits = uncached(ids[None, begin : t + 1])[0, -1].detach()
            expected = logits.softmax(dim=-1) * TOTAL
            np.testing.assert_allclose(frequencies[:-1], expected, rtol=1e-4, atol=2)


def test_the_network_takes_no_step_in_vain(model, monkeypatch):
    asked = []
    predict = Z.predict

    def count(model, tokens, cache):
        asked.append(tokens)
        return predict(model, tokens, cache)

    monkeypatch.setattr(Z, "predict", count)
    symbols = [7, V, 3, V, 255, 9, V, 0]
    left = iter(symbols)
    items = Z.code_items(model, MARK_ID, 5, lambda _: next(left))
    assert items == [7, V + 3, V + 255, 9, V]
    assert Z.to_symbols(items, V) == symbols
    assert asked == [[MARK_ID], [7], [9]]
    assert Z.code_items(model, MARK_ID, 0, lambda _: 0) == []
    asked.clear()
    Z.code_items(model, MARK_ID, 3, lambda _: 5)
    assert asked == [[MARK_ID], [5], [5]]


# Files


CONTENTS = {
    "nothing": b"",
    "NUL": b"\0",
    "no UTF-8": b"\xff",
    "mixed": MIXED,
    "Japanese": "日本語\r\n".encode() * 9,
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_file_comes_back(model, tokenizer, content):
    announced = []
    zipped = zip_bytes(model, content, tokenizer, announced.append)
    assert unzip_bytes(model, zipped, tokenizer, announced.append) == content
    assert len(announced) == 2
    assert all((seconds > 0) == bool(content) for seconds in announced)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("folder", ["llama", "llama-tied"])
def test_the_size_is_the_number_of_bits_that_is_measured(folder):
    model, published = G.open_model(MODELS / folder)
    tokenizer = published.tokenizer
    content = (TEXT * 6).encode()
    zipped = zip_bytes(model, content, tokenizer)
    _, coded = Z.unpack(zipped)
    ids = tokenizer.encode(content.decode()).ids
    assert len(ids) > 2 * model.sizes.context
    bits = G.measure_bits(model, [torch.tensor([MARK_ID, *ids])]).sum().item()
    assert abs(len(coded) - bits / 8) < 0.001 * bits / 8 + 2
    assert len(zipped) - len(coded) < 64
    assert unzip_bytes(model, zipped, tokenizer) == content


def test_every_flipped_bit_and_every_cut_is_refused(model):
    zipped = zip_bytes(model, MIXED[:20])

    def asked(_):
        raise AssertionError("it is noticed before anything is decoded")

    for place in range(8 * len(zipped)):
        broken = bytearray(zipped)
        broken[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"broken|version|not zipped by this script"):
            unzip_bytes(model, bytes(broken), announce=asked)
    for size in range(len(zipped)):
        with pytest.raises(ValueError, match=r"broken|not zipped by this script"):
            unzip_bytes(model, zipped[:size], announce=asked)
    with pytest.raises(ValueError, match="not zipped by this script"):
        unzip_bytes(model, b"PK\3\4" + zipped)


def test_other_networks_and_conditions_are_refused(model, monkeypatch):
    zipped = zip_bytes(model, b"def")
    other = draw_weights(G.GPT(SIZES))
    with torch.no_grad():
        other.norm.weight[3] += 1e-6
    for changed, tokenizer, mark_id in (
        (other, TOKENIZERS["whole"], MARK_ID),
        (draw_weights(G.GPT(replace(SIZES, theta=9999.0))), TOKENIZERS["whole"], MARK_ID),
        (model, TOKENIZERS["composing"], MARK_ID),
        (model, TOKENIZERS["whole"], 1),
    ):
        with pytest.raises(ValueError, match="zipped with another network"):
            Z.unzip_bytes(changed, tokenizer, mark_id, zipped, print)
    now = Z.read_conditions(model)
    assert now == [torch.__version__, tokenizers.__version__, "cpu", "1"]
    for place, name in enumerate(("torch", "tokenizers", "--device", "OMP_NUM_THREADS")):
        elsewhere = [*now[:place], "other", *now[place + 1 :]]
        monkeypatch.setattr(Z, "read_conditions", lambda _, found=elsewhere: found)
        with pytest.raises(ValueError, match=re.escape(f"it needs {name} {now[place]}, not other")):
            unzip_bytes(model, zipped)


def test_a_machine_that_rounds_otherwise_is_noticed(model, monkeypatch):
    zipped = zip_bytes(model, TEXT.encode())
    header, coded = Z.unpack(zipped)
    for changed in (header._replace(checksum=1), header._replace(length=1)):
        with pytest.raises(ValueError, match="this machine computes something else"):
            unzip_bytes(model, Z.pack(changed, coded))
    frequencies = Z.token_frequencies
    monkeypatch.setattr(Z, "token_frequencies", lambda logits: frequencies(logits * 1.001))
    with pytest.raises(ValueError, match="this machine computes something else"):
        unzip_bytes(model, zipped)


# As a person runs it


def test_a_person_zips_and_unzips(run_script, tmp_path, monkeypatch):
    def run(*arguments):
        return run_script("gpt.py", "--out", MODELS / "llama", "--device", "cpu", *arguments)

    path, zipped = tmp_path / "a file.tar", tmp_path / "a file.tar.z"
    path.write_bytes(MIXED)
    done = run("--zip", path)
    assert done.returncode == 0, done.stderr
    assert "this takes" in done.stderr
    sizes = [line.split()[0] for line in done.stdout.splitlines()]
    assert sizes[:2] == [str(len(MIXED)), str(zipped.stat().st_size)]
    assert [line.split("  ")[-1] for line in done.stdout.splitlines()[2:]] == ["bz2 -9", "xz -9e"]
    content = zipped.read_bytes()

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.z").write_bytes(content)
    shutil.copy(path, tmp_path / "foreign.z")
    (tmp_path / "broken.z").write_bytes(content[:-1])
    for arguments, message in (
        (["--zip", path], f"{zipped} is there already; --force replaces it"),
        (["--unzip", zipped], f"{path} is there already; --force replaces it"),
        (["--unzip", path], f"{path} is no zipped file: its name must end in .z"),
        (["--unzip", "..z"], "..z is no zipped file: its name must end in .z"),
        (["--zip", "."], ". is not a plain file"),
        (["--zip", tmp_path / "missing"], "No such file"),
        (["--zip", tmp_path], f"{tmp_path} is not a plain file"),
        (["--zip", tmp_path / "fifo"], "fifo is not a plain file"),
        (["--unzip", tmp_path / "foreign.z"], "foreign.z: it was not zipped by this script"),
        (["--unzip", tmp_path / "folder.z", "--force"], "folder is a folder"),
        (["--unzip", tmp_path / "broken.z"], "broken.z: it is broken: its checksum is wrong"),
    ):
        files = sorted(tmp_path.iterdir())
        refused = run(*arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.count("\n") == 1
        assert message in refused.stderr
        assert sorted(tmp_path.iterdir()) == files
        assert zipped.read_bytes() == content

    path.unlink()
    assert run("--unzip", zipped).returncode == 0
    assert path.read_bytes() == MIXED
    path.write_bytes(b"other")
    assert run("--unzip", zipped, "--force").returncode == 0
    assert path.read_bytes() == MIXED

    zipped.unlink()
    files = sorted(tmp_path.iterdir())
    monkeypatch.setattr(Z, "code_items", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("--zip", path).returncode == 130
    assert sorted(tmp_path.iterdir()) == files
