"""Accuracy of compressed models: scores, per-class accuracy, changed predictions, and int8 saturation."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Accuracy, ClassScore, Regression, TargetRecord
from shrinkkit.display import cells, formats
from shrinkkit.display.picture import Image, Strip
from shrinkkit.display.tables import Cell, Row, Several, Shown, Statement, Table, table

Outcome = tuple[Regression, str]
"""A predicted example, and the variants that predict it so."""
ARROW, DELTA = "\N{RIGHTWARDS ARROW}", "\N{GREEK CAPITAL LETTER DELTA}"
CLASSES, WORST = 30, 10
"""Of more classes than the first, only as many as the second are shown."""
PICTURES, CHARACTERS, EXAMPLES = 12, 60_000, 20
"""Pictures of examples at most, their length in base64, and examples without pictures."""
_CLASSES_NOTE = "Marked: the 95 % CI, then given below, excludes 0. One cell in twenty may be marked by chance alone."
_CHOSEN_NOTE = " Classes were chosen for their regressions, which raises the share of chance."
_INTEGERS_NOTE = (
    "CPUs without VNNI add 8-bit products in 16-bit accumulators, which saturate silently. Errors are relative to the "
    "largest output."
)


def accuracies(by_variant: Mapping[str, Accuracy], errors: Mapping[str, str]) -> Table:
    """Return each variant's accuracy, its paired difference to the baseline, and errors."""
    return fidelity(by_variant, errors, caption="Scores on the test split", of="variant")


def fidelity(
    accuracies: Mapping[str, Accuracy],
    errors: Mapping[str, str] = MappingProxyType({}),
    *,
    caption: str = "Scores vs. the original model",
    of: str = "runtime",
) -> Table:
    """Return the accuracies of models by name, paired with the original model; `of` is the title of the names."""
    metric, title = next(((accuracy.metric, accuracy.title) for accuracy in accuracies.values()), ("score", "score"))
    rows: list[Row] = [
        {
            of: name,
            title: cells.score(accuracy.mean, is_fraction=accuracy.is_fraction),
            f"{DELTA} {metric}": accuracy.change_cell(),
            "same predictions": _agreement(accuracy),
            "cosine": _cosine(accuracy.cosine) if accuracy.difference else "",
            "KL divergence, nats": _divergence(accuracy.divergence) if accuracy.difference else "",
        }
        for name, accuracy in accuracies.items()
    ]
    rows += [{of: name, title: Cell(error, tone="bad", wide=True)} for name, error in errors.items()]
    examples = max((accuracy.examples for accuracy in accuracies.values()), default=0)
    note = "With 95 % CIs. Cosine: mean cosine similarity of outputs with the reference's."
    if any(accuracy.divergence is not None for accuracy in accuracies.values()):
        note += " KL divergence: of class probabilities from the reference's."
    return table(f"{caption}, {formats.counted(examples, 'example')}", rows, note)


def _agreement(accuracy: Accuracy) -> Cell:
    if accuracy.difference is None or accuracy.agreement is None:
        return Cell("")
    total = accuracy.examples
    return Cell(formats.percent(accuracy.agreement), f"{round(accuracy.agreement * total):,} of {total:,}")


def _cosine(value: float) -> str:
    """Return a cosine with two digits of its distance from 1, and 3 to 6 decimals."""
    if value >= 1:
        return "1"
    decimals = min(6, max(3, 1 - math.floor(math.log10(1 - value))))
    return formats.signed(f"{value:.{decimals}f}")


def _divergence(nats: float | None) -> str:
    return "" if nats is None else "< 0.0001" if 0 < nats < 1e-4 else formats.digits(nats)


def further(accuracies: Mapping[str, Accuracy]) -> tuple[Table, ...]:
    """Return a table of the further metrics of each variant with their paired differences; none without any."""
    rows: list[Row] = []
    for name, accuracy in accuracies.items():
        row: dict[str, Cell | str] = {"variant": name}
        for one in accuracy.further:
            row |= {one.title: cells.score(one.mean, is_fraction=one.is_fraction)}
            row |= {f"{DELTA} {one.metric}": one.change_cell()}
        rows += [row] if accuracy.further else []
    note = "With 95 % CIs, paired with the baseline. They have no part in the budget."
    return (table("Further metrics on the test split", rows, note),) if rows else ()


