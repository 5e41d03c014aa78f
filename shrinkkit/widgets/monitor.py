"""Live view of a latency comparison: the 95 % interval of each speed-up over time, and a stop button.

Updated between blocks as text that takes a millisecond to make, so that it does not disturb the timing.
"""

import math
import threading
from collections.abc import Mapping
from html import escape

from IPython.core.getipython import get_ipython

from shrinkkit.core import estimate
from shrinkkit.core.estimate import MARGIN, Estimate
from shrinkkit.core.evidence import PairedSamples, log_ratios
from shrinkkit.display import formats, tables
from shrinkkit.display.picture import COLOURS, FAINT, INK
from shrinkkit.display.tables import Cell, Table
from shrinkkit.widgets import live
from shrinkkit.widgets.live import Live

WIDTH, HEIGHT = 260, 44
SPAN = 0.05
"""Half the height of a chart, as a fraction of the last speed-up."""
_NOTE = (
    "Charts span \N{PLUS-MINUS SIGN}5 % around the last value. Band: 95 % interval of the speed-up vs. FP32, same "
    "runtime; grey: \N{PLUS-MINUS SIGN}1 %, which counts as no difference. Timing ends when the interval is narrow "
    "enough or the time is over, whatever the result."
)

Course = list[tuple[int, Estimate]]
"""The speed-up estimated after so many blocks, in the order of time."""


class TimingMonitor:
    """Timing callback that shows each comparison and stops when its button is clicked."""

    def __init__(self) -> None:
        """Show the button and an empty view."""
        from ipywidgets import Button, Layout

        self.courses: dict[str, Course] = {}
        self._stop = threading.Event()
        self._button = Button(description="Stop timing", layout=Layout(width="auto"))
        self._button.on_click(self.stop)
        live.show_controls(self._button, "a button that stops the timing; an interrupted comparison gets no verdict")
        self._set(enabled=False)
        self._live = Live(table({}))
        self._shell = get_ipython()
        if self._shell:
            self._shell.events.register("post_run_cell", self._end)

    def _set(self, *, enabled: bool) -> None:
        self._button.disabled = not enabled
        # ipykernel routes messages of a widget to the shell that sent its last one, which is busy timing. Without this
        # attribute it uses the subshell that JupyterLab asks for.
        vars(self._button.comm).pop("_reply_subshell_id", None)

    def stop(self, _: object = None) -> None:
        """End the timing at the next block."""
        self._stop.set()
        self._set(enabled=False)

    def _end(self, _: object) -> None:
        """Disable the button at the end of the cell, whatever it ended with."""
        self._set(enabled=False)
        if self._shell:
            self._shell.events.unregister("post_run_cell", self._end)

    def __call__(self, name: str, samples: PairedSamples) -> bool:
        """Show the estimate of the samples so far and return whether to stop."""
        course = self.courses.setdefault(name, [])
        if course and course[-1][0] >= len(samples):  # too noisy, and timed again
            course.clear()
        course.append((len(samples), estimate.block_ratio(log_ratios(samples, min))))
        stopped = self._stop.is_set()
        self._set(enabled=not stopped)
        self._live.show(table(self.courses, stopped=stopped))
        return stopped


def table(courses: Mapping[str, Course], *, stopped: bool = False) -> Table:
    """Return the course of each comparison as a chart, all on the same scale."""
    caption = f"Speed-up over time: {formats.counted(len(courses), 'comparison')}"
    if stopped:
        caption = f"Interrupted in comparison {len(courses)}, which gets no verdict"
    rows: list[tables.Row] = []
    for name, course in courses.items():
        row: tables.Row = {"variant": name, "95 % CI over time": Cell(_summary(course), svg=_chart(name, course))}
        rows.append({**row, "speed-up": _last(course), "blocks": str(course[-1][0])})
    return tables.table(caption, rows, _NOTE, text=("95 % CI over time",), folded=False)


def _summary(course: Course) -> str:
    blocks, first = course[0]
    return f"{formats.interval(first)} after {blocks} blocks, {_last(course)} after {course[-1][0]}"


def _last(course: Course) -> str:
    speedup = course[-1][1]
    return f"{formats.times(speedup.value)} {formats.interval(speedup)}"


def _chart(name: str, course: Course) -> str:
    """Return the course of an interval as SVG, written by hand: matplotlib would take the processor for too long."""
    total, centre, reach = max(course[-1][0], 2), math.log(course[-1][1].value), math.log1p(SPAN)
    points = [(0, course[0][1]), *course]  # a band needs two points

    def line(ratios: list[float]) -> list[str]:
        heights = [max(-1.0, min(1.0, (math.log(ratio) - centre) / reach)) for ratio in ratios]
        xs = [4 + (WIDTH - 8) * blocks / total for blocks, _ in points]
        return [f"{x:.1f},{HEIGHT / 2 - y * (HEIGHT / 2 - 2):.1f}" for x, y in zip(xs, heights, strict=True)]

    band = line([e.high for _, e in points]) + line([e.low for _, e in points])[::-1]
    margin = HEIGHT / 2 * math.log1p(MARGIN) / reach
    blue = f"var(--sk-c0, {COLOURS[0]})"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" style="width:{WIDTH}px" role="img" '
        f'aria-label="{escape(f"{name}: {_summary(course)}")}">'
        f'<rect y="{HEIGHT / 2 - margin:.1f}" width="{WIDTH}" height="{2 * margin:.1f}" '
        f'style="fill:var(--sk-faint, {FAINT})"/>'
        f'<polygon points="{" ".join(band)}" style="fill:{blue};opacity:.35"/>'
        f'<polyline points="{" ".join(line([e.value for _, e in points]))}" '
        f'style="fill:none;stroke:{blue};stroke-width:1.5"/>'
        f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT - 0.5}" y2="{HEIGHT - 0.5}" style="stroke:var(--sk-ink, {INK});'
        'stroke-width:.4"/></svg>'
    )
