"""The notebooks in real JupyterLab: every cell runs, every control moves something, and all of it stays to be read."""

import json
import shutil

import lab
import pytest

from shrinkkit import runs

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = pytest.mark.browser

SHORT = {
    **{name: {"threads": "1"} for name in ("1-baseline", "2-prune", "3-quantize")},
    "4-benchmark": {"threads": "1", "batch_sizes": "[]", "thread_counts": "[]"},
}
"""Parameters that a person would change who is in a hurry and shares the machine."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(runs.notebooks(), folder / "notebooks")
    for name, values in SHORT.items():
        path = folder / "notebooks" / f"{name}.ipynb"
        notebook = json.loads(path.read_text())
        (cell,) = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
        for i, line in enumerate(cell["source"]):
            if (parameter := line.partition(":")[0]) in values:
                cell["source"][i] = f"{line.partition('=')[0]}= {values[parameter]}  # short\n"
        path.write_text(json.dumps(notebook))
    return folder


@pytest.fixture(scope="module")
def address(place):
    with lab.server(place) as found:
        yield found


@pytest.fixture(scope="module")
def opened():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=lab.browser(), args=lab.ARGUMENTS)
        yield found
        found.close()


@pytest.mark.parametrize("name", ["start", "1-baseline", "2-prune", "3-quantize", "4-benchmark", "5-report"])
def test_every_cell_of_a_notebook_runs_in_jupyterlab(place, address, opened, name):
    path = f"notebooks/{name}.ipynb"
    notebook = lab.Notebook(opened, address, path)
    notebook.run_all()
    notebook.save()
    found = lab.outputs(place / path)
    notebook.close()
    assert len(found) >= 5
    assert [o for o in found if o["output_type"] in ("error", "stream")] == []
    assert notebook.outside == []
    assert notebook.problems == []
