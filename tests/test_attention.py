import json
import math
import re
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import attention as A

SCRIPT = Path(A.__file__)
MASKS = ("none", "causal", "padding", "both")
sizes = st.integers(1, 5)
DRAW = (Phase.explicit, Phase.generate)  # so small an example needs no time to shrink


def make_mask(name, B, T, S):
    """Return a mask (B, T, S) or None; the sequences have 1 to S tokens before the padding."""
    causal = A.causal_mask(max(T, S))[:T, :S].expand(B, T, S)
    tokens = (torch.arange(S) <= torch.arange(B).unsqueeze(1) % S).long()
    padding = A.padding_mask(tokens, pad=0).expand(B, T, S)
    return {"none": None, "causal": causal, "padding": padding, "both": causal & padding}[name]


def attend(Q, K, V, mask):
    """Return the output of one head for one sequence."""
    return torch.from_numpy(attention_by_loops(*(x.detach().numpy() for x in (Q, K, V)), mask)[0])


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


def test_each_row_of_scores_becomes_weights_that_sum_to_1():
    Q = torch.tensor([[1.0], [0.0]])
    K = torch.tensor([[1.0], [2.0], [5.0]]).log()  # the scores are log 1, log 2, log 5; and 0, 0, 0
    expected = torch.tensor([[1 / 8, 2 / 8, 5 / 8], [1 / 3, 1 / 3, 1 / 3]])
    for V in (torch.eye(3), torch.tensor([[8.0], [16.0], [24.0]])):
        output, weights = A.scaled_dot_product_attention(Q, K, V)
        torch.testing.assert_close((output, weights), (expected @ V, expected))


def test_scores_are_divided_by_the_root_of_d_k():
    Q = torch.tensor([[1.0] * 4, [0.0] * 4])
    K = torch.tensor([[1.0] * 4, [2.0] * 4, [5.0] * 4]).log() / 2  # QKᵀ is twice what is above
    _, weights = A.scaled_dot_product_attention(Q, K, torch.eye(3))
    torch.testing.assert_close(weights, torch.tensor([[1 / 8, 2 / 8, 5 / 8], [1 / 3] * 3]))


def test_a_masked_key_has_no_weight_and_the_others_sum_to_1():
    Q = torch.tensor([[1.0], [0.0]])
    K = torch.tensor([[1.0], [2.0], [5.0]]).log()
    for mask, expected in (
        ([[True, True, False], [True, True, True]], [[1 / 3, 2 / 3, 0], [1 / 3] * 3]),
        ([[False, False, True], [False] * 3], [[0, 0, 1], [0, 0, 0]]),
    ):
        _, weights = A.scaled_dot_product_attention(Q, K, torch.eye(3), torch.tensor(mask))
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("shift", [30_000.0, -30_000.0])
def test_only_the_differences_of_the_scores_that_are_allowed_matter(shift):
    scores = torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 3.0]], dtype=torch.float64).log()
    scores[1, 1] = 20_000
    scores += torch.tensor([[shift], [-shift]])
    Q, K = scores * math.sqrt(3), torch.eye(3, dtype=torch.float64)  # QKᵀ/√3 are the scores
    some = torch.tensor([[True, True, False], [True, False, True]])
    for mask, expected in (
        (None, [[1 / 8, 2 / 8, 5 / 8], [0, 1, 0]]),
        (some, [[1 / 3, 2 / 3, 0], [1 / 4, 0, 3 / 4]]),
    ):
        _, weights = A.scaled_dot_product_attention(Q, K, K, mask)
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@settings(deadline=None, max_examples=30, phases=DRAW)
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


@settings(deadline=None, max_examples=40, phases=DRAW)
@given(
    name=st.sampled_from(MASKS), batch=st.lists(sizes, max_size=2), T=sizes, S=sizes,
    d_k=sizes, d_v=sizes, seed=st.integers(0, 999),
)  # fmt: skip
def test_values_and_gradients_are_those_of_pytorch(name, batch, T, S, d_k, d_v, seed):
    torch.manual_seed(seed)
    Q, K, V = (
        torch.randn(*batch, *shape, dtype=torch.float64, requires_grad=True)
        for shape in ((T, d_k), (S, d_k), (S, d_v))
    )
    mask = make_mask(name, 1, T, S)
    mask = None if mask is None else mask[0]
    output, weights = A.scaled_dot_product_attention(Q, K, V, mask)
    one_hot = torch.eye(S, dtype=torch.float64).expand(*batch, S, S)  # averaged, they are weights
    theirs = [F.scaled_dot_product_attention(Q, K, values, mask) for values in (V, one_hot)]
    found, expected = (torch.cat(both, dim=-1) for both in ((output, weights), theirs))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, Q, K, V), gradients(expected, Q, K, V))


