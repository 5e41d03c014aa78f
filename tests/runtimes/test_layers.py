import pytest
import torch
from builds import request
from tiny import Corner
from torch import nn

from shrinkkit.core.variant import LayerPrecision
from shrinkkit.runtimes import layers
from shrinkkit.runtimes.layers import ROOT
from shrinkkit.runtimes.onnxruntime import profile as ort_profile
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks import modules

EXAMPLE = (torch.rand(4, 1, 8, 8),)


def row(rows, layer):
    return next(r for r in rows if r.layer == layer)


def test_removed_channels_are_read_off_the_shapes():
    before, after = Corner().eval(), Corner().eval()
    after.conv2 = nn.Conv2d(16, 8, 3)
    found = row(layers.compare(before, after, {}), "conv2")
    assert (found.channels_before, found.channels) == (16, 8)
    assert found.parameters < found.parameters_before


def test_layers_that_are_new_gone_or_of_another_type_are_rows_too():
    before, after = Corner().eval(), Corner().eval()
    after.head = nn.Sequential(nn.Linear(64, 2, bias=False), nn.Linear(2, 4))
    after.bn1 = nn.GroupNorm(4, 16)
    rows = layers.compare(before, after, {"torch": {}})
    changes = {row.layer: row.change for row in rows}
    assert changes["head"] == "removed"
    assert changes["head.0"] == changes["head.1"] == "added"
    assert changes["bn1"] == "was BatchNorm2d"
    assert list(changes) == ["conv1", "bn1", "conv2", "head", "head.0", "head.1"]
    assert row(rows, "head").parameters == row(rows, "head.0").parameters_before == 0


def test_zeroed_weights_are_counted_in_the_tensors():
    model = Corner().eval()
    with torch.no_grad():
        model.conv2.weight[:4] = 0
    assert row(layers.compare(Corner(), model, {}), "conv2").zeroed == 0.25
    assert 0 < modules.sparsity(model) < 0.25


def test_every_layer_with_parameters_has_a_row_and_the_model_itself_too():
    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(1, 3))
            self.fc = nn.Linear(3, 3)

    rows = layers.compare(Positioned(), Positioned(), {"torch": {}})
    assert [r.layer for r in rows] == [ROOT, "fc"]
    assert row(rows, "fc").precision["torch"].runs_as == "float32"


def test_a_reason_why_channels_were_kept_is_passed_on():
    rows = layers.compare(Corner(), Corner(), {}, {"head": "makes the outputs"})
    assert row(rows, "head").kept_because == "makes the outputs"
    assert row(rows, "conv1").kept_because == ""


def test_torch_int8_tells_integer_layers_from_folded_and_skipped_ones(tmp_path):
    model = Corner().eval()
    made = quantize.static_int8(model, EXAMPLE, [EXAMPLE], skip=["head"])
    found = torch_build.int8_layers(request(tmp_path, model, EXAMPLE, "static-int8", skip=["head"]), made)
    assert found["conv1"] == LayerPrecision("int8")
    assert found["bn1"].runs_as == "folded"
    assert found["head"] == LayerPrecision("float32", "in `skip`")


def test_torch_dynamic_int8_says_why_convolutions_stay_in_float(tmp_path):
    model = Corner().eval()
    made = quantize.dynamic_int8(model, EXAMPLE)
    found = torch_build.int8_layers(request(tmp_path, model, EXAMPLE, "dynamic-int8"), made)
    assert found["head"] == LayerPrecision("int8")
    assert "static int8 does" in found["conv1"].why


@pytest.mark.parametrize(
    ("module", "method", "why"),
    [
        (nn.GRU(4, 4), "dynamic-int8", "ONNX Runtime has no int8 GRU"),
        (nn.LSTM(4, 4), "static-int8", "dynamic int8 does"),
        (nn.LayerNorm(4), "static-int8", "int8 does not cover LayerNorm"),
        (nn.Linear(4, 4), "dynamic-int8", "no integer kernel"),
    ],
)
def test_onnx_int8_gives_a_reason_for_every_float_layer(module, method, why, tmp_path, monkeypatch):
    model = nn.Sequential(module)
    monkeypatch.setattr(ort_profile, "int8_weights", lambda path: frozenset())
    found = ort_profile.int8_layers(tmp_path / "none.onnx", request(tmp_path, model, EXAMPLE, method))
    assert found["0"].runs_as == "float32"
    assert why in found["0"].why
