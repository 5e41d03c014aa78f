"""The pictures of a report: where speed comes from, what it costs, and the raw times behind it."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shrinkkit.core.measurement import Comparison
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.target import Place
from shrinkkit.display import formats
from shrinkkit.display.formats import TIMES
from shrinkkit.display.picture import COLOURS, FAINT, INK, MARKERS, Picture, canvas, picture
from shrinkkit.results.conclusions import TRUSTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from shrinkkit.core.estimate import Estimate
    from shrinkkit.results.conclusions import Factors
    from shrinkkit.results.table import Results, Row


FACTORS = {
    "runtime": "runtime",
    "transform": "transforms",
    "precision": "precision",
    "both": "transforms and precision, not told apart",
}
"""What the kinds of factors are called, in the order of their colours."""
TICKS = 5
"""Labels that fit below a narrow panel."""
SHOWN = 120
"""Slots that a distribution draws at most, evenly spaced; more would weigh down the page and show nothing new."""


def training(scores: Sequence[float], *, metric: str) -> Picture:
    """Return the mean validation score after each epoch of fine-tuning, as a line; `scores` holds at least one."""
    with canvas(6.2, 2.4) as figure:
        axes = figure.subplots()
        epochs = range(1, len(scores) + 1)
        axes.plot(epochs, scores, color=COLOURS[0], marker="o", markersize=4)
        axes.set_xticks(list(epochs)[:: max(1, len(scores) // 10)])
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"validation {metric}")
        alt = f"Validation {metric} by epoch: " + ", ".join(f"{score:.4g}" for score in scores) + "."
        return picture(figure, alt, f"Mean {metric} on the validation split after each epoch of fine-tuning.")


def factors(found: Sequence["Factors"], targets: Sequence[str]) -> Picture:
    """Return how runtime, transforms and precision multiply to each variant's speed-up against PyTorch today.

    Args:
        found: Factors of at least one variant.
        targets: In the order of the panels; those without factors are left out.
    """
    panels = [(target, [f for f in found if f.target == target]) for target in targets]
    panels = [(target, rows) for target, rows in panels if rows]
    heights = [len(rows) + 0.4 for _, rows in panels]
    with canvas(9.2, 0.44 * sum(heights) + 0.75 * len(panels) + 0.6) as figure:
        column = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (target, rows) in zip(column, panels, strict=True):
            for y, row in enumerate(rows):
                _waterfall(axes, y, row)
            axes.set_title(target, loc="left")
            axes.set_yticks(range(len(rows)), [row.variant for row in rows])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.axvline(1, color=INK, linewidth=0.8)
            axes.grid(axis="x", color=FAINT)
        speed_axis(column[-1], [end for row in found for end in (*_ends(row), row.total.low, row.total.high)])
        _legend_of_factors(figure)
        return picture(
            figure,
            "Speed-up against PyTorch today by variant. " + " ".join(_in_words(row) for row in found),
            "Each bar starts where the one above it ends, so that the factors multiply (the axis is logarithmic). "
            "The dot is the whole speed-up with its 95 % interval; a hollow dot means that it got no verdict.",
        )


def _ends(row: "Factors") -> list[float]:
    """Return where each of a row's bars ends, as speed-ups against PyTorch today."""
    ends, reached = [], 1.0
    for _, _, speedup in _parts(row):
        reached *= speedup.value
        ends.append(reached)
    return ends


def _parts(row: "Factors") -> list[tuple[str, str, "Estimate"]]:
    """Return the name, kind and speed-up of each of a row's factors."""
    runtime = [("runtime", "runtime", row.runtime)] if row.runtime else []
    return [*runtime, *((step.name, step.kind, step.speedup) for step in row.steps)]


def _waterfall(axes: "Axes", y: int, row: "Factors") -> None:
    start = 1.0
    parts = _parts(row)
    lanes = max(3, len(parts) + (row.runtime is None))
    for lane, ((_, kind, _), end) in enumerate(zip(parts, _ends(row), strict=True), start=row.runtime is None):
        place, shade = y + 0.6 * ((lane + 0.5) / lanes - 0.5), 0.3 if row.timing == "too noisy" else 1.0
        colour = COLOURS[list(FACTORS).index(kind)]
        axes.barh(place, end - start, left=start, height=0.57 / lanes, color=colour, alpha=shade, linewidth=0)
        start = end
    dot: dict[str, Any] = {
        "color": INK,
        "markerfacecolor": INK if row.timing in TRUSTED else "none",
        "markersize": 4.5,
        "linewidth": 1,
    }
    spread = [[row.total.value - row.total.low], [row.total.high - row.total.value]]
    axes.errorbar([row.total.value], [y], xerr=spread, fmt="o", **dot)
    slower = row.total.value < 1 and row.timing != "too noisy"
    edge = min(row.total.low, *_ends(row)) if slower else max(row.total.high, *_ends(row))
    offset: dict[str, Any] = {
        "xytext": (-7 if slower else 7, 0),
        "textcoords": "offset points",
        "ha": "right" if slower else "left",
    }
    axes.annotate(_quoted(row), (edge, y), va="center", **offset)


