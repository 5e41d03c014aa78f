"""The parameters of notebooks: reading them, and checking types and ranges before any work starts.

The runner checks what it passes to a notebook; the notebook checks again, because a person may have typed the values.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shrinkkit.core.recipe import BASELINE, MOST_BATCH, MOST_SIZES, MOST_THREADS
from shrinkkit.core.stages import MOST_EPOCHS
from shrinkkit.errors import InvalidInput, nearest, options
from shrinkkit.runtimes import registry

TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
    "None": (type(None),),
}
"""What a value may be, by the name of the type that a notebook declares."""


def read(notebook: Path) -> dict[str, tuple[str, Any, str]]:
    """Return the parameters of a notebook: annotation, default and comment, by name.

    `papermill.inspect_notebook` does not serve here: it skips lines that it cannot parse, `float | None` among them,
    and importing papermill would slow the command line down.

    Raises:
        InvalidInput: The notebook has no cell tagged `parameters`, or a line of it has another form.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise InvalidInput(f"{notebook.name} must have one cell tagged `parameters`, found {len(tagged)}. Tag it.")
    source = "".join(tagged[0]["source"])
    parameters = {}
    for line, node in zip(source.splitlines(), ast.parse(source).body, strict=False):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value and "#" in line):
            raise InvalidInput(
                f"{notebook.name}: a parameter must read `name: type = default  # comment`, got {line!r}. Rewrite it."
            )
        comment = line.rpartition("#")[2].strip()
        parameters[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value), comment)
    return parameters


def check_step(notebook: Path, values: Mapping[str, Any]) -> None:
    """Check that `values` are parameters of the notebook and have their types; raises InvalidInput otherwise."""
    declared = read(notebook)
    problems = []
    for name, value in values.items():
        if name not in declared:
            names = ", ".join(declared)
            problems.append(f"{name!r} is not a parameter.{nearest(name, list(declared))} Available: {names}.")
        elif problem := type_problem(name, declared[name][0], value):
            problems.append(f"{problem.rstrip('.')} ({declared[name][2]}).")
    if problems:
        raise InvalidInput(f"{notebook.name} was not started: " + " ".join(problems))


def check(variables: Mapping[str, Any]) -> None:
    """Check the annotated variables of a notebook, which calls this with `globals()`.

    Raises:
        InvalidInput: Values have another type than declared, or are out of range; all of them are named.
    """
    declared = _annotations(variables["In"])
    problems = [type_problem(name, annotation, variables[name]) for name, annotation in declared.items()]
    if not any(problems):
        problems = [RULES[name](name, variables[name]) for name in declared if name in RULES]
    if any(problems):
        raise InvalidInput(" ".join(filter(None, problems)))


def _annotations(cells: Sequence[str]) -> dict[str, str]:
    """Return the annotations of variables in the source of cells, by name.

    From Python 3.14 on, `__annotations__` of a module are evaluated on demand, and those of a notebook, of which each
    statement is compiled alone, are lost.
    """
    nodes = [node for cell in cells for node in ast.parse(cell).body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(node.target): ast.unparse(node.annotation) for node in nodes}


def type_problem(name: str, annotation: str, value: Any) -> str:
    """Return what is wrong with the type of a parameter, '' if nothing is; `annotation` is names in `TYPES` and `|`."""
    kinds = [kind.strip().partition("[")[0] for kind in annotation.split("|")]
    allowed = tuple(python_type for kind in kinds for python_type in TYPES.get(kind, ()))
    if isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool)):
        return ""
    return f"`{name}` must be {annotation}, got {value!r}."


def _integer(least: int, below: int | None = None) -> Callable[[str, Any], str]:
    def rule(name: str, value: Any) -> str:
        if least <= value and (below is None or value < below):
            return ""
        return f"`{name}` must be at least {least}{f' and below {below}' if below else ''}, got {value}."

    return rule


def _sizes(most: int) -> Callable[[str, Any], str]:
    def rule(name: str, values: Sequence[Any]) -> str:
        if len(values) > MOST_SIZES:
            return f"`{name}` must hold at most {MOST_SIZES} numbers, got {len(values)}. Leave some out."
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                return f"`{name}` must be whole numbers >= 1 and at most {most}, got {value!r}. Leave it out."
        return ""

    return rule


def _strings(name: str, values: Sequence[Any]) -> str:
    wrong = [value for value in values if not isinstance(value, str)]
    return f"`{name}` must be a list of strings, got {wrong[0]!r}. Put it in quotes." if wrong else ""


def _runtimes(name: str, values: Sequence[Any]) -> str:
    known = tuple(registry.runtimes())
    wrong = [value for value in values if value not in known]
    return f"`{name}` must be {options(known)}, got {wrong[0]!r}.{nearest(str(wrong[0]), known)}" if wrong else ""


def _new_variant(name: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        return (
            f"`{name}` names a folder: letters, digits, dots and dashes, got {value!r}. Pass something like my-variant."
        )
    if value.lower() == BASELINE:
        return f"`{name}` must not be {BASELINE}, which names the unchanged model. Pass another name."
    return ""


def _today(name: str, value: str) -> str:
    return "" if value in ("eager", "compiled") else f"`{name}` must be eager or compiled, got {value!r}."


RULES: dict[str, Callable[[str, Any], str]] = {
    "threads": _integer(0, MOST_THREADS + 1),
    "seed": _integer(0, 2**32),
    "epochs": _integer(0, MOST_EPOCHS + 1),
    "runtimes": _runtimes,
    "variant": _new_variant,
    "variants": _strings,
    "batch_sizes": _sizes(MOST_BATCH),
    "thread_counts": _sizes(MOST_THREADS),
    "today": _today,
}
"""What a parameter of this name must be, in whichever notebook; those of recipes are checked where they are used."""
