"""What a model is and how well it answers: parameters, MACs, scores, fidelity. For time see `benchmark`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from shrinkkit import evidence, intervals, outputs, pictures, quiet
from shrinkkit.errors import InvalidInput, InvalidTask
from shrinkkit.quantize import plain_attention
from shrinkkit.records import Accuracy, ClassScore, Lost
from shrinkkit.tasks import SPLITS, Example, Task, batches

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


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of `model`, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, example: Example) -> int:
    """Return the multiply-accumulates that `model` spends on one example of the batch `example`.

    Convolutions, matrix products, attention and recurrent layers are counted, element-wise work is not.
    `model` is left unchanged.
    """
    return sum(layer_macs(model, example).values())


def layer_macs(model: nn.Module, example: Example) -> dict[str, int]:
    """Return the multiply-accumulates of one example by layer; '' holds what no layer of its own computes."""
    counter = FlopCounterMode(display=False)
    # Fused recurrent and attention kernels are opaque to the counter; their plain forms are not.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    plain = torch.backends.mkldnn.flags(enabled=not recurrent)
    with quiet.libraries(), torch.no_grad(), plain, plain_attention(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*example)
    root, counts, batch = type(model).__name__, counter.get_flop_counts(), example[0].shape[0]
    totals = {
        "" if name == "Global" else name.removeprefix(f"{root}."): sum(by_operator.values()) // (2 * batch)
        for name, by_operator in counts.items()
        if name != root
    }
    children = {
        name: sum(n for other, n in totals.items() if other and other != name and _is_child(other, name))
        for name in totals
    }
    return {name: n - children[name] for name, n in totals.items() if n > children[name]}


def _is_child(name: str, parent: str) -> bool:
    """Return whether module `name` lies directly below `parent`, the model itself being ''."""
    return name.rpartition(".")[0] == parent


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
        first = outputs.tensors(output)[0]
        classes = classes and _are_classes(first, target, len(task.class_names))
        wanted.extend(_right(first, target, len(task.class_names)))
        firsts.append(first.unsqueeze(1).flatten(1).to(torch.promote_types(first.dtype, torch.float32)))
        if pictures.is_image(inputs[0][0]):
            spans.append(pictures.span(inputs[0]))
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
        span=pictures.join(spans) if spans else None,
    )


def _name(task: Task, dataset: "Dataset[Any]") -> str:
    return next((f"`{split}`" for split in SPLITS if getattr(task, split) is dataset), "the dataset")


def _first_examples(output: Any, count: int, size: int) -> Any:
    """Return the outputs of the first `count` examples of a batch of `size`."""
    return outputs.convert(output, lambda t: t[:count] if t.shape[:1] == (size,) else t)


def _check_outputs(output: Any, where: str) -> None:
    for tensor in outputs.tensors(output):
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
    difference = intervals.paired_difference(reference.scores, found.scores)
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
        mean=intervals.mean(found.scores),
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
        paired = intervals.paired_difference(before, values) if before else None
        made.append(ClassScore(task.class_names[number], len(indexes), intervals.mean(values), paired))
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
        png=pictures.png(first, between=found.span) if pictures.is_image(first) else "",
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
