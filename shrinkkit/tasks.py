"""Tasks: what is compressed and how it is judged.

`load` gives a bundled task or the one in a user's file, `check` refuses a task that would
make later steps fail or their numbers meaningless. `python -m shrinkkit.tasks TASK` prints
what `look` returns, or why it cannot, as JSON.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from shrinkkit import bundled, outputs, sources, usermodel, userscore, views
from shrinkkit.duplicates import Sketches
from shrinkkit.errors import InvalidInput, InvalidTask, ShrinkkitError
from shrinkkit.located import nearest
from shrinkkit.rich import Rich
from shrinkkit.sources import Look
from shrinkkit.tables import Shown
from shrinkkit.usercode import blaming, call, named
from shrinkkit.usermodel import Example as Example
from shrinkkit.usermodel import raw_bytes

BUNDLED = tuple(bundled.TASKS)
"""Names that `load` knows."""

SPLITS = ("train", "calibration", "validation", "test")

EXAMPLES_HASHED, TRAIN_HASHED = 10_000, 64
"""Examples of a split, and of `train`, whose contents the fingerprint covers, at most; see `look`."""
MOST_REPEATED = 0.05
"""Share of the examples of `validation` and `test` that may repeat the inputs of another."""

_EXAMPLES_COMPARED, _EXAMPLES_JUDGED, _BATCH_CHECKED = 20_000, 2048, 32
_SHIFTS, _BATCHES_HALVED = 4, 8
_LONGEST = 80


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
    if not os.path.isfile(path):
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

    Compares every example of every split with all others, or 20,000 of a split, evenly spaced. Judges the model on at
    most 2048 of each (of train, on one batch): its score must be better than by the targets of others.

    Raises:
        InvalidTask: A rule is broken; the message says which, by what, and what to do.
    """
    _checked(task)


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
        yield _collated([dataset[i] for i in range(start, min(start + batch_size, size))])


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


def look(name_or_path: str | os.PathLike[str]) -> Look:
    """Load a task, check it unless it is a bundled one, and return what a study needs to know of it.

    Raises:
        InvalidInput: There is no such task.
        InvalidTask: It breaks a rule, or its code raises anything, `SystemExit` and `KeyboardInterrupt` included.
    """
    try:
        with sources.watch() as opened:
            task = load(name_or_path)
            bundled_one = os.fspath(name_or_path) in BUNDLED
            scores = (0.0, 1.0) if bundled_one else _checked(task)
            contents = _contents(task)
    except ShrinkkitError:
        raise
    except BaseException as error:  # a user's code may raise what ends a process
        raise InvalidTask(
            f"The task {os.fspath(name_or_path)} must load and run, but it raised {named(error)}."
        ) from error
    own = set() if bundled_one else sources.imported(Path(name_or_path).resolve())
    files = sources.hashes(opened | own)
    return Look(fingerprint(contents, files), layers(task.model), files, scores)


def fingerprint(contents: str, files: Mapping[str, str]) -> str:
    """Return a hash that changes with a task's contents or with a file that it is made of.

    Args:
        contents: Hash of weights, example and data; see `look`.
        files: Hashes of the files that it opened and of the source that it imported, by path.
    """
    return hashlib.sha256(f"{contents} {sources.digest(files)}".encode()).hexdigest()


