"""Model cards: `model-card.json` for programs and `README.md` for people, in the folder of each variant.

A variant's folder may be passed on alone. Needs no torch.
"""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrinkkit.core import recipe, run_folder, store
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.machines import Environment
from shrinkkit.core.measurement import Comparison, Measurement, TargetRecord
from shrinkkit.core.run_folder import CARD, README, RunFolder
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.core.target import Target
from shrinkkit.core.variant import WITH_VNNI, ModelFile, Port, Variant
from shrinkkit.display import cells, formats
from shrinkkit.display.tables import Cell, Column, Table
from shrinkkit.results import results
from shrinkkit.results.results import Results, Row
from shrinkkit.runtimes import registry
from shrinkkit.runtimes.spec import described

_NOTE = (
    "Score: {}, with 95 % confidence intervals; the change is paired with the baseline on the same examples. Speed-ups "
    "are over the unchanged model on the same target and in PyTorch on the same device. Memory is the peak above that "
    "of the runtime itself."
)


@dataclass(frozen=True)
class Precision:
    """How many layers a runtime computes in one number format."""

    runs_as: str
    layers: int
    why: dict[str, int]
    """Why they are in float, with the number of layers of each reason."""


@dataclass(frozen=True)
class Summary:
    """A variant's layer report in numbers."""

    layers: int
    pruned: int
    """Layers with fewer channels."""
    zeroed: int
    """Layers with weights that are exactly zero."""
    precision: dict[str, tuple[Precision, ...]]
    """By runtime."""


@dataclass(frozen=True)
class Figures:
    """The measurement of a variant on one target of one machine, or why there is none."""

    target: str
    machine: str
    """Its short name."""
    processor: str
    """Of the machine, or its GPU for a target on `cuda`; empty where nothing was measured."""
    runtime_version: str
    threads: int | None
    batch_size: int | None
    """Of each timed call; None where nothing was timed."""
    state: str
    """`measured`, `failed`, `unsupported`, or `not run`."""
    reason: str
    """Why it was not measured; empty if it was."""
    metric: str
    accuracy: Estimate | None
    difference: Estimate | None
    """Accuracy minus the baseline's on the same examples and target; None for the baseline."""
    latency_ms: Estimate | None
    p50_ms: float | None
    """Median latency of single calls."""
    speedup: Estimate | None
    """Against FP32 on the same target; None for the baseline."""
    verdict: str
    """Of `speedup`: `faster`, `slower`, `same`, `undecided`, or `too noisy`; empty where there is none."""
    speedup_today: Estimate | None
    """Against PyTorch on the same device."""
    verdict_today: str
    peak_memory_bytes: int | None
    load_ms: float | None
    first_call_ms: float | None
    saturated: tuple[str, ...]
    """Layers whose int8 accumulators saturate there."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """The content of `model-card.json`; the meaning of keys changes only with `schema_version`."""

    name: str
    task: str
    recipe: dict[str, Any]
    """Empty for the baseline."""
    source: str | None
    """The variant that it was made from."""
    seed: int
    parameters: int
    macs: int
    """Multiply-accumulates of one example."""
    sparsity: float
    """Share of weights that are exactly zero."""
    audit: Summary
    files: tuple[ModelFile, ...]
    settings: dict[str, dict[str, Any]]
    """Of each runtime for its file, by the runtime's own names for them."""
    refusals: dict[str, str]
    """Why a runtime has no file, by runtime."""
    figures: tuple[Figures, ...]
    """One for each target of the run; empty until the variant was measured."""
    notes: tuple[str, ...]
    environment: Environment
    """The machine and the software that made the files."""
    schema_version: int = SCHEMA_VERSION


def read(folder: Path) -> Card | None:
    """Return the card in a variant's folder, None if there is none.

    Raises:
        InvalidInput: It is damaged, or was written by another version.
    """
    return store.read(folder / CARD, Card) if (folder / CARD).is_file() else None


def write(run: Path) -> tuple[Path, ...]:
    """Write card and README of every variant that a run folder reports on, and return the paths.

    Args:
        run: The run folder, of a finished run or not.

    Raises:
        InvalidInput: The folder holds neither a study nor a variant.
    """
    loaded = results.load(run)
    written: list[Path] = []
    for name, variant in loaded.variants.items():
        folder = RunFolder(run).variant(name)
        figures = [_figures(row, loaded) for row in loaded.rows if row.variant == name]
        written += _write(folder, variant, figures, is_fraction=loaded.is_fraction)
    return tuple(written)


