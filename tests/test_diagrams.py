"""The pictures can stand in a page; the drawn ones are what the code draws; all show true facts."""

import cmath
import datetime
import importlib
import inspect
import json
import math
import re
from itertools import combinations, pairwise
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import pytest
import torch
from babel.dates import format_date
from matplotlib.colors import to_rgb
from torch import nn

import diagrams
import drawing

DOCS = Path(__file__).resolve().parent.parent / "docs"
PICTURES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.svg"))}
attention, transformer = diagrams.attention, diagrams.transformer
SVG = "{http://www.w3.org/2000/svg}"
NUMBER = re.compile(r"−?\d+(?:\.\d+)?")


def root(name):
    return ElementTree.fromstring(PICTURES[name])


def texts(name, style="", part=""):
    """Return the lines of a picture, or of its part with an id, that have all names of a style."""
    found = root(name).find(f".//*[@id='{part}']" if part else ".").iter(f"{SVG}text")
    return [each.text for each in found if {*style.split()} <= {*each.get("class", "").split()}]


def numbers(line):
    return [float(each.replace("−", "-")) for each in NUMBER.findall(line)]


def row(name, y):
    """Return the numbers of the texts at a height."""
    found = [each.text for each in root(name).iter(f"{SVG}text") if each.get("y") == str(y)]
    return [n for line in found if NUMBER.fullmatch(line) for n in numbers(line)]


def matrices(name, *shapes):
    """Return the numbers that the shades of cells stand for; the second style is negative."""
    for group, shape in zip(root(name).iter(f"{SVG}g"), shapes, strict=False):
        values = torch.zeros(shape)
        for path in group:
            shade = float(path.get("opacity")) * (-1 if path.get("class") == "orange full" else 1)
            for run in re.findall(r"M(\d+) (\d+)v(\d+)h1V\2z", path.get("d")):
                column, start, length = map(int, run)
                values[start : start + length, column] = shade
        yield values


def test_the_committed_diagrams_are_what_the_code_draws(tmp_path):
    assert diagrams.main(["--out", str(tmp_path)]) == 0
    for name in diagrams.DIAGRAMS:
        drawn = (tmp_path / f"{name}.svg").read_bytes()
        assert drawn == (DOCS / f"{name}.svg").read_bytes(), name


def palettes(content):
    """Return the colors of light and of dark mode."""
    modes = re.split(r"@media ?\(prefers-color-scheme: ?dark\)", content)
    return [dict(re.findall(r"--(\w+): ?(#\w+)", mode)) for mode in modes]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_can_stand_in_a_page(name):
    content, svg = PICTURES[name], root(name)
    assert len(content.encode()) < 60_000
    assert svg.findtext(f"{SVG}title").strip()
    assert palettes(content) == palettes(drawing.STYLE)
    assert not re.search(r'href(?!="#)|url\((?!#)|@import|<script|data:', content)
    assert content.count("://") == 1  # the name of the language
    ids = {each.get("id") for each in svg.iter()}
    assert {*re.findall(r"(?:href=\"|url\()#([\w-]+)", content)} <= ids
    styles = {style for each in svg.iter() for style in each.get("class", "").split()}
    assert styles - {"ink"} <= {*re.findall(r"\.([a-z]+)", svg.findtext(f"{SVG}style"))}


MODES = palettes(drawing.STYLE)
TO_XYZ = torch.tensor(  # from linear sRGB, with white at (1, 1, 1)
    [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]]
)


def linear(color):
    """Return linear red, green and blue."""
    rgb = torch.tensor(to_rgb(color))
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("mode", MODES)
def test_words_contrast_with_the_paper(mode):
    """WCAG 2 asks for 4.5 to 1."""
    bright = {name: (TO_XYZ @ linear(color))[1] + 0.05 for name, color in mode.items()}
    paper = bright.pop("paper")
    for name, each in bright.items():
        assert max(paper / each, each / paper) >= 4.5, name


