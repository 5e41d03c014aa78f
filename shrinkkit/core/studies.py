"""Recipes and studies: read them from YAML, and say exactly what is wrong with them.

A recipe says how a model is compressed; a study says which recipes run on which task and targets.
"""

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from shrinkkit.core.recipe import BUILT_IN, IN_SHARES, RULES, SECTIONS, TASKS, Key, Recipe, Study, conflicts
from shrinkkit.core.target import TARGETS
from shrinkkit.core.yaml_source import Source, load
from shrinkkit.errors import InvalidInput, message, nearest, options, shown_value

_R = TypeVar("_R")
_RELATIVE = " Paths in a study are relative to its file."


def builtin_studies() -> tuple[str, ...]:
    """Return the names of the studies that come with shrinkkit, which `read_study` takes for a path."""
    return TASKS


def read_recipe(path_or_name: str | os.PathLike[str]) -> Recipe:
    """Return the recipe in a YAML file, or the built-in one of that name.

    Args:
        path_or_name: A path that ends in `.yaml` or `.yml`, or one of `BUILT_IN`.

    Raises:
        InvalidInput: There is no such recipe, or it breaks rules: each on a line of its own.
    """
    wrong: list[str] = []
    recipe = _named_recipe(os.fspath(path_or_name), Path(), "", wrong)
    return _whole(recipe, wrong)


def read_study(path_or_name: str | os.PathLike[str]) -> Study:
    """Return the study in a YAML file, or the built-in one of that name, with its recipes read.

    Args:
        path_or_name: A path, or one of `builtin_studies`. Paths in the file are relative to the file.

    Raises:
        InvalidInput: There is no such study, or it breaks rules: each on a line of its own.
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
    """Return the study of `task` that was spelled out, on the command line or in Python, and not in a file.

    Args:
        task: One of `TASKS`, or the path of a Python file with one function `task()`.
        recipes: Built-in names, paths of YAML files, or recipes; at least one.
        targets: Of `TARGETS`; at least one.
        accuracy_drop: The most accuracy that may be given up, a share in [0, 1], or >= 0 in units of the score.
        unit: Of `accuracy_drop`, `share` or `score`.
        want: `fastest` or `smallest`.
        budget_target: Where it is to be fastest, one of `targets`.
        name: Of the run folder; default the task's name.
        seed: In [0, 2**32).
        threads: >= 1; None takes every core that this process may use.
        timeout_s: Seconds that one step may take, > 0.

    Raises:
        InvalidInput: Arguments break rules: each on a line of its own.
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
        InvalidInput: A value breaks its rule: each on a line of its own.
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
    return any(fnmatchcase(module, pattern) for module in _with_parents(layer))


def layer_patterns(recipe: Recipe) -> tuple[tuple[str, str, str], ...]:
    """Return the layer patterns of `recipe`, each as its key, the pattern, and `file:line` ('' without a file)."""
    found: list[tuple[str, str]] = []
    if recipe.prune:
        found += [(f"prune.skip.{i}", pattern) for i, pattern in enumerate(recipe.prune.skip)]
        found += [(f"prune.layers.{pattern}", pattern) for pattern in recipe.prune.layers]
    if recipe.quantize:
        found += [(f"quantize.skip.{i}", pattern) for i, pattern in enumerate(recipe.quantize.skip)]
    return tuple((key, pattern, recipe.where.get(key, "")) for key, pattern in found)


