"""The errors that shrinkkit raises deliberately, and helpers for their messages: rule, value, remedy."""

import difflib
import json
import os
import re
import symtable
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


class ShrinkkitError(Exception):
    """Base class of all deliberate errors; any other exception is a bug."""

    def _render_traceback_(self) -> list[str]:
        # Called by IPython. The message names rule, value and remedy; a traceback of library code would hide it.
        return [f"{type(self).__name__}: {self}", *_causes(self)]


class InvalidInput(ShrinkkitError, ValueError):
    """An argument, a parameter, or a line of a recipe or study is not allowed."""


class InvalidTask(ShrinkkitError):
    """A task's model, data, score or loss breaks a rule; see `check_task`."""


class NothingToPrune(ShrinkkitError):
    """No layer can be pruned, or the settings remove nothing."""


class Unsupported(ShrinkkitError):
    """The runtime, device or model does not support the technique; there is no fallback."""


class NothingChanged(ShrinkkitError):
    """A recipe or stage left the model unchanged."""


class UnfairComparison(ShrinkkitError):
    """Two measurements were taken under different conditions, so their ratio is meaningless."""


class ModelFileError(ShrinkkitError):
    """A model file is missing, damaged, or does not reproduce the outputs of its model."""


class StepFailed(ShrinkkitError):
    """A notebook of a run failed, crashed or timed out."""


class LeaseLost(ShrinkkitError):
    """A process of an earlier run tried to write into a run folder that another run holds now."""


def _causes(error: BaseException) -> list[str]:
    """Return the lines of the user's code that caused the error, innermost last; empty if there are none."""
    cause = error.__cause__
    if cause is None or isinstance(cause, ShrinkkitError):
        return []
    library = (str(Path(__file__).parent), sys.prefix, sys.base_prefix, "<frozen")
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if not f.filename.startswith(library)]
    lines = [f"  {Path(f.filename).name}, line {f.lineno}, in {f.name}: {f.line}" for f in frames]
    return ["", "In your code:", *lines, f"  {type(cause).__name__}: {cause}"] if lines else []


def explain_name_errors() -> None:
    """Have IPython name the cell of the open notebook to run first, where a cell lacks a name that it defines."""
    from IPython.core.getipython import get_ipython

    def show(shell: Any, kind: type, error: NameError, trace: Any, tb_offset: int | None = None) -> None:
        if heading := _heading_above(error.name or ""):
            text = f"NameError: `{error.name}` is missing: this kernel has not run the cell below {heading!r} yet."
            remedy = "Run that first, or choose Run > Run All Above Selected Cell."
            vars(error)["_render_traceback_"] = lambda: [f"{text} {remedy}"]
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    if (shell := get_ipython()) and not shell.custom_exceptions:
        shell.set_custom_exc((NameError,), show)  # type: ignore[no-untyped-call]


def _heading_above(name: str) -> str:
    """Return the heading of the cell of the open notebook, as it is saved, that defines `name`; '' if there is none."""
    heading = ""
    with suppress(OSError, ValueError):
        # The variable is set by Jupyter's server.
        notebook = json.loads(Path(os.environ.get("JPY_SESSION_NAME", "")).read_text(encoding="utf-8"))
        for kind, source in ((cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]):
            if kind == "markdown":
                heading = (re.findall(r"^#+ (.+)", source, re.MULTILINE) or [heading])[-1]
            with suppress(SyntaxError, KeyError):  # magics, and a name that it does not have
                symbol = symtable.symtable(source, "", "exec").lookup(name)
                if kind == "code" and (symbol.is_assigned() or symbol.is_imported()):
                    return heading
    return ""


def brief(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or its type without a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # TorchScript states the cause last, below the code that it interprets.
    return (lines[-1] if "failed in the TorchScript interpreter" in lines[0] else lines[0]).rstrip(".")


def require(package: str, *, extra: str, purpose: str) -> ModuleType:
    """Import and return a package of an optional dependency; raises Unsupported with the remedy if it is missing."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise Unsupported(
            f'{purpose} needs {package}, which is not installed. Install it: pip install "shrinkkit[{extra}]".'
        ) from error


def message(text: str, where: str = "", remedy: str = "") -> str:
    """Return `text (where). remedy` as one line; empty parts are omitted."""
    return f"{text}{f' ({where})' if where else ''}.{f' {remedy.strip()}' if remedy.strip() else ''}"


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ' Did you mean `x`?' for the entry of `allowed` that contains `word` or is close in spelling, or ''."""
    allowed = list(allowed)
    # A part of a name says more than its spelling: `cpu/onnx` is spelled more like cpu/openvino than cpu/onnxruntime.
    longer = sorted((name for name in allowed if len(word) > 3 and word.lower() in name.lower()), key=len)
    spelled = (difflib.get_close_matches(text, allowed, n=1) for text in (word, word.lower()))
    close = longer or next(filter(None, spelled), [])
    return f" Did you mean `{close[0]}`?" if close else ""


def options(words: Sequence[str], last: str = "or") -> str:
    """Return `words` as 'a, b or c'."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "nothing"


def shown_value(value: Any) -> str:
    """Return `value` as it is written in YAML, in at most 80 characters."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"a section ({', '.join(value)})"[:80]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
