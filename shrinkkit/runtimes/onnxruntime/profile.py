"""The graph that ONNX Runtime runs: layers that it computes in integers, and time by layer.

Source: ONNX Runtime, "Profiling Tools".
"""

import json
import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

from shrinkkit.core import processes
from shrinkkit.core.variant import LayerPrecision
from shrinkkit.runtimes.base import BuildRequest, Calls, Repeats, count_denormals
from shrinkkit.runtimes.layers import CONVERSIONS, no_recurrent, precisions, tied
from shrinkkit.runtimes.onnx.export import SCOPES
from shrinkkit.runtimes.onnxruntime import load
from shrinkkit.runtimes.torch.export import NOWHERE
from shrinkkit.tasks import copies
from shrinkkit.tasks.modules import Example

INT8_OPERATORS = frozenset(
    "QLinearConv ConvInteger MatMulInteger MatMulIntegerToFloat QLinearMatMul QGemm DynamicQuantizeMatMul "
    "DynamicQuantizeLSTM QAttention".split()
)
"""Operators with which ONNX Runtime computes in integers; a weight that is dequantized before use is not among them."""


def int8_layers(path: Path, request: BuildRequest) -> dict[str, LayerPrecision]:
    """Return how ONNX Runtime runs each layer of the model of `request`, by the weights that it has as integers."""
    weights, same = int8_weights(path), tied(request.model)

    def runs_as(name: str) -> str:
        # A bidirectional or stacked LSTM is several operators.
        return "int8" if any(w.startswith(f"{layer}.") for layer in same[name] for w in weights) else ""

    return precisions(request, "ONNX Runtime", runs_as, reason=no_recurrent("ONNX Runtime", nn.GRU))


@copies.freeing_large_blocks()
def int8_weights(path: Path) -> frozenset[str]:
    """Return the names of the weights that ONNX Runtime multiplies or looks up as integers, off the graph that it runs.

    Names are those of the file, without what the quantizer appended: `stem.0.weight`.
    """
    entries = {
        # The content of weights does not matter here, and they would be packed again and written whole.
        "session.disable_prepacking": "1",
        "session.optimized_model_external_initializers_file_name": "weights",
    }
    with processes.short_folder() as folder:
        optimized = str(folder / "optimized.onnx")
        options = load.configured({"session_config_entries": entries, "optimized_model_filepath": optimized})
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(optimized, load_external_data=False).graph
    stored = {i.name for i in graph.initializer if i.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)}
    return frozenset(
        name.removesuffix("_quantized")
        for node in graph.node
        if node.op_type in {*INT8_OPERATORS, "Gather"}
        for name in node.input
        if name in stored and name.endswith("_quantized")
    )


def denormals(path: Path, inputs: Example | None) -> int:
    """Return the denormals in the float weights of an ONNX file."""
    arrays = (onnx.numpy_helper.to_array(weight) for weight in onnx.load(str(path)).graph.initializer)
    return count_denormals(torch.from_numpy(array.copy()) for array in arrays if array.dtype.kind == "f")


def layers(path: Path, inputs: Example, *, device: str, threads: int, repeats: Repeats) -> Calls:
    """Return layer, operator and ms of each node of each call on the CPU, by ONNX Runtime's profile."""
    options = load.options(path, threads)
    options.enable_profiling = True
    with processes.short_folder() as folder:
        options.profile_file_prefix = str(folder / "profile")
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {i.name: x.contiguous().numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
        number = repeats(lambda: session.run(None, feed))
        for _ in range(number):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        names = _layers_of(onnx.load(str(path)).graph, onnx.load(options.optimized_model_filepath).graph)
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")[-number:]
    times = [
        (e["ts"], names[name], e["args"]["op_name"], e["dur"] / 1e3)
        for e in events
        # Nodes inside an If or a Loop are part of its time.
        if e["cat"] == "Node" and (name := e["name"].removesuffix("_kernel_time")) in names
    ]
    return [[(layer, op, ms) for at, layer, op, ms in times if start <= at <= end] for start, end in runs]


def _layers_of(file: Any, optimized: Any) -> dict[str, str]:
    """Return the layer of each node of the graph that ONNX Runtime made of `file`, by the node's name."""
    made_by = {name: node for node in file.node for name in node.output}
    sizes = {i.name: math.prod(i.dims) for i in chain(file.initializer, optimized.initializer)}
    weighted = {i.name.rpartition(".")[0] for i in file.initializer}
    layers: dict[str, str] = {}
    layer_of: dict[str, str] = {}
    for node in optimized.node:
        # A convolution in blocks of channels has weights of new names, and is named after what it computes.
        name = node.name.removesuffix("_nchwc")
        old = _convolution(made_by, name, sizes) if name != node.name else made_by.get(node.output[0])
        weights = [n for n in chain(node.input, old.input if old else ()) if n in sizes and "." in n]
        sources = {layer_of[n] for n in node.input if n in layer_of}
        if weights:
            # Weights are named after their layers, and what optimizers append to a name has no dot.
            layer = max(weights, key=sizes.__getitem__).rpartition(".")[0]
        elif old and (scope := _scope(old)) is not None:
            # Quantized files do not state which other operators belong to a layer with weights.
            layer = "" if scope in weighted else scope
        else:
            layer = sources.pop() if node.op_type in CONVERSIONS and len(sources) == 1 else ""
        layers[node.name] = layer
        layer_of |= dict.fromkeys(node.output, layer)
    return layers


def _convolution(made_by: Mapping[str, Any], name: str, stored: Mapping[str, int]) -> Any:
    """Return the convolution that leads to the tensor `name` of a file through operators of one input, None if none."""
    while name in made_by and made_by[name].op_type != "Conv":
        sources = [source for source in made_by[name].input if source not in stored]
        name = sources[0] if len(sources) == 1 else ""
    return made_by.get(name)


def _scope(node: Any) -> str | None:
    """Return the name of the module that `node` was exported from, None where the file does not tell."""
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), None)
    if scopes is None:
        return None
    # A list like `['', 'stem', 'conv2d']`: the model, its modules, and the operation.
    names = json.loads(scopes.replace("'", '"'))[:-1]
    return str(names[-1]) if names and NOWHERE not in names[-1] else ""
