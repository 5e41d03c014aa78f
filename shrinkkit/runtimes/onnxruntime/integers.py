"""Integer layers of an ONNX graph, cut out so that each can be run by itself, and as float arithmetic.

A quantized graph is written in float operators between DequantizeLinear and QuantizeLinear. ONNX Runtime fuses these
into integer kernels unless its optimizations are off; what is written in integers is rewritten in doubles here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto
from onnx.helper import make_node, make_tensor_value_info, np_dtype_to_tensor_dtype
from onnx.numpy_helper import to_array

from shrinkkit.core.measurement import IntegerCheck
from shrinkkit.errors import brief
from shrinkkit.runtimes.base import max_relative_error
from shrinkkit.runtimes.layers import Difference, difference, integer_check, unchecked
from shrinkkit.runtimes.onnxruntime import load
from shrinkkit.runtimes.onnxruntime.profile import INT8_OPERATORS, int8_weights
from shrinkkit.runtimes.onnxruntime.spec import OnnxRuntime
from shrinkkit.tasks.modules import Example

MULTIPLYING = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
"""Operators that ONNX Runtime turns into integer kernels when both of their operands are dequantized."""


@dataclass(frozen=True)
class Layer:
    """One integer layer: the tensors that it starts and ends at, and the nodes between."""

    weight: str
    """Its name in the file."""
    source: str
    result: str
    nodes: tuple[Any, ...]
    dynamic: bool
    """Whether its input is quantized at each call."""

    @property
    def name(self) -> str:
        """Return the name of the model's layer that the weight belongs to."""
        return self.weight.partition(".weight")[0]


class _NotRun(Exception):
    """ONNX Runtime does not run a cut graph."""


def check(path: Path, inputs: Example, *, threads: int, reference: Path | None = None) -> IntegerCheck | None:
    """Return the comparison of the kernels of an ONNX file with float, None for a file in float.

    `reference` is the file that is computed in float, by default the same; another must have the same nodes.
    """
    model = read(path)
    written = layers(model)
    fused = int8_weights(path) if written else frozenset()
    cut = [layer for layer in written if layer.dynamic or layer.weight.removesuffix("_quantized") in fused]
    if not cut:
        if other := sorted({n.op_type for n in model.graph.node} & INT8_OPERATORS):
            raise unchecked(path, f"{', '.join(other)} cannot be computed in float as well")
        return None
    feed = {value.name: x.contiguous().numpy() for value, x in zip(model.graph.input, inputs, strict=True)}
    try:
        expected = run_in_float(read(reference) if reference else model, cut, feed, threads=threads)
        values = run_layers(model, cut, expected, threads=threads)
    except _NotRun as error:
        raise unchecked(path, str(error)) from error
    differences: dict[str, list[Difference]] = defaultdict(list)
    for layer in cut:
        real, step = scale(model, layer.result)
        pair = (torch.from_numpy(real(arrays[layer.result])) for arrays in (expected, values))
        differences[layer.name].append(difference(*pair, step=step))
    output = load.load(path, device="cpu", threads=threads, like=None)(*inputs)
    ends = [expected[value.name] for value in model.graph.output]
    return integer_check(max_relative_error(ends, output), differences)


def read(path: Path) -> Any:
    """Return the ONNX model at `path`, with the products of each LSTM's inputs and states as separate nodes.

    An LSTM in one node rounds at each of its steps, each with other ranges, so only its products can be compared.
    """
    model = onnx.load(str(path))
    graph = model.graph
    values = {i.name: i for i in graph.initializer}
    graph.initializer.append(onnx.helper.make_tensor("directions", onnx.TensorProto.INT64, [1], [1]))
    for node in [n for n in graph.node if n.op_type == "DynamicQuantizeLSTM"]:
        layer = next((name.partition(".weight")[0] for name in node.input if ".weight" in name), node.name)
        node.output[0] = node.output[0] or f"{node.name}_states"
        inputs = f"{node.name}_inputs"
        # What an LSTM returns has its directions between steps and batch; what it takes has none.
        graph.node.append(make_node("Unsqueeze", [node.input[0], "directions"], [inputs]))
        for position, rows in ((1, inputs), (2, node.output[0])):
            name = f"{layer}.weight_{node.name}_{position}"
            graph.initializer.add().CopyFrom(values[node.input[position]])
            graph.initializer[-1].name = name
            rounded = [f"{name}_rows", f"{name}_scale", f"{name}_zero"]
            graph.node.append(make_node("DynamicQuantizeLinear", [rows], rounded))
            graph.node.append(make_node("MatMulInteger", [rounded[0], name, rounded[2]], [f"{name}_product"]))
    return model


