"""torch as a runtime: TorchScript, or an exported program where TorchScript has no form for it."""

import importlib.metadata
import json
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shrinkkit.core import machines
from shrinkkit.core.variant import ModelFile
from shrinkkit.runtimes.spec import INT8, Runtime, described, not_installed, shape


class Torch(Runtime):
    """torch, operator by operator."""

    name, title = "torch", "torch"
    devices: tuple[str, ...] = ("cpu", "cuda", "mps")
    packages: tuple[str, ...] = ("torch",)
    in_torch, compiles = True, False

    def missing(self, device: str) -> str:
        """Return why torch cannot run on a device of this machine, '' if it can."""
        if missing := not_installed("torch"):
            return missing
        is_apple = (platform.system(), platform.machine()) == ("Darwin", "arm64")
        no_gpu = "it needs an Apple GPU, which this machine does not have. Use `cpu/torch`"
        return no_cuda() if device == "cuda" else no_gpu if device == "mps" and not is_apple else ""

    def refuses(self, precision: str, device: str) -> str:
        """Return why torch has no files in a precision for a device, '' if it has."""
        where = {"cuda": "CUDA", "mps": "Apple GPUs"}.get(device) if precision in INT8 else None
        return f"torch has no kernels for its int8 layers on {where}" if where else ""

    def settings(self, path: Path, *, threads: int) -> dict[str, Any]:
        """Return the number of threads, and the quantized engine that a file was packed for."""
        packed = engine(path)
        return {"num_threads": threads, **({"quantized_engine": packed} if packed else {})}

    def snippet(self, file: ModelFile, settings: Mapping[str, Any], *, device: str = "cpu") -> str:
        """Return Python code that loads a file and calls it once."""
        lines = ["", f"torch.set_num_threads({settings['num_threads']})"]
        if "quantized_engine" in settings:
            lines.append(f'torch.backends.quantized.engine = "{settings["quantized_engine"]}"  # packs the weights')
        if file.format == "torchscript":
            moved = "" if device == "cpu" else f'.to("{device}")'
            lines.append(f"model = torch.jit.freeze(torch.jit.load({json.dumps(file.path)}){moved}.eval())")
            return code(file, ["import torch"], lines, device)
        return code(file, ["import torch"], [*lines, *program(file, device), "model = program.module()"], device)


def engine(path: Path) -> str:
    """Return torch's quantized engine that a `.torchscript.pt` file was packed for, '' for any other file."""
    return (read_entry(path, "/extra/quantized_engine") or b"").decode() if path.suffix == ".pt" else ""


def read_entry(path: Path, suffix: str) -> bytes | None:
    """Return the first entry of an archive whose name ends in `suffix`, None if there is none or no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(suffix)]
            return archive.read(names[0]) if names else None
    except (OSError, zipfile.BadZipFile):
        return None


def program(file: ModelFile, device: str) -> list[str]:
    """Return the lines that load an exported program onto a device, as `program`."""
    lines = [f"program = torch.export.load({json.dumps(file.path)})"]
    if device != "cpu":
        lines = ["from torch.export.passes import move_to_device_pass", *lines]
        lines.append(f'program = move_to_device_pass(program, "{device}")')
    return lines


def code(file: ModelFile, imports: list[str], load: list[str], device: str) -> str:
    """Return the code that checks a file, loads it by the lines `load`, and calls it once on zeros.

    torch executes code of crafted files as it loads them, so that the file is compared with its record before.
    """
    place = "" if device == "cpu" else f', device="{device}"'
    lines = [
        "import hashlib",
        "",
        *imports,
        "",
        f'with open({json.dumps(file.path)}, "rb") as file:  # torch may run code from a file that was replaced',
        f'    if hashlib.file_digest(file, "sha256").hexdigest() != "{file.sha256}":',
        f'        raise SystemExit("{file.path} is not the file that this page describes")',
        *load,
        "inputs = [",
        *(f"    torch.zeros({shape(p)}, dtype=torch.{p.dtype}{place}),  # {p.name}" for p in file.inputs),
        "]",
        "with torch.inference_mode():",
        f"    output = model(*inputs)  # {described(*file.outputs)}",
    ]
    return "\n".join(lines) + "\n"


def no_cuda() -> str:
    """Return why torch cannot use CUDA here, '' if it can."""
    version = importlib.metadata.version("torch")
    if "+cpu" in version:
        return f"torch {version} is a build without CUDA. Use `cpu/torch`, or install a CUDA build of torch"
    if not machines._gpus():
        return "no NVIDIA GPU is visible to this process. Use `cpu/torch`, or check the driver with nvidia-smi"
    return ""
