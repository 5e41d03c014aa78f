"""The search on a small real task: what is tried, what is found, and what an interrupted one goes on from."""

import dataclasses
import itertools
import random

import pytest
import tiny
from torch import nn

from shrinkkit.core import search, store
from shrinkkit.core.recipe import Budget, Recipe
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.search import SearchRecord
from shrinkkit.core.target import Target
from shrinkkit.measure.session import Settings
from shrinkkit.search import engine, space

TARGET = Target("cpu", "onnxruntime")


@pytest.fixture(scope="module")
def settings(one_thread):
    return Settings(target=TARGET, task=tiny.task(), threads=1)


def ended_after(trials):
    return lambda record: len(record.trials) >= trials


@pytest.fixture(scope="module")
def run(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("run")
    record = engine.run(folder, settings, minutes=5, budget=Budget(accuracy_drop=0.05), callback=ended_after(9))
    return folder, record


def test_every_trial_says_what_it_gave(run):
    _, record = run
    assert [trial.number for trial in record.trials] == list(range(9))
    assert {trial.state for trial in record.trials} <= {"measured", "not better", "failed"}
    for trial in record.trials:
        assert (trial.reason != "") == (trial.state == "failed")
        assert (trial.gain is not None) == (trial.state == "measured")
        assert trial.state == "failed" or (trial.speedup.low > 0 and trial.size_bytes > 0)


def test_the_search_starts_with_each_precision_alone_and_then_prunes(run, settings):
    _, record = run
    alone = [trial for trial in record.trials if not trial.recipe["stages"]]
    assert [t.choices["precision"] for t in alone] == list(space.of_task(settings.task, TARGET).precisions)
    assert record.trials[len(alone)].choices["channels"] == pytest.approx(space.MOST / 2)


def test_what_is_found_keeps_the_budget_and_is_a_recipe_that_can_be_run(run):
    _, record = run
    found = [record.trials[number] for number in record.found]
    assert found
    assert all(trial.holds for trial in found)
    holding = [trial for trial in record.trials if trial.holds and search.parts(trial.recipe)]
    assert found[0].speedup.value == max(trial.speedup.value for trial in holding)
    assert [recipe.name for recipe in record.recipes()] == ["tuned", "tuned-2", "tuned-3", "tuned-4"][: len(found)]
    assert all(isinstance(recipe, Recipe) for recipe in record.recipes())


def test_the_record_on_disk_is_the_one_returned(run):
    folder, record = run
    assert store.read(RunFolder(folder).search, SearchRecord) == record


def test_an_interrupted_search_goes_on_with_what_it_knows(run, settings):
    folder, record = run
    more = engine.run(folder, settings, minutes=5, budget=Budget(accuracy_drop=0.05), callback=ended_after(10))
    assert more.trials[:9] == record.trials
    assert len(more.trials) == 10
    assert more.elapsed_s > record.elapsed_s


def test_a_search_for_something_else_starts_anew(run, settings, tmp_path):
    folder, _ = run
    copied = RunFolder(tmp_path).search
    copied.write_bytes(RunFolder(folder).search.read_bytes())
    other = engine.run(tmp_path, settings, minutes=5, budget=Budget(accuracy_drop=0.2), callback=ended_after(1))
    assert len(other.trials) == 1


def test_time_that_is_over_before_the_first_trial_tries_nothing(settings, tmp_path):
    record = engine.run(tmp_path, settings, minutes=1e-9, budget=Budget())
    assert (record.trials, record.found) == ((), ())


def test_a_file_that_is_no_better_is_not_trained(run, settings, monkeypatch):
    folder, _ = run
    bench = engine._Bench.on(folder, settings, Budget())
    trained = []
    monkeypatch.setattr(engine, "apply_stage", lambda *a, **k: trained.append(a[2].name) or applied(*a, **k))
    choices = bench.space.plain(channels=0.5, epochs=1)
    trial = bench.trial(0, choices, bench.space.recipe(choices), best=1000.0)
    assert (trial.state, trained) == ("not better", ["prune-channels"])
    assert bench.trial(0, choices, bench.space.recipe(choices), best=0.0).state == "measured"
    assert trained[1:] == ["prune-channels", "fine-tune"]


applied = engine.apply_stage


def test_a_recipe_that_fails_is_a_trial_with_its_reason(run, settings):
    folder, _ = run
    bench = engine._Bench.on(folder, settings, Budget())
    recipe = {"stages": [{"prune-channels": {"ratio": 0.01, "round_to": 64}}], "precision": {"float32": {}}}
    trial = bench.trial(3, {}, recipe, best=0.0)
    assert trial.state == "failed"
    assert "No channel can be removed" in trial.reason


def test_bolder_choices_never_prune_less(settings):
    found = space.of_task(settings.task, TARGET)
    start = found.plain(channels=0.4)
    amounts = [name for name in start if name in found.strengths or name.startswith("shift")]
    for seed in range(50):
        bold = found.bolder(start, random.Random(seed))
        assert all(bold[name] >= start[name] for name in (*amounts, "epochs"))
        assert any(bold[name] > start[name] for name in amounts)


def test_a_model_that_cannot_be_pruned_is_searched_for_its_precision_only():
    task = dataclasses.replace(tiny.task(), model=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval())
    found = space.of_task(task, TARGET)
    assert {"prune-channels", "drop-blocks", "equalize"} <= set(found.left_out)
    assert "channels" not in found.distributions()
    assert "No channel can be removed" in found.left_out["prune-channels"]


def test_seeded_searches_choose_alike(settings):
    found = space.of_task(settings.task, TARGET)
    ladders = [list(itertools.islice(engine._ladders(found, [], "fastest"), 3)) for _ in range(2)]
    assert ladders[0] == ladders[1]
    assert [search.parts(found.recipe(choices)) for choices in ladders[0]][1:] == ["dynamic-int8", "static-int8"]
