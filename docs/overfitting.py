#!/usr/bin/env python3
"""Draw how the network of chapter 2 overfits when nothing holds it back.

    make docs

It trains on the sample, with a constant learning rate, and without augmentation and label
smoothing. It prints the losses and accuracies of each epoch, in about a minute.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
fashion = importlib.import_module("fashion-mnist")

HELD_OUT = 2000  # images for validation; with one in sixty, the curves would jump
Scores = tuple[float, float]  # loss and accuracy


@torch.inference_mode()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Return loss and accuracy in evaluation mode, without mirror images."""
    model.eval()
    logits = model(images)
    accuracy = (logits.argmax(dim=1) == labels).double().mean()
    return F.cross_entropy(logits, labels).item(), accuracy.item()


def overfit(epochs: int, batch_size: int, learning_rate: float) -> Iterator[tuple[Scores, Scores]]:
    """Train; after each epoch, yield the scores on the training and on the validation split."""
    images, labels = fashion.load(fashion.SAMPLE, "train")
    order = torch.randperm(len(images))
    (x, val_x), (y, val_y) = (
        (tensor[order[HELD_OUT:]], tensor[order[:HELD_OUT]]) for tensor in (images, labels)
    )
    model = fashion.Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(batch_size):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield score(model, x, y), score(model, val_x, val_y)


def draw(rows: list[tuple[Scores, Scores]]) -> Figure:
    """Draw losses and accuracies by epoch, and where the validation loss turns."""
    lowest = min(range(len(rows)), key=lambda n: rows[n][1][0]) + 1
    epoch = range(1, len(rows) + 1)
    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, subplot_kw={"xlabel": "epoch"})
    panels[0].set_ylim(0, 0.95)  # the legend needs room
    for n, (axes, name) in enumerate(zip(panels, ("loss", "accuracy"), strict=True)):
        for split, kind in enumerate(("training", "validation")):
            axes.plot(epoch, [row[split][n] for row in rows], "o-", ms=3, label=f"{kind} {name}")
        label = "lowest validation loss" if name == "loss" else None
        axes.axvline(lowest, color="gray", linestyle="dashed", zorder=0, label=label)
        axes.legend()
        axes.locator_params(axis="x", integer=True)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    rows = []
    print("epoch  training loss  accuracy  validation loss  accuracy")
    for row in overfit(args.epochs, batch_size=500, learning_rate=0.0002):
        rows.append(row)
        (loss, accuracy), (val_loss, val_accuracy) = row
        training = f"{len(rows):5}  {loss:13.4f}  {accuracy:8.2%}"
        print(f"{training}  {val_loss:15.4f}  {val_accuracy:8.2%}", flush=True)
    draw(rows).savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
