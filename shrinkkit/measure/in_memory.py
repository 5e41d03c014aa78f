"""Models in memory: their scores, and the paired comparison of two. For model files see `session`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shrinkkit.core.measurement import Accuracy, Comparison
from shrinkkit.core.target import Target
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Several, Shown
from shrinkkit.errors import InvalidInput, UnfairComparison, brief, nearest, options
from shrinkkit.measure import benchmark, scoring
from shrinkkit.measure.benchmark import TimedModel
from shrinkkit.measure.timing import Protocol
from shrinkkit.runtimes import registry
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import SPLITS, Task


@dataclass(frozen=True, repr=False)
class ModelComparison(Rich):
    """Two models in memory, compared in speed and, with a task, in accuracy."""

    latency: Comparison
    accuracy: Accuracy | None
    """Scores of the candidate, paired with those of the reference; None without a task."""

    def shown(self) -> Shown:
        """Return the comparison of latencies and, with a task, that of scores."""
        return Several(tuple(part.shown() for part in (self.latency, self.accuracy) if part))


def compare(
    reference: nn.Module,
    candidate: nn.Module,
    data: Task | Example,
    *,
    names: tuple[str, str] = ("reference", "candidate"),
    split: str = "validation",
    threads: int = 0,
    width: float = 0.005,
    cap_s: float = 4.0,
    seed: int = 0,
) -> ModelComparison:
    """Compare the latency of two models in memory, and their scores if a task is given; both are left unchanged.

    Reference, candidate and a copy of the reference (the A/A control) take turns in random order. What is deployed is
    a file, and `run` measures files: use this while developing.

    Args:
        reference: Module in eval mode.
        candidate: Module in eval mode, on the same device; its dtype and shapes may differ.
        data: A task, whose `example` is timed and whose split is scored, or the positional inputs of one call, batch
            first, on the modules' device.
        names: Of reference and candidate, for tables and errors.
        split: Of the task: `train`, `calibration`, `validation` or `test`.
        threads: Intra-op threads, 0 for every core that this process may use; restored afterwards.
        width: Half-width of the 95 % interval of the speed-up, as a fraction, at which timing stops, above 0.
        cap_s: Seconds after which timing stops in any case, once there are 20 blocks; 3 times that for slow models.
        seed: Of the order of calls and of the bootstrap.

    Returns:
        Latency with its verdict, intervals and raw samples in ms, and the accuracy, which is None without a task.

    Raises:
        InvalidInput: A module is in training mode, rejects the inputs, gives outputs that are not finite or not
            reproducible, or writes to its inputs; or an argument is out of its range.
        InvalidTask: An output or a score is not finite.
        UnfairComparison: Modules and inputs are not on one device.
    """
    task = data if isinstance(data, Task) else None
    example = data.example if isinstance(data, Task) else data
    threads_before = torch.get_num_threads()
    threads = registry.use_threads(threads)
    try:
        for name, model in zip(names, (reference, candidate), strict=True):
            _check_module(model, example, name)
        target = Target(example[0].device.type, "torch")
        conditions = benchmark.conditions(target, example, threads=threads, form="eager")
        pair = [
            TimedModel(name, benchmark.copies(model, example), conditions)
            for name, model in zip(names, (reference, candidate), strict=True)
        ]
        latency = benchmark.compare(*pair, protocol=Protocol(width=width, cap_s=cap_s, seed=seed))
    finally:
        torch.set_num_threads(threads_before)
    return ModelComparison(latency, score(candidate, task, split=split, baseline=reference) if task else None)


def _check_module(model: nn.Module, example: Example, name: str) -> None:
    """Check that `model` can be timed on `example`; raises InvalidInput or UnfairComparison otherwise."""
    if training := [part or name for part, module in model.named_modules() if module.training]:
        raise InvalidInput(f"{name} must be in eval mode, but `{training[0]}` is in training mode. Call `.eval()`.")
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers(), *example)}
    if len(devices) > 1:
        raise UnfairComparison(
            f"{name} and `example` must be on one device, found {', '.join(sorted(devices))}. "
            "Move both with `.to(...)`."
        )
    before = benchmark.inputs_sha256(example)
    try:
        with torch.inference_mode(), quantize.using_engine(quantize.engine_of(model)):
            model(*example)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        shapes = [tuple(x.shape) for x in example]
        raise InvalidInput(
            f"{name} must accept `example`, of shapes {shapes}, but stops with: {brief(error)}. "
            "Pass the inputs of one call, batch first."
        ) from error
    if benchmark.inputs_sha256(example) != before:
        raise InvalidInput(
            f"{name} must leave its inputs unchanged, but wrote to `example`. Use no in-place step on an input."
        )


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
    paired = scoring.scores(_with_cpu_tensors(baseline), task, dataset) if baseline else None
    return scoring.accuracy(task, scoring.scores(_with_cpu_tensors(model), task, dataset), paired)


def _with_cpu_tensors(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls `model`, on its device, with CPU tensors and returns CPU tensors."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def call(*inputs: torch.Tensor) -> Any:
        with quantize.using_engine(quantize.engine_of(model)):
            return outputs.convert(model(*(x.to(device) for x in inputs)), lambda t: t.cpu())

    return call
