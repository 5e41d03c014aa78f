"""Pruning: whole channels, which makes a model smaller, or single weights, which only zeroes them."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from shrinkkit.core.stages import BY_DATA, PruneChannels, PruneWeights, imported, settings_of
from shrinkkit.display import formats
from shrinkkit.errors import InvalidInput, NothingToPrune, Unsupported
from shrinkkit.progress import Progress, no_progress
from shrinkkit.tasks import copies, modules
from shrinkkit.tasks.modules import Example, duplicate
from shrinkkit.tasks.task import Task, batches
from shrinkkit.transforms import importance, sparse, surgery, variants
from shrinkkit.transforms.groups import Group, Recurrent, counted, groups, is_linear, widths
from shrinkkit.transforms.importance import Block
from shrinkkit.transforms.surgery import Cut
from shrinkkit.transforms.transform import Made

Gradients = Callable[[nn.Module], Tensor]
"""Returns the loss of the model it is given, connected to the model's parameters."""
MOST_OF_A_LAYER = 0.9
"""Fraction of a layer that the scope `global` may remove where a smaller ratio was asked for."""
TAYLOR_BATCHES = 16
"""Training batches whose loss gives the gradients of the criterion `taylor`."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pruned:
    """A model with fewer channels."""

    model: nn.Module
    fraction: float
    """Of the output channels that could have gone: those of all layers that `example` reaches, that do not make the
    model's outputs and are not in `skip`."""
    why: Mapping[str, str]
    """Why a layer keeps all its channels, by layer."""
    refused: Mapping[str, str]
    """Those of them whose structure forbids a cut."""


