"""Model files: write them, load them on a target, and prove that what was loaded computes what was meant.

Two formats for torch (`.pt2` from torch.export; TorchScript for what cannot be exported) and ONNX for ONNX Runtime.
None of them needs the user's class, and loading one runs no Python code from it.
"""

import copy
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from shrinkkit import onnxnames, outputs, quantize, quiet
from shrinkkit.errors import ModelFileError, Unsupported, brief
from shrinkkit.records import ModelFile, sha256
from shrinkkit.tasks import Example

TOLERANCE = {"pt2": 1e-4, "torchscript": 1e-4, "onnx": 1e-3}
"""Largest deviation of a loaded file from the model in memory, as a share of the largest output, by format."""

LOW_PRECISION_TOLERANCE = 0.02
"""The same for files in 8 or 16 bits, which may run elsewhere or on other threads.

ONNX Runtime's dynamic LSTM, for one, takes its ranges from what a thread sees: 0.0014 between 1 and 2 threads. Kernels
that saturate were seen at 0.019 and far beyond; `emulation` tells them apart.
"""

INT8_OPERATORS = frozenset(
    "QLinearConv ConvInteger MatMulInteger MatMulIntegerToFloat QLinearMatMul QGemm DynamicQuantizeMatMul "
    "DynamicQuantizeLSTM QAttention".split()
)
"""Operators with which ONNX Runtime computes in integers; a weight that is dequantized before use is not among them."""


