"""No library that a run loads opens a connection beyond this machine: a preloaded library logs and refuses them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import usertasks

COMPILER = os.environ.get("CC", "cc")
STUDY = """task: small.py
recipes: [static-int8]
targets: [cpu/torch, cpu/onnxruntime, cpu/openvino]
mode: all
effort: quick
threads: 1
batch_sizes: []
thread_counts: []
"""
OPENS = """import socket
with socket.socket() as opened:
    opened.settimeout(0.1)
    opened.connect_ex(("192.0.2.1", 9))
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The environment of a process whose connections are watched, and the log of those that leave the machine."""
    folder = tmp_path_factory.mktemp("offline")
    library, log = folder / "offline.so", folder / "log"
    source = Path(__file__).with_name("offline.c")
    try:
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    except FileNotFoundError:
        pytest.skip(f"needs a C compiler, and there is no {COMPILER}")
    return os.environ | {"LD_PRELOAD": str(library), "OFFLINE_LOG": str(log)}, log


def outside(offline, folder, study, *, head=""):
    """Run a study of a small task and return the lines of the log, each with the process that it is of."""
    usertasks.write(folder, head=head)
    (folder / "s.yaml").write_text(study)
    env, log = offline
    log.write_text("")
    command = [sys.executable, "-m", "shrinkkit.cli", "run", "s.yaml", "--quiet"]
    ended = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert (folder / "reports" / "s" / "report.html").is_file(), ended.stderr
    return log.read_text().splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library as Linux does")
def test_no_library_of_a_run_connects_beyond_this_machine(offline, tmp_path):
    assert outside(offline, tmp_path, STUDY) == []


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library as Linux does")
def test_a_connection_of_a_task_is_seen_in_every_process_that_loads_it(offline, tmp_path):
    study = STUDY.replace(", cpu/onnxruntime, cpu/openvino", "").replace("mode: all", "mode: robust")
    lines = outside(offline, tmp_path, study, head=OPENS)
    assert {line.split(" ", 1)[1] for line in lines} == {"connects to 192.0.2.1"}
    # The check, and the notebooks of the baseline, the precision, the benchmark and the robustness.
    assert len(lines) >= 5
