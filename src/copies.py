"""The folder practice/: copies of the scripts for a learner to edit, and a record of progress.

practice.py uses it. No function that the learner has written is ever lost: a file is copied to
another name before anything in it is replaced.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from holes import SOURCES, Task, carry

PRACTICE = SOURCES.parent / "practice"


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o755)  # executable, like the scripts
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
    """Return the scripts of the tasks, and those that they import."""
    found = [*dict.fromkeys(task.script for task in tasks.values())]
    for name in found:  # which grows
        imports = re.findall(r"^(?:from|import) (\w+)", read(SOURCES / name), re.MULTILINE)
        others = (f"{module}.py" for module in imports if (SOURCES / f"{module}.py").exists())
        found += [other for other in dict.fromkeys(others) if other not in found]
    return found


def refresh(state: State, tasks: dict[str, Task]) -> None:
    """Copy new and changed scripts to practice/, and keep the functions that the learner wrote."""
    PRACTICE.mkdir(exist_ok=True)
    for name in scripts(tasks):
        path, source = PRACTICE / name, read(SOURCES / name)
        digest, before = hashlib.sha256(source.encode()).hexdigest(), state.hashes.get(name)
        mine = {tasks[task].function for task in state.started if tasks[task].script == name}
        if path.exists() and digest == before:
            continue
        if not path.exists():
            state.started = [task for task in state.started if tasks[task].script != name]
        elif hashlib.sha256(path.read_bytes()).hexdigest() != before:
            source = carry(sorted(mine), read(path), source)
            print(f"src/{name} has changed. practice/{name} is a new copy with your functions;")
            print(f"the old one is now {keep(path).name}.\n")
        write(path, source)
        state.hashes[name] = digest
    write_state(state)
