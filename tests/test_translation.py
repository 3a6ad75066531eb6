import copy
import dataclasses
import datetime
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import translation as T
from attention import causal_mask

SCRIPT = Path(T.__file__)
SMALL = T.Settings(
    d_model=16, num_heads=2, num_layers=1, d_ff=32, dropout=0, batch_tokens=200, warmup=20, epochs=2
)
TINY = ("d_model=16", "num_heads=2", "num_layers=1", "d_ff=32", "dropout=0", "warmup=20")


def make(num_layers=2, dropout=0.0, norm_first=True):
    """Make a network in float64, the same every time, with no parameter at 0 or 1."""
    torch.manual_seed(0)
    network = T.PreNormTransformer if norm_first else T.Transformer
    model = network(20, T.Sizes(16, 2, num_layers, 24, dropout))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.double()


def draw(lengths, vocab_size=20):
    """Draw tokens (B, T) of these lengths, with padding after the end."""
    return T.pad([torch.randint(3, vocab_size, (n,)).tolist() for n in lengths], "cpu")


def random_pairs(count, vocab_size=20, longest=9, seed=0):
    random = Random(seed)

    def ids():
        return [random.randrange(3, vocab_size) for _ in range(random.randrange(1, longest))]

    return [([*ids(), T.EOS], [T.BOS, *ids(), T.EOS]) for _ in range(count)]


# The network


class PyTorchs(nn.Module):
    """PyTorch's own Transformer, norm first, with the weights of ours."""

    def __init__(self, ours):
        super().__init__()
        self.embedding, self.positions = copy.deepcopy(ours.embedding), ours.positions
        layer, d_model = ours.encoder[0], ours.embedding.embedding_dim
        self.layers = nn.Transformer(
            d_model, layer.self_attention.num_heads, len(ours.encoder), len(ours.decoder),
            layer.feed_forward[0].out_features, dropout=0.0, batch_first=True, norm_first=True,
            dtype=torch.float64,
        )  # fmt: skip
        for parameter in self.layers.parameters():
            nn.init.zeros_(parameter)  # the biases of attention, which ours has not, stay so
        self.attention = []  # ours, and PyTorch's
        for layer, other in zip(
            [*ours.encoder, *ours.decoder],
            [*self.layers.encoder.layers, *self.layers.decoder.layers],
            strict=True,
        ):
            self.attention.append((layer.self_attention, other.self_attn))
            if hasattr(layer, "cross_attention"):
                self.attention.append((layer.cross_attention, other.multihead_attn))
                other.norm3.load_state_dict(layer.norm3.state_dict())
            other.linear1.load_state_dict(layer.feed_forward[0].state_dict())
            other.linear2.load_state_dict(layer.feed_forward[2].state_dict())
            other.norm1.load_state_dict(layer.norm1.state_dict())
            other.norm2.load_state_dict(layer.norm2.state_dict())
        for mine, other in self.attention:
            weights = [W.weight for W in (mine.W_q, mine.W_k, mine.W_v)]
            other.in_proj_weight.data.copy_(torch.cat(weights))
            other.out_proj.load_state_dict({"weight": mine.W_o.weight}, strict=False)
        self.layers.encoder.norm.load_state_dict(ours.encoder_norm.state_dict())
        self.layers.decoder.norm.load_state_dict(ours.decoder_norm.state_dict())

    def embed(self, tokens):
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        return x + self.positions[: tokens.shape[1]]

    def forward(self, source, target):
        # Its masks are True where nothing may be attended to.
        x = self.layers(
            self.embed(source), self.embed(target),
            tgt_mask=~causal_mask(target.shape[1]), src_key_padding_mask=source == T.PAD,
            tgt_key_padding_mask=target == T.PAD, memory_key_padding_mask=source == T.PAD,
        )  # fmt: skip
        return x @ self.embedding.weight.T


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_values_and_gradients_of_pre_norm_are_those_of_pytorch():
    ours = make()
    theirs = PyTorchs(ours)
    source, target = draw([7, 4, 1]), draw([3, 6, 5])
    real = target != T.PAD
    logits, expected = (model(source, target)[real] for model in (ours, theirs))
    torch.testing.assert_close(logits, expected)
    for values in (logits, expected):
        values.sin().sum().backward()
    compared = 0
    for mine, other in theirs.attention:
        weights = [W.weight.grad for W in (mine.W_q, mine.W_k, mine.W_v)]
        torch.testing.assert_close(torch.cat(weights), other.in_proj_weight.grad)
        torch.testing.assert_close(mine.W_o.weight.grad, other.out_proj.weight.grad)
        compared += 4
    layers = [*theirs.layers.encoder.layers, *theirs.layers.decoder.layers]
    for layer, other in zip([*ours.encoder, *ours.decoder], layers, strict=True):
        pairs = [(layer.norm1, other.norm1), (layer.norm2, other.norm2)]
        pairs += [(layer.feed_forward[0], other.linear1), (layer.feed_forward[2], other.linear2)]
        pairs += [(layer.norm3, other.norm3)] if hasattr(layer, "norm3") else []
        for mine, its in pairs:
            torch.testing.assert_close(mine.weight.grad, its.weight.grad)
            torch.testing.assert_close(mine.bias.grad, its.bias.grad)
            compared += 2
    for mine, its in (
        (ours.encoder_norm, theirs.layers.encoder.norm),
        (ours.decoder_norm, theirs.layers.decoder.norm),
    ):
        torch.testing.assert_close(mine.weight.grad, its.weight.grad)
        torch.testing.assert_close(mine.bias.grad, its.bias.grad)
        compared += 2
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.embedding.weight.grad)
    assert compared + 1 == len(list(ours.parameters()))
    assert all(p.grad.abs().max() > 1e-6 for p in ours.parameters())


def test_the_future_changes_nothing():
    model = make()
    source, target = draw([5, 3]), draw([6, 6])
    changed = torch.cat((target[:, :4], 22 - target[:, 4:]), dim=1)
    outputs = [model(source, tokens) for tokens in (target, changed)]
    torch.testing.assert_close(outputs[0][:, :4], outputs[1][:, :4], rtol=0, atol=1e-12)
    assert not torch.isclose(outputs[0][:, 4:], outputs[1][:, 4:]).all(dim=-1).any()


def test_padding_changes_nothing():
    model = make()
    source, target = draw([5, 3]), draw([6, 4])
    expected = model(source, target)
    wider = model(F.pad(source, (0, 3)), F.pad(target, (0, 2)))
    torch.testing.assert_close(wider[:, :6], expected, rtol=0, atol=1e-12)
    alone = model(source[1:, :3], target[1:, :4])
    torch.testing.assert_close(alone, expected[1:, :4], rtol=0, atol=1e-12)


