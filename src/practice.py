#!/usr/bin/env python3
"""Write it yourself: functions of these scripts become holes, and their tests judge your answers.

Run `poetry run src/practice.py` for the list. `start mask` copies the scripts to practice/ without
one function; `check` tests your copy, `check --watch` does so at each save; `hint` and
`solution` help. There are also mistakes to find: `start bug-1` plants one in practice/bug-1/, and
says what it does. The exercises and the mistakes are in exercises/exercises.toml.
"""

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from exercises import trials
from exercises.copies import (
    PRACTICE,
    SYMPTOM,
    State,
    begin_again,
    copy_of,
    is_broken,
    is_planted,
    keep,
    plant,
    read,
    read_state,
    refresh,
    save,
    write_state,
)
from exercises.holes import (
    ROOT,
    SOURCES,
    Task,
    carry,
    find_hole,
    function_lines,
    hole_lines,
    prepare,
    read_tasks,
)
from exercises.judge import judge, warm_up, warm_up_optimizers
from exercises.reports import Case, Verdict
from running.shell import command

COLORS = {"✓": 32, "✗": 31, "→": 33}


def chapter(task: Task) -> str:
    """Return the page of the course that explains the subject of a task."""
    pages = sorted((ROOT / "docs").glob("[0-9]-*.md"))
    found = [page.name for page in pages if page.name == task.chapter]
    found += [page.name for page in pages if page.stem[2:] in task.script]
    return f"docs/{found[0]}" if found else "README.md"


def start(task: Task, state: State, tasks: dict[str, Task], again: bool) -> None:
    """Empty the function, or plant the mistake, in practice/, and print the task."""
    if task.name in state.started and not again:
        print(
            f"{task.name} was started before; `start {task.name} --again` starts over, and keeps a "
            "copy of your work.\n"
        )
    elif task.symptom:
        plant(task)
        show_trial(task)
    else:
        empty(task, state, tasks, again)
    state.current = task.name
    state.started = [*dict.fromkeys([*state.started, task.name])]
    write_state(state)
    show_task(task)


def empty(task: Task, state: State, tasks: dict[str, Task], again: bool) -> None:
    """Put a hole in the place of a function in the copy, and keep the copy if it was changed."""
    path = copy_of(task)
    reference = read(SOURCES / task.script)
    if is_broken(path) and not again:
        raise OSError(f"fix {path} first, or start over: `start {task.name} --again` keeps a copy")
    if is_broken(path):
        begin_again(task, state, tasks)
    for other in would_be_filled(task, reference, state, tasks):
        if not again:
            raise OSError(
                f"{other.name} is in the same function, {task.function}: finish it first "
                f"(check {other.name}), or give it up: `start {task.name} --again` keeps a copy"
            )
        state.started.remove(other.name)
    copy = read(path)
    touched = copy.split("\n")[function_lines(copy, task.function)]
    if touched != reference.split("\n")[function_lines(reference, task.function)]:
        print(f"The old {path.relative_to(ROOT)} is kept as {keep(path).name}.\n")
    save(path, carry([task.function], prepare(reference, task), copy))
    state.hints.pop(task.name, None)


def would_be_filled(task: Task, reference: str, state: State, tasks: dict[str, Task]) -> list[Task]:
    """Return the unfinished exercises that making the hole of another one would solve."""
    hole = hole_lines(reference, task)
    found = []
    for other in tasks.values():
        unfinished = other.name in state.started and other.name not in state.done
        same = (other.script, other.function) == (task.script, task.function)
        if unfinished and same and not other.symptom:
            lines = hole_lines(reference, other)
            if lines.start < hole.start or lines.stop > hole.stop:
                found.append(other)
    return found


def show_trial(task: Task) -> None:
    """Do the small run of a mistake, with the mistake and without; keep the symptom beside it."""
    print("A small run, with the mistake and without …\n", flush=True)
    name = task.script.removesuffix(".py").replace("/", ".")
    wrong = trials.run(task.trial, name, PRACTICE / task.name)
    right = trials.run(task.trial, name, SOURCES)
    text = trials.tell(task.symptom, wrong, right)
    (PRACTICE / task.name / SYMPTOM).write_text(text, encoding="utf-8")


