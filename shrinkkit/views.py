"""How records look: each as a table or a sentence, the same in a notebook, in a text and in a terminal.

The views of several records at once are in `show` and the modules that it gathers.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shrinkkit import formats
from shrinkkit.tables import Cell, Column, Statement, Table, facts

if TYPE_CHECKING:
    from shrinkkit.records import (
        Accuracy,
        Comparison,
        Environment,
        Estimate,
        LayerAudit,
        Measurement,
        Status,
        TargetRecord,
        Variant,
    )
    from shrinkkit.rows import Results, Row
    from shrinkkit.schema import Recipe, Study
    from shrinkkit.tasks import Task


def task(of: "Task") -> Table:
    """Return what a task consists of: model, inputs, splits and metric."""
    known = of.to_dict()
    inputs = ", ".join(f"{tuple(one['shape'])} {one['dtype']}" for one in known["inputs"])
    pairs = [
        ("model", known["model"]),
        ("parameters", formats.count(known["parameters"])),
        ("inputs of one call", inputs),
        ("examples", ", ".join(f"{count:,} {split}" for split, count in known["examples"].items())),
        ("metric", of.metric),
        ("classes", ", ".join(of.class_names)),
    ]
    return facts(f"Task {of.name}", pairs)


def recipe(of: "Recipe") -> Table:
    """Return the sections of a recipe, a line each."""
    return facts(f"Recipe {of.name}", [(name, _settings(section)) for name, section in of.settings().items()])


def study(of: "Study") -> Table:
    """Return what is done to what, where, and within which budget."""
    drop = of.budget.accuracy_drop
    most = formats.percent(drop) + " of accuracy" if of.budget.unit == "share" else f"{drop:g} of the score"
    budget = f"at most {most}, for the {of.budget.want}"
    pairs = [
        ("task", of.task),
        *(
            (f"recipe {one.name}", " | ".join(_settings(section) for section in one.settings().values()))
            for one in of.recipes
        ),
        ("targets", ", ".join(of.targets)),
        ("budget", budget + (f" on {of.budget.target}" if of.budget.target else "")),
        ("seed", str(of.seed)),
    ]
    return facts(f"Study {of.name}", pairs)


def results(of: "Results") -> Table:
    """Return every variant at every place with what decides: size, speed, accuracy, or why there is none."""
    columns = (
        Column("variant"),
        Column("target"),
        Column("on disk", True),
        Column("vs FP32 here", True),
        Column("vs PyTorch today", True),
        Column("change", True),
    )
    return Table(f"Run {of.name} of {of.task}", columns, tuple(_row(row, of.in_shares) for row in of.rows))


def estimate(of: "Estimate") -> Statement:
    """Return a value with its interval."""
    return Statement(f"{formats.digits(of.value)} {formats.between(of)}")


def variant(of: "Variant") -> Table:
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


def files(of: "Variant") -> Table:
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


def audit(layers: "Sequence[LayerAudit]", *, of: str = "", sparsity: float | None = None) -> Table:
    """Return what happened to each layer; the caption sums it up.

    Args:
        layers: One row each.
        of: The variant's name, for the caption.
        sparsity: Share of its weights that are zero; None where only the layers are known.
    """
    runtimes = list(dict.fromkeys(name for layer in layers for name in layer.precision))
    columns = (
        Column("layer"),
        Column("kind"),
        Column("channels", True),
        Column("parameters", True),
        Column("zeros", True),
        *(Column(f"in {runtime}") for runtime in runtimes),
        Column("why left alone"),
    )
    said = _summary(layers, runtimes, sparsity)
    return Table(f"{of}: {said}" if of else said, columns, tuple(_audited(layer, runtimes) for layer in layers))


def comparison(of: "Comparison") -> Statement:
    """Return a paired timing: verdict with interval, the control, and a warning where it is not to be trusted."""
    here = of.conditions
    runtimes = here.runtime + (f" and {of.candidate_runtime}" if of.candidate_runtime != here.runtime else "")
    remarks = [
        f"{formats.milliseconds(of.reference_ms.value)} and {formats.milliseconds(of.candidate_ms.value)} a call of "
        f"{here.batch_size} on {here.device} in {runtimes}, {formats.counted(here.threads, 'thread')}",
        f"noise floor {formats.percent(of.noise_floor)}, {len(of.null_samples_ms) // 2} blocks in "
        f"{of.duration_s:.1f} s",
        *([f"WARNING: {'; '.join(of.doubts)}"] if of.doubts else []),
    ]
    said = f"{of.candidate} is {of.verdict}: {formats.digits(of.speedup.value)} {formats.between(of.speedup)} times"
    tone = {"faster": "good", "slower": "bad", "same": ""}.get(of.verdict, "doubt")
    return Statement(f"{said} the speed of {of.reference}", tuple(remarks), tone)


def accuracy(of: "Accuracy") -> Table:
    """Return a score with its interval, and how the answers moved against the baseline's."""
    shares = formats.in_shares(of.scores)
    pairs = [
        (of.metric, f"{formats.score(of.mean.value, in_shares=shares)} {formats.between(of.mean, in_shares=shares)}"),
        ("change", f"{(cell := change(of)).text} {cell.aside}" if of.difference else ""),
        ("same answers", formats.percent(of.agreement) if of.agreement is not None else ""),
        ("cosine to the baseline's outputs", f"{of.cosine:.4f}" if of.difference else ""),
        ("examples", f"{len(of.scores):,}"),
        ("lost and gained", f"{of.lost_count} and {of.gained_count}" if of.difference else ""),
    ]
    return facts("Accuracy on the test split", pairs)


