"""How fast, and how surely: comparisons with verdict, interval, noise floor, and what speaks against trusting them."""

from collections.abc import Mapping
from dataclasses import replace

from shrinkkit.core.measurement import Comparison
from shrinkkit.display import cells, formats
from shrinkkit.display.tables import Cell, Column, Several, Shown, Statement, Table
from shrinkkit.report import figures
from shrinkkit.results.table import Results

_TIMING = (
    Column("speed-up", True),
    Column("median speed-up", True),
    Column("noise floor", True),
    Column("taken", True),
    Column("warnings"),
)
_TIMING_NOTE = (
    "Brackets are 95 % intervals. The speed-up compares the fastest call of each turn, which is the speed of the code; "
    "the median speed-up compares the median one. The noise floor is how far a copy of the baseline, "
    "which took turns with both, may be from the baseline itself by the same data; where the two surely differ by more "
    "than 1 %, no verdict is given. A speed-up is called faster or slower only if its whole interval is more than 1 % "
    "away from 1, and the same if all of it is nearer."
)


def latencies(compared: Mapping[str, Comparison]) -> Shown:
    """Return the paired timings of one target, each with its verdict and what speaks against trusting it."""
    if not compared:
        return Statement("There is nothing to time: no variant but the baseline could be loaded.", tone="warning")
    rows = tuple((Cell(name), *_timing(c)) for name, c in compared.items())
    return Table("Latency beside the baseline", (Column("variant"), *_TIMING), rows, _TIMING_NOTE)


def distributions(compared: Mapping[str, Comparison]) -> Shown:
    """Return the raw times of each comparison as small pictures."""
    return figures.distributions(compared) or Statement("There are no times to show.")


def runtime(compared: Comparison | None) -> Shown:
    """Return what the runtime and its form of file give by themselves, or that it is not known."""
    if compared is None:
        return Statement("The baseline has no file here, so there is nothing to compare with your module today.")
    row = (Cell(_unchanged(compared)), *_timing(compared))
    caption = f"The unchanged model in {compared.candidate_runtime} against your module as called today"
    return Table(caption, (Column("model"), *_TIMING), (row,), _TIMING_NOTE)


def timings(found: Results) -> Several:
    """Return the raw times and the conditions of every comparison, place by place."""
    parts: list[Shown] = []
    for target, record in found.measured.items():
        compared: dict[str, Comparison] = {m.variant: m.latency for m in record.measurements if m.latency}
        if record.runtime:
            compared[_unchanged(record.runtime)] = record.runtime
        where = found.where(target)
        if picture := figures.distributions(compared, title=where):
            parts.append(picture)
        table = latencies(compared)
        if isinstance(table, Table):
            parts.append(replace(table, caption=f"Every comparison on {where}", folded=True))
    return Several(tuple(parts) or (Statement("Nothing was timed.", tone="warning"),))


def _unchanged(compared: Comparison) -> str:
    return f"unchanged in {compared.candidate_runtime}, against today"


def _timing(c: Comparison) -> tuple[Cell, ...]:
    blocks = (
        f"{formats.counted(len(c.control_samples_ms) // 2, 'block')}\n{formats.counted(c.warmup_calls, 'call')} before"
    )
    return (
        cells.speedup(c.speedup, c.verdict),
        Cell(formats.times(c.median_speedup.value), formats.interval(c.median_speedup)),
        Cell(f"\N{PLUS-MINUS SIGN}{formats.percent(c.noise_floor)}", formats.interval(c.control_ratio)),
        Cell(f"{c.duration_s:.1f} s", blocks, tone="quiet"),
        Cell("; ".join(c.warnings) or "none seen", tone="warning" if c.warnings else "quiet"),
    )
