import json
import os
import re
import shutil
import subprocess
import sys

import examples
import pytest
import terminals

from shrinkkit import cli
from shrinkkit.cli import terminal
from shrinkkit.core import machines

COMMANDS = "run status report show open index verify list doctor new notebooks".split()


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_has_every_command_and_ends_with_status_0(command, capsys):
    assert cli.main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: shrinkkit" in out
    assert command or [name for name in COMMANDS if name not in out] == []


@pytest.mark.parametrize("command", [[], ["run"], ["report"], ["verify"]])
def test_help_names_the_exit_statuses(command, capsys):
    assert cli.main([*command, "--help"]) == 0
    assert re.search(r"^ 1 - ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["run"], ["rn"], ["list", "things"], ["run", "a.yaml", "--thread", "2"]])
def test_a_command_line_that_is_not_valid_ends_with_status_2(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "Usage" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"shrinkkit \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_shells_complete_studies_recipes_and_targets(tmp_path):
    def completed(words):
        variables = {"_SHRINKKIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        call = [sys.executable, "-c", "from shrinkkit import cli; cli.main()"]
        return subprocess.run(call, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True).stdout

    (tmp_path / "mine.yaml").touch()
    assert "digits-cnn" in completed("shrinkkit run digits-c")
    assert "mine.yaml" in completed("shrinkkit run mi")
    assert "static-int8" in completed("shrinkkit run x --recipe static")
    assert "cpu/onnxruntime" in completed("shrinkkit run x --target cpu/on")


def test_list_recipes_says_what_each_does(capsys):
    assert cli.main(["list", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("channels-50-static-int8 ") and "50%" in line and "static-int8" in line[25:] for line in lines
    )
    assert cli.main(["list", "recipes", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(lines)


def test_list_targets_says_why_one_cannot_run_here(capsys):
    assert cli.main(["list", "targets"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["cpu/torch"] == "available"
    assert lines["cuda/torch"] == "available" or lines["cuda/torch"].startswith("unavailable: ")


def test_brackets_are_shown_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal.print_rows([("cpu/onnxruntime", 'unavailable: pip install "shrinkkit[onnxruntime]"')])
    assert "shrinkkit[onnxruntime]" in terminals.plain(capsys.readouterr().out)


def test_list_tasks_names_the_bundled_ones_and_how_to_make_one(capsys):
    assert cli.main(["list", "tasks"]) == 0
    out = capsys.readouterr().out
    assert "digits-cnn" in out
    assert "shrinkkit new" in out


def test_new_writes_a_task_that_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "my_task.py"
    assert cli.main(["new", str(path)]) == 0
    assert "def task()" in path.read_text()
    assert cli.main(["new", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_new_wants_a_python_file(tmp_path, capsys):
    assert cli.main(["new", str(tmp_path / "task.txt")]) == 2
    assert "A task is a Python file" in capsys.readouterr().err


def test_notebooks_are_copied_out_and_not_overwritten(tmp_path, capsys):
    assert cli.main(["notebooks", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/start.ipynb").is_file()
    assert cli.main(["notebooks", str(tmp_path / "out")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits-cn"], "Did you mean `digits-cnn`?"),
        (["digits-cnn", "--recipe", "static-int3"], "static-int3"),
        (["digits-cnn", "--recipe", "chanels-50"], "Did you mean `channels-50`?"),
        (["digits-cnn", "--target", "cpu/tensorrt"], "cpu/tensorrt"),
        (["digits-cnn", "--target", "cpu/onnx"], "Did you mean `cpu/onnxruntime`?"),
        (["missing.yaml"], "missing.yaml"),
        (["digits-cnn", "--only", "benchmark", "--recipe", "static-int8"], "Leave them out"),
        (["digits-cnn", "--only", "benchmark", "--accuracy-drop", "0.1"], "Leave them out"),
        (["digits-cnn", "--only", "benchmark"], "reports/digits-cnn must be a run folder"),
        (["my_task.py", "--only", "benchmark", "--reports", "there"], "there/my_task must be a run folder"),
        (["missing.yaml", "--only", "benchmark"], "missing.yaml"),
    ],
)
@pytest.mark.parametrize("extra", [[], ["--dry-run", "--json"]])
def test_what_is_not_valid_ends_with_status_2_and_the_reason(arguments, message, extra, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", *arguments, *extra]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_report_of_no_run_ends_with_status_2(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "must be a run folder" in capsys.readouterr().err


def test_a_full_print_without_a_pdf_ends_with_status_2_and_the_remedy(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path), "--full"]) == 2
    assert "Add `--pdf`" in capsys.readouterr().err


def test_a_run_folder_to_measure_is_given_as_such_or_found_by_its_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports/mine").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text("name: mine\ntask: digits-cnn\nrecipes: [static-int8]\ntargets: [cpu/torch]\n")
    for given in ("reports/mine", "mine.yaml", "mine.py"):
        assert cli.main(["run", given, "--only", "benchmark"]) == 2
        assert "reports/mine must be a run folder, with a study.json" in capsys.readouterr().err


def test_a_dry_run_prints_the_steps_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "digits-cnn", "--recipe", "static-int8", "--target", "cpu/torch", "--dry-run"]
    assert cli.main([*arguments, "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [(step["name"], step["state"]) for step in steps] == [
        (name, "run") for name in ("1-baseline", "3-quantize-static-int8", "4-benchmark-cpu-torch", "5-report")
    ]
    assert cli.main(arguments) == 0
    assert re.search(r"^4-benchmark-cpu-torch +run +cpu/torch$", capsys.readouterr().out, re.MULTILINE)
    assert cli.main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_left_out_by_default_is_said_in_a_line_and_is_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "digits-cnn", "--target", "cpu/torch", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for name in ("float16", "bfloat16"):
        assert (f"{name}: no hardware support on this CPU" in out) == machines.lacks(name)
        assert (f"3-quantize-{name} " in out) != machines.lacks(name)


@pytest.mark.slow
def test_the_report_command_prints_lines_in_a_log_and_a_table_in_a_terminal(tmp_path):
    # Without measurements: nothing but the report's own pictures would take time.
    shutil.rmtree(examples.write_run(tmp_path / "run") / "measurements")
    command = [sys.executable, "-m", "shrinkkit.cli", "report", "run"]
    log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert log.stdout.splitlines()[:2] == ["[1/1] 5-report · running", log.stdout.splitlines()[1]]
    assert log.stdout.splitlines()[1].startswith("[1/1] 5-report · done · ")
    assert "\x1b" not in log.stdout + log.stderr
    quiet = subprocess.run([*command, "--quiet"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert quiet.stdout + quiet.stderr == ""
    as_json = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(as_json.stdout) == {"report": "run/report.html"}
    shown, status = terminals.run(command, cwd=tmp_path, columns=100, env=os.environ)
    assert status == 0
    assert "\x1b[" in shown
    assert re.search(r"5-report +running", terminals.plain(shown))
    assert re.search(r"5-report +done", terminals.plain(shown))
