"""The verdict and the factors: only what the intervals and timings allow is said."""

import dataclasses

import examples
import pytest

from shrinkkit import conclusions, rows
from shrinkkit.recipes import Budget
from shrinkkit.records import Estimate, IntegerCheck


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return rows.load(examples.write_run(tmp_path_factory.mktemp("run")))


def with_rows(found, **changes):
    """Return the results with every row but the baseline's changed."""
    made = [row if row.variant == "baseline" else dataclasses.replace(row, **changes) for row in found.rows]
    return dataclasses.replace(found, rows=tuple(made))


def test_the_fastest_variant_within_the_budget_wins(found):
    made = conclusions.verdict(found)
    assert (made.kind, made.row.variant, made.row.target) == (
        "within budget",
        "channels-50-static-int8",
        "cpu/onnxruntime",
    )
    for part in ("13.3", "5.83", "cpu/onnxruntime", "accuracy", "within the budget of 1 point"):
        assert part in made.sentence


def test_failed_variants_are_mentioned_after_the_verdict(found):
    assert "1 of 7 variants failed: dynamic-int8" in conclusions.verdict(found).sentence


def test_a_budget_can_name_the_target(found):
    budget = Budget(target="cpu/torch")
    assert conclusions.verdict(dataclasses.replace(found, budget=budget)).row.target == "cpu/torch"


def test_the_smallest_is_chosen_by_bytes_and_not_by_speed(found):
    made = conclusions.verdict(dataclasses.replace(found, budget=Budget(want="smallest")))
    sizes = [r.size_bytes for r in found.rows if r.accuracy_verdict == "within budget" and not r.intermediate]
    assert made.row.size_bytes == min(sizes)


def test_a_change_that_straddles_the_budget_is_not_within_it(found):
    wide = with_rows(found, difference=Estimate(-0.002, -0.02, 0.01), accuracy_verdict="cannot tell")
    made = conclusions.verdict(wide)
    assert made.kind == "cannot tell"
    assert made.headline.startswith("No variant is surely within the budget")
    # 0.018 must shrink to 0.008, which takes (18 / 8) squared times the 540 examples.
    assert "too small for it. About 2,800 examples would tell; it has 540." in made.headline


def test_integer_kernels_that_saturate_are_named_in_the_verdict(found):
    record = found.measured["cpu/torch"]
    check = IntegerCheck(0.31, {"stem": 0.4, "head": 0.001}, ("stem",))
    measurements = [
        dataclasses.replace(m, integers=check) if m.variant == "static-int8" else m for m in record.measurements
    ]
    measured = found.measured | {"cpu/torch": dataclasses.replace(record, measurements=tuple(measurements))}
    text = conclusions.verdict(dataclasses.replace(found, measured=measured)).sentence
    assert "Integer kernels of cpu/torch saturate on this processor in static-int8 (stem)" in text
    assert "saturate" not in conclusions.verdict(found).sentence


def test_when_all_lose_too_much_the_closest_is_named(found):
    bad = with_rows(found, difference=Estimate(-0.05, -0.06, -0.04), accuracy_verdict="over budget")
    assert conclusions.verdict(bad).headline.startswith("No variant is within the budget of 1 point. The closest:")


def test_a_noisy_timing_never_wins(found):
    made = conclusions.verdict(with_rows(found, timing="too noisy", timing_torch="too noisy"))
    assert (made.kind, made.row) == ("none", None)
    assert "quieter machine" in made.headline


def test_variants_that_were_too_noisy_are_named(found):
    changed = [
        dataclasses.replace(row, timing="too noisy", timing_torch="too noisy") if row.variant == "channels-50" else row
        for row in found.rows
    ]
    text = conclusions.verdict(dataclasses.replace(found, rows=tuple(changed))).sentence
    assert "Passed over" in text
    assert "channels-50 on cpu/torch, channels-50 on cpu/onnxruntime" in text


def test_slower_variants_leave_the_baseline(found):
    half = Estimate(0.5, 0.49, 0.51)
    made = conclusions.verdict(
        with_rows(found, speedup=half, speedup_torch=half, timing="slower", timing_torch="slower")
    )
    assert "keep the baseline" in made.headline
    assert "The unchanged model on cpu/onnxruntime is faster still" in made.sentence


def test_nothing_measured_is_no_verdict(found):
    nothing = with_rows(found, state="not run", reason="it was interrupted", difference=None)
    made = conclusions.verdict(nothing)
    assert "no variant was measured" in made.headline
    assert "7 of 7 variants were not measured" in made.sentence


def test_factors_multiply_to_the_speed_against_torch(found):
    for one in conclusions.factors(found):
        product = 1.0
        for part in (one.runtime, one.pruning, one.quantization, one.compression):
            product *= part.value if part else 1.0
        assert product == pytest.approx(one.total.value)
        assert one.total.low <= one.total.value <= one.total.high


def test_factors_come_from_the_pruned_model_that_was_measured(found):
    made = {(one.variant, one.target): one for one in conclusions.factors(found)}
    both = made["channels-50-static-int8", "cpu/onnxruntime"]
    assert both.pruning.value == pytest.approx(3.31)
    assert both.quantization.value == pytest.approx(4.51 / 3.31)
    assert made["static-int8", "cpu/torch"].pruning is None


def test_without_the_pruned_model_the_two_are_not_told_apart(found):
    kept = tuple(row for row in found.rows if row.variant != "channels-50")
    made = conclusions.factors(dataclasses.replace(found, rows=kept))
    both = next(one for one in made if (one.variant, one.target) == ("channels-50-static-int8", "cpu/torch"))
    assert (both.pruning, both.quantization) == (None, None)
    assert both.compression.value == pytest.approx(4.97)
