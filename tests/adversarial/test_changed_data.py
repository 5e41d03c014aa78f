"""Data and code that change under a task: the fingerprint tells, and a run stops."""

import shutil
import sqlite3
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
import usertasks

from shrinkkit.core import store, studies
from shrinkkit.core.run_folder import Status
from shrinkkit.errors import InvalidInput
from shrinkkit.pipeline import runner
from shrinkkit.pipeline.run_status import Monitor
from shrinkkit.tasks import loader


def look(path):
    """Inspect a task as a separate process would."""
    usertasks.forget(path.parent.parent)
    before = list(sys.path)
    try:
        return loader.inspect(path)
    finally:
        sys.path[:] = before
        usertasks.forget(path.parent.parent)


def labels(n=40, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator)[:, :3].argmax(1)


def with_labels(read):
    return f"of['test'] = TensorDataset(of['test'].tensors[0], torch.as_tensor(np.array({read})).long())"


def as_sqlite(path, values):
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as base:
        base.execute("create table t(x)")
        base.executemany("insert into t values (?)", [(v,) for v in values.tolist()])
    base.close()


FORMATS = {
    "npy": (lambda p, v: np.save(p, v.numpy()), "np.load({p})"),
    "mapped.npy": (lambda p, v: np.save(p, v.numpy()), "np.load({p}, mmap_mode='r')"),
    "npz": (lambda p, v: np.savez(p, a=v.numpy()), "np.load({p})['a']"),
    "bin": (lambda p, v: p.write_bytes(v.numpy().tobytes()), "np.fromfile({p}, dtype=np.int64)"),
    "csv": (
        lambda p, v: p.write_text("\n".join(map(str, v.tolist()))),
        "np.loadtxt({p}, dtype=int)",
    ),
    "json": (lambda p, v: p.write_text(str(v.tolist())), "json.loads(Path({p}).read_text())"),
    "pt": (lambda p, v: torch.save(v, p), "torch.load({p}).tolist()"),
    "safetensors": (
        lambda p, v: safetensors.torch.save_file({"a": v.contiguous()}, p),
        "__import__('safetensors.torch').torch.load_file({p})['a'].tolist()",
    ),
    "db": (as_sqlite, "[x for x, in __import__('sqlite3').connect({p}).execute('select x from t')]"),
}


@pytest.mark.parametrize("change", ["one", "most"])
@pytest.mark.parametrize("kind", FORMATS)
def test_labels_that_change_in_a_file_change_the_fingerprint(tmp_path, kind, change):
    write, read = FORMATS[kind]
    data = tmp_path / "elsewhere" / f"labels.{kind}"
    data.parent.mkdir()
    write(data, labels())
    path = usertasks.write(tmp_path / "task", body=with_labels(read.format(p=repr(str(data)))))
    before = look(path)
    assert look(path).fingerprint == before.fingerprint
    changed = labels()
    changed[: 1 if change == "one" else 12] += 1
    write(data, changed % 3)
    assert look(path).fingerprint != before.fingerprint


READ = "Path({p!r}).read_text()"
FILES = {
    "a file that score reads": {
        "head": "def score(output, target):\n    return (output.argmax(1) == target).float() * len({read}) / 2",
        "body": "of['score'] = measured",
    },
    "a file that loss reads": {
        "head": "def measured(output, target):\n    return nn.functional.cross_entropy(output, target) * len({read})",
        "body": "of['loss'] = measured",
    },
    **{
        f"a file that examples of {split} are read from": {
            "body": f"of['{split}'] = Each(of['{split}'], lambda i, x, y: ({{read}}, (x, y))[1])"
        }
        for split in ("train", "calibration", "validation", "test")
    },
    "a file that the model reads when it is called": {
        "head": "class Reads(nn.Linear):\n    def forward(self, x):\n        {read}\n        return super().forward(x)",
        "body": "m = Reads(6, 3, bias=False)\nm.load_state_dict(of['model'].state_dict())\nof['model'] = m.eval()",
    },
    "code that is executed": {"head": "exec({read}.replace('ab', ''))"},
    "settings": {"head": "SETTINGS = {read}"},
}  # fmt: skip
FILES["a file that score reads"]["head"] = FILES["a file that score reads"]["head"].replace("score(", "measured(", 1)


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_read_anywhere_changes_the_fingerprint(tmp_path, what):
    data = tmp_path / "data" / "words.txt"
    data.parent.mkdir()
    data.write_text("ab")
    parts = {name: text.replace("{read}", READ.format(p=str(data))) for name, text in FILES[what].items()}
    path = usertasks.write(tmp_path / "task", **parts)
    before = look(path)
    assert str(data) in before.files
    data.write_text("ab" if what == "a file that score reads" else "ab ab")
    if what == "a file that score reads":
        data.write_text("aa")
    assert look(path).fingerprint != before.fingerprint


