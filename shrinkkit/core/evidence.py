"""Derivation of every figure of a benchmark from its raw samples, when it is recorded and whenever it is read.

A record therefore cannot state figures that its samples contradict, and the latency, the baseline's latency and the
speed-up of a row agree: one baseline is pooled over all comparisons of a target.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Accuracy, Comparison, Measurement, Point, TargetRecord
from shrinkkit.core.samples import PairedSamples, conclude, reference_logs
from shrinkkit.errors import InvalidInput

BASELINE = "baseline"
ROUNDING = 1e-6
"""Relative tolerance below which two scores are equal: floating-point summation order."""
_AGREE = 1e-3


def derive(record: TargetRecord) -> TargetRecord:
    """Return `record` with every figure computed from its samples and scores.

    Raises:
        InvalidInput: Samples are missing, not positive, or of unequal number; or scores are of unequal number.
    """
    baseline = next((m for m in record.measurements if m.variant == BASELINE), None)
    scores = baseline.accuracy.scores if baseline and baseline.accuracy else None
    runtime = comparison(record.runtime) if record.runtime else None
    timed = [replace(m, latency=comparison(m.latency)) if m.latency else m for m in record.measurements]
    base_ms = _pooled([m.latency for m in timed if m.latency], runtime)
    sweep = [replace(p, latency=comparison(p.latency)) if p.latency else p for p in record.sweep]
    return replace(
        record,
        measurements=tuple(_measurement(m, base_ms, scores) for m in timed),
        runtime=runtime,
        sweep=tuple(points(sweep)),
    )


def comparison(stated: Comparison) -> Comparison:
    """Return a comparison with ratios, latencies and verdict computed from its samples.

    Raises:
        InvalidInput: There are fewer than 2 blocks, or a time is not above 0 and finite.
    """
    arms = (stated.reference_samples_ms, stated.candidate_samples_ms, stated.control_samples_ms)
    times = np.array([ms for arm in arms for slot in arm for ms in slot], dtype=float)
    even = len({len(arm) for arm in arms}) == 1 and len(arms[0]) >= 4 and len(arms[0]) % 2 == 0
    if not even or not all(slot for arm in arms for slot in arm) or not (np.isfinite(times) & (times > 0)).all():
        raise InvalidInput(
            f"The comparison of {stated.candidate} with {stated.reference} must hold at least 2 blocks of times above "
            f"0 for each model, got slots of {', '.join(str(len(arm)) for arm in arms)}. Measure it again."
        )
    conclusion = conclude(
        PairedSamples(*map(list, arms)), withheld=stated.disturbance.withheld, stopped=stated.stopped, seed=stated.seed
    )
    return replace(stated, **vars(conclusion))


def today_ms(record: TargetRecord) -> Estimate | None:
    """Return the latency of the user's own module, from that of the baseline's file; None if it was not timed."""
    base = next((m.latency_ms for m in record.measurements if m.variant == BASELINE), None)
    return estimate.product(base, record.runtime.speedup) if base and record.runtime else None


def changes(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Return the change of each example's score, 0 where it is within rounding."""
    least = ROUNDING * max(map(abs, [*before, *after]), default=0.0)
    return [b - a if abs(b - a) > least else 0.0 for a, b in zip(before, after, strict=True)]


def contradictions(stated: TargetRecord, derived: TargetRecord) -> tuple[str, ...]:
    """Return the names of variants whose stated figures differ from those of the samples."""
    derived_figures = {m.variant: _figures(m) for m in derived.measurements}
    wrong = [m.variant for m in stated.measurements if not _agree(_figures(m), derived_figures[m.variant])]
    runtimes = [[r.runtime.speedup, r.runtime.verdict] if r.runtime else [] for r in (stated, derived)]
    points = [[f for p in r.sweep for f in (p.latency_ms, p.latency and p.latency.verdict)] for r in (stated, derived)]
    wrong += ["PyTorch today"] if not _agree(*runtimes) else []
    return (*wrong, *(["other batches and threads"] if not _agree(*points) else []))


def _figures(of: Measurement) -> list[Any]:
    timed = [of.latency.speedup, of.latency.control_ratio, of.latency.verdict] if of.latency else []
    scored = [of.accuracy.mean, of.accuracy.difference, of.accuracy.regressions] if of.accuracy else []
    return [of.latency_ms, *timed, *scored]


def _agree(stated: Sequence[Any], derived: Sequence[Any]) -> bool:
    def flat(figures: Sequence[Any]) -> Iterator[Any]:
        for figure in figures:
            yield from (figure.value, figure.low, figure.high) if isinstance(figure, Estimate) else (figure,)

    pairs = list(zip(flat(stated), flat(derived), strict=False))
    return len(list(flat(stated))) == len(list(flat(derived))) and all(
        a == b or (isinstance(a, float) and isinstance(b, float) and abs(a - b) <= _AGREE * max(abs(a), abs(b), _AGREE))
        for a, b in pairs
    )


def _pooled(compared: Iterable[Comparison], runtime: Comparison | None) -> Estimate | None:
    """Return the baseline's latency, from the fastest call of each slot, pooled over all comparisons."""
    logs = [log for one in compared for log in reference_logs(_blocks(one))]
    return estimate.block_ratio(logs) if logs else runtime.candidate_ms if runtime else None


def _blocks(of: Comparison) -> PairedSamples:
    return PairedSamples(list(of.reference_samples_ms), list(of.candidate_samples_ms), list(of.control_samples_ms))


def _latency(base_ms: Estimate | None, compared: Comparison | None) -> Estimate | None:
    if base_ms is None or compared is None:
        return None
    return estimate.product(base_ms, estimate.inverse(compared.speedup))


def _measurement(of: Measurement, base_ms: Estimate | None, scores: Sequence[float] | None) -> Measurement:
    latency_ms = (base_ms if not of.error else None) if of.variant == BASELINE else _latency(base_ms, of.latency)
    return replace(of, latency_ms=latency_ms, accuracy=_accuracy(of, scores) if of.accuracy else None)


def _accuracy(of: Measurement, scores: Sequence[float] | None) -> Accuracy:
    assert of.accuracy is not None
    after = of.accuracy.scores
    accuracy = replace(of.accuracy, mean=estimate.mean(after), difference=None, regressions=0, improvements=0)
    if of.variant == BASELINE or scores is None:
        return accuracy
    moved = changes(scores, after) if len(scores) == len(after) else []
    return replace(
        accuracy,
        difference=estimate.paired_difference(scores, after),
        regressions=sum(change < 0 for change in moved),
        improvements=sum(change > 0 for change in moved),
    )


def points(timed: Sequence[Point]) -> Iterator[Point]:
    """Yield the points with latencies derived from one baseline for each batch size and thread count."""
    settings = {(p.batch_size, p.threads) for p in timed}
    base_ms = {
        key: _pooled([p.latency for p in timed if p.latency and (p.batch_size, p.threads) == key], None)
        for key in settings
    }
    for point in timed:
        base = base_ms[point.batch_size, point.threads]
        latency_ms = base if point.variant == BASELINE else _latency(base, point.latency)
        yield point if point.error else replace(point, latency_ms=latency_ms)
