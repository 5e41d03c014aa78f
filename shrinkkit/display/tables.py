"""Tables and statements that show themselves as HTML in a notebook, as Markdown, and as plain text."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

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
        raise NotImplementedError

    def markdown(self) -> str:
        """Return it as Markdown."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        # Each output has its own style: a notebook has no page to keep it in, and may remove other cells.
        return f'{STYLE}<div class="sk">{self.html()}</div>'

    def _repr_markdown_(self) -> str:
        return self.markdown()


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

    def plain(self) -> str:
        return f"{self.text} ({', '.join(self.aside.splitlines())})" if self.aside else self.text

    def markdown(self) -> str:
        text = self.plain().replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
        return f"[{text}]({self.href})" if self.href else text

    def html(self, tag: str, attributes: str, classes: str) -> str:
        names = " ".join(filter(None, [classes, f"sk-{self.tone}" if self.tone else "", "sk-wide" * self.wide]))
        attributes += f' class="{names}"' if names else ""
        attributes += f' data-key="{escape(self.key)}"' if self.key else ""
        text = f'<a href="{escape(self.href)}">{escape(self.text)}</a>' if self.href else escape(self.text)
        return f"<{tag}{attributes}>{text}{f' <small>{escape(self.aside)}</small>' if self.aside else ''}</{tag}>"


@dataclass(frozen=True)
class Column:
    """A column's title, and whether it holds numbers."""

    title: str
    number: bool = False


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

    def markdown(self) -> str:
        lines = ["| " + " | ".join(column.title or " " for column in self.columns) + " |"]
        lines.append("|" + "|".join(" ---: " if column.number else " --- " for column in self.columns) + "|")
        for row in self.rows:
            texts = [cell.markdown() for cell in row]
            lines.append("| " + " | ".join(texts + [""] * (len(self.columns) - len(texts))) + " |")
        return "\n".join([f"**{self.caption}**", "", *lines, *(["", self.note] if self.note else [])]) + "\n"

    def html(self) -> str:
        numbers = ["sk-number" * column.number for column in self.columns]
        head = "".join(
            Cell(column.title).html("th", ' scope="col"', number)
            for column, number in zip(self.columns, numbers, strict=True)
        )
        body = "".join(f"<tr>{self._row(row, numbers)}</tr>" for row in self.rows)
        caption = escape(self.caption)
        table = (
            f'<div class="sk-scroll" role="region" tabindex="0" aria-label="{caption}"><table class="sk-table">'
            f"<caption><span>{caption}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
        table += f'<p class="sk-note">{escape(self.note)}</p>' if self.note else ""
        if len(self.rows) > FOLD if self.folded is None else self.folded:
            table = f'<details class="sk-fold"><summary>{caption}</summary>{table}</details>'
        return f'<div class="sk-marked">{table}</div>' if self.shaded else table

    def _row(self, cells: Sequence[Cell], numbers: Sequence[str]) -> str:
        head, *others = cells
        parts = [head.html("th", ' scope="row"', numbers[0])]
        for i, cell in enumerate(others, 1):
            span = f' colspan="{len(self.columns) - i}"' if cell.wide else ""
            parts.append(cell.html("td", span, "" if cell.wide else numbers[i]))
        return "".join(parts)


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

    def markdown(self) -> str:
        label = f"**{self.label}.** " if self.label else ""
        return "\n\n".join([f"> {label}{self.text}", *self.remarks]) + "\n"

    def html(self) -> str:
        label = f'<p class="sk-label">{escape(self.label)}</p>' if self.label else ""
        remarks = "".join(f"<p>{escape(remark)}</p>" for remark in self.remarks)
        text = re.sub(r"\(95 % CI [^)]*\)", r'<span class="sk-interval">\g<0></span>', escape(self.text))
        text = re.sub(r"(?<=\d) (?=(?:[GMk]B|bytes|ms|pts|points?|%)(?!\w))", "&nbsp;", text)
        tone = f" sk-{self.tone}" if self.tone else ""
        return f'<div class="sk-statement{tone}">{label}<p class="sk-headline">{text}</p>{remarks}</div>'


@dataclass(frozen=True, repr=False)
class Heading(Shown):
    """A heading, of a page (level 1) or of a part of a section (level 3), with a line below it."""

    text: str
    line: str = ""
    level: int = 3

    def __repr__(self) -> str:
        return f"{self.text}\n{self.line}".rstrip()

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}\n" + (f"\n{self.line}\n" if self.line else "")

    def html(self) -> str:
        line = f'<p class="sk-line">{escape(self.line)}</p>' if self.line else ""
        return f"<h{self.level}>{escape(self.text)}</h{self.level}>{line}"


@dataclass(frozen=True, repr=False)
class Command(Shown):
    """A command to copy, with a line about it."""

    text: str
    line: str

    def __repr__(self) -> str:
        return f"{self.line}\n{textwrap.indent(self.text, '  ')}"

    def markdown(self) -> str:
        return f"{self.line}\n\n{textwrap.indent(self.text, '    ')}\n"

    def html(self) -> str:
        return f'<p>{escape(self.line)}</p><pre class="sk-command"><code>{escape(self.text)}</code></pre>'


@dataclass(frozen=True, repr=False)
class Several(Shown):
    """Tables, pictures and statements, one below the other."""

    parts: tuple[Shown, ...]

    def __repr__(self) -> str:
        return "\n\n".join(repr(part) for part in self.parts)

    def markdown(self) -> str:
        return "\n\n".join(part.markdown() for part in self.parts)

    def html(self) -> str:
        return "\n".join(part.html() for part in self.parts)


def facts(caption: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Return a table of names and values, without those that are empty."""
    rows = tuple((Cell(name), Cell(value)) for name, value in pairs if value)
    return Table(caption, (Column(""), Column("")), rows, folded=False)
