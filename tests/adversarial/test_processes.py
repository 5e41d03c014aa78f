"""Runs that are killed in every way: nothing of them lives on, writes on, or stays lying about."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from children import running

from shrinkkit.core import processes, store
from shrinkkit.core.processes import command, short_folder, stop
from shrinkkit.core.run_folder import Status
from shrinkkit.core.store import LOCK, PART, TOKEN
from shrinkkit.errors import InvalidInput, LeaseLost

RUN = [sys.executable, "-m", "shrinkkit.cli", "run", "digits-cnn", "--recipe", "static-int8", "--target", "cpu/torch"]


def start(folder, *, hup=signal.SIG_DFL, **variables):
    """Start a run of a bundled task in `folder`."""

    def hear():
        # A suite that a shell runs in the background was told to ignore Ctrl-C, and so would its children be.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, hup)

    return subprocess.Popen(
        RUN, cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | variables, preexec_fn=hear,
    )  # fmt: skip


def kernels(process):
    """Return the processes that execute notebooks below `process`."""
    return running(process.pid, "ipykernel_launcher")


def working(child):
    """Wait until the run's first notebook is executed, and return all its processes."""
    deadline = time.monotonic() + 120
    while not kernels(child):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The kernel starts a thread or two more before it works.
    time.sleep(0.3)
    return psutil.Process(child.pid).children(recursive=True)


def living(processes):
    return [p for p in psutil.wait_procs(processes, timeout=15)[1] if p.status() != psutil.STATUS_ZOMBIE]


def state(folder):
    status = store.read(folder / "reports/digits-cnn/status.json", Status)
    return status.steps[0].state


def test_ctrl_c_ends_a_run_with_a_sentence_and_leaves_no_process(tmp_path):
    child = start(tmp_path)
    below = working(child)
    os.kill(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"run the same command again" in said
    assert living(below) == []
    assert state(tmp_path) == "interrupted"
    names = {path.name for path in (tmp_path / "reports/digits-cnn").iterdir()}
    assert names <= {".lock", "run.log", "status.json", "steps", "study.json"}


@pytest.mark.parametrize("numbers", [[signal.SIGHUP], [signal.SIGTERM, signal.SIGINT]], ids=["HUP", "TERM+INT"])
def test_a_run_that_is_killed_leaves_no_process(tmp_path, numbers):
    child = start(tmp_path)
    below = working(child)
    for number in numbers:
        os.kill(child.pid, number)
        time.sleep(0.15)
    child.communicate(timeout=60)
    assert child.returncode in ([129] if numbers == [signal.SIGHUP] else [130, 143])
    assert living(below) == []
    assert state(tmp_path) in (["interrupted"] if len(numbers) == 1 else ["interrupted", "running"])


def test_a_run_under_nohup_outlives_its_terminal_and_a_killed_step_which_takes_its_kernel_along(tmp_path):
    child = start(tmp_path, hup=signal.SIG_IGN)
    below = working(child)
    os.kill(child.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert child.poll() is None
    (step,) = running(child.pid, "shrinkkit.pipeline.steps")
    kernel = kernels(child)
    step.kill()
    assert living([step, *kernel]) == []
    while state(tmp_path) == "running":
        assert child.poll() is None
        time.sleep(0.1)
    assert state(tmp_path) == "failed"
    for _ in range(2):
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.15)
    child.communicate(timeout=60)
    assert child.returncode == 130
    assert living(below) == []


def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    child = start(tmp_path)
    below = working(child)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert living(below) == []
    run = tmp_path / "reports/digits-cnn"
    assert list(run.glob(".attempt-*"))
    (run / "variants/baseline/.making-x").mkdir(parents=True)
    (run / f".status.json.x{PART}").write_text("{")
    long = tmp_path / ("t" * 120)
    long.mkdir()
    again = start(tmp_path, TMPDIR=str(long))
    below = working(again)
    assert len(list(run.glob(".attempt-*"))) == 1
    assert not list(run.rglob(".making-x"))
    assert not list(run.rglob(f"*{PART}"))
    again.terminate()
    again.communicate(timeout=60)
    assert again.returncode == 143
    assert living(below) == []
    assert state(tmp_path) == "interrupted"


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "while True: pass", "import signal, time\n"
    "for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)"])  # fmt: skip
