"""The command line: `run`, `list`, `new`, `report`, `index`, `verify`, `notebooks`. Starts without importing torch."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from shrinkkit import __version__
from shrinkkit.errors import InvalidInput, ShrinkkitError, brief

if TYPE_CHECKING:
    from rich.console import Console

    from shrinkkit.core.recipe import Study
    from shrinkkit.core.run_folder import RunFolder
    from shrinkkit.core.stages import Stage
    from shrinkkit.pipeline.run_status import LineMonitor
    from shrinkkit.pipeline.runner import PreparedRun


TRACEBACK = "SHRINKKIT_TRACEBACK"
"""Environment variable that has the traceback of an unexpected error shown."""
EXIT_STATUS = """Exit status:

0 - every variant was made and measured wherever it can run

1 - a step failed, or the report could not be made; the report says which and why

2 - the command, a recipe, a study or a task is not valid; nothing was started

130 - interrupted; run the same command again to resume (143 after SIGTERM, 129 after SIGHUP)"""
VERIFY_EXIT_STATUS = """Exit status:

0 - every file that can run here gives its outputs

1 - a file differs, is damaged or does not run, or none can run here

2 - there is no such variant"""
RUN_HELP = """Compress a task by recipes, benchmark every variant on this machine, and write one report.

\b
shrinkkit run digits-cnn          a bundled study
shrinkkit run study.yaml          a study of your own
shrinkkit run my_task.py          your task, the built-in recipes that this CPU supports
shrinkkit run my_task.py --recipe static-int8 --target cpu/onnxruntime
shrinkkit run hf:PATH --data FILE   a Hugging Face model and texts or images

Steps whose inputs have not changed since the last run are cached.

