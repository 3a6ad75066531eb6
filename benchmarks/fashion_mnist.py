#!/usr/bin/env python3
"""Measure fashion-mnist.py beside PyTorch's quickstart and beside the matrix products alone.

    make bench

The same network, on the same pictures, in the same number of steps, in turn in one process: fed by
a DataLoader over torchvision's data set, as in the quickstart, and fed as in the script. Once that
is the quickstart's own network with its optimizer and batch size, and then the script's. Prints
medians of epochs after a warm-up.
"""

import importlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
fashion = importlib.import_module("fashion-mnist")

ROUNDS = 3


class Quickstart(nn.Module):
    """The network of PyTorch's quickstart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images / 255)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-3, fused=True)


SETUPS = (
    (Quickstart, sgd, 64),
    (fashion.Classifier, adamw, 64),
    (fashion.Classifier, adamw, 500),
)


def as_torchvision_wants_it(images: Tensor, labels: Tensor, root: Path) -> datasets.FashionMNIST:
    """Write unpacked files to `root`, and open them the way of the quickstart."""
    raw = root / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        for kind, tensor in (("images-idx3", images), ("labels-idx1", labels.byte())):
            header = bytes([0, 0, 8, tensor.ndim]) + b"".join(n.to_bytes(4) for n in tensor.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + tensor.numpy().tobytes())
    return datasets.FashionMNIST(root, train=True, transform=transforms.ToTensor())


def batches(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a DataLoader with ToTensor does, from tensors that are on the device."""
    order = torch.randperm(len(labels)).to(images.device)
    for batch in order.tensor_split(len(order) // batch_size):
        yield images.index_select(0, batch) / 255, labels[batch]


def fingerprints(epoch: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """Return the sum of the pixels and the label of every picture in an epoch, sorted."""
    sums = [(x.double() * 255).flatten(1).sum(dim=1).round() * 10 + y for x, y in epoch]
    return torch.cat(sums).sort().values.tolist()


def quickstart_epoch(
    model: nn.Module, loader: DataLoader, optimizer: Optimizer, device: str
) -> None:
    """Do what `train_epoch` does, with the batches of a DataLoader."""
    model.train()
    for images, labels in loader:
        images, labels = images.to(device).squeeze(1) * 255, labels.to(device)
        loss = F.cross_entropy(model(fashion.augment(images)), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def matrix_products(model: nn.Module, batch_size: int, steps: int, device: str) -> None:
    """Do the products of the linear layers, forward and backward, and nothing else."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    operands = [
        [torch.randn(batch_size, n, device=device) for n in (layer.in_features, layer.out_features)]
        for layer in layers
    ]
    with torch.no_grad():
        for _ in range(steps):
            for layer, (x, gradient) in zip(layers, operands, strict=True):
                x @ layer.weight.T
                gradient.T @ x
                if layer is not layers[0]:  # the pictures themselves need no gradient
                    gradient @ layer.weight


def in_turn(*works: Callable[[], object]) -> list[float]:
    """Do the works one after the other, for a warm-up and ROUNDS; return the median seconds."""
    rounds = []
    for _ in range(1 + ROUNDS):
        rounds.append([])
        for work in works:
            start = time.perf_counter()
            work()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            rounds[-1].append(time.perf_counter() - start)
    return [statistics.median(column) for column in zip(*rounds[1:], strict=True)]


def compare_loading(
    dataset: datasets.FashionMNIST, images: Tensor, labels: Tensor, batch_size: int
) -> None:
    """Measure reading every picture once, and print a line."""
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    same = fingerprints(loader) == fingerprints(batches(images.cpu(), labels.cpu(), batch_size))
    assert same, "the two don't see each picture once an epoch"
    theirs, ours = in_turn(
        lambda: [None for _ in loader], lambda: [None for _ in batches(images, labels, batch_size)]
    )
    print(f"{'loading':12} {batch_size:5} {theirs:11.2f} {ours:8.3f} {theirs / ours:7.1f}")


def compare_training(
    dataset: datasets.FashionMNIST, images: Tensor, labels: Tensor, test: Sequence[Tensor],
    network: Callable[[], nn.Module], optimizer: Callable[[nn.Module], Optimizer], batch_size: int,
) -> None:  # fmt: skip
    """Measure epochs of training, and print a line."""
    device = str(images.device)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(network().to(device))
    optimizers = [optimizer(model) for model in models]
    schedule = ConstantLR(optimizers[1], 1.0)
    steps = math.ceil(len(labels) / batch_size)
    theirs, ours, products = in_turn(
        lambda: quickstart_epoch(models[0], loader, optimizers[0], device),
        lambda: fashion.train_epoch(
            models[1], (images, labels), optimizers[1], schedule, batch_size
        ),
        lambda: matrix_products(models[0], batch_size, steps, device),
    )
    accuracies = [fashion.evaluate(model, *test)[1] for model in models]
    assert abs(accuracies[0] - accuracies[1]) < 0.02, f"that is not the same work: {accuracies}"
    print(
        f"{network.__name__:12} {batch_size:5} {theirs:11.2f} {ours:8.3f} {theirs / ours:7.1f} "
        f"{products:9.2f} {products / ours:9.0%}   {accuracies[0]:.1%} and {accuracies[1]:.1%}"
    )


def main() -> None:
    """Print the table."""
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    source, train, test = fashion.open_data(None)
    print(f"{len(train[1]):,} images from {source}, PyTorch {torch.__version__} on {device},")
    print(f"{torch.get_num_threads()} threads; seconds an epoch, medians of {ROUNDS}.\n")
    print("what         batch  DataLoader     ours   ratio  products  products/ours  accuracies")
    with tempfile.TemporaryDirectory() as root:
        dataset = as_torchvision_wants_it(*train, Path(root))
        images, labels = (tensor.to(device) for tensor in train)
        test = [tensor.to(device) for tensor in test]
        for batch_size in (64, 500):
            compare_loading(dataset, images, labels, batch_size)
        for setup in SETUPS:
            compare_training(dataset, images, labels, test, *setup)


if __name__ == "__main__":
    main()
