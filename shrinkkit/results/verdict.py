"""The conclusion of a run: the best variant within the budget in one sentence, and warnings grouped by cause."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shrinkkit.core import estimate, evidence, robustness
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.target import Place
from shrinkkit.display import formats
from shrinkkit.display.formats import TIMES
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Cause, Several, Shown, Statement, Warnings
from shrinkkit.errors import options
from shrinkkit.results.results import CONCLUSIVE, Results, Row
from shrinkkit.runtimes import registry

DRIFT = 1.2
"""Ratio of the latencies of the user's module on two targets from which on a remark says that they differ."""
_SAMPLES = "Timing samples"
BUSY = 0.2
"""Cores used by other processes from which on they are named as the cause of a noisy timing."""
TONES = {"within budget": "good", "cannot tell": "warning", "over budget": "bad", "none": "warning"}
"""Of the kinds of a verdict."""
KINDS = {"within budget": "within budget", "cannot tell": "inconclusive", "over budget": "over budget"}
"""The kinds of a verdict in words, as are the verdicts on accuracy."""
RUNNERS_UP = 3
"""Variants named after the best one at most."""


@dataclass(frozen=True, repr=False)
class Verdict(Rich):
    """The conclusion of a report, its row, and the next best ones."""

    headline: str
    """One sentence, or two with what to do."""
    remarks: tuple[str, ...]
    """Sentences about the whole run: what the task was given without, the runtime alone, other machines."""
    warnings: tuple[Cause, ...]
    kind: str
    """`within budget`, `cannot tell`, `over budget`, or `none`."""
    row: Row | None
    runners_up: tuple[Row, ...] = ()
    """The next best rows within the budget."""

    @property
    def sentence(self) -> str:
        """The headline, the remarks and all warnings, as one text."""
        return " ".join([self.headline, *self.remarks, *(text for cause in self.warnings for text in cause.sentences)])

    def statement(self) -> Statement:
        """Return the headline with its remarks."""
        label = "Summary" + ("" if self.kind == "none" else f": {KINDS[self.kind]}")
        return Statement(self.headline, self.remarks, TONES[self.kind], label)

    def shown(self) -> Shown:
        """Return the headline with its remarks, and the warnings by cause."""
        return Several((self.statement(), *([Warnings(self.warnings)] if self.warnings else [])))


def decide(results: Results) -> Verdict:
    """Return the best variant under the study's budget, or that there is none.

    Only rows with a conclusive timing are considered, and only a variant whose entire confidence interval of the
    change in accuracy keeps the budget is within it. Each machine has its verdict; the headline is that of
    the run's own machine, unless only others measured the budget's target.
    """
    everywhere = {machine: results.of(machine) for machine in results.machines}
    parts = {name: part for name, part in everywhere.items() if any(_in_budget(at, part) for at in part.targets)}

    def has_figures(part: Results) -> bool:
        return any(r.state == "measured" and r.variant != BASELINE and _in_budget(r.target, part) for r in part.rows)

    chosen = next((name for name, part in parts.items() if has_figures(part)), next(iter(parts), ""))
    verdict = _of_machine(parts.get(chosen, results))
    others = {name: _of_machine(part) for name, part in parts.items() if name != chosen}
    remarks = [*results.task_notes, *verdict.remarks]
    remarks += [f"On {name}: {' '.join([of.headline, *of.remarks])}" for name, of in others.items()]
    warnings = [*_saturation(results), *verdict.warnings]
    warnings += [replace(one, state=f"{one.state} on {name}") for name, of in others.items() for one in of.warnings]
    where = f"On {chosen}: " if chosen and len(results.machines) > 1 else ""
    headline = where + verdict.headline
    return replace(verdict, headline=headline, remarks=tuple(remarks), warnings=(*warnings, *_failures(results)))


def _in_budget(target: str, results: Results) -> bool:
    return results.budget.target in (None, _target(target))


def _target(place: str) -> str:
    return str(Place.parse(place).target)


def _of_machine(results: Results) -> Verdict:
    rows = [row for row in results.rows if _eligible(row, results)]
    remarks = tuple(_runtime(results, rows))
    warnings = (*_export(results), *_drift(results), *_noise(results), *_damaged(results))
    if not rows:
        return Verdict(_no_conclusion(results), remarks, warnings, "none", None)
    better = [row for row in rows if _gain(row, results) > 1]
    for kind in ("within budget", "cannot tell", "over budget"):
        candidates = [row for row in better if row.verdict == kind]
        if candidates and kind == "within budget":
            best, *others = sorted(candidates, key=lambda row: _rank(row, results), reverse=True)
            headline = f"{_claim(best, results)}. Within the budget of {results.budget_text()}."
            warnings = (*_classes(best, results), *warnings)
            return Verdict(headline, remarks, warnings, kind, best, tuple(others[:RUNNERS_UP]))
        if candidates:
            best = max(candidates, key=lambda r: (r.gain.low if r.gain else 0.0, _gain(r, results)))
            return Verdict(_closest(best, kind, results), remarks, warnings, kind, best)
    adjective = "faster" if results.budget.want == "fastest" else "smaller"
    closest = _claim(max(rows, key=lambda row: _rank(row, results)), results)
    headline = f"No variant is {adjective} than the original model; keep the baseline. Closest: {closest}. {_ADVICE}"
    return Verdict(headline, remarks, warnings, "none", None)


