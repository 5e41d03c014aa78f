"""Quantized copies of a model for torch, and quantized ONNX graphs for ONNX Runtime.

Nothing falls back: what a method cannot do for a model is an `Unsupported` error that says what is possible.
"""

import contextlib
import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shrinkkit import outputs, quiet
from shrinkkit.errors import Unsupported, brief
from shrinkkit.tasks import Example, matching

RECURRENT = (nn.LSTM, nn.GRU)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def dynamic_int8(
    model: nn.Module, example: Example, *, skip: Sequence[str] = (), engine: str | None = None
) -> nn.Module:
    """Return a CPU copy of `model` whose Linear, LSTM and GRU layers compute in int8.

    Weights become int8 (per output channel for Linear), activations are quantized on the fly at each
    call. `model` is left unchanged, on its device. For convolutions see `static_int8`.

    Args:
        model: Float model in eval mode, on any device.
        example: Positional inputs of one call, batch first; used to measure the engines.
        skip: Patterns of layers to leave in float.
        engine: One of torch's quantized engines; None measures those of this machine and takes the fastest.

    Returns:
        A quantized copy on the CPU. It runs with the engine that `engine_of` names.

    Raises:
        InvalidInput: A pattern in `skip` matches no layer.
        Unsupported: The model has no such layer, or does not run once they are quantized.
    """
    from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig, quantize_dynamic

    left = _skipped(model, skip)
    layers = {
        name: default_dynamic_qconfig if isinstance(module, RECURRENT) else per_channel_dynamic_qconfig
        for name, module in model.named_modules()
        # NonDynamicallyQuantizableLinear, inside nn.MultiheadAttention, is read by code that wants a float weight.
        if (type(module) is nn.Linear or isinstance(module, RECURRENT)) and name not in left
    }
    if not layers:
        raise Unsupported(
            "`dynamic_int8` quantizes Linear, LSTM and GRU layers, and this model has none"
            + (" outside `skip`" if skip else "")
            + f". {_possible(model, 'dynamic-int8')}"
        )

    def convert(engine: str) -> nn.Module:
        with using_engine(engine), quiet.libraries():
            quantized: nn.Module = quantize_dynamic(_on_cpu(model), dict(layers))  # type: ignore[no-untyped-call]
            return quantized

    return _fastest(convert, example, engine, "dynamic_int8")


