"""Equalization: the same function in float, more equal ranges, and smaller errors of int8 with outlying channels."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from shrinkkit.core.stages import stage
from shrinkkit.errors import NothingChanged
from shrinkkit.runtimes import files
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import variants
from shrinkkit.transforms.transform import apply_stage

pytestmark = pytest.mark.usefixtures("one_thread")


def task_of(model, inputs):
    return Task(model.eval(), (inputs[:8],), inputs=list(inputs), calibration=list(inputs[:64]))


def equalized(task, **settings):
    return apply_stage(task.model, task, stage("equalize", settings))


def difference(model, other, inputs):
    with torch.no_grad():
        a, b = model(inputs), other(inputs)
        a, b = (x["logits"] if isinstance(x, dict) else x for x in (a, b))
        return float((a - b).abs().max() / a.abs().max())


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x):
        x = functional.relu(self.norm(self.conv1(x)))
        return self.head(self.pool(functional.leaky_relu(self.conv2(x), 0.1)).flatten(1))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm2, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        y = self.norm(x)
        heads = (layer(y).unsqueeze(1) for layer in (self.query, self.key, self.value))
        x = x + functional.scaled_dot_product_attention(*heads).squeeze(1)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def outlying(model, names, by=30.0):
    """Return `model` with one channel of each norm that is far larger, and read by weights as much smaller."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for norm, readers in names.items():
        for p in model.get_submodule(norm).parameters():
            p.data[3] *= by
        for reader in readers:
            model.get_submodule(reader).weight.data[:, 3] /= by
    return model


NORMS = {"norm": ("query", "key", "value"), "norm2": ("up",)}


def attending():
    torch.manual_seed(0)
    model = outlying(Attending(), NORMS)
    return task_of(model, torch.randn(128, 6, 16))


def test_convolutions_with_norms_and_activations_between_compute_the_same():
    torch.manual_seed(0)
    model = outlying(Convolutions(), {})
    model.norm.weight.data[3] *= 30
    inputs = torch.randn(128, 3, 8, 8)
    task = task_of(model, inputs)
    result, history = equalized(task)
    assert difference(task.model, result, inputs) < 1e-5
    assert "2 layers equalized with what reads them: norm to conv2; conv2 to head" in history.notes[0]
    assert torch.equal(result.norm.running_var, task.model.norm.running_var)
    assert not any("BatchNorm" in note for note in history.notes)
    ranges = []
    for one in (task.model, result):
        with torch.no_grad():
            ranges.append(functional.relu(one.norm(one.conv1(inputs))).amax((0, 2, 3)))
    assert ranges[1].max() / ranges[1].min() < 0.4 * ranges[0].max() / ranges[0].min()


def test_a_norm_is_scaled_with_all_that_reads_it_as_smoothquant_does():
    task = attending()
    result, history = equalized(task, alpha=0.5, calibration_examples=64)
    inputs = torch.stack([task.calibration[i][0][0] for i in range(64)])
    assert difference(task.model, result, inputs) < 1e-5
    assert "norm to query, key, value; norm2 to up" in history.notes[0]
    with torch.no_grad():
        largest = task.model.norm(inputs).abs().amax((0, 1))
    weights = torch.cat([layer.weight.detach() for layer in (task.model.query, task.model.key, task.model.value)])
    scale = (largest / weights.abs().amax(0)).sqrt()
    torch.testing.assert_close(result.norm.weight, task.model.norm.weight / scale)
    torch.testing.assert_close(result.key.weight, task.model.key.weight * scale)


def test_what_else_is_read_or_returned_is_left_alone():
    task = attending()
    _, history = equalized(task)
    assert history.left_alone["up"] == "is read by `gelu`"
    assert history.left_alone["query"] == "is read by `scaled_dot_product_attention`"
    assert history.left_alone["down"] == "is read by `add`"
    _, history = equalized(task, skip=["key"])
    assert "in `skip`" in history.left_alone["norm"]


def test_channels_that_move_before_they_are_read_are_found_by_a_run():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(functional.relu(self.inner(self.norm(x).transpose(1, 2))))

    torch.manual_seed(0)
    task = task_of(outlying(Moving(), {}), torch.randn(128, 8, 8))
    result, history = equalized(task)
    assert "do not pass through" in history.left_alone["norm"]
    assert torch.equal(result.norm.weight, task.model.norm.weight)
    assert not torch.equal(result.inner.weight, task.model.inner.weight)


def test_a_layer_that_is_used_twice_is_left_alone():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.LayerNorm(8), shared, nn.ReLU(), shared)
    with pytest.raises(NothingChanged, match=r"`0` shares weights, or is read by a layer that does"):
        equalized(task_of(model, torch.randn(128, 8)))


@pytest.mark.parametrize("kind", ["GPT-2", "Llama", "ViT"])
def test_transformers_compute_the_same(kind):
    torch.manual_seed(0)
    if kind == "GPT-2":
        sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "use_cache": False}
        model, inputs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), torch.randint(0, 50, (96, 8))
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        if kind == "Llama":
            config = transformers.LlamaConfig(vocab_size=50, use_cache=False, **sizes)
            model, inputs = transformers.LlamaForCausalLM(config), torch.randint(0, 50, (96, 8))
        else:
            config = transformers.ViTConfig(image_size=16, patch_size=4, **sizes)
            model, inputs = transformers.ViTForImageClassification(config), torch.randn(96, 3, 16, 16)
    for name, p in model.named_parameters():
        p.data = p.data * 1.0 + (0.2 * torch.randn_like(p) if "norm" in name or "ln_" in name else 0)
    task = task_of(model, inputs)
    result, history = equalized(task)
    assert difference(task.model, result, inputs) < 1e-5
    count = int(history.notes[0].split()[1])
    assert count >= 4


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_static_int8_is_closer_where_channels_are_outliers(runtime, tmp_path):
    task = attending()
    inputs = torch.stack([task.test[i][0][0] for i in range(32)])
    result, _ = equalized(task)
    errors = []
    for number, model in enumerate((task.model, result)):
        folder = tmp_path / str(number)
        variant = variants.write(folder, task, model, runtimes=[runtime], precision="static-int8")
        loaded = files.load(folder / variant.files[0].path, runtime=runtime)
        found = torch.cat([loaded(x) for x in inputs.split(8)])
        with torch.no_grad():
            wanted = task.model(inputs)
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.7 * errors[0]
