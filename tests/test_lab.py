"""The notebooks in real JupyterLab: every cell runs, every control moves something, and all of it stays to be read."""

import json
import re
import shutil
from pathlib import Path

import lab
import pytest

from shrinkkit.pipeline import plan

pytestmark = pytest.mark.browser

TINY = {"task": json.dumps(str(Path(__file__).parent / "tiny.py"))}
SHORT = {
    "start": TINY,
    **{name: {**TINY, "threads": "1"} for name in ("1-baseline", "2-prune", "2-transform", "3-quantize")},
    "3-search": {**TINY, "threads": "1", "minutes": "0.05"},
    "2-train": {**TINY, "threads": "1", "source": '"pruned"'},
    **{name: {**TINY, "threads": "1", "effort": '"quick"', "others": "[]"} for name in ("4-benchmark", "4-robustness")},
}
"""Parameters that a person would change who has a small model, is in a hurry and shares the machine."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(plan.notebooks(), folder / "notebooks")
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
def address(place, warm_address):
    with lab.server(place, warm_address) as found:
        yield found


@pytest.fixture(scope="module")
def jupyterlab(address, opened):
    return lab.Lab(opened, address)


@pytest.fixture(scope="module")
def another_day(address, opened):
    """JupyterLab opened again, in which no notebook has run."""
    return lab.Lab(opened, address)


def move_a_slider(page):
    """Move the first slider by the keyboard and return the outputs that follow it, before and after."""
    before = page.locator(".sk-live").all_inner_texts()
    page.locator(".widget-slider .noUi-handle").first.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.wait_for_function(CHANGED, arg=before, timeout=60_000)
    return before, page.locator(".sk-live").all_inner_texts()


def choose_another(page):
    """Choose another entry of the first list, if it has one; see `move_a_slider`."""
    before = page.locator(".sk-live").all_inner_texts()
    chosen = page.locator(".widget-dropdown select").first
    if chosen.locator("option").count() < 2:
        # On a noisy machine only the baseline is Pareto-optimal for sure.
        return before, before
    chosen.select_option(index=1 - chosen.evaluate("list => Math.min(list.selectedIndex, 1)"))
    page.wait_for_function(CHANGED, arg=before, timeout=60_000)
    return before, page.locator(".sk-live").all_inner_texts()


LIVE = '<div class="sk-live">'
CHANGED = "before => [...document.querySelectorAll('.sk-live')].map(e => e.innerText).join() !== before.join()"
BUSY = "any(monitor._stop.is_set() or i == 10**8 for i in range(10**8 + 1))"
"""Code that keeps the kernel's main thread busy until the button is heard, at most for some 10 s."""
ACTS = {"2-prune": move_a_slider, "3-quantize": choose_another, "5-report": choose_another}


@pytest.mark.parametrize(
    "name",
    [
        "start",
        "1-baseline",
        "2-prune",
        "2-train",
        "2-transform",
        "3-quantize",
        "3-search",
        "4-benchmark",
        "4-robustness",
        "5-report",
    ],
)
def test_every_cell_runs_every_control_moves_and_what_was_shown_stays(place, jupyterlab, name):
    path = f"notebooks/{name}.ipynb"
    jupyterlab.open(path)
    jupyterlab.run_all()
    if act := ACTS.get(name):
        before, after = act(jupyterlab.page)
        assert before
        assert len(before) == len(after)
    jupyterlab.save()
    found = lab.outputs(place / path)
    jupyterlab.close()
    assert len(found) >= 5
    assert [o for o in found if o["output_type"] in ("error", "stream")] == []
    assert jupyterlab.outside == []
    assert jupyterlab.problems == []


@pytest.mark.parametrize("name", ["2-prune", "4-benchmark"])
def test_a_notebook_that_is_opened_again_shows_all_that_was_there_and_no_dead_widget(place, another_day, name):
    # The kernel that knew the widgets is gone.
    path = f"notebooks/{name}.ipynb"
    another_day.open(path)
    kept = [o for o in lab.outputs(place / path) if LIVE in str(o["data"].get("text/html"))]
    assert len(kept) >= 4
    another_day.page.wait_for_function(f"document.querySelectorAll('.sk-live').length === {len(kept)}")
    another_day.page.wait_for_timeout(500)
    seen = another_day.page.locator(".jp-OutputArea-output:visible").all_inner_texts()
    alive = another_day.page.locator(".sk-live").all_inner_texts()
    another_day.close()
    assert [text for text in seen if "model not found" in text or "Loading widget" in text] == []
    assert all(text.strip() for text in alive)


