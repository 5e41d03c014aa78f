"""Fidelity: how far a model's outputs agree with those of the original, as a score and as a loss."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shrinkkit.tasks import outputs
from shrinkkit.tasks.calls import PRESENT
from shrinkkit.tasks.metrics import Metric


def kinds(output: Any, names: Sequence[str], *, is_classifier: bool) -> list[str]:
    """Return how each tensor of an output is compared with the original's: `agreement`, `cosine`, `error` or ``.

    Tensors called `logits`, probabilities, and the first output of a classifier are classes (top-1 agreement), unless
    all inputs give the same one. Single numbers are compared by their error, integers and caches not at all, all other
    outputs by the cosine.
    """
    result = []
    for number, (name, y) in enumerate(zip(names, outputs.tensors(output), strict=True)):
        last = y.shape[-1] if y.dim() > 1 else 1
        rows = y.reshape(-1, last).double()
        probabilities = bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() < 1e-3).all())
        if not y.is_floating_point() or name.startswith(f"{PRESENT}."):
            result.append("")
            continue
        classes = "logits" in name or probabilities or (number == 0 and is_classifier)
        if last > 1 and classes and bool((rows.argmax(1) != rows[0].argmax()).any()):
            result.append("agreement")
        else:
            result.append("cosine" if y[0].numel() > 1 else "error")
    return result


def score(compared: Sequence[str]) -> Metric:
    """Return a metric of outputs against the original's: the mean over tensors of each one's measure.

    1 is equality. An output that has nothing in common with the original's has about 0, which is what can be lost.
    """
    titles = {"agreement": "top-1 agreement", "cosine": "cosine similarity", "error": "1 - relative error"}
    used = dict.fromkeys(titles[kind] for kind in compared if kind)
    name, percent = " and ".join(used) + " with the original", set(compared) <= {"agreement", ""}

    def mean(output: Any, target: Any) -> Tensor:
        pairs = zip(compared, outputs.tensors(output), outputs.tensors(target), strict=True)
        return torch.stack([_MEASURES[kind](y, wanted) for kind, y, wanted in pairs if kind]).mean(0)

    return Metric(mean, name, range=(0.0, 1.0), per_example=True, percent=percent)


def _agreement(y: Tensor, wanted: Tensor) -> Tensor:
    return (y.argmax(-1) == wanted.argmax(-1)).float().flatten(1 if y.dim() > 2 else 0).reshape(len(y), -1).mean(1)


def _cosine(y: Tensor, wanted: Tensor) -> Tensor:
    return torch.cosine_similarity(y.flatten(1).double(), wanted.flatten(1).double(), eps=1e-30)


def _relative_error(y: Tensor, wanted: Tensor) -> Tensor:
    size = wanted.double().abs().reshape(len(y), -1).amax(1).clamp(min=1e-30)
    error = (y.double() - wanted.double()).abs().reshape(len(y), -1).amax(1) / size
    return 1 - error.clamp(max=1)


_MEASURES = {"agreement": _agreement, "cosine": _cosine, "error": _relative_error}


def distillation(compared: Sequence[str], *, temperature: float = 1.0) -> Callable[[Any, Any], Tensor]:
    """Return a loss of outputs against the original's: the Kullback-Leibler divergence of classes, and the squared
    error of other outputs relative to their variance.

    Logits are divided by `temperature`, and their divergence multiplied by its square, so that gradients keep their
    size; above 1, what the original says of unlikely classes counts more.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    """

    def loss(output: Any, target: Any) -> Tensor:
        parts = []
        for kind, y, wanted in zip(compared, outputs.tensors(output), outputs.tensors(target), strict=True):
            if kind == "agreement":
                flat, classes = y.flatten(0, -2), wanted.flatten(0, -2)
                logs, originals = (nn.functional.log_softmax(x / temperature, -1) for x in (flat, classes))
                divergence = nn.functional.kl_div(logs, originals, reduction="batchmean", log_target=True)
                parts.append(divergence * temperature**2)
            elif kind:
                parts.append(relative_square(y, wanted))
        return torch.stack(parts).sum()

    return loss


def relative_square(y: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error relative to the variance of `wanted`."""
    return nn.functional.mse_loss(y, wanted) / wanted.var(correction=0).clamp(min=1e-12)
