"""The parameters of notebooks: reading them, and checking types and ranges before any work starts.

The runner checks what it passes to a notebook; the notebook checks again, because a person may have typed the values.
"""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from shrinkkit.core.recipe import BASELINE, MOST_THREADS, BatchSizes, Effort, FolderName, ThreadCounts
from shrinkkit.core.stages import MOST_EPOCHS, Section, settings_of, whole
from shrinkkit.errors import InvalidInput, nearest, options
from shrinkkit.pipeline import plan
from shrinkkit.runtimes import registry

TYPES: dict[str, tuple[type, ...]] = {
    **{kind.__name__: (kind,) for kind in (str, int, bool, list, dict)},
    **{"float": (float, int), "None": (type(None),)},
}
"""What a value may be, by the name of the type that a notebook declares."""


def _runtimes(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    known = tuple(registry.runtimes())
    if wrong := [name for name in names or () if name not in known]:
        text = f"`runtimes` must be {options(known)}, got {wrong[0]!r}.{nearest(str(wrong[0]), known)}"
        raise ValueError(text)
    return names


def _not_baseline(name: str) -> str:
    if name.lower() == BASELINE:
        raise ValueError(f"`variant` must not be {BASELINE}, which names the unchanged model. Pass another name.")
    return name


class _Ranges(Section):
    """What a parameter must be, by name, in whichever notebook; settings of recipes are checked where they are used."""

    threads: Annotated[int, whole(0, MOST_THREADS)] = 0
    seed: Annotated[int, whole(0, 2**32 - 1)] = 0
    epochs: Annotated[int, whole(0, MOST_EPOCHS)] = 0
    runtimes: Annotated[tuple[Any, ...] | None, Field(strict=False), AfterValidator(_runtimes)] = ()
    variant: Annotated[FolderName, AfterValidator(_not_baseline)] = ""
    variants: Annotated[tuple[str, ...], Field(strict=False, description="a list of strings in quotes")] = ()
    batch_sizes: BatchSizes = ()
    thread_counts: ThreadCounts = ()
    minutes: Annotated[float, Field(gt=0, le=10_080, description="a number of minutes > 0 and at most 10080")] = 10.0
    effort: Effort = "standard"
    today: Literal["eager", "compiled"] = "eager"


def read(notebook: Path) -> dict[str, tuple[str, Any, str]]:
    """Return the parameters of a notebook: annotation, default and comment, by name.

    `papermill.inspect_notebook` skips lines that it cannot parse, such as `float | None`, and is slow to import.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise InvalidInput(f"{notebook.name} must have one cell tagged `parameters`, found {len(tagged)}. Tag it.")
    source = "".join(tagged[0]["source"])
    parameters = {}
    for line, node in zip(source.splitlines(), ast.parse(source).body, strict=False):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value and "#" in line):
            text = f"{notebook.name}: a parameter must read `name: type = default  # comment`, got {line!r}."
            raise InvalidInput(f"{text} Rewrite it.")
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
    """Check types and ranges of the annotated variables of a notebook, which calls this with `globals()`."""
    # From Python 3.14 on, `__annotations__` of a module are evaluated on demand, and those of a notebook, of which each
    # statement is compiled alone, are lost.
    nodes = [node for cell in variables["In"] for node in ast.parse(cell).body if isinstance(node, ast.AnnAssign)]
    declared = {ast.unparse(node.target): ast.unparse(node.annotation) for node in nodes}
    problems = [*_misspelt(declared.keys(), variables["In"])]
    problems += [type_problem(name, annotation, variables[name]) for name, annotation in declared.items()]
    if any(problems):
        raise InvalidInput(" ".join(filter(None, problems)))
    settings_of(_Ranges, **{name: variables[name] for name in declared if name in _Ranges.model_fields})


def _misspelt(declared: Set[str], cells: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with names that the notebook does not have: given by papermill, or typed for another."""
    own = max((read(path).keys() for path in plan.notebooks().glob("*.ipynb")), key=lambda names: len(names & declared))
    # This is how the cell begins that papermill adds.
    added = [node for cell in cells if cell.startswith("# Parameters\n") for node in ast.parse(cell).body]
    given = {ast.unparse(node.targets[0]) for node in added if isinstance(node, ast.Assign)} - declared
    typed = {name for name in declared - own if nearest(name, own - declared)}
    for name in sorted(given | typed):
        closest = nearest(name, own - declared or declared) or nearest(name, declared)
        yield f"`{name}` is not a parameter.{closest} Available: {', '.join(own)}."


def type_problem(name: str, annotation: str, value: Any) -> str:
    """Return what is wrong with the type of a parameter, '' if nothing is; `annotation` is names in `TYPES` and `|`."""
    kinds = [kind.strip().partition("[")[0] for kind in annotation.split("|")]
    allowed = tuple(python_type for kind in kinds for python_type in TYPES.get(kind, ()))
    if isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool)):
        return ""
    return f"`{name}` must be {annotation}, got {value!r}."
