"""What a recipe is made of: transforms and precisions, the settings of each, and what is wrong with settings.

A transform is known here by name, settings and place of its function; nothing imports torch until it is applied.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from shrinkkit.errors import InvalidInput, brief, message, nearest, options, shown_value

Key = tuple[str | int, ...]
"""The way to a value: keys of mappings and indices of lists, outermost first."""
ENTRY_POINTS = "shrinkkit.transforms"
"""The entry point group in which an installed package offers transforms, each under its name in recipes."""
MOST_EPOCHS, MOST_CHANNELS = 10_000, 65536
"""Limits: passes over the training data, and the multiple that channels are rounded to."""


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
WEIGHT_CRITERIA = ("magnitude", "random", "wanda", "sparsegpt")
"""How the importance of weights can be measured."""
BY_DATA = ("wanda", "sparsegpt")
"""Criteria for weights that need calibration data, and compare the weights of one layer only."""
SCOPES = ("global", "layer")
"""What is compared with what: all layers together, or each layer by itself."""


def _criterion(names: tuple[str, ...]) -> Any:
    rule = f"{', '.join(names)}, or `package.module:function`"
    return Field(pattern=rf"^({'|'.join(names)}|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$", description=rule)


def whole(least: int, most: int | None = None) -> Any:
    """Return the rule of a field: a whole number of at least `least` and at most `most`."""
    return Field(ge=least, le=most, description=f"a whole number >= {least}{f' and at most {most}' if most else ''}")


def _one_of(section: S, *names: str) -> S:
    """Return `section` if just one of its fields `names` is not None."""
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        got = " and ".join(f"`{name}`" for name in given) or "none"
        rule = f"One of {', '.join(f'`{name}`' for name in names)} must be given, got {got}"
        raise PydanticCustomError("rule", rule)
    return section


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
    """Remove whole channels: the model stays dense, and gets smaller and faster everywhere."""

    criterion: Annotated[str, _criterion(CHANNEL_CRITERIA)] = "magnitude"
    """How the importance of channels is measured; or `package.module:function`."""
    round_to: Annotated[int, whole(1, MOST_CHANNELS)] = 8
    """The channels kept are a multiple of this, which kernels like."""


class PruneWeights(_Prune):
    """Set single weights to zero: shapes, dense size and speed stay, the compressed file shrinks."""

    criterion: Annotated[str, _criterion(WEIGHT_CRITERIA)] = "magnitude"
    """How the importance of weights is measured; or `package.module:function`."""
    biases: Annotated[bool, Field(description="true or false")] = False
    """Whether biases are pruned too."""
    pattern: Annotated[str | None, Field(pattern=r"^[1-9]\d*:[1-9]\d*$", description='N:M, such as "2:4"')] = None
    """N:M keeps the N most important of each M neighbouring weights of an output. The ratio follows from it."""
    calibration_examples: Annotated[int, whole(1)] = 128
    """Examples of the calibration split, for `wanda` and `sparsegpt`."""

    def kept(self) -> tuple[int, int] | None:
        """Return N and M of the pattern; None without one."""
        kept, _, of = (self.pattern or "").partition(":")
        return (int(kept), int(of)) if self.pattern else None

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, values: Any) -> Any:
        if isinstance(values, dict) and (values.get("pattern") or values.get("criterion") in BY_DATA):
            values = {"scope": "layer"} | values
            if re.fullmatch(r"[1-9]\d*:[1-9]\d*", str(values.get("pattern"))):
                kept, of = map(int, values["pattern"].split(":"))
                values = {"ratio": max(0.0, 1 - kept / of)} | values
        return values

    @model_validator(mode="after")
    def _agrees(self) -> "PruneWeights":
        cause, kept = "pattern" if self.pattern else f"criterion: {self.criterion}", self.kept()
        rule = ""
        if kept and not kept[0] < kept[1]:
            rule = f"`pattern` must keep less than all of its weights, got {self.pattern}. For half, pass 2:4"
        elif kept and (self.ratio != 1 - kept[0] / kept[1] or self.layers):
            rule = f"`pattern: {self.pattern}` says what is removed: leave out `ratio` and `layers`, and use `skip`"
        elif (kept or self.criterion in BY_DATA) and (self.scope == "global" or self.biases):
            rule = f"`{cause}` compares weights within a layer: leave out `biases`, and set `scope` to layer"
        if rule:
            raise PydanticCustomError("rule", rule)
        return self


class FineTune(Section):
    """Train on with the task's own loss: restores accuracy after other stages; zeros stay zero."""

    epochs: Annotated[int, whole(1, MOST_EPOCHS)] = 3
    """Passes over the training split."""
    learning_rate: Annotated[float, Field(gt=0, description="a number > 0")] = 1e-3
    """Of the first step; it falls to zero along a cosine."""
    batch_size: Annotated[int, whole(2, 65536)] = 32
    """Examples a step."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; `auto` takes the best device there is."""
    keep_zeros: Annotated[bool, Field(description="true or false")] = True
    """Whether weights that are exactly zero stay zero."""


