import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = tomllib.loads((ROOT / "poetry.lock").read_text())["package"]


def test_the_lock_names_each_package_once():
    counts = Counter(package["name"] for package in PACKAGES)
    assert counts["torch"] == 1
    assert not [name for name, count in counts.items() if count > 1]


def test_the_lock_names_no_source_but_the_default():
    assert not [package["name"] for package in PACKAGES if "source" in package]
    assert "source" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["poetry"]
