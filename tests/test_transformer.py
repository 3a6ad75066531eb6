import contextlib
import dataclasses
import functools
import io
import json
import math
import signal
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import conftest
import transformer as T
from attention import causal_mask, padding_mask
from conftest import assert_half_dropped, watch
from inputs import dates

SMALL = T.Sizes(d_model=16, num_heads=2, num_layers=2, d_ff=24, dropout=0.0)
BASE = T.Sizes(d_model=512, num_heads=8, num_layers=6, d_ff=2048, dropout=0.1)


make = functools.partial(conftest.make, norm_first=False)
draw = functools.partial(conftest.draw, lowest=4)  # no UNKNOWN


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_values_and_gradients_are_those_of_pytorch():
    conftest.assert_equals_pytorch(make())


def test_the_future_changes_nothing():
    model = make()
    source, target = draw([5, 3]), draw([6, 6])
    changed = torch.cat((target[:, :4], 23 - target[:, 4:]), dim=1)
    before, after = (model(source, tokens) for tokens in (target, changed))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:, 4:], after[:, 4:]).all(dim=-1).any()


def test_padding_changes_nothing():
    model = make()
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


def parameter_count(V, sizes):
    d, d_ff = sizes.d_model, sizes.d_ff
    feed_forward = d * d_ff + d_ff + d_ff * d + d
    encoder = 4 * d * d + feed_forward + 2 * 2 * d
    decoder = 2 * 4 * d * d + feed_forward + 3 * 2 * d
    return V * d + sizes.num_layers * (encoder + decoder)


@pytest.mark.parametrize(("V", "sizes"), [(20, SMALL), (37_000, BASE)])
def test_the_parameters_are_counted_by_the_formula(V, sizes):
    with torch.device("meta"):
        model = T.Transformer(V, sizes)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(V, sizes)


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
    unused = next(i for i in range(4, 20) if i not in source and i not in target)
    with torch.no_grad():
        model.embedding.weight[unused] *= 2
    after = model(source, target)
    torch.testing.assert_close(after[..., unused], 2 * before[..., unused])


def test_a_layer_that_drops_its_sublayers_only_normalizes():
    torch.manual_seed(0)
    sizes, x, mask = T.Sizes(16, 2, 1, 24, dropout=1.0), torch.randn(2, 5, 16), causal_mask(5)
    encoder, decoder = T.EncoderLayer(sizes), T.DecoderLayer(sizes)
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        nn.init.normal_(parameter)
    torch.testing.assert_close(encoder(x, mask), encoder.norm2(encoder.norm1(x)))
    normalized = decoder.norm3(decoder.norm2(decoder.norm1(x)))
    torch.testing.assert_close(decoder(x, mask, x, mask), normalized)
    assert not torch.allclose(encoder.eval()(x, mask), encoder.norm2(encoder.norm1(x)))
    assert not torch.allclose(decoder.eval()(x, mask, x, mask), normalized)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_dropout_is_on_what_a_layer_adds_and_on_nothing_else(kind):
    torch.manual_seed(0)
    sizes = T.Sizes(16, 2, 1, 24, dropout=0.5)
    x, memory = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    mask, memory_mask = torch.rand(2, 8, 8) > 0.3
    network = {"encoder": T.EncoderLayer, "decoder": T.DecoderLayer}[kind]
    layer, without = network(sizes).double(), network(T.Sizes(16, 2, 1, 24)).double()
    without.load_state_dict(layer.state_dict())
    given = (x, mask) if kind == "encoder" else (x, mask, memory, memory_mask)
    assert torch.equal(layer.eval()(*given), without(*given))
    seen = watch(layer.train())
    result = layer(*given)
    attentions = [name for name in ("self_attention", "cross_attention") if name in seen]
    for number, name in enumerate(attentions, start=1):
        inputs, attended = seen[name]
        to_itself = name == "self_attention"
        expected = (x, x, x, mask) if to_itself else (x, memory, memory, memory_mask)
        assert all(map(torch.equal, inputs, expected))
        (added,), normalized = seen[f"norm{number}"]
        assert_half_dropped(added, x, attended)
        x = normalized
    (fed,), _ = seen["feed_forward.0"]
    assert torch.equal(fed, x)
    (added,), normalized = seen[f"norm{len(attentions) + 1}"]
    assert_half_dropped(added, x, seen["feed_forward.2"][1])
    assert torch.equal(result, normalized)


