#!/usr/bin/env python3
"""Draw the diagrams of the course: SVG files beside this one, or in the folder that is given.

    make docs

Every number in them is computed by the course's scripts, or here in plain sight. Lengths are in
pixels of a page 880 wide; shapes are placed by their centers. Colors follow the reader's light or
dark mode, and mean the same everywhere: queries and the encoder are blue, keys and the decoder
orange, values green.
"""

import argparse
import importlib
import io
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from html import escape
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
attention = importlib.import_module("attention")
fashion = importlib.import_module("fashion-mnist")
transformer = importlib.import_module("transformer")

WIDTH, MIDDLE = 880, 440
TEXT, ISO = "12 mars 2021", "2021-03-12"  # a date to read, and what the network writes
COLORS = ("blue", "orange", "green", "purple")  # told apart by color-blind people, too
STYLE = """
:root{--paper:#fff;--ink:#1f2328;--soft:#59636e;
--blue:#0072b2;--orange:#b35900;--green:#00785a;--purple:#a0417e}
@media(prefers-color-scheme:dark){:root{--paper:#0d1117;--ink:#f0f6fc;--soft:#9198a1;
--blue:#56b4e9;--orange:#f0a030;--green:#2fc49a;--purple:#e29cc6}}
svg{color:var(--ink)}.paper{color:var(--paper)}.soft{color:var(--soft)}.blue{color:var(--blue)}
.orange{color:var(--orange)}.green{color:var(--green)}.purple{color:var(--purple)}
text{fill:currentColor;font:22px system-ui,-apple-system,"Segoe UI","Noto Sans",Arial,sans-serif;
text-anchor:middle;dominant-baseline:central;white-space:pre}
.mono{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:20px}
.bold{font-weight:bold}.start{text-anchor:start}.end{text-anchor:end}
path{fill:none;stroke:currentColor;stroke-width:2}.thick{stroke-width:4}.bar{stroke-width:14}
.dashed{stroke-dasharray:6 6}.full{fill:currentColor;stroke:none}
.tint{fill:currentColor;fill-opacity:.14}.area{fill:currentColor;fill-opacity:.14;stroke:none}
"""
Point = tuple[float, float]


def short(number: float) -> str:
    """Write a coordinate to a tenth of a pixel."""
    return f"{round(number, 1) + 0.0:g}"


