"""Equalization: outlying channels are scaled down where they are made, and up where they are read."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shrinkkit.core.stages import Equalize
from shrinkkit.display import formats
from shrinkkit.errors import NothingChanged
from shrinkkit.progress import Progress, no_progress
from shrinkkit.runtimes.base import max_relative_error
from shrinkkit.tasks import modules, outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import variants
from shrinkkit.transforms.groups import is_conv1d, is_linear
from shrinkkit.transforms.transform import Made

NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "mul")
"""Functions whose output has a channel for each element of their parameters; `mul` is the end of many norms."""
PASSING = frozenset(
    "relu relu_ leaky_relu leaky_relu_ dropout max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d mean "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d flatten view reshape squeeze to "
    "unsqueeze permute transpose contiguous clone float".split()
)
"""Functions of one tensor that a positive scale of its channels passes through; where channels move, a run shows it."""
READERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MOST_NAMED = 4
"""Layers that a message names."""
TOLERANCE = 1e-4
"""Relative error of the outputs up to which they are the same but for rounding."""


@torch.inference_mode(False)
@torch.no_grad()
def apply(model: nn.Module, task: Task, settings: Equalize, *, seed: int = 0, progress: Progress = no_progress) -> Made:
    """Apply the transform `equalize`: the model computes the same in float, with channels of more equal ranges.

    A channel between a layer or norm and the Linear or convolution layers that read it, directly or after functions
    such as ReLU, is divided by s = range^alpha / weight^(1 - alpha): the largest of the channel on calibration data,
    and of the weights that read it. Each change is kept only if the outputs stay. Nothing is random. Raises
    NothingChanged, with the reason of each layer, if there is no such channel.

    Source: Xiao et al., "SmoothQuant", ICML 2023; Nagel et al., "Data-Free Quantization Through Weight Equalization and
    Bias Correction", ICCV 2019.
    """
    result, example = modules.duplicate(model), tuple(x.cpu() for x in task.example)
    flow = _Flow.of(result, example)
    skipped = modules.matching({name for name, _ in flow.owners.values()}, settings.skip) if settings.skip else ()
    pairs, left_alone = flow.pairs(), dict(flow.refusals)
    readers = {id(reader): reader for _, found in pairs for reader in found}
    largest = _largest(result, list(readers.values()), variants.calibration(task, settings.calibration_examples))
    expected, done = outputs.tensors(result(*example)), list[str]()
    for number, (maker, found) in enumerate(pairs):
        names = [flow.owners[id(p)][0] for p in (maker.parameters[0], *(r.get_parameter("weight") for r in found))]
        progress(number, len(pairs), names[0])
        if any(name in skipped for name in names):
            left_alone[names[0]] = "is in `skip`, or read by a layer in it"
        elif reason := _scale(maker, found, largest, settings.alpha, lambda: _error(result, example, expected)):
            left_alone[names[0]] = reason
        else:
            done.append(f"{names[0]} to {', '.join(names[1:])}")
    if not done:
        why = "; ".join(f"`{name}` {reason}" for name, reason in [*left_alone.items()][:MOST_NAMED])
        raise NothingChanged(f"No channel can be equalized: {why or 'no layer is read by layers only'}.")
    progress(len(pairs), len(pairs), "equalized")
    more = f" and {len(done) - MOST_NAMED} more" if len(done) > MOST_NAMED else ""
    note = f"{formats.counted(len(done), 'layer')} equalized with what reads them: {'; '.join(done[:MOST_NAMED])}{more}"
    return Made(result.eval(), (note,), left_alone, computes_the_same=True)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a function of torch while the model runs."""

    name: str
    tensors: list[Tensor]
    """Among its arguments."""
    result: Tensor
    parameters: list[nn.Parameter]
    """Those of the tensors that are parameters of the model."""


