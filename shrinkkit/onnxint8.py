"""Int8 for ONNX Runtime by its own quantizer, which sees one weight at a time.

Left alone it holds a model several times over: each of its steps loads the whole file, and gives the next one a copy.
Here the graph goes from step to step without its weights, which stay in a file beside it until they are asked for.
"""

import contextlib
import copy
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shrinkkit import copies, onnxfiles, quiet
from shrinkkit.errors import Unsupported, brief
from shrinkkit.usermodel import Example

# Weights that lie beside a graph are read when their turn comes, and looked for where the process is: hence `chdir`.
_WEIGHTS, _TRANSPOSED = "weights", "transposed"


@copies.returning()
def write(
    source: Path,
    path: Path,
    *,
    method: str,
    calibration: Iterable[Example] = (),
    skip: Sequence[str] = (),
) -> None:
    """Write to `path` the ONNX model `source` quantized to int8 by ONNX Runtime's own tools.

    Weights are int8 per output channel. `source` is left unchanged.

    Args:
        source: FP32 ONNX model, as `artifacts.write_onnx` leaves it: weights carry their layer's name.
        path: Where the quantized model goes.
        method: `dynamic-int8` (MatMul, Gemm, LSTM) or `static-int8` (convolutions too, ranges from `calibration`).
        calibration: Inputs to observe, for `static-int8`. Read once.
        skip: Names of layers to leave in float (names, not patterns).

    Raises:
        Unsupported: The quantizer rejects the model.
    """
    try:
        with quiet.libraries(), tempfile.TemporaryDirectory(dir=path.parent) as name:
            folder = Path(name)
            model = _prepared(source, folder)
            graph = model.graph
            left = [n.name for n in graph.node if any(i.startswith(f"{s}.") for i in n.input for s in skip)]
            if method == "dynamic-int8":
                quantizer = _dynamic(model, folder, left)
            else:
                # Products of two activations, as in attention, take longer in integers than they save.
                stored = {i.name for i in graph.initializer}
                left += [n.name for n in graph.node if n.op_type == "MatMul" and not stored & set(n.input)]
                quantizer = _static(model, left, _ranges(model, folder, calibration))
            with contextlib.chdir(folder):
                quantizer.quantize_model()
            quantizer.model.topological_sort()
            onnxfiles.join(quantizer.model.model, folder, path)
    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise Unsupported(f"ONNX Runtime's quantizer rejects this model for {method}: {brief(error)}.") from error


def _prepared(source: Path, folder: Path) -> Any:
    """Return the graph of `source` as ONNX Runtime folds it, with known shapes; its large weights are in `folder`.

    Source: `onnxruntime.quantization.shape_inference.quant_pre_process`, which does the same with all of the weights.
    """
    import onnx
    import onnxruntime
    from onnxruntime.quantization.quant_utils import add_infer_metadata, add_pre_process_metadata
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    with contextlib.chdir(source.parent):
        inferred = SymbolicShapeInference.infer_shapes(
            onnx.load(source.name, load_external_data=False), int_max=2**31 - 1
        )
    options = _options("session.optimized_model_external_initializers_file_name", _WEIGHTS)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(source.parent))
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(onnxfiles.LARGE_BYTES)
    )
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(inferred.SerializeToString(), options, providers=["CPUExecutionProvider"])
    onnx.shape_inference.infer_shapes_path(str(folder / "optimized.onnx"), str(folder / "shaped.onnx"))
    model = onnx.load(folder / "shaped.onnx", load_external_data=False)
    add_pre_process_metadata(model)
    add_infer_metadata(model)
    return model


def _dynamic(model: Any, folder: Path, left: Sequence[str]) -> Any:
    """Return the quantizer of weights alone."""
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode, QuantType

    _transpose(model, folder)
    ONNXModel(model).replace_gemm_with_matmul()
    quantizer = ONNXQuantizer(
        onnx.shape_inference.infer_shapes(model),
        per_channel=True,
        reduce_range=False,
        mode=QuantizationMode.IntegerOps,
        # Else it replaces Gemm itself, for which it loads all weights.
        static=True,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=[],
        # A Gemm has become a MatMul of another name.
        nodes_to_exclude=[*left, *(f"{name}_MatMul" for name in left)],
        op_types_to_quantize=["MatMul", "Gemm", "LSTM"],
        extra_options={"MatMulConstBOnly": True},
    )
    quantizer.static = False
    return quantizer


def _transpose(model: Any, folder: Path) -> None:
    """Give each Gemm of a transposed weight that lies in `folder` the weight as it multiplies with it, in place."""
    import onnx

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made: dict[str, str] = {}
    with (folder / _TRANSPOSED).open("wb") as file:
        for node in model.graph.node:
            flags = [a for a in node.attribute if a.name == "transB" and a.i]
            weight = stored.get(node.input[1]) if node.op_type == "Gemm" and flags else None
            if weight is None or not weight.external_data:
                continue
            if weight.name not in made:
                made[weight.name] = f"{weight.name}_Transposed"
                array = np.ascontiguousarray(onnx.numpy_helper.to_array(weight, str(folder)).T)
                new = model.graph.initializer.add(
                    name=made[weight.name], data_type=weight.data_type, dims=array.shape, data_location=1
                )
                said = {"location": _TRANSPOSED, "offset": file.tell(), "length": array.nbytes}
                new.external_data.extend(
                    onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in said.items()
                )
                file.write(array.data)
            node.input[1] = made[weight.name]
            flags[0].i = 0


def _static(model: Any, left: Sequence[str], ranges: Any) -> Any:
    """Return the quantizer of weights and activations."""
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import QuantType

    return QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        # int8 activations leave the QDQ pattern unfused and run slower than float in ONNX Runtime 1.32.
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=list(left),
        op_types_to_quantize=_static_operators(),
        extra_options={},
    )


def _ranges(model: Any, folder: Path, calibration: Iterable[Example]) -> Any:
    """Return the smallest and largest values of each activation of `model`, whose weights lie in `folder`."""
    import onnx
    import onnxruntime
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
    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    calibrator.infer_session = onnxruntime.InferenceSession(str(observed), options, providers=["CPUExecutionProvider"])
    calibrator.collect_data(Reader())
    return calibrator.compute_data()


def _options(*entry: str) -> Any:
    """Return the options of a session that is only a step on the way: it packs no weights anew."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    if entry:
        options.add_session_config_entry(*entry)
    return options


def _static_operators() -> list[str]:
    from onnxruntime.quantization.registry import QDQRegistry

    # Their integer forms are slower or less exact than float, and ONNX Runtime has kernels for few of them.
    float_only = {"LayerNormalization", "InstanceNormalization", "Softmax", "EmbedLayerNormalization", "Attention"}
    return sorted(set(QDQRegistry) - float_only)
