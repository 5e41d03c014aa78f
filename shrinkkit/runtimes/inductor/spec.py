"""torch.compile's inductor as a runtime: exported programs, compiled as they are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shrinkkit.core.variant import ModelFile
from shrinkkit.runtimes.spec import INT8, Runtime, no_compiler, not_installed
from shrinkkit.runtimes.torch.spec import code, no_cuda, program, read_entry

OPERATORS = "torch.ao.quantization.fx._decomposed"
"""Module whose import registers the operators of an int8 program."""


class Inductor(Runtime):
    """torch.compile with its default compiler."""

    name, title = "inductor", "inductor"
    devices: tuple[str, ...] = ("cpu", "cuda")
    packages: tuple[str, ...] = ("torch", "torchao")
    in_torch, compiles = True, True

    def missing(self, device: str) -> str:
        """Return why inductor cannot run on a device of this machine, '' if it can."""
        on_gpu = not_installed("torch") or no_cuda() if device == "cuda" else ""
        compiler = not_installed("torch") or on_gpu or no_compiler() or not_installed("torchao", extra="inductor")
        return compiler or (not_installed("triton") if device == "cuda" else "")

    def refuses(self, precision: str, device: str) -> str:
        """Return why inductor has no files in a precision for a device, '' if it has."""
        no_kernels = precision in INT8 and device == "cuda"
        return "inductor has no CUDA kernels for int8 models of torch.export" if no_kernels else ""

    def settings(self, path: Path, *, threads: int) -> dict[str, Any]:
        """Return the number of threads, whether to freeze, and what registers the operators of an int8 program."""
        # Integer kernels need freezing. In float it took as long with it as without: 4.3 ms for a small Swin.
        int8 = {"operators": OPERATORS} if holds_integers(path) else {}
        return {"num_threads": threads, "freezing": True, **int8}

    def snippet(self, file: ModelFile, settings: Mapping[str, Any], *, device: str = "cpu") -> str:
        """Return Python code that loads and compiles a file and calls it once."""
        imports = ["import torch", "import torch._inductor.config"]
        if "operators" in settings:
            imports.append(f"import {settings['operators']}  # registers the operators of the file")
        lines = [
            "",
            f"torch.set_num_threads({settings['num_threads']})",
            f"torch._inductor.config.freezing = {settings['freezing']}",
            *program(file, device),
            "model = torch.compile(program.module())",
        ]
        return code(file, imports, lines, device)


def holds_integers(path: Path) -> bool:
    """Return whether an exported program was quantized to integers."""
    return b"quantized_decomposed." in (read_entry(path, "/models/model.json") or b"")
