"""The report's chapter on robustness: scores by severity, damage by kind of change, calibration, and arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shrinkkit.core import estimate, evidence, robustness
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Scores
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.robustness import (
    CLEAN,
    OWN,
    TRANSFERRED,
    Calibration,
    NumericCheck,
    Robustness,
    RobustnessRecord,
)
from shrinkkit.display import cells, formats, tables
from shrinkkit.display.picture import FAINT, INK, canvas, picture
from shrinkkit.display.tables import Cell, Heading, Several, Shown, Statement
from shrinkkit.errors import options
from shrinkkit.report import figures
from shrinkkit.report.accuracy import CLASSES, WORST
from shrinkkit.results.results import Results

DELTA = "\N{GREEK CAPITAL LETTER DELTA}"
PANELS = 4
"""Side by side at most."""
FEWEST = 10
"""Examples of a bin of the confidence that is drawn."""
MOST_NAMED = 8
"""Variants that charts tell apart where the report names none; of more, those that lose most."""
_PALE: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.5, "marker": "", "linestyle": "-"}
_PALE_MEANS = " Thin lines: variants that the legend does not name; the table below has all."
EXACT = 1e-6
"""Relative difference of outputs below which they count as equal."""


def chapter(results: Results) -> Several:
    """Return what was found on each target; a sentence if robustness was not measured."""
    if not results.robust:
        line = "Not measured in this run. `shrinkkit run --mode all` adds corruptions, attacks and calibration."
        return Several((Statement(line),))
    parts: list[Shown] = []
    names = figures.named(results)
    for target, record in results.robust.items():
        parts += [Heading(results.where(target)), *of_record(record, names, drop=results.drop_if_corrupted).parts]
    return Several(tuple(parts))


def of_record(record: RobustnessRecord, names: Sequence[str] = (), *, drop: float = 0.0) -> Several:
    """Return the findings on one target: in words, as a chart, and as tables.

    `names` have a colour; see `look`. Classes that lose more than `drop` are marked.
    """
    measured = record.by_name()
    if not measured:
        return _nothing(record)
    charts = by_severity(record, names), damage(record), *by_class(record, drop)
    return Several((findings(record), *charts, *calibration(record, names).parts, arithmetic(record)))


def findings(record: RobustnessRecord) -> Several:
    """Return a sentence on each variant: what it is surely worse or better at, or what could not be shown."""
    measured, found = record.by_name(), robustness.damaged(record)
    if not measured:
        return _nothing(record)
    baseline = measured[BASELINE]
    names = baseline.corruptions()
    sentences, named = [], _told_apart(record, ())
    for name, signs in ((name, found[name]) for name in named):
        worse = [at for at, sign in signs.items() if sign < 0]
        better = [at for at, sign in signs.items() if sign > 0]
        parts = [f"surely worse on {options(worse, 'and')}"] if worse else []
        parts += [f"surely better on {options(better, 'and')}"] if better else []
        overall = ""
        if names:
            scores = measured[name].scores(*names, baseline=baseline)
            overall = f"; mean change on corrupted inputs {_change(scores)}"
        sentences.append(f"{name}: {' and '.join(parts) or 'no difference that this test set could show'}{overall}.")
    if others := [signs.values() for name, signs in found.items() if name not in named]:
        count = sum(-1 in signs for signs in others)
        sentences.append(f"{len(others)} others lose less; surely worse on something: {count} of them. See the table.")
    how = (
        f"{record.examples:,} test examples. Surely: this takes into account how many variants and kinds of change are "
        "compared on a target (Holm, 5 % in all)."
    )
    tone = "warning" if any(sign < 0 for signs in found.values() for sign in signs.values()) else "good"
    headline = "Compared with the original model on the same changed inputs."
    failed = [Statement(text, tone="warning") for text in _errors(record)]
    notes = [Statement(note) for note in record.notes]
    return Several((Statement(headline, (*sentences, how), tone), *failed, *notes))


def _nothing(record: RobustnessRecord) -> Several:
    return Several((Statement("The baseline could not be tried, so nothing can be compared.", _errors(record)),))


def _errors(record: RobustnessRecord) -> tuple[str, ...]:
    return tuple(f"{one.variant}: {one.error}" for one in record.variants if one.error)


def _change(scores: Scores) -> str:
    change: Estimate = scores.difference or scores.mean
    text = formats.change(change.value, is_fraction=scores.is_fraction)
    return formats.with_ci(text, change, is_fraction=scores.is_fraction)


def by_severity(record: RobustnessRecord, names: Sequence[str] = ()) -> Shown:
    """Return the score by severity as a small chart for each corruption and attack, the baseline grey."""
    measured, names = record.by_name(), _told_apart(record, names)
    baseline = measured.get(BASELINE, Robustness(BASELINE))
    others = [name for name in measured if name not in (BASELINE, *names)]
    kinds = (*baseline.corruptions(), *baseline.attacks())
    if not kinds:
        return Statement("No corruption or attack was tried.")
    lines = -(-len(kinds) // PANELS)
    scores = baseline.conditions[0].scores
    scale = 100 if scores.is_fraction else 1
    with canvas(9.2, 1.9 * lines + 0.5) as figure:
        grid = figure.subplots(lines, min(PANELS, len(kinds)), sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(kinds) :]:
            axes.set_axis_off()
        for place, kind in enumerate(kinds):
            axes = grid.flat[place]
            for name in (*others, BASELINE, *names):
                points = _curve(measured[name], kind)
                mark: dict[str, Any] = {**figures.look(name, names), "linestyle": figures.dash(name, names)}
                mark |= {"markersize": 3.5}
                # The original lies below, and shows where a variant covers it.
                mark |= {"linewidth": 4, "alpha": 0.5} if name == BASELINE else {}
                mark |= _PALE if name in others else {}
                label = _label(name, others) if place == 0 else "_"
                axes.plot([x for x, _ in points], [scale * y.value for _, y in points], label=label, **mark)
            axes.set_title(kind, loc="left", fontsize=9)
            axes.grid(color=FAINT)
            axes.set_xticks(range(6))
            bottom = place + grid.shape[1] >= len(kinds)
            axes.tick_params(labelbottom=bottom)
            axes.set_xlabel("severity" if bottom else "")
        if not scores.higher_is_better:
            grid.flat[0].invert_yaxis()
        # Once for all panels: the name of a metric may be longer than one of them is high.
        figure.supylabel(f"{scores.title}{' (%)' if scores.is_fraction else ''}", fontsize=9)
        figure.legend(loc="outside lower center", ncols=4)
        texts = [
            f"{kind}: "
            + ", ".join(f"{name} {_curve(measured[name], kind)[-1][1].value:.3g}" for name in (BASELINE, *names))
            for kind in kinds
        ]
        title = scores.title[:1].upper() + scores.title[1:]
        alt = f"{title} by severity of each change of the inputs on {record.target}; at the strongest: "
        caption = (
            f"{title} of the model files on {record.target} by severity of a corruption or attack; 0 is the "
            f"clean input. Grey: the original model.{_PALE_MEANS if others else ''}"
        )
        return picture(figure, alt + "; ".join(texts) + ".", caption)


def _told_apart(record: RobustnessRecord, names: Sequence[str]) -> list[str]:
    """Return the variants that charts tell apart: `names`, or of more than a few those that lose most."""
    measured = record.by_name()
    if names or len(measured) - 1 <= MOST_NAMED:
        return [name for name in (names or _names(record)) if name in measured]
    kinds = (CLEAN, *measured[BASELINE].corruptions(), *measured[BASELINE].attacks())
    sign = 1 if measured[BASELINE].conditions[0].scores.higher_is_better else -1

    def score(name: str) -> float:
        return sign * float(np.mean([c.scores.mean.value for c in measured[name].conditions if c.name in kinds]))

    worst = sorted(measured.keys() - {BASELINE}, key=lambda name: (score(name), name))[:MOST_NAMED]
    return [name for name in measured if name in worst]


def _label(name: str, others: Sequence[str]) -> str:
    """Return the name of a line in a legend, which names all `others` at once."""
    if name not in others:
        return formats.wrapped(name)
    return formats.counted(len(others), "other variant") if name == others[0] else "_"


def _curve(one: Robustness, kind: str) -> list[tuple[int, Estimate]]:
    """Return severity and score, clean first: on the examples of an attack, only where it has them."""
    points = [(c.severity, c.scores.mean) for c in one.conditions if c.name == kind]
    clean = [(0, c.scores.mean) for c in one.conditions if c.name == CLEAN]
    return sorted([*clean, *points], key=lambda point: point[0]) if points else clean


def damage(record: RobustnessRecord) -> Shown:
    """Return the change of the score on each corruption and attack, averaged over severities, by variant."""
    measured, found = record.by_name(), robustness.damaged(record)
    if not measured:
        return Statement("No corruption or attack was tried.")
    baseline = measured[BASELINE]
    kinds = (CLEAN, *baseline.corruptions(), *baseline.attacks())
    fraction = baseline.conditions[0].scores.is_fraction
    rows: list[tables.Row] = []
    for kind in kinds:
        own = baseline.scores(kind).mean.value
        row: dict[str, Cell | str] = {"input": kind, "original": Cell(formats.score(own, is_fraction=fraction))}
        for name, one in measured.items():
            if name != BASELINE and any(at == kind for at, _ in one.tried() & baseline.tried()):
                row[name] = _damage(one.scores(kind, baseline=baseline), found[name].get(kind, 0))
        rows.append(row)
    attacked = {name: c.note for name, one in measured.items() for c in one.conditions if c.is_attack}
    transferred = [name for name, how in attacked.items() if how == TRANSFERRED]
    note = "Marked: surely different from the original, however many are compared; 95 % CIs are of each alone."
    note += f" Attacks on {options(transferred, 'and')}: {TRANSFERRED}." if transferred else ""
    if len(transferred) < len(attacked):
        note += f" Attacks{' on the others' if transferred else ''}: {OWN}."
    unit = " (pts)" if fraction else ""
    caption = f"{DELTA} {baseline.conditions[0].scores.title}{unit} by kind of change, mean over severities"
    return tables.table(caption, _upright(rows, "input"), note, folded=False, shaded=True)


def _upright(rows: Sequence[tables.Row], first: str) -> Sequence[tables.Row]:
    """Return rows of a table whose other columns are variants, with a line for each variant if those are more."""
    columns = list(dict.fromkeys(column for row in rows for column in row if column != first))
    if len(columns) - 1 <= len(rows):
        return rows
    return [{"variant": column, **{str(row[first]): row.get(column, "") for row in rows}} for column in columns]


def by_class(record: RobustnessRecord, drop: float = 0.0) -> tuple[Shown, ...]:
    """Return the change of the mean score on corrupted inputs of each class by variant; nothing without classes."""
    known, marked = robustness.by_class(record), robustness.damaged_classes(record, drop)
    if not known:
        return ()
    like = record.by_name()[BASELINE].conditions[0].scores
    cells_of: dict[str, dict[str, Cell | str]] = {}
    worst: dict[str, float] = {}
    for name, classes in known.items():
        for of, (before, after) in classes.items():
            original = Cell(formats.score(estimate.mean(before).value, is_fraction=like.is_fraction))
            row = cells_of.setdefault(of, {"class": of, "examples": str(len(before)), "original": original})
            scores = evidence.scores(replace(like, scores=tuple(after)), replace(like, scores=tuple(before)))
            row[name] = _damage(scores, -1 if of in marked.get(name, ()) else 0)
            worst[of] = min(worst.get(of, 0.0), scores.gain.value if scores.gain else 0.0)
    chosen = list(cells_of) if len(cells_of) <= CLASSES else sorted(cells_of, key=worst.__getitem__)[:WORST]
    than = formats.change(drop, is_fraction=like.is_fraction) if drop else "nothing"
    note = f"Marked: surely loses more than {than}, however many are compared; 95 % CIs are of each alone."
    if len(chosen) < len(cells_of):
        note += f" The {len(chosen)} of {len(cells_of)} classes that lose most."
    unit = " (pts)" if like.is_fraction else ""
    caption = f"{DELTA} {like.title}{unit} on corrupted inputs by class, mean over corruptions"
    return (tables.table(caption, _upright([cells_of[of] for of in chosen], "class"), note, shaded=True),)


def _damage(scores: Scores, sign: int) -> Cell:
    if scores.difference is None:
        return Cell("")
    text = formats.change(scores.difference.value, is_fraction=scores.is_fraction, unit=False)
    interval = formats.interval(scores.difference, is_fraction=scores.is_fraction)
    return Cell(text, interval, {1: "good", -1: "bad", 0: "quiet"}[sign])


def _names(record: RobustnessRecord) -> list[str]:
    return [one.variant for one in record.variants if one.variant != BASELINE]


def calibration(record: RobustnessRecord, names: Sequence[str] = ()) -> Several:
    """Return the reliability diagram and the figures of calibration; a sentence without classes."""
    known = {name: one.calibration for name, one in record.by_name().items() if one.calibration}
    if not known:
        return Several((Statement("No calibration: outputs are no classes, or there are no labels."),))
    rows: list[tables.Row] = []
    for name, one in known.items():
        row: dict[str, Cell | str] = {"variant": name}
        for figure in one.figures:
            row[figure.metric] = cells.score(figure.mean, is_fraction=figure.is_fraction)
            row[f"{DELTA} {figure.metric}"] = figure.change_cell()
        row["temperature"] = Cell(f"{one.temperature:.2f}", "above 1: too sure" if one.temperature > 1.05 else "")
        row["ECE at it"] = formats.percent(one.error_at_temperature)
        rows.append(row)
    note = (
        "ECE: expected calibration error, the mean gap between confidence and share of right answers. NLL: negative "
        "log-likelihood. Lower is better. Dividing the logits by the temperature, fitted on the validation split, "
        "mends what it can."
    )
    chart = _reliability(known, _told_apart(record, names))
    return Several((chart, tables.table("Calibration of confidence", rows, note)))


def _reliability(known: Mapping[str, Calibration], names: Sequence[str]) -> Shown:
    with canvas(4.6, 3.4) as figure:
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8)
        others = [name for name in known if name not in (BASELINE, *names)]
        for name in (*others, *(name for name in known if name not in others)):
            one = known[name]
            points = [(100 * confidence, 100 * right) for confidence, right, count in one.bins if count >= FEWEST]
            mark: dict[str, Any] = {**figures.look(name, names), "markersize": 4, "label": _label(name, others)}
            mark |= _PALE if name in others else {}
            axes.plot([x for x, _ in points], [y for _, y in points], **mark)
        axes.set_xlabel("confidence (%)")
        axes.set_ylabel("right answers (%)")
        axes.grid(color=FAINT)
        figure.legend(loc="outside right upper")
        alt = "Share of right answers by confidence: " + "; ".join(
            f"{name}: " + ", ".join(f"{right:.0%} at {confidence:.0%}" for confidence, right, _ in one.bins)
            for name, one in known.items()
            if name not in others
        )
        caption = "Reliability: below the line a model is surer than it is right. "
        caption += f"Bins of fewer than {FEWEST} examples are left out.{_PALE_MEANS if others else ''}"
        return picture(figure, f"{alt}.", caption)


def arithmetic(record: RobustnessRecord) -> Shown:
    """Return what each file makes of inputs that should change nothing, and of inputs out of range."""
    measured = record.by_name()
    checks = list(dict.fromkeys(check.name for one in measured.values() for check in one.checks))
    rows: list[tables.Row] = [
        {"variant": name, **{check.name: _check(check) for check in one.checks}} for name, one in measured.items()
    ]
    if not checks:
        return Statement("Nothing was checked of the arithmetic.")
    note = (
        "First the same inputs at other places in the batch, in another batch and on another number of threads: the "
        "largest difference of outputs, relative to the largest. Then inputs out of range: whether outputs are finite, "
        "and how many answers differ from the original model's."
    )
    return tables.table("Arithmetic at its limits", rows, note)


def _check(check: NumericCheck) -> Cell:
    if check.note:
        return Cell("not done", check.note, "quiet")
    changed = check.changed or 0.0
    aside = f"{formats.percent(changed)} other answers" if changed else ""
    if check.finite is not None:
        return Cell("finite" if check.finite else "not finite", aside, "" if check.finite else "warning")
    if check.error is None or check.error <= EXACT:
        return Cell("equal", aside, "good" if not changed else "bad")
    return Cell(f"{check.error:.0e}", aside, "bad" if changed else "")
