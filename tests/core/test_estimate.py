import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate
from shrinkkit.errors import InvalidInput

binary = st.sampled_from([0.0, 1.0])
finite = st.floats(-1e3, 1e3)
ratios = st.builds(
    lambda value, below, above: Estimate(value, value / below, value * above),
    st.floats(0.1, 10),
    st.floats(1, 3),
    st.floats(1, 3),
)


def test_the_mean_of_zeros_and_ones_has_wilsons_interval():
    found = estimate.mean([1.0] * 8 + [0.0] * 2)
    # Worked by hand: (0.8 + z²/20 ± z √(0.016 + z²/400)) / (1 + z²/10).
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-5)


def test_the_mean_of_other_scores_has_students_interval():
    found = estimate.mean([1.0, 2.0, 3.0])
    assert found.high - found.value == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_perfect_scores_do_not_claim_certainty():
    found = estimate.mean([1.0] * 100)
    assert 0.95 < found.low < 0.97
    assert found.high == 1.0


@pytest.mark.parametrize("scores", [[0.7], [0.1] * 12, [-3.0]])
def test_the_mean_of_equal_scores_is_not_certain(scores):
    found = estimate.mean(scores)
    assert found.low < found.value < found.high


def test_a_difference_without_discordant_pairs_still_has_a_width():
    same = [1.0] * 95 + [0.0] * 5
    found = estimate.paired_difference(same, same)
    assert found.value == 0.0
    assert (found.low, found.high) == pytest.approx((-0.037, 0.037), abs=0.001)


@pytest.mark.parametrize(("gained", "lost", "n"), [(2, 12, 50), (0, 5, 40), (1, 1, 9), (30, 3, 360), (0, 1, 1)])
def test_the_paired_interval_ends_where_the_score_test_rejects(gained, lost, n):
    before = [0.0] * gained + [1.0] * lost + [1.0] * (n - gained - lost)
    after = [1.0] * gained + [0.0] * lost + [1.0] * (n - gained - lost)
    found = estimate.paired_difference(before, after)
    for end in (found.low, found.high):
        if abs(end) < 1 - 1e-9:
            assert abs(score_statistic(gained, lost, n, end)) == pytest.approx(1.959964, rel=1e-3)


def score_statistic(gained: int, lost: int, n: int, difference: float) -> float:
    """Return Tango's statistic with the nuisance parameter found by maximising the likelihood numerically."""

    def loss(share_lost: float) -> float:
        shares = (share_lost + difference, share_lost, 1 - 2 * share_lost - difference)
        counts = (gained, lost, n - gained - lost)
        return -sum(count * math.log(max(share, 1e-300)) for count, share in zip(counts, shares, strict=True) if count)

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    share_lost = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * difference) / math.sqrt(n * (2 * share_lost + difference - difference**2))


def test_turning_the_pairs_around_turns_the_interval_around():
    before, after = [1.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0]
    one, other = estimate.paired_difference(before, after), estimate.paired_difference(after, before)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))


def test_pairing_makes_the_interval_of_scores_narrower():
    hard = np.linspace(0, 1, 2000)
    found = estimate.paired_difference(hard, hard + np.tile([0.01, 0.02], 1000))
    assert found.value == pytest.approx(0.015)
    assert found.high - found.low < 0.01


@pytest.mark.parametrize(("before", "after"), [([0.2, 0.5], [0.3, 0.6]), ([0.5], [0.5]), ([0.3, 0.3], [0.3, 0.3])])
def test_equal_differences_do_not_claim_certainty(before, after):
    found = estimate.paired_difference(before, after)
    assert found.high - found.low > 0.05


def test_scores_of_different_examples_are_refused():
    with pytest.raises(InvalidInput, match="same examples, got 2 and 3"):
        estimate.paired_difference([0.0, 1.0], [0.0, 1.0, 1.0])


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
@pytest.mark.parametrize("of", [estimate.mean, estimate.block_ratio])
def test_nothing_and_not_finite_numbers_are_refused(of, values):
    with pytest.raises(InvalidInput, match="finite"):
        of(values)


def test_one_block_is_no_interval():
    with pytest.raises(InvalidInput, match="at least 2 blocks, got 1"):
        estimate.block_ratio([0.1])


@given(st.lists(binary, min_size=1, max_size=40))
def test_the_mean_of_zeros_and_ones_stays_between_them(scores):
    found = estimate.mean(scores)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