_MILDER = "Fine-tune longer, prune less, leave sensitive layers out (`skip`), or allow a larger `budget.accuracy_drop`."
_ADVICE = "The speed-up breakdown shows what each step costs; structured pruning or another runtime may help."


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
    """Return speed-up with its factors, size and change of accuracy of a variant, without a full stop."""
    change = "unknown"
    if row.difference:
        change = formats.change(row.difference.value, is_fraction=results.is_fraction)
        change = formats.with_ci(change, row.difference, is_fraction=results.is_fraction)
    text = f"{_where(row, results)}: {_speed(row, results)}; {size(row, results)}; {results.metric_title} {change}"
    if row.robustness:
        change = formats.change(row.robustness.value, is_fraction=results.is_fraction)
        text += f", on corrupted inputs {formats.with_ci(change, row.robustness, is_fraction=results.is_fraction)}"
    return text


def _speed(row: Row, results: Results) -> str:
    """Return how fast a variant is next to the module in PyTorch, and what compression and runtime contribute."""
    ratio, verdict = row.speedup_today, row.timing_today
    if results.study and results.study.mode == "robust":
        return "not timed"
    if ratio is None or not _is_timed(row):
        return "speed-up inconclusive"
    words = {"faster": " faster than PyTorch", "slower": " the speed of PyTorch"}
    if verdict not in words:
        return formats.speedup(ratio, verdict, noun=" the speed of PyTorch")
    return f"{formats.estimate(ratio, unit=TIMES + words[verdict])}: {', '.join(factors(row, results))}"


def factors(row: Row, results: Results) -> tuple[str, str]:
    """Return what compression and what the runtime with the unchanged model contribute to a variant's speed-up."""
    record = results.measured.get(row.target)
    timed, runtime = record.runtime if record else None, registry.get(row.place.target.runtime)
    title = "the exported file" if runtime.name == "torch" else runtime.title
    alone = _factor(title, timed.speedup if timed else None, timed.verdict if timed else "")
    return _factor("compression", row.speedup, row.timing), alone


def _factor(part: str, ratio: Estimate | None, verdict: str) -> str:
    if ratio is None:
        return f"not timed for {part}"
    if verdict in ("faster", "slower"):
        return f"{formats.rounded(ratio)}{TIMES} from {part}"
    return f"{formats.UNSURE[verdict]} {'from' if verdict == 'same' else 'for'} {part}"


def _where(row: Row, results: Results) -> str:
    return f"{row.variant} on {_named(results, row.target)}"


def _named(results: Results, target: str) -> str:
    """Return a place as a sentence names it: without the machine, if that is named before."""
    return _target(target) if len(results.machines) > 1 else target


def size(row: Row, results: Results) -> str:
    """Return how many times smaller than the baseline's a variant's file is, and both sizes."""
    smaller = _smaller(row, results)
    if 0.99 < smaller < 1.01:
        return "same file size"
    ratio, word = (smaller, "smaller") if smaller > 1 else (1 / smaller, "larger")
    factor = f"{formats.digits(ratio, 2 if ratio >= 2 else 3)}{TIMES} {word}"
    before = results.row(BASELINE, row.target).size_bytes or 0
    return f"{factor} ({formats.size(before)} \N{RIGHTWARDS ARROW} {formats.size(row.size_bytes or 0)})"


def _closest(row: Row, kind: str, results: Results) -> str:
    if kind == "over budget":
        return f"No variant is within the budget of {results.budget_text()}. Closest: {_claim(row, results)}. {_MILDER}"
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
    enough = f"about {math.ceil(count / step) * step:,} would be enough"
    return f"{after.examples:,} test examples can show no drop below {shown}; {enough}."


def _no_conclusion(results: Results) -> str:
    if not any(row.state == "measured" and row.variant != BASELINE for row in results.rows):
        return "No conclusion: no variant was measured. Remove the causes below and run the same command again."
    compared = [(m.latency, r) for r in results.measured.values() for m in r.measurements if m.latency]
    others = [(one.disturbance.other_cores or 0.0, record.environment.cores) for one, record in compared]
    used, cores = max(others, default=(0.0, 0))
    if used >= BUSY:
        return f"No conclusion: other processes used {used:.1f} of {cores} cores. Stop them, or use `--threads 1`."
    where = f" on {results.budget.target}" if results.budget.target else ""
    return f"No conclusion: the timings{where} were too noisy. Run again on a quieter machine."


def _saturation(results: Results) -> Iterator[Cause]:
    """Yield a warning about variants whose int8 accumulators saturate."""
    saturated = {
        results.where(target): names
        for target, record in results.measured.items()
        if (names := [m.variant for m in record.measurements if m.integers and m.integers.saturated])
    }
    if saturated:
        texts = tuple(
            f"On {target}, int8 accumulation saturates on this CPU in {', '.join(names)}: results are less accurate "
            "than the model intends and differ on CPUs with VNNI."
            for target, names in saturated.items()
        )
        yield Cause(sum(map(len, saturated.values())), "int8 file", "with saturation", "Layer report", texts)


