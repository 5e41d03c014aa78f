"""The benchmark of one target: load each variant's file in one process, verify it, evaluate, time and profile it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shrinkkit.core import evidence, machines, store
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
from shrinkkit.display import cells
from shrinkkit.display.tables import Cell, Column, Table
from shrinkkit.errors import InvalidInput, ShrinkkitError, UnfairComparison
from shrinkkit.measure import benchmark, peak_memory, scoring
from shrinkkit.measure.timing import Protocol, TimingCallback, never_stop
from shrinkkit.progress import Progress, no_progress
from shrinkkit.runtimes import files, registry
from shrinkkit.runtimes.base import Loaded
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import variants

TODAY = "your module today"
"""Name of the reference of `compare_runtimes`."""


@dataclass(frozen=True)
class Settings:
    """What is benchmarked, and how."""

    target: Target
    task: Task
    threads: int
    """Intra-op threads, >= 1."""
    seed: int = 0
    """Of the order of calls and of the bootstrap."""
    today: str = "eager"
    """How the task's module is called today: `eager`, or `compiled` by `torch.compile`."""

    def conditions(self, form: str) -> Conditions:
        """Return the conditions under which a model runs in one form."""
        return benchmark.conditions(self.target, self.task.example, threads=self.threads, form=form)

    def copies(self, loaded: Loaded) -> Callable[[], Callable[[], Any]]:
        """Return a factory of fresh copies of a loaded file, each ready to be called on the task's example."""
        example = tuple(x.cpu() for x in self.task.example)
        return lambda: loaded.clone().bind(example)


@dataclass(frozen=True)
class LoadedVariant:
    """A variant's file on one target, loaded and verified; or the reason why there is none."""

    variant: str
    error: str
    loaded: Loaded | None = None
    file_sha256: str = ""
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

    Args:
        run: The run folder.
        names: Variants; the baseline is always the first. Empty for all of the run folder.
        settings: Of the benchmark.
        progress: Called after each file.

    Raises:
        InvalidInput: The run folder has no baseline.
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
    try:
        inputs, expected = variants.reference(folder, target.runtime)
        verified = files.verify(
            folder, file, inputs, expected, device=target.device, threads=settings.threads, like=like
        )
    except ShrinkkitError as error:
        return LoadedVariant(name, str(error))
    if verified.reason:
        saturation = _saturation(folder / file.path, target, inputs, settings.threads)
        return LoadedVariant(name, verified.reason + saturation)
    return LoadedVariant(name, "", verified.loaded, file.sha256, verified.load_ms, verified.first_call_ms)


def _saturation(path: Path, target: Target, inputs: Example, threads: int) -> str:
    """Return a sentence that names the layers whose int8 accumulators saturate on this processor; '' if none do."""
    try:
        check = files.check_integers(path, runtime=target.runtime, inputs=inputs, threads=threads)
    except (ShrinkkitError, RuntimeError, ValueError):
        return ""
    saturated = check.saturated if check else ()
    return f" Integer kernels saturate on this processor in {', '.join(saturated)}." if saturated else ""


def evaluate(
    loaded: Mapping[str, LoadedVariant], task: Task, *, progress: Progress = no_progress
) -> tuple[dict[str, Accuracy], dict[str, str]]:
    """Return the accuracy of each loaded file on the test split, and why others could not be evaluated.

    The baseline is evaluated first; the others are paired with it, example by example.
    """
    accuracies: dict[str, Accuracy] = {}
    errors: dict[str, str] = {}
    reference = None
    for i, (name, variant) in enumerate(sorted(loaded.items(), key=lambda item: item[0] != BASELINE)):
        progress(i, len(loaded), name)
        if variant.loaded is None:
            continue
        try:
            scored = scoring.scores(variant.loaded, task, task.test)
        except (ShrinkkitError, RuntimeError) as error:
            errors[name] = str(error)
            continue
        if name == BASELINE:
            reference = scored
        elif reference is None:
            errors[name] = "The baseline could not be evaluated, so there is nothing to pair this with."
            continue
        accuracies[name] = scoring.accuracy(task, scored, None if name == BASELINE else reference)
    progress(len(loaded), len(loaded), "")
    return accuracies, errors


def compare_latency(
    loaded: Mapping[str, LoadedVariant], settings: Settings, *, callback: TimingCallback = never_stop
) -> tuple[dict[str, Comparison], dict[str, str]]:
    """Return the paired timing of each loaded file against the baseline's, and why others were not timed.

    A comparison for which the machine was too noisy is repeated once at the end. If the callback or an interrupt
    stops the timing, the comparisons before it are kept.
    """
    baseline = loaded[BASELINE].loaded
    if baseline is None:
        return {}, {}
    files = {name: variant.loaded for name, variant in loaded.items() if name != BASELINE and variant.loaded}
    conditions = settings.conditions(baseline.form)
    comparisons: dict[str, Comparison] = {}
    errors: dict[str, str] = {}

    def compare(name: str, file: Loaded) -> bool:
        """Time one file and return whether to continue."""
        try:
            compared = benchmark.compare(
                settings.copies(baseline),
                settings.copies(file),
                reference=BASELINE,
                candidate=name,
                conditions=conditions,
                candidate_conditions=replace(conditions, form=file.form),
                protocol=Protocol(seed=settings.seed),
                callback=callback,
            )
            # A file that writes to its inputs would change the work of the next ones.
            if benchmark.inputs_sha256(settings.task.example) != conditions.inputs_sha256:
                raise UnfairComparison(f"{name} or {BASELINE} changed the inputs while it was timed.")
        except (ShrinkkitError, RuntimeError) as error:
            errors[name] = str(error)
        except KeyboardInterrupt:
            return False
        else:
            comparisons[name] = compared
            return not compared.stopped
        return True

    completed = all(compare(name, file) for name, file in files.items())
    # The control and the machine withhold a verdict, never the candidate, so a second try favours no variant.
    for name in [name for name, compared in comparisons.items() if completed and compared.verdict == "too noisy"]:
        completed = completed and compare(name, files[name])
    untimed = [name for name in files if name not in comparisons and name not in errors]
    return comparisons, errors | dict.fromkeys(untimed, "It was not timed: the benchmark was stopped by hand.")


