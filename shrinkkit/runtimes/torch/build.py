"""Model files for torch, which loads them without the user's class: TorchScript, or exported programs.

Baseline and variant must run in the same form, or a speed-up contains the form's own: the interpreter of TorchScript
takes less time for each operator than Python does, which is half of the time of a small model. So float models are
exported and then scripted, and int8 layers, which torch cannot export, are scripted too.
"""

import copy
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from shrinkkit import quiet
from shrinkkit.core.variant import LayerPrecision
from shrinkkit.errors import ModelFileError, Unsupported, brief
from shrinkkit.runtimes import layers
from shrinkkit.runtimes.base import TOLERANCE, BuildRequest, BuiltFile, max_relative_error, prove
from shrinkkit.runtimes.layers import TRANSPOSED
from shrinkkit.runtimes.spec import HALF
from shrinkkit.runtimes.torch import load, quantize
from shrinkkit.runtimes.torch.quantize import HalfPrecision
from shrinkkit.tasks import modules, outputs
from shrinkkit.tasks.modules import Example

NOWHERE = "_empty_nn_module_stack"
"""How torch.export names the module of an operator that is called in none."""
_NOT_EXPORTED = (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, TypeError, AssertionError)
_MANGLED = re.compile(rb"___torch_mangle_\d+")


def build(request: BuildRequest) -> BuiltFile:
    """Return the file of a variant for torch; int8 runs on the fastest engine that is exact on this processor."""
    model, precisions = lower(request)
    if request.precision in ("", *HALF):
        path, format, note = write(model, request.example, request.folder)
        options: dict[str, Any] = {"expected": request.outputs_of(model), "layers": precisions, "notes": [note]}
        return prove(request, load.load, path, format=format, tolerance=TOLERANCE, **options)
    path, format, note = write(model, request.example, request.folder)
    engine = quantize.engine_of(model)
    times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(quantize.engine_times_ms(model).items()))
    notes = [f"the engine {engine} was chosen; the fastest call of each that was tried took {times}", note]
    inexact = [name for name in quantize.supported_engines() if not quantize.is_exact(name, request.precision)]
    notes += [f"int8 accumulators of {', '.join(inexact)} saturate on this processor"] if inexact else []
    expected = request.outputs_of(model)
    # The file is loaded next, and one of the two in memory is enough.
    del model
    return prove(
        request,
        load.load,
        path,
        format=format,
        tolerance=TOLERANCE,
        expected=expected,
        layers=precisions,
        notes=notes,
        # qnnpack multiplies in 16 bits and adds in 32 on every processor.
        exact_anywhere=quantize.narrow(engine, request.precision) or engine == "qnnpack",
    )


def lower(request: BuildRequest) -> tuple[nn.Module, dict[str, LayerPrecision]]:
    """Return the model in the precision of `request`, in memory, and how its layers run if that differs."""
    if request.precision in ("", *HALF):
        return in_float(request)
    if request.precision == "dynamic-int8":
        model = quantize.dynamic_int8(request.model, request.example, skip=request.skip)
    else:
        model = quantize.static_int8(request.model, request.example, request.calibration, skip=request.skip)
    return model, int8_layers(request, model)


def in_float(request: BuildRequest) -> tuple[nn.Module, dict[str, LayerPrecision]]:
    """Return the model in float or 16 bits, and how its layers run if that differs from the model of the request.

    It is not kept for other runtimes: a copy in 16 bits would take memory while their files are built.
    """
    if not request.precision:
        return request.model, {}
    model = quantize.half(request.model, request.example, dtype=request.precision)
    return model, {name: LayerPrecision(request.precision) for name in layers.parametrized(request.model)}


def int8_layers(request: BuildRequest, quantized: nn.Module) -> dict[str, LayerPrecision]:
    """Return how torch runs each layer of the model of `request` once it has become `quantized`."""
    names = dict(quantized.named_modules())
    integer = {name for name, module in names.items() if quantize.is_int8(module)}

    def reason(name: str, module: nn.Module) -> str:
        sealed = _sealed(request.model, name)
        static = request.precision == "static-int8"
        if sealed and (static or type(module).__name__ == "NonDynamicallyQuantizableLinear"):
            return f"torch does not quantize inside {sealed} by this method"
        if isinstance(module, TRANSPOSED) and static:
            return "torch's integer kernels for transposed convolutions compute wrong numbers"
        return ""

    return layers.precisions(
        request,
        "torch",
        lambda name: "int8" if name in integer else "",
        folded=lambda name: name not in names,
        reason=reason,
    )


