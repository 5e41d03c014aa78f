import dataclasses

from shrinkkit.core import machines
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.search import SearchRecord, Trial
from shrinkkit.report import search


def trial(number, speed, gain):
    recipe = {"stages": [{"prune-channels": {"ratio": 0.5}}], "precision": {"static-int8": {}}}
    speedup = Estimate(speed, 0.98 * speed, 1.02 * speed)
    made = Trial(number, {}, recipe, "measured", "", speedup, Estimate(gain, gain - 0.01, gain + 0.01), -gain - 0.01)
    return dataclasses.replace(made, size_bytes=1000, drift=0.1)


def record(*trials, found=(), drop=0.01, resolution=0.015):
    environment = machines.environment(1, packages=())
    scored = {"metric": "accuracy", "examples": 250, "resolution": resolution, "is_fraction": True}
    times = {"limit_s": 600.0, "elapsed_s": 300.0}
    left_out = {"float16": "no hardware support on this CPU"}
    options = {"left_out": left_out, "environment": environment, "found": found, "trials": trials}
    return SearchRecord(target="cpu/torch", want="fastest", accuracy_drop=drop, **scored, **times, **options)


def test_what_a_search_did_and_could_not_tell_is_said():
    slower = dataclasses.replace(trial(2, 1.1, 0.0), state="not better", gain=None, shortfall=None)
    failed = Trial(3, {}, slower.recipe, "failed", "No channel can be removed.")
    text = repr(search.found(record(trial(0, 8.0, 0.0), slower, failed, found=(0,))))
    assert "3 recipes tried in 5.0 min on cpu/torch: 1 scored, 1 timed only" in text
    assert "1 not possible" in text
    assert "an exact copy reaches \N{MINUS SIGN}1.5 pts" in text
    assert "Not searched: float16, no hardware support on this CPU." in text
    assert "exact copy" not in repr(search.found(record(trial(0, 8.0, 0.0), found=(0,), resolution=0.001)))


def test_the_front_tells_what_keeps_the_budget_and_what_was_found():
    picture = search.front(record(trial(0, 8.0, 0.0), trial(1, 40.0, -0.6), trial(2, 0.03, 0.002), found=(0,)))
    assert (
        "3 recipes by speed-up and change of accuracy. The best that keeps the budget is 8\N{MULTIPLICATION SIGN}."
        in picture.alt
    )
    assert "No recipe has been measured yet" in repr(search.front(record()))


def test_every_trial_is_a_row_with_its_recipe_or_its_reason():
    failed = Trial(1, {}, trial(0, 1.0, 0.0).recipe, "failed", "No channel can be removed.")
    table = repr(search.trials(record(trial(0, 8.0, 0.0), failed)))
    assert table.count("prune-channels ratio 0.5 | static-int8") == 2
    assert "No channel can be removed." in table


def test_a_search_for_the_smallest_tells_the_speed_of_its_best_too():
    smallest = dataclasses.replace(record(trial(0, 8.0, 0.0), found=(0,)), want="smallest")
    assert "budget is 8\N{MULTIPLICATION SIGN}" in search.front(smallest).alt
    assert "8.00\N{MULTIPLICATION SIGN}" in repr(smallest.shown())
