"""How a compressed model's answers differ from the original's: scores, classes, and the examples that it lost.

Shows records, whether just measured or read back from disk.
"""

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Accuracy, ClassScore, Regression, TargetRecord, change_cell
from shrinkkit.display import formats
from shrinkkit.display.tables import Cell, Column, Several, Shown, Statement, Table

ARROW = "\N{RIGHTWARDS ARROW}"
CLASSES, WORST = 30, 10
"""Of more classes than the first, only as many as the second are shown."""
PICTURES, CHARACTERS = 6, 20_000
"""Pictures of one variant at most, and their length in base64: a report shows those of many variants."""
SIDE, WIDEST = 64, 192
"""Pixels that the shorter side of a picture is enlarged to at least, and that the longer one then keeps to."""


def accuracies(found: Mapping[str, Accuracy], errors: Mapping[str, str]) -> Table:
    """Return each variant's accuracy, its paired difference to the baseline, and why a variant has none."""
    return _scores("Accuracy on the test split", "variant", found, errors)


def fidelity(found: Mapping[str, Accuracy]) -> Table:
    """Return how each runtime's file scores, paired with the task's own model; keyed by runtime."""
    return _scores("Each file against the task's own model", "runtime", found, {})


def classes(found: Mapping[str, Accuracy]) -> Shown:
    """Return how the score on each class changed, class by variant; a change is marked if its interval excludes 0.

    Args:
        found: Accuracies on one target by variant; the baseline's mean is shown where it is among them.
    """
    compared = {name: one for name, one in found.items() if one.difference and one.classes}
    if not compared:
        return Statement("There is no score by class: no variant was judged on targets that are classes.")
    of = {name: {row.name: row for row in one.classes} for name, one in found.items() if one.classes}
    first = next(iter(compared.values()))
    shares = formats.is_fraction(first.scores)
    names = [row.name for row in first.classes]
    chosen, which = names, ""
    if len(names) > CLASSES:
        lowest = {name: min(_value(of[variant].get(name)) for variant in compared) for name in names}
        chosen = sorted((name for name in names if lowest[name] < 0), key=lambda name: lowest[name])[:WORST]
        if not chosen:
            return Statement(f"None of {len(names):,} classes scores lower in any variant than in the baseline.")
        which = f", the {len(chosen)} of {len(names):,} classes that lost most"
    rows = tuple(
        (
            Cell(name, formats.counted(next(o[name].examples for o in of.values() if name in o), "example")),
            *(_class(rows.get(name), shares) for rows in of.values()),
        )
        for name in chosen
    )
    differences = [of[variant][name].difference for variant in compared for name in chosen if name in of[variant]]
    marked = sum(_excludes_zero(one) for one in differences)
    columns = (Column("class"), *(Column(name, True) for name in of))
    unit = ", in points" if shares else ""
    caption = f"Change of {first.metric} by class{unit}{which}; {marked or 'none'} of {len(differences)} marked"
    folded = None if marked else True
    return Table(caption, columns, rows, _CLASSES_NOTE + (_CHOSEN_NOTE if which else ""), folded, shaded=True)


def lost(found: Mapping[str, Accuracy]) -> Shown:
    """Return the examples that each variant answers worse than the baseline: pictures, or a table without them.

    Args:
        found: Accuracies on one target by variant; the baseline itself is passed over.
    """
    compared = {name: one for name, one in found.items() if one.difference}
    if not compared:
        return Statement("No variant was compared with the baseline, so it is not known what any of them lost.")
    parts: list[Shown] = [_lost(name, one) for name, one in compared.items() if one.regressions]
    unchanged = [
        f"{name}{f' (gained {one.improvements:,} of {len(one.scores):,})' if one.improvements else ''}"
        for name, one in compared.items()
        if not one.regressions
    ]
    if unchanged:
        parts.append(Statement(f"No example was lost by {', '.join(unchanged)}."))
    return Several(tuple(parts))