def _sealed(model: nn.Module, name: str) -> str:
    """Return the type of the torch layer that layer `name` is a part of, '' if it is part of none."""
    modules = dict(model.named_modules())
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = modules[".".join(parts[:depth])]
        plain = isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        if type(parent).__module__.startswith("torch.nn.modules.") and not plain:
            return type(parent).__name__
    return ""


def write(model: nn.Module, example: Example, folder: Path) -> tuple[Path, str, str]:
    """Write `model` as TorchScript, or as `.pt2` where TorchScript has no form for it.

    Args:
        model: Model in eval mode, on the CPU.
        example: Positional inputs of one call, batch first.
        folder: Existing folder for the file.

    Returns:
        The file, its format (`torchscript` or `pt2`), and a note on limitations ('' if none).

    Raises:
        Unsupported: torch can neither export nor script the model.
    """
    path = folder / "model.torchscript.pt"
    extra = {"quantized_engine": quantize.engine_of(model)}
    program = None
    try:
        if extra["quantized_engine"]:
            scripted, note = _script_source(model, example)
        else:
            program, note = _export_plain(model, example)
            with quiet.libraries():
                scripted, layers_ = script(program)
            extra["layers"] = json.dumps(layers_)
    except _NOT_EXPORTED as error:
        if program is not None:
            path, note = write_program(model, example, folder)
            note = f"TorchScript has no form for this model ({brief(error)}), so its file is .pt2; {note}"
            return path, "pt2", note.removesuffix("; ")
        scripted, note = _script_source(model, example)
        note = f"torch.export cannot take this model ({brief(error)}), so its own code was scripted; {note}"
    # Saving unpacks int8 weights, with whatever engine is in force.
    with quiet.libraries(), quantize.using_engine(quantize.engine_of(model)):
        scripted.save(str(path), _extra_files=extra)
    _make_reproducible(path)
    return path, "torchscript", note.removesuffix("; ")


def write_program(model: nn.Module, example: Example, folder: Path) -> tuple[Path, str]:
    """Write the float `model` as the exported program `model.pt2`, and return the file and a note ('' if none).

    Raises:
        Unsupported: torch cannot export the model.
    """
    try:
        program, note = _export_plain(model, example)
    except _NOT_EXPORTED as error:
        raise Unsupported(
            f"inductor compiles exported programs, and torch cannot export this model: {brief(error)}. "
            "Use the torch runtime."
        ) from error
    save(program, folder / "model.pt2")
    return folder / "model.pt2", note


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


def _export_plain(model: nn.Module, example: Example) -> tuple[torch.export.ExportedProgram, str]:
    """Return the exported program, with outputs in tuples, lists and dicts only, and the note of `export`."""
    program, note = export(model, example)
    return (program, note) if _is_plain(program.call_spec.out_spec) else export(PlainOutputs(model), example)


def _is_plain(spec: Any) -> bool:
    """Return whether outputs of this structure, as torch describes it, are tuples, lists and dicts of tensors."""
    return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(map(_is_plain, spec.children())))


class PlainOutputs(nn.Module):
    """A model whose outputs are tuples, lists and dicts, so that its file needs no other class."""

    def __init__(self, model: nn.Module) -> None:
        """Hold `model`."""
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Return the model's outputs in plain containers."""
        return outputs.plain(self.model(*inputs))


