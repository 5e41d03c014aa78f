"""The summary card: figures of the verdict, a link to the very file, and code that loads it."""

import dataclasses
import html
import re
from urllib.parse import unquote

import examples
import pytest

from shrinkkit.core import store
from shrinkkit.core.estimate import Estimate
from shrinkkit.display.tables import Download, Figures, Table
from shrinkkit.report import summary
from shrinkkit.results import cards, results

BEST = "channels-50-static-int8"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = examples.write_run(tmp_path_factory.mktemp("run"))
    cards.write(folder)
    return folder


@pytest.fixture(scope="module")
def found(run):
    return results.load(run)


def part(card, kind):
    return next((each for each in card.parts if isinstance(each, kind)), None)


def test_four_figures_are_those_of_the_verdict(found, run):
    figures = [cell.plain() for _, cell in part(summary.card(found, run), Figures).cells]
    assert figures == [
        "5.83\N{MULTIPLICATION SIGN} (4.51\N{MULTIPLICATION SIGN} from compression, "
        "1.29\N{MULTIPLICATION SIGN} from ONNX Runtime)",
        "13\N{MULTIPLICATION SIGN} smaller (1.09 MB \N{RIGHTWARDS ARROW} 81.5 kB)",
        "\N{MINUS SIGN}0.1 pts (95 % CI \N{MINUS SIGN}0.3 to 0.1)",
        "within budget",
    ]


def test_links_lead_to_files_of_the_run_folder_and_the_hash_is_that_of_the_file(found, run):
    page = summary.card(found, run).html()
    model, readme = (run / unquote(address) for address in re.findall(r'href="(variants/[^"]+)"', page))
    assert (model.name, readme.name) == ("model.onnx", "README.md")
    assert model.parent == readme.parent == run / "variants" / BEST
    assert set(re.findall(r"\b[0-9a-f]{64}\b", page)) == {store.sha256(model)}
    assert readme.is_file()


def test_the_code_is_that_of_the_readme(found, run):
    code = part(summary.card(found, run), Download).code
    assert "onnxruntime.InferenceSession" in code
    assert code in (run / "variants" / BEST / "README.md").read_text()


def test_buttons_are_hidden_without_a_script(found, run):
    buttons = re.findall("<button[^>]*>", summary.card(found, run).html())
    assert len(buttons) == 2
    assert all(" hidden" in button for button in buttons)


def test_the_next_best_are_listed_with_their_targets(found, run):
    rows = part(summary.card(found, run), Table).rows
    assert [(row[0].text, row[1].text) for row in rows] == [
        (BEST, "cpu/torch"),
        ("channels-50", "cpu/onnxruntime"),
        ("channels-50", "cpu/torch"),
    ]


def changed(found, **fields):
    rows = [row if row.variant == "baseline" else dataclasses.replace(row, **fields) for row in found.rows]
    return dataclasses.replace(found, rows=tuple(rows))


def test_over_budget_the_closest_is_shown_with_its_state_and_no_runner_up(found, run):
    card = summary.card(changed(found, difference=Estimate(-0.05, -0.06, -0.04), accuracy_verdict="over budget"), run)
    assert part(card, Figures).cells[-1][1].text == "over budget"
    assert part(card, Table) is None
    assert "Closest: " in card.html()


@pytest.mark.parametrize("fields", [{"state": "not run", "reason": "it was stopped"}, {"timing_today": "too noisy"}])
def test_without_a_conclusion_there_is_no_figure_and_no_file(found, run, fields):
    card = summary.card(changed(found, **fields), run)
    assert part(card, Figures) is part(card, Download) is None
    assert "No conclusion" in repr(card)


def test_names_of_a_foreign_folder_cannot_become_markup(found, run):
    hostile = '"><script>alert(1)</script>|'
    file = dataclasses.replace(found.variants[BEST].files[1], path=hostile, beside=(hostile,), sha256=hostile)
    variant = dataclasses.replace(found.variants[BEST], files=(file,))
    rows = [dataclasses.replace(row, reason=hostile) if row.state == "failed" else row for row in found.rows]
    foreign = dataclasses.replace(found, variants=dict(found.variants) | {BEST: variant}, rows=tuple(rows))
    card = summary.card(foreign, run)
    assert "<script" not in card.html()
    assert "<script" not in re.sub(r"^ {4}.*$", "", card.markdown(), flags=re.MULTILINE)
    assert hostile in html.unescape(card.html())


def test_where_nothing_was_timed_the_smallest_is_best_and_no_speed_is_shown(found, run):
    rows = tuple(
        dataclasses.replace(row, speedup=None, timing="", speedup_today=None, timing_today="", latency_ms=None)
        for row in found.rows
    )
    study = found.study.model_copy(update={"mode": "robust"})
    budget = found.budget.model_copy(update={"want": "smallest"})
    card = summary.card(dataclasses.replace(found, rows=rows, study=study, budget=budget), run)
    assert next(title for title, _ in part(card, Figures).cells) == "file size"
    assert "not timed" in repr(card)
    assert "within budget" in repr(card)
