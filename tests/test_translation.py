"""Training, stopping, resuming and testing, alone and in several processes."""

import copy
import dataclasses
import datetime
import gzip
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import translation as T
from attention import causal_mask
from conftest import (
    SENTENCES,
    SMALL,
    assert_equals_pytorch,
    assert_half_dropped,
    corpus_of,
    draw,
    make,
    save_text,
    watch,
)
from inputs.pairs import make_batches, open_corpus
from inputs.text import BOS, EOS, make_tokenizer
from running import processes, runs, shell
from running.runs import Progress, Run
from running.shell import Stopped
from transformer import Sizes, Transformer, learning_rate
from translation import PreNormTransformer

SCRIPT = Path(T.__file__)
ONE_BATCH = dataclasses.replace(SMALL, batch_tokens=10**6)
TINY = (
    "--d-model", 16, "--num-heads", 2, "--num-layers", 1, "--d-ff", 32, "--dropout", 0.0,
    "--smoothing", 0.1, "--warmup", 20, "--vocab-size", 320,
)  # fmt: skip


def random_pairs(count, vocab_size=20, longest=9, seed=0):
    random = Random(seed)

    def ids():
        return [random.randrange(3, vocab_size) for _ in range(random.randrange(1, longest))]

    return [([*ids(), EOS], [BOS, *ids(), EOS]) for _ in range(count)]


# The network


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_values_and_gradients_of_pre_norm_are_those_of_pytorch():
    assert_equals_pytorch(make())


def test_a_pre_norm_layer_that_drops_its_sublayers_changes_nothing():
    torch.manual_seed(0)
    sizes, x, mask = Sizes(16, 2, 1, 24, dropout=1.0), torch.randn(2, 5, 16), causal_mask(5)
    encoder, decoder = T.PreNormEncoderLayer(sizes), T.PreNormDecoderLayer(sizes)
    assert torch.equal(encoder(x, mask), x)
    assert torch.equal(decoder(x, mask, x, mask), x)
    assert not torch.allclose(encoder.eval()(x, mask), x)
    assert not torch.allclose(decoder.eval()(x, mask, x, mask), x)


def test_pre_norm_has_dropout_on_what_a_layer_adds_and_on_nothing_else():
    torch.manual_seed(0)
    x, mask = torch.randn(2, 8, 16, dtype=torch.float64), causal_mask(8)
    layer = T.PreNormEncoderLayer(Sizes(16, 2, 1, 24, dropout=0.5)).double()
    without = T.PreNormEncoderLayer(Sizes(16, 2, 1, 24)).double()
    without.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x, mask), without(x, mask))
    seen = watch(layer.train())
    result = layer(x, mask)
    assert torch.equal(seen["norm1"][0][0], x)
    (query, key, value, _), attended = seen["self_attention"]
    assert all(torch.equal(each, seen["norm1"][1]) for each in (query, key, value))
    (x,), normalized = seen["norm2"]
    assert_half_dropped(x, seen["norm1"][0][0], attended)
    assert torch.equal(seen["feed_forward.0"][0][0], normalized)
    assert_half_dropped(result, x, seen["feed_forward.2"][1])


def test_the_settings_choose_the_network(words):
    pre, post = (
        T.make_model(dataclasses.replace(SMALL, norm_first=first), words) for first in (True, False)
    )
    assert (type(pre), type(post)) == (T.PreNormTransformer, Transformer)
    counts = [sum(p.numel() for p in model.parameters()) for model in (pre, post)]
    assert counts[0] == counts[1] + 2 * 2 * SMALL.d_model
    assert pre.embedding.num_embeddings == words.get_vocab_size()
    assert pre.encoder[0].feed_forward[0].out_features == SMALL.d_ff
    assert pre.decoder[0].cross_attention.num_heads == SMALL.num_heads
    assert len(pre.encoder) == len(pre.decoder) == SMALL.num_layers


def test_presets_are_those_of_the_paper_and_of_the_text():
    base = T.PRESETS["base"]
    assert (base.d_model, base.num_heads, base.num_layers, base.d_ff) == (512, 8, 6, 2048)
    assert (base.dropout, base.warmup, base.vocab_size) == (0.1, 4000, 37_000)
    assert (base.norm_first, base.batch_tokens, base.average) == (False, 50_000, 5)
    assert base.smoothing == 0.1
    assert T.PRESETS["small"] == T.Settings()


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"dropout": math.nan}, {"d_model": 10}])
def test_a_setting_out_of_range_is_refused_by_its_option(changes):
    with pytest.raises(ValueError, match="--" + next(iter(changes)).replace("_", "-")):
        T.Settings(**changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, words):
    """A network that was not trained, in its file."""
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    torch.manual_seed(0)
    T.save_model(path, T.make_model(SMALL, words), words, SMALL)
    return path


def test_a_saved_model_is_the_same_when_opened(saved, words):
    model, tokenizer = T.open_model(saved)
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


def with_sparse_tokens(content):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tokenizer = json.loads(header["tokenizer"])
    tokenizer["added_tokens"] = []
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: 7 * i for token, i in vocabulary.items()}
    header["tokenizer"] = json.dumps(tokenizer)
    return safetensors.torch.save(safetensors.torch.load(content), header)


def with_a_nan(content):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    weights = safetensors.torch.load(content)
    weights["decoder_norm.bias"][3] = math.nan
    return safetensors.torch.save(weights, header)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, "there is no such file"),
        (lambda content: b"", ""),
        (lambda content: b"a text", ""),
        (lambda content: content[:-1], ""),
        (lambda content: content[:100], ""),
        (lambda content: safetensors.torch.save(safetensors.torch.load(content)), ""),
        (with_settings(d_ff=16), "other sizes"),
        (with_settings(num_layers=48), ""),
        (with_settings(num_layers=10**9), "--num-layers: must be between 1 and 48"),
        (with_settings(d_model="16"), ""),
        (with_settings(kernel=3), ""),
        (with_a_nan, "not finite"),
        (with_sparse_tokens, "numbered from 0"),
    ],
    ids=range(13),
)
def test_a_model_that_is_none_is_refused_with_a_reason(saved, tmp_path, spoil, message):
    path = tmp_path / "model.safetensors"
    if spoil:
        path.write_bytes(spoil(saved.read_bytes()))
    with pytest.raises(OSError, match="not a model saved by this script; train") as caught:
        T.open_model(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# Training


def adam(model):
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)


