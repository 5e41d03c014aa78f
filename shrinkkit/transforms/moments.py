"""Second moments of what layers multiply by their weights, on calibration data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shrinkkit.tasks import modules
from shrinkkit.tasks.modules import Example
from shrinkkit.transforms.groups import is_conv1d, is_linear

MOST_BYTES = 1 << 30
"""Of the moments of layers that are measured in one pass over the data."""


@dataclass(eq=False)
class Moments:
    """Of the rows that a layer multiplies by its weights: its inputs, or the patches of a convolution."""

    mean: Tensor
    """Shape (groups, inputs), float64; groups is 1 but for grouped convolutions."""
    second: Tensor
    """Mean of the products of two inputs, shape (groups, inputs, inputs), float64."""
    rows: int = 0


def is_covered(layer: nn.Module) -> bool:
    """Return whether `of` covers a layer: Linear of either layout, and Conv2d."""
    return is_linear(layer) or isinstance(layer, nn.Conv2d)


def matrix(layer: nn.Module, values: Tensor | None = None) -> Tensor:
    """Return the weights of a covered layer, or `values` in their shape, as a tensor (groups, outputs, inputs)."""
    values = layer.get_parameter("weight").detach() if values is None else values
    values = values.T if is_conv1d(layer) else values
    return values.reshape(getattr(layer, "groups", 1), -1, values[0].numel())


def set_matrix(layer: nn.Module, values: Tensor) -> None:
    """Set the weights of a covered layer to `values`, in the shape that `matrix` returns."""
    weight = layer.get_parameter("weight").detach()
    weight.copy_(values[0].T if is_conv1d(layer) else values.reshape(weight.shape))


@torch.no_grad()
def of(model: nn.Module, names: Sequence[str], inputs: Sequence[Example]) -> Iterator[tuple[str, Moments]]:
    """Yield the moments of each of the covered layers `names`, in this order; without rows for one that is not called.

    `model`, in eval mode, runs on the batches `inputs` as often as the memory for moments requires; it may be changed
    between two results, and then gives those of a later pass. All are on the CPU.
    """
    layers = {name: model.get_submodule(name) for name in names}
    while layers:
        block: dict[str, Moments] = {}
        for name, layer in layers.items():
            groups, _, width = matrix(layer).shape
            if block and 8 * sum(m.second.numel() for m in block.values()) + 8 * groups * width**2 > MOST_BYTES:
                break
            zeros = torch.zeros(groups, width, width, dtype=torch.float64)
            block[name] = Moments(zeros[..., 0].clone(), zeros)
        hooks = (
            layers[name].register_forward_pre_hook(partial(_add, found), with_kwargs=True)
            for name, found in block.items()
        )
        with modules.hooked(hooks), modules.plain_attention():
            for batch in inputs:
                model(*batch)
        for name, found in block.items():
            del layers[name]
            found.mean /= max(found.rows, 1)
            found.second /= max(found.rows, 1)
            yield name, found


def _add(found: Moments, layer: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    x = _rows(layer, (*given, *keywords.values())[0])
    found.rows += x.shape[1]
    found.mean += x.sum(1, dtype=torch.float64)
    found.second += x.mT @ x


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what `layer` multiplies by its weights for the input `x`, shape (groups, rows, inputs)."""
    x = x.float()
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x.reshape(-1, *x.shape[-3:]), layer._reversed_padding_repeated_twice, mode=mode)
    patches = functional.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
    split = patches.reshape(len(patches), layer.groups, -1, patches.shape[-1])
    return split.permute(1, 0, 3, 2).flatten(1, 2)
