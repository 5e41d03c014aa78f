"""Machines and places: what a figure was measured on, in words that are the same in folders, tables and sentences.

A machine has a short name, made from its hardware. A place is a target on a machine: `cpu/torch` alone on the machine
that the run was made on, and `cpu/torch @ epyc-7r13-8-cores` on any other.
"""

import re

from shrinkkit import targets
from shrinkkit.records import Environment
from shrinkkit.targets import Target

AT = " @ "
LONGEST = 28
"""Characters of the hardware in a machine's name; with the cores it is about 40."""

_NOISE = re.compile(
    r"\((r|tm|c)\)|@.*|\bwith\b.*|\b\d+(st|nd|rd|th) gen\b|\b\d+-cores?\b"
    r"|\b(intel|amd|nvidia|cpu|gpu|apu|processor|platinum|gold|silver|bronze)\b"
)


def name(hardware: str, cores: int) -> str:
    """Return the short name of a machine: `xeon-8488c-2-cores`. It tells nothing of whose machine it is.

    Args:
        hardware: The processor or GPU, as it calls itself.
        cores: How many cores a process may use there, >= 1.
    """
    said = _NOISE.sub(" ", hardware.lower())
    # A name of nothing but noise is still better than none.
    words = re.findall(r"[a-z0-9]+", said) or re.findall(r"[a-z0-9]+", hardware.lower()) or ["unknown"]
    short = words[0][:LONGEST]
    for word in words[1:]:
        if len(short) + 1 + len(word) > LONGEST:
            break
        short += f"-{word}"
    return f"{short}-{cores}-core{'' if cores == 1 else 's'}"


def here(target: str) -> str:
    """Return the name of this machine, by the hardware that `target` (`device/runtime`) runs on.

    A machine that has no such hardware goes by its processor.
    """
    devices = (target.partition("/")[0], "cpu")
    found = [targets.hardware(Target(device, runtime_of(target))) for device in devices]
    return name(next((hardware for hardware in found if hardware != "unknown"), "unknown"), targets.cores())


def names(environment: Environment) -> tuple[str, ...]:
    """Return the names that a recorded machine goes by: that of its processor, then that of its first GPU."""
    gpu = environment.gpu.partition(", ")[0]
    return tuple(name(hardware, environment.cores) for hardware in (environment.cpu, gpu) if hardware)


def place(target: str, machine: str) -> str:
    """Return what `target` is called on the machine called `machine`; '' stands for the run's own."""
    return f"{target}{AT}{machine}" if machine else target


def target_of(at: str) -> str:
    """Return the target of a place: `cpu/torch`."""
    return at.partition(AT)[0]


def runtime_of(at: str) -> str:
    """Return the runtime of a place: `torch`."""
    return target_of(at).partition("/")[2]


def machine_of(at: str) -> str:
    """Return the machine of a place, '' for the run's own."""
    return at.partition(AT)[2]


def record_path(target: str, machine: str) -> str:
    """Return where a run folder keeps what was measured on `target` by `machine`, relative to the folder."""
    return f"measurements/{machine}/{target.replace('/', '-')}.json"