# No cones for green, and none for red: Machado, Oliveira and Fernandes 2009, severity 1.
@pytest.mark.parametrize("seen", [
    [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
])  # fmt: skip
@pytest.mark.parametrize("mode", MODES)
def test_color_blind_people_can_tell_the_colors_apart(mode, seen):
    """Differ by 20 in CIELAB, where 2 can be seen."""
    lab = []
    for name in ("blue", "orange", "green", "purple"):
        color = (torch.tensor(seen) @ linear(mode[name])).clamp(0, 1)
        x, y, z = ((TO_XYZ @ color).clamp(min=0.01) ** (1 / 3)).tolist()
        lab.append(torch.tensor([116 * y - 16, 500 * (x - y), 200 * (y - z)]))
    for one, other in combinations(lab, 2):
        assert (one - other).norm() >= 20


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert diagrams.main(["--out", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert "none" in error and error.count("\n") == 1


def test_number():
    assert [drawing.number(each) for each in (-0.004, -1.5, 2)] == ["0.00", "−1.50", "2.00"]


def points(path):
    """Return the points of a line, in pixels."""
    return [tuple(map(float, point.split())) for point in path.get("d")[1:].split("L")]


def lines(name, style):
    """Return the points of each line that has all names of a style."""
    found = root(name).iter(f"{SVG}path")
    return [points(path) for path in found if {*style.split()} <= {*path.get("class").split()}]


def circles(name, style=""):
    """Return the centers of the dots that have all names of a style, in pixels."""
    found = root(name).iter(f"{SVG}circle")
    kept = [each for each in found if {*style.split()} <= {*each.get("class").split()}]
    return [(float(each.get("cx")), float(each.get("cy"))) for each in kept]


def test_line_shows_the_points_and_the_fit_of_chapter_1(capsys):
    hello = importlib.import_module("pytorch-hello")
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 100)
    y = 3 * x - 2 + 0.3 * torch.randn(100)

    def place(x, y):
        return pytest.approx((460 + 380 * x, 307.5 - 46.25 * (y + 4)), abs=0.051)

    dots = circles("line", "soft")
    assert len(dots) == 100
    for dot, a, b in zip(dots, x.tolist(), y.tolist(), strict=True):
        assert dot == place(a, b)
    hello.main(["--device", "cpu"])
    printed = re.search("gradient descent +([0-9.]+) +(-[0-9.]+)", capsys.readouterr().out)
    for color, w, b in (("orange", 1.0, 0.0), ("blue", *map(float, printed.groups()))):
        (line,) = (line for line in texts("line", color) if "loss" in line)
        shown = numbers(line.partition("y = ")[2].replace("− ", "−"))
        loss = nn.functional.mse_loss(w * x + b, y)
        assert shown == pytest.approx([w, b, loss.item()], abs=0.00501)
        ((start, end),) = lines("line", "orange dashed" if color == "orange" else "blue thick")[:1]
        assert start == place(-1, b - w) and end == place(1, b + w)
        ((end, point),) = lines("line", f"{color} thick")[-1:]
        assert [point] == circles("line", color) and point in dots
        at = (point[0] - 460) / 380
        assert end == place(at, w * at + b)


def test_valley_steps_as_the_optimizer_of_chapter_1_does():
    lines = [line for line in texts("valley") if re.match("steepness|w ← [0-9]", line)]
    assert len(lines) == 4
    for slope, line in zip(lines[::2], lines[1::2], strict=True):
        start, rate, factor, after = numbers(line.replace(" − ", " "))
        w = nn.Parameter(torch.tensor([start]))
        optimizer = torch.optim.SGD([w], lr=rate)
        nn.functional.mse_loss(w * 1.0, torch.tensor([3.0])).backward()
        assert [w.grad.item()] == [factor] == numbers(slope)
        optimizer.step()
        assert w.item() == pytest.approx(after)
        assert abs(after - 3) < abs(start - 3)  # downhill


def test_minus_log_shows_the_table_of_chapter_2():
    page = (DOCS / "2-fashion-mnist.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:first|second|third) \|.*\| ([0-9.]+) \| ([0-9.]+) \|$", page, re.M)
    shown = [line.split(" → ") for line in texts("minus-log", "blue") if "→" in line]
    assert shown == [[*row] for row in rows] and len(rows) == 3
    assert [numbers(line) for line in texts("minus-log", "orange")] == [[0.1, 2.3]]
    (curve,) = lines("minus-log", "blue")
    dots = circles("minus-log", "blue") + circles("minus-log", "orange")
    for x, y in curve + dots:
        p, loss = (x - 80) / 760, (420 - y) / 400 * 4.5
        assert loss == pytest.approx(-math.log(p), abs=0.006)
    assert [(x - 80) / 760 for x, _ in dots] == pytest.approx([0.665, 0.245, 0.090, 0.1], abs=6e-4)


def test_one_cycle_is_the_schedule_of_the_training(monkeypatch):
    fashion = importlib.import_module("fashion-mnist")
    rates = []

    def train_epoch(model, split, optimizer, schedule, batch_size):
        for _ in range(len(split[0]) // batch_size):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return 0.0

    monkeypatch.setattr(fashion, "train_epoch", train_epoch)
    monkeypatch.setattr(fashion, "evaluate", lambda *_: (0.0, 0.0))
    args = fashion.make_parser().parse_args(["--device", "cpu"])
    split = torch.zeros(59_000, 1), torch.zeros(59_000)
    settings = args.epochs, args.batch_size, args.learning_rate
    assert len([*fashion.fit(nn.Linear(1, 1), split, split, *settings)]) == args.epochs == 16
    (curve,) = lines("one-cycle", "blue thick")
    corners = [((x - 100) / 750 * len(rates), (300 - y) / 280 * 0.007) for x, y in curve]
    for (start, low), (end, high) in pairwise(corners):
        for n in range(round(start), round(end) + 1):
            rate = low + (high - low) * (n - start) / (end - start)
            assert rates[n] == pytest.approx(rate, abs=1.5e-5)  # half a pixel
    assert [round(n) for n, _ in corners][::2] == [0, len(rates) - 1]
    first, highest = (numbers(line)[0] for line in texts("one-cycle", "blue start"))
    assert [first, highest] == pytest.approx([rates[0], max(rates)], abs=2e-6)
    assert rates.index(max(rates)) == pytest.approx(len(rates) / 5, abs=1)


def test_norms_shows_what_both_layers_do():
    shown = [numbers(line) for line in texts("norms") if NUMBER.fullmatch(line)]
    found = torch.tensor(shown).view(4, 4, 5)  # each row begins with its number
    assert torch.equal(found[:, :, 0], torch.arange(1.0, 5).expand(4, 4))
    table, by_column, same, by_row = found[:, :, 1:]
    assert torch.equal(table, same)
    assert table[:, 0].tolist() == table[0].tolist() == [1, 2, 3, 6]
    batch_norm, layer_norm = nn.functional.batch_norm, nn.functional.layer_norm
    wanted = batch_norm(table, None, None, training=True), layer_norm(table, (4,))
    torch.testing.assert_close((by_column, by_row), wanted, atol=0.00501, rtol=0)
    outlined = [*by_column[:, 0].tolist(), *by_row[0].tolist()]
    assert outlined == pytest.approx([-1.07, -0.53, 0, 1.6] * 2)
    steps = [numbers(line) for line in texts("norms", "blue") if line.startswith("minus")]
    assert steps == [[table[0].mean(), table[0].var(correction=0)]] * 2


def test_gelu_is_lowest_where_its_derivative_is_0():
    (line,) = (line for line in texts("gelu") if line.startswith("lowest"))
    lowest, at = numbers(line)
    x = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    y = nn.GELU()(x)
    y.sum().backward()
    assert y.item() == pytest.approx(lowest, abs=0.005)
    assert x.grad.item() == pytest.approx(0, abs=0.01)


def test_feed_forward_has_the_sizes_of_the_network():
    fashion = importlib.import_module("fashion-mnist")
    model = fashion.Classifier()
    layers = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
    sizes = [layers[0].in_features, *(layer.out_features for layer in layers)]
    assert texts("feed-forward", part="sizes") == [*map(str, sizes[:-1]), f"{sizes[-1]} logits"]
    assert texts("feed-forward", part="classes") == [*fashion.CLASSES]


def test_lookup_shows_the_softmax_of_its_scores():
    shared = [len(re.match("L?i?n?", key)[0]) for key in diagrams.PEOPLE]
    weights = [f"{math.exp(s) / sum(map(math.exp, shared)):.2f}" for s in shared]
    assert texts("lookup", "end") == ["0", "0", "1", "0", *weights]
    mixture = " ".join(texts("lookup", "green bold")[1:])
    assert numbers(mixture) == [float(weight) for weight in weights]
    assert re.findall("[A-Z][a-z]+", mixture) == [*diagrams.PEOPLE.values()]


def test_one_word_is_the_row_of_cat(monkeypatch):
    formula = Mock(wraps=attention.scaled_dot_product_attention)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", formula)
    attention.main(["--device", "cpu", "--explain", attention.SENTENCE])
    Q, K, V = formula.call_args_list[0].args
    output, weights = formula(Q, K, V)
    cat = attention.SENTENCE.split().index("cat")
    mixed = torch.cat((V, output[[cat]])).T  # a row per dimension
    shown = [row("one-word", y) for y in (74, 218, 331, 359, 387, 415)]
    expected = (K @ Q[cat] / math.sqrt(Q.shape[1]), weights[cat], *mixed)
    for line, found in zip(shown, expected, strict=True):
        assert line == pytest.approx(found.tolist(), abs=0.00501)
    assert [numbers(line) for line in texts("one-word", "blue")] == [[n] for n in shown[1]]
    exponentials = row("one-word", 146)
    assert exponentials == [round(math.exp(score), 2) for score in shown[0]]
    assert shown[1] == [round(each / sum(exponentials), 2) for each in exponentials]
    sums = [numbers(line)[0] for line in texts("one-word") if re.match("divided|sum", line)]
    assert sums == pytest.approx([sum(exponentials), sum(exponentials), 1])


def test_shapes_has_the_shapes_of_a_head():
    (line,) = texts("shapes", "bold")
    T, d, d_k = map(int, numbers(line))
    x, head = torch.zeros(T, d), attention.SelfAttention(d, d_k)
    Q, K, V = head.W_q(x), head.W_k(x), head.W_v(x)
    output, weights = head(x)
    W_q, W_k, W_v = (layer.weight.T for layer in (head.W_q, head.W_k, head.W_v))
    wanted = {"x": x, "W_q": W_q, "Q": Q, "W_k": W_k, "K": K, "W_v": W_v, "V": V}
    wanted |= {"Kᵀ": K.T, "QKᵀ": Q @ K.T, "weights": weights, "output": output}
    sizes = {"T": T, "d": d, "d_k": d_k}
    named = [*pairwise(texts("shapes", "start"))]
    shapes = [(name, line) for name, line in named if line.startswith("(")]
    groups = [*root("shapes").iter(f"{SVG}g")]
    assert len(shapes) == len(groups) and {name for name, _ in shapes} == wanted.keys()
    for (name, letters), group in zip(shapes, groups, strict=True):
        rows, columns = (sizes[each] for each in letters.strip("()").split(", "))
        assert (rows, columns) == wanted[name].shape
        (path,) = group
        runs = [f"M{n} 0v{rows}h1V0z" for n in range(columns)]
        assert path.get("d") == "".join(runs) and "scale(20 20)" in group.get("transform")


def test_positions_shows_the_encoding_and_its_products():
    T, d_model = (int(n) for n in numbers(texts("positions", "mono")[0]))
    encoding = attention.positional_encoding(T, d_model)
    expected = [encoding, encoding @ encoding.T / encoding[0].dot(encoding[0])]
    shown = [*matrices("positions", (T, d_model), (T, T))]
    torch.testing.assert_close(shown, expected, atol=1 / 32 + 1e-5, rtol=0)


def test_masks_shows_the_masks():
    causal = torch.arange(5) <= torch.arange(5).unsqueeze(1)
    padding = (torch.arange(5) < 3).expand(5, 5)
    masks = torch.stack((torch.ones(5, 5).bool(), causal, padding, causal & padding))
    assert torch.equal(torch.stack([*matrices("masks", *[(5, 5)] * 4)]) > 0, masks)


@pytest.mark.parametrize("layer", ["EncoderLayer", "DecoderLayer"])
def test_transformer_names_the_parts_of_its_layers(layer):
    parts = dict(getattr(transformer, layer)(transformer.Sizes()).named_children())
    names = [name for name in texts("transformer", "mono", layer) if name.isidentifier()]
    assert sorted(names) == sorted(parts.keys() - {"dropout"} | {layer})


def test_teacher_forcing_shows_a_date_shifted():
    day = datetime.date(2021, 3, 12)
    assert format_date(day, "long", "fr") in texts("transformer")
    *labels, _ = texts("teacher-forcing", part="labels")
    *tokens, _ = texts("teacher-forcing", part="input")
    assert labels == [*day.isoformat()[:5]] and tokens == ["<s>", *labels[:-1]]


def test_split_heads_shows_the_code_of_attention():
    split, join = texts("split-heads", part="code")
    source = inspect.getsource(attention.MultiHeadAttention)
    assert split.replace("(H, d_k)", "(self.num_heads, -1)") in source and join in source


def test_beam_adds_up():
    first, second = diagrams.FIRST, diagrams.SECOND
    steps = [numbers(line)[0] for line in texts("beam") if re.match("(a|the|one) +−", line)]
    assert steps == [round(math.log(p), 2) for p in first.values()]
    for table in (first, *second.values()):
        assert sum(table.values()) == pytest.approx(1)
    sums = [numbers(line)[0] for line in texts("beam") if NUMBER.fullmatch(line)]
    products = {f"{a} {b}": first[a] * p for a, row in second.items() for b, p in row.items()}
    assert sums == [round(math.log(p), 2) for p in products.values()]
    assert sorted(numbers(" ".join(texts("beam", "bold")))) == sorted(sums)[-2:]
    (line,) = (line for line in texts("beam") if "misses" in line)
    a, best = max(first, key=first.get), max(products, key=products.get)
    assert re.findall("“(.*?)”", line) == [f"{a} {max(second[a], key=second[a].get)}", best]


def test_learning_rate_is_that_of_the_training():
    """That the training follows it is tested in test_transformer.py."""
    epochs = inspect.getsource(transformer.main).split('"--epochs"')[1]
    steps = int(re.search(r"default=(\d+)", epochs)[1]) * transformer.BATCHES
    curves = [p for p in root("learning-rate").iter(f"{SVG}path") if "thick" in p.get("class")]
    assert [curve.get("class").split()[0] for curve in curves] == ["orange", "blue"]
    for curve, falls in zip(curves, (0, 1), strict=True):
        for point in curve.get("d")[1:].split("L"):
            x, y = map(float, point.split())
            step, rate = max((x - 90) / 760 * steps, 1), (360 - y) / 330 * 0.007
            paper = transformer.learning_rate(step, 64, transformer.WARMUP)
            assert rate == pytest.approx(paper * (1 - falls * (step - 1) / steps), abs=5e-6)


def test_from_4_to_5_names_the_parts_of_both_layers():
    gpt = diagrams.gpt
    sizes = gpt.Sizes(8, 4, 1, 2, 2, 2, 4, 4, tied=False)
    theirs = dict(transformer.DecoderLayer(transformer.Sizes()).named_children()).keys()
    for name, parts in (
        ("DecoderLayer", theirs - {"dropout"}),
        ("Layer", dict(gpt.Layer(sizes).named_children()).keys()),
    ):
        shown = [line for line in texts("from-4-to-5", "mono", name) if line.isidentifier()]
        assert sorted(shown) == sorted(parts)
    outside = {"to_logits", "norm"}
    assert outside <= {*texts("from-4-to-5", "mono")} & {*dict(gpt.GPT(sizes).named_children())}


def test_merges_are_those_that_byte_pair_encoding_learns():
    documents = importlib.import_module("inputs.documents")
    words = [*diagrams.WORDS]
    steps = [line for line in texts("merges", "orange")]
    for count, line in enumerate(steps, start=1):
        tokenizer = documents.learn_tokenizer(words, 257 + count)
        a, b = json.loads(tokenizer.to_str())["model"]["merges"][-1]
        times = sum((a + b) in word for word in words)
        assert line == f"{a} before {b}: {times} times"
    shown = [each for each in texts("merges") if any(each in word for word in words)]
    rows = [documents.learn_tokenizer(words, 257 + n) for n in range(len(steps) + 1)]
    assert shown == [t for row in rows for word in words for t in row.encode(word).tokens]


def test_interval_is_that_of_the_coder():
    coder = importlib.import_module("decoding.coder")
    interval = coder.Interval()
    shown = [numbers(line)[0] for line in texts("interval") if NUMBER.fullmatch(line)]
    ends = []
    for token, likely in diagrams.CODED.items():
        ends += [interval.low / coder.WHOLE, interval.high / coder.WHOLE]
        parts = torch.tensor([*likely.values()], dtype=torch.float64)
        cumulative = coder.cumulate((1000 * parts).round().long().numpy())
        interval.narrow([*likely].index(token), cumulative)
    ends += [interval.low / coder.WHOLE, interval.high / coder.WHOLE]
    at_the_sides = [
        n for line in texts("interval", "start") + texts("interval", "end") for n in numbers(line)
    ]
    assert sorted(at_the_sides) == pytest.approx(sorted(ends))
    likely = [p for row in diagrams.CODED.values() for p in row.values()]
    assert sorted(shown) == pytest.approx(sorted(likely + ends))
    width = ends[-1] - ends[-2]
    (line,) = (line for line in texts("interval") if "power" in line)
    said, two, power = numbers(line)
    assert (said, two) == (pytest.approx(width), 2)
    assert power == pytest.approx(math.log2(width), abs=0.005)


def test_rotary_shows_products_that_depend_on_the_distance():
    pairs = [numbers(line) for line in texts("rotary", "bold") if line.startswith("query at")]
    products = [numbers(line) for line in texts("rotary") if "·" in line]
    results = [numbers(line)[0] for line in texts("rotary", "bold") if line.startswith("=")]
    arrows = lines("rotary", "thick")
    query, key = (complex(*vector) for vector in (diagrams.QUERY, diagrams.KEY))
    for (m, n), (a, b, c, d), result in zip(pairs, products, results, strict=True):
        turned = query * cmath.exp(1j * m), key * cmath.exp(1j * n)
        expected = [turned[0].real, turned[1].real, turned[0].imag, turned[1].imag]
        assert [a, b, c, d] == pytest.approx(expected, abs=0.005)
        assert result == pytest.approx(a * b + c * d, abs=0.005)
        for vector in turned:  # the line of its arrow ends before its head
            ends = [complex(x1 - x0, y0 - y1) for (x0, y0), (x1, y1) in arrows_of(arrows)]
            assert any(abs(cmath.phase(end / vector)) < 0.01 for end in ends)
    assert len({m - n for m, n in pairs}) == len({*results}) == 1
    angle = math.degrees(cmath.phase(turned[0] / turned[1]) % (2 * math.pi))
    assert [numbers(line)[0] for line in texts("rotary", "green")] == [round(angle)] * 2


def arrows_of(paths):
    """Return those of the lines that have two points."""
    return [path for path in paths if len(path) == 2]
