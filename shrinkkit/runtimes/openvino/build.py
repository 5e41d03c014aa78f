"""Model files for OpenVINO: int8 by NNCF, OpenVINO's quantizer, and 16-bit floats.

A file states the settings that it is measured with; see `OpenVino.settings`.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops

from shrinkkit import quiet
from shrinkkit.core.variant import LayerPrecision
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes.base import BuildRequest, BuiltFile, prove, refuse_float
from shrinkkit.runtimes.onnx.export import TOLERANCE, build_float32, source
from shrinkkit.runtimes.openvino import load, profile
from shrinkkit.runtimes.openvino.spec import GROUP_SIZE, PRECISION, OpenVino
from shrinkkit.tasks.modules import Example

HALF = {"float16": "f16", "bfloat16": "bf16"}
GROUP_NUMBERS = 64
"""Numbers of an activation that share a range in dynamic int8. Of 32, 64 and whole rows, 64 was fastest."""
_STORED_ONLY = frozenset(
    "Convolution GroupConvolution ConvolutionBackpropData GroupConvolutionBackpropData Gather".split()
)
"""Operators whose weights NNCF would store in integers and OpenVINO turn back into floats."""
_DROPPED = ("nncf", "conversion_parameters", "MO_version", "Runtime_version", "legacy_frontend")


@functools.cache
def saturates() -> bool:
    """Return whether products of uint8 activations and int8 weights saturate on this processor when they are summed.

    The largest products, 255 times 127, are summed by a matrix product and by a convolution.
    """
    width, core = 64, openvino.Core()
    inputs, results = [], []
    for rows, shape in (([8, width], [32, width]), ([1, width, 4, 4], [32, width, 1, 1])):
        x = ops.parameter(rows, np.float32)
        rounded = ops.fake_quantize(x, *(np.float32(limit) for limit in (0, 255, 0, 255)), 256)
        weight = ops.convert(ops.constant(np.full(shape, 127, np.int8)), "f32")
        weight = ops.multiply(weight, np.full([32, *[1] * (len(shape) - 1)], 1 / 127, np.float32))
        zeros, ones = [0, 0], [1, 1]
        convolution = partial(ops.convolution, strides=ones, pads_begin=zeros, pads_end=zeros, dilations=ones)
        product = ops.matmul(rounded, weight, False, True) if len(shape) == 2 else convolution(rounded, weight)
        inputs.append(x)
        results.append(ops.result(product))
    graph = openvino.Model(results, inputs, "largest")
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled([np.full(x.shape, 255, np.float32) for x in inputs])
    return any(abs(sums / (255 * width) - 1).max() > 0.01 for sums in outputs.values())


def build(request: BuildRequest) -> BuiltFile:
    """Return the file of a variant for OpenVINO: ONNX in float32, else OpenVINO's format, by NNCF in int8."""
    if not request.precision:
        return build_float32(request, load.load)
    exported, note = source(request)
    path = request.folder / "model.openvino.xml"
    weights = path.with_suffix(".bin")
    static = request.precision == "static-int8"
    narrow = static and saturates()
    layers = write(request, exported, path, narrow=narrow)
    refuse_float(request, "OpenVINO", layers, path, beside=[weights])
    reason = narrow * "weights have 7 bits, because int8 accumulators saturate on this processor with 8"
    return prove(
        request,
        load.load,
        path,
        format="openvino",
        tolerance=TOLERANCE,
        layers=layers,
        notes=[note, reason],
        # Dynamic int8 is computed in float on processors without VNNI.
        exact_anywhere=narrow or not static,
        beside=[weights],
    )


