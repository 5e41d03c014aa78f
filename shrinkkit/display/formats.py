"""Numbers as people read them: units, sensible digits, intervals. The same text in terminal, HTML and Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

TIMES, MINUS, DASH = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{EN DASH}"


class Interval(Protocol):
    """What has a lower and an upper bound."""

    @property
    def low(self) -> float: ...  # noqa: D102

    @property
    def high(self) -> float: ...  # noqa: D102


def size(count: float) -> str:
    """Return a number of bytes in decimal units with three digits: `1.23 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * factor:
            return f"{digits(count / factor)} {unit}"
    return f"{count:.0f} bytes"


def count(number: float) -> str:
    """Return a count with three digits: `281 k`, `24.1 M`; whole below 10,000."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * factor and number >= 1e4:
            return f"{digits(number / factor)} {unit}"
    return f"{number:,.0f}"


def milliseconds(value: float) -> str:
    """Return a time in ms with three digits: `4.56 ms`."""
    return f"{digits(value)} ms"


def times(value: float) -> str:
    """Return a factor with three digits and its sign: `2.34` and a multiplication sign."""
    return f"{digits(value)} {TIMES}"


def percent(share: float) -> str:
    """Return a share in [0, 1] as per cent with one decimal: `97.8 %`."""
    return f"{_rounded(100 * share, 1)} %"


def is_fraction(scores: Sequence[float]) -> bool:
    """Return whether scores are shares in [0, 1], which are written as per cent."""
    return all(0 <= score <= 1 for score in scores)


def score(value: float, *, is_fraction: bool) -> str:
    """Return a score: per cent if scores are shares in [0, 1], else the plain number."""
    return percent(value) if is_fraction else signed(digits(value))


def change(value: float, *, is_fraction: bool) -> str:
    """Return a difference of scores with its sign: percentage points if scores are shares."""
    if is_fraction:
        text = _rounded(100 * value, 1)
        return f"{text if text.startswith(MINUS) or text == '0.0' else '+' + text} points"
    return signed(f"{value:+.3g}")


def interval(estimate: Interval, *, is_fraction: bool | None = None) -> str:
    """Return the interval of an estimate in brackets, without unit.

    Args:
        estimate: Whose `low` and `high` are written.
        is_fraction: True writes shares as per cent with one decimal; None or False, plain numbers with three digits.
    """
    ends = (estimate.low, estimate.high)
    return "[" + ", ".join(_rounded(100 * x, 1) if is_fraction else signed(digits(x)) for x in ends) + "]"


def digits(value: float) -> str:
    """Return `value` with three significant digits, and never an exponent below a million."""
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    decimals = max(0, 2 - math.floor(math.log10(float(f"{abs(value):.3g}"))))
    return f"{value:,.{decimals}f}" if decimals == 0 else f"{value:.{decimals}f}"


def signed(text: str) -> str:
    """Return a number's text with a true minus sign."""
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def points(share: float) -> str:
    """Return a share as percentage points without needless decimals: `1 point`, `0.5 points`."""
    text = f"{100 * share:g}"
    return f"{text} point" + ("" if text == "1" else "s")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 variant`, `8 variants`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _rounded(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else signed(text)


def settings(section: Mapping[str, Any]) -> str:
    """Return the keys of a recipe's section that say something, with their values."""
    return ", ".join(f"{key} {value}" for key, value in section.items() if value not in ([], {}, (), None, False))
