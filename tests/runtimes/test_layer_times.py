import re

import architectures
import pytest
import torch
from tiny import Corner
from torch import nn

from shrinkkit.core.estimate import Estimate
from shrinkkit.errors import ModelFileError, Unsupported
from shrinkkit.results import diagnosis
from shrinkkit.runtimes import files
from shrinkkit.runtimes.files import FEWEST
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.onnxruntime import quantize as ort_quantize
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.torch import profile as torch_profile
from shrinkkit.runtimes.torch import quantize

pytestmark = pytest.mark.usefixtures("one_thread", "same_threads")

KINDS = ("pt2", "torchscript", "static torchscript", "dynamic torchscript", "onnx", "static onnx")
NAMED = (
    ("used twice", "pt2"),
    ("used twice", "torchscript"),
    ("recurrent", "torchscript"),
    ("dense", "torchscript"),
    ("torch's transformer", "torchscript"),
    ("used twice", "onnx"),
    ("dense", "static torchscript"),
    ("recurrent", "dynamic torchscript"),
    ("recurrent", "onnx"),
    ("torch's transformer", "pt2"),
    ("torch's transformer", "static torchscript"),
    ("torch's transformer", "dynamic torchscript"),
)


class Planted(nn.Module):
    """Three layers of which one takes nearly all of the time."""

    def __init__(self):
        super().__init__()
        self.first, self.slow, self.last = nn.Linear(16, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 4)

    def forward(self, x):
        return self.last(torch.relu(self.slow(torch.relu(self.first(x)))))


