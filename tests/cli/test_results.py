"""What a run is doing and what it gave, in the terminal."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import examples
import pytest
import terminals

from shrinkkit import cli
from shrinkkit.core import store
from shrinkkit.core.run_folder import RunFolder, Status
from shrinkkit.results import output, results

CLI = [sys.executable, "-m", "shrinkkit.cli"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `reports/synthetic`."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "reports").mkdir()
    examples.write_run(folder / "reports/synthetic")
    return folder


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def data(capsys, *arguments):
    assert cli.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_found_by_folder_by_name_and_as_the_latest(there, capsys):
    found = [data(capsys, "status", *given)["run"] for given in (["reports/synthetic"], ["synthetic"], [])]
    assert found == ["reports/synthetic"] * 3
    assert cli.main(["status", "synthtic"]) == 2
    assert "Did you mean `synthetic`?" in capsys.readouterr().err
    assert cli.main(["show", "--reports", "nowhere"]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err


def test_the_latest_run_is_the_one_whose_status_changed_last(tmp_path, capsys):
    for name in ("a", "b"):
        examples.write_run(tmp_path / name)
    os.utime(tmp_path / "b/status.json", (1, 1))
    assert data(capsys, "status", "--reports", str(tmp_path))["run"] == str(tmp_path / "a")
    (tmp_path / "a/status.json").unlink()
    os.utime(tmp_path / "a/study.json", (0, 0))
    assert data(capsys, "status", "--reports", str(tmp_path))["run"] == str(tmp_path / "b")


def test_the_status_of_a_run_in_progress_tells_for_how_long_a_step_has_been_running(tmp_path, capsys):
    run = RunFolder(examples.write_run(tmp_path / "run"))
    changed = run.status.stat().st_mtime - 70
    os.utime(run.status, (changed, changed))
    with store.hold(run.path):
        found = data(capsys, "status", str(run.path))
        assert cli.main(["status", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert found["in_progress"]
    step = found["steps"][-1]
    assert (step["name"], step["state"]) == ("5-report", "running")
    assert 70 <= step["duration_s"] < 100
    assert "run: in progress" in shown
    assert "1:1" in next(line for line in shown.splitlines() if line.startswith("5-report"))


def test_a_run_that_was_killed_is_not_in_progress_whatever_it_left(tmp_path, capsys):
    run = RunFolder(examples.write_run(tmp_path / "run"))
    (run.path / store.TOKEN).write_text("left by a killed run")
    found = data(capsys, "status", str(run.path))
    assert not found["in_progress"]
    assert (found["steps"][-1]["state"], found["steps"][1]["state"]) == ("interrupted", "done")
    assert cli.main(["status", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "not in progress" in shown
    assert "Run the same command again" in " ".join(shown.split())
    # Asking changes nothing.
    assert store.read(run.status, Status).steps[-1].state == "running"


def test_show_prints_what_a_run_prints_at_its_end(there, capsys):
    loaded = results.load(RunFolder("reports/synthetic").path)
    assert cli.main(["show"]) == 0
    shown = capsys.readouterr().out
    assert output.table(loaded) in shown
    assert "channels-50-static-int8 on cpu/onnxruntime" in shown[shown.index("Summary") :]
    assert data(capsys, "show")["verdict"]["variant"] == "channels-50-static-int8"


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_tables_of_results_fit_every_width_without_cutting_figures(there, width):
    loaded = results.load(RunFolder("reports/synthetic").path)
    text = output.table(loaded, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    row = next(line for line in text.splitlines() if line.startswith("static-int8"))
    assert "\N{MINUS SIGN}0.1" in row
    assert ("0.3 to" in row) == (width >= 100)
    assert ("Without " in text) == (width < 80)
    assert ("301 kB" in row) == (width >= 80)


def test_names_that_do_not_fit_go_on_in_the_next_line(there):
    loaded = results.load(RunFolder("reports/synthetic").path)
    text = output.table(loaded, width=40)
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("channels-50-static- "))
    assert "4.97\N{MULTIPLICATION SIGN}" in lines[first]
    assert lines[first + 1] == "int8"


def test_open_gives_the_address_of_the_report_to_the_browser(there, place):
    report = place / "reports/synthetic/report.html"
    report.write_text("a page")
    log = place / "opened.txt"
    browser = place / "browser.py"
    browser.write_text(f"import sys, pathlib; pathlib.Path({str(log)!r}).write_text(sys.argv[1])")
    variables = os.environ | {"BROWSER": f"{sys.executable} {browser} %s"}
    shown = subprocess.run([*CLI, "open"], env=variables, capture_output=True, text=True, check=True)
    assert shown.stdout == "reports/synthetic/report.html\n"
    assert log.read_text() == report.as_uri()


def test_open_prints_the_path_where_there_is_no_browser(there, place, tmp_path):
    (place / "reports/synthetic/report.html").write_text("a page")
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    variables = {k: v for k, v in os.environ.items() if k not in hidden} | {"PATH": str(tmp_path)}
    shown = subprocess.run([*CLI, "open"], env=variables, capture_output=True, text=True, check=True)
    assert shown.stdout == f"There is no browser here; open {(place / 'reports/synthetic/report.html').resolve()}\n"


def test_open_without_a_report_says_how_to_make_one(tmp_path, capsys):
    examples.write_run(tmp_path / "run")
    assert cli.main(["open", str(tmp_path / "run")]) == 2
    assert "shrinkkit report" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "status", "list"])
def test_colour_is_for_terminals_and_no_color_is_respected(place, command):
    for no_color in ("", "1"):
        call = ["env", f"NO_COLOR={no_color}", *CLI, command]
        shown, status = terminals.run(call, cwd=place, columns=80, env=os.environ)
        assert status == 0
        lines = terminals.plain(shown).splitlines()
        assert max(len(line.rstrip()) for line in lines) <= 80
        has_colour = bool(re.search(r"\x1b\[(\d;)?3\dm", shown))
        assert has_colour == (command == "status" and not no_color)
    log = subprocess.run([*CLI, command], cwd=place, capture_output=True, text=True, check=True)
    assert "\x1b" not in log.stdout + log.stderr


def test_status_and_list_and_doctor_load_neither_torch_nor_notebooks(place):
    for command in (["status"], ["list"], ["doctor"]):
        asked = [sys.executable, "-X", "importtime", "-m", "shrinkkit.cli", *command]
        shown = subprocess.run(asked, cwd=place, capture_output=True, text=True, check=True)
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
        assert "typer" in loaded
        assert loaded & {"torch", "papermill", "nbconvert", "matplotlib"} == set()


def test_a_status_of_another_version_is_an_error_that_names_the_remedy(tmp_path, capsys):
    run = RunFolder(examples.write_run(tmp_path / "run"))
    store.write(run.status, dataclasses.replace(store.read(run.status, Status), schema_version=1))
    assert cli.main(["status", str(run.path)]) == 2
    assert "Run the study again" in capsys.readouterr().err
