"""What recipes and studies may say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrinkkit.core import studies
from shrinkkit.core.recipe import Budget, Recipe, Study, conflicts
from shrinkkit.core.stages import PRECISIONS, TRANSFORMS, FineTune, PruneChannels, Section, Stage, Transform


def test_every_setting_has_a_rule_that_an_error_can_quote():
    sections = [Recipe, Study, Budget, *PRECISIONS.values(), *(one.section for one in TRANSFORMS.values())]
    fields = {(s.__name__, n): f for s in sections for n, f in s.model_fields.items() if n != "where"}
    assert [name for name, f in fields.items() if not f.description and "Literal" not in str(f.annotation)] == []


@settings(deadline=None, max_examples=40)
@given(ratio=st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.booleans())
def test_only_a_ratio_in_the_unit_interval_is_taken(ratio):
    stages = [{"prune-channels": {"ratio": ratio}}]
    if not isinstance(ratio, bool) and 0 <= ratio < 1:
        assert Recipe(name="x", stages=stages).stages[0].settings.ratio == ratio
    else:
        with pytest.raises(ValueError, match="ratio"):
            Recipe(name="x", stages=stages)


def test_lists_from_python_are_as_good_as_tuples():
    recipe = Recipe(name="x", precision={"float16": {"skip": ["head"]}})
    assert recipe.precision.settings.skip == ("head",)


def test_stages_are_given_by_name_with_settings_or_as_objects():
    named = Recipe(name="x", stages=[{"prune-channels": {"ratio": 0.5}}, "fine-tune"])
    typed = Recipe(name="x", stages=[PruneChannels(ratio=0.5), FineTune()])
    assert named == typed
    assert [stage.name for stage in typed.stages] == ["prune-channels", "fine-tune"]
    assert Recipe.model_validate(typed.to_dict()) == typed


def test_a_transform_from_outside_is_passed_as_an_object():
    class Rank(Section):
        rank: int = 2

    outside = Transform("factorize", Rank, lambda *_: None)
    recipe = Recipe(name="x", stages=[Stage("factorize", Rank(rank=3), outside)])
    assert recipe.settings()["stages"] == [{"factorize": {"rank": 3}}]
    with pytest.raises(ValueError, match="choice_form"):
        Recipe(name="x", stages=[Rank()])


def test_a_recipe_cannot_be_changed():
    recipe = studies.read_recipe("float16")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"


def test_conflicts_yields_nothing_for_what_goes_together():
    recipe = studies.read_recipe("float16")
    assert list(conflicts([(("recipes", 0), recipe)], ["cpu/torch"], "cpu/torch", searches=False)) == []
