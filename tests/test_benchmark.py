import dataclasses
import gc
import itertools
import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shrinkkit import benchmark, records
from shrinkkit.benchmark import FEWEST_BLOCKS, FEWEST_SLOW_BLOCKS, FRESH_CALLS, MARGIN, MOST_CALLS, Blocks
from shrinkkit.errors import InvalidInput, UnfairComparison
from shrinkkit.records import Comparison, Conditions

HERE = Conditions(
    device="cpu", hardware="a processor", runtime="torch", threads=1, batch_size=8, inputs_sha256="0" * 64
)
OTHER = {
    "device": "cuda",
    "hardware": "another",
    "runtime": "onnxruntime",
    "threads": 2,
    "batch_size": 1,
    "inputs_sha256": "1" * 64,
}
WARMUP_CALLS = FRESH_CALLS + 2 * benchmark.WARMUP_WINDOW


class Clock:
    """Time that passes only where a test lets it, in place of the module `time`."""

    def __init__(self):
        self.ns = 0

    def perf_counter(self):
        return self.ns / 1e9

    def perf_counter_ns(self):
        return self.ns

    def models(self, ms: Callable[[], float], *, copy_s: float = 0.0, log: list | None = None):
        """Return a factory of copies that each take `ms()` a call, and log (copy, number of the call)."""
        copies = itertools.count()

        def make():
            self.ns += round(copy_s * 1e9)
            copy, numbers = next(copies), itertools.count()

            def call():
                self.ns += round(ms() * 1e6)
                if log is not None:
                    log.append((copy, next(numbers)))

            return call

        return make


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", clock)
    return clock


def compare(make_reference, make_candidate, **options) -> Comparison:
    return benchmark.compare(
        make_reference,
        make_candidate,
        reference="baseline",
        candidate="variant",
        conditions=HERE,
        candidate_conditions=HERE,
        **options,
    )


def blocks_of(*, speedup: float = 1.0, null: float = 1.0, noise: float = 0.002, count: int = 40, seed: int = 0):
    """Return blocks of four calls a slot, in which the candidate is `speedup` times as fast as the reference."""
    random = Random(seed)

    def slots(ms: float):
        return [tuple(ms * math.exp(random.gauss(0, noise)) for _ in range(4)) for _ in range(2 * count)]

    return Blocks(slots(5.0), slots(5.0 / speedup), slots(5.0 / null))


@pytest.mark.parametrize(
    ("speedup", "verdict"),
    [(2.0, "faster"), (0.5, "slower"), (1.0, "same"), (1.03, "faster"), (0.97, "slower"), (1.01, "undecided")],
)
def test_the_verdict_follows_from_the_blocks(speedup, verdict):
    found = benchmark.conclude(blocks_of(speedup=speedup))
    assert found.verdict == verdict
    assert found.speedup.value == pytest.approx(speedup, rel=0.003)
    assert found.experienced.value == pytest.approx(speedup, rel=0.003)


def test_a_difference_within_the_noise_is_undecided():
    assert benchmark.conclude(blocks_of(speedup=1.02, noise=0.2)).verdict == "undecided"


@pytest.mark.parametrize("null", [1.05, 0.95])
def test_no_verdict_is_given_when_a_copy_of_the_reference_differs_from_it(null):
    found = benchmark.conclude(blocks_of(speedup=2.0, null=null))
    assert found.verdict == "too noisy"
    assert found.speedup.value == pytest.approx(2.0, rel=0.01)


def test_no_verdict_is_given_under_contention():
    assert benchmark.conclude(blocks_of(speedup=2.0), withheld=True).verdict == "too noisy"


def test_a_slow_call_in_every_slot_changes_what_is_experienced_and_not_the_code_speed():
    blocks = blocks_of()
    blocks.candidate = [(slot[0], *(2 * ms for ms in slot[1:])) for slot in blocks.candidate]
    found = benchmark.conclude(blocks)
    assert found.speedup.value == pytest.approx(1.0, rel=0.01)
    assert found.experienced.value == pytest.approx(0.5, rel=0.01)


def test_disturbed_blocks_leave_the_verdict_alone():
    blocks = blocks_of(speedup=1.2)
    for i in range(0, len(blocks.candidate), 9):
        blocks.candidate[i] = tuple(20 * ms for ms in blocks.candidate[i])
    assert benchmark.conclude(blocks).verdict == "faster"


