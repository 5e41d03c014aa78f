"""What every step relies on in a user's model: eval mode, batch first, finite and repeatable outputs."""

import hashlib
import keyword
import re
import time
from collections import deque

import torch
import torch.fx
from torch import nn

from shrinkkit.errors import InvalidTask
from shrinkkit.tasks import modules, outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.usercode import blaming

_CALLS, _CALLS_S = 40, 10.0
"""How many more times a model is called to see that it answers alike, and after how many seconds that is enough."""
_LONGEST = 300
_TAKEN = frozenset(dir(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()))) - frozenset(dir(nn.Module()))
"""Names of attributes that an exported model has itself."""
_STATELESS = "Leave out what is random in eval mode, and state kept from one call to the next."
_MIXES = (
    "The output for an example must not depend on the rest of its batch, but {} gives another output. "
    "Use `batch_first=True` in recurrent layers, and no statistics over the batch."
)


def check(model: nn.Module, example: Example) -> None:
    """Return if `model` can be compressed and judged with `example`; both are left unchanged.

    Args:
        model: Trained model, as a task gives it.
        example: Positional inputs of one call, batch first.

    Raises:
        InvalidTask: `model` is no module, in training mode or not on the CPU, has names that cannot be saved, rejects
            `example`, writes to it, returns what is not finite, not batch first or not repeatable, keeps state from
            call to call, or mixes the examples of a batch.
    """
    _check_types(model, example)
    _check_names(model)
    with blaming("The model must accept `example`"), torch.no_grad():
        before = [modules.raw_bytes(x) for x in example]
        output = outputs.tensors(model(*example))
        again = outputs.tensors(model(*example))
    if before != [modules.raw_bytes(x) for x in example]:
        raise InvalidTask(
            "The model must leave its inputs unchanged, but it wrote to `example`. Use no in-place step on an input."
        )
    size = len(example[0])
    if not output or output[0].shape[:1] != (size,):
        raise InvalidTask(
            f"The model must return a tensor with the batch first: `example` holds {size} examples, the output "
            f"{f'has the shape {tuple(output[0].shape)}' if output else 'holds no tensor'}. "
            "Use `batch_first=True` or move the batch dimension to the front."
        )
    if not all(torch.isfinite(t).all() for t in output):
        raise InvalidTask(
            "The model's outputs must be finite, but on `example` some are not. Check its weights and `example`."
        )
    if not outputs.close(output, again):
        raise InvalidTask(
            f"The model must give the same outputs for the same inputs, but two calls on `example` differ. {_STATELESS}"
        )
    with (
        blaming("The model must accept a batch of any size, such as the first of `example` alone"),
        torch.no_grad(),
    ):
        alone = outputs.tensors(model(*(x[:1] for x in example)))
    if not outputs.close(alone[:1], [output[0][:1]]):
        raise InvalidTask(_MIXES.format("the first of `example` alone"))
    _check_calls(model, tuple(x[:1] for x in example))


def check_batch(model: nn.Module, inputs: Example) -> None:
    """Return if `model` answers each example of a batch alike, in whichever order and company.

    Args:
        model: A model that `check` has let through; it is left unchanged.
        inputs: Examples of the task's data as a batch, which may be larger than the task's example.

    Raises:
        InvalidTask: It does not, or rejects the batch.
    """
    size = len(inputs[0])
    with blaming(f"The model must accept a batch of any size, such as {size} examples"), torch.no_grad():
        first = [outputs.tensors(model(*inputs))[0]]
        turned = [outputs.tensors(model(*(x.flip(0) for x in inputs)))[0].flip(0)]
        half = [outputs.tensors(model(*(x[::2].contiguous() for x in inputs)))[0]]
    if not outputs.close(turned, first):
        raise InvalidTask(_MIXES.format(f"a batch of {size} in reverse order"))
    if not outputs.close(half, [first[0][::2]]):
        raise InvalidTask(_MIXES.format(f"every second of a batch of {size}"))


