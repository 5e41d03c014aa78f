"""Fine-tuning: training a transformed model on, to restore its accuracy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Subset

from shrinkkit.core.stages import FineTune, settings_of
from shrinkkit.errors import InvalidInput, Unsupported
from shrinkkit.progress import Progress, no_progress
from shrinkkit.tasks import metrics
from shrinkkit.tasks.modules import Example, duplicate
from shrinkkit.tasks.task import Task, batches
from shrinkkit.transforms import batchnorm, prune
from shrinkkit.transforms.transform import Made

Loss = Callable[[nn.Module, Example, Any], Tensor]
"""(model, inputs, targets) of a batch, on the device of the model -> scalar tensor."""
LARGEST_GRADIENT = 1.0
"""The norm that gradients are clipped to."""


def run(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    device: str = "auto",
    keep_zeros: bool = True,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Made:
    """Return a copy of `model` trained on `task`'s training split, with its validation score after each epoch.

    `model` is left unchanged, and so is the state of the random generators. AdamW, the learning rate falling
    to zero along a cosine, gradients clipped to norm 1; the same seed on the same machine gives the same
    model. Parameters that require no gradients stay as they are. The statistics of BatchNorm layers are measured again
    before the first epoch and after each, whatever their momentum; see `batchnorm.reestimate`.

    Args:
        model: Model in float32 or float64, on any device.
        task: Where the data, the loss and the score come from; its own model is not used.
        epochs: Passes over the training split, at least 1.
        learning_rate: Of the first step, above 0.
        batch_size: Examples a step, at least 2. A last batch of a single example is left out of its epoch, because
            BatchNorm cannot train on one.
        device: Where to train: `cpu`, `cuda` or `mps`; `auto` takes the best device there is.
        keep_zeros: Keep weights that are exactly zero at zero, as `prune.weights` made them.
        seed: Of the order of the examples and of dropout.
        progress: Called after each batch and each epoch with the epochs done, `epochs`, and the epoch or its mean
            validation score in words.

    Returns:
        The model, on the CPU and in eval mode, and the mean validation score after each epoch.

    Raises:
        InvalidInput: An argument is out of its range, no parameter can be trained, or the loss stops being finite.
        Unsupported: There is no such device here.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """
    given = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "device": device}
    return apply(model, task, settings_of(FineTune, **given, keep_zeros=keep_zeros), seed=seed, progress=progress)


def apply(model: nn.Module, task: Task, settings: FineTune, *, seed: int = 0, progress: Progress = no_progress) -> Made:
    """Apply the transform `fine-tune`; see `run`."""

    def loss(trained: nn.Module, inputs: Example, target: Any) -> Tensor:
        return task.loss(trained(*inputs), target)  # type: ignore[no-any-return]

    return train(model, task, settings, loss, task.train, seed=seed, progress=progress)


@torch.inference_mode(False)
def train(
    model: nn.Module,
    task: Task,
    settings: FineTune,
    loss_of: Loss,
    dataset: Any,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Made:
    """Return a copy of `model` trained on `dataset`, a map-style one, to minimise `loss_of`; else see `run`."""
    _check_trainable(model)
    device = training_device(settings.device)
    result = duplicate(model).to(device).eval()
    batchnorm.reestimate(result, task, batch_size=settings.batch_size, seed=seed)
    zeros = prune.masks(result) if settings.keep_zeros else {}
    epochs, batch_size = settings.epochs, settings.batch_size
    optimizer = torch.optim.AdamW([p for p in result.parameters() if p.requires_grad], lr=settings.learning_rate)
    size = len(dataset)
    per_epoch = -(-size // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    scores: list[float] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            result.train()
            order = torch.randperm(size, generator=generator).tolist()
            if size % batch_size == 1 and size > 1:
                order.pop()
            for number, batch in enumerate(batches(Subset(dataset, order), batch_size), start=1):
                inputs, target = _moved(batch, device)
                loss = loss_of(result, inputs, target)
                if not torch.isfinite(loss).all():
                    text = f"The loss must stay finite, got {loss.detach().tolist()} in epoch {epoch}, batch {number}."
                    raise InvalidInput(f"{text} Lower `learning_rate`, which is {settings.learning_rate:g}.")
                _step(result, loss, optimizer, zeros)
                schedule.step()
                # The validation at the end of an epoch counts as one more batch.
                progress(epoch - 1 + number / (per_epoch + 1), epochs, f"epoch {epoch} of {epochs}")
            result.eval()
            batchnorm.reestimate(result, task, batch_size=batch_size, seed=seed)
            scores.append(_validated(result, task, batch_size, device))
            progress(epoch, epochs, f"epoch {epoch} of {epochs}, validation {task.metric} {scores[-1]:.4g}")
    result.zero_grad(set_to_none=True)
    return Made(result.cpu(), (f"{epochs} epochs on {device.type}",), validation_scores=tuple(scores))


def training_device(name: str) -> torch.device:
    """Return the device called `name`, or for `auto` the best one there is; raises Unsupported if it is not here."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    best = next(device for device, available in there.items() if available) if name == "auto" else name
    if not there[best]:
        raise Unsupported(f"`device` is {name}, which this machine does not have. Use auto or cpu.")
    return torch.device(best)


def _check_trainable(model: nn.Module) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InvalidInput("`model` must have a parameter that requires gradients. Call `model.requires_grad_()`.")
    if coarse := ", ".join(sorted({str(p.dtype) for p in trained} - {"torch.float32", "torch.float64"})):
        raise InvalidInput(f"`model` must be in float32 or float64, got {coarse}. Fine-tune before you lower it.")


def _moved(values: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)


def _step(model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, zeros: dict[str, Tensor]) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    with torch.no_grad():
        for name, kept in zeros.items():
            # Masked after the step and not the gradient: weight decay and momentum move weights without one.
            model.get_parameter(name).mul_(kept)


def _validated(model: nn.Module, task: Task, batch_size: int, device: torch.device) -> float:
    cpu, pairs, scores = torch.device("cpu"), [], []
    with torch.no_grad():
        for inputs, target in batches(task.validation, batch_size):
            output = model(*_moved(inputs, device))
            if task.score.per_example:
                scores.append(task.score(output, _moved(target, device)).double().cpu())
            else:
                pairs.append((_moved(output, cpu), target))
    return float(torch.cat(scores).mean()) if scores else float(task.score.of_set(*metrics.whole(pairs)))
