"""A folder that came from elsewhere: nothing in it runs, whatever its files are called."""

import json
import os
import subprocess
import sys

import examples
import pytest
from tiny import task as tiny_task

from shrinkkit import cli
from shrinkkit.core import processes
from shrinkkit.results import cards
from shrinkkit.transforms import variants

CODE = "import os; open(os.path.join(os.environ['MARKS'], {name!r}), 'w').close()\n"
SHADOWS = (
    "shrinkkit", "numpy", "torch", "json", "pandas", "pathlib", "IPython", "ipykernel", "ipykernel_launcher", "zmq",
    "traitlets", "matplotlib", "papermill", "nbconvert", "jupyter_client", "pydantic", "ruamel", "sitecustomize",
    "usercustomize", "runpy", "ctypes", "debugpy", "comm", "ipywidgets", "anywidget", "psutil", "site", "encodings",
)  # fmt: skip
STARTUP = (
    "ipython_config.py", "ipython_kernel_config.py", "jupyter_config.py", "jupyter_nbconvert_config.py",
    "jupyter_client_config.py", "startup.py", "00-first.py", "profile_default/startup/00-first.py",
    "profile_default/ipython_config.py", ".ipython/profile_default/startup/00-first.py", ".jupyter/jupyter_config.py",
)  # fmt: skip


def plant(folder):
    """Put every file that some library would run or read into `folder`, each leaving a mark if it is run."""
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(CODE.format(name=name))
        if name not in ("encodings", "site"):
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(CODE.format(name=f"{name}-package"))
    for name in STARTUP:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(CODE.format(name=name.replace("/", "-")))
    (folder / "matplotlibrc").write_text("backend: module://shrinkkit\nsavefig.dpi: 3\n")
    (folder / ".env").write_text("PYTHONPATH=.\n")
    (folder / "pyvenv.cfg").write_text("home = .\n")
    (folder / "evil.pth").write_text("import shrinkkit\n")
    (folder / "conf.json").write_text('{"base_template": "evil"}')
    (folder / "index.html.j2").write_text("{{ cycler.__init__.__globals__.os.system('touch $MARKS/template') }}")
    return folder


def kernel_elsewhere(folder):
    """Make a kernel called `python3`, as another environment has one, and return the JUPYTER_PATH that leads to it."""
    place = folder / "kernels/python3"
    place.mkdir(parents=True)
    argv = [sys.executable, "-c", CODE.format(name="kernelspec"), "{connection_file}"]
    (place / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    return str(folder)


def shrinkkit(*arguments, cwd, marks, **variables):
    """Run the command line from `cwd` as its console script does, and return what it ended with."""
    own = {"MARKS": str(marks), "OMP_NUM_THREADS": "1", **variables}
    code = "import sys; from shrinkkit import cli; sys.exit(cli.main())"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=cwd, env=os.environ | own, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def reported(tmp_path_factory, marks):
    """A run folder full of code, of which the report was made from inside it."""
    folder = plant(examples.write_run(tmp_path_factory.mktemp("reports") / "run"))
    path = kernel_elsewhere(tmp_path_factory.mktemp("elsewhere"))
    startup = {"PYTHONSTARTUP": "startup.py", "JUPYTER_PATH": path}
    ended = shrinkkit("report", ".", cwd=folder, marks=marks, **startup)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def verified(tmp_path_factory, marks):
    """A variant's folder full of code, verified from inside it."""
    folder, task = tmp_path_factory.mktemp("variants") / "baseline", tiny_task()
    made = variants.write(folder, task, task.model, runtimes=["torch"])
    cards.write_unmeasured(folder, made)
    plant(folder)
    return shrinkkit("verify", ".", "--target", "cpu/torch", "--threads", "1", cwd=folder, marks=marks)


NAMES = (
    "kernelspec",
    "template",
    *SHADOWS,
    *(f"{n}-package" for n in SHADOWS),
    *(n.replace("/", "-") for n in STARTUP),
)


@pytest.mark.parametrize("name", NAMES)
def test_the_report_of_a_folder_runs_none_of_its_files(reported, marks, name):
    assert (reported / "report.html").is_file()
    assert not (marks / name).exists()


def test_the_report_takes_no_settings_of_pictures_from_the_folder(reported):
    # At 3 dots an inch no picture would be left.
    assert (reported / "report.html").stat().st_size > 100_000


@pytest.mark.parametrize("name", [*SHADOWS, *(f"{n}-package" for n in SHADOWS)])
def test_verifying_a_folder_from_inside_runs_none_of_its_files(verified, marks, name):
    assert verified.returncode == 0, verified.stderr
    assert not (marks / name).exists()


def study_naming(folder, task):
    examples.write_run(folder)
    examples.change_json(folder / "study.json", task=task)
    return folder


@pytest.mark.parametrize("named", ["evil.py", "../evil.py", "../../evil.py", "variants/baseline/evil.py"])
def test_a_task_that_a_folder_names_is_not_run(tmp_path, marks, named, capsys):
    run = study_naming(tmp_path / "there/run", named)
    (run / named).parent.mkdir(parents=True, exist_ok=True)
    (run / named).write_text(f"raise SystemExit(open({str(marks / 'task')!r}, 'w'))")
    assert cli.main(["run", str(run), "--only", "benchmark"]) == 2
    assert "--task FILE" in capsys.readouterr().err
    assert not (marks / "task").exists()


def test_a_task_that_the_user_gives_is_the_one_that_is_run(tmp_path, marks, capsys):
    run = study_naming(tmp_path / "run", "evil.py")
    (run / "evil.py").write_text(f"open({str(marks / 'task')!r}, 'w')")
    (tmp_path / "mine.py").write_text("raise ValueError('this one')")
    asked = ["run", str(run), "--only", "benchmark", "--target", "cpu/torch"]
    assert cli.main([*asked, "--task", str(tmp_path / "mine.py")]) == 2
    assert "this one" in capsys.readouterr().err
    assert not (marks / "task").exists()


@pytest.mark.parametrize("given", ["no.py", ".", "digits-cnn-2"])
def test_a_task_that_is_not_there_is_refused(tmp_path, given):
    run = study_naming(tmp_path / "run", "evil.py")
    assert cli.main(["run", str(run), "--only", "benchmark", "--task", given]) == 2


def test_a_task_beside_a_study_is_refused(tmp_path):
    assert cli.main(["run", "digits-cnn", "--task", "mine.py", "--reports", str(tmp_path / "r")]) == 2
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["PYTHONPATH", "LD_LIBRARY_PATH"])
@pytest.mark.parametrize(
    ("given", "passed"),
    [("", []), (":", []), (":/a", ["/a"]), ("/a::/b", ["/a", "/b"]), (".:/a", [".", "/a"]), ("lib", ["lib"])],
)
def test_search_paths_of_children_do_not_depend_on_where_they_work(monkeypatch, name, given, passed):
    monkeypatch.setenv(name, given)
    assert processes.environment()[name] == os.pathsep.join(os.path.abspath(entry) for entry in passed)


@pytest.mark.parametrize(
    "module",
    ["shrinkkit.tasks.loader", "shrinkkit.measure.peak_memory", "shrinkkit.measure.verify", "shrinkkit.pipeline.steps"],
)
def test_every_module_that_runs_as_a_child_starts_without_the_working_directory(tmp_path, marks, module):
    plant(tmp_path)
    done = subprocess.run(
        processes.command(module, "/nowhere"), cwd=tmp_path, env=processes.environment() | {"MARKS": str(marks)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert list(marks.iterdir()) == []
