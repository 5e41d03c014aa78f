"""Which addresses outside itself a page would load."""

import re
from html.parser import HTMLParser

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
