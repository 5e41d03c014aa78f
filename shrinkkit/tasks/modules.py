"""Functions on a user's `nn.Module`: its layers, parameters, multiply-accumulates and copies."""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from shrinkkit import quiet
from shrinkkit.core.studies import matches, with_parents
from shrinkkit.display import formats
from shrinkkit.display.tables import Cell, Column, Table
from shrinkkit.errors import InvalidInput, Unsupported, nearest

Example = tuple[torch.Tensor, ...]
"""Positional inputs of one call, batch first."""


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Return shape, dtype and values of `tensor` as bytes, for hashing."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tuple(tensor.shape)}{tensor.dtype}".encode() + values.view(torch.uint8).numpy().tobytes()


# What a model's own forward may raise when a tensor no longer has the shape it expects.
FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def duplicate(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model` without gradients; raises Unsupported if it cannot be copied."""
    return copied(model, {})


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of `model` without gradients, with what `memo` has for the ids of its tensors in their place.

    Raises Unsupported if it cannot be copied.
    """
    try:
        result: nn.Module = copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise Unsupported(
            f"`model` cannot be copied, and pruning never changes the model it is given: {error}. "
            "Detach tensors that are kept as plain attributes, and drop locks, files and generators."
        ) from error
    result.zero_grad(set_to_none=True)
    return result


def layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that hold parameters directly, in the model's order."""
    named = model.named_modules()
    return tuple(name for name, m in named if name and next(m.parameters(recurse=False), None) is not None)


def matching(names: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the `names` of modules that any pattern matches, in order; raises InvalidInput if one matches none.

    Patterns are names or globs (`*`, `?`, `[abc]`), case-sensitive; `*` also crosses dots. A pattern that matches a
    parent matches everything in it: `stages.0` matches `stages.0.conv1`.
    """
    names, matched = tuple(names), set[str]()
    for pattern in patterns:
        hits = {name for name in names if matches(pattern, name)}
        if not hits:
            parts = dict.fromkeys(part for name in names for part in with_parents(name))
            listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            text = f"A layer pattern must match a layer, but {pattern!r} matches none.{nearest(pattern, parts)}"
            raise InvalidInput(f"{text} Layers: {listed}.")
        matched |= hits
    return tuple(name for name in names if name in matched)


def parameters(model: nn.Module) -> int:
    """Count the parameters of a model.

    Args:
        model: Any module; it is left unchanged.

    Returns:
        Number of values in all parameters, shared ones counted once; buffers do not count.
    """
    return sum(p.numel() for p in model.parameters())


def sparsity(model: nn.Module) -> float:
    """Return the fraction of exact zeros among the weights of `model`, in [0, 1].

    Weights are parameters of two dimensions or more that are no biases, tied ones counted once.
    """
    weights = [p for name, p in model.named_parameters() if p.dim() > 1 and "bias" not in name.rpartition(".")[2]]
    total = sum(p.numel() for p in weights)
    return 1 - sum(int(torch.count_nonzero(p)) for p in weights) / total if total else 0.0


def macs(model: nn.Module, example: Example) -> int:
    """Count the multiply-accumulate operations (MACs) of one example.

    Args:
        model: Module in eval mode; it is left unchanged.
        example: Positional inputs of one call, batch first, on the model's device.

    Returns:
        MACs of convolutions, matrix products, attention and recurrent layers, divided by the batch size. Element-wise
        operations do not count.
    """
    return sum(layer_macs(model, example).values())


def layer_macs(model: nn.Module, example: Example) -> dict[str, int]:
    """Return the MACs of one example by layer; '' counts those outside any layer."""
    counter = FlopCounterMode(display=False)
    # Fused recurrent and attention kernels are opaque to the counter; their plain forms are not.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    plain = torch.backends.mkldnn.flags(enabled=not recurrent)
    with quiet.libraries(), torch.no_grad(), plain, plain_attention(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*example)
    root, counts, batch = type(model).__name__, counter.get_flop_counts(), example[0].shape[0]
    totals = {
        "" if name == "Global" else name.removeprefix(f"{root}."): sum(by_operator.values()) // (2 * batch)
        for name, by_operator in counts.items()
        if name != root
    }
    inside = Counter[str]()
    for name, n in totals.items():
        # The model itself is ''.
        inside[name.rpartition(".")[0]] += n if name else 0
    return {name: n - inside[name] for name, n in totals.items() if n > inside[name]}


class FunctionCalls(TorchFunctionMode):
    """Records the functions of torch that are called while the block runs, and keeps their tensors alive.

    `calls` holds the name of each function that returns a tensor, the tensors among its arguments, and its result.
    """

    def __init__(self) -> None:
        """Begin without calls."""
        super().__init__()
        self.calls: list[tuple[str, list[torch.Tensor], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(result)):
            given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.calls.append((func.__name__.lstrip("_"), given, result))
        return result


@contextlib.contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks of modules, such as `register_forward_hook` returns, while the block runs."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        yield


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off the fused inference path of nn.MultiheadAttention, which bypasses the layers inside it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def layers_table(model: "nn.Module", layer_macs: Mapping[str, int]) -> Table:
    """Return the layers of a model with their fraction of its parameters and MACs, most MACs first."""
    sizes = {name: sum(p.numel() for p in m.parameters(recurse=False)) for name, m in model.named_modules()}
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    total, work = sum(sizes.values()) or 1, sum(layer_macs.values()) or 1
    names = sorted(filter(lambda n: sizes[n] or layer_macs.get(n), sizes), key=lambda n: -layer_macs.get(n, 0))
    rows = tuple(
        (
            Cell(name or "(outside any layer)"),
            Cell(kinds[name]),
            Cell(formats.count(sizes[name]), formats.percent(sizes[name] / total)),
            Cell(formats.count(layer_macs.get(name, 0)), formats.percent(layer_macs.get(name, 0) / work)),
        )
        for name in names
    )
    columns = (Column("layer"), Column("kind"), Column("parameters", True), Column("MACs of one example", True))
    sums = f"{formats.count(sum(sizes.values()))} parameters, {formats.count(work)} MACs"
    caption = f"{formats.counted(len(rows), 'layer')}, {sums}; most work first"
    return Table(caption, columns, rows)
