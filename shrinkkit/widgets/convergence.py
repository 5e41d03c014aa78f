"""A benchmark to look on at: how the interval of each comparison narrows while models take turns, and a stop button.

Drawn between blocks, as text that costs a millisecond, so that what is timed does not notice. What is stopped by hand
gets no verdict; see `blocks.conclude`.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from shrinkkit.core import estimate
from shrinkkit.core.estimate import MARGIN, Estimate
from shrinkkit.core.samples import Blocks, log_ratios
from shrinkkit.display import formats
from shrinkkit.display.picture import COLOURS, FAINT, INK
from shrinkkit.display.tables import Shown
from shrinkkit.widgets import live
from shrinkkit.widgets.live import Live

WIDTH, HEIGHT = 260, 44
SPAN = 0.05
"""Of each picture, up and down from the last value, as a share of it."""


@dataclass
class Course:
    """How one comparison went: the estimate after so many blocks, in the order of time."""

    name: str
    seen: list[tuple[int, Estimate]] = field(default_factory=list)


class Race:
    """Looks on at `trials.race`: pass it as `watch`. Shows every comparison's course; a button ends the race."""

    def __init__(self) -> None:
        """Show the button and what there is to see as yet."""
        from ipywidgets import Button, Layout

        self.courses: dict[str, Course] = {}
        self.stop = threading.Event()
        button = Button(description="Stop timing", layout=Layout(width="auto"))
        button.on_click(self._pressed)
        live.show_controls(button, said="a button that stops the timing; what is stopped gets no verdict")
        # ipykernel hands what a widget says to the shell that it was made in, which will be busy timing. Without its
        # note of that it takes the subshell that JupyterLab asks for, which is free.
        vars(button.comm).pop("_reply_subshell_id", None)
        self._live = Live(Courses((), of=0))

    def _pressed(self, button: object) -> None:
        self.stop.set()

    def __call__(self, name: str, turn: int, of: int, blocks: Blocks) -> bool:
        """Show what the blocks say by now and return whether the button was pressed."""
        course = self.courses.setdefault(name, Course(name))
        if course.seen and course.seen[-1][0] >= len(blocks):
            # It was too noisy and is timed again.
            course.seen.clear()
        course.seen.append((len(blocks), estimate.block_ratio(log_ratios(blocks, min))))
        stopped = self.stop.is_set()
        self._live.show(Courses(tuple(self.courses.values()), of=of, stopped=stopped))
        return stopped


@dataclass(frozen=True, repr=False)
class Courses(Shown):
    """The courses of comparisons, one small picture each, all on the same scale."""

    courses: Sequence[Course]
    of: int
    """How many comparisons there will be."""
    stopped: bool = False

    def __repr__(self) -> str:
        """Return it as plain text."""
        return "\n".join([self._caption(), *(f"  {one.name}: {_words(one)}" for one in self.courses)])

    def markdown(self) -> str:
        """Return it in words."""
        return (
            "\n".join([f"**{self._caption()}**", "", *(f"- {one.name}: {_words(one)}" for one in self.courses)]) + "\n"
        )

    def html(self) -> str:
        """Return it as a table of small pictures."""
        rows = "".join(
            f'<tr><th scope="row">{escape(one.name)}</th><td>{_picture(one)}</td>'
            f'<td class="sk-number">{escape(_now(one))}</td><td class="sk-number">{one.seen[-1][0]}</td></tr>'
            for one in self.courses
        )
        head = "".join(f'<th scope="col">{name}</th>' for name in ("variant", "95 % interval over time"))
        head += "".join(f'<th scope="col" class="sk-number">{name}</th>' for name in ("speed-up", "blocks"))
        caption = escape(self._caption())
        return (
            f'<div class="sk-scroll" role="region" tabindex="0" aria-label="{caption}"><table class="sk-table">'
            f"<caption><span>{caption}</span></caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
            f'<p class="sk-note">{_NOTE}</p>'
        )

    def _caption(self) -> str:
        if not self.courses:
            return "Timing begins; long before the first verdict, its interval will be seen to narrow"
        if self.stopped:
            return f"Stopped by hand in comparison {len(self.courses)} of {self.of}, which gets no verdict"
        return f"How the intervals narrowed: {len(self.courses)} of {formats.counted(self.of, 'comparison')}"


_NOTE = (
    "Each picture spans 5 % up and down from its last value; the band is the 95 % interval of the speed-up against "
    "FP32 here, the grey one 1 % around it, which is what counts as no difference. Measuring ends when the interval is "
    "narrow enough or the time is over, never because of what it says."
)


def _words(one: Course) -> str:
    blocks, first = one.seen[0]
    return f"{formats.interval(first)} after {blocks} blocks, {_now(one)} after {one.seen[-1][0]}"


def _now(one: Course) -> str:
    last = one.seen[-1][1]
    return f"{formats.times(last.value)} {formats.interval(last)}"


def _picture(one: Course) -> str:
    """Return the course of an interval as SVG, written by hand: matplotlib would take the processor for too long."""
    centre, most = math.log(one.seen[-1][1].value), max(one.seen[-1][0], 2)
    reach = math.log1p(SPAN)

    def x(blocks: int) -> str:
        return f"{4 + (WIDTH - 8) * blocks / most:.1f}"

    def y(ratio: float) -> str:
        share = max(-1.0, min(1.0, (math.log(ratio) - centre) / reach))
        return f"{HEIGHT / 2 - share * (HEIGHT / 2 - 2):.1f}"

    # Before the second glance there is but one point; a band needs two.
    seen = [(0, one.seen[0][1]), *one.seen]
    ceiling = " ".join(f"{x(n)},{y(e.high)}" for n, e in seen)
    floor = " ".join(f"{x(n)},{y(e.low)}" for n, e in reversed(seen))
    middle = " ".join(f"{x(n)},{y(e.value)}" for n, e in seen)
    margin = HEIGHT / 2 * math.log1p(MARGIN) / reach
    blue = f"var(--sk-c0, {COLOURS[0]})"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" style="width:{WIDTH}px" role="img" aria-label="'
        f'{escape(f"{one.name}: {_words(one)}")}"><rect x="0" y="{HEIGHT / 2 - margin:.1f}" width="{WIDTH}" '
        f'height="{2 * margin:.1f}" style="fill:var(--sk-faint, {FAINT})"/>'
        f'<polygon points="{ceiling} {floor}" style="fill:{blue};opacity:.35"/>'
        f'<polyline points="{middle}" style="fill:none;stroke:{blue};stroke-width:1.5"/>'
        f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT - 0.5}" y2="{HEIGHT - 0.5}" style="stroke:var(--sk-ink, {INK});'
        'stroke-width:.4"/></svg>'
    )
