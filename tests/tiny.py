"""A small real task for the tests: images of a bright corner, and a small network that finds it."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from shrinkkit import Task


class Corner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16 * 4, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.conv2(x)), 2).flatten(1))


def corners(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 8, 8, generator=generator)
    y = torch.randint(0, 4, (count,), generator=generator)
    for image, label in zip(x, y.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 1
    return TensorDataset(x, y)


def score(output, target):
    return (output.argmax(1) == target).float()


def task(model=None, batch=4):
    """Return the task; its model is trained for a moment, so that accuracy is above chance."""
    torch.manual_seed(0)
    train = corners(128, 1)
    model = model or Corner()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(train.tensors[0]), train.tensors[1]).backward()
        optimizer.step()
    return Task(
        name="corner",
        model=model.eval(),
        example=(corners(batch, 2).tensors[0],),
        train=train,
        calibration=corners(32, 3),
        validation=corners(30, 4),
        test=corners(42, 5),
        score=score,
        loss=F.cross_entropy,
        class_names=("top left", "top right", "bottom left", "bottom right"),
    )
