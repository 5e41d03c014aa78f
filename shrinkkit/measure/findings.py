"""What a verification found of a variant's files on one machine: records, and their text beside what was reported.

Needs no torch. To verify see `verify`.
"""

import textwrap
from dataclasses import dataclass

from shrinkkit.core import estimate, machines
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.machines import Environment
from shrinkkit.display import formats
from shrinkkit.results.cards import Figures

OK, DIFFERS, DAMAGED, FAILS, NOT_HERE, NO_FILE = "ok", "differs", "damaged", "fails", "cannot run here", "no file"
WRONG = (DIFFERS, DAMAGED, FAILS)
WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """What was found of a variant's file on one target."""

    target: str
    file: str
    """Relative to the variant's folder; empty where the runtime has none."""
    state: str
    """`ok`, `differs` (other outputs), `damaged` (not the file that was made), `fails` (does not load or run),
    `cannot run here`, or `no file`."""
    why: str = ""
    """Why it is not ok; empty if it is."""
    max_relative_error: float | None = None
    """Largest difference from the outputs that it must give, as a share of the largest; None if it did not run."""
    limit: float | None = None
    """The largest deviation that is ok."""
    saturated: tuple[str, ...] = ()
    """Layers whose integer kernels give other numbers on this processor than rounding explains."""
    latency_ms: Estimate | None = None
    """Of a call on the stored inputs; None where nothing was timed."""
    speedup: Estimate | None = None
    """Against the baseline's file for the same runtime, in turns; None where none lies beside the folder."""
    verdict: str = ""
    """Of `speedup`: `faster`, `slower`, `same`, `undecided`, or `too noisy`; empty where there is none."""
    notes: tuple[str, ...] = ()
    """What differs from the report, and what could not be had."""


@dataclass(frozen=True)
class Verification:
    """A variant's folder as it is on this machine."""

    variant: str
    verified: bool
    """Whether nothing is damaged, and every file that can run here, at least one, gives the outputs that it must."""
    threads: int
    environment: Environment
    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    """What is wrong with the folder itself; empty if nothing is."""
    notes: tuple[str, ...]


def verified(findings: tuple[Finding, ...], problems: tuple[str, ...]) -> bool:
    """Return whether nothing is wrong and something was proved; see `Verification`."""
    states = [one.state for one in findings]
    return not problems and OK in states and not any(state in WRONG for state in states)


def beside_the_report(reported: Figures, found: Finding, *, machine: str, threads: int) -> str:
    """Return one sentence that puts a reported speed beside the one measured here, and says whether they differ.

    They differ if the whole interval of the ratio of the two lies beyond the margin of 1 %. What makes the two unlike,
    another machine or other threads, is named, since it may explain the difference.

    Args:
        reported: What the card says of the target.
        found: What was measured here on the same target.
        machine: The short name of this machine.
        threads: Threads of one call here.
    """
    unlike = [f"another machine, {machine}"] if reported.machine != machine else []
    if reported.threads != threads:
        unlike.append(f"{formats.counted(threads, 'thread')} instead of {reported.threads}")
    where = f"({', '.join(unlike) or 'the same machine and threads'})"
    there = f"report ({reported.machine}, {formats.counted(reported.threads or 0, 'thread')})"
    if reported.speedup is None or found.speedup is None:
        before, now = _milliseconds(reported.latency_ms), _milliseconds(found.latency_ms)
        return f"{there}: {before}; here {where}: {now}. There is no ratio to compare."
    said = f"{there}: {_times(reported.speedup)}; here {where}: {_times(found.speedup)}"
    if "too noisy" in (reported.verdict, found.verdict):
        return f"{said}: cannot tell, too noisy {'there' if reported.verdict == 'too noisy' else 'here'}."
    ratio = estimate.product(found.speedup, estimate.inverse(reported.speedup))
    differs = estimate.verdict(ratio) in ("faster", "slower")
    return f"{said}: {'differs' if differs else 'no difference can be told'}."


def text(found: Verification) -> str:
    """Return a verification as plain text: a table of the targets, and below each what is to be said of it."""
    lines = [_HEAD, *(_cells(one) for one in found.findings)]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(_HEAD))]
    rows = ["  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in lines]
    shown = [f"{found.variant} on {_machine(found)}", "", rows[0], "  ".join("-" * width for width in widths)]
    for row, one in zip(rows[1:], found.findings, strict=True):
        shown.append(row)
        for note in (*filter(None, [one.why]), *one.notes):
            shown += textwrap.wrap(note, WIDTH, initial_indent="    ", subsequent_indent="    ")
    for note in (*found.problems, *found.notes, _conclusion(found)):
        shown += ["", *textwrap.wrap(note, WIDTH)]
    return "\n".join(shown)


def _machine(found: Verification) -> str:
    return f"{machines.names(found.environment)[0]}, {formats.counted(found.threads, 'thread')}"


_HEAD = ("target", "state", "outputs differ by", "a call", "speed against the baseline")


def _cells(one: Finding) -> tuple[str, ...]:
    return (
        one.target,
        one.state,
        f"{one.max_relative_error:.1e} (ok: {one.limit:g})" if one.max_relative_error is not None else "",
        formats.milliseconds(one.latency_ms.value) if one.latency_ms else "",
        f"{_times(one.speedup)} {one.verdict}" if one.speedup else "",
    )


def _conclusion(found: Verification) -> str:
    wrong = [f"{one.target} ({one.state})" for one in found.findings if one.state in WRONG]
    ran = [one.target for one in found.findings if one.state == OK]
    if wrong or found.problems:
        return f"Not verified: {', '.join(wrong) or 'the folder itself is not as it was written'}."
    if not ran:
        return "Nothing was verified, because no file could run here. What is missing stands above."
    return f"Verified: the files are whole, and give the outputs that they must on {', '.join(ran)}."


def _times(ratio: Estimate) -> str:
    return f"{formats.times(ratio.value)} {formats.interval(ratio)}"


def _milliseconds(latency: Estimate | None) -> str:
    return f"{formats.milliseconds(latency.value)} {formats.interval(latency)}" if latency else "not timed"
