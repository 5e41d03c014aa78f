"""Int8 by ONNX Runtime's quantizer, whose classes are given one weight at a time.

Its public functions load the whole file in each step and copy it for the next. Here the graph passes through the steps
without its weights, which stay in another file until they are used.
"""

import contextlib
import copy
import functools
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array, to_array

from shrinkkit import quiet
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes.onnx import store
from shrinkkit.runtimes.onnx.store import LARGE_BYTES
from shrinkkit.runtimes.onnxruntime import load
from shrinkkit.tasks import copies
from shrinkkit.tasks.modules import Example

# External weights are read one by one, and looked for in the working directory: hence `chdir`.
_WEIGHTS = "weights"
_INTERMEDIATE = {"session_config_entries": {"session.disable_prepacking": "1"}}
"""Settings of a session whose file is an intermediate one: it packs no weights again."""


@dataclass(frozen=True)
class Form:
    """How the weights of an int8 file are stored. Activations are uint8 in every form."""

    name: str
    bits: int = 8
    signed: bool = True

    @property
    def exact_anywhere(self) -> bool:
        """Whether two products fit 16 bits (7 bits), or kernels add them in 32 on every processor (unsigned)."""
        return self.bits < 8 or not self.signed


FORMS = (Form("8-bit weights"), Form("7-bit weights", bits=7), Form("unsigned 8-bit weights", signed=False))
"""From the fastest on. The first two are equally fast; the last took up to 1.5 times as long without VNNI."""


