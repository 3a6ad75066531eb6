"""What the process of the tests tells: plain data, which can be sent, compared and described.

judge.py writes these reports, and explaining.py puts them into words.
"""

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from exercises.holes import ROOT

LARGEST = 100_000  # numbers of a tensor that is sent
LONGEST = 500  # characters of a text that is sent


class Case(NamedTuple):
    """A function to judge: in the copy of a script, with some of the script's tests."""

    path: Path  # of the copy
    script: str  # the original, by its path in src/
    function: str  # its qualified name; empty if comparing calls is useless
    tests: list[str]
    others: tuple[str, ...] = ()  # functions that aren't judged; the reference's are used instead

    @property
    def test_file(self) -> Path:
        """The file of the script's tests."""
        return ROOT / f"tests/test_{self.path.stem.replace('-', '_')}.py"

    @property
    def module(self) -> str:
        """The name by which the tests import the script."""
        return self.script.removesuffix(".py").replace("/", ".")


class Verdict(NamedTuple):
    """Whether the tests pass, and the lines to print."""

    passed: bool
    lines: list[str]


@dataclass(frozen=True)
class Table:
    """A tensor, or an array of NumPy."""

    kind: str
    numbers: Tensor | None  # None if there are too many, or none at all, as on the device meta
    shape: tuple[int, ...]
    dtype: str
    device: str
    gradient: bool  # whether gradients flow back through it


@dataclass(frozen=True)
class Thing:
    """Any other object: its type, and its text if that is short."""

    kind: str
    text: str


@dataclass(frozen=True)
class Raised:
    """An error: its type and the types above it, its message, and where in the copy it was."""

    kinds: list[str]
    message: str
    place: str = ""


@dataclass
class Call:
    """A call of the function: its arguments by name, its outcome, and that of the reference."""

    arguments: dict[str, object]
    outcome: object
    wanted: object = None
    wanted_again: object = None  # the same unless something is random


@dataclass
class Comparison:
    """Two values that a test compared."""

    given: object
    operator: str
    wanted: object


@dataclass
class Report:
    """What the tests found."""

    passed: list[str] = field(default_factory=list)  # names of tests
    skipped: list[str] = field(default_factory=list)
    failed: str = ""  # the first test that failed
    error: Raised | None = None  # the error of that test, or of the import
    comparison: Comparison | None = None  # the one that failed
    calls: list[Call] = field(default_factory=list)  # in the test that failed
    printed: str = ""
    replaced: list[str] = field(default_factory=list)  # names that the answer has replaced


def plain(value: Any) -> Any:
    """Return any value as plain data."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value[:LONGEST])
    if isinstance(value, Tensor):
        return table(value, "tensor")
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return table(torch.from_numpy(value.copy()), "array")
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple | list) and len(value) <= LARGEST:
        items = [plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict) and len(value) <= LARGEST:
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, BaseException):
        return raised(value)
    if type(value).__name__.startswith("Approx"):  # of pytest
        return plain(value.expected)
    return thing(value)


def table(tensor: Tensor, kind: str) -> Table:
    """Return a tensor as plain data."""
    numbers = None
    if tensor.device.type != "meta" and tensor.numel() <= LARGEST and not tensor.is_sparse:
        numbers = tensor.detach().clone().cpu()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Table(
        kind, numbers, tuple(tensor.shape), dtype, str(tensor.device), tensor.requires_grad
    )


def thing(value: object) -> Thing:
    """Return the type of an object, and its text if that is short and says more."""
    kind = type(value).__name__
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an answer may have written it
        text = ""
    return Thing(kind, text if len(text) < 100 and " at 0x" not in text else "")


def raised(error: BaseException, path: Path | None = None) -> Raised:
    """Return an error as plain data, with the last line of the file `path` that it came through."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    try:
        message = str(error)
    except Exception:  # as above
        message = ""
    if isinstance(error, SyntaxError):
        message = error.msg
    return Raised(kinds, message[:LONGEST], place_of(error, path) if path else "")


def place_of(error: BaseException, path: Path) -> str:
    """Return the line of a file that an error last came through, or nothing."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path.name}:{error.lineno}: {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{path.name}:{f.lineno}: {f.line}" for f in frames if f.filename == str(path)]
    return places[-1] if places else ""


def outcome_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return the outcome of a call as plain data, an error included."""
    try:
        returned = function(*arguments, **options)
    except Exception as error:
        return raised(error)
    return effect(returned, function, arguments)


def effect(outcome: object, function: Callable[..., Any], arguments: tuple[Any, ...]) -> object:
    """Return what a call returned or raised; if it is nothing, the numbers of its object then."""
    if outcome is None and arguments and "self" in inspect.signature(function).parameters:
        return numbers_of(arguments[0]) or None
    return plain(outcome)


def numbers_of(value: object) -> dict[str, object]:
    """Return the attributes of an object that are numbers, unless it is a network.

    Those of NumPy are not made Python's: the difference matters.
    """
    found: dict[str, object] = {}
    if isinstance(value, nn.Module):
        return found
    for name, number in getattr(value, "__dict__", {}).items():
        if isinstance(number, np.number):
            found[name] = Thing(type(number).__name__, str(number))
        elif isinstance(number, int | float):
            found[name] = number
    return found
