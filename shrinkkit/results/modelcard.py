"""What a model card says of a variant: frozen dataclasses, stored as `model-card.json` beside the model files.

The card goes where the files go, without the run that they belong to. To write one see `cards`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrinkkit.core import store
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.machines import Environment
from shrinkkit.core.run_folder import CARD
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.core.variant import ModelFile


@dataclass(frozen=True)
class Precision:
    """How many layers a runtime computes in one number format."""

    runs_as: str
    layers: int
    why: dict[str, int]
    """Why they were left in float, with the number of layers that each reason holds for."""


@dataclass(frozen=True)
class Summary:
    """A variant's audit in numbers."""

    layers: int
    pruned: int
    """Layers that lost channels."""
    zeroed: int
    """Layers with weights that are exactly zero."""
    precision: dict[str, tuple[Precision, ...]]
    """By runtime."""


@dataclass(frozen=True)
class Figures:
    """What was measured of a variant on one target of one machine, or why nothing was."""

    target: str
    machine: str
    """Its short name."""
    processor: str
    """Of the machine, or its GPU for a target on `cuda`; empty where nothing was measured."""
    runtime_version: str
    threads: int | None
    batch_size: int | None
    """Of each timed call; None where nothing was timed."""
    state: str
    """`measured`, `failed`, `refused`, or `not run`."""
    reason: str
    """Why it was not measured; empty if it was."""
    metric: str
    accuracy: Estimate | None
    difference: Estimate | None
    """Accuracy minus the baseline's on the same examples and target; None for the baseline."""
    latency_ms: Estimate | None
    p50_ms: float | None
    """The time that half of all calls did not exceed."""
    speedup: Estimate | None
    """Against FP32 on the same target; None for the baseline."""
    verdict: str
    """Of `speedup`: `faster`, `slower`, `same`, `undecided`, or `too noisy`; empty where there is none."""
    speedup_today: Estimate | None
    """Against PyTorch today on the same device."""
    verdict_today: str
    peak_memory_bytes: int | None
    load_ms: float | None
    first_call_ms: float | None
    saturated: tuple[str, ...]
    """Layers whose integer kernels gave other numbers there than rounding explains."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """What `model-card.json` holds: keys are these fields, and change their meaning only with `schema_version`."""

    name: str
    task: str
    recipe: dict[str, Any]
    """Its `stages` and `precision`."""
    source: str | None
    """The variant that it was made from."""
    seed: int
    parameters: int
    macs: int
    """Multiply-accumulates of one example."""
    sparsity: float
    """Share of weights that are exactly zero."""
    audit: Summary
    files: tuple[ModelFile, ...]
    settings: dict[str, dict[str, Any]]
    """With which each runtime ran its file, by the runtime's own names for them."""
    refusals: dict[str, str]
    """Why a runtime has no file, by runtime."""
    figures: tuple[Figures, ...]
    """One for each target that was asked for; empty until the variant was measured."""
    notes: tuple[str, ...]
    environment: Environment
    """The machine and the software that made the files."""
    schema_version: int = SCHEMA_VERSION


def read(folder: Path) -> Card | None:
    """Return the card in a variant's folder, None if there is none.

    Raises:
        InvalidInput: It is damaged, or was written by another version.
    """
    return store.read(folder / CARD, Card) if (folder / CARD).is_file() else None
