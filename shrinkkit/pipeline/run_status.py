"""The status file and the log of a run, written by the runner process, and how its progress is shown."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shrinkkit.core import store
from shrinkkit.core.run_folder import RunFolder, Status, Step
from shrinkkit.display import cells, formats
from shrinkkit.errors import InvalidInput
from shrinkkit.pipeline.plan import BENCHMARK
from shrinkkit.results import results
from shrinkkit.results.verdict import decide

SUCCEEDED = ("done", "cached")
EVERY_S = 14.5
"""Time between two lines in which a log says what is being done: with the time between two callbacks, at most 15 s."""
INTERRUPTED = "Interrupted. Run the same command again to resume."
LOGGER = logging.getLogger("shrinkkit.run")
"""Repeats the lines that steps leave in the run's log."""
_WIDE = 100
"""Columns of a terminal from which on the section or error of a step is next to it, and not below the table."""
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
    best: str = ""
    """The best variant of the benchmarks so far."""

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

    @property
    def left(self) -> str:
        """What the steps still need in all: `about 3:05 min left`; '' if nothing tells."""
        left = [self.left_s(step) for step in self.steps]
        known = sum(seconds for seconds in left if seconds is not None)
        return f"{'at least' if None in left else 'about'} {duration(known)} left" if known else ""


class Monitor:
    """Callbacks through which a run reports its progress. These do nothing."""

    def message(self, text: str) -> None:
        """Show a line that stays."""

    def plan(self, rows: Sequence[tuple[str, ...]], summary: str) -> None:
        """Show the steps to come, the name, state and subject of each, and what they are in all."""

    def activity(self, text: str) -> None:
        """Show what is being done now, until the next call."""

    def step(self, progress: Progress) -> None:
        """Show the steps: one has started or ended, or is running."""


class LineMonitor(Monitor):
    """Prints a line as each step starts and ends, and every 15 s while it runs, without escape codes."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Print to `console`; `clock` returns seconds."""
        self.console, self._clock = console, clock
        self._state, self._best, self._shown_s = ("", ""), "", clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def message(self, text: str) -> None:
        """Print a line."""
        self._shown_s = self._clock()
        self.console.print(text, markup=False, soft_wrap=True)

    def plan(self, rows: Sequence[tuple[str, ...]], summary: str) -> None:
        """Print a line for each step, and the summary."""
        width = max(len(row[0]) for row in rows)
        self.message("\n".join([*(f"{name.ljust(width)}  {state}" for name, state, *_ in rows), summary]))

    def activity(self, text: str) -> None:
        """Print what is being done `EVERY_S` after the last line."""
        if self._clock() - self._shown_s >= EVERY_S:
            self.message(text)

    def step(self, progress: Progress) -> None:
        """Print a line if the state of the step has changed, or `EVERY_S` after the last line."""
        step = progress.current
        if (state := (step.name, step.state)) != self._state:
            self._state = state
            self.message(f"{progress.position} {describe(step)}")
        else:
            parts = (step.name, duration(step.duration_s), progress.phase, progress.left)
            self.activity(f"{progress.position} {' · '.join(filter(None, parts))}")
        if progress.best != self._best:
            self._best = progress.best
            self.message(self._best)


class LiveMonitor(LineMonitor):
    """Shows the steps of a run in one table, which changes in place."""

    def __enter__(self) -> Self:
        self._live = Live(console=self.console, auto_refresh=False)
        self._live.start()
        self._progress: Progress | None = None
        return self

    def plan(self, rows: Sequence[tuple[str, ...]], summary: str) -> None:
        """Print the summary; the table shows the steps."""
        self.message(summary)

    def __exit__(self, *_: object) -> None:
        # The table of all steps stays on the screen.
        self._show(self._table(height=None) if self._progress else Text())
        self._live.stop()

    def activity(self, text: str) -> None:
        """Show what is being done now."""
        self._show(Text(text, style="dim"))

    def step(self, progress: Progress) -> None:
        """Show the table of all steps."""
        self._progress = progress
        self._show(self._table(height=self.console.height))

    def _table(self, *, height: int | None) -> RenderableType:
        assert self._progress
        return steps_table(self._progress, height=height, width=self.console.width)

    def _show(self, content: RenderableType) -> None:
        self._live.update(content, refresh=True)


