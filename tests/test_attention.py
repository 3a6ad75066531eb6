import importlib
import json
import math
import re
import unicodedata

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attention as A

MASKS = ("none", "causal", "padding", "both")
sizes = st.integers(1, 5)


def make_mask(kind, B, T, S):
    """Return a mask (B, T, S) or None; the lengths go from 1 up to S."""
    causal = A.causal_mask(max(T, S))[:T, :S].expand(B, T, S)
    padding = A.padding_mask(torch.arange(B) % S + 1, S).expand(B, T, S)
    return {"none": None, "causal": causal, "padding": padding, "both": causal & padding}[kind]


def gradients(output, *inputs):
    return torch.autograd.grad(output.square().sum(), inputs)


def attention_by_loops(Q, K, V, mask=None):
    """Follow equation 1 of the paper, number by number, in float64."""
    T, d_k = Q.shape
    weights = np.zeros((T, len(K)))
    for i in range(T):
        scores = [
            math.exp(sum(Q[i, n] * K[j, n] for n in range(d_k)) / math.sqrt(d_k))
            if mask is None or mask[i, j]
            else 0.0
            for j in range(len(K))
        ]
        for j in range(len(K)):
            weights[i, j] = scores[j] / sum(scores) if sum(scores) else 0.0
    output = np.zeros((T, V.shape[1]))
    for i in range(T):
        for j in range(len(K)):
            output[i] += weights[i, j] * V[j]
    return output, weights


@settings(deadline=None, max_examples=30)
@given(T=sizes, S=sizes, d_k=sizes, d_v=sizes, seed=st.integers(0, 999))
def test_the_formula_is_the_papers(T, S, d_k, d_v, seed):
    random = np.random.default_rng(seed)
    Q, K, V = (
        random.normal(size=(T, d_k)),
        random.normal(size=(S, d_k)),
        random.normal(size=(S, d_v)),
    )
    for mask in (None, random.random((T, S)) < 0.5):
        expected = attention_by_loops(Q, K, V, mask)
        tensors = [torch.from_numpy(array) for array in (Q, K, V)]
        mask = None if mask is None else torch.from_numpy(mask)
        found = A.scaled_dot_product_attention(*tensors, mask)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.numpy(), b, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(MASKS), batch=st.lists(sizes, max_size=2), T=sizes, S=sizes,
    d_k=sizes, d_v=sizes, seed=st.integers(0, 999),
)  # fmt: skip
def test_values_and_gradients_are_those_of_pytorch(kind, batch, T, S, d_k, d_v, seed):
    torch.manual_seed(seed)
    Q, K, V = (
        torch.randn(*batch, *shape, dtype=torch.float64, requires_grad=True)
        for shape in ((T, d_k), (S, d_k), (S, d_v))
    )
    mask = make_mask(kind, 1, T, S)
    mask = None if mask is None else mask[0]
    output, weights = A.scaled_dot_product_attention(Q, K, V, mask)
    expected = F.scaled_dot_product_attention(Q, K, V, mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, Q, K, V), gradients(expected, Q, K, V))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("kind", MASKS)
def test_the_gradient_is_that_of_finite_differences(kind):
    torch.manual_seed(0)
    mask = make_mask(kind, 2, 3, 4)
    Q, K, V = (
        torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 5), (4, 5), (4, 2))
    )
    assert torch.autograd.gradcheck(
        lambda *qkv: A.scaled_dot_product_attention(*qkv, mask)[0], (Q, K, V)
    )


def test_a_query_that_may_attend_to_nothing_gets_zeros_and_no_nan():
    torch.manual_seed(0)
    Q, K, V = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    output, weights = A.scaled_dot_product_attention(Q, K, V, mask)
    assert output[1].eq(0).all()
    assert weights[1].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in gradients(output, Q, K, V))


