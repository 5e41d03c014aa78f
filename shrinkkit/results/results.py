"""The results of a run: one row for each variant and place, whether measured, failed, unsupported, or not run."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shrinkkit.core import estimate, robustness
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Comparison, Measurement, TargetRecord
from shrinkkit.core.recipe import BASELINE, Budget, Recipe, Study
from shrinkkit.core.robustness import RobustnessRecord
from shrinkkit.core.run_folder import Status, Step
from shrinkkit.core.search import SearchRecord
from shrinkkit.core.target import Place
from shrinkkit.core.variant import Variant
from shrinkkit.display import cells, formats
from shrinkkit.display.formats import TIMES
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Cell, Column, Several, Shown, Table
from shrinkkit.errors import InvalidInput
from shrinkkit.results import folders
from shrinkkit.results.folders import Folder, how_to_remeasure
from shrinkkit.runtimes import registry

CONCLUSIVE = ("faster", "slower", "same")
"""Verdicts on a timing that support a statement."""


@dataclass(frozen=True, repr=False)
class Row(Rich):
    """One variant at one place: its figures, or why it was not measured."""

    variant: str
    target: str
    """A place: `cpu/torch`, or `cpu/torch @ <machine>` for a machine other than the run's own."""
    state: str
    """`measured`, `failed`, `unsupported`, or `not run`."""
    reason: str = ""
    """Why it was not measured; empty if it was."""
    intermediate: bool = False
    """Whether it is only the source of another variant, and no recipe's result."""
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
    robustness: Estimate | None = None
    """Change of the mean score on corrupted inputs against the baseline; None for the baseline, or if untried."""
    robustness_verdict: str = ""
    """As `accuracy_verdict`; empty without a budget for robustness."""
    latency_ms: Estimate | None = None
    speedup: Estimate | None = None
    """Against FP32 on the same target; None for the baseline."""
    timing: str = ""
    """Verdict on `speedup`: `faster`, `slower`, `same`, `undecided`, or `too noisy`."""
    speedup_today: Estimate | None = None
    """Against the user's own module, called in PyTorch on the same device."""
    timing_today: str = ""
    """Verdict on `speedup_today`."""
    load_ms: float | None = None
    first_call_ms: float | None = None
    file_sha256: str = ""
    higher_is_better: bool = True

    @property
    def gain(self) -> Estimate | None:
        """`difference` with the sign by which more is better."""
        return estimate.gain(self.difference, higher_is_better=self.higher_is_better)

    @property
    def verdict(self) -> str:
        """The worse of the verdicts on accuracy and on robustness, if that has a budget."""
        order = ("over budget", "cannot tell", "within budget", "")
        return min((self.accuracy_verdict, self.robustness_verdict), key=order.index)

    @property
    def place(self) -> Place:
        """The target and the machine that `target` names."""
        return Place.parse(self.target)


