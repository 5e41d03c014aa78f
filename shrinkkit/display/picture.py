"""Pictures and images: matplotlib's SVG with alternative text, in colours that follow the page's dark mode."""

import base64
import hashlib
import io
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from shrinkkit.display.tables import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


INK, FAINT, GREY = "#1b2126", "#dfe3e6", "#7a8288"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#6a51a3")
"""Okabe and Ito's colour-blind safe palette with purple; brown replaces their yellow, which does not show on white."""
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
SIDE, WIDEST = 64, 192
"""Pixels that the shorter side of an image is enlarged to at least, and that the longer one then keeps to."""

_VARIABLES = {
    INK: "var(--sk-ink, currentColor)",
    FAINT: "var(--sk-faint, #8886)",
    **{colour: f"var(--sk-c{i}, {colour})" for i, colour in enumerate(COLOURS)},
}


@dataclass(frozen=True, repr=False)
class Picture(Shown):
    """An SVG with alternative text and a caption."""

    svg: str
    alt: str
    caption: str
    png: str = ""
    """The same in base64, for viewers that remove SVG, such as GitHub's; '' leaves it out."""
    data: str = ""
    """JSON from which a page with a script draws an interactive form; '' if there is none."""

    def __repr__(self) -> str:
        return f"[picture: {self.alt}]"


@dataclass(frozen=True)
class Image:
    """A small PNG in base64, with alternative text and a short caption."""

    png: str
    alt: str
    caption: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels at which it is shown: enlarged by a whole number."""
        width, height = struct.unpack(">II", base64.b64decode(self.png[:32])[16:24])
        factor = max(1, min(math.ceil(SIDE / min(width, height)), WIDEST // max(width, height)))
        return factor * width, factor * height


@dataclass(frozen=True, repr=False)
class Strip(Shown):
    """Images side by side."""

    caption: str
    images: tuple[Image, ...]

    def __repr__(self) -> str:
        return "\n".join([self.caption, *(f"  {image.alt}" for image in self.images)])


def style(index: int) -> dict[str, str]:
    """Return colour and marker of the series number `index`: the pair repeats after 56."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
    }


@contextmanager
def canvas(width: float, height: float) -> Iterator["Figure"]:
    """Give a figure of `width` by `height` inches, in colours that `picture` turns into variables of the page."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(Path(__file__).with_name("figure.mplstyle")):
        yield Figure(figsize=(width, height), layout="constrained")


def picture(figure: "Figure", alt: str, caption: str) -> Picture:
    """Return the drawing on a `canvas` as inline SVG, the same bytes each time; `alt` says in words all it shows."""
    still, buffer = io.BytesIO(), io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # keeps the layout, which costs as much as a drawing
    figure.savefig(still, format="png", dpi=90, facecolor="white", metadata={"Software": None})
    svg = _minified(buffer.getvalue())
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    mark = "sk" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    # A line of the page is as long as 9.2 inches of a drawing, so that letters are of one size in all pictures.
    width = f"--sk-width: {66 / 9.2 * figure.get_figwidth():.0f}rem"
    opening = (
        f'<svg {box.group() if box else ""} role="img" aria-label="{escape(alt)}" style="{width}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    svg = re.sub(r"<svg\b[^>]*>", lambda _: opening, svg, count=1).strip()
    return Picture(svg, alt, caption, base64.b64encode(still.getvalue()).decode())


def _minified(svg: str) -> str:
    """Return the same drawing without metadata, empty groups, unreferenced ids, and digits beyond hundredths.

    Ids that begin with `point-` are kept, because widgets make such marks clickable.
    """
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Numbers in texts keep their digits.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(-?\d+\.\d{2})\d+", r"\1", tag.group()), svg)
    svg = re.sub(r"font: ([^;\"']*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--sk-font, sans-serif)", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sk-font, sans-serif)", svg)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r'\sid="(?!point-)([^"]*)"', lambda match: match.group() if match[1] in used else "", svg)
    svg = re.sub(r'(?<=\sd=")[^"]*', lambda match: " ".join(match.group().split()), svg)
    count = 1
    while count:  # Emptied groups leave emptier ones behind.
        svg, count = re.subn(r"<g>\s*</g>|<g>\s*(<(?:path|text|use)\b[^>]*/>)\s*</g>", lambda m: m[1] or "", svg)
    return re.sub(r"\n\s*", "\n", svg)
