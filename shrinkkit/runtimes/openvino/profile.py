"""The graph that OpenVINO compiled for this processor: in which precision each layer runs, and time by layer.

A file can name integers that the compiled graph computes in float, so only the compiled graph is inspected.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import openvino
import torch

from shrinkkit.core.measurement import IntegerCheck
from shrinkkit.core.variant import LayerPrecision
from shrinkkit.runtimes.base import BuildRequest, Calls, Repeats, count_denormals
from shrinkkit.runtimes.layers import RECURRENT, no_recurrent, parametrized, precisions, tied, unchecked
from shrinkkit.runtimes.openvino.spec import OpenVino
from shrinkkit.runtimes.spec import HALF
from shrinkkit.tasks.modules import Example

PRODUCTS = frozenset(
    "Convolution Deconvolution FullyConnected Gather MatMul RNNSeq RNNCell LSTMSequence GRUSequence LSTMCell "
    "GRUCell".split()
)
"""Types of the compiled graph that multiply with a layer's weights, or look them up."""
_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_IDLE = frozenset({"Input", "Output", "Const", "Parameter", "Result"})


def layer_precisions(compiled: Any, request: BuildRequest, *, dynamic: bool = False) -> dict[str, LayerPrecision]:
    """Return how OpenVINO runs each layer of the model of `request`, read off the graph `compiled` for its file.

    The graph does not tell per layer whether activations are quantized on the fly, only which weights are integers;
    with `dynamic`, they are known to be.
    """
    ran: dict[tuple[str, bool], set[str]] = {}
    half = request.precision in HALF
    known, same = parametrized(request.model), tied(request.model)
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in op.get_rt_info().items()}
        if info["layerType"] not in PRODUCTS and not half:
            continue
        for layer in _layers(info["originalLayersNames"], known):
            ran.setdefault((layer, info["layerType"] == "Gather"), set()).add(_runs_as(info, dynamic))

    def runs_as(name: str) -> str:
        looked_up = (True, False) if half else (isinstance(known[name], torch.nn.Embedding),)
        kinds = {kind for layer in same[name] for way in looked_up for kind in ran.get((layer, way), ())}
        if half:
            return request.precision if request.precision in kinds else ""
        # A layer of several operators counts only if all of them agree.
        return next(iter(kinds)) if len(kinds) == 1 else ""

    def reason(name: str, module: torch.nn.Module) -> str:
        if half:
            return f"openvino computes it in float32 here, not in {request.precision}"
        if request.precision == "static-int8" and isinstance(module, (torch.nn.Embedding, torch.nn.LSTM)):
            return f"OpenVINO stores {type(module).__name__} in int8 and computes it in float32"
        return no_recurrent("OpenVINO", *RECURRENT)(name, module)

    return precisions(request, "OpenVINO", runs_as, folded=lambda name: (name, False) not in ran, reason=reason)


def restore_names(graph: Any, source: Path) -> None:
    """Restore the names that operators of `graph` have in its ONNX file, which OpenVINO replaced at the outputs."""
    nodes = onnx.load(source, load_external_data=False).graph.node
    made_by = {name: node.name for node in nodes for name in node.output}
    for result in graph.get_results():
        port = result.input_value(0)
        if name := made_by.get(port.get_any_name()):
            port.get_node().set_friendly_name(name)


def layers(path: Path, inputs: Example, *, device: str, threads: int, repeats: Repeats) -> Calls:
    """Return layer, operator and ms of each part of each call, by OpenVINO's profile.

    Source: OpenVINO, "Performance Counters".
    """
    core = openvino.Core()
    model = core.read_model(path)
    if path.suffix == ".onnx":
        restore_names(model, path)
    compiled = core.compile_model(model, "CPU", {**OpenVino().settings(path, threads=threads), "PERF_COUNT": True})
    request, feed = compiled.create_infer_request(), [x.contiguous().numpy() for x in inputs]
    names = {name for port in compiled.inputs for name in port.get_names()}
    calls = []
    for _ in range(repeats(lambda: request.infer(feed))):
        request.infer(feed)
        ran = (info for info in request.get_profiling_info() if info.status.name == "EXECUTED")
        parts = [(_layer(i.node_name, names), i.node_type, i.real_time.total_seconds() * 1e3) for i in ran]
        calls.append([part for part in parts if part[1] not in _IDLE])
    return calls


def check_integers(path: Path, inputs: Example, *, threads: int) -> IntegerCheck | None:
    """Return None for a file in float; the kernels of other files cannot be compared."""
    integers = (b'"FakeQuantize"', b'"i8"', b'"u8"')
    if path.suffix != ".xml" or not any(key in path.read_bytes() for key in integers):
        return None
    raise unchecked(path, "OpenVINO has no other way to compute its integer layers")


def denormals(path: Path, inputs: Example | None) -> int:
    """Return the denormals in the float constants of a file, as OpenVINO reads them."""
    constants = [op for op in openvino.Core().read_model(path).get_ops() if op.get_type_name() == "Constant"]
    arrays = (op.data for op in constants if op.get_element_type().is_real())
    return count_denormals(torch.from_numpy(array.copy()) for array in arrays if array.dtype.kind == "f")


def _runs_as(info: Mapping[str, str], dynamic: bool) -> str:
    """Return in what an operator of the compiled graph multiplies."""
    stored = info["runtimePrecision"]
    if info["primitiveType"].lower().endswith("i8"):
        return "int8"
    if stored in ("i8", "u8", "i4", "u4"):
        # Weights in integers that are multiplied as floats, unless the activations are quantized as well.
        return "int8" if dynamic else "float32"
    return _FLOATS.get(stored, stored)


def _layers(originals: str, known: Mapping[str, Any]) -> list[str]:
    """Return the layers that an operator of the compiled graph was made from, by the names of its nodes."""
    prefixes = ([layer for layer in known if name.startswith(f"{layer}/")] for name in originals.split(","))
    return [max(layers_, key=len) for layers_ in prefixes if layers_]


def _layer(node: str, inputs: set[str]) -> str:
    """Return the layer of a node of the profile, '' for what belongs to none."""
    layer, slash, _ = node.partition("/")
    return layer if slash and layer not in inputs else ""
