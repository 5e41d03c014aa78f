"""The errors that shrinkkit raises on purpose.

Each message names the rule, the value that broke it, and the remedy. Whoever catches
`ShrinkkitError` catches all of them; anything else that escapes is a defect.
"""

import difflib
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class ShrinkkitError(Exception):
    """Base of every error that shrinkkit raises on purpose."""

    def _render_traceback_(self) -> list[str]:
        # IPython asks for this. The message names rule, value and remedy; forty lines of our code would hide it.
        return [f"{type(self).__name__}: {self}", *_causes(self)]


class InvalidInput(ShrinkkitError, ValueError):
    """An argument, a parameter, or a line of a recipe or study is not allowed."""


class InvalidTask(ShrinkkitError):
    """A task's model, data, score or loss breaks a rule that every step relies on."""


class NothingToPrune(ShrinkkitError):
    """No layer is left to prune, or pruning as asked would remove nothing."""


class Unsupported(ShrinkkitError):
    """The technique cannot be had on this runtime or for this model; nothing falls back."""


class NothingChanged(ShrinkkitError):
    """A recipe ran to its end and left the model as it was."""


class UnfairComparison(ShrinkkitError):
    """Two measurements differ in more than the treatment, so their ratio means nothing."""


class ModelFileError(ShrinkkitError):
    """A model file is missing, damaged, or does not compute what it was made from."""


class StepFailed(ShrinkkitError):
    """A notebook of a run failed, died, or ran out of time."""


class LeaseLost(ShrinkkitError):
    """A process of a run that has ended must not write into its folder any more."""


def _causes(error: BaseException) -> list[str]:
    """Return the lines of the user's own code, if any, that an error of theirs came from, the innermost last."""
    cause = error.__cause__
    if cause is None or isinstance(cause, ShrinkkitError):
        return []
    here = (str(Path(__file__).parent), sys.prefix, sys.base_prefix, "<frozen")
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if not f.filename.startswith(here)]
    lines = [f"  {Path(f.filename).name}, line {f.lineno}, in {f.name}: {f.line}" for f in frames]
    return ["", "In your code:", *lines, f"  {type(cause).__name__}: {cause}"] if lines else []


def brief(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or its type if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # TorchScript states the cause last, below the code that it interprets.
    return (lines[-1] if "failed in the TorchScript interpreter" in lines[0] else lines[0]).rstrip(".")


def message(text: str, where: str = "", remedy: str = "") -> str:
    """Return `text (where). remedy` as one line, without the parts that are empty."""
    return f"{text}{f' ({where})' if where else ''}.{f' {remedy.strip()}' if remedy.strip() else ''}"


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ' Did you mean `x`?' for the entry of `allowed` spelled most like `word`, or '' when none is close."""
    close = difflib.get_close_matches(word.lower(), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""


def options(words: Sequence[str]) -> str:
    """Return `words` as 'a, b or c'."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "nothing"


def shown_value(value: Any) -> str:
    """Return `value` as whoever wrote the file would recognise it, in at most 80 characters."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"a section ({', '.join(value)})"[:80]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
