import numpy as np
import onnx
import pytest
import torch
from torch import nn

from shrinkkit.runtimes import base, files
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.onnx import store as onnx_store
from shrinkkit.runtimes.onnxruntime import quantize as ort_quantize

EXAMPLE = (torch.rand(2, 200, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # Weights on both sides of the size from which they are written by themselves.
    return nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 4)).eval()


def weights(path):
    stored = onnx.load(path).graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stored}


def test_a_small_model_is_one_file_that_holds_every_weight(model, tmp_path):
    path = tmp_path / "model.onnx"
    assert onnx_export.write(model, EXAMPLE, path).beside == ()
    onnx.checker.check_model(path, full_check=True)
    found = weights(path)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(np.array_equal(found[name], p.detach().numpy()) for name, p in model.named_parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_the_weights_of_a_large_model_lie_beside_its_graph_and_are_read_with_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_store, "ONE_FILE_BYTES", 0)
    path = tmp_path / "model.onnx"
    (data,) = onnx_export.write(model, EXAMPLE, path).beside
    assert data.name == "model.onnx.data"
    assert path.stat().st_size < 20_000 < data.stat().st_size
    assert np.array_equal(weights(path)["0.weight"], model[0].weight.detach().numpy())
    with torch.inference_mode():
        expected = model(*EXAMPLE)
    for runtime in ("onnxruntime", "openvino"):
        assert base.max_relative_error(expected, files.load(path, runtime=runtime)(*EXAMPLE)) < 1e-5


@pytest.mark.parametrize("limit", [0, onnx_store.ONE_FILE_BYTES])
def test_an_int8_file_holds_the_same_whether_or_not_its_weights_lie_beside_it(model, tmp_path, monkeypatch, limit):
    onnx_export.write(model, EXAMPLE, tmp_path / "float.onnx")
    ort_quantize.write(tmp_path / "float.onnx", tmp_path / "whole.onnx", precision="dynamic-int8", skip=["2"])
    monkeypatch.setattr(onnx_store, "ONE_FILE_BYTES", limit)
    onnx_export.write(model, EXAMPLE, tmp_path / "apart.onnx")
    beside = ort_quantize.write(tmp_path / "apart.onnx", tmp_path / "int8.onnx", precision="dynamic-int8", skip=["2"])
    assert len(beside) == (limit == 0)
    expected, found = weights(tmp_path / "whole.onnx"), weights(tmp_path / "int8.onnx")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
