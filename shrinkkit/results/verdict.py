"""The conclusion of a run: the best variant within the budget in one sentence, and remarks that qualify it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shrinkkit.core import estimate, evidence
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.target import Place
from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, Statement
from shrinkkit.results.results import CONCLUSIVE, Results, Row

DRIFT = 1.2
"""Ratio of the latencies of the user's module on two targets from which on a remark says that they differ."""
BUSY = 0.2
"""Cores used by other processes from which on they are named as the cause of a noisy timing."""
TONES = {"within budget": "good", "cannot tell": "warning", "over budget": "bad", "none": "warning"}
"""Of the kinds of a verdict."""
KINDS = {"within budget": "within budget", "cannot tell": "inconclusive", "over budget": "over budget"}
"""The kinds of a verdict in words, as are the verdicts on accuracy."""


@dataclass(frozen=True, repr=False)
class Verdict(Rich):
    """The conclusion of a report, and its row."""

    headline: str
    """One sentence."""
    remarks: tuple[str, ...]
    """Sentences that qualify the headline: what the runtime alone gives, what failed."""
    kind: str
    """`within budget`, `cannot tell`, `over budget`, or `none`."""
    row: Row | None

    @property
    def sentence(self) -> str:
        """The headline and the remarks, as one text."""
        return " ".join([self.headline, *self.remarks])

    def shown(self) -> Shown:
        """Return the headline with its remarks."""
        label = "Summary" + ("" if self.kind == "none" else f": {KINDS[self.kind]}")
        return Statement(self.headline, self.remarks, TONES[self.kind], label)


def decide(results: Results) -> Verdict:
    """Return the best variant under the study's budget, or that there is none.

    Only rows with a conclusive timing are considered, and only a variant whose entire confidence interval of the
    change in accuracy keeps the budget is within it. Each machine has its verdict; the headline is that of
    the run's own machine, unless only others measured the budget's target.
    """
    everywhere = {machine: results.of(machine) for machine in results.machines}
    parts = {name: part for name, part in everywhere.items() if any(_in_budget(at, part) for at in part.targets)}
    chosen = next((name for name, part in parts.items() if _has_figures(part)), next(iter(parts), ""))
    verdict = _of_machine(parts.get(chosen, results))
    remarks = [*results.task_notes, *_saturation(results), *verdict.remarks, *_failures(results)]
    remarks += [f"On {name}: {_of_machine(part).sentence}" for name, part in parts.items() if name != chosen]
    where = f"On {chosen}: " if chosen and len(results.machines) > 1 else ""
    return replace(verdict, headline=where + verdict.headline, remarks=tuple(remarks))


def _in_budget(target: str, results: Results) -> bool:
    return results.budget.target in (None, _target(target))


def _target(place: str) -> str:
    return str(Place.parse(place).target)


def _has_figures(part: Results) -> bool:
    return any(r.state == "measured" and r.variant != BASELINE and _in_budget(r.target, part) for r in part.rows)


def _of_machine(results: Results) -> Verdict:
    rows = [row for row in results.rows if _eligible(row, results)]
    remarks = (*_runtime(results, rows), *_export(results), *_drift(results), *_noise(results))
    if not rows:
        return Verdict(_no_conclusion(results), remarks, "none", None)
    better = [row for row in rows if _gain(row, results) > 1]
    for kind in ("within budget", "cannot tell", "over budget"):
        candidates = [row for row in better if row.accuracy_verdict == kind]
        if candidates and kind == "within budget":
            best = max(candidates, key=lambda row: _rank(row, results))
            headline = f"{_claim(best, results)}. Within the budget of {results.budget_text()}."
            return Verdict(headline, (*_classes(best, results), *remarks), kind, best)
        if candidates:
            best = max(candidates, key=lambda r: (r.gain.low if r.gain else 0.0, _gain(r, results)))
            return Verdict(_closest(best, kind, results), remarks, kind, best)
    adjective = "faster" if results.budget.want == "fastest" else "smaller"
    return Verdict(f"No variant is {adjective} than the original model; keep the baseline.", remarks, "none", None)


def _eligible(row: Row, results: Results) -> bool:
    if row.variant == BASELINE or row.intermediate or row.state != "measured" or not _in_budget(row.target, results):
        return False
    known = row.difference is not None and row.size_bytes is not None
    return known and (results.budget.want == "smallest" or _is_timed(row))


def _is_timed(row: Row) -> bool:
    # The comparison of runtimes may be inconclusive near 1; the compression's own must not be.
    return row.timing in CONCLUSIVE and row.timing_today not in ("", "too noisy")


