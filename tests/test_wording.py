"""The field's terms in place of an idiom of our own: words that make text hard to read and to search stay out.

Better ones: callback, tolerance, again, next to, separate, evaluated, unsupported.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for pattern in ("shrinkkit/**/*.py", "shrinkkit/**/*.yaml", "notebooks/*.ipynb", "docs/*.md", "*.md")
    for path in ROOT.glob(pattern)
)
UNWANTED = re.compile(
    r"""\b(
    anew | whoever | nobody | onlooker | look(s|ed|ing)?\ on\b | looks?\ on\ at
    | (?<![.*])beside(?![\w=:,)]) | of\ (its|their|one's)\ own | none\ of\ it | truly | what\ happened\ to
    | was\ judged | judge[sd]? | is\ told | are\ told | tells?\ of | unasked | on\ paper | a\ look\ at
    | wronger | unwatched | unstopped | no\ failure | is\ no\ (number|module|class|task|share)
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)


@pytest.mark.parametrize(
    "path",
    FILES,
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_text_uses_plain_technical_english(path):
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    assert [f"{number}: {line.strip()}" for number, line in lines if UNWANTED.search(line)] == []
