"""The charts of a report: speed-up breakdown, accuracy vs. speed, throughput, and timing samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shrinkkit.core.measurement import Comparison, Conditions, TargetRecord
from shrinkkit.core.recipe import BASELINE, STAGE
from shrinkkit.core.target import Place
from shrinkkit.display import formats
from shrinkkit.display.formats import TIMES
from shrinkkit.display.picture import COLOURS, DASHES, FAINT, GREY, INK, SHADES, Picture, canvas, picture, style
from shrinkkit.display.tables import Shown, Statement
from shrinkkit.report import chart
from shrinkkit.results.results import CONCLUSIVE, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from shrinkkit.results.breakdown import Breakdown
    from shrinkkit.results.results import Results, Row


FACTORS = {
    "runtime": ("runtime", SHADES[0]),
    "transform": ("transforms", SHADES[2]),
    "precision": ("precision", SHADES[3]),
    "both": ("transforms and precision, not measured separately", SHADES[1]),
}
"""Labels and colours of the kinds of factors."""
TICKS, TICK_INCHES = 7, 0.65
"""Labels below a panel at most, and the width that each takes."""
PANELS = 3
"""Side by side at most."""
SHOWN, FEWEST, DOTS = 120, 24, 1200
"""Slots drawn of a distribution at most, evenly spaced, at least, and of all together, to keep the page small."""
_BUDGET = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3))}


def training(scores: Sequence[float], *, metric: str) -> Shown:
    """Return the mean validation score after each epoch as a line, or a sentence without fine-tuning."""
    if not scores:
        return Statement("No fine-tuning.")
    with canvas(6.2, 2.4) as figure:
        axes = figure.subplots()
        epochs = range(1, len(scores) + 1)
        axes.plot(epochs, scores, color=COLOURS[0], marker="o", markersize=4)
        axes.set_xticks(list(epochs)[:: max(1, len(scores) // 10)])
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"validation {metric}")
        alt = f"Validation {metric} by epoch: " + ", ".join(f"{score:.4g}" for score in scores) + "."
        return picture(figure, alt, f"Mean {metric} on the validation split after each epoch of fine-tuning.")


def breakdown(rows: Sequence["Breakdown"], targets: Sequence[str]) -> Picture:
    """Return how runtime, transforms and precision multiply to each variant's speed-up, a panel for each target."""
    from matplotlib.patches import Patch

    panels = {target: [row for row in rows if row.target == target] for target in targets}
    panels = {target: shown for target, shown in panels.items() if shown}
    heights = [len(shown) + 0.4 for shown in panels.values()]
    with canvas(9.2, 0.44 * sum(heights) + 0.75 * len(panels) + 0.6) as figure:
        column = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (target, shown) in zip(column, panels.items(), strict=True):
            for y, row in enumerate(shown):
                _waterfall(axes, y, row)
            axes.set_title(target, loc="left")
            axes.set_yticks(range(len(shown)), [formats.wrapped(row.variant) for row in shown])
            axes.set_ylim(len(shown) - 0.4, -0.6)
            axes.axvline(1, color=INK, linewidth=0.8)
            axes.grid(axis="x", color=FAINT)
        speed_axis(column[-1], [end for row in rows for end in (*_ends(row), row.total.low, row.total.high)])
        drawn = {factor.kind for row in rows for factor in row.factors}
        patches = [Patch(color=colour, label=label) for kind, (label, colour) in FACTORS.items() if kind in drawn]
        if patches:
            figure.legend(handles=patches, loc="outside upper right", ncols=len(patches))
        return picture(
            figure,
            "Speed-up over PyTorch by variant. " + " ".join(_in_words(row) for row in rows),
            "Each bar starts where the one above it ends, so that the factors multiply (the axis is logarithmic). "
            "The dot is the total speed-up with its 95 % CI; a hollow dot is inconclusive.",
        )


def _ends(row: "Breakdown") -> list[float]:
    """Return where each of a row's bars ends, as speed-ups over PyTorch."""
    return [float(end) for end in np.cumprod([factor.speedup.value for factor in row.factors])] or [1.0]


