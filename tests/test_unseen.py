"""A model unlike the bundled ones, from task to record: every variant is built, or unsupported with a reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from shrinkkit import Task
from shrinkkit.core.stages import stage
from shrinkkit.core.variant import History
from shrinkkit.errors import ShrinkkitError, Unsupported
from shrinkkit.tasks.checks import check
from shrinkkit.transforms import variants
from shrinkkit.transforms.transform import apply_stage

RUNTIMES = ("torch", "onnxruntime")
PRUNE = {
    "ratio": 0.5, "criterion": "magnitude", "scope": "layer", "skip": [], "layers": {}, "round_to": 4,
}  # fmt: skip


def block(inputs, outputs, groups=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups),
        nn.GroupNorm(4, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs),
        nn.Conv2d(outputs, outputs, 1),
        nn.SiLU(),
    )


class UNet(nn.Module):
    """Skips by concatenation, grouped, depthwise and transposed convolutions, and a dict for an output."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = block(1, 16), block(16, 32, groups=4)
        self.up, self.merge = nn.ConvTranspose2d(32, 16, 2, stride=2), block(32, 16)
        self.out = nn.Conv2d(16, 1, 1)

    def forward(self, x):
        skip = self.down(x)
        deep = self.middle(F.max_pool2d(skip, 2))
        return {"clean": x + self.out(self.merge(torch.cat([self.up(deep), skip], 1)))}


def split(count, seed):
    clean = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + 100))
    return TensorDataset(clean + 0.3 * noise, clean)


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return Task(
        name="unet",
        model=UNet().eval(),
        example=(split(4, 9).tensors[0],),
        train=split(32, 1),
        calibration=split(16, 2),
        validation=split(12, 3),
        test=split(20, 4),
        score=lambda output, target: -((output["clean"] - target) ** 2).mean((1, 2, 3)),
        loss=lambda output, target: F.mse_loss(output["clean"], target),
        metric="negative squared error",
    )


def test_the_task_passes_every_check(task):
    check(task)


def test_its_channels_are_removed_and_the_files_prove_it(task, tmp_path):
    model, history = task.model, History("baseline")
    for name, settings in (("prune-channels", PRUNE), ("fine-tune", {"epochs": 1})):
        model, history = apply_stage(model, task, stage(name, settings), history=history)
    made = variants.write(tmp_path / "v", task, model, runtimes=RUNTIMES, history=history)
    assert made.parameters < 0.5 * sum(p.numel() for p in task.model.parameters())
    assert [f.runtime for f in made.files] == list(RUNTIMES)


@pytest.mark.parametrize("method", ["static-int8", "float16", "bfloat16"])
def test_it_is_quantized_or_the_reason_is_given(task, tmp_path, method):
    precision = {method: {"calibration_examples": 16} if method == "static-int8" else {}}
    made = variants.write(tmp_path / "v", task, task.model, precision=precision, runtimes=RUNTIMES)
    assert {f.runtime for f in made.files} | set(made.refusals) == set(RUNTIMES)
    assert any(p.runs_as != "float32" for row in made.audit for p in row.precision.values())
    assert all(p.why for row in made.audit for p in row.precision.values() if p.runs_as == "float32")


def test_what_it_has_no_layers_for_is_refused(task, tmp_path):
    with pytest.raises(ShrinkkitError, match=r"and this model has none\. Possible for this model: static-int8"):
        variants.write(tmp_path / "v", task, task.model, precision="dynamic-int8", runtimes=RUNTIMES)


@torch.library.custom_op("shrinkkit_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


class OfAnotherPackage(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return twice(self.head(x))


def test_a_model_that_calls_an_operator_of_another_package_is_refused_by_its_name(tmp_path):
    task = Task(OfAnotherPackage().eval(), torch.randn(4, 8))
    with pytest.raises(Unsupported) as refused:
        variants.write(tmp_path / "v", task, task.model, runtimes=RUNTIMES)
    assert "torch would hold the operator or class 'ops.shrinkkit_tests.twice'" in str(refused.value)
    assert "cannot export this model to ONNX" in str(refused.value)
    assert "No ONNX function found for <OpOverload(op='shrinkkit_tests.twice'" in str(refused.value)
    assert not list(tmp_path.rglob("model.*"))


class Spectral(nn.Module):
    def forward(self, x):
        return torch.stft(x, 64, 32, window=torch.hann_window(64), return_complex=True).abs().mean(2)


def test_operators_that_openvino_cannot_convert_are_named(tmp_path):
    task = Task(Spectral().eval(), torch.randn(4, 512))
    made = variants.write(tmp_path / "v", task, task.model, runtimes=("torch", "onnxruntime", "openvino"))
    assert {f.runtime for f in made.files} == {"torch", "onnxruntime"}
    assert made.refusals["openvino"].startswith("OpenVINO cannot convert these ONNX operators of this model: ")
    assert "STFT" in made.refusals["openvino"]
