"""The benchmark of one target: load each variant's file in one process, verify it, evaluate, time and profile it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import Subset

from shrinkkit.core import estimate, evidence, machines, store
from shrinkkit.core.measurement import (
    Accuracy,
    Comparison,
    Conditions,
    IntegerCheck,
    LayerTime,
    Measurement,
    Memory,
    Point,
    TargetRecord,
)
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.run_folder import RECORD, RunFolder
from shrinkkit.core.target import Target
from shrinkkit.display import cells, formats
from shrinkkit.display.tables import Cell, Column, Table
from shrinkkit.errors import InvalidInput, ShrinkkitError, UnfairComparison, Unsupported, brief
from shrinkkit.measure import benchmark, peak_memory, scoring
from shrinkkit.measure.benchmark import TimedModel
from shrinkkit.measure.scoring import Scored
from shrinkkit.measure.timing import DEFAULT, FEWEST_BLOCKS, HOPELESS, Protocol, TimingCallback, half_width, never_stop
from shrinkkit.progress import Progress, no_progress
from shrinkkit.runtimes import files, registry
from shrinkkit.runtimes.base import Loaded
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import variants

TODAY = "your module today"
"""Name of the reference of `compare_runtimes`."""
SWEEP = Protocol(width=0.02, cap_s=0.5, fresh_copies=2)
"""Of other batch sizes and thread counts, where many wide intervals tell more than few narrow ones."""
EFFORTS: Mapping[str, tuple[Protocol, Protocol | None]] = {
    "quick": (Protocol(width=0.02, cap_s=1.5, clear_s=0.5), None),
    "standard": (Protocol(clear_s=1.0), Protocol()),
    "thorough": (Protocol(cap_s=10.0), None),
}
"""Protocols by effort: of each variant, and of a second timing of those that lead. Workloads, other batch sizes and
thread counts are timed of those that lead, with `thorough` of all, with `quick` of none."""
SWEEP_CALLS = 120
"""Approximate calls of the fewest blocks and the warm-up of one comparison."""
SCORING_S = 60.0
"""Time for which a variant that is `hopeless` is evaluated."""
STOPPED = "It was not timed: the benchmark was stopped by hand."


@dataclass(frozen=True)
class Settings:
    """What is benchmarked, and how."""

    target: Target
    task: Task
    threads: int
    """Intra-op threads, >= 1."""
    seed: int = 0
    """Of the order of calls and of the bootstrap."""
    effort: str = "standard"
    """A key of `EFFORTS`."""
    today: str = "eager"
    """How the task's module is called today: `eager`, or `compiled` by `torch.compile`."""
    times: bool = True
    """Whether anything is timed and profiled; files are verified and evaluated in any case."""

    def conditions(self, form: str) -> Conditions:
        """Return the conditions under which a model runs in one form."""
        return benchmark.conditions(self.target, self.task.example, threads=self.threads, form=form)

    def timed(self, name: str, loaded: Loaded) -> TimedModel:
        """Return a loaded file as a model to time on the task's example."""
        example = tuple(x.cpu() for x in self.task.example)
        return TimedModel(name, lambda: loaded.clone().bind(example), self.conditions(loaded.form))


@dataclass(frozen=True)
class LoadedVariant:
    """A variant's file on one target, loaded and verified; or the reason why there is none."""

    variant: str
    error: str
    loaded: Loaded | None = None
    file_sha256: str = ""
    size_bytes: int = 0
    load_ms: float | None = None
    first_call_ms: float | None = None


@dataclass(frozen=True)
class Profile:
    """Memory, layer times and integer check of one model file; `notes` say why one is missing."""

    memory: Memory | None = None
    layers: tuple[LayerTime, ...] = ()
    denormals: int = 0
    integers: IntegerCheck | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Measured:
    """What was measured of the variants of a target, by variant."""

    accuracies: dict[str, Accuracy] = field(default_factory=dict)
    references: dict[str, Accuracy] = field(default_factory=dict)
    """See `Measurement.reference`."""
    latencies: dict[str, Comparison] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def write_missing_baseline(run: str | Path, settings: Settings) -> None:
    """Write the baseline into a run folder that has none, for PyTorch and the target's runtime."""
    folder = RunFolder(run).variant(BASELINE)
    if not (folder / RECORD).is_file():
        task, runtimes = settings.task, sorted({"torch", settings.target.runtime})
        variants.write(folder, task, task.model, runtimes=runtimes)


