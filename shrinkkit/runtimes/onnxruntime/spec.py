"""ONNX Runtime."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shrinkkit.core import machines
from shrinkkit.core.variant import ModelFile
from shrinkkit.runtimes.spec import HALF, INT8, Runtime, described, not_installed, numpy_inputs

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntime(Runtime):
    """ONNX files in float32 and int8."""

    name, title = "onnxruntime", "ONNX Runtime"
    devices: tuple[str, ...] = ("cpu", "cuda")
    packages: tuple[str, ...] = ("onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir", "onnxscript")
    in_torch, compiles = False, False

    def missing(self, device: str) -> str:
        """Return why ONNX Runtime cannot run on a device of this machine, '' if it can."""
        reason = not_installed("onnxruntime", extra="onnxruntime") or not_installed("onnx", extra="onnxruntime")
        return reason or (_no_cuda_provider() if device == "cuda" else "")

    def refuses(self, precision: str, device: str) -> str:
        """Return why ONNX Runtime has no files in a precision for a device, '' if it has."""
        if device == "cuda" and precision in INT8:
            return "ONNX Runtime computes int8 models in float on CUDA, between casts"
        if device == "cuda" and precision in HALF:
            return "only float32 files are made for ONNX Runtime; cuda/torch has 16-bit ones"
        then = {"float16": "casts each layer back to float32", "bfloat16": "refuses to load the model"}.get(precision)
        return f"ONNX Runtime has no {precision} kernels for CPUs and {then}" if then else ""

    def settings(self, path: Path, *, threads: int) -> dict[str, Any]:
        """Return the options of a session, by their names in `SessionOptions`."""
        # Without the entry, ONNX Runtime's threads spin on after a call and slow whatever runs next.
        entries = {"session.force_spinning_stop": "1"}
        return {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "session_config_entries": entries}

    def snippet(self, file: ModelFile, settings: Mapping[str, Any], *, device: str = "cpu") -> str:
        """Return Python code that loads a file and calls it once."""
        options = dict(settings)
        entries = options.pop("session_config_entries")
        lines = [
            "import numpy as np",
            "import onnxruntime",
            "",
            "options = onnxruntime.SessionOptions()",
            *(f"options.{name} = {value}" for name, value in options.items()),
            *(f'options.add_session_config_entry("{key}", "{value}")' for key, value in entries.items()),
            f"session = onnxruntime.InferenceSession({json.dumps(file.path)}, options, "
            f'providers=["{PROVIDERS[device]}"])',
            *numpy_inputs(file),
            f"output = session.run(None, inputs)  # {described(*file.outputs)}",
        ]
        return "\n".join(lines) + "\n"


def _no_cuda_provider() -> str:
    package = find_spec("onnxruntime")
    folders = [Path(place) for place in (package.submodule_search_locations or ())] if package else []
    if not any(list(folder.glob("capi/*onnxruntime_providers_cuda.*")) for folder in folders):
        return "this onnxruntime is a build without CUDA. Install another: pip install onnxruntime-gpu"
    return "" if machines._gpus() else "no NVIDIA GPU is visible to this process. Use `cpu/onnxruntime`"
