"""Code that users wrote: run their file, and say where it is wrong in words they can act on."""

import contextlib
import importlib.util
import linecache
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from shrinkkit.errors import InvalidTask, brief, nearest, options

_CALLERS = ("usercode.py", "contract.py", "score_check.py", "checks.py", "loader.py", "task.py")


@contextlib.contextmanager
def blaming(rule: str, path: Path | None = None) -> Iterator[None]:
    """Report any error of the code in the block as InvalidTask, with file, line and cause.

    Args:
        rule: What the code must do, as the beginning of a sentence.
        path: The user's file, if known; the line is then the last one of it that was running.

    Raises:
        InvalidTask: The block raised an error, which is its `__cause__`.
    """
    try:
        yield
    except InvalidTask:
        raise
    # A file that calls sys.exit would otherwise end the caller without a word.
    except (Exception, SystemExit) as error:
        raise InvalidTask(f"{rule}, but {_place(error, path)} raised {named(error)}.") from error


def named(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, which a user's class may fail to give."""
    try:
        text = str(error)
    except Exception:  # whatever a user's class raises there
        text = ""
    return f"{type(error).__name__}: {brief(Exception(text))[:300]}" if text.strip() else type(error).__name__


def call(path: Path, function: str, *, shown: str) -> Any:
    """Return what the function named `function` of the Python file at `path` returns, called without arguments.

    Args:
        path: Absolute path; modules beside it can be imported while it runs.
        function: Name of a function of no arguments.
        shown: What messages call the file.

    Raises:
        InvalidTask: The file or the function raises an error, or there is no such function.
    """
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
        found = getattr(module, function, None)
        if not callable(found):
            defined = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == name]
            raise InvalidTask(
                f"{shown} must define a function `{function}()`, found {options(defined)}."
                f"{nearest(function, defined)} `shrinkkit new` writes an example."
            )
        with blaming(f"`{function}()` in {shown} must run without errors", path):
            return found()
    finally:
        sys.path.remove(str(path.parent))


def _place(error: BaseException, path: Path | None) -> str:
    if isinstance(error, SyntaxError) and error.filename and (path is None or error.filename == str(path)):
        return f"{Path(error.filename).name}:{error.lineno}"
    ours = (str(Path(torch.__file__).parent), *(str(Path(__file__).with_name(n)) for n in _CALLERS))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    frames = [f for f in frames if path is None or f.filename == str(path)] or frames
    if not frames:
        return "it"
    last = frames[-1]
    code = linecache.getline(last.filename, last.lineno or 0).strip()
    return f"{Path(last.filename).name}:{last.lineno}" + (f" (`{code}`)" if code else "")