def load(
    run: str | Path, names: Sequence[str], settings: Settings, *, progress: Progress = no_progress
) -> dict[str, LoadedVariant]:
    """Load and verify the target's file of each variant: by its hash, and by its outputs on the reference inputs.

    The baseline is always the first of `names`, which are all variants of the run folder by default. Raises
    InvalidInput if the run folder has no baseline.
    """
    torch.set_num_threads(settings.threads)
    like = variants.output_of(settings.task)
    folder = RunFolder(run)
    if not (folder.variant(BASELINE) / RECORD).is_file():
        raise InvalidInput(f"`run` must hold a baseline, but {run} has none. Call `write_missing_baseline` first.")
    names = [BASELINE, *(name for name in names or sorted(folder.variant_names()) if name != BASELINE)]
    loaded: dict[str, LoadedVariant] = {}
    for name in names:
        loaded[name] = _load(folder.variant(name), settings, like)
        progress(len(loaded), len(names), name)
    return loaded


def _load(folder: Path, settings: Settings, like: Any) -> LoadedVariant:
    name, target = folder.name, settings.target
    if not (folder / RECORD).is_file():
        return LoadedVariant(name, "There is no such variant: the step that makes it did not end well.")
    variant = variants.read(folder)
    if reason := variant.refusals.get(target.runtime):
        return LoadedVariant(name, reason)
    file = next((f for f in variant.files if f.runtime == target.runtime), None)
    if file is None:
        return LoadedVariant(name, f"It was made without a file for {target.runtime}. Make it again for this target.")
    threads = settings.threads
    try:
        inputs, expected = variants.reference(folder, target.runtime)
        verified = files.verify(folder, file, inputs, expected, device=target.device, threads=threads, like=like)
    except ShrinkkitError as error:
        return LoadedVariant(name, str(error))
    if verified.reason:
        saturated = benchmark.saturated(folder / file.path, target, inputs, threads)
        return LoadedVariant(name, " ".join([verified.reason, *benchmark.saturation(saturated)]))
    times = (verified.load_ms, verified.first_call_ms)
    return LoadedVariant(name, "", verified.loaded, file.sha256, file.size_bytes, *times)


