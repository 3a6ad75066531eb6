#!/usr/bin/env python3
"""Draw the diagrams of the course: SVG files beside this one, or in another folder.

    make docs

Every number in them is computed, by the scripts of the course or in plain sight. Pictures that hold
no computed number are SVG files that one edits by hand. In both, queries and the encoder are blue,
keys and the decoder orange, values green.
"""

import argparse
import importlib
import io
import math
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from drawing import WIDTH, Drawing, Point, column, number, scale

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
hello = importlib.import_module("pytorch-hello")
fashion = importlib.import_module("fashion-mnist")
attention = importlib.import_module("attention")
transformer = importlib.import_module("transformer")
gpt = importlib.import_module("gpt")
coder = importlib.import_module("decoding.coder")

MIDDLE = WIDTH // 2
PEOPLE = {"Zhang": "Aston", "Lipton": "Zachary", "Li": "Mu", "Smola": "Alex"}  # as in d2l.ai
FIRST = {"a": 0.5, "the": 0.4, "one": 0.1}  # probabilities of a first word, and of a second
CODED = {  # what may come next, with its probability; the first of these words, then the second, …
    "for": {"def": 0.4, "for": 0.25, "if": 0.35},
    " i": {" line": 0.5, " i": 0.125, " x": 0.375},
    " in": {" in": 0.8, ",": 0.2},
}
WORDS = ("the", "then", "that")  # of which byte-pair encoding learns
QUERY, KEY = (2.0, 0.0), (1.0, 1.0)  # that are turned by their positions
SECOND = {"a": {"dog": 0.4, "cat": 0.35, "bird": 0.25}, "the": {"dog": 0.9, "cat": 0.1}}


def noisy_points() -> tuple[Tensor, Tensor]:
    """Return the points x and y (100,) through which pytorch-hello.py fits a line."""
    spy = patch.object(hello, "fit_line", return_value=(0, 0))
    with spy as fit, redirect_stdout(io.StringIO()):
        hello.main(["--device", "cpu"])
    x, y = fit.call_args.args
    return x, y


def line() -> Drawing:
    """Draw the points of pytorch-hello.py with a bad line and the fitted one."""
    d = Drawing("Points, a line that misses them, and the line that fits them best", 470)
    x, y = noisy_points()
    X, Y = scale(-1, 1, 80, 840), scale(-6, 2, 400, 30)
    d.line((X(-1), Y(2)), (X(-1), Y(-6)), (X(1), Y(-6)))
    for n in (-1, 0, 1):
        d.text(X(n), 426, number(n, "g"), "soft")
    for n in (-6, -4, -2, 0, 2):
        d.text(64, Y(n), number(n, "g"), "soft end")
    d.text(X(0.5), 426, "x")
    d.text(64, Y(-1), "y", "end")
    w, b = hello.fit_line(x, y, steps=200, learning_rate=0.2)
    fitted = w * x + b
    for guess, style in ((x, "orange dashed"), (fitted, "blue thick")):
        d.line(*((X(x[n].item()), Y(guess[n].item())) for n in (0, -1)), style=style)
    for a, c in zip(x.tolist(), y.tolist(), strict=True):
        d.dot(X(a), Y(c), "soft", radius=4)
    lowest = (fitted - y).argmax().item()
    for guess, n, style, dx, dy in ((x, 20, "orange", 40, -70), (fitted, lowest, "blue", 0, 24)):
        at, below = X(x[n].item()), Y(y[n].item())
        d.line((at, Y(guess[n].item())), (at, below), style=f"{style} thick")
        d.dot(at, below, style)
        d.text(at + dx, below + dy, "error", style)
    losses = [F.mse_loss(guess, y).item() for guess in (x, fitted)]
    d.text(X(-0.9), Y(1), f"a guess: y = 1x + 0, loss {losses[0]:.2f}", "orange start")
    found = f"y = {w:.2f}x − {-b:.2f}"
    d.text(X(0.95), Y(-5), f"after 200 steps: {found}, loss {losses[1]:.2f}", "blue bold end")
    return d