def classes(accuracies: Mapping[str, Accuracy]) -> Shown:
    """Return the change of the score on each class by variant; a change is marked if its interval excludes 0."""
    compared = {name: accuracy for name, accuracy in accuracies.items() if accuracy.difference and accuracy.classes}
    if not compared:
        reason = _of_set(accuracies) or "targets are no classes, or no variant was evaluated."
        return Statement(f"No scores per class: {reason}")
    by_class = {name: {row.name: row for row in a.classes} for name, a in accuracies.items() if a.classes}
    first = next(iter(compared.values()))
    fraction, better = first.is_fraction, first.higher_is_better
    names = [row.name for row in first.classes]
    chosen, which = names, ""
    if len(names) > CLASSES:
        lowest = {name: min(_gain(by_class[variant].get(name), better) for variant in compared) for name in names}
        chosen = sorted((name for name in names if lowest[name] < 0), key=lambda name: lowest[name])[:WORST]
        if not chosen:
            return Statement(f"None of {len(names):,} classes scores worse in any variant than in the baseline.")
        which = f", the {len(chosen)} of {len(names):,} classes with the largest regressions"
    rows: list[Row] = []
    for name in chosen:
        examples = next(scores[name].examples for scores in by_class.values() if name in scores)
        changes = {variant: _class(scores.get(name), fraction, better) for variant, scores in by_class.items()}
        rows.append({"class": Cell(name, formats.counted(examples, "example")), **changes})
    shown = (by_class[variant].get(name) for variant in compared for name in chosen)
    differences = [score.difference for score in shown if score]
    marked = sum(map(_excludes_zero, differences))
    metric = f"{DELTA} {first.title} per class{' (pts)' if fraction else ''}"
    caption = f"{metric}{which}; {marked or 'none'} of {len(differences)} marked"
    note = _CLASSES_NOTE + (_CHOSEN_NOTE if which else "")
    return table(caption, rows, note, folded=None if marked else True, shaded=True)


def _gain(score: ClassScore | None, better: bool) -> float:
    change = estimate.gain(score.difference if score else None, higher_is_better=better)
    return change.value if change else 0.0


def _of_set(accuracies: Mapping[str, Accuracy]) -> str:
    """Return why a metric has no scores of examples; '' if it has."""
    metric = next((one.metric for one in accuracies.values() if one.resampled), "")
    return metric and f"{metric} is a metric of the whole set, without a score for each example."


def _excludes_zero(change: Estimate | None) -> bool:
    return change is not None and (change.low > 0 or change.high < 0)


def _class(score: ClassScore | None, fraction: bool, better: bool) -> Cell:
    if score is None:
        return Cell("")
    if score.difference is None:
        return Cell(formats.score(score.mean.value, is_fraction=fraction), tone="quiet")
    value = formats.change(score.difference.value, is_fraction=fraction, unit=False)
    if not _excludes_zero(score.difference):
        return Cell(value, tone="quiet")
    tone = "good" if _gain(score, better) > 0 else "bad"
    return Cell(value, formats.interval(score.difference, is_fraction=fraction), tone)


def regressions(by_target: Mapping[str, Mapping[str, Accuracy]]) -> Shown:
    """Return how many examples each variant predicts worse than the baseline, and each such example once.

    `by_target` has the accuracies of variants by target. Examples that most variants lose come first.
    """
    compared = {(name, at): a for at, by_name in by_target.items() for name, a in by_name.items() if a.difference}
    if not compared:
        return Statement("No variant was compared with the baseline.")
    if reason := _of_set({name: a for (name, _), a in compared.items()}):
        return Statement(f"No single regressions: {reason}")
    examples: dict[int, dict[tuple[str, str], Regression]] = {}
    for key, accuracy in compared.items():
        for one in accuracy.worst_regressions:
            examples.setdefault(one.index, {})[key] = one
    places = {name: [at for other, at in compared if other == name] for name, _ in compared}
    by_place = {name: {at: _regressions(compared.get((name, at))) for at in by_target} for name in places}
    rows: list[Row] = [{"variant": name, **counts} for name, counts in by_place.items()]
    counts = table(f"Regressions by variant, of {max(len(a.scores) for a in compared.values()):,} examples", rows)
    grouped = [_by_outcome(found, places) for found in sorted(examples.values(), key=len, reverse=True)]
    return Several((counts, *_examples(grouped)))


