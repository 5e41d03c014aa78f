"""Model files for OpenVINO: int8 by NNCF, OpenVINO's quantizer, and 16-bit floats.

A file states the settings that it is measured with; see `OpenVino.settings`.
"""

import functools
import re
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_moc_transformations

from shrinkkit import quiet
from shrinkkit.core.variant import LayerPrecision
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes.base import BuildRequest, BuiltFile, output_error, prove, refuse_float, refuse_unfaithful
from shrinkkit.runtimes.onnx.export import TOLERANCE, build_float32, source
from shrinkkit.runtimes.openvino import load, profile
from shrinkkit.runtimes.openvino.spec import GROUP_SIZE, PRECISION, OpenVino
from shrinkkit.tasks.modules import Example

HALF = {"float16": "f16", "bfloat16": "bf16"}
GROUP_NUMBERS = 64
"""Numbers of an activation that share a range in dynamic int8. Of 32, 64 and whole rows, 64 was fastest."""
FAITHFUL = 0.1
"""Error of the outputs up to which the first settings of static int8 are not compared with others."""
_SECOND = {True: "without SmoothQuant", False: "with asymmetric ranges of activations"}
"""The other settings of static int8, by whether `_attends`."""
_STORED_ONLY = frozenset("Convolution GroupConvolution ConvolutionBackpropData GroupConvolutionBackpropData".split())
"""Operators whose weights NNCF would store in integers and OpenVINO turn back into floats."""
_RECURRENT = ("LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell")
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
    exported = source(request)
    path = request.folder / "model.openvino.xml"
    weights = path.with_suffix(".bin")
    static = request.precision == "static-int8"
    narrow = static and saturates()
    layers, form = write(request, exported.path, path, narrow=narrow)
    refuse_float(request, "OpenVINO", layers, path, beside=[weights])
    reason = narrow * "weights have 7 bits, because int8 accumulators saturate on this processor with 8"
    # Dynamic int8 is computed in float on processors without VNNI.
    options: dict[str, Any] = {"exact_anywhere": narrow or not static, "notes": [exported.note, reason, form]}
    options |= {"format": "openvino", "tolerance": TOLERANCE, "layers": layers}
    return prove(request, load.load, path, beside=[weights], **options)


def write(
    request: BuildRequest, exported: Path, path: Path, *, narrow: bool = False
) -> tuple[Mapping[str, LayerPrecision], str]:
    """Write the ONNX model `exported`, of `onnx.export.write`, in the precision of `request` to `path`, an `.xml`.

    Its weights go into a `.bin`. Static int8 has several settings. The first that is faithful is used, or the most
    faithful. With `narrow`, weights have 7 bits, so that no sum of two products exceeds 16 bits. Returns how OpenVINO
    runs each layer here, and a note on the settings ('' for the first). Raises Unsupported if NNCF rejects the model,
    has nothing to quantize in it, or changes its outputs too much.
    """
    core = openvino.Core()
    graph = load.read(core, exported)
    profile.restore_names(graph, exported)
    # Folds what NNCF would not recognise as weights: those of LSTMs, and transposed ones.
    apply_moc_transformations(graph, cf=True)
    candidates: dict[str, tuple[float, Path]] = {}
    with tempfile.TemporaryDirectory(dir=request.scratch) as scratch:
        for note in ("", _SECOND[_attends(graph)]) if request.precision == "static-int8" else ("",):
            candidate = Path(scratch) / str(len(candidates)) / path.name
            candidate.parent.mkdir()
            _save(_quantized(graph, request, narrow=narrow, second=bool(note)), request, candidate)
            error = output_error(request, load.load, candidate) if "int8" in request.precision else 0.0
            candidates[note] = error, candidate.parent
            if error <= FAITHFUL:
                break
        note = min(candidates, key=candidates.__getitem__)
        error, folder = candidates[note]
        refuse_unfaithful(request, "OpenVINO", error)
        for file in folder.iterdir():
            file.replace(path.parent / file.name)
    settings = OpenVino().settings(path, threads=torch.get_num_threads())
    saved = core.read_model(path)
    dynamic = request.precision == "dynamic-int8" and _quantizes_activations(core, saved, request.example, settings)
    rows = profile.layer_precisions(core.compile_model(saved, "CPU", settings), request, dynamic=dynamic)
    if request.precision in HALF and not any(p.runs_as == request.precision for p in rows.values()):
        why = f"this processor has no {request.precision} arithmetic"
        return {name: LayerPrecision("float32", why) for name in rows}, note
    return rows, note


