import dataclasses
import json
import shutil
from pathlib import Path

import examples
import pytest

from shrinkkit.core import machines, store, studies
from shrinkkit.core.measurement import TargetRecord
from shrinkkit.core.recipe import BUILT_IN
from shrinkkit.core.run_folder import RunFolder, Status
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.core.target import Target
from shrinkkit.errors import InvalidInput
from shrinkkit.pipeline import parameters, plan, runner
from shrinkkit.pipeline.run_status import Monitor
from shrinkkit.results import results

TASK = Path(__file__).parent.parent / "tiny.py"
RECIPES = """
name: corner
task: {task}
recipes:
  - name: half
    stages: &half
      - prune-channels: {{ratio: 0.5, scope: layer}}
      - fine-tune: {{epochs: 1}}
  - name: half-int8
    stages: *half
    precision: {{static-int8: {{calibration_examples: 32}}}}
  - name: hopeless
    precision: {{dynamic-int8: {{skip: [head]}}}}
targets: [cpu/onnxruntime]
batch_sizes: [2]
thread_counts: []
effort: quick
budget: {{accuracy_drop: 0.05, want: smallest}}
"""

RECORD = RunFolder("").measurement("cpu/onnxruntime", machines.this_machine(Target("cpu", "onnxruntime"))).as_posix()
"""Where this machine's measurements go."""
ELSEWHERE = "made-up-9000-8-cores"
SILENT = Monitor()


def states(folder):
    return {s.name: s.state for s in store.read(folder / "status.json", Status).steps}


def prepare(study, folder):
    return runner.prepare(study, reports=folder, command="shrinkkit run corner.yaml", threads=1, monitor=SILENT)


@pytest.fixture(scope="module")
def execute(warm_start):
    """Return a function that runs a study and returns the run folder."""
    return lambda study, folder, monitor=SILENT: prepare(study, folder).execute(monitor, warm_start).path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "corner.yaml"
    path.write_text(RECIPES.format(task=TASK))
    return studies.read_study(path)


@pytest.fixture(scope="module")
def run(study, execute, tmp_path_factory):
    """A run of the whole study, in which one recipe must fail."""
    return execute(study, tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="module")
def prepared(study, run):
    """The same run once more."""
    return prepare(study, run.parent)


def test_recipes_that_prune_alike_share_the_pruned_variant(study):
    names = [step.name for step in plan.plan(study, task="t.py", threads=1)]
    assert names == [
        "1-baseline",
        "2-prune-half.stage-1",
        "2-train-half",
        "3-quantize-half-int8",
        "3-quantize-hopeless",
        "4-benchmark-cpu-onnxruntime",
        "5-report",
    ]


def test_the_parameters_of_every_built_in_recipe_fit_their_notebooks():
    study = studies.study("digits-cnn", recipes=BUILT_IN, targets=["cpu/torch"])
    planned = plan.plan(study, task="digits-cnn", threads=1)
    assert len(planned) > len(BUILT_IN)
    for step in planned:
        parameters.check_step(plan.notebooks() / f"{step.notebook}.ipynb", step.parameters)


def test_a_failing_recipe_is_a_failed_step_and_the_others_end_well(run):
    found = states(run)
    assert found.pop("3-quantize-hopeless") == "failed"
    assert set(found.values()) == {"done"}


def test_the_cause_of_a_failure_stands_in_the_status(run):
    step = next(s for s in store.read(run / "status.json", Status).steps if s.state == "failed")
    assert [text in step.error for text in ("onnxruntime", "dynamic-int8", "in `skip`", "(cell ")] == [True] * 4


def test_the_report_and_every_executed_notebook_are_left(run):
    assert (run / "report.html").stat().st_size < 1_500_000
    assert {p.stem for p in (run / "steps").glob("*.html")} >= {s for s in states(run) if s != "5-report"}
    assert json.loads((run / "results.json").read_text())["schema_version"] == SCHEMA_VERSION
    assert "hopeless" in (run / "report.md").read_text()
    assert not list(run.glob(".attempt-*"))


def test_the_run_folder_tells_nothing_of_where_it_lay(run):
    own = [p for p in run.rglob("*") if p.suffix in (".json", ".html", ".md", ".ipynb")]
    assert len(own) > 10
    assert [p.name for p in own if str(run) in p.read_text()] == []


