"""The robustness of one target's files: corrupted inputs, attacks, calibration, and arithmetic at its limits."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from shrinkkit.core import machines, robustness, store
from shrinkkit.core.estimate import Resampled
from shrinkkit.core.measurement import Scores
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.robustness import (
    CLEAN,
    OWN,
    SEVERITIES,
    TRANSFERRED,
    Calibration,
    Condition,
    NumericCheck,
    Robustness,
    RobustnessRecord,
)
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.errors import InvalidTask, ShrinkkitError, brief
from shrinkkit.measure import corruptions, scoring, session
from shrinkkit.measure.corruptions import Corruption
from shrinkkit.measure.scoring import Scored
from shrinkkit.measure.session import LoadedVariant, Settings
from shrinkkit.progress import Progress, no_progress
from shrinkkit.runtimes import registry
from shrinkkit.runtimes.base import Loaded
from shrinkkit.tasks import modules, outputs
from shrinkkit.tasks.metrics import Metric
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task, batches, spaced
from shrinkkit.transforms import variants

EFFORTS: Mapping[str, tuple[int, tuple[int, ...], int]] = {
    "quick": (200, (1, 3, 5), 64),
    "standard": (250, SEVERITIES, 64),
    "thorough": (5000, SEVERITIES, 500),
}
"""Test examples at most, the severities of corruptions, and the examples that are attacked at most, by effort."""
ATTACK_SEVERITIES = (1, 3, 5)
"""Of attacks, which cost many times a corruption."""
ATTACKED_VALUES = 1 << 21
"""Values of the inputs that are attacked in one batch."""
RADII = tuple(2**i / 255 for i in range(5))
"""Largest change of a value under an attack, by severity, as a share of the range of values: 1 to 16 levels of 255."""
STEPS = 7
"""Of a PGD attack, each of a third of its radius."""
BINS, REPLICATES = 15, 300
"""Bins of the confidence, and resamples of the calibration error."""
FAR = 1000.0
"""Factor by which inputs are multiplied to put them far out of range."""
_FIGURES = {
    "ECE": Metric(len, "ECE", higher_is_better=False, range=(0.0, 1.0), percent=True),
    "NLL": Metric(len, "NLL", higher_is_better=False, range=None, percent=False),
    "Brier score": Metric(len, "Brier score", higher_is_better=False, range=(0.0, 2.0), percent=False),
}


@dataclass
class _Session:
    """What the variants of a target are tried with: the same inputs for each."""

    run: Path
    settings: Settings
    examples: "Dataset[Any]"
    severities: tuple[int, ...]
    corruptions: tuple[Corruption, ...]
    baselines: dict[Any, Scored]
    """Scores of the baseline by condition, to pair others with."""
    transferred: dict[Any, list[Example]]
    """Attacks on the original model, by name and severity."""

    @functools.cached_property
    def plain_task(self) -> Task:
        """The task without further metrics, which would be resampled for each condition."""
        return replace(self.settings.task, metrics={})


def measure(
    run: str | Path, loaded: Mapping[str, LoadedVariant], settings: Settings, *, progress: Progress = no_progress
) -> RobustnessRecord:
    """Try each loaded file on corrupted, attacked and out-of-range inputs, the baseline first.

    Every variant sees the same changed inputs, so that scores are paired example by example. Without labels, a score
    is the agreement with the original model on *clean* input.

    Args:
        run: The run folder.
        loaded: Files of `session.load`.
        settings: The effort sets the number of examples and severities.
        progress: Called with the number of conditions that are done.

    Raises:
        InvalidTask: A corruption of the task's own breaks a rule.
    """
    task = settings.task
    most, severities, _ = EFFORTS[settings.effort]
    # A metric of the whole set is resampled for each condition.
    severities = severities if task.score.per_example else ATTACK_SEVERITIES[1:2]
    examples: Dataset[Any] = Subset(task.test, spaced(len(task.test), most))
    found, why = corruptions.of_task(task)
    here = _Session(Path(run), settings, examples, severities, found, {}, {})
    notes = [why] if why else []
    position = corruptions.floating(task)
    if position is None:
        notes.append("No attacks: no input is a floating-point number, so nothing has a gradient.")
    names = [BASELINE, *(name for name in loaded if name != BASELINE)]
    measured = []
    for number, name in enumerate(names):
        variant = loaded[name]
        if variant.loaded is None:
            measured.append(Robustness(name, error=variant.error))
            continue

        def at(what: str, number: int = number, name: str = name) -> None:
            progress(number, len(names), f"{name}: {what}")

        conditions = [*_clean(here, name, variant.loaded), *_corrupted(here, name, variant.loaded, at, notes)]
        if position is not None:
            at("attacks")
            conditions += _attacked(here, name, variant.loaded, position, notes)
        at("calibration")
        calibration = _calibration(here, name, variant.loaded)
        at("arithmetic")
        checks = tuple(_checks(here, variant.loaded, loaded[BASELINE].loaded))
        measured.append(Robustness(name, variant.file_sha256, "", tuple(conditions), calibration, checks))
    progress(len(names), len(names), "")
    record = RobustnessRecord(
        task=task.name,
        target=str(settings.target),
        machine=machines.this_machine(settings.target),
        environment=machines.environment(settings.threads, packages=registry.packages()),
        variants=tuple(measured),
        examples=len(examples),  # type: ignore[arg-type]
        notes=tuple(dict.fromkeys((*notes, *task.notes))),
    )
    return robustness.derive(record)


def write(run: str | Path, record: RobustnessRecord) -> Path:
    """Write the record into the run folder and return its path."""
    path = RunFolder(run).robustness_record(record.target, record.machine)
    store.write(path, record)
    return path


def _condition(
    here: _Session,
    variant: str,
    call: Loaded,
    name: str,
    severity: int,
    change: Callable[[Example, int], Example] | None,
    dataset: "Dataset[Any] | None" = None,
    **fields: Any,
) -> Condition:
    """Return the scores of a file under one condition, paired with the baseline's, which comes first."""
    scored = scoring.scores(call, here.plain_task, dataset or here.examples, change=change)
    key = (name, severity)
    if variant == BASELINE:
        here.baselines[key] = scored
    paired = here.baselines[key].sample if variant != BASELINE and key in here.baselines else None
    figures = scoring.figures(here.plain_task.metric, here.plain_task.score, scored.sample, paired)
    return Condition(name, severity, Scores(**figures), **fields)