def check_patterns(recipe_or_study: Recipe | Study, layers: Sequence[str]) -> None:
    """Return when every layer pattern matches a layer of the model.

    Args:
        recipe_or_study: The recipe, or the study whose recipes are checked.
        layers: Names of the model's layers, as `named_modules` spells them.

    Raises:
        InvalidInput: Patterns match no layer: each on a line of its own.
    """
    recipes = recipe_or_study.recipes if isinstance(recipe_or_study, Study) else (recipe_or_study,)
    modules = list(dict.fromkeys(module for layer in layers for module in _with_parents(layer)))
    known = f"The layers are {', '.join(layers[:8])}{f' and {len(layers) - 8} more' if len(layers) > 8 else ''}."
    wrong = [
        message(
            f"`{key.removesuffix(f'.{pattern}')}` of recipe `{recipe.name}` names {pattern!r}, which matches no layer",
            where,
            f"{nearest(pattern, modules)} {known}",
        )
        for recipe in recipes
        for key, pattern, where in layer_patterns(recipe)
        if not any(matches(pattern, layer) for layer in layers)
    ]
    _whole(recipe_or_study, wrong)


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
        for i, entry in enumerate(listed):
            if recipe := _entry(entry, ("recipes", i), source, folder, wrong):
                recipes.append((("recipes", i), recipe))
        data["recipes"] = tuple(recipe for _, recipe in recipes)
    if isinstance(data.get("task"), str):
        data["task"] = _task(data["task"], source, folder, wrong)
    try:
        result = Study.model_validate(data)
    except ValidationError as error:
        result = None
        # A list whose every recipe was refused above is not an empty list.
        wrong += _explain(error, Study, source, (), seen=("recipes",) if listed else None)
    budget = data.get("budget")
    targets = data.get("targets")
    for key, text, remedy in conflicts(
        recipes,
        [target for target in targets if target in TARGETS] if isinstance(targets, tuple) else [],
        budget.get("target") if isinstance(budget, dict) else None,
    ):
        wrong.append(message(text, source.where(key), remedy))
    return _whole(result, wrong)


def _entry(entry: Any, key: Key, source: Source, folder: Path, wrong: list[str]) -> Recipe | None:
    """Return the recipe that one entry of a study's list stands for, or None after saying in `wrong` why not."""
    if isinstance(entry, Recipe):
        return entry
    if isinstance(entry, dict):
        return _recipe(source, key, entry, wrong)
    if not isinstance(entry, str):
        wrong.append(message(f"`recipes` must be {RULES['recipes']}, got {shown_value(entry)}", source.where(key)))
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
    empty = [name for name in ("prune", "quantize") if name in data and data[name] is None]
    wrong += [
        message(f"`{name}` must be {RULES[name]}, got nothing", source.where((*key, name)), "Fill it, or leave it out.")
        for name in empty
    ]
    if "where" in data:  # a field that only reading may fill
        wrong.append(_unknown_key(("where",), "", Recipe, source.where((*key, "where"))))
    try:
        recipe = Recipe.model_validate({name: value for name, value in data.items() if name != "where"})
    except ValidationError as error:
        wrong += _explain(error, Recipe, source, key)
        return None
    places = {name: source.where((*key, *_key(name))) for name, _, _ in layer_patterns(recipe)}
    return None if empty else recipe.model_copy(update={"where": places if source.path else {}})


def _explain(
    error: ValidationError, model: type[Recipe | Study], source: Source, prefix: Key, seen: Key | None = None
) -> list[str]:
    """Return each mistake in the part of `source` at `prefix` as one line; those of the key `seen` are left out."""
    lines = []
    for detail in error.errors(include_url=False):
        loc, kind, value = detail["loc"], detail["type"], detail["input"]
        # What `conflicts` finds is told with its lines; a list of nothing but mistakes is not a short list.
        if loc == seen or (kind == "value_error" and not loc) or (kind == "too_short" and value):
            continue
        method = loc[1] if len(loc) > 1 and loc[0] in ("prune", "quantize") else ""
        key = (loc[0], *loc[2:]) if method else loc
        if kind.startswith("union_tag"):
            key = (*key, "method")
            value = value.get("method")
        where = source.where((*prefix, *key))
        name = ".".join(map(str, key))
        if kind == "extra_forbidden":
            lines.append(_unknown_key(key, str(method), model, where))
        elif kind in ("missing", "union_tag_not_found"):
            lines.append(message(f"`{name}` is missing", where, f"It must be {_rule(key)}."))
        elif kind == "rule":
            lines.append(message(detail["msg"], where))
        elif kind in ("literal_error", "union_tag_invalid"):
            lines.append(_not_among(key, str(method), value, detail["ctx"], where))
        else:
            lines.append(_out_of_bounds(key, kind, value, where))
    return lines