@dataclass(frozen=True)
class Loaded:
    """A model file ready to run on one target.

    Call it with a batch of CPU tensors for CPU outputs; `prepare` gives a call without arguments for timing.
    """

    path: Path
    runtime: str
    device: str
    prepare: Callable[[Example], Callable[[], Any]]
    """From inputs to a call that computes them once and leaves the result on the device."""
    fetch: Callable[[Any], Any]
    """From what the call returned to CPU tensors."""
    again: Callable[[], "Loaded"]
    """Returns the same model at another place in memory."""

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Return the outputs for one batch of CPU tensors, as CPU tensors."""
        with torch.inference_mode():
            return self.fetch(self.prepare(inputs)())


def write_torch(model: nn.Module, example: Example, folder: Path) -> tuple[Path, str, str]:
    """Write `model` as a file that torch loads without its class.

    Float models become `model.pt2`. torch cannot export its own int8 layers, nor models whose control flow depends on
    the data: these become `model.torchscript.pt`.

    Args:
        model: Model in eval mode, on the CPU.
        example: Positional inputs of one call, batch first.
        folder: Existing folder for the file.

    Returns:
        The file, its format (`pt2` or `torchscript`), and a note on what could not be had ('' if nothing).

    Raises:
        Unsupported: torch can neither export nor script the model.
    """
    note = ""
    if not quantize.engine_of(model):
        try:
            program, note = _export(model, example)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, TypeError, AssertionError) as error:
            note = f"torch.export cannot take this model ({brief(error)}), so its file is TorchScript"
        else:
            # The example would be kept in the file, as a pickle and with everything that it is a view of.
            program._example_inputs = None
            path = folder / "model.pt2"
            with quiet.libraries():
                torch.export.save(program, path)
            return path, "pt2", note
    path = folder / "model.torchscript.pt"
    script, script_note = _script(model, example)
    with quiet.libraries():
        script.save(str(path), _extra_files={"quantized_engine": quantize.engine_of(model)})
    return path, "torchscript", "; ".join(filter(None, (note, script_note)))


def write_onnx(model: nn.Module, example: Example, path: Path) -> str:
    """Write `model` as FP32 ONNX whose weights carry the names of their layers.

    Args:
        model: Float model in eval mode, on the CPU.
        example: Positional inputs of one call, batch first.
        path: Where the file goes.

    Returns:
        A note on what could not be had ('' if nothing).

    Raises:
        Unsupported: torch cannot export the model to ONNX.
    """
    try:
        program, note = _export(model, example)
        with quiet.libraries():
            onnx = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False)
        assert onnx is not None
    except (
        torch._dynamo.exc.TorchDynamoException,
        torch.onnx.OnnxExporterError,
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
    ) as error:
        raise Unsupported(
            f"`cpu/onnxruntime` needs an export to ONNX, and torch cannot export this model: {brief(error)}. "
            "Use 'cpu/torch' for it."
        ) from error
    onnxnames.name_weights(onnx.model.graph, frozenset(program.state_dict))
    onnx.save(str(path))
    return note


def load(path: Path, *, runtime: str, device: str = "cpu", threads: int = 1, like: Any = None) -> Loaded:
    """Return the model file at `path`, loaded for `runtime` on `device`.

    Args:
        path: A `.pt2`, `.torchscript.pt` or `.onnx` file.
        runtime: `torch` or `onnxruntime`.
        device: `cpu` or `cuda`.
        threads: Intra-op threads of an ONNX Runtime session; torch's are a setting of the process.
        like: An output of the model before export. ONNX Runtime returns a flat list, which is put into its structure;
            None leaves a single tensor or a tuple.

    Raises:
        ModelFileError: The file is missing, damaged, or holds pickled objects.
    """
    if not path.is_file():
        raise ModelFileError(f"{path} must be a model file, and there is none. Run the step that makes it again.")
    if runtime == "onnxruntime":
        return _load_onnx(path, threads, like)
    return _load_torch(path, device)


def describe(path: Path, folder: Path, *, runtime: str, format: str, deviation: float) -> ModelFile:
    """Return the record of the model file at `path`, which lies in `folder`."""
    return ModelFile(
        runtime=runtime,
        path=path.relative_to(folder).as_posix(),
        format=format,
        size_bytes=path.stat().st_size,
        compressed_bytes=_compressed_bytes(path),
        sha256=sha256(path),
        deviation=deviation,
    )


def deviation(expected: Any, found: Any) -> float:
    """Return the largest absolute difference between two outputs, as a share of the largest absolute expected value.

    Raises:
        ModelFileError: The outputs differ in number or shape, or the found ones are not finite.
    """
    pairs = list(zip(outputs.tensors(expected), outputs.tensors(found), strict=False))
    if len(outputs.tensors(expected)) != len(outputs.tensors(found)) or any(a.shape != b.shape for a, b in pairs):
        raise ModelFileError(
            f"The loaded model must return outputs of shapes {[tuple(t.shape) for t in outputs.tensors(expected)]}, "
            f"got {[tuple(t.shape) for t in outputs.tensors(found)]}. The export lost something; use another target."
        )
    if not all(torch.isfinite(b).all() for _, b in pairs if b.is_floating_point()):
        raise ModelFileError("The loaded model must return finite outputs, got NaN or infinity. Use another precision.")
    scale = max((a.double().abs().max().item() for a, _ in pairs if a.numel()), default=0.0)
    error = max(((a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel()), default=0.0)
    return error / scale if scale else error


def onnx_int8_weights(path: Path) -> frozenset[str]:
    """Return the names of the weights that ONNX Runtime multiplies as integers, read off the graph that it runs.

    Names are those of the file, without what the quantizer appended: `stem.0.weight`.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    stored = {i.name for i in graph.initializer if i.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)}
    return frozenset(
        name.removesuffix("_quantized")
        for node in graph.node
        if node.op_type in INT8_OPERATORS
        for name in node.input
        if name in stored and name.endswith("_quantized")
    )


def _export(model: nn.Module, example: Example) -> tuple[torch.export.ExportedProgram, str]:
    """Return the exported program with a dynamic batch, or with a fixed one and a note where the model forbids it."""
    # torch.export takes a batch of one for a constant.
    sample = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in example)
    batch = torch.export.Dim("batch", min=1)
    with quiet.libraries(), quantize.plain_attention(), torch.no_grad():
        try:
            # A model that takes *inputs has one parameter for all of them.
            many = isinstance(model, quantize.HalfPrecision)
            shapes: Any = tuple({0: batch} for _ in sample)
            return torch.export.export(model, sample, dynamic_shapes=(shapes,) if many else shapes), ""
        except (torch._dynamo.exc.UserError, torch.fx.experimental.symbolic_shapes.ConstraintViolationError) as error:
            program = torch.export.export(model, example)
            return program, f"the batch is fixed at {example[0].shape[0]}: {brief(error)}"