@dataclass(frozen=True, repr=False)
class Results(Rich):
    """The contents of a run folder. `rows` has every variant at every place, the baseline first."""

    name: str
    task: str
    metric: str
    higher_is_better: bool
    is_fraction: bool
    """Whether scores are shown in per cent and changes in percentage points."""
    budget: Budget
    study: Study | None
    """None for a folder that was created from notebooks."""
    targets: tuple[str, ...]
    """Places: those of the run's own machine, then those of each other machine."""
    machines: tuple[str, ...]
    """Short names of the machines, the one that made the baseline first."""
    names: tuple[str, ...]
    """Of the variants: the baseline, then the recipes in the study's order, intermediates last."""
    rows: tuple[Row, ...]
    variants: Mapping[str, Variant]
    measured: Mapping[str, TargetRecord]
    """By place."""
    robust: Mapping[str, RobustnessRecord]
    """Robustness by place; empty in mode `compress`."""
    search: SearchRecord | None
    """What a search tried; None if there was none."""
    status: Status | None
    notes: tuple[str, ...]
    """Problems of the folder itself, such as a record that cannot be read."""

    @property
    def metric_title(self) -> str:
        """The metric's name, and that lower is better where it is."""
        return formats.metric(self.metric, higher_is_better=self.higher_is_better)

    @property
    def is_fidelity(self) -> bool:
        """Whether the score is the agreement with the original model, for want of labels."""
        return self.metric.endswith("with the original")

    @property
    def task_notes(self) -> tuple[str, ...]:
        """What the task was given without, such as labels."""
        return tuple(dict.fromkeys(note for record in self.measured.values() for note in record.task_notes))

    def row(self, variant: str, target: str) -> Row:
        """Return the row of `variant` at the place `target`."""
        return next(r for r in self.rows if (r.variant, r.target) == (variant, target))

    def machine(self, target: str) -> str:
        """Return the short name of the machine of the place `target`."""
        return Place.parse(target).machine or self.machines[0]

    def where(self, target: str) -> str:
        """Return the name of the place `target`: with its machine, if there are several."""
        several = len(self.machines) > 1
        return str(Place(Place.parse(target).target, self.machine(target))) if several else target

    def measurement(self, row: Row) -> Measurement | None:
        """Return the measurement of a row, None if its target has none of its variant."""
        record = self.measured.get(row.target)
        return next((m for m in record.measurements if m.variant == row.variant), None) if record else None

    def recipe(self, name: str) -> Mapping[str, Any]:
        """Return the recipe of the variant `name`: from its record, else from the study; empty for the baseline."""
        if name in self.variants:
            return self.variants[name].recipe
        recipes: tuple[Recipe, ...] = self.study.recipes if self.study else ()
        return next((recipe.settings() for recipe in recipes if recipe.name == name), {})

    def budget_text(self) -> str:
        """Return the budget with its unit and metric."""
        text = f"{self._drop_text(self.budget.accuracy_drop)} of {self.metric}"
        robust = self.budget.robustness_drop
        return text if robust is None else f"{text}, {self._drop_text(robust)} on corrupted inputs"

    @property
    def drop_if_corrupted(self) -> float:
        """The loss on corrupted inputs that the budget allows: that of accuracy where it names none."""
        return self.budget.accuracy_drop if self.budget.robustness_drop is None else self.budget.robustness_drop

    def _drop_text(self, drop: float) -> str:
        return formats.points(drop) if self.is_fraction else f"{drop:g}"

    def shown(self) -> Shown:
        """Return a table for each place; the report shows more of each row."""
        return Several(tuple(target_table(self, target) for target in self.targets))

    def _rows(self) -> list[dict[str, Any]]:
        return [row for one in self.rows for row in one._rows()]

    def of(self, machine: str) -> "Results":
        """Return the part that was measured on one of `machines`; `machines` itself is unchanged."""
        return replace(
            self,
            targets=tuple(target for target in self.targets if self.machine(target) == machine),
            rows=tuple(row for row in self.rows if self.machine(row.target) == machine),
            measured={target: one for target, one in self.measured.items() if self.machine(target) == machine},
            robust={target: one for target, one in self.robust.items() if self.machine(target) == machine},
        )


def load(run: Path) -> Results:
    """Load the results of a run folder such as `reports/digits-cnn`, even of an unfinished run.

    What is missing or cannot be read is a row with its reason, or a note.

    Args:
        run: The run folder.

    Returns:
        The rows, measurements and notes of the folder.

    Raises:
        InvalidInput: The folder holds neither a study nor a variant.
    """
    folder = folders.read(Path(run))
    study, variants = folder.study, folder.variants
    recorded = variants.keys() | folder.unreadable.keys()
    if study is None and not recorded:
        text = f"`run` must be a run folder, with a study.json or variants, got {str(run)!r}."
        raise InvalidInput(f"{text} Make one with `shrinkkit run digits-cnn`, or name that of an earlier run.")
    names = _names(study, folder.status, variants, sorted(recorded))
    targets, notes = folders.places(folder)
    if stray := sorted(recorded - set(names)):
        notes = (f"The folder also holds {', '.join(stray)}, which this study does not name; not reported.", *notes)
    measured = {target: folder.measured[target] for target in targets if target in folder.measured}
    budget = study.budget if study else Budget()
    if study and study.mode == "robust":
        # Nothing was timed.
        budget = budget.model_copy(update={"want": "smallest"})
    robust = {target: folder.robustness[target] for target in targets if target in folder.robustness}
    verdicts = {target: accuracy_verdicts(record, budget.accuracy_drop) for target, record in measured.items()}
    robustness_of = {target: (_changes(one), _kept(one, budget)) for target, one in robust.items()}
    accuracies = [m.accuracy for record in measured.values() for m in record.measurements if m.accuracy]
    return Results(
        name=study.name if study else Path(run).resolve().name,
        task=study.task if study else next((v.task for v in variants.values()), ""),
        metric=accuracies[0].metric if accuracies else "accuracy",
        higher_is_better=all(accuracy.higher_is_better for accuracy in accuracies),
        is_fraction=all(accuracy.is_fraction for accuracy in accuracies),
        budget=budget,
        study=study,
        targets=targets,
        machines=tuple(dict.fromkeys(Place.parse(target).machine or folder.machine_names[0] for target in targets)),
        names=names,
        rows=tuple(
            _robust(_row(folder, name, target, verdicts.get(target, {})), *robustness_of.get(target, ({}, {})))
            for name in names
            for target in targets
        ),
        variants={name: variants[name] for name in names if name in variants},
        measured=measured,
        robust=robust,
        search=folder.search,
        status=folder.status,
        notes=(*folder.notes, *notes),
    )