def steps_table(progress: Progress, *, height: int | None, width: int) -> RenderableType:
    """Return the table of a run's steps, with phase and time left, of at most `height` lines and `width` columns."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("step", overflow="fold")
    table.add_column("state", no_wrap=True, min_width=len("interrupted"))
    for title, widest in (("time", "10:00 min"), ("left", "~10:00 min")):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(widest))
    steps, current = progress.steps, progress.steps.index(progress.current)
    texts = [s.error or s.note or (progress.phase if s is progress.current else "") for s in steps]
    ended = sum(step.state not in ("pending", "running") for step in steps)
    below = [", ".join(filter(None, [f"{ended} of {len(steps)} steps", progress.left])), progress.best]
    if width >= _WIDE:
        table.add_column("section or error", overflow="fold")
    else:
        below = [*(f"{step.name}: {text}" for step, text in zip(steps, texts, strict=True) if text), *below]
    below = list(filter(None, below))
    room = max(3, height - 2 - sum(1 + len(line) // width for line in below)) if height else len(steps)
    first = max(0, min(current - room // 2, len(steps) - room))
    for step, text in list(zip(steps, texts, strict=True))[first : first + room]:
        left_s = progress.left_s(step)
        # A cached step has the duration that it once took.
        time = "" if step.state in ("pending", "cached", "skipped") else duration(step.duration_s)
        cells = (step.name, step.state, time, f"~{duration(left_s)}" if left_s else "")
        table.add_row(*map(Text, (*cells, text) if width >= _WIDE else cells), style=STYLES.get(step.state, "dim"))
    return Group(table, Text("\n".join(below), style="dim"))


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


def expected(steps: Iterable[Step], durations: Mapping[str, float]) -> dict[str, float]:
    """Return the duration to expect of each step, by name: its own in `durations`, or else the mean of its kind."""
    steps = tuple(steps)
    known = {step.name: step.duration_s for step in steps if step.state in SUCCEEDED and step.duration_s}
    known |= durations
    means: dict[str, list[float]] = {}
    for step in steps:
        if step.name in known:
            means.setdefault(step.notebook, []).append(known[step.name])
    tells = (step for step in steps if step.name in known or step.notebook in means)
    return {step.name: known.get(step.name) or fmean(means[step.notebook]) for step in tells}


def estimate(run: RunFolder, steps: Sequence[Step]) -> str:
    """Return how long `steps` will take by what earlier ones took in the run folder."""
    earlier = _telling(succeeded(run).values(), steps)
    known = expected([*earlier.values(), *(step for step in steps if step.name not in earlier)], {})
    seconds = [known[step.name] for step in steps if step.name in known]
    if not seconds:
        return "no estimate yet" if steps else "nothing to run"
    at_least = "about" if len(seconds) == len(steps) else "at least"
    return f"{at_least} {duration(sum(seconds))}, by what earlier steps took"


def _telling(earlier: Iterable[Step], planned: Iterable[Step]) -> dict[str, Step]:
    """Return the earlier steps whose durations tell those of `planned`, by name: no benchmarks of another effort."""
    efforts = {step.effort for step in planned}
    return {step.name: step for step in earlier if step.effort in efforts}


def best(run: RunFolder) -> str:
    """Return the best variant by the benchmarks so far, in a line."""
    loaded = results.load(run.path)
    verdict = decide(loaded)
    if verdict.kind != "within budget" or not (row := verdict.row):
        return "best so far: none within the budget"
    speed = formats.speedup(row.speedup_today, row.timing_today, noun=" faster than PyTorch", ci=False)
    parts = (f"{row.variant} on {row.target}", speed, cells.size(row.size_bytes).text)
    return f"best so far: {', '.join(filter(None, parts))}"


class LogHandler(logging.Handler):
    """Shows the lines of the log on a monitor."""

    def __init__(self, monitor: Monitor) -> None:
        """Show them on `monitor`."""
        super().__init__()
        self._monitor = monitor

    def emit(self, record: logging.LogRecord) -> None:
        """Show a line."""
        self._monitor.message(record.getMessage())


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
        self.planned: list[str] = [step.name for step in planned]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.command, self.started = (before.command, before.started) if before and partial else (command, now)
        known = self.before
        measured = {name: step for name, step in self.earlier.items() if step.notebook == "4-benchmark"}
        new = {step.name: step for step in planned}
        steps = known | new if partial else new | {name: step for name, step in measured.items() if name not in new}
        self.steps = dict(sorted(steps.items(), key=lambda item: item[0] == self.planned[-1]))
        telling = _telling(self.earlier.values(), planned)
        self._durations = {name: step.duration_s for name, step in telling.items() if step.duration_s}
        # By notebook: a busy machine makes all of them longer.
        self._pace: dict[str, float] = {}
        self._best = ""
        self._write()

    def __getitem__(self, name: str) -> Step:
        """Return the step called `name` in its present state."""
        return self.steps[name]

    def plan(self, planned: Sequence[Step]) -> None:
        """Take `planned` for the steps of the run; those that it knows keep their state."""
        self.planned = [step.name for step in planned]
        new = {step.name: self.steps.get(step.name, step) for step in planned}
        self.steps = {name: step for name, step in self.steps.items() if name not in new} | new
        self._write()

    def set(self, name: str, **changes: Any) -> None:
        """Change fields of a step, record them and report them."""
        self.steps[name] = step = replace(self.steps[name], **changes)
        if step.state == "done":
            if earlier_s := self._durations.get(name):
                self._pace[step.notebook] = step.duration_s / earlier_s
            self._durations[name] = step.duration_s
        self._write()
        if step.notebook == BENCHMARK and step.state in SUCCEEDED:
            self._best = best(self.run)
        progress = self._progress(step, "")
        self.monitor.step(progress)
        log(self.run, f"{progress.position} {describe(step)}", logging.DEBUG)

    def tick(self, name: str, seconds: float, phase: str) -> None:
        """Report how long a step has been running, and in which section of its notebook it is."""
        self.monitor.step(self._progress(replace(self.steps[name], duration_s=seconds), phase))

    def interrupt(self) -> None:
        """Record that the run was interrupted."""
        for name in self.planned:
            if self.steps[name].state == "running":
                self.set(name, state="interrupted", error=INTERRUPTED)

    def _progress(self, current: Step, phase: str) -> Progress:
        steps = tuple(current if name == current.name else self.steps[name] for name in self.planned)
        seconds = expected(_telling(self.steps.values(), steps).values(), self._durations)
        for step in steps:
            # Of a step that has ended nothing is left, whatever it took.
            if step.name in self._durations:
                seconds[step.name] *= self._pace.get(step.notebook, 1.0)
        return Progress(steps, current, phase, seconds, self._best)

    def _write(self) -> None:
        store.write(self.run.status, Status(self.command, self.started, tuple(self.steps.values())))


def describe(step: Step) -> str:
    """Return the state of a step in a line, with its error and its note in lines below."""
    duration = f" · {step.duration_s:.1f} s" if step.state in ("done", "failed", "interrupted") else ""
    details = [f"\n    {text}" for text in (step.error, step.note) if text]
    return f"{step.name} · {step.state}{duration}{''.join(details)}"


def log(run: RunFolder, text: str, level: int = logging.INFO) -> None:
    """Append `text` to the run's log, with the time; raises LeaseLost if this process's run has ended.

    `LOGGER` repeats it; at `logging.DEBUG` for what a monitor shows anyway.
    """
    if text.strip():
        store.check_lease()
        LOGGER.log(level, text.rstrip())
        line = f"{datetime.now(UTC).isoformat(timespec='seconds')} {text.rstrip()}\n"
        if run.log.is_file() and run.log.lstat().st_nlink > 1:
            # Another name of the same file is a copy somewhere else, which must not change.
            store.write_text(run.log, run.log.read_text(encoding="utf-8", errors="replace") + line)
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(run.log, flags, 0o644), "a", encoding="utf-8") as file:
            file.write(line)
