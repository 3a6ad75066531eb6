import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import practice
from exercises import child, copies, differences, explaining, holes, judge, reports, trials

ROOT = Path(__file__).resolve().parent.parent
TASKS = holes.read_tasks()
ANSWERS = tomllib.loads((ROOT / "tests/answers.toml").read_text(encoding="utf-8"))


def reference(task):
    return (ROOT / "src" / task.script).read_bytes().decode()


def verdict(task, source, folder):
    """Judge a source as if it were the copy of a person."""
    path = folder / task.script
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(source.encode())
    case = judge.Case(path, task.script, task.function if task.alone else "", task.tests)
    judge.warm_up(case)
    return judge.judge(case)


def verdict_of(name, body, folder):
    """Judge an answer to an exercise."""
    return verdict(TASKS[name], holes.fill(reference(TASKS[name]), TASKS[name], body), folder)


# Each exercise


def answers(kind):
    return [
        pytest.param(name, answer, id=f"{name}-{number}")
        for name, each in ANSWERS.items()
        for number, answer in enumerate(each[kind], start=1)
    ]


def test_every_exercise_has_wrong_and_right_answers():
    assert list(ANSWERS) == [name for name, task in TASKS.items() if not task.symptom]
    for name, each in ANSWERS.items():
        assert len(set(each["wrong"])) >= 3, name
        assert len(set(each["right"])) >= 2, name


@pytest.mark.parametrize("name", ANSWERS)
def test_the_line_of_the_hole_is_told(name):
    source = holes.prepare(reference(TASKS[name]), TASKS[name])
    line, _ = holes.find_hole(source, TASKS[name])
    assert source.split("\n")[line - 1].strip() == f'raise NotImplementedError("write {name} here")'


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_keeps_every_other_byte_and_the_syntax(task):
    before, after = reference(task), holes.prepare(reference(task), task)
    ast.parse(after)
    assert before != after
    a, b = (source.split("\n") for source in (before, after))
    lines = holes.function_lines(before, task.function)
    assert a[: lines.start] == b[: lines.start]
    assert a[lines.stop :] == b[len(b) - len(a) + lines.stop :]
    if task.old:
        assert before.count(task.old) == 1
        assert before.replace(task.old, task.new) == after
        return
    hole = holes.hole_lines(before, task)
    assert a[: hole.start] == b[: hole.start]
    assert a[hole.stop :] == b[hole.start + 1 :]
    assert b[hole.start].strip() == f'raise NotImplementedError("write {task.name} here")'
    body = "\n".join(a[hole])
    assert holes.fill(before, task, body) == before


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_is_judged_by_tests_that_there_are(task):
    case = judge.Case(ROOT / "practice" / task.script, task.script, task.function, task.tests)
    tests = case.test_file.read_text(encoding="utf-8")
    assert all(re.search(rf"^def {test}\(", tests, re.MULTILINE) for test in task.tests)
    assert len(task.hints) >= 2


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_script_with_a_hole_imports_and_prints_its_help(task, tmp_path, monkeypatch, capsys):
    path = tmp_path / task.script
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(holes.prepare(reference(task), task).encode())
    monkeypatch.setitem(sys.modules, "with a hole", None)
    module = judge.load("with a hole", path, task.script)
    if hasattr(module, "main"):
        with pytest.raises(SystemExit) as stop:
            module.main(["--help"])
        print(end="", flush=True)
        assert stop.value.code == 0
        assert "--seed" in capsys.readouterr().out
    assert capsys.readouterr() == ("", "")


@pytest.fixture(scope="module")
def optimizers():
    """Spare the judged processes an import of seconds."""
    judge.warm_up_optimizers()


@pytest.mark.slow
@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_what_is_started_is_refused(task, tmp_path):
    passed, lines = verdict(task, holes.prepare(reference(task), task), tmp_path)
    print(*lines, sep="\n")
    assert not passed
    assert lines[0].startswith("not yet: " if task.symptom else "is still empty: ")


@pytest.mark.slow
@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_what_stands_is_right(task, tmp_path):
    assert verdict(task, reference(task), tmp_path) == (True, [])


@pytest.mark.slow
@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize(("name", "answer"), answers("wrong"))
def test_a_wrong_answer_is_refused(name, answer, tmp_path):
    passed, lines = verdict_of(name, answer, tmp_path)
    print(*lines, sep="\n")
    assert not passed
    assert lines[0].startswith("not yet: ")
    assert len(lines) <= 14


