"""A run folder as rows, one for each variant and target, none left out: measured, failed, refused, or not run."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from shrinkkit import intervals, records
from shrinkkit.errors import InvalidInput, brief
from shrinkkit.recipes import BASELINE, Budget, Recipe, Study, impossible
from shrinkkit.records import Comparison, Estimate, Measurement, Status, Step, TargetRecord, Variant

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Row:
    """One variant on one target: what is known of it, and if it was not measured, why not."""

    variant: str
    target: str
    state: str
    """`measured`, `failed`, `refused`, or `not run`."""
    reason: str = ""
    """Why it was not measured; empty if it was."""
    intermediate: bool = False
    """A step on the way to another variant, which no recipe asks for by itself."""
    size_bytes: int | None = None
    """Of the file of the target's runtime."""
    compressed_bytes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    sparsity: float | None = None
    """Share of weights that are exactly zero."""
    accuracy: Estimate | None = None
    difference: Estimate | None = None
    """Variant minus baseline on the same examples and target; None for the baseline."""
    agreement: float | None = None
    accuracy_verdict: str = ""
    """`within budget`, `over budget`, or `cannot tell`; empty for the baseline and where nothing was measured."""
    latency_ms: Estimate | None = None
    speedup: Estimate | None = None
    """Against FP32 on the same target; None for the baseline."""
    timing: str = ""
    """Verdict on `speedup`: `faster`, `slower`, `same`, `undecided`, or `too noisy`."""
    speedup_torch: Estimate | None = None
    """Against torch FP32 on the same device; None for the baseline on torch, which is torch FP32."""
    timing_torch: str = ""
    """Verdict on `speedup_torch`."""
    load_ms: float | None = None
    first_call_ms: float | None = None
    file_sha256: str = ""


@dataclass(frozen=True)
class Results:
    """What a run folder holds. `rows` has every variant on every target, the baseline first."""

    name: str
    task: str
    metric: str
    in_shares: bool
    """Whether every score lies in [0, 1], so that per cent and percentage points make sense."""
    budget: Budget
    study: Study | None
    """None for a folder that was filled by hand."""
    targets: tuple[str, ...]
    names: tuple[str, ...]
    """Of the variants: the baseline, then the recipes in the study's order, intermediates last."""
    rows: tuple[Row, ...]
    variants: Mapping[str, Variant]
    measured: Mapping[str, TargetRecord]
    status: Status | None
    notes: tuple[str, ...]
    """What a reader must know about the folder itself, such as a record that cannot be read."""

    def row(self, variant: str, target: str) -> Row:
        """Return the row of `variant` on `target`."""
        return next(r for r in self.rows if (r.variant, r.target) == (variant, target))


def load(run: Path) -> Results:
    """Return what the run folder `run` holds, however far the run got.

    What is missing or cannot be read becomes a row with its reason, or a note, never a gap.

    Raises:
        InvalidInput: The folder holds neither a study nor a variant.
    """
    run = Path(run)
    notes: list[str] = []
    study = _study(run / "study.json", notes)
    status = _read(run / "status.json", Status, notes)
    variants, unreadable = _variants(run, notes)
    if study is None and not variants and not unreadable:
        raise InvalidInput(
            f"`run` must be a run folder, with a study.json or variants, got {str(run)!r}. "
            "Make one with `shrinkkit run digits-cnn`, or set `run` to the folder of an earlier run."
        )
    measured = _measured(run, notes)
    targets = tuple(study.targets) if study else tuple(measured)
    found = variants.keys() | unreadable.keys()
    names = _names(study, status, variants, sorted(found))
    if stray := sorted(found - set(names)):
        notes.append(f"The folder also holds {', '.join(stray)}, which this study does not name; not reported.")
    folder = _Folder(study, status, variants, unreadable, measured)
    scores = [m.accuracy for record in measured.values() for m in record.measurements if m.accuracy]
    return Results(
        name=study.name if study else run.resolve().name,
        task=study.task if study else next((v.task for v in variants.values()), ""),
        metric=scores[0].metric if scores else "accuracy",
        in_shares=all(0 <= score <= 1 for accuracy in scores for score in accuracy.scores),
        budget=study.budget if study else Budget(),
        study=study,
        targets=targets,
        names=names,
        rows=tuple(folder.row(name, target) for name in names for target in targets),
        variants={name: variants[name] for name in names if name in variants},
        measured={target: measured[target] for target in targets if target in measured},
        status=status,
        notes=tuple(notes),
    )


