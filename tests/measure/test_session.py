import dataclasses
import itertools
import time
import types

import pytest
from builds import write_variants
from tiny import task as tiny_task

from shrinkkit.core import machines, store
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import IntegerCheck, TargetRecord, speedup
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.target import Target
from shrinkkit.errors import InvalidInput, UnfairComparison
from shrinkkit.measure import benchmark, session
from shrinkkit.measure.session import EFFORTS, Settings
from shrinkkit.measure.timing import FEWEST_BLOCKS, Protocol
from shrinkkit.results import results
from shrinkkit.runtimes import files, registry
from shrinkkit.transforms import variants
from shrinkkit.transforms.variants import REFERENCE

pytestmark = pytest.mark.usefixtures("same_threads")

TORCH, ONNX = Target("cpu", "torch"), Target("cpu", "onnxruntime")
SHORT = Protocol(cap_s=0.5)


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    precisions = {"baseline": "float32", "int8": {"static-int8": {"calibration_examples": 32}}, "half": "bfloat16"}
    return write_variants(tmp_path_factory.mktemp("run"), task, precisions, ["torch", "onnxruntime"])


def test_every_variant_of_the_folder_is_loaded_and_proved(run, task):
    loaded = session.load(run, [], Settings(TORCH, task, threads=1))
    assert list(loaded) == ["baseline", "half", "int8"]
    assert all(t.error == "" and t.load_ms > 0 and t.first_call_ms > 0 for t in loaded.values())


def test_a_variant_that_the_runtime_refused_keeps_its_reason(run, task):
    loaded = session.load(run, ["half"], Settings(ONNX, task, threads=1))
    assert "no bfloat16 kernels" in loaded["half"].error
    assert loaded["half"].loaded is None


def test_a_variant_that_was_never_made_is_said_to_be_missing(run, task):
    assert "no such variant" in session.load(run, ["ghost"], Settings(TORCH, task, threads=1))["ghost"].error


def test_a_file_that_is_not_the_recorded_one_is_not_measured(task, tmp_path):
    folder = tmp_path / "variants/baseline"
    made = variants.write(folder, task, task.model, runtimes=["torch"])
    with (folder / made.files[0].path).open("ab") as file:
        file.write(b"\0")
    trial = session.load(tmp_path, [], Settings(TORCH, task, threads=1))["baseline"]
    assert "is not the file that its record describes" in trial.error


def test_a_file_with_other_outputs_than_its_reference_is_not_measured(task, tmp_path):
    folder = tmp_path / "variants/baseline"
    made = variants.write(folder, task, task.model, runtimes=["torch"])
    from safetensors.torch import load_file, save_file

    stored = load_file(folder / REFERENCE)
    save_file(stored | {"torch.0": stored["torch.0"] * 1.5}, folder / REFERENCE)
    assert made.files
    assert (
        "must give its reference outputs"
        in session.load(tmp_path, [], Settings(TORCH, task, threads=1))["baseline"].error
    )


def test_accuracy_comes_from_the_files_and_is_paired_with_the_baseline(run, task):
    found, errors = session.evaluate(session.load(run, [], Settings(ONNX, task, threads=1)), task)
    assert errors == {}
    assert set(found) == {"baseline", "int8"}
    assert found["baseline"].difference is None
    assert found["int8"].difference.low <= 0 <= found["int8"].difference.high
    assert len(found["int8"].scores) == len(task.test)


