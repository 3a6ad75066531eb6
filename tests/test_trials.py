"""Each mistake's symptom is what its trial finds, with the mistake and without."""

import math
from types import SimpleNamespace

import pytest

from exercises import gpt_trials as trials
from exercises import holes, judge

TASKS = holes.read_tasks()


@pytest.fixture
def no_network(monkeypatch):
    """Let each trial train its own network, whatever is in runs/."""
    monkeypatch.setattr(trials, "ROOT", holes.ROOT / "tests")


def task_of(trial):
    (task,) = [task for task in TASKS.values() if task.trial == trial]
    return task


def both(trial, tmp_path, monkeypatch):
    """Return what a trial finds with the mistake, and without."""
    task = task_of(trial)
    source = (holes.SOURCES / task.script).read_text(encoding="utf-8")
    found = []
    for name, text in (("wrong", holes.prepare(source, task)), ("right", source)):
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setitem(judge.sys.modules, name, None)
        found.append(getattr(trials, trial)(judge.load(name, path, task.script)))
    wrong, right = found
    assert "{" not in task.symptom.format(**wrong, right=SimpleNamespace(**right))
    return SimpleNamespace(**wrong), SimpleNamespace(**right)


def test_a_list_hides_the_layers(tmp_path, monkeypatch):
    wrong, right = both("list_of_layers", tmp_path, monkeypatch)
    assert wrong.parameters == 100 * 64  # the embedding
    assert right.parameters > 30 * wrong.parameters


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("trial", ["layout", "tiled_heads"])
def test_weights_from_elsewhere_need_more_bits(trial, tmp_path, monkeypatch):
    wrong, right = both(trial, tmp_path, monkeypatch)
    assert wrong.bits > right.bits + 0.001
    assert right.bits < 8


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_prompts_get_the_masks_of_others(tmp_path, monkeypatch):
    wrong, right = both("mask_of_heads", tmp_path, monkeypatch)
    assert wrong.differ > right.differ == 0
    assert "size of tensor" in wrong.error
    assert right.error == "no error"


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_the_future_is_copied(tmp_path, monkeypatch):
    wrong, right = both("no_causal_mask", tmp_path, monkeypatch)
    assert right.bits == pytest.approx(right.alone, rel=1e-4)
    assert not math.isclose(wrong.bits, wrong.alone, rel_tol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_the_same_token_is_predicted_again(tmp_path, monkeypatch):
    wrong, right = both("unshifted_labels", tmp_path, monkeypatch)
    assert wrong.loss < right.loss
    assert wrong.bits > right.bits
    assert wrong.kinds == 1


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_only_the_cache_is_wrong(tmp_path, monkeypatch):
    wrong, right = both("position_of_queries", tmp_path, monkeypatch)
    assert wrong.bits == pytest.approx(right.bits)
    assert right.same == right.written == wrong.written > wrong.same


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_less_than_p_is_kept(tmp_path, monkeypatch):
    wrong, right = both("crossing_token", tmp_path, monkeypatch)
    assert right.below == 0
    assert right.least >= 0.9 > wrong.least
    assert 0 < wrong.below <= wrong.rows
