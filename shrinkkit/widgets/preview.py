"""What pruning or quantizing would do to a model: computed at once, and nothing written.

Pruning is decided by the transforms and quantized copies are made by `quantize`, as for a variant, so a preview
cannot disagree with what is made later. Both are drawn by `explore`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Accuracy
from shrinkkit.core.stages import Stage
from shrinkkit.errors import InvalidTask, Unsupported
from shrinkkit.measure import scoring
from shrinkkit.measure.scoring import Scored
from shrinkkit.progress import no_progress
from shrinkkit.runtimes.spec import HALF
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks import copies
from shrinkkit.tasks.modules import Example, macs, parameters, plain_attention, sparsity
from shrinkkit.tasks.task import Task, batches
from shrinkkit.transforms import sensitivity, variants
from shrinkkit.transforms.groups import counted, widths
from shrinkkit.transforms.prune import PRUNABLE
from shrinkkit.transforms.sensitivity import LayerError
from shrinkkit.transforms.transform import Made

BINS = 60
"""Of a histogram of weights."""
EXAMPLES = 128
"""Validation examples that layers of a quantized model are compared on, at most."""


@dataclass(frozen=True)
class LayerShare:
    """How much of one layer is left: of its channels, or of its weights where only zeros are made."""

    layer: str
    before: int
    after: int
    why: str
    """Why a layer that keeps all its channels does; empty for others."""


@dataclass(frozen=True)
class Histogram:
    """The weights of some layers by their value; the first and last bin also hold what lies beyond them."""

    edges: tuple[float, ...]
    """One more than bins, ascending."""
    before: tuple[int, ...]
    after: tuple[int, ...]
    """Without those that are removed or set to zero."""


@dataclass(frozen=True)
class Cost:
    """What a float32 model holds and spends."""

    parameters: int
    size_bytes: int
    """Of the parameters, 4 bytes each; zeros are stored too."""
    macs: int
    """Of one example."""
    sparsity: float
    """Share of zeros among the weights, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Pruning:
    """What a pruning stage does to a model before any fine-tuning."""

    layers: tuple[LayerShare, ...]
    before: Cost
    after: Cost
    note: str
    """What was asked for and what was reached."""
    model: nn.Module
    """The pruned model."""
    original: nn.Module

    def histogram(self, layer: str = "") -> Histogram:
        """Return the weights before and after, of one layer, or of all that can be pruned for ''."""
        before, after = (_weights(model, layer, self.original) for model in (self.original, self.model))
        # What is zeroed stands in the model as a zero, and is gone all the same.
        after = after if len(after) < len(before) else after[after != 0]
        # torch takes quantiles of no more than 2^24 values.
        edge = float(before[:: 1 + (len(before) >> 24)].abs().quantile(0.998))
        edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64) * (edge or 1.0)
        counts = [_counted(values, edges) for values in (before, after)]
        return Histogram(tuple(edges.tolist()), counts[0], tuple(map(min, counts[1], counts[0])))