def failures(results: Results) -> tuple[Row, ...]:
    """Return the rows that should hold measurements and do not; unsupported combinations are no failures."""
    return tuple(row for row in results.rows if row.state in ("failed", "not run"))


def missing(results: Results) -> dict[tuple[str, str, str], list[str]]:
    """Return the places of rows without figures by state, variant and reason; failures first."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for state in ("failed", "not run", "unsupported"):
        for row in results.rows:
            if row.state == state:
                grouped.setdefault((state, row.variant, row.reason), []).append(results.where(row.target))
    return grouped


def accuracy_verdicts(record: TargetRecord, drop: float) -> dict[str, str]:
    """Return by variant whether it is `within budget`, `over budget`, or neither (`cannot tell`).

    Holm's correction covers the number of variants; see `estimate.within`.
    """
    accuracies = {m.variant: m.accuracy for m in record.measurements if m.accuracy and not m.reference}
    parts = [(m.variant, m.accuracy.gain) for m in record.measurements if m.accuracy and m.reference]
    baseline = accuracies.pop(BASELINE, None)
    if baseline is None:
        return {}
    samples, better = [accuracy.sample for accuracy in accuracies.values()], baseline.higher_is_better
    within = estimate.within(baseline.sample, samples, drop, higher_is_better=better, bounds=baseline.bounds)
    return {
        name: estimate.budget_verdict(is_within, accuracy.gain, drop)
        for (name, accuracy), is_within in zip(accuracies.items(), within, strict=True)
        if accuracy.gain
    } | {
        # A part of the examples shows at most that the budget is exceeded.
        name: estimate.budget_verdict(False, gain, drop)
        for name, gain in parts
    }


def pareto_front(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return the Pareto-optimal rows in speed-up against PyTorch, change of accuracy and size, fastest first.

    Only measured rows within the budget with a conclusive timing take part; the baseline's change is 0. All must be of
    one task on one machine.
    """
    pairs = [(objectives, row) for row in rows if (objectives := _objectives(row))]

    distinct = {own for own, _ in pairs}
    best = [(o, row) for o, row in pairs if not any(all(map(operator.ge, other, o)) for other in distinct - {o})]
    return tuple(row for _, row in sorted(best, key=lambda pair: -pair[0][0]))


def _objectives(row: Row) -> tuple[float, ...]:
    """Return speed-up, change of accuracy and negative size, to be maximised; empty for a row that takes no part."""
    if row.state != "measured" or row.intermediate or not row.size_bytes or row.speedup_today is None:
        return ()
    within = row.variant == BASELINE or row.verdict == "within budget"
    if row.timing_today not in CONCLUSIVE or not within:
        return ()
    return row.speedup_today.value, row.gain.value if row.gain else 0.0, -row.size_bytes


