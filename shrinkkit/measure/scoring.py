"""Scores and predictions of a model on a split, their paired comparison, and pictures of inputs. Not: latency."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from shrinkkit.core import estimate, evidence
from shrinkkit.core.estimate import Resampled, Sample
from shrinkkit.core.measurement import Accuracy, ClassScore, Regression, Scores
from shrinkkit.errors import InvalidInput, InvalidTask, nearest, options
from shrinkkit.progress import Progress, no_progress
from shrinkkit.runtimes import files
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks import checks, copies, metrics
from shrinkkit.tasks.metrics import Metric
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.outputs import convert, tensors
from shrinkkit.tasks.task import SPLITS, Task, batches
from shrinkkit.transforms import variants

MOST_REGRESSIONS = 12
"""Regressions that a record stores at most."""
SIDE, COLOURS = 96, 64
"""Pixels of a picture's longer side, and its colours, at most: a photograph takes a quarter of the bytes."""
_SMALLEST_IMAGE = 8
_ROWS = 4096
"""Rows converted to double precision at a time, to bound memory."""
_SUM_TOLERANCE = 1e-3
_LEAST_PROBABILITY = 2.0**-24
"""Single precision cannot tell smaller probabilities from 0 next to 1; clamping avoids infinite divergence."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores and outputs of a model for every example of a split, in the split's order."""

    sample: Sample
    """Of the score: one for each example, or of the whole set."""
    further: dict[str, Sample]
    """Of the task's further metrics."""
    outputs: torch.Tensor
    """The first output of each example, flattened: (examples, values), on the CPU; shorter ones end in zeros."""
    predictions: tuple[int, ...]
    """Index in `class_names` of the largest output; empty where outputs are not classes."""
    labels: tuple[int | None, ...]
    """Index in `class_names` of the label; None for an example whose target is not a class."""
    dataset: "Dataset[Any]"
    span: torch.Tensor | None
    """Smallest and largest value of each channel of the first input, (2, channels); None unless it is an image."""

    @property
    def scores(self) -> tuple[float, ...]:
        """The score of each example; empty for a metric of the whole set."""
        return () if isinstance(self.sample, Resampled) else tuple(self.sample)


def score(model: nn.Module, task: Task, *, split: str = "validation", baseline: nn.Module | None = None) -> Accuracy:
    """Score a model on a split of a task, example by example; nothing is changed.

    Args:
        model: Module in eval mode that takes batches of the size of the task's example, on any device.
        task: Whose data and score function are used; its own model is not.
        split: `train`, `calibration`, `validation` or `test`. Choose between models on `validation`.
        baseline: Model to compare with on the same examples; None for none.

    Returns:
        The mean score with its 95 % interval and each example's score; with a baseline, the paired difference, the
        agreement of the predictions and the examples whose score fell.

    Raises:
        InvalidInput: There is no such split, or the outputs of the two models differ in shape.
        InvalidTask: The split is empty, or an output or a score is not finite; the batch is named.
    """
    if split not in SPLITS:
        raise InvalidInput(f"`split` must be {options(SPLITS)}, got {split!r}.{nearest(str(split), SPLITS)}")
    dataset = getattr(task, split)
    paired = scores(_with_cpu_tensors(baseline), task, dataset) if baseline else None
    return accuracy(task, scores(_with_cpu_tensors(model), task, dataset), paired)


