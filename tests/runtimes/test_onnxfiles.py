import contextlib

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shrinkkit.errors import Unsupported
from shrinkkit.runtimes import artifacts, loading
from shrinkkit.runtimes.onnx import onnxfiles
from shrinkkit.runtimes.onnx.onnxfiles import LARGE_BYTES

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
    artifacts.write_onnx(model, EXAMPLE, path)
    onnx.checker.check_model(path, full_check=True)
    found = weights(path)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(np.array_equal(found[name], p.detach().numpy()) for name, p in model.named_parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_beside_a_graph_are_read_with_it(model, tmp_path):
    path = tmp_path / "model.onnx"
    artifacts.write_onnx(model, EXAMPLE, path, beside=True)
    assert path.stat().st_size < 20_000 < path.with_name("model.onnx.data").stat().st_size
    assert np.array_equal(weights(path)["0.weight"], model[0].weight.detach().numpy())
    with torch.inference_mode():
        expected = model(*EXAMPLE)
    for runtime in ("onnxruntime", "openvino"):
        assert artifacts.max_relative_error(expected, loading.load(path, runtime=runtime)(*EXAMPLE)) < 1e-5


def test_a_graph_and_the_weights_beside_it_are_joined(model, tmp_path):
    artifacts.write_onnx(model, EXAMPLE, tmp_path / "apart.onnx", beside=True)
    artifacts.write_onnx(model, EXAMPLE, tmp_path / "whole.onnx")
    apart = onnx.load(tmp_path / "apart.onnx", load_external_data=False)
    # What lies in the graph itself is written by itself as well, if it is large.
    apart.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(40_000, dtype=np.int32), "extra"))
    onnxfiles.join(apart, tmp_path, tmp_path / "joined.onnx")
    found, expected = weights(tmp_path / "joined.onnx"), weights(tmp_path / "whole.onnx")
    assert np.array_equal(found.pop("extra"), np.arange(40_000))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_what_protobuf_could_not_read_is_refused_and_leaves_no_file(model, tmp_path, monkeypatch):
    artifacts.write_onnx(model, EXAMPLE, tmp_path / "model.onnx")
    size = (tmp_path / "model.onnx").stat().st_size
    monkeypatch.setattr(onnxfiles, "LARGEST_BYTES", size)
    artifacts.write_onnx(model, EXAMPLE, tmp_path / "fits.onnx")
    monkeypatch.setattr(onnxfiles, "LARGEST_BYTES", size - 1)
    with pytest.raises(Unsupported, match=r"smaller than 2 GiB.*use the torch runtime"):
        artifacts.write_onnx(model, EXAMPLE, tmp_path / "large.onnx")
    assert not (tmp_path / "large.onnx").exists()


def test_a_file_is_read_without_the_data_of_large_weights(model, tmp_path):
    path = tmp_path / "model.onnx"
    artifacts.write_onnx(model, EXAMPLE, path)
    found, expected = onnxfiles.read(path), onnx.load(path)
    emptied = [tensor for tensor in expected.graph.initializer if len(tensor.raw_data) >= LARGE_BYTES]
    assert [tensor.name for tensor in emptied] == ["0.weight"]
    for tensor in emptied:
        tensor.ClearField("raw_data")
    assert found == expected


def test_a_file_that_ends_anywhere_too_early_is_refused(model, tmp_path):
    path = tmp_path / "model.onnx"
    artifacts.write_onnx(model, EXAMPLE, path)
    content = path.read_bytes()
    for end in (*range(1, 2000, 7), len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        # Between two of the model's fields, protobuf itself cannot tell either.
        with contextlib.suppress(ValueError):
            assert not onnxfiles.read(path).HasField("graph")
    path.write_bytes(b"\x0b" + content)
    with pytest.raises(ValueError, match=r"has no place in it"):
        onnxfiles.read(path)


@given(st.integers(0, 2**40))
def test_whole_numbers_are_written_as_protobuf_reads_them(number):
    message = onnx.TensorProto.FromString(b"\x08" + onnxfiles._varint(number))
    assert list(message.dims) == [number]
