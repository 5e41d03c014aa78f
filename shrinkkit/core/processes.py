"""Child processes: Python modules that take no code from the working directory, end in time and die with their parent.

`python -P -m shrinkkit.core.processes PARENT_PID MODULE ARGUMENT...` runs a module as such a process.
"""

import collections
import ctypes
import os
import queue
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Protocol

import psutil
from filelock import FileLock

SOCKET_FOLDER_LENGTH = 40
"""Characters of a folder in which a folder for sockets is made; a socket's whole path must stay below about 100."""
PREFIX = 5
"""Words of `command` before the module."""
_FOLDER, _OWNER = "sk-", "owner"
_SEARCH_PATHS = ("PYTHONPATH", "LD_LIBRARY_PATH")
_PR_SET_PDEATHSIG = 1
_KEPT_LINES, _POLL_S = 200, 0.25


@dataclass(frozen=True)
class Ended:
    """How a child process ended."""

    status: int | None
    """Its exit status, below 0 for the signal that ended it; None if it was stopped for time."""
    output: str
    """Its standard output."""
    errors: str
    """The last lines of its standard error."""


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs `module` by this interpreter, as a child of this process."""
    return [sys.executable, "-P", "-m", "shrinkkit.core.processes", str(os.getpid()), module, *arguments]


class Process(Protocol):
    """What `run` needs of a `subprocess.Popen`, or of a process started in another way."""

    pid: int
    stderr: IO[str] | None
    returncode: int | None

    def poll(self) -> int | None:
        """Return the exit status, below 0 for the signal that ended it; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended and return the exit status; raises TimeoutExpired."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


def cold(command: Sequence[str], **options: Any) -> Process:
    """Start `command` in a new interpreter that leads a session."""
    options |= {"stdin": subprocess.DEVNULL, "encoding": "utf-8", "errors": "replace"}
    # Ctrl-C is for this process alone, which then stops the child in order.
    return subprocess.Popen(command, start_new_session=True, **options)


def run(
    command: Sequence[str],
    *,
    limit_s: float,
    cwd: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
    on_line: Callable[[str], bool] = lambda _: False,
    tick: Callable[[float], None] = lambda _: None,
    patience_s: float = 0.0,
    start: Callable[..., Process] | None = None,
) -> Ended:
    """Run `command` and return how it ended. It and its children are killed after `limit_s`, and on Ctrl-C.

    They get `variables` in addition to `environment()`, and `patience_s` between the request to terminate and the kill.
    `on_line` is called with each line of standard error and returns whether the time limit starts again; `tick` several
    times a second with the seconds since it started. `start` starts it, as `cold` does by default.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    kept: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        env = environment() | dict(variables)
        child = (start or cold)(command, env=env, cwd=cwd, stdout=output, stderr=subprocess.PIPE)
        assert child.stderr is not None
        reader = threading.Thread(target=_forward, args=(child.stderr, lines), daemon=True)
        reader.start()
        begin, overdue = time.monotonic(), False
        try:
            while child.poll() is None and not overdue:
                with suppress(queue.Empty, subprocess.TimeoutExpired):
                    if (line := lines.get(timeout=_POLL_S)) is None:
                        # Nothing writes any more, as when it is about to end.
                        child.wait(timeout=_POLL_S)
                        break
                    kept.append(line)
                    begin = time.monotonic() if on_line(line) else begin
                tick(time.monotonic() - begin)
                overdue = not time.monotonic() - begin <= limit_s
        finally:
            stop(child, patience_s=patience_s)
            reader.join(timeout=_POLL_S)
        while not lines.empty():
            if (line := lines.get()) is not None:
                kept.append(line)
                on_line(line)
        output.seek(0)
        return Ended(None if overdue else child.returncode, output.read(), "\n".join(kept))


def _forward(stream: IO[str], lines: "queue.SimpleQueue[str | None]") -> None:
    """Put each line of `stream` into `lines`, and None at its end."""
    with suppress(ValueError), stream:
        for line in stream:
            lines.put(line.rstrip("\n"))
    lines.put(None)


def stop(child: Process, *, patience_s: float) -> None:
    """Ask `child`, which leads a session, to terminate; then kill what is left of it and of its children."""
    family: list[psutil.Process] = []
    try:
        with suppress(psutil.NoSuchProcess, subprocess.TimeoutExpired):
            if child.poll() is None:
                family = psutil.Process(child.pid).children(recursive=True)
                if patience_s:
                    child.terminate()
                    child.wait(timeout=patience_s)
    finally:
        # Also when a second Ctrl-C arrives meanwhile.
        with suppress(ProcessLookupError, PermissionError):
            # The group has children whose own parent is gone, which psutil does not list. Windows has no groups.
            if hasattr(os, "killpg"):
                os.killpg(child.pid, signal.SIGKILL)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        child.kill()
        child.wait()


def environment() -> dict[str, str]:
    """Return this process's environment with search paths that do not depend on the working directory.

    Relative entries are resolved here. Empty ones, which stand for the working directory, are left out.
    """
    entries = {name: os.environ[name].split(os.pathsep) for name in _SEARCH_PATHS if name in os.environ}
    paths = {name: os.pathsep.join(os.path.abspath(e) for e in parts if e) for name, parts in entries.items()}
    return os.environ | paths | {"PYTHONSAFEPATH": "1"}


def die_with(parent: int) -> None:
    """Have this process killed as soon as its parent, the process `parent`, ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # It may have ended before this process asked for the signal.
        if os.getppid() != parent:
            os._exit(1)
    else:

        def exit_after() -> None:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(parent).wait()
            os._exit(1)

        threading.Thread(target=exit_after, daemon=True).start()


@contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder for sockets, whatever TMPDIR says, and remove it and those that killed processes left."""
    places = [tempfile.gettempdir(), "/tmp", "/dev/shm", "/var/tmp"]
    usable = (p for p in places if len(p) <= SOCKET_FOLDER_LENGTH and os.access(p, os.W_OK | os.X_OK))
    place = next(usable, places[0])
    _remove_abandoned(Path(place))
    folder = tempfile.TemporaryDirectory(dir=place, prefix=_FOLDER, ignore_cleanup_errors=True)
    with folder as name, FileLock(Path(name, _OWNER)):
        yield Path(name)


def _remove_abandoned(place: Path) -> None:
    for folder in place.glob(f"{_FOLDER}*"):
        # Errors are ignored: another user's folder, for instance, is not ours to remove.
        with suppress(OSError):
            state = folder.lstat()
            own = not hasattr(os, "getuid") or state.st_uid == os.getuid()
            # A folder that is being made has no lock yet.
            if own and (folder / _OWNER).is_file() and not folder.is_symlink() and time.time() - state.st_mtime > 60:
                with FileLock(folder / _OWNER, timeout=0):
                    shutil.rmtree(folder)


def become(module: str, *arguments: str) -> None:
    """Run `module` as the main one of this process."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    become(*sys.argv[2:])
