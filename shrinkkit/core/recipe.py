"""YAML files whose every key knows its line, and the words in which a mistake in one is told."""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from shrinkkit.core.target import TARGETS, TargetName
from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, Table, facts
from shrinkkit.errors import InvalidInput, message, nearest, options

Key = tuple[str | int, ...]
"""The way to a value: keys of mappings and indices of lists, outermost first."""

BUILT_IN: tuple[str, ...] = (
    "channels-50",
    "weights-80",
    "dynamic-int8",
    "static-int8",
    "float16",
    "bfloat16",
    "channels-50-static-int8",
)
"""Names of the recipes that come with shrinkkit."""

TASKS: tuple[str, ...] = ("digits-cnn", "digits-lstm", "digits-transformer")
"""Names of the tasks that come with shrinkkit; each has a built-in study of the same name."""

BASELINE = "baseline"
"""The name of the unchanged model's variant, which no recipe may take."""

_INT8 = ("dynamic-int8", "static-int8")
_HALF = ("float16", "bfloat16")
METHODS = (*_INT8, *_HALF)
"""Of quantization."""
_IMPOSSIBLE = {
    **{(method, "cuda/torch"): "torch has no CUDA kernels for its int8 layers" for method in _INT8},
    **{(method, "mps/torch"): "torch has no int8 layers on Apple GPUs" for method in _INT8},
    **{(method, "cuda/inductor"): "inductor has no CUDA kernels for int8 models of torch.export" for method in _INT8},
    **{
        (method, "cuda/onnxruntime"): "ONNX Runtime computes int8 models in float on CUDA, between casts"
        for method in _INT8
    },
    ("float16", "cpu/onnxruntime"): "ONNX Runtime has no float16 kernels for CPUs and casts each layer back to float32",
    ("bfloat16", "cpu/onnxruntime"): "ONNX Runtime has no bfloat16 kernels for CPUs and refuses to load the model",
    **{
        (method, "cuda/onnxruntime"): "only float32 files are made for ONNX Runtime; cuda/torch has 16-bit ones"
        for method in _HALF
    },
}


def _fit_for_a_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise PydanticCustomError("unfit_name", "not fit for a folder")
    return name


def _unreserved(name: str) -> str:
    if name.lower() == BASELINE:
        raise PydanticCustomError("rule", "`name` must not be `baseline`, which names the unchanged model")
    if name.lower().endswith(".pruned"):
        raise PydanticCustomError(
            "rule", "`name` must not end in `.pruned`, which names what is pruned and not yet quantized"
        )
    return name


MOST_EPOCHS, MOST_CHANNELS, MOST_STEPS = 10_000, 65536, 1000
"""Limits of a recipe: passes over the training data, channels that are left or go together, and steps of pruning."""
_FolderName = Annotated[str, AfterValidator(_fit_for_a_folder)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Patterns = Annotated[tuple[str, ...], Field(strict=False)]  # from Python, a list is as good as a tuple


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _AnyPrune(_Section):
    ratio: _Share
    """Share to remove: of the channels, or of the weights."""
    scope: Literal["layer", "global"] = "global"
    """`layer` takes `ratio` from each layer, `global` compares all layers and takes most where least is lost."""
    skip: _Patterns = ()
    """Patterns of layer names to leave alone; see `matches`."""
    layers: dict[str, _Share] = {}
    """Ratio by pattern of layer names, instead of `ratio`."""
    epochs: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] = 3
    """Passes over the training data that fine-tune the pruned model, per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Of the fine-tuning."""


class PruneChannels(_AnyPrune):
    """Remove whole channels: the model stays dense and gets smaller and faster."""

    method: Literal["channels"]
    criterion: Literal["magnitude", "batchnorm", "geometric-median", "lamp", "taylor", "random"] = "magnitude"
    """What makes a channel important."""
    round_to: Annotated[int, Field(ge=1, le=MOST_CHANNELS)] = 8
    """Channels are left in multiples of this, which kernels like."""
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 1
    """Prune and fine-tune this many times, a part of `ratio` each."""


