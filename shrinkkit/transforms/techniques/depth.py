"""Depth pruning: whole residual blocks and transformer layers go, those first that change the outputs least."""

import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shrinkkit.core.stages import DropBlocks
from shrinkkit.display import formats
from shrinkkit.errors import InvalidInput, NothingToPrune, brief
from shrinkkit.progress import Progress, no_progress
from shrinkkit.tasks import modules, outputs
from shrinkkit.tasks.modules import FORWARD_ERRORS, Example
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import variants
from shrinkkit.transforms.transform import Made

ADDITIONS = ("add", "iadd", "radd")
"""Functions by which residual blocks add their input to what they compute."""


@torch.inference_mode(False)
@torch.no_grad()
def apply(
    model: nn.Module, task: Task, settings: DropBlocks, *, seed: int = 0, progress: Progress = no_progress
) -> Made:
    """Apply the transform `drop-blocks`: one block after another goes, each time the one whose loss is measured least.

    A block is a module of several layers in an `nn.Sequential` or `nn.ModuleList` that is called once, adds its input
    to something, and returns a tensor of the same shape and type, alone or first in a tuple. Without it, its input is
    passed on. Blocks within blocks go by themselves. Nothing is random.

    Raises:
        InvalidInput: More blocks are to go than can.
        NothingToPrune: The model has no such block.
    """
    blocks, why = _blocks(model, tuple(x.cpu() for x in task.example))
    inputs = variants.calibration(task, settings.calibration_examples)
    skipped = modules.matching(blocks, settings.skip) if settings.skip else ()
    why |= dict.fromkeys(skipped, "is in `skip`")
    names = [name for name in blocks if name not in why]
    result, original = modules.duplicate(model), [_floats(model(*batch)) for batch in inputs]
    count = settings.count or max(1, round((settings.ratio or 0) * len(names)))
    notes: list[str] = []
    for done in range(count):
        damages: dict[str, float] = {}
        for tried, name in enumerate(names):
            progress(done + tried / len(names), count, f"without {name}")
            with _without(result, name, is_alone=blocks[name]):
                damage = _damage(result, inputs, original)
            if isinstance(damage, str):
                why[name] = damage
            else:
                damages[name] = damage
        if not damages or (done == 0 and count > len(damages)):
            reasons = "; ".join(f"`{name}` {reason}" for name, reason in why.items()) or "it has no residual blocks"
            if not damages:
                raise NothingToPrune(f"The model has no block that can be dropped: {reasons}.")
            rule = f"`count` must be at most {len(damages)}, the blocks that can be dropped, got {count}"
            raise InvalidInput(f"{rule}. Others: {reasons}.")
        gone = min(damages, key=damages.__getitem__)
        _drop(result, gone, is_alone=blocks[gone])
        names = [name for name in damages if name != gone]
        notes.append(f"dropped {gone}: outputs differ by {formats.percent(damages[gone])} from the original's")
    why |= {name: f"belongs to {name}, without which outputs differ by more" for name in names}
    left_alone = {f"{name}.{layer}": why[name] for name in why for layer in modules.layers(model.get_submodule(name))}
    progress(count, count, "dropped")
    return Made(result.eval(), tuple(notes), left_alone)


def _blocks(model: nn.Module, example: Example) -> tuple[dict[str, bool], dict[str, str]]:
    """Return the blocks of a model by name, and whether each takes and returns one tensor; and why others are none."""
    calls: dict[str, list[tuple[list[Any], Any, bool]]] = {}
    begins: dict[str, int] = {}

    def begin(name: str, module: nn.Module, given: Any) -> None:
        begins[name] = len(functions.calls)

    def keep(name: str, module: nn.Module, given: Any, keywords: dict[str, Any], returned: Any) -> None:
        arguments = [*given, *keywords.values()]
        inside = functions.calls[begins[name] :]
        added = [x for function, tensors, _ in inside if function.strip("_") in ADDITIONS for x in tensors]
        calls.setdefault(name, []).append((arguments, returned, any(x is y for x in added for y in arguments[:1])))

    named = {
        f"{owner}.{key}".lstrip("."): child
        for owner, container in model.named_modules()
        if isinstance(container, (nn.Sequential, nn.ModuleList))
        for key, child in container.named_children()
        if next(child.children(), None) is not None and next(child.parameters(), None) is not None
    }
    hooks = [m.register_forward_pre_hook(partial(begin, name)) for name, m in named.items()]
    hooks += [m.register_forward_hook(partial(keep, name), with_kwargs=True) for name, m in named.items()]
    with modules.hooked(hooks), modules.plain_attention(), modules.FunctionCalls() as functions:
        model(*example)
    blocks, why = dict[str, bool](), dict[str, str]()
    for name in named:
        if len(calls.get(name, ())) != 1:
            why[name] = f"is called {len(calls.get(name, ()))} times when the model runs"
            continue
        ((given, returned, is_residual),) = calls[name]
        first = returned[0] if isinstance(returned, tuple) and returned else returned
        same = [isinstance(x, Tensor) for x in (*given[:1], first)] == [True, True]
        if same and (given[0].shape, given[0].dtype) == (first.shape, first.dtype):
            if not is_residual:
                continue
            blocks[name] = len(given) == 1 and isinstance(returned, Tensor)
        else:
            why[name] = "returns another shape or type than it is given"
    outer = [name for name in named if any(other.startswith(f"{name}.") for other in blocks)]
    inside = [name for name in named if any(name.startswith(f"{other}.") for other in blocks)]
    why = {name: reason for name, reason in why.items() if name not in (*outer, *inside)}
    return {name: is_alone for name, is_alone in blocks.items() if name not in outer}, why


def _drop(model: nn.Module, name: str, *, is_alone: bool) -> None:
    owner, _, key = name.rpartition(".")
    held = model.get_submodule(owner)._modules
    if is_alone:
        held[key] = nn.Identity()
    else:
        # An Identity takes no masks and returns no tuple. Other blocks keep their names.
        del held[key]


@contextlib.contextmanager
def _without(model: nn.Module, name: str, *, is_alone: bool) -> Iterator[None]:
    """Drop a block of `model` while the block of code runs."""
    held = model.get_submodule(name.rpartition(".")[0])._modules
    before = dict(held)
    _drop(model, name, is_alone=is_alone)
    try:
        yield
    finally:
        held.clear()
        held.update(before)


def _damage(model: nn.Module, inputs: Sequence[Example], original: Sequence[Sequence[Tensor]]) -> float | str:
    """Return the mean relative error of the outputs of `model`; why there is none, if it does not run like before."""
    sums = [[0.0, 0.0] for _ in original[0]]
    for batch, wanted in zip(inputs, original, strict=True):
        try:
            found = _floats(model(*batch))
        except FORWARD_ERRORS as error:
            return f"cannot be left out: the model fails without it: {type(error).__name__}: {brief(error)}"
        if [y.shape for y in found] != [y.shape for y in wanted]:
            cause = (
                "an output gets another shape, such as the cache of a language model, which `cache=False` leaves out"
            )
            return f"cannot be left out: {cause}"
        for total, y, reference in zip(sums, found, wanted, strict=True):
            total[0] += float((y.double() - reference.double()).square().sum())
            total[1] += float(reference.double().square().sum())
    return statistics.mean(math.sqrt(error / max(size, 1e-30)) for error, size in sums)


def _floats(output: Any) -> list[Tensor]:
    return [t for t in outputs.tensors(output) if t.is_floating_point()]
