"""Tables and statements that show themselves as HTML in a notebook, as Markdown, and as plain text.

Their HTML and Markdown are the macros in shown.html.j2 and shown.md.j2.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from shrinkkit.display import formats

FOLD = 12
"""Longer tables are folded under their caption."""
WIDEST = 44
"""Characters of a column in plain text at most."""
STYLE = f'<style class="sk-style">{Path(__file__).with_name("notebook.css").read_text("utf-8")}</style>'
"""Makes an output legible in a notebook, light or dark; a page with its own style sheet drops this."""


class Shown:
    """Shows itself in a notebook as HTML, in a text as Markdown, and in a terminal as plain text (its `repr`)."""

    def html(self) -> str:
        """Return it as a part of a page that has the report's style."""
        return str(getattr(_macros("html"), type(self).__name__)(self))

    def markdown(self) -> str:
        """Return it as Markdown."""
        return str(getattr(_macros("md"), type(self).__name__)(self))

    def _repr_html_(self) -> str:
        # Each output has its own style: a notebook has no page to keep it in, and may remove other cells.
        return f'{STYLE}<div class="sk">{self.html()}</div>'

    def _repr_markdown_(self) -> str:
        return self.markdown()


@cache
def _macros(form: str) -> Any:
    """Return the macros that show each class as `html` or `md`, by its name."""
    from jinja2 import Environment, FileSystemLoader

    options: dict[str, Any] = {"autoescape": form == "html", "trim_blocks": True, "keep_trailing_newline": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **options)
    environment.filters |= {"typeset": _typeset, "anchor": anchor}
    return environment.get_template(f"shown.{form}.j2").module


def anchor(heading: str) -> str:
    """Return the id of a section by its heading."""
    return re.sub(r"\W+", "-", heading.lower()).strip("-") or "section"


def _typeset(text: str) -> str:
    """Return a sentence as HTML, with intervals in their own style and numbers that stay with their units."""
    text = re.sub(r"\(95 % CI [^)]*\)", r'<span class="sk-interval">\g<0></span>', escape(text))
    return re.sub(r"(?<=\d) (?=(?:[GMk]B|bytes|ms|pts|points?|%)(?!\w))", "&nbsp;", text)


@dataclass(frozen=True)
class Cell:
    """A cell: its text, an aside in small print such as an interval, and a tone that is never the only sign."""

    text: str
    aside: str = ""
    tone: str = ""
    """`good`, `bad`, `warning` or `quiet`; '' for plain."""
    wide: bool = False
    """Takes the rest of its row."""
    href: str = ""
    key: str = ""
    """Sorts the rows of a page with a script, where the text does not."""
    svg: str = ""
    """Shown in place of the text, which describes it."""

    def plain(self) -> str:
        return f"{self.text} ({', '.join(self.aside.splitlines())})" if self.aside else self.text


@dataclass(frozen=True)
class Column:
    """A column's title, and whether it holds numbers."""

    title: str
    number: bool = False


Row = Mapping[str, Cell | str]
"""Cells by the titles of their columns."""


