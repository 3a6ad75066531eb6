"""Settings of a script: one line for a setting's default, its range, and its help.

    @dataclass(frozen=True)
    class Settings:
        d_model: int = setting(256, 1, 4096, "size of the vectors")

Every setting becomes an option, `--d-model`, and begins as in one of the presets.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, field, fields, replace
from typing import Any, TypeVar

from running.shell import number

Settings = TypeVar("Settings", bound=Any)  # a dataclass whose fields are all made by `setting`


def setting(default: float, low: float, high: float, about: str) -> Any:
    """Make a field of a dataclass: a number from `low` to `high`, or a bool."""
    return field(default=default, metadata={"low": low, "high": high, "about": about})


def flag(name: str) -> str:
    """Return the option of a setting."""
    return f"--{name.replace('_', '-')}"


def check_settings(settings: Any) -> None:
    """Raise ValueError if a setting is out of its range, or of another kind than its default.

    So no option or file can ask for an absurd amount of memory.
    """
    values = asdict(settings)
    for each in fields(settings):
        value = values[each.name]
        low = each.metadata["low"]
        high = each.metadata["high"]
        if type(value) is not type(each.default):
            raise ValueError(f"{flag(each.name)}: {value!r} is not of the right kind")
        if not low <= value <= high:
            raise ValueError(f"{flag(each.name)}: must be between {low:,} and {high:,}")


def add_settings(parser: argparse.ArgumentParser, presets: Mapping[str, Settings]) -> None:
    """Add an option for each setting; its help tells its value in each preset."""
    group = parser.add_argument_group(f"settings, in the presets {' | '.join(presets)}")
    values = [asdict(preset) for preset in presets.values()]
    for each in fields(next(iter(presets.values()))):
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if not isinstance(each.default, bool):
            limits = number(each.metadata["low"], each.metadata["high"])
            kind = {"type": limits, "metavar": "N"}
        help = (
            f"{each.metadata['about']} ({' | '.join(str(preset[each.name]) for preset in values)})"
        )
        group.add_argument(flag(each.name), default=argparse.SUPPRESS, help=help, **kind)


def read_settings(args: argparse.Namespace, preset: Settings) -> Settings:
    """Return a preset with the settings that options have changed."""
    names = [each.name for each in fields(preset)]
    return replace(preset, **{name: x for name, x in vars(args).items() if name in names})
