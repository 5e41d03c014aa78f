"""The float model as ONNX, whose names lead back to the layers, and ONNX files written without holding them twice."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shrinkkit import quiet
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes.base import BuildRequest, BuiltFile, Loaded, prove
from shrinkkit.runtimes.onnx import store
from shrinkkit.runtimes.torch.export import FAILURES, export
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example

TOLERANCE = 1e-3
"""Largest error of a float32 file, relative to the largest output; see `base.max_relative_error`."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes the modules that a node comes from."""


@dataclass(frozen=True)
class Export:
    """The float model as ONNX."""

    path: Path
    beside: tuple[Path, ...]
    """Files that `path` refers to."""
    note: str
    """Its limitations ('' if none)."""


def source(request: BuildRequest) -> Export:
    """Return the float model of a request as ONNX; it is exported once for all runtimes.

    It lies in the variant's folder if it is what is delivered, and otherwise in the scratch folder.
    """
    if "onnx" not in request.shared:
        request.announce("export to ONNX")
        path = (request.scratch if request.precision else request.folder) / "model.onnx"
        request.shared["onnx"] = write(request.model, request.example, path)
    exported: Export = request.shared["onnx"]
    return exported


def build_float32(request: BuildRequest, load: Callable[..., Loaded]) -> BuiltFile:
    """Return the float32 file of a request, verified by the runtime whose function `load` is."""
    exported = source(request)
    options: dict[str, Any] = {"expected": request.outputs_of(request.model), "notes": [exported.note]}
    return prove(request, load, exported.path, format="onnx", tolerance=TOLERANCE, beside=exported.beside, **options)


def write(model: nn.Module, example: Example, path: Path) -> Export:
    """Write `model`, in eval mode on the CPU, to `path` as FP32 ONNX whose weights carry the names of their layers.

    `example` are the positional inputs of one call, batch first. Raises Unsupported if torch cannot export the model.
    """
    try:
        with torch.inference_mode():
            names = outputs.names(model(*example))
        program, note = export(model, example)
        with quiet.libraries():
            onnx = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False)
        assert onnx is not None
    except (*FAILURES, torch.onnx.OnnxExporterError) as error:
        cause: BaseException = error
        while isinstance(cause, torch.onnx.OnnxExporterError) and cause.__cause__:
            # Its own message says only in which of its phases it stopped.
            cause = cause.__cause__
        raise Unsupported(f"torch cannot export this model to ONNX: {brief(cause)}. Use the torch runtime.") from error
    graph = onnx.model.graph
    name_weights(graph, frozenset(program.state_dict))
    name_nodes(graph)
    name_outputs(graph, names)
    forget_source(graph)
    return Export(path, store.write(onnx.model, path), note)


def name_weights(graph: Any, known: frozenset[str]) -> None:
    """Rename values like `val_12` after the layer that multiplies with them, in place.

    A weight that still has its name in the state dict, `known`, keeps it. The matrices of a recurrent layer are put
    together in the graph, and a tied weight is transposed there; ONNX Runtime folds that, and then they are weights of
    the name that they have here.
    """
    taken = {value.name for value in graph.initializers.values()}
    for node in graph:
        recurrent = node.op_type in {"LSTM", "GRU", "RNN"}
        if not recurrent and node.op_type not in {"Conv", "ConvTranspose", "MatMul", "Gemm"}:
            continue
        layer = _layer(node)
        for position, value in enumerate(node.inputs):
            if not layer or value is None or value.name in known:
                continue
            stored = value.name in graph.initializers
            producer = value.producer()
            transposed = producer and producer.op_type == "Transpose" and producer.inputs[0].is_initializer()
            if recurrent:
                suffix = {1: "weight_ih", 2: "weight_hh", 3: "bias"}.get(position)
            else:
                suffix = "weight" if transposed or (stored and len(value.shape or ()) >= 2) else None
            if suffix is None:
                continue
            name = f"{layer}.{suffix}"
            name = name if name not in taken else f"{name}_{position}_{node.name}"
            taken.add(name)
            if stored:
                del graph.initializers[value.name]
            value.name = name
            if stored:
                graph.initializers[name] = value


def name_nodes(graph: Any) -> None:
    """Name each node `layer/operator`, in place, which runtimes keep through what they make of a graph.

    What runs in the model itself is named by its operator alone; a number tells nodes of one name apart. The layer is
    that of the weights, which BatchNorm may have been folded into, else the innermost module.
    """
    taken: Counter[str] = Counter()
    for node in graph:
        named = [value.name for value in node.inputs if value is not None and value.name in graph.initializers]
        weights = [name for name in named if ".weight" in name]
        layer = weights[0].rpartition(".weight")[0] if weights else _layer(node)
        name = "/".join(filter(None, (layer, node.op_type)))
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"


def name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Name the outputs of the graph as the model does, in place, unless that would be ambiguous."""
    taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    taken |= set(graph.initializers)
    if len(names) == len(graph.outputs) == len(set(names)) and not taken & set(names):
        for value, name in zip(graph.outputs, names, strict=True):
            value.name = name


def forget_source(graph: Any) -> None:
    """Drop what the exporter notes of where the model came from, in place: its code, with the paths of that machine.

    The scopes of nodes stay, because profiles are reported by layer.
    """
    graph.metadata_props.clear()
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    for node in graph:
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[SCOPES] = scopes
        for value in node.outputs:
            value.metadata_props.clear()


def _layer(node: Any) -> str:
    """Return the name of the module that `node` was exported from, '' for the model itself."""
    scopes = node.metadata_props.get(SCOPES, "[]")
    names = json.loads(scopes.replace("'", '"'))[:-1]
    return str(names[-1]) if names else ""
