"""What was made and measured: frozen dataclasses, JSON both ways.

A record holds one fact together with everything needed to trust it. Records are written
by the notebooks and read by the runner and the report; nothing else passes between them.
"""

import dataclasses
import hashlib
import json
import math
import os
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeVar

from shrinkkit import lease, views
from shrinkkit.errors import InvalidInput, UnfairComparison
from shrinkkit.rich import Rich
from shrinkkit.tables import Shown

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 4
"""Raised whenever a stored record can no longer be read as an older version wrote it."""
PART = ".part"
"""Suffix of a file that is being written; its name begins with a dot."""
ANY_PROCESSOR = "any processor"
WITH_VNNI = "processors with VNNI or an equivalent (x86 VNNI or AMX, Arm dot product)"
WIDE, SCATTERED = 0.05, 0.25
"""Half-width of an interval, and spread of calls, as shares, beyond which a timing is not to be trusted by itself."""


@dataclass(frozen=True, repr=False)
class Estimate(Rich):
    """A value with its 95 % interval, in the unit of the field that holds it."""

    value: float
    low: float
    high: float

    def shown(self) -> Shown:
        """Return the view of it that `show` gives too."""
        return views.estimate(self)


@dataclass(frozen=True, repr=False)
class Environment(Rich):
    """The machine and the software that a record was made on."""

    cpu: str
    cores: int
    affinity: tuple[int, ...]
    """The cores, by number, that the process may run on; empty where the system does not tell."""
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
    """Of the first core at that moment; None where the system does not tell."""
    load_average: float

    def shown(self) -> Shown:
        """Return the view of it that `show` gives too."""
        return views.environment(self)


@dataclass(frozen=True, repr=False)
class LayerPrecision(Rich):
    """How one runtime computes a layer, and why it was left in float if it was."""

    runs_as: str
    why: str = ""


@dataclass(frozen=True, repr=False)
class LayerAudit(Rich):
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


class Audit(tuple[LayerAudit, ...]):
    """What happened to each layer of a variant: a tuple that shows itself as a table."""

    def to_dict(self) -> dict[str, Any]:
        """Return each layer's audit as a plain dict, by the layer's name."""
        return {layer.layer: layer.to_dict() for layer in self}

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with a row for each layer."""
        import pandas as pd

        return pd.DataFrame([row for layer in self for row in layer._rows()])

    def __repr__(self) -> str:
        """Return it as plain text."""
        return repr(views.audit(self))

    def _repr_html_(self) -> str:
        return views.audit(self)._repr_html_()

    def _repr_markdown_(self) -> str:
        return views.audit(self).markdown()


@dataclass(frozen=True, repr=False)
class Port(Rich):
    """An input or output of a model file."""

    name: str
    dtype: str
    """As torch spells it: `float32`."""
    shape: tuple[int | str, ...]
    """`batch` stands where any size will do."""


@dataclass(frozen=True, repr=False)
class ModelFile(Rich):
    """What a runtime loads. Runtimes may share a file; then each has its own entry with the same path."""

    runtime: str
    path: str
    """Relative to the variant's folder."""
    beside: tuple[str, ...]
    """Files that have to lie beside it, such as the weights of an OpenVINO model; relative to the folder too."""
    format: str
    """`pt2`, `torchscript`, `onnx`, or `openvino`."""
    size_bytes: int
    """Of all its files, as are the next two."""
    compressed_bytes: int
    sha256: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    deviation: float
    """Largest absolute difference between the outputs of the file loaded back from disk and
    those of the model in memory, as a share of the largest absolute output."""
    tolerance: float
    """Largest such difference from the stored outputs, in [0, 0.02], at which the file counts as verified on a CPU."""
    exact_on: str = ""
    """Processors whose int8 accumulators cannot saturate in this file, whatever the inputs: `ANY_PROCESSOR`, or
    `WITH_VNNI`. Empty for a file without int8."""

    def __post_init__(self) -> None:
        """Raise unless each path stays inside the variant's folder."""
        _check_inside(self.path, *self.beside)


@dataclass(frozen=True, repr=False)
class Variant(Rich):
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

    def __post_init__(self) -> None:
        """Make the audit one that shows itself."""
        object.__setattr__(self, "audit", Audit(self.audit))

    def shown(self) -> Shown:
        """Return what was asked for and what was reached."""
        return views.variant(self)


@dataclass(frozen=True, repr=False)
class Conditions(Rich):
    """What must be equal before two latencies may be compared. dtype is a treatment and not here."""

    device: str
    """`cpu` or `cuda`."""
    hardware: str
    """The processor or accelerator by its own name."""
    runtime: str
    form: str
    """What executes the model: `eager`, `compiled`, `torchscript`, `graph`, or the runtime's own."""
    threads: int
    batch_size: int
    inputs_sha256: str