@pytest.mark.slow
@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize(("name", "answer"), answers("right"))
def test_a_right_answer_is_accepted_however_it_is_written(name, answer, tmp_path):
    assert verdict_of(name, answer, tmp_path) == (True, [])


# What is said of an answer


def test_the_first_call_that_differs_is_told(tmp_path):
    passed, lines = verdict_of("mask", ANSWERS["mask"]["wrong"][0], tmp_path)
    assert not passed
    assert lines == [
        "not yet: masks are true where a query may attend",
        "called  causal_mask(T=3)",
        "gave    [[True, True, True], [False, True, True], [False, False, True]]",
        "wanted  [[True, False, False], [True, True, False], [True, True, True]]",
        "so      it is transposed: dimensions 0 and 1 are swapped",
    ]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise NotImplementedError", r"is still empty: attention.py:\d+: raise NotImpl"),
        ("return None", r"gave    None\nwanted  .*\nso      it is None, and should be a tensor$"),
        ("return torch.ones(T).bool()", r"shape \(3,\)\nwanted .*\nso .* has 1 dimensions, not 2$"),
        (
            "return torch.ones(T, T).tril()",
            r"gave .* float32\n.*\nso .* is float32, and .* be bool",
        ),
        ("return 1 / 0", r"gave    raises ZeroDivisionError: .*\n(.*\n)*raised .*: return 1 / 0"),
        ("return causal_mask(T)", r"gave    raises RecursionError"),
        ("return input()", r"^waits for a person at input\(\), .*: attention.py:\d+: return input"),
        ("breakpoint()", r"^waits for a person at breakpoint\(\)"),
        ("import pdb; pdb.set_trace()", r"^waits for a person at pdb.set_trace\(\)"),
        ("import sys; return sys.stdin.read()", r"^reads from the keyboard"),
        ("raise SystemExit(7)", r"^ended the tests with SystemExit\(7\): attention.py:\d+: raise"),
        ("raise KeyboardInterrupt", r"^raised KeyboardInterrupt, as Ctrl-C does: attention.py"),
        ("import os; os._exit(7)", r"^ended the tests with status 7: does it call exit\?$"),
        ("import os; os._exit(0)", r"^ended the tests with status 0"),
        ("import os; os.abort()", r"^ended the tests by the signal SIGABRT$"),
        ("import os; os.kill(os.getppid(), 9)", r"^ended the process that started it"),
        ("import pytest; pytest.skip()", r"^skipped a test, .*: masks are true where a query may"),
        ("import pytest; pytest.xfail()", r"^skipped a test"),
        ("import unittest; raise unittest.SkipTest", r"^skipped a test"),
        ("import pytest; pytest.exit('', 0)", r"^ended the tests with pytest.exit"),
        ("return (", r"^can't be imported: SyntaxError: .*\nattention.py:\d+: return \($"),
        ("return torch.ones(10**9, 10**4)", r"^asks for more than 4 GiB of memory: attention"),
        ("return [bytes(2**30) for i in range(T * 9)]", r"^asks for more than 4 GiB of memory: "),
        ("print('hello', 1)", r"\nprinted 'hello 1'$"),
        ("raise ValueError('\x1b[31mred')", r"raises ValueError: \?\[31mred"),
    ],
)
def test_trouble_of_every_kind_is_told_in_a_few_lines(body, expected, tmp_path):
    passed, lines = verdict_of("mask", body, tmp_path)
    assert not passed
    assert re.search(expected, "\n".join(lines))
    assert len(lines) <= 14
    assert all(line.isprintable() for line in lines)


def test_an_answer_that_never_ends_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "SECONDS", 2)
    _, lines = verdict_of("mask", "while True: pass", tmp_path)
    assert lines == ["computed for 2 s without an end: is there a loop that never ends?"]
    monkeypatch.setattr(judge, "PATIENCE", 5)
    _, lines = verdict_of("mask", "import time; time.sleep(99)", tmp_path)
    assert lines == ["gave no answer in time: does it wait for something, or is the machine busy?"]


