"""Data, network, training and photos of chapter 2."""

import gzip
import importlib
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import nn
from torch.optim.lr_scheduler import ConstantLR

from conftest import idx
from inputs.photo import open_photo, prepare

fashion = importlib.import_module("fashion-mnist")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def train_epoch(model, images, labels, optimizer, batch_size=500):
    """Train for an epoch at the optimizer's own learning rate."""
    schedule = ConstantLR(optimizer, 1.0)
    return fashion.train_epoch(model, (images, labels), optimizer, schedule, batch_size)


# Data


def test_the_sample_is_stratified_and_small():
    for name, per_class in (("train", 1000), ("t10k", 200)):
        images, labels = fashion.load(fashion.SAMPLE, name)
        assert images.shape == (10 * per_class, 28, 28)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert labels.bincount().tolist() == [per_class] * len(fashion.CLASSES)
    assert sum(file.stat().st_size for file in fashion.SAMPLE.iterdir()) <= 8e6


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the whole data set is not installed")
def test_the_sample_is_drawn_from_the_whole_set_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fashion.SAMPLE)
    importlib.import_module("draw").draw(DEBIAN, tmp_path, "t10k", 200)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (fashion.SAMPLE / file.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_load_reads_gzipped_and_plain_files(folder, sample):
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"cut")  # beside the plain one
    images, labels = fashion.load(folder, "t10k")
    assert torch.equal(images, sample[0][1200:1500])
    assert torch.equal(labels, sample[1][1200:1500])


IMAGES = "train-images-idx3-ubyte.gz"
LABELS = "train-labels-idx1-ubyte"
ZEROS = gzip.compress(idx(np.zeros((1200, 28, 28))), mtime=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (IMAGES, b""),
        (LABELS, b""),
        (IMAGES, ZEROS[:-9]),
        (IMAGES, b"a page that says 404"),
        (IMAGES, gzip.compress(b"a page that says 404", mtime=0)),
        (IMAGES, gzip.compress(idx(np.zeros((1200, 32, 32))), mtime=0)),
        (LABELS, idx(np.zeros(1200))[:-1]),
        (LABELS, idx(np.zeros(1200)) + b"\0"),
        (LABELS, idx(np.zeros(0))),
        (LABELS, idx(np.zeros((600, 2)))),
        (LABELS, idx(np.zeros(1199))),
        (LABELS, idx(np.full(1200, 10))),
    ],
    ids=range(12),
)
def test_a_broken_file_is_named_in_one_line(folder, tmp_path, capsys, name, content):
    (folder / name).write_bytes(content)
    assert fashion.main(["--data", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert re.fullmatch(rf".*{re.escape(str(folder))}.* is broken: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", [IMAGES, LABELS])
@pytest.mark.parametrize("pipe", [False, True])
def test_a_missing_file_is_named(folder, name, pipe, capsys, tmp_path):
    (folder / name).unlink()
    if pipe:  # which is not waited for
        os.mkfifo(folder / name)
    assert fashion.main(["--data", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert name.removesuffix(".gz") in capsys.readouterr().err


@pytest.mark.parametrize("count", [10_000, 2**32 - 1])
def test_no_more_is_unpacked_than_a_data_file_has(folder, count):
    header = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">u4").tobytes()
    zeros = gzip.compress(bytes(50_000_000), mtime=0)
    (folder / IMAGES).write_bytes(gzip.compress(header, mtime=0) + zeros * 20)
    with pytest.raises(OSError, match=f"size {fashion.LARGEST + 1 - 16}"):
        fashion.load(folder, "train")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Error downloading\nTried data"), "(Tried data)"),
        (AssertionError(), "(AssertionError())"),  # files of zeros, as a power cut leaves them
    ],
)
def test_without_a_network_the_sample_is_taken_or_the_data_asked_for(
    error, reason, monkeypatch, tmp_path
):
    def fail(*_, **__):
        raise error

    fake = SimpleNamespace(FashionMNIST=fail)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    source, train, test = fashion.open_data(None)
    assert source.startswith(f"{fashion.SAMPLE}, one sixth of all")
    assert source.endswith(reason)
    assert (len(train[0]), len(test[0])) == (10_000, 2_000)
    monkeypatch.setattr(fashion, "SAMPLE", tmp_path / "none")
    with pytest.raises(OSError, match="can't download the data, and the sample is only in"):
        fashion.open_data(None)


def test_the_data_is_torchvisions(folder, sample, tmp_path, monkeypatch):
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for file in folder.iterdir():  # unpacked, as its download leaves them
        content = file.read_bytes()
        packed = file.suffix == ".gz"
        (raw / file.name.removesuffix(".gz")).write_bytes(
            gzip.decompress(content) if packed else content
        )
    monkeypatch.chdir(tmp_path)
    source, train, test = fashion.open_data(None)
    assert source == "data/FashionMNIST"
    for found, part in ((train, slice(1200)), (test, slice(1200, 1500))):
        assert all(torch.equal(a, b[part]) for a, b in zip(found, sample, strict=True))
        assert found[1].dtype == torch.int64


GOOD = idx(np.arange(5 * 28 * 28).reshape(5, 28, 28) % 256)
edits = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=3)


