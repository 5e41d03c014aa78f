"""Reading a run folder: its study, status, variants and measurements. What cannot be read becomes a note."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from shrinkkit.core import evidence, machines, robustness, run_folder, store
from shrinkkit.core.measurement import Measurement, TargetRecord
from shrinkkit.core.recipe import BASELINE, Study
from shrinkkit.core.robustness import Robustness, RobustnessRecord
from shrinkkit.core.run_folder import RECORD, RunFolder, Status, Step
from shrinkkit.core.search import SearchRecord
from shrinkkit.core.target import Place, Target
from shrinkkit.core.variant import ModelFile, Variant
from shrinkkit.errors import InvalidInput, brief
from shrinkkit.runtimes import registry

_Record = TypeVar("_Record")
_PlaceRecord = TypeVar("_PlaceRecord", TargetRecord, RobustnessRecord)
Reasons = dict[str, str]


@dataclass(frozen=True)
class Folder:
    """The records of a run folder."""

    study: Study | None
    """None for a folder that was created from notebooks."""
    status: Status | None
    variants: Mapping[str, Variant]
    unreadable: Mapping[str, str]
    """Why a variant's record cannot be read, by the variant's name."""
    machine_names: tuple[str, ...]
    """Names of the machine that made the run, that of its processor first; see `machines.names`."""
    measured: Mapping[str, TargetRecord]
    """By place; without figures of model files that are missing or altered."""
    robustness: Mapping[str, RobustnessRecord]
    """The same."""
    search: SearchRecord | None
    """None if nothing was searched for."""
    altered: Mapping[str, str]
    """A sentence about each file that differs from what its step wrote, by path relative to the run folder."""
    notes: tuple[str, ...]
    """What could not be read, and why."""

    def file(self, name: str, target: str) -> ModelFile | None:
        """Return the model file of the variant `name` for the runtime of the place `target`; None if it has none."""
        files = self.variants[name].files if name in self.variants else ()
        runtime = Place.parse(target).target.runtime
        return next((file for file in files if file.runtime == runtime), None)

    def step(self, subject: str) -> Step | None:
        """Return the step that makes a variant or measures a place; None if there is none."""
        return next((s for s in self.status.steps if s.subject == subject), None) if self.status else None


def read(run: Path) -> Folder:
    """Return the records in the run folder `run`, even of an unfinished run."""
    notes: list[str] = []
    folder = RunFolder(run)
    study, status = _study(folder.study, notes), _read(folder.status, Status, notes)
    hashes = {path: sha256 for step in (status.steps if status else ()) for path, sha256 in step.files.items()}
    altered = {path: f"{path} {how}." for path, how in run_folder.altered(run, hashes).items()}
    notes += altered.values()
    variants, unreadable = _variants(folder, altered, notes)
    # The machine that made the baseline made the run, wherever files came from later.
    first = variants.get(BASELINE) or next(iter(variants.values()), None)
    names = machines.names(first.environment) if first else ("unknown",)
    damage = _damage(folder, variants, altered, notes) | {name: {"": reason} for name, reason in unreadable.items()}
    records = _measured(folder, names, altered, notes)
    measured = {at: _without_damaged(record, damage) for at, record in records.items()}
    robust = _robustness(folder, names, variants, damage, altered, notes)
    found = None if folder.relative(folder.search) in altered else _read(folder.search, SearchRecord, notes)
    return Folder(study, status, variants, unreadable, names, measured, robust, found, altered, tuple(notes))


def places(folder: Folder) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the places to report, the run's own machine first, and a note about each that is left out.

    These are the study's targets, places whose figures belong to the present model files, and failed benchmarks. A
    target that the run's own machine cannot run is left out if another machine has figures of it.
    """

    def is_current(at: str) -> bool:
        """Return whether any variant was measured there with its present model file."""
        pairs = [(m, folder.file(m.variant, at)) for m in folder.measured[at].measurements]
        return any(file is not None and file.sha256 == m.file_sha256 for m, file in pairs)

    def cannot_run(target: str) -> str:
        """Return why the run's own machine cannot run a target, '' if it can."""
        step = folder.step(target)
        if target in folder.measured or (step and not step.error.startswith("Unsupported: ")):
            return ""
        return step.error if step else "it was not benchmarked there."

    targets = list(folder.study.targets) if folder.study else [at for at in folder.measured if not _machine(at)]
    others = [at for at in folder.measured if at not in targets and is_current(at)]
    steps = folder.status.steps if folder.status else ()
    failed = [s.subject for s in steps if s.notebook == "4-benchmark" and s.state not in ("done", "cached", "pending")]
    notes = [
        f"The figures of {at} are of model files that have changed since; not reported. {how_to_remeasure(at)}"
        for at in folder.measured
        if at not in (*targets, *others, *failed)
    ]
    elsewhere = {str(Place.parse(at).target) for at in others if _machine(at)}
    absent = {at: reason for at in targets if at in elsewhere and (reason := cannot_run(at))}
    notes += [
        f"{at} was measured on another machine, but not on {folder.machine_names[0]}, which made the run: {reason}"
        for at, reason in absent.items()
    ]
    order = [*targets, *registry.targets()]
    reported = map(Place.parse, {*targets, *others, *failed} - absent.keys())
    ordered = sorted(reported, key=lambda at: (at.machine, order.index(str(at.target))))
    for at, record in folder.measured.items():
        if record.partial:
            step = folder.step(at)
            names = {m.variant for m in record.measurements}
            missing = f"the variants {rest}, " if (rest := ", ".join(sorted(folder.variants.keys() - names))) else ""
            missing += "memory, layers, other batch sizes and threads"
            why = f": {step.error}" if step and step.error else "."
            text = f"The benchmark of {at} did not end{why} Not measured: {missing}."
            notes.append(f"{text} Run the same command again to measure only what is missing.")
    return tuple(map(str, ordered)), tuple(notes)


