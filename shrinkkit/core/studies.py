"""Recipes and studies read from YAML, with every mistake, its line and its remedy."""

import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from shrinkkit.core.recipe import BUILT_IN, HUB, RECIPES, TASKS, Recipe, Study, conflicts, hub_parts, relocated, title
from shrinkkit.core.stages import PRECISIONS, Key, Section, dotted, explain, transform, unknown
from shrinkkit.errors import InvalidInput, message, nearest, options, shown_value

MOST_BYTES, MOST_NODES, _DEEPEST = 1 << 20, 5000, 12
"""Of a file, of what stands in it once its aliases are followed, and the levels of nesting."""
_DEEPEST_READ = 64


def read_recipe(path_or_name: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a YAML file, or a built-in one by its name; defaults are filled in.

    Args:
        path_or_name: A path that ends in `.yaml` or `.yml`, or the name of a built-in recipe, such as `static-int8`.

    Returns:
        The recipe.

    Raises:
        InvalidInput: There is no such recipe, or it breaks rules; one line for each.
    """
    return _named_recipe(os.fspath(path_or_name), Path(), "")


def read_study(path_or_name: str | os.PathLike[str], overrides: Sequence["Override"] = ()) -> Study:
    """Read a study and its recipes from a YAML file, or a built-in one by its name.

    Args:
        path_or_name: A path that ends in `.yaml` or `.yml`, or the name of a bundled task. Paths in the file are
            relative to the file.
        overrides: Settings that replace those of the file. Paths in them are relative to the working folder.

    Returns:
        The study, with its recipes read and defaults filled in.

    Raises:
        InvalidInput: There is no such study, or it breaks rules; one line for each.
    """
    path = os.fspath(path_or_name)
    if path in TASKS:
        return _study(replace(_bundled("studies", path), overrides=tuple(overrides)), Path())
    if not path.endswith((".yaml", ".yml")):
        rule = f"{options(TASKS)}, or the path of a .yaml file"
        raise InvalidInput(message(f"`study` must be {rule}, got {path!r}", remedy=nearest(path, _near(path))))
    return _study(replace(load(path), overrides=tuple(overrides)), Path(path).parent)


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
    effort: str = "standard",
    timeout_s: float = 1800.0,
    search_minutes: float | None = None,
    notes: Sequence[str] = (),
    overrides: Sequence["Override"] = (),
) -> Study:
    """Create a study from arguments instead of a file.

    Args:
        task: Name of a bundled task, or the path of a Python file with a function `task()`.
        recipes: Built-in names, paths of YAML files, or recipes; at least one, unless others are searched for.
        targets: `device/runtime`, such as `cpu/onnxruntime`; at least one.
        accuracy_drop: Maximum accuracy drop: a fraction in [0, 1], or >= 0 in units of the score.
        unit: Of `accuracy_drop`: `share` for scores in [0, 1], else `score`.
        want: `fastest` or `smallest`.
        budget_target: Target on which the variant must be fastest, one of `targets`; None for any.
        name: Name of the run folder; None takes the task's.
        seed: In [0, 2**32).
        threads: Intra-op threads, >= 1; None takes every core that this process may use.
        effort: How much is measured: `quick`, `standard` or `thorough`.
        timeout_s: Seconds that one step may take, > 0.
        search_minutes: Time to search for recipes on the target of the budget, above 0; None for no search.
        notes: Sentences for the log and the report.
        overrides: Settings that replace the arguments.

    Returns:
        The study, with its recipes read.

    Raises:
        InvalidInput: Arguments break rules; one line for each.
    """
    budget = {"accuracy_drop": accuracy_drop, "unit": unit, "want": want, "target": budget_target}
    settings = {"seed": seed, "threads": threads, "timeout_s": timeout_s, "budget": budget, "notes": tuple(notes)}
    if search_minutes is not None:
        settings["search"] = {"minutes": search_minutes}
    lists = {"recipes": tuple(recipes), "targets": tuple(targets)}
    data = {"name": name or title(task), "task": task, "effort": effort, **lists, **settings}
    return _study(Source(data, overrides=tuple(overrides)), Path())


def matches(pattern: str, layer: str) -> bool:
    """Return whether `pattern` names `layer` or a module that holds it.

    Patterns are case-sensitive globs, in which `*` spans dots: `stages.0`, `stages.*.conv1` and `stages.?`
    all match the layer `stages.0.conv1`.
    """
    return any(fnmatchcase(module, pattern) for module in with_parents(layer))


def with_parents(layer: str) -> list[str]:
    """Return the name of a layer and those of all modules that hold it, outermost first."""
    parts = layer.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def check_patterns(study: Study, layers: Sequence[str]) -> None:
    """Check that every layer pattern of the recipes matches one of a model's `layers`; raises InvalidInput otherwise.

    Patterns behind a stage that adds, removes or renames layers are left to the stage that uses them.
    """
    modules = list(dict.fromkeys(module for layer in layers for module in with_parents(layer)))
    listed = f"The layers are {', '.join(layers[:8])}{f' and {len(layers) - 8} more' if len(layers) > 8 else ''}."
    wrong = []
    for recipe in study.recipes:
        outside = next((i for i, stage in enumerate(recipe.stages) if not stage.transform.keeps_layers), None)
        for key, pattern in recipe.patterns():
            is_behind = outside is not None and (key[0] == "precision" or int(key[1]) > outside)
            if not (is_behind or any(matches(pattern, layer) for layer in layers)):
                text = f"`{dotted(key[:-1])}` of recipe `{recipe.name}` names {pattern!r}, which matches no layer"
                remedy = f"{nearest(pattern, modules)} {listed}"
                wrong.append(message(text, recipe.where.get(dotted(key), ""), remedy))
    _raise(wrong)


def check_unit(study: Study, scores: Sequence[float]) -> None:
    """Check that a budget in shares goes with scores in [0, 1], of which `scores` are the lowest and the highest."""
    low, high = scores
    if study.budget.unit == "share" and not 0 <= low <= high <= 1:
        drop = f"{(high - low) / 100:.2g}"
        raise InvalidInput(
            f"`budget.accuracy_drop` is a share, for scores in [0, 1], but this task's scores go from {low:g} to "
            f"{high:g}. State the largest drop of the mean score in its own unit: `budget: {{accuracy_drop: {drop}, "
            f"unit: score}}`, or `--accuracy-drop {drop} --set budget.unit=score`."
        )


@dataclass(frozen=True)
class Override:
    """A setting from the command line, which replaces that of a study."""

    key: Key
    value: Any
    option: str
    """As messages name it: `--set seed=1`."""
    problems: Sequence[str] = ()
    """Mistakes in the value that leave it readable."""

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Return what `KEY=VALUE` states: keys with dots between them, entries of lists by number, a value in YAML."""
        name, sign, value = text.partition("=")
        key: Key = tuple(int(part) if part.isdecimal() else part for part in name.strip().split("."))
        option = f"--set {text}"
        if not sign or "" in key:
            remedy = "Write it like `--set budget.accuracy_drop=0.02`."
            raise InvalidInput(message(f"`--set` must be KEY=VALUE, got {text!r:.200}", remedy=remedy))
        source, (yaml, root) = Source({}, option), _composed(value, option)
        return cls(key, None if root is None else _plain(root, key, yaml, source), option, source.problems)

    def applied(self, data: Any, depth: int = 0) -> Any:
        """Return the settings `data`, whose key are the first `depth` parts of that of the override, with its value."""
        if depth == len(self.key):
            return self.value
        part = self.key[depth]
        if not isinstance(data, tuple):
            data = data if isinstance(data, dict) else {}
            return data | {str(part): self.applied(data.get(str(part)), depth + 1)}
        if not (isinstance(part, int) and part < len(data)):
            text = f"`{dotted(self.key[:depth])}` is a list of {len(data)}, which has no entry {part!r}"
            raise InvalidInput(message(text, self.option, "Entries are numbered from 0."))
        return tuple(self.applied(entry, depth + 1) if i == part else entry for i, entry in enumerate(data))


@dataclass(frozen=True)
class Source:
    """The settings in a file (or given by other means, without `path`), and where each of them stands."""

    data: Any
    path: str = ""
    """As messages name it."""
    lines: dict[Key, int] = field(default_factory=dict)
    """The line of each key, from 1."""
    problems: list[str] = field(default_factory=list)
    """Mistakes that leave the file readable, such as a key that stands there twice."""
    overrides: tuple[Override, ...] = ()

    def option(self, key: Key) -> str:
        """Return the option that replaces the setting `key`, or a part of it, as messages name it; '' if none does."""
        alike = (one for one in reversed(self.overrides) if all(map(operator.eq, key, one.key)))
        return next((one.option for one in alike), "") if key else ""

    def where(self, key: Key = ()) -> str:
        """Return the option that gives `key`, or `file:line` of it or of the closest section; '' when there is none."""
        if option := self.option(key):
            return option
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines.get(key, 1)}" if self.path else ""


