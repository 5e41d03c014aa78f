"""Live outputs and controls in a real kernel: a saved notebook keeps the last state of each."""

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from shrinkkit.display.tables import ProgressBar, Statement
from shrinkkit.errors import InvalidInput
from shrinkkit.widgets import live
from shrinkkit.widgets.live import Live

WIDGET = "application/vnd.jupyter.widget-view+json"
EXPLORE = """
from ipywidgets import FloatSlider
from shrinkkit.display.tables import Statement
from shrinkkit.errors import InvalidInput
from shrinkkit.widgets import live
def draw(ratio):
    if ratio > 0.9:
        raise InvalidInput("`ratio` must be at most 0.9. Pass less.")
    return Statement(f"a ratio of {ratio:.1f}")
slider = FloatSlider(0.5, description="ratio")
shown = live.explore(draw, ratio=slider)
"""
SETTLE = "\nimport asyncio\nawait asyncio.sleep(0.5)\n"
MOVED = EXPLORE + "slider.value = 0.8" + SETTLE
TOO_FAR = EXPLORE + "slider.value = 0.95" + SETTLE
BACK = TOO_FAR + "slider.value = 0.2" + SETTLE
HURRIED = EXPLORE.replace("def draw(ratio):", "drawn = []\ndef draw(ratio):\n    drawn.append(ratio)")
HURRIED += "for i in range(6, 10):\n    slider.value = i / 10\n"
PROGRESS = """
from shrinkkit.widgets import live
watch = live.progress("Sleeping")
for i in range(3):
    watch(i + 1, 3, f"step {i + 1}")
"""
PRESSED = """
from ipywidgets import Button
from shrinkkit.display.tables import Statement
from shrinkkit.widgets import live
shown = live.on_request("Evaluate", lambda: Statement("it is good"), before=Statement("Not evaluated yet."))
"""
ATTENDED = """
from IPython.display import display
from shrinkkit.widgets import live
display(live.attended())
"""
PRESS = "import ipywidgets.widgets.widget as w\n[b for b in w._instances.values() if isinstance(b, Button)][0].click()"


@pytest.fixture(scope="module")
def kernel():
    """A kernel for all tests of this file: starting one takes longer than each of them."""
    client = NotebookClient(new_notebook(), timeout=60)
    with client.setup_kernel():
        yield client


def outputs(client, source):
    """Return the data of the outputs that a cell keeps."""
    cell = new_code_cell(source)
    client.nb.cells = [cell]
    client.execute_cell(cell, 0)
    assert not [o for o in cell.outputs if o.output_type != "display_data"]
    return [o.data for o in cell.outputs]


@pytest.mark.parametrize(
    ("source", "said"), [(EXPLORE, "a ratio of 0.5"), (MOVED, "a ratio of 0.8"), (BACK, "a ratio of 0.2")]
)
def test_the_last_picture_is_what_the_notebook_keeps(kernel, source, said):
    controls, picture = outputs(kernel, source)
    assert said in picture["text/html"]
    assert WIDGET not in picture
    assert WIDGET in controls


def test_what_refuses_a_value_is_shown_in_place_of_the_picture(kernel):
    _, picture = outputs(kernel, TOO_FAR)
    assert "InvalidInput: `ratio` must be at most 0.9. Pass less." in picture["text/plain"]


def test_controls_are_a_line_of_words_where_there_is_no_kernel(kernel):
    controls, _ = outputs(kernel, EXPLORE)
    assert "In a running notebook: ratio 0.5." in controls["text/html"]


def test_progress_ends_in_words_that_say_how_it_ended(kernel):
    (bar,) = outputs(kernel, PROGRESS)
    assert bar["text/plain"].startswith("Sleeping (step 3): done in ")
    assert "<progress" not in bar["text/html"]


def test_a_button_replaces_its_first_output_when_it_is_clicked(kernel):
    _, answer = outputs(kernel, PRESSED)
    assert answer["text/plain"] == "Not evaluated yet."
    _, answer = outputs(kernel, PRESSED + PRESS)
    assert answer["text/plain"] == "it is good"


def test_an_error_of_a_callback_is_shown():
    def fail(**values):
        raise values["kind"]("why")

    assert repr(live.attempt(fail, kind=InvalidInput)) == "InvalidInput: why"
    assert repr(live.attempt(fail, kind=KeyError)).endswith("KeyError: 'why'")


def test_a_changed_value_greys_the_old_picture_until_the_new_one_is_there(kernel):
    _, picture = outputs(kernel, EXPLORE + "slider.value = 0.8")
    assert picture["text/plain"] == "updating: a ratio of 0.5"
    assert "opacity" in picture["text/html"]
    _, picture = outputs(kernel, MOVED)
    assert "opacity" not in picture["text/html"]


def test_of_several_changes_only_the_last_is_computed(kernel):
    _, picture, drawn = outputs(kernel, HURRIED + SETTLE + "display(drawn)")
    assert drawn["text/plain"] == "[0.5, 0.9]"
    assert picture["text/plain"] == "a ratio of 0.9"


def test_a_name_that_another_cell_defines_is_an_error_that_names_its_section(kernel, tmp_path):
    other = new_notebook(cells=[new_markdown_cell("## Load the model"), new_code_cell("the_model = 1")])
    nbformat.write(other, tmp_path / "open.ipynb")
    begin = f"import os; os.environ['JPY_SESSION_NAME'] = {str(tmp_path / 'open.ipynb')!r}\nimport shrinkkit\n"
    for name, expected in {"the_model": "the cell below 'Load the model'", "unheard_of": "not defined"}.items():
        cell = new_code_cell(begin + name)
        kernel.nb.cells = [cell]
        with pytest.raises(CellExecutionError):
            kernel.execute_cell(cell, 0)
        assert expected in "\n".join(cell.outputs[-1].traceback)


@pytest.mark.parametrize("attended", [True, False])
def test_a_cell_is_attended_if_its_front_end_accepts_input(kernel, attended):
    kernel.kc.allow_stdin = attended
    (shown,) = outputs(kernel, ATTENDED)
    kernel.kc.allow_stdin = False
    assert shown["text/plain"] == str(attended)


def test_nothing_is_attended_outside_of_a_notebook():
    assert not live.attended()


def test_outside_of_a_notebook_outputs_are_printed(capsys):
    shown = Live(Statement("one"))
    shown.show(Statement("two"))
    assert "one" in capsys.readouterr().out
    assert repr(shown.shown) == "two"


def test_progress_is_running_before_its_first_step_is_done():
    assert repr(ProgressBar("Fine-tuning", 0, 3)) == "Fine-tuning: running"
    assert 'max="3"' in ProgressBar("Fine-tuning", 1, 3).html()


def test_long_work_says_how_much_time_is_left():
    assert repr(ProgressBar("Fine-tuning", 1, 3, "", 10.0)).endswith("in 10.0 s, about 20 s left")
    assert repr(ProgressBar("Fine-tuning", 1, 31, "", 10.0)).endswith("about 5 min left")
    assert "left" not in repr(ProgressBar("Fine-tuning", 3, 3, "", 10.0))


def test_work_of_no_steps_has_nothing_to_do():
    assert repr(ProgressBar("Timing", 0, 0)) == "Timing: nothing to do"
