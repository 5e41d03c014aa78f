"""Pictures and images: matplotlib's SVG with alternative text, in colours that follow the page's dark mode."""

import base64
import hashlib
import io
import math
import re
import struct
from collections import Counter
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
SHADES, HIGHLIGHT = ("#26424f", "#557887", "#86a5b1", "#b0c6ce", "#d3dfe4"), "#a3244a"
"""Colours of the parts of a bar, from the first on, and of one part that matters: no colour of a variant."""
PAPER = "#fefefe"
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
SIDE, WIDEST = 64, 192
"""Pixels that the shorter side of an image is enlarged to at least, and that the longer one then keeps to."""

_VARIABLES = {
    INK: "var(--sk-ink, currentColor)",
    FAINT: "var(--sk-faint, #8886)",
    PAPER: "var(--sk-paper, #fff)",
    HIGHLIGHT: f"var(--sk-highlight, {HIGHLIGHT})",
    **{colour: f"var(--sk-c{i}, {colour})" for i, colour in enumerate(COLOURS)},
    **{colour: f"var(--sk-p{i}, {colour})" for i, colour in enumerate(SHADES)},
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
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


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
    for axes in figure.axes:
        axes.patch.set_visible(False)
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # keeps the layout, which costs as much as a drawing
    figure.savefig(still, format="png", dpi=90, facecolor="white", metadata={"Software": None})
    svg = _minified(buffer.getvalue())
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    mark = "sk" + hashlib.sha256(svg.encode()).hexdigest()[:6]
    svg = _with_classes(_with_ids(svg, mark), mark)
    box = re.search(r'viewBox="[^"]*"', svg)
    # A line of the page is as long as 9.2 inches of a drawing, so that letters are of one size in all pictures.
    width = f"--sk-width: {66 / 9.2 * figure.get_figwidth():.0f}rem"
    opening = (
        f'<svg {box.group() if box else ""} role="img" aria-label="{escape(alt)}" style="{width}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    svg = re.sub(r"<svg\b[^>]*>", lambda _: opening, svg, count=1).strip()
    return Picture(svg, alt, caption, base64.b64encode(still.getvalue()).decode())


def _with_ids(svg: str, mark: str) -> str:
    """Return the same drawing with short ids that begin with `mark`; `point-` ids are kept behind it."""
    ids: dict[str, str] = {}

    def named(match: re.Match[str]) -> str:
        name = match[2] if match[2].startswith("point-") else ids.setdefault(match[2], str(len(ids)))
        return f"{match[1]}{mark}-{name}"

    return re.sub(r'(\bid="|href="#|url\(#)([^")]+)', named, svg)


def _with_classes(svg: str, mark: str) -> str:
    """Return the same drawing with styles of several elements as classes, whose names begin with `mark`."""
    pattern = r'(?<= )style="([^"]*)"'
    counts = Counter(re.findall(pattern, svg)).items()
    names = {style: f"{mark}-s{i}" for i, (style, count) in enumerate(counts) if count > 2}
    svg = re.sub(pattern, lambda m: f'class="{names[m[1]]}"' if m[1] in names else m.group(), svg)
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return re.sub(r"<svg\b[^>]*>", lambda m: f"{m.group()}<style>{rules}</style>", svg, count=1)


def _relative(path: str) -> str:
    """Return an SVG path of straight lines with relative coordinates in tenths, which takes a third of the characters.

    Paths with curves are returned unchanged.
    """
    if re.search(r"[^MLz\d. -]", path):
        return path
    commands, at, start = [], (0, 0), (0, 0)
    for command, x, y in re.findall(r"([ML]) (\S+) (\S+)|z", path):
        if not command:
            commands.append("z")
            at = start
            continue
        to = round(10 * float(x)), round(10 * float(y))
        dx, dy = ((new - old) / 10 for new, old in zip(to, at, strict=True))
        step = f"h{dx:g}" if not dy else f"v{dy:g}" if not dx else f"l{dx:g} {dy:g}"
        first = not commands
        commands.append(f"{'M' if first else 'm'}{dx:g} {dy:g}" if command == "M" else step)
        start, at = (to if command == "M" else start), to
    return "".join(commands)


def _minified(svg: str) -> str:
    """Return the same drawing without metadata, empty groups, unreferenced ids, and digits beyond hundredths.

    Ids that begin with `point-` are kept, because widgets make such marks clickable.
    """
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Numbers in texts keep their digits.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(-?\d+\.\d{2})\d+", r"\1", tag.group()), svg)
    svg = re.sub(r"font: ([^;\"']*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--sk-font, sans-serif)", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sk-font, sans-serif)", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    svg = re.sub(r"; stroke-linejoin: miter|; stroke-linecap: butt", "", svg)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r'\sid="(?!point-)([^"]*)"', lambda match: match.group() if match[1] in used else "", svg)
    svg = re.sub(r'(?<=\sd=")[^"]*', lambda match: _relative(" ".join(match.group().split())), svg)
    count = 1
    while count:  # Emptied groups leave emptier ones behind.
        single = r"<(?:path|use)\b[^>]*/>|<text\b[^>]*>[^<]*</text>"
        svg, count = re.subn(rf"<g>\s*</g>|<g */>|<g>\s*({single})\s*</g>", lambda m: m[1] or "", svg)
    return _merged(re.sub(r"\n\s*", "\n", svg))


def _merged(svg: str) -> str:
    """Return the same drawing with lines that follow each other and look alike as one path."""
    lines: list[str] = []
    last = ""
    for line in svg.split("\n"):
        match = re.fullmatch(r'<path d="([^"]*)"((?: clip-path="[^"]*")? style="fill: none[^"]*")/>', line)
        if match and match[2] == last and match[1].startswith("M"):
            lines[-1] = f'{lines[-1][: -len(last) - 3]}{match[1]}"{last}/>'
        else:
            lines.append(line)
        last = match[2] if match else ""
    return "\n".join(lines)
