"""The parameters of notebooks: whether values are of the declared types and within their rules, before any work starts.

By papermill they come from `runs`, which checks them too; by hand a person has typed them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shrinkkit.core.recipe import BASELINE, MOST_BATCH, MOST_SIZES, MOST_THREADS
from shrinkkit.core.stages import MOST_EPOCHS
from shrinkkit.core.target import TARGETS, Target
from shrinkkit.errors import InvalidInput, nearest, options

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
RUNTIMES = tuple(dict.fromkeys(Target.parse(target).runtime for target in TARGETS))


def check(names: Mapping[str, Any]) -> None:
    """Return if every parameter of the notebook that has the variables `names` may be what it is.

    A notebook calls this with `globals()`: its parameters are what it has annotated.

    Raises:
        InvalidInput: A parameter has another type than it declares, or breaks its rule; all that do are named.
    """
    declared = {name: getattr(kind, "__name__", str(kind)) for name, kind in names["__annotations__"].items()}
    wrong = [problem for name, kind in declared.items() if (problem := of_type(name, kind, names[name]))]
    wrong = wrong or [RULES[name](name, names[name]) for name in declared if name in RULES]
    if wrong := [one for one in wrong if one]:
        raise InvalidInput(" ".join(wrong))


def of_type(name: str, annotation: str, value: Any) -> str:
    """Return what is wrong with the type of a parameter, '' if nothing is.

    Args:
        name: Of the parameter.
        annotation: As the notebook declares it: names of `TYPES`, several parted by `|`.
        value: What it was given.
    """
    kinds = [kind.strip().partition("[")[0] for kind in annotation.split("|")]
    allowed = tuple(one for kind in kinds for one in TYPES.get(kind, ()))
    if isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool)):
        return ""
    return f"`{name}` must be {annotation}, got {value!r}."


def _whole(least: int, below: int | None = None) -> Callable[[str, Any], str]:
    def rule(name: str, value: Any) -> str:
        if least <= value and (below is None or value < below):
            return ""
        return f"`{name}` must be at least {least}{f' and below {below}' if below else ''}, got {value}."

    return rule


def _counts(most: int) -> Callable[[str, Any], str]:
    def rule(name: str, values: Sequence[Any]) -> str:
        if len(values) > MOST_SIZES:
            return f"`{name}` must hold at most {MOST_SIZES} numbers, got {len(values)}. Leave some out."
        wrong = [one for one in values if not isinstance(one, int) or isinstance(one, bool) or not 1 <= one <= most]
        return (
            f"`{name}` must be whole numbers >= 1 and at most {most}, got {wrong[0]!r}. Leave it out." if wrong else ""
        )

    return rule


def _texts(name: str, values: Sequence[Any]) -> str:
    wrong = [one for one in values if not isinstance(one, str)]
    return f"`{name}` must be a list of texts, got {wrong[0]!r}. Put it in quotes." if wrong else ""


def _known_runtimes(name: str, values: Sequence[Any]) -> str:
    wrong = [one for one in values if one not in RUNTIMES]
    if wrong:
        return f"`{name}` must be {options(RUNTIMES)}, got {wrong[0]!r}.{nearest(str(wrong[0]), RUNTIMES)}"
    return ""


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
    "threads": _whole(0, MOST_THREADS + 1),
    "seed": _whole(0, 2**32),
    "epochs": _whole(0, MOST_EPOCHS + 1),
    "runtimes": _known_runtimes,
    "variant": _new_variant,
    "variants": _texts,
    "batch_sizes": _counts(MOST_BATCH),
    "thread_counts": _counts(MOST_THREADS),
    "today": _today,
}
"""What a parameter of this name must be, in whichever notebook; those of recipes are checked where they are used."""
