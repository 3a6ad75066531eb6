"""The folder practice/: copies of the scripts for a learner to edit, and a record of progress.

practice.py uses it. No function that the learner has written is ever lost: a file is copied to
another name before anything in it is replaced. Each mistake to find has a folder of its own there,
with a fresh copy of all scripts.
"""

import hashlib
import json
import re
import shutil
import tokenize
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from exercises.holes import (
    ROOT,
    SOURCES,
    Task,
    carry,
    has,
    lost_names,
    prepare,
    same_function,
)
from running.shell import write

PRACTICE = ROOT / "practice"
ROOMS = ("inputs", "decoding", "running")
TOOLS = ("practice.py", "explore.py")
SYMPTOM = "symptom.txt"  # in the folder of a mistake
FORMERLY = {  # where the functions of a script stood before there were rooms
    "attention.py": ["attention.py"],
    "decoding/cache.py": ["cache.py"],
    "decoding/search.py": ["search.py"],
    "fashion-mnist.py": ["fashion-mnist.py"],
    "inputs/pairs.py": ["corpus.py"],
    "transformer.py": ["transformer.py"],
    "translation.py": ["translation.py", "network.py"],
}


@dataclass
class State:
    """The learner's progress."""

    current: str = ""
    started: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    hints: dict[str, int] = field(default_factory=dict)  # how many were given
    hashes: dict[str, str] = field(default_factory=dict)  # of the scripts that were copied


def read(path: Path) -> str:
    """Read a script; its lines end in line feeds. Raises OSError if it isn't valid Python."""
    require_file(path)
    try:
        with tokenize.open(path) as file:  # with a byte-order mark or without
            source = file.read()
        compile(source, path.name, "exec")
    except (SyntaxError, ValueError) as error:
        raise OSError(f"fix this first: {path}: {error}") from error
    return source


def is_broken(path: Path) -> bool:
    """Return whether a copy is there and isn't valid Python."""
    if not path.exists():
        return False
    require_file(path)
    try:
        read(path)
    except OSError:
        return True
    return False


def require_file(path: Path) -> None:
    """Raise OSError if there is a pipe, which would be waited for, or a folder."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a plain file")


def save(path: Path, text: str) -> None:
    """Write a copy of a script, executable if it is a lesson's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text.encode())
    if (SOURCES / path.name).exists():
        path.chmod(0o755)


def read_state() -> State:
    """Read the file that `write_state` wrote. Raises OSError if it is broken."""
    path = PRACTICE / "state.json"
    if not path.is_file():
        return State()
    try:
        state = State(**json.loads(path.read_bytes()))
        check_state(state)
    except (RecursionError, TypeError, ValueError) as error:
        message = "delete it, and what you wrote will be found again"
        raise OSError(f"{path} is broken; {message}") from error
    return state


def check_state(state: State) -> None:
    """Raise TypeError unless the fields of a state have their types."""

    def texts(values: object) -> bool:
        return isinstance(values, list | dict) and all(isinstance(value, str) for value in values)

    counts = isinstance(state.hints, dict) and texts(state.hints)
    counts = counts and all(type(n) is int and n >= 0 for n in state.hints.values())
    hashes = isinstance(state.hashes, dict) and texts([*state.hashes, *state.hashes.values()])
    lists = isinstance(state.started, list) and isinstance(state.done, list)
    named = lists and texts([state.current, *state.started, *state.done])
    if not (counts and hashes and named):
        raise TypeError("a field has another type")


def write_state(state: State) -> None:
    """Save the learner's progress."""
    write(PRACTICE / "state.json", json.dumps(asdict(state), indent=1).encode())