def _unknown_key(key: Key, method: str, model: type[Recipe | Study], where: str) -> str:
    word = str(key[-1])
    section = method or (str(key[-2]) if len(key) > 1 else "")
    fields = SECTIONS[section].model_fields if section else model.model_fields
    allowed = sorted((field for field in fields if field != "where"), key=lambda field: field != "method")
    owners = [name for name, other in SECTIONS.items() if word in other.model_fields]
    text = f"`{'.'.join(map(str, key))}` is no key of {section or f'a {model.__name__.lower()}'}"
    if owners:
        text += f", but of {options(owners)}"
    return message(text, where, f"{nearest(word, allowed)} Allowed: {', '.join(allowed)}.")


def _not_among(key: Key, method: str, value: Any, context: dict[str, Any], where: str) -> str:
    allowed = re.findall(r"'([^']+)'", context.get("expected", "")) or _rule(key).replace(" or ", ", ").split(", ")
    of = f" with method {method}" if method else ""
    text = f"`{'.'.join(map(str, key))}`{of} must be {options(allowed)}, got {shown_value(value)}"
    remedy = nearest(value, allowed) if isinstance(value, str) else ""
    if key == ("quantize", "method") and re.search(r"\d", str(value)):
        remedy += " There are 8-bit integers and 16-bit floats, and no other widths."
    if key[0] == "targets" or key[-1] == "target":
        remedy += "" if "/" in str(value) else " A target is written device/runtime."
    return message(text, where, remedy)


def _out_of_bounds(key: Key, kind: str, value: Any, where: str) -> str:
    rule = _rule(key)
    if kind.startswith(("greater_than", "less_than")):
        rule = rule.removeprefix("a number ")
    remedy = "Set `name`, which else is the file's." if kind == "unfit_name" else ""
    advice = IN_SHARES.get(_pattern_of(key))
    if advice and isinstance(value, int | float) and 1 < value < 100:
        remedy = advice.format(
            percent="half" if value == 50 else f"{value:g} %", points=f"{value:g}", share=f"{value / 100:g}"
        )
    return message(f"`{'.'.join(map(str, key))}` must be {rule}, got {shown_value(value)}", where, remedy)


def _pattern_of(key: Key) -> str:
    return ".".join(map(str, key)) if ".".join(map(str, key)) in RULES else ".".join([*map(str, key[:-1]), "*"])


def _rule(key: Key) -> str:
    return RULES.get(_pattern_of(key)) or RULES.get(".".join(map(str, key[:-1])), "given")


def _task(task: str, source: Source, folder: Path, wrong: list[str]) -> str:
    if task in TASKS or not task:
        return task
    path = Path(os.path.abspath(folder / task))
    if not (task.endswith(".py") and os.path.isfile(path)):
        problem = "it is neither" if not task.endswith(".py") else "there is no such file"
        problem = "that is a folder" if os.path.isdir(path) else problem
        text = f"`task` must be {RULES['task']}, got {task!r:.200}, but {problem}"
        wrong.append(message(text, source.where(("task",)), nearest(task, TASKS)))
        return task
    return str(path.resolve())


def _key(name: str) -> Key:
    """Return the key of a layer pattern, whose own dots are no separators."""
    section, setting, entry = name.split(".", 2)
    return section, setting, int(entry) if setting == "skip" else entry


def _with_parents(layer: str) -> list[str]:
    parts = layer.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _whole(result: _R | None, wrong: Sequence[str]) -> _R:
    if wrong or result is None:
        raise InvalidInput("\n".join(dict.fromkeys(wrong)))
    return result