def _quoted(row: "Factors") -> str:
    return "too noisy" if row.timing == "too noisy" else formats.times(row.total.value)


def _legend_of_factors(figure: "Figure") -> None:
    from matplotlib.patches import Patch

    drawn = {patch.get_facecolor()[:3] for axes in figure.axes for patch in axes.patches}
    patches = [Patch(color=COLOURS[i], label=name) for i, name in enumerate(FACTORS.values())]
    shown = [patch for patch in patches if patch.get_facecolor()[:3] in drawn]
    if shown:
        figure.legend(handles=shown, loc="outside upper right", ncols=len(shown))


def _in_words(row: "Factors") -> str:
    if row.timing == "too noisy":
        return f"{row.variant} on {row.target}: too noisy to tell."
    parts = " by ".join(f"{name} {formats.times(speedup.value)}" for name, _, speedup in _parts(row))
    return f"{row.variant} on {row.target}: {formats.times(row.total.value)}" + (f" ({parts})." if parts else ".")


def tradeoff(results: "Results") -> Picture | None:
    """Return speed-up against PyTorch today, change of accuracy and size of each measured variant; None without any."""
    rows = [r for r in results.rows if r.speedup_today and r.difference and r.size_bytes and not r.intermediate]
    if not rows:
        return None
    drawn = {row.target for row in rows}
    lines = [[t for t in results.of(name).targets if t in drawn] for name in results.machines]
    lines = [targets for targets in lines if targets]
    names = [name for name in results.names if any(row.variant == name for row in rows)]
    largest = max(row.size_bytes or 0 for row in rows)
    scale = 100 if results.is_fraction else 1
    with canvas(9.2, 1.1 + 3.0 * len(lines)) as figure:
        grid = figure.subplots(len(lines), max(map(len, lines)), sharex=True, sharey=True, squeeze=False)
        panels = {target: grid[i, j] for i, targets in enumerate(lines) for j, target in enumerate(targets)}
        for axes in set(grid.flat) - set(panels.values()):
            axes.set_axis_off()
        for target, axes in panels.items():
            for row in rows:
                if row.target == target:
                    _point(axes, row, names.index(row.variant), largest, scale)
            # A machine's name is wider than a panel, so it stands above the first of its panels alone.
            above = f"{results.machine(target) if axes in grid[:, 0] else ''}\n" if len(lines) > 1 else ""
            axes.set_title(above + str(Place.parse(target).target), loc="left")
            axes.axvline(1, color=INK, linewidth=0.8)
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.axhline(-scale * results.budget.accuracy_drop, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.grid(color=FAINT)
        unit = ", points" if results.is_fraction else ""
        for axes in grid[:, 0]:
            axes.set_ylabel(f"change of {results.metric}{unit}")
        ends = [end for r in rows if r.speedup_today for end in (r.speedup_today.low, r.speedup_today.high)]
        speed_axis(grid[0, 0], ends)
        label = grid[0, 0].get_xlabel()
        grid[0, 0].set_xlabel("")
        # Of each column the lowest, below which there may be none on the last line.
        for axes in {j: grid[i, j] for i, targets in enumerate(lines) for j in range(len(targets))}.values():
            axes.set_xlabel(label)
            axes.tick_params(labelbottom=True)
        _legend_of_variants(figure, names)
        return picture(figure, _tradeoff_in_words(rows, results), _TRADEOFF)


_TRADEOFF = (
    "Right is faster, up is more accurate, and a smaller mark is a smaller file (its area is the size on disk). Bars "
    "are 95 % intervals. The dashed line is the budget: a variant is within it only if its whole bar is above. A pale "
    "mark means that a timing got no verdict."
)


def _point(axes: "Axes", row: "Row", index: int, largest: int, scale: float) -> None:
    speed, change = row.speedup_today, row.difference
    if speed is None or change is None:
        return
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
    spread: dict[str, Any] = {
        "xerr": [[speed.value - speed.low], [speed.high - speed.value]],
        "yerr": [[scale * (change.value - change.low)], [scale * (change.high - change.value)]],
    }
    axes.errorbar([speed.value], [scale * change.value], fmt="none", ecolor=colour, elinewidth=1, **spread)
    area = 25 + 300 * (row.size_bytes or 0) / largest
    trusted = row.timing_today not in ("too noisy", "undecided")
    axes.scatter(
        [speed.value], [scale * change.value], s=area, marker=marker, color=colour, alpha=0.85 if trusted else 0.35
    )


def _legend_of_variants(figure: "Figure", names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            label=name,
        )
        for i, name in enumerate(names)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(4, len(marks)))


