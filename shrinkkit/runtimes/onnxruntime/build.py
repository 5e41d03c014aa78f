"""Files for ONNX Runtime: the float export, or the fastest faithful form of int8 that is exact on this processor."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shrinkkit.errors import ModelFileError, Unsupported
from shrinkkit.runtimes.base import BuildRequest, BuiltFile, output_error, prove, refuse_float, refuse_unfaithful
from shrinkkit.runtimes.onnx.export import TOLERANCE, build_float32, source
from shrinkkit.runtimes.onnxruntime import integers, load, profile, quantize
from shrinkkit.runtimes.onnxruntime.quantize import FORMS, Form

MOST_ERROR = 2.0
"""How many times the error of the most faithful exact form a faster one may have: one bit of weights."""
_CHECKED_BYTES = 20_000_000
"""Largest ONNX file whose layers are also computed in float, for which they take up to eight times as much memory."""


def build(request: BuildRequest) -> BuiltFile:
    """Return the file of a variant for ONNX Runtime, which has files in float32 and int8."""
    if not request.precision:
        return build_float32(request, load.load)
    exported = source(request)
    chosen, reason = _exact_form(exported.path, request)
    refuse_unfaithful(request, "ONNX Runtime", chosen.error)
    paths = [file.rename(request.folder / file.name) for file in sorted(chosen.path.parent.iterdir())]
    path, *beside = paths
    layers = profile.int8_layers(path, request)
    refuse_float(request, "ONNX Runtime", layers, path, beside)
    options: dict[str, Any] = {"layers": layers, "notes": [exported.note, reason]}
    options["exact_anywhere"] = chosen.form.exact_anywhere
    return prove(request, load.load, path, format="onnx", tolerance=TOLERANCE, beside=beside, **options)


@dataclass(frozen=True)
class _Candidate:
    """An ONNX file in one of the forms of int8 weights, in a separate folder."""

    form: Form
    path: Path
    saturated: Sequence[str]
    exact: bool
    """Whether its accumulators cannot saturate on this processor, and did not."""
    error: float
    """See `output_error`."""


def _exact_form(exported: Path, request: BuildRequest) -> tuple[_Candidate, str]:
    """Return the fastest form that is exact on this processor and faithful, and why it is not the first.

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
    first = candidates[0]
    if chosen is first:
        return chosen, "" if exact else "int8 accumulators saturate on this processor in every form of weights"
    named = ", ".join(first.saturated) or "kernels of 8-bit weights"
    return chosen, f"{chosen.form.name}, because int8 accumulators saturate on this processor otherwise: {named}"


def _candidate(form: Form, exported: Path, request: BuildRequest) -> _Candidate:
    """Write the int8 model in one form, compare its layers with float arithmetic, and its outputs with the model's."""
    path = request.scratch / form.name / "model.onnx"
    path.parent.mkdir()
    data, skip = request.calibration, sorted(request.skipped)
    quantize.write(exported, path, precision=request.precision, calibration=data, skip=skip, form=form)
    saturated = _saturated(path, request)
    exact = not saturated and (form.exact_anywhere or not quantize.saturates())
    return _Candidate(form, path, saturated, exact, output_error(request, load.load, path))


def _saturated(path: Path, request: BuildRequest) -> Sequence[str]:
    """Return the layers of an ONNX file that saturate here, as far as they can be checked."""
    if sum(file.stat().st_size for file in path.parent.iterdir()) > _CHECKED_BYTES:
        return ()
    try:
        batches, threads = (request.example, *request.calibration[:1]), torch.get_num_threads()
        checks = [integers.check(path, inputs, threads=threads) for inputs in batches]
    except (Unsupported, ModelFileError):
        return ()
    return tuple(dict.fromkeys(name for check in checks if check for name in check.saturated))
