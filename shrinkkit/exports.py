"""The model file of one variant for each runtime: quantized in the form that the runtime is best at, written, proved.

What a runtime cannot have is an `Unsupported` error that says what it can. To put a whole variant on disk see
`variants`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shrinkkit import artifacts, audit, copies, loading, onnxint8, openvinofiles, outputs, pt2e, quantize
from shrinkkit.errors import ModelFileError, Unsupported
from shrinkkit.loading import Loaded
from shrinkkit.records import LayerPrecision, ModelFile
from shrinkkit.tasks import matching
from shrinkkit.usermodel import Example


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
    """Inputs that set the ranges of activations, for `static-int8`."""

    @cached_property
    def skipped(self) -> frozenset[str]:
        """Names of the modules that `skip` names."""
        names = [name for name, _ in self.model.named_modules() if name]
        return frozenset(matching(names, self.skip)) if self.skip else frozenset()

    @cached_property
    def plain(self) -> nn.Module:
        """The model as torch and inductor run it in float or 16 bits."""
        return quantize.half(self.model, self.example, dtype=self.method) if self.method else self.model

    @cached_property
    def onnx(self) -> tuple[Path, str]:
        """The float model as ONNX, delivered if nothing is to be quantized, and the note."""
        path = (self.scratch if self.method else self.folder) / "model.onnx"
        return path, artifacts.write_onnx(self.model, self.example, path, beside=bool(self.method))

    def answer(self, model: Any) -> Any:
        """Return what `model` returns for the example."""
        with torch.inference_mode(), quantize.plain_attention():
            return model(*self.example)


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
        copies.release()


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
    if making.method in ("", *quantize.HALF):
        return _plain("torch", making)
    if making.method == "dynamic-int8":
        made = quantize.dynamic_int8(making.model, making.example, skip=making.skip)
    else:
        made = quantize.static_int8(making.model, making.example, making.calibration, skip=making.skip)
    path, format, note = artifacts.write_torch(made, making.example, making.folder)
    times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(quantize.engine_times_ms(made).items()))
    chosen = f"the engine {quantize.engine_of(made)} was the fastest of those tried here ({times})"
    found = audit.torch_int8(making.model, made, method=making.method, skipped=making.skipped)
    expected = making.answer(made)
    # The file is loaded next, and one of the two in memory is enough.
    del made
    return _proved("torch", path, format, making, expected, found, chosen, note)


def _inductor(making: Making) -> Made:
    if making.method in ("", *quantize.HALF):
        return _plain("inductor", making)
    path = making.folder / "model.inductor.pt2"
    output, found, note = pt2e.write(
        making.model, making.example, making.calibration, path, method=making.method, skipped=making.skipped
    )
    refuse_float("inductor", found, making, path)
    return _proved("inductor", path, "pt2", making, output, found, note)


def _plain(runtime: str, making: Making) -> Made:
    """Return the file in float or 16 bits that torch or inductor runs."""
    if runtime == "torch":
        path, format, note = artifacts.write_torch(making.plain, making.example, making.folder)
    else:
        (path, note), format = artifacts.write_program(making.plain, making.example, making.folder), "pt2"
    found = {name: LayerPrecision(making.method) for name in audit.layers(making.model)} if making.method else {}
    return _proved(runtime, path, format, making, making.answer(making.plain), found, note)


def _onnxruntime(making: Making) -> Made:
    if making.method in quantize.HALF:
        raise Unsupported(
            f"ONNX Runtime has no {making.method} kernels on the CPU: it would compute in float32 between casts. "
            f"Possible for {making.method}: the runtimes torch, inductor and openvino."
        )
    source, note = making.onnx
    if not making.method:
        return _proved("onnxruntime", source, "onnx", making, making.answer(making.model), {}, note)
    path = making.folder / "model.onnx"
    onnxint8.write(source, path, method=making.method, calibration=making.calibration, skip=sorted(making.skipped))
    found = audit.onnx_int8(
        making.model, artifacts.onnx_int8_weights(path), method=making.method, skipped=making.skipped
    )
    refuse_float("onnxruntime", found, making, path)
    return _proved("onnxruntime", path, "onnx", making, None, found, note)


def _openvino(making: Making) -> Made:
    source, note = making.onnx
    if not making.method:
        return _proved("openvino", source, "onnx", making, making.answer(making.model), {}, note)
    path = making.folder / "model.openvino.xml"
    found = openvinofiles.write(
        source,
        path,
        making.model,
        method=making.method,
        calibration=making.calibration or (making.example,),
        skipped=making.skipped,
    )
    refuse_float("openvino", found, making, path)
    return _proved("openvino", path, "openvino", making, None, found, note)


_MAKERS: dict[str, Callable[[Making], Made]] = {
    "torch": _torch,
    "inductor": _inductor,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def refuse_float(runtime: str, found: Mapping[str, LayerPrecision], making: Making, path: Path) -> None:
    """Raise, and remove the file, if `runtime` runs no layer as the method says, or one that is to be skipped."""
    wanted = making.method if making.method in quantize.HALF else "int8"
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


@copies.returning()
def _proved(
    runtime: str,
    path: Path,
    format: str,
    making: Making,
    expected: Any,
    precision: Mapping[str, LayerPrecision],
    *notes: str,
) -> Made:
    """Load the file back, compare its outputs with `expected`, and return it.

    None stands for a graph that exists only as a file: what it gives here is what it must give wherever it is loaded.
    """
    copies.release()
    load = partial(loading.load, path, runtime=runtime, threads=torch.get_num_threads(), like=expected)
    if expected is None:
        expected = load()(*making.example)
    loaded = load()
    found = loaded(*making.example)
    error = artifacts.deviation(expected, found)
    dtypes = {p.dtype for p in making.model.parameters()}
    halved = making.method in quantize.HALF or bool(dtypes & set(quantize.HALF.values()))
    # In 16 bits each fused step saves a rounding, and inductor fuses what is quantized too.
    fused = halved or (making.method and runtime == "inductor")
    limit = artifacts.LOW_PRECISION_TOLERANCE if fused else artifacts.TOLERANCE[format]
    if not error <= limit:
        for part in artifacts.parts(path):
            part.unlink()
        raise ModelFileError(
            f"{path.name} loaded back must give the outputs of the model in memory, to {limit:g} of their size, but is "
            f"{error:.2g} away. It is not kept; use another runtime."
        )
    fixed = not _takes_any_batch(loaded, making.example)
    file = artifacts.describe(
        loaded, making.folder, format=format, example=making.example, output=found, fixed_batch=fixed, deviation=error
    )
    if making.method or halved:
        file = replace(file, tolerance=artifacts.LOW_PRECISION_TOLERANCE)
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
