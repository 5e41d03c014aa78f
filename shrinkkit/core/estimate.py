"""Values with 95 % intervals: means, paired differences, ratios of times, and verdicts on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
RESAMPLES, CLUSTERS = 1000, 10
MOST_EXAMPLES = 1e8
"""From which on no number of examples is named as enough."""
MARGIN = 0.01
"""Ratios of times within this fraction of 1 count as no difference."""


@dataclass(frozen=True)
class Resampled:
    """A metric of a whole set of examples, and its value on bootstrap resamples of them.

    A resample draws the same examples for every model, so replicates of two models are paired by position.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.
    """

    value: float
    replicates: tuple[float, ...]
    examples: int


Sample = Sequence[float] | Resampled
"""Raw data of a metric: a score per example, or a value with its replicates."""
Bounds = tuple[float, float] | None
"""Worst and best value of a metric in ascending order, None if they are not known."""


def mean(sample: Sample, *, bounds: Bounds = None) -> Estimate:
    """Return the metric of a model: the mean of scores, with Wilson's interval if they are all 0 or 1, else Student's.

    A metric of a whole set has the percentiles of its replicates; see `paired_difference`.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    if isinstance(sample, Resampled):
        nothing = replace(sample, value=0.0, replicates=(0.0,) * len(sample.replicates))
        return _clamped(_Difference.of(nothing, sample, bounds).interval(), bounds)
    values = _checked(sample)
    n, centre = len(values), float(values.mean())
    if not _binary(values):
        # Equal values do not show how unseen examples vary: widen as the score interval would.
        varies = np.ptp(values) > 1e-12 * _scale(values)
        half = _student_half_width(values) if varies else _scale(values) * Z**2 / (n + Z**2)
        return _clamped(Estimate(centre, centre - half, centre + half), bounds)
    middle = (centre + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(centre * (1 - centre) / n + Z**2 / (4 * n**2))
    return Estimate(centre, max(0.0, min(centre, middle - half)), min(1.0, max(centre, middle + half)))


def paired_difference(baseline: Sample, variant: Sample, *, bounds: Bounds = None) -> Estimate:
    """Return variant minus baseline on the same examples in order, with an interval by the pairing.

    Scores that are all 0 or 1 get Tango's score interval, which has its coverage even if no example changed. Others
    get Student's interval of the differences, augmented at each end of the scale with as many pseudo-examples as
    Wilson's interval adds: a variant that ruins a few examples may ruin none or one of the sample. The scale is the
    range of the metric or of the scores, or their largest magnitude if that is more; larger losses per example are not
    covered. Values of a whole set get percentiles of the differences of replicates, smoothed by the standard error of
    those pseudo-examples. No interval exceeds what `bounds` leave possible.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 1998; Agresti and Coull, "Approximate is better than exact for interval estimation
    of binomial proportions", The American Statistician 1998.
    """
    before = baseline.value if isinstance(baseline, Resampled) else float(np.mean(baseline))
    possible = (bounds[0] - before, bounds[1] - before) if bounds else None
    return _clamped(_Difference.of(baseline, variant, bounds).interval(), possible)


def _clamped(found: Estimate, bounds: Bounds) -> Estimate:
    """Return an estimate whose interval ends at the bounds, unless its value is beyond them."""
    low, high = bounds or (-math.inf, math.inf)
    return Estimate(found.value, max(found.low, min(low, found.value)), min(found.high, max(high, found.value)))


def gain(difference: Estimate | None, *, higher_is_better: bool) -> Estimate | None:
    """Return a difference with the sign by which more is better."""
    if difference is None or higher_is_better:
        return difference
    return Estimate(-difference.value, -difference.high, -difference.low)


def within(
    baseline: Sample, variants: Sequence[Sample], drop: float, *, higher_is_better: bool = True, bounds: Bounds = None
) -> tuple[bool, ...]:
    """Return which variants lose less than `drop`, with a family-wise error rate of at most 2.5 %.

    For one variant this is whether its interval lies above -`drop` (below `drop` where lower is better). For several,
    Holm's step-down procedure limits the probability that any of them is wrongly called within the budget.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    # Where lower is better, what is gained is the difference of the baseline to the variant.
    pairs = [(baseline, one) if higher_is_better else (one, baseline) for one in variants]
    return _holm([_Difference.of(*pair, bounds).p_value(drop) for pair in pairs])


def budget_verdict(is_within: bool, gain: Estimate | None, drop: float) -> str:
    """Return `within budget`, `over budget` if the whole interval of a gain is below -`drop`, or `cannot tell`."""
    return "within budget" if is_within else "over budget" if gain and gain.high < -drop else "cannot tell"


def differing(pairs: Sequence[tuple[Sample, Sample]], *, by: float = 0.0, bounds: Bounds = None) -> tuple[int, ...]:
    """Return for each pair 1 if the second sample is surely higher than the first, -1 if surely lower, else 0.

    Higher or lower by more than `by`, at least 0. Holm's procedure limits the probability that any of them is wrongly
    called higher, or any lower, to 2.5 % each.
    """
    higher = _holm([_Difference.of(first, second, bounds).p_value(-by) for first, second in pairs])
    lower = _holm([_Difference.of(second, first, bounds).p_value(-by) for first, second in pairs])
    return tuple(int(up) - int(down) for up, down in zip(higher, lower, strict=True))


def _holm(p_values: Sequence[float]) -> tuple[bool, ...]:
    """Return which hypotheses are rejected, with a family-wise error rate of at most 2.5 %."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if not p_values[index] <= ONE_SIDED / (len(p_values) - rank):
            break
        rejected[index] = True
    return tuple(rejected)


def needed(
    baseline: Sample, variant: Sample, drop: float, *, higher_is_better: bool = True, bounds: Bounds = None
) -> int | None:
    """Return about how many examples like these would show a loss of less than `drop`; None if none would."""
    difference = _Difference.of(*((baseline, variant) if higher_is_better else (variant, baseline)), bounds)
    n = float(difference.n)
    while n < MOST_EXAMPLES and difference.p_value(drop, n) > ONE_SIDED:
        n *= 1.02
    return math.ceil(n) if n < MOST_EXAMPLES else None


def block_ratio(log_ratios: Sequence[float], *, seed: int = 0) -> Estimate:
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
    parts = np.array([_middle_half(part) for part in np.array_split(values, min(CLUSTERS, len(values)))])
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


def rate(count: int, ms: Estimate) -> Estimate:
    """Return how many things per second are done if `count` take some milliseconds."""
    return Estimate(*(1e3 * count / of for of in (ms.value, ms.high, ms.low)))


def product(*ratios: Estimate) -> Estimate:
    """Return the product of at least one independent ratio; half-widths of logarithms add in quadrature."""
    if not ratios or not all(0 < r.low <= r.value <= r.high < math.inf for r in ratios):
        text = f"`ratios` must each satisfy 0 < low <= value <= high, at least one; got {list(ratios)}."
        raise InvalidInput(f"{text} Pass ratios, not differences.")
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


@dataclass(frozen=True)
class _Difference:
    """The evidence on a mean difference: what its interval and the test of the budget depend on."""

    n: int
    mean: float
    square: float
    """Mean square of the differences of examples."""
    scale: float
    discordant: tuple[int, int] | None = None
    """Pairs gained and lost, if all scores are 0 or 1."""
    replicates: NDArray[np.float64] | None = None
    """Differences on resamples, of a metric of the whole set."""

    @classmethod
    def of(cls, baseline: Sample, variant: Sample, bounds: Bounds) -> "_Difference":
        width = bounds[1] - bounds[0] if bounds else 0.0
        if isinstance(baseline, Resampled) and isinstance(variant, Resampled):
            shared = min(len(baseline.replicates), len(variant.replicates))
            before, after = (_checked(s.replicates[:shared]) for s in (baseline, variant))
            scale = width or max(abs(baseline.value), abs(variant.value))
            value = variant.value - baseline.value
            return cls(_same(baseline.examples, variant.examples), value, 0.0, scale, replicates=after - before)
        if isinstance(baseline, Resampled) or isinstance(variant, Resampled):
            raise InvalidInput("`baseline` and `variant` must both have scores of examples, or a value of the set.")
        before, after = _checked(baseline), _checked(variant)
        n, difference = _same(len(before), len(after)), after - before
        moments = float(difference.mean()), float((difference**2).mean())
        scores = np.concatenate([before, after])
        counts = int((difference > 0).sum()), int((difference < 0).sum())
        scale = max(width, float(np.ptp(scores))) if width else _scale(scores)
        return cls(n, *moments, scale, discordant=counts if _binary(scores) else None)

    def interval(self) -> Estimate:
        if self.discordant:
            return Estimate(self.mean, *_tango(*self.discordant, self.n))
        if self.replicates is not None:
            low, high = (self._percentile(q) for q in (ONE_SIDED, 1 - ONE_SIDED))
        else:
            middle, error = self._augmented(self.n)
            half = _quantile(self.n) * error
            low, high = middle - half, middle + half
        return Estimate(self.mean, min(self.mean, low), max(self.mean, high))

    def p_value(self, drop: float, n: float | None = None) -> float:
        """Return the probability of these data, or of `n` examples like them, if the true difference is -`drop`."""
        from scipy.special import ndtr, stdtr

        n = n or self.n
        if self.discordant:
            gained, lost = (count * n / self.n for count in self.discordant)
            return float(ndtr(-_tango_score(-drop, gained, lost, n)))
        if self.replicates is not None:
            error, spread = self._unseen(n), (self.replicates - self.mean) * math.sqrt(self.n / n)
            # Few replicates do not reach the tails that several variants need; the normal distribution does.
            total = math.hypot(error, float(spread.std()))
            if not total:
                return 1.0
            smoothed = ndtr(-(self.mean + spread + drop) / (error or 1e-12 * total)).mean()
            return max(float(smoothed), float(ndtr(-(self.mean + drop) / total)))
        middle, error = self._augmented(n)
        return float(stdtr(max(1.0, n - 1), -(middle + drop) / error)) if error else 1.0

    def _augmented(self, n: float) -> tuple[float, float]:
        """Return mean and standard error with Z^2 / 2 pseudo-examples at each end of the scale."""
        total = n + Z**2
        middle = n * self.mean / total
        variance = (n * self.square + Z**2 * self.scale**2) / total - middle**2
        return middle, math.sqrt(max(0.0, variance) / total)

    def _unseen(self, n: float) -> float:
        """Return the standard error that the pseudo-examples alone would have."""
        return Z * self.scale / (n + Z**2)

    def _percentile(self, q: float) -> float:
        """Return a percentile of the replicates, smoothed by the standard error of unseen examples."""
        from scipy.optimize import bisect
        from scipy.special import ndtr

        assert self.replicates is not None
        error, replicates = self._unseen(self.n), self.replicates
        if not error:
            return float(np.quantile(replicates, q))
        ends = replicates.min() - 9 * error, replicates.max() + 9 * error
        return float(bisect(lambda x: ndtr((x - replicates) / error).mean() - q, *ends))


def _same(before: int, after: int) -> int:
    if before != after:
        raise InvalidInput(f"`baseline` and `variant` must score the same examples, got {before} and {after} scores.")
    return before


def _quantile(count: int) -> float:
    """Return the 97.5 % quantile of Student's distribution for `count` examples; of two for one."""
    from scipy.special import stdtrit

    return float(stdtrit(max(1, count - 1), 0.975))


def _student_half_width(values: NDArray[np.float64]) -> float:
    n = len(values)
    return float(_quantile(n) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def _tango(gained: float, lost: float, n: float) -> tuple[float, float]:
    """Return the interval of the difference in proportions if `gained` and `lost` of `n` pairs are discordant."""
    from scipy.optimize import bisect

    centre = (gained - lost) / n

    def root(outside: float, score: float) -> float:
        if outside == centre:
            return centre
        return float(bisect(lambda d: _tango_score(d, gained, lost, n) - score, outside, centre, xtol=1e-15))

    return root(-1.0, Z), root(1.0, -Z)


def _tango_score(d: float, gained: float, lost: float, n: float) -> float:
    """Return the distance of the data from a true difference of `d`, in standard errors."""
    b = -(gained + lost) + (2 * n - gained + lost) * d
    c = -lost * d * (1 - d)
    q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    variance = n * (2 * q + d * (1 - d))
    distance = gained - lost - n * d
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0