def measure(
    run: str | Path,
    loaded: Mapping[str, LoadedVariant],
    settings: Settings,
    *,
    callback: TimingCallback = never_stop,
    progress: Progress = no_progress,
) -> Measured:
    """Time and evaluate each loaded file against the baseline's, one variant after another.

    The record is saved after each, as a partial one. What an unfinished benchmark of the same files under the same
    conditions saved is not measured again. Files with the quickest first call come first. A comparison for which the
    machine was too noisy is repeated once at the end, and so is, with the second protocol of the effort, that of each
    variant in the lead: what looked best by luck does not again.
    """
    task, measured, scored = settings.task, Measured(), dict[str, Scored]()
    names, done, stopped = [BASELINE, *(name for name in loaded if name != BASELINE)], [BASELINE], False
    first, second = EFFORTS[settings.effort]

    def compare(name: str, protocol: Protocol = first) -> bool:
        """Time a file and return whether that was stopped by hand."""
        progress(names.index(name), len(names), f"timing {name}")
        pair = {BASELINE: loaded[BASELINE], name: loaded[name]}
        latencies, errors = compare_latency(pair, settings, protocol=protocol, callback=callback)
        measured.latencies |= latencies
        measured.errors |= errors
        return STOPPED in errors.values() or any(compared.stopped for compared in latencies.values())

    def score(name: str) -> None:
        pair, part = {name: loaded[name]}, _part(task, measured.latencies.get(name), settings.seed)
        count = f" on {len(part):,} of {len(task.test):,} examples" if part else ""
        progress(names.index(name), len(names), f"evaluating {name}{count}")
        if not part:
            accuracies, errors = evaluate(pair, task, scored=scored)
        else:
            # The baseline too, because a metric of the whole set has no scores of single examples.
            subset = replace(task, test=Subset(task.test, part))
            accuracies, errors = evaluate({BASELINE: loaded[BASELINE]} | pair, subset)
            measured.references |= {name: accuracies.pop(BASELINE)} if name in accuracies else {}
            accuracies = {name: _renumbered(accuracy, part) for name, accuracy in accuracies.items()}
        measured.accuracies |= accuracies
        measured.errors = errors | measured.errors

    def save() -> None:
        write(run, record(settings, {name: loaded[name] for name in done}, **vars(measured), partial=True))

    if loaded[BASELINE].loaded:
        score(BASELINE)
    saved = _saved(run, loaded, settings, measured.accuracies.get(BASELINE))
    for name, earlier in saved.items():
        done.append(name)
        measured.latencies |= {name: earlier.latency} if earlier.latency else {}
        measured.accuracies |= {name: earlier.accuracy} if earlier.accuracy else {}
        measured.references |= {name: earlier.reference} if earlier.reference else {}
    save()
    names = [*done, *sorted(loaded.keys() - {*done}, key=lambda name: (loaded[name].first_call_ms or 0.0, name))]
    for name in names[len(done) :]:
        if stopped and loaded[name].loaded:
            measured.errors[name] = STOPPED
        elif loaded[name].loaded and settings.times:
            stopped = compare(name)
        if loaded[name].loaded:
            score(name)
        done.append(name)
        save()
    # The control and the machine withhold a verdict, never the candidate, so a second try favours no variant.
    for name in [n for n, c in measured.latencies.items() if c.verdict == "too noisy" and not hopeless(c)]:
        stopped = stopped or compare(name)
        save()
    for name in leading(loaded, measured) if second else ():
        compared = measured.latencies.get(name)
        # What was timed until it was narrow enough, or to the cap, stays.
        if second and compared and compared.duration_s < second.cap_s and half_width(compared.speedup) > second.width:
            stopped = stopped or compare(name, second)
            save()
    progress(len(names), len(names), "")
    return measured


def _saved(
    run: str | Path, loaded: Mapping[str, LoadedVariant], settings: Settings, baseline: Accuracy | None
) -> dict[str, Measurement]:
    """Return what an unfinished benchmark of the same files, scores and conditions saved, by variant."""
    path = RunFolder(run).measurement(str(settings.target), machines.this_machine(settings.target))
    try:
        earlier = evidence.derive(store.read(path, TargetRecord))
    except InvalidInput:  # there is none, or none that this version can use
        return {}
    now = machines.environment(settings.threads, packages=registry.packages())
    before = replace(earlier.environment, clock_mhz=now.clock_mhz, load_average=now.load_average)
    files = {m.variant: m for m in earlier.measurements if m.variant in loaded}
    same = {name: m for name, m in files.items() if m.file_sha256 == loaded[name].file_sha256}
    if not earlier.partial or before != now or BASELINE not in same or same[BASELINE].accuracy != baseline:
        return {}

    def holds(m: Measurement) -> bool:
        if m.error or m.accuracy is None or not settings.times:
            return not m.error and m.accuracy is not None
        if m.latency is None or m.latency.stopped or m.latency.verdict == "too noisy":
            return False
        here = settings.conditions(m.latency.conditions.form)
        return (m.latency.conditions, m.latency.seed) == (here, settings.seed)

    return {name: m for name, m in same.items() if holds(m)}


def hopeless(compared: Comparison) -> bool:
    """Return whether a variant is so slow, in relation to the baseline and in seconds, that it gets no more time."""
    return compared.speedup.high * HOPELESS < 1 and len(compared.candidate_samples_ms) < 2 * FEWEST_BLOCKS


def promising(loaded: Mapping[str, LoadedVariant], measured: Measured, settings: Settings) -> dict[str, LoadedVariant]:
    """Return the variants that are not `hopeless`, to profile them and to time them at other batch sizes."""
    if not settings.times:
        return {}
    slow = {name for name, compared in measured.latencies.items() if hopeless(compared)}
    return {name: variant for name, variant in loaded.items() if name not in slow}


