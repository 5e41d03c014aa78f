"""Outputs of models: a tensor, or tuples, lists, mappings and dataclasses of tensors."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch


def _items(output: Any) -> Iterable[tuple[Any, Any]]:
    """Return the keys and values of a container of outputs; nothing for other values."""
    if isinstance(output, Mapping):
        return output.items()
    if isinstance(output, (tuple, list)):
        return zip(getattr(output, "_fields", range(len(output))), output, strict=True)
    is_record = dataclasses.is_dataclass(output)
    return ((f.name, getattr(output, f.name)) for f in dataclasses.fields(output)) if is_record else ()


def _named(output: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(output, (torch.Tensor, np.ndarray)):
        yield prefix.removeprefix(".") or "output", torch.as_tensor(output)
    for key, value in () if isinstance(output, (torch.Tensor, np.ndarray)) else _items(output):
        yield from _named(value, f"{prefix}.{key}")


def tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors of `output`, and its arrays as tensors, in a fixed order; other values are ignored."""
    return [tensor for _, tensor in _named(output)]


def names(output: Any) -> list[str]:
    """Return a name for each tensor of `tensors`: the path of keys, fields and positions, or `output`."""
    return [name for name, _ in _named(output)]


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
    """Return `output` as tuples, lists and dicts only, which can be loaded without its classes.

    Values without tensors are removed from mappings and dataclasses.
    """
    if isinstance(output, Mapping) or dataclasses.is_dataclass(output):
        return {str(key): plain(value) for key, value in _items(output) if tensors(value)}
    if isinstance(output, (tuple, list)):
        return (list if isinstance(output, list) else tuple)(map(plain, output))
    return output


def is_plain(output: Any) -> bool:
    """Return whether `output` consists of tensors, tuples, lists and dicts only."""
    if type(output) in (tuple, list, dict):
        return all(is_plain(value) for _, value in _items(output))
    return isinstance(output, torch.Tensor)


def restore(flat: Sequence[torch.Tensor], like: Any) -> Any:
    """Return the tensors of the list `flat` in the structure of `like`."""
    remaining = iter(flat)
    return convert(like, lambda _: next(remaining))


def close(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    """Return whether two outputs agree to 1e-3 of the largest value, which exceeds differences in summation order."""
    return len(left) == len(right) and all(
        a.shape == b.shape and (not a.numel() or bool((a - b).abs().max() <= 1e-3 * b.abs().max()))
        for a, b in ((x.double(), y.double()) for x, y in zip(left, right, strict=True))
    )


class Ragged(list[Any]):
    """Tensors of examples that cannot be stacked."""


def concatenate(batches: Sequence[Any]) -> Any:
    """Return outputs or targets of several batches as those of one.

    Texts and other values, and tensors that differ in more than the size of the batch, become a list of examples.
    """
    first = batches[0]
    if isinstance(first, torch.Tensor):
        if first.dim() == 0 or len({batch.shape[1:] for batch in batches}) == 1:
            return torch.stack(tuple(batches)) if first.dim() == 0 else torch.cat(tuple(batches))
        return Ragged(example for batch in batches for example in batch)
    if isinstance(first, Mapping):
        return {key: concatenate([batch[key] for batch in batches]) for key in first}
    if tensors(first):
        parts = [concatenate(parts) for parts in zip(*batches, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return [value for batch in batches for value in batch]


def select(batch: Any, index: Sequence[int]) -> Any:
    """Return as many examples of a batch, outputs or targets, as it has: those at `index`, which may repeat."""
    if isinstance(batch, Mapping):
        return {key: select(value, index) for key, value in batch.items()}
    if isinstance(batch, Ragged) or (isinstance(batch, list) and not tensors(batch)):
        return type(batch)(batch[i] for i in index)
    return convert(batch, lambda t: t[list(index)] if t.shape[:1] == (len(index),) else t)
