"""The model file of one variant for each runtime: quantized in the form that the runtime is best at, written, proved.

What a runtime cannot have is an `Unsupported` error that says what it can. To put a whole variant on disk see
`variants`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shrinkkit.core.variant import ANY_PROCESSOR, WITH_VNNI, LayerPrecision, ModelFile
from shrinkkit.errors import ModelFileError, Unsupported
from shrinkkit.runtimes import artifacts, audit, emulation, loading
from shrinkkit.runtimes.artifacts import LOW_PRECISION_TOLERANCE, TOLERANCE
from shrinkkit.runtimes.inductor import pt2e
from shrinkkit.runtimes.loading import Loaded
from shrinkkit.runtimes.onnxruntime import onnxint8
from shrinkkit.runtimes.onnxruntime.onnxint8 import FORMS, Form
from shrinkkit.runtimes.openvino import openvinofiles
from shrinkkit.runtimes.torch import quantize
from shrinkkit.runtimes.torch.quantize import HALF
from shrinkkit.tasks import copies, modules, outputs
from shrinkkit.tasks.modules import Example, matching

MOST_ERROR = 4.0
"""How many times the error of the most faithful exact form a faster one may have: two bits of weights."""
_CHECKED_BYTES = 20_000_000
"""Largest ONNX file whose layers are also computed in float, for which they take up to eight times as much memory."""
_JUDGED_BATCHES = 8


@dataclass(frozen=True)
class Made:
    """A proved model file."""

    file: ModelFile
    precision: Mapping[str, LayerPrecision]
    """How the runtime runs each layer; an absent layer runs as the model in memory has it."""
    note: str
    """What a reader should know of how it was made; empty if nothing."""
    output: Any
    """What the file must return for the example."""


@dataclass(frozen=True)
class Making:
    """One variant being made. What several runtimes need, such as an export of the float model, is made once."""

    folder: Path
    """Where the files go."""
    scratch: Path
    """For what is only a step on the way."""
    model: nn.Module
    """Float model in eval mode, on the CPU."""
    example: Example
    method: str = ""
    """`dynamic-int8`, `static-int8`, `float16` or `bfloat16`; empty for a model that is not quantized."""
    skip: Sequence[str] = ()
    """Patterns of layers to leave in float32."""
    calibration: Sequence[Example] = ()
    """Inputs that set the ranges of activations, for `static-int8`, and on which int8 forms are judged."""

    @cached_property
    def skipped(self) -> frozenset[str]:
        """Names of the modules that `skip` names."""
        names = [name for name, _ in self.model.named_modules() if name]
        return frozenset(matching(names, self.skip)) if self.skip else frozenset()

    @cached_property
    def onnx(self) -> tuple[Path, str]:
        """The float model as ONNX, delivered if nothing is to be quantized, and the note."""
        path = (self.scratch if self.method else self.folder) / "model.onnx"
        return path, artifacts.write_onnx(self.model, self.example, path, beside=bool(self.method))

    def answer(self, model: Any, inputs: Example = ()) -> Any:
        """Return what `model` returns for some inputs, by default the example."""
        with torch.inference_mode(), modules.plain_attention():
            return model(*(inputs or self.example))


def make(runtime: str, making: Making) -> Made:
    """Return the proved model file of a variant for `runtime`.

    Args:
        runtime: `torch`, `inductor`, `onnxruntime` or `openvino`.
        making: What is to be made.

    Raises:
        Unsupported: The runtime cannot have this variant, or would not run it as it says.
        ModelFileError: The file loaded back does not give the outputs that it must.
        InvalidInput: A pattern in `skip` matches no layer.
    """
    _refuse_half(runtime, making)
    try:
        return _MAKERS[runtime](making)
    finally:
        copies.trim_heap()


def _refuse_half(runtime: str, making: Making) -> None:
    """Raise if the model is in 16 bits already, which only torch and inductor run, and as it is."""
    found = {p.dtype for p in making.model.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
    if found and (making.method or runtime not in ("torch", "inductor")):
        dtype = str(min(found, key=str)).removeprefix("torch.")
        asked = f"{making.method} starts" if making.method else f"files for {runtime} start"
        raise Unsupported(
            f"{asked} from float32, and this model is in {dtype} already. Call `.float()` on it in the task."
        )


def _torch(making: Making) -> Made:
    if making.method in ("", *HALF):
        return _plain("torch", making)
    if making.method == "dynamic-int8":
        made = quantize.dynamic_int8(making.model, making.example, skip=making.skip)
    else:
        made = quantize.static_int8(making.model, making.example, making.calibration, skip=making.skip)
    path, format, note = artifacts.write_torch(made, making.example, making.folder)
    engine = quantize.engine_of(made)
    times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(quantize.engine_times_ms(made).items()))
    notes = [f"the engine {engine} was chosen; the fastest call of each that was tried took {times}", note]
    if inexact := [name for name in quantize.supported_engines() if not quantize.is_exact(name, making.method)]:
        notes += [f"int8 accumulators of {', '.join(inexact)} saturate on this processor"]
    found = audit.torch_int8(making.model, made, method=making.method, skipped=making.skipped)
    expected = making.answer(made)
    # The file is loaded next, and one of the two in memory is enough.
    del made
    # qnnpack multiplies in 16 bits and adds in 32 on every processor.
    anywhere = quantize.narrow(engine, making.method) or engine == "qnnpack"
    return _proved("torch", path, format, making, expected, found, *notes, anywhere=anywhere)


def _inductor(making: Making) -> Made:
    if making.method in ("", *HALF):
        return _plain("inductor", making)
    path = making.folder / "model.inductor.pt2"
    narrow = "onednn" in quantize.supported_engines() and quantize.saturates("onednn")
    output, found, note = pt2e.write(
        making.model,
        making.example,
        making.calibration,
        path,
        method=making.method,
        skipped=making.skipped,
        narrow=narrow,
    )
    refuse_float("inductor", found, making, path)
    why = narrow * "activations have 7 bits, because int8 accumulators saturate on this processor with 8"
    return _proved("inductor", path, "pt2", making, output, found, note, why, anywhere=narrow)


def _plain(runtime: str, making: Making) -> Made:
    """Return the file in float or 16 bits that torch or inductor runs."""
    # Not kept: a copy in 16 bits would take memory while the other runtimes' files are made.
    model = quantize.half(making.model, making.example, dtype=making.method) if making.method else making.model
    if runtime == "torch":
        path, format, note = artifacts.write_torch(model, making.example, making.folder)
    else:
        (path, note), format = artifacts.write_program(model, making.example, making.folder), "pt2"
    found = {name: LayerPrecision(making.method) for name in audit.layers(making.model)} if making.method else {}
    return _proved(runtime, path, format, making, making.answer(model), found, note)


def _onnxruntime(making: Making) -> Made:
    if making.method in HALF:
        raise Unsupported(
            f"ONNX Runtime has no {making.method} kernels on the CPU: it would compute in float32 between casts. "
            f"Possible for {making.method}: the runtimes torch, inductor and openvino."
        )
    source, note = making.onnx
    if not making.method:
        return _proved("onnxruntime", source, "onnx", making, making.answer(making.model), {}, note)
    path = making.folder / "model.onnx"
    form, why = _exact_onnx(source, path, making)
    found = audit.onnx_int8(
        making.model, artifacts.onnx_int8_weights(path), method=making.method, skipped=making.skipped
    )
    refuse_float("onnxruntime", found, making, path)
    return _proved("onnxruntime", path, "onnx", making, None, found, note, why, anywhere=form.exact_anywhere)


@dataclass(frozen=True)
class _Tried:
    """An ONNX file in one of the forms of int8 weights."""

    form: Form
    path: Path
    saturated: Sequence[str]
    exact: bool
    """Whether its accumulators cannot saturate on this processor, and did not."""
    error: float
    """Root mean square difference from the float model's outputs, as a share of theirs."""


