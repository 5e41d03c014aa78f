"""Data as people have it, turned into map-style datasets, and splits for what is missing."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from shrinkkit.errors import InvalidTask
from shrinkkit.tasks import outputs
from shrinkkit.tasks.calls import TARGET_KEYS, Call
from shrinkkit.tasks.modules import Example, raw_bytes

MOST_MATERIALISED, MOST_BYTES = 10_000, 1 << 30
"""Examples, and bytes of their tensors, that are read from data that can only be iterated."""
SHARES = {"train": 0.15, "calibration": 0.2, "validation": 0.15, "test": 0.5}
"""Of inputs without splits, for each split that is missing."""
SAMPLED = 96
"""Inputs drawn at random like the example where nothing else is given."""
LEAST = 8
"""Inputs from which splits can be made."""
CACHED_BYTES = 512 << 20
"""Outputs of the original model that are kept between passes over the data."""
PERCENTILES = (10, 50, 90)
"""Of the lengths of data, at which latency is measured too."""
EXAMPLES_OF_SHAPE = 64
"""Examples of a split, evenly spaced, whose shapes tell which dimensions vary."""


class Mapped(Dataset[Any]):
    """A map-style dataset of what a function returns for each index."""

    def __init__(self, size: int, row: Callable[[int], Any]) -> None:
        """Hold the number of rows, and the function that makes one."""
        self._size, self._row = size, row

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        return self._row(index)


class Examples(Dataset[Any]):
    """A map-style dataset of `(inputs, target)` in the structure of a task's calls; unlabelled inputs have target 0."""

    def __init__(self, source: Any, call: Call, name: str, collate: Callable[[Any], Any] | None = None) -> None:
        """Hold `source`, a sequence or map-style dataset called `name` in messages, and the function of its batches."""
        self.source, self._call, self._name, self._collate = source, call, name, collate

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Example, Any]:
        if self._collate:
            inputs, target = self.batch([index])
            return tuple(x[0] for x in inputs), outputs.convert(target, lambda t: t[0])
        return self._read(self.source[index], f"{self._name}[{index}]")

    def batch(self, indices: Sequence[int]) -> tuple[Example, Any]:
        """Return some examples as one batch, by the user's function if there is one."""
        if not self._collate:
            return collated([self[i] for i in indices])
        return self._read(self._collate([self.source[i] for i in indices]), f"{self._name}{list(indices)!r:.40}")

    def _read(self, item: Any, where: str) -> tuple[Example, Any]:
        inputs, target = labelled(item, self._call)
        example = self._call.example
        if isinstance(example, tuple) and not (isinstance(inputs, (tuple, list)) and len(inputs) == len(example)):
            inputs = (inputs,)
        flat = self._call.flat(inputs, f"The inputs of `{where}`")
        return flat, (torch.zeros(len(flat[0])) if self._collate else 0) if target is None else target


