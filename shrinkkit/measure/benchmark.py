"""Paired timing: is one model faster than another, here and now, and by how much?

PairedSamples in which reference, candidate and a copy of the reference take turns; a verdict only where the interval
allows one. Why this way and not another is measured by `tests/benchmarks/timing.py`.
"""

import copy
from dataclasses import fields
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from shrinkkit.core import machines
from shrinkkit.core.measurement import Comparison, Conditions
from shrinkkit.core.samples import PairedSamples, Samples, conclude
from shrinkkit.core.target import Target
from shrinkkit.errors import InvalidInput, UnfairComparison, brief
from shrinkkit.measure import contention, timing
from shrinkkit.measure.timing import Call, Make, Protocol, TimingCallback, never_stop
from shrinkkit.runtimes import specs
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
    width: float = 0.005,
    cap_s: float = 4.0,
    layouts: int = 8,
    slot_ms: float = 6.0,
    seed: int = 0,
    callback: TimingCallback = never_stop,
) -> Comparison:
    """Return the paired timing of two models under equal conditions; for two modules see `models`.

    Args:
        make_reference: Returns a fresh copy of the reference as a call without arguments that runs it once.
        make_candidate: The same for the candidate.
        reference: Name of the reference.
        candidate: Name of the candidate.
        conditions: Under which the reference runs.
        candidate_conditions: Under which the candidate runs.
        across_runtimes: Whether runtimes themselves are compared, and may therefore differ.
        width: Half-width of the interval, as a share, at which measuring stops. *Same* can be said once it is well
            below the margin of 1 %.
        cap_s: Seconds after which it stops in any case, once there are 20 blocks; slow models get three times that, and
            then 6 blocks are enough.
        layouts: Most fresh copies of each model in 20 blocks, so that where a model lies in memory is not part of the
            result; fewer where making them would take more than a tenth of the time.
        slot_ms: Milliseconds for which one model runs, at least, before the next takes its turn;
            one more call comes first and is not recorded.
        seed: Of the order within blocks and of the bootstrap.
        callback: Called between blocks, at most twice a second, with the candidate's name and the samples so far;
            returns whether to stop. An interrupted comparison gets no verdict.

    Raises:
        InvalidInput: `width`, `cap_s`, `layouts` or `slot_ms` is not above 0; or a model fails, returns what is not
            finite, or does not reproduce its own outputs. Nothing was timed then.
        UnfairComparison: The conditions differ.
    """
    _refuse(conditions, candidate_conditions, allowed=frozenset({"runtime", "form"} if across_runtimes else ()))
    protocol = Protocol(width, cap_s, layouts, slot_ms, seed)
    timer = timing.timer(conditions.device, {conditions.runtime, candidate_conditions.runtime})
    start = contention.snapshot()
    makers = (make_reference, make_candidate, make_reference)
    blocks, warmup, steady, stopped = timing.measure(makers, (reference, candidate), timer, protocol, callback)
    disturbance = contention.disturbance(
        start, end := contention.snapshot(), threads=conditions.threads, cores=machines.cores()
    )
    blocks = PairedSamples(_stored(blocks.reference), _stored(blocks.candidate), _stored(blocks.control))
    found = conclude(blocks, withheld=disturbance.withheld, stopped=stopped, seed=seed)
    return Comparison(
        reference=reference,
        candidate=candidate,
        conditions=conditions,
        candidate_runtime=candidate_conditions.runtime,
        **vars(found),
        reference_samples_ms=tuple(blocks.reference),
        candidate_samples_ms=tuple(blocks.candidate),
        control_samples_ms=tuple(blocks.control),
        warmup_calls=warmup,
        steady=steady,
        disturbance=disturbance,
        duration_s=end.wall_s - start.wall_s,
        seed=seed,
        stopped=stopped,
    )


