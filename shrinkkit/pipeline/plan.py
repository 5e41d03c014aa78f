"""The steps of a study: which notebooks run, with which parameters, and what each of them needs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrinkkit.core import machines
from shrinkkit.core.recipe import Recipe, Study
from shrinkkit.core.target import place, record_path

REPORT = "5-report"
"""The notebook that ends every run."""

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Planned:
    """A step to take: its notebook and parameters, the steps it needs, and what it leaves behind."""

    name: str
    notebook: str
    subject: str
    parameters: Mapping[str, Any]
    needs: tuple[str, ...]
    leaves: str
    """The record, relative to the run folder, that proves that the step was taken; empty for the report."""


_REPORT = Planned("5-report", REPORT, "", {"run": ".."}, (), "")


def notebooks() -> Path:
    """Return the folder of the step notebooks: in the installed package, or beside it in a checkout."""
    inside = PACKAGE / "notebooks"
    return inside if inside.is_dir() else PACKAGE.parent / "notebooks"


def plan(study: Study, *, task: str, threads: int, own: Sequence[str] = ()) -> tuple[Planned, ...]:
    """Return the steps of a study in an order in which each comes after what it needs.

    A recipe that prunes and quantizes is two steps with the pruned variant between them, so that the report can say
    what each gave; recipes that prune alike share it.

    Args:
        study: What to do.
        task: The task's name or path, as the notebooks see it from a folder inside the run folder.
        threads: Intra-op threads for every runtime.
        own: Names of the machine that the run was made on, if that is settled. On another one the steps that measure
            carry its name, so that they replace none of the others.
    """
    runtimes = list(dict.fromkeys(t.partition("/")[2] for t in study.targets))
    common = {"task": task, "run": "..", "threads": threads, "seed": study.seed}
    # Every target is compared with what is run today, which is torch.
    usual = {**common, "runtimes": list(dict.fromkeys(["torch", *runtimes]))}
    steps_ = [Planned("1-baseline", "1-baseline", "baseline", usual, (), _record("baseline"))]
    variants = {"baseline": "1-baseline"}

    def add(kind: str, variant: str, source: str, section: Mapping[str, Any]) -> None:
        parameters = {**common, "runtimes": runtimes, "variant": variant, **section}
        if kind == "3-quantize":
            parameters["source"] = source
        name = f"{kind}-{variant}"
        steps_.append(Planned(name, kind, variant, parameters, (variants[source],), _record(variant)))
        variants[variant] = name

    pruned = {_key(recipe): recipe.name for recipe in study.recipes if recipe.prune and not recipe.quantize}
    for recipe in sorted(study.recipes, key=lambda r: r.quantize is not None):
        source = "baseline"
        if recipe.prune:
            source = pruned.setdefault(_key(recipe), f"{recipe.name}.pruned")
            if source not in variants:
                add("2-prune", source, "baseline", _section(recipe.prune))
        if recipe.quantize:
            add("3-quantize", recipe.name, source, _section(recipe.quantize))
    for target in study.targets:
        sizes = {"batch_sizes": list(study.batch_sizes), "thread_counts": list(study.thread_counts)}
        parameters = {**common, "target": target, "variants": list(variants), **sizes, "today": study.today}
        here = machines.here(target)
        guest = here if own and here not in own else ""
        name = "-".join(filter(None, ["4-benchmark", target.replace("/", "-"), guest]))
        leaves = record_path(target, here)
        at = place(target, guest)
        steps_.append(Planned(name, "4-benchmark", at, parameters, ("1-baseline",), leaves))
    return (*steps_, _REPORT)


def _record(variant: str) -> str:
    return f"variants/{variant}/variant.json"


def _key(recipe: Recipe) -> str:
    """Return a text that is equal for recipes that prune alike."""
    return json.dumps(_section(recipe.prune), sort_keys=True)


def _section(section: Any) -> dict[str, Any]:
    """Return a recipe's section as plain values, which are the parameters of its notebook."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in section.model_dump(mode="json").items()}
