"""What every step relies on in a user's model: eval mode, batch first, finite and repeatable outputs."""

import torch
from torch import nn

from shrinkkit import outputs
from shrinkkit.errors import InvalidTask
from shrinkkit.usercode import blaming

Example = tuple[torch.Tensor, ...]
"""Positional inputs of one call, batch first."""


def check(model: nn.Module, example: Example) -> None:
    """Return if `model` can be compressed and judged with `example`; both are left unchanged.

    Args:
        model: Trained model, as a task gives it.
        example: Positional inputs of one call, batch first.

    Raises:
        InvalidTask: `model` is no module, in training mode or not on the CPU, rejects `example`, writes to it,
            returns what is not finite, not batch first or not repeatable, or mixes the examples of a batch.
    """
    _check_types(model, example)
    with blaming("The model must accept `example`"), torch.inference_mode():
        before = [raw_bytes(x) for x in example]
        output = outputs.tensors(model(*example))
        again = outputs.tensors(model(*example))
    if before != [raw_bytes(x) for x in example]:
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
            "The model must give the same outputs for the same inputs, but two calls on `example` differ. "
            "Leave out what is random in eval mode, and state kept from one call to the next."
        )
    with (
        blaming("The model must accept a batch of any size, such as the first of `example` alone"),
        torch.inference_mode(),
    ):
        alone = outputs.tensors(model(*(x[:1] for x in example)))
    if not outputs.close(alone[:1], [output[0][:1]]):
        raise InvalidTask(
            "The output for an example must not depend on the rest of its batch, but the first of `example` alone "
            "gives another output. Use `batch_first=True` in recurrent layers, and no statistics over the batch."
        )


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Return shape, dtype and values of `tensor` as bytes, for hashing."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tuple(tensor.shape)}{tensor.dtype}".encode() + values.view(torch.uint8).numpy().tobytes()


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
    elsewhere = {str(t.device) for t in tensors if t.device.type != "cpu"}
    if elsewhere:
        raise InvalidTask(
            f"`model` and `example` must be on the CPU, found {', '.join(sorted(elsewhere))}. "
            "Call `.cpu()`; a target names the device."
        )
