import json

import pytest
import torch
from tiny import task as tiny_task
from torch import nn

from shrinkkit.errors import ModelFileError
from shrinkkit.transforms import checkpoint, prune
from shrinkkit.transforms.checkpoint import STRUCTURE


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def pruned(task):
    return prune.channels(task.model, task.example, ratio=0.5, scope="layer", round_to=1)


@pytest.fixture(scope="module")
def saved(task, pruned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    checkpoint.save(folder, task.model, pruned)
    return folder


def test_a_pruned_model_is_rebuilt_exactly(saved, task, pruned):
    model = checkpoint.rebuild(task, saved)
    with torch.inference_mode():
        assert torch.equal(model(*task.example), pruned(*task.example))
    assert model.conv1.out_channels == 8
    assert task.model.conv1.out_channels == 16


def test_a_folder_without_a_pruned_model_is_refused(task, tmp_path):
    with pytest.raises(ModelFileError, match=r"must hold a pruned variant"):
        checkpoint.rebuild(task, tmp_path)


def test_a_pruned_model_of_another_task_is_refused(saved):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def forward(self, x):
            return self.fc(x.flatten(1))

    with pytest.raises(ModelFileError, match=r"does not fit the model of the task"):
        checkpoint.rebuild(tiny_task(Other()), saved)


def test_tied_parameters_stay_tied_when_rebuilt(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

    before, after = Tied(), Tied()
    after.a.weight = after.b.weight = nn.Parameter(torch.rand(4, 4))
    after.a.in_features = after.a.out_features = after.b.in_features = after.b.out_features = 4
    checkpoint.save(tmp_path, before, after)
    task = type("T", (), {"model": before, "name": "tied"})()
    rebuilt = checkpoint.rebuild(task, tmp_path)
    assert rebuilt.a.weight is rebuilt.b.weight
    assert torch.equal(rebuilt.a.weight, after.a.weight)
    assert json.loads((tmp_path / STRUCTURE).read_text())["a"] == {"in_features": 4, "out_features": 4}
