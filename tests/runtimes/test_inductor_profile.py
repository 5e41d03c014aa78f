"""What inductor makes of a program: which layers it computes in integers, and the time of its kernels."""

import pytest
import torch
from builds import request
from tiny import Corner, corners

from shrinkkit.errors import Unsupported
from shrinkkit.runtimes import files
from shrinkkit.runtimes.inductor import build, profile
from shrinkkit.runtimes.torch import build as torch_build

EXAMPLE = (corners(4, 2).tensors[0],)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Corner().eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch_build.write_program(model, EXAMPLE, folder)
    build.write_int8(request(folder, model, EXAMPLE, "static-int8", calibration=[EXAMPLE]), folder / "int8.pt2")
    return folder


def test_each_layer_is_told_by_the_integers_that_its_kernel_is_given(folder, model):
    found = profile.int8_layers(folder / "int8.pt2", request(folder, model, EXAMPLE, "static-int8"))
    assert {name: p.runs_as for name, p in found.items()} == {
        "conv1": "int8", "bn1": "folded", "conv2": "int8", "head": "int8",
    }  # fmt: skip


def test_a_program_in_float_has_none(folder, model):
    found = profile.int8_layers(folder / "model.pt2", request(folder, model, EXAMPLE, "static-int8"))
    assert "int8" not in {p.runs_as for p in found.values()}


def test_kernels_are_timed_by_layer(folder):
    found = files.layer_times(folder / "int8.pt2", runtime="inductor", inputs=EXAMPLE, threads=1, calls=3)
    assert {"conv1", "conv2", "head"} <= {one.layer for one in found}
    assert any("qconv" in one.operator for one in found)
    assert sum(one.ms for one in found) > 0
    with pytest.raises(Unsupported, match="must be 'cpu'"):
        files.layer_times(folder / "int8.pt2", runtime="inductor", inputs=EXAMPLE, threads=1, device="cuda")
