#!/usr/bin/env python3
"""A feed-forward network learns to name ten kinds of clothes: Fashion-MNIST.

Run `poetry run src/fashion-mnist.py`. It trains on pictures of 28x28 pixels (Xiao, Rasul and
Vollgraf 2017, arXiv 1708.07747), reports its accuracy on a validation split after every epoch and
on the test set once, at the end, and saves the network under runs/fashion-mnist/.
"""

import argparse
import gzip
import json
import math
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MEAN, STD = 255 * 0.2860, 255 * 0.3530  # of the pixels of the 60,000 training pictures

ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "data/FashionMNIST/raw"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = ROOT / "data/fashion-mnist-sample"

SAMPLE_NOTE = (
    " (the bundled sample, a sixth of all, so less accurate; for all of it run this with a "
    "network, or `apt install dataset-fashion-mnist`, or give --data)"
)
Split = tuple[Tensor, Tensor]  # images (N, 28, 28) uint8, labels (N,) int64

COLUMNS = ("epoch", "training_loss", "validation_loss", "validation_accuracy", "seconds")


class BrokenFile(ValueError):
    """A file that is there and can be read, but is not what it should be."""


def read_idx(path: Path) -> Tensor:
    """Read a file of bytes in the IDX format, `path`.gz if there is one: uint8 of any shape.

    Raises OSError for a file that can't be read, BrokenFile for one that is not whole.
    """
    zipped = path.with_name(path.name + ".gz")
    path = zipped if zipped.exists() else path
    raw = path.read_bytes()
    try:
        raw = bytearray(gzip.decompress(raw) if path is zipped else raw)
        shape = struct.unpack_from(f">{raw[3]}I", raw, offset=4)
    except (EOFError, IndexError, gzip.BadGzipFile, struct.error, zlib.error) as error:
        raise BrokenFile(f"{path} is broken: {error}") from error
    start = 4 + 4 * len(shape)
    if raw[:3] != b"\0\0\x08":
        raise BrokenFile(f"{path} is no IDX file of bytes: it starts with {raw[:4].hex(' ')}")
    if len(raw) - start != math.prod(shape) or not math.prod(shape):
        raise BrokenFile(f"{path} has {len(raw) - start} bytes of data where {shape} are announced")
    return torch.frombuffer(raw, dtype=torch.uint8, offset=start).view(shape)


def load(folder: Path, train: bool) -> Split:
    """Read the training or the test pictures: images (N, 28, 28) uint8, labels (N,) int64.

    Raises OSError for a file that can't be read, BrokenFile for one that is not whole.
    """
    name = "train" if train else "t10k"
    images = read_idx(folder / f"{name}-images-idx3-ubyte")
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte").long()
    if images.shape != (*labels.shape, 28, 28) or labels.max() >= len(CLASSES):
        raise BrokenFile(
            f"{folder} has {name} pictures of shape {tuple(images.shape)} "
            f"and labels of shape {tuple(labels.shape)} up to {labels.max()}"
        )
    return images, labels


def download(folder: Path, seconds: float = 30.0) -> None:
    """Let torchvision fetch the data (30 MB) into `folder`, in at most `seconds`.

    It runs in a process of its own, because it may wait on a dead network without end.
    Raises OSError that says why there is no data.
    """
    code = "import sys, torchvision as t; t.datasets.FashionMNIST(sys.argv[1], download=True)"
    code = f"import socket; socket.setdefaulttimeout(5); {code}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        try:
            command = [sys.executable, "-c", code, beside]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not done after {seconds:.0f} s") from None
        except subprocess.CalledProcessError as error:
            raise OSError(error.stderr.strip().splitlines()[-1]) from None
        for file in Path(beside, "FashionMNIST/raw").iterdir():
            file.replace(folder / file.name)


def find_data() -> tuple[Path, Split, Split, list[str]]:
    """Look for Fashion-MNIST where it may be, and read the first that is whole.

    Returns its folder, the training and the test split, and what was wrong with the places before.
    """
    problems = []
    for folder, fetch in ((RAW, False), (DEBIAN, False), (RAW, True)):
        try:
            if fetch:
                download(folder)
            return folder, load(folder, train=True), load(folder, train=False), problems
        except FileNotFoundError:
            continue
        except (OSError, BrokenFile) as error:
            problems.append(f"download: {error}" if fetch else str(error))
    return SAMPLE, load(SAMPLE, train=True), load(SAMPLE, train=False), problems