@pytest.mark.parametrize("d_model", [16, 12])
def test_embeddings_are_scaled_and_get_the_positions_from_start_on(d_model):
    torch.manual_seed(0)
    model = T.Transformer(30, T.Sizes(d_model, 2, 1, 24)).double()
    tokens = torch.tensor([[5, 29, 5, T.PAD], [7, 4, 6, 21]])
    embeddings, positions = model.embedding.weight.detach().numpy(), model.positions.numpy()
    for start in (0, 4):
        expected = math.sqrt(d_model) * embeddings[tokens.numpy()] + positions[start : start + 4]
        found = model.embed(tokens, start).detach().numpy()
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected)
    model.embed(tokens).sum().backward()
    gradient = math.sqrt(d_model) * np.bincount(tokens.flatten(), minlength=30)
    np.testing.assert_allclose(model.embedding.weight.grad[:, 0], gradient)


def test_dropout_is_on_the_sum_of_embeddings_and_positions():
    model, tokens = make(dropout=0.5), draw([50] * 4)
    expected = make().embed(tokens)
    assert_half_dropped(model.embed(tokens), torch.zeros_like(expected), expected)
    assert torch.equal(model.eval().embed(tokens), expected)


def test_tokens_stay_on_their_device():
    model, source, target = make(), draw([5, 3]), draw([6, 4])
    with torch.device("meta"):  # where every tensor is made that names no device
        assert model(source, target).device == source.device
        assert model.embed(target, start=2).device == source.device
        for generate in (T.generate, T.generate_cached):
            assert len(generate(model, source, limit=3)) == 2


def test_dropout_stands_after_the_embedding_and_each_sublayer():
    model = make(dropout=0.5)
    applied = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output: applied.append(module.p))
    model(draw([4]), draw([3]))
    assert applied == [0.5] * (2 + 2 * 2 + 2 * 3)


def test_a_sequence_that_is_too_long_is_refused():
    model = make()
    longest, short = draw([T.MAX_LENGTH]), draw([2])
    assert model(longest, longest).isfinite().all()
    longer = F.pad(longest, (0, 1), value=5)
    for source, target in ((longer, short), (short, longer)):
        with pytest.raises(ValueError):
            model(source, target)
    assert model.embed(short, start=T.MAX_LENGTH - 2).isfinite().all()
    with pytest.raises(ValueError):
        model.embed(short, start=T.MAX_LENGTH - 1)


def test_the_lengths_are_told_if_a_sequence_is_too_long():
    with pytest.raises(ValueError, match=f"{T.MAX_LENGTH + 1} .* {T.MAX_LENGTH}"):
        make().embed(draw([2]), start=T.MAX_LENGTH - 1)


def test_it_starts_with_embeddings_as_large_as_the_positions():
    torch.manual_seed(0)
    model = T.Transformer(500, T.Sizes(num_layers=1))
    tokens = torch.randint(500, (50, 20))
    embedded = model.embed(tokens) - model.positions[:20]
    assert embedded.std().item() == pytest.approx(1, rel=0.05)
    assert 0.5 < model(tokens, tokens).var().item() < 2


