"""Records in, tables and pictures out: what the notebooks display. Nothing here measures or decides.

The tables of single steps are here; those of a whole run are in `overview`, the pictures in `figures`.
"""

from collections.abc import Sequence
from dataclasses import replace

from shrinkkit.core.measurement import Accuracy, Comparison
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
    return Table("Model size", columns, rows)


def trade(latency: Comparison, accuracy: Accuracy) -> Statement:
    """Return the speed-up of a model and the change of its accuracy, both against the same reference."""
    fraction, text = formats.is_fraction(accuracy.scores), formats.speedup(latency.speedup, latency.verdict)
    if moved := accuracy.difference:
        change = formats.with_ci(formats.change(moved.value, is_fraction=fraction), moved, is_fraction=fraction)
        text = f"{text}. Change of {accuracy.metric}: {change}"
    return Statement(f"Speed-up: {text}.", latency.warnings, cells.speedup(latency.speedup, latency.verdict).tone)


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
