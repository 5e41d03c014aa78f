"""Paired timing of two models under equal conditions, with a verdict only where the interval supports one."""

import copy
from dataclasses import fields
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from shrinkkit.core import machines
from shrinkkit.core.evidence import conclude
from shrinkkit.core.measurement import Comparison, Conditions
from shrinkkit.core.target import Target
from shrinkkit.errors import UnfairComparison
from shrinkkit.measure import contention, timing
from shrinkkit.measure.timing import DEFAULT, Call, Make, Protocol, TimingCallback, never_stop
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks.modules import Example, raw_bytes


def compare(
    make_reference: Make,
    make_candidate: Make,
    *,
    reference: str,
    candidate: str,
    conditions: Conditions,
    candidate_conditions: Conditions,
    across_runtimes: bool = False,
    protocol: Protocol = DEFAULT,
    callback: TimingCallback = never_stop,
) -> Comparison:
    """Return the paired timing of two models; for two modules in memory see `in_memory.compare`.

    Args:
        make_reference: Returns a fresh copy of the reference as a call without arguments that runs it once.
        make_candidate: The same for the candidate.
        reference: Name of the reference.
        candidate: Name of the candidate.
        conditions: Of the reference.
        candidate_conditions: Of the candidate.
        across_runtimes: Whether runtimes themselves are compared, and may therefore differ.
        protocol: Duration and order.
        callback: Called between blocks, at most twice a second, with the candidate's name and the samples so far;
            returns whether to stop. An interrupted comparison gets no verdict.

    Raises:
        InvalidInput: A model fails, returns values that are not finite, or does not reproduce its outputs. Nothing was
            timed then.
        UnfairComparison: The conditions differ.
    """
    _check_equal(conditions, candidate_conditions, except_for={"runtime", "form"} if across_runtimes else set())
    timer = timing.timer(conditions.device, {conditions.runtime, candidate_conditions.runtime})
    makers = (make_reference, make_candidate, make_reference)
    start = contention.snapshot()
    timed = timing.measure(makers, (reference, candidate), timer, protocol, callback)
    end = contention.snapshot()
    disturbance = contention.disturbance(start, end, threads=conditions.threads, cores=machines.cores())
    samples = timed.samples.rounded()
    conclusion = conclude(samples, withheld=disturbance.withheld, stopped=timed.stopped, seed=protocol.seed)
    return Comparison(
        reference=reference,
        candidate=candidate,
        conditions=conditions,
        candidate_runtime=candidate_conditions.runtime,
        **vars(conclusion),
        reference_samples_ms=tuple(samples.reference),
        candidate_samples_ms=tuple(samples.candidate),
        control_samples_ms=tuple(samples.control),
        warmup_calls=timed.warmup_calls,
        steady=timed.steady,
        disturbance=disturbance,
        duration_s=end.wall_s - start.wall_s,
        seed=protocol.seed,
        stopped=timed.stopped,
    )


def conditions(target: Target, example: Example, *, threads: int, form: str) -> Conditions:
    """Return the conditions under which a model in one form runs on `example`."""
    return Conditions(
        device=target.device,
        hardware=machines.hardware(target),
        runtime=target.runtime,
        form=form,
        threads=threads,
        batch_size=example[0].shape[0],
        inputs_sha256=inputs_sha256(example),
    )


def inputs_sha256(example: Example) -> str:
    """Return a hash of the inputs: dtype, shape, memory format and values."""
    digest = sha256()
    for x in example:
        digest.update(str(x.stride()).encode() + raw_bytes(x))
    return digest.hexdigest()


def copies(model: nn.Module, example: Example, *, form: str = "eager") -> Make:
    """Return a factory of copies of `model`, each ready to be called on `example`; `model` is unchanged.

    Args:
        model: Module in eval mode.
        example: Positional inputs of one call, batch first, on the device that the copies go to.
        form: `eager`, or `compiled` for `torch.compile`.
    """
    engine = quantize.engine_of(model)

    def make() -> Call:
        with quantize.using_engine(engine):  # copying packs int8 weights again, for the engine in force
            duplicate: Any = copy.deepcopy(model).to(example[0].device)
        duplicate = torch.compile(duplicate) if form == "compiled" else duplicate

        @torch.inference_mode()
        def call() -> Any:
            return duplicate(*example)

        return call

    return make


def _check_equal(a: Conditions, b: Conditions, *, except_for: set[str]) -> None:
    unequal = [
        f"{f.name} ({getattr(a, f.name)!r} and {getattr(b, f.name)!r})"
        for f in fields(Conditions)
        if f.name not in except_for and getattr(a, f.name) != getattr(b, f.name)
    ]
    if unequal:
        raise UnfairComparison(
            f"Models may be timed only under equal conditions; these differ in {', '.join(unequal)}. "
            "Load both on the same target, with the same threads and inputs."
        )