def test_a_query_that_may_attend_to_nothing_gets_zeros_and_no_nan():
    torch.manual_seed(0)
    Q, K, V = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    with torch.autograd.set_detect_anomaly(True):  # fails where NaN arises on the way back
        output, weights = A.scaled_dot_product_attention(Q, K, V, mask)
        found = gradients(output, Q, K, V)
    assert output[1].eq(0).all()
    assert weights[1].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in found)


def test_no_head_makes_nan_of_an_empty_sequence():
    torch.manual_seed(0)
    heads = A.MultiHeadAttention(8, 2)
    x = torch.randn(2, 3, 8, requires_grad=True)
    mask = A.padding_mask(torch.tensor([[0, 0, 0], [7, 7, 0]]), pad=0)
    output, weights = heads(x, x, x, mask), heads.weights(x, x, x, mask)
    assert output[0].eq(0).all()
    assert weights[0].eq(0).all()
    assert not output[1].eq(0).any()
    for result in (output, weights):
        for gradient in torch.autograd.grad(result.square().sum(), x, retain_graph=True):
            assert gradient.isfinite().all()
    for gradient in gradients(output, *heads.parameters()):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_ten_thousand_make_no_nan(dtype, sign):
    Q = K = 141 * torch.eye(4, dtype=dtype)  # the scores are 141² / √4 = 9940.5 or 0
    Q = (sign * Q).requires_grad_()
    for mask in (None, A.causal_mask(4), torch.zeros(4, 4, dtype=torch.bool)):
        output, weights = A.scaled_dot_product_attention(Q, K, K, mask)
        assert output.dtype == weights.dtype == dtype
        assert output.isfinite().all()
        assert gradients(output, Q)[0].isfinite().all()
        if mask is None:
            assert weights.argmax(dim=-1).tolist() == ([0, 1, 2, 3] if sign > 0 else [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        (((2, 3), (4, 5), (4, 5)), None, r"Q \(2, 3\), K \(4, 5\), V \(4, 5\)"),
        (((2, 3), (4, 3), (5, 3)), None, r"Q \(2, 3\), K \(4, 3\), V \(5, 3\)"),
        (((2, 3), (4, 3), (4, 3)), torch.ones(2, 4), "torch.float32"),
        (((2, 3), (4, 3), (4, 3)), torch.ones(2, 4, dtype=torch.int64), "torch.int64"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, mask, message):
    with pytest.raises(ValueError, match=message):
        A.scaled_dot_product_attention(*(torch.zeros(shape) for shape in shapes), mask)


def test_masks_are_true_where_a_query_may_attend():
    assert A.causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True] * 3]
    tokens = torch.tensor([[5, 9, 9], [9, 5, 0]])
    assert A.padding_mask(tokens, pad=9).tolist() == [[[True, False, False]], [[False, True, True]]]
    assert A.padding_mask(tokens, pad=5).tolist() == [[[False, True, True]], [[True, False, True]]]


def test_masks_of_a_hundred_words_follow_the_same_rule():
    numbers = range(100)
    assert A.causal_mask(100).tolist() == [[j <= i for j in numbers] for i in numbers]
    padding = A.padding_mask(torch.tensor([numbers]), pad=99)
    assert padding.tolist() == [[[number < 99 for number in numbers]]]


def test_masks_are_boolean_and_made_where_they_are_needed():
    tokens = torch.tensor([[5, 9, 9], [9, 5, 0]])
    with torch.device("meta"):  # what is made on no device in particular lands there
        masks = A.padding_mask(tokens, pad=9), A.causal_mask(3, tokens.device)
    for mask in masks:
        assert (mask.dtype, mask.device) == (torch.bool, tokens.device)
    with pytest.raises(RuntimeError, match="nowhere"):
        A.causal_mask(3, "nowhere")


