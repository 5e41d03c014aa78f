"""Paired timing of two models under equal conditions, signs of contention, and a verdict where both allow one."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from shrinkkit.core import machines
from shrinkkit.core.evidence import conclude
from shrinkkit.core.measurement import Comparison, Conditions, Disturbance, differences
from shrinkkit.core.target import Target
from shrinkkit.display import formats
from shrinkkit.errors import ShrinkkitError, UnfairComparison
from shrinkkit.measure import timing
from shrinkkit.measure.timing import DEFAULT, Call, Make, Protocol, TimingCallback, never_stop
from shrinkkit.runtimes import files
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks.modules import Example, raw_bytes

MOST_OF_A_CORE = 0.5
"""Cores that others may use before a run that needs them all counts as disturbed."""
WORTH_NAMING = 0.15
STEAL = 0.02
SWITCHES_PER_S = 200.0


@dataclass(frozen=True)
class TimedModel:
    """A model to time."""

    name: str
    make: Make
    """Returns a fresh copy as a call without arguments that runs it once."""
    conditions: Conditions


def compare(
    reference: TimedModel,
    candidate: TimedModel,
    *,
    across_runtimes: bool = False,
    protocol: Protocol = DEFAULT,
    callback: TimingCallback = never_stop,
) -> Comparison:
    """Return the paired timing of two models; for two modules in memory see `in_memory.compare`.

    A second copy of the reference is the A/A control. With `across_runtimes`, runtimes themselves are compared, and may
    therefore differ. The callback stops the timing, which then gets no verdict.

    Raises:
        InvalidInput: A model fails, returns values that are not finite, or does not reproduce its outputs. Nothing was
            timed then.
        UnfairComparison: The conditions differ.
    """
    here, there = dict(vars(reference.conditions)), vars(candidate.conditions)
    runtimes = {here["runtime"], there["runtime"]}
    if across_runtimes:
        here |= {"runtime": there["runtime"], "form": there["form"]}
    if unequal := differences(here, there):
        raise UnfairComparison(
            f"Models may be timed only under equal conditions; these differ in {unequal}. "
            "Load both on the same target, with the same threads and inputs."
        )
    timer = timing.timer(here["device"], runtimes)
    makers, names = (reference.make, candidate.make, reference.make), (reference.name, candidate.name)
    start = snapshot()
    timed = timing.measure(makers, names, timer, protocol, callback)
    end = snapshot()
    contention = disturbance(start, end, threads=here["threads"], cores=machines.cores())
    samples = timed.samples.rounded()
    conclusion = conclude(samples, withheld=contention.withheld, stopped=timed.stopped, seed=protocol.seed)
    return Comparison(
        reference=reference.name,
        candidate=candidate.name,
        conditions=reference.conditions,
        candidate_runtime=candidate.conditions.runtime,
        **vars(conclusion),
        reference_samples_ms=tuple(samples.reference),
        candidate_samples_ms=tuple(samples.candidate),
        control_samples_ms=tuple(samples.control),
        warmup_calls=timed.warmup_calls,
        steady=timed.steady,
        disturbance=contention,
        duration_s=end.wall_s - start.wall_s,
        seed=protocol.seed,
        stopped=timed.stopped,
    )


def conditions(target: Target, example: Example, *, threads: int, form: str) -> Conditions:
    """Return the conditions under which a model in one form runs on `example`."""
    hardware, inputs = machines.hardware(target), inputs_sha256(example)
    return Conditions(target.device, hardware, target.runtime, form, threads, example[0].shape[0], inputs)


def inputs_sha256(example: Example) -> str:
    """Return a hash of the inputs: dtype, shape, memory format and values."""
    digest = sha256()
    for x in example:
        digest.update(str(x.stride()).encode() + raw_bytes(x))
    return digest.hexdigest()


def copies(model: nn.Module, example: Example, *, form: str = "eager") -> Make:
    """Return a factory of copies of `model` on the device of `example`, ready to be called on it; `model` is unchanged.

    With the form `compiled`, each is compiled by `torch.compile`.
    """
    engine = quantize.engine_of(model)

    def make() -> Call:
        with quantize.using_engine(engine):  # copying packs int8 weights again, for the engine in force
            duplicate: Any = copy.deepcopy(model).to(example[0].device)
        duplicate = torch.compile(duplicate) if form == "compiled" else duplicate

        @torch.inference_mode()
        def call() -> Any:
            return duplicate(*example)

        return call

    return make


def saturated(path: Path, target: Target, inputs: Example, threads: int) -> tuple[str, ...]:
    """Return the layers of a file whose int8 accumulators saturate here; none if the runtime does not tell."""
    try:
        check = files.check_integers(path, runtime=target.runtime, inputs=inputs, threads=threads)
    except (ShrinkkitError, RuntimeError, ValueError):
        return ()
    return check.saturated if check else ()


def saturation(layers: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence that names the layers that saturate; none if there are none."""
    return (f"Integer kernels saturate on this processor in {', '.join(layers)}.",) if layers else ()


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
    load = psutil.getloadavg()[0] if hasattr(psutil, "getloadavg") else None
    try:
        import resource

        # psutil counts those of the main thread only.
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    except ImportError:  # Windows
        switches = 0
    return Snapshot(time.perf_counter(), own.user + own.system, len(cores), *_busy(cores), switches, load)


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


def disturbance(before: Snapshot, after: Snapshot, *, threads: int, cores: int) -> Disturbance:
    """Return what disturbed the time between two snapshots, and whether verdicts must be withheld.

    They must if threads had to wait for a core: threads that spin for each other then lose whole time slices. The
    models used `threads`; this process may use `cores`' worth of time, at most `before.cores`.
    """
    wall = max(after.wall_s - before.wall_s, 1e-9)
    own = (after.own_s - before.own_s) / wall
    others = stolen = None
    signs: list[str] = []
    withheld = threads > cores
    if withheld:
        signs.append(f"{threads} threads shared {formats.counted(cores, 'core')}")
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
