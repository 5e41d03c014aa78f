import gc
import itertools
from random import Random

import numpy as np
import pytest
import torch
from clock import Clock

from shrinkkit.core import evidence
from shrinkkit.errors import InvalidInput
from shrinkkit.measure import timing
from shrinkkit.measure.timing import (
    CHECK_CALLS,
    FEWEST_BLOCKS,
    FEWEST_SLOW_BLOCKS,
    FRESH_CALLS,
    MOST_CALLS,
    WARMUP_WINDOW,
    Protocol,
)

WARMUP_CALLS = FRESH_CALLS + CHECK_CALLS + 2 * WARMUP_WINDOW


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def take(make_reference, make_candidate, *, callback=timing.never_stop, **options) -> timing.Timing:
    protocol = Protocol(**options)
    makers = (make_reference, make_candidate, make_reference)
    return timing.measure(makers, ("reference", "candidate"), timing.wall_times, protocol, callback)


def test_a_block_is_a_palindrome_in_which_each_model_runs_twice(clock):
    order = timed_order(clock, seed=0)
    taken = [order[i : i + 6] for i in range(0, len(order), 6)]
    assert len(taken) == FEWEST_BLOCKS
    for block in taken:
        assert block == block[::-1]
        assert sorted(arm for arm, _ in block[:3]) == ["candidate", "reference", "reference"]
        assert len(set(block)) == 3
    assert len({tuple(arm for arm, _ in block) for block in taken}) == 3


def test_the_order_of_the_blocks_is_that_of_the_seed(clock):
    one, again, other = ([arm for arm, _ in timed_order(clock, seed=seed)] for seed in (1, 1, 2))
    assert one == again
    assert one != other


def timed_order(clock: Clock, *, seed: int) -> list[tuple[str, int]]:
    """Return which copy of which model ran at each timed call, of one call a slot."""
    log: list = []

    def tagged(arm):
        inner = clock.models(lambda: 10.0, log=(own := []))

        def make():
            call = inner()

            def logged():
                call()
                copy, number = own[-1]
                first = copy == 0 or (copy == 1 and arm == "reference")
                if number >= (WARMUP_CALLS if first else FRESH_CALLS):
                    log.append((arm, copy))

            return logged

        return make

    take(tagged("reference"), tagged("candidate"), seed=seed)
    # The first of each turn's two calls is not recorded.
    assert log[::2] == log[1::2]
    return log[1::2]


def test_measuring_stops_as_soon_as_the_interval_is_narrow(clock):
    assert blocks_in(take(clock.models(lambda: 3.0), clock.models(lambda: 3.0))) == FEWEST_BLOCKS


def test_measuring_goes_on_to_the_cap_while_the_interval_is_wide_whatever_it_says(clock):
    random = Random(0)
    start = clock.perf_counter()
    found = take(clock.models(lambda: 3.0), clock.models(lambda: random.uniform(8.0, 24.0)), cap_s=8.0)
    assert blocks_in(found) > FEWEST_BLOCKS
    assert clock.perf_counter() - start > 8.0
    assert evidence.conclude(found.samples).speedup.high < 0.5


def test_slow_models_get_fewer_blocks_and_never_too_few(clock):
    assert blocks_in(take(clock.models(lambda: 900.0), clock.models(lambda: 900.0))) == FEWEST_SLOW_BLOCKS


def test_models_too_slow_for_the_cap_still_get_the_fewest_blocks(clock):
    random = Random(0)
    slow = clock.models(lambda: random.uniform(15.0, 30.0))
    assert blocks_in(take(slow, slow)) == FEWEST_BLOCKS


@pytest.mark.parametrize(("ms", "blocks", "calls"), [(3_500.0, 3, 18), (60_000.0, 3, 10), (299.0, 6, None)])
def test_a_candidate_many_times_slower_is_timed_just_enough_to_say_so(clock, ms, blocks, calls):
    log: list = []
    found = take(clock.models(lambda: 100.0), clock.models(lambda: ms, log=log))
    assert blocks_in(found) >= blocks if calls is None else blocks_in(found) == blocks
    assert calls is None or len(log) == calls
    conclusion = evidence.conclude(found.samples)
    assert conclusion.verdict == "slower"
    assert conclusion.speedup.value == pytest.approx(100 / ms)


def test_a_slow_candidate_whose_interval_reaches_beyond_the_factor_gets_all_blocks(clock):
    times = itertools.cycle([400.0] * 9 + [2000.0] * 7)
    assert blocks_in(take(clock.models(lambda: 200.0), clock.models(lambda: next(times)))) >= FEWEST_SLOW_BLOCKS


def test_a_fast_candidate_is_never_stopped_early_for_being_much_faster(clock):
    assert blocks_in(take(clock.models(lambda: 4000.0), clock.models(lambda: 100.0))) == FEWEST_SLOW_BLOCKS


