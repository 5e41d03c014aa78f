"""The wheel: what it carries, and that it runs in an empty folder."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import terminals
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
STUDY = """
task: digits-lstm
recipes: [dynamic-int8]
targets: [cpu/torch]
threads: 1
effort: quick
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_wheel_carries_everything_that_a_run_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kinds = (
        "notebooks/*.ipynb",
        "shrinkkit/report/template/*",
        "shrinkkit/tasks/bundled/**/*.yaml",
        "shrinkkit/tasks/bundled/weights/*",
    )
    needed = [path for kind in kinds for path in ROOT.glob(kind)] + [ROOT / "shrinkkit/tasks/bundled/my_task.py"]
    assert len(needed) > 20
    inside = {("shrinkkit" / p.relative_to(ROOT)) if p.suffix == ".ipynb" else p.relative_to(ROOT) for p in needed}
    assert {p.as_posix() for p in inside} - names == set()


@pytest.fixture
def installed(wheel, tmp_path_factory):
    """The command line of the installed wheel, and an environment in which it does not find the sources."""
    place = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    # The dependencies come from here, so that they need not be downloaded; shrinkkit itself comes from the wheel.
    site = next((place / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import shrinkkit; print(shrinkkit.__file__)"], cwd=place, env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(place)
    return place / "bin/shrinkkit", environment


def test_the_wheel_runs_in_an_empty_folder_and_its_table_fits_the_terminal(installed, tmp_path):
    program, environment = installed
    (tmp_path / "study.yaml").write_text(STUDY)
    command, options = [program, "run", "study.yaml"], {"cwd": tmp_path, "env": environment}
    shown, status = terminals.run(command, columns=80, **options)
    assert status == 0, shown
    assert max(len(line.rstrip()) for line in terminals.plain(shown).replace("\r", "\n").splitlines()) <= 80
    assert re.search(r"1-baseline +running +\d+ s", terminals.plain(shown))
    assert "1-baseline: Export · Exporting" in terminals.plain(shown)
    assert "4 of 4 steps" in terminals.plain(shown)
    assert "report: reports/study/report.html" in terminals.plain(shown)
    assert (tmp_path / "reports/study/report.html").is_file()
    again, _ = terminals.run(command, columns=200, **options)
    assert re.search(r"1-baseline +cached", terminals.plain(again))
    assert max(len(line.rstrip()) for line in terminals.plain(again).replace("\r", "\n").splitlines()) > 80
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, **options)
    data = json.loads(as_json.stdout)
    assert (data["run"], data["failures"]) == ("reports/study", 0)
    assert [step["state"] for step in data["steps"]] == ["cached", "cached", "cached", "done"]


def test_conda_s_environment_and_pyproject_say_the_same(project):
    found = YAML(typ="safe").load((ROOT / "environment.yml").read_text())
    assert found["name"] == project["name"]
    python = next(d for d in found["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert SpecifierSet(project["requires-python"]).contains(python.removeprefix("python="))
    pip = next(d["pip"] for d in found["dependencies"] if isinstance(d, dict))
    assert pip == ["-e .[all,dev]"]


def requirements(project, *extras):
    """Return the dependencies of the package with some extras, without extras that name others."""
    wanted = project["dependencies"] + [w for extra in extras for w in project["optional-dependencies"][extra]]
    return [requirement for w in wanted if (requirement := Requirement(w)).name != "shrinkkit"]


def test_few_packages_are_mandatory_and_one_extra_has_all_that_users_need(project):
    assert len(project["dependencies"]) <= 15
    (every,) = map(Requirement, project["optional-dependencies"]["all"])
    assert every.name == "shrinkkit"
    assert every.extras == set(project["optional-dependencies"]) - {"all", "dev", "timm"}


def test_the_lock_pins_every_dependency_within_its_range_and_names_no_place(project):
    lines = (ROOT / "requirements.lock").read_text().split()
    assert all("==" in line and "/" not in line and "+" not in line for line in lines)
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    # timm's torchvision must be the one that was built for the torch of the machine.
    wanted = requirements(project, *(set(project["optional-dependencies"]) - {"timm"}))
    assert len(wanted) > 20
    assert [str(w) for w in wanted if not w.specifier.contains(locked.get(canonicalize_name(w.name), "0"))] == []
    assert locked["torch"] == "2.13.0"


def test_every_package_that_is_imported_is_declared_or_comes_with_one_that_is(project):
    imported = set()
    for path in (ROOT / "shrinkkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    providers = metadata.packages_distributions()
    others = imported - set(sys.stdlib_module_names) - {"shrinkkit"}
    needed = {canonicalize_name(name) for package in others for name in providers[package]}
    extras = set(project["optional-dependencies"]) - {"dev", "timm"}
    declared = {canonicalize_name(w.name) for w in requirements(project, *extras)}
    brought = {
        canonicalize_name(requirement.name)
        for name in declared
        for requirement in map(Requirement, metadata.requires(name) or ())
        if not requirement.marker or requirement.marker.evaluate({"extra": ""})
    }
    assert needed - declared - brought == set()


def test_the_automatic_check_runs_what_the_readme_says():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1].removeprefix("exec ") == "make test"


def test_the_documents_of_a_package_are_there():
    for name in (
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "LICENSE",
        ".pre-commit-config.yaml",
        "environment.yml",
    ):
        assert (ROOT / name).stat().st_size > 100