def _gain(row: Row, results: Results) -> float:
    """Return how many times better than the baseline a row is in what the budget wants; 1 if not surely better."""
    if results.budget.want == "smallest":
        smaller = _smaller(row, results)
        return smaller if smaller > 1.01 else 1.0
    ratio, timing = (row.speedup, row.timing) if results.budget.target else (row.speedup_today, row.timing_today)
    return ratio.value if ratio and timing == "faster" else 1.0


def _rank(row: Row, results: Results) -> tuple[float, float]:
    """Return the key by which the best of the better rows is the largest; speed decides between equal sizes."""
    speed = row.speedup_today.value if row.speedup_today else 0.0
    return (-float(row.size_bytes or 0), speed) if results.budget.want == "smallest" else (_gain(row, results), speed)


def _smaller(row: Row, results: Results) -> float:
    before = results.row(BASELINE, row.target).size_bytes
    return before / row.size_bytes if before and row.size_bytes else 1.0


def _claim(row: Row, results: Results) -> str:
    """Return speed-up, size and change of accuracy of a variant, without a full stop."""
    speed = "speed-up inconclusive"
    if row.speedup_today and _is_timed(row):
        speed = formats.speedup(row.speedup_today, row.timing_today, noun=" speed-up") + " over PyTorch"
    change = "unknown"
    if row.difference:
        change = formats.change(row.difference.value, is_fraction=results.is_fraction)
        change = formats.with_ci(change, row.difference, is_fraction=results.is_fraction)
    return f"{_where(row, results)}: {speed}, {_size(row, results)}, {results.metric_title} {change}"


def _where(row: Row, results: Results) -> str:
    return f"{row.variant} on {_named(results, row.target)}"


def _named(results: Results, target: str) -> str:
    """Return a place as a sentence names it: without the machine, if that is named before."""
    return _target(target) if len(results.machines) > 1 else target


def _size(row: Row, results: Results) -> str:
    smaller = _smaller(row, results)
    if 0.99 < smaller < 1.01:
        return "same file size"
    factor = f"{formats.times(smaller)} smaller" if smaller > 1 else f"{formats.times(1 / smaller)} larger"
    before = results.row(BASELINE, row.target).size_bytes or 0
    return f"{factor} ({formats.size(before)} \N{RIGHTWARDS ARROW} {formats.size(row.size_bytes or 0)})"


def _closest(row: Row, kind: str, results: Results) -> str:
    if kind == "over budget":
        return f"No variant is within the budget of {results.budget_text()}. Closest: {_claim(row, results)}."
    return (
        f"No variant is surely within the budget of {results.budget_text()}. Closest: "
        f"{_claim(row, results)}; its confidence interval extends beyond the budget. {_needed(row, results)}"
    )


def _needed(row: Row, results: Results) -> str:
    """Return how many test examples would be enough for a conclusion, if the change stays as it is."""
    found = [results.measurement(one) for one in (results.row(BASELINE, row.target), row)]
    before, after = (one.accuracy if one else None for one in found)
    drop, count = results.budget.accuracy_drop, None
    if before and after and row.gain and row.gain.value > -drop:
        better, bounds = after.higher_is_better, after.bounds
        count = estimate.needed(before.sample, after.sample, drop, higher_is_better=better, bounds=bounds)
    if not (count and after and row.gain):
        return "More test examples would narrow it."
    shown = formats.percent(-row.gain.low).replace("%", "points") if results.is_fraction else f"{-row.gain.low:.2g}"
    step = 10 if count < 1000 else 100
    return (
        f"{after.examples:,} test examples can show no drop below {shown}; about "
        f"{math.ceil(count / step) * step:,} would be enough."
    )


def _no_conclusion(results: Results) -> str:
    if not any(row.state == "measured" and row.variant != BASELINE for row in results.rows):
        return "No conclusion: no variant was measured."
    compared = [(m.latency, r) for r in results.measured.values() for m in r.measurements if m.latency]
    used, cores = max(
        ((c.disturbance.other_cores or 0.0, record.environment.cores) for c, record in compared), default=(0.0, 0)
    )
    if used >= BUSY:
        return f"No conclusion: other processes used {used:.1f} of {cores} cores. Stop them, or use `--threads 1`."
    where = f" on {results.budget.target}" if results.budget.target else ""
    return f"No conclusion: the timings{where} were too noisy. Run again on a quieter machine."


