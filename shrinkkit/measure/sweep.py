"""Other batch sizes and numbers of threads: every variant beside the baseline again, each a comparison of its own."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from shrinkkit.core import evidence
from shrinkkit.core.measurement import Point
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.target import Target
from shrinkkit.display import formats
from shrinkkit.errors import InvalidInput, ShrinkkitError, Unsupported, brief
from shrinkkit.measure import benchmark, session
from shrinkkit.measure.session import LoadedVariant
from shrinkkit.progress import Progress, no_progress
from shrinkkit.runtimes import loading, specs
from shrinkkit.runtimes.loading import Loaded
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import variants

WIDTH, CAP_S, LAYOUTS = 0.02, 0.5, 2
"""Of each comparison: many wide intervals tell more here than few narrow ones."""
CALLS = 120
"""Roughly what the fewest blocks and the warm-up of one comparison take."""


def run(
    loaded: Mapping[str, LoadedVariant],
    target: Target,
    task: Task,
    *,
    batch_sizes: Sequence[int],
    thread_counts: Sequence[int],
    threads: int,
    seed: int = 0,
    budget_s: float = 60.0,
    progress: Progress = no_progress,
) -> tuple[Point, ...]:
    """Return the paired timing of each loaded trial at other batch sizes, and at other numbers of threads.

    One or the other differs from the main benchmark, never both. What has no timing is a point with its reason.

    Args:
        loaded: What `trials.load` returned, with `threads`.
        target: Where they run.
        task: Whose example the batches are cut from, or filled up from with repeats.
        batch_sizes: At least 1 each; the example's own is left out.
        thread_counts: At least 1 each; `threads` is left out.
        threads: Intra-op threads of the main benchmark, also in force afterwards.
        seed: Of the order of the blocks.
        budget_s: Seconds after which no further point is begun; a point that would surely take longer is not begun.
        progress: Called for each of them.

    Raises:
        InvalidInput: A batch size or a number of threads is below 1.
    """
    for name, values in (("batch_sizes", batch_sizes), ("thread_counts", thread_counts)):
        if wrong := [value for value in values if value < 1]:
            raise InvalidInput(f"`{name}` must be whole numbers >= 1, got {wrong[0]}. Leave it out.")
    own = task.example[0].shape[0]
    settings = [(size, threads) for size in dict.fromkeys(batch_sizes) if size != own]
    settings += [(own, count) for count in dict.fromkeys(thread_counts) if count != threads]
    names = [name for name, trial in loaded.items() if name != BASELINE and trial.loaded is not None]
    if loaded[BASELINE].loaded is None or not names:
        return ()
    deadline, points = time.perf_counter() + budget_s, []
    for i, (size, count) in enumerate(settings):
        progress(i, len(settings), f"a batch of {size} on {formats.counted(count, 'thread')}")
        with _threads(count, threads):
            found = list(
                _points(loaded, names, target, replace(task, example=batch(task.example, size)), count, seed, deadline)
            )
        points += [_baseline(size, count, any(p.latency for p in found)), *found]
    progress(len(settings), len(settings), "")
    return tuple(evidence.points(points))


def batch(example: Example, size: int) -> Example:
    """Return `size` rows of `example`, from the first on, repeated as often as needed."""
    return tuple(x[torch.arange(size) % x.shape[0]] for x in example)


def _points(
    loaded: Mapping[str, LoadedVariant],
    names: Sequence[str],
    target: Target,
    task: Task,
    threads: int,
    seed: int,
    deadline: float,
) -> Iterator[Point]:
    """Yield the point of each variant on the task's example with `threads` threads."""
    size = task.example[0].shape[0]
    try:
        like = variants.output_of(task) if target.runtime != "torch" else None
    except Exception as error:  # the user's own model may raise anything
        for name in names:
            yield Point(name, size, threads, error=f"The model itself does not take a batch of {size}: {brief(error)}.")
        return
    for name in names:
        try:
            reference, candidate = (_ready(loaded[n], target, task, threads, like) for n in (BASELINE, name))
            _refuse_long(reference, candidate, task.example, deadline)
            compared = benchmark.compare(
                session.copies(reference, task),
                session.copies(candidate, task),
                reference=BASELINE,
                candidate=name,
                conditions=session.describe(target, task, threads=threads, form=reference.form),
                candidate_conditions=session.describe(target, task, threads=threads, form=candidate.form),
                width=WIDTH,
                cap_s=CAP_S,
                layouts=LAYOUTS,
                seed=seed,
            )
        except (ShrinkkitError, RuntimeError, ValueError) as error:
            yield Point(name, size, threads, error=f"{brief(error)}.")
        else:
            yield Point(name, size, threads, latency=compared)


def _ready(trial: LoadedVariant, target: Target, task: Task, threads: int, like: object) -> Loaded:
    """Return the trial's file loaded for `threads` threads, proved to take a batch of this size."""
    assert trial.loaded is not None
    ready = trial.loaded
    # torch's number of threads is a setting of the process, the others' one of the loaded file.
    if target.runtime in ("onnxruntime", "openvino"):
        ready = loading.load(ready.path, runtime=target.runtime, device=target.device, threads=threads, like=like)
    size = task.example[0].shape[0]
    try:
        found = outputs.tensors(ready(*task.example))
    except Exception as error:  # runtimes raise errors of their own types
        raise Unsupported(f"It does not take a batch of {size}: {brief(error)}") from error
    if not found or found[0].shape[:1] != (size,):
        raise Unsupported(f"It does not take a batch of {size}: its batch is fixed")
    return ready


def _refuse_long(reference: Loaded, candidate: Loaded, example: Example, deadline: float) -> None:
    """Raise where the time is used up, or a comparison would surely take more than is left."""
    start = time.perf_counter()
    if start < deadline:
        reference(*example)
        candidate(*example)
        if CALLS / 2 * (time.perf_counter() - start) <= max(CAP_S, deadline - start):
            return
    raise Unsupported("The time for other batch sizes and threads was used up")


def _baseline(size: int, threads: int, timed: bool) -> Point:
    return Point(BASELINE, size, threads, error="" if timed else "No variant could be timed beside it here.")


@contextmanager
def _threads(count: int, usual: int) -> Iterator[None]:
    """Compute with `count` threads while the block runs, and with the usual number afterwards."""
    specs.use_threads(count)
    try:
        yield
    finally:
        specs.use_threads(usual)
