"""Transforms, from which the stages of a recipe are made: the settings of each, and the table of those that exist.

A transform is known here by name, settings and place of its function; nothing imports torch until it is applied.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from shrinkkit.errors import InvalidInput, brief, message, nearest, options, shown_value

Key = tuple[str | int, ...]
"""The way to a value: keys of mappings and indices of lists, outermost first."""
ENTRY_POINTS = "shrinkkit.transforms"
"""The entry point group in which an installed package offers transforms, each under its name in recipes."""
MOST_EPOCHS, MOST_CHANNELS = 10_000, 65536
"""Limits: passes over the training data, and the multiple that channels are rounded to."""
_FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


class Section(BaseModel):
    """The settings of a transform or precision: frozen, strict, and without unknown keys.

    The description of a field completes the sentence "`field` must be ..." in error messages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)
_Fraction = Annotated[float, Field(ge=0, lt=1)]
Patterns = Annotated[tuple[str, ...], Field(strict=False, description="a list of layer patterns in quotes")]
"""Layer names or globs; see `studies.matches`. From Python, a list is as good as a tuple."""
CHANNEL_CRITERIA = ("magnitude", "batchnorm", "geometric-median", "lamp", "taylor", "random")
"""How the importance of channels can be measured."""
WEIGHT_CRITERIA = ("magnitude", "random")
"""How the importance of weights can be measured."""
SCOPES = ("global", "layer")
"""What is compared with what: all layers together, or each layer by itself."""


def _criterion(names: tuple[str, ...]) -> Any:
    rule = f"{', '.join(names)}, or `package.module:function`"
    return Field(pattern=rf"^({'|'.join(names)}|{_FUNCTION})$", description=rule)


class _Prune(Section):
    ratio: Annotated[_Fraction, Field(description="a number in [0, 1)")]
    """Fraction to remove: of the channels, or of the weights."""
    scope: Literal["layer", "global"] = "global"
    """`layer` takes `ratio` from each layer, `global` compares all layers and takes the least important."""
    skip: Patterns = ()
    """Layers to leave alone."""
    layers: Annotated[dict[str, _Fraction], Field(description="a mapping of layer patterns to numbers in [0, 1)")] = {}
    """Ratio by layer pattern, instead of `ratio`."""


class PruneChannels(_Prune):
    """Remove whole channels: the model stays dense and gets smaller and faster."""

    criterion: Annotated[str, _criterion(CHANNEL_CRITERIA)] = "magnitude"
    """How the importance of channels is measured; or `package.module:function`."""
    round_to: Annotated[
        int, Field(ge=1, le=MOST_CHANNELS, description=f"a whole number >= 1 and at most {MOST_CHANNELS}")
    ] = 8
    """The channels kept are a multiple of this, which kernels like."""


class PruneWeights(_Prune):
    """Set single weights to zero: shapes, dense size and speed stay, the compressed file shrinks."""

    criterion: Annotated[str, _criterion(WEIGHT_CRITERIA)] = "magnitude"
    """How the importance of weights is measured; or `package.module:function`."""
    biases: Annotated[bool, Field(description="true or false")] = False
    """Whether biases are pruned too."""


class FineTune(Section):
    """Train on with the task's own loss; weights that are exactly zero stay zero."""

    epochs: Annotated[
        int, Field(ge=1, le=MOST_EPOCHS, description=f"a whole number >= 1 and at most {MOST_EPOCHS}")
    ] = 3
    """Passes over the training split."""
    learning_rate: Annotated[float, Field(gt=0, description="a number > 0")] = 1e-3
    """Of the first step; it falls to zero along a cosine."""
    batch_size: Annotated[int, Field(ge=2, le=65536, description="a whole number >= 2 and at most 65536")] = 32
    """Examples a step."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; `auto` takes the best device there is."""
    keep_zeros: Annotated[bool, Field(description="true or false")] = True
    """Whether weights that are exactly zero stay zero."""


def settings_of(section: type[S], **values: Any) -> S:
    """Return settings given as arguments in Python.

    Raises:
        InvalidInput: A value breaks its rule; all that do are named.
    """
    try:
        return section(**values)
    except ValidationError as error:
        lines = []
        for detail in error.errors(include_url=False):
            field = section.model_fields.get(str(detail["loc"][0]))
            rule = expected(detail.get("ctx", {})) or (field.description if field else "") or detail["msg"]
            lines.append(broken(detail["loc"], rule, detail["input"]))
        raise InvalidInput("\n".join(lines)) from error


def expected(context: Mapping[str, Any]) -> str:
    """Return the values that pydantic's account of an error allows, '' where it names none."""
    allowed = context.get("allowed") or re.findall(r"'([^']+)'", context.get("expected", ""))
    return options(list(allowed)) if allowed else ""


def broken(key: Key, rule: str, value: Any, where: str = "", remedy: str = "") -> str:
    """Return that the value at `key` must be what `rule` says, with a remedy where one is known."""
    if isinstance(value, str):
        remedy = nearest(value, re.findall(r"[\w/-]+", rule)) + remedy
    if rule.endswith(("[0, 1)", "[0, 1]")) and isinstance(value, int | float) and 1 < value < 100:
        remedy = f"For {value:g} %, pass {value / 100:g}."
    return message(f"`{dotted(key)}` must be {rule}, got {shown_value(value)}", where, remedy)