def start_run(model, seed=0, optimizer=None, epochs=2, out=None):
    return Run(out, model, [optimizer or adam(model)], {}, epochs, seed)


def train(run, pairs, settings=SMALL, model=None):
    """Train to the end of the epoch, without saving; return the progress at its end."""
    T.train_epoch(run, model or run.model, corpus_of(pairs), settings)
    ended = run.progress
    run.progress = Progress(ended.epoch + 1, step=ended.step)
    return ended


def batches_of(pairs, settings, seed=0, epoch=0):
    generator = torch.Generator().manual_seed(Random(f"{seed} {epoch}").getrandbits(63))
    return make_batches(corpus_of(pairs).lengths, settings.batch_tokens, generator)


def smoothed_loss(model, pairs):
    """Follow section 5.4 token by token: a share on all alike, the rest on the right one."""
    losses, share = [], SMALL.smoothing
    for source, target in pairs:
        logits = model(torch.tensor([source]), torch.tensor([target[:-1]]))[0]
        for row, label in zip(logits.tolist(), target[1:], strict=True):
            log_sum = math.log(sum(math.exp(x) for x in row))
            q = [share / len(row)] * len(row)
            q[label] += 1 - share
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
    batches = len(batches_of(pairs, SMALL))
    ended = train(run, pairs)
    assert (ended.batch, ended.step) == (batches, batches)
    assert (ended.count, ended.loss) == (count, pytest.approx(total, rel=1e-12))
    assert len(optimizer.rates) == batches > 2
    for n, found in enumerate(optimizer.rates):
        remaining = 1 - n / batches / SMALL.epochs
        assert found == pytest.approx(remaining * learning_rate(n + 1, 16, SMALL.warmup))
    assert train(run, pairs).loss == pytest.approx(total, rel=1e-12)  # it begins anew
    expected = learning_rate(2 * batches, 16, SMALL.warmup) / (2 * batches)
    assert optimizer.rates[-1] == pytest.approx(expected)


def test_the_gradient_is_that_of_the_mean_loss_of_a_token():
    model, pairs = make(), random_pairs(5)
    optimizer = Still(model.parameters())
    train(start_run(model, optimizer=optimizer), pairs, ONE_BATCH)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = []
    for source, target in pairs:
        logits = model(torch.tensor([source]), torch.tensor([target[:-1]]))[0]
        labels = torch.tensor(target[1:])
        losses.append(
            F.cross_entropy(logits, labels, reduction="none", label_smoothing=SMALL.smoothing)
        )
    torch.cat(losses).mean().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_mean_loss_is_that_of_a_token_and_changes_nothing():
    model, pairs = make(dropout=0.5), random_pairs(30)
    before = copy.deepcopy(model.state_dict())
    losses = [T.mean_loss(model, corpus_of(pairs), tokens) for tokens in (50, 1000)]
    expected = []
    for source, target in pairs:
        logits = model.eval()(torch.tensor([source]), torch.tensor([target[:-1]]))[0]
        expected += F.cross_entropy(logits, torch.tensor(target[1:]), reduction="none").tolist()
    assert losses == pytest.approx([sum(expected) / len(expected)] * 2, rel=1e-12)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model, pairs = PreNormTransformer(20, Sizes(16, 2, 1, 32)), random_pairs(60)
    settings = dataclasses.replace(SMALL, epochs=8)
    run, before = start_run(model, epochs=8), T.mean_loss(model, corpus_of(pairs), 1000)
    while not run.ended:
        train(run, pairs, settings)
    assert T.mean_loss(model, corpus_of(pairs), 1000) < before - 0.4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training_and_the_validation(value):
    model = make()
    nn.init.constant_(model.decoder_norm.bias, value)
    with pytest.raises(FloatingPointError, match=r"the loss became (nan|inf)"):
        train(start_run(model), random_pairs(5))
    with pytest.raises(FloatingPointError, match=r"validation loss became (nan|inf)"):
        T.mean_loss(model, corpus_of(random_pairs(5)), 1000)


@pytest.mark.parametrize("stop", [1, 3, -1])
def test_a_training_that_was_stopped_and_resumed_has_the_same_bits(stop, tmp_path):
    pairs = random_pairs(60)
    batches = len(batches_of(pairs, SMALL, seed=3))
    stop %= batches + 1

    def start():
        return start_run(make(num_layers=1, dropout=0.3).float(), seed=3, out=tmp_path)

    expected = start()
    train(expected, pairs)
    ended = train(expected, pairs)
    assert ended.step == batches + len(batches_of(pairs, SMALL, seed=3, epoch=1))

    run, steps = start(), []

    def interrupt(*_):
        steps.append(None)
        if len(steps) == stop:
            signal.raise_signal(signal.SIGINT)

    run.model.register_forward_pre_hook(interrupt)
    with pytest.raises(Stopped) as stopped, run.stoppable():
        train(run, pairs)
    assert stopped.value.status == 130
    assert (run.progress.epoch, run.progress.batch) == (0, stop)
    torch.rand(stop)  # what is drawn elsewhere must not matter
    run = start()
    run.resume()
    train(run, pairs)
    assert dataclasses.replace(train(run, pairs), seconds=0.0) == dataclasses.replace(
        ended, seconds=0.0
    )
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, expected.model.state_dict()[name])