@settings(deadline=None, max_examples=60)
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
            found = fashion.read_idx(path)
        except OSError as error:
            assert str(path) in str(error)
            assert len(str(error).splitlines()) == 1
            assert content[:16] != GOOD[:16] or len(content) != len(GOOD) or 0 < cut < 20
        else:
            assert found.numpy().tobytes() == content[-found.numel() :]
            assert found.numel() == len(content) - 4 - 4 * content[3]


# Network and training


def test_the_network_has_the_shapes_and_the_parameters_it_says():
    model = fashion.Classifier(width=512)
    assert model(torch.zeros(7, 28, 28, dtype=torch.uint8)).shape == (7, 10)
    hidden = (784 * 512 + 2 * 512) + (512 * 512 + 2 * 512)
    assert sum(p.numel() for p in model.parameters()) == hidden + 512 * 10 + 10


def test_the_network_computes_what_numpy_computes(sample):
    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    torch.manual_seed(0)
    model = fashion.Classifier(width=32)
    train_epoch(model, *(t[:500] for t in sample), torch.optim.SGD(model.parameters(), 0.1))
    model.eval()
    p = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    x = np.sqrt(sample[0][:20].numpy().reshape(20, 784).astype(float))
    for linear, norm in ((1, 2), (4, 5)):
        mean, variance = (p[f"layers.{norm}.running_{name}"] for name in ("mean", "var"))
        x = (x @ p[f"layers.{linear}.weight"].T - mean) / np.sqrt(variance + 1e-5)
        x = gelu(x * p[f"layers.{norm}.weight"] + p[f"layers.{norm}.bias"])
    expected = x @ p["layers.7.weight"].T + p["layers.7.bias"]
    with torch.no_grad():
        found = model(sample[0][:20]).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_images_that_are_given_stay_as_they_are():
    images = torch.zeros(2, 28, 28)  # which .float() doesn't copy
    fashion.Classifier(width=8)(images)
    assert not images.any()


def test_half_of_a_batch_is_mirrored_and_some_batches_shifted_by_a_pixel():
    torch.manual_seed(0)
    images = torch.zeros(10, 28, 28, dtype=torch.uint8)
    images[:, 5, 3] = 7
    before, places = images.clone(), []
    for _ in range(300):
        batch = fashion.augment(images)
        assert batch.shape == (10, 28, 28)
        assert batch.sum() == 70
        found = batch.nonzero()[:, 1:]
        (mirrored,), (straight,) = (part.unique(dim=0).tolist() for part in found.split(5))
        assert mirrored == [straight[0], straight[1] + 21]
        places.append((straight[0] - 5, straight[1] - 3))
    assert set(places) == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    assert 0.65 < places.count((0, 0)) / 300 < 0.81  # 7 in 10, and a ninth of the rest
    assert torch.equal(images, before)


@pytest.mark.parametrize("count", [50, 1, 5001])
def test_logits_are_the_mean_of_those_of_an_image_and_of_its_mirror_image(sample, count):
    torch.manual_seed(0)
    model, images = fashion.Classifier(width=16).eval(), sample[0][:count]
    with torch.no_grad():
        both = np.stack([model(images).numpy(), model(images.flip(-1)).numpy()])
    found = fashion.predict(model.train(), images)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), both.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_images_are_predicted_on_their_own_device():
    model, images = fashion.Classifier(width=8), torch.zeros(3, 28, 28, dtype=torch.uint8)
    with torch.device("meta"):  # what is made on no device in particular lands there
        logits = fashion.predict(model, images)
    assert logits.device == images.device


