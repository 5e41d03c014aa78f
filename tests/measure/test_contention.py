import dataclasses
import os
import sys
import time

import psutil
import pytest

from shrinkkit.measure import benchmark
from shrinkkit.measure.benchmark import Snapshot

START = Snapshot(wall_s=0.0, own_s=0.0, cores=2, busy_s=0.0, steal_s=0.0, forced_switches=0, load_average=0.0)
QUIET = dataclasses.replace(START, wall_s=10.0, own_s=20.0, busy_s=20.0)


def signs(*, threads=2, cores=2, start=START, **changes):
    found = benchmark.disturbance(start, dataclasses.replace(QUIET, **changes), threads=threads, cores=cores)
    return found.signs, found.withheld


def test_a_quiet_machine_shows_no_sign():
    assert signs() == ((), False)


def test_other_processes_are_named_and_verdicts_withheld_when_threads_wait_for_cores():
    assert signs(own_s=11.0) == (("other processes used 0.9 of 2 cores",), True)


def test_other_processes_on_cores_that_are_free_are_named_only():
    assert signs(own_s=10.0, busy_s=19.0, threads=1) == (("other processes used 0.9 of 2 cores",), False)


def test_a_little_use_by_others_is_neither_named_nor_held_against_a_run():
    assert signs(own_s=19.0) == ((), False)


def test_more_threads_than_cores_are_named_and_verdicts_withheld():
    assert signs(threads=4) == (("4 threads shared 2 cores",), True)
    assert signs(threads=2, cores=1) == (("2 threads shared 1 core",), True)


def test_busy_cores_of_a_large_machine_disturb_no_process_with_a_small_share():
    large = dataclasses.replace(START, cores=64)
    found, withheld = signs(start=large, threads=2, cores=2, own_s=20.0, busy_s=320.0)
    assert found == ("other processes used 30.0 of 64 cores",)
    assert not withheld


def test_stolen_time_is_named():
    assert signs(steal_s=0.8) == (("the hypervisor took 4% of the processor time",), False)


def test_forced_switches_are_named():
    assert signs(forced_switches=5000) == (("threads were forced off their core 500 times a second",), False)


def test_where_the_machine_hides_its_counters_the_load_average_is_named():
    hidden = dataclasses.replace(START, busy_s=None, steal_s=None, load_average=3.5)
    assert signs(start=hidden, busy_s=None, steal_s=None) == (("the load average was 3.5 at the start",), False)


def test_what_was_counted_is_kept_beside_its_names():
    found = benchmark.disturbance(
        START,
        dataclasses.replace(QUIET, own_s=15.0, steal_s=0.8, forced_switches=5000, load_average=2.5),
        threads=2,
        cores=2,
    )
    assert (found.own_cores, found.other_cores, found.stolen) == pytest.approx((1.5, 0.5, 0.04))
    assert (found.forced_switches_per_s, found.load_average) == (500, 2.5)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_machine_without_counters_is_read_without_error(monkeypatch):
    def hidden(**_):
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", hidden)
    snapshot = benchmark.snapshot()
    assert (snapshot.busy_s, snapshot.steal_s) == (None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_only_the_given_cores_are_counted(monkeypatch, tmp_path):
    (tmp_path / "stat").write_text(
        "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 0 0 500 7 0 0 50 0 0\ncpu1 900 0 0 0 0 0 0 0 0 0\n"
    )
    tick = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert benchmark._busy({0}) == (100 / tick, 50 / tick)
    assert benchmark._busy({0, 1}) == (1000 / tick, 50 / tick)


def test_work_of_this_process_shows_as_its_own():
    before = benchmark.snapshot()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    after = benchmark.snapshot()
    # The system counts in steps of 0.01 s.
    assert after.own_s - before.own_s >= 0.03
    assert after.wall_s > before.wall_s
    assert after.cores >= 1
