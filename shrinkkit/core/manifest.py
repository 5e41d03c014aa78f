"""What lies in a run folder beside what its steps left there: a manifest is the SHA-256 of each file by its path."""

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from shrinkkit.core import store
from shrinkkit.errors import InvalidInput

SUMS = "SHA256SUMS"
"""The manifest inside a variant's folder, in the form of `sha256sum`."""
_OF_THE_REPORT = ("model-card.json", "README.md", SUMS)
"""Files in a variant's folder that the report writes anew."""


class Taken(Protocol):
    """A step: what it makes, and the record that proves that it was taken."""

    @property
    def leaves(self) -> str:
        """The record's path, relative to the run folder; empty for the report."""


def left(run: Path, step: Taken) -> dict[str, str]:
    """Return the manifest of what a step has just left: a variant's files, a benchmark's record, or study and cards."""
    if not step.leaves:
        return _of(run, [run / "study.json", *(p for name in _OF_THE_REPORT for p in run.glob(f"variants/*/{name}"))])
    record = run / step.leaves
    if record.parent.parent.name not in ("variants", "checkpoints"):
        return _of(run, [record])
    return _of(run, [path for path in record.parent.rglob("*") if path.name not in _OF_THE_REPORT])


def changed(run: Path, files: Mapping[str, str]) -> dict[str, str]:
    """Return what happened to each file of a manifest that is not as it was, by its path.

    Args:
        run: The folder that the paths are relative to.
        files: The manifest.
    """
    return {path: what for path, sha256 in files.items() if (what := differs(run, (path,), sha256))}


def differs(folder: Path, paths: Sequence[str], sha256: str) -> str:
    """Return what happened to files that together had the hash `sha256`, in words; '' if they still have it.

    Args:
        folder: The folder that the paths are relative to; what lies outside of it, behind a link, is not read.
        paths: The files, in order.
        sha256: Of one after the other.
    """
    places = [folder / path for path in paths]
    if any(linked(folder, path) for path in paths):
        return "is a link"
    if not all(place.is_file() for place in places):
        return "is missing"
    try:
        return "" if store.sha256(*places) == sha256 else "has changed since it was written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def linked(folder: Path, path: str) -> bool:
    """Return whether `path` leads from `folder` to a file over a link."""
    parts = Path(path).parts
    return any(folder.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts)))


def check_kinds(run: Path) -> None:
    """Raise unless everything in a run folder is a file or a folder: a link may lead anywhere, a pipe may block.

    Raises:
        InvalidInput: Something is not.
    """
    for folder, folders, files in os.walk(run):
        for path in (Path(folder, name) for name in (*folders, *files)):
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                what = "a link" if stat.S_ISLNK(mode) else "no file"
                raise InvalidInput(
                    f"A run folder must hold nothing but files and folders, but {path} is {what}. Put the file itself "
                    "there, or remove it."
                )


def write_sums(folder: Path) -> None:
    """Write the manifest of a variant's folder; what is not written anew keeps the line that it has.

    Args:
        folder: The variant's folder.
    """
    known = read_sums(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    # A file that came later is none of the variant's.
    names = [name for name in names if not known or name in known or name in _OF_THE_REPORT]
    now = {n: known[n] if n in known and n not in _OF_THE_REPORT else store.sha256(folder / n) for n in names}
    store.write_text(folder / SUMS, "".join(f"{sha256}  {name}\n" for name, sha256 in now.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """Return the manifest in a variant's folder, empty if there is none; names with a folder in them are left out."""
    path = folder / SUMS
    if path.is_symlink() or not path.is_file():
        return {}
    lines = [line.partition("  ") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return {name: sha256 for sha256, _, name in lines if name and Path(name).name == name}


def _of(run: Path, paths: Iterable[Path]) -> dict[str, str]:
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    return {path.relative_to(run).as_posix(): store.sha256(path) for path in sorted(files)}
