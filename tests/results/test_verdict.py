"""The verdict and the factors: only what the intervals and timings allow is said."""

import dataclasses
import html
import math
import re

import examples
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrinkkit.core.estimate import Estimate, product
from shrinkkit.core.measurement import IntegerCheck
from shrinkkit.core.recipe import Budget
from shrinkkit.display.tables import Warnings
from shrinkkit.results import results, verdict


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results.load(examples.write_run(tmp_path_factory.mktemp("run")))


def with_rows(found, **changes):
    """Return the results with every row but the baseline's changed."""
    made = [row if row.variant == "baseline" else dataclasses.replace(row, **changes) for row in found.rows]
    return dataclasses.replace(found, rows=tuple(made))


def test_the_fastest_variant_within_the_budget_wins(found):
    made = verdict.decide(found)
    assert (made.kind, made.row.variant, made.row.target) == (
        "within budget",
        "channels-50-static-int8",
        "cpu/onnxruntime",
    )
    for part in (
        "5.83",
        "4.51",
        "1.29",
        "13\N{MULTIPLICATION SIGN} smaller",
        "cpu/onnxruntime",
        "accuracy",
        "budget of 1 point",
    ):
        assert part in made.sentence


def test_failed_variants_are_mentioned_after_the_verdict(found):
    assert "1 of 7 variants failed: dynamic-int8" in verdict.decide(found).sentence


def test_a_budget_can_name_the_target(found):
    budget = Budget(target="cpu/torch")
    assert verdict.decide(dataclasses.replace(found, budget=budget)).row.target == "cpu/torch"


def test_the_smallest_is_chosen_by_bytes_and_not_by_speed(found):
    made = verdict.decide(dataclasses.replace(found, budget=Budget(want="smallest")))
    sizes = [r.size_bytes for r in found.rows if r.accuracy_verdict == "within budget" and not r.intermediate]
    assert made.row.size_bytes == min(sizes)


def test_a_change_that_straddles_the_budget_is_not_within_it(found):
    tight = dataclasses.replace(with_rows(found, accuracy_verdict="cannot tell"), budget=Budget(accuracy_drop=0.001))
    made = verdict.decide(tight)
    assert made.kind == "cannot tell"
    assert made.headline.startswith("No variant is surely within")
    assert re.search(r"2,000 test examples can show no drop below 0\.\d points; about [\d,]+ would be", made.headline)


def test_integer_kernels_that_saturate_are_named_in_the_verdict(found):
    record = found.measured["cpu/torch"]
    check = IntegerCheck(0.31, {"stem": 0.4, "head": 0.001}, ("stem",))
    measurements = [
        dataclasses.replace(m, integers=check) if m.variant == "static-int8" else m for m in record.measurements
    ]
    measured = found.measured | {"cpu/torch": dataclasses.replace(record, measurements=tuple(measurements))}
    text = verdict.decide(dataclasses.replace(found, measured=measured)).sentence
    assert "On cpu/torch, int8 accumulation saturates on this CPU in static-int8" in text
    assert "saturate" not in verdict.decide(found).sentence


def test_when_all_lose_too_much_the_closest_is_named(found):
    bad = with_rows(found, difference=Estimate(-0.05, -0.06, -0.04), accuracy_verdict="over budget")
    assert verdict.decide(bad).headline.startswith("No variant is within the budget of 1 point of accuracy. Closest:")


def test_a_noisy_timing_never_wins(found):
    made = verdict.decide(with_rows(found, timing="too noisy", timing_today="too noisy"))
    assert (made.kind, made.row) == ("none", None)
    assert "No conclusion" in made.headline


def test_variants_that_were_too_noisy_are_named(found):
    changed = [
        dataclasses.replace(row, timing="too noisy", timing_today="too noisy") if row.variant == "channels-50" else row
        for row in found.rows
    ]
    text = verdict.decide(dataclasses.replace(found, rows=tuple(changed))).sentence
    assert "too noisy" in text
    assert "channels-50 on cpu/torch, channels-50 on cpu/onnxruntime" in text


def test_slower_variants_leave_the_baseline(found):
    half = Estimate(0.5, 0.49, 0.51)
    made = verdict.decide(with_rows(found, speedup=half, speedup_today=half, timing="slower", timing_today="slower"))
    assert "keep the baseline" in made.headline
    assert "The unchanged model on cpu/onnxruntime beats all variants not over budget" in made.sentence