@pytest.mark.parametrize(("d_model", "warmup"), [(512, 4000), (64, 10)])
def test_the_learning_rate_is_that_of_section_5_3(d_model, warmup):
    for step in (1, 2, warmup // 2, warmup, warmup + 1, 4 * warmup, 10**6):
        expected = 1 / math.sqrt(d_model) * min(1 / math.sqrt(step), step / warmup**1.5)
        assert T.learning_rate(step, d_model, warmup) == pytest.approx(expected)
        assert isinstance(T.learning_rate(step, d_model, warmup), float)
    rates = [T.learning_rate(step, d_model, warmup) for step in range(1, 3 * warmup)]
    assert max(rates) == rates[warmup - 1]


# Generating


def greedy(model, source, limit):
    """Take the likeliest token again and again, for one source and without a cache."""
    target = [T.BOS]
    while len(target) <= limit and target[-1] != T.EOS:
        target.append(model(source, torch.tensor([target]))[0, -1].argmax().item())
    return [i for i in target[1:] if i != T.EOS]


def restless(seed, dropout=0.0):
    """Make a network whose output is not its embedding, lest it write one token again and again."""
    torch.manual_seed(seed)
    model = T.Transformer(12, dataclasses.replace(SMALL, dropout=dropout)).double()
    W = torch.randn(16, 12, dtype=torch.float64)
    model.to_logits = lambda x: x @ W
    return model


@torch.inference_mode()
@pytest.mark.parametrize("seed", [3, 17, 19])
def test_generating_is_taking_the_likeliest_token(seed):
    model, source = restless(seed), draw([9, 4, 1, 5, 2, 3], vocab_size=12)
    found = T.generate(model, source)
    assert found == [greedy(model, row[row != T.PAD][None], limit=20) for row in source]
    assert len(set(map(len, found))) >= 3


@pytest.mark.parametrize("seed", [3, 17, 19])
@pytest.mark.parametrize("limit", [20, 3, 0])
def test_generating_with_the_cache_gives_the_same(limit, seed):
    model, source = restless(seed), draw([9, 4, 1, 5, 2, 3], vocab_size=12, lowest=T.EOS)
    assert T.generate_cached(model, source, limit) == T.generate(model, source, limit)


def monotone(token):
    """Make a network that writes one token again and again."""
    model = make()
    with torch.no_grad():
        model.embedding.weight[T.EOS] = 0
        model.embedding.weight[token] = 1
        model.decoder[-1].norm3.bias.copy_(10 * model.embedding.weight[token])
    return model


@pytest.mark.parametrize("limit", [5, 0, 30])
def test_a_target_is_at_most_as_long_as_its_limit(limit):
    assert T.generate(monotone(7), draw([4, 2]), limit=limit) == [[7] * limit] * 2


def test_a_target_may_end_at_once():
    assert T.generate(monotone(T.EOS), draw([4, 2])) == [[], []]


@torch.inference_mode()
def test_dropout_is_off_while_a_target_is_generated():
    model, source = restless(17), draw([6, 5, 4], vocab_size=12, lowest=T.EOS)
    expected = [greedy(model, row[row != T.PAD][None], limit=12) for row in source]
    for generate in (T.generate, T.generate_cached):
        assert generate(restless(17, dropout=0.5).train(), source, limit=12) == expected


# Tokens


@pytest.fixture(scope="module")
def pairs():
    """Dates to train on, to validate and to test."""
    return [T.sample_dates(days[:3000], Random(i)) for i, days in enumerate(T.split_days())]


@pytest.fixture(scope="module")
def vocabulary():
    return T.make_vocabulary(T.sample_dates(T.split_days()[0][:20_000], Random(0)))


def test_the_vocabulary_knows_every_character(pairs, vocabulary):
    assert sorted(vocabulary.values()) == list(range(4, 4 + len(vocabulary)))
    for split in pairs:
        assert {c for text, iso in split for c in T.normalize(text) + iso} <= vocabulary.keys()


def test_a_text_becomes_tokens():
    vocabulary = {"1": 4, "e": 5, "2": 6}
    assert T.encode("12", vocabulary).tolist() == [4, 6, T.EOS]
    assert T.encode(" 1É☃.", vocabulary).tolist() == [4, 5, T.UNKNOWN, T.EOS]
    long = T.encode("21" * 30, vocabulary)
    assert long.tolist() == [6, 4] * 30 + [T.EOS]
    assert long.dtype == torch.int64
    assert T.encode("", vocabulary).tolist() == [T.EOS]


def test_a_batch_has_its_marks_and_padding():
    vocabulary = {c: i for i, c in enumerate("0123456789-", start=4)}
    source, target = T.make_batch([("12", "1-0"), ("3", "4-5")], vocabulary)
    assert source.tolist() == [[5, 6, T.EOS], [7, T.EOS, T.PAD]]
    assert target.tolist() == [[T.BOS, 5, 14, 4, T.EOS], [T.BOS, 8, 14, 9, T.EOS]]


# Training


def smoothed_loss(model, batch):
    """Follow section 5.4 token by token: 0.9 on the right one, and 0.1 on all alike."""
    losses = []
    for source, target in zip(*batch, strict=True):
        logits = model(source[None], target[None, :-1])[0].double()
        for row, label in zip(logits.tolist(), target[1:].tolist(), strict=True):
            log_sum = math.log(sum(math.exp(x) for x in row))
            q = [0.1 / len(row)] * len(row)
            q[label] += 0.9
            losses.append(-sum(p * (x - log_sum) for p, x in zip(q, row, strict=True)))
    return sum(losses) / len(losses)


class Still(torch.optim.SGD):
    """Takes no step, but notes the learning rates and the gradients."""

    def __init__(self, parameters, lr, **_):
        super().__init__(parameters, lr)
        self.rates = []
        self.gradients = []

    def step(self):
        (group,) = self.param_groups
        self.rates.append(group["lr"])
        self.gradients.append([parameter.grad.clone() for parameter in group["params"]])


def shorten(monkeypatch):
    """Shorten an epoch to three batches of four dates, and validation and test."""
    monkeypatch.setattr(T, "BATCHES", 3)
    monkeypatch.setattr(T, "BATCH_SIZE", 4)
    monkeypatch.setattr(dates, "VALIDATION_DAYS", 10)
    monkeypatch.setattr(dates, "TEST_DAYS", 40)


@pytest.fixture
def short(monkeypatch):
    """Shorten an epoch to three batches of four dates."""
    shorten(monkeypatch)


@pytest.fixture
def kept(monkeypatch):
    """Train without steps; keep the batches and the optimizers."""
    batches, optimizers = [], []
    make_batch = T.make_batch
    monkeypatch.setattr(T, "make_batch", lambda *a: batches.append(make_batch(*a)) or batches[-1])
    monkeypatch.setattr(
        torch.optim, "Adam", lambda *a, **b: optimizers.append(Still(*a, **b)) or optimizers[-1]
    )
    return batches, optimizers


def test_an_epoch_has_the_smoothed_loss_of_every_date_and_the_rates(short, vocabulary, kept):
    batches, optimizers = kept
    model = T.Transformer(4 + len(vocabulary), SMALL)
    losses = [loss for loss, _, _ in T.train(model, vocabulary, epochs=2, seed=0)]
    for loss, epoch in zip(losses, (batches[:3], batches[3:]), strict=True):
        expected = sum(smoothed_loss(model, batch) for batch in epoch) / 3
        assert loss == pytest.approx(expected, rel=1e-5)
        assert len({tuple(row) for _, target in epoch for row in target.tolist()}) == 12
    assert losses[0] != losses[1]
    expected = [T.learning_rate(n + 1, 16, T.WARMUP) * (1 - n / 6) for n in range(6)]
    assert optimizers[0].rates == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1, 1000], ids=["unsure", "sure"])
