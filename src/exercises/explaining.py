"""Put into a few lines what the process of the tests reported, or how it ended.

judge.py uses it, in the main process: nothing here runs an answer.
"""

import signal
import sys
import textwrap
from collections.abc import Iterator

from exercises.child import MEMORY, Ended
from exercises.differences import Difference, describe, difference
from exercises.reports import Call, Case, Comparison, Raised, Report, Table, Thing, Verdict
from running.shell import printable

WIDTH = 96  # characters of a line
LINES = 14  # of an explanation
OPERATORS = {
    "<": "less than", "<=": "at most", ">": "more than", ">=": "at least", "in": "one of",
    "!=": "other than", "not in": "none of", "is": "the same as", "is not": "other than",
}  # fmt: skip


def explain(case: Case, ended: Ended, seconds: float) -> Verdict:
    """Return the verdict on an answer: it passes if exactly the tests passed that were to run."""
    lines = [*how_it_ended(ended, seconds)]
    report = Report()
    if not lines:
        names, report = ended.sent
        lines = [*what_is_wrong(case, report, names)]
    passed = not lines
    if report.printed:
        lines.append(f"printed {report.printed!r}")
    lines = [
        part
        for line in lines
        for part in textwrap.wrap(
            printable(line), WIDTH, max_lines=3, subsequent_indent=" " * 8 * ("  " in line)
        )
    ]
    return Verdict(passed, lines[:LINES])


def how_it_ended(ended: Ended, seconds: float) -> Iterator[str]:
    """Yield a line if the process of the tests did not end as it should."""
    if ended.late:
        yield "gave no answer in time: does it wait for something, or is the machine busy?"
    elif ended.status is None:
        yield "ended the process that started it: does it call os.kill?"
    elif sys.platform != "win32" and ended.status == -signal.SIGXCPU:
        yield f"computed for {seconds:g} s without an end: is there a loop that never ends?"
    elif ended.status < 0:
        yield f"ended the tests by the signal {signal.Signals(-ended.status).name}"
    elif ended.status or len(ended.sent) < 2:
        yield f"ended the tests with status {ended.status}: does it call exit?"
    elif len(ended.sent) > 2 or not isinstance(ended.sent[1], Report):
        yield "sent a verdict of its own; only the tests may"
    elif ended.left_processes:
        yield "started processes that went on after the tests; they were ended"


def what_is_wrong(case: Case, report: Report, names: list[str]) -> Iterator[str]:
    """Yield the lines that say why an answer isn't right, if it isn't."""
    if report.replaced:
        yield f"replaced {report.replaced[0]}, which the tests use: give yours another name"
    elif report.error:
        yield from what_was_raised(case, report, report.error)
    elif report.skipped:
        yield f"skipped a test, so nobody knows whether it is right: {sentence(report.skipped[0])}"
    elif sorted(report.passed) != sorted(names):
        missing = sorted(set(names) - set(report.passed))
        yield f"kept a test from running: {sentence(missing[0]) if missing else 'which?'}"


def what_was_raised(case: Case, report: Report, error: Raised) -> Iterator[str]:
    """Yield the lines that explain an error, and the test that it failed."""
    accident = plain_words(error)
    if accident:
        yield f"{accident}: {error.place}".removesuffix(": ")
    elif not report.failed:
        yield f"can't be imported: {error.kinds[0]}: {error.message.partition(chr(10))[0]}"
        yield error.place
    else:
        yield f"not yet: {sentence(report.failed)}"
        lines = [*first_wrong_call(case, report.calls, error)] or [*compared(report, error)]
        yield from lines
        if error.place and "AssertionError" not in error.kinds:
            if not any(describe(error) in line for line in lines):
                yield f"but it {describe(error)}"
            yield f"raised  {error.kinds[0]} in {error.place}"


