import importlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

hello = importlib.import_module("pytorch-hello")


@pytest.mark.parametrize("N", [3, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_step_follows_the_gradient_of_the_mean_squared_error(N, dtype):
    x = torch.linspace(-1, 1, N, dtype=dtype)
    y = 30 * x - 20  # far from any line at the start: there, other losses have other gradients

    def fit(steps):
        torch.manual_seed(0)
        return hello.fit_line(x, y, steps, learning_rate=0.1)

    w, b = fit(steps=0)
    errors = []
    for steps in (1, 2, 3):
        error = w * x.numpy() + b - y.numpy()
        w -= 0.1 * 2 * (error * x.numpy()).mean()
        b -= 0.1 * 2 * error.mean()
        errors.append((error**2).mean())
        np.testing.assert_allclose(fit(steps), (w, b), rtol=1e-5)
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(("slope", "intercept", "noise"), [(3.0, -2.0, 0.1), (-0.5, 4.0, 0.0)])
def test_fit_line_finds_the_least_squares_line(slope, intercept, noise):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 50, dtype=torch.float64)
    y = slope * x + intercept + noise * torch.randn(50, dtype=torch.float64)
    found = hello.fit_line(x, y, steps=300, learning_rate=0.2)
    np.testing.assert_allclose(found, np.polyfit(x.numpy(), y.numpy(), 1), atol=1e-6)


def test_it_runs_and_prints_what_it_found(run_script):
    done = run_script("pytorch-hello.py", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert 12 <= len(done.stdout.splitlines()) <= 18
    assert f"PyTorch {torch.__version__} on cpu" in done.stdout
    assert "[[7.0, 10.0], [15.0, 22.0]]" in done.stdout
    assert re.findall(r"(?:autograd|x\*\*2) +([\d.]+)", done.stdout) == ["12.0", "12.0"]
    fitted, best = re.findall(r"(?:descent|one go) +([-\d.]+) +([-\d.]+)", done.stdout)
    np.testing.assert_allclose(np.float64(fitted), np.float64(best), atol=1e-3)
    np.testing.assert_allclose(np.float64(best), [3, -2], atol=0.15)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--device abacus", "argument --device: 'abacus' can't be used here: "),
        ("--device hpu", "argument --device: 'hpu' can't be used here: "),
        ("--device meta", "argument --device: 'meta' can't be used here: "),
        (f"--seed {2**70}", "argument --seed: must be between 0 and "),
        ("--seed -1", "argument --seed: must be between 0 and "),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(argument, message, capsys):
    with pytest.raises(SystemExit) as stop:
        hello.main(argument.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_closed_pipe_ends_it_quietly():
    process = subprocess.Popen(
        [sys.executable, hello.__file__, "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", -signal.SIGPIPE)


def test_a_closed_stdout_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert hello.main(["--device", "cpu"]) == 0