To measure the same variants on another machine, copy the run folder there (and the task's file to the same place \
relative to it), run this, and copy the folder back; `shrinkkit report RUN` then reports both machines:

\b
shrinkkit run reports/my_task --only benchmark --task my_task.py"""

app = typer.Typer(
    name="shrinkkit",
    help="Make trained PyTorch models smaller and faster, and verify it.",
    epilog=EXIT_STATUS,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status."""
    with _signals() as received:
        try:
            # Exits by SystemExit, with 130 for a KeyboardInterrupt.
            typer.main.get_command(app).main(args=argv, prog_name="shrinkkit")
        except SystemExit as ended:
            if ended.code != 128 + signal.SIGINT:
                return int(ended.code or 0)
            text = "interrupted; run the same command again to resume."
            status = 128 + (received or [signal.SIGINT])[-1]
        except ShrinkkitError as error:
            text, status = str(error), 2 if isinstance(error, InvalidInput) else 1
        except Exception as error:  # a full disk, or a defect: one sentence, and the rest on request
            if os.environ.get(TRACEBACK):
                raise
            text, status = f"{type(error).__name__}: {brief(error)}.", 1
            if isinstance(error, OSError) and error.strerror:
                text = f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}."
            text += f" Set {TRACEBACK}=1 to see where it happened."
        else:
            return 0
    print(f"shrinkkit: {text}", file=sys.stderr)
    return status


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, and list them; one that is ignored, as under `nohup`, stays ignored."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # Only the main thread receives signals.
    is_main = threading.current_thread() is threading.main_thread()
    handled = [number for number in numbers if is_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _complete_study() -> list[str]:
    from shrinkkit.tasks.bundled import TASKS

    return [*TASKS, *(path.name for kind in ("*.yaml", "*.py") for path in Path().glob(kind))]


def _complete_recipe() -> list[str]:
    from shrinkkit.core.recipe import BUILT_IN

    return [*BUILT_IN, *(path.name for path in Path().glob("*.yaml"))]


def _complete_target() -> list[str]:
    from shrinkkit.runtimes import registry

    return list(registry.targets())


Json = Annotated[bool, Option("--json", help="Print the result as JSON, and progress on standard error.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print no progress and no tables, only errors.")]
STUDY_HELP = "A study (.yaml), a bundled study, or a task (name, .py or hf:PATH); with --only also a run folder."
Targets = Annotated[
    list[str] | None,
    Option("--target", metavar="T", help="Such as cpu/torch; may be repeated.", autocompletion=_complete_target),
]


def _print_version(value: bool) -> None:
    if value:
        print(f"shrinkkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, Option("--version", callback=_print_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Declare the options that go before a command."""


@app.command("run", help=RUN_HELP, epilog=EXIT_STATUS)
def _run(
    study: Annotated[str, Argument(metavar="STUDY|TASK|RUN", help=STUDY_HELP, autocompletion=_complete_study)],
    recipe: Annotated[
        list[str] | None,
        Option(metavar="R", help="Built-in recipe or .yaml file; may be repeated.", autocompletion=_complete_recipe),
    ] = None,
    target: Targets = None,
    data: Annotated[
        str | None, Option(metavar="FILE", help="With hf:PATH: .txt, .csv, .jsonl, .npz or images.")
    ] = None,
    accuracy_drop: Annotated[float | None, Option(metavar="D", help="Maximum accuracy drop (0.01).")] = None,
    unit: Annotated[str | None, Option(metavar="U", help="Of the drop: share (scores in [0, 1]) or score.")] = None,
    threads: Annotated[int | None, Option(metavar="N", help="Intra-op threads (default: every core).")] = None,
    effort: Annotated[
        Literal["quick", "standard", "thorough"] | None, Option(help="How much is measured (standard).")
    ] = None,
    reports: Annotated[Path, Option(metavar="DIR", help="Folder of the run folders.")] = Path("reports"),
    only: Annotated[Literal["benchmark"] | None, Option(help="Measure the variants of an earlier run here.")] = None,
    task: Annotated[str | None, Option(metavar="FILE", help="With --only RUN: its task, if you trust it.")] = None,
    force: Annotated[bool, Option("--force", help="Ignore the cache.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the steps and which are cached; run none.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prepare the run, and execute or preview it."""
    from shrinkkit.core import machines
    from shrinkkit.pipeline import runner

    budget = {k: v for k, v in {"accuracy_drop": accuracy_drop, "unit": unit}.items() if v is not None}
    common: dict[str, Any] = {"command": shlex.join(["shrinkkit", *sys.argv[1:]]), "force": force}
    if data is not None:
        if not study.startswith("hf:") or "?data=" in study:
            raise InvalidInput(
                f"`--data` goes with a model `hf:PATH`, got {study!r}. A task of another kind names its own."
            )
        study = f"{study}?data={data}"
    with _monitor(as_json=as_json, quiet=quiet) as monitor:
        if only:
            if recipe or budget:
                raise InvalidInput(
                    "`--only benchmark` measures what a run made, for which `--recipe` and `--accuracy-drop` are "
                    "settled. Leave them out."
                )
            folder, task = _run_folder(study, reports, task)
            common |= {"targets": target or (), "threads": threads, "task": task, "effort": effort}
            prepared = runner.prepare_benchmark(folder, monitor=monitor, **common)
        elif task:
            text = "`--task` goes with `--only` and a run folder. Name the task as the first argument instead."
            raise InvalidInput(text)
        else:
            settings = budget | {"threads": threads} | ({"effort": effort} if effort else {})
            chosen = _study(study, recipe or (), target or (), settings)
            count = chosen.threads or machines.cores()
            machines.check_threads(count, *chosen.thread_counts)
            prepared = runner.prepare(chosen, reports=reports, threads=count, monitor=monitor, **common)
        run = None if dry_run else prepared.execute(monitor)
    if run is None:
        _print_plan(prepared, as_json=as_json, quiet=quiet)
    else:
        raise typer.Exit(_print_results(run, as_json=as_json, quiet=quiet))


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


def _study(name: str, recipes: Sequence[str], targets: Sequence[str], settings: Mapping[str, Any]) -> "Study":
    """Return the study that is named, or the one of a task with `recipes` and `targets`, with other settings."""
    from shrinkkit.core import studies
    from shrinkkit.core.recipe import TASKS
    from shrinkkit.core.target import Target
    from shrinkkit.runtimes import registry

    if name.endswith((".yaml", ".yml")) or (name in TASKS and not recipes and not targets):
        if recipes or targets:
            text = "`--recipe` and `--target` go with a task; a study names its own. Edit the study instead."
            raise InvalidInput(text)
        return studies.changed(studies.read_study(name), **settings)
    # By default, every target that is available without compiling.
    compiled = {runtime.name for runtime in registry.runtimes().values() if runtime.compiles}
    available = [t for t, why in registry.available().items() if not why and Target.parse(t).runtime not in compiled]
    targets = targets or available
    chosen, notes = (recipes, ()) if recipes else registry.default_recipes(targets)
    return studies.study(name, recipes=chosen, targets=targets, notes=notes, **settings)


def _print_plan(prepared: "PreparedRun", *, as_json: bool, quiet: bool) -> None:
    states = prepared.preview()
    if as_json:
        fields = ("name", "notebook", "subject", "needs", "parameters")
        plan = [
            {"state": states[step.name], **{field: getattr(step, field) for field in fields}} for step in prepared.steps
        ]
        _print_json({"run": str(prepared.run.path), "steps": plan})
    elif not quiet:
        _print_rows([(step.name, states[step.name], step.subject) for step in prepared.steps])
        cached = sum(state == "cached" for state in states.values())
        print(f"\n{len(states) - cached} to run, {cached} cached, in {prepared.run.path}")


def _print_results(run: "RunFolder", *, as_json: bool, quiet: bool) -> int:
    """Print the results of a run and return the exit status."""
    from shrinkkit.results import output, results
    from shrinkkit.results.verdict import decide

    loaded = results.load(run.path)
    failures, verdict = results.failures(loaded), decide(loaded)
    if as_json:
        steps = loaded.status.to_dict()["steps"] if loaded.status else []
        paths = {"run": str(run.path), "report": str(run.report), "results": str(run.results)}
        _print_json(paths | {"verdict": verdict.sentence, "failures": len(failures), "steps": steps})
    elif not quiet:
        console = _console()
        print(f"\n{output.table(loaded, width=console.width if console.is_terminal else output.WIDTH)}\n")
        console.print(repr(verdict), style="bold", markup=False, soft_wrap=not console.is_terminal)
        print(f"\nreport: {run.report}")
    return 1 if failures or any(record.partial for record in loaded.measured.values()) else 0


@app.command("list")
def _list(
    kind: Annotated[Literal["tasks", "recipes", "targets"], Argument(help="What to list.")], as_json: Json = False
) -> None:
    """List available tasks, recipes or targets."""
    from shrinkkit.core import studies
    from shrinkkit.core.recipe import BUILT_IN
    from shrinkkit.runtimes import registry
    from shrinkkit.tasks.bundled import TASKS

    if kind == "recipes":
        recipes = {name: studies.read_recipe(name) for name in BUILT_IN}
        entries = {name: ", ".join([*map(_summary, of.stages), of.precision.name]) for name, of in recipes.items()}
    elif kind == "tasks":
        entries = dict(TASKS)
    else:
        reasons = registry.available()
        entries = {name: f"unavailable: {reason}." if reason else "available" for name, reason in reasons.items()}
    if as_json:
        _print_json(entries)
    else:
        own = {"my_task.py": "your own: `shrinkkit new my_task.py` writes one to start from"}
        _print_rows(list((entries | (own if kind == "tasks" else {})).items()))


def _summary(stage: "Stage") -> str:
    ratio = getattr(stage.settings, "ratio", None)
    return f"{stage.name} {ratio:.0%}" if ratio else stage.name


@app.command("new")
def _new(file: Annotated[Path, Argument(metavar="FILE.py", help="The file to write.")]) -> None:
    """Write a commented task file to start from."""
    from shrinkkit.tasks.bundled import TEMPLATE

    if file.suffix != ".py":
        raise InvalidInput(f"A task is a Python file, got {str(file)!r}. Name it like `my_task.py`.")
    if file.exists():
        raise InvalidInput(f"{file} exists already. Choose another name; nothing is overwritten.")
    shutil.copyfile(TEMPLATE, file)
    print(f"{file} written; it runs as it is: shrinkkit run {file}")


@app.command("report", epilog=EXIT_STATUS)
def _report(
    run: Annotated[Path, Argument(metavar="RUN", help="The run folder.")],
    pdf: Annotated[bool, Option("--pdf", help="Also write report.pdf; requires Chrome or Chromium.")] = False,
    full: Annotated[
        bool, Option("--full", help="With --pdf: all sections, not the 4 to 6 pages of a summary.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the report of a run folder again."""
    from shrinkkit.core.run_folder import RunFolder
    from shrinkkit.pipeline import runner

    folder = RunFolder(run)
    if full and not pdf:
        raise InvalidInput("`--full` requires `--pdf`; the HTML report always has all sections. Add `--pdf`.")
    with _monitor(as_json=as_json, quiet=quiet) as monitor:
        runner.rebuild_report(run, monitor=monitor)
    written = {"report": folder.report}
    if pdf:
        from shrinkkit.report import export

        written["PDF"] = folder.report.with_suffix(".pdf")
        export.pdf(folder.report, written["PDF"], full=full)
    if as_json:
        _print_json({name.lower(): str(path) for name, path in written.items()})
    elif not quiet:
        print("\n".join(f"{name}: {path}" for name, path in written.items()))


@app.command("index")
def _index(
    reports: Annotated[Path, Argument(metavar="REPORTS", help="Folder of the run folders.")] = Path("reports"),
) -> None:
    """Write one page over all runs of a folder."""
    from shrinkkit.report import index_page

    print(f"all runs: {index_page.write(reports)}")


@app.command("verify", epilog=VERIFY_EXIT_STATUS)
def _verify(
    folder: Annotated[Path, Argument(metavar="VARIANT", help="Such as reports/digits-cnn/variants/static-int8.")],
    target: Targets = None,
    threads: Annotated[int, Option(metavar="N", help="Intra-op threads; 0 stands for every core.")] = 0,
    timeout: Annotated[float, Option(metavar="S", help="Seconds for a file to run, and again to be timed.")] = 120,
    as_json: Json = False,
) -> None:
    """Check a variant's files on this machine: hashes, outputs and speed, compared with its report.

    The folder may have been copied alone, without the task. A file that takes longer than --timeout to run, or to be
    timed, is stopped and fails, and so does one that crashes.
    """
    from shrinkkit.measure import verification

    def on_start(_done: float, _total: float, name: str) -> None:
        print(f"{name} ...", file=sys.stderr, flush=True)

    checked = verification.verify(folder, targets=target or (), threads=threads, timeout_s=timeout, progress=on_start)
    print(json.dumps(dataclasses.asdict(checked), indent=1) if as_json else verification.text(checked))
    raise typer.Exit(0 if checked.verified else 1)


@app.command("notebooks")
def _notebooks(folder: Annotated[Path, Argument(metavar="DIR", help="Where to copy them.")]) -> None:
    """Copy the step notebooks out, to work in them."""
    from shrinkkit.pipeline import plan

    sources = sorted(plan.notebooks().glob("*.ipynb"))
    if existing := [source.name for source in sources if (folder / source.name).exists()]:
        names = ", ".join(existing)
        raise InvalidInput(f"{folder} has {names} already. Choose another folder; nothing is overwritten.")
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        shutil.copyfile(source, folder / source.name)
    print(f"{len(sources)} notebooks copied to {folder}; open them with: jupyter lab {folder}")


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def _monitor(*, as_json: bool, quiet: bool) -> "LineMonitor":
    """Return what shows the progress of a run: a live table in a terminal, lines elsewhere."""
    from shrinkkit.pipeline.run_status import LineMonitor, LiveMonitor

    # With --json, standard output is for the result alone.
    console = _console(stderr=as_json)
    console.quiet = quiet
    live = console.is_terminal and not console.is_dumb_terminal and not quiet
    return LiveMonitor(console) if live else LineMonitor(console)


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned columns, of which the last one wraps at the width of a terminal."""
    console = _console()
    if console.is_terminal:
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for row in rows:
            grid.add_row(*row)
        console.print(grid, markup=False)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=1))


if __name__ == "__main__":
    sys.exit(main())
