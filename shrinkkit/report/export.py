"""An executed notebook as one HTML page that needs nothing outside itself, and as Markdown.

Needs neither a kernel nor torch: what the notebook shows was kept in it when it ran.
"""

import os
import re
import sys
from html import escape, unescape
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

from shrinkkit.core import store
from shrinkkit.errors import InvalidInput

TEMPLATE = Path(__file__).parent / "template"
_BASE = "nbconvert/templates/base/display_priority.j2"
"""A file of nbconvert's own template, which ours extend."""
_LOADING = {
    "src",
    "srcset",
    "poster",
    "data",
    "background",
    "action",
    "formaction",
    "manifest",
    "xlink:href",
}
_HREF_LOADS = {"link", "image", "use", "feimage", "base", "script"}
_PREFERRED = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]


def html(
    notebook_path: str | os.PathLike[str], out_path: str | os.PathLike[str], *, title: str, home: str = ""
) -> None:
    """Write an executed notebook as one self-contained HTML page, whole or not at all; see `markdown`.

    Code is folded, outputs are shown, a failed cell shows its error.

    Args:
        notebook_path: The executed notebook.
        out_path: Where the page goes.
        title: Of the page, in the browser's tab and in its head.
        home: Relative address of the report that the page belongs to; '' leaves the link out.
    """
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(**_options("index.html.j2"), exclude_anchor_links=True)  # type: ignore[no-untyped-call]
    body, _ = exporter.from_notebook_node(_read(notebook_path), resources={"title": title, "home": home})
    store.write_text(out_path, _with_contents(_whole(body)))


def markdown(notebook_path: str | os.PathLike[str], out_path: str | os.PathLike[str]) -> None:
    """Write the text and the results of an executed notebook as Markdown, whole or not at all; see `html`.

    Tables are Markdown tables, pictures are given in words, code is left out.

    Args:
        notebook_path: The executed notebook.
        out_path: Where the Markdown goes.
    """
    from nbconvert import MarkdownExporter

    options = _options("index.md.j2")
    options["config"]["NbConvertBase"]["display_data_priority"] = ["text/markdown", "text/plain"]
    exporter = MarkdownExporter(**options)  # type: ignore[no-untyped-call]
    body, _ = exporter.from_notebook_node(_read(notebook_path))
    store.write_text(out_path, re.sub(r"\n{3,}", "\n\n", body).strip() + "\n")


def outside_addresses(page: str) -> list[str]:
    """Return every address outside the page that a browser would load, in order; empty if the page stands alone.

    Links that a reader may follow are not loaded and do not count.

    Args:
        page: The HTML text.
    """
    finder = _Finder()
    finder.feed(page)
    finder.close()
    return finder.found


class _Finder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        for name, value in attrs:
            if name in _LOADING or (name == "href" and tag in _HREF_LOADS):
                self._keep(re.split(r",\s+|\s+", value or "") if name == "srcset" else [value or ""])
            elif name == "style" or "url(" in (value or ""):
                self._css(value or "")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self._css(data)
        if self.inside == "script":
            self._keep(re.findall(r"""(?:https?:)?//[\w.-]+\.\w+[^\s"'`)]*""", data))

    def _css(self, text: str) -> None:
        self._keep(re.findall(r"""url\(\s*["']?([^"')]+)""", text))
        self._keep(re.findall(r"""@import\s+["']([^"']+)""", text))

    def _keep(self, addresses: list[str]) -> None:
        self.found += [a for a in map(str.strip, addresses) if a and not a.startswith(("data:", "#", "about:"))]


def templates() -> Path:
    """Return the folder of nbconvert's own templates. nbconvert itself misses it where environments are layered.

    Raises:
        InvalidInput: It is not there.
    """
    recorded = [Path(str(f.locate())) for f in metadata.files("nbconvert") or () if f.as_posix().endswith(_BASE)]
    found = next((path for path in (*recorded, Path(sys.prefix, "share/jupyter", _BASE)) if path.is_file()), None)
    if found is None:
        raise InvalidInput(
            "nbconvert must be installed with its templates, which every page is made with, but they are missing. "
            "Install it again: pip install --force-reinstall nbconvert."
        )
    return found.resolve().parent.parent


def _options(template_file: str) -> dict[str, Any]:
    from traitlets.config import Config

    return {
        "template_name": TEMPLATE.name,
        "template_file": template_file,
        "extra_template_basedirs": [str(TEMPLATE.parent), str(templates())],
        "config": Config({"NbConvertBase": {"display_data_priority": _PREFERRED}}),
    }


def _read(path: str | os.PathLike[str]) -> Any:
    import nbformat

    return nbformat.read(Path(path), as_version=4)  # type: ignore[no-untyped-call]


def _whole(page: str) -> str:
    """Return a page whose code can be reached, without what outputs bring along for viewers of less than a page."""
    page = re.sub(r'<style class="sk-style">.*?</style>', "", page, flags=re.DOTALL)
    # Code that is wider than the page scrolls, by keyboard too.
    page = re.sub(r"<pre\b(?![^>]*\btabindex=)", '<pre tabindex="0"', page)
    # nbconvert writes the markup anew: attributes change their order, and `hidden` becomes `hidden=""`.
    return re.sub(r"(</svg>)\s*<img\b[^>]*?\shidden\b[^>]*>", r"\1", page)


def _with_contents(page: str) -> str:
    """Return a page with an address for each section, and with links to them if there are more than two."""
    found: dict[str, str] = {}

    def address(match: re.Match[str]) -> str:
        text = " ".join(unescape(re.sub(r"<[^>]+>", "", match[2])).split())
        anchor = re.sub(r"\W+", "-", text.lower()).strip("-") or "section"
        while anchor in found:
            anchor += "-"
        found[anchor] = text
        return f'<h2 id="{anchor}"{match[1]}>{match[2]}</h2>'

    page = re.sub(r"<h2((?:(?! id=)[^>])*)>(.*?)</h2>", address, page, flags=re.DOTALL)
    items = "".join(f'<li><a href="#{anchor}">{escape(text)}</a></li>' for anchor, text in found.items())
    nav = f'<nav class="sk-nav" aria-label="Sections"><ul>{items}</ul></nav>' if len(found) > 2 else ""
    return page.replace("<!--contents-->", nav, 1)
