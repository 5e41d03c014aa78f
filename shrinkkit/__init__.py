"""Make trained PyTorch models smaller and faster, and verify it.

The names below are the public API. Each is imported when it is first used, so that
`import shrinkkit` does not load torch.
"""

import os
import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# torch reads this when it is loaded: its C++ notices would appear in the output of notebooks.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

if "IPython" in sys.modules:
    # A cell that runs before those that it needs names them.
    import_module("shrinkkit.errors").explain_name_errors()

_ERRORS = (
    "InvalidInput InvalidTask LeaseLost ModelFileError NothingChanged NothingToPrune ShrinkkitError StepFailed "
    "UnfairComparison Unsupported"
).split()
_PUBLIC = {
    "Task": "tasks.task:Task",
    "Metric": "tasks.metrics:Metric",
    "from_transformers": "tasks.adapters:from_transformers",
    "from_timm": "tasks.adapters:from_timm",
    "from_loader": "tasks.adapters:from_loader",
    "load_task": "tasks.loader:load",
    "check_task": "tasks.checks:check",
    "Recipe": "core.recipe:Recipe",
    "Study": "core.recipe:Study",
    "Budget": "core.recipe:Budget",
    "read_recipe": "core.studies:read_recipe",
    "read_study": "core.studies:read_study",
    "create_study": "core.studies:study",
    "prune_channels": "transforms.prune:channels",
    "prune_weights": "transforms.prune:weights",
    "fine_tune": "transforms.finetune:run",
    "dynamic_int8": "runtimes.torch.quantize:dynamic_int8",
    "static_int8": "runtimes.torch.quantize:static_int8",
    "half": "runtimes.torch.quantize:half",
    "compress": "transforms.compress:compress",
    "macs": "tasks.modules:macs",
    "parameters": "tasks.modules:parameters",
    "score": "measure.scoring:score",
    "compare": "measure.benchmark:compare",
    "run": "pipeline.runner:run",
    "load_results": "results.results:load",
    "verify": "measure.verification:verify",
    **{name: f"errors:{name}" for name in _ERRORS},
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
