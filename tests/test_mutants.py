"""Wrong answers to the exercises, each one edit away from the reference: the judge refuses all."""

import tomllib
from pathlib import Path

import pytest

from exercises import holes, judge
from test_practice import TASKS, reference, verdict

# By task: `old`, which stands once in the function, `new` in its place, and for the few that are
# no mistakes `right`, the reason.
MUTANTS = tomllib.loads((Path(__file__).parent / "mutants.toml").read_text(encoding="utf-8"))
CASES = [
    pytest.param(name, mutant, id=f"{name}-{number}")
    for name, mutants in MUTANTS.items()
    for number, mutant in enumerate(mutants, start=1)
]


def mutate(task, mutant):
    lines = reference(task).split("\n")
    place = holes.function_lines(reference(task), task.function)
    function = "\n".join(lines[place])
    assert function.count(mutant["old"]) == 1
    lines[place] = function.replace(mutant["old"], mutant["new"]).split("\n")
    return "\n".join(lines)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_different_and_python(name):
    assert name in TASKS
    sources = [mutate(TASKS[name], mutant) for mutant in MUTANTS[name]]
    assert len({reference(TASKS[name]), *sources}) == len(sources) + 1
    for source in sources:
        compile(source, name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutant"), CASES)
def test_a_mutant_is_refused_unless_it_is_right(name, mutant, tmp_path):
    judge.warm_up_optimizers()
    passed, lines = verdict(TASKS[name], mutate(TASKS[name], mutant), tmp_path)
    print(*lines, sep="\n")
    assert passed == ("right" in mutant)
