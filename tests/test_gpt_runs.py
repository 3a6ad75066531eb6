"""Long runs of gpt.py: parts, processes, longer schedules, and published models that go on."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import gpt as G
from make_models import FOLDERS, MODELS, assert_close
from running import processes, runs
from test_gpt import OPTIONS, SETTINGS, data, encode, prepared, start, train  # noqa: F401

SCRIPT = Path(G.__file__)
MIXED = b"def f(x):\n    return x\n" + "für 日本\n".encode() + b"\xff\0"


@pytest.fixture(params=FOLDERS)
def published(request):
    return G.open_model(MODELS / request.param)


def test_lora_begins_as_what_is_there_and_learns_only_small_matrices(published):
    model, _ = published
    tokens = torch.randint(264, (2, 9))
    expected = model(tokens)
    G.add_lora(model, 3)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 7 * model.sizes.num_layers
    assert all(name.endswith((".A.weight", ".B.weight")) for name in learning)


def test_merged_lora_is_w_plus_b_a(published):
    model, _ = published
    before = {name: p.clone() for name, p in model.named_parameters()}
    G.add_lora(model, 3)
    for part in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(part, std=0.1)
    tokens = torch.randint(264, (2, 9))
    expected = model(tokens)
    merged = G.merge_lora(model)
    assert_close(merged(tokens), expected)
    assert merged.state_dict().keys() == G.GPT(model.sizes).state_dict().keys()
    lora = model.layers[0].feed_forward.W_up
    change = lora.B.weight @ lora.A.weight
    assert change.abs().max() > 0
    found = merged.layers[0].feed_forward.W_up.weight
    torch.testing.assert_close(found, before["layers.0.feed_forward.W_up.weight"] + change)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)  # as it was


def test_lora_is_made_where_the_weights_are():
    model = G.GPT(G.Sizes(264, 8, 1, 2, 2, 4, 8, 8, tied=True)).to("meta")
    G.add_lora(model, 2)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_without_lora_nothing_is_merged(published):
    assert G.merge_lora(published[0]) is published[0]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_parts_and_processes_add_up_to_the_gradient_of_one(monkeypatch, world, most):
    torch.manual_seed(0)
    model = nn.Linear(4, 6).double()
    x = torch.randn(2, 4).double() if world == 3 else torch.randn(5, 4).double()
    labels = torch.arange(len(x))
    F.cross_entropy(model(x), labels).backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    seen = 0
    for rank in range(world):  # one after the other, and none by DDP
        monkeypatch.setattr(processes, "rank_and_world", lambda rank=rank: (rank, world))
        for rows, weight in processes.own_parts(model, torch.arange(len(x)), most):
            assert len(rows) <= most
            seen += len(rows) * (weight > 0)
            (F.cross_entropy(model(x[rows]), labels[rows]) * weight).backward()
    assert seen == len(x)
    torch.testing.assert_close(model.weight.grad / world, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("part_size", [1, 3])
def test_parts_train_as_the_whole_batch_does(tmp_path, prepared, part_size):  # noqa: F811
    settings = replace(SETTINGS, batch_size=4)
    rows = train(start(tmp_path / "whole", prepared, settings=settings), prepared, settings)
    parts = replace(settings, part_size=part_size)
    found = train(start(tmp_path / "parts", prepared, settings=parts), prepared, parts)
    for row, expected in zip(found, rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow  # for a compiler
def test_compiled_steps_train_as_plain_ones_do(tmp_path, prepared):  # noqa: F811
    rows = train(start(tmp_path / "plain", prepared), prepared, SETTINGS)
    settings = replace(SETTINGS, compiled=True)
    found = train(start(tmp_path / "compiled", prepared, settings=settings), prepared, settings)
    for row, expected in zip(found, rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_a_run_is_lengthened_from_before_its_rates_fall(tmp_path, prepared, capsys):  # noqa: F811
    short = replace(SETTINGS, steps=8, falling=0.5)
    long = replace(SETTINGS, steps=16, falling=0.25)
    expected = train(start(tmp_path / "long", prepared, settings=long), prepared, long)
    train(start(tmp_path / "short", prepared, settings=short), prepared, short)
    folder = tmp_path / "short"
    (folder / G.BEFORE_FALL).replace(folder / runs.NEWEST)
    run = start(folder, prepared, settings=long)
    run.resume()
    assert run.progress.step == short.fall == 4
    assert "since steps was 8, not 16" in capsys.readouterr().err
    found = train(run, prepared, long)
    assert [row[:3] for row in run.progress.rows] == expected
    assert len(found) == len(expected) - 2


def test_rates_that_fall_from_the_start_leave_nothing_to_lengthen(tmp_path, prepared):  # noqa: F811
    settings = replace(SETTINGS, steps=2, falling=1.0)
    train(start(tmp_path, prepared, settings=settings), prepared, settings)
    assert not (tmp_path / G.BEFORE_FALL).exists()


def test_a_run_is_lengthened_where_an_epoch_was_short(tmp_path, prepared):  # noqa: F811
    short = replace(SETTINGS, steps=3)
    train(start(tmp_path, prepared, settings=short), prepared, short)
    long = replace(SETTINGS, steps=6)
    run = start(tmp_path, prepared, settings=long)
    run.resume()
    train(run, prepared, long)
    assert run.progress.step == 6
    assert len(run.progress.rows) == 3


def test_clipped_gradients_and_decayed_matrices(tmp_path, prepared):  # noqa: F811
    settings = replace(SETTINGS, clip=1e-9, weight_decay=0.5, muon=False)
    run = start(tmp_path / "out", prepared, settings=settings)
    decays = [optimizer.param_groups[0]["weight_decay"] for optimizer in run.optimizers]
    assert decays == [0.5, 0.0]
    train(run, prepared, settings)
    norms = [p.grad.norm() for p in run.model.parameters()]
    assert torch.stack(norms).norm() <= 1.001e-9


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("name", ["llama-tied", "qwen-2", "qwen-3"])
def test_a_published_model_goes_on_and_opens_elsewhere(tmp_path, data, name, lora_rank):  # noqa: F811
    model, texts = G.open_model(MODELS / name)
    settings = replace(SETTINGS, muon=False, lora_rank=lora_rank, batch_size=8)
    encoded = encode(data, tmp_path / "corpus", texts)
    _, corpus = encoded
    before = G.measure_bits(model, corpus.held_out).mean()
    run = start(tmp_path / "out", encoded, settings=settings, model=model)
    train(run, encoded, settings)
    again, _ = G.open_model(tmp_path / "out")
    assert again.sizes == model.sizes
    bits = G.measure_bits(again, corpus.held_out).mean()
    assert bits < before
    assert bits * math.log(2) == pytest.approx(run.progress.rows[-1].validation_loss, rel=1e-4)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(264, (2, 9))
    assert_close(theirs(tokens).logits, again(tokens))


def test_a_checkpoint_of_lora_holds_what_learns_and_is_resumed(tmp_path, data):  # noqa: F811
    settings = replace(SETTINGS, muon=False, lora_rank=2, steps=6)
    _, texts = G.open_model(MODELS / "llama-tied")
    encoded = encode(data, tmp_path / "corpus", texts)

    def begin(out):
        model, _ = G.open_model(MODELS / "llama-tied")
        return start(tmp_path / out, encoded, settings=settings, model=model)

    whole = begin("whole")
    expected = train(whole, encoded, settings)
    stopped = begin("stopped")
    next(G.train(stopped, encoded[1], texts, settings))
    saved = torch.load(tmp_path / "stopped" / runs.NEWEST, weights_only=True)["model"]
    assert saved.keys() == {name for name, p in stopped.model.named_parameters() if p.requires_grad}
    resumed = begin("stopped")
    resumed.resume()
    assert resumed.progress.step == settings.interval
    assert [*expected[:1], *train(resumed, encoded, settings)] == expected
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_another_model_is_another_run(tmp_path, data):  # noqa: F811
    settings = replace(SETTINGS, muon=False, steps=2)
    first, texts = G.open_model(MODELS / "llama")
    second, _ = G.open_model(MODELS / "llama-tied")
    encoded = encode(data, tmp_path / "corpus", texts)
    train(start(tmp_path, encoded, settings=settings, model=first), encoded, settings)
    with pytest.raises(OSError, match="belongs to another run: model was"):
        start(tmp_path, encoded, settings=settings, model=second).resume()


def test_tuning_as_a_person_runs_it(run_script, tmp_path, data):  # noqa: F811
    small = ("--context", 32, "--steps", 2, "--preset", "lora")
    model = MODELS / "llama"
    done = run_script("gpt.py", "--model", model, "--data", data, *small)
    assert done.returncode == 0, done.stderr
    assert "of the parameters learn" in done.stdout
    assert run_script("gpt.py", "--write", "def").returncode == 0
    for options, status, message in (
        (("--model", model), 2, "argument --model: needs --write"),
        (("--model", model, "--data", data, "--d-model", 8), 2, "--d-model: not allowed with"),
        (("--lora-rank", 8), 2, "in the preset lora): needs --model"),
        (("--model", model, "--data", data, "--out", model), 2, "--out: must be another folder"),
        (("--model", model, "--data", data, "--context", 65), 1, "takes 64 tokens at most"),
    ):
        refused = run_script("gpt.py", *options, "--restart")
        assert (refused.returncode, message in refused.stderr) == (status, True), refused.stderr


def under_torchrun(data, out, *options):  # noqa: F811
    """Train with two processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", SCRIPT, "--data", data, "--out", out, "--device", "cpu"]
    command += [*OPTIONS, *options]
    pipe = subprocess.PIPE
    return subprocess.Popen([*map(str, command)], stdout=pipe, stderr=pipe, encoding="utf-8")