def test_a_step_follows_the_gradient_of_the_smoothed_loss(short, kept, scale, monkeypatch):
    monkeypatch.setattr(T, "BATCHES", 2)
    monkeypatch.setattr(T, "BATCH_SIZE", 3)
    torch.manual_seed(0)
    model = T.Transformer(15, SMALL).double()
    with torch.no_grad():
        model.embedding.weight *= scale  # the logits are up to thousands, and P(k) is 0
    digits = {c: i for i, c in enumerate("0123456789-", start=4)}
    loss = next(T.train(model, digits, epochs=1, seed=0)).loss
    batches, (optimizer,) = kept
    losses = []
    for (source, target), found in zip(batches, optimizer.gradients, strict=True):
        log_p = model(source, target[:, :-1]).log_softmax(dim=-1)
        q = 0.9 * F.one_hot(target[:, 1:], 15) + 0.1 / 15
        losses.append(-(q * log_p).sum(dim=-1).mean())
        expected = torch.autograd.grad(losses[-1], [*model.parameters()])
        for each, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(each, wanted, rtol=1e-5, atol=1e-6 * scale)
    assert loss == pytest.approx(sum(losses).item() / 2, rel=1e-6)


@pytest.mark.usefixtures("short", "kept")
def test_dropout_is_on_in_training(vocabulary):
    V = 4 + len(vocabulary)
    model = T.Transformer(V, dataclasses.replace(SMALL, dropout=1.0))
    for epoch in T.train(model, vocabulary, epochs=2, seed=0):
        assert epoch.loss == pytest.approx(math.log(V), rel=1e-3)  # who sees nothing knows nothing


