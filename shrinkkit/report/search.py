"""A search in notebooks and reports: what was tried, what was found, and how far the search's own figures were off."""

from typing import Any

from shrinkkit.core import estimate
from shrinkkit.core.search import SearchRecord, Trial, parts
from shrinkkit.display import cells, formats, tables
from shrinkkit.display.formats import TIMES
from shrinkkit.display.picture import COLOURS, GREY, INK, canvas, picture
from shrinkkit.display.tables import Cell, Several, Shown, Statement, Table
from shrinkkit.report.figures import speed_axis
from shrinkkit.results import verdict
from shrinkkit.results.results import CONCLUSIVE, Results, Row

MARKS = {True: (COLOURS[0], "o", "keeps the budget"), False: (GREY, "x", "loses too much")}
"""Colour, mark and label of measured trials, by whether they keep the budget."""


def chapter(results: Results) -> Several:
    """Return whether the goal was met, the search against the benchmark, and every trial."""
    record = results.search
    if record is None:
        line = "Nothing was searched for in this run. `shrinkkit tune TASK` looks for the best recipe within a budget."
        return Several((Statement(line),))
    return Several((_goal(record, results), against(record, results), front(record), trials(record)))


def choices(space: Any) -> Several:
    """Return what a `shrinkkit.search.space.Space` lets vary, and why the rest cannot."""
    rows = [{"choice": name, "values": Cell(_values(one))} for name, one in space.distributions().items()]
    left_out = [Statement(f"{name} is left out: {why.rstrip('.')}.") for name, why in space.left_out.items()]
    return Several((tables.table("Choices", rows, text=("values",), folded=False), *left_out))


def _values(distribution: Any) -> str:
    if hasattr(distribution, "choices"):
        return ", ".join(map(str, distribution.choices))
    return f"{distribution.low:g} to {distribution.high:g}"


def found(record: SearchRecord) -> Several:
    """Return the recipes that were found, and what the search did."""
    rows = [{"variant": name, **_row(trial, record)} for name, trial in record.chosen().items()]
    how = _how(record)
    table = tables.table("Found", rows, text=("recipe", "state"), folded=False)
    return Several((table, Statement(how[0], how[1:])))


def _goal(record: SearchRecord, results: Results) -> Statement:
    """Return whether a recipe that was found is within the budget on the test split."""
    rows = [results.row(name, record.target) for name in record.chosen() if name in results.names]
    met = [row for row in rows if row.verdict == "within budget"]
    wanted = "The fastest" if record.want == "fastest" else "The smallest"
    details = _how(record)
    if not rows:
        return Statement("The search found no recipe that could be measured.", details, "warning")
    if not met:
        text = f"The goal was not met: no recipe that was found is within {results.budget_text()} on the test split."
        return Statement(text, details, "warning")
    best = max(met, key=lambda row: _better(row, record.want))
    speed = formats.speedup(best.speedup_today, best.timing_today, noun=" faster than PyTorch")
    size = verdict.size(best, results).partition(" (")[0]
    text = f"{wanted} found within {results.budget_text()} is {best.variant}: {speed}, file {size}."
    return Statement(text, details, "good")


def _better(row: Row, want: str) -> float:
    if want == "smallest":
        return 1 / row.size_bytes if row.size_bytes else 0.0
    return row.speedup_today.value if row.speedup_today else 0.0


def _how(record: SearchRecord) -> tuple[str, ...]:
    """Return what the search did, and what it could not tell."""
    states = [trial.state for trial in record.trials]
    tried = f"{formats.counted(len(states), 'recipe')} tried in {record.elapsed_s / 60:.1f} min on {record.target}"
    lines = [f"{tried}: {states.count('measured')} scored, {states.count('not better')} timed only, as they were no"]
    lines[0] += f" better than the best so far, {states.count('failed')} not possible."
    if record.resolution >= record.accuracy_drop:
        least = formats.change(-record.resolution, is_fraction=record.is_fraction)
        lines.append(
            f"The {record.examples:,} unseen examples of the search cannot show a loss below the budget: the interval "
            f"of an exact copy reaches {least}. The search allowed for that; the test split decides."
        )
    if record.left_out:
        lines += [f"Not searched: {name}, {why.rstrip('.')}." for name, why in record.left_out.items()]
    return tuple(lines)


