"""Coverage and error rates of intervals where timing stops early for a clear difference, by simulation.

`python tests/benchmarks/stopping.py` prints the table of docs/measuring.md. Blocks are drawn, not timed; what decides
when to stop is the package's own rule, with a clock on which 80 blocks are the cap.
"""

import math
from statistics import fmean

import numpy as np

from shrinkkit.core import estimate
from shrinkkit.core.evidence import PairedSamples, log_ratios
from shrinkkit.measure.timing import CHECK_EVERY, FEWEST_BLOCKS, Protocol, _enough

COMPARISONS, MOST_BLOCKS = 600, 80


def compare(ratio: float, sd: float, protocol: Protocol, rng: np.random.Generator) -> tuple[estimate.Estimate, int]:
    """Return the estimate of a comparison and its blocks; `sd` is of a slot's log ratio."""
    candidate: list[list[float]] = []
    while True:
        noise = rng.normal(0, sd, (CHECK_EVERY, 2))
        # A slot of each arm holds a time; a block gives two ratios.
        candidate += [[math.exp(-x) / ratio] for x in noise.ravel()]
        still = [[1.0]] * len(candidate)
        samples = PairedSamples(still, candidate, control=still)
        blocks = len(samples)
        if blocks >= FEWEST_BLOCKS and _enough(samples, protocol, protocol.cap_s * blocks / MOST_BLOCKS * 1.001):
            return estimate.block_ratio(log_ratios(samples, min)), blocks


def main() -> None:
    """Print a row for each ratio and spread: to the cap, then with the early stop."""
    rng = np.random.default_rng(0)
    print("ratio  sd  coverage  faster  bias  blocks")
    for ratio in (1.0, 1.1, 1.15, 2.0):
        for sd in (0.05, 0.15):
            rows = []
            for protocol in (Protocol(), Protocol(clear_s=1.0)):
                found = [compare(ratio, sd, protocol, rng) for _ in range(COMPARISONS)]
                rows.append(
                    (
                        100 * fmean(e.low <= ratio <= e.high for e, _ in found),
                        100 * fmean(estimate.verdict(e) == "faster" for e, _ in found),
                        100 * fmean(math.log(e.value / ratio) for e, _ in found),
                        fmean(blocks for _, blocks in found),
                    )
                )
            print(f"{ratio:<5} {sd:.2f}", *(f"{a:.1f} -> {b:.1f}" for a, b in zip(*rows, strict=True)), flush=True)


if __name__ == "__main__":
    main()