def test_a_child_dies_with_its_parent_whatever_it_does(tmp_path, code):
    (tmp_path / "busy.py").write_text(f"print('here', flush=True)\n{code}")
    start = (
        "import subprocess, sys; from shrinkkit.core import processes as children; env = children.environment();"
        f"env['PYTHONPATH'] = {str(tmp_path)!r} + ':' + env.get('PYTHONPATH', '');"
        "p = subprocess.Popen(children.command('busy'), env=env, stdout=subprocess.PIPE, start_new_session=True);"
        "p.stdout.readline(); print(p.pid, flush=True); import time; time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    assert living([child]) == []


def test_a_child_whose_parent_is_gone_before_it_starts_ends_at_once():
    call = command("shrinkkit.pipeline.steps", "/nowhere")
    call[4] = "1"
    assert subprocess.run(call, check=False, capture_output=True).returncode != 0


def test_a_child_that_hears_no_signal_is_killed_when_patience_ends(tmp_path):
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    stop(child, patience_s=0.2)
    assert child.returncode == -signal.SIGKILL
    child.communicate()


WRITE = "import sys; from shrinkkit.core import store; sys.stdin.readline(); store.write_text(sys.argv[1], 'old')"
LOG = (
    "import sys, pathlib; from shrinkkit.core.run_folder import RunFolder; from shrinkkit.pipeline import run_status;"
    "sys.stdin.readline(); run_status.log(RunFolder(pathlib.Path(sys.argv[1]).parent), 'old')"
)
MOVE = (
    "import sys, pathlib; from shrinkkit.transforms import variants;"
    "sys.stdin.readline(); path = pathlib.Path(sys.argv[1]);"
    "fresh = path.parent.parent / 'fresh'; fresh.mkdir(); (fresh / path.name).write_text('old');"
    "variants._move(fresh, path.parent)"
)


@pytest.mark.parametrize("code", [WRITE, LOG, MOVE], ids=["record", "log", "variant"])
@pytest.mark.parametrize("after", ["ended", "taken", "removed", "made again"])
def test_a_survivor_of_an_old_run_cannot_write(tmp_path, code, after):
    run = tmp_path / "run"
    run.mkdir()
    path = run / ("run.log" if code == LOG else "variant.json")
    with store.hold(run):
        own = os.environ | store.lease_variable()
        survivor = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], env=own, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
    if after in ("removed", "made again"):
        for left in run.iterdir():
            left.unlink()
        run.rmdir()
    if after != "removed":
        run.mkdir(exist_ok=True)
    if after in ("taken", "made again"):
        with store.hold(run):
            path.write_text("new")
            _, said = survivor.communicate(b"\n")
            assert path.read_text() == "new"
    else:
        _, said = survivor.communicate(b"\n")
        assert not path.exists()
    assert b"LeaseLost" in said
    assert survivor.returncode == 1


def test_a_process_of_the_run_that_holds_the_folder_can_write(tmp_path):
    with store.hold(tmp_path):
        own = os.environ | store.lease_variable()
        call = [sys.executable, "-c", WRITE, str(tmp_path / "variant.json")]
        subprocess.run(call, env=own, input=b"\n", check=True)
    assert (tmp_path / "variant.json").read_text() == "old"


def test_the_runner_itself_stops_writing_when_its_folder_was_removed(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with store.hold(run):
        (run / TOKEN).unlink()
        (run / LOCK).unlink()
        run.rmdir()
        with pytest.raises(LeaseLost, match=r"was removed"):
            store.write_text(run / "status.json", "{}")
    assert not run.exists()
    store.write_text(run / "status.json", "{}")


def test_a_folder_that_is_held_is_refused_and_its_holder_goes_on(tmp_path):
    with store.hold(tmp_path):
        with pytest.raises(InvalidInput, match=r"in use by another run"), store.hold(tmp_path):
            pass
        store.write_text(tmp_path / "status.json", "{}")
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, "status.json"}


def test_whether_a_folder_is_held_is_asked_without_writing_to_it(tmp_path):
    assert not store.is_held(tmp_path)
    with store.hold(tmp_path):
        (tmp_path / LOCK).write_text("as it is")
        assert store.is_held(tmp_path)
    (tmp_path / TOKEN).write_text("of a run that was killed")
    assert not store.is_held(tmp_path)
    assert (tmp_path / LOCK).read_text() == "as it is"


@pytest.mark.parametrize("length", [10, 60, 120, 200])
def test_a_folder_for_sockets_is_short_whatever_tmpdir_says(tmp_path, length, monkeypatch):
    place = tmp_path / ("t" * length)
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with short_folder() as folder:
        assert len(str(folder)) < 60
        assert folder.is_dir()
    assert not folder.exists()


def test_folders_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SOCKET_FOLDER_LENGTH", 200)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import time, os; from shrinkkit.core import processes as children; children.SOCKET_FOLDER_LENGTH = 200\n"
        "with children.short_folder() as f: print(f, flush=True); time.sleep(60)"
    )
    held = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}
        )
        for _ in range(2)
    ]
    dead, alive = (child.stdout.readline().strip() for child in held)
    held[0].kill()
    held[0].communicate()
    (tmp_path / "sk-other").mkdir()
    (tmp_path / "sk-link").symlink_to(alive)
    for folder in (dead, alive, tmp_path / "sk-other"):
        os.utime(folder, (0, 0))
    with short_folder():
        assert not os.path.exists(dead)
        assert os.path.isdir(alive)
        assert (tmp_path / "sk-other").is_dir()
    held[1].kill()
    held[1].communicate()
