"""Which steps a study has."""

import pytest

from shrinkkit.core import studies
from shrinkkit.errors import InvalidInput
from shrinkkit.pipeline import plan

PRUNE, NARROW = {"prune-channels": {"ratio": 0.5}}, {"prune-channels": {"ratio": 0.7}}
ZEROS, TRAIN = {"prune-weights": {"ratio": 0.5}}, {"fine-tune": {"epochs": 1}}


def planned(**recipes):
    """Return the steps of a study by name; each recipe is a list of stages and a precision."""
    listed = [{"name": name, "stages": tuple(stages), "precision": p} for name, (stages, p) in recipes.items()]
    study = studies.study("digits-cnn", recipes=listed, targets=["cpu/torch"])
    return {step.name: step for step in plan.plan(study, task="digits-cnn", threads=1)}


def chain(steps, name):
    """Return the sources of a step, from the last to the baseline."""
    found, by_variant = [], {step.parameters.get("variant"): step for step in steps.values()}
    while name != "baseline":
        name = by_variant[name].parameters["source"]
        found.append(name)
    return found


def test_each_stage_and_the_precision_is_a_step_of_its_family():
    steps = planned(x=([PRUNE, TRAIN], "static-int8"))
    assert list(steps) == [
        *("1-baseline", "2-prune-x.stage-1", "2-train-x.stage-2", "3-quantize-x", "4-benchmark-cpu-torch", "5-report")
    ]
    assert chain(steps, "x") == ["x.stage-2", "x.stage-1", "baseline"]


def test_a_training_stage_is_measured_together_with_the_stage_before_it():
    steps = planned(x=([PRUNE, TRAIN, ZEROS, TRAIN], "static-int8"))
    assert steps["4-benchmark-cpu-torch"].parameters["variants"] == ["baseline", "x.stage-2", "x.stage-4", "x"]
    kept = {name: step.leaves for name, step in steps.items() if not step.parameters.get("runtimes", True)}
    assert kept == {
        "2-prune-x.stage-1": "checkpoints/x.stage-1/structure.json",
        "2-prune-x.stage-3": "checkpoints/x.stage-3/structure.json",
    }


def test_common_beginnings_are_made_once_and_named_after_the_recipe_that_ends_there():
    steps = planned(int8=([PRUNE, TRAIN], "static-int8"), half=([PRUNE, TRAIN], "float32"), bare=([PRUNE], "float32"))
    assert [name for name in steps if name[0] in "23"] == ["2-prune-bare", "2-train-half", "3-quantize-int8"]
    assert steps["2-prune-bare"].parameters["runtimes"] == ["torch"]
    assert chain(steps, "int8") == ["half", "bare", "baseline"]


def test_other_settings_are_another_beginning():
    steps = planned(a=([PRUNE, TRAIN], "float32"), b=([NARROW, TRAIN], "float32"))
    assert [name for name in steps if name[0] == "2"] == [
        *("2-prune-a.stage-1", "2-train-a", "2-prune-b.stage-1", "2-train-b")
    ]


def test_a_step_reads_the_record_of_its_source_and_a_benchmark_those_of_its_variants():
    steps = planned(x=([PRUNE, TRAIN], "static-int8"))
    assert steps["2-train-x.stage-2"].reads == (steps["2-prune-x.stage-1"].leaves,)
    assert steps["3-quantize-x"].reads == ("variants/x.stage-2/variant.json",)
    assert len(steps["4-benchmark-cpu-torch"].reads) == 3


@pytest.mark.parametrize(
    ("mode", "names", "times"),
    [
        ("compress", ["4-benchmark-cpu-torch"], True),
        ("robust", ["4-benchmark-cpu-torch", "4-robustness-cpu-torch"], False),
        ("all", ["4-benchmark-cpu-torch", "4-robustness-cpu-torch"], True),
    ],
)
def test_the_mode_says_what_is_measured_and_every_mode_ends_in_the_report(mode, names, times):
    override = studies.Override(("mode",), mode, f"--mode {mode}")
    study = studies.study("digits-cnn", recipes=["static-int8"], targets=["cpu/torch"], overrides=[override])
    steps = {step.name: step for step in plan.plan(study, task="digits-cnn", threads=1)}
    assert list(steps) == ["1-baseline", "3-quantize-static-int8", *names, "5-report"]
    assert steps["4-benchmark-cpu-torch"].parameters["times"] is times


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("mode", "robst", "Did you mean `robust`?"),
        ("budget.robustness_drop", 0.03, "Set `mode` to `robust` or `all`"),
        ("budget.robustness_drop", 3, "`budget.robustness_drop` must be a share in [0, 1]"),
    ],
)
def test_a_mode_that_does_not_exist_or_does_not_fit_the_budget_is_refused(setting, value, said):
    override = studies.Override.parse(f"{setting}={value}")
    with pytest.raises(InvalidInput) as error:
        studies.study("digits-cnn", recipes=["static-int8"], targets=["cpu/torch"], overrides=[override])
    assert said in str(error.value)
