"""Copies of a model that take no more memory than they must, and memory given back."""

import contextlib
import copy
import ctypes
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of two of glibc's settings; see mallopt(3)."""


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
    if trim := _allocator("malloc_trim"):
        trim(0)


@contextlib.contextmanager
def returning() -> Iterator[None]:
    """Give each large block back to the system as soon as it is freed, while the block runs.

    glibc keeps blocks of up to 32 MB that it has seen freed once, for the next of their size; what loads a model weight
    by weight then holds it twice. Afterwards it does so again: the numbers are those that it comes to by itself.
    """
    mallopt = _allocator("mallopt")
    if not mallopt:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def _allocator(function: str) -> Callable[..., int] | None:
    """Return a function of glibc's allocator, None where another one is in use."""
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), function, None)
    return found
