"""What inductor makes of a program: its integer products by their scales, and its kernels by their times."""

import pytest
import torch
from tiny import Corner, corners

from shrinkkit import artifacts, compiled, layertimes, pt2e

EXAMPLE = (corners(4, 2).tensors[0],)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = Corner().eval()
    artifacts.write_torch(model, EXAMPLE, folder)
    pt2e.write(model, EXAMPLE, [EXAMPLE], folder / "int8.pt2", method="static-int8", skipped=frozenset())
    return folder


def test_each_integer_product_is_found_by_the_scales_of_its_weights(folder):
    found = compiled.integer_scales(folder / "int8.pt2", EXAMPLE)
    assert sorted(tuple(scale.shape) for scale in found) == [(4,), (16,), (16,)]
    assert all(bool((scale > 0).all()) for scale in found)


def test_a_program_in_float_has_none(folder):
    assert compiled.integer_scales(folder / "model.pt2", EXAMPLE) == []


def test_kernels_are_timed_and_belong_to_no_layer(folder):
    found = layertimes.measure(folder / "int8.pt2", runtime="inductor", inputs=EXAMPLE, threads=1, calls=3)
    assert {one.layer for one in found} == {""}
    assert any("qconv" in one.operator or "qlinear" in one.operator for one in found)
    assert sum(one.ms for one in found) > 0
