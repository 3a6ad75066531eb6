"""Run chosen tests on another copy of a script, and say in a few lines what fails first.

practice.py uses it. The tests import the copy in place of the script, and every other script as it
is. They run in a process of their own, with limits, so that no answer can harm the main process. On
Linux it is forked from one that has imported everything already; elsewhere it starts afresh.
"""

import contextlib
import copy
import functools
import importlib
import math
import multiprocessing
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from exercises.holes import ROOT, SOURCES, mend

FORK = sys.platform == "linux"  # elsewhere the libraries do not all survive it
SECONDS = 15 if FORK else 90  # including imports, unless it is forked
MEMORY = 4 * 2**30  # bytes
WATCHED_CALLS = 30  # of a test


class Case(NamedTuple):
    """A function to judge: in the copy of a script, with some of the script's tests."""

    path: Path  # of the copy
    script: str  # that it is a copy of, by its path in src/
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


@dataclass
class Call:
    """A call of the function: its arguments and its outcome."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    outcome: object


@dataclass
class Watcher:
    """A pytest plugin that records the calls of a function, and the first test that fails."""

    test: str = ""
    error: BaseException | None = None
    calls: list[Call] = field(default_factory=list)
    printed: str = ""

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Forget the calls of the previous test."""
        self.calls.clear()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the first output."""
        self.printed = self.printed or report.capstdout

    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo) -> None:
        """Record the first failure."""
        if self.error is None and call.excinfo:
            self.test = node.name
            self.error = call.excinfo.value
            if isinstance(self.error, pytest.Collector.CollectError):
                self.error = self.error.__cause__ or self.error

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and keeps its calls."""

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            call = None
            if len(self.calls) < WATCHED_CALLS:
                with contextlib.suppress(Exception):  # not everything can be copied
                    call = Call(*copy.deepcopy((arguments, options)), None)
                    self.calls.append(call)
            outcome: object = None
            try:
                outcome = function(*arguments, **options)
                return outcome
            except BaseException as error:
                outcome = error
                raise
            finally:
                if call:
                    call.outcome = outcome

        return watched


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
    """Return the function with a qualified name, and the module or class it belongs to."""
    *outer, last = name.split(".")
    owner: Any = module
    for part in outer:
        owner = vars(owner)[part]
    return vars(owner)[last], owner


def describe(value: Any) -> str:
    """Describe a value in one line: its numbers if there are few, else its type and shape."""
    if isinstance(value, BaseException):
        return f"raises {type(value).__name__}: {str(value).partition(chr(10))[0]}"
    if isinstance(value, tuple | list) and len(value) <= 9:
        inside = ", ".join(map(describe, value))
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if hasattr(value, "numel"):
        value = value.detach()  # without grad_fn
        if value.numel() > 20:
            return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) < 200 and " at 0x" not in text else type(value).__name__


def difference(given: Any, wanted: Any) -> tuple[str, str] | None:
    """Return what differs in two results, in words, or None if nothing does."""
    texts = describe(given), describe(wanted)
    if isinstance(given, Exception) and type(given) is type(wanted):
        return None  # the wording may differ
    if type(given) is not type(wanted) or callable(wanted):
        return texts
    if isinstance(wanted, tuple | list) and len(given) == len(wanted):
        for n, pair in enumerate(zip(given, wanted, strict=True), start=1):
            if found := difference(*pair):
                return f"item {n}: {found[0]}", f"item {n}: {found[1]}"
        return None
    if hasattr(wanted, "numel"):
        kinds = [f"{x.dtype} of shape {tuple(x.shape)}" for x in (given, wanted)]
        if kinds[0] != kinds[1]:
            return kinds[0], kinds[1]
        a = given.flatten().tolist()
        b = wanted.flatten().tolist()
        wrong = [i for i in range(len(b)) if not close(a[i], b[i])]
        if not wrong or len(b) <= 20:
            return texts if wrong else None
        place: list[int] = []
        rest = wrong[0]
        for size in reversed(wanted.shape):
            rest, index = divmod(rest, size)
            place.insert(0, index)
        return (
            f"{a[wrong[0]]:.4g} at {place}, and {len(wrong)} of {len(b)} numbers are wrong",
            f"{b[wrong[0]]:.4g} at {place}",
        )
    if isinstance(wanted, float):
        return None if close(given, wanted) else texts
    return texts if given != wanted else None


def close(a: Any, b: Any) -> bool:
    """Tell whether two numbers are equal, except for rounding."""
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5) or (a != a and b != b)


