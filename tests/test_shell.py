"""What every script does for a person: statuses, one-line errors, whole files, safe models."""

import argparse
import errno
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from tqdm import tqdm

from running import shell

ROOT = Path(__file__).resolve().parent.parent


def run(body, *arguments):
    """Run a body as a command."""
    return shell.command(body)(*arguments)


def raising(error):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError("it is \x1b[31mred"), 1, ": it is ?[31mred\n"),
        (FloatingPointError("the loss became nan"), 1, ": the loss became nan\n"),
        (torch.OutOfMemoryError("CUDA is full. Tried\n..."), 1, ": CUDA is full. Tried\n"),
        (RuntimeError("[enforce fail] can't allocate memory: 4"), 1, "can't allocate memory: 4\n"),
    ],
)  # fmt: skip
def test_what_a_person_can_cause_ends_in_one_line(error, status, line, capsys):
    assert run(raising(error)) == status
    printed, said = capsys.readouterr()
    assert (printed, said.count("\n")) == ("", 1 if line else 0)
    assert said.endswith(line)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), ValueError("a bug")])
def test_what_only_a_bug_can_cause_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        run(raising(error))


def test_the_help_can_be_piped_away(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(shell.make_parser("about", "some").parse_args, ["--help"]) == 141
    assert capsys.readouterr().err == ""


def test_progress_bars_need_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert run(lambda: sum(tqdm([0, 0], disable=None))) == 0


def test_a_command_passes_arguments_and_status_on():
    assert run(lambda argv: len(argv), ["a", "b"]) == 2


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_closed_pipe_ends_it_quietly(lines, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(lambda: print("line\n" * lines) or 0) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_ends_it_in_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as stdout:  # and closes it, as Python does at its exit
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(lambda: print("a line") or 0) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line


@pytest.mark.parametrize("stdout", [None, io.StringIO()])
def test_a_closed_stdout_and_a_notebooks_are_no_error(stdout, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(lambda: print("√") or 0) == 0


def test_any_character_can_be_printed(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(lambda: print("√ \udcff") or 0) == 0
    assert stdout.buffer.getvalue() == "√ \\udcff\n".encode()


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("\x1b]0;title\x07 \r\n\t\x9b", "?]0;title? ????"),
        ("\u2028\u2029\udcff", "???"),
        ("\u202egnp.exe \u2066\u200f", "?gnp.exe ??"),
        (Path("a\x00b"), "a?b"),
        *(
            (kept, kept)
            for kept in ("962\u202f000", "5\u00a0km\u3000", "a\u200cb", "\U0001f468\u200d")
        ),
    ],
)
def test_what_is_printed_keeps_spaces_and_joiners_and_steers_nothing(text, printed):
    assert shell.printable(text) == printed


@pytest.mark.parametrize(
    ("low", "high", "text", "value"),
    [(1, 10, "7", 7), (1, 10, "0", None), (1, 10, "1.5", None), (1, 10, "many", None),
     (1, 10, "9" * 5000, None), (0.0, 1.0, "0.5", 0.5), (0.0, 1.0, "nan", None),
     (0.0, 1.0, "inf", None)],
)  # fmt: skip
def test_a_number_is_parsed_or_refused(low, high, text, value):
    if value is None:
        with pytest.raises(argparse.ArgumentTypeError, match="must be between"):
            shell.number(low, high)(text)
    else:
        assert shell.number(low, high)(text) == value


@pytest.mark.parametrize("name", ["abacus", "hpu", "meta", "a\x1b]0;title\x07b"])
def test_a_device_that_cannot_be_used_is_named(name):
    with pytest.raises(argparse.ArgumentTypeError, match="can't be used here: ") as caught:
        shell.usable_device(name)
    assert str(caught.value).isprintable()


def test_a_folder_whose_name_is_not_utf_8_is_refused():
    assert shell.folder("é") == Path("é")
    with pytest.raises(argparse.ArgumentTypeError, match="must be a name in UTF-8"):
        shell.folder("s\udcff")


def test_each_process_of_several_gets_a_gpu_of_its_own(monkeypatch):
    asked = []
    one = torch.ones(1)
    monkeypatch.setattr(shell.torch, "zeros", lambda n, device: asked.append(device) or one)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert shell.usable_device("cuda") == torch.device("cuda", 3)
    assert shell.usable_device("cpu") == torch.device("cpu")
    assert asked == ["cuda:3", "cpu"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "can't write .*model: No space left"),
        (KeyboardInterrupt(), "^$"),
    ],
)
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_part(
    error, message, tmp_path, monkeypatch
):
    def fail(descriptor):
        raise error

    path = tmp_path / "model"
    shell.write(path, b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error), match=message):
        shell.write(path, b"new")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"old"