def _row(folder: Folder, name: str, target: str, verdicts: Mapping[str, str]) -> Row:
    variant = folder.variants.get(name)
    recipes = {r.name for r in folder.study.recipes} if folder.study else set(folder.variants)
    fields: dict[str, Any] = {"intermediate": name != BASELINE and name not in recipes}
    if variant:
        fields |= {"parameters": variant.parameters, "macs": variant.macs, "sparsity": variant.sparsity}
        if file := folder.file(name, target):
            fields |= {"size_bytes": file.size_bytes, "compressed_bytes": file.compressed_bytes}
            fields["file_sha256"] = file.sha256
    state, reason = _obstacle(folder, name, target) or ("measured", "")
    if state == "measured":
        record = folder.measured[target]
        measurement = next((m for m in record.measurements if m.variant == name), None)
        state, reason = _invalid(measurement, fields.get("file_sha256", ""), target) or (state, reason)
        if measurement and state == "measured":
            fields |= _figures(measurement, record.runtime)
            fields["accuracy_verdict"] = verdicts.get(name, "")
    return Row(name, target, state, reason, **fields)


def _robust(row: Row, changes: Mapping[str, Estimate | None], verdicts: Mapping[str, str]) -> Row:
    """Return a row with its change on corrupted inputs, and whether that keeps the budget."""
    if row.state != "measured" or row.variant not in changes:
        return row
    return replace(row, robustness=changes[row.variant], robustness_verdict=verdicts.get(row.variant, ""))


def _changes(record: RobustnessRecord) -> dict[str, Estimate | None]:
    """Return by variant the change of the mean score on corrupted inputs, None for the baseline."""
    known = record.by_name()
    names = known[BASELINE].corruptions() if known else ()
    return {
        name: None if name == BASELINE else one.scores(*names, baseline=known[BASELINE]).difference
        for name, one in known.items()
        if names
    }


def _kept(record: RobustnessRecord, budget: Budget) -> dict[str, str]:
    return {} if budget.robustness_drop is None else robustness.verdicts(record, budget.robustness_drop)


def _obstacle(folder: Folder, name: str, target: str) -> tuple[str, str] | None:
    """Return state and reason if the variant was not made or its target not measured."""
    recipe = next((r for r in folder.study.recipes if r.name == name), None) if folder.study else None
    at = Place.parse(target).target
    if recipe and (reason := registry.refusal(recipe.precision.name, at)):
        return "unsupported", f"{reason}."
    return _not_made(folder, name, at.runtime) or _not_measured(folder, name, target)


def _not_made(folder: Folder, name: str, runtime: str) -> tuple[str, str] | None:
    step = folder.step(name)
    if step and step.state in ("failed", "skipped"):
        return "failed", _cause(folder, step)
    if name in folder.unreadable:
        return "failed", folder.unreadable[name]
    if name not in folder.variants:
        return "not run", _pending(step) if step else "The variant was not made. Run the study."
    reason = folder.variants[name].refusals.get(runtime)
    return ("unsupported", reason) if reason else None


def _not_measured(folder: Folder, name: str, target: str) -> tuple[str, str] | None:
    step, record = folder.step(target), folder.measured.get(target)
    if record and record.partial and any(m.variant == name for m in record.measurements):
        return None
    if step and step.state in ("failed", "skipped"):
        return "failed", f"The benchmark of {target} failed: {_cause(folder, step)}"
    if record and not (record.partial and step):
        return None
    reasons = (folder.altered[path] for path in (step.files if step else ()) if path in folder.altered)
    if reason := next(reasons, ""):
        return "failed", f"{reason} {how_to_remeasure(target)}"
    return "not run", _pending(step) if step else f"{target} was not benchmarked. Run the study."


def _cause(folder: Folder, step: Step) -> str:
    """Return why a step failed; for a skipped one, why the step that it needs did."""
    steps = folder.status.steps if folder.status else ()
    needed = next((s for s in steps if f"needs {s.name}," in step.error), None)
    if step.state != "skipped" or needed is None:
        return step.error or f"{step.name} has no error message; see run.log."
    return f"{needed.name}, which it needs, {needed.state}: {_cause(folder, needed)}"


def _pending(step: Step) -> str:
    state = "was interrupted" if step.state in ("running", "interrupted") else f"is {step.state}"
    return f"{step.name} {state}. Run the same command again to resume."


