"""The integer layers of an ONNX graph, cut out so that each can be run by itself, and as float arithmetic.

A quantized graph says in float operators what it means, between DequantizeLinear and QuantizeLinear. ONNX Runtime fuses
these into integer kernels unless its optimizations are off; what is written in integers is rewritten in doubles here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrinkkit.errors import Unsupported, brief

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


def read(path: Path) -> Any:
    """Return the ONNX model at `path`, with the products of each LSTM's inputs and states as nodes of their own.

    An LSTM in one node rounds at each of its steps, by ranges of its own, so only its products can be compared.
    """
    import onnx
    from onnx.helper import make_node

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
    found = []
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
            found.append(Layer(weights[0], source, result, nodes, dynamic))
    return found


def run_in_float(model: Any, cut: Sequence[Layer], feed: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """Return what each layer of `cut` starts and ends at when `model` computes in float, and the model's outputs.

    Args:
        model: What `read` returned.
        cut: Layers of it.
        feed: One call's inputs, by name.
        threads: Intra-op threads.

    Returns:
        Arrays by tensor name.

    Raises:
        Unsupported: ONNX Runtime does not run the model so.
    """
    outputs = [value.name for value in model.graph.output]
    asked = list(dict.fromkeys([*outputs, *(name for layer in cut for name in (layer.source, layer.result))]))
    nodes = [copy for node in model.graph.node for copy in _in_doubles(node)]
    return _run(_graph(model, nodes, list(model.graph.input), asked), feed, asked, threads, fused=False)


def run_layers(model: Any, cut: Sequence[Layer], values: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """Return what the kernel of each layer of `cut` gives for what the layer starts at in `values`.

    Args:
        model: What `read` returned.
        cut: Layers of it.
        values: What `run_in_float` returned.
        threads: Intra-op threads.

    Returns:
        Arrays by the name of the tensor that the layer ends at.

    Raises:
        Unsupported: ONNX Runtime does not run the layers so.
    """
    import onnx
    from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype

    # All stand side by side in one graph, so where one ends and the next starts must not be the same tensor.
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
    from onnx.numpy_helper import to_array

    node = next(n for n in model.graph.node if name in n.output)
    if node.op_type != "QuantizeLinear":
        return (lambda array: array), 0.0
    stored = {i.name: to_array(i).astype(float) for i in model.graph.initializer if i.name in node.input[1:]}
    step, zero = (stored[name] for name in node.input[1:3])
    return (lambda array: (array - zero) * step), float(step.max())


def _between(
    nodes: Iterable[Any], producers: Mapping[str, Any], source: str, result: str
) -> tuple[tuple[Any, ...], set[str]]:
    """Return the nodes that compute `result` from `source`, in order, and the other tensors that they need."""
    wanted: set[str] = set()
    other: set[str] = set()
    names = [result]
    while names:
        name = names.pop()
        if name in producers and name != source:
            wanted.add(producers[name].output[0])
            names += [n for n in producers[name].input if n]
        elif name != source:
            other.add(name)
    return tuple(n for n in nodes if n.output[0] in wanted), other


def _in_doubles(node: Any) -> list[Any]:
    """Return `node`, or for a MatMulInteger the same in doubles, which hold every sum of products of 8 bits exactly."""
    from onnx import TensorProto
    from onnx.helper import make_node

    if node.op_type != "MatMulInteger":
        return [node]
    found: list[Any] = []
    operands: list[str] = []
    end = node.output[0]
    for name, zero in zip(node.input[:2], [*node.input[2:], "", ""], strict=False):
        operands.append(f"{end}_{len(operands)}")
        found.append(make_node("Cast", [name], [operands[-1]], to=TensorProto.DOUBLE))
        if zero:
            found.append(make_node("Cast", [zero], [f"{operands[-1]}_zero"], to=TensorProto.DOUBLE))
            found.append(make_node("Sub", [operands[-1], f"{operands[-1]}_zero"], [f"{operands[-1]}_centred"]))
            operands[-1] += "_centred"
    found.append(make_node("MatMul", operands, [f"{end}_sums"]))
    return [*found, make_node("Cast", [f"{end}_sums"], [end], to=TensorProto.INT32)]


def _graph(model: Any, nodes: list[Any], inputs: list[Any], ends: Iterable[str]) -> Any:
    """Return a model of these nodes, inputs and outputs with the weights of `model`."""
    import onnx

    results = [onnx.ValueInfoProto(name=name) for name in ends]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, results, list(model.graph.initializer))
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _run(model: Any, feed: Mapping[str, Any], asked: Sequence[str], threads: int, *, fused: bool) -> dict[str, Any]:
    """Return the outputs `asked` of one call, its kernels fused as they are when the file is loaded, or as written."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(asked, session.run(list(asked), dict(feed)), strict=True))
    except (
        states.Fail,
        states.InvalidArgument,
        states.InvalidGraph,
        states.NotImplemented,
        states.RuntimeException,
    ) as error:
        raise Unsupported(f"ONNX Runtime stops with {brief(error)}") from error
