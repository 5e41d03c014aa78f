"""My task: the model to make smaller and faster, and how to judge what comes out.

This file runs as it is: `shrinkkit run my_task.py`. Replace the four numbered parts with your own.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from shrinkkit import Task


def task() -> Task:
    """Return the task; every step of a run calls this anew, so let it give the same each time."""
    # 1. Data. Any map-style dataset of (inputs, target) will do; an example must not be in two splits.
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    rest, test = train_test_split(range(len(labels)), test_size=400, random_state=0, stratify=labels)
    rest, validation = train_test_split(rest, test_size=150, random_state=0)
    train, calibration = train_test_split(rest, test_size=100, random_state=0)

    # 2. Model. Yours is trained already: build it, then
    #    model.load_state_dict(torch.load(Path(__file__).with_name("weights.pt"), map_location="cpu"))
    model = trained_here(images[train], labels[train])

    return Task(
        name="my-task",
        model=model.eval(),
        example=(images[calibration][:8],),  # a tuple of inputs; speed is measured at this batch size
        train=TensorDataset(images[train], labels[train]),  # fine-tuning learns from it
        calibration=TensorDataset(images[calibration], labels[calibration]),  # static int8 finds its ranges on it
        validation=TensorDataset(images[validation], labels[validation]),  # choices are made on it
        test=TensorDataset(images[test], labels[test]),  # the report's accuracy comes from it, and nothing else does
        score=score,
        loss=functional.cross_entropy,  # 3. Loss: (output, target) -> one number that fine-tuning makes smaller.
        metric="accuracy",  # what the report calls your score
        class_names=tuple("0123456789"),  # leave it out where there are no classes
    )


def score(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """4. Score: one number per example, higher is better. Here 1 for a right answer, 0 for a wrong one."""
    return (output.argmax(dim=1) == target).float()


def trained_here(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """Return a small network trained within a second or two, so that this file runs; you will not need it."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for batch in torch.randint(len(labels), (120, 64)):
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(images[batch]), labels[batch]))
        optimizer.step()
    return model
