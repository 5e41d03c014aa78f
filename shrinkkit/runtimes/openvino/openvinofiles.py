"""Model files for OpenVINO: int8 by NNCF, OpenVINO's own quantizer, and 16-bit floats.

A file says in itself with which settings it was measured; see `loading.openvino_settings`.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shrinkkit import quiet
from shrinkkit.core.variant import LayerPrecision
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes import loading, snippets
from shrinkkit.runtimes.loading import GROUP_SIZE, PRECISION
from shrinkkit.runtimes.openvino import openvinograph
from shrinkkit.tasks.modules import Example

HALF = {"float16": "f16", "bfloat16": "bf16"}
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
    import openvino
    from openvino import opset13 as ops

    width, core = 64, openvino.Core()
    inputs, results = [], []
    for rows, shape in (([8, width], [32, width]), ([1, width, 4, 4], [32, width, 1, 1])):
        x = ops.parameter(rows, np.float32)
        rounded = ops.fake_quantize(x, *(np.float32(limit) for limit in (0, 255, 0, 255)), 256)
        weight = ops.convert(ops.constant(np.full(shape, 127, np.int8)), "f32")
        weight = ops.multiply(weight, np.full([32, *[1] * (len(shape) - 1)], 1 / 127, np.float32))
        zeros, ones = [0, 0], [1, 1]
        convolution = partial(ops.convolution, strides=ones, pads_begin=zeros, pads_end=zeros, dilations=ones)
        made = ops.matmul(rounded, weight, False, True) if len(shape) == 2 else convolution(rounded, weight)
        inputs.append(x)
        results.append(ops.result(made))
    graph = openvino.Model(results, inputs, "largest")
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([np.full(x.shape, 255, np.float32) for x in inputs])
    return any(abs(sums / (255 * width) - 1).max() > 0.01 for sums in found.values())


def write(
    source: Path,
    path: Path,
    model: nn.Module,
    *,
    method: str,
    calibration: Sequence[Example],
    skipped: frozenset[str],
    narrow: bool = False,
) -> Mapping[str, LayerPrecision]:
    """Write the FP32 ONNX model `source` as an OpenVINO model in fewer bits, and return how it really runs.

    Args:
        source: As `artifacts.write_onnx` leaves it: nodes carry their layer's name. Left unchanged.
        path: Where the model goes, `.xml`; its weights go beside it, as `.bin`.
        model: The float model that `source` was made from.
        method: `dynamic-int8`, `static-int8`, `float16` or `bfloat16`.
        calibration: Inputs that set the ranges of activations, for `static-int8`.
        skipped: Names of modules to leave in float.
        narrow: Give weights 7 bits in `static-int8`, so that no sum of two products exceeds 16 bits.

    Returns:
        How OpenVINO runs each layer here, by the graph that it compiled.

    Raises:
        Unsupported: NNCF rejects the model, or has nothing to quantize in it.
    """
    import openvino

    core = openvino.Core()
    graph = core.read_model(source)
    openvinograph.name_last(graph, source)
    try:
        with quiet.libraries():
            made = _quantized(graph, method, calibration, skipped, narrow=narrow)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unsupported(f"NNCF rejects this model for {method}: {brief(error)}.") from error
    for key in _DROPPED:
        if key in made.rt_info:
            del made.rt_info[key]
    _name_alike(made)
    openvino.save_model(made, path, compress_to_fp16=method in HALF)
    # Indentation is a seventh of the description.
    path.write_text(re.sub(r">\s+<", "><", path.read_text(encoding="utf-8")), encoding="utf-8")
    kept = core.read_model(path)
    threads = torch.get_num_threads()
    compiled = core.compile_model(kept, "CPU", loading.openvino_settings(kept, threads))
    dynamic = method == "dynamic-int8" and _quantizes_activations(core, kept, calibration, threads)
    found = openvinograph.precision(compiled, model, method=method, skipped=skipped, dynamic=dynamic)
    if method in HALF and not any(p.runs_as == method for p in found.values()):
        found = {name: LayerPrecision("float32", f"this processor has no {method} arithmetic") for name in found}
    return found


def _quantized(
    graph: Any, method: str, calibration: Sequence[Example], skipped: frozenset[str], *, narrow: bool
) -> Any:
    """Return `graph` in the form of `method`, with the settings that it is to run with noted in it."""
    if method in HALF:
        if skipped:
            raise Unsupported(
                f"OpenVINO has one precision for a whole model, so {method} takes no `skip`. Leave it out."
            )
        graph.set_rt_info(HALF[method], PRECISION)
        return graph
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    left = [op.get_friendly_name() for op in graph.get_ops() if _is_of(op.get_friendly_name(), skipped)]
    if method == "static-int8":
        data = nncf.Dataset(list(calibration), lambda batch: [x.contiguous().numpy() for x in batch])
        return nncf.quantize(
            graph,
            data,
            subset_size=len(calibration),
            # Left alone, NNCF does so in the first layer only.
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE) if narrow else None,
            model_type=nncf.ModelType.TRANSFORMER if _attends(graph) else None,
            ignored_scope=nncf.IgnoredScope(names=left, validate=False) if left else None,
        )
    # What is no matrix product would be stored in integers and computed in float.
    others = [op.get_friendly_name() for op in graph.get_ops() if op.get_type_name() in _STORED_ONLY]
    graph.set_rt_info(snippets.GROUP_SIZE, GROUP_SIZE)
    return nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode.INT8_SYM,
        ignored_scope=nncf.IgnoredScope(names=[*left, *others], validate=False),
    )


def _name_alike(graph: Any) -> None:
    """Name what belongs to no layer by its place, so that the same model gives the same file at any time."""
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


def _quantizes_activations(core: Any, graph: Any, calibration: Sequence[Example], threads: int) -> bool:
    """Return whether the activations are rounded to integers here, which the outputs tell: nothing else differs."""
    settings = loading.openvino_settings(graph, threads)
    feed = [np.asarray(x) for x in calibration[0]]
    first, second = (
        list(core.compile_model(graph, "CPU", settings | changed)(feed).values())
        for changed in ({}, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
    )
    return any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