def write(request: BuildRequest, exported: Path, path: Path, *, narrow: bool = False) -> Mapping[str, LayerPrecision]:
    """Write the ONNX model `exported` in the precision of `request`, and return how OpenVINO runs each layer here.

    Args:
        request: What is built, in `dynamic-int8`, `static-int8`, `float16` or `bfloat16`.
        exported: FP32 ONNX model of `onnx.export.write`, whose nodes carry their layer's name. Left unchanged.
        path: Where the model goes, `.xml`; its weights go into a `.bin` file of the same name.
        narrow: Give weights 7 bits in `static-int8`, so that no sum of two products exceeds 16 bits.

    Raises:
        Unsupported: NNCF rejects the model, or has nothing to quantize in it.
    """
    core = openvino.Core()
    graph = core.read_model(exported)
    profile.restore_names(graph, exported)
    calibration = request.calibration or (request.example,)
    try:
        with quiet.libraries():
            quantized = _quantized(graph, request, calibration, narrow=narrow)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unsupported(f"NNCF rejects this model for {request.precision}: {brief(error)}.") from error
    for key in _DROPPED:
        if key in quantized.rt_info:
            del quantized.rt_info[key]
    _number_names(quantized)
    openvino.save_model(quantized, path, compress_to_fp16=request.precision in HALF)
    # Indentation is a seventh of the description.
    path.write_text(re.sub(r">\s+<", "><", path.read_text(encoding="utf-8")), encoding="utf-8")
    settings = OpenVino().settings(path, threads=torch.get_num_threads())
    saved = core.read_model(path)
    dynamic = request.precision == "dynamic-int8" and _quantizes_activations(core, saved, calibration, settings)
    rows = profile.layer_precisions(core.compile_model(saved, "CPU", settings), request, dynamic=dynamic)
    if request.precision in HALF and not any(p.runs_as == request.precision for p in rows.values()):
        why = f"this processor has no {request.precision} arithmetic"
        return {name: LayerPrecision("float32", why) for name in rows}
    return rows


def _quantized(graph: Any, request: BuildRequest, calibration: Sequence[Example], *, narrow: bool) -> Any:
    """Return `graph` in the precision of `request`, with the settings that it is to run with stated in it."""
    if request.precision in HALF:
        if request.skipped:
            raise Unsupported(
                f"OpenVINO has one precision for a whole model, so {request.precision} takes no `skip`. Leave it out."
            )
        graph.set_rt_info(HALF[request.precision], PRECISION)
        return graph
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    skipped = [op.get_friendly_name() for op in graph.get_ops() if _is_of(op.get_friendly_name(), request.skipped)]
    if request.precision == "static-int8":
        data = nncf.Dataset(list(calibration), lambda batch: [x.contiguous().numpy() for x in batch])
        return nncf.quantize(
            graph,
            data,
            subset_size=len(calibration),
            # By default, NNCF does so in the first layer only.
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE) if narrow else None,
            model_type=nncf.ModelType.TRANSFORMER if _attends(graph) else None,
            ignored_scope=nncf.IgnoredScope(names=skipped, validate=False) if skipped else None,
        )
    # Operators other than matrix products would be stored in integers and computed in float.
    others = [op.get_friendly_name() for op in graph.get_ops() if op.get_type_name() in _STORED_ONLY]
    graph.set_rt_info(GROUP_NUMBERS, GROUP_SIZE)
    return nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode.INT8_SYM,
        ignored_scope=nncf.IgnoredScope(names=[*skipped, *others], validate=False),
    )


def _number_names(graph: Any) -> None:
    """Name operators that belong to no layer by their position, so that the same model gives the same file."""
    for number, op in enumerate(graph.get_ordered_ops()):
        kind = op.get_type_name()
        if kind == "Constant" or ("/" not in op.get_friendly_name() and kind not in ("Parameter", "Result")):
            op.set_friendly_name(f"{kind}_{number}")


def _is_of(node: str, modules: frozenset[str]) -> bool:
    layer = node.partition("/")[0]
    return any(layer == module or layer.startswith(f"{module}.") for module in modules)


def _attends(graph: Any) -> bool:
    """Return whether `graph` multiplies activations with each other."""
    return any(
        op.get_type_name() == "MatMul"
        and not any(port.get_node().get_type_name() == "Constant" for port in op.input_values())
        for op in graph.get_ops()
    )


def _quantizes_activations(core: Any, graph: Any, calibration: Sequence[Example], settings: Mapping[str, Any]) -> bool:
    """Return whether activations are rounded to integers here: whether outputs differ from those with them in float."""
    feed = [np.asarray(x) for x in calibration[0]]
    first, second = (
        list(core.compile_model(graph, "CPU", {**settings, **changed})(feed).values())
        for changed in ({}, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
    )
    return any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