@pytest.mark.parametrize("need_weights", [False, True])
def test_no_head_makes_nan_of_an_empty_sequence(need_weights):
    torch.manual_seed(0)
    heads = A.MultiHeadAttention(8, 2)
    x = torch.randn(2, 3, 8, requires_grad=True)
    mask = A.padding_mask(torch.tensor([0, 2]), 3)
    output, _ = heads(x, x, x, mask, need_weights)
    assert output[0].eq(0).all()
    assert not output[1].eq(0).any()
    for gradient in gradients(output, x, *heads.parameters()):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_ten_thousand_make_no_nan(dtype, sign):
    Q = K = 141 * torch.eye(4, dtype=dtype)  # the scores are 141² / √4 = 9940.5 or 0
    Q = (sign * Q).requires_grad_()
    for mask in (None, A.causal_mask(4), torch.zeros(4, 4, dtype=torch.bool)):
        output, weights = A.scaled_dot_product_attention(Q, K, K, mask)
        assert output.isfinite().all()
        assert gradients(output, Q)[0].isfinite().all()
        if mask is None:
            assert weights.argmax(dim=-1).tolist() == ([0, 1, 2, 3] if sign > 0 else [1, 0, 0, 0])


@settings(deadline=None, max_examples=20)
@given(constant=st.integers(-100, 100), T=sizes, S=sizes, seed=st.integers(0, 999))
def test_a_constant_added_to_the_scores_of_a_query_changes_nothing(constant, T, S, seed):
    torch.manual_seed(seed)
    Q, K, V = (torch.randn(n, 4, dtype=torch.float64) for n in (T, S, S))
    # One more feature, 1 in each query, adds the same number to all scores of a row.
    more_Q = torch.cat((Q, torch.ones(T, 1)), dim=1) * math.sqrt(5 / 4)
    more_K = torch.cat((K, torch.full((S, 1), float(constant))), dim=1)
    mask = A.causal_mask(max(T, S))[:T, :S]
    found = A.scaled_dot_product_attention(more_Q, more_K, V, mask)
    torch.testing.assert_close(found, A.scaled_dot_product_attention(Q, K, V, mask))


@pytest.mark.parametrize("need_weights", [False, True])
def test_one_word_gets_its_own_value(need_weights):
    torch.manual_seed(0)
    heads, x = A.MultiHeadAttention(8, 2), torch.randn(2, 1, 8)
    output, weights = heads(x, x, x, A.causal_mask(1), need_weights)
    torch.testing.assert_close(output, heads.W_o(F.linear(x, heads.W_qkv.weight[16:])))
    assert weights is None or weights.eq(1).all()


@pytest.mark.parametrize("need_weights", [False, True])
def test_where_there_is_nothing_to_attend_to_the_output_is_zero(need_weights):
    heads, x, nothing = A.MultiHeadAttention(8, 2), torch.randn(2, 3, 8), torch.zeros(2, 0, 8)
    for mask in (None, torch.ones(3, 0, dtype=torch.bool)):
        assert heads(x, nothing, nothing, mask, need_weights)[0].eq(0).all()
        assert heads(nothing, x, x, None, need_weights)[0].shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        (((2, 3), (4, 5), (4, 5)), None, r"Q \(2, 3\), K \(4, 5\), V \(4, 5\)"),
        (((2, 3), (4, 3), (5, 3)), None, r"Q \(2, 3\), K \(4, 3\), V \(5, 3\)"),
        (((3,), (4, 3), (4, 3)), None, r"Q \(3,\), K \(4, 3\), V \(4, 3\)"),
        (((2, 3), (4, 3), (4, 3)), torch.ones(2, 4), r"torch.float32 \(2, 4\)"),
        (((2, 3), (4, 3), (4, 3)), torch.ones(2, 4, dtype=torch.int64), "torch.int64"),
        (((2, 3), (4, 3), (4, 3)), torch.ones(2, 3, dtype=torch.bool), r"\(2, 3\).*\(..., 2, 4\)"),
        (((2, 3), (4, 3), (4, 3)), torch.ones(4, dtype=torch.bool), r"\(4,\).*\(..., 2, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, mask, message):
    with pytest.raises(ValueError, match=message):
        A.scaled_dot_product_attention(*(torch.zeros(shape) for shape in shapes), mask)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"d_model 10 .* 3 heads"):
        A.MultiHeadAttention(10, 3)
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        A.MultiHeadAttention(8, 2)(x, x, x, torch.zeros(3, 3))


