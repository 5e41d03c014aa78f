"""What OpenVINO's compiled graph says: in what each layer is multiplied, and what each part of a call takes."""

import pytest
import torch
from builds import request
from tiny import Corner, corners

from shrinkkit.runtimes import files
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.openvino import profile

EXAMPLE = (corners(4, 2).tensors[0],)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    onnx_export.write(Corner().eval(), EXAMPLE, path)
    return path


@pytest.mark.parametrize(
    ("primitive", "stored", "dynamic", "expected"),
    [
        ("brgconv_avx512_amx_I8", "u8", False, "int8"),
        ("undef_i8", "i8", False, "int8"),
        ("undef_f32", "i8", False, "float32"),
        ("undef_f32", "i8", True, "int8"),
        ("jit_avx512_f32", "f32", True, "float32"),
        ("brgemm_avx512_amx_bf16", "bf16", False, "bfloat16"),
    ],
)
def test_only_products_of_integers_are_called_int8(primitive, stored, dynamic, expected):
    info = {"primitiveType": primitive, "runtimePrecision": stored}
    assert profile._runs_as(info, dynamic) == expected


def test_a_layer_s_name_is_not_taken_for_another_that_begins_alike():
    known = dict.fromkeys(["a", "a.b", "ab"])
    assert profile._layers("a.b/Conv/WithoutBiases,ab/Conv,Multiply_3,a/Gemm", known) == ["a.b", "ab", "a"]


def test_a_float_file_runs_in_float(path, tmp_path):
    compiled = files.load(path, runtime="openvino").source
    found = profile.layer_precisions(compiled, request(tmp_path, Corner().eval(), EXAMPLE, "static-int8"))
    assert {p.runs_as for p in found.values()} == {"float32", "folded"}
    assert "OpenVINO" in found["conv1"].why


def test_times_are_told_by_layer_for_each_call(path):
    calls = profile.layers(path, EXAMPLE, device="cpu", threads=1, repeats=lambda call: 3)
    assert len(calls) == 3
    for call in calls:
        layers = {layer for layer, _, _ in call}
        assert {"conv1", "conv2"} <= layers
        assert "x" not in layers
        assert all(ms >= 0 for _, _, ms in call)
        assert sum(ms for _, _, ms in call) > 0
