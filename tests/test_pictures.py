import base64
import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import explorer.pictures as P
from explorer.switches import Branch, attend


def cells(table):
    """The colors, exact numbers and texts of a table."""
    return re.findall(r'<td style="background: (.+?)" title="(.+?)">(.*?)</td>', table)


def test_a_table_shows_numbers_and_colors():
    table = P.heat("a < b", torch.tensor([[0.5, -2.0], [0.0, 1.0]]), ["<r>", "s"], ["c", "&"])
    found = cells(table)
    assert [text for _, _, text in found] == ["0.50", "−2.00", "0.00", "1.00"]
    assert [exact for _, exact, _ in found] == ["0.5", "-2", "0", "1"]
    assert [color.partition(")")[0] for color, _, _ in found] == [
        "rgba(42, 143, 208, 0.19", "rgba(213, 94, 0, 0.75",
        "rgba(213, 94, 0, 0.00", "rgba(42, 143, 208, 0.38",
    ]  # fmt: skip
    assert "a &lt; b" in table and "&lt;r&gt;" in table and "&amp;" in table


def test_a_table_shows_what_is_no_number():
    matrix = torch.tensor([[math.nan, -math.inf, 123456.0]])
    texts = [text for _, _, text in cells(P.heat("", matrix, ["r"], ["a", "b", "c"]))]
    assert texts == ["✗ NaN", "−∞", "1.2e+05"]


def test_a_table_shows_texts():
    table = P.heat("", torch.ones(1, 2), ["r"], ["a", "b"], [["<x>", "y"]])
    assert [text for _, _, text in cells(table)] == ["&lt;x&gt;", "y"]


@pytest.mark.parametrize(
    ("token", "seen"),
    [(" ", "␣"), ("\n\t", "↵␣"), ("\u202f", "␣"), ("a", "a"), ("\u0301", "◌\u0301"), ("", "")],
)
def test_every_token_can_be_seen(token, seen):
    assert P.visible(token) == seen


def test_an_image_has_the_colors_of_its_numbers():
    html = P.pixels("the title", torch.tensor([[2.0, 0.0], [-1.0, -2.0]]), size=5)
    png = base64.b64decode(re.search(r"base64,(.+?)\"", html)[1])
    found = np.array(Image.open(io.BytesIO(png)))
    assert found[0].tolist() == [[*P.BLUE], [255, 255, 255]]
    assert found[1].tolist() == [[234, 174, 127], [*P.ORANGE]]
    assert 'alt="the title" width="10"' in html


def test_a_line_goes_through_its_numbers():
    html = P.plot(
        "loss", "epoch", {"training_loss": [4.0, 1.0, 2.0], "validation_loss": [2.0, 2.0]}
    )
    first, second = re.findall(r'polyline points="(.+?)"', html)
    assert first == "60.0,40.0 200.0,152.5 340.0,115.0"
    assert second == "60.0,115.0 200.0,115.0"
    assert "epoch 3" in html and ">training loss<" in html


def test_a_line_of_one_number_can_be_drawn():
    assert '<circle cx="60.0" cy="40.0"' in P.plot("", "epoch", {"loss": [3.0]})


def test_the_tree_has_a_node_for_each_branch():
    steps = [
        [Branch((), 0.0, -9.0, -9.0)],
        [Branch((4,), -0.1, -9.0, -9.0), Branch((5,), -2.5, -9.0, -9.0)],
        [Branch((4, 5), -0.2, -0.3, -0.3), Branch((4, 4), -3.0, -9.0, -9.0)],
    ]
    html = P.tree(steps, [4, 5], {"<": 4, "b": 5})
    nodes = re.findall(r'font-weight="(\w+)">(.*?)<tspan[^>]*>(.*?)</tspan>', html)
    assert nodes == [
        ("bold", "start", "0.00"),
        ("bold", "&lt;", "−0.10"), ("normal", "b", "−2.50"),
        ("bold", "b", "−0.20"), ("normal", "&lt;", "−3.00"),
    ]  # fmt: skip
    assert html.count("<path") == 4 and html.count(f"rgb{P.BLUE}") == 2


@pytest.mark.parametrize("by_row", [True, False])
def test_one_word_is_followed_to_its_output(by_row):
    Q, K, V = torch.randn(3, 4, 2, dtype=torch.float64)
    steps = attend(Q, K, V, mask="causal", by_row=by_row)
    html = P.by_hand(steps, 2, ["a", "b", "c", "d"], by_row)
    texts = [text for _, _, text in cells(html)]
    score, x, power, total, weight = (texts[4 * n : 4 * n + 4] for n in range(5))
    assert score == [P.decimal(s) for s in (Q[2] @ K.T).tolist()]
    assert x[3] == "−∞" and power[3] == weight[3] == "0.00"
    for part, whole, share in zip(power, total, weight, strict=True):
        if float(whole) > 0.5:
            assert float(part) / float(whole) == pytest.approx(float(share), abs=0.03)
    assert f"= ({', '.join(map(P.decimal, steps.output[2].tolist()))})" in html