def leading(loaded: Mapping[str, LoadedVariant], measured: Measured) -> dict[str, LoadedVariant]:
    """Return the baseline, and the variants that no other one beats.

    One beats another if it is faster, its file is no larger, and its change of accuracy may reach the other's.
    """
    timed = {n: c.speedup.value for n, c in measured.latencies.items() if c.verdict != "too noisy" and not hopeless(c)}
    gains = {
        name: gain
        for name, accuracy in measured.accuracies.items()
        if name in timed and (gain := estimate.gain(accuracy.difference, higher_is_better=accuracy.higher_is_better))
    }

    def beats(one: str, other: str) -> bool:
        is_smaller = loaded[one].size_bytes <= loaded[other].size_bytes
        return timed[one] > timed[other] and is_smaller and gains[one].high >= gains[other].value

    best = [name for name in gains if not any(beats(one, name) for one in gains)]
    return {name: loaded[name] for name in (BASELINE, *best)}


def swept(loaded: Mapping[str, LoadedVariant], measured: Measured, settings: Settings) -> dict[str, LoadedVariant]:
    """Return the variants to time at other batch sizes and thread counts, which the effort decides."""
    if settings.effort == "quick" or not settings.times:
        return {}
    return promising(loaded, measured, settings) if settings.effort == "thorough" else leading(loaded, measured)


def _part(task: Task, compared: Comparison | None, seed: int) -> tuple[int, ...]:
    """Return the test examples that a hopeless variant is evaluated on within `SCORING_S`; () for all of them."""
    if compared is None or not hopeless(compared):
        return ()
    batches = max(1, int(1000 * SCORING_S / compared.candidate_ms.value))
    count, total = batches * task.example[0].shape[0], len(task.test)
    # Drawn at random, because test splits may be sorted by class.
    return tuple(sorted(Random(seed).sample(range(total), count))) if count < total else ()


def _renumbered(accuracy: Accuracy, part: Sequence[int]) -> Accuracy:
    """Return an accuracy on a part of the test split with the numbers that examples have in the whole."""
    worst = tuple(replace(one, index=part[one.index]) for one in accuracy.worst_regressions)
    return replace(accuracy, worst_regressions=worst)


def _limits(compared: Comparison | None, reference: Accuracy | None, examples: int) -> tuple[str, ...]:
    """Return what was left out of the measurement of a hopeless variant."""
    if compared is None or not hopeless(compared):
        return ()
    slow = f"{formats.times(1 / compared.speedup.value)} as slow as the baseline"
    scored = (f"Scored on {reference.examples:,} of {examples:,} examples, drawn at random.",) if reference else ()
    return (f"Slow: {slow}, so neither profiled nor timed at other batch sizes and threads.", *scored)


def evaluate(
    loaded: Mapping[str, LoadedVariant],
    task: Task,
    *,
    progress: Progress = no_progress,
    scored: dict[str, Scored] | None = None,
) -> tuple[dict[str, Accuracy], dict[str, str]]:
    """Return the accuracy of each loaded file on the test split, and why others could not be evaluated.

    The baseline is evaluated first, unless it is in `scored`, to which it is added; the others are paired with it,
    example by example.
    """
    known = {} if scored is None else scored
    accuracies: dict[str, Accuracy] = {}
    errors: dict[str, str] = {}
    for i, (name, variant) in enumerate(sorted(loaded.items(), key=lambda item: item[0] != BASELINE)):
        progress(i, len(loaded), name)
        if variant.loaded is None:
            continue
        try:
            scores = scoring.scores(variant.loaded, task, task.test)
        except (ShrinkkitError, RuntimeError) as error:
            errors[name] = str(error)
            continue
        if name == BASELINE:
            known[BASELINE] = scores
        elif BASELINE not in known:
            errors[name] = "The baseline could not be evaluated, so there is nothing to pair this with."
            continue
        accuracies[name] = scoring.accuracy(task, scores, None if name == BASELINE else known[BASELINE])
    progress(len(loaded), len(loaded), "")
    return accuracies, errors


