"""What a person may type into a notebook's parameters cell, and what they are told about the rest."""

import ast
import json

import nbformat
import pytest

from shrinkkit.errors import InvalidInput
from shrinkkit.pipeline import parameters, plan

NOTEBOOKS = sorted(plan.notebooks().glob("*.ipynb"))


def variables(notebook):
    """Return the variables of a notebook after its parameters cell has run."""
    cells = json.loads(notebook.read_text())["cells"]
    (cell,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    names = {"In": [cell]}
    exec(cell, names)
    return names


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_defaults_of_a_notebook_are_allowed(notebook):
    names = variables(notebook)
    parameters.check(names)
    assert len(parameters.read(notebook)) >= 2


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_checks_its_parameters_before_anything_else(notebook):
    code = ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    acts = [node for node in ast.parse(code[1]).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    assert ast.unparse(acts[0]) == "parameters.check(globals())"


@pytest.mark.parametrize(
    ("notebook", "name", "value", "message"),
    [
        ("1-baseline", "task", 5, "`task` must be str, got 5."),
        ("1-baseline", "runtimes", "torch", "`runtimes` must be list | None, got 'torch'."),
        (
            "1-baseline",
            "runtimes",
            ["onnx"],
            "onnxruntime or openvino, got 'onnx'.",
        ),
        ("1-baseline", "threads", "two", "`threads` must be int, got 'two'."),
        ("1-baseline", "threads", True, "`threads` must be int, got True."),
        ("1-baseline", "threads", -1, "`threads` must be a whole number >= 0 and at most 1024, got -1."),
        ("1-baseline", "seed", -1, "`seed` must be a whole number >= 0 and at most 4294967295, got -1."),
        ("2-prune", "settings", [1], "`settings` must be dict, got [1]."),
        ("2-transform", "transform", 5, "`transform` must be str, got 5."),
        ("2-prune", "variant", "../x", "`variant` must be a folder name"),
        ("2-prune", "variant", "baseline", "which names the unchanged model"),
        ("4-benchmark", "variants", [1], "must be a list of strings in quotes, got 1."),
        ("3-quantize", "variant", "", "`variant` must be a folder name"),
        ("4-benchmark", "batch_sizes", ["a"], "whole numbers >= 1 and at most 65536, got 'a'."),
        ("4-benchmark", "thread_counts", [0], "whole numbers >= 1 and at most 1024, got 0."),
    ],
)
def test_what_is_wrong_is_named_with_rule_and_value(notebook, name, value, message):
    names = variables(plan.notebooks() / f"{notebook}.ipynb") | {name: value}
    with pytest.raises(InvalidInput) as error:
        parameters.check(names)
    assert message in str(error.value)


@pytest.mark.parametrize("notebook", ["1-baseline", "2-train", "4-benchmark"])
def test_a_misspelt_name_is_an_error_with_the_closest_one(notebook):
    given = variables(plan.notebooks() / f"{notebook}.ipynb")
    given["In"].append("# Parameters\ntreads = 2\n")
    with pytest.raises(InvalidInput, match=r"`treads` is not a parameter\. Did you mean `threads`\? Available: task, "):
        parameters.check(given)
    typed = variables(plan.notebooks() / f"{notebook}.ipynb")
    typed["In"] = [cell.replace("threads: int", "treads: int") for cell in typed["In"]]
    with pytest.raises(InvalidInput, match=r"`treads` is not a parameter\. Did you mean `threads`\?"):
        parameters.check(typed | {"treads": 0})


def test_a_misspelt_name_is_forgotten_once_it_is_corrected():
    names = variables(plan.notebooks() / "2-prune.ipynb")
    parameters.check(names | {"In": ["treads: int = 2", *names["In"]], "treads": 2})


def test_a_parameter_of_ones_own_may_be_added():
    names = variables(plan.notebooks() / "2-prune.ipynb")
    parameters.check(names | {"In": [*names["In"], "my_limit: float = 2.0"], "my_limit": 2.0})


def test_a_whole_number_is_a_float_too():
    parameters.check({"In": ["ratio: float = 0.5"], "ratio": 0})


def test_none_is_allowed_only_where_it_is_declared():
    assert parameters.type_problem("limit", "float | None", None) == ""
    assert parameters.type_problem("limit", "float", None) == "`limit` must be float, got None."


def write(path, *sources, cell="ratio: float = 0.5  # share to remove"):
    cells = [nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_parameters_are_read_with_type_default_and_comment(tmp_path):
    path = write(tmp_path / "n.ipynb")
    assert parameters.read(path) == {"ratio": ("float", 0.5, "share to remove")}


def test_a_parameter_of_another_form_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"must read `name: type = default"):
        parameters.read(write(tmp_path / "n.ipynb", cell="ratio = 0.5"))


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "n.ipynb")
    with pytest.raises(InvalidInput, match=r"must have one cell tagged"):
        parameters.read(tmp_path / "n.ipynb")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rattio": 0.5}, "'rattio' is not a parameter. Did you mean `ratio`"),
        ({"ratio": "1e-3"}, "`ratio` must be float, got '1e-3'"),
        ({"ratio": True}, "`ratio` must be float, got True"),
        ({"ratio": None}, "`ratio` must be float, got None"),
    ],
)
def test_an_unknown_or_badly_typed_parameter_is_refused(tmp_path, value, message):
    with pytest.raises(InvalidInput, match=r"was not started") as caught:
        parameters.check_step(write(tmp_path / "n.ipynb"), value)
    assert message in str(caught.value)


def test_a_whole_number_is_a_float(tmp_path):
    parameters.check_step(write(tmp_path / "n.ipynb"), {"ratio": 1})