def test_no_step_of_no_process_draws_what_another_draws(monkeypatch):
    seeds = []
    for rank in (0, 1):
        monkeypatch.setattr(runs, "rank_and_world", lambda rank=rank: (rank, 1))
        run = start_run(make(dropout=0.3))
        run.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
        train(run, random_pairs(60))
    assert len(seeds) > 8
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(("count", "world"), [(9, 2), (7, 3), (2, 4)])
def test_the_shares_of_several_processes_have_together_the_gradient_of_one(
    count, world, monkeypatch
):
    corpus, model = corpus_of(random_pairs(2 * count)), make()
    rows = torch.arange(2 * count).flip(0)[:count]
    labels = int((corpus.lengths[rows, 1] - 1).sum())
    loss = T.batch_loss(model, corpus, rows, SMALL.smoothing)
    expected = torch.autograd.grad(loss / labels, list(model.parameters()))
    total = 0.0
    shares = []
    sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
    model.register_forward_hook(lambda _, inputs, __: shares.append(len(inputs[0])))
    for rank in range(world):  # one after the other, and none by DDP
        monkeypatch.setattr(T, "rank_and_world", lambda rank=rank: (rank, world))
        model.zero_grad()
        total += T.add_gradients(model, corpus, rows, labels, SMALL)
        for each, parameter in zip(sums, model.parameters(), strict=True):
            each += parameter.grad  # which DDP waits for, also where no pair is left
    assert len(shares) == world
    assert max(shares) <= math.ceil(count / world)
    torch.testing.assert_close(total, loss.detach())
    for found, gradient in zip(sums, expected, strict=True):
        torch.testing.assert_close(found / world, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("part_tokens", [10**6, 60, 1])
def test_the_gradient_of_parts_is_that_of_the_whole_batch(part_tokens):
    corpus, model = corpus_of(random_pairs(33)), make()
    rows, count = torch.arange(33), int((corpus.lengths[:, 1] - 1).sum())
    loss = T.batch_loss(model, corpus, rows, SMALL.smoothing)
    (loss / count).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = []
    model.register_forward_hook(lambda model, inputs, _: parts.append(len(inputs[0])))
    settings = dataclasses.replace(SMALL, part_tokens=part_tokens)
    total = T.add_gradients(model, corpus, rows, count, settings)
    torch.testing.assert_close(total, loss.detach())
    assert sum(parts) == 33
    assert {10**6: len(parts) == 1, 60: 1 < len(parts) < 33, 1: len(parts) == 33}[part_tokens]
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)


def test_without_averaging_the_rate_falls_to_0_and_with_it_it_does_not():
    rates = []
    for average in (1, 2):
        settings = dataclasses.replace(SMALL, average=average, epochs=1)
        optimizer = Still(make().parameters())
        train(start_run(make(), optimizer=optimizer), random_pairs(40), settings)
        rates.append(optimizer.rates[-1])
    steps = len(optimizer.rates)
    assert rates[1] == pytest.approx(learning_rate(steps, 16, SMALL.warmup))
    assert rates[0] == pytest.approx(rates[1] / steps)


def test_the_last_epochs_are_averaged(tmp_path):
    model, states = make(), []
    (tmp_path / ".weights-1.safetensors.4711.part").write_bytes(b"left by a killed process")
    for epoch in range(1, 6):
        nn.init.normal_(model.embedding.weight)
        states.append(model.embedding.weight.detach().clone())
        averaged = T.average_weights(model, epoch, 3, tmp_path)
        expected = torch.stack(states[-3:]).mean(dim=0)
        torch.testing.assert_close(averaged.embedding.weight.data, expected)
        assert torch.equal(model.embedding.weight, states[-1])
    assert len(list(tmp_path.iterdir())) == 3
    path = tmp_path / "weights-1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OSError, match="its checksum is wrong"):
        T.average_weights(model, 6, 3, tmp_path)


# Files


def run_main(*arguments):
    return T.main([*map(str, arguments), "--device", "cpu"])


