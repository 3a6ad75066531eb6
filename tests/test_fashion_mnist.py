import gzip
import importlib
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.optim.lr_scheduler import ConstantLR

from conftest import idx
from inputs.clothes import load

fashion = importlib.import_module("fashion-mnist")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network, and the folder where it is saved."""
    torch.manual_seed(0)
    model, out = fashion.Classifier(), tmp_path_factory.mktemp("saved")
    fashion.write(out / "model.safetensors", safetensors.torch.save(model.state_dict()))
    return model, out


def enlarged(image, *size):
    """Make a photo of an image: dark on white, with a border."""
    return ImageOps.expand(ImageOps.invert(Image.fromarray(image.numpy())).resize(size), 20, 255)


def train_epoch(model, images, labels, optimizer, batch_size=500):
    """Train for an epoch at the optimizer's own learning rate."""
    schedule = ConstantLR(optimizer, 1.0)
    return fashion.train_epoch(model, (images, labels), optimizer, schedule, batch_size)


def test_predict_names_photos_and_goes_on_after_a_broken_one(saved, tmp_path, sample, capsys):
    model, out = saved
    good, text, bomb = tmp_path / "good one.png", tmp_path / "text.jpg", tmp_path / "bomb.png"
    enlarged(sample[0][0], 300, 300).save(good)
    text.write_text("no photo")
    Image.new("1", (20_000, 10_000)).save(bomb)
    empty = tmp_path / "empty.png"
    Image.new("L", (9, 9)).save(empty)
    broken = [text, tmp_path / "missing.png", tmp_path, bomb, empty]
    arguments = ["--out", str(out), "--predict", *map(str, broken[:2]), str(good)]
    assert fashion.main([*arguments, *map(str, broken[2:]), "a\0b"]) == 1
    captured = capsys.readouterr()
    for path in [*broken, "a?b"]:
        assert sum(line.startswith(f"{path}: ") for line in captured.err.splitlines()) == 1
    assert len(captured.err.splitlines()) == len(broken) + 1
    assert f"{empty}: nothing but background" in captured.err
    *image, answer = captured.out.splitlines()
    assert len(image) == 14
    assert all(line.count("▀") == 28 for line in image)
    logits = fashion.predict(model, fashion.prepare(fashion.open_photo(good)).unsqueeze(0))
    assert answer.startswith(f"{good}: {fashion.CLASSES[logits.argmax()]} ")
    assert len(re.findall(r"[\d.]+%", answer)) == 3


def test_names_from_outside_cannot_steer_the_terminal(saved, tmp_path, sample, monkeypatch):
    _, out = saved
    names = ["bad\udcff.png", "\x1b]0;title\x07\nfake: Bag.png"]
    for name in names:
        enlarged(sample[0][0], 300, 300).save(os.fsencode(tmp_path / name))
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    photos = [str(tmp_path / name) for name in names]
    assert fashion.main(["--out", str(out), "--predict", *photos]) == 0
    printed = stdout.buffer.getvalue().decode()
    assert len(printed.splitlines()) == 30
    assert "bad?.png: " in printed
    assert "?]0;title??fake: Bag.png: " in printed


def test_a_closed_stdout_is_no_error(saved, tmp_path, sample, monkeypatch):
    enlarged(sample[0][0], 300, 300).save(tmp_path / "photo.png")
    monkeypatch.setattr(sys, "stdout", None)
    assert fashion.main(["--out", str(saved[1]), "--predict", str(tmp_path / "photo.png")]) == 0


NAN = {
    name: x * math.nan if x.is_floating_point() else x
    for name, x in fashion.Classifier().state_dict().items()
}


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
    assert "not a model saved by this script; train one first" in error
    assert str(path) in error
    assert "state_dict" not in error
    assert len(error.splitlines()) == 1


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


def test_a_picture_and_its_mirror_image_get_the_same_answer(sample):
    torch.manual_seed(0)
    model = fashion.Classifier(width=16)
    logits = fashion.predict(model, sample[0][:50])
    torch.testing.assert_close(fashion.predict(model, sample[0][:50].flip(-1)), logits)


def test_logits_are_the_mean_of_those_of_an_image_and_of_its_mirror_image(sample):
    torch.manual_seed(0)
    model, images = fashion.Classifier(width=16).eval(), sample[0][:50]
    with torch.no_grad():
        both = np.stack([model(images).numpy(), model(images.flip(-1)).numpy()])
    found = fashion.predict(model.train(), images).numpy()
    np.testing.assert_allclose(found, both.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_shifted_and_scaled_pixels_train_the_same(sample):
    torch.manual_seed(0)
    layers, pixels = fashion.Classifier(width=16).double().layers, sample[0][:50].double().sqrt()
    found = []
    for x in (pixels, 0.3 * pixels - 2):
        logits = layers(x)
        gradients = torch.autograd.grad(
            F.cross_entropy(logits, sample[1][:50]), layers.parameters()
        )
        found.append((logits, *gradients))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)  # but for the 1e-5 in the root


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


