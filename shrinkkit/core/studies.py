"""Recipes and studies read from YAML, with every mistake, its line and its remedy."""

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from shrinkkit.core.recipe import BUILT_IN, PRECISIONS, RECIPES, TASKS, Budget, Recipe, Study, conflicts
from shrinkkit.core.stages import TRANSFORMS, Key, broken, dotted, expected, transform
from shrinkkit.core.yaml_source import Source, load
from shrinkkit.errors import InvalidInput, message, nearest, options, shown_value

_R = TypeVar("_R")
_RELATIVE = " Paths in a study are relative to its file."


def builtin_studies() -> tuple[str, ...]:
    """Return the names of the studies that come with shrinkkit, which `read_study` takes for a path."""
    return TASKS


def read_recipe(path_or_name: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a YAML file, or a built-in one by its name.

    Args:
        path_or_name: A path that ends in `.yaml` or `.yml`, or the name of a built-in recipe, such as `static-int8`.

    Returns:
        The recipe, with defaults filled in.

    Raises:
        InvalidInput: There is no such recipe, or it breaks rules; one line for each.
    """
    wrong: list[str] = []
    recipe = _named_recipe(os.fspath(path_or_name), Path(), "", wrong)
    return _whole(recipe, wrong)


def read_study(path_or_name: str | os.PathLike[str]) -> Study:
    """Read a study and its recipes from a YAML file, or a built-in one by its name.

    Args:
        path_or_name: A path that ends in `.yaml` or `.yml`, or the name of a bundled task. Paths in the file are
            relative to the file.

    Returns:
        The study, with its recipes read and defaults filled in.

    Raises:
        InvalidInput: There is no such study, or it breaks rules; one line for each.
    """
    path = os.fspath(path_or_name)
    if path in builtin_studies():
        with as_file(files("shrinkkit").joinpath("tasks", "bundled", "studies", f"{path}.yaml")) as file:
            return _study(load(file, shown=file.name), file.parent)
    if not path.endswith((".yaml", ".yml")):
        raise InvalidInput(
            message(
                f"`study` must be {options(builtin_studies())}, or the path of a .yaml file, got {path!r}",
                remedy=nearest(path, builtin_studies()),
            )
        )
    return _study(load(path), Path(path).parent)


def study(
    task: str,
    *,
    recipes: Sequence[str | Recipe],
    targets: Sequence[str],
    accuracy_drop: float = 0.01,
    unit: str = "share",
    want: str = "fastest",
    budget_target: str | None = None,
    name: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    timeout_s: float = 1800.0,
) -> Study:
    """Create a study from arguments instead of a file.

    Args:
        task: Name of a bundled task, or the path of a Python file with a function `task()`.
        recipes: Built-in names, paths of YAML files, or recipes; at least one.
        targets: `device/runtime`, such as `cpu/onnxruntime`; at least one.
        accuracy_drop: Maximum accuracy drop: a fraction in [0, 1], or >= 0 in units of the score.
        unit: Of `accuracy_drop`: `share` for scores in [0, 1], else `score`.
        want: `fastest` or `smallest`.
        budget_target: Target on which the variant must be fastest, one of `targets`; None for any.
        name: Name of the run folder; None takes the task's.
        seed: In [0, 2**32).
        threads: Intra-op threads, >= 1; None takes every core that this process may use.
        timeout_s: Seconds that one step may take, > 0.

    Returns:
        The study, with its recipes read.

    Raises:
        InvalidInput: Arguments break rules; one line for each.
    """
    budget = {"accuracy_drop": accuracy_drop, "unit": unit, "want": want, "target": budget_target}
    settings = {"seed": seed, "threads": threads, "timeout_s": timeout_s}
    lists = {"recipes": tuple(recipes), "targets": tuple(targets)}
    return _study(
        Source({"name": name or Path(task).stem, "task": task, **lists, "budget": budget, **settings}), Path()
    )


def changed(study: Study, *, threads: int | None = None, **budget: Any) -> Study:
    """Return `study` with other threads and another budget, held to the same rules as its file.

    Args:
        study: Left unchanged.
        threads: None leaves them as they are.
        budget: Keys of the section `budget`; None leaves one as it is.

    Raises:
        InvalidInput: A value breaks its rule: one line for each.
    """
    data = study.model_dump(exclude_unset=True)
    section = data.get("budget", {}) | {name: value for name, value in budget.items() if value is not None}
    data |= {"budget": section} | ({} if threads is None else {"threads": threads})
    return _study(Source(data | {"recipes": study.recipes}), Path())


def matches(pattern: str, layer: str) -> bool:
    """Return whether `pattern` names `layer` or a module that holds it.

    Patterns are case-sensitive globs, in which `*` spans dots: `stages.0`, `stages.*.conv1` and `stages.?`
    all match the layer `stages.0.conv1`.
    """
    return any(fnmatchcase(module, pattern) for module in with_parents(layer))


def check_patterns(study: Study, layers: Sequence[str]) -> None:
    """Check that every layer pattern of the recipes matches a layer of the model.

    Patterns behind a stage from outside this package are left to that which uses them, because it may rename layers.

    Args:
        study: Its recipes are checked.
        layers: Names of the model's layers, as `named_modules` spells them.

    Raises:
        InvalidInput: Patterns match no layer: one line for each.
    """
    modules = list(dict.fromkeys(module for layer in layers for module in with_parents(layer)))
    listed = f"The layers are {', '.join(layers[:8])}{f' and {len(layers) - 8} more' if len(layers) > 8 else ''}."
    wrong = [
        message(
            f"`{dotted(key[:-1])}` of recipe `{recipe.name}` names {pattern!r}, which matches no layer",
            recipe.where.get(dotted(key), ""),
            f"{nearest(pattern, modules)} {listed}",
        )
        for recipe in study.recipes
        for key, pattern in _checkable(recipe)
        if not any(matches(pattern, layer) for layer in layers)
    ]
    _whole(study, wrong)


def _checkable(recipe: Recipe) -> list[tuple[Key, str]]:
    """Return the patterns of `recipe` that stand before any stage from outside, each with its key."""
    outside = next((i for i, stage in enumerate(recipe.stages) if stage.name not in TRANSFORMS), None)
    stages = len(recipe.stages) if outside is None else outside + 1
    in_stages = [(key, pattern) for key, pattern in recipe.patterns() if key[0] == "stages" and int(key[1]) < stages]
    behind = [one for one in recipe.patterns() if one[0][0] == "precision" and outside is None]
    return in_stages + behind


def check_unit(study: Study, scores: Sequence[float]) -> None:
    """Return if the budget of `study` is in the unit of the scores.

    Args:
        study: Its budget is in shares unless it says otherwise.
        scores: The lowest and the highest score of the task's model.

    Raises:
        InvalidInput: The budget is in shares, and a score lies outside [0, 1].
    """
    low, high = scores
    if study.budget.unit == "share" and not 0 <= low <= high <= 1:
        raise InvalidInput(
            f"`budget.accuracy_drop` is a share, for scores in [0, 1], but this task's scores go from {low:g} to "
            f"{high:g}. State the most that the mean score may drop in its own unit: `budget: {{accuracy_drop: "
            f"{(high - low) / 100:.2g}, unit: score}}`, or `--accuracy-drop {(high - low) / 100:.2g} --unit score`."
        )


def _study(source: Source, folder: Path) -> Study:
    wrong = list(source.problems)
    data = {"name": Path(source.path).stem, **source.data}
    listed = data.get("recipes")
    recipes: list[tuple[Key, Recipe]] = []
    if isinstance(listed, tuple):
        entries = [
            (("recipes", i), _entry(entry, ("recipes", i), source, folder, wrong)) for i, entry in enumerate(listed)
        ]
        recipes = [(key, recipe) for key, recipe in entries if recipe]
        data["recipes"] = tuple(recipe for _, recipe in recipes)
    if isinstance(data.get("task"), str):
        data["task"] = _task(data["task"], source, folder, wrong)
    result = None
    try:
        result = Study.model_validate(data)
    except ValidationError as error:
        # A list whose every recipe was refused above is not an empty list.
        wrong += _explain(error, Study, source, (), seen=("recipes",) if listed else None)
    budget = data.get("budget")
    targets = data.get("targets")
    for key, text, remedy in conflicts(
        recipes,
        [target for target in targets if isinstance(target, str)] if isinstance(targets, tuple) else [],
        budget.get("target") if isinstance(budget, dict) else None,
    ):
        wrong.append(message(text, source.where(key), remedy))
    return _whole(result, wrong)


def _entry(entry: Any, key: Key, source: Source, folder: Path, wrong: list[str]) -> Recipe | None:
    """Return the recipe that an entry of a study's list stands for; None after adding to `wrong` why there is none."""
    if isinstance(entry, Recipe):
        return entry
    if isinstance(entry, dict):
        return _recipe(source, key, entry, wrong)
    if not isinstance(entry, str):
        wrong.append(message(f"`recipes` must be {RECIPES}, got {shown_value(entry)}", source.where(key)))
        return None
    return _named_recipe(entry, folder, source.where(key), wrong)


def _named_recipe(name: str, folder: Path, where: str, wrong: list[str]) -> Recipe | None:
    if name in BUILT_IN:
        with as_file(files("shrinkkit").joinpath("tasks", "bundled", "recipes", f"{name}.yaml")) as file:
            source = load(file, shown=file.name)
    elif name.endswith((".yaml", ".yml")):
        if not os.path.isfile(folder / name):
            wrong.append(
                message(f"There is no recipe file {name!r:.200}", where, "Check the path." + _RELATIVE * bool(where))
            )
            return None
        try:
            source = load(folder / name)
        except InvalidInput as error:
            wrong.append(str(error))
            return None
    else:
        rule = f"a built-in one ({', '.join(BUILT_IN)}), or the path of a .yaml file"
        wrong.append(message(f"A recipe must be {rule}, got {name!r}", where, nearest(name, BUILT_IN)))
        return None
    wrong += source.problems
    return _recipe(source, (), {"name": Path(source.path).stem, **source.data}, wrong)


def _recipe(source: Source, key: Key, data: dict[str, Any], wrong: list[str]) -> Recipe | None:
    if "where" in data:  # a field that only reading may fill
        wrong.append(_unknown(("where",), Recipe, source.where((*key, "where"))))
    try:
        recipe = Recipe.model_validate({name: value for name, value in data.items() if name != "where"})
    except ValidationError as error:
        wrong += _explain(error, Recipe, source, key)
        return None
    places = {dotted(pattern): source.where((*key, *pattern)) for pattern, _ in recipe.patterns()}
    return recipe.model_copy(update={"where": places if source.path else {}})


def _explain(
    error: ValidationError, model: type[BaseModel], source: Source, prefix: Key, seen: Key | None = None
) -> list[str]:
    """Return each mistake in the part of `source` at `prefix` as one line; those of the key `seen` are left out."""
    lines = []
    for detail in error.errors(include_url=False):
        kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
        # Conflicts are reported with their lines elsewhere; a list of nothing but mistakes is not a short list.
        if detail["loc"] == seen or (kind == "value_error" and not detail["loc"]) or (kind == "too_short" and value):
            continue
        key, section, field = _located(detail["loc"], model, source, prefix)
        where = source.where((*prefix, *key))
        rule = field.description if field and field.description else ""
        if kind == "choice_form" or (len(key) == 2 and key[0] == "stages"):
            rule = "a name with its settings, `name: {...}`"
        if kind == "extra_forbidden":
            lines.append(_unknown(key, section, where))
        elif kind == "missing":
            lines.append(message(f"`{dotted(key)}` is missing", where, f"It must be {rule}."))
        elif kind == "rule":
            lines.append(message(detail["msg"], where))
        elif kind == "value_error":
            lines.append(message(str(context["error"]).rstrip("."), where))
        else:
            value = context.get("name", value)
            lines.append(broken(key, expected(context) or rule, value, where, _remedy(key, kind, value)))
    return lines


def _located(
    loc: tuple[int | str, ...], model: type[BaseModel], source: Source, prefix: Key
) -> tuple[Key, type[BaseModel], FieldInfo | None]:
    """Return the key in the file of a place in a model, the section that holds it, and its field."""
    key: list[int | str] = []
    section, field = model, None
    for part in loc:
        if len(key) == (2 if key[:1] == ["stages"] else 1) and key[0] in ("stages", "precision"):
            # The settings of a choice stand below its name, which the place in the model leaves out.
            chosen = source.at((*prefix, *key))
            name = next(iter(chosen)) if isinstance(chosen, dict) else chosen
            section = transform(name).section if key[0] == "stages" else PRECISIONS[name]
            key.append(name)
        key.append(part)
        if part in section.model_fields:
            field = section.model_fields[str(part)]
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                section = field.annotation
    return tuple(key), section, field


def _unknown(key: Key, section: type[BaseModel], where: str) -> str:
    word = str(key[-1])
    allowed = [name for name in section.model_fields if name != "where"]
    of = str(key[-2]) if len(key) > 1 else f"a {section.__name__.lower()}"
    others = {name: one.section for name, one in TRANSFORMS.items()} | PRECISIONS | {"budget": Budget}
    owners = [name for name, other in others.items() if word in other.model_fields]
    text = f"`{dotted(key)}` is no key of {of}{f', but of {options(owners)}' if owners else ''}"
    return message(text, where, f"{nearest(word, allowed)} Allowed: {', '.join(allowed) or 'none'}.")


def _remedy(key: Key, kind: str, value: Any) -> str:
    if kind == "unfit_name":
        return "Set `name`, which else is the file's."
    if key[-1] == "precision" and re.search(r"\d", str(value)):
        return " There are 8-bit integers and 16-bit floats, and no other widths."
    if isinstance(value, str) and (key[0] == "targets" or key[-1] == "target") and "/" not in value:
        return " A target is written device/runtime."
    return ""


def _task(task: str, source: Source, folder: Path, wrong: list[str]) -> str:
    if task in TASKS or not task:
        return task
    path = Path(os.path.abspath(folder / task))
    if not (task.endswith(".py") and os.path.isfile(path)):
        problem = "it is neither" if not task.endswith(".py") else "there is no such file"
        problem = "that is a folder" if os.path.isdir(path) else problem
        text = f"`task` must be {Study.model_fields['task'].description}, got {task!r:.200}, but {problem}"
        wrong.append(message(text, source.where(("task",)), nearest(task, TASKS)))
        return task
    return str(path.resolve())


def with_parents(layer: str) -> list[str]:
    """Return the name of a layer and those of all modules that hold it, outermost first."""
    parts = layer.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _whole(result: _R | None, wrong: Sequence[str]) -> _R:
    if wrong or result is None:
        raise InvalidInput("\n".join(dict.fromkeys(wrong)))
    return result
