import json
import os
import subprocess
import sys

import architectures
import onnx
import processors
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from shrinkkit.errors import Unsupported
from shrinkkit.runtimes import files, layers
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.onnxruntime import integers as ort_integers
from shrinkkit.runtimes.onnxruntime import quantize as ort_quantize
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.torch import quantize

ENGINES = torch.backends.quantized.supported_engines
x86 = pytest.mark.skipif("fbgemm" not in ENGINES or "onednn" not in ENGINES, reason="needs the engines of an x86 build")
exact = pytest.mark.skipif(
    not processors.has_vnni("onnxruntime"), reason="kernels saturate on this processor, which has no VNNI"
)

ELSEWHERE = """
import json, sys, torch
from pathlib import Path
from shrinkkit.runtimes import files, layers
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.onnxruntime import quantize as ort_quantize
runtime, *paths = sys.argv[1:]
found = [files.check_integers(Path(p), runtime=runtime, inputs=(torch.ones(4, 16, 2, 2),), threads=1) for p in paths]
print(json.dumps([{"saturated": f.saturated, "layers": f.layers, "deviation": f.max_relative_error} for f in found]))
"""


class Extreme(nn.Module):
    """Two products of any of its weights with the largest input are beyond 16 bits."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(16, 32, 1), nn.Linear(128, 8)
        nn.init.ones_(self.conv.weight)
        nn.init.ones_(self.head.weight)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        nn.init.ones_(self.lstm.weight_ih_l0)

    def forward(self, x):
        return self.lstm(x.reshape(-1, 4, 16))[0]


def images(seed=0):
    return (torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def static_torch(folder, model, example, engine):
    folder.mkdir()
    made = quantize.static_int8(model.eval(), example, [example], engine=engine)
    return torch_build.write(made, example, folder)[0]


def quantized_onnx(folder, model, example, method):
    folder.mkdir()
    onnx_export.write(model.eval(), example, folder / "float.onnx")
    ort_quantize.write(folder / "float.onnx", folder / "model.onnx", precision=method, calibration=[example])
    return folder / "model.onnx"


def elsewhere(runtime, *paths, **environment):
    """Return the checks of some files in a process of its own, given what its environment has besides."""
    command = [sys.executable, "-c", ELSEWHERE, runtime, *map(str, paths)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_step_is_rounding_and_two_are_not():
    expected = torch.tensor([0.0, 10.0, 20.0])
    assert layers.difference(expected, expected + torch.tensor([0.0, 1.0, 0.0]), step=1.0).explained
    found = layers.difference(expected, expected + torch.tensor([0.0, 2.0, 0.0]), step=1.0)
    assert not found.explained
    assert found.share == pytest.approx(0.1)


@pytest.mark.parametrize("found", [float("nan"), 5.0])
def test_what_is_no_number_or_no_zero_is_not_explained(found):
    assert not layers.difference(torch.zeros(3), torch.full((3,), found), step=0.0).explained


@x86
def test_kernels_of_torch_that_saturate_are_found_layer_by_layer(tmp_path):
    # Calibrated with what is checked: an input beyond the range takes more than seven bits.
    example = (torch.ones(4, 16, 2, 2),)
    whole_range = static_torch(tmp_path / "whole", Extreme(), example, "onednn")
    seven_bits = static_torch(tmp_path / "seven", Extreme(), example, "fbgemm")
    dynamic = quantize.dynamic_int8(Extreme().eval(), example, engine="fbgemm")
    # Before version 4, torch's dynamic layers used the whole range.
    dynamic.head.version = 3
    recurrent = quantize.dynamic_int8(Recurrent().eval(), example, engine="fbgemm")
    cell = recurrent.lstm._all_weight_values[0]
    _, biases, _, _, packed = cell.param.__getstate__()[0]
    cell.param = torch.ops.quantized.make_quantized_cell_params_dynamic(*packed, *biases, False)
    paths = [whole_range, seven_bits]
    for name, model in (("dynamic", dynamic), ("recurrent", recurrent)):
        (tmp_path / name).mkdir()
        paths.append(torch_build.write(model, example, tmp_path / name)[0])

    found = elsewhere("torch", *paths, **processors.VARIABLES)
    assert [f["saturated"] for f in found] == [["conv", "head"], [], ["head"], ["lstm"]]
    assert found[0]["deviation"] > 0.1
    assert min(found[0]["layers"].values()) > 0.1


def test_kernels_of_onnxruntime_that_saturate_are_found_layer_by_layer(tmp_path):
    older = processors.without_vnni(tmp_path)
    extreme = quantized_onnx(tmp_path / "extreme", Extreme(), (torch.rand(4, 16, 2, 2),), "static-int8")
    recurrent = quantized_onnx(tmp_path / "recurrent", Recurrent(), (torch.rand(4, 16, 2, 2),), "dynamic-int8")
    found = elsewhere("onnxruntime", extreme, recurrent, **older)
    assert [f["saturated"] for f in found] == [["conv", "head"], ["lstm"]]
    assert found[0]["deviation"] > 0.1


def test_a_layer_of_onnxruntime_that_computes_other_integers_is_found_alone(tmp_path):
    meant = quantized_onnx(tmp_path / "onnx", architectures.Convolutions(), images(), "static-int8")
    altered = onnx.load(str(meant))
    weight = next(i for i in altered.graph.initializer if i.name == "c2.weight_quantized")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) // 2, weight.name))
    onnx.save(altered, str(tmp_path / "altered.onnx"))
    before = files.check_integers(meant, runtime="onnxruntime", inputs=images(), threads=1)
    found = ort_integers.check(tmp_path / "altered.onnx", images(), threads=1, reference=meant)
    assert "c2" in found.saturated
    assert found.layers["c2"] > before.layers["c2"] + 0.1
    assert {**found.layers, "c2": 0.0} == {**before.layers, "c2": 0.0}
    assert found.max_relative_error > before.max_relative_error + 0.01


@exact
@pytest.mark.parametrize(
    ("name", "method"),
    [("convolutions", "static-int8"), ("attention, separate", "static-int8"), ("bidirectional", "dynamic-int8")],
)
def test_exact_kernels_of_onnxruntime_are_not_accused(name, method, tmp_path):
    make, example = architectures.MODELS[name]
    torch.manual_seed(0)
    path = quantized_onnx(tmp_path / "onnx", make(), example(), method)
    for _ in range(3):
        found = files.check_integers(path, runtime="onnxruntime", inputs=example(), threads=1)
        assert len(found.layers) >= 3
        assert found.saturated == ()
    assert ("lstm" in found.layers) == (name == "bidirectional")


@x86
@pytest.mark.parametrize("name", ["convolutions", "depthwise", "grouped", "audio", "volumes", "used twice"])
def test_exact_static_kernels_of_torch_are_not_accused(name, tmp_path):
    make, example = architectures.MODELS[name]
    torch.manual_seed(0)
    model = make()
    path = static_torch(tmp_path / "torch", model, example(), "fbgemm")
    multiplying = (nn.Linear, nn.modules.conv._ConvNd)
    for _ in range(3):
        found = files.check_integers(path, runtime="torch", inputs=example(), threads=1)
        assert set(found.layers) == {n for n, m in model.named_modules() if isinstance(m, multiplying)}
        assert found.saturated == ()


@x86
def test_every_layer_of_a_recurrent_model_is_compared_and_not_accused(tmp_path):
    make, example = architectures.MODELS["bidirectional"]
    torch.manual_seed(0)
    made = quantize.dynamic_int8(make().eval(), example(), engine="fbgemm")
    path = torch_build.write(made, example(), tmp_path)[0]
    found = files.check_integers(path, runtime="torch", inputs=example(), threads=1)
    assert set(found.layers) == {"inputs", "lstm", "gru", "head"}
    assert found.saturated == ()
    assert max(found.layers.values()) < 1e-5


@x86
def test_layers_behind_control_flow_are_compared(tmp_path):
    class Halving(nn.Module):
        def __init__(self):
            super().__init__()
            self.even, self.odd = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while bool(x.abs().sum() > 1):
                x = 0.1 * self.odd(x)
            return x

    torch.manual_seed(0)
    example = (torch.randn(4, 8),)
    made = quantize.dynamic_int8(Halving().eval(), example, engine="fbgemm")
    path = torch_build.write(made, example, tmp_path)[0]
    found = files.check_integers(path, runtime="torch", inputs=example, threads=1)
    assert list(found.layers) == ["odd"]
    assert found.saturated == ()


def test_a_file_that_computes_in_float_has_nothing_to_compare(tmp_path):
    model, example = architectures.perceptron().eval(), (torch.randn(2, 8),)
    path, _, _ = torch_build.write(model, example, tmp_path)
    assert files.check_integers(path, runtime="torch", inputs=example, threads=1) is None
    torch.jit.trace(model, example).save(str(tmp_path / "model.torchscript.pt"))
    assert files.check_integers(tmp_path / "model.torchscript.pt", runtime="torch", inputs=example, threads=1) is None
    onnx_export.write(model, example, tmp_path / "model.onnx")
    assert files.check_integers(tmp_path / "model.onnx", runtime="onnxruntime", inputs=example, threads=1) is None


def test_integers_that_cannot_be_computed_in_float_are_named(tmp_path):
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

    weight = numpy_helper.from_array(torch.ones(2, 1, 3, 3, dtype=torch.int8).numpy(), "conv.weight_quantized")
    nodes = [
        make_node("DynamicQuantizeLinear", ["x"], ["rounded", "scale", "zero"]),
        make_node("ConvInteger", ["rounded", "conv.weight_quantized", "zero"], ["y"]),
    ]
    ends = [make_tensor_value_info("x", 1, [4, 1, 8, 8])], [make_tensor_value_info("y", 6, [4, 2, 6, 6])]
    model = make_model(make_graph(nodes, "g", *ends, [weight]), opset_imports=[make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(Unsupported, match=r"model\.onnx for int8 saturation: ConvInteger"):
        files.check_integers(tmp_path / "model.onnx", runtime="onnxruntime", inputs=images(), threads=1)