def valley() -> Drawing:
    """Draw two steps of gradient descent, for one point with x = 1 and y = 3."""
    d = Drawing("The valley of a loss, and a step downhill from either side", 560)
    rate, X, Y = 0.2, scale(0, 6, 50, 830), scale(0, 9, 380, 30)

    def loss(w: Tensor) -> Tensor:
        return (w * 1 - 3) ** 2

    def at(w: Tensor) -> Point:
        return X(w.item()), Y(loss(w).item())

    d.line((X(0), 380), (X(6), 380))
    for w in range(7):
        d.text(X(w), 402, str(w), "soft")
    d.text(858, 380, "w")
    d.line(*(at(w) for w in torch.arange(61, dtype=torch.float64) / 10), style="thick")
    d.text(MIDDLE, 60, "the loss L = (w − 3)²", "bold")
    d.text(MIDDLE, 100, f"w ← w − η · steepness,  η = {rate}")
    for start, center, side, color in ((1.0, 235, "right", "blue"), (4.0, 645, "left", "orange")):
        before = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        slope = torch.autograd.grad(loss(before), before)[0].item()
        after = before - rate * slope
        tangent = ((X(start + t), Y(loss(before).item() + slope * t)) for t in (-0.5, 0.7))
        d.line(*tangent, style=f"{color} dashed")
        for x, y in (at(before), at(after)):
            d.line((x, y), (x, 380), style=f"{color} dashed")
            d.dot(x, y, color)
        d.arrow((X(start), 380), (X(after.item()), 380), style=f"{color} thick")
        factor = number(slope, "g") if slope > 0 else f"({number(slope, 'g')})"
        d.text(center, 470, f"steepness {number(slope, 'g')}", f"{color} bold")
        d.text(center, 502, f"w ← {start:g} − {rate} · {factor} = {after.item():g}")
        d.text(center, 534, f"a step to the {side}, downhill")
    return d


def norms() -> Drawing:
    """Draw a table, normalized by columns and by rows."""
    d = Drawing("Batch norm brings each column of a table to mean 0, layer norm each row", 520)
    table = torch.tensor([[1.0, 2, 3, 6], [2, 5, 1, 4], [3, 0, 4, 1], [6, 3, 2, 5]])
    mean, variance = table[0].mean().item(), table[0].var(correction=0).item()
    step = f"minus {mean:g}, divided by √{variance:g}"  # in the first row as in the first column
    wide, high = 80, 38
    for left, name, where, norm, kind, rows, columns in (
        (90, "batch norm", "each column", nn.BatchNorm1d(4), "image", 4, 1),
        (530, "layer norm", "each row", nn.LayerNorm(4), "position", 1, 4),
    ):
        d.text(left + 2 * wide, 26, f"{name}: {where}", "bold")
        d.text(left - 14, 70, kind, "soft end")
        d.text(left + 2 * wide, 70, "features", "soft")
        for top, numbers, form in ((92, table, "g"), (324, norm(table), ".2f")):
            w, h = columns * wide, rows * high
            d.box(left + w / 2, top + h / 2, w, h, style="blue tint")
            for i, each in enumerate(numbers.tolist()):
                y = top + high * (i + 0.5)
                d.text(left - 14, y, str(i + 1), "soft end")
                for j, value in enumerate(each):
                    style = "blue" if i < rows and j < columns else ""
                    d.text(left + wide * (j + 0.5), y, number(value, form), style)
        d.arrow((left + wide / 2, 256), (left + wide / 2, 312), style="blue")
        d.text(left + wide / 2 + 16, 284, step, "blue start")
        d.text(left + 2 * wide, 500, f"mean 0 in {where}")
    return d


