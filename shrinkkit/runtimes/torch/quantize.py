"""Quantized copies of a model for torch. For quantized ONNX graphs see `onnxruntime.build`.

Nothing falls back: what a method cannot do for a model is an `Unsupported` error that says what is possible.
"""

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from shrinkkit import quiet
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes.base import COMPARED_BATCHES, HALF_DTYPES, relative_error
from shrinkkit.runtimes.layers import RECURRENT
from shrinkkit.runtimes.torch import export
from shrinkkit.runtimes.torch.export import HalfPrecision
from shrinkkit.tasks import copies, modules
from shrinkkit.tasks.modules import Example, matching

_PREFERENCE = ("x86", "fbgemm", "onednn", "qnnpack")
_MOST_ERROR = 4.0
"""How many times the error of the most faithful form or engine a faster one may have: two bits."""
_CLEARLY_SLOWER = 1.1
"""Ratio of times up to which the order of preference decides between engines."""
_CHANGED = 0.1
"""Relative error from which a recurrent layer is left in float, and a note is made of a model."""
_STATIC = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


@dataclass(frozen=True)
class Conversion:
    """How a model was quantized."""

    times_ms: Mapping[str, float] = field(default_factory=dict)
    """The fastest call of each engine that was tried."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Why a layer that int8 covers stayed in float, by layer."""
    note: str = ""
    error: float = 0.0
    """`relative_error` on the calibration inputs, of static int8."""
    narrow: bool = True
    """Whether activations have 7 bits, so that no sum of two products exceeds 16 bits."""


_CONVERSIONS: WeakKeyDictionary[nn.Module, Conversion] = WeakKeyDictionary()
"""By model. An attribute would be scripted and saved, so that the same model gave another file each time."""


def dynamic_int8(
    model: nn.Module,
    example: Example,
    calibration: Iterable[Example] = (),
    *,
    skip: Sequence[str] = (),
    engine: str | None = None,
) -> nn.Module:
    """Return a CPU copy of `model` whose Linear, LSTM, GRU and Embedding layers have int8 weights.

    Weights are int8 per output channel, or per row of an Embedding. Activations are quantized on the fly at each call,
    to 7 bits, which saturate on no processor. A recurrent layer that int8 changes by more than 10 % stays in float, for
    its errors add up over time. `model` is left unchanged, on its device. For convolutions see `static_int8`.

    Args:
        model: Float model in eval mode, on any device.
        example: Positional inputs of one call, batch first; used to measure the engines.
        calibration: More inputs, on which recurrent layers are compared with float.
        skip: Patterns of layers to leave in float.
        engine: One of torch's quantized engines; None measures them and takes the fastest.

    Returns:
        A quantized copy on the CPU. It runs with the engine that `engine_of` names.

    Raises:
        InvalidInput: A pattern in `skip` matches no layer.
        Unsupported: The model has no such layer, or does not run once they are quantized.
    """
    from torch.ao.nn import quantized as nnq
    from torch.ao.nn.quantized import dynamic as nnqd
    from torch.ao.quantization import float_qparams_weight_only_qconfig, per_channel_dynamic_qconfig, quantize_dynamic

    left, names = _skipped(model, skip), dict(model.named_modules())
    base: nn.Module = copies.shallow_copy(model, device="cpu", dtype=torch.float32)
    inputs, convention, note = _on_cpu(example), None, ""
    kinds: Any = {nn.Linear: nnqd.Linear, nn.LSTM: nnqd.LSTM, nn.GRU: nnqd.GRU}
    try:
        program, note = export.export(base, inputs)
    except export.FAILURES:
        # Its layers are replaced where they are, and its source is scripted.
        pass
    else:
        base, convention = export.layered(program, base, distinct=False)
        kinds[nn.Embedding] = nnq.Embedding
    layers = {
        name: float_qparams_weight_only_qconfig if type(module) is nn.Embedding else per_channel_dynamic_qconfig
        for name, module in base.named_modules(remove_duplicate=False)
        if type(module) in kinds and export.layer_name(name, names) not in left
    }

    def convert(engine: str) -> tuple[nn.Module, float]:
        copied = copies.shallow_copy(base)
        return quantize_dynamic(copied, dict(layers), mapping=kinds, inplace=True), 0.0  # type: ignore[no-untyped-call]

    changed = _changed(base, convert, layers, [inputs, *map(_on_cpu, calibration)][:COMPARED_BATCHES])
    for name in changed:
        del layers[name]
    if not layers:
        text = "`dynamic_int8` quantizes Linear, LSTM, GRU and Embedding layers, and this model has none"
        reasons = "".join(f"; {name}: {why}" for name, why in changed.items())
        raise Unsupported(f"{text}{' outside `skip`' * bool(skip)}{reasons}. {_possible(model, 'dynamic-int8')}")
    return _fastest(convert, model, inputs, engine, "dynamic_int8", convention, Conversion(kept=changed, note=note))


