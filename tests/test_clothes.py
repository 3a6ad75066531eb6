import gzip
import importlib
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import idx
from inputs import clothes


def test_the_sample_is_stratified():
    for train, per_class in ((True, 1000), (False, 200)):
        images, labels = clothes.load(clothes.SAMPLE, train)
        assert images.shape == (10 * per_class, 28, 28)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert labels.bincount().tolist() == [per_class] * len(clothes.CLASSES)


def test_the_sample_is_at_most_8_megabytes():
    assert sum(file.stat().st_size for file in clothes.SAMPLE.iterdir()) <= 8e6


@pytest.mark.skipif(not clothes.DEBIAN.is_dir(), reason="the whole data set is not installed")
def test_the_sample_is_drawn_from_the_whole_set_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(clothes.SAMPLE)
    importlib.import_module("draw").draw(clothes.DEBIAN, tmp_path, "t10k", 200)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (clothes.SAMPLE / file.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_load_reads_gzipped_and_plain_files(folder, sample):
    images, labels = clothes.load(folder, train=False)
    assert torch.equal(images, sample[0][1200:1500])
    assert torch.equal(labels, sample[1][1200:1500])


def images_file(folder):
    return folder / "train-images-idx3-ubyte.gz"


def labels_file(folder):
    return folder / "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (images_file, b"", "is broken"),
        (labels_file, b"", "is broken"),
        (images_file, gzip.compress(idx(np.zeros((1200, 28, 28))), mtime=0)[:-9], "is broken"),
        (images_file, b"a page that says 404", "is broken"),
        (images_file, gzip.compress(b"a page that says 404", mtime=0), "got 20 bytes"),
        (labels_file, idx(np.zeros(1200))[:-1], "got 1207 bytes"),
        (labels_file, idx(np.zeros(1200)) + b"\0", "got 1209 bytes"),
        (labels_file, b"\0\0\x0d\x01" + idx(np.zeros(1200))[4:], "got 1208 bytes"),
        (labels_file, idx(np.zeros(0)), "expected an IDX file of shape .N., got 8 bytes"),
        (labels_file, idx(np.zeros((600, 2))), "expected an IDX file"),
        (labels_file, idx(np.zeros(1199)), "1200 images and 1199 labels"),
        (labels_file, idx(np.full(1200, 10)), "labels up to 10"),
        (
            images_file,
            gzip.compress(idx(np.zeros((1200, 32, 32))), mtime=0),
            r"expected an IDX file of shape \(N, 28, 28\)",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value)[:20],
)
def test_a_broken_file_is_named(folder, file, content, message):
    file(folder).write_bytes(content)
    with pytest.raises(OSError, match=message) as caught:
        clothes.load(folder, train=True)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("count", [10_000, 2**32 - 1])
def test_no_more_is_unpacked_than_the_header_announces(folder, monkeypatch, count):
    header = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">u4").tobytes()
    zeros = gzip.compress(bytes(50_000_000), mtime=0)
    images_file(folder).write_bytes(gzip.compress(header, mtime=0) + zeros * 20)
    monkeypatch.setattr(clothes, "MOST_IMAGES", 10_000)
    with pytest.raises(OSError, match="expected an IDX file") as caught:
        clothes.load(folder, train=True)
    assert int(re.search(r"got (\d+) bytes", str(caught.value))[1]) == 16 + 10_000 * 784 + 1


def test_a_missing_file_is_named(folder):
    labels_file(folder).unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        clothes.load(folder, train=True)


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    def no_network(folder):
        raise OSError("no network")

    monkeypatch.setattr(clothes, "RAW", tmp_path / "raw")
    monkeypatch.setattr(clothes, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(clothes, "download", no_network)


def test_the_sample_is_taken_when_there_is_nothing_else(nothing_installed):
    folder, train, test, problems = clothes.find_data()
    assert (folder, len(train[0]), len(test[0])) == (clothes.SAMPLE, 10_000, 2_000)
    assert problems == ["no network"]


def test_a_broken_copy_is_passed_over(nothing_installed, folder, monkeypatch):
    clothes.RAW.mkdir()
    for file in folder.iterdir():
        (clothes.RAW / file.name).write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(clothes, "DEBIAN", folder)
    found, train, _, problems = clothes.find_data()
    assert (found, len(train[0])) == (folder, 1200)
    assert len(problems) == 1
    assert str(clothes.RAW) in problems[0]


def fake_torchvision(tmp_path, monkeypatch, body):
    (tmp_path / "torchvision.py").write_text(
        "import pathlib, sys, time\n"
        "class datasets:\n"
        "    def FashionMNIST(root, download):\n"
        f"        {body}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_download_lands_in_its_folder(tmp_path, monkeypatch):
    fake_torchvision(
        tmp_path,
        monkeypatch,
        "raw = pathlib.Path(root, 'FashionMNIST/raw'); raw.mkdir(parents=True); "
        "(raw / 'file').write_text('all')",
    )
    clothes.download(tmp_path / "data/FashionMNIST/raw")
    assert (tmp_path / "data/FashionMNIST/raw/file").read_text() == "all"


def test_a_download_that_hangs_is_given_up(tmp_path, monkeypatch):
    fake_torchvision(tmp_path, monkeypatch, "time.sleep(60)")
    with pytest.raises(TimeoutError, match="not done after 1 s"):
        clothes.download(tmp_path / "data/FashionMNIST/raw", seconds=1)


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    fake_torchvision(tmp_path, monkeypatch, "raise RuntimeError('the server is gone')")
    with pytest.raises(OSError, match=r"download: .*the server is gone"):
        clothes.download(tmp_path / "data/FashionMNIST/raw")


GOOD = idx(np.arange(5 * 28 * 28).reshape(5, 28, 28) % 256)
edits = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=3)


@settings(deadline=None, max_examples=100)
@given(
    edits=st.one_of(edits, st.lists(st.tuples(st.integers(0, 15), st.integers(0, 255)))),
    start=st.integers(0, 20), stop=st.integers(0, len(GOOD)), tail=st.binary(max_size=800),
    whole=st.booleans(), zipped=st.booleans(), cut=st.integers(0, 40),
)  # fmt: skip
def test_a_file_is_read_right_or_refused(edits, start, stop, tail, whole, zipped, cut):
    content = bytearray(GOOD)
    for position, byte in edits:
        content[position] = byte
    if not whole:
        content = content[start:stop] + tail
    packed = gzip.compress(content, mtime=0)
    packed = packed[: len(packed) - cut] if cut < 20 else packed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images")
        Path(folder, "images.gz" if zipped else "images").write_bytes(packed if zipped else content)
        try:
            images = clothes.read_idx(path, 28, 28)
        except OSError as error:
            assert str(path) in str(error)
            assert len(str(error).splitlines()) == 1
            assert content[:16] != GOOD[:16] or len(content) != len(GOOD) or 0 < cut < 20
        else:
            assert content[:4] == GOOD[:4]
            assert int.from_bytes(content[4:8]) == len(images)
            assert images.numpy().tobytes() == content[16:]