def _waterfall(axes: "Axes", y: int, row: "Breakdown") -> None:
    noisy, ends, lanes = row.timing == "too noisy", _ends(row), max(3, len(row.factors))
    for lane, (factor, start, end) in enumerate(zip(row.factors, [1.0, *ends], ends, strict=False)):
        height = y + 0.6 * ((lane + 0.5) / lanes - 0.5)
        bar: dict[str, Any] = {"color": FACTORS[factor.kind][1], "alpha": 0.3 if noisy else 1.0, "linewidth": 0}
        axes.barh(height, end - start, left=start, height=0.57 / lanes, **bar)
    total, slower = row.total, row.total.value < 1 and not noisy
    dot: dict[str, Any] = {"color": INK, "markersize": 4.5, "linewidth": 1, "fmt": "o"}
    dot["markerfacecolor"] = INK if row.timing in CONCLUSIVE else "none"
    axes.errorbar([total.value], [y], xerr=[[total.value - total.low], [total.high - total.value]], **dot)
    edge = min(total.low, *ends) if slower else max(total.high, *ends)
    offset: dict[str, Any] = {"xytext": (-7 if slower else 7, 0), "ha": "right" if slower else "left"}
    label = formats.speedup(total, row.timing, ci=False).removeprefix("inconclusive, ").removeprefix("no difference, ")
    axes.annotate(label, (edge, y), va="center", textcoords="offset points", **offset)


def _in_words(row: "Breakdown") -> str:
    factors = ", ".join(f"{factor.name} {formats.times(factor.speedup.value)}" for factor in row.factors)
    detail = f" ({factors})" if factors and row.timing != "too noisy" else ""
    return f"{row.variant} on {row.target}: {formats.speedup(row.total, row.timing, ci=False)}{detail}."


