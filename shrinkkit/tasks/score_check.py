"""What every verdict relies on in a user's score: one real number per example, by its own output and target."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shrinkkit.core import estimate
from shrinkkit.errors import InvalidTask
from shrinkkit.tasks import outputs
from shrinkkit.tasks.usercode import blaming

Score = Callable[[Any, Any], torch.Tensor]
LARGEST = 1e9
"""Of the absolute values of scores: beyond it, differences are lost in a mean."""
_SMALL = (torch.int8, torch.uint8, torch.int16)


def of(score: Score, output: Any, target: Any, size: int, where: str) -> torch.Tensor:
    """Return the scores of a batch as float64, of shape (size,).

    Raises:
        InvalidTask: `score` raises an error, returns something else than one finite real number per example, or
            returns another one when asked twice.
    """
    with blaming(f"`score` must accept the output and targets of {where}"), torch.inference_mode():
        found, again = score(output, target), score(output, target)
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != (size,):
        got = f"shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise InvalidTask(
            f"`score` must return one score per example, a tensor of shape ({size},) for {where}, got {got}. "
            "Leave out the mean over the batch, and reduce all other dimensions."
        )
    if found.is_complex() or found.device.type != "cpu" or found.is_quantized:
        raise InvalidTask(
            f"`score` must return real numbers on the CPU, got {str(found.dtype).removeprefix('torch.')} on "
            f"{found.device}. Take the absolute value or the real part."
        )
    if found.dtype in _SMALL and not bool(((found == 0) | (found == 1)).all()):
        raise InvalidTask(
            f"`score` must return numbers that cannot overflow, but {str(found.dtype).removeprefix('torch.')} ends at "
            f"{torch.iinfo(found.dtype).max}. Return `.float()`, before anything is multiplied."
        )
    values = found.double()
    if not bool(torch.isfinite(values).all()):
        raise InvalidTask(
            f"`score` must be finite for every example, but on {where} it is not. "
            "Give a finite score where it is undefined."
        )
    if not bool((values.abs() <= LARGEST).all()):
        raise InvalidTask(
            f"`score` must lie within ±{LARGEST:g}, got {values.abs().max():g} on {where}. Use a smaller unit; "
            "an integer of that size has overflowed."
        )
    if not isinstance(again, torch.Tensor) or not torch.equal(values, again.double()):
        raise InvalidTask(
            f"`score` must give the same scores for the same outputs and targets, but two calls on {where} differ. "
            "Leave out what is random, what it keeps from call to call, and in-place changes of its arguments."
        )
    return values


def zeroed(score: Score, output: Any, target: Any, size: int) -> torch.Tensor:
    """Return the scores of a model that outputs nothing but zeros; -inf where they are undefined."""
    undefined = torch.full((size,), -math.inf, dtype=torch.float64)
    try:
        with torch.inference_mode():
            found = score(outputs.convert(output, torch.zeros_like), target).double().reshape(size)
    except Exception:  # a user's score may raise anything for such an output
        return undefined
    return torch.where(torch.isfinite(found), found, undefined)


def check_alone(together: torch.Tensor, alone: torch.Tensor) -> None:
    """Return if the scores of the same examples do not depend on the batch they are in; some may round otherwise.

    Args:
        together: Scores of examples within larger batches, (n,).
        alone: Of the same examples in smaller ones.

    Raises:
        InvalidTask: More than a fifth of them differ.
    """
    differ = (together - alone).abs() > 1e-3 * together.abs().clamp(min=1.0)
    if int(differ.sum()) > max(1, len(differ) // 5):
        raise InvalidTask(
            f"`score` must not depend on the rest of a batch, but {int(differ.sum())} of {len(differ)} examples have "
            "another score in a smaller one. Take no mean, rank or share over the batch."
        )


def check_above_chance(real: torch.Tensor, others: torch.Tensor, zeros: torch.Tensor) -> None:
    """Return if the model's own answers are worth more than answers to other examples, and than zeros.

    Args:
        real: Score of each example by its own target, (n,).
        others: The same outputs scored by the targets of others, (n, several).
        zeros: Outputs of nothing but zeros, scored by the example's own target, (n,).

    Raises:
        InvalidTask: They are not.
    """
    own, by_others = real.numpy(), others.numpy()
    remedy = "Check the score function, the labels and their order, and that the model's weights are loaded."
    if not (by_others != own[:, None]).any() and bool((real == zeros).all()):
        raise InvalidTask(
            f"`score` must depend on the outputs, but each of {len(own)} examples has the same score, {_range(own)}, "
            f"by another's target and with outputs of zeros. {remedy}"
        )
    # Whether there is any gain at all, not how much might be lost on examples not seen.
    gained = estimate.mean((own - by_others.mean(axis=1)).tolist())
    if not gained.low > 0:
        raise InvalidTask(
            f"The model must score above chance, but over {len(own)} examples its mean score is {own.mean():.4g}, and "
            f"{by_others.mean():.4g} by the targets of other examples (difference {gained.value:.4g}, 95 % interval "
            f"{gained.low:.4g} to {gained.high:.4g}). {remedy}"
        )
    if not own.mean() > zeros.numpy().mean():
        raise InvalidTask(
            f"The model must score above outputs of nothing but zeros, but its mean score is {own.mean():.4g}, theirs "
            f"{zeros.mean():.4g}. {remedy}"
        )


def _range(values: NDArray[np.float64]) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
