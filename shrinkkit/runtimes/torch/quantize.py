"""Quantized copies of a model for torch. For quantized ONNX graphs see `onnxruntime.build`.

Nothing falls back: what a method cannot do for a model is an `Unsupported` error that says what is possible.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from shrinkkit import quiet
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes.base import HALF_DTYPES
from shrinkkit.runtimes.layers import RECURRENT, TRANSPOSED
from shrinkkit.tasks import copies, modules, outputs
from shrinkkit.tasks.modules import Example, matching

_TOGETHER_BYTES = 100_000_000
"""Weights of a model whose int8 copies for all engines may be in memory at once, so that their calls interleave."""
_PREFERENCE = ("x86", "fbgemm", "onednn", "qnnpack")
_TIMES_MS: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()
"""By model. An attribute would be scripted and saved, so that the same model gave another file each time."""
_FAR_BEHIND, _CLEARLY_SLOWER = 2.0, 1.1
"""Ratios of times from which an engine is no longer timed, and up to which the order of preference decides."""


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
        engine: One of torch's quantized engines; None measures those that are exact here and takes the fastest.

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
            quantized: nn.Module = quantize_dynamic(  # type: ignore[no-untyped-call]
                copies.shallow_copy(model, device="cpu", dtype=torch.float32), dict(layers), inplace=True
            )
            return quantized

    engines = _engines(engine, "dynamic-int8")
    return _fastest(convert, model, example, engines, "dynamic_int8")


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
        engine: One of torch's quantized engines; None measures those that are exact here and takes the fastest.

    Returns:
        A quantized torch.fx.GraphModule on the CPU. It runs with the engine that `engine_of` names.

    Raises:
        InvalidInput: A pattern in `skip` matches no layer.
        Unsupported: torch.fx cannot trace the model, or nothing in it can be quantized.
    """
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.fx.utils import assert_and_get_unique_device
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
                shared = copies.shallow_copy(model, device="cpu", dtype=torch.float32)
                observed = prepare_fx(shared, mapping, inputs)
            except (torch.fx.proxy.TraceError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
                raise Unsupported(
                    f"`static_int8` needs a model that torch.fx can trace; this one stops it with: {brief(error)}. "
                    f"{_possible(model, 'static-int8')}"
                ) from error
            for batch in batches:
                observed(*batch)
            quantized: nn.Module = convert_fx(observed)
            # It keeps every model that it has ever seen.
            getattr(assert_and_get_unique_device, "cache_clear", lambda: None)()
        if not any(is_int8(module) for module in quantized.modules()):
            raise Unsupported(
                "`static_int8` quantizes convolutions and Linear layers, and found none in this model"
                + (" outside `skip`" if skip else "")
                + f". {_possible(model, 'static-int8')}"
            )
        return quantized

    return _fastest(convert, model, inputs, _engines(engine, "static-int8"), "static_int8")


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

    Returns:
        A module with float32 inputs and outputs around a copy of `model` in 16 bits, on the same device.

    Raises:
        Unsupported: `dtype` is another one, or the device has no kernel for one of the model's operators.
    """
    if dtype not in HALF_DTYPES:
        raise Unsupported(f"`dtype` must be 'float16' or 'bfloat16', got {dtype!r}. For 8 bits see `dynamic_int8`.")
    result = HalfPrecision(copies.shallow_copy(model, dtype=HALF_DTYPES[dtype]), HALF_DTYPES[dtype])
    copies.unshare(result, model)
    try:
        with torch.inference_mode():
            result(*example)
    except RuntimeError as error:
        raise Unsupported(
            f"`half` needs {dtype} kernels for every operator of the model; on this device one is missing: "
            f"{brief(error)}. {_possible(model, dtype)}"
        ) from error
    return result


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
    return dict(_TIMES_MS.get(model, {}))


def supported_engines() -> list[str]:
    """Return torch's quantized engines on this machine, in the order in which equally fast ones are preferred."""
    engines = set(torch.backends.quantized.supported_engines) - {"none"}
    return sorted(engines, key=lambda engine: (*_PREFERENCE, engine).index(engine))


def narrow(engine: str, method: str) -> bool:
    """Return whether an engine's activations have 7 bits, so that no sum of two products exceeds 16 bits.

    Args:
        engine: One of `supported_engines`.
        method: `dynamic-int8` or `static-int8`.
    """
    from torch.ao.quantization import get_default_qconfig

    if method == "dynamic-int8":
        # qnnpack ignores torch's request for 7 bits.
        return engine != "qnnpack"
    with quiet.libraries():
        observer = get_default_qconfig(engine).activation()  # type: ignore[no-untyped-call]
    return bool(observer.quant_max < 255)


@functools.cache
def saturates(engine: str) -> bool:
    """Return whether kernels of an engine return wrong sums on this processor when all operands have 8 bits.

    Each kind of kernel sums the largest products, of 255 and 127. Kernels that add two of them in 16 bits saturate.
    """
    width, scale = 64, 1 / 127
    sums = []
    with using_engine(engine), torch.inference_mode(), quiet.libraries():
        for shape, groups in (((8, width), 0), ((8, width, 3, 3), 1), ((8, width, 3, 3), width)):
            x = torch.quantize_per_tensor(torch.ones(shape), 1 / 255, 0, torch.quint8)
            ones = torch.ones(width, width // (groups or 1), *shape[2:])
            scales, zeros = torch.full((width,), scale, dtype=torch.double), torch.zeros(width, dtype=torch.long)
            weight = torch.quantize_per_channel(ones, scales, zeros, 0, torch.qint8)
            unit = ones[0].numel() / 200
            if groups:
                packed = torch.ops.quantized.conv2d_prepack(weight, None, [1, 1], [0, 0], [1, 1], groups)
                sums.append(torch.ops.quantized.conv2d(x, packed, unit, 0))
            else:
                sums.append(torch.ops.quantized.linear(x, torch.ops.quantized.linear_prepack(weight, None), unit, 0))
    return any(bool((output.int_repr().int() - 200).abs().max() > 1) for output in sums)


def is_exact(engine: str, method: str) -> bool:
    """Return whether an engine computes what its integers mean on this processor, whatever the inputs."""
    return narrow(engine, method) or not saturates(engine)


def _engines(engine: str | None, method: str) -> list[str]:
    """Return the engines to choose from: the one asked for, or those that are exact here, or all if none is."""
    allowed = supported_engines()
    if engine is not None and engine not in allowed:
        raise Unsupported(f"`engine` must be one of {', '.join(allowed)} on this machine, got {engine!r}.")
    return [engine] if engine else [name for name in allowed if is_exact(name, method)] or allowed


def _fastest(
    convert: Callable[[str], nn.Module], model: nn.Module, example: Example, engines: Sequence[str], verb: str
) -> nn.Module:
    """Return the conversion of `model` for the first of `engines` that none is clearly faster than."""
    inputs = tuple(x.cpu() for x in example)
    small = sum(p.nbytes for p in model.parameters()) <= _TOGETHER_BYTES
    with torch.inference_mode(), quiet.libraries(), modules.plain_attention():
        candidates = _Candidates(convert, inputs, engines)
        best = _side_by_side(candidates) if small else _there_and_back(candidates)
        if not best:
            raise Unsupported(
                f"`{verb}`: the quantized model runs with no engine of this machine: {candidates.failures}. "
                "Leave the layer out with `skip`, or use another method."
            )
        name = next(e for e in engines if best.get(e, float("inf")) <= _CLEARLY_SLOWER * min(best.values()))
        candidates.forget(but=name)
        candidates.has(name)
    chosen = candidates.kept[name].eval()
    copies.unshare(chosen, model)
    # Packed weights are tied to an engine, and torch keeps the engine in a global: the model has to carry its own.
    chosen.__dict__["quantized_engine"] = name
    _TIMES_MS[chosen] = best
    return chosen


class _Candidates:
    """Conversions of one model for several engines, made when they are asked for."""

    def __init__(self, convert: Callable[[str], nn.Module], inputs: Example, engines: Sequence[str]) -> None:
        self.failures: dict[str, str] = {}
        self.engines = engines
        self.kept: dict[str, nn.Module] = {}
        self._convert, self._inputs = convert, inputs

    def has(self, engine: str) -> bool:
        """Return whether there is a conversion for `engine` that runs and can be saved, after making it if need be."""
        if engine not in self.kept and engine not in self.failures:
            with using_engine(engine):
                try:
                    model = self._convert(engine)
                    model(*self._inputs)
                    _unpack(model)
                except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
                    self.failures[engine] = brief(error)
                else:
                    self.kept[engine] = model
        return engine in self.kept

    def forget(self, *, but: str) -> None:
        """Let go of all conversions but the one for an engine."""
        self.kept = {name: model for name, model in self.kept.items() if name == but}
        # Graphs of torch.fx refer to themselves.
        copies.trim_heap()

    def time_ms(self, engine: str) -> float:
        """Return how long one call of a conversion that is there takes."""
        with using_engine(engine):
            start = time.perf_counter()
            self.kept[engine](*self._inputs)
            return 1e3 * (time.perf_counter() - start)


def _side_by_side(candidates: _Candidates) -> dict[str, float]:
    """Return the fastest of up to 30 interleaved calls of each candidate, in ms, within about 2 s.

    Those that are far behind are not called again, so that the others have calls enough.
    """
    best = {name: float("inf") for name in candidates.engines if candidates.has(name)}
    deadline = time.perf_counter() + 2.0
    for turn in range(30):
        for name in [name for name in best if turn < 2 or best[name] < _FAR_BEHIND * min(best.values())]:
            best[name] = min(best[name], candidates.time_ms(name))
        if time.perf_counter() > deadline:
            break
    return best


def _there_and_back(candidates: _Candidates) -> dict[str, float]:
    """Return the fastest call of each candidate, in ms, with no two of them in memory at once.

    Each has up to 10 calls within about a second, and once more in the opposite order, so that a machine that becomes
    slower favours none; those that are far behind are not converted again.
    """
    best: dict[str, float] = {}
    for name in (*candidates.engines, *reversed(candidates.engines)):
        if best.get(name, 0.0) > _FAR_BEHIND * min(best.values(), default=0.0) or name in candidates.failures:
            continue
        candidates.forget(but=name)
        if not candidates.has(name):
            continue
        deadline = time.perf_counter() + 1.0
        for _ in range(10):
            best[name] = min(best.get(name, float("inf")), candidates.time_ms(name))
            if time.perf_counter() > deadline:
                break
    return best


def _unpack(model: nn.Module) -> None:
    """Raise if an integer layer of `model` cannot give its weights back, as it has to when it is saved."""
    for module in model.modules():
        if unpack := getattr(module, "_weight_bias", None):
            unpack()


@contextlib.contextmanager
def using_engine(name: str) -> Iterator[None]:
    """Make `name` torch's quantized engine while the block runs; '' leaves the one in force."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name or before
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


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