speedups = st.floats(0.2, 5)
noises = st.floats(0, 0.1)


@settings(deadline=None, max_examples=40)
@given(speedups, noises, st.integers(6, 40), st.integers(0, 99))
def test_swapping_the_models_turns_the_verdict_around(speedup, noise, count, seed):
    blocks = blocks_of(speedup=speedup, noise=noise, count=count, seed=seed)
    one = benchmark.conclude(blocks)
    other = benchmark.conclude(Blocks(blocks.candidate, blocks.reference, blocks.candidate))
    assert one.speedup.value == pytest.approx(1 / other.speedup.value)
    assert {one.verdict, other.verdict} not in ({"faster"}, {"slower"})


@settings(deadline=None, max_examples=40)
@given(speedups, noises, st.floats(0.01, 100), st.integers(0, 99))
def test_the_unit_of_time_changes_nothing(speedup, noise, scale, seed):
    blocks = blocks_of(speedup=speedup, noise=noise, count=12, seed=seed)
    scaled = Blocks(*([tuple(scale * ms for ms in slot) for slot in arm] for arm in vars(blocks).values()))
    one, other = benchmark.conclude(blocks), benchmark.conclude(scaled)
    for name in ("value", "low", "high"):
        assert getattr(other.speedup, name) == pytest.approx(getattr(one.speedup, name))


@settings(deadline=None, max_examples=40)
@given(speedups, noises, st.integers(2, 30), st.integers(0, 99))
def test_a_verdict_is_given_only_where_the_whole_interval_allows_it(speedup, noise, count, seed):
    found = benchmark.conclude(blocks_of(speedup=speedup, noise=noise, count=count, seed=seed))
    inside = found.speedup.low > 1 / (1 + MARGIN) and found.speedup.high < 1 + MARGIN
    assert (found.verdict != "faster") or found.speedup.low > 1 + MARGIN
    assert (found.verdict != "slower") or found.speedup.high < 1 / (1 + MARGIN)
    assert (found.verdict != "same") or inside


def test_models_that_are_the_same_are_rarely_called_different():
    found = [benchmark.conclude(blocks_of(noise=0.03, count=20, seed=seed)).verdict for seed in range(120)]
    assert sum(verdict in ("faster", "slower") for verdict in found) <= 1
    assert sum(verdict == "too noisy" for verdict in found) <= 1


@pytest.mark.parametrize("field", list(OTHER))
def test_models_under_different_conditions_are_refused(field):
    with pytest.raises(UnfairComparison, match=field):
        benchmark.compare(
            unused,
            unused,
            reference="a",
            candidate="b",
            conditions=HERE,
            candidate_conditions=dataclasses.replace(HERE, **{field: OTHER[field]}),
        )


@pytest.mark.parametrize("field", [name for name in OTHER if name != "runtime"])
def test_runtimes_under_different_conditions_are_refused(field):
    with pytest.raises(UnfairComparison, match=field):
        benchmark.compare_runtimes(
            unused,
            unused,
            reference="a",
            candidate="b",
            conditions=HERE,
            candidate_conditions=dataclasses.replace(HERE, runtime="onnxruntime", **{field: OTHER[field]}),
        )


def unused():
    raise AssertionError("a model was loaded before the conditions were compared")


def test_every_condition_is_compared():
    assert set(OTHER) == {field.name for field in dataclasses.fields(Conditions)}


def test_runtimes_alone_may_differ_where_they_are_what_is_compared(clock):
    found = benchmark.compare_runtimes(
        clock.models(lambda: 3.0),
        clock.models(lambda: 1.5),
        reference="baseline",
        candidate="baseline",
        conditions=HERE,
        candidate_conditions=dataclasses.replace(HERE, runtime="onnxruntime"),
    )
    assert (found.conditions.runtime, found.candidate_runtime) == ("torch", "onnxruntime")
    assert found.speedup.value == pytest.approx(2.0)


@pytest.mark.parametrize("option", ["width", "cap_s", "layouts", "slot_ms"])
def test_options_that_nothing_can_be_measured_with_are_refused(option):
    with pytest.raises(InvalidInput, match=f"`{option}` must be above 0, got 0"):
        compare(unused, unused, **{option: 0})