def test_what_each_function_makes_of_a_mask():
    mask = torch.tensor([[[True, True]], [[True, False]], [[False, True]], [[False, False]]])
    Q, K, V = torch.zeros(4, 1, 1), torch.zeros(4, 2, 1), torch.tensor([[[1.0], [2.0]]] * 4)
    theirs = nn.MultiheadAttention(1, 1, bias=False, batch_first=True)
    for parameter in theirs.parameters():
        nn.init.ones_(parameter)
    found = {
        "ours": A.scaled_dot_product_attention(Q, K, V, mask)[0],
        "F.scaled_dot_product_attention": F.scaled_dot_product_attention(Q, K, V, mask),
        "nn.MultiheadAttention": theirs(Q, K, V, attn_mask=mask)[0],
        "the same without weights": theirs(Q, K, V, attn_mask=mask, need_weights=False)[0],
        "softmax(scores + mask.log())": (Q @ K.mT + mask.float().log()).softmax(dim=-1) @ V,
        "softmax(scores + mask)": (Q @ K.mT + mask.float()).softmax(dim=-1) @ V,
    }
    assert {name: [f"{x:.2f}" for x in output.flatten()] for name, output in found.items()} == {
        "ours": ["1.50", "1.00", "2.00", "0.00"],
        "F.scaled_dot_product_attention": ["1.50", "1.00", "2.00", "0.00"],
        "nn.MultiheadAttention": ["nan", "2.00", "1.00", "1.50"],
        "the same without weights": ["0.00", "2.00", "1.00", "1.50"],
        "softmax(scores + mask.log())": ["1.50", "1.00", "2.00", "nan"],
        "softmax(scores + mask)": ["1.50", "1.27", "1.73", "1.50"],
    }


@pytest.mark.parametrize(("T", "d_model"), [(3, 4), (50, 6), (50, 7), (1, 1), (300, 64)])
def test_positional_encoding_is_that_of_section_3_5(T, d_model):
    expected = np.zeros((T, d_model))
    for pos in range(T):
        for n in range(d_model):
            angle = pos / 10_000 ** (2 * (n // 2) / d_model)
            expected[pos, n] = math.cos(angle) if n % 2 else math.sin(angle)
    found = A.positional_encoding(T, d_model)
    # Angles are up to T radians, in float32.
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-7 * T)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("num_heads", [3, 4, 1])
def test_each_head_gets_its_part_of_the_projections(num_heads):
    torch.manual_seed(0)
    heads = A.MultiHeadAttention(12, num_heads).double()
    three = [torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5)]
    *found, mask = heads.split_heads(*three, None)
    assert mask is None
    projections = heads.W_q.weight, heads.W_k.weight, heads.W_v.weight
    for Q, x, W in zip(found, three, projections, strict=True):
        parts = [x @ part.T for part in W.chunk(num_heads)]  # each (2, n, d_k)
        expected = torch.stack(parts, dim=1)
        torch.testing.assert_close(Q, expected)
        torch.testing.assert_close(gradients(Q, x, W), gradients(expected, x, W))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 1, 5), (2, 4, 3, 5), (1, 1, 3, 5)])
def test_each_head_of_each_sequence_gets_its_mask(shape):
    torch.manual_seed(0)
    heads = A.MultiHeadAttention(12, 4).double()
    query, key, value = (torch.randn(2, n, 12, dtype=torch.float64) for n in (3, 5, 5))
    mask = torch.rand(shape) < 0.6
    Q, K, V, split = heads.split_heads(query, key, value, mask)
    expected = mask.view(2, 1, *shape[1:]) if len(shape) == 3 else mask
    assert split.tolist() == expected.tolist()
    masks = expected.expand(2, 4, 3, 5)
    output = torch.zeros_like(query)
    for b in range(2):
        for h in range(4):
            place = slice(3 * h, 3 * h + 3)
            output[b, :, place] = attend(Q[b, h], K[b, h], V[b, h], masks[b, h])
    torch.testing.assert_close(heads(query, key, value, mask), heads.W_o(output))


