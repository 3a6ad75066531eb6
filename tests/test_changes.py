"""The rows of "Change and watch" are what comes of the changes."""

import re
import signal

import pytest

import changes

SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


@pytest.fixture(autouse=True)
def same_handler():
    """Give a closed pipe its handler back: a script may let it end the process."""
    handler = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, handler)


def number(text, unit):
    """Read the number of a cell."""
    text = text.removesuffix(unit).replace("−", "-")
    power = re.fullmatch(r"(?:(-?\d)·)?10([⁰¹²³⁴⁵⁶⁷⁸⁹]+)", text)
    return float(f"{power[1] or 1}e{power[2].translate(SUPERSCRIPT)}" if power else text)


def page_of(page):
    return (changes.DOCS / page["page"]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "change"),
    [
        pytest.param(
            page, change, id=f"{page['page']} {change['row']}",
            marks=[pytest.mark.slow] if page.get("slow") else [],
        )
        for page, change in changes.CHANGES
    ],
)  # fmt: skip
def test_a_change_does_what_its_row_says(page, change):
    found = changes.measure(page, change)
    unit = page.get("unit", "")
    said = [number(text, unit) for text in changes.cells(page_of(page), change)[: len(found)]]
    assert said == pytest.approx(found, abs=page["spread"], rel=0.5 if max(found) > 1e6 else 0)


@pytest.mark.parametrize(("page", "change"), changes.CHANGES)
def test_a_change_can_be_made_and_has_its_row(page, change):
    source = (changes.SRC / page["script"]).read_text(encoding="utf-8")
    assert change.get("old", "") in source
    for text in changes.cells(page_of(page), change)[:1]:
        number(text, page.get("unit", ""))


def test_every_row_of_change_and_watch_is_made():
    for page in changes.PAGES:
        section = page_of(page).partition("## Change and watch\n")[2].partition("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
        assert len(rows) == len(page["changes"])


def test_numbers_are_written_as_people_write_them():
    page = {"digits": 2, "unit": " %"}
    assert [changes.cell(x, page) for x in (-1.5, 3.14159, 6.2e8)] == [
        "−1.50 %",
        "3.14 %",
        "6·10⁸ %",
    ]
    assert [number(x, "") for x in ("6·10⁸", "10¹⁶", "−6·10⁸")] == [6e8, 1e16, -6e8]
