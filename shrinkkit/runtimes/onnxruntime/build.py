"""Files for ONNX Runtime: the float export, or the fastest faithful form of int8 that is exact on this processor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shrinkkit.errors import ModelFileError, Unsupported
from shrinkkit.runtimes.base import BuildRequest, BuiltFile, prove, refuse_float
from shrinkkit.runtimes.onnx.export import TOLERANCE, build_float32, source
from shrinkkit.runtimes.onnxruntime import integers, load, profile, quantize
from shrinkkit.runtimes.onnxruntime.quantize import FORMS, Form
from shrinkkit.tasks import copies, outputs

MOST_ERROR = 4.0
"""How many times the error of the most faithful exact form a faster one may have: two bits of weights."""
_CHECKED_BYTES = 20_000_000
"""Largest ONNX file whose layers are also computed in float, for which they take up to eight times as much memory."""
_COMPARED_BATCHES = 8


def build(request: BuildRequest) -> BuiltFile:
    """Return the file of a variant for ONNX Runtime, which has files in float32 and int8."""
    if not request.precision:
        return build_float32(request, load.load)
    exported, note = source(request)
    path = request.folder / "model.onnx"
    form, reason = _exact_form(exported, path, request)
    layers = profile.int8_layers(path, request)
    refuse_float(request, "ONNX Runtime", layers, path)
    return prove(
        request,
        load.load,
        path,
        format="onnx",
        tolerance=TOLERANCE,
        layers=layers,
        notes=[note, reason],
        exact_anywhere=form.exact_anywhere,
    )


@dataclass(frozen=True)
class _Candidate:
    """An ONNX file in one of the forms of int8 weights."""

    form: Form
    path: Path
    saturated: Sequence[str]
    exact: bool
    """Whether its accumulators cannot saturate on this processor, and did not."""
    error: float
    """Root mean square difference from the float model's outputs, relative to theirs."""


def _exact_form(exported: Path, path: Path, request: BuildRequest) -> tuple[Form, str]:
    """Write to `path` the fastest form that is exact on this processor and faithful, and return it and the reason.

    The first form is taken as soon as it is exact. Otherwise all are compared; if none is exact, the most faithful is
    taken.
    """
    candidates = []
    for form in FORMS:
        candidates.append(_candidate(form, exported, request))
        if candidates[0].exact:
            break
    exact = [candidate for candidate in candidates if candidate.exact]
    limit = (MOST_ERROR if exact else 1.0) * min(candidate.error for candidate in exact or candidates)
    chosen = next(candidate for candidate in exact or candidates if candidate.error <= limit)
    chosen.path.replace(path)
    first = candidates[0]
    if chosen is first:
        return chosen.form, "" if exact else "int8 accumulators saturate on this processor in every form of weights"
    named = ", ".join(first.saturated) or "kernels of 8-bit weights"
    return chosen.form, f"{chosen.form.name}, because int8 accumulators saturate on this processor otherwise: {named}"


def _candidate(form: Form, exported: Path, request: BuildRequest) -> _Candidate:
    """Write the int8 model in one form, compare its layers with float arithmetic, and its outputs with the model's."""
    path = request.scratch / f"{form.name}.onnx"
    quantize.write(
        exported,
        path,
        precision=request.precision,
        calibration=request.calibration,
        skip=sorted(request.skipped),
        form=form,
    )
    saturated = _saturated(path, request)
    exact = not saturated and (form.exact_anywhere or not quantize.saturates())
    # A form that is taken without comparison needs no error.
    error = 0.0 if exact and form is FORMS[0] else _error(path, request)
    return _Candidate(form, path, saturated, exact, error)


def _saturated(path: Path, request: BuildRequest) -> Sequence[str]:
    """Return the layers of an ONNX file that saturate here, as far as they can be checked."""
    if path.stat().st_size > _CHECKED_BYTES:
        return ()
    try:
        checks = [
            integers.check(path, inputs, threads=torch.get_num_threads())
            for inputs in (request.example, *request.calibration[:1])
        ]
    except (Unsupported, ModelFileError):
        return ()
    return tuple(dict.fromkeys(name for check in checks if check for name in check.saturated))


@copies.freeing_large_blocks()
def _error(path: Path, request: BuildRequest) -> float:
    """Return the error of an ONNX file's outputs on the calibration data, infinite if they are not finite."""
    loaded = load.load(path, device="cpu", threads=torch.get_num_threads(), like=None)
    squares, total = 0.0, 0.0
    for inputs in (request.example, *request.calibration[: _COMPARED_BATCHES - 1]):
        expected = outputs.tensors(request.outputs_of(request.model, inputs))
        for reference, output in zip(expected, outputs.tensors(loaded(*inputs)), strict=True):
            squares += (output.double() - reference.double()).square().sum().item()
            total += reference.double().square().sum().item()
    error = (squares / total) ** 0.5 if total else squares**0.5
    return error if math.isfinite(error) else math.inf
