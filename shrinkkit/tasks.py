"""Tasks: what is compressed and how it is judged.

`load` gives a bundled task or the one in a user's file, `check` refuses a task that would
make later steps fail or their numbers meaningless. `python -m shrinkkit.tasks TASK` prints
the names of its layers and a hash of its source as JSON.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from shrinkkit import bundled, outputs, usermodel, views
from shrinkkit.errors import InvalidInput, InvalidTask, ShrinkkitError
from shrinkkit.located import nearest
from shrinkkit.rich import Rich
from shrinkkit.tables import Shown
from shrinkkit.usercode import blaming, call, sources_of
from shrinkkit.usermodel import Example as Example
from shrinkkit.usermodel import raw_bytes

BUNDLED = tuple(bundled.TASKS)
"""Names that `load` knows."""

SPLITS = ("train", "calibration", "validation", "test")

_EXAMPLES_HASHED = 64
_EXAMPLES_CHECKED = 2048


@dataclass(frozen=True, eq=False, repr=False)
class Task(Rich):
    """A trained model together with the data and the functions that judge it.

    Each split is a map-style dataset of `(inputs, target)`: one example without a batch
    dimension, where `inputs` is a tensor, or a tuple of tensors for a model of several inputs.
    """

    name: str
    model: nn.Module
    """Trained, in eval mode, on the CPU. Steps work on copies."""
    example: Example
    """A batch, as `model(*example)`; its batch size is the one that latency is measured at."""
    train: Dataset[Any]
    calibration: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    score: Callable[[Any, Any], torch.Tensor]
    """(output, targets of a batch) -> one score per example, shape (batch,), higher is better."""
    loss: Callable[[Any, Any], torch.Tensor]
    """(output, targets of a batch) -> scalar that fine-tuning minimises."""
    metric: str = "accuracy"
    """What `score` is called in tables and pictures."""
    class_names: tuple[str, ...] = ()

    def shown(self) -> Shown:
        """Return what it consists of: model, inputs, splits and metric."""
        return views.task(self)

    def to_dict(self) -> dict[str, Any]:
        """Return what it consists of, without tensors, data and functions."""
        return {
            "name": self.name,
            "model": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "inputs": [{"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for x in self.example],
            "examples": {split: len(getattr(self, split)) for split in SPLITS},
            "metric": self.metric,
            "class_names": list(self.class_names),
        }


def load(name_or_path: str | os.PathLike[str]) -> Task:
    """Return a bundled task by its name, or the one that the function `task` of a Python file returns.

    Args:
        name_or_path: One of `BUNDLED`, or a path that ends in `.py`. While the file runs, modules
            beside it can be imported.

    Raises:
        InvalidInput: There is no bundled task of that name, or no such file.
        InvalidTask: The file raises an error, has no function `task`, or returns something else.
    """
    text = os.fspath(name_or_path)
    if text in BUNDLED:
        from shrinkkit.bundled import digits

        return digits.task(text)
    path = Path(text)
    if path.suffix != ".py":
        raise InvalidInput(
            f"`task` must be one of {', '.join(BUNDLED)}, or a path to a .py file, got {text!r}."
            f"{nearest(text, BUNDLED)}"
        )
    if not path.is_file():
        near = path.parent.glob("*.py") if path.parent.is_dir() else ()
        raise InvalidInput(
            f"`task` names {text!r}, but there is no such file.{nearest(path.name, [p.name for p in near])} "
            f"To start one, run `shrinkkit new {path.name}`."
        )
    task = call(path.resolve(), "task", shown=text)
    if not isinstance(task, Task):
        raise InvalidTask(
            f"`task()` in {text} must return a shrinkkit.tasks.Task, got {type(task).__name__}. "
            "End it with `return Task(name=..., model=..., ...)`."
        )
    return task


def check(task: Task) -> None:
    """Return if `task` keeps the rules that every step relies on; it is left unchanged.

    Reads every example of every split once, and runs the model on all of them but for the
    training split (one batch there) and beyond the first 2048 examples of a split.

    Raises:
        InvalidTask: A rule is broken; the message says which, by what, and what to do.
    """
    usermodel.check(task.model, task.example)
    _check_splits(task)
    for split in SPLITS:
        _check_outputs(task, split)
    _check_loss(task)


def batches(dataset: Dataset[Any], batch_size: int) -> Iterator[tuple[Example, Any]]:
    """Yield `(inputs, targets)` of consecutive examples in order; the last batch may be smaller.

    Args:
        dataset: Map-style dataset of `(inputs, target)`.
        batch_size: Examples per batch, at least 1.

    Yields:
        Inputs as a tuple of tensors, batch first, and the targets as `default_collate` stacks them.

    Raises:
        InvalidInput: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise InvalidInput(f"`batch_size` must be at least 1, got {batch_size}.")
    size = len(dataset)  # type: ignore[arg-type]
    for start in range(0, size, batch_size):
        inputs, target = default_collate([dataset[i] for i in range(start, min(start + batch_size, size))])
        yield (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), target


def layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that have parameters of their own, in the model's order."""
    return tuple(
        name
        for name, module in model.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None
    )