def _with_cpu_tensors(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls `model`, on its device, with CPU tensors and returns CPU tensors."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def call(*inputs: torch.Tensor) -> Any:
        with quantize.using_engine(quantize.engine_of(model)):
            return convert(model(*(x.to(device) for x in inputs)), lambda t: t.cpu())

    return call


def scores(
    call: Callable[..., Any],
    task: Task,
    dataset: "Dataset[Any]",
    *,
    change: Callable[[Example, int], Example] | None = None,
    progress: Progress = no_progress,
) -> Scored:
    """Return the scores and predictions of a model for each example of `dataset`, in order.

    `change` takes the inputs and the number of a batch, and returns what the model sees of it; targets stay.

    The model is called with batches of the size of the task's example, the last one padded with repeats, so that
    models with a fixed batch are evaluated by the same rule.

    Outputs are classes if the task has at least two `class_names`, the first output has one floating-point value for
    each, (examples, classes), and targets do not have that shape too, as multi-label targets do. An example has a
    label if the first output has at most two dimensions and its target is one integer in [0, number of names).

    `call`, a model or a loaded file, returns outputs on the CPU. Raises InvalidTask if the split is empty, or an output
    or a score is not finite.
    """
    size, names = task.example[0].shape[0], len(task.class_names)
    split = next((f"`{split}`" for split in SPLITS if getattr(task, split) is dataset), "the dataset")
    total = -(-len(dataset) // size)  # type: ignore[arg-type]
    values, labels, pairs = list[float](), list[int | None](), list[tuple[Any, Any]]()
    firsts, spans, classes = list[torch.Tensor](), list[torch.Tensor](), names > 1
    for number, (inputs, target) in enumerate(batches(dataset, size)):
        count, where = inputs[0].shape[0], f"batch {number} of {split}"
        inputs = change(inputs, number) if change else inputs
        padded = tuple(x if count == size else x[torch.arange(size) % count] for x in inputs)
        with torch.inference_mode():
            output = _first_examples(call(*padded), count, size)
            _check_outputs(output, where)
            batch = task.score(output, target) if task.score.per_example else None
        if batch is not None:
            _check_scores(batch, count, where)
            values.extend(batch.double().tolist())
        if task.metrics or batch is None:
            pairs.append((output, target))
        first = tensors(output)[0]
        multi_label = isinstance(target, torch.Tensor) and target.shape == first.shape
        classes &= first.shape[1:] == (names,) and first.is_floating_point() and not multi_label
        labels.extend(_labels(first, target, names))
        firsts.append(first.unsqueeze(1).flatten(1).to(torch.promote_types(first.dtype, torch.float32)))
        if is_image(inputs[0][0]):
            spans.append(span(inputs[0]))
        progress(number + 1, total, split)
    if not firsts:
        raise InvalidTask(f"{split} must hold at least one example to score a model on, but it is empty. Add examples.")
    width = max(first.shape[1] for first in firsts)
    # Those for each token are as long as the texts of their batch.
    outputs = torch.cat([nn.functional.pad(first, (0, width - first.shape[1])) for first in firsts])
    whole = metrics.whole(pairs) if pairs else ()
    with checks.blaming(f"Metrics must accept the outputs and targets of {split}"):
        sample = tuple(values) if task.score.per_example else task.score.sample(*whole, len(outputs))
        further = {name: metric.sample(*whole, len(outputs)) for name, metric in task.metrics.items()}
    predictions = tuple(outputs.argmax(1).tolist()) if classes else ()
    return Scored(sample, further, outputs, predictions, tuple(labels), dataset, join(spans) if spans else None)


def _first_examples(output: Any, count: int, size: int) -> Any:
    """Return the outputs of the first `count` examples of a batch of `size`."""
    return convert(output, lambda t: t[:count] if t.shape[:1] == (size,) else t)


class NotFinite(InvalidTask):
    """A model's outputs are not all finite."""


def _check_outputs(output: Any, where: str) -> None:
    for tensor in tensors(output):
        if broken := int((~torch.isfinite(tensor)).sum()):
            raise NotFinite(
                f"A model's outputs must be finite, but for {where} {broken} of {tensor.numel()} values are not. "
                "Overflow in 16 bits is usual: leave layers with large values in float, or use another number format."
            )


def _check_scores(batch: torch.Tensor, count: int, where: str) -> None:
    if batch.shape != (count,) or not torch.isfinite(batch).all():
        values = f" with values from {batch.min().item()} to {batch.max().item()}" if batch.numel() else ""
        raise InvalidTask(
            f"`score` must return one finite number per example; for {where} it returned shape {tuple(batch.shape)}"
            f"{values}. Check the score function: the model's outputs are finite there."
        )


def _labels(output: torch.Tensor, target: Any, names: int) -> list[int | None]:
    count = output.shape[0]
    integers = isinstance(target, torch.Tensor) and not (target.is_floating_point() or target.is_complex())
    if output.dim() > 2 or not integers or target.numel() != count:
        return [None] * count
    return [int(value) if 0 <= value < names else None for value in target.flatten().tolist()]


def accuracy(task: Task, scored: Scored, baseline: Scored | None) -> Accuracy:
    """Return the record of a model's scores, paired with those of the baseline on the same target.

    Agreement and divergence are None unless outputs are classes; see `scores`. A regression is an example whose score
    fell beyond rounding, an improvement one whose score rose. Regressions are sorted by the size of the fall. Without
    `baseline`, the model is the baseline. Raises InvalidInput if examples or sizes of outputs differ.
    """
    reference = baseline or scored
    if scored.outputs.shape != reference.outputs.shape:
        shapes = f"{tuple(scored.outputs.shape)} and {tuple(reference.outputs.shape)}"
        raise InvalidInput(f"`scored` and `baseline` must hold outputs of one shape, got {shapes}. Score one task.")
    changes = evidence.changes(reference.scores, scored.scores, higher_is_better=task.score.higher_is_better)
    falls = sorted((change, index) for index, change in enumerate(changes) if change < 0)
    same = sum(before == after for before, after in zip(reference.predictions, scored.predictions, strict=True))
    classes = bool(scored.predictions)
    others = [(name, metric, one.further[name] if (one := baseline) else None) for name, metric in task.metrics.items()]
    return Accuracy(
        **figures(task.metric, task.score, scored.sample, baseline.sample if baseline else None),
        agreement=same / len(scored.predictions) if classes else None,
        cosine=cosine(reference.outputs, scored.outputs),
        divergence=divergence(reference.outputs, scored.outputs) if classes else None,
        classes=_class_scores(task, scored, baseline) if scored.scores else (),
        worst_regressions=tuple(_regression(task, scored, reference, index) for _, index in falls[:MOST_REGRESSIONS]),
        regressions=len(falls),
        improvements=sum(change > 0 for change in changes),
        further=tuple(Scores(**figures(name, metric, scored.further[name], own)) for name, metric, own in others),
    )


def figures(name: str, metric: Metric, sample: Sample, baseline: Sample | None) -> dict[str, Any]:
    """Return the fields of `Scores`, paired with the baseline's raw data if there are any."""
    bounds, of_set = metric.range, isinstance(sample, Resampled)
    return {
        "metric": name,
        "scores": () if of_set else sample,
        "resampled": sample if of_set else None,
        "mean": estimate.mean(sample, bounds=bounds),
        "difference": estimate.paired_difference(baseline, sample, bounds=bounds) if baseline else None,
        "higher_is_better": metric.higher_is_better,
        "bounds": bounds,
        "percent": metric.percent,
    }


def _class_scores(task: Task, scored: Scored, baseline: Scored | None) -> tuple[ClassScore, ...]:
    rows = []
    for label in sorted({label for label in scored.labels if label is not None}):
        indexes = [index for index, other in enumerate(scored.labels) if other == label]
        values = [scored.scores[i] for i in indexes]
        paired = estimate.paired_difference([baseline.scores[i] for i in indexes], values) if baseline else None
        rows.append(ClassScore(task.class_names[label], len(indexes), estimate.mean(values), paired))
    return tuple(rows)


def _regression(task: Task, scored: Scored, reference: Scored, index: int) -> Regression:
    label = scored.labels[index]
    inputs, _ = scored.dataset[index]
    first = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    return Regression(
        index=index,
        label="" if label is None else task.class_names[label],
        before=task.class_names[reference.predictions[index]] if reference.predictions else "",
        after=task.class_names[scored.predictions[index]] if scored.predictions else "",
        score_before=reference.scores[index],
        score_after=scored.scores[index],
        png=png(first, between=scored.span) if is_image(first) else "",
    )


def cosine(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean over rows of the cosine of two tensors of shape (examples, values), in [-1, 1].

    Two rows of zeros count as 1, a row of zeros and another row as 0. If each example has a single value, the cosine
    is that of the values of all examples, because a single value has no direction but its sign.
    """
    if reference.shape[1] == 1:
        reference, other = reference.T, other.T
    total = 0.0
    for before, after in zip(torch.split(reference, _ROWS), torch.split(other, _ROWS), strict=True):
        a, b = _unit(before), _unit(after)
        both_zero = ~a.any(1) & ~b.any(1)
        total += torch.where(both_zero, 1.0, (a * b).sum(1)).sum().item()
    return max(-1.0, min(1.0, total / len(reference)))


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean over rows of the Kullback-Leibler divergence of `other` from `reference`, in nats, at least 0.

    Rows are logits or log-probabilities, which the softmax leaves unchanged. If every row of `reference` is a
    distribution (non-negative, with a sum of 1 to within 0.001), both are taken for probabilities instead, clamped to
    at least 2^-24 and normalized. Both have the shape (examples, classes).
    """
    told = are_probabilities(reference)
    total = 0.0
    for before, after in zip(torch.split(reference, _ROWS), torch.split(other, _ROWS), strict=True):
        p, q = (log_probabilities(x, told) for x in (before, after))
        total += (p.exp() * (p - q)).sum().item()
    return max(0.0, total / len(reference))


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Return each row in double precision with length 1; a row of zeros is unchanged."""
    x = x.double()
    # Squares of the largest and the smallest numbers would overflow or underflow.
    peak = x.abs().amax(1, keepdim=True)
    return nn.functional.normalize(x / torch.where(peak > 0, peak, 1), dim=1)


def are_probabilities(outputs: torch.Tensor) -> bool:
    """Return whether every row of (examples, classes) is a distribution: non-negative, with a sum of nearly 1."""
    return bool((outputs >= 0).all() and ((outputs.double().sum(1) - 1).abs() < _SUM_TOLERANCE).all())


def log_probabilities(x: torch.Tensor, told: bool) -> torch.Tensor:
    """Return the log-probabilities of logits, or of probabilities if `told` so, in double precision."""
    if told:
        x = x.double().clamp(min=_LEAST_PROBABILITY).log()
    # The difference of two large logits may exceed the range of double precision.
    return x.double().log_softmax(1).clamp(min=torch.finfo(torch.float32).min)


def is_image(x: torch.Tensor) -> bool:
    """Return whether an input without batch dimension can be drawn: 1 or 3 channels first, >= 8x8, float or uint8."""
    channels, *sides = x.shape if x.dim() == 3 else (0,)
    return channels in (1, 3) and min(sides) >= _SMALLEST_IMAGE and (x.is_floating_point() or x.dtype == torch.uint8)


def span(images: torch.Tensor) -> torch.Tensor:
    """Return the smallest and the largest value of each channel of `images`, (n, channels, H, W), as (2, channels)."""
    return torch.stack([images.amin((0, 2, 3)), images.amax((0, 2, 3))])


def join(spans: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the span of the images of several batches from the span of each."""
    together = torch.stack(list(spans))
    return torch.stack([together[:, 0].amin(0), together[:, 1].amax(0)])


def png(image: torch.Tensor, *, between: torch.Tensor | None = None) -> str:
    """Return what `is_image` accepts as a PNG in base64 with at most `SIDE` pixels a side and `COLOURS` colours.

    uint8 is drawn unchanged. Floats are scaled, because their normalization is not known: `between` has the values that
    are drawn as the darkest and the brightest of each channel, (2, channels); None takes those of the image. With the
    `span` of a whole split, images keep their relative brightness, and a normalization by channel is undone if the
    split reaches from black to white in each channel.
    """
    from PIL import Image

    x = image.detach().cpu().double()
    if image.dtype != torch.uint8:
        low, high = (x.min(), x.max()) if between is None else between.cpu().double()[:, :, None, None]
        # Without contrast this is 0 / 0, which becomes black below.
        x = 255 * (x - low) / (high - low)
    if (longest := max(x.shape[1:])) > SIDE:
        sides = [max(1, round(side * SIDE / longest)) for side in x.shape[1:]]
        x = nn.functional.interpolate(x[None], size=sides, mode="area")[0]
    pixels = x.nan_to_num().round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if picture.mode == "RGB":
        picture = picture.quantize(COLOURS, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def accuracy_of_files(folder: Path, task: Task, dataset: Any) -> dict[str, Accuracy]:
    """Return the scores of each file of the variant in `folder`, by runtime, paired with those of the task's model."""
    expected = scores(copies.shallow_copy(task.model, device="cpu"), task, dataset)
    accuracies, like = {}, variants.output_of(task)
    for file in variants.read(folder).files:
        loaded = files.load(folder / file.path, runtime=file.runtime, like=like)
        accuracies[file.runtime] = accuracy(task, scores(loaded, task, dataset), expected)
    return accuracies
