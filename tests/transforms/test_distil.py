"""Distillation: the loop of fine-tuning, with the original model's outputs as targets."""

import pytest
import torch
from small import sign_model, sign_task, signs
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from shrinkkit.core.stages import stage
from shrinkkit.errors import InvalidInput
from shrinkkit.tasks import fidelity
from shrinkkit.tasks.task import Task
from shrinkkit.transforms.transform import apply_stage

pytestmark = pytest.mark.usefixtures("one_thread")


def unlabelled(model, count=128):
    splits = {name: signs(count, seed).tensors[0] for seed, name in enumerate(("train", "validation", "test"))}
    return Task(model, (torch.randn(4, 1, 8, 8),), calibration=splits["train"], **splits)


def pruned(task):
    return apply_stage(task.model, task, stage("prune-weights", {"ratio": 0.9, "scope": "layer"}))[0]


def trained(model, task, name, **settings):
    return apply_stage(model, task, stage(name, {"epochs": 2} | settings))


def distance(model, task):
    inputs = signs(64, 9).tensors[0]
    with torch.no_grad():
        return float((model(inputs).softmax(1) - task.model(inputs).softmax(1)).square().mean())


def test_without_labels_it_equals_fine_tuning_on_the_outputs_of_the_original():
    task = unlabelled(sign_model())
    start = pruned(task)
    first, _ = trained(start, task, "fine-tune")
    second, _ = trained(start, task, "distil", temperature=1.0, features=0.0)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_with_labels_only_it_equals_fine_tuning():
    task = sign_task(sign_model(), train=64)
    start = pruned(task)
    first, _ = trained(start, task, "fine-tune")
    second, _ = trained(start, task, "distil", labels=1.0, features=0.0)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_labels_are_not_read_unless_asked_for():
    task = sign_task(sign_model(), train=64)
    silent = Task(**{**vars(task), "loss": lambda output, target: 1 / 0})
    start = pruned(task)
    model, history = trained(start, silent, "distil", epochs=10, learning_rate=1e-2)
    assert distance(model, task) < distance(start, task) / 2
    with pytest.raises(ZeroDivisionError):
        trained(start, silent, "distil", labels=0.1)
    assert "from outputs of the original, and of 3 layers inside" in history.notes[0]


def test_features_bring_the_layers_inside_closer():
    task = unlabelled(sign_model())
    start = pruned(task)
    inputs = signs(64, 9).tensors[0]

    def inside(model):
        with torch.no_grad():
            return float((model[:2](inputs) - task.model[:2](inputs)).square().mean())

    without, _ = trained(start, task, "distil", features=0.0, epochs=10, learning_rate=1e-2)
    with_features, _ = trained(start, task, "distil", features=5.0, epochs=10, learning_rate=1e-2)
    assert inside(with_features) < 0.8 * inside(without)


def test_layers_of_another_shape_are_not_compared():
    task = unlabelled(sign_model())
    settings = {"ratio": 0.5, "scope": "layer", "round_to": 1}
    narrow, _ = apply_stage(task.model, task, stage("prune-channels", settings))
    _, history = trained(narrow, task, "distil")
    # The last layer has as many outputs as before; convolution and normalisation have half.
    assert "of 1 layers inside" in history.notes[0]


def test_outputs_that_are_no_classes_are_compared_by_their_relative_square():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1)).eval()
    data = TensorDataset(torch.randn(256, 4), torch.zeros(256))
    task = Task(model, (torch.randn(4, 4),), inputs=data)
    start, _ = apply_stage(model, task, stage("prune-weights", {"ratio": 0.5, "scope": "layer"}))
    result, _ = trained(start, task, "distil", epochs=20, learning_rate=1e-2)
    inputs = torch.randn(64, 4)
    with torch.no_grad():
        errors = [float((one(inputs) - model(inputs)).square().mean()) for one in (start, result)]
    assert errors[1] < errors[0] / 2


def test_the_temperature_divides_logits_and_keeps_the_size_of_gradients():
    torch.manual_seed(0)
    output, target = torch.randn(6, 5), torch.randn(6, 5)
    loss = fidelity.distillation(["agreement"], temperature=3.0)(output, target)
    p, q = (functional.softmax(x / 3, 1) for x in (target, output))
    torch.testing.assert_close(loss, 9 * (p * (p.log() - q.log())).sum(1).mean())


def test_a_model_without_float_outputs_is_refused():
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = sign_model()

        def forward(self, x):
            return self.inner(x).argmax(1)

    task = sign_task(Classes().eval(), train=64)
    with pytest.raises(InvalidInput, match="an output of floats"):
        trained(task.model, task, "distil")
