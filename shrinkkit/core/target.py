"""Targets: a device and a runtime, and the machine that they were measured on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A device and the runtime that runs a model on it; `str` gives `device/runtime`, as recipes write it."""

    device: str
    """`cpu`, `cuda` or `mps`."""
    runtime: str
    """Name of a runtime, such as `torch`; see `runtimes.registry`."""

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Return the target that `text`, such as `cpu/torch`, names."""
        device, _, runtime = text.partition("/")
        return cls(device, runtime)

    def __str__(self) -> str:
        return f"{self.device}/{self.runtime}"

    @property
    def slug(self) -> str:
        """Its name in file names: `cpu-torch`."""
        return f"{self.device}-{self.runtime}"


@dataclass(frozen=True)
class Place:
    """A target on one machine; `str` gives `cpu/torch @ machine`, or `cpu/torch` on the machine of the run itself."""

    target: Target
    machine: str = ""
    """The machine's short name, empty for the machine of the run itself."""

    @classmethod
    def parse(cls, text: str) -> "Place":
        """Return the place that `text` names."""
        target, _, machine = text.partition(" @ ")
        return cls(Target.parse(target), machine)

    def __str__(self) -> str:
        return f"{self.target} @ {self.machine}" if self.machine else str(self.target)