def test_masks_are_true_where_a_query_may_attend():
    assert A.causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True] * 3]
    padding = A.padding_mask(torch.tensor([1, 3]), 3)
    assert padding.tolist() == [[[True, False, False]], [[True, True, True]]]


@pytest.mark.parametrize("d_model", [6, 7])
def test_positional_encoding_is_that_of_section_3_5(d_model):
    expected = np.zeros((50, d_model))
    for pos in range(50):
        for n in range(d_model):
            angle = pos / 10_000 ** (2 * (n // 2) / d_model)
            expected[pos, n] = math.cos(angle) if n % 2 else math.sin(angle)
    np.testing.assert_allclose(A.positional_encoding(50, d_model).numpy(), expected, atol=1e-5)


def test_words_in_another_order_give_the_same_outputs_in_that_order():
    torch.manual_seed(0)
    heads = A.MultiHeadAttention(6, 2).double()
    x, order = torch.randn(1, 5, 6, dtype=torch.float64), torch.randperm(5)
    placed = A.positional_encoding(5, 6).double()
    before, after = (heads(y, y, y)[0] for y in (x, x[:, order]))
    torch.testing.assert_close(after, before[:, order])
    before, after = (heads(y, y, y)[0] for y in (x + placed, x[:, order] + placed))
    assert not torch.allclose(after, before[:, order])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention_computes_what_pytorch_computes(kind, cross):
    torch.manual_seed(0)
    B, T, S, d_model, num_heads = 3, 4, 6 if cross else 4, 8, 2
    ours = A.MultiHeadAttention(d_model, num_heads).double()
    theirs = nn.MultiheadAttention(d_model, num_heads, bias=False, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.W_qkv.weight)
        theirs.out_proj.weight.copy_(ours.W_o.weight)
    query = torch.randn(B, T, d_model, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(B, S, d_model, dtype=torch.float64, requires_grad=True) if cross else query
    mask = make_mask(kind, B, T, S)
    # nn.MultiheadAttention wants a mask for each head, and True where it may not attend.
    forbidden = None if mask is None else ~mask.repeat_interleave(num_heads, dim=0)
    expected, expected_weights = theirs(
        query, memory, memory, attn_mask=forbidden, average_attn_weights=False
    )
    inputs = (query, memory) if cross else (query,)
    expected_gradients = gradients(expected, *inputs, theirs.in_proj_weight, theirs.out_proj.weight)
    for need_weights in (False, True):
        output, weights = ours(query, memory, memory, mask, need_weights)
        torch.testing.assert_close(output, expected)
        found = gradients(output, *inputs, ours.W_qkv.weight, ours.W_o.weight)
        torch.testing.assert_close(found, expected_gradients)
        if need_weights:
            torch.testing.assert_close(weights, expected_weights)
        else:
            assert weights is None


def test_dropout_is_for_training_only():
    torch.manual_seed(0)
    heads = A.MultiHeadAttention(8, 2, dropout=0.5)
    x = torch.randn(2, 5, 8)
    for need_weights in (False, True):
        heads.train()
        assert not torch.equal(
            heads(x, x, x, need_weights=need_weights)[0],
            heads(x, x, x, need_weights=need_weights)[0],
        )
        heads.eval()
        again = heads(x, x, x, need_weights=not need_weights)[0]
        torch.testing.assert_close(heads(x, x, x, need_weights=need_weights)[0], again)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_masked_changes_nothing_in_training_and_in_use(need_weights, training):
    torch.manual_seed(0)
    heads = A.MultiHeadAttention(8, 2).train(training)
    x = torch.randn(2, 5, 8)
    changed = torch.cat((x[:, :3], torch.randn(2, 2, 8)), dim=1)
    future, padding = A.causal_mask(5), A.padding_mask(torch.tensor([3, 3]), 5)
    for mask in (future, padding, future & padding):
        before, after = (heads(y, y, y, mask, need_weights)[0] for y in (x, changed))
        assert torch.equal(before[:, :3], after[:, :3])
        assert not torch.equal(before[:, 3:], after[:, 3:])
    torch.testing.assert_close(before, heads.train(not training)(x, x, x, mask)[0])


def test_what_stands_after_the_end_changes_nothing():
    torch.manual_seed(0)
    model = A.Reverser(d_model=16)
    digits, lengths = torch.randint(10, (2, 8)), torch.tensor([5, 8])
    changed = digits.clone()
    changed[0, 5:] = 9 - changed[0, 5:]
    outputs = [model(d, lengths)[0] for d in (digits, changed)]
    assert torch.equal(outputs[0][0, :5], outputs[1][0, :5])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_the_reverser_has_the_shapes_and_the_parameters_it_says():
    model = A.Reverser(d_model=64, num_heads=2, num_layers=2)
    logits, weights = model(torch.zeros(3, 7, dtype=torch.int64), torch.tensor([1, 5, 7]), True)
    assert (logits.shape, weights.shape) == ((3, 7, 10), (3, 2, 7, 7))
    layer = 4 * 64 * 64 + (64 * 256 + 256) + (256 * 64 + 64) + 2 * (2 * 64)
    expected = 10 * 64 + 2 * layer + 64 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("unseen", [False, True])
def test_the_answers_are_the_digits_reversed(unseen):
    torch.manual_seed(0)
    lengths = torch.arange(1, A.MAX_DIGITS + 1).repeat(20)
    digits, answers = A.sample_sequences(lengths, unseen)
    for length, row, answer in zip(lengths, digits.tolist(), answers.tolist(), strict=True):
        sequence = row[:length]
        assert answer == sequence[::-1] + [A.IGNORED] * (A.MAX_DIGITS - length)
        assert (sum(sequence) % 10 == 0) == unseen


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    losses = A.train(A.Reverser(d_model=32), steps=60, lr=3e-3, batch_size=16)
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.2


def test_a_loss_that_is_no_number_stops_the_training():
    model = A.Reverser(d_model=16)
    nn.init.constant_(model.to_logits.bias, math.nan)
    with pytest.raises(FloatingPointError, match=r"nan.*--lr"):
        A.train(model, steps=3, lr=1e-3, batch_size=8)


def test_evaluate_counts_whole_sequences():
    class Copier(nn.Module):
        """Knows the answer, but gets the last digit of long sequences wrong."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, digits, lengths):
            order = (lengths.unsqueeze(1) - 1 - torch.arange(A.MAX_DIGITS)).clamp(min=0)
            answer = digits.gather(1, order)
            answer[:, 8] = (answer[:, 8] + 1) % 10
            return F.one_hot(answer, 10).float(), None

    exact = A.evaluate(Copier(), count=20)
    assert exact == {4: 1.0, 5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0, 9: 0.0, 10: 0.0}


FORMULAS = (
    "x ", "W_q ", "W_k ", "W_v ", "Q = x W_q ", "K = x W_k ", "V = x W_v ",
    "QKᵀ ", "QKᵀ/√d_k ", "softmax(QKᵀ/√d_k) ", "softmax(QKᵀ/√d_k)V ",
)  # fmt: skip
AWKWARD = "🙂 שלום a\tb 日本語 e\u0301 \x1b[31mred \u202eabc Donaudampfschifffahrt مرحبا\ud800"


def numbers(text):
    return [
        float(number) for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?|nan", text.replace(",", ""))
    ]


def cells(line):
    """Count the cells of a line in a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
    none = sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in line)
    return len(line) + wide - none


def walk(capsys, words):
    """Return the blocks that show_walk prints, and their numbers, without names and pictures."""
    torch.manual_seed(0)
    A.show_walk(words)
    blocks = capsys.readouterr().out.strip().split("\n\n")
    rows = [[re.findall(r"(?<= )-?\d+\.\d\d", line) for line in b.split("\n")[3:]] for b in blocks]
    return blocks, [np.array(matrix, dtype=float) for matrix in rows]


def test_it_runs_end_to_end_and_saves_what_it_says(run_script, tmp_path):
    done = run_script("attention.py", "--steps", 2, "--device", "cpu", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    places = [done.stdout.index(f"\n{formula}") for formula in FORMULAS]
    assert places == sorted(places)
    for section in ("Why √d_k", "Why positions", "Masks", "Why many heads"):
        assert f"\n{section}: " in done.stdout
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert f"to {metrics['loss']:.4f}. Of" in done.stdout
    assert list(metrics["exact"]) == [str(n) for n in range(A.MIN_DIGITS, A.MAX_DIGITS + 1)]
    for name in ("attention", "sentence"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    A.Reverser().load_state_dict(safetensors.torch.load_file(tmp_path / "out/model.safetensors"))


def test_the_walk_follows_the_formula(capsys):
    blocks, matrices = walk(capsys, ["the", "cat", "sees", "the", "dog"])
    assert [block.startswith(formula) for block, formula in zip(blocks, FORMULAS, strict=True)]
    x, W_q, W_k, W_v, Q, K, V, scores, scaled, weights, output = matrices
    for block, matrix in zip(blocks, matrices, strict=True):
        assert f" = {matrix.shape}\n" in block
    assert (x[0] == x[3]).all()
    for found, W in ((Q, W_q), (K, W_k), (V, W_v)):
        np.testing.assert_allclose(found, x @ W, atol=0.06)
    np.testing.assert_allclose(scores, Q @ K.T, atol=0.06)
    np.testing.assert_allclose(scaled, scores / 2, atol=0.01)
    np.testing.assert_allclose(weights, attention_by_loops(Q, K, V)[1], atol=0.02)
    np.testing.assert_allclose(output, weights @ V, atol=0.06)
    pictures = [line.split("  ")[-1][::2] for line in blocks[9].split("\n")[3:]]
    assert pictures == ["".join("·░▒▓█"[round(4 * w)] for w in row) for row in weights]


@pytest.mark.parametrize(
    "sentence", ["one", "a a", " ".join("abcdefghij"), AWKWARD, "🙂 " * 9, "語" * 40, "é́" * 40]
)
def test_every_word_keeps_the_walk_in_shape(sentence, capsys):
    words = sentence.split()
    blocks, matrices = walk(capsys, words)
    for block, matrix in zip(blocks, matrices, strict=True):
        _, _, header, *rows = block.split("\n")
        assert {cells(header)} == {8 + 7 * matrix.shape[1]}
        picture = 2 + 2 * len(words) if "░" in block.split("\n")[1] else 0
        assert {cells(row) for row in rows} == {8 + 7 * matrix.shape[1] + picture}
        assert max(cells(line) for line in block.split("\n")) <= 100
        for line in block.split("\n"):
            assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in line)
            assert line.count("\u2068") == line.count("\u2069")
            assert "\u202e" not in line


def test_an_accent_makes_the_same_word_however_it_is_typed(capsys):
    assert A.main(["--explain", "e\u0301 \u00e9"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[0].strip().split("\n")[3:]
    assert first == second


def test_explain_only_walks_and_says_what_it_leaves_out(tmp_path, capsys):
    assert A.main(["--explain", "word " * 40, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The first 10 of 40 words;")
    assert ("\nx   (T, d) = (10, 6)\n" in out, "Why" in out) == (True, False)
    assert max(map(len, out.splitlines())) == 100
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("cat", 6, "   cat"),
        ("kitten", 6, "kitten"),
        ("kittens", 6, "kitte…"),
        ("日本", 6, "  日本"),
        ("日本語", 6, "日本語"),
        ("日本語x", 6, " 日本…"),
        ("e\u0301", 3, "  e\u0301"),
        ("\u05d0\u05d1", 4, "  \u2068\u05d0\u05d1\u2069"),
        ("a\x1b\u202eb\ud800", 4, "  ab"),
        ("\u200b", 2, "  "),
    ],
)
def test_a_label_fills_its_cells(name, width, expected):
    assert A.label(name, width) == expected


def test_the_scaling_table_shows_what_the_paper_only_asserts(capsys):
    torch.manual_seed(0)
    A.show_scaling()
    rows = [numbers(line) for line in capsys.readouterr().out.splitlines()[4:10]]
    assert [row[0] for row in rows] == [1, 4, 16, 64, 256, 1024]
    d_k, variance, entropy, gradient, scaled_variance, *scaled = np.array(rows).T
    np.testing.assert_allclose(variance, d_k, rtol=0.1)
    np.testing.assert_allclose(scaled_variance, 1, rtol=0.1)
    assert (np.diff(entropy) < 0).all()
    assert (gradient[3:] < gradient[2:-1]).all()
    assert gradient[-1] < gradient[0] / 3
    for column in scaled:
        np.testing.assert_allclose(column, column[0], rtol=0.15)


def test_the_gradient_of_the_scaling_table_is_autograds():
    e = torch.randn(5, dtype=torch.float64)
    a = e.softmax(dim=0)
    expected = torch.autograd.functional.jacobian(lambda e: e.softmax(dim=0), e)
    torch.testing.assert_close(a.diag_embed() - a.unsqueeze(-1) * a.unsqueeze(-2), expected)


@torch.no_grad()
def test_order_matters_with_positions_only(capsys):
    torch.manual_seed(0)
    A.show_positions()
    without, with_them = (numbers(line)[0] for line in capsys.readouterr().out.splitlines()[2:])
    assert without < 1e-5 < 1e-2 < with_them


@torch.no_grad()
def test_the_mask_table_tells_what_each_function_makes_of_a_mask(capsys):
    A.show_masks()
    lines = capsys.readouterr().out.splitlines()
    assert lines[5:10] == [
        "   1  ██········   1  ██████····   1  ██········",
        "   2  ████······   2  ██████····   2  ████······",
        "   3  ██████····   3  ██████····   3  ██████····",
        "   4  ████████··   4  ██████····   4  ██████····",
        "   5  ██████████   5  ██████····   5  ██████····",
    ]
    found = {line[:34].strip(): line[34:].split() for line in lines[13:18]}
    assert found == {
        "scaled_dot_product_attention, here": ["1.50", "1.00", "2.00", "0.00"],
        "F.scaled_dot_product_attention": ["1.50", "1.00", "2.00", "0.00"],
        "nn.MultiheadAttention": ["nan", "2.00", "1.00", "1.50"],
        "softmax(scores + mask.log()) @ V": ["1.50", "1.00", "2.00", "nan"],
        "softmax(scores + mask) @ V": ["1.50", "1.27", "1.73", "1.50"],
    }


@torch.no_grad()
def test_any_number_of_heads_costs_the_same(capsys):
    A.show_heads()
    rows = [numbers(line) for line in capsys.readouterr().out.splitlines()[3:]]
    T, d = 10, 64
    operations = 2 * T * d * 3 * d + 2 * T * T * d * 2 + 2 * T * d * d
    assert rows == [[h, d / h, 4 * d * d, operations] for h in (1, 2, 4, 8)]


def test_pictures_stand_side_by_side(capsys):
    A.print_pictures(
        ["one", "two"], torch.tensor([[[0, 1], [0.25, 0.5]], [[0.75, 0.1], [1, 0]]]), "ab"
    )
    assert capsys.readouterr().out.splitlines() == [
        "       one       two",
        "       a b       a b",
        "   a  ··██   a  ▓▓··",
        "   b  ░░▒▒   b  ██··",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--lr", "0"],
        ["--explain", ""],
        ["--explain", " \t\n"],
        ["--seed", str(2**63)],
        ["--device", "abacus"],
    ],
)
def test_a_value_that_makes_no_sense_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        A.main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_cannot_be_made_ends_in_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert A.main(["--out", str(tmp_path / "file/out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_reverse_every_unseen_sequence(seed):
    torch.manual_seed(seed)
    model = A.Reverser()
    A.train(model, steps=500, lr=3e-3)
    assert set(A.evaluate(model, count=1000).values()) == {1.0}


@pytest.mark.gpu
def test_it_computes_the_same_on_an_accelerator():
    torch.manual_seed(0)
    heads = A.MultiHeadAttention(64, 4)
    x, mask = torch.randn(2, 9, 64), A.causal_mask(9)
    expected = heads(x, x, x, mask)[0]
    device = torch.accelerator.current_accelerator()
    x, mask = x.to(device), mask.to(device)
    found = heads.to(device)(x, x, x, mask)[0].cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_importing_does_nothing(capsys):
    before = torch.get_rng_state()
    importlib.reload(A)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before)