def outcome_of(function: Callable[..., Any], call: Call) -> object:
    """Return the outcome of the same call to another function."""
    try:
        return function(*copy.deepcopy(call.arguments), **copy.deepcopy(call.options))
    except Exception as error:
        return error


def first_difference(case: Case, watcher: Watcher) -> Iterator[str]:
    """Yield the first call with a wrong result: its arguments, its result, and the right one."""
    calls = list(watcher.calls)
    reference = load("reference", SOURCES / case.script, case.script)
    for call in calls:
        function, _ = find(reference, case.function)
        wanted = outcome_of(function, call)
        found = difference(call.outcome, wanted)
        if found and not difference(outcome_of(function, call), wanted):  # nothing random
            *_, name = case.function.split(".")
            arguments = [describe(x) for x in call.arguments]
            arguments += [f"{key}={describe(x)}" for key, x in call.options.items()]
            yield from (f"called  {name}({', '.join(arguments)})", f"gave    {found[0]}")
            yield f"wanted  {found[1]}"
            return


def place_of(error: BaseException | None, path: Path) -> str:
    """Return the line of the file that an error last came through, or nothing."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path.name}:{error.lineno}: {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__ if error else None)
    places = [f"{path.name}:{f.lineno}: {f.line}" for f in frames if f.filename == str(path)]
    return places[-1] if places else ""


def explain(case: Case, watcher: Watcher) -> Iterator[str]:
    """Yield the lines that say what fails."""
    error = watcher.error
    place = place_of(error, case.path)
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, NotImplementedError) and place:
        yield f"is still empty: {place}"
    elif isinstance(error, MemoryError) or "allocate memory" in message:
        yield f"asks for more than {MEMORY / 2**30:g} GiB of memory: {place}"
    elif not watcher.test:
        yield f"can't be imported: {message.splitlines()[0]}"
        yield place
    else:
        sentence = watcher.test.partition("[")[0].removeprefix("test_").replace("_", " ")
        yield f"not yet: {sentence}"
        found = list(first_difference(case, watcher))
        yield from found or message.strip().splitlines()[:8]
        if place and not isinstance(error, AssertionError):
            yield f"raised  {type(error).__name__} in {place}"


def examine(case: Case, sender: Connection) -> None:
    """Run the tests in this process, started for them, and send the verdict."""
    with contextlib.suppress(ImportError, ValueError):  # not on Windows; or the limit is lower
        import resource

        highest = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, highest))
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.chdir(ROOT)
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        of_a_room = SOURCES in file.parents and file.parent != Path(__file__).parent
        if of_a_room or file.parent == ROOT / "tests":
            del sys.modules[name]
    watcher = Watcher()
    status = 1
    try:
        module = load(case.module, case.path, case.script, case.others)
        if case.function.partition(".")[0] not in ("", *vars(module)):
            raise NameError(f"there is no {case.function} any more")
        with contextlib.suppress(KeyError, TypeError):  # a function inside a function
            function, owner = find(module, case.function)
            setattr(owner, function.__name__, watcher.watch(function))
        settings = ["-x", "-o", "addopts=", "-c", str(ROOT / "pyproject.toml")]
        settings += ["--disable-plugin-autoload", "-p", "no:cacheprovider"]
        settings += ["-p", "no:unraisableexception", "-p", "no:threadexception"]  # they are slow
        tests = [f"{case.test_file}::{test}" for test in case.tests]
        status = pytest.main([*settings, *tests], plugins=[watcher])
    except BaseException as error:  # an answer may even raise SystemExit
        watcher.error = error
    lines = list(explain(case, watcher)) if watcher.error else []
    if status and not lines:
        lines = ["can't be imported by the tests: has a name been changed, or lost?"]
    if watcher.printed:
        lines.append(f"printed {watcher.printed.strip()!r}")
    lines = ["".join(c if c.isprintable() else "?" for c in line) for line in lines]
    lines = [line for text in lines for line in textwrap.wrap(text, 96, max_lines=3)]
    sender.send((status == 0, lines[:14]))


def judge(case: Case) -> Verdict:
    """Run the tests in a process of their own, and stop it if it does not end."""
    context: Any = multiprocessing.get_context("fork" if FORK else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=examine, args=(case, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return Verdict(*receiver.recv())
        return Verdict(False, [f"gave no answer in {SECONDS} s: is there a loop that never ends?"])
    except EOFError:
        process.join()
        return Verdict(False, [f"ended the process of the tests, with status {process.exitcode}"])
    finally:
        process.kill()
        process.join()


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
        importlib.import_module("torch._dynamo")