def load(path: str | os.PathLike[str], *, shown: str = "") -> Source:
    """Return what a YAML 1.2 file says, which messages call `shown`; its lists come as tuples, its keys as text."""
    shown = shown or os.fspath(path)
    try:
        text = _text(Path(path), shown)
    except FileNotFoundError as error:
        remedy = nearest(shown, _near(shown)) or "Check the path."
        raise InvalidInput(message(f"There is no file {shown}", remedy=remedy)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{shown} cannot be read as text: {error}.") from error
    yaml, root = _composed(text, shown)
    if root is None:
        raise InvalidInput(f"{shown} is empty. Copy a built-in one, and change that.")
    if not isinstance(root, MappingNode):
        raise InvalidInput(message("A file must be a mapping of keys to values", f"{shown}:1", "Copy a built-in one."))
    source = Source({}, shown)
    source.data.update(_plain(root, (), yaml, source))
    return source


def _composed(text: str, shown: str) -> tuple[YAML, Node | None]:
    """Return YAML as nodes with lines, and what reads their values; None if there is nothing in it."""
    yaml = YAML(typ="safe", pure=True)
    try:
        _check_depth(text, shown)
        return yaml, yaml.compose(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{shown}:{mark.line + 1}" if mark else shown
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        remedy = "Indent with spaces, and quote text that holds : or #."
        raise InvalidInput(message(f"This is not YAML: {problem}", where, remedy)) from error


def _text(path: Path, shown: str) -> str:
    if path.exists() and not path.is_file():
        raise InvalidInput(f"{shown} must be a file, and is {'a folder' if path.is_dir() else 'none'}. Check the path.")
    with path.open(encoding="utf-8") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise InvalidInput(f"{shown} must have at most {MOST_BYTES} characters. Leave out what is no setting.")
    return text


def _check_depth(text: str, shown: str) -> None:
    """Raise if YAML is nested so deep that reading it would fail, or holds more than any file of settings."""
    depth = 0
    for number, event in enumerate(YAML(typ="safe", pure=True).parse(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if not (depth <= _DEEPEST_READ and number <= 3 * MOST_NODES):
            where = f"{shown}:{event.start_mark.line + 1}"
            raise InvalidInput(message(f"A file holds at most {MOST_NODES} values, {_DEEPEST} levels deep", where))


def _plain(node: Node, key: Key, yaml: YAML, source: Source) -> Any:
    """Return the value of a node; its lines and its mistakes are added to `source`."""
    source.lines.setdefault(key, node.start_mark.line + 1)
    if len(source.lines) > MOST_NODES:
        raise InvalidInput(message(f"A file holds at most {MOST_NODES} values, aliases followed", source.where(key)))
    if len(key) > _DEEPEST:
        source.problems.append(message(f"Nothing is nested deeper than {_DEEPEST} levels", source.where(key)))
        return None
    if isinstance(node, SequenceNode):
        return tuple(_plain(entry, (*key, i), yaml, source) for i, entry in enumerate(node.value))
    if isinstance(node, MappingNode):
        return _mapping(node, key, yaml, source)
    try:
        return yaml.constructor.construct_object(node, deep=True)
    except (YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error)
        source.problems.append(message(f"{node.value[:40]!r} cannot be read: {problem[:100]}", source.where(key)))
        return None


def _mapping(node: MappingNode, key: Key, yaml: YAML, source: Source) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        child = (*key, name.value)
        if not isinstance(name, ScalarNode):
            source.problems.append(message("A key must be a word", f"{source.path}:{line}"))
        elif name.value in values:
            text = f"`{dotted(child)}` stands here twice, first on line {source.lines[child]}"
            source.problems.append(message(text, f"{source.path}:{line}", "Keep one of them."))
        else:
            source.lines[child] = line
            values[name.value] = _plain(value, child, yaml, source)
    return values


def _bundled(kind: str, name: str) -> Source:
    with as_file(files("shrinkkit").joinpath("tasks", "bundled", kind, f"{name}.yaml")) as file:
        return load(file, shown=file.name)


def _study(source: Source, folder: Path) -> Study:
    wrong = [*source.problems, *(problem for override in source.overrides for problem in override.problems)]
    data = {"name": Path(source.path).stem, **source.data}
    for override in source.overrides:
        data = override.applied(data)
    listed, targets, budget = (data.get(name) for name in ("recipes", "targets", "budget"))
    recipes: list[tuple[Key, Recipe]] = []
    if isinstance(listed, tuple):
        for i, entry in enumerate(listed):
            with _collected(wrong):
                recipes.append((("recipes", i), _entry(entry, ("recipes", i), source, folder)))
        data["recipes"] = tuple(recipe for _, recipe in recipes)
    if isinstance(data.get("task"), str):
        with _collected(wrong):
            data["task"] = _task(data["task"], source, folder)
    try:
        result = Study.model_validate(data)
    except ValidationError as error:
        # A list whose every recipe was refused above is not an empty list.
        wrong += explain(error, Study, where=source.where, seen=("recipes",) if listed else None)
    named = [target for target in targets if isinstance(target, str)] if isinstance(targets, tuple) else []
    budget_target = budget.get("target") if isinstance(budget, dict) else None
    searches = bool(data.get("search")) or (None if listed else False)
    for key, text, remedy in conflicts(recipes, named, budget_target, searches=searches):
        wrong.append(message(text, source.where(key), remedy))
    _raise(wrong)
    return result


@contextmanager
def _collected(wrong: list[str]) -> Iterator[None]:
    """Add a mistake in the block to `wrong`, so that others are reported too."""
    try:
        yield
    except InvalidInput as error:
        wrong.append(str(error))


def _raise(wrong: Sequence[str]) -> None:
    if wrong:
        raise InvalidInput("\n".join(dict.fromkeys(wrong)))


def _entry(entry: Any, key: Key, source: Source, folder: Path) -> Recipe:
    """Return the recipe that an entry of a study's list stands for."""
    folder = Path() if source.option(key) else folder
    if isinstance(entry, Recipe):
        return entry
    if isinstance(entry, dict):
        return _recipe(source, key, entry)
    if isinstance(entry, str):
        return _named_recipe(entry, folder, source.where(key))
    raise InvalidInput(message(f"`recipes` must be {RECIPES}, got {shown_value(entry)}", source.where(key)))


def _named_recipe(name: str, folder: Path, where: str) -> Recipe:
    if name in BUILT_IN:
        source = _bundled("recipes", name)
    elif not name.endswith((".yaml", ".yml")):
        rule = f"a built-in one ({', '.join(BUILT_IN)}), or the path of a .yaml file"
        raise InvalidInput(message(f"A recipe must be {rule}, got {name!r}", where, nearest(name, BUILT_IN)))
    elif not os.path.isfile(folder / name):
        in_file = where and not where.startswith("--")
        remedy = "Check the path." + (" Paths in a study are relative to its file." if in_file else "")
        raise InvalidInput(message(f"There is no recipe file {name!r:.200}", where, remedy))
    else:
        source = load(folder / name)
    return _recipe(source, (), {"name": Path(source.path).stem, **source.data}, source.problems)


def _recipe(source: Source, prefix: Key, data: dict[str, Any], problems: Sequence[str] = ()) -> Recipe:
    def where(key: Key) -> str:
        return source.where((*prefix, *key))

    def chosen(key: Key) -> tuple[str, type[Section]] | None:
        is_stage = len(key) == 2 and key[0] == "stages"
        if not (is_stage or key == ("precision",)):
            return None
        value = data["stages"][key[-1]] if is_stage else data["precision"]
        name = next(iter(value)) if isinstance(value, dict) else value
        return name, transform(name).section if is_stage else PRECISIONS[name]

    wrong = list(problems)
    if "where" in data:  # a field that only reading may fill
        wrong.append(unknown(("where",), Recipe, where(("where",))))
    try:
        recipe = Recipe.model_validate({name: value for name, value in data.items() if name != "where"})
    except ValidationError as error:
        wrong += explain(error, Recipe, where=where, chosen=chosen)
    _raise(wrong)
    places = {dotted(key): where(key) for key, _ in recipe.patterns()} if source.path else {}
    return recipe.model_copy(update={"where": places})


def _near(path: str, folder: Path = Path()) -> list[str]:
    """Return what a path that does not exist may have been meant for: bundled names, and files next to it."""
    parent = os.path.dirname(path)
    names = sorted(os.listdir(folder / parent)) if os.path.isdir(folder / parent) else []
    return [*TASKS, *(os.path.join(parent, name) for name in names if name.endswith((".py", ".yaml", ".yml")))]


def _task(task: str, source: Source, folder: Path) -> str:
    folder = Path() if source.option(("task",)) else folder
    path = Path(os.path.abspath(folder / task))
    if task in TASKS or not task:
        return task
    if task.startswith(HUB):
        return _hub_task(task, source, folder)
    if task.endswith(".py") and os.path.isfile(path):
        return str(path.resolve())
    problem = "it is none of these" if not task.endswith(".py") else "there is no such file"
    problem = "that is a folder" if os.path.isdir(path) else problem
    text = f"`task` must be {Study.model_fields['task'].description}, got {task!r:.200}, but {problem}"
    raise InvalidInput(message(text, source.where(("task",)), nearest(task, _near(task, folder))))


def _hub_task(task: str, source: Source, folder: Path) -> str:
    """Return a task `hf:PATH?data=FILE` with absolute paths; PATH may also be a name on the hub."""
    model, data = hub_parts(task)
    is_name = not os.path.isdir(folder / model) and not model.startswith((".", os.sep))
    missing = [path for path in ([data] if is_name else [model, data]) if path and not os.path.exists(folder / path)]
    if not data or missing:
        problem = f"there is no {missing[0]}" if missing else "it names no data: add ?data=FILE, or `--data FILE`"
        text = f"`task` must be hf:PATH?data=FILE, got {task!r:.200}, but {problem}"
        raise InvalidInput(message(text, source.where(("task",))))
    paths = task if is_name or model.startswith((".", os.sep)) else task.replace(HUB, f"{HUB}.{os.sep}", 1)
    return relocated(paths, lambda path: os.path.abspath(folder / path))
