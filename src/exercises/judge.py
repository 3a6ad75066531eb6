"""Run chosen tests on a copy of a script, and say in a few lines what fails first.

practice.py uses it. The tests import the copy in place of the script, and every other script as it
is. They run in a process of their own (child.py), which sends plain data: first the names of the
tests that are to run, before it has read the answer; then what these tests found. The main process
compares the names, and explaining.py says what is wrong.
"""

import builtins
import contextlib
import copy
import functools
import importlib
import inspect
import math
import os
import pdb
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import pytest
import torch

from exercises import child
from exercises.child import FORK, forget_sources, limit_computing
from exercises.explaining import explain
from exercises.holes import ROOT, SOURCES, mend
from exercises.reports import (
    Call,
    Case,
    Comparison,
    Report,
    Verdict,
    effect,
    numbers_of,
    outcome_of,
    plain,
    raised,
)

SECONDS = 15  # of computing, without the imports
PATIENCE = 10  # times as many seconds on a clock
WATCHED_CALLS = 30  # of a test
USED = (builtins, math, np, np.testing, pytest, torch, torch.nn, torch.nn.functional, torch.testing)
SETTINGS = (
    "-c", "pyproject.toml", "-o", "addopts=", "--disable-plugin-autoload",
    "-p", "no:cacheprovider",
    "-p", "no:unraisableexception", "-p", "no:threadexception",  # they are slow
)  # fmt: skip
run_tests = pytest.main  # an answer may replace it


class Waits(BaseException):
    """An answer waits for a person, who can't reach it."""


def judge(case: Case) -> Verdict:
    """Run the tests in a process of their own, and say what they found."""
    ended = child.run(examine, case, seconds=SECONDS * PATIENCE)
    return explain(case, ended, SECONDS)


def warm_up(case: Case) -> None:
    """Import what the tests import, so that a forked process has it already."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a process with more threads can't be forked safely
    if FORK:
        sys.path = [*dict.fromkeys([*sys.path, str(case.test_file.parent)])]
        for name in ("conftest", case.test_file.stem):
            importlib.import_module(name)


def warm_up_optimizers() -> None:
    """Import what the first optimizer of a process would import, which takes seconds."""
    if FORK:
        importlib.import_module(child.SLOW)


# In the process of the tests


def examine(send: child.Send, case: Case) -> None:
    """Send the names of the tests, run them on the copy, and send what they found."""
    os.chdir(ROOT)
    # Relative paths, since pytest reads a [ in a path as the beginning of a parameter.
    file = case.test_file.relative_to(ROOT).as_posix()
    settings = [*SETTINGS, *(f"{file}::{test}" for test in case.tests)]
    names = Names()
    run_tests(["--collect-only", *settings], plugins=[names])
    send(names.names)
    limit_computing(SECONDS)
    forget_sources()
    refuse_to_wait()
    before = attributes(USED)
    watcher = Watcher(case)
    try:
        module = load(case.module, case.path, case.script, case.others)
        watcher.watch(module)
        sys.modules.pop(case.test_file.stem, None)  # an answer may have imported it
        run_tests(["-x", *settings], plugins=[watcher])
    except BaseException as error:  # an answer may even raise SystemExit
        watcher.report.error = raised(error, case.path)
    watcher.add_wanted()
    watcher.report.replaced = replaced(before) + replaced(watcher.tests)
    send(watcher.report)


def name_of(node: str) -> str:
    """Return the name of a test, with its parameters, without its file."""
    return node.partition("::")[2]


class Names:
    """A pytest plugin that keeps the names of the tests."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keep the names of the tests, with their parameters."""
        self.names = [name_of(item.nodeid) for item in session.items]


class Recorded:
    """The arguments of a call, and whether derivatives were recorded in it."""

    def __init__(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.arguments = arguments
        self.options = options
        self.inference = torch.is_inference_mode_enabled()
        self.gradients = torch.is_grad_enabled()

    def outcome_of(self, function: Callable[..., Any]) -> object:
        """Return the outcome of the same call of another function, as plain data."""
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.gradients):
            arguments, options = copy.deepcopy((self.arguments, self.options))
            return outcome_of(function, *arguments, **options)