def gelu() -> Drawing:
    """Draw GELU beside ReLU."""
    d = Drawing("GELU beside ReLU", 440)
    X, Y = scale(-4, 4, 50, 830), scale(0, 4, 340, 30)
    d.line((X(-4), Y(0)), (X(4), Y(0)))
    d.line((X(0), Y(4)), (X(0), 375))
    for n in range(-4, 5):
        d.text(X(n), 398, number(n, "g"), "soft")
    for n in range(1, 5):
        d.text(X(0) - 16, Y(n), str(n), "soft end")
    x = torch.arange(-80, 81, dtype=torch.float64) / 20  # not linspace, which rounds by machine
    for function, style in ((F.relu, "orange thick dashed"), (F.gelu, "blue thick")):
        points = torch.stack((x, function(x)), dim=1).tolist()
        d.line(*((X(a), Y(b)) for a, b in points), style=style)
    d.text(X(2.6), Y(3.3), "ReLU: max(0, x)", "orange bold end")
    d.text(X(1.55), Y(1.15), "GELU: x · Φ(x)", "blue bold start")
    d.text(X(1.55), Y(0.63), "Φ(x): area under the\nnormal curve left of x", "soft start")
    lowest, at = min((b, a) for a, b in points)  # of GELU, which was drawn last
    d.dot(X(at), Y(lowest), "blue")
    d.text(X(-2.1), Y(0.75), f"lowest: {number(lowest)} at {number(at)}", "blue")
    d.arrow((X(-1.5), Y(0.6)), (X(at) - 8, Y(lowest) - 9), style="blue")
    return d


def minus_log() -> Drawing:
    """Draw the loss against the probability of the correct class."""
    d = Drawing("The loss −log p against the probability p of the correct class", 500)
    X, Y = scale(0, 1, 80, 840), scale(0, 4.5, 420, 20)
    d.line((X(0), Y(4.5)), (X(0), Y(0)), (X(1), Y(0)))
    for n in range(5):
        d.text(64, Y(n), str(n), "soft end")
    for n in range(6):
        d.text(X(n / 5), 446, f"{n / 5:g}", "soft")
    d.text(MIDDLE, 480, "probability p of the correct class")
    curve = [n / 200 for n in range(3, 201)]  # from a loss of 4.2
    d.line(*((X(p), Y(-math.log(p))) for p in curve), style="blue thick")
    d.text(X(0.2), Y(3.7), "loss = −log p", "blue bold start")
    guess = 1 / len(fashion.CLASSES)
    d.arrow((X(0.3), Y(-math.log(guess))), (X(guess) + 8, Y(-math.log(guess))), style="orange")
    d.dot(X(guess), Y(-math.log(guess)), "orange", radius=6)
    nothing = f"{guess:g} → {-math.log(guess):.2f}: knows nothing, ten classes"
    d.text(X(0.31), Y(-math.log(guess)), nothing, "orange start")
    for p in torch.tensor([2.0, 1.0, 0.0]).softmax(dim=0).tolist():  # the table of chapter 2
        loss = -math.log(p)
        d.dot(X(p), Y(loss), "blue", radius=6)
        d.text(X(p) + 14, Y(loss) - 22, f"{p:.3f} → {loss:.2f}", "blue start")
    return d


