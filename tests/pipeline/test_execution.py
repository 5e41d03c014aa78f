"""A step's process, with real notebooks: where its pages go, and what is said when it does not end well."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from shrinkkit.pipeline import execution
from shrinkkit.pipeline.plan import REPORT


@pytest.fixture
def execute(tmp_path):
    """Return a function that executes a notebook of one cell in a run folder, which it returns with the error."""
    folder = tmp_path / "run"
    folder.mkdir()

    def taken(source, name="1-baseline", timeout_s=60.0):
        path = tmp_path / f"{name}.ipynb"
        cells = [new_code_cell("x: int = 1  # a number", metadata={"tags": ["parameters"]}), new_code_cell(source)]
        nbformat.write(new_notebook(cells=cells), path)
        ended = execution.execute(
            path,
            folder,
            name=f"{name}-mine" * (name != REPORT) or name,
            parameters={"x": 2},
            timeout_s=timeout_s,
            threads=1,
            tick=lambda seconds: None,
        )
        assert ended.note == ""
        return folder, ended.error

    return taken


def test_a_step_works_in_the_run_folder_with_its_parameters_and_leaves_its_pages(execute):
    folder, error = execute("open('../left.txt', 'w').write(f'{x}')")
    assert error == ""
    assert (folder / "left.txt").read_text() == "2"
    assert {path.name for path in (folder / "steps").iterdir()} == {"1-baseline-mine.ipynb", "1-baseline-mine.html"}
    assert "../report.html" in (folder / "steps/1-baseline-mine.html").read_text()
    assert not list(folder.glob(".attempt-*"))


def test_the_report_lies_where_people_look_for_it(execute):
    folder, error = execute("x", name=REPORT)
    assert error == ""
    assert (folder / "report.html").is_file()
    assert (folder / "report.md").is_file()
    assert "../report.html" not in (folder / "report.html").read_text()


def test_the_error_of_a_cell_is_the_answer(execute):
    folder, error = execute("1 / 0")
    assert error == "ZeroDivisionError: division by zero (cell 3)"
    assert "ZeroDivisionError" in (folder / "steps/1-baseline-mine.html").read_text()


def test_every_library_computes_with_the_same_number_of_threads(execute):
    names = "('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')"
    _, error = execute(f"import os; assert all(os.environ[name] == '1' for name in {names})")
    assert error == ""


def test_a_step_that_takes_too_long_is_stopped(execute):
    _, error = execute("import time; time.sleep(60)", timeout_s=0.6)
    assert "longer than 0.6 s and was stopped" in error
