import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from shrinkkit.errors import InvalidInput, Unsupported
from shrinkkit.tasks import modules
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import finetune, prune

pytestmark = pytest.mark.usefixtures("one_thread")


def dataset(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    return TensorDataset(inputs, (inputs.mean((1, 2, 3)) > 0).long())


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(8 * 64, 2),
    ).eval()


def make_task(model, train=65):
    return Task(
        name="sign-of-the-mean",
        model=model,
        example=(torch.randn(4, 1, 8, 8),),
        train=dataset(train, 1),
        calibration=dataset(8, 2),
        validation=dataset(64, 3),
        test=dataset(8, 4),
        score=lambda output, target: (output.argmax(1) == target).float(),
        loss=functional.cross_entropy,
    )


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_run_improves_the_score_and_reports_one_per_epoch():
    model = small_model()
    seen = []
    task = make_task(model, train=128)
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
    model = small_model()
    before, task = state(model), make_task(model)
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
    model = small_model()
    task = make_task(model)
    first, second, other = (finetune.run(model, task, epochs=1, seed=seed).model for seed in (3, 3, 4))
    assert same(state(first), state(second))
    assert not same(state(first), state(other))


def test_run_leaves_a_last_batch_of_one_example_out():
    model = small_model()
    assert len(finetune.run(model, make_task(model, train=65), epochs=1, batch_size=32).validation_scores) == 1


def test_run_with_keep_zeros_keeps_every_pruned_weight_at_zero():
    model = prune.weights(small_model(), ratio=0.7, biases=True)
    kept = finetune.run(model, make_task(model), epochs=2, keep_zeros=True).model
    lost = finetune.run(model, make_task(model), epochs=2, keep_zeros=False).model
    for name, mask in prune.masks(model).items():
        assert not kept.get_parameter(name)[~mask].any()
    assert modules.sparsity(kept) == modules.sparsity(model)
    assert modules.sparsity(lost) < 0.1


def test_run_with_keep_zeros_still_trains_a_bias_that_begins_at_zero():
    model = small_model()
    nn.init.zeros_(model[5].bias)
    pruned = prune.weights(model, ratio=0.5)
    assert finetune.run(pruned, make_task(model), epochs=1, keep_zeros=True).model[5].bias.all()


def test_run_leaves_frozen_parameters_as_they_are():
    model = small_model()
    model[0].requires_grad_(False)
    trained = finetune.run(model, make_task(model), epochs=1).model
    assert torch.equal(trained[0].weight, model[0].weight)
    assert not torch.equal(trained[5].weight, model[5].weight)


def test_run_says_where_the_loss_stopped_being_finite():
    model = small_model()
    task = make_task(model)
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
    model = small_model()
    with pytest.raises(InvalidInput, match=message):
        finetune.run(model, make_task(model), **arguments)


def test_run_refuses_a_model_without_anything_to_train():
    model = small_model().requires_grad_(False)
    with pytest.raises(InvalidInput, match=r"requires_grad_\(\)"):
        finetune.run(model, make_task(model), epochs=1)


def test_run_refuses_a_model_in_half_precision():
    model = small_model().half()
    with pytest.raises(InvalidInput, match=r"float32 or float64, got torch\.float16"):
        finetune.run(model, make_task(model), epochs=1)


def test_training_runs_on_the_device_that_was_asked_for_or_the_best_one():
    best = finetune.training_device("auto").type
    assert best == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    assert finetune.training_device("cpu").type == "cpu"
    for device, available in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not available:
            with pytest.raises(Unsupported, match=f"`device` is {device}"):
                finetune.run(small_model(), make_task(small_model()), epochs=1, device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_model_is_trained_on_the_gpu_and_given_back_on_the_cpu():
    seen = []

    class Watched(nn.Sequential):
        def forward(self, x):
            seen.append(x.device.type)
            return super().forward(x)

    model = Watched(*small_model())
    result = finetune.run(model, make_task(model), epochs=1)
    assert set(seen) == {"cuda"}
    assert {p.device.type for p in [*result.model.parameters(), *model.parameters()]} == {"cpu"}