def decimal(number: float, places: int) -> str:
    """Write a number with a minus sign in place of the hyphen, and none before zero."""
    return f"{round(number, places) + 0.0:.{places}f}".replace("-", "−")


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Write lines around (x, y)."""
    lines = words.split("\n")
    top = y - 14 * (len(lines) - 1)
    return "\n".join(
        f'<text x="{short(x)}" y="{short(top + 28 * n)}" class="{style}">'
        f"{escape(line, quote=False)}</text>"
        for n, line in enumerate(lines)
    )


def path(points: Sequence[Point], style: str = "", close: bool = False) -> str:
    """Draw straight lines from point to point."""
    d = "M" + "L".join(f"{short(x)} {short(y)}" for x, y in points) + "Z" * close
    return f'<path class="{style}" d="{d}"/>'


def arrow(*points: Point, style: str = "soft") -> str:
    """Draw straight lines from point to point, with a head at the last."""
    (x0, y0), (x1, y1) = points[-2:]
    length = math.hypot(x1 - x0, y1 - y0)
    dx, dy = (x1 - x0) / length * 13, (y1 - y0) / length * 13
    back = (x1 - dx, y1 - dy)
    head = [(x1, y1), (back[0] - dy / 2, back[1] + dx / 2), (back[0] + dy / 2, back[1] - dx / 2)]
    return path([*points[:-1], back], style) + path(head, f"full {style.split()[0]}", close=True)


def box(x: float, y: float, w: float, h: float, words: str = "", style: str = "soft tint") -> str:
    """Draw a rounded rectangle around words, which are mono where the style says so."""
    d = f"M{short(x - w / 2 + 6)} {short(y - h / 2)}h{w - 12:g}q6 0 6 6v{h - 12:g}q0 6-6 6"
    d += f"h{12 - w:g}q-6 0-6-6v{12 - h:g}q0-6 6-6z"
    shape = f'<path class="paper full" d="{d}"/>\n<path class="{style}" d="{d}"/>'
    return f"{shape}\n{text(x, y, words, 'mono' if 'mono' in style else '')}" if words else shape


def dot(point: Point, style: str, radius: float = 7) -> str:
    """Draw a full circle."""
    return f'<circle cx="{short(point[0])}" cy="{short(point[1])}" r="{radius}" class="{style} full"/>'


def cells(x: float, y: float, w: float, h: float, numbers: Tensor, styles: Sequence[str]) -> str:
    """Draw a matrix of numbers from -1 to 1, each w by h, with (x, y) at the top left.

    The larger a number, the stronger the first style; the more negative, the second.
    """
    runs: dict[int, str] = {}
    for column, numbers_down in enumerate((numbers * 16).round().int().T.tolist()):
        start = 0
        for row, level in enumerate(numbers_down, start=1):
            if row == len(numbers_down) or numbers_down[row] != level:
                runs[level] = runs.get(level, "") + f"M{column} {start}v{row - start}h1V{start}z"
                start = row
    paths = [
        f'<path class="{styles[level < 0]} full" opacity="{abs(level) / 16:g}" d="{d}"/>'
        for level, d in sorted(runs.items())
        if level
    ]
    place = f'transform="translate({short(x)} {short(y)}) scale({w:g} {h:g})"'
    return "\n".join((f'<g {place} shape-rendering="crispEdges">', *paths, "</g>"))


def grid(x: float, y: float, size: float, rows: int, columns: int, style: str = "soft") -> str:
    """Draw the lines of a matrix of squares, with (x, y) at the top left."""
    right, bottom = x + columns * size, y + rows * size
    across = [path([(x, y + n * size), (right, y + n * size)], style) for n in range(rows + 1)]
    down = [path([(x + n * size, y), (x + n * size, bottom)], style) for n in range(columns + 1)]
    return "\n".join(across + down)


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the function that maps low to start and high to end."""
    return lambda number: start + (number - low) / (high - low) * (end - start)


def svg(title: str, height: int, *parts: str) -> str:
    """Put the parts into a file; the title is for those who can't see it."""
    frame = f'<rect width="{WIDTH}" height="{height}" rx="8" class="paper full" fill="currentColor"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
    head += f'width="{WIDTH}" height="{height}" role="img">'
    return "\n".join((head, f"<title>{title}</title>", f"<style>{STYLE}</style>", frame, *parts, "</svg>\n"))


def valley() -> str:
    """Two steps of gradient descent on one point: x = 1, y = 3."""
    rate, X, Y = 0.2, scale(0, 6, 50, 830), scale(0, 9, 380, 30)

    def loss(w: Tensor) -> Tensor:
        return (w * 1 - 3) ** 2

    def at(w: Tensor) -> Point:
        return X(w.item()), Y(loss(w).item())

    curve = [at(w) for w in torch.linspace(0, 6, 61, dtype=torch.float64)]
    parts = [
        path([(50, 380), (830, 380)], "soft"),
        *(text(X(w), 402, str(w), "soft") for w in range(7)),
        text(858, 380, "w"),
        path(curve, "thick"),
        text(MIDDLE, 60, "the loss L = (w − 3)²", "bold"),
        text(MIDDLE, 100, f"w ← w − η · slope,  η = {rate}"),
    ]
    for start, x, side, color in ((1.0, 235, "right", "blue"), (4.0, 645, "left", "orange")):
        w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        loss(w).backward()
        slope, after = w.grad.item(), (w - rate * w.grad).detach()
        tangent = [(start + d, loss(w).item() + slope * d) for d in (-0.7, 0.7)]
        step = f"w ← {start:g} − {rate} · " + (f"({slope:g})" if slope < 0 else f"{slope:g}")
        parts += [
            path([(X(a), Y(b)) for a, b in tangent], f"{color} dashed"),
            *(path([at(each), (at(each)[0], 380)], f"{color} dashed") for each in (w, after)),
            arrow((X(start), 380), (X(after.item()), 380), style=f"{color} thick"),
            dot(at(w), color),
            dot(at(after), color),
            text(x, 470, f"slope {slope:g}".replace("-", "−"), f"{color} bold"),
            text(x, 502, f"{step} = {after.item():g}".replace("-", "−")),
            text(x, 534, f"a step to the {side}, downhill"),
        ]
    return svg("The valley of a loss, and a step downhill from either side", 560, *parts)