def show_task(task: Task) -> None:
    """Print the task, and where to write."""
    place = copy_of(task).relative_to(ROOT).as_posix()
    if task.symptom:
        path = PRACTICE / task.name / SYMPTOM
        print(f"{task.name}: {place} has a mistake. This is what it does:\n")
        print(textwrap.indent(textwrap.fill(path.read_text(encoding="utf-8"), 96), "  "))
    else:
        line, docstring = find_hole(read(copy_of(task)), task)
        print(f"{task.name}: {task.title}\n{place}:{line}, in {task.function}\n")
        print(textwrap.indent(docstring if not task.task else task.task.strip(), "  "))
    print(f"\nChapter: {chapter(task)}\nNext: check, or hint", flush=True)


def case_of(task: Task, tasks: dict[str, Task]) -> Case:
    """Return what the judge needs to know of a task.

    Other exercises of the script may be holes, or wrong. The reference's functions are used
    instead, but not beside a mistake to find, which has a copy of its own.
    """
    watched = task.function if task.alone else ""
    same = {other.function for other in tasks.values() if other.script == task.script}
    others = set() if task.symptom else same - {task.function}
    return Case(copy_of(task), task.script, watched, task.tests, tuple(sorted(others)))


def check(task: Task, state: State, tasks: dict[str, Task]) -> int:
    """Judge the learner's answer, and print the verdict; return the exit status."""
    case = case_of(task, tasks)
    warm_up(case)
    verdict = judge(case)
    if task.symptom:
        verdict = of_a_mistake(task, verdict, state.hints.get(task.name, 0))
    if not verdict.passed:
        show_lines("✗", task.name, verdict.lines)
        return 1
    state = read_state()  # which may have changed meanwhile, as from another terminal
    state.done = [*dict.fromkeys([*state.done, task.name])]
    write_state(state)
    lines = ["is found" if task.symptom else "is right", *verdict.lines]
    show_lines("✓", task.name, lines)
    print(f"  Next: {advice(state, tasks)}", flush=True)
    return 0


def of_a_mistake(task: Task, verdict: Verdict, hints: int) -> Verdict:
    """Return the verdict on a mistake to find; a failing call is shown only after two hints."""
    if verdict.passed and is_planted(task):
        return Verdict(False, ["is still there, although its tests pass; tell the authors"])
    if hints < 2 and verdict.lines and verdict.lines[0].startswith("not yet"):
        line = "is still there. Ask for two hints, and check shows a failing call."
        return Verdict(verdict.passed, [line])
    return verdict


def watch(tasks: dict[str, Task]) -> None:
    """Check the current task whenever its file is saved or another task started, until Ctrl-C."""
    seen = ("", 0)
    while True:
        state = read_state()
        task = tasks[state.current]
        now = (task.name, changed_at(copy_of(task)))
        if now[1] and now != seen:
            seen = now
            check(task, state, tasks)
            warm_up_optimizers()
        time.sleep(0.1)


