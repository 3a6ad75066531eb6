#!/usr/bin/env python3
"""Make every change of "Change and watch", and write what comes of it into the pages.

    make docs

Without arguments it makes all of them, most of which train a network; `docs/changes.py 1-hello.md`
makes only those of a page.
"""

import argparse
import contextlib
import io
import math
import re
import runpy
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

DOCS = Path(__file__).resolve().parent
SRC = DOCS.parent / "src"
DATA = Path("/usr/share/datasets/fashion-mnist")  # all of it, where Debian's package is installed
PAGES = tomllib.loads((DOCS / "changes.toml").read_text(encoding="utf-8"))["page"]
CHANGES = [(page, change) for page in PAGES for change in page["changes"]]
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def measure(page: dict[str, Any], change: dict[str, Any]) -> list[float]:
    """Run the changed script as a person would; return the numbers that it prints at last.

    Raises ValueError if the text to change does not stand in the script.
    """
    source = (SRC / page["script"]).read_text(encoding="utf-8")
    old = change.get("old", "")
    if old not in source:
        raise ValueError(f"{page['script']} does not hold {old!r}")
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / page["script"]
        script.write_text(source.replace(old, change.get("new", "")), encoding="utf-8")
        arguments = [str(script), "--device", "cpu", *change.get("arguments", ())]
        if page["script"] == "fashion-mnist.py" and DATA.is_dir():
            arguments += ["--data", str(DATA)]
        if page["script"] != "pytorch-hello.py":  # which saves nothing
            arguments += ["--out", f"{folder}/out"]
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(sys, "path", [str(SRC), *sys.path]),
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
        ):
            runpy.run_path(str(script), run_name="__main__")
    found = re.findall(page["found"], printed.getvalue())[-1]
    return [float(number) for number in (found if isinstance(found, tuple) else (found,))]


def cell(number: float, page: dict[str, Any]) -> str:
    """Write a number as the cell of a table, and a huge one, which rounding decides, roughly."""
    text = f"{number:.{page['digits']}f}"
    if abs(number) >= 1e6:
        text = f"±10{str(round(math.log10(abs(number)))).translate(SUPERSCRIPT)}"
    return text.replace("-", "−") + page.get("unit", "")


def find_row(text: str, change: dict[str, Any]) -> re.Match[str]:
    """Find the row of a change in a page. Raises ValueError unless there is exactly one."""
    rows = [*re.finditer(rf"^\| {re.escape(change['row'])} \|(.*)$", text, re.MULTILINE)]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows begin with {change['row']}")
    return rows[0]


def cells(text: str, change: dict[str, Any]) -> list[str]:
    """Return the cells of a row after its first."""
    row = find_row(text, change)[1].rstrip().removesuffix("|")
    return [each.strip() for each in row.split("|")]


def main() -> None:
    """Write the numbers into the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="pages to do, instead of all")
    pages = parser.parse_args().pages
    for page, change in CHANGES:
        if pages and page["page"] not in pages:
            continue
        path = DOCS / page["page"]
        numbers = [cell(number, page) for number in measure(page, change)]
        text = path.read_text(encoding="utf-8")
        row, rest = find_row(text, change), cells(text, change)[len(numbers) :]
        line = f"| {' | '.join([change['row'], *numbers, *rest])} |"
        text = text[: row.start()] + re.sub(r" +\|", " |", line) + text[row.end() :]
        path.write_text(text, encoding="utf-8")
        print(path.name, change["row"], *numbers, flush=True)


if __name__ == "__main__":
    main()
