"""The robustness of one target's files: corrupted inputs, attacks, calibration, and arithmetic at its limits."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from shrinkkit.core import machines, robustness, store
from shrinkkit.core.estimate import Sample
from shrinkkit.core.measurement import Scores
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.robustness import (
    ATTACKS,
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
from shrinkkit.errors import ShrinkkitError, brief
from shrinkkit.measure import calibration, corruptions, scoring, session
from shrinkkit.measure.corruptions import Corruption
from shrinkkit.measure.scoring import NotFinite, Scored
from shrinkkit.measure.session import LoadedVariant, Settings
from shrinkkit.progress import Progress, no_progress
from shrinkkit.runtimes import registry
from shrinkkit.runtimes.base import Loaded
from shrinkkit.tasks import data, modules, outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task, batches, spaced
from shrinkkit.transforms import variants

EFFORTS: Mapping[str, tuple[int, tuple[int, ...], int]] = {
    "quick": (200, (1, 3, 5), 64),
    "standard": (250, (1, 3, 5), 64),
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
HELD_BYTES = 1 << 30
"""Inputs up to this size are read and corrupted once for all variants, and held in memory."""
FAR = 1000.0
"""Factor by which inputs are multiplied to put them far out of range."""

Change = Callable[[Example, int], Example]
"""(inputs, number of the batch) -> what the models see of it."""


@dataclass
class _Session:
    """What the variants of a target are tried with: the same inputs for each."""

    run: Path
    settings: Settings
    examples: "Dataset[Any]"
    notes: list[str]
    """What could not be tried, and why."""
    baseline: dict[tuple[str, int], Sample] = field(default_factory=dict)
    """Scores of the baseline by condition, to pair others with."""
    calibrated: dict[str, Sample] = field(default_factory=dict)
    """Figures of the baseline's calibration."""
    transferred: dict[tuple[str, int], list[Example]] = field(default_factory=dict)
    """Attacks on the original model, by name and severity."""

    @functools.cached_property
    def plain_task(self) -> Task:
        """The task without further metrics, which would be resampled for each condition."""
        return replace(self.settings.task, metrics={})

    @functools.cached_property
    def position(self) -> int | None:
        """The input that is attacked and brought out of range; None without one in floating point."""
        return corruptions.floating(self.settings.task)

    @functools.cached_property
    def width(self) -> Tensor:
        """The range of values of that input."""
        assert self.position is not None
        return corruptions.observed(self.settings.task, self.position).width


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
        progress: Called with the number of corruptions and variants that are done.

    Raises:
        InvalidTask: A corruption of the task's own breaks a rule.
    """
    task = settings.task
    most, severities, _ = EFFORTS[settings.effort]
    # A metric of the whole set is resampled for each condition.
    severities = severities if task.score.per_example else ATTACK_SEVERITIES[1:2]
    chosen = spaced(len(task.test), most)
    is_small = len(chosen) * sum(x[0].nbytes for x in task.example) <= HELD_BYTES
    examples: Dataset[Any] = Subset(data.Held(task.test) if is_small else task.test, chosen)
    found, why = corruptions.of_task(task)
    here = _Session(Path(run), settings, examples, [why] if why else [])
    if here.position is None:
        here.notes.append("No attacks: no input is a floating-point number, so nothing has a gradient.")
    if task.is_fidelity:
        here.notes.append("Without labels, a score is the agreement with the original model on the clean input.")
    names = [BASELINE, *(name for name in loaded if name != BASELINE)]
    files = {name: file for name in names if (file := loaded[name].loaded)}
    clean = {name: scoring.scores(file, here.plain_task, examples) for name, file in files.items()}
    conditions = {name: [_condition(here, name, CLEAN, 0, scored)] for name, scored in clean.items()}
    total = len(found) + len(files)
    for number, corruption in enumerate(found):
        progress(number, total, corruption.name)
        for severity in severities:
            change: Change = functools.partial(_corrupted, here, corruption, severity)
            if is_small:
                change = _looked_up([change(x, i) for i, (x, _) in enumerate(batches(examples, len(task.example[0])))])
            for name, file in files.items():
                conditions[name] += _tried(here, name, file, corruption.name, severity, change)
    measured = [Robustness(name, error=loaded[name].error) for name in names if name not in files]
    for number, (name, file) in enumerate(files.items(), len(found)):
        progress(number, total, f"{name}: attacks, calibration and arithmetic")
        conditions[name] += _attacked(here, name, file)
        calibrated = _calibration(here, name, file, clean[name])
        checks = tuple(_checks(here, file, files.get(BASELINE)))
        measured.append(Robustness(name, loaded[name].file_sha256, "", tuple(conditions[name]), calibrated, checks))
    measured.sort(key=lambda one: names.index(one.variant))
    progress(total, total, "")
    record = RobustnessRecord(
        task=task.name,
        target=str(settings.target),
        machine=machines.this_machine(settings.target),
        environment=machines.environment(settings.threads, packages=registry.packages()),
        variants=tuple(measured),
        examples=len(examples),  # type: ignore[arg-type]
        notes=tuple(dict.fromkeys((*here.notes, *task.notes))),
        classes=_classes(task, clean.get(BASELINE)),
    )
    return robustness.derive(record)


def _classes(task: Task, scored: Scored | None) -> tuple[str, ...]:
    labels = scored.labels if scored else ()
    return tuple("" if i is None else task.class_names[i] for i in labels) if any(i is not None for i in labels) else ()


def write(run: str | Path, record: RobustnessRecord) -> Path:
    """Write the record into the run folder and return its path."""
    path = RunFolder(run).robustness_record(record.target, record.machine)
    store.write(path, record)
    return path


def _condition(here: _Session, variant: str, name: str, severity: int, scored: Scored, **fields: Any) -> Condition:
    """Return scores under one condition, paired with the baseline's, which comes first."""
    paired = here.baseline.get((name, severity)) if variant != BASELINE else None
    if variant == BASELINE:
        here.baseline[name, severity] = scored.sample
    figures = scoring.figures(here.plain_task.metric, here.plain_task.score, scored.sample, paired)
    return Condition(name, severity, Scores(**figures), **fields)


