"""The data of the interactive accuracy-speed chart: a point per variant and target, and the verdict at every budget."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shrinkkit.core.recipe import BASELINE
from shrinkkit.display import formats
from shrinkkit.display.formats import Estimated
from shrinkkit.display.picture import COLOURS, MARKERS, style
from shrinkkit.results.results import CONCLUSIVE, Results, Row, accuracy_verdicts
from shrinkkit.results.verdict import decide

MULTIPLES = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10, 15, 20, 30, 50)
"""Stops of the budget slider, as multiples of the study's budget."""
_NOTE = (
    "Up, and along the arrow, is better; bars are 95 % CIs. Filled: within the budget, corrected for the number of "
    "variants (Holm) as in the summary. Hollow: inconclusive, or with a red bar over budget. Pale: inconclusive "
    "timing. Small and grey: variants that are not in the legend. Marks in a band at the edge are beyond the axis. "
    "Arrow keys move between marks. The budget also applies to the table of results."
)


def data(results: Results, rows: Sequence[Row], named: Sequence[str]) -> str:
    """Return the chart's data as JSON: the `rows` to draw, with a speed-up and a difference, and the verdicts.

    Whether a variant is within a budget, and which one is recommended, is decided here for every stop of the slider, by
    the rules of the verdict: the page only looks it up. Variants in `named` have a colour and mark, in the order of
    `picture.style`; others are grey.
    """
    targets = [target for target in results.targets if any(row.target == target for row in rows)]
    baselines = [r for r in results.rows if r.variant == BASELINE and r.target in targets and r.state == "measured"]
    shown = [*baselines, *rows]
    places = {(row.variant, row.target): i for i, row in enumerate(shown)}
    drops = _drops(results)
    at_drops = [_with_budget(results, drop) for drop in drops]
    parts = [[_only(at, target) for at in at_drops] for target in targets]
    states = [{(r.variant, r.target): r.accuracy_verdict for r in at.rows} for at in at_drops]
    looks = [(COLOURS.index(look["color"]), MARKERS.index(look["marker"])) for look in map(style, range(len(named)))]

    def recommended(at: Results) -> int | None:
        """Return the place of the point that the verdict recommends; None if no variant is surely within budget."""
        verdict = decide(at)
        row = verdict.row if verdict.kind == "within budget" else None
        return places.get((row.variant, row.target)) if row else None

    content = {
        "note": _NOTE,
        "metric": results.metric,
        "unit": " pts" if results.is_fraction else "",
        "better": 1 if results.higher_is_better else -1,
        "targets": [results.where(target) for target in targets],
        "drops": [_scale(results) * drop for drop in drops],
        "budgets": [at.budget_text() for at in at_drops],
        "start": drops.index(results.budget.accuracy_drop),
        "recommended": [[*map(recommended, each)] for each in (at_drops, *parts)],
        "variants": [[BASELINE, None, 0], *([name, *look] for name, look in zip(named, looks, strict=True))],
        "points": [
            {
                **_point(row, results),
                "target": targets.index(row.target),
                "states": "".join(state.get((row.variant, row.target), "")[:1] for state in states),
            }
            for row in shown
        ],
    }
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def _drops(results: Results) -> list[float]:
    """Return the stops of the slider, the study's budget among them."""
    drop = results.budget.accuracy_drop
    changes = [abs(row.difference.value) for row in results.rows if row.difference]
    unit = drop or (0.01 if results.is_fraction else max(changes, default=0.0) / 10) or 1.0
    stops = {drop, *(float(f"{multiple * unit:.6g}") for multiple in MULTIPLES if multiple != 1 or not drop)}
    return sorted(stop for stop in stops if stop <= 1 or not results.is_fraction)


def _with_budget(results: Results, drop: float) -> Results:
    """Return the results with the verdicts on accuracy that another budget would give."""
    verdicts = {target: accuracy_verdicts(record, drop) for target, record in results.measured.items()}
    rows = tuple(
        replace(row, accuracy_verdict=verdicts[row.target].get(row.variant, "")) if row.accuracy_verdict else row
        for row in results.rows
    )
    return replace(results, rows=rows, budget=results.budget.model_copy(update={"accuracy_drop": drop}))


def _only(results: Results, target: str) -> Results:
    rows = tuple(row for row in results.rows if row.target == target)
    return replace(results, targets=(target,), rows=rows, measured={target: results.measured[target]})


def _scale(results: Results) -> int:
    return 100 if results.is_fraction else 1


def _ends(of: Estimated | None, scale: float = 1) -> list[float] | None:
    return [_rounded(scale * end) for end in (of.value, of.low, of.high)] if of else None


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _point(row: Row, results: Results) -> dict[str, Any]:
    """Return what is drawn of a row, and the lines of text that describe it."""
    measurement = results.measurement(row)
    memory = measurement.memory.peak_bytes if measurement and measurement.memory else None
    timed = results.measured[row.target].runtime
    batch = timed.conditions.batch_size if timed else 0
    lines = [formats.speedup(row.speedup_today, row.timing_today) or "the reference"]
    if row.difference:
        change = formats.change(row.difference.value, is_fraction=results.is_fraction)
        change = formats.with_ci(change, row.difference, is_fraction=results.is_fraction)
        lines += [f"{results.metric_title} {change}"]
    lines += [f"{formats.estimate(row.latency_ms, unit=' ms')} / batch"] if row.latency_ms else []
    lines += [f"file size {formats.size(row.size_bytes)}"] if row.size_bytes else []
    lines += [f"peak memory {formats.size(memory)}"] if memory else []
    return {
        "name": row.variant,
        "speedup": _ends(row.speedup_today),
        "latency": _ends(row.latency_ms),
        "size": [row.size_bytes] if row.size_bytes else None,
        "memory": [memory] if memory else None,
        "throughput": [_rounded(1e3 * batch / row.latency_ms.value)] if batch and row.latency_ms else None,
        "change": _ends(row.difference, _scale(results)) or [0.0],
        "pale": row.variant != BASELINE and row.timing_today not in CONCLUSIVE,
        "lines": lines,
    }