def write_unmeasured(folder: Path, variant: Variant) -> tuple[Path, ...]:
    """Write card and README of a variant that was just made, and return the paths; `write` adds measurements."""
    return _write(folder, variant, (), is_fraction=True)


def disagreements(variant: Variant, card: Card) -> tuple[str, ...]:
    """Return the fields that record and card of a variant both state, and state differently; empty if they agree."""
    stated = [f.name for f in dataclasses.fields(card) if f.name != "audit" and hasattr(variant, f.name)]
    audit = () if card.audit == _summary(variant) else ("audit",)
    return (*(name for name in stated if getattr(card, name) != getattr(variant, name)), *audit)


def _write(folder: Path, variant: Variant, figures: Sequence[Figures], *, is_fraction: bool) -> tuple[Path, ...]:
    settings = {}
    for file in variant.files:
        used = [f.threads for f in figures if f.threads and Target.parse(f.target).runtime == file.runtime]
        threads = next(iter(used), variant.environment.threads)
        settings[file.runtime] = registry.get(file.runtime).settings(folder / file.path, threads=threads)
    shared = {f.name for f in dataclasses.fields(Card)} & {f.name for f in dataclasses.fields(Variant)} - {"audit"}
    card = Card(
        **{name: getattr(variant, name) for name in shared},
        audit=_summary(variant),
        settings=settings,
        figures=tuple(figures),
    )
    store.write(folder / CARD, card)
    store.write_text(folder / README, readme(card, is_fraction=is_fraction))
    run_folder.write_sums(folder)
    return folder / CARD, folder / README


def _summary(variant: Variant) -> Summary:
    rows = variant.audit
    precision = {}
    for runtime in (file.runtime for file in variant.files):
        layers = [row.precision[runtime] for row in rows if runtime in row.precision]
        precision[runtime] = tuple(
            Precision(kind, count, dict(Counter(layer.why for layer in layers if layer.runs_as == kind and layer.why)))
            for kind, count in Counter(layer.runs_as for layer in layers).most_common()
        )
    return Summary(
        layers=len(rows),
        pruned=sum(row.lost_channels for row in rows),
        zeroed=sum(row.zeroed > 0 for row in rows),
        precision=precision,
    )


def _figures(row: Row, loaded: Results) -> Figures:
    record, measurement = loaded.measured.get(row.target), loaded.measurement(row)
    target = row.place.target
    machine: dict[str, Any] = {"processor": "", "runtime_version": "", "threads": None, "batch_size": None}
    if record:
        environment, timed = record.environment, _timed(record)
        versions, packages = environment.versions, registry.get(target.runtime).packages
        machine = {
            "processor": environment.gpu if target.device == "cuda" else environment.cpu,
            "runtime_version": next((versions[name] for name in packages if name in versions), ""),
            "threads": environment.threads,
            "batch_size": timed.conditions.batch_size if timed else None,
        }
    same = ("state", "reason", "accuracy", "difference", "latency_ms", "speedup", "speedup_today")
    saturated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if measurement:
        saturated = measurement.integers.saturated if measurement.integers else ()
        warnings = measurement.latency.warnings if measurement.latency else ()
        warning = (f"Timing warning: {'; '.join(warnings)}.",) if warnings else ()
        notes = (*measurement.notes, *warning)
    return Figures(
        target=str(target),
        machine=loaded.machine(row.target),
        **machine,
        **{name: getattr(row, name) for name in (*same, "load_ms", "first_call_ms")},
        metric=loaded.metric,
        p50_ms=_p50(record, measurement) if record and measurement and row.state == "measured" else None,
        verdict=row.timing,
        verdict_today=row.timing_today,
        peak_memory_bytes=measurement.memory.peak_bytes if measurement and measurement.memory else None,
        saturated=saturated,
        notes=notes,
    )


def _timed(record: TargetRecord) -> Comparison | None:
    return next((m.latency for m in record.measurements if m.latency), record.runtime)


def _p50(record: TargetRecord, measurement: Measurement) -> float | None:
    timed = measurement.latency or _timed(record)
    if timed is None:
        return None
    is_candidate = measurement.latency or timed is record.runtime
    slots = timed.candidate_samples_ms if is_candidate else timed.reference_samples_ms
    return statistics.median_low(ms for slot in slots for ms in slot)