def _tried(
    here: _Session,
    variant: str,
    file: Loaded,
    name: str,
    severity: int,
    change: Change,
    dataset: "Dataset[Any] | None" = None,
    **fields: Any,
) -> Iterator[Condition]:
    """Yield the condition of changed inputs, or leave a note where the file gives no finite outputs under it."""
    try:
        scored = scoring.scores(file, here.plain_task, dataset or here.examples, change=change)
    except NotFinite:
        here.notes.append(f"{variant}: {name} at severity {severity} gives outputs that are not finite.")
    except RuntimeError as error:
        here.notes.append(f"{variant}: {name} at severity {severity}: {brief(error)}.")
    else:
        yield _condition(here, variant, name, severity, scored, **fields)


def _corrupted(here: _Session, corruption: Corruption, severity: int, inputs: Example, number: int) -> Example:
    return corruption(inputs, severity, seed=here.settings.seed * 100_003 + number)


def _looked_up(changed: Sequence[Example]) -> Change:
    """Return a change that was made before, once for all variants."""
    return lambda _, number: changed[number]


def _attacked(here: _Session, name: str, file: Loaded) -> Iterator[Condition]:
    """Yield FGSM and PGD, along the variant's own gradients where it has some, else transferred from the original."""
    task, position = here.settings.task, here.position
    if position is None:
        return
    try:
        model, note = variants.source(here.run, name, task)[0], OWN
    except ShrinkkitError:
        model, note = task.model, TRANSFERRED
    dataset: Dataset[Any] = Subset(here.examples, spaced(len(here.examples), EFFORTS[here.settings.effort][2]))  # type: ignore[arg-type]
    size = task.example[0].shape[0]
    # Larger batches cost less, up to what fits into memory with the gradients of all layers.
    several = max(1, ATTACKED_VALUES // task.example[position].numel())
    for attack, steps in zip(ATTACKS, (1, STEPS), strict=True):
        for severity in ATTACK_SEVERITIES:
            radius = RADII[severity - 1] * here.width
            try:
                found = here.transferred.get((attack, severity), []) if model is task.model else []
                found = found or [
                    attacked(model, task.loss, inputs, target, position, radius, steps=steps)
                    for inputs, target in batches(dataset, several * size)
                ]
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                here.notes.append(f"{name}: no {attack}, because its gradient cannot be computed: {brief(error)}.")
                return
            if model is task.model:
                here.transferred[attack, severity] = found
            parts = [batch for inputs in found for batch in zip(*(torch.split(x, size) for x in inputs), strict=True)]
            change = _looked_up(parts)
            yield from _tried(here, name, file, attack, severity, change, dataset, is_attack=True, note=note)


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


def _calibration(here: _Session, name: str, call: Loaded, clean: Scored) -> Calibration | None:
    """Return the calibration of a classifier, paired with the baseline's; None without classes or labels."""
    if not clean.predictions or None in clean.labels:
        return None
    task = here.settings.task
    split = Subset(task.validation, spaced(len(task.validation), len(here.examples)))  # type: ignore[arg-type]
    found = calibration.samples(clean)
    paired = here.calibrated if name != BASELINE else {}
    here.calibrated = found if name == BASELINE else here.calibrated
    figures = (
        Scores(**scoring.figures(metric, calibration.FIGURES[metric], sample, paired.get(metric)))
        for metric, sample in found.items()
    )
    temperature = calibration.temperature(scoring.scores(call, here.plain_task, split))
    return Calibration(tuple(figures), *calibration.reliability(clean, temperature))


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
    if (position := here.position) is None:
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
    return NumericCheck(name, distance, _changed(output, expected))


def _out_of_range(name: str, inputs: Example, loaded: Loaded, baseline: Loaded | None) -> NumericCheck:
    try:
        output, expected = (_first(one(*inputs)) for one in (loaded, baseline or loaded))
    except Exception as error:  # runtimes raise various error types
        return NumericCheck(name, note=f"{brief(error)}.")
    finite = bool(torch.isfinite(output).all())
    comparable = finite and bool(torch.isfinite(expected).all())
    return NumericCheck(name, changed=_changed(output, expected) if comparable else None, finite=finite)


def _changed(output: Tensor, expected: Tensor) -> float | None:
    """Return the share of rows whose largest value is another one; None for single values."""
    return float((output.argmax(1) != expected.argmax(1)).double().mean()) if expected.shape[1] > 1 else None


def _with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(len(x), -1)[:, 0] = float("nan")
    return x
