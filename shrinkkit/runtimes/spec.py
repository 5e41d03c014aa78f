"""What shrinkkit asks of a runtime, as far as it needs no torch, and helpers to describe one.

`docs/runtimes.md` shows how to add one. The part that works on model files is `base.Backend`.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from shrinkkit.core.variant import ModelFile, Port

HALF = ("float16", "bfloat16")
INT8 = ("dynamic-int8", "static-int8")
SNIPPET_BATCH = 1
"""Batch size in the code of a README, where any size will do."""


class Runtime(Protocol):
    """A library that runs model files. Reading any of this imports neither torch nor the library."""

    name: str
    """Name in targets: `onnxruntime`."""
    title: str
    """Name in messages: `ONNX Runtime`."""
    devices: tuple[str, ...]
    """Devices it can run on, if the machine has them: of `cpu`, `cuda` and `mps`."""
    packages: tuple[str, ...]
    """Distributions whose versions decide how fast a file is, that of the runtime itself first."""
    in_torch: bool
    """Whether torch runs the files, so that threads and CUDA streams are settings of torch and of the process."""
    compiles: bool
    """Whether files are compiled as they are loaded, which takes long; such targets are used only if named."""

    def missing(self, device: str) -> str:
        """Return why the runtime cannot run on a device of this machine, and what helps; '' if it can."""

    def refuses(self, precision: str, device: str) -> str:
        """Return why the runtime cannot run any model in a precision on a device; '' if it can, and for ''."""
        return ""

    def settings(self, path: Path, *, threads: int) -> dict[str, Any]:
        """Return the settings that a model file is measured with and that its README shows, as plain JSON values.

        `path` is a model file of this runtime, `threads` the intra-op threads, >= 1.
        """

    def snippet(self, file: ModelFile, settings: Mapping[str, Any], *, device: str = "cpu") -> str:
        """Return Python code that loads a file and calls it once on zeros, run in its folder without shrinkkit.

        `file` is its record, and `settings` what `settings` returned, perhaps read from JSON.
        """

    def backend(self) -> Any:
        """Return the `base.Backend` of the runtime, by default `BACKEND` of the module `backend` in its package."""
        package = type(self).__module__.rpartition(".")[0]
        return import_module(f"{package}.backend").BACKEND


def not_installed(package: str, *, extra: str = "") -> str:
    """Return that a package is not installed and how to install it, '' if it is."""
    distribution = f'"shrinkkit[{extra}]"' if extra else package
    return "" if find_spec(package) else f"{package} is not installed. Install it: pip install {distribution}"


def no_compiler() -> str:
    """Return that there is no C++ compiler and how to install one, '' if there is."""
    compilers = [os.environ.get("CXX", "g++"), "g++", "clang++"]
    if any(shutil.which(name.split()[0]) for name in compilers if name):
        return ""
    return "inductor needs a C++ compiler, and there is no g++ or clang++. On Debian: apt install g++"


def numpy_inputs(file: ModelFile) -> list[str]:
    """Return the lines that assign NumPy zeros to `inputs`, by the names of a file's inputs."""
    arrays = [f'{json.dumps(p.name)}: np.zeros({shape(p)}, "{p.dtype}"),' for p in file.inputs]
    return assignment("inputs", "{}", arrays)


def assignment(name: str, brackets: str, entries: Sequence[str]) -> list[str]:
    """Return the lines that assign a list or dict."""
    return [f"{name} = {brackets[0]}", *(f"    {entry}" for entry in entries), brackets[1]]


def shape(port: Port) -> str:
    """Return a port's shape as a tuple in Python, with a number for the batch."""
    sizes = [str(SNIPPET_BATCH if size == "batch" else size) for size in port.shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def described(*ports: Port) -> str:
    """Return ports in one phrase: `logits float32 [batch, 10]`."""
    return ", ".join(f"{port.name} {port.dtype} [{', '.join(map(str, port.shape))}]" for port in ports)
