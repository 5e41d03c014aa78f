"""The order of the modules, their documentation, and the form of the notebooks."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shrinkkit import steps

ROOT = Path(__file__).parent.parent
PACKAGE, NOTEBOOKS = ROOT / "shrinkkit", ROOT / "notebooks"

ORDER = (
    "errors quiet tables rich formats views children lease records located intervals blocks evidence "
    "schema parameters recipes targets machines manifest folders rows conclusions pareto explain results "
    "snippets modelcard readme cards findings "
    "sources outputs usercode usermodel userscore duplicates tasks bundled "
    "recurrent channels ranking cutting deciding prune finetune copies quantize "
    "contention turns benchmark pictures measure "
    "scripting onnxnames onnxfiles vetting loading artifacts audit openvinograph compiled "
    "layertimes subgraphs emulation memory "
    "compress structure onnxint8 pt2e openvinofiles exports variants layererrors preview trials sweep verify "
    "drawing live explore figures convergence timings answers browse costs hotspots sections overview show "
    "report pdf index steps journal watchdog execution runs cli"
).split()
"""A module imports only from modules before it."""
DRIVER = {"report", "pdf", "index", "steps", "journal", "watchdog", "execution", "runs", "cli"}
DRIVER_MAY = {
    *DRIVER,
    "children",
    "lease",
    "manifest",
    "conclusions",
    "drawing",
    "figures",
    "folders",
    "tables",
    "formats",
    "pareto",
    "errors",
    "parameters",
    "records",
    "located",
    "recipes",
    "targets",
    "results",
    "bundled",
    "machines",
    "sources",
}
TESTED_WITH = {
    "channels": "prune", "ranking": "prune", "cutting": "prune", "deciding": "prune",
    "usercode": "tasks", "usermodel": "tasks", "userscore": "tasks", "subgraphs": "emulation",
    "onnxnames": "artifacts", "scripting": "artifacts",
    "modelcard": "cards", "readme": "cards", "exports": "variants",
    "children": "processes", "lease": "processes", "manifest": "altered_folders",
}  # fmt: skip
MODULES = sorted({p.stem for p in PACKAGE.glob("*.py")} - {"__init__"} | {"bundled"})
NAMES = ["1-baseline", "2-prune", "3-quantize", "4-benchmark", "5-report", "start"]


def sources(module):
    return sorted((PACKAGE / "bundled").glob("*.py")) if module == "bundled" else [PACKAGE / f"{module}.py"]


def imports(module):
    """Return the modules of this package that `module` imports while it runs; those for type checking do not count."""
    found = set()
    for path in sources(module):
        tree = ast.parse(path.read_text())
        typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        passed_over = {id(inner) for block in typing for inner in ast.walk(block)}
        for node in ast.walk(tree):
            if id(node) in passed_over:
                continue
            if isinstance(node, ast.ImportFrom) and node.module == "shrinkkit":
                found |= {alias.name for alias in node.names} & set(MODULES)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shrinkkit."):
                found.add(node.module.split(".")[1])
            elif isinstance(node, ast.Import):
                found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("shrinkkit.")}
    return found - {module}


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    before = set(ORDER[: ORDER.index(module)])
    # A task is loaded by name, and the bundled ones are tasks themselves.
    allowed = before | ({"bundled"} if module in ("tasks", "recipes") else set())
    assert imports(module) <= allowed


@pytest.mark.parametrize("module", sorted(DRIVER))
def test_the_driver_knows_nothing_of_models(module):
    assert imports(module) <= DRIVER_MAY


def test_nothing_that_the_driver_may_import_loads_torch():
    modules = ", ".join(f"shrinkkit.{name}" for name in sorted(DRIVER_MAY))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", [[], ["run"]])
def test_help_is_shown_without_loading_torch(command):
    asked = [sys.executable, "-X", "importtime", "-m", "shrinkkit.cli", *command, "--help"]
    shown = subprocess.run(asked, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "argparse" in loaded
    assert loaded & {"torch", "papermill", "nbconvert", "matplotlib"} == set()


def test_architecture_md_names_every_module():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert [m for m in MODULES if f"`{m}`" not in text] == []


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    for path in sources(module):
        tree = ast.parse(path.read_text())
        kinds = (ast.FunctionDef, ast.ClassDef)
        public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
        assert [n.name for n in public if not ast.get_docstring(n)] == []
        assert ast.get_docstring(tree) or path.name == "__init__.py"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_tests(module):
    assert list((ROOT / "tests").rglob(f"test_{TESTED_WITH.get(module, module)}.py"))


def test_the_notebooks_are_a_start_and_five_steps():
    assert sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
class TestNotebook:
    @pytest.fixture
    def cells(self, name):
        return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]

    def test_opens_with_a_question_in_its_title(self, cells):
        first = "".join(cells[0]["source"])
        assert cells[0]["cell_type"] == "markdown"
        assert re.match(r"# .+\?\n", first)

    def test_parameters_are_annotated_and_commented(self, name, cells):
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        lines = "".join("".join(c["source"]) for c in tagged).splitlines()
        assert [line for line in lines if not re.fullmatch(r"\w+: [\w \[\]|]+ = .+  # \S.*", line)] == []
        assert len(steps.parameters(NOTEBOOKS / f"{name}.ipynb")) == len(lines) >= 2

    def test_is_stored_without_outputs_and_with_ids(self, cells):
        code = [c for c in cells if c["cell_type"] == "code"]
        assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
        assert len({c["id"] for c in cells}) == len(cells)
        # An id is a word: a random one would change whenever a notebook is written anew.
        assert [c["id"] for c in cells if not re.fullmatch(r"[a-z]+(-[a-z]+)*", c["id"])] == []

    def test_reads_like_an_article(self, cells):
        code = [c for c in cells if c["cell_type"] == "code"]
        assert 8 <= len(cells) <= 32
        assert len(cells) - len(code) >= 0.45 * len(cells)
        own = [c for c in code if "parameters" not in c["metadata"].get("tags", [])]
        assert max(len(c["source"]) for c in own) <= 12

    def test_holds_no_plumbing(self, cells):
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Try, ast.For, ast.While)
        assert [ast.unparse(n) for n in ast.walk(ast.parse(code)) if isinstance(n, kinds)] == []
        assert "print(" not in code

    def test_ends_with_a_conclusion_and_what_to_do_next(self, cells, name):
        headings = re.findall(r"^##? (.+)$", "\n\n".join("".join(c["source"]) for c in cells), re.MULTILINE)
        assert name == "5-report" or headings[-2:] == ["Conclusion", "What next"]