def how_to_remeasure(target: str) -> str:
    """Return a sentence on how to measure the place `target` again."""
    at = Place.parse(target)
    if not at.machine:
        return "Run the study again."
    command = f"shrinkkit run RUN --only benchmark --target {at.target}"
    return f"Measure it on {at.machine} again, in a copy of this folder: `{command}`."


def _machine(target: str) -> str:
    return Place.parse(target).machine


def _study(path: Path, notes: list[str]) -> Study | None:
    if not path.is_file():
        notes.append("Created from notebooks (no study.json): missing results cannot be detected.")
        return None
    try:
        return Study.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        notes.append(f"study.json cannot be read ({brief(error)}): missing results cannot be detected.")
        return None


def _read(path: Path, kind: type[_Record], notes: list[str]) -> _Record | None:
    if not path.is_file():
        return None
    try:
        return store.read(path, kind)
    except InvalidInput as error:
        # The folders above the run mean nothing to a reader.
        notes.append(re.sub(re.escape(str(path)), f"{path.parent.name}/{path.name}", brief(error)) + ".")
        return None


def _variants(run: RunFolder, altered: Mapping[str, str], notes: list[str]) -> tuple[dict[str, Variant], Reasons]:
    """Return the records of variants, and why others cannot be read, by name."""
    variants, unreadable = {}, {}
    missing = (Path(path).parent.name for path in altered if path.endswith(f"/{RECORD}"))
    for name in sorted({*run.variant_names(), *missing}):
        path = run.variant_record(name)
        problems: list[str] = []
        if reason := altered.get(run.relative(path)):
            unreadable[name] = f"{reason} Run the study again."
        elif record := _read(path, Variant, problems):
            variants[name] = record
        else:
            unreadable[name] = problems[0] if problems else f"{RECORD} is no file. Run the study again."
            notes.append(unreadable[name])
    return variants, unreadable


def _damage(
    run: RunFolder, variants: Mapping[str, Variant], altered: Mapping[str, str], notes: list[str]
) -> dict[str, Reasons]:
    """Return how model files differ from their records, by variant and runtime."""
    damage: dict[str, Reasons] = {}
    for name, file in ((name, file) for name, variant in variants.items() for file in variant.files):
        paths = [run.relative(run.variant(name) / path) for path in (file.path, *file.beside)]
        reason = next((altered[path] for path in paths if path in altered), "")
        if not reason and (how := run_folder.difference(run.path, paths, file.sha256)):
            reason = f"{paths[0]} {how}."
            notes.append(reason)
        if reason:
            damage.setdefault(name, {})[file.runtime] = f"{reason} Run the study again."
    return damage


