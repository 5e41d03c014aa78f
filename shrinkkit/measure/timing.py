"""Models taking turns: randomised palindromes of reference, candidate and a copy of the reference, timed call by call.

Why this way and not another is measured by `tests/benchmarks/timing.py`.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch

from shrinkkit.core import estimate
from shrinkkit.core.samples import PairedSamples, log_ratios, median
from shrinkkit.errors import InvalidInput
from shrinkkit.tasks import outputs

FEWEST_BLOCKS, FEWEST_SLOW_BLOCKS, FEWEST_STOPPED, CHECK_EVERY = 20, 6, 2, 5
CALLBACK_PERIOD_S = 0.5
WARMUP_WINDOW, STEADY, WARMUP_CAP_S = 5, 0.05, 5.0
MOST_CALLS = 32
FRESH_CALLS = 4
"""Unrecorded calls of a new copy: TorchScript compiles during its first ones."""

PROVING_CALLS = 2
"""Of the first copies: whether they give the same finite outputs twice."""

Call = Callable[[], Any]
"""Runs a model once on its inputs and returns the outputs."""
Make = Callable[[], Call]
"""Returns a fresh copy of a model as a call."""
Timer = Callable[[Call, int], tuple[float, ...]]
"""Makes a number of calls and returns the ms of each."""
TimingCallback = Callable[[str, PairedSamples], bool]
"""Called between blocks, at most twice a second, with the candidate's name and the samples so far; True stops."""


def never_stop(_candidate: str, _samples: PairedSamples) -> bool:
    """Timing callback that never stops."""
    return False


@dataclass(frozen=True)
class Protocol:
    """How long to measure and how to take turns; `benchmark.compare` says what each of these means."""

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


def measure(
    makers: Sequence[Make],
    names: tuple[str, str],
    timer: Timer,
    protocol: Protocol,
    callback: TimingCallback,
) -> tuple[PairedSamples, int, bool, bool]:
    """Return the blocks, the calls of the warm-up, whether these became steady, and whether a person ended it early.

    An interrupt ends it too, once there are two blocks to conclude from.

    Args:
        makers: Of the reference, of the candidate, and of the reference again, for the control.
        names: Of reference and candidate.
        timer: `wall_times` or `cuda_times`.
        protocol: How to take turns, and when to stop.
        callback: Called between blocks, at most twice a second.

    Raises:
        InvalidInput: A model returns what is not finite, or does not reproduce its own outputs.
    """
    shuffle = Random(protocol.seed)
    calls, copy_s = _fresh(makers, shuffle)
    _refuse_unequal_answers(calls, *names)
    warmup, steady, call_ms = _warm_up(calls, timer)
    blocks, told, stopped = PairedSamples(), time.perf_counter(), False
    turns = _turns(blocks, makers, calls, copy_s, call_ms, protocol, shuffle, timer)
    del calls  # or the first copies would take memory to the end
    try:
        for _ in turns:
            if len(blocks) >= FEWEST_STOPPED and time.perf_counter() - told > CALLBACK_PERIOD_S:
                if stopped := callback(names[1], blocks):
                    break
                told = time.perf_counter()
    except KeyboardInterrupt:
        blocks.cut()
        if len(blocks) < FEWEST_STOPPED:
            raise
        stopped = True
    return blocks, warmup, steady, stopped


