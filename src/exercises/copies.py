"""The folder practice/: copies of the scripts for a learner to edit, and a record of progress.

practice.py uses it. No function that the learner has written is ever lost: a file is copied to
another name before anything in it is replaced.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from exercises.holes import SOURCES, Task, carry, has

PRACTICE = SOURCES.parent / "practice"
ROOMS = ("inputs", "decoding", "running")
FORMERLY = {  # where the functions of a script stood before there were rooms
    "decoding/cache.py": ["cache.py"],
    "decoding/search.py": ["search.py"],
    "inputs/clothes.py": ["clothes.py"],
    "inputs/dates.py": ["dates.py"],
    "inputs/pairs.py": ["corpus.py"],
    "inputs/phrases.py": ["phrases.py"],
    "inputs/photo.py": ["photo.py"],
    "running/processes.py": ["processes.py"],
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
    """Read a script with its line endings unchanged. Raises OSError if it isn't valid Python."""
    try:
        source = path.read_bytes().decode()
        compile(source, path.name, "exec")
    except (SyntaxError, ValueError) as error:
        raise OSError(f"fix this first: {path}: {error}") from error
    return source


def write(path: Path, text: str) -> None:
    """Write a temporary file, then rename it, so that a crash never leaves a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if path.suffix == ".py" and path.parent == PRACTICE:
            temporary.chmod(0o755)  # executable, like the lessons
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_state() -> State:
    """Read the file that `write_state` wrote. Raises OSError if it is broken."""
    path = PRACTICE / "state.json"
    try:
        return State(**json.loads(path.read_bytes())) if path.exists() else State()
    except (TypeError, ValueError) as error:
        raise OSError(f"{path} is broken; delete it to start over") from error


def write_state(state: State) -> None:
    """Save the learner's progress."""
    write(PRACTICE / "state.json", json.dumps(asdict(state), indent=1))


def keep(path: Path) -> Path:
    """Copy a file to a new name in the same folder; return the copy's path."""
    number = 1
    while (old := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    shutil.copy(path, old)
    return old


def scripts(tasks: dict[str, Task]) -> list[str]:
    """Return the lessons of the tasks, and all files of the rooms that lessons import."""
    lessons = dict.fromkeys(task.script for task in tasks.values() if "/" not in task.script)
    files = [path for room in ROOMS for path in sorted((SOURCES / room).glob("*.py"))]
    return [*lessons, *(path.relative_to(SOURCES).as_posix() for path in files)]


def digest(path: Path) -> str:
    """Return a digest of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def functions_of(script: str, state: State, tasks: dict[str, Task]) -> list[str]:
    """Return the functions of a script that the learner has started."""
    started = [tasks[name] for name in state.started if tasks[name].script == script]
    return sorted({task.function for task in started})


def move_in(state: State, tasks: dict[str, Task]) -> None:
    """Carry what was written before the scripts had rooms over to the files of today."""
    for script, places in FORMERLY.items():
        source = read(SOURCES / script)
        for path in (PRACTICE / place for place in places):
            if not path.exists():
                continue
            copy = read(path)
            mine = [name for name in functions_of(script, state, tasks) if has(copy, name)]
            source = carry(mine, copy, source)
            if digest(path) != state.hashes.pop(path.name, None):
                kept = keep(path).name
                print(f"What you wrote in practice/{path.name} is in practice/{script} now;")
                print(f"the old file is kept as {kept}.\n")
            path.unlink()
        write(PRACTICE / script, source)
        state.hashes[script] = digest(SOURCES / script)


def refresh(state: State, tasks: dict[str, Task]) -> None:
    """Copy new and changed scripts to practice/, and keep the functions that the learner wrote."""
    PRACTICE.mkdir(exist_ok=True)
    if "cache.py" in state.hashes:
        move_in(state, tasks)
    for name in scripts(tasks):
        path, source, now = PRACTICE / name, read(SOURCES / name), digest(SOURCES / name)
        before = state.hashes.get(name)
        if path.exists() and now == before:
            continue
        if not path.exists():
            state.started = [task for task in state.started if tasks[task].script != name]
        elif digest(path) != before:
            source = carry(functions_of(name, state, tasks), read(path), source)
            print(f"src/{name} has changed. practice/{name} is a new copy with your functions;")
            print(f"the old one is now {keep(path).name}.\n")
        write(path, source)
        state.hashes[name] = now
    write_state(state)
