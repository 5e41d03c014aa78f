"""Processes that are forked from one that has imported what they need: they behave as those that start cold."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import psutil
import pytest

from shrinkkit.core import processes, warm

pytestmark = pytest.mark.skipif(not warm.AVAILABLE, reason="processes start warm on Linux only")


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A folder of modules that processes run."""
    return tmp_path_factory.mktemp("code")


@pytest.fixture(scope="module")
def address(code):
    with warm.server(
        ["-colorsys", "csv", "no_such_module", "numpy"], {"PYTHONPATH": str(code), "SHARED": "1"}
    ) as ready:
        yield ready(lambda _: None)


@pytest.fixture
def run(code, address):
    def start(source, *arguments, limit_s=30.0, **options):
        name = f"probe_{len(list(code.glob('*.py')))}"
        (code / f"{name}.py").write_text(textwrap.dedent(source))
        call = processes.command(name, *arguments)
        return processes.run(call, limit_s=limit_s, start=partial(warm.start, address), **options)

    return start


def gone(pid, within_s=15.0):
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_it_runs_the_module_with_its_arguments_folder_and_environment(run, tmp_path):
    source = """
        import os, sys
        print(sys.argv[1:], os.getcwd(), os.environ["MINE"], "SHARED" in os.environ, __name__)
        print("err", file=sys.stderr)
        sys.exit(3)
    """
    ended = run(source, "a", "b c", cwd=tmp_path, variables={"MINE": "yes"})
    assert ended.output == f"['a', 'b c'] {tmp_path} yes False __main__\n"
    assert (ended.status, ended.errors) == (3, "err")


def test_imports_are_shared_and_nothing_else_runs_in_it(run):
    source = """
        import sys, threading, signal, os
        print("csv" in sys.modules, "fractions" in sys.modules, threading.active_count(), os.getpid() == os.getsid(0))
        print(signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL, sorted(map(int, os.listdir("/proc/self/fd")))[:3])
    """
    assert run(source).output == "True False 1 True\nTrue [0, 1, 2]\n"


def test_it_ends_in_order_although_nothing_is_freed(run):
    source = """
        import atexit, threading, time
        atexit.register(print, "at exit")
        threading.Thread(target=lambda: (time.sleep(0.2), print("in a thread"))).start()
    """
    ended = run(source)
    assert (ended.status, ended.output) == (0, "in a thread\nat exit\n")


def test_a_module_can_be_made_missing(run):
    assert run("import colorsys").errors.splitlines()[-1].startswith("ModuleNotFoundError: import of colorsys halted")


def test_a_failure_is_told_as_usual(run):
    ended = run("raise KeyError('missing')")
    assert ended.status == 1
    assert ended.errors.splitlines()[-1] == "KeyError: 'missing'"
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").status == -9


def test_what_is_drawn_without_a_seed_differs(run):
    drawn = {run("import random, numpy; print(random.random(), numpy.random.rand())").output for _ in range(3)}
    assert len(drawn) == 3
    assert len({text.split()[1] for text in drawn}) == 3


def test_one_that_hangs_is_stopped_in_time_with_its_children(run):
    source = """
        import subprocess, time
        print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
        time.sleep(60)
    """
    ended = run(source, limit_s=1.0)
    assert ended.status is None
    assert gone(int(ended.output))


def test_one_that_is_asked_to_end_may_end_in_order(run):
    source = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("in order"))
        time.sleep(60)
    """
    ended = run(source, limit_s=1.0, patience_s=10.0)
    assert (ended.status, ended.errors) == (None, "in order")


def test_several_run_at_once(code, address):
    (code / "waiting.py").write_text("import time; time.sleep(60)")
    start = partial(warm.start, address, processes.command("waiting"), env=dict(os.environ))
    children = [start(), start()]
    assert [child.poll() for child in children] == [None, None]
    end = time.monotonic() + 10
    while {psutil.Process(child.pid).name() for child in children} != {"waiting"}:
        assert time.monotonic() < end
    children[0].terminate()
    assert children[0].wait(timeout=10) == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        children[1].wait(timeout=0.1)
    children[1].kill()
    assert children[1].wait(timeout=10) == -signal.SIGKILL


@pytest.mark.parametrize("whole_group", [False, True])
def test_it_ends_with_the_process_that_started_it(code, address, whole_group):
    (code / "lasting.py").write_text("import time; time.sleep(60)")
    client = f"""
import os, sys, time
from shrinkkit.core import processes, warm
child = warm.start({address!r}, processes.command("lasting"), env=dict(os.environ))
print(child.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", client], stdout=subprocess.PIPE, start_new_session=True) as started:
        pid = int(started.stdout.readline())
        assert psutil.pid_exists(pid)
        os.killpg(started.pid, signal.SIGKILL) if whole_group else started.kill()
    assert gone(pid)


def test_it_ends_with_the_server_after_which_processes_start_cold(code, tmp_path):
    (code / "lasting.py").write_text("import time; time.sleep(60)")
    (code / "imported.py").write_text("import sys; print('csv' in sys.modules)")
    variables = {"PYTHONPATH": str(code)}
    with warm.server(["csv"], variables) as ready:
        address = ready(lambda _: None)
        child = warm.start(address, processes.command("lasting"), env=dict(os.environ))
        ended = processes.run(processes.command("imported"), limit_s=30, start=partial(warm.start, address))
        assert ended.output == "True\n"
    assert gone(child.pid)
    assert child.wait(timeout=10) == -signal.SIGKILL
    call = processes.command("imported")
    assert processes.run(call, limit_s=30, start=partial(warm.start, address), variables=variables).output == "False\n"


def test_a_server_that_cannot_start_is_not_waited_for():
    ticks = []
    with warm.server(["antigravity_that_exits"], {"PYTHONHASHSEED": "no number"}) as ready:
        address = ready(ticks.append)
        ended = processes.run(processes.command("this"), limit_s=30, start=partial(warm.start, address))
    assert "Zen of Python" in ended.output
    assert len(ticks) < 100


def test_it_tells_how_long_imports_take(code):
    (code / "slow.py").write_text("import time; time.sleep(1)")
    ticks = []
    with warm.server(["slow"], {"PYTHONPATH": str(code)}) as ready:
        ready(ticks.append)
        assert ticks == sorted(ticks)
        assert ticks[-1] >= 1