def varying(splits: Iterable[Dataset[Any]], example: Example) -> tuple[frozenset[int], ...]:
    """Return, for each input, the dimensions of a batch whose sizes differ between examples: 1 is the first."""
    found: list[set[int]] = [set() for _ in example]
    for dataset in splits:
        size = len(dataset)  # type: ignore[arg-type]
        for i in range(0, size, max(1, -(-size // EXAMPLES_OF_SHAPE))):
            inputs = dataset[i][0]
            for dims, x, like in zip(found, (inputs,) if isinstance(inputs, Tensor) else inputs, example, strict=True):
                dims |= {d for d, (a, b) in enumerate(zip(x.shape, like.shape[1:], strict=True), 1) if a != b}
    return tuple(map(frozenset, found))


def of_lengths(dataset: Dataset[Any], dims: Sequence[frozenset[int]], size: int) -> dict[str, Example]:
    """Return batches of `size` examples by name, whose lengths are the 10th, 50th and 90th percentile of a dataset's.

    Lengths are the sizes that vary: `dims` of each input, see `varying`. Up to 64 examples are read, evenly spaced.
    """
    own, total = without_outputs(dataset), len(dataset)  # type: ignore[arg-type]

    def sizes(inputs: Example) -> tuple[int, ...]:
        return next((tuple(x.shape[d] for d in sorted(some)) for x, some in zip(inputs, dims, strict=True) if some), ())

    read = range(0, total, max(1, -(-total // EXAMPLES_OF_SHAPE)))
    order = sorted(read, key=lambda i: math.prod(sizes(batch(own, [i])[0])))
    result: dict[str, Example] = {}
    known: set[tuple[int, ...]] = {()}
    for percentile in PERCENTILES:
        last = max(round(percentile / 100 * (len(order) - 1)), min(size, len(order)) - 1)
        # Those just below, since the longest of a batch is its length.
        inputs, _ = batch(own, [order[(last - k) % len(order)] for k in range(size)])
        if (lengths := sizes(inputs)) not in known:
            known.add(lengths)
            shown = "\N{MULTIPLICATION SIGN}".join(map(str, lengths))
            result[f"length {shown} ({percentile}th percentile of {len(order)})"] = inputs
    return result


class WithOutputs(Dataset[Any]):
    """A dataset's inputs, with what the original model returns for each as the target."""

    def __init__(self, dataset: Dataset[Any], model: nn.Module) -> None:
        """Hold a dataset of (inputs, target), and the original model in eval mode on the CPU."""
        self.dataset, self._model = dataset, model
        self._outputs: dict[tuple[int, ...], Any] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Example, Any]:
        inputs, output = self.batch([index])
        return tuple(x[0] for x in inputs), outputs.convert(output, lambda t: t[0] if t.dim() else t)

    def batch(self, indices: Sequence[int]) -> tuple[Example, Any]:
        """Return some inputs as one batch, and the model's outputs for it."""
        inputs, _ = batch(self.dataset, indices)
        output = self._outputs.get(tuple(indices))
        if output is None:
            with torch.no_grad():
                output = self._model(*inputs)
            size = sum(t.nbytes for t in outputs.tensors(output))
            if self._bytes + size <= CACHED_BYTES:
                self._bytes += size
                self._outputs[tuple(indices)] = output
        return inputs, output


class Held(Dataset[Any]):
    """A dataset whose batches are read once, and kept in memory."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        """Hold a dataset of (inputs, target)."""
        self.dataset = dataset
        self._batches: dict[tuple[int, ...], tuple[Example, Any]] = {}

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def batch(self, indices: Sequence[int]) -> tuple[Example, Any]:
        """Return some examples as one batch."""
        if (key := tuple(indices)) not in self._batches:
            self._batches[key] = batch(self.dataset, indices)
        return self._batches[key]


def without_outputs(dataset: Any) -> Any:
    """Return a dataset as it was given, whose inputs can be read without a call of the original model."""
    return dataset.dataset if isinstance(dataset, WithOutputs) else dataset


def batch(dataset: Any, indices: Sequence[int]) -> tuple[Example, Any]:
    """Return some examples of a dataset as one batch: inputs as a tuple, and targets."""
    if isinstance(dataset, Subset):
        return batch(dataset.dataset, [dataset.indices[i] for i in indices])
    own = isinstance(dataset, (Examples, Held, WithOutputs))
    return dataset.batch(indices) if own else collated([dataset[i] for i in indices])


def collated(examples: Sequence[Any]) -> tuple[Example, Any]:
    """Return (inputs, target) pairs stacked into one batch."""
    inputs, target = default_collate(list(examples))
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), target


def labelled(item: Any, call: Call) -> tuple[Any, Any]:
    """Return the inputs and the target of one example, the target None where it has none."""
    if isinstance(item, Mapping):
        taken = call.example if isinstance(call.example, Mapping) else ()
        key = next((key for key in TARGET_KEYS if key in item and key not in taken), None)
        return item, None if key is None else item[key]
    several = isinstance(call.example, tuple)
    if not isinstance(item, (tuple, list)) or (several and _fits(call.example, item)):
        return item, None
    return item[0], item[1] if len(item) > 1 else None


def _fits(example: tuple[Any, ...], item: Sequence[Any]) -> bool:
    """Return whether the parts of an example without its batch dimension are those of `item`."""
    return len(item) == len(example) and all(
        isinstance(value, Tensor) and value.shape == like.shape[1:] and value.dtype == like.dtype
        if isinstance(like, Tensor)
        else isinstance(value, type(like))
        for like, value in zip(example, item, strict=True)
    )


def _is_canonical(dataset: Any, call: Call) -> bool:
    """Return whether the first example of a dataset needs no conversion, or cannot be read, which `check` explains."""
    if not isinstance(call.example, tuple):
        return False
    try:
        item = dataset[0]
    except Exception:  # a user's dataset may raise anything
        return True
    inputs = item[0] if isinstance(item, (tuple, list)) and item else item
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return not any(isinstance(x, (np.ndarray, np.generic, list, Mapping)) for x in inputs)


def map_style(data: Any, name: str) -> tuple[Any, str]:
    """Return `data` as a sequence or map-style dataset, and a sentence on what was left unread ('' if nothing).

    A DataLoader gives its dataset's examples as its own collate function returns each, in the dataset's order, those
    that its sampler visits. Other iterables are read once, up to 10,000 examples or 1 GiB, and must begin alike in a
    second pass, if there is one; the batches of a loader over an iterable dataset are taken apart.
    """
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            return _materialised(data, name, is_batched=data.batch_size is not None)
        visited = data.sampler if data.batch_sampler is None or data.sampler is not None else data.batch_sampler
        indices = sorted({i for entry in visited for i in (entry if isinstance(entry, (list, tuple)) else (entry,))})
        whole = indices == list(range(len(data.dataset)))  # type: ignore[arg-type]
        source = data.dataset if whole else Subset(data.dataset, indices)
        if data.batch_sampler is None or data.collate_fn is default_collate:
            return source, ""
        return Mapped(len(source), lambda i: unbatched(data.collate_fn([source[i]]))[0]), ""  # type: ignore[arg-type]
    is_map = isinstance(data, Tensor) or (hasattr(data, "__len__") and hasattr(data, "__getitem__"))
    return (data, "") if is_map or not isinstance(data, Iterable) else _materialised(data, name)


def _materialised(data: Iterable[Any], name: str, *, is_batched: bool = False) -> tuple[list[Any], str]:
    kept: list[Any] = []
    size, note = 0, ""
    for item in itertools.chain.from_iterable(map(unbatched, data)) if is_batched else data:
        size += sum(t.nbytes for t in outputs.tensors(item))
        if len(kept) == MOST_MATERIALISED or size > MOST_BYTES:
            note = f"Of `{name}`, which can only be iterated, the first {len(kept):,} examples were used."
            break
        kept.append(item)
    # What can be read only once is at its end now, or goes on.
    again = None if isinstance(data, Iterator) else next(iter(data), None)
    if kept and again is not None and _bytes(unbatched(again)[0] if is_batched else again) != _bytes(kept[0]):
        raise InvalidTask(
            f"`{name}` must give its examples in the same order each time it is iterated, because every step reads it, "
            "but two passes begin differently. Do not shuffle it, or fix its seed."
        )
    return kept, note


def _bytes(item: Any) -> list[bytes]:
    return [raw_bytes(tensor) for tensor in outputs.tensors(item)]


def unbatched(batch: Any) -> list[Any]:
    """Return the examples of a batch of any structure."""
    size = next(len(t) for t in outputs.tensors(batch))
    return [outputs.convert(batch, lambda t, i=i: t[i]) for i in range(size)]  # type: ignore[misc]


def cut(dataset: Any, parts: Sequence[str], name: str) -> dict[str, Any]:
    """Return disjoint parts of a dataset by split: deterministic, at random, in the proportions of `SHARES`."""
    size = len(dataset)
    if len(parts) == 1:
        return {parts[0]: dataset}
    if size < LEAST:
        rule = f"`{name}` must hold at least {LEAST} examples to be cut into {', '.join(parts)}"
        raise InvalidTask(f"{rule}, got {size}. Give more, or pass the splits.")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    total, start, result = sum(SHARES[part] for part in parts), 0.0, {}
    for part in parts:
        end = start + size * SHARES[part] / total
        result[part] = Subset(dataset, sorted(order[round(start) : round(end)]))
        start = end
    return result


def sampled(example: Example) -> list[Example]:
    """Return `SAMPLED` inputs drawn at random like the examples of a batch, without batch dimension; deterministic.

    Floats are an example plus noise of half the spread of its tensor, integers are drawn from the tensor's values;
    masks (integers of at most two values, and bools) are copied.
    """
    draw = torch.Generator().manual_seed(0)

    def like(x: Tensor, row: int) -> Tensor:
        if x.is_floating_point():
            return x[row] + 0.5 * x.std(correction=0) * torch.randn(x.shape[1:], generator=draw, dtype=x.dtype)
        values = torch.unique(x)
        if x.dtype == torch.bool or x.is_complex() or len(values) <= 2:
            return x[row].clone()
        chosen: Tensor = values[torch.randint(len(values), x.shape[1:], generator=draw)]
        return chosen

    return [tuple(like(x, i % len(x)) for x in example) for i in range(SAMPLED)]


def splits(
    given: Mapping[str, Any],
    inputs: Any,
    example: Example,
    call: Call,
    *,
    collate: Callable[[Any], Any] | None,
    scored: bool,
    trained: bool,
) -> tuple[dict[str, Dataset[Any]], tuple[str, ...], tuple[str, ...]]:
    """Return the four splits, those whose targets are not the score's, and sentences on how missing ones were made.

    `given` are the splits that the user gave, None for the others, `inputs` unlabelled inputs or None, and `collate`
    the user's function of a list of examples that returns a batch. `scored` is whether the user gave a score; otherwise
    `validation` and `test` need no targets. `trained` is the same of a loss, for `train`.
    """
    pools, notes = _pools({"inputs": inputs, **given}, call, collate, as_it_is=scored and trained)
    if not pools:
        pools["inputs"] = [(x, 0) for x in sampled(example)]
        notes.append(f"No inputs were given: {SAMPLED} were drawn at random like `example`. Pass 100 typical `inputs`.")
    parts: dict[str, list[str]] = {}
    for split in given:
        is_free = {"calibration": True, "train": not trained}.get(split, not scored)
        candidates = (split, "inputs" if is_free else "", "test" if split != "test" else "")
        origin = next((name for name in candidates if name in pools), None)
        if origin is None:
            own = "loss" if split == "train" else "score"
            rule = f"`{split}` must be given if a {own} is, because `inputs` have no targets. Give labelled examples,"
            raise InvalidTask(f"{rule} or leave `{own}` out: outputs are then compared with the original's.")
        parts.setdefault(origin, []).append(split)
    result: dict[str, Dataset[Any]] = {}
    for origin, names in parts.items():
        result |= cut(pools[origin], names, origin)
        if len(names) > 1:
            notes.append(f"`{origin}` was cut into {', '.join(f'{len(result[name]):,} {name}' for name in names)}.")  # type: ignore[arg-type]
    # Targets of `train` belong to the loss: they are the score's if both are the user's, or neither.
    unlabelled = ["train"] * (scored != trained)
    unlabelled += ["calibration"] * (scored and "calibration" in parts.get("inputs", ()))
    return result, tuple(unlabelled), tuple(notes)


def _pools(
    given: Mapping[str, Any], call: Call, collate: Callable[[Any], Any] | None, *, as_it_is: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the data that were given as datasets, and notes; `as_it_is` leaves those that need no conversion."""
    pools: dict[str, Any] = {}
    notes: list[str] = []
    for name, data in given.items():
        if data is not None:
            source, note = map_style(data, name)
            kept = as_it_is and not collate and name != "inputs" and source is data and _is_canonical(source, call)
            pools[name] = source if kept else Examples(source, call, name, collate)
            notes += [note] if note else []
    return pools, notes