def channels(
    model: nn.Module,
    example: Example,
    *,
    ratio: float,
    criterion: str = "magnitude",
    scope: str = "global",
    skip: Iterable[str] = (),
    layers: Mapping[str, float] | None = None,
    round_to: int = 8,
    gradients: Gradients | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of `model` with its least important channels removed.

    `model` is left unchanged. The copy is dense and smaller; to zero weights without changing shapes see
    `weights`. Each removal is proven first: what the copy computes must equal what `model` computes with the
    same weights set to zero, statistics of normalisation layers and the scale of attention aside. A layer
    where that fails, or that makes the outputs, keeps its channels; for the former a warning is logged. A channel
    of an LSTM, GRU or RNN is a hidden unit, and goes from all layers of the stack and from both directions.

    Args:
        model: Model to prune, in eval mode, on any device.
        example: Positional inputs of one call, batch first; used to trace which layers depend on each other.
        ratio: Fraction of output channels to remove, in [0, 1), over the convolution, linear, recurrent and
            attention layers that do not make the model's outputs and are not in `skip`.
        criterion: The importance of channels: `magnitude`, `batchnorm`, `geometric-median`, `lamp`, `taylor`,
            `random`, or `package.module:function`, called with the weights of each channel, shape (channels, weights
            of one), which returns shape (channels,).
        scope: `global` removes the least important channels of all layers, at most 90 % of one layer (or `ratio`,
            if that is more); `layer` removes `ratio` of each. Layers that must shrink together count as one.
        skip: Patterns of layers that keep their output channels; a pattern also matches a parent module.
        layers: Ratio, in [0, 1), for each layer a pattern matches; such a layer is compared with no other.
        round_to: The channels left of each layer are a multiple of this, at least 1.
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
    given = {"ratio": ratio, "criterion": criterion, "scope": scope, "skip": tuple(skip), "layers": layers or {}}
    settings = settings_of(PruneChannels, **given, round_to=round_to)
    return _something(prune_channels(model, example, settings, gradients=gradients, seed=seed)).model


def apply_channels(
    model: nn.Module, task: Task, settings: PruneChannels, *, seed: int = 0, progress: Progress = no_progress
) -> Made:
    """Apply the transform `prune-channels`; see `channels`."""
    gradients = _loss_of(task) if settings.criterion == "taylor" else None
    pruned = _something(prune_channels(model, task.example, settings, gradients=gradients, seed=seed))
    progress(1, 1, "pruned")
    note = f"{formats.percent(settings.ratio)} of the channels asked for, {formats.percent(pruned.fraction)} removed"
    return Made(pruned.model, (note,), pruned.why)


def _something(pruned: Pruned) -> Pruned:
    if not pruned.fraction:
        why = "; ".join(f"`{name}` {reason}" for name, reason in pruned.why.items())
        raise NothingToPrune(f"No channel can be removed: {why or 'none has any'}. Lower `round_to` or `skip`.")
    if pruned.refused:
        log.warning("Left alone: %s.", "; ".join(f"`{name}` {why}" for name, why in pruned.refused.items()))
    return pruned


@torch.inference_mode(False)
@copies.freeing_large_blocks()
def prune_channels(
    model: nn.Module, example: Example, settings: PruneChannels, *, gradients: Gradients | None = None, seed: int = 0
) -> Pruned:
    """Return what `channels` makes of `model`, and why layers keep all their channels; here all of them may."""
    if model.training:
        raise InvalidInput("`model` must be in eval mode, got one in training mode. Call `model.eval()` first.")
    if not isinstance(example, tuple) or not all(isinstance(t, Tensor) for t in example):
        raise InvalidInput(f"`example` must be a tuple of tensors, got {type(example).__name__}. Pass `(inputs,)`.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    selection = _Selection(model, tuple(t.detach().to(device).clone() for t in example), settings)
    cut, why = selection.run(gradients, seed)
    with torch.no_grad():
        result = surgery.apply(duplicate(model), cut)
    before, after = widths(model), widths(result)
    prunable = selection.inner() - selection.skipped
    total = sum(before[name] for name in prunable)
    fraction = 1 - sum(after[name] for name in prunable) / total if total else 0.0
    kept = {name: why[name] for name, count in before.items() if after[name] == count and why.get(name)}
    return Pruned(result, fraction, kept, selection.refused)


@dataclass
class _Selection:
    """Which channels go, and what forbids that others do."""

    model: nn.Module
    example: Example
    settings: PruneChannels
    refused: dict[str, str] = field(default_factory=dict)
    """Layers whose structure forbids a cut, and why."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Layers that make the model's outputs."""
    uncompared: dict[str, str] = field(default_factory=dict)
    """Layers that the criterion says nothing of."""
    ways: dict[tuple[type, int, int], int] = field(default_factory=dict)
    """Which way of cutting heads is right, by kind of attention."""

    def __post_init__(self) -> None:
        """Check the settings against the model, and find which layers depend on each other."""
        settings, names = self.settings, list(counted(self.model))
        _check_nonzero(settings)
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        if settings.criterion == "batchnorm" and not norms:
            raise InvalidInput("`criterion='batchnorm'` needs BatchNorm layers, and `model` has none. Use 'magnitude'.")
        self.skipped = set(modules.matching(names, settings.skip))
        self.ratios = _ratios(names, settings.layers)
        self.found = [self._possible(group) for group in groups(self.model, self.example)]

    def run(self, gradients: Gradients | None, seed: int) -> tuple[Cut, dict[str, str]]:
        """Return a proven cut, and why each layer that keeps all its channels does.

        Raises:
            InvalidInput: Layers that must shrink together are asked for different ratios.
            Unsupported: A layer with a per-layer ratio cannot be cut.
        """
        for group in self.found:
            self._check_structure(group)
        values = self._values(gradients, seed)
        while True:
            self._check_asked()
            open_groups = [g for g in self.found if g.layers in values and not self._kept(g.layers)]
            blocks = [self._blocks(group, values[group.layers]) for group in open_groups]
            taken = self._take(open_groups, blocks)
            chosen = [
                (group, [unit for block in candidates[:count] for unit in block.units])
                for group, candidates, count in zip(open_groups, blocks, taken, strict=True)
            ]
            cut = surgery.cut_of(chosen)
            if not cut or not surgery.disproof(self.model, cut, self.example):
                break
            self.refused |= self._blame(chosen)
        unreached = "is not reached from the model's outputs when it runs on `example`"
        why = dict.fromkeys(counted(self.model), unreached)
        for group in self.found:
            why |= {name: self._kept(group.layers) or "ranks above all that goes" for name in group.layers}
        for group, candidates in zip(open_groups, blocks, strict=True):
            if not candidates:
                count = len(group.units) * len(group.units[0])
                reason = f"has {count} channels, of which `round_to={self.settings.round_to}` lets none go"
                why |= dict.fromkeys(group.layers, reason)
        return cut, why

    def inner(self) -> set[str]:
        """Return the layers that `example` reaches and that do not make the model's outputs."""
        sealed = [g for g in self.found if g.makes_output and (g.refusal or len(g.units) < 2)]
        outputs = {name for group in sealed for name in group.layers} | set(self.outputs)
        return {name for group in self.found for name in group.layers} - outputs

    def _possible(self, group: Group) -> Group:
        """Return the first of `group` and its alternatives that can be cut; one trial for all attention of a kind."""
        if not group.alternatives or group.refusal:
            return group
        owner = type(self.model.get_submodule(group.layers[0].rpartition(".")[0]))
        kind, ways = (owner, len(group.layers), len(group.units)), (group, *group.alternatives)
        if kind not in self.ways:
            # Every other unit is tried.
            cuts = [surgery.cut_of([(one, range(0, len(one.units), 2))]) for one in ways]
            right = (i for i, cut in enumerate(cuts) if not surgery.disproof(self.model, cut, self.example))
            self.ways[kind] = next(right, 0)
        return ways[self.ways[kind]]

    def _check_structure(self, group: Group) -> None:
        if any(name in self.outputs or name in self.refused for name in group.layers):
            return
        if group.refusal or len(group.units) < 2:
            reason = group.refusal or "has a single channel, or a single one in each of its groups or heads"
            self.refused |= dict.fromkeys(group.layers, reason)
        elif group.makes_output:
            # Every other channel is tried.
            cut = surgery.cut_of([(group, range(0, len(group.units), 2))])
            if reason := surgery.disproof(self.model, cut, self.example):
                self.outputs |= dict.fromkeys(group.layers, f"makes the model's outputs: {reason}")

    def _check_asked(self) -> None:
        for name, ratio in self.ratios.items():
            reason = self.refused.get(name) or self.outputs.get(name)
            if ratio and reason:
                raise Unsupported(f"`layers` asks for {ratio:g} of `{name}`, which {reason}. Leave it out of `layers`.")

    def _kept(self, names: Sequence[str]) -> str:
        known = {**self.uncompared, **self.outputs, **self.refused}
        if reason := next((known[name] for name in names if name in known), ""):
            return reason
        if name := next((name for name in names if name in self.skipped), ""):
            return "is in `skip`" if len(names) == 1 else f"must shrink together with `{name}`, which is in `skip`"
        return "" if self._ratio(names) else "is asked to keep all its channels"

    def _ratio(self, names: Sequence[str]) -> float:
        ratios = {name: self.ratios[name] for name in names if name in self.ratios}
        if len(set(ratios.values())) > 1:
            raise InvalidInput(f"Layers that must shrink together must have one ratio in `layers`, got {ratios}.")
        return next(iter(ratios.values()), self.settings.ratio)

    def _values(self, gradients: Gradients | None, seed: int) -> dict[tuple[str, ...], Tensor]:
        """Return the importance of each unit, by the layers of its group."""
        criterion = self.settings.criterion
        if (criterion == "taylor") != (gradients is not None):
            text = "`gradients` goes with `criterion='taylor'` only: a function that returns the loss of a model. Got"
            raise InvalidInput(f"{text} {criterion!r} {'without' if gradients is None else 'with'} it.")
        model = _with_gradients(self.model, gradients) if gradients else self.model
        generator = torch.Generator().manual_seed(seed)
        scores = {g.layers: importance.scores(model, g, criterion, generator) for g in self.found}
        for names in (names for names, value in scores.items() if value is None):
            self.uncompared |= dict.fromkeys(names, f"has nothing that `criterion='{criterion}'` can rank")
        return {names: value for names, value in scores.items() if value is not None}

    def _blocks(self, group: Group, values: Tensor) -> list[Block]:
        most = max(MOST_OF_A_LAYER, self._ratio(group.layers))
        least = max(1, math.ceil(len(group.units) * (1 - most) - 1e-9))
        return importance.blocks(group, values, keep_at_least=least, round_to=self.settings.round_to)

    def _take(self, open_groups: Sequence[Group], blocks: Sequence[Sequence[Block]]) -> list[int]:
        """Return how many blocks go of each group."""
        taken = [0] * len(open_groups)
        pooled = []
        for i, group in enumerate(open_groups):
            if self.settings.scope == "global" and not any(name in self.ratios for name in group.layers):
                pooled.append(i)
            else:
                taken[i] = importance.nearest(blocks[i], len(group.units) * self._ratio(group.layers))
        total = sum(sum(open_groups[i].costs()) for i in pooled)
        counts = importance.cheapest([blocks[i] for i in pooled], total * self.settings.ratio)
        for i, count in zip(pooled, counts, strict=True):
            taken[i] = count
        return taken

    def _blame(self, chosen: Sequence[tuple[Group, list[int]]]) -> dict[str, str]:
        """Return the layers without which the cut would be right, and why each one is not."""
        good: list[tuple[Group, list[int]]] = []
        blamed: dict[str, str] = {}
        for group, units in chosen:
            cut = surgery.cut_of([*good, (group, units)])
            if units and (reason := surgery.disproof(self.model, cut, self.example)):
                blamed |= dict.fromkeys(group.layers, f"keeps its channels: {reason}")
            else:
                good.append((group, units))
        return blamed


def _check_nonzero(settings: PruneChannels | PruneWeights) -> None:
    if settings.ratio == 0 and not settings.layers:
        raise InvalidInput("`ratio` is 0, which removes nothing. To remove half, pass 0.5.")


def _ratios(names: Sequence[str], layers: Mapping[str, float]) -> dict[str, float]:
    """Return the ratio of each layer that a pattern in `layers` matches."""
    return {name: ratio for pattern, ratio in layers.items() for name in modules.matching(names, [pattern])}


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
            kind = type(loss).__name__
            text = f"`gradients` must return a loss of one element that depends on the model, got {kind}."
            raise InvalidInput(f"{text} Return `task.loss(model(inputs), target)`, for example.")
        loss.backward()  # type: ignore[no-untyped-call]
    return model


def _loss_of(task: Task) -> Gradients:
    """Return a function from a model to its loss on the first training batches."""

    def loss(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        total = torch.zeros((), device=device)
        for number, batch in enumerate(batches(task.train, task.example[0].shape[0])):
            if number == TAYLOR_BATCHES:
                break
            inputs, target = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, batch)
            total = total + task.loss(model(*inputs), target)
        return total

    return loss


PRUNABLE = (_ConvNd, nn.Linear, Recurrent, nn.MultiheadAttention)
"""The layer types whose weights `weights` prunes, and `Conv1D`."""


def weights(
    model: nn.Module,
    *,
    ratio: float | None = None,
    criterion: str = "magnitude",
    scope: str | None = None,
    skip: Iterable[str] = (),
    layers: Mapping[str, float] | None = None,
    biases: bool = False,
    pattern: str | None = None,
    inputs: Sequence[Example] = (),
    seed: int = 0,
) -> nn.Module:
    """Return a copy of `model` in which the least important weights are exactly zero.

    `model` is left unchanged. Shapes, keys and dtypes stay, so neither the dense model file nor its latency
    shrinks; to remove whole channels see `channels`. Fine-tuning keeps the zeros; see `FineTune.keep_zeros`.

    Args:
        model: Model to prune, in either mode, on any device.
        ratio: Share of weights to set to zero, in [0, 1), of all convolution, linear, recurrent and attention
            layers that are not in `skip`. A weight shared by several layers counts once. Needed without `pattern`.
        criterion: `magnitude` zeroes those nearest to zero, `random` any; `package.module:function` is called with each
            parameter and returns the importance of its elements, in the same shape. `wanda` weighs magnitudes by the
            norm of their input and compares those of one output; `sparsegpt` changes the other weights of a layer to
            make up for the zeros. Both cover Linear and Conv2d layers, and need `inputs`; their scope is `layer`.
        scope: `global`, the default, compares the weights of all layers; `layer` zeroes `ratio` of each parameter.
        skip: Patterns of layers that keep their weights; a pattern also matches a parent module.
        layers: Ratio, in [0, 1), for each layer a pattern matches; such a layer is compared with no other.
        biases: Prune biases too, compared with the weights.
        pattern: `N:M` keeps the N most important of each M neighbouring inputs of an output, for Linear and Conv2d
            layers, whose neighbours are input channels at the same place of the kernel.
        inputs: Batches of calibration data, for `wanda` and `sparsegpt`; they and `model` are then on the CPU.
        seed: Seed of `random`.

    Returns:
        A pruned copy on the same device and in the same mode.

    Raises:
        InvalidInput: An argument is out of its range, unknown, or a pattern matches nothing.
        NothingToPrune: No layer with weights is left after `skip`, or the ratio amounts to no weight.
        Unsupported: The model cannot be copied.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015; Sun et al.,
    "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024 (`wanda`).
    """
    given = {"ratio": ratio, "criterion": criterion, "scope": scope, "skip": tuple(skip), "layers": layers or {}}
    given |= {"biases": biases, "pattern": pattern}
    settings = settings_of(PruneWeights, **{name: value for name, value in given.items() if value is not None})
    return _prune_weights(model, settings, inputs, seed, no_progress).model


def apply_weights(
    model: nn.Module, task: Task, settings: PruneWeights, *, seed: int = 0, progress: Progress = no_progress
) -> Made:
    """Apply the transform `prune-weights`; see `weights`."""
    by_data = settings.criterion in BY_DATA
    inputs = variants.calibration(task, settings.calibration_examples) if by_data else ()
    return _prune_weights(model, settings, inputs, seed, progress)


@torch.inference_mode(False)
def _prune_weights(
    model: nn.Module, settings: PruneWeights, inputs: Sequence[Example], seed: int, progress: Progress
) -> Made:
    """Return the pruned copy, and which fraction of the weights outside `skip` were set to zero."""
    _check_nonzero(settings)
    result = duplicate(model)
    prunable = _prunable(result, settings.biases)
    names = list(dict.fromkeys(layer for layer, _ in prunable.values()))
    skipped, ratios = set(modules.matching(names, settings.skip)), _ratios(names, settings.layers)
    chosen = {name: p for name, (layer, p) in prunable.items() if layer not in skipped}
    total = sum(p.numel() for p in chosen.values())
    generator, by_data = torch.Generator().manual_seed(seed), settings.criterion in BY_DATA
    left_alone, notes = dict[str, str](), tuple[str, ...]()
    if by_data or settings.pattern:
        layers = [layer for layer in names if layer not in skipped]
        left_alone = sparse.refusals(result, layers, settings.kept())
        shares = {layer: ratios.get(layer, settings.ratio) for layer in layers if layer not in left_alone}
        chosen = {
            layer: result.get_submodule(layer).get_parameter("weight") for layer, share in shares.items() if share
        }
    if by_data and not inputs:
        raise InvalidInput(f"`criterion='{settings.criterion}'` needs `inputs`, batches of calibration data; got none.")
    scored = {} if by_data else chosen
    values = {name: _importance(name, p, settings.criterion, generator) for name, p in scored.items()}
    if by_data or settings.pattern:
        shares = {name: shares[name] for name in chosen}
        zeroed, why, notes = sparse.prune(model, result, shares, values, settings, inputs, progress)
        left_alone |= why
    else:
        pool = [name for name in chosen if prunable[name][0] not in ratios]
        pools = [(settings.ratio, [name]) for name in pool] if settings.scope == "layer" else [(settings.ratio, pool)]
        pools += [(ratios[prunable[name][0]], [name]) for name in chosen if name not in pool]
        zeroed = sum(_zero(share, {n: values[n] for n in names}, chosen) for share, names in pools if names)
    if not zeroed:
        why_not = "; ".join(f"`{name}` {reason}" for name, reason in left_alone.items())
        text = f"No weight can be zeroed: {settings.ratio:g} of {total} weights outside `skip` is none."
        raise NothingToPrune(f"No weight can be zeroed: {why_not}." if why_not else f"{text} Raise `ratio`.")
    progress(1, 1, "pruned")
    note = f"{formats.percent(zeroed / total)} of the weights outside `skip` set to zero"
    return Made(result, (note, *notes), left_alone)


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


def _prunable(model: nn.Module, biases: bool) -> dict[str, tuple[str, nn.Parameter]]:
    found: dict[str, tuple[str, nn.Parameter]] = {}
    seen: set[int] = set()
    for layer, module in model.named_modules():
        if not (isinstance(module, PRUNABLE) or is_linear(module)):
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
    value = abs if criterion == "magnitude" else imported(criterion)
    values: Tensor = value(parameter.detach()).flatten().float().cpu()
    if not torch.isfinite(values).all() or values.numel() != parameter.numel():
        raise InvalidInput(f"The importance of `{name}` by {criterion} must be finite. Train again, or skip it.")
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
