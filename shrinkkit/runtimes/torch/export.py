"""Models captured by torch.export, and what is made of the graph: TorchScript, and calls of the layers int8 covers."""

import copy
import functools
import inspect
import operator as python
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from shrinkkit import quiet
from shrinkkit.errors import brief
from shrinkkit.runtimes.layers import RECURRENT, TRANSPOSED
from shrinkkit.tasks import calls, modules, outputs
from shrinkkit.tasks.modules import Example

NOWHERE = "_empty_nn_module_stack"
"""How torch.export names the module of an operator that is called in none."""
FAILURES = (TorchDynamoException, RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
"""What torch raises for a model that it cannot export."""
_FUNCTIONS = {
    **{name: getattr(F, name) for name in ("relu", "hardtanh", "hardswish", "leaky_relu", "elu")},
    **{name: getattr(F, name) for name in ("max_pool1d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")},
    **{name: getattr(torch, name) for name in ("cat", "flatten", "mean")},
    **{name: getattr(python, name) for name in ("add", "mul")},
}
"""Operators that pass integers on, in the form in which torch's quantizer knows them."""
_LAYERS: dict[type[nn.Module], str] = {
    **{kind: kind.__name__.lower() for kind in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, *RECURRENT)},
    **{kind: f"conv_transpose{i}d" for i, kind in enumerate(TRANSPOSED, 1)},
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), "batch_norm"),
}
"""Layers that int8 covers or that become part of one, and the operator that each of them calls."""


class HalfPrecision(nn.Module):
    """A model that computes in 16 bits behind float32 inputs and outputs, so that it can stand in for the original."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Hold `model`, which must already be in `dtype`."""
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Return the model's outputs, floating ones as float32."""
        cast = [x.to(self.dtype) if x.is_floating_point() else x for x in inputs]
        return outputs.convert(self.model(*cast), lambda y: y.float() if y.is_floating_point() else y)


def export(model: nn.Module, example: Example) -> tuple[torch.export.ExportedProgram, str]:
    """Return the exported program with a dynamic batch, or with a fixed one and a note where the model forbids it.

    Other dimensions are dynamic if they vary in the data of the task that the model is from; see `calls.varying`.
    `model` is in eval mode on the CPU, `example` the positional inputs of one call, batch first. Raises one of
    `FAILURES` if torch cannot export the model.
    """
    varies = calls.varying(model)
    # torch.export takes a batch of one for a constant.
    sample = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in varies.sample or example)
    batch = torch.export.Dim("batch", min=1)
    with quiet.libraries(), modules.plain_attention(), torch.no_grad():
        try:
            # One that takes *inputs has a single name for all of them.
            named = inspect.signature(model.forward).bind(*sample).arguments
            dims = iter(varies.dims or [frozenset[int]()] * len(sample))
            # torch finds out which of them are equal.
            dynamic = lambda _: {0: batch, **dict.fromkeys(sorted(next(dims)), torch.export.Dim.AUTO)}  # noqa: E731
            shapes = {name: tree_map(dynamic, value) for name, value in named.items()}
            return torch.export.export(model, sample, dynamic_shapes=shapes), ""
        except (torch._dynamo.exc.UserError, torch.fx.experimental.symbolic_shapes.ConstraintViolationError) as error:
            program = torch.export.export(model, example)
            return program, f"the batch is fixed at {example[0].shape[0]}: {brief(error)}"


def export_plain(model: nn.Module, example: Example) -> tuple[torch.export.ExportedProgram, str]:
    """Return the exported program, with outputs in tuples, lists and dicts only, and the note of `export`."""

    def is_plain(spec: Any) -> bool:
        return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(map(is_plain, spec.children())))

    program, note = export(model, example)
    return (program, note) if is_plain(program.call_spec.out_spec) else export(PlainOutputs(model), example)


class PlainOutputs(nn.Module):
    """A model whose outputs are tuples, lists and dicts, so that its file needs no other class."""

    def __init__(self, model: nn.Module) -> None:
        """Hold `model`."""
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Return the model's outputs in plain containers."""
        return outputs.plain(self.model(*inputs))


