"""Recipes and studies: what they may say, and what does not go together."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from shrinkkit.core.stages import FLOAT32, PRECISIONS, Key, PrecisionField, Section, StageField, whole
from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, facts
from shrinkkit.errors import message, nearest, options

BUILT_IN: tuple[str, ...] = (
    *("channels-50", "weights-80", "dynamic-int8", "static-int8"),
    *("float16", "bfloat16", "channels-50-static-int8"),
)
"""Names of the recipes that come with shrinkkit."""

TASKS: tuple[str, ...] = ("digits-cnn", "digits-lstm", "digits-transformer")
"""Names of the tasks that come with shrinkkit; each has a built-in study of the same name."""
_TASK = options((*TASKS, "the path of a Python file", "hf:PATH?data=FILE"))
HUB = "hf:"
"""Beginning of a task that is a Hugging Face model and data: `hf:PATH?data=FILE`. PATH is a name on the hub unless it
starts with `/` or `.`, as paths in a checked study do."""

BASELINE = "baseline"
"""The name of the unchanged model's variant, which no recipe may take."""
FOUND = ("tuned", "tuned-2", "tuned-3", "tuned-4")
"""The names of the recipes that a search finds, the boldest first."""
STAGE = ".stage-"
"""What stands between the name of a recipe and the number of stages, in the name of a part of the recipe."""
MOST_STAGES = 100
"""Of a recipe."""
RECIPES = "a list of at least one recipe: a built-in name, the path of a YAML file, or a mapping with a `name`"

Effort = Literal["quick", "standard", "thorough"]
Mode = Literal["compress", "robust", "all"]
CHAPTERS: Mapping[str, str] = {
    "compress": "size, speed and accuracy",
    "robust": "size, accuracy and robustness",
    "all": "size, speed, accuracy and robustness",
}
"""What the report of a run in each mode is about."""
_TARGET = "device/runtime, such as cpu/torch"
TargetName = Annotated[str, Field(pattern="^(cpu|cuda|mps)/[A-Za-z0-9_]+$", description=_TARGET)]
"""Which ones exist, the runtimes say; see `registry.check_targets`."""


def _fit_for_a_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise PydanticCustomError("unfit_name", "not fit for a folder")
    return name


def _unreserved(name: str) -> str:
    if name.lower() == BASELINE:
        raise PydanticCustomError("rule", "`name` must not be `baseline`, which names the unchanged model")
    if re.search(rf"{re.escape(STAGE)}\d+$", name.lower()):
        rule = f"`name` must not end in `{STAGE}` and a number, which names a part of a recipe"
        raise PydanticCustomError("rule", rule)
    return name


FolderName = Annotated[
    str,
    AfterValidator(_fit_for_a_folder),
    Field(description="a folder name (letters, digits, `.`, `_` and `-`, at most 64, the first a letter or digit)"),
]


class Recipe(Rich, Section):
    """How a model is compressed: stages that transform it in torch, and the precision that it is computed in."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: Annotated[FolderName, AfterValidator(_unreserved)]
    """Also the name of the variant and of its folder."""
    stages: Annotated[
        tuple[StageField, ...],
        Field(strict=False, max_length=MOST_STAGES, description=f"a list of at most {MOST_STAGES} transforms"),
    ] = ()
    """From the first to the last."""
    precision: Annotated[PrecisionField, Field(description=f"one of {', '.join(PRECISIONS)}")] = FLOAT32
    where: dict[str, str] = Field(default={}, repr=False)
    """`file:line` of each layer pattern, by its key. Says nothing about what the recipe does."""

    @model_validator(mode="after")
    def _does_something(self) -> "Recipe":
        if not self.stages and self.precision.name == "float32":
            raise PydanticCustomError("rule", "A recipe must have `stages`, a `precision` other than float32, or both")
        return self

    def settings(self) -> dict[str, Any]:
        """Return its stages and precision, with defaults filled in, as plain JSON values; not its name or source."""
        return self.model_dump(mode="json", include={"stages", "precision"})

    def to_dict(self) -> dict[str, Any]:
        """Return its name, stages and precision, with defaults filled in."""
        return {"name": self.name, **self.settings()}

    def patterns(self) -> tuple[tuple[Key, str], ...]:
        """Return its layer patterns, each with its key."""
        stages = ((("stages", i, *key), p) for i, stage in enumerate(self.stages) for key, p in stage.patterns())
        return (*stages, *((("precision", *key), pattern) for key, pattern in self.precision.patterns()))

    def shown(self) -> Shown:
        """Return its stages and precision, a line each."""
        return facts(f"Recipe {self.name}", described(self.settings()))


def described(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a recipe's plain settings do: the name of each stage and of the precision, and their settings."""
    stages, precision = recipe.get("stages"), recipe.get("precision")
    choices = [*(stages if isinstance(stages, (list, tuple)) else ()), precision]
    pairs = [pair for one in choices if isinstance(one, dict) for pair in one.items() if isinstance(pair[1], dict)]
    return [(name, formats.settings(settings)) for name, settings in pairs if name != "float32"]


