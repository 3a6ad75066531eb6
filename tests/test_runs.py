"""Long runs of any network: stopped, killed, resumed, and refused."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT
from running import runs
from running.runs import Run
from running.shell import Stopped

BATCHES = torch.arange(12).float().view(4, 3)


def start(out, epochs=3, seed=5, settings=None, conditions=None, **options):
    """Make a run with two optimizers, one of them for matrices."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, fused=True)]
    return Run(out, model, optimizers, settings or {"size": 3}, epochs, seed, conditions, **options)


def train(run, stop_at=None, number=signal.SIGTERM):
    """Train to the end, or to a signal during a step."""
    with run.stoppable():
        while not run.ended:
            for batch in run.steps(BATCHES):
                loss = F.mse_loss(run.model(batch + torch.rand(3)), torch.ones(1))
                for optimizer in run.optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in run.optimizers:
                    optimizer.step()
                if run.progress.step == stop_at:
                    signal.raise_signal(number)
                run.add(loss, 1)
            run.end_epoch(float(run.progress.epoch))
            if run.progress.epoch == 1:
                run.keep("first-epoch.pt")
    return run


def state_of(run):
    rows = [row[:3] for row in run.progress.rows]
    weights = [p.tolist() for p in run.model.parameters()]
    return weights, [str(optimizer.state_dict()) for optimizer in run.optimizers], rows


@pytest.fixture
def out(tmp_path):
    """The folder of a run that was stopped in its second epoch."""
    with pytest.raises(Stopped):
        train(start(tmp_path), stop_at=6)
    return tmp_path


@pytest.mark.parametrize("stop_at", [0, 2, 3, 4, 11])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_run_of_two_optimizers_ends_as_if_it_had_not_been_stopped(
    tmp_path, capsys, stop_at, number, status
):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    expected = state_of(train(start(tmp_path / "whole")))
    with pytest.raises(Stopped) as stopped:
        train(start(tmp_path / "stopped"), stop_at, number)
    assert stopped.value.status == status
    assert capsys.readouterr().err.endswith("stopped; use --resume to continue\n")
    run = start(tmp_path / "stopped")
    run.resume()
    assert run.progress.step == stop_at + 1
    assert state_of(train(run)) == expected
    assert capsys.readouterr().err == ""


def test_no_two_seeds_are_alike():
    """As those of 0 and 2**61 - 1 were with `hash`."""
    runs_of = [start(None, seed=seed) for seed in (0, 1, 2**61 - 1, 2**63 - 1)]
    numbers = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (11,)]
    seeds = [run.derive_seed(*each) for run in runs_of for each in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [run.derive_seed(*each) for run in runs_of for each in numbers]


@pytest.mark.parametrize("content", [None, b"", b"half"])
def test_the_checkpoint_before_resumes_if_the_newest_is_broken(out, capsys, content):
    newest, before = out / runs.NEWEST, out / runs.BEFORE
    older = before.read_bytes()
    if content is None:
        newest.unlink()
    else:
        newest.write_bytes(content)
    capsys.readouterr()
    run = start(out)
    run.resume()
    assert run.progress.step == 4  # the end of the first epoch
    error = capsys.readouterr().err
    if content is not None:
        assert error.count("\n") == 1
        assert f"{newest}: " in error
        assert error.endswith(f"; trying {runs.BEFORE}\n")
    run.save()
    assert before.read_bytes() == older  # what is broken doesn't take its place
    run.save()
    assert before.read_bytes() == newest.read_bytes()
    assert len(list(out.glob("checkpoint*"))) == 2


def test_if_both_are_broken_nothing_is_resumed(out):
    for name in (runs.NEWEST, runs.BEFORE):
        (out / name).write_bytes(b"broken")
    with pytest.raises(OSError, match=f"nothing to resume: {out / runs.BEFORE}: "):
        start(out).resume()


def test_a_full_disk_leaves_both_checkpoints(out, monkeypatch):
    contents = [(out / name).read_bytes() for name in (runs.NEWEST, runs.BEFORE)]
    run = start(out)
    run.resume()

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.save()
    assert [(out / name).read_bytes() for name in (runs.NEWEST, runs.BEFORE)] == contents


@pytest.mark.parametrize("name", [runs.NEWEST, runs.BEFORE])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "not a plain file"),
        (os.mkdir, "not a plain file"),
        (lambda path: path.symlink_to("/no/such/disk/checkpoint.pt"), "a link to nowhere"),
    ],
)
def test_what_is_no_file_is_not_taken_for_no_checkpoint(tmp_path, name, make, message):
    make(tmp_path / name)
    for resume in (True, False):
        with pytest.raises(OSError, match=f"{name} is {message}"):
            runs.check_start(tmp_path, resume, not resume)
    with pytest.raises(OSError, match=f"{name} is {message}"):
        start(tmp_path).resume()


