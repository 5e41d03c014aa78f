"""What is drawn of a preview, and the controls in a real kernel."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from ruamel.yaml import YAML
from tiny import task as tiny_task

from shrinkkit.core.stages import stage
from shrinkkit.transforms.sensitivity import LayerError
from shrinkkit.widgets import explore
from shrinkkit.widgets.explore import NAMED
from shrinkkit.widgets.preview import Pruner, Quantizer

SETTINGS = {"ratio": 0.5, "scope": "layer", "layers": {"conv1": 0.25}}
CHANNELS = stage("prune-channels", SETTINGS | {"round_to": 4})
WEIGHTS = stage("prune-weights", SETTINGS)
BEGIN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from ipywidgets import Button, Dropdown, FloatSlider
from ipywidgets.widgets.widget import _instances
from tiny import task as tiny_task
from shrinkkit.core import recipe, stages
from shrinkkit.widgets import explore, live
live.attended = lambda: True
task = tiny_task()
def control(kind, at=0):
    return [one for one in _instances.values() if type(one) is kind][at]
"""
PRUNING = f"explore.pruning(task, task.model, stages.stage('prune-channels', {SETTINGS | {'round_to': 4}!r}))\n"
QUANTIZATION = "explore.quantization(task, task.model, recipe.lowered('bfloat16', {}))\n"


@pytest.fixture(scope="module")
def pruner():
    task = tiny_task()
    return Pruner(task, task.model)


@pytest.fixture(scope="module")
def quantized(pruner):
    return Quantizer(pruner.task, pruner.task.model).quantized("bfloat16")


@pytest.fixture(scope="module")
def cell():
    """Return a function that runs the code of a cell in a kernel and returns its outputs as text, the last first."""
    client = NotebookClient(new_notebook(), timeout=60)

    def run(source):
        client.nb.cells = [new_code_cell(source)]
        client.execute_cell(client.nb.cells[0], 0)
        return [output.data["text/plain"] for output in client.nb.cells[0].outputs if "data" in output]

    with client.setup_kernel():
        run(BEGIN)
        yield run


def test_pruning_is_drawn_with_its_numbers_in_words(pruner):
    found = pruner.pruned(CHANNELS)
    picture, saved, layers, *_ = explore.pruned(found, CHANNELS).parts
    assert "conv1 12 of 16, conv2 8 of 16, head 4 of 4" in picture.alt
    assert "Weights of all layers" in picture.svg
    parameters = [cell.text for cell in saved.rows[0]]
    assert parameters[1:3] == [f"{found.before.parameters:,}", f"{found.after.parameters:,}"]
    assert "37.5 %" in saved.caption
    assert layers.rows[2][4].text.startswith("makes the model's outputs")


def test_zeros_are_drawn_as_zeros_and_not_as_a_smaller_model(pruner):
    picture, saved, layers, *_ = explore.pruned(pruner.pruned(WEIGHTS), WEIGHTS, layer="conv2").parts
    assert "Weights of conv2" in picture.svg
    assert "set to zero" in picture.svg
    assert "Of the weights of conv2, 50.0 % go." in picture.alt
    assert [row[3].text for row in saved.rows] == ["100.0 %", "100.0 %", "100.0 %", ""]
    assert layers.caption == "Weights by layer: 3 of 3 layers lose some"


@pytest.mark.parametrize("shown", [CHANNELS, WEIGHTS, stage("prune-weights", SETTINGS | {"biases": True})])
def test_what_is_to_be_copied_says_what_was_shown(pruner, shown):
    *_, line, recipe = explore.pruned(pruner.pruned(shown), shown).parts
    names = {}
    exec(line.text, names)
    assert stage(shown.name, names["settings"]) == shown
    ((name, settings),) = YAML(typ="safe").load(recipe.text)["stages"][0].items()
    assert stage(name, settings) == shown