def test_training_lowers_the_loss(vocabulary, monkeypatch):
    monkeypatch.setattr(T, "BATCHES", 20)
    monkeypatch.setattr(T, "WARMUP", 20)
    monkeypatch.setattr(dates, "VALIDATION_DAYS", 10)
    torch.manual_seed(0)
    model = T.Transformer(4 + len(vocabulary), SMALL)
    first, second = (loss for loss, _, _ in T.train(model, vocabulary, epochs=2, seed=0))
    assert second < first - 0.5


def test_a_loss_that_is_no_number_stops_the_training(short, vocabulary):
    model = T.Transformer(4 + len(vocabulary), SMALL)
    nn.init.constant_(model.decoder[-1].norm3.bias, math.nan)
    with pytest.raises(FloatingPointError, match="nan"):
        next(T.train(model, vocabulary, epochs=1, seed=0))


def test_texts_are_read_alike_alone_and_together(vocabulary, pairs):
    torch.manual_seed(0)
    model = T.Transformer(4 + len(vocabulary), SMALL)
    texts = [text for text, _ in pairs[1][:7]] + ["☃", "1" * 100]
    found = T.read(model, vocabulary, texts)
    assert found == [T.read(model, vocabulary, [text])[0] for text in texts]
    assert T.read(model, vocabulary, []) == []


