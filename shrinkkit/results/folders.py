"""A run folder read: its study, status, variants and measurements; what cannot be read becomes a note, never a gap.

What it amounts to, variant by variant, stands in `rows`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from shrinkkit.core import evidence, machines, run_folder, store
from shrinkkit.core.measurement import Measurement, TargetRecord
from shrinkkit.core.recipe import BASELINE, Study
from shrinkkit.core.run_folder import RECORD, RunFolder
from shrinkkit.core.status import Status, Step
from shrinkkit.core.target import TARGETS, Place, Target
from shrinkkit.core.variant import ModelFile, Variant
from shrinkkit.errors import InvalidInput, brief

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Folder:
    """The records of a run folder, as they lie there."""

    study: Study | None
    """None for a folder that was filled by hand."""
    status: Status | None
    variants: Mapping[str, Variant]
    unreadable: Mapping[str, str]
    """Why a variant's record cannot be read, by the variant's name."""
    own: tuple[str, ...]
    """Names of the machine that the run was made on, the one of its processor first; see `machines.names`."""
    measured: Mapping[str, TargetRecord]
    """By place; without figures of model files that are not there any more."""
    changed: Mapping[str, str]
    """A sentence about each file that is not as its step left it, by its path relative to the run folder."""
    notes: tuple[str, ...]
    """What could not be read, and why."""

    def file(self, name: str, target: str) -> ModelFile | None:
        """Return the model file of the variant `name` for the runtime of the place `target`; None if it has none."""
        files = self.variants[name].files if name in self.variants else ()
        return next((f for f in files if f.runtime == Place.parse(target).target.runtime), None)

    def step(self, subject: str) -> Step | None:
        """Return what became of the step that makes a variant or measures a place; None if there was none."""
        return next((s for s in self.status.steps if s.subject == subject), None) if self.status else None


def read(run: Path) -> Folder:
    """Return what the run folder `run` holds, however far the run got."""
    notes: list[str] = []
    folder = RunFolder(run)
    study = _study(folder.study, notes)
    status = _read(folder.status, Status, notes)
    changed = _changed(run, status, notes)
    variants, unreadable = _variants(folder, changed, notes)
    own = _own(variants)
    damage = _damage(folder, variants, changed, notes) | {name: {"": why} for name, why in unreadable.items()}
    measured = {at: _held(record, damage) for at, record in _measured(folder, own, changed, notes).items()}
    return Folder(study, status, variants, unreadable, own, measured, changed, tuple(notes))


def places(folder: Folder) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the places to report, the run's own first, and a note about each that is left out.

    Besides those that the study asks for these are the ones whose figures hold for the variants as they are now, and
    the ones where a benchmark failed. One that the study asks for, but that its own machine cannot run, is left out if
    another machine has figures of it.
    """
    plain = [target for target in folder.measured if not Place.parse(target).machine]
    asked = list(folder.study.targets) if folder.study else plain
    held = [target for target in folder.measured if target not in asked and _holds(folder, target)]
    steps = folder.status.steps if folder.status else ()
    failed = [s.subject for s in steps if s.notebook == "4-benchmark" and s.state not in ("done", "cached", "pending")]
    notes = [
        f"The figures of {target} are of model files that have changed since; not reported. {again(target)}"
        for target in folder.measured
        if target not in (*asked, *held, *failed)
    ]
    elsewhere = {str(at.target) for at in map(Place.parse, held) if at.machine}
    absent = {target: why for target in asked if target in elsewhere and (why := _never(folder, target))}
    notes += [
        f"{target} was measured on another machine, but not on {folder.own[0]}, where the run was made: {why}"
        for target, why in absent.items()
    ]
    order = [*asked, *TARGETS]
    found = {target for target in (*asked, *held, *failed) if target not in absent}
    ordered = sorted(map(Place.parse, found), key=lambda at: (at.machine, order.index(str(at.target))))
    return tuple(map(str, ordered)), tuple(notes)


def again(target: str) -> str:
    """Return what to do for new figures of the place `target`, in a sentence."""
    at = Place.parse(target)
    if not at.machine:
        return "Run the study again."
    command = f"shrinkkit run RUN --only benchmark --target {at.target}"
    return f"Measure it on {at.machine} again, in a copy of this folder: `{command}`."


def _holds(folder: Folder, target: str) -> bool:
    """Return whether any variant was measured at the place `target` with the model file that it has now."""
    measurements = folder.measured[target].measurements
    files = {m.variant: folder.file(m.variant, target) for m in measurements}
    return any((file := files[m.variant]) is not None and file.sha256 == m.file_sha256 for m in measurements)


def _never(folder: Folder, target: str) -> str:
    """Return why the run's own machine has no figures of `target` if it cannot run it, '' if it can."""
    step = folder.step(target)
    if target in folder.measured or (step and not step.error.startswith("Unsupported: ")):
        return ""
    return step.error if step else "it was not benchmarked there."


