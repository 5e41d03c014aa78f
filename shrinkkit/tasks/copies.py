"""Copies of a model that share its memory, and freed memory returned to the system."""

import contextlib
import copy
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of two of glibc's settings; see mallopt(3)."""


def shallow_copy(model: nn.Module, *, device: str = "", dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of `model`, moved and converted, that shares its matrices where neither is needed.

    Vectors and buffers are always copied: they are small, and some models write to their buffers. `unshare` makes the
    copy independent; to get a model to train or prune see `modules.duplicate`.
    """

    def placed(tensor: torch.Tensor, *, copied: bool) -> torch.Tensor:
        kind = dtype if tensor.is_floating_point() else None
        return tensor.detach().to(device=device or tensor.device, dtype=kind or tensor.dtype, copy=copied)

    # `deepcopy` takes what this dictionary holds for the copy, so tied parameters stay tied.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        tensor = placed(parameter, copied=parameter.dim() < 2)
        shared = tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        memo[id(parameter)] = parameter if shared else nn.Parameter(tensor, parameter.requires_grad)
    memo |= {id(buffer): placed(buffer, copied=True) for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def unshare(copied: nn.Module, model: nn.Module) -> None:
    """Copy, in place, the parameters that `copied` shares with `model`."""
    shared = {id(parameter) for parameter in model.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in shared:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, copies[id(parameter)])


def trim_heap() -> None:
    """Collect garbage and return freed memory to the system, where the allocator can."""
    gc.collect()
    if trim := _allocator("malloc_trim"):
        trim(0)


@contextlib.contextmanager
def freeing_large_blocks(least: int = 1 << 20) -> Iterator[None]:
    """Return each block of `least` bytes or more to the system as soon as it is freed, while the block runs.

    glibc keeps freed blocks of up to 32 MB for later ones, so loading a model weight by weight would hold each weight
    twice. The thresholds restored at the end are those that glibc arrives at by itself.
    """
    mallopt = _allocator("mallopt")
    if not mallopt:
        yield
        return
    mallopt(_MMAP_THRESHOLD, least)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def _allocator(function: str) -> Callable[..., int] | None:
    """Return a function of glibc's allocator; None with another allocator."""
    # Windows cannot load the running program as a library.
    return None if sys.platform == "win32" else getattr(ctypes.CDLL(None), function, None)
