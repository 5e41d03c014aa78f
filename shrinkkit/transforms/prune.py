"""Pruning: whole channels, which makes a model smaller, or single weights, which only zeroes them."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from shrinkkit.errors import InvalidInput, NothingToPrune, nearest, options
from shrinkkit.tasks import modules
from shrinkkit.tasks.modules import _Drop, duplicate
from shrinkkit.transforms import surgery
from shrinkkit.transforms.groups import counted, widths
from shrinkkit.transforms.selection import Gradients, Progress, Request, decide, reached

CHANNEL_CRITERIA = ("magnitude", "batchnorm", "geometric-median", "lamp", "taylor", "random")
"""How `channels` ranks channels."""
WEIGHT_CRITERIA = ("magnitude", "random")
"""How `weights` ranks weights."""
SCOPES = ("global", "layer")
"""What is ranked against what: all layers together, or each layer by itself."""
AfterStep = Callable[[nn.Module], nn.Module]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerPlan:
    """What `channels` does to one layer; `why` says why one that keeps all its channels does."""

    layer: str
    kind: str
    channels_before: int
    channels: int
    why: str


@torch.inference_mode(False)
def channels(
    model: nn.Module,
    example: _Drop,
    *,
    ratio: float,
    criterion: str = "magnitude",
    scope: str = "global",
    skip: Iterable[str] = (),
    layers: Mapping[str, float] | None = None,
    round_to: int = 8,
    steps: int = 1,
    after_step: AfterStep | None = None,
    gradients: Gradients | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of `model` with its least important channels removed.

    `model` is left unchanged. The copy is dense and smaller; to zero weights without changing shapes see
    `weights`. Each removal is proven first: what the copy computes must equal what `model` computes with the
    same weights set to zero, statistics of normalisation layers and the scale of attention aside. A layer
    where that fails, or that makes the outputs, keeps its channels; `plan` says which and why, and a warning
    is logged for the former. A channel of an LSTM, GRU or RNN is a hidden unit, and goes from all layers of
    the stack and from both directions.

    Args:
        model: Model to prune, in eval mode, on any device.
        example: Positional inputs of one call, batch first; used to trace which layers depend on each other.
        ratio: Share of output channels to remove, in [0, 1), over the convolution, linear, recurrent and
            attention layers that do not make the model's outputs and are not in `skip`.
        criterion: How channels are ranked: `magnitude`, `batchnorm`, `geometric-median`, `lamp`, `taylor`, `random`.
        scope: `global` removes the least important channels of all layers, at most 90 % of one layer (or `ratio`,
            if that is more); `layer` removes `ratio` of each. Layers that must shrink together count as one.
        skip: Patterns of layers that keep their output channels; a pattern also matches a parent module.
        layers: Ratio of its own, in [0, 1), for each layer a pattern matches; such a layer is ranked by itself.
        round_to: The channels left of each layer are a multiple of this, at least 1.
        steps: Number of rounds in which the ratio is reached, at least 1.
        after_step: Called after each round with the model pruned so far; returns the model to go on with,
            for example fine-tuned: `lambda m: finetune.run(m, task, epochs=1).model`.
        gradients: Returns the loss of a model, for `taylor`; its gradients are taken here.
        seed: Seed of `random`.

    Returns:
        A pruned copy in eval mode, on the same device and of the same dtype as `model`.

    Raises:
        InvalidInput: An argument is out of its range, unknown, or a pattern matches nothing.
        NothingToPrune: No layer could lose a channel; the message says why for each.
        Unsupported: The model cannot be copied or traced.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023. Criteria: Liu et al. 2017
    (`batchnorm`), He et al. 2019 (`geometric-median`), Lee et al. 2021 (`lamp`), Molchanov et al. 2019 (`taylor`).
    """
    request = _request(model, ratio, criterion, scope, skip, layers, round_to, gradients, seed)
    if not isinstance(steps, int) or steps < 1:
        raise InvalidInput(f"`steps` must be a whole number of at least 1, got {steps!r}. To prune at once, pass 1.")
    example = _moved(example, model)
    before, progress = widths(model), Progress()
    result = duplicate(model)
    for step in range(1, steps + 1):
        decision = decide(result, example, request, progress, step / steps)
        with torch.no_grad():
            result = surgery.apply(result, decision.cut)
        if after_step is not None:
            result = _continued(after_step(result), result)
    if widths(result) == before:
        why = "; ".join(f"`{name}` {reason}" for name, reason in decision.why.items())
        raise NothingToPrune(
            f"No channel can be removed: {why or 'no layer has channels'}. Lower `round_to` or `skip`."
        )
    if progress.refused:
        log.warning("Left alone: %s.", "; ".join(f"`{name}` {why}" for name, why in progress.refused.items()))
    return result