def tradeoff(results: "Results") -> Shown:
    """Return speed-up over PyTorch, change of accuracy and size of each measured variant."""
    from matplotlib.lines import Line2D

    rows, names = _drawn(results), named(results)
    if not rows:
        return Statement("No variant has both a speed and an accuracy.", tone="warning")
    drawn = {row.target for row in rows}
    lines = [[t for t in results.of(name).targets if t in drawn] for name in results.machines]
    lines = [targets[i : i + PANELS] for targets in lines for i in range(0, len(targets), PANELS)]
    others = len({row.variant for row in rows}) - len(names)
    largest = max(row.size_bytes or 0 for row in rows)
    with canvas(9.2, 1.1 + 3.0 * len(lines)) as figure:
        grid = figure.subplots(len(lines), max(map(len, lines)), sharex=True, sharey=True, squeeze=False)
        panels = {target: grid[i, j] for i, targets in enumerate(lines) for j, target in enumerate(targets)}
        for axes in set(grid.flat) - set(panels.values()):
            axes.set_axis_off()
        ends = [end for row in rows if (speed := row.speedup_today) for end in (speed.low, speed.high)]
        near = _near(ends)
        # Room for the marks at an edge, with their speed-ups.
        near += [min(near) / 2.5] if min(ends) < min(near) else []
        near += [max(near) * 2.5] if max(ends) > max(near) else []
        for target, axes in panels.items():
            # A machine's name is wider than a panel, so it stands above the first of its panels alone.
            first = results.machine(target) if axes in grid[:, 0] else ""
            above = f"{first}\n" if len(results.machines) > 1 else ""
            title = above + str(Place.parse(target).target)
            tradeoff_axes(axes, rows, metric=results.metric_title, is_fraction=results.is_fraction, title=title)
            drop = (100 if results.is_fraction else 1) * results.budget.accuracy_drop
            axes.axhline(-drop if results.higher_is_better else drop, **_BUDGET)
            speed_axis(axes, near)
            # Grey marks are drawn first, below those with a name.
            for row in sorted(rows, key=lambda row: row.variant in names):
                if row.target == target:
                    _point(axes, row, look(row.variant, names), largest, is_fraction=results.is_fraction)
            own = [row for row in rows if row.target == target]
            _label_beyond(axes, own, is_fraction=results.is_fraction)
        if not results.higher_is_better:
            # Axes are shared, so that one is inverted for all.
            next(iter(panels.values())).invert_yaxis()
        # Below the lowest panel of a column there may be none on the last line.
        lowest = {j: grid[i, j] for i, targets in enumerate(lines) for j in range(len(targets))}
        for axes in panels.values():
            axes.set_xlabel(axes.get_xlabel() if axes in lowest.values() else "")
            axes.set_ylabel(axes.get_ylabel() if axes in grid[:, 0] else "")
            axes.tick_params(labelbottom=axes in lowest.values())
        labels = {name: style(i) for i, name in enumerate(names)}
        labels |= {f"{formats.counted(others, 'other variant')}, not Pareto-optimal": _UNNAMED} if others else {}
        marks = [Line2D([], [], linestyle="none", label=label, **mark) for label, mark in labels.items()]  # type: ignore[arg-type]
        columns = max(1, min(4, len(marks), _LEGEND_CHARACTERS // max(map(len, labels))))
        figure.legend(handles=marks, loc="outside lower center", ncols=columns)
        is_log = next(iter(panels.values())).get_yscale() == "symlog"
        bent = f" Beyond {_LINEAR_POINTS / 2:.0f} points the vertical axis is logarithmic." if is_log else ""
        drawing = picture(figure, _tradeoff_in_words(rows, results), _TRADEOFF + bent)
        return replace(drawing, data=chart.data(results, rows, names))


def _drawn(results: "Results") -> list["Row"]:
    return [r for r in results.rows if r.speedup_today and r.difference and r.size_bytes and not r.intermediate]


def named(results: "Results") -> list[str]:
    """Return the variants that figures tell apart, in the order of `style`; of many, the Pareto-optimal ones."""
    rows = _drawn(results)
    names = [name for name in results.names if any(row.variant == name for row in rows)]
    if len(names) <= _MOST_NAMED:
        return names
    targets = {row.target for row in rows}
    best = [row.variant for target in targets for row in pareto_front([r for r in rows if r.target == target])]
    return [name for name in names if name in best][:_MOST_NAMED]


def look(variant: str, names: Sequence[str]) -> dict[str, str]:
    """Return colour and marker of a variant, the same in all figures with the same `names`; the baseline is grey."""
    if variant == BASELINE:
        return {"color": GREY, "marker": "o"}
    return style(names.index(variant)) if variant in names else _UNNAMED


def dash(variant: str, names: Sequence[str]) -> str:
    """Return the line style of a variant, which changes where its colour repeats."""
    return DASHES[names.index(variant) // len(COLOURS) if variant in names else 0]


_MOST_NAMED = 16
"""Variants that a chart tells apart; of more, the Pareto-optimal ones."""
_LINEAR_POINTS = 10
"""Change of accuracy, in points, up to which its axis is linear throughout."""
_UNNAMED = {"color": "#999999", "marker": "."}
_LEGEND_CHARACTERS = 110
"""Characters of a legend as wide as the figure."""
_TRADEOFF = (
    "One panel per target. Right is faster, up is better, and a smaller mark is a smaller file (area: file size). "
    "Bars are 95 % CIs. Within budget = the entire bar is above the dashed line. Pale: inconclusive timing. "
    "Marks with an arrow at an edge are beyond the axis."
)


def tradeoff_axes(axes: "Axes", rows: Sequence["Row"], *, metric: str, is_fraction: bool, title: str = "") -> None:
    """Label the axes of a chart of change of accuracy against speed-up, wide enough for the speed-ups of `rows`."""
    ratios = [row.speedup_today for row in rows if row.speedup_today]
    speed_axis(axes, [end for ratio in ratios for end in (ratio.low, ratio.high)])
    axes.set_ylabel(f"\N{GREEK CAPITAL LETTER DELTA} {metric}{' (pts)' if is_fraction else ''}")
    axes.set_title(title, loc="left")
    changes = [position(row, is_fraction=is_fraction)[1] for row in rows]
    if is_fraction and max(map(abs, changes), default=0) > _LINEAR_POINTS:
        # One broken variant would press all others onto a line.
        axes.set_yscale("symlog", linthresh=_LINEAR_POINTS / 2)
        low, high = min(changes) * 1.3, max(2, *changes)
        ticks = [tick for tick in (-100, -50, -20, -10, -5, -2, 0, 2, 5, 10) if low < tick < high]
        axes.set_yticks(ticks, [f"{tick}" for tick in ticks], minor=False)
        axes.set_yticks([], minor=True)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(color=FAINT)


def _near(ratios: Sequence[float]) -> list[float]:
    """Return the speed-ups without those far from the median, which would press all others together.

    What is far depends on the median distance from the median, which holds until half of them are outliers.
    """
    logs = np.log(ratios)
    distances = np.abs(logs - np.median(logs))
    far = 1.7 * max(2 * np.median(distances), math.log(5))
    return [ratio for ratio, distance in zip(ratios, distances, strict=True) if distance <= far]


def position(row: "Row", *, is_fraction: bool) -> tuple[float, float]:
    """Return where a row is drawn: its speed-up and change of accuracy, the baseline's being 0."""
    change = row.difference.value if row.difference else 0.0
    return row.speedup_today.value if row.speedup_today else 1.0, (100 if is_fraction else 1) * change


def _point(axes: "Axes", row: "Row", look: Mapping[str, str], largest: int, *, is_fraction: bool) -> None:
    speed, change, scale = row.speedup_today, row.difference, 100 if is_fraction else 1
    if speed is None or change is None:
        return
    x, y = position(row, is_fraction=is_fraction)
    low, high = axes.get_xlim()
    is_beyond = not low < x < high
    # The whole mark is inside the panel, off the labels of the vertical axis.
    inset = (high / low) ** 0.05
    x = min(max(x, low * inset), high / inset) if is_beyond else x
    bars: dict[str, Any] = {
        "xerr": None if is_beyond else [[speed.value - speed.low], [speed.high - speed.value]],
        "yerr": [[scale * (change.value - change.low)], [scale * (change.high - change.value)]],
    }
    mark: dict[str, Any] = {**look, "alpha": 0.85 if row.timing_today in CONCLUSIVE else 0.35}
    axes.errorbar([x], [y], fmt="none", ecolor=mark["color"], elinewidth=1, **bars)
    axes.scatter([x], [y], s=25 + 300 * (row.size_bytes or 0) / largest, **mark)


def _label_beyond(axes: "Axes", rows: Sequence["Row"], *, is_fraction: bool) -> None:
    """Write at an edge of the horizontal axis which speed-up a mark there stands for, or of several, how many."""
    low, high = axes.get_xlim()
    places = [(position(row, is_fraction=is_fraction), row) for row in rows]
    for edge, arrow, side in (
        (low, "\N{BLACK LEFT-POINTING SMALL TRIANGLE} {}", -1),
        (high, "{} \N{BLACK RIGHT-POINTING SMALL TRIANGLE}", 1),
    ):
        beyond = [(y, row) for (x, y), row in places if side * x >= side * edge]
        speeds = [(y, formats.speedup(row.speedup_today, row.timing_today, ci=False)) for y, row in beyond]
        if len(beyond) > 1:
            speeds = [(max(y for y, _ in beyond), formats.counted(len(beyond), "mark"))]
        for y, text in speeds:
            place: dict[str, Any] = {"ha": "left" if side < 0 else "right", "va": "top", "fontsize": 8}
            offset = (-22 * side, -6)
            axes.annotate(arrow.format(text), (edge, y), xytext=offset, textcoords="offset points", **place)


def _tradeoff_in_words(rows: Sequence["Row"], results: "Results") -> str:
    texts = [
        f"{row.variant} on {results.where(row.target)}: "
        f"{formats.speedup(row.speedup_today, row.timing_today, ci=False)}, "
        f"{formats.change(row.difference.value, is_fraction=results.is_fraction)}, {formats.size(row.size_bytes or 0)}."
        for row in rows
        if row.difference
    ]
    return f"Speed-up over PyTorch, change of {results.metric} and file size. " + " ".join(texts)


def pareto(title: str, best: Sequence["Row"], others: Sequence["Row"], *, metric: str, is_fraction: bool) -> Picture:
    """Return change of accuracy against speed-up, with the Pareto-optimal rows `best` numbered."""
    with canvas(6.2, 2.7) as figure:
        axes = figure.subplots()
        for row in others:
            axes.scatter(*position(row, is_fraction=is_fraction), s=14, color=INK, alpha=0.35, linewidth=0)
        for i, row in enumerate(best, 1):
            point = position(row, is_fraction=is_fraction)
            axes.scatter(*point, s=42, color=COLOURS[0], marker="s", gid=f"point-{i - 1}")
            axes.annotate(str(i), point, xytext=(5, 4), textcoords="offset points")
        tradeoff_axes(axes, [*best, *others], metric=metric, is_fraction=is_fraction)
        if not all(row.higher_is_better for row in best):
            axes.invert_yaxis()
        axes.margins(y=0.15)
        numbered = ", ".join(
            f"{i} {row.variant} on {row.place.target}, {formats.speedup(row.speedup_today, ci=False)}, "
            f"{formats.change(row.difference.value if row.difference else 0.0, is_fraction=is_fraction)}, "
            f"{formats.size(row.size_bytes or 0)}"
            for i, row in enumerate(best, 1)
        )
        return picture(
            figure,
            f"{title}: speed-up over PyTorch and change of {metric} of the Pareto-optimal variants: {numbered}.",
            "Numbered squares: the Pareto-optimal variants, listed below. Dots: other measured variants, including "
            "those over budget.",
        )


def throughput(record: TargetRecord, conditions: Conditions, names: Sequence[str]) -> Picture | None:
    """Return examples per second against batch size at the main number of threads; None for a single batch size.

    `names` are the variants with a colour; see `look`.
    """
    rates: dict[str, dict[int, float]] = {}
    for measurement in record.measurements:
        if measurement.latency_ms and STAGE not in measurement.variant:
            rate = 1e3 * conditions.batch_size / measurement.latency_ms.value
            rates[measurement.variant] = {conditions.batch_size: rate}
    for point in record.sweep:
        if point.latency_ms and point.setting == ("", point.batch_size, conditions.threads) and point.variant in rates:
            rates[point.variant][point.batch_size] = 1e3 * point.batch_size / point.latency_ms.value
    sizes = sorted({size for by_size in rates.values() for size in by_size})
    if len(sizes) < 2:
        return None
    from matplotlib.ticker import LogLocator

    with canvas(9.2, 3.4) as figure:
        axes = figure.subplots()
        for name, by_size in rates.items():
            line = sorted(by_size.items())
            label = formats.wrapped(name) if name in names or name == BASELINE else "_"
            mark: dict[str, Any] = {**look(name, names), "linestyle": dash(name, names), "label": label}
            axes.plot(*zip(*line, strict=True), markersize=5, **mark)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:,g}")
        axes.minorticks_off()
        axes.grid(color=FAINT)
        axes.set_xlabel("batch size")
        axes.set_ylabel("examples / s")
        figure.legend(loc="outside right upper")
        rest = " Light grey: not Pareto-optimal." if rates.keys() - {BASELINE, *names} else ""
        texts = (
            f"{name}: " + ", ".join(f"{rate:,.0f} at {size}" for size, rate in sorted(by_size.items()))
            for name, by_size in rates.items()
        )
        return picture(
            figure,
            f"Examples per second by batch size on {record.target}. {'; '.join(texts)}.",
            f"{record.target}: examples per second by batch size, with {formats.counted(conditions.threads, 'thread')} "
            f"(logarithmic axes).{rest}",
        )


def distributions(compared: Mapping[str, Comparison], *, title: str = "", names: Sequence[str] = ()) -> Shown:
    """Return the fastest call of every slot, baseline and variant, in the order in which they ran; see `look`."""
    if not compared:
        return Statement("No timing samples.")
    columns, own = min(PANELS, len(compared)), names or list(compared)
    lines, shown = -(-len(compared) // columns), max(FEWEST, min(SHOWN, DOTS // len(compared)))
    with canvas(9.2, 2.1 * lines + 0.3) as figure:
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(compared) :]:
            axes.set_axis_off()
        for axes, (name, comparison) in zip(grid.flat, compared.items(), strict=False):
            _slots(axes, name, comparison, look(name, own)["color"] if name in own else INK, shown)
            axes.set_ylabel("ms" if axes in grid[:, 0] else "")
        texts = " ".join(
            f"{name}: {_quantiles(c.candidate_samples_ms)}; {'FP32' if c.reference == BASELINE else c.reference}: "
            f"{_quantiles(c.reference_samples_ms)}."
            for name, c in compared.items()
        )
        most = max(len(c.candidate_samples_ms) for c in compared.values())
        thinned = f" {shown} of up to {most} slots are drawn, evenly spaced." if most > shown else ""
        return picture(
            figure,
            f"Times of single calls, slot by slot. {texts}",
            f"{f'{title}: each' if title else 'Each'} dot is the fastest call of one slot in ms, in the order of time. "
            "Grey: baseline, coloured or black: the model of the title, lines: medians. Titles: speed-up with 95 % CI, "
            f"and the noise floor of the A/A control.{thinned}",
        )


def _slots(axes: "Axes", name: str, comparison: Comparison, own: str, shown: int) -> None:
    highest = 0.0
    drawn = ((comparison.reference_samples_ms, GREY, 0.7), (comparison.candidate_samples_ms, own, 1.0))
    for samples, colour, alpha in drawn:
        times = np.array([min(slot) for slot in samples if slot])
        if not len(times):
            continue
        chosen = np.unique(np.linspace(0, len(times) - 1, min(shown, len(times))).astype(int))
        x = chosen / max(1, len(times) - 1)
        # Lines without length and with round ends are dots that weigh a fraction of markers.
        path = np.full((2, 3 * len(chosen)), np.nan)
        path[:, 0::3] = path[:, 1::3] = x, times[chosen]
        axes.plot(*path, color=colour, alpha=alpha, linewidth=2.4, solid_capstyle="round")
        axes.axhline(float(np.median(times)), color=colour, alpha=alpha, linewidth=0.8)
        highest = max(highest, float(np.quantile(times, 0.99)))
    floor = f"noise floor \N{PLUS-MINUS SIGN}{formats.percent(comparison.noise_floor)}"
    speed = f"{formats.rounded(comparison.speedup)}{TIMES} ({formats.interval(comparison.speedup)})"
    verdict = formats.UNSURE.get(comparison.verdict, comparison.verdict)
    axes.set_title(f"{formats.wrapped(name)}\n{verdict}, {speed}\n{floor}", loc="left", fontsize=8)
    axes.set_ylim(0, 1.15 * highest or 1.0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y", color=FAINT)


def _quantiles(samples: Sequence[Sequence[float]]) -> str:
    times = [min(slot) for slot in samples if slot]
    if not times:
        return "no samples"
    low, middle, high = np.quantile(times, [0.05, 0.5, 0.95])
    return f"median {formats.milliseconds(middle)}, p5 {formats.digits(low)}, p95 {formats.digits(high)}"


def speed_axis(axes: "Axes", values: Sequence[float]) -> None:
    """Make the horizontal axis one of speed-ups, logarithmic and labelled, wide enough for `values` (> 0) and 1."""
    low, high = min([1.0, *values]), max([1.0, *values])
    # Wider ranges need more room for labels next to the outermost marks.
    margin = max(1.5, (high / low) ** 0.15)
    low, high = low / margin, high * margin
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    fit = int(axes.bbox.width / axes.figure.dpi / TICK_INCHES)
    stride = math.ceil((last - first + 1) / max(2, min(TICKS, fit)))
    steps = [2.0**power for power in range(first, last + 1) if power % stride == 0]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(steps, [f"{step:{'g' if step >= 1 else '.2g'}}{TIMES}" for step in steps])
    axes.minorticks_off()
    axes.set_xlabel("speed-up over PyTorch")
