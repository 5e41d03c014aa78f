"""The commands `run` and `report`: what executes the steps of a run."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from shrinkkit.cli import terminal
from shrinkkit.cli.results import print_results
from shrinkkit.cli.terminal import Json, Quiet, Reports, Run, Targets, Verbose, complete_recipe
from shrinkkit.errors import InvalidInput

if TYPE_CHECKING:
    from shrinkkit.core.recipe import Study
    from shrinkkit.core.studies import Override
    from shrinkkit.pipeline.runner import PreparedRun

STUDY_HELP = "A study (.yaml), a bundled study, or a task (name, .py or hf:PATH); with --only also a run folder."

RUN_HELP = """Compress a task by recipes, benchmark every variant on this machine, and write one report.

\b
shrinkkit run digits-cnn          a bundled study
shrinkkit run study.yaml          a study of your own
shrinkkit run my_task.py          your task, the built-in recipes that this CPU supports
shrinkkit run my_task.py --recipe static-int8 --target cpu/onnxruntime
shrinkkit run digits-cnn --set budget.accuracy_drop=0.02 --set seed=1
shrinkkit run hf:PATH --data FILE   a Hugging Face model and texts or images

Steps whose inputs have not changed since the last run are cached.

To measure the same variants on another machine, copy the run folder there (and the task's file to the same place \
relative to it), run this, and copy the folder back; `shrinkkit report RUN` then reports both machines:

\b
shrinkkit run reports/my_task --only benchmark --task my_task.py"""


def run(
    study: Annotated[str, Argument(metavar="STUDY|TASK|RUN", help=STUDY_HELP, autocompletion=terminal.complete_study)],
    recipe: Annotated[
        list[str] | None,
        Option(metavar="R", help="Built-in recipe or .yaml file; may be repeated.", autocompletion=complete_recipe),
    ] = None,
    target: Targets = None,
    data: Annotated[
        str | None, Option(metavar="FILE", help="With hf:PATH: .txt, .csv, .jsonl, .npz or images.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Any setting of a study, such as seed=1; may be repeated."),
    ] = None,
    accuracy_drop: Annotated[float | None, Option(metavar="D", help="Maximum accuracy drop (0.01).")] = None,
    threads: Annotated[int | None, Option(metavar="N", help="Intra-op threads (default: every core).")] = None,
    effort: Annotated[
        Literal["quick", "standard", "thorough"] | None, Option(help="How much is measured (standard).")
    ] = None,
    mode: Annotated[
        Literal["compress", "robust", "all"] | None, Option(help="Measure speed, robustness, or both (compress).")
    ] = None,
    reports: Reports = Path("reports"),
    only: Annotated[Literal["benchmark"] | None, Option(help="Measure the variants of an earlier run here.")] = None,
    task: Annotated[str | None, Option(metavar="FILE", help="With --only RUN: its task, if you trust it.")] = None,
    force: Annotated[bool, Option("--force", help="Ignore the cache.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the steps and which are cached; run none.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prepare the run, and execute or preview it."""
    from shrinkkit.core import machines
    from shrinkkit.core.studies import Override
    from shrinkkit.pipeline import runner

    overrides = [Override.parse(text) for text in set_ or ()]
    if accuracy_drop is not None:
        overrides.append(Override(("budget", "accuracy_drop"), accuracy_drop, f"--accuracy-drop {accuracy_drop:g}"))
    common: dict[str, Any] = {"command": _command(), "force": force}
    study = _with_data(study, data)
    with terminal.monitor(as_json=as_json, quiet=quiet, verbose=verbose) as monitor:
        if only:
            if recipe or overrides:
                text = "`--only benchmark` measures what a run made, for which `--recipe`, `--set` and"
                raise InvalidInput(f"{text} `--accuracy-drop` are settled. Leave them out.")
            folder, task = _run_folder(study, reports, task)
            common |= {"targets": target or (), "threads": threads, "task": task, "effort": effort}
            prepared = runner.prepare_benchmark(folder, monitor=monitor, **common)
        elif task:
            text = "`--task` goes with `--only` and a run folder. Name the task as the first argument instead."
            raise InvalidInput(text)
        else:
            options = {"threads": threads, "effort": effort, "mode": mode}
            overrides += [Override((k,), v, f"--{k} {v}") for k, v in options.items() if v is not None]
            chosen = _study(study, recipe or (), target or (), overrides)
            count = chosen.threads or machines.cores()
            machines.check_threads(count, *chosen.thread_counts)
            prepared = runner.prepare(chosen, reports=reports, threads=count, monitor=monitor, **common)
        if dry_run:
            _print_plan(prepared, as_json=as_json, quiet=quiet)
            return
        monitor.plan(*_plan(prepared))
        finished = prepared.execute(monitor)
    raise typer.Exit(_report_results(finished.path, as_json=as_json, quiet=quiet))


TUNE_HELP = """Search for the fastest or smallest recipe within a budget on one target, and report what was found.

\b
shrinkkit tune digits-cnn --target cpu/openvino
shrinkkit tune my_task.py --accuracy-drop 0.02 --minimise size --time 30m

Recipes are tried until the time is up; each is timed and scored as the file that would be shipped. What is found is \
made again, measured in a new process, and evaluated once on the test split. Ctrl-C ends the search with the best so \
far; again, it stops the run, which goes on with the same command."""
_UNITS = {"s": 1 / 60, "m": 1.0, "h": 60.0}


def tune(
    task: Annotated[
        str, Argument(metavar="TASK", help="A task (name, .py or hf:PATH).", autocompletion=terminal.complete_study)
    ],
    target: Annotated[
        str | None, Option(metavar="T", help="Where it is to run (cpu/openvino, or what can run here).")
    ] = None,
    accuracy_drop: Annotated[float, Option(metavar="D", help="Maximum accuracy drop.")] = 0.01,
    minimise: Annotated[Literal["latency", "size"], Option(help="What is to be smallest.")] = "latency",
    time: Annotated[str, Option(metavar="TIME", help="Of the search: 90s, 10m or 2h.")] = "10m",
    recipe: Annotated[
        list[str] | None,
        Option(metavar="R", help="Recipe to measure besides; may be repeated.", autocompletion=complete_recipe),
    ] = None,
    data: Annotated[str | None, Option(metavar="FILE", help="With hf:PATH: as of `run`.")] = None,
    set_: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="Any setting of a study; may be repeated.")
    ] = None,
    threads: Annotated[int | None, Option(metavar="N", help="Intra-op threads (default: every core).")] = None,
    reports: Reports = Path("reports"),
    force: Annotated[bool, Option("--force", help="Ignore the cache.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the steps and which are cached; run none.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Search, and make and measure what was found."""
    from shrinkkit.core import machines, studies
    from shrinkkit.core.recipe import title
    from shrinkkit.core.studies import Override
    from shrinkkit.pipeline import runner
    from shrinkkit.runtimes import registry

    task, at = _with_data(task, data), target or registry.default_targets()[-1]
    want = {"latency": "fastest", "size": "smallest"}[minimise]
    settings: dict[str, Any] = {"accuracy_drop": accuracy_drop, "want": want, "name": f"{title(task)}-tuned"}
    with terminal.monitor(as_json=as_json, quiet=quiet, verbose=verbose) as monitor:
        settings |= {
            "threads": threads,
            "search_minutes": _minutes(time),
            "overrides": [*map(Override.parse, set_ or ())],
        }
        chosen = studies.study(task, recipes=recipe or (), targets=[at], **settings)
        count = chosen.threads or machines.cores()
        machines.check_threads(count, *chosen.thread_counts)
        options: dict[str, Any] = {"threads": count, "force": force, "command": _command(), "monitor": monitor}
        prepared = runner.prepare(chosen, reports=reports, **options)
        if dry_run:
            _print_plan(prepared, as_json=as_json, quiet=quiet)
            return
        monitor.plan(*_plan(prepared))
        finished = prepared.execute(monitor)
    raise typer.Exit(_report_results(finished.path, as_json=as_json, quiet=quiet))


def _minutes(time: str) -> float:
    """Return a time such as 90s, 10m or 2h in minutes."""
    number, unit = time[:-1], time[-1:]
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
        raise InvalidInput(f"`--time` must be a number with s, m or h, such as 10m, got {time!r}.")
    return float(number) * _UNITS[unit]


def _with_data(task: str, data: str | None) -> str:
    if data is None:
        return task
    if not task.startswith("hf:") or "?data=" in task:
        raise InvalidInput(f"`--data` goes with a model `hf:PATH`, got {task!r}. Another task names its own.")
    return f"{task}?data={data}"


def _command() -> str:
    """Return the command line, with the variables that stand for options of it."""
    prefixes = ("SHRINKKIT_RUN_", "SHRINKKIT_TUNE_")
    variables = sorted(item for item in os.environ.items() if item[0].startswith(prefixes))
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in variables), shlex.join(["shrinkkit", *sys.argv[1:]])])


