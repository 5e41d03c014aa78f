"""Tables and charts of records, for notebooks and the report. Nothing here measures or decides.

Tables of accuracy are in `accuracy`, those of layers in `layer_profile`.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from urllib.parse import quote

import numpy as np

from shrinkkit.core import estimate, evidence
from shrinkkit.core.measurement import Accuracy, Comparison, Measurement, TargetRecord
from shrinkkit.core.recipe import BASELINE, TASKS, relocated
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.target import Place
from shrinkkit.core.variant import Variant, audit_table, files_table
from shrinkkit.display import cells, formats, tables
from shrinkkit.display.formats import TIMES
from shrinkkit.display.tables import Cell, Command, Heading, Several, Shown, Statement, Table
from shrinkkit.errors import options
from shrinkkit.report import accuracy, figures, layer_profile
from shrinkkit.report.glossary import GLOSSARY
from shrinkkit.results.breakdown import breakdown
from shrinkkit.results.faults import faults
from shrinkkit.results.results import Results, Row
from shrinkkit.results.results import missing as without_figures
from shrinkkit.results.verdict import decide

DELTA, PLUS_MINUS = "\N{GREEK CAPITAL LETTER DELTA}", "\N{PLUS-MINUS SIGN}"
PERCENTILES = {0.5: 1, 0.9: 64, 0.99: 662}
"""Samples from which on a latency percentile may be quoted, by its fraction.

