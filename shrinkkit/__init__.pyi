from shrinkkit.core.recipe import Budget, Recipe, Study
from shrinkkit.core.studies import read_recipe, read_study
from shrinkkit.core.studies import study as create_study
from shrinkkit.errors import (
    InvalidInput,
    InvalidTask,
    LeaseLost,
    ModelFileError,
    NothingChanged,
    NothingToPrune,
    ShrinkkitError,
    StepFailed,
    UnfairComparison,
    Unsupported,
)
from shrinkkit.measure.benchmark import compare
from shrinkkit.measure.scoring import score
from shrinkkit.measure.verification import verify
from shrinkkit.pipeline.runner import run
from shrinkkit.results.results import load as load_results
from shrinkkit.runtimes.torch.quantize import dynamic_int8, half, static_int8
from shrinkkit.tasks.adapters import from_loader, from_timm, from_transformers
from shrinkkit.tasks.checks import check as check_task
from shrinkkit.tasks.loader import load as load_task
from shrinkkit.tasks.metrics import Metric
from shrinkkit.tasks.modules import macs, parameters
from shrinkkit.tasks.task import Task
from shrinkkit.transforms.compress import compress
from shrinkkit.transforms.finetune import run as fine_tune
from shrinkkit.transforms.prune import channels as prune_channels
from shrinkkit.transforms.prune import weights as prune_weights

__version__: str

__all__ = [
    "Budget",
    "InvalidInput",
    "InvalidTask",
    "LeaseLost",
    "Metric",
    "ModelFileError",
    "NothingChanged",
    "NothingToPrune",
    "Recipe",
    "ShrinkkitError",
    "StepFailed",
    "Study",
    "Task",
    "UnfairComparison",
    "Unsupported",
    "check_task",
    "compare",
    "compress",
    "create_study",
    "dynamic_int8",
    "fine_tune",
    "from_loader",
    "from_timm",
    "from_transformers",
    "half",
    "load_results",
    "load_task",
    "macs",
    "parameters",
    "prune_channels",
    "prune_weights",
    "read_recipe",
    "read_study",
    "run",
    "score",
    "static_int8",
    "verify",
]
