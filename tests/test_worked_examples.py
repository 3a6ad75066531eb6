"""The numbers that the course works out by hand are those that PyTorch computes."""

import doctest
import importlib
import json
import math
import re
from itertools import takewhile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpt as G
from conftest import corpus_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def read(page):
    """Return the text of a page, with one space for any white space."""
    return " ".join((DOCS / page).read_text(encoding="utf-8").split())


def numbers(text):
    return [float(number) for number in NUMBER.findall(text.replace("−", "-"))]


def find(page, *between):
    """Return the numbers of the only passage that stands between two texts."""
    start, end = map(re.escape, between)
    (found,) = re.findall(f"{start}(.*?){end}", read(page))
    return numbers(found)


def matrices(page, after):
    """Return the matrices of the first formula after a text, row by row."""
    formula = read(page).partition(after)[2].partition("```math")[2].partition("```")[0]
    bodies = re.findall(r"\\begin\{bmatrix\}(.*?)\\end\{bmatrix\}", formula)
    return [[row.split("&") for row in body.split(r"\\")] for body in bodies]


def evaluate(matrix):
    """Return the tensor of a matrix of sums and products."""

    def value(cell):
        terms = re.findall(r"[+-]?[^+-]+", re.sub(r"\s", "", cell))
        return sum(math.prod(map(float, term.split(r"\cdot"))) for term in terms)

    return torch.tensor([[value(cell) for cell in row] for row in matrix])


def test_a_matrix_times_itself():
    first, second, sums, product = map(evaluate, matrices("1-hello.md", "multiplies this matrix"))
    torch.testing.assert_close(first @ second, sums)
    torch.testing.assert_close(first @ second, product)


def test_a_column_minus_a_row():
    column, row, table = map(evaluate, matrices("1-hello.md", "A column minus a row"))
    torch.testing.assert_close(column - row, table)
    assert torch.equal(column.squeeze(1), row.squeeze(0))
    top, bottom, mean = find("1-hello.md", "mean of the nine squared differences is", ", not 0")
    assert (top, bottom) == (table.square().sum(), table.numel())
    assert table.square().mean().item() == pytest.approx(mean, abs=0.005)


def test_the_derivative_of_a_cube():
    cubes = find("1-hello.md", "by a thousandth:", "The result moves")
    assert cubes == pytest.approx([2.001, 3, 2, 3, 0.001, 2.001**3, 8, 0.001, 12])
    x = torch.tensor(2.0, requires_grad=True)
    (x**3).backward()
    assert x.grad == 12


STEP = re.compile(r"w \\leftarrow ([\d.]+) - ([\d.]+) \\cdot \(?(-?[\d.]+)\)? = ([\d.]+)")


def test_the_chain_rule_by_hand():
    passage = find("1-hello.md", "Take $`(3x - 2)^2`$ at $`x =", "`$. The derivatives of a number")
    x, u, inner, *_, outer, first, second, product = passage
    at = torch.tensor(x, requires_grad=True)
    (3 * at - 2).square().backward()
    assert (u, inner, outer, product) == (3 * x - 2, 3, 2 * u, at.grad.item())
    assert (first, second) == (outer, inner)


def test_steps_of_gradient_descent():
    steps = STEP.findall(read("1-hello.md"))
    assert len(steps) == 5
    for before, rate, derivative, after in (map(float, step) for step in steps):
        w = torch.tensor(before, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=rate)
        F.mse_loss(w * 1, torch.tensor(3.0, dtype=torch.float64)).backward()
        optimizer.step()
        assert (w.grad.item(), w.item()) == pytest.approx((derivative, after))


def test_the_derivatives_written_out_are_those_of_autograd():
    torch.manual_seed(0)
    x, y = torch.randn(2, 20, dtype=torch.float64)
    w, b = torch.randn(2, dtype=torch.float64).unbind()
    w, b = w.requires_grad_(), b.requires_grad_()
    F.mse_loss(w * x + b, y).backward()
    error = (w * x + b - y).detach()
    torch.testing.assert_close(w.grad, 2 * (error * x).mean())
    torch.testing.assert_close(b.grad, 2 * error.mean())


def test_a_linear_layer():
    weight, x, bias, sums, result = map(evaluate, matrices("2-fashion-mnist.md", "two outputs:"))
    layer = nn.Linear(2, 2)
    layer.load_state_dict({"weight": weight, "bias": bias.squeeze(1)})
    output = layer(x.T).T.detach()
    torch.testing.assert_close(output, sums)
    torch.testing.assert_close(output, result)


def test_two_linear_layers_are_one():
    outer, inner, first, second, slope, intercept = find(
        "2-fashion-mnist.md", "into $`2x + 4`$: ```math", "```"
    )
    assert (outer * inner, outer * first + second) == (slope, intercept)


