import json

import nbformat
import pytest

from shrinkkit.errors import InvalidInput
from shrinkkit.pipeline import steps
from shrinkkit.pipeline.steps import ANSWER, NOTEBOOK


def notebook(path, *sources, parameters="ratio: float = 0.5  # share to remove"):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def request(path, **changes):
    return {"notebook": str(path), "parameters": {}, "title": "a step", "home": ""} | changes


def test_parameters_are_read_with_type_default_and_comment(tmp_path):
    path = notebook(tmp_path / "n.ipynb")
    assert steps.parameters(path) == {"ratio": ("float", 0.5, "share to remove")}


def test_a_parameter_of_another_form_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"must read `name: type = default"):
        steps.parameters(notebook(tmp_path / "n.ipynb", parameters="ratio = 0.5"))


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "n.ipynb")
    with pytest.raises(InvalidInput, match=r"must have one cell tagged"):
        steps.parameters(tmp_path / "n.ipynb")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rattio": 0.5}, "'rattio' is no parameter. Did you mean `ratio`"),
        ({"ratio": "1e-3"}, "`ratio` must be float, got '1e-3'"),
        ({"ratio": True}, "`ratio` must be float, got True"),
        ({"ratio": None}, "`ratio` must be float, got None"),
    ],
)
def test_an_unknown_or_badly_typed_parameter_is_refused(tmp_path, value, message):
    with pytest.raises(InvalidInput, match=r"was not started") as caught:
        steps.check_parameters(notebook(tmp_path / "n.ipynb"), value)
    assert message in str(caught.value)


def test_a_whole_number_is_a_float(tmp_path):
    steps.check_parameters(notebook(tmp_path / "n.ipynb"), {"ratio": 1})


def test_execute_passes_parameters_and_returns_no_error(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "open('out', 'w').write(str(2 * ratio))")
    (tmp_path / "attempt").mkdir()
    assert steps.execute(request(path, parameters={"ratio": 0.25}), tmp_path / "attempt") == ""
    assert (tmp_path / "attempt/out").read_text() == "0.5"
    assert (tmp_path / "attempt" / NOTEBOOK).is_file()


def test_an_exception_is_named_with_its_cell_and_the_notebook_kept(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "1 + 1", "1 / 0", "open('after', 'w')")
    (tmp_path / "attempt").mkdir()
    error = steps.execute(request(path), tmp_path / "attempt")
    assert error == "ZeroDivisionError: division by zero (cell 3)"
    assert not (tmp_path / "attempt/after").exists()
    assert "division by zero" in (tmp_path / "attempt" / NOTEBOOK).read_text()


def test_a_dead_kernel_is_named(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "import os; os._exit(1)")
    (tmp_path / "attempt").mkdir()
    assert "the kernel died" in steps.execute(request(path), tmp_path / "attempt")


def test_main_leaves_an_answer_and_an_exported_notebook(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "raise ValueError('on purpose')")
    (tmp_path / "attempt").mkdir()
    (tmp_path / "attempt/request.json").write_text(json.dumps(request(path)))
    assert steps.main([str(tmp_path / "attempt/request.json")]) == 1
    assert json.loads((tmp_path / "attempt" / ANSWER).read_text())["error"] == "ValueError: on purpose (cell 2)"
    assert "on purpose" in (tmp_path / "attempt/notebook.html").read_text()