Source: MLPerf Inference, LoadGen's early stopping.
"""
MANY = 20
"""Variants from which on a chart shows only the Pareto-optimal ones."""
_PREDICTIONS = "Changed predictions"
_IN_WORDS = {"cannot tell": "inconclusive: too few examples"}
_TONES = {"broken": "bad", "faulty file": "bad", "failed": "bad", "not run": "bad", "unsupported": "warning"}
_MISSING = {
    "Broken variants": ("broken", "faulty file"),
    "Failures": ("failed", "not run"),
    "Unsupported combinations": ("unsupported",),
}


def title(results: Results) -> Heading:
    """Return the report's heading: the study's name, and what was compressed for which targets."""
    variants = set(results.names) - {BASELINE, *(row.variant for row in results.rows if row.intermediate)}
    where = options(results.targets, "and") if results.targets else "no target"
    if len(results.machines) > 1:
        targets = {name: [_target(at) for at in results.of(name).targets] for name in results.machines}
        where = "; ".join(f"{name} ({', '.join(names)})" for name, names in targets.items())
    when = f" Started {results.status.started[:16].replace('T', ' ')} UTC." if results.status else ""
    count = formats.counted(len(variants), "variant")
    return Heading(results.name, f"{count} of {results.task}, on {where}.{when}", level=1)


def _target(place: str) -> str:
    return str(Place.parse(place).target)


def missing(results: Results) -> Several:
    """Return broken variants, failures and unsupported combinations with their reasons, then notes."""
    parts: list[Shown] = []
    for caption, states in _MISSING.items():
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for (state, name, reason), at in (faults(results) | without_figures(results)).items():
            if state in states:
                grouped.setdefault((state, ", ".join(at), reason), []).append(name)
        rows: list[tables.Row] = [
            {"variants": Cell(", ".join(names), state, _TONES[state]), "targets": at, "reason": reason}
            for (state, at, reason), names in grouped.items()
        ]
        if rows:
            count = sum(map(len, grouped.values()))
            parts.append(tables.table(f"{caption} ({count})", rows, text=("targets", "reason"), folded=False))
    parts += [Statement(note, tone="warning") for note in results.notes]
    parts += [Statement(note) for note in (results.study.notes if results.study else ())]
    return Several(tuple(parts) or (Statement("None: every variant was measured on every target."),))


def tradeoff(results: Results) -> Several:
    """Return the chart of speed-up and change of the score, under a heading that says what the score is."""
    line = "The best variants are on the right, entirely above the dashed line, and small."
    title = f"{'Fidelity' if results.is_fidelity else 'Accuracy'} vs. speed"
    return Several((Heading(title, line, level=2), figures.tradeoff(results)))


def variants(results: Results) -> Shown:
    """Return one table of all variants on all targets; each row unfolds into its details."""
    if not results.targets:
        return Statement("No target was measured.", tone="warning")
    verdict, rows, details, notes = decide(results), [], [], []
    best = verdict.row if verdict.kind == "within budget" else None
    for target in results.targets:
        measured = [row for row in results.rows if row.target == target]
        own = _user_module(results, target)
        rows += [*own, *(_variant(row, results, chosen=row == best) for row in measured)]
        details += [*(() for _ in own), *(_details(row, results) for row in measured)]
        notes += [f"{results.where(target)}{text}." for text in [_conditions(results, target)] if text]
        signs = results.measured[target].notes if target in results.measured else ()
        notes += [f"Contention during the benchmark on {results.where(target)}: {'; '.join(signs)}."] if signs else []
        slow = ((m.variant, note) for row in measured if (m := results.measurement(row)) for note in m.notes)
        notes += [f"{name} on {results.where(target)}: {note}" for name, note in slow if _limits(note)]
    note = " ".join((*notes, *dict.fromkeys(_dense_zeros(results.rows))))
    table = tables.table("Variants and targets", rows, note, text=("target", "result"), folded=False)
    return replace(table, facet="target", details=tuple(details))


def _limits(note: str) -> bool:
    return note.startswith(("Slow: ", "Scored on "))


def _variant(row: Row, results: Results, *, chosen: bool) -> tables.Row:
    aside = "best" if chosen else "intermediate" if row.intermediate else ""
    name = Cell(row.variant, aside, "good" if chosen else "quiet" if row.intermediate else "")
    where = results.where(row.target)
    if row.state != "measured":
        result = Cell(f"{row.state}: {row.reason}", tone=_TONES[row.state], wide=True)
        return {"variant": name, "target": where, "result": result}
    verdict, robust = (_IN_WORDS.get(one, one) for one in (row.accuracy_verdict, row.robustness_verdict))
    corrupted = {}
    if results.robust:
        title = f"{DELTA} on corrupted inputs{' (pts)' if results.is_fraction else ''}"
        corrupted[title] = cells.change(row.robustness, is_fraction=results.is_fraction, verdict=robust or None)
    unit = " (pts)" if results.is_fraction else ""
    change = cells.change(row.difference, is_fraction=results.is_fraction, verdict=verdict)
    # What decides comes first: a phone shows three columns before it scrolls.
    return {
        "variant": name,
        "target": where,
        "vs PyTorch": _speedup(row, row.speedup_today, row.timing_today),
        f"{DELTA} {results.metric}{unit}": change,
        "file size": replace(cells.size(row.size_bytes), aside=f"{formats.size(row.compressed_bytes or 0)} compressed"),
        "vs FP32, same runtime": _speedup(row, row.speedup, row.timing),
        results.metric_title: cells.score(row.accuracy, is_fraction=results.is_fraction),
        **corrupted,
        **_changed(row, results),
        "latency / batch": cells.latency(row.latency_ms),
        "sparsity": formats.percent(row.sparsity or 0),
        "parameters": cells.count(row.parameters),
        "MACs": cells.count(row.macs),
    }


def _changed(row: Row, results: Results) -> tables.Row:
    """Return the share of examples whose answer is another one than the baseline's, right or wrong."""
    measurement = results.measurement(row)
    accuracy = measurement.accuracy if measurement else None
    if accuracy is None or accuracy.agreement is None:
        return {}
    if row.variant == BASELINE:
        return {"changed answers": replace(cells.REFERENCE, key="0")}
    changed = round((1 - accuracy.agreement) * accuracy.examples)
    moved = accuracy.regressions + accuracy.improvements
    parts = [f"{accuracy.regressions:,} worse", f"{accuracy.improvements:,} better"]
    parts += [f"{changed - moved:,} wrong to wrong"] if changed > moved else []
    return {"changed answers": Cell(formats.percent(1 - accuracy.agreement), ", ".join(parts), key=f"{changed:g}")}


