import gzip
import importlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import nn

fashion = importlib.import_module("fashion-mnist")


def idx(array: np.ndarray) -> bytes:
    """Pack bytes in the IDX format."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def sample():
    return fashion.load(fashion.SAMPLE, train=True)


@pytest.fixture
def folder(tmp_path, sample):
    """A data set of 1,200 and 300 pictures, one file of it not gzipped."""
    images, labels = (tensor.numpy() for tensor in sample)
    folder = tmp_path / "small data"
    folder.mkdir()
    for name, part in (("train", slice(1200)), ("t10k", slice(1200, 1500))):
        packed = gzip.compress(idx(images[part]))
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(packed)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels[part]))
    return folder


def test_the_sample_is_stratified():
    for train, per_class in ((True, 1000), (False, 200)):
        images, labels = fashion.load(fashion.SAMPLE, train)
        assert images.shape == (10 * per_class, 28, 28)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert labels.bincount().tolist() == [per_class] * len(fashion.CLASSES)


def test_the_sample_is_at_most_8_megabytes():
    assert sum(file.stat().st_size for file in fashion.SAMPLE.iterdir()) <= 8e6


@pytest.mark.skipif(not fashion.DEBIAN.is_dir(), reason="the whole data set is not installed")
def test_the_sample_is_drawn_from_the_whole_set_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fashion.SAMPLE)
    importlib.import_module("draw").draw(fashion.DEBIAN, tmp_path, "t10k", 200)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (fashion.SAMPLE / file.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_load_reads_gzipped_and_plain_files(folder, sample):
    images, labels = fashion.load(folder, train=False)
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
        (images_file, gzip.compress(idx(np.zeros((1200, 28, 28))))[:-9], "is broken"),
        (images_file, b"a page that says 404", "is broken"),
        (images_file, gzip.compress(b"a page that says 404"), "got 20 bytes"),
        (labels_file, idx(np.zeros(1200))[:-1], "got 1207 bytes"),
        (labels_file, idx(np.zeros(1200)) + b"\0", "got 1209 bytes"),
        (labels_file, b"\0\0\x0d\x01" + idx(np.zeros(1200))[4:], "got 1208 bytes"),
        (labels_file, idx(np.zeros(0)), "expected an IDX file of shape .N., got 8 bytes"),
        (labels_file, idx(np.zeros((600, 2))), "expected an IDX file"),
        (labels_file, idx(np.zeros(1199)), "1200 images and 1199 labels"),
        (labels_file, idx(np.full(1200, 10)), "labels up to 10"),
        (
            images_file,
            gzip.compress(idx(np.zeros((1200, 32, 32)))),
            r"expected an IDX file of shape \(N, 28, 28\)",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value)[:20],
)
def test_a_broken_file_is_named(folder, file, content, message):
    file(folder).write_bytes(content)
    with pytest.raises(OSError, match=message) as caught:
        fashion.load(folder, train=True)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("count", [10_000, 2**32 - 1])
def test_no_more_is_unpacked_than_the_header_announces(folder, monkeypatch, count):
    header = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">u4").tobytes()
    zeros = gzip.compress(bytes(50_000_000))
    images_file(folder).write_bytes(gzip.compress(header) + zeros * 20)
    monkeypatch.setattr(fashion, "MOST_IMAGES", 10_000)
    with pytest.raises(OSError, match="expected an IDX file") as caught:
        fashion.load(folder, train=True)
    assert int(re.search(r"got (\d+) bytes", str(caught.value))[1]) == 16 + 10_000 * 784 + 1


def test_a_missing_file_is_named(folder):
    labels_file(folder).unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        fashion.load(folder, train=True)


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    def no_network(folder):
        raise OSError("no network")

    monkeypatch.setattr(fashion, "RAW", tmp_path / "raw")
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(fashion, "download", no_network)


def test_the_sample_is_taken_when_there_is_nothing_else(nothing_installed):
    folder, train, test, problems = fashion.find_data()
    assert (folder, len(train[0]), len(test[0])) == (fashion.SAMPLE, 10_000, 2_000)
    assert problems == ["no network"]


def test_a_broken_copy_is_passed_over(nothing_installed, folder, monkeypatch):
    fashion.RAW.mkdir()
    for file in folder.iterdir():
        (fashion.RAW / file.name).write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(fashion, "DEBIAN", folder)
    found, train, _, problems = fashion.find_data()
    assert (found, len(train[0])) == (folder, 1200)
    assert len(problems) == 1
    assert str(fashion.RAW) in problems[0]


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
    fashion.download(tmp_path / "data/FashionMNIST/raw")
    assert (tmp_path / "data/FashionMNIST/raw/file").read_text() == "all"


def test_a_download_that_hangs_is_given_up(tmp_path, monkeypatch):
    fake_torchvision(tmp_path, monkeypatch, "time.sleep(60)")
    with pytest.raises(TimeoutError, match="not done after 1 s"):
        fashion.download(tmp_path / "data/FashionMNIST/raw", seconds=1)


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    fake_torchvision(tmp_path, monkeypatch, "raise RuntimeError('the server is gone')")
    with pytest.raises(OSError, match=r"download: .*the server is gone"):
        fashion.download(tmp_path / "data/FashionMNIST/raw")


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
    packed = gzip.compress(content)
    packed = packed[: len(packed) - cut] if cut < 20 else packed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images")
        Path(folder, "images.gz" if zipped else "images").write_bytes(packed if zipped else content)
        try:
            images = fashion.read_idx(path, 28, 28)
        except OSError as error:
            assert str(path) in str(error)
            assert len(str(error).splitlines()) == 1
            assert content[:16] != GOOD[:16] or len(content) != len(GOOD) or 0 < cut < 20
        else:
            assert content[:4] == GOOD[:4]
            assert int.from_bytes(content[4:8]) == len(images)
            assert images.numpy().tobytes() == content[16:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network trained for three epochs on the sample, and saved."""
    torch.manual_seed(0)
    train = fashion.load(fashion.SAMPLE, train=True)
    model = fashion.Classifier()
    for _ in fashion.fit(model, train, train, epochs=3, batch_size=200, learning_rate=3e-3):
        pass
    out = tmp_path_factory.mktemp("trained")
    fashion.write(out / "model.safetensors", safetensors.torch.save(model.state_dict()))
    return model, out


