"""What truly happened to a model, layer by layer, found by looking at the result and never at the request."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from shrinkkit.core.variant import LayerAudit, LayerPrecision
from shrinkkit.runtimes.torch import quantize
from shrinkkit.runtimes.torch.quantize import RECURRENT, TRANSPOSED

ROOT = "(model)"
"""Stands for the model itself where it holds parameters outside any layer."""

CHANNELS = ("out_channels", "out_features", "num_features", "hidden_size", "embedding_dim", "embed_dim", "num_channels")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of `model` that hold parameters of their own, by name, `ROOT` for the model itself."""
    return {
        name or ROOT: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def compare(
    before: nn.Module,
    after: nn.Module,
    precision: Mapping[str, Mapping[str, LayerPrecision]],
    left_alone: Mapping[str, str] = MappingProxyType({}),
) -> tuple[LayerAudit, ...]:
    """Return one row for each layer of `before` and `after`; a new one follows the layer whose place it takes.

    Args:
        before: The task's model.
        after: The float model that the files were made from.
        precision: How each runtime runs each layer, by runtime and layer; an absent layer runs as `after` has it.
        left_alone: Why a layer that a stage could have changed was left as it was, by layer.
    """
    old, new = layers(before), layers(after)
    added = [name for name in new if name not in old]
    names: list[str] = []
    for name in old:
        names += [name, *(inner for inner in added if inner.startswith(f"{name}."))]
    return tuple(
        _row(name, old.get(name), new.get(name), precision, left_alone.get(name, ""))
        for name in dict.fromkeys([*names, *added])
    )


def _row(
    name: str,
    old: nn.Module | None,
    new: nn.Module | None,
    precision: Mapping[str, Mapping[str, LayerPrecision]],
    left_alone: str,
) -> LayerAudit:
    parameters = list(new.parameters(recurse=False)) if new is not None else []
    weights = [p for p in parameters if p.dim() > 1]
    count = sum(p.numel() for p in weights)
    change = "added" if old is None else "removed" if new is None else ""
    if old is not None and new is not None and type(old) is not type(new):
        change = f"was {type(old).__name__}"
    plain = LayerPrecision(str(parameters[0].dtype).removeprefix("torch.")) if parameters else None
    return LayerAudit(
        layer=name,
        kind=type(old if new is None else new).__name__,
        parameters_before=sum(p.numel() for p in old.parameters(recurse=False)) if old is not None else 0,
        parameters=sum(p.numel() for p in parameters),
        channels_before=_channels(old),
        channels=_channels(new),
        zeroed=sum(int((p == 0).sum()) for p in weights) / count if count else 0.0,
        precision={runtime: rows.get(name, plain) for runtime, rows in precision.items()} if plain else {},
        kept_because=left_alone,
        change=change,
    )


def torch_int8(
    model: nn.Module, quantized: nn.Module, *, method: str, skipped: frozenset[str]
) -> dict[str, LayerPrecision]:
    """Return how torch runs each layer of `model` once it has become `quantized`."""
    integer = {name for name, module in quantized.named_modules() if quantize.is_int8(module)}
    gone = {name for name in layers(model) if name not in dict(quantized.named_modules())}
    return {
        name: LayerPrecision("int8")
        if name in integer
        else LayerPrecision("folded", "part of the layer before it")
        if name in gone and isinstance(module, nn.modules.batchnorm._BatchNorm)
        else LayerPrecision("float32", why_float(name, module, method, "torch", skipped, _sealed(model, name)))
        for name, module in layers(model).items()
    }


def onnx_int8(
    model: nn.Module, integer_weights: frozenset[str], *, method: str, skipped: frozenset[str]
) -> dict[str, LayerPrecision]:
    """Return how ONNX Runtime runs each layer of `model`, given the weights that its graph multiplies as integers."""
    found = {}
    for name, module in layers(model).items():
        # A bidirectional or stacked LSTM is several operators; it counts as integer only if all of its matrices are.
        integer = [w for w in integer_weights if w.startswith(f"{name}.")]
        if integer:
            found[name] = LayerPrecision("int8")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            found[name] = LayerPrecision("folded", "part of the layer before it")
        else:
            found[name] = LayerPrecision("float32", why_float(name, module, method, "onnxruntime", skipped))
    return found


def _channels(module: nn.Module | None) -> int | None:
    for attribute in CHANNELS:
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else None


def _sealed(model: nn.Module, name: str) -> str:
    """Return the type of the torch layer that layer `name` is a part of, '' if it stands by itself."""
    modules = dict(model.named_modules())
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = modules[".".join(parts[:depth])]
        plain = isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        if type(parent).__module__.startswith("torch.nn.modules.") and not plain:
            return type(parent).__name__
    return ""


def why_float(
    name: str, module: nn.Module, method: str, runtime: str, skipped: frozenset[str], sealed: str = ""
) -> str:
    """Return the reason, as far as it is known, why a layer was left in float."""
    if name in skipped:
        return "in `skip`"
    if sealed and (method == "static-int8" or type(module).__name__ == "NonDynamicallyQuantizableLinear"):
        return f"torch does not quantize inside {sealed} by this method"
    if isinstance(module, TRANSPOSED) and runtime == "torch" and method == "static-int8":
        return "torch's integer kernels for transposed convolutions compute wrong numbers"
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    if isinstance(module, RECURRENT):
        if method == "static-int8":
            return "static int8 does not cover recurrent layers; dynamic int8 does"
        if runtime == "onnxruntime" and isinstance(module, nn.GRU):
            return "ONNX Runtime has no int8 GRU"
        if runtime in ("inductor", "openvino"):
            return f"{runtime} has no int8 {type(module).__name__}"
    if convolution and method == "dynamic-int8":
        return "dynamic int8 does not cover convolutions; static int8 does"
    if not isinstance(module, (nn.Linear, *RECURRENT)) and not convolution:
        return f"int8 does not cover {type(module).__name__}"
    return f"{runtime} found no integer kernel for it here"