class Distil(FineTune):
    """Train on to give the outputs of the original model: restores accuracy without labels; zeros stay zero."""

    temperature: Annotated[float, Field(gt=0, description="a number > 0")] = 1.0
    """Logits of classes are divided by it: above 1, unlikely classes count more."""
    labels: Annotated[float, Field(ge=0, le=1, description="a number in [0, 1]")] = 0.0
    """Weight of the task's own loss; that of the distance to the original's outputs is the rest."""
    features: Annotated[float, Field(ge=0, description="a number >= 0")] = 1.0
    """Weight of the distance of outputs inside the model, of layers that kept their name and shape."""


class Factorize(Section):
    """Replace Linear layers and 1x1 convolutions by two of low rank: for wide layers whose inputs are correlated."""

    energy: Annotated[float | None, Field(ge=0, le=1, description="a number in [0, 1]")] = None
    """Share of the variance of each layer's output to keep."""
    rank: Annotated[int | None, whole(1)] = None
    """Channels between the two layers."""
    ratio: Annotated[_Fraction | None, Field(description="a number in [0, 1)")] = None
    """Fraction of each layer's weights to remove."""
    skip: Patterns = ()
    """Layers to leave alone."""
    layers: Annotated[dict[str, _Fraction], Field(description="a mapping of layer patterns to numbers in [0, 1)")] = {}
    """Ratio by layer pattern."""
    calibration_examples: Annotated[int, whole(1)] = 128
    """Examples of the calibration split."""

    @model_validator(mode="after")
    def _says_how_much(self) -> "Factorize":
        return _one_of(self, "energy", "rank", "ratio")


class DropBlocks(Section):
    """Drop whole residual blocks and transformer layers: faster everywhere, for models that are deeper than needed."""

    count: Annotated[int | None, whole(1)] = None
    """Blocks to drop."""
    ratio: Annotated[_Fraction | None, Field(description="a number in [0, 1)")] = None
    """Fraction of the blocks to drop, at least one."""
    skip: Patterns = ()
    """Blocks to keep."""
    calibration_examples: Annotated[int, whole(1)] = 128
    """Examples of the calibration split on which outputs are compared."""

    @model_validator(mode="after")
    def _says_how_much(self) -> "DropBlocks":
        return _one_of(self, "count", "ratio")


class Equalize(Section):
    """Give channels more equal ranges, computing the same in float: helps int8 where a few channels are outliers."""

    alpha: Annotated[float, Field(ge=0, le=1, description="a number in [0, 1]")] = 0.5
    """How much of the range moves from activations into weights."""
    skip: Patterns = ()
    """Layers whose weights stay."""
    calibration_examples: Annotated[int, whole(1)] = 128
    """Examples of the calibration split that ranges of activations are taken from."""


class Float32(Section):
    """Compute in float32, as the model was trained."""


class StaticInt8(Section):
    """Compute in 8-bit integers, with ranges of activations fixed beforehand on calibration data."""

    skip: Patterns = ()
    """Layers to leave in float."""
    calibration_examples: Annotated[int, whole(1)] = 128
    """Examples of the calibration split that set the ranges."""


class WithoutData(Section):
    """Compute in 8-bit integers or 16-bit floats, without calibration data."""

    skip: Patterns = ()
    """Layers to leave in float32."""


