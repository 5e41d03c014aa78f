"""The lease of a run folder: one run holds it at a time, and only processes of that run write there.

A run writes a token into the folder and gives it to its processes. A process whose token is no longer there belongs to
a run that has ended, and must not write.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from filelock import FileLock, Timeout

from shrinkkit.errors import InvalidInput, LeaseLost

VARIABLE = "SHRINKKIT_LEASE"
"""Environment variable of a run's processes: the token, a space, and the absolute path of the file that has it."""
LOCK, TOKEN = ".lock", ".lease"
_INHERITED = os.environ.get(VARIABLE, "")
_held: ContextVar[str] = ContextVar("_held", default=_INHERITED)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process and its children; raises InvalidInput if another run holds it."""
    try:
        lock = FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout as error:
        raise InvalidInput(
            f"{folder} is in use by another run. Wait for it, or give this study another `name`."
        ) from error
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


def environment() -> dict[str, str]:
    """Return what a child of this process needs to write into the run folder: its variable, or nothing."""
    return {VARIABLE: _held.get()} if _held.get() else {}


def check() -> None:
    """Check that this process belongs to no run, or to the one that holds the folder; raises LeaseLost otherwise."""
    token, _, path = _held.get().partition(" ")
    if not token:
        return
    try:
        now = Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        now = ""
    if now != token:
        raise LeaseLost(
            f"Nothing more is written to {Path(path).parent.name}: the folder was removed, or another run holds it "
            "now. Run the study again."
        )
