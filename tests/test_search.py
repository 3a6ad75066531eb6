"""Beam search, against a plain one and against trying everything."""

import itertools
import math
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import decoding.search as S
from conftest import SENTENCES, SMALL, draw
from inputs.text import BOS, EOS, PAD
from transformer import Sizes, Transformer
from translation import PreNormTransformer, make_model


def learn(model, pairs, steps=80):
    """Train a network on pairs of token lists, all of them at once."""
    sources, targets = (
        nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in side], batch_first=True)
        for side in zip(*pairs, strict=True)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        logits, labels = model(sources, targets[:, :-1]).flatten(0, 1), targets[:, 1:].flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def reverser(vocab_size, norm_first=True, steps=80):
    """Make a network in float64 that has begun to learn to reverse sequences."""
    torch.manual_seed(0)
    random, network = Random(0), PreNormTransformer if norm_first else Transformer
    rows = [
        [random.randrange(3, vocab_size) for _ in range(random.randrange(1, 9))] for _ in range(200)
    ]
    pairs = [([*ids, EOS], [BOS, *ids[::-1], EOS]) for ids in rows]
    return learn(network(vocab_size, Sizes(16, 2, 2, 32)), pairs, steps).double()


@pytest.fixture(scope="module", params=[False, True], ids=["post-norm", "pre-norm"])
def searched(request):
    """A network and sources (B, S)."""
    model = reverser(12, request.param)
    torch.manual_seed(1)
    return model, draw([6, 4, 1, 5, 2, 6], vocab_size=12)


def penalty(length, alpha):
    return ((5 + length) / 6) ** alpha


@torch.inference_mode()
def plain_search(model, row, beam, alpha):
    """Search as `beam_search` does for one source, hypothesis by hypothesis, up to the limit.

    Returns the best of the finished, and the scores of all of them.
    """
    row = row[row != PAD]
    finished, unfinished = {}, {(): 0.0}
    for length in range(1, min(2 * len(row) + 20, S.MAX_LENGTH) + 1):
        target = torch.tensor([[BOS, *ids] for ids in unfinished])
        logits = model(row.expand(len(target), -1), target)[:, -1]
        longer = {}
        for (ids, score), row_of_logits in zip(unfinished.items(), logits, strict=True):
            log_p = row_of_logits.log_softmax(dim=-1).tolist()
            finished[ids] = (score + log_p[EOS]) / penalty(length, alpha)
            for token in range(3, len(log_p)):
                longer[*ids, token] = score + log_p[token]
        unfinished = dict(sorted(longer.items(), key=lambda item: -item[1])[:beam])
    return max(finished, key=finished.get), finished


