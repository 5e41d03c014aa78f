"""Where the time of a call goes, layer by layer, in the baseline and in each variant, and why a variant is slow."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shrinkkit.core.measurement import LayerTime, Measurement, TargetRecord
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.target import Place
from shrinkkit.core.variant import LayerAudit, Variant
from shrinkkit.display import formats
from shrinkkit.display.picture import COLOURS, FAINT, Picture, canvas, picture
from shrinkkit.display.tables import Cell, Column, Several, Shown, Statement, Table
from shrinkkit.results import diagnosis
from shrinkkit.results.diagnosis import LONGER, NOTABLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


NAMED = 4
"""Layers that a picture names; the others are summed."""
SHOWN = 0.01
"""Share of a call's time, before or after, below which a layer has no row of its own."""
DISTURBED = 1.5
"""Times by layer that add up to more than this many times the latency are not shown."""

_REST, _OUTSIDE, _CONVERSIONS, _NOWHERE = "other layers", "outside the layers", "conversions", "(in no layer)"
_CONVERSION_COLOUR = COLOURS[1]
_LAYER_COLOURS = (COLOURS[0], COLOURS[2], COLOURS[3], COLOURS[4])


def layers(record: TargetRecord, variants: Mapping[str, Variant]) -> Several:
    """Return the time by layer of every variant on one target: a picture, what explains slow ones, and a table each.

    Args:
        record: The target's benchmark; its `target` may name a place.
        variants: The records of the variants, by name; their audits tell which layers there are, and how they run.
    """
    measured = {m.variant: m for m in record.measurements if m.layers and m.variant in variants}
    timed = {name: one for name, one in measured.items() if _total(one.layers) <= DISTURBED * _latency(one)}
    parts: list[Shown] = [_disturbed(one, record.target) for name, one in measured.items() if name not in timed]
    if not timed:
        return Several((*parts, Statement(f"There is no time by layer on {record.target}.", tone="warning")))
    before = timed[BASELINE].layers if BASELINE in timed else ()
    parts.insert(0, _picture(timed, variants, record.target))
    for name, one in timed.items():
        if name != BASELINE:
            parts += _explained(one, before, variants[name], record.target)
    parts += [_table(one, before, variants[name], record.target) for name, one in timed.items()]
    return Several(tuple(parts))


def _disturbed(one: Measurement, target: str) -> Statement:
    took, latency = formats.milliseconds(_total(one.layers)), formats.milliseconds(_latency(one))
    return Statement(
        f"The times by layer of {one.variant} on {target} are not shown: they add up to {took} where a call takes "
        f"{latency}, so something else used the machine meanwhile. Run again when it is quiet.",
        tone="warning",
    )


def _latency(one: Measurement) -> float:
    """Return the ms of a call, infinite where it was not timed."""
    return one.latency_ms.value if one.latency_ms else math.inf


def _total(times: Sequence[LayerTime]) -> float:
    return sum(one.ms for one in times)


def _explained(one: Measurement, before: Sequence[LayerTime], variant: Variant, target: str) -> list[Shown]:
    """Return what explains a variant that is not faster, or whose conversions matter; nothing where nothing does."""
    if one.latency is None:
        return []
    sentences = diagnosis.slow_down(
        before,
        one.layers,
        variant.audit,
        runtime=Place.parse(target).target.runtime,
        denormals=one.denormals,
        speedup=one.latency.speedup,
        verdict=one.latency.verdict,
    )
    converting = _total([t for t in one.layers if t.converts]) >= NOTABLE * _total(one.layers)
    if not sentences or (one.latency.verdict == "faster" and not converting):
        return []
    speed = formats.times(one.latency.speedup.value)
    text = f"{one.variant} runs at {speed} the speed of the baseline on {target} ({one.latency.verdict})."
    return [Statement(text, sentences, "bad" if one.latency.verdict == "slower" else "")]


def _picture(timed: Mapping[str, Measurement], variants: Mapping[str, Variant], target: str) -> Picture:
    shares = {name: _shares(one.layers, variants[name].audit) for name, one in timed.items()}
    most: dict[str, float] = defaultdict(float)
    for of in shares.values():
        for layer, ms in of.items():
            most[layer] = max(most[layer], ms)
    named = sorted(most.keys() - {_OUTSIDE, _CONVERSIONS}, key=lambda layer: (-most[layer], layer))[:NAMED]
    colours = dict(zip(named, _LAYER_COLOURS, strict=False)) | {
        _REST: COLOURS[5],
        _OUTSIDE: FAINT,
        _CONVERSIONS: _CONVERSION_COLOUR,
    }
    bars = {name: _segments(of, named) for name, of in shares.items()}
    with canvas(9.2, 0.34 * len(bars) + 1.1) as figure:
        axes = figure.subplots()
        _draw(axes, list(bars.values()), colours)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * max(sum(of.values()) for of in bars.values()))
        axes.set_xlabel("ms a call, by layer")
        axes.grid(axis="x", color=FAINT)
        _legend(axes, [layer for layer in colours if any(of.get(layer) for of in bars.values())], colours)
        words = " ".join(f"{name}: {_in_words(of)}." for name, of in bars.items())
        return picture(
            figure,
            f"Time of a call by layer on {target}. {words}",
            f"Where the time of a call goes on {target}, operator by operator. Named are the layers that take most; "
            "conversions change number formats or memory layouts and compute nothing. Times by layer are taken apart "
            "from the latencies, with a clock around every operator, and may add up to a little more or less.",
        )


