"""Model files for OpenVINO: int8 by NNCF, and 16-bit floats."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from shrinkkit.errors import Unsupported
from shrinkkit.records import LayerPrecision
from shrinkkit.usermodel import Example


def write(
    source: Path,
    path: Path,
    model: nn.Module,
    *,
    method: str,
    calibration: Sequence[Example],
    skipped: frozenset[str],
) -> Mapping[str, LayerPrecision]:
    """Write."""
    raise Unsupported("OpenVINO has no int8 yet.")
