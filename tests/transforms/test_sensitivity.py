import copy
import math

import architectures
import pytest
import torch
from torch import nn

from shrinkkit.runtimes.torch import quantize
from shrinkkit.runtimes.torch.export import HalfPrecision
from shrinkkit.transforms import sensitivity


def sample(model):
    """Return a model of `architectures` with weights that do not change, and batches for it."""
    torch.manual_seed(0)
    make, example = architectures.MODELS[model]
    return make().eval(), [example(), example()]


def found(model, quantized, inputs):
    layers, output = sensitivity.compare(model, quantized, inputs)
    return {one.layer: one for one in layers}, output


class Normalised(nn.Sequential):
    """A convolution whose normalisation and ReLU change its output a lot."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 3))
        super().__init__(*layers)
        layers[1].running_mean.fill_(0.2)
        layers[1].running_var.fill_(4.0)
        self.eval()


def test_a_copy_has_no_error():
    model, inputs = sample("u-net")
    layers, output = found(model, copy.deepcopy(model), inputs)
    assert {one.error for one in layers.values()} == {0.0}
    assert output == 0.0
    assert list(layers) == ["down1", "down2", "middle", "up", "join", "out"]


def test_an_error_begins_at_the_layer_that_has_it_and_is_inherited():
    model, inputs = sample("perceptron")
    other = copy.deepcopy(model)
    other[2].weight.data *= 1.1
    other[2].bias.data *= 1.1
    layers, output = found(model, other, inputs)
    assert layers["0"].error == 0.0
    assert layers["2"].error == pytest.approx(0.1, abs=1e-6)
    assert layers["4"].error > 0.0
    assert output == layers["4"].error


def test_a_layer_fused_with_what_follows_is_compared_with_what_the_float_model_has_after_it():
    model, inputs = Normalised(), [(torch.rand(4, 1, 8, 8),)]
    layers, _ = found(model, quantize.static_int8(model, inputs[0], inputs), inputs)
    # Compared with the convolution alone, the error would be above 100 %.
    assert 0 < layers["0"].error < 0.05
    assert layers["0"].runs_as == layers["4"].runs_as == "int8"


def test_work_in_place_does_not_change_what_is_compared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 3)).eval()
    inputs = [(torch.randn(4, 1, 8, 8),)]
    layers, _ = found(model, quantize.half(model, inputs[0], dtype="bfloat16"), inputs)
    assert 0 < layers["0"].error < 0.02
    assert layers["0"].runs_as == "bfloat16"


@pytest.mark.parametrize("name", ["recurrent", "torch's transformer", "attention, unbound", "used twice"])
def test_every_layer_of_other_models_can_be_compared(name):
    model, inputs = sample(name)
    layers, output = found(model, quantize.dynamic_int8(model, inputs[0]), inputs)
    # Attention has become the layers of its products.
    assert {one.layer for one in layers.values() if one.why} == {n for n in layers if n.endswith("self_attn")}
    assert "int8" in {one.runs_as for one in layers.values()}
    assert max(one.error for one in layers.values() if not one.why) < 0.1
    assert 0 < output < 0.1


def test_a_layer_that_does_not_run_or_runs_another_number_of_times_says_so():
    model, inputs = sample("used twice")

    class Once(architectures.UsedTwice):
        def forward(self, x):
            return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))

    class Never(architectures.UsedTwice):
        def forward(self, x):
            return self.head(torch.relu(self.stem(x)).mean((2, 3)))

    once, _ = found(model, Once().eval(), inputs)
    never, _ = found(model, Never().eval(), inputs)
    unused, _ = found(Never().eval(), model, inputs)
    assert once["body"].why == "is called 2 times in float and 1 times once quantized"
    assert never["body"].why == "is no separate layer once the model is quantized"
    assert unused["body"].why == "is not called as a layer when the float model runs"
    assert once["body"].error is None
    assert once["stem"].error is not None


def test_an_overflow_is_an_infinite_error():
    model, inputs = sample("perceptron")
    model[2].weight.data *= 1e7
    layers, output = found(model, HalfPrecision(copy.deepcopy(model).half(), torch.float16), inputs)
    assert math.isfinite(layers["0"].error)
    assert math.isinf(layers["2"].error)
    assert math.isinf(output)


def test_no_hook_is_left_behind():
    model, inputs = sample("perceptron")
    other = copy.deepcopy(model)
    found(model, other, inputs)
    assert [m for m in (*model.modules(), *other.modules()) if m._forward_hooks] == []