def gelu() -> str:
    """GELU beside ReLU."""
    X, Y = scale(-4, 4, 50, 830), scale(0, 4, 340, 30)
    x = torch.linspace(-4, 4, 161, dtype=torch.float64)
    lowest = x[F.gelu(x).argmin()]
    at = (X(lowest.item()), Y(F.gelu(lowest).item()))
    curves = [
        path([(X(a), Y(b)) for a, b in zip(x.tolist(), f(x).tolist(), strict=True)], style)
        for f, style in ((F.relu, "orange thick dashed"), (F.gelu, "blue thick"))
    ]
    return svg(
        "GELU beside ReLU", 440,
        path([(50, 340), (830, 340)], "soft"), path([(X(0), 30), (X(0), 375)], "soft"),
        *(text(X(n), 398, str(n).replace("-", "−"), "soft") for n in range(-4, 5)),
        *(text(X(0) - 16, Y(n), str(n), "soft end") for n in range(1, 5)),
        *curves, dot(at, "blue"),
        text(X(2.6), Y(3.3), "ReLU: max(0, x)", "orange bold end"),
        text(X(1.55), Y(1.15), "GELU: x · Φ(x)", "blue bold start"),
        text(X(-2.1), Y(0.75), f"lowest: {decimal(F.gelu(lowest).item(), 2)} "
             f"at {decimal(lowest.item(), 2)}", "blue"),
        arrow((X(-1.5), Y(0.6)), (at[0] - 8, at[1] - 9), style="blue"),
        text(X(1.55), Y(0.63), "Φ(x): area under the\nnormal curve left of x", "soft start"),
    )  # fmt: skip


def feed_forward() -> str:
    """The network of fashion-mnist.py."""
    layers = [m for m in fashion.Classifier().modules() if isinstance(m, torch.nn.Linear)]
    sizes = [layers[0].in_features, *(layer.out_features for layer in layers)]
    images, labels = fashion.load(fashion.SAMPLE, train=False)
    image, name = images[0] / 255, fashion.CLASSES[labels[0]]
    xs, tall = (225, 390, 555, 690), [300 * size / sizes[0] for size in sizes[:-1]] + [280]
    parts = [
        cells(20, 120, 5, 5, image, ("ink", "")), grid(20, 120, 140, 1, 1),
        text(90, 296, "image\n28 × 28"),
        arrow((168, 190), (210, 190)),
    ]  # fmt: skip
    for n, ((x0, x1), (h0, h1)) in enumerate(zip(pairwise(xs), pairwise(tall), strict=True)):
        edges = [(x0 + 8, 190 - h0 / 2), (x1 - 8, 190 - h1 / 2)]
        edges += [(x1 - 8, 190 + h1 / 2), (x0 + 8, 190 + h0 / 2)]
        parts += [path(edges, "blue area", close=True), text((x0 + x1) / 2, 190, "Linear", "mono")]
    for x, h, size in zip(xs[:-1], tall, sizes, strict=False):
        parts += [box(x, 190, 16, h, "", "blue tint"), text(x, 172 - h / 2, str(size), "bold")]
    for x in xs[1:3]:
        parts += [text(x, 346, "BatchNorm1d\nGELU", "mono green")]
    for n, each in enumerate(fashion.CLASSES):
        right = each == name
        parts += [dot((690, 64 + 28 * n), "orange" if right else "blue")]
        parts += [text(708, 64 + 28 * n, each, "start orange bold" if right else "start")]
    parts += [text(690, 22, f"{sizes[-1]} logits", "bold")]
    for n, (part, does) in enumerate((
        ("Linear", "each output is a weighted sum of all inputs"),
        ("BatchNorm1d", "brings each number to mean 0, variance 1 over the batch"),
        ("GELU", "bends; without it, stacked layers collapse into one"),
    )):  # fmt: skip
        parts += [text(20, 406 + 34 * n, part, "mono start " + ("green" if n else "blue"))]
        parts += [text(185, 406 + 34 * n, does, "start")]
    return svg("The network of fashion-mnist.py, from an image to ten logits", 502, *parts)


