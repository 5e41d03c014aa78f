"""The books of a run: what became of its steps, kept by the process that takes them, and its log."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shrinkkit.core import lease, store
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.status import Status, Step
from shrinkkit.errors import InvalidInput


def done(folder: Path) -> Mapping[str, Step]:
    """Return the steps that an earlier run took and that ended well, by name."""
    before = status(folder)
    return {s.name: s for s in before.steps if s.state in ("done", "reused")} if before else {}


def status(folder: Path) -> Status | None:
    """Return what became of the steps of an earlier run; None if there was none."""
    # One that cannot be read, or is of an older version, vouches for no step: all are taken again.
    with suppress(InvalidInput):
        return store.read(RunFolder(folder).status, Status)
    return None


def keep(folder: Path, name: str, files: Mapping[str, str]) -> None:
    """Write down that the step `name`, taken again by itself, left `files`. Without a status there is nothing to do."""
    if before := status(folder):
        steps = tuple(replace(step, files=dict(files)) if step.name == name else step for step in before.steps)
        store.write(RunFolder(folder).status, replace(before, steps=steps))


class Journal:
    """The run's status file and log, and what the terminal shows."""

    def __init__(
        self,
        folder: Path,
        command: str,
        planned: Sequence[Step],
        say: Callable[[str, bool], None],
        *,
        only: bool = False,
    ) -> None:
        """Open the books of a run, and keep what still holds of those before.

        Args:
            folder: The run folder.
            command: The command line.
            planned: The steps to take, `pending`; the report comes last.
            say: Called with a line about the progress and whether it is final.
            only: Whether these are but some of the run's steps: what became of the others, and how the run was started,
                stays. When a whole run is taken, only benchmarks that are none of its own stay.
        """
        self.folder = folder
        self.say = say
        self.done = done(folder)
        self.planned = [step.name for step in planned]
        before = status(folder)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.command, self.started = (before.command, before.started) if before and only else (command, now)
        mine = {step.name: step for step in planned}
        measured = {name: s for name, s in self.done.items() if s.notebook == "4-benchmark" and name not in mine}
        known = {s.name: s for s in before.steps} if before else {}
        found = known | mine if only else mine | measured
        self.steps = dict(sorted(found.items(), key=lambda item: item[0] == self.planned[-1]))
        self._write()

    def step(self, name: str) -> Step:
        """Return what became of a step so far."""
        return self.steps[name]

    def set(self, name: str, **changes: Any) -> None:
        """Change fields of a step, write it down and say so."""
        self.steps[name] = step = replace(self.steps[name], **changes)
        self._write()
        place = self._place(name)
        if step.state == "running":
            self.say(place, False)
            return
        words = "".join(f"\n    {text}" for text in (step.error, step.note) if text)
        text = f"{place} · {step.state} · {step.duration_s:.1f} s{words}"
        self.say(text, True)
        log(self.folder, text)

    def tick(self, name: str, seconds: float) -> None:
        """Say how long a step has been running."""
        self.say(f"{self._place(name)} · {seconds:.0f} s", False)

    def _place(self, name: str) -> str:
        return f"[{self.planned.index(name) + 1}/{len(self.planned)}] {name}"

    def close(self) -> None:
        """Write down that the run was interrupted."""
        for name in self.planned:
            if self.steps[name].state == "running":
                self.set(name, state="interrupted", error="Interrupted; the same command goes on from here.")

    def _write(self) -> None:
        store.write(RunFolder(self.folder).status, Status(self.command, self.started, tuple(self.steps.values())))


def log(folder: Path, text: str) -> None:
    """Append `text` to the run's log, with the time.

    Raises:
        LeaseLost: This process belongs to a run that has ended.
    """
    if text.strip():
        lease.check()
        path = RunFolder(folder).log
        line = f"{datetime.now(UTC).isoformat(timespec='seconds')} {text.rstrip()}\n"
        if path.is_file() and path.lstat().st_nlink > 1:
            # Another name of the same file is a copy somewhere else, which is not ours to change.
            store.write_text(path, path.read_text(encoding="utf-8", errors="replace") + line)
            return
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644), "a") as file:
            file.write(line)
