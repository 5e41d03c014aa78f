"""Per-layer latency of the baseline and of each variant, and the causes of slow-downs."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

from shrinkkit.core.measurement import LayerTime, Measurement, TargetRecord
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.target import Place
from shrinkkit.core.variant import LayerAudit, Variant
from shrinkkit.display import formats
from shrinkkit.display.picture import FAINT, HIGHLIGHT, PAPER, SHADES, Picture, canvas, picture
from shrinkkit.display.tables import Cell, Row, Several, Shown, Statement, Table, table
from shrinkkit.results import diagnosis
from shrinkkit.results.diagnosis import LONGER, NOTABLE, total_ms

COLUMNS = 6
"""Variants of a table at most."""
NAMED = 4
"""Layers that a chart names; the others are summed."""
SHOWN = 0.01
"""Fraction of the latency, before or after, below which a layer has no separate row."""
DISTURBED = 1.5
"""Layer times that add up to more than this many times the latency are not shown."""

_GAP: dict[str, Any] = {"linewidth": 0.7, "edgecolor": PAPER}
_NONE: Mapping[str, str] = MappingProxyType({})
_REST, _OUTSIDE, _CONVERSIONS, _NOWHERE = "other layers", "outside the layers", "conversions", "(in no layer)"
_OTHER_COLOURS = {_REST: SHADES[4], _OUTSIDE: FAINT, _CONVERSIONS: HIGHLIGHT}


def layers(record: TargetRecord, variants: Mapping[str, Variant]) -> Several:
    """Return the latency by layer of every variant on one target: a chart, causes of slow-downs, and tables."""
    measured = {m.variant: m for m in record.measurements if m.layers and m.variant in variants}
    valid = {name: m for name, m in measured.items() if _is_valid(m)}
    parts: list[Shown] = [_disturbed(m, record.target) for name, m in measured.items() if name not in valid]
    if not valid:
        return Several((*parts, Statement(f"No per-layer latency on {record.target}.", tone="warning")))
    parts.insert(0, _chart(valid, variants, record.target))
    for name, measurement in valid.items():
        timed, sentences = measurement.latency, causes(measurement, variants[name], record)
        if timed and sentences:
            text = f"{name} on {record.target}: {formats.speedup(timed.speedup, timed.verdict)} vs. the baseline."
            parts.append(Statement(text, sentences, "bad" if timed.verdict == "slower" else ""))
    names = [name for name in valid if name != BASELINE]
    for i in range(0, max(1, len(names)), COLUMNS):
        columns = {name: m for name, m in valid.items() if name in (BASELINE, *names[i : i + COLUMNS])}
        parts.append(_table(columns, variants, record))
    return Several(tuple(parts))


def causes(measurement: Measurement, variant: Variant, record: TargetRecord) -> tuple[str, ...]:
    """Return why a variant is not faster, or why its conversions matter; empty if the layer times show no cause."""
    timed, before = measurement.latency, next((m for m in record.measurements if m.variant == BASELINE), None)
    if timed is None or not _is_valid(measurement):
        return ()
    options: dict[str, Any] = {"runtime": _runtime(record), "denormals": measurement.denormals}
    baseline = before.layers if before and _is_valid(before) else ()
    sentences = diagnosis.slow_down(
        baseline, measurement.layers, variant.audit, speedup=timed.speedup, verdict=timed.verdict, **options
    )
    converting = total_ms([t for t in measurement.layers if t.converts]) >= NOTABLE * total_ms(measurement.layers)
    return () if timed.verdict == "faster" and not converting else sentences


def _is_valid(measurement: Measurement) -> bool:
    return total_ms(measurement.layers) <= DISTURBED * _latency_ms(measurement)


def _latency_ms(measurement: Measurement) -> float:
    """Return the latency, infinite where it was not timed."""
    return measurement.latency_ms.value if measurement.latency_ms else math.inf


def _disturbed(measurement: Measurement, target: str) -> Statement:
    layers, latency = map(formats.milliseconds, (total_ms(measurement.layers), _latency_ms(measurement)))
    return Statement(
        f"The layer times of {measurement.variant} on {target} are not shown: they add up to {layers}, but the latency "
        f"is {latency}, so other processes used the CPU. Run again on a quieter machine.",
        tone="warning",
    )


def _runtime(record: TargetRecord) -> str:
    return Place.parse(record.target).target.runtime


def _chart(measured: Mapping[str, Measurement], variants: Mapping[str, Variant], target: str) -> Picture:
    times = {name: _by_layer(m.layers, variants[name].audit) for name, m in measured.items()}
    longest = {layer: max(own.get(layer, 0.0) for own in times.values()) for layer in {*chain(*times.values())}}
    named = sorted(longest.keys() - {_OUTSIDE, _CONVERSIONS}, key=lambda layer: (-longest[layer], layer))[:NAMED]
    colours = dict(zip(named, SHADES, strict=False)) | _OTHER_COLOURS
    bars = {name: _segments(own, named) for name, own in times.items()}
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    with canvas(9.2, 0.34 * len(bars) + 1.1) as figure:
        axes = figure.subplots()
        lefts = [0.0] * len(bars)
        for layer, colour in colours.items():
            widths = [own.get(layer, 0.0) for own in bars.values()]
            if any(widths):
                boxes = [
                    Path(((x, y - 0.33), (end, y - 0.33), (end, y + 0.33), (x, y + 0.33), (x, y - 0.33)), closed=True)
                    for y, (x, width) in enumerate(zip(lefts, widths, strict=True))
                    if (end := x + width) > x
                ]
                # One path for a layer weighs a fraction of a bar for each variant.
                axes.add_patch(PathPatch(Path.make_compound_path(*boxes), facecolor=colour, label=layer, **_GAP))
                lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        for y, ms in enumerate(lefts):
            axes.annotate(formats.milliseconds(ms), (ms, y), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(bars)), list(map(formats.wrapped, bars)))
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * max(lefts))
        axes.set_xlabel("latency by layer, ms")
        axes.grid(axis="x", color=FAINT)
        figure.legend(loc="outside upper right", ncols=4)
        words = " ".join(f"{name}: {_in_words(own)}." for name, own in bars.items())
        return picture(
            figure,
            f"Latency by layer on {target}. {words}",
            f"Latency by layer on {target}. Named: the slowest layers; conversions change number formats or memory "
            "layouts. Every operator is timed separately from the latencies above, so sums differ slightly.",
        )


def _by_layer(times: Sequence[LayerTime], audit: Sequence[LayerAudit]) -> dict[str, float]:
    """Return the ms of each layer with weights, of all other operators, and of conversions."""
    layers = {row.layer for row in audit}
    by_layer: dict[str, float] = defaultdict(float)
    for time in times:
        by_layer[_CONVERSIONS if time.converts else time.layer if time.layer in layers else _OUTSIDE] += time.ms
    return by_layer


def _segments(by_layer: Mapping[str, float], named: Sequence[str]) -> dict[str, float]:
    rest = sum(ms for layer, ms in by_layer.items() if layer not in (*named, _OUTSIDE, _CONVERSIONS))
    parts = {layer: by_layer.get(layer, 0.0) for layer in (*named, _OUTSIDE, _CONVERSIONS)} | {_REST: rest}
    return {layer: parts[layer] for layer in (*named, _REST, _OUTSIDE, _CONVERSIONS) if parts[layer] > 0}


def _in_words(by_layer: Mapping[str, float]) -> str:
    parts = ", ".join(f"{layer} {formats.milliseconds(ms)}" for layer, ms in by_layer.items())
    return f"{formats.milliseconds(sum(by_layer.values()))}, of which {parts}"


def _table(measured: Mapping[str, Measurement], variants: Mapping[str, Variant], record: TargetRecord) -> Table:
    """Return the latency of each layer, a column for each variant, in execution order."""
    operators = {name: _operators(m.layers) for name, m in measured.items()}
    totals = {name: total_ms(m.layers) for name, m in measured.items()}
    layers = {row.layer for name in measured for row in variants[name].audit}
    times = {
        layer: {name: sum(own.get(layer, {}).values()) for name, own in operators.items()}
        for layer in dict.fromkeys(chain(*operators.values()))
    }
    small = [layer for layer, own in times.items() if all(ms < SHOWN * totals[name] for name, ms in own.items())]
    rows: list[Row] = []
    for layer in (layer for layer in times if layer not in small):
        used = dict.fromkeys(chain(*(own.get(layer, {}) for own in operators.values())))
        precision = {name: _runs_as(variants[name], layer, record) for name in measured}
        row = _times(times[layer], precision, is_layer=layer in layers)
        rows.append({"layer": layer, "operators": Cell(", ".join(used), tone="quiet"), **row})
    if small:
        name = f"{formats.counted(len(small), 'row')} below {formats.percent(SHOWN)} each"
        sums = {name: sum(times[layer][name] for layer in small) for name in measured}
        rows.append({"layer": name, "operators": "", **_times(sums)})
    rows.append({"layer": "total", "operators": "", **_times(totals)})
    fractions = [f"{totals[name] / _latency_ms(m):.0%} of {name}" for name, m in measured.items() if m.latency_ms]
    note = "Medians of single operators in ms, with the speed-up over the baseline, and the precision if not FP32."
    note += f" Their sum, as a part of the latency: {', '.join(fractions)}." if fractions else ""
    caption = f"Layers on {record.target}: {', '.join(name for name in measured if name != BASELINE) or BASELINE}"
    return table(caption, rows, note, text=("operators",), folded=True, shaded=True)


def _operators(times: Sequence[LayerTime]) -> dict[str, dict[str, float]]:
    """Return the ms of each operator by layer; conversions, and operators in no layer, are separate rows."""
    by_layer: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for time in times:
        by_layer[_CONVERSIONS if time.converts else time.layer or _NOWHERE][time.operator] += time.ms
    return by_layer


def _times(times: Mapping[str, float], precision: Mapping[str, str] = _NONE, *, is_layer: bool = False) -> Row:
    before = times.get(BASELINE, 0.0)
    row: dict[str, Cell | str] = {}
    for name, ms in times.items():
        ratio = before / ms if before and ms and name != BASELINE else 0.0
        tone = "" if not ratio else "bad" if ratio < 1 / LONGER else "good" if ratio > LONGER else ""
        aside = ", ".join(filter(None, [formats.times(ratio) if ratio else "", precision.get(name, "")]))
        fused = Cell("fused", tone="quiet") if is_layer and before else ""
        row[name] = Cell(formats.digits(ms), aside, tone) if ms else fused
    return row


def _runs_as(variant: Variant, layer: str, record: TargetRecord) -> str:
    """Return the precision in which the runtime computes a layer, '' if it is float32 or unknown."""
    audit = next((row for row in variant.audit if row.layer == layer), None)
    precision = audit.precision.get(_runtime(record)) if audit else None
    return precision.runs_as if precision and precision.runs_as != "float32" else ""
