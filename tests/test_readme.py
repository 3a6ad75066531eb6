import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = [path.read_text(encoding="utf-8") for path in (ROOT / "src").glob("*.py")]
COMMANDS = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))


@pytest.mark.parametrize("code", sorted(set(re.findall(r"```python\n(.*?)```", README, re.DOTALL))))
def test_quoted_code_stands_in_a_script(code):
    assert any(code in script for script in SCRIPTS)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_a_link_leads_to_a_file(target):
    assert (ROOT / target).is_file()


@pytest.mark.parametrize("script", sorted(set(re.findall(r"poetry run (src/\S+)", COMMANDS))))
def test_a_script_that_is_named_can_be_run(script):
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", COMMANDS))))
def test_a_target_that_is_named_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
