"""Integer kernels beside the same integers computed in float, so that a kernel that saturates is seen.

An int8 file has an exact meaning: integers are multiplied and summed, scaled, and rounded once. On x86 processors
without VNNI, kernels built on `vpmaddubsw` add two products of 8 bits in 16 bits and saturate without a word, so that a
file that was measured on one processor answers otherwise on another. What rounding explains is one step of a layer's
output; saturation loses many. For a file against the model that it was made from see `artifacts.max_relative_error`.

Source: oneDNN, "Nuances of int8 Computations"; ONNX Runtime, "Quantize ONNX Models", on U8S8 and AVX2.
"""

import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shrinkkit import quiet
from shrinkkit.core.measurement import IntegerCheck
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes import artifacts, loading
from shrinkkit.runtimes.artifacts import INT8_OPERATORS
from shrinkkit.runtimes.onnxruntime import subgraphs
from shrinkkit.tasks.modules import Example

STEPS = 1.5
"""Steps of a layer's output beyond which a difference is no rounding: a tie falls to either side, never two away."""
FLOAT_ERROR = 1e-4
"""What sums in another order may cost besides, as a share of the largest output. It was 8e-7 in all that was tried."""

CONVOLUTIONS = {
    "conv1d": 1,
    "conv2d": 2,
    "conv3d": 3,
    "conv_transpose1d": 1,
    "conv_transpose2d": 2,
    "conv_transpose3d": 3,
}
"""torch's integer convolutions and their spatial dimensions; each also exists with `_relu` behind it."""
RECURRENT = ("aten::quantized_lstm.input", "aten::quantized_gru.input")


@dataclass(frozen=True)
class Difference:
    """How far an integer kernel's output is from the one in float, and whether rounding explains it."""

    share: float
    """The largest difference, as a share of the largest absolute output."""
    explained: bool


def difference(expected: torch.Tensor, found: torch.Tensor, *, step: float) -> Difference:
    """Return how far `found`, from an integer kernel, is from `expected`, from float arithmetic.

    Args:
        expected: Output in real numbers.
        found: The same, of the same shape.
        step: What one step of the output is worth; 0 for outputs that are not rounded.
    """
    if not expected.numel():
        return Difference(0.0, True)
    largest = expected.abs().max().item()
    error = (expected.double() - found.double()).abs().max().item()
    scale = largest or found.abs().max().item() or 1.0
    return Difference(error / scale, error <= STEPS * step + FLOAT_ERROR * largest)


def check(path: Path, *, runtime: str, inputs: Example, threads: int) -> IntegerCheck | None:
    """Return what the integer kernels of a model file compute here, beside the same integers computed in float.

    Each layer gets the integers that it has in a run whose integer layers all compute in float. The products of a
    recurrent layer are compared one by one, as over its steps rounding would add up.

    Args:
        path: A file that `variants.write` made.
        runtime: `torch`, `inductor`, `onnxruntime` or `openvino`.
        inputs: Positional inputs of one call, CPU tensors, batch first.
        threads: Intra-op threads of ONNX Runtime; torch's are a setting of the process.

    Returns:
        The comparison, or None for a file that computes in float throughout.

    Raises:
        Unsupported: The file has integer operators, and none of them can be computed in float as well, or the runtime
            lets nobody see its layers' inputs.
        ModelFileError: The outputs are not finite.
    """
    if runtime == "onnxruntime":
        return check_onnx(path, inputs, threads=threads)
    if runtime == "torch":
        return check_torch(path, inputs)
    if not _holds_integers(path):
        return None
    if runtime == "inductor":
        raise _untold(path, "inductor fuses them with others; the outputs as a whole were, when the file was made")
    raise _untold(path, "OpenVINO has no other way to compute them")


def _holds_integers(path: Path) -> bool:
    """Return whether an exported program or an OpenVINO model was quantized to integers."""
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            models = [name for name in archive.namelist() if name.endswith("/models/model.json")]
            return any(b"quantized_decomposed." in archive.read(name) for name in models)
    return path.suffix == ".xml" and any(key in path.read_bytes() for key in (b'"FakeQuantize"', b'"i8"', b'"u8"'))


def check_torch(path: Path, inputs: Example) -> IntegerCheck | None:
    """Return the comparison of a `.torchscript.pt` file, None for a file in float; see `check`."""
    if path.suffix == ".pt2":
        # torch cannot export its own int8 layers.
        return None
    engine, module = loading.engine(path), loading.module(path)
    with quiet.libraries(), torch.inference_mode():
        found = module(*inputs)
        beside = _Beside(_owners(module), engine)
        try:
            with beside:
                expected = module(*inputs)
        except (RuntimeError, TypeError) as error:
            raise _untold(path, f"computing them in float stops with: {brief(error)}") from error
    if beside.other and not beside.layers:
        raise _untold(path, f"{', '.join(sorted(beside.other))} cannot be computed in float as well")
    return _record(artifacts.max_relative_error(expected, found), beside.layers) if beside.layers else None