def static_int8(
    model: nn.Module,
    example: Example,
    calibration: Iterable[Example],
    *,
    skip: Sequence[str] = (),
    engine: str | None = None,
) -> nn.Module:
    """Return a CPU copy of `model` whose convolutions and Linear layers compute in int8.

    The ranges of activations are fixed from `calibration`, so that layers can pass integers to each other. Ranges by
    histogram and by minimum and maximum are tried, with integers passed on between layers and without, and the most
    faithful is taken; passing integers on is faster, and may have up to 4 times the error. Activations have
    7 bits where an engine saturates with 8. Weights of an Embedding become int8 too. Transposed convolutions stay in
    float, since torch's integer kernels for them compute wrong numbers. `model` is left unchanged, on its device. For
    recurrent layers see `dynamic_int8`.

    Args:
        model: Float model in eval mode that torch can export, on any device.
        example: Positional inputs of one call, batch first.
        calibration: Inputs to observe; some tens of typical examples in all. Read once.
        skip: Patterns of layers to leave in float.
        engine: One of torch's quantized engines; None measures them and takes the fastest.

    Returns:
        A quantized torch.fx.GraphModule on the CPU. It runs with the engine that `engine_of` names.

    Raises:
        InvalidInput: A pattern in `skip` matches no layer.
        Unsupported: torch cannot export the model, or nothing in it can be quantized.
    """
    from torch.ao.quantization.fx.convert import convert as convert_fx
    from torch.ao.quantization.fx.utils import assert_and_get_unique_device
    from torch.ao.quantization.observer import HistogramObserver, MinMaxObserver

    left, names = _skipped(model, skip), dict(model.named_modules())
    batches, inputs = [_on_cpu(batch) for batch in calibration], _on_cpu(example)
    if not batches:
        raise Unsupported("`static_int8` fixes the ranges of activations from `calibration`, and it yields no batch.")
    shared = copies.shallow_copy(model, device="cpu", dtype=torch.float32)
    try:
        program, note = export.export(shared, inputs)
    except export.FAILURES as error:
        problem = f"`static_int8` needs a model that torch.export can take; this one stops it with: {brief(error)}."
        raise Unsupported(f"{problem} {_possible(model, 'static-int8')}") from error
    base, convention = export.layered(program, shared, distinct=True)
    layers = {n for n, m in base.named_modules() if type(m) in _STATIC and export.layer_name(n, names) not in left}
    if all(isinstance(base.get_submodule(name), nn.Embedding) for name in layers):
        text = f"`static_int8` found no convolutions or Linear layers in this model{' outside `skip`' * bool(skip)}"
        raise Unsupported(f"{text}. {_possible(model, 'static-int8')}")

    @functools.cache
    def most_faithful(narrow: bool) -> tuple[float, fx.GraphModule]:
        def tried(observer: Any, *, passing: bool) -> tuple[float, fx.GraphModule]:
            activation = observer.with_args(reduce_range=narrow)
            observed = _observed(base, layers, batches, activation, passing=passing)
            return relative_error(base, convert_fx(copy.deepcopy(observed)), batches[:COMPARED_BATCHES]), observed

        passed = {observer: tried(observer, passing=True) for observer in (HistogramObserver, MinMaxObserver)}
        best = min(passed, key=lambda observer: passed[observer][0])
        apart = tried(best, passing=False)
        return passed[best] if passed[best][0] <= _MOST_ERROR * apart[0] else apart

    def convert(engine: str) -> tuple[nn.Module, float]:
        error, observed = most_faithful(_narrow(engine))
        quantized = convert_fx(copy.deepcopy(observed))
        # It keeps every model that it has ever seen.
        getattr(assert_and_get_unique_device, "cache_clear", lambda: None)()
        return quantized, error

    return _fastest(convert, model, inputs, engine, "static_int8", convention, Conversion(note=note))


def _observed(
    base: fx.GraphModule, layers: Container[str], batches: Sequence[Example], activation: Any, *, passing: bool
) -> fx.GraphModule:
    """Return `base` with the ranges of activations that it has on `batches`.

    `activation` constructs an observer; `passing` quantizes operators between the `layers` too.
    """
    from torch.ao.quantization import QConfig, QConfigMapping, float_qparams_weight_only_qconfig
    from torch.ao.quantization.fx.fuse import fuse
    from torch.ao.quantization.fx.prepare import prepare
    from torch.ao.quantization.observer import default_per_channel_weight_observer

    config = QConfig(activation=activation, weight=default_per_channel_weight_observer)  # type: ignore[no-untyped-call]
    mapping = QConfigMapping().set_global(config if passing else None)
    for name, module in base.named_modules():
        embedding = type(module) is nn.Embedding
        if name in layers:
            mapping.set_module_name(name, float_qparams_weight_only_qconfig if embedding else config)
        elif not isinstance(module, nn.modules.batchnorm._BatchNorm) and name:
            mapping.set_module_name(name, None)
    copied: Any = copies.shallow_copy(base)
    fused = fuse(copied, False)
    for node in fused.graph.nodes:
        if node.target is torch.cat and not passing:
            # The quantizer would give it some of its inputs in integers.
            node.target = torch.ops.aten.cat
    scopes = {node.name: (export.layer_of(node), type(None)) for node in fused.graph.nodes}
    observed = prepare(fused, mapping, False, scopes, batches[0])
    with torch.inference_mode():
        for batch in batches:
            observed(*batch)
    return observed


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