@torch.inference_mode()
def score_of(model, row, ids, alpha):
    """Return log P / lp of a finished target, in one pass."""
    row, labels = row[row != PAD][None], torch.tensor([*ids, EOS])
    logits = model(row, torch.tensor([[BOS, *ids]]))[0]
    log_p = -F.cross_entropy(logits, labels, reduction="sum").item()
    return log_p / penalty(len(labels), alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("beam", [1, 2, 4])
def test_the_search_is_the_plain_one_and_loses_no_finished_target(searched, beam, alpha):
    model, source = searched
    found = S.beam_search(model, source, beam, alpha)
    assert len(set(map(len, found))) >= 2
    for row, ids in zip(source, found, strict=True):
        expected, finished = plain_search(model, row, beam, alpha)
        assert tuple(ids) == expected
        score = score_of(model, row, ids, alpha)
        assert score == pytest.approx(finished[expected], rel=1e-5)
        assert score >= max(finished.values()) - 1e-5


def test_the_new_targets_of_a_source_continue_its_own():
    continued = []

    def decode(target, rows):
        continued.append(rows.tolist())
        return torch.zeros(4, 7)

    S.search(decode, torch.tensor([[3, EOS], [4, EOS]]), 2, alpha=1.0)
    of_source = [[row // 2 for row in rows] for rows in continued]
    assert of_source[1] == [0, 0, 1, 1]
    assert all(sources == [0, 0, 1, 1] for sources in of_source)


@pytest.mark.parametrize(("beam", "V"), [(2, 7), (6, 11), (1, 5)])
def test_a_step_continues_the_best_of_each_source(beam, V):
    torch.manual_seed(0)
    source = draw([3, 1], vocab_size=V)
    tables = torch.randn(2, 26, V, V, dtype=torch.float64)  # of a source, a length and a last token
    tables[..., EOS] = -50  # each source is searched to its limit
    steps = []

    def decode(target, rows):
        steps.append((target.tolist(), rows.tolist()))
        sources = torch.arange(2, device="cpu").repeat_interleave(beam)
        return tables[sources, target.shape[1] - 1, target[:, -1]]

    with torch.device("meta"):  # where every tensor is made that names no device
        S.search(decode, source, beam, alpha=1.0)
    log_p = tables.log_softmax(dim=-1).tolist()
    kept = [{(BOS,): 0.0}, {(BOS,): 0.0}]
    for (before, _), (target, rows) in itertools.pairwise(steps):
        for b, unfinished in enumerate(kept):
            longer = {
                (*ids, token): score + log_p[b][len(ids) - 1][ids[-1]][token]
                for ids, score in unfinished.items()
                for token in range(3, V)
            }
            best = sorted(longer, key=longer.get, reverse=True)[:beam]
            kept[b] = {ids: longer[ids] for ids in best}
            of_source = slice(b * beam, (b + 1) * beam)
            assert target[of_source] == [[*ids] for ids in best]
            assert [before[row] for row in rows[of_source]] == [[*ids[:-1]] for ids in best]
            assert all(b * beam <= row < (b + 1) * beam for row in rows[of_source])
    assert len(steps) == 2 * 3 + 20


def test_random_networks_are_searched_as_by_the_plain_search():
    lower = 0
    for seed in range(8):
        torch.manual_seed(seed)
        model = PreNormTransformer(9, Sizes(8, 2, 1, 8)).double().eval()
        nn.init.normal_(model.embedding.weight)
        source = draw([3, 1], vocab_size=9)
        for row, ids in zip(source, S.beam_search(model, source, 2, 1.0), strict=True):
            expected, finished = plain_search(model, row, 2, 1.0)
            assert tuple(ids) == expected
            lower += finished[expected] > list(finished.values())[-1]
    assert lower  # some of what was finished early is better than the end of the search


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("beam", [1, 4])
def test_neither_the_cache_nor_the_neighbors_change_a_token(searched, beam, alpha):
    model, source = searched
    found = S.beam_search(model, source, beam, alpha)
    plain = S.plain_decoder(model, source, beam)
    assert found == S.search(plain, source, beam, alpha)
    for row, ids in zip(source, found, strict=True):
        assert S.beam_search(model, row[row != PAD][None], beam, alpha) == [ids]


def test_a_target_that_never_ends_is_cut_at_the_limit_of_its_own_source(searched, monkeypatch):
    model, source = searched
    to_logits = model.to_logits
    ends = torch.zeros(12, dtype=torch.float64)
    ends[EOS] = -math.inf
    monkeypatch.setattr(model, "to_logits", lambda x: to_logits(x) + ends)
    found = S.beam_search(model, source, beam=2)
    assert [len(ids) for ids in found] == [2 * n + 20 for n in (6, 4, 1, 5, 2, 6)]
    assert min(map(min, found)) > EOS
    for row, ids in zip(source, found, strict=True):
        assert S.beam_search(model, row[row != PAD][None], beam=2) == [ids]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_what_trying_everything_finds(monkeypatch, alpha):
    limit, V = 4, 6
    model, source = reverser(V, steps=60), draw([3, 1, 2, 3], vocab_size=V)
    targets = [ids for n in range(limit) for ids in itertools.product(range(3, V), repeat=n)]
    monkeypatch.setattr(S, "MAX_LENGTH", limit)
    found = S.beam_search(model, source, beam=len(targets), alpha=alpha)
    for row, ids in zip(source, found, strict=True):
        assert tuple(ids) == max(targets, key=lambda ids: score_of(model, row, ids, alpha))
    assert len(set(map(tuple, found))) > 1


def test_a_beam_wider_than_the_vocabulary_is_searched(searched):
    model, source = searched
    found = S.beam_search(model, source[:2], 20, 1.0)
    assert [tuple(ids) for ids in found] == [plain_search(model, s, 20, 1.0)[0] for s in source[:2]]


@pytest.mark.parametrize("value", [1e38, math.inf, math.nan])
def test_a_network_that_computes_no_numbers_is_refused(value):
    model = PreNormTransformer(12, Sizes(16, 2, 1, 32))
    nn.init.constant_(model.encoder[0].feed_forward[0].weight, value)
    with pytest.raises(FloatingPointError, match="computes no numbers"):
        S.beam_search(model, draw([3, 1], vocab_size=12), beam=2)


def test_translate_keeps_order_and_says_what_it_leaves_out(words):
    torch.manual_seed(0)
    sides = [[words.encode(text).ids for text in pair] for pair in SENTENCES]
    pairs = [([*source, EOS], [BOS, *target, EOS]) for source, target in sides]
    model = learn(make_model(SMALL, words), pairs)
    pairs = SENTENCES * 60
    Random(0).shuffle(pairs)
    others = {3: "", 50: "  \t", 117: "☃\x00 чужой", 118: "x " * 300, 239: ""}
    lines = [others.get(i, source) for i, (source, _) in enumerate(pairs)]
    found = S.translate(model, words, lines, beam=2)
    assert isinstance(found[117], str)
    expected = {3: "", 50: "", 117: found[117], 118: None, 239: ""}
    assert found == [expected.get(i, answer) for i, (_, answer) in enumerate(pairs)]
    assert S.translate(model, words, [], beam=2) == []


def test_a_line_of_the_greatest_length_is_translated(words):
    model = make_model(SMALL, words)
    nn.init.zeros_(model.decoder_norm.weight)
    model.decoder_norm.bias.data.copy_(model.embedding.weight[EOS] * 100)  # ends at once
    longest = "x " * (S.MAX_LENGTH // 2 - 1) + "x"
    assert S.translate(model, words, [longest, longest + " x"], beam=1) == ["", None]
