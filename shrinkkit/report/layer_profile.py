"""Per-layer latency of the baseline and of each variant, and the causes of slow-downs."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain

from shrinkkit.core.measurement import LayerTime, Measurement, TargetRecord
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.target import Place
from shrinkkit.core.variant import LayerAudit, Variant
from shrinkkit.display import formats
from shrinkkit.display.picture import COLOURS, FAINT, Picture, canvas, picture
from shrinkkit.display.tables import Cell, Row, Several, Shown, Statement, Table, table
from shrinkkit.results import diagnosis
from shrinkkit.results.diagnosis import LONGER, NOTABLE, total_ms

NAMED = 4
"""Layers that a chart names; the others are summed."""
SHOWN = 0.01
"""Fraction of the latency, before or after, below which a layer has no separate row."""
DISTURBED = 1.5
"""Layer times that add up to more than this many times the latency are not shown."""

_REST, _OUTSIDE, _CONVERSIONS, _NOWHERE = "other layers", "outside the layers", "conversions", "(in no layer)"
_LAYER_COLOURS = (COLOURS[0], COLOURS[2], COLOURS[3], COLOURS[4])
_OTHER_COLOURS = {_REST: COLOURS[5], _OUTSIDE: FAINT, _CONVERSIONS: COLOURS[1]}


def layers(record: TargetRecord, variants: Mapping[str, Variant]) -> Several:
    """Return the latency by layer of every variant on one target: a chart, causes of slow-downs, and a table each."""
    measured = {m.variant: m for m in record.measurements if m.layers and m.variant in variants}
    valid = {name: m for name, m in measured.items() if total_ms(m.layers) <= DISTURBED * _latency_ms(m)}
    parts: list[Shown] = [_disturbed(m, record.target) for name, m in measured.items() if name not in valid]
    if not valid:
        return Several((*parts, Statement(f"No per-layer latency on {record.target}.", tone="warning")))
    before = valid[BASELINE].layers if BASELINE in valid else ()
    parts.insert(0, _chart(valid, variants, record.target))
    for name, measurement in valid.items():
        if name != BASELINE:
            parts += _diagnosis(measurement, before, variants[name], record)
    compressed = {name: m for name, m in valid.items() if name != BASELINE} or valid
    parts += [_table(m, before, variants[name], record) for name, m in compressed.items()]
    return Several(tuple(parts))


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


def _diagnosis(
    measurement: Measurement, before: Sequence[LayerTime], variant: Variant, record: TargetRecord
) -> list[Shown]:
    """Return the causes why a variant is not faster, or why its conversions matter."""
    timed = measurement.latency
    if timed is None:
        return []
    sentences = diagnosis.slow_down(
        before,
        measurement.layers,
        variant.audit,
        runtime=_runtime(record),
        denormals=measurement.denormals,
        speedup=timed.speedup,
        verdict=timed.verdict,
    )
    converting = total_ms([t for t in measurement.layers if t.converts]) >= NOTABLE * total_ms(measurement.layers)
    if not sentences or (timed.verdict == "faster" and not converting):
        return []
    text = f"{variant.name} on {record.target}: {formats.speedup(timed.speedup, timed.verdict)} vs. the baseline."
    return [Statement(text, sentences, "bad" if timed.verdict == "slower" else "")]


def _runtime(record: TargetRecord) -> str:
    return Place.parse(record.target).target.runtime


def _chart(measured: Mapping[str, Measurement], variants: Mapping[str, Variant], target: str) -> Picture:
    times = {name: _by_layer(m.layers, variants[name].audit) for name, m in measured.items()}
    longest = {layer: max(own.get(layer, 0.0) for own in times.values()) for layer in {*chain(*times.values())}}
    named = sorted(longest.keys() - {_OUTSIDE, _CONVERSIONS}, key=lambda layer: (-longest[layer], layer))[:NAMED]
    colours = dict(zip(named, _LAYER_COLOURS, strict=False)) | _OTHER_COLOURS
    bars = {name: _segments(own, named) for name, own in times.items()}
    with canvas(9.2, 0.34 * len(bars) + 1.1) as figure:
        axes = figure.subplots()
        lefts = [0.0] * len(bars)
        for layer, colour in colours.items():
            widths = [own.get(layer, 0.0) for own in bars.values()]
            if any(widths):
                axes.barh(range(len(bars)), widths, left=lefts, height=0.66, color=colour, linewidth=0, label=layer)
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


def _table(measurement: Measurement, before: Sequence[LayerTime], variant: Variant, record: TargetRecord) -> Table:
    """Return a variant's layers with the baseline's latencies, in execution order."""
    is_baseline = measurement.variant == BASELINE
    now, old = _operators(measurement.layers), _operators(() if is_baseline else before)
    total, total_before = total_ms(measurement.layers), total_ms(before)
    rows: list[Row] = []
    small: list[tuple[float, float]] = []
    audit = {row.layer: row for row in variant.audit}
    for layer in dict.fromkeys([*now, *(layer for layer in old if layer in audit)]):
        ms, ms_before = sum(now.get(layer, {}).values()), sum(old.get(layer, {}).values())
        if ms < SHOWN * total and ms_before < SHOWN * total_before:
            small.append((ms, ms_before))
            continue
        operators = ", ".join(now[layer]) if layer in now else "fused into another layer"
        names: Row = {"layer": layer, "operators": Cell(operators, tone="quiet")}
        rows.append({**names, **_times(ms, ms_before, total), **_layer(audit.get(layer), _runtime(record))})
    if small:
        name = f"{formats.counted(len(small), 'row')} below {formats.percent(SHOWN)} each"
        ms, ms_before = map(sum, zip(*small, strict=True))
        rows.append({"layer": name, **_times(ms, ms_before, total)})
    note = "Medians of single operators."
    if measurement.latency_ms:
        fraction = formats.percent(total / measurement.latency_ms.value)
        note += f" Their sum is {fraction} of the latency, {formats.milliseconds(measurement.latency_ms.value)}."
    caption = f"{variant.name} on {record.target}: {formats.milliseconds(total)} in total"
    return table(caption, rows, note, text=("operators", "runs as"), folded=True)


def _operators(times: Sequence[LayerTime]) -> dict[str, dict[str, float]]:
    """Return the ms of each operator by layer; conversions, and operators in no layer, are separate rows."""
    by_layer: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for time in times:
        by_layer[_CONVERSIONS if time.converts else time.layer or _NOWHERE][time.operator] += time.ms
    return by_layer


def _times(ms: float, before: float, total: float) -> Row:
    ratio = before / ms if before and ms else 0.0
    tone = "bad" if ratio < 1 / LONGER else "good" if ratio > LONGER else "quiet"
    return {
        "baseline": formats.milliseconds(before) if before else "",
        "latency": Cell(formats.milliseconds(ms), formats.percent(ms / total)) if ms else "",
        "speed-up": Cell(formats.times(ratio), tone=tone) if ratio else "",
    }


def _layer(row: LayerAudit | None, runtime: str) -> Row:
    if row is None:
        return {"channels": "", "runs as": ""}
    channels = "" if row.channels is None else str(row.channels)
    if row.lost_channels:
        channels = f"{row.channels_before} \N{RIGHTWARDS ARROW} {channels}"
    runs_as = row.precision[runtime].runs_as if runtime in row.precision else "float32"
    return {
        "channels": Cell(channels, tone="" if row.lost_channels else "quiet"),
        "runs as": Cell(runs_as, tone="quiet"),
    }
