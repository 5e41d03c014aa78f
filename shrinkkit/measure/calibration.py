"""Calibration of classifiers: whether their confidence is how often they are right.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shrinkkit.core.estimate import Resampled, Sample
from shrinkkit.measure import scoring
from shrinkkit.measure.scoring import Scored
from shrinkkit.tasks.metrics import Metric

BINS, REPLICATES = 15, 300
"""Bins of the confidence, and resamples of the calibration error."""
FIGURES = {
    "ECE": Metric(len, "ECE", higher_is_better=False, range=(0.0, 1.0), percent=True),
    "NLL": Metric(len, "NLL", higher_is_better=False, range=None, percent=False),
    "Brier score": Metric(len, "Brier score", higher_is_better=False, range=(0.0, 2.0), percent=False),
}
"""What the figures are called, and their ranges; `samples` computes them."""
Array = NDArray[Any]


def samples(scored: Scored) -> dict[str, Sample]:
    """Return the raw data of each of `FIGURES`; resamples draw the same examples for every model."""
    log, labels = log_probabilities(scored), np.array(scored.labels)
    sure = confidence(log, labels)
    picks = np.random.default_rng(0).integers(0, len(labels), (REPLICATES, len(labels)))
    replicates = tuple(error(*(values[pick] for values in sure)) for pick in picks)
    distance = np.exp(log) - np.eye(log.shape[1])[labels]
    return {
        "ECE": Resampled(error(*sure), replicates, len(labels)),
        "NLL": tuple((-log[np.arange(len(labels)), labels]).tolist()),
        "Brier score": tuple((distance**2).sum(1).tolist()),
    }


def reliability(scored: Scored, divisor: float) -> tuple[tuple[tuple[float, float, int], ...], float, float]:
    """Return mean confidence, share of right answers and examples of each bin; `divisor`; and the error with it."""
    log, labels = log_probabilities(scored), np.array(scored.labels)
    sure, right = confidence(log, labels)
    parts = [(sure[inside], right[inside]) for i in range(BINS) if (inside := _bins(sure) == i).any()]
    bins = tuple((float(of.mean()), float(answers.mean()), len(of)) for of, answers in parts)
    return bins, divisor, error(*confidence(scaled(log, divisor), labels))


def temperature(scored: Scored) -> float:
    """Return the divisor of the logits, in [0.05, 20], at which labels are most likely; 1 without labels."""
    from scipy.optimize import minimize_scalar

    if None in scored.labels:
        return 1.0
    log, labels = log_probabilities(scored), np.array(scored.labels)
    rows = np.arange(len(labels))

    def loss(power: float) -> float:
        return float(-scaled(log, np.exp(power))[rows, labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded").x))


def error(sure: Array, right: Array) -> float:
    """Return the expected calibration error, in [0, 1], of `BINS` bins of equal width."""
    gaps = np.bincount(_bins(sure), weights=sure - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(sure))


def _bins(sure: Array) -> Array:
    index: Array = np.minimum((sure * BINS).astype(int), BINS - 1)
    return index


def confidence(log: Array, labels: Array) -> tuple[Array, Array]:
    """Return the probability of each answer, and whether it is right."""
    return np.exp(log.max(1)), (log.argmax(1) == labels).astype(float)


def scaled(log: Array, divisor: float) -> Array:
    """Return the log-probabilities of logits that are divided by a temperature."""
    result: Array = torch.from_numpy(log / divisor).log_softmax(1).numpy()
    return result


def log_probabilities(scored: Scored) -> Array:
    """Return the log-probabilities of the classes, (examples, classes)."""
    return scoring.log_probabilities(scored.outputs, scoring.are_probabilities(scored.outputs)).numpy()