@dataclass(eq=False)
class _Flow:
    """Which function reads what which other one returns, when a model runs on its example."""

    owners: Mapping[int, tuple[str, nn.Module]]
    """Name and module of each parameter, by its id."""
    calls: list[_Call]
    outputs: set[int]
    """Ids of the model's outputs."""
    kept: Any
    """What was recorded: ids are those of living tensors only."""
    refusals: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> "_Flow":
        owners = {id(p): (n, m) for n, m in model.named_modules() for p in m.parameters(recurse=False)}
        with modules.plain_attention(), modules.FunctionCalls() as recorder:
            output = model(*example)
        calls = [
            _Call(name, given, result, [x for x in given if isinstance(x, nn.Parameter) and id(x) in owners])
            for name, given, result in recorder.calls
        ]
        return cls(owners, calls, {id(t) for t in outputs.tensors(output)}, (recorder.calls, output))

    def pairs(self) -> list[tuple[_Call, list[nn.Module]]]:
        """Return each call that makes channels, with the layers that alone read them; `refusals` are of the others."""
        uses: dict[int, list[_Call]] = defaultdict(list)
        for call in self.calls:
            for tensor in call.tensors:
                uses[id(tensor)].append(call)
        found = []
        for call in self.calls:
            parameters = call.parameters
            is_norm = call.name in NORMS and all(p.dim() == 1 for p in parameters)
            if not parameters or not isinstance(call.result, Tensor):
                continue
            name, owner = self.owners[id(parameters[0])]
            if not (is_norm or _is_reader(owner)):
                continue
            readers: list[nn.Module] = []
            reason = self._follow(call.result, uses, readers)
            shared = [p for p in (*parameters, *(r.get_parameter("weight") for r in readers)) if len(uses[id(p)]) > 1]
            if not reason and shared:
                reason = "shares weights, or is read by a layer that does"
            if reason or not readers:
                self.refusals[name] = reason or "makes the model's outputs"
            else:
                found.append((call, readers))
        return found

    def _follow(self, tensor: Tensor, uses: Mapping[int, list[_Call]], readers: list[nn.Module]) -> str:
        """Collect the layers that read a tensor, or return what else does."""
        if id(tensor) in self.outputs:
            return "makes the model's outputs"
        for call in uses.get(id(tensor), ()):
            weights = [p for p in call.parameters if p.dim() > 1]
            owner = self.owners[id(weights[0])][1] if weights else None
            if call.name in PASSING and isinstance(call.result, Tensor):
                reason = "" if call.result is tensor else self._follow(call.result, uses, readers)
                if reason:
                    return reason
            elif owner is not None and len(weights) == 1 and _is_reader(owner):
                readers.append(owner)
            else:
                return f"is read by `{call.name}`"
        return ""


def _is_reader(layer: nn.Module) -> bool:
    return is_linear(layer) or isinstance(layer, READERS)


def _largest(model: nn.Module, readers: Sequence[nn.Module], inputs: Sequence[Example]) -> dict[int, Tensor]:
    """Return the largest absolute value of each input channel of layers on calibration data, by the layer's id."""
    largest: dict[int, Tensor] = {}

    def keep(layer: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0].abs().movedim(1 if isinstance(layer, READERS) else -1, 0).flatten(1).amax(1)
        largest[id(layer)] = torch.maximum(largest.get(id(layer), x), x)

    with modules.hooked(layer.register_forward_pre_hook(keep) for layer in readers), modules.plain_attention():
        for batch in inputs:
            model(*batch)
    return largest


def _scale(
    maker: _Call, readers: Sequence[nn.Module], largest: Mapping[int, Tensor], alpha: float, error: Callable[[], float]
) -> str:
    """Scale the channels between `maker` and `readers`, in place; return why not if that changes the outputs."""
    transposed = maker.name == "addmm"
    channels = maker.parameters[0].shape[-1 if transposed else 0]
    weights = [_columns(reader) for reader in readers]
    if any(reader not in largest for reader in map(id, readers)) or any(w.shape[1] % channels for w in weights):
        return "has other channels than what reads it"
    ranges = torch.stack([largest[id(reader)].reshape(channels, -1).amax(1) for reader in readers]).amax(0)
    sizes = torch.stack([w.abs().amax((0, 2)).reshape(channels, -1).amax(1) for w in weights]).amax(0)
    scale = ranges.double() ** alpha / sizes.double() ** (1 - alpha)
    scale = torch.where((ranges > 0) & (sizes > 0), scale, 1.0).clamp(1e-5, 1e5)
    changed = [*maker.parameters, *(reader.get_parameter("weight") for reader in readers)]
    before = [p.detach().clone() for p in changed]
    for parameter in maker.parameters:
        by_channel = scale if transposed or parameter.dim() == 1 else scale.reshape(-1, *[1] * (parameter.dim() - 1))
        parameter.copy_(parameter / by_channel)
    for reader, weight in zip(readers, weights, strict=True):
        parameter = reader.get_parameter("weight")
        scaled = weight * scale.repeat_interleave(weight.shape[1] // channels)[:, None]
        parameter.copy_(_restored(reader, scaled.to(parameter.dtype)))
    if error() <= TOLERANCE:
        return ""
    for parameter, old in zip(changed, before, strict=True):
        parameter.copy_(old)
    return "is read in a way that scales do not pass through"


def _columns(reader: nn.Module) -> Tensor:
    """Return the weights that read each input channel, shape (outputs of a group, inputs, places of the kernel)."""
    weight = reader.get_parameter("weight").detach()
    if isinstance(reader, READERS):
        groups = reader.groups
        split = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
        return split.transpose(0, 1).flatten(1, 2)
    return (weight.T if is_conv1d(reader) else weight)[..., None]


def _restored(reader: nn.Module, columns: Tensor) -> Tensor:
    """Return weights in the shape of `reader`'s, from that of `_columns`."""
    weight = reader.get_parameter("weight")
    if isinstance(reader, READERS):
        split = columns.reshape(len(columns), reader.groups, weight.shape[1], -1)
        return split.transpose(0, 1).reshape(weight.shape)
    return columns[..., 0].T if is_conv1d(reader) else columns[..., 0]


def _error(model: nn.Module, example: Example, expected: Sequence[Tensor]) -> float:
    return max_relative_error(list(expected), outputs.tensors(model(*example)))