@torch.inference_mode(False)
def plan(
    model: nn.Module,
    example: _Drop,
    *,
    ratio: float,
    criterion: str = "magnitude",
    scope: str = "global",
    skip: Iterable[str] = (),
    layers: Mapping[str, float] | None = None,
    round_to: int = 8,
    gradients: Gradients | None = None,
    seed: int = 0,
) -> tuple[LayerPlan, ...]:
    """Return what `channels` does in one step to each layer of `model`, and why it leaves one alone.

    `model` is left unchanged. Arguments and errors are those of `channels`, but that a plan in which
    nothing goes is returned and not an error.
    """
    request = _request(model, ratio, criterion, scope, skip, layers, round_to, gradients, seed)
    example = _moved(example, model)
    before = widths(model)
    decision = decide(model, example, request, Progress(), 1.0)
    after = widths(surgery.apply(duplicate(model), decision.cut))
    kinds = {name: type(module).__name__ for name, module in counted(model).items()}
    return tuple(
        LayerPlan(name, kinds[name], count, after[name], decision.why.get(name, "") if after[name] == count else "")
        for name, count in before.items()
    )


@torch.inference_mode(False)
def channel_ratio(before: nn.Module, after: nn.Module, example: _Drop, *, skip: Iterable[str] = ()) -> float:
    """Return the share of output channels of `before` that `after` no longer has, in [0, 1).

    Counted are the layers that `channels` takes its ratio of: convolution, linear, recurrent and attention
    layers, each once, without those in `skip`, those that make the model's outputs, and those that `example`
    does not reach. A layer that could not be pruned counts, so what is asked and what is reached can differ.

    Args:
        before: The model that was pruned, in eval mode.
        after: What `channels` made of it.
        example: Positional inputs of one call of `before`, batch first.
        skip: The patterns that were passed to `channels`.

    Raises:
        InvalidInput: The two models do not have the same layers, or a pattern matches nothing.
        Unsupported: `before` cannot be copied or traced.
    """
    example = _moved(example, before)
    old, new = widths(before), widths(after)
    if old.keys() != new.keys():
        raise InvalidInput("`after` must have the layers of `before`. Pass what `prune.channels` returned for it.")
    names = reached(before, example) - set(modules.matching(list(old), list(skip)))
    total = sum(old[name] for name in names)
    return 1 - sum(new[name] for name in names) / total if total else 0.0


