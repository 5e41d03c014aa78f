"""The chapter on robustness, from records of known scores."""

from dataclasses import replace

import examples
import numpy as np
import pytest
from examples import ENVIRONMENT

from shrinkkit.core import robustness as core
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Scores
from shrinkkit.core.robustness import CLEAN, Calibration, Condition, NumericCheck, Robustness, RobustnessRecord
from shrinkkit.report import robustness

EMPTY = Estimate(0.0, 0.0, 0.0)


def scores(share, metric="accuracy", count=200):
    values = tuple(float(i < share * count) for i in range(count))
    return Scores(metric=metric, scores=values, mean=EMPTY, difference=None, bounds=(0.0, 1.0))


def one(name, shares):
    """Return the robustness of a variant with a share of right answers by condition and severity."""
    conditions = tuple(
        Condition(what, severity, scores(share), what == "FGSM", "along its own gradients" if what == "FGSM" else "")
        for (what, severity), share in shares.items()
    )
    checks = (NumericCheck("other places in the batch", 0.0, 0.0), NumericCheck("a NaN", finite=name != "baseline"))
    figure = replace(scores(0.1, "ECE"), higher_is_better=False)
    return Robustness(
        name, "ab", "", conditions, Calibration((figure,), ((0.9, 0.8, 50), (0.5, 0, 3)), 1.4, 0.01), checks
    )


BASE = {(CLEAN, 0): 0.95, ("blur", 1): 0.9, ("blur", 5): 0.7, ("noise", 1): 0.9, ("noise", 5): 0.8, ("FGSM", 3): 0.5}


@pytest.fixture(scope="module")
def record():
    worse = BASE | {("noise", 1): 0.6, ("noise", 5): 0.3}
    measured = (one("baseline", BASE), one("same", BASE), one("noisy", worse), Robustness("lost", error="Its file is."))
    return core.derive(RobustnessRecord("t", "cpu/torch", "m", ENVIRONMENT, measured, 200, ("A note.",)))


def test_the_findings_name_the_damaged_variant_and_what_it_is_damaged_by(record):
    text = repr(robustness.findings(record))
    assert "noisy: surely worse on noise;" in text
    assert "same: no difference that this test set could show" in text
    assert "lost: Its file is." in text
    assert "A note." in text


def test_the_table_marks_what_is_surely_different_and_nothing_else(record):
    table = robustness.damage(record)
    marked = {(row[0].text, cell.text) for row in table.rows for cell in row if cell.tone == "bad"}
    assert marked == {("noise", "\N{MINUS SIGN}40.0")}
    assert "along its own gradients" in table.note


def test_charts_say_in_words_what_they_show(record):
    picture = robustness.by_severity(record)
    assert "noise: baseline 0.8, same 0.8, noisy 0.3" in picture.alt
    calibration, table = robustness.calibration(record).parts
    assert "80% at 90%" in calibration.alt
    assert "1.40" in repr(table)


def test_arithmetic_that_lets_a_nan_through_is_seen(record):
    first, *others = robustness.arithmetic(record).rows
    assert "not finite" in [cell.text for cell in first]
    assert all("not finite" not in [cell.text for cell in row] for row in others)


def test_a_record_without_a_baseline_says_why_nothing_can_be_compared(record):
    alone = replace(record, variants=(Robustness("baseline", error="It broke."), *record.variants[1:]))
    assert "It broke." in repr(robustness.of_record(alone))


def test_averages_over_severities_are_paired_by_example(record):
    baseline, noisy = record.by_name()["baseline"], record.by_name()["noisy"]
    assert noisy.sample("noise") == tuple(np.mean([c.scores.scores for c in noisy.conditions if c.name == "noise"], 0))
    assert noisy.scores("noise", baseline=baseline).difference.value == pytest.approx(-0.4)


def test_a_variant_without_finite_outputs_at_a_severity_is_paired_at_the_others_and_over_any_budget(record):
    measured = {one.variant: one for one in record.variants}
    kept = tuple(c for c in measured["same"].conditions if (c.name, c.severity) != ("noise", 5))
    partial = core.derive(replace(record, variants=(measured["baseline"], replace(measured["same"], conditions=kept))))
    own, baseline = partial.by_name()["same"], partial.by_name()["baseline"]
    assert own.scores("noise", baseline=baseline).difference.value == 0
    assert core.damaged(partial) == {"same": {}}
    assert core.verdicts(partial, 0.5) == {"same": "over budget"}
    assert core.verdicts(record, 0.5)["same"] == "within budget"


@pytest.mark.parametrize(("note", "signs"), [(core.OWN, {"FGSM": 1}), (core.TRANSFERRED, {})])
def test_no_variant_is_called_better_under_an_attack_that_was_transferred(record, note, signs):
    stronger = one("stronger", BASE | {("FGSM", 3): 0.95})
    noted = tuple(replace(c, note=note if c.is_attack else "") for c in stronger.conditions)
    tried = replace(record, variants=(one("baseline", BASE), replace(stronger, conditions=noted)))
    assert core.damaged(core.derive(tried)) == {"stronger": signs}


def classified(lost):
    """Return a record of four classes of 50 examples, in which the one variant loses answers of the last class."""
    classes = tuple(f"class {i % 4}" for i in range(200))
    kept = [sum(of == "class 3" for of in classes[:i]) >= lost for i in range(200)]
    scored = replace(
        scores(1.0), scores=tuple(float(of != "class 3" or k) for of, k in zip(classes, kept, strict=True))
    )
    both = (
        Robustness(name, "ab", "", (Condition(CLEAN, 0, scores(1.0)), Condition("blur", 3, one)))
        for name, one in {"baseline": scores(1.0), "forgetful": scored}.items()
    )
    return core.derive(RobustnessRecord("t", "cpu/torch", "m", ENVIRONMENT, tuple(both), 200, classes=classes))


@pytest.mark.parametrize(("lost", "named"), [(0, {}), (3, {}), (20, {"forgetful": ["class 3"]})])
def test_a_class_that_surely_loses_more_than_the_budget_is_named_and_marked(lost, named):
    record = classified(lost)
    assert core.damaged_classes(record, 0.05) == named
    (table,) = robustness.by_class(record, 0.05)
    assert [row[0].text for row in table.rows] == ["class 0", "class 1", "class 2", "class 3"]
    marked = [row[0].text for row in table.rows if row[-1].tone == "bad"]
    assert marked == named.get("forgetful", [])


def test_a_record_without_classes_has_no_table_of_them(record):
    assert robustness.by_class(record) == ()


def test_of_forty_variants_charts_name_those_that_lose_most_and_tables_list_all():
    names = ["baseline", *(f"variant-{i}" for i in range(1, 41))]
    record = examples.robustness_record(names, count=60)
    picture = robustness.by_severity(record)
    told = [name for name in names if f" {name} " in picture.alt]
    assert told == ["baseline", *names[-robustness.MOST_NAMED :]]
    assert f"{40 - robustness.MOST_NAMED} other variants" in repr(picture.svg)
    findings = repr(robustness.findings(record))
    assert "variant-40: " in findings
    assert "variant-1: " not in findings
    assert "32 others lose less" in findings
    for table in (robustness.damage(record), *robustness.by_class(record)):
        first = [row[0].text for row in table.rows]
        assert [name for name in first if name.startswith("variant-")] == names[1:]
    assert len(robustness.damage(examples.robustness_record(names[:4], count=60)).rows) == 12
