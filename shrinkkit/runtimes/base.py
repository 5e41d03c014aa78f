"""What a runtime does with model files, and what all of them share: requests, loaded files, and the proof of a file."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn
from zipfile import BadZipFile

import torch
from torch import nn

from shrinkkit.core import store
from shrinkkit.core.measurement import IntegerCheck
from shrinkkit.core.variant import ANY_PROCESSOR, WITH_VNNI, LayerPrecision, ModelFile, Port
from shrinkkit.errors import ModelFileError, Unsupported, brief
from shrinkkit.runtimes.spec import HALF
from shrinkkit.tasks import calls, copies, modules, outputs
from shrinkkit.tasks.modules import Example, matching

REMEDY = "Run the step that makes it again."
TOLERANCE = 1e-4
"""Largest error of a file that torch runs, relative to the largest output; see `max_relative_error`."""
LOW_PRECISION_TOLERANCE = 0.02
"""The same for files in 8 or 16 bits, which may run elsewhere or on other threads.

ONNX Runtime's dynamic LSTM, for one, takes its ranges from what a thread sees: 0.0014 between 1 and 2 threads. Kernels
that saturate were seen at 0.019 and far beyond; the integer check of a backend tells them apart.
"""
HALF_DTYPES = {name: getattr(torch, name) for name in HALF}

MOST_OUTPUT_ERROR = 0.5
"""Largest `output_error` of an int8 file that is kept: about a cosine of 0.87."""
COMPARED_BATCHES = 8

Calls = list[list[tuple[str, str, float]]]
"""For each call its operators in order: layer, operator, ms."""
Repeats = Callable[[Callable[[], Any]], int]
"""Returns how often to repeat a call, which it makes to find out."""


@dataclass(frozen=True)
class Loaded:
    """A model file ready to run on one device. Call it with a batch of CPU tensors for CPU outputs."""

    path: Path
    runtime: str
    device: str
    bind: Callable[[Example], Callable[[], Any]]
    """Return a call without arguments that computes some inputs once and leaves the result on the device."""
    to_cpu: Callable[[Any], Any]
    """Return what such a call returned as CPU tensors."""
    clone: Callable[[], "Loaded"]
    """Return the same model at another place in memory."""
    form: str
    """What executes it: `torchscript`, `graph` (operators called from Python), `compiled`, or the runtime's name."""
    source: Any
    """The runtime's own object: a torch module, an ONNX Runtime session, a compiled OpenVINO model."""
    input_names: tuple[str, ...]
    output_names: tuple[str, ...] = ()
    """Empty where outputs are Python objects, whose keys name them."""

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Return the outputs for one batch of CPU tensors, as CPU tensors."""
        with torch.inference_mode():
            return self.to_cpu(self.bind(inputs)())


@dataclass(frozen=True)
class BuildRequest:
    """One variant to build. What several runtimes need, such as an export of the float model, is kept in `shared`."""

    folder: Path
    """Where the files go."""
    scratch: Path
    """Where intermediate files go."""
    model: nn.Module
    """Float model in eval mode, on the CPU."""
    example: Example
    precision: str = ""
    """`dynamic-int8`, `static-int8`, `float16` or `bfloat16`; empty for that of the model."""
    skip: Sequence[str] = ()
    """Patterns of layers to leave in float32."""
    calibration: Sequence[Example] = ()
    """Inputs that set the ranges of activations for `static-int8`, and on which int8 forms are compared."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Intermediate results by name; a runtime that needs one may leave it to the next."""
    announce: Callable[[str], None] = lambda _: None
    """Called with what is being done, such as `verify`."""

    @cached_property
    def skipped(self) -> frozenset[str]:
        """Names of the modules that `skip` matches."""
        names = [name for name, _ in self.model.named_modules() if name]
        return frozenset(matching(names, self.skip)) if self.skip else frozenset()

    def outputs_of(self, model: Any, inputs: Example = ()) -> Any:
        """Return what `model` returns for some inputs, by default the example."""
        with torch.inference_mode(), modules.plain_attention():
            return model(*(inputs or self.example))


@dataclass(frozen=True)
class BuiltFile:
    """A model file that was loaded back and gave the outputs of the model in memory."""

    file: ModelFile
    layers: Mapping[str, LayerPrecision]
    """How the runtime runs each layer; an absent layer runs in the precision of the model in memory."""
    note: str
    """What a user should know of how it was built; empty if nothing."""
    output: Any
    """What the file must return for the example."""


