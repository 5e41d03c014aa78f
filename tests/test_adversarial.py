"""The page about the adversarial cases says how many there are."""

import re
from collections import Counter
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "adversarial.md"


def test_the_page_counts_the_cases(request):
    stated = {name: int(count) for name, count in re.findall(r"`(test_\w+\.py)` \| (\d+) \|", PAGE.read_text())}
    assert set(stated) == {path.name for path in Path(__file__).parent.glob("adversarial/test_*.py")}
    found = Counter(item.path.name for item in request.session.items if item.path.parent.name == "adversarial")
    if set(found) != set(stated):
        pytest.skip("the whole suite was not collected")
    # Some are parametrised over the engines of this machine.
    assert {name: count for name, count in stated.items() if abs(found[name] - count) > 5} == {}
