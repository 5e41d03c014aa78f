"""Small models and data that several tests use."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from shrinkkit.tasks.task import Task


def classifier():
    """Return a model that gives the largest of the first three of six numbers."""
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.copy_(3 * torch.eye(3, 6))
        model.bias.zero_()
    return model.eval()


def padded(examples):
    """Return sequences of numbers as one batch of the longest length, and a mask of what is no padding."""
    length = max(map(len, examples))
    ids = torch.stack([torch.cat([x, x.new_zeros(length - len(x))]) for x in examples])
    return {"ids": ids, "mask": torch.stack([(torch.arange(length) < len(x)).float() for x in examples])}


def signs(count, seed):
    """Return images, and whether the mean of each is above 0."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    return TensorDataset(inputs, (inputs.mean((1, 2, 3)) > 0).long())


def sign_model():
    """Return an untrained network for `signs`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(8 * 64, 2),
    ).eval()


def sign_task(model, train=65):
    """Return a task of `signs` with labels."""
    return Task(
        name="sign-of-the-mean",
        model=model,
        example=(torch.randn(4, 1, 8, 8),),
        train=signs(train, 1),
        calibration=signs(8, 2),
        validation=signs(64, 3),
        test=signs(8, 4),
        score=lambda output, target: (output.argmax(1) == target).float(),
        loss=functional.cross_entropy,
    )