def test_dropout_is_for_training_only():
    model = make(dropout=0.5)
    source, target = draw([4]), draw([3])
    assert not torch.equal(model(source, target), model(source, target))
    model.eval()
    assert torch.equal(model(source, target), model(source, target))


def test_the_settings_choose_the_network(words):
    pre, post = (
        T.make_model(dataclasses.replace(SMALL, norm_first=first), words) for first in (True, False)
    )
    assert (type(pre), type(post)) == (T.PreNormTransformer, T.Transformer)
    counts = [sum(p.numel() for p in model.parameters()) for model in (pre, post)]
    assert counts[0] == counts[1] + 2 * 2 * SMALL.d_model
    assert pre.embedding.num_embeddings == words.get_vocab_size()
    assert pre.encoder[0].feed_forward[0].out_features == SMALL.d_ff
    assert pre.decoder[0].cross_attention.num_heads == SMALL.num_heads
    assert len(pre.encoder) == len(pre.decoder) == SMALL.num_layers


# Training


def adam(model):
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)


def start_run(model, settings=SMALL, seed=0, optimizer=None):
    return T.Run({}, settings, None, model, optimizer or adam(model), T.Progress(seed))


def train(run, pairs, signals=(), model=None):
    return T.train_epoch(run, model or run.model, pairs, signals)


def smoothed_loss(model, pairs):
    """Follow section 5.4 token by token: 0.9 on the right one, and 0.1 on all alike."""
    losses = []
    for source, target in pairs:
        logits = model(torch.tensor([source]), torch.tensor([target[:-1]]))[0]
        for row, label in zip(logits.tolist(), target[1:], strict=True):
            log_sum = math.log(sum(math.exp(x) for x in row))
            q = [0.1 / len(row)] * len(row)
            q[label] += 0.9
            losses.append(-sum(p * (x - log_sum) for p, x in zip(q, row, strict=True)))
    return sum(losses), len(losses)


class Still(torch.optim.SGD):
    """Changes nothing, but notes the learning rate."""

    rates = ()

    def step(self):
        self.rates += (self.param_groups[0]["lr"],)


def test_an_epoch_has_the_smoothed_loss_and_the_learning_rate_of_the_paper_that_falls_to_0():
    model, pairs = make(), random_pairs(40)
    total, count = smoothed_loss(model, pairs)
    optimizer = Still(model.parameters())
    run = start_run(model, optimizer=optimizer)
    batches = len(T.make_batches(pairs, SMALL.batch_tokens, Random(0)))
    assert not train(run, pairs)
    assert (run.progress.epoch, run.progress.batch, run.progress.step) == (1, 0, batches)
    assert (run.progress.count, run.progress.loss) == (count, pytest.approx(total, rel=1e-12))
    assert len(optimizer.rates) == batches > 2
    for n, found in enumerate(optimizer.rates):
        remaining = 1 - n / batches / SMALL.epochs
        assert found == pytest.approx(remaining * T.learning_rate(n + 1, 16, SMALL.warmup))
    train(run, pairs)
    assert run.progress.loss == pytest.approx(total, rel=1e-12)  # it begins anew
    expected = T.learning_rate(2 * batches, 16, SMALL.warmup) / (2 * batches)
    assert optimizer.rates[-1] == pytest.approx(expected)


def test_the_gradient_is_that_of_the_mean_loss_of_a_token():
    model, pairs = make(), random_pairs(5)
    optimizer = Still(model.parameters())
    train(start_run(model, dataclasses.replace(SMALL, batch_tokens=10**6), 0, optimizer), pairs)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = []
    for source, target in pairs:
        logits = model(torch.tensor([source]), torch.tensor([target[:-1]]))[0]
        labels = torch.tensor(target[1:])
        losses.append(F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1))
    torch.cat(losses).mean().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_evaluate_gives_the_mean_loss_of_a_token_and_changes_nothing():
    model, pairs = make(dropout=0.5), random_pairs(30)
    before = copy.deepcopy(model.state_dict())
    losses = [T.evaluate(model, pairs, tokens) for tokens in (50, 1000)]
    expected = []
    for source, target in pairs:
        logits = model.eval()(torch.tensor([source]), torch.tensor([target[:-1]]))[0]
        expected += F.cross_entropy(logits, torch.tensor(target[1:]), reduction="none").tolist()
    assert losses == pytest.approx([sum(expected) / len(expected)] * 2, rel=1e-12)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model, pairs = T.PreNormTransformer(20, T.Sizes(16, 2, 1, 32)), random_pairs(60)
    run, before = (
        start_run(model, dataclasses.replace(SMALL, epochs=8)),
        T.evaluate(model, pairs, 1000),
    )
    while run.progress.epoch < 8:
        train(run, pairs)
    assert T.evaluate(model, pairs, 1000) < before - 0.4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training_and_the_validation(value):
    model = make()
    nn.init.constant_(model.decoder_norm.bias, value)
    with pytest.raises(FloatingPointError, match=r"the loss became (nan|inf)"):
        train(start_run(model), random_pairs(5))
    with pytest.raises(FloatingPointError, match=r"validation loss became (nan|inf)"):
        T.evaluate(model, random_pairs(5), 1000)


class After(list):
    """Signals, of which the first comes once they have been looked at so many times."""

    def __init__(self, steps):
        self.steps = steps

    def __len__(self):
        self.steps -= 1
        return int(self.steps <= 0)


@pytest.mark.parametrize("stop", [1, 3, -1])
def test_a_training_that_was_stopped_and_resumed_has_the_same_bits(stop, tmp_path, words):
    pairs, identity = random_pairs(60), {"seed": 3}
    batches = len(T.make_batches(pairs, SMALL.batch_tokens, Random(0)))
    stop %= batches + 1

    def start():
        run = start_run(make(num_layers=1, dropout=0.3).float(), seed=3)
        run.tokenizer, run.identity = words, identity
        return run

    run = start()
    while run.progress.epoch < 2:
        assert not train(run, pairs)
    expected = run
    assert expected.progress.step == 2 * batches

    run = start()
    assert train(run, pairs, After(stop))
    assert (run.progress.epoch, run.progress.batch) == ((1, 0) if stop == batches else (0, stop))
    run.progress.rows = [T.Epoch(1, 2.0, 3.0, 4.0)] * run.progress.epoch
    T.save_checkpoint(tmp_path / "checkpoint.pt", run)
    torch.rand(stop)  # what is drawn elsewhere must not matter
    run = start()
    state = T.open_checkpoint(tmp_path / "checkpoint.pt", identity)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.progress = T.Progress(**state["progress"])
    while run.progress.epoch < 2:
        train(run, pairs)
    run.progress.rows = []
    assert run.progress == expected.progress
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, expected.model.state_dict()[name])


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=60),
    tokens=st.integers(1, 300), seed=st.integers(0, 9),
)  # fmt: skip
def test_batches_have_every_pair_once_and_no_more_tokens_than_asked(sizes, tokens, seed):
    pairs = [([5] * s, [5] * t) for s, t in sizes]
    batches = T.make_batches(pairs, tokens, Random(seed))
    assert sorted(itertools.chain(*batches)) == list(range(len(pairs)))
    assert all(batches)
    for batch in batches:
        widths = [max(len(pairs[i][side]) for i in batch) for side in (0, 1)]
        assert len(batch) * sum(widths) <= tokens or len(batch) == 1
    assert T.make_batches(pairs, tokens, Random(seed)) == batches


