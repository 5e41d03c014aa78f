"""Int8 for inductor: torch.export's quantization, which inductor compiles into integer kernels.

Source: PyTorch, "PyTorch 2 Export Quantization with X86 Backend through Inductor".
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shrinkkit import artifacts, audit, compiled, quantize, quiet, targets
from shrinkkit.errors import Unsupported, brief
from shrinkkit.records import LayerPrecision
from shrinkkit.usermodel import Example

_FAILURES = (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, TypeError, AssertionError, KeyError)


def write(
    model: nn.Module,
    example: Example,
    calibration: Sequence[Example],
    path: Path,
    *,
    method: str,
    skipped: frozenset[str],
) -> tuple[Any, Mapping[str, LayerPrecision], str]:
    """Write `model` in int8 as an exported program, and return what it computes and how inductor runs it.

    `model` is left unchanged. Weights are int8 per output channel, each is kept once, and loading the file needs only
    torch.

    Args:
        model: Float model in eval mode, on the CPU.
        example: Positional inputs of one call, batch first.
        calibration: Inputs that set the ranges of activations, for `static-int8`.
        path: Where the program goes, `.pt2`.
        method: `dynamic-int8` (Linear) or `static-int8` (convolutions too).
        skipped: Names of modules to leave in float.

    Returns:
        The outputs for `example` of the same integers computed one operator after the other; how inductor runs each
        layer, by the graph that it makes code of; and a note on what could not be had ('' if nothing).

    Raises:
        Unsupported: torch cannot export or quantize the model, or inductor cannot compile it.
    """
    try:
        with quiet.libraries(), torch.no_grad(), quantize.plain_attention():
            program, note = artifacts.export(model, example)
            module = _quantized(program.module(), calibration or (example,), method, skipped)
            scales = dict(_scales(module))
            output = module(*example)
            made, _ = artifacts.export(module, example)
            artifacts.save(made, path)
    except _FAILURES as error:
        raise Unsupported(
            f"torch.export cannot quantize this model to {method} for inductor: {brief(error)}. Use the torch runtime."
        ) from error
    used = compiled.integer_scales(path, example)
    found = {}
    for name, layer in audit.layers(model).items():
        if any(_equal(scale, other) for scale in scales.get(name, ()) for other in used):
            found[name] = LayerPrecision("int8")
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            found[name] = LayerPrecision("folded", "part of the layer before it")
        else:
            found[name] = LayerPrecision("float32", audit.why_float(name, layer, method, "inductor", skipped))
    return output, found, note


def _quantized(
    module: Any, calibration: Sequence[Example], method: str, skipped: frozenset[str]
) -> torch.fx.GraphModule:
    """Return an exported module with its integers spelled out: quantized, dequantized, and floats between."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    flags = targets.environment(1).cpu_flags
    # Without VNNI, products of 8 bits saturate in 16.
    saturates = not any("vnni" in flag or flag == "amx_int8" for flag in flags)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(
        x86.get_default_x86_inductor_quantization_config(is_dynamic=method == "dynamic-int8", reduce_range=saturates)
    )
    for name in skipped:
        quantizer.set_module_name_qconfig(name, None)
    observed = prepare_pt2e(module, quantizer)
    for batch in calibration:
        observed(*batch)
    made: torch.fx.GraphModule = convert_pt2e(observed)
    # The float weights would stay in the file beside the integers.
    read = {str(node.target) for node in made.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in made.named_parameters() if name not in read]:
        parent, _, leaf = name.rpartition(".")
        delattr(made.get_submodule(parent), leaf)
    return made


def _scales(module: torch.fx.GraphModule) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield each layer with the scales of its integer weights, by which they are told apart from all others."""
    found: dict[str, list[torch.Tensor]] = {}
    for node in module.graph.nodes:
        if "dequantize_per_channel" not in str(node.target):
            continue
        scale = _attribute(module, node.args[1])
        for user in node.users:
            found.setdefault(compiled.layer_of(user), []).append(scale)
    yield from found.items()


def _attribute(module: Any, node: Any) -> torch.Tensor:
    value = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return torch.as_tensor(value).detach()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.float(), b.float()))