def layers(model: Any) -> list[Layer]:
    """Return the layers of `model` that may run as integers and whose weights are stored in it."""
    producers = {name: node for node in model.graph.node for name in node.output}
    users = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            users[name].append(node)
    stored = {i.name for i in model.graph.initializer}
    ends = {value.name for value in model.graph.output}
    cut = []
    for node in model.graph.node:
        makers = [producers.get(name) for name in node.input[:2]]
        kinds = [maker.op_type if maker else "" for maker in makers]
        dynamic = node.op_type == "MatMulInteger" and kinds[0] == "DynamicQuantizeLinear"
        static = node.op_type in MULTIPLYING and kinds == ["DequantizeLinear"] * 2
        operands = [maker.input[0] if maker else name for maker, name in zip(makers, node.input, strict=False)]
        weights = [name for name in operands if name in stored]
        if not (dynamic or static) or len(weights) != 1:
            continue
        source = next(name for name in operands if name not in stored)
        follow = ["Cast", "Mul"] if dynamic else ["Relu", "Clip", "QuantizeLinear"]
        result = node.output[0]
        while len(users[result]) == 1 and users[result][0].op_type in follow and result not in ends:
            follow = follow[follow.index(users[result][0].op_type) + 1 :]
            result = users[result][0].output[0]
        nodes, other = _between(model.graph.node, producers, source, result)
        if other <= stored:
            cut.append(Layer(weights[0], source, result, nodes, dynamic))
    return cut


def run_in_float(model: Any, cut: Sequence[Layer], feed: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """Return the arrays at which each layer starts and ends, and the outputs, when `model` computes in float."""
    outputs = [value.name for value in model.graph.output]
    names = list(dict.fromkeys([*outputs, *(name for layer in cut for name in (layer.source, layer.result))]))
    nodes = [copy for node in model.graph.node for copy in _in_doubles(node)]
    return _run(_graph(model, nodes, list(model.graph.input), names), feed, names, threads, fused=False)


def run_layers(model: Any, cut: Sequence[Layer], values: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """Return, by the tensor that a layer ends at, what its kernel gives for its start in `values` of `run_in_float`."""
    # All are in one graph, so that the end of one and the start of the next must not be the same tensor.
    given = {layer.source: f"{layer.source}_given" for layer in cut}
    nodes = {}
    for layer in cut:
        for node in layer.nodes:
            copied = nodes[node.output[0]] = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.input[:] = [given[name] if name == layer.source else name for name in node.input]
    inputs = [
        make_tensor_value_info(new, np_dtype_to_tensor_dtype(values[old].dtype), values[old].shape)
        for old, new in given.items()
    ]
    ends = list(dict.fromkeys(layer.result for layer in cut))
    feed = {new: values[old] for old, new in given.items()}
    return _run(_graph(model, list(nodes.values()), inputs, ends), feed, ends, threads, fused=True)


def scale(model: Any, name: str) -> tuple[Callable[[Any], Any], float]:
    """Return what makes real numbers of the array `name`, and the step that they are rounded to, 0 for floats."""
    node = next(n for n in model.graph.node if name in n.output)
    if node.op_type != "QuantizeLinear":
        return (lambda array: array), 0.0
    stored = {i.name: to_array(i).astype(float) for i in model.graph.initializer if i.name in node.input[1:]}
    step, zero = (stored[name] for name in node.input[1:3])
    return (lambda array: (array - zero) * step), float(step.max())


def _between(nodes: Any, producers: Mapping[str, Any], source: str, result: str) -> tuple[tuple[Any, ...], set[str]]:
    """Return the nodes that compute `result` from `source`, in order, and the other tensors that they need."""
    needed, other, names = set[str](), set[str](), [result]
    while names:
        name = names.pop()
        if name in producers and name != source:
            needed.add(producers[name].output[0])
            names += [n for n in producers[name].input if n]
        elif name != source:
            other.add(name)
    return tuple(n for n in nodes if n.output[0] in needed), other


def _in_doubles(node: Any) -> list[Any]:
    """Return `node`, or for a MatMulInteger the same in doubles, which hold every sum of products of 8 bits exactly."""
    if node.op_type != "MatMulInteger":
        return [node]
    nodes: list[Any] = []
    operands: list[str] = []
    end = node.output[0]
    for name, zero in zip(node.input[:2], [*node.input[2:], "", ""], strict=False):
        operands.append(f"{end}_{len(operands)}")
        nodes.append(make_node("Cast", [name], [operands[-1]], to=TensorProto.DOUBLE))
        if zero:
            nodes.append(make_node("Cast", [zero], [f"{operands[-1]}_zero"], to=TensorProto.DOUBLE))
            nodes.append(make_node("Sub", [operands[-1], f"{operands[-1]}_zero"], [f"{operands[-1]}_centred"]))
            operands[-1] += "_centred"
    nodes.append(make_node("MatMul", operands, [f"{end}_sums"]))
    return [*nodes, make_node("Cast", [f"{end}_sums"], [end], to=TensorProto.INT32)]


def _graph(model: Any, nodes: list[Any], inputs: list[Any], ends: Iterable[str]) -> Any:
    """Return a model of these nodes, inputs and outputs with the weights of `model`."""
    results = [onnx.ValueInfoProto(name=name) for name in ends]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, results, list(model.graph.initializer))
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _run(model: Any, feed: Mapping[str, Any], names: Sequence[str], threads: int, *, fused: bool) -> dict[str, Any]:
    """Return some outputs of one call, its kernels fused as they are when the file is loaded, or as written."""
    options = load.configured(OnnxRuntime().settings(Path(), threads=threads))
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(list(names), dict(feed)), strict=True))
    except load.ERRORS as error:
        raise _NotRun(f"ONNX Runtime stops with {brief(error)}") from error
