import pytest
import torch
from tiny import task as tiny_task

from shrinkkit import records, targets, trials, variants
from shrinkkit.errors import UnfairComparison
from shrinkkit.targets import Target

TORCH, ONNX = Target("cpu", "torch"), Target("cpu", "onnxruntime")


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, recipe in (
        ("baseline", {}),
        ("int8", {"quantize": {"method": "static-int8", "calibration_examples": 32}}),
        ("half", {"quantize": {"method": "bfloat16"}}),
    ):
        variants.write(folder / "variants" / name, task, task.model, recipe=recipe, runtimes=["torch", "onnxruntime"])
    return folder


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_variant_of_the_folder_is_loaded_and_proved(run, task):
    loaded = trials.load(run, [], TORCH, task, threads=1)
    assert list(loaded) == ["baseline", "half", "int8"]
    assert all(t.error == "" and t.load_ms > 0 and t.first_call_ms > 0 for t in loaded.values())


def test_a_variant_that_the_runtime_refused_keeps_its_reason(run, task):
    loaded = trials.load(run, ["half"], ONNX, task, threads=1)
    assert "no bfloat16 kernels" in loaded["half"].error
    assert loaded["half"].loaded is None


def test_a_variant_that_was_never_made_is_said_to_be_missing(run, task):
    assert "no such variant" in trials.load(run, ["ghost"], TORCH, task, threads=1)["ghost"].error


def test_a_file_that_is_not_the_recorded_one_is_not_measured(task, tmp_path):
    folder = tmp_path / "variants/baseline"
    made = variants.write(folder, task, task.model, recipe={}, runtimes=["torch"])
    with (folder / made.files[0].path).open("ab") as file:
        file.write(b"\0")
    trial = trials.load(tmp_path, [], TORCH, task, threads=1)["baseline"]
    assert "is not the file that the record describes" in trial.error


def test_a_file_with_other_outputs_than_its_reference_is_not_measured(task, tmp_path):
    folder = tmp_path / "variants/baseline"
    made = variants.write(folder, task, task.model, recipe={}, runtimes=["torch"])
    from safetensors.torch import load_file, save_file

    stored = load_file(folder / variants.REFERENCE)
    save_file(stored | {"torch.0": stored["torch.0"] * 1.5}, folder / variants.REFERENCE)
    assert made.files
    assert "must reproduce its reference outputs" in trials.load(tmp_path, [], TORCH, task, threads=1)["baseline"].error


def test_accuracy_comes_from_the_files_and_is_paired_with_the_baseline(run, task):
    found, errors = trials.judge(trials.load(run, [], ONNX, task, threads=1), task)
    assert errors == {}
    assert set(found) == {"baseline", "int8"}
    assert found["baseline"].difference is None
    assert found["int8"].difference.low <= 0 <= found["int8"].difference.high
    assert len(found["int8"].scores) == len(task.test)


def test_a_whole_target_ends_in_one_record_that_can_be_read_back(run, task):
    loaded = trials.load(run, ["int8", "half"], ONNX, task, threads=1)
    accuracies, errors = trials.judge(loaded, task)
    latencies, untimed = trials.race(loaded, ONNX, task, threads=1, seed=0)
    assert untimed == {}
    runtime = trials.race_runtimes(run, loaded, ONNX, task, threads=1, seed=0)
    record = trials.record(task, ONNX, loaded, accuracies, errors, latencies, runtime, threads=1)
    assert records.read(trials.write(run, record), records.TargetRecord) == record
    by_name = {m.variant: m for m in record.measurements}
    assert by_name["baseline"].latency is None
    assert by_name["baseline"].latency_ms is not None
    assert by_name["int8"].latency.conditions.runtime == "onnxruntime"
    assert by_name["half"].error
    assert record.runtime.conditions.runtime == "torch"
    assert record.runtime.candidate_runtime == "onnxruntime"


def test_speed_ups_of_different_targets_are_refused(run, task):
    on_torch, _ = trials.race(trials.load(run, ["int8"], TORCH, task, threads=1), TORCH, task, threads=1, seed=0)
    on_onnx, _ = trials.race(trials.load(run, ["int8"], ONNX, task, threads=1), ONNX, task, threads=1, seed=0)
    with pytest.raises(UnfairComparison, match=r"runtime"):
        records.speedup(on_torch["int8"], on_onnx["int8"])
    assert records.speedup(on_torch["int8"], on_torch["int8"]) == 1.0


def test_there_is_no_runtime_to_compare_on_torch_itself(run, task):
    loaded = trials.load(run, [], TORCH, task, threads=1)
    assert trials.race_runtimes(run, loaded, TORCH, task, threads=1, seed=0) is None


def test_a_missing_baseline_is_made_first(task, tmp_path):
    assert list(trials.load(tmp_path, [], TORCH, task, threads=1)) == ["baseline"]
    assert variants.read(tmp_path / "variants/baseline").name == "baseline"


def test_conditions_tell_inputs_threads_and_batch(task):
    found = trials.describe(TORCH, task, threads=1)
    assert (found.batch_size, found.threads, found.runtime) == (4, 1, "torch")
    assert found.hardware == targets.hardware(TORCH)
    assert found != trials.describe(TORCH, tiny_task(batch=2), threads=1)


@pytest.mark.gpu
def test_the_gpu_runs_the_files_that_the_cpu_wrote(run, task):
    gpu = targets.resolve("cuda/torch")
    loaded = trials.load(run, ["half"], gpu, task, threads=1)
    assert all(t.error == "" for t in loaded.values())
    found, errors = trials.judge(loaded, task)
    assert errors == {}
    assert found["baseline"].mean.value > 0.5
    assert trials.race(loaded, gpu, task, threads=1, seed=0)[0]["half"].conditions.device == "cuda"