KINDS = ("paper", "light", "shadow", "noise", "wood", "cloth", "color", "moved", "everything")


def smooth_noise(rng, size, cells):
    """Random values between 0 and 1 that change smoothly over (height, width) cells."""
    noise = cv2.resize(rng.random(cells, np.float32), size, interpolation=cv2.INTER_CUBIC)
    return noise[..., None].clip(0, 1)


def color(rng, lightness, saturation):
    """Return any hue, within these ranges."""
    hsv = np.float32([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*lightness)]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]


def table(rng, kind, size):
    """Return paper, wood or cloth, between 0 and 1."""
    width, height = size
    if kind == "everything":
        kind = rng.choice(["paper", "wood", "cloth"])
    if kind == "wood":
        hue = rng.uniform(15, 35)
        dark, bright = (
            cv2.cvtColor(np.float32([[[hue, rng.uniform(0.2, 0.6), v]]]), cv2.COLOR_HSV2RGB)[0, 0]
            for v in np.sort(rng.uniform(0.3, 0.9) + rng.uniform(-0.12, 0.12, 2))
        )
        wide, long = int(rng.integers(15, 80)), int(rng.integers(2, 6))
        cells = (wide, long) if rng.random() < 0.5 else (long, wide)
        grain = smooth_noise(rng, size, cells)
        return dark + (bright - dark) * grain
    if kind == "cloth":
        base, contrast = color(rng, (0.3, 0.95), (0, 0.6)), rng.uniform(0.02, 0.12)
        period = rng.uniform(2, 10)
        y, x = np.mgrid[:height, :width].astype(np.float32) * 2 * np.pi / period
        weave = np.sin(x + rng.uniform(0, 6)) * np.sin(y + rng.uniform(0, 6))
        folds = smooth_noise(rng, size, (3, 3))
        return base * (1 - contrast + contrast * weave[..., None]) * (0.9 + 0.1 * folds)
    return np.broadcast_to(color(rng, (0.88, 1), (0, 0.06)), (height, width, 3))


