"""What was made and measured: frozen dataclasses, JSON both ways.

A record holds one fact together with everything needed to trust it. Records are written
by the notebooks and read by the runner and the report; nothing else passes between them.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shrinkkit.errors import InvalidInput, UnfairComparison

SCHEMA_VERSION = 1
"""Raised whenever a stored record can no longer be read as an older version wrote it."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, in the unit of the field that holds it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Environment:
    """The machine and the software that a record was made on."""

    cpu: str
    cores: int
    cpu_flags: tuple[str, ...]
    memory_bytes: int
    gpu: str
    platform: str
    python: str
    versions: dict[str, str]
    threads: int
    variables: dict[str, str]
    governor: str
    load_average: float


@dataclass(frozen=True)
class LayerPrecision:
    """How one runtime computes a layer, and why it was left in float if it was."""

    runs_as: str
    why: str = ""


@dataclass(frozen=True)
class LayerAudit:
    """What happened to one layer, found by looking at the result and not at the request.

    `channels` counts output channels or features; `zeroed` is the share of weights that are
    exactly zero; `precision` is keyed by runtime.
    """

    layer: str
    kind: str
    parameters_before: int
    parameters: int
    channels_before: int | None
    channels: int | None
    zeroed: float
    precision: dict[str, LayerPrecision]
    kept_because: str = ""
    """Why a layer that could have lost channels kept them all; empty if it lost some or was not asked to."""


@dataclass(frozen=True)
class ModelFile:
    """One file that a runtime loads; `path` is relative to the variant's folder."""

    runtime: str
    path: str
    format: str
    size_bytes: int
    compressed_bytes: int
    sha256: str
    deviation: float
    """Largest absolute difference between the outputs of the file loaded back from disk and
    those of the model in memory, as a share of the largest absolute output."""


@dataclass(frozen=True)
class Variant:
    """One recipe applied to one task: model files and what truly happened, layer by layer."""

    name: str
    task: str
    recipe: dict[str, Any]
    source: str | None
    seed: int
    files: tuple[ModelFile, ...]
    refusals: dict[str, str]
    """Why a runtime has no model file, by runtime."""
    parameters: int
    macs: int
    """Multiply-accumulates of one example."""
    sparsity: float
    """Share of weights that are exactly zero."""
    ratio_asked: float | None
    ratio_reached: float | None
    audit: tuple[LayerAudit, ...]
    validation_scores: tuple[float, ...]
    """Mean score on the validation split after each epoch of fine-tuning."""
    notes: tuple[str, ...]
    environment: Environment
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Conditions:
    """What must be equal before two latencies may be compared. dtype is a treatment and not here."""

    device: str
    """`cpu` or `cuda`."""
    hardware: str
    """The processor or accelerator by its own name."""
    runtime: str
    threads: int
    batch_size: int
    inputs_sha256: str


@dataclass(frozen=True)
class Comparison:
    """Paired timing of `candidate` against `reference`: interleaved, with raw samples.

    Ratios are reference time over candidate time: 2.0 means twice as fast.
    """

    reference: str
    candidate: str
    conditions: Conditions
    candidate_runtime: str
    """Differs from `conditions.runtime` only where runtimes themselves are compared."""
    speedup: Estimate
    """Code speed: from the fastest call of each slot."""
    experienced: Estimate
    """From the median call of each slot."""
    verdict: str
    """`faster`, `slower`, `same`, `undecided`, or `too noisy`."""
    reference_ms: Estimate
    candidate_ms: Estimate
    null_ratio: Estimate
    """A copy of the reference timed against the reference in the same blocks."""
    reference_samples_ms: tuple[tuple[float, ...], ...]
    """Raw call times, one tuple a slot, in the order in which they ran."""
    candidate_samples_ms: tuple[tuple[float, ...], ...]
    null_samples_ms: tuple[tuple[float, ...], ...]
    warmup_calls: int
    steady: bool
    contention: tuple[str, ...]
    """Named signs of contention during the run; empty on a quiet machine."""
    duration_s: float
    seed: int


