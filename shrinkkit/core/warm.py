"""Processes that start warm: forks of a process that has imported what they need, so nothing but imports is shared.

`python -P -m shrinkkit.core.processes PARENT_PID shrinkkit.core.warm SOCKET MODULE...` is that process. It listens on
the file descriptor SOCKET; a module `-NAME` is not imported but missing. For each connection it forks a keeper, which
forks the process that the request describes, sends its process number and, when it has ended, its exit status. If the
client ends first, so does that process.
Linux only: on macOS, system libraries do not survive a fork.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from shrinkkit.core import processes

AVAILABLE = sys.platform == "linux"
VARIABLE = "SHRINKKIT_WARM"
"""Environment variable of a step with the address of the process that measurements of memory are forked from."""
Tick = Callable[[float], None]
_LONGEST_REQUEST, _POLL_S = 1 << 17, 0.1
_PR_SET_NAME = 15


@contextlib.contextmanager
def server(modules: Sequence[str], variables: Mapping[str, str]) -> Iterator[Callable[[Tick], str]]:
    """Start a process that imports `modules` in the environment plus `variables`; yield what waits for its address.

    `-name` among the modules makes `name`, which others would import, missing there and in what is forked from it.

    Libraries that read the environment when they are loaded read this one, whatever a later process asks for. Until the
    process is ready, the argument is called several times a second with the seconds that have passed. The address of
    one that ended is refused.
    """
    with processes.short_folder() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        address = str(folder / "warm")
        listener.bind(address)
        command = processes.command("shrinkkit.core.warm", str(listener.fileno()), *modules)
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
        env = processes.environment() | dict(variables)
        process = processes.cold(command, env=env, pass_fds=[listener.fileno()], **options)
        begin = time.monotonic()

        def listens() -> bool:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                return probe.connect_ex(address) == 0

        def ready(tick: Tick) -> str:
            while process.poll() is None and not listens():
                time.sleep(_POLL_S)
                tick(time.monotonic() - begin)
            return address

        try:
            yield ready
        finally:
            processes.stop(process, patience_s=0)


def start(address: str, command: Sequence[str], **options: Any) -> processes.Process:
    """Start `command` from the server at `address`, or cold if that has ended; see `Child`."""
    try:
        return Child(address, command, **options)
    except OSError:
        return processes.cold(command, **options)


class Child:
    """A process started warm, which leads a session and ends with this object; the methods are those of `Popen`."""

    stdin = stdout = None

    def __init__(
        self,
        address: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None = None,
        stdout: IO[str] | None = None,
        stderr: int | None = None,
    ) -> None:
        """Start the module and the arguments of `command`, made by `processes.command`; raises OSError.

        `stdout` is a file, `stderr` may be `subprocess.PIPE`; by default both are this process's.
        """
        self.returncode: int | None = None
        self.stderr: IO[str] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(address)
        request = {"argv": list(command[processes.PREFIX :]), "env": dict(env), "cwd": str(cwd or Path.cwd())}
        reading, writing = os.pipe() if stderr == subprocess.PIPE else (None, os.dup(2))
        try:
            files = [stdout.fileno() if stdout else 1, writing]
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)
        finally:
            os.close(writing)
        if reading is not None:
            self.stderr = open(reading, encoding="utf-8", errors="replace")  # noqa: SIM115
        self.pid = int(self._answer())

    def _answer(self) -> bytes:
        if answer := self._socket.recv(100):
            return answer
        raise ConnectionResetError("the process to fork from has ended")

    def poll(self) -> int | None:
        """Return the exit status, below 0 for the signal that ended it; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended and return the exit status; raises TimeoutExpired."""
        if self.returncode is None:
            self._socket.settimeout(timeout)
            try:
                self.returncode = int(self._answer())
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0) from error
            except ConnectionError:
                self.returncode = -signal.SIGKILL
            self._socket.close()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal to the process unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        """Ask the process to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process."""
        self.send_signal(signal.SIGKILL)


def main(argv: list[str]) -> None:
    """Import, listen and fork until the parent ends; then, in a fork, run the module of the request."""
    listener = socket.socket(fileno=int(argv[0]))
    for name in argv[1:]:
        if name.startswith("-"):
            sys.modules[name[1:]] = None  # type: ignore[assignment]
            continue
        # The process that needs it says why it cannot be imported.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    # Collections in forks would copy every page.
    gc.collect()
    gc.freeze()
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    here = os.getpid()
    while True:
        connection, _ = listener.accept()
        # A client that only asks whether this listens sends nothing.
        if connection.recv(1, socket.MSG_PEEK) and os.fork() == 0:
            break
        connection.close()
    processes.die_with(here)
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(connection, _LONGEST_REQUEST, 2)
    keeper = os.getpid()
    if child := os.fork():
        _keep(child, connection)
    connection.close()
    os.setsid()
    processes.die_with(keeper)
    request = json.loads(message)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, request["argv"][0].rpartition(".")[2].encode()[:15])
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if "numpy" in sys.modules:
        import numpy as np

        # What a task draws without a seed differs between processes.
        np.random.seed()
    status = _run(request["argv"])
    kernels = sys.modules.get("ipykernel.kernelapp")
    if kernels and kernels.IPKernelApp.initialized():
        # It would close sockets that its threads may still read, for which zmq aborts. They end with this process.
        atexit.unregister(kernels.IPKernelApp.instance().close)
    # As at the end of any interpreter, but for freeing every module, which takes longer than many a step.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _run(argv: Sequence[str]) -> int:
    """Run a module as the main one of this process, and return the exit status."""
    try:
        processes.become(*argv)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return int(ended.code) if isinstance(ended.code, int) else bool(ended.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _keep(child: int, connection: socket.socket) -> None:
    """Tell the client the process number of `child` and how it ended; end it if the client ends. Does not return."""

    def follow() -> None:
        with contextlib.suppress(OSError):
            connection.recv(1)  # nothing comes but the end
        # It leads no group yet if the client ended at once.
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(child, signal.SIGKILL)

    with contextlib.suppress(OSError):
        connection.send(str(child).encode())
    threading.Thread(target=follow, daemon=True).start()
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