def against(record: SearchRecord, results: Results) -> Table:
    """Return what the search measured of each found recipe next to what the benchmark did, on the test split."""
    rows: list[tables.Row] = []
    for name, trial in record.chosen().items():
        row = results.row(name, record.target) if name in results.names else None
        speeds = (trial.speedup, row.speedup if row else None)
        sure = row is not None and row.timing in CONCLUSIVE
        ratio = speeds[1].value / speeds[0].value if sure and speeds[0] and speeds[1] else None
        fraction = record.is_fraction
        rows.append(
            {
                "variant": name,
                "recipe": Cell(parts(trial.recipe) or "unchanged"),
                "speed-up in the search": _speed(trial),
                "measured again": cells.speedup(row.speedup, row.timing) if row else Cell(""),
                "off by": Cell(formats.signed(f"{100 * (ratio - 1):+.1f} %")) if ratio else Cell(""),
                "change in the search": cells.change(trial.gain, is_fraction=fraction),
                "on the test split": cells.change(row.gain, is_fraction=fraction) if row else Cell(""),
                "budget": Cell(row.verdict) if row else Cell("not measured"),
            }
        )
    note = (
        "Of many that were tried, the best looks better than it is: its luck is chosen with it. So what was found is "
        "made again, trained longer, timed in a new process, and evaluated once on examples that the search never saw."
    )
    return tables.table("The search against the benchmark", rows, note, text=("recipe", "budget"), folded=False)


def front(record: SearchRecord) -> Shown:
    """Return speed-up and change of score of every measured trial, those that were found numbered."""
    drawn = [trial for trial in record.trials if trial.state == "measured" and trial.speedup and trial.gain]
    if not drawn:
        return Statement("No recipe has been measured yet.")
    scale = 100 if record.is_fraction else 1
    with canvas(9.2, 3.2) as figure:
        axes = figure.subplots()
        for holds, (colour, mark, label) in MARKS.items():
            points = [trial for trial in drawn if trial.holds == holds]
            heights = [scale * trial.gain.value for trial in points if trial.gain]
            xs = [trial.speedup.value for trial in points if trial.speedup]
            axes.plot(xs, heights, color=colour, marker=mark, linestyle="none", markersize=5, label=label)
        for place, trial in enumerate(record.chosen().values(), start=1):
            at = (trial.speedup.value if trial.speedup else 1.0, scale * (trial.gain.value if trial.gain else 0.0))
            axes.annotate(str(place), at, xytext=(0, 7), textcoords="offset points", ha="center", color=INK)
        axes.axhline(-scale * record.accuracy_drop, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        lowest = min(-1.5 * scale * record.accuracy_drop, *(scale * trial.gain.value for trial in drawn if trial.gain))
        # What is far below the budget is at the lower edge: how far says nothing.
        floor = (
            max(lowest, -scale * 8 * max(record.accuracy_drop, record.resolution)) if record.accuracy_drop else lowest
        )
        axes.margins(y=0.15)
        axes.set_ylim(bottom=floor - 0.08 * abs(floor))
        axes.set_xscale("log")
        speed_axis(axes, [trial.speedup.value for trial in drawn if trial.speedup])
        axes.set_xlabel(f"speed-up over the unchanged model on {record.target}")
        unit = ", points" if record.is_fraction else ""
        axes.set_ylabel(f"change of {record.metric}{unit}")
        figure.legend(loc="outside upper right", ncols=2)
        best = record.best()
        words = f"The best that keeps the budget is {best.speedup.value:.3g}{TIMES}." if best and best.speedup else ""
        alt = f"{len(drawn)} recipes by speed-up and change of {record.metric}. {words}"
        return picture(
            figure, alt, "Recipes that were tried; the dashed line is the budget, numbers are what was found."
        )


def trials(record: SearchRecord) -> Table:
    """Return every trial in the order in which they were made."""
    return tables.table("Trials of the search", [_row(t, record) for t in record.trials], text=("recipe", "state"))


def _speed(trial: Trial) -> Cell:
    return cells.speedup(trial.speedup, estimate.verdict(trial.speedup)) if trial.speedup else Cell("")


def _row(trial: Trial, record: SearchRecord) -> tables.Row:
    return {
        "trial": str(trial.number + 1),
        "recipe": Cell(parts(trial.recipe) or "unchanged"),
        "state": Cell(trial.reason or trial.state),
        "speed-up": _speed(trial),
        "change": cells.change(trial.gain, is_fraction=record.is_fraction) if trial.gain else Cell(""),
        "file size": cells.size(trial.size_bytes),
        "s": Cell(f"{trial.duration_s:.1f}"),
    }