@pytest.mark.usefixtures("warm_memory")
def test_a_whole_target_ends_in_one_record_that_can_be_read_back(run, task):
    loaded = session.load(run, ["int8", "half"], Settings(ONNX, task, threads=1))
    accuracies, errors = session.evaluate(loaded, task)
    latencies, untimed = session.compare_latency(loaded, Settings(ONNX, task, threads=1), protocol=SHORT)
    assert untimed == {}
    runtime = session.compare_runtimes(loaded, Settings(ONNX, task, threads=1, effort="quick"))
    profiles = session.profile(loaded, Settings(ONNX, task, threads=1))
    record = session.record(
        Settings(ONNX, task, threads=1),
        loaded,
        accuracies=accuracies,
        errors=errors,
        latencies=latencies,
        runtime=runtime,
        profiles=profiles,
    )
    path = session.write(run, record)
    assert path == run / "measurements" / machines.this_machine(ONNX) / "cpu-onnxruntime.json"
    assert store.read(path, TargetRecord) == record
    assert record.machine == machines.names(record.environment)[0]
    by_name = {m.variant: m for m in record.measurements}
    assert by_name["baseline"].latency is None
    assert by_name["baseline"].latency_ms is not None
    assert by_name["int8"].latency.conditions.runtime == "onnxruntime"
    assert by_name["half"].error
    assert (record.runtime.conditions.runtime, record.runtime.conditions.form) == ("torch", "eager")
    assert record.runtime.candidate_runtime == "onnxruntime"
    assert by_name["int8"].memory.peak_bytes > 0
    assert {time.layer for time in by_name["int8"].layers} >= {"conv1", "conv2", "head"}
    assert by_name["int8"].integers.layers
    assert by_name["int8"].integers.saturated == ()
    assert by_name["baseline"].integers is None
    assert by_name["baseline"].notes == ()


@pytest.mark.usefixtures("warm_memory")
def test_what_one_look_inside_a_file_cannot_tell_keeps_nothing_from_the_others(run, task):
    loaded = session.load(run, ["int8"], Settings(TORCH, task, threads=1))
    wrong = dataclasses.replace(task, example=(task.example[0].repeat(1, 3, 1, 1),))
    found = session.profile(loaded, Settings(TORCH, wrong, threads=1))["int8"]
    assert found.memory is None
    assert any(note.startswith("Peak memory: ") for note in found.notes)
    assert any(note.startswith("Time by layer: ") for note in found.notes)
    assert found.denormals == 0


def test_a_variant_that_cannot_be_timed_says_why_and_the_others_go_on(run, task):
    loaded = session.load(run, ["int8", "half"], Settings(TORCH, task, threads=1))
    calls = itertools.count()

    def bind(inputs):
        return lambda: task.model(*inputs) * (1 + next(calls))

    broken = dataclasses.replace(loaded["int8"].loaded, bind=bind)
    broken = dataclasses.replace(broken, clone=lambda: broken)
    loaded["int8"] = dataclasses.replace(loaded["int8"], loaded=broken)
    found, errors = session.compare_latency(loaded, Settings(TORCH, task, threads=1), protocol=SHORT)
    assert set(found) == {"half"}
    assert "two calls of int8 on the same inputs differ" in errors["int8"]


def test_who_stops_a_race_keeps_what_was_timed_and_no_verdict_of_what_was_stopped(run, task, monkeypatch):
    monkeypatch.setattr(benchmark.timing, "CALLBACK_PERIOD_S", 0.0)
    loaded = session.load(run, ["int8", "half"], Settings(TORCH, task, threads=1))
    turns = []

    def stop(name, _samples):
        turns.append(name)
        return True

    found, errors = session.compare_latency(loaded, Settings(TORCH, task, threads=1), callback=stop)
    assert turns == ["int8"], errors
    assert found["int8"].stopped
    assert found["int8"].verdict in ("undecided", "too noisy")
    assert "it was stopped by hand" in found["int8"].warnings
    assert errors == {"half": "It was not timed: the benchmark was stopped by hand."}


def test_long_work_says_how_far_it_is(run, task):
    said = []
    loaded = session.load(run, ["int8"], Settings(TORCH, task, threads=1), progress=lambda *told: said.append(told))
    assert said == [(1, 2, "baseline"), (2, 2, "int8")]
    said.clear()
    session.evaluate(loaded, task, progress=lambda *told: said.append(told))
    assert said == [(0, 2, "baseline"), (1, 2, "int8"), (2, 2, "")]