def test_every_step_of_an_unchanged_run_is_cached_but_the_report(run, prepared, warm_start):
    before = (run / RECORD).read_text()
    prepared.execute(SILENT, warm_start)
    assert {s for n, s in states(run).items() if n not in ("3-quantize-hopeless", "5-report")} == {"cached"}
    assert (run / RECORD).read_text() == before


def test_a_preview_of_a_run_states_what_is_cached_and_changes_nothing(run, study, prepared):
    before = contents(run)
    # The recipe that failed is tried again, and were it to succeed, the benchmark would have another variant.
    runs = ("3-quantize-hopeless", "4-benchmark-cpu-onnxruntime", "5-report")
    assert prepared.preview() == {name: "run" if name in runs else "cached" for name in states(run)}
    assert set(dataclasses.replace(prepared, force=True).preview().values()) == {"run"}
    wider = study.model_copy(update={"seed": 1})
    assert set(prepare(wider, run.parent).preview().values()) == {"run"}
    assert contents(run) == before


def test_every_variant_and_target_of_the_study_has_a_row(run):
    rows = {(row.variant, row.target) for row in results.load(run).rows}
    assert rows == {(v, "cpu/onnxruntime") for v in ("baseline", "half", "half-int8", "hopeless")}


def test_a_pattern_that_matches_no_layer_stops_before_anything_starts(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(RECIPES.format(task=TASK).replace("[head]", "[hed]"))
    with pytest.raises(InvalidInput, match=r"s.yaml:11.*|.*'hed'.*head"):
        prepare(studies.read_study(path), tmp_path / "reports")
    assert not (tmp_path / "reports").exists()


def test_a_step_that_takes_too_long_is_stopped_and_the_run_still_reports(study, execute, tmp_path):
    hasty = study.model_copy(
        update={"timeout_s": 1.0, "name": "hasty", "task": "digits-cnn", "recipes": study.recipes[:1]}
    )
    execute(hasty, tmp_path)
    found = states(tmp_path / "hasty")
    assert "longer than 1 s" in (tmp_path / "hasty/report.md").read_text()
    assert found["1-baseline"] == "failed"
    assert found["2-prune-half.stage-1"] == "skipped"


def quiet(measurement):
    """Return a measurement as a quiet machine would have made it, so that it needs no second try."""
    slots = tuple((1.0 + i % 3 / 1000,) for i in range(40))
    undisturbed = dataclasses.replace(measurement.latency.disturbance, withheld=False)
    samples = {f"{arm}_samples_ms": slots for arm in ("reference", "candidate", "control")}
    return dataclasses.replace(
        measurement, latency=dataclasses.replace(measurement.latency, disturbance=undisturbed, **samples)
    )


def test_a_benchmark_that_did_not_end_goes_on_where_it_was_stopped(run, study, warm_start, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "corner"))
    whole, status = store.read(folder / RECORD, TargetRecord), store.read(folder / "status.json", Status)
    by_name = {m.variant: m for m in whole.measurements}
    left = (by_name["baseline"], kept := quiet(by_name["half"]))
    store.write(folder / RECORD, dataclasses.replace(whole, measurements=left, partial=True))
    failed = {"state": "failed", "error": "It took too long.", "files": {RECORD: store.sha256(folder / RECORD)}}
    steps = [dataclasses.replace(s, **failed) if s.notebook == "4-benchmark" else s for s in status.steps]
    store.write(folder / "status.json", dataclasses.replace(status, steps=tuple(steps)))

    prepared = prepare(study, tmp_path)
    step = next(s for s in prepared.steps if s.notebook == "4-benchmark")
    before = next(s for s in steps if s.name == step.name)
    assert prepared._resumes(step, before.inputs_sha256, before)
    assert not prepared._resumes(step, "other inputs", before)
    assert not dataclasses.replace(prepared, force=True)._resumes(step, before.inputs_sha256, before)
    altered = dataclasses.replace(before, files={RECORD: "0" * 64})
    assert not prepared._resumes(step, before.inputs_sha256, altered)

    prepared.execute(SILENT, warm_start)
    assert states(folder)[step.name] == "done"
    after = store.read(folder / RECORD, TargetRecord)
    assert not after.partial
    measured = {m.variant: m for m in after.measurements}
    assert measured["half"].latency.candidate_samples_ms == kept.latency.candidate_samples_ms
    assert measured["half"].accuracy == by_name["half"].accuracy
    assert measured["half"].memory is not None
    assert measured["half-int8"].latency.reference_samples_ms != by_name["half-int8"].latency.reference_samples_ms