def _shares(times: Sequence[LayerTime], audit: Sequence[LayerAudit]) -> dict[str, float]:
    """Return the ms of each layer with weights, of all other operators, and of conversions."""
    known = {row.layer for row in audit}
    found: dict[str, float] = defaultdict(float)
    for one in times:
        found[_CONVERSIONS if one.converts else one.layer if one.layer in known else _OUTSIDE] += one.ms
    return dict(found)


def _segments(of: Mapping[str, float], named: Sequence[str]) -> dict[str, float]:
    rest = sum(ms for layer, ms in of.items() if layer not in (*named, _OUTSIDE, _CONVERSIONS))
    parts = {layer: of.get(layer, 0.0) for layer in named}
    parts |= {_REST: rest, _OUTSIDE: of.get(_OUTSIDE, 0.0), _CONVERSIONS: of.get(_CONVERSIONS, 0.0)}
    return {layer: ms for layer, ms in parts.items() if ms > 0}


def _draw(axes: "Axes", bars: Sequence[Mapping[str, float]], colours: Mapping[str, str]) -> None:
    """Draw one bar below the other, each part beside the last, and the whole beside its end."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    boxes_of: dict[str, list[Path]] = defaultdict(list)
    for y, of in enumerate(bars):
        start, low, high = 0.0, y - 0.33, y + 0.33
        for layer, ms in of.items():
            end = start + ms
            corners = [(start, low), (end, low), (end, high), (start, high), (start, low)]
            boxes_of[layer].append(Path(corners, closed=True))
            start = end
        beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(formats.milliseconds(start), (start, y), **beside)
    for layer, boxes in boxes_of.items():
        # One path of a colour weighs far less on a page than a path for every part.
        axes.add_patch(PathPatch(Path.make_compound_path(*boxes), facecolor=colours[layer], linewidth=0))


def _legend(axes: "Axes", shown: Sequence[str], colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colours[layer], label=layer) for layer in shown]
    axes.figure.legend(handles=patches, loc="outside upper right", ncols=min(4, len(patches)))


def _in_words(of: Mapping[str, float]) -> str:
    parts = ", ".join(f"{layer} {formats.milliseconds(ms)}" for layer, ms in of.items())
    return f"{formats.milliseconds(sum(of.values()))}, of which {parts}"


def _table(one: Measurement, before: Sequence[LayerTime], variant: Variant, target: str) -> Table:
    """Return a variant's layers beside the baseline's, in the order in which they run."""
    baseline = one.variant == BASELINE
    now, old = _operators(one.layers), _operators(before)
    total, total_before = _total(one.layers), _total(before)
    rows, left_now, left_old, small = [], 0.0, 0.0, 0
    audit = {row.layer: row for row in variant.audit}
    for layer in dict.fromkeys([*now, *(layer for layer in old if layer in audit)]):
        ms, was = sum(now.get(layer, {}).values()), sum(old.get(layer, {}).values())
        if ms < SHOWN * total and was < SHOWN * total_before:
            left_now, left_old, small = left_now + ms, left_old + was, small + 1
            continue
        operators = ", ".join(now[layer]) if layer in now else "part of another layer"
        cells = _cells(audit.get(layer), Place.parse(target).target.runtime)
        rows.append((Cell(layer), Cell(operators, tone="quiet"), *_times(ms, was, baseline, total), *cells))
    if small:
        name = f"{formats.counted(small, 'row')} of less than {formats.percent(SHOWN)} each"
        rows.append((Cell(name), Cell(""), *_times(left_now, left_old, baseline, total), Cell(""), Cell("")))
    columns = (
        Column("layer"),
        Column("operators"),
        *(() if baseline else (Column("before", True),)),
        Column("here", True),
        *(() if baseline else (Column("ratio", True),)),
        Column("channels", True),
        Column("runs as"),
    )
    caption = f"{one.variant} on {target}, layer by layer: {formats.milliseconds(total)} in all"
    return Table(caption, columns, tuple(rows), _note(one, total), folded=True)


def _note(one: Measurement, total: float) -> str:
    said = "Medians of single operators, each with a clock around it; the ratio is time before by time here."
    if one.latency_ms:
        share = formats.percent(total / one.latency_ms.value)
        said += f" In all they are {share} of the latency, {formats.milliseconds(one.latency_ms.value)}."
    return said


def _operators(times: Sequence[LayerTime]) -> dict[str, dict[str, float]]:
    """Return the ms of each operator by layer; conversions, and what is in no layer, are rows of their own."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in times:
        found[_CONVERSIONS if one.converts else one.layer or _NOWHERE][one.operator] += one.ms
    return found


def _times(ms: float, was: float, baseline: bool, total: float) -> tuple[Cell, ...]:
    here = Cell(formats.milliseconds(ms), formats.percent(ms / total) if total else "")
    if baseline:
        return (here,)
    if not was or not ms:
        return Cell(formats.milliseconds(was) if was else ""), here if ms else Cell(""), Cell("")
    ratio = was / ms
    tone = "bad" if ratio < 1 / LONGER else "good" if ratio > LONGER else "quiet"
    return Cell(formats.milliseconds(was)), here, Cell(formats.times(ratio), tone=tone)


def _cells(row: LayerAudit | None, runtime: str) -> tuple[Cell, Cell]:
    """Return a layer's channels and how the runtime computes it."""
    if row is None:
        return Cell(""), Cell("")
    lost, precision = row.lost_channels, row.precision.get(runtime)
    channels = "" if row.channels is None else str(row.channels)
    if lost:
        channels = f"{row.channels_before} \N{RIGHTWARDS ARROW} {channels}"
    runs_as = precision.runs_as if precision else "float32"
    return Cell(channels, tone="" if lost else "quiet"), Cell(runs_as, tone="quiet")