def readme(card: Card, *, is_fraction: bool) -> str:
    """Return a card as Markdown: what it is, its measurements and limitations, and code that loads each file.

    Args:
        card: The card.
        is_fraction: Whether every score is in [0, 1], so that it is shown in per cent.
    """
    import jinja2

    def devices(file: ModelFile) -> list[str]:
        targets = [Target.parse(figures.target) for figures in card.figures]
        return list(dict.fromkeys(["cpu", *(t.device for t in targets if t.runtime == file.runtime)]))

    def code(file: ModelFile, device: str) -> str:
        return registry.get(file.runtime).snippet(file, card.settings[file.runtime], device=device)

    def ports(ports: Sequence[Port]) -> str:
        return _quoted([described(port) for port in ports])

    template = jinja2.Template(Path(__file__).with_name("readme.md.j2").read_text("utf-8"), keep_trailing_newline=True)
    steps = [f"`{name}`" + (f" ({settings})" if settings else "") for name, settings in recipe.described(card.recipe)]
    counts = [f"{formats.count(card.parameters)} parameters", f"{formats.count(card.macs)} MACs per example"]
    counts += [f"{formats.percent(card.sparsity)} of the weights zero"] if card.sparsity else []
    counts += [f"{card.audit.pruned} of {card.audit.layers} layers with fewer channels"] if card.audit.pruned else []
    functions = {"layers": _layers, "devices": devices, "code": code, "ports": ports, "names": _quoted}
    texts = {"measured": _measured(card, is_fraction), "warnings": _warnings(card)}
    values = {"card": card, "steps": steps, "counts": counts, "formats": formats, "CARD": CARD}
    markdown: str = template.render(**values, **functions, **texts)
    return markdown


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _layers(kind: Precision) -> str:
    reasons = [reason if count == kind.layers else f"{reason}: {count}" for reason, count in kind.why.items()]
    how = kind.runs_as if kind.runs_as == "folded" else f"in {kind.runs_as}"
    return f"{formats.counted(kind.layers, 'layer')} {how}" + (f" ({', '.join(reasons)})" if reasons else "")


def _measured(card: Card, is_fraction: bool) -> str:
    rows = tuple(
        (
            Cell(figures.target),
            Cell(
                f"{figures.machine}, {formats.counted(figures.threads or 0, 'thread')}"
                + (f", batch {figures.batch_size}" if figures.batch_size else "")
            ),
            cells.score(figures.accuracy, is_fraction=is_fraction),
            cells.change(figures.difference, is_fraction=is_fraction),
            cells.milliseconds(figures.p50_ms),
            Cell(formats.speedup(figures.speedup, figures.verdict)),
            Cell(formats.speedup(figures.speedup_today, figures.verdict_today)),
            cells.size(figures.peak_memory_bytes),
        )
        for figures in card.figures
        if figures.state == "measured"
    )
    if not rows:
        return "Not measured yet.\n"
    titles = ("target", "machine", "score", "change", "latency p50", "vs FP32, same runtime", "vs PyTorch", "memory")
    columns = tuple(Column(title, number=i > 1) for i, title in enumerate(titles))
    return Table("By target", columns, rows, _NOTE.format(card.figures[0].metric)).markdown()


def _warnings(card: Card) -> tuple[str, ...]:
    warnings = [
        f"On {figures.target} ({figures.machine}), int8 accumulation saturates in {', '.join(figures.saturated)}: the "
        "outputs are less accurate than the model intends and differ on CPUs with VNNI."
        for figures in card.figures
        if figures.saturated
    ]
    if limited := [file.runtime for file in card.files if file.exact_on == WITH_VNNI]:
        warnings.append(
            f"{', '.join(limited)}: int8 accumulation may saturate silently on x86 CPUs without VNNI. Make the variant "
            "again on such a CPU, or run `shrinkkit verify` there."
        )
    warnings += [f"No file for {runtime}: {reason}" for runtime, reason in card.refusals.items()]
    warnings += [f"{f.target}: {f.state}: {f.reason}" for f in card.figures if f.state in ("failed", "not run")]
    warnings += [f"{figures.target}: {note}" for figures in card.figures for note in figures.notes]
    return (*warnings, *card.notes) or ("None known.",)
