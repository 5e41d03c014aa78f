"""Optional packages that are not installed: what works without them, and the remedy that the errors name."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def without(code, *hidden, cwd=None):
    """Run Python code where the packages `hidden` are not installed, and return how it ended."""
    hide = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); sys.path.insert(0, {str(Path(__file__).parent)!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{hide}\n{code}"], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("code", "package", "extra"),
    [
        ("from shrinkkit.tasks import loader; loader.load('digits-cnn')", "sklearn", "bundled"),
        ("from tiny import task; task().to_frame()", "pandas", "frames"),
        ("from shrinkkit.core.variant import Audit; Audit().to_frame()", "pandas", "frames"),
        ("from shrinkkit.runtimes import registry; registry.resolve('cpu/onnxruntime')", "onnxruntime", "onnxruntime"),
        ("from shrinkkit.runtimes import registry; registry.resolve('cpu/onnxruntime')", "onnx", "onnxruntime"),
        ("from shrinkkit.runtimes import registry; registry.resolve('cpu/openvino')", "nncf", "openvino"),
        ("from shrinkkit.runtimes import registry; registry.resolve('cpu/inductor')", "torchao", "inductor"),
        ("import shrinkkit; shrinkkit.from_transformers('model', [])", "transformers", "transformers"),
        ("import shrinkkit; shrinkkit.from_timm('resnet18', [])", "timm", "timm"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_installs_it(code, package, extra):
    ended = without(code, package)
    assert "Unsupported" in ended.stderr
    assert f"{package}" in ended.stderr
    assert f'pip install "shrinkkit[{extra}]"' in ended.stderr


OPTIONAL = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "nncf", "torchao", "pandas", "sklearn")
WHOLE = """
from pathlib import Path
from tiny import task
from shrinkkit.runtimes import registry
from shrinkkit.transforms import variants
available = [name for name, reason in registry.available().items() if not reason and name.startswith("cpu/")]
small = task()
made = variants.write(Path("variants/baseline"), small, small.model, runtimes=["torch", "onnxruntime"])
print(available, [file.runtime for file in made.files], made.refusals)
"""


def test_torch_alone_works_without_any_of_them(tmp_path):
    ended = without(WHOLE, *OPTIONAL, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("['cpu/torch'] ['torch'] {'onnxruntime': ")
    assert "shrinkkit[onnxruntime]" in ended.stdout
