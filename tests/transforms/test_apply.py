import pytest
import torch
from tiny import task as tiny_task

from shrinkkit.errors import InvalidInput, NothingToPrune
from shrinkkit.transforms import apply, prune

CHANNELS = {
    "ratio": 0.5, "criterion": "magnitude", "scope": "layer", "skip": [], "layers": {}, "round_to": 1, "steps": 1,
    "epochs": 1, "learning_rate": 1e-3, "seed": 0,
}  # fmt: skip
WEIGHTS = {key: value for key, value in CHANNELS.items() if key not in ("round_to", "steps")} | {"biases": False}


@pytest.fixture(scope="module")
def task():
    return tiny_task()


def test_channels_are_removed_and_what_is_left_is_trained(task):
    pruned = apply.prune_task(task, method="channels", **CHANNELS)
    assert pruned.ratio_asked == 0.5
    assert pruned.ratio_reached == pytest.approx(0.5)
    assert len(pruned.validation_scores) == 1
    assert pruned.model.conv1.out_channels == 8
    assert task.model.conv1.out_channels == 16


def test_each_round_is_followed_by_its_epochs(task):
    pruned = apply.prune_task(task, method="channels", **CHANNELS | {"steps": 2})
    assert len(pruned.validation_scores) == 2
    assert pruned.ratio_reached == pytest.approx(0.5)


def test_who_watches_sees_the_epochs_of_all_rounds_as_one_count(task):
    seen = []
    apply.prune_task(
        task, method="channels", **CHANNELS | {"steps": 2}, watch=lambda done, total, said: seen.append((done, total))
    )
    assert seen == sorted(set(seen))
    assert seen[0][0] < 1
    assert {(1, 2), (2, 2)} <= set(seen)


def test_who_watches_is_told_where_nothing_is_trained(task):
    seen = []
    apply.prune_task(task, method="channels", **CHANNELS | {"epochs": 0}, watch=lambda *event: seen.append(event))
    assert seen == [(1, 1, "nothing was trained")]


def test_a_layer_that_kept_its_channels_has_a_reason(task):
    pruned = apply.prune_task(task, method="channels", **CHANNELS | {"skip": ["conv1"]})
    assert pruned.kept_because["conv1"]
    assert pruned.model.conv1.out_channels == 16


def test_the_taylor_criterion_gets_its_gradients_from_the_task(task):
    pruned = apply.prune_task(task, method="channels", **CHANNELS | {"criterion": "taylor", "epochs": 0})
    assert pruned.ratio_reached == pytest.approx(0.5)


def test_weights_stay_zero_through_fine_tuning(task):
    pruned = apply.prune_task(task, method="weights", **WEIGHTS | {"ratio": 0.8})
    assert pruned.ratio_reached == prune.sparsity(pruned.model) == pytest.approx(0.8, abs=1e-3)
    assert not torch.equal(pruned.model.head.bias, task.model.head.bias)


@pytest.mark.parametrize(
    ("method", "section", "foreign"), [("channels", CHANNELS, {"biases": True}), ("weights", WEIGHTS, {"steps": 3})]
)
def test_a_key_of_the_other_method_is_not_passed_over(task, method, section, foreign):
    with pytest.raises(InvalidInput, match=r"has no meaning for the method"):
        apply.prune_task(task, method=method, **section | foreign)


def test_an_unknown_method_is_refused(task):
    with pytest.raises(InvalidInput, match=r"must be 'channels' or 'weights', got 'blocks'"):
        apply.prune_task(task, method="blocks", **CHANNELS)


def test_nothing_left_to_prune_is_an_error(task):
    with pytest.raises(NothingToPrune):
        apply.prune_task(task, method="channels", **CHANNELS | {"skip": ["conv1", "conv2"]})
