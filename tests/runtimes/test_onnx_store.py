import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shrinkkit.errors import Unsupported
from shrinkkit.runtimes import base, files
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.onnx import store as onnx_store

EXAMPLE = (torch.rand(2, 200, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # Weights on both sides of the size from which they are written by themselves.
    return nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 4)).eval()


def weights(path):
    stored = onnx.load(path).graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stored}


def test_a_file_in_one_part_holds_every_weight(model, tmp_path):
    path = tmp_path / "model.onnx"
    onnx_export.write(model, EXAMPLE, path)
    onnx.checker.check_model(path, full_check=True)
    found = weights(path)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(np.array_equal(found[name], p.detach().numpy()) for name, p in model.named_parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_beside_a_graph_are_read_with_it(model, tmp_path):
    path = tmp_path / "model.onnx"
    onnx_export.write(model, EXAMPLE, path, external=True)
    assert path.stat().st_size < 20_000 < path.with_name("model.onnx.data").stat().st_size
    assert np.array_equal(weights(path)["0.weight"], model[0].weight.detach().numpy())
    with torch.inference_mode():
        expected = model(*EXAMPLE)
    for runtime in ("onnxruntime", "openvino"):
        assert base.max_relative_error(expected, files.load(path, runtime=runtime)(*EXAMPLE)) < 1e-5


def test_a_graph_and_the_weights_beside_it_are_joined(model, tmp_path):
    onnx_export.write(model, EXAMPLE, tmp_path / "apart.onnx", external=True)
    onnx_export.write(model, EXAMPLE, tmp_path / "whole.onnx")
    apart = onnx.load(tmp_path / "apart.onnx", load_external_data=False)
    # What lies in the graph itself is written by itself as well, if it is large.
    apart.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(40_000, dtype=np.int32), "extra"))
    onnx_store.join(apart, tmp_path, tmp_path / "joined.onnx")
    found, expected = weights(tmp_path / "joined.onnx"), weights(tmp_path / "whole.onnx")
    assert np.array_equal(found.pop("extra"), np.arange(40_000))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_what_protobuf_could_not_read_is_refused_and_leaves_no_file(model, tmp_path, monkeypatch):
    onnx_export.write(model, EXAMPLE, tmp_path / "model.onnx")
    size = (tmp_path / "model.onnx").stat().st_size
    monkeypatch.setattr(onnx_store, "LARGEST_BYTES", size)
    onnx_export.write(model, EXAMPLE, tmp_path / "fits.onnx")
    monkeypatch.setattr(onnx_store, "LARGEST_BYTES", size - 1)
    with pytest.raises(Unsupported, match=r"smaller than 2 GiB.*use the torch runtime"):
        onnx_export.write(model, EXAMPLE, tmp_path / "large.onnx")
    assert not (tmp_path / "large.onnx").exists()


@given(st.integers(0, 2**40))
def test_whole_numbers_are_written_as_protobuf_reads_them(number):
    message = onnx.TensorProto.FromString(b"\x08" + onnx_store._varint(number))
    assert list(message.dims) == [number]
