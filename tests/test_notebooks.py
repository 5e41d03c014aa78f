"""Each notebook run by papermill, in the order and the places in which a reader would run them."""

import json
import shutil
import tempfile
from pathlib import Path

import nbformat
import pytest

from shrinkkit.core import machines
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.core.target import Target
from shrinkkit.pipeline import plan, steps
from shrinkkit.pipeline.steps import NOTEBOOK


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
    "4-benchmark": {**TINY, "threads": 1, "batch_sizes": [], "thread_counts": []},
    "5-report": {},
}
"""What is not as the notebook has it, because tests share the cores and have no time."""
PREVIEWS = {"2-prune": "prune-channels", "3-quantize": "static-int8"}
"""Notebooks with a preview, and what it names."""


def execute(place, name, **parameters):
    attempt = Path(tempfile.mkdtemp(dir=place.parent))
    request = {"notebook": str(place / f"{name}.ipynb"), "parameters": parameters, "cwd": str(place), "warm": ""}
    error = steps.execute_notebook(request, attempt)
    return error, nbformat.read(attempt / NOTEBOOK, as_version=4)


def shown(notebook):
    """Return the last output of each code cell that has one, as text."""
    outputs = [c.outputs[-1] for c in notebook.cells if c.cell_type == "code" and c.outputs]
    return [o.data.get("text/plain", "") for o in outputs if "data" in o]


def test_the_quick_start_runs_and_compares_two_models(place):
    error, notebook = execute(place, "start")
    assert error == ""
    task, training, size, latency, accuracy, conclusion = shown(notebook)
    assert task.startswith("Task digits-cnn")
    assert "epoch 3 of 3" in training
    assert "MACs" in size
    assert "A/A" in latency
    assert "regressions and improvements" in accuracy
    assert conclusion.startswith("Speed-up")


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("1-baseline", "variants/baseline/variant.json"),
        ("2-prune", "variants/pruned/variant.json"),
        ("2-train", "variants/fine-tuned/variant.json"),
        ("2-transform", "variants/transformed/variant.json"),
        ("3-quantize", "variants/static-int8/variant.json"),
        (
            "4-benchmark",
            RunFolder("")
            .measurement("cpu/onnxruntime", machines.this_machine(Target("cpu", "onnxruntime")))
            .as_posix(),
        ),
        ("5-report", "results.json"),
    ],
)
def test_a_notebook_runs_and_leaves_its_record(place, name, made):
    error, notebook = execute(place, name, **SHORT[name])
    assert error == ""
    assert (place.parent / "reports/by-hand" / made).is_file()
    own = [c for c in notebook.cells if c.cell_type == "code"]
    assert len(shown(notebook)) >= 0.5 * len(own)
    assert all(not (o.output_type == "stream" and o.name == "stderr") for c in own for o in c.outputs)
    if name in PREVIEWS:
        # Nobody attends, so that it computes nothing and shows the settings.
        ((preview,),) = [c.outputs for c in own if c.id == "try"]
        assert PREVIEWS[name] in preview.data["text/plain"]
        assert "application/vnd.jupyter.widget-view+json" not in preview.data


def test_what_was_made_by_hand_can_be_concluded_from(place):
    found = json.loads((place.parent / "reports/by-hand/results.json").read_text())
    assert found["schema_version"] == SCHEMA_VERSION
    assert {row["variant"] for row in found["rows"]} == {
        "baseline",
        "pruned",
        "fine-tuned",
        "transformed",
        "static-int8",
    }


def test_the_report_of_a_folder_without_a_run_names_the_remedy(place):
    error, _ = execute(place, "5-report", run="nowhere")
    assert "shrinkkit run" in error


def test_a_pruning_ratio_out_of_range_names_the_rule_and_the_remedy(place):
    error, _ = execute(place, "2-prune", **TINY, settings={"ratio": 50.0}, variant="too-much")
    assert "`ratio` must be a number in [0, 1), got 50.0. For 50 %, pass 0.5." in error
