"""Interleaved timing: randomised palindromes of a reference, a candidate and a copy of the reference, call by call.

The experiments behind this protocol are in `tests/benchmarks/timing.py`.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.evidence import PairedSamples, log_ratios
from shrinkkit.errors import InvalidInput
from shrinkkit.runtimes import registry
from shrinkkit.tasks import outputs

FEWEST_BLOCKS, FEWEST_SLOW_BLOCKS, FEWEST_STOPPED, CHECK_EVERY = 20, 6, 2, 5
FEWEST_HOPELESS_BLOCKS, HOPELESS = 3, 3.0
"""Blocks that suffice after the cap for a candidate that is slower by this factor with its whole interval."""
CLEAR = 1.1
"""Ratio beyond which a difference is clear, if its whole interval is."""
CALLBACK_PERIOD_S = 0.5
WARMUP_WINDOW, STEADY, WARMUP_CAP_S = 5, 0.05, 5.0
MOST_CALLS = 32
FRESH_CALLS = 4
"""Unrecorded calls of a new copy: TorchScript compiles during its first ones."""
CHECK_CALLS = 2
"""Calls of the first copies that check whether outputs are finite and reproducible."""

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
    """Duration and order of a comparison."""

    width: float = 0.005
    """Half-width of the 95 % interval, as a fraction, at which timing stops. *No difference* needs well below 1 %."""
    cap_s: float = 4.0
    """Seconds after which timing stops in any case, once there are 20 blocks; slow models get 3 times that, and then 6
    blocks suffice. After 3 blocks it stops for a candidate that is `HOPELESS`."""
    clear_s: float = math.inf
    """Seconds after which timing stops for a candidate that is `CLEAR`, to be timed again if a decision hangs on it."""
    fresh_copies: int = 8
    """Most fresh copies of each model in 20 blocks, which average over places in memory; fewer where copying would take
    more than a tenth of the time."""
    slot_ms: float = 6.0
    """Least time in ms for which one model runs before the next one does, after one unrecorded call."""
    seed: int = 0
    """Of the order within blocks and of the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("width", "cap_s", "clear_s", "fresh_copies", "slot_ms"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"`{name}` must be above 0, got {getattr(self, name)}. Leave it out.")


DEFAULT = Protocol()


@dataclass(frozen=True)
class Timing:
    """Samples of a comparison and how they came about."""

    samples: PairedSamples
    warmup_calls: int
    steady: bool
    """Whether the times of every model became steady during the warm-up."""
    stopped: bool
    """Whether the callback or an interrupt ended it early."""


def measure(
    makers: Sequence[Make], names: tuple[str, str], timer: Timer, protocol: Protocol, callback: TimingCallback
) -> Timing:
    """Time models in turns until the protocol is fulfilled; an interrupt ends it too, once there are two blocks.

    `makers` are of the reference, of the candidate, and of the reference again, for the control. Raises InvalidInput if
    a model returns values that are not finite, or does not reproduce its outputs.
    """
    shuffle = Random(protocol.seed)
    calls, copy_s, fresh_calls = _fresh_copies(makers, shuffle)
    start = time.perf_counter()
    _check_outputs(calls, *names)
    # Of calls that take seconds, each counts as a window.
    window = WARMUP_WINDOW if time.perf_counter() - start < WARMUP_CAP_S else 1
    warmup_calls, steady, call_ms = _warm_up(calls, timer, window)
    warmup_calls += fresh_calls + CHECK_CALLS * len(calls)
    samples, last_s, stopped = PairedSamples(), time.perf_counter(), False
    blocks = _blocks(samples, makers, calls, copy_s, call_ms, protocol, shuffle, timer)
    del calls  # or the first copies would occupy memory to the end
    try:
        for _ in blocks:
            if len(samples) >= FEWEST_STOPPED and time.perf_counter() - last_s > CALLBACK_PERIOD_S:
                if stopped := callback(names[1], samples):
                    break
                last_s = time.perf_counter()
    except KeyboardInterrupt:
        samples.cut()
        if len(samples) < FEWEST_STOPPED:
            raise
        stopped = True
    return Timing(samples, warmup_calls, steady, stopped)


