"""Model files for inductor: exported programs, in int8 by torchao, which inductor compiles into integer kernels.

Source: PyTorch, "PyTorch 2 Export Quantization with X86 Backend through Inductor".
"""

import re
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from shrinkkit import quiet
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes.base import TOLERANCE, BuildRequest, BuiltFile, prove, refuse_float
from shrinkkit.runtimes.inductor import load, profile
from shrinkkit.runtimes.spec import HALF
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.torch import export as torch_export
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks import calls, modules, outputs

_PRODUCTS = {
    "aten::linear": "torch.nn.modules.linear.Linear",
    **{f"aten::conv{n}d": f"torch.nn.modules.conv.Conv{n}d" for n in (1, 2, 3)},
}
"""Operators that int8 may cover, and the modules by whose names torchao knows them."""


def build(request: BuildRequest) -> BuiltFile:
    """Return the file of a variant for inductor: an exported program, its integers spelled out."""
    if any(calls.varying(request.model).dims):
        text = "inductor compiles for each length of the inputs, and here lengths vary."
        raise Unsupported(f"{text} Use torch, or pad to one length.")
    if request.precision in ("", *HALF):
        model, precisions = torch_build.in_float(request)
        path, note = torch_build.write_program(model, request.example, request.folder)
        options: dict[str, Any] = {"expected": request.outputs_of(model), "layers": precisions, "notes": [note]}
        return prove(request, load.load, path, format="pt2", tolerance=TOLERANCE, **options)
    path = request.folder / "model.inductor.pt2"
    narrow = "onednn" in quantize.supported_engines() and quantize.saturates("onednn")
    output, note = write_int8(request, path, narrow=narrow)
    precisions = profile.int8_layers(path, request)
    refuse_float(request, "inductor", precisions, path)
    why = narrow * "activations have 7 bits, because int8 accumulators saturate on this processor with 8"
    options = {"expected": output, "layers": precisions, "notes": [note, why], "exact_anywhere": narrow}
    return prove(request, load.load, path, format="pt2", tolerance=TOLERANCE, **options)


def write_int8(request: BuildRequest, path: Path, *, narrow: bool = False) -> tuple[Any, str]:
    """Write the model of `request` in int8 as an exported program, and return what it computes and a note.

    Weights are int8 per output channel. Each is kept once, under the name of its layer, and loading the file needs
    nothing but torch. With `narrow`, activations have 7 bits, so that no sum of two products exceeds 16 bits. The
    outputs are those of the same integers computed one operator after the other; the note is on limitations, '' if
    there are none. Raises Unsupported if torch cannot export or quantize the model.
    """
    model, example = request.model, request.example
    try:
        with quiet.libraries(), torch.no_grad(), modules.plain_attention():
            program, fixed = torch_export.export(model, example)
            module = program.module()
            _spell_padding(module)
            _relabel_calls(module, model)
            quantized = _quantized(module, request, narrow=narrow)
            output = quantized(*example)
            if not outputs.is_plain(output):
                output = _return_plain(quantized, output)
            final = torch.export.export(quantized, example) if fixed else torch_export.export(quantized, example)[0]
            for node in final.graph.nodes:
                # The history of the node, with numbers that differ from run to run.
                node.meta.pop("from_node", None)
                stack = node.meta.get("nn_module_stack", {})
                node.meta["nn_module_stack"] = {key: (_plain(name), kind) for key, (name, kind) in stack.items()}
            torch_export.save(final, path)
    except (*torch_export.FAILURES, KeyError) as error:
        text = f"torch.export cannot quantize this model to {request.precision} for inductor: {brief(error)}."
        raise Unsupported(f"{text} Use the torch runtime.") from error
    return output, fixed


def _return_plain(module: torch.fx.GraphModule, output: Any) -> Any:
    """Make `module` return plain containers, in place, so that its file needs no class, and return `output` in them."""
    plain = outputs.plain(output)
    codegen: Any = module.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=tree_flatten(plain)[1])
    module.recompile()
    return plain


