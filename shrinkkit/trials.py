"""One target's benchmark: every variant's file loaded in one process, proved, judged and timed against the baseline."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shrinkkit import (
    artifacts,
    benchmark,
    emulation,
    layertimes,
    loading,
    machines,
    measure,
    memory,
    outputs,
    records,
    targets,
    variants,
)
from shrinkkit.blocks import Blocks
from shrinkkit.errors import ModelFileError, ShrinkkitError, UnfairComparison
from shrinkkit.finetune import Watch, unwatched
from shrinkkit.loading import Loaded
from shrinkkit.recipes import BASELINE
from shrinkkit.records import (
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
from shrinkkit.targets import Target
from shrinkkit.tasks import Example, Task

Onlooker = Callable[[str, int, int, Blocks], bool]
"""Called with the variant that is timed, its turn, of how many, and the blocks so far; returns whether to stop."""


def unstopped(_name: str, _turn: int, _of: int, _blocks: Blocks) -> bool:
    """Look on at nothing and stop nothing."""
    return False


@dataclass(frozen=True)
class Trial:
    """A variant's file on one target, loaded and proved; or the reason why there is none."""

    variant: str
    error: str
    loaded: Loaded | None = None
    file_sha256: str = ""
    load_ms: float | None = None
    first_call_ms: float | None = None


@dataclass(frozen=True)
class Inside:
    """What a look inside one model file gave; `notes` say why something is missing. Fields are `Measurement`'s."""

    memory: Memory | None = None
    layers: tuple[LayerTime, ...] = ()
    denormals: int = 0
    integers: IntegerCheck | None = None
    notes: tuple[str, ...] = ()


def load(
    run: Path, names: Sequence[str], target: Target, task: Task, *, threads: int, watch: Watch = unwatched
) -> dict[str, Trial]:
    """Return a trial of each variant in `names` on `target`, by name.

    Each file's hash is compared with its record, and its outputs with those that the model in memory gave.

    Args:
        run: The run folder.
        names: Variants, `baseline` among them; empty for all of the run folder. A baseline that is missing is made.
        target: Where they are to run.
        task: Whose example the files are called with.
        threads: Intra-op threads.
        watch: Called as each file has been loaded.
    """
    torch.set_num_threads(threads)
    like = variants.output_of(task)
    folder = run / "variants"
    if not (folder / BASELINE / variants.RECORD).is_file():
        variants.write(folder / BASELINE, task, task.model, recipe={}, runtimes=sorted({"torch", target.runtime}))
    found = sorted(path.parent.name for path in folder.glob(f"*/{variants.RECORD}"))
    names = [BASELINE, *(name for name in names or found if name != BASELINE)]
    loaded = {}
    for name in names:
        loaded[name] = _load(run / "variants" / name, target, like, threads)
        watch(len(loaded), len(names), name)
    return loaded


def judge(
    trials: Mapping[str, Trial], task: Task, *, watch: Watch = unwatched
) -> tuple[dict[str, Accuracy], dict[str, str]]:
    """Return the accuracy on the test split of each loaded trial, and the errors of those that could not be judged.

    The baseline comes first: the others are paired with it, example by example.
    """
    found: dict[str, Accuracy] = {}
    errors: dict[str, str] = {}
    reference = None
    for i, (name, trial) in enumerate(sorted(trials.items(), key=lambda item: item[0] != BASELINE)):
        watch(i, len(trials), name)
        if trial.loaded is None:
            continue
        try:
            scored = measure.scores(trial.loaded, task, task.test)
        except (ShrinkkitError, RuntimeError) as error:
            errors[name] = str(error)
            continue
        if name == BASELINE:
            reference = scored
        elif reference is None:
            errors[name] = "The baseline could not be judged, so there is nothing to pair this with."
            continue
        found[name] = measure.accuracy(task, scored, None if name == BASELINE else reference)
    watch(len(trials), len(trials), "")
    return found, errors