def photo_of(rng, picture, kind):
    """Photograph a picture, with whatever the kind leaves to chance, as a JPEG of quality 50."""
    size = width, height = int(rng.integers(300, 700)), int(rng.integers(300, 700))
    background = table(rng, kind, size)
    picture = picture.astype(np.float32)
    cut = (picture > 12).astype(np.float32)
    shade = np.where(picture > 60, picture, cv2.dilate(picture, np.ones((3, 3))))  # no pale rim
    if kind in ("paper", "light", "shadow", "noise"):
        shade = picture
    scale = min(size) * rng.uniform(0.55, 0.8) / 28
    turn = rng.uniform(-10, 10) if kind in ("moved", "everything") else 0.0
    middle = np.array(size) / 2
    matrix = cv2.getRotationMatrix2D((13.5, 13.5), turn, scale)
    free = (np.array(size) - 28 * scale) / 2
    reach = 0.8 if kind in ("moved", "everything") else 0.1
    matrix[:, 2] += middle - 13.5 + free * rng.uniform(-reach, reach, 2)
    shade = cv2.warpAffine(shade, matrix, size, flags=cv2.INTER_CUBIC).clip(0, 255)[..., None] / 255
    alpha = cv2.warpAffine(cut, matrix, size, flags=cv2.INTER_CUBIC)[..., None]
    alpha = ((alpha - 0.5) * scale / 2 + 0.5).clip(0, 1)
    dye = np.ones(3, np.float32)
    if kind in ("color", "everything"):
        dye = 1 - color(rng, (0.3, 0.9), (0.5, 1))
        dye /= dye.max()
    garment = 1 - shade * dye
    photo = background * (1 - alpha) + garment * alpha
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x / width - 0.5, y / height - 0.5
    if kind in ("light", "everything"):
        a, s = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.5)
        photo = photo * (1 - s * (0.5 + (np.cos(a) * x + np.sin(a) * y) / 1.42))[..., None]
    if kind in ("shadow", "everything"):
        a, s = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.45)
        edge = (np.cos(a) * x + np.sin(a) * y - rng.uniform(-0.3, 0.3)) / rng.uniform(0.03, 0.15)
        photo = photo * (1 - s / (1 + np.exp(-edge)))[..., None]
    sigma = rng.uniform(4, 14) if kind in ("noise", "light", "everything") else 2
    photo = photo * 255 + sigma * rng.standard_normal(photo.shape, np.float32)
    file = io.BytesIO()
    Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=50)
    return file.getvalue()


def seen(photo, folder):
    """Save a photo, and return what the network sees of it."""
    path = folder / f"photo.{'tif' if photo.mode in 'CMYK YCbCr F I' else 'png'}"
    photo.save(path)
    return fashion.prepare(fashion.open_photo(path))


def agreement(model, test, kind, count, folder):
    """Return the share of photos that are predicted as the images they were made of."""
    images, labels = test
    right = fashion.predict(model, images).argmax(dim=1) == labels
    images, labels = images[right][:count], labels[right][:count]
    generator, path, inputs = np.random.default_rng(0), folder / "photo.jpg", []
    for image in images.numpy():
        path.write_bytes(photo_of(generator, image, kind))
        inputs.append(fashion.prepare(fashion.open_photo(path)))
    return (fashion.predict(model, torch.stack(inputs)).argmax(dim=1) == labels).double().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_photos_are_predicted_as_the_images_they_were_made_of(trained, tmp_path, kind):
    test = fashion.load(fashion.SAMPLE, train=False)
    assert agreement(trained[0], test, kind, 20, tmp_path) >= 0.8  # of few


