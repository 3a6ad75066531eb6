"""Shapes for the diagrams of the course, written as SVG.

Lengths are in pixels of a page 880 wide; boxes, dots and words are placed by their centers. A style
is a list of names from STYLE. Colors follow the reader's light or dark mode; pictures that are
edited by hand have the same. The paper is drawn, too, so that a page in the other mode leaves the
words legible.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

from torch import Tensor

WIDTH = 880
LEVELS = 16  # shades of a cell, on either side of 0
STYLE = """
:root{--paper:#fff;--ink:#1f2328;--soft:#59636e;
--blue:#0072b2;--orange:#b35900;--green:#14733f;--purple:#8a2a6a}
@media(prefers-color-scheme:dark){:root{--paper:#0d1117;--ink:#f0f6fc;--soft:#9198a1;
--blue:#56b4e9;--orange:#f0a030;--green:#39b577;--purple:#eac0d8}}
svg{color:var(--ink)}.paper{color:var(--paper)}.soft{color:var(--soft)}.blue{color:var(--blue)}
.orange{color:var(--orange)}.green{color:var(--green)}
text{fill:currentColor;font:22px system-ui,-apple-system,"Segoe UI","Noto Sans",Arial,sans-serif;
text-anchor:middle;dominant-baseline:central;white-space:pre}
.mono{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:20px}
.bold{font-weight:bold}.start{text-anchor:start}.end{text-anchor:end}
path{fill:none;stroke:currentColor;stroke-width:2}.thick{stroke-width:4}.bar{stroke-width:14}
.dashed{stroke-dasharray:6 6}.full{fill:currentColor;stroke:none}
.tint{fill:currentColor;fill-opacity:.14}
"""
Point = tuple[float, float]


def short(length: float) -> str:
    """Write a length to a tenth of a pixel."""
    return f"{round(length, 1) + 0.0:g}"


def number(value: float, form: str = ".2f") -> str:
    """Write a number with a minus sign for the hyphen, and without it before zero."""
    return f"{float(f'{value:{form}}') + 0.0:{form}}".replace("-", "−")


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the function that maps low to start and high to end, in a straight line."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


class Drawing:
    """A picture: shapes in the order in which they are drawn."""

    def __init__(self, title: str, height: int) -> None:
        self.title = title  # for those who can't see it
        self.height = height
        self.shapes: list[str] = []

    def text(self, x: float, y: float, words: str, style: str = "", turn: float = 0) -> None:
        """Write one line or several, with (x, y) in their middle, turned by some degrees."""
        lines = words.split("\n")
        for n, line in enumerate(lines):
            place = f'x="{short(x)}" y="{short(y + 28 * n - 14 * (len(lines) - 1))}"'
            if turn:
                place += f' transform="rotate({turn:g} {short(x)} {short(y)})"'
            self.shapes.append(f'<text {place} class="{style}">{escape(line, quote=False)}</text>')

    def line(self, *points: Point, style: str = "soft", close: str = "") -> None:
        """Draw straight lines from point to point; `close="Z"` returns to the first."""
        d = "M" + "L".join(f"{short(x)} {short(y)}" for x, y in points) + close
        self.shapes.append(f'<path class="{style}" d="{d}"/>')

    def arrow(self, *points: Point, style: str = "soft") -> None:
        """Draw straight lines from point to point, with a head at the last."""
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / length * 13, (y1 - y0) / length * 13
        x, y = x1 - dx, y1 - dy
        self.line(*points[:-1], (x, y), style=style)
        wings = (x - dy / 2, y + dx / 2), (x + dy / 2, y - dx / 2)
        self.line((x1, y1), *wings, style=f"full {style.split()[0]}", close="Z")

    def box(
        self, x: float, y: float, w: float, h: float, words: str = "", style: str = "soft tint"
    ) -> None:
        """Draw a rounded rectangle on paper, with words."""
        d = f"M{short(x - w / 2 + 6)} {short(y - h / 2)}h{w - 12:g}q6 0 6 6v{h - 12:g}q0 6-6 6"
        d += f"h{12 - w:g}q-6 0-6-6v{12 - h:g}q0-6 6-6z"
        self.shapes += [f'<path class="{each}" d="{d}"/>' for each in ("paper full", style)]
        if words:
            self.text(x, y, words)

    def dot(self, x: float, y: float, style: str, radius: float = 7) -> None:
        """Draw a full circle."""
        place = f'cx="{short(x)}" cy="{short(y)}" r="{radius:g}"'
        self.shapes.append(f'<circle {place} class="{style} full"/>')

    def cells(self, x: float, y: float, w: float, h: float, numbers: Tensor, *styles: str) -> None:
        """Draw a matrix of numbers from -1 to 1, each w by h, with (x, y) at the top left.

        The larger a number, the stronger the first style; the more negative, the second.
        """
        runs: dict[int, str] = {}
        for column, levels in enumerate((numbers * LEVELS).round().int().T.tolist()):
            start = 0
            for row, level in enumerate(levels, start=1):
                if row == len(levels) or levels[row] != level:
                    run = f"M{column} {start}v{row - start}h1V{start}z"
                    runs[level], start = runs.get(level, "") + run, row
        place = f'transform="translate({short(x)} {short(y)}) scale({w:g} {h:g})"'
        self.shapes.append(f'<g {place} shape-rendering="crispEdges">')
        for level in sorted(runs.keys() - {0}):
            shade = f'class="{styles[level < 0]} full" opacity="{abs(level) / LEVELS:g}"'
            self.shapes.append(f'<path {shade} d="{runs[level]}"/>')
        self.shapes.append("</g>")

    def grid(self, x: float, y: float, size: float, rows: int, columns: int) -> None:
        """Draw the lines of a matrix of squares, with (x, y) at the top left."""
        right, bottom = x + columns * size, y + rows * size
        for n in range(rows + 1):
            self.line((x, y + n * size), (right, y + n * size))
        for n in range(columns + 1):
            self.line((x + n * size, y), (x + n * size, bottom))

    def svg(self) -> str:
        """Return the file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{WIDTH}" height="{self.height}" role="img">'
        )
        about = f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>"
        paper = f'<rect width="{WIDTH}" height="{self.height}" rx="8" class="paper full"/>'
        return "\n".join((head, about, paper, *self.shapes, "</svg>\n"))


def column(numbers: Sequence[float]) -> str:
    """Write numbers below each other."""
    return "\n".join(number(each) for each in numbers)