def test_nothing_measured_is_no_verdict(found):
    nothing = with_rows(found, state="not run", reason="it was interrupted", difference=None)
    made = verdict.decide(nothing)
    assert "no variant was measured" in made.headline
    assert "7 of 7 variants not measured" in made.sentence


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """A run that was also measured on another machine, on one of its targets."""
    return results.load(examples.write_two_machines(tmp_path_factory.mktemp("run"), targets=("cpu/torch",)))


def test_each_machine_has_a_verdict_of_its_own(away):
    made = verdict.decide(away)
    assert made.headline.startswith(f"On {examples.HERE}: channels-50-static-int8 on cpu/onnxruntime: ")
    assert f"On {examples.ELSEWHERE}: channels-50-static-int8 on cpu/torch: " in made.remarks[-1]
    assert made.row.target == "cpu/onnxruntime"


def test_a_faster_variant_on_another_machine_does_not_outdo_one_on_the_runs_own(away):
    huge = Estimate(90.0, 89.0, 91.0)
    changed = [
        dataclasses.replace(row, speedup=huge, speedup_today=huge)
        if row.variant == "static-int8" and row.target != "cpu/onnxruntime" and "@" in row.target
        else row
        for row in away.rows
    ]
    assert len([row for row in changed if row.speedup_today == huge]) == 1
    made = verdict.decide(dataclasses.replace(away, rows=tuple(changed)))
    assert made.row.target == "cpu/onnxruntime"
    assert "static-int8 on cpu/torch: " in made.remarks[-1]
    assert "90\N{MULTIPLICATION SIGN}" in made.remarks[-1]


def test_the_budgets_target_is_that_of_the_runs_own_machine(away):
    made = verdict.decide(dataclasses.replace(away, budget=Budget(target="cpu/torch")))
    assert made.row.target == "cpu/torch"


def test_the_budgets_target_is_that_of_another_machine_if_only_that_measured_it(away):
    kept = tuple(row for row in away.rows if row.target != "cpu/torch")
    targets = tuple(target for target in away.targets if target != "cpu/torch")
    moved = dataclasses.replace(away, rows=kept, targets=targets, budget=Budget(target="cpu/torch"))
    made = verdict.decide(moved)
    assert made.row.target == f"cpu/torch @ {examples.ELSEWHERE}"
    assert not any(remark.startswith("On ") for remark in made.remarks)


def test_a_failure_on_one_machine_is_not_said_of_the_others(away):
    changed = [
        dataclasses.replace(row, state="failed", reason="out of memory")
        if (row.variant, "@" in row.target) == ("static-int8", True)
        else row
        for row in away.rows
    ]
    text = verdict.decide(dataclasses.replace(away, rows=tuple(changed))).sentence
    assert f"static-int8 on cpu/torch @ {examples.ELSEWHERE} (out of memory)" in text


def compared(verdict, value=1.29):
    return {"verdict": verdict, "speedup": Estimate(value, value * 0.9, value * 1.1)}


def with_runtime(found, **changes):
    """Return the results where the comparison of the runtime with PyTorch on cpu/onnxruntime is changed."""
    record = found.measured["cpu/onnxruntime"]
    changed = dataclasses.replace(record, runtime=dataclasses.replace(record.runtime, **changes))
    return dataclasses.replace(found, measured=found.measured | {"cpu/onnxruntime": changed})


@pytest.mark.parametrize(
    ("verdict_", "words"),
    [
        ("faster", "1.3\N{MULTIPLICATION SIGN} from ONNX Runtime"),
        ("slower", "1.3\N{MULTIPLICATION SIGN} from ONNX Runtime"),
        ("same", "no difference from ONNX Runtime"),
        ("undecided", "inconclusive for ONNX Runtime"),
        ("too noisy", "machine too noisy for ONNX Runtime"),
    ],
)
def test_a_factor_without_a_conclusion_is_replaced_by_the_reason(found, verdict_, words):
    headline = verdict.decide(with_runtime(found, **compared(verdict_))).headline
    assert words in headline
    assert ("1.3" in headline) == (verdict_ in ("faster", "slower"))
    assert "4.51\N{MULTIPLICATION SIGN} from compression" in headline


