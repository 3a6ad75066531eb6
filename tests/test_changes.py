"""The rows of "Change and watch" are what comes of the changes."""

import re

import pytest

import changes

SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


def number(text, unit):
    """Read the number of a cell; of ±10⁹, without the sign."""
    text = text.removesuffix(unit).replace("−", "-")
    power = re.fullmatch(r"±10([⁰¹²³⁴⁵⁶⁷⁸⁹]+)", text)
    return float(f"1e{power[1].translate(SUPERSCRIPT)}" if power else text)


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
    for text, value in zip(changes.cells(page_of(page), change), found, strict=False):
        said = number(text, unit)
        if text.startswith("±"):
            assert said / 10 < abs(value) < 10 * said
        else:
            assert said == pytest.approx(value, abs=page["spread"])


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
    texts = ["−1.50 %", "3.14 %", "±10⁹ %"]
    assert [changes.cell(x, page) for x in (-1.5, 3.14159, -6.2e8)] == texts
    assert [number(text, " %") for text in texts] == [-1.5, 3.14, 1e9]