class Pruner:
    """A task whose pruning is tried out; what does not depend on the settings is computed once."""

    def __init__(self, task: Task, model: nn.Module, *, seed: int = 0) -> None:
        """Hold the task, the model to prune, and the seed of pruning."""
        self.task, self.model, self.seed = task, model, seed

    @cached_property
    def cost(self) -> Cost:
        """Of the model as it is."""
        return _cost(self.model, self.task.example)

    @cached_property
    def scored(self) -> Scored:
        """The model's answers on the validation split."""
        return scoring.scores(self.model, self.task, self.task.validation)

    def prunable(self, transform: str) -> tuple[str, ...]:
        """Return the names of the layers that may have a ratio of their own by a transform."""
        modules = counted(self.model) if transform == "prune-channels" else dict(self.model.named_modules())
        return tuple(name for name, module in modules.items() if name and isinstance(module, PRUNABLE))

    def pruned(self, stage: Stage) -> Pruning:
        """Return what a pruning stage does.

        Raises:
            InvalidInput: An argument is out of its range, or a pattern matches no layer.
            NothingToPrune: No layer could lose anything.
            Unsupported: A layer with a ratio of its own cannot be pruned, or the model cannot be copied or traced.
        """
        made: Made = stage.transform.function()(
            self.model, self.task, stage.settings, seed=self.seed, progress=no_progress
        )
        channels = stage.name == "prune-channels"
        after = _cost(made.model, self.task.example) if channels else replace(self.cost, sparsity=sparsity(made.model))
        shares = _channels if channels else _zeros
        layers = shares(self.model, made.model, made.left_alone)
        return Pruning(layers, self.cost, after, "; ".join(made.notes), made.model, self.model)

    def baseline(self) -> Estimate:
        """Return the mean validation score of the model as it is."""
        return estimate.mean(self.scored.scores)

    def accuracy(self, pruned: Pruning) -> Accuracy:
        """Return how a pruned model that was not fine-tuned does on the validation split, beside the baseline.

        Raises:
            InvalidTask: An output or a score is not finite.
        """
        found = scoring.scores(pruned.model, self.task, self.task.validation)
        return scoring.accuracy(self.task, found, self.scored)


def _channels(before: nn.Module, after: nn.Module, why: Mapping[str, str]) -> tuple[LayerShare, ...]:
    left = widths(after)
    return tuple(LayerShare(name, count, left[name], why.get(name, "")) for name, count in widths(before).items())


def _zeros(before: nn.Module, after: nn.Module, why: Mapping[str, str]) -> tuple[LayerShare, ...]:
    found = []
    for name, module in before.named_modules():
        if isinstance(module, PRUNABLE):
            own = [p for n, p in after.get_submodule(name).named_parameters(recurse=False) if "bias" not in n]
            left = sum(int(torch.count_nonzero(p)) for p in own)
            found.append(LayerShare(name, sum(p.numel() for p in own), left, why.get(name, "")))
    return tuple(found)


def _cost(model: nn.Module, example: Example) -> Cost:
    count = parameters(model)
    return Cost(count, 4 * count, macs(model, example), sparsity(model))


def _weights(model: nn.Module, layer: str, original: nn.Module) -> Tensor:
    """Return the weights of a layer and those in it, or of all layers, one after the other."""
    return torch.cat(
        [
            _as_they_were(module, original.get_submodule(name), parameter.detach().float().cpu()).flatten()
            for name, module in model.named_modules()
            if isinstance(module, PRUNABLE) and (not layer or f"{name}.".startswith(f"{layer}."))
            for kind, parameter in module.named_parameters(recurse=False)
            if "bias" not in kind
        ]
    )


def _as_they_were(module: nn.Module, before: nn.Module, weights: Tensor) -> Tensor:
    """Return weights of attention without the scale that makes up for smaller heads, others as they are."""
    if not (isinstance(module, nn.MultiheadAttention) and isinstance(before, nn.MultiheadAttention)):
        return weights
    sizes = [m.embed_dim / m.num_heads for m in (module, before)]
    rows = torch.arange(len(weights)).reshape(-1, *[1] * (weights.dim() - 1)) < module.embed_dim
    return torch.where(rows, weights / math.sqrt(sizes[0] / sizes[1]), weights)


def _counted(values: Tensor, edges: Tensor) -> tuple[int, ...]:
    inside = values.double().clamp(float(edges[0]), float(edges[-1]))
    places = torch.bucketize(inside, edges[1:-1])
    return tuple(torch.bincount(places, minlength=len(edges) - 1).tolist())


@dataclass(frozen=True, eq=False)
class Quantization:
    """What a method does to a model in torch, layer by layer and in the end."""

    method: str
    left: str
    """The layer that was left in float; empty for none."""
    layers: tuple[LayerError, ...]
    """Convolution, linear, recurrent and attention layers, in the model's order."""
    output_error: float
    """Of the model's first output, as of a layer."""
    accuracy: Accuracy | None
    """On the first validation examples, beside the float model's; None where `refused` says why not."""
    refused: str
    examples: int
    """How many validation examples layers were compared on."""
    engine: str
    """torch's engine that the int8 model runs with; empty for 16 bits."""


