import ast
import tomllib
from pathlib import Path

import pytest

import holes
import judge
import practice

ROOT = Path(__file__).resolve().parent.parent
TASKS = holes.read_tasks()
EXERCISES = {name: task for name, task in TASKS.items() if not task.symptom}
BUGS = {name: task for name, task in TASKS.items() if task.symptom}
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


def answers(kind):
    return [
        pytest.param(TASKS[name], answer, id=f"{name}-{number}")
        for name, each in ANSWERS.items()
        for number, answer in enumerate(each[kind], start=1)
    ]


@pytest.fixture(scope="module")
def optimizers():
    """Spare the judged processes an import of seconds."""
    judge.warm_up_optimizers()


@pytest.mark.slow
@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_what_is_started_is_refused(task, tmp_path):
    passed, lines = verdict(task, holes.prepare(reference(task), task), tmp_path)
    assert not passed
    assert lines[0].startswith("not yet: " if task.symptom else "is still empty: ")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_what_stands_is_right(task, tmp_path):
    assert verdict(task, reference(task), tmp_path) == (True, [])


@pytest.mark.slow
@pytest.mark.parametrize(("task", "answer"), answers("wrong"))
def test_a_wrong_answer_is_refused(task, answer, tmp_path):
    passed, lines = verdict(task, holes.fill(reference(task), task, answer), tmp_path)
    print(*lines, sep="\n")
    assert not passed
    assert lines[0].startswith("not yet: ")
    assert len(lines) <= 14


@pytest.mark.slow
@pytest.mark.parametrize(("task", "answer"), answers("right"))
def test_a_right_answer_is_accepted_however_it_is_written(task, answer, tmp_path):
    assert verdict(task, holes.fill(reference(task), task, answer), tmp_path) == (True, [])
