"""Table cells of the quantities that every table shows: one definition for each kind."""

from dataclasses import replace

from shrinkkit.display import formats
from shrinkkit.display.formats import TIMES, UNSURE, Estimated
from shrinkkit.display.tables import Cell

REFERENCE = Cell("reference", tone="quiet")
_TONES = {"faster": "good", "slower": "bad", "same": "quiet", "within budget": "good", "over budget": "bad"}


def speedup(ratio: Estimated | None, verdict: str) -> Cell:
    """Return a speed-up with its interval and verdict, without the value where noise allows none."""
    if ratio is None:
        return replace(REFERENCE, key="1")
    aside, tone = f"{formats.interval(ratio)}\n{UNSURE.get(verdict, verdict)}", _TONES.get(verdict, "warning")
    if verdict == "too noisy":
        return Cell(UNSURE[verdict], aside, tone)
    return Cell(f"{formats.rounded(ratio)}{TIMES}", aside, tone, key=_key(ratio.value))


def change(difference: Estimated | None, *, is_fraction: bool, verdict: str | None = None) -> Cell:
    """Return a paired difference of scores with its interval, and with the verdict on the budget if there is one."""
    if difference is None:
        return replace(REFERENCE, key="0")
    text = formats.change(difference.value, is_fraction=is_fraction, unit=verdict is None)
    aside, key = formats.interval(difference, is_fraction=is_fraction), _key(difference.value)
    if verdict is None:
        return Cell(text, aside, key=key)
    return Cell(text, f"{aside}\n{verdict}", _TONES.get(verdict, "warning"), key=key)


def score(mean: Estimated | None, *, is_fraction: bool) -> Cell:
    """Return a mean score with its interval."""
    if mean is None:
        return Cell("")
    text, aside = formats.score(mean.value, is_fraction=is_fraction), formats.interval(mean, is_fraction=is_fraction)
    return Cell(text, aside, key=_key(mean.value))


def latency(ms: Estimated | None) -> Cell:
    """Return a latency with its interval."""
    if ms is None:
        return Cell("n/a", tone="quiet")
    return Cell(f"{formats.rounded(ms)} ms", formats.interval(ms), key=_key(ms.value))


def rate(per_second: Estimated) -> Cell:
    """Return a throughput with its interval."""
    text = f"{per_second.value:,.0f}" if per_second.value >= 100 else formats.rounded(per_second)
    return Cell(text, formats.interval(per_second), key=_key(per_second.value))


def milliseconds(ms: float | None) -> Cell:
    """Return a single time."""
    return Cell("") if ms is None else Cell(formats.milliseconds(ms), key=_key(ms))


def size(count: float | None) -> Cell:
    """Return a number of bytes."""
    return Cell("") if count is None else Cell(formats.size(count), key=_key(count))


def count(number: float | None) -> Cell:
    """Return a count of parameters or operations."""
    return Cell("") if number is None else Cell(formats.count(number), key=_key(number))


def _key(value: float) -> str:
    """Return what a cell is sorted by and exported as: six digits, in the basic unit (bytes, ms, shares)."""
    return f"{value:.6g}"