def test_the_stop_button_is_heard_while_the_kernel_is_timing(place, another_day):
    path = place / "notebooks/4-benchmark.ipynb"
    made, written = "callback=TimingMonitor()", path.read_text()
    assert made in written
    # The timing of so small a model would be over within a second, and without its first picture.
    slow = "callback=lambda *now, monitor=TimingMonitor(): monitor(*now) or (" + BUSY + ") and monitor(*now)"
    quick, thorough = (f'effort: str = \\"{effort}\\"' for effort in ("quick", "thorough"))
    assert quick in written
    path.write_text(written.replace(made, slow).replace(quick, thorough))
    another_day.open("notebooks/4-benchmark.ipynb")
    another_day.page.evaluate(
        "void window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.done = 1)"
    )
    # There is nothing to stop until the timing has begun.
    another_day.page.locator("button:enabled", has_text="Stop timing").wait_for(timeout=120_000)
    # JupyterLab asks for a subshell as the button appears; until it is there, clicks wait behind the timing.
    for _ in range(60):
        another_day.page.locator("button:has-text('Stop timing')").click(force=True)
        another_day.page.wait_for_timeout(1000)
        if another_day.page.locator(".sk-live", has_text="Interrupted").count() or another_day.page.evaluate(
            "window.done"
        ):
            break
    another_day.page.wait_for_function("window.done", timeout=180_000)
    assert another_day.page.locator("button:has-text('Stop timing')").is_disabled()
    another_day.save()
    another_day.close()
    said = "".join(str(o.get("data", {}).get("text/plain")) for o in lab.outputs(place / "notebooks/4-benchmark.ipynb"))
    assert re.search(r"Interrupted in comparison \d, which gets no verdict", said)
    assert "it was stopped by hand" in said


def test_the_report_is_a_link_that_opens(place, another_day):
    another_day.open("notebooks/5-report.ipynb")
    another_day.page.locator("a", has_text="report.html").first.click()
    another_day.page.locator(".lm-TabBar-tabLabel", has_text="report.html").wait_for(timeout=30_000)
    page = (place / "notebooks/reports/by-hand/report.html").read_text()
    assert "<h1>by-hand</h1>" in page


def test_apply_writes_the_chosen_settings_into_the_parameters_cell(place, another_day):
    path = place / "notebooks/apply.ipynb"
    shutil.copyfile(place / "notebooks/2-prune.ipynb", path)
    another_day.open("notebooks/apply.ipynb")
    another_day.run_all()
    move_a_slider(another_day.page)
    another_day.page.locator("button", has_text=re.compile("^Apply$")).click()
    another_day.page.locator("span[role=status]", has_text="Written into the parameters cell").wait_for(timeout=10_000)
    another_day.save()
    lines = [line for cell in json.loads(path.read_text())["cells"] for line in cell["source"]]
    assert [line for line in lines if line.startswith("settings: ")] == [
        "settings: dict = {'ratio': 0.54, 'scope': 'layer'}  # of the stage, as in a recipe\n"
    ]


def test_controls_say_what_to_run_after_a_restart_of_the_kernel(another_day):
    # Goes on with the notebook of the last test.
    page, text = another_day.page, "run all cells to use this"
    shown = f"e => getComputedStyle(e, '::after').content.includes('{text}')"
    outputs = page.locator(".jp-OutputArea-output:has(.jupyter-widgets)")
    assert not outputs.first.evaluate(shown)
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.locator(".jupyter-widgets-disconnected").first.wait_for(timeout=30_000)
    assert all(output.evaluate(shown) for output in outputs.all())
    another_day.close()


def test_a_cell_that_is_run_first_names_the_cell_that_it_needs(place, another_day):
    notebook = json.loads((place / "notebooks/2-prune.ipynb").read_text())
    # A kernel that was forked from one with shrinkkit does not hear of its import.
    notebook["metadata"]["kernelspec"] = {"name": "cold", "display_name": "cold", "language": "python"}
    (place / "notebooks/first.ipynb").write_text(json.dumps(notebook))
    another_day.open("notebooks/first.ipynb")
    another_day.page.evaluate(
        """() => {
          const notebook = window.jupyterapp.shell.currentWidget.content;
          const source = cell => cell.model.sharedModel.getSource();
          notebook.activeCellIndex = notebook.widgets.findIndex(cell => source(cell).includes('apply_stage('));
        }"""
    )
    another_day.command("notebook:run-cell")
    said = another_day.page.locator(".jp-OutputArea-output", has_text="NameError").inner_text()
    another_day.close()
    assert "the cell below 'Parameters and MACs by layer'" in said


def test_a_wrong_parameter_is_told_in_one_line(place, another_day):
    path = place / "notebooks" / "2-prune.ipynb"
    wrong = place / "notebooks" / "wrong.ipynb"
    wrong.write_text(path.read_text().replace("seed: int = 0", 'seed: int = \\"half\\"'))
    another_day.open("notebooks/wrong.ipynb")
    another_day.run_all()
    another_day.save()
    another_day.close()
    (error,) = [o for o in lab.outputs(wrong) if o["output_type"] == "error"]
    assert error["traceback"] == ["InvalidInput: `seed` must be int, got 'half'."]
