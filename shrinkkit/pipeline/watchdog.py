"""A child process with a time limit: what it prints is heard while it runs, and nothing of it is left afterwards."""

import collections
import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

_KEPT_LINES = 200
_POLL_S = 0.25


@dataclass(frozen=True)
class Ended:
    """How a child process ended."""

    status: int | None
    """Its exit status, below 0 for the signal that ended it; None if it was stopped for time."""
    output: str
    """What it wrote to its standard output."""
    errors: str
    """The last lines that it wrote to its standard error."""


def run(
    command: Sequence[str],
    *,
    limit_s: float,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    heard: Callable[[str], bool] = lambda _: False,
    tick: Callable[[float], None] = lambda _: None,
) -> Ended:
    """Run `command` and return how it ended; it and its children are killed once `limit_s` is over, or on Ctrl-C.

    Args:
        command: Program and arguments.
        limit_s: Seconds that it may take, above 0.
        env: Its environment; None for this process's own.
        cwd: The folder that it works in; None for this process's own.
        heard: Called with each line of its standard error; returns whether the time starts again.
        tick: Called several times a second with the seconds since the time started.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    kept: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        child = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        assert child.stderr is not None
        reader = threading.Thread(target=_forward, args=(child.stderr, lines), daemon=True)
        reader.start()
        start, overdue = time.monotonic(), False
        try:
            while child.poll() is None and not overdue:
                with contextlib.suppress(queue.Empty):
                    kept.append(lines.get(timeout=_POLL_S))
                    start = time.monotonic() if heard(kept[-1]) else start
                tick(time.monotonic() - start)
                overdue = not time.monotonic() - start <= limit_s
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            reader.join(timeout=_POLL_S)
        while not lines.empty():
            kept.append(lines.get())
            heard(kept[-1])
        output.seek(0)
        return Ended(None if overdue else child.returncode, output.read(), "\n".join(kept))


def _forward(stream: IO[str], lines: "queue.SimpleQueue[str]") -> None:
    with contextlib.suppress(ValueError), stream:
        for line in stream:
            lines.put(line.rstrip("\n"))
