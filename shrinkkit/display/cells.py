"""Table cells of the quantities that every table shows: one definition for each kind."""

from shrinkkit.display import formats
from shrinkkit.display.formats import TIMES, UNSURE, Estimated
from shrinkkit.display.tables import Cell

REFERENCE = Cell("reference", tone="quiet")
_TONES = {"faster": "good", "slower": "bad", "same": "quiet", "within budget": "good", "over budget": "bad"}


def speedup(ratio: Estimated | None, verdict: str) -> Cell:
    """Return a speed-up with its interval and verdict, without the value where noise allows none."""
    if ratio is None:
        return REFERENCE
    text = UNSURE[verdict] if verdict == "too noisy" else f"{formats.rounded(ratio)}{TIMES}"
    return Cell(text, f"{formats.interval(ratio)}\n{UNSURE.get(verdict, verdict)}", _TONES.get(verdict, "warning"))


def change(difference: Estimated | None, *, is_fraction: bool, verdict: str | None = None) -> Cell:
    """Return a paired difference of scores with its interval, and with the verdict on the budget if there is one."""
    if difference is None:
        return REFERENCE
    text = formats.change(difference.value, is_fraction=is_fraction, unit=verdict is None)
    aside = formats.interval(difference, is_fraction=is_fraction)
    return Cell(text, aside) if verdict is None else Cell(text, f"{aside}\n{verdict}", _TONES.get(verdict, "warning"))


def score(mean: Estimated | None, *, is_fraction: bool) -> Cell:
    """Return a mean score with its interval."""
    if mean is None:
        return Cell("")
    return Cell(formats.score(mean.value, is_fraction=is_fraction), formats.interval(mean, is_fraction=is_fraction))


def latency(ms: Estimated | None) -> Cell:
    """Return a latency with its interval."""
    return Cell(f"{formats.rounded(ms)} ms", formats.interval(ms)) if ms else Cell("n/a", tone="quiet")


def milliseconds(ms: float | None) -> Cell:
    """Return a single time."""
    return Cell("" if ms is None else formats.milliseconds(ms))


def size(count: float | None) -> Cell:
    """Return a number of bytes."""
    return Cell("" if count is None else formats.size(count))
