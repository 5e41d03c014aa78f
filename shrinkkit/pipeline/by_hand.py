"""Notebooks that a person runs one by one: what they record of a study, and the same report as that of a run."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shrinkkit.core import machines, store
from shrinkkit.core.recipe import BASELINE, STAGE, Budget, Recipe, Study, relocated
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.stages import settings_of
from shrinkkit.core.studies import check_unit
from shrinkkit.core.target import Target
from shrinkkit.display import tables
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Cell, Several, Shown, Statement, Table
from shrinkkit.errors import InvalidInput
from shrinkkit.pipeline import parameters, plan, run_status, runner, steps
from shrinkkit.pipeline.run_status import Monitor
from shrinkkit.results import folders, results
from shrinkkit.runtimes import registry
from shrinkkit.widgets import browse, live

_SETTINGS = ("seed", "effort", "batch_sizes", "thread_counts", "today")


def conclude(variables: Mapping[str, Any], made: Rich | Shown) -> Several:
    """Record what the notebook with these variables adds to the study; return what it made and the results so far.

    In a run, which ends in its report, there is nothing but what the notebook made.
    """
    shown = made.shown() if isinstance(made, Rich) else made
    if store.lease_variable():
        return Several((shown,))
    record(variables)
    return Several((shown, browse.so_far(results.load(Path(variables["run"])))))


def record(variables: Mapping[str, Any]) -> None:
    """Write the study that the variants and measurements of a run folder amount to; a run's own is left alone.

    `variables` are those of a notebook: `run`, and what it knows of `task`, `budget` and the settings of a study.
    Raises InvalidInput if the budget breaks a rule, does not fit the scores, or is that of a run, which has its own.
    """
    run, budget = RunFolder(variables["run"]), variables.get("budget", {})
    status = run_status.read(run)
    if run.status.is_file() and (status is None or any(step.subject == BASELINE for step in status.steps)):
        if budget:
            text = f"`budget` must be {{}} for {run.path}, which `shrinkkit run` made with a budget, got {budget}."
            raise InvalidInput(f"{text} Change it there and run it again: steps that it does not concern are cached.")
        return
    # `--only benchmark` vouches for measurements that a notebook may take again.
    run.status.unlink(missing_ok=True)
    folder = folders.read(run.path)
    names = [name for name in folder.variants if name != BASELINE and STAGE not in name]
    recipes = [Recipe(name=name, **folder.variants[name].recipe) for name in names]
    known = folder.study.model_dump(exclude_unset=True) if folder.study else {"budget": {}}
    if "task" in variables:
        here = run.path.resolve()
        known["task"] = relocated(variables["task"], lambda path: os.path.relpath(os.path.abspath(path), here))
    if not recipes or "task" not in known:
        return
    measured = [at for at in folder.measured if "@" not in at]
    rest = [target for target in registry.default_targets() if target not in measured]
    notes = [f"Not measured: {', '.join(rest)}. Run 4-benchmark with each as `target`."] if measured and rest else []
    study = Study(
        **known
        | {name: variables[name] for name in _SETTINGS if name in variables}
        | {
            "name": re.sub(r"[^A-Za-z0-9.-]", "-", run.path.resolve().name).strip("-.")[:64] or "by-hand",
            "recipes": sorted(recipes, key=lambda recipe: (len(recipe.stages), recipe.name)),
            "targets": measured or rest,
            "budget": settings_of(Budget, **known["budget"] | budget),
            "notes": notes,
            "mode": "all" if folder.robustness else "compress",
        }
    )
    scores = [s for one in folder.measured.values() for m in one.measurements if m.accuracy for s in m.accuracy.scores]
    if scores and "budget" in variables:
        check_unit(study, (min(scores), max(scores)))
    runner.write_study(run, study)


def measure_others(notebook: str, variables: Mapping[str, Any]) -> Table | Statement:
    """Execute this notebook with its parameters for each of its `others`, as a run does."""
    run, others = RunFolder(variables["run"]), variables["others"]
    if others is None:
        others = [target for target in registry.default_targets() if target != variables["target"]]
    if not others:
        return Statement("None.")
    path = plan.notebooks() / f"{notebook}.ipynb"
    given = {name: variables[name] for name in parameters.read(path)}
    task = relocated(given["task"], lambda name: os.path.relpath(os.path.abspath(name), run.path.resolve() / "steps"))
    limit_s: float = Study.model_fields["timeout_s"].default
    threads, progress, rows = variables["threads"] or machines.cores(), live.progress("Measuring"), list[tables.Row]()
    for i, target in enumerate(others):
        values = given | {"task": task, "run": "..", "target": target, "others": []}
        step = plan.Planned(f"{notebook}-{Target.parse(target).slug}", notebook, target, values, (), target)

        def tick(_: float, phase: str, i: int = i, target: str = target) -> None:
            progress(i, len(others), f"{target}: {phase}")

        ended = steps.execute(path, step, run, timeout_s=limit_s, threads=threads, tick=tick)
        page = os.path.relpath(run.steps / f"{step.name}.html")
        rows.append({"target": target, "state": Cell(ended.error or "measured", href="" if ended.error else page)})
    progress(len(others), len(others), "")
    return tables.table("Other targets", rows, text=("state",))


def publish(run: str) -> None:
    """Write the report of a run folder, as `shrinkkit report` does, and show links; nothing while a run writes it."""
    if store.lease_variable():
        return
    folder, output = RunFolder(run), live.Live(Statement("Writing the report …"))
    runner.rebuild_report(folder.path, monitor=Monitor())
    paths = (folder.report, folder.report_markdown, folder.results)
    rows: list[tables.Row] = [{"file": Cell(p.name, href=os.path.relpath(p)), "in": str(folder.path)} for p in paths]
    output.show(tables.table("Report", rows, text=("in",)))
