"""The glossary is in order, and each of its links leads to where the term is explained."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
LINES = (DOCS / "glossary.md").read_text(encoding="utf-8").splitlines()
ENTRIES = [line for line in LINES if line.startswith("- ")]
FORM = re.compile(r"- \*\*(.+?)\*\*: .+ \[(Chapter \d|Long runs)\]\(([\w-]+)\.md#[\w-]+\)")


def section(page, anchor):
    """Return what stands under a heading, without its subsections."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE):
        title, _, body = part.partition("\n")
        if re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") == anchor:
            return body
    return ""


def test_the_terms_are_in_alphabetical_order():
    terms = [FORM.fullmatch(entry)[1].lower() for entry in ENTRIES]
    assert len(terms) > 30
    assert terms == sorted({*terms})


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_term_is_explained_where_its_link_leads(entry):
    term, name, page = FORM.fullmatch(entry).groups()
    assert page.startswith(f"{name[-1]}-" if name.startswith("Chapter") else "long-runs")
    target, anchor = re.search(r"\(([^()]+)#([\w-]+)\)$", entry).groups()
    words = " ".join(section((DOCS / target).read_text(encoding="utf-8"), anchor).split())
    assert re.search(rf"(?<!\*)\*{re.escape(term)}s?\*(?!\*)", words, re.IGNORECASE)
