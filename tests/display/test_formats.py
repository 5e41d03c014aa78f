"""Numbers as text: units, three digits, true minus signs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrinkkit.core.estimate import Estimate
from shrinkkit.display import formats
from shrinkkit.display.formats import DASH, MINUS, TIMES


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
    assert shown == [f"{MINUS}0.4 pts", "0.0 pts", "0.0 pts", "+1.2 pts"]


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        ((8.58, 8.18, 9.06), "8.6 (95 % CI 8.2-9.1)"),
        ((4.44, 2.07, 6.66), "4.4 (95 % CI 2.1-6.7)"),
        ((2.341, 2.336, 2.346), "2.34 (95 % CI 2.34-2.35)"),
        ((30.1, 29.9, 30.3), "30.1 (95 % CI 29.9-30.3)"),
        ((12345.0, 12000.0, 12600.0), "12,345 (95 % CI 12,000-12,600)"),
        ((1.0, 1.0, 1.0), "1.00 (95 % CI 1.00-1.00)"),
    ],
)
def test_digits_follow_the_interval(estimate, text):
    assert formats.estimate(Estimate(*estimate)) == text.replace("-", DASH)


def test_an_interval_with_negative_ends_is_written_in_words():
    assert formats.interval(Estimate(-2.5, -2.6, -2.4)) == f"{MINUS}2.6 to {MINUS}2.4"
    assert formats.interval(Estimate(0.0, -0.031, 0.031), is_fraction=True) == f"{MINUS}3.1 to 3.1"
    assert formats.score(-2.5, is_fraction=False) == f"{MINUS}2.500"
    assert [formats.score(value, is_fraction=False) for value in (0.99982, 20.126)] == ["0.9998", "20.13"]


def test_a_speedup_says_no_more_than_its_verdict():
    ratio = Estimate(8.58, 8.18, 9.06)
    assert formats.speedup(ratio, "faster") == f"8.6{TIMES} (95 % CI 8.2{DASH}9.1)"
    assert formats.speedup(ratio, "faster", ci=False) == f"8.6{TIMES}"
    assert formats.speedup(ratio, "undecided").startswith("inconclusive, 8.6")
    assert "8" not in formats.speedup(ratio, "too noisy")
    assert formats.speedup(None) == ""


@given(st.floats(1e-3, 1e5))
def test_three_digits_keep_the_value_within_half_a_per_cent(value):
    assert float(formats.digits(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)