def _run_folder(study: str, reports: Path, task: str | None) -> tuple[Path, str | None]:
    """Return the run folder that `--only` is about, given as such or by a study or task, and the task if given."""
    from shrinkkit.core import studies
    from shrinkkit.core.recipe import title

    if Path(study).is_dir():
        return Path(study), task
    if study.endswith((".yaml", ".yml")):
        settings = studies.read_study(study)
        return reports / settings.name, task or settings.task
    return reports / title(study), task or study


def _study(name: str, recipes: Sequence[str], targets: Sequence[str], overrides: "Sequence[Override]") -> "Study":
    """Return the study that is named, or the one of a task with `recipes` and `targets`, with `overrides`."""
    from shrinkkit.core import studies
    from shrinkkit.core.recipe import TASKS
    from shrinkkit.runtimes import registry

    if name.endswith((".yaml", ".yml")) or (name in TASKS and not recipes and not targets):
        if recipes or targets:
            text = "`--recipe` and `--target` go with a task; a study names its own."
            raise InvalidInput(f"{text} Edit the study, or use `--set`, as in `--set targets=[cpu/torch]`.")
        return studies.read_study(name, overrides)
    targets = targets or registry.default_targets()
    chosen, notes = (recipes, ()) if recipes else registry.default_recipes(targets)
    return studies.study(name, recipes=chosen, targets=targets, notes=notes, overrides=overrides)