@dataclass(frozen=True, repr=False)
class Table(Shown):
    """A table whose first column names its rows."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    folded: bool | None = None
    """None folds a table of more than `FOLD` rows."""
    shaded: bool = False
    """Whether cells with a tone have its colour as background."""
    key: str = ""
    """Its id on a page, for links."""
    facet: str = ""
    """The column by whose values a page with a script filters the rows; '' offers no filter."""
    details: tuple[tuple[tuple[str, Cell], ...], ...] = ()
    """Facts by title that each row unfolds into on a page with a script; () for none."""

    @property
    def is_folded(self) -> bool:
        return len(self.rows) > FOLD if self.folded is None else self.folded

    def __repr__(self) -> str:
        rows = [[column.title for column in self.columns], *([cell.plain() for cell in row] for row in self.rows)]
        count = len(self.columns)
        # A wide cell, which ends a shorter row, stretches no column.
        texts = [[row[i] for row in rows if i < len(row) - (len(row) < count)] for i in range(count)]
        widths = [min(max(map(len, column)), WIDEST) for column in texts]
        lines = [
            "  ".join(
                text.rjust(width) if column.number and len(row) == len(widths) else text.ljust(width)
                for text, width, column in zip(row, widths, self.columns, strict=False)
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.caption, *lines, *textwrap.wrap(self.note, 100)])


@dataclass(frozen=True, repr=False)
class Statement(Shown):
    """A sentence in large type, with remarks below it."""

    text: str
    remarks: tuple[str, ...] = ()
    tone: str = ""
    label: str = ""
    """A word or two above the sentence."""

    def __repr__(self) -> str:
        return "\n".join([f"{self.label}: {self.text}" if self.label else self.text, *self.remarks])


@dataclass(frozen=True)
class Cause:
    """Warnings with one cause: `2`, `timing`, `too noisy`, the section that shows more, and what to know."""

    count: int
    noun: str
    state: str
    section: str
    sentences: tuple[str, ...]

    @property
    def caption(self) -> str:
        return f"{formats.counted(self.count, self.noun)} {self.state}"


@dataclass(frozen=True, repr=False)
class Warnings(Shown):
    """Warnings by cause, counted and folded."""

    causes: tuple[Cause, ...]

    @property
    def caption(self) -> str:
        return formats.counted(sum(cause.count for cause in self.causes), "warning")

    def __repr__(self) -> str:
        counts = f"{self.caption}: {', '.join(cause.caption for cause in self.causes)}"
        return "\n".join([counts, *(f"- {text}" for cause in self.causes for text in cause.sentences)])


@dataclass(frozen=True, repr=False)
class Download(Shown):
    """A file to take: its address, its SHA-256, and the code that loads it; further files go with it."""

    path: str
    """Relative to the page."""
    beside: tuple[str, ...]
    size: str
    sha256: str
    code: str
    readme: str
    """Path of its description."""

    def __repr__(self) -> str:
        return f"Model file: {', '.join([self.path, *self.beside])} ({self.size}), SHA-256 {self.sha256}"


@dataclass(frozen=True, repr=False)
class Figures(Shown):
    """A few figures in large type, by title; the text of a cell is large and its aside small."""

    cells: tuple[tuple[str, Cell], ...]

    def __repr__(self) -> str:
        return "\n".join(f"{title}: {cell.plain()}" for title, cell in self.cells)


@dataclass(frozen=True, repr=False)
class Heading(Shown):
    """A heading, of a page (level 1) or of a part of a section (level 3), with a line below it."""

    text: str
    line: str = ""
    level: int = 3

    def __repr__(self) -> str:
        return f"{self.text}\n{self.line}".rstrip()


@dataclass(frozen=True, repr=False)
class Command(Shown):
    """A command to copy, with a line about it."""

    text: str
    line: str

    def __repr__(self) -> str:
        return f"{self.line}\n{textwrap.indent(self.text, '  ')}"


@dataclass(frozen=True, repr=False)
class Several(Shown):
    """Tables, pictures and statements, one below the other."""

    parts: tuple[Shown, ...]

    def __repr__(self) -> str:
        return "\n\n".join(repr(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class ProgressBar(Shown):
    """The progress of long work."""

    work: str
    done: float
    total: float
    note: str = ""
    elapsed_s: float = 0.0

    def __repr__(self) -> str:
        share = formats.percent(self.done / self.total) if self.done < self.total else "done"
        state = f"{share} in {self.elapsed_s:.1f} s" if self.done else "running" if self.total else "nothing to do"
        left_s = self.elapsed_s * (self.total / self.done - 1) if self.done else 0
        left = f"{left_s:.0f} s" if left_s < 120 else f"{left_s / 60:.0f} min"
        rest = f", about {left} left" if self.elapsed_s >= 2 and left_s >= 1 else ""
        return f"{self.work}{f' ({self.note})' if self.note else ''}: {state}{rest}"


def table(
    caption: str,
    rows: Sequence[Row],
    note: str = "",
    *,
    text: Sequence[str] = (),
    folded: bool | None = None,
    shaded: bool = False,
) -> Table:
    """Return a table with the columns of the longest row that are not empty; all but the first and `text` are numbers.

    Cells that a row lacks are empty, unless it ends with a wide cell.
    """
    made = [{title: cell if isinstance(cell, Cell) else Cell(cell) for title, cell in row.items()} for row in rows]
    filled = {title for row in made for title, cell in row.items() if cell.text}
    titles = [title for title in max(made, key=len, default={}) if title in filled]
    columns = tuple(Column(title, number=i > 0 and title not in text) for i, title in enumerate(titles))
    cells = (
        [cell for title, cell in row.items() if cell.wide or title in titles]
        if any(cell.wide for cell in row.values())
        else [row.get(title, Cell("")) for title in titles]
        for row in made
    )
    return Table(caption, columns, tuple(map(tuple, cells)), note, folded, shaded)


def facts(caption: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Return a table of names and values, without those that are empty."""
    rows = tuple((Cell(name), Cell(value)) for name, value in pairs if value)
    return Table(caption, (Column(""), Column("")), rows, folded=False)
