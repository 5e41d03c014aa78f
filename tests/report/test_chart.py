"""The data of the interactive chart: its recommendation at each budget is the verdict's."""

import dataclasses
import json

import examples
import pytest

from shrinkkit.report import figures
from shrinkkit.results import results
from shrinkkit.results.verdict import decide


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return results.load(examples.write_run(tmp_path_factory.mktemp("run")))


def with_budget(loaded, **changes):
    return dataclasses.replace(loaded, budget=loaded.budget.model_copy(update=changes))


def chart(loaded):
    return json.loads(figures.tradeoff(loaded).data)


def recommended(data, drop, target=0):
    place = data["recommended"][target][data["drops"].index(drop)]
    return None if place is None else (data["points"][place]["name"], data["points"][place]["target"])


@pytest.mark.parametrize("want", ["fastest", "smallest"])
def test_the_study_s_budget_gives_the_verdict_s_recommendation(loaded, want):
    wanted = with_budget(loaded, want=want)
    data, best = chart(wanted), decide(wanted).row
    name, target = recommended(data, 100 * wanted.budget.accuracy_drop)
    assert (name, data["targets"][target]) == (best.variant, best.target)
    assert data["start"] == data["drops"].index(1)


def test_each_target_has_a_recommendation(loaded):
    assert recommended(chart(loaded), 1, target=1) == ("channels-50-static-int8", 0)


def test_a_larger_budget_never_excludes_a_variant(loaded):
    states = [point["states"] for point in chart(loaded)["points"] if point["states"]]
    assert len(states) == 11
    assert [each.lstrip("o").lstrip("c").lstrip("w") for each in states] == [""] * len(states)
    assert {each[-1] for each in states} == {"w"}


def test_the_verdicts_at_the_study_s_budget_are_those_of_the_table(loaded):
    data = chart(loaded)
    states = {
        (p["name"], data["targets"][p["target"]]): p["states"][data["start"]] for p in data["points"] if p["states"]
    }
    verdicts = {(row.variant, row.target): row.accuracy_verdict[:1] for row in loaded.rows if row.difference}
    assert states == {key: verdicts[key] for key in states}


def test_a_budget_of_nothing_has_larger_ones_to_choose(loaded):
    data = chart(with_budget(loaded, accuracy_drop=0.0))
    assert (data["start"], data["drops"][0]) == (0, 0)
    assert len(data["drops"]) > 10
