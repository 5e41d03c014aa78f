"""Reading and writing records as JSON, and files as a whole."""

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from shrinkkit.core import lease
from shrinkkit.errors import InvalidInput

SCHEMA_VERSION = 5
"""Raised whenever a stored record can no longer be read as an older version wrote it."""
PART = ".part"
"""Suffix of a file that is being written; its name begins with a dot."""

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
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise InvalidInput(
            f"{path} has schema version {version!r:.40}, this shrinkkit reads {SCHEMA_VERSION}. "
            + ("Update shrinkkit." if newer else "Run the study again.")
        )
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
    lease.check()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        lease.check()
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
