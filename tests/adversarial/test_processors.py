"""Int8 files on processors with and without VNNI: they are exact here, say where else, and are the same each time."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import onnx
import processors
import pytest
import torch
from tiny import Corner, corners
from torch import nn

from shrinkkit.core.variant import ANY_PROCESSOR, WITH_VNNI
from shrinkkit.runtimes import files
from shrinkkit.runtimes.base import BuildRequest
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.onnxruntime import build as ort_build
from shrinkkit.runtimes.onnxruntime import integers
from shrinkkit.runtimes.onnxruntime import quantize as ort_quantize
from shrinkkit.runtimes.onnxruntime.quantize import FORMS
from shrinkkit.runtimes.openvino import build as openvino_build
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.torch import quantize

EXAMPLE = (corners(4, 2).tensors[0],)
CALIBRATION = [(corners(4, seed).tensors[0],) for seed in range(8)]
EXACT = """
import dataclasses, gc, json, sys, torch
from pathlib import Path
from shrinkkit.measure import scoring
from shrinkkit.runtimes.onnxruntime import integers
from shrinkkit.runtimes.onnxruntime import quantize as ort_quantize
from shrinkkit.tasks import loader
from shrinkkit.transforms import variants
gc.freeze()
folder, name, method, *runtimes = sys.argv[1:]
task = loader.load(name)
zeros = dataclasses.replace(task, example=(torch.zeros_like(task.example[0]),))
precision = {method: {"calibration_examples": 64}} if method == "static-int8" else method
def scores(to, runtimes):
    made = variants.write(Path(folder) / to, zeros, task.model, precision=precision, runtimes=runtimes)
    found = scoring.accuracy_of_files(Path(folder) / to, task, task.test)
    return made, {runtime: sum(a.scores) / len(a.scores) for runtime, a in found.items()}
made, chosen = scores("chosen", runtimes)
ort_quantize.saturates = lambda: False
integers.check = lambda *_, **__: None
full = scores("full", ["onnxruntime"])[1]["onnxruntime"]
exact = {file.runtime: file.exact_on for file in made.files}
print(json.dumps({"chosen": chosen, "full range": full, "exact": exact, "notes": made.notes}))
"""


class Zeros(nn.Module):
    """A model whose example shows no saturation, although other inputs would."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 8)
        nn.init.ones_(self.fc.weight)

    def forward(self, x):
        return self.fc(x)


