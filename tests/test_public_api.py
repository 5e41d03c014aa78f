"""What `import shrinkkit` gives: the names, their documentation and types, and that torch is loaded only on use."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import shrinkkit

NAMES = """
Budget InvalidInput InvalidTask LeaseLost Metric ModelFileError NothingChanged NothingToPrune Recipe ShrinkkitError
StepFailed Study Task UnfairComparison Unsupported check_task compare compress create_study dynamic_int8 fine_tune
from_loader from_timm from_transformers half load_results load_task macs parameters prune_channels
prune_weights read_recipe read_study run score static_int8 verify
""".split()
FUNCTIONS = [name for name in NAMES if name[0].islower()]
EXAMPLE = (torch.zeros(2, 1, 8, 8),)


def test_the_public_names_are_these():
    assert dir(shrinkkit) == NAMES


def test_the_stub_declares_the_public_names():
    stub = ast.parse(Path(shrinkkit.__file__).with_suffix(".pyi").read_text())
    exported = next(node for node in stub.body if isinstance(node, ast.Assign))
    assert sorted(ast.literal_eval(exported.value)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_can_be_imported(name):
    assert getattr(shrinkkit, name).__doc__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_documents_its_arguments_result_and_errors(name):
    function = getattr(shrinkkit, name)
    text = inspect.getdoc(function)
    arguments, _, _ = text.partition("\nArgs:")[2].partition("\nReturns:")
    assert [p for p in inspect.signature(function).parameters if not re.search(rf"\n    (\*\*)?{p}: ", arguments)] == []
    assert "\nReturns:\n" in text or name == "check_task"
    assert "\nRaises:\n" in text or name in ("macs", "parameters")


def test_importing_the_package_loads_no_torch():
    code = "import sys, shrinkkit; dir(shrinkkit); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="distill"):
        shrinkkit.distill  # noqa: B018


@pytest.fixture(scope="module")
def task():
    return tiny.task()


@pytest.fixture(scope="module")
def smaller(task):
    return shrinkkit.prune_channels(task.model, task.example, ratio=0.5)


def test_pruned_models_have_fewer_parameters_and_macs(task, smaller):
    assert shrinkkit.parameters(smaller) < shrinkkit.parameters(task.model)
    assert shrinkkit.macs(smaller, task.example) < shrinkkit.macs(task.model, task.example)


def test_a_model_is_compared_with_itself_in_speed_and_accuracy(task):
    compared = shrinkkit.compare(task.model, task.model, task, cap_s=0.2, threads=1)
    assert compared.latency.speedup.low <= compared.latency.speedup.high
    assert compared.accuracy.difference.value == 0
    assert len(compared.accuracy.scores) == len(task.validation)


def test_without_a_task_only_latency_is_compared(task, smaller):
    compared = shrinkkit.compare(task.model, smaller, task.example, cap_s=0.2, threads=1)
    assert compared.accuracy is None
    assert compared.latency.candidate == "candidate"


def test_an_int8_model_is_scored_with_the_engine_that_it_was_made_for(task):
    calibration = [(task.calibration[i][0].unsqueeze(0),) for i in range(8)]
    integer = shrinkkit.static_int8(task.model, task.example, calibration)
    scored = shrinkkit.score(integer, task, split="test", baseline=task.model)
    assert abs(scored.difference.value) < 0.2


@pytest.mark.parametrize(("recipe", "precision"), [("channels-50-static-int8", "int8"), ("bfloat16", "bfloat16")])
def test_a_recipe_is_applied_in_memory_and_its_layers_are_reported(task, recipe, precision):
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    compressed = shrinkkit.compress(task, recipe)
    assert {row.precision["torch"].runs_as for row in compressed.audit} >= {precision}
    assert shrinkkit.score(compressed.model, task, split="test").mean.value > 0.9
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())


def test_scores_of_an_unknown_split_are_refused(task):
    with pytest.raises(shrinkkit.InvalidInput, match="`split`"):
        shrinkkit.score(task.model, task, split="tests")


@pytest.mark.slow
def test_the_python_example_of_the_readme_runs():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = readme.partition("## From Python")[2].partition("```python\n")[2].partition("```")[0]
    without_study = code.replace('shrinkkit.run("digits-cnn")', "shrinkkit.run")
    names = {}
    exec(without_study, names)
    assert shrinkkit.parameters(names["smaller"]) < shrinkkit.parameters(names["task"].model)