@pytest.mark.parametrize(("around", "factor"), [(6.0, 0.5), (24.0, 2.0)])
def test_a_clear_difference_is_timed_only_until_it_is_clear_if_that_is_asked_for(clock, around, factor):
    random = Random(0)

    def found(**options):
        start = clock.perf_counter()
        candidate = clock.models(lambda: random.uniform(0.8, 1.2) * around)
        taken = take(clock.models(lambda: 12.0), candidate, cap_s=30.0, **options)
        return taken, clock.perf_counter() - start

    whole, whole_s = found()
    short, short_s = found(clear_s=1.0)
    assert short_s < whole_s / 2
    assert blocks_in(whole) > blocks_in(short) >= FEWEST_BLOCKS
    interval = evidence.conclude(short.samples).speedup
    assert min(interval.low * factor, 1 / (interval.high * factor)) > 0.8
    assert not 1 / 1.1 < interval.low < 1.1


def test_a_difference_that_is_not_clear_is_timed_to_the_end(clock):
    random = Random(0)
    start = clock.perf_counter()
    found = take(clock.models(lambda: 3.0), clock.models(lambda: random.uniform(2.8, 4.0)), cap_s=8.0, clear_s=1.0)
    assert 0.9 < evidence.conclude(found.samples).speedup.value < 1.1
    assert clock.perf_counter() - start > 8.0


def blocks_in(found: timing.Timing) -> int:
    slots = {len(arm) for arm in vars(found.samples).values()}
    assert len(slots) == 1
    return slots.pop() // 2


@pytest.mark.parametrize(("ms", "calls"), [(100.0, 1), (5.0, 2), (3.0, 2), (0.5, 12), (0.001, MOST_CALLS)])
def test_a_slot_holds_the_calls_that_fit(clock, ms, calls):
    found = take(clock.models(lambda: ms), clock.models(lambda: ms))
    assert {len(slot) for slot in found.samples.reference} == {calls}


def test_the_first_call_of_each_turn_is_not_recorded(clock):
    ran: list = [None]

    def make():
        own = object()

        def call():
            clock.ns += 40_000_000 if ran[-1] is not own else 10_000_000
            ran[-1] = own

        return call

    found = take(make, make)
    assert {ms for slot in found.samples.candidate for ms in slot} == {10.0}


def test_a_slot_holds_as_many_calls_of_a_fast_model_as_of_a_slow_one(clock):
    found = take(clock.models(lambda: 8.0), clock.models(lambda: 0.125))
    slots = (*found.samples.reference, *found.samples.candidate, *found.samples.control)
    assert {len(slot) for slot in slots} == {6}


@pytest.mark.parametrize(("copy_s", "fewest", "most"), [(0.0, 5, 10), (0.2, 2, 2), (30.0, 2, 2)])
def test_copies_are_made_anew_as_far_as_time_allows(clock, copy_s, fewest, most):
    log: list = []
    take(clock.models(lambda: 1.0), clock.models(lambda: 1.0, copy_s=copy_s, log=log))
    assert fewest <= 1 + max(copy for copy, _ in log) <= most


def test_slow_models_too_are_copied_anew(clock):
    log: list = []
    take(clock.models(lambda: 900.0), clock.models(lambda: 900.0, log=log))
    assert max(copy for copy, _ in log) == 1


def test_warming_up_ends_when_times_are_steady(clock):
    times = itertools.chain([50.0] * 9 + [20.0] * 5, itertools.repeat(10.0))
    found = take(clock.models(lambda: 10.0), clock.models(lambda: next(times)))
    assert found.steady
    assert found.warmup_calls > 3 * WARMUP_CALLS
    assert {ms for slot in found.samples.candidate for ms in slot} == {10.0}


def test_times_that_never_become_steady_are_said_to_be_so(clock):
    times = (10.0 * 1.05**i for i in itertools.count())
    found = take(clock.models(lambda: 100.0), clock.models(lambda: min(next(times), 1e5)))
    assert not found.steady


def test_the_garbage_collector_rests_while_calls_are_timed_and_is_woken_again(clock):
    states = set()

    def make():
        clock.ns += 1
        calls = itertools.count()

        def call():
            clock.ns += 10_000_000
            if next(calls) >= WARMUP_CALLS:
                states.add(gc.isenabled())

        return call

    take(make, make, fresh_copies=1)
    assert states == {False}
    assert gc.isenabled()


def test_a_call_that_fails_leaves_the_garbage_collector_on(clock):
    calls = itertools.count()

    def call():
        clock.ns += 10_000_000
        if next(calls) > 3 * WARMUP_CALLS + 5:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        take(lambda: call, lambda: call)
    assert gc.isenabled()


