"""What a deployment pays besides the typical call: slow calls, memory, the start, and other batches and threads."""

import math
from collections.abc import Sequence

from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Conditions, Measurement, TargetRecord
from shrinkkit.core.recipe import BASELINE, STAGE
from shrinkkit.display import cells, formats
from shrinkkit.display.formats import TIMES
from shrinkkit.display.picture import COLOURS, FAINT, MARKERS, Picture, canvas, picture
from shrinkkit.display.tables import Cell, Column, Several, Statement, Table

FEWEST = {0.5: 1, 0.9: 64, 0.99: 662}
"""Calls from which on a quantile of the latency may be quoted, by its share.

Source: MLPerf Inference, LoadGen's early stopping.
"""


def quantile(samples: Sequence[float], share: float) -> float | None:
    """Return the smallest sample that at least `share` of all do not exceed; None where there are too few to tell.

    Args:
        samples: Times of single calls, in any order.
        share: One of `FEWEST`.
    """
    if len(samples) < FEWEST[share]:
        return None
    return sorted(samples)[math.ceil(share * len(samples)) - 1]


def tails(record: TargetRecord) -> Table:
    """Return the latency that half, nine of ten, and 99 of 100 calls of each variant do not exceed."""
    compared = [m.latency for m in record.measurements if m.latency]
    usual = [ms for c in compared for slot in c.reference_samples_ms for ms in slot]
    rows = []
    for one in record.measurements:
        samples = usual if one.variant == BASELINE else _samples(one)
        if samples:
            rows.append((Cell(one.variant), *(_quantile(samples, share) for share in FEWEST)))
    columns = (Column("variant"), *(Column(f"p{share * 100:.0f}", True) for share in FEWEST))
    return Table(f"Slow calls on {record.target}", columns, tuple(rows), _TAILS)


_TAILS = (
    "p90 is the time that nine of ten calls did not exceed. Calls took turns with those of other models, so the tails "
    "are those of this machine while it measured; a p90 needs 64 calls and a p99 662."
)


def memory(record: TargetRecord) -> Table:
    """Return what each variant's file needs in memory, and how long it takes to load and to answer first."""
    base = next((m.memory.peak_bytes for m in record.measurements if m.memory and m.variant == BASELINE), None)
    rows: list[tuple[Cell, ...]] = []
    for one in record.measurements:
        if one.error:
            continue
        rows.append(
            (
                Cell(one.variant),
                *_memory(one, base),
                Cell(formats.milliseconds(one.load_ms) if one.load_ms is not None else ""),
                Cell(formats.milliseconds(one.first_call_ms) if one.first_call_ms is not None else ""),
            )
        )
    columns = (
        Column("variant"),
        Column("peak memory", True),
        Column("of it while loading", True),
        Column("against the baseline", True),
        Column("load", True),
        Column("first call", True),
    )
    runtime = next((m.memory.runtime_bytes for m in record.measurements if m.memory), None)
    held = f" The runtime itself holds {formats.size(runtime)}." if runtime else ""
    why = dict.fromkeys(note for m in record.measurements for note in m.notes if note.startswith("Peak memory"))
    return Table(f"Memory and start on {record.target}", columns, tuple(rows), " ".join([_MEMORY + held, *why]))


_MEMORY = (
    "Counted in a process of its own for each file, above what the process held before it opened the file; reading the "
    "file and calling it a few times are part of it."
)


def throughput(record: TargetRecord) -> Several:
    """Return examples a second by batch size and number of threads, as a picture and a table."""
    here = next((m.latency.conditions for m in record.measurements if m.latency), None)
    if not record.sweep or here is None:
        return Several((Statement("No other batch size or number of threads was timed."),))
    columns = (
        Column("variant"),
        Column("batch", True),
        Column("threads", True),
        Column("a call", True),
        Column("examples a second", True),
        Column("against the baseline", True),
    )
    rows = tuple(
        (
            Cell(point.variant),
            Cell(str(point.batch_size)),
            Cell(str(point.threads)),
            *(
                (Cell(point.error, tone="warning", wide=True),)
                if point.error or point.latency_ms is None
                else (
                    _time(point.latency_ms),
                    Cell(_rate(point.batch_size, point.latency_ms)),
                    cells.speedup(point.latency.speedup, point.latency.verdict) if point.latency else cells.REFERENCE,
                )
            ),
        )
        for point in record.sweep
    )
    table = Table(f"Other batches and threads on {record.target}", columns, rows, _SWEEP, folded=True)
    drawn = _drawn(record, here)
    return Several((drawn, table) if drawn else (table,))


