"""torch files brought to run. What a file needs to run as it was measured, its quantized engine, is stated in it."""

import copy
import zipfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from shrinkkit import quiet
from shrinkkit.errors import ModelFileError, brief
from shrinkkit.runtimes.base import REMEDY, Loaded
from shrinkkit.runtimes.torch import quantize
from shrinkkit.runtimes.torch.spec import engine
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example

_DAMAGED = (RuntimeError, ValueError, TypeError, AttributeError, OSError, KeyError, AssertionError, zipfile.BadZipFile)


def load(path: Path, *, device: str, threads: int, like: Any) -> Loaded:
    """Return a `.pt2` or `.torchscript.pt` file, ready to be run operator by operator."""
    return _loaded(read(path, device=device), path, device, like)


def read(path: Path, *, device: str = "cpu") -> Any:
    """Return the torch module in a scanned `.pt2` or `.torchscript.pt` file, packed for the engine that it names.

    Raises ModelFileError if it is damaged.
    """
    try:
        with quiet.libraries():
            if path.suffix == ".pt2":
                # Programs of int8 layers name operators that torch registers here.
                import_module("torch.ao.quantization.fx._decomposed")
                program = torch.export.load(path)
                return (move_to_device_pass(program, device) if device != "cpu" else program).module()
            with quantize.using_engine(engine(path)):
                # Packed weights are repacked for the engine in force when the file is read.
                script = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return script.to(device).eval()
    except _DAMAGED as error:
        text = f"{path.name} cannot be loaded: {brief(error)}. It is damaged or was made by another version of torch."
        raise ModelFileError(f"{text} {REMEDY}") from error


def to_cpu(output: Any, like: Any) -> Any:
    """Return an output on the CPU, in the structure of `like` if that is given."""
    moved = outputs.convert(output, lambda t: t.cpu())
    return moved if like is None else outputs.restore(outputs.tensors(moved), like)


def input_names(module: Any) -> tuple[str, ...]:
    """Return the names of the inputs of a module that `read` returned."""
    if isinstance(module, torch.jit.ScriptModule):
        return tuple(a.name for a in module._c._get_method("forward").schema.arguments[1:])
    return tuple(n.name for n in module.graph.nodes if n.op == "placeholder")


def _loaded(module: Any, path: Path, device: str, like: Any) -> Loaded:
    scripted = isinstance(module, torch.jit.ScriptModule)
    packed = partial(quantize.using_engine, engine(path))
    # Copies of int8 weights are packed again, for the engine in force.
    with quiet.libraries(), packed():
        ready = torch.jit.freeze(module) if scripted else module

    def bind(inputs: Example) -> Callable[[], Any]:
        placed = tuple(x.to(device) for x in inputs)

        @torch.inference_mode()
        def call() -> Any:
            return ready(*placed)

        return call

    def clone() -> Loaded:
        with quiet.libraries(), packed():
            return _loaded(copy.deepcopy(module), path, device, like)

    form = "torchscript" if scripted else "graph"
    return Loaded(path, "torch", device, bind, partial(to_cpu, like=like), clone, form, module, input_names(module))