def check_onnx(path: Path, inputs: Example, *, threads: int, reference: Path | None = None) -> IntegerCheck | None:
    """Return the comparison of an ONNX file, None for a file in float; see `check`.

    Args:
        path: The file whose kernels are run.
        inputs: Positional inputs of one call, CPU tensors, batch first.
        threads: Intra-op threads.
        reference: The file that is computed in float; None takes `path`. Another must have the same nodes.
    """
    run = subgraphs.read(path)
    meant = subgraphs.read(reference) if reference else run
    written = subgraphs.layers(run)
    fused = artifacts.onnx_int8_weights(path) if written else frozenset()
    cut = [layer for layer in written if layer.dynamic or layer.weight.removesuffix("_quantized") in fused]
    if not cut:
        if other := sorted({n.op_type for n in run.graph.node} & INT8_OPERATORS):
            raise _untold(path, f"{', '.join(other)} cannot be computed in float as well")
        return None
    feed = {value.name: x.contiguous().numpy() for value, x in zip(run.graph.input, inputs, strict=True)}
    try:
        expected = subgraphs.run_in_float(meant, cut, feed, threads=threads)
        found = subgraphs.run_layers(run, cut, expected, threads=threads)
    except Unsupported as error:
        raise _untold(path, str(error)) from error
    layers = defaultdict(list)
    for layer in cut:
        real, step = subgraphs.scale(run, layer.result)
        pair = (torch.from_numpy(real(values[layer.result])) for values in (expected, found))
        layers[layer.name].append(difference(*pair, step=step))
    answers = loading.load(path, runtime="onnxruntime", threads=threads)(*inputs)
    return _record(artifacts.max_relative_error([expected[value.name] for value in run.graph.output], answers), layers)


def _record(max_relative_error: float, layers: Mapping[str, Sequence[Difference]]) -> IntegerCheck:
    return IntegerCheck(
        max_relative_error=max_relative_error,
        layers={name: max(d.share for d in found) for name, found in layers.items()},
        saturated=tuple(name for name, found in layers.items() if not all(d.explained for d in found)),
    )


def _untold(path: Path, reason: str) -> Unsupported:
    return Unsupported(
        f"Whether the integer layers of {path.name} saturate here cannot be told: {reason}. "
        "Compare its accuracy with that on a processor with VNNI."
    )


class _Beside(TorchDispatchMode):
    """Runs each integer layer beside its emulation, and hands on what the emulation gave.

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

    def _compare(self, packed: Any, expected: torch.Tensor, found: torch.Tensor, step: float) -> None:
        name = self.owners.get(_key(packed), "(unnamed)")
        self.layers[name].append(difference(expected, found, step=step))

    def _static(self, func: Any, operator: str, x: torch.Tensor, packed: Any, scale: float, zero: int) -> torch.Tensor:
        weight, bias = _unpack(packed)
        real = _multiply(operator.removesuffix("_relu"), x.dequantize(), packed, weight.dequantize(), bias)
        real = F.relu(real) if operator.endswith("_relu") else real
        expected = torch.quantize_per_tensor(real, scale, zero, x.dtype)
        per_tensor = weight.qscheme() == torch.per_tensor_affine
        unit = x.q_scale() * (weight.q_scale() if per_tensor else weight.q_per_channel_scales().max().item())
        # Some engines round the bias to units of the sums, which shows in an output with very fine steps.
        found = func(x, packed, scale, zero).dequantize()
        self._compare(packed, expected.dequantize(), found, scale + unit)
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
            own = slice(first, first + ways)
            start = hidden[own] if isinstance(hidden, torch.Tensor) else [h[own] for h in hidden]
            y = func(x, start, cells[own], biases, 1, 0.0, False, both, batch_first)[0]
            for cell, states in zip(cells[own], y.chunk(ways, -1), strict=True):
                for matrix, rows in zip(_matrices(cell), (x, states), strict=False):
                    self._dynamic(torch.ops.quantized.linear_dynamic.default, rows, matrix, _reduces(cell))
            x = y


def _rounded(x: torch.Tensor, reduce_range: bool) -> torch.Tensor:
    """Return `x` as a dynamic layer sees it: in the 8 bits, or 7, that its range is divided into."""
    scale, zero = torch._choose_qparams_per_tensor(x, reduce_range)
    return torch.quantize_per_tensor(x, scale, zero, torch.quint8).dequantize()


def _multiply(
    operator: str, x: torch.Tensor, packed: Any, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return what a Linear layer or a convolution gives in float."""
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


def _reduces(cell: Any) -> bool:
    return bool(cell.__getstate__()[0][3][0])


def _key(packed: Any) -> int:
    """Return a number by which packed parameters can be told from others; torch gives them no identity."""
    weight, bias = _unpack(packed)
    parts = [weight.dequantize(), *([] if bias is None else [bias.detach()])]
    return hash(b"".join(part.contiguous().numpy().tobytes() for part in parts))


def _owners(module: Any) -> dict[int, str]:
    """Return the name of the layer that each of the packed parameters in a TorchScript module belongs to."""
    found = {}
    for name, inner in module.named_modules():
        packed, cell = getattr(inner, "_packed_params", None), getattr(inner, "param", None)
        if isinstance(packed, torch.ScriptObject):
            found[_key(packed)] = name.removesuffix("._packed_params")
        if isinstance(cell, torch.ScriptObject):
            found |= {_key(matrix): name.partition("._all_weight_values")[0] for matrix in _matrices(cell)}
    return found
