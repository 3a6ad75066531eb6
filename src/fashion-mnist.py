#!/usr/bin/env python3
"""A feed-forward network learns to classify pictures of clothing: Fashion-MNIST.

Run `poetry run src/fashion-mnist.py`. It trains on images of 28x28 pixels (Xiao, Rasul and Vollgraf
2017, arXiv 1708.07747), reports on a validation split after every epoch and on the test set once,
and fills runs/fashion-mnist/, all in about 40 s. Then `--predict photo.jpg` classifies a photo.
"""

import argparse
import contextlib
import gzip
import io
import json
import math
import os
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SAMPLE = Path(__file__).resolve().parent.parent / "data/fashion-mnist-sample"  # of the repository
LARGEST = 2**27  # bytes of a data file; that of the training images has 47,040,016
Split = tuple[Tensor, Tensor]  # images (N, 28, 28) uint8, labels (N,) int64


def read_idx(path: Path) -> Tensor:
    """Read the bytes of an IDX file, gzipped or not, in their shape. Raises OSError if it can't.

    It begins with 0, 0, 8 for bytes, and the number of dimensions; then come their sizes, four
    bytes each, and the bytes.
    """
    zipped = path.with_name(path.name + ".gz")
    if not (path.is_file() or zipped.is_file()):
        raise FileNotFoundError(f"{path.parent} needs a file {path.name} or {zipped.name}")
    # Where both are there, as torchvision leaves them, the plain one is read.
    found = path if path.is_file() else zipped
    try:
        with gzip.open(found) if found == zipped else found.open("rb") as file:
            content = bytearray(file.read(LARGEST + 1))
        dimensions = content[3]
        shape = [int.from_bytes(content[4 * n : 4 * n + 4]) for n in range(1, dimensions + 1)]
        return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dimensions).view(shape)
    except (EOFError, IndexError, OSError, RuntimeError, ValueError, zlib.error) as error:
        raise OSError(f"{found} is broken: {error}") from error


def load(folder: Path, name: str) -> Split:
    """Read a split, `train` or `t10k`, of a folder of IDX files. Raises OSError if it is broken."""
    images = read_idx(folder / f"{name}-images-idx3-ubyte")
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte")
    if images.shape != (len(labels), 28, 28) or labels.dim() != 1 or labels.max() > 9:
        raise OSError(f"{folder} is broken: {name} doesn't have 28x28 pixels and a class per image")
    return images, labels.long()


def open_data(folder: Path | None) -> tuple[str, Split, Split]:
    """Return where the data comes from, the training split and the test split.

    Without a folder, torchvision downloads all 70,000 images (30 MB) to data/, unless they are
    there; offline, the repository's sample must do. Raises OSError if there is no data.
    """
    if folder:
        return str(folder), load(folder, "train"), load(folder, "t10k")
    from torchvision.datasets import FashionMNIST  # takes seconds, and no other way needs it

    socket.setdefaulttimeout(10)  # seconds without an answer; torchvision would wait for ever
    try:
        train, test = (FashionMNIST("data", train, download=True) for train in (True, False))
        return "data/FashionMNIST", (train.data, train.targets), (test.data, test.targets)
    except Exception as error:  # no network, or a broken file: it fails in many ways
        if not SAMPLE.is_dir():
            message = "can't download the data, and the sample is only in the repository; --data"
            raise OSError(f"{message} takes a folder of the four files") from error
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
    source = f"{SAMPLE}, one sixth of all; pass --data, or go online ({reason})"
    return source, load(SAMPLE, "train"), load(SAMPLE, "t10k")


class Epoch(NamedTuple):
    """A row of the table: the results of one epoch."""

    epoch: int
    training_loss: float
    validation_loss: float
    accuracy: float
    seconds: float


