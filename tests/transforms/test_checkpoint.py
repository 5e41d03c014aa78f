import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import task as tiny_task
from torch import nn

from shrinkkit.core.run_folder import STRUCTURE
from shrinkkit.core.variant import History
from shrinkkit.errors import ModelFileError, Unsupported
from shrinkkit.transforms import checkpoint, prune

HISTORY = History("baseline", ({"prune-channels": {"ratio": 0.5}},), ("half",), {"head": "makes outputs"}, (0.5, 0.75))


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def pruned(task):
    return prune.channels(task.model, task.example, ratio=0.5, scope="layer", round_to=1)


@pytest.fixture(scope="module")
def saved(task, pruned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    checkpoint.save(folder, task, pruned, HISTORY)
    return folder


def test_a_pruned_model_is_rebuilt_exactly(saved, task, pruned):
    model, history = checkpoint.load(task, saved)
    assert history == HISTORY
    with torch.inference_mode():
        assert torch.equal(model(*task.example), pruned(*task.example))
    assert model.conv1.out_channels == 8
    assert task.model.conv1.out_channels == 16


def test_a_folder_without_a_pruned_model_is_refused(task, tmp_path):
    with pytest.raises(ModelFileError, match=STRUCTURE):
        checkpoint.load(task, tmp_path)


def test_a_pruned_model_of_another_task_is_refused(saved):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def forward(self, x):
            return self.fc(x.flatten(1))

    with pytest.raises(ModelFileError, match=r"does not fit the model of the task"):
        checkpoint.load(tiny_task(Other()), saved)


def rebuilt(task, folder, model):
    checkpoint.save(folder, task, model.eval(), HISTORY)
    return checkpoint.load(task, folder)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x.flatten(1)[:, : self.a.in_features])))


def test_tied_parameters_stay_tied_when_rebuilt(tmp_path):
    task = tiny_task(Tied())
    after = copy.deepcopy(task.model)
    after.a.weight = after.b.weight = nn.Parameter(torch.rand(4, 4))
    after.a.in_features = after.a.out_features = after.b.in_features = after.b.out_features = 4
    after.head = nn.Linear(4, 4)
    model = rebuilt(task, tmp_path, after)
    assert model.a.weight is model.b.weight
    assert torch.equal(model.a.weight, after.a.weight)
    assert json.loads((tmp_path / STRUCTURE).read_text())["layers"]["a"]["attributes"] == {
        "in_features": 4,
        "out_features": 4,
    }


class Odd(nn.Module):
    def forward(self, x):
        return x


def replaced(model, **layers):
    result = copy.deepcopy(model)
    for name, layer in layers.items():
        setattr(result, name, layer)
    return result


@pytest.mark.parametrize(
    "layers",
    [
        {"head": nn.Sequential(nn.Linear(64, 2, bias=False), nn.Linear(2, 4))},
        {"head": nn.Sequential(nn.Sequential(nn.Linear(64, 8), nn.GELU("tanh")), nn.Dropout(0.3), nn.Linear(8, 4))},
        {"bn1": nn.GroupNorm(4, 16, eps=1e-3)},
        {"bn1": nn.Identity()},
        {"conv2": nn.Sequential(nn.Conv2d(16, 16, 3, padding="same", groups=16), nn.Conv2d(16, 16, 1))},
        {"conv2": nn.Conv2d(16, 16, 5, padding=2, padding_mode="circular", bias=False)},
    ],
)
def test_layers_of_another_type_or_number_are_rebuilt_exactly(task, tmp_path, layers):
    after = replaced(task.model, **layers).eval()
    model = rebuilt(task, tmp_path, after)
    with torch.inference_mode():
        assert torch.equal(model(*task.example), after(*task.example))
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in after.named_modules()]
    assert not model.training


def test_a_rebuilt_model_of_other_layers_is_transformed_and_rebuilt_again(task, tmp_path):
    first = rebuilt(task, tmp_path / "a", replaced(task.model, head=nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))))
    again = rebuilt(task, tmp_path / "b", prune.channels(first, task.example, ratio=0.5, round_to=1))
    assert again.conv1.out_channels < 16


def test_a_layer_used_twice_is_one_layer_when_rebuilt(tmp_path):
    task = tiny_task(Tied())
    after = copy.deepcopy(task.model)
    after.a = after.b = nn.Linear(6, 6)
    model = rebuilt(task, tmp_path, after)
    assert model.a is model.b


def test_what_cannot_be_described_is_refused_before_anything_goes_on(task, tmp_path):
    after = replaced(task.model, bn1=Odd())
    with pytest.raises(Unsupported, match=r"`bn1` is a .*Odd"):
        checkpoint.save(tmp_path, task, after, HISTORY)
    changed = copy.deepcopy(task.model)
    changed.head.forward = lambda x: nn.functional.linear(x, changed.head.weight)
    with pytest.raises(Unsupported, match="its outputs"):
        checkpoint.save(tmp_path, task, changed, HISTORY)
    assert not (tmp_path / STRUCTURE).exists()


@pytest.mark.parametrize(
    "layer",
    [{"kind": "Module2"}, {"kind": "functional"}, {"same_as": "gone"}, {"attributes": {"gone": 3}}, {"kind": "Linear"}],
)
def test_a_damaged_description_is_refused(saved, task, tmp_path, layer):
    folder = shutil.copytree(saved, tmp_path / "copy")
    record = json.loads((folder / STRUCTURE).read_text())
    record["layers"]["head"] = layer
    (folder / STRUCTURE).write_text(json.dumps(record))
    with pytest.raises(ModelFileError, match="does not fit"):
        checkpoint.load(task, folder)


def test_weights_that_were_replaced_are_refused(saved, task, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    save_file({"head.bias": torch.zeros(4)}, folder / checkpoint.WEIGHTS)
    with pytest.raises(ModelFileError, match="is not the file"):
        checkpoint.load(task, folder)
