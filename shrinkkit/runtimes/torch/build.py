"""Model files for torch, which loads them without the user's class: TorchScript, or exported programs.

Baseline and variant must run in the same form, or a speed-up contains the form's own: the interpreter of TorchScript
takes less time for each operator than Python does, which is half of the time of a small model. So float models are
exported and then scripted, and int8 layers, which torch cannot export, are scripted too.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from shrinkkit import quiet
from shrinkkit.core.variant import LayerPrecision
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes import layers
from shrinkkit.runtimes.base import TOLERANCE, BuildRequest, BuiltFile, prove, refuse_unfaithful
from shrinkkit.runtimes.layers import TRANSPOSED
from shrinkkit.runtimes.spec import HALF
from shrinkkit.runtimes.torch import export, load, quantize
from shrinkkit.tasks import modules
from shrinkkit.tasks.modules import Example

_MANGLED = re.compile(rb"___torch_mangle_\d+")


def build(request: BuildRequest) -> BuiltFile:
    """Return the file of a variant for torch; int8 runs on the fastest engine that is exact on this processor."""
    model, precisions = lower(request)
    refuse_unfaithful(request, "torch", quantize.conversion_of(model).error)
    path, format, note = write(model, request.example, request.folder)
    options: dict[str, Any] = {"expected": request.outputs_of(model), "layers": precisions, "notes": [note]}
    if request.precision not in ("", *HALF):
        engine, conversion = quantize.engine_of(model), quantize.conversion_of(model)
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(conversion.times_ms.items()))
        chosen = f"the engine {engine} was chosen; the fastest call of each that was tried took {times}"
        options["notes"] = [chosen, conversion.note, note]
        # qnnpack multiplies in 16 bits and adds in 32 on every processor.
        options["exact_anywhere"] = conversion.narrow or engine == "qnnpack"
        # The file is loaded next, and one of the two in memory is enough.
        del model
    return prove(request, load.load, path, format=format, tolerance=TOLERANCE, **options)


def lower(request: BuildRequest) -> tuple[nn.Module, dict[str, LayerPrecision]]:
    """Return the model in the precision of `request`, in memory, and how its layers run if that differs."""
    if request.precision in ("", *HALF):
        return in_float(request)
    method = quantize.dynamic_int8 if request.precision == "dynamic-int8" else quantize.static_int8
    model = method(request.model, request.example, request.calibration, skip=request.skip)
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
    names = dict(request.model.named_modules())
    after = dict(quantized.named_modules())
    integer = {export.layer_name(name, names) for name, module in after.items() if quantize.is_int8(module)}
    kept = quantize.conversion_of(quantized).kept

    def reason(name: str, module: nn.Module) -> str:
        if isinstance(module, TRANSPOSED) and request.precision == "static-int8":
            return "torch's integer kernels for transposed convolutions compute wrong numbers"
        return kept.get(name, "")

    def runs_as(name: str) -> str:
        return "int8" if ("" if name == layers.ROOT else name) in integer else ""

    return layers.precisions(request, "torch", runs_as, folded=lambda name: name not in after, reason=reason)


def write(model: nn.Module, example: Example, folder: Path) -> tuple[Path, str, str]:
    """Write `model` into `folder`, as TorchScript, or as `.pt2` where TorchScript has no form for it.

    `model` is in eval mode on the CPU, `example` the positional inputs of one call, batch first. Returns the file, its
    format (`torchscript` or `pt2`), and a note on limitations ('' if none). Raises Unsupported if torch can neither
    export nor script the model.
    """
    path, note = folder / "model.torchscript.pt", ""
    extra, program = {"quantized_engine": quantize.engine_of(model)}, None
    quantized = model if extra["quantized_engine"] and isinstance(model, fx.GraphModule) else None
    try:
        if not (graph := quantized):
            program, note = export.export_plain(model, example)
            graph = program.module(check_guards=False)
        with quiet.libraries(), quantize.using_engine(extra["quantized_engine"]):
            scripted, layers_ = export.script(graph)
        extra["layers"] = json.dumps(layers_)
    except export.FAILURES as error:
        if quantized:
            raise Unsupported(f"TorchScript has no int8 form of it: {brief(error)}. Use another runtime.") from error
        if program is not None:
            path, note = write_program(model, example, folder)
            note = f"TorchScript has no form for this model ({brief(error)}), so its file is .pt2; {note}"
            return path, "pt2", note.removesuffix("; ")
        scripted = _script_source(model, error)
        note = f"torch.export cannot take this model ({brief(error)}), so its own code was scripted"
    # Saving unpacks int8 weights, with whatever engine is in force.
    with quiet.libraries(), quantize.using_engine(quantize.engine_of(model)):
        scripted.save(str(path), _extra_files=extra)
    _make_reproducible(path)
    return path, "torchscript", note


def write_program(model: nn.Module, example: Example, folder: Path) -> tuple[Path, str]:
    """Write the float `model` as the exported program `model.pt2`, and return the file and a note ('' if none).

    Raises Unsupported if torch cannot export the model.
    """
    try:
        program, note = export.export_plain(model, example)
    except export.FAILURES as error:
        raise Unsupported(f"torch cannot export this model: {brief(error)}. Use the torch runtime.") from error
    export.save(program, folder / "model.pt2")
    return folder / "model.pt2", note


def _script_source(model: nn.Module, cause: Exception) -> torch.jit.ScriptModule:
    """Return a model that torch cannot export, because of `cause`, as TorchScript compiled from its source."""
    with quiet.libraries(), modules.plain_attention(), quantize.using_engine(quantize.engine_of(model)):
        try:
            return torch.jit.script(model)
        except (RuntimeError, TypeError, AttributeError, OSError, torch.jit.frontend.FrontendError) as error:
            raise Unsupported(
                f"torch can neither export this model ({brief(cause)}) nor compile its source ({brief(error)}), so no "
                "file can be made of it. Give the task a module of tensors in, tensors out, whose forward branches on "
                "shapes and settings only."
            ) from cause


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
        # Types are numbered as objects name them, not as their files lie, which differs from count to count.
        numbered(old.read(next(e for e in old.infolist() if e.filename.endswith("/data.pkl"))))
        for entry in sorted(old.infolist(), key=lambda entry: numbered(entry.filename.encode())):
            name = entry.filename.partition("/")[2]
            if name.endswith(".debug_pkl") or name.startswith(("traced_inputs", ".data/serialization_id")):
                continue
            code = name.startswith("code/")
            content = numbered(old.read(entry)) if code or name == "data.pkl" else old.read(entry)
            kind = zipfile.ZIP_DEFLATED if code else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(f"model/{numbered(name.encode()).decode()}"), content, kind)
    slim.replace(path)
