"""How a run is shown while it proceeds: one live table in a terminal, plain lines in a log."""

from contextlib import ExitStack
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shrinkkit.pipeline.run_status import Monitor, Progress, describe

STYLES = {"done": "green", "cached": "dim", "running": "cyan", "failed": "bold red", "skipped": "red"}


class LineMonitor(Monitor):
    """Prints a line as each step starts and ends, without escape codes."""

    def __init__(self, console: Console) -> None:
        """Print to `console`."""
        self.console = console
        self._state = ("", "")

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: every line is already printed."""

    def message(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, progress: Progress) -> None:
        """Print a line if the state of the step has changed."""
        state = (progress.current.name, progress.current.state)
        if state != self._state:
            self._state = state
            self.message(f"{progress.position} {describe(progress.current)}")


class LiveMonitor(LineMonitor):
    """Shows the steps of a run in one table, which changes in place."""

    def __enter__(self) -> Self:
        """Start the live display."""
        self._live = Live(console=self.console, auto_refresh=False)
        self._stack = ExitStack()
        self._stack.enter_context(self._live)
        self._progress: Progress | None = None
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the table of all steps on the screen."""
        self._show(steps_table(self._progress, height=None) if self._progress else Text())
        self._stack.close()

    def activity(self, text: str) -> None:
        """Show what is being done now."""
        self._show(Text(text, style="dim"))

    def step(self, progress: Progress) -> None:
        """Show the table of all steps."""
        self._progress = progress
        self._show(steps_table(progress, height=self.console.height))

    def _show(self, content: RenderableType) -> None:
        self._live.update(content, refresh=True)


def steps_table(progress: Progress, *, height: int | None) -> Table:
    """Return the table of a run's steps, with phase and time left, of at most `height` lines."""
    table = Table(box=None, pad_edge=False, header_style="dim", caption_justify="left", caption_style="dim")
    table.add_column("step", overflow="fold")
    table.add_column("state", no_wrap=True, min_width=len("interrupted"))
    table.add_column("time", justify="right", no_wrap=True, min_width=len("10:00 min"))
    table.add_column("left", justify="right", no_wrap=True, min_width=len("~10:00 min"))
    table.add_column("section or error", overflow="fold")
    steps, current = progress.steps, progress.steps.index(progress.current)
    room = max(3, height - 4) if height else len(steps)
    first = max(0, min(current - room // 2, len(steps) - room))
    for step in steps[first : first + room]:
        left_s = progress.left_s(step)
        text = step.error or step.note or (progress.phase if step is progress.current else "")
        # A cached step has the duration that it once took.
        time = "" if step.state in ("pending", "cached", "skipped") else duration(step.duration_s)
        cells = (step.name, step.state, time, f"~{duration(left_s)}" if left_s else "", text)
        table.add_row(*map(Text, cells), style=STYLES.get(step.state, "dim"))
    left = [progress.left_s(step) for step in steps]
    known = sum(seconds for seconds in left if seconds is not None)
    ended = sum(step.state not in ("pending", "running") for step in steps)
    total = f", {'at least' if None in left else 'about'} {duration(known)} left" if known else ""
    table.caption = f"{ended} of {len(steps)} steps{total}"
    return table


def duration(seconds: float) -> str:
    """Return a duration as `9 s`, `3:05 min` or `1:05 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"