@functools.cache
def saturates() -> bool:
    """Return whether products of uint8 activations and int8 weights saturate on this processor when they are summed.

    The largest products, 255 times 127, are summed by a matrix product of one row, one of eight, and a convolution.
    """
    width = 64
    shapes = {"row": ("MatMulInteger", [1, width], [width, 32]), "rows": ("MatMulInteger", [8, width], [width, 32])}
    shapes["image"] = ("ConvInteger", [1, width, 4, 4], [32, width, 1, 1])
    nodes = [helper.make_node(kind, [name, f"{name}_weight"], [f"{name}_sum"]) for name, (kind, *_) in shapes.items()]
    inputs = [helper.make_tensor_value_info(name, TensorProto.UINT8, rows) for name, (_, rows, _) in shapes.items()]
    sums = [helper.make_tensor_value_info(f"{name}_sum", TensorProto.INT32, None) for name in shapes]
    weights = [
        helper.make_tensor(f"{name}_weight", TensorProto.INT8, shape, np.full(shape, 127, np.int8).tobytes(), raw=True)
        for name, (_, _, shape) in shapes.items()
    ]
    graph = helper.make_graph(nodes, "largest", inputs, sums, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    products = session.run(None, {name: np.full(rows, 255, np.uint8) for name, (_, rows, _) in shapes.items()})
    return any((product != 255 * 127 * width).any() for product in products)


@copies.freeing_large_blocks()
def write(
    source: Path,
    path: Path,
    *,
    precision: str,
    calibration: Iterable[Example] = (),
    skip: Sequence[str] = (),
    form: Form = FORMS[0],
) -> tuple[Path, ...]:
    """Write to `path` the ONNX model `source` quantized to int8 by ONNX Runtime's tools, and return its further files.

    Weights are int8 per output channel, and per row in the tables of embeddings. `source`, of `onnx.export.write`, is
    left unchanged. `dynamic-int8` covers MatMul, Gemm and LSTM, `static-int8` convolutions too, with ranges from
    `calibration`, which is read once. `skip` has names of layers to leave in float (not patterns), `form` is one of
    `FORMS`. Raises Unsupported if the quantizer rejects the model.
    """
    try:
        with quiet.libraries(), tempfile.TemporaryDirectory(dir=path.parent) as name:
            folder = Path(name)
            model, transposed = _prepared(source, folder, multiplied=precision == "dynamic-int8")
            graph = model.graph
            stored = {i.name for i in graph.initializer}
            inside = tuple(f"{layer}{end}" for layer in skip for end in "./")
            in_float = {n.name for n in graph.node if any(i.startswith(inside) for i in [n.name, *n.input])}
            tables = [n.name for n in graph.node if n.op_type == "Gather" and n.input[0] in stored]
            if precision == "dynamic-int8":
                quantizer = _dynamic(model, folder, sorted(in_float), form)
            else:
                # Products of two activations, as in attention, take longer in integers than they save.
                products = [n.name for n in graph.node if n.op_type == "MatMul" and not stored & set(n.input)]
                kept = [*sorted(in_float), *tables, *products]
                quantizer = _static(model, kept, _ranges(model, folder, calibration), form)
            with contextlib.chdir(folder):
                quantizer.quantize_model()
            quantizer.model.topological_sort()
            _quantize_tables(quantizer.model.model, folder, set(tables) - in_float, transposed)
            return store.write(onnx_ir.from_proto(quantizer.model.model), path, folder=folder)
    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise Unsupported(f"ONNX Runtime's quantizer rejects this model for {precision}: {brief(error)}.") from error


def _prepared(source: Path, folder: Path, *, multiplied: bool) -> tuple[Any, dict[str, str]]:
    """Return the graph of `source` as ONNX Runtime folds it, with known shapes; its large weights are in `folder`.

    Also return the names of stored matrices that it transposes. With `multiplied`, those of each Gemm are among them.

    Source: `onnxruntime.quantization.shape_inference.quant_pre_process`, which does the same with all of the weights.
    """
    from onnxruntime.quantization.quant_utils import add_infer_metadata, add_pre_process_metadata

    model = onnx.load(source, load_external_data=False)
    transposed = _transposed(model.graph, every=multiplied)
    entries = {
        **_INTERMEDIATE["session_config_entries"],
        "session.optimized_model_external_initializers_file_name": _WEIGHTS,
        "session.model_external_initializers_file_folder_path": str(source.parent),
        "session.optimized_model_external_initializers_min_size_in_bytes": str(LARGE_BYTES),
    }
    options = load.configured({"session_config_entries": entries})
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    # It would undo what `_transposed` did.
    kept = {"disabled_optimizers": ["GemmTransposeFusion"]} if multiplied else {}
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"], **kept)
    onnx.shape_inference.infer_shapes_path(str(folder / "optimized.onnx"), str(folder / "shaped.onnx"))
    model = onnx.load(folder / "shaped.onnx", load_external_data=False)
    add_pre_process_metadata(model)
    add_infer_metadata(model)
    return model, transposed


def _transposed(graph: Any, *, every: bool) -> dict[str, str]:
    """Return the names of transposed matrices by their own; `every` gives each Gemm a transposed weight, in place."""
    names: dict[str, str] = {}
    for node in list(graph.node):
        flags = [a for a in node.attribute if a.name == "transB" and a.i] if every and node.op_type == "Gemm" else []
        for flag in flags:
            name, flag.i = node.input[1], 0
            node.input[1] = f"{name}_Transposed"
            if name not in names:
                graph.node.insert(0, helper.make_node("Transpose", [name], [node.input[1]]))
            names[name] = node.input[1]
        if node.op_type == "Transpose":
            names[node.input[0]] = node.output[0]
    return names


def _quantize_tables(model: Any, folder: Path, names: Collection[str], transposed: Mapping[str, str]) -> None:
    """Store the large tables that the Gather nodes `names` look up as int8 with a scale for each row, in place.

    A matrix that is also multiplied (tied weights) is stored once, in the integers that the quantizer gave it.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    added: dict[str, Any] = {}
    for node in graph.node:
        table = stored.get(node.input[0])
        if node.name not in names or table is None or not table.external_data or len(table.dims) != 2:
            nodes.append(node)
            continue
        name, scale, zero = (f"{table.name}_{part}" for part in ("quantized", "row_scale", "row_zero"))
        if name not in added:
            integers, scales, zeros, tied = _rows(table, folder, stored, transposed)
            added[name], added[scale] = integers, scales[:, None]
            if zeros.any():
                added[zero] = zeros[:, None]
            if tied:
                # Folded when the file is loaded.
                nodes.insert(0, helper.make_node("Transpose", [name], [tied], name=tied))
        output, ids = node.output[0], node.input[1]

        def new(kind: str, inputs: Sequence[str], suffix: str, output: str = output, **attributes: Any) -> str:
            result = f"{output}_row_{suffix}"
            nodes.append(helper.make_node(kind, inputs, [result], name=result, **attributes))
            return result

        rows = new("Gather", [name, ids], "integers")
        nodes[-1].name = node.name
        rows = new("Cast", [rows], "float", to=TensorProto.FLOAT)
        if zero in added:
            zeros = new("Cast", [new("Gather", [zero, ids], "zero")], "float_zero", to=TensorProto.FLOAT)
            rows = new("Sub", [rows, zeros], "centred")
        nodes.append(helper.make_node("Mul", [rows, new("Gather", [scale, ids], "scale")], [output], name=output))
    made = {name for node in nodes for name in node.output} | set(added)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used - made]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *(from_array(array, name) for name, array in added.items())])


def _rows(table: Any, folder: Path, stored: Mapping[str, Any], transposed: Mapping[str, str]) -> tuple[Any, ...]:
    """Return a table's integers, the scale and zero point of each row, and the name of their transposed copy if any."""
    for name in (table.name, transposed.get(table.name)):
        parts = [stored[n] for n in (f"{name}_quantized", f"{name}_scale", f"{name}_zero_point") if n in stored]
        if len(parts) == 3 and list(parts[1].dims) == [table.dims[0]]:
            integers, scales, zeros = map(to_array, parts)
            same = name == table.name
            return integers if same else np.ascontiguousarray(integers.T), scales, zeros, "" if same else parts[0].name
    rows = to_array(table, str(folder))
    scales = np.maximum(abs(rows).max(1), np.finfo(np.float32).tiny) / 127
    return np.rint(rows / scales[:, None]).astype(np.int8), scales, np.zeros(len(rows), np.int8), ""


def _dynamic(model: Any, folder: Path, in_float: Sequence[str], form: Form) -> Any:
    """Return the quantizer of weights alone."""
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode, QuantType

    ONNXModel(model).replace_gemm_with_matmul()
    quantizer = ONNXQuantizer(
        onnx.shape_inference.infer_shapes(model),
        per_channel=True,
        reduce_range=form.bits == 7,
        mode=QuantizationMode.IntegerOps,
        # Else it replaces Gemm itself, for which it loads all weights.
        static=True,
        weight_qType=QuantType.QInt8 if form.signed else QuantType.QUInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=[],
        # A Gemm has become a MatMul of another name.
        nodes_to_exclude=[*in_float, *(f"{name}_MatMul" for name in in_float)],
        op_types_to_quantize=["MatMul", "Gemm", "LSTM"],
        extra_options={"MatMulConstBOnly": True},
    )
    quantizer.static = False
    return quantizer


def _static(model: Any, in_float: Sequence[str], ranges: Any, form: Form) -> Any:
    """Return the quantizer of weights and activations."""
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import QuantType

    return QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=form.bits == 7,
        weight_qType=QuantType.QInt8 if form.signed else QuantType.QUInt8,
        # int8 activations leave the QDQ pattern unfused and run slower than float in ONNX Runtime 1.32.
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=list(in_float),
        op_types_to_quantize=_static_operators(),
        extra_options={},
    )