def save(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write `program` to `path`, without its example and the model's code."""
    # The example would be kept as a pickle, with everything that it is a view of.
    program._example_inputs = None
    # So would the model's code, line by line, with the paths of this machine.
    for node in program.graph.nodes:
        for key in ("stack_trace", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    with quiet.libraries():
        torch.export.save(program, path)


def script(program: torch.export.ExportedProgram) -> tuple[torch.jit.ScriptModule, list[tuple[str, str]]]:
    """Return `program` as TorchScript, and name and layer of each of its operators, in the order they run.

    The outputs become one tensor or a flat tuple. Tensors that the program makes are made where its first input lies,
    so one file runs on any device.

    Raises:
        RuntimeError: TorchScript has no form for an operator of the program.
    """
    module = program.module(check_guards=False)
    graph, root = copy.deepcopy(module.graph), nn.Module()
    # The structure of inputs and outputs is Python's, which TorchScript does not know.
    graph.set_codegen(fx.graph.CodeGen())
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = _register(root, names, node.target, module)
        elif isinstance(node.target, torch._ops.OpOverload):
            sized = node.target is torch.ops.aten.sym_size.int
            node.target = torch.ops.aten.size if sized else node.target.overloadpacket
    _follow_input(graph)
    end = graph.output_node()
    results = end.args[0] if isinstance(end.args[0], list | tuple) else (end.args[0],)
    end.args = (results[0] if len(results) == 1 else tuple(results),)
    layers_ = [
        (operator(n.target), layer_of(n)) for n in graph.nodes if isinstance(n.target, torch._ops.OpOverloadPacket)
    ]
    return torch.jit.script(fx.GraphModule(root, graph).eval()), layers_


def layer_of(node: fx.Node) -> str:
    """Return the name, in the task's model, of the innermost module that `node` was exported from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    name = str(stack[-1][0]) if stack and NOWHERE not in stack[-1][0] else ""
    # A model in 16 bits, or with outputs of other classes, is held in another module, as `model`.
    for _, kind in stack:
        if not str(kind).endswith((f".{HalfPrecision.__name__}", f".{PlainOutputs.__name__}")):
            break
        name = name.removeprefix("model").removeprefix(".")
    return name


def operator(target: Any) -> str:
    """Return an operator's name without the name space of torch itself, and without its overload."""
    name = target if isinstance(target, str) else getattr(target, "_qualified_op_name", None) or str(target.name())
    return name.removeprefix("aten::").partition(".")[0]


def _register(root: nn.Module, names: dict[str, str], target: str, module: fx.GraphModule) -> str:
    """Give `root` the tensor `target` of `module` and return its name there, one that TorchScript can read."""
    if target not in names:
        name = re.sub(r"\W", "_", target)
        while name in names.values() or not name.isidentifier() or hasattr(root, name):
            name = f"_{name}"
        names[target] = name
        owner, _, last = target.rpartition(".")
        value = getattr(module.get_submodule(owner), last)
        if isinstance(value, nn.Parameter):
            root.register_parameter(name, value)
        else:
            root.register_buffer(name, value)
    return names[target]


def _follow_input(graph: fx.Graph) -> None:
    """Make tensors on the device of the first input wherever `graph` names a device, in place."""
    first = next((node for node in graph.nodes if node.op == "placeholder"), None)
    placed = [node for node in graph.nodes if isinstance(node.kwargs.get("device"), torch.device)]
    if first is None or not placed:
        return
    with graph.inserting_before(first.next):
        device = graph.call_function(getattr, (first, "device"))
    for node in placed:
        node.kwargs = {**node.kwargs, "device": device}


def _script_source(model: nn.Module, example: Example) -> tuple[torch.jit.ScriptModule, str]:
    """Return `model` as TorchScript: compiled where its source allows, else traced and checked at another batch."""
    engine = quantize.engine_of(model)
    with quiet.libraries(), modules.plain_attention(), torch.inference_mode(), quantize.using_engine(engine):
        try:
            if not isinstance(model, torch.fx.GraphModule):
                return torch.jit.script(model), ""
        except (RuntimeError, TypeError, AttributeError, OSError, torch.jit.frontend.FrontendError) as error:
            if not engine:
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
            message = brief(error).partition(" {")[0].partition(" tensor(")[0]
            raise Unsupported(f"torch cannot trace the quantized model: {message}. Use another runtime.") from error
        halved = tuple(x[: max(1, x.shape[0] // 2)].flip(0) for x in example)
        try:
            error_ = max_relative_error(model(*halved), traced(*halved))
        except (RuntimeError, ModelFileError):
            return traced, f"the batch is fixed at {example[0].shape[0]}: tracing recorded it"
        if not error_ <= TOLERANCE:
            raise Unsupported("torch cannot trace the quantized model: its control flow depends on the data.")
        return traced, ""


def _make_reproducible(path: Path) -> None:
    """Rewrite a TorchScript file without its example and the places that its code came from.

    The same model gives the same bytes, whatever the folder, the time, and what this process scripted before.
    """
    slim = path.with_suffix(".slim")
    numbers: dict[bytes, bytes] = {}

    def numbered(content: bytes) -> bytes:
        # Types of one name are distinguished by a count over the process.
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
