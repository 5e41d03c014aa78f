import subprocess
import sys

import pytest

from shrinkkit import cli


def test_importing_the_command_line_does_not_import_torch():
    code = "import sys, shrinkkit.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", [[], ["run"], ["list"], ["new"], ["report"], ["notebooks"]])
def test_help_names_the_exit_statuses(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    assert "interrupted; the same command goes on" in capsys.readouterr().out


def test_list_recipes_says_what_each_does(capsys):
    assert cli.main(["list", "recipes"]) == 0
    assert "prune-channels 50%, fine-tune, static-int8" in capsys.readouterr().out


def test_list_targets_says_why_one_cannot_run_here(capsys):
    assert cli.main(["list", "targets"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["cpu/torch"] == "can run here"
    assert lines["cuda/torch"] == "can run here" or "not here: " in lines["cuda/torch"]


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
    assert len(list((tmp_path / "out").glob("*.ipynb"))) == 8
    assert cli.main(["notebooks", str(tmp_path / "out")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits-cn"], "digits-cnn"),
        (["digits-cnn", "--recipe", "static-int3"], "static-int3"),
        (["digits-cnn", "--target", "cpu/tensorrt"], "cpu/tensorrt"),
        (["missing.yaml"], "missing.yaml"),
        (["digits-cnn", "--only", "benchmark", "--recipe", "static-int8"], "Leave them out"),
        (["digits-cnn", "--only", "benchmark", "--accuracy-drop", "0.1"], "Leave them out"),
        (["digits-cnn", "--only", "benchmark"], "reports/digits-cnn must be a run folder"),
        (["my_task.py", "--only", "benchmark", "--reports", "there"], "there/my_task must be a run folder"),
        (["missing.yaml", "--only", "benchmark"], "missing.yaml"),
    ],
)
def test_what_is_not_valid_ends_with_status_2_and_the_reason(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_report_of_no_run_ends_with_status_2(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "must be a run folder" in capsys.readouterr().err


def test_a_run_folder_to_measure_is_given_as_such_or_found_by_its_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports/mine").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text("name: mine\ntask: digits-cnn\nrecipes: [static-int8]\ntargets: [cpu/torch]\n")
    for given in ("reports/mine", "mine.yaml", "mine.py"):
        assert cli.main(["run", given, "--only", "benchmark"]) == 2
        assert "reports/mine must be a run folder, with a study.json" in capsys.readouterr().err
