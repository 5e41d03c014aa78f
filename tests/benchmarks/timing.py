"""A benchmark of the benchmark: how often does each way of timing two models tell the truth?

Compares models with their own copies, and with copies that a known share of extra work makes slower, in three ways:
shrinkkit's paired timing, the mean of 100 calls and then of another 100, and torch's own `blocked_autorange` on one
model and then on the other, with as much time as the first. Run it on a machine that does nothing else:

    python tests/benchmarks/timing.py                 # quiet
    python tests/benchmarks/timing.py --loaded        # beside a process that keeps one core busy
"""

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ttest_ind
from torch.utils.benchmark import Timer

from shrinkkit import benchmark, contention, targets
from shrinkkit.benchmark import Blocks
from shrinkkit.records import Conditions

SLOW_DOWNS = (0.0, 0.03, 0.10)
STEPS = 100
"""Steps of work in a model; a planted slow-down adds a share of them."""
SIZE = 160
"""Of each step's matrices: large enough that a step uses every thread."""
OURS = "shrinkkit"
REGARDLESS = "the same, never withheld for contention"
MEANS = "mean of 100, then mean of 100"
AUTORANGE = "blocked_autorange, one after the other"
METHODS = (OURS, REGARDLESS, MEANS, AUTORANGE)
Call = Callable[[], Any]
Samples = NDArray[np.float64]
Said = tuple[float, str]
"""Ratio and verdict."""


@dataclass(frozen=True)
class Answer:
    """What one way of timing said of one pair: ratio is reference time over candidate time."""

    method: str
    slow_down: float
    ratio: float
    verdict: str
    duration_s: float


@dataclass(frozen=True)
class Row:
    """How one way of timing fared at one slow-down."""

    method: str
    slow_down: float
    comparisons: int
    low: float
    """5 % quantile of ratio over truth; 1 is right."""
    high: float
    """95 % quantile."""
    false_alarms: float | None
    """Share of identical models called different."""
    found: float | None
    """Share of slow-downs that were found."""
    wrong_direction: float
    """Share of verdicts that name the wrong model as faster; of identical ones, none can."""
    withheld: float
    """Share in which no verdict was given because the machine was too noisy."""
    mean_s: float


def model(slow_down: float) -> Call:
    """Return a new model whose work takes `slow_down` longer, as a share, than that of `model(0.0)`."""
    # Rotations, so that numbers neither grow nor become denormal, and added steps cost what the others do.
    weight = torch.linalg.qr(torch.randn(SIZE, SIZE))[0]
    start = torch.randn(SIZE, SIZE)
    steps = round(STEPS * (1 + slow_down))

    @torch.inference_mode()
    def call() -> torch.Tensor:
        x = start
        for _ in range(steps):
            x = x @ weight
        return x

    return call


def ours(slow_down: float, *, budget_s: float, threads: int, seed: int) -> tuple[Said, Said]:
    """Return what shrinkkit's paired timing says, and what it would if contention never withheld its verdict."""
    here = Conditions("cpu", targets.hardware(targets.resolve("cpu/torch")), "torch", threads, 1, "")
    found = benchmark.compare(
        lambda: model(0.0),
        lambda: model(slow_down),
        reference="reference",
        candidate="candidate",
        conditions=here,
        candidate_conditions=here,
        cap_s=budget_s,
        seed=seed,
    )
    samples = found.reference_samples_ms, found.candidate_samples_ms, found.null_samples_ms
    regardless = benchmark.conclude(Blocks(*map(list, samples)), seed=seed)
    return (found.speedup.value, found.verdict), (regardless.speedup.value, regardless.verdict)


def means(slow_down: float) -> Said:
    """Return what the means of 100 calls each say, one model after the other."""
    samples = []
    for call in (model(0.0), model(slow_down)):
        for _ in range(10):
            call()
        marks = [time.perf_counter()]
        for _ in range(100):
            call()
            marks.append(time.perf_counter())
        samples.append(np.diff(marks))
    return sequential(*samples, centre=np.mean)


def autorange(slow_down: float, *, budget_s: float, threads: int) -> Said:
    """Return what `torch.utils.benchmark` says, one model after the other, each for half of the time."""
    samples = []
    for call in (model(0.0), model(slow_down)):
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        samples.append(np.array(timer.blocked_autorange(min_run_time=budget_s / 2).times))
    return sequential(*samples, centre=np.median)


