"""Data as people have it, turned into map-style datasets; splits and fidelity targets for what is missing."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from shrinkkit.display import formats
from shrinkkit.errors import InvalidTask
from shrinkkit.tasks import outputs
from shrinkkit.tasks.calls import TARGET_KEYS, Call
from shrinkkit.tasks.metrics import Metric
from shrinkkit.tasks.modules import Example

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


EXAMPLES_OF_SHAPE = 64
"""Examples of a split, evenly spaced, whose shapes tell which dimensions vary."""


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


class WithOutputs(Dataset[Any]):
    """A dataset's inputs, with what the original model returns for each as the target."""

    def __init__(self, dataset: Dataset[Any], model: nn.Module) -> None:
        """Hold a dataset of (inputs, target), and the original model in eval mode on the CPU."""
        self._dataset, self._model = dataset, model
        self._outputs: dict[tuple[int, ...], Any] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Example, Any]:
        inputs, output = self.batch([index])
        return tuple(x[0] for x in inputs), outputs.convert(output, lambda t: t[0] if t.dim() else t)

    def batch(self, indices: Sequence[int]) -> tuple[Example, Any]:
        """Return some inputs as one batch, and the model's outputs for it."""
        inputs, _ = batch(self._dataset, indices)
        output = self._outputs.get(tuple(indices))
        if output is None:
            with torch.no_grad():
                output = self._model(*inputs)
            size = sum(t.nbytes for t in outputs.tensors(output))
            if self._bytes + size <= CACHED_BYTES:
                self._bytes += size
                self._outputs[tuple(indices)] = output
        return inputs, output


def batch(dataset: Any, indices: Sequence[int]) -> tuple[Example, Any]:
    """Return some examples of a dataset as one batch: inputs as a tuple, and targets."""
    if isinstance(dataset, Subset):
        return batch(dataset.dataset, [dataset.indices[i] for i in indices])
    own = isinstance(dataset, (Examples, WithOutputs))
    return dataset.batch(indices) if own else collated([dataset[i] for i in indices])


def collated(examples: Sequence[Any]) -> tuple[Example, Any]:
    """Return (inputs, target) pairs stacked into one batch."""
    inputs, target = default_collate(list(examples))
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), target


def labelled(item: Any, call: Call) -> tuple[Any, Any]:
    """Return the inputs and the target of one example, the target None where it has none."""
    if isinstance(item, Mapping):
        key = next((key for key in TARGET_KEYS if key in item and not _takes(call, key)), None)
        return item, None if key is None else item[key]
    several = isinstance(call.example, tuple)
    if not isinstance(item, (tuple, list)) or (several and _fits(call.example, item)):
        return item, None
    if len(item) == 1:
        return item[0], None
    return item[0], item[1]


def _takes(call: Call, key: str) -> bool:
    return isinstance(call.example, Mapping) and key in call.example


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

    A DataLoader gives its dataset's examples, in the dataset's order, those that its sampler visits. Other iterables
    are read once, up to 10,000 examples or 1 GiB; the batches of a loader over an iterable dataset are taken apart.
    """
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            batched = data.batch_size is not None
            return _materialised(itertools.chain.from_iterable(map(unbatched, data)) if batched else data, name)
        visited = data.sampler if data.batch_sampler is None or data.sampler is not None else data.batch_sampler
        indices = sorted({i for entry in visited for i in (entry if isinstance(entry, (list, tuple)) else (entry,))})
        whole = indices == list(range(len(data.dataset)))  # type: ignore[arg-type]
        return (data.dataset if whole else Subset(data.dataset, indices)), ""
    if isinstance(data, Tensor) or (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return data, ""
    return _materialised(data, name) if isinstance(data, Iterable) else (data, "")


def _materialised(data: Iterable[Any], name: str) -> tuple[list[Any], str]:
    kept: list[Any] = []
    size = 0
    for item in data:
        size += sum(t.nbytes for t in outputs.tensors(item))
        if len(kept) == MOST_MATERIALISED or size > MOST_BYTES:
            return kept, f"Of `{name}`, which can only be iterated, the first {len(kept):,} examples were used."
        kept.append(item)
    return kept, ""


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
        raise InvalidTask(
            f"`{name}` must hold at least {LEAST} examples to be cut into {', '.join(parts)}, got {size}. Give more, "
            "or pass the splits."
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    total, start, result = sum(SHARES[part] for part in parts), 0.0, {}
    for part in parts:
        end = start + size * SHARES[part] / total
        result[part] = Subset(dataset, sorted(order[round(start) : round(end)]))
        start = end
    return result


def sampled(example: Example, count: int = SAMPLED) -> list[Example]:
    """Return `count` inputs drawn at random like the examples of a batch, without batch dimension; deterministic.

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

    return [tuple(like(x, i % len(x)) for x in example) for i in range(count)]


# --- fidelity


def kinds(output: Any, names: Sequence[str], *, is_classifier: bool) -> list[str]:
    """Return how each tensor of an output is compared with the original's: `agreement`, `cosine`, `error` or ``.

    Tensors called `logits`, probabilities, and the first output of a classifier are classes (top-1 agreement), unless
    all inputs give the same one. Single numbers are compared by their error, integers not at all, all other outputs by
    the cosine.
    """
    result = []
    for number, (name, y) in enumerate(zip(names, outputs.tensors(output), strict=True)):
        last = y.shape[-1] if y.dim() > 1 else 1
        rows = y.reshape(-1, last).double()
        probabilities = bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() < 1e-3).all())
        if not y.is_floating_point():
            result.append("")
        elif (
            last > 1
            and ("logits" in name or probabilities or (number == 0 and is_classifier))
            and bool((rows.argmax(1) != rows[0].argmax()).any())
        ):
            result.append("agreement")
        else:
            result.append("cosine" if y[0].numel() > 1 else "error")
    return result


