"""Int8 for inductor: torch.export's quantization, which inductor compiles into integer kernels.

Source: PyTorch, "PyTorch 2 Export Quantization with X86 Backend through Inductor".
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from shrinkkit import quiet
from shrinkkit.core.variant import LayerPrecision
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes import artifacts
from shrinkkit.runtimes.inductor import compiled
from shrinkkit.tasks import modules, outputs
from shrinkkit.tasks.modules import Example

_FAILURES = (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, TypeError, AssertionError, KeyError)
_PRODUCTS = {
    "aten::linear": "torch.nn.modules.linear.Linear",
    **{f"aten::conv{n}d": f"torch.nn.modules.conv.Conv{n}d" for n in (1, 2, 3)},
}
"""Operators that int8 may cover, and the modules by whose names torchao knows them."""


def write(
    model: nn.Module,
    example: Example,
    calibration: Sequence[Example],
    path: Path,
    *,
    method: str,
    skipped: frozenset[str],
    narrow: bool = False,
) -> tuple[Any, Mapping[str, LayerPrecision], str]:
    """Write `model` in int8 as an exported program, and return what it computes and how inductor runs it.

    `model` is left unchanged. Weights are int8 per output channel. Each is kept once, under the name of its layer, and
    loading the file needs nothing but torch.

    Args:
        model: Float model in eval mode, on the CPU.
        example: Positional inputs of one call, batch first.
        calibration: Inputs that set the ranges of activations, for `static-int8`.
        path: Where the program goes, `.pt2`.
        method: `dynamic-int8` (Linear) or `static-int8` (convolutions too).
        skipped: Names of modules to leave in float.
        narrow: Give activations 7 bits, so that no sum of two products exceeds 16 bits.

    Returns:
        The outputs for `example` of the same integers computed one operator after the other; how inductor runs each
        layer, by the code that it writes; and a note on what could not be had ('' if nothing).

    Raises:
        Unsupported: torch cannot export or quantize the model, or inductor cannot compile it.
    """
    try:
        with quiet.libraries(), torch.no_grad(), modules.plain_attention():
            program, fixed = artifacts.export(model, example)
            module = program.module()
            _spell_padding(module)
            _tell_layers(module, model)
            made = _quantized(module, calibration or (example,), method, skipped, narrow=narrow)
            output = made(*example)
            if not outputs.is_plain(output):
                output = _answer_plainly(made, output)
            final = torch.export.export(made, example) if fixed else artifacts.export(made, example)[0]
            for node in final.graph.nodes:
                # How the quantizer came to it, with numbers that differ from run to run.
                node.meta.pop("from_node", None)
                stack = node.meta.get("nn_module_stack", {})
                node.meta["nn_module_stack"] = {key: (_plain(name), kind) for key, (name, kind) in stack.items()}
            artifacts.save(final, path)
    except _FAILURES as error:
        raise Unsupported(
            f"torch.export cannot quantize this model to {method} for inductor: {brief(error)}. Use the torch runtime."
        ) from error
    found = compiled.precision(path, example, model, method=method, skipped=skipped)
    return output, found, fixed


def _answer_plainly(module: torch.fx.GraphModule, output: Any) -> Any:
    """Make `module` return plain containers, in place, so that its file needs no class, and return `output` in them."""
    plain = outputs.plain(output)
    codegen: Any = module.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=tree_flatten(plain)[1])
    module.recompile()
    return plain


def _spell_padding(module: torch.fx.GraphModule) -> None:
    """Say in numbers how wide convolutions are padded that have it as `same` or `valid`, in place.

    The quantizer knows only those in numbers. Left as it is is what has to be wider on one side than on the other.
    """
    for node in module.graph.nodes:
        if node.target is not torch.ops.aten.conv2d.padding:
            continue
        dilation = node.args[5] if len(node.args) > 5 else (1, 1)
        same = node.args[4] == "same"
        wide = [d * (k - 1) * same for d, k in zip(dilation, node.args[1].meta["val"].shape[2:], strict=True)]
        if not any(width % 2 for width in wide):
            node.target = torch.ops.aten.conv2d.default
            node.update_arg(4, [width // 2 for width in wide])


def _tell_layers(module: torch.fx.GraphModule, model: nn.Module) -> None:
    """Make the innermost module of each node, in place, what the quantizer must take it for: one call of one layer.

    A product belongs to the layer whose weight it uses, which may lie inside the module that computes it, as in
    nn.MultiheadAttention. Calls of one module, such as a ReLU that a block uses twice, are told apart as `a` and `a@1`.
    """
    calls = Counter[str]()
    for node in module.graph.nodes:
        stack = dict(node.meta.get("nn_module_stack", {}))
        if node.op != "call_function" or not stack:
            continue
        place, (layer, kind) = list(stack.items())[-1]
        if (product := _kind(node)) in _PRODUCTS:
            weight = _origin(node.args[1])
            if weight is not None and not _holds(model, layer, weight):
                place, layer = f"{place}.{node.name}", weight.rpartition(".")[0]
            kind = _PRODUCTS[product]
        elif not str(kind).startswith("torch.nn."):
            continue
        stack[place] = (f"{layer}@{calls[layer]}" if calls[layer] else layer, kind)
        calls[layer] += 1
        node.meta["nn_module_stack"] = stack


def _kind(node: torch.fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _origin(node: Any) -> str | None:
    """Return the name of the parameter that `node` is, or was made of; None if it was made of something else."""
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "get_attr" else None


def _holds(model: nn.Module, layer: str, weight: str) -> bool:
    """Return whether a layer holds a parameter itself, under whatever name."""
    wanted = dict(model.named_parameters(remove_duplicate=False)).get(weight)
    return any(own is wanted for own in model.get_submodule(layer).parameters(recurse=False))


def _quantized(
    module: torch.fx.GraphModule,
    calibration: Sequence[Example],
    method: str,
    skipped: frozenset[str],
    *,
    narrow: bool,
) -> torch.fx.GraphModule:
    """Return an exported module with its integers spelled out: quantized, dequantized, and floats between."""
    x86 = _x86()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic = method == "dynamic-int8"
    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic, reduce_range=narrow)
    quantizer = x86.X86InductorQuantizer()
    if dynamic:
        quantizer.set_function_type_qconfig(nn.functional.linear, config)
    else:
        quantizer.set_global(config)
        # Of one, inductor makes kernels with outputs of a wrong size; to quantize the other takes time and gains none.
        for function in (nn.functional.conv1d, torch.mul):
            quantizer.set_function_type_qconfig(function, None)
    for name in _called_in(module, skipped):
        quantizer.set_module_name_qconfig(name, None)
    layers = {node.name: _layer_of(node) for node in module.graph.nodes if _kind(node) in _PRODUCTS}
    observed = prepare_pt2e(module, quantizer)
    for batch in calibration[:1] if dynamic else calibration:
        observed(*batch)
    made: torch.fx.GraphModule = convert_pt2e(observed)
    _name_weights(made, layers)
    # The float weights would stay in the file beside the integers.
    read = {str(node.target) for node in made.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in (*made.named_parameters(), *made.named_buffers()) if n not in read]:
        parent, _, leaf = name.rpartition(".")
        delattr(made.get_submodule(parent), leaf)
    return made


def _x86() -> Any:
    """Return torchao's quantizer for x86, imported without the passes that it adds to inductor in this process.

    What loads the file later has inductor as it comes with torch, and so must what is looked into here.
    """
    passes: Any = import_module("torchao.quantization.pt2e.inductor_passes.x86")
    adds = passes._register_quantization_weight_pack_pass
    passes._register_quantization_weight_pack_pass = lambda: None
    try:
        with torch._inductor.config.patch(pre_grad_custom_pass=None):
            return import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    finally:
        passes._register_quantization_weight_pack_pass = adds


def _called_in(module: torch.fx.GraphModule, skipped: frozenset[str]) -> set[str]:
    """Return the names of `skipped` as an exported module has them: the second call of `a` is in `a@1`."""
    stacks = (node.meta.get("nn_module_stack", {}).values() for node in module.graph.nodes)
    return {name for stack in stacks for name, _ in stack if _plain(name) in skipped}


def _layer_of(node: torch.fx.Node) -> str:
    return _plain(str(list(node.meta["nn_module_stack"].values())[-1][0]))


def _plain(name: str) -> str:
    return re.sub(r"@\d+", "", name)


def _name_weights(made: torch.fx.GraphModule, layers: Mapping[str, str]) -> None:
    """Name each layer's integers after the layer, in place: `stem.0.weight_int8`, `stem.0.weight_int8_scale`."""
    calls = Counter[str]()
    for node in made.graph.nodes:
        if "dequantize_per_channel" not in str(node.target):
            continue
        layer = next(layers[user.name] for user in node.users if user.name in layers)
        owner = _module(made, layer)
        number = f"_{calls[layer]}" if calls[layer] else ""
        calls[layer] += 1
        for source, ending in zip(node.args[:3], ("", "_scale", "_zero_point"), strict=True):
            known = "_int8" in str(source.target)
            # inductor joins what is equal, and of a weight that two products share it makes floats.
            if known and ending != "_zero_point":
                continue
            leaf = f"weight{number}_int8{ending}"
            owner.register_buffer(leaf, _module(made, str(source.target)).detach().clone())
            with made.graph.inserting_before(node):
                node.replace_input_with(source, made.graph.get_attr(f"{layer}.{leaf}".removeprefix(".")))
    made.graph.eliminate_dead_code()
    made.recompile()


def _module(made: nn.Module, name: str) -> Any:
    """Return what `made` holds under a name, an empty module if it holds nothing."""
    found: Any = made
    for part in filter(None, name.split(".")):
        if not hasattr(found, part):
            found.add_module(part, nn.Module())
        found = getattr(found, part)
    return found
