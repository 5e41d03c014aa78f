"""What models return: a tensor, or tuples, lists, mappings and dataclasses of tensors."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch


def tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors of `output`, and its arrays as tensors, in a fixed order; other values are passed over."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, np.ndarray):
        return [torch.from_numpy(output)]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in tensors(value)]
    if dataclasses.is_dataclass(output):
        return [t for field in dataclasses.fields(output) for t in tensors(getattr(output, field.name))]
    return []


def names(output: Any, prefix: str = "") -> list[str]:
    """Return a name for each tensor that `tensors` gives: the path of keys, fields and positions, or `output`."""
    if isinstance(output, (torch.Tensor, np.ndarray)):
        return [prefix.removeprefix(".") or "output"]
    found: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        found = output.items()
    elif isinstance(output, (tuple, list)):
        found = zip(getattr(output, "_fields", range(len(output))), output, strict=True)
    elif dataclasses.is_dataclass(output):
        found = ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    return [name for key, value in found for name in names(value, f"{prefix}.{key}")]


def convert(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return `output` with `change` applied to each of its tensors, in the same structure."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, dict):
        # Hugging Face outputs are dicts whose constructor takes keywords.
        changed = {key: convert(value, change) for key, value in output.items()}
        return changed if type(output) is dict else type(output)(**changed)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(convert(value, change) for value in output))
    if isinstance(output, (tuple, list)):
        return type(output)(convert(value, change) for value in output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{key: convert(value, change) for key, value in vars(output).items()})
    return output


def plain(output: Any) -> Any:
    """Return `output` in tuples, lists and dicts alone, which can be loaded where its own classes are not known.

    What holds no tensor is left out of mappings and dataclasses.
    """
    if isinstance(output, Mapping) or dataclasses.is_dataclass(output):
        known = output if isinstance(output, Mapping) else vars(output)
        return {str(key): plain(value) for key, value in known.items() if tensors(value)}
    if isinstance(output, (tuple, list)):
        values = [plain(value) for value in output]
        return values if isinstance(output, list) else tuple(values)
    return output


def is_plain(output: Any) -> bool:
    """Return whether `output` is made of tensors, tuples, lists and dicts alone."""
    if isinstance(output, (tuple, list, dict)):
        inner = output.values() if isinstance(output, dict) else output
        return type(output) in (tuple, list, dict) and all(is_plain(value) for value in inner)
    return isinstance(output, torch.Tensor)


def restore(flat: Sequence[torch.Tensor], like: Any) -> Any:
    """Return the tensors of `flat`, which a runtime gave as a list, in the structure of `like`."""
    rest: Iterator[torch.Tensor] = iter(flat)
    return convert(like, lambda _: next(rest))


def close(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    """Return whether two outputs agree to a thousandth of the largest value, which another order of sums keeps."""
    return len(left) == len(right) and all(
        a.shape == b.shape and (not a.numel() or bool((a - b).abs().max() <= 1e-3 * b.abs().max()))
        for a, b in ((x.double(), y.double()) for x, y in zip(left, right, strict=True))
    )
