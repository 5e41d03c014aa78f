"""Model files: write them, and say what is in them and how far they are from what was meant. To run them see `loading`.

TorchScript for torch, `.pt2` from torch.export for inductor, ONNX for ONNX Runtime and OpenVINO. None of them needs the
user's class, and loading one runs no Python code from it.
"""

import hashlib
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shrinkkit import quiet
from shrinkkit.core.variant import ModelFile, Port
from shrinkkit.errors import ModelFileError, Unsupported, brief
from shrinkkit.runtimes.loading import Loaded
from shrinkkit.runtimes.onnx import onnxfiles, onnxnames
from shrinkkit.runtimes.torch import quantize, scripting
from shrinkkit.runtimes.torch.quantize import HalfPrecision
from shrinkkit.tasks import copies, modules, outputs
from shrinkkit.tasks.modules import Example

TOLERANCE = {"pt2": 1e-4, "torchscript": 1e-4, "onnx": 1e-3, "openvino": 1e-3}
"""Largest error of a loaded file from the model in memory, as a share of the largest output, by format."""

LOW_PRECISION_TOLERANCE = 0.02
"""The same for files in 8 or 16 bits, which may run elsewhere or on other threads.

ONNX Runtime's dynamic LSTM, for one, takes its ranges from what a thread sees: 0.0014 between 1 and 2 threads. Kernels
that saturate were seen at 0.019 and far beyond; `emulation` tells them apart.
"""

_NOT_EXPORTED = (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, TypeError, AssertionError)

_MANGLED = re.compile(rb"___torch_mangle_\d+")
INT8_OPERATORS = frozenset(
    "QLinearConv ConvInteger MatMulInteger MatMulIntegerToFloat QLinearMatMul QGemm DynamicQuantizeMatMul "
    "DynamicQuantizeLSTM QAttention".split()
)
"""Operators with which ONNX Runtime computes in integers; a weight that is dequantized before use is not among them."""


def write_torch(model: nn.Module, example: Example, folder: Path) -> tuple[Path, str, str]:
    """Write `model` as a file that torch loads without its class: TorchScript, whether in float or in int8.

    Float models are exported and then scripted, so that layers in float and in int8 run in one form. What TorchScript
    has no form for is written by `write_program`.

    Args:
        model: Model in eval mode, on the CPU.
        example: Positional inputs of one call, batch first.
        folder: Existing folder for the file.

    Returns:
        The file, its format (`torchscript` or `pt2`), and a note on what could not be had ('' if nothing).

    Raises:
        Unsupported: torch can neither export nor script the model.
    """
    path = folder / "model.torchscript.pt"
    extra = {"quantized_engine": quantize.engine_of(model)}
    program = None
    try:
        if extra["quantized_engine"]:
            script, note = _script(model, example)
        else:
            program, note = _exported(model, example)
            with quiet.libraries():
                script, layers = scripting.script(program)
            extra["layers"] = json.dumps(layers)
    except _NOT_EXPORTED as error:
        if program is not None:
            path, note = write_program(model, example, folder)
            note = f"TorchScript has no form for this model ({brief(error)}), so its file is .pt2; {note}"
            return path, "pt2", note.removesuffix("; ")
        script, note = _script(model, example)
        note = f"torch.export cannot take this model ({brief(error)}), so its own code was scripted; {note}"
    # Saving unpacks int8 weights, with whatever engine is in force.
    with quiet.libraries(), quantize.using_engine(quantize.engine_of(model)):
        script.save(str(path), _extra_files=extra)
    _forget_source(path)
    return path, "torchscript", note.removesuffix("; ")


def write_program(model: nn.Module, example: Example, folder: Path) -> tuple[Path, str]:
    """Write the float `model` as the exported program `model.pt2`, and return the file and a note ('' if nothing).

    Raises:
        Unsupported: torch cannot export the model.
    """
    try:
        program, note = _exported(model, example)
    except _NOT_EXPORTED as error:
        raise Unsupported(
            f"inductor compiles exported programs, and torch cannot export this model: {brief(error)}. "
            "Use the torch runtime."
        ) from error
    save(program, folder / "model.pt2")
    return folder / "model.pt2", note


def _exported(model: nn.Module, example: Example) -> tuple[torch.export.ExportedProgram, str]:
    """Return the exported program, with outputs in tuples, lists and dicts only, and the note of `export`."""
    program, note = export(model, example)
    return (program, note) if _is_plain(program.call_spec.out_spec) else export(PlainOutputs(model), example)


