"""Targets: where a model can run on this machine, why not where it cannot, and what the machine is.

Nothing here imports torch unless a CUDA target is resolved, so that listing is quick.
"""

import contextlib
import ctypes
import importlib.metadata
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import shrinkkit
from shrinkkit.errors import InvalidInput, Unsupported
from shrinkkit.located import nearest, options
from shrinkkit.records import Environment
from shrinkkit.schema import TARGETS

_FLAGS = re.compile(
    r"avx2|avx512(f|bw|vl|_vnni|_bf16|_fp16)|avx_vnni(_int8)?|avx_ne_convert|amx_(tile|int8|bf16|fp16)|fma|f16c"
    r"|neon|asimd|asimdhp|asimddp|bf16|i8mm|sve|sve2|svei8mm|svebf16|sme"
)
_PACKAGES = (
    *("torch", "onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript", "openvino", "nncf", "torch-pruning", "torchao"),
    *("numpy", "papermill", "nbconvert"),
)
OVERSUBSCRIPTION = 4
"""Threads for each core, at most."""
_VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "ONEDNN_", "DNNL_")


@dataclass(frozen=True)
class Target:
    """Where a model runs: a device, and the runtime that runs it there."""

    device: str
    """`cpu`, `cuda` or `mps`."""
    runtime: str
    """`torch`, `inductor`, `onnxruntime` or `openvino`."""

    @property
    def name(self) -> str:
        """`device/runtime`, as recipes, reports and the command line write it."""
        return f"{self.device}/{self.runtime}"


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
    device, runtime = name.split("/")
    reason = available()[name]
    if not reason and device == "cuda":
        import torch

        if not torch.cuda.is_available():
            reason = "torch cannot start the GPU; see `torch.cuda.init()` for its reason. Use `cpu/torch`"
    if reason:
        raise Unsupported(f"`target` names {name!r}, but {reason}.")
    return Target(device, runtime)


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


def hardware(target: Target) -> str:
    """Return the name of the processor or GPU that `target` runs on; 'unknown' if it is hidden."""
    if target.device == "cuda":
        return next(iter(_gpus()), "unknown")
    # An Apple GPU goes by the name of the chip that it is a part of.
    named = _cpuinfo("model name", "Hardware", "Model")
    return named or platform.processor() or platform.machine() or "unknown"


def environment(threads: int) -> Environment:
    """Return the machine and the software as they are now, without host names, user names or paths.

    Args:
        threads: How many threads the measured process uses, >= 1.

    Raises:
        InvalidInput: `threads` < 1.
    """
    if threads < 1:
        raise InvalidInput(f"`threads` must be >= 1, got {threads}. Pass `cores()` for all of them.")
    import psutil

    return Environment(
        cpu=hardware(Target("cpu", "torch")),
        cores=cores(),
        affinity=tuple(sorted(_affinity())),
        cpu_flags=_relevant(_cpuinfo("flags", "Features").split()),
        memory_bytes=psutil.virtual_memory().total,
        gpu=", ".join(_gpus()),
        platform=platform.platform(),
        python=platform.python_version(),
        versions=_versions(),
        threads=threads,
        variables=_variables(os.environ),
        governor=_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) or "unknown",
        clock_mhz=float(mhz) if (mhz := _cpuinfo("cpu MHz")) else None,
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    )


def cores() -> int:
    """Return how many cores this process may use, at least 1: what affinity and control groups leave it."""
    allowed = len(_affinity()) or os.cpu_count() or 1
    quota = _quota(Path("/sys/fs/cgroup"), _text(Path("/proc/self/cgroup")))
    return max(1, min(allowed, math.floor(quota)) if math.isfinite(quota) else allowed)


def check_threads(*threads: int) -> None:
    """Return if this machine can compute with each number of `threads`; 0 stands for every core.

    Raises:
        InvalidInput: One is below 0, or above four for each core that this process may use.
    """
    most = OVERSUBSCRIPTION * cores()
    for count in threads:
        if not 0 <= count <= most:
            raise InvalidInput(
                f"`threads` must be >= 0 and at most {most}, {OVERSUBSCRIPTION} for each of the {cores()} cores that "
                f"this process may use, got {count}. Pass 0 or leave it out for every core."
            )


def use_threads(threads: int) -> int:
    """Make this process compute with `threads` threads and return their number; 0 stands for `cores()`.

    Raises:
        InvalidInput: The number is not one that `check_threads` allows.
    """
    check_threads(threads)
    import torch

    torch.set_num_threads(threads or cores())
    return threads or cores()


def _affinity() -> set[int]:
    """Return the cores that the process may run on; empty where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    # OMP_PROC_BIND binds each thread to one core, the main one too.
    allowed = set(os.sched_getaffinity(0))
    for path in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(ProcessLookupError):
            allowed |= os.sched_getaffinity(int(path.name))
    return allowed


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
    return "" if _gpus() else "no NVIDIA GPU is visible to this process. Use `cpu/onnxruntime`"


def _no_apple_gpu() -> str:
    if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        return ""
    return "it needs an Apple GPU, which this machine does not have. Use `cpu/torch`"


def _no_cuda() -> str:
    version = importlib.metadata.version("torch")
    if "+cpu" in version:
        return f"torch {version} is a build without CUDA. Use `cpu/torch`, or install a CUDA build of torch"
    if not _gpus():
        return "no NVIDIA GPU is visible to this process. Use `cpu/torch`, or check the driver with nvidia-smi"
    return ""


def _gpus() -> tuple[str, ...]:
    """Return the names of the visible GPUs, asked of the driver itself: torch would take seconds to load."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu_name(driver, index) for index in range(count.value))


def _gpu_name(driver: ctypes.CDLL, index: int) -> str:
    name = ctypes.create_string_buffer(256)
    device = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), index) != 0 or driver.cuDeviceGetName(name, len(name), device) != 0:
        return "unknown"
    return name.value.decode(errors="replace")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cpuinfo(*fields: str) -> str:
    """Return the value of the first of `fields` in the kernel's description of the processor, or ''."""
    lines = [line.partition(":") for line in _text(Path("/proc/cpuinfo")).splitlines()]
    found = {name.strip(): value.strip() for name, _, value in lines}
    return next((found[name] for name in fields if found.get(name)), "")


def _relevant(flags: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({flag for flag in flags if _FLAGS.fullmatch(flag)}))


def _versions() -> dict[str, str]:
    found = {"shrinkkit": shrinkkit.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _variables(environ: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """Return the variables that steer threads and kernels; a path in one is withheld, because it may name a person."""
    return {
        name: "(a path)" if "/" in value or "\\" in value else value
        for name, value in sorted(environ.items())
        if name.startswith(_VARIABLES)
    }


def _quota(root: Path, groups: str) -> float:
    """Return the smallest CPU quota, in cores, of the process's control groups and those around them; inf if none.

    Args:
        root: Where control groups are mounted.
        groups: `/proc/self/cgroup`: lines of `id:controllers:/path`, without controllers in version 2.
    """
    quotas = [math.inf]
    for line in groups.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root
        inner = mount / group.strip("/")
        # Inside a container the mount itself is the process's own group, and its path is not to be seen.
        for folder in [inner, *inner.parents][: len(Path(group.strip("/")).parts) + 1]:
            quotas.append(_folder_quota(folder))
    return min(quotas)


def _folder_quota(folder: Path) -> float:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    if not quota.isdigit() or not period.isdigit():  # `max` and -1 mean that there is none
        return math.inf
    return int(quota) / int(period)
