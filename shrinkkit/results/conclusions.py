"""What the rows of a run amount to: the verdict in one sentence, and where the speed comes from."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shrinkkit.core import estimate, evidence
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Comparison, speedup
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.target import Place
from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, Statement
from shrinkkit.errors import UnfairComparison
from shrinkkit.results.table import Results, Row

TRUSTED = ("faster", "slower", "same")
"""Verdicts of a timing that may be quoted."""
DRIFT = 1.2
"""Ratio of the module's own latencies beside two targets from which on they are said to differ."""
TONES = {"within budget": "good", "cannot tell": "warning", "over budget": "bad", "none": "warning"}
"""Of the kinds of a verdict."""


@dataclass(frozen=True, repr=False)
class Verdict(Rich):
    """The answer of a report, and the row that it stands on."""

    headline: str
    """One sentence."""
    remarks: tuple[str, ...]
    """Sentences that a reader of the headline must know: what the runtime alone gives, what failed."""
    kind: str
    """`within budget`, `cannot tell`, `over budget`, or `none`."""
    row: Row | None

    @property
    def sentence(self) -> str:
        """The headline and the remarks, as one text."""
        return " ".join([self.headline, *self.remarks])

    def shown(self) -> Shown:
        """Return the headline with its remarks."""
        return Statement(self.headline, self.remarks, TONES[self.kind], f"Verdict: {self.kind}")


@dataclass(frozen=True)
class Factor:
    """What one or several steps of a recipe gave, from one measured variant to the next."""

    name: str
    """Of the steps: `prune-channels + fine-tune`."""
    kind: str
    """`transform`, `precision`, or `both` where a variant between them was not measured."""
    speedup: Estimate


@dataclass(frozen=True, repr=False)
class Factors(Rich):
    """Why a variant on a target is as fast as it is: factors whose product is its speed-up against PyTorch today."""

    variant: str
    target: str
    """A place, as in `Row`."""
    runtime: Estimate | None
    steps: tuple["Factor", ...]
    """What each step of the recipe gave, from the first to the last."""
    total: Estimate
    timing: str
    """Verdict on `total`: `faster`, `slower`, `same`, `undecided`, or `too noisy`."""


def verdict(results: Results) -> Verdict:
    """Return which variant is worth it under the study's budget, or the honest opposite.

    Only rows whose timing got a verdict are considered, and only a paired difference of accuracy whose whole
    interval keeps the budget counts as within it. Nothing is compared across machines: each has a verdict of its own.
    The headline is that of the run's own, unless only others measured what the budget asks for; theirs are remarks.
    """
    whole = {machine: results.of(machine) for machine in results.machines}
    parts = {name: part for name, part in whole.items() if any(_asked(target, part) for target in part.targets)}
    chosen = next((name for name, part in parts.items() if _has_figures(part)), next(iter(parts), ""))
    made = _verdict(parts.get(chosen, results))
    remarks = [*_saturation_remark(results), *made.remarks, *_failure_remark(results)]
    remarks += [f"On {name}: {_verdict(part).sentence}" for name, part in parts.items() if name != chosen]
    where = f"On {chosen}: " if chosen and len(results.machines) > 1 else ""
    return replace(made, headline=where + made.headline, remarks=tuple(remarks))


def _asked(target: str, results: Results) -> bool:
    """Return whether the budget is about the place `target`."""
    return results.budget.target in (None, str(Place.parse(target).target))


def _has_figures(part: Results) -> bool:
    return any(r.state == "measured" and r.variant != BASELINE and _asked(r.target, part) for r in part.rows)


def _verdict(results: Results) -> Verdict:
    """Return the verdict of one machine."""
    rows = [row for row in results.rows if row.variant != BASELINE and not row.intermediate and _eligible(row, results)]
    remarks = (
        *_runtime_remark(results, rows),
        *_export_remark(results),
        *_drift_remark(results),
        *_noise_remark(results),
    )
    if not rows:
        return Verdict(_nothing(results), remarks, "none", None)
    better = [row for row in rows if _gain(row, results) > 1]
    for kind in ("within budget", "cannot tell", "over budget"):
        found = [row for row in better if row.accuracy_verdict == kind]
        if found and kind == "within budget":
            best = max(found, key=lambda row: _rank(row, results))
            remarks = (*_class_remark(best, results), *remarks)
            return Verdict(f"{_claim(best, results)}: within the budget of {_budget(results)}.", remarks, kind, best)
        if found:
            best = max(found, key=lambda row: (row.difference.low if row.difference else 0.0, _gain(row, results)))
            return Verdict(_closest(best, kind, results), remarks, kind, best)
    wanted = "faster" if results.budget.want == "fastest" else "smaller"
    return Verdict(f"No variant is {wanted} than the model it came from; keep the baseline.", remarks, "none", None)