class Classifier(nn.Module):
    """Three linear layers: images (B, 28, 28) uint8 -> logits (B, 10).

    Pixels are bytes; the square root brightens dark garments against the black background. Batch
    normalization (Ioffe and Szegedy 2015) undoes any shift and scale, so the layer before needs no
    bias, and its input no normalization.
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
        return self.layers((images.float() + 1e-9).sqrt())  # on a CPU, the root of 0 is slow


def augment(images: Tensor) -> Tensor:
    """Mirror the first half of images (B, 28, 28); shift three batches in ten by up to a pixel."""
    half = len(images) // 2
    images = torch.cat((images[:half].flip(-1), images[half:]))
    if torch.rand(()) < 0.3:
        y, x = torch.randint(3, (2,)).tolist()
        images = F.pad(images, (1, 1, 1, 1))[:, y : y + 28, x : x + 28]
    return images


def train_epoch(
    model: nn.Module, split: Split, optimizer: Optimizer, schedule: LRScheduler, batch_size: int
) -> float:
    """Train on every image once, augmented and in random order; return the mean loss."""
    images, labels = split
    model.train()
    order = torch.randperm(len(images)).to(images.device)
    batches = order.tensor_split(max(1, len(order) // batch_size))  # of that size or more
    total = torch.zeros((), device=images.device)
    for batch in tqdm(batches, leave=False, disable=None):
        logits = model(augment(images.index_select(0, batch)))
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
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
    """Train, and yield the results of each epoch.

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
        loss = train_epoch(model, train, optimizer, schedule, batch_size)
        validation_loss, accuracy = evaluate(model, *validation)
        if not math.isfinite(loss + validation_loss):
            raise FloatingPointError("the loss isn't finite; a smaller --learning-rate may help")
        yield Epoch(epoch, loss, validation_loss, accuracy, time.perf_counter() - start)


def show_epochs(epochs: Iterator[Epoch]) -> list[Epoch]:
    """Print the results of each epoch as it ends; return them all."""
    rows = []
    print("epoch  training loss  validation loss  accuracy  seconds")
    for row in epochs:
        losses = f"{row.training_loss:13.4f}  {row.validation_loss:15.4f}"
        print(f"{row.epoch:5}  {losses}  {row.accuracy:8.2%}  {row.seconds:7.1f}", flush=True)
        rows.append(row)
    return rows


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
        title = f"predicted {CLASSES[guess]}\ntrue {CLASSES[label]}"
        axes.set_title(title, fontsize=8, color="black" if guess == label else "firebrick")
    return figure


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of numbers from `low` to `high`, which are whole if `low` is."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = type(low)(text)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"must be between {low:,} and {high:,}")

    return parse


def usable_device(name: str) -> torch.device:
    """Parse --device; argparse refuses the option unless a tensor can be made there."""
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # each kind of device fails in its own way
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{name!r} can't be used here: {reason}") from None
    return torch.device(name)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add = parser.add_argument
    add("--data", type=Path, help="folder with the four IDX files, else torchvision's download")
    add("--sample", action="store_true", help="use the repository's sample")
    add("--epochs", type=number(1, 10_000), default=16, help="passes over the images")
    add("--batch-size", type=number(2, 100_000), default=500, help="images per step")
    add("--learning-rate", type=number(1e-9, 10.0), default=6e-3, help="highest value")
    add("--seed", type=number(0, 2**63 - 1), default=0, help="fixes every random choice")
    add("--device", type=usable_device, default=device, help="where to compute")
    add("--out", type=Path, default="runs/fashion-mnist", help="folder for the results")
    add("--predict", type=Path, nargs="+", metavar="PHOTO", help="classify photos and exit")
    return parser


def load_model(path: Path) -> Classifier:
    """Read a saved network. Raises OSError if the file holds something else."""
    if not path.is_file():  # a pipe would be waited for
        raise OSError(f"there is no file {path} yet; train one first")
    model = Classifier()
    try:
        model.load_state_dict(safetensors.torch.load(path.read_bytes()))
        if not all(x.isfinite().all() for x in model.state_dict().values()):
            raise ValueError("some weights are not finite")
    except Exception as error:  # a broken file fails in many ways
        raise OSError(f"{path}: not a model saved by this script; train one first") from error
    return model