def lookup() -> str:
    """Finding a first name by a last name: the same key only, or each as well as it fits."""
    people = {"Zhang": "Aston", "Lipton": "Zachary", "Li": "Mu", "Smola": "Alex"}

    def common(a: str, b: str) -> int:
        return next((n for n, (c, d) in enumerate(zip(a, b, strict=False)) if c != d), len(a))

    soft = torch.tensor([float(common(key, "Lin")) for key in people]).softmax(dim=0).tolist()
    hard = [float(key == "Li") for key in people]
    parts = []
    for x, name, query, weights in ((20, "hard", "Li", hard), (460, "soft", "Lin", soft)):
        parts += [
            text(x + 200, 26, f"{name} lookup", "bold"),
            text(x + 55, 70, "query"),
            box(x + 55, 106, 110, 40, query, "blue tint"),
            arrow((x + 55, 128), (x + 55, 178)),
            *(text(x + at, 158, word) for at, word in ((95, "key"), (200, "weight"), (345, "value"))),
        ]
        for n, ((key, value), weight) in enumerate(zip(people.items(), weights, strict=True)):
            y, opacity = 200 + 50 * n, "" if weight else " dashed"
            parts += [
                box(x + 55, y, 110, 40, key, "orange tint"),
                text(x + 175, y, f"{weight:.2f}" if name == "soft" else f"{weight:.0f}", "end"),
                path([(x + 186, y), (x + 186 + 98 * weight, y)], "soft bar") if weight else "",
                box(x + 345, y, 110, 40, value, f"green tint{opacity}"),
            ]
        mixed = [f"{w:.2f} {v}" for w, v in zip(weights, people.values(), strict=True)]
        result = "Mu" if name == "hard" else " +\n".join((" + ".join(mixed[:2]), " + ".join(mixed[2:])))
        place = (x + 345, 418, result, "green bold") if name == "hard" else (x + 230, 432, result, "green bold")
        parts += [arrow((x + 345, 372), (x + 345, 400)), text(*place)]
    parts += [
        text(MIDDLE, 510, "Soft weights are the softmax of a score: here, how many first letters "
             "agree.\nIn attention, query, key and value are vectors, and the score is q · k / √d_k."),
    ]  # fmt: skip
    return svg("A hard lookup takes the value of one key; a soft one mixes all values", 552, *parts)


def printed_walk() -> dict[str, list[list[float]]]:
    """Return the numbers that attention.py prints about its sentence, by formula."""
    with redirect_stdout(io.StringIO()) as printed:
        attention.main(["--device", "cpu", "--explain", attention.SENTENCE])
    tables = {}
    for block in printed.getvalue().strip().split("\n\n"):
        formula, _, _, *rows = block.splitlines()
        fields = [[f for f in row.split()[1:] if f[-1].isdigit()] for row in rows]
        tables[formula.split("   ")[0]] = [[float(f) for f in row] for row in fields]
    return tables