PRECISIONS: dict[str, type[Section]] = {
    **{"float32": Float32, "dynamic-int8": WithoutData, "static-int8": StaticInt8},
    **{"float16": WithoutData, "bfloat16": WithoutData},
}
"""The settings of each precision, by its name in recipes."""
METHODS = tuple(PRECISIONS)[1:]
"""The precisions below float32."""


def settings_of(section: type[S], **values: Any) -> S:
    """Return settings given as arguments in Python; raises InvalidInput with each value that breaks its rule."""
    try:
        return section(**values)
    except ValidationError as error:
        raise InvalidInput("\n".join(explain(error, section))) from error


def explain(
    error: ValidationError,
    model: type[Section],
    *,
    where: Callable[[Key], str] = lambda _: "",
    chosen: Callable[[Key], tuple[str, type[Section]] | None] = lambda _: None,
    seen: Key | None = None,
) -> list[str]:
    """Return each mistake in settings of the section `model` as one line; those of the key `seen` are left out.

    `where` returns the `file:line` of a key; `chosen` the name and section of the choice at a key, if one is there, as
    its settings stand below its name.
    """
    lines = []
    for detail in error.errors(include_url=False):
        kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
        # Conflicts are reported with their lines elsewhere; a list of nothing but mistakes is not a short list.
        if detail["loc"] == seen or (kind == "value_error" and not detail["loc"]) or (kind == "too_short" and value):
            continue
        key, section, rule = _located(detail["loc"], model, chosen)
        if kind == "choice_form" or (len(key) == 2 and key[0] == "stages"):
            rule = "a name with its settings, `name: {...}`"
        if kind == "extra_forbidden":
            lines.append(unknown(key, section, where(key)))
        elif kind == "missing":
            lines.append(message(f"`{dotted(key)}` is missing", where(key), f"It must be {rule}."))
        elif kind == "rule":
            lines.append(message(detail["msg"], where(key)))
        elif kind == "value_error":
            lines.append(message(str(context["error"]).rstrip("."), where(key)))
        else:
            value = context.get("name", value)
            allowed = context.get("allowed") or re.findall(r"'([^']+)'", context.get("expected", ""))
            rule = options(list(allowed)) if allowed else rule or detail["msg"]
            lines.append(broken(key, rule, value, where(key), _remedy(key, kind, value)))
    return lines


def _located(
    loc: Key, model: type[Section], chosen: Callable[[Key], tuple[str, type[Section]] | None]
) -> tuple[Key, type[Section], str]:
    """Return the key of a place in a model, the section that holds it, and the rule of its field."""
    key: Key = ()
    section, rule = model, ""
    for part in loc:
        if choice := chosen(key):
            key, section = (*key, choice[0]), choice[1]
        key = (*key, part)
        if field := section.model_fields.get(str(part)):
            rule = field.description or ""
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                section = field.annotation
    return key, section, rule


def unknown(key: Key, section: type[Section], where: str) -> str:
    """Return that `section` has no such key, with the sections that have it."""
    word, allowed = str(key[-1]), [name for name in section.model_fields if name != "where"]
    of = str(key[-2]) if len(key) > 1 else f"a {section.__name__.lower()}"
    within = {name: field.annotation for name, field in section.model_fields.items()}
    stages = {name: one.section for name, one in TRANSFORMS.items()}
    # A precision's key is that of another precision rather than that of a transform.
    families = (PRECISIONS, stages | within) if section in PRECISIONS.values() else (stages | PRECISIONS | within,)
    having = ([name for name, other in of.items() if word in getattr(other, "model_fields", {})] for of in families)
    owners = next(filter(None, having), [])
    text = f"`{dotted(key)}` is no key of {of}{f', but of {options(owners)}' if owners else ''}"
    return message(text, where, f"{nearest(word, allowed)} Allowed: {', '.join(allowed) or 'none'}.")


