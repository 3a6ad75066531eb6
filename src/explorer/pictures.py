"""Tables, lines and trees as HTML and SVG, for the page of explore.py.

Blue is positive and orange negative, a pair that color-blind people can tell apart; text has the
color of the page, light or dark.
"""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from unicodedata import category

import torch
from PIL import Image
from torch import Tensor

from explorer.switches import Branch, Formula, letter

BLUE = (42, 143, 208)  # RGB
ORANGE = (213, 94, 0)
MOST_BITS = 10.0  # of a token: more have no stronger color
STYLE = """<style>
html {font-size: 16px;}
.tables {display: flex; flex-wrap: wrap; gap: 8px 32px; width: 100%;}
.scroll {max-width: 100%; overflow-x: auto; font-size: 14px; font-variant-numeric: tabular-nums;}
.scroll table {border-collapse: collapse;}
.scroll caption {text-align: left; font-weight: bold; padding: 6px 0; white-space: nowrap;}
.scroll th {font-weight: normal; padding: 2px 5px; text-align: right; white-space: nowrap;}
.scroll td {padding: 3px 5px; text-align: right; white-space: nowrap; min-width: 25px;
  height: 24px;}
.scroll figcaption {font-weight: bold; padding: 6px 0;}
.text {margin: 0; flex: 1 1 280px; max-width: min(100%, 36em); min-width: 0;}
.text pre {font: 15px/1.7 monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;}
.text pre span {padding: 2px 0;}
.text figcaption {font-weight: bold; padding: 6px 0;}
</style>"""


def side_by_side(*pictures: str) -> str:
    """Put pictures side by side as HTML, or below each other where there is no room."""
    return f'<div class="tables">{"".join(pictures)}</div>'


def visible(token: str) -> str:
    """Make a token visible on its own: ␣ for a space, ↵ for a line break, ◌ under an accent."""
    accents = token[:1] and category(token[0]).startswith("M")
    signs = (("↵" if c == "\n" else "␣") if c.isspace() else c for c in token)
    return ("◌" if accents else "") + "".join(signs)


def decimal(x: float) -> str:
    """Format a number with two decimals, and mark NaN."""
    if math.isnan(x):
        return "✗ NaN"
    text = f"{round(x, 2) + 0.0:.2f}" if abs(x) < 1e4 else f"{x:.1e}"  # + 0.0: no −0.00
    return text.replace("-", "−").replace("inf", "∞")


def shade(x: float, top: float) -> str:
    """Return the color of a number as CSS: the further from 0, up to `top`, the stronger."""
    red, green, blue = BLUE if x > 0 else ORANGE
    share = 0.75 * min(1, abs(x) / top) if math.isfinite(x) else 0
    return f"background: rgba({red}, {green}, {blue}, {share:.2f})"


def heat(
    title: str,
    matrix: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None,
) -> str:
    """Return a table (len(rows), len(columns)) as HTML, the color stronger the larger the number.

    The cells show the numbers, or the texts.
    """
    top = max(1.0, matrix.nan_to_num(0, 0, 0).abs().max().item())
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in columns)
    lines = [f"<caption>{escape(title)}</caption><tr><td></td>{head}</tr>"]
    for i, (name, numbers) in enumerate(zip(rows, matrix.tolist(), strict=True)):
        cells = ""
        for j, x in enumerate(numbers):
            text = escape(texts[i][j]) if texts else decimal(x)
            cells += f'<td style="{shade(x, top)}" title="{x:.4g}">{text}</td>'
        lines.append(f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>")
    return f'<div class="scroll" tabindex="0"><table>{"".join(lines)}</table></div>'


def pixels(title: str, matrix: Tensor, size: int = 4) -> str:
    """Return a matrix as an image in HTML, `size` pixels for each number."""
    share = (matrix / matrix.abs().max().clamp(min=1e-9)).unsqueeze(-1)
    color = torch.where(share > 0, torch.tensor(BLUE), torch.tensor(ORANGE))
    rgb = (255 + share.abs() * (color - 255)).to(torch.uint8)  # (T, S, 3)
    file = io.BytesIO()
    Image.fromarray(rgb.numpy()).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    width = size * matrix.shape[1]
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(title)}" width="{width}" '
    image += 'style="image-rendering: pixelated">'
    return f'<figure class="scroll"><figcaption>{escape(title)}</figcaption>{image}</figure>'


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """Return a picture that scrolls where it is too wide."""
    size = f'width="{width:.0f}" height="{height:.0f}" fill="currentColor"'
    return f'<div class="scroll" tabindex="0"><svg {size}>{"".join(parts)}</svg></div>'


