import dataclasses
import logging

import pytest
import torch
from architectures import MODELS, LastFlattened, SeveralInputs, images, perceptron, sequential
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from shrinkkit.core.stages import CHANNEL_CRITERIA, SCOPES, PruneChannels
from shrinkkit.errors import InvalidInput, NothingToPrune, Unsupported
from shrinkkit.tasks import modules
from shrinkkit.transforms import groups, prune, surgery

pytestmark = pytest.mark.usefixtures("one_thread")


def made(name):
    make, example = MODELS[name]
    torch.manual_seed(0)
    model, inputs = make(), example()
    model.train()
    model(*inputs)
    return model.eval(), inputs


def plan(model, example, **settings):
    """Return what pruning would do, which may be nothing."""
    return prune.prune_channels(model, example, PruneChannels(**settings))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def convolutions():
    return made("convolutions")


@pytest.mark.parametrize("name", MODELS)
def test_channels_halves_every_layer_but_the_output(name):
    model, example = made(name)
    before = state(model)
    pruned = prune.channels(model, example, ratio=0.5, scope="layer", round_to=1)
    assert plan(model, example, ratio=0.5, scope="layer", round_to=1).fraction == 0.5
    assert parameters(pruned) < 0.6 * parameters(model)
    assert same(before, state(model))
    assert not model.training
    assert not pruned.training
    assert pruned(*example).shape == model(*example).shape
    pruned.train()(*example).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_channels_reaches_the_ratio_over_all_layers_together(name):
    model, example = made(name)
    result = plan(model, example, ratio=0.4, round_to=1)
    assert result.fraction == pytest.approx(0.4, abs=0.06)
    with torch.no_grad():
        assert result.model(*example).shape == model(*example).shape


@pytest.mark.parametrize("name", ["convolutions", "dense", "grouped", "bidirectional", "attention, unbound"])
def test_a_cut_that_misses_by_one_channel_is_disproved(name):
    model, example = made(name)
    group = next(g for g in groups.groups(model, example) if not g.makes_output and len(g.units) > 2)
    assert surgery.disproof(model, surgery.cut_of([(group, [1])]), example) == ""
    reader = next(edit for edit in group.edits if not edit.out)
    shifted = dataclasses.replace(reader, idxs=(*reader.idxs[1:], reader.idxs[0]))
    wrong = dataclasses.replace(group, edits=tuple(shifted if edit is reader else edit for edit in group.edits))
    assert "does not compute" in surgery.disproof(model, surgery.cut_of([(wrong, [1])]), example)


def test_channels_removes_exactly_the_channels_that_are_zero(convolutions):
    model, example = convolutions
    dead = [1, 4, 9]
    with torch.no_grad():
        for parameter in (model.c1.weight, model.c1.bias, model.b1.weight, model.b1.bias):
            parameter[dead] = 0
        model.c2.weight[:, dead] = 0
    pruned = prune.channels(model, example, ratio=0, layers={"c1": 3 / 16}, round_to=1)
    assert pruned.c1.out_channels == 13
    torch.testing.assert_close(pruned(*example), model(*example))


@settings(max_examples=10, deadline=None)
@given(
    ratio=st.floats(0.05, 0.95),
    scope=st.sampled_from(SCOPES),
    round_to=st.sampled_from([1, 4]),
    criterion=st.sampled_from(["magnitude", "lamp", "geometric-median", "random"]),
)
def test_channels_is_exact_or_refuses_for_any_ratio(ratio, scope, round_to, criterion):
    model, example = made("convolutions")
    kwargs = {"ratio": ratio, "scope": scope, "round_to": round_to, "criterion": criterion}
    try:
        pruned = prune.channels(model, example, **kwargs)
    except NothingToPrune:
        assert round(ratio * 16) <= round_to / 2
        return
    widths = groups.widths(pruned)
    assert all(width % round_to == 0 and width >= 1 for layer, width in widths.items() if layer != "fc2")
    assert abs(plan(model, example, **kwargs).fraction - ratio) <= 0.1 + (round_to - 1) / 16


def test_channels_of_a_layer_rounds_to_the_nearest_multiple(convolutions):
    model, example = convolutions
    pruned = prune.channels(model, example, ratio=0.3, scope="layer", round_to=8)
    # 70 % of 16 is 11.2, nearer to 8 than to 16; 70 % of 32 is 22.4, nearer to 24 than to 16.
    assert groups.widths(pruned) == {"c1": 8, "c2": 8, "fc1": 24, "fc2": 10}