def save(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write `program` to `path`, without its example and the model's code."""
    # The example would be kept as a pickle, with everything that it is a view of.
    program._example_inputs = None
    # So would the model's code, line by line, with the paths of this machine.
    for node in program.graph.nodes:
        for key in ("stack_trace", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    with quiet.libraries():
        torch.export.save(program, path)


def script(module: fx.GraphModule) -> tuple[torch.jit.ScriptModule, list[tuple[str, str]]]:
    """Return a graph as TorchScript, and name and layer of each of its operators, in the order they run.

    The outputs become one tensor or a flat tuple. Tensors that the graph makes are made where its first input lies, so
    one file runs on any device. Raises RuntimeError if TorchScript has no form for an operator of the graph.
    """
    graph, root = copy.deepcopy(module.graph), dict[str, Any]()
    # The structure of inputs and outputs is Python's, which TorchScript does not know.
    graph.set_codegen(fx.graph.CodeGen())
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value, spelled = _attribute(module, node.target), re.sub(r"\W", "_", node.target)
            # Names that TorchScript can read, none of them that of a layer.
            node.target = names.setdefault(node.target, f"tensor{len(names)}_{spelled}")
            root[node.target] = value
        elif node.op == "call_module":
            root[node.target] = module.get_submodule(node.target)
        elif isinstance(node.target, torch._ops.OpOverload):
            sized = node.target is torch.ops.aten.sym_size.int
            node.target = torch.ops.aten.size if sized else node.target.overloadpacket
    _follow_input(graph)
    end = graph.output_node()
    results = end.args[0] if isinstance(end.args[0], list | tuple) else (end.args[0],)
    end.args = (results[0] if len(results) == 1 else tuple(results),)
    _take_name()
    scripted = torch.jit.script(fx.GraphModule(root, graph).eval())
    inner, stated = dict(scripted.named_modules()), list[tuple[str, str]]()
    for node in graph.nodes:
        if node.op == "call_module":
            # A recurrent layer has several forwards.
            kind = inner[node.target].original_name.lower()
            code = getattr(inner[node.target], "inlined_graph", None)
            stated += [
                (operator(k), layer_of(node) or node.target)
                for k in (_kinds(code) if code else (kind, f"quantized_{kind}"))
            ]
        elif node.op.startswith("call"):
            stated.append((operator(node.target), layer_of(node)))
    return scripted, stated


@functools.cache
def _take_name() -> torch.jit.ScriptModule:
    """Return a TorchScript graph that is kept, so that the types of all others are numbered, also that of the first."""
    return torch.jit.script(fx.GraphModule(nn.Module(), fx.symbolic_trace(nn.Identity()).graph))


def _kinds(graph: Any) -> list[str]:
    """Return the kind of each operator in a graph or branch of TorchScript."""
    nested = ([node.kind(), *(k for block in node.blocks() for k in _kinds(block))] for node in graph.nodes())
    return [kind for kinds in nested for kind in kinds]


def layered(program: ExportedProgram, model: nn.Module, *, distinct: bool) -> tuple[fx.GraphModule, fx.graph.CodeGen]:
    """Return the exported `program` as a graph that calls layers of torch wherever operators compute what int8 covers.

    Layers keep their names. Products of parameters that are in no such layer become Linear layers, and have the name of
    the parameter or of the module that holds it; for the layer of `model` see `layer_name`. With `distinct`, each call
    of one layer is a layer, such as `shared_call1`. The graph takes and returns tensors; the `CodeGen` that is returned
    too gives it the inputs and outputs of `model`.
    """
    if any(map(_writes, program.graph.nodes)):
        # The quantizer would lose what is written into a tensor.
        with quiet.libraries(), torch.no_grad():
            program = program.run_decompositions({})
    module = program.module(check_guards=False)
    convention, names = module.graph._codegen, dict(model.named_modules())
    module.graph.set_codegen(fx.graph.CodeGen())
    # A copy, since a graph must name what its module holds.
    graph = copy.deepcopy(module.graph)
    root: dict[str, Any] = {n.target: _attribute(module, n.target) for n in graph.nodes if n.op == "get_attr"}
    node: Any
    for node in list(graph.nodes):
        name = operator(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
        name = "batch_norm" if name == "_native_batch_norm_legit_no_training" else name
        if name in ("_assert_tensor_metadata", "dropout"):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif name == "sym_size":
            # torch's quantizer takes operators that it does not know for those of tensors.
            node.op, node.target = "call_method", "size"
        elif name == "view":
            # Integer convolutions order their outputs otherwise.
            node.target = torch.ops.aten.reshape.default
        elif name in _FUNCTIONS:
            operands = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
            numbers = all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in operands)
            if numbers and not node.kwargs and (name not in ("add", "mul") or len(operands) == 3):
                node.target = _FUNCTIONS[name]
        elif name and (found := _torch_layer(name, node, model) or _product(name, node, root, model)):
            target, layer, inputs = found
            stem, number = target, 0
            while target in root and (distinct or root[target] is not layer):
                target, number = f"{stem}_call{number + 1}", number + 1
            # The quantizer knows each module by one name.
            root[target] = copy.copy(layer) if number else layer
            node.op, node.target, node.args, node.kwargs = "call_module", target, inputs, {}
            node.meta["nn_module_stack"] = {target: (layer_name(target, names), "")}
            _unpack(node, layer)
    for node in graph.nodes:
        # What else is known of a node refers to all that was exported.
        node.meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _writes(node))
    return fx.GraphModule(root, graph), convention


def _writes(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def layer_name(target: str, names: Container[str]) -> str:
    """Return which module of `names` a layer of `layered` belongs to."""
    name = re.sub(r"_call\d+$", "", target)
    return name if name in names else name.rpartition(".")[0]


def _torch_layer(name: str, node: Any, model: nn.Module) -> tuple[str, nn.Module, Any] | None:
    """Return name, layer and inputs of the layer of torch that an operator is all of, None if there is none."""
    place, args = layer_of(node), node.args
    layer: Any = model.get_submodule(place)
    if _LAYERS.get(type(layer)) != name or getattr(layer, "padding_mode", "zeros") != "zeros":
        return None
    if getattr(layer, "padding", None) == "same":
        # Integer convolutions know padding by its number, equal on both sides.
        before, after = layer._reversed_padding_repeated_twice[::-2], layer._reversed_padding_repeated_twice[-2::-2]
        if before != after:
            return None
        layer = copy.copy(layer)
        layer.padding = tuple(before)
    inputs: Any = args[:1]
    if name in ("lstm", "gru"):
        inputs = (args[0], tuple(args[1]) if name == "lstm" else args[1])
    elif name == "embedding":
        with node.graph.inserting_before(node):
            # Its integer kernel needs that.
            inputs = (node.graph.call_function(torch.ops.aten.contiguous.default, (args[1],)),)
    return place or name, layer, inputs


def _product(name: str, node: Any, root: Mapping[str, Any], model: nn.Module) -> tuple[str, nn.Module, Any] | None:
    """Return name, Linear layer and inputs of a product with a matrix of parameters, None for another operator."""
    if name not in ("linear", "addmm", "mm", "matmul"):
        return None
    *first, x, matrix = node.args if name != "linear" else (*node.args[2:], *node.args[:2])
    weight, bias = _constant(matrix, root), _constant(first[0], root) if first else None
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or isinstance(bias, fx.Node):
        return None
    weight = weight if name == "linear" else weight.t().contiguous()
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    while matrix.op != "get_attr":
        matrix = matrix.all_input_nodes[0]
    owner, _, leaf = matrix.target.rpartition(".")
    alone = leaf == "weight" and next(model.get_submodule(owner).children(), None) is None
    return owner if owner and alone else f"{owner}.{leaf.removesuffix('_weight')}".removeprefix("."), layer.eval(), (x,)


def _unpack(node: Any, layer: nn.Module) -> None:
    """Give the users of an operator what they took from its outputs, now that a layer returns them, in place."""
    for user in [user for user in node.users if user.target is python.getitem]:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            user.replace_all_uses_with(node)
        elif isinstance(layer, nn.LSTM) and user.args[1]:
            with node.graph.inserting_before(user):
                states = node.graph.call_function(python.getitem, (node, 1))
            user.args = (states, user.args[1] - 1)


def _constant(value: Any, root: Mapping[str, Any]) -> Any:
    """Return the value of a node that depends on parameters alone, and anything else as it is."""
    if getattr(value, "op", "") not in ("get_attr", "call_function"):
        return value
    if value.op == "get_attr":
        return root[value.target]
    args, kwargs = fx.node.map_arg((value.args, value.kwargs), lambda node: _constant(node, root))
    known = not any(isinstance(x, fx.Node) for x in tree_leaves((args, kwargs)))
    return value.target(*args, **kwargs) if known and value.all_input_nodes else value


def _attribute(module: nn.Module, target: str) -> Any:
    owner, _, leaf = target.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def layer_of(node: fx.Node) -> str:
    """Return the name, in the task's model, of the innermost module that `node` was exported from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    name = str(stack[-1][0]) if stack and NOWHERE not in stack[-1][0] else ""
    # A model in 16 bits, or with outputs of other classes, is held in another module, as `model`.
    for _, kind in stack:
        if not str(kind).endswith((f".{HalfPrecision.__name__}", f".{PlainOutputs.__name__}")):
            break
        name = name.removeprefix("model").removeprefix(".")
    return name


def operator(target: Any) -> str:
    """Return an operator's name without the name space of torch itself, and without its overload."""
    name = target if isinstance(target, str) else getattr(target, "_qualified_op_name", None)
    if name is None:
        name = str(target.name()) if hasattr(target, "name") else getattr(target, "__name__", "")
    return name.removeprefix("aten::").partition(".")[0]


def _follow_input(graph: fx.Graph) -> None:
    """Make tensors on the device of the first input wherever `graph` names a device, in place."""
    first = next((node for node in graph.nodes if node.op == "placeholder"), None)
    placed = [node for node in graph.nodes if isinstance(node.kwargs.get("device"), torch.device)]
    if first and placed:
        with graph.inserting_before(first.next):
            device = graph.call_function(getattr, (first, "device"))
        for node in placed:
            node.kwargs = {**node.kwargs, "device": device}
