"""Records in, tables and pictures out: what the notebooks display. Nothing here measures or decides.

The tables of single steps are here; those of a whole run are in `overview`, the pictures in `figures`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from shrinkkit import figures, formats, intervals, views
from shrinkkit.answers import accuracies, classes, fidelity, integers, lost
from shrinkkit.costs import memory, tails, throughput
from shrinkkit.hotspots import layers as hotspots
from shrinkkit.overview import (
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
from shrinkkit.recipes import BASELINE
from shrinkkit.records import Comparison, Variant
from shrinkkit.results import Results
from shrinkkit.tables import Cell, Column, Several, Shown, Statement, Table
from shrinkkit.timings import distributions, latencies, runtime, timings
from shrinkkit.views import files, measurements, task, variant

if TYPE_CHECKING:
    from torch import nn

    from shrinkkit.trials import Trial

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
    "layers",
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
    "task",
    "throughput",
    "timings",
    "title",
    "trade",
    "tradeoff",
    "training",
    "trials",
    "variant",
    "variants",
    "verdict",
]


def score(scores: Sequence[float], *, metric: str, split: str) -> Statement:
    """Return the mean of a split's scores with its interval, in one sentence; `scores` holds at least one."""
    shares = formats.in_shares(scores)
    mean = intervals.mean(scores)
    value = formats.score(mean.value, in_shares=shares)
    return Statement(
        f"{metric.capitalize()} {value} {formats.between(mean, in_shares=shares)} on {len(scores):,} {split} examples."
    )


def scores(found: Mapping[str, Sequence[float]], *, metric: str, split: str) -> Table:
    """Return the mean score of each model on the same examples, and its paired difference to the first one's.

    Args:
        found: Scores by the model's name, one an example, in the same order.
        metric: What a score is called.
        split: What the examples are called.
    """
    first = next(iter(found.values()))
    shares = all(map(formats.in_shares, found.values()))
    means = {name: intervals.mean(one) for name, one in found.items()}
    moved = {name: intervals.paired_difference(first, one) for name, one in found.items() if one is not first}
    rows = tuple(
        (
            Cell(name),
            Cell(formats.score(mean.value, in_shares=shares), formats.between(mean, in_shares=shares)),
            Cell(formats.change(moved[name].value, in_shares=shares), formats.between(moved[name], in_shares=shares))
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
    shares = formats.in_shares([*before, *after])
    moved = intervals.paired_difference(before, after)
    speed = f"{formats.times(timed.speedup.value)} {formats.between(timed.speedup)}"
    change = f"{formats.change(moved.value, in_shares=shares)} {formats.between(moved, in_shares=shares)}"
    said = f"Against the model before, this one is {timed.verdict} ({speed}), and its {metric} changes by {change}."
    return Statement(said, timed.doubts, views.speed(timed).tone)


def layers(model: "nn.Module", layer_macs: Mapping[str, int]) -> Table:
    """Return the layers of a model with their share of its parameters and of its work.

    Args:
        model: Whose layers are listed: every module with parameters of its own.
        layer_macs: MACs by layer; '' holds what no layer of its own computes.
    """
    own = {name: sum(p.numel() for p in m.parameters(recurse=False)) for name, m in model.named_modules()}
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    total, work = sum(own.values()) or 1, sum(layer_macs.values()) or 1
    names = sorted(filter(lambda n: own[n] or layer_macs.get(n), own), key=lambda n: -layer_macs.get(n, 0))
    rows = tuple(
        (
            Cell(name or "(outside any layer)"),
            Cell(kinds[name]),
            Cell(formats.count(own[name]), formats.percent(own[name] / total)),
            Cell(formats.count(layer_macs.get(name, 0)), formats.percent(layer_macs.get(name, 0) / work)),
        )
        for name in names
    )
    columns = (Column("layer"), Column("kind"), Column("parameters", True), Column("MACs of one example", True))
    sums = f"{formats.count(sum(own.values()))} parameters, {formats.count(work)} MACs"
    caption = f"{formats.counted(len(rows), 'layer')}, {sums}; most work first"
    return Table(caption, columns, rows)


def training(scores: Sequence[float], *, metric: str) -> Shown:
    """Return the validation score after each epoch as a picture, or a sentence where nothing was trained."""
    return figures.training(scores, metric=metric) if scores else Statement("No fine-tuning was asked for.")


def audit(of: Variant) -> Table:
    """Return what happened to each layer of a variant; the caption sums it up."""
    return views.audit(of.audit, of=of.name, sparsity=of.sparsity)


def audits(found: Results) -> Several:
    """Return the audit of every variant but the baseline, folded below a line that sums it up."""
    tables = (replace(audit(made), folded=True) for name, made in found.variants.items() if name != BASELINE)
    return Several(tuple(tables) or (Statement("No variant was made.", tone="doubt"),))


def trials(loaded: Mapping[str, "Trial"]) -> Table:
    """Return which files were loaded and proved, how long that took, and why a variant has none."""
    rows = tuple(
        (Cell(name), Cell(trial.error, tone="bad", wide=True))
        if trial.error
        else (
            Cell(name),
            Cell(_milliseconds(trial.load_ms)),
            Cell(_milliseconds(trial.first_call_ms)),
            Cell(trial.file_sha256[:12]),
        )
        for name, trial in loaded.items()
    )
    columns = (Column("variant"), Column("load", True), Column("first call", True), Column("SHA-256"))
    return Table("Files loaded back, each proved to be the one that was made", columns, rows)


def _milliseconds(value: float | None) -> str:
    return formats.milliseconds(value) if value is not None else ""
