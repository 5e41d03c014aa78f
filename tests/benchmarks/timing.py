"""A benchmark of the benchmark: how often does each way of timing two models tell the truth?

Compares models with their own copies, and with copies that a known share of extra work makes slower, in three ways:
shrinkkit's paired timing, the mean of 100 calls and then of another 100, and torch's own `blocked_autorange` on one
model and then on the other, for as long in all as the first took. Models of three sizes take turns. Run it on a
machine that does nothing else:

    python tests/benchmarks/timing.py --comparisons 200
    python tests/benchmarks/timing.py --comparisons 200 --loaded --threads 1

The second runs next to processes that keep every core busy. More threads than one would then wait for each other at
every step: a call of 3 ms takes half a second.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ttest_ind
from torch import nn
from torch.utils.benchmark import Timer

from shrinkkit.core import estimate, machines
from shrinkkit.core.estimate import MARGIN
from shrinkkit.core.evidence import PairedSamples, conclude
from shrinkkit.core.measurement import Comparison, Conditions
from shrinkkit.measure import benchmark
from shrinkkit.measure.benchmark import TimedModel
from shrinkkit.measure.timing import Protocol
from shrinkkit.runtimes import registry

SLOW_DOWNS = (0.0, 0.03, 0.10)
STEPS = 100
"""Steps of work in a model; a planted slow-down adds a share of them."""
EARLY_S = 2.0
"""When the half-width of the interval is looked at before the end."""
OURS = "shrinkkit"
REGARDLESS = "shrinkkit, contention detection off"
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
    kind: str
    slow_down: float
    ratio: float
    verdict: str
    duration_s: float
    half_width: float | None = None
    """Of the interval at the end, as a share."""
    early_half_width: float | None = None
    """The same from the blocks of the first `EARLY_S` seconds."""


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
    same: float | None
    """Fraction of identical models with the verdict *no difference*."""
    found: float | None
    """Share of slow-downs that were found."""
    wrong_direction: float | None
    """Share of slow-downs called faster; of identical models none can be."""
    withheld: float
    """Share in which no verdict was given because the machine was too noisy."""
    half_width: float | None
    early_half_width: float | None
    mean_s: float


def model(kind: str, slow_down: float) -> Call:
    """Return a new model whose work takes `slow_down` longer, as a share, than that of `model(kind, 0.0)`."""
    steps = round(STEPS * (1 + slow_down))
    torch.manual_seed(0)  # copies of a model are copies only with the same weights
    step, start = MODELS[kind]()

    @torch.inference_mode()
    def call() -> torch.Tensor:
        x = start
        for _ in range(steps):
            x = step(x)
        return x

    return call


def matrices() -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """Return a product of matrices, large enough that it uses every thread, and what it starts from."""
    # Rotations, so that numbers neither grow nor become denormal, and added steps cost what the others do.
    weight = torch.linalg.qr(torch.randn(160, 160))[0]
    return lambda x: x @ weight, torch.randn(160, 160)


def vectors() -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """Return the same in small, where what is called around the work weighs as much as the work."""
    weight = torch.linalg.qr(torch.randn(32, 32))[0]
    return lambda x: x @ weight, torch.randn(4, 32)


def convolutions() -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """Return a convolution behind a tanh, which keeps numbers within bounds."""
    layer = nn.Conv2d(16, 16, 3, padding=1)
    return lambda x: torch.tanh(layer(x)), torch.randn(2, 16, 24, 24)


MODELS = {"matrices": matrices, "vectors": vectors, "convolutions": convolutions}


def ours(kind: str, slow_down: float, *, budget_s: float, threads: int, seed: int) -> tuple[Comparison, Said, float]:
    """Return what shrinkkit's paired timing says, what it would if contention never withheld its verdict, and early."""
    here = Conditions("cpu", machines.hardware(registry.resolve("cpu/torch")), "torch", "eager", threads, 1, "")
    found = benchmark.time_pair(
        TimedModel("reference", lambda: model(kind, 0.0), here),
        TimedModel("candidate", lambda: model(kind, slow_down), here),
        protocol=Protocol(cap_s=budget_s, seed=seed),
    )
    samples = found.reference_samples_ms, found.candidate_samples_ms, found.control_samples_ms
    regardless = conclude(PairedSamples(*map(list, samples)), seed=seed)
    slots = max(4, round(len(samples[0]) * min(1.0, EARLY_S / found.duration_s)) // 2 * 2)
    early = conclude(PairedSamples(*(list(arm[:slots]) for arm in samples)), seed=seed)
    return found, (regardless.speedup.value, regardless.verdict), half_width(early.speedup)


def half_width(ratio: Any) -> float:
    """Return half the width of an estimate's interval, as a share."""
    return math.log(ratio.high / ratio.low) / 2


def means(kind: str, slow_down: float) -> Said:
    """Return what the means of 100 calls each say, one model after the other."""
    samples = []
    for call in (model(kind, 0.0), model(kind, slow_down)):
        for _ in range(10):
            call()
        marks = [time.perf_counter()]
        for _ in range(100):
            call()
            marks.append(time.perf_counter())
        samples.append(np.diff(marks))
    return sequential(*samples, centre=np.mean)


def autorange(kind: str, slow_down: float, *, budget_s: float, threads: int) -> Said:
    """Return what `torch.utils.benchmark` says, one model after the other, each for half of the time."""
    samples = []
    for call in (model(kind, 0.0), model(kind, slow_down)):
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        samples.append(np.array(timer.blocked_autorange(min_run_time=budget_s / 2).times))
    return sequential(*samples, centre=np.median)


def sequential(reference: Samples, candidate: Samples, *, centre: Callable[[Samples], Any]) -> Said:
    """Return the ratio of two samples, called different where it is beyond the margin and Welch's test says so."""
    ratio = float(centre(reference) / centre(candidate))
    beyond = abs(math.log(ratio)) > math.log1p(MARGIN)
    if not beyond:
        return ratio, "same"
    if min(len(reference), len(candidate)) < 2 or ttest_ind(reference, candidate, equal_var=False).pvalue > 0.05:
        return ratio, "undecided"
    return ratio, "faster" if ratio > 1 else "slower"


def ask(comparisons: int, *, planted: int, others_every: int, budget_s: float, threads: int) -> Iterator[Answer]:
    """Yield each method's answer on each slow-down, in turns, so that all meet the same machine."""
    torch.set_num_threads(threads)
    for number in range(comparisons):
        kind = list(MODELS)[number % len(MODELS)]
        # The planted ones are spread over the whole time.
        due = number * planted // comparisons != (number + 1) * planted // comparisons
        for slow_down in SLOW_DOWNS if due else (0.0,):
            start = time.perf_counter()
            found, regardless, early = ours(kind, slow_down, budget_s=budget_s, threads=threads, seed=number)
            took = time.perf_counter() - start
            widths = half_width(found.speedup), early
            yield Answer(OURS, kind, slow_down, found.speedup.value, found.verdict, took, *widths)
            yield Answer(REGARDLESS, kind, slow_down, *regardless, took, *widths)
            if number % others_every == 0 or slow_down:
                start = time.perf_counter()
                yield Answer(MEANS, kind, slow_down, *means(kind, slow_down), time.perf_counter() - start)
                start = time.perf_counter()
                said = autorange(kind, slow_down, budget_s=took, threads=threads)
                yield Answer(AUTORANGE, kind, slow_down, *said, time.perf_counter() - start)


def row(answers: list[Answer]) -> Row:
    """Return how one method fared on one slow-down."""
    slow_down = answers[0].slow_down
    truth = round(STEPS * (1 + slow_down)) / STEPS

    def share(*verdicts: str) -> float:
        return statistics.fmean(a.verdict in verdicts for a in answers)

    def middle(widths: list[float | None]) -> float | None:
        known = [width for width in widths if width is not None]
        return statistics.median(known) if known else None

    low, high = np.quantile([a.ratio * truth for a in answers], [0.05, 0.95])
    return Row(
        method=answers[0].method,
        slow_down=slow_down,
        comparisons=len(answers),
        low=float(low),
        high=float(high),
        false_alarms=None if slow_down else share("faster", "slower"),
        same=None if slow_down else share("same"),
        found=share("slower") if slow_down else None,
        wrong_direction=share("faster") if slow_down else None,
        withheld=share("too noisy"),
        half_width=middle([a.half_width for a in answers]),
        early_half_width=middle([a.early_half_width for a in answers]),
        mean_s=statistics.fmean(a.duration_s for a in answers),
    )


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = (
        *(
            "method",
            "slow-down",
            "n",
            "ratio / truth, 5-95 %",
            "false alarms",
            "no difference",
            "detected",
            "wrong sign",
        ),
        *("withheld", f"half-width, at {EARLY_S:g} s", "s each"),
    )
    lines = [head, ("---",) * len(head)]
    for r in rows:
        widths = "" if r.half_width is None else f"{r.half_width:.2%}, {r.early_half_width or 0:.2%}"
        lines.append(
            (
                *(r.method, f"{r.slow_down:.0%}", str(r.comparisons), f"{r.low:.3f}-{r.high:.3f}"),
                *(_percent(r.false_alarms, 1), _percent(r.same), _percent(r.found), _percent(r.wrong_direction, 1)),
                *(f"{r.withheld:.0%}", widths, f"{r.mean_s:.1f}"),
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def goals(rows: list[Row], *, loaded: bool) -> str:
    """Return what is wanted of shrinkkit's own row, and what it reached; loaded, only that it is never wrong."""
    own = {r.slow_down: r for r in rows if r.method == OURS}
    still, small, large = (own[s] for s in SLOW_DOWNS)
    bound = estimate.mean([1.0] * round((still.false_alarms or 0) * still.comparisons) + [0.0] * round(
        (1 - (still.false_alarms or 0)) * still.comparisons
    )).high  # fmt: skip
    wanted = [
        ("identical models called different", still.false_alarms or 0, "<=", 0.02),
        ("a slow-down called faster", max(small.wrong_direction or 0, large.wrong_direction or 0), "<=", 0.0),
    ]
    wanted += [] if loaded else [
        ("identical models with no difference", still.same or 0, ">=", 0.5),
        ("a true 3 % found", small.found or 0, ">=", 0.9),
        ("a true 10 % found", large.found or 0, ">=", 0.95),
        (f"median half-width at {EARLY_S:g} s", still.early_half_width or 1, "<=", 0.01),
    ]  # fmt: skip
    lines = [
        f"{'reached' if (value <= limit if sign == '<=' else value >= limit) else 'MISSED '}  {what}: {value:.1%} "
        f"(wanted {sign} {limit:.0%})"
        for what, value, sign, limit in wanted
    ]
    return "\n".join(
        [*lines, f"         by 95 % intervals, at most {bound:.1%} of identical models are called different"]
    )


def _percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}%}"


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
    parser.add_argument("--comparisons", type=int, default=40, help="of identical models (default: 40)")
    parser.add_argument("--planted", type=int, help="of each slow-down (default: a quarter of these)")
    parser.add_argument("--others-every", type=int, default=1, help="ask the other methods on every so many pairs")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each comparison (default: 4)")
    parser.add_argument("--threads", type=int, default=machines.cores(), help="of torch (default: every core)")
    parser.add_argument("--loaded", action="store_true", help="keep every core busy meanwhile")
    parser.add_argument("--json", action="store_true", help="print every answer as JSON in place of the table")
    options = parser.parse_args()
    planted = min(options.comparisons, options.planted or max(1, options.comparisons // 4))
    before, answers = benchmark.snapshot(), []
    with load(machines.cores() if options.loaded else 0):
        for answer in ask(
            options.comparisons,
            planted=planted,
            others_every=options.others_every,
            budget_s=options.budget,
            threads=options.threads,
        ):
            answers.append(answer)
            if sys.stderr.isatty():
                print(f"\r{len(answers)} answers", end="", file=sys.stderr)
    found = benchmark.disturbance(before, benchmark.snapshot(), threads=options.threads, cores=machines.cores())
    groups = [[a for a in answers if (a.method, a.slow_down) == (m, s)] for s in SLOW_DOWNS for m in METHODS]
    rows = [row(group) for group in groups if group]
    if options.json:
        given = vars(options) | {"disturbance": asdict(found)}
        print(json.dumps({"options": given, "rows": list(map(asdict, rows)), "answers": list(map(asdict, answers))}))
        return
    print(table(rows), goals(rows, loaded=options.loaded), sep="\n\n")
    print("\nThe machine meanwhile:", "; ".join(found.signs) or "quiet")


if __name__ == "__main__":
    main()
