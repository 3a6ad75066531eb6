import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import holes
import judge

ROOT = Path(__file__).resolve().parent.parent
TASKS = holes.read_tasks()
ANSWERS = tomllib.loads((ROOT / "tests/answers.toml").read_text(encoding="utf-8"))


def reference(task):
    return (ROOT / "src" / task.script).read_bytes().decode()


def verdict(task, source, folder):
    """Judge a source as if it were the copy of a person."""
    path = folder / task.script
    path.write_bytes(source.encode())
    case = judge.Case(path, task.function, task.tests)
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
    case = judge.Case(ROOT / "practice" / task.script, task.function, task.tests)
    tests = case.test_file.read_text(encoding="utf-8")
    assert all(re.search(rf"^def {test}\(", tests, re.MULTILINE) for test in task.tests)
    assert len(task.hints) >= 2
    assert not task.symptom or "?" not in task.hints


@pytest.mark.parametrize("script", sorted({task.script for task in TASKS.values()}))
def test_a_script_with_all_its_holes_imports_and_prints_its_help(script, tmp_path, capsys):
    source = (ROOT / "src" / script).read_bytes().decode()
    for task in TASKS.values():
        if task.script == script and not (task.symptom or task.first):
            source = holes.prepare(source, task)
    assert source.count("raise NotImplementedError") >= (script != "pytorch-hello.py")
    (tmp_path / script).write_bytes(source.encode())
    module = judge.load("a script with holes", tmp_path / script)
    if not hasattr(module, "main"):
        del sys.modules["a script with holes"]
        return
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    del sys.modules["a script with holes"]
    print(end="", flush=True)
    assert stop.value.code == 0
    assert "--seed" in capsys.readouterr().out


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
        "called  causal_mask(3)",
        "gave    tensor([[ True, True, True], [False, True, True], [False, False, True]])",
        "wanted  tensor([[ True, False, False], [ True, True, False], [ True, True, True]])",
    ]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise NotImplementedError", r"is still empty: attention.py:\d+: raise NotImpl"),
        ("return None", r"gave    None\nwanted  tensor"),
        ("return torch.ones(T).bool()", r"gave    torch.bool of shape \(3,\)\nwanted .*\(3, 3\)$"),
        ("return torch.ones(T, T)", r"gave    torch.float32 of shape .*\nwanted  torch.bool of"),
        ("return 1 / 0", r"gave    raises ZeroDivisionError: .*\n(.*\n)*raised .*: return 1 / 0"),
        ("return causal_mask(T)", r"gave    raises RecursionError"),
        ("return input()", r"gave    raises (OSError|EOFError)"),
        ("raise SystemExit(7)", r"gave    raises SystemExit: 7"),
        ("import os; os._exit(7)", r"^ended the process of the tests, with status 7$"),
        ("import os; os.abort()", r"^ended the process of the tests, with status -6$"),
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
    passed, lines = verdict_of("mask", "while True: pass", tmp_path)
    assert (passed, lines) == (False, ["gave no answer in 2 s: is there a loop that never ends?"])


def test_a_right_answer_that_prints_is_right_and_told_so(tmp_path):
    body = f"print(T)\n{ANSWERS['mask']['right'][0]}"
    passed, lines = verdict_of("mask", body, tmp_path)
    assert passed
    assert lines == ["printed '3'"]


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        (1.0, 1.0 + 1e-9, None),
        ((1, [2, 3]), (1, [2, 4]), ("item 2: item 2: 3", "item 2: item 2: 4")),
        (1, True, ("1", "True")),
        (ValueError("a"), ValueError("b"), None),
        (ValueError("a"), 3, ("raises ValueError: a", "3")),
        (object(), 3, ("object", "3")),
    ],
)
def test_results_differ_in_words(given, wanted, expected):
    assert judge.difference(given, wanted) == expected