def test_many_heads_are_single_heads_side_by_side():
    torch.manual_seed(0)
    B, T, d_model, num_heads, d_k = 2, 5, 12, 3, 4
    heads = A.MultiHeadAttention(d_model, num_heads).double()
    x = torch.randn(B, T, d_model, dtype=torch.float64, requires_grad=True)
    outputs, weights = [], []
    for n in range(num_heads):
        head = A.SelfAttention(d_model, d_k).double()
        rows = slice(n * d_k, (n + 1) * d_k)
        head.load_state_dict(
            {f"{W}.weight": heads.get_submodule(W).weight[rows] for W in ("W_q", "W_k", "W_v")}
        )
        output, weight = head(x)
        outputs.append(output)
        weights.append(weight)
    expected = heads.W_o(torch.cat(outputs, dim=-1))
    output = heads(x, x, x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(heads.weights(x, x, x), torch.stack(weights, dim=1))
    torch.testing.assert_close(gradients(output, x), gradients(expected, x))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention_computes_what_pytorch_computes(name, cross):
    torch.manual_seed(0)
    B, T, S, d_model, num_heads = 3, 4, 6 if cross else 4, 8, 2
    ours = A.MultiHeadAttention(d_model, num_heads).double()
    theirs = nn.MultiheadAttention(d_model, num_heads, bias=False, batch_first=True).double()
    three = (ours.W_q.weight, ours.W_k.weight, ours.W_v.weight)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat(three))
        theirs.out_proj.weight.copy_(ours.W_o.weight)
    query = torch.randn(B, T, d_model, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(B, S, d_model, dtype=torch.float64, requires_grad=True) if cross else query
    mask = make_mask(name, B, T, S)
    # nn.MultiheadAttention wants a mask for each head, and True where it may not attend.
    forbidden = None if mask is None else ~mask.repeat_interleave(num_heads, dim=0)
    expected, expected_weights = theirs(
        query, memory, memory, attn_mask=forbidden, average_attn_weights=False
    )
    output = ours(query, memory, memory, mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ours.weights(query, memory, memory, mask), expected_weights)
    inputs = (query, memory) if cross else (query,)
    *found, W_q, W_k, W_v, W_o = gradients(output, *inputs, *three, ours.W_o.weight)
    expected = gradients(expected, *inputs, theirs.in_proj_weight, theirs.out_proj.weight)
    torch.testing.assert_close((*found, torch.cat((W_q, W_k, W_v)), W_o), expected)


@pytest.mark.parametrize(("d_model", "num_heads"), [(10, 3), (8, 16)])
def test_heads_that_do_not_divide_the_features_are_refused(d_model, num_heads):
    with pytest.raises(ValueError, match=rf"d_model {d_model} .* num_heads {num_heads}"):
        A.MultiHeadAttention(d_model, num_heads)


@pytest.mark.parametrize("method", ["forward", "weights"])
def test_a_mask_of_numbers_or_for_other_words_is_refused(method):
    attend = getattr(A.MultiHeadAttention(8, 2), method)
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="mask must be bool"):
        attend(x, x, x, torch.zeros(3, 3))
    for shape in ((3, 2), (3, 3, 3), (2, 3, 3, 3)):
        with pytest.raises(RuntimeError, match="size"):
            attend(x, x, x, torch.ones(shape, dtype=torch.bool))


def test_what_is_masked_changes_nothing():
    torch.manual_seed(0)
    heads = A.MultiHeadAttention(8, 2)
    x = torch.randn(2, 5, 8)
    changed = torch.cat((x[:, :3], torch.randn(2, 2, 8)), dim=1)
    future, padding = A.causal_mask(5), A.padding_mask(torch.tensor([[1, 1, 1, 0, 0]] * 2), pad=0)
    for mask in (future, padding, future & padding):
        before, after = (heads(y, y, y, mask) for y in (x, changed))
        assert torch.equal(before[:, :3], after[:, :3])
        assert not torch.equal(before[:, 3:], after[:, 3:])


def test_the_pair_finder_has_the_shapes_and_the_parameters_it_says():
    model, digits = A.PairFinder(num_heads=2), torch.zeros(3, A.LENGTH, dtype=torch.int64)
    assert model(digits).shape == (3, A.LENGTH, 2, 10)
    assert model.weights(digits).shape == (3, 2, A.LENGTH, A.LENGTH)
    expected = 10 * 64 + 4 * 64 * 64 + 2 * 64 + 64 * 20 + 20
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_pair_finder_normalizes_the_sum_of_words_and_attention():
    torch.manual_seed(0)
    model, digits = A.PairFinder(num_heads=2).double(), torch.randint(10, (3, A.LENGTH))
    for parameter in model.norm.parameters():
        nn.init.normal_(parameter)
    x = model.embed(digits)
    total = (x + model.attention(x, x, x)).detach().numpy()
    p = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    mean, variance = total.mean(axis=-1, keepdims=True), total.var(axis=-1, keepdims=True)
    normalized = (total - mean) / np.sqrt(variance + 1e-5) * p["norm.weight"] + p["norm.bias"]
    expected = normalized @ p["to_logits.weight"].T + p["to_logits.bias"]
    found = model(digits).detach().numpy()
    np.testing.assert_allclose(found, expected.reshape(3, A.LENGTH, 2, 10), atol=1e-12)