def _own(variants: Mapping[str, Variant]) -> tuple[str, ...]:
    # A run is made where its baseline is made: this is known whichever files of the folder came back from where.
    made = variants.get(BASELINE) or next(iter(variants.values()), None)
    return machines.names(made.environment) if made else ("unknown",)


def _study(path: Path, notes: list[str]) -> Study | None:
    if not path.is_file():
        notes.append("There is no study.json: the folder was filled by hand, and what is missing cannot be known.")
        return None
    try:
        return Study.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        notes.append(f"study.json cannot be read ({brief(error)}); what is missing cannot be known.")
        return None


def _read(path: Path, kind: type[_Record], notes: list[str]) -> _Record | None:
    if not path.is_file():
        return None
    try:
        return store.read(path, kind)
    except InvalidInput as error:
        notes.append(_nameless(error, path))
        return None


def _changed(run: Path, status: Status | None, notes: list[str]) -> dict[str, str]:
    """Return a sentence about each file that is not as its step left it, by its path."""
    files = {path: sha256 for step in (status.steps if status else ()) for path, sha256 in step.files.items()}
    found = {path: f"{path} {what}." for path, what in run_folder.altered(run, files).items()}
    notes.extend(found.values())
    return found


def _variants(
    run: RunFolder, changed: Mapping[str, str], notes: list[str]
) -> tuple[dict[str, Variant], dict[str, str]]:
    found: dict[str, Variant] = {}
    unreadable = {}
    lost = [Path(path).parent.name for path in changed if Path(path).name == RECORD]
    for name in sorted({*run.variant_names(), *lost}):
        path, problems = run.variant_record(name), list[str]()
        if why := changed.get(run.relative(path)):
            unreadable[name] = f"{why} Run the study again."
        elif record := _read(path, Variant, problems):
            found[name] = record
        else:
            unreadable[name] = problems[0] if problems else f"{RECORD} is no file. Run the study again."
    notes.extend(why for name, why in unreadable.items() if run.relative(run.variant_record(name)) not in changed)
    return found, unreadable


def _damage(
    run: RunFolder, variants: Mapping[str, Variant], changed: Mapping[str, str], notes: list[str]
) -> dict[str, dict[str, str]]:
    """Return why model files are not those that their records describe, by variant and runtime."""
    found: dict[str, dict[str, str]] = {}
    for name, variant in variants.items():
        for file in variant.files:
            paths = [run.relative(run.variant(name) / path) for path in (file.path, *file.beside)]
            why = next((changed[path] for path in paths if path in changed), "")
            if not why and (what := run_folder.difference(run.path, paths, file.sha256)):
                why = f"{paths[0]} {what}."
                notes.append(why)
            if why:
                found.setdefault(name, {})[file.runtime] = f"{why} Run the study again."
    return found


def _held(record: TargetRecord, damage: Mapping[str, Mapping[str, str]]) -> TargetRecord:
    """Return a benchmark without figures of model files that are not there any more, nor comparisons with them."""
    runtime = record.place.target.runtime

    def why(name: str, runtime: str) -> str:
        return damage.get(name, {}).get(runtime) or damage.get(name, {}).get("", "")

    lost = {m.variant: why(m.variant, runtime) or why(BASELINE, runtime) for m in record.measurements}
    return replace(
        record,
        measurements=tuple(
            Measurement(m.variant, m.target, lost[m.variant]) if lost[m.variant] else m for m in record.measurements
        ),
        runtime=None if why(BASELINE, runtime) or why(BASELINE, "torch") else record.runtime,
        sweep=tuple(point for point in record.sweep if not lost.get(point.variant)),
    )


def _measured(
    run: RunFolder, own: Sequence[str], changed: Mapping[str, str], notes: list[str]
) -> dict[str, TargetRecord]:
    found: dict[str, TargetRecord] = {}
    for path in run.measurement_records():
        if run.relative(path) in changed:
            continue
        if (record := _read(path, TargetRecord, notes)) is None:
            continue
        at = str(Place(Target.parse(record.target), "" if record.machine in own else record.machine))
        if record.target not in TARGETS:
            notes.append(f"{path.parent.name}/{path.name} is of {record.target}, which is no target; not reported.")
        elif at in found:
            notes.append(f"{path.parent.name}/{path.name} is of {at}, as another file is; not reported.")
        else:
            try:
                found[at] = _derived(record, at, notes)
            except InvalidInput as error:
                notes.append(f"{path.parent.name}/{path.name} cannot be used: {brief(error)}. {again(at)}")
    return found


def _derived(record: TargetRecord, at: str, notes: list[str]) -> TargetRecord:
    """Return a record with the figures that its raw samples give, and a note if it states others."""
    derived = evidence.derive(record)
    if wrong := evidence.contradictions(record, derived):
        notes.append(
            f"The record of {at} states figures for {', '.join(wrong)} that its raw samples contradict; those of the "
            f"samples are reported. {again(at)}"
        )
    return derived


def _nameless(error: InvalidInput, path: Path) -> str:
    """Return the first line of an error without the folders before the file, which mean nothing to a reader."""
    return re.sub(re.escape(str(path)), f"{path.parent.name}/{path.name}", brief(error)) + "."
