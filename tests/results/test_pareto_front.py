"""The front of a run: nothing on it is beaten, everything off it is, and what is not sure is not on it."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrinkkit.core.estimate import Estimate
from shrinkkit.results import results
from shrinkkit.results.results import Row


def row(name, *, speed=2.0, change=0.0, size=100, timing="faster", **changes):
    figures = {"speedup_today": Estimate(speed, speed, speed), "difference": Estimate(change, change, change)}
    figures |= {"accuracy_verdict": "within budget", "timing_today": timing}
    return Row(name, "cpu/onnxruntime", "measured", size_bytes=size, **figures | changes)


def names(*rows):
    return [one.variant for one in results.pareto_front(rows)]


def test_what_is_beaten_in_everything_is_not_on_the_front():
    assert names(row("a", speed=3.0, size=50), row("b"), row("c", change=0.01, speed=1.0)) == ["a", "c"]


def test_two_of_the_same_figures_are_both_on_it():
    assert names(row("a"), row("b")) == ["a", "b"]


def test_what_has_no_verdict_is_not_on_it_and_beats_nobody():
    doubtful = [row(kind, speed=9.0, timing=kind) for kind in ("undecided", "too noisy", "")]
    assert names(row("a"), *doubtful) == ["a"]
    assert names(row("a"), dataclasses.replace(row("b", speed=9.0), state="refused")) == ["a"]
    assert names(row("a"), dataclasses.replace(row("b", speed=9.0), intermediate=True)) == ["a"]


def test_a_variant_without_a_comparison_is_no_reference():
    assert names(row("a"), Row("b", "cpu/torch", "measured", size_bytes=1)) == ["a"]


def test_the_baseline_takes_part_with_no_change_of_accuracy():
    assert names(row("baseline", difference=None, accuracy_verdict="", speed=1.0), row("a", change=-0.1)) == [
        "a",
        "baseline",
    ]


@pytest.mark.parametrize("changes", [{"accuracy_verdict": "over budget"}, {"accuracy_verdict": "cannot tell"},
                                     {"difference": None, "accuracy_verdict": ""}])  # fmt: skip
def test_what_is_not_surely_within_the_budget_is_not_on_it(changes):
    assert names(row("a"), row("b", speed=9.0, size=1, **changes)) == ["a"]


levels = st.integers(0, 3)


@given(st.lists(st.tuples(levels, levels, levels), min_size=1, max_size=12))
def test_a_row_is_on_the_front_unless_another_beats_it(figures):
    rows = [row(str(i), speed=1 + s, change=c, size=1 + z) for i, (s, c, z) in enumerate(figures)]
    best = {one.variant for one in results.pareto_front(rows)}
    assert best
    for i, (s, c, z) in enumerate(figures):
        beaten = any((a >= s and b >= c and d <= z) and (a, b, d) != (s, c, z) for a, b, d in figures)
        assert (str(i) in best) != beaten