def one_word() -> str:
    """The row of *cat*, from its scores to the mixture of the values."""
    walk, words = printed_walk(), attention.SENTENCE.split()
    scores, weights = walk["QKᵀ/√d_k"][1], walk["softmax(QKᵀ/√d_k)"][1]
    exponentials = [round(math.exp(score), 2) for score in scores]  # as by hand
    values, mixture = walk["V = x W_v"], walk["softmax(QKᵀ/√d_k)V"][1]
    X, right, total = [250 + 106 * n for n in range(5)], 814, sum(exponentials)
    parts = [text(x, 24, word, "bold") for x, word in zip(X, words, strict=True)]
    for y, name, numbers, last, style in (
        (74, "score of cat", scores, "", "orange tint"),
        (146, "e to the score", exponentials, f"sum {total:.2f}", "soft tint"),
        (218, f"divided by {total:.2f}", weights, f"sum {sum(weights):.2f}", "blue tint"),
    ):
        parts += [text(190, y, name, "end"), text(right, y, last)]
        for x, number in zip(X, numbers, strict=True):
            parts += [arrow((x, y + 19), (x, y + 53)), box(x, y, 88, 38, decimal(number, 2), style)]
    columns = [(x, value, "green tint") for x, value in zip(X, values, strict=True)]
    for x, vector, style in (*columns, (right, mixture, "green tint thick")):
        parts += [box(x, 336, 88, 128, "\n".join(decimal(v, 2) for v in vector), style)]
        parts += [text(x + 53, 336, "+") if x < X[-1] else ""]
    parts += [text(190, 336, "times value", "end"), text((X[-1] + right) / 2 + 1, 336, "=")]
    parts += [text(860, 424, "what cat gets", "end")]
    return svg("The row of cat: scores, exponentials, weights, and the mixture of the values", 450, *parts)


def split_heads() -> str:
    """From (B, T, d_model) to (B, H, T, d_k) and back."""
    T, H, d_k, size = 4, 4, 2, 22
    heads = torch.arange(H * d_k).unflatten(-1, (H, d_k)).tolist()  # the columns of each
    left, right, middle = 30, 674, 268
    parts = [
        text(118, 26, "(B, T, d_model)", "mono"), text(118, 196, "Q, K or V"),
        text(MIDDLE, 26, "(B, H, T, d_k)", "mono"),
        text(762, 26, "(B, T, d_model)", "mono"), text(762, 196, "then W_o"),
        arrow((632, middle), (665, middle)),
        text(20, 506, ".unflatten(-1, (H, d_k)).transpose(1, 2)", "mono start"),
        text(860, 506, ".transpose(1, 2).flatten(2)", "mono end"),
    ]  # fmt: skip
    for n, (columns, color) in enumerate(zip(heads, COLORS, strict=True)):
        y, start = 112 + 104 * n, columns[0] * size
        for x, top in ((left + start, middle), (335, y), (501, y), (right + start, middle)):
            parts += [cells(x, top - 44, size, size, torch.full((T, d_k), 0.5), (color, ""))]
            parts += [grid(x, top - 44, size, T, d_k)]
        parts += [arrow((215, middle), (326, y)), arrow((388, y), (492, y))]
        parts += [path([(554, y), (632, middle)], "soft"), text(MIDDLE, y - 20, f"head {n + 1}", color)]
    return svg("Splitting into heads and back", 532, *parts)


def positions() -> str:
    """The pattern of sines and cosines, and how alike positions are."""
    T, d_model, side = 60, 32, 360
    pattern = attention.positional_encoding(T, d_model)
    likeness = pattern @ pattern.T / (d_model / 2)  # 1 with itself
    parts = []
    for x, title, numbers, across in (
        (70, f"positional_encoding({T}, {d_model})", pattern, "dimension"),
        (500, f"dot products, divided by {d_model // 2}", likeness, "position"),
    ):
        rows, columns = numbers.shape
        parts += [
            text(x + side / 2, 26, title, "mono" if x == 70 else ""),
            cells(x, 58, side / columns, side / rows, numbers, ("blue", "orange")),
            grid(x, 58, side, 1, 1),
            text(x - 10, 66, "0", "soft end"), text(x - 10, 410, f"{T - 1}", "soft end"),
            text(x + 8, 440, "0", "soft"), text(x + side - 12, 440, f"{columns - 1}", "soft"),
            text(x + side / 2, 440, across),
        ]  # fmt: skip
    parts += [
        f'<g transform="rotate(-90 36 238)">', text(36, 238, "position"), "</g>",
        cells(304, 480, 16, 16, torch.linspace(-1, 1, 17).unsqueeze(0), ("blue", "orange")),
        text(285, 488, "−1", "soft"), text(592, 488, "1", "soft"),
    ]  # fmt: skip
    return svg("Positional encoding, and the dot products between positions", 514, *parts)


