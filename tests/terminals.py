"""Programs in a terminal, as far as tests need it."""

import os
import re
import subprocess
import sys

import pytest


def run(command, *, cwd, columns, env, timeout_s=300):
    """Return what a command writes to a terminal of so many columns, with its control sequences, and its status."""
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    leader, follower = pty.openpty()
    fcntl.ioctl(
        follower, termios.TIOCSWINSZ, (40).to_bytes(2, sys.byteorder) + columns.to_bytes(2, sys.byteorder) + bytes(4)
    )
    variables = {k: v for k, v in env.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm"}
    child = subprocess.Popen(command, cwd=cwd, stdin=follower, stdout=follower, stderr=follower, env=variables)
    os.close(follower)
    parts = []
    # Reading fails once no process has the terminal open.
    while part := _read(leader):
        parts.append(part)
    os.close(leader)
    return b"".join(parts).decode(), child.wait(timeout=timeout_s)


def _read(leader):
    try:
        return os.read(leader, 1 << 16)
    except OSError:
        return b""


def plain(text):
    """Return what a terminal shows, without control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
