"""The code in a variant's README, run where neither shrinkkit nor the user's class is to be found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import task as tiny_task
from torch import nn

from shrinkkit.results import cards
from shrinkkit.runtimes import base, files, registry
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.onnxruntime import load as ort_load
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.tasks import outputs
from shrinkkit.transforms import variants

INT8 = {"static-int8": {"calibration_examples": 32}}
MADE = {
    "baseline": ("float32", ["torch", "inductor", "onnxruntime", "openvino"]),
    "int8": (INT8, ["torch", "inductor", "onnxruntime", "openvino"]),
    "half": ("bfloat16", ["torch", "openvino"]),
}
RUN = [(name, one) for name, (_, runtimes) in MADE.items() for one in runtimes if (name, one) != ("half", "torch")]
BEFORE = """
import sys
sys.modules["shrinkkit"] = None
from safetensors.numpy import load_file
stored = load_file("reference.safetensors")
"""
AFTER = """
def flat(found):
    found = list(found.values()) if isinstance(found, dict) else found
    return [t for one in found for t in flat(one)] if isinstance(found, (list, tuple)) else [found]

wanted = [stored[name] for name in sorted(stored) if name.startswith(RUNTIME)]
assert len(wanted) == len(flat(output)) > 0
for one, found in zip(wanted, flat(output)):
    found = found.numpy() if hasattr(found, "numpy") else found
    assert found.shape == one.shape
    # inductor fuses what the reference rounds one by one: a step of int8 where a tie falls to the other side.
    limit = 2e-2 if RUNTIME == "inductor." else 1e-3
    assert abs(one - found).max() <= limit * abs(one).max(), abs(one - found).max()
"""


def run_alone(code, folder, runtime):
    """Run `code` as it stands and then on the stored inputs; return the status, and what is wrong with the outputs."""
    numbers = iter(range(9))

    def stored(match):
        array = f'stored["input.{next(numbers)}"]'
        return f"torch.from_numpy({array})" if match[1] == "torch" else array

    on_stored, count = re.subn(r"(torch|np)\.zeros\(\([^)]*\), [^)]*\)", stored, code)
    assert count >= 1
    # inductor would compile twice.
    first = "" if runtime == "inductor" else code
    script = "\n".join([BEFORE, first, on_stored, AFTER.replace("RUNTIME", repr(f"{runtime}."))])
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr if done.returncode else ""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a variant of each kind of file, and its cards."""
    folder, task = tmp_path_factory.mktemp("run"), tiny_task()
    for name, (precision, runtimes) in MADE.items():
        variants.write(folder / "variants" / name, task, task.model, precision=precision, runtimes=runtimes)
    cards.write(folder)
    return folder


def file(run, name, runtime):
    """Return the record of a variant's file, or skip where there is none."""
    made = variants.read(run / "variants" / name)
    if reason := made.refusals.get(runtime):
        pytest.skip(reason)
    return next(f for f in made.files if f.runtime == runtime)


def block(run, name, runtime):
    """Return the code in the README of a variant for a runtime."""
    path = re.escape(file(run, name, runtime).path)
    text = (run / "variants" / name / "README.md").read_text()
    return re.search(rf"^### `{path}` with {runtime}$.*?```python\n(.*?)```", text, re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize(("name", "runtime"), RUN)
def test_the_code_of_a_readme_gives_the_reference_outputs_without_shrinkkit(run, name, runtime):
    assert run_alone(block(run, name, runtime), run / "variants" / name, runtime) == (0, "")


def test_code_that_gives_other_outputs_is_found_out(run):
    code = block(run, "baseline", "onnxruntime").replace(
        "session.run(None, inputs)", "[session.run(None, inputs)[0] * 1.1]"
    )
    status, said = run_alone(code, run / "variants/baseline", "onnxruntime")
    assert (status, "AssertionError" in said) == (1, True)


def test_shrinkkit_cannot_be_imported_where_the_code_runs(run):
    status, said = run_alone("import shrinkkit\nnp.zeros((1, 2), 'float32')", run / "variants/baseline", "torch")
    assert (status, "import of shrinkkit halted" in said) == (1, True)


class Two(nn.Module):
    """Token numbers and a float in; a dict with a tuple out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 3)

    def forward(self, tokens, scale):
        found = self.table(tokens) * scale
        return {"sum": found.sum(1), "pair": (found, scale * 2)}


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_several_inputs_of_several_dtypes_get_a_line_each(tmp_path, runtime):
    torch.manual_seed(0)
    model, example = Two().eval(), (torch.randint(0, 9, (4, 5)), torch.rand(4, 1, 1))
    path = tmp_path / "model.onnx"
    if runtime == "torch":
        path = torch_build.write(model, example, tmp_path)[0]
    else:
        onnx_export.write(model, example, path)
    loaded = files.load(path, runtime=runtime)
    found = loaded(*example)
    one = base.describe(
        loaded,
        tmp_path,
        format="torchscript" if runtime == "torch" else "onnx",
        example=example,
        output=found,
        fixed_batch=False,
        error=0.0,
        tolerance=1e-3,
    )
    tensors = {f"{runtime}.{i}": t.contiguous() for i, t in enumerate(outputs.tensors(found))}
    save_file(tensors | {f"input.{i}": x for i, x in enumerate(example)}, tmp_path / "reference.safetensors")
    code = registry.get(runtime).snippet(one, registry.get(runtime).settings(path, threads=1))
    assert run_alone(code, tmp_path, runtime) == (0, "")
    assert "tokens" in code
    assert "scale" in code


def test_onnx_runtime_is_opened_with_the_options_that_it_is_measured_with(run):
    namespace = {}
    code = block(run, "baseline", "onnxruntime")
    exec(code[: code.index("session = ")], namespace)
    threads = variants.read(run / "variants/baseline").environment.threads
    ours, theirs = ort_load.options(Path("model.onnx"), threads), namespace["options"]
    for name in ("intra_op_num_threads", "inter_op_num_threads", "graph_optimization_level", "execution_mode"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert theirs.get_session_config_entry("session.force_spinning_stop") == "1"
    assert ours.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize("runtime", ["torch", "inductor", "onnxruntime"])
def test_code_for_a_gpu_puts_model_and_inputs_there(run, runtime):
    one = file(run, "baseline", runtime)
    settings = registry.get(runtime).settings(run / "variants/baseline" / one.path, threads=1)
    code = registry.get(runtime).snippet(one, settings, device="cuda")
    compile(code, "README.md", "exec")
    assert code.count("CUDAExecutionProvider" if runtime == "onnxruntime" else '"cuda"') == (
        runtime == "onnxruntime" or 2
    )
