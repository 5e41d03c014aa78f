"""Records in, tables and pictures out: what the notebooks display. Nothing here measures or decides.

The tables of single steps are here; those of a whole run are in `overview`, the pictures in `figures`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shrinkkit import answers, figures, formats, intervals
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
from shrinkkit.records import LayerAudit, TargetRecord, Variant
from shrinkkit.results import Results
from shrinkkit.tables import Cell, Column, Several, Shown, Statement, Table, facts
from shrinkkit.timings import distributions, latencies, runtime, speed, timings

if TYPE_CHECKING:
    from torch import nn

    from shrinkkit.tasks import Task
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
    "steps",
    "tails",
    "task",
    "throughput",
    "timings",
    "title",
    "tradeoff",
    "training",
    "trials",
    "variant",
    "variants",
    "verdict",
]


def task(of: "Task") -> Table:
    """Return what a task consists of: model, inputs, splits and metric."""
    splits = [(name, getattr(of, name)) for name in ("train", "calibration", "validation", "test")]
    inputs = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in of.example)
    pairs = [
        ("model", type(of.model).__name__),
        ("parameters", formats.count(sum(p.numel() for p in of.model.parameters()))),
        ("inputs of one call", inputs),
        ("examples", ", ".join(f"{len(split):,} {name}" for name, split in splits)),
        ("metric", of.metric),
        ("classes", ", ".join(of.class_names)),
    ]
    return facts(f"Task {of.name}", pairs)


def score(scores: Sequence[float], *, metric: str, split: str) -> Statement:
    """Return the mean of a split's scores with its interval, in one sentence; `scores` holds at least one."""
    shares = answers.in_shares(scores)
    mean = intervals.mean(scores)
    value = formats.score(mean.value, in_shares=shares)
    return Statement(
        f"{metric.capitalize()} {value} {formats.between(mean, in_shares=shares)} on {len(scores):,} {split} examples."
    )


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


def files(of: Variant) -> Table:
    """Return a variant's model files, and why a runtime has none."""
    rows: list[tuple[Cell, ...]] = [
        (
            Cell(file.runtime),
            Cell(file.path),
            Cell(formats.size(file.size_bytes)),
            Cell(formats.size(file.compressed_bytes)),
            Cell(f"{file.deviation:.1e}" if file.deviation else "0"),
            Cell(file.sha256[:12]),
        )
        for file in of.files
    ]
    rows += [(Cell(name), Cell("no file: " + why, tone="doubt", wide=True)) for name, why in of.refusals.items()]
    columns = (
        Column("runtime"),
        Column("file"),
        Column("on disk", True),
        Column("compressed", True),
        Column("deviation", True),
        Column("SHA-256"),
    )
    note = (
        "Deviation: how far outputs of the file loaded back are from the model's in memory, as a share of the largest."
    )
    return Table(f"Model files of {of.name}", columns, tuple(rows), note)


def variant(of: Variant) -> Table:
    """Return what a variant's recipe asked for and what was reached."""
    asked = [f"{key}: {_settings(section)}" for key, section in of.recipe.items() if section]
    reached = formats.percent(of.ratio_reached) if of.ratio_reached is not None else ""
    wanted = f" of {formats.percent(of.ratio_asked)} asked for" if of.ratio_asked is not None else ""
    pairs = [
        ("recipe", "; ".join(asked) or "none: this is the model as it was"),
        ("made from", of.source or ""),
        ("removed", reached + wanted if reached else ""),
        ("parameters", formats.count(of.parameters)),
        ("MACs of one example", formats.count(of.macs)),
        ("weights that are zero", formats.percent(of.sparsity)),
        *((f"file for {file.runtime}", formats.size(file.size_bytes)) for file in of.files),
        *((f"no file for {name}", why) for name, why in of.refusals.items()),
        ("seed", str(of.seed)),
        ("notes", " ".join(of.notes)),
    ]
    return facts(f"Variant {of.name}", pairs)


def audit(of: Variant) -> Table:
    """Return what happened to each layer of a variant; the caption sums it up."""
    runtimes = list(dict.fromkeys(name for layer in of.audit for name in layer.precision))
    rows = tuple(_audited(layer, runtimes) for layer in of.audit)
    columns = (
        Column("layer"),
        Column("kind"),
        Column("channels", True),
        Column("parameters", True),
        Column("zeros", True),
        *(Column(f"in {runtime}") for runtime in runtimes),
        Column("why left alone"),
    )
    return Table(f"{of.name}: {_summary(of, runtimes)}", columns, rows)


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


def measurements(record: TargetRecord) -> Several:
    """Return the conclusion of a benchmark: each variant's accuracy and latency on its target."""
    rows: list[tuple[Cell, ...]] = []
    for one in record.measurements:
        if one.error:
            rows.append((Cell(one.variant), Cell(one.error, tone="bad", wide=True)))
            continue
        latency = (
            Cell(formats.milliseconds(one.latency_ms.value), formats.between(one.latency_ms))
            if one.latency_ms
            else Cell("")
        )
        ratio = speed(one.latency) if one.latency else Cell("1" if one.variant == BASELINE else "")
        accuracy = answers.change(one.accuracy) if one.accuracy else Cell("")
        rows.append((Cell(one.variant), latency, ratio, accuracy))
    columns = (Column("variant"), Column("latency", True), Column("against FP32 here", True), Column("accuracy", True))
    table = Table(f"Measured on {record.target}", columns, tuple(rows), "; ".join(record.notes))
    return Several((table,))


def _audited(layer: LayerAudit, runtimes: Sequence[str]) -> tuple[Cell, ...]:
    lost = layer.channels != layer.channels_before
    arrow = "\N{RIGHTWARDS ARROW}"
    channels = (
        ""
        if layer.channels is None
        else f"{layer.channels_before} {arrow} {layer.channels}"
        if lost
        else f"{layer.channels}"
    )
    why = dict.fromkeys(
        filter(None, [layer.kept_because, *(layer.precision[r].why for r in runtimes if r in layer.precision)])
    )
    runs = (layer.precision[r].runs_as if r in layer.precision else "" for r in runtimes)
    return (
        Cell(layer.layer),
        Cell(layer.kind, tone="quiet"),
        Cell(channels, tone="" if lost else "quiet"),
        Cell(formats.count(layer.parameters)),
        Cell(formats.percent(layer.zeroed), tone="" if layer.zeroed else "quiet"),
        *(Cell(text, tone="quiet" if text == "float32" else "") for text in runs),
        Cell("; ".join(why)),
    )


def _summary(of: Variant, runtimes: Sequence[str]) -> str:
    total = len(of.audit)
    said = []
    if lost := sum(layer.channels != layer.channels_before for layer in of.audit):
        said.append(f"{lost} of {formats.counted(total, 'layer')} lost channels")
    if of.sparsity >= 0.001:
        said.append(f"{formats.percent(of.sparsity)} of the weights are zero")
    for name in runtimes:
        kinds = [layer.precision[name].runs_as for layer in of.audit if name in layer.precision]
        for kind in dict.fromkeys(k for k in kinds if k not in ("float32", "folded")):
            said.append(f"{kinds.count(kind)} of {total} run in {kind} in {name}")
    return "; ".join(said) or f"{formats.counted(total, 'layer')}, none changed"


def _settings(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in section.items() if value not in ([], {}, (), None, False))


def _milliseconds(value: float | None) -> str:
    return formats.milliseconds(value) if value is not None else ""