@given(st.lists(st.tuples(binary, binary), min_size=1, max_size=40))
def test_a_paired_difference_of_zeros_and_ones_stays_within_one(pairs):
    found = estimate.paired_difference(*zip(*pairs, strict=True))
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40))
def test_turning_a_ratio_around_inverts_its_value(logs):
    one, other = estimate.block_ratio(logs), estimate.block_ratio([-x for x in logs])
    assert one.low <= one.value <= one.high
    assert one.value == pytest.approx(1 / other.value)


def test_the_same_seed_gives_the_same_interval():
    logs = list(np.random.default_rng(0).normal(0, 0.1, 30))
    assert estimate.block_ratio(logs, seed=3) == estimate.block_ratio(logs, seed=3)


def test_a_drift_in_time_widens_the_interval_of_a_ratio():
    logs = np.random.default_rng(0).normal(0, 0.01, 100)
    still = estimate.block_ratio(logs)
    drifting = estimate.block_ratio(np.repeat(logs[:10], 10))
    assert drifting.high - drifting.low > still.high - still.low


def test_few_wild_blocks_do_not_move_the_ratio():
    logs = np.random.default_rng(0).normal(math.log(2), 0.01, 60)
    logs[::10] += 3
    found = estimate.block_ratio(logs)
    assert found.low < 2 < found.high
    assert found.high - found.low < 0.05


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.02, 1.1, "faster"), (0.9, 0.98, "slower"), (0.995, 1.005, "same"), (1.0, 1.02, "undecided")],
)
def test_a_ratio_gets_a_verdict_only_if_the_whole_interval_allows_it(low, high, verdict):
    assert estimate.verdict(Estimate((low + high) / 2, low, high)) == verdict


@given(ratios)
def test_a_product_of_one_ratio_is_that_ratio(ratio):
    found = estimate.product(ratio)
    assert (found.value, found.low, found.high) == pytest.approx((ratio.value, ratio.low, ratio.high))


@given(ratios, ratios)
def test_a_product_is_wider_than_each_factor_and_narrower_than_both(a, b):
    found = estimate.product(a, b)
    assert found.value == pytest.approx(a.value * b.value)
    assert found.high / found.value >= max(a.high / a.value, b.high / b.value) * (1 - 1e-9)
    assert found.high <= a.high * b.high * (1 + 1e-9)
    assert found.low >= a.low * b.low * (1 - 1e-9)


@pytest.mark.parametrize("factors", [[], [Estimate(1.0, 0.0, 2.0)], [Estimate(-1.0, -2.0, 1.0)]])
def test_a_product_is_of_ratios_above_zero(factors):
    with pytest.raises(InvalidInput, match="0 < low"):
        estimate.product(*factors)


def test_intervals_of_the_mean_cover_the_truth():
    random = np.random.default_rng(1)
    found = [estimate.mean(random.binomial(1, 0.9, 100).astype(float)) for _ in range(400)]
    assert 0.92 <= share_that_holds(found, 0.9) <= 0.985
    found = [estimate.mean(random.normal(2, 1, 12)) for _ in range(400)]
    assert 0.92 <= share_that_holds(found, 2) <= 0.98


def test_intervals_of_a_paired_difference_cover_the_truth():
    random = np.random.default_rng(2)
    found = []
    for _ in range(400):
        kind = random.choice(4, size=200, p=[0.88, 0.03, 0.04, 0.05])
        before, after = np.isin(kind, (0, 2)), np.isin(kind, (0, 1))
        found.append(estimate.paired_difference(before.astype(float), after.astype(float)))
    assert 0.92 <= share_that_holds(found, -0.01) <= 0.985


def test_intervals_of_a_block_ratio_cover_the_truth_of_skewed_blocks_that_resemble_their_neighbours():
    random = np.random.default_rng(3)
    found = []
    for _ in range(150):
        drift = np.repeat(random.normal(0, 0.01, 10), 4)
        found.append(estimate.block_ratio(0.5 + drift + random.laplace(0, 0.02, 40)))
    assert share_that_holds(found, math.exp(0.5)) >= 0.92


def share_that_holds(estimates: list[Estimate], truth: float) -> float:
    return sum(e.low <= truth <= e.high for e in estimates) / len(estimates)