def matching(names: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """Return those of `names` that any of `patterns` matches, in the order of `names`.

    A pattern that matches a parent matches everything in it: `stages.0` stands for `stages.0.conv1` too.

    Args:
        names: Names of modules, such as `layers` gives.
        patterns: Names or shell patterns (`*`, `?`, `[abc]`), case-sensitive; `*` also crosses dots.

    Raises:
        InvalidInput: A pattern matches none of `names`.
    """
    names = tuple(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if any(fnmatch.fnmatchcase(part, pattern) for part in _with_parents(name))}
        if not hits:
            known = dict.fromkeys(part for name in names for part in _with_parents(name))
            raise InvalidInput(
                f"A layer pattern must match a layer, but {pattern!r} matches none.{nearest(pattern, known)} "
                f"Layers: {_listed(names)}."
            )
        found |= hits
    return tuple(name for name in names if name in found)


def fingerprint(task: Task, name_or_path: str | os.PathLike[str]) -> str:
    """Return a hash that changes when the task does: its code, its model's weights, its example and its data.

    The code is the task's file and the modules imported from its folder. Of the data, the lengths of the splits count,
    and about 64 examples of each but `train`, which may draw its augmentation anew.
    """
    text = os.fspath(name_or_path)
    folder = Path(bundled.__file__).parent
    sources = {folder / "digits.py", folder / "models.py"} if text in BUNDLED else sources_of(Path(text).resolve())
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.read_bytes())
    for name, value in sorted(task.model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(raw_bytes(value))
    for x in task.example:
        digest.update(raw_bytes(x))
    for split in SPLITS:
        dataset = getattr(task, split)
        # What is no map-style dataset is for `check` to refuse.
        size = len(dataset) if hasattr(dataset, "__len__") else 0
        digest.update(f"{split} {size}".encode())
        for i in range(0, size if split != "train" else 0, max(1, size // _EXAMPLES_HASHED)):
            for part in dataset[i]:
                tensors = outputs.tensors(part)
                digest.update(b"".join(map(raw_bytes, tensors)) if tensors else repr(part).encode())
    return digest.hexdigest()


def _check_splits(task: Task) -> None:
    owner: dict[bytes, str] = {}
    overlaps: dict[tuple[str, str], int] = {}
    for split in SPLITS:
        if split != "train" and next(_digests(task, split)) != next(_digests(task, split)):
            raise InvalidTask(
                f"`{split}` must give the same example each time, but `{split}[0]` differs when read twice. "
                "Augment at random in `train` only."
            )
        for digest in set(_digests(task, split)):
            first = owner.setdefault(digest, split)
            if first != split:
                overlaps[first, split] = overlaps.get((first, split), 0) + 1
    if overlaps:
        told = "; ".join(
            f"`{a}` and `{b}` share {n} {'input' if n == 1 else 'inputs'}" for (a, b), n in overlaps.items()
        )
        raise InvalidTask(f"Splits must not overlap, but {told}. Split once, and remove duplicates before.")


def _digests(task: Task, split: str) -> Iterator[bytes]:
    dataset = getattr(task, split)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InvalidTask(
            f"`{split}` must be a map-style dataset (`__len__`, `__getitem__`), got {type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise InvalidTask(
            f"`{split}` must hold at least one example, but it is empty. Give every split examples of its own."
        )
    expected = [(tuple(x.shape[1:]), x.dtype) for x in task.example]
    for i in range(len(dataset)):
        with blaming(f"`{split}[{i}]` must give (inputs, target)"):
            inputs, _ = dataset[i]
        inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
        if not isinstance(inputs, tuple | list) or not all(isinstance(x, torch.Tensor) for x in inputs):
            raise InvalidTask(
                f"The inputs of `{split}[{i}]` must be a tensor or a tuple of tensors, got {type(inputs).__name__}."
            )
        found = [(tuple(x.shape), x.dtype) for x in inputs]
        if found != expected:
            raise InvalidTask(
                f"Every example must have the shapes and dtypes of `example` without its batch dimension, {expected}, "
                f"but `{split}[{i}]` has {found}. Make `example` a batch of the data."
            )
        yield hashlib.sha256(b"".join(map(raw_bytes, inputs))).digest()


def _check_outputs(task: Task, split: str) -> None:
    size = len(task.example[0])
    most = 1 if split == "train" else -(-_EXAMPLES_CHECKED // size)
    loader = batches(getattr(task, split), size)
    for number in range(most):
        where = f"batch {number} of `{split}`"
        with blaming(f"The examples of {where} must stack to a batch"):
            batch = next(loader, None)
        if batch is None:
            return
        inputs, target = batch
        with blaming(f"The model must accept {where}"), torch.inference_mode():
            output = task.model(*inputs)
        if not all(_finite(t) for t in outputs.tensors(output)):
            raise InvalidTask(
                f"The model's outputs must be finite, but on {where} some are not. Check its weights and that data."
            )
        with blaming(f"`score` must accept the output and targets of {where}"), torch.inference_mode():
            score = task.score(output, target)
        _check_score(score, len(inputs[0]), where)


def _check_score(score: Any, size: int, where: str) -> None:
    if not isinstance(score, torch.Tensor) or tuple(score.shape) != (size,):
        got = f"shape {tuple(score.shape)}" if isinstance(score, torch.Tensor) else type(score).__name__
        raise InvalidTask(
            f"`score` must return one score per example, a tensor of shape ({size},) for {where}, got {got}. "
            "Leave out the mean over the batch, and reduce all other dimensions."
        )
    if not _finite(score):
        raise InvalidTask(
            f"`score` must be finite for every example, but on {where} it is not. "
            "Give a finite score where it is undefined."
        )


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


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(f"usage: python -m shrinkkit.tasks TASK   (TASK: {', '.join(BUNDLED)} or a .py file)", file=sys.stderr)
        return 2
    try:
        # What the user's file prints must not end up in the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            task = load(arguments[0])
        print(json.dumps({"layers": layers(task.model), "fingerprint": fingerprint(task, arguments[0])}))
    except ShrinkkitError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # Run as a script this module is `__main__`, and its Task is not the one that a user's file returns.
    from shrinkkit import tasks

    sys.exit(tasks._main(sys.argv[1:]))
