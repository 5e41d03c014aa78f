"""What OpenVINO really runs of a model file: the graph that it compiled for this processor, and the time of its parts.

A file can name integers that the compiled graph computes in float; only the compiled graph is believed here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from shrinkkit.core.variant import LayerPrecision
from shrinkkit.runtimes import audit, loading
from shrinkkit.tasks.modules import Example

PRODUCTS = frozenset(
    "Convolution Deconvolution FullyConnected MatMul RNNSeq RNNCell LSTMSequence GRUSequence LSTMCell GRUCell".split()
)
"""Types of the compiled graph that multiply with a layer's weights."""
_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_IDLE = frozenset({"Input", "Output", "Const", "Parameter", "Result"})


def precision(
    compiled: Any, model: torch.nn.Module, *, method: str, skipped: frozenset[str], dynamic: bool = False
) -> dict[str, LayerPrecision]:
    """Return how OpenVINO runs each layer of `model`, read off the graph that it compiled.

    Args:
        compiled: What `Core.compile_model` returned for the file.
        model: The float model that the file was made from.
        method: The recipe's method, for the reason why a layer stayed in float.
        skipped: Names of modules that were to be left in float.
        dynamic: Whether activations are known to be quantized on the fly. The compiled graph says so of no layer: it
            only says which have their weights in integers.
    """
    ran: dict[str, set[str]] = {}
    half = method in ("float16", "bfloat16")
    known = audit.layers(model)
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in op.get_rt_info().items()}
        if info["layerType"] not in PRODUCTS and not half:
            continue
        for layer in _layers(info["originalLayersNames"], known):
            ran.setdefault(layer, set()).add(_runs_as(info, dynamic))
    found = {}
    for name, module in known.items():
        kinds = ran.get(name, set())
        if half and method in kinds:
            found[name] = LayerPrecision(method)
        elif kinds and kinds != {"float32"} and not half:
            # A layer of several operators counts only for what all of them are.
            found[name] = LayerPrecision(kinds.pop() if len(kinds) == 1 else "float32")
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not kinds:
            found[name] = LayerPrecision("folded", "part of the layer before it")
        elif half:
            found[name] = LayerPrecision("float32", f"openvino computes it in float32 here, not in {method}")
        else:
            found[name] = LayerPrecision("float32", audit.why_float(name, module, method, "openvino", skipped))
    return found


def name_last(graph: Any, source: Path) -> None:
    """Give what computes the outputs its own name again, in place, which OpenVINO replaced by that of the output.

    Args:
        graph: What `Core.read_model` returned.
        source: The ONNX file that it was read from.
    """
    import onnx

    made_by = {
        name: node.name for node in onnx.load(source, load_external_data=False).graph.node for name in node.output
    }
    for result in graph.get_results():
        port = result.input_value(0)
        if name := made_by.get(port.get_any_name()):
            port.get_node().set_friendly_name(name)


def times(
    path: Path, inputs: Example, *, threads: int, number: Callable[[Callable[[], Any]], int]
) -> list[list[tuple[str, str, float]]]:
    """Return layer, operator and ms of each part of each call, by OpenVINO's own profile.

    Args:
        path: A `.onnx` or `.xml` file.
        inputs: Positional inputs of one call, CPU tensors, batch first.
        threads: Threads of one call.
        number: From a call to how often it is to be made.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if path.suffix == ".onnx":
        name_last(model, path)
    compiled = core.compile_model(model, "CPU", loading.openvino_settings(model, threads) | {"PERF_COUNT": True})
    request, feed = compiled.create_infer_request(), [x.contiguous().numpy() for x in inputs]
    names = {name for port in compiled.inputs for name in port.get_names()}
    calls = []
    for _ in range(number(lambda: request.infer(feed))):
        request.infer(feed)
        calls.append(
            [
                (_layer(info.node_name, names), info.node_type, info.real_time.total_seconds() * 1e3)
                for info in request.get_profiling_info()
                if info.status.name == "EXECUTED" and info.node_type not in _IDLE
            ]
        )
    return calls


def weights(path: Path) -> list[torch.Tensor]:
    """Return the constants in floating point of an OpenVINO model or an ONNX file, as OpenVINO reads them."""
    import openvino

    constants = [op for op in openvino.Core().read_model(path).get_ops() if op.get_type_name() == "Constant"]
    arrays = [op.data for op in constants if op.get_element_type().is_real()]
    return [torch.from_numpy(array.copy()) for array in arrays if array.dtype.kind == "f"]


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
    found = []
    for name in originals.split(","):
        prefixes = [layer for layer in known if name.startswith(f"{layer}/")]
        if prefixes:
            found.append(max(prefixes, key=len))
    return found


def _layer(node: str, inputs: set[str]) -> str:
    """Return the layer of a node of the profile, '' for what belongs to none."""
    layer, slash, _ = node.partition("/")
    return layer if slash and layer not in inputs else ""
