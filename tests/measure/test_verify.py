"""A variant's folder on this machine: whole, damaged in every way that was thought of, alone, and beside its report."""

import dataclasses
import shutil
import sys

import examples
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from tiny import task as tiny_task

from shrinkkit.core import machines, run_folder, store
from shrinkkit.core.measurement import IntegerCheck
from shrinkkit.core.target import Target
from shrinkkit.errors import InvalidInput
from shrinkkit.measure import verification, verify
from shrinkkit.results import cards
from shrinkkit.results.cards import Figures
from shrinkkit.runtimes import files
from shrinkkit.transforms import variants

INT8 = {"static-int8": {"calibration_examples": 32}}
ON = ("cpu/torch", "cpu/onnxruntime")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("run") / "variants", tiny_task()
    for name, precision, runtimes in (
        ("baseline", "float32", ["torch", "onnxruntime", "openvino"]),
        ("int8", INT8, ["torch", "onnxruntime"]),
    ):
        one = variants.write(folder / name, task, task.model, precision=precision, runtimes=runtimes)
        cards.write_unmeasured(folder / name, one)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """The int8 variant, copied alone."""
    return shutil.copytree(made / "int8", tmp_path / "int8")


def check(folder, *only):
    return verify.check(folder, only=only or ON, threads=1, seconds=0.02)


def states(found):
    return {one.target: one.state for one in found.findings}


def rewrite(folder, **changes):
    """Change the record of the ONNX file, as someone would who changed the file and hid it."""
    record = variants.read(folder)
    path = folder / "model.onnx"
    own = {"sha256": store.sha256(path), "size_bytes": path.stat().st_size} | changes
    files = tuple(dataclasses.replace(f, **own) if f.runtime == "onnxruntime" else f for f in record.files)
    store.write(folder / "variant.json", dataclasses.replace(record, files=files))


def test_a_whole_variant_beside_its_baseline_is_verified_and_timed_in_turns(made):
    found = check(made / "int8")
    assert found.verified
    assert states(found) == dict.fromkeys(ON, "ok")
    assert found.problems == found.notes == ()
    for one in found.findings:
        assert one.max_relative_error <= one.limit
        assert one.speedup.low <= one.speedup.value <= one.speedup.high
        assert one.verdict
        assert "The report has no figures of this target." in one.notes


def test_every_target_that_has_a_file_gets_a_finding_and_refusals_keep_their_reason(made):
    found = verify.check(made / "baseline", only=(), threads=1, seconds=0.02)
    assert {"cpu/torch", "cpu/onnxruntime", "cpu/openvino", "cuda/torch", "mps/torch"} <= set(states(found))
    assert {state for target, state in states(found).items() if target.startswith("cpu/")} == {"ok"}
    assert all(one.why for one in found.findings if one.state != "ok")
    assert all(one.speedup is None and one.latency_ms for one in found.findings if one.state == "ok")
    assert found.notes == ()


def test_a_folder_that_came_alone_is_verified_without_a_ratio(folder):
    found = check(folder)
    assert found.verified
    assert all(one.speedup is None and one.latency_ms.value > 0 for one in found.findings)
    assert any("no folder `../baseline`" in note for note in found.notes)


def test_one_flipped_bit_is_found_and_the_other_files_go_on(folder):
    path = folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = check(folder)
    assert states(found) == {"cpu/torch": "ok", "cpu/onnxruntime": "damaged"}
    assert not found.verified
    assert found.findings[1].why.startswith("model.onnx is not the file that its record describes: it has another hash")


def test_a_truncated_file_is_named_with_its_size_also_where_nothing_can_run_it(folder):
    path = folder / "model.torchscript.pt"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    found = check(folder, "mps/torch", *ON)
    assert states(found) == {"mps/torch": "damaged", "cpu/torch": "damaged", "cpu/onnxruntime": "ok"}
    assert f"1000 bytes instead of {whole}" in found.findings[0].why


def test_a_missing_file_is_named(folder):
    (folder / "model.onnx").unlink()
    found = check(folder)
    assert states(found)["cpu/onnxruntime"] == "damaged"
    assert found.findings[1].why.startswith("model.onnx is missing.")


def test_a_changed_weight_shows_in_the_outputs_even_if_the_hash_was_made_to_fit(folder):
    model = onnx.load(folder / "model.onnx")
    bias = max((i for i in model.graph.initializer if "bias" in i.name), key=lambda i: i.dims[0])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * 3 + 999, bias.name))
    onnx.save(model, folder / "model.onnx")
    rewrite(folder)
    found = check(folder)
    assert states(found) == {"cpu/torch": "ok", "cpu/onnxruntime": "differs"}
    assert "model.onnx must give its reference outputs within 0.02" in found.findings[1].why
    assert found.findings[1].latency_ms is None
    assert any("variant.json and model-card.json differ in files" in problem for problem in found.problems)
    assert any("variant.json has changed since it was written" in problem for problem in found.problems)


def test_a_file_with_an_operator_that_its_runtime_does_not_know_fails_by_name(folder):
    model = onnx.load(folder / "model.onnx")
    model.graph.node.append(helper.make_node("Mystery", [model.graph.input[0].name], ["new"]))
    onnx.save(model, folder / "model.onnx")
    rewrite(folder)
    found = check(folder)
    assert states(found) == {"cpu/torch": "ok", "cpu/onnxruntime": "fails"}
    assert "model.onnx" in found.findings[1].why
    assert "Mystery" in found.findings[1].why


