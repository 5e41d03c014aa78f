"""What a model is and how well it answers: parameters, MACs, scores. For time see `benchmark`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from shrinkkit import intervals, outputs, quiet
from shrinkkit.errors import InvalidTask
from shrinkkit.quantize import plain_attention
from shrinkkit.records import Accuracy
from shrinkkit.tasks import Example, Task, batches


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
) -> tuple[tuple[float, ...], torch.Tensor]:
    """Return the score of each example of `dataset` and the model's answers, in order.

    The model is called with batches of the size of the task's example, the last one filled up with repeats, so that
    models with a fixed batch can be judged by the same rule.

    Args:
        call: A model, or a loaded model file: takes a batch of inputs, returns outputs on the CPU.
        task: Whose score is applied.
        dataset: One of the task's splits.
        progress: Called with the batches done and their number.

    Returns:
        One float per example, and the first output, flattened, of shape (examples, values).

    Raises:
        InvalidTask: A score is not finite; the batch is named.
    """
    size = task.example[0].shape[0]
    found: list[float] = []
    answers: list[torch.Tensor] = []
    total = -(-len(dataset) // size)  # type: ignore[arg-type]
    for number, (inputs, target) in enumerate(batches(dataset, size)):
        count = inputs[0].shape[0]
        filled = tuple(x if count == size else x[torch.arange(size) % count] for x in inputs)
        with torch.inference_mode():
            output = _first_examples(call(*filled), count, size)
            batch = task.score(output, target)
        if batch.shape != (count,) or not torch.isfinite(batch).all():
            raise InvalidTask(
                f"`score` must return one finite number per example; for batch {number} it returned shape "
                f"{tuple(batch.shape)} with values from {batch.min().item()} to {batch.max().item()}. "
                "Check the score function, or the model's precision if its outputs overflow."
            )
        found.extend(batch.double().tolist())
        answers.append(outputs.tensors(output)[0].flatten(1).float())
        if progress:
            progress(number + 1, total)
    return tuple(found), torch.cat(answers)


def _first_examples(output: Any, count: int, size: int) -> Any:
    """Return the outputs of the first `count` examples of a batch of `size`."""
    return outputs.convert(output, lambda t: t[:count] if t.shape[:1] == (size,) else t)


def accuracy(
    task: Task,
    found: tuple[Sequence[float], torch.Tensor],
    baseline: tuple[Sequence[float], torch.Tensor] | None,
) -> Accuracy:
    """Return the record of a model's scores on the test split, paired with those of the baseline on the same target.

    Args:
        task: Whose metric it is.
        found: What `scores` returned for the model.
        baseline: What `scores` returned for the baseline; None if the model is the baseline.
    """
    values, answers = found
    before, reference = baseline or found
    if task.class_names:
        agreement = (answers.argmax(1) == reference.argmax(1)).double().mean().item()
    else:
        agreement = nn.functional.cosine_similarity(answers, reference, dim=1).mean().item()
    return Accuracy(
        metric=task.metric,
        scores=tuple(values),
        mean=intervals.mean(values),
        difference=intervals.paired_difference(before, values) if baseline else None,
        agreement=agreement,
    )
