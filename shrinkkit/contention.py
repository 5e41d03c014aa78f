"""Signs that something else used the machine while it measured: other processes, a hypervisor, forced switches."""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

MOST_OF_A_CORE = 0.5
"""Cores that others may use before a run that needs them all counts as disturbed."""
WORTH_NAMING = 0.15
STEAL = 0.02
SWITCHES_PER_S = 200.0


@dataclass(frozen=True)
class Snapshot:
    """Counters of the machine and of this process at one moment; machine counters are None where they are hidden."""

    wall_s: float
    own_s: float
    busy_s: float | None
    steal_s: float | None
    forced_switches: int


def snapshot() -> Snapshot:
    """Return the counters as they are now."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    busy, steal = _machine()
    return Snapshot(time.perf_counter(), own.ru_utime + own.ru_stime, busy, steal, own.ru_nivcsw)


def signs(before: Snapshot, after: Snapshot, *, threads: int, cores: int) -> tuple[tuple[str, ...], bool]:
    """Return what disturbed the time between two snapshots, in sentences, and whether verdicts must be withheld.

    Args:
        before: At the start.
        after: At the end.
        threads: Threads that the measured models use.
        cores: Cores of the machine.
    """
    wall = max(after.wall_s - before.wall_s, 1e-9)
    found: list[str] = []
    withheld = False
    if after.busy_s is not None and before.busy_s is not None:
        others = (after.busy_s - before.busy_s - (after.own_s - before.own_s)) / wall
        if others > WORTH_NAMING:
            found.append(f"other processes used {others:.1f} of {cores} cores")
        withheld = others > MOST_OF_A_CORE and others + threads > cores + WORTH_NAMING
    if after.steal_s is not None and before.steal_s is not None:
        share = (after.steal_s - before.steal_s) / (wall * cores)
        if share > STEAL:
            found.append(f"the hypervisor took {share:.0%} of the processor time")
    rate = (after.forced_switches - before.forced_switches) / wall
    if rate > SWITCHES_PER_S:
        found.append(f"threads were forced off their core {rate:.0f} times a second")
    return tuple(found), withheld


def _machine() -> tuple[float | None, float | None]:
    """Return the seconds that all cores were busy, and that a hypervisor took, since the start of the machine."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return None, None
    user, nice, system, _, _, irq, softirq, steal = (int(x) for x in line.split()[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick
