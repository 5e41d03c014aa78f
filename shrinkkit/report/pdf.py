"""A page as a PDF, printed by a browser of this machine."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from shrinkkit.errors import Unsupported

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "microsoft-edge-stable",
    "msedge",
)
"""Commands that are looked for, in this order; all of them print alike."""
TIMEOUT_S = 120.0
_REMEDY = "Open the HTML in any browser and print it to a PDF there"


def write(page: Path, out_path: Path) -> None:
    """Print the HTML file `page` to `out_path`, whole or not at all.

    Raises:
        Unsupported: No browser that can print was found, or the one found did not leave a PDF with pages.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise Unsupported(
            f"A PDF is printed by Chromium, Chrome or Edge, and none of them is on the PATH. {_REMEDY}, or install "
            "Chromium, such as with `apt install chromium`."
        )
    with tempfile.TemporaryDirectory(dir=out_path.parent, prefix=".pdf-") as folder:
        made = Path(folder, "page.pdf")
        said = _print(browser, page, made, Path(folder, "profile"))
        if not made.is_file() or not pages(made):
            raise Unsupported(f"{browser} printed no PDF of {page}: {said} {_REMEDY}.")
        made.chmod(0o644)
        made.replace(out_path)


def pages(path: Path) -> int:
    """Return how many pages a PDF that a browser printed has; 0 if the file is none, or is cut off."""
    data = path.read_bytes()
    if not data.startswith(b"%PDF-") or b"%%EOF" not in data[-1024:]:
        return 0
    return len(re.findall(rb"/Type\s*/Page\b", data))


def _print(browser: str, page: Path, out_path: Path, profile: Path) -> str:
    """Let the browser print, and return the last line that it said."""
    command = [browser, "--headless", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    # Nothing is kept from it, and none that is open is asked to print in its place.
    command += [f"--user-data-dir={profile}", "--no-pdf-header-footer", f"--print-to-pdf={out_path.resolve()}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # Chromium refuses its sandbox to root. The page is our own file and loads nothing.
        command.append("--no-sandbox")
    try:
        done = subprocess.run(
            [*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {TIMEOUT_S:g} s."
    except OSError as error:
        return f"{error}."
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"it ended with status {done.returncode}{f', saying: {lines[-1]}' if lines else ''}."
