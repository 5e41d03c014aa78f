"""Integer kernels of TorchScript files, compared with the same integers in float."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shrinkkit import quiet
from shrinkkit.core.measurement import IntegerCheck
from shrinkkit.errors import brief
from shrinkkit.runtimes import layers
from shrinkkit.runtimes.base import max_relative_error
from shrinkkit.runtimes.layers import Difference
from shrinkkit.runtimes.torch import load
from shrinkkit.runtimes.torch.spec import engine
from shrinkkit.tasks.modules import Example

CONVOLUTIONS = {f"conv{kind}{n}d": n for kind in ("", "_transpose") for n in (1, 2, 3)}
"""torch's integer convolutions and their spatial dimensions; each also exists with `_relu` behind it."""
RECURRENT = ("aten::quantized_lstm.input", "aten::quantized_gru.input")


def check(path: Path, inputs: Example, *, threads: int) -> IntegerCheck | None:
    """Return the comparison of a `.torchscript.pt` file, None for a file in float."""
    if path.suffix == ".pt2":
        # torch cannot export its own int8 layers.
        return None
    module = load.read(path)
    with quiet.libraries(), torch.inference_mode():
        output = module(*inputs)
        emulated = _Emulated(_owners(module), engine(path))
        try:
            with emulated:
                expected = module(*inputs)
        except (RuntimeError, TypeError) as error:
            raise layers.unchecked(path, f"computing them in float stops with: {brief(error)}") from error
    if emulated.other and not emulated.layers:
        raise layers.unchecked(path, f"{', '.join(sorted(emulated.other))} cannot be computed in float as well")
    if not emulated.layers:
        return None
    return layers.integer_check(max_relative_error(expected, output), emulated.layers)