def test_factors_are_left_out_where_the_speed_up_is_inconclusive(found):
    made = verdict.decide(with_rows(found, timing_today="undecided", speedup_today=Estimate(1.01, 0.99, 1.03)))
    assert "inconclusive, 1.01\N{MULTIPLICATION SIGN} the speed of PyTorch" in made.headline
    assert " from " not in made.headline


@given(st.floats(0.02, 60), st.floats(0.02, 60), st.floats(0.0005, 0.2), st.floats(0.0005, 0.2), st.booleans())
def test_printed_factors_multiply_to_the_printed_speed_up(found, compression, runtime, wide, narrow, on_torch):
    target = "cpu/torch" if on_torch else "cpu/onnxruntime"
    parts = [Estimate(v, v * (1 - w), v * (1 + w)) for v, w in ((compression, wide), (runtime, narrow))]
    total = product(*parts)
    record = found.measured[target]
    timed = dataclasses.replace(record.runtime, speedup=parts[1], verdict="faster")
    measured = found.measured | {target: dataclasses.replace(record, runtime=timed)}
    row = dataclasses.replace(
        found.row("channels-50", target), speedup=parts[0], timing="faster", speedup_today=total, timing_today="faster"
    )
    printed = [
        float(re.match(r"[\d.,]+", text)[0].replace(",", ""))
        for text in verdict.factors(row, dataclasses.replace(found, measured=measured))
    ]
    # Each is rounded to three digits or to its own interval.
    slack = math.prod(max(1.005, p.high / p.value, p.value / p.low) for p in parts)
    assert total.low / slack <= math.prod(printed) <= total.high * slack


def test_runners_up_are_the_next_best_within_the_budget(found):
    made = verdict.decide(found)
    speeds = [row.speedup_today.value for row in (made.row, *made.runners_up)]
    assert len(made.runners_up) == 3
    assert speeds == sorted(speeds, reverse=True)
    assert {row.accuracy_verdict for row in made.runners_up} == {"within budget"}
    assert verdict.decide(with_rows(found, accuracy_verdict="over budget")).runners_up == ()


def test_warnings_are_grouped_by_cause_and_keep_every_sentence(found):
    changed = [
        dataclasses.replace(row, timing="too noisy", timing_today="too noisy") if row.variant == "channels-50" else row
        for row in found.rows
    ]
    slower = with_runtime(dataclasses.replace(found, rows=tuple(changed)), **compared("slower", 0.8))
    made = verdict.decide(slower)
    warnings = Warnings(made.warnings)
    assert warnings.caption == "5 warnings"
    assert [cause.caption for cause in warnings.causes] == [
        "1 runtime slower than PyTorch",
        "1 change of the machine's speed",
        "2 timings too noisy",
        "1 variant failed",
    ]
    texts = [re.sub(r"<[^>]+>", "", warnings.html()), warnings.markdown(), repr(warnings)]
    texts = [html.unescape(text).replace("\N{NO-BREAK SPACE}", " ") for text in texts]
    assert all(each in text for text in texts for cause in made.warnings for each in cause.sentences)


def test_a_run_without_a_variant_within_the_budget_says_what_to_do(found):
    over = verdict.decide(with_rows(found, difference=Estimate(-0.05, -0.06, -0.04), accuracy_verdict="over budget"))
    assert "prune less" in over.headline
    half = Estimate(0.5, 0.49, 0.51)
    slower = verdict.decide(with_rows(found, speedup=half, speedup_today=half, timing="slower", timing_today="slower"))
    assert "Closest: " in slower.headline
    assert "0.50\N{MULTIPLICATION SIGN} the speed of PyTorch" in slower.headline


@pytest.mark.parametrize("forgets", ["", "static-int8"])
def test_a_class_that_is_lost_on_corrupted_inputs_is_a_warning_unless_the_mean_is_over_the_budget_too(found, forgets):
    record = examples.robustness_record(["baseline", "static-int8"], forgets=forgets)
    for drop, is_told in ((0.3, bool(forgets)), (0.05, False)):
        budget = Budget(robustness_drop=drop)
        texts = verdict.decide(dataclasses.replace(found, robust={"cpu/torch": record}, budget=budget)).warnings
        told = "static-int8 on cpu/torch surely loses more than the budget on the class hare" in repr(texts)
        assert told == is_told
