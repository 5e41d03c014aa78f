"""A page as a PDF, printed by an installed browser."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from shrinkkit.errors import Unsupported

_EDGE = ("microsoft-edge", "microsoft-edge-stable", "msedge")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", *_EDGE)
"""Commands that are tried, in this order; all of them print alike."""
TIMEOUT_S = 120.0
_REMEDY = "Open the HTML in any browser and print it to a PDF there"


def write(page: Path, out_path: Path) -> None:
    """Print the HTML file `page` to `out_path`, atomically.

    Raises:
        Unsupported: There is no browser that can print, or it did not write a PDF with pages.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise Unsupported(
            f"A PDF requires Chromium, Chrome or Edge, and none of them is on the PATH. {_REMEDY}, or install "
            "Chromium, such as with `apt install chromium`."
        )
    with tempfile.TemporaryDirectory(dir=out_path.parent, prefix=".pdf-") as folder:
        printed = Path(folder, "page.pdf")
        message = _print(browser, page, printed, Path(folder, "profile"))
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


def _print(browser: str, page: Path, out_path: Path, profile: Path) -> str:
    """Run the browser, and return the last line of its output."""
    command = [browser, "--headless", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    # A new profile: an open browser would take over the printing, and an existing profile would be changed.
    command += [f"--user-data-dir={profile}", "--no-pdf-header-footer", f"--print-to-pdf={out_path.resolve()}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # Chromium refuses its sandbox to root. The page is our own file and loads nothing.
        command.append("--no-sandbox")
    try:
        done = subprocess.run(
            [*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return f"{error}."
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"exit status {done.returncode}{f': {lines[-1]}' if lines else ''}."
