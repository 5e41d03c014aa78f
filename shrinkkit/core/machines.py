"""The machine: its name, processor, memory, software and thread limits. Nothing here imports torch."""

import contextlib
import ctypes
import importlib.metadata
import math
import os
import platform
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shrinkkit import __version__
from shrinkkit.core.target import Target
from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Table, facts
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

    def shown(self) -> Table:
        """Return the machine and its software."""
        pairs = [
            ("processor", f"{self.cpu}, {formats.counted(self.cores, 'core')}"),
            ("instruction sets", ", ".join(self.cpu_flags)),
            ("accelerator", self.gpu),
            ("memory", formats.size(self.memory_bytes)),
            ("intra-op threads", str(self.threads)),
            ("CPU affinity", ", ".join(map(str, self.affinity))),
            ("CPU governor", self.governor),
            ("clock at the end", f"{self.clock_mhz:.0f} MHz" if self.clock_mhz else ""),
            ("load average at the end", f"{self.load_average:g}"),
            ("system", self.platform),
            ("Python", self.python),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("variables", ", ".join(f"{name}={value}" for name, value in self.variables.items())),
        ]
        return facts("Environment", pairs)


_FLAGS = re.compile(
    r"avx2|avx512(f|bw|vl|_vnni|_bf16|_fp16)|avx_vnni(_int8)?|avx_ne_convert|amx_(tile|int8|bf16|fp16)|fma|f16c"
    r"|neon|asimd|asimdhp|asimddp|bf16|i8mm|sve|sve2|svei8mm|svebf16|sme"
)
_ARITHMETIC = {
    "int8": {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm", "svei8mm"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
}
"""Instruction sets that compute in a precision; without any, each 16-bit operation converts to float32 and back."""
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


def lacks(precision: str, flags: Iterable[str] | None = None) -> bool:
    """Return whether a processor with `flags`, by default this one, has no arithmetic in `precision`."""
    known = set(_cpuinfo("flags", "Features").split() if flags is None else flags)
    return bool(known) and precision in _ARITHMETIC and not known & _ARITHMETIC[precision]


def environment(threads: int, *, packages: Iterable[str]) -> Environment:
    """Return the machine and the software as they are now, without host names, user names or paths.

    Recorded are the `threads` that the measured process uses, >= 1, and the versions of `packages` that are installed.
    """
    if threads < 1:
        raise InvalidInput(f"`threads` must be >= 1, got {threads}. Pass `cores()` for all of them.")
    import psutil

    steering = sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES))
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
        # A path in one is withheld, because it may name a person.
        variables={k: "(a path)" if "/" in v or "\\" in v else v for k, v in steering},
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
            text = f"`threads` must be >= 0 and at most {most}, {OVERSUBSCRIPTION} for each of the {cores()} cores here"
            raise InvalidInput(f"{text}, got {count}. Pass 0 or leave it out for every core.")


def _affinity() -> set[int]:
    """Return the cores that the process may run on; empty if the system hides them."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    import psutil

    # OMP_PROC_BIND binds each thread to one core, the main one too.
    allowed = set(os.sched_getaffinity(0))
    for thread in psutil.Process().threads():
        with contextlib.suppress(ProcessLookupError):
            allowed |= os.sched_getaffinity(thread.id)
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
    names, device, name = [], ctypes.c_int(), ctypes.create_string_buffer(256)
    for index in range(count.value):
        failed = driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetName(name, len(name), device)
        names.append("unknown" if failed else name.value.decode(errors="replace"))
    return tuple(names)


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
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _quota(root: Path, groups: str) -> float:
    """Return the smallest CPU quota, in cores, of the process's control groups and those around them; inf if none.

    `groups` are lines of `id:controllers:/path`, without controllers in version 2.
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
            quota, _, period = _text(folder / "cpu.max").partition(" ")
            if not quota:
                quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit():  # `max` and -1 mean that there is none
                quotas.append(int(quota) / int(period))
    return min(quotas)


LONGEST = 28
"""Characters of the hardware in a machine's name; with the cores it is about 40."""

_NOISE = re.compile(
    r"\((r|tm|c)\)|@.*|\bwith\b.*|\b\d+(st|nd|rd|th) gen\b|\b\d+-cores?\b"
    r"|\b(intel|amd|nvidia|cpu|gpu|apu|processor|platinum|gold|silver|bronze)\b"
)


def name(hardware: str, cores: int) -> str:
    """Return the short name of a machine by its hardware: `xeon-8488c-2-cores`. It does not identify the owner."""
    # A name that consists of noise words only is kept.
    candidates = (_NOISE.sub(" ", hardware.lower()), hardware.lower(), "unknown")
    words = next(words for text in candidates if (words := re.findall(r"[a-z0-9]+", text)))
    short = textwrap.shorten(" ".join(word[:LONGEST] for word in words), LONGEST, placeholder="")
    return f"{short.replace(' ', '-')}-{formats.counted(cores, 'core').replace(' ', '-')}"


def this_machine(target: Target) -> str:
    """Return the name of this machine: by the hardware that `target` runs on, or by the processor without such."""
    candidates = [hardware(target), hardware(Target("cpu", target.runtime))]
    return name(next((hardware for hardware in candidates if hardware != "unknown"), "unknown"), cores())


def names(environment: Environment) -> tuple[str, ...]:
    """Return the names that a recorded machine goes by: that of its processor, then that of its first GPU."""
    gpu = environment.gpu.partition(", ")[0]
    return tuple(name(hardware, environment.cores) for hardware in (environment.cpu, gpu) if hardware)
