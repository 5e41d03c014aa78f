"""Metrics as people have them: functions of a batch or of a whole set, and objects with `update` and `compute`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from shrinkkit.core.estimate import Bounds, Resampled, Sample
from shrinkkit.errors import InvalidTask, brief
from shrinkkit.tasks import outputs as plain

FEWEST, MOST, SECONDS = 200, 1000, 20.0
"""Resamples of a metric of a whole set, and the seconds after which fewer are enough."""
_ATTEMPTS = 20


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric of a whole set, such as F1, mAP, BLEU or perplexity, or with `per_example` the mean of its scores.

    `function` takes the outputs and the targets of the set, batches concatenated, and returns a number; `per_example`,
    those of a batch, and returns scores of shape (batch,). An object with `update`, `compute` and `reset`, such as a
    `torchmetrics.Metric`, is taken as it is.
    """

    function: Any
    name: str = ""
    """In tables and figures; by default that of the function or class."""
    higher_is_better: bool | None = None
    """By default the attribute of the object, and True for functions."""
    range: Bounds = None
    """Smallest and largest possible value; None if unbounded."""
    per_example: bool = False
    percent: bool | None = None
    """Whether it is shown in per cent; by default if it is the mean of scores in [0, 1]."""

    def __post_init__(self) -> None:
        """Fill in what the object says of itself."""
        function, is_better = self.function, self.higher_is_better
        is_object = _is_object(function)
        is_better = getattr(function, "higher_is_better", None) if is_object and is_better is None else is_better
        if is_object and is_better is None:
            kind = type(function).__name__
            raise InvalidTask(f"`higher_is_better` of {kind} must be known. Pass it to `Metric({kind}(...))`.")
        named = getattr(function, "__name__", "metric").strip("<>").replace("lambda", "metric")
        percent = self.per_example if self.percent is None else self.percent
        fields: dict[str, Any] = {"percent": percent, "higher_is_better": is_better is not False}
        fields |= {"function": _called(function) if is_object else function}
        fields |= {"name": self.name or (type(function).__name__ if is_object else named)}
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """Return what `function` does, unchecked."""
        return self.function(outputs, targets)

    def of_set(self, outputs: Any, targets: Any) -> float:
        """Return the metric of a whole set, per example the mean score; raises InvalidTask if it is not finite."""
        with torch.inference_mode():
            result = self.function(outputs, targets)
        value = float(result.double().mean() if self.per_example else result)
        if not np.isfinite(value):
            raise InvalidTask(f"`{self.name}` must be finite, got {value}. Give a finite value where it is undefined.")
        return value

    def sample(self, outputs: Any, targets: Any, size: int) -> Sample:
        """Return the scores of `size` examples, or of a whole set its value and its replicates.

        Replicate `i` draws the same examples for every model.
        """
        value, replicates, start = self.of_set(outputs, targets), list[float](), time.perf_counter()
        if self.per_example:
            return tuple(self.function(outputs, targets).double().tolist())
        while len(replicates) < FEWEST or (len(replicates) < MOST and time.perf_counter() - start < SECONDS):
            replicates.append(self._replicate(outputs, targets, size, len(replicates)))
        return Resampled(value, tuple(replicates), size)

    def _replicate(self, outputs: Any, targets: Any, size: int, number: int) -> float:
        """Return the metric on a resample; one on which it is undefined, such as of one class, is drawn again."""
        for attempt in range(_ATTEMPTS):
            index = np.random.default_rng((number, attempt)).integers(0, size, size).tolist()
            try:
                return self.of_set(plain.select(outputs, index), plain.select(targets, index))
            except Exception as error:  # a user's metric may raise anything
                cause = error
        raise InvalidTask(f"`{self.name}` must be defined on resamples of a set, but raised {brief(cause)}.") from cause


def metric_of(given: Any, name: str, *, per_example: bool) -> Any:
    """Return a metric as users give it as a Metric: an object such as those of torchmetrics, or a function `name`."""
    if isinstance(given, Metric) or not (callable(given) or _is_object(given)):
        return given
    return Metric(given) if _is_object(given) else Metric(given, name, per_example=per_example)


def restoring(metric: Metric, like: Any) -> Metric:
    """Return a metric of plain outputs; see `restored`."""
    return replace(metric, function=restored(metric.function, like))


def restored(function: Callable[[Any, Any], Any], like: Any) -> Callable[[Any, Any], Any]:
    """Return a function of plain outputs and targets that calls `function` with the model's own kind of output."""
    return lambda output, targets: function(plain.restore(plain.tensors(output), like), targets)


def _is_object(given: Any) -> bool:
    return all(callable(getattr(given, name, None)) for name in ("update", "compute", "reset"))


def _called(metric: Any) -> Callable[[Any, Any], Any]:
    def function(outputs: Any, targets: Any) -> Any:
        metric.reset()
        metric.update(outputs, targets)
        return metric.compute()

    return function


def whole(batches: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return the outputs and the targets of a set from those of its batches."""
    outputs, targets = zip(*batches, strict=True)
    return plain.concatenate(outputs), plain.concatenate(targets)