RIGHT = "return torch.ones(T, T, dtype=torch.bool, device=device).tril()"
SPEAK = """
import gc, pickle
for x in gc.get_objects():
    if type(x).__name__ == "Connection" and x.writable:
        x.send_bytes(pickle.dumps(("sent", (True, []))))
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (SPEAK, "sent a verdict of its own"),
        ("import pytest; pytest.approx = lambda *_: T", "replaced pytest.approx, which the tests"),
        ("torch.allclose = lambda *_: True", "replaced torch.allclose"),
        ("import test_attention as t; t.attention_by_loops = print", "replaced test_attention.att"),
        ("import os\nif os.fork() == 0: os.execlp('sleep', 'sleep', '60')", "started processes"),
    ],
)
def test_a_right_answer_that_meddles_is_refused(before, expected, tmp_path):
    passed, lines = verdict_of("mask", f"{before}\n{RIGHT}", tmp_path)
    assert not passed
    assert lines[0].startswith(expected)


def test_a_test_that_did_not_run_has_not_passed():
    report = reports.Report(passed=["test_a"])
    ended = child.Ended([["test_a", "test_b[3-x]"], report], status=0)
    passed, lines = explaining.explain(None, ended, 15)
    assert (passed, lines) == (False, ["kept a test from running: b"])
    report.passed.append("test_b[3-x]")
    assert explaining.explain(None, ended, 15) == (True, [])


def test_a_right_answer_that_prints_is_right_and_told_so(tmp_path):
    body = f"print(T)\n{ANSWERS['mask']['right'][0]}"
    passed, lines = verdict_of("mask", body, tmp_path)
    assert passed
    assert lines == ["printed '3'"]


TABLE = torch.arange(12.0).view(3, 4) - 3
WAVES = TABLE.sin()


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        (1.0, 1.0 + 1e-9, None),
        ((1, [2, 3]), (1, [2, 4]), ("(1, [2, 3])", "(1, [2, 4])", "")),
        (1, True, ("1", "True", "it is an int, and should be a bool")),
        ((1,), [1], ("(1)", "[1]", "it is a tuple, and should be a list")),
        (ValueError("a"), ValueError("b"), None),
        (UnicodeError("a"), ValueError("b"), None),
        (ValueError("a"), 3, ("raises ValueError: a", "3", "")),
        (object(), 3, ("an object", "3", "it is an object, and should be an int")),
        (0.5, 1.0, ("0.5", "1", "it is 1/2 of what it should be")),
        (5000, 5001, ("5000", "5001", "")),
    ],
)
def test_results_differ_in_words(given, wanted, expected):
    found = differences.difference(reports.plain(given), reports.plain(wanted))
    assert found == expected


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        (TABLE, TABLE + 1e-7, None),
        (TABLE.T, TABLE, "the last two dimensions are swapped"),
        (TABLE[:, :3].T, TABLE[:, :3], "it is transposed: dimensions 0 and 1 are swapped"),
        (TABLE.flatten(), TABLE, "the numbers are right, the shape is not"),
        (TABLE / 3, TABLE, "each number is 1/3 of what it should be"),
        (TABLE * 2**0.5, TABLE, "each number is 1.414 times what it should be: √2"),
        (-TABLE, TABLE, "each number has the opposite sign"),
        (TABLE + 2, TABLE, "each number is too large by 2"),
        (WAVES.roll(1, 0), WAVES, "along dimension 0, everything stands one place too late"),
        (WAVES.roll(-1, 1), WAVES, "along dimension 1, everything stands one place too early"),
        (TABLE.flip(1), TABLE, "it is reversed along dimension 1"),
        (TABLE[[1, 0, 2]], TABLE, "the numbers are right, but stand in other places"),
        (WAVES.softmax(0), WAVES.softmax(1), "it sums to 1 over dimension 0; it should over "
         "dimension 1"),
        (TABLE > 0, TABLE <= 0, "True and False are swapped"),
        (TABLE.log(), TABLE, "there is a NaN"),
        (TABLE.double(), TABLE, "its dtype is float64, and should be float32"),
        (TABLE.int(), TABLE.int() + torch.eye(3, 4).int(), "3 of 12 numbers are wrong"),
        (TABLE, TABLE.clone().requires_grad_(), "its numbers are right, but nothing can learn from "
         "them: has it been detached, or computed without gradients?"),
        (torch.tensor(30.0), torch.tensor(2.0), "it is 15 times what it should be"),
        (torch.tensor(30), torch.tensor(2), ""),
        (torch.tensor([5000, 7]), torch.tensor([5001, 7]), "1 of 2 numbers is wrong"),
    ],
)  # fmt: skip
def test_tensors_differ_in_words(given, wanted, expected):
    found = differences.difference(reports.plain(given), reports.plain(wanted))
    assert (found and found.how) == expected


# As a person uses it


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository of copies, so that nothing of the real one changes."""
    shutil.copytree(ROOT / "src", tmp_path / "src")
    for module in (copies, practice):
        monkeypatch.setattr(module, "SOURCES", tmp_path / "src")
        monkeypatch.setattr(module, "PRACTICE", tmp_path / "practice")
    monkeypatch.setattr(practice, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def run(place, capsys):
    """Run a command; return its exit status and what it prints."""

    def run(*arguments):
        status = practice.main([*map(str, arguments)])
        out, error = capsys.readouterr()
        assert "\x1b" not in out
        return status, out + error

    return run


def write_answer(place, name, body):
    """Do as a person does: put a body in the place of the hole."""
    path = place / "practice" / TASKS[name].script
    hole = re.compile(rf'^( *)raise NotImplementedError\("write {name} here"\)$', re.MULTILINE)
    text = path.read_text(encoding="utf-8")
    (indent,) = hole.findall(text)
    path.write_text(hole.sub(lambda _: textwrap.indent(body.strip(), indent), text), "utf-8")
    return path


def test_from_nothing_to_the_first_right_answer(run, place):
    status, out = run()
    assert status == 0
    assert re.search(r"^→  1 loop ", out, re.MULTILINE)
    assert out.endswith(f"0 of {len(TASKS)} done. Next: poetry run src/practice.py start loop\n")
    status, out = run("start", "mask")
    line = (
        (place / "practice/attention.py")
        .read_text()
        .split("\n")
        .index('    raise NotImplementedError("write mask here")')
    )
    assert f"practice/attention.py:{line + 1}, in causal_mask\n" in out
    assert "Let position i attend to positions up to i" in out
    status, out = run("check")
    assert (status, out.partition(": raise")[0]) == (
        1, f"✗ mask is still empty: attention.py:{line + 1}"
    )  # fmt: skip
    write_answer(place, "mask", ANSWERS["mask"]["wrong"][0])
    status, out = run("check")
    assert status == 1
    assert out.startswith("✗ mask not yet: masks are true where a query may attend\n    called  ")
    hints = [run("hint")[1] for _ in range(4)]
    for n, hint in enumerate(TASKS["mask"].hints, start=1):
        assert f"  {n}. {hint}" in re.sub(r"\n {5}", " ", hints[n - 1])
    assert hints[2] == hints[3]
    path = place / "practice/attention.py"
    path.write_text(path.read_text().replace(".triu()", ".tril()"))
    status, out = run("check")
    assert status == 0
    assert out.startswith("✓ mask is right\n")
    assert re.search(r"^✓  5 mask ", run()[1], re.MULTILINE)
    _, out = run("solution")
    assert out.count("def causal_mask(") == 2
    assert out.index("practice/attention.py") < out.index("src/attention.py")


def test_a_started_file_is_never_overwritten(run, place):
    run("start", "mask")
    path = write_answer(place, "mask", "return 'mine'")
    run("start", "padding")
    assert "return 'mine'" in path.read_text()
    assert 'NotImplementedError("write padding here")' in path.read_text()
    before = path.read_bytes()
    _, out = run("start", "mask")
    assert "`start mask --again`" in out
    assert path.read_bytes() == before
    _, out = run("start", "--again", "mask")
    assert "attention.1.py" in out
    assert (place / "practice/attention.1.py").read_bytes() == before
    assert 'NotImplementedError("write mask here")' in path.read_text()
    assert 'NotImplementedError("write padding here")' in path.read_text()


def test_one_may_begin_anywhere_and_leave_holes(run, place):
    for name in ("bug-7", "split", "padding", "mask"):
        run("start", name)
    write_answer(place, "mask", ANSWERS["mask"]["right"][1])
    status, out = run("check")
    assert (status, out.splitlines()[0]) == (0, "✓ mask is right")
    assert run("check", "split")[1].startswith("✗ split is still empty")
    path = place / "practice/attention.py"
    line = 1 + next(
        n for n, text in enumerate(path.read_text().split("\n")) if "write padding" in text
    )
    assert f"attention.py:{line}: " in run("check", "padding")[1]


def test_exercises_on_the_same_function_keep_what_was_written(run, place):
    run("start", "softmax")
    before = write_answer(place, "softmax", "weights = 'mine'").read_bytes()
    _, out = run("start", "attention")
    assert "attention.1.py" in out
    assert (place / "practice/attention.1.py").read_bytes() == before


def test_a_hole_of_the_same_function_never_fills_another_that_is_not_done(run, place):
    run("start", "shift")
    path = place / "practice/transformer.py"
    before = path.read_bytes()
    status, out = run("start", "smoothing")
    assert (status, "shift is in the same function, train: finish it first" in out) == (1, True)
    assert path.read_bytes() == before
    _, out = run("start", "smoothing", "--again")
    assert "transformer.1.py" in out
    assert (place / "practice/transformer.1.py").read_bytes() == before
    assert copies.read_state().started == ["smoothing"]
    status, out = run("check", "shift")
    assert (status, "start shift" in out) == (1, True)


def test_a_source_that_changed_keeps_what_was_written(run, place):
    run("start", "mask")
    path = write_answer(place, "mask", ANSWERS["mask"]["right"][0])
    mine = path.read_bytes()
    source = place / "src/attention.py"
    source.write_text(source.read_text() + "# more\n")
    status, out = run("check")
    assert status == 0
    assert "src/attention.py has changed" in out
    assert path.read_text().endswith("# more\n")
    assert ANSWERS["mask"]["right"][0].strip().splitlines()[0] in path.read_text()
    assert (place / "practice/attention.1.py").read_bytes() == mine
    assert "has changed" not in run("check")[1]
    assert not (place / "practice/transformer.1.py").exists()


def test_a_function_that_needs_what_is_gone_begins_again(run, place):
    run("start", "generate")
    path, source = place / "practice/transformer.py", place / "src/transformer.py"
    hole = 'raise NotImplementedError("write generate here")'
    text = path.read_text().replace(hole, "return [mine(x) for x in source]")
    path.write_text(f"{text}def mine(row): pass\ndef encode(): pass\n")
    source.write_text(source.read_text() + "# more\n")
    _, out = run("check", "generate")
    assert "generate begins again" in out
    assert "is still empty" in out
    assert "mine(x)" in (place / "practice/transformer.1.py").read_text()


def test_what_another_terminal_started_is_not_forgotten(run, place, monkeypatch):
    run("start", "mask")
    write_answer(place, "mask", ANSWERS["mask"]["right"][0])
    judged = practice.judge

    def judge_meanwhile(case):
        verdict = judged(case)
        practice.main(["start", "padding"])
        return verdict

    monkeypatch.setattr(practice, "judge", judge_meanwhile)
    run("check", "mask")
    state = copies.read_state()
    assert (state.current, state.started, state.done) == ("padding", ["mask", "padding"], ["mask"])


def test_a_copy_that_was_not_touched_follows_its_source(run, place):
    run("start", "mask")
    source = place / "src/transformer.py"
    source.write_text(source.read_text() + "# more\n")
    _, out = run("start", "padding")
    assert "changed" not in out
    assert (place / "practice/transformer.py").read_bytes() == source.read_bytes()


def test_a_folder_from_before_the_rooms_is_carried_over(run, place):
    """As it was left by someone who wrote `cache`, `prenorm` and `exact`, and began `beam`."""
    run("start", "mask")
    folder = place / "practice"
    state = copies.read_state()
    state.started = ["cache", "prenorm", "exact", "beam"]
    mine = {"cache": "cache.py", "prenorm": "network.py", "exact": "attention.py"}
    for name, old in mine.items():
        text = holes.fill(reference(TASKS[name]), TASKS[name], ANSWERS[name]["right"][0])
        (folder / old).write_text(text.replace("share_exact", "evaluate"))
        state.hashes[old] = "that of a file without what was written"
    for name, text in (("search.py", "def beam_search(): pass\n"), ("translation.py", "")):
        (folder / name).write_text(text)
        state.hashes[name] = copies.digest(folder / name)
    for room in copies.ROOMS:
        shutil.rmtree(folder / room)
    copies.write_state(state)
    for name in ("cache", "prenorm", "exact"):
        status, out = run("check", name)
        assert (status, f"✓ {name} is right" in out) == (0, True)
    assert "✗ beam is still empty" in run("check", "beam")[1]
    for name in ("cache.1.py", "network.1.py", "attention.1.py"):
        assert (folder / name).exists()
    for name in ("cache.py", "network.py", "search.py"):
        assert not (folder / name).exists()
    for name in ("cache", "prenorm", "exact"):
        line = ANSWERS[name]["right"][0].strip().splitlines()[-1].strip()
        assert line in (folder / TASKS[name].script).read_text()


def test_a_mistake_is_planted_and_found(run, place):
    run("start", "mask")
    mine = write_answer(place, "mask", "return 'mine'").read_bytes()
    _, out = run("start", "bug-5")
    assert "a word may look at 6 of the six places, and padding may look at 0" in " ".join(
        out.split()
    )
    assert "practice/bug-5/attention.py has a mistake" in out
    assert not any(test in out for test in TASKS["bug-5"].tests)
    path = place / "practice/bug-5/attention.py"
    assert path.read_text() == holes.prepare(reference(TASKS["bug-5"]), TASKS["bug-5"])
    assert (place / "practice/bug-5/inputs/text.py").exists()
    status, out = run("check")
    line = "✗ bug-5 is still there. Ask for two hints, and check shows a failing call.\n"
    assert (status, out) == (1, line)
    run("hint")
    run("hint")
    assert "called  padding_mask" in run("check")[1]
    before = path.read_bytes()
    assert "look at 6 of the six" in " ".join(run("start", "bug-5")[1].split())
    assert path.read_bytes() == before
    path.write_text(path.read_text().replace("(tokens != pad).unsqueeze(2)", "tokens != pad"))
    assert run("check")[0] == 1
    path.write_text(path.read_text().replace("tokens != pad\n", "tokens.ne(pad)[:, None]\n"))
    status, out = run("check")
    assert (status, out.splitlines()[0]) == (0, "✓ bug-5 is found")
    assert (place / "practice/attention.py").read_bytes() == mine
    found = path.read_bytes()
    assert "kept as practice/bug-5.1" in run("start", "bug-5", "--again")[1]
    assert (place / "practice/bug-5.1/attention.py").read_bytes() == found
    assert path.read_bytes() == before


def test_a_call_that_does_not_fit_the_function_is_left_out_whole():
    watcher = judge.Watcher(judge.Case(Path(), "attention.py", "f", []))
    double = watcher.watched(lambda x: 2 * x)
    with pytest.raises(TypeError):
        double(y=1)
    assert double(2) == 4
    assert [call.arguments for call in watcher.report.calls] == [{"x": 2}]
    assert len(watcher.recorded) == 1


class Counter:
    def __init__(self):
        self.count = 2

    def add(self, amount):
        self.count += amount


def test_a_method_that_returns_nothing_is_judged_by_its_object():
    watcher = judge.Watcher(judge.Case(Path(), "attention.py", "f", []))
    watcher.watched(Counter.add)(Counter(), 3)
    (call,) = watcher.report.calls
    assert call.arguments == {"self.count": 2, "amount": 3}
    assert call.outcome == {"count": 5}
    assert watcher.recorded[0].outcome_of(Counter.add) == {"count": 5}
    watcher.watched(Counter.add)(Counter(), np.int64(3))
    found = differences.difference(watcher.report.calls[1].outcome, call.outcome)
    assert found == (
        "count: 5, an int64", "count: 5, an int", "it is an int64, and should be an int"
    )  # fmt: skip


def test_a_call_without_derivatives_is_repeated_without_them():
    watcher = judge.Watcher(judge.Case(Path(), "attention.py", "f", []))
    weight = torch.ones(1, requires_grad=True)

    def double(x):
        return 2 * weight * x

    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            watcher.watched(double)(torch.ones(1))
    assert [call.outcome.gradient for call in watcher.report.calls] == [False, False, True]
    again = [recorded.outcome_of(double) for recorded in watcher.recorded]
    assert [table.gradient for table in again] == [False, False, True]


def test_the_call_that_raised_is_shown_with_the_words_of_the_error():
    case = judge.Case(Path(), "attention.py", "f", [])
    error = reports.Raised(["RuntimeError", "Exception"], "sizes 3 and 4 do not fit", "a.py:7: x")
    calls = [reports.Call({"n": 1}, 5, 6, 6), reports.Call({"n": 2}, error, 7, 7)]
    report = reports.Report(failed="test_it_adds", error=error, calls=calls)
    assert [*explaining.what_was_raised(case, report, error)] == [
        "not yet: it adds", "called  f(n=2)",
        "gave    raises RuntimeError: sizes 3 and 4 do not fit", "wanted  7",
        "raised  RuntimeError in a.py:7: x",
    ]  # fmt: skip
    report.calls = calls[:1]
    lines = explaining.what_was_raised(case, report, error)
    assert "but it raises RuntimeError: sizes 3 and 4 do not fit" in lines


def test_a_mistake_that_is_still_there_is_not_found(run, monkeypatch):
    """Even if its tests pass."""
    run("start", "bug-5")
    monkeypatch.setattr(practice, "judge", lambda _: reports.Verdict(True, []))
    status, out = run("check")
    assert (status, out.startswith("✗ bug-5 is still there")) == (1, True)
    assert copies.read_state().done == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.symptom])
