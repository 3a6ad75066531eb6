"""The rows of "Change and watch" are what comes of the changes."""

import re
import runpy

import pytest
import torch
import torch.nn.functional as F

import changes
from make_models import draw_weights

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


SIZES = ("--d-model", "16", "--num-layers", "1", "--num-kv-heads", "4", "--d-ff", "24")
LANGUAGE = [(page, change) for page, change in changes.CHANGES if page["script"] == "gpt.py"]


def learn(change, folder):
    """Train the changed network of gpt.py for two steps; return logits."""
    source = (changes.SRC / "gpt.py").read_text(encoding="utf-8")
    script = folder / "gpt.py"
    edited = source.replace(change.get("old", "\0"), change.get("new", ""))
    script.write_text(edited, encoding="utf-8")
    names = runpy.run_path(str(script), run_name="changed")
    options = change.get("arguments", ())[2:]  # without the steps
    _, settings = names["parse"](["--device", "cpu", *SIZES, *options])
    model = draw_weights(names["GPT"](settings.sizes(300)))
    optimizers = names["make_optimizers"](model, settings)
    for step in range(2):
        names["set_rates"](optimizers, step, settings)
        windows = torch.arange(2 * settings.context + 2).view(2, -1) * 7 % 300
        logits = model(windows[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
    return model(torch.arange(8).unsqueeze(0)).detach()


@pytest.mark.parametrize(
    ("page", "change"), LANGUAGE, ids=[change["row"] for _, change in LANGUAGE]
)
def test_a_changed_language_model_learns_and_is_another_one(page, change, tmp_path):
    logits = learn(change, tmp_path)
    assert logits.isfinite().all()
    assert torch.equal(logits, learn({}, tmp_path)) == (change["row"] == "none")


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