def masks() -> str:
    """None, causal, padding, and both."""
    T, size = 5, 34
    causal = attention.causal_mask(T)
    padding = attention.padding_mask(torch.tensor([[7, 7, 7, 0, 0]]), pad=0)[0].expand(T, T)
    parts = []
    for n, (name, mask) in enumerate((
        ("none", torch.ones(T, T, dtype=torch.bool)), ("causal", causal),
        ("padding", padding), ("both", causal & padding),
    )):  # fmt: skip
        x = 46 + 214 * n
        parts += [
            text(x + 85, 24, name, "bold"),
            *(text(x + size * (k + 0.5), 62, str(k + 1), "orange") for k in range(T)),
            *(text(x - 16, 96 + size * k, str(k + 1), "blue") for k in range(T)),
            cells(x, 79, size, size, mask * 0.5, ("ink", "")),
            grid(x, 79, size, T, T),
        ]
    parts += [text(MIDDLE, 300, "A filled cell: the query (row) may attend to the key (column).\n"
                   "Tokens 4 and 5 are padding.")]  # fmt: skip
    return svg("No mask, a causal mask, a padding mask, and both", 344, *parts)


def learning_rate() -> str:
    """The schedule of the paper, and the one that falls to 0."""
    steps, warmup, d_model = 3 * transformer.BATCHES, transformer.WARMUP, transformer.Sizes().d_model
    paper = [transformer.learning_rate(n, d_model, warmup) for n in range(1, steps + 1)]
    ours = [rate * (1 - n / steps) for n, rate in enumerate(paper)]
    X, Y = scale(0, steps, 90, 850), scale(0, 0.007, 360, 30)
    curves = [
        path([(X(n + 1), Y(rates[n])) for n in (*range(0, steps, 25), steps - 1)], style)
        for rates, style in ((paper, "orange thick dashed"), (ours, "blue thick"))
    ]
    return svg(
        "The learning rate of each step", 460,
        path([(90, 360), (850, 360)], "soft"), path([(90, 30), (90, 360)], "soft"),
        *(text(X(n), 386, str(n), "soft") for n in (0, warmup, 1000, 1500, steps)),
        *(text(78, Y(n / 1000), f"{n / 1000:g}", "soft end") for n in (0, 2, 4, 6)),
        path([(X(warmup), 360), (X(warmup), Y(max(paper)))], "soft dashed"),
        *curves,
        text(X(700), Y(0.0064), f"the paper's, highest at step {warmup}", "orange start"),
        text(X(700), Y(0.0055), "transformer.py's: times the share of\nthe steps that remain", "blue start"),
        text(470, 424, "step"),
    )  # fmt: skip


def sublayer(x: float, bottom: float, name: str, note: str, norm: str, side: int) -> list[str]:
    """Draw LayerNorm(x + sublayer(x)), with the residual on one side, up to bottom - 196."""
    color = "blue" if side < 0 else "orange"
    return [
        path([(x, bottom), (x, bottom - 196)], "soft"), arrow((x, bottom), (x, bottom - 29)),
        arrow((x, bottom - 12), (x + 150 * side, bottom - 12), (x + 150 * side, bottom - 124),
              (x + 14 * side, bottom - 124)),
        arrow((x, bottom - 96), (x, bottom - 111)),
        box(x, bottom - 62, 250, 64, "", f"{color} tint"),
        text(x, bottom - 76, name, "mono"), text(x, bottom - 48, note, "soft"),
        dot((x, bottom - 124), "soft", 14), dot((x, bottom - 124), "paper", 12),
        text(x, bottom - 124, "+"), box(x, bottom - 168, 250, 38, norm, "soft tint mono"),
    ]  # fmt: skip


