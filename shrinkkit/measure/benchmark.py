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

from shrinkkit import quiet
from shrinkkit.core import machines
from shrinkkit.core.evidence import conclude
from shrinkkit.core.measurement import Accuracy, Comparison, Conditions, Disturbance, differences
from shrinkkit.core.target import Target
from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Several, Shown
from shrinkkit.errors import InvalidInput, ShrinkkitError, UnfairComparison, brief
from shrinkkit.measure import scoring, timing
from shrinkkit.measure.timing import DEFAULT, Call, Make, Protocol, TimingCallback, never_stop
from shrinkkit.runtimes import files, registry
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks.modules import Example, raw_bytes
from shrinkkit.tasks.task import Task

MOST_OF_A_CORE = 0.5
"""Cores that others may use before a run that needs them all counts as disturbed."""
WORTH_NAMING = 0.15
STEAL, SWITCHES_PER_S = 0.02, 200.0


@dataclass(frozen=True)
class TimedModel:
    """A model to time."""

    name: str
    make: Make
    """Returns a fresh copy as a call without arguments that runs it once."""
    conditions: Conditions


def time_pair(
    reference: TimedModel,
    candidate: TimedModel,
    *,
    across_runtimes: bool = False,
    protocol: Protocol = DEFAULT,
    callback: TimingCallback = never_stop,
) -> Comparison:
    """Return the paired timing of two models; for two modules in memory see `compare`.

    A second copy of the reference is the A/A control. With `across_runtimes`, runtimes themselves are compared, and may
    therefore differ. The callback stops the timing, which then gets no verdict. Raises UnfairComparison if the
    conditions differ, and InvalidInput, before anything is timed, if a model fails, returns values that are not finite,
    or does not reproduce its outputs.
    """
    here, models = reference.conditions, (reference, candidate)
    exempt = {"runtime", "form"} if across_runtimes else set()
    equal = ({k: v for k, v in vars(model.conditions).items() if k not in exempt} for model in models)
    if unequal := differences(*equal):
        remedy = "Load both on the same target, with the same threads and inputs."
        raise UnfairComparison(f"Models may be timed only under equal conditions; these differ in {unequal}. {remedy}")
    timer = timing.timer(here.device, {model.conditions.runtime for model in models})
    makers, names = (reference.make, candidate.make, reference.make), (reference.name, candidate.name)
    start = snapshot()
    timed = timing.measure(makers, names, timer, protocol, callback)
    end = snapshot()
    contention = disturbance(start, end, threads=here.threads, cores=machines.cores())
    samples = timed.samples.rounded()
    conclusion = conclude(samples, withheld=contention.withheld, stopped=timed.stopped, seed=protocol.seed)
    fields: dict[str, Any] = {name: value for name, value in vars(timed).items() if name != "samples"}
    fields |= {f"{arm}_samples_ms": tuple(slots) for arm, slots in vars(samples).items()}
    return Comparison(
        reference=reference.name,
        candidate=candidate.name,
        conditions=here,
        candidate_runtime=candidate.conditions.runtime,
        **vars(conclusion),
        disturbance=contention,
        duration_s=end.wall_s - start.wall_s,
        seed=protocol.seed,
        **fields,
    )


@dataclass(frozen=True, repr=False)
class ModelComparison(Rich):
    """Two models in memory, compared in speed and, with a task, in accuracy."""

    latency: Comparison
    accuracy: Accuracy | None
    """Scores of the candidate, paired with those of the reference; None without a task."""

    def shown(self) -> Shown:
        """Return the comparison of latencies and, with a task, that of scores."""
        return Several(tuple(part.shown() for part in (self.latency, self.accuracy) if part))


def compare(
    reference: nn.Module,
    candidate: nn.Module,
    data: Task | Example,
    *,
    names: tuple[str, str] = ("reference", "candidate"),
    split: str = "validation",
    threads: int = 0,
    width: float = 0.005,
    cap_s: float = 4.0,
    seed: int = 0,
) -> ModelComparison:
    """Compare the latency of two models in memory, and their scores if a task is given; both are left unchanged.

    Reference, candidate and a copy of the reference (the A/A control) take turns in random order. What is deployed is
    a file, and `run` measures files: use this while developing.

    Args:
        reference: Module in eval mode.
        candidate: Module in eval mode, on the same device; its dtype and shapes may differ.
        data: A task, whose `example` is timed and whose split is scored, or the positional inputs of one call, batch
            first, on the modules' device.
        names: Of reference and candidate, for tables and errors.
        split: Of the task: `train`, `calibration`, `validation` or `test`.
        threads: Intra-op threads, 0 for every core that this process may use; restored afterwards.
        width: Half-width of the 95 % interval of the speed-up, as a fraction, at which timing stops, above 0.
        cap_s: Seconds after which timing stops in any case, once there are 20 blocks; 3 times that for slow models.
        seed: Of the order of calls and of the bootstrap.

    Returns:
        Latency with its verdict, intervals and raw samples in ms, and the accuracy, which is None without a task.

    Raises:
        InvalidInput: A module is in training mode, rejects the inputs, gives outputs that are not finite or not
            reproducible, or writes to its inputs; or an argument is out of its range.
        InvalidTask: An output or a score is not finite.
        UnfairComparison: Modules and inputs are not on one device.
    """
    task = data if isinstance(data, Task) else None
    example = data.example if isinstance(data, Task) else data
    threads_before = torch.get_num_threads()
    threads = registry.use_threads(threads)
    try:
        for name, model in zip(names, (reference, candidate), strict=True):
            _check_module(model, example, name)
        target = Target(example[0].device.type, "torch")
        setting = conditions(target, example, threads=threads, form="eager")
        pair = zip(names, (reference, candidate), strict=True)
        first, second = (TimedModel(name, copies(model, example), setting) for name, model in pair)
        latency = time_pair(first, second, protocol=Protocol(width=width, cap_s=cap_s, seed=seed))
    finally:
        torch.set_num_threads(threads_before)
    return ModelComparison(latency, scoring.score(candidate, task, split=split, baseline=reference) if task else None)


def _check_module(model: nn.Module, example: Example, name: str) -> None:
    """Check that `model` can be timed on `example`; raises InvalidInput or UnfairComparison otherwise."""
    if training := [part or name for part, module in model.named_modules() if module.training]:
        raise InvalidInput(f"{name} must be in eval mode, but `{training[0]}` is in training mode. Call `.eval()`.")
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers(), *example)}
    if len(devices) > 1:
        found = ", ".join(sorted(devices))
        raise UnfairComparison(f"{name} and `example` must be on one device, found {found}. Move both by `.to(...)`.")
    before = inputs_sha256(example)
    try:
        with torch.inference_mode(), quantize.using_engine(quantize.engine_of(model)):
            model(*example)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        shapes = [tuple(x.shape) for x in example]
        text = f"{name} must accept `example`, of shapes {shapes}, but stops with: {brief(error)}."
        raise InvalidInput(f"{text} Pass the inputs of one call, batch first.") from error
    if inputs_sha256(example) != before:
        raise InvalidInput(f"{name} must leave its inputs unchanged, but wrote to `example`. Use no in-place step.")


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
        # Copying packs int8 weights again, for the engine in force.
        with quantize.using_engine(engine), quiet.libraries():
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
