import examples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrinkkit.core import evidence
from shrinkkit.core.estimate import MARGIN
from shrinkkit.core.evidence import PairedSamples


@pytest.mark.parametrize(
    ("speedup", "verdict"),
    [(2.0, "faster"), (0.5, "slower"), (1.0, "same"), (1.03, "faster"), (0.97, "slower"), (1.01, "undecided")],
)
def test_the_verdict_follows_from_the_blocks(speedup, verdict):
    found = evidence.conclude(examples.blocks_of(speedup=speedup))
    assert found.verdict == verdict
    assert found.speedup.value == pytest.approx(speedup, rel=0.003)
    assert found.median_speedup.value == pytest.approx(speedup, rel=0.003)


def test_a_difference_within_the_noise_is_undecided():
    assert evidence.conclude(examples.blocks_of(speedup=1.02, noise=0.2)).verdict == "undecided"


@pytest.mark.parametrize("null", [1.05, 0.95])
def test_no_verdict_is_given_when_a_copy_of_the_reference_differs_from_it(null):
    found = evidence.conclude(examples.blocks_of(speedup=2.0, null=null))
    assert found.verdict == "too noisy"
    assert found.control_ratio.value == pytest.approx(null, rel=0.01)


def test_no_verdict_is_given_under_contention():
    assert evidence.conclude(examples.blocks_of(speedup=2.0), withheld=True).verdict == "too noisy"


def test_a_slow_call_in_every_slot_changes_the_median_speedup_and_not_the_code_speed():
    taken = examples.blocks_of()
    taken.candidate = [(slot[0], *(2 * ms for ms in slot[1:])) for slot in taken.candidate]
    found = evidence.conclude(taken)
    assert found.speedup.value == pytest.approx(1.0, rel=0.01)
    assert found.median_speedup.value == pytest.approx(0.5, rel=0.01)


def test_disturbed_blocks_leave_the_verdict_alone():
    taken = examples.blocks_of(speedup=1.2)
    for i in range(0, len(taken.candidate), 16):
        taken.candidate[i] = tuple(20 * ms for ms in taken.candidate[i])
    assert evidence.conclude(taken).verdict == "faster"


speedups = st.floats(0.2, 5)
noises = st.floats(0, 0.1)


@settings(deadline=None, max_examples=40)
@given(speedups, noises, st.integers(6, 40), st.integers(0, 99))
def test_swapping_the_models_turns_the_verdict_around(speedup, noise, count, seed):
    taken = examples.blocks_of(speedup=speedup, noise=noise, count=count, seed=seed)
    one = evidence.conclude(PairedSamples(taken.reference, taken.candidate, taken.reference))
    other = evidence.conclude(PairedSamples(taken.candidate, taken.reference, taken.candidate))
    assert one.speedup.value == pytest.approx(1 / other.speedup.value)
    assert {one.verdict, other.verdict} not in ({"faster"}, {"slower"})


@settings(deadline=None, max_examples=40)
@given(speedups, noises, st.floats(0.01, 100), st.integers(0, 99))
def test_the_unit_of_time_changes_nothing(speedup, noise, scale, seed):
    taken = examples.blocks_of(speedup=speedup, noise=noise, count=12, seed=seed)
    scaled = PairedSamples(*([tuple(scale * ms for ms in slot) for slot in arm] for arm in vars(taken).values()))
    one, other = evidence.conclude(taken), evidence.conclude(scaled)
    for name in ("value", "low", "high"):
        assert getattr(other.speedup, name) == pytest.approx(getattr(one.speedup, name))


@settings(deadline=None, max_examples=40)
@given(speedups, noises, st.integers(2, 30), st.integers(0, 99))
def test_a_verdict_is_given_only_where_the_whole_interval_allows_it(speedup, noise, count, seed):
    found = evidence.conclude(examples.blocks_of(speedup=speedup, noise=noise, count=count, seed=seed))
    inside = found.speedup.low > 1 / (1 + MARGIN) and found.speedup.high < 1 + MARGIN
    assert (found.verdict != "faster") or found.speedup.low > 1 + MARGIN
    assert (found.verdict != "slower") or found.speedup.high < 1 / (1 + MARGIN)
    assert (found.verdict != "same") or inside


@pytest.mark.slow
def test_stopping_when_the_result_looks_favourable_gives_no_verdict():
    # Forty peeks at models that are the same: a sceptic stops as soon as the interval says what he likes.
    lucky = []
    for seed in range(40):
        taken = examples.blocks_of(noise=0.05, count=60, seed=seed)
        for count in range(2, 61):
            part = PairedSamples(taken.reference[: 2 * count], taken.candidate[: 2 * count], taken.control[: 2 * count])
            if evidence.conclude(part).verdict == "faster":
                lucky.append(part)
                break
    assert lucky
    assert {evidence.conclude(part, stopped=True).verdict for part in lucky} == {"undecided"}


def test_models_that_are_the_same_are_rarely_called_different():
    found = [evidence.conclude(examples.blocks_of(noise=0.03, count=20, seed=seed)).verdict for seed in range(120)]
    assert sum(verdict in ("faster", "slower") for verdict in found) <= 1
    assert sum(verdict == "too noisy" for verdict in found) <= 1


def test_both_copies_of_the_reference_make_the_ratio_surer():
    with_copy, without = [], []
    for seed in range(60):
        taken = examples.blocks_of(noise=0.05, count=20, seed=seed)
        with_copy.append(evidence.conclude(taken).speedup.value)
        without.append(
            evidence.conclude(PairedSamples(taken.reference, taken.candidate, taken.reference)).speedup.value
        )
    spread = [sum((ratio - 1) ** 2 for ratio in found) for found in (with_copy, without)]
    assert spread[0] < 0.95 * spread[1]