def static_int8(
    model: nn.Module,
    example: Example,
    calibration: Iterable[Example],
    *,
    skip: Sequence[str] = (),
    engine: str | None = None,
) -> nn.Module:
    """Return a CPU copy of `model` whose convolutions and Linear layers compute in int8 throughout.

    Transposed convolutions stay in float, since torch's integer kernels for them compute wrong numbers. The ranges of
    activations are fixed from `calibration`, so layers pass integers to each other. `model` is left unchanged, on its
    device. For recurrent layers see `dynamic_int8`.

    Args:
        model: Float model in eval mode that torch.fx can trace, on any device.
        example: Positional inputs of one call, batch first.
        calibration: Inputs to observe; some tens of typical examples in all. Read once.
        skip: Patterns of layers to leave in float.
        engine: One of torch's quantized engines; None measures those of this machine and takes the fastest.

    Returns:
        A quantized torch.fx.GraphModule on the CPU. It runs with the engine that `engine_of` names.

    Raises:
        InvalidInput: A pattern in `skip` matches no layer.
        Unsupported: torch.fx cannot trace the model, or nothing in it can be quantized.
    """
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    left = _skipped(model, skip)
    batches = [tuple(x.cpu() for x in batch) for batch in calibration]
    if not batches:
        raise Unsupported("`static_int8` fixes the ranges of activations from `calibration`, and it yields no batch.")
    inputs = tuple(x.cpu() for x in example)

    def convert(engine: str) -> nn.Module:
        mapping = get_default_qconfig_mapping(engine)
        for kind in TRANSPOSED:
            # Their integer kernels are wrong: by up to 90 steps, or from call to call, depending on the engine.
            mapping.set_object_type(kind, None)
        for name in left:
            mapping.set_module_name(name, None)
        with using_engine(engine), quiet.libraries(), torch.inference_mode():
            try:
                observed = prepare_fx(_on_cpu(model), mapping, inputs)
            except (torch.fx.proxy.TraceError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
                raise Unsupported(
                    f"`static_int8` needs a model that torch.fx can trace; this one stops it with: {brief(error)}. "
                    f"{_possible(model, 'static-int8')}"
                ) from error
            for batch in batches:
                observed(*batch)
            quantized: nn.Module = convert_fx(observed)
        if not any(is_int8(module) for module in quantized.modules()):
            raise Unsupported(
                "`static_int8` quantizes convolutions and Linear layers, and found none in this model"
                + (" outside `skip`" if skip else "")
                + f". {_possible(model, 'static-int8')}"
            )
        return quantized

    return _fastest(convert, inputs, engine, "static_int8")


class HalfPrecision(nn.Module):
    """A model that computes in 16 bits behind float32 inputs and outputs, so that it can stand in for the original."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Hold `model`, which must already be in `dtype`."""
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Return the model's outputs, floating ones as float32."""
        cast = [x.to(self.dtype) if x.is_floating_point() else x for x in inputs]
        return outputs.convert(self.model(*cast), lambda y: y.float() if y.is_floating_point() else y)


def half(model: nn.Module, example: Example, *, dtype: str) -> HalfPrecision:
    """Return a copy of `model` that stores its weights and computes in 16-bit floats.

    Inputs and outputs stay float32, and the casts are part of what is measured. `model` is left unchanged.

    Args:
        model: Model in eval mode, on any device.
        example: Positional inputs of one call, batch first, on the model's device.
        dtype: `float16` or `bfloat16`.

    Raises:
        Unsupported: `dtype` is another one, or the device has no kernel for one of the model's operators.
    """
    if dtype not in HALF:
        raise Unsupported(f"`dtype` must be 'float16' or 'bfloat16', got {dtype!r}. For 8 bits see `dynamic_int8`.")
    result = HalfPrecision(copy.deepcopy(model).to(HALF[dtype]), HALF[dtype])
    try:
        with torch.inference_mode():
            result(*example)
    except RuntimeError as error:
        raise Unsupported(
            f"`half` needs {dtype} kernels for every operator of the model; on this device one is missing: "
            f"{brief(error)}. {_possible(model, dtype)}"
        ) from error
    return result


def onnx_int8(
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
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    try:
        with quiet.libraries():
            quant_pre_process(str(source), str(prepared))
            graph = onnx.load(str(prepared)).graph
            left = [n.name for n in graph.node if any(i.startswith(f"{s}.") for i in n.input for s in skip)]
            if method == "dynamic-int8":
                _onnx_dynamic(prepared, path, left)
            else:
                # Products of two activations, as in attention, take longer in integers than they save.
                stored = {i.name for i in graph.initializer}
                left += [n.name for n in graph.node if n.op_type == "MatMul" and not stored & set(n.input)]
                _onnx_static(prepared, path, left, [i.name for i in graph.input], calibration)
    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise Unsupported(f"ONNX Runtime's quantizer rejects this model for {method}: {brief(error)}.") from error
    finally:
        prepared.unlink(missing_ok=True)


def _onnx_dynamic(prepared: Path, path: Path, left: Sequence[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(prepared),
        str(path),
        op_types_to_quantize=["MatMul", "Gemm", "LSTM"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        # It turns a Gemm into a MatMul of another name before it looks at what to exclude.
        nodes_to_exclude=[*left, *(f"{name}_MatMul" for name in left)],
    )


def _onnx_static(
    prepared: Path, path: Path, left: Sequence[str], inputs: Sequence[str], calibration: Iterable[Example]
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            if batch is None:
                return None
            return {name: x.cpu().numpy() for name, x in zip(inputs, batch, strict=True)}

    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        # int8 activations leave the QDQ pattern unfused and run slower than float in ONNX Runtime 1.32.
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=_static_operators(),
        nodes_to_exclude=list(left),
    )


def is_int8(module: nn.Module) -> bool:
    """Return whether `module` is one of torch's layers that compute in int8."""
    kind = type(module)
    integer = kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
    # What torch could not lower keeps the name and computes in float.
    integer &= ".reference." not in kind.__module__
    # The borders of the integer part, and what a quantized Linear keeps its weight in, are no layers.
    return integer and kind.__name__ not in {"Quantize", "DeQuantize", "LinearPackedParams", "QFunctional"}


def engine_of(model: nn.Module) -> str:
    """Return the quantized engine that `model` was packed for, '' for a model that is not quantized."""
    return str(getattr(model, "quantized_engine", ""))


def engine_times_ms(model: nn.Module) -> dict[str, float]:
    """Return the fastest call, in ms, of each engine that was tried for `model`; empty when none was compared."""
    return dict(getattr(model, "quantized_engine_times_ms", {}))


def _fastest(convert: Any, example: Example, engine: str | None, verb: str) -> nn.Module:
    """Return the conversion for the engine whose fastest of interleaved calls is the shortest."""
    allowed = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if engine is not None and engine not in allowed:
        raise Unsupported(f"`engine` must be one of {', '.join(allowed)} on this machine, got {engine!r}.")
    inputs = tuple(x.cpu() for x in example)
    candidates: dict[str, nn.Module] = {}
    failures: dict[str, str] = {}
    with torch.inference_mode(), quiet.libraries(), plain_attention():
        for name in [engine] if engine else allowed:
            with using_engine(name):
                try:
                    candidate = convert(name)
                    candidate(*inputs)
                except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
                    failures[name] = brief(error)
                else:
                    candidates[name] = candidate
        if not candidates:
            raise Unsupported(
                f"`{verb}`: the quantized model runs with no engine of this machine: {failures}. "
                "Leave the layer out with `skip`, or use another method."
            )
        best = _fastest_calls_ms(candidates, inputs)
    name = min(best, key=best.__getitem__)
    chosen = candidates[name].eval()
    # Packed weights are tied to an engine, and torch keeps the engine in a global: the model has to carry its own.
    chosen.__dict__.update(quantized_engine=name, quantized_engine_times_ms=best)
    return chosen


def _fastest_calls_ms(candidates: dict[str, nn.Module], inputs: Example) -> dict[str, float]:
    """Return the fastest of up to 30 interleaved calls of each candidate, within about 2 s."""
    best = dict.fromkeys(candidates, float("inf"))
    deadline = time.perf_counter() + 2.0
    for _ in range(30):
        for name, candidate in candidates.items():
            with using_engine(name):
                start = time.perf_counter()
                candidate(*inputs)
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
        if time.perf_counter() > deadline:
            break
    return best


@contextlib.contextmanager
def using_engine(name: str) -> Iterator[None]:
    """Make `name` torch's quantized engine while the block runs; '' leaves the one in force."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name or before
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off the fused inference path of nn.MultiheadAttention, which bypasses the layers inside it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _on_cpu(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu().float()


def _skipped(model: nn.Module, skip: Sequence[str]) -> frozenset[str]:
    return frozenset(matching([name for name, _ in model.named_modules() if name], skip)) if skip else frozenset()


def _possible(model: nn.Module, method: str) -> str:
    """Return a sentence that lists the methods with something to quantize in `model`, but for `method`."""
    kinds = tuple(model.modules())
    options = ["float16", "bfloat16"]
    if any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) for m in kinds):
        options.insert(0, "static-int8")
    if any(isinstance(m, (nn.Linear, *RECURRENT)) for m in kinds):
        options.insert(0, "dynamic-int8")
    return f"Possible for this model: {', '.join(o for o in options if o != method)}."


def _static_operators() -> list[str]:
    from onnxruntime.quantization.registry import QDQRegistry

    # Their integer forms are slower or less exact than float, and ONNX Runtime has kernels for few of them.
    float_only = {"LayerNormalization", "InstanceNormalization", "Softmax", "EmbedLayerNormalization", "Attention"}
    return sorted(set(QDQRegistry) - float_only)