def compare_latency(
    loaded: Mapping[str, LoadedVariant],
    settings: Settings,
    *,
    protocol: Protocol = DEFAULT,
    callback: TimingCallback = never_stop,
) -> tuple[dict[str, Comparison], dict[str, str]]:
    """Return the paired timing of each loaded file against the baseline's, and why others were not timed.

    If the callback or an interrupt stops the timing, the comparisons before it are kept.
    """
    baseline = loaded[BASELINE].loaded
    if baseline is None:
        return {}, {}
    files = {name: variant.loaded for name, variant in loaded.items() if name != BASELINE and variant.loaded}
    reference = settings.timed(BASELINE, baseline)
    comparisons: dict[str, Comparison] = {}
    errors: dict[str, str] = {}

    def compare(name: str, file: Loaded) -> bool:
        """Time one file and return whether to continue."""
        try:
            pair, seeded = (reference, settings.timed(name, file)), replace(protocol, seed=settings.seed)
            compared = benchmark.time_pair(*pair, protocol=seeded, callback=callback)
            # A file that writes to its inputs would change the work of the next ones.
            if benchmark.inputs_sha256(settings.task.example) != reference.conditions.inputs_sha256:
                raise UnfairComparison(f"{name} or {BASELINE} changed the inputs while it was timed.")
        except (ShrinkkitError, RuntimeError) as error:
            errors[name] = str(error)
        except KeyboardInterrupt:
            return False
        else:
            comparisons[name] = compared
            return not compared.stopped
        return True

    all(compare(name, file) for name, file in files.items())  # up to the one that is stopped
    untimed = [name for name in files if name not in comparisons and name not in errors]
    return comparisons, errors | dict.fromkeys(untimed, STOPPED)


def compare_runtimes(
    loaded: Mapping[str, LoadedVariant], settings: Settings, *, callback: TimingCallback = never_stop
) -> Comparison | None:
    """Return the paired timing of the baseline's file against the task's own module, called as it is today.

    It isolates what the runtime and its file format give, PyTorch's included, and shows if the exported model does
    other work than the module. None if the baseline has no file. The module runs in PyTorch on the same device.
    """
    baseline = loaded[BASELINE].loaded
    if baseline is None or not settings.times:
        return None
    device, task, form = settings.target.device, settings.task, settings.today
    module = benchmark.copies(task.model, tuple(x.to(device) for x in task.example), form=form)
    today = TimedModel(TODAY, module, replace(settings, target=Target(device, "torch")).conditions(form))
    first, second = EFFORTS[settings.effort]
    pair, protocol = (today, settings.timed(BASELINE, baseline)), replace(second or first, seed=settings.seed)
    return benchmark.time_pair(*pair, across_runtimes=True, protocol=protocol, callback=callback)


def profile(
    loaded: Mapping[str, LoadedVariant], settings: Settings, *, progress: Progress = no_progress
) -> dict[str, Profile]:
    """Return peak memory, time by layer, denormals and integer check of each loaded file."""
    target, inputs = settings.target, tuple(x.cpu() for x in settings.task.example)
    paths = {name: variant.loaded.path for name, variant in loaded.items() if variant.loaded}
    if not paths:
        return {}
    progress(0, len(paths) + 1, "peak memory")
    common: dict[str, Any] = {"runtime": target.runtime, "inputs": inputs}
    on_device = common | {"threads": settings.threads, "device": target.device}
    peaks = peak_memory.measure(paths, **on_device)
    profiles: dict[str, Profile] = {}
    for name, path in paths.items():
        progress(len(profiles) + 1, len(paths) + 1, name)
        peak = peaks[name]
        fields: dict[str, Any] = {} if isinstance(peak, str) else {"memory": peak}
        notes = [f"Peak memory: {peak}"] if isinstance(peak, str) else []
        measurements: dict[str, tuple[str, Callable[[], Any]]] = {
            "layers": ("Time by layer", partial(files.layer_times, path, **on_device)),
            "denormals": ("Denormals", partial(files.denormals, path, **common)),
            "integers": ("Integer kernels", partial(files.check_integers, path, threads=settings.threads, **common)),
        }
        for key, (title, inspect) in measurements.items():
            try:
                fields[key] = inspect()
            except (ShrinkkitError, RuntimeError, ValueError) as error:
                notes.append(f"{title}: {error}")
        profiles[name] = Profile(**fields, notes=tuple(notes))
    progress(len(paths) + 1, len(paths) + 1, "")
    return profiles


