"""Dependency groups: which layers must lose channels together.

A torch-pruning dependency graph proposes the groups; `surgery.disproof` verifies each of them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shrinkkit.errors import InvalidInput, Unsupported
from shrinkkit.tasks import modules, outputs
from shrinkkit.tasks.modules import FORWARD_ERRORS, Example

Recurrent = nn.RNNBase | nn.RNNCellBase
COUNTED = (_ConvNd, nn.Linear, Recurrent, nn.MultiheadAttention)
"""The layer types whose output channels are pruned and counted."""

HEAD_COUNTS = ("num_heads", "n_heads", "heads", "n_head", "num_attention_heads")
HEAD_SIZES = ("head_dim", "dim_head", "head_size", "attention_head_size", "key_value_proj_dim")
"""Attributes by which attention says into how many heads, or of what size, its linear layers are divided."""
KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
INNER_SIZES = ("all_head_size", "inner_dim", "split_size", "attn_dim")
"""How many heads the keys have, where fewer than the queries, and all channels of all heads."""


def is_conv1d(layer: object) -> bool:
    """Return whether `layer` is a linear layer whose weight is stored transposed, as in GPT-2."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and hasattr(layer, "nx")


def is_linear(layer: object) -> bool:
    """Return whether `layer` is a linear layer of either layout."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


@dataclass(frozen=True)
class Edit:
    """What one layer or parameter loses when channels of its group go."""

    name: str
    handler: Callable[[Any, list[int]], Any]
    dim: int
    out: bool
    """Output channels (True), or only the input channels that read them."""
    idxs: tuple[int, ...]
    roots: tuple[int, ...]
    """For each of `idxs`, the channel of the group's first layer that it belongs to."""
    shrinks: tuple[str, ...] = ()
    """Numbers of the parent module that shrink alike, where it has them."""

    def target(self, model: nn.Module) -> Any:
        """Return the module or parameter of `model` that loses them."""
        owner, _, attribute = self.name.rpartition(".")
        return getattr(model.get_submodule(owner), attribute) if self.name else model


@dataclass(frozen=True)
class Group:
    """Layers that can only lose channels together."""

    layers: tuple[str, ...]
    edits: tuple[Edit, ...]
    units: tuple[tuple[int, ...], ...]
    """Channels that go or stay as one: one a unit, or one of each convolution group or head."""
    makes_output: bool
    refusal: str = ""
    alternatives: tuple["Group", ...] = ()
    """Other cuts of the same layers, to try in order where this one is disproved."""

    def costs(self) -> list[int]:
        """Return how many output channels of counted layers go with each unit."""
        outs = [edit for edit in self.edits if edit.out and edit.name in self.layers]
        per_root = Counter(root for edit in outs for root in edit.roots)
        return [sum(per_root[root] for root in unit) for unit in self.units]


