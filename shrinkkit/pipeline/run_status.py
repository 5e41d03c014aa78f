"""The status file and the log of a run, written by the runner process, and how its progress is shown."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shrinkkit.core import store
from shrinkkit.core.run_folder import RunFolder, Status, Step
from shrinkkit.errors import InvalidInput

SUCCEEDED = ("done", "cached")
EVERY_S = 30.0
"""Time between two lines in which a log says what a running step is doing."""
STYLES = {"done": "green", "cached": "dim", "running": "cyan", "failed": "bold red", "skipped": "red"}


@dataclass(frozen=True)
class Progress:
    """The steps of a run at the moment when one of them starts, ends, or is running."""

    steps: tuple[Step, ...]
    current: Step
    """The step that has changed. While it is running, its duration is that so far."""
    phase: str = ""
    """What is being done: the section of its notebook, and the action in it."""
    expected_s: Mapping[str, float] | None = None
    """Duration to expect of a step, by name, where an earlier run or a step of the same kind tells."""

    @property
    def position(self) -> str:
        """The number of the current step and the number of steps: `[2/8]`."""
        return f"[{self.steps.index(self.current) + 1}/{len(self.steps)}]"

    def left_s(self, step: Step) -> float | None:
        """Return the seconds that a step still needs; None if nothing tells."""
        if step.state not in ("pending", "running"):
            return 0.0
        expected = (self.expected_s or {}).get(step.name)
        return None if expected is None else max(0.0, expected - step.duration_s)


class Monitor:
    """Callbacks through which a run reports its progress. These do nothing."""

    def message(self, text: str) -> None:
        """Show a line that stays."""

    def activity(self, text: str) -> None:
        """Show what is being done now, until the next call."""

    def step(self, progress: Progress) -> None:
        """Show the steps: one has started or ended, or is running."""


class LineMonitor(Monitor):
    """Prints a line as each step starts and ends, and now and then while it runs, without escape codes."""

    def __init__(self, console: Console) -> None:
        """Print to `console`."""
        self.console = console
        self._state, self._shown_s = ("", ""), 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def message(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, progress: Progress) -> None:
        """Print a line if the state of the step has changed, or `EVERY_S` after the last line of a running one."""
        step = progress.current
        if (state := (step.name, step.state)) != self._state:
            self._state, self._shown_s = state, step.duration_s
            self.message(f"{progress.position} {describe(step)}")
        elif step.state == "running" and step.duration_s - self._shown_s >= EVERY_S:
            self._shown_s = step.duration_s
            self.message(f"{progress.position} {step.name} · {duration(step.duration_s)} · {progress.phase}")


class LiveMonitor(LineMonitor):
    """Shows the steps of a run in one table, which changes in place."""

    def __enter__(self) -> Self:
        self._live = Live(console=self.console, auto_refresh=False)
        self._live.start()
        self._progress: Progress | None = None
        return self

    def __exit__(self, *_: object) -> None:
        # The table of all steps stays on the screen.
        self._show(steps_table(self._progress, height=None) if self._progress else Text())
        self._live.stop()

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
    for title, widest in (("time", "10:00 min"), ("left", "~10:00 min")):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(widest))
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


def read(run: RunFolder) -> Status | None:
    """Return the status of an earlier run; None if there was none."""
    # An unreadable status, or one of an older version, proves no step: all are executed again.
    with suppress(InvalidInput):
        return store.read(run.status, Status)
    return None


def succeeded(run: RunFolder) -> dict[str, Step]:
    """Return the steps of earlier runs that ended well, by name."""
    status = read(run)
    return {step.name: step for step in status.steps if step.state in SUCCEEDED} if status else {}


def record_files(run: RunFolder, name: str, files: Mapping[str, str]) -> None:
    """Record the SHA-256 of the files that the step `name`, executed outside of a run, left; see `Step.files`."""
    if status := read(run):
        steps = tuple(replace(step, files=dict(files)) if step.name == name else step for step in status.steps)
        store.write(run.status, replace(status, steps=steps))


class RunStatus:
    """The states of a run's steps: in its status file, in its log, and reported to a monitor."""

    def __init__(
        self, run: RunFolder, command: str, planned: Sequence[Step], monitor: Monitor, *, partial: bool = False
    ) -> None:
        """Write the status of a run that starts: its `planned` steps, of which the report is the last.

        Of a `partial` run, the other steps and how the run was started are kept; of a whole one, only benchmarks of
        other machines.
        """
        before = read(run)
        self.run = run
        self.monitor = monitor
        self.earlier = succeeded(run)
        self.before = {step.name: step for step in before.steps} if before else {}
        self.planned = [step.name for step in planned]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.command, self.started = (before.command, before.started) if before and partial else (command, now)
        known = self.before
        measured = {name: step for name, step in self.earlier.items() if step.notebook == "4-benchmark"}
        new = {step.name: step for step in planned}
        steps = known | new if partial else new | {name: step for name, step in measured.items() if name not in new}
        self.steps = dict(sorted(steps.items(), key=lambda item: item[0] == self.planned[-1]))
        ended = [step for step in known.values() if step.state in SUCCEEDED]
        self._durations = {step.name: step.duration_s for step in ended if step.duration_s}
        self._write()

    def __getitem__(self, name: str) -> Step:
        """Return the step called `name` in its present state."""
        return self.steps[name]

    def set(self, name: str, **changes: Any) -> None:
        """Change fields of a step, record them and report them."""
        self.steps[name] = step = replace(self.steps[name], **changes)
        if step.state == "done":
            self._durations[name] = step.duration_s
        self._write()
        progress = self._progress(step, "")
        self.monitor.step(progress)
        log(self.run, f"{progress.position} {describe(step)}")

    def tick(self, name: str, seconds: float, phase: str) -> None:
        """Report how long a step has been running, and in which section of its notebook it is."""
        self.monitor.step(self._progress(replace(self.steps[name], duration_s=seconds), phase))

    def interrupt(self) -> None:
        """Record that the run was interrupted."""
        for name in self.planned:
            if self.steps[name].state == "running":
                self.set(name, state="interrupted", error="Interrupted. Run the same command again to resume.")

    def _progress(self, current: Step, phase: str) -> Progress:
        steps = tuple(current if name == current.name else self.steps[name] for name in self.planned)
        expected = {}
        for step in steps:
            alike = [other.name for other in self.steps.values() if other.notebook == step.notebook]
            durations = [self._durations[name] for name in alike if name in self._durations]
            if step.name in self._durations or durations:
                expected[step.name] = self._durations.get(step.name) or fmean(durations)
        return Progress(steps, current, phase, expected)

    def _write(self) -> None:
        store.write(self.run.status, Status(self.command, self.started, tuple(self.steps.values())))


def describe(step: Step) -> str:
    """Return the state of a step in a line, with its error and its note in lines below."""
    duration = f" · {step.duration_s:.1f} s" if step.state in ("done", "failed", "interrupted") else ""
    details = [f"\n    {text}" for text in (step.error, step.note) if text]
    return f"{step.name} · {step.state}{duration}{''.join(details)}"


def log(run: RunFolder, text: str) -> None:
    """Append `text` to the run's log, with the time; raises LeaseLost if this process's run has ended."""
    if text.strip():
        store.check_lease()
        line = f"{datetime.now(UTC).isoformat(timespec='seconds')} {text.rstrip()}\n"
        if run.log.is_file() and run.log.lstat().st_nlink > 1:
            # Another name of the same file is a copy somewhere else, which must not change.
            store.write_text(run.log, run.log.read_text(encoding="utf-8", errors="replace") + line)
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(run.log, flags, 0o644), "a", encoding="utf-8") as file:
            file.write(line)
