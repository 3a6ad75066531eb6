import copy
import math
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import attention
import explorer.switches as S
import gpt
import transformer
from decoding.sampling import Sampling, draw_token
from decoding.search import beam_search
from inputs.dates import sample_dates, share_exact, split_days
from make_models import MODELS

WORDS = ["the", "cat", "sees", "the", "dog"]
PAIRS = sample_dates(split_days()[2][:20], Random(2))
VOCABULARY = transformer.make_vocabulary(PAIRS)


@pytest.fixture(scope="module")
def model():
    """A network that is not trained, whose answers differ by date and by step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformer.Transformer(4 + len(VOCABULARY), transformer.Sizes())
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter)
        network.positions.mul_(10)
    return network.eval()


@pytest.fixture(scope="module")
def source():
    """Some dates, padded."""
    rows = [transformer.encode(text, VOCABULARY) for text, _ in PAIRS[:4]]
    return pad_sequence(rows, batch_first=True, padding_value=transformer.PAD)


def draw(T=5, d_k=4):
    return torch.randn(3, T, d_k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_sentence_is_that_of_the_lesson(capsys):
    torch.manual_seed(0)
    attention.show_walk(WORDS)
    blocks = {block.split()[0]: block for block in capsys.readouterr().out.split("\n\n")}
    x, head = S.draw_sentence(WORDS, 4)
    printed = [[float(n) for n in line.split()[1:]] for line in blocks["Q"].splitlines()[3:]]
    torch.testing.assert_close(torch.tensor(printed), head.W_q(x), atol=0.0051, rtol=0)


def test_drawing_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    S.draw_sentence(WORDS, 4)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        ("none", torch.ones(5, 5).bool()),
        ("causal", torch.ones(5, 5).bool().tril()),
        ("padding: the last word", torch.tensor([True] * 4 + [False]).expand(5, 5)),
    ],
)
def test_what_is_right_is_what_pytorch_computes(mask, allowed):
    Q, K, V = draw()
    steps = S.attend(Q, K, V, mask=mask)
    torch.testing.assert_close(steps.output, F.scaled_dot_product_attention(Q, K, V, allowed))
    torch.testing.assert_close(steps.scaled.softmax(dim=1), steps.weights)
    assert S.name_faults(steps.weights, mask) == []


def test_every_switch_does_what_it_says():
    Q, K, V = draw(d_k=1024)
    unscaled = S.attend(Q, K, V, scaled=False)
    torch.testing.assert_close(unscaled.weights, (Q @ K.T).softmax(dim=1))
    scaled = S.attend(Q, K, V)
    assert unscaled.weights.amax(dim=1).mean() > 0.9 > scaled.weights.amax(dim=1).mean()
    columns = S.attend(Q, K, V, by_row=False)
    torch.testing.assert_close(columns.weights, (Q @ K.T / 32).softmax(dim=0))
    torch.testing.assert_close(columns.output, columns.weights @ V)


def test_what_is_wrong_is_named():
    Q, K, V = draw()
    by_column = S.attend(Q, K, V, by_row=False)
    assert "don't add up to 1" in S.name_faults(by_column.weights, "none")[0]
    swapped, added = (S.attend(Q, K, V, mask=mask) for mask in S.WRONG_MASKS)
    assert swapped.weights[:4].tril().count_nonzero() == 0
    assert swapped.weights[4].isnan().all()
    faults = S.name_faults(swapped.weights, S.WRONG_MASKS[0])
    assert faults[0].startswith("NaN in row 5") and "row 1 gives 100% to later" in faults[1]
    torch.testing.assert_close(added.scaled, Q @ K.T / 2 + torch.ones(5, 5).tril())
    future = added.weights.triu(1).sum(dim=1)
    (fault,) = S.name_faults(added.weights, S.WRONG_MASKS[1])
    assert f"row {int(future.argmax()) + 1} gives {future.max():.0%} to later words" in fault


@pytest.mark.parametrize("seed", [1, 5])
def test_only_positions_tell_the_order_of_words(seed):
    order, before, after = S.shuffle(WORDS, seed, positions=False)
    assert sorted(order) == [*range(5)] != order
    torch.testing.assert_close(before, after)
    _, before, after = S.shuffle(WORDS, seed, positions=True)
    assert (before - after).abs().max() > 0.1


def without_rows(heads, head):
    """The same, with the rows of W_o that belong to a head set to 0."""
    d_k = heads.W_o.in_features // heads.num_heads
    with torch.no_grad():
        heads.W_o.weight[:, head * d_k : (head + 1) * d_k] = 0


def test_a_removed_head_adds_nothing():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    ours, expected = attention.MultiHeadAttention(8, 2), attention.MultiHeadAttention(8, 2)
    expected.load_state_dict(ours.state_dict())
    S.remove_head(ours.W_o, ours.num_heads, 1)
    without_rows(expected, 1)
    torch.testing.assert_close(ours(x, x, x), expected(x, x, x))


def test_pairs_are_scored_as_attention_scores_them():
    torch.manual_seed(0)
    model = attention.PairFinder(2)
    attention.train(model, 200)
    weights, digits, shares = S.score_pairs(model, None)
    torch.manual_seed(0)
    assert shares[0].item() == pytest.approx(attention.share_exact(model), abs=1e-6)
    assert shares[1:].mean() > 0.5
    torch.testing.assert_close(
        weights, model.weights(torch.tensor([[int(digit) for digit in digits]]))[0]
    )
    for head in range(2):
        _, _, left = S.score_pairs(model, head)
        assert left[1:].mean() < shares[1:].mean() - 0.1
    torch.testing.assert_close(S.score_pairs(model, None)[2], shares)  # the model is as it was


def test_every_head_has_a_name(model):
    names = S.name_heads(model)
    assert len(names) == 2 * 4 + 2 * 2 * 4
    assert names["decoder layer 2, cross attention, head 2"] == ("decoder.1.cross_attention", 1)


def test_each_part_matters_and_the_model_stays_as_it_was(model, source):
    target = torch.tensor([[1, 5, 6, 7]] * 4)
    with torch.inference_mode():
        expected = model(source, target)
        torch.testing.assert_close(S.switch_off(model, ())(source, target), expected)
        for part in S.PARTS:
            assert (S.switch_off(model, [part])(source, target) - expected).abs().max() > 1e-3, part
        for head in S.name_heads(model).values():
            assert (S.switch_off(model, (), head)(source, target) - expected).abs().max() > 1e-4
        torch.testing.assert_close(model(source, target), expected)


def test_without_positions_the_encoder_forgets_the_order(model, source):
    order = torch.randperm(source.shape[1], generator=torch.Generator().manual_seed(0))
    blind = S.switch_off(model, ["positions"])
    with torch.inference_mode():
        torch.testing.assert_close(blind.encode(source[:, order]), blind.encode(source)[:, order])


def test_without_the_causal_mask_the_future_is_seen(model, source):
    targets = torch.tensor([[[1, 5, 6]], [[1, 5, 9]]])
    with torch.inference_mode():
        for off, seen in (((), False), (["causal mask"], True)):
            one, other = (S.switch_off(model, off)(source[:1], target) for target in targets)
            assert (not torch.allclose(one[:, :2], other[:, :2])) == seen


def test_without_the_memory_mask_padding_is_seen(model, source):
    assert (source[0] == transformer.PAD).any()
    for off, most in (((), 0), (["padding mask"], 1)):
        changed = S.switch_off(model, off)
        weights = transformer.look_inside(changed, source[:1], torch.tensor([[1, 5]]))
        padding = weights["decoder.0.cross_attention"][..., source[0] == transformer.PAD]
        assert (padding.max() > 0) == bool(most)


def test_without_its_factor_the_embedding_is_smaller(model, source):
    plain = S.switch_off(model, ["times √d_model", "positions"]).embed(source)
    torch.testing.assert_close(plain, model.embedding(source))


def test_writing_slowly_writes_the_same(model, source):
    tokens, probabilities = S.write_slowly(model, source)
    found = [S.spell(row, VOCABULARY) for row in tokens.tolist()]
    expected = [S.spell(row, VOCABULARY)[:12] for row in transformer.generate(model, source)]
    assert found == [text[:12] for text in expected] and len({*found}) > 1
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(4, 12))
    assert torch.equal(probabilities.argmax(dim=-1), tokens)


def test_the_share_is_that_of_reading(model, monkeypatch):
    texts = [text for text, _ in PAIRS]
    found = [text[:12] for text in transformer.read(model, VOCABULARY, texts)]
    right = [(text, guess) for text, guess in zip(texts, found, strict=True)]
    half = right[:10] + PAIRS[10:]
    assert S.score_dates(model, VOCABULARY, half) == share_exact(half, found) == 0.5


@pytest.mark.parametrize(("beam", "alpha"), [(1, 0.0), (3, 0.6), (4, 2.0)])
def test_the_tree_is_that_of_the_search(model, source, beam, alpha):
    model = copy.deepcopy(model)
    model.embedding.weight.data *= 0.02  # less sure of each token, so that the search goes on
    one = source[:1, : int((source[0] != transformer.PAD).sum())]
    found, steps = S.watch_beam(model, one, beam, alpha)
    assert [found] == beam_search(model, one, beam, alpha)
    best = max((branch for step in steps for branch in step), key=lambda branch: branch.score)
    assert list(best.tokens) == found
    assert len(steps[0]) == 1 and all(len(step) == beam for step in steps[1:])
    for step, before in zip(steps[1:], steps, strict=False):
        assert {branch.tokens[:-1] for branch in step} <= {branch.tokens for branch in before}
    branch = steps[-1][-1]
    n = len(branch.tokens)
    target = torch.tensor([[transformer.BOS, *branch.tokens, transformer.EOS]])
    with torch.inference_mode():
        log_p = model(one, target[:, :-1]).log_softmax(dim=-1)
    each = log_p[0, range(n + 1), target[0, 1:]]
    assert branch.log_p == pytest.approx(each[:n].sum().item(), abs=1e-4)
    assert branch.ended == pytest.approx(each.sum().item(), abs=1e-4)
    assert branch.score == pytest.approx(branch.ended / math.pow((5 + n + 1) / 6, alpha), rel=1e-5)


def test_tokens_are_spelled():
    vocabulary = {"a": 4, "b": 5}
    assert S.spell([4, 5, 3, transformer.EOS, 4], vocabulary) == "ab?"
    assert [S.letter(token, vocabulary) for token in (0, 1, 2, 3, 4)] == [
        "pad", "start", "end", "?", "a",
    ]  # fmt: skip


TOKENS = [0, 7, 200, 31, 31, 90, 7]


@pytest.fixture(scope="module")
def language_model():
    """A network of two layers, with four heads of queries and two of keys, and its texts."""
    return gpt.open_model(MODELS / "llama-tied")


def norm(x, weight, epsilon):
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


def turn(x, theta):
    """Rotate x (H, T, d_k) by complex numbers; a base of 0 stands for no rotation."""
    T, half = x.shape[1], x.shape[2] // 2
    frequency = theta ** -(torch.arange(half).double() / half) if theta else torch.zeros(half)
    angle = torch.arange(T).double().outer(frequency.double())
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def by_formula(model, theta=10_000.0, mask=None, head=None):
    """The logits (T, V) after each of TOKENS, head by head, in float64.

    `mask` (T, T) is causal by default; `head`, a layer and a number, contributes nothing.
    """
    W = {name: tensor.double() for name, tensor in model.state_dict().items()}
    sizes = model.sizes
    T = len(TOKENS)
    mask = torch.ones(T, T).tril() if mask is None else mask
    x = W["embedding.weight"][TOKENS]
    for n in range(sizes.num_layers):
        y = norm(x, W[f"layers.{n}.norm1.weight"], sizes.epsilon)
        Q, K, V = (
            (y @ W[f"layers.{n}.attention.W_{name}.weight"].T)
            .view(T, -1, sizes.d_k)
            .transpose(0, 1)
            for name in "qkv"
        )
        Q = turn(Q, theta)
        K = turn(K, theta)
        outputs = []
        for h in range(sizes.num_heads):
            kv = h * sizes.num_kv_heads // sizes.num_heads
            scores = Q[h] @ K[kv].T / math.sqrt(sizes.d_k)
            weights = scores.masked_fill(mask == 0, -math.inf).softmax(dim=1)
            outputs.append(weights @ V[kv] * ((n, h) != head))
        x = x + torch.cat(outputs, dim=1) @ W[f"layers.{n}.attention.W_o.weight"].T
        y = norm(x, W[f"layers.{n}.norm2.weight"], sizes.epsilon)
        gate, up, down = (
            W[f"layers.{n}.feed_forward.W_{name}.weight"] for name in ("gate", "up", "down")
        )
        x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return norm(x, W["norm.weight"], sizes.epsilon) @ W["to_logits.weight"].T


@pytest.mark.parametrize(
    ("switched", "formula"),
    [
        ({}, {}),
        ({"off": ["positions"]}, {"theta": 0}),
        ({"off": ["causal mask"]}, {"mask": torch.ones(7, 7)}),
        ({"theta": 100.0}, {"theta": 100.0}),
        ({"head": (0, 2)}, {"head": (0, 2)}),
        ({"head": (1, 1)}, {"head": (1, 1)}),
        (
            {"off": S.GPT_PARTS, "head": (1, 3)},
            {"theta": 0, "mask": torch.ones(7, 7), "head": (1, 3)},
        ),
    ],
)
def test_each_switch_of_a_language_model_does_what_the_formula_says(
    language_model, switched, formula
):
    model, _ = language_model
    bits = S.predict_each(S.change_gpt(model, **switched), TOKENS)
    expected = by_formula(model, **formula).log_softmax(dim=-1) / -math.log(2)
    torch.testing.assert_close(bits.double(), expected, atol=1e-4, rtol=1e-4)
    if switched:
        assert (bits - S.predict_each(model, TOKENS)).abs().max() > 0.01


def test_a_changed_language_model_takes_no_memory_for_weights(language_model):
    model, _ = language_model
    changed = S.change_gpt(model, S.GPT_PARTS, 7.0, (0, 0))
    assert changed is not model and model.sizes.theta == 10_000
    for mine, theirs in zip(model.parameters(), changed.parameters(), strict=True):
        assert mine is theirs


def test_the_bits_are_those_that_the_script_measures(language_model):
    model, _ = language_model
    bits = S.count_bits(S.predict_each(model, TOKENS), TOKENS)
    expected = gpt.measure_bits(model, [torch.tensor(TOKENS)])
    torch.testing.assert_close(bits.double(), expected)


def test_rivals_are_the_cheapest_and_what_was_there():
    bits = torch.tensor([5.0, 1.0, 3.0, 2.0])
    assert S.find_rivals(bits, 3, count=2) == [1, 3]
    assert S.find_rivals(bits, 0, count=2) == [1, 3, 0]
    assert S.find_rivals(bits, 0, count=9) == [1, 3, 2, 0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.3, 0.2]),
        (Sampling(temperature=0.5), [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        (Sampling(temperature=0), [1, 0, 0]),
        (Sampling(top_k=2), [0.625, 0.375, 0]),
        (Sampling(top_p=0.4), [1, 0, 0]),
        (Sampling(top_p=0.7), [0.625, 0.375, 0]),
        (Sampling(temperature=0.5, top_k=2, top_p=0.7), [1, 0, 0]),
    ],
)
def test_a_token_is_drawn_from_the_probabilities_shown(sampling, expected):
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log() + 7
    found = S.sampled_from(logits, sampling)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    for seed in range(20):
        one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        drawn = draw_token(logits, sampling, one)
        assert drawn == torch.multinomial(found, 1, generator=other)


def test_a_text_goes_on_step_by_step_with_the_same_random_numbers(language_model):
    model, texts = language_model
    model = S.change_gpt(model, ["positions"], head=(1, 0))
    sampling = Sampling(temperature=1.5, top_k=50)
    generator = torch.Generator().manual_seed(3)
    tokens = [*TOKENS]
    for _ in range(12):
        logits = -S.predict_each(model, tokens)[-1].double() * math.log(2)
        probabilities = S.sampled_from(logits, sampling)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    written = S.continue_text(model, texts, TOKENS, sampling, 3, limit=12)
    assert written == tokens[len(TOKENS) :]
    ending = replace(texts, ends=frozenset({written[4]}))
    until = written.index(written[4])
    assert S.continue_text(model, ending, TOKENS, sampling, 3, limit=12) == written[:until]
    assert S.continue_text(model, texts, TOKENS * 9, sampling, 3, limit=12)[1:] == []  # 64 at most