def _ranges(model: Any, folder: Path, calibration: Iterable[Example]) -> Any:
    """Return the smallest and largest values of each activation of `model`, whose weights lie in `folder`."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader, MinMaxCalibrater

    inputs = [i.name for i in model.graph.input]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            if batch is None:
                return None
            return {name: x.cpu().numpy() for name, x in zip(inputs, batch, strict=True)}

    weightless, large = copy.deepcopy(model), [t for t in model.graph.initializer if t.external_data]
    kept = [t for t in model.graph.initializer if not t.external_data]
    del weightless.graph.initializer[:]
    weightless.graph.initializer.extend(kept)
    onnx.save(weightless, folder / "weightless.onnx")
    observed = folder / "observed.onnx"
    calibrator = MinMaxCalibrater(folder / "weightless.onnx", _static_operators(), str(observed))
    calibrator.augment_graph()
    augmented = onnx.load(observed)
    augmented.graph.initializer.extend(large)
    onnx.save(augmented, observed)
    options = load.configured(_INTERMEDIATE)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    calibrator.infer_session = onnxruntime.InferenceSession(str(observed), options, providers=["CPUExecutionProvider"])
    calibrator.collect_data(Reader())
    return calibrator.compute_data()


def _static_operators() -> list[str]:
    from onnxruntime.quantization.registry import QDQRegistry

    # Their integer forms are slower or less exact than float, and ONNX Runtime has kernels for few of them.
    float_only = {"LayerNormalization", "InstanceNormalization", "Softmax", "EmbedLayerNormalization", "Attention"}
    return sorted(set(QDQRegistry) - float_only)
