"""Cut holes in the scripts, and plant mistakes: exercises.toml says where.

practice.py uses it. A function is found by its name, and a mistake by its exact text.
"""

import ast
import contextlib
import symtable
import textwrap
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

SOURCES = Path(__file__).resolve().parents[1]
ROOT = SOURCES.parent


@dataclass(frozen=True)
class Task:
    """A function to write or a mistake to find: a table of exercises.toml."""

    name: str
    script: str  # its path in src/, or in practice/
    function: str  # its qualified name
    tests: list[str]  # of the script's tests, those that judge it
    hints: list[str]  # the next-to-last one of an exercise is the formula
    title: str = ""
    chapter: str = ""  # of the course, if it isn't named after the script
    task: str = ""  # where the docstring doesn't say it
    first: str = ""  # how the first statement to write begins; empty for the whole body
    last: str = ""  # how the last statement to write begins
    alone: bool = True  # whether its result depends only on its arguments
    old: str = ""  # the right code
    new: str = ""  # the mistake in its place
    symptom: str = ""  # the visible effect of the mistake, with the names of its numbers
    trial: str = ""  # the function of trials.py that returns these numbers


def read_tasks() -> dict[str, Task]:
    """Return the exercises in their order, then the mistakes, bug-1, bug-2 and so on, by name."""
    tables = tomllib.loads(Path(__file__).with_name("exercises.toml").read_text(encoding="utf-8"))
    exercises = [Task(**table) for table in tables["exercise"]]
    bugs = [Task(name=f"bug-{n}", **table) for n, table in enumerate(tables["bug"], start=1)]
    return {task.name: task for task in exercises + bugs}


def find(node: ast.AST, name: str) -> ast.FunctionDef:
    """Find a function by its qualified name. Raises OSError if a file has lost it."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    for part in name.split("."):
        inside = [child for child in ast.iter_child_nodes(node) if isinstance(child, kinds)]
        named = [child for child in inside if child.name == part]
        if not named:
            raise OSError(f"there is no function {name}")
        node = named[0]
    return cast(ast.FunctionDef, node)


def has(source: str, name: str) -> bool:
    """Return whether a source has a function with this qualified name."""
    try:
        find(ast.parse(source), name)
    except OSError:
        return False
    return True


def same_function(name: str, source: str, other: str) -> bool:
    """Return whether a function is the same in two sources, but for comments and spaces."""
    return ast.dump(find(ast.parse(source), name)) == ast.dump(find(ast.parse(other), name))


def find_hole(source: str, task: Task) -> tuple[int, str]:
    """Return the number of the line to write, or else of the function, and its docstring."""
    function = find(ast.parse(source), task.function)
    lines = enumerate(source.split("\n"), start=1)
    numbers = (number for number, line in lines if f"write {task.name} here" in line)
    return next(numbers, function.lineno), ast.get_docstring(function) or ""


def function_lines(source: str, name: str) -> slice:
    """Return the lines of a function in a source, with its decorators."""
    function = find(ast.parse(source), name)
    first = min([function.lineno, *(node.lineno for node in function.decorator_list)])
    return slice(first - 1, function.end_lineno)


def hole_lines(source: str, task: Task) -> slice:
    """Return the lines to write: all after the docstring, or those from `first` to `last`."""
    function = find(ast.parse(source), task.function)
    statements = [node for node in ast.walk(function) if isinstance(node, ast.stmt)]
    if not task.first:
        documented = ast.get_docstring(function) is not None
        before = function.body[0].end_lineno if documented else function.body[0].lineno - 1
        return slice(before, function.end_lineno)
    texts = [(ast.get_source_segment(source, node) or "", node) for node in statements]
    first = min(node.lineno for text, node in texts if text.startswith(task.first))
    last = max(node.end_lineno or 0 for text, node in texts if text.startswith(task.last))
    return slice(first - 1, last)


def fill(source: str, task: Task, body: str) -> str:
    """Return the source with another body in place of the lines to write."""
    lines = source.split("\n")
    hole = hole_lines(source, task)
    first = next(line for line in lines[hole] if line.strip())
    indent = first[: len(first) - len(first.lstrip())]
    lines[hole] = textwrap.indent(textwrap.dedent(body).strip("\n"), indent).split("\n")
    return "\n".join(lines)


def prepare(source: str, task: Task) -> str:
    """Return the source with the hole, or the mistake. The rest stays the same, byte for byte."""
    if task.old:
        before, after = source.split(task.old)  # it occurs exactly once
        return before + task.new + after
    return fill(source, task, f'raise NotImplementedError("write {task.name} here")')


def carry(functions: Iterable[str], source: str, target: str) -> str:
    """Return the target with these functions as they stand in the source."""
    for name in functions:
        lines = target.split("\n")
        lines[function_lines(target, name)] = source.split("\n")[function_lines(source, name)]
        target = "\n".join(lines)
    return target


def defined_names(module: symtable.SymbolTable) -> set[str]:
    """Return the names that a module imports or defines."""
    symbols = module.get_symbols()
    return {s.get_name() for s in symbols if s.is_imported() or s.is_assigned()}


def lost_names(copy: str, name: str, source: str) -> set[str]:
    """Return the names that a function takes from its module, and that another source lacks."""
    module = symtable.symtable(copy, "copy", "exec")
    tables = [module]
    for part in name.split("."):
        tables = [child for child in tables[0].get_children() if child.get_name() == part]
    needed = set()
    while tables:  # the function's own, and those of what is defined in it
        table, *tables = tables
        needed |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables += table.get_children()
    there = defined_names(symtable.symtable(source, "source", "exec"))
    return needed & defined_names(module) - there


def mend(path: Path, script: str, functions: Iterable[str]) -> ast.Module:
    """Parse the copy of a script, with the bodies of some functions as they stand in the script."""
    tree = ast.parse(path.read_bytes(), str(path))
    other = ast.parse((SOURCES / script).read_bytes())
    for name in functions:
        with contextlib.suppress(OSError):  # the tests will tell if they need it
            find(tree, name).body = find(other, name).body
    return tree
