"""What several tests share."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator where there is none."""
    if not torch.accelerator.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no accelerator"))


@pytest.fixture(autouse=True)
def same_precision() -> Iterator[None]:
    """Undo what main sets for the whole process."""
    precision, flash = torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_flash_sdp(flash)


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run src/<name> in an empty folder, and return what it printed and its exit status."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "src" / name), *map(str, arguments)]
        environment = os.environ | {"PYTHONIOENCODING": "ascii"}  # they print UTF-8 all the same
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
        )

    return run
