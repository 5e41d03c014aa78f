"""Records in, tables and pictures out: what the notebooks display. Nothing here measures or decides.

The tables of single steps are here; those of a whole run are in `overview`, the pictures in `figures`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shrinkkit.core import estimate
from shrinkkit.core.measurement import Comparison
from shrinkkit.core.measurement import measurements_table as measurements
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.variant import Variant, audit_table
from shrinkkit.core.variant import files_table as files
from shrinkkit.core.variant import variant_table as variant
from shrinkkit.display import cells, formats
from shrinkkit.display.tables import Cell, Column, Several, Shown, Statement, Table
from shrinkkit.report import figures
from shrinkkit.report.deployment import memory, tails, throughput
from shrinkkit.report.latency import distributions, latencies, runtime, timings
from shrinkkit.report.overview import (
    commands,
    environment,
    factors,
    missing,
    model_files,
    steps,
    title,
    tradeoff,
    variants,
    verdict,
)
from shrinkkit.report.predictions import accuracies, classes, fidelity, integers, lost
from shrinkkit.report.profile import layers as hotspots
from shrinkkit.results.table import Results

__all__ = [
    "accuracies",
    "audit",
    "audits",
    "classes",
    "commands",
    "distributions",
    "environment",
    "factors",
    "fidelity",
    "files",
    "hotspots",
    "integers",
    "latencies",
    "lost",
    "measurements",
    "memory",
    "missing",
    "model_files",
    "runtime",
    "score",
    "scores",
    "shrunk",
    "steps",
    "tails",
    "throughput",
    "timings",
    "title",
    "trade",
    "tradeoff",
    "training",
    "variant",
    "variants",
    "verdict",
]


def score(scores: Sequence[float], *, metric: str, split: str) -> Statement:
    """Return the mean of a split's scores with its interval, in one sentence; `scores` holds at least one."""
    shares = formats.is_fraction(scores)
    mean = estimate.mean(scores)
    value = formats.with_ci(formats.score(mean.value, is_fraction=shares), mean, is_fraction=shares)
    return Statement(f"{metric.capitalize()} {value} on {len(scores):,} {split} examples.")


def scores(found: Mapping[str, Sequence[float]], *, metric: str, split: str) -> Table:
    """Return the mean score of each model on the same examples, and its paired difference to the first one's.

    Args:
        found: Scores by the model's name, one an example, in the same order.
        metric: What a score is called.
        split: What the examples are called.
    """
    first = next(iter(found.values()))
    shares = all(map(formats.is_fraction, found.values()))
    means = {name: estimate.mean(one) for name, one in found.items()}
    moved = {name: estimate.paired_difference(first, one) for name, one in found.items() if one is not first}
    rows = tuple(
        (
            Cell(name),
            Cell(formats.score(mean.value, is_fraction=shares), formats.interval(mean, is_fraction=shares)),
            Cell(
                formats.change(moved[name].value, is_fraction=shares), formats.interval(moved[name], is_fraction=shares)
            )
            if name in moved
            else Cell("reference", tone="quiet"),
        )
        for name, mean in means.items()
    )
    columns = (Column("model"), Column(metric, True), Column("change", True))
    return Table(f"{metric.capitalize()} on {len(first):,} {split} examples", columns, rows)


def shrunk(*, parameters: Sequence[int], macs: Sequence[int]) -> Table:
    """Return how many parameters and MACs of one example a model has before and after it was made smaller.

    Args:
        parameters: Before and after.
        macs: Before and after.
    """
    rows = tuple(
        (Cell(name), Cell(formats.count(before)), Cell(formats.count(after)), Cell(formats.times(before / after)))
        for name, (before, after) in (("parameters", parameters), ("MACs of one example", macs))
    )
    columns = (Column(""), Column("before", True), Column("after", True), Column("fewer by", True))
    return Table("What became smaller", columns, rows)


def trade(timed: Comparison, before: Sequence[float], after: Sequence[float], *, metric: str) -> Statement:
    """Return in one sentence what was won in speed and lost in score.

    Args:
        timed: Of the model before and the one after.
        before: Its scores, one an example.
        after: The scores of the other, of the same examples in the same order.
        metric: What a score is called.
    """
    shares = formats.is_fraction([*before, *after])
    moved = estimate.paired_difference(before, after)
    change = formats.with_ci(formats.change(moved.value, is_fraction=shares), moved, is_fraction=shares)
    said = f"Speed-up {formats.speedup(timed.speedup, timed.verdict)}, {metric} {change}."
    return Statement(said, timed.doubts, cells.speedup(timed.speedup, timed.verdict).tone)


def training(scores: Sequence[float], *, metric: str) -> Shown:
    """Return the validation score after each epoch as a picture, or a sentence where nothing was trained."""
    return figures.training(scores, metric=metric) if scores else Statement("No fine-tuning was asked for.")


def audit(of: Variant) -> Table:
    """Return what happened to each layer of a variant; the caption sums it up."""
    return audit_table(of.audit, of=of.name, sparsity=of.sparsity)


def audits(found: Results) -> Several:
    """Return the audit of every variant but the baseline, folded below a line that sums it up."""
    tables = (replace(audit(made), folded=True) for name, made in found.variants.items() if name != BASELINE)
    return Several(tuple(tables) or (Statement("No variant was made.", tone="warning"),))
