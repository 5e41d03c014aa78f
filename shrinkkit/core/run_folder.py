"""A run folder: its layout, the status of its steps, and the SHA-256 of its files."""

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shrinkkit.core import store
from shrinkkit.core.store import SCHEMA_VERSION, sha256
from shrinkkit.core.target import Target
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Cell, Column, Shown, Table
from shrinkkit.errors import InvalidInput

RECORD, CARD, README, SUMS = "variant.json", "model-card.json", "README.md", "SHA256SUMS"
"""Files in a variant's folder. SHA256SUMS has the form of `sha256sum`."""
STRUCTURE = "structure.json"
"""The record of a transformed model in float32, in the folder of a variant or of a checkpoint."""
_WRITTEN_BY_REPORT = (CARD, README, SUMS)


class RunFolder:
    """The paths in a run folder. `RunFolder("")` gives them relative to any run folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Describe the run folder at `path`, which need not exist."""
        self.path = Path(path)
        self.study = self.path / "study.json"
        self.status = self.path / "status.json"
        self.log = self.path / "run.log"
        self.report = self.path / "report.html"
        self.report_markdown = self.path / "report.md"
        self.results = self.path / "results.json"
        self.steps = self.path / "steps"
        self.variants = self.path / "variants"
        self.checkpoints = self.path / "checkpoints"
        self.measurements = self.path / "measurements"
        self.robustness = self.path / "robustness"
        self.search = self.path / "search.json"
        self.recipes = self.path / "recipes"
        self.stop = self.path / ".end-search"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The name of the folder, which is that of its study."""
        return self.path.name

    def variant(self, name: str) -> Path:
        """Return the folder of a variant."""
        return self.variants / name

    def variant_record(self, name: str) -> Path:
        """Return the path of a variant's record."""
        return self.variants / name / RECORD

    def checkpoint_record(self, name: str) -> Path:
        """Return the path of the record of a model between two stages, which is not measured."""
        return self.checkpoints / name / STRUCTURE

    def variant_names(self) -> list[str]:
        """Return the names of the variants that have a record."""
        return sorted(path.parent.name for path in self.variants.glob(f"*/{RECORD}"))

    def measurement(self, target: str, machine: str) -> Path:
        """Return the path of the measurements of `target` (`device/runtime`) on the machine called `machine`."""
        return self.measurements / machine / f"{Target.parse(target).slug}.json"

    def robustness_record(self, target: str, machine: str) -> Path:
        """Return the path of the robustness of variants on `target` on the machine called `machine`."""
        return self.robustness / machine / f"{Target.parse(target).slug}.json"

    def relative(self, path: Path) -> str:
        """Return a path inside the folder as records state it: relative, with forward slashes."""
        return path.relative_to(self.path).as_posix()

    def check_is_run(self) -> None:
        """Check that the folder holds a run, or what notebooks made one by one; raises InvalidInput otherwise."""
        if not (self.study.is_file() or self.variant_names()):
            text = f"{self.path} must be a run folder, with a study.json."
            raise InvalidInput(f"{text} Make it with `shrinkkit run`, or copy one here.")

    def check_kinds(self) -> None:
        """Check that the folder holds no links, which may lead anywhere, or pipes, which block; raises InvalidInput."""
        for folder, folders, files in os.walk(self.path):
            for path in (Path(folder, name) for name in (*folders, *files)):
                mode = path.lstat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    text = f"A run folder must hold only files and folders, but {path} is"
                    kind = "a link" if stat.S_ISLNK(mode) else "no file"
                    raise InvalidInput(f"{text} {kind}. Put the file itself there, or remove it.")

    def step_files(self, record: str) -> dict[str, str]:
        """Return the SHA-256 of each file of a step that left `record`, by path; '' stands for the report.

        Both are relative to the folder. The report writes the study's copy and the variants' cards.
        """
        if not record:
            cards = (path for name in _WRITTEN_BY_REPORT for path in self.variants.glob(f"*/{name}"))
            return self._hashes([self.study, *cards])
        path = self.path / record
        if path.name not in (RECORD, STRUCTURE):
            return self._hashes([path])
        return self._hashes(file for file in path.parent.rglob("*") if file.name not in _WRITTEN_BY_REPORT)

    def _hashes(self, paths: Iterable[Path]) -> dict[str, str]:
        files = [path for path in paths if path.is_file() and not path.is_symlink()]
        return {self.relative(path): sha256(path) for path in sorted(files)}


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
    effort: str = ""
    """That of a benchmark, on which its duration depends."""

    def __post_init__(self) -> None:
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
        columns = (Column("step"), Column("state"), Column("time", True), Column("error or note"))
        rows = []
        for step in self.steps:
            state = Cell(step.state, tone="bad" if step.state in ("failed", "skipped") else "quiet")
            rows.append((Cell(step.name), state, Cell(f"{step.duration_s:.1f} s"), Cell(step.error or step.note)))
        return Table(f"{self.command}, started {self.started}", columns, tuple(rows))

    def _rows(self) -> list[dict[str, Any]]:
        return [step.to_dict() for step in self.steps]


def altered(folder: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    """Return how each file differs from its SHA-256 in `hashes`, by path relative to `folder`, without equal ones."""
    return {path: how for path, expected in hashes.items() if (how := difference(folder, (path,), expected))}


def difference(folder: Path, paths: Sequence[str], expected: str) -> str:
    """Return how files differ from the SHA-256 of their concatenation, '' if they do not. Linked ones are not read."""
    files = [folder / path for path in paths]
    if any(is_linked(folder, path) for path in paths):
        return "is a link"
    if not all(file.is_file() for file in files):
        return "is missing"
    try:
        return "" if sha256(*files) == expected else "has changed since it was written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def is_linked(folder: Path, path: str) -> bool:
    """Return whether `path`, relative to `folder`, is a link or lies in a linked folder."""
    parts = Path(path).parts
    return any(folder.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts)))


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of a variant's folder. Files that the report does not write keep the hash that they have."""
    known = read_sums(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    # A file that was added later is not the variant's.
    names = [name for name in names if not known or name in known or name in _WRITTEN_BY_REPORT]
    kept = {name: known[name] for name in names if name in known and name not in _WRITTEN_BY_REPORT}
    lines = (f"{kept.get(name) or sha256(folder / name)}  {name}\n" for name in names)
    store.write_text(folder / SUMS, "".join(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """Return the hashes in SHA256SUMS by file name, empty if there is none. Names in other folders are left out."""
    path = folder / SUMS
    if path.is_symlink() or not path.is_file():
        return {}
    lines = [line.partition("  ") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return {name: digest for digest, _, name in lines if name and Path(name).name == name}
