"""Settings by `--set` and by variables, suggestions, and the plan that a run begins with."""

import dataclasses
import json
import re
import subprocess
import sys

import examples
import pytest
import usertasks

from shrinkkit import cli
from shrinkkit.core import store
from shrinkkit.core.run_folder import RunFolder, Status, Step
from shrinkkit.core.studies import Override, read_study, study
from shrinkkit.errors import InvalidInput, nearest
from shrinkkit.pipeline import run_status
from shrinkkit.runtimes import registry

STUDY = """task: digits-cnn
recipes: [static-int8, {name: mine, stages: [prune-channels: {ratio: 0.3}], precision: static-int8}]
targets: [cpu/torch]
budget: {accuracy_drop: 0.01, want: smallest}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/s.yaml").write_text(STUDY)
    return "sub/s.yaml"


def planned(capsys, *arguments):
    """Return the steps of a dry run by name."""
    assert cli.main(["run", *arguments, "--dry-run", "--json"]) == 0
    return {step["name"]: step for step in json.loads(capsys.readouterr().out)["steps"]}


def changed(file, *settings):
    return read_study(file, [Override.parse(text) for text in settings])


def test_set_replaces_single_settings_lists_and_entries_of_them(file):
    given = changed(
        file,
        "budget.accuracy_drop=0.02",
        "seed=1",
        "batch_sizes=[4, 8]",
        "recipes.1.stages.0.prune-channels.ratio=0.6",
        "threads=",
    )
    assert (given.budget.accuracy_drop, given.budget.want, given.seed, given.threads) == (0.02, "smallest", 1, None)
    assert given.batch_sizes == (4, 8)
    assert [recipe.name for recipe in given.recipes] == ["static-int8", "mine"]
    assert given.recipes[1].settings()["stages"][0]["prune-channels"]["ratio"] == 0.6


def test_the_last_of_two_settings_counts_and_is_named_in_errors(file):
    assert changed(file, "seed=1", "seed=2").seed == 2
    with pytest.raises(InvalidInput, match=r"\(--set seed=x\)"):
        changed(file, "seed=1", "seed=x")


def test_paths_in_set_are_relative_to_the_working_folder_and_those_of_the_file_to_the_file(file, tmp_path):
    (tmp_path / "my.yaml").write_text("precision: dynamic-int8\n")
    assert [recipe.name for recipe in changed(file, "recipes=[my.yaml]").recipes] == ["my"]
    (tmp_path / "sub/other.yaml").write_text("precision: dynamic-int8\n")
    with pytest.raises(InvalidInput, match=r"no recipe file 'other.yaml' \(--set recipes=\[other.yaml\]\)"):
        changed(file, "recipes=[other.yaml]")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "-1"),
        ("budget.accuracy_drop", "7"),
        ("budget.want", "cheapest"),
        ("targets", "[cpu/torch, cpu/torch]"),
        ("recipes", "[chanels-50]"),
        ("timeout_s", ".inf"),
        ("sed", "1"),
    ],
)
def test_set_is_checked_as_the_file_is_with_the_option_in_place_of_the_line(tmp_path, key, value):
    section, _, name = key.rpartition(".")
    line = f"{section}: {{{name}: {value}}}" if section else f"{key}: {value}"
    text = "\n".join(row for row in STUDY.splitlines() if not row.startswith((f"{section or key}:", "recipes")))
    path = tmp_path / "s.yaml"
    path.write_text(f"{text}\n{line}\n" + ("" if key == "recipes" else "recipes: [static-int8]\n"))
    with pytest.raises(InvalidInput) as in_file:
        read_study(path)
    path.write_text(STUDY)
    with pytest.raises(InvalidInput) as as_option:
        changed(path, f"{key}={value}")
    assert re.sub(r"\([^)]*s\.yaml:\d+\)", "()", str(in_file.value)) == str(as_option.value).replace(
        f"(--set {key}={value})", "()"
    )
    assert f"(--set {key}={value})" in str(as_option.value)


def test_set_goes_with_a_file_a_bundled_study_and_a_task(file, capsys):
    for what in ([file], ["digits-cnn"], ["digits-cnn", "--recipe", "static-int8"]):
        steps = planned(capsys, *what, "--set", "seed=7", "--set", "targets=[cpu/onnxruntime]")
        assert steps["4-benchmark-cpu-onnxruntime"]["parameters"]["seed"] == 7
        assert "4-benchmark-cpu-torch" not in steps


def test_other_options_are_named_in_errors_too(file, capsys):
    assert cli.main(["run", file, "--accuracy-drop", "7", "--threads", "0"]) == 2
    said = capsys.readouterr().err
    assert "(--accuracy-drop 7)" in said
    assert "(--threads 0)" in said


def test_variables_stand_for_options_and_the_command_line_comes_first(file, capsys, monkeypatch):
    monkeypatch.setenv("SHRINKKIT_RUN_SET", "seed=3 batch_sizes=[2]")
    monkeypatch.setenv("SHRINKKIT_RUN_EFFORT", "quick")
    parameters = planned(capsys, file)["4-benchmark-cpu-torch"]["parameters"]
    assert (parameters["seed"], parameters["batch_sizes"], parameters["effort"]) == (3, [2], "quick")
    parameters = planned(capsys, file, "--effort", "thorough")["4-benchmark-cpu-torch"]["parameters"]
    assert parameters["effort"] == "thorough"
    monkeypatch.setenv("SHRINKKIT_LIST_JSON", "1")
    assert cli.main(["list", "tasks"]) == 0
    assert "digits-cnn" in json.loads(capsys.readouterr().out)


def test_a_variable_of_no_option_is_an_error_and_those_of_a_run_are_in_its_command(file, capsys, monkeypatch):
    monkeypatch.setenv("SHRINKKIT_RUN_EFORT", "quick")
    assert cli.main(["list"]) == 2
    assert "SHRINKKIT_RUN_EFORT must be named after an option of `run`. Did you mean `SHRINKKIT_RUN_EFFORT`?" in (
        capsys.readouterr().err
    )
    monkeypatch.delenv("SHRINKKIT_RUN_EFORT")
    monkeypatch.setenv("SHRINKKIT_RUN_SET", "seed=3 threads=1")
    monkeypatch.setattr(sys, "argv", ["shrinkkit", "run", file])
    assert cli.run._command() == f"SHRINKKIT_RUN_SET='seed=3 threads=1' shrinkkit run {file}"


def test_the_rule_of_variables_is_a_line_of_help(capsys):
    assert cli.main(["--help"]) == 0
    assert "SHRINKKIT_RUN_EFFORT" in capsys.readouterr().out
    assert cli.main(["run", "--help"]) == 0
    assert "SHRINKKIT_" not in capsys.readouterr().out


@pytest.mark.parametrize(("word", "meant"), [("cpu/onnx", "cpu/onnxruntime"), ("openvino", "cpu/openvino")])
def test_a_part_of_a_name_suggests_that_name(word, meant):
    assert nearest(word, registry.targets()) == f" Did you mean `{meant}`?"
    assert nearest("zzzz", registry.targets()) == ""


@pytest.mark.parametrize(
    ("option", "meant"), [("--recipies", "--recipe"), ("--efort", "--effort"), ("--sett", "--set")]
)
def test_one_option_is_suggested(option, meant, capsys):
    assert cli.main(["run", "digits-cnn", option, "x"]) == 2
    assert f"(Possible options: {meant})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "meant"), [("--mode", "robsut", "robust"), ("--effort", "qick", "quick"), ("--mode", "x", "")]
)
def test_a_value_of_a_choice_is_suggested(option, value, meant, capsys):
    assert cli.main(["run", "digits-cnn", option, value]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"'{value}' is not one of" in said
    assert ("Did you mean" in said, f"Did you mean `{meant}`?" in said) == (bool(meant),) * 2


@pytest.mark.parametrize(
    ("given", "meant"),
    [("digit-cn", "digits-cnn"), ("studdy.yaml", "study.yaml"), ("my_tsk.py", "my_task.py"), ("study", "study.yaml")],
)
def test_an_unknown_study_suggests_a_bundled_one_or_a_file(given, meant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("study.yaml", "my_task.py", "notes.txt"):
        (tmp_path / name).write_text("")
    assert cli.main(["run", given]) == 2
    assert f"Did you mean `{meant}`?" in capsys.readouterr().err


def test_an_estimate_rests_on_what_steps_took_before_and_is_none_without(tmp_path):
    steps = [Step(name, name[:11], name, "run") for name in ("4-benchmark-a", "4-benchmark-b", "5-report")]
    run = RunFolder(tmp_path)
    assert run_status.estimate(run, steps) == "no estimate yet"
    earlier = [dataclasses.replace(steps[0], state="done", duration_s=90.0)]
    store.write(run.status, Status("", "", tuple(earlier)))
    assert run_status.estimate(run, steps[:1]).startswith("about 1:30 min")
    # The second benchmark is taken to last as long as the first; nothing is known of the report.
    assert run_status.estimate(run, steps).startswith("at least 3:00 min")
    assert run_status.estimate(run, []) == "nothing to run"
    # With another effort, a benchmark takes another time.
    thorough = [dataclasses.replace(step, effort="thorough") for step in steps[:2]]
    assert run_status.estimate(run, thorough) == "no estimate yet"


def test_a_dry_run_ends_with_the_estimate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "digits-cnn", "--dry-run"]) == 0
    assert re.search(r"^\d+ steps to run, 0 cached, in .+; no estimate yet$", capsys.readouterr().out, re.MULTILINE)


def test_the_best_variant_so_far_is_that_of_the_verdict(tmp_path):
    run = RunFolder(examples.write_run(tmp_path / "run"))
    text = run_status.best(run)
    assert text.startswith("best so far: channels-50-static-int8 on cpu/onnxruntime, 5.83")
    run.measurement("cpu/onnxruntime", examples.HERE).unlink()
    assert run_status.best(run).startswith("best so far: channels-50-static-int8 on cpu/torch, 4.97")


class Recording(run_status.Monitor):
    def __init__(self):
        self.best = []

    def step(self, progress):
        self.best.append(progress.best)


def test_the_best_variant_is_known_as_soon_as_a_benchmark_has_ended(tmp_path):
    run, monitor = RunFolder(examples.write_run(tmp_path / "run")), Recording()
    names = ("3-quantize-static-int8", "4-benchmark-cpu-torch", "5-report")
    planned = [Step(name, name[: name.index("-", 2)] if name[0] != "5" else name, "", "pending") for name in names]
    status = run_status.RunStatus(run, "", planned, monitor, partial=True)
    for name in names[:2]:
        status.set(name, state="running")
        status.set(name, state="done", duration_s=1.0)
    assert monitor.best[:3] == ["", "", ""]
    assert monitor.best[3].startswith("best so far: channels-50-static-int8")


@pytest.mark.slow
def test_noise_of_a_task_and_its_libraries_never_reaches_the_user(tmp_path):
    noise = (
        "import os, sys, warnings, logging\nprint('NOISE'); print('NOISE', file=sys.stderr); os.write(2, b'NOISE')\n"
    )
    noise += "warnings.warn('NOISE'); logging.getLogger('x').error('NOISE')\n"
    usertasks.write(tmp_path, head=noise)
    command = [sys.executable, "-m", "shrinkkit.cli", "run", "small.py", "--recipe", "dynamic-int8", "--dry-run"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert "NOISE" not in ended.stdout + ended.stderr
    assert ended.stderr == ""


def test_verbose_shows_the_log_once_and_only_while_it_is_asked_for(tmp_path, capsys):
    from shrinkkit.cli import terminal

    run = RunFolder(tmp_path)
    for verbose in (True, False):
        with terminal.monitor(as_json=False, quiet=False, verbose=verbose):
            run_status.log(run, "a line of a step")
            status = run_status.RunStatus(run, "", [Step("5-report", "5-report", "", "pending")], run_status.Monitor())
            status.set("5-report", state="running")
    assert capsys.readouterr().out.splitlines() == ["a line of a step"]
    assert run.log.read_text().count("a line of a step") == 2


def test_a_study_of_arguments_takes_settings_too():
    given = study("digits-cnn", recipes=["static-int8"], targets=["cpu/torch"], overrides=[Override.parse("name=x")])
    assert given.name == "x"
