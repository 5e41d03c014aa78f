"""The steps of a study: which notebooks run, with which parameters, and what each of them needs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrinkkit.core import machines
from shrinkkit.core.recipe import BASELINE, STAGE, Recipe, Study
from shrinkkit.core.run_folder import RunFolder, Step
from shrinkkit.core.stages import Choice, Stage
from shrinkkit.core.target import Place, Target

FOLDER = RunFolder("")
"""The layout of every run folder."""
SEARCH = "3-search"
"""The notebook that searches for recipes."""
BENCHMARK = "4-benchmark"
"""The notebook that measures."""
ROBUSTNESS = "4-robustness"
"""The notebook that measures robustness."""
REPORT = "5-report"
"""The notebook that ends every run."""

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Planned:
    """A step to take: its notebook and parameters, the steps it needs, and what it leaves behind."""

    name: str
    notebook: str
    subject: str
    """The variant that it makes or the place that it measures; empty for others."""
    parameters: Mapping[str, Any]
    needs: tuple[str, ...]
    leaves: str
    """The record, relative to the run folder, that proves that the step was taken; empty for the report."""
    reads: tuple[str, ...] = ()
    """Records of earlier steps that it depends on, relative to the run folder."""

    @property
    def path(self) -> Path:
        """The path of its notebook."""
        return notebooks() / f"{self.notebook}.ipynb"

    def in_state(self, state: str) -> Step:
        """Return the step as a run's status has it."""
        return Step(self.name, self.notebook, self.subject, state, effort=self.parameters.get("effort", ""))


_REPORT = Planned("5-report", REPORT, "", {"run": ".."}, (), "")


def notebooks() -> Path:
    """Return the folder of the step notebooks: in the installed package, or next to it in a checkout."""
    inside = PACKAGE / "notebooks"
    return inside if inside.is_dir() else PACKAGE.parent / "notebooks"


def plan(study: Study, *, task: str, threads: int, own: Sequence[str] = ()) -> tuple[Planned, ...]:
    """Return the steps of a study in an order in which each comes after what it needs.

    Each stage and the precision of a recipe is a step; what recipes have in common at their beginning is made once.
    Measured are the ends of recipes, what is lowered to a precision, and what a stage changes that does not only train,
    so that the report can tell what each step gave. What is not measured is kept as a checkpoint.

    The notebooks see `task`, a name or path, from a folder inside the run folder. `own` are the names of the machine
    that the run was made on, if that is settled: on another one the steps that measure carry its name, so that they
    replace none of the others.
    """
    runtimes = list(dict.fromkeys(Target.parse(t).runtime for t in study.targets))
    common = {"task": task, "run": "..", "threads": threads, "seed": study.seed}
    # Every target is compared with what is run today, which is torch.
    with_torch = {**common, "runtimes": list(dict.fromkeys(["torch", *runtimes]))}
    baseline = Planned("1-baseline", "1-baseline", BASELINE, with_torch, (), _record(BASELINE))
    made = {BASELINE: baseline}
    if study.search:
        wanted = {"target": study.searched, "minutes": study.search.minutes, "budget": study.budget.model_dump()}
        after, leaves = ("1-baseline",), FOLDER.search.as_posix()
        made[SEARCH] = Planned(SEARCH, SEARCH, "", {**common, **wanted}, after, leaves, (_record(BASELINE),))

    def add(notebook: str, name: str, source: str, choice: Choice, **parameters: Any) -> None:
        before, measured = made[source], bool(parameters.get("runtimes"))
        values = {**common, "variant": name, "source": source, "settings": choice.to_dict()[choice.name], **parameters}
        leaves = _record(name) if measured else FOLDER.checkpoint_record(name).as_posix()
        subject, reads = name if measured else "", (before.leaves,)
        made[name] = Planned(f"{notebook}-{name}", notebook, subject, values, (before.name,), leaves, reads)

    names, measured = _parts(study.recipes)
    for recipe in sorted(study.recipes, key=lambda recipe: recipe.precision.name != "float32"):
        source, floating = BASELINE, recipe.precision.name == "float32"
        for end in range(1, len(recipe.stages) + 1):
            key, stage = _key(recipe.stages[:end]), recipe.stages[end - 1]
            name = recipe.name if floating and end == len(recipe.stages) else names[key]
            if name not in made:
                files = {"runtimes": runtimes if key in measured else []}
                add(stage.transform.notebook, name, source, stage, transform=stage.name, **files)
            source = name
        if not floating:
            lowering = {"precision": recipe.precision.name, "runtimes": runtimes}
            add("3-quantize", recipe.name, source, recipe.precision, **lowering)
    variants = [name for name, step in made.items() if step.subject == name]
    benchmarks = []
    for target in map(Target.parse, study.targets):
        sizes = {"batch_sizes": list(study.batch_sizes), "thread_counts": list(study.thread_counts)}
        parameters = {**common, "target": str(target), "variants": variants, **sizes, "effort": study.effort}
        parameters |= {"today": study.today, "others": [], "times": study.mode != "robust"}
        here = machines.this_machine(target)
        guest = here if own and here not in own else ""
        name = "-".join(filter(None, [BENCHMARK, target.slug, guest]))
        leaves, place = FOLDER.measurement(str(target), here).as_posix(), str(Place(target, guest))
        reads = tuple(map(_record, variants))
        benchmarks.append(Planned(name, BENCHMARK, place, parameters, ("1-baseline",), leaves, reads))
        if study.mode != "compress":
            name = name.replace(BENCHMARK, ROBUSTNESS, 1)
            tried = {**common, "target": str(target), "variants": variants, "effort": study.effort, "others": []}
            leaves = FOLDER.robustness_record(str(target), here).as_posix()
            subject = f"robustness on {place}"
            benchmarks.append(Planned(name, ROBUSTNESS, subject, tried, ("1-baseline",), leaves, reads))
    return (*made.values(), *benchmarks, _REPORT)


def _parts(recipes: Sequence[Recipe]) -> tuple[dict[str, str], set[str]]:
    """Return the name of each beginning of a recipe's stages, by `_key`, and the keys of those to measure."""
    # A recipe in float32 names its stages; the parts of others are named after the first recipe that has them.
    names = {_key(r.stages): r.name for r in recipes if r.precision.name == "float32"}
    measured = set()
    for recipe in recipes:
        for end in range(1, len(recipe.stages) + 1):
            names.setdefault(key := _key(recipe.stages[:end]), f"{recipe.name}{STAGE}{end}")
            if end == len(recipe.stages) or not recipe.stages[end].transform.trains:
                measured.add(key)
    return names, measured


def _record(variant: str) -> str:
    return FOLDER.variant_record(variant).as_posix()


def _key(stages: Sequence[Stage]) -> str:
    """Return a text that is equal for stages that do the same."""
    return json.dumps([stage.to_dict() for stage in stages], sort_keys=True)