def test_what_killed_processes_left_of_a_file_is_cleared_and_nothing_else(tmp_path):
    others = {".model.4711", ".model.x.part", ".models.1.part", ".bash_history.2024", "model"}
    for name in (*others, ".model.4711.part"):
        (tmp_path / name).write_bytes(b"left")
    shell.clear_parts(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == others


# Saved networks


def make(about):
    """Make a network of the size that its file names."""
    return nn.Linear(int(about["size"]), 1)


@pytest.fixture
def saved(tmp_path):
    model = nn.Linear(3, 1)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save(model.state_dict(), {"size": "3"}))
    return model, path


def test_a_saved_network_is_the_same_when_opened(saved):
    model, path = saved
    found, about = shell.open_weights(path, make)
    assert about == {"size": "3"}
    assert torch.equal(found.weight, model.weight)
    assert torch.equal(found.bias, model.bias)


def again(tensors=None, about=None):
    def spoil(content):
        return safetensors.torch.save({**safetensors.torch.load(content), **(tensors or {})}, about)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, "there is no such file"),
        (lambda content: b"", ""),
        (lambda content: b"a text", ""),
        (lambda content: content[:-1], ""),
        (again(), "broken, or from another script"),
        (again(about={"size": "many"}), ""),
        (again(about={"size": "4"}), "other sizes"),
        (again(about={"size": str(10**14)}), "other sizes"),  # which takes no memory
        (again({"more": torch.zeros(1)}, {"size": "3"}), "other sizes"),
        (again({"bias": torch.tensor([math.nan])}, {"size": "3"}), "not finite"),
    ],
    ids=range(10),
)
def test_a_file_that_is_no_such_network_is_refused_in_one_line(saved, spoil, message):
    _, path = saved
    content = path.read_bytes()
    path.unlink()
    if spoil:
        path.write_bytes(spoil(content))
    with pytest.raises(OSError, match="not a model saved by this script; train") as caught:
        shell.open_weights(path, make)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_flipped_bit_of_a_saved_network_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    shell.save_weights(path, nn.Linear(3, 1), {"size": "3"})
    shell.open_weights(path, make)
    content = path.read_bytes()
    for place in range(len(content) - 16, len(content)):  # its four numbers
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(OSError, match="its checksum is wrong"):
            shell.open_weights(path, make)


def test_a_pipe_is_no_network_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a plain file"):
        shell.open_weights(tmp_path / "pipe", make)


# The scripts


STANDALONE = {
    "pytorch-hello.py": [],
    "attention.py": ["--steps", "1"],
    "fashion-mnist.py": ["--data", "small data", "--epochs", "1"],
}


@pytest.mark.parametrize("script", STANDALONE)
def test_a_script_that_one_starts_with_runs_alone_in_an_empty_folder(script, folder, tmp_path):
    (tmp_path / script).write_bytes((ROOT / "src" / script).read_bytes())
    command = [sys.executable, script, "--device", "cpu", *STANDALONE[script]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    names = {path.name for path in tmp_path.iterdir()} - {script, folder.name}
    assert names == (set() if script == "pytorch-hello.py" else {"runs"})
    if names:
        assert (tmp_path / "runs" / Path(script).stem / "metrics.json").exists()


SCRIPTS = ("pytorch-hello", "fashion-mnist", "attention", "transformer", "translation", "practice")
ALL = f"""
import importlib, signal, torch
random, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
scripts = [importlib.import_module(name) for name in {SCRIPTS}]
assert torch.equal(torch.get_rng_state(), random) and signal.getsignal(signal.SIGINT) is handler
for script in scripts:
    print(script.__name__)
    try:
        script.main(["--help"])
    except SystemExit:
        pass
"""


def test_importing_does_nothing_and_help_shows_the_defaults(tmp_path):
    """Also without docstrings."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONOPTIMIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", ALL], cwd=tmp_path, env=environment, capture_output=True,
        encoding="utf-8",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pytorch-hello\nusage: ")
    assert done.stdout.count("usage: ") == len(SCRIPTS)
    assert len(re.findall(r"--seed.*\n?.*\(default:\s+0\)", done.stdout)) == len(SCRIPTS) - 1
    assert not [*tmp_path.iterdir()]
