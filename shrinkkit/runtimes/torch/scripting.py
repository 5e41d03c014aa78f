"""Exported programs as TorchScript, the one form of file that torch has for models in float and for its int8 layers.

Baseline and variant must run in the same form, or a speed-up contains the form's own: the interpreter of TorchScript
takes less time for each operator than Python does, which is half of the time of a small model.
"""

import copy
import re
from typing import Any

import torch
from torch import fx, nn

NOWHERE = "_empty_nn_module_stack"
"""How torch.export names the module of an operator that is called in none."""


def script(program: torch.export.ExportedProgram) -> tuple[torch.jit.ScriptModule, list[tuple[str, str]]]:
    """Return `program` as TorchScript, and the layer of each of its operators, in the order they run.

    The outputs become one tensor or a flat tuple. Tensors that the program makes are made where its first input lies,
    so one file runs on any device.

    Args:
        program: What torch.export returned.

    Returns:
        The script, and for each operator its name, such as `conv2d`, and the layer that it was exported from.

    Raises:
        RuntimeError: TorchScript has no form for an operator of the program.
    """
    module = program.module(check_guards=False)
    graph, root = copy.deepcopy(module.graph), nn.Module()
    # The structure of inputs and outputs is Python's, which TorchScript does not know.
    graph.set_codegen(fx.graph.CodeGen())
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = _register(root, names, node.target, module)
        elif isinstance(node.target, torch._ops.OpOverload):
            sized = node.target is torch.ops.aten.sym_size.int
            node.target = torch.ops.aten.size if sized else node.target.overloadpacket
    _follow_input(graph)
    end = graph.output_node()
    results = end.args[0] if isinstance(end.args[0], list | tuple) else (end.args[0],)
    end.args = (results[0] if len(results) == 1 else tuple(results),)
    layers = [
        (operator(n.target), layer_of(n)) for n in graph.nodes if isinstance(n.target, torch._ops.OpOverloadPacket)
    ]
    return torch.jit.script(fx.GraphModule(root, graph).eval()), layers


def layer_of(node: fx.Node) -> str:
    """Return the name, in the task's model, of the innermost module that `node` was exported from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    name = str(stack[-1][0]) if stack and NOWHERE not in stack[-1][0] else ""
    # A model in 16 bits, or with outputs of its own classes, is held in another module, as `model`.
    for _, kind in stack:
        if not str(kind).endswith(("quantize.HalfPrecision", "artifacts.PlainOutputs")):
            break
        name = name.removeprefix("model").removeprefix(".")
    return name


def operator(target: Any) -> str:
    """Return an operator's name without the name space of torch's own, and without its overload."""
    name = target if isinstance(target, str) else getattr(target, "_qualified_op_name", None) or str(target.name())
    return name.removeprefix("aten::").partition(".")[0]


def _register(root: nn.Module, names: dict[str, str], target: str, module: fx.GraphModule) -> str:
    """Give `root` the tensor `target` of `module` and return its name there, one that TorchScript can read."""
    if target not in names:
        name = re.sub(r"\W", "_", target)
        while name in names.values() or not name.isidentifier() or hasattr(root, name):
            name = f"_{name}"
        names[target] = name
        owner, _, last = target.rpartition(".")
        value = getattr(module.get_submodule(owner), last)
        if isinstance(value, nn.Parameter):
            root.register_parameter(name, value)
        else:
            root.register_buffer(name, value)
    return names[target]


def _follow_input(graph: fx.Graph) -> None:
    """Make tensors on the device of the first input wherever `graph` names a device, in place."""
    first = next((node for node in graph.nodes if node.op == "placeholder"), None)
    placed = [node for node in graph.nodes if isinstance(node.kwargs.get("device"), torch.device)]
    if first is None or not placed:
        return
    with graph.inserting_before(first.next):
        device = graph.call_function(getattr, (first, "device"))
    for node in placed:
        node.kwargs = {**node.kwargs, "device": device}