class Quantizer:
    """A model whose quantization is tried out: each setting is computed once, when it is first asked for."""

    def __init__(self, task: Task, model: nn.Module, *, calibration_examples: int = 128) -> None:
        """Hold the task, the float model, and how many examples fix the ranges of activations for static int8."""
        self.task = task
        self.model = copies.shallow_copy(model, device="cpu").eval()
        self.calibration_examples = calibration_examples
        self._found: dict[tuple[str, tuple[str, ...], str], Quantization] = {}
        self._engines: dict[str, str] = {}

    @cached_property
    def scored(self) -> Scored:
        """The float model's answers on the first validation examples."""
        return scoring.scores(self.model, self.task, self._examples)

    @cached_property
    def _examples(self) -> Subset[Any]:
        count = len(self.task.validation)  # type: ignore[arg-type]
        return Subset(self.task.validation, range(min(EXAMPLES, count)))

    @cached_property
    def _inputs(self) -> list[Example]:
        size = self.task.example[0].shape[0]
        # A short last batch would not fit a model whose batch is fixed.
        full = [inputs for inputs, _ in batches(self._examples, size) if inputs[0].shape[0] == size]
        return full or [tuple(x.cpu() for x in self.task.example)]

    def layers(self) -> tuple[str, ...]:
        """Return the names of the convolution, linear, recurrent and attention layers."""
        return tuple(filter(None, counted(self.model)))

    def known(self, method: str, skip: Sequence[str] = (), left: str = "") -> bool:
        """Return whether these settings were computed before."""
        return (method, tuple(skip), left) in self._found

    def quantized(self, method: str, skip: Sequence[str] = (), left: str = "") -> Quantization:
        """Return how far a quantized copy of the model is from it.

        Args:
            method: `dynamic-int8`, `static-int8`, `float16` or `bfloat16`.
            skip: Patterns of layers to leave in float, for int8.
            left: One more layer to leave in float, for int8.

        Raises:
            InvalidInput: A pattern in `skip` matches no layer.
            Unsupported: torch cannot have this method for this model; the message says what it can.
        """
        key = (method, tuple(skip), left)
        if key not in self._found:
            made = self._copy(method, (*skip, *filter(None, [left])))
            self._engines.setdefault(method, quantize.engine_of(made))
            with plain_attention(), quantize.using_engine(quantize.engine_of(made)):
                self._found[key] = self._compared(method, left, made)
        return self._found[key]

    def _copy(self, method: str, skip: Sequence[str]) -> nn.Module:
        example = tuple(x.cpu() for x in self.task.example)
        if method in HALF:
            return quantize.half(self.model, example, dtype=method)
        # Engines are timed once for each method, so that leaving a layer in float changes nothing but that.
        engine = self._engines.get(method)
        if method == "dynamic-int8":
            return quantize.dynamic_int8(self.model, example, skip=skip, engine=engine)
        if method == "static-int8":
            observed = variants.calibration(self.task, self.calibration_examples)
            return quantize.static_int8(self.model, example, observed, skip=skip, engine=engine)
        raise Unsupported(f"`method` must be dynamic-int8, static-int8, float16 or bfloat16, got {method!r}.")

    def _compared(self, method: str, left: str, made: nn.Module) -> Quantization:
        layers, output_error = sensitivity.compare(self.model, made, self._inputs)
        accuracy, refused = None, ""
        try:
            found = scoring.scores(made, self.task, self._examples)
            accuracy = scoring.accuracy(self.task, found, self.scored)
        except InvalidTask as error:
            refused = str(error)
        examples = sum(inputs[0].shape[0] for inputs in self._inputs)
        return Quantization(method, left, layers, output_error, accuracy, refused, examples, quantize.engine_of(made))
