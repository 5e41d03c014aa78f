"""How progress is shown, in a terminal of any size and in a log."""

import dataclasses
import io
import itertools
import re

import pytest
from clock import Clock
from rich.console import Console

from shrinkkit.core.run_folder import Step
from shrinkkit.pipeline.run_status import LineMonitor, LiveMonitor, Progress, duration, steps_table

STEPS = tuple(
    Step(f"2-prune-{i}", "2-prune", str(i), "done" if i < 20 else "pending", 3.0 * (i < 20)) for i in range(40)
)


def console(width, height=30, *, terminal=False):
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal, _environ={})


def progress(state="running", **changes):
    current = Step("2-prune-20", "2-prune", "20", state, 4.0, **changes)
    steps = (*STEPS[:20], current, *STEPS[21:])
    return Progress(steps, current, "Fine-tune", dict.fromkeys([step.name for step in steps], 10.0))


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_fits_the_terminal_and_shows_the_step_under_way(width):
    shown = console(width)
    best = "best so far: a on cpu/torch"
    shown.print(steps_table(dataclasses.replace(progress(), best=best), height=30, width=width))
    lines = [line.rstrip() for line in shown.file.getvalue().splitlines()]
    assert len(lines) <= 30
    assert max(map(len, lines)) <= width
    line, *below = [line for line in lines if "2-prune-20" in line]
    assert [word in line for word in ("running", "4 s", "~6 s")] == [True] * 3
    assert "Fine-tune" in (line if width == 200 else below[0])
    assert lines[-2:] == ["20 of 40 steps, about 3:16 min left", best]


def test_80_columns_hold_long_names_and_a_cause_in_whole_lines():
    names = ("3-quantize-channels-50-static-int8", "4-benchmark-cpu-onnxruntime")
    steps = tuple(Step(name, "3-quantize", "", "failed", 4.0, error="of a long cause " * 9) for name in names)
    shown = console(80)
    shown.print(steps_table(Progress(steps, steps[0]), height=None, width=80))
    lines = shown.file.getvalue().splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [[name, "failed"] for name in names]
    assert shown.file.getvalue().count("cause") == 18


def test_a_long_error_is_shown_whole():
    shown = console(80)
    shown.print(steps_table(progress("failed", error="word " * 40), height=None, width=80))
    assert shown.file.getvalue().count("word") == 40


def test_a_log_has_a_line_for_each_change_of_state_and_no_escape_codes():
    shown = console(80)
    with LineMonitor(shown) as monitor:
        for _ in range(3):
            monitor.step(progress())
        monitor.step(progress("failed", error="x" * 200))
        monitor.message("a [bold] message")
    assert shown.file.getvalue().splitlines() == [
        "[21/40] 2-prune-20 · running",
        "[21/40] 2-prune-20 · failed · 4.0 s",
        "    " + "x" * 200,
        "a [bold] message",
    ]


def test_a_log_has_a_line_every_15_s_also_while_a_task_is_checked_and_where_a_step_starts_its_clock_again():
    shown, running, clock = console(80), progress(), Clock()
    with LineMonitor(shown, clock.perf_counter) as monitor:
        times = []
        for second in range(120):
            clock.ns = second * 10**9
            before = len(shown.file.getvalue())
            if second < 40:
                monitor.activity(f"loading · {second} s")
            else:
                step = dataclasses.replace(running.current, duration_s=second % 13)
                steps = tuple(step if one.name == step.name else one for one in running.steps)
                monitor.step(dataclasses.replace(running, current=step, steps=steps, phase="Export"))
            if len(shown.file.getvalue()) > before:
                times.append(second)
    assert max(b - a for a, b in itertools.pairwise([0, *times, 120])) <= 15
    assert min(b - a for a, b in itertools.pairwise(times)) >= 10
    lines = shown.file.getvalue().splitlines()
    assert lines[0] == "loading · 15 s"
    assert "[21/40] 2-prune-20 · running" in lines
    assert re.fullmatch(r"\[21/40\] 2-prune-20 · \d+ s · Export · about 3:\d\d min left", lines[-1])


def test_a_log_names_the_best_variant_when_it_changes():
    shown = console(80)
    with LineMonitor(shown) as monitor:
        for best in ("", "best so far: a", "best so far: a", "best so far: b"):
            monitor.step(dataclasses.replace(progress(), best=best))
    assert shown.file.getvalue().splitlines()[1:] == ["best so far: a", "best so far: b"]


def test_a_log_begins_with_the_plan():
    shown = console(80)
    with LineMonitor(shown) as monitor:
        monitor.plan([("1-baseline", "cached", "baseline"), ("5-report", "run", "")], "1 steps to run")
    assert shown.file.getvalue().splitlines() == ["1-baseline  cached", "5-report    run", "1 steps to run"]


def test_a_terminal_keeps_the_table_of_all_steps():
    shown = console(80, terminal=True)
    with LiveMonitor(shown) as monitor:
        monitor.activity("loading and checking task.py")
        monitor.step(progress())
    text = shown.file.getvalue()
    assert "loading and checking" in text
    assert "2-prune-0 " in text.rpartition("section or error")[2]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3:05 min"), (3900, "1:05 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
