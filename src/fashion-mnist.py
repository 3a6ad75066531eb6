#!/usr/bin/env python3
"""A feed-forward network learns to name ten kinds of clothes: Fashion-MNIST.

Run `poetry run src/fashion-mnist.py`. It trains on pictures of 28x28 pixels (Xiao, Rasul and
Vollgraf 2017, arXiv 1708.07747), reports on a validation split after every epoch and on the test
set once, and fills runs/fashion-mnist/, all in about 25 s. Then `--predict photo.jpg` names what a
photo shows.
"""

import argparse
import gzip
import json
import math
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

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
Split = tuple[Tensor, Tensor]  # images (N, 28, 28) uint8, labels (N,) int64


def read_idx(path: Path, *size: int) -> Tensor:
    """Read (N, *size) uint8 from `path`.gz or else `path`. Raises OSError if that is not whole."""
    zipped = path.with_name(path.name + ".gz")
    path = zipped if zipped.exists() else path
    raw = path.read_bytes()
    try:
        raw = bytearray(gzip.decompress(raw) if path is zipped else raw)
    except (EOFError, OSError, zlib.error) as error:
        raise OSError(f"{path} is broken: {error}") from error
    start = 4 * (2 + len(size))
    count, rest = divmod(len(raw) - start, math.prod(size))
    header = (0x801 + len(size), count, *size)  # bytes, in 1 + len(size) dimensions
    if count < 1 or rest or raw[:start] != np.array(header, ">u4").tobytes():
        raise OSError(f"{path} is broken: {len(raw)} bytes are no IDX file of {('N', *size)} bytes")
    return torch.frombuffer(raw, dtype=torch.uint8, offset=start).view(count, *size)


def load(folder: Path, train: bool) -> Split:
    """Read images (N, 28, 28) uint8 and labels (N,) int64. Raises OSError if they aren't whole."""
    name = "train" if train else "t10k"
    images = read_idx(folder / f"{name}-images-idx3-ubyte", 28, 28)
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte")
    if len(images) != len(labels) or labels.max() >= len(CLASSES):
        counts = f"{len(images)} pictures and {len(labels)} labels up to {labels.max()}"
        raise OSError(f"{folder} is broken: {counts} for {name} don't fit")
    return images, labels.long()


def download(folder: Path, seconds: float = 30.0) -> None:
    """Let torchvision download the data (30 MB) to `folder`, which must end in FashionMNIST/raw.

    It has no timeout, so it gets a process of its own and `seconds`. Raises OSError if it fails.
    """
    code = "import sys, torchvision as t; t.datasets.FashionMNIST(sys.argv[1], download=True)"
    command = [sys.executable, "-c", code, folder.parents[1]]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"download: not done after {seconds:.0f} s") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2]
        raise OSError(f"download: {reason}") from None


def find_data(given: Path | None = None) -> tuple[Path, Split, Split, list[str]]:
    """Read the data from the folder that is given, or else the first whole copy to be found.

    Returns its folder, the training and the test split, and what failed before, or raises OSError.
    """
    problems = []
    for folder, fetch in ((RAW, False), (DEBIAN, False), (RAW, True)) if not given else ():
        try:
            if fetch:
                download(folder)
            return folder, load(folder, train=True), load(folder, train=False), problems
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(str(error))
    folder = given or SAMPLE
    return folder, load(folder, train=True), load(folder, train=False), problems


