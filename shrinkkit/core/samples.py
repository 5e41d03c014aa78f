"""What the blocks of a paired timing say: ratios with intervals, and a verdict only where the interval allows one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate

Samples = list[tuple[float, ...]]
"""Call times in ms, one tuple a slot, in the order in which they ran."""


@dataclass
class PairedSamples:
    """Call times in ms, two slots a block for each arm, in the order of time."""

    reference: Samples = field(default_factory=list)
    candidate: Samples = field(default_factory=list)
    control: Samples = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of whole blocks."""
        return min(len(self.reference), len(self.candidate), len(self.control)) // 2

    def cut(self) -> None:
        """Drop the slots of a block that was interrupted."""
        whole = 2 * len(self)
        for arm in (self.reference, self.candidate, self.control):
            del arm[whole:]


@dataclass(frozen=True)
class Conclusion:
    """What the blocks say. Ratios are reference time over candidate time."""

    speedup: Estimate
    median_speedup: Estimate
    control_ratio: Estimate
    reference_ms: Estimate
    candidate_ms: Estimate
    verdict: str


def conclude(blocks: PairedSamples, *, withheld: bool = False, stopped: bool = False, seed: int = 0) -> Conclusion:
    """Return the ratios and the verdict that the blocks support.

    Args:
        blocks: At least 2.
        withheld: Whether contention was such that no verdict may be given.
        stopped: Whether a person ended it early. Whoever looks on and stops where it pleases finds what pleases them,
            so such an interval gets no verdict.
        seed: Of the bootstrap.
    """
    speedup = estimate.block_ratio(log_ratios(blocks, min), seed=seed)
    median_speedup = estimate.block_ratio(log_ratios(blocks, median), seed=seed)
    null = estimate.block_ratio(_paired(_slots(blocks.reference, min), _slots(blocks.control, min)), seed=seed)
    noisy = withheld or estimate.verdict(null) in ("faster", "slower")
    usual = "undecided" if stopped else estimate.verdict(speedup)
    reference_ms = estimate.block_ratio(reference_logs(blocks), seed=seed)
    candidate_ms = estimate.product(reference_ms, estimate.inverse(speedup))
    return Conclusion(speedup, median_speedup, null, reference_ms, candidate_ms, "too noisy" if noisy else usual)


def log_ratios(blocks: PairedSamples, of: Callable[[Sequence[float]], float]) -> list[float]:
    """Return log(reference / candidate) of each block; both copies of the reference count, against its noise.

    Args:
        blocks: At least 1.
        of: What stands for the calls of a slot: `min` for the speed of the code, `median` for what is median_speedup.
    """
    return _paired(_reference(blocks, of), _slots(blocks.candidate, of))


def reference_logs(blocks: PairedSamples) -> list[float]:
    """Return the logarithm of the reference's latency in ms in each block: of the fastest call of a turn, as speed-ups.

    Args:
        blocks: At least 1.
    """
    logs = _reference(blocks, min)
    return [(logs[i] + logs[i + 1]) / 2 for i in range(0, len(logs), 2)]


def _reference(blocks: PairedSamples, of: Callable[[Sequence[float]], float]) -> list[float]:
    """Return the logarithm of each turn of the reference, both of its copies together."""
    return [(a + b) / 2 for a, b in zip(_slots(blocks.reference, of), _slots(blocks.control, of), strict=True)]


def _slots(samples: Samples, of: Callable[[Sequence[float]], float]) -> list[float]:
    return [math.log(of(slot)) for slot in samples]


def _paired(reference: Sequence[float], candidate: Sequence[float]) -> list[float]:
    """Return the differences of two arms' logarithms, block by block, from two slots of each."""
    logs = [a - b for a, b in zip(reference, candidate, strict=True)]
    return [(logs[i] + logs[i + 1]) / 2 for i in range(0, len(logs), 2)]


def median(values: Sequence[float]) -> float:
    """Return the median of at least one number."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
