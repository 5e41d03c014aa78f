"""What every runtime must satisfy: those of shrinkkit, and the one of docs/runtimes.md, installed from outside."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from builds import request
from torch import nn

from shrinkkit.core import studies
from shrinkkit.core.target import Target
from shrinkkit.errors import InvalidInput, ModelFileError, Unsupported
from shrinkkit.measure import session
from shrinkkit.runtimes import files, registry
from shrinkkit.runtimes.spec import HALF, INT8
from shrinkkit.transforms import variants

RUNTIMES = ("torch", "inductor", "onnxruntime", "openvino", "numpy")
PRECISIONS = (*INT8, *HALF)
PAGE = Path(__file__).parents[2] / "docs" / "runtimes.md"
EXAMPLE = (torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)
RUN = """
import sys
sys.modules["shrinkkit"] = None
{code}
output = list(output.values()) if isinstance(output, dict) else output
output = output[0] if isinstance(output, (list, tuple)) else output
print(tuple(output.shape))
"""


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    """Install the runtime of the page: its code, and a distribution with its entry point."""
    site = tmp_path_factory.mktemp("site")
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(code)
    group, entry = re.search(
        r'```toml\n\[project\.entry-points\."(.*?)"\]\n(.*?)```', PAGE.read_text(), re.DOTALL
    ).groups()
    (site / "shrinkkit_numpy-1.dist-info").mkdir()
    (site / "shrinkkit_numpy-1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: shrinkkit-numpy\nVersion: 1\n"
    )
    (site / "shrinkkit_numpy-1.dist-info/entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        registry._installed.cache_clear()
        yield site
    registry._installed.cache_clear()


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request):
    """The name of a runtime that can run here."""
    if reason := registry.get(request.param).missing("cpu"):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def built(runtime, tmp_path_factory):
    """The float file of a perceptron, and its folder."""
    folder = tmp_path_factory.mktemp(runtime)
    return files.build(runtime, request(folder, perceptron(), EXAMPLE)), folder


def test_it_describes_itself_in_text(runtime):
    spec = registry.get(runtime)
    assert (spec.name, type(spec.title), type(spec.packages[0])) == (runtime, str, str)
    assert "cpu" in spec.devices
    answers = [spec.missing(device) for device in spec.devices]
    answers += [spec.refuses(precision, device) for precision in PRECISIONS for device in spec.devices]
    assert {type(answer) for answer in answers} == {str}
    assert f"cpu/{runtime}" in registry.targets()


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_float_file_gives_the_outputs_of_the_model_at_any_batch(runtime, built, batch):
    file, folder = built[0].file, built[1]
    x = torch.rand(batch, 1, 8, 8)
    loaded = files.load(folder / file.path, runtime=runtime)
    with torch.inference_mode():
        expected = perceptron()(x)
    for copy in (loaded, loaded.clone()):
        assert torch.allclose(copy(x), expected, atol=1e-5)
    assert file.max_relative_error <= file.tolerance
    assert file.exact_on == ""
    assert file.inputs[0].shape == ("batch", 1, 8, 8)


def test_the_same_model_gives_the_same_bytes(runtime, built, tmp_path):
    # torch names the first type that a process scripts otherwise than the next ones.
    hashes = [files.build(runtime, request(tmp_path / name, perceptron(), EXAMPLE)).file.sha256 for name in "ab"]
    assert hashes[0] == hashes[1]


def test_its_code_runs_without_shrinkkit_with_the_settings_that_are_measured(runtime, built):
    file, folder = built[0].file, built[1]
    settings = registry.get(runtime).settings(folder / file.path, threads=1)
    assert json.loads(json.dumps(settings)) == settings
    code = registry.get(runtime).snippet(file, settings)
    flat = [v for value in settings.values() for v in (value.values() if isinstance(value, dict) else [value])]
    assert all(str(value) in code for value in flat)
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(code=code)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "(1, 4)"), done.stderr


def test_times_cover_the_layers(runtime, built):
    path = built[1] / built[0].file.path
    times = files.layer_times(path, runtime=runtime, inputs=EXAMPLE, threads=1, calls=3)
    assert {"1", "3"} <= {time.layer for time in times}
    assert all(time.ms >= 0 for time in times)
    assert files.denormals(path, runtime=runtime, inputs=EXAMPLE) == 0
    assert files.check_integers(path, runtime=runtime, inputs=EXAMPLE, threads=1) is None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_runs_in_some_layer_or_is_refused_with_a_reason(runtime, precision, tmp_path):
    try:
        variant = files.build(runtime, request(tmp_path, perceptron(), EXAMPLE, precision, calibration=[EXAMPLE]))
    except Unsupported as error:
        assert str(error)[10:]  # noqa: PT017
        assert [path for path in tmp_path.iterdir() if path.is_file()] == []
        return
    expected = precision if precision in HALF else "int8"
    assert expected in {layer.runs_as for layer in variant.layers.values()}
    assert registry.refusal(precision, Target("cpu", runtime)) == ""


def test_a_file_is_verified_by_its_hash_and_its_outputs(runtime, built, tmp_path):
    built, folder = built
    file = built.file
    verified = files.verify(folder, file, EXAMPLE, built.output)
    assert (verified.reason, verified.max_relative_error) == ("", pytest.approx(0, abs=verified.limit))
    assert files.verify(folder, file, EXAMPLE, built.output + 1).reason
    for path in (file.path, *file.beside):
        (tmp_path / path).write_bytes((folder / path).read_bytes())
    (tmp_path / file.path).write_bytes((folder / file.path).read_bytes()[:-1] + b"?")
    with pytest.raises(ModelFileError, match=re.escape(file.path)):
        files.verify(tmp_path, file, EXAMPLE, built.output)


@pytest.mark.parametrize("damage", [lambda content: b"no model", lambda content: content[:-200]])
def test_a_damaged_file_is_refused_by_name(runtime, built, tmp_path, damage):
    source = built[1] / built[0].file.path
    path = tmp_path / source.name
    path.write_bytes(damage(source.read_bytes()))
    with pytest.raises(ModelFileError, match=re.escape(path.name)):
        files.load(path, runtime=runtime)
    with pytest.raises(ModelFileError, match="there is none"):
        files.load(tmp_path / "none.onnx", runtime=runtime)


def test_a_runtime_from_outside_is_measured_like_any_other(tmp_path):
    task = tiny.task(model=perceptron())
    variants.write(tmp_path / "variants/baseline", task, task.model, runtimes=["torch", "numpy"])
    settings = session.Settings(registry.resolve("cpu/numpy"), task, 1)
    loaded = session.load(tmp_path, ["baseline"], settings)
    assert loaded["baseline"].error == ""
    accuracies, errors = session.evaluate(loaded, task)
    assert (set(accuracies), errors) == ({"baseline"}, {})
    readme = (tmp_path / "variants/baseline/README.md").read_text()
    assert "`model.numpy.json` with numpy" in readme


def test_a_study_may_name_its_target():
    study = studies.study("digits-cnn", recipes=["channels-50"], targets=["cpu/numpy"])
    registry.check_targets(study)
    with pytest.raises(InvalidInput, match="NumPy has no kernels"):
        registry.check_targets(studies.study("digits-cnn", recipes=["float16"], targets=["cpu/numpy"]))


def test_a_name_is_given_once(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    other = type("Other", (), {"name": "torch"})()
    with pytest.raises(InvalidInput, match="unique"):
        registry.register(other)
    registry.register(registry.get("numpy"))
    assert registry.runtimes()["numpy"] is registry.get("numpy")
