"""The folder practice/: copies of the scripts for a learner to edit, and a record of progress.

practice.py uses it. No function that the learner has written is ever lost: a file is copied to
another name before anything in it is replaced.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from exercises.holes import ROOT, SOURCES, Task, carry, has, lost_names, prepare
from running.shell import write

PRACTICE = ROOT / "practice"
ROOMS = ("inputs", "decoding", "running")
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
    try:
        source = path.read_text(encoding="utf-8")
        compile(source, path.name, "exec")
    except (SyntaxError, ValueError) as error:
        raise OSError(f"fix this first: {path}: {error}") from error
    return source


def save(path: Path, text: str) -> None:
    """Write a copy of a script, executable if it is a lesson's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text.encode())
    if path.parent == PRACTICE:
        path.chmod(0o755)


def read_state() -> State:
    """Read the file that `write_state` wrote. Raises OSError if it is broken."""
    path = PRACTICE / "state.json"
    try:
        return State(**json.loads(path.read_bytes())) if path.is_file() else State()
    except (TypeError, ValueError) as error:
        raise OSError(f"{path} is broken; delete it to start over") from error


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


def scripts(tasks: dict[str, Task]) -> list[str]:
    """Return the lessons of the tasks, and all files of the rooms that lessons import."""
    lessons = dict.fromkeys(task.script for task in tasks.values() if "/" not in task.script)
    files = [path for room in ROOMS for path in sorted((SOURCES / room).glob("*.py"))]
    return [*lessons, *(path.relative_to(SOURCES).as_posix() for path in files)]


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
        mine = [tasks[name] for name in state.started if tasks[name].script == script]
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
    for place in set(state.hashes) - set(scripts(tasks)):
        path = PRACTICE / place
        if path.exists() and digest(path) == state.hashes[place]:
            path.unlink()
        del state.hashes[place]


def refresh(state: State, tasks: dict[str, Task]) -> None:
    """Copy new and changed scripts to practice/, and keep the functions that the learner wrote."""
    PRACTICE.mkdir(exist_ok=True)
    if "cache.py" in state.hashes:
        move_in(state, tasks)
    for name in scripts(tasks):
        path = PRACTICE / name
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError(f"{path} is not a plain file")
        source = read(SOURCES / name)
        now = digest(SOURCES / name)
        before = state.hashes.get(name)
        if path.exists() and now == before:
            continue
        if not path.exists():
            state.started = [task for task in state.started if tasks[task].script != name]
        elif digest(path) != before:
            mine = [tasks[task] for task in state.started if tasks[task].script == name]
            source = carry_over([read(path)], source, mine, state.done)
            print(f"src/{name} has changed. practice/{name} is a new copy with your functions;")
            print(f"the old one is now {keep(path).name}.\n")
        save(path, source)
        state.hashes[name] = now
    write_state(state)
