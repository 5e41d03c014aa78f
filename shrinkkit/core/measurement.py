"""Records of what was measured of model files, each with the raw samples that its figures follow from."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Bounds, Estimate, Resampled, Sample
from shrinkkit.core.machines import Environment
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.core.target import Place
from shrinkkit.display import cells, formats
from shrinkkit.display.formats import TIMES
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Cell, Column, Shown, Statement, Table, facts
from shrinkkit.errors import UnfairComparison

WIDE, SCATTERED = 0.05, 0.25
"""Half-width of the interval, and interquartile range of the calls, as fractions, beyond which a warning is given."""


@dataclass(frozen=True, repr=False)
class Conditions(Rich):
    """What must be equal before two latencies may be compared. The dtype is a treatment and may differ."""

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
    """Contention during a timing; None if the system hides it."""

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
    """The noteworthy part of it, in words; empty on a quiet machine."""
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
    """Differs from `conditions.runtime` only if runtimes themselves are compared."""
    speedup: Estimate
    """Code speed: from the fastest call of each slot."""
    median_speedup: Estimate
    """From the median call of each slot."""
    verdict: str
    """`faster`, `slower`, `same`, `undecided`, or `too noisy`."""
    reference_ms: Estimate
    """Latency: midmean of the fastest call of each slot, over both copies of the reference."""
    candidate_ms: Estimate
    """`reference_ms` / `speedup`."""
    control_ratio: Estimate
    """A/A control: the reference against its copy, in the same blocks."""
    reference_samples_ms: tuple[tuple[float, ...], ...]
    """Raw call times, one tuple per slot, in the order in which they ran."""
    candidate_samples_ms: tuple[tuple[float, ...], ...]
    control_samples_ms: tuple[tuple[float, ...], ...]
    warmup_calls: int
    steady: bool
    disturbance: Disturbance
    duration_s: float
    seed: int
    stopped: bool = False
    """Whether a person ended it early; then there is no verdict."""

    @property
    def noise_floor(self) -> float:
        """The largest difference between the reference and its copy (A/A control) that data allow, as a fraction."""
        return max(self.control_ratio.high, 1 / self.control_ratio.low) - 1

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt the figures."""
        wide = (self.speedup.high / self.speedup.low) ** 0.5 - 1
        reasons = [f"the interval is \N{PLUS-MINUS SIGN}{wide:.0%} wide"] if wide > WIDE else []
        # No mapping: two models may share a name.
        arms = ((self.reference, self.reference_samples_ms), (self.candidate, self.candidate_samples_ms))
        for name, samples in arms:
            calls = [ms for slot in samples for ms in slot]
            low, middle, high = statistics.quantiles(calls, n=4) if len(calls) >= 4 else (1.0, 1.0, 1.0)
            if (spread := (high - low) / middle) > SCATTERED:
                reasons.append(f"latency spread of {name}: IQR {spread:.0%} of the median")
        if not self.steady:
            reasons.append("the warm-up ended before times were steady")
        if self.stopped:
            reasons.append("it was stopped by hand")
        return (*reasons, *self.disturbance.signs)

    def shown(self) -> Shown:
        """Return the verdict with its interval, the control, and warnings."""
        here = self.conditions
        others = f" and {self.candidate_runtime}" if self.candidate_runtime != here.runtime else ""
        remarks = (
            f"Latency per batch of {here.batch_size}: {formats.milliseconds(self.reference_ms.value)} and "
            f"{formats.milliseconds(self.candidate_ms.value)} on {here.device} in {here.runtime}{others}, "
            f"{formats.counted(here.threads, 'thread')}",
            f"A/A noise floor {formats.percent(self.noise_floor)}, {len(self.control_samples_ms) // 2} blocks in "
            f"{self.duration_s:.1f} s",
            *([f"WARNING: {'; '.join(self.warnings)}"] if self.warnings else []),
        )
        verdict, speed = formats.UNSURE.get(self.verdict, self.verdict), formats.estimate(self.speedup, unit=TIMES)
        text = f"{self.candidate} vs. {self.reference}: {verdict}, {speed}"
        return Statement(text, remarks, cells.speedup(self.speedup, self.verdict).tone)

    def _rows(self) -> list[dict[str, Any]]:
        arms = (self.reference_samples_ms, self.candidate_samples_ms, self.control_samples_ms)
        return [
            {"model": model, "slot": slot, "call": call, "ms": ms}
            for model, samples in zip((self.reference, self.candidate, f"{self.reference}, a copy"), arms, strict=True)
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
class Regression(Rich):
    """A test example that the baseline answered better than the variant."""

    index: int
    """In the test split."""
    label: str
    """The right answer; empty where answers are no classes, as are the next two."""
    before: str
    """The baseline's answer."""
    after: str
    score_before: float
    score_after: float
    png: str = ""
    """The input as a PNG in base64, where it is an image."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Scores(Rich):
    """A metric of a model on the test split with its raw data, and the paired difference to the baseline."""

    metric: str
    scores: tuple[float, ...]
    """Of each example; empty for a metric of the whole set."""
    resampled: Resampled | None = None
    """The metric of the whole set on resamples; None for scores of examples."""
    mean: Estimate
    """Mean score, or the metric of the whole set."""
    difference: Estimate | None
    """Variant minus baseline, on the same examples and target; None for the baseline."""
    higher_is_better: bool = True
    bounds: Bounds = None
    percent: bool = True
    """Whether it may be shown in per cent; continuous measures such as the cosine are not."""

    @property
    def sample(self) -> Sample:
        """The raw data that the figures follow from."""
        return self.resampled or self.scores

    @property
    def examples(self) -> int:
        """Number of test examples."""
        return self.resampled.examples if self.resampled else len(self.scores)

    @property
    def is_fraction(self) -> bool:
        """Whether it is shown in per cent, and changes in percentage points."""
        return self.percent and formats.is_fraction(self.scores or (self.mean.value,))

    @property
    def gain(self) -> Estimate | None:
        """`difference` with the sign by which more is better."""
        return estimate.gain(self.difference, higher_is_better=self.higher_is_better)

    @property
    def title(self) -> str:
        """The metric's name, and that lower is better where it is."""
        return formats.metric(self.metric, higher_is_better=self.higher_is_better)

    def change_cell(self) -> Cell:
        """Return the paired difference to the baseline with its interval; `reference` for the baseline."""
        return cells.change(self.difference, is_fraction=self.is_fraction)

    def _rows(self) -> list[dict[str, Any]]:
        return [{"example": i, "score": score} for i, score in enumerate(self.scores)]


@dataclass(frozen=True, repr=False, kw_only=True)
class Accuracy(Scores):
    """The metric of the budget on the test split, and how outputs changed."""

    agreement: float | None
    """Share of examples with the baseline's top-1 answer; None for outputs that are no classes."""
    cosine: float
    """Mean over examples of the cosine between the variant's first output and the baseline's."""
    divergence: float | None
    """Mean Kullback-Leibler divergence of the variant's class probabilities from the baseline's, in nats."""
    classes: tuple[ClassScore, ...]
    """One for each class of the test split; empty for outputs that are no classes."""
    worst_regressions: tuple[Regression, ...]
    """The worst of them, at most as many as a page can show."""
    regressions: int
    improvements: int
    """Examples that the variant answered better than the baseline."""
    further: tuple[Scores, ...] = ()
    """Other metrics of the same outputs, which decide nothing."""

    def shown(self) -> Shown:
        """Return the score with its interval, and how the predictions changed against the baseline's."""
        pairs = [(self.title, cells.score(self.mean, is_fraction=self.is_fraction).plain())]
        if self.difference:
            pairs += [
                (f"\N{GREEK CAPITAL LETTER DELTA} {self.metric}", self.change_cell().plain()),
                ("same predictions", "" if self.agreement is None else formats.percent(self.agreement)),
                ("cosine similarity of outputs", f"{self.cosine:.4f}"),
                ("regressions and improvements", f"{self.regressions} and {self.improvements}" if self.scores else ""),
            ]
        pairs += [(one.title, cells.score(one.mean, is_fraction=one.is_fraction).plain()) for one in self.further]
        return facts(f"{self.metric[:1].upper()}{self.metric[1:]} on {self.examples:,} examples", pairs)


@dataclass(frozen=True, repr=False)
class Memory(Rich):
    """Peak memory of a separate process that loads one model file and calls it, in bytes."""

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
    """Time of one operator of a layer in one call, from the runtime's profiler or a step-by-step run."""

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
    """Integer kernels compared with the same integers computed in float, which shows saturation."""

    max_relative_error: float
    """Of the outputs: largest absolute difference, relative to the largest absolute output."""
    layers: dict[str, float]
    """The same of each layer, with the same integers as inputs."""
    saturated: tuple[str, ...]
    """Layers whose kernels differ by more than rounding."""


@dataclass(frozen=True, repr=False)
class Point(Rich):
    """One variant at another batch size or thread count, or on a workload."""

    variant: str
    batch_size: int
    threads: int
    workload: str = ""
    """The task's name of the inputs; empty for those of its example."""
    tokens: int = 0
    """Tokens of one call, where the task counts them."""
    error: str = ""
    """Why there is no timing; empty when there is one."""
    latency: Comparison | None = None
    """Against FP32 on the same target, at this batch size and these threads. The baseline's own is None."""
    latency_ms: Estimate | None = None

    @property
    def setting(self) -> tuple[str, int, int]:
        """What is equal for the points that are compared: workload, batch size and threads."""
        return self.workload, self.batch_size, self.threads

    @property
    def throughput(self) -> Estimate | None:
        """Calls per second times what each of them holds, in `unit`."""
        return estimate.rate(self.tokens or self.batch_size, self.latency_ms) if self.latency_ms else None

    @property
    def unit(self) -> str:
        """Of the throughput: tokens per second where they are counted, else examples per second."""
        return "tokens / s" if self.tokens else "examples / s"


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
    """None for files in float, and if the runtime does not tell."""
    notes: tuple[str, ...] = ()
    """Why one of these could not be measured, or not in full."""
    reference: Accuracy | None = None
    """The baseline's on the examples of `accuracy`, where these are only a part of the test split."""

    def shown(self) -> Shown:
        """Return what was measured."""
        values = [] if self.error else self.row()[1:]
        metric = self.accuracy.metric if self.accuracy else "score"
        names = ("latency", "vs FP32, same runtime", f"\N{GREEK CAPITAL LETTER DELTA} {metric}")
        pairs = [("error", self.error), *((name, cell.plain()) for name, cell in zip(names, values, strict=False))]
        pairs += [
            ("load", cells.milliseconds(self.load_ms).text),
            ("first call", cells.milliseconds(self.first_call_ms).text),
            ("peak memory", formats.size(self.memory.peak_bytes) if self.memory else ""),
            ("layers with int8 saturation", ", ".join(self.integers.saturated) if self.integers else ""),
            ("notes", " ".join(self.notes)),
        ]
        return facts(f"{self.variant} on {self.target}", pairs)

    def row(self) -> tuple[Cell, ...]:
        """Return its row in a table: variant, latency, speed-up and change in accuracy; or why there are none."""
        if self.error:
            return Cell(self.variant), Cell(self.error, tone="bad", wide=True)
        ratio, base = self.latency, cells.REFERENCE if self.latency_ms else Cell("")
        return (
            Cell(self.variant),
            cells.latency(self.latency_ms),
            cells.speedup(ratio.speedup, ratio.verdict) if ratio else base,
            self.accuracy.change_cell() if self.accuracy else Cell(""),
        )


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
    """Contention during the benchmark."""
    task_notes: tuple[str, ...] = ()
    """What the task was given without, and how it was filled in."""
    partial: bool = False
    """Whether the benchmark has not ended, so that variants and figures may be missing."""
    schema_version: int = SCHEMA_VERSION

    @property
    def place(self) -> Place:
        """The target, and the machine where `target` names one."""
        return Place.parse(self.target)

    def shown(self) -> Shown:
        """Return each variant's latency and accuracy."""
        metric = next((m.accuracy.title for m in self.measurements if m.accuracy), "score")
        titles = ("latency / batch", "vs FP32, same runtime", f"\N{GREEK CAPITAL LETTER DELTA} {metric}")
        columns = (Column("variant"), *(Column(title, True) for title in titles))
        rows = tuple(measurement.row() for measurement in self.measurements)
        note = " ".join([*self.task_notes, "; ".join(self.notes)]).strip()
        return Table(f"Measured on {self.target}", columns, rows, note)

    def _rows(self) -> list[dict[str, Any]]:
        raw = ("samples_ms", ".scores", "replicates", ".further")
        rows = (row for one in self.measurements for row in one._rows())
        return [{key: value for key, value in row.items() if not key.endswith(raw)} for row in rows]


def speedup(reference: Comparison, candidate: Comparison) -> float:
    """Return how many times faster `candidate`'s model is than `reference`'s.

    Both are the candidates of comparisons against the same baseline under the same conditions; raises UnfairComparison
    otherwise.
    """
    pair = (reference, candidate)
    stated = ({"baseline": c.reference, "candidate runtime": c.candidate_runtime, **vars(c.conditions)} for c in pair)
    if unequal := differences(*stated):
        text = f"Only measurements under equal conditions may be compared; these differ in {unequal}."
        raise UnfairComparison(f"{text} Measure both on the same target in one benchmark.")
    return candidate.speedup.value / reference.speedup.value


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return the names of the values that differ, each with both values; '' if none does."""
    return ", ".join(f"{name} ({before[name]!r} and {after[name]!r})" for name in before if before[name] != after[name])
