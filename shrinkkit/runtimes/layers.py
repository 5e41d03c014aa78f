"""Layers of a model before and after: the layer report, in which precision each runs and why, and integer checks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from shrinkkit.core.measurement import IntegerCheck
from shrinkkit.core.variant import LayerAudit, LayerPrecision
from shrinkkit.errors import Unsupported
from shrinkkit.runtimes.base import BuildRequest

ROOT = "(model)"
"""Name of the model itself where it holds parameters outside any layer."""
CHANNELS = "out_channels out_features nf num_features hidden_size embedding_dim embed_dim num_channels".split()
RECURRENT = (nn.LSTM, nn.GRU)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVERSIONS = frozenset(
    "quantize_per_tensor quantize_per_tensor_dynamic quantize_per_channel dequantize to _to_copy contiguous "
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear Cast ReorderInput ReorderOutput "
    "FakeQuantize Quantize Dequantize Convert Reorder".split()
)
"""Operators that only change a number format or the order of numbers in memory."""
STEPS = 1.5
"""Steps of a layer's output beyond which a difference is not rounding: a tie falls to either side, never two away."""
FLOAT_ERROR = 1e-4
"""Error allowed for another order of sums, relative to the largest output. The largest one measured was 8e-7."""


def parametrized(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of `model` that hold parameters themselves, by name, `ROOT` for the model itself."""
    named = model.named_modules()
    return {name or ROOT: m for name, m in named if next(m.parameters(recurse=False), None) is not None}


def tied(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the layers that hold the same first parameter, by the name of each of them."""
    owners: dict[int, list[str]] = {}
    for name, module in parametrized(model).items():
        owners.setdefault(id(next(module.parameters(recurse=False))), []).append(name)
    return {name: names for names in owners.values() for name in names}


def compare(
    before: nn.Module,
    after: nn.Module,
    precision: Mapping[str, Mapping[str, LayerPrecision]],
    left_alone: Mapping[str, str] = MappingProxyType({}),
) -> tuple[LayerAudit, ...]:
    """Return one row for each layer of `before` and `after`; a new one follows the layer whose place it takes.

    `before` is the task's model, `after` the float model that the files were made from. `precision` is how each runtime
    runs each layer, by runtime and layer; an absent layer runs as `after` has it. `left_alone` is why a layer that a
    stage could have changed was left as it was, by layer.
    """
    old, new = parametrized(before), parametrized(after)
    added = [name for name in new if name not in old]
    names: list[str] = []
    for name in old:
        names += [name, *(inner for inner in added if inner.startswith(f"{name}."))]
    return tuple(
        _row(name, old.get(name), new.get(name), precision, left_alone.get(name, ""))
        for name in dict.fromkeys([*names, *added])
    )


def _row(
    name: str,
    old: nn.Module | None,
    new: nn.Module | None,
    precision: Mapping[str, Mapping[str, LayerPrecision]],
    left_alone: str,
) -> LayerAudit:
    parameters = list(new.parameters(recurse=False)) if new is not None else []
    change = "added" if old is None else "removed" if new is None else ""
    if old is not None and new is not None and type(old) is not type(new):
        change = f"was {type(old).__name__}"
    plain = LayerPrecision(str(parameters[0].dtype).removeprefix("torch.")) if parameters else None
    weights = [p for p in parameters if p.dim() > 1]
    total = sum(p.numel() for p in weights)
    return LayerAudit(
        layer=name,
        kind=type(old if new is None else new).__name__,
        parameters_before=sum(p.numel() for p in old.parameters(recurse=False)) if old is not None else 0,
        parameters=sum(p.numel() for p in parameters),
        channels_before=_channels(old),
        channels=_channels(new),
        zeroed=sum(int((p == 0).sum()) for p in weights) / total if total else 0.0,
        precision={runtime: rows.get(name, plain) for runtime, rows in precision.items()} if plain else {},
        kept_because=left_alone,
        change=change,
    )


def _channels(module: nn.Module | None) -> int | None:
    for attribute in CHANNELS:
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else None


def precisions(
    request: BuildRequest,
    title: str,
    runs_as: Callable[[str], str],
    *,
    folded: Callable[[str], bool] = lambda name: True,
    reason: Callable[[str, nn.Module], str] = lambda name, module: "",
) -> dict[str, LayerPrecision]:
    """Return how the runtime `title` runs each layer of the model of an int8 `request`, with the reason for float32.

    `runs_as` returns the precision that a layer was seen to run in, '' for float32; `folded`, whether a BatchNorm that
    does not run in int8 became part of the layer before it; and `reason`, why the runtime has no integer kernel for a
    layer, '' where nothing special is known.
    """
    rows = {}
    for name, module in parametrized(request.model).items():
        precision = runs_as(name)
        if precision and precision != "float32":
            rows[name] = LayerPrecision(precision)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and folded(name):
            rows[name] = LayerPrecision("folded", "part of the layer before it")
        else:
            known = "in `skip`" if name in request.skipped else reason(name, module)
            rows[name] = LayerPrecision("float32", known or _why_float(request, title, module))
    return rows


def _why_float(request: BuildRequest, title: str, module: nn.Module) -> str:
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    if isinstance(module, RECURRENT) and request.precision == "static-int8":
        return "static int8 does not cover recurrent layers; dynamic int8 does"
    if convolution and request.precision == "dynamic-int8":
        return "dynamic int8 does not cover convolutions; static int8 does"
    if isinstance(module, nn.Embedding) and title != "torch":
        return f"{title} keeps its table in float: it is small, or not looked up in the exported graph"
    if not isinstance(module, (nn.Linear, *RECURRENT)) and not convolution:
        return f"int8 does not cover {type(module).__name__}"
    return f"{title} found no integer kernel for it here"


def no_recurrent(title: str, *kinds: type[nn.Module]) -> Callable[[str, nn.Module], str]:
    """Return a `reason` for `precisions` of a runtime that has no int8 kernels for recurrent layers of these kinds."""
    return lambda name, module: f"{title} has no int8 {type(module).__name__}" if isinstance(module, kinds) else ""


@dataclass(frozen=True)
class Difference:
    """How far an integer kernel's output is from the one in float, and whether rounding explains it."""

    share: float
    """The largest difference, relative to the largest absolute output."""
    explained: bool


def difference(expected: torch.Tensor, output: torch.Tensor, *, step: float) -> Difference:
    """Return how far the output of an integer kernel is from `expected`, the same in float, of the same shape.

    Integers are multiplied and summed, scaled, and rounded once. On x86 processors without VNNI, kernels built on
    `vpmaddubsw` add two products of 8 bits in 16 bits and saturate silently: rounding explains one step of a layer's
    output, worth `step` (0 for outputs that are not rounded); saturation loses many.

    Source: oneDNN, "Nuances of int8 Computations"; ONNX Runtime, "Quantize ONNX Models", on U8S8 and AVX2.
    """
    if not expected.numel():
        return Difference(0.0, True)
    largest = expected.abs().max().item()
    error = (expected.double() - output.double()).abs().max().item()
    scale = largest or output.abs().max().item() or 1.0
    return Difference(error / scale, error <= STEPS * step + FLOAT_ERROR * largest)


def integer_check(error: float, layers: Mapping[str, Sequence[Difference]]) -> IntegerCheck:
    """Return the record of a comparison, given the error of the outputs and the differences of each layer."""
    shares = {name: max(d.share for d in differences) for name, differences in layers.items()}
    saturated = tuple(name for name, differences in layers.items() if not all(d.explained for d in differences))
    return IntegerCheck(error, shares, saturated)


def unchecked(path: Path, reason: str) -> Unsupported:
    """Return the error that a file cannot be checked for saturation."""
    remedy = "Compare its accuracy with that on a processor with VNNI."
    return Unsupported(f"Cannot check {path.name} for int8 saturation: {reason}. {remedy}")