def _turns(
    blocks: PairedSamples,
    makers: Sequence[Make],
    calls: Sequence[Call],
    copy_s: float,
    call_ms: Sequence[float],
    protocol: Protocol,
    shuffle: Random,
    timer: Timer,
) -> Iterator[None]:
    """Fill `blocks` until they are enough, in randomised palindromes, with fresh copies now and then."""
    arms = (blocks.reference, blocks.candidate, blocks.control)
    # The same number of calls for all, because the fastest of many is faster than the fastest of few.
    count = min(MOST_CALLS, math.ceil(protocol.slot_ms / math.sqrt(call_ms[0] * call_ms[1])))
    # Not from `shuffle`, or the order would depend on when copies were made, and so on the clock.
    random, start, copying_s = Random(protocol.seed), time.perf_counter(), 0.0
    age, old = 0, math.ceil(FEWEST_BLOCKS / protocol.layouts)
    while not _enough(blocks, protocol, elapsed_s := time.perf_counter() - start):
        # One renewal at least, in the middle of the fewest blocks that slow models get.
        if age >= old and (copying_s + copy_s <= elapsed_s / 10 or len(blocks) == FEWEST_SLOW_BLOCKS // 2):
            # The old copies live until the new ones stand, so that these cannot take their place in memory.
            calls, copy_s = _fresh(makers, shuffle)
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


def _enough(blocks: PairedSamples, protocol: Protocol, elapsed_s: float) -> bool:
    """Return whether to stop: on the width of the interval or on time, never on what the interval says."""
    done = len(blocks)
    if done < FEWEST_BLOCKS:
        return done >= FEWEST_SLOW_BLOCKS and elapsed_s > 3 * protocol.cap_s
    if elapsed_s > protocol.cap_s:
        return True
    if done % CHECK_EVERY:
        return False
    found = estimate.block_ratio(log_ratios(blocks, min), seed=protocol.seed)
    return math.log(found.high / found.low) / 2 <= protocol.width


def _refuse_unequal_answers(calls: Sequence[Call], reference: str, candidate: str) -> None:
    """Raise if reference or candidate returns what is not finite or not the same twice, or if copies disagree."""
    answers = [[t.clone() for t in outputs.tensors(call())] for call in calls]
    again = [outputs.tensors(call()) for call in calls]
    for i, name in enumerate((reference, candidate, f"the copy of {reference}")):
        if not all(bool(torch.isfinite(t).all()) for t in answers[i]):
            raise InvalidInput(
                f"Models must return finite outputs, but {name} gives NaN or infinity. Nothing was timed."
            )
        if not outputs.close(answers[i], again[i]):
            raise InvalidInput(
                f"Models must reproduce their own outputs, but two calls of {name} on the same inputs differ. "
                "Leave out what is random, and state or inputs that a call changes. Nothing was timed."
            )
    if not outputs.close(answers[0], answers[2]):
        raise InvalidInput(f"Copies of a model must agree, but two of {reference} differ. Nothing was timed.")


def _fresh(makers: Sequence[Make], shuffle: Random) -> tuple[list[Call], float]:
    """Return a new copy of each model, past its first calls, and the seconds that this took."""
    start = time.perf_counter()
    # Made in another order each time: the copy made last was found to be slower by a third of a per cent.
    made = {arm: makers[arm]() for arm in shuffle.sample(range(len(makers)), len(makers))}
    calls = [made[arm] for arm in range(len(makers))]
    for call in calls:
        for _ in range(FRESH_CALLS):
            call()
    return calls, time.perf_counter() - start


def _warm_up(calls: Sequence[Call], timer: Timer) -> tuple[int, bool, tuple[float, ...]]:
    """Call each model until two windows agree; return all calls so far, whether each became steady, and its ms."""
    total, all_steady, times = (FRESH_CALLS + PROVING_CALLS) * len(calls), True, []
    for call in calls:
        start, previous, steady = time.perf_counter(), math.inf, False
        while not steady:
            current = median(timer(call, WARMUP_WINDOW))
            total += WARMUP_WINDOW
            steady = abs(current - previous) <= STEADY * current
            previous = current
            if time.perf_counter() - start > WARMUP_CAP_S:
                break
        all_steady &= steady
        times.append(previous)
    return total, all_steady, tuple(times)


def timer(device: str, runtimes: Set[str]) -> Timer:
    """Return how calls on `device` are timed, which is the same for all of `runtimes`.

    Args:
        device: `cpu`, `cuda` or `mps`.
        runtimes: Of the models that take turns.
    """
    if device == "cpu":
        return wall_times
    if device == "cuda" and runtimes <= {"torch", "inductor"}:
        return cuda_times
    # Other runtimes compute in streams of their own, which torch's events do not see.
    wait: Call = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}[device]
    return partial(_waited_times, wait)


def _waited_times(wait: Call, call: Call, count: int) -> tuple[float, ...]:
    """Return the ms of each of `count` calls by the clock on the wall, until the device is done."""

    def done() -> None:
        call()
        wait()

    wait()
    return wall_times(done, count)


def wall_times(call: Call, count: int) -> tuple[float, ...]:
    """Return the ms of each of `count` calls by the clock on the wall."""
    clock, marks = time.perf_counter_ns, []
    for _ in range(count):
        start = clock()
        call()
        marks.append(clock() - start)
    if not all(marks):
        raise InvalidInput("A call must take at least a nanosecond, got 0. The clock of this machine is too coarse.")
    return tuple(mark / 1e6 for mark in marks)


def cuda_times(call: Call, count: int) -> tuple[float, ...]:
    """Return the ms of each of `count` calls between events on the device, waited for once at the end."""
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