class Recorder(nn.Module):
    """Remembers which pictures it saw, by their first pixels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10))
        self.seen = []

    def forward(self, images):
        assert torch.equal(images, images.flip(-1))
        self.seen.append(images[:, 0, 0].long() * 256 + images[:, 0, 1])
        return self.weight.expand(len(images), 10)


def test_every_picture_is_seen_once_an_epoch_in_a_new_order(monkeypatch):
    monkeypatch.setattr(fashion, "augment", lambda images: images)
    images = torch.zeros(1003, 28, 28, dtype=torch.uint8)
    images[:, 0, 0] = images[:, 0, 27] = torch.arange(1003) // 256
    images[:, 0, 1] = images[:, 0, 26] = torch.arange(1003) % 256
    labels = torch.zeros(1003, dtype=torch.int64)

    def epochs(seed):
        torch.manual_seed(seed)
        model = Recorder()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            train_epoch(model, images, labels, optimizer, batch_size=100)
        assert {len(batch) for batch in model.seen} == {100, 101}
        return torch.cat(model.seen).view(2, 1003)

    first, second = epochs(seed=0)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(1003))
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(1003))
    assert torch.equal(epochs(seed=0)[1], second)
    assert not torch.equal(epochs(seed=1)[1], second)


def test_training_lowers_the_loss_on_the_same_pictures(sample):
    torch.manual_seed(0)
    images, labels = (tensor[:500] for tensor in sample)
    model = fashion.Classifier(width=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = [train_epoch(model, images, labels, optimizer, batch_size=50) for _ in range(4)]
    assert sorted(losses, reverse=True) == losses
    assert fashion.evaluate(model, images, labels)[1] > 0.8


def test_the_loss_is_the_smoothed_cross_entropy_of_the_logits():
    model, labels = Recorder(), torch.arange(30) % 3  # seven classes don't occur
    with torch.no_grad():
        model.weight.copy_(torch.arange(10) / 3)  # the logits of every image
    logits = np.arange(10) / 3
    log_p = logits - np.log(np.exp(logits).sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    images = torch.zeros(30, 28, 28, dtype=torch.uint8)
    loss = train_epoch(model, images, labels, optimizer, batch_size=10)
    assert loss == pytest.approx(-0.9 * log_p[:3].mean() - 0.1 * log_p.mean())


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_loss_that_is_not_finite_stops_the_training(sample, monkeypatch, where):
    model = fashion.Classifier(width=8)
    if where == "training":
        nn.init.constant_(model.layers[-1].bias, math.nan)
    else:
        monkeypatch.setattr(fashion, "evaluate", lambda *_: (math.inf, 0.1))
    part = tuple(tensor[:100] for tensor in sample)
    with pytest.raises(FloatingPointError, match=r"isn't finite.*--learning-rate"):
        list(fashion.fit(model, part, part, epochs=1, batch_size=50, learning_rate=0.01))


def test_evaluate_agrees_with_numpy_and_changes_nothing(sample):
    torch.manual_seed(0)
    images, labels = (tensor[:300] for tensor in sample)
    model = fashion.Classifier(width=16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss, accuracy = fashion.evaluate(model, images, labels)
    logits = fashion.predict(model, images).double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert loss == pytest.approx(-log_p[np.arange(300), labels].mean(), rel=1e-5)
    assert accuracy == (logits.argmax(axis=1) == labels.numpy()).mean()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_no_image_is_trained_on_and_held_out():
    numbers = torch.arange(600)
    (kept, labels), (held_out, _) = fashion.hold_out((numbers, numbers))
    assert sorted([*kept.tolist(), *held_out.tolist()]) == numbers.tolist()
    assert len(held_out) == 10
    assert torch.equal(kept, labels)


def test_each_image_keeps_its_label_and_type_on_both_sides():
    images = torch.arange(130).view(130, 1, 1).expand(130, 28, 28).to(torch.uint8)
    for count, expected in ((60, 1), (119, 1), (120, 2), (130, 2)):
        split = images[:count], torch.arange(count)
        parts = fashion.hold_out(split)
        for part, labels in parts:
            assert (part.dtype, labels.dtype) == (torch.uint8, torch.int64)
            assert torch.equal(part, images[labels])
        assert [len(labels) for _, labels in parts] == [count - expected, expected]
        assert torch.equal(torch.cat([labels for _, labels in parts]).sort().values, split[1])


def test_any_image_may_be_held_out_as_the_seed_wants():
    numbers = torch.arange(60)

    def draws(count):
        torch.manual_seed(0)
        return [fashion.hold_out((numbers, numbers))[1][0].item() for _ in range(count)]

    assert {*draws(1000)} == {*range(60)}
    assert draws(5) == draws(5)


def test_too_few_images_are_refused():
    numbers = torch.arange(59)
    with pytest.raises(OSError):
        fashion.hold_out((numbers, numbers))


# As a person runs it


def test_it_runs_end_to_end_and_saves_what_it_says(run_script, folder, tmp_path):
    done = run_script(
        "fashion-mnist.py", "--data", folder, "--epochs", 2, "--batch-size", 50, "--device", "cpu",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"Data: {folder}"
    assert "1,180 training images, 20 for validation" in done.stdout
    for name in ("history", "confusion", "answers", "mistakes"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2]
    assert f"Test: {metrics['test']:.2%} of 300 images" in done.stdout
    model = fashion.load_model(tmp_path / "out/model.safetensors")
    assert fashion.evaluate(model, *fashion.load(folder, "t10k"))[1] == metrics["test"] > 0.3


def test_the_confusion_counts_true_classes_in_rows(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(fashion, "draw_confusion", lambda c: drawn.append(c) or fashion.Figure())
    test, model = fashion.load(folder, "t10k"), fashion.Classifier(width=16)
    fashion.draw_test(model, test, tmp_path)
    expected = np.zeros((10, 10))
    np.add.at(expected, (test[1].numpy(), fashion.predict(model, test[0]).argmax(1).numpy()), 1)
    np.testing.assert_array_equal(drawn[0], expected)


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_run_of_few_steps_ends_well(folder, tmp_path, capsys, monkeypatch, epochs):
    monkeypatch.setattr(fashion, "draw_test", lambda *_: 0.0)
    arguments = ["--data", str(folder), "--epochs", str(epochs), "--batch-size", "1100"]
    assert fashion.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0


def test_the_same_seed_gives_the_same_weights(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fashion, "draw_test", lambda *_: 0.0)

    def weights(out, seed):
        arguments = ["--data", str(folder), "--epochs", "1", "--batch-size", "100"]
        arguments += ["--seed", str(seed), "--device", "cpu", "--out", str(tmp_path / out)]
        assert fashion.main(arguments) == 0
        return (tmp_path / out / "model.safetensors").read_bytes()

    assert weights("a", 3) == weights("b", 3) != weights("c", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "argument --epochs: must be between 1 and 10,000"),
        ("--epochs many", "argument --epochs: must be between 1 and 10,000"),
        (f"--epochs {10**400}", "argument --epochs: must be between 1 and 10,000"),
        ("--batch-size 1", "argument --batch-size: must be between 2 and 100,000"),
        ("--learning-rate -1", "argument --learning-rate: must be between"),
        ("--learning-rate nan", "argument --learning-rate: must be between"),
        ("--learning-rate inf", "argument --learning-rate: must be between"),
        ("--seed -1", "argument --seed: must be between 0 and"),
        (f"--seed {2**63}", "argument --seed: must be between 0 and"),
        ("--out \x1b[31mred", "--data and --out: must be names that can be printed"),
        ("--data \u2028", "--data and --out: must be names that can be printed"),
        ("--device abacus", "argument --device: 'abacus' can't be used here"),
        ("--device hpu", "argument --device: 'hpu' can't be used here"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        fashion.main(arguments.split(" "))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_broken_loss_ends_in_one_line_and_saves_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        fashion.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * math.inf
    )
    (tmp_path / "model.safetensors").write_bytes(b"old")
    assert fashion.main(["--data", str(folder), "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_ends_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert fashion.main(["--data", str(folder), "--out", str(tmp_path / "file/out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Not a directory" in line


# Photos


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network, and the folder where it is saved."""
    torch.manual_seed(0)
    model, out = fashion.Classifier(), tmp_path_factory.mktemp("saved")
    safetensors.torch.save_file(model.state_dict(), out / "model.safetensors")
    return model, out


