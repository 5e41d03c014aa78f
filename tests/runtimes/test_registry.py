"""Which targets there are, and what they refuse."""

import pytest

from shrinkkit.core import machines, studies
from shrinkkit.core.recipe import BUILT_IN
from shrinkkit.core.stages import METHODS
from shrinkkit.core.target import Target
from shrinkkit.errors import InvalidInput
from shrinkkit.runtimes import registry


def study(recipes, targets):
    return studies.study("digits-cnn", recipes=recipes, targets=targets)


def test_only_what_no_runtime_can_run_is_refused():
    cpu = {(p, t) for p in METHODS for t in registry.targets() if registry.refusal(p, Target.parse(t))}
    elsewhere = ("cuda/torch", "cuda/inductor", "cuda/onnxruntime", "mps/torch")
    int8 = {(name, target) for name in ("dynamic-int8", "static-int8") for target in elsewhere}
    half = {(name, f"{device}/onnxruntime") for name in ("float16", "bfloat16") for device in ("cpu", "cuda")}
    assert cpu == int8 | half
    assert {registry.refusal("float32", Target.parse(target)) for target in registry.targets()} == {""}


def test_a_study_names_targets_that_exist():
    registry.check_targets(study(["float16"], ["cpu/onnxruntime", "cpu/torch"]))
    with pytest.raises(InvalidInput, match=r"`targets.1` must be .*'cpu/torhc'.*Did you mean `cpu/torch`"):
        registry.check_targets(study(["float16"], ["cpu/torch", "cpu/torhc"]))


def test_a_recipe_that_no_target_of_a_study_can_run_is_refused_with_what_can():
    with pytest.raises(InvalidInput, match=r"`float16`.*cpu/onnxruntime: .*Possible there: dynamic-int8, .*mps/torch"):
        registry.check_targets(study(["float16", "static-int8"], ["cpu/onnxruntime"]))


def test_recipes_that_this_processor_has_no_arithmetic_for_are_left_out_aloud_unless_an_accelerator_runs_them():
    slow = {name for name in ("float16", "bfloat16") if machines.lacks(name)}
    recipes, notes = registry.default_recipes(["cpu/torch", "cpu/openvino"])
    assert set(BUILT_IN) - set(recipes) == slow
    assert {note.partition(":")[0] for note in notes} == slow
    assert [note for note in notes if "--recipe" not in note] == []
    assert registry.default_recipes(["cpu/torch", "cuda/torch"]) == (BUILT_IN, ())