def integers(record: TargetRecord) -> Shown:
    """Return whether the kernels of each int8 file computed what its integers say, and why one could not be told."""
    rows: list[tuple[Cell, ...]] = []
    for one in record.measurements:
        if check := one.integers:
            worst = max(check.layers, key=check.layers.__getitem__, default="")
            named = ", ".join(check.saturated)
            rows.append(
                (
                    Cell(one.variant),
                    Cell(f"saturate: {named}" if named else "as the integers say", tone="bad" if named else "good"),
                    Cell(f"{check.max_relative_error:.1e}"),
                    Cell(f"{len(check.layers)}", f"at most {check.layers[worst]:.1e} in {worst}" if worst else ""),
                )
            )
        rows += [(Cell(one.variant), Cell(note, tone="warning", wide=True)) for note in one.notes]
    if not rows:
        return Statement(f"No variant computes in int8 on {record.target}.")
    columns = (Column("variant"), Column("kernels"), Column("outputs differ by", True), Column("layers compared", True))
    return Table("Integer kernels beside the same integers computed in float", columns, tuple(rows), _INTEGERS_NOTE)


_INTEGERS_NOTE = (
    "Processors without instructions made for it add products of 8 bits in 16 and saturate, silently. Differences are "
    "shares of the largest output; rounding explains a step of the output's own integers."
)


@dataclass(frozen=True, repr=False)
class Strip(Shown):
    """Inputs side by side, each with what it was taken for."""

    caption: str
    variant: str
    examples: tuple[Regression, ...]
    """Each with its PNG."""

    def __repr__(self) -> str:
        """Return it as plain text."""
        return "\n".join([self.caption, *(f"  {_told(one, self.variant)}" for one in self.examples)])

    def markdown(self) -> str:
        """Return it as Markdown."""
        told = (_told(one, self.variant).replace("<", "&lt;") for one in self.examples)
        return "\n".join([f"**{self.caption}**", "", *(f"- {line}" for line in told)]) + "\n"

    def html(self) -> str:
        """Return it as a part of a page."""
        shots = "".join(_shot(one, self.variant) for one in self.examples)
        return f'<figure class="sk-strip"><figcaption>{escape(self.caption)}</figcaption>{shots}</figure>'


_SCORES_NOTE = (
    "Intervals are of 95 %. Cosine compares each example's outputs with the reference's, on average; 1 is the same "
    "direction."
)
_ANSWERS_NOTE = (
    " Divergence is the Kullback-Leibler divergence of the class probabilities from the reference's; 0 is none."
)
_CLASSES_NOTE = (
    "A change is marked where its 95 % interval, then given below it, excludes 0. About one cell in twenty may be "
    "marked by chance alone."
)
_CHOSEN_NOTE = " The classes were chosen for what they lost, so that chance has a greater share in them."


def _scores(caption: str, first: str, found: Mapping[str, Accuracy], errors: Mapping[str, str]) -> Table:
    agree = any(one.agreement is not None for one in found.values())
    diverge = any(one.divergence is not None for one in found.values())
    rows: list[tuple[Cell, ...]] = [
        (
            Cell(name),
            _mean(one.mean, formats.is_fraction(one.scores)),
            change_cell(one),
            *([_agreement(one)] if agree else []),
            Cell(_cosine(one.cosine) if one.difference else ""),
            *([Cell(_divergence(one.divergence) if one.difference else "")] if diverge else []),
        )
        for name, one in found.items()
    ]
    rows += [(Cell(name), Cell(error, tone="bad", wide=True)) for name, error in errors.items()]
    columns = (
        Column(first),
        Column(next((one.metric for one in found.values()), "score"), True),
        Column("change", True),
        *([Column("same answers", True)] if agree else []),
        Column("cosine", True),
        *([Column("divergence, nats", True)] if diverge else []),
    )
    examples = max((len(one.scores) for one in found.values()), default=0)
    note = _SCORES_NOTE + (_ANSWERS_NOTE if diverge else "")
    return Table(f"{caption}, {formats.counted(examples, 'example')}", columns, tuple(rows), note)


def _mean(mean: Estimate, shares: bool) -> Cell:
    return Cell(formats.score(mean.value, is_fraction=shares), formats.interval(mean, is_fraction=shares))


def _agreement(accuracy: Accuracy) -> Cell:
    if accuracy.difference is None or accuracy.agreement is None:
        return Cell("")
    total = len(accuracy.scores)
    return Cell(formats.percent(accuracy.agreement), f"{round(accuracy.agreement * total):,} of {total:,}")


def _cosine(value: float) -> str:
    """Return a cosine with so many decimals that two digits of its distance from 1 show, from 3 to 6."""
    gap = 1 - value
    if gap <= 0:
        return "1"
    decimals = min(6, max(3, 1 - math.floor(math.log10(gap))))
    return formats.signed(f"{value:.{decimals}f}")


