"""A stage applied to a model, whatever its transform claims."""

import copy

import pytest
import torch
from tiny import task as tiny_task
from torch import nn

from shrinkkit.core.stages import FineTune, Section, Stage, Transform, stage
from shrinkkit.core.variant import History
from shrinkkit.errors import InvalidInput, NothingChanged, NothingToPrune, Unsupported
from shrinkkit.tasks import modules
from shrinkkit.transforms.transform import Made, apply_stage

HALF = {"ratio": 0.5, "scope": "layer", "round_to": 1}


@pytest.fixture(scope="module")
def task():
    return tiny_task()


def staged(task, *stages):
    model, history = task.model, History("baseline")
    for name, settings in stages:
        model, history = apply_stage(model, task, stage(name, settings), history=history)
    return model, history


def by(function):
    """Return a stage of a transform made up here."""
    return Stage("made-up", Section(), Transform("made-up", Section, function))


def test_channels_are_removed_and_what_remains_is_trained(task):
    model, history = staged(task, ("prune-channels", HALF), ("fine-tune", {"epochs": 2}))
    assert model.conv1.out_channels == 8
    assert task.model.conv1.out_channels == 16
    assert len(history.validation_scores) == 2
    assert "50.0 % of the channels asked for, 50.0 % removed" in history.notes[0]
    assert [list(one) for one in history.stages] == [["prune-channels"], ["fine-tune"]]


def test_a_layer_that_kept_its_channels_has_a_reason(task):
    model, history = staged(task, ("prune-channels", HALF | {"skip": ["conv1"]}))
    assert history.left_alone["conv1"]
    assert model.conv1.out_channels == 16


def test_the_taylor_criterion_gets_its_gradients_from_the_task(task):
    model, _ = staged(task, ("prune-channels", HALF | {"criterion": "taylor"}))
    assert model.conv1.out_channels == 8


def test_weights_stay_zero_through_fine_tuning(task):
    model, _ = staged(task, ("prune-weights", {"ratio": 0.8}), ("fine-tune", {"epochs": 1}))
    assert modules.sparsity(model) == pytest.approx(0.8, abs=1e-3)
    assert not torch.equal(model.head.bias, task.model.head.bias)


def test_a_stage_that_could_remove_nothing_is_an_error(task):
    with pytest.raises(NothingToPrune):
        staged(task, ("prune-channels", HALF | {"skip": ["conv1", "conv2"]}))


def test_a_transform_that_changed_nothing_is_an_error(task):
    with pytest.raises(NothingChanged, match="made-up"):
        apply_stage(task.model, task, by(lambda model, *_, **__: Made(copy.deepcopy(model))))


def test_a_transform_must_leave_its_input_unchanged(task):
    def careless(model, *_, **__):
        model.head.weight.data.mul_(2)
        return Made(copy.deepcopy(model))

    with pytest.raises(Unsupported, match="must leave the model"):
        apply_stage(copy.deepcopy(task.model), task, by(careless))


@pytest.mark.parametrize(("head", "problem"), [(nn.Linear(64, 3), "shapes"), (nn.Linear(63, 4), "no longer runs")])
def test_a_transform_must_keep_the_model_running_and_its_outputs_in_shape(task, head, problem):
    def broken(model, *_, **__):
        result = copy.deepcopy(model)
        result.head = head
        return Made(result)

    with pytest.raises(Unsupported, match=problem):
        apply_stage(task.model, task, by(broken))


def test_settings_in_python_are_held_to_the_rules_of_a_recipe():
    with pytest.raises(InvalidInput, match=r"`ratio` must be a number in \[0, 1\), got 50\. For 50 %, pass 0\.5\."):
        stage("prune-channels", {"ratio": 50})
    with pytest.raises(InvalidInput, match="Did you mean `fine-tune`"):
        stage("finetune", {})
    assert stage("fine-tune", {}).settings == FineTune()


def test_a_transform_must_leave_the_task_unchanged_too():
    own = tiny_task()

    def freezes(model, task, settings, *, seed, progress):
        task.model.requires_grad_(False)
        return Made(nn.Sequential(copy.deepcopy(model)).eval())

    pruned, _ = apply_stage(own.model, own, stage("prune-channels", HALF))
    with pytest.raises(Unsupported, match="and the task's own, unchanged"):
        apply_stage(pruned, own, by(freezes))


def test_a_distilled_model_and_the_original_can_both_be_trained_on(task):
    pruned, history = apply_stage(task.model, task, stage("prune-channels", HALF))
    distilled, _ = apply_stage(pruned, task, stage("distil", {"epochs": 1}), history=history)
    assert all(p.requires_grad for model in (task.model, distilled) for p in model.parameters())