def test_the_likeliest_characters_stand_on_top():
    probabilities = torch.tensor([[0.0, 0.0, 0.0, 0.001, 0.9, 0.099], [0, 0, 1.0, 0, 0, 0]])
    texts = [text for _, _, text in cells(P.likeliest(probabilities, {"a": 4, " ": 5}))]
    assert texts == ["a: 90%", "end: 100%", "␣: 10%", "", "", ""]


def test_where_it_looks_is_the_row_of_the_step():
    generator = torch.Generator().manual_seed(0)
    sizes = {"encoder.0.self_attention": (5, 5), "decoder.0.self_attention": (3, 3)}
    sizes |= {"decoder.0.cross_attention": (3, 5)}
    weights = {
        name: torch.rand(2, *size, generator=generator).softmax(dim=-1)
        for name, size in sizes.items()
    }
    own, memory, encoder = P.looks(weights, 1, "a b", "xy").split("<caption>")[1:]
    assert own.startswith("Decoder, to its own prediction, to predict “y”, in %")
    assert [*re.findall("<th scope=col>(.*?)<", memory)] == ["a", "␣", "b", "end", "pad"]
    top = int(weights["decoder.0.cross_attention"][:, 1].mean(dim=0).argmax())
    rows = ((own, "decoder.0.self_attention", 1), (memory, "decoder.0.cross_attention", 1))
    for table, name, row in (*rows, (encoder, "encoder.0.self_attention", top)):
        expected = [f"{w:.4g}" for w in weights[name][:, row].flatten().tolist()]
        assert [exact for _, exact, _ in cells(table)] == expected


def test_each_token_of_a_text_is_shaded_by_its_bits():
    html = P.shaded("a<é\nz", [2, 3, 3, 4, 5], [0.0, 3.0, 2.5, 20.0, 1.0], 2)
    spans = re.findall(r'<span style="([^"]*)" title="(.*?)">(.*?)</span>', html, re.DOTALL)
    assert [text for _, _, text in spans] == ["a&lt;", "é", "↵\n", "z"]
    assert [bits for _, bits, _ in spans] == ["0.00 bits", "5.50 bits", "20.00 bits", "1.00 bits"]
    shares = [float(re.search(r", ([\d.]+)\)", style)[1]) for style, _, _ in spans]
    assert shares == pytest.approx([0, 0.75 * 0.55, 0.75, 0.075], abs=0.006)
    assert ["outline" in style for style, _, _ in spans] == [False, True, False, False]


def test_a_text_may_begin_with_a_token_without_characters():
    assert ">ab</span>" in P.shaded("ab", [0, 2], [1.0, 1.0], 0)


def test_rivals_stand_beside_what_was_there():
    html = P.rivals(torch.tensor([1.0, 2.0, 4.0]), ["<a", " b", "c"], 2)
    assert [text for _, _, text in cells(html)] == [
        "50.0%",
        "1.00",
        "25.0%",
        "2.00",
        "6.2%",
        "4.00",
    ]
    assert re.findall("<th scope=row>(.*?)</th>", html) == ["&lt;a", "␣b", "c (in the text)"]
    assert "“c” and its rivals" in html


def test_probabilities_stand_before_and_after():
    before = torch.tensor([0.1, 0.5, 0.1, 0.3])
    html = P.reshaped(before, torch.tensor([0.0, 0.75, 0.0, 0.25]), {1: "x", 3: "\n"})
    expected = ["50.0%", "75.0%", "30.0%", "25.0%", "20.0%", "0"]
    assert [text for _, _, text in cells(html)] == expected
    assert re.findall("<th scope=row>(.*?)</th>", html) == ["x", "↵", "all others"]


@pytest.mark.parametrize(
    ("first", "second", "same", "other"),
    [
        ("a<b", "a<c", "a&lt;", "c"),
        ("a", "a", "a", ""),
        ("a", "ab", "a", "b"),
        ("ab", "a", "a", ""),
    ],
)
def test_two_texts_show_where_they_part(first, second, same, other):
    html = P.two_texts(["one", "two"], [first, second])
    _, body = re.findall("<pre>(.*?)</pre>", html)
    assert re.fullmatch("(.*)<span style=.*?>(.*)</span>", body).groups() == (same, other)