@pytest.fixture(scope="module")
def trained_fully():
    folder = fashion.DEBIAN if fashion.DEBIAN.is_dir() else fashion.SAMPLE
    torch.manual_seed(0)
    train, validation = fashion.hold_out(fashion.load(folder, train=True))
    model = fashion.Classifier()
    for _ in fashion.fit(model, train, validation, 16, 500, 6e-3):
        pass
    return model, fashion.load(folder, train=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nine_in_ten_photos_of_each_kind_are_predicted_right(trained_fully, tmp_path, kind):
    assert agreement(*trained_fully, kind, 400, tmp_path) >= 0.9


def enlarged(image, *size):
    return ImageOps.expand(ImageOps.invert(Image.fromarray(image.numpy())).resize(size), 20, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_a_photo_of_any_mode_becomes_an_image(sample, tmp_path, mode):
    photo = enlarged(sample[0][1], 200, 200)
    if mode == "I;16":
        photo = Image.fromarray(np.asarray(photo).astype(np.uint16) * 257)
    else:
        photo = photo.convert("RGB").convert(mode)
    found = seen(photo, tmp_path)
    assert (found.shape, found.dtype) == ((28, 28), torch.uint8)
    assert np.corrcoef(found.flatten(), sample[0][1].flatten())[0, 1] > 0.75


def test_a_photo_is_turned_as_its_exif_says(sample, tmp_path):
    photo = enlarged(sample[0][1], 200, 200)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown after a turn to the right
    photo.rotate(90, expand=True).save(tmp_path / "turned.png", exif=turned)
    found = fashion.prepare(fashion.open_photo(tmp_path / "turned.png"))
    torch.testing.assert_close(found, seen(photo, tmp_path), atol=1, rtol=0)


def test_light_on_black_stays_light_on_black(sample, tmp_path):
    found = seen(ImageOps.invert(enlarged(sample[0][1], 200, 200)), tmp_path)
    assert np.corrcoef(found.flatten(), sample[0][1].flatten())[0, 1] > 0.75


def test_a_transparent_background_is_background(tmp_path):
    photo = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    photo.paste((200, 30, 30, 255), (20, 10, 40, 30))
    assert (seen(photo, tmp_path)[2:-2, 2:-2] > 100).all()


def blank(sigma):
    pixels = np.random.default_rng(0).normal(230, sigma, (400, 600, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "photo",
    [
        *(Image.new("RGB", (50, 70), color) for color in ("white", "black", "gray")),
        Image.new("L", (1, 1)), Image.new("L", (1, 3000)), Image.new("RGBA", (90, 90)),
        Image.new("I;16", (90, 90)), blank(3), blank(10), blank(25),
    ],
)  # fmt: skip
def test_nothing_but_background_is_refused(tmp_path, photo):
    with pytest.raises(ValueError, match=r"^nothing but background$"):
        seen(photo, tmp_path)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_photos_of_32_bits_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match="32 bits"):
        seen(Image.fromarray(np.arange(10_000, dtype=dtype).reshape(100, 100)), tmp_path)


def test_a_large_photo_is_shrunk_before_it_is_copied(sample, tmp_path, monkeypatch):
    enlarged(sample[0][1], 4000, 4000).convert("RGBA").save(tmp_path / "photo.png")
    convert, sizes = Image.Image.convert, []
    monkeypatch.setattr(
        Image.Image, "convert", lambda i, *a, **k: sizes.append(i.size) or convert(i, *a, **k)
    )
    fashion.prepare(fashion.open_photo(tmp_path / "photo.png"))
    assert sizes
    assert max(map(max, sizes)) <= 1000


def test_predict_names_photos_and_goes_on_after_a_broken_one(trained, tmp_path, sample, capsys):
    model, out = trained
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


def test_names_from_outside_cannot_steer_the_terminal(trained, tmp_path, sample, monkeypatch):
    _, out = trained
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


def test_a_closed_stdout_is_no_error(trained, tmp_path, sample, monkeypatch):
    enlarged(sample[0][0], 300, 300).save(tmp_path / "photo.png")
    monkeypatch.setattr(sys, "stdout", None)
    assert fashion.main(["--out", str(trained[1]), "--predict", str(tmp_path / "photo.png")]) == 0


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
    fashion.train_epoch(model, *(t[:500] for t in sample), torch.optim.SGD(model.parameters(), 0.1))
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
            fashion.train_epoch(model, images, labels, optimizer, batch_size=100)
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
    losses = [
        fashion.train_epoch(model, images, labels, optimizer, batch_size=50) for _ in range(4)
    ]
    assert sorted(losses, reverse=True) == losses
    assert fashion.evaluate(model, images, labels)[1] > 0.8


def test_the_mean_loss_is_that_of_each_picture():
    torch.manual_seed(0)
    model = Recorder()
    labels = torch.randint(10, (103,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    images = torch.zeros(103, 28, 28, dtype=torch.uint8)
    loss = fashion.train_epoch(model, images, labels, optimizer, batch_size=10)
    assert loss == pytest.approx(math.log(10))


def test_the_loss_is_the_smoothed_cross_entropy_of_the_logits():
    model, labels = Recorder(), torch.arange(10).repeat(3)
    with torch.no_grad():
        model.weight.copy_(torch.arange(10) / 3)  # the logits of every image
    logits = np.arange(10) / 3
    log_p = logits - np.log(np.exp(logits).sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    images = torch.zeros(30, 28, 28, dtype=torch.uint8)
    loss = fashion.train_epoch(model, images, labels, optimizer, batch_size=10)
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
    assert fashion.evaluate(model, *fashion.load(folder, train=False))[1] == metrics["test"] > 0.3


def test_the_confusion_counts_true_classes_in_rows(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(fashion, "draw_confusion", lambda c: drawn.append(c) or fashion.Figure())
    test, model = fashion.load(folder, train=False), fashion.Classifier(width=16)
    fashion.report(model, [fashion.Epoch(1, 1.0, 1.0, 0.5, 1.0)], test, tmp_path)
    expected = np.zeros((10, 10))
    np.add.at(expected, (test[1].numpy(), fashion.predict(model, test[0]).argmax(1).numpy()), 1)
    np.testing.assert_array_equal(drawn[0], expected)


def test_a_closed_pipe_ends_quietly_after_the_network_is_saved(folder, tmp_path):
    command = [sys.executable, fashion.__file__, "--data", folder, "--out", tmp_path]
    process = subprocess.Popen(
        [*command, "--epochs", "1", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
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
        ("--data . --sample", "argument --data: must be a folder, and without --sample"),
        ("--out a\0b", "argument --out: must be a name without NUL"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        fashion.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_broken_data_ends_in_one_line_and_status_1(folder, tmp_path, capsys):
    labels_file(folder).write_bytes(b"")
    assert fashion.main(["--data", str(folder), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(labels_file(folder)) in error


def test_too_few_pictures_are_refused(folder, sample, tmp_path, capsys):
    images, labels = (tensor[:59].numpy() for tensor in sample)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    labels_file(folder).write_bytes(idx(labels))
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