def export(model: nn.Module, example: Example) -> tuple[torch.export.ExportedProgram, str]:
    """Return the exported program with a dynamic batch, or with a fixed one and a note where the model forbids it.

    Args:
        model: Model in eval mode, on the CPU.
        example: Positional inputs of one call, batch first.

    Raises:
        RuntimeError, ValueError, TypeError, AssertionError, TorchDynamoException: torch cannot export the model.
    """
    # torch.export takes a batch of one for a constant.
    sample = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in example)
    batch = torch.export.Dim("batch", min=1)
    with quiet.libraries(), modules.plain_attention(), torch.no_grad():
        try:
            # A model that takes *inputs has one parameter for all of them.
            many = isinstance(model, (HalfPrecision, PlainOutputs))
            shapes: Any = tuple({0: batch} for _ in sample)
            return torch.export.export(model, sample, dynamic_shapes=(shapes,) if many else shapes), ""
        except (torch._dynamo.exc.UserError, torch.fx.experimental.symbolic_shapes.ConstraintViolationError) as error:
            program = torch.export.export(model, example)
            return program, f"the batch is fixed at {example[0].shape[0]}: {brief(error)}"


def save(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write `program` to `path`, without what it need not tell: its example and the model's code."""
    # The example would be kept as a pickle, with everything that it is a view of.
    program._example_inputs = None
    # So would the model's code, line by line, with the paths of this machine.
    for node in program.graph.nodes:
        for key in ("stack_trace", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    with quiet.libraries():
        torch.export.save(program, path)


def write_onnx(model: nn.Module, example: Example, path: Path, *, beside: bool = False) -> str:
    """Write `model` as FP32 ONNX whose weights carry the names of their layers.

    Args:
        model: Float model in eval mode, on the CPU.
        example: Positional inputs of one call, batch first.
        path: Where the file goes.
        beside: Put the weights into a second file, for what is only a step on the way; see `onnxfiles.write`.

    Returns:
        A note on what could not be had ('' if nothing).

    Raises:
        Unsupported: torch cannot export the model to ONNX, or it is too large for one file.
    """
    try:
        with torch.inference_mode():
            names = outputs.names(model(*example))
        program, note = export(model, example)
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
            f"ONNX Runtime and OpenVINO need an export to ONNX, and torch cannot export this model: {brief(error)}. "
            "Use the torch runtime."
        ) from error
    onnxnames.name_weights(onnx.model.graph, frozenset(program.state_dict))
    onnxnames.name_nodes(onnx.model.graph)
    onnxnames.name_outputs(onnx.model.graph, names)
    onnxnames.forget_source(onnx.model.graph)
    onnxfiles.write(onnx.model, path, beside=beside)
    return note


def describe(
    loaded: Loaded,
    folder: Path,
    *,
    format: str,
    example: Example,
    output: Any,
    fixed_batch: bool,
    max_relative_error: float,
    exact_on: str = "",
) -> ModelFile:
    """Return the record of a model file that lies in `folder`.

    Args:
        loaded: The file, loaded for its runtime.
        folder: The variant's folder.
        format: `pt2`, `torchscript`, `onnx`, or `openvino`.
        example: Positional inputs of one call, batch first.
        output: What the file returned for them.
        fixed_batch: Whether the file takes batches of the example's size only.
        max_relative_error: Of its outputs; see the function of that name.
        exact_on: Processors on which its integers cannot saturate; see `ModelFile`.
    """
    inputs, named = _names(loaded, output)
    files = parts(loaded.path)
    size = None if fixed_batch else len(example[0])
    return ModelFile(
        runtime=loaded.runtime,
        path=loaded.path.relative_to(folder).as_posix(),
        beside=tuple(path.relative_to(folder).as_posix() for path in files[1:]),
        format=format,
        size_bytes=sum(path.stat().st_size for path in files),
        compressed_bytes=_compressed_bytes(files),
        sha256=sha256(loaded.path),
        inputs=tuple(_port(name, x, size) for name, x in zip(inputs, example, strict=True)),
        outputs=tuple(_port(name, x, size) for name, x in zip(named, outputs.tensors(output), strict=True)),
        max_relative_error=max_relative_error,
        tolerance=TOLERANCE[format],
        exact_on=exact_on,
    )


def parts(path: Path) -> tuple[Path, ...]:
    """Return the file at `path` and those that have to lie beside it."""
    return (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a model file and of what has to lie beside it, as 64 hexadecimal digits.

    Raises:
        ModelFileError: One of them is missing.
    """
    digest = hashlib.sha256()
    for chunk in _chunks(parts(path)):
        digest.update(chunk)
    return digest.hexdigest()


def tolerance(file: ModelFile, device: str) -> float:
    """Return the largest error against its stored outputs at which `file` counts as verified on `device`."""
    # A GPU rounds the products of float32 matrices more than the CPU on which the outputs were stored.
    return LOW_PRECISION_TOLERANCE if device != "cpu" else min(file.tolerance, LOW_PRECISION_TOLERANCE)


def max_relative_error(expected: Any, found: Any) -> float:
    """Return the largest absolute difference between two outputs, as a share of the largest absolute expected value.

    Raises:
        ModelFileError: The outputs differ in number or shape, the expected ones hold no number, or some are not finite.
    """
    pairs = list(zip(outputs.tensors(expected), outputs.tensors(found), strict=False))
    if not any(a.numel() for a, _ in pairs) or not all(torch.isfinite(a).all() for a, _ in pairs):
        raise ModelFileError(
            "The outputs to compare with must hold numbers, all of them finite; got NaN, infinity or none at all. "
            "Run the step that makes them again."
        )
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


@copies.freeing_large_blocks()
def onnx_int8_weights(path: Path) -> frozenset[str]:
    """Return the names of the weights that ONNX Runtime multiplies as integers, read off the graph that it runs.

    Names are those of the file, without what the quantizer appended: `stem.0.weight`.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # What is in the weights does not matter here, and they would be packed anew and written whole.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    stored = {i.name for i in graph.initializer if i.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)}
    return frozenset(
        name.removesuffix("_quantized")
        for node in graph.node
        if node.op_type in INT8_OPERATORS
        for name in node.input
        if name in stored and name.endswith("_quantized")
    )


def _script(model: nn.Module, example: Example) -> tuple[torch.jit.ScriptModule, str]:
    """Return `model` as TorchScript: compiled where its source allows, else traced and checked at another batch."""
    with (
        quiet.libraries(),
        modules.plain_attention(),
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
            # The message goes on with the numbers that it met.
            said = brief(error).partition(" {")[0].partition(" tensor(")[0]
            raise Unsupported(f"torch cannot trace the quantized model: {said}. Use another runtime.") from error
        halved = tuple(x[: max(1, x.shape[0] // 2)].flip(0) for x in example)
        try:
            moved = max_relative_error(model(*halved), traced(*halved))
        except (RuntimeError, ModelFileError):
            return traced, f"the batch is fixed at {example[0].shape[0]}: tracing recorded it"
        if not moved <= TOLERANCE["torchscript"]:
            raise Unsupported("torch cannot trace the quantized model: its control flow depends on the data.")
        return traced, ""


class PlainOutputs(nn.Module):
    """A model whose outputs are tuples, lists and dicts, so that its file needs no class of its own."""

    def __init__(self, model: nn.Module) -> None:
        """Hold `model`."""
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Return the model's outputs in plain containers."""
        return outputs.plain(self.model(*inputs))


def _is_plain(spec: Any) -> bool:
    """Return whether outputs of this structure, as torch describes it, are tuples, lists and dicts of tensors."""
    return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(map(_is_plain, spec.children())))


def _forget_source(path: Path) -> None:
    """Write a TorchScript file anew, without its example and the places that its code came from.

    The same model gives the same bytes, whatever the folder, the time, and what this process scripted before.
    """
    slim = path.with_suffix(".slim")
    numbers: dict[bytes, bytes] = {}

    def numbered(content: bytes) -> bytes:
        # Types of one name are told apart by a count over the process.
        return _MANGLED.sub(lambda m: numbers.setdefault(m[0], b"___torch_mangle_%d" % len(numbers)), content)

    with zipfile.ZipFile(path) as old, zipfile.ZipFile(slim, "w") as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            if name.endswith(".debug_pkl") or name.startswith(("traced_inputs", ".data/serialization_id")):
                continue
            code = name.startswith("code/")
            content = numbered(old.read(entry)) if code or name == "data.pkl" else old.read(entry)
            kind = zipfile.ZIP_DEFLATED if code else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(f"model/{numbered(name.encode()).decode()}"), content, kind)
    slim.replace(path)


def _names(loaded: Loaded, output: Any) -> tuple[list[str], list[str]]:
    """Return the names of a file's inputs and outputs: its own, or for torch those of its parameters and its output."""
    source = loaded.source
    if loaded.runtime == "onnxruntime":
        return [i.name for i in source.get_inputs()], [o.name for o in source.get_outputs()]
    if loaded.runtime == "openvino":
        return [i.get_any_name() for i in source.inputs], [o.get_any_name() for o in source.outputs]
    if isinstance(source, torch.jit.ScriptModule):
        return [a.name for a in source._c._get_method("forward").schema.arguments[1:]], outputs.names(output)
    return [n.name for n in source.graph.nodes if n.op == "placeholder"], outputs.names(output)


def _port(name: str, tensor: torch.Tensor, batch: int | None) -> Port:
    """Return the port of `tensor`, whose first dimension is any batch if it is of the size `batch`."""
    first, *rest = tensor.shape or (None,)
    shape = () if first is None else ("batch" if first == batch else first, *rest)
    return Port(name, str(tensor.dtype).removeprefix("torch."), shape)


def _chunks(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    yield chunk
        except FileNotFoundError as error:
            raise ModelFileError(f"{path.name} is missing. Run the step that makes it again.") from error


def _compressed_bytes(paths: Sequence[Path]) -> int:
    """Return the size of the files after zlib at its fastest, which shows what zeros are worth in transit."""
    squeeze = zlib.compressobj(level=1)
    total = sum(len(squeeze.compress(chunk)) for chunk in _chunks(paths))
    return total + len(squeeze.flush())
