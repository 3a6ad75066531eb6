import copy
import dataclasses
import datetime
import gzip
import importlib
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
import threading
import time
import unicodedata
from collections import Counter
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

import transformer as T
from attention import causal_mask

SCRIPT = Path(T.__file__)
SMALL = T.Settings(
    d_model=16, num_heads=2, num_layers=1, d_ff=32, batch_tokens=200, warmup=20, epochs=2
)
TINY = ("d_model=16", "num_heads=2", "num_layers=1", "d_ff=32", "dropout=0", "warmup=20")


def make(vocab_size=20, d_model=16, num_heads=2, num_layers=2, d_ff=24, dropout=0.0, **options):
    """Make a network in float64, the same every time, with no parameter at 0 or 1."""
    torch.manual_seed(0)
    model = T.Transformer(vocab_size, d_model, num_heads, num_layers, d_ff, dropout, **options)
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


class Theirs(nn.Module):
    """PyTorch's own Transformer with the weights of ours, and the same things around it."""

    def __init__(self, ours, norm_first):
        super().__init__()
        self.embedding, self.positions = copy.deepcopy(ours.embedding), ours.positions
        layer, d_model = ours.encoder[0], ours.embedding.embedding_dim
        self.layers = nn.Transformer(
            d_model, layer.self_attention.num_heads, len(ours.encoder), len(ours.decoder),
            layer.feed_forward[0].out_features, dropout=0.0, batch_first=True,
            norm_first=norm_first,
        )  # fmt: skip
        if not norm_first:  # the paper has no norm after the last layer's own
            self.layers.encoder.norm = self.layers.decoder.norm = None
        self.to(ours.positions.dtype)
        for parameter in self.layers.parameters():
            nn.init.zeros_(parameter)  # the biases of attention, which ours has not, stay so
        with torch.no_grad():
            for parameter, same in self.same(ours):
                same.copy_(parameter)

    def same(self, ours):
        """Yield each parameter of ours with the one here that does the same."""
        modules = [(ours.embedding, self.embedding)]
        if self.layers.encoder.norm is not None:
            modules.append((ours.encoder_norm, self.layers.encoder.norm))
            modules.append((ours.decoder_norm, self.layers.decoder.norm))
        layers = [*ours.encoder, *ours.decoder]
        others = [*self.layers.encoder.layers, *self.layers.decoder.layers]
        for layer, other in zip(layers, others, strict=True):
            pairs = [(layer.self_attention, other.self_attn)]
            if isinstance(layer, T.DecoderLayer):
                pairs.append((layer.cross_attention, other.multihead_attn))
            for heads, other_heads in pairs:
                yield heads.W_qkv.weight, other_heads.in_proj_weight
                yield heads.W_o.weight, other_heads.out_proj.weight
            modules += [(layer.feed_forward[0], other.linear1)]
            modules += [(layer.feed_forward[2], other.linear2)]
            for i, add_norm in enumerate(layer.norms, start=1):
                modules.append((add_norm.norm, getattr(other, f"norm{i}")))
        for module, other in modules:
            yield from zip(module.parameters(), other.parameters(), strict=True)

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
@pytest.mark.parametrize("norm_first", [False, True])
def test_values_and_gradients_are_those_of_pytorch(norm_first):
    ours = make(norm_first=norm_first)
    theirs = Theirs(ours, norm_first)
    source, target = draw([7, 4, 1]), draw([3, 6, 5])
    real = target != T.PAD
    logits, expected = (model(source, target)[real] for model in (ours, theirs))
    torch.testing.assert_close(logits, expected)
    for values in (logits, expected):
        values.sin().sum().backward()
    same = list(theirs.same(ours))
    assert len(same) == len(list(ours.parameters()))
    for parameter, other in same:
        assert parameter.grad.abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_future_changes_nothing(norm_first):
    model = make(norm_first=norm_first)
    source, target = draw([5, 3]), draw([6, 6])
    changed = torch.cat((target[:, :4], 22 - target[:, 4:]), dim=1)
    outputs = [model(source, tokens) for tokens in (target, changed)]
    assert torch.equal(outputs[0][:, :4], outputs[1][:, :4])
    assert not torch.isclose(outputs[0][:, 4:], outputs[1][:, 4:]).all(dim=-1).any()


@pytest.mark.parametrize("norm_first", [False, True])
def test_padding_changes_nothing(norm_first):
    model = make(norm_first=norm_first)
    source, target = draw([5, 3]), draw([6, 4])
    expected = model(source, target)
    wider = model(F.pad(source, (0, 3)), F.pad(target, (0, 2)))
    torch.testing.assert_close(wider[:, :6], expected, rtol=0, atol=1e-12)
    alone = model(source[1:, :3], target[1:, :4])
    torch.testing.assert_close(alone, expected[1:, :4], rtol=0, atol=1e-12)
    with torch.no_grad():
        model.embedding.weight[T.PAD] += 1
    changed = model(source, target)
    assert torch.equal(changed[target != T.PAD][:, 1:], expected[target != T.PAD][:, 1:])