def _plan(prepared: "PreparedRun") -> tuple[list[tuple[str, ...]], str]:
    """Return the name, state and subject of each step, and what is to be done in how much time."""
    from shrinkkit.display import formats
    from shrinkkit.pipeline import run_status

    states = prepared.preview()
    steps = [step.in_state(states[step.name]) for step in prepared.steps]
    time = run_status.estimate(prepared.run, [step for step in steps if step.state == "run"])
    cached = sum(step.state == "cached" for step in steps)
    to_run = formats.counted(len(steps) - cached, "step")
    summary = f"{to_run} to run, {cached} cached, in {prepared.run.path}; {time}"
    return [(step.name, step.state, step.subject) for step in steps], summary


def _print_plan(prepared: "PreparedRun", *, as_json: bool, quiet: bool) -> None:
    if as_json:
        states = prepared.preview()
        fields = ("name", "notebook", "subject", "needs", "parameters")
        plan = [{"state": states[s.name], **{field: getattr(s, field) for field in fields}} for s in prepared.steps]
        terminal.print_json({"run": str(prepared.run.path), "steps": plan})
    elif not quiet:
        rows, summary = _plan(prepared)
        terminal.print_rows(rows)
        print(f"\n{summary}")


def _report_results(path: Path, *, as_json: bool, quiet: bool) -> int:
    """Print the results of a run and return the exit status."""
    from shrinkkit.core.run_folder import RunFolder
    from shrinkkit.results import results
    from shrinkkit.results.verdict import decide

    loaded, folder = results.load(path), RunFolder(path)
    failures = results.failures(loaded)
    if as_json:
        steps = loaded.status.to_dict()["steps"] if loaded.status else []
        paths = {"run": str(path), "report": str(folder.report), "results": str(folder.results)}
        terminal.print_json(paths | {"verdict": decide(loaded).sentence, "failures": len(failures), "steps": steps})
    elif not quiet:
        print()
        print_results(loaded)
        print(f"\nreport: {folder.report}")
    return 1 if failures or any(record.partial for record in loaded.measured.values()) else 0


def report(
    run: Run = None,
    reports: Reports = Path("reports"),
    pdf: Annotated[bool, Option("--pdf", help="Also write report.pdf; requires Chrome or Chromium.")] = False,
    full: Annotated[
        bool, Option("--full", help="With --pdf: all sections, not the 4 to 6 pages of a summary.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make the report of a run folder again."""
    from shrinkkit.pipeline import runner

    if full and not pdf:
        raise InvalidInput("`--full` requires `--pdf`; the HTML report always has all sections. Add `--pdf`.")
    folder = terminal.run_folder(run, reports)
    with terminal.monitor(as_json=as_json, quiet=quiet, verbose=verbose) as monitor:
        runner.rebuild_report(folder.path, monitor=monitor)
    written = {"report": folder.report}
    if pdf:
        from shrinkkit.report import export

        written["PDF"] = folder.report.with_suffix(".pdf")
        export.pdf(folder.report, written["PDF"], full=full)
    if as_json:
        terminal.print_json({name.lower(): str(path) for name, path in written.items()})
    elif not quiet:
        print("\n".join(f"{name}: {path}" for name, path in written.items()))
