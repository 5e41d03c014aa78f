"""Tasks as users write them: small files, some of which break a rule."""

import sys

TASK = """
import json, os, sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from shrinkkit import Task

HERE = Path(__file__).parent
{head}

def split(seed, n=40):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


class Each(Dataset):
    def __init__(self, of, change):
        self.of, self.change = of, change

    def __len__(self):
        return len(self.of)

    def __getitem__(self, i):
        return self.change(i, *self.of[i])


def network():
    model = nn.Linear(6, 3, bias=False)
    model.weight.data.copy_(torch.eye(3, 6))
    return model


def score(output, target):
    return (output.argmax(1) == target).float()


def task():
    of = dict(
        name="small", model=network().eval(), example=(split(9, 4).tensors[0],), train=split(1), calibration=split(2),
        validation=split(3), test=split(4), score=score, loss=nn.functional.cross_entropy,
    )
{body}
    return Task(**of)
"""


def write(folder, *, head="", body="", name="small.py"):
    """Write a task that is always right, but for what `head` and `body` change, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(TASK.format(head=head, body="".join(f"    {line}\n" for line in body.splitlines())))
    return path


def forget(folder):
    """Forget the modules that were imported from `folder`."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
