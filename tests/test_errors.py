"""The errors that shrinkkit raises deliberately, and how notebooks show them."""

import inspect

import pytest
from IPython.core.interactiveshell import InteractiveShell

from shrinkkit import errors
from shrinkkit.errors import InvalidInput, ShrinkkitError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BaseException)]
USERS = """
def score(output):
    return output.no_such_name
"""


def test_the_public_errors_are_these():
    assert {kind.__name__ for kind in KINDS} == {
        *("InvalidInput", "InvalidTask", "LeaseLost", "ModelFileError", "NothingChanged", "NothingToPrune"),
        *("ShrinkkitError", "StepFailed", "UnfairComparison", "Unsupported"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_shrinkkit_error_is_the_base_of_all_errors(kind):
    with pytest.raises(ShrinkkitError, match="why"):
        raise kind("why")


def test_invalid_input_is_also_a_value_error():
    assert issubclass(InvalidInput, ValueError)


def rendered(code, **names):
    """Return what IPython shows of the error that `code` raises."""
    shell = InteractiveShell()
    shell.user_ns.update(names)
    shown = []
    shell._showtraceback = lambda kind, error, lines: shown.extend(lines)
    shell.run_cell(code)
    return "\n".join(shown)


def test_a_notebook_shows_the_message_of_our_errors_and_no_traceback():
    text = rendered("raise errors.InvalidInput('`ratio` must be in [0, 1), got 50.')", errors=errors)
    assert text == "InvalidInput: `ratio` must be in [0, 1), got 50."


def test_a_notebook_shows_the_traceback_of_a_defect():
    assert "Traceback" in rendered("1 / 0")


def test_where_an_error_came_from_the_users_code_their_lines_are_shown(tmp_path):
    (tmp_path / "mine.py").write_text(USERS)
    code = compile(USERS, str(tmp_path / "mine.py"), "exec")
    names = {}
    exec(code, names)
    call = "try:\n    score(1)\nexcept Exception as error:\n    raise errors.InvalidTask('It failed.') from error"
    text = rendered(call, errors=errors, score=names["score"])
    assert text.startswith("InvalidTask: It failed.")
    assert "mine.py, line 3, in score: return output.no_such_name" in text
    assert text.endswith("AttributeError: 'int' object has no attribute 'no_such_name'")
    assert "interactiveshell" not in text
