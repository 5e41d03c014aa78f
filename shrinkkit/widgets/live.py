"""Live outputs, controls and progress in notebooks.

A live output is an ordinary table or picture that is replaced in place, so the saved notebook keeps its last state and
shows it in JupyterLab, nbconvert and GitHub. Only the controls need a kernel.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from shrinkkit.display.tables import ProgressBar, Shown, Statement
from shrinkkit.errors import ShrinkkitError
from shrinkkit.progress import Progress, announce

PAUSE_S = 0.3
"""Least time between two updates of a progress bar."""
SETTLED_S = 0.15
"""Time without a further change after which the values of controls are used."""


def attended() -> bool:
    """Return whether a person runs the current cell: front ends accept input for it, papermill and nbconvert do not."""
    from IPython.core.getipython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return bool(kernel and kernel.get_parent("shell").get("content", {}).get("allow_stdin"))


class Live:
    """An output of a cell that any thread can replace while the kernel lives."""

    def __init__(self, shown: Shown) -> None:
        """Display `shown`."""
        from IPython.display import display

        self._handle = display(_bundle(shown), display_id=True, raw=True)  # type: ignore[no-untyped-call]
        self.shown = shown

    def show(self, shown: Shown) -> None:
        """Replace the output."""
        self.shown = shown
        if self._handle:  # None outside of IPython
            self._handle.update(_bundle(shown), raw=True)

    def outdate(self) -> None:
        """Grey the output out, until the next one replaces it."""
        if self._handle:
            old = '<p role="status">updating \N{HORIZONTAL ELLIPSIS}</p><div style="opacity: .4">{}</div>'
            self._handle.update(_bundle(self.shown, old, note="updating: "), raw=True)


def _bundle(shown: Shown, frame: str = "{}", note: str = "") -> dict[str, str]:
    """Return an output by MIME type, marked so that the style sheet hides dead controls next to it."""
    html = f'<div class="sk-live">{frame.format(shown._repr_html_())}</div>'
    return {"text/plain": note + repr(shown), "text/markdown": note + shown.markdown(), "text/html": html}


def explore(draw: Callable[..., Shown], **controls: Any) -> Live:
    """Show controls and below them what `draw` returns for their values; return the output.

    Each of the controls, which are ipywidgets, sets the parameter of its name. Errors are shown in place of the result.
    A change greys the result out; values that another change follows at once, or while one is computed, are skipped.
    """
    from ipywidgets import VBox

    first = attempt(draw, **values(controls))
    settings = ", ".join(f"{control.description or name} {control.value}" for name, control in controls.items())
    show_controls(VBox(list(controls.values())), settings)
    live = Live(first)
    pending: list[asyncio.TimerHandle] = []

    def update(_: object) -> None:
        live.outdate()
        while pending:
            pending.pop().cancel()
        # The kernel handles the changes that have arrived meanwhile before it gets to this.
        after = asyncio.get_running_loop().call_later
        pending.append(after(SETTLED_S, lambda: live.show(attempt(draw, **values(controls)))))

    for control in controls.values():
        control.observe(update, names="value")
    return live


def values(controls: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each control by its name."""
    return {name: control.value for name, control in controls.items()}


def on_request(label: str, act: Callable[[], Shown], *, before: Shown) -> Live:
    """Show a button and below it `before`, replaced at each click by what `act` returns; return the output."""
    from ipywidgets import Button, Layout

    button = Button(description=label, layout=Layout(width="auto"))
    show_controls(button, label)
    live = Live(before)

    def click(_: object) -> None:
        button.disabled = True
        live.show(Statement(f"{label} \N{HORIZONTAL ELLIPSIS}"))
        live.show(attempt(act))
        button.disabled = False

    button.on_click(click)
    return live


def apply_button(parameters: Callable[[], Mapping[str, Any]], controls: Mapping[str, Any]) -> None:
    """Show a button that writes `parameters()`, which follow from the controls, into the notebook's parameters cell.

    A kernel cannot edit a notebook, so the page does. Where it cannot either, it shows the lines to copy.
    """

    def update(_: object = None) -> None:
        button.values = {name: repr(value) for name, value in parameters().items()}

    button = scripted("apply.js", values={})
    update()
    for control in controls.values():
        control.observe(update, names="value")
    show_controls(button, "a button that writes these settings into the parameters cell")


def scripted(file: str, **values: Any) -> Any:
    """Return a widget that the script `file` of this package draws, and that shares `values` with it."""
    import anywidget
    import traitlets

    traits = {name: traitlets.Any(value).tag(sync=True) for name, value in values.items()}
    return type("Scripted", (anywidget.AnyWidget,), {"_esm": Path(__file__).with_name(file), **traits})()


def show_controls(widget: Any, description: str, *, static: Shown | None = None) -> None:
    """Show a widget where a kernel runs, and elsewhere `static` or one line that describes the controls."""
    from IPython.display import display

    bundle = widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle  # anywidget adds metadata
    note = f'<p class="sk-note">In a running notebook: {escape(description)}.</p>'
    text = {"text/plain": f"[controls: {description}]", "text/html": static._repr_html_() if static else note}
    display({**data, **text}, raw=True)  # type: ignore[no-untyped-call]


def attempt(act: Callable[..., Shown], **values: Any) -> Shown:
    """Return what `act` returns for `values`, or the error that it raises, which Jupyter would hide in a log."""
    try:
        return act(**values)
    except ShrinkkitError as error:
        return Statement(str(error), tone="bad", label=type(error).__name__)
    except Exception as error:
        return Statement(f"{type(error).__name__}: {error}", tone="bad", label="Unexpected error")


def progress(work: str) -> Progress:
    """Show a progress bar for `work`, such as `Fine-tuning`, and return the callback that moves it."""
    start = shown_s = time.monotonic()
    live = Live(ProgressBar(work, 0, 1))

    def update(done: float, total: float, note: str = "") -> None:
        nonlocal shown_s
        announce(f"{work} · {note} · {done:.0f} of {total:.0f} done" if done < total else "")
        now = time.monotonic()
        if done >= total or now - shown_s >= PAUSE_S:
            shown_s = now
            live.show(ProgressBar(work, done, total, note, now - start))

    return update
