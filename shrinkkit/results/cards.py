"""Model cards: `model-card.json` for programs and `README.md` for people, in the folder of each variant.

A variant's folder may be passed on alone. Needs no torch.
"""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shrinkkit.core import recipe, run_folder, store
from shrinkkit.core.machines import Environment
from shrinkkit.core.measurement import Comparison, Measurement, TargetRecord
from shrinkkit.core.run_folder import CARD, README, RunFolder
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.core.target import Target
from shrinkkit.core.variant import WITH_VNNI, ModelFile, Variant
from shrinkkit.display import cells, formats
from shrinkkit.results import results
from shrinkkit.results.results import Results, Row
from shrinkkit.runtimes import registry
from shrinkkit.runtimes.spec import described


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


@dataclass(frozen=True, kw_only=True, repr=False)
class Figures(Row):
    """A variant's row on one target, with what explains it without the run folder; `target` names no machine."""

    machine: str
    """Its short name."""
    processor: str = ""
    """Of the machine, or its GPU for a target on `cuda`; empty where nothing was measured."""
    runtime_version: str = ""
    threads: int | None = None
    batch_size: int | None = None
    """Of each timed call; None where nothing was timed."""
    metric: str
    p50_ms: float | None = None
    """Median latency of single calls."""
    peak_memory_bytes: int | None = None
    saturated: tuple[str, ...] = ()
    """Layers whose int8 accumulators saturate there."""
    notes: tuple[str, ...] = ()


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
    companions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Files that prepare the inputs, such as a tokenizer's, by the code that uses them."""
    schema_version: int = SCHEMA_VERSION


def read(folder: Path) -> Card | None:
    """Return the card in a variant's folder, None if there is none; `InvalidInput` if it is damaged."""
    return store.read(folder / CARD, Card) if (folder / CARD).is_file() else None


def write(run: Path) -> tuple[Path, ...]:
    """Write card and README of every variant of a run, finished or not, and return the paths; raises as `load`."""
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
    copied = {name: getattr(variant, name) for name in shared}
    card = Card(**copied, audit=_summary(variant), settings=settings, figures=tuple(figures))
    store.write(folder / CARD, card)
    store.write_text(folder / README, readme(card, is_fraction=is_fraction))
    run_folder.write_sums(folder)
    return folder / CARD, folder / README


def snippet(folder: Path, file: ModelFile, *, device: str, threads: int) -> str:
    """Return the code of the README that loads one file of the variant in `folder`, as measured on `device`."""
    runtime = registry.get(file.runtime)
    return runtime.snippet(file, runtime.settings(folder / file.path, threads=threads), device=device)


def _summary(variant: Variant) -> Summary:
    rows = variant.audit
    precision = {}
    for runtime in (file.runtime for file in variant.files):
        layers = [row.precision[runtime] for row in rows if runtime in row.precision]
        precision[runtime] = tuple(
            Precision(kind, count, dict(Counter(layer.why for layer in layers if layer.runs_as == kind and layer.why)))
            for kind, count in Counter(layer.runs_as for layer in layers).most_common()
        )
    pruned, zeroed = sum(row.lost_channels for row in rows), sum(row.zeroed > 0 for row in rows)
    return Summary(len(rows), pruned, zeroed, precision)


def _figures(row: Row, loaded: Results) -> Figures:
    record, measurement = loaded.measured.get(row.target), loaded.measurement(row)
    target = row.place.target
    fields = {**vars(row), "target": str(target), "machine": loaded.machine(row.target), "metric": loaded.metric_title}
    if record:
        environment, timed = record.environment, _timed(record)
        versions, packages = environment.versions, registry.get(target.runtime).packages
        fields |= {
            "processor": environment.gpu if target.device == "cuda" else environment.cpu,
            "runtime_version": next((versions[name] for name in packages if name in versions), ""),
            "threads": environment.threads,
            "batch_size": timed.conditions.batch_size if timed else None,
        }
    if record and measurement:
        warnings = measurement.latency.warnings if measurement.latency else ()
        timing = [f"Timing warning: {'; '.join(warnings)}."] if warnings else []
        fields |= {
            "p50_ms": _p50(record, measurement) if row.state == "measured" else None,
            "peak_memory_bytes": measurement.memory.peak_bytes if measurement.memory else None,
            "saturated": measurement.integers.saturated if measurement.integers else (),
            "notes": (*record.task_notes, *measurement.notes, *timing),
        }
    return Figures(**fields)


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
    """Return a card as Markdown: what it is, its measurements and limitations, and code that loads each file."""
    import jinja2

    devices = {file.runtime: ["cpu"] for file in card.files}
    for target in {Target.parse(figures.target) for figures in card.figures if not figures.target.startswith("cpu/")}:
        if target.runtime in devices:
            devices[target.runtime].append(target.device)
    template = jinja2.Template(Path(__file__).with_name("readme.md.j2").read_text("utf-8"), keep_trailing_newline=True)
    values = {"card": card, "steps": recipe.described(card.recipe), "devices": devices, "is_fraction": is_fraction}
    names = {"cells": cells, "formats": formats, "registry": registry, "described": described}
    markdown: str = template.render(**values, **names, CARD=CARD, WITH_VNNI=WITH_VNNI)
    return markdown