def factors(results: Results) -> tuple[Factors, ...]:
    """Return the factors of every variant that was measured, the baseline on other runtimes than torch included."""
    found = []
    for row in results.rows:
        if row.state != "measured" or row.speedup_today is None or row.intermediate:
            continue
        runtime = results.measured[row.target].runtime
        found.append(
            Factors(
                variant=row.variant,
                target=row.target,
                runtime=runtime.speedup if runtime else None,
                steps=_steps(results, row),
                total=row.speedup_today,
                timing=row.timing_today,
            )
        )
    return tuple(found)


def _steps(results: Results, row: Row) -> tuple[Factor, ...]:
    """Return what each step between the baseline and a row's variant gave on the row's target."""
    if row.speedup is None:
        return ()
    # From the variant back to the baseline, over all variants between them that were measured.
    factors: list[Factor] = []
    later, comparison = row.variant, _comparison(results, row.variant, row.target)
    while (earlier := results.variants[later].source) not in (None, BASELINE):
        source = _comparison(results, earlier or "", row.target)
        if comparison is None or source is None or not _tells(source, comparison):
            return (_factor(results, BASELINE, row.variant, row.speedup),)
        ratio = estimate.product(comparison.speedup, estimate.inverse(source.speedup))
        factors.insert(0, _factor(results, earlier or "", later, ratio))
        later, comparison = earlier or "", source
    first = comparison.speedup if comparison and factors else row.speedup
    return (_factor(results, BASELINE, later, first), *factors) if later != BASELINE else ()


def _factor(results: Results, earlier: str, later: str, speedup: Estimate) -> Factor:
    """Return what the steps gave that lead from one variant to a later one."""
    before = results.variants[earlier].stages if earlier in results.variants else ()
    variant = results.variants[later]
    names = variant.stages[len(before) :]
    lowered = variant.precision != "float32"
    kind = "both" if names and lowered else "precision" if lowered else "transform"
    return Factor(" + ".join([*names, variant.precision] if lowered else names), kind, speedup)


def _tells(source: Comparison, comparison: Comparison) -> bool:
    """Return whether two comparisons with the baseline tell how two variants compare."""
    if "too noisy" in (comparison.verdict, source.verdict):
        return False
    try:
        speedup(source, comparison)
    except UnfairComparison:
        return False
    return True


def _comparison(results: Results, variant: str, target: str) -> Comparison | None:
    if not any(r.variant == variant and r.target == target and r.state == "measured" for r in results.rows):
        return None
    return next(m.latency for m in results.measured[target].measurements if m.variant == variant)


def _eligible(row: Row, results: Results) -> bool:
    measured = row.state == "measured" and row.difference is not None and row.size_bytes is not None
    here = _asked(row.target, results)
    if results.budget.want == "smallest":
        return measured and here
    return measured and here and _trusted(row)


def _trusted(row: Row) -> bool:
    # The comparison of runtimes may end undecided near 1; what must be sure is the compression's own.
    return row.timing in TRUSTED and row.timing_today not in ("", "too noisy")


def _gain(row: Row, results: Results) -> float:
    """Return how many times better than the baseline a row is in what the budget wants; 1 if not surely better."""
    if results.budget.want == "smallest":
        smaller = _smaller(row, results)
        return smaller if smaller > 1.01 else 1.0
    if results.budget.target:
        return row.speedup.value if row.speedup and row.timing == "faster" else 1.0
    return row.speedup_today.value if row.speedup_today and row.timing_today == "faster" else 1.0


def _rank(row: Row, results: Results) -> tuple[float, float]:
    """Return what the best of the better rows has most of; speed decides between files of one size."""
    speed = row.speedup_today.value if row.speedup_today else 0.0
    return (-float(row.size_bytes or 0), speed) if results.budget.want == "smallest" else (_gain(row, results), speed)


def _smaller(row: Row, results: Results) -> float:
    before = results.row(BASELINE, row.target).size_bytes
    return before / row.size_bytes if before and row.size_bytes else 1.0