def _remedy(key: Key, kind: str, value: Any) -> str:
    if kind == "unfit_name" and key[-1] == "name":
        return "Set `name`, which else is the file's."
    if key[-1] == "precision" and re.search(r"\d", str(value)):
        return " There are 8-bit integers and 16-bit floats, and no other widths."
    if isinstance(value, str) and (key[0] == "targets" or key[-1] == "target") and "/" not in value:
        return " A target is written device/runtime."
    return ""


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
        keeps_layers: Whether all layers keep their names, so that patterns of later stages can be checked beforehand.
    """

    name: str
    section: type[Section]
    apply: str | Callable[..., Any]
    notebook: str = "2-transform"
    trains: bool = False
    keeps_layers: bool = False

    def function(self) -> Callable[..., Any]:
        """Return the function that `apply` names."""
        return self.apply if callable(self.apply) else imported(self.apply)


_FOLDER = "shrinkkit.transforms"
_keeping = partial(Transform, keeps_layers=True)
TRANSFORMS: dict[str, Transform] = {
    one.name: one
    for one in (
        _keeping("prune-channels", PruneChannels, f"{_FOLDER}.prune:apply_channels", "2-prune"),
        _keeping("prune-weights", PruneWeights, f"{_FOLDER}.prune:apply_weights", "2-prune"),
        Transform("drop-blocks", DropBlocks, f"{_FOLDER}.techniques.depth:apply"),
        Transform("factorize", Factorize, f"{_FOLDER}.techniques.factorize:apply"),
        _keeping("equalize", Equalize, f"{_FOLDER}.techniques.equalize:apply"),
        _keeping("fine-tune", FineTune, f"{_FOLDER}.finetune:apply", "2-train", trains=True),
        _keeping("distil", Distil, f"{_FOLDER}.techniques.distil:apply", "2-train", trains=True),
    )
}
"""Those that come with shrinkkit, by name."""


def names() -> tuple[str, ...]:
    """Return the names of all transforms, those of installed packages last."""
    return tuple(dict.fromkeys([*TRANSFORMS, *(entry.name for entry in metadata.entry_points(group=ENTRY_POINTS))]))


def transform(name: str) -> Transform:
    """Return the transform called `name`; raises InvalidInput if there is none, or its entry point gives none."""
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    entries = [entry for entry in metadata.entry_points(group=ENTRY_POINTS) if entry.name == name]
    if not entries:
        raise InvalidInput(f"There is no transform {name!r}. {nearest(name, names())} Available: {', '.join(names())}.")
    try:
        loaded = entries[0].load()
    except Exception as error:
        text = f"The transform {name!r} ({entries[0].value}) cannot be imported: {brief(error)}."
        raise InvalidInput(text) from error
    if not isinstance(loaded, Transform) or loaded.name != name:
        raise InvalidInput(f"The entry point {entries[0].value} must give a `Transform` {name!r}, got {loaded!r:.100}.")
    return loaded


def imported(path: str) -> Callable[..., Any]:
    """Return the function that `path` names as `package.module:function`; raises InvalidInput if it is not one."""
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
        skip = (((self.name, "skip", i), pattern) for i, pattern in enumerate(getattr(self.settings, "skip", ())))
        layers = getattr(self.settings, "layers", {})
        return (*skip, *(((self.name, "layers", pattern), pattern) for pattern in layers))


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
    """Return the stage of the transform called `name` with plain settings; raises InvalidInput if either is wrong."""
    one = transform(name)
    return Stage(name, settings_of(one.section, **settings), one)


StageField = Annotated[Stage, PlainValidator(_stage), PlainSerializer(Choice.to_dict)]


def precision(value: Any) -> Choice:
    """Return the precision that `value` stands for: `name`, or `name: {settings}`."""
    if isinstance(value, Choice):
        return value
    name, settings = choice(value, tuple(PRECISIONS))
    return Choice(name, PRECISIONS[name].model_validate(settings))


def lowered(name: str, settings: Mapping[str, Any]) -> Choice:
    """Return the precision called `name` with plain settings; raises InvalidInput if either is wrong."""
    if name not in PRECISIONS:
        raise InvalidInput(f"`precision` must be {options(list(PRECISIONS))}, got {name!r}.{nearest(name, PRECISIONS)}")
    return Choice(name, settings_of(PRECISIONS[name], **settings))


PrecisionField = Annotated[Choice, PlainValidator(precision), PlainSerializer(Choice.to_dict)]
FLOAT32 = Choice("float32", Float32())
