"""A whole recipe applied in memory. For variants on disk see `variants`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from shrinkkit.core.recipe import Recipe
from shrinkkit.core.studies import read_recipe
from shrinkkit.core.variant import Audit, History, audit_table
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown
from shrinkkit.runtimes import layers
from shrinkkit.runtimes.base import BuildRequest
from shrinkkit.runtimes.torch import build
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import transform, variants


@dataclass(frozen=True, eq=False, repr=False)
class Compressed(Rich):
    """A compressed model in memory, with its layer report."""

    model: nn.Module
    audit: Audit
    """What changed in each layer, read from the model."""
    notes: tuple[str, ...]
    validation_scores: tuple[float, ...]
    """Mean score on the validation split after each epoch of training."""

    def shown(self) -> Shown:
        """Return the layer report."""
        return audit_table(self.audit)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model."""
        return {"audit": self.audit.to_dict(), "notes": [*self.notes], "validation_scores": [*self.validation_scores]}


def compress(task: Task, recipe: Recipe | str | os.PathLike[str], *, seed: int = 0) -> Compressed:
    """Apply a recipe to a task's model in memory, with torch's own kernels; no file is written.

    To benchmark files on several runtimes and get a report, see `run`.

    Args:
        task: Task whose model is compressed, on the CPU; it is left unchanged. Its data is used for training and
            calibration.
        recipe: A recipe, the path of its YAML file, or the name of a built-in one, such as `static-int8`.
        seed: Of everything random, in [0, 2**32).

    Returns:
        The compressed model in eval mode on the CPU, its layer report, notes of the stages, and the mean validation
        score after each epoch of training.

    Raises:
        InvalidInput: There is no such recipe, it breaks a rule, or a layer pattern matches no layer.
        NothingChanged: A stage left the model as it was.
        NothingToPrune: No layer can be pruned.
        Unsupported: torch does not support the precision for this model, or a stage broke the model.
    """
    chosen = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    model, history = task.model, History()
    for stage in chosen.stages:
        model, history = transform.apply_stage(model, task, stage, history=history, seed=seed)
    settings = chosen.precision.settings
    method, skip = chosen.precision.name.replace("float32", ""), getattr(settings, "skip", ())
    data = variants.calibration(task, getattr(settings, "calibration_examples", 0))
    request = BuildRequest(Path(), Path(), model, task.example, method, skip, data)
    lowered, precisions = build.lower(request)
    rows = layers.compare(task.model, model, {"torch": precisions}, history.left_alone)
    return Compressed(lowered, Audit(rows), history.notes, history.validation_scores)
