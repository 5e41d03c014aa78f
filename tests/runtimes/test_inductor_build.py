"""Int8 for inductor: what the file holds, what inductor makes of it, and what stays in float and why."""

import pytest
import torch
from builds import request
from tiny import Corner, corners
from torch import nn
from torch.nn import functional

from shrinkkit.errors import Unsupported
from shrinkkit.runtimes import base, files
from shrinkkit.runtimes.base import LOW_PRECISION_TOLERANCE
from shrinkkit.runtimes.inductor import build, profile

EXAMPLE = (corners(4, 2).tensors[0],)
CALIBRATION = [(corners(4, seed).tensors[0],) for seed in range(8)]


class Mixed(nn.Module):
    """A recurrent layer between two linear ones, and a dict for an output."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 16), nn.GRU(16, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return {"scores": self.last(self.inner(functional.relu(self.first(x[:, 0])))[0][:, -1])}


def written(model, folder, method, skip=()):
    torch.manual_seed(0)
    model = model().eval()
    path = folder / "model.pt2"
    asked = request(folder, model, EXAMPLE, method, calibration=CALIBRATION, skip=skip)
    output, note = build.write_int8(asked, path)
    return model, path, output, profile.int8_layers(path, asked), note


def test_static_int8_is_computed_in_integers_and_stays_close(tmp_path):
    model, path, output, found, note = written(Corner, tmp_path, "static-int8")
    assert {name: p.runs_as for name, p in found.items()} == {
        "conv1": "int8", "bn1": "folded", "conv2": "int8", "head": "int8",
    }  # fmt: skip
    assert note == ""
    loaded = files.load(path, runtime="inductor")
    assert base.max_relative_error(output, loaded(*EXAMPLE)) < LOW_PRECISION_TOLERANCE
    with torch.inference_mode():
        wanted = model(*EXAMPLE)
    assert functional.cosine_similarity(wanted, loaded(*EXAMPLE)).min() > 0.99
    assert loaded(torch.rand(3, 1, 8, 8)).shape == (3, 4)


def test_the_file_holds_each_weight_once_and_in_integers(tmp_path):
    _, path, *_ = written(Corner, tmp_path, "static-int8", ["head"])
    state = torch.export.load(path).state_dict
    shapes = [(tuple(t.shape), t.dtype) for t in state.values() if t.dim() > 1]
    assert sorted(shapes, key=str) == [
        ((16, 1, 3, 3), torch.int8), ((16, 16, 3, 3), torch.int8), ((4, 64), torch.float32),
    ]  # fmt: skip


def test_what_is_skipped_or_has_no_integer_kernel_stays_in_float_and_says_why(tmp_path):
    _, _, _, found, _ = written(Mixed, tmp_path, "dynamic-int8", ["last"])
    assert {name: (p.runs_as, p.why) for name, p in found.items()} == {
        "first": ("int8", ""),
        "inner": ("float32", "inductor has no int8 GRU"),
        "last": ("float32", "in `skip`"),
    }


def test_integers_that_inductor_computes_in_float_are_not_called_int8(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "_forms", lambda packed: [])
    _, _, _, found, _ = written(Corner, tmp_path, "static-int8")
    assert {p.runs_as for p in found.values()} == {"float32", "folded"}


def test_a_model_that_torch_cannot_export_is_refused_with_the_remedy(tmp_path):
    class Counting(nn.Module):
        def forward(self, x):
            while bool(x.abs().sum() > 1):
                x = x * 0.5
            return x

    with pytest.raises(Unsupported, match=r"cannot quantize this model to static-int8 .* Use the torch runtime"):
        written(Counting, tmp_path, "static-int8")
