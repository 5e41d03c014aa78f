import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from shrinkkit.core import stages
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import batchnorm, finetune, transform

pytestmark = pytest.mark.usefixtures("one_thread")


class Frozen(nn.Module):
    """BatchNorm whose statistics and weights are buffers, as in detectors."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(1, 16, 3, padding=1), norm(16)
        self.c2, self.n2 = nn.Conv2d(16, 16, 3, padding=1), norm(16)
        self.head = nn.Linear(16, 2)

    def train(self, mode=True):
        super().train(mode)
        self.n1.eval()
        return self

    def forward(self, x):
        x = functional.relu(self.n1(self.c1(x)))
        return self.head(functional.relu(self.n2(self.c2(x))).mean((2, 3)))


def dataset(count, seed):
    inputs = 3 + 2 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs.mean((1, 2, 3)) > 3).long())


def task_of(model, train=128):
    splits = {"train": dataset(train, 1), "calibration": dataset(8, 2), "validation": dataset(64, 3)}
    return Task(
        name="sign", model=model, example=(torch.randn(4, 1, 8, 8),), test=dataset(8, 4), **splits,
        score=lambda output, target: (output.argmax(1) == target).float(), loss=functional.cross_entropy,
    )  # fmt: skip


def made(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return Net(norm).eval()


def activations(model, task):
    """Return mean and variance of what the second normalisation reads, over the training split."""
    inputs = task.train.tensors[0]
    x = functional.relu(model.n1(model.c1(inputs)))
    x = model.c2(x).transpose(0, 1).flatten(1)
    return x.mean(1), x.var(1)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, momentum=0.0), lambda c: nn.BatchNorm2d(c, momentum=None), Frozen],
    ids=["momentum 0.1", "momentum 0", "cumulative", "frozen"],
)
def test_statistics_become_those_of_the_model_and_nothing_else_changes(norm):
    model = made(norm)
    task, weights = task_of(model), copy.deepcopy(dict(model.named_parameters()))
    before = {name: vars(module).get("momentum") for name, module in model.named_modules()}
    assert "128 training examples" in batchnorm.reestimate(model, task)
    with torch.no_grad():
        mean, var = activations(model, task)
    torch.testing.assert_close(model.n2.running_mean, mean, rtol=0.02, atol=0.01)
    torch.testing.assert_close(model.n2.running_var, var, rtol=0.1, atol=0.01)
    assert {name: vars(module).get("momentum") for name, module in model.named_modules()} == before
    assert not any(module.training or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_models_without_statistics_are_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()).eval()
    assert batchnorm.reestimate(model, task_of(model)) == ""


@pytest.mark.parametrize("stage", ["prune-channels", "prune-weights"])
def test_a_pruned_model_without_fine_tuning_has_its_own_statistics(stage):
    model = made(lambda channels: nn.BatchNorm2d(channels, momentum=0.0))
    task = task_of(model)
    batchnorm.reestimate(model, task)
    pruned, history = transform.apply_stage(model, task, stages.stage(stage, {"ratio": 0.5}))
    with torch.no_grad():
        mean, _ = activations(pruned, task)
    torch.testing.assert_close(pruned.n2.running_mean, mean, rtol=0.02, atol=0.01)
    assert any("BatchNorm statistics" in note for note in history.notes)


def test_fine_tuning_recovers_a_model_whose_momentum_is_zero():
    torch.manual_seed(0)
    model = made(lambda channels: nn.BatchNorm2d(channels, momentum=0.0))
    result = finetune.run(model, task_of(model, train=512), epochs=6, learning_rate=1e-2)
    assert result.validation_scores[-1] > 0.9
    assert result.model.n2.momentum == 0.0