def enlarged(image, *size):
    """Make a photo of an image: dark on white, with a border."""
    return ImageOps.expand(ImageOps.invert(Image.fromarray(image.numpy())).resize(size), 20, 255)


@pytest.mark.parametrize("terminal", [True, False])
def test_predict_names_photos_and_goes_on_after_a_broken_one(
    saved, tmp_path, sample, capsys, monkeypatch, terminal
):
    model, out = saved
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    good, text, bomb = tmp_path / "good one.png", tmp_path / "text.jpg", tmp_path / "bomb.png"
    enlarged(sample[0][0], 300, 300).save(good)
    text.write_text("no photo")
    Image.new("1", (20_000, 10_000)).save(bomb)
    empty = tmp_path / "empty.png"
    Image.new("L", (90, 90)).save(empty)
    broken = [text, tmp_path / "missing.png", tmp_path, bomb, empty]
    arguments = ["--out", str(out), "--predict", *map(str, broken[:2]), str(good)]
    assert fashion.main([*arguments, *map(str, broken[2:]), "a\0b"]) == 1
    captured = capsys.readouterr()
    for path in [*broken, "a?b"]:
        assert sum(line.startswith(f"{path}: ") for line in captured.err.splitlines()) == 1
    assert len(captured.err.splitlines()) == len(broken) + 1
    assert f"{empty}: nothing but background" in captured.err
    *image, answer = captured.out.splitlines()
    assert len(image) == 14 * terminal  # no escape codes in a file
    assert all(line.count("▀") == 28 for line in image)
    logits = fashion.predict(model, prepare(open_photo(good)).unsqueeze(0))
    assert answer.startswith(f"{good}: {fashion.CLASSES[logits.argmax()]} ")
    assert len(re.findall(r"[\d.]+%", answer)) == 3