def _claim(row: Row, results: Results) -> str:
    """Return which variant, how much smaller, how much faster where, and what it cost, without a full stop."""
    where = _named(results, row.target)
    return f"{row.variant} on {where} is {_size_text(row, results)} and {_speed_text(row)}, {_cost(row, results)}"


def _named(results: Results, target: str) -> str:
    """Return a place as a sentence about its machine needs it: without the machine, if that is named before."""
    return str(Place.parse(target).target) if len(results.machines) > 1 else target


def _size_text(row: Row, results: Results) -> str:
    smaller = _smaller(row, results)
    if 0.99 < smaller < 1.01:
        return "as large on disk"
    before = results.row(BASELINE, row.target).size_bytes or 0
    sizes = f"({formats.size(before)} to {formats.size(row.size_bytes or 0)})"
    return (
        f"{formats.times(smaller)} smaller {sizes}"
        if smaller > 1
        else f"{formats.times(1 / smaller)} as large on disk {sizes}"
    )


def _speed_text(row: Row) -> str:
    if not _trusted(row) or row.speedup_today is None:
        return "of a speed that the timing cannot tell"
    speed = row.speedup_today
    if row.timing_today == "same":
        return "as fast as PyTorch today"
    if row.timing_today == "undecided":
        return f"nearly as fast as PyTorch today ({formats.times(speed.value)} {formats.interval(speed)})"
    if row.timing_today == "slower":
        return f"{formats.times(1 / speed.value)} slower than PyTorch today"
    return f"{formats.times(speed.value)} {formats.interval(speed)} faster than PyTorch today"


def _cost(row: Row, results: Results) -> str:
    difference = row.difference
    if difference is None:
        return f"at an unknown cost in {results.metric}"
    value = formats.change(difference.value, is_fraction=results.is_fraction)
    return f"at a change in {results.metric} of {value} {formats.interval(difference, is_fraction=results.is_fraction)}"


def _budget(results: Results) -> str:
    drop = results.budget.accuracy_drop
    return formats.points(drop) if results.is_fraction else f"{drop:g}"


def _closest(row: Row, kind: str, results: Results) -> str:
    if kind == "cannot tell":
        return (
            f"No variant is surely within the budget of {_budget(results)}. The closest: {_claim(row, results)}; "
            f"the interval reaches beyond the budget, because the test set is too small for it. {_needed(row, results)}"
        )
    return f"No variant is within the budget of {_budget(results)}. The closest: {_claim(row, results)}."


def _needed(row: Row, results: Results) -> str:
    """Return how many test examples would tell whether `row` keeps the budget, were its change to stay as it is."""
    record = results.measured[row.target]
    examples = next(len(m.accuracy.scores) for m in record.measurements if m.variant == row.variant and m.accuracy)
    difference = row.difference
    if difference is None or difference.value <= -results.budget.accuracy_drop:
        return "More test examples would narrow it."
    # Intervals narrow with the square root of the number of examples.
    ratio = (difference.value - difference.low) / (difference.value + results.budget.accuracy_drop)
    return f"About {math.ceil(examples * ratio**2 / 100) * 100:,} examples would tell; it has {examples:,}."


def _nothing(results: Results) -> str:
    if not any(row.state == "measured" and row.variant != BASELINE for row in results.rows):
        return "There is no verdict: no variant was measured."
    where = f" on {results.budget.target}" if results.budget.target else ""
    return f"There is no verdict: no timing{where} was steady enough to trust. Run again on a quieter machine."


def _saturation_remark(results: Results) -> tuple[str, ...]:
    """Return a sentence for each target with variants whose int8 accumulators saturate."""
    remarks = []
    for target, record in results.measured.items():
        names = [m.variant for m in record.measurements if m.integers and m.integers.saturated]
        if names:
            remarks.append(
                f"On {results.where(target)}, int8 accumulation saturates on this CPU in {', '.join(names)}: results "
                "are less accurate than the model intends and differ on CPUs with VNNI."
            )
    return tuple(remarks)