def plain_words(error: Raised) -> str:
    """Return what happened, if it is no matter of right and wrong."""
    kind = error.kinds[0]
    if kind == "Waits":
        return f"waits for a person at {error.message}, where no test can answer"
    if kind == "NotImplementedError" and error.place:
        return "is still empty"
    if kind == "KeyboardInterrupt":
        return "raised KeyboardInterrupt, as Ctrl-C does"
    if kind == "SystemExit":
        return f"ended the tests with SystemExit({error.message})"
    if kind == "Exit":
        return "ended the tests with pytest.exit"
    if kind in ("Skipped", "SkipTest"):
        return "skips the tests, so nobody knows whether it is right"
    if "reading from stdin" in error.message:
        return "reads from the keyboard, where no test can answer"
    if kind == "MemoryError" or "allocate memory" in error.message:
        return f"asks for more than {MEMORY / 2**30:g} GiB of memory"
    return ""


def sentence(test: str) -> str:
    """Return the name of a test as a sentence."""
    return test.partition("[")[0].removeprefix("test_").replace("_", " ")


def first_wrong_call(case: Case, calls: list[Call], error: Raised) -> Iterator[str]:
    """Yield the smallest call with a wrong outcome: its arguments, its outcome, the right one.

    If the error is that of a call, this one is meant.
    """
    wrong = [call for call in calls if is_wrong(call)]
    if not wrong:
        return
    raising = [call for call in wrong if difference(call.outcome, error) is None]
    call = min(raising or wrong, key=lambda call: sum(map(size, call.arguments.values())))
    yield from called(case.function.rpartition(".")[2], call.arguments)
    found = difference(call.outcome, call.wanted)
    assert found
    yield from in_words(found)


def is_wrong(call: Call) -> bool:
    """Return whether a call's outcome is not that of the reference, and nothing in it is random.

    A function among the arguments may remember earlier calls, so nothing is said of such a call.
    """
    for value in call.arguments.values():
        if isinstance(value, Thing) and value.kind in ("function", "method"):
            return False
    random = difference(call.wanted, call.wanted_again)
    return not random and difference(call.outcome, call.wanted) is not None


def size(value: object) -> int:
    """Return how many numbers an argument has."""
    if isinstance(value, Table):
        return max(1, len(value.shape), *value.shape) if value.numbers is None else numel(value)
    return len(value) if isinstance(value, tuple | list | str) else 1


def numel(table: Table) -> int:
    """Return how many numbers a tensor has."""
    return table.numbers.numel() if table.numbers is not None else 0


def called(name: str, arguments: dict[str, object]) -> Iterator[str]:
    """Yield the lines of a call: one, or one more for each argument."""
    texts = [f"{key}={describe(value)}" for key, value in arguments.items()]
    line = f"called  {name}({', '.join(texts)})"
    if len(line) <= WIDTH:
        yield line
        return
    yield f"called  {name}({', '.join(arguments)}), with"
    for text in texts:
        yield f"        {text}"


def compared(report: Report, error: Raised) -> Iterator[str]:
    """Yield the values that a test compared, or what else it says of its failure."""
    comparison = report.comparison
    if "Failed" in error.kinds and error.message.startswith("DID NOT RAISE"):
        wanted = error.message.removeprefix("DID NOT RAISE ").strip("<>").removeprefix("class ")
        yield "gave    no error"
        yield f"wanted  raises {wanted.strip(chr(39))}"
    elif "AssertionError" not in error.kinds:
        yield f"gave    {describe(error)}"
    elif comparison:
        yield from compared_values(comparison)


def compared_values(comparison: Comparison) -> Iterator[str]:
    """Yield two values that a test compared."""
    if comparison.operator == "==":
        found = difference(comparison.given, comparison.wanted)
        fallback = Difference(describe(comparison.given), describe(comparison.wanted))
        found = found or fallback
        if type(comparison.given) is not type(comparison.wanted):
            found = found._replace(how="")  # a test made them: it says nothing of the answer
        yield from in_words(found)
    else:
        yield f"gave    {describe(comparison.given)}"
        words = OPERATORS.get(comparison.operator, comparison.operator)
        yield f"wanted  {words} {describe(comparison.wanted)}"


def in_words(found: Difference) -> Iterator[str]:
    """Yield the lines of a difference."""
    yield f"gave    {found.gave}"
    yield f"wanted  {found.wanted}"
    if found.how:
        yield f"so      {found.how}"
