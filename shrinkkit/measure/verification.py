"""The verification of a variant's folder: its result, as text too, and `verify`, which runs it in a separate process.

Imports no torch. The checks themselves are in `verify`, which the process runs.
"""

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from shrinkkit.core import estimate, machines, processes
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.machines import Environment
from shrinkkit.display import formats
from shrinkkit.errors import InvalidInput, ModelFileError
from shrinkkit.progress import Progress, no_progress
from shrinkkit.results.cards import Figures

OK, DIFFERS, DAMAGED, FAILS, NOT_HERE, NO_FILE = "ok", "differs", "damaged", "fails", "cannot run here", "no file"
WRONG = (DIFFERS, DAMAGED, FAILS)
WIDTH = 100
STARTED = " ..."
"""Ends a line on the standard error of the process that checks: the target of the file that it is about to run."""


@dataclass(frozen=True)
class Finding:
    """The check of a variant's file on one target."""

    target: str
    file: str
    """Relative to the variant's folder; empty if the runtime has none."""
    state: str
    """`ok`, `differs` (other outputs), `damaged` (not the recorded file), `fails` (does not load or run),
    `cannot run here`, or `no file`."""
    why: str = ""
    """The reason, if it is not ok."""
    max_relative_error: float | None = None
    """Largest error against the reference outputs, relative to the largest of them; None if it did not run."""
    limit: float | None = None
    """The largest error that is ok."""
    saturated: tuple[str, ...] = ()
    """Layers whose int8 accumulators saturate on this processor."""
    latency_ms: Estimate | None = None
    """On the reference inputs; None if it was not timed."""
    speedup: Estimate | None = None
    """Against the baseline's file for the same runtime; None without a baseline in the folder next to it."""
    verdict: str = ""
    """Of `speedup`: `faster`, `slower`, `same`, `undecided`, or `too noisy`; empty without one."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification:
    """A variant's folder on this machine."""

    variant: str
    verified: bool
    """Whether nothing is damaged, and every file that can run here, at least one, gives its reference outputs."""
    threads: int
    environment: Environment
    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    """Problems of the folder itself."""
    notes: tuple[str, ...]


def verify(
    folder: str | Path,
    *,
    targets: Sequence[str] = (),
    threads: int = 0,
    timeout_s: float = 120,
    progress: Progress = no_progress,
) -> Verification:
    """Verify a variant's folder on this machine: hashes, outputs on the reference inputs, and speed against its report.

    The folder may have been copied alone, without run, task or data. Files run in a separate process: one that hangs
    or crashes it fails, and the others continue. A file is timed against the baseline's in the folder `../baseline`, or
    else alone. A speed that differs from the report's is noted and is not a failure.

    Args:
        folder: A variant's folder, with its variant.json.
        targets: Targets to check, such as `cpu/torch`; empty for all.
        threads: Intra-op threads, 0 for all available cores.
        timeout_s: Seconds, above 0, in which a file must run, and in which it must be timed.
        progress: Called with the files finished, their number (0 if unknown) and the target that starts.

    Returns:
        The state of each target's file, with error, latency in ms and speed-up, and what is wrong with the folder.

    Raises:
        InvalidInput: There is no variant in `folder`, its record is damaged or of another version, or an argument is
            out of its range.
        ModelFileError: The process that checks ended before it reached a file.
    """
    machines.check_threads(threads)
    if not 0 < timeout_s < math.inf:
        raise InvalidInput(f"`timeout_s` must be a number of seconds > 0, got {timeout_s}. Leave it out for 120.")
    # OpenMP reads its settings when torch is loaded.
    count = str(threads or machines.cores())
    variables = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    failed: dict[str, str] = {}
    started: list[str] = []
    request = {"folder": os.path.abspath(folder), "only": targets, "threads": int(count), "failed": failed}

    def on_line(line: str) -> bool:
        if line.endswith(STARTED):
            started.append(line.removesuffix(STARTED))
            progress(len(set(started)) - 1, len(targets), started[-1])
        return line.endswith(STARTED)

    # In an empty folder: libraries read settings from the working directory, which may be the variant's.
    with processes.short_folder() as empty:
        while True:
            call = processes.command("shrinkkit.measure.verify", json.dumps(request))
            ended = processes.run(call, limit_s=timeout_s, cwd=empty, variables=variables, on_line=on_line)
            if ended.status == 0:
                return TypeAdapter(Verification).validate_json(ended.output)
            if ended.status == 2:
                raise InvalidInput(ended.output.strip())
            if not started or started[-1] in failed:
                raise ModelFileError(f"The process that checks {folder} ended early: {ended.errors or ended.status}.")
            late = f"took longer than {timeout_s:g} s and was stopped; a longer `timeout` allows more"
            failed[started[-1]] = late if ended.status is None else f"ended its process with status {ended.status}"


