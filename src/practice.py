#!/usr/bin/env python3
"""Write it yourself: functions of these scripts become holes, and their tests judge your answers.

Run `poetry run src/practice.py` for the list. `start mask` copies the scripts to practice/ without
one function; `check` tests your copy, `check --watch` does so at each save; `hint` and
`solution` help. The exercises, and the mistakes to hunt (`start bug-1`), are in
exercises/exercises.toml.
"""

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence

from exercises.copies import PRACTICE, State, keep, read, read_state, refresh, save, write_state
from exercises.holes import (
    ROOT,
    SOURCES,
    Task,
    carry,
    find_hole,
    function_lines,
    prepare,
    read_tasks,
)
from exercises.judge import Case, judge, warm_up, warm_up_optimizers
from running.shell import command

COLORS = {"✓": 32, "✗": 31, "→": 33}


def chapter(task: Task) -> str:
    """Return the page of the course that explains the subject of a task."""
    pages = sorted((ROOT / "docs").glob("[0-9]-*.md"))
    found = [page.name for page in pages if page.name == task.chapter]
    found += [page.name for page in pages if page.stem[2:] in task.script]
    return f"docs/{found[0]}" if found else "README.md"


def start(task: Task, state: State, again: bool) -> None:
    """Empty the function, or plant the mistake, in practice/, and print the task."""
    path = PRACTICE / task.script
    reference = read(SOURCES / task.script)
    if again or task.name not in state.started:
        copy = read(path)
        touched = copy.split("\n")[function_lines(copy, task.function)]
        if touched != reference.split("\n")[function_lines(reference, task.function)]:
            print(f"The old {path.relative_to(ROOT)} is kept as {keep(path).name}.\n")
        save(path, carry([task.function], prepare(reference, task), copy))
        state.started = [*dict.fromkeys([*state.started, task.name])]
        state.hints.pop(task.name, None)
    else:
        print(
            f"{task.name} was started before; `start {task.name} --again` starts over, and keeps a "
            "copy of your work.\n"
        )
    state.current = task.name
    write_state(state)
    show_task(task)


def show_task(task: Task) -> None:
    """Print the task, and where to write."""
    if task.symptom:
        print(f"{task.name}: practice/{task.script} now has a mistake. This is what it does:\n")
        print(textwrap.indent(textwrap.fill(task.symptom, 96), "  "))
    else:
        line, docstring = find_hole(read(PRACTICE / task.script), task)
        print(f"{task.name}: {task.title}\npractice/{task.script}:{line}, in {task.function}\n")
        print(textwrap.indent(docstring if not task.task else task.task.strip(), "  "))
    print(f"\nChapter: {chapter(task)}\nNext: check, or hint", flush=True)


def check(task: Task, state: State, tasks: dict[str, Task]) -> int:
    """Judge the learner's answer, and print the verdict; return the exit status."""
    started = [tasks[name] for name in state.started if tasks[name].script == task.script]
    others = {other.function for other in started} - {task.function}
    watched = task.function if task.alone else ""
    case = Case(PRACTICE / task.script, task.script, watched, task.tests, tuple(sorted(others)))
    warm_up(case)
    passed, lines = judge(case)
    if passed:
        state = read_state()  # which may have changed meanwhile, as from another terminal
        state.done = [*dict.fromkeys([*state.done, task.name])]
        write_state(state)
        show_lines("✓", task.name, ["is found" if task.symptom else "is right", *lines])
        print(f"  Next: {advice(state, tasks)}", flush=True)
        return 0
    if task.symptom and lines[0].startswith("not yet") and state.hints.get(task.name, 0) < 2:
        lines = ["is still there; the second hint lets check say more"]
    show_lines("✗", task.name, lines)
    return 1


def watch(tasks: dict[str, Task]) -> None:
    """Check the current task whenever its file is saved or another task started, until Ctrl-C."""
    seen: tuple[str, int] | None = None
    while True:
        state = read_state()
        task = tasks[state.current]
        path = PRACTICE / task.script
        now = (task.name, path.stat().st_mtime_ns) if path.exists() else seen
        if now != seen:
            seen = now
            check(task, state, tasks)
            warm_up_optimizers()
        time.sleep(0.1)


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
    """Print the learner's function, and the script's."""
    for path in (PRACTICE / task.script, SOURCES / task.script):
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
        start(tasks[args.name or rest[0]], state, args.again)
        return 0
    state.current = args.name or state.current
    if state.current not in state.started:
        first = (
            f"poetry run src/practice.py start {args.name}" if args.name else advice(state, tasks)
        )
        raise OSError(f"start one first: {first}")
    write_state(state)
    task = tasks[state.current]
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
