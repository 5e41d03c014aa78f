"""Wanda, SparseGPT and N:M patterns: against plain references, and against each other on correlated inputs."""

import pytest
import torch
from tiny import task as tiny_task
from torch import nn

from shrinkkit.core.stages import PruneWeights, settings_of, stage
from shrinkkit.errors import InvalidInput, NothingToPrune
from shrinkkit.tasks import modules
from shrinkkit.transforms import moments, prune, sparse
from shrinkkit.transforms.transform import apply_stage

pytestmark = pytest.mark.usefixtures("one_thread")


def correlated(rows, width, seed=0):
    """Return inputs whose features are mixtures of few, and of different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0.5, -1, width)[:, None]
    size = torch.logspace(-0.7, 0.7, width)[torch.randperm(width, generator=generator)]
    return torch.randn(rows, width, generator=generator) @ (mix * size)


def error(layer, other, inputs):
    with torch.no_grad():
        wanted = layer(inputs)
        return float((other(inputs) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("settings", [{"ratio": 0.5}, {"pattern": "2:4"}], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_sparsegpt_is_closer_than_wanda_and_wanda_than_magnitude(kind, settings):
    torch.manual_seed(0)
    if kind == "Linear":
        layer, train, test = nn.Linear(64, 32), correlated(512, 64), correlated(1024, 64)[512:]
    else:
        layer = nn.Conv2d(16, 32, 3, padding=1)
        images = correlated(1024 * 25, 16).reshape(1024, 5, 5, 16).movedim(-1, 1).contiguous()
        train, test = images[:512], images[512:]
    model, errors = nn.Sequential(layer).eval(), {}
    for criterion in ("magnitude", "wanda", "sparsegpt"):
        pruned = prune.weights(model, **settings, criterion=criterion, scope="layer", inputs=[(train,)])
        assert modules.sparsity(pruned) == pytest.approx(0.5, abs=1e-3)
        errors[criterion] = error(model, pruned, test)
    assert errors["sparsegpt"] < 0.9 * errors["wanda"]
    assert errors["wanda"] < 0.9 * errors["magnitude"]


def test_sparsegpt_equals_its_definition_column_by_column():
    torch.manual_seed(0)
    weight, inputs = torch.randn(5, 12, dtype=torch.float64), correlated(200, 12).double()
    second = inputs.T @ inputs / len(inputs)
    damped = second + sparse.DAMPING * second.diagonal().mean() * torch.eye(12)
    expected = weight.clone()
    for i in range(12):
        # Optimal Brain Surgeon among the columns that are left, with the inverse of their moments.
        inverse = torch.linalg.inv(damped[i:, i:])
        if i % 4 == 0:
            scores = torch.stack(
                [expected[:, j] ** 2 / torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(i, i + 4)], 1
            )
            gone = torch.zeros(5, 12, dtype=torch.bool)
            gone[:, i : i + 4].scatter_(1, scores.argsort(1)[:, :2], True)
        change = expected[:, i] * gone[:, i] / inverse[0, 0]
        expected[:, i:] -= change[:, None] * inverse[0]
        expected[gone[:, i], i] = 0
    for block in (4, 128):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse, "BLOCK", block)
            torch.testing.assert_close(sparse.sparsegpt(weight, second, 0.5, (2, 4)), expected, rtol=1e-6, atol=1e-9)


def test_wanda_zeroes_the_least_of_each_output_by_magnitude_times_norm():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(20, 6), correlated(100, 20)
    pruned = prune.weights(nn.Sequential(layer), ratio=0.4, criterion="wanda", inputs=[(inputs,)])
    scores = layer.weight.detach().abs() * inputs.norm(dim=0)
    assert torch.equal((pruned[0].weight == 0).sum(1), torch.full((6,), 8))
    for row, gone in zip(scores, pruned[0].weight == 0, strict=True):
        assert row[gone].max() < row[~gone].min()
    kept = pruned[0].weight != 0
    assert torch.equal(pruned[0].weight[kept], layer.weight[kept])


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_patterns_hold_exactly_along_input_channels(criterion, pattern):
    torch.manual_seed(0)
    kept, of = map(int, pattern.split(":"))
    model = nn.Sequential(nn.Conv2d(16, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 8)).eval()
    pruned = prune.weights(model, pattern=pattern, criterion=criterion, inputs=[(torch.randn(32, 16, 4, 4),)])
    for weight in (pruned[0].weight.movedim(1, -1), pruned[2].weight):
        nonzero = (weight.reshape(-1, of) != 0).sum(1)
        assert torch.equal(nonzero, torch.full_like(nonzero, kept))


def test_layers_that_a_pattern_or_the_data_do_not_fit_say_so_before_any_data_are_read():
    model = nn.ModuleDict({"a": nn.Conv2d(3, 8, 3), "b": nn.Linear(6, 4), "c": nn.LSTM(8, 8), "d": nn.Linear(8, 4)})
    why = sparse.refusals(model, ["a", "b", "c", "d"], (2, 4))
    assert why == {
        "a": "has 3 inputs for each output, which 4 does not divide",
        "b": "has 6 inputs for each output, which 4 does not divide",
        "c": "is neither Linear nor Conv2d, the layers that data and patterns can prune",
    }
    with pytest.raises(NothingToPrune, match=r"`0` has 6 inputs for each output, which 4 does not divide"):
        prune.weights(nn.Sequential(nn.Linear(6, 4)), pattern="2:4")


def test_a_layer_whose_inputs_are_zero_is_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    settings = settings_of(PruneWeights, ratio=0.5, criterion="sparsegpt")
    made = prune._prune_weights(model, settings, [(torch.randn(16, 8),)], 0, lambda *_: None)
    assert "all zero" in made.left_alone["1"]


def test_groups_whose_inputs_are_zero_are_pruned_like_others():
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)).eval(), torch.randn(16, 4, 5, 5)
    images[:, 1] = 0
    for criterion in ("wanda", "sparsegpt"):
        pruned = prune.weights(model, ratio=0.5, criterion=criterion, inputs=[(images,)])
        assert torch.isfinite(pruned[0].weight).all()
        assert modules.sparsity(pruned) == pytest.approx(0.5, abs=0.06)


def test_layers_with_a_ratio_of_their_own_and_skipped_ones(tmp_path):
    task = tiny_task()
    settings = {"ratio": 0.5, "criterion": "sparsegpt", "skip": ["conv1"], "layers": {"head": 0.75}}
    model, history = apply_stage(task.model, task, stage("prune-weights", settings))
    assert torch.equal(model.conv1.weight, task.model.conv1.weight)
    shares = {name: float((model.get_submodule(name).weight == 0).float().mean()) for name in ("conv2", "head")}
    assert shares == {"conv2": 0.5, "head": 0.75}
    assert history.stages[0]["prune-weights"]["scope"] == "layer"


@pytest.mark.parametrize("training", ["fine-tune", "distil"])
def test_a_pattern_survives_training(training):
    task = tiny_task()
    model, history = apply_stage(task.model, task, stage("prune-weights", {"pattern": "2:4", "criterion": "sparsegpt"}))
    assert "which 4 does not divide" in history.left_alone["conv1"]
    trained, _ = apply_stage(model, task, stage(training, {"epochs": 1}))
    assert not torch.equal(trained.conv2.weight, model.conv2.weight)
    for weight in (trained.conv2.weight.movedim(1, -1), trained.head.weight):
        assert int((weight.reshape(-1, 4) != 0).sum(1).max()) == 2


def test_a_conv1d_is_pruned_along_its_inputs():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 8)).eval()
    pruned = prune.weights(model, pattern="2:4", criterion="wanda", inputs=[(torch.randn(9, 8),)])
    assert torch.equal((moments.matrix(pruned[0]).reshape(-1, 4) != 0).sum(1), torch.full((12,), 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "4:4"}, "must keep less than all"),
        ({"pattern": "2:4", "ratio": 0.3}, "leave out `ratio` and `layers`"),
        ({"pattern": "2:4", "layers": {"x": 0.5}}, "leave out `ratio` and `layers`"),
        ({"ratio": 0.5, "criterion": "wanda", "scope": "global"}, "set `scope` to layer"),
        ({"ratio": 0.5, "criterion": "wanda", "biases": True}, "leave out `biases`"),
        ({"pattern": "half"}, "`pattern` must be N:M"),
        ({"criterion": "wanda"}, "`ratio` is missing"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(InvalidInput, match=message):
        settings_of(PruneWeights, **settings)


def test_the_ratio_follows_from_the_pattern_and_stays_when_read_again():
    settings = settings_of(PruneWeights, pattern="1:3", criterion="wanda")
    assert settings.ratio == 1 - 1 / 3
    assert settings_of(PruneWeights, **settings.model_dump()) == settings


def test_criteria_by_data_need_inputs():
    with pytest.raises(InvalidInput, match="needs `inputs`"):
        prune.weights(nn.Sequential(nn.Linear(8, 8)), ratio=0.5, criterion="wanda")
