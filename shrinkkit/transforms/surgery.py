"""Cutting channels out of a model, and proving the cut right.

A cut is never taken on trust: `disproof` compares the model that was cut with the original
model in which the same weights are zero.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from shrinkkit.errors import Unsupported
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import FORWARD_ERRORS, Example, copied
from shrinkkit.transforms import groups
from shrinkkit.transforms.groups import Edit, Group

LARGE = 1 << 26
"""Parameters from which on a cut is proven in float32: copies in float64 would need several times the memory."""
Cut = Mapping[tuple[str, str], tuple[Edit, frozenset[int]]]
"""What each layer loses, by its name and the side that is cut."""


def cut_of(chosen: Iterable[tuple[Group, Iterable[int]]]) -> Cut:
    """Return what every layer loses when the units in `chosen` go."""
    result: dict[tuple[str, str], tuple[Edit, frozenset[int]]] = {}
    for group, units in chosen:
        gone = {root for unit in units for root in group.units[unit]}
        for edit in group.edits:
            idxs = frozenset(i for i, root in zip(edit.idxs, edit.roots, strict=True) if root in gone)
            key = (edit.name, edit.handler.__qualname__)
            result[key] = (edit, result[key][1] | idxs if key in result else idxs)
    return {key: (edit, idxs) for key, (edit, idxs) in result.items() if idxs}


def apply(model: nn.Module, cut: Cut, *, rescale: bool = True) -> nn.Module:
    """Cut `model` itself, and return it; weights that were shared stay shared.

    With `rescale`, attention that divides by the square root of its head size still divides by the old one.
    """
    trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    ties = _ties(model)
    hidden_sizes = groups.sizes_kept(model)
    attention = {m: m.embed_dim for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for edit, idxs in cut.values():
        owner, _, attribute = edit.name.rpartition(".")
        edit.handler.__self__.pruning_dim = edit.dim  # type: ignore[attr-defined]
        target = edit.target(model)
        for name in edit.shrinks:
            if size := groups.number(model.get_submodule(owner), [name]):
                setattr(model.get_submodule(owner), name, size * (len(edit.idxs) - len(idxs)) // len(edit.idxs))
        result = edit.handler(target, sorted(idxs))
        if isinstance(target, nn.Parameter):
            setattr(model.get_submodule(owner), attribute, result)
    for heads, channels in attention.items():
        if rescale and heads.embed_dim != channels:
            _rescale(heads, math.sqrt(heads.embed_dim / channels))
    for module, name, layers in hidden_sizes:
        if len({layer.hidden_size for layer in layers}) == 1:
            setattr(module, name, layers[0].hidden_size)
    touched = {name for name, _ in cut}
    for tied in ties:
        # A layer that never runs is in no cut, and follows one of its kind.
        first, *others = sorted(tied, key=lambda name: name.rpartition(".")[0] not in touched)
        kept, kind = model.get_parameter(first), type(model.get_submodule(first.rpartition(".")[0]))
        for name in others:
            owner, _, attribute = name.rpartition(".")
            follows = owner not in touched and isinstance(model.get_submodule(owner), kind)
            if not follows and not torch.equal(kept, model.get_parameter(name)):
                raise Unsupported(f"`{first}` and `{name}` share one weight but would lose different parts of it")
            setattr(model.get_submodule(owner), attribute, kept)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            # cuDNN wants the weights of a recurrent layer side by side in memory; elsewhere this does nothing.
            module.flatten_parameters()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])
    return model


def _ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    modules: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        # A module that is used twice is cut once, under its first name.
        first = modules.setdefault(id(model.get_submodule(owner)), owner)
        if first == owner:
            names.setdefault(id(parameter), []).append(name)
    return [tied for tied in names.values() if len(tied) > 1]


@torch.no_grad()
def _rescale(module: nn.MultiheadAttention, factor: float) -> None:
    weight = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
    for parameter in (p for p in (weight, module.in_proj_bias) if p is not None):
        parameter[: module.embed_dim] *= factor


class _WithoutStatistics(TorchFunctionMode):
    """Runs a model with its normalisations over channels reduced to their scale and shift.

    What they divide by depends on how many channels there are, so a cut changes it rightly; everything
    else must come out the same.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.layer_norm, functional.group_norm, functional.rms_norm):
            names = ("input", "groups", "weight", "bias")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            last = func is not functional.group_norm
            return _affine(given["input"], given.get("weight"), given.get("bias"), last=last)
        if func is functional.scaled_dot_product_attention and kwargs.get("scale") is None:
            kwargs = {**kwargs, "scale": 1.0}
        return func(*args, **kwargs)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, last: bool = True) -> Tensor:
    shape = weight.shape if last and weight is not None else (-1, *[1] * (x.dim() - 2))
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _without_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        known = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase))
        if "norm" in type(module).__name__.lower() and not known and list(own) in (["weight"], ["weight", "bias"]):
            module.forward = lambda x, m=module: _affine(x, m.weight, getattr(m, "bias", None))
    return model


