"""What several tests share."""

import gzip
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import clothes

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


def idx(array: np.ndarray) -> bytes:
    """Pack bytes in the IDX format."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="session")
def sample() -> clothes.Split:
    """The training split of the sample."""
    return clothes.load(clothes.SAMPLE, train=True)


@pytest.fixture(scope="session")
def files(sample: clothes.Split) -> dict[str, bytes]:
    """The files of a data set of 1,200 and 300 images, two of them not gzipped."""
    images, labels = (tensor.numpy() for tensor in sample)
    found = {}
    for name, part in (("train", slice(1200)), ("t10k", slice(1200, 1500))):
        found[f"{name}-images-idx3-ubyte.gz"] = gzip.compress(idx(images[part]))
        found[f"{name}-labels-idx1-ubyte"] = idx(labels[part])
    return found


@pytest.fixture
def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files."""
    folder = tmp_path / "small data"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


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
