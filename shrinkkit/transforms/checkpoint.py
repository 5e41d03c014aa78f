"""A transformed model on disk, without pickle: its weights, and in what its layers differ from the task's own model."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from shrinkkit.core import store
from shrinkkit.core.run_folder import STRUCTURE
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.core.variant import History
from shrinkkit.errors import InvalidInput, ModelFileError, Unsupported
from shrinkkit.runtimes import base
from shrinkkit.tasks import modules, outputs
from shrinkkit.tasks.modules import FORWARD_ERRORS
from shrinkkit.tasks.task import Task

WEIGHTS = "weights.safetensors"
_NUMBER = (bool, int, float)


@dataclass(frozen=True)
class Layer:
    """A module that the task's model does not have, or has otherwise."""

    kind: str = ""
    """A class of `torch.nn`, for a module that is new or of another type; empty for one whose attributes differ."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the class."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Numbers and tuples of numbers that differ from those of the task's module or of a fresh one."""
    children: tuple[str, ...] | None = None
    """Names of all modules in it, in order, where they differ; None where they do not."""
    same_as: str = ""
    """The name of the module that is used here again; empty for a module used once."""


@dataclass(frozen=True)
class Checkpoint:
    """The record of a transformed model."""

    task: str
    history: History
    weights_sha256: str
    layers: dict[str, Layer]
    """By name, a module before those in it."""
    schema_version: int = SCHEMA_VERSION


def save(folder: Path, task: Task, model: nn.Module, history: History) -> None:
    """Write `model`, on the CPU, in a form that `load` turns into the same model, proven by its weights and outputs.

    It is a transformed copy of the task's own, against which it is described. Raises Unsupported if a new layer is not
    of `torch.nn`, or the model cannot be rebuilt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / WEIGHTS))
    layers = _described(task.model, model)
    store.write(folder / STRUCTURE, Checkpoint(task.name, history, store.sha256(folder / WEIGHTS), layers))
    try:
        rebuilt, _ = load(task, folder)
        problem = _difference(model, rebuilt, task)
    except (ModelFileError, *FORWARD_ERRORS) as error:
        problem = str(error)
    if problem:
        (folder / STRUCTURE).unlink()
        raise Unsupported(
            f"The model cannot be kept without pickle: rebuilt, it is not the same ({problem}). A transform may change "
            "numbers of existing layers, and add modules of `torch.nn` that their constructor arguments describe."
        )


def load(task: Task, folder: Path) -> tuple[nn.Module, History]:
    """Return the float model in `folder`, rebuilt on the CPU from a copy of the task's own model, and its history.

    Raises ModelFileError if the folder holds no such model, or it does not fit the task's.
    """
    if not (folder / STRUCTURE).is_file():
        raise ModelFileError(f"{folder} must hold {STRUCTURE} and {WEIGHTS} of a transformed model. Run its step.")
    # Every weight comes from the file.
    empty = {id(p): nn.Parameter(p.new_empty(0), p.requires_grad) for p in task.model.parameters()}
    model = modules.copied(task.model, empty).cpu()
    try:
        record = store.read(folder / STRUCTURE, Checkpoint)
        if store.sha256(folder / WEIGHTS) != record.weights_sha256:
            raise ValueError(f"{WEIGHTS} is not the file that {STRUCTURE} describes")
        for name, layer in record.layers.items():
            _rebuild(model, name, layer)
        _resize(model, load_file(folder / WEIGHTS))
        load_model(model, folder / WEIGHTS)
    except (KeyError, AttributeError, RuntimeError, OSError, ValueError, TypeError, InvalidInput) as error:
        text = f"{folder} does not fit the model of the task {task.name!r}: {error}."
        raise ModelFileError(f"{text} Run the step that makes it again.") from error
    return model.eval(), record.history


def _described(before: nn.Module, after: nn.Module) -> dict[str, Layer]:
    """Return the modules of `after` that `before` does not have, or has otherwise."""
    old = dict(before.named_modules(remove_duplicate=False))
    first_old = {id(module): name for name, module in before.named_modules()}
    first_new = {id(module): name for name, module in after.named_modules()}
    layers: dict[str, Layer] = {}
    fresh: dict[str, nn.Module] = {}
    known: nn.Module | None
    for name, module in after.named_modules(remove_duplicate=False):
        first = first_new[id(module)]
        known = old.get(name) if name not in fresh else fresh[name]
        if first != name:
            replaced = first in fresh or (first in layers and layers[first].kind)
            if known is None or first_old.get(id(known)) != first or replaced:
                layers[name] = Layer(same_as=first)
            continue
        arguments: dict[str, Any] | None = None
        if known is None or _form(known) != _form(module):
            arguments = _arguments(name, module)
            known = _constructed(type(module).__name__, arguments)
            # What the constructor makes inside is what the modules inside are compared with.
            fresh |= {f"{name}.{inner}": m for inner, m in known.named_modules() if inner}
        changed = {key: value for key, value in _numbers(module).items() if _numbers(known).get(key) != value}
        children = tuple(module._modules)
        inside = None if children == tuple(known._modules) else children
        if arguments is not None or changed or inside is not None:
            kind = "" if arguments is None else type(module).__name__
            layers[name] = Layer(kind, arguments or {}, changed, inside)
    return layers


def _form(module: nn.Module) -> tuple[Any, ...]:
    """Return what setting numbers cannot change: the type, which parameters there are, and options in words."""
    held = {name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    return type(module), held, {key: value for key, value in vars(module).items() if isinstance(value, str)}


def _arguments(name: str, module: nn.Module) -> dict[str, Any]:
    """Return the arguments that construct a module like `module`, read off its attributes."""
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind:
        text = f"The layer `{name}` is a {kind.__module__}.{kind.__qualname__}, which cannot be kept without pickle."
        raise Unsupported(f"{text} A transform may only add modules of `torch.nn`.")
    arguments: dict[str, Any] = {}
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        if key in ("self", "device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, key, None)
        if key == "bias" and hasattr(module, key) and not isinstance(value, bool):
            value = value is not None
        if isinstance(value, (str, *_NUMBER, tuple, list)):
            arguments[key] = list(value) if isinstance(value, tuple) else value
    return arguments


def _constructed(kind: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Return a module of a class of `torch.nn`, its weights not initialized; ValueError if there is no such class."""
    cls = getattr(nn, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"torch.nn has no module {kind!r}")
    with torch.device("meta"):
        module: nn.Module = cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    return module.to_empty(device="cpu")


