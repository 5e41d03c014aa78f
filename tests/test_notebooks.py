"""Each notebook run by papermill, in the order and the places in which a reader would run them."""

import dataclasses
import json
import shutil
from pathlib import Path

import examples
import nbformat
import pytest

from shrinkkit import cli
from shrinkkit.core import machines, store
from shrinkkit.core.recipe import Study
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.core.target import Target
from shrinkkit.pipeline import by_hand, plan, steps
from shrinkkit.pipeline.steps import NOTEBOOK
from shrinkkit.runtimes import registry


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the notebooks copied out, as `shrinkkit notebooks` leaves them."""
    folder = tmp_path_factory.mktemp("place") / "notebooks"
    shutil.copytree(plan.notebooks(), folder)
    return folder


TINY = {"task": str(Path(__file__).parent / "tiny.py")}
SHORT = {
    **{name: {**TINY, "threads": 1} for name in ("1-baseline", "2-prune", "2-transform", "3-quantize")},
    "2-train": {**TINY, "threads": 1, "source": "pruned"},
    "4-benchmark": {
        **{**TINY, "threads": 1, "effort": "quick"},
        **{"batch_sizes": [], "thread_counts": [], "others": ["cpu/torch"]},
    },
    "3-search": {**TINY, "threads": 1, "minutes": 0.05},
    "4-robustness": {**TINY, "threads": 1, "effort": "quick", "target": "cpu/torch", "others": []},
    "5-report": {},
}
"""What is not as the notebook has it, because tests share the cores and have no time."""
PREVIEWS = {"2-prune": "prune-channels", "3-quantize": "static-int8"}
"""Notebooks with a preview, and what it names."""


@pytest.fixture
def execute(place, warm_address):
    """Return a function that executes a notebook with parameters, and returns its error and what was executed."""

    def executed(name, warm=warm_address, **parameters):
        request = {"notebook": str(place / f"{name}.ipynb"), "parameters": parameters, "warm": warm}
        error = steps.execute_notebook(request, place)
        return error, nbformat.read(place / NOTEBOOK, as_version=4)

    return executed


def shown(notebook):
    """Return the last output of each code cell that has one, as text."""
    outputs = [c.outputs[-1] for c in notebook.cells if c.cell_type == "code" and c.outputs]
    return [o.data.get("text/plain", "") for o in outputs if "data" in o]


def test_the_quick_start_runs_and_compares_two_models(execute):
    error, notebook = execute("start", warm="")
    assert error == ""
    task, training, size, latency, accuracy, conclusion = shown(notebook)
    assert task.startswith("Task digits-cnn")
    assert "epoch 3 of 3" in training
    assert "MACs" in size
    assert "A/A" in latency
    assert all("pruned, int8" in table for table in (latency, accuracy, conclusion))
    assert "speed-up" in conclusion


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("1-baseline", "variants/baseline/variant.json"),
        ("2-prune", "variants/pruned/variant.json"),
        ("2-train", "variants/fine-tuned/variant.json"),
        ("2-transform", "variants/transformed/variant.json"),
        ("3-quantize", "variants/static-int8/variant.json"),
        ("3-search", "search.json"),
        (
            "4-benchmark",
            RunFolder("")
            .measurement("cpu/onnxruntime", machines.this_machine(Target("cpu", "onnxruntime")))
            .as_posix(),
        ),
        (
            "4-robustness",
            RunFolder("").robustness_record("cpu/torch", machines.this_machine(Target("cpu", "torch"))).as_posix(),
        ),
        ("5-report", "results.json"),
    ],
)
def test_a_notebook_runs_and_leaves_its_record(place, execute, name, made):
    error, notebook = execute(name, **SHORT[name])
    assert error == ""
    assert (place / "reports/by-hand" / made).is_file()
    own = [c for c in notebook.cells if c.cell_type == "code"]
    assert len(shown(notebook)) >= 0.5 * len(own)
    assert all(not (o.output_type == "stream" and o.name == "stderr") for c in own for o in c.outputs)
    if name in PREVIEWS:
        # Nobody attends, so that it computes nothing and shows the settings.
        ((preview,),) = [c.outputs for c in own if c.id == "try"]
        assert PREVIEWS[name] in preview.data["text/plain"]
        assert "application/vnd.jupyter.widget-view+json" not in preview.data


VARIANTS = {"baseline", "pruned", "fine-tuned", "transformed", "static-int8"}


def test_what_was_made_by_hand_can_be_concluded_from(place):
    found = json.loads((place / "reports/by-hand/results.json").read_text())
    assert found["schema_version"] == SCHEMA_VERSION
    assert {row["variant"] for row in found["rows"]} == VARIANTS
    assert {row["target"] for row in found["rows"]} == {"cpu/onnxruntime", "cpu/torch"}
    assert {row["state"] for row in found["rows"]} == {"measured"}


def test_notebooks_record_their_study_as_they_go(place):
    study = Study.model_validate_json((place / "reports/by-hand/study.json").read_text())
    assert {recipe.name for recipe in study.recipes} == VARIANTS - {"baseline"}
    assert [stage.name for stage in study.recipes[0].stages] == []  # the one without stages comes first
    assert Path(place / "reports/by-hand", study.task).resolve() == Path(TINY["task"])
    assert (study.targets, study.budget.accuracy_drop, study.batch_sizes) == (
        ("cpu/onnxruntime", "cpu/torch"),
        0.01,
        (),
    )
    if "openvino" in registry.default_runtimes():
        assert study.notes == ("Not measured: cpu/openvino. Run 4-benchmark with each as `target`.",)


def test_the_models_are_exported_for_every_runtime_of_this_machine(place):
    variant = json.loads((place / "reports/by-hand/variants/pruned/variant.json").read_text())
    assert [file["runtime"] for file in variant["files"]] == registry.default_runtimes()


def test_notebooks_end_in_the_report_of_a_run(place):
    folder = RunFolder(place / "reports/by-hand")
    notebook = nbformat.read(plan.notebooks() / "5-report.ipynb", as_version=4)
    kept = [c.source for c in notebook.cells if "not-in-report" not in c.metadata.get("tags", [])]
    headings = [line[3:] for source in kept for line in source.splitlines() if line.startswith("## ")]
    page, text = folder.report.read_text(), folder.report_markdown.read_text()
    assert headings
    assert all(f'aria-label="Link to {heading}"' in page and f"## {heading}" in text for heading in headings)
    assert json.loads(folder.results.read_text())["study"]["budget"]["accuracy_drop"] == 0.01
    links = nbformat.read(place / NOTEBOOK, as_version=4).cells[-1].outputs[0].data["text/html"]
    assert 'href="reports/by-hand/report.html"' in links


def test_the_report_of_notebooks_can_be_made_again_with_another_budget(place, execute, monkeypatch):
    folder = RunFolder(place / "reports/by-hand")
    error, _ = execute("5-report", budget={"accuracy_drop": 0.2})
    assert error == ""
    folder.report.unlink()
    monkeypatch.chdir(place)
    assert cli.main(["report", "reports/by-hand", "--quiet"]) == 0
    assert folder.report.is_file()
    assert json.loads(folder.results.read_text())["study"]["budget"]["accuracy_drop"] == 0.2


@pytest.mark.parametrize(("kept", "is_run"), [(("4-benchmark", "5-report"), False), (("1-baseline",), True)])
def test_a_folder_stays_that_of_notebooks_after_only_its_benchmark_was_run(tmp_path, kept, is_run):
    run = RunFolder(examples.write_run(tmp_path))
    run.study.unlink()
    status = examples.status()
    steps = tuple(step for step in status.steps if step.notebook in kept)
    store.write(run.status, dataclasses.replace(status, steps=steps))
    by_hand.record({"run": run.path, "task": "digits-cnn"})
    assert (run.status.is_file(), run.study.is_file()) == (is_run, not is_run)


def test_a_budget_that_breaks_a_rule_is_an_error(execute):
    error, _ = execute("5-report", budget={"accuracy_dorp": 0.2})
    assert "Did you mean `accuracy_drop`?" in error
    error, _ = execute("5-report", budget={"accuracy_drop": 50})
    assert "For 50 %, pass 0.5." in error


def test_the_report_of_a_folder_without_a_run_names_the_remedy(execute):
    error, _ = execute("5-report", run="nowhere")
    assert "shrinkkit run" in error


def test_a_pruning_ratio_out_of_range_names_the_rule_and_the_remedy(execute):
    error, _ = execute("2-prune", **TINY, settings={"ratio": 50.0}, variant="too-much")
    assert "`ratio` must be a number in [0, 1), got 50.0. For 50 %, pass 0.5." in error