class Twins(nn.Module):
    """Layers of one name in different modules, one called right after the other."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(16, 16)}) for _ in range(3))

    def forward(self, x):
        for stage in self.stages:
            x = stage["linear"](x)
        return x


class Converting(nn.Module):
    """Leaves and enters float around every layer, if it is told to."""

    def __init__(self, converts):
        super().__init__()
        self.a, self.b, self.converts = nn.Linear(64, 64), nn.Linear(64, 64), converts

    def pass_on(self, x: torch.Tensor) -> torch.Tensor:
        return torch.quantize_per_tensor(x, 0.05, 128, torch.quint8).dequantize() if self.converts else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pass_on(self.b(self.pass_on(self.a(self.pass_on(x)))))


def write(model, example, folder, kind):
    """Return a model file of this kind, and its runtime."""
    method, _, format = kind.rpartition(" ")
    if format in ("onnx", "openvino"):
        onnx_export.write(model, example, folder / "float.onnx")
        if not method:
            return folder / "float.onnx", {"onnx": "onnxruntime"}.get(format, format)
        path = folder / "int8.onnx"
        ort_quantize.write(folder / "float.onnx", path, precision=f"{method}-int8", calibration=[example])
        return path, "onnxruntime"
    if kind == "pt2":
        return torch_build.write_program(model, example, folder)[0], "torch"
    engine = torch.backends.quantized.supported_engines[-1]
    if method == "static":
        model = quantize.static_int8(model, example, [example], engine=engine)
    elif method == "dynamic":
        model = quantize.dynamic_int8(model, example, engine=engine)
    return torch_build.write(model, example, folder)[0], "torch"


def times(model, example, folder, kind):
    path, runtime = write(model.eval(), example, folder, kind)
    return files.layer_times(path, runtime=runtime, inputs=example, threads=1, calls=5)


def weighted(model):
    return {name for name, m in model.named_modules() if name and next(m.parameters(recurse=False), None) is not None}


def shares(times):
    """Return the layers, each with its share of the time, the largest first."""
    total = sum(one.ms for one in times)
    by_layer = {layer: sum(one.ms for one in times if one.layer == layer) / total for layer in {t.layer for t in times}}
    return sorted(((layer, share) for layer, share in by_layer.items() if layer), key=lambda item: -item[1])


@pytest.mark.parametrize("kind", [*KINDS, "openvino"])
def test_a_planted_slow_layer_is_the_hottest(tmp_path, kind):
    found = times(Planted(), (torch.rand(512, 16),), tmp_path, kind)
    (layer, share), *rest = shares(found)
    assert layer == "slow"
    assert share > 0.5
    assert {"first", "last"} <= {name for name, _ in rest}
    assert all(one.ms >= 0 for one in found)


@pytest.mark.parametrize(("name", "kind"), NAMED)
def test_every_layer_with_weights_is_found_by_its_name_and_no_other_name_is(tmp_path, name, kind):
    torch.manual_seed(0)
    make, example = architectures.MODELS[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The exporter gives equal weights, which only untrained layers have, one name.
            parameter += 1e-3 * torch.randn_like(parameter)
    layers = [one.layer for one in times(model, example(), tmp_path, kind)]
    found = set(layers)
    # nn.MultiheadAttention reads this layer's weights and never calls it.
    assert weighted(model) - found <= {f"encoder.layers.{i}.self_attn.out_proj" for i in (0, 1)}
    assert found <= {module for module, _ in model.named_modules()}
    blocks = re.findall(r"layers\.(\d)", " ".join(layers))
    assert blocks == sorted(blocks)


@pytest.mark.parametrize("kind", ["pt2", "torchscript", "static torchscript", "static onnx"])
def test_layers_of_one_name_that_follow_each_other_are_told_apart(tmp_path, kind):
    found = times(Twins(), (torch.rand(8, 16),), tmp_path, kind)
    layers = [one.layer for one in found if not one.converts and one.layer]
    assert list(dict.fromkeys(layers)) == [f"stages.{i}.linear" for i in range(3)]


@pytest.mark.parametrize(
    ("kind", "conversions"),
    [
        ("pt2", set()),
        ("torchscript", set()),
        ("static torchscript", {"quantize_per_tensor", "dequantize"}),
        ("static onnx", {"QuantizeLinear", "DequantizeLinear"}),
    ],
)
def test_conversions_are_told_from_work(tmp_path, kind, conversions):
    found = times(Corner(), (torch.rand(4, 1, 8, 8),), tmp_path, kind)
    assert {one.operator for one in found if one.converts} == conversions
    work = {one.operator for one in found if not one.converts}
    assert any(name in work for name in ("conv2d", "quantized::conv2d_relu", "QLinearConv"))


def test_in_onnx_a_conversion_belongs_to_the_layer_that_it_follows(tmp_path):
    found = times(Corner(), (torch.rand(4, 1, 8, 8),), tmp_path, "static onnx")
    assert {one.layer for one in found if one.operator == "DequantizeLinear"} == {"head"}


def test_in_onnx_only_what_has_weights_belongs_to_a_layer_as_in_quantized_files(tmp_path):
    make, example = architectures.MODELS["recurrent"]
    found = times(make(), example(), tmp_path, "onnx")
    assert {one.operator for one in found if one.layer == "lstm"} == {"LSTM"}


def test_what_the_profiler_costs_is_not_counted_to_an_operator_that_calls_many():
    spans = [
        ("aten::lstm", 0, 5_000_000),
        ("aten::linear", 100, 200),
        ("aten::add", 300, 400),
        ("aten::relu", 6e6, 7e6),
    ]
    lstm, relu = torch_profile._outermost(spans)
    assert torch_profile._unrecorded(lstm, 0.5) == 5.0 - 3 * 0.5
    assert torch_profile._unrecorded(relu, 0.5) == 0.5
    assert torch_profile._unrecorded(relu, 2.0) == 0.0


def test_a_16_bit_model_keeps_the_names_of_its_layers_and_shows_its_casts(tmp_path):
    example = (torch.rand(4, 1, 8, 8),)
    model = quantize.half(Corner().eval(), example, dtype="bfloat16")
    path, _, _ = torch_build.write(model, example, tmp_path)
    found = files.layer_times(path, runtime="torch", inputs=example, threads=1, calls=3)
    assert {one.layer for one in found} == {"", "conv1", "bn1", "conv2", "head"}
    assert [one.layer for one in found if one.converts] == [""]


def test_conversions_around_every_layer_explain_a_slow_down(tmp_path):
    inputs = (torch.rand(512, 64),)
    found = []
    for converts in (False, True):
        torch.jit.script(Converting(converts).eval()).save(path := tmp_path / f"{converts}.torchscript.pt")
        # Of three, the one that other processes disturbed least.
        several = [files.layer_times(path, runtime="torch", inputs=inputs, threads=1) for _ in range(3)]
        found.append(min(several, key=lambda times: sum(one.ms for one in times)))
    before, after = (sum(one.ms for one in times) for times in found)
    speedup = Estimate(before / after, before / after, before / after)
    said = diagnosis.slow_down(*found, (), runtime="torch", denormals=0, speedup=speedup, verdict="slower")
    assert "Conversions of number formats" in said[0]
    assert "quantize_per_tensor" in said[0]
    assert "dequantize" in said[0]


def test_layers_of_blocked_convolutions_are_found_without_their_weights_names(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.Flatten())
    found = times(model, (torch.rand(2, 1, 8, 8),), tmp_path, "onnx")
    assert {one.layer for one in found if "Conv" in one.operator} == {"0", "2"}


def test_a_slow_model_is_called_few_times(monkeypatch):
    monkeypatch.setattr(files, "CAP_S", 0.0)
    assert files._repeats(lambda: None, 20) == FEWEST


@pytest.mark.parametrize("kind", ["pt2", "onnx", "torchscript"])
def test_planted_denormal_weights_are_counted_exactly(tmp_path, kind):
    model = Planted().eval()
    with torch.no_grad():
        model.slow.weight[0, :5] = torch.tensor([1e-39, -1e-39, 1.1e-38, 1e-45, 0.0])
        model.last.bias[0] = 1e-40
    if kind == "torchscript":
        torch.jit.script(model).save(path := tmp_path / "m.torchscript.pt")
        runtime = "torch"
    else:
        path, runtime = write(model, (torch.rand(2, 16),), tmp_path, kind)
    assert files.denormals(path, runtime=runtime) == 5


def test_denormal_outputs_of_layers_are_counted_and_views_of_them_are_not(tmp_path):
    class Shrinking(nn.Module):
        def forward(self, x):
            return (x * 1e-39).flatten(1)

    path, _ = write(Shrinking(), (torch.ones(3, 2, 2),), tmp_path, "pt2")
    assert files.denormals(path, runtime="torch") == 0
    assert files.denormals(path, runtime="torch", inputs=(torch.ones(3, 2, 2),)) == 12


def test_numbers_in_16_bits_count_by_what_they_are_in_32(tmp_path):
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        # The first is among float16's smallest numbers, and a common one in float32.
        model.weight[0] = torch.tensor([1e-6, 1.0, 1.0, 1.0])
    half = quantize.half(model.eval(), (torch.rand(2, 4),), dtype="float16")
    path, _, _ = torch_build.write(half, (torch.rand(2, 4),), tmp_path)
    assert files.denormals(path, runtime="torch") == 0


def test_a_damaged_file_is_refused(tmp_path):
    for name, runtime in (("m.pt2", "torch"), ("m.torchscript.pt", "torch"), ("m.onnx", "onnxruntime")):
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(ModelFileError, match=f"{name} cannot be (loaded|read)"):
            files.layer_times(tmp_path / name, runtime=runtime, inputs=(torch.rand(1),), threads=1)


def test_torchscript_on_a_gpu_is_refused_with_what_is_possible(tmp_path):
    torch_build.write(nn.Linear(2, 2).eval(), (torch.rand(4, 2),), tmp_path)
    with pytest.raises(Unsupported, match=r"on the CPU only, got `device` 'cuda'"):
        files.layer_times(
            tmp_path / "model.torchscript.pt", runtime="torch", inputs=(torch.rand(4, 2),), threads=1, device="cuda"
        )


@pytest.mark.gpu
def test_layers_are_timed_on_a_gpu_by_events_in_its_stream(tmp_path):
    path, _ = write(Planted().eval(), example := (torch.rand(16, 16),), tmp_path, "pt2")
    found = files.layer_times(path, runtime="torch", inputs=example, threads=1, device="cuda", calls=5)
    assert {one.layer for one in found} == {"", "first", "slow", "last"}
    assert all(one.ms > 0 for one in found)
