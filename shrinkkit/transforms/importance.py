"""How important each channel is, and which go first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from shrinkkit.core.stages import imported
from shrinkkit.errors import InvalidInput
from shrinkkit.transforms import groups
from shrinkkit.transforms.groups import Edit, Group

Value = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """Units of a group that go together, because what is left must be a multiple of `round_to`."""

    score: float
    units: tuple[int, ...]
    cost: int
    """How many output channels of counted layers go with them."""


def scores(model: nn.Module, group: Group, criterion: str, generator: torch.Generator) -> Tensor | None:
    """Return the importance of each unit of `group`, shape (units,); None where `criterion` has nothing to go by.

    For `taylor`, the parameters of `model` hold their gradients. Raises InvalidInput if a weight is not finite.
    """
    if criterion == "random":
        return torch.rand(len(group.units), generator=generator)
    size = 1 + max(root for unit in group.units for root in unit)
    total, terms = torch.zeros(size), 0
    for edit in group.edits:
        value = _edit_scores(edit.target(model), edit, criterion)
        if value is not None:
            total.index_add_(0, torch.tensor(edit.roots), value[list(edit.idxs)])
            terms += 1
    if not terms:
        return None
    if not torch.isfinite(total).all():
        raise InvalidInput(f"The weights of `{group.layers[0]}` must be finite to be ranked. Train the model again.")
    units = torch.stack([total[list(unit)].mean() for unit in group.units]) / terms
    if criterion == "lamp":
        ascending, order = units.sort()
        # Each score is divided by the sum of all that are at least as large.
        return (ascending / ascending.flip(0).cumsum(0).flip(0).clamp_min(1e-30))[order.argsort()]
    return units if criterion == "taylor" or units.mean() <= 0 else units / units.mean()


def _edit_scores(target: nn.Module | nn.Parameter, edit: Edit, criterion: str) -> Tensor | None:
    if criterion == "batchnorm" and not isinstance(target, _BatchNorm):
        return None
    has_rows = isinstance(target, (_ConvNd, groups.Recurrent)) or groups.is_linear(target)
    if (criterion == "geometric-median" or ":" in criterion) and not (edit.out and has_rows):
        return None
    rows = _rows(target, edit, _times_gradient if criterion == "taylor" else _plain)
    if rows is None:
        return None
    if ":" in criterion:
        return imported(criterion)(rows).float()  # type: ignore[no-any-return]
    if criterion == "geometric-median":
        return torch.cdist(rows, rows).sum(1)
    if criterion == "batchnorm":
        return rows.abs().sum(1)
    return rows.sum(1).pow(2) if criterion == "taylor" else rows.pow(2).sum(1)


def _plain(parameter: Tensor) -> Tensor:
    return parameter.detach().float().cpu()


def _times_gradient(parameter: Tensor) -> Tensor:
    return _plain(parameter) * (0.0 if parameter.grad is None else _plain(parameter.grad))


def _rows(target: nn.Module | nn.Parameter, edit: Edit, value: Value) -> Tensor | None:
    """Return the weights of each channel that `edit` counts, shape (channels, weights of one)."""
    if isinstance(target, nn.Parameter):
        return value(target).movedim(edit.dim, 0).reshape(target.shape[edit.dim], -1)
    if isinstance(target, groups.Recurrent):
        return groups.rows(target, value) if edit.out else groups.columns(target, value)
    if isinstance(target, nn.MultiheadAttention):
        return value(target.out_proj.weight)
    weight = getattr(target, "weight", None)
    if weight is None:
        return None
    weight = value(weight)
    if isinstance(target, _ConvNd):
        if edit.out != target.transposed:
            return weight.flatten(1)
        split = weight.reshape(target.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return split.reshape(target.groups * weight.shape[1], -1)
    if groups.is_linear(target):
        return weight if edit.out != groups.is_conv1d(target) else weight.T
    if isinstance(target, nn.Embedding):
        return weight.T
    return weight.reshape(-1, 1) if weight.dim() == 1 and weight.numel() > max(edit.idxs) else None


def blocks(group: Group, values: Tensor, *, keep_at_least: int, round_to: int) -> list[Block]:
    """Return what can be removed from `group`, the least important first.

    After each block, the channels left are a multiple of `round_to` and at least `keep_at_least` units.
    """
    multiple = round_to // gcd(round_to, len(group.units[0]))
    order, costs, units = values.argsort(stable=True).tolist(), group.costs(), len(group.units)
    found, start = [], 0
    for kept in range((units - 1) // multiple * multiple, 0, -multiple):
        if kept < keep_at_least:
            break
        gone = order[start : units - kept]
        score = float(values[gone].mean())
        found.append(Block(score, tuple(gone), sum(costs[unit] for unit in gone)))
        start = units - kept
    return found


def nearest(candidates: Sequence[Block], wanted: float) -> int:
    """Return how many of `candidates` to take so that about `wanted` units go; the fewer where two are as near."""
    sizes = [*accumulate((len(block.units) for block in candidates), initial=0)]
    return min(range(len(sizes)), key=lambda count: abs(sizes[count] - wanted))


def cheapest(candidates: Sequence[Sequence[Block]], wanted: float) -> list[int]:
    """Return how many blocks to take of each group so that about `wanted` channels go, the least important first."""
    taken, open_groups, removed = [0] * len(candidates), set(range(len(candidates))), 0
    pairs = [(which, at, block) for which, found in enumerate(candidates) for at, block in enumerate(found)]
    for which, _, block in sorted(pairs, key=lambda pair: (pair[2].score, pair[0], pair[1])):
        if which in open_groups and removed + block.cost / 2 <= wanted:
            taken[which] += 1
            removed += block.cost
        else:
            open_groups.discard(which)
    return taken