def _saturation(results: Results) -> Iterator[str]:
    """Yield a remark for each target with variants whose int8 accumulators saturate."""
    for target, record in results.measured.items():
        if names := [m.variant for m in record.measurements if m.integers and m.integers.saturated]:
            yield (
                f"On {results.where(target)}, int8 accumulation saturates on this CPU in {', '.join(names)}: results "
                "are less accurate than the model intends and differ on CPUs with VNNI."
            )


def _runtime(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a remark where changing only the runtime is faster than every compressed variant."""
    if results.budget.want != "fastest" or results.budget.target:
        return
    plain = [r for r in results.rows if r.variant == BASELINE and r.timing_today == "faster" and r.speedup_today]
    best = max(plain, key=lambda r: r.speedup_today.value if r.speedup_today else 0.0, default=None)
    others = [r.speedup_today.value for r in rows if r.speedup_today and r.accuracy_verdict != "over budget"]
    if best and best.speedup_today and best.speedup_today.value > max(others, default=1.0):
        speed = formats.speedup(best.speedup_today, best.timing_today, noun=" speed-up")
        yield f"The unchanged model on {_named(results, best.target)} is faster still: {speed} over PyTorch."


def _noise(results: Results) -> Iterator[str]:
    """Yield a remark about variants that were left out because their timing is too noisy."""
    names = [
        _where(row, results)
        for row in results.rows
        if row.timing_today == "too noisy" and row.accuracy_verdict == "within budget" and not row.intermediate
        if _in_budget(row.target, results)
    ]
    if names and results.budget.want != "smallest":
        yield f"Left out because the machine was too noisy: {', '.join(names)}. Run again on a quieter machine."


def _classes(row: Row, results: Results) -> Iterator[str]:
    """Yield a remark about classes that surely lose more than the budget, although the mean does not."""
    measurement = results.measurement(row)
    accuracy = measurement.accuracy if measurement else None
    classes = [
        f"{each.name} ({formats.score(each.mean.value, is_fraction=results.is_fraction)} of "
        f"{formats.counted(each.examples, 'example')})"
        for each in (accuracy.classes if accuracy else ())
        if (change := estimate.gain(each.difference, higher_is_better=results.higher_is_better))
        and change.high < -results.budget.accuracy_drop
    ]
    if classes:
        yield f"But {row.variant} loses more than the budget on the class {', '.join(classes)}."


def _export(results: Results) -> Iterator[str]:
    """Yield a remark where the unchanged model's file is slower than the module it was made from."""
    slower = [
        f"{_named(results, target)} ({formats.speedup(record.runtime.speedup, record.runtime.verdict, ci=False)})"
        for target, record in results.measured.items()
        if record.runtime and record.runtime.verdict == "slower"
    ]
    if slower and results.budget.want == "fastest":
        yield f"Without compression, the exported model is slower than your PyTorch module on {', '.join(slower)}."


def _drift(results: Results) -> Iterator[str]:
    """Yield a remark where the latency of the user's module differs between the benchmarks of two targets."""
    latencies = {target: evidence.today_ms(record) for target, record in results.measured.items()}
    times_ms = {target: latency.value for target, latency in latencies.items() if latency}
    if times_ms and max(times_ms.values()) > DRIFT * min(times_ms.values()):
        listed = ", ".join(f"{formats.milliseconds(ms)} ({_named(results, at)})" for at, ms in times_ms.items())
        yield (
            f"The machine's speed changed between targets: your module took {listed}. Speed-ups are valid, because "
            "models are timed interleaved; do not compare latencies of different targets."
        )


def _failures(results: Results) -> Iterator[str]:
    if not results.targets:
        return
    variants = [n for n in results.names if n != BASELINE and not results.row(n, results.targets[0]).intermediate]
    for state, verb in (("failed", "failed"), ("not run", "not measured")):
        failed: dict[str, list[Row]] = {}
        for row in results.rows:
            if row.state == state and row.variant in variants:
                failed.setdefault(row.variant, []).append(row)
        if failed:
            causes = "; ".join(_by_cause(results, failed))
            yield f"{len(failed)} of {formats.counted(len(variants), 'variant')} {verb}: {causes}."


def _by_cause(results: Results, failed: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yield each cause once, after the variants that it stopped."""
    causes: dict[str, list[str]] = {}
    for name, rows in failed.items():
        places = ", ".join(results.where(row.target) for row in rows)
        cause = rows[0].reason.strip().splitlines()[0].rstrip(".")
        causes.setdefault(cause, []).append(name if len(rows) == len(results.targets) else f"{name} on {places}")
    for cause, names in causes.items():
        yield f"{', '.join(names)} ({cause if len(cause) <= 160 else cause[:157] + '...'})"