def compare_runtimes(
    loaded: Mapping[str, LoadedVariant], settings: Settings, *, callback: TimingCallback = never_stop
) -> Comparison | None:
    """Return the paired timing of the baseline's file against the task's own module, called as it is today.

    It isolates what the runtime and its file format give, PyTorch's included, and shows if the exported model does
    other work than the module. None if the baseline has no file. The module runs in PyTorch on the same device.
    """
    baseline = loaded[BASELINE].loaded
    if baseline is None:
        return None
    device, task = settings.target.device, settings.task
    example = tuple(x.to(device) for x in task.example)
    today = replace(settings, target=Target(device, "torch"))
    return benchmark.compare(
        benchmark.copies(task.model, example, form=settings.today),
        settings.copies(baseline),
        reference=TODAY,
        candidate=BASELINE,
        conditions=today.conditions(settings.today),
        candidate_conditions=settings.conditions(baseline.form),
        across_runtimes=True,
        protocol=Protocol(seed=settings.seed),
        callback=callback,
    )


def profile(
    loaded: Mapping[str, LoadedVariant], settings: Settings, *, progress: Progress = no_progress
) -> dict[str, Profile]:
    """Return peak memory, time by layer, denormals and integer check of each loaded file."""
    target, inputs = settings.target, tuple(x.cpu() for x in settings.task.example)
    paths = {name: variant.loaded.path for name, variant in loaded.items() if variant.loaded}
    progress(0, len(paths) + 1, "peak memory")
    peaks = peak_memory.measure(
        paths, runtime=target.runtime, inputs=inputs, threads=settings.threads, device=target.device
    )
    profiles: dict[str, Profile] = {}
    for name, path in paths.items():
        progress(len(profiles) + 1, len(paths) + 1, name)
        profiles[name] = _profile(path, peaks[name], target, inputs, settings.threads)
    progress(len(paths) + 1, len(paths) + 1, "")
    return profiles


def _profile(path: Path, peak: Memory | str, target: Target, inputs: Example, threads: int) -> Profile:
    fields: dict[str, Any] = {} if isinstance(peak, str) else {"memory": peak}
    notes = [f"Peak memory: {peak}"] if isinstance(peak, str) else []
    common: dict[str, Any] = {"runtime": target.runtime, "inputs": inputs}
    measurements: dict[str, tuple[str, Callable[[], Any]]] = {
        "layers": (
            "Time by layer",
            partial(files.layer_times, path, threads=threads, device=target.device, **common),
        ),
        "denormals": ("Denormals", partial(files.denormals, path, **common)),
        "integers": ("Integer kernels", partial(files.check_integers, path, threads=threads, **common)),
    }
    for field, (title, measure) in measurements.items():
        try:
            fields[field] = measure()
        except (ShrinkkitError, RuntimeError, ValueError) as error:
            notes.append(f"{title}: {error}")
    return Profile(**fields, notes=tuple(notes))


def record(
    settings: Settings,
    loaded: Mapping[str, LoadedVariant],
    *,
    accuracies: Mapping[str, Accuracy] | None = None,
    errors: Mapping[str, str] | None = None,
    latencies: Mapping[str, Comparison] | None = None,
    runtime: Comparison | None = None,
    profiles: Mapping[str, Profile] | None = None,
    sweep: Sequence[Point] = (),
) -> TargetRecord:
    """Return the record of a benchmark, with one measurement for each variant and every figure derived from samples."""
    accuracies, errors, latencies, profiles = accuracies or {}, errors or {}, latencies or {}, profiles or {}
    target, threads = settings.target, settings.threads
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
            **vars(profiles.get(name, Profile())),
        )
        for name, variant in loaded.items()
    ]
    notes = {sign for c in (*latencies.values(), runtime) if c for sign in c.disturbance.signs}
    return evidence.derive(
        TargetRecord(
            task=settings.task.name,
            target=str(target),
            machine=machines.this_machine(target),
            environment=machines.environment(threads, packages=registry.packages()),
            measurements=tuple(measurements),
            runtime=runtime,
            sweep=tuple(sweep),
            notes=tuple(sorted(notes)),
        )
    )


def write(run: str | Path, record: TargetRecord) -> Path:
    """Write the record into the run folder and return its path, which depends on machine and target."""
    path = RunFolder(run).measurement(record.target, record.machine)
    store.write(path, record)
    return path


def loaded_table(loaded: Mapping[str, LoadedVariant]) -> Table:
    """Return a table of the loaded files, with the time of loading and of the first call, or why there is none."""
    rows = tuple(
        (Cell(name), Cell(variant.error, tone="bad", wide=True))
        if variant.error
        else (
            Cell(name),
            cells.milliseconds(variant.load_ms),
            cells.milliseconds(variant.first_call_ms),
            Cell(variant.file_sha256[:12]),
        )
        for name, variant in loaded.items()
    )
    columns = (Column("variant"), Column("load", True), Column("first call", True), Column("SHA-256"))
    return Table("Loaded files, verified by hash and outputs", columns, rows)
