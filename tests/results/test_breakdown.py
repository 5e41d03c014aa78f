"""The speed-up breakdown: factors that multiply to the total, each from a measurement."""

import dataclasses
import math

import examples
import pytest

from shrinkkit.results import breakdown, results


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results.load(examples.write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """A run that was also measured on another machine, on one of its targets."""
    return results.load(examples.write_two_machines(tmp_path_factory.mktemp("run"), targets=("cpu/torch",)))


def steps(row):
    return {factor.kind: factor.speedup.value for factor in row.factors if factor.kind != "runtime"}


@pytest.mark.parametrize("run", ["found", "away"])
def test_factors_multiply_to_the_total_at_every_place(run, request):
    loaded = request.getfixturevalue(run)
    rows = breakdown.breakdown(loaded)
    assert {row.target for row in rows} == set(loaded.targets)
    for row in rows:
        assert math.prod(factor.speedup.value for factor in row.factors) == pytest.approx(row.total.value)
        assert row.total.low <= row.total.value <= row.total.high


def test_factors_come_from_the_pruned_model_that_was_measured(found):
    rows = {(row.variant, row.target): row for row in breakdown.breakdown(found)}
    both = steps(rows["channels-50-static-int8", "cpu/onnxruntime"])
    assert both == {"transform": pytest.approx(3.31, rel=0.01), "precision": pytest.approx(4.51 / 3.31, rel=0.01)}
    assert set(steps(rows["static-int8", "cpu/torch"])) == {"precision"}


def test_without_the_pruned_model_both_steps_are_one_factor(found):
    kept = tuple(row for row in found.rows if row.variant != "channels-50")
    rows = breakdown.breakdown(dataclasses.replace(found, rows=kept))
    both = next(row for row in rows if (row.variant, row.target) == ("channels-50-static-int8", "cpu/torch"))
    assert steps(both) == {"both": pytest.approx(4.97, rel=0.01)}
