"""The packages' imports and documentation, and the form of the notebooks."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shrinkkit.pipeline import parameters

ROOT = Path(__file__).parent.parent
PACKAGE, NOTEBOOKS = ROOT / "shrinkkit", ROOT / "notebooks"

MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [
    "1-baseline",
    "2-prune",
    "2-train",
    "2-transform",
    "3-quantize",
    "3-search",
    "4-benchmark",
    "4-robustness",
    "5-report",
    "start",
]


def test_imports_obey_the_contracts_in_pyproject():
    linted = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_folders_stay_small_enough_to_read():
    assert len([p for p in PACKAGE.iterdir() if p.name != "__pycache__"]) <= 17
    folders = [PACKAGE, *(p for p in PACKAGE.rglob("*") if p.is_dir())]
    assert [f.name for f in folders if len([p for p in f.glob("*.py") if p.name != "__init__.py"]) > 15] == []


def test_the_command_line_is_imported_without_torch():
    code = (
        "import sys, shrinkkit.cli, shrinkkit.pipeline.runner, shrinkkit.report.show; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", [[], ["run"]])
def test_help_is_shown_without_loading_torch(command):
    asked = [sys.executable, "-X", "importtime", "-m", "shrinkkit.cli", *command, "--help"]
    shown = subprocess.run(asked, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "typer" in loaded
    assert loaded & {"torch", "papermill", "nbconvert", "matplotlib"} == set()


def test_architecture_md_names_every_package():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    packages = {p.parent.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("__init__.py")} - {".", "tasks/bundled"}
    assert [name for name in packages if f"`{name}/`" not in text] == []


ANSWERS = re.findall(r"^\| .+\? \| `(\S+)` \| `(\w+)` \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)


def test_architecture_md_answers_ten_questions():
    assert len(ANSWERS) >= 10


@pytest.mark.parametrize(("path", "name"), ANSWERS)
def test_the_answers_of_architecture_md_exist(path, name):
    nodes = ast.walk(ast.parse((PACKAGE / path).read_text()))
    assert name in {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert [n.name for n in public if not ast.get_docstring(n)] == []
    assert ast.get_docstring(tree)


def test_the_notebooks_are_a_start_and_five_steps():
    assert sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
class TestNotebook:
    @pytest.fixture
    def cells(self, name):
        return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]

    def test_opens_with_a_title_and_two_sentences(self, cells):
        first = "".join(cells[0]["source"])
        assert cells[0]["cell_type"] == "markdown"
        assert re.match(r"# .+\n\n", first)

    def test_parameters_are_annotated_and_commented(self, name, cells):
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        lines = "".join("".join(c["source"]) for c in tagged).splitlines()
        assert [line for line in lines if not re.fullmatch(r"\w+: [\w \[\]|]+ = .+  # \S.*", line)] == []
        assert len(parameters.read(NOTEBOOKS / f"{name}.ipynb")) == len(lines) >= 2

    def test_is_stored_without_outputs_and_with_ids(self, cells):
        code = [c for c in cells if c["cell_type"] == "code"]
        assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
        assert len({c["id"] for c in cells}) == len(cells)
        # An id is a word: a random one would change whenever a notebook is rewritten.
        assert [c["id"] for c in cells if not re.fullmatch(r"[a-z]+(-[a-z]+)*", c["id"])] == []

    def test_reads_like_an_article(self, cells):
        code = [c for c in cells if c["cell_type"] == "code"]
        assert 8 <= len(cells) <= 36
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
        assert name == "5-report" or headings[-2:] == ["Conclusion", "Next steps"]
