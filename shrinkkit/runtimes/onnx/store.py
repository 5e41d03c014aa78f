"""ONNX files whose large weights lie in a second file, so that no step holds them all, and none is too large for it."""

from pathlib import Path
from typing import Any

ONE_FILE_BYTES = 40_000_000
"""Weights of a model that is written as one file, for which memory is taken four times. Protobuf's limit is 2 GiB."""
LARGE_BYTES = 1 << 16
"""From here on a weight is handled by itself."""


def write(model: Any, path: Path, *, folder: Path | None = None) -> tuple[Path, ...]:
    """Write an `onnx_ir.Model`, which is used up, to `path`, and return its second file, of large weights, if any.

    That is `path` with `.data` at its end. `folder` is where external data of the model lie.

    Source: ONNX, "External Data".
    """
    import onnx_ir

    if folder is not None:
        onnx_ir.external_data.set_base_dir(model.graph, folder)
    if sum(value.const_value.nbytes for value in model.graph.initializers.values()) < ONE_FILE_BYTES:
        onnx_ir.save(onnx_ir.external_data.load_to_model(model), path)
        return ()
    weights = path.with_name(f"{path.name}.data")
    onnx_ir.save(model, path, external_data=weights.name, size_threshold_bytes=LARGE_BYTES)
    return (weights,)
