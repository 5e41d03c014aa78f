"""The samples of a paired timing: ratios with intervals, and a verdict only where the interval supports one."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate

Samples = list[tuple[float, ...]]
"""Call times in ms, one tuple per slot, in the order in which they ran."""
Statistic = Callable[[Sequence[float]], float]
"""Reduces the calls of a slot to one time: `min` for the speed of the code, `statistics.median` for a typical call."""


@dataclass
class PairedSamples:
    """Call times in ms of reference, candidate and A/A control, two slots a block for each, in order of time."""

    reference: Samples = field(default_factory=list)
    candidate: Samples = field(default_factory=list)
    control: Samples = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of whole blocks."""
        return min(len(self.reference), len(self.candidate), len(self.control)) // 2

    def cut(self) -> None:
        """Drop the slots of an interrupted block."""
        whole = 2 * len(self)
        for arm in (self.reference, self.candidate, self.control):
            del arm[whole:]

    def rounded(self) -> "PairedSamples":
        """Return the samples with six significant digits, which is more than a clock gives."""

        def arm(samples: Samples) -> Samples:
            return [tuple(float(f"{ms:.6g}") for ms in slot) for slot in samples]

        return PairedSamples(arm(self.reference), arm(self.candidate), arm(self.control))


@dataclass(frozen=True)
class Conclusion:
    """Ratios of reference time to candidate time, latencies, and the verdict."""

    speedup: Estimate
    median_speedup: Estimate
    control_ratio: Estimate
    reference_ms: Estimate
    candidate_ms: Estimate
    verdict: str


def conclude(samples: PairedSamples, *, withheld: bool = False, stopped: bool = False, seed: int = 0) -> Conclusion:
    """Return the ratios and the verdict that the samples support.

    Args:
        samples: At least 2 blocks.
        withheld: Whether contention forbids a verdict.
        stopped: Whether a person stopped the timing. Stopping when the result looks favourable biases it (optional
            stopping), so an interrupted comparison gets no verdict.
        seed: Of the bootstrap.
    """
    speedup = estimate.block_ratio(log_ratios(samples, min), seed=seed)
    median_speedup = estimate.block_ratio(log_ratios(samples, statistics.median), seed=seed)
    control = estimate.block_ratio(_blocks(_slots(samples.reference, min), _slots(samples.control, min)), seed=seed)
    reference_ms = estimate.block_ratio(reference_logs(samples), seed=seed)
    candidate_ms = estimate.product(reference_ms, estimate.inverse(speedup))
    verdict = "undecided" if stopped else estimate.verdict(speedup)
    if withheld or estimate.verdict(control) in ("faster", "slower"):
        verdict = "too noisy"
    return Conclusion(speedup, median_speedup, control, reference_ms, candidate_ms, verdict)


def log_ratios(samples: PairedSamples, statistic: Statistic) -> list[float]:
    """Return log(reference / candidate) of each block; the reference is the mean of both of its copies."""
    return _blocks(_reference(samples, statistic), _slots(samples.candidate, statistic))


def reference_logs(samples: PairedSamples) -> list[float]:
    """Return the logarithm of the reference's latency in ms in each block, from the fastest call of each slot."""
    return _blocks(_reference(samples, min))


def _reference(samples: PairedSamples, statistic: Statistic) -> list[float]:
    pairs = zip(_slots(samples.reference, statistic), _slots(samples.control, statistic), strict=True)
    return [(a + b) / 2 for a, b in pairs]


def _slots(samples: Samples, statistic: Statistic) -> list[float]:
    return [math.log(statistic(slot)) for slot in samples]


def _blocks(logs: Sequence[float], minus: Sequence[float] = ()) -> list[float]:
    """Return the mean of the two slots of each block, of the difference to `minus` if given."""
    slots = [a - b for a, b in zip(logs, minus, strict=True)] if minus else logs
    return [(slots[i] + slots[i + 1]) / 2 for i in range(0, len(slots), 2)]