def one_cycle() -> Drawing:
    """Draw the schedule of fashion-mnist.py."""
    d = Drawing("The learning rate rises for a fifth of the steps, then falls to almost 0", 400)
    args = fashion.make_parser().parse_args(["--device", "cpu"])
    epochs, highest = args.epochs, args.learning_rate
    steps = epochs * (59_000 // args.batch_size)
    optimizer = torch.optim.SGD([torch.zeros(1)], highest)
    schedule = OneCycleLR(
        optimizer, highest, steps, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False
    )
    rates = []
    for _ in range(steps):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    X, Y = scale(0, epochs, 100, 850), scale(0, 0.007, 300, 20)
    d.line((X(0), Y(0.007)), (X(0), Y(0)), (X(epochs), Y(0)))
    for epoch in range(0, epochs + 1, 2):
        d.text(X(epoch), 326, str(epoch), "soft")
    for rate in (0, 0.002, 0.004, 0.006):
        d.text(88, Y(rate), f"{rate:g}", "soft end")
    top = rates.index(max(rates))
    (start, low), (peak, high), end = (
        (X(n / steps * epochs), Y(rates[n])) for n in (0, top, steps - 1)
    )
    d.line((peak, Y(0)), (peak, high), style="soft dashed")
    d.line((start, low), (peak, high), end, style="blue thick")
    d.text(start + 22, low - 4, f"{rates[0]:.5f}", "blue start")
    d.text(
        peak + 20, high - 12, f"learning rate {highest:g}, after a fifth of the steps", "blue start"
    )
    d.text(end[0], Y(0.0018), "to almost 0", "blue end")
    d.text(X(epochs / 2), 364, "epoch")
    return d


def first_letters(a: str, b: str) -> int:
    """Count the letters with which both begin."""
    return next((n for n, (c, e) in enumerate(zip(a, b, strict=False)) if c != e), len(a))


def lookup() -> Drawing:
    """Draw how a first name is found by a last name: by the same key, or by all that fit."""
    d = Drawing("A hard lookup takes the value of one key; a soft one mixes all values", 552)
    hard = torch.tensor([float(key == "Li") for key in PEOPLE])
    soft = torch.tensor([float(first_letters(key, "Lin")) for key in PEOPLE]).softmax(dim=0)
    for x, kind, query, weights in ((20, "hard", "Li", hard), (460, "soft", "Lin", soft)):
        d.text(x + 200, 26, f"{kind} lookup", "bold")
        d.text(x + 55, 70, "query")
        d.box(x + 55, 106, 110, 40, query, "blue tint")
        d.arrow((x + 55, 128), (x + 55, 178))
        d.text(x + 95, 158, "key")
        d.text(x + 200, 158, "weight")
        d.text(x + 345, 158, "value")
        d.arrow((x + 345, 372), (x + 345, 400))
        for n, (key, value) in enumerate(PEOPLE.items()):
            y, weight = 200 + 50 * n, weights[n].item()
            d.box(x + 55, y, 110, 40, key, "orange tint")
            d.text(x + 175, y, f"{weight:.2f}" if kind == "soft" else f"{weight:g}", "end")
            if weight:
                d.line((x + 186, y), (x + 186 + 98 * weight, y), style="soft bar")
            d.box(x + 345, y, 110, 40, value, "green tint" if weight else "green tint dashed")
    d.text(365, 418, PEOPLE["Li"], "green bold")
    a, b, c, e = (f"{w:.2f} {name}" for w, name in zip(soft, PEOPLE.values(), strict=True))
    d.text(690, 432, f"{a} + {b} +\n{c} + {e}", "green bold")
    d.text(
        MIDDLE, 496, "Soft weights are the softmax of a score: here, how many first letters agree."
    )
    d.text(MIDDLE, 524, "In attention, all are vectors, and the score is q · k / √d_k.")
    return d


def printed_walk() -> dict[str, list[list[float]]]:
    """Return the matrices that attention.py prints for its sentence, each by its formula."""
    with redirect_stdout(io.StringIO()) as printed:
        attention.main(["--device", "cpu", "--explain", attention.SENTENCE])
    matrices = {}
    for block in printed.getvalue().strip().split("\n\n"):
        heading, _, _, *rows = block.splitlines()
        fields = [[field for field in row.split()[1:] if field[-1].isdigit()] for row in rows]
        matrices[heading.split("   ")[0]] = [[float(field) for field in row] for row in fields]
    return matrices


def one_word() -> Drawing:
    """Draw the row of *cat*, from its scores to the mixture of the values."""
    d = Drawing("The row of cat: scores, exponentials, weights, and the mixture of values", 490)
    walk, words = printed_walk(), attention.SENTENCE.split()
    scores, weights = walk["QKᵀ/√d_k"][1], walk["softmax(QKᵀ/√d_k)"][1]
    exponentials = [round(math.exp(score), 2) for score in scores]  # as one does by hand
    xs, right, total = [250 + 106 * n for n in range(5)], 814, sum(exponentials)
    for x, word in zip(xs, words, strict=True):
        d.text(x, 24, word, "bold")
    for y, name, numbers, style in (
        (74, "score of cat", scores, "orange tint"),
        (146, "e to the score", exponentials, "soft tint"),
        (218, f"divided by {total:.2f}", weights, "blue tint"),
    ):
        d.text(190, y, name, "end")
        for x, each in zip(xs, numbers, strict=True):
            d.arrow((x, y + 19), (x, y + 53))
            d.box(x, y, 88, 38, number(each), style)
    d.text(right, 146, f"sum {total:.2f}")
    d.text(right, 218, f"sum {sum(weights):.2f}")
    d.text(190, 373, "weight times\nvalue", "end")
    for x, weight, value in zip(xs, weights, walk["V = x W_v"], strict=True):
        d.box(x, 356, 88, 168, style="green tint")
        d.text(x, 297, f"{number(weight)} ×", "blue")
        d.text(x, 373, column(value))
        if x < xs[-1]:
            d.text(x + 53, 373, "+")
    d.text((xs[-1] + right) / 2 + 1, 373, "=")
    d.box(right, 373, 88, 134, column(walk["softmax(QKᵀ/√d_k)V"][1]), "green tint thick")
    d.text(860, 464, "what cat gets", "end")
    return d


def positions() -> Drawing:
    """Draw the pattern of sines and cosines, and how alike positions are."""
    d = Drawing("Positional encoding, and the dot products between positions", 514)
    T, d_model, side = 60, 32, 360
    pattern = attention.positional_encoding(T, d_model)
    products = pattern @ pattern.T / (d_model / 2)  # 1 with itself
    d.text(250, 26, f"positional_encoding({T}, {d_model})", "mono")
    d.text(680, 26, f"dot products, divided by {d_model // 2}")
    for x, numbers, across in ((70, pattern, "dimension"), (500, products, "position")):
        rows, columns = numbers.shape
        d.cells(x, 58, side / columns, side / rows, numbers, "blue", "orange")
        d.grid(x, 58, side, 1, 1)
        for y, name in ((66, "0"), (410, f"{rows - 1}")):
            d.text(x - 10, y, name, "soft end")
        for at, name in ((x + 8, "0"), (x + side - 12, f"{columns - 1}")):
            d.text(at, 440, name, "soft")
        d.text(x + side / 2, 440, across)
    d.text(36, 238, "position", turn=-90)
    d.cells(304, 480, 16, 16, torch.linspace(-1, 1, 17).unsqueeze(0), "blue", "orange")
    d.text(285, 488, number(-1, "g"), "soft")
    d.text(592, 488, "1", "soft")
    return d


def masks() -> Drawing:
    """Draw no mask, a causal one, a padding mask, and both."""
    d = Drawing("No mask, a causal mask, a padding mask, and both", 344)
    T, size = 5, 34
    causal = attention.causal_mask(T)
    padding = attention.padding_mask(torch.tensor([[7, 7, 7, 0, 0]]), pad=0)[0].expand(T, T)
    for x, name, mask in (
        (46, "none", torch.ones(T, T)),
        (260, "causal", causal),
        (474, "padding", padding),
        (688, "both", causal & padding),
    ):
        d.text(x + T * size / 2, 24, name, "bold")
        for n in range(T):
            d.text(x + size * (n + 0.5), 62, str(n + 1), "orange")
            d.text(x - 16, 79 + size * (n + 0.5), str(n + 1), "blue")
        d.cells(x, 79, size, size, mask * 0.5, "ink")
        d.grid(x, 79, size, T, T)
    d.text(MIDDLE, 286, "A filled cell: the query (row) may attend to the key (column).")
    d.text(MIDDLE, 314, "Tokens 4 and 5 are padding.")
    return d


def beam() -> Drawing:
    """Draw a beam of two over two steps, as a tree."""
    d = Drawing("A beam of two over two steps, as a tree", 546)
    sums = {
        (a, b): math.log(FIRST[a]) + math.log(p)
        for a, row in SECOND.items()
        for b, p in row.items()
    }
    best, runner_up = sorted(sums, key=sums.__getitem__, reverse=True)[:2]
    places = {"a": 126, "the": 306, "one": 426}
    d.text(290, 24, "log P, step 1")
    d.text(590, 24, "log P, step 2")
    d.text(780, 24, "sum")
    d.box(55, 246, 64, 42, "<s>")
    for word, y in places.items():
        d.arrow((90, 246), (206, y))
        style = "green tint" if word in SECOND else "soft dashed"
        d.box(290, y, 160, 42, f"{word}  {number(math.log(FIRST[word]))}", style)
    for y, (a, b) in zip((66, 126, 186, 276, 336), sums, strict=True):
        kept = (a, b) in (best, runner_up)
        d.arrow((372, places[a]), (496, y))
        style = "green tint" if kept else "soft dashed"
        d.box(590, y, 180, 42, f"{b}  {number(math.log(SECOND[a][b]))}", style)
        d.text(780, y, number(sums[a, b]), "green bold" if kept else "soft")
    first = max(FIRST, key=FIRST.__getitem__)
    greedy = max(SECOND[first], key=SECOND[first].__getitem__)
    d.text(MIDDLE, 486, "At each step, the two largest sums are kept. Greedy search keeps one:")
    found, missed = f"“{first} {greedy}”", f"“{' '.join(best)}”"
    d.text(MIDDLE, 514, f"it ends with {found} and misses {missed}, which is likelier.")
    return d


def learning_rate() -> Drawing:
    """Draw the schedule of the paper, and the one that falls to 0."""
    d = Drawing("The learning rate of each step", 460)
    steps, warmup = 3 * transformer.BATCHES, transformer.WARMUP  # three epochs, as by default
    d_model = transformer.Sizes().d_model
    paper = [transformer.learning_rate(n, d_model, warmup) for n in range(1, steps + 1)]
    ours = [rate * (1 - n / steps) for n, rate in enumerate(paper)]
    X, Y = scale(0, steps, 90, 850), scale(0, 0.007, 360, 30)
    d.line((X(0), Y(0)), (X(steps), Y(0)))
    d.line((X(0), Y(0)), (X(0), Y(0.007)))
    for n in (0, warmup, 1000, 1500, steps):
        d.text(X(n), 386, str(n), "soft")
    for rate in (0, 0.002, 0.004, 0.006):
        d.text(78, Y(rate), f"{rate:g}", "soft end")
    d.line((X(warmup), 360), (X(warmup), Y(max(paper))), style="soft dashed")
    for rates, style in ((paper, "orange thick dashed"), (ours, "blue thick")):
        d.line(*((X(n + 1), Y(rates[n])) for n in (*range(0, steps, 25), steps - 1)), style=style)
    d.text(X(700), Y(0.0064), f"the paper's, highest at step {warmup}", "orange start")
    remaining = "transformer.py's: times the share of\nthe steps that remain"
    d.text(X(700), Y(0.0055), remaining, "blue start")
    d.text(X(steps / 2), 424, "step")
    return d


def shapes() -> Drawing:
    """Draw all matrices of a head, each as large as its shape."""
    d = Drawing("From x to the output of attention: all matrices with their shapes", 640)
    T, size, d_k, side = 5, 6, 4, 20
    head = attention.SelfAttention(size, d_k)
    x = torch.zeros(T, size)
    Q, K, V = head.W_q(x), head.W_k(x), head.W_v(x)
    output, weights = head(x)

    def matrix(left: float, top: float, m: Tensor, name: str, letters: str, style: str) -> None:
        rows, columns = m.shape
        d.cells(left, top, side, side, torch.full((rows, columns), 0.25), style)
        d.grid(left, top, side, rows, columns)
        d.text(left + columns * side + 12, top + rows * side / 2, f"{name}\n({letters})", "start")

    matrix(40, 160, x, "x", "T, d", "ink")
    for left, W, m, name, style in (
        (270, head.W_q, Q, "q", "blue"),
        (470, head.W_k, K, "k", "orange"),
        (670, head.W_v, V, "v", "green"),
    ):
        matrix(left, 20, W.weight.T, f"W_{name}", "d, d_k", style)
        matrix(left, 160, m, name.upper(), "T, d_k", style)
    matrix(40, 460, Q, "Q", "T, d_k", "blue")
    matrix(250, 360, K.T, "Kᵀ", "d_k, T", "orange")
    matrix(250, 460, Q @ K.T, "QKᵀ", "T, T", "ink")
    matrix(460, 460, weights, "weights", "T, T", "ink")
    matrix(690, 340, V, "V", "T, d_k", "green")
    matrix(690, 460, output, "output", "T, d_k", "green")
    d.text(40, 80, "x times the\nmatrix above:\nQ, K and V", "soft start")
    d.text(40, 400, "Q times Kᵀ:\nall dot products", "soft start")
    d.text(490, 400, "weights times V:\nthe output", "soft start")
    d.text(MIDDLE, 302, f"here T = {T} words, d = {size}, d_k = {d_k}", "bold")
    d.arrow((300, 566), (300, 596), (510, 596), (510, 566))
    d.text(405, 620, "divided by √d_k, then the softmax of each row")
    return d


def merge(word: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Join a pair of tokens wherever it stands in a word."""
    joined: list[str] = []
    for token in word:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def merges() -> Drawing:
    """Draw the tokens of three words, before and after each of two merges."""
    d = Drawing("Byte-pair encoding: the most frequent pair of neighbors becomes one token", 446)
    words = [[*word] for word in WORDS]
    left, side = 190, 46
    for step, y in enumerate((84, 224, 364)):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best, count = pairs.most_common(1)[0]
        d.text(170, y, f"{step} merges" if step != 1 else "1 merge", "soft end")
        for n, word in enumerate(words):
            x = left + 220 * n + 10
            for token in word:
                width = side * len(token)
                style = "green tint" if len(token) > 1 else "soft tint"
                d.box(x + width / 2, y, width - 6, 42, token, style)
                x += width
        if count > 1:
            a, b = best
            d.arrow((405, y + 30), (405, y + 108), style="orange")
            d.text(425, y + 69, f"{a} before {b}: {count} times", "orange bold start")
        words = [merge(word, best) for word in words]
    d.text(MIDDLE, 30, "the words to learn from", "bold")
    d.text(MIDDLE, 424, "Now every pair of neighbors is there once.")
    return d


def interval() -> Drawing:
    """Draw an interval that three tokens narrow, each time drawn at full width."""
    d = Drawing("An interval, cut three times: each token keeps its own part", 510)
    left, right = 130, 740
    low, high = 0.0, 1.0
    for n, (token, likely) in enumerate(CODED.items()):
        y = 46 + 130 * n
        X = scale(low, high, left, right)
        d.text(left - 14, y, f"{low:g}", "soft end")
        d.text(right + 14, y, f"{high:g}", "soft start")
        start = low
        for each, probability in likely.items():
            end = start + (high - low) * probability
            style = "green tint thick" if each == token else "soft tint"
            words = f"{each.strip()}\n{probability:g}"
            d.box((X(start) + X(end)) / 2, y, X(end) - X(start), 66, words, style)
            if each == token:
                kept = start, end
            start = end
        for at, corner in zip(kept, (left, right), strict=True):
            d.line((X(at), y + 34), (corner, y + 96), style="green dashed")
        low, high = kept
    y = 430
    d.text(left - 14, y, f"{low:g}", "green bold end")
    d.text(right + 14, y, f"{high:g}", "green bold start")
    d.box(MIDDLE - 5, y, right - left, 44, f"width {high - low:.3f}", "green tint thick")
    d.text(MIDDLE, 480, f"{high - low:.3f} = 2 to the power of {number(math.log2(high - low))}")
    return d


def angle_of(vector: Tensor) -> float:
    """Return the angle of a vector (2,) in radians."""
    return math.atan2(vector[1].item(), vector[0].item())


def factor(value: Tensor) -> str:
    """Write a number as a factor, a negative one in parentheses."""
    return f"({number(value)})" if value < 0 else number(value)


def turned(d: Drawing, center: Point, vector: Point, position: int, style: str) -> Tensor:
    """Draw a vector before and after it is turned by its position; return it turned."""
    x, y = center
    before = torch.tensor(vector, dtype=torch.float64)
    angle = torch.tensor([position], dtype=torch.float64)
    after = gpt.rotate(before, angle.cos(), angle.sin())
    for (a, b), kind in ((before.tolist(), "dashed"), (after.tolist(), "thick")):
        d.arrow((x, y), (x + 68 * a, y - 68 * b), style=f"{style} {kind}")
    a, b = after.tolist()
    d.text(x + 84 * a, y - 84 * b, "query" if style == "blue" else "key", f"{style} bold")
    return after


def rotary() -> Drawing:
    """Draw a query and a key, turned by their positions, for two pairs at the same distance."""
    d = Drawing("A query and a key, turned by their positions: only the distance matters", 530)
    y = 234
    for x, m, n in ((230, 5, 3), (640, 8, 6)):
        d.text(x, 26, f"query at {m}, key at {n}", "bold")
        d.line((x - 150, y), (x + 150, y))
        d.line((x, y - 150), (x, y + 150))
        query = turned(d, (x, y), QUERY, m, "blue")
        key = turned(d, (x, y), KEY, n, "orange")
        start = angle_of(key)
        between = (angle_of(query) - start) % (2 * math.pi)
        arc = [start + between * i / 24 for i in range(25)]
        points = ((x + 44 * math.cos(each), y - 44 * math.sin(each)) for each in arc)
        d.line(*points, style="green thick")
        a, b = math.cos(arc[12]), math.sin(arc[12])
        d.text(x + 76 * a, y - 76 * b, f"{math.degrees(between):.0f}°", "green bold")
        terms = (f"{factor(a)} · {factor(b)}" for a, b in zip(query, key, strict=True))
        d.text(x, 444, " + ".join(terms))
        d.text(x, 472, f"= {number(query @ key)}", "bold")
    d.text(MIDDLE, 510, "Dashed: before they are turned, by one radian (57°) per position.", "soft")
    return d


DIAGRAMS = {
    "line": line,
    "valley": valley,
    "minus-log": minus_log,
    "one-cycle": one_cycle,
    "norms": norms,
    "gelu": gelu,
    "lookup": lookup,
    "one-word": one_word,
    "shapes": shapes,
    "positions": positions,
    "masks": masks,
    "beam": beam,
    "learning-rate": learning_rate,
    "merges": merges,
    "interval": interval,
    "rotary": rotary,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all diagrams; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the diagrams")
    args = parser.parse_args(argv)
    try:
        for name, draw in DIAGRAMS.items():
            path = args.out / f"{name}.svg"
            path.write_text(draw().svg(), encoding="utf-8", newline="\n")
    except OSError as error:
        reason = f"can't write {str(error.filename)!r}: {error.strerror}"
        print(f"{parser.prog}: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