@dataclass(frozen=True)
class Backend:
    """What a runtime does with model files: functions, which `files` calls after the checks that all runtimes share."""

    build: Callable[[BuildRequest], BuiltFile]
    """Write the file of a variant, load it back and compare it by `prove`. Raises Unsupported if the runtime cannot run
    the variant in its precision, since nothing falls back, and ModelFileError if the file gives other outputs."""
    load: Callable[..., Loaded]
    """`load(path, *, device, threads, like)`: return a scanned file, loaded with the runtime's `settings`; outputs are
    put into the structure of `like` unless it is None. Raises ModelFileError or Unsupported."""
    scan: Callable[[Path], None]
    """Check that a file holds nothing that could run code, by only reading it; see `refuse_content`. Any other
    exception that `scanning` lists reports a damaged file."""
    layers: Callable[..., Calls]
    """`layers(path, inputs, *, device, threads, repeats)`: return the time of each operator by layer, for as many calls
    as `repeats(call)` returns for a call on the inputs. Raises Unsupported if the runtime does not tell."""
    check_integers: Callable[..., IntegerCheck | None]
    """`check_integers(path, inputs, *, threads)`: return how integer kernels compare with the same integers in float,
    None for a file in float. Raises Unsupported if the inputs of its layers cannot be seen."""
    denormals: Callable[[Path, Example | None], int]
    """Return the `count_denormals` of a file's weights; given inputs, also of intermediate results if visible."""


class UnsafeContent(Exception):
    """Content that has no place in a model file."""


def refuse_content(what: str, value: object = "") -> NoReturn:
    """Raise `UnsafeContent`, which names the kind of content and its value."""
    raise UnsafeContent(f"{what} {str(value)!r:.80}" if value != "" else what)


@contextmanager
def scanning(path: Path) -> Iterator[None]:
    """Turn what a scan raises into `ModelFileError`."""
    try:
        yield
    except UnsafeContent as content:
        text = f"{path.name} must hold nothing that can run code, but it holds {content}. It was not opened."
        raise ModelFileError(f"{text} {REMEDY}") from None
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, SyntaxError, MemoryError, BadZipFile) as error:
        raise ModelFileError(f"{path.name} cannot be read: {brief(error)}. It is damaged. {REMEDY}") from error


def covers(weights: Path, offset: int, size: int) -> None:
    """Check that a file of weights has `size` bytes from `offset` on; raises ValueError otherwise."""
    if not weights.is_file():
        raise ValueError(f"{weights.name}, where its weights are, is missing")
    if min(offset, size) < 0 or offset + size > weights.stat().st_size:
        raise ValueError(f"{weights.name} is shorter than it says")


@copies.freeing_large_blocks()
def prove(
    request: BuildRequest,
    load: Callable[..., Loaded],
    path: Path,
    *,
    format: str,
    tolerance: float,
    expected: Any = None,
    layers: Mapping[str, LayerPrecision] | None = None,
    notes: Iterable[str] = (),
    exact_anywhere: bool = False,
    beside: Sequence[Path] = (),
) -> BuiltFile:
    """Load a written file back, compare its outputs, and return it with its record; a wrong file is removed.

    Args:
        request: What was built.
        load: `Backend.load` of the runtime.
        path: The file.
        format: Name of its format.
        tolerance: Largest error of a file in float32.
        expected: Outputs of the model in memory. None is for a graph that exists only as a file: the outputs of a
            first load become the reference of the second, and of every later one.
        layers: How the runtime runs each layer.
        notes: Sentences for the record; empty ones are left out.
        exact_anywhere: Whether an int8 file is exact on every processor, and not only on those with VNNI.
        beside: Files that `path` refers to.

    Raises ModelFileError if the outputs differ by more than the tolerance.
    """
    request.announce("verify")
    copies.trim_heap()
    options = {"device": "cpu", "threads": torch.get_num_threads()}
    if expected is None:
        expected = load(path, **options, like=None)(*request.example)
    loaded = load(path, **options, like=expected)
    output = loaded(*request.example)
    error = max(max_relative_error(expected, output), _error_of_sample(request, loaded))
    halved = request.precision in HALF or any(p.dtype in HALF_DTYPES.values() for p in request.model.parameters())
    # In 16 bits each fused step saves a rounding, and a compiler fuses what is quantized too.
    fused = halved or (request.precision and loaded.form == "compiled")
    limit = LOW_PRECISION_TOLERANCE if fused else tolerance
    if not error <= limit:
        remove(path, *beside)
        text = f"{path.name} loaded back must give the outputs of the model in memory, to {limit:g} of their size,"
        raise ModelFileError(f"{text} but is {error:.2g} away. It is not kept; use another runtime.")
    integers = request.precision not in ("", *HALF)
    file = describe(
        loaded,
        request.folder,
        format=format,
        example=request.example,
        output=output,
        fixed_batch=not _takes_any_batch(loaded, request.example),
        error=error,
        tolerance=LOW_PRECISION_TOLERANCE if request.precision or halved else tolerance,
        exact_on=(ANY_PROCESSOR if exact_anywhere else WITH_VNNI) if integers else "",
        beside=beside,
    )
    return BuiltFile(file, layers or {}, "; ".join(filter(None, notes)), expected)