@dataclass(frozen=True, repr=False)
class Disturbance(Rich):
    """What else used the machine while models took turns; None where the system does not tell."""

    own_cores: float
    """Processor time of the measuring process over the time on the wall."""
    other_cores: float | None
    """The same of everything else on the cores that the process may use."""
    stolen: float | None
    """Share of the cores' time that a hypervisor gave to other machines."""
    forced_switches_per_s: float
    load_average: float | None
    """Over the last minute, at the end."""
    signs: tuple[str, ...]
    """What of this is worth a reader's attention, in words; empty on a quiet machine."""
    withheld: bool = False
    """Whether threads had to wait for a core, so that no verdict may be given."""


@dataclass(frozen=True, repr=False)
class Comparison(Rich):
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
    """Latency: the typical fastest call of a turn, over both copies of the reference."""
    candidate_ms: Estimate
    """The same of the candidate, which is `reference_ms` / `speedup`."""
    null_ratio: Estimate
    """A copy of the reference timed against the reference in the same blocks."""
    reference_samples_ms: tuple[tuple[float, ...], ...]
    """Raw call times, one tuple a slot, in the order in which they ran."""
    candidate_samples_ms: tuple[tuple[float, ...], ...]
    null_samples_ms: tuple[tuple[float, ...], ...]
    warmup_calls: int
    steady: bool
    disturbance: Disturbance
    duration_s: float
    seed: int
    stopped: bool = False
    """Whether a person ended it early; then there is no verdict."""

    @property
    def noise_floor(self) -> float:
        """How far a copy of the reference may be from the reference itself by these data, as a share: the control."""
        return max(self.null_ratio.high, 1 / self.null_ratio.low) - 1

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against trusting the figures, in words; empty if nothing does."""
        wide = (self.speedup.high / self.speedup.low) ** 0.5 - 1
        found = [f"the interval is \N{PLUS-MINUS SIGN}{wide:.0%} wide"] if wide > WIDE else []
        for name, samples in (
            (self.reference, self.reference_samples_ms),
            (self.candidate, self.candidate_samples_ms),
        ):
            spread = _spread([ms for slot in samples for ms in slot])
            if spread > SCATTERED:
                found.append(f"half of the calls of {name} scatter over {spread:.0%} of their median")
        if not self.steady:
            found.append("the warm-up ended before times were steady")
        if self.stopped:
            found.append("it was stopped by hand")
        return (*found, *self.disturbance.signs)

    def shown(self) -> Shown:
        """Return the verdict with its interval, the control, and a warning where the spread is too wide to trust."""
        return views.comparison(self)

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for each timed call."""
        of = {
            self.reference: self.reference_samples_ms,
            self.candidate: self.candidate_samples_ms,
            f"{self.reference}, a copy": self.null_samples_ms,
        }
        return [
            {"model": model, "slot": slot, "call": call, "ms": ms}
            for model, samples in of.items()
            for slot, calls in enumerate(samples)
            for call, ms in enumerate(calls)
        ]


@dataclass(frozen=True, repr=False)
class ClassScore(Rich):
    """The score on the test examples of one class."""

    name: str
    examples: int
    mean: Estimate
    difference: Estimate | None
    """Variant minus baseline, on the same examples; None for the baseline."""


@dataclass(frozen=True, repr=False)
class Lost(Rich):
    """A test example that the baseline answered better than the variant."""

    index: int
    """In the test split."""
    wanted: str
    """The right answer; empty where answers are no classes, as are the next two."""
    before: str
    """The baseline's answer."""
    after: str
    score_before: float
    score_after: float
    png: str = ""
    """The input as a PNG in base64, where it is an image."""


@dataclass(frozen=True, repr=False)
class Accuracy(Rich):
    """Per-example scores on the test split, and the paired difference to the baseline."""

    metric: str
    scores: tuple[float, ...]
    mean: Estimate
    difference: Estimate | None
    """Variant minus baseline, on the same examples and target; None for the baseline."""
    agreement: float | None
    """Share of examples with the baseline's top-1 answer; None for outputs that are no classes."""
    cosine: float
    """Mean over examples of the cosine between the variant's first output and the baseline's."""
    divergence: float | None
    """Mean Kullback-Leibler divergence of the variant's class probabilities from the baseline's, in nats."""
    classes: tuple[ClassScore, ...]
    """One for each class of the test split; empty for outputs that are no classes."""
    lost: tuple[Lost, ...]
    """The worst of them, at most as many as a page can show."""
    lost_count: int
    gained_count: int
    """Examples that the variant answered better than the baseline."""

    def shown(self) -> Shown:
        """Return the score, and how the answers moved."""
        return views.accuracy(self)

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for each example of the test split."""
        return [{"example": i, "score": score} for i, score in enumerate(self.scores)]


@dataclass(frozen=True, repr=False)
class Memory(Rich):
    """Peak memory of a process of its own that loads one model file and calls it, in bytes."""

    runtime_bytes: int
    """What the process held once the runtime was imported and before the file was opened."""
    load_bytes: int
    """Peak above that while the file was loaded."""
    peak_bytes: int
    """Peak above that of loading and calling: what a deployment must have free."""
    method: str
    """`resident` (the system's count of resident pages) or `allocator` (CUDA's own)."""


@dataclass(frozen=True, repr=False)
class LayerTime(Rich):
    """Time of one operator of a layer in one call, as the runtime's own profiler or a stepped run gives it."""

    layer: str
    """Empty for what belongs to no layer."""
    operator: str
    """The runtime's name for it, such as `conv2d` or `QuantizeLinear`."""
    ms: float
    """Median over calls."""
    converts: bool = False
    """Whether it only changes the number format: quantizes, dequantizes, casts, or reorders memory."""