def test_channels_over_all_layers_never_removes_a_layer(convolutions):
    model, example = convolutions
    with torch.no_grad():
        model.c1.weight.mul_(1e-6)
        model.b1.weight.mul_(1e-6)
    settings = PruneChannels(ratio=0.5, criterion="taylor", round_to=1)
    result = prune.prune_channels(model, example, settings, gradients=lambda m: m(*example).sum())
    assert result.model.c1.out_channels >= 2
    assert result.fraction == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
def test_channels_prunes_by_every_criterion(criterion, convolutions):
    model, example = convolutions
    gradients = (lambda m: m(*example).pow(2).mean()) if criterion == "taylor" else None
    pruned = prune.channels(model, example, ratio=0.5, criterion=criterion, scope="layer", gradients=gradients)
    assert pruned.c1.out_channels == 8
    assert all(p.grad is None for p in [*model.parameters(), *pruned.parameters()])


def test_channels_by_batchnorm_says_what_it_cannot_rank(convolutions):
    model, example = convolutions
    result = plan(model, example, ratio=0.5, criterion="batchnorm", round_to=1)
    assert result.model.c1.out_channels == 8
    assert "nothing that `criterion='batchnorm'` can rank" in result.why["fc1"]


def test_channels_by_chance_depends_on_the_seed_alone(convolutions):
    model, example = convolutions
    first, second, other = (
        prune.channels(model, example, ratio=0.5, criterion="random", round_to=1, seed=seed) for seed in (1, 1, 2)
    )
    assert same(state(first), state(second))
    assert groups.widths(first) != groups.widths(other) or not same(state(first), state(other))


def last_first(weights):
    """A criterion of the tests' own: the later a channel or weight, the less important it is."""
    return -torch.arange(len(weights)).float().reshape(-1, *[1] * (weights.dim() - 1)).expand(weights.shape)


def last_channels_first(rows):
    return last_first(rows).amax(1)


def test_a_criterion_can_be_a_function_by_its_name(convolutions):
    model, example = convolutions
    settings = {"ratio": 0.5, "scope": "layer", "criterion": f"{__name__}:last_channels_first"}
    pruned = prune.channels(model, example, **settings)
    assert torch.equal(pruned.c1.weight, model.c1.weight[:8])
    zeroed = prune.weights(model, ratio=0.5, scope="layer", criterion=f"{__name__}:last_first")
    assert zeroed.fc1.weight[:16].all()
    assert not zeroed.fc1.weight[16:].any()
    with pytest.raises(InvalidInput, match="cannot be imported"):
        prune.channels(model, example, **settings | {"criterion": "not.there:score"})


def test_channels_leaves_skipped_layers_and_gives_layers_their_own_ratio(convolutions):
    model, example = convolutions
    result = plan(model, example, ratio=0.5, skip=["c2"], layers={"fc*1": 0.75}, scope="layer", round_to=1)
    assert groups.widths(result.model) == {"c1": 8, "c2": 16, "fc1": 8, "fc2": 10}
    assert result.fraction == pytest.approx(32 / 48)


def test_channels_leaves_hooks_flags_and_gradients_of_the_model_alone(convolutions):
    model, example = convolutions
    model.c1.requires_grad_(False)
    model(*example).sum().backward()
    calls = []
    model.c2.register_forward_hook(lambda *args: calls.append(1))
    gradient = model.c2.weight.grad.clone()
    with torch.inference_mode():
        pruned = prune.channels(model, example, ratio=0.5)
    assert torch.equal(model.c2.weight.grad, gradient)
    assert len(model.c2._forward_hooks) == len(pruned.c2._forward_hooks) == 1
    assert not pruned.c1.weight.requires_grad
    assert pruned.c2.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_channels_keeps_the_dtype(dtype, convolutions):
    model, (x,) = convolutions
    model = model.to(dtype)
    pruned = prune.channels(model, (x.to(dtype),), ratio=0.5)
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert pruned(x.to(dtype)).dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("name", ["convolutions", "recurrent", "torch's transformer"])
def test_channels_keeps_the_device(name):
    model, example = made(name)
    model = model.cuda()
    pruned = prune.channels(model, example, ratio=0.5)
    assert {p.device.type for p in pruned.parameters()} == {"cuda"}
    assert pruned(*(t.cuda() for t in example)).device.type == "cuda"


def test_channels_keeps_shared_weights_shared():
    model, example = made("language model")
    pruned = prune.channels(model, example, ratio=0.5)
    assert pruned.head.weight is pruned.embedding.weight


