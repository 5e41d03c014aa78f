"""What is called surely worse, on simulated scores."""

import numpy as np
import pytest

from shrinkkit.core import estimate

RUNS, PAIRS, EXAMPLES = 150, 24, 250


def simulated(worse_by=0.0):
    """Return how many of `RUNS` studies call any of `PAIRS` comparisons different; the first is worse by a share."""
    generator, called = np.random.default_rng(0), 0
    for _ in range(RUNS):
        pairs = []
        for number in range(PAIRS):
            before = generator.random(EXAMPLES) < 0.8
            # Half of the disturbed answers get better, half worse.
            after = np.where(generator.random(EXAMPLES) < 0.1, generator.random(EXAMPLES) < 0.8, before)
            if number == 0:
                after = after & (generator.random(EXAMPLES) >= worse_by)
            pairs.append((before.astype(float).tolist(), after.astype(float).tolist()))
        signs = estimate.differing(pairs)
        called += signs[0] == -1 if worse_by else any(signs)
    return called


def test_equal_models_are_called_different_in_at_most_one_study_of_twenty():
    assert simulated() <= 0.05 * RUNS + 2 * (0.05 * 0.95 * RUNS) ** 0.5


def test_a_loss_of_a_fifth_is_always_found():
    assert simulated(worse_by=0.2) == RUNS


@pytest.mark.parametrize("count", [1, 40])
def test_an_identical_copy_is_never_called_different(count):
    scores = np.random.default_rng(1).random(60).tolist()
    assert estimate.differing([(scores, scores)] * count) == (0,) * count


def test_a_sample_that_is_higher_throughout_is_called_so():
    scores = np.random.default_rng(1).random(200)
    assert estimate.differing([(scores.tolist(), (scores + 0.5).tolist())]) == (1,)
    assert estimate.differing([((scores + 0.5).tolist(), scores.tolist())]) == (-1,)


def test_a_loss_must_be_surely_more_than_what_it_is_compared_with():
    scores = np.random.default_rng(1).random(200)
    pair = (scores.tolist(), (scores - 0.3).tolist())
    assert estimate.differing([pair], by=0.2) == (-1,)
    assert estimate.differing([pair], by=0.4) == (0,)
    assert estimate.differing([pair[::-1]], by=0.2) == (1,)
