"""Tables and statements that show themselves as HTML in a notebook, as Markdown, and as plain text."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLD = 12
"""Longer tables are folded under their caption."""
STYLE = f'<style class="sk-style">{Path(__file__).with_name("notebook.css").read_text("utf-8")}</style>'
"""What makes an output legible in a notebook, light or dark; a page of its own has the whole style and drops this."""


class Shown:
    """What shows itself in a notebook as HTML, in a text as Markdown, and in a terminal as plain text (its `repr`)."""

    def html(self) -> str:
        """Return it as a part of a page that has the report's style."""
        raise NotImplementedError

    def markdown(self) -> str:
        """Return it as Markdown."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        # An output brings its style along: a notebook has no page to keep it in, and takes cells out of sight away.
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

    def __repr__(self) -> str:
        """Return it as plain text."""
        rows = [[column.title for column in self.columns], *(_plain(row) for row in self.rows)]
        widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(len(self.columns))]
        # A remark that takes the rest of its row would stretch one column for all of them.
        widths = [min(width, 44) for width in widths]
        lines = [
            "  ".join(
                text.rjust(width) if column.number and len(row) == len(widths) else text.ljust(width)
                for text, width, column in zip(row, widths, self.columns, strict=False)
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.caption, *lines, *textwrap.wrap(self.note, 100)])

    def markdown(self) -> str:
        """Return it as a Markdown table."""
        lines = ["| " + " | ".join(column.title or " " for column in self.columns) + " |"]
        lines.append("|" + "|".join(" ---: " if column.number else " --- " for column in self.columns) + "|")
        for row in self.rows:
            texts = [_markdown(cell) for cell in row]
            lines.append("| " + " | ".join(texts + [""] * (len(self.columns) - len(texts))) + " |")
        return "\n".join([f"**{self.caption}**", "", *lines, *(["", self.note] if self.note else [])]) + "\n"

    def html(self) -> str:
        """Return it as a part of a page."""
        head = "".join(f'<th scope="col"{_number(column)}>{escape(column.title)}</th>' for column in self.columns)
        body = "".join(f"<tr>{self._row(row)}</tr>" for row in self.rows)
        caption = escape(self.caption)
        table = (
            f'<div class="sk-scroll" role="region" tabindex="0" aria-label="{caption}"><table class="sk-table">'
            f"<caption><span>{caption}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
        note = f'<p class="sk-note">{escape(self.note)}</p>' if self.note else ""
        if len(self.rows) > FOLD if self.folded is None else self.folded:
            return f'<details class="sk-fold"><summary>{caption}</summary>{table}{note}</details>'
        return table + note

    def _row(self, cells: Sequence[Cell]) -> str:
        parts = []
        for i, (cell, column) in enumerate(zip(cells, self.columns, strict=False)):
            span = f' colspan="{len(self.columns) - i}"' if cell.wide else ""
            kind = f' class="{" ".join(filter(None, ["sk-number" * (column.number and not cell.wide), _tone(cell)]))}"'
            kind = "" if kind == ' class=""' else kind
            tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
            parts.append(f"<{tag}{scope}{span}{kind}>{_html(cell)}</{tag}>")
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
        """Return it as plain text."""
        return "\n".join([f"{self.label}: {self.text}" if self.label else self.text, *self.remarks])

    def markdown(self) -> str:
        """Return it as Markdown."""
        label = f"**{self.label}.** " if self.label else ""
        return "\n\n".join([f"> {label}{self.text}", *self.remarks]) + "\n"

    def html(self) -> str:
        """Return it as a part of a page."""
        label = f'<p class="sk-label">{escape(self.label)}</p>' if self.label else ""
        remarks = "".join(f"<p>{escape(remark)}</p>" for remark in self.remarks)
        tone = f" sk-{self.tone}" if self.tone else ""
        text = re.sub(r"\[[^\]]*\d[^\]]*\]", r'<span class="sk-interval">\g<0></span>', escape(self.text))
        text = re.sub(r"(?<=\d) (?=(?:[GMk]B|bytes|ms|points?|%|\N{MULTIPLICATION SIGN})(?!\w))", "&nbsp;", text)
        return f'<div class="sk-statement{tone}">{label}<p class="sk-headline">{text}</p>{remarks}</div>'


@dataclass(frozen=True, repr=False)
class Title(Shown):
    """The heading of a page, with a line below it."""

    text: str
    line: str

    def __repr__(self) -> str:
        """Return it as plain text."""
        return f"{self.text}\n{self.line}"

    def markdown(self) -> str:
        """Return it as Markdown."""
        return f"# {self.text}\n\n{self.line}\n"

    def html(self) -> str:
        """Return it as a part of a page."""
        return f'<h1 class="sk-title">{escape(self.text)}</h1><p class="sk-line">{escape(self.line)}</p>'


@dataclass(frozen=True, repr=False)
class Heading(Shown):
    """The heading of a part of a section, such as a target."""

    text: str

    def __repr__(self) -> str:
        """Return it as plain text."""
        return self.text

    def markdown(self) -> str:
        """Return it as Markdown."""
        return f"### {self.text}\n"

    def html(self) -> str:
        """Return it as a part of a page."""
        return f"<h3>{escape(self.text)}</h3>"


@dataclass(frozen=True, repr=False)
class Command(Shown):
    """A command to copy, with a line about it."""

    text: str
    line: str

    def __repr__(self) -> str:
        """Return it as plain text."""
        return f"{self.line}\n{textwrap.indent(self.text, '  ')}"

    def markdown(self) -> str:
        """Return it as Markdown."""
        return f"{self.line}\n\n{textwrap.indent(self.text, '    ')}\n"

    def html(self) -> str:
        """Return it as a part of a page."""
        return f'<p>{escape(self.line)}</p><pre class="sk-command"><code>{escape(self.text)}</code></pre>'


@dataclass(frozen=True, repr=False)
class Several(Shown):
    """Tables, pictures and statements, one below the other."""

    parts: tuple[Shown, ...]

    def __repr__(self) -> str:
        """Return it as plain text."""
        return "\n\n".join(repr(part) for part in self.parts)

    def markdown(self) -> str:
        """Return it as Markdown."""
        return "\n\n".join(part.markdown() for part in self.parts)

    def html(self) -> str:
        """Return it as a part of a page."""
        return "\n".join(part.html() for part in self.parts)


def facts(caption: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Return a table of names and values, without those that are empty."""
    rows = tuple((Cell(name), Cell(value)) for name, value in pairs if value)
    return Table(caption, (Column(""), Column("")), rows, folded=False)


def _plain(row: Sequence[Cell]) -> list[str]:
    return [" ".join(f"{cell.text} {cell.aside}".split()) for cell in row]


def _markdown(cell: Cell) -> str:
    text = f"{cell.text} {cell.aside}".strip().replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
    return f"[{text}]({cell.href})" if cell.href else text


def _html(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.href:
        text = f'<a href="{escape(cell.href)}">{text}</a>'
    return f"{text} <small>{escape(cell.aside)}</small>" if cell.aside else text


def _number(column: Column) -> str:
    return ' class="sk-number"' if column.number else ""


def _tone(cell: Cell) -> str:
    return " ".join(filter(None, [f"sk-{cell.tone}" if cell.tone else "", "sk-wide" if cell.wide else ""]))
