"""How far each layer of a quantized model is from the same layer of the float model.

Layers run inside their models, on real inputs. For what a whole model answers see `measure`.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shrinkkit.runtimes.torch import quantize
from shrinkkit.runtimes.torch.export import HalfPrecision
from shrinkkit.tasks import modules, outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.transforms.groups import counted


@dataclass(frozen=True)
class LayerError:
    """How far the output of one layer of a quantized model is from that of the float model."""

    layer: str
    runs_as: str
    """`int8`, `float32`, `float16` or `bfloat16`; empty where the layer cannot be compared."""
    error: float | None
    """Norm of the difference as a share of the float output's norm; infinite where an output is not finite."""
    why: str = ""
    """Why a layer cannot be compared; empty for others."""


@torch.inference_mode()
def compare(model: nn.Module, quantized: nn.Module, inputs: Sequence[Example]) -> tuple[tuple[LayerError, ...], float]:
    """Return how far each layer of a quantized model is from the float model's, and how far the outputs are.

    Layers are matched by name. One that was fused with the normalisation or the ReLU after it is compared with what the
    float model has after both. An error includes what the layer inherits from those before it. `model` is in eval mode,
    `quantized` a copy from `quantize`, `inputs` at least one batch; all are on the CPU.
    """
    other = quantized.model if isinstance(quantized, HalfPrecision) else quantized
    after, names = dict(other.named_modules()), tuple(counted(model))
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    folded = [name for name in norms if not isinstance(after.get(name), _BatchNorm)]
    sums, why = {name: _Sum() for name in ("", *names)}, dict[str, str]()
    for batch in inputs:
        with _recorded(model, [*sums, *folded]) as wanted, _recorded(other, sums) as found:
            model(*batch)
            quantized(*batch)
        normed = [call for name in folded for call in wanted.get(name, [])]
        for name in sums:
            reference = _reference(wanted.get(name, []), found.get(name, []), normed, after.get(name))
            if isinstance(reference, str):
                why[name] = reference
                continue
            for a, call in zip(reference, found[name], strict=True):
                sums[name].add(a, call.copied)
    compared = {name: LayerError(name, _runs_as(after[name]), sums[name].error()) for name in names if name not in why}
    others = {name: LayerError(name, "", None, reason) for name, reason in why.items()}
    return tuple(map((compared | others).__getitem__, names)), sums[""].error()


@dataclass
class _Sum:
    """Squares added up over batches."""

    difference: float = 0.0
    reference: float = 0.0

    def add(self, reference: Tensor, found: Tensor) -> None:
        self.difference += float((found.double() - reference.double()).square().sum())
        self.reference += float(reference.double().square().sum())

    def error(self) -> float:
        """Return the relative error; infinite where it is not finite, or differs from nothing but zeros."""
        if self.difference == 0:
            return 0.0
        share = math.sqrt(self.difference / self.reference) if self.reference else math.inf
        return share if math.isfinite(share) else math.inf


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer: what it was given and returned, and a copy, which later work in place leaves alone."""

    given: Tensor | None
    returned: Tensor
    copied: Tensor


@contextlib.contextmanager
def _recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[_Call]]]:
    """Give the calls of the modules of `model` called `names`, by name, that are made while the block runs."""
    calls: dict[str, list[_Call]] = {}

    def keep(name: str, module: nn.Module, given: Any, returned: Any) -> None:
        tensors = outputs.tensors(returned)
        if tensors:
            before = next(iter(outputs.tensors(given)), None)
            calls.setdefault(name, []).append(_Call(before, tensors[0], _plain(tensors[0]).clone()))

    known = dict(model.named_modules())
    with modules.hooked(known[name].register_forward_hook(partial(keep, name)) for name in names if name in known):
        yield calls


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, whether it holds quantized integers, 16 bits or floats."""
    return (tensor.dequantize() if tensor.is_quantized else tensor).float()


def _reference(
    wanted: Sequence[_Call], found: Sequence[_Call], norms: Sequence[_Call], module: nn.Module | None
) -> list[Tensor] | str:
    """Return what each call of a quantized layer stands for in the float model, or why nothing does.

    `wanted` and `found` are its calls in the float and in the quantized model, `norms` those, in the float model, of
    normalisations that were folded into the layers before them.
    """
    if not wanted:
        return "is not called as a layer when the float model runs"
    if not found:
        return "is no separate layer once the model is quantized"
    if len(wanted) != len(found):
        return f"is called {len(wanted)} times in float and {len(found)} times once quantized"
    tensors = [next((n.copied for n in norms if n.given is call.returned), call.copied) for call in wanted]
    kind = type(module)
    fused = kind.__name__ if kind.__module__.startswith("torch.ao.nn.intrinsic") else ""
    if fused.endswith(("ReLU", "ReLU1d", "ReLU2d", "ReLU3d")) and "Leaky" not in fused:
        tensors = [torch.relu(tensor) for tensor in tensors]
    elif fused:
        return f"has become {fused}, which computes more than the layer did"
    if [t.shape for t in tensors] != [call.copied.shape for call in found]:
        return "has outputs of another shape once quantized"
    return tensors


def _runs_as(module: nn.Module) -> str:
    if quantize.is_int8(module):
        return "int8"
    return str(next((p.dtype for p in module.parameters()), torch.float32)).removeprefix("torch.")
