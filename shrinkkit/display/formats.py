"""Numbers as text: units, significant digits, confidence intervals. The same text in terminal, HTML and Markdown."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

TIMES, MINUS, DASH = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{EN DASH}"
UNSURE = {"undecided": "inconclusive", "too noisy": "machine too noisy", "same": "no difference"}
"""Verdicts on a timing in words, where they are neither `faster` nor `slower`."""


class Estimated(Protocol):
    """A value with a 95 % confidence interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def size(count: float) -> str:
    """Return a number of bytes in decimal units with three digits: `1.23 MB`."""
    return _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), f"{count:.0f} bytes")


def count(number: float) -> str:
    """Return a count with three digits: `281 k`, `24.1 M`; whole below 10,000."""
    units = (("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= 1e4 else ()
    return _scaled(number, units, f"{number:,.0f}")


def milliseconds(value: float) -> str:
    """Return a time in ms with three digits: `4.56 ms`."""
    return f"{digits(value)} ms"


def times(value: float) -> str:
    """Return a factor with three digits: `2.34x`."""
    return f"{digits(value)}{TIMES}"


def speedup(ratio: Estimated | None, verdict: str = "", *, noun: str = "", ci: bool = True) -> str:
    """Return a speed-up as far as its verdict supports it: `8.6x (95 % CI 8.2-9.1)`; '' for None.

    Of the verdicts, `undecided`, `too noisy` and `same` are named, and of noise no number is given. `noun` follows the
    number, such as ` speed-up`; `ci` adds the confidence interval.
    """
    if ratio is None or verdict == "too noisy":
        return "" if ratio is None else UNSURE[verdict]
    text = f"{rounded(ratio)}{TIMES}{noun}"
    text = with_ci(text, ratio) if ci else text
    return f"{UNSURE[verdict]}, {text}" if verdict in UNSURE else text


def estimate(of: Estimated, *, unit: str = "") -> str:
    """Return a value with its interval, with as many digits as the interval supports: `8.6x (95 % CI 8.2-9.1)`."""
    return with_ci(f"{rounded(of)}{unit}", of)


def with_ci(text: str, of: Estimated, *, is_fraction: bool | None = None) -> str:
    """Return a value's text with its interval, of a fraction in per cent: `+0.2 pts (95 % CI -0.3 to 0.7)`."""
    return f"{text} (95 % CI {interval(of, is_fraction=is_fraction)})"


def rounded(of: Estimated) -> str:
    """Return a value with two or three significant digits, whichever its interval supports."""
    return _fixed(of.value, _decimals(of))


def interval(of: Estimated, *, is_fraction: bool | None = None) -> str:
    """Return both ends of an interval without unit: `8.2-9.1`, `-3.1 to 3.1`; of a fraction, in per cent.

    Ends of other scores (`is_fraction` False) have two digits of its half-width, because they may be close to 0 or 1.
    """
    width = (of.high - of.low) / 2
    decimals = min(6, max(0, 1 - _magnitude(width))) if is_fraction is False and width > 0 else _decimals(of)
    scale, decimals = (100, 1) if is_fraction else (1, decimals)
    ends = [_fixed(scale * end, decimals) for end in (of.low, of.high)]
    return (" to " if MINUS in "".join(ends) else DASH).join(ends)


def percent(fraction: float) -> str:
    """Return a fraction in [0, 1] as per cent with one decimal: `97.8 %`."""
    return f"{_fixed(100 * fraction, 1)} %"


def is_fraction(scores: Sequence[float]) -> bool:
    """Return whether all scores are in [0, 1], so that they are written as per cent."""
    return all(0 <= score <= 1 for score in scores)


def score(value: float, *, is_fraction: bool) -> str:
    """Return a score: in per cent for fractions, else as a plain number, with four decimals up to 1."""
    return percent(value) if is_fraction else _fixed(value, 4) if abs(value) <= 1 else signed(digits(value, 4))


def metric(name: str, *, higher_is_better: bool) -> str:
    """Return the title of a metric: its name, and the direction where lower is better."""
    return name if higher_is_better else f"{name} (lower is better)"


def change(value: float, *, is_fraction: bool, unit: bool = True) -> str:
    """Return a difference of scores with its sign: in percentage points for fractions, with or without the unit."""
    if not is_fraction:
        return signed(f"{value:+.3g}") if value else "0"
    text = _fixed(100 * value, 1)
    return f"{text if text.startswith(MINUS) or text == '0.0' else '+' + text}{' pts' if unit else ''}"


def digits(value: float, significant: int = 3) -> str:
    """Return `value` with three significant digits, and without an exponent from 0.0001 to a million."""
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{significant}g}"
    decimals = max(0, significant - 1 - _magnitude(value))
    return f"{value:,.{decimals}f}" if decimals == 0 else f"{value:.{decimals}f}"


def signed(text: str) -> str:
    """Return a number's text with a true minus sign."""
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def points(fraction: float) -> str:
    """Return a fraction as percentage points without trailing zeros: `1 point`, `0.5 points`."""
    text = f"{100 * fraction:g}"
    return f"{text} point" + ("" if text == "1" else "s")


def wrapped(name: str) -> str:
    """Return a name for a chart, in lines of at most 40 characters."""
    return textwrap.fill(name, 40)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 variant`, `8 variants`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def settings(section: Mapping[str, Any]) -> str:
    """Return the keys of a recipe's section that are set, with their values."""
    return ", ".join(f"{key} {value}" for key, value in section.items() if value not in ([], {}, (), None, False))


def _scaled(number: float, units: Sequence[tuple[str, float]], small: str) -> str:
    return next((f"{digits(number / one)} {unit}" for unit, one in units if number >= 0.9995 * one), small)


def _magnitude(value: float) -> int:
    return math.floor(math.log10(float(f"{abs(value):.3g}")))


def _decimals(of: Estimated) -> int:
    """Return the decimals of a value with two or three significant digits, three if the interval is that narrow."""
    if of.value == 0 or not math.isfinite(of.value):
        return 2
    width = (of.high - of.low) / 2
    supported = -math.floor(math.log10(width)) if math.isfinite(width) and width > 0 else 9
    leading = _magnitude(of.value)
    return max(0, min(2 - leading, max(1 - leading, supported)))


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else signed(text)