class Watcher:
    """A pytest plugin that reports which tests pass, and why the first failing one fails."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.report = Report()
        self.recorded: list[Recorded] = []
        self.tests: dict[tuple[str, str], Any] = {}  # what the tests' own module holds

    def watch(self, module: ModuleType) -> None:
        """Record the calls of the function in a module. Raises NameError if it isn't there."""
        if not self.case.function:
            return
        function, owner = find(module, self.case.function)
        if function is None:
            raise NameError(f"there is no {self.case.function} any more")
        if inspect.isfunction(function) and not inspect.isgeneratorfunction(function):
            setattr(owner, function.__name__, self.watched(function))

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and keeps its calls."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            recorded = None
            if len(self.recorded) < WATCHED_CALLS:
                with contextlib.suppress(Exception):  # not everything can be copied
                    own = Recorded(*copy.deepcopy((arguments, options)))
                    recorded = Call(named(function, arguments, options), None)
                    self.recorded.append(own)
                    self.report.calls.append(recorded)
            outcome: object = None
            try:
                outcome = function(*arguments, **options)
                return outcome
            except BaseException as error:
                outcome = error
                raise
            finally:
                if recorded:
                    recorded.outcome = effect(outcome, function, arguments)

        return call

    def add_wanted(self) -> None:
        """Add the reference's outcome to the calls."""
        if not self.recorded or not self.report.error:
            self.report.calls.clear()
            return
        reference = load("reference", SOURCES / self.case.script, self.case.script)
        function, _ = find(reference, self.case.function)
        for recorded, call in zip(self.recorded, self.report.calls, strict=True):
            for field in ("wanted", "wanted_again"):
                setattr(call, field, recorded.outcome_of(function))

    def pytest_sessionstart(self) -> None:
        """Refuse again, since pytest has a debugger of its own."""
        refuse_to_wait()

    def pytest_collection_finish(self) -> None:
        """Keep what the tests' own module holds."""
        module = sys.modules.get(self.case.test_file.stem)
        self.tests = attributes([module] if module else [])

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Forget the calls of the previous test."""
        self.recorded.clear()
        self.report.calls.clear()
        self.report.comparison = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note whether a test was skipped or passed, and what it printed."""
        name = name_of(report.nodeid)
        if report.skipped or hasattr(report, "wasxfail"):
            self.report.skipped.append(name)
        elif report.when == "call" and report.passed:
            self.report.passed.append(name)
        self.report.printed = self.report.printed or report.capstdout.strip()

    def pytest_assertrepr_compare(self, op: str, left: object, right: object) -> None:
        """Note the values of a comparison that fails."""
        self.report.comparison = Comparison(plain(left), op, plain(right))

    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[None]) -> None:
        """Note the first failure."""
        if self.report.error is None and call.excinfo:
            error = call.excinfo.value
            if isinstance(error, pytest.Collector.CollectError):
                error = error.__cause__ or error
            else:
                self.report.failed = name_of(node.nodeid)
            self.note(error)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Note what ended the tests: KeyboardInterrupt, or pytest.exit."""
        self.note(excinfo.value)

    def note(self, error: BaseException) -> None:
        """Report an error, and the two values if it is of a function that compares them."""
        self.report.error = raised(error, self.case.path)
        for frame, _ in walk(error.__traceback__):
            if frame.f_code.co_name in ("assert_close", "assert_allclose", "assert_array_equal"):
                values = frame.f_locals
                wanted = values.get("expected", values.get("desired"))
                self.report.comparison = Comparison(plain(values["actual"]), "==", plain(wanted))
                return


def walk(trace: TracebackType | None) -> Iterator[tuple[Any, int]]:
    """Yield the frames of a traceback, and their lines."""
    while trace:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def named(
    function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, object]:
    """Return the arguments of a call by their names, as plain data."""
    bound = inspect.signature(function).bind(*arguments, **options).arguments
    own = {f"self.{name}": value for name, value in numbers_of(bound.pop("self", None)).items()}
    return {**own, **{name: plain(value) for name, value in bound.items()}}


def load(name: str, path: Path, script: str, others: Iterable[str] = ()) -> ModuleType:
    """Import a copy of a script as the module `name`. It looks for its data beside src/."""
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(SOURCES / script)
    exec(compile(mend(path, script, others), path, "exec"), vars(module))
    if "." in name:  # as an import does
        package, _, inside = name.rpartition(".")
        setattr(importlib.import_module(package), inside, module)
    return module


def find(module: ModuleType, name: str) -> tuple[Any, Any]:
    """Return the function with a qualified name, or None, and the module or class it belongs to."""
    *outer, last = name.split(".")
    owner: Any = module
    for part in outer:
        owner = vars(owner).get(part, ModuleType(part))
    return vars(owner).get(last), owner


def refuse_to_wait() -> None:
    """Let what waits for a person raise an error that says so."""
    builtins.input = ask
    sys.breakpointhook = stop
    pdb.set_trace = trace  # type: ignore[assignment]


def ask(*_: object) -> str:
    """Stand for input()."""
    raise Waits("input()")


def stop(*_: object, **__: object) -> None:
    """Stand for breakpoint()."""
    raise Waits("breakpoint()")


def trace(*_: object, **__: object) -> None:
    """Stand for pdb.set_trace()."""
    raise Waits("pdb.set_trace()")


def attributes(modules: Iterable[ModuleType]) -> dict[tuple[str, str], Any]:
    """Return the functions and classes of modules, by the names of both."""
    return {
        (module.__name__, name): value
        for module in modules
        for name, value in vars(module).items()
        if callable(value)
    }


def replaced(before: dict[tuple[str, str], Any]) -> list[str]:
    """Return the names of the functions and classes that were replaced.

    A wrapper doesn't count: PyTorch wraps `torch.manual_seed` when torch._dynamo is imported.
    """
    found = []
    for (module, name), old in before.items():
        new: Any = vars(sys.modules[module]).get(name)
        if new is not old and inspect.unwrap(new) is not inspect.unwrap(old):
            found.append(f"{module}.{name}")
    return found