def _clean(here: _Session, name: str, call: Loaded) -> Iterator[Condition]:
    yield _condition(here, name, call, CLEAN, 0, None)


def _corrupted(
    here: _Session, name: str, call: Loaded, at: Callable[[str], None], notes: list[str]
) -> Iterator[Condition]:
    for corruption in here.corruptions:
        at(corruption.name)
        for severity in here.severities:

            def change(inputs: Example, number: int, of: Corruption = corruption, severity: int = severity) -> Example:
                return of(inputs, severity, seed=here.settings.seed * 100_003 + number)

            yield from _tried(notes, here, name, call, corruption.name, severity, change)


def _tried(notes: list[str], *arguments: Any, **options: Any) -> Iterator[Condition]:
    """Yield a condition, or leave a note where the file gives no finite outputs under it."""
    _, name, _, what, severity, *_ = arguments
    try:
        yield _condition(*arguments, **options)
    except InvalidTask as error:
        if "outputs must be finite" not in str(error):
            raise
        notes.append(f"{name}: {what} at severity {severity} gives outputs that are not finite.")
    except RuntimeError as error:
        notes.append(f"{name}: {what} at severity {severity}: {brief(error)}.")


def _attacked(here: _Session, name: str, call: Loaded, position: int, notes: list[str]) -> Iterator[Condition]:
    """Yield FGSM and PGD, along the variant's own gradients where it has some, else transferred from the original."""
    task = here.settings.task
    try:
        model, note = variants.source(here.run, name, task)[0], OWN
    except ShrinkkitError:
        model, note = task.model, TRANSFERRED
    spread = corruptions.observed(task, position)
    dataset: Dataset[Any] = Subset(here.examples, spaced(len(here.examples), EFFORTS[here.settings.effort][2]))  # type: ignore[arg-type]
    size = task.example[0].shape[0]
    # Larger batches cost less, up to what fits into memory with the gradients of all layers.
    several = max(1, ATTACKED_VALUES // task.example[position].numel())
    for attack, steps in (("FGSM", 1), ("PGD", STEPS)):
        for severity in ATTACK_SEVERITIES:
            radius = RADII[severity - 1] * spread.width
            try:
                found = here.transferred.get((attack, severity), []) if model is task.model else []
                found = found or [
                    attacked(model, task.loss, inputs, target, position, radius, steps=steps)
                    for inputs, target in batches(dataset, several * size)
                ]
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                notes.append(f"{name}: no {attack}, because its gradient cannot be computed: {brief(error)}.")
                return
            if model is task.model:
                here.transferred[attack, severity] = found

            def change(_: Example, number: int, found: Sequence[Example] = found) -> Example:
                start = number % several * size
                return tuple(x[start : start + size] for x in found[number // several])

            fields = {"dataset": dataset, "is_attack": True, "note": note}
            yield from _tried(notes, here, name, call, attack, severity, change, **fields)


def attacked(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    inputs: Example,
    target: Any,
    position: int,
    radius: Tensor,
    *,
    steps: int,
) -> Example:
    """Return inputs moved by at most `radius` so that the loss rises: FGSM with one step, PGD with several.

    PGD starts at random, and so does FGSM at a tenth of the radius: at the original's own outputs a loss of agreement
    has no slope.

    Source: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015; Madry et al., "Towards Deep
    Learning Models Resistant to Adversarial Attacks", ICLR 2018.
    """
    clean = inputs[position].detach()
    start = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x, step = clean + radius * start * (1.0 if steps > 1 else 0.1), radius * (1.0 if steps == 1 else 1 / 3)
    with modules.plain_attention():
        for _ in range(steps):
            x = x.clone().requires_grad_()
            value = loss(model(*inputs[:position], x, *inputs[position + 1 :]), target)
            (slope,) = torch.autograd.grad(value, x)
            x = clean + torch.minimum(torch.maximum(x.detach() + step * slope.sign() - clean, -radius), radius)
    return (*inputs[:position], x.to(clean.dtype), *inputs[position + 1 :])


def _calibration(here: _Session, name: str, call: Loaded) -> Calibration | None:
    """Return the calibration of a classifier; None without classes or labels."""
    task = here.plain_task
    scored = scoring.scores(call, task, here.examples)
    if not scored.predictions or None in scored.labels:
        return None
    if name == BASELINE:
        here.baselines["calibration"] = scored
    log, labels = _log_probabilities(scored), np.array(scored.labels)
    baseline = here.baselines.get("calibration") if name != BASELINE else None
    before = _calibration_samples(_log_probabilities(baseline), labels) if baseline else {}
    figures = tuple(
        Scores(**scoring.figures(metric, _FIGURES[metric], sample, before.get(metric)))
        for metric, sample in _calibration_samples(log, labels).items()
    )
    split = Subset(task.validation, spaced(len(task.validation), len(here.examples)))  # type: ignore[arg-type]
    tuning = scoring.scores(call, task, split)
    temperature = 1.0
    if None not in tuning.labels:
        temperature = _temperature(_log_probabilities(tuning), np.array(tuning.labels))
    confidence, right = _confidence(log, labels)
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = tuple(
        (float(confidence[index == i].mean()), float(right[index == i].mean()), int((index == i).sum()))
        for i in range(BINS)
        if (index == i).any()
    )
    scaled = _confidence(_scaled(log, temperature), labels)
    return Calibration(figures, bins, temperature, _calibration_error(*scaled))


def _log_probabilities(scored: Scored) -> Any:
    """Return the log-probabilities of the classes, (examples, classes), of logits or of probabilities."""
    x = scored.outputs.double()
    are_probabilities = bool((x >= 0).all() and ((x.sum(1) - 1).abs() < 1e-3).all())
    return (x.clamp(min=2.0**-24).log() if are_probabilities else x).log_softmax(1).numpy()


def _scaled(log: Any, temperature: float) -> Any:
    return torch.from_numpy(log / temperature).log_softmax(1).numpy()


def _confidence(log: Any, labels: Any) -> tuple[Any, Any]:
    """Return the probability of each answer, and whether it is right."""
    return np.exp(log.max(1)), (log.argmax(1) == labels).astype(float)


def _calibration_samples(log: Any, labels: Any) -> dict[str, Any]:
    """Return the raw data of each figure of calibration; resamples draw the same examples for every model."""
    confidence, right = _confidence(log, labels)
    picks = np.random.default_rng(0).integers(0, len(labels), (REPLICATES, len(labels)))
    replicates = tuple(_calibration_error(confidence[pick], right[pick]) for pick in picks)
    probability = np.exp(log)
    error = probability - np.eye(log.shape[1])[labels]
    return {
        "ECE": Resampled(_calibration_error(confidence, right), replicates, len(labels)),
        "NLL": tuple((-log[np.arange(len(labels)), labels]).tolist()),
        "Brier score": tuple((error**2).sum(1).tolist()),
    }


def _calibration_error(confidence: Any, right: Any) -> float:
    """Return the expected calibration error, in [0, 1], of `BINS` bins of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(index, weights=confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _temperature(log: Any, labels: Any) -> float:
    """Return the divisor of the logits, in [0.05, 20], at which labels are most likely."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(labels))

    def loss(power: float) -> float:
        return float(-_scaled(log, np.exp(power))[rows, labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded").x))


def _checks(here: _Session, loaded: Loaded, baseline: Loaded | None) -> Iterator[NumericCheck]:
    """Yield what a file makes of inputs that should change nothing, and of inputs out of range."""
    settings = here.settings
    size = settings.task.example[0].shape[0]
    inputs = next(batches(here.examples, size))[0]
    inputs = session.batch(inputs, size)
    first = _first(loaded(*inputs))
    rolled = tuple(x.roll(1, 0) for x in inputs)
    yield _compared("other places in the batch", first, lambda: _first(loaded(*rolled)).roll(-1, 0))
    other = tuple(x[:1] for x in inputs) if size > 1 else tuple(x.repeat_interleave(2, 0) for x in inputs)
    yield _compared(f"batch of {len(other[0])}", first[:1], lambda: _first(loaded(*other))[:1])
    if settings.threads > 1:
        yield _compared("1 thread", first, lambda: _on_one_thread(loaded, settings, inputs))
    position = corruptions.floating(settings.task)
    if position is None:
        return
    x = inputs[position]
    odd = {"zeros": torch.zeros_like(x), "a constant": torch.ones_like(x)}
    odd |= {f"values {FAR:g} times as large": x * FAR, "a NaN": _with_nan(x)}
    for name, changed in odd.items():
        yield _out_of_range(name, (*inputs[:position], changed, *inputs[position + 1 :]), loaded, baseline)


def _first(output: Any) -> Tensor:
    """Return the first output as (examples, values) in double precision."""
    tensor = outputs.tensors(output)[0]
    return tensor.double().flatten(1) if tensor.dim() > 1 else tensor.double()[:, None]


def _on_one_thread(loaded: Loaded, settings: Settings, inputs: Example) -> Tensor:
    registry.use_threads(1)
    try:
        like = variants.output_of(settings.task)
        single = session.loaded_for(loaded, "the example", replace(settings, threads=1), like)
        return _first(single(*inputs))
    finally:
        registry.use_threads(settings.threads)


def _compared(name: str, expected: Tensor, compute: Callable[[], Tensor]) -> NumericCheck:
    try:
        output = compute()
    except Exception as error:  # runtimes raise various error types
        return NumericCheck(name, note=f"{brief(error)}.")
    if output.shape != expected.shape:
        return NumericCheck(name, note="The file has a fixed batch.")
    distance = float((output - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    changed = float((output.argmax(1) != expected.argmax(1)).double().mean()) if expected.shape[1] > 1 else None
    return NumericCheck(name, distance, changed)


def _out_of_range(name: str, inputs: Example, loaded: Loaded, baseline: Loaded | None) -> NumericCheck:
    try:
        output, expected = (_first(one(*inputs)) for one in (loaded, baseline or loaded))
    except Exception as error:  # runtimes raise various error types
        return NumericCheck(name, note=f"{brief(error)}.")
    finite = bool(torch.isfinite(output).all())
    comparable = finite and bool(torch.isfinite(expected).all()) and output.shape[1] > 1
    return NumericCheck(
        name,
        changed=float((output.argmax(1) != expected.argmax(1)).double().mean()) if comparable else None,
        finite=finite,
    )


def _with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(len(x), -1)[:, 0] = float("nan")
    return x
