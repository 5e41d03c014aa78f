"""Low-rank layers: the closest outputs on calibration data, smaller or left alone, and kept without pickle."""

import pytest
import torch
import transformers
from tiny import task as tiny_task
from torch import nn
from torch.utils.data import TensorDataset

from shrinkkit.core.stages import Factorize, settings_of, stage
from shrinkkit.core.variant import History
from shrinkkit.errors import InvalidInput, NothingChanged
from shrinkkit.tasks.modules import parameters
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import checkpoint, moments
from shrinkkit.transforms.techniques import factorize
from shrinkkit.transforms.transform import apply_stage

pytestmark = pytest.mark.usefixtures("one_thread")


def correlated(count, *shape, seed=0):
    """Return inputs of which a few directions hold nearly all variance, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[0], shape[0], generator=generator) * torch.logspace(0, -2, shape[0])
    flat = torch.randn(count, *shape[1:], shape[0], generator=generator)
    return 1 + (flat @ mix.T).movedim(-1, 1)


def task_of(model, inputs):
    torch.manual_seed(0)
    data = TensorDataset(inputs, torch.zeros(len(inputs)))
    return Task(model=model.eval(), example=(inputs[:4],), inputs=data, calibration=data)


def applied(task, **settings):
    return apply_stage(task.model, task, stage("factorize", settings))


def relative_error(model, other, inputs):
    with torch.no_grad():
        wanted = model(inputs)
        return float((other(inputs) - wanted).norm() / wanted.norm())


def test_no_layer_of_the_same_rank_is_closer_on_the_calibration_data():
    torch.manual_seed(0)
    layer = nn.Linear(12, 9)
    inputs = correlated(256, 12)
    task = task_of(nn.Sequential(layer), inputs)
    model, _ = applied(task, rank=3, calibration_examples=256)
    with torch.no_grad():
        outputs = layer(inputs)
        error = (model(inputs) - outputs).square().sum()
        centred = outputs - outputs.mean(0)
    # Eckart and Young: what is left of the centred outputs beyond their three largest singular values.
    least = torch.linalg.svdvals(centred)[3:].square().sum()
    assert least * (1 - 1e-4) <= error <= least * 1.02


def test_it_beats_plain_singular_values_on_correlated_inputs():
    torch.manual_seed(0)
    layer = nn.Linear(32, 32)
    inputs = correlated(512, 32)
    model, _ = applied(task_of(nn.Sequential(layer), inputs), rank=6)
    u, s, v = torch.linalg.svd(layer.weight.detach())
    plain = nn.Linear(32, 32)
    plain.weight.data, plain.bias.data = u[:, :6] * s[:6] @ v[:6], layer.bias.detach()
    other = correlated(512, 32, seed=0)[256:]
    ours, plain = (relative_error(nn.Sequential(layer), m, other) for m in (model, nn.Sequential(plain)))
    assert ours < plain / 2


def test_energy_is_the_share_of_the_output_that_is_kept():
    torch.manual_seed(0)
    inputs = correlated(512, 24)
    task = task_of(nn.Sequential(nn.Linear(24, 24)), inputs)
    task.model.requires_grad_(False)
    variance = task.model(inputs).var(0).sum()
    errors = {}
    for energy in (0.8, 0.99):
        model, _ = applied(task, energy=energy, calibration_examples=512)
        rank = model[0][0].out_features
        lost = (model(inputs) - task.model(inputs)).var(0).sum() / variance
        assert lost <= 1 - energy + 0.01
        errors[energy] = (float(lost), rank)
    assert errors[0.8][0] > errors[0.99][0]
    assert errors[0.8][1] < errors[0.99][1]


def test_ratio_is_the_share_of_weights_that_go_and_layers_have_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))
    task = task_of(model, correlated(64, 32))
    result, history = applied(task, ratio=0.5, layers={"2": 0.75})
    assert parameters(result[0]) == 512
    assert parameters(result[2]) == 256
    assert "rank 4 to 8" in history.notes[0]


def test_pointwise_convolutions_keep_their_stride_and_padding():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 1, stride=2, padding=1)
    inputs = correlated(64, 16, 7, 7)
    task = task_of(nn.Sequential(nn.Conv2d(16, 16, 3), conv), inputs)
    result, history = applied(task, energy=1.0, layers={"1": 0.3})
    assert [type(layer) for layer in result[1]] == [nn.Conv2d, nn.Conv2d]
    assert parameters(result[1]) < parameters(conv)
    assert isinstance(result[0], nn.Conv2d)
    assert relative_error(task.model, result, inputs) < 0.5
    assert history.left_alone == {}


def test_a_layer_without_bias_gets_none():
    torch.manual_seed(0)
    task = task_of(nn.Sequential(nn.Linear(32, 32, bias=False)), correlated(64, 32))
    result, _ = applied(task, rank=4)
    assert result[0][1].bias is None


def test_a_layer_that_would_not_get_smaller_says_so():
    torch.manual_seed(0)
    task = task_of(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2)), correlated(64, 32))
    _, history = applied(task, rank=4)
    assert list(history.left_alone) == ["1"]
    assert "only below rank 2" in history.left_alone["1"]
    with pytest.raises(NothingChanged, match=r"`0` has rank 16 by `rank`.*only below rank 16"):
        applied(task, rank=16, skip=["1"])


def test_constant_inputs_tied_weights_and_layers_that_are_not_called_are_left_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(16, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.constant, self.inner = nn.Linear(16, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            x = self.embed(tokens)
            x = x + self.attention(x, x, x)[0] + self.constant(torch.ones_like(x))
            return self.head(self.inner(x))

    torch.manual_seed(0)
    tokens = torch.randint(0, 16, (64, 6))
    result, history = applied(task_of(Odd(), tokens), rank=2)
    assert isinstance(result.inner, nn.Sequential)
    assert "same inputs" in history.left_alone["constant"]
    assert "shares its weights with" in history.left_alone["head"]
    assert "not called" in history.left_alone["attention.out_proj"]


def test_a_layer_whose_weight_the_model_reads_is_left_alone():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.second(self.first(x).to(self.second.weight.dtype))

    torch.manual_seed(0)
    result, history = applied(task_of(Reading(), correlated(64, 16)), rank=2)
    assert isinstance(result.first, nn.Sequential)
    assert "no attribute 'weight'" in history.left_alone["second"]


@pytest.mark.parametrize("kind", ["torch", "GPT-2"])
def test_transformers_are_factorized_and_rebuilt_without_pickle(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "torch":
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        task = task_of(model, correlated(64, 16, 6).mT.contiguous())
        layers = [f"1.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    else:
        sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "use_cache": False}
        task = task_of(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), torch.randint(0, 50, (32, 8)))
        layers = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    model, history = applied(task, rank=4)
    assert [type(layer) for name in layers for layer in model.get_submodule(name)] == [nn.Linear] * 8
    with torch.inference_mode():
        model(*task.example)
    checkpoint.save(tmp_path, task, model, history)
    rebuilt, _ = checkpoint.load(task, tmp_path)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(rebuilt.parameters(), model.parameters(), strict=True))


def test_a_shared_layer_stays_shared(tmp_path):
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    task = task_of(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(16, 3)), correlated(64, 16))
    model, _ = applied(task, rank=4, skip=["3"])
    assert model[0] is model[2]
    checkpoint.save(tmp_path, task, model, History("baseline"))


def test_inputs_that_hardly_vary_or_are_partly_dead_are_no_trouble():
    torch.manual_seed(0)
    inputs = correlated(64, 32) * 1e-2 + 3
    inputs[:, ::2] = 0
    task = task_of(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), inputs)
    model, _ = applied(task, energy=0.99, skip=["0"])
    assert relative_error(task.model, model, inputs) < 0.01


def test_few_calibration_examples_are_noted():
    torch.manual_seed(0)
    _, history = applied(task_of(nn.Sequential(nn.Linear(32, 32)), correlated(64, 32)), rank=4, calibration_examples=8)
    assert "fewer calibration inputs than input channels for 0" in history.notes[1]


@pytest.mark.parametrize("settings", [{}, {"rank": 2, "energy": 0.9}])
def test_exactly_one_measure_of_rank_is_given(settings):
    with pytest.raises(InvalidInput, match="One of `energy`, `rank`, `ratio` must be given"):
        settings_of(Factorize, **settings)


def test_moments_are_those_of_the_patches_that_a_convolution_multiplies():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, padding_mode="reflect")
    inputs = torch.randn(5, 4, 8, 9)
    ((_, found),) = moments.of(nn.Sequential(conv), ["0"], [(inputs[:3],), (inputs[3:],)])
    with torch.no_grad():
        outputs = conv(inputs) - conv.bias[:, None, None]
    wanted = outputs.double().square().mean((0, 2, 3))
    weight = moments.matrix(conv).double()
    energy = torch.einsum("goi,gij,goj->go", weight, found.second, weight).flatten()
    torch.testing.assert_close(energy, wanted, rtol=1e-5, atol=0)
    mean = (weight @ found.mean[..., None]).flatten()
    torch.testing.assert_close(mean, outputs.double().mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_layers_are_measured_in_several_passes_where_memory_is_short(monkeypatch):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), [(torch.randn(4, 8),)]
    once = dict(moments.of(model, ["0", "1", "2"], inputs))
    monkeypatch.setattr(moments, "MOST_BYTES", 0)
    several = dict(moments.of(model, ["0", "1", "2"], inputs))
    assert all(torch.equal(once[name].second, several[name].second) for name in once)


def test_the_model_is_left_unchanged():
    task = tiny_task()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    made = factorize.apply(task.model, task, Factorize(rank=2))
    assert parameters(made.model) < parameters(task.model)
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())