MOST_THREADS, MOST_BATCH, MOST_SIZES, MOST_SECONDS = 1024, 65536, 16, 2_678_400
"""Limits of a study: threads of a call, examples of a batch, entries of a sweep, and seconds of a step (31 days)."""
_Threads = Annotated[int, whole(1, MOST_THREADS)]
_Batch = Annotated[int, whole(1, MOST_BATCH)]


def _sizes(most: int) -> Any:
    rule = f"a list of at most {MOST_SIZES} whole numbers >= 1 and at most {most}"
    return Field(strict=False, max_length=MOST_SIZES, description=rule)


BatchSizes = Annotated[tuple[_Batch, ...], _sizes(MOST_BATCH)]
ThreadCounts = Annotated[tuple[_Threads, ...], _sizes(MOST_THREADS)]


class Budget(Section):
    """The largest accuracy drop that is accepted, and what for."""

    unit: Annotated[Literal["share", "score"], Field(description="share or score")] = "share"
    """Of `accuracy_drop`: `share` for scores in [0, 1]; `score` for others, in their unit."""
    accuracy_drop: Annotated[float, Field(ge=0, description="a share in [0, 1]")] = 0.01
    """Of shares, 0.01 is one percentage point, and 1 is the most."""
    robustness_drop: Annotated[float | None, Field(ge=0, description="a share in [0, 1], or null for no limit")] = None
    """The most that the mean score on corrupted inputs may drop, in the unit of `accuracy_drop`; None for any."""
    want: Literal["fastest", "smallest"] = "fastest"
    """What to pick among the variants within the budget."""
    target: Annotated[TargetName | None, Field(description=_TARGET)] = None
    """Where it is to be fastest; None leaves it to the report."""

    @field_validator("accuracy_drop", "robustness_drop")
    @classmethod
    def _is_a_share(cls, drop: float | None, others: ValidationInfo) -> float | None:
        if others.data.get("unit") == "share" and drop is not None and not drop <= 1:
            raise PydanticKnownError("less_than_equal", {"le": 1})
        return drop


class Search(Section):
    """A search for recipes that keep the budget and are best at what it wants, on its target."""

    minutes: Annotated[float, Field(gt=0, le=10_080, description="a number of minutes > 0 and at most 10080")] = 10.0
    """For which recipes are tried; those that are found are made and measured after it."""


_BUDGET = "a section with `accuracy_drop`, `unit`, `want` or `target`"


