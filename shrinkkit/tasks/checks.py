"""Checks of a task, before any long work starts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from shrinkkit.errors import InvalidTask
from shrinkkit.tasks import contract, outputs, score_check
from shrinkkit.tasks.duplicates import Sketches
from shrinkkit.tasks.modules import Example, raw_bytes
from shrinkkit.tasks.task import SPLITS, Task, batches, collated, spaced
from shrinkkit.tasks.usercode import blaming

EXAMPLES_HASHED, TRAIN_HASHED = 10_000, 64
"""Examples of a split, and of `train`, whose contents the fingerprint covers, at most; see `look`."""
MOST_REPEATED = 0.05
"""Share of the examples of `validation` and `test` that may repeat the inputs of another."""

_EXAMPLES_COMPARED, _EXAMPLES_JUDGED, _BATCH_CHECKED = 20_000, 2048, 32
_SHIFTS, _BATCHES_HALVED = 4, 8
_LONGEST = 80


def check(task: Task) -> None:
    """Check the rules that every step relies on; raises InvalidTask otherwise.

    Compares all examples of all splits for duplicates, at most 20,000 a split, evenly spaced. Scores the model on at
    most 2048 examples of each split (one batch of `train`): it must score better than with shuffled targets.

    Args:
        task: Task to check; it is left unchanged.

    Raises:
        InvalidTask: A rule is broken; the message says which, by what, and what to do.
    """
    _checked(task)


def _checked(task: Task) -> tuple[float, float]:
    """Check a task as `check` does, and return its lowest and its highest score on validation and test."""
    _check_types(task)
    contract.check(task.model, task.example)
    _check_splits(task)
    contract.check_batch(task.model, _some_inputs(task))
    for split in ("train", "calibration"):
        _judged(task, split)
    judged = [_judged(task, split) for split in ("validation", "test")]
    real, others, zeros = (torch.cat(parts) for parts in zip(*judged, strict=True))
    score_check.check_above_chance(real, others, zeros)
    _check_loss(task)
    return float(real.min()), float(real.max())


def _check_types(task: Task) -> None:
    if not (isinstance(task.class_names, tuple) and all(isinstance(name, str) for name in task.class_names)):
        raise InvalidTask(
            f'`class_names` must be a tuple of texts, got {task.class_names!r:.80}. Write `("cat", "dog")`.'
        )
    for field, text in [("name", task.name), ("metric", task.metric), *(("class_names", n) for n in task.class_names)]:
        if (
            not isinstance(text, str)
            or not 1 <= len(text) <= _LONGEST
            or not text.isprintable()
            or text != text.strip()
        ):
            raise InvalidTask(
                f"`{field}` must be a text of 1 to {_LONGEST} characters on one line, got {text!r:.80}. It stands in "
                "tables and titles."
            )
    for field in ("score", "loss"):
        if not callable(getattr(task, field)):
            raise InvalidTask(
                f"`{field}` must be a function of (output, targets), got {type(getattr(task, field)).__name__}. "
                "Pass the function itself, without calling it."
            )


def _check_splits(task: Task) -> None:
    sketches = Sketches(task.example)
    for split in SPLITS:
        for inputs, _ in _examples(task, split, _EXAMPLES_COMPARED):
            sketches.add(split, inputs)
        if split != "train" and not _reads_alike(getattr(task, split)):
            raise InvalidTask(
                f"`{split}` must give the same example each time, but `{split}[0]` differs when read twice. "
                "Augment at random in `train` only."
            )
    for shared, how in ((sketches.equal(), "share"), (sketches.near(), "all but share")):
        if shared:
            told = "; ".join(
                f"`{a}` and `{b}` {how} {n} {'input' if n == 1 else 'inputs'}" for (a, b), n in shared.items()
            )
            raise InvalidTask(f"Splits must not overlap, but {told}. Split once, and remove duplicates before.")
    for split in ("validation", "test"):
        size, repeated = sketches.splits.count(split), sketches.repeats(split)
        if repeated > MOST_REPEATED * size:
            raise InvalidTask(
                f"At most {MOST_REPEATED:.0%} of the examples of `{split}` may repeat the inputs of another, but "
                f"{repeated} of {size} do, so it proves less than its size says. Remove duplicates."
            )


def _reads_alike(dataset: Dataset[Any]) -> bool:
    first, again = (b"".join(map(raw_bytes, outputs.tensors(list(dataset[0])))) for _ in range(2))
    return first == again


def _examples(task: Task, split: str, most: int) -> Iterator[tuple[Example, Any]]:
    """Yield the inputs, as a tuple, and the target of examples of a split, at most `most`, after a look at each."""
    dataset = getattr(task, split)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InvalidTask(
            f"`{split}` must be a map-style dataset (`__len__`, `__getitem__`), got {type(dataset).__name__}."
        )
    with blaming(f"`len({split})` must be a number of examples"):
        size, again = len(dataset), len(dataset)
    if size != again:
        raise InvalidTask(f"`len({split})` must be the same each time, got {size} and {again}. Fix its `__len__`.")
    if size == 0:
        raise InvalidTask(
            f"`{split}` must hold at least one example, but it is empty. Give every split examples of its own."
        )
    expected = [(tuple(x.shape[1:]), x.dtype) for x in task.example]
    for i in spaced(size, most):
        with blaming(f"`{split}[{i}]` must give (inputs, target), as `len({split})` is {size}"):
            inputs, target = dataset[i]
        inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
        if not isinstance(inputs, tuple | list) or not all(isinstance(x, torch.Tensor) for x in inputs):
            raise InvalidTask(
                f"The inputs of `{split}[{i}]` must be a tensor or a tuple of tensors, got {type(inputs).__name__}."
            )
        if elsewhere := [str(x.device) for x in inputs if x.device.type != "cpu"]:
            raise InvalidTask(
                f"Every example must be on the CPU, but `{split}[{i}]` is on {elsewhere[0]}. Call `.cpu()`."
            )
        found = [(tuple(x.shape), x.dtype) for x in inputs]
        if found != expected:
            raise InvalidTask(
                f"Every example must have the shapes and dtypes of `example` without its batch dimension, {expected}, "
                f"but `{split}[{i}]` has {found}. Make `example` a batch of the data."
            )
        yield tuple(inputs), target


def _some_inputs(task: Task) -> Example:
    """Return the inputs of some examples of calibration and validation as one batch."""
    some = [
        inputs for split in ("calibration", "validation") for inputs, _ in _examples(task, split, _BATCH_CHECKED // 2)
    ]
    return tuple(torch.stack(parts) for parts in zip(*some, strict=True))


def _judged(task: Task, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scores of examples of a split: as they are, by the targets of others, and of outputs of zeros.

    At most 2048 examples are judged (of train, one batch), in an order drawn by a fixed seed.
    """
    dataset, batch = getattr(task, split), len(task.example[0])
    chosen = spaced(len(dataset), batch if split == "train" else _EXAMPLES_JUDGED)
    chosen = [chosen[i] for i in torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).tolist()]
    judged: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    passed: list[Any] = []
    alone: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(chosen), batch):
        indices = chosen[start : start + batch]
        where = f"{split}[{', '.join(map(str, indices[:8]))}{', ...' * (len(indices) > 8)}]"
        with blaming(f"The examples `{where}` must stack to a batch"):
            examples = [dataset[i] for i in indices]
            inputs, target = collated(examples)
        output = _answer(task.model, inputs, where)
        own = score_check.of(task.score, output, target, len(indices), f"`{where}`")
        targets = [target for _, target in examples]
        passed = (passed or targets * _SHIFTS)[-_SHIFTS:]
        by_others = []
        for shift in range(1, _SHIFTS + 1):
            other = default_collate([*passed, *targets][len(passed) - shift :][: len(targets)])
            by_others.append(score_check.of(task.score, output, other, len(indices), f"`{where}` with other targets"))
        zeros = score_check.zeroed(task.score, output, target, len(indices))
        judged.append((own, torch.stack(by_others, 1), zeros))
        if len(indices) > 1 and len(alone) < 2 * _BATCHES_HALVED:
            # By the targets of others too, because a mean over examples that are all right is right for each.
            size = len(indices) // 2
            half, part = collated(examples[:size])
            other = default_collate([*passed, *targets][len(passed) - 1 :][:size])
            output = _answer(task.model, half, where)
            for together, wanted in ((own, part), (by_others[0], other)):
                judged_alone = score_check.of(task.score, output, wanted, size, f"half of `{where}`")
                alone.append((together[:size], judged_alone))
        passed = [*passed, *targets]
    if alone:
        score_check.check_alone(*(torch.cat(parts) for parts in zip(*alone, strict=True)))
    real, others, zeros = (torch.cat(parts) for parts in zip(*judged, strict=True))
    return real, others, zeros


def _answer(model: nn.Module, inputs: Example, where: str) -> Any:
    with blaming(f"The model must accept `{where}`"), torch.no_grad():
        output = model(*inputs)
    if not all(_finite(t) for t in outputs.tensors(output)):
        raise InvalidTask(
            f"The model's outputs must be finite, but on `{where}` some are not. Check its weights and that data."
        )
    return output


def _check_loss(task: Task) -> None:
    inputs, target = next(batches(task.train, len(task.example[0])))
    with blaming("`loss` must accept the output and targets of a batch"), torch.enable_grad():
        loss = task.loss(task.model(*inputs), target)
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise InvalidTask(f"`loss` must return a scalar tensor, got {got}. Take the mean over the batch.")
    if not _finite(loss):
        raise InvalidTask(f"`loss` must be finite, got {loss.item()} on the first batch of `train`. Check its targets.")
    if not loss.requires_grad and any(p.requires_grad for p in task.model.parameters()):
        raise InvalidTask(
            "`loss` must be differentiable, but no gradient reaches the model. "
            "Compute it with torch, from the output as given."
        )


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