def measurement(of: "Measurement") -> Table:
    """Return what was measured of one model file on one target."""
    latency = f"{formats.milliseconds(of.latency_ms.value)} {formats.between(of.latency_ms)}" if of.latency_ms else ""
    timed = speed(of.latency) if of.latency else Cell("")
    judged = change(of.accuracy) if of.accuracy else Cell("")
    pairs = [
        ("not measured because", of.error),
        ("latency", latency),
        ("against FP32 here", f"{timed.text} {timed.aside}".replace("\n", ", ").strip()),
        ("change of accuracy", f"{judged.text} {judged.aside}".strip()),
        ("load", formats.milliseconds(of.load_ms) if of.load_ms is not None else ""),
        ("first call", formats.milliseconds(of.first_call_ms) if of.first_call_ms is not None else ""),
        ("peak memory", formats.size(of.memory.peak_bytes) if of.memory else ""),
        ("layers whose integers saturate", ", ".join(of.integers.saturated) if of.integers else ""),
        ("notes", " ".join(of.notes)),
    ]
    return facts(f"{of.variant} on {of.target}", pairs)


def measurements(of: "TargetRecord") -> Table:
    """Return the conclusion of a benchmark: each variant's accuracy and latency on its target."""
    columns = (Column("variant"), Column("latency", True), Column("against FP32 here", True), Column("accuracy", True))
    rows = tuple(_measured(one) for one in of.measurements)
    return Table(f"Measured on {of.target}", columns, rows, "; ".join(of.notes))


def status(of: "Status") -> Table:
    """Return what became of a run's steps."""
    rows = tuple(
        (
            Cell(step.name),
            Cell(step.state, tone={"failed": "bad", "skipped": "bad"}.get(step.state, "quiet")),
            Cell(f"{step.duration_s:.1f} s"),
            Cell(step.error or step.note),
        )
        for step in of.steps
    )
    columns = (Column("notebook"), Column("state"), Column("took", True), Column("what went wrong"))
    return Table(f"{of.command}, started {of.started}", columns, rows)