def test_a_planted_slow_down_is_found_with_the_right_direction_and_size(clock):
    found = compare(clock.models(lambda: 3.0), clock.models(lambda: 6.0))
    # Other work on the machine that runs this test may withhold the verdict, never turn it.
    assert found.verdict in ("slower", "too noisy")
    assert found.speedup.value == found.experienced.value == pytest.approx(0.5)
    assert (found.reference_ms.value, found.candidate_ms.value) == pytest.approx((3.0, 6.0))
    assert found.null_ratio.value == pytest.approx(1.0)


def test_more_real_work_takes_longer():
    def multiply(size):
        a = np.ones((size, size), dtype=np.float32)
        return lambda: lambda: a @ a

    found = compare(multiply(64), multiply(256), cap_s=0.3)
    assert found.speedup.value < 0.5
    assert found.verdict in ("slower", "too noisy")


def test_a_block_is_a_palindrome_in_which_each_model_runs_twice(clock):
    order = timed_order(clock, seed=0)
    blocks = [order[i : i + 6] for i in range(0, len(order), 6)]
    assert len(blocks) == FEWEST_BLOCKS
    for block in blocks:
        assert block == block[::-1]
        assert sorted(block[:3]) == ["candidate", "null", "reference"]
    assert len({tuple(block) for block in blocks}) > 3


def test_the_order_of_the_blocks_is_that_of_the_seed(clock):
    assert timed_order(clock, seed=1) == timed_order(clock, seed=1)
    assert timed_order(clock, seed=1) != timed_order(clock, seed=2)


def timed_order(clock: Clock, *, seed: int) -> list[str]:
    """Return which arm ran at each timed call, of one call a slot."""
    log: list = []

    def tagged(arm):
        inner = clock.models(lambda: 10.0, log=(own := []))

        def make():
            call = inner()

            def logged():
                call()
                copy, number = own[-1]
                name = arm if arm == "candidate" else ("reference", "null")[copy % 2]
                first = copy == 0 or (copy == 1 and arm == "reference")
                if number >= (WARMUP_CALLS if first else FRESH_CALLS):
                    log.append(name)

            return logged

        return make

    compare(tagged("reference"), tagged("candidate"), seed=seed)
    # The first of each turn's two calls is not recorded.
    assert log[::2] == log[1::2]
    return log[1::2]


def test_measuring_stops_as_soon_as_the_interval_is_narrow(clock):
    assert blocks_in(compare(clock.models(lambda: 3.0), clock.models(lambda: 3.0))) == FEWEST_BLOCKS


def test_measuring_goes_on_to_the_cap_while_the_interval_is_wide_whatever_it_says(clock):
    random = Random(0)
    start = clock.perf_counter()
    found = compare(clock.models(lambda: 3.0), clock.models(lambda: random.uniform(8.0, 24.0)), cap_s=8.0)
    assert blocks_in(found) > FEWEST_BLOCKS
    assert clock.perf_counter() - start > 8.0
    assert found.speedup.high < 0.5


def test_slow_models_get_fewer_blocks_and_never_too_few(clock):
    assert blocks_in(compare(clock.models(lambda: 900.0), clock.models(lambda: 900.0))) == FEWEST_SLOW_BLOCKS


def test_models_too_slow_for_the_cap_still_get_the_fewest_blocks(clock):
    random = Random(0)
    slow = clock.models(lambda: random.uniform(15.0, 30.0))
    assert blocks_in(compare(slow, slow)) == FEWEST_BLOCKS


def blocks_in(found: Comparison) -> int:
    slots = {len(found.reference_samples_ms), len(found.candidate_samples_ms), len(found.null_samples_ms)}
    assert len(slots) == 1
    return slots.pop() // 2


@pytest.mark.parametrize(("ms", "calls"), [(100.0, 1), (2.0, 2), (0.5, 8), (0.001, MOST_CALLS)])
def test_a_slot_holds_the_calls_that_fit(clock, ms, calls):
    found = compare(clock.models(lambda: ms), clock.models(lambda: ms))
    assert {len(slot) for slot in found.reference_samples_ms} == {calls}


def test_the_first_call_of_each_turn_is_not_recorded(clock):
    ran: list = [None]

    def make():
        own = object()

        def call():
            clock.ns += 40_000_000 if ran[-1] is not own else 10_000_000
            ran[-1] = own

        return call

    found = compare(make, make)
    assert {ms for slot in found.candidate_samples_ms for ms in slot} == {10.0}


