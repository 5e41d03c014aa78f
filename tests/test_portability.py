"""The driver half of the package where POSIX is missing, as it is on Windows."""

import subprocess
import sys
from pathlib import Path

import pytest

import shrinkkit

PACKAGE = Path(shrinkkit.__file__).parent
DRIVER = ("cli", "core", "display", "results", "report", "pipeline", "errors", "quiet", "progress")
POSIX = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "posix", "syslog")
ATTRIBUTES = {
    "os": ("fork", "killpg", "setsid", "getuid", "getpgid", "getloadavg", "sched_getaffinity", "O_NOFOLLOW", "uname"),
    "signal": ("SIGKILL", "SIGHUP", "SIGALRM", "alarm", "SIGUSR1"),
}

BARE = """
import importlib, os, signal, sys
# Libraries are loaded first: on Windows they have other modules of their own.
import filelock, psutil, typer, rich.live, pydantic, ruamel.yaml, tempfile, subprocess, matplotlib.pyplot
import nbconvert, papermill
for name in {posix!r}:
    sys.modules[name] = None
for module, names in {attributes!r}.items():
    for name in names:
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
# As on Windows.
subprocess.Popen.kill = subprocess.Popen.terminate
"""


def bare(code, cwd=None):
    """Run Python code where modules and attributes that exist on POSIX only are absent."""
    start = BARE.format(posix=POSIX, attributes=ATTRIBUTES)
    return subprocess.run([sys.executable, "-c", start + code], cwd=cwd, capture_output=True, text=True, check=False)


def test_every_module_of_the_driver_can_be_imported():
    paths = [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).with_suffix("").parts[0] in DRIVER]
    names = [".".join(("shrinkkit", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in paths]
    assert len(names) > 40
    ended = bare(f"for name in {names!r}: importlib.import_module(name)")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_children_are_stopped_run_folders_held_and_runs_prepared(tmp_path):
    code = """
from pathlib import Path
from shrinkkit import cli
from shrinkkit.core import processes, store
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.pipeline.run_status import log
call = [sys.executable, "-c", "import sys, time; print('here', file=sys.stderr, flush=True); time.sleep(60)"]
lines = []
ended = processes.run(call, limit_s=5, on_line=lambda line: bool(lines.append(line)), patience_s=1)
assert (ended.status, lines) == (None, ["here"]), ended
with store.hold(Path()):
    log(RunFolder("."), "a line")
with processes.short_folder() as folder:
    assert folder.is_dir()
sys.exit(cli.main(["run", "digits-cnn", "--dry-run"]))
"""
    ended = bare(code, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "a line" in (tmp_path / "run.log").read_text()
    assert "5-report" in ended.stdout