def dotted(key: Key) -> str:
    """Return a key as messages name it: `stages.0.prune-channels.ratio`."""
    return ".".join(map(str, key))


@dataclass(frozen=True)
class Transform:
    """What takes a model to a model in torch and knows no runtime.

    Args:
        name: In recipes.
        section: Its settings.
        apply: `package.module:function`, or the function itself, which then works in this process only. Called as
            `apply(model, task, section, *, seed, progress)`, it returns a `shrinkkit.transforms.transform.Made` and
            leaves `model` unchanged.
        notebook: The stem of the notebook that executes it.
        trains: Whether it only trains: such a stage is measured together with the stage before it.
    """

    name: str
    section: type[Section]
    apply: str | Callable[..., Any]
    notebook: str = "2-transform"
    trains: bool = False

    def function(self) -> Callable[..., Any]:
        """Return the function that `apply` names."""
        return self.apply if callable(self.apply) else imported(self.apply)


TRANSFORMS: dict[str, Transform] = {
    one.name: one
    for one in (
        Transform("prune-channels", PruneChannels, "shrinkkit.transforms.prune:apply_channels", "2-prune"),
        Transform("prune-weights", PruneWeights, "shrinkkit.transforms.prune:apply_weights", "2-prune"),
        Transform("fine-tune", FineTune, "shrinkkit.transforms.finetune:apply", "2-train", trains=True),
    )
}
"""Those that come with shrinkkit, by name."""


def names() -> tuple[str, ...]:
    """Return the names of all transforms, those of installed packages last."""
    return tuple(dict.fromkeys([*TRANSFORMS, *(entry.name for entry in metadata.entry_points(group=ENTRY_POINTS))]))


def transform(name: str) -> Transform:
    """Return the transform called `name`.

    Raises:
        InvalidInput: There is none, or the entry point of that name gives none.
    """
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    entries = [entry for entry in metadata.entry_points(group=ENTRY_POINTS) if entry.name == name]
    if not entries:
        raise InvalidInput(f"There is no transform {name!r}. {nearest(name, names())} Available: {', '.join(names())}.")
    try:
        loaded = entries[0].load()
    except Exception as error:
        raise InvalidInput(
            f"The transform {name!r} ({entries[0].value}) cannot be imported: {brief(error)}."
        ) from error
    if not isinstance(loaded, Transform) or loaded.name != name:
        raise InvalidInput(
            f"The entry point {entries[0].value} must give a `Transform` called {name!r}, got {loaded!r:.100}."
        )
    return loaded


def imported(path: str) -> Callable[..., Any]:
    """Return the function that `path` names as `package.module:function`.

    Raises:
        InvalidInput: It cannot be imported, or is no function.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:
        raise InvalidInput(f"{path!r} cannot be imported: {brief(error)}. Is its package installed here?") from error
    if not callable(function):
        raise InvalidInput(f"{path!r} must be a function, got {type(function).__name__}.")
    return function  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Choice:
    """A transform or a precision by its name, with its settings. In YAML it is `name: {settings}`, or `name` alone."""

    name: str
    settings: Section

    def to_dict(self) -> dict[str, Any]:
        """Return it as in YAML, with defaults filled in."""
        return {self.name: self.settings.model_dump(mode="json")}

    def patterns(self) -> tuple[tuple[Key, str], ...]:
        """Return its layer patterns, which stand in the settings `skip` and `layers`, each with its key."""
        skip: tuple[str, ...] = getattr(self.settings, "skip", ())
        layers: dict[str, float] = getattr(self.settings, "layers", {})
        skipped: list[tuple[Key, str]] = [((self.name, "skip", i), pattern) for i, pattern in enumerate(skip)]
        return (*skipped, *(((self.name, "layers", pattern), pattern) for pattern in layers))


@dataclass(frozen=True)
class Stage(Choice):
    """One stage of a recipe."""

    transform: Transform


def choice(value: Any, allowed: tuple[str, ...]) -> tuple[str, Any]:
    """Return the name, one of `allowed`, and the plain settings of `value`: of `name` or `name: {settings}`."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise PydanticCustomError("choice_form", "not `name: {settings}`")
    ((name, settings),) = value.items()
    if name not in allowed:
        raise PydanticCustomError("choice", "unknown", {"name": str(name), "allowed": allowed})
    return name, {} if settings is None else settings


def _stage(value: Any) -> Stage:
    if isinstance(value, Stage):
        return value
    if isinstance(value, Section):
        one = next((t for t in TRANSFORMS.values() if t.section is type(value)), None)
        if one is None:
            raise PydanticCustomError("choice_form", "neither a stage nor settings of a built-in transform")
        return Stage(one.name, value, one)
    name, settings = choice(value, names())
    one = transform(name)
    return Stage(name, one.section.model_validate(settings), one)


def stage(name: str, settings: Mapping[str, Any]) -> Stage:
    """Return the stage of the transform called `name` with plain settings.

    Raises:
        InvalidInput: There is no such transform, or a setting breaks its rule.
    """
    one = transform(name)
    return Stage(name, settings_of(one.section, **settings), one)


StageField = Annotated[Stage, PlainValidator(_stage), PlainSerializer(Choice.to_dict)]