@pytest.mark.slow
def test_two_processes_train_stop_and_resume(tmp_path, data):  # noqa: F811
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = under_torchrun(data, whole)
    printed, error = process.communicate()
    assert process.returncode == 0, error
    assert printed.count(" parameters on ") == printed.count("Saved in ") == 1
    process = under_torchrun(data, stopped)
    assert any(line.startswith("    2 ") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode != 0
    assert error.count("stopped; use --resume to continue\n") == 1
    process = under_torchrun(data, stopped, "--resume")
    _, error = process.communicate()
    assert (process.returncode, "Traceback" in error) == (0, False)
    weights, others = (
        safetensors.torch.load_file(out / "model.safetensors") for out in (whole, stopped)
    )
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


def test_a_lack_of_a_compiler_is_a_line(tmp_path, data):  # noqa: F811
    options = ("--data", data, "--out", tmp_path / "out", "--device", "cpu", "--compiled")
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, (*OPTIONS, *options))],
        env={**os.environ, "CXX": "no compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False)
    last = done.stderr.splitlines()[-1]
    assert "gpt.py: PyTorch can't compile here; use --no-compiled: " in last
    assert not (tmp_path / "out/corpus").exists()


@pytest.mark.gpu
def test_it_trains_writes_and_zips_on_an_accelerator(run_script, tmp_path, data):  # noqa: F811
    device = str(torch.accelerator.current_accelerator())
    for name, options in (("plain", ()), ("compiled", ("--compiled",))):
        out = tmp_path / name
        options = (*OPTIONS, "--data", data, "--out", out, "--device", device, *options)
        trained = run_script("gpt.py", *options)
        assert trained.returncode == 0, trained.stderr
        assert f"parameters on {device}" in trained.stdout
    losses = [
        json.loads((tmp_path / name / "metrics.json").read_text())["bits_per_byte"]
        for name in ("plain", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    use = ("--out", tmp_path / "plain", "--device", device)
    assert run_script("gpt.py", *use, "--write", "def ").stdout.startswith("def ")
    path = tmp_path / "some.txt"
    content = MIXED * 3
    path.write_bytes(content)
    assert run_script("gpt.py", *use, "--zip", path).returncode == 0
    path.unlink()
    unzipped = run_script("gpt.py", *use, "--unzip", f"{path}.z")
    assert (unzipped.returncode, path.read_bytes()) == (0, content), unzipped.stderr