def network() -> str:
    """The encoder and the decoder of the paper, with the names of transformer.py."""
    left, right, bottom = 215, 665, 846
    parts = [
        box(203, 637, 330, 404, "", "soft dashed"), box(677, 539, 330, 600, "", "soft dashed"),
        *sublayer(left, bottom - 4, "self_attention", "padding mask", "norm1", -1),
        *sublayer(left, bottom - 200, "feed_forward", "each position alone", "norm2", -1),
        *sublayer(right, bottom - 4, "self_attention", "causal mask", "norm1", 1),
        *sublayer(right, bottom - 200, "cross_attention", "to the memory", "norm2", 1),
        *sublayer(right, bottom - 396, "feed_forward", "each position alone", "norm3", 1),
        arrow((left, 450), (left, 400), (MIDDLE, 400), (MIDDLE, 584), (538, 584), style="blue"),
        text(330, 378, "memory", "blue bold"),
        text(52, 390, "EncoderLayer\n× num_layers", "mono start"),
        arrow((right, 254), (right, 166)), text(690, 206, "DecoderLayer\n× num_layers", "mono start"),
        box(right, 142, 250, 44, "to_logits", "soft tint mono"),
        arrow((right, 120), (right, 80)), text(right, 56, f"{' '.join(ISO[:5])} …", "bold"),
        text(left, 984, TEXT, "bold"), text(right, 984, f"<s> {' '.join(ISO[:4])} …", "bold"),
        text(right, 26, "the next tokens", "soft"),
        text(left, 1014, "source", "soft"), text(right, 1014, "target so far", "soft"),
        text(492, 562, "K, V", "blue"),
        text(left, 142, "+ adds what went in\n(the residual connection)\n\nnorm brings it to\nmean 0, variance 1", "soft"),
    ]
    for x in (left, right):
        parts += [arrow((x, 964), (x, 941)), path([(x, 871), (x, 842)], "soft")]
        parts += [box(x, 905, 290, 68, "embedding · √d_model\n+ positions", "green tint")]
    return svg("The Transformer: encoder and decoder, each sublayer with residual and norm", 1036, *parts)


def teacher_forcing() -> str:
    """The decoder gets the target, and is to predict the same shifted by one."""
    target = ["<s>", *ISO[:5]]
    X = [330 + 112 * n for n in range(5)]
    parts = [
        text(20, 50, "labels", "start"), text(20, 80, "target[:, 1:]", "mono start"),
        text(20, 330, "input", "start"), text(20, 360, "target[:, :-1]", "mono start"),
        *(path([(X[n], 84), (X[n + 1], 324)], "soft dashed") for n in range(4)),
        box(110, 205, 180, 64, "memory\nof the source", "blue tint"),
        arrow((200, 205), (262, 205)),
        box(554, 205, 580, 64, "decoder\neach position sees itself and those before", "orange tint"),
    ]  # fmt: skip
    for n, x in enumerate(X):
        parts += [arrow((x, 324), (x, 239)), arrow((x, 172), (x, 90))]
        parts += [box(x, 345, 64, 42, target[n]), box(x, 65, 64, 42, target[n + 1], "green tint")]
    parts += [text(854, y, "…") for y in (65, 345)]
    parts += [text(MIDDLE, 412, "Each label is the next input: a dashed line joins the same token.")]
    return svg("Teacher forcing: the labels are the target shifted by one", 442, *parts)