def elsewhere(code, folder, *arguments):
    """Return what a process prints last that takes this for a processor without VNNI."""
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder), *arguments]
    done = subprocess.run(command, env=processors.without_vnni(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def made(runtime, folder, model, method, example=EXAMPLE, calibration=CALIBRATION):
    (folder / "scratch").mkdir(parents=True)
    return files.build(runtime, BuildRequest(folder, folder / "scratch", model, example, method, (), calibration))


@pytest.mark.parametrize(
    ("name", "method", "least", "lost"),
    [("digits-cnn", "static-int8", 0.99, 0.05), ("digits-lstm", "dynamic-int8", 0.985, 0.02)],
)
def test_files_made_without_vnni_keep_the_accuracy_that_full_range_loses(name, method, least, lost, tmp_path):
    runtimes = ["onnxruntime", *(["openvino"] if method == "static-int8" else [])]
    found = elsewhere(EXACT, tmp_path, name, method, *runtimes)
    assert all(found["chosen"][runtime] >= least for runtime in runtimes), found
    assert all(found["exact"][runtime] == ANY_PROCESSOR for runtime in runtimes), found
    assert found["full range"] < found["chosen"]["onnxruntime"] - lost
    assert any(note.startswith("onnxruntime: 7-bit weights") for note in found["notes"])


def test_probes_see_the_processor_that_the_kernels_see(tmp_path):
    probe = """import json
from shrinkkit.runtimes.onnxruntime import quantize as a
from shrinkkit.runtimes.openvino import build as b
from shrinkkit.runtimes.torch import quantize as c
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.onnxruntime import quantize as ort_quantize
from shrinkkit.runtimes.openvino import build as openvino_build
print(json.dumps([a.saturates(), b.saturates(), *(c.saturates(e) for e in c.supported_engines())]))"""
    expected = [True, True, *(engine != "qnnpack" for engine in quantize.supported_engines())]
    assert elsewhere(probe, tmp_path) == expected
    assert ort_quantize.saturates() == (not processors.has_vnni("onnxruntime"))
    assert openvino_build.saturates() == (not processors.has_vnni("openvino"))
    assert quantize.saturates("onednn") == (not processors.has_vnni("torch"))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch", "inductor"])
def test_a_file_says_on_which_processors_it_is_exact(runtime, tmp_path):
    file = made(runtime, tmp_path, Corner().eval(), "static-int8").file
    library = "torch" if runtime == "inductor" else runtime
    if runtime == "torch":
        assert file.exact_on in ((ANY_PROCESSOR, WITH_VNNI) if processors.has_vnni(library) else (ANY_PROCESSOR,))
    else:
        assert file.exact_on == (WITH_VNNI if processors.has_vnni(library) else ANY_PROCESSOR)


@pytest.mark.parametrize("method", ["static-int8", "dynamic-int8"])
def test_an_example_that_shows_no_saturation_does_not_hide_a_kernel_that_saturates(method, tmp_path, monkeypatch):
    monkeypatch.setattr(ort_quantize, "saturates", lambda: True)
    zeros = (torch.zeros(4, 64),)
    found = made("onnxruntime", tmp_path, Zeros().eval(), method, zeros, [zeros, (torch.rand(4, 64),)])
    assert found.file.exact_on == ANY_PROCESSOR
    assert "7-bit weights" in found.note


def test_a_layer_that_saturates_in_the_file_changes_its_form_although_the_probe_sees_nothing(tmp_path, monkeypatch):
    check, seen = integers.check, []

    def planted(path, *inputs, **options):
        seen.append(path.parent.name)
        found = check(path, *inputs, **options)
        return found if path.parent.name.startswith("7-bit") else type(found)(0.5, found.layers, ("conv1",))

    monkeypatch.setattr(integers, "check", planted)
    found = made("onnxruntime", tmp_path, Corner().eval(), "static-int8")
    assert found.file.exact_on == ANY_PROCESSOR
    assert "conv1" in found.note
    assert set(seen) == {form.name for form in FORMS}


def test_where_every_form_saturates_the_most_faithful_is_delivered_and_says_so(tmp_path, monkeypatch):
    check = integers.check

    def saturated(path, *inputs, **options):
        return replace(check(path, *inputs, **options), saturated=("conv1",))

    monkeypatch.setattr(integers, "check", saturated)
    found = made("onnxruntime", tmp_path, Corner().eval(), "static-int8")
    assert "saturate" in found.note


def test_an_exact_form_that_loses_fidelity_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(ort_quantize, "saturates", lambda: True)
    monkeypatch.setattr(ort_build, "output_error", lambda *a: 0.1 if a[2].parent.name.startswith("7-bit") else 0.01)
    found = made("onnxruntime", tmp_path, Corner().eval(), "static-int8")
    assert found.note.startswith("unsigned 8-bit weights")


@pytest.mark.parametrize("method", ["static-int8", "dynamic-int8"])
def test_weights_of_seven_bits_cannot_exceed_16_bits_in_any_sum_of_two_products(method, tmp_path):
    onnx_export.write(Corner().eval(), EXAMPLE, tmp_path / "float.onnx")
    path = tmp_path / "int8.onnx"
    form = FORMS[1]
    ort_quantize.write(tmp_path / "float.onnx", path, precision=method, calibration=CALIBRATION, form=form)
    stored = [onnx.numpy_helper.to_array(i) for i in onnx.load(str(path)).graph.initializer if i.data_type == 3]
    weights = [array for array in stored if array.ndim > 1]
    assert weights
    assert max(2 * 255 * abs(array.astype(int)).max() for array in weights) <= 32767


@pytest.mark.parametrize("method", ["static-int8", "dynamic-int8"])
def test_the_same_model_gives_the_same_torch_file_whatever_the_race_took(method, tmp_path):
    digests = set()
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.manual_seed(0)
        model = Corner().eval()
        if method == "static-int8":
            int8 = quantize.static_int8(model, EXAMPLE, CALIBRATION, engine="x86")
        else:
            int8 = quantize.dynamic_int8(model, EXAMPLE, engine="x86")
        digests.add(hashlib.sha256(torch_build.write(int8, EXAMPLE, folder)[0].read_bytes()).digest())
    assert len(digests) == 1


def test_engines_as_fast_as_each_other_are_chosen_by_a_fixed_order(monkeypatch):
    times = {"x86": 1.05, "fbgemm": 1.0, "onednn": 1.0, "qnnpack": 3.0}
    monkeypatch.setattr(quantize, "_call_ms", lambda *_: times[torch.backends.quantized.engine])
    engine = quantize.engine_of(quantize.dynamic_int8(Zeros().eval(), (torch.rand(4, 64),)))
    assert engine == quantize.supported_engines()[0]
    times[quantize.supported_engines()[0]] = 1.2
    assert quantize.engine_of(quantize.dynamic_int8(Zeros().eval(), (torch.rand(4, 64),))) != engine


@pytest.mark.parametrize("saturates", [True, False])
def test_an_engine_that_saturates_with_8_bits_gets_activations_of_7(saturates, monkeypatch):
    monkeypatch.setattr(quantize, "saturates", lambda engine: saturates)
    made = quantize.static_int8(Zeros().eval(), (torch.rand(4, 64),), [(torch.rand(16, 64),)], engine="onednn")
    assert quantize.conversion_of(made).narrow == saturates
    layer = next(module for module in made.modules() if quantize.is_int8(module))
    with torch.inference_mode(), quantize.using_engine("onednn"):
        seen = []
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].int_repr().max()))
        made(torch.ones(4, 64))
    assert (max(seen) <= 127) == saturates
