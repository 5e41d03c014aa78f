"""The task: a trained model, its data in four splits, a score and a loss."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, Table, facts
from shrinkkit.errors import InvalidInput
from shrinkkit.tasks.modules import Example


def task_table(of: "Task") -> Table:
    """Return what a task consists of: model, inputs, splits and metric."""
    known = of.to_dict()
    inputs = ", ".join(f"{tuple(one['shape'])} {one['dtype']}" for one in known["inputs"])
    pairs = [
        ("model", known["model"]),
        ("parameters", formats.count(known["parameters"])),
        ("inputs of one call", inputs),
        ("examples", ", ".join(f"{count:,} {split}" for split, count in known["examples"].items())),
        ("metric", of.metric),
        ("classes", ", ".join(of.class_names)),
    ]
    return facts(f"Task {of.name}", pairs)


SPLITS = ("train", "calibration", "validation", "test")


@dataclass(frozen=True, eq=False, repr=False)
class Task(Rich):
    """A trained model together with the data and the functions that judge it.

    Each split is a map-style dataset of `(inputs, target)`: one example without a batch
    dimension, where `inputs` is a tensor, or a tuple of tensors for a model of several inputs.
    """

    name: str
    model: nn.Module
    """Trained, in eval mode, on the CPU. Steps work on copies."""
    example: Example
    """A batch, as `model(*example)`; its batch size is the one that latency is measured at."""
    train: Dataset[Any]
    calibration: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    score: Callable[[Any, Any], torch.Tensor]
    """(output, targets of a batch) -> one score per example, shape (batch,), higher is better."""
    loss: Callable[[Any, Any], torch.Tensor]
    """(output, targets of a batch) -> scalar that fine-tuning minimises."""
    metric: str = "accuracy"
    """What `score` is called in tables and pictures."""
    class_names: tuple[str, ...] = ()

    def shown(self) -> Shown:
        """Return what it consists of: model, inputs, splits and metric."""
        return task_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Return what it consists of, without tensors, data and functions."""
        return {
            "name": self.name,
            "model": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "inputs": [{"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for x in self.example],
            "examples": {split: len(getattr(self, split)) for split in SPLITS},
            "metric": self.metric,
            "class_names": list(self.class_names),
        }


def batches(dataset: Dataset[Any], batch_size: int) -> Iterator[tuple[Example, Any]]:
    """Yield `(inputs, targets)` of consecutive examples in order; the last batch may be smaller.

    Args:
        dataset: Map-style dataset of `(inputs, target)`.
        batch_size: Examples per batch, at least 1.

    Yields:
        Inputs as a tuple of tensors, batch first, and the targets as `default_collate` stacks them.

    Raises:
        InvalidInput: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise InvalidInput(f"`batch_size` must be at least 1, got {batch_size}.")
    size = len(dataset)  # type: ignore[arg-type]
    for start in range(0, size, batch_size):
        yield collated([dataset[i] for i in range(start, min(start + batch_size, size))])


def spaced(size: int, most: int) -> list[int]:
    """Return the numbers below `size`, or `most` of them, evenly spaced."""
    return list(range(size)) if size <= most else [i * size // most for i in range(most)]


def collated(examples: Sequence[Any]) -> tuple[Example, Any]:
    """Return (inputs, target) pairs stacked to one batch."""
    inputs, target = default_collate(list(examples))
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), target