def _divergence(nats: float | None) -> str:
    return "" if nats is None else "< 0.0001" if 0 < nats < 1e-4 else formats.digits(nats)


def _value(score: ClassScore | None) -> float:
    return score.difference.value if score and score.difference else 0.0


def _excludes_zero(estimate: Estimate | None) -> bool:
    return estimate is not None and (estimate.low > 0 or estimate.high < 0)


def _class(score: ClassScore | None, shares: bool) -> Cell:
    if score is None:
        return Cell("")
    if score.difference is None:
        return Cell(formats.score(score.mean.value, is_fraction=shares), tone="quiet")
    value = formats.change(score.difference.value, is_fraction=shares, unit=False)
    if not _excludes_zero(score.difference):
        return Cell(value, tone="quiet")
    tone = "bad" if score.difference.high < 0 else "good"
    return Cell(value, formats.interval(score.difference, is_fraction=shares), tone)


def _lost(name: str, accuracy: Accuracy) -> Shown:
    pictured = [one for one in accuracy.worst_regressions if one.png]
    shown = _that_fit(pictured) if pictured else accuracy.worst_regressions
    counts = f"{name}: lost {accuracy.regressions:,}, gained {accuracy.improvements:,} of {len(accuracy.scores):,}"
    right_or_wrong = set(accuracy.scores) <= {0.0, 1.0}
    order = "the first" if right_or_wrong else "the worst"
    caption = counts + (f"; {order} {len(shown)} are shown" if len(shown) < accuracy.regressions else "")
    if pictured:
        return Strip(caption, name, tuple(shown))
    named = any(one.label or one.before or one.after for one in shown)
    columns = [Column("example")]
    columns += [Column("right answer"), Column("before"), Column(f"by {name}")] if named else []
    columns += [] if right_or_wrong else [Column("score before", True), Column("score after", True)]
    shares = formats.is_fraction(accuracy.scores)
    rows = tuple(
        (
            Cell(f"{one.index:,}"),
            *((Cell(one.label), Cell(one.before), Cell(one.after)) if named else ()),
            *(() if right_or_wrong else _both(one, shares)),
        )
        for one in shown
    )
    return Table(caption, tuple(columns), rows, folded=True)


def _both(one: Regression, shares: bool) -> tuple[Cell, Cell]:
    before, after = (formats.score(value, is_fraction=shares) for value in (one.score_before, one.score_after))
    return Cell(before), Cell(after)


def _that_fit(examples: Sequence[Regression]) -> list[Regression]:
    """Return the first of `examples` whose pictures together are not too long, at least one."""
    chosen: list[Regression] = []
    length = 0
    for one in examples[:PICTURES]:
        length += len(one.png)
        if chosen and length > CHARACTERS:
            break
        chosen.append(one)
    return chosen


def _shot(one: Regression, variant: str) -> str:
    """Return a picture with its caption; the styles keep it in shape in a notebook, which has no stylesheet."""
    width, height = struct.unpack(">II", base64.b64decode(one.png[:32])[16:24])
    factor = max(1, min(math.ceil(SIDE / min(width, height)), WIDEST // max(width, height)))
    return (
        '<figure class="sk-shot" style="display:inline-block;vertical-align:top;margin:0 .75rem .75rem 0">'
        f'<img src="data:image/png;base64,{one.png}" alt="{escape(_told(one, variant))}" width="{factor * width}" '
        f'height="{factor * height}" style="display:block;image-rendering:pixelated">'
        f'<figcaption style="max-width:{max(96, factor * width)}px">{escape(_short(one))}</figcaption></figure>'
    )


def _short(one: Regression) -> str:
    if one.before != one.after:
        return f"{one.before} {ARROW} {one.after}"
    return f"{one.score_before:.3g} {ARROW} {one.score_after:.3g}"


def _told(one: Regression, variant: str) -> str:
    right = f"{_a(one.label)}, " if one.label else ""
    if one.before != one.after:
        return f"example {one.index}: {right}taken for {_a(one.after)} by {variant}"
    return f"example {one.index}: {right}score {one.score_before:.3g} before, {one.score_after:.3g} by {variant}"


def _a(name: str) -> str:
    """Return a class name with its indefinite article, as a digit or a word is read aloud."""
    return f"{'an' if name[:1].lower() in tuple('aeiou8') or name in ('11', '18') else 'a'} {name}"
