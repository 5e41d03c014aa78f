"""Reading and writing records as JSON and files as a whole, and the lease of the run folder that they are in.

One run holds a run folder at a time, and only its processes write there: a run writes a token into the folder and gives
it to its processes. A process whose token is no longer there belongs to a run that has ended, and must not write.
"""

import dataclasses
import hashlib
import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from shrinkkit.errors import InvalidInput, LeaseLost

SCHEMA_VERSION = 6
"""Raised whenever a stored record can no longer be read as an older version wrote it."""
PART = ".part"
"""Suffix of a file that is being written; its name begins with a dot."""

VARIABLE = "SHRINKKIT_LEASE"
"""Environment variable of a run's processes: the token, a space, and the absolute path of the file that has it."""
LOCK, TOKEN = ".lock", ".lease"
_held: ContextVar[str] = ContextVar("_held")

R = TypeVar("R")


def write(path: str | os.PathLike[str], record: Any) -> None:
    """Write `record` (a dataclass of this module) to `path` as JSON, whole or not at all."""
    write_text(path, json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n")


def read(path: str | os.PathLike[str], kind: type[R]) -> R:
    """Return the record of type `kind` stored at `path`; raises InvalidInput if it holds none of this version."""
    from pydantic import TypeAdapter, ValidationError

    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} must be a JSON record, but cannot be read: {error}. Run its step again.") from error
    version = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, dict) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        remedy = "Update shrinkkit" if isinstance(version, int) and version > SCHEMA_VERSION else "Run the study again"
        text = f"{path} has schema version {version!r:.40}, this shrinkkit reads {SCHEMA_VERSION}."
        raise InvalidInput(f"{text} {remedy}.")
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InvalidInput(f"{path} is not a {kind.__name__} record: {reason}. Run its step again.") from error


def _check_inside(*paths: str) -> None:
    for path in paths:
        parts = PurePosixPath(path).parts
        if not parts or ".." in parts or PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor:
            raise ValueError(f"a path must stay inside its folder, got {path!r}")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part; raises LeaseLost."""
    check_lease()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        check_lease()
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256(*paths: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the files at `paths`, one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process and its children; raises InvalidInput if another run holds it."""
    try:
        lock = FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout as error:
        raise InvalidInput(f"{folder} is in use by another run. Wait for it, or give this study a `name`.") from error
    with lock:
        path, token = folder.resolve() / TOKEN, secrets.token_hex(16)
        # A new file, because the old one may be a link to something else.
        path.unlink(missing_ok=True)
        path.write_text(token, encoding="ascii")
        before = _held.set(f"{token} {path}")
        try:
            yield
        finally:
            _held.reset(before)
            with suppress(OSError):
                path.unlink()


def is_held(folder: Path) -> bool:
    """Return whether a run holds the run folder now. A run that was killed leaves its token, but not the lock.

    Nothing is written, so the folder may be one that this user can only read.
    """
    if not (folder / TOKEN).exists() or not (folder / LOCK).exists():
        return False
    if sys.platform == "win32":
        with suppress(Timeout), FileLock(folder / LOCK, timeout=0):
            return False
        return True
    import fcntl

    with open(folder / LOCK, encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lease() -> str:
    # A forked process gets its variables after it has imported this module.
    return _held.get(os.environ.get(VARIABLE, ""))


def lease_variable() -> dict[str, str]:
    """Return what a child of this process needs to write into the run folder: its variable, or nothing."""
    return {VARIABLE: lease} if (lease := _lease()) else {}


def check_lease() -> None:
    """Check that this process belongs to no run, or to the one that holds the folder; raises LeaseLost otherwise."""
    token, _, path = _lease().partition(" ")
    if not token:
        return
    try:
        now = Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        now = ""
    if now != token:
        text = f"Nothing more is written to {Path(path).parent.name}: it was removed, or another run holds it now."
        raise LeaseLost(f"{text} Run the study again.")