def parameter_count(V, d, layers, d_ff, norm_first=False):
    feed_forward = d * d_ff + d_ff + d_ff * d + d
    encoder = 4 * d * d + feed_forward + 2 * 2 * d
    decoder = 2 * 4 * d * d + feed_forward + 3 * 2 * d
    return V * d + layers * (encoder + decoder) + norm_first * 2 * 2 * d


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_parameters_are_counted_by_the_formula(norm_first):
    model = T.Transformer(20, 16, 2, 3, 24, 0.1, norm_first)
    expected = parameter_count(20, 16, 3, 24, norm_first)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_base_model_is_as_large_as_the_paper_says():
    with torch.device("meta"):
        model = T.Transformer(37_000, 512, 8, 6, 2048, 0.1)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == parameter_count(37_000, 512, 6, 2048)
    assert parameters == pytest.approx(65e6, rel=0.05)


def test_source_target_and_output_share_one_embedding():
    model = make()
    source, target = draw([4]), draw([3])
    assert [p.shape[0] for p in model.parameters()].count(20) == 1
    before = model(source, target)
    for token in (source[0, 0], target[0, 0]):
        with torch.no_grad():
            model.embedding.weight[token] += 1
        after = model(source, target)
        assert (after - before).abs().min() > 0
        before = after
    unused = next(i for i in range(3, 20) if i not in source and i not in target)
    with torch.no_grad():
        model.embedding.weight[unused] *= 2
    after = model(source, target)
    torch.testing.assert_close(after[..., unused], 2 * before[..., unused])


def test_the_shapes_are_those_of_the_docstrings():
    model = make()
    source, target = draw([7, 4, 1]), draw([3, 5, 5])
    memory = model.encode(source)
    logits, weights = model.decode(target, memory, source, need_weights=True)
    assert memory.shape == (3, 7, 16)
    assert (logits.shape, weights.shape) == ((3, 5, 20), (3, 2, 5, 7))
    torch.testing.assert_close(logits, model(source, target))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    assert weights.masked_select((source == T.PAD)[:, None, None]).eq(0).all()


def test_dropout_is_for_training_only():
    model = make(dropout=0.5)
    source, target = draw([4]), draw([3])
    assert not torch.equal(model(source, target), model(source, target))
    model.eval()
    assert torch.equal(model(source, target), model(source, target))


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_is_that_of_pytorch(p, dtype):
    torch.manual_seed(0)
    dropout, x = T.Dropout(p), torch.ones(101, 1003, dtype=dtype, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    dropped = y == 0
    assert y.dtype == dtype
    assert dropped.double().mean().item() == pytest.approx(p, abs=0.006)  # 256ths, and chance
    assert dropped.double().mean(dim=0).std().item() == pytest.approx(
        math.sqrt(p * (1 - p) / 101), rel=0.1
    )
    torch.testing.assert_close(
        y.masked_select(~dropped).mean().item(), 1 / (1 - p), rtol=0.01, atol=0
    )
    assert torch.equal(x.grad, y)  # the same mask, and the same scale
    assert dropout.eval()(x) is x


def test_a_sequence_that_is_too_long_is_refused():
    model = make()
    longest, short = draw([T.MAX_LENGTH]), draw([2])
    assert model(longest, longest).isfinite().all()
    longer = F.pad(longest, (0, 1), value=5)
    for source, target in ((longer, short), (short, longer)):
        with pytest.raises(ValueError, match=f"{T.MAX_LENGTH + 1} .* {T.MAX_LENGTH}"):
            model(source, target)


def test_it_starts_with_embeddings_as_large_as_the_positions():
    torch.manual_seed(0)
    model = T.Transformer(500, 64, 4, 1, 64, 0.0)
    tokens = torch.randint(500, (50, 20))
    embedded = model.embed(tokens) - model.positions[:20]
    assert embedded.std().item() == pytest.approx(1, rel=0.05)
    assert 0.5 < model(tokens, tokens).var().item() < 2


@pytest.mark.parametrize(("d_model", "warmup"), [(512, 4000), (64, 10)])
def test_the_rate_is_that_of_section_5_3(d_model, warmup):
    for step in (1, 2, warmup // 2, warmup, warmup + 1, 4 * warmup):
        expected = 1 / math.sqrt(d_model) * min(1 / math.sqrt(step), step / warmup**1.5)
        assert T.rate(step, d_model, warmup) == pytest.approx(expected)
    rates = [T.rate(step, d_model, warmup) for step in range(1, 3 * warmup)]
    assert max(rates) == rates[warmup - 1]
    assert rates[warmup // 2 - 1] == pytest.approx(rates[warmup - 1] / 2)
    assert T.rate(4 * warmup, d_model, warmup) == pytest.approx(max(rates) / 2)


def after(steps):
    """Make what looks like an Event that is set once it has been asked so many times."""

    class Event(threading.Event):
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked >= steps

    return Event()


def adam(model):
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)


def train(model, optimizer, pairs, progress, settings=SMALL, event=None):
    return T.train_epoch(model, optimizer, pairs, settings, progress, event or threading.Event())


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


def test_a_step_has_the_smoothed_loss_and_the_rate_of_the_paper():
    model, pairs, progress = make(), random_pairs(5), T.Progress(seed=0)
    total, count = smoothed_loss(model, pairs)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert train(model, optimizer, pairs, progress, dataclasses.replace(SMALL, batch_tokens=10**6))
    assert (progress.count, progress.step, progress.batch) == (count, 1, 1)
    assert progress.loss == pytest.approx(total, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == T.rate(1, SMALL.d_model, SMALL.warmup)


def test_the_loss_of_an_epoch_is_the_mean_over_its_tokens_and_the_rate_falls():
    model, pairs, progress = make(), random_pairs(40), T.Progress(seed=0)
    total, count = smoothed_loss(model, pairs)

    class Still(torch.optim.SGD):
        rates = ()

        def step(self):
            self.rates += (self.param_groups[0]["lr"],)

    optimizer = Still(model.parameters())
    train(model, optimizer, pairs, progress)
    assert progress.step == len(optimizer.rates) > 2
    for n, found in enumerate(optimizer.rates):
        left = 1 - n / len(optimizer.rates) / SMALL.epochs
        assert found == pytest.approx(left * T.rate(n + 1, SMALL.d_model, SMALL.warmup))
    assert progress.loss / progress.count == pytest.approx(total / count, rel=1e-12)


def test_evaluate_gives_the_mean_loss_of_a_token_and_changes_nothing():
    model, pairs = make(dropout=0.5), random_pairs(30)
    before = copy.deepcopy(model.state_dict())
    losses = []
    for tokens in (50, 1000):
        losses.append(T.evaluate(model, pairs, tokens))
    expected = []
    for source, target in pairs:
        logits = model.eval()(torch.tensor([source]), torch.tensor([target[:-1]]))[0]
        expected += F.cross_entropy(logits, torch.tensor(target[1:]), reduction="none").tolist()
    assert losses == pytest.approx([sum(expected) / len(expected)] * 2, rel=1e-12)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model, pairs, progress = T.Transformer(20, 16, 2, 1, 32, 0.0), random_pairs(60), T.Progress(0)
    optimizer, losses = adam(model), [T.evaluate(model, pairs, 1000)]
    for _ in range(8):
        assert train(model, optimizer, pairs, progress, dataclasses.replace(SMALL, epochs=8))
        losses.append(T.evaluate(model, pairs, 1000))
        progress.epoch, progress.batch = progress.epoch + 1, 0
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_training(value):
    model = make()
    nn.init.constant_(model.decoder[-1].norms[-1].norm.bias, value)
    with pytest.raises(FloatingPointError, match=r"nan|inf"):
        train(model, adam(model), random_pairs(5), T.Progress(0))


@pytest.mark.parametrize("stop", [1, 3, -1])
def test_a_training_that_goes_on_gives_the_weights_of_one_that_was_not_stopped(stop):
    pairs, options = random_pairs(60), {"num_layers": 1, "dropout": 0.3}
    batches = len(T.make_batches(pairs, SMALL.batch_tokens, Random(0)))
    stop %= batches + 1

    def start():
        model = make(**options).float()
        return model, adam(model), T.Progress(seed=3)

    def two_epochs(model, optimizer, progress):
        while progress.epoch < 2:
            assert train(model, optimizer, pairs, progress)
            progress.epoch, progress.batch = progress.epoch + 1, 0

    model, optimizer, progress = start()
    two_epochs(model, optimizer, progress)
    assert progress.step == 2 * batches
    expected = model.state_dict(), dataclasses.asdict(progress)

    model, optimizer, progress = start()
    whole = train(model, optimizer, pairs, progress, event=after(stop))
    assert (whole, progress.batch) == (stop == batches, stop)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), dataclasses.asdict(progress)], buffer)
    buffer.seek(0)
    torch.rand(stop)  # what is drawn elsewhere must not matter
    weights, state, numbers = torch.load(buffer, weights_only=True)
    model, optimizer, progress = start()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    progress = T.Progress(**numbers)
    two_epochs(model, optimizer, progress)
    assert dataclasses.asdict(progress) == expected[1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[0][name])


