"""Simulations of accuracy intervals: how often they hold the true change, and how often chance gets a variant approved.

python tests/benchmarks/coverage.py [--repeats 2000]
"""

import argparse

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Resampled

Scores = NDArray[np.float64]
Classes = NDArray[np.int64]
BUDGET, LOSS, EXAMPLES = 0.01, 0.0101, 800


def ruined(random: np.random.Generator, count: int) -> tuple[Scores, Scores]:
    """Return continuous scores of a baseline, and of a variant that loses half a point on 3 % of the examples."""
    before = random.beta(8, 2, count)
    return before, before + random.normal(0, 0.002, count) - 0.5 * (random.random(count) < 0.03)


def covered(random: np.random.Generator, count: int, repeats: int) -> tuple[float, float]:
    """Return the coverage of the true change of -0.015 by 95 % intervals: Student's, and ours."""
    students = ours = 0
    for _ in range(repeats):
        before, after = ruined(random, count)
        difference = after - before
        half = stats.t.ppf(0.975, count - 1) * difference.std(ddof=1) / count**0.5
        students += abs(difference.mean() + 0.015) <= half
        found = estimate.paired_difference(before, after)
        ours += found.low <= -0.015 <= found.high
    return students / repeats, ours / repeats


def resampled(random: np.random.Generator, count: int, repeats: int) -> tuple[float, float]:
    """Return the coverage of the true change of macro F1 by percentiles alone, and by ours.

    The variant answers at random on 3 % of the examples; the true change is that of a hundred thousand examples.
    """
    labels, *models = _answers(random, 100_000)
    truth, percentiles, ours = _macro_f1(labels, models[1]) - _macro_f1(labels, models[0]), 0, 0
    for _ in range(repeats):
        data, picks = _answers(random, count), random.integers(0, count, (200, count))
        found = [
            Resampled(_macro_f1(data[0], a), tuple(_macro_f1(data[0][i], a[i]) for i in picks), count) for a in data[1:]
        ]
        low, high = np.quantile(np.subtract(found[1].replicates, found[0].replicates), [0.025, 0.975])
        percentiles += low <= truth <= high
        interval = estimate.paired_difference(*found, bounds=(0.0, 1.0))
        ours += interval.low <= truth <= interval.high
    return percentiles / repeats, ours / repeats


def _answers(random: np.random.Generator, count: int) -> tuple[Classes, Classes, Classes]:
    labels = random.integers(0, 10, count)
    before = np.where(random.random(count) < 0.9, labels, random.integers(0, 10, count))
    return labels, before, np.where(random.random(count) < 0.03, random.integers(0, 10, count), before)


def _macro_f1(labels: Classes, answers: Classes) -> float:
    right = np.bincount(labels[labels == answers], minlength=10)
    both = np.bincount(labels, minlength=10) + np.bincount(answers, minlength=10)
    return float((2 * right / np.maximum(1, both)).mean())


def approved(random: np.random.Generator, variants: int, repeats: int) -> tuple[float, float]:
    """Return the share of studies that call a variant within the budget although all lose more: singly, together."""
    singly = together = 0
    for _ in range(repeats):
        before = (random.random(EXAMPLES) < 0.99).astype(float)
        lost = [(random.random(EXAMPLES) < LOSS / before.mean()) & (before == 1) for _ in range(variants)]
        after = [np.where(one, 0.0, before) for one in lost]
        singly += any(estimate.within(before, [one], BUDGET)[0] for one in after)
        together += any(estimate.within(before, after, BUDGET))
    return singly / repeats, together / repeats


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=2000)
    repeats = parser.parse_args().repeats
    random = np.random.default_rng(0)
    print("| test examples | coverage of the true change by 95 % intervals: Student's | shrinkkit's |\n|---|---|---|")
    for count in (20, 50, 100, 400):
        students, ours = covered(random, count, repeats)
        print(f"| {count} | {students:.0%} | {ours:.1%} |", flush=True)
    print("\n| test examples | coverage by percentiles alone | shrinkkit's |\n|---|---|---|")
    for count in (20, 50, 100, 400):
        percentiles, ours = resampled(random, count, repeats // 4)
        print(f"| {count} | {percentiles:.0%} | {ours:.1%} |", flush=True)
    print("\n| variants in the study | each variant by its interval | shrinkkit |\n|---|---|---|")
    for variants in (1, 7, 20):
        singly, together = approved(random, variants, repeats)
        print(f"| {variants} | {singly:.1%} | {together:.1%} |", flush=True)


if __name__ == "__main__":
    main()
