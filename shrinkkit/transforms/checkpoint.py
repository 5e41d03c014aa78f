"""A pruned model on disk, without pickle: its weights, and the attributes in which its layers differ."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from shrinkkit.core import store
from shrinkkit.errors import ModelFileError
from shrinkkit.tasks.task import Task

WEIGHTS, STRUCTURE = "weights.safetensors", "structure.json"


def save(folder: Path, before: nn.Module, after: nn.Module) -> None:
    """Write what `rebuild` needs to turn `before` into `after`: weights, and layer attributes that differ."""
    old = dict(before.named_modules())
    structure = {
        name: changed
        for name, module in after.named_modules()
        if (changed := {k: v for k, v in _plain(module).items() if _plain(old[name]).get(k) != v})
    }
    save_model(after, str(folder / WEIGHTS))
    store.write_text(folder / STRUCTURE, json.dumps(structure, indent=1) + "\n")


def rebuild(task: Task, folder: Path) -> nn.Module:
    """Return the float model that was saved in `folder`, rebuilt from a copy of the task's own model on the CPU.

    Raises:
        ModelFileError: The folder holds no such model, or it does not fit the task's.
    """
    if not (folder / STRUCTURE).is_file():
        raise ModelFileError(
            f"{folder} must hold a pruned variant, with {STRUCTURE} and {WEIGHTS}. Run its prune step."
        )
    model = copy.deepcopy(task.model).cpu()
    modules = dict(model.named_modules())
    try:
        for name, attributes in json.loads((folder / STRUCTURE).read_text()).items():
            for key, value in attributes.items():
                old = getattr(modules[name], key)
                setattr(modules[name], key, tuple(value) if isinstance(old, tuple) else value)
        _resize(model, load_file(folder / WEIGHTS))
        load_model(model, folder / WEIGHTS)
    except (KeyError, AttributeError, RuntimeError, OSError, ValueError) as error:
        raise ModelFileError(
            f"{folder} does not fit the model of the task {task.name!r}: {error}. Prune again; the task has changed."
        ) from error
    return model.eval()


def _resize(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Give each parameter and buffer the shape of its saved tensor; tied parameters stay tied."""
    resized: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            tensor = saved.get(f"{prefix}.{name}" if prefix else name)
            if id(parameter) not in resized and tensor is not None and tensor.shape != parameter.shape:
                resized[id(parameter)] = nn.Parameter(torch.empty_like(tensor), parameter.requires_grad)
        for name, buffer in list(module.named_buffers(recurse=False)):
            tensor = saved.get(f"{prefix}.{name}" if prefix else name)
            if tensor is not None and tensor.shape != buffer.shape:
                setattr(module, name, torch.empty_like(tensor))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in resized:
                setattr(module, name, resized[id(parameter)])


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of `module` that are numbers, or tuples or lists of numbers."""
    number = (bool, int, float)
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(module).items()
        if isinstance(value, number)
        or (isinstance(value, (tuple, list)) and value and all(isinstance(v, number) for v in value))
    }