class PruneWeights(_AnyPrune):
    """Set single weights to zero: shapes, dense size and speed stay, the compressed file shrinks."""

    method: Literal["weights"]
    criterion: Literal["magnitude", "random"] = "magnitude"
    """What makes a weight important."""
    biases: bool = False
    """Whether biases are pruned too."""


class QuantizeStatic(_Section):
    """Compute in 8-bit integers, with ranges of activations fixed beforehand on calibration data."""

    method: Literal["static-int8"]
    skip: _Patterns = ()
    """Patterns of layer names to leave in float; see `matches`."""
    calibration_examples: Annotated[int, Field(ge=1)] = 128
    """Examples of the calibration split that set the ranges."""


class QuantizeDirect(_Section):
    """Compute in 8-bit integers or 16-bit floats, without calibration data."""

    method: Literal["dynamic-int8", "float16", "bfloat16"]
    skip: _Patterns = ()
    """Patterns of layer names to leave in float32; see `matches`."""


Prune = Annotated[PruneChannels | PruneWeights, Field(discriminator="method")]
Quantize = Annotated[QuantizeStatic | QuantizeDirect, Field(discriminator="method")]


class Recipe(Rich, _Section):
    """How a model is compressed: pruned, quantized, or first the one and then the other."""

    name: Annotated[_FolderName, AfterValidator(_unreserved)]
    """Also the name of the variant and of its folder."""
    prune: Prune | None = None
    quantize: Quantize | None = None
    where: dict[str, str] = Field(default={}, repr=False)
    """`file:line` of each layer pattern, by its key. Says nothing about what the recipe does."""

    @model_validator(mode="after")
    def _does_something(self) -> "Recipe":
        if self.prune is None and self.quantize is None:
            raise PydanticCustomError("rule", "A recipe must have a section `prune` or `quantize`, or both")
        return self

    def settings(self) -> dict[str, Any]:
        """Return what the recipe does, with defaults filled in, as plain JSON values; not its name or source."""
        return self.model_dump(mode="json", include={"prune", "quantize"}, exclude_none=True)

    def to_dict(self) -> dict[str, Any]:
        """Return its name and its sections, with defaults filled in."""
        return {"name": self.name, **self.settings()}

    def shown(self) -> Shown:
        """Return its sections, a line each."""
        return recipe_table(self)


MOST_THREADS, MOST_BATCH, MOST_SIZES, MOST_SECONDS = 1024, 65536, 16, 2_678_400
"""Limits of a study: threads of a call, examples of a batch, entries of a sweep, and seconds of a step (31 days)."""
_Threads = Annotated[int, Field(ge=1, le=MOST_THREADS)]
_Batch = Annotated[int, Field(ge=1, le=MOST_BATCH)]


class Budget(_Section):
    """The most accuracy that may be given up, and what for."""

    unit: Literal["share", "score"] = "share"
    """Of `accuracy_drop`: `share` for scores in [0, 1]; `score` for others, which have a unit of their own."""
    accuracy_drop: Annotated[float, Field(ge=0)] = 0.01
    """Of shares, 0.01 is one percentage point, and 1 is the most."""
    want: Literal["fastest", "smallest"] = "fastest"
    """What to pick among the variants that keep within the budget."""
    target: TargetName | None = None
    """Where it is to be fastest; None leaves it to the report."""

    @field_validator("accuracy_drop")
    @classmethod
    def _is_a_share(cls, drop: float, others: ValidationInfo) -> float:
        if others.data.get("unit") == "share" and not drop <= 1:
            raise PydanticKnownError("less_than_equal", {"le": 1})
        return drop