def _without_damaged(record: TargetRecord, damage: Mapping[str, Mapping[str, str]]) -> TargetRecord:
    """Return a benchmark without figures of missing or altered model files, and without comparisons with them."""

    def reason(name: str, runtime: str) -> str:
        return damage.get(name, {}).get(runtime) or damage.get(name, {}).get("", "")

    own = record.place.target.runtime
    reasons = {m.variant: reason(m.variant, own) or reason(BASELINE, own) for m in record.measurements}
    kept = (Measurement(m.variant, m.target, why) if (why := reasons[m.variant]) else m for m in record.measurements)
    runtime = None if reason(BASELINE, own) or reason(BASELINE, "torch") else record.runtime
    sweep = tuple(point for point in record.sweep if not reasons.get(point.variant))
    return replace(record, measurements=tuple(kept), runtime=runtime, sweep=sweep)


def _measured(
    run: RunFolder, machine_names: Sequence[str], altered: Mapping[str, str], notes: list[str]
) -> dict[str, TargetRecord]:
    """Return the benchmarks by place, with the figures that their raw samples give."""
    measured: dict[str, TargetRecord] = {}
    for name, at, record in _by_place(run, run.measurements, TargetRecord, measured, machine_names, altered, notes):
        try:
            measured[at] = derived = evidence.derive(record)
        except InvalidInput as error:
            notes.append(f"{name} cannot be used: {brief(error)}. {how_to_remeasure(at)}")
            continue
        if wrong := evidence.contradictions(record, derived):
            text = f"The record of {at} states figures for {', '.join(wrong)} that its raw samples contradict;"
            notes.append(f"{text} those of the samples are reported. {how_to_remeasure(at)}")
    return measured


def _by_place(
    run: RunFolder,
    folder: Path,
    kind: type[_PlaceRecord],
    found: Mapping[str, _PlaceRecord],
    machine_names: Sequence[str],
    altered: Mapping[str, str],
    notes: list[str],
) -> Iterator[tuple[str, str, _PlaceRecord]]:
    """Yield file name, place and record of each target that is not in `found` yet; others become notes."""
    for path in sorted(folder.glob("*/*.json")):
        if run.relative(path) in altered or (record := _read(path, kind, notes)) is None:
            continue
        name = f"{path.parent.name}/{path.name}"
        machine = "" if record.machine in machine_names else record.machine
        at = str(Place(Target.parse(record.target), machine))
        if record.target not in registry.targets() or at in found:
            why = "as another file is" if at in found else "which is no target"
            notes.append(f"{name} is of {at if at in found else record.target}, {why}; not reported.")
            continue
        yield name, at, record


def _robustness(
    run: RunFolder,
    machine_names: Sequence[str],
    variants: Mapping[str, Variant],
    damage: Mapping[str, Mapping[str, str]],
    altered: Mapping[str, str],
    notes: list[str],
) -> dict[str, RobustnessRecord]:
    """Return the robustness of variants by place, without those whose files have changed since."""
    found: dict[str, RobustnessRecord] = {}
    files = {(v.name, file.runtime): file.sha256 for v in variants.values() for file in v.files}
    for path, at, stated in _by_place(run, run.robustness, RobustnessRecord, found, machine_names, altered, notes):
        target = Target.parse(stated.target)
        kept, gone = list[Robustness](), list[Robustness]()
        for one in stated.variants:
            is_same = one.error or files.get((one.variant, target.runtime)) == one.file_sha256
            is_sound = is_same and target.runtime not in damage.get(one.variant, {})
            (kept if is_sound else gone).append(one)
        if gone:
            names = ", ".join(one.variant for one in gone)
            notes.append(f"The robustness of {names} on {at} is of files that have changed since; not reported.")
        try:
            found[at] = robustness.derive(replace(stated, variants=tuple(kept)))
        except InvalidInput as error:
            notes.append(f"{path} cannot be used: {brief(error)}.")
    return found