def failures(results: Results) -> tuple[Row, ...]:
    """Return the rows that should hold measurements and do not. A refusal, which names a limit, is no failure."""
    return tuple(row for row in results.rows if row.state in ("failed", "not run"))


def accuracy_verdict(difference: Estimate | None, drop: float) -> str:
    """Return whether a paired difference of accuracy is surely within a budget, surely over it, or neither.

    Args:
        difference: Variant minus baseline, with its interval; None gives ''.
        drop: The most that may be lost, >= 0.
    """
    if difference is None:
        return ""
    if difference.low >= -drop:
        return "within budget"
    return "over budget" if difference.high < -drop else "cannot tell"


@dataclass(frozen=True)
class _Folder:
    study: Study | None
    status: Status | None
    variants: Mapping[str, Variant]
    unreadable: Mapping[str, str]
    measured: Mapping[str, TargetRecord]

    def row(self, name: str, target: str) -> Row:
        variant = self.variants.get(name)
        known: dict[str, Any] = {"intermediate": name != BASELINE and name not in self._asked()}
        if variant:
            file = next((f for f in variant.files if f.runtime == target.partition("/")[2]), None)
            known |= {"parameters": variant.parameters, "macs": variant.macs, "sparsity": variant.sparsity}
            if file:
                known |= {"size_bytes": file.size_bytes, "compressed_bytes": file.compressed_bytes}
                known["file_sha256"] = file.sha256
        state, reason = self._obstacle(name, target) or ("measured", "")
        if state == "measured":
            found = self._measurement(name, target)
            state, reason = _doubt(found, known.get("file_sha256", "")) or (state, reason)
            if found and state == "measured":
                drop = (self.study.budget if self.study else Budget()).accuracy_drop
                known |= _numbers(found, self.measured[target].runtime, drop)
        return Row(name, target, state, reason, **known)

    def _asked(self) -> set[str]:
        return {r.name for r in self.study.recipes} if self.study else set(self.variants)

    def _measurement(self, name: str, target: str) -> Measurement | None:
        record = self.measured.get(target)
        return next((m for m in record.measurements if m.variant == name), None) if record else None

    def _obstacle(self, name: str, target: str) -> tuple[str, str] | None:
        """Return the state and reason of what kept the variant from being made or its target from being measured."""
        recipe = next((r for r in self.study.recipes if r.name == name), None) if self.study else None
        if recipe and (why := impossible(recipe, target)):
            return "refused", f"{why}."
        return self._unmade(name, target.partition("/")[2]) or self._unmeasured(target)

    def _unmade(self, name: str, runtime: str) -> tuple[str, str] | None:
        step = self._step(name)
        if step and step.state in ("failed", "skipped"):
            return "failed", self._cause(step)
        if name in self.unreadable:
            return "failed", self.unreadable[name]
        if name not in self.variants:
            return "not run", _waiting(step) if step else "The variant was not made. Run the study."
        refusal = self.variants[name].refusals.get(runtime)
        return ("refused", refusal) if refusal else None

    def _unmeasured(self, target: str) -> tuple[str, str] | None:
        step = self._step(target)
        if step and step.state in ("failed", "skipped"):
            return "failed", f"The benchmark of {target} failed: {self._cause(step)}"
        if target not in self.measured:
            return "not run", _waiting(step) if step else f"{target} was not benchmarked. Run the study."
        return None

    def _step(self, subject: str) -> Step | None:
        return next((s for s in self.status.steps if s.subject == subject), None) if self.status else None

    def _cause(self, step: Step) -> str:
        """Return why a step failed; for one that was skipped, why the one that it needs did."""
        needed = next((s for s in self.status.steps if f"needs {s.name}," in step.error), None) if self.status else None
        if step.state != "skipped" or needed is None:
            return step.error or f"{step.name} left no reason; see run.log."
        return f"{needed.name}, which it needs, {needed.state}: {self._cause(needed)}"