def test_a_model_that_writes_to_its_inputs_is_not_measured(run, task):
    loaded = session.load(run, ["int8"], Settings(TORCH, task, threads=1))
    own = dataclasses.replace(task, example=tuple(x.clone() for x in task.example))

    def bind(inputs):
        output = task.model(*inputs)
        return lambda: (inputs[0].add_(1e-3), output)[1]

    writing = dataclasses.replace(loaded["int8"].loaded, bind=bind)
    writing = dataclasses.replace(writing, clone=lambda: writing)
    loaded["int8"] = dataclasses.replace(loaded["int8"], loaded=writing)
    found, errors = session.compare_latency(loaded, Settings(TORCH, own, threads=1))
    assert found == {}
    assert "changed the inputs" in errors["int8"] or "differ" in errors["int8"]


def test_kernels_that_saturate_are_named_where_a_file_does_not_reproduce_its_outputs(run, task, monkeypatch):
    check = IntegerCheck(0.3, {"conv1": 0.3}, ("conv1",))
    monkeypatch.setattr(files, "check_integers", lambda *_, **__: check)
    layers = benchmark.saturated(run / "variants/int8/model.onnx", ONNX, task.example, 1)
    assert benchmark.saturation(layers) == ("Integer kernels saturate on this processor in conv1.",)


def test_nothing_is_paired_with_a_baseline_that_could_not_be_judged(run, task):
    loaded = session.load(run, ["int8"], Settings(TORCH, task, threads=1))
    loaded["baseline"] = dataclasses.replace(loaded["baseline"], loaded=None)
    found, errors = session.evaluate(loaded, task)
    assert found == {}
    assert "baseline could not be evaluated" in errors["int8"]


def test_speed_ups_of_different_targets_are_refused(run, task):
    settings = [Settings(target, task, threads=1) for target in (TORCH, ONNX)]
    loaded = [session.load(run, ["int8"], each) for each in settings]
    (on_torch, _), (on_onnx, _) = (
        session.compare_latency(*pair, protocol=SHORT) for pair in zip(loaded, settings, strict=True)
    )
    with pytest.raises(UnfairComparison, match=r"runtime"):
        speedup(on_torch["int8"], on_onnx["int8"])
    assert speedup(on_torch["int8"], on_torch["int8"]) == 1.0


def test_torch_s_own_file_is_compared_with_the_module_as_it_is_called_today(run, task):
    settings = Settings(TORCH, task, threads=1, effort="quick")
    found = session.compare_runtimes(session.load(run, [], settings), settings)
    assert (found.conditions.form, found.candidate_runtime, found.candidate) == ("eager", "torch", "baseline")


def test_loading_writes_nothing_and_a_missing_baseline_is_a_step_of_its_own(task, tmp_path):
    settings = Settings(TORCH, task, threads=1)
    with pytest.raises(InvalidInput, match="write_missing_baseline"):
        session.load(tmp_path, [], settings)
    assert list(tmp_path.iterdir()) == []
    session.write_missing_baseline(tmp_path, settings)
    assert list(session.load(tmp_path, [], settings)) == ["baseline"]
    path = tmp_path / "variants/baseline/variant.json"
    before = path.stat()
    session.write_missing_baseline(tmp_path, settings)
    assert path.stat() == before


def test_conditions_tell_inputs_threads_and_batch(task):
    found = Settings(TORCH, task, threads=1).conditions("torchscript")
    assert (found.batch_size, found.threads, found.runtime) == (4, 1, "torch")
    assert found.hardware == machines.hardware(TORCH)
    assert found != Settings(TORCH, tiny_task(batch=2), threads=1).conditions("torchscript")