_SWEEP = (
    "Each row is a comparison with the baseline under the same conditions, made in less time than the main ones and so "
    "with a wider interval."
)


def _drawn(record: TargetRecord, here: Conditions) -> Picture | None:
    """Return throughput against batch size at the main number of threads; None where there is but one size."""
    rates: dict[str, dict[int, float]] = {}
    for one in record.measurements:
        if one.latency_ms and STAGE not in one.variant:
            rates[one.variant] = {here.batch_size: 1e3 * here.batch_size / one.latency_ms.value}
    for point in record.sweep:
        if point.latency_ms and point.threads == here.threads and point.variant in rates:
            rates[point.variant][point.batch_size] = 1e3 * point.batch_size / point.latency_ms.value
    sizes = sorted({size for by_size in rates.values() for size in by_size})
    if len(sizes) < 2:
        return None
    with canvas(9.2, 3.4) as figure:
        axes = figure.subplots()
        for i, (name, by_size) in enumerate(rates.items()):
            known = sorted(by_size)
            marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(known, [by_size[n] for n in known], color=colour, marker=marker, markersize=5, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size}" for size in sizes])
        drawn = [rate for by_size in rates.values() for rate in by_size.values()]
        marks = _round_numbers(min(drawn), max(drawn))
        axes.set_yticks(marks, [f"{mark:,g}" for mark in marks])
        axes.minorticks_off()
        axes.grid(color=FAINT)
        axes.set_xlabel("batch size")
        axes.set_ylabel("examples a second")
        figure.legend(loc="outside right upper")
        said = "; ".join(
            f"{name}: " + ", ".join(f"{by_size[size]:,.0f} at {size}" for size in sorted(by_size))
            for name, by_size in rates.items()
        )
        threads = formats.counted(here.threads, "thread")
        return picture(
            figure,
            f"Examples a second by batch size on {record.target}. {said}.",
            f"{record.target}: examples a second against the batch size, on {threads}. Both axes are logarithmic; a "
            "line that rises less steeply than the others gains less from larger batches.",
        )


def _round_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2 or 5 times powers of ten from just below `low` to just above `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    first = max((i for i, mark in enumerate(marks) if mark <= low), default=0)
    last = min(i for i, mark in enumerate(marks) if mark >= high)
    return marks[first : last + 1]


def _samples(one: Measurement) -> list[float]:
    return [ms for slot in one.latency.candidate_samples_ms for ms in slot] if one.latency else []


def _quantile(samples: Sequence[float], share: float) -> Cell:
    value = quantile(samples, share)
    if value is None:
        return Cell(f"needs {FEWEST[share]} calls, has {len(samples)}", tone="quiet")
    return Cell(formats.milliseconds(value))


def _memory(one: Measurement, base: int | None) -> tuple[Cell, ...]:
    if one.memory is None:
        return Cell(""), Cell(""), Cell("")
    if one.variant == BASELINE:
        against = Cell("reference", tone="quiet")
    else:
        against = Cell(f"{one.memory.peak_bytes / base:.2f} {TIMES}" if base else "")
    return Cell(formats.size(one.memory.peak_bytes)), Cell(formats.size(one.memory.load_bytes)), against


def _time(latency_ms: Estimate) -> Cell:
    return Cell(formats.milliseconds(latency_ms.value), formats.interval(latency_ms))


def _rate(batch_size: int, latency_ms: Estimate) -> str:
    return f"{1e3 * batch_size / latency_ms.value:,.0f}"
