import math

import architectures
import pytest
import torch
from tiny import Corner
from tiny import task as tiny_task
from torch import nn

from shrinkkit.core.stages import stage
from shrinkkit.errors import InvalidInput, NothingToPrune, Unsupported
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks import modules
from shrinkkit.transforms import groups, prune
from shrinkkit.widgets.preview import BINS, Pruner, Quantizer

CHANNELS = {"ratio": 0.5, "round_to": 4}
WEIGHTS = {"ratio": 0.5}


def channels(**settings):
    return stage("prune-channels", CHANNELS | settings)


def weights(**settings):
    return stage("prune-weights", WEIGHTS | settings)


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def pruner(task):
    return Pruner(task, task.model)


@pytest.fixture(scope="module")
def quantizer(task):
    return Quantizer(task, task.model, calibration_examples=16)


@pytest.mark.parametrize(
    "asked", [{"ratio": 0.25}, {"scope": "layer"}, {"layers": {"conv1": 0.75}}, {"criterion": "random"}]
)
def test_channels_are_those_that_pruning_then_leaves(task, pruner, asked):
    found = pruner.pruned(channels(**asked))
    made = prune.channels(task.model, task.example, **CHANNELS | asked)
    assert {one.layer: one.after for one in found.layers} == groups.widths(made)
    assert {one.layer: one.before for one in found.layers} == groups.widths(task.model)
    assert found.after.parameters == modules.parameters(made) < found.before.parameters
    assert found.after.macs == modules.macs(made, task.example) < found.before.macs
    assert found.after.size_bytes == 4 * found.after.parameters
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), made.parameters(), strict=True))


@pytest.mark.parametrize("asked", [{"ratio": 0.8}, {"scope": "layer"}, {"layers": {"head": 0.9}}])
def test_zeros_are_those_that_pruning_then_makes(task, pruner, asked):
    found = pruner.pruned(weights(**asked))
    made = prune.weights(task.model, **WEIGHTS | asked)
    zeros = {name: int((made.get_submodule(name).weight == 0).sum()) for name in ("conv1", "conv2", "head")}
    assert {one.layer: one.before - one.after for one in found.layers} == zeros
    assert found.after.sparsity == modules.sparsity(made)
    assert (found.after.parameters, found.after.macs) == (found.before.parameters, found.before.macs)


def test_a_layer_that_keeps_all_its_channels_says_why(pruner):
    why = {one.layer: one.why for one in pruner.pruned(channels()).layers}
    assert "makes the model's outputs" in why["head"]
    assert why["conv1"] == why["conv2"] == ""


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"ratio": 1.0}, InvalidInput),
        ({"ratio": 0.0}, InvalidInput),
        ({"skip": ["conv1", "conv2"]}, NothingToPrune),
        ({"layers": {"head": 0.5}}, Unsupported),
    ],
)
def test_what_pruning_refuses_is_refused_here(pruner, asked, error):
    with pytest.raises(error):
        pruner.pruned(channels(**asked))


def test_the_histogram_holds_every_weight_and_what_goes(task, pruner):
    found = pruner.pruned(channels())
    every, one = found.histogram(), found.histogram("conv2")
    layers = (task.model.conv1, task.model.conv2, task.model.head)
    assert sum(every.before) == sum(layer.weight.numel() for layer in layers)
    assert sum(one.before) == task.model.conv2.weight.numel()
    assert sum(one.after) == found.model.conv2.weight.numel() < sum(one.before)
    assert len(one.edges) == len(one.before) + 1 == BINS + 1


def test_the_weights_nearest_to_zero_go_from_the_middle_of_the_histogram(pruner):
    found = pruner.pruned(weights(scope="layer")).histogram("conv2")
    middle = BINS // 2
    assert found.after[middle - 1 : middle + 1] == (0, 0)
    assert found.before[middle] > 0
    assert (found.after[0], found.after[-1]) == (found.before[0], found.before[-1])
    assert sum(found.after) == sum(found.before) / 2