def _script(model: nn.Module, example: Example) -> tuple[torch.jit.ScriptModule, str]:
    """Return `model` as TorchScript: compiled where its source allows, else traced and checked at another batch."""
    with (
        quiet.libraries(),
        quantize.plain_attention(),
        torch.inference_mode(),
        quantize.using_engine(quantize.engine_of(model)),
    ):
        try:
            if not isinstance(model, torch.fx.GraphModule):
                return torch.jit.script(model), ""
        except (RuntimeError, TypeError, AttributeError, OSError, torch.jit.frontend.FrontendError) as error:
            if not quantize.engine_of(model):
                raise Unsupported(
                    f"torch can neither export nor script this model, so no file can be made of it: {brief(error)}. "
                    "Rewrite the control flow in its forward."
                ) from error
        try:
            traced: torch.jit.ScriptModule = torch.jit.trace(  # type: ignore[no-untyped-call]
                model, example, check_trace=False, strict=False
            )
        except (RuntimeError, TypeError) as error:
            raise Unsupported(f"torch cannot trace the quantized model: {brief(error)}.") from error
        halved = tuple(x[: max(1, x.shape[0] // 2)].flip(0) for x in example)
        try:
            moved = deviation(model(*halved), traced(*halved))
        except (RuntimeError, ModelFileError):
            return traced, f"the batch is fixed at {example[0].shape[0]}: tracing recorded it"
        if moved > TOLERANCE["torchscript"]:
            raise Unsupported("torch cannot trace the quantized model: its control flow depends on the data.")
        return traced, ""


def _load_torch(path: Path, device: str) -> Loaded:
    try:
        with quiet.libraries():
            if path.suffix == ".pt2":
                _refuse_pickles(path)
                program = torch.export.load(path)
                if device != "cpu":
                    program = move_to_device_pass(program, device)
                module: Any = program.module()
            else:
                extra = {"quantized_engine": ""}
                module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)  # type: ignore[no-untyped-call]
                engine = extra["quantized_engine"]
                engine = engine.decode() if isinstance(engine, bytes) else engine
                if engine:
                    # Packed weights are repacked for the engine in force when the file is read.
                    with quantize.using_engine(engine):
                        module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
                module = module.to(device).eval()
    except (RuntimeError, ValueError, OSError, KeyError, zipfile.BadZipFile, AssertionError) as error:
        raise ModelFileError(
            f"{path.name} cannot be loaded: {brief(error)}. It is damaged or was made by another version of torch; "
            "run the step that makes it again."
        ) from error

    return _on_torch(module, path, device)


def _on_torch(module: Any, path: Path, device: str) -> Loaded:
    def prepare(inputs: Example) -> Callable[[], Any]:
        placed = tuple(x.to(device) for x in inputs)

        @torch.inference_mode()
        def call() -> Any:
            return module(*placed)

        return call

    def fetch(output: Any) -> Any:
        return outputs.convert(output, lambda t: t.cpu())

    def again() -> Loaded:
        with quiet.libraries():
            return _on_torch(copy.deepcopy(module), path, device)

    return Loaded(path, "torch", device, prepare, fetch, again)


def _load_onnx(path: Path, threads: int, like: Any) -> Loaded:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Without this, ONNX Runtime's threads go on spinning after a call and slow whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (
        states.Fail,
        states.InvalidProtobuf,
        states.InvalidGraph,
        states.NotImplemented,
        states.RuntimeException,
        states.InvalidArgument,
        states.NoSuchFile,
    ) as error:
        raise ModelFileError(
            f"{path.name} cannot be loaded by ONNX Runtime: {brief(error)}. Run the step that makes it again."
        ) from error
    names = [i.name for i in session.get_inputs()]

    def prepare(inputs: Example) -> Callable[[], Any]:
        feed = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return lambda: session.run(None, feed)

    def fetch(output: Any) -> Any:
        arrays = [torch.from_numpy(array) for array in output]
        if like is not None:
            return outputs.restore(arrays, like)
        return arrays[0] if len(arrays) == 1 else tuple(arrays)

    return Loaded(path, "onnxruntime", "cpu", prepare, fetch, lambda: _load_onnx(path, threads, like))


def _refuse_pickles(path: Path) -> None:
    """Raise if a tensor in the `.pt2` archive is stored as a pickle, which could run code when loaded."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json") and b'"use_pickle"' in (text := archive.read(name)):
                entries = json.loads(text).get("config", {})
                if any(entry.get("use_pickle") for entry in entries.values()):
                    raise ModelFileError(f"{path.name} must hold plain tensors, but {name} names pickled ones.")


def _compressed_bytes(path: Path) -> int:
    """Return the size of the file after zlib at its fastest, which shows what zeros are worth in transit."""
    squeeze, total = zlib.compressobj(level=1), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total += len(squeeze.compress(chunk))
    return total + len(squeeze.flush())