def test_a_run_folder_in_use_is_refused(run, prepared):
    with store.hold(run), pytest.raises(InvalidInput, match=r"in use by another run"):
        prepared.execute(SILENT)


def test_rebuilding_the_report_of_no_run_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"must be a run folder"):
        runner.rebuild_report(tmp_path, monitor=SILENT)


@pytest.fixture
def measure_here(warm_start):
    """Return a function that measures the variants of a run folder on this machine."""

    def measure(folder, targets=(), task=str(TASK)):
        command = "shrinkkit run --only benchmark"
        options = {"targets": targets, "command": command, "threads": 1, "task": task, "monitor": SILENT}
        runner.prepare_benchmark(folder, **options).execute(SILENT, warm_start)

    return measure


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def travelled(run, tmp_path_factory):
    """A copy of the run as though another machine had made it, with fewer things to time."""
    folder = tmp_path_factory.mktemp("copied") / "corner"
    shutil.copytree(run, folder)
    (folder / "measurements" / machines.this_machine(Target("cpu", "torch"))).rename(
        folder / "measurements" / ELSEWHERE
    )
    for path in [*folder.glob("variants/*/variant.json"), *folder.glob("measurements/*/*.json")]:
        record = json.loads(path.read_text())
        record["environment"] |= {"cpu": "Made(R) Up(TM) 9000", "cores": 8}
        path.write_text(json.dumps(record | {"machine": ELSEWHERE} if "machine" in record else record))
    study = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(study | {"batch_sizes": [], "thread_counts": []}))
    examples.vouch(folder)
    return folder


def test_on_another_machine_steps_that_measure_carry_its_name(study):
    def planned(**options):
        step = next(s for s in plan.plan(study, task="t.py", threads=1, **options) if s.notebook == "4-benchmark")
        return step.name, step.subject, step.leaves

    here = machines.this_machine(Target("cpu", "onnxruntime"))
    assert planned() == planned(own=(here,)) == ("4-benchmark-cpu-onnxruntime", "cpu/onnxruntime", RECORD)
    name = f"4-benchmark-cpu-onnxruntime-{here}"
    assert planned(own=(ELSEWHERE,)) == (name, f"cpu/onnxruntime @ {here}", RECORD)


def test_a_run_that_travelled_is_measured_here_too_and_nothing_of_it_is_lost(travelled, measure_here):
    before, known = contents(travelled), store.read(travelled / "status.json", Status)
    measure_here(travelled)
    after = contents(travelled)
    changed = {path for path in before if before[path] != after.get(path)}
    assert {path.name for path in changed} <= {"status.json", "run.log", "report.html", "report.md", "results.json",
        "5-report.ipynb", "model-card.json", "README.md", "SHA256SUMS"}  # fmt: skip
    assert Path(RECORD) in after.keys() - before.keys()
    step = f"4-benchmark-cpu-onnxruntime-{machines.this_machine(Target('cpu', 'onnxruntime'))}"
    assert Path("steps", f"{step}.html") in after.keys() - before.keys()

    status = store.read(travelled / "status.json", Status)
    assert (status.command, status.started) == (known.command, known.started)
    kept = {s.name: s for s in status.steps if s.notebook != "5-report"}
    assert {name: s for name, s in kept.items() if name != step} == {
        s.name: s for s in known.steps if s.notebook != "5-report"
    }
    assert kept[step].state == "done"

    found = results.load(travelled)
    assert found.machines == (ELSEWHERE, machines.this_machine(Target("cpu", "onnxruntime")))
    for target in found.targets:
        assert found.row("half-int8", target).state == "measured"
    report = (travelled / "report.md").read_text()
    assert all(f"| half | cpu/onnxruntime @ {name} |" in report for name in found.machines)

    # What is brought back may be the measurements alone: the report needs no more of them.
    (travelled / "status.json").write_bytes(before[Path("status.json")])
    runner.rebuild_report(travelled, monitor=SILENT)
    assert results.load(travelled).targets == found.targets
    assert f"@ {machines.this_machine(Target('cpu', 'onnxruntime'))}" in (travelled / "report.md").read_text()


