import pytest
import torch
from small import sign_model, sign_task
from torch import nn
from torch.nn import functional

from shrinkkit.errors import InvalidInput, Unsupported
from shrinkkit.tasks import modules
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import finetune, prune

pytestmark = pytest.mark.usefixtures("one_thread")


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_run_improves_the_score_and_reports_one_per_epoch():
    model = sign_model()
    seen = []
    task = sign_task(model, train=128)
    result = finetune.run(model, task, epochs=5, learning_rate=1e-2, progress=lambda *event: seen.append(event))
    assert result.validation_scores[-1] > 0.75
    done = [one for one, _, _ in seen]
    assert done == sorted(set(done))
    assert {total for _, total, _ in seen} == {5}
    ends = [said for one, _, said in seen if one in range(1, 6)]
    assert ends == [
        f"epoch {i} of 5, validation accuracy {x:.4g}" for i, x in enumerate(result.validation_scores, start=1)
    ]


def test_run_leaves_the_model_and_the_generator_unchanged():
    model = sign_model()
    before, task = state(model), sign_task(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    result = finetune.run(model, task, epochs=1)
    assert torch.equal(torch.rand(3), expected)
    assert same(before, state(model))
    assert all(p.grad is None for p in model.parameters())
    assert not result.model.training
    assert not same(before, state(result.model))


def test_run_gives_the_same_model_for_the_same_seed_only():
    model = sign_model()
    task = sign_task(model)
    first, second, other = (finetune.run(model, task, epochs=1, seed=seed).model for seed in (3, 3, 4))
    assert same(state(first), state(second))
    assert not same(state(first), state(other))


def test_run_leaves_a_last_batch_of_one_example_out():
    model = sign_model()
    assert len(finetune.run(model, sign_task(model, train=65), epochs=1, batch_size=32).validation_scores) == 1


def test_run_with_keep_zeros_keeps_every_pruned_weight_at_zero():
    model = prune.weights(sign_model(), ratio=0.7, biases=True)
    kept = finetune.run(model, sign_task(model), epochs=2, keep_zeros=True).model
    lost = finetune.run(model, sign_task(model), epochs=2, keep_zeros=False).model
    for name, mask in prune.masks(model).items():
        assert not kept.get_parameter(name)[~mask].any()
    assert modules.sparsity(kept) == modules.sparsity(model)
    assert modules.sparsity(lost) < 0.1


def test_run_with_keep_zeros_still_trains_a_bias_that_begins_at_zero():
    model = sign_model()
    nn.init.zeros_(model[5].bias)
    pruned = prune.weights(model, ratio=0.5)
    assert finetune.run(pruned, sign_task(model), epochs=1, keep_zeros=True).model[5].bias.all()


def test_run_leaves_frozen_parameters_as_they_are():
    model = sign_model()
    model[0].requires_grad_(False)
    trained = finetune.run(model, sign_task(model), epochs=1).model
    assert torch.equal(trained[0].weight, model[0].weight)
    assert not torch.equal(trained[5].weight, model[5].weight)


def test_run_says_where_the_loss_stopped_being_finite():
    model = sign_model()
    task = sign_task(model)
    broken = Task(**{**vars(task), "loss": lambda output, target: functional.cross_entropy(output, target) / 0})
    with pytest.raises(InvalidInput, match=r"got inf in epoch 1, batch 1\. Lower `learning_rate`, which is 0\.5"):
        finetune.run(model, broken, epochs=1, learning_rate=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "`epochs` must be"),
        ({"epochs": 1, "learning_rate": 0.0}, "`learning_rate` must be"),
        ({"epochs": 1, "batch_size": 1}, "`batch_size` must be"),
    ],
)
def test_run_refuses_arguments_out_of_range(arguments, message):
    model = sign_model()
    with pytest.raises(InvalidInput, match=message):
        finetune.run(model, sign_task(model), **arguments)


def test_run_refuses_a_model_without_anything_to_train():
    model = sign_model().requires_grad_(False)
    with pytest.raises(InvalidInput, match=r"requires_grad_\(\)"):
        finetune.run(model, sign_task(model), epochs=1)


def test_run_refuses_a_model_in_half_precision():
    model = sign_model().half()
    with pytest.raises(InvalidInput, match=r"float32 or float64, got torch\.float16"):
        finetune.run(model, sign_task(model), epochs=1)


def test_training_runs_on_the_device_that_was_asked_for_or_the_best_one():
    best = finetune.training_device("auto").type
    assert best == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    assert finetune.training_device("cpu").type == "cpu"
    for device, available in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not available:
            with pytest.raises(Unsupported, match=f"`device` is {device}"):
                finetune.run(sign_model(), sign_task(sign_model()), epochs=1, device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_model_is_trained_on_the_gpu_and_given_back_on_the_cpu():
    seen = []

    class Watched(nn.Sequential):
        def forward(self, x):
            seen.append(x.device.type)
            return super().forward(x)

    model = Watched(*sign_model())
    result = finetune.run(model, sign_task(model), epochs=1)
    assert set(seen) == {"cuda"}
    assert {p.device.type for p in [*result.model.parameters(), *model.parameters()]} == {"cpu"}