@settings(deadline=None, max_examples=100)
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


@pytest.fixture(scope="module")
def dates():
    return T.date_corpus(T.Settings(epoch_dates=2000), seed=0)


@pytest.fixture(scope="module")
def characters(dates):
    return T.make_tokenizer(itertools.chain(*dates.train(0)), 2000, words=False)


SENTENCES = [
    ("ein hund läuft im schnee .", "a dog runs in the snow ."),
    ("zwei kinder spielen im garten .", "two children play in the garden ."),
    ("eine frau liest ein buch .", "a woman reads a book ."),
    ("ein mann mit hut fährt rad .", "a man with a hat rides a bike ."),
]


@pytest.fixture(scope="module")
def words():
    return T.make_tokenizer(itertools.chain(*SENTENCES), 320, words=True)


texts = st.text() | st.text("<s>/pad\x00\x85\u2028 \t\r\née\u0301ß") | st.sampled_from(SENTENCES[0])


@settings(deadline=None, max_examples=300)
@given(text=texts)
def test_any_text_comes_back_as_it_was(characters, words, text):
    for tokenizer in (characters, words, T.open_tokenizer(words.to_str())):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert all(T.EOS < i < tokenizer.get_vocab_size() for i in ids)


def test_every_known_character_is_one_token(dates, characters):
    text = "".join(sorted(set("".join(itertools.chain(*itertools.chain(*dates.train(0)))))))
    assert len(text) > 300
    assert len(characters.encode(text).ids) == len(text)
    for pair in dates.train(0)[:200]:
        for side in pair:
            assert len(characters.encode(side).ids) == len(side)


def test_words_are_learned_but_not_across_spaces(words):
    assert words.get_vocab_size() <= 320
    assert len(words.encode(SENTENCES[0][0]).ids) <= len(SENTENCES[0][0]) / 2
    assert all(" " not in words.decode([i])[1:] for i in range(words.get_vocab_size()))