def plot(title: str, axis: str, lines: dict[str, Sequence[float]]) -> str:
    """Return lines over 1, 2, 3 and so on as SVG."""
    top = max(max(numbers) for numbers in lines.values()) or 1.0
    count = max(map(len, lines.values()))
    parts = [f'<text y="16" font-weight="bold">{escape(title)}</text>']
    for share in (0, 0.5, 1):
        y = 190 - 150 * share
        parts.append(f'<text x="54" y="{y + 5}" text-anchor="end">{share * top:.3g}</text>')
        parts.append(f'<path d="M60 {y}H340" stroke="currentColor" opacity="0.3"/>')
    parts.append('<text x="60" y="210">1</text><text x="340" y="210" text-anchor="end">')
    parts.append(f"{escape(axis)} {count:,}</text>")
    for i, (name, numbers) in enumerate(lines.items()):
        step = 280 / max(1, count - 1)
        points = " ".join(
            f"{60 + step * n:.1f},{190 - 150 * y / top:.1f}" for n, y in enumerate(numbers)
        )
        color, dash = ((BLUE, "none"), (ORANGE, "7 4"))[i % 2]
        style = f'fill="none" stroke="rgb{color}" stroke-width="2.5" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{points}" {style}/>')
        if count == 1:  # which a line doesn't show
            place = 'cx="{}" cy="{}"'.format(*points.split(","))
            parts.append(f'<circle {place} r="4" fill="rgb{color}"/>')
        parts.append(f'<path d="M60 {230 + 20 * i}h28" {style}/>')
        parts.append(f'<text x="96" y="{235 + 20 * i}">{escape(name.replace("_", " "))}</text>')
    return svg(345, 225 + 20 * len(lines), parts)


def tree(steps: Sequence[Sequence[Branch]], best: Sequence[int], vocabulary: dict[str, int]) -> str:
    """Return the branches of a beam search as SVG: a column per step, the best path in blue."""
    parts: list[str] = []
    places: dict[tuple[int, ...], tuple[int, int]] = {}
    for n, step in enumerate(steps):
        for row, branch in enumerate(step):
            x = 4 + 84 * n
            y = 20 + 44 * row
            places[branch.tokens] = (x, y)
            on_path = branch.tokens == tuple(best[:n])
            if n:
                left, above = places[branch.tokens[:-1]]
                color, width = (f"rgb{BLUE}", 4) if on_path else ("currentColor", 1)
                style = f'stroke="{color}" stroke-width="{width}"'
                parts.append(f'<path d="M{left + 46} {above}L{x - 4} {y}" {style}/>')
            token = visible(letter(branch.tokens[-1], vocabulary)) if n else "start"
            weight = "bold" if on_path else "normal"
            parts.append(f'<text x="{x}" y="{y + 5}" font-weight="{weight}">{escape(token)}')
            parts.append(f'<tspan x="{x}" dy="16">{decimal(branch.log_p)}</tspan></text>')
    return svg(84 * len(steps), 44 * max(map(len, steps)) + 10, parts)


def by_hand(steps: Formula, row: int, words: Sequence[str], by_row: bool) -> str:
    """Return a table that computes one row of the weights, and its output, step by step."""
    powers = steps.scaled.exp()
    sums = powers.sum(dim=1 if by_row else 0, keepdim=True).expand_as(powers)
    columns = [x[row].tolist() for x in (steps.scores, steps.scaled, powers, sums, steps.weights)]
    rows = ["q · k", "what the softmax gets, x", "eˣ", "sum of eˣ", "weight: eˣ / sum"]
    texts = [[decimal(x) for x in column] for column in columns]
    color = steps.weights[row].expand(len(rows), -1)
    table = heat(f"“{words[row]}” followed by hand", color, rows, words, texts)
    terms = (f"{text} · v<sub>{j}</sub>" for j, text in enumerate(texts[-1], start=1))
    result = ", ".join(map(decimal, steps.output[row].tolist()))
    return f"<div>{table}<p>Its output: {' + '.join(terms)} = ({result})</p></div>"


def percent(share: float) -> str:
    """Format a share in percent; one below half a percent becomes an empty string."""
    return f"{share:.0%}" if share >= 0.005 else ""


def likeliest(probabilities: Tensor, vocabulary: dict[str, int]) -> str:
    """Return the three likeliest characters at each step, from probabilities (T, V)."""
    values, tokens = probabilities.topk(3)
    letters = [[visible(letter(token, vocabulary)) for token in row] for row in tokens.T.tolist()]
    texts = [
        [f"{name}: {percent(p)}" if percent(p) else "" for name, p in zip(names, row, strict=True)]
        for names, row in zip(letters, values.T.tolist(), strict=True)
    ]
    title = "Its probabilities (labels smoothed by 0.1: about 90% at most)"
    columns = [str(t + 1) for t in range(len(values))]
    return heat(title, values.T, ["likeliest", "second", "third"], columns, texts)


