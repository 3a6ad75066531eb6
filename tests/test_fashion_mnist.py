import gzip
import importlib
import io
import json
import math
import re
import tempfile
from pathlib import Path

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
        (images_file, gzip.compress(b"a page that says 404"), "20 bytes are no IDX file"),
        (labels_file, idx(np.zeros(1200))[:-1], "1207 bytes are no IDX file"),
        (labels_file, idx(np.zeros(1200)) + b"\0", "1209 bytes are no IDX file"),
        (labels_file, b"\0\0\x0d\x01" + idx(np.zeros(1200))[4:], "1208 bytes are no IDX file"),
        (labels_file, idx(np.zeros(0)), "8 bytes are no IDX file"),
        (labels_file, idx(np.zeros((600, 2))), "1212 bytes are no IDX file"),
        (labels_file, idx(np.zeros(1199)), "1200 pictures and 1199 labels"),
        (labels_file, idx(np.full(1200, 10)), "labels up to 10"),
        (images_file, gzip.compress(idx(np.zeros((1200, 32, 32)))), "are no IDX file"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value)[:20],
)
def test_a_broken_file_is_named(folder, file, content, message):
    file(folder).write_bytes(content)
    with pytest.raises(OSError, match=message) as caught:
        fashion.load(folder, train=True)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


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


@settings(deadline=None, max_examples=200)
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
    """A network trained for two epochs on the sample, and saved."""
    torch.manual_seed(0)
    images, labels = fashion.load(fashion.SAMPLE, train=True)
    model = fashion.Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        fashion.train_epoch(model, images, labels, optimizer, batch_size=200)
    out = tmp_path_factory.mktemp("trained")
    fashion.write(out / "model.safetensors", safetensors.torch.save(model.state_dict()))
    return model, out


def photo_of(picture, dark=False):
    """Enlarge a picture to 400x300 on white, as a JPEG that only its EXIF turns upright."""
    image = Image.fromarray(picture.numpy())
    image = image if dark else ImageOps.invert(image)
    canvas = Image.new("RGB", (400, 300), "black" if dark else "white")
    canvas.paste(image.resize((300, 300), Image.Resampling.BICUBIC), (50, 0))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown after a turn to the right
    file = io.BytesIO()
    canvas.rotate(90, expand=True).save(file, "JPEG", exif=turned)
    return Image.open(file)


@pytest.mark.parametrize("dark", [False, True])
def test_photos_are_classified_as_the_pictures_they_were_made_of(trained, dark):
    model, _ = trained
    images, labels = fashion.load(fashion.SAMPLE, train=False)
    right = fashion.predict(model, images).argmax(dim=1) == labels
    images, labels = images[right][:500], labels[right][:500]
    photos = torch.stack([fashion.prepare(photo_of(picture, dark)) for picture in images])
    guesses = fashion.predict(model, photos).argmax(dim=1)
    assert (guesses == labels).double().mean() >= 0.95


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"]
)
def test_a_photo_of_any_mode_becomes_a_picture(sample, mode):
    picture = sample[0][1]
    image = ImageOps.invert(Image.fromarray(picture.numpy())).resize((90, 90))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    else:
        image = image.convert("RGB").convert(mode)
    prepared = fashion.prepare(image)
    assert (prepared.shape, prepared.dtype) == ((28, 28), torch.uint8)
    correlation = np.corrcoef(prepared.flatten(), picture.flatten())[0, 1]
    assert correlation > 0.8


def test_a_transparent_background_is_background():
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (20, 10, 40, 30))
    prepared = fashion.prepare(image)
    assert (prepared > 100).all()


def test_an_empty_photo_is_black():
    for color in ("white", "black", "gray"):
        assert fashion.prepare(Image.new("RGB", (50, 70), color)).eq(0).all()


