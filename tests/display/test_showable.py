"""Objects that show and convert themselves: plain values all the way down, one row or those that a class names."""

from dataclasses import dataclass

import pytest

from shrinkkit.display import showable
from shrinkkit.display.showable import Rich


@dataclass(frozen=True, repr=False)
class Inner(Rich):
    low: float
    high: float | None = None


@dataclass(frozen=True, repr=False)
class Outer(Rich):
    name: str
    found: Inner
    parts: tuple[Inner, ...] = ()
    sizes: tuple[int, ...] = ()


OUTER = Outer("a", Inner(1.0), (Inner(2.0, 3.0),), (1, 2))


def test_a_dict_holds_everything_as_plain_values():
    assert OUTER.to_dict() == {
        "name": "a",
        "found": {"low": 1.0, "high": None},
        "parts": [{"low": 2.0, "high": 3.0}],
        "sizes": [1, 2],
    }


def test_a_frame_has_one_row_whose_columns_name_what_was_inside():
    frame = OUTER.to_frame()
    assert list(frame.columns) == ["name", "found.low", "found.high", "sizes"]
    assert len(frame) == 1
    assert frame["found.low"].tolist() == [1.0]


def test_what_has_no_view_of_its_own_shows_its_fields():
    assert repr(OUTER).splitlines()[0] == "Outer"
    assert "found.low  1" in repr(OUTER)
    assert "<table" in OUTER._repr_html_()
    assert "| found.low | 1 |" in OUTER._repr_markdown_()


def test_what_is_not_there_has_no_line():
    assert "high" not in repr(OUTER)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), ([], ""), ([1, 2], "1, 2"), (list(range(1000)), "1,000 values"), (0.123456, "0.1235"), (True, "True")],
)
def test_values_read_well(value, text):
    assert showable.text(value) == text
