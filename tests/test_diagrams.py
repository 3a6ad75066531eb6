"""The diagrams are those that the code draws, can stand in a page, and show true numbers."""

import importlib
import inspect
import math
import re
from itertools import chain, combinations
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from babel.dates import format_date, parse_date
from PIL import ImageFont
from torch import nn

import diagrams
import drawing
from inputs import text

ROOT = Path(__file__).resolve().parent.parent
attention, transformer = diagrams.attention, diagrams.transformer
NAMES = sorted(diagrams.DIAGRAMS)
SVG = "{http://www.w3.org/2000/svg}"
DEJAVU = Path(matplotlib.get_data_path()) / "fonts/ttf"
FONTS = {
    "": ImageFont.truetype(DEJAVU / "DejaVuSans.ttf", 22),
    "bold": ImageFont.truetype(DEJAVU / "DejaVuSans-Bold.ttf", 22),
    "mono": ImageFont.truetype(DEJAVU / "DejaVuSansMono.ttf", 20),
}
NUMBER = re.compile(r"−?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return the folder into which all diagrams were drawn."""
    folder = tmp_path_factory.mktemp("diagrams")
    assert diagrams.main(["--out", str(folder)]) == 0
    return folder


def root(name):
    return ElementTree.fromstring((ROOT / f"docs/{name}.svg").read_text(encoding="utf-8"))


def texts(name, style=""):
    """Return the lines of a diagram that have all the names of a style."""
    found = root(name).iter(f"{SVG}text")
    return [each.text for each in found if {*style.split()} <= {*each.get("class").split()}]


def numbers(line):
    return [float(each.replace("−", "-")) for each in NUMBER.findall(line)]


def row(name, y):
    """Return the numbers of the texts at a height, from left to right."""
    found = [each for each in root(name).iter(f"{SVG}text") if each.get("y") == str(y)]
    found.sort(key=lambda each: float(each.get("x")))
    return [n for each in found if NUMBER.fullmatch(each.text) for n in numbers(each.text)]


def matrix(group, rows, columns):
    """Return the numbers that the shades of cells stand for; the second style is negative."""
    values = torch.zeros(rows, columns)
    for path in group:
        value = float(path.get("opacity")) * (-1 if path.get("class") == "orange full" else 1)
        for run in re.finditer(r"M(\d+) (\d+)v(\d+)h1V\2z", path.get("d")):
            column, start, length = map(int, run.groups())
            values[start : start + length, column] = value
    return values


def matrices(name, *shapes):
    groups = [each for each in root(name).iter(f"{SVG}g") if "scale" in each.get("transform", "")]
    return [matrix(group, *shape) for group, shape in zip(groups, shapes, strict=False)]


def points(path):
    return [[float(n) for n in pair.split()] for pair in path.get("d")[1:].split("L")]


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_diagram_is_what_the_code_draws(name, drawn):
    assert (drawn / f"{name}.svg").read_bytes() == (ROOT / f"docs/{name}.svg").read_bytes()


def test_every_committed_diagram_is_drawn(drawn):
    assert {path.name for path in (ROOT / "docs").glob("*.svg")} == {
        path.name for path in drawn.iterdir()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_diagram_can_stand_in_a_page(name):
    content, svg = (ROOT / f"docs/{name}.svg").read_text(encoding="utf-8"), root(name)
    assert len(content.encode()) < 60_000
    assert svg.findtext(f"{SVG}title").strip()
    assert "prefers-color-scheme:dark" in content
    assert not re.search(r"href|url\(|@import|<script|data:", content)
    assert content.count("://") == 1  # the name of the language
    styles = {style for each in svg.iter() for style in (each.get("class") or "").split()}
    assert styles - {"ink"} <= {*re.findall(r"\.([a-z]+)\{", drawing.STYLE)}


@pytest.mark.parametrize("name", NAMES)
def test_words_lie_on_the_paper_and_apart(name):
    """In DejaVu, the widest of the fonts that a browser may take."""
    svg, found = root(name), []
    for each in svg.iter(f"{SVG}text"):
        styles = {*each.get("class").split()}
        if each.get("transform"):
            continue
        font = FONTS["mono" if "mono" in styles else "bold" if "bold" in styles else ""]
        length, x, y = font.getlength(each.text), float(each.get("x")), float(each.get("y"))
        left = x - length * (0 if "start" in styles else 1 if "end" in styles else 0.5)
        found.append((left, left + length, y, each.text))
    _, _, width, height = map(float, svg.get("viewBox").split())
    for left, right, y, words in found:
        assert left >= 5 and right <= width, words
        assert 16 <= y <= height - 16, words
    for (l0, r0, y0, words), (l1, r1, y1, other) in combinations(found, 2):
        assert r0 + 5 <= l1 or r1 + 5 <= l0 or abs(y0 - y1) >= 24, (words, other)


def palettes():
    """Return the colors of both modes: linear red, green and blue."""
    modes = []
    for mode in drawing.STYLE.split("@media"):
        found = {}
        for name, color in re.findall(r"--(\w+):#([0-9a-f]+)", mode):
            color = color * 2 if len(color) == 3 else color
            rgb = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
            found[name] = torch.tensor(linear, dtype=torch.float64)
        modes.append(found)
    assert all(found.keys() == {"paper", "ink", "soft", *drawing.COLORS} for found in modes)
    return modes


TO_XYZ = torch.tensor(  # from linear sRGB, with white at (1, 1, 1)
    [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("mode", [0, 1])
def test_words_contrast_with_the_paper(mode):
    """WCAG 2 asks for 4.5 to 1."""
    luminance = {name: (TO_XYZ @ color)[1].item() for name, color in palettes()[mode].items()}
    paper = luminance.pop("paper")
    for name, each in luminance.items():
        dark, light = sorted((paper, each))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


# No cones for green, and none for red: Machado, Oliveira and Fernandes 2009, severity 1.
@pytest.mark.parametrize("seen", [
    [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
])  # fmt: skip
@pytest.mark.parametrize("mode", [0, 1])
def test_color_blind_people_can_tell_the_colors_apart(mode, seen):
    """Differ by 20 in CIELAB, where 2 can be seen."""
    lab = []
    for name in drawing.COLORS:
        color = (torch.tensor(seen, dtype=torch.float64) @ palettes()[mode][name]).clamp(0, 1)
        x, y, z = ((TO_XYZ @ color).clamp(min=0.01) ** (1 / 3)).tolist()
        lab.append(torch.tensor([116 * y - 16, 500 * (x - y), 200 * (y - z)]))
    for one, other in combinations(lab, 2):
        assert (one - other).norm() >= 20


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert diagrams.main(["--out", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert "none" in error and error.count("\n") == 1


def test_make_docs_draws_them():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^docs:.*\n(\t.*\n)*\t.*docs/diagrams\.py$", makefile, re.MULTILINE)


@pytest.mark.parametrize(("value", "words"), [(-0.004, "0.00"), (-1.5, "−1.50"), (2, "2.00")])
def test_number(value, words):
    assert drawing.number(value) == words


def test_valley_steps_as_the_optimizer_of_chapter_1_does():
    lines = [line for line in texts("valley") if re.match("w ← [0-9]", line)]
    slopes = [numbers(line)[0] for line in texts("valley") if line.startswith("slope")]
    assert len(lines) == 2
    for line, slope in zip(lines, slopes, strict=True):
        start, rate, factor, after = numbers(line.replace(" − ", " "))
        w = nn.Parameter(torch.tensor([start]))
        optimizer = torch.optim.SGD([w], lr=rate)
        nn.functional.mse_loss(w * 1.0, torch.tensor([3.0])).backward()
        assert w.grad.item() == slope == factor
        optimizer.step()
        assert w.item() == pytest.approx(after)
        assert abs(after - 3) < abs(start - 3)  # downhill


def test_gelu_is_lowest_where_its_derivative_is_0():
    (line,) = (line for line in texts("gelu") if line.startswith("lowest"))
    lowest, at = numbers(line)
    x = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    y = nn.GELU()(x)
    y.sum().backward()
    assert y.item() == pytest.approx(lowest, abs=0.005)
    assert x.grad.item() == pytest.approx(0, abs=0.01)


def test_feed_forward_has_the_sizes_of_the_network():
    fashion = diagrams.fashion
    model = fashion.Classifier()
    weights = [layer.weight for layer in model.layers if isinstance(layer, nn.Linear)]
    sizes = [weights[0].shape[1], *(len(weight) for weight in weights)]
    shown = [numbers(line)[0] for line in texts("feed-forward", "bold")[:4]]
    assert sorted(shown) == sorted(sizes)
    assert texts("feed-forward", "mono").count("Linear") == len(sizes)  # and in the legend
    image, label = (part[0] for part in diagrams.clothes.load(diagrams.clothes.SAMPLE, train=False))
    assert texts("feed-forward", "bold orange") == [diagrams.clothes.CLASSES[label]]
    (shown_image,) = matrices("feed-forward", (28, 28))
    torch.testing.assert_close(shown_image, image / 255, atol=1 / 32 + 1e-6, rtol=0)


def test_lookup_shows_the_softmax_of_its_scores():
    shared = [len(re.match("L?i?n?", key)[0]) for key in diagrams.PEOPLE]
    weights = [f"{math.exp(s) / sum(map(math.exp, shared)):.2f}" for s in shared]
    shown = texts("lookup", "end")
    assert shown == ["0", "0", "1", "0", *weights]
    mixture = " ".join(texts("lookup", "green bold")[1:])
    assert numbers(mixture) == [float(weight) for weight in weights]
    assert re.findall("[A-Z][a-z]+", mixture) == [*diagrams.PEOPLE.values()]


def test_one_word_is_the_row_of_cat(monkeypatch):
    kept = []
    formula = attention.scaled_dot_product_attention

    def keep(Q, K, V):
        kept.append((Q, K, V, *formula(Q, K, V)))
        return kept[-1][3:]

    monkeypatch.setattr(attention, "scaled_dot_product_attention", keep)
    attention.main(["--device", "cpu", "--explain", attention.SENTENCE])
    Q, K, V, output, weights = (x.double() for x in kept[0])
    cat = attention.SENTENCE.split().index("cat")
    scores = K @ Q[cat] / math.sqrt(Q.shape[1])
    close = {"abs": 0.00501}
    assert row("one-word", 74) == pytest.approx(scores.tolist(), **close)
    exponentials = row("one-word", 146)
    assert exponentials == [round(math.exp(score), 2) for score in row("one-word", 74)]
    assert row("one-word", 218) == pytest.approx(weights[cat].tolist(), **close)
    by_hand = [each / sum(exponentials) for each in exponentials]
    assert [round(each, 2) for each in by_hand] == row("one-word", 218)
    values = torch.tensor([row("one-word", 294 + 28 * n) for n in range(4)]).T  # and the mixture
    torch.testing.assert_close(values[:-1].double(), V, atol=0.00501, rtol=0)
    torch.testing.assert_close(values[-1].double(), output[cat], atol=0.00501, rtol=0)
    (total,) = (line for line in texts("one-word") if line.startswith("divided"))
    sums = [numbers(line)[0] for line in texts("one-word") if line.startswith("sum")]
    assert sums == pytest.approx([sum(exponentials), 1]) and numbers(total) == sums[:1]


def test_split_heads_shows_code_that_splits_and_joins():
    B, T, H, d_k = 3, 5, 4, 2
    module = attention.MultiHeadAttention(H * d_k, H)
    x = torch.randn(B, T, H * d_k)
    split, join = (line for line in texts("split-heads", "mono") if line.startswith("."))
    heads = eval(f"Q{split}", {"Q": module.W_q(x), "H": H, "d_k": d_k})
    assert heads.shape == (B, H, T, d_k)
    torch.testing.assert_close(heads, module.split_heads(x, x, x, None)[0])
    torch.testing.assert_close(eval(f"x{join}", {"x": heads}), module.W_q(x))
    assert [line for line in texts("split-heads", "mono") if line.startswith("(")] == [
        "(B, T, d_model)", "(B, H, T, d_k)", "(B, T, d_model)"
    ]  # fmt: skip


def test_positions_shows_the_encoding_and_its_products():
    T, d_model = (int(n) for n in numbers(texts("positions", "mono")[0]))
    encoding = attention.positional_encoding(T, d_model)
    pattern, products = matrices("positions", (T, d_model), (T, T))
    tolerance = {"atol": 1 / 32 + 1e-5, "rtol": 0}
    torch.testing.assert_close(pattern, encoding, **tolerance)
    expected = encoding @ encoding.T / encoding[0].dot(encoding[0])
    torch.testing.assert_close(products, expected, **tolerance)


def test_masks_shows_the_masks():
    shown = [each > 0 for each in matrices("masks", *[(5, 5)] * 4)]
    causal = torch.arange(5) <= torch.arange(5).unsqueeze(1)
    padding = (torch.arange(5) < 3).expand(5, 5)
    for found, mask in zip(
        shown, (torch.ones(5, 5).bool(), causal, padding, causal & padding), strict=True
    ):
        assert torch.equal(found, mask)


def test_transformer_shows_the_parts_of_its_layers():
    names = texts("transformer", "mono")
    start = names.index("EncoderLayer")
    layers = [name for name in names[:start] if name.isidentifier()]
    for layer, found in (("EncoderLayer", layers[:4]), ("DecoderLayer", layers[4:])):
        parts = dict(getattr(transformer, layer)(transformer.Sizes()).named_children())
        assert sorted(found) == sorted(parts.keys() - {"dropout"})
        source = inspect.getsource(getattr(transformer, layer).forward)
        assert [*re.findall(r"self\.(\w+)\(", source.replace("self.dropout(", ""))] == [
            name for pair in zip(found[1::2], found[::2], strict=True) for name in pair
        ]
    assert hasattr(transformer.Transformer, "to_logits") and "to_logits" in names


def test_the_date_is_one_that_people_write():
    date = parse_date(diagrams.ISO, "sv")
    assert format_date(date, "long", "fr") == diagrams.TEXT and date.isoformat() == diagrams.ISO


def test_teacher_forcing_shows_the_target_shifted():
    pair = (diagrams.TEXT, diagrams.ISO)
    vocabulary = transformer.make_vocabulary([pair])
    characters = {i: c for c, i in vocabulary.items()}
    characters |= {text.BOS: "<s>", text.EOS: "end"}
    _, target = transformer.make_batch([pair], vocabulary)
    shown = [line for line in texts("teacher-forcing") if len(line) == 1 or line == "<s>"]
    shown = [line for line in shown if line != "…"]
    assert shown[::2] == [characters[i] for i in target[0, :-1].tolist()][:5]
    assert shown[1::2] == [characters[i] for i in target[0, 1:].tolist()][:5]


def test_writing_shows_what_generate_feeds_and_gets(monkeypatch):
    vocabulary = transformer.make_vocabulary([(diagrams.TEXT, diagrams.ISO)])
    model = transformer.Transformer(4 + len(vocabulary), transformer.Sizes())
    answer, fed = transformer.encode(diagrams.ISO, vocabulary), []

    def decode(target, memory, mask, start):
        fed.append((start, target.tolist(), memory.shape[1]))
        return nn.functional.one_hot(answer[start], 4 + len(vocabulary)).view(1, 1, -1)

    monkeypatch.setattr(model, "decode", decode)
    source = transformer.encode(diagrams.TEXT, vocabulary).unsqueeze(0)
    assert transformer.generate(model, source) == [answer[:-1].tolist()]
    assert [S > 0 for _, _, S in fed] == [True] + [False] * (len(fed) - 1)
    characters = {i: c for c, i in vocabulary.items()}
    characters |= {text.BOS: "<s>", text.EOS: "end"}
    lines = texts("writing")
    for step in (1, 2, 3, 4, len(fed)):
        start, ((token,),), _ = fed[step - 1]
        decoder = [i for i, line in enumerate(lines) if line == "decoder"][min(step, 5) - 1]
        shown = (lines[decoder - 2], lines[decoder - 1], lines[decoder + 1])
        expected = (str(start + 1), characters[token], characters[answer[start].item()])
        assert shown == expected


@pytest.mark.parametrize(("width", "found"), [(1, 0), (2, 1)])
def test_beam_shows_what_beam_search_finds(width, found):
    """A network that knows the diagram's table, and ends after two words."""
    search = importlib.import_module("decoding.search")
    words = ["", "", "", "a", "the", "one", "dog", "cat", "bird"]
    end = [float(i == search.EOS) for i in range(len(words))]

    def following(prefix):
        table = diagrams.SECOND.get(words[prefix[-1]]) if len(prefix) == 2 else diagrams.FIRST
        if len(prefix) > 2 or table is None:
            return end
        return [table.get(word, 0.0) for word in words]

    def decode(target, memory, mask, start):
        return torch.tensor([[following(prefix)] for prefix in target.tolist()]).log()

    model = SimpleNamespace(decode=decode, decoder=[], encode=lambda x: torch.zeros(*x.shape, 1))
    model.eval = lambda: model
    source = torch.tensor([[3, search.EOS]])
    ((first, second),) = search.beam_search(model, source, width, use_cache=False)
    (line,) = (line for line in texts("beam") if "misses" in line)
    assert f"{words[first]} {words[second]}" == re.findall("“(.*?)”", line)[found]


def test_beam_adds_up():
    steps = [numbers(line)[0] for line in texts("beam") if re.match("(a|the|one) +−", line)]
    assert steps == [round(math.log(p), 2) for p in diagrams.FIRST.values()]
    for table in (diagrams.FIRST, *diagrams.SECOND.values()):
        assert sum(table.values()) == pytest.approx(1)
    sums = [numbers(line)[0] for line in texts("beam") if NUMBER.fullmatch(line)]
    products = [diagrams.FIRST[a] * p for a, row in diagrams.SECOND.items() for p in row.values()]
    assert sums == [round(math.log(p), 2) for p in products]
    kept = [numbers(line)[0] for line in texts("beam", "bold")]
    assert sorted(kept) == sorted(sums)[-2:]


def test_learning_rate_is_that_of_the_training(monkeypatch):
    schedules = []
    monkeypatch.setattr(transformer, "LambdaLR", lambda _, rate: schedules.append(rate))
    monkeypatch.setattr(transformer, "tqdm", lambda *_, **__: [])
    monkeypatch.setattr(transformer, "sample_dates", lambda *_: [])
    monkeypatch.setattr(transformer, "evaluate", lambda *_: 0.0)
    model = transformer.Transformer(9, transformer.Sizes())
    epochs = inspect.getsource(transformer.main).split('"--epochs"')[1]
    epochs = int(re.search(r"default=(\d+)", epochs)[1])
    next(transformer.train(model, {}, epochs, seed=0))
    curves = [p for p in root("learning-rate").iter(f"{SVG}path") if "thick" in p.get("class")]
    steps = epochs * transformer.BATCHES
    for curve, name in zip(curves, ("orange", "blue"), strict=True):
        assert name in curve.get("class")
        for x, y in points(curve):
            step, rate = (x - 90) / 760 * steps, (360 - y) / 330 * 0.007
            paper = transformer.learning_rate(max(step, 1), 64, transformer.WARMUP)
            expected = paper if name == "orange" else schedules[0](max(step, 1) - 1)
            assert rate == pytest.approx(expected, abs=5e-6)


def test_processes_share_the_batch_as_translation_does():
    translation = importlib.import_module("translation")
    assert "batch[rank::world]" in inspect.getsource(translation.add_gradients)
    shares = [line.split(": ")[1] for line in texts("processes", "mono") if "batch" in line]
    batch = [*range(7)]
    assert sorted(chain(*(eval(share, {"batch": batch}) for share in shares))) == batch
