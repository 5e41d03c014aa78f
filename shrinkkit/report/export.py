"""Export of an executed notebook as one self-contained HTML page, Markdown and PDF, without a kernel or torch."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape, unescape
from importlib import metadata
from pathlib import Path
from typing import Any

from shrinkkit.core import store
from shrinkkit.display import tables
from shrinkkit.errors import InvalidInput, Unsupported

TEMPLATE = Path(__file__).parent / "template"
_BASE = "nbconvert/templates/base/display_priority.j2"
"""A file of nbconvert's own template, which ours extend."""
_PREFERRED = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
_EDGE = ("microsoft-edge", "microsoft-edge-stable", "msedge")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", *_EDGE)
"""Commands that are tried, in this order; all of them print alike."""
TIMEOUT_S = 120.0
_REMEDY = "Open the HTML in any browser and print it to a PDF there"


def html(notebook_path: str | Path, out_path: str | Path, *, title: str, home: str = "") -> None:
    """Write an executed notebook as one self-contained HTML page, atomically; see `markdown`.

    Code is folded, outputs are shown, a failed cell shows its error. `home` is the relative address of the report that
    the page belongs to; '' leaves the link out.
    """
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(**_options("index.html.j2"), exclude_anchor_links=True)  # type: ignore[no-untyped-call]
    body, _ = exporter.from_notebook_node(_read(notebook_path), resources={"title": title, "home": home})
    store.write_text(out_path, _with_contents(_cleaned(body)))


def markdown(notebook_path: str | Path, out_path: str | Path) -> None:
    """Write the text and the results of an executed notebook as Markdown, atomically; see `html`.

    Tables are Markdown tables, charts are described in words, code is left out.
    """
    from nbconvert import MarkdownExporter

    options = _options("index.md.j2")
    options["config"]["NbConvertBase"]["display_data_priority"] = ["text/markdown", "text/plain"]
    exporter = MarkdownExporter(**options)  # type: ignore[no-untyped-call]
    body, _ = exporter.from_notebook_node(_read(notebook_path))
    store.write_text(out_path, re.sub(r"\n{3,}", "\n\n", body).strip() + "\n")


def pdf(page: Path, out_path: Path, *, full: bool = False) -> None:
    """Print the HTML file `page` to `out_path` by an installed browser, atomically.

    Of a report, its summary is printed, or everything if `full`. Raises Unsupported if there is no browser that can
    print, or it did not write a PDF with pages.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        text = f"A PDF requires Chromium, Chrome or Edge, and none of them is on the PATH. {_REMEDY},"
        raise Unsupported(f"{text} or install Chromium, such as with `apt install chromium`.")
    with tempfile.TemporaryDirectory(dir=out_path.parent, prefix=".pdf-") as folder:
        printed = Path(folder, "page.pdf")
        address = page.resolve().as_uri() + ("#full" if full else "")
        message = _print(browser, address, printed, Path(folder, "profile"))
        if not printed.is_file() or not pages(printed):
            raise Unsupported(f"{browser} printed no PDF of {page}: {message} {_REMEDY}.")
        printed.chmod(0o644)
        printed.replace(out_path)


def pages(path: Path) -> int:
    """Return how many pages a PDF has that a browser printed; 0 if the file is no whole PDF."""
    data = path.read_bytes()
    if not data.startswith(b"%PDF-") or b"%%EOF" not in data[-1024:]:
        return 0
    return len(re.findall(rb"/Type\s*/Page\b", data))


def _print(browser: str, address: str, out_path: Path, profile: Path) -> str:
    """Run the browser, and return the last line of its output."""
    command = [browser, "--headless", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    # A new profile: an open browser would take over the printing, and an existing profile would be changed.
    command += [f"--user-data-dir={profile}", "--no-pdf-header-footer", f"--print-to-pdf={out_path.resolve()}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # Chromium refuses its sandbox to root. The page is our own file and loads nothing.
        command.append("--no-sandbox")
    try:
        done = subprocess.run([*command, address], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        return f"{error}."
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"exit status {done.returncode}{f': {lines[-1]}' if lines else ''}."


def templates() -> Path:
    """Return the folder of nbconvert's own templates, which nbconvert does not find in layered environments.

    Raises InvalidInput if it does not exist.
    """
    recorded = [Path(str(f.locate())) for f in metadata.files("nbconvert") or () if f.as_posix().endswith(_BASE)]
    paths = (*recorded, Path(sys.prefix, "share/jupyter", _BASE))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        text = "nbconvert must be installed with its templates, which every page is made with, but they are missing."
        raise InvalidInput(f"{text} Install it again: pip install --force-reinstall nbconvert.")
    return path.resolve().parent.parent


def _options(template_file: str) -> dict[str, Any]:
    from traitlets.config import Config

    config = Config({"NbConvertBase": {"display_data_priority": _PREFERRED}})
    named = {"template_name": TEMPLATE.name, "template_file": template_file}
    return {**named, "config": config, "extra_template_basedirs": [str(TEMPLATE.parent), str(templates())]}


def _read(path: str | Path) -> Any:
    import nbformat

    return nbformat.read(Path(path), as_version=4)  # type: ignore[no-untyped-call]


def _cleaned(page: str) -> str:
    """Return a page with code that scrolls by keyboard, and without the styles and images that outputs contain."""
    page = re.sub(r'<style class="sk-style">.*?</style>', "", page, flags=re.DOTALL)
    page = re.sub(r"<pre\b(?![^>]*\btabindex=)", '<pre tabindex="0"', page)
    # What HTML can do without is a tenth of a page with many tables.
    page = re.sub(r'(?<=")></(?:path|use)>', "/>", re.sub(r"</t[dr]>", "", page))
    page = re.sub(r'(?<=<td class=)"([\w-]+)"', r"\1", page)
    # nbconvert changes the order of attributes, and `hidden` becomes `hidden=""`.
    return re.sub(r"(</svg>)\s*<img\b[^>]*?\shidden\b[^>]*>", r"\1", page)


def _with_contents(page: str) -> str:
    """Return a page with an anchor for each section and part, and a navigation bar if there are more than two sections.

    The anchor of a part (h3) begins with that of its section: `timing-samples-cpu-torch`.
    """
    sections: dict[str, str] = {}
    keys: list[str] = []

    def anchored(match: re.Match[str]) -> str:
        level, attributes, content = match.groups()
        text = " ".join(unescape(re.sub(r"<[^>]+>", "", content)).split())
        key = tables.anchor(text)
        if level == "3" and sections:
            key = f"{list(sections)[-1]}-{key}"
        while key in keys:
            key += "-"
        keys.append(key)
        if level == "2":
            sections[key] = text
        link = f'<a class="sk-link" href="#{key}" aria-label="Link to {escape(text)}">#</a>'
        return f'<h{level} id="{key}"{attributes}>{content}{link}</h{level}>'

    page = re.sub(r"<h([23])((?:(?! id=)[^>])*)>(.*?)</h\1>", anchored, page, flags=re.DOTALL)
    items = "".join(f'<li><a href="#{key}">{escape(text)}</a></li>' for key, text in sections.items())
    nav = f'<nav class="sk-nav" aria-label="Sections"><ul>{items}</ul></nav>' if len(sections) > 2 else ""
    return page.replace("<!--contents-->", nav, 1)