def test_channels_handles_several_inputs_and_nested_outputs():
    model = SeveralInputs().eval()
    example = (torch.randn(2, 8), torch.randn(2, 4))
    pruned = prune.channels(model, example, ratio=0.5)
    assert groups.widths(pruned) == {"a": 16, "b": 16, "body": 16, "head": 3}
    why = plan(model, example, ratio=0.5).why
    assert "makes the model's outputs" in why["a"]


def test_channels_leaves_alone_and_names_what_the_graph_gets_wrong(caplog):
    model, example = LastFlattened().eval(), images()
    with caplog.at_level(logging.WARNING):
        pruned = prune.channels(model, example, ratio=0.5, scope="layer")
    assert groups.widths(pruned) == {"c1": 8, "c2": 16, "head": 3}
    assert "Left alone: `c2`" in caplog.text
    assert "does not compute what it computes" in plan(model, example, ratio=0.5).why["c2"]
    assert plan(model, example, ratio=0.5, scope="layer").fraction == 0.25


def test_plan_says_why_each_layer_that_keeps_its_channels_does():
    class Stepped(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(8, 16)
            self.body, self.head, self.unused = nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(4, 4)

        def forward(self, x):
            hidden = x.new_zeros(x.shape[0], 16)
            for step in range(x.shape[1]):
                hidden = self.cell(x[:, step], hidden)
            return self.head(functional.relu(self.body(hidden)))

    result = plan(Stepped().eval(), (torch.randn(2, 5, 8),), ratio=0.5)
    assert result.model.body.out_features == 8
    assert "body" not in result.why
    assert "hidden0 has inconsistent hidden_size" in result.why["cell"]
    assert "makes the model's outputs" in result.why["head"]
    assert "is not reached" in result.why["unused"]


def test_channels_refuses_a_ratio_of_a_layer_that_cannot_be_cut():
    with pytest.raises(Unsupported, match=r"`layers` asks for 0\.5 of `c2`"):
        prune.channels(LastFlattened().eval(), images(), ratio=0.5, layers={"c2": 0.5})


def test_channels_leaves_parametrized_layers_alone():
    model = sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)).eval()
    parametrizations.weight_norm(model[0])
    example = (torch.randn(2, 8),)
    pruned = prune.channels(model, example, ratio=0.5, scope="layer")
    assert pruned[1].out_features == 8
    assert "is parametrized" in plan(model, example, ratio=0.5).why["0"]


def test_channels_refuses_a_model_without_anything_to_prune():
    with pytest.raises(NothingToPrune, match="makes the model's outputs"):
        prune.channels(nn.Linear(8, 4).eval(), (torch.randn(2, 8),), ratio=0.5)


def test_channels_refuses_rounding_that_leaves_nothing(convolutions):
    model, example = convolutions
    with pytest.raises(NothingToPrune, match="`round_to=64` lets none go"):
        prune.channels(model, example, ratio=0.5, round_to=64)


def test_channels_refuses_a_model_that_cannot_be_traced():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x.reshape(3, 3))

    with pytest.raises(Unsupported, match="cannot be traced"):
        prune.channels(Broken().eval(), (torch.randn(2, 8),), ratio=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 50}, r"`ratio` must be a number in \[0, 1\), got 50\. For 50 %, pass 0\.5"),
        ({"ratio": 0}, "removes nothing"),
        ({"ratio": float("nan")}, "`ratio` must be"),
        ({"ratio": 0.5, "criterion": "magnitud"}, "Did you mean `magnitude`"),
        ({"ratio": 0.5, "scope": "globl"}, "Did you mean `global`"),
        ({"ratio": 0.5, "round_to": 0}, "`round_to` must be"),
        ({"ratio": 0.5, "skip": ["nothing*"]}, "nothing"),
        ({"ratio": 0.5, "layers": {"nothing": 0.5}}, "nothing"),
        ({"ratio": 0.5, "layers": {"c1": 5}}, r"`layers\.c1` must be"),
        ({"ratio": 0.5, "criterion": "taylor"}, "`gradients` goes with"),
        ({"ratio": 0.5, "criterion": "taylor", "gradients": lambda m: 0.0}, "must return a loss"),
    ],
)
def test_channels_refuses_arguments_that_are_not_allowed(arguments, message, convolutions):
    model, example = convolutions
    with pytest.raises(InvalidInput, match=message):
        prune.channels(model, example, **arguments)


def test_channels_refuses_training_mode_a_bare_tensor_and_batchnorm_without_any(convolutions):
    model, example = convolutions
    with pytest.raises(InvalidInput, match="`example` must be a tuple"):
        prune.channels(model, example[0], ratio=0.5)
    with pytest.raises(InvalidInput, match="has none"):
        prune.channels(perceptron().eval(), (torch.randn(2, 8),), ratio=0.5, criterion="batchnorm")
    with pytest.raises(InvalidInput, match=r"model\.eval\(\)"):
        prune.channels(model.train(), example, ratio=0.5)


