"""Signs of contention during a timing: other processes, a hypervisor, involuntary context switches."""

import time
from dataclasses import dataclass

import psutil

from shrinkkit.core.measurement import Disturbance

MOST_OF_A_CORE = 0.5
"""Cores that others may use before a run that needs them all counts as disturbed."""
WORTH_NAMING = 0.15
STEAL = 0.02
SWITCHES_PER_S = 200.0


@dataclass(frozen=True)
class Snapshot:
    """Counters of this process and of its cores at one moment; None where the system hides them."""

    wall_s: float
    own_s: float
    """Processor time of this process."""
    cores: int
    """Cores that its threads may run on."""
    busy_s: float | None
    """Busy time of these cores, by any process."""
    steal_s: float | None
    """Time that a hypervisor gave to other machines."""
    forced_switches: int
    load_average: float | None


def snapshot() -> Snapshot:
    """Return the counters now."""
    process = psutil.Process()
    own = process.cpu_times()
    cores = set(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else set(range(psutil.cpu_count() or 1))
    busy, steal = _busy(cores)
    load = psutil.getloadavg()[0] if hasattr(psutil, "getloadavg") else None
    return Snapshot(time.perf_counter(), own.user + own.system, len(cores), busy, steal, _forced_switches(), load)


def disturbance(before: Snapshot, after: Snapshot, *, threads: int, cores: int) -> Disturbance:
    """Return what disturbed the time between two snapshots, and whether verdicts must be withheld.

    They must if threads had to wait for a core: threads that spin for each other then lose whole time slices.

    Args:
        before: At the start.
        after: At the end.
        threads: Of the measured models.
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


def _busy(cores: set[int]) -> tuple[float | None, float | None]:
    """Return the busy seconds of `cores` and those that a hypervisor took, since the start of the machine."""
    try:
        rows = psutil.cpu_times(percpu=True)
    except OSError:
        rows = []
    # Only the cores that this process may use: on a large machine, or under taskset, the others do not disturb it.
    times = [row for number, row in enumerate(rows) if number in cores]
    if not times or not hasattr(times[0], "steal"):
        return None, None
    busy = sum(row.user + row.nice + row.system + row.irq + row.softirq for row in times)
    return busy, sum(row.steal for row in times)


def _forced_switches() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # psutil counts those of the main thread only.
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
