#!/usr/bin/env python3
"""Measure what convolutions bring: a small convolutional network beside that of fashion-mnist.py.

    make bench

Both are trained by the script's own `fit`, with its settings, on the same images, in turn. The
test set is read once for each network and seed. Without an accelerator, the convolutions take
minutes.
"""

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
fashion = importlib.import_module("fashion-mnist")

DATA = Path("/usr/share/datasets/fashion-mnist")  # all of it, where Debian's package is installed
SEEDS = 1  # more show the spread


class Convolutions(nn.Module):
    """Two convolutional layers and a linear one: images (B, 28, 28) uint8 -> logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 28)),  # one channel
            nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(2),  # (B, 16, 14, 14)
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(2),  # (B, 32, 7, 7)
            nn.BatchNorm2d(32),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, len(fashion.CLASSES)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images.float() + 1e-9).sqrt())


def train(network: Callable[[], nn.Module], seed: int) -> tuple[float, float, float]:
    """Train as fashion-mnist.py does; return validation and test accuracy, and the seconds."""
    args = fashion.make_parser().parse_args([])
    torch.manual_seed(seed)
    _, split, test = fashion.open_data(DATA if DATA.is_dir() else None)
    kept, validation = ((x.to(args.device), y.to(args.device)) for x, y in fashion.hold_out(split))
    model = network().to(args.device)
    start = time.perf_counter()
    settings = args.epochs, args.batch_size, args.learning_rate
    *_, last = fashion.fit(model, kept, validation, *settings)
    seconds = time.perf_counter() - start
    _, accuracy = fashion.evaluate(model, *(tensor.to(args.device) for tensor in test))
    return last.accuracy, accuracy, seconds


def main() -> None:
    """Print the table."""
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("network       parameters  seed  validation    test  seconds")
    for seed in range(SEEDS):
        for network in (fashion.Classifier, Convolutions):
            parameters = sum(each.numel() for each in network().parameters())
            validation, test, seconds = train(network, seed)
            scores = f"{validation:10.2%}  {test:.2%}  {seconds:7.0f}"
            print(f"{network.__name__:12}  {parameters:10,}  {seed:4}  {scores}", flush=True)


if __name__ == "__main__":
    main()