def _check_calls(model: nn.Module, inputs: Example) -> None:
    """Return if many calls give the same outputs and leave the model as it is, but for what it keeps at first."""
    before = _state(model)
    start = time.monotonic()
    with torch.no_grad():
        first = outputs.tensors(model(*inputs))
        for call in range(_CALLS):
            if not outputs.close(outputs.tensors(model(*inputs)), first):
                raise InvalidTask(
                    "The model must give the same outputs for the same inputs, but call "
                    f"{call + 2} on the first of `example` differs. {_STATELESS}"
                )
            if time.monotonic() - start > _CALLS_S:
                break
    after = _state(model)
    if moved := [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]:
        raise InvalidTask(
            f"The model must leave itself unchanged when it is called, but `{min(moved)}` changes from call to call. "
            f"A file of it would not, or not alike. {_STATELESS}"
        )


def _state(model: nn.Module) -> dict[str, object]:
    """Return what the modules keep, by name: hashes of tensors, numbers and texts, and how long containers are."""
    kept: dict[str, object] = {}
    for prefix, module in model.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            key = f"{prefix}.{name}".removeprefix(".")
            if isinstance(value, torch.Tensor):
                kept[key] = hashlib.sha256(modules.raw_bytes(value)).digest()
            elif isinstance(value, int | float | str):
                kept[key] = value
            elif isinstance(value, list | tuple | dict | set | deque):
                kept[key] = len(value)
    return kept


def _check_names(model: nn.Module) -> None:
    """Return if files can be made of a model with these names; torch writes them into code and into archives."""
    named = [*(n for n, _ in model.named_modules()), *(n for n, _ in model.named_parameters())]
    for name in dict.fromkeys([*named, *(n for n, _ in model.named_buffers())]):
        parts = name.split(".")
        if parts[0] in _TAKEN or any(part in keyword.kwlist for part in parts):
            raise InvalidTask(
                f"The model's part `{name}` must have a name that torch.export can save, and {name.split('.')[0]!r} is "
                f"one that its graphs {'need themselves' if parts[0] in _TAKEN else 'cannot spell'}. "
                f"Rename it, for example to `{parts[0]}_`."
            )
        if len(name) > _LONGEST or not re.fullmatch(r"[\w ./:+-]*", name):
            raise InvalidTask(
                f"The names of a model's parts must be letters, digits, `_`, `-`, `/`, `:`, `+` and spaces, at most "
                f"{_LONGEST} characters, got {name!r:.80}. Rename it."
            )


def _check_types(model: nn.Module, example: Example) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidTask(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    training = [name or "model" for name, m in model.named_modules() if m.training]
    if training:
        raise InvalidTask(
            f"`model` must be in eval mode, but `{training[0]}` is in training mode. Call `model.eval()`."
        )
    if not isinstance(example, tuple) or not all(isinstance(x, torch.Tensor) for x in example):
        kind = (
            f"tuple of {', '.join(type(x).__name__ for x in example)}"
            if isinstance(example, tuple)
            else type(example).__name__
        )
        raise InvalidTask(f"`example` must be a tuple of tensors, got {kind}. For one input write `example=(inputs,)`.")
    shapes = [tuple(x.shape) for x in example]
    if not shapes or any(not s or s[0] != shapes[0][0] or not s[0] for s in shapes):
        raise InvalidTask(
            f"`example` must hold tensors of one batch size, at least 1, got shapes {shapes}. Put the batch first."
        )
    tensors = [*example, *model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(t) for t in tensors):
        raise InvalidTask(
            "Every parameter must have a shape, but some of the model's are lazy. Call it once on `example` before."
        )
    elsewhere = {str(t.device) for t in tensors if t.device.type != "cpu"}
    if elsewhere:
        raise InvalidTask(
            f"`model` and `example` must be on the CPU, found {', '.join(sorted(elsewhere))}. "
            "Call `.cpu()`; a target names the device."
        )
