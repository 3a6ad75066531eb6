"""Settings: one line for default, range and help."""

import argparse
from dataclasses import dataclass

import pytest

from running.settings import add_settings, check_settings, read_settings, setting


@dataclass(frozen=True)
class Some:
    d_model: int = setting(16, 1, 64, "size")
    dropout: float = setting(0.1, 0.0, 0.9, "share")
    tied: bool = setting(True, False, True, "tied or not")

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_settings(parser, {"small": Some(), "large": Some(d_model=64, tied=False)})
    return parser


def test_options_change_a_preset(parser):
    args = parser.parse_args(["--d-model", "8", "--no-tied"])
    assert read_settings(args, Some(dropout=0.5)) == Some(8, 0.5, False)
    assert read_settings(parser.parse_args([]), Some(d_model=9)) == Some(9)


def test_help_tells_the_presets(parser):
    text = parser.format_help()
    assert "size (16 | 64)" in text
    assert "tied or not (True | False)" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 65}, "--d-model: must be between 1 and 64"),
        ({"dropout": -0.1}, "--dropout: must be between 0.0 and 0.9"),
        ({"dropout": float("nan")}, "--dropout: must be between"),
        ({"d_model": 2.0}, "--d-model: 2.0 is not of the right kind"),
        ({"tied": 1}, "--tied: 1 is not of the right kind"),
    ],
)
def test_what_is_out_of_range_is_refused_by_its_option(changes, message):
    with pytest.raises(ValueError, match=message):
        Some(**changes)
