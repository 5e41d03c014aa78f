"""Model cards and READMEs: written beside a variant's files from what the records of its run say.

A variant's folder is passed on alone. `model-card.json` says for programs, and `README.md` for people, what they would
otherwise have to look up in the report. Needs no torch.
"""

import dataclasses
import statistics
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from shrinkkit.core import run_folder, store
from shrinkkit.core.measurement import Comparison, Measurement, TargetRecord
from shrinkkit.core.run_folder import CARD, README, RunFolder
from shrinkkit.core.target import Target
from shrinkkit.core.variant import Variant
from shrinkkit.results import readme, table
from shrinkkit.results.modelcard import Card, Figures, Precision, Summary
from shrinkkit.results.table import Results, Row
from shrinkkit.runtimes import snippets


def write(run: Path) -> tuple[Path, ...]:
    """Write card and README of every variant that a run folder reports on, and return the paths.

    Args:
        run: The run folder, however far the run got.

    Raises:
        InvalidInput: The folder holds neither a study nor a variant.
    """
    found = table.load(run)
    written: list[Path] = []
    for name, variant in found.variants.items():
        folder = RunFolder(run).variant(name)
        written += _write(folder, _card(folder, variant, _figures(found, name)), is_fraction=found.is_fraction)
    return tuple(written)


def write_unmeasured(folder: Path, variant: Variant) -> tuple[Path, ...]:
    """Write card and README of a variant that was just made, and return the paths; `write` adds what was measured.

    Args:
        folder: The variant's folder.
        variant: Its record.
    """
    return _write(folder, _card(folder, variant, ()), is_fraction=True)


def disagreements(variant: Variant, card: Card) -> tuple[str, ...]:
    """Return the fields that record and card of a variant both state, and state differently; empty if they agree."""
    stated = [f.name for f in dataclasses.fields(card) if f.name != "audit" and hasattr(variant, f.name)]
    audit = () if card.audit == _summary(variant) else ("audit",)
    return (*(name for name in stated if getattr(card, name) != getattr(variant, name)), *audit)


def _write(folder: Path, card: Card, *, is_fraction: bool) -> tuple[Path, ...]:
    store.write(folder / CARD, card)
    store.write_text(folder / README, readme.text(card, is_fraction=is_fraction))
    run_folder.write_sums(folder)
    return folder / CARD, folder / README


def _card(folder: Path, variant: Variant, figures: Sequence[Figures]) -> Card:
    method = variant.precision if variant.precision != "float32" else ""
    settings = {}
    for file in variant.files:
        used = [one.threads for one in figures if one.threads and Target.parse(one.target).runtime == file.runtime]
        threads = next(iter(used), variant.environment.threads)
        engine = _engine(folder / file.path) if file.format == "torchscript" else ""
        settings[file.runtime] = snippets.settings(file, method=method, threads=threads, engine=engine)
    return Card(
        name=variant.name,
        task=variant.task,
        recipe=variant.recipe,
        source=variant.source,
        seed=variant.seed,
        parameters=variant.parameters,
        macs=variant.macs,
        sparsity=variant.sparsity,
        audit=_summary(variant),
        files=variant.files,
        settings=settings,
        refusals=variant.refusals,
        figures=tuple(figures),
        notes=variant.notes,
        environment=variant.environment,
    )


def _engine(path: Path) -> str:
    """Return the engine that a TorchScript file names, as `loading.engine` does, '' where the file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/extra/quantized_engine")]
            return archive.read(names[0]).decode() if names else ""
    except (OSError, zipfile.BadZipFile):
        return ""


def _summary(variant: Variant) -> Summary:
    rows = variant.audit
    precision = {}
    for runtime in (file.runtime for file in variant.files):
        found = [row.precision[runtime] for row in rows if runtime in row.precision]
        kinds = Counter(one.runs_as for one in found)
        precision[runtime] = tuple(
            Precision(kind, count, dict(Counter(one.why for one in found if one.runs_as == kind and one.why)))
            for kind, count in kinds.most_common()
        )
    return Summary(
        layers=len(rows),
        pruned=sum(row.lost_channels for row in rows),
        zeroed=sum(row.zeroed > 0 for row in rows),
        precision=precision,
    )


def _figures(found: Results, name: str) -> tuple[Figures, ...]:
    return tuple(_of_row(row, found) for row in found.rows if row.variant == name)


def _of_row(row: Row, found: Results) -> Figures:
    record = found.measured.get(row.target)
    one = next((m for m in record.measurements if m.variant == row.variant), None) if record else None
    timed = _timed(record) if record else None
    return Figures(
        target=str(row.place.target),
        machine=found.machine(row.target),
        processor=_processor(record) if record else "",
        runtime_version=_version(record) if record else "",
        threads=record.environment.threads if record else None,
        batch_size=timed.conditions.batch_size if timed else None,
        state=row.state,
        reason=row.reason,
        metric=found.metric,
        accuracy=row.accuracy,
        difference=row.difference,
        latency_ms=row.latency_ms,
        p50_ms=_p50(record, one) if record and one and row.state == "measured" else None,
        speedup=row.speedup,
        verdict=row.timing,
        speedup_today=row.speedup_today,
        verdict_today=row.timing_today,
        peak_memory_bytes=one.memory.peak_bytes if one and one.memory else None,
        load_ms=row.load_ms,
        first_call_ms=row.first_call_ms,
        saturated=one.integers.saturated if one and one.integers else (),
        notes=(*one.notes, *_doubts(one)) if one else (),
    )


def _doubts(one: Measurement) -> tuple[str, ...]:
    doubts = one.latency.warnings if one.latency else ()
    return (f"Doubts about its timing: {'; '.join(doubts)}.",) if doubts else ()


def _timed(record: TargetRecord) -> Comparison | None:
    return next((m.latency for m in record.measurements if m.latency), record.runtime)


def _processor(record: TargetRecord) -> str:
    return record.environment.gpu if record.place.target.device == "cuda" else record.environment.cpu


def _version(record: TargetRecord) -> str:
    """Return the version of the package that runs the target's files."""
    runtime = record.place.target.runtime
    versions = record.environment.versions
    return versions.get("torch" if runtime == "inductor" else runtime, "")


def _p50(record: TargetRecord, one: Measurement) -> float | None:
    timed = one.latency or _timed(record)
    if timed is None:
        return None
    slots = timed.candidate_samples_ms if one.latency or timed is record.runtime else timed.reference_samples_ms
    return statistics.median_low(ms for slot in slots for ms in slot)
