"""Disks that are full, read-only or gone, and pages that cannot be made: one sentence, and the numbers stay."""

import contextlib
import os
import shutil
import subprocess
import sys
import time

import examples
import nbformat
import pytest
from children import running
from nbformat.v4 import new_code_cell, new_notebook

from shrinkkit import cli
from shrinkkit.cli import TRACEBACK
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.store import PART
from shrinkkit.pipeline import steps
from shrinkkit.pipeline.plan import REPORT, Planned
from shrinkkit.results import results

CLI = [sys.executable, "-m", "shrinkkit.cli"]


def call(*arguments, **options):
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, check=False, env=own, **options)


def is_one_sentence(ended, *words, status=1):
    assert ended.returncode == status, ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.strip()]
    assert len(said) == 1
    assert said[0].startswith("shrinkkit: ")
    assert any(word in said[0] for word in words), said
    assert "Traceback" not in ended.stderr + ended.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return examples.write_run(tmp_path_factory.mktemp("reports") / "run")


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a disk of so many KiB."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size, *options):
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}k", *options]), "tmpfs", place],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", place], capture_output=True, check=False)


def test_a_report_on_a_disk_that_cannot_be_written_is_one_sentence(small_disk, written):
    place = small_disk(8000)
    shutil.copytree(written, place / "run")
    before = sorted(path.name for path in (place / "run").rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    is_one_sentence(call("report", place / "run"), "Read-only file system")
    assert sorted(path.name for path in (place / "run").rglob("*")) == before


def test_a_report_on_a_full_disk_is_told_and_leaves_nothing_half_written(small_disk, written):
    place = small_disk(2000)
    shutil.copytree(written, place / "run")
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    ended = call("report", place / "run")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert not list((place / "run").rglob(f"*{PART}"))
    assert not list((place / "run").glob(".attempt-*"))
    assert results.load(place / "run").row("channels-50", "cpu/torch").state == "measured"


def test_a_run_on_a_full_disk_is_told(small_disk):
    ended = call("run", "digits-cnn", "--recipe", "static-int8", "--target", "cpu/torch", "--reports", small_disk(8))
    assert ended.returncode == 1
    assert "No space left" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [["run", "digits-cnn", "--reports"], ["index"], ["report"]])
@pytest.mark.parametrize("kind", ["file", "nothing below a file", "pipe"])
def test_a_folder_that_is_none_is_refused(tmp_path, command, kind):
    place = tmp_path / "here"
    os.mkfifo(place) if kind == "pipe" else place.write_text("precious")
    is_one_sentence(call(*command, place / "x" if "below" in kind else place), "must be", status=2)
    assert kind == "pipe" or place.read_text() == "precious"


@pytest.mark.parametrize("name", ["digits-cnn", "digits-cnn/steps", "digits-cnn/status.json"])
def test_something_else_in_the_place_of_a_file_is_one_sentence(tmp_path, name):
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_text("x") if name.endswith(("cnn", "steps")) else place.mkdir()
    asked = ("run", "digits-cnn", "--recipe", "static-int8", "--target", "cpu/torch", "--reports", tmp_path)
    is_one_sentence(call(*asked), "exists", "directory", "must be", status=2 if name == "digits-cnn" else 1)


def test_a_folder_that_is_removed_during_the_run_is_not_made_again(tmp_path):
    asked = ["run", "digits-cnn", "--recipe", "static-int8", "--target", "cpu/torch"]
    child = subprocess.Popen([*CLI, *asked], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "reports/digits-cnn"
    while not running(child.pid, "ipykernel_launcher"):
        assert child.poll() is None
        time.sleep(0.05)
    shutil.rmtree(run)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "Traceback" not in said
    assert not run.exists()


@pytest.mark.parametrize("name", ["", "ask"])
def test_what_nobody_foresaw_is_one_sentence_and_whole_on_request(tmp_path, monkeypatch, capsys, name):
    # A folder whose name is longer than any system allows.
    place = tmp_path / ("x" * 300)
    if name:
        monkeypatch.setenv(TRACEBACK, "1")
        with pytest.raises(OSError, match="too long"):
            cli.main(["run", "digits-cnn", "--reports", str(place)])
    else:
        assert cli.main(["run", "digits-cnn", "--reports", str(place)]) == 1
        assert TRACEBACK in capsys.readouterr().err


def execute(tmp_path, source, name="1-baseline"):
    folder = tmp_path / "run"
    folder.mkdir()
    path = tmp_path / f"{name}.ipynb"
    cells = [new_code_cell("x: int = 1  # a number", metadata={"tags": ["parameters"]}), new_code_cell(source)]
    nbformat.write(new_notebook(cells=cells), path)
    step = Planned(name, name, "", {}, (), "")
    ended = steps.execute(path, step, RunFolder(folder), timeout_s=60.0, threads=1, tick=lambda seconds, phase: None)
    return folder, ended


NO_PAGE = "import os; os.mkdir('notebook.html'); os.mkdir('notebook.html/x')"


def test_a_step_whose_page_cannot_be_made_has_worked_and_says_so(tmp_path):
    folder, ended = execute(tmp_path, NO_PAGE)
    assert ended.error == ""
    assert "page could not be made" in ended.note
    assert "Traceback" in (folder / "run.log").read_text()
    assert {path.name for path in (folder / "steps").iterdir()} == {"1-baseline.ipynb"}


def test_a_report_whose_page_cannot_be_made_has_failed(tmp_path):
    _, ended = execute(tmp_path, NO_PAGE, name=REPORT)
    assert "page could not be made" in ended.error


def test_a_step_that_fails_keeps_its_error_when_its_page_fails_too(tmp_path):
    _, ended = execute(tmp_path, f"{NO_PAGE}; 1 / 0")
    assert ended.error.startswith("ZeroDivisionError")


def test_pages_are_made_where_nbconvert_itself_finds_no_template(tmp_path):
    path = tmp_path / "n.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), path)
    code = (
        "import sys; sys.prefix = '/nowhere'; from shrinkkit.report import export as report;"
        f"report.html({str(path)!r}, {str(tmp_path / 'n.html')!r}, title='t');"
        f"report.markdown({str(path)!r}, {str(tmp_path / 'n.md')!r})"
    )
    own = os.environ | {"JUPYTER_PATH": "", "HOME": str(tmp_path), "JUPYTER_DATA_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=own, check=True)
    assert (tmp_path / "n.html").stat().st_size > 1000
