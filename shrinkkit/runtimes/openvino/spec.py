"""OpenVINO."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shrinkkit.core.variant import ModelFile
from shrinkkit.runtimes.spec import Runtime, assignment, described, not_installed, numpy_inputs

PRECISION, GROUP_SIZE = "shrinkkit_precision", "shrinkkit_group_size"
"""Keys under which a model file states its settings: the float it computes in (`f32`, `f16`, `bf16`), and how many
numbers of an activation share a range; without the latter, activations stay floats."""


class OpenVino(Runtime):
    """ONNX files in float32, and OpenVINO's own in 8 and 16 bits."""

    name, title = "openvino", "OpenVINO"
    devices: tuple[str, ...] = ("cpu",)
    packages: tuple[str, ...] = ("openvino", "nncf", "onnx", "onnx-ir", "onnxscript")
    in_torch, compiles = False, False

    def missing(self, device: str) -> str:
        """Return why OpenVINO cannot run on this machine, '' if it can."""
        packages = not_installed("openvino", extra="openvino") or not_installed("nncf", extra="openvino")
        return packages or not_installed("onnx", extra="openvino")

    def settings(self, path: Path, *, threads: int) -> dict[str, Any]:
        """Return the properties that a model is compiled with; its precision is stated in the file.

        By default, OpenVINO computes float32 models in bfloat16 on processors that are fast at it.
        """
        content = path.read_bytes() if path.suffix == ".xml" and path.is_file() else b""

        def stated(key: str, default: str) -> str:
            match = re.search(rf'<{key} value="(\w+)"'.encode(), content)
            return match[1].decode() if match else default

        return {
            "INFERENCE_PRECISION_HINT": stated(PRECISION, "f32"),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": int(stated(GROUP_SIZE, "0")),
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }

    def snippet(self, file: ModelFile, settings: Mapping[str, Any], *, device: str = "cpu") -> str:
        """Return Python code that compiles a file and calls it once."""
        lines = [
            "import numpy as np",
            "import openvino",
            "",
            *assignment("settings", "{}", [f'"{key}": {json.dumps(value)},' for key, value in settings.items()]),
            f'model = openvino.Core().compile_model({json.dumps(file.path)}, "{device.upper()}", settings)',
            *numpy_inputs(file),
            f"output = list(model(inputs).values())  # {described(*file.outputs)}",
        ]
        return "\n".join(lines) + "\n"
