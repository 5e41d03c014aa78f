"""Outputs that change in place, and controls beside them: alive where a kernel runs, complete where none does.

What changes is an ordinary output, a table or a picture that is replaced as things move on. What stands there last
is what the notebook keeps, so papermill, nbconvert, a notebook opened again and GitHub show it. Only the controls need
a kernel.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from shrinkkit.display import formats
from shrinkkit.display.tables import Shown, Statement
from shrinkkit.errors import ShrinkkitError
from shrinkkit.progress import Watch

PAUSE_S = 0.3
"""Between two showings of progress; more often would only take time from the work."""


class Live:
    """An output of a cell that can be replaced, from any thread, for as long as the kernel lives."""

    def __init__(self, shown: Shown) -> None:
        """Display `shown`, to be replaced."""
        from IPython.display import display

        self._handle = display(_Alive(shown), display_id=True)  # type: ignore[no-untyped-call]
        self.shown = shown

    def show(self, shown: Shown) -> None:
        """Replace what stands there."""
        self.shown = shown
        # Outside of IPython there is no output to replace.
        if self._handle:
            self._handle.update(_Alive(shown))


def explore(draw: Callable[..., Shown], *, layout: Any = None, **controls: Any) -> Live:
    """Show what `draw` returns for the values of controls, anew whenever one of them changes; return the output.

    What is wrong with the values is shown in place of the picture, and the next change goes on from there.

    Args:
        draw: Called with the value of each control by name.
        layout: The widget in which the controls stand; None puts them one below the other.
        controls: ipywidgets with a `value`, by the name of the parameter of `draw` that they set.
    """
    first = attempt(draw, **values(controls))
    show_controls(layout or _column(list(controls.values())), said=_settings(controls))
    live = Live(first)
    turn = threading.Lock()

    def changed(_: object) -> None:
        with turn:
            live.show(attempt(draw, **values(controls)))

    for control in controls.values():
        control.observe(changed, names="value")
    return live


def values(controls: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each control by its name."""
    return {name: control.value for name, control in controls.items()}


def on_request(label: str, act: Callable[[], Shown], *, before: Shown) -> Live:
    """Show a button and, when it is pressed, what `act` returns; return the output, in which `before` stands first.

    Args:
        label: Of the button: a verb and what it acts on.
        act: Called at each press; may take long, during which the button is disabled.
        before: What stands there as long as nobody has pressed, and in every static copy.
    """
    from ipywidgets import Button, Layout

    button = Button(description=label, layout=Layout(width="auto"))
    show_controls(button, said=label)
    live = Live(before)

    def pressed(_: object) -> None:
        button.disabled = True
        live.show(Statement(f"{label} \N{HORIZONTAL ELLIPSIS}"))
        live.show(attempt(act))
        button.disabled = False

    button.on_click(pressed)
    return live


def show_controls(widget: Any, *, said: str, instead: Shown | None = None) -> None:
    """Show a widget where a kernel runs, and one line in its place where none does.

    Args:
        widget: Of ipywidgets.
        said: The line: what the controls are and how they stand.
        instead: Shown in place of the line, by viewers that know nothing of widgets; None for the line.
    """
    from IPython.display import display

    shown = widget._repr_mimebundle_()
    # anywidget gives the metadata beside the data, ipywidgets the data alone.
    bundle = {
        **(shown[0] if isinstance(shown, tuple) else shown),
        "text/plain": f"[controls: {said}]",
        "text/html": instead._repr_html_()
        if instead
        else f'<p class="sk-note">In a running notebook: {escape(said)}.</p>',
    }
    display(bundle, raw=True)  # type: ignore[no-untyped-call]


def attempt(act: Callable[..., Shown], **values: Any) -> Shown:
    """Return what `act` returns for `values`, or, where it refuses them, why."""
    try:
        return act(**values)
    except ShrinkkitError as error:
        return Statement(str(error), tone="bad", label=type(error).__name__)
    except Exception as error:
        # In a callback nobody would see it: Jupyter keeps such errors in a log that few open.
        return Statement(f"{type(error).__name__}: {error}", tone="bad", label="This failed")


@dataclass(frozen=True, repr=False)
class Progress(Shown):
    """How far long work is."""

    work: str
    done: float
    total: float
    said: str
    elapsed_s: float

    def __repr__(self) -> str:
        """Return it as plain text."""
        return f"{self.work}{f' ({self.said})' if self.said else ''}: {self._how_far()}"

    def _how_far(self) -> str:
        if not self.total:
            return "there was nothing to do"
        if not self.done:
            return "under way"
        share = formats.percent(self.done / self.total) if self.done < self.total else "done"
        return f"{share} in {self.elapsed_s:.1f} s"

    def markdown(self) -> str:
        """Return it as one line."""
        return f"{self!r}\n"

    def html(self) -> str:
        """Return it as a bar with its words."""
        words = escape(repr(self))
        bar = f'<progress aria-label="{escape(self.work)}" value="{self.done:g}" max="{self.total:g}"></progress> '
        return f'<p class="sk-note">{bar if self.done < self.total else ""}{words}</p>'


def progress(work: str) -> Watch:
    """Show a bar that follows long work, and return what that work calls; the last call says how it ended.

    Args:
        work: What is under way: `Fine-tuning`.
    """
    start = time.monotonic()
    live = Live(Progress(work, 0, 1, "", 0.0))
    shown_s = start

    def watch(done: float, total: float, said: str = "") -> None:
        nonlocal shown_s
        now = time.monotonic()
        if done < total and now - shown_s < PAUSE_S:
            return
        shown_s = now
        live.show(Progress(work, done, total, said, now - start))

    return watch


@dataclass(frozen=True, repr=False)
class _Alive(Shown):
    """What is shown, marked as an output that changes: by this mark dead controls beside it are hidden."""

    shown: Shown

    def __repr__(self) -> str:
        return repr(self.shown)

    def markdown(self) -> str:
        return self.shown.markdown()

    def html(self) -> str:
        return f'<div class="sk-live">{self.shown.html()}</div>'


def _column(controls: Sequence[Any]) -> Any:
    from ipywidgets import VBox

    return VBox(list(controls))


def _settings(controls: dict[str, Any]) -> str:
    return ", ".join(f"{control.description or name} {control.value}" for name, control in controls.items())
