"""Which channels `prune.channels` removes, and why a layer keeps all of its own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shrinkkit.errors import InvalidInput, Unsupported
from shrinkkit.tasks.modules import _Drop, duplicate
from shrinkkit.transforms import importance, surgery
from shrinkkit.transforms.groups import Group, counted, groups
from shrinkkit.transforms.importance import Block
from shrinkkit.transforms.surgery import Cut

Gradients = Callable[[nn.Module], Tensor]
"""Returns the loss of the model it is given, connected to the model's parameters."""
MOST_OF_A_LAYER = 0.9
"""Share of a layer that global ranking may remove where a smaller ratio was asked for."""

Options = dict[int, list[Block]]


@dataclass(frozen=True)
class Request:
    """What `prune.channels` was asked to do; patterns are already names of layers."""

    ratio: float
    criterion: str
    scope: str
    skip: frozenset[str]
    ratios: dict[str, float]
    round_to: int
    gradients: Gradients | None
    seed: int


@dataclass
class Progress:
    """What is known from one step to the next."""

    refused: dict[str, str] = field(default_factory=dict)
    """Layers whose structure forbids a cut, and why."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Layers that make the model's outputs."""
    original: dict[tuple[str, ...], tuple[int, int]] = field(default_factory=dict)
    """Units and counted channels of each group before the first step."""


@dataclass(frozen=True)
class Decision:
    """What goes, and why each layer that keeps all its channels does so."""

    cut: Cut
    why: dict[str, str]


def reached(model: nn.Module, example: _Drop) -> set[str]:
    """Return the counted layers that `example` reaches and that do not make the model's outputs."""
    found = groups(model, example)
    inner = [g for g in found if not (g.makes_output and refusal(model, example, g))]
    return {name for group in inner for name in group.layers}


def refusal(model: nn.Module, example: _Drop, group: Group) -> str:
    """Return why the structure of `model` forbids to cut `group`, trying every other channel; else nothing."""
    if group.refusal or len(group.units) < 2:
        return group.refusal or "has a single channel, or a single one in each of its groups or heads"
    return surgery.disproof(model, surgery.cut_of([(group, range(0, len(group.units), 2))]), example)


def decide(model: nn.Module, example: _Drop, request: Request, progress: Progress, share: float) -> Decision:
    """Return the proven cut that takes `share` of what `request` asks for out of `model`, all steps so far included.

    `model` is left unchanged; `progress` learns which layers cannot be cut.

    Raises:
        InvalidInput: Layers that must shrink together are asked for different ratios.
        Unsupported: A layer with a ratio of its own cannot be cut.
    """
    found = groups(model, example)
    for group in found:
        progress.original.setdefault(group.layers, (len(group.units), sum(group.costs())))
        _check_structure(model, example, group, progress)
    values, unranked = _values(model, found, request)
    while True:
        _check_asked(request, progress)
        open_groups = [
            g for g in found if values.get(g.layers) is not None and not _kept(g.layers, request, progress, unranked)
        ]
        options = [_options(g, values[g.layers], request, progress) for g in open_groups]
        taken = _take(open_groups, options, request, progress, share)
        chosen = [
            (group, [unit for block in found_blocks[:count] for unit in block.units])
            for group, found_blocks, count in zip(open_groups, options, taken, strict=True)
        ]
        cut = surgery.cut_of(chosen)
        if not cut or not surgery.disproof(model, cut, example):
            break
        progress.refused |= _blame(model, example, chosen)
    why = {name: _unreached(layer) for name, layer in counted(model).items()}
    for group in found:
        why |= dict.fromkeys(group.layers, "ranks above all that goes")
        why |= {n: _kept(group.layers, request, progress, unranked) or why[n] for n in group.layers}
    for group, blocks in zip(open_groups, options, strict=True):
        if not blocks:
            count = len(group.units) * len(group.units[0])
            why |= dict.fromkeys(
                group.layers, f"has {count} channels, of which `round_to={request.round_to}` lets none go"
            )
    return Decision(cut, why)


def _unreached(layer: nn.Module) -> str:
    if isinstance(layer, nn.RNNCellBase):
        return "is a recurrent cell, whose hidden state lives in the model's own code"
    return "is not reached from the model's outputs when it runs on `example`"