class _Emulated(TorchDispatchMode):
    """Runs each integer layer and its emulation in float, and passes on the output of the emulation.

    It sees operators as they are called, below TorchScript, so control flow in a scripted model does not matter.
    """

    def __init__(self, owners: Mapping[int, str], engine: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = owners
        # qnnpack ignores the argument, as torch itself warns.
        self.reduces = engine != "qnnpack"
        self.layers: dict[str, list[Difference]] = defaultdict(list)
        self.other: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, operator = func._schema.name.partition("::")
        if func.name() in RECURRENT:
            self._recurrent(func, args)
        elif space == "quantized" and operator in ("linear_dynamic", "linear_relu_dynamic"):
            return self._dynamic(func, *args)
        elif space == "quantized" and operator.removesuffix("_relu") in ("linear", *CONVOLUTIONS):
            return self._static(func, operator, *args)
        elif (space == "quantized" and operator.startswith(("linear", "conv"))) or "quantized_" in operator:
            self.other.add(func._schema.name)
        return func(*args, **(kwargs or {}))

    def _compare(self, packed: Any, expected: torch.Tensor, output: torch.Tensor, step: float) -> None:
        name = self.owners.get(_key(packed), "(unnamed)")
        self.layers[name].append(layers.difference(expected, output, step=step))

    def _static(self, func: Any, operator: str, x: torch.Tensor, packed: Any, scale: float, zero: int) -> torch.Tensor:
        weight, _ = _unpack(packed)
        real = _multiply(operator.removesuffix("_relu"), x.dequantize(), packed)
        real = F.relu(real) if operator.endswith("_relu") else real
        expected = torch.quantize_per_tensor(real, scale, zero, x.dtype)
        per_tensor = weight.qscheme() == torch.per_tensor_affine
        unit = x.q_scale() * (weight.q_scale() if per_tensor else weight.q_per_channel_scales().max().item())
        # Some engines round the bias to units of the sums, which shows in an output with very fine steps.
        output = func(x, packed, scale, zero).dequantize()
        self._compare(packed, expected.dequantize(), output, scale + unit)
        return expected

    def _dynamic(self, func: Any, x: torch.Tensor, packed: Any, reduce_range: bool = False) -> torch.Tensor:
        weight, bias = _unpack(packed)
        end = F.relu if "relu" in func._schema.name else torch.nn.Identity()

        def emulate(rows: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = end(F.linear(rows, weight.dequantize(), bias))
            return result

        # Engines break ties differently when they quantize; numbers that are multiples of the step have none.
        multiples = _rounded(x, reduce_range and self.reduces)
        expected = emulate(_rounded(multiples, reduce_range and self.reduces))
        self._compare(packed, expected, func(multiples, packed, reduce_range), 0.0)
        return emulate(multiples)

    def _recurrent(self, func: Any, args: Any) -> None:
        """Compare the products of a layer's input and of its states, the layers of a stack one after the other."""
        x, hidden, cells, biases, count, _, _, both, batch_first = args
        ways = 2 if both else 1
        for first in range(0, ways * count, ways):
            current = slice(first, first + ways)
            start = hidden[current] if isinstance(hidden, torch.Tensor) else [h[current] for h in hidden]
            y = func(x, start, cells[current], biases, 1, 0.0, False, both, batch_first)[0]
            for cell, states in zip(cells[current], y.chunk(ways, -1), strict=True):
                for matrix, rows in zip(_matrices(cell), (x, states), strict=False):
                    reduces = bool(cell.__getstate__()[0][3][0])
                    self._dynamic(torch.ops.quantized.linear_dynamic.default, rows, matrix, reduces)
            x = y


def _rounded(x: torch.Tensor, reduce_range: bool) -> torch.Tensor:
    """Return `x` as a dynamic layer sees it: in the 8 bits, or 7, that its range is divided into."""
    scale, zero = torch._choose_qparams_per_tensor(x, reduce_range)
    return torch.quantize_per_tensor(x, scale, zero, torch.quint8).dequantize()


def _multiply(operator: str, x: torch.Tensor, packed: Any) -> torch.Tensor:
    """Return what a Linear layer or a convolution gives in float."""
    integers, bias = _unpack(packed)
    weight = integers.dequantize()
    if operator == "linear":
        return F.linear(x, weight, bias)
    dimensions, packing = CONVOLUTIONS[operator], "conv3d" if CONVOLUTIONS[operator] == 3 else "conv2d"
    stride, padding, dilation, groups, extra = (
        getattr(torch.ops.quantized, f"{packing}_{name}")(packed)
        for name in ("stride", "padding", "dilation", "groups", "output_padding")
    )
    # torch packs a convolution over one dimension as one over two.
    x = x.unsqueeze(-2) if dimensions == 1 else x
    if "transpose" in operator:
        transposed = F.conv_transpose3d if dimensions == 3 else F.conv_transpose2d
        y = transposed(x, weight, bias, stride, padding, extra, groups, dilation)
    else:
        y = (F.conv3d if dimensions == 3 else F.conv2d)(x, weight, bias, stride, padding, dilation, groups)
    return y.squeeze(-2) if dimensions == 1 else y


def _unpack(packed: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the quantized weight and the float bias of packed parameters."""
    kind, ops = str(packed._type()), torch.ops.quantized
    unpack = ops.linear_unpack if "Linear" in kind else ops.conv3d_unpack if "Conv3d" in kind else ops.conv2d_unpack
    weight, bias = unpack(packed)
    return weight, bias


def _matrices(cell: Any) -> list[Any]:
    """Return the packed parameters that a recurrent cell multiplies its input and its states with, if they are int8."""
    kind, _, _, _, packed = cell.__getstate__()[0]
    return list(packed) if kind == "quantized_dynamic" else []


def _key(packed: Any) -> int:
    """Return a number by which packed parameters can be told from others; torch gives them no identity."""
    weight, bias = _unpack(packed)
    parts = [weight.dequantize(), *([] if bias is None else [bias.detach()])]
    return hash(b"".join(part.contiguous().numpy().tobytes() for part in parts))


def _owners(module: Any) -> dict[int, str]:
    """Return the name of the layer that each of the packed parameters in a TorchScript module belongs to."""
    owners = {}
    for target, inner in module.named_modules():
        name = re.sub(r"_call\d+", "", target)
        packed, cell = getattr(inner, "_packed_params", None), getattr(inner, "param", None)
        if isinstance(packed, torch.ScriptObject):
            owners[_key(packed)] = name.removesuffix("._packed_params")
        if isinstance(cell, torch.ScriptObject):
            owners |= {_key(matrix): name.partition("._all_weight_values")[0] for matrix in _matrices(cell)}
    return owners