def test_a_whole_run_with_kept_variants_on_another_machine_stays_that_of_the_first(travelled, study, execute):
    class Stopping(Monitor):
        def step(self, progress):
            if (progress.current.notebook, progress.current.state) == ("4-benchmark", "running"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(study, travelled.parent, Stopping())
    found = states(travelled)
    # The fixture has changed the baseline's record, so pruning runs again, but it leaves the same weights to train.
    assert found["1-baseline"] == found["2-train-half"] == "cached"
    assert found["4-benchmark-cpu-onnxruntime"] in ("done", "cached")
    assert found[f"4-benchmark-cpu-onnxruntime-{machines.this_machine(Target('cpu', 'onnxruntime'))}"] == "interrupted"


@pytest.mark.parametrize("package", ["onnxruntime-gpu", "openvino", "torchao", "numpy"])
def test_another_version_of_a_package_that_matters_is_not_cached(tmp_path, monkeypatch, package):
    before = runner._software()
    info = tmp_path / f"{package.replace('-', '_')}-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert runner._software() != before


def test_what_one_machine_measured_is_not_cached_for_another(prepared):
    step = next(s for s in prepared.steps if s.notebook == "4-benchmark")
    elsewhere = dataclasses.replace(step, leaves=RunFolder("").measurement("cpu/onnxruntime", ELSEWHERE).as_posix())
    assert prepared._inputs_sha256(step) == prepared._inputs_sha256(dataclasses.replace(step))
    assert prepared._inputs_sha256(step) != prepared._inputs_sha256(elsewhere)


def test_on_the_machine_that_made_the_run_measuring_again_changes_nothing(run, measure_here):
    before = (run / RECORD).read_bytes()
    measure_here(run)
    assert states(run)["4-benchmark-cpu-onnxruntime"] == "cached"
    assert (run / RECORD).read_bytes() == before


def test_a_run_without_variants_cannot_be_measured(travelled, measure_here):
    shutil.rmtree(travelled / "variants")
    before = contents(travelled)
    with pytest.raises(InvalidInput, match=r"must hold variants to measure, but there is no variants/baseline"):
        measure_here(travelled)
    assert contents(travelled) == before


def test_a_task_that_did_not_travel_along_is_asked_for_by_its_path(travelled, measure_here):
    before = contents(travelled)
    with pytest.raises(InvalidInput, match=r"there is no .*mine.py. Copy it"):
        measure_here(travelled, task=str(travelled.parent / "mine.py"))
    assert contents(travelled) == before


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cpu/onnxruntim", "Did you mean `cpu/onnxruntime`"),
        ("cpu/openvino", "the variants were made for torch and onnxruntime only"),
        ("cuda/onnxruntime", "cuda/onnxruntime cannot run here"),
    ],
)
def test_a_target_that_cannot_be_measured_here_stops_before_anything_starts(
    travelled, measure_here, target, message, monkeypatch
):
    monkeypatch.setattr(machines, "_gpus", tuple)
    before = contents(travelled)
    with pytest.raises(InvalidInput, match=message):
        measure_here(travelled, targets=[target])
    assert contents(travelled) == before


def test_targets_of_the_study_that_cannot_run_here_are_left_out_aloud(travelled, monkeypatch):
    monkeypatch.setattr(machines, "_gpus", tuple)
    study, baseline = runner._read_run(RunFolder(travelled))
    both = study.model_copy(update={"targets": ("cpu/onnxruntime", "cuda/onnxruntime")})
    messages = []
    monitor = Monitor()
    monitor.message = messages.append
    chosen = runner._measurable(both, baseline, (), monitor)
    assert chosen == ("cpu/onnxruntime",)
    assert messages[0].startswith("left out: cuda/onnxruntime cannot run here: ")
    with pytest.raises(InvalidInput, match="cannot run here"):
        runner._measurable(study.model_copy(update={"targets": ("cuda/onnxruntime",)}), baseline, (), SILENT)
