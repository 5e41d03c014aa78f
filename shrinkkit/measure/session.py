"""One target's benchmark: every variant's file loaded in one process, proved, judged and timed against the baseline."""

import time
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
from shrinkkit.display import formats
from shrinkkit.display.tables import Cell, Column, Table
from shrinkkit.errors import ModelFileError, ShrinkkitError, UnfairComparison
from shrinkkit.measure import benchmark, peak_memory, scoring
from shrinkkit.measure.timing import TimingCallback, never_stop
from shrinkkit.progress import Progress, no_progress
from shrinkkit.runtimes import artifacts, emulation, layertimes, loading
from shrinkkit.runtimes.loading import Loaded
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import variants

TODAY = "your module today"
"""What the reference of `compare_runtimes` is called."""


@dataclass(frozen=True)
class LoadedVariant:
    """A variant's file on one target, loaded and proved; or the reason why there is none."""

    variant: str
    error: str
    loaded: Loaded | None = None
    file_sha256: str = ""
    load_ms: float | None = None
    first_call_ms: float | None = None


@dataclass(frozen=True)
class Profile:
    """What a look inside one model file gave; `notes` say why something is missing. Fields are `Measurement`'s."""

    memory: Memory | None = None
    layers: tuple[LayerTime, ...] = ()
    denormals: int = 0
    integers: IntegerCheck | None = None
    notes: tuple[str, ...] = ()


def load(
    run: Path, names: Sequence[str], target: Target, task: Task, *, threads: int, progress: Progress = no_progress
) -> dict[str, LoadedVariant]:
    """Return a trial of each variant in `names` on `target`, by name.

    Each file's hash is compared with its record, and its outputs with those that the model in memory gave.

    Args:
        run: The run folder.
        names: Variants, `baseline` among them; empty for all of the run folder. A baseline that is missing is made.
        target: Where they are to run.
        task: Whose example the files are called with.
        threads: Intra-op threads.
        progress: Called as each file has been loaded.
    """
    torch.set_num_threads(threads)
    like = variants.output_of(task)
    folder = RunFolder(run)
    if not folder.variant_record(BASELINE).is_file():
        variants.write(folder.variant(BASELINE), task, task.model, runtimes=sorted({"torch", target.runtime}))
    names = [BASELINE, *(name for name in names or folder.variant_names() if name != BASELINE)]
    loaded = {}
    for name in names:
        loaded[name] = _load(folder.variant(name), target, like, threads)
        progress(len(loaded), len(names), name)
    return loaded


def evaluate(
    trials: Mapping[str, LoadedVariant], task: Task, *, progress: Progress = no_progress
) -> tuple[dict[str, Accuracy], dict[str, str]]:
    """Return the accuracy on the test split of each loaded trial, and the errors of those that could not be judged.

    The baseline comes first: the others are paired with it, example by example.
    """
    found: dict[str, Accuracy] = {}
    errors: dict[str, str] = {}
    reference = None
    for i, (name, trial) in enumerate(sorted(trials.items(), key=lambda item: item[0] != BASELINE)):
        progress(i, len(trials), name)
        if trial.loaded is None:
            continue
        try:
            scored = scoring.scores(trial.loaded, task, task.test)
        except (ShrinkkitError, RuntimeError) as error:
            errors[name] = str(error)
            continue
        if name == BASELINE:
            reference = scored
        elif reference is None:
            errors[name] = "The baseline could not be judged, so there is nothing to pair this with."
            continue
        found[name] = scoring.accuracy(task, scored, None if name == BASELINE else reference)
    progress(len(trials), len(trials), "")
    return found, errors


def compare_latency(
    trials: Mapping[str, LoadedVariant],
    target: Target,
    task: Task,
    *,
    threads: int,
    seed: int,
    callback: TimingCallback = never_stop,
) -> tuple[dict[str, Comparison], dict[str, str]]:
    """Return the paired timing of each loaded trial against the baseline on the same target, and why one has none.

    One that the machine was too noisy for is tried once more at the end. Who stops it, or interrupts it, keeps what
    was timed before.

    Args:
        trials: What `load` returned.
        target: Where they run.
        task: Whose example is the input of every call.
        threads: Intra-op threads.
        seed: Of the order of the blocks.
        callback: Called between blocks, at most twice a second; returns whether to stop.
    """
    baseline = trials[BASELINE]
    if baseline.loaded is None:
        return {}, {}
    conditions = describe(target, task, threads=threads, form=baseline.loaded.form)
    usual = copies(baseline.loaded, task)
    racing = {name: trial.loaded for name, trial in trials.items() if name != BASELINE and trial.loaded is not None}
    found: dict[str, Comparison] = {}
    errors: dict[str, str] = {}

    def compare(name: str, loaded: Loaded) -> bool:
        """Time one and return whether to go on."""
        try:
            compared = benchmark.compare(
                usual,
                copies(loaded, task),
                reference=BASELINE,
                candidate=name,
                conditions=conditions,
                candidate_conditions=replace(conditions, form=loaded.form),
                seed=seed,
                callback=callback,
            )
            # A file that writes to its inputs would give the next ones other work.
            if benchmark.inputs_sha256(task.example) != conditions.inputs_sha256:
                raise UnfairComparison(f"{name} or {BASELINE} changed the inputs while it was timed.")
        except (ShrinkkitError, RuntimeError) as error:
            errors[name] = str(error)
        except KeyboardInterrupt:
            return False
        else:
            found[name] = compared
            return not compared.stopped
        return True

    going = all(compare(name, loaded) for name, loaded in racing.items())
    # What withholds a verdict is the control and the machine, never the candidate, so a second try favours nobody.
    for name in [name for name, compared in found.items() if going and compared.verdict == "too noisy"]:
        going = going and compare(name, racing[name])
    left = [name for name in racing if name not in found and name not in errors]
    return found, errors | dict.fromkeys(left, "It was not timed: the benchmark was stopped by hand.")


