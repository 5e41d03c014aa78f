"""Child processes that hang, crash, print without end or leave children."""

import sys
import time

import psutil
import pytest

from shrinkkit.core import processes


def run(code, limit_s=30.0, **options):
    return processes.run([sys.executable, "-P", "-c", code], limit_s=limit_s, **options)


def test_output_errors_and_status_are_kept_apart():
    ended = run("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (ended.status, ended.output, ended.errors) == (3, "out\n", "err")


def test_a_process_that_hangs_is_stopped_in_time_with_its_children():
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    start = time.monotonic()
    ended = run(code, limit_s=1.0)
    assert ended.status is None
    assert time.monotonic() - start < 20
    child = int(ended.output)
    # Killed at once, and gone as soon as the system has swept it away.
    while time.monotonic() - start < 20 and psutil.pid_exists(child):
        if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    assert time.monotonic() - start < 20


def test_a_process_that_holds_the_interpreter_is_stopped_too():
    assert run("9 ** 9 ** 9", limit_s=0.5).status is None


def test_a_line_can_start_the_time_again():
    code = "import sys, time\nfor _ in range(4): print('on', file=sys.stderr, flush=True); time.sleep(0.4)"
    assert run(code, limit_s=1.2, on_line=lambda line: line == "on").status == 0
    assert run(code, limit_s=1.2).status is None


def test_a_signal_is_a_status_below_zero():
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").status == -9


def test_of_endless_errors_the_last_lines_are_kept():
    ended = run("import sys\nfor i in range(5000): print(i, file=sys.stderr)")
    assert ended.errors.splitlines()[-1] == "4999"
    assert len(ended.errors.splitlines()) <= 200


def test_an_interruption_leaves_no_process():
    seen, before = [], set(psutil.Process().children())

    def stop(_):
        seen.extend(set(psutil.Process().children()) - before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("import time; time.sleep(60)", tick=stop)
    assert seen
    assert not any(process.is_running() for process in seen)