def counted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of `model` whose output channels count, by name; a shared one once."""
    inner = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {n: m for n, m in model.named_modules() if (isinstance(m, COUNTED) or is_conv1d(m)) and id(m) not in inner}


def width(layer: nn.Module) -> int:
    """Return the number of output channels or features of a counted layer."""
    if isinstance(layer, Recurrent):
        return recurrent_width(layer)
    for attribute in ("out_channels", "out_features", "embed_dim", "hidden_size", "nf"):
        if hasattr(layer, attribute):
            return int(getattr(layer, attribute))
    raise InvalidInput(f"`layer` must be a convolution, linear, recurrent or attention layer, got {type(layer)}.")


def widths(model: nn.Module) -> dict[str, int]:
    """Return the number of output channels of each counted layer of `model`, by name."""
    return {name: width(layer) for name, layer in counted(model).items()}


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention in heads, by the linear layers around them."""

    module: nn.Module
    makes: tuple[nn.Module, ...]
    """One layer for queries, keys and values, or one for each, in this order."""
    reader: nn.Module
    """What reads the attended values."""

    @property
    def queries(self) -> int:
        """Channels of all heads of the queries."""
        return int(self.reader.nx if is_conv1d(self.reader) else self.reader.in_features)  # type: ignore[arg-type]

    @property
    def keys(self) -> int:
        """Channels of all heads of the keys; fewer than of the queries where these share them."""
        return (width(self.makes[0]) - self.queries) // 2 if len(self.makes) == 1 else width(self.makes[1])

    @property
    def size(self) -> int:
        """Channels of one head; 0 if `module` does not say."""
        size, count = (number(self.module, names) for names in (HEAD_SIZES, HEAD_COUNTS))
        return size or (self.queries // count if count else 0)

    def fits(self) -> bool:
        """Return whether the widths of the layers are those of heads."""
        wanted = [self.queries, self.keys, self.keys]
        found = [width(layer) for layer in self.makes]
        whole = self.size and self.keys > 0 and not (self.queries % self.keys or self.keys % self.size)
        return bool(whole) and found in (wanted, [sum(wanted)])

    def shortcut(self) -> Iterator[Any]:
        """Hook the layers so that autograd sees a single node between them."""
        made: list[Tensor] = []

        def keep(layer: nn.Module, given: Any, returned: Tensor) -> Tensor:
            made.append(returned)
            return returned.detach()

        def tie(layer: nn.Module, given: Any) -> Any:
            tied = _one_node(given[0].detach(), made)
            made.clear()
            return tied, *given[1:]

        yield from (layer.register_forward_hook(keep) for layer in self.makes)
        yield self.reader.register_forward_pre_hook(tie)

    def group(self, names: Mapping[nn.Module, str], pruner: Callable[[nn.Module], Any]) -> Group:
        """Return the group of whole heads; its alternatives cut the same channels of every head.

        Heads of keys go with all queries that share them.
        """
        size, keys, rows = self.size, tuple(range(self.keys)), range(self.queries)
        shared = tuple(i // size * self.keys // self.queries * size + i % size for i in rows)
        joint = (*shared, *keys, *keys)
        # One layer for all three holds all queries first, or the three parts of one head after another.
        by_head = tuple(i // (3 * size) * size + i % size for i in range(len(joint)))
        layouts = [(shared, keys, keys)] if len(self.makes) == 3 else [(joint,), (by_head,)]
        heads = tuple(tuple(range(i, i + size)) for i in range(0, self.keys, size))
        channels = tuple(tuple(range(i, self.keys, size)) for i in range(size))
        layers = tuple(names[layer] for layer in self.makes)
        first, *others = [
            Group(layers, tuple(self._edits(layout, shared, shrinks, names, pruner)), units, False)
            for units, shrinks in ((heads, HEAD_COUNTS + KEY_COUNTS), (channels, HEAD_SIZES))
            for layout in layouts
            if len(units) > 1
        ] or [Group(layers, (), ((0,),), False)]
        return replace(first, alternatives=tuple(others))

    def _edits(
        self,
        layout: Sequence[tuple[int, ...]],
        reads: tuple[int, ...],
        shrinks: tuple[str, ...],
        names: Mapping[nn.Module, str],
        pruner: Callable[[nn.Module], Any],
    ) -> Iterator[Edit]:
        for layer, roots in zip((*self.makes, self.reader), (*layout, reads), strict=True):
            out = layer is not self.reader
            cut = pruner(layer).prune_out_channels if out else pruner(layer).prune_in_channels
            numbers = (*shrinks, *INNER_SIZES) if layer is self.makes[0] else ()
            yield Edit(names[layer], cut, int(out == is_conv1d(layer)), out, tuple(range(len(roots))), roots, numbers)


def number(module: nn.Module, names: Iterable[str]) -> int:
    """Return the first of the attributes `names` of `module` that is a number above 0; 0 if none is."""
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)


def attentions(model: nn.Module, example: Example) -> list[Attention]:
    """Return the attention of `model` between linear layers that are modules; runs it once on `example`."""
    calls: list[tuple[nn.Module, Any]] = []
    ends: dict[nn.Module, Any] = {}

    def note(module: nn.Module, given: Any, returned: Any) -> None:
        if is_linear(module):
            calls.append((module, next(iter(given), None)))
        ends[module] = next(iter(outputs.tensors(returned)), None)

    with modules.hooked(module.register_forward_hook(note) for module in model.modules()), torch.no_grad():
        model(*(t.clone() for t in example))
    called = [layer for layer, _ in calls]
    found = []
    for module in ends:
        inside = [layer for layer in called if layer in module._modules.values()]
        # The layer after the heads is the last one inside, or reads what the module returns.
        after = [r for r, given in calls if given is not None and given is ends[module] and r not in inside]
        *makes, reader = inside if len(inside) in (2, 4) else [*inside, *(after or [module])[:1]]
        one = Attention(module, tuple(makes), reader)
        # A layer that is called several times makes several things.
        once = all(called.count(layer) == 1 for layer in (*makes, reader))
        if len(makes) in (1, 3) and is_linear(reader) and once and one.fits():
            found.append(one)
    return found


class _OneNode(torch.autograd.Function):
    """Passes tensors through as the outputs of one autograd node fed by the anchors."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("A traced model is never differentiated.")


class _Followable(TorchFunctionMode):
    """Shows the graph what it can follow.

    Sequences of features are split and joined along their second dimension, and padded in a single node; steps,
    or the states of each layer, are taken from them one by one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = _argument(args, kwargs, 0, "tensors", None)
        if func is torch._pad_packed_sequence:
            with torch.no_grad():
                made = func(*args, **kwargs)
            return _one_node(made, [first])
        taken_apart = func in (torch.unbind, Tensor.unbind) and _argument(args, kwargs, 1, "dim", 0) == 0
        if taken_apart and first is not None and first.dim() == 3:
            return tuple(first.select(0, i) for i in range(first.shape[0]))
        if func in (torch.chunk, torch.split, torch.cat, torch.concat, Tensor.chunk, Tensor.split):
            joins = func in (torch.cat, torch.concat)
            dim = _argument(args, kwargs, 1 if joins else 2, "dim", 0)
            if first is not None and (first[0] if joins else first).dim() == 3 and dim in (2, -1):
                kwargs = {**{k: v for k, v in kwargs.items() if k not in ("dim", "tensors")}, "dim": 1}
                if joins:
                    return func([t.transpose(1, 2) for t in first], **kwargs).transpose(1, 2)
                return tuple(t.transpose(1, 2) for t in func(first.transpose(1, 2), *args[1:2], **kwargs))
        return func(*args, **kwargs)


def _argument(args: Any, kwargs: Any, at: int, name: str, default: Any) -> Any:
    return args[at] if len(args) > at else kwargs.get(name, default)


def _forward(attention: Sequence["Attention"], model: nn.Module, example: Example) -> Any:
    def tied_to_states(layer: Recurrent, args: Any, kwargs: Any, made: Any) -> Any:
        states = _states(layer, args, kwargs)
        return _one_node(made, states) if states else made

    layers = [m for m in model.modules() if isinstance(m, Recurrent)]
    # Hooked only now: torch-pruning's own hooks must see what a layer made before its states are tied to it.
    hooks = [layer.register_forward_hook(tied_to_states, with_kwargs=True) for layer in layers]
    with modules.hooked([*hooks, *(hook for one in attention for hook in one.shortcut())]), _Followable():
        return model(*(t.clone() for t in example))


def _states(layer: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the initial states given to a recurrent layer that have as many channels as each of its directions."""
    if not isinstance(layer, Recurrent):
        return []
    given = pytree.tree_leaves(_argument(args, kwargs, 1, "hx", None))
    tensors = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
    return [t for t in tensors if t.shape[-1] == units(layer)]


def _one_node(made: Any, anchors: Iterable[Tensor]) -> Any:
    leaves, shape = pytree.tree_flatten(made)
    found = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
    passed = _OneNode.apply(len(found), *(leaves[i] for i in found), *anchors)  # type: ignore[no-untyped-call]
    for i, tensor in zip(found, passed, strict=True):
        leaves[i] = tensor
    return pytree.tree_unflatten(leaves, shape)


def _as_one_node(layer: nn.Module) -> None:
    # The graph is read off autograd; a layer made of many operations would show its insides there.
    forward = layer.forward

    def traced(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            made = forward(*args, **kwargs)
        states = {id(t) for t in _states(layer, args, kwargs)}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        return _one_node(made, [*(t for t in given if id(t) not in states), next(layer.parameters())])

    layer.forward = traced


def groups(model: nn.Module, example: Example) -> list[Group]:
    """Return the groups of layers of `model` that must lose channels together.

    `model` is left unchanged. Runs it once on `example`. Raises Unsupported if the model's forward cannot be traced by
    autograd.
    """
    weights = {id(p): nn.Parameter(p.detach(), p.is_floating_point()) for p in model.parameters()}
    traced = modules.copied(model, dict[int, Any](weights)).eval()
    pruners: dict[type, Any] = {type(m): Pruner() for m in traced.modules() if isinstance(m, Recurrent)}
    for module in traced.modules():
        if isinstance(module, (Recurrent, nn.MultiheadAttention)):
            _as_one_node(module)
    pruners |= {type(m): Conv1DPruner() for m in traced.modules() if is_conv1d(m)}
    graph = tp.DependencyGraph()
    try:
        heads = attentions(traced, example)
        with torch.enable_grad():
            graph.build_dependency(
                traced,
                example_inputs=example,
                forward_fn=partial(_forward, heads),
                # The extra multiplication adds a node, which marks where outputs are made.
                output_transform=lambda out: [t * 1 for t in outputs.tensors(out) if t.requires_grad],
                customized_pruners=pruners,
                verbose=False,
            )
        for node in graph.module2node.values():
            # torch-pruning stops following splits after any three-dimensional parameter, such as positions.
            node.enable_index_mapping |= node.type == tp.ops.OPTYPE.SPLIT
        return list(_groups(graph, traced, heads))
    except FORWARD_ERRORS as error:
        text = f"The layers of `model` cannot be traced: {type(error).__name__}: {str(error).rstrip('.')}."
        remedy = "Its forward must run on `example` under autograd; `prune.weights` needs no trace."
        raise Unsupported(f"{text} {remedy}") from error


def _groups(graph: Any, model: nn.Module, attention: Sequence[Attention]) -> Iterator[Group]:
    names = {module: name for name, module in model.named_modules()}
    prunable, sealed = set(counted(model).values()), _sealed(model)
    traced = [m for m in graph.module2node if m in prunable]
    seen: set[Any] = {layer for one in attention for layer in one.makes}
    grouped = {names[layer] for layer in seen}
    for one in (one.group(names, graph.get_pruner_of_module) for one in attention):
        yield replace(one, refusal=_refusal(one.edits, sealed))
    for module in traced:
        # A single channel scales all channels of what it meets, and so does not shrink with them.
        if module in seen or width(module) == 1:
            continue
        root, cut, size = module, graph.get_pruner_of_module(module).prune_out_channels, width(module)
        found = graph.get_pruning_group(root, cut, list(range(size)))
        parts = _with_tied(graph, found, size, names)
        edits = tuple({(e.name, e.out): e for part in parts for e in _edits(graph, part, names)}.values())
        seen.add(module)
        together = [dep for part in parts for dep, _ in part]
        seen.update(dep.target.module for dep in together if _is_out(graph, dep))
        pieces = max(_pieces(dep.target.module, graph, dep.handler) for dep in together)
        refusal = _refusal(edits, sealed)
        if size % pieces:
            refusal, pieces = f"has {size} channels, which do not divide into {pieces} groups or heads", 1
        layers = tuple(n for m, n in names.items() if m in prunable and any(e.out and e.name == n for e in edits))
        grouped.update(layers)
        makes_output = any(dep.target.type == tp.ops.OPTYPE.OUTPUT for dep in together)
        yield Group(layers, edits, _units(graph, found, (root, cut), size, pieces), makes_output, refusal)
    for module in [m for m in traced if names[m] not in grouped]:
        refusal = "" if width(module) == 1 else "meets layers that have another number of channels"
        yield Group((names[module],), (), ((0,),), False, refusal)


def _refusal(edits: Iterable[Edit], sealed: Mapping[str, str]) -> str:
    return next((f"cannot shrink, because `{e.name}` {sealed[e.name]}" for e in edits if e.name in sealed), "")


def _with_tied(graph: Any, found: Any, size: int, names: Mapping[Any, str]) -> list[Any]:
    """Return torch-pruning's group `found`, and those of the layers that use a weight of it as their own too."""
    parts, inside = [found], {dep.target.module for dep, _ in found}
    for part in parts:
        for dep, idxs in part:
            layer = dep.target.module
            weight = getattr(layer, "weight", None) if dep.handler == _columns(graph, layer) else None
            tied = [m for m in names if m is not layer and isinstance(m, (nn.Embedding, nn.Linear))]
            for other in [m for m in tied if weight is not None and m.weight is weight]:
                if other not in inside and other in graph.module2node and list(idxs) == list(range(size)):
                    parts.append(graph.get_pruning_group(other, _columns(graph, other), list(idxs)))
                    inside.update(dep.target.module for dep, _ in parts[-1])
    return parts


def _columns(graph: Any, layer: Any) -> Any:
    """Return what cuts the second dimension of a layer's weight."""
    pruner = graph.get_pruner_of_module(layer)
    return pruner.prune_out_channels if isinstance(layer, nn.Embedding) else pruner.prune_in_channels


def _is_out(graph: Any, dependency: Any) -> bool:
    return bool(graph.is_out_channel_pruning_fn(dependency.handler))


def _units(graph: Any, found: Any, root: tuple[Any, Any], size: int, pieces: int) -> tuple[tuple[int, ...], ...]:
    unit_of = [i % (size // pieces) for i in range(size)]
    splitting = (tp.ops.OPTYPE.SPLIT, tp.ops.OPTYPE.UNBIND, tp.ops.OPTYPE.SLICE)
    if any(dep.target.type in splitting for dep, _ in found):
        for i, k in _ties_within(graph, root, size):
            old, new = unit_of[k], unit_of[i]
            unit_of = [new if unit == old else unit for unit in unit_of] if old != new else unit_of
    members: dict[int, list[int]] = {}
    for i, unit in enumerate(unit_of):
        members.setdefault(unit, []).append(i)
    return tuple(tuple(unit) for unit in members.values())


def _ties_within(graph: Any, root: tuple[Any, Any], size: int) -> list[tuple[int, int]]:
    """Return the pairs of channels of one layer that are tied, because parts of it meet again as in a gated unit."""

    def reached(idxs: list[int]) -> list[tuple[int, int]]:
        group = graph.get_pruning_group(*root, idxs)
        same = [one for one in group if one.dep.target.module is root[0] and one.dep.handler == group[0].dep.handler]
        return [(r, i) for one in same for i, r in zip(one.idxs, one.root_idxs, strict=True)]

    # Asking for each channel by itself takes minutes on a wide layer; equal parts are what models split into.
    for parts in (2, 3, 4):
        if size % parts == 0:
            first = reached(list(range(size // parts)))
            if len({i for _, i in first}) == size:
                return first
    half = size // 2
    sides = reached(list(range(half))), reached(list(range(half, size)))
    if all(len({i for _, i in side}) == count for side, count in zip(sides, (half, size - half), strict=True)):
        return []
    return [pair for i in range(size) for pair in reached([i])]


def _edits(graph: Any, found: Any, names: Mapping[Any, str]) -> Iterator[Edit]:
    for i, (dep, idxs) in enumerate(found):
        target = dep.target.module
        name = graph._param_to_name.get(target) if isinstance(target, nn.Parameter) else names.get(target)
        out, roots = _is_out(graph, dep), found[i].root_idxs
        there = (graph.get_out_channels if out else graph.get_in_channels)(dep.target)
        # The trace follows channels through sums and broadcasts over them, where there are none any more.
        if name is not None and None not in roots and there is not None and max(idxs) < there:
            yield Edit(name, dep.handler, dep.target.pruning_dim, out, tuple(idxs), tuple(roots))


def _pieces(module: Any, graph: Any, handler: Any) -> int:
    if isinstance(module, _ConvNd) and module.groups == module.out_channels == module.in_channels:
        return 1
    out = graph.is_out_channel_pruning_fn(handler)
    if out and isinstance(module, nn.MultiheadAttention):
        return int(module.num_heads)
    pruner = graph.get_pruner_of_module(module)
    return int(pruner.get_out_channel_groups(module) if out else pruner.get_in_channel_groups(module))


def _sealed(model: nn.Module) -> dict[str, str]:
    found = {}
    for name, module in model.named_modules():
        hooked = any(hasattr(hook, "name") for hook in module._forward_pre_hooks.values())
        if parametrize.is_parametrized(module) or (hooked and hasattr(module, "weight_g")):
            found[name] = "is parametrized; make its weight plain first, see `torch.nn.utils.parametrize`"
    return found


def units(layer: Recurrent) -> int:
    """Return the number of output channels of `layer` in one direction; also those of its first initial state."""
    return _projection(layer) or layer.hidden_size


def recurrent_width(layer: Recurrent) -> int:
    """Return the number of output channels of `layer`, both directions together."""
    return units(layer) * _directions(layer)


def rows(layer: Recurrent, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what makes each output channel of `layer`, its rows in all gates of all matrices: (channels, weights).

    `value` is applied to each matrix before its rows are taken. Channels of both directions that go together have the
    same row.
    """
    kind = "weight_hr" if _projection(layer) else "weight"
    weights = [value(layer.get_parameter(name)) for name in _weights(layer) if name.startswith(kind)]
    gates = [w.reshape(-1, units(layer), w.shape[1]).transpose(0, 1).flatten(1) for w in weights]
    return torch.cat(gates, dim=1).repeat(_directions(layer), 1)


def columns(layer: Recurrent, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what reads each input channel of `layer`, shape (channels, weights of one); `value` as for `rows`."""
    return torch.cat([value(layer.get_parameter(name)).T for name in _first(layer)], dim=1)


def sizes_kept(model: nn.Module) -> list[tuple[nn.Module, str, list[Recurrent]]]:
    """Return where modules of `model` keep the hidden size of recurrent layers inside them, and of which layers.

    Such an attribute, `hidden_size` or `nhid` for example, is what a forward makes an initial state of zeros by.
    """
    found = []
    for module in model.modules():
        layers = [m for m in module.modules() if isinstance(m, Recurrent) and m is not module]
        for attribute, value in vars(module).items():
            same = [layer for layer in layers if type(value) is int and layer.hidden_size == value]
            if same and "hid" in attribute:
                found.append((module, attribute, same))
    return found


class Conv1DPruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Cuts channels of a linear layer whose weight is stored transposed, for torch-pruning."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Cut the output channels `idxs` out of `layer` itself, and return it."""
        keep = sorted(set(range(layer.nf)) - set(idxs))
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 1)
        layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
        layer.nf = len(keep)
        return layer  # type: ignore[no-any-return]

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Cut the input channels `idxs` out of `layer` itself, and return it."""
        keep = sorted(set(range(layer.nx)) - set(idxs))
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        layer.nx = len(keep)
        return layer  # type: ignore[no-any-return]

    def get_out_channels(self, layer: Any) -> int:
        """Return the number of output channels."""
        return int(layer.nf)

    def get_in_channels(self, layer: Any) -> int:
        """Return the number of input channels."""
        return int(layer.nx)


class Pruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Cuts channels out of all layers and directions of a recurrent layer alike, for torch-pruning."""

    def prune_out_channels(self, layer: Recurrent, idxs: Sequence[int]) -> Recurrent:
        """Cut the output channels `idxs` out of `layer` itself, and return it; each direction loses the same."""
        size = units(layer)
        keep = sorted(set(range(size)) - {i % size for i in idxs})
        both = [direction * size + i for direction in range(_directions(layer)) for i in keep]
        first = _first(layer)
        for name in _weights(layer):
            weight = layer.get_parameter(name)
            if name.startswith("weight_hr") or not _projection(layer):
                made = [gate * size + i for gate in range(weight.shape[0] // size) for i in keep]
                weight = self._prune_parameter_and_grad(weight, made, 0)
            if name.startswith("weight_hh"):
                weight = self._prune_parameter_and_grad(weight, keep, 1)
            elif name.startswith("weight_ih") and name not in first:
                weight = self._prune_parameter_and_grad(weight, both, 1)
            setattr(layer, name, weight)
        setattr(layer, "proj_size" if _projection(layer) else "hidden_size", len(keep))
        return layer

    def prune_in_channels(self, layer: Recurrent, idxs: Sequence[int]) -> Recurrent:
        """Cut the input channels `idxs` out of `layer` itself, and return it."""
        keep = sorted(set(range(layer.input_size)) - set(idxs))
        for name in _first(layer):
            setattr(layer, name, self._prune_parameter_and_grad(layer.get_parameter(name), keep, 1))
        layer.input_size = len(keep)
        return layer

    def get_out_channels(self, layer: Recurrent) -> int:
        """Return the number of output channels, both directions together."""
        return recurrent_width(layer)

    def get_in_channels(self, layer: Recurrent) -> int:
        """Return the number of input channels."""
        return layer.input_size

    def get_out_channel_groups(self, layer: Recurrent) -> int:
        """Return how many equal parts of the output channels must lose the same ones."""
        return _directions(layer)


def _directions(layer: Recurrent) -> int:
    return 2 if getattr(layer, "bidirectional", False) else 1


def _projection(layer: Recurrent) -> int:
    return getattr(layer, "proj_size", 0)


def _weights(layer: Recurrent) -> list[str]:
    return [name for name, _ in layer.named_parameters()]


def _first(layer: Recurrent) -> list[str]:
    """Return the matrices that read the input of `layer`, one a direction."""
    return [name for name in _weights(layer) if name in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")]