def test_batches_waste_little_and_differ_by_epoch():
    random = Random(0)
    sides = [[5] * random.randrange(1, 30) for _ in range(1000)]
    pairs = [(ids, ids + [T.EOS] * random.randrange(4)) for ids in sides]
    batches = T.make_batches(pairs, 1000, Random(0))
    padded = sum(
        len(batch) * max(len(pairs[i][side]) for i in batch) for batch in batches for side in (0, 1)
    )
    assert sum(len(a) + len(b) for a, b in pairs) > 0.9 * padded
    other = T.make_batches(pairs, 1000, Random(1))
    assert {tuple(batch) for batch in batches} != {tuple(batch) for batch in other}
    longest = [max(len(pairs[i][0]) + len(pairs[i][1]) for i in batch) for batch in batches]
    assert longest != sorted(longest)


def test_pad_fills_up_with_padding():
    tokens = T.pad([[5, 6, 7], [8], [9, 10]], torch.device("cpu"))
    assert tokens.tolist() == [[5, 6, 7], [8, T.PAD, T.PAD], [9, 10, T.PAD]]


# Tokens

SENTENCES = [
    ("ein hund läuft im schnee .", "a dog runs in the snow ."),
    ("zwei kinder spielen im garten .", "two children play in the garden ."),
    ("eine frau liest ein buch .", "a woman reads a book ."),
    ("ein mann mit hut fährt rad .", "a man with a hat rides a bike ."),
]


@pytest.fixture(scope="module")
def words():
    return T.make_tokenizer(itertools.chain(*SENTENCES), 320)


texts = st.text() | st.text("<s>/pad\x00\x85\u2028 \t\r\née\u0301ß") | st.sampled_from(SENTENCES[0])


@settings(deadline=None, max_examples=100)
@given(text=texts)
def test_any_text_comes_back_as_it_was(words, text):
    ids = words.encode(text).ids
    assert words.decode(ids) == text
    assert all(T.EOS < i < words.get_vocab_size() for i in ids)


def test_words_are_learned_but_not_across_spaces(words):
    assert words.get_vocab_size() <= 320
    assert len(words.encode(SENTENCES[0][0]).ids) <= len(SENTENCES[0][0]) / 2
    assert all(" " not in words.decode([i])[1:] for i in range(words.get_vocab_size()))


def test_sequences_begin_and_end_with_their_marks(words):
    ((source, target),) = T.encode(words, SENTENCES[:1])
    assert (source[-1], target[0], target[-1]) == (T.EOS, T.BOS, T.EOS)
    assert words.decode(source[:-1]) == SENTENCES[0][0]
    assert words.decode(target[1:-1]) == SENTENCES[0][1]


# Search


def reverser(vocab_size, norm_first=True, epochs=4):
    """Make a network in float64 that has begun to learn to reverse sequences."""
    torch.manual_seed(0)
    network = T.PreNormTransformer if norm_first else T.Transformer
    model = network(vocab_size, T.Sizes(16, 2, 2, 32))
    pairs = [(ids, [T.BOS, *ids[-2::-1], T.EOS]) for ids, _ in random_pairs(400, vocab_size)]
    run = start_run(model, dataclasses.replace(SMALL, warmup=100, epochs=2 * epochs))
    while run.progress.epoch < epochs:
        train(run, pairs)
    return model.double().eval()


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
    row = row[row != T.PAD]
    finished, unfinished = {}, {(): 0.0}
    for length in range(1, min(2 * len(row) + 20, T.MAX_LENGTH) + 1):
        target = torch.tensor([[T.BOS, *ids] for ids in unfinished])
        logits = model(row.expand(len(target), -1), target)[:, -1]
        longer = {}
        for (ids, score), row_of_logits in zip(unfinished.items(), logits, strict=True):
            log_p = row_of_logits.log_softmax(dim=-1).tolist()
            finished[ids] = (score + log_p[T.EOS]) / penalty(length, alpha)
            for token in range(3, len(log_p)):
                longer[*ids, token] = score + log_p[token]
        unfinished = dict(sorted(longer.items(), key=lambda item: -item[1])[:beam])
    return max(finished, key=finished.get), finished