def test_other_settings_and_seeds_are_refused_by_their_names(out):
    with pytest.raises(OSError, match=r"belongs to another run: size was 3, not 4$"):
        start(out, settings={"size": 4}).resume()
    with pytest.raises(OSError, match=r"belongs to another run: seed was 5, not 6$"):
        start(out, seed=6).resume()


def test_other_conditions_are_said(out, capsys):
    capsys.readouterr()
    run = start(out, conditions={"part_tokens": 60})
    run.resume()
    expected = "not bit for bit as before, since part_tokens was None, not 60\n"
    assert capsys.readouterr().err == expected
    train(run)


def test_moments_of_another_shape_are_refused_before_they_crash(out):
    for name in (runs.NEWEST, runs.BEFORE):
        state = torch.load(out / name, weights_only=True)
        state["optimizers"][1]["state"][0]["exp_avg"] = torch.zeros(9)
        torch.save(state, out / name)
    with pytest.raises(OSError, match="exp_avg of its optimizer has another shape"):
        start(out).resume()


def test_missing_moments_are_refused_before_they_crash(out):
    for name in (runs.NEWEST, runs.BEFORE):
        state = torch.load(out / name, weights_only=True)
        del state["optimizers"][1]["state"][0]["exp_avg"]
        torch.save(state, out / name)
    with pytest.raises(OSError, match="not all parameters have the same moments"):
        start(out).resume()


def test_a_checkpoint_that_is_kept_goes_on_to_the_same_end(tmp_path):
    expected = state_of(train(start(tmp_path)))
    (tmp_path / "first-epoch.pt").replace(tmp_path / runs.NEWEST)
    run = start(tmp_path)
    run.resume()
    assert run.progress.step == len(BATCHES)
    assert state_of(train(run)) == expected


def test_what_is_not_a_number_stops_the_run_and_is_not_saved(out):
    before = (out / runs.NEWEST).read_bytes()
    run = start(out)
    run.resume()
    for _ in run.steps(BATCHES):
        with pytest.raises(FloatingPointError, match="the loss became nan"):
            run.add(torch.tensor(torch.nan), 1)
            run.sum_up()
        break
    assert (out / runs.NEWEST).read_bytes() == before


def test_old_files_are_set_aside_and_others_stay(out):
    (out / "notes.txt").write_text("mine")
    (out / "model.safetensors").write_text("old")
    runs.set_aside(out, ["model.safetensors"], resume=True)
    assert (out / runs.NEWEST).exists()
    runs.set_aside(out, ["model.safetensors", "first-epoch.pt"], resume=False)
    names = {*runs.FILES, "model.safetensors", "first-epoch.pt"}
    assert {path.name for path in (out / "previous").iterdir()} == names
    assert {path.name for path in out.iterdir()} == {"notes.txt", "previous"}


# The script of the manual


@pytest.fixture(scope="module")
def sine(tmp_path_factory):
    """The reader's own script, as the manual has it."""
    text = (ROOT / "docs/long-runs.md").read_text(encoding="utf-8")
    (script,) = re.findall(r'^```python\n(""".*?)^```$', text, re.DOTALL | re.MULTILINE)
    path = tmp_path_factory.mktemp("sine") / "sine.py"
    path.write_text(script, encoding="utf-8")
    return path


def start_script(path, out, *options):
    command = [sys.executable, str(path), "--device", "cpu", "--out", str(out), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=environment, **pipes)


@pytest.mark.slow
def test_a_readers_own_script_is_stopped_killed_and_resumed(sine, tmp_path):
    whole = start_script(sine, tmp_path / "whole")
    assert "Epoch(epoch=30, " in whole.communicate()[0]
    statuses = []
    for epoch, number in ((4, signal.SIGTERM), (9, signal.SIGKILL), (14, signal.SIGINT)):
        run = start_script(sine, tmp_path / "stopped", "--resume")
        assert any(f"epoch={epoch}," in line for line in run.stdout), run.stderr.read()
        run.send_signal(number)
        assert "Traceback" not in run.communicate()[1]
        statuses.append(run.returncode)
    assert statuses == [143, -signal.SIGKILL, 130]
    run = start_script(sine, tmp_path / "stopped", "--resume")
    assert (run.communicate()[1], run.returncode) == ("", 0)
    states = [
        torch.load(tmp_path / name / runs.NEWEST, weights_only=True)
        for name in ("whole", "stopped")
    ]
    assert states[0]["progress"]["step"] == 30 * 128
    for name, tensor in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], tensor)
    again = start_script(sine, tmp_path / "stopped")
    error = again.communicate()[1]
    assert (again.returncode, error.count("\n"), "--resume continues it" in error) == (1, 1, True)