def _request(
    model: nn.Module,
    ratio: float,
    criterion: str,
    scope: str,
    skip: Iterable[str],
    ratios: Mapping[str, float] | None,
    round_to: int,
    gradients: Gradients | None,
    seed: int,
) -> Request:
    check_ratio("ratio", ratio, zero=bool(ratios))
    _known("criterion", criterion, CHANNEL_CRITERIA)
    _known("scope", scope, SCOPES)
    if model.training:
        raise InvalidInput("`model` must be in eval mode, got one in training mode. Call `model.eval()` first.")
    if not isinstance(round_to, int) or round_to < 1:
        raise InvalidInput(f"`round_to` must be a whole number of at least 1, got {round_to!r}. Pass 1 not to round.")
    if (criterion == "taylor") != (gradients is not None):
        raise InvalidInput(
            "`gradients` goes with `criterion='taylor'` and only with it: a function that returns the loss of the "
            f"model it is given. Got {criterion!r} {'without' if gradients is None else 'with'} it."
        )
    if criterion == "batchnorm" and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise InvalidInput("`criterion='batchnorm'` needs BatchNorm layers, and `model` has none. Use 'magnitude'.")
    names = list(counted(model))
    skipped = frozenset(modules.matching(names, list(skip)))
    return Request(ratio, criterion, scope, skipped, _own_ratios(names, ratios), round_to, gradients, seed)


def _own_ratios(names: Sequence[str], ratios: Mapping[str, float] | None) -> dict[str, float]:
    for pattern, share in (ratios or {}).items():
        check_ratio(f"layers[{pattern!r}]", share, zero=True)
    return {name: share for pattern, share in (ratios or {}).items() for name in modules.matching(names, [pattern])}