def models(
    reference: nn.Module,
    candidate: nn.Module,
    example: Example,
    *,
    names: tuple[str, str] = ("reference", "candidate"),
    threads: int = 0,
    width: float = 0.005,
    cap_s: float = 4.0,
    seed: int = 0,
    callback: TimingCallback = never_stop,
) -> Comparison:
    """Return the paired timing of two modules in memory, in inference mode; both are left unchanged.

    What is shipped is a file, and `trials.race` times files. This is for a look on the way there.

    Args:
        reference: Module in eval mode.
        candidate: Module in eval mode, on the same device. Its dtype and shapes may differ: they are the treatment.
        example: Positional inputs of one call, batch first, on that device.
        names: Of reference and candidate, for the record and for errors.
        threads: Intra-op threads, 0 for every core that this process may use; put back afterwards.
        width: See `compare`.
        cap_s: See `compare`.
        seed: See `compare`.
        callback: See `compare`.

    Raises:
        InvalidInput: A module is in training mode, rejects `example`, returns what is not finite, does not reproduce
            its own outputs, or writes to its inputs.
        UnfairComparison: The modules and `example` are not on one device.
    """
    before = torch.get_num_threads()
    threads = specs.use_threads(threads)
    try:
        for name, model in zip(names, (reference, candidate), strict=True):
            _refuse_module(model, example, name)
        device = example[0].device.type
        here = Conditions(
            device=device,
            hardware=machines.hardware(Target(device, "torch")),
            runtime="torch",
            form="eager",
            threads=threads,
            batch_size=example[0].shape[0],
            inputs_sha256=inputs_sha256(example),
        )
        return compare(
            copies(reference, example),
            copies(candidate, example),
            reference=names[0],
            candidate=names[1],
            conditions=here,
            candidate_conditions=here,
            width=width,
            cap_s=cap_s,
            seed=seed,
            callback=callback,
        )
    finally:
        torch.set_num_threads(before)


def inputs_sha256(example: Example) -> str:
    """Return a hash of inputs: dtype, shape, memory format and values."""
    digest = sha256()
    for x in example:
        digest.update(str(x.stride()).encode() + raw_bytes(x))
    return digest.hexdigest()


def _refuse_module(model: nn.Module, example: Example, name: str) -> None:
    """Raise unless `model` is ready to be timed on `example`."""
    if training := [part or name for part, module in model.named_modules() if module.training]:
        raise InvalidInput(f"{name} must be in eval mode, but `{training[0]}` is in training mode. Call `.eval()`.")
    elsewhere = {str(t.device) for t in (*model.parameters(), *model.buffers(), *example)}
    if len(elsewhere) > 1:
        raise UnfairComparison(
            f"{name} and `example` must be on one device, found {', '.join(sorted(elsewhere))}. "
            "Move both with `.to(...)`."
        )
    before = inputs_sha256(example)
    try:
        with torch.inference_mode(), quantize.using_engine(quantize.engine_of(model)):
            model(*example)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        shapes = [tuple(x.shape) for x in example]
        raise InvalidInput(
            f"{name} must accept `example`, of shapes {shapes}, but stops with: {brief(error)}. "
            "Pass the inputs of one call, batch first."
        ) from error
    if inputs_sha256(example) != before:
        raise InvalidInput(
            f"{name} must leave its inputs unchanged, but wrote to `example`. Use no in-place step on an input."
        )


def copies(model: nn.Module, example: Example, *, form: str = "eager") -> Make:
    """Return a factory of copies of `model`, each ready to be called on `example` as a user calls it.

    Args:
        model: Module in eval mode; it is left unchanged.
        example: Positional inputs of one call, batch first, on the device that the copies go to.
        form: `eager`, or `compiled` for `torch.compile`.
    """
    engine = quantize.engine_of(model)

    def make() -> Call:
        with quantize.using_engine(engine):  # copying packs int8 weights anew, for the engine in force
            own: Any = copy.deepcopy(model).to(example[0].device)
        own = torch.compile(own) if form == "compiled" else own

        @torch.inference_mode()
        def call() -> Any:
            return own(*example)

        return call

    return make


def _refuse(a: Conditions, b: Conditions, *, allowed: frozenset[str]) -> None:
    unequal = [
        f"{f.name} ({getattr(a, f.name)!r} and {getattr(b, f.name)!r})"
        for f in fields(Conditions)
        if f.name not in allowed and getattr(a, f.name) != getattr(b, f.name)
    ]
    if unequal:
        raise UnfairComparison(
            f"Models may be timed only under equal conditions; these differ in {', '.join(unequal)}. "
            "Load both on the same target, with the same threads and inputs."
        )


def _stored(samples: Samples) -> Samples:
    """Return the samples with six significant digits, which is more than a clock gives."""
    return [tuple(float(f"{ms:.6g}") for ms in slot) for slot in samples]