def _contents(task: Task) -> str:
    """Return a hash of the weights, the example and the data of `task`.

    Of validation, test and calibration every example counts, its target too, up to 10,000 in a split, else as many,
    evenly spaced. Of train, which may draw its augmentation anew, it is 64, if they are the same twice by one seed.
    """
    digest = hashlib.sha256()
    for name, value in sorted(task.model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(raw_bytes(value))
    for x in task.example:
        digest.update(raw_bytes(x))
    for split in SPLITS:
        dataset = getattr(task, split)
        digest.update(f"{split} {len(dataset)}".encode())
        if split != "train":
            digest.update(_digest(dataset, EXAMPLES_HASHED).encode())
        elif (first := _digest(dataset, TRAIN_HASHED, seed=0)) == _digest(dataset, TRAIN_HASHED, seed=0):
            digest.update(first.encode())
    return digest.hexdigest()


def _digest(dataset: Dataset[Any], most: int, *, seed: int | None = None) -> str:
    """Return a hash of at most `most` examples, each read after seeding the global random generators with `seed`."""
    digest = hashlib.sha256()
    for i in _spaced(len(dataset), most):  # type: ignore[arg-type]
        with _seeded(seed):
            for part in dataset[i]:
                tensors = outputs.tensors(part)
                digest.update(b"".join(map(raw_bytes, tensors)) if tensors else repr(part).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _spaced(size: int, most: int) -> list[int]:
    """Return the numbers below `size`, or `most` of them, evenly spaced."""
    return list(range(size)) if size <= most else [i * size // most for i in range(most)]


def _checked(task: Task) -> tuple[float, float]:
    """Check a task as `check` does, and return its lowest and its highest score on validation and test."""
    _check_types(task)
    usermodel.check(task.model, task.example)
    _check_splits(task)
    usermodel.check_batch(task.model, _some_inputs(task))
    for split in ("train", "calibration"):
        _judged(task, split)
    judged = [_judged(task, split) for split in ("validation", "test")]
    real, others, zeros = (torch.cat(parts) for parts in zip(*judged, strict=True))
    userscore.check_above_chance(real, others, zeros)
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
    for i in _spaced(size, most):
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
    chosen = _spaced(len(dataset), batch if split == "train" else _EXAMPLES_JUDGED)
    chosen = [chosen[i] for i in torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).tolist()]
    judged: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    passed: list[Any] = []
    alone: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(chosen), batch):
        indices = chosen[start : start + batch]
        where = f"{split}[{', '.join(map(str, indices[:8]))}{', ...' * (len(indices) > 8)}]"
        with blaming(f"The examples `{where}` must stack to a batch"):
            examples = [dataset[i] for i in indices]
            inputs, target = _collated(examples)
        output = _answer(task.model, inputs, where)
        own = userscore.of(task.score, output, target, len(indices), f"`{where}`")
        targets = [target for _, target in examples]
        passed = (passed or targets * _SHIFTS)[-_SHIFTS:]
        by_others = []
        for shift in range(1, _SHIFTS + 1):
            other = default_collate([*passed, *targets][len(passed) - shift :][: len(targets)])
            by_others.append(userscore.of(task.score, output, other, len(indices), f"`{where}` with other targets"))
        zeros = userscore.zeroed(task.score, output, target, len(indices))
        judged.append((own, torch.stack(by_others, 1), zeros))
        if len(indices) > 1 and len(alone) < 2 * _BATCHES_HALVED:
            # By the targets of others too, because a mean over examples that are all right is right for each.
            size = len(indices) // 2
            half, part = _collated(examples[:size])
            other = default_collate([*passed, *targets][len(passed) - 1 :][:size])
            output = _answer(task.model, half, where)
            for together, wanted in ((own, part), (by_others[0], other)):
                judged_alone = userscore.of(task.score, output, wanted, size, f"half of `{where}`")
                alone.append((together[:size], judged_alone))
        passed = [*passed, *targets]
    if alone:
        userscore.check_alone(*(torch.cat(parts) for parts in zip(*alone, strict=True)))
    real, others, zeros = (torch.cat(parts) for parts in zip(*judged, strict=True))
    return real, others, zeros


def _collated(examples: Sequence[Any]) -> tuple[Example, Any]:
    inputs, target = default_collate(list(examples))
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), target


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


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(f"usage: python -m shrinkkit.tasks TASK   (TASK: {', '.join(BUNDLED)} or a .py file)", file=sys.stderr)
        return 2
    # What the user's code prints, in whatever way, must not end up in the JSON.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        found = dataclasses.asdict(look(arguments[0]))
    except ShrinkkitError as error:
        found = {"error": str(error)}
    with os.fdopen(answer, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(found))
    sys.stderr.flush()
    # Threads and exit handlers of the user's could keep the process alive, or change its status.
    os._exit(2 if "error" in found else 0)


if __name__ == "__main__":
    # Run as a script this module is `__main__`, and its Task is not the one that a user's file returns.
    from shrinkkit import tasks

    sys.exit(tasks._main(sys.argv[1:]))
