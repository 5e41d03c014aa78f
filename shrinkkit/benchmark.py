"""Paired timing: is one model faster than another, here and now, and by how much?

Blocks in which reference, candidate and a copy of the reference take turns; a verdict only where the interval
allows one. Why this way and not another is measured by `tests/benchmarks/timing.py`.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from random import Random
from typing import Any

from shrinkkit import contention, intervals
from shrinkkit.errors import InvalidInput, UnfairComparison
from shrinkkit.records import Comparison, Conditions, Estimate

MARGIN = 0.01
"""Differences within this share count as none."""
FEWEST_BLOCKS, FEWEST_SLOW_BLOCKS, CHECK_EVERY = 20, 6, 5
WARMUP_WINDOW, STEADY, WARMUP_CAP_S = 5, 0.05, 5.0
MOST_CALLS = 32
FRESH_CALLS = 4
"""Unrecorded calls of a new copy: TorchScript compiles during its first ones."""

Call = Callable[[], Any]
Make = Callable[[], Call]
Samples = list[tuple[float, ...]]


@dataclass
class Blocks:
    """Call times in ms, two slots a block for each arm, in the order of time."""

    reference: Samples = field(default_factory=list)
    candidate: Samples = field(default_factory=list)
    null: Samples = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of whole blocks."""
        return len(self.null) // 2


@dataclass(frozen=True)
class Conclusion:
    """What the blocks say. Ratios are reference time over candidate time."""

    speedup: Estimate
    experienced: Estimate
    null_ratio: Estimate
    verdict: str