def test_accuracies_stand_beside_the_model_as_it_is(pruner):
    one = pruner.accuracy(pruner.pruned(stage("prune-weights", SETTINGS | {"ratio": 0.98})))
    table = explore.accuracies(pruner, {"98.0 % by layer ranking": one})
    assert [row[0].text for row in table.rows] == ["as it is", "98.0 % by layer ranking"]
    assert table.rows[0][2].text == "reference"
    assert table.rows[1][2].text.startswith("\N{MINUS SIGN}")
    assert all("[" in cell.aside for cell in (table.rows[0][1], table.rows[1][1], table.rows[1][2]))


def test_errors_are_drawn_in_the_model_s_order_with_the_worst_marked(quantized):
    answers, picture, table = explore.quantized(quantized).parts
    assert answers.text == "In bfloat16 100.0 % of the answers are the float model's."
    assert re.search(r"conv1 [\d.]+ %, conv2 [\d.]+ %, head [\d.]+ %", picture.alt)
    worst = max(quantized.layers, key=lambda one: one.error)
    assert f"worst: {100 * worst.error:.3g}" in picture.svg
    assert [row[1].text for row in table.rows] == ["bfloat16"] * 3


def test_what_is_not_finite_or_cannot_be_compared_is_said_in_words(quantized):
    layers = (LayerError("a", "int8", 0.01), LayerError("b", "int8", math.inf), LayerError("c", "", None, "is gone"))
    broken = dataclasses.replace(
        quantized, layers=layers, output_error=math.inf, accuracy=None, refused="Outputs must be finite."
    )
    answers, picture, table = explore.quantized(broken).parts
    assert answers.text.endswith("cannot be judged. Outputs must be finite.")
    assert "a 1.00 %, b not finite." in picture.alt
    assert table.rows[2][1].text == "cannot be compared: it is gone"
    assert "1 of which cannot be compared" in table.caption


def test_a_model_of_many_layers_stays_as_wide_and_names_what_fits(quantized):
    layers = tuple(LayerError(f"stages.{i}.conv", "int8", 0.01 + i / 1e4) for i in range(200))
    _, picture, _ = explore.quantized(dataclasses.replace(quantized, layers=layers)).parts
    drawn = re.findall(r">(stages\.\d+\.conv)<", picture.svg)
    assert 40 <= len(drawn) <= NAMED
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', picture.svg).group(1))
    assert width == pytest.approx(9.2 * 72)


def test_sliders_change_the_picture_and_refusals_stand_in_its_place(cell):
    texts = cell(PRUNING)
    assert "controls: share to remove 0.5" in texts[0]
    assert "conv2 8 of 16" in texts[1]
    assert texts[-1].startswith("Not judged yet.")
    moved = cell(f"{PRUNING}control(FloatSlider, -2).value = 0.7 - 1e-16")
    assert "conv2 4 of 16" in moved[1]
    assert '"ratio": 0.7' in moved[1]
    refused = cell(f"{PRUNING}control(Dropdown, -1).value = 'head'")
    assert "`layers` asks for 0.5 of `head`, which makes the model's outputs" in refused[1]
    judged = cell(f"{PRUNING}control(Button, -1).click()\ncontrol(Dropdown, -2).value = 'global'")
    assert "50.0 % by layer ranking" in judged[-1]
    assert "as it is" in judged[-1]


def test_another_method_changes_the_errors_and_one_that_is_impossible_says_why(cell):
    texts = cell(QUANTIZATION)
    assert "Quantizing by bfloat16: done in" in texts[0]
    assert texts[2].startswith("In bfloat16 ")
    moved = cell(f"{QUANTIZATION}control(Dropdown, -2).value = 'dynamic-int8'")
    assert moved[2].startswith("In dynamic-int8 ")
    refused = cell(f"{QUANTIZATION}control(Dropdown, -2).value = 'dynamic-int8'; control(Dropdown, -1).value = 'head'")
    assert "Possible for this model: static-int8, float16, bfloat16." in refused[2]
    assert "Quantizing by dynamic-int8: done in" in refused[0]


def test_nothing_is_computed_where_no_person_looks(cell):
    unattended = "live.attended = lambda: False\n"
    for call in (PRUNING, QUANTIZATION):
        (text,) = cell(unattended + call)
        assert "when a person runs this cell" in text