def test_sequences_begin_and_end_with_their_marks(words):
    ((source, target),) = T.encode(words, SENTENCES[:1])
    assert (source[-1], target[0], target[-1]) == (T.EOS, T.BOS, T.EOS)
    assert words.decode(source[:-1]) == SENTENCES[0][0]
    assert words.decode(target[1:-1]) == SENTENCES[0][1]


# Dates


def test_no_day_is_in_two_splits(dates):
    def days(pairs):
        return {answer for _, answer in pairs}

    tests = [pair for pairs in dates.tests.values() for pair in pairs]
    assert len(tests) == len(days(tests)) == T.TEST_DAYS
    assert len(dates.validation) == len(days(dates.validation)) == T.VALIDATION_DAYS
    trained = days(dates.train(0)) | days(dates.train(1))
    assert len(trained) > 3000
    assert not days(tests) & days(dates.validation)
    assert not trained & (days(tests) | days(dates.validation))
    every = {datetime.date.fromisoformat(day) for day in trained | days(tests)}
    assert {day.year // 100 for day in every} == {19, 20}
    assert T.FIRST_DAY + datetime.timedelta(days=T.DAYS) == datetime.date(2100, 1, 1)


def test_the_same_seed_gives_the_same_dates(dates):
    again = T.date_corpus(T.Settings(epoch_dates=2000), seed=0)
    assert again.train(1) == dates.train(1) != dates.train(0)
    assert (again.validation, again.tests) == (dates.validation, dates.tests)
    other = T.date_corpus(T.Settings(epoch_dates=2000), seed=1)
    assert other.train(1) != dates.train(1)
    assert other.tests == dates.tests


def test_every_language_is_tested_and_trained_on(dates):
    assert list(dates.tests) == list(T.LANGUAGES)
    assert len(set(T.LANGUAGES)) == len(T.LANGUAGES) >= 20
    assert min(map(len, dates.tests.values())) >= 190
    for language, pairs in dates.tests.items():
        for text, answer in pairs[:20]:
            day = datetime.date.fromisoformat(answer)
            assert text in {T.format_date(day, f, language) for f in T.date_forms(language)}
    text = "".join(text for text, _ in dates.train(0))
    scripts = Counter(unicodedata.name(c).split()[0] for c in text if c.isalpha())
    assert len([script for script, count in scripts.items() if count > 200]) >= 9
    assert {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "CJK"} <= set(scripts)


def test_no_text_can_be_read_as_two_dates():
    meaning, day = {}, datetime.date(1968, 1, 1)
    while day.year == 1968:
        for language in T.LANGUAGES:
            for form in T.date_forms(language):
                text = T.format_date(day, form, language)
                assert meaning.setdefault(text, day) == day, f"{text}: {meaning[text]} and {day}"
                assert "1968" in text
        day += datetime.timedelta(days=1)
    assert len(meaning) > 366 * len(T.LANGUAGES)
    assert all(T.date_forms(language) for language in T.LANGUAGES)


# Search


def greedy(model, source, limit):
    """Take the likeliest token again and again, for one source and without a cache."""
    target = [T.BOS]
    while len(target) <= limit and target[-1] != T.EOS:
        logits = model(source, torch.tensor([target]))[0, -1]
        logits[T.PAD] = -math.inf
        target.append(logits.argmax().item())
    return [i for i in target if i > T.EOS]


def reverser(vocab_size, norm_first=False, epochs=4):
    """Make a network in float64 that has begun to learn to reverse sequences."""
    torch.manual_seed(0)
    model, progress = T.Transformer(vocab_size, 16, 2, 2, 32, 0.0, norm_first), T.Progress(0)
    pairs = [(ids, [T.BOS, *ids[-2::-1], T.EOS]) for ids, _ in random_pairs(400, vocab_size)]
    optimizer, easy = adam(model), dataclasses.replace(SMALL, warmup=100, epochs=2 * epochs)
    for progress.epoch in range(epochs):
        progress.batch = 0
        train(model, optimizer, pairs, progress, easy)
    return model.double().eval()


@pytest.fixture(scope="module", params=[False, True], ids=["post-norm", "pre-norm"])
def searched(request):
    """A network and sources (B, S)."""
    model = reverser(12, request.param)
    torch.manual_seed(1)
    return model, draw([9, 4, 1, 6, 2, 7], vocab_size=12)


@torch.inference_mode()
def test_a_beam_of_1_is_greedy(searched):
    model, source = searched
    found = T.search(model, source, beam=1)
    for row, ids in zip(source, found, strict=True):
        row = row[row != T.PAD]
        assert ids == greedy(model, row[None], limit=2 * source.shape[1] + 20)
    assert len(set(map(len, found))) >= 3


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("beam", [1, 4])
def test_the_cache_changes_no_token(searched, beam, alpha):
    model, source = searched
    found = T.search(model, source, beam, alpha)
    assert found == T.search(model, source, beam, alpha, use_cache=False)
    assert len(set(map(len, found))) >= 3
    for row, ids in zip(source, found, strict=True):
        if len(ids) < 20:  # else it has no end, and alone another limit
            assert T.search(model, row[row != T.PAD][None], beam, alpha) == [ids]


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_cache_changes_no_logit(norm_first):
    model = make(norm_first=norm_first)
    source, target = draw([5, 3]), draw([6, 6])
    memory, caches = model.encode(source), [T.Cache() for _ in model.decoder]
    parts = [
        model.decode(part, memory, source, caches)[0] for part in target.split([1, 3, 2], dim=1)
    ]
    expected = model(source, target)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def unsure():
    return reverser(6, epochs=3)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@torch.inference_mode()
def test_a_wide_beam_finds_what_trying_everything_finds(unsure, monkeypatch, alpha):
    limit, V = 4, 6
    model, source = unsure, draw([3, 1, 2, 3], vocab_size=V)
    others = [i for i in range(V) if i not in (T.PAD, T.EOS)]
    targets = [(*head, T.EOS) for n in range(limit) for head in itertools.product(others, repeat=n)]
    targets += itertools.product(others, repeat=limit)
    labels = T.pad(targets, "cpu")
    inputs = F.pad(labels[:, :-1], (1, 0), value=T.BOS)
    lengths = (labels != T.PAD).sum(dim=1)
    expected = []
    for row in source:
        logits = model(row[row != T.PAD].repeat(len(targets), 1), inputs)
        log_p = logits.log_softmax(dim=-1).gather(2, labels.unsqueeze(2)).squeeze(2)
        score = log_p.where(labels != T.PAD, 0).sum(dim=1) / ((5 + lengths) / 6) ** alpha
        expected.append([i for i in targets[score.argmax()] if i > T.EOS])
    monkeypatch.setattr(T, "MAX_LENGTH", limit)
    assert T.search(model, source, beam=len(targets), alpha=alpha) == expected
    assert len(set(map(tuple, expected))) > 1


def test_a_beam_wider_than_the_vocabulary_is_searched(searched):
    model, source = searched
    assert any(T.search(model, source[:2], beam=50))


def test_translate_keeps_order_and_says_what_it_leaves_out(words):
    torch.manual_seed(0)
    model, progress = T.make_model(SMALL, words), T.Progress(0)
    pairs, quick = T.encode(words, SENTENCES * 20), dataclasses.replace(SMALL, epochs=8)
    optimizer = adam(model)
    for progress.epoch in range(quick.epochs):
        progress.batch = 0
        train(model, optimizer, pairs, progress, quick)
    pairs = SENTENCES * 60
    Random(0).shuffle(pairs)
    others = {3: "", 50: "  \t", 117: "☃\x00 чужой", 118: "x " * 300, 239: ""}
    lines = [others.get(i, source) for i, (source, _) in enumerate(pairs)]
    found = T.translate(model, words, lines, beam=2)
    assert isinstance(found[117], str)
    expected = {3: "", 50: "", 117: found[117], 118: None, 239: ""}
    assert found == [expected.get(i, answer) for i, (_, answer) in enumerate(pairs)]
    assert T.translate(model, words, [], beam=2) == []


def test_a_line_of_the_greatest_length_is_translated(characters):
    model = T.Transformer(characters.get_vocab_size(), 16, 2, 1, 24, 0.0)
    found = T.translate(model, characters, ["1" * (T.MAX_LENGTH - 1), "1" * T.MAX_LENGTH], beam=1)
    assert isinstance(found[0], str)
    assert found[1] is None


# Parallel text


@pytest.fixture
def folder(tmp_path):
    """A data set of a few sentences, over and over; some files are gzipped."""
    folder = tmp_path / "some text"
    folder.mkdir()
    splits = {"train": SENTENCES * 30, "val": SENTENCES[:2], "test2016": SENTENCES[2:]}
    for split, pairs in {**splits, "test.more": SENTENCES}.items():
        for language, lines in zip(("de", "en"), zip(*pairs, strict=True), strict=True):
            content = "".join(f"{line}\n" for line in lines).encode()
            if split == "train":
                (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{split}.{language}").write_bytes(content)
    return folder


def test_text_is_read_from_plain_and_gzipped_files(folder):
    corpus = T.text_corpus(folder, ("de", "en"))
    assert corpus.train(0) == corpus.train(5) == SENTENCES * 30
    assert corpus.validation == SENTENCES[:2]
    assert corpus.tests == {"test.more": SENTENCES, "test2016": SENTENCES[2:]}
    turned = T.text_corpus(folder, ("en", "de"))
    assert turned.validation == [(b, a) for a, b in SENTENCES[:2]]


def test_only_a_line_feed_ends_a_line(tmp_path):
    (tmp_path / "a").write_bytes("one\x0b\x1c\u2028 still\n\ntwo".encode())
    assert T.read_lines(tmp_path / "a") == ["one\x0b\x1c\u2028 still", "", "two"]
    (tmp_path / "b").write_bytes(b"from\r\nWindows\r\n")
    assert T.read_lines(tmp_path / "b") == ["from", "Windows"]


@pytest.mark.parametrize("nothing", ["", " ", "\t\xa0"])
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
        ("val.en", lambda path: path.write_text("\n" * 3), "val.de and val.en have 2 and 3 lines"),
    ],
    ids=range(8),
)
def test_broken_text_is_named(folder, name, spoil, message):
    spoil(folder / name)
    with pytest.raises(OSError, match=message) as caught:
        T.text_corpus(folder, ("de", "en"))
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def run_main(*arguments):
    return T.main([*map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("split", ["train", "val", "test*"])
@pytest.mark.parametrize("content", [None, b"", b"\n\n"])
def test_a_split_without_sentences_is_refused(folder, tmp_path, capsys, split, content):
    for path in folder.glob(f"{split}.*"):
        path.unlink()
        if content is not None:
            (folder / path.name.removesuffix(".gz")).write_bytes(content)
    arguments = ("--data", folder, "--out", tmp_path / "out", "--beam", 1)
    assert run_main(*arguments, "--set", "epochs=1", *TINY) == 1
    error = capsys.readouterr().err
    assert str(folder) in error
    assert len(error.splitlines()) == 1


def test_pairs_that_are_left_out_are_counted(folder, tmp_path, capsys):
    for language, lines in (("de", "\nein hund\n\nein\n"), ("en", f"a dog\n\n\n{'x ' * 300}\n")):
        with gzip.open(folder / f"train.{language}.gz", "at") as file:
            file.write(lines)
    for split in ("val", "test2016"):
        lines = T.read_lines(folder / f"{split}.de")
        (folder / f"{split}.de").write_text("\n".join(["x " * 300, *lines[1:], ""]))
    arguments = ("--data", folder, "--out", tmp_path / "out", "--beam", 1)
    assert run_main(*arguments, "--set", "epochs=1", *TINY) == 0
    assert "4 of 124 pairs are left out" in capsys.readouterr().out


def test_a_test_that_begins_with_an_odd_pair_is_scored(folder, tmp_path, capsys):
    for language, text in (("de", ""), ("en", "$a$ $")):
        path = folder / f"test.more.{language}"
        path.write_text(f"{text}\n{path.read_text()}")
    arguments = ("--data", folder, "--out", tmp_path / "out", "--beam", 1)
    assert run_main(*arguments, "--set", "epochs=1", *TINY) == 0
    assert (tmp_path / "out/attention.png").exists()


# Files


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
    for name, tensor in T.make_model(SMALL, words).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert tokenizer.encode("<s> hund").ids == words.encode("<s> hund").ids


def without_settings(content):
    return safetensors.torch.save(safetensors.torch.load(content))


def with_other_sizes(content):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    header["settings"] = header["settings"].replace('"d_ff": 32', '"d_ff": 16')
    return safetensors.torch.save(safetensors.torch.load(content), header)


@pytest.mark.parametrize(
    "spoil",
    [
        None,
        lambda content: b"",
        lambda content: b"a text",
        lambda content: content[:-1],
        lambda content: content[:100],
        without_settings,
        with_other_sizes,
    ],
    ids=["missing", "empty", "text", "truncated", "header", "without settings", "other sizes"],
)
def test_a_model_that_is_none_is_refused_in_one_line(saved, tmp_path, capsys, spoil):
    path = tmp_path / "model.safetensors"
    if spoil:
        path.write_bytes(spoil((saved / "model.safetensors").read_bytes()))
    assert run_main("--out", tmp_path, "--translate", "ein hund") == 1
    error = capsys.readouterr().err
    assert str(path) in error
    assert len(error.splitlines()) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of a data set and of a run on it that has ended."""
    base = tmp_path_factory.mktemp("trained")
    data, out = base / "data", base / "out"
    data.mkdir()
    for split, pairs in (("train", SENTENCES * 30), ("val", SENTENCES), ("test", SENTENCES)):
        for language, lines in zip(("de", "en"), zip(*pairs, strict=True), strict=True):
            (data / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert run_main("--data", data, "--out", out, "--set", "epochs=2", *TINY) == 0
    return data, out


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(trained, capsys):
    data, out = trained
    arguments = ("--data", data, "--out", out, "--resume", "--set", *TINY)
    weights = (out / "model.safetensors").read_bytes()
    for changed, message in (
        (("epochs=3", "--seed", 0), r"epochs\D* 2\b"),
        (("epochs=2", "d_ff=48"), r"d_ff\D* 32\b"),
        (("epochs=2", "--seed", 7), r"seed\D* 0\b"),
        (("epochs=2", "--from", "en", "--to", "de"), r"languages\W.*de.*en"),
    ):
        assert run_main(*arguments, *changed) == 1
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert str(out) in error
        assert len(error.splitlines()) == 1
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: b"a text",
        lambda content: content[: len(content) // 2],
        lambda content: safetensors.torch.save({"weight": torch.zeros(3)}),
    ],
    ids=["empty", "text", "truncated", "other"],
)
def test_a_broken_checkpoint_is_refused_in_one_line(trained, tmp_path, capsys, spoil):
    data, out = trained
    content = spoil((out / "checkpoint.pt").read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(content)
    arguments = ("--data", data, "--out", tmp_path, "--resume")
    assert run_main(*arguments, "--set", "epochs=2", *TINY) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "checkpoint.pt") in error
    assert len(error.splitlines()) == 1


def test_a_checkpoint_that_runs_code_is_refused(trained, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"run": Trap()}, tmp_path / "checkpoint.pt")
    assert run_main("--data", trained[0], "--out", tmp_path, "--resume") == 1
    assert not (tmp_path / "trapped").exists()


def test_a_run_without_a_checkpoint_begins(trained, tmp_path, capsys):
    data, out = trained
    arguments = ("--data", data, "--out", tmp_path, "--resume", "--set", "epochs=2", *TINY)
    assert run_main(*arguments) == 0
    assert f"no {tmp_path / 'checkpoint.pt'} yet" in capsys.readouterr().err
    for name, tensor in load(out).items():
        assert torch.equal(tensor, load(tmp_path)[name])


def test_a_run_that_has_ended_can_be_resumed(trained, tmp_path, capsys):
    data, out = trained
    before = json.loads((out / "metrics.json").read_text())
    arguments = ("--data", data, "--out", out, "--resume")
    assert run_main(*arguments, "--set", "epochs=2", *TINY) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["test"], metrics["epochs"]) == (before["test"], before["epochs"])


def test_a_loss_that_breaks_ends_in_one_line_and_saves_nothing(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(T.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * math.nan)
    (tmp_path / "model.safetensors").write_bytes(b"old")
    handler = signal.getsignal(signal.SIGINT)
    assert run_main("--data", trained[0], "--out", tmp_path, "--set", *TINY) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"
    assert signal.getsignal(signal.SIGINT) is handler


# As a person runs it


def start(*arguments, torchrun=False, **options):
    """Start the script, or two of it under torchrun."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(SCRIPT), *map(str, arguments), "--device", "cpu"]
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def load(out):
    return safetensors.torch.load_file(out / "model.safetensors")


def test_dates_are_learned_end_to_end(run_script, tmp_path):
    out = tmp_path / "out"
    done = run_script(
        "transformer.py", "--device", "cpu", "--beam", 1, "--out", out,
        "--set", "epochs=1", "epoch_dates=1500", "batch_tokens=500", *TINY, "warmup=60",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"Test: {metrics['test']['all']:.2%} of 5,000 dates" in done.stdout
    assert list(metrics["test"]) == ["all", *T.LANGUAGES]
    ((epoch, loss, validation, seconds),) = metrics["epochs"]
    assert f"{epoch:5}  {loss:13.4f}  {validation:15.4f}  {seconds:7.1f}" in done.stdout
    for name in ("losses", "attention"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    model, tokenizer = T.open_model(out / "model.safetensors")
    parameters = sum(p.numel() for p in model.parameters())
    assert done.stdout.startswith(f"{parameters:,} parameters on cpu, 1,500 pairs an epoch\n")
    corpus = T.date_corpus(T.Settings(), seed=0)
    torch.set_float32_matmul_precision("medium")  # as main does
    torch.backends.cuda.enable_flash_sdp(False)
    loss = T.evaluate(model, T.encode(tokenizer, corpus.validation), 1000)
    assert loss == pytest.approx(validation, rel=1e-4)

    lines = ["12 mars 2021", "", "☃\r\x85\x0b\x1c\u2028 ?", "1" * 300, " ", "3. Mai 1968"]
    expected = T.translate(model, tokenizer, lines, beam=4)
    process = start("--out", out, "--translate", "-", stdin=subprocess.PIPE)
    found, error = process.communicate("\n".join(lines))
    assert (process.returncode, error) == (0, f"line 4 is longer than {T.MAX_LENGTH} tokens\n")
    assert expected[0] and expected[1] == expected[4] == ""
    assert found.split("\n") == [*((text or "").replace("\n", " ") for text in expected), ""]


def test_one_text_is_translated(saved, words, capsys):
    assert run_main("--out", saved, "--translate", "ein hund", "--beam", 2) == 0
    model, tokenizer = T.open_model(saved / "model.safetensors")
    expected = T.translate(model, tokenizer, ["ein hund"], beam=2)[0]
    assert expected
    assert capsys.readouterr() == (" ".join(expected.split("\n")) + "\n", "")


def test_dates_are_scored_by_exact_match(capsys):
    tests = {name: [(f"{name} {i}", str(i)) for i in range(4)] for name in ("en", "fr")}
    scores = T.print_dates(tests, {"en": ["0", "1", "2", "3"], "fr": ["0", "1", "7", "3"]})
    assert scores == {"all": 0.875, "en": 1.0, "fr": 0.75}
    _, shares, examples = capsys.readouterr().out.strip().split("\n", 2)
    assert shares.split() == ["en", "100.0%", "fr", "75.0%"]
    first, *others = examples.strip().splitlines()
    assert first.split() == ["fr", "7", "not", "2", "fr", "2"]
    assert others


def test_text_is_learned_end_to_end(trained, tmp_path, capsys):
    data, _ = trained
    out = tmp_path / "out"
    arguments = ("--data", data, "--out", out, "--set", *TINY, "d_model=32", "batch_tokens=300")
    assert run_main(*arguments, "epochs=12") == 0
    printed = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["test"]) == 2
    for name, score in metrics["test"].items():
        split, signature = name.split()
        assert f"{split}: BLEU {score:.2f}  {signature}" in printed
        assert score > 50  # it has seen these sentences
    assert {name.split("case:")[1][:2] for name in metrics["test"]} == {"mi", "lc"}
    for name in ("losses", "attention"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert run_main("--out", out, "--translate", SENTENCES[0][0]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_the_best_network_is_kept_and_not_the_last(trained, tmp_path, capsys, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    weights = []

    def evaluate(model, *_):
        weights.append(copy.deepcopy(model.state_dict()))
        return next(losses)

    monkeypatch.setattr(T, "evaluate", evaluate)
    arguments = ("--data", trained[0], "--out", tmp_path, "--beam", 1)
    assert run_main(*arguments, "--set", "epochs=3", *TINY) == 0
    for name, tensor in load(tmp_path).items():
        assert torch.equal(tensor, weights[1][name])
        assert not torch.equal(tensor, weights[2][name])


def test_input_that_is_no_text_is_still_a_line(saved, monkeypatch, capsys):
    raw = io.TextIOWrapper(io.BytesIO(b"\n\xff\xfe\n\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", raw)
    assert run_main("--out", saved, "--translate", "-") == 0
    lines = capsys.readouterr().out.split("\n")
    assert (len(lines), lines[0], lines[2]) == (4, "", "")


def resume_and_compare(arguments, tmp_path):
    """Go on in the folder `stopped`, and see that it ends as a run that was not stopped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process that was stopped had; sums differ with their number
    assert run_main(*arguments, "--out", tmp_path / "stopped", "--resume") == 0
    assert run_main(*arguments, "--out", tmp_path / "whole") == 0
    torch.set_num_threads(threads)
    states = [
        torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)
        for out in ("stopped", "whole")
    ]
    models = [load(tmp_path / out) for out in ("stopped", "whole")]
    for a, b in ([state["model"] for state in states], models):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [[row[:3] for row in state["progress"].pop("rows")] for state in states]
    assert rows[0] == rows[1]
    assert states[0]["progress"] == states[1]["progress"]


LONG = ("--set", *TINY, "dropout=0.2", "batch_tokens=200", "epochs=20", "--beam", 1)


def wait_for_an_epoch(process):
    assert any(re.match(r" +\d", line) for line in process.stdout), process.stderr.read()


def test_a_run_that_was_stopped_and_resumed_gives_the_same_weights(trained, tmp_path, capsys):
    arguments = ("--data", trained[0], *LONG)
    process = start(*arguments, "--out", tmp_path / "stopped")
    wait_for_an_epoch(process)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert (process.returncode, len(error.splitlines())) == (130, 1)
    assert "--resume" in error
    state = torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)
    assert 1 <= state["progress"]["epoch"] < 20
    resume_and_compare(arguments, tmp_path)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_can_be_resumed(trained, tmp_path, capsys):
    arguments = ("--data", trained[0], *LONG[:-3], "epochs=100", "--beam", 1)
    random = Random(0)
    for _ in range(20):
        process = start(*arguments, "--out", tmp_path / "stopped", "--resume")
        time.sleep(random.uniform(2, 14))  # while it imports, prepares, trains or saves
        process.kill()
        assert "Traceback" not in process.communicate()[1]
        assert process.returncode in (-signal.SIGKILL, 0)  # 0 if it was done before
    resume_and_compare(arguments, tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--beam", "0"],
        ["--device", "abacus"],
        ["--data", "no/such/folder"],
        ["--set", "epochs=0"],
        ["--set", "epochs=many"],
        ["--set", "epochs"],
        ["--set", "colour=1"],
        ["--set", "dropout=1"],
        ["--set", "dropout=nan"],
        ["--set", "norm_first=maybe"],
        ["--set", "warmup=0"],
        ["--set", "d_model=10", "num_heads=4"],
    ],
    ids=" ".join,
)
def test_a_value_that_makes_no_sense_is_refused(arguments, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        T.main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_settings_are_changed_by_name():
    changed = T.change_settings(T.TEXT, ["d_model=96", "dropout=0.25", "norm_first=true"])
    assert changed == dataclasses.replace(T.TEXT, d_model=96, dropout=0.25, norm_first=True)


# Several processes


def share_batches(rank, folder, port, pairs, expected, arguments):
    """Train as one of two processes; compare with what one alone computes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    minute = datetime.timedelta(minutes=1)
    dist.init_process_group("gloo", f"file://{folder}/store", minute, world_size=2, rank=rank)
    model = make()
    trained = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters())
    for few, (loss, gradients) in expected.items():
        progress = T.Progress(seed=0)
        assert train(trained, optimizer, pairs[:few], progress)
        assert progress.loss == pytest.approx(loss, rel=1e-10)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)
    dist.destroy_process_group()
    assert run_main(*arguments) == 0
    assert not dist.is_initialized()


def in_the_second(index, *arguments):
    share_batches(1 + index, *arguments)


def test_two_processes_train_as_one_does(trained, tmp_path, monkeypatch, capsys):
    pairs, expected = random_pairs(33), {}
    model = make()
    optimizer = torch.optim.SGD(model.parameters())
    for few in (33, 1):  # of one pair, the second process gets nothing
        progress = T.Progress(seed=0)
        assert train(model, optimizer, pairs[:few], progress)
        expected[few] = (progress.loss, [p.grad.clone() for p in model.parameters()])

    settings = ("--data", trained[0], "--set", *TINY, "epochs=2", "batch_tokens=300", "--beam", 1)
    assert run_main(*settings, "--out", tmp_path / "one") == 0
    capsys.readouterr()
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    arguments = (tmp_path, port, pairs, expected, (*settings, "--out", tmp_path / "both"))
    second = torch.multiprocessing.spawn(in_the_second, arguments, join=False)
    share_batches(0, *arguments)
    while not second.join():
        pass
    out, error = capsys.readouterr()
    assert out.count(" parameters on ") == out.count("Saved in ") == 1
    assert error == ""
    weights = load(tmp_path / "one")
    for name, tensor in load(tmp_path / "both").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_torchrun_trains_stops_and_resumes(trained, tmp_path):
    arguments = ("--data", trained[0], *LONG)
    process = start(*arguments, "--out", tmp_path / "stopped", torchrun=True)
    wait_for_an_epoch(process)
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_read_unseen_dates(seed, tmp_path):
    assert T.main(["--seed", str(seed), "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test"]["all"] >= 0.995


@pytest.mark.gpu
def test_it_computes_the_same_on_an_accelerator():
    model = make().float()
    source, target = draw([7, 4, 1]), draw([3, 6, 5])
    expected = model(source, target)
    device = torch.accelerator.current_accelerator()
    found = model.to(device)(source.to(device), target.to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_importing_does_nothing(capsys):
    before, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    importlib.reload(T)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before)
    assert signal.getsignal(signal.SIGINT) is handler
