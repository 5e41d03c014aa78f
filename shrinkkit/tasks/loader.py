"""Load a task from a file or by name, and take its fingerprint."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from shrinkkit.errors import InvalidInput, InvalidTask, ShrinkkitError, nearest
from shrinkkit.tasks import checks, modules, outputs, sources
from shrinkkit.tasks.bundled import TASKS
from shrinkkit.tasks.checks import EXAMPLES_HASHED, TRAIN_HASHED
from shrinkkit.tasks.modules import raw_bytes
from shrinkkit.tasks.sources import Look
from shrinkkit.tasks.task import SPLITS, Task, spaced
from shrinkkit.tasks.usercode import call, named

BUNDLED = tuple(TASKS)
"""Names that `load` knows."""


def load(name_or_path: str | os.PathLike[str]) -> Task:
    """Load a bundled task by its name, or run a Python file and return what its function `task()` returns.

    The task is not checked; see `check_task`.

    Args:
        name_or_path: `digits-cnn`, `digits-lstm`, `digits-transformer`, or a path that ends in `.py`. While the file
            runs, modules in its folder can be imported.

    Returns:
        The task: model, data, score and loss.

    Raises:
        InvalidInput: There is no bundled task of that name, or no such file.
        InvalidTask: The file raises an error, has no function `task`, or returns something else.
    """
    text = os.fspath(name_or_path)
    if text in BUNDLED:
        from shrinkkit.tasks.bundled import digits

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
            scores = (0.0, 1.0) if bundled_one else checks._checked(task)
            contents = _contents(task)
    except ShrinkkitError:
        raise
    except BaseException as error:  # a user's code may raise what ends a process
        raise InvalidTask(
            f"The task {os.fspath(name_or_path)} must load and run, but it raised {named(error)}."
        ) from error
    own = set() if bundled_one else sources.imported(Path(name_or_path).resolve())
    files = sources.hashes(opened | own)
    return Look(fingerprint(contents, files), modules.layers(task.model), files, scores)


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
    for i in spaced(len(dataset), most):  # type: ignore[arg-type]
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


def _main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(
            f"usage: python -m shrinkkit.tasks.loader TASK   (TASK: {', '.join(BUNDLED)} or a .py file)",
            file=sys.stderr,
        )
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
    pass

    sys.exit(_main(sys.argv[1:]))