def _check_structure(model: nn.Module, example: _Drop, group: Group, progress: Progress) -> None:
    if any(name in progress.outputs or name in progress.refused for name in group.layers):
        return
    if group.refusal or len(group.units) < 2:
        progress.refused |= dict.fromkeys(group.layers, refusal(model, example, group))
    elif group.makes_output:
        reason = refusal(model, example, group)
        progress.outputs |= dict.fromkeys(group.layers, f"makes the model's outputs: {reason}") if reason else {}


def _check_asked(request: Request, progress: Progress) -> None:
    for name, ratio in request.ratios.items():
        reason = progress.refused.get(name) or progress.outputs.get(name)
        if ratio and reason:
            raise Unsupported(f"`layers` asks for {ratio:g} of `{name}`, which {reason}. Leave it out of `layers`.")


def _kept(names: Sequence[str], request: Request, progress: Progress, unranked: dict[str, str]) -> str:
    for known in (progress.refused, progress.outputs, unranked):
        for name in names:
            if name in known:
                return known[name]
    for name in names:
        if name in request.skip:
            return "is in `skip`" if len(names) == 1 else f"must shrink together with `{name}`, which is in `skip`"
    return "" if _ratio(names, request) else "is asked to keep all its channels"


def _ratio(names: Sequence[str], request: Request) -> float:
    own = {name: request.ratios[name] for name in names if name in request.ratios}
    if len(set(own.values())) > 1:
        raise InvalidInput(
            f"Layers that must shrink together must have one ratio, got {own} in `layers`. Give them the same."
        )
    return next(iter(own.values()), request.ratio)


def _values(
    model: nn.Module, found: Sequence[Group], request: Request
) -> tuple[dict[tuple[str, ...], Tensor], dict[str, str]]:
    if request.gradients is not None:
        model = _with_gradients(model, request.gradients)
    generator = torch.Generator().manual_seed(request.seed)
    values: dict[tuple[str, ...], Tensor] = {}
    unranked: dict[str, str] = {}
    for group in found:
        value = importance.scores(model, group, request.criterion, generator)
        if value is None:
            unranked |= dict.fromkeys(group.layers, f"has nothing that `criterion='{request.criterion}'` can rank")
        else:
            values[group.layers] = value
    return values, unranked


def _with_gradients(model: nn.Module, gradients: Gradients) -> nn.Module:
    model = duplicate(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for layer in [m for m in model.modules() if isinstance(m, nn.RNNBase)]:
        # cuDNN differentiates recurrent layers in training mode alone, where only their dropout is another.
        layer.train().dropout = 0.0
    with torch.enable_grad():
        loss = gradients(model)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InvalidInput(
                f"`gradients` must return a loss of one element that depends on the model, got {type(loss).__name__}. "
                "Return `task.loss(model(inputs), target)`, for example."
            )
        loss.backward()  # type: ignore[no-untyped-call]
    return model


def _options(group: Group, values: Tensor, request: Request, progress: Progress) -> list[Block]:
    ratio = _ratio(group.layers, request)
    most = max(MOST_OF_A_LAYER, ratio)
    least = max(1, math.ceil(progress.original[group.layers][0] * (1 - most) - 1e-9))
    return importance.blocks(group, values, keep_at_least=least, round_to=request.round_to)


def _take(
    found: Sequence[Group],
    options: Sequence[list[Block]],
    request: Request,
    progress: Progress,
    share: float,
) -> list[int]:
    taken = [0] * len(found)
    pooled = []
    for i, group in enumerate(found):
        if request.scope == "global" and not any(name in request.ratios for name in group.layers):
            pooled.append(i)
        else:
            keep = progress.original[group.layers][0] * (1 - _ratio(group.layers, request) * share)
            taken[i] = importance.nearest(options[i], len(group.units) - keep)
    before = sum(progress.original[found[i].layers][1] for i in pooled)
    gone = before - sum(sum(found[i].costs()) for i in pooled)
    for i, count in zip(
        pooled, importance.cheapest([options[i] for i in pooled], before * request.ratio * share - gone), strict=True
    ):
        taken[i] = count
    return taken


def _blame(model: nn.Module, example: _Drop, chosen: Sequence[tuple[Group, list[int]]]) -> dict[str, str]:
    """Return the layers without which the cut would be right, and why each one is not."""
    good: list[tuple[Group, list[int]]] = []
    found: dict[str, str] = {}
    for group, units in chosen:
        reason = surgery.disproof(model, surgery.cut_of([*good, (group, units)]), example) if units else ""
        if reason:
            found |= dict.fromkeys(group.layers, f"keeps its channels: {reason}")
        else:
            good.append((group, units))
    return found