def _rebuild(model: nn.Module, name: str, layer: Layer) -> None:
    """Change the module `name` of `model`, in place, into what `layer` describes."""
    owner, _, attribute = name.rpartition(".")
    parent = model.get_submodule(owner)
    if layer.same_as:
        setattr(parent, attribute, model.get_submodule(layer.same_as))
        return
    if layer.kind:
        setattr(parent, attribute, _constructed(layer.kind, layer.arguments))
    module = model.get_submodule(name)
    for key, value in layer.attributes.items():
        old = getattr(module, key)
        setattr(module, key, tuple(value) if isinstance(old, tuple) else value)
    if layer.children is not None:
        # In this order; what is new is put in place by its own entry, which follows.
        inside = {child: module._modules.get(child, nn.Identity()) for child in layer.children}
        module._modules.clear()
        module._modules.update(inside)


def _resize(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Give each parameter and buffer the shape and dtype of its saved tensor; tied parameters stay tied."""
    resized: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            new = saved.get(f"{prefix}.{name}" if prefix else name)
            if new is None or (new.shape == tensor.shape and new.dtype == tensor.dtype):
                continue
            if not isinstance(tensor, nn.Parameter):
                setattr(module, name, torch.empty_like(new))
            elif id(tensor) not in resized:
                resized[id(tensor)] = nn.Parameter(torch.empty_like(new), tensor.requires_grad)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in resized:
                setattr(module, name, resized[id(parameter)])


def _difference(model: nn.Module, rebuilt: nn.Module, task: Task) -> str:
    """Return in what a rebuilt model differs from the one that was kept, '' if in nothing."""
    old, new = model.state_dict(), rebuilt.state_dict()
    if old.keys() != new.keys():
        return f"the weights {sorted(old.keys() ^ new.keys())[:4]}"
    if changed := [name for name in old if old[name].dtype != new[name].dtype or not torch.equal(old[name], new[name])]:
        return f"the weights {changed[:4]}"
    example = tuple(x.cpu() for x in task.example)
    with torch.inference_mode():
        results = [outputs.tensors(one.eval()(*example)) for one in (model, rebuilt)]
    # Weights that lie otherwise in memory are summed up in another order.
    return "" if base.max_relative_error(*results) <= base.TOLERANCE else "its outputs"


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of `module` that are numbers, or tuples or lists of numbers."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(module).items()
        if (isinstance(value, _NUMBER) and key != "training")
        or (isinstance(value, (tuple, list)) and value and all(isinstance(v, _NUMBER) for v in value))
    }