def _error_of_sample(request: BuildRequest, loaded: Loaded) -> float:
    """Return the `max_relative_error` of a float file on inputs of other sizes, 0 if none vary."""
    sample = calls.varying(request.model).sample
    if request.precision or not sample:
        return 0.0
    try:
        output = loaded(*sample)
    except Exception as error:  # runtimes raise various error types
        raise ModelFileError(
            f"{loaded.path.name} must take inputs of the shapes {[tuple(x.shape) for x in sample]}, since sizes vary, "
            f"but stops with: {brief(error)}. It is not kept; use another runtime."
        ) from error
    return max_relative_error(request.outputs_of(request.model, sample), output)


@copies.freeing_large_blocks()
def output_error(request: BuildRequest, load: Callable[..., Loaded], path: Path) -> float:
    """Return the root mean square difference of a file's outputs from the float model's, relative to theirs.

    Outputs are those on the calibration data; the error is infinite if they are not finite.
    """
    copies.trim_heap()
    loaded = load(path, device="cpu", threads=torch.get_num_threads(), like=None)
    batches = (request.example, *request.calibration[: COMPARED_BATCHES - 1])
    return relative_error(lambda *inputs: request.outputs_of(request.model, inputs), loaded, batches)


def refuse_unfaithful(request: BuildRequest, title: str, error: float) -> None:
    """Raise `Unsupported` if the `output_error` of the best file of a runtime is beyond `MOST_OUTPUT_ERROR`."""
    if error > MOST_OUTPUT_ERROR:
        raise Unsupported(
            f"{title}: {request.precision} changes the outputs of this model on its calibration data by {error:.0%} "
            f"(root mean square), and at most {MOST_OUTPUT_ERROR:.0%} is allowed. Leave sensitive layers in float by "
            "`skip`, or use another precision."
        )


def refuse_float(
    request: BuildRequest, title: str, layers: Mapping[str, LayerPrecision], path: Path, beside: Sequence[Path] = ()
) -> None:
    """Raise `Unsupported`, and remove the file, if no layer runs in the precision asked for, or a skipped one does."""
    precision = request.precision if request.precision in HALF else "int8"
    reason = ""
    if not any(layer.runs_as == precision for layer in layers.values()):
        why = "; ".join(sorted({layer.why for layer in layers.values() if layer.why}))
        reason = f"{title}: {request.precision} would leave every layer of this model in float32: {why}."
    elif ignored := [name for name in request.skipped if name in layers and layers[name].runs_as == precision]:
        reason = f"{title} quantized {', '.join(ignored)} although `skip` names them. Use the torch runtime."
    if reason:
        remove(path, *beside)
        raise Unsupported(reason)


def remove(*paths: Path) -> None:
    """Delete files, those that exist."""
    for path in paths:
        path.unlink(missing_ok=True)


def _takes_any_batch(loaded: Loaded, example: Example) -> bool:
    """Return whether a file takes another batch size than the example's, by trying."""
    larger = tuple(torch.cat([x, x[:1]]) for x in example)
    # A compiler would compile again for it.
    call = loaded.source if loaded.form == "compiled" else loaded
    try:
        with torch.inference_mode():
            tensors = outputs.tensors(call(*larger))
    except Exception:  # runtimes raise various error types
        return False
    return bool(tensors) and tensors[0].shape[:1] == larger[0].shape[:1]