def _runtime(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a remark where changing only the runtime is faster than every compressed variant."""
    if results.budget.want != "fastest" or results.budget.target:
        return
    plain = [r for r in results.rows if r.variant == BASELINE and r.timing_today == "faster" and r.speedup_today]
    best = max(plain, key=lambda r: r.speedup_today.value if r.speedup_today else 0.0, default=None)
    others = [r.speedup_today.value for r in rows if r.speedup_today and r.accuracy_verdict != "over budget"]
    if best and best.speedup_today and best.speedup_today.value > max(others, default=1.0):
        speed = formats.estimate(best.speedup_today, unit=f"{TIMES} faster than PyTorch")
        yield f"The unchanged model on {_named(results, best.target)} beats all variants not over budget: {speed}."


def _noise(results: Results) -> Iterator[Cause]:
    """Yield a warning about variants that were left out because their timing is too noisy."""
    within = [r for r in results.rows if r.accuracy_verdict == "within budget" and _in_budget(r.target, results)]
    names = [_where(row, results) for row in within if row.timing_today == "too noisy" and not row.intermediate]
    if names and results.budget.want != "smallest":
        text = f"Left out because the machine was too noisy: {', '.join(names)}. Run again on a quieter machine."
        yield Cause(len(names), "timing", "too noisy", _SAMPLES, (text,))


def _classes(row: Row, results: Results) -> Iterator[Cause]:
    """Yield a warning about classes that surely lose more than the budget, although the mean does not."""
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
        text = f"But {row.variant} loses more than the budget on the class {', '.join(classes)}."
        yield Cause(len(classes), "class score", "over budget", "Changed predictions", (text,))


def _export(results: Results) -> Iterator[Cause]:
    """Yield a warning where the unchanged model's file is slower than the module it was made from."""
    slower = [
        f"{_named(results, target)} ({formats.speedup(record.runtime.speedup, record.runtime.verdict, ci=False)})"
        for target, record in results.measured.items()
        if record.runtime and record.runtime.verdict == "slower"
    ]
    if slower and results.budget.want == "fastest":
        text = f"Without compression, the exported model is slower than your PyTorch module on {', '.join(slower)}."
        yield Cause(len(slower), "runtime", "slower than PyTorch", "Speed-up breakdown", (text,))


def _damaged(results: Results) -> Iterator[Cause]:
    """Yield a warning about variants that are surely worse than the original on some kind of changed input."""
    texts = []
    for target, record in results.robust.items():
        for name, signs in robustness.damaged(record).items():
            if worse := [at for at, sign in signs.items() if sign < 0]:
                texts.append(
                    f"{name} on {results.where(target)} is surely worse than the original on {options(worse, 'and')}."
                )
    if texts:
        yield Cause(len(texts), "variant", "less robust", "Robustness", tuple(texts))
    drop, texts = results.drop_if_corrupted, []
    for target, record in results.robust.items():
        kept = robustness.verdicts(record, drop)
        for name, classes in robustness.damaged_classes(record, drop).items():
            if kept.get(name) != "over budget":
                where = f"{name} on {results.where(target)}"
                texts.append(f"{where} surely loses more than the budget on the class {', '.join(classes)}, corrupted.")
    if texts:
        yield Cause(len(texts), "variant", "less robust on a class", "Robustness", tuple(texts))


def _drift(results: Results) -> Iterator[Cause]:
    """Yield a warning where the latency of the user's module differs between the benchmarks of two targets."""
    latencies = {target: evidence.today_ms(record) for target, record in results.measured.items()}
    times_ms = {target: latency.value for target, latency in latencies.items() if latency}
    if times_ms and max(times_ms.values()) > DRIFT * min(times_ms.values()):
        listed = ", ".join(f"{formats.milliseconds(ms)} ({_named(results, at)})" for at, ms in times_ms.items())
        text = f"The machine's speed changed between targets: your module took {listed}. Speed-ups are valid, because"
        text += " models are timed interleaved; do not compare latencies of different targets."
        yield Cause(1, "change", "of the machine's speed", _SAMPLES, (text,))


def _failures(results: Results) -> Iterator[Cause]:
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
            text = f"{len(failed)} of {formats.counted(len(variants), 'variant')} {verb}: {causes}."
            yield Cause(len(failed), "variant", verb, "Failures and unsupported combinations", (text,))


def _by_cause(results: Results, failed: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yield each cause once, after the variants that it stopped."""
    causes: dict[str, list[str]] = {}
    for name, rows in failed.items():
        places = ", ".join(results.where(row.target) for row in rows)
        cause = rows[0].reason.strip().splitlines()[0].rstrip(".")
        causes.setdefault(cause, []).append(name if len(rows) == len(results.targets) else f"{name} on {places}")
    for cause, names in causes.items():
        yield f"{', '.join(names)} ({cause if len(cause) <= 160 else cause[:157] + '...'})"