def test_a_symptom_can_be_seen(name, place, monkeypatch):
    task = TASKS[name]
    copies.plant(task)
    module = task.script.removesuffix(".py").replace("/", ".")
    wrong = trials.run(task.trial, module, copies.copy_of(task).parents[task.script.count("/")])
    right = trials.run(task.trial, module, ROOT / "src")
    text = trials.tell(task.symptom, wrong, right)
    print(text)
    assert text != trials.tell(task.symptom, right, right)
    assert not re.search("[{}]", text)


def test_it_checks_at_each_save(run, place, monkeypatch, capsys):
    run("start", "mask")
    path, seen = place / "practice/attention.py", []

    def sleep(_):
        """Stand for the person, who saves three times, and starts another exercise."""
        if not seen:
            write_answer(place, "mask", ANSWERS["mask"]["wrong"][0])
        elif len(seen) == 1:
            path.write_text(path.read_text().replace(".triu()", ".tril()"))
        elif len(seen) == 2:
            practice.main(["start", "padding"])
        elif len(seen) == 4:
            raise KeyboardInterrupt
        seen.append("a round")

    monkeypatch.setattr(practice.time, "sleep", sleep)
    monkeypatch.setattr(practice, "warm_up_optimizers", lambda: None)
    status, out = run("check", "--watch")
    assert status == 130
    verdicts = [line for line in out.splitlines() if line[:1] in ("✓", "✗")]
    assert [line[:14] for line in verdicts] == [
        "✗ mask is stil", "✗ mask not yet", "✓ mask is righ", "✗ padding is s",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [["fly"], ["start", "nothing"], ["start", "0"], ["--fast"]])
