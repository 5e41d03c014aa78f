"""Targets: a device and a runtime, and the machine that they were measured on."""

from dataclasses import dataclass
from typing import Literal, get_args

TargetName = Literal[
    "cpu/torch",
    "cpu/inductor",
    "cpu/onnxruntime",
    "cpu/openvino",
    "cuda/torch",
    "cuda/inductor",
    "cuda/onnxruntime",
    "mps/torch",
]
TARGETS: tuple[str, ...] = get_args(TargetName)
"""Names of all targets, whether or not they can run on this machine."""


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


AT = " @ "


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
