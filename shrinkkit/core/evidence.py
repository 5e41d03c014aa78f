"""The figures of a benchmark, derived from its raw samples: when a record is written, and again when it is read.

A record therefore cannot state figures that its samples contradict, and the latency, the baseline's latency and the
speed-up of a row agree: one baseline is pooled over all comparisons of a target.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Accuracy, Comparison, Measurement, Point, Scores, TargetRecord
from shrinkkit.core.recipe import BASELINE
from shrinkkit.errors import InvalidInput

ROUNDING = 1e-6
"""Relative tolerance below which two scores are equal: floating-point summation order."""
_AGREE = 1e-3

Logs = NDArray[np.float64]
"""Logarithms of times in ms, one for each slot."""
Samples = list[tuple[float, ...]]
"""Call times in ms, one tuple per slot, in the order in which they ran."""
S = TypeVar("S", bound=Scores)
Statistic = Callable[[Sequence[float]], float]
"""Reduces the calls of a slot to one time: `min` for the speed of the code, `statistics.median` for a typical call."""


@dataclass
class PairedSamples:
    """Call times in ms of reference, candidate and A/A control, two slots a block for each, in order of time."""

    reference: Samples = field(default_factory=list)
    candidate: Samples = field(default_factory=list)
    control: Samples = field(default_factory=list)

    def __len__(self) -> int:
        # Whole blocks.
        return min(map(len, vars(self).values())) // 2

    def cut(self) -> None:
        """Drop the slots of an interrupted block."""
        whole = 2 * len(self)
        for arm in vars(self).values():
            del arm[whole:]

    def rounded(self) -> "PairedSamples":
        """Return the samples with six significant digits, which is more than a clock gives."""
        arms = vars(self).values()
        return PairedSamples(*([tuple(float(f"{ms:.6g}") for ms in slot) for slot in arm] for arm in arms))


@dataclass(frozen=True)
class Conclusion:
    """Ratios of reference time to candidate time, latencies, and the verdict."""

    speedup: Estimate
    median_speedup: Estimate
    control_ratio: Estimate
    reference_ms: Estimate
    candidate_ms: Estimate
    verdict: str


def conclude(samples: PairedSamples, *, withheld: bool = False, stopped: bool = False, seed: int = 0) -> Conclusion:
    """Return the ratios and the verdict that at least 2 blocks of samples support.

    Contention may have `withheld` the verdict. Stopping when the result looks favourable biases it (optional stopping),
    so a comparison that was `stopped` by a person gets no verdict.
    """
    speedup = estimate.block_ratio(log_ratios(samples, min), seed=seed)
    median_speedup = estimate.block_ratio(log_ratios(samples, statistics.median), seed=seed)
    control = estimate.block_ratio(_blocks(_slots(samples.reference, min) - _slots(samples.control, min)), seed=seed)
    reference_ms = estimate.block_ratio(_blocks(_reference(samples, min)), seed=seed)
    candidate_ms = estimate.product(reference_ms, estimate.inverse(speedup))
    verdict = "undecided" if stopped else estimate.verdict(speedup)
    if withheld or estimate.verdict(control) in ("faster", "slower"):
        verdict = "too noisy"
    return Conclusion(speedup, median_speedup, control, reference_ms, candidate_ms, verdict)


def log_ratios(samples: PairedSamples, statistic: Statistic) -> list[float]:
    """Return log(reference / candidate) of each block; the reference is the mean of both of its copies."""
    return _blocks(_reference(samples, statistic) - _slots(samples.candidate, statistic))


def _slots(samples: Samples, statistic: Statistic) -> Logs:
    return np.array([math.log(statistic(slot)) for slot in samples])


def _reference(samples: PairedSamples, statistic: Statistic) -> Logs:
    return (_slots(samples.reference, statistic) + _slots(samples.control, statistic)) / 2


def _blocks(slots: Logs) -> list[float]:
    """Return the mean of the two slots of each block."""
    means: list[float] = slots.reshape(-1, 2).mean(axis=1).tolist()
    return means


def derive(record: TargetRecord) -> TargetRecord:
    """Return `record` with every figure computed from its samples and scores; raises InvalidInput if that fails."""
    baseline = next((m for m in record.measurements if m.variant == BASELINE), None)
    scores = baseline.accuracy if baseline else None
    runtime = comparison(record.runtime) if record.runtime else None
    timed = [replace(m, latency=comparison(m.latency)) if m.latency else m for m in record.measurements]
    base_ms = _pooled([m.latency for m in timed if m.latency], runtime)
    sweep = [replace(p, latency=comparison(p.latency)) if p.latency else p for p in record.sweep]

    def derived(m: Measurement) -> Measurement:
        latency_ms = _latency(base_ms, m.latency) if m.variant != BASELINE else None if m.error else base_ms
        return replace(m, latency_ms=latency_ms, accuracy=_accuracy(m, m.reference or scores))

    return replace(record, measurements=tuple(map(derived, timed)), runtime=runtime, sweep=tuple(points(sweep)))


def comparison(stated: Comparison) -> Comparison:
    """Return a comparison with ratios, latencies and verdict computed from its samples."""
    arms = _arms(stated)
    times = np.array([ms for arm in arms for slot in arm for ms in slot], dtype=float)
    even = len({len(arm) for arm in arms}) == 1 and len(arms[0]) >= 4 and len(arms[0]) % 2 == 0
    if not even or not all(slot for arm in arms for slot in arm) or not (np.isfinite(times) & (times > 0)).all():
        raise InvalidInput(
            f"The comparison of {stated.candidate} with {stated.reference} must hold at least 2 blocks of times above "
            f"0 for each model, got slots of {', '.join(str(len(arm)) for arm in arms)}. Measure it again."
        )
    samples, withheld = PairedSamples(*map(list, arms)), stated.disturbance.withheld
    return replace(stated, **vars(conclude(samples, withheld=withheld, stopped=stated.stopped, seed=stated.seed)))


def _arms(of: Comparison) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return of.reference_samples_ms, of.candidate_samples_ms, of.control_samples_ms


def today_ms(record: TargetRecord) -> Estimate | None:
    """Return the latency of the user's own module, from that of the baseline's file; None if it was not timed."""
    base = next((m.latency_ms for m in record.measurements if m.variant == BASELINE), None)
    return estimate.product(base, record.runtime.speedup) if base and record.runtime else None


def changes(before: Sequence[float], after: Sequence[float], *, higher_is_better: bool = True) -> list[float]:
    """Return how much better each example's score is, 0 where it is within rounding."""
    before, after = (before, after) if higher_is_better else (after, before)
    least = ROUNDING * max(map(abs, [*before, *after]), default=0.0)
    return [b - a if abs(b - a) > least else 0.0 for a, b in zip(before, after, strict=True)]