class Study(Rich, Section):
    """One task, the recipes to try on it, the targets to measure them on, and a budget."""

    name: FolderName
    """Also the name of the run folder."""
    task: Annotated[str, Field(min_length=1, description=_TASK)]
    """A name of `TASKS`, the absolute path of a Python file with a function `task()`, or `HUB` with absolute paths."""
    recipes: Annotated[tuple[Recipe, ...], Field(strict=False, description=RECIPES)] = ()
    """At least one, unless there is a `search`."""
    targets: Annotated[
        tuple[TargetName, ...],
        Field(strict=False, min_length=1, description="a list of at least one target, such as cpu/torch"),
    ]
    budget: Annotated[Budget, Field(description=_BUDGET)] = Budget()
    search: Annotated[Search | None, Field(description="a section with `minutes`, or null")] = None
    """Whether recipes are searched for besides; None for no."""
    seed: Annotated[int, Field(ge=0, lt=2**32, description="a whole number in [0, 4294967296)")] = 0
    threads: Annotated[_Threads | None, Field(description=f"a whole number >= 1 and at most {MOST_THREADS}")] = None
    """None takes every core that this process may use."""
    batch_sizes: BatchSizes = (1, 32)
    """Batches to time variants on besides that of the task's example."""
    thread_counts: ThreadCounts = (1,)
    """Numbers of threads to time variants with besides `threads`."""
    today: Literal["eager", "compiled"] = "eager"
    """How the task's own module is called, as the reference that speed-ups are against: `compiled` by torch.compile."""
    effort: Effort = "standard"
    """How long variants are timed, and which of them at other batch sizes and thread counts; see `measure.session`."""
    mode: Annotated[Mode, Field(description="compress, robust or all")] = "compress"
    """What is measured of variants: their speed, their robustness, or both. Size and accuracy always are."""
    timeout_s: Annotated[
        float, Field(gt=0, le=MOST_SECONDS, description=f"a number of seconds > 0 and at most {MOST_SECONDS}")
    ] = 1800.0
    """Seconds that one step may take."""
    notes: Annotated[tuple[str, ...], Field(strict=False, description="a list of sentences")] = ()
    """Sentences for the log and the report, such as why a recipe was left out."""

    def to_dict(self) -> dict[str, Any]:
        """Return its fields, with defaults filled in."""
        return self.model_dump(mode="json", exclude={"recipes": {"__all__": {"where"}}})

    def shown(self) -> Shown:
        """Return what is done to what, where, and within which budget."""
        budget = self.budget
        drop = f"{formats.percent(budget.accuracy_drop)} of accuracy"
        drop = drop if budget.unit == "share" else f"{budget.accuracy_drop:g} of the score"
        where = f" on {budget.target}" if budget.target else ""
        pairs = [("task", self.task)]
        for recipe in self.recipes:
            steps = [f"{name} {settings}".strip() for name, settings in described(recipe.settings())]
            pairs.append((f"recipe {recipe.name}", " | ".join(steps)))
        if self.search:
            pairs.append(("search", f"{self.search.minutes:g} min on {self.searched}"))
        pairs += [
            ("targets", ", ".join(self.targets)),
            ("budget", f"at most {drop}, for the {budget.want}{where}"),
            ("report", CHAPTERS[self.mode]),
            ("seed", str(self.seed)),
        ]
        return facts(f"Study {self.name}", pairs)

    @property
    def searched(self) -> str:
        """The target of its search."""
        return self.budget.target or self.targets[0]

    def _rows(self) -> list[dict[str, Any]]:
        return [row for recipe in self.recipes for row in recipe._rows()]

    @model_validator(mode="after")
    def _agrees(self) -> "Study":
        recipes = [((), recipe) for recipe in self.recipes]
        problems = conflicts(recipes, self.targets, self.budget.target, searches=self.search is not None)
        if self.mode == "compress" and self.budget.robustness_drop is not None:
            raise PydanticCustomError("rule", NOT_ROBUST)
        if wrong := "\n".join(message(text, "", remedy) for _, text, remedy in problems):
            raise ValueError(wrong)
        return self


NOT_ROBUST = "`budget.robustness_drop` goes with a mode that measures robustness. Set `mode` to `robust` or `all`"


def conflicts(
    recipes: Sequence[tuple[Key, Recipe]], targets: Sequence[str], budget_target: str | None, *, searches: bool | None
) -> Iterator[tuple[Key, str, str]]:
    """Yield what does not go together in a study: the key, what is wrong, and the remedy.

    `searches` is whether it has a search; None if what it has is wrong anyway.
    """
    if not recipes and searches is False:
        yield ("recipes",), f"`recipes` must be {RECIPES}, got []", ""
    if searches and len(targets) > 1 and not budget_target:
        yield ("search",), "`search` needs one target, but the study has several", "Name it as `budget.target`."
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


def hub_parts(task: str) -> tuple[str, str]:
    """Return the model and the data that a task `hf:PATH?data=FILE` names; the data are '' if it names none."""
    model, _, data = task.removeprefix(HUB).partition("?data=")
    return model, data


def relocated(task: str, change: Callable[[str], str]) -> str:
    """Return a task with its paths changed; names of bundled tasks and of models on the hub stay."""
    if task in TASKS:
        return task
    if not task.startswith(HUB):
        return change(task)

    def changed(path: str) -> str:
        path = change(path)
        return path if path.startswith((".", os.sep)) else f".{os.sep}{path}"

    model, data = hub_parts(task)
    is_path = model.startswith((".", os.sep)) or os.path.isdir(model)
    return f"{HUB}{changed(model) if is_path else model}" + (f"?data={changed(data)}" if data else "")


def title(task: str) -> str:
    """Return the name of a study of `task`: the last part of its path, or of its model's."""
    if task.startswith(HUB):
        return re.sub(r"[^\w.-]", "-", Path(os.path.abspath(hub_parts(task)[0])).name)
    return Path(task).stem