@torch.inference_mode()
def test_one_can_look_inside():
    model = make()
    source, target = draw([5, 3]), draw([4, 6])
    weights = T.look_inside(model, source, target)
    assert [*weights] == [
        "encoder.0.self_attention", "encoder.1.self_attention",
        "decoder.0.self_attention", "decoder.0.cross_attention",
        "decoder.1.self_attention", "decoder.1.cross_attention",
    ]  # fmt: skip
    for name, w in weights.items():
        torch.testing.assert_close(w.sum(dim=-1), torch.ones_like(w[..., 0]))
        if name.startswith("decoder") and "self" in name:
            assert w.triu(diagonal=1).count_nonzero() == 0
    x = model.embed(source)
    expected = model.encoder[0].self_attention.weights(x, x, x, padding_mask(source, T.PAD))
    torch.testing.assert_close(weights["encoder.0.self_attention"], expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_picture_shows_the_weights_of_the_last_cross_attention(vocabulary, monkeypatch):
    drawn = []
    monkeypatch.setattr(T, "draw_heads", lambda *names: drawn.append(names) or b"")
    torch.manual_seed(0)
    model = T.Transformer(4 + len(vocabulary), SMALL)
    T.draw_attention(model, vocabulary, T.EXAMPLE)
    ((weights, rows, columns),) = drawn
    assert ("".join(columns), "".join(rows)) == tuple(side + "∎" for side in T.EXAMPLE)
    source, target = T.make_batch([T.EXAMPLE], vocabulary)
    expected = T.look_inside(model, source, target[:, :-1])["decoder.1.cross_attention"][0]
    torch.testing.assert_close(weights, expected)


# As a person runs it


def run_main(*arguments):
    return T.main([*map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run, and what it printed."""
    out, printed = tmp_path_factory.mktemp("trained"), io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        shorten(monkeypatch)
        assert run_main("--epochs", 2, "--out", out) == 0
    return out, printed.getvalue()


def test_it_saves_what_it_prints_and_reads_with_what_it_saved(trained, capsys):
    out, printed = trained
    metrics = json.loads((out / "metrics.json").read_text())
    for number, (loss, accuracy, seconds) in enumerate(metrics["epochs"], start=1):
        assert f"{number:5}  {loss:13.4f}  {accuracy:19.2%}  {seconds:7.1f}" in printed
    assert f"Test: {metrics['accuracy']:.2%} of 40 dates" in printed
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    model, vocabulary = T.open_model(out / "model.safetensors")
    assert printed.startswith(f"{sum(p.numel() for p in model.parameters()):,} parameters on cpu\n")
    (found,) = T.read(model, vocabulary, ["12 mars 2021"])
    assert run_main("--out", out, "--read", "12 mars 2021") == 1
    message = f"{dates.find_problem('12 mars 2021', found)}\n"
    assert capsys.readouterr() == ("", message)


def test_the_same_seed_gives_the_same_weights(trained, short, tmp_path, capsys):
    def weights(seed, folder):
        assert run_main("--epochs", 2, "--seed", seed, "--out", tmp_path / folder) == 0
        return safetensors.torch.load_file(tmp_path / folder / "model.safetensors")

    first = safetensors.torch.load_file(trained[0] / "model.safetensors")
    again, other = weights(0, "\x1b[31magain"), weights(1, "other")
    assert f"\nSaved in {tmp_path}/?[31magain after " in capsys.readouterr().out
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert not torch.equal(other["embedding.weight"], first["embedding.weight"])


@pytest.mark.parametrize("characters", ["abc", "a" * 5_000_000])
def test_a_file_with_other_characters_is_refused_in_one_line(
    trained, characters, tmp_path, capsys, monkeypatch
):
    class Weightless(T.Transformer):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            assert self.embedding.weight.is_meta  # takes no memory before the sizes are compared

    monkeypatch.setattr(T, "Transformer", Weightless)
    weights = safetensors.torch.load_file(trained[0] / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save(weights, {"characters": characters}))
    assert run_main("--out", tmp_path, "--read", "12 mars 2021") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "other sizes" in line


def test_a_loss_that_breaks_saves_nothing(short, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(T.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * math.nan)
    (tmp_path / "model.safetensors").write_bytes(b"old")
    assert run_main("--out", tmp_path) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--epochs", "0"),
        ("--epochs", "1" * 400),
        ("--device", "abacus"),
        ("--read", " "),
        ("--read", "“.”"),
        ("--read", "1" * T.MAX_LENGTH),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_option(option, value, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        T.main([option, value, "--out", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"error: argument {option}: " in error.splitlines()[-1]
    assert "\x1b" not in error


def test_a_text_of_other_bytes_is_read_all_the_same(trained, capsys):
    assert run_main("--out", trained[0], "--read", "a\udcff\x1b b") == 1
    unseen, problem = capsys.readouterr().err.splitlines()
    assert r"never seen \x1b \udcff before" in unseen and "prediction" in problem


def test_ctrl_c_ends_it_without_a_traceback_and_keeps_the_old_model(
    short, tmp_path, monkeypatch, capsys
):
    def interrupt(loss):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.Tensor, "backward", interrupt)
    (tmp_path / "model.safetensors").write_bytes(b"old")
    assert run_main("--out", tmp_path) == 130
    printed, error = capsys.readouterr()
    assert printed.splitlines()[-1].startswith("epoch")
    assert "Traceback" not in error
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"


def test_sigterm_ends_it_without_a_traceback_and_keeps_the_old_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"old")
    command = [sys.executable, T.__file__, "--device", "cpu", "--out", str(tmp_path)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, encoding="utf-8")
    assert any(line.startswith("epoch") for line in process.stdout)
    process.terminate()
    error = process.communicate()[1]
    assert process.returncode == -signal.SIGTERM  # the shell says 143
    assert "Traceback" not in error
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_read_unseen_dates(seed, tmp_path):
    assert T.main(["--seed", str(seed), "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.99


@pytest.mark.gpu
def test_it_computes_and_generates_the_same_on_an_accelerator():
    model = make().float()
    source, target = draw([7, 4, 1]), draw([3, 6, 5])
    expected, generated = model(source, target), T.generate_cached(model, source)
    device = torch.accelerator.current_accelerator()
    model, source, target = model.to(device), source.to(device), target.to(device)
    torch.testing.assert_close(model(source, target).cpu(), expected, rtol=1e-3, atol=1e-3)
    assert T.generate_cached(model, source) == generated
    assert T.generate(model, source) == generated