def _blocks(
    samples: PairedSamples,
    makers: Sequence[Make],
    calls: Sequence[Call],
    copy_s: float,
    call_ms: Sequence[float],
    protocol: Protocol,
    shuffle: Random,
    timer: Timer,
) -> Iterator[None]:
    """Add blocks to `samples` until they suffice, in randomised palindromes, with fresh copies now and then."""
    arms = (samples.reference, samples.candidate, samples.control)
    # The same number of calls for all, because the fastest of many is faster than the fastest of few.
    count = min(MOST_CALLS, math.ceil(protocol.slot_ms / math.sqrt(call_ms[0] * call_ms[1])))
    # Not from `shuffle`, or the order would depend on when copies were made, and so on the clock.
    random, start, copying_s = Random(protocol.seed), time.perf_counter(), 0.0
    age, most = 0, math.ceil(FEWEST_BLOCKS / protocol.fresh_copies)
    while not _enough(samples, protocol, elapsed_s := time.perf_counter() - start):
        # At least one renewal, in the middle of the fewest blocks that slow models get.
        if age >= most and (copying_s + copy_s <= elapsed_s / 10 or len(samples) == FEWEST_SLOW_BLOCKS // 2):
            # The old copies live until the new ones exist, so that these cannot reuse their memory.
            calls, copy_s, _ = _fresh_copies(makers, shuffle)
            copying_s += copy_s
            age = 0
        order = random.sample(range(3), 3)
        with _no_collection():
            for arm in (*order, *reversed(order)):
                # Not recorded: it runs with the caches and spinning threads of the previous model.
                if call_ms[arm] < 1000 * protocol.cap_s:
                    calls[arm]()
                arms[arm].append(timer(calls[arm], count))
        age += 1
        yield


def _enough(samples: PairedSamples, protocol: Protocol, elapsed_s: float) -> bool:
    """Return whether to stop: by the width of the interval or by time, and sooner if its value leaves no doubt.

    *Faster* or *slower* beyond 1 % cannot come about by stopping where the whole interval is `CLEAR` or `HOPELESS`. The
    value of one that stopped so is not what a recommendation rests on; see `session.measure`.
    """
    count = len(samples)
    if count < FEWEST_BLOCKS:
        if count >= FEWEST_SLOW_BLOCKS and elapsed_s > 3 * protocol.cap_s:
            return True
        over = count >= FEWEST_HOPELESS_BLOCKS and elapsed_s > protocol.cap_s
        return over and estimate.block_ratio(log_ratios(samples, min), seed=protocol.seed).high * HOPELESS < 1
    if elapsed_s > protocol.cap_s:
        return True
    if count % CHECK_EVERY:
        return False
    ratio = estimate.block_ratio(log_ratios(samples, min), seed=protocol.seed)
    # Checked after 20, 40, 80 ... blocks: with more checks, intervals of ratios near `CLEAR` would miss them often.
    is_due = elapsed_s > protocol.clear_s and math.log2(count / FEWEST_BLOCKS).is_integer()
    clear = is_due and (ratio.low > CLEAR or ratio.high * CLEAR < 1)
    return clear or half_width(ratio) <= protocol.width


def half_width(ratio: Estimate) -> float:
    """Return half the width of a ratio's interval, as a fraction of the ratio."""
    return math.log(ratio.high / ratio.low) / 2


def _check_outputs(calls: Sequence[Call], reference: str, candidate: str) -> None:
    first = [[t.clone() for t in outputs.tensors(call())] for call in calls]
    second = [outputs.tensors(call()) for call in calls]
    for i, name in enumerate((reference, candidate, f"the copy of {reference}")):
        if not all(bool(torch.isfinite(t).all()) for t in first[i]):
            raise InvalidInput(f"Outputs must be finite, but {name} gives NaN or infinity. Nothing was timed.")
        if not outputs.close(first[i], second[i]):
            text = f"Models must reproduce their own outputs, but two calls of {name} on the same inputs differ."
            raise InvalidInput(f"{text} Leave out what is random, and what a call changes. Nothing was timed.")
    if not outputs.close(first[0], first[2]):
        raise InvalidInput(f"Copies of a model must agree, but two of {reference} differ. Nothing was timed.")


def _fresh_copies(makers: Sequence[Make], shuffle: Random) -> tuple[list[Call], float, int]:
    """Return a new copy of each model, after its first calls, the seconds that this took, and the number of calls."""
    start, count = time.perf_counter(), 0
    # In another order each time: the copy made last was found to be slower by a third of a per cent.
    copies = {arm: makers[arm]() for arm in shuffle.sample(range(len(makers)), len(makers))}
    calls = [copies[arm] for arm in range(len(makers))]
    for call in calls:
        began = time.perf_counter()
        for _ in range(FRESH_CALLS):
            call()
            count += 1
            if time.perf_counter() - began > WARMUP_CAP_S:
                break
    return calls, time.perf_counter() - start, count


def _warm_up(calls: Sequence[Call], timer: Timer, window: int) -> tuple[int, bool, tuple[float, ...]]:
    """Call each model until two windows agree; return the number of calls, whether all became steady, and their ms."""
    total, all_steady, times = 0, True, []
    for call in calls:
        start, previous, steady = time.perf_counter(), math.inf, False
        while not steady:
            current = statistics.median(timer(call, window))
            total += window
            steady = abs(current - previous) <= STEADY * current
            previous = current
            if time.perf_counter() - start > WARMUP_CAP_S:
                break
        all_steady &= steady
        times.append(previous)
    return total, all_steady, tuple(times)


def timer(device: str, runtimes: Set[str]) -> Timer:
    """Return the timer for calls on `device` of models of all of `runtimes`."""
    if device == "cpu":
        return wall_times
    if device == "cuda" and all(registry.get(name).in_torch for name in runtimes):
        return cuda_times
    # Other runtimes compute in other streams, which torch's events do not see.
    wait: Call = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}[device]
    return partial(_synchronized_times, wait)


def _synchronized_times(wait: Call, call: Call, count: int) -> tuple[float, ...]:
    """Return the wall-clock ms of each of `count` calls, each until the device has finished."""
    wait()
    return wall_times(lambda: (call(), wait()), count)


def wall_times(call: Call, count: int) -> tuple[float, ...]:
    """Return the wall-clock ms of each of `count` calls."""
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
    """Keep the garbage collector from running inside a timed call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