def test_predict_names_photos_and_goes_on_after_a_broken_one(trained, tmp_path, sample, capsys):
    model, out = trained
    good, text, bomb = tmp_path / "good one.png", tmp_path / "text.jpg", tmp_path / "bomb.png"
    ImageOps.exif_transpose(photo_of(sample[0][0])).save(good)
    text.write_text("no picture")
    Image.new("1", (20_000, 10_000)).save(bomb)
    broken = [text, tmp_path / "missing.png", tmp_path, bomb]
    arguments = ["--out", str(out), "--predict", *map(str, broken[:2]), str(good)]
    assert fashion.main([*arguments, *map(str, broken[2:])]) == 1
    captured = capsys.readouterr()
    for path in broken:
        assert sum(line.startswith(f"{path}: ") for line in captured.err.splitlines()) == 1
    assert len(captured.err.splitlines()) == len(broken)
    *picture, answer = captured.out.splitlines()
    assert len(picture) == 14
    assert all(line.count("▀") == 28 for line in picture)
    best = fashion.predict(model, fashion.prepare(photo_of(sample[0][0]))[None]).argmax().item()
    assert answer.startswith(f"{good}: {fashion.CLASSES[best]} ")
    assert len(re.findall(r"[\d.]+%", answer)) == 3


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"a text",
        safetensors.torch.save({"layers.1.weight": torch.zeros(3, 3)}),
        safetensors.torch.save(fashion.Classifier(width=8).state_dict()),
        safetensors.torch.save(fashion.Classifier().state_dict())[:-1],
    ],
    ids=["missing", "empty", "text", "other", "narrower", "truncated"],
)
def test_a_model_that_is_none_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert fashion.main(["--out", str(tmp_path), "--predict", "photo.jpg"]) == 1
    error = capsys.readouterr().err
    assert str(path) in error
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


def test_a_loss_that_is_no_number_stops_the_training(sample):
    model = fashion.Classifier(width=8)
    nn.init.constant_(model.layers[-1].bias, math.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match=r"nan.*--lr"):
        fashion.train_epoch(model, *(t[:100] for t in sample), optimizer)


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
    (tmp_path / "model.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"{file} can't be written: No space left"):
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
    assert "1,180 pictures to learn from" in done.stdout
    for name in ("history", "confusion", "answers", "mistakes"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert [row[0] for row in metrics["epochs"]] == [1, 2]
    assert f"Test: {metrics['test_accuracy']:.2%} of 300 pictures" in done.stdout

    torch.set_float32_matmul_precision("medium")  # as the script does
    model = fashion.Classifier()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "out/model.safetensors"))
    test = fashion.load(folder, train=False)
    assert fashion.evaluate(model, *test)[1] == metrics["test_accuracy"] > 0.3

    guesses = fashion.predict(model, test[0]).argmax(dim=1).numpy()
    for label, (name, precision, recall) in enumerate(metrics["classes"]):
        both = ((guesses == label) & (test[1].numpy() == label)).sum()
        assert precision == pytest.approx(both / max(1, (guesses == label).sum()))
        assert recall == pytest.approx(both / (test[1].numpy() == label).sum())
        line = rf"^{re.escape(name)} +{precision:.1%} +{recall:.1%}$"
        assert re.search(line, done.stdout, re.MULTILINE)


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_run_of_few_steps_ends_well(folder, tmp_path, capsys, epochs):
    arguments = ["--data", str(folder), "--epochs", str(epochs), "--batch-size", "1100"]
    assert fashion.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0


def test_the_same_seed_gives_the_same_weights(folder, tmp_path, capsys):
    def weights(out, seed):
        arguments = ["--data", str(folder), "--epochs", "1", "--batch-size", "100"]
        arguments += ["--seed", str(seed), "--device", "cpu", "--out", str(tmp_path / out)]
        assert fashion.main(arguments) == 0
        return (tmp_path / out / "model.safetensors").read_bytes()

    assert weights("a", 3) == weights("b", 3) != weights("c", 4)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--batch-size", "1"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--device", "abacus"],
        ["--data", "no/such/folder"],
        ["--data", ".", "--sample"],
        ["--epochs", "many"],
    ],
)
def test_a_value_that_makes_no_sense_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        fashion.main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


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
    assert re.fullmatch(f".*{folder}: 59 pictures are too few.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_broken_loss_ends_in_one_line_and_saves_nothing(
    folder, tmp_path, capsys, monkeypatch, loss
):
    monkeypatch.setattr(fashion.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * loss)
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