def compare_runtimes(
    trials: Mapping[str, LoadedVariant],
    target: Target,
    task: Task,
    *,
    threads: int,
    seed: int,
    today: str = "eager",
    callback: TimingCallback = never_stop,
) -> Comparison | None:
    """Return the paired timing of the baseline's file on `target` against the task's own module, called as it is today.

    This is what the runtime and its form of file give by themselves, torch's included; a model that does other work
    when it is exported shows here. None if the baseline has no file.

    Args:
        trials: What `load` returned.
        target: Where they run; the module runs in torch on the same device.
        task: Whose module and example are used.
        threads: Intra-op threads.
        seed: Of the order of the blocks.
        today: How the module is called: `eager`, or `compiled` by `torch.compile`.
        callback: Called between blocks, at most twice a second; returns whether to stop.
    """
    own = trials[BASELINE].loaded
    if own is None:
        return None
    placed = tuple(x.to(target.device) for x in task.example)
    return benchmark.compare(
        benchmark.copies(task.model, placed, form=today),
        copies(own, task),
        reference=TODAY,
        candidate=BASELINE,
        conditions=describe(Target(target.device, "torch"), task, threads=threads, form=today),
        candidate_conditions=describe(target, task, threads=threads, form=own.form),
        across_runtimes=True,
        seed=seed,
        callback=callback,
    )


def profile(
    trials: Mapping[str, LoadedVariant], target: Target, task: Task, *, threads: int, progress: Progress = no_progress
) -> dict[str, Profile]:
    """Return what each loaded trial's file needs in memory, where its time goes, and what its integer kernels compute.

    Args:
        trials: What `load` returned.
        target: Where they run.
        task: Whose example is the input.
        threads: Intra-op threads.
        progress: Called for each file.
    """
    inputs = tuple(x.cpu() for x in task.example)
    paths = {name: trial.loaded.path for name, trial in trials.items() if trial.loaded is not None}
    progress(0, len(paths) + 1, "peak memory")
    peaks = peak_memory.measure(paths, runtime=target.runtime, inputs=inputs, threads=threads, device=target.device)
    found: dict[str, Profile] = {}
    for name, path in paths.items():
        progress(len(found) + 1, len(paths) + 1, name)
        found[name] = _inside(path, peaks[name], target, inputs, threads)
    progress(len(paths) + 1, len(paths) + 1, "")
    return found


def _inside(path: Path, peak: Memory | str, target: Target, inputs: Example, threads: int) -> Profile:
    """Look inside one file; what one look cannot tell keeps nothing from the others."""
    known: dict[str, Any] = {} if isinstance(peak, str) else {"memory": peak}
    notes = [f"Peak memory: {peak}"] if isinstance(peak, str) else []
    looks: dict[str, tuple[str, Callable[[], Any]]] = {
        "layers": (
            "Time by layer",
            lambda: layertimes.measure(
                path, runtime=target.runtime, inputs=inputs, threads=threads, device=target.device
            ),
        ),
        "denormals": ("Denormals", lambda: layertimes.denormals(path, runtime=target.runtime, inputs=inputs)),
        "integers": (
            "Integer kernels",
            lambda: emulation.check(path, runtime=target.runtime, inputs=inputs, threads=threads),
        ),
    }
    for field, (what, look) in looks.items():
        try:
            known[field] = look()
        except (ShrinkkitError, RuntimeError, ValueError) as error:
            notes.append(f"{what}: {error}")
    return Profile(**known, notes=tuple(notes))