def compare(
    make_reference: Make,
    make_candidate: Make,
    *,
    reference: str,
    candidate: str,
    conditions: Conditions,
    candidate_conditions: Conditions,
    width: float = 0.01,
    cap_s: float = 4.0,
    layouts: int = 8,
    slot_ms: float = 4.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Return the paired timing of two models under equal conditions.

    Args:
        make_reference: Returns a fresh copy of the reference as a call without arguments that runs it once.
        make_candidate: The same for the candidate.
        reference: Name of the reference.
        candidate: Name of the candidate.
        conditions: Under which the reference runs.
        candidate_conditions: Under which the candidate runs.
        width: Half-width of the interval, as a share, at which measuring stops.
        cap_s: Seconds after which it stops in any case, once there are 20 blocks; slow models get three times that, and
            then 6 blocks are enough.
        layouts: Most fresh copies of each model in 20 blocks, so that where a model lies in memory is not part of the
            result; fewer where making them would take more than a quarter of the time.
        slot_ms: Milliseconds for which one model runs before the next takes its turn, at least one call;
            one more comes first and is not recorded.
        seed: Of the order within blocks and of the bootstrap.
        progress: Called with a line at most once a second, between blocks.

    Raises:
        InvalidInput: `width`, `cap_s`, `layouts` or `slot_ms` is not above 0.
        UnfairComparison: The conditions differ; `compare_runtimes` is for two runtimes.
    """
    _refuse(conditions, candidate_conditions, allowed=frozenset())
    return _compare(
        make_reference, make_candidate, reference, candidate, conditions, candidate_conditions,
        _Protocol(width, cap_s, layouts, slot_ms, seed), progress,
    )  # fmt: skip


def compare_runtimes(
    make_reference: Make,
    make_candidate: Make,
    *,
    reference: str,
    candidate: str,
    conditions: Conditions,
    candidate_conditions: Conditions,
    width: float = 0.01,
    cap_s: float = 4.0,
    layouts: int = 8,
    slot_ms: float = 4.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Return the paired timing of one model on two runtimes of a device; arguments are those of `compare`.

    Raises:
        InvalidInput: `width`, `cap_s`, `layouts` or `slot_ms` is not above 0.
        UnfairComparison: The conditions differ in more than the runtime.
    """
    _refuse(conditions, candidate_conditions, allowed=frozenset({"runtime"}))
    return _compare(
        make_reference, make_candidate, reference, candidate, conditions, candidate_conditions,
        _Protocol(width, cap_s, layouts, slot_ms, seed), progress,
    )  # fmt: skip


def conclude(blocks: Blocks, *, withheld: bool = False, seed: int = 0) -> Conclusion:
    """Return the ratios and the verdict that the blocks support.

    Args:
        blocks: At least 2.
        withheld: Whether contention was such that no verdict may be given.
        seed: Of the bootstrap.
    """
    speedup = intervals.median_ratio(_log_ratios(blocks.reference, blocks.candidate, min), seed=seed)
    null = intervals.median_ratio(_log_ratios(blocks.reference, blocks.null, min), seed=seed)
    experienced = intervals.median_ratio(_log_ratios(blocks.reference, blocks.candidate, _median), seed=seed)
    noisy = withheld or _verdict(null) in ("faster", "slower")
    return Conclusion(speedup, experienced, null, "too noisy" if noisy else _verdict(speedup))


@dataclass(frozen=True)
class _Protocol:
    width: float
    cap_s: float
    layouts: int
    slot_ms: float
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot be measured with."""
        for name in ("width", "cap_s", "layouts", "slot_ms"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"`{name}` must be above 0, got {getattr(self, name)}. Leave it out.")


def _compare(
    make_reference: Make,
    make_candidate: Make,
    reference: str,
    candidate: str,
    conditions: Conditions,
    candidate_conditions: Conditions,
    protocol: _Protocol,
    progress: Callable[[str], None],
) -> Comparison:
    from shrinkkit.targets import cores

    timer = _cuda_times if conditions.device == "cuda" else _times
    start = contention.snapshot()
    makers = (make_reference, make_candidate, make_reference)
    calls, copy_s = _fresh(makers)
    warmup, steady, call_ms = _warm_up(calls, timer)
    blocks, told = Blocks(), time.perf_counter()
    turns = _turns(blocks, makers, calls, copy_s, call_ms, protocol, timer)
    del calls  # or the first copies would take memory to the end
    for _ in turns:
        if time.perf_counter() - told > 1:
            told = time.perf_counter()
            progress(f"{candidate}: {len(blocks)} blocks")
    signs, withheld = contention.signs(start, end := contention.snapshot(), threads=conditions.threads, cores=cores())
    found = conclude(blocks, withheld=withheld, seed=protocol.seed)
    return Comparison(
        reference=reference,
        candidate=candidate,
        conditions=conditions,
        candidate_runtime=candidate_conditions.runtime,
        speedup=found.speedup,
        experienced=found.experienced,
        verdict=found.verdict,
        reference_ms=intervals.median([_median(slot) for slot in blocks.reference], seed=protocol.seed),
        candidate_ms=intervals.median([_median(slot) for slot in blocks.candidate], seed=protocol.seed),
        null_ratio=found.null_ratio,
        reference_samples_ms=_stored(blocks.reference),
        candidate_samples_ms=_stored(blocks.candidate),
        null_samples_ms=_stored(blocks.null),
        warmup_calls=warmup,
        steady=steady,
        contention=signs,
        duration_s=end.wall_s - start.wall_s,
        seed=protocol.seed,
    )


def _turns(
    blocks: Blocks,
    makers: Sequence[Make],
    calls: Sequence[Call],
    copy_s: float,
    call_ms: Sequence[float],
    protocol: _Protocol,
    timer: Callable[[Call, int], tuple[float, ...]],
) -> Iterator[None]:
    """Fill `blocks` until they are enough, in randomised palindromes, with fresh copies now and then."""
    arms = (blocks.reference, blocks.candidate, blocks.null)
    # The same number of calls for all, because the fastest of many is faster than the fastest of few.
    count = max(1, min(MOST_CALLS, round(protocol.slot_ms / math.sqrt(call_ms[0] * call_ms[1]))))
    random, start, copying_s = Random(protocol.seed), time.perf_counter(), 0.0
    age, old = 0, math.ceil(FEWEST_BLOCKS / protocol.layouts)
    while not _enough(blocks, protocol, elapsed_s := time.perf_counter() - start):
        # One renewal at least, in the middle of the fewest blocks that slow models get.
        if age >= old and (copying_s + copy_s <= elapsed_s / 4 or len(blocks) == FEWEST_SLOW_BLOCKS // 2):
            # The old copies live until the new ones stand, so that these cannot take their place in memory.
            calls, copy_s = _fresh(makers)
            copying_s += copy_s
            age = 0
        order = random.sample(range(3), 3)
        with _no_collection():
            for arm in (*order, *reversed(order)):
                # Not recorded: it meets the caches and the spinning threads that the model before it left.
                calls[arm]()
                arms[arm].append(timer(calls[arm], count))
        age += 1
        yield


def _enough(blocks: Blocks, protocol: _Protocol, elapsed_s: float) -> bool:
    """Return whether to stop: on the width of the interval or on time, never on what the interval says."""
    done = len(blocks)
    if done < FEWEST_BLOCKS:
        return done >= FEWEST_SLOW_BLOCKS and elapsed_s > 3 * protocol.cap_s
    if elapsed_s > protocol.cap_s:
        return True
    if done % CHECK_EVERY:
        return False
    found = intervals.median_ratio(_log_ratios(blocks.reference, blocks.candidate, min), seed=protocol.seed)
    return math.log(found.high / found.low) / 2 <= protocol.width


def _refuse(a: Conditions, b: Conditions, *, allowed: frozenset[str]) -> None:
    unequal = [
        f"{f.name} ({getattr(a, f.name)!r} and {getattr(b, f.name)!r})"
        for f in fields(Conditions)
        if f.name not in allowed and getattr(a, f.name) != getattr(b, f.name)
    ]
    if unequal:
        raise UnfairComparison(
            f"Models may be timed only under equal conditions; these differ in {', '.join(unequal)}. "
            "Load both on the same target, with the same threads and inputs."
        )


def _fresh(makers: Sequence[Make]) -> tuple[list[Call], float]:
    """Return a new copy of each model, past its first calls, and the seconds that this took."""
    start = time.perf_counter()
    calls = [make() for make in makers]
    for call in calls:
        for _ in range(FRESH_CALLS):
            call()
    return calls, time.perf_counter() - start


def _warm_up(
    calls: Sequence[Call], timer: Callable[[Call, int], tuple[float, ...]]
) -> tuple[int, bool, tuple[float, ...]]:
    """Call each model until two windows agree; return all calls so far, whether each became steady, and its ms."""
    total, all_steady, times = FRESH_CALLS * len(calls), True, []
    for call in calls:
        start, previous, steady = time.perf_counter(), math.inf, False
        while not steady:
            current = _median(timer(call, WARMUP_WINDOW))
            total += WARMUP_WINDOW
            steady = abs(current - previous) <= STEADY * current
            previous = current
            if time.perf_counter() - start > WARMUP_CAP_S:
                break
        all_steady &= steady
        times.append(previous)
    return total, all_steady, tuple(times)


def _times(call: Call, count: int) -> tuple[float, ...]:
    """Return the ms of each of `count` calls by the clock on the wall."""
    clock, marks = time.perf_counter_ns, []
    for _ in range(count):
        start = clock()
        call()
        marks.append(clock() - start)
    if not all(marks):
        raise InvalidInput("A call must take at least a nanosecond, got 0. The clock of this machine is too coarse.")
    return tuple(mark / 1e6 for mark in marks)


def _cuda_times(call: Call, count: int) -> tuple[float, ...]:
    """Return the ms of each of `count` calls between events on the device, waited for once at the end."""
    import torch

    event = partial(torch.cuda.Event, enable_timing=True)
    pairs = [(event(), event()) for _ in range(count)]
    torch.cuda.synchronize()
    for before, after in pairs:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return tuple(before.elapsed_time(after) for before, after in pairs)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running inside a timed call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _log_ratios(reference: Samples, candidate: Samples, of: Callable[[Sequence[float]], float]) -> list[float]:
    """Return log(reference / candidate) of each block, from its two slots of each."""
    logs = [math.log(of(a) / of(b)) for a, b in zip(reference, candidate, strict=True)]
    return [(logs[i] + logs[i + 1]) / 2 for i in range(0, len(logs), 2)]


def _verdict(ratio: Estimate) -> str:
    """Return what a ratio with its interval allows to say, differences within the margin counting as none."""
    upper = 1 + MARGIN
    if ratio.low > upper:
        return "faster"
    if ratio.high < 1 / upper:
        return "slower"
    return "same" if ratio.low > 1 / upper and ratio.high < upper else "undecided"


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _stored(samples: Samples) -> tuple[tuple[float, ...], ...]:
    """Return the samples with six significant digits, which is more than a clock gives."""
    return tuple(tuple(float(f"{ms:.6g}") for ms in slot) for slot in samples)
