"""Browsing results: outputs are complete without a kernel, and a saved recipe can be run again."""

import dataclasses
import re

import examples
import pytest

from shrinkkit.core import studies
from shrinkkit.errors import InvalidInput
from shrinkkit.results import results
from shrinkkit.widgets import browse


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results.load(examples.write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def best(found):
    return results.pareto_front(found.rows)


def test_every_point_of_the_front_is_drawn_to_be_chosen_and_named(found, best):
    drawn = browse.drawing(found)
    assert len(best) >= 2
    assert all(f'-point-{i}"' in drawn.svg for i in range(len(best)))
    assert f'-point-{len(best)}"' not in drawn.svg
    assert all(row.variant in drawn.alt for row in best)


def test_the_chosen_variant_shows_its_figures_and_its_recipe(found, best):
    text = repr(browse._chosen(found, best, 0))
    assert f"{best[0].variant} (chosen)" in text
    assert "static-int8" in text.partition("Recipe of")[2]
    assert all(row.variant in text for row in best)


def test_a_saved_recipe_reads_as_the_one_that_was_run(found, best, tmp_path):
    said = browse.save(found, best[0], tmp_path)
    path = tmp_path / f"{best[0].variant}.yaml"
    assert str(path) in said.text
    again = studies.read_recipe(path)
    assert again.name == best[0].variant
    assert again.settings() == found.recipe(best[0].variant)


def test_nothing_is_overwritten(found, best, tmp_path):
    browse.save(found, best[0], tmp_path)
    with pytest.raises(InvalidInput, match=f"{best[0].variant}.yaml"):
        browse.save(found, best[0], tmp_path)


def test_the_original_model_has_no_recipe_to_save(found, tmp_path):
    with pytest.raises(InvalidInput, match="no recipe"):
        browse.save(found, found.row("baseline", "cpu/torch"), tmp_path)


def test_a_run_without_conclusive_timings_says_so(found, capsys):
    browse.front(noisy(found))
    text = capsys.readouterr().out
    assert "No conclusive timing" in text
    assert "Results so far" in text


def noisy(found):
    """Return results of which no timing is conclusive."""
    rows = (dataclasses.replace(row, timing="too noisy", timing_today="too noisy") for row in found.rows)
    return dataclasses.replace(found, rows=tuple(rows))


def test_noise_leaves_size_macs_and_score_and_what_is_known_of_the_speed(found):
    table = browse.so_far(noisy(found))
    titles = [column.title for column in table.columns]
    row = next(row for row in table.rows if (row[0].text, row[3].text) == ("channels-50", "cpu/torch"))
    cells = {title: cell.plain() for title, cell in zip(titles, row, strict=True)}
    assert cells["MACs"] == "6.30 M"
    assert re.search(r"^\d+ kB", cells["file size"])
    assert re.search(r"pts", cells[titles[-1]])
    assert re.search(r"machine too noisy \(2\.", cells["vs PyTorch"])


def test_results_so_far_hold_variants_that_are_not_measured(found):
    table = browse.so_far(dataclasses.replace(found, rows=()))
    assert len(table.rows) == len(found.variants)
    assert all(row[3].text == "not measured" for row in table.rows)


def test_regressions_are_shown_one_by_one(found, capsys):
    accuracies = {m.variant: m.accuracy for m in found.measured["cpu/torch"].measurements if m.accuracy}
    browse.lost(accuracies)
    assert "prediction of channels-50" in capsys.readouterr().out


def test_a_number_beyond_the_last_regression_says_how_many_there_are(found):
    accuracy = next(m.accuracy for m in found.measured["cpu/torch"].measurements if m.variant == "channels-50")
    assert str(len(accuracy.worst_regressions)) in repr(browse._example(accuracy.worst_regressions, "channels-50", 9))
    assert "eight" in repr(browse._example(accuracy.worst_regressions, "channels-50", 1))


def test_no_regressions_are_said_to_be_none(capsys):
    browse.lost({})
    assert "No regressions" in capsys.readouterr().out