def _details(row: Row, results: Results) -> tuple[tuple[str, Cell], ...]:
    """Return why a measured row is slow, its changed predictions, and links to its layers, timing and file."""
    measurement, variant = results.measurement(row), results.variants.get(row.variant)
    if row.state != "measured" or measurement is None or variant is None:
        return ()
    record, where = results.measured[row.target], results.where(row.target)
    causes = layer_profile.causes(measurement, variant, record)
    pairs = [("Slow because", Cell(" ".join(causes)))] if causes else []
    if (scored := measurement.accuracy) and scored.difference and not scored.resampled:
        text = f"{scored.regressions:,} worse, {scored.improvements:,} better, of {scored.examples:,} examples"
        pairs.append(("Predictions", Cell(text, href=f"#{tables.anchor(_PREDICTIONS)}")))
    if measurement.layers:
        total = formats.milliseconds(sum(time.ms for time in measurement.layers))
        pairs.append(("Latency by layer", Cell(f"{total} in all layers", href=_section("Per-layer latency", where))))
    if row.variant != BASELINE:
        report = layer_report(variant)
        pairs.append(("Layers", Cell(report.caption.removeprefix(f"{variant.name}: "), href=f"#{report.key}")))
    if timed := measurement.latency:
        blocks = formats.counted(len(timed.control_samples_ms) // 2, "block")
        text = "; ".join([f"{blocks}, noise floor {PLUS_MINUS}{formats.percent(timed.noise_floor)}", *timed.warnings])
        pairs.append(("Timing", Cell(text, href=_section("Timing samples", where))))
    texts = [
        f"{p.workload}: {formats.estimate(p.latency_ms, unit=' ms')}, {cells.rate(p.throughput).text} {p.unit}"
        for p in record.sweep
        if p.workload and p.variant == row.variant and p.latency_ms and p.throughput
    ]
    if texts:
        pairs.append(("Workloads", Cell("; ".join(texts), href=_section("Tail latency, memory and throughput", where))))
    folder = RunFolder("").variant(row.variant)
    for file in (file for file in variant.files if file.runtime == row.place.target.runtime):
        pairs.append(("File", Cell(file.path, href=quote((folder / file.path).as_posix()))))
    return tuple(pairs)


def _section(heading: str, part: str) -> str:
    return f"#{tables.anchor(heading)}-{tables.anchor(part)}"


def _speedup(row: Row, ratio: estimate.Estimate | None, verdict: str) -> Cell:
    missing = ratio is None and row.variant != BASELINE
    return Cell("not timed", tone="warning") if missing else cells.speedup(ratio, verdict)


def _user_module(results: Results, target: str) -> tuple[tables.Row, ...]:
    """Return the row of the user's own module, the reference of the first speed-up."""
    record = results.measured.get(target)
    latency_ms = evidence.today_ms(record) if record else None
    if record is None or record.runtime is None or latency_ms is None:
        return ()
    form = {"eager": "eager PyTorch", "compiled": "torch.compile"}.get(record.runtime.conditions.form, "")
    row: tables.Row = {"variant": Cell("your module", form), "target": results.where(target)}
    return ({**row, "vs PyTorch": cells.speedup(None, ""), "latency / batch": cells.latency(latency_ms)},)


def _conditions(results: Results, target: str) -> str:
    record, baseline = results.measured.get(target), results.row(BASELINE, target)
    if record is None or baseline.latency_ms is None:
        return ""
    compared = [c.conditions for c in (record.runtime, *(m.latency for m in record.measurements)) if c]
    text = f": unchanged model {formats.milliseconds(baseline.latency_ms.value)}"
    if compared:
        text += f", batch size {compared[0].batch_size}, {formats.counted(compared[0].threads, 'thread')}"
    return text


def _dense_zeros(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a sentence about each sparse variant whose file did not shrink."""
    before = {row.target: row.size_bytes for row in rows if row.variant == BASELINE}
    for row in rows:
        if row.sparsity and row.sparsity > 0.2 and row.size_bytes and row.size_bytes > 0.9 * (before[row.target] or 0):
            zeros = formats.percent(row.sparsity)
            yield f"{row.variant}: {zeros} of the weights are zero, but files store zeros like other numbers."


def objectives(row: Row, results: Results) -> tables.Row:
    """Return the cells of what a Pareto-optimal row is optimal in, and of its target."""
    change = cells.change(row.difference, is_fraction=results.is_fraction)
    speed, size = cells.speedup(row.speedup_today, row.timing_today), cells.size(row.size_bytes)
    target = str(row.place.target)
    return {"target": target, "vs PyTorch": speed, "file size": size, f"{DELTA} {results.metric_title}": change}


def speedup_breakdown(results: Results) -> Shown:
    """Return the factors of each variant's speed-up as a chart."""
    broken_down = (row for row in breakdown(results) if row.variant != BASELINE or row.factors)
    rows = [replace(row, target=results.where(row.target)) for row in broken_down]
    if not rows:
        return Statement("No speed-up was measured.", tone="warning")
    names = {BASELINE, *figures.named(results)}
    shown = [row for row in rows if row.variant in names] if len({r.variant for r in rows}) > MANY else rows
    chart = figures.breakdown(shown, [results.where(target) for target in results.targets])
    rest = f" Pareto-optimal variants only; all {len(rows)} breakdowns are in results.json."
    return replace(chart, caption=chart.caption + rest * (shown is not rows))


def predictions(results: Results) -> Several:
    """Return the regressions of all variants, then for each target further metrics and scores by class."""
    by_target = {
        results.where(target): {m.variant: m.accuracy for m in record.measurements if m.accuracy}
        for target, record in results.measured.items()
    }
    if not by_target:
        return Several((Statement("No target was measured.", tone="warning"),))
    parts: list[Shown] = [accuracy.regressions(by_target)]
    for where, accuracies in by_target.items():
        parts += [Heading(where), *accuracy.further(accuracies), accuracy.classes(accuracies)]
    return Several(tuple(parts))


def layer_latency(results: Results) -> Several:
    """Return, for each target, the latency by layer of each variant, and the causes of slow-downs."""
    return _by_target(results, lambda record: (layer_profile.layers(record, results.variants),))


def deployment(results: Results) -> Several:
    """Return, for each target, latency percentiles, memory, and throughput at other batch sizes and threads."""
    names = figures.named(results)
    return _by_target(results, lambda record: (latency_percentiles(record), memory(record), throughput(record, names)))


def _by_target(results: Results, parts: Callable[[TargetRecord], tuple[Shown, ...]]) -> Several:
    shown: list[Shown] = []
    for target, record in results.measured.items():
        where = results.where(target)
        shown += [Heading(where), *parts(replace(record, target=where))]
    return Several(tuple(shown) or (Statement("No target was measured.", tone="warning"),))


def environment(results: Results) -> Several:
    """Return machine and software of each target's benchmark, equal ones once."""
    places: dict[str, list[str]] = {}
    shown: dict[str, Table] = {}
    for target, record in results.measured.items():
        own = record.environment
        key = repr((own.cpu, own.gpu, own.versions, own.variables))
        places.setdefault(key, []).append(results.where(target))
        caption = f"Environment of {' and '.join(places[key])}"
        first = shown.get(key) or own.shown()
        shown[key] = replace(first, caption=caption)
    return Several(tuple(shown.values()) or (Statement("No environment was recorded.", tone="warning"),))


def artifacts(results: Results) -> Several:
    """Return the model files and the executed notebooks."""
    return Several((model_files(results), steps(results)))


def model_files(results: Results) -> Table:
    """Return every model file with its size, SHA-256 and seed."""
    rows: list[tables.Row] = []
    for name, variant in results.variants.items():
        for file in variant.files:
            row: tables.Row = {"variant": name, "file": file.path, "size": cells.size(file.size_bytes)}
            rows.append({**row, "seed": Cell(str(variant.seed), tone="quiet"), "SHA-256": file.sha256})
    note = "Paths are relative to the variant's folder."
    return tables.table(f"Model files ({len(rows)})", rows, note, text=("file", "SHA-256"))


def steps(results: Results) -> Shown:
    """Return the executed notebooks with their states and links."""
    if results.status is None:
        return Statement("The notebooks were run one by one; there is no status.")
    rows: list[tables.Row] = []
    for step in (step for step in results.status.steps if step.notebook != "5-report"):
        has_page = step.state in ("done", "cached", "failed") and not step.note
        page = Cell(step.name, href=f"{RunFolder('').steps.name}/{step.name}.html" if has_page else "")
        state = Cell(step.state, tone="bad" if step.state in ("failed", "skipped") else "quiet")
        text = step.error or step.note
        rows.append({"notebook": page, "state": state, "duration": f"{step.duration_s:.1f} s", "error": text})
    return tables.table("Executed notebooks", rows, text=("state", "error"), folded=False)


def commands(results: Results) -> Shown:
    """Return the command that reproduces the run, and those of benchmarks on other machines."""
    if results.status is None:
        return Statement("The notebooks were run one by one; there is no single command.")
    seed = results.study.seed if results.study else 0
    targets = results.study.targets if results.study else results.targets
    named = relocated(results.task, lambda path: PurePath(path).name)
    task = "" if results.task in TASKS else f" --task {shlex.quote(named)}"
    parts = [Command(results.status.command, f"Reproduce the run (seed {seed}):")]
    for name in results.machines:
        if more := [target for target in results.of(name).targets if target not in targets]:
            options = "".join(f" --target {_target(target)}" for target in more)
            command = f"shrinkkit run reports/{results.name} --only benchmark{task}{options}"
            parts.append(Command(command, f"Then on {name}, with this run folder:"))
    return Several(tuple(parts))


def glossary() -> Table:
    """Return the terms of the report with their definitions."""
    return replace(tables.facts("Terms", tuple(GLOSSARY.items())), key="terms")


def files(variant: Variant) -> Table:
    """Return the model files of one variant, and why a runtime has none."""
    return files_table(variant)


def layer_reports(results: Results) -> Several:
    """Return the layer report of every variant but the baseline, folded below a summary."""
    reports = (replace(layer_report(v), folded=True) for name, v in results.variants.items() if name != BASELINE)
    return Several(tuple(reports) or (Statement("No variant was made.", tone="warning"),))


def layer_report(variant: Variant) -> Table:
    """Return the changes of each layer of a variant; the caption sums them up."""
    table = audit_table(variant.audit, of=variant.name, sparsity=variant.sparsity)
    return replace(table, key=tables.anchor(f"layers of {variant.name}"))


def shrunk(*, parameters: Sequence[int], macs: Sequence[int], sparsity: Sequence[float] = (0, 0)) -> Table:
    """Return the size of a float32 model before and after compression, each argument a pair; MACs are per example."""
    quantities = (
        ("parameters", parameters, formats.count),
        ("size in float32", [4 * count for count in parameters], formats.size),
        ("MACs per example", macs, formats.count),
    )
    rows: list[tables.Row] = [
        {"": name, "before": text(old), "after": text(new), "reduction": formats.times(old / new) if new else ""}
        for name, (old, new), text in quantities
    ]
    if any(sparsity):
        old, new = map(formats.percent, sparsity)
        rows.append({"": "sparsity", "before": old, "after": new})
    return tables.table("Model size", rows)


def trades(compared: Mapping[str, tuple[Comparison, Accuracy]]) -> Table:
    """Return the speed-up of models and the change of their accuracy, all against the same reference."""
    rows: list[tables.Row] = [
        {
            "model": name,
            "speed-up": cells.speedup(latency.speedup, latency.verdict),
            f"{DELTA} {accuracy.title}": accuracy.change_cell(),
            "same predictions": "" if accuracy.agreement is None else formats.percent(accuracy.agreement),
        }
        for name, (latency, accuracy) in compared.items()
    ]
    warnings = dict.fromkeys(text for latency, _ in compared.values() for text in latency.warnings)
    return tables.table("Compared with the original", rows, f"With 95 % CIs. {' '.join(warnings)}".strip())


_TIMING_NOTE = (
    "Speed-ups have 95 % CIs. Speed-up compares the fastest call of each slot (the speed of the code), median speed-up "
    "the median call. The noise floor is the difference of an A/A control, a copy of the baseline timed interleaved, "
    "to the baseline; beyond 1 % there is no verdict. Faster or slower: the entire CI is beyond 1 %; no difference: it "
    "is within."
)


def latencies(compared: Mapping[str, Comparison]) -> Shown:
    """Return the paired timings of one target, each with its verdict and warnings."""
    if not compared:
        return Statement("Nothing to time: no variant could be loaded.", tone="warning")
    return _timings("Paired timing against the baseline", compared)


def runtime(compared: Comparison | None) -> Shown:
    """Return the speed-up of the runtime and file format without compression."""
    if compared is None:
        return Statement("The baseline has no file for this target, so it cannot be compared with your module.")
    caption = f"Unchanged model in {compared.candidate_runtime} against your module in PyTorch"
    return _timings(caption, {_unchanged(compared): compared})


def timings(results: Results) -> Several:
    """Return, for each target, samples and conditions of every comparison."""
    names = figures.named(results)
    return _by_target(results, lambda record: _samples(record, names))


def _samples(record: TargetRecord, names: Sequence[str]) -> tuple[Shown, ...]:
    compared: dict[str, Comparison] = {m.variant: m.latency for m in record.measurements if m.latency}
    if record.runtime:
        compared[_unchanged(record.runtime)] = record.runtime
    table = replace(_timings(f"All comparisons on {record.target}", compared), folded=True)
    return (figures.distributions(compared, title=record.target, names=names), *([table] if compared else []))


def _unchanged(compared: Comparison) -> str:
    return f"unchanged in {compared.candidate_runtime}"


def _calls(of: Comparison) -> str:
    return f"{formats.counted(len(of.control_samples_ms) // 2, 'block')}\n{of.warmup_calls} warm-up calls"


def _timings(caption: str, compared: Mapping[str, Comparison]) -> Table:
    rows: list[tables.Row] = [
        {
            "variant": name,
            "speed-up": cells.speedup(c.speedup, c.verdict),
            "median speed-up": Cell(f"{formats.rounded(c.median_speedup)}{TIMES}", formats.interval(c.median_speedup)),
            "noise floor": Cell(f"{PLUS_MINUS}{formats.percent(c.noise_floor)}", formats.interval(c.control_ratio)),
            "duration": Cell(f"{c.duration_s:.1f} s", _calls(c), tone="quiet"),
            "warnings": Cell("; ".join(c.warnings) or "none", tone="warning" if c.warnings else "quiet"),
        }
        for name, c in compared.items()
    ]
    return tables.table(caption, rows, _TIMING_NOTE, text=("warnings",))


def percentile(samples: Sequence[float], fraction: float) -> float | None:
    """Return the smallest sample that is not below `fraction` of all, a key of `PERCENTILES`; None if too few."""
    if len(samples) < PERCENTILES[fraction]:
        return None
    return float(np.quantile(samples, fraction, method="inverted_cdf"))


def latency_percentiles(record: TargetRecord) -> Table:
    """Return p50, p90 and p99 of the latency of each variant."""
    baseline = [m.latency.reference_samples_ms for m in record.measurements if m.latency]
    rows: list[tables.Row] = []
    for measurement in record.measurements:
        slots = measurement.latency.candidate_samples_ms if measurement.latency else ()
        if measurement.variant == BASELINE:
            slots = tuple(slot for samples in baseline for slot in samples)
        if samples := [ms for slot in slots for ms in slot]:
            own = {f"p{100 * fraction:.0f}": _percentile(samples, fraction) for fraction in PERCENTILES}
            rows.append({"variant": measurement.variant, **own})
    note = "Latency of single calls, timed interleaved with other models on this machine."
    return tables.table(f"Latency percentiles on {record.target}", rows, note)


def _percentile(samples: Sequence[float], fraction: float) -> Cell:
    value = percentile(samples, fraction)
    needed = f"needs \N{GREATER-THAN OR EQUAL TO} {PERCENTILES[fraction]} samples, {len(samples)} taken"
    return Cell(f"n/a ({needed})", tone="quiet") if value is None else cells.milliseconds(value)


def memory(record: TargetRecord) -> Table:
    """Return peak memory, load time and latency of the first call of each variant's file."""
    measured = [m for m in record.measurements if not m.error]
    baseline = next((m.memory.peak_bytes for m in measured if m.memory and m.variant == BASELINE), None)
    rows: list[tables.Row] = [
        {
            "variant": m.variant,
            "peak memory": cells.size(m.memory.peak_bytes if m.memory else None),
            "while loading": cells.size(m.memory.load_bytes if m.memory else None),
            "vs baseline": _vs_baseline(m, baseline),
            "load": cells.milliseconds(m.load_ms),
            "first call": cells.milliseconds(m.first_call_ms),
        }
        for m in measured
    ]
    runtime = next((m.memory.runtime_bytes for m in record.measurements if m.memory), None)
    notes = ["Peak of a separate process that loads and calls the file, above its memory before it opened the file."]
    notes += [f"The runtime itself uses {formats.size(runtime)}."] if runtime else []
    notes += dict.fromkeys(note for m in record.measurements for note in m.notes if note.startswith("Peak memory"))
    return tables.table(f"Memory and start-up on {record.target}", rows, " ".join(notes))


def _vs_baseline(measurement: Measurement, baseline_bytes: int | None) -> Cell | str:
    if not measurement.memory or not baseline_bytes:
        return ""
    ratio = measurement.memory.peak_bytes / baseline_bytes
    return cells.REFERENCE if measurement.variant == BASELINE else f"{ratio:.2f}{TIMES}"


def throughput(record: TargetRecord, names: Sequence[str] = ()) -> Several:
    """Return latency and throughput on workloads, by batch size and number of threads, as a chart and a table.

    `names` are the variants with a colour; see `figures.look`.
    """
    conditions = next((m.latency.conditions for m in record.measurements if m.latency), None)
    if not record.sweep or conditions is None:
        return Several((Statement("No other workload, batch size or number of threads was timed."),))
    rows: list[tables.Row] = []
    has_workloads = any(point.workload for point in record.sweep)
    for point in record.sweep:
        row = {"variant": point.variant, "workload": point.workload or "example"} if has_workloads else {}
        row = {"variant": point.variant, **row, "batch size": str(point.batch_size), "threads": str(point.threads)}
        if point.error or (rate := point.throughput) is None:
            rows.append({**row, "error": Cell(point.error, tone="warning", wide=True)})
            continue
        timed = point.latency
        ratio = cells.speedup(timed.speedup, timed.verdict) if timed else cells.REFERENCE
        rows.append(
            {
                **row,
                "latency / batch": cells.latency(point.latency_ms),
                point.unit: cells.rate(rate),
                "vs baseline": ratio,
            }
        )
    note = "Each comparison takes less time than the main ones, so its interval is wider."
    named = "Workloads, other" if has_workloads else "Other"
    shown = tables.table(f"{named} batch sizes and threads on {record.target}", rows, note, folded=True)
    names = names or [m.variant for m in record.measurements if m.variant != BASELINE]
    drawn = figures.throughput(record, conditions, names)
    return Several((drawn, shown) if drawn else (shown,))