def _invalid(measurement: Measurement | None, sha256: str, target: str) -> tuple[str, str] | None:
    if measurement and measurement.error:
        return "failed", measurement.error
    if measurement and measurement.file_sha256 == sha256:
        return None
    why = "Its model file has changed since it was measured." if measurement else "The benchmark did not include it."
    return "not run", f"{why} {how_to_remeasure(target)}"


def _figures(measurement: Measurement, runtime: Comparison | None) -> dict[str, Any]:
    compared, accuracy = measurement.latency, measurement.accuracy
    fields: dict[str, Any] = {name: getattr(measurement, name) for name in ("latency_ms", "load_ms", "first_call_ms")}
    if compared:
        fields |= {"speedup": compared.speedup, "timing": compared.verdict}
    if accuracy:
        fields |= {"accuracy": accuracy.mean, "difference": accuracy.difference, "agreement": accuracy.agreement}
        fields["higher_is_better"] = accuracy.higher_is_better
    if runtime and (compared or measurement.variant == BASELINE):
        chain = [runtime, *([compared] if compared else [])]
        product = estimate.product(*(c.speedup for c in chain))
        fields |= {"speedup_today": product, "timing_today": _verdict_of_product(chain, product)}
    return fields


def _verdict_of_product(chain: Sequence[Comparison], product: Estimate) -> str:
    """Return the verdict on a product of speed-ups, which is as weak as that of its weakest factor."""
    if any(compared.verdict == "too noisy" for compared in chain):
        return "too noisy"
    stopped = any(compared.stopped for compared in chain)
    return "undecided" if stopped else chain[0].verdict if len(chain) == 1 else estimate.verdict(product)


def _names(
    study: Study | None, status: Status | None, variants: Mapping[str, Variant], recorded: Iterable[str]
) -> tuple[str, ...]:
    if study is None:
        return tuple(sorted({BASELINE, *recorded}, key=lambda name: (name != BASELINE, name)))
    names = [BASELINE, *(recipe.name for recipe in study.recipes)]
    steps = [s.subject for s in status.steps if s.notebook.startswith(("2-", "3-")) and s.subject] if status else []
    sources = [variants[name].source for name in names if name in variants]
    return tuple(dict.fromkeys([*names, *steps, *(source for source in sources if source)]))


def target_table(of: Results, target: str) -> Table:
    """Return the rows of one place in few characters: size, score, latency and speed-ups, or why there are none."""
    titles = ("size", "score", "change", "latency", "vs FP32", "vs PyTorch")
    rows = []
    for row in (row for row in of.rows if row.target == target and not row.intermediate):
        reason = Cell(f"{row.state}: {row.reason}", tone="warning", wide=True)
        rows.append((Cell(row.variant), *(_figure_cells(row, of.is_fraction) if row.state == "measured" else [reason])))
    columns = (Column("variant"), *(Column(title, True) for title in titles))
    return Table(of.where(target), columns, tuple(rows), folded=False)


_MARKS = {"within budget": " ok", "over budget": " no", "cannot tell": " ?", "": ""}


def _figure_cells(row: Row, fraction: bool) -> tuple[Cell, ...]:
    change = Cell("")
    if row.difference:
        text = formats.change(row.difference.value, is_fraction=fraction, unit=False)
        interval = formats.interval(row.difference, is_fraction=fraction)
        change = Cell(text + _MARKS[row.accuracy_verdict], interval)
    return (
        cells.size(row.size_bytes),
        Cell(formats.score(row.accuracy.value, is_fraction=fraction) if row.accuracy else ""),
        change,
        Cell(formats.milliseconds(row.latency_ms.value) if row.latency_ms else ""),
        _speedup_cell(row, row.speedup, row.timing),
        _speedup_cell(row, row.speedup_today, row.timing_today),
    )


def _speedup_cell(row: Row, ratio: Estimate | None, verdict: str) -> Cell:
    if ratio is None:
        return Cell(f"1{TIMES}" if row.variant == BASELINE else "")
    text = f"{formats.rounded(ratio)}{TIMES}"
    return Cell({"too noisy": "noisy", "same": "same", "undecided": f"{text}?"}.get(verdict, text))