def record(
    task: Task,
    target: Target,
    trials: Mapping[str, LoadedVariant],
    accuracies: Mapping[str, Accuracy],
    errors: Mapping[str, str],
    latencies: Mapping[str, Comparison],
    runtime: Comparison | None,
    inside: Mapping[str, Profile],
    sweep: Sequence[Point],
    *,
    threads: int,
) -> TargetRecord:
    """Return everything that was measured on `target`, one measurement for each trial."""
    measurements = [
        Measurement(
            variant=name,
            target=str(target),
            error=trial.error or errors.get(name, ""),
            file_sha256=trial.file_sha256,
            load_ms=trial.load_ms,
            first_call_ms=trial.first_call_ms,
            accuracy=accuracies.get(name),
            latency=latencies.get(name),
            **vars(inside.get(name, Profile())),
        )
        for name, trial in trials.items()
    ]
    notes = sorted({sign for c in [*latencies.values(), *filter(None, [runtime])] for sign in c.disturbance.signs})
    record = TargetRecord(
        task=task.name,
        target=str(target),
        machine=machines.this_machine(target),
        environment=machines.environment(threads),
        measurements=tuple(measurements),
        runtime=runtime,
        sweep=tuple(sweep),
        notes=tuple(notes),
    )
    return evidence.derive(record)


def write(run: Path, found: TargetRecord) -> Path:
    """Write `found` where the report looks for it, apart from what other machines measured, and return the path."""
    path = RunFolder(run).measurement(found.target, found.machine)
    store.write(path, found)
    return path


def describe(target: Target, task: Task, *, threads: int, form: str) -> Conditions:
    """Return the conditions under which a model of `task` runs on `target` in one form; see `Conditions`."""
    return Conditions(
        device=target.device,
        hardware=machines.hardware(target),
        runtime=target.runtime,
        form=form,
        threads=threads,
        batch_size=task.example[0].shape[0],
        inputs_sha256=benchmark.inputs_sha256(task.example),
    )


def _load(folder: Path, target: Target, like: Any, threads: int) -> LoadedVariant:
    name = folder.name
    if not (folder / RECORD).is_file():
        return LoadedVariant(name, "There is no such variant: the step that makes it did not end well.")
    variant = variants.read(folder)
    if reason := variant.refusals.get(target.runtime):
        return LoadedVariant(name, reason)
    file = next((f for f in variant.files if f.runtime == target.runtime), None)
    if file is None:
        return LoadedVariant(name, f"It was made without a file for {target.runtime}. Make it again for this target.")
    path = folder / file.path
    try:
        if not path.is_file() or artifacts.sha256(path) != file.sha256:
            raise ModelFileError(f"{path.name} is not the file that the record describes. Run its step again.")
        load = partial(loading.load, path, runtime=target.runtime, device=target.device, threads=threads, like=like)
        # The first load of a process also imports parts of the runtime, which is no property of the file.
        load()
        start = time.perf_counter()
        loaded = load()
        load_ms = 1e3 * (time.perf_counter() - start)
        inputs, expected = variants.reference(folder, target.runtime)
        start = time.perf_counter()
        found = loaded(*inputs)
        first_ms = 1e3 * (time.perf_counter() - start)
        error = artifacts.max_relative_error(expected, outputs.tensors(found))
        if not error <= (limit := artifacts.tolerance(file, target.device)):
            raise ModelFileError(
                f"{path.name} must reproduce its reference outputs within {limit:g}, got {error:.2g}."
                + _saturating(path, target, inputs, threads)
            )
    except Exception as problem:  # runtimes raise errors of their own types
        return LoadedVariant(name, str(problem))
    return LoadedVariant(name, "", loaded, file.sha256, load_ms, first_ms)


def _saturating(path: Path, target: Target, inputs: Example, threads: int) -> str:
    """Return a sentence if it is this processor's integer kernels that make a file answer otherwise, '' if not."""
    try:
        found = emulation.check(path, runtime=target.runtime, inputs=inputs, threads=threads)
    except (ShrinkkitError, RuntimeError, ValueError):
        return ""
    if found is None or not found.saturated:
        return ""
    return f" Integer kernels saturate on this processor in {', '.join(found.saturated)}."


def copies(loaded: Loaded, task: Task) -> Callable[[], Callable[[], Any]]:
    """Return a factory of fresh copies of a loaded file, each ready to be called on the task's example."""
    example: Example = tuple(x.cpu() for x in task.example)
    return lambda: loaded.again().prepare(example)


def loaded_table(loaded: Mapping[str, "LoadedVariant"]) -> Table:
    """Return which files were loaded and proved, how long that took, and why a variant has none."""
    rows = tuple(
        (Cell(name), Cell(trial.error, tone="bad", wide=True))
        if trial.error
        else (
            Cell(name),
            Cell(_milliseconds(trial.load_ms)),
            Cell(_milliseconds(trial.first_call_ms)),
            Cell(trial.file_sha256[:12]),
        )
        for name, trial in loaded.items()
    )
    columns = (Column("variant"), Column("load", True), Column("first call", True), Column("SHA-256"))
    return Table("Files loaded back, each proved to be the one that was made", columns, rows)


def _milliseconds(value: float | None) -> str:
    return formats.milliseconds(value) if value is not None else ""
