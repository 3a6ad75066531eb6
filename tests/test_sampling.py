"""Sampling: which tokens may be drawn, and that neither cache nor neighbors change any."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import decoding.sampling as S
import gpt as G
from inputs.documents import MARK_ID, learn_tokenizer
from make_models import TEXT, draw_weights

SIZES = G.Sizes(300, 16, 2, 4, 2, 4, 24, 40, tied=False)
PLAIN = S.Sampling()
PROMPTS = [[5, 7, 9], [3], [8, 8, 100, 4, 2, 250]]
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12).map(
    lambda numbers: torch.tensor(numbers, dtype=torch.float64)
)


@pytest.fixture(scope="module")
def model():
    return draw_weights(G.GPT(SIZES)).double()


def write(model, prompts, sampling=PLAIN, seeds=(1, 2, 3), context=40, **options):
    """Return the tokens that continue each prompt."""
    columns = S.next_tokens(model, prompts, sampling, seeds, context, end=MARK_ID, **options)
    rows = zip(*columns, strict=True)
    return [[token for token in row if token is not None] for row in rows]


def probabilities(logits):
    return logits.softmax(dim=-1)


@given(LOGITS, st.integers(1, 15))
def test_top_k_keeps_the_k_likeliest(logits, k):
    kept = S.keep_top_k(logits, k).isfinite()
    assert kept.sum() == min(k, len(logits))
    assert logits[kept].min() >= logits.masked_fill(kept, -math.inf).max()


def test_top_p_reaches_p_in_each_row_and_changes_no_logit_that_it_keeps():
    logits = torch.tensor([0.25, 0.5, 0.125, 0.125]).log()
    for p, expected in ((1e-9, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3)):
        found = S.keep_top_p(logits, p)
        assert found.isfinite().sum() == expected
        assert torch.equal(found[:2][found[:2].isfinite()], logits[:2][found[:2].isfinite()])
    kept = S.keep_top_p(torch.tensor([0.15, 0.5, 0.35]).log(), 0.6).isfinite()
    assert kept.tolist() == [False, True, True]
    rows = torch.stack((logits, logits.flip(0), logits + 3)).double().expand(2, 3, 4)
    found = S.keep_top_p(rows, 0.6)
    assert (found.dtype, found.shape) == (torch.float64, (2, 3, 4))
    for row in ((0, 0), (0, 1), (1, 2)):
        assert torch.equal(found[row], S.keep_top_p(rows[row], 0.6))
    hidden = torch.tensor([0.0, 0.0, -math.inf, -math.inf])  # as top-k leaves them
    assert S.keep_top_p(hidden, 0.9).tolist() == hidden.tolist()


@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    found = S.keep_top_p(logits, p)
    kept = found.isfinite()
    probability = probabilities(logits)
    assert torch.equal(found[kept], logits[kept])
    assert probability[kept].min() >= probability.masked_fill(kept, 0).max()
    assert probability[kept].sum() >= p - 1e-12
    assert probability[kept].sum() - probability[kept].min() < p + 1e-12


def test_top_p_keeps_the_token_that_crosses_p():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    for p, expected in ((0.4, [1, 1]), (0.6, [2, 1]), (0.79, [2, 1]), (0.85, [3, 2])):
        assert S.keep_top_p(logits, p).isfinite().sum(dim=1).tolist() == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    sampling = S.Sampling(temperature)
    drawn = [S.draw_token(logits, sampling, generator) for _ in range(2000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 2000
    expected = probabilities(logits / temperature)
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=0.04)


def drawn(logits, sampling, count=400):
    """Return how often each token is drawn."""
    generator = torch.Generator().manual_seed(0)
    tokens = [S.draw_token(logits, sampling, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)).tolist()


def test_the_temperature_comes_first_then_top_k_then_top_p():
    logits = torch.tensor([0.02, 0.64, 0.04, 0.3], dtype=torch.float64).log()
    assert drawn(logits, S.Sampling(0)) == [0, 400, 0, 0]
    kept = [
        [n for n, count in enumerate(drawn(logits, sampling)) if count]
        for sampling in (
            S.Sampling(),
            S.Sampling(top_k=3),
            S.Sampling(top_p=0.9),
            S.Sampling(2.0, top_p=0.9),  # of 0.08, 0.47, 0.12 and 0.32
            S.Sampling(2.0, top_k=2, top_p=0.59),  # of 0.593 and 0.407
            S.Sampling(2.0, top_k=2, top_p=0.6),
        )
    ]
    assert kept == [[0, 1, 2, 3], [1, 2, 3], [1, 3], [1, 2, 3], [1], [1, 3]]


def test_a_draw_is_an_int_and_takes_its_chance_from_the_generator_alone():
    logits = torch.ones(50, dtype=torch.float64)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = [
        [S.draw_token(logits, PLAIN, generator) for _ in range(8)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    ]
    assert found[0] == found[1] != found[2]
    assert len({*found[0]}) > 1
    assert torch.equal(torch.get_rng_state(), before)
    found[0].append(S.draw_token(logits, S.Sampling(0), torch.Generator()))
    assert {type(token) for token in found[0]} == {int}
    assert torch.equal(logits, torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize(
    "sampling", [S.Sampling(0), S.Sampling(1e-6), S.Sampling(top_k=1), S.Sampling(top_p=1e-9)]
)
def test_without_chance_the_likeliest_token_is_taken(model, sampling):
    tokens = torch.tensor([PROMPTS[0]])
    for _ in range(8):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(dim=-1)), dim=1)
    (found,) = write(model, PROMPTS[:1], sampling, seeds=[0], context=11)
    assert found == tokens[0, 3:].tolist()


@pytest.mark.parametrize("sampling", [S.Sampling(0), S.Sampling(0.8, top_k=50, top_p=0.95)])
def test_neither_the_cache_nor_the_neighbors_change_a_token(model, sampling):
    found = write(model, PROMPTS, sampling)
    assert found == write(model, PROMPTS, sampling, cached=False)
    for prompt, seed, row in zip(PROMPTS, (1, 2, 3), found, strict=True):
        assert [row] == write(model, [prompt], sampling, seeds=[seed])
    assert len({*map(len, found)}) > 1


def test_logits_of_padded_and_cached_rows_are_those_of_a_row_alone():
    model = draw_weights(G.GPT(SIZES))
    tokens = torch.tensor([[0, 0, 5, 7, 9, 11], [1, 2, 3, 4, 5, 6]])
    real = torch.tensor([[False] * 2 + [True] * 4, [True] * 6])
    with torch.inference_mode(), S.Cache(model) as cache:
        for length in (4, 5, 6):
            start = cache.length
            found = S.next_logits(model, tokens[:, :length], real[:, :length], start)
        assert cache.length == 6
    for row, alone in ((0, tokens[:1, 2:]), (1, tokens[1:])):
        expected = model(alone)[0, -1]
        assert (found[row] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_padding_only_new_tokens_are_read():
    model, tokens = draw_weights(G.GPT(SIZES)).double(), torch.tensor([[5, 7, 9, 11, 2]])
    real = torch.ones(1, 5, dtype=torch.bool)
    expected = model(tokens)[:, -1]
    assert expected.shape == (1, 300)
    torch.testing.assert_close(S.next_logits(model, tokens, real), expected)
    seen = []
    model.embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    with torch.inference_mode(), S.Cache(model) as cache:
        for length in (2, 3, 5):
            part = slice(length)
            found = S.next_logits(model, tokens[:, part], real[:, part], cache.length)
    torch.testing.assert_close(found, expected)
    assert seen == [2, 1, 2]


def test_each_row_counts_its_positions_from_its_first_real_token():
    model, tokens = draw_weights(G.GPT(SIZES)).double(), torch.tensor([[0, 0, 5, 7], [1, 2, 3, 4]])
    real = tokens > 0
    calls = []

    def hidden(tokens, positions, mask):
        calls.append((tokens, positions, mask))
        return G.GPT.hidden(model, tokens, positions, mask)

    model.hidden = hidden
    S.next_logits(model, tokens, real, start=0)
    ((_, positions, mask),) = calls
    assert tuple(positions.shape) == (2, 4)
    assert positions[0, 2:].tolist() == [0, 1]
    assert positions[1].tolist() == [0, 1, 2, 3]
    assert positions.min().item() == 0
    assert mask.broadcast_to(2, 1, 4)[:, 0].tolist() == real.tolist()


def test_a_row_ends_at_the_end_mark_and_the_others_go_on(model, monkeypatch):
    logits = torch.full((3, 300), -100.0)
    turns = itertools.count()

    def to_logits(x):
        logits[:] = -100
        logits[torch.arange(3), torch.tensor([11, MARK_ID if next(turns) == 1 else 12, 13])] = 0
        return logits

    monkeypatch.setattr(model.to_logits, "forward", to_logits)
    found = write(model, PROMPTS, context=8)
    assert found == [[11] * 5, [12], [13] * 2]  # the first and the last reach the context


def test_a_prompt_as_long_as_the_context_is_not_continued(model):
    columns = S.next_tokens(model, [[1, 2]], S.Sampling(), [0], context=2, end=MARK_ID)
    assert list(columns) == []


def test_the_cache_is_gone_when_the_writing_is_stopped(model):
    tokens = torch.tensor([[4, 5, 6]])
    expected = model(tokens)
    stream = S.next_tokens(model, [[1, 2]], S.Sampling(), [0], context=40, end=MARK_ID)
    next(stream)
    stream.close()
    assert torch.equal(model(tokens), expected)


@given(st.text(min_size=1))
def test_text_is_streamed_by_whole_characters(text):
    tokenizer = learn_tokenizer([TEXT], 280)
    pieces = list(S.decode_stream(tokenizer, tokenizer.encode(text).ids))
    assert "".join(pieces) == text
    for piece in pieces:
        assert "\ufffd" not in piece or "\ufffd" in text
    ids = tokenizer.encode("aü").ids
    assert list(S.decode_stream(tokenizer, ids)) == ["a", "ü", ""]
    assert "".join(S.decode_stream(tokenizer, ids[:-1])) == "a\ufffd"


def test_a_temperature_near_0_takes_the_likeliest():
    sampling = S.Sampling(temperature=1e-320)
    logits = torch.tensor([-3.0, 5.0, 4.0], dtype=torch.float64)
    assert S.draw_token(logits, sampling, torch.Generator().manual_seed(0)) == 1


def test_spaces_between_words_stay_where_a_tokenizer_leaves_out_the_first():
    words = {"▁a": 0, "▁b": 1, "b": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([0]) == "a"
    assert list(S.decode_stream(tokenizer, [0, 1, 2, 0])) == ["a", " b", "b", " a", ""]
    assert list(S.decode_stream(tokenizer, [1, 0], before=[0])) == [" b", " a", ""]


@given(st.lists(st.text("ab", max_size=4)), st.text("ab", min_size=1, max_size=4))
def test_the_text_ends_before_the_stop_string(pieces, stop):
    text = "".join(pieces)
    assert "".join(S.until(pieces, stop)) == text.partition(stop)[0]
    shown = ""
    for n, piece in enumerate(S.until(pieces, stop)):
        shown += piece
        missing = "".join(pieces[: n + 1])[len(shown) :]
        assert len(missing) < len(stop) or stop in text
