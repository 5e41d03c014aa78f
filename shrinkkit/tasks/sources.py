"""The files that a task is made of: those that it opens and the source that it imports, and whether one has changed.

Installed packages, the interpreter, caches and what the task itself writes are left out.
"""

import contextlib
import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from shrinkkit.core import store

WHOLE_BYTES = 256 << 20
"""A file up to this size is hashed whole; of a larger one, its size, its time of change and `BLOCKS` parts of it."""
BLOCKS, BLOCK_BYTES = 64, 1 << 16

_PACKAGE = Path(__file__).parent.parent
_SYSTEM = ("/proc", "/dev", "/sys", "/run", "/etc", "/usr/share", "/usr/lib", "/lib", "/lib64")
_OTHERS = frozenset(
    "site-packages dist-packages __pycache__ .cache .config .git .ipython .jupyter .pytest_cache .hypothesis".split()
)
"""Folders of installed packages, caches and settings, by name."""
_WRITES = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_opened: list[Callable[[str, bool], None]] = []
"""Who is told of each file that this process opens, with whether it is to be written."""
_hooked: list[bool] = []


@dataclass(frozen=True)
class Look:
    """What a study needs to know of its task before it starts."""

    fingerprint: str = ""
    """Changes when the task does: its code, its model's weights, its example, its data or a file that it reads."""
    layers: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """The files that it is made of, by path, with their `hashes`."""
    scores: Sequence[float] = (0.0, 1.0)
    """The lowest and the highest score of its model."""


@contextlib.contextmanager
def watch() -> Iterator[set[Path]]:
    """Collect the files that this process reads while the block runs, in a set that is complete at its end.

    Seen are files that Python opens (also for `numpy.memmap` and `torch.load`), databases of sqlite3, and files that
    are open or mapped into memory at the end, whichever library opened them. Files that were written are left out.
    """
    read: set[str] = set()
    written: set[str] = set()
    found: set[Path] = set()

    def note(path: str, writes: bool) -> None:
        (written if writes else read).add(os.path.abspath(path))

    if not _hooked:
        sys.addaudithook(_hear)
        _hooked.append(True)
    before = _held()
    _opened.append(note)
    try:
        yield found
    finally:
        _opened.remove(note)
        found |= {
            Path(path) for path in (read | (_held() - before)) - written if _counts(path) and os.path.isfile(path)
        }


def imported(*extra: Path) -> set[Path]:
    """Return `extra` and the files of imported modules, but for the standard library and installed packages."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return {*extra} | {Path(file) for file in files if isinstance(file, str) and _counts(file) and os.path.isfile(file)}


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the hash of each file by its path; '' for one that cannot be read."""
    return {str(path): _hash(path) for path in sorted(set(paths))}


def changed(files: Mapping[str, str]) -> str:
    """Return why the task is no longer the one that had these `hashes`, '' if it is."""
    for path, known in files.items():
        if (now := _hash(Path(path))) != known:
            return f"{path}, which the task reads, {'changed' if now else 'vanished'} during the run; run again."
    return ""


def digest(files: Mapping[str, str]) -> str:
    """Return one hash of the names and the contents of `files`, the same in any folder."""
    return hashlib.sha256(repr(sorted((Path(path).name, known) for path, known in files.items())).encode()).hexdigest()


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= WHOLE_BYTES:
                return store.sha256(path)
            told = hashlib.sha256(f"{size} {os.fstat(file.fileno()).st_mtime_ns}".encode())
            for block in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                told.update(file.read(BLOCK_BYTES))
            return told.hexdigest()
    except OSError:
        return ""


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _opened or event not in ("open", "sqlite3.connect"):
        return
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    if path and path != ":memory:":
        mode, flags = (arguments[1:3]) if event == "open" else ("r", 0)
        writes = any(letter in mode for letter in "wax") if isinstance(mode, str) else bool((flags or 0) & _WRITES)
        for note in list(_opened):
            note(path, writes)


def _held() -> set[str]:
    """Return the files that are open or mapped into memory now, where the system tells."""
    held: set[str] = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                held.add(os.readlink(entry.path))
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        held |= {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return {path for path in held if path.startswith("/") and ".so" not in Path(path).name}


def _counts(path: str) -> bool:
    """Return whether a file belongs to the task, by where it lies."""
    if _OTHERS.intersection(Path(path).parts) or "torchinductor_" in path:
        return False
    return not any(Path(path).is_relative_to(root) for root in _installed())


@cache
def _installed() -> frozenset[Path]:
    environment = (sys.prefix,) if sys.prefix != sys.base_prefix else ()
    library = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    roots = [Path(root) for root in (*_SYSTEM, *environment, *library)] + [Path(sys.executable).parent, _PACKAGE]
    return frozenset([*roots, *(root.resolve() for root in roots), Path(sys.executable).resolve().parent])