def _exact_onnx(source: Path, path: Path, making: Making) -> tuple[Form, str]:
    """Write to `path` the fastest form that is exact on this processor and faithful, and return it and the reason.

    The first form is taken as soon as it is exact. Otherwise all are compared; if none is exact, the most faithful is
    taken.
    """
    tried = []
    for form in FORMS:
        tried.append(_try(form, source, making))
        if tried[0].exact:
            break
    exact = [one for one in tried if one.exact]
    limit = (MOST_ERROR if exact else 1.0) * min(one.error for one in exact or tried)
    chosen = next(one for one in exact or tried if one.error <= limit)
    chosen.path.replace(path)
    if chosen is tried[0]:
        return chosen.form, "" if exact else "int8 accumulators saturate on this processor in every form of weights"
    named = ", ".join(tried[0].saturated) or "kernels of 8-bit weights"
    return chosen.form, f"{chosen.form.name}, because int8 accumulators saturate on this processor otherwise: {named}"


def _try(form: Form, source: Path, making: Making) -> _Tried:
    """Write the int8 model in one form, compare its layers with float arithmetic, and its outputs with the model's."""
    path = making.scratch / f"{form.name}.onnx"
    skip = sorted(making.skipped)
    onnxint8.write(source, path, method=making.method, calibration=making.calibration, skip=skip, form=form)
    saturated = _saturated(path, making)
    exact = not saturated and (form.exact_anywhere or not onnxint8.saturates())
    # A form that is taken without comparison needs no error.
    error = 0.0 if exact and form is FORMS[0] else _error(path, making)
    return _Tried(form, path, saturated, exact, error)


def _saturated(path: Path, making: Making) -> Sequence[str]:
    """Return the layers of an ONNX file that saturate here, as far as it can be told."""
    if path.stat().st_size > _CHECKED_BYTES:
        return ()
    try:
        found = [
            emulation.check(path, runtime="onnxruntime", inputs=inputs, threads=torch.get_num_threads())
            for inputs in (making.example, *making.calibration[:1])
        ]
    except (Unsupported, ModelFileError):
        return ()
    return tuple(dict.fromkeys(name for check in found if check for name in check.saturated))