def test_names_from_outside_cannot_steer_the_terminal(saved, tmp_path, sample, capsys):
    name = "\x1b]0;title\x07\nfake\udcff\u2028 \u200d: Bag.png"
    enlarged(sample[0][0], 300, 300).save(os.fsencode(tmp_path / name))
    photos = [str(tmp_path / name), str(tmp_path / f"no {name}")]
    assert fashion.main(["--out", str(saved[1]), "--predict", *photos]) == 1
    printed, error = capsys.readouterr()
    assert f"{tmp_path}/?]0;title??fake?? \u200d: Bag.png: " in printed
    assert f"{tmp_path}/no ?]0;title??fake?? \u200d: Bag.png: " in error


@pytest.mark.parametrize("room", ["inputs.photo", "running.shell"])
def test_without_the_rooms_for_photos_one_line_says_so(saved, room, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, room, None)
    assert fashion.main(["--out", str(saved[1]), "--predict", "photo.jpg"]) == 1
    assert "--predict needs the folders inputs/ and running/" in capsys.readouterr().err


NAN = {
    name: x * math.nan if x.is_floating_point() else x
    for name, x in fashion.Classifier().state_dict().items()
}


@pytest.mark.parametrize(
    ("name", "value"), [("layers.1.weight", 1e38), ("layers.2.running_var", -1.0)]
)
def test_a_network_that_computes_no_numbers_is_refused(tmp_path, sample, capsys, name, value):
    model = fashion.Classifier()
    model.state_dict()[name].fill_(value)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    enlarged(sample[0][0], 300, 300).save(tmp_path / "photo.png")
    arguments = ["--out", str(tmp_path), "--predict", str(tmp_path / "photo.png")]
    assert fashion.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the saved network computes no numbers" in line


def test_a_pipe_is_no_model_and_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "model.safetensors")
    assert fashion.main(["--out", str(tmp_path), "--predict", "photo.jpg"]) == 1
    assert "train one first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"a text",
        safetensors.torch.save({"layers.1.weight": torch.zeros(3, 3)}),
        safetensors.torch.save(fashion.Classifier(width=8).state_dict()),
        safetensors.torch.save(fashion.Classifier().state_dict())[:-1],
        safetensors.torch.save(NAN),
    ],
    ids=["missing", "empty", "text", "other", "narrower", "truncated", "NaN"],
)
def test_a_model_that_is_none_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert fashion.main(["--out", str(tmp_path), "--predict", "photo.jpg"]) == 1
    error = capsys.readouterr().err
    assert "train one first" in error
    assert str(path) in error
    assert "state_dict" not in error
    assert len(error.splitlines()) == 1


@pytest.mark.gpu
def test_it_computes_the_same_on_an_accelerator(sample):
    torch.manual_seed(0)
    model = fashion.Classifier()
    expected = fashion.predict(model, sample[0][:500])
    device = torch.accelerator.current_accelerator()
    found = fashion.predict(model.to(device), sample[0][:500].to(device))
    assert found.device.type == device.type
    found = found.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert F.cross_entropy(found, sample[1][:500]).isfinite()
