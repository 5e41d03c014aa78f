"""Load a task from a file or by name, and take its fingerprint."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import linecache
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from shrinkkit.core.recipe import HUB
from shrinkkit.errors import InvalidInput, InvalidTask, ShrinkkitError, nearest, options
from shrinkkit.tasks import checks, data, hub, modules, outputs, sources
from shrinkkit.tasks.bundled import TASKS
from shrinkkit.tasks.checks import blaming, type_and_message
from shrinkkit.tasks.modules import raw_bytes
from shrinkkit.tasks.sources import Inspection
from shrinkkit.tasks.task import SPLITS, Task, spaced

BUNDLED = tuple(TASKS)
"""Names of the bundled tasks."""
EXAMPLES_HASHED, TRAIN_HASHED = 10_000, 64
"""Most examples of a split, and of `train`, in the fingerprint."""


def load(name_or_path: str | os.PathLike[str]) -> Task:
    """Load a bundled task by its name, or run a Python file and return what its function `task()` returns.

    The task is not checked; see `check_task`.

    Args:
        name_or_path: `digits-cnn`, `digits-lstm`, `digits-transformer`, a path that ends in `.py`, or
            `hf:PATH?data=FILE` for `from_transformers`. While a file runs, modules in its folder can be imported.

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
    if text.startswith(HUB):
        return hub.from_text(text)
    path = Path(text)
    if path.suffix != ".py":
        rule = f"`task` must be one of {', '.join(BUNDLED)}, a path to a .py file, or hf:PATH?data=FILE,"
        raise InvalidInput(f"{rule} got {text!r}.{nearest(text, BUNDLED)}")
    if not os.path.isfile(path):
        near = path.parent.glob("*.py") if path.parent.is_dir() else ()
        raise InvalidInput(
            f"`task` names {text!r}, but there is no such file.{nearest(path.name, [p.name for p in near])} "
            f"To start one, run `shrinkkit new {path.name}`."
        )
    with _seeded(0):
        # What is drawn without a seed, such as the weights of a layer, must be the same in every step.
        task = _call(path.resolve(), "task", shown=text)
    if not isinstance(task, Task):
        problem = f"`task()` in {text} must return a shrinkkit.tasks.Task, got {type(task).__name__}."
        raise InvalidTask(f"{problem} End it with `return Task(name=..., model=..., ...)`.")
    return task


def _call(path: Path, function: str, *, shown: str) -> Any:
    """Run the Python file at `path`, called `shown` in messages, and return what its `function()` returns."""
    # Not the bare stem: a task in `numpy.py` must not take numpy's place.
    name = f"shrinkkit_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidTask(f"{shown} must be a Python file that can be imported. Give it a name that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    linecache.checkcache(str(path))
    sys.path.insert(0, str(path.parent))
    try:
        with blaming(f"{shown} must run without errors", path):
            spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            defined = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == name]
            raise InvalidTask(
                f"{shown} must define a function `{function}()`, found {options(defined)}."
                f"{nearest(function, defined)} `shrinkkit new` writes an example."
            )
        with blaming(f"`{function}()` in {shown} must run without errors", path):
            return getattr(module, function)()
    finally:
        sys.path.remove(str(path.parent))


def inspect(name_or_path: str | os.PathLike[str]) -> Inspection:
    """Load a task, check it unless it is a bundled one, and return what a study needs to know of it.

    Any exception of the task's code, `SystemExit` and `KeyboardInterrupt` included, becomes InvalidTask.
    """
    text = os.fspath(name_or_path)
    is_bundled = text in BUNDLED
    try:
        with sources.watch() as opened:
            task = load(text)
            scores = (0.0, 1.0) if is_bundled else checks.score_range(task)
            contents = _contents(task)
    except ShrinkkitError:
        raise
    except BaseException as error:  # a user's code may raise what ends a process
        raise InvalidTask(f"The task {text} must load and run, but it raised {type_and_message(error)}.") from error
    own = set() if is_bundled else hub.files(text) if text.startswith(HUB) else {Path(text).resolve()}
    files = sources.hashes(opened if is_bundled else opened | sources.imported(*own))
    return Inspection(fingerprint(contents, files), modules.layers(task.model), files, scores)


def fingerprint(contents: str, files: Mapping[str, str]) -> str:
    """Return a hash of a task's contents (weights, example, data) and of its `files`, given with their hashes."""
    return hashlib.sha256(f"{contents} {sources.digest(files)}".encode()).hexdigest()


def _contents(task: Task) -> str:
    """Return a hash of a task's weights, example and data.

    Inputs and targets of at most 10,000 examples of validation, test and calibration count, evenly spaced, and 64 of
    train, unless they differ when read twice with the same seed.
    """
    digest = hashlib.sha256()
    for name, value in sorted(task.model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(raw_bytes(value))
    for x in task.example:
        digest.update(raw_bytes(x))
    for split in SPLITS:
        # Outputs of the model follow from its weights and the inputs.
        dataset = data.without_outputs(getattr(task, split))
        digest.update(f"{split} {len(dataset)}".encode())
        if split != "train":
            digest.update(_digest(dataset, EXAMPLES_HASHED).encode())
        elif (first := _digest(dataset, TRAIN_HASHED, seed=0)) == _digest(dataset, TRAIN_HASHED, seed=0):
            digest.update(first.encode())
    return digest.hexdigest()


def _digest(dataset: Dataset[Any], most: int, *, seed: int | None = None) -> str:
    """Return a hash of at most `most` examples, each read with the global random generators seeded with `seed`."""
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
        print("usage: python -m shrinkkit.tasks.loader TASK", file=sys.stderr)
        return 2
    # What the user's code prints must not end up in the JSON.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        result = dataclasses.asdict(inspect(arguments[0]))
    except ShrinkkitError as error:
        result = {"error": str(error)}
    with os.fdopen(answer, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(result))
    sys.stderr.flush()
    # The user's threads and exit handlers could keep the process alive, or change its status.
    os._exit(2 if "error" in result else 0)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
