"""A run folder read, in particular one that was on several machines."""

import dataclasses

import examples
import pytest

from shrinkkit.core import store
from shrinkkit.core.run_folder import RunFolder, Step
from shrinkkit.core.target import Place, Target
from shrinkkit.report import show
from shrinkkit.results import folders, results, verdict

AWAY = str(Place(Target("cpu", "torch"), examples.ELSEWHERE))


@pytest.fixture
def run(tmp_path):
    return examples.write_two_machines(tmp_path / "run", targets=("cpu/torch",))


def with_step(run, step):
    """Write a status in which one more step, a benchmark, ended as `step` says."""
    status = examples.status()
    kept = [s for s in status.steps if s.subject != step.subject]
    store.write(run / "status.json", dataclasses.replace(status, steps=(*kept, step)))


def outdated(run, record):
    """Write `record` as one of model files that are not these."""
    changed = [dataclasses.replace(m, file_sha256="0" * 64) for m in record.measurements]
    examples.write_measured(run, dataclasses.replace(record, measurements=tuple(changed)))


def test_the_machine_that_made_the_baseline_is_the_runs_own(run):
    found = folders.read(run)
    assert found.machine_names == (examples.HERE,)
    assert list(found.measured) == [AWAY, "cpu/onnxruntime", "cpu/torch"]


def test_without_the_baseline_another_variant_tells_whose_the_run_is(run):
    (run / "variants/baseline/variant.json").write_text("{")
    assert folders.read(run).machine_names == (examples.HERE,)


def test_places_are_the_runs_own_first_and_then_those_of_others(run):
    assert folders.places(folders.read(run)) == (("cpu/torch", "cpu/onnxruntime", AWAY), ())


def test_a_target_that_the_study_does_not_name_is_reported_where_it_was_measured(run):
    extra = examples.target_record("cpu/torch", examples.OTHER)
    examples.write_measured(run, dataclasses.replace(extra, target="cpu/openvino"))
    assert folders.places(folders.read(run))[0][-1] == AWAY
    examples.write_measured(run, dataclasses.replace(extra, target="cuda/torch"))
    places, notes = folders.places(folders.read(run))
    assert places[-2:] == (AWAY, f"cuda/torch @ {examples.ELSEWHERE}")
    # No variant has a file for OpenVINO, so whatever was measured there is gone.
    assert "cpu/openvino" in notes[0]


def test_figures_of_files_that_have_changed_since_are_left_out_with_the_remedy(run):
    outdated(run, examples.target_record("cpu/torch", examples.OTHER))
    places, notes = folders.places(folders.read(run))
    assert places == examples.TARGETS
    assert f"{AWAY} are of model files that have changed since" in notes[0]
    assert "shrinkkit run RUN --only benchmark --target cpu/torch" in notes[0]


def test_a_target_that_only_another_machine_can_run_is_a_note_and_no_failure(run):
    own = run / RunFolder("").measurement("cpu/torch", examples.HERE).as_posix()
    own.unlink()
    cause = "Unsupported: `target` names 'cpu/torch', but it is not installed. (cell 2)"
    with_step(run, Step("4-benchmark-cpu-torch", "4-benchmark", "cpu/torch", "failed", error=cause))
    places, notes = folders.places(folders.read(run))
    assert places == ("cpu/onnxruntime", AWAY)
    assert examples.HERE in notes[0]
    assert "it is not installed" in notes[0]


def test_a_benchmark_that_broke_is_a_failure_although_another_machine_ended_well(run):
    (run / RunFolder("").measurement("cpu/torch", examples.HERE).as_posix()).unlink()
    with_step(run, Step("4-benchmark-cpu-torch", "4-benchmark", "cpu/torch", "failed", error="the kernel died"))
    assert folders.places(folders.read(run)) == (("cpu/torch", "cpu/onnxruntime", AWAY), ())


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_what_a_benchmark_saved_before_it_ended_is_reported_and_the_rest_named_with_the_reason(run, state):
    whole = examples.target_record("cpu/torch")
    kept = tuple(
        dataclasses.replace(m, memory=None, layers=()) for m in whole.measurements if m.variant != "channels-50"
    )
    partial = dataclasses.replace(whole, measurements=kept, runtime=None, sweep=(), partial=True)
    examples.write_measured(run, partial)
    cause = "It took longer than 1800 s and was stopped during: Measuring · timing channels-50"
    with_step(run, Step("4-benchmark-cpu-torch", "4-benchmark", "cpu/torch", state, error=cause))
    loaded = results.load(run)
    (note,) = [note for note in loaded.notes if "did not end" in note]
    assert cause in note
    assert "Not measured: the variants channels-50, memory" in note
    states = {row.variant: row.state for row in loaded.rows if row.target == "cpu/torch"}
    assert states["static-int8"] == states["baseline"] == "measured"
    assert states["channels-50"] == {"failed": "failed", "interrupted": "not run"}[state]
    assert loaded.row("static-int8", "cpu/torch").speedup is not None
    for part in (verdict.decide, show.variants, show.missing, show.deployment, show.layer_latency):
        assert part(loaded)


def test_a_benchmark_that_failed_on_another_machine_has_its_place(run):
    at = str(Place(Target("cpu", "onnxruntime"), examples.ELSEWHERE))
    with_step(run, Step("4-benchmark-x", "4-benchmark", at, "failed", error="the kernel died"))
    assert folders.places(folders.read(run))[0] == ("cpu/torch", "cpu/onnxruntime", AWAY, at)


def test_a_record_that_is_there_twice_or_of_no_target_is_noted(run):
    text = (run / RunFolder("").measurement("cpu/torch", examples.HERE).as_posix()).read_text()
    (run / "measurements/copied").mkdir()
    (run / "measurements/copied/again.json").write_text(text)
    (run / "measurements/copied/later.json").write_text(text.replace('"cpu/torch"', '"cpu/later"'))
    notes = " ".join(folders.read(run).notes)
    assert "is of cpu/torch, as another file is" in notes
    assert "copied/later.json is of cpu/later, which is no target" in notes