class FeedForward(nn.Module):
    """Linear layers with batch normalization (Ioffe and Szegedy 2015) and GELU between them.

    The network normalizes the pixels itself, so that training and use can't differ. A layer that
    batch normalization follows needs no bias, for that brings its own.
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
        """Give the logits (B, 10) of images (B, 28, 28) uint8."""
        return self.layers((images - MEAN) / STD)


def train_epoch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler | None = None,
    batch_size: int = 500,
    label_smoothing: float = 0.1,
) -> float:
    """Train on every picture once, in random order; return the mean loss.

    Batches have `batch_size` pictures or, so that none is left over, a few more.
    Raises FloatingPointError if the loss is no longer a finite number.
    """
    model.train()
    order = torch.randperm(len(images)).to(images.device)
    batches = order.tensor_split(max(1, len(order) // batch_size))
    total = torch.zeros((), device=images.device)
    for batch in tqdm(batches, leave=False, disable=None):
        logits = model(images[batch])
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()
        total += loss.detach() * len(batch)
    mean = total.item() / len(images)
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss became {mean}; a smaller --lr may help")
    return mean


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Give the logits (N, 10) of images (N, 28, 28) uint8, with the model in evaluation mode."""
    model.eval()
    return torch.cat([model(chunk) for chunk in images.split(2500)])


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy, in nats, and the accuracy, between 0 and 1."""
    logits = predict(model, images)
    accuracy = (logits.argmax(dim=1) == labels).double().mean()
    return F.cross_entropy(logits, labels).item(), accuracy.item()


def confusion_matrix(guesses: Tensor, labels: Tensor) -> Tensor:
    """Count how often each class (row) was taken for each class (column): (10, 10) int64."""
    n = len(CLASSES)
    return (labels * n + guesses).bincount(minlength=n * n).view(n, n)


def print_classes(confusion: Tensor) -> None:
    """Print precision, recall and the commonest mistake of every class."""
    print("class        precision  recall  most often taken for")
    for i, name in enumerate(CLASSES):
        right = confusion[i, i].item()
        precision, recall = right / confusion[:, i].sum(), right / confusion[i].sum()
        mistakes = confusion[i].clone()
        mistakes[i] = 0
        count, other = mistakes.max(dim=0)
        print(f"{name:12} {precision:8.1%} {recall:8.1%}  {CLASSES[other]} ({count})")


def write(path: Path, content: bytes) -> None:
    """Write beside and move into place: a crash leaves the old file or the new one, whole."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    beside.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, report and save; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    out = ROOT / "runs/fashion-mnist"
    parser.add_argument("--data", type=Path, help="folder with the four files, if not to be found")
    parser.add_argument("--sample", action="store_true", help="use the bundled sample")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the pictures")
    parser.add_argument("--batch-size", type=int, default=500, help="pictures a step")
    parser.add_argument("--lr", type=float, default=6e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--device", default=device, help="where to compute")
    parser.add_argument("--out", type=Path, default=out, help="folder for the results")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.batch_size < 2 or not 0 < args.lr < math.inf or args.seed < 0:
        parser.error("--epochs from 1, --batch-size from 2, --lr above 0, --seed from 0, please")
    if args.data and not args.data.is_dir():
        parser.error(f"argument --data: there is no folder {args.data}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError):
        parser.error(f"argument --device: {args.device!r} can't be used here")
    started = time.perf_counter()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.data or args.sample:
            folder = args.data or SAMPLE
            train, test, problems = load(folder, train=True), load(folder, train=False), []
        else:
            folder, train, test, problems = find_data()
        for problem in problems:
            print(f"{parser.prog}: passing over {problem}", file=sys.stderr)
        print(f"Data: {folder}{SAMPLE_NOTE if folder == SAMPLE else ''}")

        torch.manual_seed(args.seed)
        order = torch.randperm(len(train[0]))
        kept = len(order) - len(order) // 12  # 55,000 of 60,000; the rest validates
        images, labels = (tensor[order[:kept]].to(args.device) for tensor in train)
        validation = [tensor[order[kept:]].to(args.device) for tensor in train]
        model = FeedForward().to(args.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
        steps = args.epochs * max(1, kept // args.batch_size)
        schedule = OneCycleLR(optimizer, max_lr=args.lr, total_steps=steps)

        parameters = sum(p.numel() for p in model.parameters())
        print(f"{kept:,} pictures to learn from; {parameters:,} parameters on {args.device}\n")
        print("epoch  training loss  validation loss  accuracy  seconds")
        rows = []
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            loss = train_epoch(model, images, labels, optimizer, schedule, args.batch_size)
            row = epoch, loss, *evaluate(model, *validation), time.perf_counter() - start
            print("{:5}  {:13.4f}  {:15.4f}  {:8.2%}  {:7.1f}".format(*row))
            rows.append(dict(zip(COLUMNS, row, strict=True)))

        images, labels = (tensor.to(args.device) for tensor in test)
        loss, accuracy = evaluate(model, images, labels)
        confusion = confusion_matrix(predict(model, images).argmax(dim=1), labels)
        print(f"\nTest: loss {loss:.4f}, accuracy {accuracy:.2%} of {len(labels):,} pictures\n")
        print_classes(confusion)

        metrics = {
            "settings": vars(args) | {"data": folder}, "torch": torch.__version__,
            "python": sys.version.split()[0], "epochs": rows, "test_loss": loss,
            "test_accuracy": accuracy, "confusion": confusion.tolist(),
            "seconds": time.perf_counter() - started,
        }  # fmt: skip
        write(args.out / "model.safetensors", safetensors.torch.save(model.state_dict()))
        write(args.out / "metrics.json", json.dumps(metrics, indent=1, default=str).encode())
        print(f"\nSaved in {args.out} after {metrics['seconds']:.1f} s")
    except (OSError, BrokenFile, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