def sweep(
    loaded: Mapping[str, LoadedVariant],
    settings: Settings,
    *,
    batch_sizes: Sequence[int],
    thread_counts: Sequence[int],
    budget_s: float = 60.0,
    progress: Progress = no_progress,
) -> tuple[Point, ...]:
    """Return the paired timing of each loaded file on the task's workloads, at other batch sizes and thread counts.

    Only one of the three differs from the main benchmark, whose files were loaded with `settings` and whose thread
    count is restored. Batches are cut from the example or repeat it. A point without a timing has an error. After
    `budget_s` seconds no further point starts, nor does one that would surely exceed them.
    """
    for name, values in (("batch_sizes", batch_sizes), ("thread_counts", thread_counts)):
        if wrong := [value for value in values if value < 1]:
            raise InvalidInput(f"`{name}` must be whole numbers >= 1, got {wrong[0]}. Leave it out.")
    task, threads = settings.task, settings.threads
    batch_size = len(task.example[0])
    cells = [(name, inputs, threads) for name, inputs in task.workloads.items()]
    cells += [("", batch(task.example, size), threads) for size in dict.fromkeys(batch_sizes) if size != batch_size]
    cells += [("", task.example, count) for count in dict.fromkeys(thread_counts) if count != threads]
    files = {name: variant.loaded for name, variant in loaded.items() if variant.loaded}
    if not cells or BASELINE not in files or len(files) == 1:
        progress(1, 1, "nothing to measure")
        return ()
    deadline, points = time.perf_counter() + budget_s, []
    for i, (workload, inputs, count) in enumerate(cells):
        base = Point(BASELINE, len(inputs[0]), count, workload, inputs[0].numel() if task.counts_tokens else 0)
        progress(i, len(cells), f"{workload or f'a batch of {base.batch_size}'} on {formats.counted(count, 'thread')}")
        here = replace(settings, task=replace(task, example=inputs), threads=count)
        registry.use_threads(count)
        try:
            timed = list(_points(files, base, here, deadline))
        finally:
            registry.use_threads(threads)
        error = "" if any(p.latency for p in timed) else "No variant could be timed against it here."
        points += [replace(base, error=error), *timed]
    progress(len(cells), len(cells), "")
    return tuple(evidence.points(points))


def batch(example: Example, size: int) -> Example:
    """Return the first `size` rows of `example`, repeated as often as needed."""
    return tuple(x[torch.arange(size) % x.shape[0]] for x in example)


def _points(files: Mapping[str, Loaded], base: Point, settings: Settings, deadline: float) -> Iterator[Point]:
    """Yield the point of each variant under `settings`, like that of the baseline."""
    task, inputs = settings.task, base.workload or f"a batch of {base.batch_size}"
    names = [name for name in files if name != BASELINE]
    try:
        like = variants.output_of(task) if settings.target.runtime != "torch" else None
    except Exception as error:  # the user's own model may raise anything
        for name in names:
            yield replace(base, variant=name, error=f"The model itself does not take {inputs}: {brief(error)}.")
        return
    for name in names:
        try:
            reference, candidate = (loaded_for(files[n], inputs, settings, like) for n in (BASELINE, name))
            _check_time(reference, candidate, task.example, deadline)
            pair = (settings.timed(BASELINE, reference), settings.timed(name, candidate))
            compared = benchmark.time_pair(*pair, protocol=replace(SWEEP, seed=settings.seed))
        except (ShrinkkitError, RuntimeError, ValueError) as error:
            yield replace(base, variant=name, error=f"{brief(error)}.")
        else:
            yield replace(base, variant=name, latency=compared)