def one_line(capsys):
    """Return what was written to stderr, a line of printable characters."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.removesuffix("\n").isprintable()
    return error


def results(out):
    """Return the names of the files in a folder, but the lock and the encoded text."""
    return {path.name for path in out.iterdir()} - {"lock", "corpus"}


def load(out):
    return safetensors.torch.load_file(out / "model.safetensors")


RUN = (*TINY, "--dropout", 0.2, "--batch-tokens", 200, "--epochs", 3, "--beam", 1)


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
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2, 3]
    assert metrics["settings"]["languages"] == ["de", "en"]
    for name in ("losses", "attention"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert results(out) == {
        "attention.png", "checkpoint.pt", "checkpoint-before.pt", "losses.png", "metrics.json",
        "model.safetensors",
    }  # fmt: skip
    model, tokenizer = T.open_model(out / "model.safetensors")
    (encoded,) = (out / "corpus").iterdir()
    assert tokenizer.to_str() == (encoded / "tokenizer.json").read_text()
    loss = T.mean_loss(model, open_corpus(encoded / "val"), 1000)
    assert loss == pytest.approx(min(row["validation_loss"] for row in metrics["epochs"]), rel=1e-5)


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
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["settings"]["seed"] == 5
    with pytest.raises(SystemExit):
        run_main(*arguments, "--resume", "--restart")


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(trained, capsys):
    data, out = trained
    weights = (out / "model.safetensors").read_bytes()
    for changed, message in (
        ((*RUN, "--epochs", 4), r"epochs\D* 3\b"),
        ((*RUN, "--d-ff", 48), r"d_ff\D* 32\b"),
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


def shortened(optimizers):
    """Cut off the moments of the first parameter."""
    optimizers[0]["state"][0]["exp_avg"] = torch.zeros(3)
    return optimizers


SPOILT = {
    "empty": lambda content: b"",
    "text": lambda content: b"a text",
    "truncated": lambda content: content[: len(content) // 2],
    "other": lambda content: safetensors.torch.save({"weight": torch.zeros(3)}),
    "flipped": flipped,
    "no model": changed(model=lambda model: {}),
    "other model": changed(model=lambda model: {name: x[:1] for name, x in model.items()}),
    "no optimizer": changed(optimizers=lambda optimizers: []),
    "other moments": changed(optimizers=shortened),
    "no epochs": changed(progress=lambda progress: progress | {"rows": []}),
    "odd epochs": changed(progress=lambda progress: progress | {"rows": [[1], [2], [3]]}),
    "odd progress": changed(progress=lambda progress: progress | {"mood": 1}),
    "no settings": changed(settings=lambda settings: None),
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
            state = runs.read_checkpoint(path)
        except Exception:  # which Run.load refuses in one line
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

    torch.save({"settings": Trap()}, tmp_path / "checkpoint.pt")
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
    assert results(tmp_path) == {"previous"}
    assert (tmp_path / "previous/model.safetensors").read_bytes() == b"old"
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
    assert results(tmp_path) == {"previous"}
    assert (tmp_path / "previous/model.safetensors").read_bytes() == content


def test_the_best_network_is_kept_and_not_the_last(trained, tmp_path, capsys, monkeypatch):
    losses, weights = iter([3.0, 1.0, 2.0]), []

    def mean_loss(model, *_):
        weights.append(copy.deepcopy(model.state_dict()))
        return next(losses)

    monkeypatch.setattr(T, "mean_loss", mean_loss)
    assert run_main("--data", trained[0], "--out", tmp_path, *RUN) == 0
    for name, tensor in load(tmp_path).items():
        assert torch.equal(tensor, weights[1][name])
        assert not torch.equal(tensor, weights[2][name])


# As a person runs it


def start(*arguments):
    """Start the script in a process of its own."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=environment, **pipes)


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # of capsys
def test_text_is_learned_end_to_end(run_script, text_folder, tmp_path):
    for language, lines in (("de", "\nein hund\n\nein\n"), ("en", f"a dog\n\n\n{'x ' * 300}\n")):
        with gzip.open(text_folder / f"train.{language}.gz", "at") as file:
            file.write(lines)
    long = "x " * 300
    for name, text in (("val.de", f"{long}\n$a$ $"), ("val.en", "x\na $"), ("test.more.de", "")):
        path = text_folder / name
        path.write_text(f"{text}\n{path.read_text()}")
    path = text_folder / "test.more.en"
    path.write_text(f"\x1b[2J red\n{path.read_text()}")
    out = tmp_path / "out"
    done = run_script(
        "translation.py", "--data", text_folder, "--out", out, "--device", "cpu", *TINY,
        "--d-model", 32, "--batch-tokens", 300, "--epochs", 12,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.split("\n")
    assert lines[0] == "4 pairs of train are left out: empty, or too long"
    parameters = sum(x.numel() for x in load(out).values())
    assert lines[1] == "1 pairs of val are left out: empty, or too long"
    assert lines[2] == f"{parameters:,} parameters on cpu, 120 pairs per epoch"
    metrics = json.loads((out / "metrics.json").read_text())
    for line, row in zip(lines[5:], metrics["epochs"], strict=False):
        assert line == "{:5}  {:13.4f}  {:15.4f}  {:7.1f}".format(*row.values())
    assert len(metrics["epochs"]) == 12
    assert list(metrics["test"]) == ["beam", "test.more", "test2016"]
    for name in ("test.more", "test2016"):
        place = 1 + next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
        assert lines[place].endswith(" of their sources stand in the training text, too")
        for line, (metric, value) in zip(
            lines[place + 1 :], metrics["test"][name].items(), strict=False
        ):
            assert line == f"{value:7.2f}  {metric}"
            assert value > 50  # it has seen these sentences
    assert "  ?[2J red (reference)" in lines
    for source, target in SENTENCES[:2]:
        place = lines.index(f"  {source}")
        assert lines[place + 2] == f"  {target} (reference)"
    for name in ("losses", "attention"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-2].startswith(f"Saved in {out} after ")


def test_scores_are_those_of_sacrebleu():
    pairs = [("x", "The cat sat on the mat ."), ("y", "A dog runs in the snow .")]
    same = T.score(pairs, [target for _, target in pairs], "en")
    assert list(same.values()) == pytest.approx([100] * 4)
    found = T.score(pairs, ["the cat sat on the mat .", "A dog runs in the snow ."], "en")
    exactly, mixed, lower, chrf = found.values()
    assert exactly == 50
    assert 0 < mixed < lower == pytest.approx(100)
    assert 0 < chrf < 100
    assert [name.split(" ")[0] for name in found] == ["exactly", "BLEU", "BLEU", "CHRF"]
    assert ["case:mixed" in list(found)[1], "case:lc" in list(found)[2]] == [True, True]


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("en", "13a"),
        ("zh_Hant", "zh"),
        ("ja", "char"),
        ("th", "char"),
        ("yue", "char"),
        ("ko", "13a"),
    ],
)
def test_words_are_counted_as_the_language_has_them(language, words):
    pairs = [("x", "今天天气很好我们去公园"), ("y", "明天也很好")]
    found = T.score(pairs, ["今天天气很好我们去花园", "明天也很好"], language)
    bleu = next(name for name in found if name.startswith("BLEU"))
    assert f"tok:{words}|" in bleu
    assert (found[bleu] > 50) == (words != "13a")


def test_a_bleu_of_0_for_want_of_long_lines_is_explained():
    short = T.score([("x", "a b c"), ("y", "d")], ["a b c", "d"], "en")
    long = T.score([("x", "a b c"), ("y", "d e f g")], ["a b c", "d e f g"], "en")
    hints = [
        [name for name in found if "no translation has four words" in name]
        for found in (short, long)
    ]
    assert [[short[name] for name in hints[0]], hints[1]] == [[0.0, 0.0], []]


def test_pieces_in_any_script_are_drawn_without_a_warning():
    pair = ("日本語 한국어 हिन्दी $x$", "ein hund")
    words = make_tokenizer([*pair] * 9, 320)
    assert "日本語" in [words.decode([i]) for i in words.encode(pair[0]).ids]  # not single bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert T.draw_attention(T.make_model(SMALL, words), words, pair).startswith(b"\x89PNG")