@dataclass(frozen=True, repr=False)
class IntegerCheck(Rich):
    """What integer kernels computed here beside the same integers computed in float: saturation shows."""

    deviation: float
    """Largest absolute difference of the outputs, as a share of the largest absolute output."""
    layers: dict[str, float]
    """By layer, fed with the same integers: the largest difference, as a share of its largest absolute output."""
    saturated: tuple[str, ...]
    """Layers whose kernels gave other numbers than rounding explains."""


@dataclass(frozen=True, repr=False)
class Point(Rich):
    """One variant at another batch size or number of threads than the rest of the benchmark."""

    variant: str
    batch_size: int
    threads: int
    error: str = ""
    """Why there is no timing; empty when there is one."""
    latency: Comparison | None = None
    """Against FP32 on the same target, at this batch size and these threads. The baseline's own is None."""
    latency_ms: Estimate | None = None


@dataclass(frozen=True, repr=False)
class Measurement(Rich):
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
    """Of the baseline: pooled over all comparisons on the target. Of a variant: the baseline's / its speed-up."""
    memory: Memory | None = None
    layers: tuple[LayerTime, ...] = ()
    denormals: int = 0
    """Numbers too small for full precision among weights and layers' outputs; some processors are slow at them."""
    integers: IntegerCheck | None = None
    """None for files that compute in float, and where a runtime cannot tell."""
    notes: tuple[str, ...] = ()
    """Why one of these could not be measured."""

    def shown(self) -> Shown:
        """Return the view of it that `show` gives too."""
        return views.measurement(self)


@dataclass(frozen=True, repr=False)
class TargetRecord(Rich):
    """One target's benchmark: the same process, inputs and threads for every variant."""

    task: str
    target: str
    machine: str
    """A short name of the machine, which tells it from others in one report: `xeon-8488c-2-cores`."""
    environment: Environment
    measurements: tuple[Measurement, ...]
    runtime: Comparison | None
    """The baseline's file on this target against the user's own module, as it is called today on the same device; None
    if that could not be timed."""
    sweep: tuple[Point, ...]
    """Other batch sizes and numbers of threads."""
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION

    def shown(self) -> Shown:
        """Return each variant's latency and accuracy."""
        return views.measurements(self)

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for each variant, without raw samples and scores."""
        whole = [row for one in self.measurements for row in one._rows()]
        return [{k: v for k, v in row.items() if not k.endswith(("samples_ms", ".scores"))} for row in whole]


@dataclass(frozen=True, repr=False)
class Step(Rich):
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
    note: str = ""
    """What went wrong in a step that worked, such as that it has no page."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that it left, by path relative to the run folder. See `manifest`."""

    def __post_init__(self) -> None:
        """Raise unless each path stays inside the run folder."""
        _check_inside(*self.files)


@dataclass(frozen=True, repr=False)
class Status(Rich):
    """What became of a run's steps."""

    command: str
    """The command line that reproduces the run."""
    started: str
    """ISO 8601, UTC."""
    steps: tuple[Step, ...]
    schema_version: int = SCHEMA_VERSION

    def shown(self) -> Shown:
        """Return the steps and how each ended."""
        return views.status(self)

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for each step."""
        return [step.to_dict() for step in self.steps]


R = TypeVar("R")


def _spread(values: list[float]) -> float:
    """Return the range of the middle half of `values` as a share of their median; 0 for fewer than four."""
    if len(values) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


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
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} must be a JSON record, but cannot be read: {error}. Run its step again.") from error
    found = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, dict) else SCHEMA_VERSION
    if found != SCHEMA_VERSION:
        newer = isinstance(found, int) and found > SCHEMA_VERSION
        raise InvalidInput(
            f"{path} has schema version {found!r:.40}, this shrinkkit reads {SCHEMA_VERSION}. "
            + ("Update shrinkkit." if newer else "Run the study again.")
        )
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InvalidInput(f"{path} is not a {kind.__name__} record: {why}. Run its step again.") from error


def _check_inside(*paths: str) -> None:
    for path in paths:
        parts = PurePosixPath(path).parts
        if not parts or ".." in parts or PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor:
            raise ValueError(f"a path must stay inside its folder, got {path!r}")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part.

    Raises:
        LeaseLost: This process belongs to a run that has ended.
    """
    lease.check()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        lease.check()
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256(*paths: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the files at `paths`, one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