def print_photos(model: nn.Module, photos: Sequence[Path]) -> int:
    """Show what the network sees of each photo and predicts; return 1 if one fails, else 0."""
    try:
        from inputs.photo import open_photo, prepare, show_image
        from running.shell import printable
    except ModuleNotFoundError as error:
        needs = "the folders inputs/ and running/ beside this script, and OpenCV"
        raise OSError(f"--predict needs {needs}: {error}") from error
    status = 0
    for photo in photos:
        name = printable(photo)
        try:
            image = prepare(open_photo(photo))
        except Exception as error:  # Pillow's decoders fail in many ways on a broken file
            print(f"{name}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            status = 1
            continue
        if sys.stdout and sys.stdout.isatty():  # a file or a pipe gets the answers only
            show_image(image)
        best = predict(model, image.unsqueeze(0)).softmax(dim=1)[0].topk(3)
        if not best.values.isfinite().all():
            raise FloatingPointError("the saved network computes no numbers; train it again")
        answer = ", ".join(f"{CLASSES[i]} {p:.1%}" for p, i in zip(*best, strict=True))
        print(f"{name}: {answer}", flush=True)
    return status


def draw_test(model: nn.Module, test: Split, out: Path) -> float:
    """Draw how well the network predicts the test images; return its accuracy."""
    images, labels = test
    logits = predict(model, images.to(next(model.parameters()).device)).cpu()
    guesses = logits.argmax(dim=1)
    pairs = (len(CLASSES) * labels + guesses).bincount(minlength=len(CLASSES) ** 2)
    hardest = F.cross_entropy(logits, labels, reduction="none").argsort(descending=True)
    mistakes = hardest[guesses[hardest] != labels[hardest]]
    draw_confusion(pairs.view(len(CLASSES), -1)).savefig(out / "confusion.png", dpi=120)
    draw_answers(images, labels, guesses).savefig(out / "answers.png", dpi=120)
    worst = draw_answers(images[mistakes], labels[mistakes], guesses[mistakes])
    worst.savefig(out / "mistakes.png", dpi=120)
    return (guesses == labels).double().mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save and report, or classify photos; return the exit status."""
    started = time.perf_counter()
    parser = make_parser()
    args = parser.parse_args(argv)
    if not f"{args.data}{args.out}".isprintable():  # they are printed below
        parser.error("arguments --data and --out: must be names that can be printed")
    torch.manual_seed(args.seed)
    try:
        if args.predict:
            return print_photos(load_model(args.out / "model.safetensors"), args.predict)
        args.out.mkdir(parents=True, exist_ok=True)
        source, train, test = open_data(SAMPLE if args.sample else args.data)
        train, validation = ((x.to(args.device), y.to(args.device)) for x, y in hold_out(train))
        model = Classifier().to(args.device)
        print(f"Data: {source}")
        print(f"{len(train[0]):,} training images, {len(validation[0]):,} for validation\n")
        epochs = fit(model, train, validation, args.epochs, args.batch_size, args.learning_rate)
        rows = show_epochs(epochs)
        weights = safetensors.torch.save(model.state_dict())
        (args.out / "model.safetensors").write_bytes(weights)
        draw_history(rows).savefig(args.out / "history.png", dpi=120)
        accuracy = draw_test(model, test, args.out)
        numbers = [row._asdict() for row in rows]
        settings = vars(args) | {"data": source, "torch": torch.__version__}
        metrics = {"settings": settings, "test": accuracy, "epochs": numbers}
        (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1, default=str))
        print(f"\nTest: {accuracy:.2%} of {len(test[0]):,} images\n")
        print(f"Saved in {args.out} after {time.perf_counter() - started:.1f} s", flush=True)
    except (OSError, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on, Ctrl-C leaves no traceback
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so does `| head`
    if sys.stderr is None:  # closed, but progress bars need one
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # not if it is closed
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    raise SystemExit(main())
