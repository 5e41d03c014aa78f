"""A recipe's `prune` section applied to a task: prune, fine-tune, and say what was reached."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shrinkkit.errors import InvalidInput
from shrinkkit.progress import Watch, unwatched
from shrinkkit.tasks.task import Task, batches
from shrinkkit.transforms import finetune, prune


@dataclass(frozen=True)
class Pruned:
    """A pruned and fine-tuned model, with what was asked and what was reached."""

    model: nn.Module
    ratio_asked: float
    ratio_reached: float
    kept_because: Mapping[str, str]
    """Why a layer kept all its channels, by layer."""
    validation_scores: tuple[float, ...]
    """Mean score on the validation split after each epoch."""


def prune_channels(
    task: Task,
    *,
    ratio: float,
    criterion: str,
    scope: str,
    skip: Sequence[str],
    layers: Mapping[str, float],
    round_to: int,
    steps: int,
    epochs: int,
    learning_rate: float,
    seed: int,
    watch: Watch = unwatched,
) -> Pruned:
    """Return the task's model with channels removed, fine-tuned after each of `steps` rounds.

    Arguments are those of `prune.channels` and `finetune.run`; `epochs` are spent after every round, and `watch`
    counts those of all rounds.

    Raises:
        InvalidInput: An argument is out of its range, or a pattern matches no layer.
        NothingToPrune: No layer could lose a channel.
    """
    scores: list[float] = []

    def train(model: nn.Module) -> nn.Module:
        before = len(scores)
        tuned = finetune.run(
            model,
            task,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            watch=lambda done, _, said: watch(before + done, epochs * steps, said),
        )
        scores.extend(tuned.scores)
        return tuned.model

    shared: dict[str, Any] = {
        "criterion": criterion,
        "scope": scope,
        "skip": skip,
        "layers": layers,
        "round_to": round_to,
        "seed": seed,
    }
    gradients = _loss_of(task) if criterion == "taylor" else None
    plan = prune.plan(task.model, task.example, ratio=ratio, gradients=gradients, **shared)
    model = prune.channels(
        task.model,
        task.example,
        ratio=ratio,
        steps=steps,
        after_step=train if epochs else None,
        gradients=gradients,
        **shared,
    )
    return Pruned(
        model,
        ratio_asked=ratio,
        ratio_reached=prune.channel_ratio(task.model, model, task.example, skip=skip),
        kept_because={layer.layer: layer.why for layer in plan if layer.why},
        validation_scores=tuple(scores),
    )


def prune_weights(
    task: Task,
    *,
    ratio: float,
    criterion: str,
    scope: str,
    skip: Sequence[str],
    layers: Mapping[str, float],
    biases: bool,
    epochs: int,
    learning_rate: float,
    seed: int,
    watch: Watch = unwatched,
) -> Pruned:
    """Return the task's model with weights set to zero, fine-tuned while the zeros are held.

    Arguments are those of `prune.weights` and `finetune.run`.

    Raises:
        InvalidInput: An argument is out of its range, or a pattern matches no layer.
        NothingToPrune: No layer has weights to prune.
    """
    masked = prune.weights(
        task.model, ratio=ratio, criterion=criterion, scope=scope, skip=skip, layers=layers, biases=biases, seed=seed
    )
    if not epochs:
        return Pruned(masked, ratio, prune.sparsity(masked), {}, ())
    tuned = finetune.run(
        masked, task, epochs=epochs, learning_rate=learning_rate, seed=seed, keep_zeros=True, watch=watch
    )
    return Pruned(tuned.model, ratio, prune.sparsity(tuned.model), {}, tuned.scores)


def prune_task(task: Task, *, method: str, **section: Any) -> Pruned:
    """Return the task's model pruned as a recipe's `prune` section says.

    A key that belongs to the other method must have its default, so that nothing that was asked for is passed over.

    Raises:
        InvalidInput: `method` is neither `channels` nor `weights`, or a key of the other method was changed.
    """
    methods: dict[str, tuple[Callable[..., Pruned], dict[str, Any]]] = {
        "channels": (prune_channels, {"biases": False}),
        "weights": (prune_weights, {"round_to": 8, "steps": 1}),
    }
    if method not in methods:
        raise InvalidInput(f"`method` must be 'channels' or 'weights', got {method!r}. For int8 see `quantize`.")
    act, foreign = methods[method]
    for key, default in foreign.items():
        if section.pop(key, default) != default:
            raise InvalidInput(f"`{key}` has no meaning for the method {method!r}. Leave it at {default!r}.")
    pruned = act(task, **section)
    if not section["epochs"]:
        section.get("watch", unwatched)(1, 1, "nothing was trained")
    return pruned


def _loss_of(task: Task) -> Callable[[nn.Module], torch.Tensor]:
    """Return a function from a model to its loss on the first training batches, for criteria that need gradients."""

    def loss(model: nn.Module) -> torch.Tensor:
        device = next(model.parameters()).device
        total = torch.zeros((), device=device)
        for number, (inputs, target) in enumerate(batches(task.train, task.example[0].shape[0])):
            if number == 16:
                break
            total = total + task.loss(model(*(x.to(device) for x in inputs)), _moved(target, device))
        return total

    return loss


def _moved(target: object, device: torch.device) -> object:
    return target.to(device) if isinstance(target, torch.Tensor) else target
