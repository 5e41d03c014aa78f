"""The status file and the log of a run, written by the runner process, and the progress that it reports."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from shrinkkit.core import store
from shrinkkit.core.run_folder import RunFolder, Status, Step
from shrinkkit.errors import InvalidInput

SUCCEEDED = ("done", "cached")


@dataclass(frozen=True)
class Progress:
    """The steps of a run at the moment when one of them starts, ends, or is running."""

    steps: tuple[Step, ...]
    current: Step
    """The step that has changed. While it is running, its duration is that so far."""
    phase: str = ""
    """The section of its notebook that is being executed."""
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
        self.planned = [step.name for step in planned]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.command, self.started = (before.command, before.started) if before and partial else (command, now)
        known = {step.name: step for step in before.steps} if before else {}
        measured = {name: step for name, step in self.earlier.items() if step.notebook == "4-benchmark"}
        new = {step.name: step for step in planned}
        steps = known | new if partial else new | {name: step for name, step in measured.items() if name not in new}
        self.steps = dict(sorted(steps.items(), key=lambda item: item[0] == self.planned[-1]))
        self._durations = {
            name: step.duration_s for name, step in known.items() if step.state in SUCCEEDED and step.duration_s
        }
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
        expected = {step.name: seconds for step in steps if (seconds := self._expected_s(step)) is not None}
        return Progress(steps, current, phase, expected)

    def _expected_s(self, step: Step) -> float | None:
        alike = [
            self._durations[other.name]
            for other in self.steps.values()
            if other.notebook == step.notebook and other.name in self._durations
        ]
        return self._durations.get(step.name) or (fmean(alike) if alike else None)

    def _write(self) -> None:
        store.write(self.run.status, Status(self.command, self.started, tuple(self.steps.values())))


def describe(step: Step) -> str:
    """Return the state of a step in a line, with its error and its note in lines below."""
    duration = f" · {step.duration_s:.1f} s" if step.state in ("done", "failed", "interrupted") else ""
    return f"{step.name} · {step.state}{duration}" + "".join(
        f"\n    {text}" for text in (step.error, step.note) if text
    )


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