def writing() -> str:
    """What goes in and comes out at each step, with cached keys and values."""
    last = len(ISO) + 1
    parts = [
        text(62, 26, "cached, then what goes in", "bold start"),
        text(780, 26, "what comes out", "bold"), text(90, 428, "⋮"), text(780, 428, "⋮"),
        text(MIDDLE, 548, "Only the new token is computed; keys and values of the others are kept,\n"
             "as are those of the memory from step 1 on."),
    ]  # fmt: skip
    for step, y, tokens, result in (
        *((n + 1, 80 + 92 * n, ["<s>", *ISO[:n]], ISO[n]) for n in range(4)),
        (last, 480, ["<s>", *ISO[:2], "…", *ISO[-2:]], "end"),
    ):
        for k, token in enumerate(tokens):
            new = k == len(tokens) - 1
            parts += [box(90 + 68 * k, y, 56, 42, token, "green tint" if new else "soft dashed")]
        x = 90 + 68 * k
        parts += [
            text(28, y, str(step), "soft"),
            arrow((x + 30, y), (516, y)), box(590, y, 144, 46, "decoder", "orange tint"),
            arrow((664, y), (748, y)), box(780, y, 60, 42, result, "green tint"),
        ]  # fmt: skip
        if step < 4:
            back = [(780, y + 22), (780, y + 46), (x + 68, y + 46), (x + 68, y + 69)]
            parts += [arrow(*back, style="green dashed")]
    return svg("Writing token by token, with a cache", 590, *parts)


def beam() -> str:
    """A beam of two over two steps, as a tree."""
    first = {"a": 0.5, "the": 0.4, "one": 0.1}
    second = {"a": {"dog": 0.4, "cat": 0.35, "bird": 0.25}, "the": {"dog": 0.9, "cat": 0.1}}
    pairs = {
        (a, b): math.log(first[a]) + math.log(p) for a, after in second.items() for b, p in after.items()
    }
    kept = sorted(pairs, key=lambda pair: pairs[pair], reverse=True)[:2]
    greedy = max(second[max(first, key=lambda word: first[word])])
    places = {"a": 126, "the": 306, "one": 426}
    rows = (66, 126, 186, 276, 336)
    parts = []
    for word, y in places.items():
        style = "green tint" if word in second else "soft dashed"
        parts += [arrow((90, 246), (206, y)), box(290, y, 160, 42, f"{word}  {decimal(math.log(first[word]), 2)}", style)]
    for ((a, b), total), y in zip(pairs.items(), rows, strict=True):
        best = (a, b) in kept
        parts += [
            arrow((372, places[a]), (496, y)),
            box(590, y, 180, 42, f"{b}  {decimal(math.log(second[a][b]), 2)}", "green tint" if best else "soft dashed"),
            text(780, y, decimal(total, 2), "green bold" if best else "soft"),
        ]
    parts += [
        box(55, 246, 64, 42, "<s>"), text(290, 24, "log P, step 1"), text(590, 24, "log P, step 2"),
        text(780, 24, "sum"),
        text(MIDDLE, 490, f"The two largest sums are kept at each step. Alone, a would win at first\n"
             f"and lead to a {greedy}; with two, {' '.join(kept[0])} is found."),
    ]  # fmt: skip
    return svg("A beam of two over two steps, as a tree", 530, *parts)


def processes() -> str:
    """What each of two processes does in a step."""
    parts = [
        box(MIDDLE, 45, 780, 48, "a batch"),
        box(MIDDLE, 377, 780, 48, "all-reduce: the gradient of the whole batch", "orange tint"),
        text(MIDDLE, 520, "All processes take the same step, so their weights stay the same."),
    ]
    for rank, x in enumerate((235, 645)):
        for y, words, style in (
            (128, f"process {rank}: batch[{rank}::2]", "blue tint mono"),
            (211, "forward: the loss of its share", "blue tint"),
            (294, "backward: its gradient", "blue tint"),
            (377, "", ""),
            (460, "optimizer.step()", "blue tint mono"),
        ):
            parts += [arrow((x, y - 58), (x, y - 26))]
            parts += [box(x, y, 370, 48, words, style)] if words else []
    return svg("What each process does in a step", 556, *parts)


DIAGRAMS = {
    "valley": valley, "gelu": gelu, "feed-forward": feed_forward, "lookup": lookup,
    "one-word": one_word, "split-heads": split_heads, "positions": positions, "masks": masks,
    "transformer": network, "teacher-forcing": teacher_forcing, "writing": writing, "beam": beam,
    "learning-rate": learning_rate, "processes": processes,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all diagrams; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the diagrams")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, draw in DIAGRAMS.items():
            (args.out / f"{name}.svg").write_text(draw(), encoding="utf-8", newline="\n")
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
