"""My task: the model to compress, its data, and how results are scored.

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
    """Return the task; every step of a run calls this again, so return the same task each time."""
    # 1. Data: map-style datasets of (inputs, target). No example may be in two splits.
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    rest, test = train_test_split(range(len(labels)), test_size=400, random_state=0, stratify=labels)
    rest, validation = train_test_split(rest, test_size=150, random_state=0)
    train, calibration = train_test_split(rest, test_size=100, random_state=0)

    # 2. Model: build yours, then load its trained weights:
    #    model.load_state_dict(torch.load(Path(__file__).with_name("weights.pt"), map_location="cpu"))
    model = trained_here(images[train], labels[train])

    return Task(
        name="my-task",
        model=model.eval(),
        example=(images[calibration][:8],),  # a tuple of inputs; latency is measured at this batch size
        train=TensorDataset(images[train], labels[train]),  # for fine-tuning
        calibration=TensorDataset(images[calibration], labels[calibration]),  # for the ranges of static int8
        validation=TensorDataset(images[validation], labels[validation]),  # for choosing between variants
        test=TensorDataset(images[test], labels[test]),  # for the report's accuracy only
        score=score,
        loss=functional.cross_entropy,  # 3. Loss: (output, targets) -> a scalar that fine-tuning minimises
        metric="accuracy",  # name of the score in the report
        class_names=tuple("0123456789"),  # omit it if there are no classes
    )


def score(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """4. Score: one number per example, higher is better. Here 1 if the prediction is right, else 0."""
    return (output.argmax(dim=1) == target).float()


def trained_here(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """Return a small network trained in a second or two, so that this file runs; you will not need it."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for batch in torch.randint(len(labels), (120, 64)):
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(images[batch]), labels[batch]))
        optimizer.step()
    return model
