"""The files that a task depends on: those that it opens and the source that it imports, with their hashes.

Installed packages, the interpreter, caches and files that the task writes are excluded.
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
"""Files up to this size are hashed whole, larger ones by size, modification time and `BLOCKS` parts."""
BLOCKS, BLOCK_BYTES = 64, 1 << 16

_PACKAGE = Path(__file__).parent.parent
_SYSTEM = ("/proc", "/dev", "/sys", "/run", "/etc", "/usr/share", "/usr/lib", "/lib", "/lib64")
_EXCLUDED = frozenset(
    "site-packages dist-packages __pycache__ .cache .config .git .ipython .jupyter .pytest_cache .hypothesis".split()
)
"""Names of folders of installed packages, caches and settings."""
_WRITES = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_listeners: list[Callable[[str, bool], None]] = []
"""Called with the path of each file that this process opens, and whether it is opened for writing."""
_hooked: list[bool] = []


@dataclass(frozen=True)
class Inspection:
    """What a study needs to know of its task before it starts."""

    fingerprint: str = ""
    """Hash of the task's code, weights, example, data and files."""
    layers: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """The `hashes` of the files that it depends on, by path."""
    scores: Sequence[float] = (0.0, 1.0)
    """The lowest and the highest score of the model."""


@contextlib.contextmanager
def watch() -> Iterator[set[Path]]:
    """Collect the files that this process reads in the block; the set is complete at its end.

    Covers files opened by Python (`numpy.memmap` and `torch.load` included), sqlite3 databases, and files that are
    open or memory-mapped at the end by any library. Files that were written are excluded.
    """
    read: set[str] = set()
    written: set[str] = set()
    files: set[Path] = set()

    def note(path: str, writes: bool) -> None:
        (written if writes else read).add(os.path.abspath(path))

    if not _hooked:
        sys.addaudithook(_on_event)
        _hooked.append(True)
    before = _open_files()
    _listeners.append(note)
    try:
        yield files
    finally:
        _listeners.remove(note)
        paths = (read | (_open_files() - before)) - written
        files |= {Path(path) for path in paths if _belongs_to_task(path) and os.path.isfile(path)}


def imported(*extra: Path) -> set[Path]:
    """Return `extra` and the files of imported modules, without the standard library and installed packages."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    paths = [file for file in files if isinstance(file, str) and _belongs_to_task(file) and os.path.isfile(file)]
    return {*extra, *map(Path, paths)}


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the hash of each file by its path; '' for a file that cannot be read."""
    return {str(path): _hash(path) for path in sorted(set(paths))}


def changed(files: Mapping[str, str]) -> str:
    """Return which of the task's `files`, given with their hashes, has changed, as a sentence; '' if none has."""
    for path, expected in files.items():
        if (actual := _hash(Path(path))) != expected:
            return f"{path}, which the task reads, {'changed' if actual else 'vanished'} during the run; run again."
    return ""


def digest(files: Mapping[str, str]) -> str:
    """Return one hash of the names and hashes of `files`, independent of their folder."""
    return hashlib.sha256(repr(sorted((Path(path).name, sha) for path, sha in files.items())).encode()).hexdigest()


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= WHOLE_BYTES:
                return store.sha256(path)
            partial = hashlib.sha256(f"{size} {os.fstat(file.fileno()).st_mtime_ns}".encode())
            for block in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                partial.update(file.read(BLOCK_BYTES))
            return partial.hexdigest()
    except OSError:
        return ""


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if not _listeners or event not in ("open", "sqlite3.connect"):
        return
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    if path and path != ":memory:":
        mode, flags = (arguments[1:3]) if event == "open" else ("r", 0)
        writes = any(letter in mode for letter in "wax") if isinstance(mode, str) else bool((flags or 0) & _WRITES)
        for listener in list(_listeners):
            listener(path, writes)


def _open_files() -> set[str]:
    """Return the files that are open or memory-mapped now, on Linux; libraries excluded."""
    paths: set[str] = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                paths.add(os.readlink(entry.path))
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        paths |= {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return {path for path in paths if path.startswith("/") and ".so" not in Path(path).name}


def _belongs_to_task(path: str) -> bool:
    if _EXCLUDED.intersection(Path(path).parts) or "torchinductor_" in path:
        return False
    return not any(Path(path).is_relative_to(root) for root in _installed())


@cache
def _installed() -> frozenset[Path]:
    environment = (sys.prefix,) if sys.prefix != sys.base_prefix else ()
    library = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    roots = [Path(root) for root in (*_SYSTEM, *environment, *library)] + [Path(sys.executable).parent, _PACKAGE]
    return frozenset([*roots, *(root.resolve() for root in roots), Path(sys.executable).resolve().parent])
