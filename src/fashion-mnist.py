#!/usr/bin/env python3
"""A feed-forward network learns to classify pictures of clothing: Fashion-MNIST.

Run `poetry run src/fashion-mnist.py`. It trains on images of 28x28 pixels (Xiao, Rasul and Vollgraf
2017, arXiv 1708.07747), reports on a validation split after every epoch and on the test set once,
and fills runs/fashion-mnist/, all in about 30 s. Then `--predict photo.jpg` classifies a photo.
"""

import argparse
import contextlib
import gzip
import io
import json
import math
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "data/FashionMNIST/raw"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = ROOT / "data/fashion-mnist-sample"
OUT = ROOT / "runs/fashion-mnist"
SAMPLE_NOTE = " (one sixth of the data; go online or pass --data for all of it)"
MOST_IMAGES = 1_000_000  # a file that announces more is broken
PHOTO_SIDE = 224  # pixels, enough to cut out a garment
SMALLEST = 0.004  # of a photo, that a garment covers
Split = tuple[Tensor, Tensor]  # images (N, 28, 28) uint8, labels (N,) int64


class Epoch(NamedTuple):
    """A row of the table: what an epoch brought."""

    epoch: int
    training_loss: float
    validation_loss: float
    accuracy: float
    seconds: float


def read_idx(path: Path, *size: int) -> Tensor:
    """Read (N, *size) uint8 from `path`.gz or else `path`, and no more than the header announces.

    Raises OSError if the file is truncated or invalid.
    """
    zipped = path.with_name(path.name + ".gz")
    path = zipped if zipped.exists() else path
    with path.open("rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path == zipped else raw
        try:
            header = file.read(4 * (2 + len(size)))
            count = int.from_bytes(header[4:8])
            content = bytearray(file.read(min(count, MOST_IMAGES) * math.prod(size) + 1))
        except (EOFError, OSError, zlib.error) as error:
            raise OSError(f"{path} is broken: {error}") from error
    expected = np.array((0x801 + len(size), count, *size), ">u4").tobytes()
    if count < 1 or header != expected or len(content) != count * math.prod(size):
        shape = ", ".join(map(str, ("N", *size)))
        found = f"{len(header) + len(content)} bytes or more of something else"
        raise OSError(f"{path} is broken: expected an IDX file of shape ({shape}), got {found}")
    return torch.frombuffer(content, dtype=torch.uint8).view(count, *size)


def load(folder: Path, train: bool) -> Split:
    """Read the training or the test split. Raises OSError if its files are missing or broken."""
    name = "train" if train else "t10k"
    images = read_idx(folder / f"{name}-images-idx3-ubyte", 28, 28)
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte")
    if len(images) != len(labels) or labels.max() >= len(CLASSES):
        counts = f"{len(images)} images and {len(labels)} labels up to {labels.max()}"
        raise OSError(f"{folder} is broken: {counts} for {name} don't fit")
    return images, labels.long()


def download(folder: Path, seconds: float = 30.0) -> None:
    """Let torchvision fetch the data (30 MB) to `folder`, .../FashionMNIST/raw, or raise OSError.

    It has no timeout, so it gets a process of its own.
    """
    code = "import sys, torchvision as t; t.datasets.FashionMNIST(sys.argv[1], download=True)"
    command = [sys.executable, "-c", code, str(folder.parents[1])]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"download: not done after {seconds:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise OSError(f"download: {error.stderr.strip().splitlines()[-1]}") from None


def find_data(given: Path | None = None) -> tuple[Path, Split, Split, list[str]]:
    """Read the given folder, or else the first complete copy of the data.

    Return its folder, both splits, and what is wrong with other copies; or raise OSError.
    """
    problems: list[str] = []
    if given:
        return given, load(given, train=True), load(given, train=False), problems
    for folder in (RAW, DEBIAN):
        try:
            return folder, load(folder, train=True), load(folder, train=False), problems
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(str(error))
    try:
        download(RAW)
        return RAW, load(RAW, train=True), load(RAW, train=False), problems
    except OSError as error:
        problems.append(str(error))
    return SAMPLE, load(SAMPLE, train=True), load(SAMPLE, train=False), problems


def open_photo(path: Path) -> Image.Image:
    """Read a photo: upright, RGB, on white if transparent, at most `PHOTO_SIDE` pixels a side."""
    with Image.open(path) as file:
        size = (4 * PHOTO_SIDE, 4 * PHOTO_SIDE)
        file.thumbnail(size, Image.Resampling.NEAREST)  # makes no copy of the original's size
        image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode in ("I", "F"):  # whose range may be anything
        raise ValueError("32 bits per pixel and channel are too many; 16 are not")
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = PHOTO_SIDE / max(image.size)
    return image.resize((max(8, round(scale * image.width)), max(8, round(scale * image.height))))


def prepare(photo: Image.Image) -> Tensor:
    """Turn a photo of a garment into an image as in the data set: uint8 (28, 28), light on black.

    GrabCut (Rother, Kolmogorov and Blake 2004) cuts out what differs from the border. Then, as in
    section 2 of Xiao, Rasul and Vollgraf 2017, it is made negative and cropped, and its longer side
    becomes 28 pixels. Raises ValueError if there is nothing but background.
    """
    pixels = cv2.bilateralFilter(np.asarray(photo), 5, 30, 3)  # removes noise, keeps edges
    border = np.ones(pixels.shape[:2], dtype=bool)
    edge = max(1, min(photo.size) // 20)
    border[edge:-edge, edge:-edge] = False
    small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)
    inside = np.pad(np.ones((28, 28), dtype=np.uint8), 2)
    table = cv2.resize(cv2.inpaint(small, inside, 3, cv2.INPAINT_TELEA), photo.size)
    off = cv2.absdiff(pixels, table)  # from what the border lets expect
    differs = (off > 3 * (off[border].mean(axis=0) + 8)).any(axis=-1)
    mask = np.where(differs, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    mask[border] = cv2.GC_BGD
    if (mask == cv2.GC_PR_FGD).mean() > SMALLEST:
        cv2.setRNGSeed(0)  # GrabCut draws at random; the same photo shall give the same image
        colors = np.zeros((1, 65))  # GrabCut fills it
        cv2.grabCut(pixels, mask, (0, 0, 1, 1), colors, colors.copy(), 5, cv2.GC_INIT_WITH_MASK)
    _, parts, stats, _ = cv2.connectedComponentsWithStats((mask == cv2.GC_PR_FGD).astype(np.uint8))
    areas = stats[:, cv2.CC_STAT_AREA]
    areas[0] = 0  # the background
    if areas.max() < SMALLEST * mask.size:
        raise ValueError("nothing but background")
    garment = (areas > areas.max() / 20)[parts]

    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(float)
    if np.median(gray[~garment]) > 60:  # on black, a photo is as light as the data set
        gray = 255 - gray
    gray *= 255 / max(1, np.percentile(gray[garment], 99))
    image = Image.fromarray((gray * garment).clip(0, 255).astype(np.uint8))
    tilt = (cv2.minAreaRect(cv2.findNonZero(garment.astype(np.uint8)))[2] + 45) % 90 - 45
    if abs(tilt) <= 12:  # more may be its shape
        image = image.rotate(tilt, Image.Resampling.BILINEAR, expand=True)
    image = image.crop(image.point(lambda value: 255 * (value > 8)).getbbox())
    return torch.from_numpy(np.array(ImageOps.pad(image, (28, 28), Image.Resampling.BOX)))


class Classifier(nn.Module):
    """Three linear layers: images (B, 28, 28) uint8 -> logits (B, 10).

    Pixels are bytes; the square root brightens dark garments against the black background. Batch
    normalization (Ioffe and Szegedy 2015) undoes any shift and scale, so what comes before it needs
    no bias and no normalization.
    """

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, width, bias=False),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Linear(width, len(CLASSES)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, 10) of images (B, 28, 28) uint8."""
        return self.layers(images.float().add_(1e-9).sqrt_())  # as the root of 0 is slow


def augment(images: Tensor) -> Tensor:
    """Mirror the first half of images (B, 28, 28); shift three batches in ten by up to a pixel."""
    half = len(images) // 2
    images = torch.cat((images[:half].flip(-1), images[half:]))
    if torch.rand(()) < 0.3:
        y, x = torch.randint(3, (2,)).tolist()
        images = F.pad(images, (1, 1, 1, 1))[:, y : y + 28, x : x + 28]
    return images


def train_epoch(
    model: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer,
    schedule: LRScheduler | None = None, batch_size: int = 500,
) -> float:  # fmt: skip
    """Train on every image once, augmented and in random order; return the mean loss.

    A batch has `batch_size` images or more.
    """
    model.train()
    order = torch.randperm(len(images)).to(images.device)
    batches = order.tensor_split(max(1, len(order) // batch_size))
    total = torch.zeros((), device=images.device)
    for batch in tqdm(batches, leave=False, disable=None):
        logits = model(augment(images.index_select(0, batch)))
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()
        total += loss.detach() * len(batch)
    return total.item() / len(images)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return logits (N, 10) of images (N, 28, 28) uint8: the mean of each and its mirror image."""
    model.eval()
    return torch.cat([(model(x) + model(x.flip(-1))) / 2 for x in images.split(2500)])


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy, in nats, and the accuracy, between 0 and 1."""
    logits = predict(model, images)
    accuracy = (logits.argmax(dim=1) == labels).cpu().double().mean()
    return F.cross_entropy(logits, labels).item(), accuracy.item()


def hold_out(split: Split) -> tuple[Split, Split]:
    """Return 59 in 60 for training and the rest for validation, drawn at random."""
    order = torch.randperm(len(split[0]))
    kept = len(order) - len(order) // 60
    if kept == len(order):
        raise OSError(f"{kept} images are too few to hold some back for validation")
    images, labels = (tensor[order] for tensor in split)
    return (images[:kept], labels[:kept]), (images[kept:], labels[kept:])


def fit(
    model: nn.Module,
    train: Split,
    validation: Split,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> Iterator[Epoch]:
    """Train, and yield how it stands after each epoch.

    The learning rate rises to its highest value and falls again (Smith and Topin 2017, arXiv
    1708.07120). Raises FloatingPointError if a loss isn't finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    steps = max(6, epochs * max(1, len(train[0]) // batch_size))  # OneCycleLR fails at 5 steps
    schedule = OneCycleLR(
        optimizer,
        learning_rate,
        steps,
        pct_start=0.2,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        loss = train_epoch(model, *train, optimizer, schedule, batch_size)
        validation_loss, accuracy = evaluate(model, *validation)
        if not math.isfinite(loss + validation_loss):
            raise FloatingPointError("the loss isn't finite; a smaller --learning-rate may help")
        yield Epoch(epoch, loss, validation_loss, accuracy, time.perf_counter() - start)


def draw_history(rows: Sequence[Epoch]) -> Figure:
    """Draw loss and accuracy by epoch."""
    epoch, training, validation, accuracy, _ = zip(*rows, strict=True)
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, subplot_kw={"xlabel": "epoch"})
    left.plot(epoch, training, "o-", epoch, validation, "o-")
    left.legend(["training loss, labels smoothed", "validation loss"])
    right.plot(epoch, accuracy, "o-")
    right.legend(["validation accuracy"])
    right.locator_params(axis="x", integer=True)
    return figure


def draw_confusion(confusion: Tensor) -> Figure:
    """Draw how often each class (row) was predicted as each class (column)."""
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    axes = figure.subplots(subplot_kw={"xlabel": "predicted class", "ylabel": "true class"})
    axes.imshow(confusion.sqrt().numpy(), cmap="Blues")
    for (i, j), count in np.ndenumerate(confusion.numpy()):
        axes.text(j, i, count, ha="center", va="center", color="white" if i == j else "black")
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    return figure


def draw_answers(images: Tensor, labels: Tensor, guesses: Tensor) -> Figure:
    """Draw the first 24 images with their predicted and true classes."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(4, 6, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    for axes, image, label, guess in zip(panels.flat, images, labels, guesses, strict=False):
        axes.imshow(image.numpy(), cmap="gray")
        color = "black" if guess == label else "firebrick"
        axes.set_title(
            f"predicted {CLASSES[guess]}\ntrue {CLASSES[label]}", fontsize=8, color=color
        )
    return figure


def show_image(image: Tensor) -> None:
    """Print an image (28, 28), each character two pixels, in the 24 grays of a terminal."""
    for rows in (232 + image.long() * 24 // 256).view(14, 2, 28).tolist():
        pixels = (f"\x1b[38;5;{top};48;5;{bottom}m▀" for top, bottom in zip(*rows, strict=True))
        print("".join(pixels) + "\x1b[0m")


def printable(text: object) -> str:
    """Return text without control characters, which could steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def write(path: Path, content: bytes) -> None:
    """Write a temporary file, then rename it, so that a crash never leaves a partial file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def usable_device(name: str) -> torch.device:
    """Parse --device; argparse refuses the option unless a tensor can be made there."""
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # each kind of device fails in its own way
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{name!r} can't be used here: {reason}") from None
    return torch.device(name)


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of numbers from `low` to `high`, which are whole if `low` is."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := type(low)(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"must be between {low:,} and {high:,}")

    return parse


def load_model(path: Path) -> Classifier:
    """Read a saved network. Raises OSError if the file holds something else."""
    model = Classifier()
    expected = {name: (x.shape, x.dtype) for name, x in model.state_dict().items()}
    try:
        weights = safetensors.torch.load_file(path)
        if {name: (x.shape, x.dtype) for name, x in weights.items()} != expected:
            raise ValueError("its weights are those of another network")
        if not all(x.isfinite().all() for x in weights.values()):
            raise ValueError("some weights are not finite")
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise OSError(
            f"{path}: not a model saved by this script; train one first: {error}"
        ) from error
    model.load_state_dict(weights)
    return model


def print_photos(model: nn.Module, photos: Sequence[Path]) -> int:
    """Show what the network sees of each photo and predicts; return 1 if one fails, else 0."""
    status = 0
    for photo in photos:
        try:
            image = prepare(open_photo(photo))
        except Exception as error:  # Pillow's decoders raise all kinds for a broken file
            print(printable(f"{photo}: {error}"), file=sys.stderr)
            status = 1
            continue
        show_image(image)
        best = zip(*predict(model, image.unsqueeze(0)).softmax(dim=1)[0].topk(3), strict=True)
        print(printable(photo), ", ".join(f"{CLASSES[i]} {p:.1%}" for p, i in best), sep=": ")
    print(end="", flush=True)
    return status


def report(model: nn.Module, rows: Sequence[Epoch], test: Split, out: Path) -> float:
    """Draw pictures of how well the network predicts, in the folder `out`; return its accuracy."""
    images, labels = test
    logits = predict(model, images.to(next(model.parameters()).device)).cpu()
    guesses = logits.argmax(dim=1)
    confusion = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    confusion.index_put_((labels, guesses), torch.tensor(1), accumulate=True)
    hardest = F.cross_entropy(logits, labels, reduction="none").argsort(descending=True)
    mistakes = hardest[guesses[hardest] != labels[hardest]]
    figures = {
        "history": draw_history(rows),
        "confusion": draw_confusion(confusion),
        "answers": draw_answers(images, labels, guesses),
        "mistakes": draw_answers(images[mistakes], labels[mistakes], guesses[mistakes]),
    }
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
        write(out / f"{name}.png", file.getvalue())
    return (guesses == labels).double().mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save and report, or classify photos; return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook, nor if stdout is closed
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", write_through=False)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add = parser.add_argument
    add("--data", type=Path, help="folder with the four IDX files; searched for if omitted")
    add("--sample", action="store_true", help="use the bundled sample instead of --data")
    add("--epochs", type=number(1, 10_000), default=16, help="passes over the images")
    add("--batch-size", type=number(2, 100_000), default=500, help="images per step")
    add("--learning-rate", type=number(1e-9, 10.0), default=6e-3, help="the highest one")
    add("--seed", type=number(0, 2**63 - 1), default=0, help="fixes every random choice")
    add("--device", type=usable_device, default=device, help="where to compute")
    add("--out", type=Path, default=OUT, help="folder for the results")
    add("--predict", type=Path, nargs="+", metavar="PHOTO", help="classify, instead of training")
    args = parser.parse_args(argv)
    if args.data and (args.sample or not args.data.is_dir()):
        parser.error("argument --data: must be a folder, and without --sample")
    if "\0" in str(args.out):
        parser.error("argument --out: must be a name without NUL")
    started = time.perf_counter()
    try:
        if args.predict:
            return print_photos(load_model(args.out / "model.safetensors"), args.predict)

        args.out.mkdir(parents=True, exist_ok=True)
        folder, train, test, problems = find_data(SAMPLE if args.sample else args.data)
        for problem in problems:
            print(printable(f"{parser.prog}: skipped: {problem}"), file=sys.stderr)
        torch.manual_seed(args.seed)
        train, validation = ((x.to(args.device), y.to(args.device)) for x, y in hold_out(train))
        model = Classifier().to(args.device)
        print(f"Data: {printable(folder)}{SAMPLE_NOTE if folder == SAMPLE else ''}")
        print(f"{len(train[0]):,} training images, {len(validation[0]):,} for validation\n")
        print("epoch  training loss  validation loss  accuracy  seconds")
        rows = []
        for row in fit(model, train, validation, args.epochs, args.batch_size, args.learning_rate):
            losses = f"{row.training_loss:13.4f}  {row.validation_loss:15.4f}"
            print(f"{row.epoch:5}  {losses}  {row.accuracy:8.2%}  {row.seconds:7.1f}")
            rows.append(row)
        write(args.out / "model.safetensors", safetensors.torch.save(model.state_dict()))
        accuracy = report(model, rows, test, args.out)
        metrics = vars(args) | {"data": folder, "torch": torch.__version__, "test": accuracy}
        metrics["epochs"] = [row._asdict() for row in rows]
        write(args.out / "metrics.json", json.dumps(metrics, indent=1, default=str).encode())
        print(f"\nTest: {accuracy:.2%} of {len(test[0]):,} images")
        print(f"\nSaved in {printable(args.out)} after {time.perf_counter() - started:.1f} s")
        print(end="", flush=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, FloatingPointError) as error:
        print(f"{parser.prog}: {printable(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