def contradictions(stated: TargetRecord, derived: TargetRecord) -> tuple[str, ...]:
    """Return the names of variants whose stated figures differ from those of the samples."""
    pairs = zip(stated.measurements, derived.measurements, strict=True)
    wrong = [one.variant for one, other in pairs if not _agree(_figures(one), _figures(other))]
    runtimes = [[r.runtime.speedup, r.runtime.verdict] if r.runtime else [] for r in (stated, derived)]
    points = [[f for p in r.sweep for f in (p.latency_ms, p.latency and p.latency.verdict)] for r in (stated, derived)]
    wrong += ["PyTorch today"] if not _agree(*runtimes) else []
    return (*wrong, *(["other workloads, batches and threads"] if not _agree(*points) else []))


def _figures(of: Measurement) -> list[Any]:
    timed = [of.latency.speedup, of.latency.control_ratio, of.latency.verdict] if of.latency else []
    metrics = [of.accuracy, *of.accuracy.further] if of.accuracy else []
    scored: list[Any] = [figure for one in metrics for figure in (one.mean, one.difference)]
    scored += [of.accuracy.regressions] if of.accuracy else []
    return [of.latency_ms, *timed, *scored]


def _agree(*figures: Sequence[Any]) -> bool:
    stated, derived = (
        [value for figure in part for value in (astuple(figure) if isinstance(figure, Estimate) else (figure,))]
        for part in figures
    )

    def is_near(a: Any, b: Any) -> bool:
        floats = isinstance(a, float) and isinstance(b, float)
        return a == b or (floats and math.isclose(a, b, rel_tol=_AGREE, abs_tol=_AGREE**2))

    return len(stated) == len(derived) and all(map(is_near, stated, derived))


def _pooled(compared: Iterable[Comparison], runtime: Comparison | None) -> Estimate | None:
    """Return the baseline's latency, from the fastest call of each slot, pooled over all comparisons."""
    samples = [PairedSamples(*map(list, _arms(one))) for one in compared]
    logs = [log for one in samples for log in _blocks(_reference(one, min))]
    return estimate.block_ratio(logs) if logs else runtime.candidate_ms if runtime else None


def _latency(base_ms: Estimate | None, compared: Comparison | None) -> Estimate | None:
    if base_ms is None or compared is None:
        return None
    return estimate.product(base_ms, estimate.inverse(compared.speedup))


def _accuracy(of: Measurement, baseline: Accuracy | None) -> Accuracy | None:
    if of.accuracy is None:
        return None
    paired = baseline if of.variant != BASELINE else None
    others = {one.metric: one for one in paired.further} if paired else {}
    further = tuple(scores(one, others.get(one.metric)) for one in of.accuracy.further)
    accuracy = replace(scores(of.accuracy, paired), further=further, regressions=0, improvements=0)
    if paired is None:
        return accuracy
    moved = changes(paired.scores, accuracy.scores, higher_is_better=accuracy.higher_is_better)
    return replace(accuracy, regressions=sum(c < 0 for c in moved), improvements=sum(c > 0 for c in moved))


def scores(of: S, baseline: Scores | None) -> S:
    """Return a metric with the figures of its raw data, paired with those of the baseline if there is one."""
    difference = estimate.paired_difference(baseline.sample, of.sample, bounds=of.bounds) if baseline else None
    return replace(of, mean=estimate.mean(of.sample, bounds=of.bounds), difference=difference)


def points(timed: Sequence[Point]) -> Iterator[Point]:
    """Yield the points with latencies derived from one baseline for each workload, batch size and thread count."""
    compared: dict[tuple[str, int, int], list[Comparison]] = {p.setting: [] for p in timed}
    for point in timed:
        compared[point.setting] += [point.latency] if point.latency else []
    base_ms = {key: _pooled(alike, None) for key, alike in compared.items()}
    for point in timed:
        base = base_ms[point.setting]
        latency_ms = base if point.variant == BASELINE else _latency(base, point.latency)
        yield point if point.error else replace(point, latency_ms=latency_ms)