@dataclass(frozen=True)
class Accuracy:
    """Per-example scores on the test split, and the paired difference to the baseline."""

    metric: str
    scores: tuple[float, ...]
    mean: Estimate
    difference: Estimate | None
    """Variant minus baseline, on the same examples and target; None for the baseline."""
    agreement: float
    """Share of examples with the baseline's top-1 answer; for outputs that are no classes, NaN-free cosine."""


@dataclass(frozen=True)
class Measurement:
    """Everything measured of one variant's model file on one target."""

    variant: str
    target: str
    error: str
    """Why there is no measurement; empty when there is one."""
    file_sha256: str = ""
    load_ms: float | None = None
    first_call_ms: float | None = None
    accuracy: Accuracy | None = None
    latency: Comparison | None = None
    """Against FP32 on the same target. The baseline's own is None."""
    latency_ms: Estimate | None = None


@dataclass(frozen=True)
class TargetRecord:
    """One target's benchmark: the same process, inputs and threads for every variant."""

    task: str
    target: str
    environment: Environment
    measurements: tuple[Measurement, ...]
    runtime: Comparison | None
    """FP32 on this target against torch FP32 on the same device; None on the torch target."""
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Step:
    """One notebook of a run, as its parent process saw it end."""

    name: str
    notebook: str
    subject: str
    """The variant it makes, or the target it measures; empty for the report."""
    state: str
    """`pending`, `running`, `done`, `reused`, `failed`, `skipped`, or `interrupted`."""
    duration_s: float = 0.0
    error: str = ""
    """The cause in one line; the whole traceback stands in the executed notebook."""
    inputs_sha256: str = ""
    """Hash of everything the step depends on; an unchanged step is not run again."""


@dataclass(frozen=True)
class Status:
    """What became of a run's steps."""

    command: str
    """The command line that reproduces the run."""
    started: str
    """ISO 8601, UTC."""
    steps: tuple[Step, ...]
    schema_version: int = SCHEMA_VERSION


R = TypeVar("R")


def speedup(reference: Comparison, candidate: Comparison) -> float:
    """Return how many times faster `candidate`'s model is than `reference`'s.

    Both are the candidates of comparisons against the same baseline under the same conditions.

    Raises:
        UnfairComparison: The two were measured under different conditions or baselines.
    """
    unequal = [
        f"{name} ({before!r} and {after!r})"
        for name, before, after in (
            ("baseline", reference.reference, candidate.reference),
            ("candidate runtime", reference.candidate_runtime, candidate.candidate_runtime),
            *(
                (f.name, getattr(reference.conditions, f.name), getattr(candidate.conditions, f.name))
                for f in dataclasses.fields(Conditions)
            ),
        )
        if before != after
    ]
    if unequal:
        raise UnfairComparison(
            f"Only measurements under equal conditions may be compared; these differ in {', '.join(unequal)}. "
            "Measure both on the same target in one benchmark."
        )
    return candidate.speedup.value / reference.speedup.value


def write(path: str | os.PathLike[str], record: Any) -> None:
    """Write `record` (a dataclass of this module) to `path` as JSON, whole or not at all."""
    write_text(path, json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n")


def read(path: str | os.PathLike[str], kind: type[R]) -> R:
    """Return the record of type `kind` stored at `path`.

    Raises:
        InvalidInput: The file is not such a record, or was written by a newer version.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} must be a JSON record, but cannot be read: {error}. Run its step again.") from error
    found = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, dict) else SCHEMA_VERSION
    if found != SCHEMA_VERSION:
        raise InvalidInput(
            f"{path} has schema version {found}, this shrinkkit reads {SCHEMA_VERSION}. "
            + ("Update shrinkkit." if found > SCHEMA_VERSION else "Run the study again.")
        )
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        raise InvalidInput(f"{path} is not a {kind.__name__} record: {error}. Run its step again.") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the file at `path`, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