@pytest.mark.parametrize("x", [2.0, -2.0])
def test_gelu_of_a_number(x):
    values = dict(re.findall(r"GELU\}\((-?\d)\) = (-?[\d.]+)", read("2-fashion-mnist.md")))
    assert F.gelu(torch.tensor(x)).item() == pytest.approx(float(values[f"{x:g}"]), abs=0.005)


def test_batch_normalization_of_four_numbers():
    page = read("2-fashion-mnist.md")
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert "is 1, 2, 3 and 6 for the four images" in page
    formula = r"\\frac\{(\d) - 3\}\{\\sqrt\{3.5\}\} = (-?[\d.]+)"
    before, after = zip(*re.findall(formula, page), strict=True)
    assert [*map(float, before)] == x.tolist()
    assert x.var(correction=0) == 3.5
    normalized = nn.BatchNorm1d(1)(x.unsqueeze(1)).squeeze(1)
    assert normalized.tolist() == pytest.approx([*map(float, after)], abs=0.005)


def test_softmax_and_loss_of_three_classes():
    row = r"\| (?:first|second|third) \|(.*?)\| (?=\|)"
    rows = re.findall(row, read("2-fashion-mnist.md"))
    logits, powers, shares, losses = torch.tensor([numbers(row) for row in rows]).T
    torch.testing.assert_close(logits.exp(), powers, atol=0.0005, rtol=0)
    torch.testing.assert_close(logits.softmax(dim=0), shares, atol=0.0005, rtol=0)
    found = F.cross_entropy(logits.expand(3, 3), torch.arange(3), reduction="none")
    torch.testing.assert_close(found, losses, atol=0.005, rtol=0)
    total = find("2-fashion-mnist.md", "| sum |", "The loss is")
    assert total == pytest.approx([logits.exp().sum().item(), 1], abs=0.0005)
    torch.testing.assert_close((logits + 5).softmax(dim=0), logits.softmax(dim=0))


def test_the_loss_of_a_network_that_has_learned_nothing():
    share, loss = find("2-fashion-mnist.md", r"has the loss $`-\log", "`$")
    found = F.cross_entropy(torch.zeros(1, 10), torch.tensor([0])).item()
    assert (0.1, found) == pytest.approx((share, loss), abs=0.005)


def test_smoothed_labels_and_their_lowest_loss():
    correct, other = find("2-fashion-mnist.md", "so that the correct one should get", ". With such")
    target = torch.full((10,), other)
    target[3] = correct
    assert target.sum() == pytest.approx(1)
    logits = torch.randn(1, 10)
    loss = F.cross_entropy(logits, torch.tensor([3]), label_smoothing=0.1)
    torch.testing.assert_close(loss, -(target * logits.log_softmax(dim=1)).sum())
    (lowest,) = find("2-fashion-mnist.md", "the loss can't fall below", "; the")
    best = F.cross_entropy(target.log().unsqueeze(0), torch.tensor([3]), label_smoothing=0.1)
    assert best.item() == pytest.approx(lowest, abs=0.005)


def test_adam_moves_parameters_with_small_and_large_gradients_equally_far():
    small, large = find("2-fashion-mnist.md", "a gradient of", "move their parameters")
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([small, large])
    torch.optim.AdamW([parameter], lr=0.006).step()
    assert parameter.tolist() == pytest.approx([-0.006, -0.006], rel=1e-4)


def test_adam_written_out_is_that_of_pytorch():
    page = read("2-fashion-mnist.md")
    (one, two, three, four), (rest_one, rest_two) = (
        [*map(float, re.findall(pattern, page)[0])]
        for pattern in (
            r"m &\\leftarrow ([\d.]+) \\, m \+ ([\d.]+) \\, g .*?([\d.]+) \\, v \+ ([\d.]+)",
            r"\{1 - ([\d.]+)\^t\}.*?\{1 - ([\d.]+)\^t\}",
        )
    )
    w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    expected = torch.optim.Adam([w], lr=0.006)
    mine, m, v = 1.0, 0.0, 0.0
    for t, g in enumerate((0.5, -2.0, 100.0), start=1):
        m = one * m + two * g
        v = three * v + four * g**2
        mine -= 0.006 * (m / (1 - rest_one**t)) / (math.sqrt(v / (1 - rest_two**t)) + 1e-8)
        w.grad = torch.tensor(g, dtype=torch.float64)
        expected.step()
        assert mine == pytest.approx(w.item(), rel=1e-12)


