"""`shrinkkit tune`: a search, what it found made and measured, and a report of both."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shrinkkit import cli
from shrinkkit.core import store, studies
from shrinkkit.core.recipe import FOUND
from shrinkkit.core.run_folder import RunFolder, Status
from shrinkkit.core.search import SearchRecord
from shrinkkit.errors import InvalidInput
from shrinkkit.pipeline import runner
from shrinkkit.pipeline.run_status import Monitor
from shrinkkit.results import results

TASK = Path(__file__).parent.parent / "tiny.py"


def tuned(folder, warm_start, minutes):
    options = {"targets": ["cpu/onnxruntime"], "accuracy_drop": 0.1, "effort": "quick", "search_minutes": minutes}
    study = studies.study(str(TASK), recipes=[], **options, name="corner-tuned")
    prepared = runner.prepare(study, reports=folder, command="shrinkkit tune", threads=1, monitor=Monitor())
    return prepared, prepared.execute(Monitor(), warm_start)


@pytest.fixture(scope="module")
def run(tmp_path_factory, warm_start):
    return tuned(tmp_path_factory.mktemp("reports"), warm_start, 0.25)[1]


def steps(run):
    return {step.name: step.state for step in store.read(run.status, Status).steps}


def test_what_was_found_is_made_again_and_measured_by_ordinary_steps(run):
    record = store.read(run.search, SearchRecord)
    assert set(steps(run).values()) == {"done"}
    assert {"1-baseline", "3-search", "4-benchmark-cpu-onnxruntime", "5-report"} < set(steps(run))
    found = results.load(run.path)
    names = FOUND[: len(record.found)]
    assert names
    assert [r.name for r in found.study.recipes] == list(names)
    assert {row.state for row in found.rows if row.variant in names} == {"measured"}
    for name, recipe in zip(names, record.recipes(), strict=True):
        assert found.variants[name].recipe == recipe.settings()
    assert not results.failures(found)


def test_the_report_holds_the_search_against_the_benchmark(run):
    text = run.report_markdown.read_text()
    assert "## Search" in text
    assert "The search against the benchmark" in text
    assert "Trials of the search" in text
    assert (run.recipes / "tuned.yaml").is_file()
    assert studies.read_recipe(run.recipes / "tuned.yaml").name == "tuned"


def test_the_same_command_again_finds_every_step_cached(run, warm_start):
    prepared, _ = tuned(run.path.parent, warm_start, 0.25)
    states = prepared.preview()
    assert set(states) == set(steps(run))
    assert {name for name, state in states.items() if state == "run"} == {"5-report"}


def test_a_time_that_is_none_is_refused_before_any_work(capsys):
    for given in ("10", "m", "1.2.3m", "ten minutes"):
        assert cli.main(["tune", str(TASK), "--time", given]) == 2
        assert "`--time` must be a number with s, m or h, such as 10m" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX systems")
def test_ctrl_c_ends_the_search_with_its_best_and_the_run_with_its_report(tmp_path):
    options = "--target cpu/onnxruntime --accuracy-drop 0.1 --time 1h --threads 1 --set effort=quick".split()
    command = [sys.executable, "-m", "shrinkkit.cli", "tune", str(TASK), *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        run = RunFolder(tmp_path / "reports" / "tiny-tuned")
        deadline = time.monotonic() + 300
        while not (run.search.is_file() and json.loads(run.search.read_text())["trials"]):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    assert "The search ends with its best after this trial" in shown
    assert run.report.is_file()
    assert not run.stop.exists()


def test_a_search_with_several_targets_and_none_named_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="`search` needs one target"):
        studies.study(str(TASK), recipes=[], targets=["cpu/torch", "cpu/onnxruntime"], search_minutes=1)