def prepare(image: Image.Image) -> Tensor:
    """Turn a photo of a garment into a picture as in the data set: uint8 (28, 28), light on black.

    After section 2 of Xiao, Rasul and Vollgraf 2017: what is within 5 % of the corners' color is
    trimmed as background, the longer side becomes 28 pixels, and a light background turns black.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # which Pillow would clip, not scale
        image = image.point(lambda value: value / 256).convert("L")
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L")
    background = sorted(image.getpixel((x, y)) for x in (0, -1) for y in (0, -1))[2]
    if background > 127:
        image, background = ImageOps.invert(image), 255 - background
    scale = 255 / (255 - background)
    image = image.point([(v > background + 13) * (v - background) * scale for v in range(256)])
    return torch.from_numpy(np.array(ImageOps.pad(image.crop(image.getbbox()), (28, 28))))


class Classifier(nn.Module):
    """Three linear layers: images (B, 28, 28) uint8 -> logits (B, 10).

    Square roots of the pixels tell dark garments from black. Batch normalization (Ioffe and Szegedy
    2015) undoes any shift and scale, so what comes before it needs no bias and no normalization.
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
    """Train on every picture once, augmented and in random order; return the mean loss.

    A batch has `batch_size` pictures or more. Raises FloatingPointError if the loss isn't finite.
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
    mean = total.item() / len(images)
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss became {mean}; a smaller --lr may help")
    return mean


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


def draw_history(rows: Sequence[Sequence[float]]) -> Figure:
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
    """Draw how often each class (row) was taken for each class (column)."""
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    axes = figure.subplots(subplot_kw={"xlabel": "what the network said", "ylabel": "what it was"})
    axes.imshow(confusion.sqrt().numpy(), cmap="Blues")
    for (i, j), count in np.ndenumerate(confusion.numpy()):
        axes.text(j, i, count, ha="center", va="center", color="white" if i == j else "black")
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    return figure


def draw_answers(images: Tensor, labels: Tensor, guesses: Tensor) -> Figure:
    """Draw the first 24 pictures: what the network said, and what it was."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(4, 6, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    for axes, image, label, guess in zip(panels.flat, images, labels, guesses, strict=False):
        axes.imshow(image.numpy(), cmap="gray")
        color = "black" if guess == label else "firebrick"
        axes.set_title(f"said {CLASSES[guess]}\nwas {CLASSES[label]}", fontsize=9, color=color)
    return figure