def _runtime_remark(results: Results, rows: Sequence[Row]) -> tuple[str, ...]:
    """Return a sentence where changing the runtime alone beats every compression, so that nobody credits the latter."""
    if results.budget.want != "fastest" or results.budget.target:
        return ()
    plain = [r for r in results.rows if r.variant == BASELINE and r.timing_today == "faster" and r.speedup_today]
    speeds = {row.target: row.speedup_today.value for row in plain if row.speedup_today}
    kept = [r.speedup_today.value for r in rows if r.speedup_today and r.accuracy_verdict != "over budget"]
    if not speeds or max(speeds.values()) <= max(kept, default=1.0):
        return ()
    target = max(speeds, key=lambda name: speeds[name])
    where = _named(results, target)
    return (f"The unchanged model on {where} is faster still: {formats.times(speeds[target])} PyTorch today.",)


def _noise_remark(results: Results) -> tuple[str, ...]:
    """Return a sentence about variants that were passed over because nothing can be said of their speed."""
    noisy = [
        f"{row.variant} on {_named(results, row.target)}"
        for row in results.rows
        if row.timing_today == "too noisy" and row.accuracy_verdict == "within budget" and not row.intermediate
        if _asked(row.target, results)
    ]
    if not noisy or results.budget.want == "smallest":
        return ()
    listed = ", ".join(noisy)
    return (f"Passed over, because the machine was too noisy to time them: {listed}. Run again when it is quiet.",)


def _class_remark(row: Row, results: Results) -> tuple[str, ...]:
    """Return a sentence about classes that lose surely more than the budget, although the mean of all does not."""
    record = results.measured.get(row.target)
    accuracy = next((m.accuracy for m in record.measurements if m.variant == row.variant), None) if record else None
    drop, shares = results.budget.accuracy_drop, results.is_fraction
    lost = [
        f"{one.name} to {formats.score(one.mean.value, is_fraction=shares)} of "
        f"{formats.counted(one.examples, 'example')}"
        for one in (accuracy.classes if accuracy else ())
        if one.difference and one.difference.high < -drop
    ]
    return (f"But {row.variant} loses more than the budget on the class {', '.join(lost)}.",) if lost else ()


def _export_remark(results: Results) -> tuple[str, ...]:
    """Return a sentence where the unchanged model's file is slower than the module it was made from."""
    slower = [
        f"{_named(results, target)} ({formats.times(record.runtime.speedup.value)})"
        for target, record in results.measured.items()
        if record.runtime and record.runtime.verdict == "slower"
    ]
    if not slower or results.budget.want != "fastest":
        return ()
    return (
        f"Before any compression, the model's file is slower than your module in PyTorch today on {', '.join(slower)}.",
    )


def _drift_remark(results: Results) -> tuple[str, ...]:
    """Return a sentence where the module itself took other times beside one target than beside another."""
    times = {target: evidence.today_ms(record) for target, record in results.measured.items()}
    known = {target: one.value for target, one in times.items() if one}
    if not known or max(known.values()) <= DRIFT * min(known.values()):
        return ()
    said = ", ".join(f"{formats.milliseconds(ms)} beside {_named(results, target)}" for target, ms in known.items())
    return (
        f"The machine's speed changed between targets: your module took {said}. Speed-ups hold, because both took "
        "turns; latencies of different targets should not be compared.",
    )


def _failure_remark(results: Results) -> tuple[str, ...]:
    names = [name for name in results.names if name != BASELINE]
    said = []
    for state, verb in (("failed", "failed"), ("not run", "not measured")):
        rows = [row for row in results.rows if row.state == state and row.variant != BASELINE and not row.intermediate]
        failed: dict[str, list[Row]] = {}
        for row in rows:
            failed.setdefault(row.variant, []).append(row)
        if failed:
            asked = [name for name in names if not results.row(name, results.targets[0]).intermediate]
            was = "was " if state == "not run" and len(failed) == 1 else "were " if state == "not run" else ""
            listed = "; ".join(_by_cause(results, failed))
            said.append(f"{len(failed)} of {formats.counted(len(asked), 'variant')} {was}{verb}: {listed}.")
    return tuple(said)


def _by_cause(results: Results, failed: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yield each cause once, behind the variants that it stopped."""
    causes: dict[str, list[str]] = {}
    for name, rows in failed.items():
        where = (
            "" if len(rows) == len(results.targets) else f" on {', '.join(results.where(row.target) for row in rows)}"
        )
        cause = rows[0].reason.strip().splitlines()[0].rstrip(".")
        causes.setdefault(cause, []).append(f"{name}{where}")
    for cause, names in causes.items():
        yield f"{', '.join(names)} ({cause if len(cause) <= 160 else cause[:157] + '...'})"