def test_a_slot_holds_as_many_calls_of_a_fast_model_as_of_a_slow_one(clock):
    found = compare(clock.models(lambda: 8.0), clock.models(lambda: 0.125))
    slots = (*found.reference_samples_ms, *found.candidate_samples_ms, *found.null_samples_ms)
    assert {len(slot) for slot in slots} == {4}


@pytest.mark.parametrize(("copy_s", "fewest", "most"), [(0.0, 5, 10), (0.2, 2, 4), (30.0, 2, 2)])
def test_copies_are_made_anew_as_far_as_time_allows(clock, copy_s, fewest, most):
    log: list = []
    compare(clock.models(lambda: 1.0), clock.models(lambda: 1.0, copy_s=copy_s, log=log))
    assert fewest <= 1 + max(copy for copy, _ in log) <= most


def test_slow_models_too_are_copied_anew(clock):
    log: list = []
    compare(clock.models(lambda: 900.0), clock.models(lambda: 900.0, log=log))
    assert max(copy for copy, _ in log) == 1


def test_warming_up_ends_when_times_are_steady(clock):
    times = itertools.chain([50.0] * 9 + [20.0] * 5, itertools.repeat(10.0))
    found = compare(clock.models(lambda: 10.0), clock.models(lambda: next(times)))
    assert found.steady
    assert found.warmup_calls > 3 * WARMUP_CALLS
    assert found.candidate_ms.value == pytest.approx(10.0)


def test_times_that_never_become_steady_are_said_to_be_so(clock):
    times = (10.0 * 1.05**i for i in itertools.count())
    found = compare(clock.models(lambda: 100.0), clock.models(lambda: min(next(times), 1e5)))
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

    compare(make, make, layouts=1)
    assert states == {False}
    assert gc.isenabled()


def test_a_call_that_fails_leaves_the_garbage_collector_on(clock):
    calls = itertools.count()

    def call():
        clock.ns += 10_000_000
        if next(calls) > 3 * WARMUP_CALLS + 5:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        compare(lambda: call, lambda: call)
    assert gc.isenabled()


def test_a_call_that_takes_no_time_is_refused(clock):
    with pytest.raises(InvalidInput, match="got 0"):
        compare(clock.models(lambda: 0.0), clock.models(lambda: 0.0))


def test_progress_is_told_once_a_second_at_most(clock):
    lines: list = []
    compare(clock.models(lambda: 50.0), clock.models(lambda: 50.0), progress=lambda line: lines.append(clock.ns))
    assert lines
    assert all(after - before >= 1e9 for before, after in itertools.pairwise(lines))


def test_a_comparison_keeps_its_raw_samples_and_survives_the_disk(clock, tmp_path):
    random = Random(0)
    make = clock.models(lambda: random.uniform(1.0, 1.1))
    found = compare(make, make, seed=7)
    records.write(tmp_path / "comparison.json", found)
    assert records.read(tmp_path / "comparison.json", Comparison) == found
    assert found.seed == 7
    samples = [ms for slot in found.reference_samples_ms for ms in slot]
    assert all(ms == float(f"{ms:.6g}") for ms in samples)


def test_what_is_said_follows_from_the_samples_that_are_kept(clock):
    random = Random(0)
    found = compare(clock.models(lambda: random.uniform(1.0, 1.2)), clock.models(lambda: random.uniform(0.5, 0.6)))
    kept = Blocks(*map(list, (found.reference_samples_ms, found.candidate_samples_ms, found.null_samples_ms)))
    again = benchmark.conclude(kept, seed=found.seed)
    assert again.speedup.value == pytest.approx(found.speedup.value, rel=1e-5)
    assert again.null_ratio.high == pytest.approx(found.null_ratio.high, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_more_work_on_a_gpu_takes_longer():
    def multiply(size):
        a = torch.ones(size, size, device="cuda")
        return lambda: lambda: a @ a

    there = dataclasses.replace(HERE, device="cuda")
    found = benchmark.compare(
        multiply(512),
        multiply(8192),
        reference="small",
        candidate="large",
        conditions=there,
        candidate_conditions=there,
        cap_s=1.0,
    )
    assert found.speedup.value < 0.5
