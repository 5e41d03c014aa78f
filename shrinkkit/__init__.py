"""Make trained PyTorch models smaller and faster, and verify it.

The names below are the public API. Each is imported when it is first used, so that
`import shrinkkit` does not load torch.
"""

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# torch reads this when it is loaded: its C++ notices would appear in the output of notebooks.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

_PUBLIC = {"Task": "tasks.task"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
