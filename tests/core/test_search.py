import dataclasses

import pytest

from shrinkkit.core import estimate, search
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.recipe import Study
from shrinkkit.core.search import Trial


def trial(number, speed, *, shortfall=-0.01, drift=0.1, size=1000, state="measured"):
    gain = Estimate(0.0, -0.01, 0.01)
    speedup = Estimate(speed, speed, speed)
    recipe = {"stages": [], "precision": {"static-int8": {}}}
    return Trial(number, {}, recipe, state, "", speedup, gain, shortfall, drift, size)


def resolution(examples):
    return -estimate.paired_difference([1.0] * examples, [1.0] * examples, bounds=(0.0, 1.0)).low


def test_a_loss_is_held_against_the_bound_of_its_interval():
    assert search.shortfall(Estimate(-0.004, -0.008, 0.0), 0.01, resolution=0.002) == pytest.approx(-0.002)
    assert search.shortfall(Estimate(-0.004, -0.015, 0.007), 0.01, resolution=0.002) == pytest.approx(0.005)


def test_where_a_copy_could_not_be_shown_to_hold_the_budget_its_doubt_is_forgiven():
    few = resolution(100)
    assert few > 0.01
    copy = estimate.paired_difference([1.0] * 100, [1.0] * 100, bounds=(0.0, 1.0))
    assert search.shortfall(copy, 0.01, few) == pytest.approx(-0.01)
    three_lost = estimate.paired_difference([1.0] * 100, [0.0] * 3 + [1.0] * 97, bounds=(0.0, 1.0))
    assert search.shortfall(three_lost, 0.01, few) > 0


def test_many_examples_forgive_nothing():
    many = resolution(2000)
    assert many < 0.01
    gain = Estimate(-0.009, -0.0095, -0.0085)
    assert search.shortfall(gain, 0.01, many) == search.shortfall(gain, 0.01, 0.0)


def test_the_best_is_found_and_more_cautious_ones_with_it():
    trials = [
        trial(0, 12.0, drift=0.09),
        trial(1, 11.9, drift=0.01),  # hardly slower
        trial(2, 9.0, drift=0.2),  # drifts more
        trial(3, 8.0, drift=0.2, shortfall=-0.02),  # loses less
        trial(4, 20.0, shortfall=0.01),  # loses too much
        trial(5, 7.0, drift=0.04),
        trial(6, 6.0, drift=0.01),
        dataclasses.replace(trial(7, 1.0, drift=0.0), recipe={"stages": [], "precision": {"float32": {}}}),
        trial(8, 1.05, drift=0.001),  # hardly faster than the unchanged model
    ]
    assert search.found(trials, "fastest") == (0, 3, 5, 6)


def test_what_is_smallest_is_found_by_its_bytes():
    trials = [trial(0, 1.0, size=100), trial(1, 9.0, size=300), trial(2, 9.0, size=200, drift=0.0)]
    assert search.found(trials, "smallest")[0] == 0


def test_if_none_keeps_the_budget_the_nearest_is_found():
    trials = [trial(0, 9.0, shortfall=0.3), trial(1, 2.0, shortfall=0.02), trial(2, 3.0, shortfall=0.05)]
    assert search.found(trials, "fastest") == (1,)
    assert search.found([dataclasses.replace(trials[0], state="failed", shortfall=None)], "fastest") == ()


def test_the_unchanged_model_is_no_recipe():
    unchanged = dataclasses.replace(trial(0, 30.0), recipe={"stages": [], "precision": {"float32": {}}})
    assert search.found([unchanged, trial(1, 2.0)], "fastest") == (1,)


def test_what_is_found_is_trained_longer_than_its_trial():
    recipe = {"stages": [{"prune-channels": {"ratio": 0.5}}, {"distil": {"epochs": 3}}], "precision": {"float32": {}}}
    longer = search._trained_longer(recipe)
    assert longer["stages"] == [{"prune-channels": {"ratio": 0.5}}, {"distil": {"epochs": 12}}]
    assert recipe["stages"][1]["distil"]["epochs"] == 3


def test_a_recipe_is_told_by_what_differs_from_the_defaults():
    stages = [{"prune-channels": {"ratio": 0.5, "scope": "global", "round_to": 8}}, {"fine-tune": {"epochs": 9}}]
    told = search.parts({"stages": stages, "precision": {"static-int8": {}}})
    assert told == "prune-channels ratio 0.5 | fine-tune epochs 9 | static-int8"
    assert search.parts({"stages": [], "precision": {"float32": {}}}) == ""


def test_a_study_without_recipes_needs_a_search_on_one_target():
    given = {"name": "one", "task": "digits-cnn", "targets": ("cpu/torch",)}
    with pytest.raises(ValueError, match="`recipes` must be a list of at least one recipe"):
        Study(**given)
    assert Study(**given, search={"minutes": 2}).searched == "cpu/torch"
    several = {**given, "targets": ("cpu/torch", "cpu/onnxruntime")}
    with pytest.raises(ValueError, match="`search` needs one target"):
        Study(**several, search={})
    assert Study(**several, search={}, budget={"target": "cpu/onnxruntime"}).searched == "cpu/onnxruntime"
    with pytest.raises(ValueError, match="minutes"):
        Study(**given, search={"minutes": 0})
