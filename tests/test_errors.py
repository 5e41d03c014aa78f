"""The errors that shrinkkit raises on purpose."""

import inspect

import pytest

from shrinkkit import errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


def test_the_public_errors_are_these():
    assert {kind.__name__ for kind in KINDS} == {
        *("InvalidInput", "InvalidTask", "ModelFileError", "NothingChanged", "NothingToPrune"),
        *("ShrinkkitError", "StepFailed", "UnfairComparison", "Unsupported"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_catches_shrinkkit_error_catches_each_of_them(kind):
    with pytest.raises(errors.ShrinkkitError, match="why"):
        raise kind("why")


def test_invalid_input_is_also_a_value_error():
    assert issubclass(errors.InvalidInput, ValueError)