def test_a_network_learns_a_batch_by_heart_and_with_a_second_softmax_it_cant():
    fashion = importlib.import_module("fashion-mnist")
    images, labels = (x[:32] for x in fashion.load(fashion.SAMPLE, "train"))
    (lowest,) = find("2-fashion-mnist.md", "it can't fall below", "; with smoothed labels")
    best = F.cross_entropy(F.one_hot(labels, 10).float(), labels)
    assert best.item() == pytest.approx(lowest, abs=0.005)
    last = []
    for activation in (nn.Identity(), nn.Softmax(dim=1)):
        torch.manual_seed(0)
        model = nn.Sequential(fashion.Classifier(), activation)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.006)
        for step in range(100):
            loss = F.cross_entropy(model(images), labels)
            if step == 0:
                assert loss.item() == pytest.approx(math.log(10), abs=0.3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        last.append(loss.item())
    assert last[0] < 0.01
    assert last[1] >= best


def test_an_epoch_has_the_steps_that_the_page_says():
    (steps,) = find("2-fashion-mnist.md", "is an *epoch*:", "steps")
    fashion = importlib.import_module("fashion-mnist")
    labels = torch.arange(60_000)
    (kept, _), _ = fashion.hold_out((labels, labels))
    assert len(kept) // 500 == steps


def walk(capsys):
    """Return the matrices that attention.py prints for its sentence, by formula."""
    attention = importlib.import_module("attention")
    assert attention.main(["--device", "cpu", "--explain", attention.SENTENCE]) == 0
    found = {}
    for part in capsys.readouterr().out.strip().split("\n\n"):
        formula, _, _, *rows = part.splitlines()
        table = [[float(n) for n in re.findall(r"-?\d+\.\d\d", row)] for row in rows]
        found[formula.partition("   ")[0]] = torch.tensor(table)
    return found


def test_what_cat_gets(capsys):
    """To two digits, from the two digits that the script prints."""
    found, row = walk(capsys), 1
    page = "3-attention.md"
    vectors = find(page, "the key of *the* are ```math (", ") ``` and their")
    wanted = torch.cat((found["Q = x W_q"][row], found["K = x W_k"][0]))
    assert vectors == pytest.approx(wanted.tolist())
    *factors, product = find(page, "dot product is ```math", "```")
    pairs = zip(vectors[:4], vectors[4:], strict=True)
    assert factors == [abs(n) for pair in pairs for n in pair]  # the signs stand between them
    assert product == pytest.approx(
        (found["Q = x W_q"][row] @ found["K = x W_k"][0]).item(), abs=0.01
    )
    (score,) = find(page, "which gives", "These are the scores")
    assert score == pytest.approx(product / 2, abs=0.005)
    *_, weight = said = find(page, r"\begin{aligned} e^{", r"\end{aligned}")
    scores, exponentials, total = said[:5:], said[5:10], said[10]
    assert scores == pytest.approx(found["QKᵀ/√d_k"][row].tolist(), abs=0.001)
    assert exponentials == pytest.approx([math.exp(s) for s in scores], abs=0.01)
    assert total == pytest.approx(sum(math.exp(s) for s in scores), abs=0.02)
    assert weight == pytest.approx(exponentials[0] / total, abs=0.005)
    weights = find(page, "So *cat* gives a weight of", "to *dog*.")
    the, cat, sees, dog = weights
    expected = found["softmax(QKᵀ/√d_k)"][row].tolist()
    assert [the, cat, sees, the, dog] == pytest.approx(expected, abs=0.001)


def rows_of_table(page, after):
    """Return the rows of the first table after a text, each as the list of its cells."""
    lines = (DOCS / page).read_text(encoding="utf-8").partition(after)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_positions_by_hand():
    attention = importlib.import_module("attention")
    _, _, *rows = rows_of_table("3-attention.md", "With four numbers:")
    encoding = attention.positional_encoding(101, 4)
    assert len(rows) == 5
    for row in rows:
        (t,), said = numbers(row[0]), numbers(" ".join(row[1:]))
        assert said == pytest.approx(encoding[int(t)].tolist(), abs=0.005)


def test_the_shapes_of_masks():
    attention = importlib.import_module("attention")
    sizes = {"B": 2, "T": 3, "S": 3, "1": 1}
    _, _, *rows = rows_of_table("3-attention.md", "[broadcasting](1-hello.md#tensors) repeats it")
    said = [[sizes[letter] for letter in re.findall(r"\w", row[1])] for row in rows]
    causal = attention.causal_mask(3)
    padding = attention.padding_mask(torch.tensor([[5, 5, 0], [5, 5, 5]]), pad=0)
    heads = attention.MultiHeadAttention(8, 4)
    x = torch.randn(2, 3, 8)
    ready = heads.split_heads(x, x, x, causal & padding)[3]
    assert said == [list(mask.shape) for mask in (causal, padding, causal & padding, ready)]


def test_the_labels_of_a_sequence_by_hand():
    rows = rows_of_table("3-attention.md", "the last one):")
    digits, mirror, left = ([int(n) for n in row[1].split()] for row in rows if "-" not in row[1])
    assert mirror == digits[::-1]
    assert left == digits[-1:] + digits[:-1]


def test_four_ways_to_mask():
    attention = importlib.import_module("attention")
    header, _, *rows = rows_of_table("3-attention.md", "under four masks:")
    Q, K, V = torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([[1.0], [2.0]])
    theirs = nn.MultiheadAttention(1, 1, bias=False)
    for weight in theirs.parameters():
        nn.init.ones_(weight)
    for column, words in enumerate(header[1:], start=1):
        mask = torch.tensor([[word == "True" for word in words.split()]])
        scores = (Q @ K.T).float()
        found = [
            attention.scaled_dot_product_attention(Q, K, V, mask)[0],
            theirs(Q, K, V, attn_mask=mask)[0],
            (scores + mask.float().log()).softmax(dim=-1) @ V,
            (scores + mask.float()).softmax(dim=-1) @ V,
        ]
        said = [float(row[column].lower()) for row in rows]
        assert said == pytest.approx([x.item() for x in found], abs=0.005, nan_ok=True)
        kernel = F.scaled_dot_product_attention(Q[None], K[None], V[None], mask[None])
        assert kernel.item() == pytest.approx(said[0], abs=0.005)


def test_weights_under_a_mask_by_hand():
    one, total, weight = find("3-attention.md", "What are its weights? (0, then $`", "`$ and")
    weights = torch.tensor([-math.inf, 1.0, 0.0]).softmax(dim=0)
    assert (one, total) == pytest.approx((math.e, math.e + 1), abs=0.001)
    assert weight == pytest.approx(weights[1].item(), abs=0.005)
    (other,) = find("3-attention.md", "`$ and $`1 / 3.718 =", "`$.)")
    assert other == pytest.approx(weights[2].item(), abs=0.005)


def test_the_highest_learning_rate_by_hand():
    transformer = importlib.import_module("transformer")
    d_model, warmup, rate = find(
        "4-transformer.md", r"With this script's $`d_\text{model}`$", ". The script"
    )
    assert (d_model, warmup) == (transformer.Sizes().d_model, transformer.WARMUP)
    assert rate == pytest.approx(transformer.learning_rate(warmup, d_model, warmup))


def test_scores_of_two_translations_by_hand():
    (short,) = find("6-translation.md", "one token with log-probability", ", or one of")
    (long,) = find("6-translation.md", "seven with", "? (The scores")
    first, _, one, second, _, two = find("6-translation.md", "(The scores are $`", "`$: the longer")
    assert (first, second) == (short, long)
    assert (one, two) == pytest.approx((short / ((5 + 1) / 6), long / ((5 + 7) / 6)))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_what_is_typed_at_the_prompt_gives_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where files may be written
    text = page.read_text(encoding="utf-8")
    typed = "\n".join(re.findall(r"^```pycon\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    case = doctest.DocTestParser().get_doctest(typed, {"torch": torch}, page.name, str(page), 0)
    assert doctest.DocTestRunner(verbose=False).run(case).failed == 0


def test_a_layer_norm_by_hand():
    *x, mean, variance = find("4-transformer.md", "The vector (", ", and becomes")
    said = find("4-transformer.md", "variance 3.5, and becomes (", ")")
    x = torch.tensor(x)
    assert (x.mean(), x.var(correction=0)) == (mean, variance)
    assert said == pytest.approx(F.layer_norm(x, (4,)).tolist(), abs=0.005)


def test_four_tokens_in_bits_and_bytes_by_hand():
    _, _, *rows, total = rows_of_table("5-gpt.md", "predicts the text `for i in range`")
    tokens = [row[0].strip("`") for row in rows]
    assert "".join(tokens) == "for i in range"
    size, p, bits = torch.tensor([numbers(" ".join(row[1:])) for row in rows]).T
    length, cost = int(size.sum()), bits.sum().item()
    assert size.tolist() == [len(token.encode()) for token in tokens]
    torch.testing.assert_close(-p.log2(), bits, atol=0.005, rtol=0)
    assert numbers(" ".join(total)) == pytest.approx([length, cost], abs=0.005)
    before, eight, unzipped = find("5-gpt.md", "The text has $`", "`$ bits. With")
    assert (before, eight, unzipped) == (length, 8, 8 * length)
    needed, whole = find("5-gpt.md", "With this network,", "byte. Divide")
    assert (needed, whole) == pytest.approx((cost, math.ceil(cost / 8)))
    part, among, per_byte = find("5-gpt.md", "the *bits per byte*: $`", "`$. An uncompressed")
    assert (part, among) == pytest.approx((cost, length))
    assert per_byte == pytest.approx(part / among, abs=0.005)
    part, _, count, nats = find("5-gpt.md", "natural logarithm, in this example $`", "`$ *nats*")
    assert (part, count) == pytest.approx((cost, 4))
    assert nats == pytest.approx(-p.log().mean().item(), abs=0.005)


def test_an_interval_by_hand():
    diagrams = importlib.import_module("diagrams")
    coder = importlib.import_module("decoding.coder")
    encoder, interval = coder.Encoder(), coder.Interval()
    ends, product = [], []
    for token, likely in diagrams.CODED.items():
        assert sum(likely.values()) == pytest.approx(1)
        shares = torch.tensor([*likely.values()], dtype=torch.float64)
        cumulative = coder.cumulate((1000 * shares).round().long().numpy())
        encoder.encode([*likely].index(token), cumulative)
        interval.narrow([*likely].index(token), cumulative)
        ends.append([interval.low / coder.WHOLE, interval.high / coder.WHOLE])
        product.append(likely[token])
    row = find("5-gpt.md", "The interval from 0 to 1 is cut three times:", "](interval.svg)")
    assert row == pytest.approx([end for pair in ends for end in pair])
    assert find("5-gpt.md", "The last interval goes from", ". Its width") == pytest.approx(ends[-1])
    *factors, width = find("5-gpt.md", "the three probabilities, $`", "`$, and")
    assert [*factors, width] == pytest.approx([*product, math.prod(product)])
    _, _, bits = find("5-gpt.md", "`$, and $`-", "`$ is the sum of their bits")
    assert bits == pytest.approx(-math.log2(width), abs=0.005)
    digits = re.search(r"begin with 0\.([01]+) lie", read("5-gpt.md"))[1]
    low, high = find("5-gpt.md", f"begin with 0.{digits} lie between", ", so inside")
    assert (low, high) == (int(digits, 2) / 2**6, (int(digits, 2) + 1) / 2**6)
    assert ends[-1][0] <= low < high <= ends[-1][1]
    assert f"{encoder.finish()[0]:08b}".startswith(digits) and len(digits) == math.ceil(bits)


def test_merges_by_hand():
    diagrams = importlib.import_module("diagrams")
    documents = importlib.import_module("inputs.documents")
    page = read("5-gpt.md")
    assert "the words *the*, *then* and *that*" in page
    tokenizer = documents.learn_tokenizer(diagrams.WORDS, 257 + 2)
    said = re.findall(r"[Tt]he pair `(\w+)`, `(\w)` occurs (\d) times", page)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert [[a, b] for a, b, _ in said] == merges
    assert [int(n) for *_, n in said] == [
        sum((a + b) in word for word in diagrams.WORDS) for a, b in merges
    ]
    count, tokens, before = find("5-gpt.md", "After these", ". Frequent")
    assert count == len(merges)
    assert tokens == sum(len(tokenizer.encode(word).ids) for word in diagrams.WORDS)
    assert before == sum(map(len, diagrams.WORDS))
    shares = re.search(r"vocabulary has ([\d,]+) tokens: (\d+) bytes, (\d+) merges", page).groups()
    size, single, merged = (int(share.replace(",", "")) for share in shares)
    assert (size, single, merged) == (G.Settings().vocab_size, 256, size - 256 - 1)


def test_an_rms_norm_by_hand():
    header, _, *rows = rows_of_table("5-gpt.md", "the mean square is")
    x = torch.tensor(numbers(" ".join(header)))
    *squares, _, mean, under, root = find("5-gpt.md", r"\frac{", "``` | | 1")
    assert squares == x.square().tolist()
    assert mean == under == x.square().mean()
    assert root == pytest.approx(mean**0.5, abs=0.005)
    for row, norm in zip(rows, (F.layer_norm, F.rms_norm), strict=True):
        assert numbers(" ".join(row)) == pytest.approx(norm(x, (4,)).tolist(), abs=0.005)


def test_a_query_and_a_key_that_are_turned_by_hand():
    page = "5-gpt.md"
    query = torch.tensor(find(page, "The query is (", "), and the key"))
    key = torch.tensor(find(page, "and the key (", "). The picture"))
    m, n = find(page, "At the positions", ", the query becomes")
    o, p = find(page, "(−1.13, −0.85). At", ", they become")
    vectors = find(page, ", the query becomes (", "). At")
    vectors += find(page, ", they become (", "). Turning")
    products = find(page, r"the dot product: ```math \begin{aligned}", r"\end{aligned}")
    found = []
    for vector, position in ((query, m), (key, n), (query, o), (key, p)):
        angle = torch.tensor([position])
        found.append(G.rotate(vector, angle.cos(), angle.sin()))
    assert vectors == pytest.approx(torch.cat(found).tolist(), abs=0.005)
    assert m - n == o - p
    for said, first, second in ((products[:5], *found[:2]), (products[5:], *found[2:])):
        a, c = first.tolist()
        b, d = second.tolist()
        assert said[:4] == pytest.approx([a, b, c, d], abs=0.005)
        assert said[4] == pytest.approx(said[0] * said[1] + said[2] * said[3], abs=0.005)
        assert said[4] == pytest.approx((first @ second).item(), abs=0.005)


def test_swiglu_by_hand():
    page = "5-gpt.md"
    x, up, down, gate = find(page, "instead of vectors, $`x =", "`$: ```math")
    lines = find(page, r"\text{up:} \quad &", r"\end{aligned}")
    up_factors, gate_factors, silu, last = lines[:3], lines[3:6], lines[6:11], lines[11:]

    def network(gate):
        layer = G.FeedForward(G.Sizes(1, 1, 1, 1, 1, 2, 1, 1, tied=False))
        for matrix, weight in ((layer.W_gate, gate), (layer.W_up, up), (layer.W_down, down)):
            nn.init.constant_(matrix.weight, weight)
        return layer(torch.tensor([x])).item()

    assert up_factors == [x, up, x * up]
    assert gate_factors == [x, gate, x * gate]
    opened = F.silu(torch.tensor(x * gate)).item()
    assert silu == pytest.approx([x * gate, x * gate, 1, -x * gate, opened], abs=0.005)
    product = silu[-1] * x * up
    expected = [silu[-1], x * up, product, product, down, network(gate)]
    assert last == pytest.approx(expected, abs=0.005)
    other, at, opened, result = find(page, r"With $`W_\text{gate} =", ": the gate is almost closed")
    assert at == x * other
    assert opened == pytest.approx(F.silu(torch.tensor(at)).item(), abs=0.005)
    assert result == pytest.approx(network(other), abs=0.005)


def test_five_tokens_to_draw_from_by_hand():
    page = "5-gpt.md"
    sampling = importlib.import_module("decoding.sampling")
    _, _, predicted, *rows = rows_of_table(page, "Say five tokens have these probabilities")
    p = torch.tensor(numbers(" ".join(predicted)), dtype=torch.float64)
    assert p.sum() == pytest.approx(1)
    for row in rows:
        kind, value = row[0].split()
        logits = {
            "temperature": lambda value: p.log() / value,
            "top-k": lambda value: sampling.keep_top_k(p.log(), int(value)),
            "top-p": lambda value: sampling.keep_top_p(p.log(), value),
        }[kind](float(value))
        said = numbers(" ".join(row[1:]))
        assert said == pytest.approx(logits.softmax(dim=0).tolist(), abs=0.005)
    base, _, square, total, one, two, share = find(
        page, "divides them by their sum. $`", "`$. A temp"
    )
    assert (base**2, p.square().sum().item()) == pytest.approx((square, total))
    assert (one, two) == (square, total) and share == pytest.approx(one / two, abs=0.005)
    both, limit, three = find(page, "A and B have", ". So C is kept")
    assert [both, three] == pytest.approx([p[:2].sum().item(), p[:3].sum().item()])
    assert both < limit <= three
    part, whole, first = find(page, "So C is kept, and A gets $`", "`$.")
    assert [part, whole] == pytest.approx([p[0].item(), p[:3].sum().item()])
    assert first == pytest.approx(part / whole, abs=0.005)


def test_positions_of_prompts_of_different_lengths():
    sampling = importlib.import_module("decoding.sampling")
    _, _, *rows = rows_of_table("5-gpt.md", "### Several prompts at once")
    cells = [[row[1].split(", "), row[2].split(", "), row[3]] for row in rows]
    real = torch.tensor([[token != "padding" for token in tokens] for tokens, _, _ in cells])
    seen = []

    class Model:
        def hidden(self, tokens, positions, mask):
            seen.append(positions)
            return torch.zeros(*tokens.shape, 1)

        def to_logits(self, x):
            return x

    sampling.next_logits(Model(), torch.zeros(real.shape), real)
    longer = torch.cat((real, torch.ones(2, 1, dtype=torch.bool)), dim=1)
    sampling.next_logits(Model(), torch.zeros(longer.shape), longer, start=real.shape[1])
    for row, (_, said, following) in enumerate(cells):
        for t, position in enumerate(said):
            assert position in ("any", str(seen[0][row, t].item()))
        assert int(following) == seen[1][row, -1]


def test_a_translation_that_ends_by_hand():
    best, other = find("6-translation.md", "If they end now, log P is", ", and both are divided by")
    assert (best, other) == pytest.approx((math.log(0.288), math.log(0.14)), abs=0.005)
    start, length, scale, alpha, penalty = find(
        "6-translation.md", "and both are divided by $`", "`$. So `which`"
    )
    assert (start, scale, alpha) == (5, 6, 1.2)
    assert penalty == pytest.approx(((start + length) / scale) ** alpha, abs=0.005)
    which, score = find("6-translation.md", "So `which` is", ", and the two tokens")
    assert (which, score) == (0, pytest.approx(math.log(0.288) / 1.4123, abs=0.005))


def test_tokens_of_a_batch_by_hand():
    pairs_module = importlib.import_module("inputs.pairs")
    pairs, source, target, total = find(
        "6-translation.md", "the longest target 6, count $`", "`$. Then it shuffles"
    )
    assert total == pairs * (source + target)
    lengths = torch.tensor([[int(source), 5], [3, int(target)]])
    for tokens, batches in ((int(total), 1), (int(total) - 1, 2)):
        found = pairs_module.make_batches(lengths, tokens, torch.Generator().manual_seed(0))
        assert len(found) == batches


def test_losses_of_knowing_nothing():
    tokens, loss = find("5-gpt.md", "the first loss is", ": that of knowing nothing")
    assert (tokens, loss) == pytest.approx((G.Settings().vocab_size, math.log(tokens)), abs=0.005)
    tokens, loss = find("5-gpt.md", "worse than guessing at random: $`", "`$ |")
    assert loss == pytest.approx(math.log(tokens), abs=0.005)


def test_the_parts_of_2017_have_the_measured_bits_per_byte():
    measured = read("measurements.md").partition("## Language model")[2]
    _, _, *rows = rows_of_table("5-gpt.md", "### 2017 and now")
    said = [row[-1] for row in rows]
    said += re.findall(r"as they are now, they are ([\d.]+) ±", read("5-gpt.md"))
    assert len(said) > 4
    for number in said:
        assert re.search(rf"\| [^|]*\b{re.escape(number)}\b", measured), number


def test_exercises_by_hand_about_a_language_model():
    size, count = find("5-gpt.md", "By hand: a file of", ", each predicted with")
    tokens, bits, bytes_, per_byte = find("5-gpt.md", "is that? ($`", "`$.)")
    assert (tokens, bytes_, bits) == (count, size, -math.log2(1 / 4))
    assert per_byte == pytest.approx(tokens * bits / bytes_)
    sampling = importlib.import_module("decoding.sampling")
    *p, first, second = find("5-gpt.md", "By hand: five tokens have the probabilities", "? (Two,")
    logits = torch.tensor(p, dtype=torch.float64).log()
    kept = [sampling.keep_top_p(logits, limit).isfinite().sum() for limit in (first, second)]
    assert kept == [2, 3]


def test_a_beam_by_hand():
    diagrams = importlib.import_module("diagrams")
    page, first, second = "6-translation.md", diagrams.FIRST, diagrams.SECOND
    a, the = find(page, "As the first word, *a* has probability", ". With the second")
    one, dog, total = find(page, "*a dog* has", ", and *the dog*")
    two, best_dog, best = find(page, "and *the dog* has", "; their logarithms")
    logarithms = find(page, "their logarithms are", ". Greedy")
    assert (a, the) == (one, two) == (first["a"], first["the"])
    assert (dog, best_dog) == (second["a"]["dog"], second["the"]["dog"])
    assert (total, best) == pytest.approx((one * dog, two * best_dog))
    assert logarithms == pytest.approx([math.log(total), math.log(best)], abs=0.005)


# Translation

BEAM_WORDS = ["<pad>", "<s>", "</s>", "a", "the", "one", "dog", "cat", "bird", "runs"]


def beam_rows():
    """Return the rows of the table of three steps: step, unfinished, next, factors, what became."""
    _, _, *rows = rows_of_table("6-translation.md", "marks the end:")
    return [
        (int(step), before.split(), after.strip("`"), numbers(product), fate)
        for step, before, after, product, fate in rows
    ]


def follow_beam(beam):
    """Search with the probabilities of the table; return the unfinished at each step, and the end.

    What the table doesn't have is as likely as nothing.
    """
    table = {(*before, after): factors for _, before, after, factors, _ in beam_rows()}
    steps = []

    def decode(target, rows):
        steps.append([[BEAM_WORDS[i] for i in ids[1:]] for ids in target.tolist()])
        logits = torch.full((len(target), len(BEAM_WORDS)), -1e4)
        for row, before in zip(logits, steps[-1], strict=True):
            row[BEAM_WORDS.index("</s>")] = -1e3  # after three steps, it ends
            for n, word in enumerate(BEAM_WORDS):
                if (*before, word) in table:
                    row[n] = math.log(table[*before, word][-2 if before else 0])
        return logits

    search = importlib.import_module("decoding.search").search
    (found,) = search(decode, torch.tensor([[3, 2]]), beam, alpha=1.2)
    return steps, [BEAM_WORDS[i] for i in found]


def test_three_steps_of_a_beam_by_hand():
    rows = beam_rows()
    probability = {(): 1.0}
    for _, before, after, factors, _ in rows:
        *product, said = factors
        if before:
            assert product[0] == probability[*before]
            assert said == pytest.approx(math.prod(product))
        probability[*before, after] = said
    steps, found = follow_beam(2)
    for step in (1, 2, 3):
        kept = [
            [*before, after] for n, before, after, _, fate in rows if (n, fate) == (step, "kept")
        ]
        assert sorted(kept) == sorted(steps[step])
    (best,) = [before for _, before, _, _, fate in rows if fate.endswith("best so far")]
    assert found == best == ["the", "dog"]
    assert follow_beam(1)[1] == ["a", "dog"]


def test_the_places_of_continuations_by_hand():
    diagrams = importlib.import_module("diagrams")
    page = read("6-translation.md")
    said = re.search(r"and then come (.*?): (\d+) in all", page)
    words = dict(re.findall(r"\*(\w+)\* (\d)", said[1]))
    assert {word: int(n) for word, n in words.items()} == {
        w: n + 3 for n, w in enumerate(BEAM_WORDS[3:])
    }
    assert int(said[2]) == len(BEAM_WORDS)
    total = torch.full((2, len(BEAM_WORDS)), -math.inf)
    for row, first in enumerate(("a", "the")):
        for second, p in diagrams.SECOND[first].items():
            total[row, BEAM_WORDS.index(second)] = math.log(diagrams.FIRST[first] * p)
    score, top = total.flatten().topk(2)
    _, _, *rows = rows_of_table("6-translation.md", "are at these places:")
    for (_, *cells), log_p, place in zip(rows, score.tolist(), top.tolist(), strict=True):
        said = numbers(" ".join(cells))
        assert said == pytest.approx([log_p, place, *divmod(place, len(BEAM_WORDS))], abs=0.005)


def test_bleu_by_hand():
    BLEU = importlib.import_module("sacrebleu.metrics").BLEU
    page = read("6-translation.md")
    found, wanted = re.search(r"Take \*(.*?)\*, where the reference is \*(.*?)\*", page).groups()
    score = BLEU().corpus_score([found], [[wanted]])
    _, _, *rows = rows_of_table("6-translation.md", "Only the first word is wrong:")
    shares = [[int(cell.partition("/")[0]) for cell in row] for row in rows]
    assert shares == [[n + 1, score.totals[n], score.counts[n], score.counts[n]] for n in range(4)]
    assert [row[3] for row in rows] == [f"{row[2]}/{row[1]}" for row in rows]
    product, bleu, short = (
        find("6-translation.md", "product of the four shares is $`2/6 =", "`$"),
        find("6-translation.md", "times 100:", ". For *"),
        find("6-translation.md", "6/5} =", "`$. For many"),
    )
    assert product[0] / product[1] == pytest.approx(math.prod(score.precisions) / 100**4)
    assert bleu == pytest.approx([score.score], abs=0.05)
    shorter = re.search(r"For \*(.*?)\*, all shares are 1", page)[1]
    assert short == pytest.approx([BLEU().corpus_score([shorter], [[wanted]]).score], abs=0.05)


def test_a_gradient_of_two_processes_by_hand(monkeypatch):
    """With the shares and weights of the script, and losses whose derivatives are the table's."""
    script = importlib.import_module("translation")
    _, _, *rows = rows_of_table("6-translation.md", "the derivatives of each token's loss:")
    derivatives = [numbers(row[1]) for row in rows[:2]]
    count = sum(map(len, derivatives))
    means = [sum(each) / len(each) for each in derivatives]
    for row, each, mean in zip(rows, derivatives, means, strict=False):
        assert numbers(" ".join(row[2:])) == pytest.approx(
            [sum(each), mean, sum(each) / count], abs=0.005
        )
    true = sum(map(sum, derivatives)) / count
    assert numbers(" ".join(rows[2][2:])) == pytest.approx(
        [sum(map(sum, derivatives)), sum(means) / 2, true], abs=0.005
    )
    w = nn.Parameter(torch.tensor(0.0))
    corpus = corpus_of([([2], [0] * (len(each) + 1)) for each in derivatives])

    def loss(model, corpus, rows, smoothing):
        return sum(w * derivative for row in rows.tolist() for derivative in derivatives[row])

    monkeypatch.setattr(script, "batch_loss", loss)
    gradients = []
    for rank in (0, 1):
        monkeypatch.setattr(script, "rank_and_world", lambda rank=rank: (rank, 2))
        w.grad = None
        script.add_gradients(nn.Identity(), corpus, torch.arange(2), count, script.Settings())
        gradients.append(w.grad.item())
    first, second = find("6-translation.md", r"$`8 \cdot 2/4 =", r"`$, whose average")[::4]
    assert gradients == [first, second]
    assert (
        sum(gradients) / 2
        == true
        == find("6-translation.md", "over all tokens is $`12 / 4 =", "`$")[0]
    )


def test_the_sizes_of_embeddings_that_start_at_1_and_of_positions_by_hand():
    attention = importlib.import_module("attention")
    (size,) = find("3-attention.md", r"have a size of $`\sqrt{1/2} =", "`$, and $`8")
    root, _, ratio = find("3-attention.md", "0.71`$, and $`", "`$ |")
    encoding = attention.positional_encoding(10, 64)
    assert encoding.square().mean().sqrt().item() == pytest.approx(size, abs=0.005)
    assert root == math.sqrt(64)
    assert root / size == pytest.approx(ratio, abs=0.5)
