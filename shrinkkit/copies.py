"""Copies of a model that take no more memory than they must."""

import copy
import ctypes
import gc
from typing import Any

import torch
from torch import nn


def sharing(model: nn.Module, *, device: str = "", dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of `model` whose matrices are those of `model` itself, wherever they can be.

    Shared are parameters of two and more dimensions that need not be moved or converted. Vectors are small and buffers
    are written to by some models, so both are copied. `model` is left unchanged as long as nobody writes to the
    parameters of the copy; `own` makes the copy independent. To get a model to train or prune see `channels.duplicate`.

    Args:
        model: Any model.
        device: Where the copy goes; empty for where each tensor is.
        dtype: Of floating parameters and buffers; None for what each of them has.
    """

    def placed(tensor: torch.Tensor, *, anew: bool) -> torch.Tensor:
        kind = dtype if tensor.is_floating_point() else None
        return tensor.detach().to(device=device or tensor.device, dtype=kind or tensor.dtype, copy=anew)

    # Keyed as `deepcopy` does it: what stands here is taken for the copy, so what was tied stays tied.
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        found = placed(parameter, anew=parameter.dim() < 2)
        shared = found.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        known[id(parameter)] = parameter if shared else nn.Parameter(found, parameter.requires_grad)
    known |= {id(buffer): placed(buffer, anew=True) for buffer in model.buffers()}
    return copy.deepcopy(model, known)


def own(copied: nn.Module, model: nn.Module) -> None:
    """Give `copied`, in place, parameters of its own for those that it shares with `model`."""
    theirs = {id(parameter) for parameter in model.parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in theirs:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, made[id(parameter)])


def release() -> None:
    """Give the memory of objects that nobody refers to any more back to the system, where its allocator can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