def race(
    trials: Mapping[str, Trial],
    target: Target,
    task: Task,
    *,
    threads: int,
    seed: int,
    watch: Onlooker = unstopped,
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
        watch: Called between blocks, at most twice a second; returns whether to stop.
    """
    conditions = describe(target, task, threads=threads)
    baseline = trials[BASELINE]
    if baseline.loaded is None:
        return {}, {}
    usual = copies(baseline.loaded, task)
    racing = {name: trial.loaded for name, trial in trials.items() if name != BASELINE and trial.loaded is not None}
    found: dict[str, Comparison] = {}
    errors: dict[str, str] = {}

    def compare(name: str, loaded: Loaded) -> bool:
        """Time one and return whether to go on."""
        turn = list(racing).index(name) + 1
        try:
            compared = benchmark.compare(
                usual,
                copies(loaded, task),
                reference=BASELINE,
                candidate=name,
                conditions=conditions,
                candidate_conditions=conditions,
                seed=seed,
                watch=lambda blocks: watch(name, turn, len(racing), blocks),
            )
            # A file that writes to its inputs would give the next ones other work.
            if describe(target, task, threads=threads) != conditions:
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


def race_runtimes(
    run: Path,
    trials: Mapping[str, Trial],
    target: Target,
    task: Task,
    *,
    threads: int,
    seed: int,
    watch: Onlooker = unstopped,
) -> Comparison | None:
    """Return the paired timing of FP32 on `target` against torch FP32 on the same device; None if `target` is torch."""
    own = trials[BASELINE].loaded
    if target.runtime == "torch" or own is None:
        return None
    usual = Target(target.device, "torch")
    plain = _load(run / "variants" / BASELINE, usual, variants.output_of(task), threads).loaded
    if plain is None:
        return None
    return benchmark.compare(
        copies(plain, task),
        copies(own, task),
        reference=BASELINE,
        candidate=BASELINE,
        conditions=describe(usual, task, threads=threads),
        candidate_conditions=describe(target, task, threads=threads),
        across_runtimes=True,
        seed=seed,
        watch=lambda blocks: watch(f"FP32 on {target.runtime}", 1, 1, blocks),
    )


def inspect(
    trials: Mapping[str, Trial], target: Target, task: Task, *, threads: int, watch: Watch = unwatched
) -> dict[str, Inside]:
    """Return what each loaded trial's file needs in memory, where its time goes, and what its integer kernels compute.

    Args:
        trials: What `load` returned.
        target: Where they run.
        task: Whose example is the input.
        threads: Intra-op threads.
        watch: Called for each file.
    """
    inputs = tuple(x.cpu() for x in task.example)
    paths = {name: trial.loaded.path for name, trial in trials.items() if trial.loaded is not None}
    watch(0, len(paths) + 1, "peak memory")
    peaks = memory.measure(paths, runtime=target.runtime, inputs=inputs, threads=threads, device=target.device)
    found: dict[str, Inside] = {}
    for name, path in paths.items():
        watch(len(found) + 1, len(paths) + 1, name)
        found[name] = _inside(path, peaks[name], target, inputs, threads)
    watch(len(paths) + 1, len(paths) + 1, "")
    return found


def _inside(path: Path, peak: Memory | str, target: Target, inputs: Example, threads: int) -> Inside:
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
    return Inside(**known, notes=tuple(notes))


def record(
    task: Task,
    target: Target,
    trials: Mapping[str, Trial],
    accuracies: Mapping[str, Accuracy],
    errors: Mapping[str, str],
    latencies: Mapping[str, Comparison],
    runtime: Comparison | None,
    inside: Mapping[str, Inside],
    sweep: Sequence[Point],
    *,
    threads: int,
) -> TargetRecord:
    """Return everything that was measured on `target`, one measurement for each trial."""
    any_latency = next(iter(latencies.values()), None)
    measurements = []
    for name, trial in trials.items():
        compared = latencies.get(name)
        own = (
            compared.candidate_ms
            if compared
            else any_latency.reference_ms
            if any_latency and name == BASELINE
            else None
        )
        if name == BASELINE and own is None and runtime is not None:
            own = runtime.candidate_ms
        measurements.append(
            Measurement(
                variant=name,
                target=target.name,
                error=trial.error or errors.get(name, ""),
                file_sha256=trial.file_sha256,
                load_ms=trial.load_ms,
                first_call_ms=trial.first_call_ms,
                accuracy=accuracies.get(name),
                latency=compared,
                latency_ms=own,
                **vars(inside.get(name, Inside())),
            )
        )
    notes = sorted({sign for c in [*latencies.values(), *filter(None, [runtime])] for sign in c.disturbance.signs})
    return TargetRecord(
        task=task.name,
        target=target.name,
        machine=machines.here(target.name),
        environment=targets.environment(threads),
        measurements=tuple(measurements),
        runtime=runtime,
        sweep=tuple(sweep),
        notes=tuple(notes),
    )


def write(run: Path, found: TargetRecord) -> Path:
    """Write `found` where the report looks for it, apart from what other machines measured, and return the path."""
    path = run / machines.record_path(found.target, found.machine)
    records.write(path, found)
    return path


def describe(target: Target, task: Task, *, threads: int) -> Conditions:
    """Return the conditions under which a model of `task` runs on `target`."""
    return Conditions(
        device=target.device,
        hardware=targets.hardware(target),
        runtime=target.runtime,
        threads=threads,
        batch_size=task.example[0].shape[0],
        inputs_sha256=benchmark.inputs_sha256(task.example),
    )


def _load(folder: Path, target: Target, like: Any, threads: int) -> Trial:
    name = folder.name
    if not (folder / variants.RECORD).is_file():
        return Trial(name, "There is no such variant: the step that makes it did not end well.")
    variant = variants.read(folder)
    if reason := variant.refusals.get(target.runtime):
        return Trial(name, reason)
    file = next((f for f in variant.files if f.runtime == target.runtime), None)
    if file is None:
        return Trial(name, f"It was made without a file for {target.runtime}. Make it again for this target.")
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
        error = artifacts.deviation(expected, outputs.tensors(found))
        # A GPU rounds the products of float32 matrices more than the CPU on which the reference was made.
        low = variant.recipe.get("quantize") or target.device != "cpu"
        if not error <= (limit := artifacts.LOW_PRECISION_TOLERANCE if low else artifacts.TOLERANCE[file.format]):
            raise ModelFileError(
                f"{path.name} must reproduce its reference outputs within {limit:g}, got {error:.2g}."
                + _saturating(path, target, inputs, threads)
            )
    except Exception as problem:  # runtimes raise errors of their own types
        return Trial(name, str(problem))
    return Trial(name, "", loaded, file.sha256, load_ms, first_ms)


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
