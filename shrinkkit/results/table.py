"""A run folder as rows, one for each variant and place, none left out: measured, failed, refused, or not run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Comparison, Measurement, TargetRecord
from shrinkkit.core.recipe import BASELINE, Budget, Recipe, Study, impossible
from shrinkkit.core.status import Status, Step
from shrinkkit.core.target import Place
from shrinkkit.core.variant import Variant
from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Cell, Column, Shown, Table
from shrinkkit.errors import InvalidInput
from shrinkkit.results import folders
from shrinkkit.results.folders import Folder, again


@dataclass(frozen=True, repr=False)
class Row(Rich):
    """One variant at one place: what is known of it, and if it was not measured, why not."""

    variant: str
    target: str
    """A place: `cpu/torch`, or `cpu/torch @ <machine>` for another machine than the run's own; see `machines`."""
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
    speedup_today: Estimate | None = None
    """Against the user's own module, called in PyTorch on the same device as it is today."""
    timing_today: str = ""
    """Verdict on `speedup_today`."""
    load_ms: float | None = None
    first_call_ms: float | None = None
    file_sha256: str = ""

    @property
    def place(self) -> Place:
        """The target and the machine that `target` names."""
        return Place.parse(self.target)


@dataclass(frozen=True, repr=False)
class Results(Rich):
    """What a run folder holds. `rows` has every variant at every place, the baseline first."""

    name: str
    task: str
    metric: str
    is_fraction: bool
    """Whether every score lies in [0, 1], so that per cent and percentage points make sense."""
    budget: Budget
    study: Study | None
    """None for a folder that was filled by hand."""
    targets: tuple[str, ...]
    """Places: those of the run's own machine, then those of each other machine."""
    machines: tuple[str, ...]
    """Short names of the machines that the places are on, the run's own first: that on which its baseline was made."""
    names: tuple[str, ...]
    """Of the variants: the baseline, then the recipes in the study's order, intermediates last."""
    rows: tuple[Row, ...]
    variants: Mapping[str, Variant]
    measured: Mapping[str, TargetRecord]
    """By place."""
    status: Status | None
    notes: tuple[str, ...]
    """What a reader must know about the folder itself, such as a record that cannot be read."""

    def row(self, variant: str, target: str) -> Row:
        """Return the row of `variant` at the place `target`."""
        return next(r for r in self.rows if (r.variant, r.target) == (variant, target))

    def machine(self, target: str) -> str:
        """Return the short name of the machine of the place `target`."""
        return Place.parse(target).machine or self.machines[0]

    def where(self, target: str) -> str:
        """Return the place `target` as a reader must see it: with its machine, if there are several."""
        several = len(self.machines) > 1
        return str(Place(Place.parse(target).target, self.machine(target))) if several else target

    def shown(self) -> Shown:
        """Return a table of all rows; the report shows more of each."""
        return results_table(self)

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for each variant at each place."""
        return [row for one in self.rows for row in one._rows()]

    def of(self, machine: str) -> "Results":
        """Return what was measured on one of `machines`; the names of all of them stay."""
        return replace(
            self,
            targets=tuple(target for target in self.targets if self.machine(target) == machine),
            rows=tuple(row for row in self.rows if self.machine(row.target) == machine),
            measured={target: one for target, one in self.measured.items() if self.machine(target) == machine},
        )


def load(run: Path) -> Results:
    """Load the results of a run folder, however far the run got.

    Args:
        run: Run folder, such as `reports/digits-cnn`.

    Returns:
        A row for each variant and target. What is missing or cannot be read is a row with its reason, or a note.

    Raises:
        InvalidInput: The folder holds neither a study nor a variant.
    """
    folder = folders.read(Path(run))
    study, variants = folder.study, folder.variants
    found = variants.keys() | folder.unreadable.keys()
    if study is None and not found:
        raise InvalidInput(
            f"`run` must be a run folder, with a study.json or variants, got {str(run)!r}. "
            "Make one with `shrinkkit run digits-cnn`, or set `run` to the folder of an earlier run."
        )
    names = _names(study, folder.status, variants, sorted(found))
    targets, notes = folders.places(folder)
    if stray := sorted(found - set(names)):
        notes = (f"The folder also holds {', '.join(stray)}, which this study does not name; not reported.", *notes)
    measured = {target: folder.measured[target] for target in targets if target in folder.measured}
    budget = study.budget if study else Budget()
    verdicts = {target: accuracy_verdicts(record, budget.accuracy_drop) for target, record in measured.items()}
    scores = [m.accuracy for record in measured.values() for m in record.measurements if m.accuracy]
    return Results(
        name=study.name if study else Path(run).resolve().name,
        task=study.task if study else next((v.task for v in variants.values()), ""),
        metric=scores[0].metric if scores else "accuracy",
        is_fraction=all(0 <= score <= 1 for accuracy in scores for score in accuracy.scores),
        budget=budget,
        study=study,
        targets=targets,
        machines=tuple(dict.fromkeys(Place.parse(target).machine or folder.own[0] for target in targets)),
        names=names,
        rows=tuple(_row(folder, name, target, verdicts.get(target, {})) for name in names for target in targets),
        variants={name: variants[name] for name in names if name in variants},
        measured=measured,
        status=folder.status,
        notes=(*folder.notes, *notes),
    )


def failures(results: Results) -> tuple[Row, ...]:
    """Return the rows that should hold measurements and do not. A refusal, which names a limit, is no failure."""
    return tuple(row for row in results.rows if row.state in ("failed", "not run"))


def accuracy_verdicts(record: TargetRecord, drop: float) -> dict[str, str]:
    """Return of each variant whether it is surely within a budget, surely over it, or neither.

    Many variants are looked at together, and one of many that truly cost too much would seem within the budget by
    chance; see `intervals.within`.

    Args:
        record: What was measured on one target.
        drop: The most accuracy that may be lost, >= 0.
    """
    scored = {m.variant: m.accuracy for m in record.measurements if m.accuracy}
    baseline = scored.pop(BASELINE, None)
    if baseline is None:
        return {}
    sure = estimate.within(baseline.scores, [one.scores for one in scored.values()], drop)
    return {
        name: "within budget" if within else "over budget" if one.difference.high < -drop else "cannot tell"
        for (name, one), within in zip(scored.items(), sure, strict=True)
        if one.difference
    }


def _row(folder: Folder, name: str, target: str, verdicts: Mapping[str, str]) -> Row:
    """Return the row of a variant at a place, given the verdicts on accuracy of all variants there."""
    variant = folder.variants.get(name)
    asked = {r.name for r in folder.study.recipes} if folder.study else set(folder.variants)
    known: dict[str, Any] = {"intermediate": name != BASELINE and name not in asked}
    if variant:
        known |= {"parameters": variant.parameters, "macs": variant.macs, "sparsity": variant.sparsity}
        if file := folder.file(name, target):
            known |= {"size_bytes": file.size_bytes, "compressed_bytes": file.compressed_bytes}
            known["file_sha256"] = file.sha256
    state, reason = _obstacle(folder, name, target) or ("measured", "")
    if state == "measured":
        record = folder.measured[target]
        found = next((m for m in record.measurements if m.variant == name), None)
        state, reason = _doubt(found, known.get("file_sha256", ""), target) or (state, reason)
        if found and state == "measured":
            known |= _numbers(found, record.runtime)
            known["accuracy_verdict"] = verdicts.get(name, "")
    return Row(name, target, state, reason, **known)


def _obstacle(folder: Folder, name: str, target: str) -> tuple[str, str] | None:
    """Return the state and reason of what kept the variant from being made or its target from being measured."""
    recipe = next((r for r in folder.study.recipes if r.name == name), None) if folder.study else None
    if recipe and (why := impossible(recipe.precision.name, str(Place.parse(target).target))):
        return "refused", f"{why}."
    return _unmade(folder, name, Place.parse(target).target.runtime) or _unmeasured(folder, target)


def _unmade(folder: Folder, name: str, runtime: str) -> tuple[str, str] | None:
    step = folder.step(name)
    if step and step.state in ("failed", "skipped"):
        return "failed", _cause(folder, step)
    if name in folder.unreadable:
        return "failed", folder.unreadable[name]
    if name not in folder.variants:
        return "not run", _waiting(step) if step else "The variant was not made. Run the study."
    refusal = folder.variants[name].refusals.get(runtime)
    return ("refused", refusal) if refusal else None


def _unmeasured(folder: Folder, target: str) -> tuple[str, str] | None:
    step = folder.step(target)
    if step and step.state in ("failed", "skipped"):
        return "failed", f"The benchmark of {target} failed: {_cause(folder, step)}"
    if target not in folder.measured:
        if why := next((folder.changed[path] for path in (step.files if step else ()) if path in folder.changed), ""):
            return "failed", f"{why} {again(target)}"
        return "not run", _waiting(step) if step else f"{target} was not benchmarked. Run the study."
    return None


def _cause(folder: Folder, step: Step) -> str:
    """Return why a step failed; for one that was skipped, why the one that it needs did."""
    steps = folder.status.steps if folder.status else ()
    needed = next((s for s in steps if f"needs {s.name}," in step.error), None)
    if step.state != "skipped" or needed is None:
        return step.error or f"{step.name} left no reason; see run.log."
    return f"{needed.name}, which it needs, {needed.state}: {_cause(folder, needed)}"


def _waiting(step: Step) -> str:
    if step.state in ("running", "interrupted"):
        return f"{step.name} was interrupted. The same command goes on from there."
    return f"{step.name} is {step.state}. The same command goes on from there."


def _doubt(found: Measurement | None, sha256: str, target: str) -> tuple[str, str] | None:
    if found is None:
        return "not run", f"The benchmark did not include it. {again(target)}"
    if found.error:
        return "failed", found.error
    if found.file_sha256 != sha256:
        return "not run", f"Its model file has changed since it was measured. {again(target)}"
    return None


def _numbers(found: Measurement, runtime: Comparison | None) -> dict[str, Any]:
    own = found.latency
    known: dict[str, Any] = {
        "latency_ms": found.latency_ms,
        "load_ms": found.load_ms,
        "first_call_ms": found.first_call_ms,
        "speedup": own.speedup if own else None,
        "timing": own.verdict if own else "",
    }
    if found.accuracy:
        known |= {"accuracy": found.accuracy.mean, "difference": found.accuracy.difference}
        known["agreement"] = found.accuracy.agreement
    if runtime and (own is not None or found.variant == BASELINE):
        chain = [c for c in (runtime, own) if c]
        together = estimate.product(*(c.speedup for c in chain))
        known |= {"speedup_today": together, "timing_today": _verdict_of_both(chain, together)}
    return known


def _verdict_of_both(chain: Sequence[Comparison], together: Estimate) -> str:
    """Return the verdict on a product of speed-ups; what is wrong with one of them is wrong with it."""
    if any(one.verdict == "too noisy" for one in chain):
        return "too noisy"
    if any(one.stopped for one in chain):
        return "undecided"
    return chain[0].verdict if len(chain) == 1 else estimate.verdict(together)


def _names(
    study: Study | None, status: Status | None, variants: Mapping[str, Variant], found: Iterable[str]
) -> tuple[str, ...]:
    if study is None:
        return tuple(sorted({BASELINE, *found}, key=lambda name: (name != BASELINE, name)))
    asked = [BASELINE, *(recipe.name for recipe in study.recipes)]
    made = [s.subject for s in status.steps if s.notebook.startswith(("2-", "3-")) and s.subject] if status else []
    sources = [variants[name].source for name in asked if name in variants]
    return tuple(dict.fromkeys([*asked, *made, *(source for source in sources if source)]))


def recipe_of(results: Results, name: str) -> Mapping[str, Any]:
    """Return what the variant `name` is made by: from its record, else from the study; empty for the baseline."""
    if name in results.variants:
        return results.variants[name].recipe
    recipes: tuple[Recipe, ...] = results.study.recipes if results.study else ()
    return next((recipe.settings() for recipe in recipes if recipe.name == name), {})


def results_table(of: "Results") -> Table:
    """Return every variant at every place with what decides: size, speed, accuracy, or why there is none."""
    columns = (
        Column("variant"),
        Column("target"),
        Column("on disk", True),
        Column("vs FP32 here", True),
        Column("vs PyTorch today", True),
        Column("change", True),
    )
    return Table(f"Run {of.name} of {of.task}", columns, tuple(_result_row(row, of.is_fraction) for row in of.rows))


def _result_row(one: "Row", is_fraction: bool) -> tuple[Cell, ...]:
    name, target = Cell(one.variant), Cell(one.target)
    if one.state != "measured":
        return name, target, Cell(f"{one.state}: {one.reason}", tone="warning", wide=True)
    speeds = [
        Cell(formats.times(ratio.value), f"{formats.interval(ratio)}\n{verdict}") if ratio else Cell("reference")
        for ratio, verdict in ((one.speedup, one.timing), (one.speedup_today, one.timing_today))
    ]
    moved = one.difference
    change = (
        Cell(formats.change(moved.value, is_fraction=is_fraction), formats.interval(moved, is_fraction=is_fraction))
        if moved
        else Cell("reference")
    )
    return name, target, Cell(formats.size(one.size_bytes or 0)), *speeds, change