def test_every_parameter_of_the_pair_finder_learns():
    torch.manual_seed(0)
    model, digits = A.PairFinder(num_heads=2, d_model=4).double(), torch.randint(10, (2, A.LENGTH))
    names, parameters = zip(*model.named_parameters(), strict=True)

    def logits(*parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, named, digits)

    assert torch.autograd.gradcheck(logits, parameters, fast_mode=True)


def test_without_positions_the_pair_finder_cannot_tell_places():
    torch.manual_seed(0)
    model, digits = A.PairFinder(num_heads=2), torch.randint(10, (4, A.LENGTH))
    order = torch.randperm(A.LENGTH)
    assert not torch.allclose(model(digits[:, order]), model(digits)[:, order], atol=1e-3)
    model.positions.zero_()
    torch.testing.assert_close(model(digits[:, order]), model(digits)[:, order])


@pytest.mark.parametrize("unseen", [False, True])
def test_the_labels_are_mirror_and_left_neighbor_and_the_splits_are_disjoint(unseen):
    torch.manual_seed(0)
    digits, labels = A.sample_sequences(500, unseen)
    assert (digits.shape, labels.shape) == ((500, A.LENGTH), (500, A.LENGTH, 2))
    for row, pairs in zip(digits.tolist(), labels.tolist(), strict=True):
        assert pairs == [[row[-1 - i], row[i - 1]] for i in range(A.LENGTH)]
        assert (sum(row) % 10 == 0) == unseen
    for place in digits.T:
        assert set(place.tolist()) == set(range(10))


def test_training_sees_no_unseen_sequence_and_evaluation_sees_no_other():
    class Watched(A.PairFinder):
        def forward(self, digits):
            remainders.extend((digits.sum(dim=1) % 10).tolist())
            return super().forward(digits)

    remainders = []
    model = Watched(num_heads=1)
    A.train(model, steps=2)
    assert (len(remainders), set(remainders)) == (2 * A.BATCH_SIZE, set(range(1, 10)))
    remainders.clear()
    A.share_exact(model, count=50)
    assert remainders == [0] * 50


def test_two_heads_learn_what_one_head_cannot():
    losses = []
    for num_heads in (1, 2):
        torch.manual_seed(0)
        losses.append(A.train(A.PairFinder(num_heads), steps=150))
    one, two = ([np.mean(part) for part in (run[:10], run[-10:])] for run in losses)
    assert (len(losses[0]), len(losses[1])) == (150, 150)
    assert one[1] < one[0] - 1
    assert two[1] < one[1] / 2


def test_the_same_seed_gives_the_same_network():
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results, model = A.compare(2, "cpu")
        runs.append((results, *(parameter.tolist() for parameter in model.parameters())))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_loss_that_is_no_number_stops_the_training():
    model = A.PairFinder(1)
    nn.init.constant_(model.to_logits.bias, math.nan)
    with pytest.raises(FloatingPointError, match="nan"):
        A.train(model, steps=3)


