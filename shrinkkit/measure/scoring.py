"""What a model is and how well it answers: parameters, MACs, scores, fidelity. For time see `benchmark`."""

import base64
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from shrinkkit.core import estimate, evidence
from shrinkkit.core.measurement import Accuracy, ClassScore, Lost
from shrinkkit.errors import InvalidInput, InvalidTask
from shrinkkit.runtimes import loading
from shrinkkit.tasks import copies
from shrinkkit.tasks.outputs import convert, tensors
from shrinkkit.tasks.task import SPLITS, Task, batches
from shrinkkit.transforms import variants

LOST = 12
"""Lost examples that a record keeps at most."""

_ROWS = 4096
_SURE = 1e-3
_LEAST = 2.0**-24


@dataclass(frozen=True, eq=False)
class Scored:
    """How a model answered every example of a split, in the split's order."""

    scores: tuple[float, ...]
    outputs: torch.Tensor
    """The first output of each example, flattened: (examples, values), on the CPU."""
    answers: tuple[int, ...]
    """The class of the largest output, by its place in the task's `class_names`; empty where outputs are no classes."""
    wanted: tuple[int | None, ...]
    """The right class, likewise; None for an example whose target is no class."""
    dataset: "Dataset[Any]"
    span: torch.Tensor | None
    """Smallest and largest value of each channel of the first input, (2, channels); None where it is no image."""


