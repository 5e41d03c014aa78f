import copy

import onnxruntime
import pytest
import torch
from recurrences import MODELS, REFUSED, Chain, Reader, X, Zeros, gru, last, linear, lstm
from tiny import corners
from tiny import task as tiny_task
from torch import nn

from shrinkkit.core.stages import CHANNEL_CRITERIA, PruneChannels
from shrinkkit.core.variant import History
from shrinkkit.errors import Unsupported
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.tasks import loader
from shrinkkit.transforms import checkpoint, finetune, groups, prune, surgery
from shrinkkit.transforms.groups import Edit, Group, Pruner

pytestmark = pytest.mark.usefixtures("one_thread")

GONE = [1, 4, 5, 11]
"""Hidden units whose weights are so small that they go first."""


def made(make):
    torch.manual_seed(0)
    return make().eval()


def scaled(model, factor):
    """Return a copy in which all that makes the units in `GONE` of the layers of 16 units is multiplied."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for layer in result.modules():
            if isinstance(layer, groups.Recurrent):
                for parameter in layer.parameters():
                    parameter.unflatten(0, (-1, 16))[:, GONE] *= factor
        for name, parameter in result.named_parameters():
            if name.startswith("start."):
                parameter[GONE] *= factor
            elif name in ("h", "c"):
                parameter[..., GONE] *= factor
    return result


def assert_whole(layer):
    """Assert that `layer` has the parameters that torch gives a new layer of its sizes, in use and side by side."""
    keys = ("num_layers", "bias", "bidirectional", "proj_size")
    options = {key: getattr(layer, key) for key in keys if getattr(layer, key, 0)} | {"bias": layer.bias}
    new = type(layer)(layer.input_size, layer.hidden_size, **options)
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in new.named_parameters()}
    assert [id(p) for p in getattr(layer, "_flat_weights", layer.parameters())] == [id(p) for p in layer.parameters()]
    assert all(isinstance(p, nn.Parameter) and p.is_contiguous() for p in layer.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_removing_hidden_units_equals_zeroing_them(name):
    model = scaled(made(MODELS[name]), 1e-3)
    before = copy.deepcopy(model.state_dict())
    skip = [name for name in ("conv", "head") if hasattr(model, name)]
    pruned = prune.channels(model, (X,), ratio=0.25, scope="layer", skip=skip, round_to=1)
    layers = [m for m in pruned.modules() if isinstance(m, groups.Recurrent)]
    assert {layer.hidden_size for layer in layers} == {12}
    for layer in layers:
        assert_whole(layer)
    torch.testing.assert_close(pruned(X), scaled(model, 0)(X))
    assert not torch.allclose(pruned(X), model(X), rtol=0, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pruned.train()(X).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_initial_states_of_a_size_kept_by_the_model_shrink_with_its_layers():
    model = scaled(made(Zeros), 1e-3)
    pruned = prune.channels(model, (X,), ratio=0.25, scope="layer", round_to=1)
    assert (pruned.hidden_dim, pruned.lstm.hidden_size, pruned.gru.hidden_size) == (12, 12, 12)
    torch.testing.assert_close(pruned(X), scaled(model, 0)(X))
    assert model.hidden_dim == 16


def test_every_layer_of_a_chain_shrinks_and_so_does_what_it_reads():
    pruned = prune.channels(made(Chain), (X,), ratio=0.5, scope="layer", round_to=1)
    assert groups.widths(pruned) == {"inputs": 6, "lstm": 8, "gru": 6, "head": 4}
    assert (pruned.lstm.input_size, pruned.gru.input_size, pruned.head.in_features) == (6, 8, 6)
    assert_whole(pruned.lstm)
    assert_whole(pruned.gru)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_a_projecting_lstm_loses_outputs_of_its_projection(options):
    model = made(lambda: Reader(last, a=lstm(proj_size=6, **options), head=linear(12 if options else 6)))
    gone = [0, 3]
    for factor in (1e-3, 0):
        before = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in model.a.named_parameters():
                if name.startswith("weight_hr"):
                    parameter[gone] *= factor
    pruned = prune.channels(before, (X,), ratio=1 / 3, scope="layer", round_to=1)
    assert (pruned.a.proj_size, pruned.a.hidden_size) == (4, 16)
    assert_whole(pruned.a)
    torch.testing.assert_close(pruned(X), model(X))


def test_layer_norm_over_hidden_units_shrinks_with_them():
    model = made(
        lambda: Reader(lambda m, x: m.head(m.norm(m.a(x)[0])[:, -1]), a=gru(), norm=nn.LayerNorm(16), head=linear())
    )
    pruned = prune.channels(model, (X,), ratio=0.5, scope="layer", round_to=1)
    assert pruned.norm.normalized_shape == (8,)
    assert pruned(X).shape == (3, 4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_whose_units_cannot_go_keeps_them_and_the_reason_is_given(name):
    make, why = REFUSED[name]
    model = made(make)
    pruned = prune.channels(model, (X,), ratio=0.5, scope="layer", round_to=1)
    assert (pruned.inputs.out_features, pruned.a.input_size, pruned.a.hidden_size) == (4, 4, 16)
    assert pruned.a.num_layers == model.a.num_layers
    with pytest.raises(Unsupported, match=why):
        prune.channels(model, (X,), ratio=0.5, layers={"a": 0.5})


def test_a_size_kept_for_layers_that_would_shrink_differently_is_refused():
    with pytest.raises(Unsupported, match=r"Expected hidden.*size"):
        prune.channels(made(Zeros), (X,), ratio=0.5, layers={"lstm": 0.25, "gru": 0.75}, round_to=1, scope="layer")


def test_a_layer_that_only_feeds_states_of_another_size_says_so():
    model = made(REFUSED["one layer for the states of two directions"][0])
    why = prune.prune_channels(model, (X,), PruneChannels(ratio=0.5)).why
    assert why["start"] == "meets layers that have another number of channels"


def test_a_layer_of_a_single_channel_says_so():
    result = prune.prune_channels(made(MODELS["attention over steps"]), (X,), PruneChannels(ratio=0.5))
    assert "has a single channel" in result.why["score"]


@pytest.mark.parametrize("criterion", [c for c in CHANNEL_CRITERIA if c != "batchnorm"])
@pytest.mark.parametrize("name", ["three layers", "bidirectional"])
def test_hidden_units_are_ranked_by_every_criterion(criterion, name):
    gradients = (lambda m: m(X).pow(2).mean()) if criterion == "taylor" else None
    model = made(MODELS[name])
    pruned = prune.channels(model, (X,), ratio=0.5, criterion=criterion, round_to=1, gradients=gradients)
    assert pruned.a.hidden_size == 8


def test_batchnorm_ranks_the_units_that_it_reads():
    def forward(model, x):
        return model.head(model.norm(model.a(x)[0].transpose(1, 2)).mean(2))

    model = made(lambda: Reader(forward, a=gru(), norm=nn.BatchNorm1d(16), head=linear()))
    with torch.no_grad():
        model.norm.weight[8:] = 0.1
    pruned = prune.channels(model, (X,), ratio=0.5, criterion="batchnorm", round_to=1)
    assert torch.equal(pruned.norm.weight, torch.ones(8))
    assert torch.equal(pruned.a.bias_hh_l0, model.a.bias_hh_l0.unflatten(0, (3, 16))[:, :8].flatten())


@pytest.mark.parametrize("criterion", ["magnitude", "geometric-median"])
@pytest.mark.parametrize("matrix", ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"])
def test_a_unit_stays_for_its_weights_in_any_gate_of_any_matrix(criterion, matrix):
    model = made(lambda: Reader(last, a=gru(num_layers=2), head=linear()))
    with torch.no_grad():
        model.a.get_parameter(matrix)[2 * 16 + 3] = 100.0
    rows = groups.rows(model.a, torch.detach)
    assert rows.norm(dim=1).argmax() == 3
    pruned = prune.channels(model, (X,), ratio=0.9, criterion=criterion, round_to=1)
    assert pruned.a.hidden_size == 2
    assert (pruned.a.get_parameter(matrix).unflatten(0, (3, 2))[2] == 100).any()


def test_gradients_are_taken_in_training_mode_without_dropout():
    seen = []

    def gradients(model):
        seen.append((model.training, model.a.training, model.a.dropout))
        return model(X).sum()

    model = made(MODELS["three layers"])
    pruned = prune.channels(model, (X,), ratio=0.5, criterion="taylor", gradients=gradients)
    assert seen == [(False, True, 0.0)]
    assert (pruned.a.training, pruned.a.dropout) == (model.a.training, model.a.dropout) == (False, 0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("name", ["three layers", "bidirectional", "packed", "decoder"])
def test_hidden_units_go_on_a_gpu_too(name):
    model, x = made(MODELS[name]).cuda(), X.cuda()
    pruned = prune.channels(model, (x,), ratio=0.5, criterion="taylor", gradients=lambda m: m(x).pow(2).mean())
    assert pruned.a.hidden_size == 8
    assert pruned(x).device.type == "cuda"


class Interleaved(Pruner):
    """Takes the gates of a unit to lie beside each other, which they do not."""

    def prune_out_channels(self, layer, idxs):
        gates, units = layer.weight_ih_l0.shape[0] // layer.hidden_size, layer.hidden_size
        order = torch.arange(gates * units).reshape(units, gates).T.flatten()
        back = order.argsort()
        for parameter in layer.parameters():
            parameter.data = parameter.data[order]
        super().prune_out_channels(layer, idxs)
        back = torch.arange(gates * layer.hidden_size).reshape(gates, -1).T.flatten()
        for parameter in layer.parameters():
            parameter.data = parameter.data[back]
        return layer


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_cut_through_the_wrong_rows_of_the_gates_is_disproved(name):
    model = made(MODELS[name])
    (group,) = [g for g in groups.groups(model, (X,)) if "a" in g.layers]
    assert surgery.disproof(model, surgery.cut_of([(group, GONE)]), (X,)) == ""
    wrong = Interleaved()
    edits = [
        Edit(e.name, wrong.prune_out_channels, e.dim, e.out, e.idxs, e.roots) if e.name == "a" else e
        for e in group.edits
    ]
    assert all(e.out for e in edits if e.name == "a")
    other = Group(group.layers, tuple(edits), group.units, group.makes_output)
    assert "does not compute" in surgery.disproof(model, surgery.cut_of([(other, GONE)]), (X,))


def test_the_bundled_recurrent_task_loses_half_of_its_hidden_units():
    task = loader.load("digits-lstm")
    pruned = prune.channels(task.model, task.example, ratio=0.5)
    assert groups.widths(pruned) == {"lstm": 64, "gru": 64, "head": 10}
    assert pruned(*task.example).shape == task.model(*task.example).shape


class Rows(nn.Module):
    """Reads an image of 8 x 8 row by row, from a state of zeros."""

    def __init__(self):
        super().__init__()
        self.hidden_size = 16
        self.lstm, self.head = nn.LSTM(8, 16, num_layers=2, batch_first=True), nn.Linear(16, 4)

    def forward(self, images):
        state = images.new_zeros(2, images.shape[0], self.hidden_size)
        return self.head(self.lstm(images.flatten(1, 2), (state, state))[0][:, -1])


@pytest.fixture(scope="module")
def task():
    return tiny_task(Rows())


@pytest.fixture(scope="module")
def tuned(task):
    pruned = prune.channels(task.model, task.example, ratio=0.5)
    return finetune.run(pruned, task, epochs=1).model


def test_a_pruned_recurrent_model_is_trained_on(task, tuned):
    assert tuned.lstm.hidden_size == tuned.hidden_size == 8
    assert_whole(tuned.lstm)
    pruned = prune.channels(task.model, task.example, ratio=0.5)
    assert not torch.equal(pruned.lstm.weight_hh_l1, tuned.lstm.weight_hh_l1)


def test_a_pruned_recurrent_model_is_rebuilt_exactly(task, tuned, tmp_path):
    checkpoint.save(tmp_path, task, tuned, History())
    rebuilt, _ = checkpoint.load(task, tmp_path)
    assert rebuilt.hidden_size == 8
    assert_whole(rebuilt.lstm)
    with torch.inference_mode():
        assert torch.equal(rebuilt(*task.example), tuned(*task.example))


@pytest.mark.slow
def test_a_pruned_recurrent_model_is_exported(task, tuned, tmp_path):
    (x,) = (corners(4, 9).tensors[0],)
    path, kind, _ = torch_build.write(tuned, task.example, tmp_path)
    onnx_export.write(tuned, task.example, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert kind == "torchscript"
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(path)(x), tuned(x))
        torch.testing.assert_close(torch.from_numpy(found), tuned(x), rtol=1e-4, atol=1e-5)