def test_what_there_is_not_is_refused(arguments, run):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["check", "hint", "solution"])
def test_nothing_is_checked_before_it_is_started(command, run):
    status, out = run(command)
    assert status == 1
    assert re.fullmatch(r".*: start one first: poetry run src/practice.py start loop\n", out)


def test_a_mistake_is_planted_in_a_clone_with_carriage_returns(run, place):
    task = TASKS["bug-7"]  # of two lines
    path = place / "src" / task.script
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    run("start", task.name)
    assert task.new in (place / "practice/bug-7" / task.script).read_text(encoding="utf-8")


def test_a_pipe_is_no_copy_and_is_not_waited_for(run, place):
    run("start", "mask")
    (place / "practice/attention.py").unlink()
    os.mkfifo(place / "practice/attention.py")
    status, out = run("check")
    assert (status, out.count("\n"), "not a plain file" in out) == (1, 1, True)
    (place / "practice/state.json").unlink()
    os.mkfifo(place / "practice/state.json")
    assert run()[0] == 0


BROKEN = [
    "", "{", "[]", "null", "7", "[" * 100_000, '{"x": 1}', '{"done": 7}', '{"done": [7]}',
    '{"started": null}', '{"started": "mask"}', '{"current": 7}', '{"hints": []}',
    '{"hints": {"mask": "1"}}', '{"hints": {"mask": true}}', '{"hashes": {"a": 1}}', "\xff",
]  # fmt: skip


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_state_is_named(content, run, place):
    (place / "practice").mkdir()
    (place / "practice/state.json").write_text(content, encoding="latin-1")
    status, out = run()
    assert (status, out.count("\n")) == (1, 1)
    assert f"{place / 'practice/state.json'} is broken" in out


