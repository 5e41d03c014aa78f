"""The speed-up breakdown: a variant's speed-up as a product of runtime, each stage and precision."""

from dataclasses import dataclass

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Comparison, speedup
from shrinkkit.core.recipe import BASELINE
from shrinkkit.display.showable import Rich
from shrinkkit.errors import UnfairComparison
from shrinkkit.results.results import Results, Row


@dataclass(frozen=True)
class Factor:
    """The speed-up of one part of a recipe, or of several that were not measured separately."""

    name: str
    kind: str
    """`runtime`, `transform`, `precision`, or `both` for transforms and precision together."""
    speedup: Estimate


@dataclass(frozen=True, repr=False)
class Breakdown(Rich):
    """Factors whose product is a variant's speed-up against PyTorch on one target."""

    variant: str
    target: str
    """A place, as in `Row`."""
    factors: tuple[Factor, ...]
    """The runtime, then each step of the recipe."""
    total: Estimate
    timing: str
    """Verdict on `total`."""


def breakdown(results: Results) -> tuple[Breakdown, ...]:
    """Return the breakdown of every measured variant, the baseline on other runtimes than torch included."""
    return tuple(
        Breakdown(row.variant, row.target, (*_runtime(results, row), *_steps(results, row)), ratio, row.timing_today)
        for row in results.rows
        if row.state == "measured" and (ratio := row.speedup_today) is not None and not row.intermediate
    )


def _runtime(results: Results, row: Row) -> tuple[Factor, ...]:
    compared = results.measured[row.target].runtime
    return (Factor("runtime", "runtime", compared.speedup),) if compared else ()


def _steps(results: Results, row: Row) -> tuple[Factor, ...]:
    """Return the speed-up of each step from the baseline to a row's variant, on the row's target."""
    if row.speedup is None:
        return ()
    factors: list[Factor] = []
    later, compared = row.variant, _comparison(results, row.variant, row.target)
    while compared and (earlier := results.variants[later].source) not in (None, "", BASELINE):
        source = _comparison(results, str(earlier), row.target)
        if source is None or not _comparable(source, compared):
            return (_factor(results, BASELINE, row.variant, row.speedup),)
        ratio = estimate.product(compared.speedup, estimate.inverse(source.speedup))
        factors.insert(0, _factor(results, str(earlier), later, ratio))
        later, compared = str(earlier), source
    return (_factor(results, BASELINE, later, compared.speedup if compared else row.speedup), *factors)


def _factor(results: Results, earlier: str, later: str, ratio: Estimate) -> Factor:
    """Return the factor of the steps that lead from one variant to a later one."""
    before = results.variants[earlier].stages if earlier in results.variants else ()
    variant = results.variants[later]
    stages, precision = variant.stages[len(before) :], variant.precision
    if precision == "float32":
        return Factor(" + ".join(stages), "transform", ratio)
    return Factor(" + ".join([*stages, precision]), "both" if stages else "precision", ratio)


def _comparable(source: Comparison, later: Comparison) -> bool:
    """Return whether two comparisons with the baseline tell how two variants compare."""
    if "too noisy" in (source.verdict, later.verdict):
        return False
    try:
        speedup(source, later)
    except UnfairComparison:
        return False
    return True


def _comparison(results: Results, variant: str, target: str) -> Comparison | None:
    rows = (row for row in results.rows if (row.variant, row.target, row.state) == (variant, target, "measured"))
    measurement = next((results.measurement(row) for row in rows), None)
    return measurement.latency if measurement else None
