"""Preview of pruning: its numbers are those of the transform, and its controls work in a real kernel."""

import re
from pathlib import Path

import architectures
import pytest
import torch
from ruamel.yaml import YAML
from tiny import task as tiny_task
from torch import nn

from shrinkkit.core import stages
from shrinkkit.widgets import pruning
from shrinkkit.widgets.pruning import BINS

CHANNELS = {"ratio": 0.5, "scope": "layer", "layers": {"conv1": 0.25}, "round_to": 4}
WEIGHTS = {"ratio": 0.5, "scope": "layer", "layers": {"conv1": 0.25}}
BEGIN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from ipywidgets import Button, Dropdown, FloatSlider
from ipywidgets.widgets.widget import _instances
from tiny import task as tiny_task
from shrinkkit.core import stages
from shrinkkit.widgets import pruning
task = tiny_task()
def control(kind, at=0):
    return [widget for widget in _instances.values() if type(widget) is kind][at]
"""
PREVIEW = f"pruning.preview(task, task.model, stages.stage('prune-channels', {CHANNELS!r}))\n"


@pytest.fixture(scope="module")
def task():
    return tiny_task()


def applied(task, name, **settings):
    stage = stages.stage(name, settings)
    return stage, stage.transform.function()(task.model, task, stage.settings, seed=0)


def preview(task, name, layer=pruning.NONE, **settings):
    stage, made = applied(task, name, **settings)
    return pruning.pruned(task, task.model, made, stage, layer=layer).parts


def test_channels_are_shown_with_the_size_of_the_pruned_model(task):
    picture, size, report, *_ = preview(task, "prune-channels", **CHANNELS)
    assert "conv1 12 of 16, conv2 8 of 16, head 4 of 4" in picture.alt
    assert "37.5 %" in size.caption
    assert [row[0].text for row in size.rows] == ["parameters", "size in float32", "MACs per example"]
    assert "outputs" in next(row[-1].text for row in report.rows if row[0].text == "head")


def test_zeros_are_shown_as_zeros_and_not_as_a_smaller_model(task):
    picture, size, report, *_ = preview(task, "prune-weights", layer="conv2", **WEIGHTS)
    assert "set to zero" in picture.svg
    assert "50.0 % of the weights of conv2 are set to zero" in picture.alt
    assert all(row[1].text == row[2].text for row in size.rows[:3])
    assert size.rows[3][2].text in report.caption


@pytest.mark.parametrize(
    ("name", "settings"), [("prune-channels", CHANNELS), ("prune-weights", WEIGHTS | {"biases": True})]
)
def test_the_settings_to_copy_are_those_shown(task, name, settings):
    *_, line, recipe = preview(task, name, **settings)
    names = {}
    exec(line.text, names)
    ((stage, plain),) = YAML(typ="safe").load(recipe.text)["stages"][0].items()
    assert stage == name
    assert stages.stage(name, names["settings"]) == stages.stage(name, plain) == stages.stage(name, settings)


def test_the_histogram_counts_every_weight(task):
    _, made = applied(task, "prune-channels", ratio=0.5, round_to=4)
    every, one = (pruning.histogram(task.model, made.model, layer) for layer in (pruning.NONE, "conv2"))
    layers = (task.model.conv1, task.model.conv2, task.model.head)
    assert sum(every.before) == sum(layer.weight.numel() for layer in layers)
    assert sum(one.before) == task.model.conv2.weight.numel()
    assert sum(one.after) == made.model.conv2.weight.numel() < sum(one.before)
    assert len(one.edges) == len(one.before) + 1 == BINS + 1


def test_the_weights_nearest_to_zero_leave_the_middle_of_the_histogram(task):
    _, made = applied(task, "prune-weights", ratio=0.5, scope="layer")
    weights = pruning.histogram(task.model, made.model, "conv2")
    middle = BINS // 2
    assert weights.after[middle - 1 : middle + 1] == [0, 0]
    assert weights.before[middle] > 0
    assert (weights.after[0], weights.after[-1]) == (weights.before[0], weights.before[-1])
    assert sum(weights.after) == sum(weights.before) / 2


def test_weights_of_attention_are_counted_by_their_values_before_scaling():
    torch.manual_seed(0)
    make, example = architectures.MODELS["torch's transformer"]
    model, name = make().eval(), "encoder.layers.0.self_attn"
    model.get_submodule(name).in_proj_weight.data[:16] = 1.0
    _, made = applied(task_of(model, example()), "prune-channels", ratio=0.5, scope="layer", round_to=1)
    attention = made.model.get_submodule(name)
    assert attention.embed_dim < 16
    assert attention.in_proj_weight[0, 0].item() < 0.9
    count = sum(p.numel() for n, p in attention.named_parameters() if "bias" not in n)
    assert sum(pruning.histogram(model, made.model, name).after) == pytest.approx(count, abs=2)


def task_of(model, example):
    """Return a task of which only model and example are used."""
    task = tiny_task()
    return type(task)(**{**vars(task), "model": model, "example": example})


@pytest.mark.parametrize("name", ["prune-channels", "prune-weights"])
def test_only_layers_that_can_be_pruned_may_be_overridden(name):
    model = nn.Sequential(nn.Bilinear(4, 4, 4), nn.Linear(4, 4))
    assert pruning.prunable(model, stages.stage(name, {"ratio": 0.5})) == ("1",)


def test_controls_update_the_preview_and_errors_are_shown_in_its_place(kernel):
    texts = kernel(PREVIEW)
    assert "pruning ratio 0.5" in texts[0]
    assert "conv2 8 of 16" in texts[1]
    assert texts[-1].startswith("Not evaluated yet.")
    moved = kernel(f"{PREVIEW}control(FloatSlider, -2).value = 0.7 - 1e-16")
    assert "conv2 4 of 16" in moved[1]
    assert "'ratio': 0.7," in moved[1]
    apply = (
        "\nfrom IPython.display import display\nbutton = [w for w in _instances.values() if hasattr(w, 'values')][-1]"
    )
    *_, applied = kernel(f"{PREVIEW}control(FloatSlider, -2).value = 0.7{apply}\ndisplay(button.values['settings'])")
    assert "'ratio': 0.7," in applied
    refused = kernel(f"{PREVIEW}control(Dropdown, -1).value = 'head'")
    assert "`head`" in refused[1]
    evaluated = kernel(f"{PREVIEW}control(Button, -1).click()\ncontrol(Dropdown, -2).value = 'global'")
    assert "ratio 0.5" in evaluated[-1]
    assert "not pruned" in evaluated[-1]


def test_nothing_is_computed_where_no_person_runs_the_cell(kernel):
    (text,) = kernel("task.model.forward = None\n" + PREVIEW, attended=False)
    assert re.search(r'"prune-channels": {"ratio": 0.5', text)