def describe(
    loaded: Loaded,
    folder: Path,
    *,
    format: str,
    example: Example,
    output: Any,
    fixed_batch: bool,
    error: float,
    tolerance: float,
    exact_on: str = "",
    beside: Sequence[Path] = (),
) -> ModelFile:
    """Return the record of a model file that lies in `folder`; see `ModelFile`.

    `loaded` is the file, loaded for its runtime, and `output` what it returned for `example`. One with a `fixed_batch`
    takes no other size than the example's. `error` and `tolerance` are relative to the largest output, as in `prove`.
    """
    paths = (loaded.path, *beside)
    batch = None if fixed_batch else len(example[0])
    named = loaded.output_names or outputs.names(output)
    return ModelFile(
        runtime=loaded.runtime,
        path=loaded.path.relative_to(folder).as_posix(),
        beside=tuple(path.relative_to(folder).as_posix() for path in beside),
        format=format,
        size_bytes=sum(path.stat().st_size for path in paths),
        compressed_bytes=_compressed_bytes(paths),
        sha256=sha256(*paths),
        inputs=tuple(_port(name, x, batch) for name, x in zip(loaded.input_names, example, strict=True)),
        outputs=tuple(_port(name, x, batch) for name, x in zip(named, outputs.tensors(output), strict=True)),
        max_relative_error=error,
        tolerance=tolerance,
        exact_on=exact_on,
    )


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of files one after the other; raises ModelFileError if one is missing."""
    try:
        return store.sha256(*paths)
    except FileNotFoundError as error:
        raise ModelFileError(f"{Path(error.filename).name} is missing. {REMEDY}") from error


def tolerance(file: ModelFile, device: str) -> float:
    """Return the largest error relative to its stored outputs at which `file` counts as verified on `device`."""
    # A GPU rounds the products of float32 matrices more than the CPU on which the outputs were stored.
    return LOW_PRECISION_TOLERANCE if device != "cpu" else min(file.tolerance, LOW_PRECISION_TOLERANCE)


def max_relative_error(expected: Any, output: Any) -> float:
    """Return the largest absolute difference between two outputs, relative to the largest absolute expected value.

    Raises:
        ModelFileError: The outputs differ in number or shape, the expected ones hold no number, or some are not finite.
    """
    expected, output = outputs.tensors(expected), outputs.tensors(output)
    pairs = list(zip(expected, output, strict=False))
    if not any(a.numel() for a, _ in pairs) or not all(torch.isfinite(a).all() for a, _ in pairs):
        text = "The outputs to compare with must hold numbers, all of them finite; got NaN, infinity or none at all."
        raise ModelFileError(f"{text} Run the step that makes them again.")
    if len(expected) != len(output) or any(a.shape != b.shape for a, b in pairs):
        raise ModelFileError(
            f"The loaded model must return outputs of shapes {[tuple(t.shape) for t in expected]}, "
            f"got {[tuple(t.shape) for t in output]}. The export lost something; use another target."
        )
    if not all(torch.isfinite(b).all() for _, b in pairs if b.is_floating_point()):
        raise ModelFileError("The loaded model must return finite outputs, got NaN or infinity. Use another precision.")
    scale = max((a.double().abs().max().item() for a, _ in pairs if a.numel()), default=0.0)
    error = max(((a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel()), default=0.0)
    return error / scale if scale else error


def relative_error(expected: Callable[..., Any], found: Callable[..., Any], batches: Iterable[Example]) -> float:
    """Return the root mean square difference of two models' outputs, relative to the first one's.

    It is infinite where an output is not finite.
    """
    squares, total = 0.0, 0.0
    with torch.inference_mode():
        for inputs in batches:
            pairs = zip(outputs.tensors(expected(*inputs)), outputs.tensors(found(*inputs)), strict=True)
            for reference, output in pairs:
                squares += (output.double() - reference.double()).square().sum().item()
                total += reference.double().square().sum().item()
    error = (squares / total) ** 0.5 if total else squares**0.5
    return error if math.isfinite(error) else math.inf


def count_denormals(tensors: Iterable[torch.Tensor]) -> int:
    """Return how many numbers in float tensors are denormal as float32, in which processors compute with them."""
    count = 0
    for tensor in tensors:
        if tensor.is_floating_point():
            x = tensor.detach()
            x = x.float() if x.dtype in HALF_DTYPES.values() else x
            count += int(((x != 0) & (x.abs() < torch.finfo(x.dtype).smallest_normal)).sum())
    return count


def structured(arrays: Iterable[Any], like: Any) -> Any:
    """Return NumPy arrays as tensors in the structure of `like`; None leaves one tensor or a tuple."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if like is not None:
        return outputs.restore(tensors, like)
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _port(name: str, tensor: torch.Tensor, batch: int | None) -> Port:
    """Return the port of `tensor`, whose first dimension is any batch if it is of the size `batch`."""
    first, *rest = tensor.shape or (None,)
    shape = () if first is None else ("batch" if first == batch else first, *rest)
    return Port(name, str(tensor.dtype).removeprefix("torch."), shape)


def _compressed_bytes(paths: Iterable[Path]) -> int:
    """Return the size of the files after zlib at its fastest, which shows how much zeros save in transfer."""
    squeeze = zlib.compressobj(level=1)
    total = 0
    for path in paths:
        with path.open("rb") as file:
            total += sum(len(squeeze.compress(chunk)) for chunk in iter(partial(file.read, 1 << 20), b""))
    return total + len(squeeze.flush())