def is_verified(findings: Sequence[Finding], problems: Sequence[str]) -> bool:
    """Return whether nothing is wrong and at least one file was verified."""
    states = [finding.state for finding in findings]
    return not problems and OK in states and not any(state in WRONG for state in states)


def compare_with_report(reported: Figures, finding: Finding, *, machine: str, threads: int) -> str:
    """Return a sentence that compares the speed that a card reports for a target with the one measured here.

    They differ if the whole interval of their ratio lies beyond the margin of 1 %. Another machine or thread count is
    named, since it may explain the difference.
    """
    differences = [f"another machine, {machine}"] if reported.machine != machine else []
    if reported.threads != threads:
        differences.append(f"{formats.counted(threads, 'thread')} instead of {reported.threads}")
    where = f"({', '.join(differences) or 'the same machine and threads'})"
    there = f"report ({reported.machine}, {formats.counted(reported.threads or 0, 'thread')})"
    if reported.speedup is None or finding.speedup is None:
        latencies = (reported.latency_ms, finding.latency_ms)
        before, now = (formats.estimate(ms, unit=" ms") if ms else "not timed" for ms in latencies)
        return f"{there}: {before}; here {where}: {now}. There is no ratio to compare."
    comparison = f"{there}: {formats.speedup(reported.speedup)}; here {where}: {formats.speedup(finding.speedup)}"
    if "too noisy" in (reported.timing, finding.verdict):
        return f"{comparison}: inconclusive, too noisy {'there' if reported.timing == 'too noisy' else 'here'}."
    ratio = estimate.product(finding.speedup, estimate.inverse(reported.speedup))
    differs = estimate.verdict(ratio) in ("faster", "slower")
    return f"{comparison}: {'differs' if differs else 'no difference can be shown'}."


def text(verification: Verification) -> str:
    """Return a verification as plain text: a table of the targets, with reasons and notes below each."""
    head = ("target", "state", "max. relative error", "latency / batch", "speed-up vs. baseline")
    lines = [head, *(_cells(finding) for finding in verification.findings)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in lines]
    machine = f"{machines.names(verification.environment)[0]}, {formats.counted(verification.threads, 'thread')}"
    shown = [f"{verification.variant} on {machine}", "", rows[0], "  ".join("-" * width for width in widths)]
    for row, finding in zip(rows[1:], verification.findings, strict=True):
        shown.append(row)
        for note in filter(None, (finding.why, *finding.notes)):
            shown += textwrap.wrap(note, WIDTH, initial_indent="    ", subsequent_indent="    ")
    for note in (*verification.problems, *verification.notes, _conclusion(verification)):
        shown += ["", *textwrap.wrap(note, WIDTH)]
    return "\n".join(shown)


def _cells(finding: Finding) -> tuple[str, ...]:
    error = finding.max_relative_error
    latency = formats.milliseconds(finding.latency_ms.value) if finding.latency_ms else ""
    speed = f"{formats.speedup(finding.speedup)} {finding.verdict}" if finding.speedup else ""
    errors = "" if error is None else f"{error:.1e} (ok: {finding.limit:g})"
    return finding.target, finding.state, errors, latency, speed


def _conclusion(verification: Verification) -> str:
    wrong = [f"{finding.target} ({finding.state})" for finding in verification.findings if finding.state in WRONG]
    ran = [finding.target for finding in verification.findings if finding.state == OK]
    if wrong or verification.problems:
        return f"Not verified: {', '.join(wrong) or 'the folder itself has changed since it was written'}."
    if not ran:
        return "Nothing was verified, because no file could run here; see the reasons above."
    return f"Verified: the files are unchanged and reproduce their reference outputs on {', '.join(ran)}."