def _waiting(step: Step) -> str:
    if step.state in ("running", "interrupted"):
        return f"{step.name} was interrupted. The same command goes on from there."
    return f"{step.name} is {step.state}. The same command goes on from there."


def _doubt(found: Measurement | None, sha256: str) -> tuple[str, str] | None:
    if found is None:
        return "not run", "The benchmark did not include it. Run the study again."
    if found.error:
        return "failed", found.error
    if found.file_sha256 != sha256:
        return "not run", "Its model file has changed since it was measured. Run the study again."
    return None


def _numbers(found: Measurement, runtime: Comparison | None, drop: float) -> dict[str, Any]:
    own = found.latency
    known: dict[str, Any] = {
        "latency_ms": found.latency_ms,
        "load_ms": found.load_ms,
        "first_call_ms": found.first_call_ms,
        "speedup": own.speedup if own else None,
        "timing": own.verdict if own else "",
    }
    if found.accuracy:
        difference = found.accuracy.difference
        known |= {"accuracy": found.accuracy.mean, "difference": difference, "agreement": found.accuracy.agreement}
        known["accuracy_verdict"] = accuracy_verdict(difference, drop)
    # Without a comparison of runtimes, only torch's own targets are known to be what is run today.
    comparable = own is not None or found.variant == BASELINE
    if comparable and (runtime or found.target.endswith("/torch")):
        chain = [c for c in (runtime, own) if c]
        if chain:
            together = intervals.product(*(c.speedup for c in chain))
            noisy = any(c.verdict == "too noisy" for c in chain)
            known["speedup_torch"] = together
            known["timing_torch"] = (
                "too noisy" if noisy else chain[0].verdict if len(chain) == 1 else intervals.verdict(together)
            )
    return known


def _names(
    study: Study | None, status: Status | None, variants: Mapping[str, Variant], found: Iterable[str]
) -> tuple[str, ...]:
    if study is None:
        return tuple(sorted({BASELINE, *found}, key=lambda name: (name != BASELINE, name)))
    asked = [BASELINE, *(recipe.name for recipe in study.recipes)]
    made = [s.subject for s in status.steps if s.notebook in ("2-prune", "3-quantize")] if status else []
    sources = [variants[name].source for name in asked if name in variants]
    return tuple(dict.fromkeys([*asked, *made, *(source for source in sources if source)]))


def _study(path: Path, notes: list[str]) -> Study | None:
    if not path.is_file():
        notes.append("There is no study.json: the folder was filled by hand, and what is missing cannot be known.")
        return None
    try:
        return Study.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, OSError) as error:
        notes.append(f"study.json cannot be read ({brief(error)}); what is missing cannot be known.")
        return None


def _read(path: Path, kind: type[_Record], notes: list[str]) -> _Record | None:
    if not path.is_file():
        return None
    try:
        return records.read(path, kind)
    except InvalidInput as error:
        notes.append(_nameless(error, path))
        return None


def _variants(run: Path, notes: list[str]) -> tuple[dict[str, Variant], dict[str, str]]:
    found: dict[str, Variant] = {}
    unreadable = {}
    for path in sorted(run.glob("variants/*/variant.json")):
        problems: list[str] = []
        if record := _read(path, Variant, problems):
            found[path.parent.name] = record
        else:
            unreadable[path.parent.name] = problems[0]
    notes.extend(unreadable.values())
    return found, unreadable


def _measured(run: Path, notes: list[str]) -> dict[str, TargetRecord]:
    found = (_read(path, TargetRecord, notes) for path in sorted(run.glob("measurements/*.json")))
    return {record.target: record for record in found if record}


def _nameless(error: InvalidInput, path: Path) -> str:
    """Return the first line of an error without the folders before the file, which mean nothing to a reader."""
    return re.sub(re.escape(str(path)), f"{path.parent.name}/{path.name}", brief(error)) + "."


def recipe_of(results: Results, name: str) -> Mapping[str, Any]:
    """Return what the variant `name` is made by: from its record, else from the study; empty for the baseline."""
    if name in results.variants:
        return results.variants[name].recipe
    recipes: tuple[Recipe, ...] = results.study.recipes if results.study else ()
    return next((recipe.settings() for recipe in recipes if recipe.name == name), {})
