"""ONNX files read for what could run code or reach files outside their folder.

Source: ONNX, "External Data".
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from shrinkkit.errors import ModelFileError, brief
from shrinkkit.runtimes.base import REMEDY, covers, refuse_content

_CONTRIBUTED = frozenset(
    "Attention BiasGelu DequantizeLinear DynamicQuantizeLSTM DynamicQuantizeMatMul EmbedLayerNormalization FastGelu "
    "FusedConv FusedGemm FusedMatMul FusedMatMulActivation GatherBlockQuantized GatherND Gelu GroupNorm "
    "GroupQueryAttention MatMulInteger16 MatMulIntegerToFloat MatMulNBits MulInteger MultiHeadAttention Pad QAttention "
    "QEmbedLayerNormalization QGemm QLinearAdd QLinearAveragePool QLinearConcat QLinearConv QLinearGlobalAveragePool "
    "QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere QuantizeLinear QuickGelu "
    "ReduceSumInteger RotaryEmbedding SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization "
    "TransposeMatMul Trilu".split()
)
"""Operators of ONNX Runtime's own that only compute; others open files or hold code for an accelerator."""
_DOMAINS = {"": "", "ai.onnx": "", "ai.onnx.ml": "ai.onnx.ml"}
_RUNTIMES = ("ai.", "com.m", "org.")


def scan(path: Path) -> None:
    """Check an ONNX file, and that the weights it refers to lie in its folder; see `base.Backend`."""
    if path.suffix != ".onnx":
        raise ModelFileError(f"{path.name} must be an .onnx file. {REMEDY}")
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except import_module("google.protobuf.message").DecodeError as error:
        raise ValueError(brief(error)) from error
    if not model.graph.output:
        raise ValueError("it has no outputs")
    # A runtime may prefer a built-in operator to a function of the same name.
    functions = {(f.domain, f.name) for f in model.functions if not f.domain.startswith(_RUNTIMES)}
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto):
            domain, kind = message.domain, message.op_type
            known = onnx.defs.has(kind, _DOMAINS[domain]) if domain in _DOMAINS else (domain, kind) in functions
            if not known and not (domain == "com.microsoft" and kind in _CONTRIBUTED):
                refuse_content("the operator", f"{domain}::{kind}")
        elif isinstance(message, onnx.TensorProto) and (message.external_data or message.data_location):
            location = {entry.key: entry.value for entry in message.external_data}
            weights = path.parent / location["location"]
            if weights.resolve().parent != path.parent.resolve() or "\\" in location["location"]:
                refuse_content("weights that lie outside its folder, at", location["location"])
            covers(weights, int(location.get("offset", 0)), int(location.get("length", 0)))


def _messages(message: Any) -> Iterator[Any]:
    """Yield `message` and every message in it, at any depth."""
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(inner)