def _regressions(accuracy: Accuracy | None) -> Cell:
    if accuracy is None:
        return Cell("")
    return Cell(f"{accuracy.regressions:,}", f"{accuracy.improvements:,} improved" if accuracy.improvements else "")


def _by_outcome(found: Mapping[tuple[str, str], Regression], places: Mapping[str, Sequence[str]]) -> list[Outcome]:
    """Return each different outcome of one example, and the variants that have it, with targets if not on all."""
    outcomes: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (name, at), one in found.items():
        outcomes.setdefault(_outcome(one), {}).setdefault(name, []).append(at)
    first = {_outcome(one): one for one in found.values()}
    return [
        (first[outcome], ", ".join(n if at == places[n] else f"{n} ({', '.join(at)})" for n, at in names.items()))
        for outcome, names in outcomes.items()
    ]


def _examples(grouped: Sequence[Sequence[Outcome]]) -> tuple[Shown, ...]:
    """Return examples as images, or in a table where there are none."""
    pictured = [found for found in grouped if found[0][0].png]
    lengths = accumulate(len(found[0][0].png) for found in pictured[:PICTURES])
    fitting = max(1, sum(length <= CHARACTERS for length in lengths))
    shown = pictured[:fitting] or grouped[:EXAMPLES]
    if not shown:
        return ()
    caption = f"Regressions by example, the most frequent first; {len(shown)} of {len(grouped)} recorded"
    if pictured:
        return (Strip(caption, tuple(map(image, shown))),)
    rows: list[Row] = []
    for found in shown:
        first, variants = found[0][0], "; ".join(f"{_outcome(one)[1]}: {names}" for one, names in found)
        row = {"example": f"{first.index:,}", "label": first.label, "baseline": _outcome(first)[0]}
        rows.append({**row, "variants": variants})
    return (table(caption, rows, text=("label", "baseline", "variants"), folded=True),)


def _outcome(one: Regression) -> tuple[str, str]:
    """Return the predictions of the baseline and of a variant, or their scores where both predictions are equal."""
    if one.before != one.after:
        return one.before, one.after
    return formats.signed(f"{one.score_before:.3g}"), formats.signed(f"{one.score_after:.3g}")


def image(found: Sequence[Outcome]) -> Image:
    """Return an example's input with its outcomes, each with the variants that have it."""
    example, label = found[0][0], f"label {found[0][0].label}, " if found[0][0].label else ""
    kind = "score of the baseline" if example.before == example.after else "baseline predicts"
    before = _outcome(example)[0]
    texts = "; ".join(f"{_outcome(one)[1]}: {names}" for one, names in found)
    return Image(example.png, f"example {example.index}: {label}{kind} {before}, {texts}", f"{before} {ARROW} {texts}")


def saturation(record: TargetRecord) -> Shown:
    """Return whether the int8 kernels of each file agree with FP32 emulation, and why one could not be checked."""
    rows: list[Row] = []
    for measurement in record.measurements:
        if check := measurement.integers:
            worst = max(check.layers, key=check.layers.__getitem__, default="")
            saturated = ", ".join(check.saturated)
            details = f"at most {check.layers[worst]:.1e} in {worst}" if worst else ""
            row: Row = {
                "variant": measurement.variant,
                "kernels": Cell(f"saturates: {saturated}", tone="bad") if saturated else Cell("exact", tone="good"),
                "output error": f"{check.max_relative_error:.1e}",
                "layers compared": Cell(f"{len(check.layers)}", details),
            }
            rows.append(row)
        reasons = (Cell(note, tone="warning", wide=True) for note in measurement.notes)
        rows += [{"variant": measurement.variant, "kernels": cell} for cell in reasons]
    if not rows:
        return Statement(f"No variant computes in int8 on {record.target}.")
    return table("Int8 kernels vs. FP32 emulation", rows, _INTEGERS_NOTE, text=("kernels",))