def test_without_its_state_nothing_is_lost_and_nothing_untrue_is_said(run, place):
    run("start", "padding")
    run("start", "bug-5")
    run("start", "mask")
    path = write_answer(place, "mask", ANSWERS["mask"]["right"][0])
    mine = path.read_bytes()
    (place / "practice/state.json").unlink()
    status, out = run("check", "mask")
    assert (status, "has changed" in out, "✓ mask is right" in out) == (0, False, True)
    assert out.startswith("practice/state.json is missing, so a new record begins.")
    assert path.read_bytes() == mine
    assert copies.read_state().started == ["mask", "padding", "bug-5"]
    assert not list((place / "practice").glob("*.1*"))
    assert "missing" not in run("check", "padding")[1]


def test_a_broken_copy_is_started_over_and_kept(run, place):
    run("start", "padding")
    run("start", "mask")
    path = place / "practice/attention.py"
    broken = path.read_text().replace("def causal_mask", "def causal mask")
    path.write_text(broken)
    status, out = run("start", "split")
    assert (status, out.count("\n"), "start split --again" in out) == (1, 1, True)
    status, out = run("solution", "mask")
    assert (status, "isn't valid Python" in out, out.count("def causal_mask(")) == (0, True, 1)
    status, out = run("start", "mask", "--again")
    assert (status, "It is kept as attention.1.py" in out) == (0, True)
    assert (place / "practice/attention.1.py").read_text() == broken
    for name in ("mask", "padding"):
        assert f'NotImplementedError("write {name} here")' in path.read_text()


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"#!/usr/bin", b"\xef\xbb\xbf#!/usr/bin"), (b"\n", b"\r\n")],
    ids=["byte-order mark", "carriage returns"],
)
def test_a_copy_may_have_a_mark_or_carriage_returns(old, new, run, place):
    run("start", "mask")
    path = write_answer(place, "mask", ANSWERS["mask"]["right"][0])
    path.write_bytes(path.read_bytes().replace(old, new))
    assert run("check")[0] == 0
    assert run("start", "padding")[0] == 0
    assert run("check", "mask")[0] == 0


