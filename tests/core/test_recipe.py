"""What recipes and studies may say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrinkkit.core import studies
from shrinkkit.core.recipe import BUILT_IN, RULES, SECTIONS, Recipe, Study, conflicts, impossible
from shrinkkit.core.target import TARGETS
from shrinkkit.errors import InvalidInput


def test_every_setting_has_a_rule_that_an_error_can_quote():
    literals = {"prune.criterion", "prune.scope", "budget.want", "budget.target"}
    parents = {"budget": "budget", "channels": "prune", "weights": "prune"}
    nested = {f"{parents.get(s, 'quantize')}.{key}" for s, model in SECTIONS.items() for key in model.model_fields}
    known = nested | {*Recipe.model_fields, *Study.model_fields}
    assert known - literals - {"where"} <= {*RULES}


def test_what_is_impossible_is_said_and_what_is_possible_is_not():
    refused = {
        (name, target) for name in BUILT_IN for target in TARGETS if impossible(studies.read_recipe(name), target)
    }
    elsewhere = ("cuda/torch", "cuda/inductor", "cuda/onnxruntime", "mps/torch")
    int8 = {(n, t) for n in ("dynamic-int8", "static-int8", "channels-50-static-int8") for t in elsewhere}
    assert refused == int8 | {
        (name, target) for name in ("float16", "bfloat16") for target in ("cpu/onnxruntime", "cuda/onnxruntime")
    }
    with pytest.raises(InvalidInput, match=r"Did you mean `cpu/torch`\?"):
        impossible(studies.read_recipe("float16"), "cpu/torhc")


@settings(deadline=None, max_examples=40)
@given(ratio=st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.booleans())
def test_only_a_ratio_in_the_unit_interval_is_taken(ratio):
    section = {"method": "channels", "ratio": ratio}
    if not isinstance(ratio, bool) and 0 <= ratio < 1:
        assert Recipe(name="x", prune=section).prune.ratio == ratio
    else:
        with pytest.raises(ValueError, match="ratio"):
            Recipe(name="x", prune=section)


def test_lists_from_python_are_as_good_as_tuples():
    recipe = Recipe(name="x", quantize={"method": "float16", "skip": ["head"]})
    assert recipe.quantize.skip == ("head",)


def test_a_recipe_cannot_be_changed():
    recipe = studies.read_recipe("float16")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"


def test_a_study_built_in_python_is_held_to_the_same_rules():
    recipe = studies.read_recipe("float16")
    with pytest.raises(ValueError, match="can run on no target"):
        Study(name="x", task="digits-cnn", recipes=[recipe], targets=["cpu/onnxruntime"])


def test_conflicts_yields_nothing_for_what_goes_together():
    recipe = studies.read_recipe("float16")
    assert list(conflicts([(("recipes", 0), recipe)], ["cpu/torch"], "cpu/torch")) == []