class Study(Rich, _Section):
    """One task, the recipes to try on it, the targets to measure them on, and a budget."""

    name: _FolderName
    """Also the name of the run folder."""
    task: Annotated[str, Field(min_length=1)]
    """A name of `TASKS`, or the absolute path of a Python file with one function `task()`."""
    recipes: Annotated[tuple[Recipe, ...], Field(strict=False, min_length=1)]
    targets: Annotated[tuple[TargetName, ...], Field(strict=False, min_length=1)]
    budget: Budget = Budget()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    threads: _Threads | None = None
    """None takes every core that this process may use."""
    batch_sizes: Annotated[tuple[_Batch, ...], Field(strict=False, max_length=MOST_SIZES)] = (1, 32)
    """Batches to time every variant on besides that of the task's example."""
    thread_counts: Annotated[tuple[_Threads, ...], Field(strict=False, max_length=MOST_SIZES)] = (1,)
    """Numbers of threads to time every variant with besides `threads`."""
    today: Literal["eager", "compiled"] = "eager"
    """How the task's own module is called, as the reference that speed-ups are against: `compiled` by torch.compile."""
    timeout_s: Annotated[float, Field(gt=0, le=MOST_SECONDS)] = 1800.0
    """Seconds that one step may take."""

    def to_dict(self) -> dict[str, Any]:
        """Return what it says, with defaults filled in."""
        return {**self.model_dump(mode="json"), "recipes": [recipe.to_dict() for recipe in self.recipes]}

    def shown(self) -> Shown:
        """Return what is done to what, where, and within which budget."""
        return study_table(self)

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for each recipe."""
        return [row for recipe in self.recipes for row in recipe._rows()]

    @model_validator(mode="after")
    def _agrees(self) -> "Study":
        recipes: list[tuple[Key, Recipe]] = [(("recipes", i), recipe) for i, recipe in enumerate(self.recipes)]
        if wrong := [
            message(text, "", remedy) for _, text, remedy in conflicts(recipes, self.targets, self.budget.target)
        ]:
            raise ValueError("\n".join(wrong))
        return self


RULES = {
    "name": "a name fit for a folder (letters, digits, `.`, `_` and `-`, at most 64, the first a letter or digit)",
    "prune": "a section with at least `method` and `ratio`",
    "prune.method": "channels or weights",
    "prune.ratio": "a number in [0, 1)",
    "prune.skip": "a list of layer patterns",
    "prune.skip.*": "a layer pattern in quotes",
    "prune.layers": "a mapping of layer patterns to ratios",
    "prune.layers.*": "a number in [0, 1)",
    "prune.round_to": f"a whole number >= 1 and at most {MOST_CHANNELS}",
    "prune.steps": f"a whole number >= 1 and at most {MOST_STEPS}",
    "prune.biases": "true or false",
    "prune.epochs": f"a whole number >= 0 and at most {MOST_EPOCHS}",
    "prune.learning_rate": "a number > 0",
    "quantize": "a section with at least `method`",
    "quantize.method": "dynamic-int8, static-int8, float16 or bfloat16",
    "quantize.skip": "a list of layer patterns",
    "quantize.skip.*": "a layer pattern in quotes",
    "quantize.calibration_examples": "a whole number >= 1",
    "task": f"{options(TASKS)}, or the path of a Python file",
    "recipes": "a list of at least one recipe: a built-in name, the path of a YAML file, or a mapping with a `name`",
    "targets": f"a list of at least one of {options(TARGETS)}",
    "budget": "a section with `accuracy_drop`, `unit`, `want` or `target`",
    "budget.unit": "share or score",
    "budget.accuracy_drop": "a share in [0, 1]",
    "seed": "a whole number in [0, 4294967296)",
    "threads": f"a whole number >= 1 and at most {MOST_THREADS}",
    "batch_sizes": f"a list of whole numbers >= 1, at most {MOST_SIZES} of them",
    "batch_sizes.*": f"a whole number >= 1 and at most {MOST_BATCH}",
    "thread_counts": f"a list of whole numbers >= 1, at most {MOST_SIZES} of them",
    "thread_counts.*": f"a whole number >= 1 and at most {MOST_THREADS}",
    "today": "eager or compiled",
    "timeout_s": f"a number of seconds > 0 and at most {MOST_SECONDS}",
}
"""What a setting must be, by its key; `*` stands for each entry of a list or mapping."""

IN_SHARES = {
    "prune.ratio": "To remove {percent}, pass {share}.",
    "prune.layers.*": "To remove {percent}, pass {share}.",
    "budget.accuracy_drop": "For {points} points, pass {share}.",
}
"""What to tell whoever wrote per cent, by key."""

SECTIONS: dict[str, type[BaseModel]] = {
    "budget": Budget,
    "channels": PruneChannels,
    "weights": PruneWeights,
    "static-int8": QuantizeStatic,
    **dict.fromkeys(get_args(QuantizeDirect.model_fields["method"].annotation), QuantizeDirect),
}
"""What holds the keys of a section, by its `method`, or by its own key where it has none."""


def impossible(recipe: Recipe, target: str) -> str:
    """Return why no model can be had by `recipe` on `target`, or '' when it can.

    Raises:
        InvalidInput: `target` is not one of `TARGETS`.
    """
    if target not in TARGETS:
        raise InvalidInput(f"`target` must be {options(TARGETS)}, got {target!r}.{nearest(target, TARGETS)}")
    return _IMPOSSIBLE.get((recipe.quantize.method, target), "") if recipe.quantize else ""


def conflicts(
    recipes: Sequence[tuple[Key, Recipe]], targets: Sequence[str], budget_target: str | None
) -> Iterator[tuple[Key, str, str]]:
    """Yield what does not go together in a study: the key, what is wrong, and the remedy.

    Args:
        recipes: Each with its key in the study.
        targets: Of `TARGETS`.
        budget_target: The budget's target, if it names one.
    """
    names: set[str] = set()
    for key, recipe in recipes:
        if recipe.name.lower() in names:
            # Folders differ in more than case, because some file systems do not see it.
            yield key, f"`recipes` holds two named {recipe.name!r}", "Give one of them another `name`."
        names.add(recipe.name.lower())
    for i, target in enumerate(targets):
        if target in targets[:i]:
            yield ("targets", i), f"`targets` names {target!r} twice", "Keep one of them."
    targets = list(dict.fromkeys(targets))
    if budget_target is not None and targets and budget_target not in targets:
        text = f"`budget.target` must be one of the study's targets ({', '.join(targets)}), got {budget_target!r}"
        yield ("budget", "target"), text, nearest(str(budget_target), targets)
    for key, recipe in recipes:
        reasons = [impossible(recipe, target) for target in targets]
        if recipe.quantize and reasons and all(reasons):
            method = recipe.quantize.method
            why = "; ".join(f"{target}: {reason}" for target, reason in zip(targets, reasons, strict=True))
            yield (
                key,
                f"`{method}` of recipe {recipe.name!r} can run on no target of the study: {why}",
                _remedy(method, targets),
            )


def _remedy(method: str, targets: Sequence[str]) -> str:
    possible = [m for m in SECTIONS if any(_runs(m, t) for t in targets) and m not in ("budget", "channels", "weights")]
    elsewhere = [t for t in TARGETS if _runs(method, t)]
    return f"Possible there: {', '.join(possible)}. `{method}` can run on {options(elsewhere)}."


def _runs(method: str, target: str) -> bool:
    return (method, target) not in _IMPOSSIBLE


def recipe_table(of: "Recipe") -> Table:
    """Return the sections of a recipe, a line each."""
    return facts(f"Recipe {of.name}", [(name, formats.settings(section)) for name, section in of.settings().items()])


def study_table(of: "Study") -> Table:
    """Return what is done to what, where, and within which budget."""
    drop = of.budget.accuracy_drop
    most = formats.percent(drop) + " of accuracy" if of.budget.unit == "share" else f"{drop:g} of the score"
    budget = f"at most {most}, for the {of.budget.want}"
    pairs = [
        ("task", of.task),
        *(
            (f"recipe {one.name}", " | ".join(formats.settings(section) for section in one.settings().values()))
            for one in of.recipes
        ),
        ("targets", ", ".join(of.targets)),
        ("budget", budget + (f" on {of.budget.target}" if of.budget.target else "")),
        ("seed", str(of.seed)),
    ]
    return facts(f"Study {of.name}", pairs)
