"""Model files by the name of their runtime: build, load, verify and inspect them."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shrinkkit.core.measurement import IntegerCheck, LayerTime
from shrinkkit.core.variant import ModelFile
from shrinkkit.errors import ModelFileError, ShrinkkitError, Unsupported, brief
from shrinkkit.runtimes import base, registry
from shrinkkit.runtimes.base import REMEDY, Backend, BuildRequest, BuiltFile, Loaded
from shrinkkit.runtimes.layers import CONVERSIONS
from shrinkkit.tasks import copies
from shrinkkit.tasks.modules import Example

CAP_S, FEWEST = 2.0, 3
"""Seconds for which a file is called to time its layers, and the calls that a slower model gets all the same."""


def build(runtime: str, request: BuildRequest) -> BuiltFile:
    """Return the model file of a variant for `runtime`, compared with the model in memory.

    Raises:
        Unsupported: The runtime cannot run this variant, or not in its precision.
        ModelFileError: The file loaded back gives other outputs.
        InvalidInput: A pattern in `skip` matches no layer.
    """
    dtypes = {p.dtype for p in request.model.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
    if dtypes and (request.precision or not registry.get(runtime).in_torch):
        dtype = str(min(dtypes, key=str)).removeprefix("torch.")
        start = f"{request.precision} starts" if request.precision else f"files for {runtime} start"
        raise Unsupported(f"{start} from float32, and this model is in {dtype}. Call `.float()` on it in the task.")
    described = registry.get(runtime)
    if reason := described.missing("cpu") or (described.refuses(request.precision, "cpu") if request.precision else ""):
        raise Unsupported(f"{reason}.")
    try:
        built = _backend(runtime).build(request)
    finally:
        copies.trim_heap()
    path = request.folder / built.file.path
    try:
        _backend(runtime).scan(path)
    except base.UnsafeContent as content:
        base.remove(path, *(request.folder / name for name in built.file.beside))
        raise Unsupported(
            f"A file of this model for {runtime} would hold {content}, which cannot be loaded without the package that "
            "defines it. Use torch's own operators in the model; Hugging Face models with experts have "
            '`model.set_experts_implementation("eager")`.'
        ) from None
    return built


def load(path: Path, *, runtime: str, device: str = "cpu", threads: int = 1, like: Any = None) -> Loaded:
    """Return the model file at `path`, scanned and loaded for `runtime` on `device`.

    Args:
        path: A model file.
        runtime: Name of a runtime that reads its format.
        device: `cpu`, `cuda` or `mps`.
        threads: Intra-op threads of a runtime that does not run in torch; torch's are a setting of the process.
        like: An output of the model before export, into whose structure the outputs are put. Files return plain tuples
            and dicts, those of other runtimes than torch a flat list; None leaves a single tensor or a tuple of it.

    Raises ModelFileError if it is missing, damaged, or holds what could run code, Unsupported for files of another
    kind.
    """
    scan(path, runtime=runtime)
    return _backend(runtime).load(path, device=device, threads=threads, like=like)


def scan(path: Path, *, runtime: str) -> None:
    """Check that a model file holds nothing that could run code when it is loaded or called; raises ModelFileError."""
    if not path.is_file():
        raise ModelFileError(f"{path} must be a model file, and there is none. {REMEDY}")
    with base.scanning(path):
        _backend(runtime).scan(path)


@dataclass(frozen=True)
class Verification:
    """A model file that was loaded and called, and whether it gives its stored outputs."""

    loaded: Loaded
    limit: float
    """Largest error, relative to the largest output, at which it counts as verified."""
    max_relative_error: float | None
    """None where outputs cannot be compared."""
    reason: str
    """Why it is not verified, '' if it is."""
    load_ms: float
    """Of a second load, since the first one of a process also imports parts of the runtime."""
    first_call_ms: float


def verify(
    folder: Path,
    file: ModelFile,
    inputs: Example,
    expected: Any,
    *,
    device: str = "cpu",
    threads: int = 1,
    like: Any = None,
) -> Verification:
    """Compare a file in a variant's `folder` with its record, load it, and compare its outputs with the stored ones.

    `inputs` and `expected` are those stored with the variant; for `device`, `threads` and `like` see `load`. Raises
    ModelFileError if it is not the file of the record, or does not load or run, and Unsupported if the runtime cannot
    run it here.
    """
    path = folder / file.path
    if problem := damage(folder, file):
        raise ModelFileError(f"{problem} {REMEDY}")
    limit = base.tolerance(file, device)
    try:
        open_file = partial(load, path, runtime=file.runtime, device=device, threads=threads, like=like)
        open_file()
        loaded, load_ms = _timed(open_file)
        output, first_call_ms = _timed(partial(loaded, *inputs))
    except ShrinkkitError:
        raise
    except Exception as error:  # runtimes raise various error types
        raise ModelFileError(f"{path.name} does not run here: {brief(error)}.") from error
    try:
        difference = base.max_relative_error(expected, output)
    except ModelFileError as error:
        return Verification(loaded, limit, None, f"{path.name}: {error}", load_ms, first_call_ms)
    reason = f"{path.name} must give its reference outputs within {limit:g} of the largest, got {difference:.2g}."
    return Verification(loaded, limit, difference, "" if difference <= limit else reason, load_ms, first_call_ms)


def damage(folder: Path, file: ModelFile) -> str:
    """Return how the bytes of a model file differ from its record, '' if they do not."""
    paths = [folder / path for path in (file.path, *file.beside)]
    if missing := [path.name for path in paths if not path.is_file()]:
        return f"{', '.join(missing)} is missing."
    size = sum(path.stat().st_size for path in paths)
    if size == file.size_bytes and base.sha256(*paths) == file.sha256:
        return ""
    difference = f"{size} bytes instead of {file.size_bytes}" if size != file.size_bytes else "another hash"
    named = " with ".join(path.name for path in paths)
    return f"{named} is not the file that its record describes: it has {difference}."


def layer_times(
    path: Path, *, runtime: str, inputs: Example, threads: int, device: str = "cpu", calls: int = 20
) -> tuple[LayerTime, ...]:
    """Return what each operator of each layer of a model file takes in one call, in the order they run.

    A layer is the innermost module that an operator was called in, by its name in the task's model. Times are medians
    over calls after a warm-up; operators of one kind in a layer are one entry. What runs in no module but the model
    itself has the layer ''. So has what belongs to no layer with weights where a file does not tell more: TorchScript
    compiled from source, and quantized ONNX.

    `inputs` are CPU tensors, batch first. Slow models get fewer than `calls`, so that all of them take about `CAP_S`
    seconds, but at least `FEWEST`. Raises ModelFileError if the file is missing or damaged, and Unsupported if the
    runtime does not time layers on this device, or operators differ from call to call.
    """
    scan(path, runtime=runtime)
    repeats = partial(_repeats, calls=calls)
    timed = _backend(runtime).layers(path, inputs, device=device, threads=threads, repeats=repeats)
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(timed))
    for number, call in enumerate(timed):
        for layer, operator, ms in call:
            totals[layer, operator][number] += ms
    medians = {key: statistics.median(ms) for key, ms in totals.items()}
    return tuple(LayerTime(layer, operator, ms, operator in CONVERSIONS) for (layer, operator), ms in medians.items())


def denormals(path: Path, *, runtime: str, inputs: Example | None = None) -> int:
    """Return how many denormal numbers the float weights of a model file hold; raises ModelFileError if it is damaged.

    Denormal (subnormal in IEEE 754) numbers are too small for full precision in float32: not 0, and below 2^-126.
    Numbers in 16 bits are counted by their value in float32. Given `inputs` of one call, CPU tensors, the outputs of a
    `.pt2` file's operators count too; those of other files cannot be seen.
    """
    scan(path, runtime=runtime)
    return _backend(runtime).denormals(path, inputs)


def check_integers(path: Path, *, runtime: str, inputs: Example, threads: int) -> IntegerCheck | None:
    """Return what the integer kernels of a model file compute here, compared with the same integers in float.

    Each layer gets the integers that it has in a run whose integer layers all compute in float. The products of a
    recurrent layer are compared one by one, as over its steps rounding would add up. None is for a file in float.

    Raises:
        Unsupported: The file has integer operators, and none of them can be computed in float as well, or the runtime
            does not show its layers' inputs.
        ModelFileError: The file is damaged, or its outputs are not finite.
    """
    scan(path, runtime=runtime)
    return _backend(runtime).check_integers(path, inputs, threads=threads)


def _backend(runtime: str) -> Backend:
    backend: Backend = registry.backend(runtime)
    return backend


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and the ms that it took."""
    start = time.perf_counter()
    return call(), 1e3 * (time.perf_counter() - start)


def _repeats(call: Callable[[], Any], calls: int) -> int:
    """Warm `call` up, and return how many calls fit into the time."""
    taken = [_timed(call)[1]]
    while len(taken) < FEWEST and sum(taken) < 1e3 * CAP_S:
        taken.append(_timed(call)[1])
    return max(FEWEST, min(calls, int(1e3 * CAP_S / taken[-1])))
