"""Which targets can run on this machine, and why the others cannot. Imports torch only to resolve a CUDA target."""

import importlib.metadata
import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path

from shrinkkit.core import machines
from shrinkkit.core.target import TARGETS, Target
from shrinkkit.errors import InvalidInput, Unsupported, nearest, options


def resolve(name: str) -> Target:
    """Return the target called `name`, which can run here.

    Args:
        name: `device/runtime`; one of the keys of `available`.

    Raises:
        InvalidInput: There is no such target.
        Unsupported: There is, but it cannot run on this machine; says why, and what helps.
    """
    if name not in TARGETS:
        raise InvalidInput(f"`target` must be {options(TARGETS)}, got {name!r}.{nearest(name, TARGETS)}")
    target = Target.parse(name)
    reason = available()[name]
    if not reason and target.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            reason = "torch cannot start the GPU; see `torch.cuda.init()` for its reason. Use `cpu/torch`"
    if reason:
        raise Unsupported(f"`target` names {name!r}, but {reason}.")
    return target


def available() -> dict[str, str]:
    """Return each target's name with the reason why it cannot run here and what helps, or '' when it can."""
    torch, cuda = _missing("torch"), _missing("torch") or _no_cuda()
    onnx = _missing("onnxruntime") or _missing("onnx")
    inductor = _no_compiler() or _missing("torchao")
    return {
        "cpu/torch": torch,
        "cpu/inductor": torch or inductor,
        "cpu/onnxruntime": onnx,
        "cpu/openvino": _missing("openvino", extra="openvino") or _missing("nncf", extra="openvino") or onnx,
        "cuda/torch": cuda,
        "cuda/inductor": cuda or inductor or _missing("triton"),
        "cuda/onnxruntime": onnx or _no_cuda_provider(),
        "mps/torch": torch or _no_apple_gpu(),
    }


def use_threads(threads: int) -> int:
    """Make this process compute with `threads` threads and return their number; 0 stands for `cores()`.

    Raises:
        InvalidInput: The number is not one that `check_threads` allows.
    """
    machines.check_threads(threads)
    import torch

    torch.set_num_threads(threads or machines.cores())
    return threads or machines.cores()


def _missing(package: str, *, extra: str = "") -> str:
    wanted = f"'shrinkkit[{extra}]'" if extra else package
    return "" if find_spec(package) else f"{package} is not installed. Install it: pip install {wanted}"


def _no_compiler() -> str:
    compilers = [os.environ.get("CXX", "g++"), "g++", "clang++"]
    if any(shutil.which(name.split()[0]) for name in compilers if name):
        return ""
    return "inductor needs a C++ compiler, and there is no g++ or clang++. On Debian: apt install g++"


def _no_cuda_provider() -> str:
    package = find_spec("onnxruntime")
    folders = [Path(place) for place in (package.submodule_search_locations or ())] if package else []
    if not any(list(folder.glob("capi/*onnxruntime_providers_cuda.*")) for folder in folders):
        return "this onnxruntime is a build without CUDA. Install another: pip install onnxruntime-gpu"
    return "" if machines._gpus() else "no NVIDIA GPU is visible to this process. Use `cpu/onnxruntime`"


def _no_apple_gpu() -> str:
    if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        return ""
    return "it needs an Apple GPU, which this machine does not have. Use `cpu/torch`"


def _no_cuda() -> str:
    version = importlib.metadata.version("torch")
    if "+cpu" in version:
        return f"torch {version} is a build without CUDA. Use `cpu/torch`, or install a CUDA build of torch"
    if not machines._gpus():
        return "no NVIDIA GPU is visible to this process. Use `cpu/torch`, or check the driver with nvidia-smi"
    return ""