def run(model: nn.Module, example: Example) -> list[Tensor]:
    """Return the output tensors of one call, without gradients and with the generator's state put back."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return outputs.tensors(model(*(t.clone() for t in example)))


def disproof(model: nn.Module, cut: Cut, example: Example) -> str:
    """Return why `cut` may not be made, or an empty string once it is proven right.

    A cut is right when the model that was cut computes exactly what `model` computes with the same
    weights set to zero, normalisation statistics and the scale of attention aside. `model` is left unchanged.
    """
    try:
        kept = _kept(model, cut)
        found = [t.shape for t in run(apply(_shared(model), cut), example)]
    except Unsupported as error:
        return str(error)
    except FORWARD_ERRORS as error:
        return f"cut, the model no longer runs: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    wanted = [t.shape for t in run(model, example)]
    if found != wanted:
        before, after = (", ".join(str(tuple(shape)) for shape in shapes) for shapes in (wanted, found))
        return f"the shape of the model's outputs would change from {before} to {after}"
    # One after the other, so that memory holds one copy at a time.
    if not _same(lambda: _masked(model, kept), lambda: apply(_shared(model), cut), model, example):
        return "cut, the model does not compute what it computes with the same weights set to zero"
    return ""


def _shared(model: nn.Module, change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor) -> nn.Module:
    """Return a copy of `model` whose parameters are what `change` returns for them; unchanged ones share memory."""
    named = model.named_parameters()
    return copied(model, {id(p): nn.Parameter(change(name, p.detach()), p.requires_grad) for name, p in named})


def _kept(model: nn.Module, cut: Cut) -> dict[str, list[Tensor]]:
    """Return which indices of each dimension of each parameter `cut` leaves."""
    kept: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for dim in range(max((p.dim() for p in model.parameters()), default=0)):

        def numbered(_: str, tensor: Tensor, dim: int = dim) -> Tensor:
            if tensor.dim() <= dim:
                return torch.zeros(1).expand(tensor.shape)
            shape = [-1 if i == dim else 1 for i in range(tensor.dim())]
            return torch.arange(tensor.shape[dim], dtype=torch.float32).reshape(shape).expand(tensor.shape)

        for name, parameter in apply(_shared(model, numbered), cut, rescale=False).named_parameters():
            if parameter.dim() > dim:
                line = tuple(slice(None) if i == dim else 0 for i in range(parameter.dim()))
                kept[name].append(parameter.detach()[line].long())
    return kept


def _masked(model: nn.Module, kept: Mapping[str, Sequence[Tensor]]) -> nn.Module:
    """Return a copy of `model` in which the weights that are not in `kept` are zero."""

    def zeroed(name: str, tensor: Tensor) -> Tensor:
        for dim, indices in enumerate(kept[name]):
            if len(indices) < tensor.shape[dim]:
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool).index_fill(0, indices, False).nonzero()[:, 0]
                tensor = tensor.index_fill(dim, gone.to(tensor.device), 0)
        return tensor

    return _shared(model, zeroed)


def _same(masked: Callable[[], nn.Module], pruned: Callable[[], nn.Module], model: nn.Module, example: Example) -> bool:
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3), (None, 5e-2)):
        if dtype is torch.float64 and sum(p.numel() for p in model.parameters()) > LARGE:
            continue
        x = tuple(t.to(dtype) if dtype and t.is_floating_point() else t for t in example)
        try:
            with _WithoutStatistics():
                found = [run(_without_norms(make().to(dtype) if dtype else make()), x) for make in (masked, pruned)]
        except FORWARD_ERRORS:
            # A forward that names a dtype runs only in its own; the comparison is then as fine as that allows.
            continue
        return all(_close(p, q, tolerance) for p, q in zip(*found, strict=True))
    return False


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = a.abs().max().item() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * max(scale, 1e-12), equal_nan=True)