def test_without_its_reference_outputs_nothing_counts_as_verified(folder):
    (folder / "reference.safetensors").unlink()
    found = check(folder)
    assert set(states(found).values()) == {"damaged"}
    assert "reference.safetensors is missing" in found.findings[0].why


def test_a_truncated_reference_is_named(folder):
    path = folder / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    assert "reference.safetensors cannot be read" in check(folder).findings[0].why


def test_a_reference_without_this_runtime_is_no_proof(folder):
    from safetensors.torch import load_file, save_file

    stored = load_file(folder / "reference.safetensors")
    path = folder / "reference.safetensors"
    save_file({name: t for name, t in stored.items() if not name.startswith("onnxruntime")}, path)
    found = check(folder)
    assert states(found) == {"cpu/torch": "ok", "cpu/onnxruntime": "damaged"}
    assert "got 1 input and 0 outputs" in found.findings[1].why


def test_a_damaged_baseline_beside_it_is_told_and_costs_only_the_ratio(made, tmp_path):
    shutil.copytree(made, tmp_path / "variants")
    with (tmp_path / "variants/baseline/model.onnx").open("ab") as file:
        file.write(b"\0")
    found = check(tmp_path / "variants/int8")
    assert found.verified
    assert found.findings[0].speedup is not None
    assert found.findings[1].speedup is None
    assert any("the baseline could not be used: model.onnx is not" in note for note in found.findings[1].notes)


@pytest.mark.parametrize("machine", ["", "epyc-7r13-8-cores"])
def test_the_speed_here_is_put_beside_the_report_s_and_another_machine_is_named(made, tmp_path, machine):
    shutil.copytree(made, tmp_path / "variants")
    folder = tmp_path / "variants/int8"
    card = cards.read(folder)
    figures = {"variant": "int8", "target": "cpu/torch", "state": "measured", "metric": "", "threads": 1}
    figures |= {"machine": machine or machines.this_machine(Target("cpu", "torch")), "timing": "faster"}
    figures |= {"latency_ms": examples.around(0.001, 0.01), "speedup": examples.around(1000.0, 0.01)}
    store.write(folder / "model-card.json", dataclasses.replace(card, figures=(Figures(**figures),)))
    run_folder.write_sums(folder)
    found = check(folder, "cpu/torch")
    (said,) = [note for note in found.findings[0].notes if note.startswith("report (")]
    assert f"report ({figures['machine']}, 1 thread): 1,000" in said
    assert ("another machine" in said) == bool(machine)
    assert said.endswith(": differs.") or "too noisy here" in said
    assert found.verified


def test_a_damaged_card_is_a_problem_and_a_missing_one_is_told(folder):
    (folder / "model-card.json").write_text("{")
    found = check(folder, "cpu/onnxruntime")
    assert not found.verified
    assert "model-card.json must be a JSON record" in found.problems[0]
    (folder / "model-card.json").unlink()
    found = check(folder, "cpu/onnxruntime")
    assert found.verified
    assert "There is no model-card.json" in found.notes[0]


def test_a_record_of_a_newer_version_is_refused_with_the_remedy(folder):
    examples.change_json(folder / "variant.json", schema_version=99)
    with pytest.raises(InvalidInput, match=r"schema version 99.*Update shrinkkit"):
        check(folder)


def test_kernels_that_saturate_are_named(folder, monkeypatch):
    found = IntegerCheck(0.3, {"conv1": 0.3}, ("conv1",))
    monkeypatch.setattr(files, "check_integers", lambda *_, **__: found)
    one = check(folder, "cpu/torch").findings[0]
    assert one.saturated == ("conv1",)
    assert "Integer kernels saturate on this processor in conv1." in one.notes


def test_an_int8_file_cannot_run_on_a_gpu_and_that_is_no_failure(folder):
    (one,) = check(folder, "cuda/torch").findings
    assert (one.state, one.why) == ("cannot run here", "torch has no kernels for its int8 layers on CUDA.")


def test_the_number_of_threads_is_put_back(folder):
    before = torch.get_num_threads()
    verify.check(folder, only=["cpu/torch"], threads=before + 1, seconds=0.02)
    assert torch.get_num_threads() == before


def test_no_variant_and_unknown_targets_are_refused(folder, tmp_path):
    with pytest.raises(InvalidInput, match=r"must be a variant's folder, .*nowhere"):
        verification.verify(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="got 'cpu/tensorflow'"):
        verification.verify(folder, targets=["cpu/tensorflow"])


def test_the_folder_is_checked_in_another_process_and_each_target_is_announced(folder):
    started = []
    found = verification.verify(folder, targets=["cpu/onnxruntime"], threads=1, progress=lambda *e: started.append(e))
    assert (found.verified, states(found)) == (True, {"cpu/onnxruntime": "ok"})
    assert set(started) == {(0, 1, "cpu/onnxruntime")}


@pytest.mark.skipif(sys.platform == "darwin", reason="has an Apple GPU")
def test_where_nothing_can_run_nothing_is_verified(made):
    found = check(made / "baseline", "mps/torch")
    assert states(found) == {"mps/torch": "cannot run here"}
    assert not found.verified
