"""Timing at other batch sizes and thread counts: each variant against the baseline, a comparison for each point."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from shrinkkit.core import evidence
from shrinkkit.core.measurement import Point
from shrinkkit.core.recipe import BASELINE
from shrinkkit.display import formats
from shrinkkit.errors import InvalidInput, ShrinkkitError, Unsupported, brief
from shrinkkit.measure import benchmark
from shrinkkit.measure.session import LoadedVariant, Settings
from shrinkkit.measure.timing import Protocol
from shrinkkit.progress import Progress, no_progress
from shrinkkit.runtimes import files, registry
from shrinkkit.runtimes.base import Loaded
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.transforms import variants

PROTOCOL = Protocol(width=0.02, cap_s=0.5, fresh_copies=2)
"""Many wide intervals tell more here than few narrow ones."""
CALLS = 120
"""Approximate calls of the fewest blocks and the warm-up of one comparison."""


def run(
    loaded: Mapping[str, LoadedVariant],
    settings: Settings,
    *,
    batch_sizes: Sequence[int],
    thread_counts: Sequence[int],
    budget_s: float = 60.0,
    progress: Progress = no_progress,
) -> tuple[Point, ...]:
    """Return the paired timing of each loaded file at other batch sizes, and at other thread counts.

    Only one of the two differs from the main benchmark, whose files were loaded with `settings` and whose thread count
    is restored. Batches are cut from the example or repeat it. A point without a timing has an error. After `budget_s`
    seconds no further point starts, nor does one that would surely exceed them.
    """
    for name, values in (("batch_sizes", batch_sizes), ("thread_counts", thread_counts)):
        if wrong := [value for value in values if value < 1]:
            raise InvalidInput(f"`{name}` must be whole numbers >= 1, got {wrong[0]}. Leave it out.")
    example = settings.task.example
    batch_size = example[0].shape[0]
    pairs = [(size, settings.threads) for size in dict.fromkeys(batch_sizes) if size != batch_size]
    pairs += [(batch_size, count) for count in dict.fromkeys(thread_counts) if count != settings.threads]
    files = {name: variant.loaded for name, variant in loaded.items() if variant.loaded}
    if not pairs or BASELINE not in files or len(files) == 1:
        progress(1, 1, "nothing to measure")
        return ()
    deadline, points = time.perf_counter() + budget_s, []
    for i, (size, count) in enumerate(pairs):
        progress(i, len(pairs), f"a batch of {size} on {formats.counted(count, 'thread')}")
        point = replace(settings, task=replace(settings.task, example=batch(example, size)), threads=count)
        registry.use_threads(count)
        try:
            timed = list(_points(files, point, deadline))
        finally:
            registry.use_threads(settings.threads)
        error = "" if any(p.latency for p in timed) else "No variant could be timed against it here."
        points += [Point(BASELINE, size, count, error=error), *timed]
    progress(len(pairs), len(pairs), "")
    return tuple(evidence.points(points))


def batch(example: Example, size: int) -> Example:
    """Return the first `size` rows of `example`, repeated as often as needed."""
    return tuple(x[torch.arange(size) % x.shape[0]] for x in example)


def _points(files: Mapping[str, Loaded], settings: Settings, deadline: float) -> Iterator[Point]:
    """Yield the point of each variant under `settings`."""
    task, threads = settings.task, settings.threads
    size = task.example[0].shape[0]
    names = [name for name in files if name != BASELINE]
    try:
        like = variants.output_of(task) if settings.target.runtime != "torch" else None
    except Exception as error:  # the user's own model may raise anything
        for name in names:
            yield Point(name, size, threads, error=f"The model itself does not take a batch of {size}: {brief(error)}.")
        return
    for name in names:
        try:
            reference, candidate = (_loaded_for(files[n], settings, like) for n in (BASELINE, name))
            _check_time(reference, candidate, task.example, deadline)
            pair = (settings.timed(BASELINE, reference), settings.timed(name, candidate))
            compared = benchmark.compare(*pair, protocol=replace(PROTOCOL, seed=settings.seed))
        except (ShrinkkitError, RuntimeError, ValueError) as error:
            yield Point(name, size, threads, error=f"{brief(error)}.")
        else:
            yield Point(name, size, threads, latency=compared)


def _loaded_for(loaded: Loaded, settings: Settings, like: object) -> Loaded:
    """Return a file loaded for the thread count; raises Unsupported unless it takes the batch size."""
    target, example = settings.target, settings.task.example
    # torch's thread count is a setting of the process, the others' one of the loaded file.
    if not registry.get(target.runtime).in_torch:
        loaded = files.load(
            loaded.path, runtime=target.runtime, device=target.device, threads=settings.threads, like=like
        )
    size = example[0].shape[0]
    try:
        tensors = outputs.tensors(loaded(*example))
    except Exception as error:  # runtimes raise various error types
        raise Unsupported(f"It does not take a batch of {size}: {brief(error)}") from error
    if not tensors or tensors[0].shape[:1] != (size,):
        raise Unsupported(f"It does not take a batch of {size}: its batch is fixed")
    return loaded


def _check_time(reference: Loaded, candidate: Loaded, example: Example, deadline: float) -> None:
    """Raise Unsupported if the time is used up, or a comparison would surely exceed it."""
    start = time.perf_counter()
    if start < deadline:
        reference(*example)
        candidate(*example)
        if CALLS / 2 * (time.perf_counter() - start) <= max(PROTOCOL.cap_s, deadline - start):
            return
    raise Unsupported("The time for other batch sizes and threads was used up")
