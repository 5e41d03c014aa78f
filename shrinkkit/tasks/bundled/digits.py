"""Handwritten digits as tasks for three kinds of model: 1797 real images of scikit-learn, 8x8, ten classes.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from shrinkkit.errors import require
from shrinkkit.tasks.bundled.models import CNN, LSTM, Transformer
from shrinkkit.tasks.task import SPLITS, Task

WEIGHTS = Path(__file__).with_name("weights")

SIZES = {"train": 747, "calibration": 100, "validation": 150, "test": 800}
"""Examples of each split; together all 1797."""

BATCH_SIZE = 8

_SPLIT_SEED = 0
_MEAN, _STD = 0.305, 0.376


@cache
def splits() -> dict[str, tuple[Tensor, Tensor]]:
    """Return (images, labels) of each split: images (n, 1, 8, 8) in [0, 1], labels (n,) int64.

    Stratified: every split has the classes in the same shares. No two images of the set are equal.
    """
    load_digits = require("sklearn.datasets", extra="bundled", purpose="A bundled task").load_digits
    train_test_split = require("sklearn.model_selection", extra="bundled", purpose="A bundled task").train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    rest, parts = list(range(len(labels))), {}
    for split in reversed(SPLITS):
        if len(rest) == SIZES[split]:
            parts[split] = (images[rest], labels[rest])
            break
        strata = labels[rest].numpy()
        rest, chosen = train_test_split(rest, test_size=SIZES[split], random_state=_SPLIT_SEED, stratify=strata)
        parts[split] = (images[chosen], labels[chosen])
    return parts


def enlarge(images: Tensor) -> Tensor:
    """Return `images`, (n, 1, 8, 8), bilinearly upsampled to (n, 1, 32, 32)."""
    return functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)


def as_images(images: Tensor) -> Tensor:
    """Return `images`, (n, 1, 32, 32) in [0, 1], normalised with the mean and deviation of the whole set."""
    return (images - _MEAN) / _STD


def as_rows(images: Tensor) -> Tensor:
    """Return `images`, (n, 1, 32, 32), normalised, as sequences of their 32 rows, (n, 32, 32)."""
    return as_images(images).squeeze(1)


def as_patches(images: Tensor) -> Tensor:
    """Return `images`, (n, 1, 32, 32), normalised, as 64 patches of 4x4 pixels, (n, 64, 16)."""
    return functional.unfold(as_images(images), kernel_size=4, stride=4).transpose(1, 2).contiguous()


MODELS: dict[str, tuple[type[nn.Module], Callable[[Tensor], Tensor]]] = {
    "digits-cnn": (CNN, as_images),
    "digits-lstm": (LSTM, as_rows),
    "digits-transformer": (Transformer, as_patches),
}
"""The model of each task, and what makes its inputs from images of 32x32."""


def task(name: str) -> Task:
    """Return the bundled task `name`, one of the keys of `MODELS`, with its trained weights."""
    model_type, prepare = MODELS[name]
    model = model_type()
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return untrained(name, model.eval(), prepare)


def untrained(name: str, model: nn.Module, prepare: Callable[[Tensor], Tensor]) -> Task:
    """Return a task around `model` as it is; to get the trained one see `task`."""
    parts = splits().items()
    data: dict[str, Any] = {split: TensorDataset(prepare(enlarge(images)), labels) for split, (images, labels) in parts}
    return Task(
        name=name,
        model=model,
        example=(data["calibration"].tensors[0][:BATCH_SIZE].clone(),),
        score=correct,
        loss=functional.cross_entropy,
        class_names=tuple("0123456789"),
        **data,
    )


def correct(output: Tensor, target: Tensor) -> Tensor:
    """Return, of shape (batch,), 1.0 where the largest of `output`, (batch, classes), is at `target`, else 0.0."""
    return (output.argmax(-1) == target).float()