def _tradeoff_in_words(rows: Sequence["Row"], results: "Results") -> str:
    said = [
        f"{row.variant} on {results.where(row.target)}: "
        f"{'too noisy to tell' if row.timing_today == 'too noisy' else formats.times(row.speedup_today.value)}, "
        f"{formats.change(row.difference.value, is_fraction=results.is_fraction)}, {formats.size(row.size_bytes or 0)}."
        for row in rows
        if row.speedup_today and row.difference
    ]
    return f"Speed-up against PyTorch today, change of {results.metric} and size. " + " ".join(said)


def distributions(compared: Mapping[str, Comparison], *, title: str = "") -> Picture | None:
    """Return the fastest call of every slot, baseline and variant, in the order in which they ran; None without any.

    Args:
        compared: Comparisons by variant.
        title: What was compared, for the caption; such as a target.
    """
    columns = min(3, len(compared))
    if not compared:
        return None
    lines = -(-len(compared) // columns)
    with canvas(9.2, 1.95 * lines + 0.3) as figure:
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(compared) :]:
            axes.set_axis_off()
        for axes, (name, comparison) in zip(grid.flat, compared.items(), strict=False):
            _slots(axes, name, comparison)
        words = " ".join(
            f"{name}: {_middle(c.candidate_samples_ms)}, {_reference(c)} beside it: {_middle(c.reference_samples_ms)}."
            for name, c in compared.items()
        )
        most = max(len(c.candidate_samples_ms) for c in compared.values())
        thinned = f" {SHOWN} of up to {most} slots are drawn, evenly spaced." if most > SHOWN else ""
        return picture(
            figure,
            f"Times of single calls, slot by slot. {words}",
            f"{f'{title}: each' if title else 'Each'} dot is the fastest call of one slot, in ms, from the first slot "
            f"on the left to the last on the right. Grey dots are the baseline, coloured ones the variant, lines their "
            f"medians. Above stand the speed-up with its 95 % interval, and how far a copy of the baseline may be from "
            f"the baseline itself.{thinned}",
        )


def _slots(axes: "Axes", name: str, comparison: Comparison) -> None:
    import numpy as np

    highest = 0.0
    drawn = ((comparison.reference_samples_ms, INK, 0.5), (comparison.candidate_samples_ms, COLOURS[0], 1.0))
    for samples, colour, alpha in drawn:
        times = np.array([min(slot) for slot in samples if slot])
        if not len(times):
            continue
        chosen = np.unique(np.linspace(0, len(times) - 1, min(SHOWN, len(times))).astype(int))
        x = chosen / max(1, len(times) - 1)
        # Lines without length and with round ends are dots that weigh a fraction of markers.
        path = np.full(3 * len(chosen), np.nan), np.full(3 * len(chosen), np.nan)
        path[0][0::3], path[0][1::3], path[1][0::3], path[1][1::3] = x, x, times[chosen], times[chosen]
        axes.plot(*path, color=colour, alpha=alpha, linewidth=2.4, solid_capstyle="round")
        axes.axhline(float(np.median(times)), color=colour, alpha=alpha, linewidth=0.8)
        highest = max(highest, float(np.quantile(times, 0.99)))
    floor = f"noise floor \N{PLUS-MINUS SIGN}{formats.percent(comparison.noise_floor)}"
    speed = f"{formats.times(comparison.speedup.value)} {formats.interval(comparison.speedup)}"
    axes.set_title(f"{name}: {comparison.verdict}\n{speed}, {floor}", loc="left", fontsize=8)
    axes.set_ylim(0, 1.15 * highest or 1.0)
    axes.set_xticks([])
    axes.set_ylabel("ms")
    axes.grid(axis="y", color=FAINT)


def _reference(comparison: Comparison) -> str:
    return "FP32" if comparison.reference == BASELINE else comparison.reference


def _middle(samples: Sequence[Sequence[float]]) -> str:
    import numpy as np

    times = [min(slot) for slot in samples if slot]
    if not times:
        return "no samples"
    low, middle, high = np.quantile(times, [0.05, 0.5, 0.95])
    spread = f"from {formats.digits(low)} to {formats.digits(high)} in nine of ten slots"
    return f"median {formats.milliseconds(middle)}, {spread}"


def speed_axis(axes: "Axes", values: Sequence[float]) -> None:
    """Make the horizontal axis one of speed-ups, logarithmic and labelled, wide enough for `values` (> 0) and 1."""
    low, high = min([1.0, *values]), max([1.0, *values])
    # Wider ranges need more room for labels beside the outermost marks.
    margin = max(1.5, (high / low) ** 0.12)
    low, high = low / margin, high * margin
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    stride = math.ceil((last - first + 1) / TICKS)
    steps = [2.0**power for power in range(first, last + 1) if power % stride == 0]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(steps, [f"{step:.2g}{TIMES}" for step in steps])
    axes.minorticks_off()
    axes.set_xlabel("speed-up against PyTorch today")