@pytest.mark.gpu
def test_the_gpu_runs_the_files_that_the_cpu_wrote(run, task):
    gpu = registry.resolve("cuda/torch")
    loaded = session.load(run, ["half"], Settings(gpu, task, threads=1))
    assert all(t.error == "" for t in loaded.values())
    found, errors = session.evaluate(loaded, task)
    assert errors == {}
    assert found["baseline"].mean.value > 0.5
    assert session.compare_latency(loaded, Settings(gpu, task, threads=1))[0]["half"].conditions.device == "cuda"


def slowed(variant, seconds):
    """Return a loaded variant whose every call takes `seconds` longer."""

    def slow(loaded):
        def bind(inputs):
            call = loaded.bind(inputs)
            return lambda: (time.sleep(seconds), call())[1]

        return dataclasses.replace(loaded, bind=bind, clone=lambda: slow(loaded.clone()))

    return dataclasses.replace(variant, loaded=slow(variant.loaded), first_call_ms=1000 * seconds)


@pytest.fixture(scope="module")
def hopeless(run, task):
    """What was measured where one variant takes a quarter of a second a call, in which order, and the record."""
    settings, texts = Settings(TORCH, task, threads=1), []
    loaded = session.load(run, ["int8", "half"], settings)
    loaded["int8"] = slowed(loaded["int8"], 0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SCORING_S", 1.1)
        measured = session.measure(run, loaded, settings, progress=lambda *event: texts.append(event[2]))
    record = session.record(settings, loaded, **vars(measured))
    return measured, texts, session.promising(loaded, measured, settings), record


def test_a_hopelessly_slow_variant_comes_last_and_is_timed_just_enough(hopeless):
    measured, texts, promising, _ = hopeless
    scored = f"evaluating int8 on {len(measured.accuracies['int8'].scores)} of 42 examples"
    assert texts[:5] == ["evaluating baseline", "timing half", "evaluating half", "timing int8", scored]
    assert texts.count("timing int8") == 1
    assert measured.latencies["int8"].speedup.high < 1 / 3
    assert measured.latencies["int8"].verdict in ("slower", "too noisy")
    assert len(measured.latencies["int8"].candidate_samples_ms) < 2 * FEWEST_BLOCKS
    assert set(promising) == {"baseline", "half"}


def test_what_a_hopelessly_slow_variant_was_not_measured_for_is_said_and_it_is_never_within_the_budget(hopeless, task):
    measured, _, _, record = hopeless
    by_name = {m.variant: m for m in record.measurements}
    int8 = by_name["int8"]
    count = len(int8.accuracy.scores)
    assert 4 <= count < 42
    assert f"Scored on {count} of 42 examples" in int8.notes[1]
    assert "as slow as the baseline" in int8.notes[0]
    assert by_name["half"].notes == ()
    assert len(int8.reference.scores) == count
    assert int8.accuracy.difference == measured.accuracies["int8"].difference
    assert {r.index for r in int8.accuracy.worst_regressions} <= set(range(42))
    assert results.accuracy_verdicts(record, 1.0) == {"half": "within budget", "int8": "cannot tell"}


def measured_by(speedups, sizes, gains=()):
    """Return files of these sizes and what was measured of them: speed-ups, and changes of accuracy."""
    loaded = {"baseline": session.LoadedVariant("baseline", "", size_bytes=100)}
    found = session.Measured()
    for i, (value, size) in enumerate(zip(speedups, sizes, strict=True)):
        loaded[f"v{i}"] = session.LoadedVariant(f"v{i}", "", size_bytes=size)
        latency = Estimate(value, value * 0.99, value * 1.01)
        found.latencies[f"v{i}"] = types.SimpleNamespace(
            speedup=latency, verdict="faster", candidate_samples_ms=[()] * 99
        )
        gain = gains[i] if gains else Estimate(0.0, -0.01, 0.01)
        found.accuracies[f"v{i}"] = types.SimpleNamespace(difference=gain, higher_is_better=True)
    return loaded, found


def test_variants_that_another_one_beats_do_not_lead():
    assert set(session.leading(*measured_by([2.0, 3.0], [50, 40]))) == {"baseline", "v1"}
    assert set(session.leading(*measured_by([2.0, 3.0], [30, 40]))) == {"baseline", "v0", "v1"}
    worse = [Estimate(0.0, -0.01, 0.01), Estimate(-0.3, -0.31, -0.29)]
    assert set(session.leading(*measured_by([2.0, 3.0], [50, 40], worse))) == {"baseline", "v0", "v1"}
    assert set(session.leading(*measured_by([], []))) == {"baseline"}


def test_the_effort_decides_what_is_timed_at_other_batch_sizes():
    loaded, found = measured_by([2.0, 3.0], [50, 40])
    settings = Settings(TORCH, None, threads=1)
    chosen = {
        effort: set(session.swept(loaded, found, dataclasses.replace(settings, effort=effort))) for effort in EFFORTS
    }
    assert chosen == {"quick": set(), "standard": {"baseline", "v1"}, "thorough": {"baseline", "v0", "v1"}}


def test_who_leads_after_a_short_timing_is_timed_again_at_full_length(run, task, monkeypatch):
    RunFolder(run).measurement("cpu/torch", machines.this_machine(TORCH)).unlink(missing_ok=True)
    # Twenty blocks are enough for the first timing, and nothing is for the second.
    efforts = {"standard": (Protocol(width=10.0), Protocol(width=1e-9, cap_s=1.5))}
    monkeypatch.setattr(session, "EFFORTS", efforts)
    settings, texts = Settings(TORCH, task, threads=1), []
    loaded = session.load(run, ["half"], settings)
    loaded["slow"] = dataclasses.replace(slowed(loaded["half"], 0.002), variant="slow")
    measured = session.measure(run, loaded, settings, progress=lambda *event: texts.append(event[2]))
    assert texts.count("timing half") >= 2
    assert "half" in session.leading(loaded, measured) or measured.latencies["half"].verdict == "too noisy"
    assert "slow" not in session.leading(loaded, measured)
    if measured.latencies["slow"].verdict != "too noisy":
        assert texts.count("timing slow") == 1


def test_every_variant_is_saved_as_soon_as_it_is_measured_and_not_measured_again(run, task):
    settings = Settings(ONNX, task, threads=1, effort="quick")
    path = RunFolder(run).measurement("cpu/onnxruntime", machines.this_machine(ONNX))
    path.unlink(missing_ok=True)
    loaded = session.load(run, ["int8", "half"], settings)
    loaded["other"] = dataclasses.replace(loaded["int8"], variant="other", first_call_ms=1e6)

    def killed(_done, _total, text):
        if text == "evaluating other":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.measure(run, loaded, settings, progress=killed)
    kept = store.read(path, TargetRecord)
    assert kept.partial
    assert [m.variant for m in kept.measurements] == ["baseline", "half", "int8"]
    texts = []
    again = session.measure(run, loaded, settings, progress=lambda *event: texts.append(event[2]))
    if kept.measurements[2].latency.verdict != "too noisy":
        assert "timing int8" not in texts
        assert again.latencies["int8"] == kept.measurements[2].latency
        assert again.accuracies["int8"] == kept.measurements[2].accuracy
    assert "timing other" in texts
    assert store.read(path, TargetRecord).partial
    for other in (dataclasses.replace(settings, seed=1), Settings(ONNX, tiny_task(batch=2), threads=1)):
        baseline, _ = session.evaluate({"baseline": loaded["baseline"]}, task)
        assert session._saved(run, loaded, other, baseline["baseline"]) == {}
    changed = loaded | {"int8": dataclasses.replace(loaded["int8"], file_sha256="0")}
    assert "int8" not in session._saved(run, changed, settings, again.accuracies["baseline"])
    session.write(run, session.record(settings, loaded, **vars(again)))
    assert session._saved(run, loaded, settings, again.accuracies["baseline"]) == {}
