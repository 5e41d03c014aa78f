import copy
import gc
import weakref

import pytest
import torch
from builds import request
from torch import nn

from shrinkkit.errors import InvalidInput, Unsupported
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
    times = quantize.engine_times_ms(made)
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

    with pytest.raises(Unsupported, match=r"torch.fx can trace.*Possible for this model: dynamic-int8"):
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


def test_attention_of_torch_is_quantized_without_breaking_it():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    made = quantize.dynamic_int8(model, (torch.randn(2, 5, 16),))
    assert {"layers.0.linear1", "layers.0.linear2"} <= quantized_layers(made)
    assert "layers.0.self_attn.out_proj" not in quantized_layers(made)


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
    times = quantize.engine_times_ms(quantize.static_int8(model, images, [images]))
    assert times.keys() == {e for e in quantize.supported_engines() if quantize.is_exact(e, "static-int8")} - {
        "qnnpack"
    }


class Watching(nn.Module):
    """Notes at each call how many copies of it there are in memory."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.alive, self.seen = weakref.WeakSet(), []

    def __deepcopy__(self, known):
        copied = Watching()
        copied.fc, copied.alive, copied.seen = copy.deepcopy(self.fc, known), self.alive, self.seen
        self.alive.add(copied)
        return copied

    def forward(self, x):
        self.seen.append(len(self.alive))
        return self.fc(x)


@pytest.mark.parametrize("large", [False, True])
def test_engines_for_a_large_model_are_timed_with_one_conversion_in_memory_at_a_time(large, monkeypatch):
    if large:
        monkeypatch.setattr(quantize, "_TOGETHER_BYTES", 0)
    model = Watching().eval()
    made = quantize.dynamic_int8(model, (torch.randn(4, 8),))
    engines = set(torch.backends.quantized.supported_engines) - {"none"}
    times = quantize.engine_times_ms(made)
    assert times.keys() == engines
    assert times[quantize.engine_of(made)] <= _CLEARLY_SLOWER * min(times.values())
    assert max(model.seen) == (1 if large else len(engines))
