"""One stage of a recipe applied to a model, and checked: no transform is taken at its word."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shrinkkit.core.stages import Stage
from shrinkkit.core.variant import History
from shrinkkit.errors import NothingChanged, Unsupported
from shrinkkit.progress import Progress, no_progress
from shrinkkit.tasks import modules, outputs
from shrinkkit.tasks.modules import FORWARD_ERRORS
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import batchnorm


@dataclass(frozen=True, eq=False)
class Made:
    """What a transform returns: the new model, and what a reader of the report should know."""

    model: nn.Module
    """In eval mode, on the CPU."""
    notes: tuple[str, ...] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)
    """Why a layer that could have been changed was left as it was, by layer."""
    validation_scores: tuple[float, ...] = ()
    """Mean score on the validation split after each epoch of training."""
    computes_the_same: bool = False
    """Whether outputs are those of the model before, so that statistics of BatchNorm layers stay as they are."""


@torch.inference_mode(False)
def apply_stage(
    model: nn.Module,
    task: Task,
    stage: Stage,
    *,
    history: History = History(),  # noqa: B008
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[nn.Module, History]:
    """Return what a stage makes of `model`, and its history, which `history` becomes with this stage.

    Statistics of BatchNorm layers are those of the new model, unless it computes the same; see `batchnorm.reestimate`.
    `model` is a float model in eval mode on the CPU, and left unchanged; the transform may use the data, loss and score
    of `task`.

    Raises:
        NothingChanged: The transform returned the model as it was.
        Unsupported: What it returned does not run on the task's example, or gives outputs of another shape.
    """
    before = [_digests(one) for one in (model, task.model)]
    made: Made = stage.transform.function()(model, task, stage.settings, seed=seed, progress=progress)
    result = made.model.eval().cpu()
    if [_digests(one) for one in (model, task.model)] != before:
        text = "must leave the model it is given, and the task's own, unchanged. Copy it first."
        raise Unsupported(f"The transform `{stage.name}` {text}")
    if unchanged(model, result):
        raise NothingChanged(f"The stage `{stage.name}` left the model as it was. Change its settings, or drop it.")
    _check_outputs(model, result, task, stage.name)
    notes = [*made.notes, "" if made.computes_the_same else batchnorm.reestimate(result, task, seed=seed)]
    names = {name for name, _ in result.named_modules()}
    return result, replace(
        history,
        stages=(*history.stages, stage.to_dict()),
        notes=(*history.notes, *(f"{stage.name}: {note}" for note in notes if note)),
        left_alone={name: why for name, why in {**history.left_alone, **made.left_alone}.items() if name in names},
        validation_scores=(*history.validation_scores, *made.validation_scores),
    )


def _digests(model: nn.Module) -> dict[str, tuple[bytes, bool]]:
    """Return what a transform must not change: the values of each tensor, and whether it is trained."""
    # Hashes and no copies: a model may fill half of the memory.
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    tensors = model.state_dict().items()
    return {name: (hashlib.sha256(modules.raw_bytes(t)).digest(), name in trained) for name, t in tensors}


def unchanged(before: nn.Module, after: nn.Module) -> bool:
    """Return whether two models have the same layers with the same weights."""
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (before, after)]
    old, new = before.state_dict(), after.state_dict()
    return kinds[0] == kinds[1] and old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def _check_outputs(before: nn.Module, after: nn.Module, task: Task, name: str) -> None:
    example = pytree.tree_map(lambda x: x.cpu(), task.example)
    try:
        with torch.inference_mode():
            shapes: list[Any] = [[t.shape for t in outputs.tensors(model(*example))] for model in (before, after)]
    except FORWARD_ERRORS as error:
        raise Unsupported(f"After `{name}` the model no longer runs: {type(error).__name__}: {error}") from error
    if shapes[0] != shapes[1]:
        raise Unsupported(f"After `{name}` the outputs have the shapes {shapes[1]}; they must have {shapes[0]}.")