def test_the_mean_loss_is_that_of_each_picture():
    torch.manual_seed(0)
    model = Recorder()
    labels = torch.randint(10, (103,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    images = torch.zeros(103, 28, 28, dtype=torch.uint8)
    loss = train_epoch(model, images, labels, optimizer, batch_size=10)
    assert loss == pytest.approx(math.log(10))


def test_the_loss_is_the_smoothed_cross_entropy_of_the_logits():
    model, labels = Recorder(), torch.arange(10).repeat(3)
    with torch.no_grad():
        model.weight.copy_(torch.arange(10) / 3)  # the logits of every image
    logits = np.arange(10) / 3
    log_p = logits - np.log(np.exp(logits).sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    images = torch.zeros(30, 28, 28, dtype=torch.uint8)
    loss = train_epoch(model, images, labels, optimizer, batch_size=10)
    assert loss == pytest.approx(-log_p.mean())  # each label is there as often


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_keeps_the_old_file_and_is_named(tmp_path):
    file = tmp_path / "model"
    fashion.write(file, b"old")
    (tmp_path / f".model.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"can't write {file}: No space left"):
        fashion.write(file, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert file.read_bytes() == b"old"


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
    assert fashion.evaluate(model, *load(folder, train=False))[1] == metrics["test"] > 0.3


def test_the_confusion_counts_true_classes_in_rows(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(fashion, "draw_confusion", lambda c: drawn.append(c) or fashion.Figure())
    test, model = load(folder, train=False), fashion.Classifier(width=16)
    fashion.report(model, [fashion.Epoch(1, 1.0, 1.0, 0.5, 1.0)], test, tmp_path)
    expected = np.zeros((10, 10))
    np.add.at(expected, (test[1].numpy(), fashion.predict(model, test[0]).argmax(1).numpy()), 1)
    np.testing.assert_array_equal(drawn[0], expected)


def test_a_closed_pipe_ends_quietly_after_the_network_is_saved(
    run_script, folder, tmp_path, monkeypatch
):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:  # whose end flushes it, as the end of a process does
        monkeypatch.setattr(sys, "stdout", stdout)
        done = run_script(
            "fashion-mnist.py", "--data", folder, "--epochs", 1, "--device", "cpu",
            "--out", tmp_path,
        )  # fmt: skip
    assert (done.stderr, done.returncode) == ("", 141)
    fashion.load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_run_of_few_steps_ends_well(folder, tmp_path, capsys, monkeypatch, epochs):
    monkeypatch.setattr(fashion, "report", lambda *_: 0.0)
    arguments = ["--data", str(folder), "--epochs", str(epochs), "--batch-size", "1100"]
    assert fashion.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0


def test_the_same_seed_gives_the_same_weights(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fashion, "report", lambda *_: 0.0)

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
        ("--device abacus", "argument --device: 'abacus' can't be used here"),
        ("--device hpu", "argument --device: 'hpu' can't be used here"),
        ("--data no/such/folder", "argument --data: must be a folder"),
        ("--data . --sample", "argument --data: must be a folder; can't be used with --sample"),
        ("--out a\0b", "argument --out: must be a name without NUL"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        fashion.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_broken_data_ends_in_one_line_and_status_1(folder, tmp_path, capsys):
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(b"")
    assert fashion.main(["--data", str(folder), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(labels) in error


def test_too_few_pictures_are_refused(folder, sample, tmp_path, capsys):
    images, labels = (tensor[:59].numpy() for tensor in sample)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    assert fashion.main(["--data", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert re.fullmatch(".*: 59 images are too few.*\n", capsys.readouterr().err)


def test_a_broken_loss_ends_in_one_line_and_saves_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        fashion.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * math.inf
    )
    (tmp_path / "model.safetensors").write_bytes(b"old")
    assert fashion.main(["--data", str(folder), "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"


def test_ctrl_c_ends_with_130_and_keeps_the_saved_model(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(fashion, "train_epoch", interrupted)
    (tmp_path / "model.safetensors").write_bytes(b"old")
    assert fashion.main(["--data", str(folder), "--out", str(tmp_path)]) == 130
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"


@pytest.mark.gpu
def test_it_computes_the_same_on_an_accelerator(sample):
    torch.manual_seed(0)
    model = fashion.Classifier()
    expected = fashion.predict(model, sample[0][:500])
    device = torch.accelerator.current_accelerator()
    found = fashion.predict(model.to(device), sample[0][:500].to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert F.cross_entropy(found, sample[1][:500]).isfinite()
