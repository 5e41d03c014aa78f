"""Which variants are worth a choice: those that no other one beats in speed, accuracy and size together."""

from collections.abc import Sequence

from shrinkkit.core.recipe import BASELINE
from shrinkkit.results.conclusions import TRUSTED
from shrinkkit.results.table import Row


def front(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return the rows that no other row beats, fastest first.

    A row beats another if it is at least as good in speed-up against PyTorch today, change of accuracy and size, and
    better in one of them. Only measured rows within the budget whose timing got a verdict take part; the baseline
    counts as no change. Rows of several machines or tasks must not be mixed; those of several runtimes of one device
    may.

    Args:
        rows: Of one task on one machine.
    """
    able = [row for row in rows if _figures(row)]
    best = [row for row in able if not any(_beats(other, row) for other in able)]
    return tuple(sorted(best, key=lambda row: -_figures(row)[0]))


def _beats(one: Row, other: Row) -> bool:
    ours, theirs = _figures(one), _figures(other)
    return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))


def _figures(row: Row) -> tuple[float, ...]:
    """Return speed-up, change of accuracy and negative size, more of each being better; empty if one is not known."""
    if row.state != "measured" or row.intermediate or not row.size_bytes:
        return ()
    if row.speedup_today is None or row.timing_today not in TRUSTED:
        return ()
    if row.variant == BASELINE:
        return row.speedup_today.value, 0.0, -row.size_bytes
    if row.difference is None or row.accuracy_verdict != "within budget":
        return ()
    return row.speedup_today.value, row.difference.value, -row.size_bytes
