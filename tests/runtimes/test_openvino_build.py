"""OpenVINO's files in fewer bits: as exact as they should be, run as they say, and the same each time they are made."""

import subprocess
import sys

import processors
import pytest
import torch
from builds import request
from tiny import Corner, corners
from torch import nn

from shrinkkit.errors import Unsupported
from shrinkkit.runtimes import base, files
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.openvino import build as openvino_build

EXAMPLE = (corners(4, 2).tensors[0],)
CALIBRATION = [(corners(4, seed).tensors[0],) for seed in range(8)]


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        x = self.embed(x[:, 0])
        x = (self.query(x) @ self.key(x).transpose(1, 2) / 8).softmax(-1) @ self.value(x)
        return {"scores": self.head(x.mean(1))}


def exported(model, folder):
    torch.manual_seed(0)
    model = model().eval()
    onnx_export.write(model, EXAMPLE, folder / "float.onnx")
    return model, folder / "float.onnx"


def written(folder, method, model=Corner, skipped=()):
    made, source = exported(model, folder)
    path = folder / "model.openvino.xml"
    found, _ = openvino_build.write(
        request(folder, made, EXAMPLE, method, calibration=CALIBRATION, skip=skipped), source, path
    )
    return made, path, found


def test_static_int8_runs_in_integers_and_stays_close(tmp_path):
    model, path, found = written(tmp_path, "static-int8")
    assert {name: p.runs_as for name, p in found.items()} == {
        "conv1": "int8", "bn1": "folded", "conv2": "int8", "head": "int8",
    }  # fmt: skip
    loaded = files.load(path, runtime="openvino")
    with torch.inference_mode():
        wanted = model(*EXAMPLE)
    assert torch.nn.functional.cosine_similarity(wanted, loaded(*EXAMPLE)).min() > 0.99
    assert (loaded(*EXAMPLE) - wanted).abs().max() > 0
    assert loaded(torch.rand(3, 1, 8, 8)).shape == (3, 4)


def test_what_is_skipped_stays_in_float_and_says_why(tmp_path):
    _, _, found = written(tmp_path, "static-int8", skipped=["conv1", "head"])
    assert {name: p.runs_as for name, p in found.items() if name != "bn1"} == {
        "conv1": "float32", "conv2": "int8", "head": "float32",
    }  # fmt: skip
    assert found["head"].why == "in `skip`"


def test_dynamic_int8_quantizes_matrix_products_and_leaves_convolutions(tmp_path):
    _, path, found = written(tmp_path, "dynamic-int8", Attending)
    # OpenVINO has integer kernels for it only where they are exact.
    assert {p.runs_as for p in found.values()} == {"int8" if processors.has_vnni("openvino") else "float32"}
    assert files.load(path, runtime="openvino")(*EXAMPLE).shape == (4, 4)
    (tmp_path / "cnn").mkdir()
    _, path, found = written(tmp_path / "cnn", "dynamic-int8")
    assert found["conv2"].why == "dynamic int8 does not cover convolutions; static int8 does"
    assert b'element_type="i8" shape="16, 16, 3, 3"' not in path.read_bytes()


def test_integers_that_are_multiplied_as_floats_are_not_called_int8(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_build, "GROUP_NUMBERS", 0)
    _, path, found = written(tmp_path, "dynamic-int8", Attending)
    assert b'element_type="i8"' in path.read_bytes()
    assert {p.runs_as for p in found.values()} == {"float32"}


@pytest.mark.parametrize("method", ["float16", "bfloat16"])
def test_sixteen_bits_are_half_the_weights_and_run_so_or_say_why_not(tmp_path, method):
    model, path, found = written(tmp_path, method)
    weights = sum(p.numel() for p in model.parameters())
    assert path.with_suffix(".bin").stat().st_size < 2.2 * weights + 200
    ran = {p.runs_as for p in found.values()}
    assert ran & {method} or all(f"no {method} arithmetic" in p.why for p in found.values())
    with pytest.raises(Unsupported, match=r"takes no `skip`"):
        written(tmp_path, method, skipped=["head"])


@pytest.mark.parametrize("method", ["static-int8", "bfloat16"])
def test_the_same_model_gives_the_same_file(tmp_path, method):
    hashes = set()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        hashes.add(base.sha256(path := written(tmp_path / name, method)[1], path.with_suffix(".bin")))
    assert len(hashes) == 1


def test_attention_is_recognised(tmp_path):
    import openvino

    for model, attends in ((Corner, False), (Attending, True)):
        _, source = exported(model, tmp_path)
        assert openvino_build._attends(openvino.Core().read_model(source)) is attends


def test_the_quantizer_reports_nothing_over_the_network_and_prints_nothing(tmp_path):
    code = f"""
import socket, sys
def refuse(*_, **__):
    raise SystemExit("a connection was tried")
socket.socket.connect = socket.create_connection = refuse
sys.path.insert(0, {str(tmp_path.parent)!r})
from pathlib import Path
import torch
from torch import nn
from shrinkkit.runtimes.base import BuildRequest
from shrinkkit.runtimes.onnx import export
from shrinkkit.runtimes.openvino import build
model, x = nn.Sequential(nn.Linear(8, 8)).eval(), (torch.rand(4, 8),)
folder = Path({str(tmp_path)!r})
export.write(model, x, folder / "float.onnx")
build.write(BuildRequest(folder, folder, model, x, "static-int8", (), [x]), folder / "float.onnx", folder / "m.xml")
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert {p.name for p in tmp_path.iterdir()} == {"float.onnx", "m.xml", "m.bin"}
