"""Distillation: training a transformed model to give the outputs of the original one."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shrinkkit.core.stages import Distil
from shrinkkit.errors import InvalidInput
from shrinkkit.progress import Progress, no_progress
from shrinkkit.tasks import copies, data, fidelity, modules, outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task, kinds_of
from shrinkkit.transforms import finetune
from shrinkkit.transforms.transform import Made


def apply(model: nn.Module, task: Task, settings: Distil, *, seed: int = 0, progress: Progress = no_progress) -> Made:
    """Apply the transform `distil`: the loop of `finetune.run`, with the outputs of `task.model` as targets.

    Raises InvalidInput if no output is a float, besides the errors of `finetune.run`.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531; features as in Romero et al., "FitNets", ICLR 2015.
    """
    kinds = kinds_of(task.model, task.train, class_names=task.class_names)
    if not any(kinds):
        raise InvalidInput("`distil` must have an output of floats to learn from, and the model has none. Fine-tune.")
    distance = fidelity.distillation(kinds, temperature=settings.temperature)
    device = finetune.training_device(settings.device)
    teacher = copies.shallow_copy(task.model, device=str(device)).eval()
    names = _comparable(model, task) if settings.features else ()

    def loss(student: nn.Module, inputs: Example, target: Any) -> Tensor:
        with torch.no_grad(), _recorded(teacher, names) as wanted:
            original = teacher(*inputs)
        with _recorded(student, names) as found:
            output = student(*inputs)
        total: Tensor = (1 - settings.labels) * distance(output, original)
        if settings.labels:
            total = total + settings.labels * task.loss(output, target)
        pairs = [pair for name in names for pair in zip(found[name], wanted[name], strict=True)]
        if pairs:
            parts = [fidelity.relative_square(y, original) for y, original in pairs]
            total = total + settings.features * torch.stack(parts).mean()
        return total

    # Targets of an unlabelled task are outputs of the original, which the teacher computes anyway.
    dataset = task.train if settings.labels else data.without_outputs(task.train)
    made = finetune.train(model, task, settings, loss, dataset, seed=seed, progress=progress)
    inside = f", and of {len(names)} layers inside" if names else ""
    return Made(made.model, (f"{made.notes[0]} from outputs of the original{inside}",), {}, made.validation_scores)


def _comparable(model: nn.Module, task: Task) -> tuple[str, ...]:
    """Return the names of the modules with parameters whose outputs have the same shapes in the original model."""
    original, example = dict(task.model.named_modules()), tuple(x.cpu() for x in task.example)
    names = [n for n, m in model.named_modules() if n in original and n and next(m.parameters(), None) is not None]
    shapes = []
    for one in (task.model, model):
        with torch.no_grad(), modules.plain_attention(), _recorded(one, names) as calls:
            one(*example)
        shapes.append({name: [t.shape for t in calls[name]] for name in names})
    return tuple(name for name in names if shapes[0][name] and shapes[0][name] == shapes[1][name])


@contextlib.contextmanager
def _recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Give what the modules `names` of `model` return, floats only, by name, while the block runs."""
    calls: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, module: nn.Module, given: Any, returned: Any) -> None:
        calls[name] += [t for t in outputs.tensors(returned) if t.is_floating_point()]

    with modules.hooked(model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names):
        yield calls