def show_picture(picture: Tensor) -> None:
    """Print a picture (28, 28), each character two pixels, in the 24 grays of a terminal."""
    for rows in (232 + picture.long() * 24 // 256).view(14, 2, 28).tolist():
        pixels = (f"\x1b[38;5;{top};48;5;{bottom}m▀" for top, bottom in zip(*rows, strict=True))
        print("".join(pixels) + "\x1b[0m")


def write(path: Path, content: bytes | Figure) -> None:
    """Write beside and move into place: a crash leaves the old file or the new one, whole."""
    beside = path.with_name(path.name + ".part")
    try:
        if isinstance(content, Figure):
            content.savefig(beside, format="png", dpi=120)
        else:
            beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written: {error.strerror or error}") from error


def print_photos(path: Path, photos: Sequence[Path]) -> int:
    """Name photos; return 1 if one fails, else 0. Raises OSError if `path` holds no network."""
    model, status = Classifier(), 0
    try:
        model.load_state_dict(safetensors.torch.load(path.read_bytes()))
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"no model of this script, train one first: {path}: {reason}") from error
    for photo in photos:
        try:
            with Image.open(photo) as image:
                picture = prepare(image)
        except Exception as error:  # Pillow's decoders raise all kinds for a broken file
            print(f"{photo}: {error}", file=sys.stderr)
            status = 1
            continue
        show_picture(picture)
        best = zip(*predict(model, picture.unsqueeze(0)).softmax(dim=1)[0].topk(3), strict=True)
        print(f"{photo}: " + ", ".join(f"{CLASSES[i]} {p:.1%}" for p, i in best))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Train, report and save, or name what photos show; return the exit status."""
    sys.stdout.reconfigure(encoding="utf-8")  # also into a pipe, or an old console
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, help="folder of the four files; else looked for")
    source.add_argument("--sample", action="store_true", help="use the bundled sample")
    parser.add_argument("--epochs", type=int, default=16, help="passes over the pictures")
    parser.add_argument("--batch-size", type=int, default=500, help="pictures a step")
    parser.add_argument("--lr", type=float, default=6e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--device", default=device, help="where to compute")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results")
    parser.add_argument("--predict", type=Path, nargs="+", metavar="PHOTO", help="only name these")
    args = parser.parse_args(argv)
    numbers_fit = args.epochs >= 1 and args.batch_size >= 2 and 0 < args.lr < math.inf
    if not numbers_fit or not 0 <= args.seed < 2**63:
        parser.error("--epochs from 1, --batch-size from 2, --lr above 0, --seed from 0, please")
    if args.data and not args.data.is_dir():
        parser.error(f"argument --data: there is no folder {args.data}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError):
        parser.error(f"argument --device: {args.device!r} can't be used here")
    started = time.perf_counter()
    try:
        if args.predict:
            return print_photos(args.out / "model.safetensors", args.predict)

        args.out.mkdir(parents=True, exist_ok=True)
        folder, train, test, problems = find_data(SAMPLE if args.sample else args.data)
        for problem in problems:
            print(f"{parser.prog}: passing over {problem}", file=sys.stderr)
        note = " (a sixth of all, so less accurate; --data or a network brings the rest)"
        print(f"Data: {folder}{note if folder == SAMPLE else ''}")

        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("medium")  # bfloat16 where that is faster
        order = torch.randperm(len(train[0]))
        kept = len(order) - len(order) // 60  # 59,000 of 60,000; the rest validates
        if kept == len(order):
            raise OSError(f"{folder}: {kept} pictures are too few to hold some back")
        images, labels = (tensor[order[:kept]].to(args.device) for tensor in train)
        validation = [tensor[order[kept:]].to(args.device) for tensor in train]
        model = Classifier().to(args.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
        steps = max(6, args.epochs * max(1, kept // args.batch_size))  # OneCycleLR fails at 5 steps
        schedule = OneCycleLR(
            optimizer, args.lr, steps, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False
        )

        parameters = sum(p.numel() for p in model.parameters())
        print(f"{kept:,} pictures to learn from; {parameters:,} parameters on {args.device}\n")
        print("epoch  training loss  validation loss  accuracy  seconds")
        rows = []
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            loss = train_epoch(model, images, labels, optimizer, schedule, args.batch_size)
            rows.append((epoch, loss, *evaluate(model, *validation), time.perf_counter() - start))
            row = "{:5}  {:13.4f}  {:15.4f}  {:8.2%}  {:7.1f}".format(*rows[-1])
            print(row, flush=True)

        logits, labels = predict(model, test[0].to(args.device)).cpu(), test[1]
        guesses, losses = logits.argmax(dim=1), F.cross_entropy(logits, labels, reduction="none")
        was, said = (F.one_hot(x, len(CLASSES)) for x in (labels, guesses))
        confusion = was.T @ said  # rows: what it was; columns: what the network said
        accuracy = confusion.trace().item() / len(labels)
        precision, recall = (confusion.diag() / confusion.sum(dim=d).clamp(min=1) for d in (0, 1))
        classes = list(zip(CLASSES, precision.tolist(), recall.tolist(), strict=True))
        print(f"\nTest: {accuracy:.2%} of {len(labels):,} pictures\n\n{'':11}  precision  recall")
        for row in classes:
            print("{:11}  {:9.1%}  {:6.1%}".format(*row))

        metrics = {
            "settings": vars(args), "data": folder, "torch": torch.__version__,
            "python": sys.version.split()[0], "epochs": rows, "test_accuracy": accuracy,
            "classes": classes, "seconds": time.perf_counter() - started,
        }  # fmt: skip
        write(args.out / "model.safetensors", safetensors.torch.save(model.state_dict()))
        write(args.out / "metrics.json", json.dumps(metrics, indent=1, default=str).encode())
        write(args.out / "history.png", draw_history(rows))
        write(args.out / "confusion.png", draw_confusion(confusion))
        write(args.out / "answers.png", draw_answers(test[0], labels, guesses))
        order = losses.argsort(descending=True)
        hard = order[guesses[order] != labels[order]]
        write(args.out / "mistakes.png", draw_answers(test[0][hard], labels[hard], guesses[hard]))
        print(f"\nSaved in {args.out} after {metrics['seconds']:.1f} s")
    except (OSError, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