@pytest.mark.slow
def test_a_folder_may_have_brackets(tmp_path):
    clone = tmp_path / "proj [1]"
    for name in ("src", "tests", "docs"):
        shutil.copytree(ROOT / name, clone / name)
    shutil.copy(ROOT / "pyproject.toml", clone)

    def practice(*arguments):
        command = [sys.executable, "src/practice.py", *arguments]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    practice("start", "mask")
    write_answer(clone, "mask", ANSWERS["mask"]["right"][0])
    assert practice("check").startswith("✓ mask is right\n")


def test_a_copy_that_does_not_parse_or_lacks_the_function_is_said(run, place):
    run("start", "mask")
    path = place / "practice/attention.py"
    text = path.read_text()
    path.write_text(text.replace("def causal_mask", "def causal mask"))
    status, out = run("check")
    assert status == 1
    assert re.search(
        r"can't be imported: SyntaxError: .*\n +attention.py:\d+: def causal mask", out
    )
    status, out = run("start", "padding")
    assert (status, out.count("\n")) == (1, 1)
    assert "attention.py" in out
    path.write_text(text.replace("def causal_mask", "def my_mask"))
    status, out = run("check")
    assert status == 1
    assert "causal_mask" in out
    path.unlink()
    status, out = run("check")
    assert (status, "start one first" in out) == (1, True)


