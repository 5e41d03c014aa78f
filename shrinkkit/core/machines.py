"""The machine: its name, processor, memory, software and thread limits. Nothing here imports torch."""

import contextlib
import ctypes
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shrinkkit import __version__
from shrinkkit.core.target import Target
from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, Table, facts
from shrinkkit.errors import InvalidInput


@dataclass(frozen=True, repr=False)
class Environment(Rich):
    """The machine and the software that a record was made on."""

    cpu: str
    cores: int
    affinity: tuple[int, ...]
    """Numbers of the cores that the process may run on; empty if the system hides them."""
    cpu_flags: tuple[str, ...]
    memory_bytes: int
    gpu: str
    platform: str
    python: str
    versions: dict[str, str]
    threads: int
    variables: dict[str, str]
    governor: str
    clock_mhz: float | None
    """Of the first core at that moment; None if the system hides it."""
    load_average: float

    def shown(self) -> Shown:
        """Return the view of it that `show` gives too."""
        return environment_table(self)


def environment_table(of: "Environment") -> Table:
    """Return a machine and its software."""
    pairs = [
        ("processor", f"{of.cpu}, {formats.counted(of.cores, 'core')}"),
        ("instruction sets", ", ".join(of.cpu_flags)),
        ("accelerator", of.gpu),
        ("memory", formats.size(of.memory_bytes)),
        ("intra-op threads", str(of.threads)),
        ("CPU affinity", ", ".join(map(str, of.affinity))),
        ("CPU governor", of.governor),
        ("clock at the end", f"{of.clock_mhz:.0f} MHz" if of.clock_mhz else ""),
        ("load average at the end", f"{of.load_average:g}"),
        ("system", of.platform),
        ("Python", of.python),
        ("versions", ", ".join(f"{name} {version}" for name, version in of.versions.items())),
        ("variables", ", ".join(f"{name}={value}" for name, value in of.variables.items())),
    ]
    return facts("Environment", pairs)


_FLAGS = re.compile(
    r"avx2|avx512(f|bw|vl|_vnni|_bf16|_fp16)|avx_vnni(_int8)?|avx_ne_convert|amx_(tile|int8|bf16|fp16)|fma|f16c"
    r"|neon|asimd|asimdhp|asimddp|bf16|i8mm|sve|sve2|svei8mm|svebf16|sme"
)
OVERSUBSCRIPTION = 4
"""Threads for each core, at most."""
_VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "ONEDNN_", "DNNL_")


def hardware(target: Target) -> str:
    """Return the name of the processor or GPU that `target` runs on; 'unknown' if it is hidden."""
    if target.device == "cuda":
        return next(iter(_gpus()), "unknown")
    # An Apple GPU goes by the name of the chip that it is a part of.
    named = _cpuinfo("model name", "Hardware", "Model")
    return named or platform.processor() or platform.machine() or "unknown"


def environment(threads: int, *, packages: Iterable[str]) -> Environment:
    """Return the machine and the software as they are now, without host names, user names or paths.

    Args:
        threads: How many threads the measured process uses, >= 1.
        packages: Distributions whose versions are recorded, those that are installed; see `registry.packages`.

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
        versions=_versions(packages),
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
    """Check that each thread count is in [0, 4 x `cores()`], 0 meaning all cores; raises InvalidInput otherwise."""
    most = OVERSUBSCRIPTION * cores()
    for count in threads:
        if not 0 <= count <= most:
            raise InvalidInput(
                f"`threads` must be >= 0 and at most {most}, {OVERSUBSCRIPTION} for each of the {cores()} cores that "
                f"this process may use, got {count}. Pass 0 or leave it out for every core."
            )


def _affinity() -> set[int]:
    """Return the cores that the process may run on; empty if the system hides them."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    # OMP_PROC_BIND binds each thread to one core, the main one too.
    allowed = set(os.sched_getaffinity(0))
    for path in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(ProcessLookupError):
            allowed |= os.sched_getaffinity(int(path.name))
    return allowed


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
    values = {name.strip(): value.strip() for name, _, value in lines}
    return next((values[name] for name in fields if values.get(name)), "")


def _relevant(flags: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({flag for flag in flags if _FLAGS.fullmatch(flag)}))


def _versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {"shrinkkit": __version__}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


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


LONGEST = 28
"""Characters of the hardware in a machine's name; with the cores it is about 40."""

_NOISE = re.compile(
    r"\((r|tm|c)\)|@.*|\bwith\b.*|\b\d+(st|nd|rd|th) gen\b|\b\d+-cores?\b"
    r"|\b(intel|amd|nvidia|cpu|gpu|apu|processor|platinum|gold|silver|bronze)\b"
)


def name(hardware: str, cores: int) -> str:
    """Return the short name of a machine: `xeon-8488c-2-cores`. It does not identify the owner.

    Args:
        hardware: The processor or GPU, as it calls itself.
        cores: How many cores a process may use there, >= 1.
    """
    # A name that consists of noise words only is kept.
    words = (
        re.findall(r"[a-z0-9]+", _NOISE.sub(" ", hardware.lower()))
        or re.findall(r"[a-z0-9]+", hardware.lower())
        or ["unknown"]
    )
    short = words[0][:LONGEST]
    for word in words[1:]:
        if len(short) + 1 + len(word) > LONGEST:
            break
        short += f"-{word}"
    return f"{short}-{cores}-core{'' if cores == 1 else 's'}"


def this_machine(target: Target) -> str:
    """Return the name of this machine: by the hardware that `target` runs on, or by the processor without such."""
    candidates = [hardware(target), hardware(Target("cpu", target.runtime))]
    return name(next((hardware for hardware in candidates if hardware != "unknown"), "unknown"), cores())


def names(environment: Environment) -> tuple[str, ...]:
    """Return the names that a recorded machine goes by: that of its processor, then that of its first GPU."""
    gpu = environment.gpu.partition(", ")[0]
    return tuple(name(hardware, environment.cores) for hardware in (environment.cpu, gpu) if hardware)
