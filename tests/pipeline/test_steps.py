"""A step in its own process, with real notebooks: its pages, its parameters, and how each failure is reported."""

import json
import textwrap

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from shrinkkit.core.run_folder import RunFolder
from shrinkkit.pipeline import steps
from shrinkkit.pipeline.plan import REPORT, Planned
from shrinkkit.pipeline.steps import ANSWER, NOTEBOOK


def notebook(path, *sources, parameters="ratio: float = 0.5  # share to remove"):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def request(path, **changes):
    return {"notebook": str(path), "parameters": {}, "title": "a step", "home": "", "warm": ""} | changes


def test_execute_passes_parameters_and_returns_no_error(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "open('out', 'w').write(str(2 * ratio))")
    (tmp_path / "attempt").mkdir()
    assert steps.execute_notebook(request(path, parameters={"ratio": 0.25}), tmp_path / "attempt") == ""
    assert (tmp_path / "attempt/out").read_text() == "0.5"
    assert (tmp_path / "attempt" / NOTEBOOK).is_file()


def test_an_exception_is_named_with_its_cell_and_the_notebook_kept(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "1 + 1", "1 / 0", "open('after', 'w')")
    (tmp_path / "attempt").mkdir()
    error = steps.execute_notebook(request(path), tmp_path / "attempt")
    assert error == "ZeroDivisionError: division by zero (cell 3)"
    assert not (tmp_path / "attempt/after").exists()
    assert "division by zero" in (tmp_path / "attempt" / NOTEBOOK).read_text()


def test_a_dead_kernel_is_named(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "import os; os._exit(1)")
    (tmp_path / "attempt").mkdir()
    assert "the kernel died" in steps.execute_notebook(request(path), tmp_path / "attempt")


def test_main_leaves_an_answer_and_an_exported_notebook(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "raise ValueError('on purpose')")
    (tmp_path / "attempt").mkdir()
    (tmp_path / "attempt/request.json").write_text(json.dumps(request(path)))
    assert steps.main([str(tmp_path / "attempt/request.json")]) == 1
    assert json.loads((tmp_path / "attempt" / ANSWER).read_text())["error"] == "ValueError: on purpose (cell 2)"
    assert "on purpose" in (tmp_path / "attempt/notebook.html").read_text()


@pytest.fixture(params=["cold", "warm"])
def execute(tmp_path, warm_start, request):
    """Return a function that executes a notebook of one cell in a run folder, which it returns with the error."""
    folder = tmp_path / "run"
    folder.mkdir()

    def taken(source, name="1-baseline", timeout_s=60.0, tick=lambda seconds, phase: None):
        path = tmp_path / f"{name}.ipynb"
        cells = [new_code_cell("x: int = 1  # a number", metadata={"tags": ["parameters"]}), new_code_cell(source)]
        nbformat.write(new_notebook(cells=cells), path)
        step = Planned(
            f"{name}-mine" * (name != REPORT) or name, name, "", {"x": 2}, (), "" if name == REPORT else "left"
        )
        started = warm_start if request.param == "warm" else None
        limits = {"timeout_s": timeout_s, "threads": 1, "tick": tick}
        ended = steps.execute(path, step, RunFolder(folder), **limits, warm_start=started)
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


@pytest.mark.parametrize("execute", ["warm"], indirect=True)
def test_a_running_step_says_what_it_does_and_when_it_will_be_stopped_and_so_does_its_error(execute):
    source = """
        import time
        from shrinkkit.widgets import live
        progress = live.progress("Exporting")
        progress(1, 3, "torch: verify")
        time.sleep(60)
    """
    seen = []
    _, error = execute(textwrap.dedent(source), timeout_s=10.0, tick=lambda seconds, phase: seen.append(phase))
    assert "Exporting · torch: verify · 1 of 3 done" in seen
    assert "Exporting · torch: verify · 1 of 3 done · stopped in 2 s" in seen
    assert "was stopped during: Exporting · torch: verify · 1 of 3 done" in error