@copies.freeing_large_blocks()
def _error(path: Path, making: Making) -> float:
    """Return the error of an ONNX file's outputs on the calibration data, infinite if they are not finite."""
    loaded = loading.load(path, runtime="onnxruntime", threads=torch.get_num_threads())
    squares, total = 0.0, 0.0
    for inputs in (making.example, *making.calibration[: _JUDGED_BATCHES - 1]):
        expected = outputs.tensors(making.answer(making.model, inputs))
        for wanted, found in zip(expected, outputs.tensors(loaded(*inputs)), strict=True):
            squares += (found.double() - wanted.double()).square().sum().item()
            total += wanted.double().square().sum().item()
    error = (squares / total) ** 0.5 if total else squares**0.5
    return error if math.isfinite(error) else math.inf


def _openvino(making: Making) -> Made:
    source, note = making.onnx
    if not making.method:
        return _proved("openvino", source, "onnx", making, making.answer(making.model), {}, note)
    path = making.folder / "model.openvino.xml"
    static = making.method == "static-int8"
    narrow = static and openvinofiles.saturates()
    found = openvinofiles.write(
        source,
        path,
        making.model,
        method=making.method,
        calibration=making.calibration or (making.example,),
        skipped=making.skipped,
        narrow=narrow,
    )
    refuse_float("openvino", found, making, path)
    why = narrow * "weights have 7 bits, because int8 accumulators saturate on this processor with 8"
    # What is quantized at each call is computed in float on processors without VNNI.
    return _proved("openvino", path, "openvino", making, None, found, note, why, anywhere=narrow or not static)


_MAKERS: dict[str, Callable[[Making], Made]] = {
    "torch": _torch,
    "inductor": _inductor,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def refuse_float(runtime: str, found: Mapping[str, LayerPrecision], making: Making, path: Path) -> None:
    """Raise, and remove the file, if `runtime` runs no layer as the method says, or one that is to be skipped."""
    wanted = making.method if making.method in HALF else "int8"
    reason = ""
    if not any(p.runs_as == wanted for p in found.values()):
        why = "; ".join(sorted({p.why for p in found.values() if p.why}))
        reason = f"{runtime} would run every layer of this model in float after {making.method}: {why}."
    elif ignored := [name for name in making.skipped if name in found and found[name].runs_as == wanted]:
        reason = f"{runtime} quantized {', '.join(ignored)} although `skip` names them. Use the torch runtime."
    if reason:
        for part in artifacts.parts(path):
            part.unlink()
        raise Unsupported(reason)


@copies.freeing_large_blocks()
def _proved(
    runtime: str,
    path: Path,
    format: str,
    making: Making,
    expected: Any,
    precision: Mapping[str, LayerPrecision],
    *notes: str,
    anywhere: bool = False,
) -> Made:
    """Load the file back, compare its outputs with `expected`, and return it.

    None stands for a graph that exists only as a file: what it gives here is what it must give wherever it is loaded.
    `anywhere` tells of an int8 file whether it is exact on any processor.
    """
    copies.trim_heap()
    load = partial(loading.load, path, runtime=runtime, threads=torch.get_num_threads(), like=expected)
    if expected is None:
        expected = load()(*making.example)
    loaded = load()
    found = loaded(*making.example)
    error = artifacts.max_relative_error(expected, found)
    dtypes = {p.dtype for p in making.model.parameters()}
    halved = making.method in HALF or bool(dtypes & set(HALF.values()))
    # In 16 bits each fused step saves a rounding, and inductor fuses what is quantized too.
    fused = halved or (making.method and runtime == "inductor")
    limit = LOW_PRECISION_TOLERANCE if fused else TOLERANCE[format]
    if not error <= limit:
        for part in artifacts.parts(path):
            part.unlink()
        raise ModelFileError(
            f"{path.name} loaded back must give the outputs of the model in memory, to {limit:g} of their size, but is "
            f"{error:.2g} away. It is not kept; use another runtime."
        )
    fixed = not _takes_any_batch(loaded, making.example)
    integers = making.method not in ("", *HALF)
    file = artifacts.describe(
        loaded,
        making.folder,
        format=format,
        example=making.example,
        output=found,
        fixed_batch=fixed,
        max_relative_error=error,
        exact_on=(ANY_PROCESSOR if anywhere else WITH_VNNI) if integers else "",
    )
    if making.method or halved:
        file = replace(file, tolerance=LOW_PRECISION_TOLERANCE)
    return Made(file, precision, "; ".join(filter(None, notes)), expected)


def _takes_any_batch(loaded: Loaded, example: Example) -> bool:
    """Return whether a file takes another batch size than the example's, by trying."""
    larger = tuple(torch.cat([x, x[:1]]) for x in example)
    # inductor would compile anew for it.
    call = loaded.source if loaded.runtime == "inductor" else loaded
    try:
        with torch.inference_mode():
            found = outputs.tensors(call(*larger))
    except Exception:  # runtimes raise errors of their own types
        return False
    return bool(found) and found[0].shape[:1] == larger[0].shape[:1]
