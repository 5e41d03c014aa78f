"""ONNX files written weight by weight, so that writing takes no further memory of the size of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from shrinkkit.errors import Unsupported

LARGEST_BYTES = 2**31 - 1
"""Of a file in one part: what protobuf can read."""
LARGE_BYTES = 1 << 16
"""From here on a weight is handled by itself."""
_INITIALIZER, _GRAPH, _RAW_DATA = ((number << 3 | 2).to_bytes(1, "little") for number in (5, 7, 9))
"""Tags of fields that hold bytes, by their numbers in onnx.proto."""


@dataclass(frozen=True)
class _Weight:
    """A large initializer: what says of which kind it is, its size in bytes, and what writes its data."""

    head: Any
    size: int
    write: Callable[[BinaryIO], Any]


def write(model: Any, path: Path, *, external: bool = False) -> None:
    """Write `model`, as `torch.onnx.export` makes it, to `path`.

    Args:
        model: An `onnx_ir.Model`, left unchanged.
        path: Where it goes.
        external: Put weights into a second file, `path` with `.data` at its end, for intermediate files, which may be
            larger than `LARGEST_BYTES`.

    Raises:
        Unsupported: The model is larger than a file in one part can be.

    Source: ONNX, "External Data".
    """
    import onnx_ir

    values = [v for v in model.graph.initializers.values() if v.const_value.nbytes >= LARGE_BYTES]
    tensors, offset = [v.const_value for v in values], 0
    try:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = onnx_ir.ExternalTensor(
                f"{path.name}.data", offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name
            )
            offset += tensor.nbytes
        skeleton = onnx_ir.serde.serialize_model(model)
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
    if external:
        with path.with_name(f"{path.name}.data").open("wb") as file:
            for tensor in tensors:
                tensor.tofile(file)
        path.write_bytes(skeleton.SerializeToString())
        return
    heads = [head for head in skeleton.graph.initializer if head.external_data]
    _write_whole(path, skeleton, [_Weight(h, t.nbytes, t.tofile) for h, t in zip(heads, tensors, strict=True)])


def join(model: Any, folder: Path, path: Path) -> None:
    """Write `model`, an `onnx.ModelProto` that is used up, to `path` with the external data that lies in `folder`.

    Raises:
        Unsupported: The model is larger than a file in one part can be.
    """
    weights = []
    for tensor in model.graph.initializer:
        if tensor.external_data:
            data = {entry.key: entry.value for entry in tensor.external_data}
            file = folder / data["location"]
            size = int(data.get("length") or file.stat().st_size)
            weights.append(_Weight(tensor, size, partial(_copy, file, int(data.get("offset") or 0), size)))
        elif len(tensor.raw_data) >= LARGE_BYTES:
            weights.append(_Weight(tensor, len(tensor.raw_data), partial(_write_raw, tensor)))
    _write_whole(path, model, weights)


def _write_whole(path: Path, skeleton: Any, weights: Sequence[_Weight]) -> None:
    """Write `skeleton`, some of whose initializers are `weights`, field by field as protobuf encodes it.

    Source: Protocol Buffers, "Encoding".
    """
    heads = []
    for weight in weights:
        known = type(weight.head)(dims=weight.head.dims, data_type=weight.head.data_type, name=weight.head.name)
        head = known.SerializeToString() + _RAW_DATA + _varint(weight.size)
        heads.append(_INITIALIZER + _varint(len(head) + weight.size) + head)
    large = {weight.head.name for weight in weights}
    small = [tensor for tensor in skeleton.graph.initializer if tensor.name not in large]
    # Fields may stand in any order, and those of one number are taken together.
    rest = b"".join(_INITIALIZER + _varint(tensor.ByteSize()) + tensor.SerializeToString() for tensor in small)
    del skeleton.graph.initializer[:]
    graph = skeleton.graph.SerializeToString() + rest
    skeleton.ClearField("graph")
    size = len(graph) + sum(map(len, heads)) + sum(weight.size for weight in weights)
    beginning = skeleton.SerializeToString() + _GRAPH + _varint(size)
    if len(beginning) + size > LARGEST_BYTES:
        raise Unsupported(
            f"An ONNX file must be smaller than 2 GiB, and this model takes {size / 2**30:.1f} GiB. Quantize it to "
            "int8, or use the torch runtime."
        )
    with path.open("wb") as file:
        file.write(beginning + graph)
        for head, weight in zip(heads, weights, strict=True):
            file.write(head)
            weight.write(file)


def _varint(number: int) -> bytes:
    """Return a whole number as protobuf writes it: seven bits at a time, the lowest first."""
    digits = []
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])


def _write_raw(tensor: Any, file: BinaryIO) -> None:
    file.write(tensor.raw_data)


def _copy(place: Path, offset: int, size: int, file: BinaryIO) -> None:
    """Write `size` bytes of the file `place` from `offset` on."""
    with place.open("rb") as source:
        source.seek(offset)
        while size and (chunk := source.read(min(size, 1 << 20))):
            size -= file.write(chunk)
