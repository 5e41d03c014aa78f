"""Pictures: matplotlib's SVG with alt text and a caption, in colours that a page can give a dark mode its own of."""

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from shrinkkit.display.tables import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


INK, FAINT = "#1b2126", "#dfe3e6"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000")
"""Okabe and Ito's, which colour-blind readers can tell apart, and a brown where theirs would not show on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_VARIABLES = {
    INK: "var(--sk-ink, currentColor)",
    FAINT: "var(--sk-faint, #8886)",
    **{colour: f"var(--sk-c{i}, {colour})" for i, colour in enumerate(COLOURS)},
}


@dataclass(frozen=True, repr=False)
class Picture(Shown):
    """An SVG with the text that stands in for it, and a caption."""

    svg: str
    alt: str
    caption: str
    png: str = ""
    """The same in base64, for viewers that take SVG out of what they show, as GitHub's does; '' leaves it out."""

    def __repr__(self) -> str:
        """Return it as plain text."""
        return f"[picture: {self.alt}]"

    def markdown(self) -> str:
        """Return it in words."""
        return f"*Picture, in words:* {self.alt}\n\n{self.caption}\n"

    def html(self) -> str:
        """Return it as a figure."""
        # Viewers that remove the SVG do not know `hidden` either, so that they show the image.
        still = f'<img hidden alt="{escape(self.alt)}" src="data:image/png;base64,{self.png}">' if self.png else ""
        return (
            f'<figure class="sk-figure" role="group"><div class="sk-scroll" tabindex="0" role="region" '
            f'aria-label="{escape(self.caption)}">{self.svg}{still}</div>'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


@contextmanager
def canvas(width: float, height: float) -> Iterator["Figure"]:
    """Give a figure of `width` by `height` inches, drawn in colours that `picture` turns into variables."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "shrinkkit",
        "path.simplify": False,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "grid.linewidth": 0.7,
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def picture(figure: "Figure", alt: str, caption: str) -> Picture:
    """Return what is drawn on `figure` as inline SVG, the same bytes each time.

    Args:
        figure: From `canvas`, while it is open.
        alt: What the picture shows, numbers included, for those who cannot see it.
        caption: A sentence or two below it.
    """
    still, buffer = io.BytesIO(), io.StringIO()
    figure.savefig(still, format="png", dpi=90, facecolor="white", metadata={"Software": None})
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Hundredths of a point are enough for coordinates; the numbers in texts stay as they are.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(-?\d+\.\d{2})\d+", r"\1", tag.group()), svg)
    svg = re.sub(r"font: ([^;\"']*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--sk-font, sans-serif)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = _light(svg)
    mark = "sk" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="', f'id="{mark}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    # A line of the page is as long as 9.2 inches of a drawing, so that letters are of one size in all pictures.
    width = f"--sk-width: {66 / 9.2 * figure.get_figwidth():.0f}rem"
    opening = (
        f'<svg {box.group() if box else ""} role="img" aria-label="{escape(alt)}" style="{width}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    svg = re.sub(r"\n\s*", "\n", re.sub(r"<svg\b[^>]*>", lambda _: opening, svg, count=1)).strip()
    return Picture(svg, alt, caption, base64.b64encode(still.getvalue()).decode())


def _light(svg: str) -> str:
    """Return the same picture without what no browser draws: groups around nothing, ids that nobody names, spaces.

    Ids that begin with `point-` are kept: who draws them means them to be clicked.
    """
    named = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(
        r'\sid="([^"]*)"',
        lambda found: found.group() if found[1] in named or found[1].startswith("point-") else "",
        svg,
    )
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sk-font, sans-serif)", svg)
    svg = re.sub(r'(?<=\sd=")[^"]*', lambda found: " ".join(found.group().split()), svg)
    # Emptied groups leave emptier ones behind.
    count = 1
    while count:
        svg, count = re.subn(
            r"<g>\s*</g>|<g>\s*(<(?:path|text|use)\b[^>]*/>)\s*</g>", lambda found: found[1] or "", svg
        )
    return svg