def keep(path: Path) -> Path:
    """Copy a file to a new name in the same folder; return the copy's path."""
    number = 1
    while (old := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    shutil.copy(path, old)
    return old


def scripts() -> list[str]:
    """Return the lessons, and all files of the rooms that they import."""
    lessons = [path for path in sorted(SOURCES.glob("*.py")) if path.name not in TOOLS]
    files = [path for room in ROOMS for path in sorted((SOURCES / room).glob("*.py"))]
    return [path.relative_to(SOURCES).as_posix() for path in lessons + files]


def copy_of(task: Task) -> Path:
    """Return the path of the copy that a learner edits for a task."""
    return PRACTICE / task.name / task.script if task.symptom else PRACTICE / task.script


def plant(task: Task) -> None:
    """Copy all scripts to a folder of their own, with a mistake; keep the folder that was there."""
    folder = PRACTICE / task.name
    if folder.exists():
        number = 1
        while (old := folder.with_name(f"{task.name}.{number}")).exists():
            number += 1
        folder.rename(old)
        print(f"The old folder is kept as practice/{old.name}.\n")
    for name in scripts():
        save(folder / name, read(SOURCES / name))
    save(copy_of(task), prepare(read(SOURCES / task.script), task))


def is_planted(task: Task) -> bool:
    """Return whether the copy still has the function with the mistake, as it was planted."""
    if is_broken(copy_of(task)):
        return False
    source = read(copy_of(task))
    planted = prepare(read(SOURCES / task.script), task)
    return has(source, task.function) and same_function(task.function, source, planted)


def digest(path: Path) -> str:
    """Return a digest of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def carry_over(
    copies: Sequence[str], source: str, tasks: Sequence[Task], done: Collection[str]
) -> str:
    """Return a script with the functions of some tasks as a learner wrote them in older copies.

    A function that isn't there, or needs what the script no longer has, is begun again, unless its
    task is done.
    """
    for task in tasks:
        name = task.function
        usable = [c for c in copies if has(c, name) and not lost_names(c, name, source)]
        if usable:
            source = carry([name], usable[0], source)
        elif task.name not in done:
            source = prepare(source, task)
            print(f"{task.name} begins again, since the code around it has changed.")
    return source


def move_in(state: State, tasks: dict[str, Task]) -> None:
    """Carry what was written before the scripts had rooms over to the files of today."""
    for script, places in FORMERLY.items():
        mine = [tasks[name] for name in state.started if copy_of(tasks[name]) == PRACTICE / script]
        old = [PRACTICE / place for place in places if (PRACTICE / place).exists()]
        # The function that counts exact predictions has another name now.
        copies = [re.sub(r"\bevaluate\(", "share_exact(", read(path)) for path in old]
        text = carry_over(copies, read(SOURCES / script), mine, state.done)
        for path in old:
            if digest(path) != state.hashes.get(path.name):
                print(f"practice/{script} takes the place of practice/{path.name},")
                print(f"which is kept as {keep(path).name}.\n")
                path.unlink()
        save(PRACTICE / script, text)
        state.hashes[script] = digest(SOURCES / script)
    for place in set(state.hashes) - set(scripts()):
        path = PRACTICE / place
        if path.exists() and digest(path) == state.hashes[place]:
            path.unlink()
        del state.hashes[place]


def begin_again(task: Task, state: State, tasks: dict[str, Task]) -> None:
    """Make a new copy in place of one that isn't valid Python, which is kept."""
    path = copy_of(task)
    print(f"practice/{task.script} isn't valid Python. It is kept as {keep(path).name}; the new")
    print("copy has none of your functions.\n")
    mine = [tasks[name] for name in state.started if copy_of(tasks[name]) == path]
    save(path, carry_over([], read(SOURCES / task.script), mine, state.done))


def find_again(state: State, tasks: dict[str, Task]) -> None:
    """Make a new record of progress from the copies that are there."""
    changed = []
    for name in scripts():
        path = PRACTICE / name
        if not path.exists():
            continue
        state.hashes[name] = digest(SOURCES / name)
        if digest(path) != state.hashes[name]:
            changed.append(name)
            mine = [task for task in tasks.values() if copy_of(task) == path]
            state.started += [task.name for task in mine if was_written(task)]
    state.started += [task.name for task in tasks.values() if is_folder_of(task)]
    state.current = state.started[-1] if state.started else ""
    if changed or state.started:
        print("practice/state.json is missing, so a new record begins. Your copies stay as they")
        print("are; `check NAME` marks again what is right.\n")


def was_written(task: Task) -> bool:
    """Return whether the function of an exercise differs from the script's, or can't be read."""
    path = copy_of(task)
    if is_broken(path):
        return True
    source = read(path)
    return not has(source, task.function) or not same_function(
        task.function, source, read(SOURCES / task.script)
    )


def is_folder_of(task: Task) -> bool:
    """Return whether a mistake has been planted in its folder."""
    return bool(task.symptom) and copy_of(task).is_file()


def refresh(state: State, tasks: dict[str, Task]) -> None:
    """Copy new and changed scripts to practice/, and keep the functions that the learner wrote."""
    PRACTICE.mkdir(exist_ok=True)
    if not (PRACTICE / "state.json").exists():
        find_again(state, tasks)
    if "cache.py" in state.hashes:
        move_in(state, tasks)
    there = [name for name in state.started if copy_of(tasks[name]).exists()]
    state.started = there
    for name in scripts():
        refresh_copy(name, state, tasks)
    write_state(state)


def refresh_copy(name: str, state: State, tasks: dict[str, Task]) -> None:
    """Copy a script that is new or has changed, and keep the functions that the learner wrote."""
    path = PRACTICE / name
    require_file(path)
    source = read(SOURCES / name)
    now = digest(SOURCES / name)
    before = state.hashes.get(name)
    if path.exists() and now == before:
        return
    if path.exists() and digest(path) != before:
        if is_broken(path):
            print(f"src/{name} has changed. practice/{name} can't follow while it isn't valid")
            print("Python: fix it, or start over with `start NAME --again`.\n")
            return
        mine = [tasks[task] for task in state.started if copy_of(tasks[task]) == path]
        source = carry_over([read(path)], source, mine, state.done)
        print(f"src/{name} has changed. practice/{name} is a new copy with your functions;")
        print(f"the old one is now {keep(path).name}.\n")
    save(path, source)
    state.hashes[name] = now
