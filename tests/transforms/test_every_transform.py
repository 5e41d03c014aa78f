"""What every built-in transform must do: be rebuilt without pickle, and reach every runtime, in int8 too."""

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional

from shrinkkit.core.stages import TRANSFORMS, stage
from shrinkkit.core.variant import History
from shrinkkit.transforms import variants
from shrinkkit.transforms.transform import apply_stage

RUNTIMES = ("torch", "onnxruntime", "openvino")
SETTINGS = {
    "prune-channels": {"ratio": 0.5},
    "prune-weights": {"ratio": 0.5},
    "factorize": {"ratio": 0.3},
    "fine-tune": {"epochs": 1},
    "distil": {"epochs": 1},
    "drop-blocks": {"count": 1},
    "equalize": {},
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return x + self.conv2(functional.relu(self.norm(self.conv1(x))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x):
        x = self.blocks(functional.relu(self.stem(x)))
        return self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return tiny.task(Residual())


def test_all_of_them_follow_each_other(task, tmp_path):
    model, history = task.model, History("baseline")
    order = ["drop-blocks", "equalize", "prune-channels", "factorize", "prune-weights", "fine-tune", "distil"]
    assert sorted(order) == sorted(TRANSFORMS)
    for name in order:
        model, history = apply_stage(model, task, stage(name, SETTINGS[name]), history=history)
    record = variants.write_stage(tmp_path, "all", task, model, runtimes=["onnxruntime"], history=history)
    assert record.stages == tuple(order)
    assert record.refusals == {}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_reaches_every_runtime_and_is_rebuilt_from_its_folder(name, task, tmp_path):
    model, history = apply_stage(task.model, task, stage(name, SETTINGS[name]))
    record = variants.write_stage(tmp_path, name, task, model, runtimes=RUNTIMES, history=history)
    assert record.refusals == {}
    assert {file.runtime for file in record.files} == set(RUNTIMES)
    rebuilt, history = variants.source(tmp_path, name, task)
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt(*task.example), model(*task.example))
    folder = tmp_path / "variants" / "int8"
    record = variants.write(folder, task, rebuilt, runtimes=RUNTIMES, precision="static-int8", history=history)
    assert record.refusals == {}
