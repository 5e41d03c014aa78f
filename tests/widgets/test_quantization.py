"""Preview of quantization: errors of each layer of a copy in torch, and controls in a real kernel."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from tiny import Corner
from tiny import task as tiny_task

from shrinkkit.core import stages
from shrinkkit.errors import Unsupported
from shrinkkit.runtimes.torch import quantize
from shrinkkit.transforms.sensitivity import LayerError
from shrinkkit.widgets import quantization
from shrinkkit.widgets.pruning import NAMED

BEGIN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from ipywidgets import Dropdown
from ipywidgets.widgets.widget import _instances
from tiny import task as tiny_task
from shrinkkit.core import stages
from shrinkkit.widgets import quantization
task = tiny_task()
def control(kind, at=0):
    return [widget for widget in _instances.values() if type(widget) is kind][at]
"""
PREVIEW = "quantization.preview(task, task.model, stages.lowered('bfloat16', {}))\n"


@pytest.fixture(scope="module")
def task():
    return tiny_task()


def compare(task, name, model=None, skip=()):
    settings = {"skip": skip} | ({"calibration_examples": 16} if name == "static-int8" else {})
    return quantization.compare(task, model or task.model, stages.lowered(name, settings))


@pytest.fixture(scope="module")
def bfloat16(task):
    return compare(task, "bfloat16")


@pytest.mark.parametrize("name", ["dynamic-int8", "static-int8", "float16", "bfloat16"])
def test_each_precision_is_compared_layer_by_layer(task, name):
    result = compare(task, name)
    kinds = {one.layer: one.runs_as for one in result.layers}
    expected = "int8" if name.endswith("int8") else name
    assert kinds["head"] == expected
    assert kinds["conv1"] == ("float32" if name == "dynamic-int8" else expected)
    assert 0 < result.output_error < 0.1
    assert result.accuracy.agreement > 0.9
    assert result.engine in ("", *torch.backends.quantized.supported_engines)
    assert result.examples == 28  # of 30, in batches of 4


def test_a_skipped_layer_stays_in_float_and_nothing_else_changes(task):
    result = compare(task, "static-int8", skip=("conv1",))
    assert {one.layer: one.runs_as for one in result.layers} == {"conv1": "float32", "conv2": "int8", "head": "int8"}
    assert result.engine == compare(task, "static-int8").engine
    assert result.layers[0].error == pytest.approx(0.0, abs=1e-6)


def test_an_unsupported_precision_names_those_that_are_supported(task):
    with pytest.raises(Unsupported, match="static-int8, float16, bfloat16"):
        compare(task, "dynamic-int8", skip=("head",))


def test_a_model_that_overflows_shows_where_and_is_not_evaluated(task):
    model = Corner().eval()
    model.load_state_dict(task.model.state_dict())
    model.conv2.weight.data *= 1e7
    result = compare(task, "float16", model)
    assert [math.isinf(one.error) for one in result.layers] == [False, True, True]
    assert result.accuracy is None
    assert "finite" in result.reason


def test_the_engine_in_force_does_not_matter_and_is_restored(task):
    with quantize.using_engine("qnnpack"):
        result = compare(task, "static-int8")
        assert torch.backends.quantized.engine == "qnnpack"
    assert result.output_error < 0.1


def test_errors_are_drawn_in_model_order_with_the_worst_marked(bfloat16):
    effect, picture, table = quantization.quantized(bfloat16).parts
    assert effect.text == "bfloat16: 100.0 % of predictions unchanged."
    assert re.search(r"conv1 [\d.]+ %, conv2 [\d.]+ %, head [\d.]+ %", picture.alt)
    worst = max(bfloat16.layers, key=lambda one: one.error)
    assert f"worst: {100 * worst.error:.3g}" in picture.svg
    assert [row[1].text for row in table.rows] == ["bfloat16"] * 3


def test_infinite_errors_and_layers_that_cannot_be_compared_are_named(bfloat16):
    layers = (LayerError("a", "int8", 0.01), LayerError("b", "int8", math.inf), LayerError("c", "", None, "is gone"))
    broken = dataclasses.replace(bfloat16, layers=layers, output_error=math.inf, accuracy=None, reason="Not finite.")
    effect, picture, table = quantization.quantized(broken).parts
    assert effect.text.endswith("Not finite.")
    assert "a 1.00 %, b not finite." in picture.alt
    assert table.rows[2][1].text.endswith("is gone")


def test_a_model_of_many_layers_has_the_same_width_and_names_those_that_fit(bfloat16):
    layers = tuple(LayerError(f"stages.{i}.conv", "int8", 0.01 + i / 1e4) for i in range(200))
    _, picture, _ = quantization.quantized(dataclasses.replace(bfloat16, layers=layers)).parts
    names = re.findall(r">(stages\.\d+\.conv)<", picture.svg)
    assert 40 <= len(names) <= NAMED
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', picture.svg).group(1))
    assert width == pytest.approx(9.2 * 72)


def test_controls_change_the_precision_and_an_unsupported_one_says_why(kernel):
    texts = kernel(PREVIEW)
    assert "(bfloat16): done in" in texts[0]
    assert texts[2].startswith("bfloat16: ")
    moved = kernel(f"{PREVIEW}control(Dropdown, -2).value = 'dynamic-int8'")
    assert moved[2].startswith("dynamic-int8: ")
    apply = (
        "\nfrom IPython.display import display\nbutton = [w for w in _instances.values() if hasattr(w, 'values')][-1]"
    )
    *_, applied = kernel(f"{PREVIEW}control(Dropdown, -2).value = 'dynamic-int8'{apply}\ndisplay(button.values)")
    assert "'precision': \"'dynamic-int8'\"" in applied
    refused = kernel(f"{PREVIEW}control(Dropdown, -2).value = 'dynamic-int8'; control(Dropdown, -1).value = 'head'")
    assert "static-int8, float16, bfloat16" in refused[2]
    assert "(dynamic-int8): done in" in refused[0]


def test_nothing_is_computed_where_no_person_runs_the_cell(kernel):
    (text,) = kernel("task.model.forward = None\n" + PREVIEW, attended=False)
    assert '"bfloat16"' in text
