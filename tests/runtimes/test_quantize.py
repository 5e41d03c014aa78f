import copy
import gc

import pytest
import torch
from builds import request
from torch import nn

from shrinkkit.errors import InvalidInput, Unsupported
from shrinkkit.runtimes import base
from shrinkkit.runtimes.base import HALF_DTYPES
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.torch import quantize
from shrinkkit.runtimes.torch.quantize import _CLEARLY_SLOWER

CONVOLUTIONAL = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
IMAGES = (torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


def quantized_layers(model):
    return {name for name, module in model.named_modules() if quantize.is_int8(module)}


def test_dynamic_int8_quantizes_linear_lstm_and_gru():
    model = Recurrent().eval()
    made = quantize.dynamic_int8(model, (torch.randn(4, 5, 8),))
    assert {"lstm", "gru", "head"} <= quantized_layers(made)
    assert quantize.engine_of(made) in torch.backends.quantized.supported_engines


def test_dynamic_int8_leaves_the_input_model_unchanged():
    model = Recurrent().eval()
    before = copy.deepcopy(model.state_dict())
    quantize.dynamic_int8(model, (torch.randn(4, 5, 8),))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not quantized_layers(model)


def test_the_engine_is_chosen_among_those_that_were_timed():
    made = quantize.dynamic_int8(Recurrent().eval(), (torch.randn(4, 5, 8),))
    times = quantize.conversion_of(made).times_ms
    assert len(times) >= 1
    assert times[quantize.engine_of(made)] <= _CLEARLY_SLOWER * min(times.values())


def test_a_named_engine_is_the_one_that_is_used():
    engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
    assert (
        quantize.engine_of(quantize.dynamic_int8(Recurrent().eval(), (torch.randn(4, 5, 8),), engine=engine)) == engine
    )


def test_an_unknown_engine_is_refused_with_those_that_there_are():
    with pytest.raises(Unsupported, match=r"must be one of .* got 'gpu'"):
        quantize.dynamic_int8(Recurrent().eval(), (torch.randn(4, 5, 8),), engine="gpu")


def test_the_engine_in_force_is_left_as_it_was():
    before = torch.backends.quantized.engine
    quantize.dynamic_int8(Recurrent().eval(), (torch.randn(4, 5, 8),))
    assert torch.backends.quantized.engine == before


def test_skip_leaves_a_layer_in_float():
    made = quantize.dynamic_int8(Recurrent().eval(), (torch.randn(4, 5, 8),), skip=["head"])
    assert "head" not in quantized_layers(made)
    assert "lstm" in quantized_layers(made)


def test_skip_that_matches_nothing_is_refused():
    with pytest.raises(InvalidInput, match=r"heads"):
        quantize.dynamic_int8(Recurrent().eval(), (torch.randn(4, 5, 8),), skip=["heads"])


def test_dynamic_int8_of_a_model_without_such_layers_lists_what_is_possible():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).eval()
    with pytest.raises(Unsupported, match=r"has none.*Possible for this model: static-int8, float16, bfloat16"):
        quantize.dynamic_int8(model, IMAGES)


def test_static_int8_quantizes_convolutions_and_linear_layers():
    made = quantize.static_int8(CONVOLUTIONAL, IMAGES, [IMAGES])
    assert len(quantized_layers(made)) == 2
    assert not quantized_layers(CONVOLUTIONAL)
    with torch.inference_mode():
        error = (made(*IMAGES) - CONVOLUTIONAL(*IMAGES)).abs().max() / CONVOLUTIONAL(*IMAGES).abs().max()
    assert error < 0.1


def test_static_int8_without_calibration_data_is_refused():
    with pytest.raises(Unsupported, match=r"yields no batch"):
        quantize.static_int8(CONVOLUTIONAL, IMAGES, [])