def sequential(reference: Samples, candidate: Samples, *, centre: Callable[[Samples], Any]) -> Said:
    """Return the ratio of two samples, called different where it is beyond the margin and Welch's test says so."""
    ratio = float(centre(reference) / centre(candidate))
    beyond = abs(math.log(ratio)) > math.log1p(benchmark.MARGIN)
    if not beyond or ttest_ind(reference, candidate, equal_var=False).pvalue > 0.05:
        return ratio, "undecided"
    return ratio, "faster" if ratio > 1 else "slower"


def ask(comparisons: int, *, budget_s: float, threads: int) -> Iterator[Answer]:
    """Yield each method's answer on each slow-down, in turns, so that all meet the same machine."""
    torch.set_num_threads(threads)
    for number in range(comparisons):
        torch.manual_seed(number)
        for slow_down in SLOW_DOWNS:
            marks = [time.perf_counter()]
            fair, regardless = ours(slow_down, budget_s=budget_s, threads=threads, seed=number)
            marks.append(time.perf_counter())
            mean = means(slow_down)
            marks.append(time.perf_counter())
            ranged = autorange(slow_down, budget_s=budget_s, threads=threads)
            marks.append(time.perf_counter())
            first, *rest = (float(x) for x in np.diff(marks))
            for name, said, spent in zip(METHODS, (fair, regardless, mean, ranged), (first, first, *rest), strict=True):
                yield Answer(name, slow_down, *said, spent)


def row(answers: list[Answer]) -> Row:
    """Return how one method fared on one slow-down."""
    slow_down = answers[0].slow_down
    truth = round(STEPS * (1 + slow_down)) / STEPS

    def share(*verdicts: str) -> float:
        return statistics.fmean(a.verdict in verdicts for a in answers)

    low, high = np.quantile([a.ratio * truth for a in answers], [0.05, 0.95])
    return Row(
        method=answers[0].method,
        slow_down=slow_down,
        comparisons=len(answers),
        low=float(low),
        high=float(high),
        false_alarms=None if slow_down else share("faster", "slower"),
        found=share("slower") if slow_down else None,
        wrong_direction=share("faster") if slow_down else 0.0,
        withheld=share("too noisy"),
        mean_s=statistics.fmean(a.duration_s for a in answers),
    )


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = ("method", "slow-down", "ratio / truth, 5-95 %", "false alarms", "found", "wrong way", "withheld", "s each")
    lines = [head, ("---",) * len(head)]
    for r in rows:
        lines.append(
            (
                r.method,
                f"{r.slow_down:.0%}",
                f"{r.low:.3f}-{r.high:.3f}",
                "" if r.false_alarms is None else f"{r.false_alarms:.1%}",
                "" if r.found is None else f"{r.found:.0%}",
                f"{r.wrong_direction:.1%}" if r.slow_down else "",
                f"{r.withheld:.0%}",
                f"{r.mean_s:.1f}",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spin() -> None:
    """Keep one core busy for as long as the process that started this one lives."""
    while (parent := multiprocessing.parent_process()) and parent.is_alive():
        sum(range(1_000_000))


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep as many cores busy as `processes`."""
    running = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(processes)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.terminate()
            process.join()


def main() -> None:
    """Ask every method and print how each fared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=40, help="per method and slow-down (default: 40)")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each comparison (default: 4)")
    parser.add_argument("--threads", type=int, default=targets.cores(), help="of torch (default: every core)")
    parser.add_argument("--loaded", action="store_true", help="keep one core busy meanwhile")
    parser.add_argument("--json", action="store_true", help="print every answer as JSON in place of the table")
    options = parser.parse_args()
    before = contention.snapshot()
    with load(1 if options.loaded else 0):
        answers = list(ask(options.comparisons, budget_s=options.budget, threads=options.threads))
    found, _ = contention.signs(before, contention.snapshot(), threads=options.threads, cores=targets.cores())
    groups = [[a for a in answers if (a.method, a.slow_down) == (m, s)] for s in SLOW_DOWNS for m in METHODS]
    rows = [row(group) for group in groups]
    if options.json:
        given = vars(options) | {"contention": found}
        print(json.dumps({"options": given, "rows": list(map(asdict, rows)), "answers": list(map(asdict, answers))}))
        return
    print(table(rows))
    print("\nThe machine meanwhile:", "; ".join(found) or "quiet")


if __name__ == "__main__":
    main()