def _spell_padding(module: torch.fx.GraphModule) -> None:
    """Replace the padding `same` or `valid` of convolutions by numbers, which the quantizer needs, in place.

    Asymmetric padding is left unchanged.
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


def _relabel_calls(module: torch.fx.GraphModule, model: nn.Module) -> None:
    """Relabel each node's innermost module so that the quantizer treats every call of a layer separately, in place.

    A product belongs to the layer whose weight it uses, which may lie inside the module that computes it, as in
    nn.MultiheadAttention. Calls of one module, such as a ReLU that a block uses twice, become `a` and `a@1`.
    """
    calls, parameters = Counter[str](), dict(model.named_parameters(remove_duplicate=False))
    for node in module.graph.nodes:
        stack = dict(node.meta.get("nn_module_stack", {}))
        if node.op != "call_function" or not stack:
            continue
        place, (layer, kind) = list(stack.items())[-1]
        if (product := _kind(node)) in _PRODUCTS:
            weight = _origin(node.args[1])
            # Under whatever name: weights may be tied.
            held = model.get_submodule(layer).parameters(recurse=False)
            if weight is not None and not any(p is parameters.get(weight) for p in held):
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


def _quantized(module: torch.fx.GraphModule, request: BuildRequest, *, narrow: bool) -> torch.fx.GraphModule:
    """Return an exported module with its integers spelled out: quantized, dequantized, and floats between."""
    x86 = _x86()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic, calibration = request.precision == "dynamic-int8", request.calibration or (request.example,)
    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic, reduce_range=narrow)
    quantizer = x86.X86InductorQuantizer()
    if dynamic:
        quantizer.set_function_type_qconfig(nn.functional.linear, config)
    else:
        quantizer.set_global(config)
        # Of one, inductor makes kernels with outputs of a wrong size; to quantize the other takes time and gains none.
        for function in (nn.functional.conv1d, torch.mul):
            quantizer.set_function_type_qconfig(function, None)
    stacks = {node: list(node.meta.get("nn_module_stack", {}).values()) for node in module.graph.nodes}
    # The second call of `a` is in `a@1`.
    for name in {name for stack in stacks.values() for name, _ in stack if _plain(name) in request.skipped}:
        quantizer.set_module_name_qconfig(name, None)
    layers = {node.name: _plain(str(stack[-1][0])) for node, stack in stacks.items() if _kind(node) in _PRODUCTS}
    observed = prepare_pt2e(module, quantizer)
    for batch in calibration[:1] if dynamic else calibration:
        observed(*batch)
    quantized: torch.fx.GraphModule = convert_pt2e(observed)
    _name_weights(quantized, layers)
    # The float weights would stay in the file next to the integers.
    read = {str(node.target) for node in quantized.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in (*quantized.named_parameters(), *quantized.named_buffers()) if n not in read]:
        parent, _, leaf = name.rpartition(".")
        delattr(quantized.get_submodule(parent), leaf)
    return quantized


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


def _plain(name: str) -> str:
    return re.sub(r"@\d+", "", name)


def _name_weights(program: torch.fx.GraphModule, layers: Mapping[str, str]) -> None:
    """Name each layer's integers after the layer, in place: `stem.0.weight_int8`, `stem.0.weight_int8_scale`."""
    calls = Counter[str]()
    for node in program.graph.nodes:
        if "dequantize_per_channel" not in str(node.target):
            continue
        layer = next(layers[user.name] for user in node.users if user.name in layers)
        owner = _module(program, layer)
        number = f"_{calls[layer]}" if calls[layer] else ""
        calls[layer] += 1
        for source, ending in zip(node.args[:3], ("", "_scale", "_zero_point"), strict=True):
            known = "_int8" in str(source.target)
            # inductor joins what is equal, and of a weight that two products share it makes floats.
            if known and ending != "_zero_point":
                continue
            leaf = f"weight{number}_int8{ending}"
            owner.register_buffer(leaf, _module(program, str(source.target)).detach().clone())
            with program.graph.inserting_before(node):
                node.replace_input_with(source, program.graph.get_attr(f"{layer}.{leaf}".removeprefix(".")))
    program.graph.eliminate_dead_code()
    program.recompile()


def _module(program: nn.Module, name: str) -> Any:
    """Return what `program` holds under a name, an empty module if it holds nothing."""
    module: Any = program
    for part in filter(None, name.split(".")):
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module