def test_static_int8_of_control_flow_that_depends_on_data_is_refused_with_the_cause():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(Unsupported, match=r"torch.export can take.*Possible for this model: dynamic-int8"):
        quantize.static_int8(Branching().eval(), (torch.ones(2, 4),), [(torch.ones(2, 4),)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_takes_and_returns_float32_and_stores_16_bits(dtype):
    made = quantize.half(CONVOLUTIONAL, IMAGES, dtype=dtype)
    assert {p.dtype for p in made.parameters()} == {HALF_DTYPES[dtype]}
    with torch.inference_mode():
        assert made(*IMAGES).dtype == torch.float32
    assert {p.dtype for p in CONVOLUTIONAL.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["int3", "float8", "float32"])
def test_half_refuses_other_widths(dtype):
    with pytest.raises(Unsupported, match=r"must be 'float16' or 'bfloat16'"):
        quantize.half(CONVOLUTIONAL, IMAGES, dtype=dtype)


def test_attention_of_torch_is_quantized_whole(tmp_path):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    inputs = (torch.randn(2, 5, 16),)
    made = quantize.dynamic_int8(model, inputs)
    attention = {"layers.0.self_attn.in_proj", "layers.0.self_attn.out_proj"}
    assert quantized_layers(made) == {"layers.0.linear1", "layers.0.linear2", *attention}
    rows = torch_build.int8_layers(request(tmp_path, model, inputs, "dynamic-int8"), made)
    assert rows["layers.0.self_attn"].runs_as == rows["layers.0.self_attn.out_proj"].runs_as == "int8"
    with torch.inference_mode(), quantize.using_engine(quantize.engine_of(made)):
        assert torch.allclose(made(*inputs), model(*inputs), atol=0.1)


def test_transposed_convolutions_stay_in_float_because_their_integer_kernels_are_wrong(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2)).eval()
    made = quantize.static_int8(model, IMAGES, [IMAGES])
    assert quantized_layers(made) == {"0"}
    with torch.inference_mode():
        assert torch.allclose(made(*IMAGES), model(*IMAGES), atol=0.02)
    why = torch_build.int8_layers(request(tmp_path, model, IMAGES, "static-int8"), made)["2"].why
    assert "compute wrong numbers" in why


def graphs():
    gc.collect()
    return sum(issubclass(type(o), torch.fx.GraphModule) for o in gc.get_objects())


def test_of_all_the_graphs_that_were_tried_only_the_one_that_is_returned_stays_in_memory():
    # torch keeps the last model that it exported.
    quantize.static_int8(CONVOLUTIONAL, IMAGES, [IMAGES])
    before = graphs()
    made = quantize.static_int8(CONVOLUTIONAL, IMAGES, [IMAGES])
    assert quantized_layers(made)
    assert graphs() == before + 1


@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_what_stays_in_float_is_not_the_input_model_s(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    inputs = (torch.randn(4, 8),)
    if method == "dynamic":
        made = quantize.dynamic_int8(model, inputs, skip=["2"])
    else:
        made = quantize.static_int8(model, inputs, [inputs], skip=["2"])
    with torch.inference_mode(), quantize.using_engine(quantize.engine_of(made)):
        before = made(*inputs)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(made(*inputs), before)


def test_an_engine_whose_weights_cannot_be_saved_is_not_chosen():
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU()).eval()
    images = (torch.randn(2, 1, 4, 4, 4),)
    # qnnpack computes these convolutions and cannot give their weights back.
    with pytest.raises(Unsupported, match=r"no engine of this machine.*qnnpack"):
        quantize.static_int8(model, images, [images], engine="qnnpack")
    times = quantize.conversion_of(quantize.static_int8(model, images, [images])).times_ms
    assert times.keys() == set(quantize.supported_engines()) - {"qnnpack"}


class Awkward(nn.Module):
    """What torch.fx cannot trace: a default argument, control flow on shapes, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x, scale: float = 0.5, **options):
        if x.shape[1] > 4:
            x = x * scale
        for _ in range(x.shape[1] // 4):
            x = x + 1
        return {"logits": self.second(torch.relu(self.first(x)))}


class Transposed(nn.Module):
    """A linear layer whose weight is stored as GPT-2 stores it, inputs first."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


def error_of(made, model, inputs):
    with torch.inference_mode(), quantize.using_engine(quantize.engine_of(made)):
        return base.relative_error(model, made, [inputs])


@pytest.mark.parametrize("method", ["dynamic-int8", "static-int8"])
def test_a_model_that_only_torch_export_can_capture_is_quantized_and_written(method, tmp_path):
    model, inputs = Awkward().eval(), (torch.randn(4, 8),)
    built = torch_build.build(request(tmp_path, model, inputs, method, calibration=[inputs]))
    assert {name: layer.runs_as for name, layer in built.layers.items()} == {"first": "int8", "second": "int8"}
    assert built.file.inputs[0].shape == ("batch", 8)
    assert built.output.keys() == {"logits"}
    with torch.inference_mode():
        assert base.max_relative_error(model(*inputs), built.output) < 0.05


@pytest.mark.parametrize("method", [quantize.dynamic_int8, quantize.static_int8])
def test_a_product_with_a_matrix_of_parameters_is_a_linear_layer_under_its_own_name(method):
    model, inputs = nn.Sequential(Transposed(8, 16), nn.GELU(), Transposed(16, 4)).eval(), (torch.randn(4, 8),)
    made = method(model, inputs, [inputs], engine="fbgemm")
    assert quantized_layers(made) == {"0", "2"}
    assert error_of(made, model, inputs) < 0.05


def test_a_layer_that_is_called_twice_is_one_in_dynamic_int8_and_two_in_static_int8():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(torch.tanh(self.fc(x)) * 10)

    model, inputs = Shared().eval(), (torch.randn(16, 8),)
    dynamic = quantize.dynamic_int8(model, inputs, engine="fbgemm")
    static = quantize.static_int8(model, inputs, [inputs], engine="fbgemm")
    assert (quantized_layers(dynamic), quantized_layers(static)) == ({"fc"}, {"fc", "fc_call1"})
    assert max(error_of(dynamic, model, inputs), error_of(static, model, inputs)) < 0.05


def test_rows_of_an_embedding_are_int8_and_stay_close(tmp_path):
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64)).eval()
    inputs = (torch.arange(500)[:400].reshape(4, 100),)
    built = torch_build.build(request(tmp_path, model, inputs, "dynamic-int8"))
    assert {layer.runs_as for layer in built.layers.values()} == {"int8"}
    assert built.file.size_bytes < 0.5 * sum(p.nbytes for p in model.parameters())
    rows = nn.Embedding.from_pretrained(model[0].weight)
    made = quantize.dynamic_int8(rows, inputs)
    with torch.inference_mode():
        assert torch.cosine_similarity(made(*inputs), rows(*inputs), dim=-1).min() > 0.99


