"""Values with 95 % intervals: means, paired differences, ratios of times, and verdicts on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, Statement
from shrinkkit.errors import InvalidInput


@dataclass(frozen=True, repr=False)
class Estimate(Rich):
    """A value with its 95 % confidence interval, in the unit of the field that holds it."""

    value: float
    low: float
    high: float

    def shown(self) -> Shown:
        """Return the value with its interval."""
        return Statement(formats.estimate(self))


Z = 1.959964
"""The 97.5 % quantile of the normal distribution."""
ONE_SIDED = 0.025
"""Error probability on each side of a 95 % interval."""
RESAMPLES = 1000
MARGIN = 0.01
"""Ratios of times within this fraction of 1 count as no difference."""


def mean(scores: Sequence[float]) -> Estimate:
    """Return the mean of `scores`: with Wilson's interval if they are all 0 or 1, else with Student's.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    values = _checked(scores)
    n, centre = len(values), float(values.mean())
    if not _binary(values):
        # Equal values do not show how unseen examples vary: widen as the score interval would.
        varies = np.ptp(values) > 1e-12 * _scale(values)
        half = _student_half_width(values) if varies else _scale(values) * Z**2 / (n + Z**2)
        return Estimate(centre, centre - half, centre + half)
    middle = (centre + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(centre * (1 - centre) / n + Z**2 / (4 * n**2))
    return Estimate(centre, max(0.0, min(centre, middle - half)), min(1.0, max(centre, middle + half)))


def paired_difference(baseline: Sequence[float], variant: Sequence[float]) -> Estimate:
    """Return the mean of variant minus baseline over the same examples in order, with an interval by the pairing.

    Scores that are all 0 or 1 get Tango's score interval, which has its coverage even if no example changed. Others
    get Student's interval of the differences, augmented at each end of the scale with as many pseudo-examples as
    Wilson's interval adds: a variant that ruins a few examples may ruin none or one of the sample. The scale is the
    range of the scores, or their largest magnitude if that is more; larger losses per example are not covered.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 1998; Agresti and Coull, "Approximate is better than exact for interval estimation
    of binomial proportions", The American Statistician 1998.
    """
    difference, scores = _paired(baseline, variant)
    centre = float(difference.mean())
    if _binary(scores):
        low, high = _tango(*_discordant(difference))
        return Estimate(centre, low, high)
    middle, error = _augmented(difference, scores)
    half = _quantile(len(difference)) * error
    return Estimate(centre, min(centre, middle - half), max(centre, middle + half))


def within(baseline: Sequence[float], variants: Sequence[Sequence[float]], drop: float) -> tuple[bool, ...]:
    """Return which variants lose less than `drop`, with a family-wise error rate of at most 2.5 %.

    For one variant this is whether its interval lies above -`drop`. For several, Holm's step-down procedure limits the
    probability that any of them is wrongly called within the budget. `drop` is >= 0.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    from scipy.special import ndtr, stdtr

    p_values = []
    for variant in variants:
        difference, scores = _paired(baseline, variant)
        if _binary(scores):
            p_values.append(float(ndtr(-_tango_score(-drop, *_discordant(difference)))))
        else:
            middle, error = _augmented(difference, scores)
            p_values.append(float(stdtr(max(1, len(difference) - 1), -(middle + drop) / error)) if error else 1.0)
    is_within = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if not p_values[index] <= ONE_SIDED / (len(p_values) - rank):
            break
        is_within[index] = True
    return tuple(is_within)


def block_ratio(log_ratios: Sequence[float], *, clusters: int = 10, seed: int = 0) -> Estimate:
    """Return the midmean of the ratios of blocks, with the union of a bootstrap interval and one over clusters in time.

    The midmean (the mean of the middle half) ignores disturbed blocks and varies less than the median. The bootstrap
    alone is too narrow if neighbouring blocks are correlated; the clusters, runs of neighbouring blocks, alone are too
    few. `log_ratios` are natural logarithms, in the order of time, at least 2, all finite.

    Source: Rosenberger and Gasko, "Comparing location estimators: trimmed means, medians, and trimean", 1983.
    """
    values = _checked(log_ratios)
    if len(values) < 2:
        raise InvalidInput(f"`log_ratios` must hold at least 2 blocks, got {len(values)}. Measure longer.")
    centre = float(_middle_half(values))
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(_middle_half(values[picks]), [0.025, 0.975])
    parts = np.array([_middle_half(part) for part in np.array_split(values, min(clusters, len(values)))])
    half = _student_half_width(parts)
    low, high = min(low, parts.mean() - half, centre), max(high, parts.mean() + half, centre)
    return Estimate(math.exp(centre), math.exp(low), math.exp(high))


def verdict(ratio: Estimate) -> str:
    """Return `faster` or `slower` if a ratio of times is beyond the margin with its whole interval.

    `same` if the whole interval is within the margin, else `undecided`.
    """
    upper = 1 + MARGIN
    if ratio.low > upper:
        return "faster"
    if ratio.high < 1 / upper:
        return "slower"
    return "same" if ratio.low > 1 / upper and ratio.high < upper else "undecided"


def inverse(ratio: Estimate) -> Estimate:
    """Return 1 / `ratio`, whose interval must be above 0."""
    return Estimate(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)


def product(*ratios: Estimate) -> Estimate:
    """Return the product of at least one independent ratio; half-widths of logarithms add in quadrature."""
    if not ratios or not all(0 < r.low <= r.value <= r.high < math.inf for r in ratios):
        raise InvalidInput(
            f"`ratios` must each satisfy 0 < low <= value <= high, at least one; got {list(ratios)}. "
            "Pass ratios, not differences."
        )
    value = math.prod(r.value for r in ratios)
    below = math.hypot(*(math.log(r.value / r.low) for r in ratios))
    above = math.hypot(*(math.log(r.high / r.value) for r in ratios))
    return Estimate(value, value * math.exp(-below), value * math.exp(above))


def _checked(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise InvalidInput(f"An interval needs finite numbers, at least one; got {array.size}, not all of them finite.")
    return array


def _middle_half(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the middle half of the last axis."""
    cut = values.shape[-1] // 4
    middle: NDArray[np.float64] = np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)
    return middle


