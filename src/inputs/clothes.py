"""Find and read Fashion-MNIST: images of clothing with their labels.

70,000 images of 28x28 pixels in ten classes (Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747), in
four IDX files: images and labels, for training and testing. fashion-mnist.py trains on them.
"""

import gzip
import math
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "data/FashionMNIST/raw"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = ROOT / "data/fashion-mnist-sample"
MOST_IMAGES = 1_000_000  # a file that announces more is broken
Split = tuple[Tensor, Tensor]  # images (N, 28, 28) uint8, labels (N,) int64


def read_idx(path: Path, *size: int) -> Tensor:
    """Read (N, *size) uint8 from `path`.gz or else `path`, and no more than the header announces.

    Raises OSError if the file is truncated or invalid.
    """
    zipped = path.with_name(path.name + ".gz")
    with gzip.open(zipped) if zipped.exists() else path.open("rb") as file:
        try:
            header = file.read(4 * (2 + len(size)))
            count = int.from_bytes(header[4:8])
            content = bytearray(file.read(min(count, MOST_IMAGES) * math.prod(size) + 1))
        except (EOFError, OSError, zlib.error) as error:
            raise OSError(f"{file.name} is broken: {error}") from error
    expected = np.array((0x801 + len(size), count, *size), ">u4").tobytes()
    if count < 1 or header != expected or len(content) != count * math.prod(size):
        shape = ", ".join(map(str, ("N", *size)))
        found = f"{len(header) + len(content)} bytes or more that don't fit"
        raise OSError(
            f"{file.name} is broken: expected an IDX file of shape ({shape}), got {found}"
        )
    return torch.frombuffer(content, dtype=torch.uint8).view(count, *size)


def load(folder: Path, train: bool) -> Split:
    """Read the training or the test split. Raises OSError if its files are missing or broken."""
    name = "train" if train else "t10k"
    images = read_idx(folder / f"{name}-images-idx3-ubyte", 28, 28)
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte")
    if len(images) != len(labels) or labels.max() >= len(CLASSES):
        counts = f"{len(images)} images and {len(labels)} labels up to {labels.max()}"
        raise OSError(f"{folder} is broken: {name} has {counts}")
    return images, labels.long()


def download(folder: Path, seconds: float = 30.0) -> Path:
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
    return folder


def find_data(given: Path | None = None) -> tuple[Path, Split, Split, list[str]]:
    """Read the given folder, or else the first complete copy of the data.

    Return its folder, both splits, and what is wrong with other copies; or raise OSError.
    """
    if given:
        return given, load(given, train=True), load(given, train=False), []
    problems: list[str] = []
    for copy in (RAW, DEBIAN, None):
        try:
            folder = copy or download(RAW)
            return folder, load(folder, train=True), load(folder, train=False), problems
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(str(error))
    return SAMPLE, load(SAMPLE, train=True), load(SAMPLE, train=False), problems