@torch.inference_mode()
def score_of(model, row, ids, alpha):
    """Return log P / lp of a finished target, in one pass."""
    row, labels = row[row != T.PAD][None], torch.tensor([*ids, T.EOS])
    logits = model(row, torch.tensor([[T.BOS, *ids]]))[0]
    log_p = -F.cross_entropy(logits, labels, reduction="sum").item()
    return log_p / penalty(len(labels), alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("beam", [1, 2, 4])
def test_the_search_is_the_plain_one_and_loses_no_finished_target(searched, beam, alpha):
    model, source = searched
    found = T.beam_search(model, source, beam, alpha)
    assert len(set(map(len, found))) >= 2
    for row, ids in zip(source, found, strict=True):
        expected, finished = plain_search(model, row, beam, alpha)
        assert tuple(ids) == expected
        score = score_of(model, row, ids, alpha)
        assert score == pytest.approx(finished[expected], rel=1e-5)
        assert score >= max(finished.values()) - 1e-5


def test_random_networks_are_searched_as_by_the_plain_search():
    lower = 0
    for seed in range(8):
        torch.manual_seed(seed)
        model = T.PreNormTransformer(9, T.Sizes(8, 2, 1, 8)).double().eval()
        nn.init.normal_(model.embedding.weight)
        source = draw([3, 1], vocab_size=9)
        for row, ids in zip(source, T.beam_search(model, source, beam=2), strict=True):
            expected, finished = plain_search(model, row, 2, 0.6)
            assert tuple(ids) == expected
            lower += finished[expected] > list(finished.values())[-1]
    assert lower  # some of what was finished early is better than the end of the search


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("beam", [1, 4])
def test_neither_the_cache_nor_the_neighbors_change_a_token(searched, beam, alpha):
    model, source = searched
    found = T.beam_search(model, source, beam, alpha)
    assert found == T.beam_search(model, source, beam, alpha, use_cache=False)
    for row, ids in zip(source, found, strict=True):
        assert T.beam_search(model, row[row != T.PAD][None], beam, alpha) == [ids]


def test_a_target_that_never_ends_is_cut_at_the_limit_of_its_own_source(searched, monkeypatch):
    model, source = searched
    to_logits = model.to_logits
    ends = torch.zeros(12, dtype=torch.float64)
    ends[T.EOS] = -math.inf
    monkeypatch.setattr(model, "to_logits", lambda x: to_logits(x) + ends)
    found = T.beam_search(model, source, beam=2)
    assert [len(ids) for ids in found] == [2 * n + 20 for n in (6, 4, 1, 5, 2, 6)]
    assert min(map(min, found)) > T.EOS
    for row, ids in zip(source, found, strict=True):
        assert T.beam_search(model, row[row != T.PAD][None], beam=2) == [ids]


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_cache_changes_no_logit(norm_first):
    model = make(norm_first=norm_first)
    source, target = draw([5, 3]), draw([6, 6])
    memory, mask, parts = model.encode(source), T.padding_mask(source, T.PAD), []
    with T.cached(model):
        for start, end in ((0, 1), (1, 4), (4, 6)):
            parts.append(model.decode(target[:, start:end], memory, mask, start))
            memory = memory[:, :0]
    expected = model(source, target)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_what_trying_everything_finds(monkeypatch, alpha):
    limit, V = 4, 6
    model, source = reverser(V, epochs=3), draw([3, 1, 2, 3], vocab_size=V)
    targets = [ids for n in range(limit) for ids in itertools.product(range(3, V), repeat=n)]
    monkeypatch.setattr(T, "MAX_LENGTH", limit)
    found = T.beam_search(model, source, beam=len(targets), alpha=alpha)
    for row, ids in zip(source, found, strict=True):
        assert tuple(ids) == max(targets, key=lambda ids: score_of(model, row, ids, alpha))
    assert len(set(map(tuple, found))) > 1


def test_a_beam_wider_than_the_vocabulary_is_searched(searched):
    model, source = searched
    found = T.beam_search(model, source[:2], beam=20)
    assert [tuple(ids) for ids in found] == [plain_search(model, s, 20, 0.6)[0] for s in source[:2]]


def test_translate_keeps_order_and_says_what_it_leaves_out(words):
    torch.manual_seed(0)
    quick = dataclasses.replace(SMALL, epochs=8)
    run = start_run(T.make_model(quick, words), quick)
    pairs = T.encode(words, SENTENCES * 30)
    while run.progress.epoch < quick.epochs:
        train(run, pairs)
    pairs = SENTENCES * 60
    Random(0).shuffle(pairs)
    others = {3: "", 50: "  \t", 117: "☃\x00 чужой", 118: "x " * 300, 239: ""}
    lines = [others.get(i, source) for i, (source, _) in enumerate(pairs)]
    found = T.translate(run.model, words, lines, beam=2)
    assert isinstance(found[117], str)
    expected = {3: "", 50: "", 117: found[117], 118: None, 239: ""}
    assert found == [expected.get(i, answer) for i, (_, answer) in enumerate(pairs)]
    assert T.translate(run.model, words, [], beam=2) == []


def test_a_line_of_the_greatest_length_is_translated(words):
    model = T.make_model(SMALL, words)
    nn.init.zeros_(model.decoder_norm.weight)
    model.decoder_norm.bias.data.copy_(model.embedding.weight[T.EOS] * 100)  # ends at once
    longest = "x " * (T.MAX_LENGTH // 2 - 1) + "x"
    assert T.translate(model, words, [longest, longest + " x"], beam=1) == ["", None]


# Parallel text


def save_text(folder, splits):
    for split, pairs in splits.items():
        for language, lines in zip(("de", "en"), zip(*pairs, strict=True), strict=True):
            content = "".join(f"{line}\n" for line in lines).encode()
            (folder / f"{split}.{language}").write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    """A data set of a few sentences, over and over; some files are gzipped."""
    folder = tmp_path / "some text"
    folder.mkdir()
    save_text(folder, {"train": SENTENCES * 30, "val": SENTENCES[:2]})
    save_text(folder, {"test2016": SENTENCES[2:], "test.more": SENTENCES})
    for path in folder.glob("train.*"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


def test_text_is_read_from_plain_and_gzipped_files(folder):
    corpus = T.read_corpus(folder, ("de", "en"))
    assert corpus == {
        "train": SENTENCES * 30, "val": SENTENCES[:2], "test.more": SENTENCES,
        "test2016": SENTENCES[2:],
    }  # fmt: skip
    turned = T.read_corpus(folder, ("en", "de"))
    assert turned["val"] == [(b, a) for a, b in SENTENCES[:2]]


def test_only_a_line_feed_ends_a_line_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes("one\x0b\x1c\u2028 still\n\ntwo".encode())
    assert T.read_lines(tmp_path / "a") == ["one\x0b\x1c\u2028 still", "", "two"]
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbffrom\r\nWindows\r\n")
    assert T.read_lines(tmp_path / "b") == ["from", "Windows"]


@pytest.mark.parametrize("nothing", ["", "\t\xa0"])
def test_pairs_with_a_side_that_is_empty_or_too_long_are_left_out(words, nothing):
    longest, longer = "x " * (T.MAX_LENGTH // 2 - 1) + "x", "x " * (T.MAX_LENGTH // 2)
    assert [len(words.encode(text).ids) for text in (longest, longer)] == [255, 256]
    pairs = [("ein", nothing), SENTENCES[0], (nothing, "a"), (longest, longest)]
    pairs += [(longest, longer), (longer, longest), (nothing, nothing)]
    assert T.encode(words, pairs) == T.encode(words, [pairs[1], pairs[3]])
    assert len(T.encode(words, pairs)) == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("val.de", Path.unlink, "val.de"),
        ("train.en.gz", Path.unlink, "train.en"),
        ("test2016.en", Path.unlink, "test2016.en"),
        ("train.de.gz", cut, "train.de.gz is broken"),
        ("train.de.gz", lambda path: path.write_bytes(b"404"), "train.de.gz is broken"),
        ("val.en", lambda path: path.write_bytes(b"\xff\xfe"), "val.en is broken"),
        ("val.en", lambda path: path.write_text("one\n"), "val.de and val.en have 2 and 1 lines"),
    ],
    ids=range(7),
)
def test_broken_text_is_named(folder, name, spoil, message):
    spoil(folder / name)
    with pytest.raises(OSError, match=message) as caught:
        T.read_corpus(folder, ("de", "en"))
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("split", ["train", "val", "test*"])
@pytest.mark.parametrize("content", [None, b"", b"\n\n"])
def test_a_split_without_sentences_is_refused(folder, split, content):
    for path in folder.glob(f"{split}.*"):
        path.unlink()
        if content is not None:
            (folder / path.name.removesuffix(".gz")).write_bytes(content)
    with pytest.raises(OSError, match=re.escape(str(folder))):
        T.read_corpus(folder, ("de", "en"))


# Files


def run_main(*arguments):
    return T.main([*map(str, arguments), "--device", "cpu"])


def one_line(capsys):
    """Return what was written to stderr, a line of printable characters."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.removesuffix("\n").isprintable()
    return error


def load(out):
    return safetensors.torch.load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, words):
    """A network that was not trained, in its file."""
    out = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    T.save_model(out / "model.safetensors", T.make_model(SMALL, words), words, SMALL)
    return out


def test_a_saved_model_is_the_same_when_opened(saved, words):
    model, tokenizer = T.open_model(saved / "model.safetensors")
    torch.manual_seed(0)
    expected = T.make_model(SMALL, words)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert tokenizer.encode("<s> hund").ids == words.encode("<s> hund").ids
    source, target = draw([4, 2]), draw([3, 3])
    assert torch.equal(model(source, target), expected(source, target))


def with_settings(**changes):
    def spoil(content):
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        header["settings"] = json.dumps(json.loads(header["settings"]) | changes)
        return safetensors.torch.save(safetensors.torch.load(content), header)

    return spoil


def with_a_nan(content):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    weights = safetensors.torch.load(content)
    weights["decoder_norm.bias"][3] = math.nan
    return safetensors.torch.save(weights, header)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, "No such file"),
        (lambda content: b"", ""),
        (lambda content: b"a text", ""),
        (lambda content: content[:-1], ""),
        (lambda content: content[:100], ""),
        (lambda content: safetensors.torch.save(safetensors.torch.load(content)), ""),
        (with_settings(d_ff=16), "other sizes"),
        (with_settings(num_layers=48), ""),
        (with_settings(num_layers=10**9), "num_layers must be between 1 and 48"),
        (with_settings(d_model="16"), ""),
        (with_settings(kernel=3), ""),
        (with_a_nan, "not finite"),
    ],
    ids=range(12),
)
def test_a_model_that_is_none_is_refused_in_one_line(saved, tmp_path, capsys, spoil, message):
    path = tmp_path / "model.safetensors"
    if spoil:
        path.write_bytes(spoil((saved / "model.safetensors").read_bytes()))
    assert run_main("--out", tmp_path, "--translate", "ein hund") == 1
    error = one_line(capsys)
    assert f"train one first: {path}: " in error
    assert message in error


RUN = ("--set", *TINY, "dropout=0.2", "batch_tokens=200", "epochs=3", "--beam", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of a data set and of a run on it that has ended."""
    base = tmp_path_factory.mktemp("trained")
    data, out = base / "data", base / "out"
    data.mkdir()
    save_text(data, {"train": SENTENCES * 30, "val": SENTENCES, "test": SENTENCES})
    assert run_main("--data", data, "--out", out, *RUN) == 0
    return data, out


def test_a_run_writes_its_results(trained, words):
    _, out = trained
    metrics = json.loads((out / "metrics.json").read_text())
    assert [row[0] for row in metrics["epochs"]] == [1, 2, 3]
    assert metrics["settings"]["languages"] == ["de", "en"]
    for name in ("losses", "attention"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "attention.png", "checkpoint.pt", "losses.png", "metrics.json", "model.safetensors",
    ]  # fmt: skip
    model, tokenizer = T.open_model(out / "model.safetensors")
    loss = T.evaluate(model, T.encode(tokenizer, SENTENCES), 1000)
    assert loss == pytest.approx(min(row[2] for row in metrics["epochs"]), rel=1e-5)


def test_a_run_over_a_checkpoint_is_refused_until_it_is_told_to_restart(trained, tmp_path, capsys):
    data, out = trained
    (tmp_path / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes())
    arguments = ("--data", data, "--out", tmp_path, *RUN)
    assert run_main(*arguments) == 1
    error = one_line(capsys)
    assert str(tmp_path / "checkpoint.pt") in error
    assert "--resume" in error
    assert "--restart" in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == (out / "checkpoint.pt").read_bytes()
    assert run_main(*arguments, "--seed", 5, "--restart") == 0
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["run"]["seed"] == 5
    with pytest.raises(SystemExit):
        run_main(*arguments, "--resume", "--restart")


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(trained, capsys):
    data, out = trained
    weights = (out / "model.safetensors").read_bytes()
    for changed, message in (
        (("--set", *RUN[1:-3], "epochs=4"), r"epochs\D* 3\b"),
        (("--set", *RUN[1:-2], "d_ff=48"), r"d_ff\D* 32\b"),
        ((*RUN, "--seed", 7), r"seed\D* 0\b"),
        ((*RUN, "--from", "en", "--to", "de"), r"languages\W.*de.*en"),
    ):
        assert run_main("--data", data, "--out", out, "--resume", *changed) == 1
        error = one_line(capsys)
        assert re.search(message, error)
        assert str(out) in error
    assert (out / "model.safetensors").read_bytes() == weights


def changed(**changes):
    """Return what saves a checkpoint again with these changes, as a changed script would."""

    def spoil(content):
        buffer, state = io.BytesIO(), torch.load(io.BytesIO(content), weights_only=True)
        for name, change in changes.items():
            state[name] = change(state[name])
        torch.save(state, buffer)
        return buffer.getvalue()

    return spoil


def flipped(content):
    """Flip a bit of the weights."""
    middle = content.index(b"data/4") + 200
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


SPOILT = {
    "empty": lambda content: b"",
    "text": lambda content: b"a text",
    "truncated": lambda content: content[: len(content) // 2],
    "other": lambda content: safetensors.torch.save({"weight": torch.zeros(3)}),
    "flipped": flipped,
    "no model": changed(model=lambda model: {}),
    "other model": changed(model=lambda model: {name: x[:1] for name, x in model.items()}),
    "no optimizer": changed(optimizer=lambda optimizer: {}),
    "no epochs": changed(progress=lambda progress: progress | {"rows": []}),
    "odd epochs": changed(progress=lambda progress: progress | {"rows": [[1], [2], [3]]}),
    "odd progress": changed(progress=lambda progress: progress | {"mood": 1}),
    "broken tokenizer": changed(tokenizer=lambda text: text[:-1]),
    "no run": changed(run=lambda run: None),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_broken_checkpoint_is_refused_in_one_line(trained, tmp_path, capsys, name):
    data, out = trained
    content = SPOILT[name]((out / "checkpoint.pt").read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert run_main("--data", data, "--out", tmp_path, "--resume", *RUN) == 1
    error = one_line(capsys)
    assert f"nothing to resume: {tmp_path / 'checkpoint.pt'}: " in error
    assert "weights_only" not in error


def test_no_flipped_bit_of_a_checkpoint_is_taken_for_another_number(trained, tmp_path):
    path, random = tmp_path / "checkpoint.pt", Random(0)
    content = (trained[1] / "checkpoint.pt").read_bytes()
    expected = torch.load(io.BytesIO(content), weights_only=True)
    refused = 0
    for _ in range(60):
        spoilt, place = bytearray(content), random.randrange(len(content))
        spoilt[place] ^= 1 << random.randrange(8)
        path.write_bytes(spoilt)
        try:
            state = T.open_checkpoint(path, {})
        except OSError:
            refused += 1
        else:  # what was flipped is not read
            assert all(
                torch.equal(state["model"][name], x) for name, x in expected["model"].items()
            )
            assert state["progress"] == expected["progress"]
    assert refused > 30


def test_a_checkpoint_that_runs_code_is_refused(trained, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"run": Trap()}, tmp_path / "checkpoint.pt")
    assert run_main("--data", trained[0], "--out", tmp_path, "--resume", *RUN) == 1
    assert "weights_only" not in one_line(capsys)
    assert not (tmp_path / "trapped").exists()


def test_a_run_that_has_ended_can_be_resumed(trained, capsys):
    data, out = trained
    before = json.loads((out / "metrics.json").read_text())
    assert run_main("--data", data, "--out", out, "--resume", *RUN) == 0
    assert json.loads((out / "metrics.json").read_text()) == before


def test_a_loss_that_breaks_ends_in_one_line_and_saves_nothing(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(T.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * math.nan)
    (tmp_path / "model.safetensors").write_bytes(b"old")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_main("--data", trained[0], "--out", tmp_path, *RUN) == 1
    one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_older_model_is_not_reported_if_no_validation_loss_is_finite(
    trained, tmp_path, capsys, monkeypatch, value
):
    content = (trained[1] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(
        F,
        "cross_entropy",
        lambda *logits_and_labels, label_smoothing, **options: (
            cross_entropy(*logits_and_labels, label_smoothing=label_smoothing, **options)
            + (0 if label_smoothing else value)  # there is none in validation
        ),
    )
    assert run_main("--data", trained[0], "--out", tmp_path, *RUN) == 1
    printed = capsys.readouterr()
    assert "validation loss became" in printed.err
    assert "BLEU" not in printed.out
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_the_best_network_is_kept_and_not_the_last(trained, tmp_path, capsys, monkeypatch):
    losses, weights = iter([3.0, 1.0, 2.0]), []

    def evaluate(model, *_):
        weights.append(copy.deepcopy(model.state_dict()))
        return next(losses)

    monkeypatch.setattr(T, "evaluate", evaluate)
    assert run_main("--data", trained[0], "--out", tmp_path, *RUN) == 0
    for name, tensor in load(tmp_path).items():
        assert torch.equal(tensor, weights[1][name])
        assert not torch.equal(tensor, weights[2][name])


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    T.write(path, b"old")
    assert path.read_bytes() == b"old"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"file.*No space left"):
        T.write(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


# As a person runs it


def start(*arguments, torchrun=False, **options):
    """Start the script, or two of it under torchrun."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(SCRIPT), *map(str, arguments), "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def test_text_is_learned_end_to_end(run_script, folder, tmp_path):
    for language, lines in (("de", "\nein hund\n\nein\n"), ("en", f"a dog\n\n\n{'x ' * 300}\n")):
        with gzip.open(folder / f"train.{language}.gz", "at") as file:
            file.write(lines)
    for name, text in (("val.de", "$a$ $"), ("val.en", "a $"), ("test.more.de", "")):
        path = folder / name
        path.write_text(f"{text}\n{path.read_text()}")
    path = folder / "test.more.en"
    path.write_text(f"\x1b[2J red\n{path.read_text()}")
    out = tmp_path / "out"
    done = run_script(
        "translation.py", "--data", folder, "--out", out, "--device", "cpu",
        "--set", *TINY, "d_model=32", "batch_tokens=300", "epochs=8",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.split("\n")
    assert lines[0] == "4 pairs are left out: empty, or longer than 256 tokens"
    parameters = sum(x.numel() for x in load(out).values())
    assert lines[1] == f"{parameters:,} parameters on cpu, 120 pairs per epoch"
    metrics = json.loads((out / "metrics.json").read_text())
    for line, (epoch, loss, validation, seconds) in zip(lines[4:], metrics["epochs"], strict=False):
        assert line == f"{epoch:5}  {loss:13.4f}  {validation:15.4f}  {seconds:7.1f}"
    assert len(metrics["epochs"]) == 8
    assert len(metrics["test"]) == 4
    for name, score in metrics["test"].items():
        split, signature = name.split()
        assert f"{split}: BLEU {score:.2f}  {signature}" in lines
        assert score > 50  # it has seen these sentences
    assert {name.split("case:")[1][:2] for name in metrics["test"]} == {"mi", "lc"}
    assert "  ?[2J red (reference)" in lines
    for source, target in SENTENCES[:2]:
        place = lines.index(f"  {source}")
        assert lines[place + 2] == f"  {target} (reference)"
    for name in ("losses", "attention"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-2].startswith(f"Saved in {out} after ")


def test_bleu_is_that_of_sacrebleu():
    tests = {"test": [("x", "The cat sat on the mat ."), ("y", "A dog runs in the snow .")]}
    same = {"test": [target for _, target in tests["test"]]}
    assert list(T.bleu(tests, same).values()) == pytest.approx([100, 100])
    found = {"test": ["the cat sat on the mat .", "A dog sat on a mat ."]}
    (mixed, a), (lower, b) = T.bleu(tests, found).items()
    assert ("case:mixed" in mixed, "case:lc" in lower) == (True, True)
    assert 0 < a < b < 100


def test_lines_are_translated(trained, monkeypatch, capsys):
    _, out = trained
    model, words = T.open_model(out / "model.safetensors")
    lines = ["\ufeffein hund", "", "☃\r\x85\x0b\x1c\u2028 ?", "x " * 300, " ", "\udcff", "hut"]
    raw = "\n".join(lines).encode("utf-8", "surrogateescape")
    lines[0], lines[5] = "ein hund", "\ufffd"
    expected = [(text or "").replace("\n", " ") for text in T.translate(model, words, lines, 4)]
    assert expected[0] and expected[6] and expected[1] == expected[3] == expected[4] == ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
    assert run_main("--out", out, "--translate", "-") == 1  # for one line was too long
    printed = capsys.readouterr()
    assert printed.err == f"line 4 is longer than {T.MAX_LENGTH} tokens\n"
    assert printed.out.split("\n") == [*expected, ""]
    assert run_main("--out", out, "--translate", "ein hund") == 0
    assert capsys.readouterr() == (f"{expected[0]}\n", "")
    assert run_main("--out", out, "--translate", "\udcff") == 0  # a byte that is not UTF-8
    assert capsys.readouterr() == (f"{expected[5]}\n", "")


def test_at_a_terminal_each_line_is_answered_at_once(saved, monkeypatch, capsys):
    answers = []

    class Typed(io.BytesIO):
        def isatty(self):
            return True

        def read1(self, size=-1):
            answers.append(capsys.readouterr().out)
            return self.readline()

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Typed(b"ein hund\nein hut\n")))
    assert run_main("--out", saved, "--translate", "-") == 0
    assert [answer.count("\n") for answer in answers] == [0, 1, 1]


def test_without_standard_input_there_is_nothing_to_translate(saved, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert run_main("--out", saved, "--translate", "-") == 1
    assert "no standard input" in one_line(capsys)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried\n..."), "can't allocate memory: 4"]
)
def test_too_little_memory_ends_in_one_line(trained, tmp_path, monkeypatch, capsys, error):
    def batch_loss(*_, **__):
        raise error if isinstance(error, Exception) else RuntimeError(error)

    monkeypatch.setattr(T, "batch_loss", batch_loss)
    assert run_main("--data", trained[0], "--out", tmp_path, *RUN) == 1
    assert "memory" in one_line(capsys)


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--seed", ["--seed", "-1"]),
        ("--seed", ["--seed", str(2**63)]),
        ("--beam", ["--beam", "0"]),
        ("--beam", ["--beam", "1000000000"]),
        ("--device", ["--device", "abacus"]),
        ("--device", ["--device", "hpu"]),
        ("--data", []),
        ("--data", ["--data", "no/such/folder"]),
        *(
            ("--set", ["--data", ".", "--set", *values.split()])
            for values in (
                "epochs=0", "epochs=many", "epochs", f"epochs={10**19}", f"epochs={'9' * 5000}",
                "colour=1", "dropout=1", "dropout=nan", "norm_first=maybe", "warmup=0",
                "d_model=10 num_heads=4", "d_model=1000000000 num_heads=1", f"vocab_size={2**32}",
            )
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused(option, arguments, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        T.main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert f"error: argument {option}: " in capsys.readouterr().err.splitlines()[-1]


def test_settings_are_changed_by_name():
    changes = ["d_model=96", "dropout=0.25", "norm_first=false"]
    expected = dataclasses.replace(T.Settings(), d_model=96, dropout=0.25, norm_first=False)
    assert T.change_settings(T.Settings(), changes) == expected


def test_importing_does_nothing(capsys):
    before, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    spec = importlib.util.spec_from_file_location("translation_again", SCRIPT)
    again = importlib.util.module_from_spec(spec)
    sys.modules["translation_again"] = again
    spec.loader.exec_module(again)
    del sys.modules["translation_again"]
    assert again.Settings is not T.Settings
    assert capsys.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before)
    assert signal.getsignal(signal.SIGINT) is handler


# Stopping

LONG = ("--set", *TINY, "dropout=0.2", "batch_tokens=200", "epochs=12", "--beam", 1)


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """The folder of a run that was not stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert run_main("--data", trained[0], "--out", out, *LONG) == 0
    return out


def assert_same_run(out, whole):
    """Assert that a run has ended as one that was not stopped."""
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (out, whole)]
    for a, b in ([state["model"] for state in states], [load(folder) for folder in (out, whole)]):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [[row[:3] for row in state["progress"].pop("rows")] for state in states]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 12
    assert states[0]["progress"] == states[1]["progress"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_and_resuming_gives_the_same_bits(
    trained, whole, tmp_path, capsys, monkeypatch, number, status
):
    old, random, during = signal.getsignal(number), Random(status), []
    batch_loss = T.batch_loss

    def interrupted(*arguments, **options):
        if random.random() < 0.02 and not during:
            signal.raise_signal(number)
            during.append(signal.getsignal(number))  # a second one ends at once
        return batch_loss(*arguments, **options)

    monkeypatch.setattr(T, "batch_loss", interrupted)
    arguments = ("--data", trained[0], "--out", tmp_path, *LONG)
    assert run_main(*arguments) == status
    error = capsys.readouterr().err
    assert (error.count("\n"), "--resume" in error) == (1, True)
    assert during == [old] == [signal.getsignal(number)]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < state["progress"]["step"] < torch.load(whole / "checkpoint.pt")["progress"]["step"]
    assert run_main(*arguments, "--resume") == 0
    assert_same_run(tmp_path, whole)


def test_a_second_ctrl_c_ends_at_once(trained, tmp_path, capsys, monkeypatch):
    def twice(*_, **__):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(T, "batch_loss", twice)
    assert run_main("--data", trained[0], "--out", tmp_path, *LONG) == 130
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_stopped_can_be_resumed(trained, whole, tmp_path):
    process = start("--data", trained[0], *LONG, "--out", tmp_path)
    assert any(re.match(r" +1 ", line) for line in process.stdout), process.stderr.read()
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert (process.returncode, error.count("\n"), "--resume" in error) == (143, 1, True)
    assert run_main("--data", trained[0], *LONG, "--out", tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("when", "saved"), [("evaluate", "checkpoint.pt"), ("draw_attention", "metrics.json")]
)
def test_a_reader_that_leaves_ends_the_run_after_it_was_saved(
    trained, tmp_path, monkeypatch, capsys, when, saved
):
    read, written = os.pipe()
    function = getattr(T, when)

    def leave(*arguments):  # as `| head` does at some time
        monkeypatch.setattr(T, when, function)
        os.close(read)
        return function(*arguments)

    monkeypatch.setattr(T, when, leave)
    with monkeypatch.context() as patched, open(written, "w", encoding="utf-8") as pipe:
        patched.setattr(sys, "stdout", pipe)
        assert run_main("--data", trained[0], "--out", tmp_path, *RUN) == 141
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / saved).exists()
    assert (tmp_path / "metrics.json").exists() == (saved == "metrics.json")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(state["progress"]["rows"]) == (1 if when == "evaluate" else 3)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_can_be_resumed(trained, tmp_path):
    arguments = ("--data", trained[0], *LONG[:-3], "epochs=100", "--beam", 1)
    random = Random(0)
    for _ in range(20):
        process = start(*arguments, "--out", tmp_path / "stopped", "--resume")
        time.sleep(random.uniform(2, 14))  # while it imports, prepares, trains or saves
        process.kill()
        assert "Traceback" not in process.communicate()[1]
        assert process.returncode in (-signal.SIGKILL, 0)  # 0 if it was done before
    for out in ("stopped", "whole"):
        assert run_main(*arguments, "--out", tmp_path / out, "--resume") == 0
    states = [
        torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)
        for out in ("stopped", "whole")
    ]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name])


# Several processes


def in_two_processes(rank, folder, port, pairs, expected, arguments):
    """Train as one of two processes; compare with what one alone computes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    minute = datetime.timedelta(minutes=1)
    dist.init_process_group("gloo", f"file://{folder}/store", minute, world_size=2, rank=rank)
    assert T.gather(rank) == [0, 1]
    for (few, dropout), (loss, gradients) in expected.items():
        model = make(dropout=dropout)
        optimizer = torch.optim.SGD(model.parameters())
        trained = DistributedDataParallel(model, broadcast_buffers=False)
        run = start_run(model, ONE_BATCH, optimizer=optimizer)
        # A signal to one of them stops both.
        assert T.train_epoch(run, trained, pairs[:few], [signal.SIGINT][rank:])
        assert run.progress.loss == pytest.approx(loss, rel=1e-10)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)
    dist.destroy_process_group()

    (*train, out), evaluate = arguments, T.evaluate
    if rank == 0:  # is stopped once it has validated

        def evaluate_and_stop(*args):
            signal.raise_signal(signal.SIGTERM)
            return evaluate(*args)

        T.evaluate = evaluate_and_stop
    assert run_main(*train, "--out", out / "stopped") == 143
    T.evaluate = evaluate
    assert not dist.is_initialized()
    os.environ["MASTER_PORT"] = str(port + 1)
    if rank == 1:  # as if its disk were another
        (out / "elsewhere").mkdir()
    folders = ("stopped", "elsewhere")
    assert run_main(*train, "--resume", "--out", out / folders[rank]) == 1
    dist.destroy_process_group()


def in_the_second(index, *arguments):
    in_two_processes(1 + index, *arguments)


ONE_BATCH = dataclasses.replace(SMALL, batch_tokens=10**6)


def test_two_processes_train_as_one_does(trained, tmp_path, monkeypatch, capsys):
    """With dropout, too: one process does both shares, each with the seed of its rank."""
    pairs, expected = random_pairs(33), {}
    order = T.make_batches(pairs, ONE_BATCH.batch_tokens, Random("0 0"))[0]
    for few, dropout in ((33, 0.0), (1, 0.0), (33, 0.3)):  # of one pair, the second gets nothing
        model = make(dropout=dropout).train()
        shares = [[pairs[i] for i in order[rank::2]] for rank in (0, 1)] if few > 1 else [pairs[:1]]
        count = sum(len(target) - 1 for _, target in pairs[:few])
        total = 0.0
        for rank, share in enumerate(shares):
            torch.manual_seed(hash((0, 0, rank)) % 2**63)
            loss = T.batch_loss(model, share, torch.device("cpu"), smoothing=0.1)
            (loss / count).backward()
            total += loss.item()
        expected[few, dropout] = (total, [p.grad.clone() for p in model.parameters()])
    assert expected[33, 0.0][0] != expected[33, 0.3][0]

    settings = ("--data", trained[0], "--set", *TINY, "epochs=2", "batch_tokens=300", "--beam", 1)
    assert run_main(*settings, "--out", tmp_path / "one") == 0
    capsys.readouterr()
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    arguments = (tmp_path, port, pairs, expected, (*settings, tmp_path))
    second = torch.multiprocessing.spawn(in_the_second, arguments, join=False)
    in_two_processes(0, *arguments)
    while not second.join():
        pass
    out, error = capsys.readouterr()
    assert out.count(" parameters on ") == 1
    assert "processes have read different files" in error

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # one alone resumes what two began
        del os.environ[name]
    state = torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["batch"]) == (1, 1)
    assert run_main(*settings, "--resume", "--out", tmp_path / "stopped") == 0
    weights = load(tmp_path / "one")
    for name, tensor in load(tmp_path / "stopped").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_torchrun_trains_stops_and_resumes(trained, tmp_path):
    arguments = ("--data", trained[0], *LONG)
    process = start(*arguments, "--out", tmp_path / "stopped", torchrun=True)
    assert any(re.match(r" +1 ", line) for line in process.stdout), process.stderr.read()
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    for out, resume in (("stopped", ["--resume"]), ("whole", [])):
        process = start(*arguments, "--out", tmp_path / out, *resume, torchrun=True)
        printed, error = process.communicate()
        assert process.returncode == 0, error
        assert printed.count(" parameters on ") == printed.count("Saved in ") == 1
        assert "Traceback" not in error
    expected = load(tmp_path / "whole")
    for name, tensor in load(tmp_path / "stopped").items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.gpu
def test_it_computes_the_same_on_an_accelerator():
    model = make().float().eval()
    source, target = draw([7, 4, 1]), draw([3, 6, 5])
    expected = model(source, target)
    device = torch.accelerator.current_accelerator()
    found = model.to(device)(source.to(device), target.to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_it_trains_and_searches_on_an_accelerator(trained, tmp_path, capsys):
    device = torch.accelerator.current_accelerator()
    arguments = ("--data", trained[0], "--out", tmp_path, "--set", *TINY, "d_model=32", "epochs=8")
    assert T.main([*map(str, arguments), "batch_tokens=300", "--device", str(device)]) == 0
    scores = json.loads((tmp_path / "metrics.json").read_text())["test"].values()
    assert min(scores) > 50
    assert f"parameters on {device}" in capsys.readouterr().out
