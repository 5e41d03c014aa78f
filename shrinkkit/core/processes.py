"""Python processes that this package starts: they take no code from the working directory and die with their parent.

`python -P -m shrinkkit.children PARENT_PID MODULE ARGUMENT...` runs a module as such a process.
"""

import ctypes
import fcntl
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST = 40
"""Characters of a folder in which a folder for sockets is made; a socket's whole path must stay below about 100."""
_PREFIX, _OWNER = "sk-", "owner"
_PATHS = ("PYTHONPATH", "LD_LIBRARY_PATH")
_PR_SET_PDEATHSIG = 1


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs `module` by this interpreter, as a child of this process."""
    return [sys.executable, "-P", "-m", "shrinkkit.core.processes", str(os.getpid()), module, *arguments]


def environment() -> dict[str, str]:
    """Return this process's environment with search paths that do not depend on the working directory.

    Relative entries are resolved here. Empty ones, which stand for the working directory, are left out.
    """
    entries = {name: os.environ[name].split(os.pathsep) for name in _PATHS if name in os.environ}
    paths = {name: os.pathsep.join(os.path.abspath(e) for e in found if e) for name, found in entries.items()}
    return os.environ | paths | {"PYTHONSAFEPATH": "1"}


def die_with(parent: int) -> None:
    """Have this process killed as soon as its parent, the process `parent`, ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    # It may have ended before this process asked for the signal.
    if os.getppid() != parent:
        os._exit(1)


def end(child: subprocess.Popen[bytes], *, patience_s: float = 10.0) -> None:
    """Stop `child`, which leads a session of its own: by SIGTERM, and by SIGKILL if that takes longer than patience."""
    try:
        if child.poll() is None:
            child.terminate()
            child.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Also when a second Ctrl-C arrives meanwhile.
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder for sockets, whatever TMPDIR says, and remove it and those that killed processes left."""
    places = [tempfile.gettempdir(), "/tmp", "/dev/shm", "/var/tmp"]
    place = next((p for p in places if len(p) <= LONGEST and os.access(p, os.W_OK | os.X_OK)), places[0])
    _remove_abandoned(Path(place))
    made = tempfile.TemporaryDirectory(dir=place, prefix=_PREFIX, ignore_cleanup_errors=True)
    with made as name, Path(name, _OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield Path(name)


def _remove_abandoned(place: Path) -> None:
    for folder in place.glob(f"{_PREFIX}*"):
        # Whatever is in the way, such as another user's folder: it is not ours to remove.
        with suppress(OSError):
            state = folder.lstat()
            # A folder that is being made has no lock yet.
            if state.st_uid != os.getuid() or folder.is_symlink() or time.time() - state.st_mtime < 60:
                continue
            with (folder / _OWNER).open() as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