def _save(graph: Any, request: BuildRequest, path: Path) -> None:
    """Write `graph` without what differs from one time to the next."""
    for key in _DROPPED:
        if key in graph.rt_info:
            del graph.rt_info[key]
    for number, op in enumerate(graph.get_ordered_ops()):
        kind = op.get_type_name()
        # Those of layers have stable names.
        if kind == "Constant" or ("/" not in op.get_friendly_name() and kind not in ("Parameter", "Result")):
            op.set_friendly_name(f"{kind}_{number}")
    openvino.save_model(graph, path, compress_to_fp16=request.precision in HALF)
    # Indentation is a seventh of the description.
    path.write_text(re.sub(r">\s+<", "><", path.read_text(encoding="utf-8")), encoding="utf-8")


def _quantized(graph: Any, request: BuildRequest, *, narrow: bool, second: bool) -> Any:
    """Return `graph` in the precision of `request`, with the settings that it is to run with stated in it."""
    if request.precision in HALF:
        if request.skipped:
            raise Unsupported(
                f"OpenVINO has one precision for a model: {request.precision} takes no `skip`. Leave it out."
            )
        graph.set_rt_info(HALF[request.precision], PRECISION)
        return graph
    try:
        with quiet.libraries():
            return _in_integers(graph, request, narrow=narrow, second=second)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unsupported(f"NNCF rejects this model for {request.precision}: {brief(error)}.") from error


def _in_integers(graph: Any, request: BuildRequest, *, narrow: bool, second: bool) -> Any:
    """Return what NNCF makes of `graph`; `second` takes the other settings, see `_SECOND`."""
    import nncf
    from nncf.quantization import advanced_parameters as advanced

    names, inside = [op.get_friendly_name() for op in graph.get_ops()], tuple(f"{name}." for name in request.skipped)
    skipped = [name for name in names if f"{name.partition('/')[0]}.".startswith(inside)]
    if request.precision == "static-int8":
        calibration = request.calibration or (request.example,)
        attends = _attends(graph)
        return nncf.quantize(
            graph,
            nncf.Dataset(list(calibration), lambda batch: [x.contiguous().numpy() for x in batch]),
            subset_size=len(calibration),
            preset=nncf.QuantizationPreset.MIXED if second and not attends else None,
            advanced_parameters=advanced.AdvancedQuantizationParameters(
                # By default, NNCF does so in the first layer only.
                overflow_fix=advanced.OverflowFix.ENABLE if narrow else None,
                smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(*([-1, -1] if second and attends else [])),
            ),
            model_type=nncf.ModelType.TRANSFORMER if attends else None,
            ignored_scope=nncf.IgnoredScope(names=skipped, validate=False) if skipped else None,
        )
    # Convolutions would be stored in integers and computed in float.
    others = [op.get_friendly_name() for op in graph.get_ops() if op.get_type_name() in _STORED_ONLY]
    graph.set_rt_info(GROUP_NUMBERS, GROUP_SIZE)
    ignored = nncf.IgnoredScope(names=[*skipped, *others], validate=False)
    return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored)


def _attends(graph: Any) -> bool:
    """Return whether `graph` multiplies activations with each other, or feeds them back: NNCF's "transformers"."""
    for op in graph.get_ops():
        kind, inputs = op.get_type_name(), [port.get_node().get_type_name() for port in op.input_values()]
        if kind in _RECURRENT or (kind == "MatMul" and "Constant" not in inputs):
            return True
    return False


def _quantizes_activations(core: Any, graph: Any, example: Example, settings: Mapping[str, Any]) -> bool:
    """Return whether activations are rounded to integers here: whether outputs differ from those with them in float."""
    feed = [np.asarray(x) for x in example]
    first, second = (
        list(core.compile_model(graph, "CPU", {**settings, **changed})(feed).values())
        for changed in ({}, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
    )
    return any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