class Copier(nn.Module):
    """Knows the labels, but gets a digit wrong where the sequence begins with 0, 1 or 2.

    In training mode it knows nothing.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.first = []

    def forward(self, digits):
        assert not torch.is_grad_enabled()
        first = digits[:, 0]
        self.first += first.tolist()
        found = torch.stack((digits.flip(1), digits.roll(1, dims=1)), dim=-1)
        for start, (position, label) in enumerate([(0, 0), (8, 1), (9, 1)]):
            found[:, position, label] += (first == start) | self.training
        return F.one_hot(found % 10, 10).float()


@pytest.mark.parametrize("count", [200, 7])
def test_share_exact_counts_whole_sequences(count):
    torch.manual_seed(0)
    model = Copier()
    share = A.share_exact(model, count)
    exact = sum(digit >= 3 for digit in model.first)
    assert isinstance(share, float)
    assert share == pytest.approx(exact / count)
    assert len(model.first) == count
    assert 0 < exact < count


def test_the_digits_go_to_the_device_of_the_network():
    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))  # without numbers

        def forward(self, digits):
            raise LookupError(digits.device)

    with pytest.raises(LookupError, match="meta"):
        A.share_exact(Far(), count=3)


FORMULAS = (
    "x ", "W_q ", "W_k ", "W_v ", "Q = x W_q ", "K = x W_k ", "V = x W_v ",
    "QKᵀ ", "QKᵀ/√d_k ", "softmax(QKᵀ/√d_k) ", "softmax(QKᵀ/√d_k)V ",
)  # fmt: skip


def walk(capsys, words):
    """Return the blocks that show_walk prints, and their numbers, without names and pictures."""
    torch.manual_seed(0)
    A.show_walk(words)
    blocks = capsys.readouterr().out.strip().split("\n\n")
    rows = [[re.findall(r"(?<= )-?\d+\.\d\d", line) for line in b.split("\n")[3:]] for b in blocks]
    return blocks, [np.array(matrix, dtype=float) for matrix in rows]


def test_the_walk_follows_the_formula(capsys):
    blocks, matrices = walk(capsys, ["the", "cat", "sees", "the", "dog"])
    assert all(block.startswith(formula) for block, formula in zip(blocks, FORMULAS, strict=True))
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
    "sentence", ["one", "a\x1b[31mred \u202eabc \ud800", "long" * 9, "x " * 10]
)
def test_every_sentence_keeps_the_walk_in_shape(sentence, capsys):
    assert A.main(["--explain", sentence]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("name", "text"), [("cat", "   cat"), ("kitten", "kitten"), ("kittens", "kitte…")]
)
def test_a_label_has_its_width(name, text):
    assert A.label(name, 6) == text


def test_a_joiner_stays_in_its_word():
    assert A.split_words("a\u200cb \u202ec\u00add") == ["a\u200cb", "?c?d"]


def test_an_accent_makes_the_same_word_however_it_is_typed(capsys):
    assert A.main(["--explain", "e\u0301 \u00e9"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[0].strip().split("\n")[3:]
    assert first == second


def test_the_scaling_table_shows_what_the_paper_only_asserts(capsys):
    torch.manual_seed(0)
    A.show_scaling()
    lines = capsys.readouterr().out.splitlines()[4:8]
    rows = np.array([line.split() for line in lines], dtype=float)
    d_k, variance, largest, gradient, scaled_variance, *scaled = rows.T
    assert d_k.tolist() == [16, 64, 256, 1024]
    np.testing.assert_allclose(variance, d_k, rtol=0.1)
    np.testing.assert_allclose(scaled_variance, 1, rtol=0.1)
    assert (np.diff(largest) > 0).all()
    assert (np.diff(gradient) < 0).all()
    assert gradient[-1] < gradient[0] / 3
    for column in scaled:
        np.testing.assert_allclose(column, column[0], rtol=0.1)
    torch.manual_seed(0)  # the first row again, with the derivatives that autograd finds
    Q, K = torch.randn(2, 200, 16, 16)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda scores: scores.softmax(dim=0)))(
        (Q @ K.mT).flatten(0, 1)
    )
    assert abs(jacobians.flatten(1).norm(dim=1).mean().item() - gradient[0]) < 0.001


def test_the_masks_are_drawn(capsys):
    A.show_masks()
    assert capsys.readouterr().out.splitlines()[5:] == [
        "   1  ██········   1  ██████····   1  ██········",
        "   2  ████······   2  ██████····   2  ████······",
        "   3  ██████····   3  ██████····   3  ██████····",
        "   4  ████████··   4  ██████····   4  ██████····",
        "   5  ██████████   5  ██████····   5  ██████····",
    ]


def test_it_says_where_the_heads_look(capsys):
    mirror, left = torch.eye(A.LENGTH).flip(1), torch.eye(A.LENGTH).roll(-1, dims=1)
    weights = torch.stack((mirror, 0.5 * left)).expand(3, 2, A.LENGTH, A.LENGTH)
    A.show_heads({"two heads": (0.25, 0.5)}, "0123456789", weights)
    out = capsys.readouterr().out
    assert re.search(r"\ntwo heads +0\.2500 +50\.0%\n", out)
    # The mirror image of the first and of the sixth digit is its left neighbor, too.
    assert "Head 1 puts 100% of its weight on the mirror image, 20% on the left neighbor." in out
    assert "Head 2 puts 10% of its weight on the mirror image, 50% on the left neighbor." in out
    rows = {0: "0  ··················██   0  ··················▒▒"}
    rows[9] = "9  ██··················   9  ················▒▒··"
    for row in rows.values():
        assert f"\n   {row}\n" in out


def test_it_runs_end_to_end_and_saves_what_it_says(run_script, tmp_path):
    out = tmp_path / "out"
    done = run_script("attention.py", "--steps", 2, "--device", "cpu", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    titles = (*FORMULAS, "Why √d_k: ", "Masks: ", "Why positions and many heads: ")
    places = [done.stdout.index(f"\n{title}") for title in titles]
    assert places == sorted(places)
    files = ["attention.png", "metrics.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == files
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["settings"]["steps"] == 2
    assert list(metrics["results"]) == ["two heads, no positions", "one head", "two heads"]
    for name, (loss, exact) in metrics["results"].items():
        assert re.search(rf"^{name} +{loss:.4f} +{exact:.1%}$", done.stdout, re.MULTILINE)
    assert f"\nSaved in {out} after " in done.stdout
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    A.PairFinder(2).load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))


def test_explain_only_walks(tmp_path, capsys):
    arguments = ["--explain", "word " * A.MAX_WORDS, "--seed", str(2**63 - 1)]
    assert A.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert ("\nx   (T, d) = (10, 6)\n" in out, "Why" in out) == (True, False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--steps", "10000000000000000000"),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--explain", " \t\n"),
        ("--explain", "word " * (A.MAX_WORDS + 1)),
        ("--out", "\x1b[31mred"),
        ("--device", "abacus"),
        ("--device", "hpu"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        A.main([f"{option}={value}"])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert f"error: argument {option}: " in err.splitlines()[-1]
    assert out == ""


def test_a_folder_that_cannot_be_made_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert A.main(["--out", str(tmp_path / "file/out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Not a directory" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_leaves_no_traceback(monkeypatch, tmp_path, capsys):
    with suppress(OSError), open("/dev/full", "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        status = A.main(["--steps", "1", "--out", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert (status, "No space left on device" in line) == (1, True)


def test_a_loss_that_is_no_number_ends_in_one_line_and_saves_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(A, "LEARNING_RATE", 1e38)
    assert A.main(["--steps", "5", "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r": the loss became (nan|inf)$", line)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module", params=[0, 1, 2], ids="seed {}".format)
def trained(request):
    """Return what `compare` does after the script's own number of steps."""
    torch.manual_seed(request.param)
    return A.compare(500, "cpu")


