"""The task: a trained model, its data in four splits, a score and a loss."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, facts
from shrinkkit.errors import InvalidInput
from shrinkkit.tasks.modules import Example

SPLITS = ("train", "calibration", "validation", "test")


@dataclass(frozen=True, eq=False, repr=False)
class Task(Rich):
    """A trained model with its data, score and loss.

    Each split is a map-style dataset of `(inputs, target)`: one example without a batch dimension, where `inputs` is a
    tensor, or a tuple of tensors for a model of several inputs. `check_task` checks all rules.
    """

    name: str
    model: nn.Module
    """Trained, in eval mode, on the CPU. Steps work on copies."""
    example: Example
    """A batch, as in `model(*example)`; latency is measured at its batch size."""
    train: Dataset[Any]
    calibration: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    score: Callable[[Any, Any], torch.Tensor]
    """(output, targets) of a batch -> one score per example, shape (batch,); higher is better."""
    loss: Callable[[Any, Any], torch.Tensor]
    """(output, targets) of a batch -> scalar tensor that fine-tuning minimises."""
    metric: str = "accuracy"
    """Name of `score` in tables and figures."""
    class_names: tuple[str, ...] = ()

    def shown(self) -> Shown:
        """Return a table of model, inputs, splits and metric."""
        facts_of = self.to_dict()
        inputs = ", ".join(f"{tuple(one['shape'])} {one['dtype']}" for one in facts_of["inputs"])
        pairs = [
            ("model", facts_of["model"]),
            ("parameters", formats.count(facts_of["parameters"])),
            ("inputs of one call", inputs),
            ("examples", ", ".join(f"{count:,} {split}" for split, count in facts_of["examples"].items())),
            ("metric", self.metric),
            ("classes", ", ".join(self.class_names)),
        ]
        return facts(f"Task {self.name}", pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return names, shapes and sizes, without tensors, data and functions."""
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
    """Yield `(inputs, targets)` of consecutive examples, inputs as a tuple; the last batch may be smaller."""
    if batch_size < 1:
        raise InvalidInput(f"`batch_size` must be at least 1, got {batch_size}.")
    size = len(dataset)  # type: ignore[arg-type]
    for start in range(0, size, batch_size):
        yield collated([dataset[i] for i in range(start, min(start + batch_size, size))])


def spaced(size: int, most: int) -> list[int]:
    """Return the indices below `size`, or `most` of them, evenly spaced."""
    return list(range(size)) if size <= most else [i * size // most for i in range(most)]


def collated(examples: Sequence[Any]) -> tuple[Example, Any]:
    """Return (inputs, target) pairs stacked into one batch."""
    inputs, target = default_collate(list(examples))
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), target