def changed_at(path: Path) -> int:
    """Return when a file was changed, in nanoseconds; 0 while an editor is renaming it."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def show_hint(task: Task, state: State) -> None:
    """Print one more hint than last time."""
    given = min(state.hints.get(task.name, 0) + 1, len(task.hints))
    state.hints[task.name] = given
    write_state(state)
    for number, hint in enumerate(task.hints[:given], start=1):
        print(
            textwrap.fill(f"{number}. {hint}", 96, initial_indent="  ", subsequent_indent="     ")
        )
    more = "hint says more" if given < len(task.hints) else "solution shows the answer"
    print(f"\nNext: check; {more}", flush=True)


def show_solution(task: Task) -> None:
    """Print the learner's function, if it can be read, and the script's."""
    for path in (copy_of(task), SOURCES / task.script):
        if is_broken(path):
            print(f"{path.relative_to(ROOT)} isn't valid Python; `check` says where.\n")
            continue
        source = read(path)
        lines = source.split("\n")[function_lines(source, task.function)]
        print(f"{path.relative_to(ROOT)}\n")
        print(textwrap.indent(textwrap.dedent("\n".join(lines)), "  "), end="\n\n", flush=True)


def show_lines(mark: str, name: str, lines: Sequence[str]) -> None:
    """Print lines after a mark, which is colored in a terminal."""
    if mark in COLORS and sys.stdout and sys.stdout.isatty():
        mark = f"\x1b[{COLORS[mark]}m{mark}\x1b[0m"
    print(f"{mark} {name} {lines[0]}", *lines[1:], sep="\n    ", flush=True)


def remaining(state: State, tasks: dict[str, Task]) -> list[str]:
    """Return the tasks that are not done, those of the current chapter first."""
    current = tasks.get(state.current)
    rest = [name for name in tasks if name not in state.done]
    return sorted(rest, key=lambda name: bool(current and chapter(tasks[name]) != chapter(current)))


def advice(state: State, tasks: dict[str, Task]) -> str:
    """Return the command for the next task."""
    rest = remaining(state, tasks)
    return f"poetry run src/practice.py start {rest[0]}" if rest else "nothing; everything is done"


def show_list(state: State, tasks: dict[str, Task]) -> None:
    """Print all tasks by script, mark those that are done, and name the next one."""
    rest = remaining(state, tasks)
    heading = ""
    for number, task in enumerate(tasks.values(), start=1):
        before = heading
        heading = "Mistakes to find" if task.symptom else task.script
        if heading != before:
            print(f"\n{heading}" if before else heading)
        mark = "✓" if task.name in state.done else "→" if task.name == rest[0] else " "
        show_lines(mark, f"{number:2} {task.name:12}", [task.title or task.script])
    print(f"\n{len(state.done)} of {len(tasks)} done. Next: {advice(state, tasks)}", flush=True)


def parse(argv: Sequence[str] | None, tasks: dict[str, Task]) -> argparse.Namespace:
    """Parse the command line; a task can be named by its number in the list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = ("list", "start", "check", "hint", "solution")
    parser.add_argument("command", nargs="?", choices=commands, default="list", help="what to do")
    parser.add_argument(
        "name", nargs="?", help="name or number of a task (default: the last one named)"
    )
    parser.add_argument("--watch", action="store_true", help="check at each save, until Ctrl-C")
    parser.add_argument("--again", action="store_true", help="start over; keep a copy of your work")
    args = parser.parse_intermixed_args(argv)
    numbers = {str(number): name for number, name in enumerate(tasks, start=1)}
    args.name = numbers.get(args.name, args.name)
    if args.name and args.name not in tasks:
        names = ", ".join(tasks)
        parser.error(f"argument name: must be one of {names}, or a number from the list")
    return args


def choose(name: str | None, state: State, tasks: dict[str, Task]) -> Task:
    """Make an exercise the current one, unless no name is given; return the current one.

    Raises OSError if it was not started.
    """
    state.current = name or state.current
    if state.current not in state.started:
        first = f"poetry run src/practice.py start {name}" if name else advice(state, tasks)
        raise OSError(f"start one first: {first}")
    write_state(state)
    return tasks[state.current]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the given command; return the exit status."""
    tasks = read_tasks()
    args = parse(argv, tasks)
    state = read_state()
    if args.command == "list":
        show_list(state, tasks)
        return 0
    state.started = [name for name in state.started if name in tasks]
    state.done = [name for name in state.done if name in tasks]
    refresh(state, tasks)
    if args.command == "start":
        rest = remaining(state, tasks) or list(tasks)
        start(tasks[args.name or rest[0]], state, tasks, args.again)
        return 0
    task = choose(args.name, state, tasks)
    if args.command == "hint":
        show_hint(task, state)
    elif args.command == "solution":
        show_solution(task)
    elif args.watch:
        watch(tasks)
    else:
        return check(task, state, tasks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