def test_weights_of_attention_are_counted_by_their_values_before_it_was_scaled():
    torch.manual_seed(0)
    make, example = architectures.MODELS["torch's transformer"]
    model, name = make().eval(), "encoder.layers.0.self_attn"
    model.get_submodule(name).in_proj_weight.data[:16] = 1.0
    found = Pruner(tiny_task_of(model, example()), model).pruned(channels(round_to=1))
    attention = found.model.get_submodule(name)
    assert attention.embed_dim < 16
    assert attention.in_proj_weight[0, 0].item() < 0.9
    left = sum(p.numel() for n, p in attention.named_parameters() if "bias" not in n)
    assert sum(found.histogram(name).after) == pytest.approx(left, abs=2)


def tiny_task_of(model, example):
    """Return a task with another model, of which only model and example are used."""
    task = tiny_task()
    return type(task)(**{**vars(task), "model": model, "example": example})


def test_accuracy_is_paired_with_the_model_as_it_is(task, pruner):
    found = pruner.accuracy(pruner.pruned(weights(ratio=0.98)))
    assert len(found.scores) == len(task.validation)
    assert found.difference.value == pytest.approx(found.mean.value - pruner.baseline().value)
    assert found.difference.value < 0


def test_layers_that_may_have_a_ratio_of_their_own_depend_on_the_method():
    model = nn.Sequential(nn.LSTMCell(4, 4), nn.Linear(4, 4))
    pruner = Pruner(tiny_task_of(model, (torch.randn(2, 4),)), model)
    assert pruner.prunable("prune-channels") == pruner.prunable("prune-weights") == ("1",)


@pytest.mark.parametrize("method", ["dynamic-int8", "static-int8", "float16", "bfloat16"])
def test_each_method_is_compared_layer_by_layer(quantizer, method):
    found = quantizer.quantized(method)
    kinds = {one.layer: one.runs_as for one in found.layers}
    wanted = {"float16": "float16", "bfloat16": "bfloat16"}.get(method, "int8")
    assert kinds["head"] == wanted
    assert kinds["conv1"] == ("float32" if method == "dynamic-int8" else wanted)
    assert 0 < found.output_error < 0.1
    assert found.accuracy.agreement > 0.9
    assert found.engine in ("", *torch.backends.quantized.supported_engines)
    assert found.examples == 28  # of 30, in batches of 4


def test_a_setting_is_computed_once(quantizer):
    assert not quantizer.known("static-int8", (), "conv1")
    first = quantizer.quantized("static-int8", left="conv1")
    assert quantizer.known("static-int8", (), "conv1")
    assert quantizer.quantized("static-int8", left="conv1") is first


def test_a_layer_left_in_float_is_in_float_and_nothing_else_changes(quantizer):
    whole, less = quantizer.quantized("static-int8"), quantizer.quantized("static-int8", left="conv1")
    assert {one.layer: one.runs_as for one in less.layers} == {"conv1": "float32", "conv2": "int8", "head": "int8"}
    assert less.engine == whole.engine
    assert less.layers[0].error == pytest.approx(0.0, abs=1e-6)


def test_a_method_that_torch_cannot_have_is_refused_with_what_it_can(quantizer):
    with pytest.raises(Unsupported, match=r"Possible for this model: static-int8, float16, bfloat16"):
        quantizer.quantized("dynamic-int8", skip=["head"])


def test_a_model_that_overflows_shows_where_and_is_not_judged(task):
    model = Corner().eval()
    model.load_state_dict(task.model.state_dict())
    model.conv2.weight.data *= 1e7
    found = Quantizer(task, model).quantized("float16")
    assert [math.isinf(one.error) for one in found.layers] == [False, True, True]
    assert found.accuracy is None
    assert "outputs must be finite" in found.refused


def test_the_engine_in_force_does_not_matter_and_is_put_back(task):
    with quantize.using_engine("qnnpack"):
        found = Quantizer(task, task.model).quantized("static-int8")
        assert torch.backends.quantized.engine == "qnnpack"
    assert found.output_error < 0.1