def scores(
    call: Callable[..., Any],
    task: Task,
    dataset: "Dataset[Any]",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Return the score of each example of `dataset` and the model's answers, in order.

    The model is called with batches of the size of the task's example, the last one filled up with repeats, so that
    models with a fixed batch can be judged by the same rule.

    Outputs are classes where the task has at least two `class_names`, the first output has one floating value for each
    of them, (examples, classes), and targets are not of that shape too, as they are where an example has several
    labels. An example has a right class where the first output has no more dimensions than that and its target is one
    integer in [0, number of names).

    Args:
        call: A model, or a loaded model file: takes a batch of inputs, returns outputs on the CPU.
        task: Whose score is applied.
        dataset: One of the task's splits.
        progress: Called with the batches done and their number.

    Raises:
        InvalidTask: The split is empty, or an output or a score is not finite; the batch is named.
    """
    size, split = task.example[0].shape[0], _name(task, dataset)
    found: list[float] = []
    firsts: list[torch.Tensor] = []
    wanted: list[int | None] = []
    spans: list[torch.Tensor] = []
    classes = True
    total = -(-len(dataset) // size)  # type: ignore[arg-type]
    for number, (inputs, target) in enumerate(batches(dataset, size)):
        count, where = inputs[0].shape[0], f"batch {number} of {split}"
        filled = tuple(x if count == size else x[torch.arange(size) % count] for x in inputs)
        with torch.inference_mode():
            output = _first_examples(call(*filled), count, size)
            _check_outputs(output, where)
            batch = task.score(output, target)
        _check_scores(batch, count, where)
        found.extend(batch.double().tolist())
        first = tensors(output)[0]
        classes = classes and _are_classes(first, target, len(task.class_names))
        wanted.extend(_right(first, target, len(task.class_names)))
        firsts.append(first.unsqueeze(1).flatten(1).to(torch.promote_types(first.dtype, torch.float32)))
        if is_image(inputs[0][0]):
            spans.append(span(inputs[0]))
        if progress:
            progress(number + 1, total)
    if not found:
        raise InvalidTask(f"{split} must hold at least one example to score a model on, but it is empty. Add examples.")
    answers = torch.cat(firsts)
    return Scored(
        scores=tuple(found),
        outputs=answers,
        answers=tuple(answers.argmax(1).tolist()) if classes else (),
        wanted=tuple(wanted),
        dataset=dataset,
        span=join(spans) if spans else None,
    )


def _name(task: Task, dataset: "Dataset[Any]") -> str:
    return next((f"`{split}`" for split in SPLITS if getattr(task, split) is dataset), "the dataset")


def _first_examples(output: Any, count: int, size: int) -> Any:
    """Return the outputs of the first `count` examples of a batch of `size`."""
    return convert(output, lambda t: t[:count] if t.shape[:1] == (size,) else t)


def _check_outputs(output: Any, where: str) -> None:
    for tensor in tensors(output):
        if broken := int((~torch.isfinite(tensor)).sum()):
            raise InvalidTask(
                f"A model's outputs must be finite, but for {where} {broken} of {tensor.numel()} values are not. "
                "Overflow in 16 bits is the usual cause: leave the layers with the largest values in float, or use "
                "another number format."
            )


def _check_scores(batch: torch.Tensor, count: int, where: str) -> None:
    if batch.shape != (count,) or not torch.isfinite(batch).all():
        values = f" with values from {batch.min().item()} to {batch.max().item()}" if batch.numel() else ""
        raise InvalidTask(
            f"`score` must return one finite number per example; for {where} it returned shape {tuple(batch.shape)}"
            f"{values}. Check the score function: the model's outputs are finite there."
        )


def _are_classes(output: torch.Tensor, target: Any, names: int) -> bool:
    several = isinstance(target, torch.Tensor) and target.shape == output.shape
    return names > 1 and output.shape[1:] == (names,) and output.is_floating_point() and not several


def _right(output: torch.Tensor, target: Any, names: int) -> list[int | None]:
    """Return the right class of each example of a batch, None where there is none."""
    count = output.shape[0]
    if output.dim() > 2 or not isinstance(target, torch.Tensor) or target.numel() != count:
        return [None] * count
    if target.is_floating_point() or target.is_complex():
        return [None] * count
    return [int(value) if 0 <= value < names else None for value in target.flatten().tolist()]


def accuracy(task: Task, found: Scored, baseline: Scored | None) -> Accuracy:
    """Return the record of a model's scores and answers, paired with those of the baseline on the same target.

    Agreement and divergence are None where outputs are no classes, and there are no classes where targets are none; see
    `scores` for the rule. An example is lost if its score fell, and gained if it rose, beyond rounding. The
    lost ones are kept with the largest fall first, and in the split's order where falls are equal.

    Args:
        task: Whose metric it is.
        found: What `scores` returned for the model.
        baseline: What `scores` returned for the baseline; None if the model is the baseline, which agrees with itself.

    Raises:
        InvalidInput: The two were scored on different examples, or give outputs of different sizes.
    """
    reference = baseline or found
    difference = estimate.paired_difference(reference.scores, found.scores)
    if found.outputs.shape != reference.outputs.shape:
        raise InvalidInput(
            "`found` and `baseline` must hold outputs of one shape, got "
            f"{tuple(found.outputs.shape)} and {tuple(reference.outputs.shape)}. Score the same task's models."
        )
    changes = evidence.changes(reference.scores, found.scores)
    lost = sorted((change, index) for index, change in enumerate(changes) if change < 0)
    same = sum(before == after for before, after in zip(reference.answers, found.answers, strict=True))
    return Accuracy(
        metric=task.metric,
        scores=found.scores,
        mean=estimate.mean(found.scores),
        difference=difference if baseline else None,
        agreement=same / len(found.answers) if found.answers else None,
        cosine=cosine(reference.outputs, found.outputs),
        divergence=divergence(reference.outputs, found.outputs) if found.answers else None,
        classes=_classes(task, found, baseline),
        lost=tuple(_lost(task, found, reference, index) for _, index in lost[:LOST]),
        lost_count=len(lost),
        gained_count=sum(change > 0 for change in changes),
    )


def _classes(task: Task, found: Scored, baseline: Scored | None) -> tuple[ClassScore, ...]:
    of: dict[int, list[int]] = {}
    for index, wanted in enumerate(found.wanted):
        if wanted is not None:
            of.setdefault(wanted, []).append(index)
    made = []
    for number, indexes in sorted(of.items()):
        values = [found.scores[i] for i in indexes]
        before = [baseline.scores[i] for i in indexes] if baseline else None
        paired = estimate.paired_difference(before, values) if before else None
        made.append(ClassScore(task.class_names[number], len(indexes), estimate.mean(values), paired))
    return tuple(made)


def _lost(task: Task, found: Scored, reference: Scored, index: int) -> Lost:
    wanted = found.wanted[index]
    inputs, _ = found.dataset[index]
    first = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    return Lost(
        index=index,
        wanted="" if wanted is None else task.class_names[wanted],
        before=task.class_names[reference.answers[index]] if reference.answers else "",
        after=task.class_names[found.answers[index]] if found.answers else "",
        score_before=reference.scores[index],
        score_after=found.scores[index],
        png=png(first, between=found.span) if is_image(first) else "",
    )


def cosine(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean over rows of the cosine between two tensors of shape (examples, values), in [-1, 1].

    Two rows of zeros agree, which counts as 1; a row of zeros beside another counts as 0. A single value has no
    direction but its sign, so where each example has only one, the cosine is that between the values of all examples.
    """
    if reference.shape[1] == 1:
        reference, other = reference.T, other.T
    total = 0.0
    for before, after in _parts(reference, other):
        a, b = _unit(before), _unit(after)
        both_zero = ~a.any(1) & ~b.any(1)
        total += torch.where(both_zero, 1.0, (a * b).sum(1)).sum().item()
    return max(-1.0, min(1.0, total / len(reference)))


def _parts(reference: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield some rows of both at a time: all of them in double precision would take too much memory."""
    return ((reference[i : i + _ROWS], other[i : i + _ROWS]) for i in range(0, len(reference), _ROWS))


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Return each row in double precision and of length 1, or as it is if it is all zeros."""
    x = x.double()
    # Squares of the largest and the smallest numbers would leave the range.
    peak = x.abs().amax(1, keepdim=True)
    return nn.functional.normalize(x / torch.where(peak > 0, peak, 1), dim=1)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean over rows of the Kullback-Leibler divergence of `other` from `reference`, in nats, at least 0.

    Rows are logits, or logarithms of probabilities, which the softmax leaves as they are. Only where every row of
    `reference` is a distribution already (nothing below 0, a sum of 1 to a thousandth) are both taken for
    probabilities. Then those below 2^-24, which single precision cannot tell from 0 beside 1, are raised to that, so
    that a number rounded to 0 gives no infinite divergence, and rows are divided by their sums.

    Args:
        reference: Outputs of the baseline, (examples, classes).
        other: Outputs of the variant for the same examples.
    """
    sums = reference.double().sum(1)
    already = bool((reference >= 0).all() and ((sums - 1).abs() < _SURE).all())
    total = 0.0
    for before, after in _parts(reference, other):
        p, q = (_log_probabilities(x, already=already) for x in (before, after))
        total += (p.exp() * (p - q)).sum().item()
    return max(0.0, total / len(reference))


def _log_probabilities(x: torch.Tensor, *, already: bool) -> torch.Tensor:
    if already:
        x = x.double().clamp(min=_LEAST).log()
    # The difference of two large logits of double precision may leave the range.
    return x.double().log_softmax(1).clamp(min=torch.finfo(torch.float32).min)


SIDE = 96
"""Pixels of the longer side at most; larger images are shrunk."""
COLOURS = 64
"""Colours of a picture at most: a photograph takes a quarter of the bytes that it would take with all of them."""

_SMALLEST = 8
_GREY, _INDEXED = 0, 3


def is_image(x: torch.Tensor) -> bool:
    """Return whether one input, without a batch dimension, can be shown: 1 or 3 channels first, then at least 8x8.

    Floats and uint8 count; other integers are tokens or labels.
    """
    channels, *sides = x.shape if x.dim() == 3 else (0,)
    return channels in (1, 3) and min(sides) >= _SMALLEST and (x.is_floating_point() or x.dtype == torch.uint8)


def span(images: torch.Tensor) -> torch.Tensor:
    """Return the smallest and the largest value of each channel of `images`, (n, channels, H, W), as (2, channels)."""
    return torch.stack([images.amin((0, 2, 3)), images.amax((0, 2, 3))])


def join(spans: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the span of the images of several batches from the `span` of each, at least one."""
    together = torch.stack(list(spans))
    return torch.stack([together[:, 0].amin(0), together[:, 1].amax(0)])


def png(image: torch.Tensor, *, between: torch.Tensor | None = None) -> str:
    """Return `image` as a PNG in base64, at most `SIDE` pixels a side and of at most `COLOURS` colours.

    uint8 is shown as it is. How floats were normalised is not known, so they are shown between two values that become
    the darkest and the brightest. With the `span` of a whole split, images keep their brightness beside each other, and
    a mean and deviation for each channel are undone wherever the split reaches from black to white in each; else
    brightness and hue are right only up to a scale and an offset for each channel.

    Args:
        image: What `is_image` accepts.
        between: Values shown as the darkest and the brightest, for each channel: (2, channels). None takes the smallest
            and the largest value of the image itself, over all channels.

    Source: W3C, "Portable Network Graphics (PNG) Specification"; Heckbert, "Color image quantization for frame buffer
    display", SIGGRAPH 1982.
    """
    x = image.detach().cpu().double()
    if image.dtype != torch.uint8:
        low, high = (x.min(), x.max()) if between is None else between.cpu().double()[:, :, None, None]
        # Where nothing differs this is 0 / 0, which becomes black below.
        x = 255 * (x - low) / (high - low)
    if (longest := max(x.shape[1:])) > SIDE:
        sides = [max(1, round(side * SIDE / longest)) for side in x.shape[1:]]
        x = functional.interpolate(x[None], size=sides, mode="area")[0]
    pixels = x.nan_to_num().round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return base64.b64encode(_grey(pixels[:, :, 0]) if pixels.shape[2] == 1 else _coloured(pixels)).decode()


def _grey(pixels: NDArray[np.uint8]) -> bytes:
    """Return a greyscale PNG; each row is stored as its difference to the one above, which takes fewer bytes."""
    differences = np.diff(pixels, axis=0, prepend=np.zeros_like(pixels[:1]))
    return _file(differences, kind=_GREY, filtered=2)


def _coloured(pixels: NDArray[np.uint8]) -> bytes:
    """Return a PNG with a palette of its own."""
    palette, index = _palette(pixels.reshape(-1, 3))
    return _file(index.reshape(pixels.shape[:2]), kind=_INDEXED, filtered=0, palette=palette)


def _palette(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return at most `COLOURS` colours, (n, 3), and the index of each pixel's, which is its own where they suffice."""
    colours, index = np.unique(pixels, axis=0, return_inverse=True)
    if len(colours) <= COLOURS:
        return colours, index.reshape(-1).astype(np.uint8)
    boxes = [np.arange(len(pixels))]
    while len(boxes) < COLOURS:
        widest = max(range(len(boxes)), key=lambda i: np.ptp(pixels[boxes[i]], axis=0).max() * len(boxes[i]) ** 0.5)
        box = boxes.pop(widest)
        channel = int(np.ptp(pixels[box], axis=0).argmax())
        box = box[np.argsort(pixels[box, channel], kind="stable")]
        boxes += [box[: len(box) // 2], box[len(box) // 2 :]]
    boxes.sort(key=lambda box: float(pixels[box].mean()))
    means = np.stack([pixels[box].mean(axis=0) for box in boxes])
    chosen = np.empty(len(pixels), dtype=np.uint8)
    for number, box in enumerate(boxes):
        chosen[box] = number
    return means.round().astype(np.uint8), chosen


def _file(rows: NDArray[np.uint8], *, kind: int, filtered: int, palette: NDArray[np.uint8] | None = None) -> bytes:
    """Return a PNG of 8 bits a pixel whose rows were all filtered alike."""
    height, width = rows.shape
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    data = np.insert(rows, 0, filtered, axis=1).tobytes()
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data, 9)), (b"IEND", b"")]
    if palette is not None:
        chunks.insert(1, (b"PLTE", palette.tobytes()))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def fidelity(folder: Path, task: Task, dataset: Any) -> dict[str, Accuracy]:
    """Return how each file of the variant in `folder` scores on `dataset`, paired with the task's own model.

    Args:
        folder: The variant's folder.
        task: Whose score is applied.
        dataset: One of the task's splits.
    """
    cpu = copies.shallow_copy(task.model, device="cpu")
    expected = scores(cpu, task, dataset)
    like = variants.output_of(task)
    return {
        file.runtime: accuracy(
            task,
            scores(loading.load(folder / file.path, runtime=file.runtime, like=like), task, dataset),
            expected,
        )
        for file in variants.read(folder).files
    }
