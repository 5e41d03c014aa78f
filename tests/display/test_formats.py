"""Numbers as text: units, three digits, true minus signs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrinkkit.core.estimate import Estimate
from shrinkkit.display import formats
from shrinkkit.display.formats import MINUS


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_234_567, "1.23 MB"), (999_999, "1.00 MB"), (84e3, "84.0 kB")],
)
def test_sizes_have_a_decimal_unit_and_three_digits(number, text):
    assert formats.size(number) == text


@pytest.mark.parametrize(("value", "text"), [(0.31, "0.310"), (2.345, "2.35"), (9.999, "10.0"), (12345.6, "12,346")])
def test_values_have_three_significant_digits(value, text):
    assert formats.digits(value) == text


def test_a_change_has_its_sign_and_zero_has_none():
    shown = [formats.change(value, is_fraction=True) for value in (-0.004, 0.0, -0.0001, 0.012)]
    assert shown == [f"{MINUS}0.4 points", "0.0 points", "0.0 points", "+1.2 points"]


def test_a_score_that_is_no_share_is_no_per_cent():
    assert formats.score(-2.5, is_fraction=False) == f"{MINUS}2.50"
    assert formats.interval(Estimate(-2.5, -2.6, -2.4)) == f"[{MINUS}2.60, {MINUS}2.40]"


@given(st.floats(1e-3, 1e5))
def test_three_digits_keep_the_value_within_half_a_per_cent(value):
    assert float(formats.digits(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)