@pytest.mark.slow
def test_only_two_heads_with_positions_solve_the_task(trained):
    exact = {name: share for name, (_, share) in trained[0].items()}
    assert exact["two heads"] >= 0.995
    assert exact["one head"] < 0.05
    assert exact["two heads, no positions"] < 0.05


@pytest.mark.slow
def test_the_heads_look_where_the_task_is(trained):
    torch.manual_seed(0)
    digits, _ = A.sample_sequences(1000, unseen=True)
    weights = trained[1].weights(digits).mean(dim=0)
    mirror, left = list(range(A.LENGTH))[::-1], [A.LENGTH - 1, *range(A.LENGTH - 1)]
    assert sorted(weights.argmax(dim=-1).tolist()) == [left, mirror]
    assert weights.amax(dim=-1).mean() > 0.5


@pytest.mark.gpu
def test_it_computes_the_same_on_an_accelerator():
    torch.manual_seed(0)
    heads = A.MultiHeadAttention(64, 4)
    x, mask = torch.randn(2, 9, 64), A.causal_mask(9)
    expected = heads(x, x, x, mask), heads.weights(x, x, x, mask)
    device = torch.accelerator.current_accelerator()
    heads, x, mask = heads.to(device), x.to(device), A.causal_mask(9, device)
    assert mask.device.type == A.padding_mask(x[0].long(), 0).device.type == device.type
    found = heads(x, x, x, mask).cpu(), heads.weights(x, x, x, mask).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_it_trains_on_an_accelerator(run_script, tmp_path):
    done = run_script("attention.py", "--steps", 2, "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    device = json.loads((tmp_path / "metrics.json").read_text())["settings"]["device"]
    assert device == str(torch.accelerator.current_accelerator())