def test_a_recurrent_layer_that_int8_changes_too_much_stays_in_float_with_the_reason(tmp_path):
    model = Recurrent().eval()
    with torch.no_grad():
        for parameter in model.lstm.parameters():
            parameter *= 6
    # Most inputs are small next to the largest, whose range int8 divides into 128 steps.
    inputs = (torch.randn(8, 20, 8).mul(3).exp(),)
    built = torch_build.build(request(tmp_path, model, inputs, "dynamic-int8"))
    assert built.layers["lstm"].runs_as == "float32"
    assert "int8 changes its outputs by" in built.layers["lstm"].why
    assert built.layers["head"].runs_as == "int8"


def test_integers_are_not_passed_on_where_that_costs_fidelity():
    class Residual(nn.Module):
        """The sum has a range in which what is added is less than a step."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            large = self.fc(x) + x * 0 + 1000
            return (large + self.fc(-x)) - 1000

    model, inputs = Residual().eval(), (torch.randn(64, 8),)
    made = quantize.static_int8(model, inputs, [inputs], engine="fbgemm")
    assert quantized_layers(made)
    assert error_of(made, model, inputs) < 0.1


def int8_graphs():
    gc.collect()
    return sum(issubclass(type(o), torch.fx.GraphModule) and bool(quantized_layers(o)) for o in gc.get_objects())


def test_engines_are_timed_with_one_conversion_in_memory_at_a_time(monkeypatch):
    call_ms, alive = quantize._call_ms, []

    def counted(*arguments):
        alive.append(int8_graphs())
        return call_ms(*arguments)

    monkeypatch.setattr(quantize, "_call_ms", counted)
    before = int8_graphs()
    made = quantize.dynamic_int8(CONVOLUTIONAL, IMAGES)
    assert quantize.conversion_of(made).times_ms.keys() == set(quantize.supported_engines())
    assert {count - before for count in alive} == {1}
