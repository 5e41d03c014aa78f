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
    """The cause in one line; the whole traceback stands in the executed notebook."""
    inputs_sha256: str = ""
    """Hash of everything the step depends on; an unchanged step is not run again."""
    note: str = ""
    """What went wrong in a step that worked, such as that it has no page."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that it left, by path relative to the run folder. See `RunFolder.step_files`."""

    def __post_init__(self) -> None:
        """Raise unless each path stays inside the run folder."""
        store._check_inside(*self.files)


@dataclass(frozen=True, repr=False)
class Status(Rich):
    """What became of a run's steps."""

    command: str
    """The command line that reproduces the run."""
    started: str
    """ISO 8601, UTC."""
    steps: tuple[Step, ...]
    schema_version: int = SCHEMA_VERSION

    def shown(self) -> Shown:
        """Return the steps and how each ended."""
        return status_table(self)

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for each step."""
        return [step.to_dict() for step in self.steps]


def status_table(of: "Status") -> Table:
    """Return what became of a run's steps."""
    rows = tuple(
        (
            Cell(step.name),
            Cell(step.state, tone={"failed": "bad", "skipped": "bad"}.get(step.state, "quiet")),
            Cell(f"{step.duration_s:.1f} s"),
            Cell(step.error or step.note),
        )
        for step in of.steps
    )
    columns = (Column("notebook"), Column("state"), Column("took", True), Column("what went wrong"))
    return Table(f"{of.command}, started {of.started}", columns, rows)