def test_what_the_scripts_import_is_copied_too(run, place):
    run("start", "mask")
    practice = place / "practice"
    copied = {path.relative_to(practice).as_posix() for path in practice.rglob("*.py")}
    assert {"attention.py", "transformer.py", "decoding/cache.py", "inputs/__init__.py"} <= copied
    assert not {"practice.py", "exercises/judge.py", "explore.py"} & copied
    for path in (place / "practice").glob("*.py"):
        assert path.stat().st_mode & 0o100 or os.name == "nt"


def test_a_task_has_a_number_and_the_next_one_needs_no_name(run):
    assert run("start", 5)[1].startswith("mask: ")
    assert run("start")[1].startswith("loop: ")


def test_colors_are_for_terminals(monkeypatch, capsys):
    practice.show_lines("✓", "mask", ["is right"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    practice.show_lines("✓", "mask", ["is right"])
    assert capsys.readouterr().out == "✓ mask is right\n\x1b[32m✓\x1b[0m mask is right\n"


def test_what_is_next_is_of_the_same_chapter(run, place):
    (place / "docs").mkdir()
    for page in (ROOT / "docs").glob("[0-9]-*.md"):
        (place / "docs" / page.name).touch()
    run("start", "predict")
    state = copies.read_state()
    state.done = ["predict"]
    assert practice.remaining(state, TASKS)[:3] == ["dataset", "bug-3", "bug-4"]