def environment(of: "Environment") -> Table:
    """Return a machine and its software."""
    pairs = [
        ("processor", f"{of.cpu}, {formats.counted(of.cores, 'core')}"),
        ("instructions", ", ".join(of.cpu_flags)),
        ("accelerator", of.gpu),
        ("memory", formats.size(of.memory_bytes)),
        ("threads of one call", str(of.threads)),
        ("may run on cores", ", ".join(map(str, of.affinity))),
        ("clock governor", of.governor),
        ("clock when it ended", f"{of.clock_mhz:.0f} MHz" if of.clock_mhz else ""),
        ("load when it ended", f"{of.load_average:g}"),
        ("system", of.platform),
        ("Python", of.python),
        ("versions", ", ".join(f"{name} {version}" for name, version in of.versions.items())),
        ("variables", ", ".join(f"{name}={value}" for name, value in of.variables.items())),
    ]
    return facts("Machine and software", pairs)


def change(of: "Accuracy") -> Cell:
    """Return the paired difference to the baseline with its interval; `reference` for the baseline."""
    if of.difference is None:
        return Cell("reference", tone="quiet")
    shares = formats.in_shares(of.scores)
    value = formats.change(of.difference.value, in_shares=shares)
    return Cell(value, formats.between(of.difference, in_shares=shares))


def speed(of: "Comparison") -> Cell:
    """Return a speed-up with its interval and verdict."""
    tone = {"faster": "good", "slower": "bad"}.get(of.verdict, "doubt" if of.verdict != "same" else "quiet")
    return Cell(formats.times(of.speedup.value), f"{formats.between(of.speedup)}\n{of.verdict}", tone)


def _row(one: "Row", in_shares: bool) -> tuple[Cell, ...]:
    name, target = Cell(one.variant), Cell(one.target)
    if one.state != "measured":
        return name, target, Cell(f"{one.state}: {one.reason}", tone="doubt", wide=True)
    speeds = [
        Cell(formats.times(ratio.value), f"{formats.between(ratio)}\n{verdict}") if ratio else Cell("reference")
        for ratio, verdict in ((one.speedup, one.timing), (one.speedup_today, one.timing_today))
    ]
    moved = one.difference
    change = (
        Cell(formats.change(moved.value, in_shares=in_shares), formats.between(moved, in_shares=in_shares))
        if moved
        else Cell("reference")
    )
    return name, target, Cell(formats.size(one.size_bytes or 0)), *speeds, change


def _measured(one: "Measurement") -> tuple[Cell, ...]:
    if one.error:
        return Cell(one.variant), Cell(one.error, tone="bad", wide=True)
    known = one.latency_ms
    latency = Cell(formats.milliseconds(known.value), formats.between(known)) if known else Cell("")
    ratio = speed(one.latency) if one.latency else Cell("1" if one.accuracy and not one.accuracy.difference else "")
    return Cell(one.variant), latency, ratio, change(one.accuracy) if one.accuracy else Cell("")


def _audited(layer: "LayerAudit", runtimes: Sequence[str]) -> tuple[Cell, ...]:
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


def _summary(layers: "Sequence[LayerAudit]", runtimes: Sequence[str], sparsity: float | None) -> str:
    total = len(layers)
    said = []
    if lost := sum(layer.channels != layer.channels_before for layer in layers):
        said.append(f"{lost} of {formats.counted(total, 'layer')} lost channels")
    if sparsity is not None and sparsity >= 0.001:
        said.append(f"{formats.percent(sparsity)} of the weights are zero")
    for name in runtimes:
        kinds = [layer.precision[name].runs_as for layer in layers if name in layer.precision]
        for kind in dict.fromkeys(k for k in kinds if k not in ("float32", "folded")):
            said.append(f"{kinds.count(kind)} of {total} run in {kind} in {name}")
    return "; ".join(said) or f"{formats.counted(total, 'layer')}, none changed"


def _settings(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in section.items() if value not in ([], {}, (), None, False))
