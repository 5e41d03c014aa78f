"""How progress is shown, in a terminal of any size and in a log."""

import dataclasses
import io

import pytest
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
    shown.print(steps_table(progress(), height=30))
    lines = shown.file.getvalue().splitlines()
    assert len(lines) <= 30
    assert max(len(line.rstrip()) for line in lines) <= width
    (line,) = [line for line in lines if "2-prune-20" in line]
    assert [word in line for word in ("running", "4 s", "~6 s", "Fine-tune")] == [True] * 4
    assert lines[-1].startswith("20 of 40 steps, about 3:16 min left")


def test_a_long_error_is_shown_whole():
    shown = console(80)
    shown.print(steps_table(progress("failed", error="word " * 40), height=None))
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


def test_a_log_says_now_and_then_what_a_running_step_is_doing():
    shown, running = console(80), progress()
    with LineMonitor(shown) as monitor:
        for seconds in (4.0, 20.0, 33.0, 35.0, 70.0):
            step = dataclasses.replace(running.current, duration_s=seconds)
            steps = tuple(step if one.name == step.name else one for one in running.steps)
            monitor.step(dataclasses.replace(running, current=step, steps=steps, phase="Export"))
    assert shown.file.getvalue().splitlines() == [
        "[21/40] 2-prune-20 · running",
        "[21/40] 2-prune-20 · 35 s · Export",
        "[21/40] 2-prune-20 · 1:10 min · Export",
    ]


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