def test_what_the_test_hides_is_said(trained, tmp_path, capsys):
    """Sentences that are too long, that are trained on, and a test with one side."""
    data = tmp_path / "data"
    shutil.copytree(trained[0], data)
    (data / "test2.de").write_text("eine zeile\n")
    with (data / "test.de").open("a") as file:
        file.write(f"{'x ' * 300}\nneu\n")
    with (data / "test.en").open("a") as file:
        file.write("long\nnew\n")
    assert run_main("--data", data, "--out", tmp_path / "\x1b[31mout", *RUN) == 0
    printed = capsys.readouterr()
    assert f"\nSaved in {tmp_path}/?[31mout after " in printed.out
    assert "test: 6 sentences\n1 of them are longer than 256 tokens" in printed.out
    assert "\n4 of their sources stand in the training text, too\n" in printed.out
    assert printed.err == "test2 is left out: it has only one side\n"


def test_a_run_that_begins_anew_sets_old_results_aside(trained, tmp_path, capsys):
    for name in results(trained[1]):
        (tmp_path / name).write_bytes((trained[1] / name).read_bytes())
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            T, "batch_loss", lambda *_, **__: signal.raise_signal(signal.SIGINT) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            run_main("--data", trained[0], "--out", tmp_path, *RUN, "--restart")
    capsys.readouterr()
    assert results(tmp_path) == {"previous"}
    assert results(tmp_path / "previous") == results(trained[1])
    assert run_main("--out", tmp_path, "--translate", "ein hund") == 1
    assert "train one first" in one_line(capsys)
    assert (tmp_path / "previous/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("changes", [{"num_heads": 2.0}, {"num_heads": True}, {"norm_first": 1}])
def test_a_setting_of_another_kind_is_refused(changes):
    with pytest.raises(ValueError, match="not of the right kind"):
        T.Settings(**changes)


def test_lines_are_translated(trained, monkeypatch, capsys):
    _, out = trained
    model, words = T.open_model(out / "model.safetensors")
    lines = ["\ufeffein hund", "", "☃\r\x85\x0b\x1c\u2028 ?", "x " * 300, " ", "a\u0308", "hut"]
    raw = "\n".join(lines).encode()
    lines[0], lines[5] = "ein hund", "ä"
    expected = [(text or "").replace("\n", " ") for text in T.translate(model, words, lines, 4)]
    assert expected[0] and expected[6] and expected[1] == expected[3] == expected[4] == ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
    assert run_main("--out", out, "--translate", "-") == 1  # for one line was too long
    printed = capsys.readouterr()
    assert printed.err == f"line 4 is longer than {T.MAX_LENGTH} tokens\n"
    assert printed.out.split("\n") == [*expected, ""]
    assert run_main("--out", out, "--translate", "ein hund") == 0
    assert capsys.readouterr() == (f"{expected[0]}\n", "")
    assert run_main("--out", out, "--translate", "a\u0308") == 0
    assert capsys.readouterr() == (f"{expected[5]}\n", "")


def test_what_is_not_utf_8_is_refused_and_not_translated(trained, monkeypatch, capsys):
    _, out = trained
    assert run_main("--out", out, "--translate", "M\udce4rz") == 1
    assert "not UTF-8" in one_line(capsys)
    for raw, problem in (
        ("hund\nMärz\n".encode("latin-1"), "standard input, line 2: not UTF-8"),
        (b"ein hund\rein hut\r", "standard input: its lines end in carriage returns"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        assert run_main("--out", out, "--translate", "-") == 1
        assert problem in one_line(capsys)


def test_a_line_without_end_takes_no_memory(trained, monkeypatch, capsys):
    read = []

    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            read.append(len(buffer))
            if sum(read) > 30_000_000:
                return 0
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    tracemalloc.start()
    assert run_main("--out", trained[1], "--translate", "-") == 1
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10_000_000
    assert "line 1 is longer than" in capsys.readouterr().err


def test_at_a_terminal_each_line_is_answered_at_once(trained, monkeypatch, capsys):
    answers = []

    class Typed(io.BytesIO):
        def isatty(self):
            return True

        def readline(self, size=-1):
            answers.append(capsys.readouterr())
            return super().readline(size)

    lines = b"ein hund\nein hut\n" + b"x " * 300 + b"\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Typed(lines)))
    assert run_main("--out", trained[1], "--translate", "-") == 1
    assert [answer.out.count("\n") for answer in answers] == [0, 1, 1, 1]
    assert [answer.err for answer in answers] == [
        *[""] * 3, f"line 3 is longer than {T.MAX_LENGTH} tokens\n"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--seed", ["--seed", "-1"]),
        ("--seed", ["--seed", str(2**63)]),
        ("--beam", ["--beam", "0"]),
        ("--beam", ["--beam", "1000000000"]),
        ("--device", ["--device", "abacus"]),
        ("--device", ["--device", "hpu"]),
        ("--data", ["--data", "no/such/folder"]),
        ("--from", ["--from", "xx"]),
        ("--to", ["--to", "nonsense"]),
        ("--save-minutes", ["--save-minutes", "-1"]),
        ("--preset", ["--preset", "huge"]),
        *(
            (option, [option, value])
            for option, value in (
                ("--epochs", "0"), ("--epochs", "many"), ("--epochs", str(10**19)),
                ("--epochs", "9" * 5000), ("--dropout", "1"), ("--dropout", "nan"),
                ("--warmup", "0"), ("--d-model", "10"), ("--d-model", "1000000000"),
                ("--vocab-size", str(2**32)), ("--average", "0"), ("--part-tokens", "0"),
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


# Stopping

LONG = (*TINY, "--dropout", 0.2, "--batch-tokens", 200, "--epochs", 12, "--beam", 1)


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
    progress = [{**state["progress"], "seconds": 0.0} for state in states]
    assert progress[0] == progress[1]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_after_the_step_and_resuming_gives_the_same_bits(
    trained, whole, tmp_path, capsys, monkeypatch, number, status
):
    old, during, steps = signal.getsignal(number), [], []
    batch_loss = T.batch_loss

    def interrupted(*arguments, **options):
        steps.append(None)
        if len(steps) == status - 100:  # in the middle of some epoch
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


def test_a_signal_may_come_at_any_moment(monkeypatch):
    """Also as soon as the first handler is there, before the others are."""
    set_handler = signal.signal

    def set_and_interrupt(number, handler):
        before = set_handler(number, handler)
        if not came:
            came.append(number)
            signal.raise_signal(number)
        return before

    came = []
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(signal, "signal", set_and_interrupt)
    with processes.catching_signals() as signals:
        assert signals == came
    assert {number: signal.getsignal(number) for number in old} == old


def test_a_second_ctrl_c_ends_at_once(trained, tmp_path, capsys, monkeypatch):
    def twice(*_, **__):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(T, "batch_loss", twice)
    assert run_main("--data", trained[0], "--out", tmp_path, *LONG) == 130
    assert capsys.readouterr().err == ""
    assert results(tmp_path) == set()


def test_a_process_that_was_stopped_can_be_resumed(trained, whole, tmp_path):
    process = start("--data", trained[0], *LONG, "--out", tmp_path)
    assert any(re.match(r" +1 ", line) for line in process.stdout), process.stderr.read()
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert (process.returncode, error.count("\n"), "--resume" in error) == (143, 1, True)
    assert run_main("--data", trained[0], *LONG, "--out", tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("when", "saved"), [("mean_loss", "checkpoint.pt"), ("draw_attention", "losses.png")]
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
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(state["progress"]["rows"]) == (1 if when == "mean_loss" else 3)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_can_be_resumed(trained, tmp_path):
    arguments = ("--data", trained[0], *LONG, "--epochs", 100)
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


def open_nothing(rank):
    if rank:
        raise OSError("no file of 1")


def in_two_processes(rank, folder, port, pairs, expected, arguments):
    """Train as one of two processes; compare with what one alone computes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    *settings, out = arguments
    mean_loss = T.mean_loss
    if rank == 0:  # is stopped once it has validated

        def stop(*args):
            signal.raise_signal(signal.SIGTERM)
            return mean_loss(*args)

        T.mean_loss = stop
    assert run_main(*settings, "--out", out / "stopped") == 143
    T.mean_loss = mean_loss
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    os.environ["MASTER_PORT"] = str(port + 1)
    if rank == 1:  # as if its disk were another
        (out / "elsewhere").mkdir()
    folders = ("stopped", "elsewhere")
    assert run_main(*settings, "--resume", "--out", out / folders[rank]) == 1
    assert not dist.is_initialized()

    minute = datetime.timedelta(minutes=1)
    dist.init_process_group("gloo", f"file://{folder}/store", minute, world_size=2, rank=rank)
    assert processes.gather(rank) == [0, 1]
    assert processes.by_first(lambda: 7 - rank) == 7
    with pytest.raises((SystemExit, OSError)[rank]):  # the first isn't an Exception
        processes.by_first(sys.exit)
    with pytest.raises(OSError, match="file of 1"):
        processes.by_each(lambda: open_nothing(rank))
    for (few, dropout, part_tokens), (loss, gradients) in expected.items():
        model = make(dropout=dropout)
        optimizer = torch.optim.SGD(model.parameters())
        trained = DistributedDataParallel(model)
        settings = dataclasses.replace(ONE_BATCH, part_tokens=part_tokens)
        run = start_run(model, optimizer=optimizer, out=folder)
        run.signals = [signal.SIGINT][rank:]  # to one of them stops both
        with pytest.raises(Stopped) as stopped:
            T.train_epoch(run, trained, corpus_of(pairs[:few]), settings)
        assert stopped.value.status == 130
        assert run.progress.loss == pytest.approx(loss, rel=1e-10)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)
    dist.destroy_process_group()
    assert "pt_gloo_runloop\n" not in threads  # at Python's exit, it could abort the process


def in_the_second(index, *arguments):
    in_two_processes(1 + index, *arguments)


@pytest.fixture
def no_group_left():
    """End a group of processes that a failing test leaves behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("no_group_left")
def test_two_processes_train_as_one_does(trained, tmp_path, monkeypatch, capsys):
    """With dropout, too: one process does both shares, each with the seed of its rank."""
    pairs, expected = random_pairs(33), {}
    (order,) = batches_of(pairs, ONE_BATCH)
    for few, dropout, part_tokens in (
        (33, 0.0, 10**6), (33, 0.0, 60), (1, 0.0, 10**6), (33, 0.3, 10**6),
    ):  # fmt: skip
        model, corpus = make(dropout=dropout).train(), corpus_of(pairs[:few])
        shares = [order[rank::2] for rank in (0, 1)] if few > 1 else [torch.arange(1)]
        count = sum(len(target) - 1 for _, target in pairs[:few])
        total = 0.0
        for rank, share in enumerate(shares):  # of one pair, the second gets nothing
            torch.manual_seed(Random(f"0 0 {rank}").getrandbits(63))
            loss = T.batch_loss(model, corpus, share, SMALL.smoothing)
            (loss / count).backward()
            total += loss.item()
        gradients = [p.grad.clone() for p in model.parameters()]
        expected[few, dropout, part_tokens] = (total, gradients)
    assert len({total for total, _ in expected.values()}) == 3

    settings = ("--data", trained[0], *TINY, "--epochs", 2, "--batch-tokens", 300, "--beam", 1)
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
    assert "processes do not see the same" in error

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # one alone resumes what two began
        del os.environ[name]
    state = torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["batch"]) == (1, 1)
    assert run_main(*settings, "--resume", "--out", tmp_path / "stopped") == 0
    weights = load(tmp_path / "one")
    for name, tensor in load(tmp_path / "stopped").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", ["", "1", "2"])
def test_an_environment_that_is_not_torchruns_is_refused(tmp_path, monkeypatch, capsys, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    assert run_main("--out", tmp_path, *TINY) == 1
    assert "without RANK, " in one_line(capsys)


def test_after_a_restart_no_address_of_a_dead_process_is_found():
    store = dist.HashStore()  # that of torchrun
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            stores = list(pool.map(lambda rank: processes.own_store(store, rank, 3), range(3)))
            assert [each.check(["address"]) for each in stores] == [False] * 3
            stores[1].set("address", "")
            assert [each.check(["address"]) for each in stores] == [True] * 3


def test_the_first_process_does_not_wait_forever_for_a_dead_one(monkeypatch):
    monkeypatch.setattr(processes, "LOST", datetime.timedelta(seconds=0.2))
    store = dist.HashStore()
    store.set("question of 1", "asked before it died")
    with pytest.raises(TimeoutError, match="a process was lost"):
        processes.own_store(store, 0, 2)


def under_torchrun(*arguments, options=("--standalone", "--nproc-per-node", "2")):
    """Start the script under torchrun: two of it, if not told otherwise."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT)]
    command += [*map(str, arguments), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, **pipes)


def assert_same_weights(out, other):
    expected = load(other)
    for name, tensor in load(out).items():
        assert torch.equal(tensor, expected[name])


@pytest.fixture(scope="module")
def whole_of_two(trained, tmp_path_factory):
    """The folder of a run of two processes that was not stopped."""
    out = tmp_path_factory.mktemp("whole of two")
    process = under_torchrun("--data", trained[0], *LONG, "--out", out)
    printed, error = process.communicate()
    assert process.returncode == 0, error
    assert "Warning" not in error
    assert printed.count(" parameters on ") == printed.count("Saved in ") == 1
    return out


def workers_of(process):
    """Return the numbers of the processes that torchrun has started (Linux)."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in children.split()]


def wait_for_epoch(process):
    assert any(re.match(r" +1 ", line) for line in process.stdout), process.stderr.read()


@pytest.mark.slow
def test_torchrun_trains_stops_and_resumes(trained, whole_of_two, tmp_path):
    arguments = ("--data", trained[0], *LONG, "--out", tmp_path)
    process = under_torchrun(*arguments)
    wait_for_epoch(process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode != 0
    assert error.count("stopped; use --resume to continue\n") == 1
    process = under_torchrun(*arguments, "--resume")
    _, error = process.communicate()
    assert (process.returncode, "Traceback" in error) == (0, False)
    assert_same_weights(tmp_path, whole_of_two)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--restart", "--seed"])
def test_what_all_processes_refuse_ends_each_with_a_line(trained, option):
    """Not by SIGABRT, as when Python exits while a group of processes still has its threads."""
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "0")
    arguments = ("--seed", "1") if option == "--seed" else ()  # over the checkpoint that is there
    if option == "--restart":
        options = (*options[:-1], "1")
        arguments = ("--restart",)
    process = under_torchrun(
        "--data", trained[0], *RUN, "--out", trained[1], *arguments, options=options
    )
    _, error = process.communicate()
    assert process.returncode == 1
    assert "translation.py: " in error
    assert "SIGABRT" not in error
    assert "exitcode  : 1 " in error


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_is_started_again(trained, whole_of_two, tmp_path, rank):
    process = under_torchrun(
        "--data", trained[0], *LONG, "--out", tmp_path, "--save-minutes", 0, "--resume",
        options=("--standalone", "--nproc-per-node", "2", "--max-restarts", "3"),
    )  # fmt: skip
    wait_for_epoch(process)
    os.kill(workers_of(process)[rank], signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert_same_weights(tmp_path, whole_of_two)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("killed", [None, 0, 1])
def test_two_machines_train_as_one_with_two_processes(trained, whole_of_two, tmp_path, killed):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    options = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    options += ("--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost")
    options += ("--max-restarts", "3")
    arguments = ("--data", trained[0], *LONG, "--out", tmp_path, "--save-minutes", 0, "--resume")
    agents = [under_torchrun(*arguments, options=options) for _ in range(2)]
    if killed is not None:
        while not (tmp_path / "metrics.json").exists():  # after the first epoch
            assert [agent.poll() for agent in agents] == [None, None]
            time.sleep(0.1)
        os.kill(*workers_of(agents[killed]), signal.SIGKILL)
    for agent in agents:
        _, error = agent.communicate()
        assert agent.returncode == 0, error
    assert_same_weights(tmp_path, whole_of_two)


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
    arguments = ("--data", trained[0], "--out", tmp_path, *TINY, "--d-model", 32, "--epochs", 8)
    arguments = [*map(str, arguments), "--batch-tokens", "300", "--device", str(device)]
    assert T.main(arguments) == 0
    scores = json.loads((tmp_path / "metrics.json").read_text())["test"]["test"]
    assert min(scores.values()) > 50
    assert f"parameters on {device}" in capsys.readouterr().out


# What a long run meets


def test_a_checkpoint_is_saved_every_few_minutes(trained, tmp_path, monkeypatch):
    batch_loss, steps = T.batch_loss, []

    def dies(*arguments, **options):
        steps.append(None)
        if len(steps) == 5:
            raise AssertionError("as if killed")
        return batch_loss(*arguments, **options)

    monkeypatch.setattr(T, "batch_loss", dies)
    arguments = ("--data", trained[0], "--out", tmp_path, *RUN)
    with pytest.raises(AssertionError, match="killed"):
        run_main(*arguments, "--save-minutes", 0)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["batch"]) == (0, 4)
    monkeypatch.setattr(T, "batch_loss", batch_loss)
    assert run_main(*arguments, "--resume") == 0
    expected = load(trained[1])
    for name, tensor in load(tmp_path).items():
        assert torch.equal(tensor, expected[name])


def test_training_goes_on_if_a_checkpoint_cannot_be_written(trained, tmp_path, monkeypatch, capsys):
    write, failed = runs.write, []

    def full(path, content, before=None):
        if path.name == "checkpoint.pt" and len(failed) < 7:
            failed.append(path)
            raise OSError(f"can't write {path}: No space left on device")
        write(path, content, before)

    monkeypatch.setattr(runs, "write", full)
    arguments = ("--data", trained[0], "--out", tmp_path, *RUN)
    assert run_main(*arguments, "--save-minutes", 0) == 0
    error = capsys.readouterr().err
    assert error.count("No space left on device; training goes on\n") == error.count("\n") == 7
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["progress"]["epoch"], len(state["progress"]["rows"])) == (3, 3)
    expected = load(trained[1])
    for name, tensor in load(tmp_path).items():
        assert torch.equal(tensor, expected[name])


def test_a_stop_on_a_full_disk_says_so(trained, tmp_path, monkeypatch, capsys):
    batch_loss = T.batch_loss

    def full(path, content, before=None):
        raise OSError(f"can't write {path}: No space left on device")

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return batch_loss(*arguments, **options)

    monkeypatch.setattr(runs, "write", full)
    monkeypatch.setattr(T, "batch_loss", interrupted)
    assert run_main("--data", trained[0], "--out", tmp_path, *RUN) == 1
    assert "No space left" in one_line(capsys)


def test_a_second_run_in_the_same_folder_is_refused(trained, tmp_path, capsys):
    with processes.alone(tmp_path):
        assert run_main("--data", trained[0], "--out", tmp_path, *RUN) == 1
    assert f"another run is using {tmp_path}" in one_line(capsys)
    assert results(tmp_path) == set()
    with processes.alone(tmp_path):  # which is free again
        pass


def test_text_that_was_changed_is_another_run(trained, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for path in trained[0].iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    for name in ("checkpoint.pt", "model.safetensors"):
        (tmp_path / name).write_bytes((trained[1] / name).read_bytes())
    arguments = ("--data", data, "--out", tmp_path, *RUN, "--resume")
    assert run_main(*arguments) == 0  # moved, but the same
    capsys.readouterr()
    lines = (data / "train.en").read_text().replace("dog", "cat")
    (data / "train.en").write_text(lines)
    assert run_main(*arguments) == 1
    assert re.search(r"belongs to another run: text was \w+", one_line(capsys))


def test_averaged_weights_are_the_same_after_a_stop(trained, tmp_path, monkeypatch):
    arguments = ("--data", trained[0], *RUN, "--average", 2, "--out")
    assert run_main(*arguments, tmp_path / "whole") == 0
    signals = iter([signal.SIGTERM, signal.SIGINT])
    batch_loss, steps = T.batch_loss, []

    def interrupted(*arguments, **options):
        steps.append(None)
        if len(steps) in (7, 17):
            signal.raise_signal(next(signals))
        return batch_loss(*arguments, **options)

    monkeypatch.setattr(T, "batch_loss", interrupted)
    assert [run_main(*arguments, tmp_path / "a", "--resume") for _ in range(3)] == [143, 130, 0]
    expected = load(tmp_path / "whole")
    for name, tensor in load(tmp_path / "a").items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("name", "value"), [("TORCHELASTIC_MAX_RESTARTS", "3"), ("GROUP_WORLD_SIZE", "2")]
)
def test_no_checkpoint_is_discarded_where_torchrun_may_start_again(
    tmp_path, monkeypatch, name, value
):
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(b"a checkpoint")
    monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="use --resume"):
        runs.check_start(tmp_path, resume=False, restart=True)
    runs.check_start(tmp_path, resume=True, restart=False)
    monkeypatch.setenv(name, "0" if value == "3" else "1")  # torchrun without either
    runs.check_start(tmp_path, resume=False, restart=True)
    assert checkpoint.read_bytes() == b"a checkpoint"


def test_a_run_touches_no_file_of_others(trained, tmp_path):
    others = (
        ".zcompdump-host-5.8",
        ".bash_history.2024",
        ".env.1",
        ".venv.3.11/file",
        "notes.4711",
    )
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    part = tmp_path / ".model.safetensors.4711.part"
    part.write_bytes(b"left by a killed process")
    assert run_main("--data", trained[0], "--out", tmp_path, *RUN) == 0
    assert not part.exists()
    assert run_main("--data", trained[0], "--out", tmp_path, *RUN, "--restart") == 0
    assert [(tmp_path / name).read_bytes() for name in others] == [b"mine"] * len(others)


def test_a_restart_without_data_discards_nothing(trained, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(trained[0], data)
    (data / "val.en").unlink()
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(b"a checkpoint")
    assert run_main("--data", data, "--out", tmp_path, *RUN, "--restart") == 1
    assert "val.en" in one_line(capsys)
    assert checkpoint.read_bytes() == b"a checkpoint"


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path):
    run = start_run(make(), out=tmp_path)
    run.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    run.model.embedding.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="no longer finite"):
        run.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_training_goes_on_if_the_last_weights_cannot_be_averaged(
    trained, tmp_path, monkeypatch, capsys
):
    write, names = shell.write, []

    def full(path, content):
        if path.name.startswith("weights-") and len(names) < 1:
            names.append(path.name)
            raise OSError(f"can't write {path}: No space left on device")
        write(path, content)

    monkeypatch.setattr(shell, "write", full)
    assert run_main("--data", trained[0], *RUN, "--average", 2, "--out", tmp_path) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # the second epoch lacks the weights of the first
    assert all(line.endswith("; training goes on") for line in lines)
    assert names == ["weights-1.safetensors"]


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # of capsys
def test_phrases_are_learned_without_data(run_script, tmp_path, monkeypatch):
    monkeypatch.setattr("inputs.phrases.COUNTS", {"train": 60, "val": 4, "test": 3})
    done = run_script(
        "translation.py", "--out", tmp_path / "out", "--device", "cpu", *TINY, "--epochs", 1,
        "--from", "fr", "--to", "zh",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "60 pairs per epoch" in done.stdout
    assert "|tok:zh|" in done.stdout
    assert "\ntest: 3 sentences\n" in done.stdout
    assert len([*tmp_path.glob("out/phrases-fr-zh-*/train.fr")]) == 1