def loaded_for(loaded: Loaded, inputs: str, settings: Settings, like: object) -> Loaded:
    """Return a file loaded for the thread count; raises Unsupported unless it takes the example, named `inputs`."""
    target, example = settings.target, settings.task.example
    # torch's thread count is a setting of the process, the others' one of the loaded file.
    if not registry.get(target.runtime).in_torch:
        options: dict[str, Any] = {"runtime": target.runtime, "device": target.device, "threads": settings.threads}
        loaded = files.load(loaded.path, **options, like=like)
    size = example[0].shape[0]
    try:
        tensors = outputs.tensors(loaded(*example))
    except Exception as error:  # runtimes raise various error types
        raise Unsupported(f"It does not take {inputs}: {brief(error)}") from error
    if not tensors or tensors[0].shape[:1] != (size,):
        raise Unsupported(f"It does not take {inputs}: its batch is fixed")
    return loaded


def _check_time(reference: Loaded, candidate: Loaded, example: Example, deadline: float) -> None:
    """Raise Unsupported if the time is used up, or a comparison would surely exceed it."""
    start = time.perf_counter()
    if start < deadline:
        reference(*example)
        candidate(*example)
        if SWEEP_CALLS / 2 * (time.perf_counter() - start) <= max(SWEEP.cap_s, deadline - start):
            return
    raise Unsupported("The time for workloads and other batch sizes and threads was used up")


def record(
    settings: Settings,
    loaded: Mapping[str, LoadedVariant],
    *,
    accuracies: Mapping[str, Accuracy] = MappingProxyType({}),
    references: Mapping[str, Accuracy] = MappingProxyType({}),
    errors: Mapping[str, str] = MappingProxyType({}),
    latencies: Mapping[str, Comparison] = MappingProxyType({}),
    runtime: Comparison | None = None,
    profiles: Mapping[str, Profile] = MappingProxyType({}),
    sweep: Sequence[Point] = (),
    partial: bool = False,
) -> TargetRecord:
    """Return the record of a benchmark, with one measurement for each variant and every figure derived from samples."""
    target = settings.target
    examples = len(settings.task.test)
    inside = {name: profiles.get(name, Profile()) for name in loaded}
    limits = {name: _limits(latencies.get(name), references.get(name), examples) for name in loaded}
    measurements = [
        Measurement(
            variant=name,
            target=str(target),
            error=variant.error or errors.get(name, ""),
            file_sha256=variant.file_sha256,
            load_ms=variant.load_ms,
            first_call_ms=variant.first_call_ms,
            accuracy=accuracies.get(name),
            latency=latencies.get(name),
            reference=references.get(name),
            **vars(replace(inside[name], notes=(*inside[name].notes, *limits[name]))),
        )
        for name, variant in loaded.items()
    ]
    notes = {sign for c in (*latencies.values(), runtime) if c for sign in c.disturbance.signs}
    stated = TargetRecord(
        task=settings.task.name,
        target=str(target),
        machine=machines.this_machine(target),
        environment=machines.environment(settings.threads, packages=registry.packages()),
        measurements=tuple(measurements),
        runtime=runtime,
        sweep=tuple(sweep),
        notes=tuple(sorted(notes)),
        task_notes=settings.task.notes,
        partial=partial,
    )
    return evidence.derive(stated)


def write(run: str | Path, record: TargetRecord) -> Path:
    """Write the record into the run folder and return its path, which depends on machine and target."""
    path = RunFolder(run).measurement(record.target, record.machine)
    store.write(path, record)
    return path


def loaded_table(loaded: Mapping[str, LoadedVariant]) -> Table:
    """Return a table of the loaded files, with the time of loading and of the first call, or why there is none."""
    rows: list[tuple[Cell, ...]] = []
    for name, variant in loaded.items():
        if variant.error:
            rows.append((Cell(name), Cell(variant.error, tone="bad", wide=True)))
        else:
            times = (cells.milliseconds(variant.load_ms), cells.milliseconds(variant.first_call_ms))
            rows.append((Cell(name), *times, Cell(variant.file_sha256[:12])))
    columns = (Column("variant"), Column("load", True), Column("first call", True), Column("SHA-256"))
    return Table("Loaded files, verified by hash and outputs", columns, tuple(rows))