def check_ratio(name: str, ratio: float, *, zero: bool) -> None:
    """Check that the argument called `name` is a share that can be removed.

    Raises:
        InvalidInput: `ratio` is no number in [0, 1), or 0 where `zero` is not allowed.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise InvalidInput(f"`{name}` must be in [0, 1), got {ratio!r}. To remove half, pass 0.5.")
    if ratio == 0 and not zero:
        raise InvalidInput(f"`{name}` is 0, which removes nothing. To remove half, pass 0.5.")


def _known(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidInput(f"`{name}` must be {options(allowed)}, got {value!r}.{nearest(str(value), allowed)}")


def _moved(example: _Drop, model: nn.Module) -> _Drop:
    if not isinstance(example, tuple) or not all(isinstance(t, Tensor) for t in example):
        raise InvalidInput(f"`example` must be a tuple of tensors, got {type(example).__name__}. Pass `(inputs,)`.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return tuple(t.detach().to(device).clone() for t in example)


def _continued(returned: object, given: nn.Module) -> nn.Module:
    if not isinstance(returned, nn.Module) or widths(returned) != widths(given):
        raise InvalidInput(
            f"`after_step` must return the model it was given, or a trained copy of it, got {type(returned).__name__}. "
            "Return `finetune.run(...).model`, for example."
        )
    return returned.eval()


PRUNABLE = (_ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)
"""The layer types whose weights `weights` prunes."""


@torch.inference_mode(False)
def weights(
    model: nn.Module,
    *,
    ratio: float,
    criterion: str = "magnitude",
    scope: str = "global",
    skip: Iterable[str] = (),
    layers: Mapping[str, float] | None = None,
    biases: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of `model` in which the least important weights are exactly zero.

    `model` is left unchanged. Shapes, keys and dtypes stay, so neither the dense model file nor its latency
    shrinks; to remove whole channels see `channels`. To keep the zeros when training on, see `masks` and the
    `keep_zeros` of `finetune.run`.

    Args:
        model: Model to prune, in either mode, on any device.
        ratio: Share of weights to set to zero, in [0, 1), of all convolution, linear, recurrent and attention
            layers that are not in `skip`. A weight shared by several layers counts once.
        criterion: `magnitude` zeroes those nearest to zero, `random` any.
        scope: `global` ranks the weights of all layers together; `layer` zeroes `ratio` of each parameter.
        skip: Patterns of layers that keep their weights; a pattern also matches a parent module.
        layers: Ratio of its own, in [0, 1), for each layer a pattern matches; such a layer is ranked by itself.
        biases: Prune biases too, ranked with the weights.
        seed: Seed of `random`.

    Returns:
        A pruned copy on the same device and in the same mode.

    Raises:
        InvalidInput: An argument is out of its range, unknown, or a pattern matches nothing.
        NothingToPrune: No layer with weights is left after `skip`, or the ratio amounts to no weight.
        Unsupported: The model cannot be copied.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.
    """
    check_ratio("ratio", ratio, zero=bool(layers))
    _known("criterion", criterion, WEIGHT_CRITERIA)
    _known("scope", scope, SCOPES)
    result = duplicate(model)
    found = _prunable(result, biases)
    names = list(dict.fromkeys(layer for layer, _ in found.values()))
    skipped, own = set(modules.matching(names, list(skip))), _own_ratios(names, layers)
    chosen = {name: p for name, (layer, p) in found.items() if layer not in skipped}
    generator = torch.Generator().manual_seed(seed)
    values = {name: _importance(name, p, criterion, generator) for name, p in chosen.items()}
    pool = [name for name in chosen if found[name][0] not in own]
    pools = [(ratio, [name]) for name in pool] if scope == "layer" else [(ratio, pool)]
    pools += [(own[found[name][0]], [name]) for name in chosen if name not in pool]
    zeroed = sum(_zero(share, {n: values[n] for n in names}, chosen) for share, names in pools if names)
    if not zeroed:
        raise NothingToPrune(
            f"No weight can be zeroed: {ratio:g} of {sum(p.numel() for p in chosen.values())} weights outside `skip` "
            "is none. Raise `ratio` or skip less."
        )
    return result


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return where the weights that `weights` can prune are not zero, as booleans of each parameter's shape.

    Keys are names that `model.get_parameter` knows. A bias is in it where it holds zeros among other values.
    `model` is left unchanged.
    """
    return {
        name: parameter.detach() != 0
        for name, (_, parameter) in _prunable(model, biases=True).items()
        if parameter.dim() > 1 or 0 < int((parameter == 0).sum()) < parameter.numel()
    }


def sparsity(model: nn.Module) -> float:
    """Return the share of exact zeros among the weights that `weights` can prune, in [0, 1].

    A weight shared by several layers counts once, biases do not count. 0 for a model without such weights.
    """
    found = [p.detach() for _, p in _prunable(model, biases=False).values()]
    total = sum(p.numel() for p in found)
    return sum(int((p == 0).sum()) for p in found) / total if total else 0.0


def _prunable(model: nn.Module, biases: bool) -> dict[str, tuple[str, nn.Parameter]]:
    found: dict[str, tuple[str, nn.Parameter]] = {}
    seen: set[int] = set()
    for layer, module in model.named_modules():
        if not isinstance(module, PRUNABLE):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            # Named and not by its dimensions: the bias of a recurrent layer or of keys has as many as a weight.
            wanted = biases or "bias" not in attribute
            if wanted and parameter.is_floating_point() and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{layer}.{attribute}".lstrip(".")] = (layer, parameter)
    return found


def _importance(name: str, parameter: Tensor, criterion: str, generator: torch.Generator) -> Tensor:
    if criterion == "random":
        return torch.rand(parameter.numel(), generator=generator)
    values = parameter.detach().abs().flatten().float().cpu()
    if not torch.isfinite(values).all():
        raise InvalidInput(f"`{name}` must be finite to be ranked by magnitude. Train the model again, or skip it.")
    return values


def _zero(share: float, values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> int:
    """Zero `share` of the parameters in `values` together, and return how many weights that is."""
    joined = torch.cat(list(values.values()))
    count = round(share * joined.numel())
    # Sorting and not a threshold: with ties, a threshold takes more than was asked for.
    keep = torch.ones(joined.numel(), dtype=torch.bool)
    keep[joined.argsort(stable=True)[:count]] = False
    for name, mask in zip(values, torch.split(keep, [v.numel() for v in values.values()]), strict=True):
        parameter = parameters[name]
        parameter.data.masked_fill_(~mask.reshape(parameter.shape).to(parameter.device), 0)
    return count