def _binary(values: NDArray[np.float64]) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _scale(scores: NDArray[np.float64]) -> float:
    return max(float(np.ptp(scores)), float(np.abs(scores).max()))


def _paired(baseline: Sequence[float], variant: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the difference of each pair of scores, and all scores."""
    before, after = _checked(baseline), _checked(variant)
    if len(before) != len(after):
        raise InvalidInput(
            f"`baseline` and `variant` must score the same examples, got {len(before)} and {len(after)} scores. "
            "Score one split."
        )
    return after - before, np.concatenate([before, after])


def _discordant(difference: NDArray[np.float64]) -> tuple[int, int, int]:
    """Return how many scores rose, how many fell, and their number."""
    return int((difference > 0).sum()), int((difference < 0).sum()), len(difference)


def _augmented(values: NDArray[np.float64], scores: NDArray[np.float64]) -> tuple[float, float]:
    """Return mean and standard error of `values` with Z^2 / 2 pseudo-examples at each end of the scale of `scores`."""
    total = len(values) + Z**2
    middle = float(values.sum()) / total
    variance = (float((values**2).sum()) + Z**2 * _scale(scores) ** 2) / total - middle**2
    return middle, math.sqrt(max(0.0, variance) / total)


def _quantile(count: int) -> float:
    """Return the 97.5 % quantile of Student's distribution for `count` examples; of two for one."""
    from scipy.special import stdtrit

    return float(stdtrit(max(1, count - 1), 0.975))


def _student_half_width(values: NDArray[np.float64]) -> float:
    if len(values) < 2:
        return 0.0
    return float(_quantile(len(values)) * values.std(ddof=1) / math.sqrt(len(values)))


def _tango(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Return the interval of the difference in proportions if `gained` and `lost` of `n` pairs are discordant."""
    from scipy.optimize import bisect

    centre = (gained - lost) / n

    def root(outside: float, score: float) -> float:
        if outside == centre:
            return centre
        return float(bisect(lambda d: _tango_score(d, gained, lost, n) - score, outside, centre, xtol=1e-15))

    return root(-1.0, Z), root(1.0, -Z)


def _tango_score(d: float, gained: int, lost: int, n: int) -> float:
    """Return the distance of the data from a true difference of `d`, in standard errors."""
    b = -(gained + lost) + (2 * n - gained + lost) * d
    c = -lost * d * (1 - d)
    q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    variance = n * (2 * q + d * (1 - d))
    distance = gained - lost - n * d
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0