def conversion_of(model: nn.Module) -> Conversion:
    """Return how a model that `dynamic_int8` or `static_int8` returned was quantized."""
    return _CONVERSIONS.get(model, Conversion())


def supported_engines() -> list[str]:
    """Return torch's quantized engines on this machine, in the order in which equally fast ones are preferred."""
    engines = set(torch.backends.quantized.supported_engines) - {"none"}
    return sorted(engines, key=lambda engine: (*_PREFERENCE, engine).index(engine))


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


def _narrow(engine: str) -> bool:
    """Return whether an engine's activations need 7 bits here; FBGEMM's depthwise kernels need them everywhere."""
    return engine in ("x86", "fbgemm") or saturates(engine)


def _fastest(
    convert: Callable[[str], tuple[nn.Module, float]],
    model: nn.Module,
    inputs: Example,
    asked: str | None,
    verb: str,
    convention: Any,
    conversion: Conversion,
) -> nn.Module:
    """Return the conversion of `model` for an engine, if none is `asked` for one that no other is clearly faster than.

    `convert` returns the conversion for the engine in force, and the error of its outputs. No two conversions are in
    memory at once. `convention` gives a graph the inputs and outputs of `model`.
    """
    engines = supported_engines()
    if asked is not None and asked not in engines:
        raise Unsupported(f"`engine` must be one of {', '.join(engines)} on this machine, got {asked!r}.")
    best, errors, failures = dict[str, float](), dict[str, float](), dict[str, str]()
    with torch.inference_mode(), quiet.libraries(), modules.plain_attention():
        for name in [asked] if asked else engines:
            candidate: Any = None
            with using_engine(name):
                try:
                    candidate, errors[name] = convert(name)
                    _unpack(candidate)
                    best[name] = _call_ms(candidate, inputs)
                except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
                    failures[name] = brief(error)
            # Graphs of torch.fx refer to themselves.
            del candidate
            copies.trim_heap()
        if not best:
            text = f"`{verb}`: the quantized model runs with no engine of this machine: {failures}."
            raise Unsupported(f"{text} Leave the layer out with `skip`, or use another method.")
        faithful = [name for name in best if errors[name] <= _MOST_ERROR * min(errors[name] for name in best)]
        fastest = min(best[name] for name in faithful)
        engine = next(name for name in engines if name in faithful and best[name] <= _CLEARLY_SLOWER * fastest)
        with using_engine(engine):
            chosen: Any = convert(engine)[0].eval()
    copies.unshare(chosen, model)
    if convention is not None:
        chosen.graph.set_codegen(convention)
        chosen.recompile()
    # Packed weights are tied to an engine, and torch keeps the engine in a global: the model has to carry its own.
    chosen.__dict__["quantized_engine"] = engine
    change, narrow = errors[engine], verb == "dynamic_int8" or _narrow(engine)
    lossy = f"int8 changes the outputs by {change:.0%} on the calibration inputs: see layer by layer in 3-quantize"
    note = "; ".join(filter(None, [conversion.note, lossy * (change > _CHANGED)]))
    _CONVERSIONS[chosen] = replace(conversion, narrow=narrow, error=change, times_ms=best, note=note)
    return cast("nn.Module", chosen)


def _call_ms(model: nn.Module, inputs: Example) -> float:
    """Return the fastest of 5 to 30 calls within about a second, after one that compiles its code, in ms."""
    model(*inputs)
    best, deadline = float("inf"), time.perf_counter() + 1.0
    for turn in range(30):
        start = time.perf_counter()
        model(*inputs)
        best = min(best, 1e3 * (time.perf_counter() - start))
        if turn >= 4 and time.perf_counter() > deadline:
            break
    return best


def _changed(base: nn.Module, convert: Any, layers: Iterable[str], batches: Sequence[Example]) -> dict[str, str]:
    """Return the recurrent ones of `layers` that int8 changes too much on `batches`, and by how much."""
    recurrent = [name for name in layers if isinstance(base.get_submodule(name), RECURRENT)]
    if not recurrent:
        return {}
    given: dict[str, list[Any]] = {name: [] for name in recurrent}
    hooks = [base.get_submodule(n).register_forward_pre_hook(lambda _, x, n=n: given[n].append(x)) for n in recurrent]
    with torch.inference_mode(), quiet.libraries():
        with modules.hooked(hooks):
            for batch in batches:
                base(*batch)
        int8, changed = convert("")[0], {}
        for name, calls in given.items():
            error = relative_error(base.get_submodule(name), int8.get_submodule(name), calls)
            if error > _CHANGED:
                changed[name] = f"int8 changes its outputs by {error:.0%}, and its errors add up over time"
    return changed


def _on_cpu(inputs: Example) -> Example:
    return tuple(x.cpu() for x in inputs)


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