def fidelity(compared: Sequence[str]) -> Metric:
    """Return a metric of outputs against the original's: the mean over tensors of each one's measure.

    1 is equality. An output that has nothing in common with the original's has about 0, which is what can be lost.
    """
    titles = {"agreement": "top-1 agreement", "cosine": "cosine similarity", "error": "1 - relative error"}
    used = dict.fromkeys(titles[kind] for kind in compared if kind)
    name, percent = " and ".join(used) + " with the original", set(compared) <= {"agreement", ""}

    def score(output: Any, target: Any) -> Tensor:
        pairs = zip(compared, outputs.tensors(output), outputs.tensors(target), strict=True)
        return torch.stack([_MEASURES[kind](y, wanted) for kind, y, wanted in pairs if kind]).mean(0)

    return Metric(score, name, range=(0.0, 1.0), per_example=True, percent=percent)


def _agreement(y: Tensor, wanted: Tensor) -> Tensor:
    return (y.argmax(-1) == wanted.argmax(-1)).float().flatten(1 if y.dim() > 2 else 0).reshape(len(y), -1).mean(1)


def _cosine(y: Tensor, wanted: Tensor) -> Tensor:
    return torch.cosine_similarity(y.flatten(1).double(), wanted.flatten(1).double(), eps=1e-30)


def _relative_error(y: Tensor, wanted: Tensor) -> Tensor:
    size = wanted.double().abs().reshape(len(y), -1).amax(1).clamp(min=1e-30)
    return 1 - (y.double() - wanted.double()).abs().reshape(len(y), -1).amax(1) / size


_MEASURES = {"agreement": _agreement, "cosine": _cosine, "error": _relative_error}


def distillation(compared: Sequence[str]) -> Callable[[Any, Any], Tensor]:
    """Return a loss of outputs against the original's: the Kullback-Leibler divergence of classes, and the squared
    error of other outputs relative to their variance.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    """

    def loss(output: Any, target: Any) -> Tensor:
        parts = []
        for kind, y, wanted in zip(compared, outputs.tensors(output), outputs.tensors(target), strict=True):
            if kind == "agreement":
                flat, classes = y.flatten(0, -2), wanted.flatten(0, -2)
                logs = nn.functional.log_softmax(flat, -1), nn.functional.log_softmax(classes, -1)
                parts.append(nn.functional.kl_div(*logs, reduction="batchmean", log_target=True))
            elif kind:
                spread = wanted.var(correction=0).clamp(min=1e-12)
                parts.append(nn.functional.mse_loss(y, wanted) / spread)
        return torch.stack(parts).sum()

    return loss


def complete(
    given: Mapping[str, Any],
    inputs: Any,
    model: nn.Module,
    example: Example,
    call: Call,
    *,
    collate: Callable[[Any], Any] | None,
    scored: bool,
    trained: bool,
) -> dict[str, Any]:
    """Return the fields of a task that follow from its data: the four splits, `unlabelled` and `notes`.

    Args:
        given: The splits that the user gave, None for the others.
        inputs: Unlabelled inputs, or None.
        model: The original.
        example: Its example.
        call: The structure of its calls.
        collate: The user's function of a list of examples that returns a batch.
        scored: Whether the user gave a score; otherwise targets of `validation` and `test` are the original's outputs.
        trained: The same of a loss, for `train`.
    """
    notes: list[str] = []
    pools: dict[str, Any] = {}
    for name, data in (("inputs", inputs), *given.items()):
        if data is not None:
            source, note = map_style(data, name)
            as_it_is = scored and trained and name != "inputs" and source is data and _is_canonical(source, call)
            pools[name] = source if as_it_is and not collate else Examples(source, call, name, collate)
            notes += [note] if note else []
    if not pools:
        pools["inputs"] = [(x, 0) for x in sampled(example)]
        notes.append(
            f"No inputs were given: {SAMPLED} were drawn at random like `example`. Pass a hundred typical `inputs`."
        )
    origins: dict[str, list[str]] = {}
    for split in given:
        free = {"calibration": True, "train": not trained}.get(split, not scored)
        candidates = (split, "inputs" if free else "", "test" if split != "test" else "")
        origin = next((name for name in candidates if name in pools), None)
        if origin is None:
            own = "loss" if split == "train" else "score"
            raise InvalidTask(
                f"`{split}` must be given if a {own} is, because `inputs` have no targets. Give labelled examples, or "
                f"leave `{own}` out: outputs are then compared with the original's."
            )
        origins.setdefault(origin, []).append(split)
    splits: dict[str, Dataset[Any]] = {}
    for origin, parts in origins.items():
        splits |= cut(pools[origin], parts, origin)
        if len(parts) > 1:
            counts = ", ".join(f"{len(splits[part]):,} {part}" for part in parts)  # type: ignore[arg-type]
            notes.append(f"`{origin}` was cut into {counts}.")
    if not scored:
        notes.insert(0, f"Fidelity on {formats.counted(len(splits['test']), 'input')}; no accuracy was measured.")  # type: ignore[arg-type]
    for split in splits:
        if not (trained if split == "train" else scored):
            splits[split] = WithOutputs(splits[split], model)
    # Targets of `train` belong to the loss: they are the score's if both are the user's, or neither.
    unlabelled = ["train"] * (scored != trained)
    unlabelled += ["calibration"] * (scored and "calibration" in origins.get("inputs", ()))
    return {**splits, "unlabelled": tuple(unlabelled), "notes": tuple(notes)}