def test_layers_that_shrink_together_must_have_one_ratio():
    model, example = made("grouped")
    with pytest.raises(InvalidInput, match="must have one ratio"):
        prune.channels(model, example, ratio=0.5, layers={"stem": 0.5, "wide": 0.25})


def test_weights_zeroes_exactly_the_share_over_all_layers(convolutions):
    model, _ = convolutions
    before = state(model)
    pruned = prune.weights(model, ratio=0.8)
    total = sum(p.numel() for name, p in model.named_parameters() if "weight" in name and "b1" not in name)
    assert modules.sparsity(pruned) == pytest.approx(0.8, abs=1 / total)
    assert same(before, state(model))
    assert {n: (v.shape, v.dtype) for n, v in state(pruned).items()} == {
        n: (v.shape, v.dtype) for n, v in before.items()
    }
    assert not pruned.c1._forward_pre_hooks
    assert type(pruned.c1.weight) is nn.Parameter
    assert torch.equal(pruned.b1.weight, model.b1.weight)
    kept = pruned.c2.weight != 0
    assert torch.equal(pruned.c2.weight[kept], model.c2.weight[kept])


@settings(max_examples=12, deadline=None)
@given(ratio=st.floats(0.01, 0.999), criterion=st.sampled_from(["magnitude", "random"]), scope=st.sampled_from(SCOPES))
def test_weights_reaches_any_ratio_even_where_weights_are_equal(ratio, criterion, scope):
    model = perceptron()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    pruned = prune.weights(model, ratio=ratio, criterion=criterion, scope=scope)
    assert modules.sparsity(pruned) == pytest.approx(ratio, abs=0.5 / 48 if scope == "layer" else 0.5 / 816)


def test_weights_zeroes_the_smallest_weights_first():
    model = sequential(nn.Linear(10, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10]]))
    assert prune.weights(model, ratio=0.4)[0].weight.tolist() == [[0, 0, 0, 0, 5, -6, 7, -8, 9, -10]]


@pytest.mark.parametrize("name", ["recurrent", "bidirectional", "torch's transformer", "volumes", "audio", "u-net"])
def test_weights_of_every_kind_of_layer_are_pruned(name):
    model, example = made(name)
    pruned = prune.weights(model, ratio=0.5, scope="layer")
    for parameter, mask in prune.masks(pruned).items():
        assert float(mask.float().mean()) == pytest.approx(0.5, abs=0.02), parameter
    pruned(*example)


def test_weights_leaves_biases_unless_asked():
    model, _ = made("recurrent")
    for biases in (False, True):
        pruned = prune.weights(model, ratio=0.5, scope="layer", biases=biases)
        assert bool((pruned.lstm.bias_ih_l0 == 0).any()) is biases


def test_weights_counts_shared_weights_once_and_keeps_them_shared():
    model, _ = made("language model")
    pruned = prune.weights(model, ratio=0.5)
    assert pruned.head.weight is pruned.embedding.weight
    assert modules.sparsity(pruned) == pytest.approx(0.5, abs=1 / 1000)


def test_weights_leaves_skipped_layers_and_gives_layers_their_own_ratio(convolutions):
    model, _ = convolutions
    pruned = prune.weights(model, ratio=0.5, skip=["c*"], layers={"fc2": 0.9})
    assert pruned.c1.weight.all()
    assert float((pruned.fc2.weight == 0).float().mean()) == pytest.approx(0.9, abs=0.01)
    assert float((pruned.fc1.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_weights_keeps_dtype_and_mode(convolutions):
    pruned = prune.weights(convolutions[0].half().train(), ratio=0.5)
    assert pruned.training
    assert pruned.c1.weight.dtype == torch.float16


def test_weights_refuses_what_would_zero_nothing():
    with pytest.raises(NothingToPrune, match="No weight can be zeroed"):
        prune.weights(nn.BatchNorm2d(4), ratio=0.5)
    with pytest.raises(NothingToPrune, match="Raise `ratio`"):
        prune.weights(nn.Linear(4, 1), ratio=0.01)
    with pytest.raises(InvalidInput, match="Did you mean `magnitude`"):
        prune.weights(nn.Linear(4, 1), ratio=0.5, criterion="magnitute")
    with pytest.raises(InvalidInput, match="must be finite"):
        prune.weights(nn.Linear(4, 1).requires_grad_(False).apply(lambda m: m.weight.fill_(float("nan"))), ratio=0.5)
