"""Signs that something else used the cores while they measured: other processes, a hypervisor, forced switches."""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from shrinkkit.core.measurement import Disturbance

MOST_OF_A_CORE = 0.5
"""Cores that others may use before a run that needs them all counts as disturbed."""
WORTH_NAMING = 0.15
STEAL = 0.02
SWITCHES_PER_S = 200.0


@dataclass(frozen=True)
class Snapshot:
    """Counters of this process and of its cores at one moment; those of the cores are None where they are hidden."""

    wall_s: float
    own_s: float
    """Processor time of this process."""
    cores: int
    """Cores that its threads may be put on."""
    busy_s: float | None
    """Time that these were busy, whoever used them."""
    steal_s: float | None
    """Time that a hypervisor gave to other machines."""
    forced_switches: int
    load_average: float | None


def snapshot() -> Snapshot:
    """Return the counters as they are now."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    cores = _cores()
    busy, steal = _busy(cores)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Snapshot(time.perf_counter(), own.ru_utime + own.ru_stime, len(cores), busy, steal, own.ru_nivcsw, load)


def disturbance(before: Snapshot, after: Snapshot, *, threads: int, cores: int) -> Disturbance:
    """Return what disturbed the time between two snapshots, and whether verdicts must be withheld for it.

    They must be where threads had to wait for a core: those that spin for each other then burn whole time slices.

    Args:
        before: At the start.
        after: At the end.
        threads: Threads that the measured models use.
        cores: Cores' worth of time that this process may use, at most `before.cores`.
    """
    wall = max(after.wall_s - before.wall_s, 1e-9)
    own = (after.own_s - before.own_s) / wall
    others = stolen = None
    signs: list[str] = []
    withheld = threads > cores
    if withheld:
        signs.append(f"{threads} threads shared {cores} {'core' if cores == 1 else 'cores'}")
    if before.busy_s is not None and after.busy_s is not None:
        others = max(0.0, (after.busy_s - before.busy_s) / wall - own)
        if others > WORTH_NAMING:
            signs.append(f"other processes used {others:.1f} of {before.cores} cores")
        withheld |= others > MOST_OF_A_CORE and others + threads > before.cores + WORTH_NAMING
    elif before.load_average is not None and before.load_average - threads > MOST_OF_A_CORE:
        signs.append(f"the load average was {before.load_average:.1f} at the start")
    if before.steal_s is not None and after.steal_s is not None:
        stolen = (after.steal_s - before.steal_s) / (wall * before.cores)
        if stolen > STEAL:
            signs.append(f"the hypervisor took {stolen:.0%} of the processor time")
    rate = (after.forced_switches - before.forced_switches) / wall
    if rate > SWITCHES_PER_S:
        signs.append(f"threads were forced off their core {rate:.0f} times a second")
    return Disturbance(own, others, stolen, rate, after.load_average, tuple(signs), withheld)


def _cores() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _busy(cores: frozenset[int]) -> tuple[float | None, float | None]:
    """Return the seconds that `cores` were busy, and that a hypervisor took, since the start of the machine."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None, None
    rows = [line.split() for line in lines if line.startswith("cpu")]
    # Only the cores that this process may use: on a large machine, or under taskset, the others are nobody's trouble.
    mine = [[int(x) for x in row[1:9]] for row in rows if row[0][3:].isdigit() and int(row[0][3:]) in cores]
    if not mine:
        return None, None
    tick = os.sysconf("SC_CLK_TCK")
    busy = sum(sum(row) - row[3] - row[4] - row[7] for row in mine)
    return busy / tick, sum(row[7] for row in mine) / tick
