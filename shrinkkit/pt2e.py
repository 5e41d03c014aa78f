"""Int8 for inductor: torch.export's PT2E quantization, which inductor compiles into integer kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from shrinkkit.errors import Unsupported
from shrinkkit.records import LayerPrecision
from shrinkkit.usermodel import Example


@dataclass(frozen=True)
class Written:
    """What was written."""

    output: Any
    precision: Mapping[str, LayerPrecision]
    note: str


def write(
    model: nn.Module,
    example: Example,
    calibration: Sequence[Example],
    path: Path,
    *,
    method: str,
    skipped: frozenset[str],
) -> Written:
    """Write."""
    raise Unsupported("inductor has no int8 yet.")