def looks(weights: dict[str, Tensor], t: int, source: Sequence[str], target: Sequence[str]) -> str:
    """Return where each head of each attention looks to predict token t of the target, as HTML.

    The keys of `weights` (H, T, S) are the names of the attentions. The encoder's row is the token
    that the last attention to the memory looks at most.
    """
    *_, last = weights.values()
    top = int(last[:, t].mean(dim=0).argmax())
    padding = ["pad"] * (last.shape[-1] - len(source) - 1)
    read = [*map(visible, source), "end", *padding]
    written = ["start", *map(visible, target), "end"]
    kinds = {
        ("decoder", "self_attention"): (
            f"Decoder, to its own prediction, to predict “{written[t + 1]}”, in %",
            t,
            written,
        ),
        ("decoder", "cross_attention"): (
            f"Decoder, to the text, to predict “{written[t + 1]}”, in %",
            t,
            read,
        ),
        ("encoder", "self_attention"): (
            f"Encoder, from “{read[top]}”, where the decoder looks most, in %",
            top,
            read,
        ),
    }
    tables = []
    for kind, (title, row, columns) in kinds.items():
        layers = [w[:, row] for name, w in weights.items() if tuple(name.split(".")[::2]) == kind]
        matrix = torch.cat(layers)  # (layers * H, S)
        names = [
            f"layer {n + 1}, head {h + 1}" for n, w in enumerate(layers) for h in range(len(w))
        ]
        texts = [[percent(x).rstrip("%") for x in line] for line in matrix.tolist()]
        tables.append(heat(title, matrix, names, columns[: matrix.shape[1]], texts))
    return side_by_side(*tables)


def shaded(text: str, ends: Sequence[int], bits: Sequence[float], followed: int) -> str:
    """Return a text as HTML, each token shaded by its bits, and the followed one framed.

    Token n ends before the character ends[n]. Those within one character are shaded as one.
    """
    pieces: list[list[int]] = []  # the tokens of each
    starts = [0]
    for n, end in enumerate(ends):
        if end > starts[-1] or not pieces:
            pieces.append([])
            starts.append(end)
        pieces[-1].append(n)
    spans = ""
    for tokens, start, end in zip(pieces, starts, starts[1:], strict=False):
        cost = sum(bits[n] for n in tokens)
        frame = "; outline: 2px solid" if followed in tokens else ""
        part = escape(text[start:end]).replace("\n", "↵\n")
        spans += (
            f'<span style="{shade(cost, MOST_BITS)}{frame}" title="{cost:.2f} bits">{part}</span>'
        )
    legend = " ".join(
        f'<span style="{shade(n, MOST_BITS)}">&nbsp;{n}&nbsp;</span>' for n in range(0, 11, 2)
    )
    title = "<figcaption>The text, shaded by bits</figcaption>"
    return f'<figure class="text">{title}<pre>{spans}</pre><p>Bits: {legend} or more</p></figure>'


def two_texts(titles: Sequence[str], texts: Sequence[str]) -> str:
    """Return two texts as HTML; the part of the second that differs is marked."""
    first, second = texts
    same = 0
    while same < min(map(len, texts)) and first[same] == second[same]:
        same += 1
    mark = f'<span style="{shade(1, 2)}">{escape(second[same:])}</span>'
    bodies = (escape(first), escape(second[:same]) + mark)
    figures = (
        f'<figure class="text"><figcaption>{escape(title)}</figcaption><pre>{body}</pre></figure>'
        for title, body in zip(titles, bodies, strict=True)
    )
    return "".join(figures)


def rivals(bits: Tensor, names: Sequence[str], real: int) -> str:
    """Return the probabilities of some tokens, from their bits (N,), as a table.

    `real` tells which of them stands in the text.
    """
    rows = [visible(name) + (" (in the text)" if n == real else "") for n, name in enumerate(names)]
    matrix = torch.stack(((-bits).exp2(), bits), dim=1)
    texts = [[f"{p:.1%}", decimal(cost)] for p, cost in matrix.tolist()]
    title = f"“{visible(names[real])}” and its rivals"
    return heat(title, matrix[:, :1].expand(-1, 2), rows, ["probability", "bits"], texts)


def reshaped(before: Tensor, after: Tensor, names: dict[int, str]) -> str:
    """Return the probabilities (V,) before and after sampling's changes, of some tokens by name."""
    both = torch.stack((before, after), dim=1)  # (V, 2)
    shown = torch.tensor([*names])
    others = both.index_fill(0, shown, 0).sum(dim=0, keepdim=True)
    matrix = torch.cat((both[shown], others))
    texts = [[f"{p:.1%}" if p else "0" for p in row] for row in matrix.tolist()]
    rows = [*map(visible, names.values()), "all others"]
    return heat("The next token", matrix, rows, ["as predicted", "with the sliders"], texts)