IMPORTS = {
    "next to the task": ("task", "import helping"),
    "in a package next to it": ("task/inner", "from inner import helping"),
    "in another folder": ("lib", "sys.path.insert(0, str(HERE.parent / 'lib'))\nimport helping"),
    "loaded from its path": (
        "lib",
        "import importlib.util as u\nspec = u.spec_from_file_location('helping', HERE.parent / 'lib/helping.py')\n"
        "helping = u.module_from_spec(spec)\nspec.loader.exec_module(helping)",
    ),
    "run as a script": ("lib", "import runpy\nrunpy.run_path(str(HERE.parent / 'lib/helping.py'))"),
    "imported when score is called": (
        "lib",
        "sys.path.insert(0, str(HERE.parent / 'lib'))\n_old = torch.argmax\n"
        "def scored(output, target):\n    import helping\n    return (output.argmax(1) == target).float()",
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", IMPORTS)
def test_source_that_is_imported_from_anywhere_changes_the_fingerprint(tmp_path, where):
    folder, head = IMPORTS[where]
    source = tmp_path / folder / "helping.py"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("A = 1\n")
    (source.parent / "__init__.py").touch()
    path = usertasks.write(tmp_path / "task", head=head, body="of['score'] = scored" if "scored" in head else "")
    before = look(path)
    source.write_text("A = 2\n")
    after = look(path)
    assert before.fingerprint != after.fingerprint
    assert before.files.keys() == after.files.keys()


def test_what_the_task_does_not_read_and_times_of_change_count_for_nothing(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task/other.txt").write_text("x")
    data = tmp_path / "data.txt"
    data.write_text("x")
    path = usertasks.write(tmp_path / "task", head=f"Path({str(data)!r}).read_text()")
    before = look(path)
    (tmp_path / "task/other.txt").write_text("y")
    data.write_text("x")
    assert look(path).fingerprint == before.fingerprint


def test_a_task_in_another_folder_is_the_same_task(tmp_path):
    (tmp_path / "a/task").mkdir(parents=True)
    (tmp_path / "a/task/data.txt").write_text("x")
    path = usertasks.write(tmp_path / "a/task", head="(HERE / 'data.txt').read_text()")
    before = look(path)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert look(tmp_path / "b/task/small.py").fingerprint == before.fingerprint


def test_one_target_of_thousands_that_no_file_holds_changes_the_fingerprint(tmp_path):
    body = "x, y = split(4, 5000).tensors\ny[{i}] = (y[{i}] + {d}) % 3\nof['test'] = TensorDataset(x, y)"
    path = usertasks.write(tmp_path / "task", body=body.format(i=4321, d=0))
    contents = loader._contents(loader.load(path))
    usertasks.write(tmp_path / "task", body=body.format(i=4321, d=1))
    assert loader._contents(loader.load(path)) != contents


@pytest.mark.parametrize("train", ["random", "drawn from its own generator", "flipped half of the time"])
def test_random_augmentation_leaves_the_fingerprint(tmp_path, train):
    noise = {
        "random": "torch.rand(6)",
        "drawn from its own generator": "GENERATOR.random()",
        "flipped half of the time": "x * -2 * (GENERATOR.random() < 0.5)",
    }[train]
    head = f"""
GENERATOR = np.random.default_rng()
class Augmented(Dataset):
    def __len__(self): return 40
    def __getitem__(self, i):
        x, y = split(1)[i]
        return (x + {noise}).float(), y
"""
    path = usertasks.write(tmp_path / "task", head=head, body="of['train'] = Augmented()")
    assert look(path).fingerprint == look(path).fingerprint


STUDY = """
name: small
task: {task}
recipes: [{{name: half, stages: [prune-weights: {{ratio: 0.5}}]}}]
targets: [cpu/torch]
"""


@pytest.mark.parametrize("which", ["task/small.py", "data.txt"])
def test_a_file_that_changes_during_a_run_fails_the_step_by_its_name(tmp_path, which, warm_start):
    data = tmp_path / "data.txt"
    data.write_text("x")
    usertasks.write(tmp_path / "task", head=f"Path({str(data)!r}).read_text()")
    (tmp_path / "s.yaml").write_text(STUDY.format(task="task/small.py"))
    activities = []

    class Changing(Monitor):
        def activity(self, text):
            activities.append(text)

        def step(self, progress):
            if progress.current.name == "1-baseline" and progress.current.state == "running":
                (tmp_path / which).write_text((tmp_path / which).read_text() + "# changed\n")

    study = studies.read_study(str(tmp_path / "s.yaml"))
    monitor = Changing()
    prepared = runner.prepare(study, reports=tmp_path / "reports", command="run", threads=1, monitor=monitor)
    prepared.execute(monitor, warm_start)
    steps = {s.name: s for s in store.read(tmp_path / "reports/small/status.json", Status).steps}
    assert steps["1-baseline"].state == "failed"
    assert which in steps["1-baseline"].error
    assert "run again" in steps["1-baseline"].error
    assert not (tmp_path / "reports/small/variants/baseline/variant.json").exists()
    assert (tmp_path / "reports/small/report.md").is_file()
    assert any("loading and checking" in text for text in activities)


def refused(tmp_path, *, limit=60, **parts):
    """Return what a run says as it refuses a task, before it makes a folder."""
    usertasks.write(tmp_path / "task", **parts)
    (tmp_path / "s.yaml").write_text(STUDY.format(task="task/small.py") + f"timeout_s: {limit}\n")
    start = time.monotonic()
    with pytest.raises(InvalidInput) as caught:
        runner.prepare(
            studies.read_study(str(tmp_path / "s.yaml")),
            reports=tmp_path / "reports", command="run", threads=1, monitor=Monitor(),
        )  # fmt: skip
    assert time.monotonic() - start < limit + 20
    assert not (tmp_path / "reports").exists()
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def test_a_task_that_hangs_is_stopped_in_the_time_of_a_step(tmp_path):
    assert "within 4 s" in refused(tmp_path, limit=4, head="while True: pass")


@pytest.mark.parametrize(
    "head", ["os._exit(0)", "os._exit(3)", "os.kill(os.getpid(), 9)", "print('x' * 10**6); os.abort()"]
)
def test_a_task_that_ends_its_process_is_refused(tmp_path, head):
    assert "must not end the process" in refused(tmp_path, head=head)


def test_what_a_task_prints_or_leaves_running_does_not_disturb_the_look(tmp_path):
    noise = (
        "import atexit, threading, time\natexit.register(print, 'bye')\nos.write(1, b'{}\\n')\nos.system('echo x')\n"
    )
    noise += "threading.Thread(target=time.sleep, args=(60,)).start()\n"
    said = refused(tmp_path, head=noise, body="of['score'] = 1")
    assert said.startswith("`score` must be a function")


def test_the_look_sees_no_folder_that_steps_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "only_here.py").touch()
    (tmp_path / "json.py").write_text("1 / 0")
    assert "only_here" in refused(tmp_path, head="import only_here")


def test_scores_in_another_unit_need_a_budget_in_it(tmp_path):
    assert "unit: score" in refused(tmp_path, body="of['score'] = lambda o, t: 100 * score(o, t)")
