"""The page over all runs: none is left out, whatever lies in its folder, and nothing is mixed that must not be."""

from dataclasses import replace

import examples
import pages
import pytest

from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.display.formats import TIMES
from shrinkkit.errors import InvalidInput
from shrinkkit.report import index_page
from shrinkkit.results import results


@pytest.fixture
def reports(tmp_path):
    """A folder with a run of two machines, a damaged run, one of an older schema, and something else."""
    examples.write_two_machines(tmp_path / "whole")
    (tmp_path / "whole/report.html").write_text("made")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/study.json").write_text("{")
    examples.write_run(tmp_path / "older")
    for path in (tmp_path / "older").rglob("*.json"):
        if path.name != "study.json":
            examples.change_json(path, schema_version=SCHEMA_VERSION - 1)
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_every_run_has_a_row_that_says_what_became_of_it(reports):
    found = {run.name: run for run in index_page.read(reports)}
    assert {name: run.status for name, run in found.items()} == {
        "whole": "with failures",
        "damaged": "unreadable",
        "older": "unreadable",
    }
    assert "dynamic-int8" in found["whole"].reason
    assert "study.json cannot be read" in found["damaged"].reason
    assert "schema version" in found["older"].reason


def test_the_page_links_what_is_there_and_needs_nothing_outside(reports):
    text = index_page.write(reports).read_text()
    assert 'href="whole/report.html"' in text
    assert "damaged/report.html" not in text
    assert pages.outside_addresses(text) == []


def test_the_verdicts_figures_stand_with_their_intervals(reports):
    text = index_page.write(reports).read_text()
    assert "within budget" in text
    assert f"5.83{TIMES} <small>5.82\N{EN DASH}5.84</small>" in text
    assert "to 81.5 kB" in text


def test_a_run_that_was_stopped_says_where(tmp_path):
    folder = examples.write_run(tmp_path / "stopped")
    steps = [{"name": "2-prune-channels-50", "notebook": "2-prune", "subject": "channels-50", "state": "interrupted"}]
    examples.change_json(folder / "status.json", steps=steps)
    (run,) = index_page.read(tmp_path)
    assert run.status == "interrupted"
    assert "2-prune-channels-50" in run.reason


def test_an_error_that_nobody_foresaw_keeps_no_other_run_out(reports, monkeypatch):
    load = results.load
    monkeypatch.setattr(results, "load", lambda run: load(run) if run.name == "whole" else 1 / 0)
    found = {run.name: run for run in index_page.read(reports)}
    assert found["whole"].results is not None
    assert "ZeroDivisionError" in found["older"].reason


def test_machines_are_never_mixed_in_one_front(reports):
    best = index_page.fronts(index_page.read(reports))
    assert {machine for _, _, machine in best} == {examples.HERE, examples.ELSEWHERE}
    for (_, _, machine), chosen in best.items():
        assert chosen
        assert {run.results.machine(row.target) for run, row in chosen} == {machine}


def test_tasks_are_never_mixed_in_one_front(tmp_path):
    examples.write_run(tmp_path / "one")
    other = examples.write_run(tmp_path / "other")
    examples.change_json(other / "study.json", task="digits-lstm")
    best = index_page.fronts(index_page.read(tmp_path))
    assert {task for task, _, _ in best} == {"digits-cnn", "digits-lstm"}
    assert all(len({run.name for run, _ in chosen}) == 1 for chosen in best.values())


def test_only_trusted_timings_are_in_a_front(tmp_path):
    examples.write_run(tmp_path / "run")
    (run,) = index_page.read(tmp_path)
    ((key, chosen),) = index_page.fronts([run]).items()
    best = chosen[0][1]
    rows = tuple(replace(row, timing_today="too noisy") if row is best else row for row in run.results.rows)
    again = index_page.fronts([replace(run, results=replace(run.results, rows=rows))])[key]
    assert again
    assert (best.variant, best.target) not in {(row.variant, row.target) for _, row in again}


def test_a_report_without_its_run_is_no_run(tmp_path):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample/report.html").write_text("passed on")
    assert index_page.read(tmp_path) == ()


def test_no_runs_is_a_sentence_that_says_what_to_do(tmp_path):
    assert "shrinkkit run digits-cnn" in index_page.write(tmp_path).read_text()


def test_a_page_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "index.html").write_text("<h1>My site</h1>")
    with pytest.raises(InvalidInput, match="not written by shrinkkit"):
        index_page.write(tmp_path)
    assert (tmp_path / "index.html").read_text() == "<h1>My site</h1>"


def test_names_from_folders_cannot_write_markup(tmp_path):
    folder = tmp_path / '<b title="x">'
    folder.mkdir()
    (folder / "study.json").write_text("{")
    assert "<b title" not in index_page.write(tmp_path).read_text()


def test_a_missing_folder_is_an_error_that_says_so(tmp_path):
    with pytest.raises(InvalidInput, match="must be a folder of runs"):
        index_page.write(tmp_path / "nowhere")


def test_a_run_is_listed_however_it_ends(tmp_path):
    folder, said = examples.write_run(tmp_path / "run"), []
    with pytest.raises(KeyboardInterrupt), index_page.listed(folder, lambda line, final: said.append(line)):
        raise KeyboardInterrupt
    assert (tmp_path / "index.html").is_file()
    assert said == []
