"""Code that loads and calls a model file without shrinkkit and without the user's class, as text for a README.

Needs no torch. What a file is loaded with here is what `loading` loads it with.
"""

import json
from collections.abc import Sequence
from typing import Any

from shrinkkit.core.variant import ModelFile, Port

BATCH = 1
"""What stands in the code where any batch will do."""
GROUP_SIZE = 64
"""Numbers of an activation that share a range in OpenVINO's dynamic int8. Of 32, 64 and whole rows, 64 was fastest."""
PRECISIONS = {"float16": "f16", "bfloat16": "bf16"}
"""OpenVINO's names for the floats that a recipe's method asks for; all others compute in `f32`."""
OPERATORS = "torch.ao.quantization.fx._decomposed"
"""Registers the operators that an int8 program of torch.export is made of, when it is imported."""


def settings(file: ModelFile, *, method: str, threads: int, engine: str) -> dict[str, Any]:
    """Return the settings with which a model file is measured, by the names that its runtime has for them.

    Args:
        file: Whose runtime is asked for.
        method: The recipe's precision; empty for float32.
        threads: Threads of one call, >= 1.
        engine: torch's quantized engine that a TorchScript file was packed for; empty for none.
    """
    if file.runtime == "onnxruntime":
        entries = {"session.force_spinning_stop": "1"}
        return {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "session_config_entries": entries}
    if file.runtime == "openvino":
        return {
            "INFERENCE_PRECISION_HINT": PRECISIONS.get(method, "f32"),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP_SIZE if method == "dynamic-int8" else 0,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
    if file.runtime == "inductor":
        int8 = {"operators": OPERATORS} if method.endswith("int8") else {}
        return {"num_threads": threads, "freezing": True, **int8}
    return {"num_threads": threads, **({"quantized_engine": engine} if engine else {})}


def code(file: ModelFile, settings: dict[str, Any], *, device: str = "cpu") -> str:
    """Return Python code that loads a model file and calls it once on zeros; run in the folder of the file.

    Args:
        file: What to load, and its inputs.
        settings: What the function of that name returned for it.
        device: `cpu`, `cuda` or `mps`.
    """
    lines = {"onnxruntime": _onnxruntime, "openvino": _openvino}.get(file.runtime, _torch)(file, settings, device)
    return "\n".join(lines) + "\n"


def _torch(file: ModelFile, settings: dict[str, Any], device: str) -> list[str]:
    compiled, script = file.runtime == "inductor", file.format == "torchscript"
    lines = ["import torch"]
    if compiled:
        lines.append("import torch._inductor.config")
    if operators := settings.get("operators"):
        lines.append(f"import {operators}  # registers the operators of the file")
    if not script and device != "cpu":
        lines.append("from torch.export.passes import move_to_device_pass")
    lines += ["", f"torch.set_num_threads({settings['num_threads']})"]
    if engine := settings.get("quantized_engine"):
        lines.append(f'torch.backends.quantized.engine = "{engine}"  # what the weights are packed for')
    if compiled:
        lines.append("torch._inductor.config.freezing = True  # packs weights and chooses kernels when it compiles")
    if script:
        moved = "" if device == "cpu" else f'.to("{device}")'
        lines.append(f"model = torch.jit.freeze(torch.jit.load({json.dumps(file.path)}){moved}.eval())")
    else:
        lines.append(f"program = torch.export.load({json.dumps(file.path)})")
        program = "program" if device == "cpu" else f'move_to_device_pass(program, "{device}")'
        lines.append(f"model = torch.compile({program}.module())" if compiled else f"model = {program}.module()")
    place = "" if device == "cpu" else f', device="{device}"'
    inputs = [f"    torch.zeros({_shape(p)}, dtype=torch.{p.dtype}{place}),  # {p.name}" for p in file.inputs]
    return [
        *lines,
        "inputs = [",
        *inputs,
        "]",
        "with torch.inference_mode():",
        f"    output = model(*inputs)  # {_out(file)}",
    ]


def _onnxruntime(file: ModelFile, settings: dict[str, Any], device: str) -> list[str]:
    provider = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
    intra, inter = settings["intra_op_num_threads"], settings["inter_op_num_threads"]
    return [
        "import numpy as np",
        "import onnxruntime",
        "",
        "options = onnxruntime.SessionOptions()",
        f"options.intra_op_num_threads, options.inter_op_num_threads = {intra}, {inter}",
        *(
            f'options.add_session_config_entry("{key}", "{value}")'
            for key, value in settings["session_config_entries"].items()
        ),
        f'session = onnxruntime.InferenceSession({json.dumps(file.path)}, options, providers=["{provider}"])',
        *_arrays(file),
        f"output = session.run(None, inputs)  # {_out(file)}",
    ]


def _openvino(file: ModelFile, settings: dict[str, Any], device: str) -> list[str]:
    return [
        "import numpy as np",
        "import openvino",
        "",
        *_listed("settings", "{}", [f'"{key}": {json.dumps(value)},' for key, value in settings.items()]),
        f'model = openvino.Core().compile_model({json.dumps(file.path)}, "{device.upper()}", settings)',
        *_arrays(file),
        f"output = list(model(inputs).values())  # {_out(file)}",
    ]


def _arrays(file: ModelFile) -> list[str]:
    return _listed("inputs", "{}", [f'{json.dumps(p.name)}: np.zeros({_shape(p)}, "{p.dtype}"),' for p in file.inputs])


def _listed(name: str, brackets: str, entries: Sequence[str]) -> list[str]:
    """Return the lines that assign a list or dict."""
    return [f"{name} = {brackets[0]}", *(f"    {entry}" for entry in entries), brackets[1]]


def _shape(port: Port) -> str:
    """Return a port's shape as a tuple in Python, with a number for the batch."""
    sizes = [str(BATCH if size == "batch" else size) for size in port.shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _out(file: ModelFile) -> str:
    """Return the file's outputs as a comment."""
    return ", ".join(described(port) for port in file.outputs)


def described(port: Port) -> str:
    """Return a port in one phrase: `logits float32 [batch, 10]`."""
    return f"{port.name} {port.dtype} [{', '.join(map(str, port.shape))}]"
