"""What several tests share."""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # as many tests run at once as there are cores
os.environ["OMP_NUM_THREADS"] = "1"  # the same in the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


class Done(NamedTuple):
    """What a script left behind."""

    returncode: int
    stdout: str
    stderr: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator where there is none."""
    if not torch.accelerator.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no accelerator"))


@pytest.fixture
def run_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Run src/<name> as a person does, but in this process, where PyTorch is imported already."""

    def run(name: str, *arguments: object) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        handler = signal.getsignal(signal.SIGPIPE)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "src" / name), run_name="__main__")
        signal.signal(signal.SIGPIPE, handler)  # a script may let a closed pipe end the process
        return Done(stop.value.code, *capsys.readouterr())

    return run
