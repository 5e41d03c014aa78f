"""Variants that are broken, and files that are worse than others of the same recipe, each with the likely cause."""

from collections.abc import Iterator

from shrinkkit.core import estimate
from shrinkkit.core.measurement import Accuracy
from shrinkkit.core.recipe import BASELINE
from shrinkkit.display import formats
from shrinkkit.results.results import Results, Row

FRACTION_LEFT = 0.5
"""A variant that keeps less than this fraction of a score in [0, 1] is broken."""
COSINE_LEFT, COSINE_BELOW = 0.5, 0.05
"""Cosine similarity to the baseline's outputs below which a variant is broken, and by how much it may lie below that of
another file of its recipe."""


def faults(results: Results) -> dict[tuple[str, str, str], list[str]]:
    """Return the places of files that are broken or far below others of their recipe, by state, variant and reason."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in results.rows:
        if row.variant != BASELINE and (fault := _fault(row, results)):
            state, reason = fault
            grouped.setdefault((state, row.variant, reason), []).append(results.where(row.target))
    return grouped


def _fault(row: Row, results: Results) -> tuple[str, str] | None:
    accuracy = _accuracy(row, results)
    if accuracy is None:
        return None
    level, better = _broken(row, accuracy, results), _better(row, accuracy, results)
    if not level and not better:
        return None
    figure = f"{results.metric} {formats.score(accuracy.mean.value, is_fraction=results.is_fraction)}"
    detail = f"{figure}, {level}." if level else f"{figure}, cosine {accuracy.cosine:.3f}."
    causes = [*([better] if better else []), *_causes(row, results, blame_recipe=not better)]
    return "broken" if level else "faulty file", " ".join([detail, *causes])


def _accuracy(row: Row, results: Results) -> Accuracy | None:
    measurement = results.measurement(row)
    return measurement.accuracy if row.state == "measured" and measurement else None


def _broken(row: Row, accuracy: Accuracy, results: Results) -> str:
    """Return at what level the score is if the variant has nearly lost what the baseline knows, '' otherwise."""
    before = _accuracy(results.row(BASELINE, row.target), results)
    if before is None or row.accuracy_verdict != "over budget":
        return ""
    examples = sum(one.examples for one in before.classes)
    majority = max((one.examples for one in before.classes), default=0) / examples if examples else 0.0
    was, now = before.mean, accuracy.mean
    known = f"{formats.score(was.value, is_fraction=results.is_fraction)} in the baseline"
    if results.is_fraction and now.low <= majority < was.low:
        return f"no better than always the most frequent class ({formats.percent(majority)}), {known}"
    if (results.is_fraction or results.is_fidelity) and now.value < FRACTION_LEFT * was.value:
        return f"less than half of the {known}"
    return f"and outputs unrelated to the baseline's, {known}" if accuracy.cosine < COSINE_LEFT else ""


def _better(row: Row, accuracy: Accuracy, results: Results) -> str:
    """Name the best other file of the recipe if it is far better than this one."""
    others = [(one, _accuracy(one, results)) for one in results.rows if one.variant == row.variant and one != row]
    found = [(one, other) for one, other in others if other and len(other.scores) == len(accuracy.scores)]
    if not found:
        return ""
    best, other = max(found, key=lambda pair: (pair[1].mean.value, pair[1].cosine))
    worse = estimate.paired_difference(other.scores, accuracy.scores).high < -results.budget.accuracy_drop
    if not worse and other.cosine - accuracy.cosine <= COSINE_BELOW:
        return ""
    figures = f"{formats.score(other.mean.value, is_fraction=results.is_fraction)}, cosine {other.cosine:.3f}"
    return f"The same recipe on {results.where(best.target)} has {figures}, so the fault lies in this file."


def _causes(row: Row, results: Results, *, blame_recipe: bool) -> Iterator[str]:
    measurement, variant = results.measurement(row), results.variants.get(row.variant)
    if measurement and measurement.integers and measurement.integers.saturated:
        yield f"Likely cause: int8 accumulators saturate in {', '.join(measurement.integers.saturated[:3])}."
    if not blame_recipe or variant is None:
        return
    sources = [one for one in results.rows if (one.variant, one.target) == (variant.source, row.target)]
    stages = variant.stages
    pruned = [i for i, name in enumerate(stages) if name.startswith(("prune-", "drop-", "factorize"))]
    norms = any(layer.kind.startswith("BatchNorm") for layer in variant.audit)
    if pruned and norms and not any("BatchNorm statistics" in note for note in variant.notes):
        yield "Likely cause: BatchNorm statistics are those of the full model. Make the variant again."
    elif pruned and not {"fine-tune", "distil"} & {*stages[pruned[-1] :]}:
        yield f"Likely cause: `{stages[pruned[-1]]}` without training after it. Add `fine-tune`, or lower `ratio`."
    elif not stages or any(one.accuracy_verdict == "within budget" for one in sources):
        yield f"Likely cause: the precision, {variant.precision}. Skip sensitive layers."
