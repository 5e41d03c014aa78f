"""Zeros within each layer: chosen on calibration data by Wanda or SparseGPT, or in an N:M pattern by any criterion."""

from collections.abc import Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor, nn

from shrinkkit.core.stages import BY_DATA, PruneWeights
from shrinkkit.progress import Progress
from shrinkkit.tasks.modules import Example
from shrinkkit.transforms import moments

DAMPING = 0.01
"""Added to the second moment of each input, as a share of their mean, before SparseGPT inverts the moments."""
BLOCK = 128
"""Inputs whose weights SparseGPT selects together."""


def refusals(model: nn.Module, names: Sequence[str], pattern: tuple[int, int] | None) -> dict[str, str]:
    """Return why layers cannot be pruned by this module, by name; known without any data."""
    why = {}
    for name in names:
        layer = model.get_submodule(name)
        if not moments.is_covered(layer):
            why[name] = "is neither Linear nor Conv2d, the layers that data and patterns can prune"
        elif pattern and (inputs := len(order_of(layer)) // _positions(layer)) % pattern[1]:
            why[name] = f"has {inputs} inputs for each output, which {pattern[1]} does not divide"
    return why


@torch.no_grad()
def prune(
    model: nn.Module,
    result: nn.Module,
    shares: Mapping[str, float],
    values: Mapping[str, Tensor],
    settings: PruneWeights,
    inputs: Sequence[Example],
    progress: Progress,
) -> tuple[int, dict[str, str], tuple[str, ...]]:
    """Zero weights of `result`, a copy of `model`; return how many, why layers were left alone, and notes.

    `shares` is what to zero of each layer, by name, without a pattern; `values` the importance of each of its weights,
    where the criterion needs no data. Moments are those of the inputs of the layers of `model`, which stays unchanged.
    """
    zeroed, left_alone, few = 0, dict[str, str](), list[str]()
    by_data = settings.criterion in BY_DATA
    measured = moments.of(model, list(shares), inputs) if by_data else zip(shares, repeat(None))
    for done, (name, found) in enumerate(measured):
        progress(done, len(shares), name)
        layer = result.get_submodule(name)
        order = order_of(layer)
        weight = moments.matrix(layer)[..., order].double()
        if found is None:
            scores = moments.matrix(layer, values[name].reshape(layer.get_parameter("weight").shape))[..., order]
            keep = mask(scores, shares[name], settings.kept())
            weight = weight * keep
        else:
            second = found.second[:, order][..., order]
            few += [name] if found.rows < len(order) else []
            if not bool(second.diagonal(dim1=1, dim2=2).any()):
                left_alone[name] = "has inputs on the calibration data that are all zero, or is not called as a layer"
                continue
            if settings.criterion == "wanda":
                scores = weight.abs() * second.diagonal(dim1=1, dim2=2).sqrt()[:, None]
                weight = weight * mask(scores, shares[name], settings.kept())
            else:
                pairs = zip(weight, second, strict=True)
                weight = torch.stack([sparsegpt(w, h, shares[name], settings.kept()) for w, h in pairs])
        moments.set_matrix(layer, weight[..., order.argsort()])
        zeroed += int((weight == 0).sum())
    note = f"fewer calibration inputs than inputs of the layer for {', '.join(few)}; raise `calibration_examples`"
    return zeroed, left_alone, (note,) if few else ()


def order_of(layer: nn.Module) -> Tensor:
    """Return the order of a layer's inputs in which neighbours are channels at the same place of the kernel."""
    width = moments.matrix(layer).shape[-1]
    return torch.arange(width).reshape(-1, _positions(layer)).T.flatten()


def _positions(layer: nn.Module) -> int:
    return layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.Conv2d) else 1


def mask(scores: Tensor, share: float, kept: tuple[int, int] | None) -> Tensor:
    """Return which weights stay: in each row all but `share` of the least, or N of each M neighbours, `kept` = (N, M).

    `scores` has the shape (..., inputs).
    """
    parts = scores.unflatten(-1, (-1, kept[1])) if kept else scores  # type: ignore[no-untyped-call]
    size = parts.shape[-1]
    count = size - kept[0] if kept else round(share * size)
    # Sorting and not a threshold: with ties, a threshold takes more than was asked for.
    keep = torch.ones_like(parts, dtype=torch.bool)
    keep.scatter_(-1, parts.argsort(dim=-1, stable=True)[..., :count], False)
    return keep.reshape(scores.shape)


def sparsegpt(weight: Tensor, second: Tensor, share: float, kept: tuple[int, int] | None) -> Tensor:
    """Return `weight`, (outputs, inputs), with zeros, and its other weights changed to keep the outputs.

    Columns are done from first to last. Each error that zeros cause is made up for by the weights of later columns, as
    Optimal Brain Surgeon does with the inverse of `second`, the second moments of the inputs.

    Source: Frantar and Alistarh, "SparseGPT", ICML 2023.
    """
    weight, damped = weight.clone(), second.clone()
    # 1 where the inputs of a group are all zero.
    damped.diagonal().add_(DAMPING * float(second.diagonal().mean()) or 1.0)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    diagonal, width = upper.diagonal(), weight.shape[1]
    step = max(BLOCK // kept[1], 1) * kept[1] if kept else BLOCK
    keep = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, width, step):
        stop = min(start + step, width)
        if not kept:
            scores = (weight[:, start:stop] / diagonal[start:stop]).square()
            keep[:, start:stop] = mask(scores.flatten(), share, None).reshape(scores.shape)
        errors = torch.zeros_like(weight[:, start:stop])
        for i in range(start, stop):
            if kept and i % kept[1] == 0:
                there = slice(i, i + kept[1])
                keep[:, there] = mask((weight[:, there] / diagonal[there]).square(), share, kept)
            errors[:, i - start] = weight[:, i] * ~keep[:, i] / diagonal[i]
            weight[:, i:stop] -= errors[:, i - start, None] * upper[i, i:stop]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight * keep
