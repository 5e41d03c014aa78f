"""Records of the steps of a run."""

from dataclasses import dataclass, field
from typing import Any

from shrinkkit.core import store
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Cell, Column, Shown, Table


@dataclass(frozen=True, repr=False)
class Step(Rich):
    """One notebook of a run, as its parent process saw it end."""

    name: str
    notebook: str
    subject: str
    """The variant it makes, or the target it measures; empty for the report."""
    state: str
    """`pending`, `running`, `done`, `cached`, `failed`, `skipped`, or `interrupted`."""
    duration_s: float = 0.0
    error: str = ""
    """The cause in one line; the executed notebook has the whole traceback."""
    inputs_sha256: str = ""
    """Hash of everything the step depends on; an unchanged step is not run again."""
    note: str = ""
    """A problem of a step that worked, such as that it has no page."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that it left, by path relative to the run folder. See `RunFolder.step_files`."""

    def __post_init__(self) -> None:
        """Check that each path stays inside the run folder."""
        store._check_inside(*self.files)


@dataclass(frozen=True, repr=False)
class Status(Rich):
    """The steps of a run and their states."""

    command: str
    """The command line that reproduces the run."""
    started: str
    """ISO 8601, UTC."""
    steps: tuple[Step, ...]
    schema_version: int = SCHEMA_VERSION

    def shown(self) -> Shown:
        """Return a table of the steps."""
        rows = tuple(
            (
                Cell(step.name),
                Cell(step.state, tone={"failed": "bad", "skipped": "bad"}.get(step.state, "quiet")),
                Cell(f"{step.duration_s:.1f} s"),
                Cell(step.error or step.note),
            )
            for step in self.steps
        )
        columns = (Column("step"), Column("state"), Column("time", True), Column("error or note"))
        return Table(f"{self.command}, started {self.started}", columns, rows)

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for each step."""
        return [step.to_dict() for step in self.steps]