def test_a_call_that_takes_no_time_is_refused(clock):
    with pytest.raises(InvalidInput, match="got 0"):
        take(clock.models(lambda: 0.0), clock.models(lambda: 0.0))


def test_who_looks_on_is_shown_the_blocks_twice_a_second_at_most(clock):
    seen: list = []
    taken = take(
        clock.models(lambda: 50.0),
        clock.models(lambda: 50.0),
        callback=lambda _, blocks: seen.append((clock.ns, len(blocks))),
    )
    assert len(seen) > 3
    assert all(after - before >= 0.5e9 for (before, _), (after, _) in itertools.pairwise(seen))
    assert [count for _, count in seen] == sorted({count for _, count in seen})
    assert not taken.stopped


def test_who_looks_on_can_end_it(clock):
    taken = take(clock.models(lambda: 50.0), clock.models(lambda: 50.0), callback=lambda _, blocks: len(blocks) >= 4)
    assert taken.stopped
    assert 4 <= len(taken.samples) < FEWEST_BLOCKS


def test_an_interrupt_ends_it_with_whole_blocks(clock):
    calls = itertools.count()

    def interrupted():
        if next(calls) > 60:
            raise KeyboardInterrupt
        return 50.0

    taken = take(clock.models(lambda: 50.0), clock.models(interrupted))
    assert taken.stopped
    assert len(taken.samples) >= 2
    arms = (taken.samples.reference, taken.samples.candidate, taken.samples.control)
    assert {len(arm) for arm in arms} == {2 * len(taken.samples)}


def test_an_interrupt_before_anything_was_measured_is_passed_on(clock):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(clock.models(lambda: 50.0), clock.models(interrupted))


@pytest.mark.parametrize("option", ["width", "cap_s", "fresh_copies", "slot_ms"])
def test_options_that_nothing_can_be_measured_with_are_refused(option):
    with pytest.raises(InvalidInput, match=f"`{option}` must be above 0, got 0"):
        take(None, None, **{option: 0})


def test_copies_are_made_in_another_order_each_time(clock):
    made: list = []

    def tagged(arm, make):
        return lambda: made.append(arm) or make()

    take(tagged("reference", clock.models(lambda: 1.0)), tagged("candidate", clock.models(lambda: 1.0)))
    assert len({tuple(made[i : i + 3]) for i in range(0, len(made), 3)}) > 1


def answering(*answers):
    """Return a factory of models that give these answers in turn, the last for ever, in 10 ms each."""

    def make():
        given = itertools.chain(answers, itertools.repeat(answers[-1]))
        return lambda: next(given)

    return make


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["reference", "candidate"])
def test_outputs_that_are_not_finite_are_refused_and_the_model_is_named(bad, name):
    good, broken = answering(torch.ones(2)), answering(torch.tensor([1.0, bad]))
    with pytest.raises(InvalidInput, match=f"{name} gives NaN or infinity. Nothing was timed"):
        take(*((broken, good) if name == "reference" else (good, broken)))


@pytest.mark.parametrize("array", [torch.tensor, np.array])
@pytest.mark.parametrize("name", ["reference", "candidate"])
def test_a_model_that_does_not_reproduce_its_outputs_is_refused_and_named(array, name):
    steady = answering(array([1.0, 2.0]))
    drifting = answering(*(array([1.0, 2.0 + i]) for i in range(20)))
    with pytest.raises(InvalidInput, match=f"two calls of {name} on the same inputs differ"):
        take(*((drifting, steady) if name == "reference" else (steady, drifting)))


def test_copies_of_the_reference_that_disagree_are_refused():
    copies = itertools.count(1)
    with pytest.raises(InvalidInput, match="two of reference differ"):
        take(lambda: answering(torch.ones(2) * next(copies))(), answering(torch.ones(2)))


def test_a_device_s_own_events_time_only_what_runs_in_torch_s_stream():
    assert timing.timer("cpu", {"torch", "openvino"}) is timing.wall_times
    assert timing.timer("cuda", {"torch", "inductor"}) is timing.cuda_times
    for device, runtimes in (("cuda", {"torch", "onnxruntime"}), ("cuda", {"onnxruntime"}), ("mps", {"torch"})):
        assert timing.timer(device, runtimes) not in (timing.wall_times, timing.cuda_times)


def test_a_call_that_is_waited_for_lasts_until_the_device_is_done(clock):
    make_wait, make_call = clock.models(lambda: 3.0), clock.models(lambda: 1.0)
    found = timing._synchronized_times(make_wait(), make_call(), 4)
    assert found == pytest.approx((4.0,) * 4)
    # Once before the first, so that it does not pay for what was still under way.
    assert clock.ns == 1e6 * (3 + 4 * 4)
