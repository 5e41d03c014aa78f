"""The command line: `run`, `list`, `new`, `report`, `index`, `verify`, `notebooks`. Starts without importing torch."""

import argparse
import math
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from shrinkkit import __version__
from shrinkkit.core import processes
from shrinkkit.errors import InvalidInput, ShrinkkitError, brief

if TYPE_CHECKING:
    from shrinkkit.core.recipe import Recipe, Study


TRACEBACK = "SHRINKKIT_TRACEBACK"
"""Environment variable that has an error which nobody foresaw shown whole."""
EXIT_CODES = """exit status:
  0    every variant was made and measured wherever it can run
  1    a step failed, or the report could not be made; the report says which and why
  2    the command, a recipe, a study or a task is not valid; nothing was started
  130  interrupted; the same command goes on from there. By SIGTERM it is 143, by SIGHUP 129"""

RUN = """Compress a task by recipes, measure every variant fairly on this machine, and write one report.

  shrinkkit run digits-cnn                      a bundled study
  shrinkkit run study.yaml                      a study of your own
  shrinkkit run my_task.py                      your task, every built-in recipe
  shrinkkit run my_task.py --recipe static-int8 --recipe mine.yaml --target cpu/onnxruntime

Steps whose inputs have not changed since the last run are not taken again.

To measure the same variants on another machine, copy the run folder there (and the task's file to the same place beside
it), run this, and copy the folder back; `shrinkkit report RUN` then reports both machines:

  shrinkkit run reports/my_task --only benchmark --task my_task.py --target cpu/onnxruntime"""

VERIFY = """Check on this machine that a variant's files are those that the report is about, give the outputs that were
stored beside them, and are as fast as reported. The folder may have been copied alone, without the task. A file that
takes longer than --timeout to run, or to be timed, is stopped, and so is one that crashes.

exit status of verify:
  0    every file that can run here gives its outputs
  1    a file differs, is damaged or does not run, or none can run here
  2    there is no such variant"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with _stoppable():
            status: int = arguments.command(arguments)
    except InvalidInput as error:
        print(f"shrinkkit: {error}", file=sys.stderr)
        return 2
    except ShrinkkitError as error:
        print(f"shrinkkit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("\nshrinkkit: interrupted; the same command goes on from here.", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    except Exception as error:  # a full disk, or a defect: one sentence, and the rest on request
        if os.environ.get(TRACEBACK):
            raise
        print(f"shrinkkit: {_sentence(error)} Set {TRACEBACK}=1 to see where it happened.", file=sys.stderr)
        return 1
    return status


@contextmanager
def _stoppable() -> Iterator[None]:
    """Take SIGTERM and SIGHUP as Ctrl-C is taken; one that is ignored, as SIGHUP is under `nohup`, stays ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    # Only the main thread hears signals.
    here = threading.current_thread() is threading.main_thread()
    heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if here and signal.getsignal(n) == signal.SIG_DFL]
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


def _sentence(error: Exception) -> str:
    """Return in one sentence what went wrong that no rule of this package foresees."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}."
    return f"{type(error).__name__}: {brief(error)}."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shrinkkit",
        description="Make trained PyTorch models smaller and faster, and know that they are.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"shrinkkit {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, act: object, summary: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=description or summary,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=act)
        return sub

    run = command("run", _run, "compress, measure and report", RUN)
    run.add_argument(
        "study",
        metavar="STUDY|TASK|RUN",
        help="a study (.yaml), a bundled study, or a task (name or .py); with --only also a run folder",
    )
    run.add_argument("--recipe", action="append", metavar="R", help="built-in recipe or .yaml file; may be repeated")
    run.add_argument(
        "--target", action="append", metavar="T", help="where to measure, such as cpu/torch; may be repeated"
    )
    run.add_argument(
        "--accuracy-drop", type=float, metavar="D", help="the budget: accuracy that may be given up (0.01)"
    )
    run.add_argument(
        "--unit", metavar="U", help="of --accuracy-drop: share (of scores in [0, 1]) or score (of others; share)"
    )
    run.add_argument("--threads", type=int, metavar="N", help="threads of one call (default: every core)")
    run.add_argument(
        "--reports", type=Path, default=Path("reports"), metavar="DIR", help="where run folders go (reports)"
    )
    run.add_argument(
        "--only", choices=("benchmark",), help="measure what a run made on this machine, and report; make nothing anew"
    )
    run.add_argument(
        "--task", metavar="FILE", help="with --only and a run folder: the task's file, which you trust to be run"
    )
    run.add_argument("--force", action="store_true", help="take every step again, changed or not")

    listing = command("list", _list, "what there is: tasks, recipes, or targets")
    listing.add_argument("kind", choices=("tasks", "recipes", "targets"))
    new = command("new", _new, "write a commented task file to start from")
    new.add_argument("file", type=Path, metavar="FILE.py")
    report = command("report", _report, "make the report of a run folder again")
    report.add_argument("run", type=Path, metavar="RUN")
    report.add_argument("--pdf", action="store_true", help="also print it to report.pdf, by a Chromium of this machine")
    index = command("index", _index, "write one page over all runs of a folder")
    index.add_argument("reports", type=Path, nargs="?", default=Path("reports"), metavar="REPORTS")
    verify = command("verify", _verify, "check a variant's files on this machine", VERIFY)
    verify.add_argument("folder", type=Path, metavar="VARIANT", help="such as reports/digits-cnn/variants/static-int8")
    verify.add_argument("--target", action="append", default=[], metavar="T", help="check only this; may be repeated")
    verify.add_argument("--threads", type=int, default=0, metavar="N", help="threads of one call (default: every core)")
    verify.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="seconds for a file to run, and again to be timed (120)"
    )
    verify.add_argument("--json", action="store_true", help="print what was found as JSON")
    notebooks = command("notebooks", _notebooks, "copy the step notebooks out, to work in them")
    notebooks.add_argument("folder", type=Path, metavar="DIR")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from shrinkkit.core import machines
    from shrinkkit.pipeline import runner
    from shrinkkit.results import conclusions, results, table

    command = shlex.join(["shrinkkit", *sys.argv[1:]])
    common: dict[str, Any] = {"command": command, "force": arguments.force, "say": _Progress()}
    if arguments.only:
        folder, task = _run_folder(arguments)
        runner.benchmark(folder, targets=arguments.target or (), threads=arguments.threads, task=task, **common)
    elif arguments.task:
        raise InvalidInput("`--task` goes with `--only` and a run folder. Name the task as the first argument instead.")
    else:
        study = _study(arguments)
        threads = study.threads or machines.cores()
        machines.check_threads(threads, *study.thread_counts)
        folder = runner.run(study, reports=arguments.reports, threads=threads, **common)
    found = table.load(folder)
    print(f"\n{results.table(found)}\n\n{conclusions.verdict(found).sentence}\n\nreport: {folder / 'report.html'}")
    return 1 if table.failures(found) else 0


def _run_folder(arguments: argparse.Namespace) -> tuple[Path, str | None]:
    """Return the run folder that `--only` is about, given as such or by a study or task, and the task if given."""
    from shrinkkit.core import studies

    if arguments.recipe or _budget(arguments):
        raise InvalidInput(
            "`--only benchmark` measures what a run made, for which `--recipe` and `--accuracy-drop` are settled. "
            "Leave them out."
        )
    what = arguments.study
    if Path(what).is_dir():
        return Path(what), arguments.task
    if what.endswith((".yaml", ".yml")):
        study = studies.read_study(what)
        return Path(arguments.reports, study.name), arguments.task or study.task
    return Path(arguments.reports, Path(what).stem), arguments.task or what


def _study(arguments: argparse.Namespace) -> "Study":
    from shrinkkit.core import studies
    from shrinkkit.core.recipe import BUILT_IN

    what = arguments.study
    spelled = arguments.recipe or arguments.target
    if what.endswith((".yaml", ".yml")) or (what in studies.builtin_studies() and not spelled):
        if spelled:
            raise InvalidInput(
                "`--recipe` and `--target` go with a task; a study names its own. Edit the study instead."
            )
        return studies.changed(studies.read_study(what), threads=arguments.threads, **_budget(arguments))
    return studies.study(
        what,
        recipes=arguments.recipe or BUILT_IN,
        targets=arguments.target or _usual_targets(),
        threads=arguments.threads,
        **_budget(arguments),
    )


def _budget(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line says of the budget, by the keys of a study."""
    said = {"accuracy_drop": arguments.accuracy_drop, "unit": arguments.unit}
    return {name: value for name, value in said.items() if value is not None}


def _usual_targets() -> tuple[str, ...]:
    """Return where a task is measured if nobody says where: what can run here and needs no compiling."""
    from shrinkkit.runtimes import specs

    return tuple(name for name, why in specs.available().items() if not why and not name.endswith("/inductor"))


def _list(arguments: argparse.Namespace) -> int:
    from shrinkkit.core import studies
    from shrinkkit.core.recipe import BUILT_IN
    from shrinkkit.tasks.bundled import TASKS

    if arguments.kind == "recipes":
        for name in BUILT_IN:
            print(f"{name:26} {_summary(studies.read_recipe(name))}")
    elif arguments.kind == "tasks":
        for name, what in TASKS.items():
            print(f"{name:26} {what}")
        print("my_task.py                 your own: `shrinkkit new my_task.py` writes one to start from")
    else:
        from shrinkkit.runtimes import specs

        for name, reason in specs.available().items():
            print(f"{name:26} {f'not here: {reason}.' if reason else 'can run here'}")
    return 0


def _summary(recipe: "Recipe") -> str:
    """Return a recipe on one line: its stages, with how much each removes, and its precision."""
    ratios = {stage.name: getattr(stage.settings, "ratio", None) for stage in recipe.stages}
    steps = [f"{name} {ratio:.0%}" if ratio else name for name, ratio in ratios.items()]
    return ", ".join([*steps, recipe.precision.name])


def _new(arguments: argparse.Namespace) -> int:
    from shrinkkit.tasks.bundled import TEMPLATE

    path: Path = arguments.file
    if path.suffix != ".py":
        raise InvalidInput(f"A task is a Python file, got {str(path)!r}. Name it like `my_task.py`.")
    if path.exists():
        raise InvalidInput(f"{path} exists already. Choose another name; nothing is overwritten.")
    shutil.copyfile(TEMPLATE, path)
    print(f"{path} written; it runs as it is: shrinkkit run {path}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from shrinkkit.pipeline import runner

    runner.rebuild_report(arguments.run, say=_Progress())
    print(f"report: {arguments.run / 'report.html'}")
    if arguments.pdf:
        from shrinkkit.report import pdf

        pdf.write(arguments.run / "report.html", arguments.run / "report.pdf")
        print(f"on paper: {arguments.run / 'report.pdf'}")
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from shrinkkit.report import index_page

    print(f"all runs: {index_page.write(arguments.reports)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from shrinkkit.core import machines
    from shrinkkit.pipeline import watchdog

    machines.check_threads(arguments.threads)
    if not 0 < arguments.timeout < math.inf:
        raise InvalidInput(
            f"`--timeout` must be a number of seconds > 0, got {arguments.timeout}. Leave it out for 120."
        )
    # In a process of its own: a file may hang or crash it, and OpenMP reads its settings when torch is loaded.
    count = str(arguments.threads or machines.cores())
    asked = [os.path.abspath(arguments.folder), "--threads", count]
    asked += [*(f"--target={target}" for target in arguments.target), *["--json"] * arguments.json]
    own = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    failed: dict[str, str] = {}
    trying = ""

    def heard(line: str) -> bool:
        nonlocal trying
        print(line, file=sys.stderr, flush=True)
        trying = line.removesuffix(" ...") if line.endswith(" ...") else trying
        return line.endswith(" ...")

    # In a folder of its own as well: libraries read settings from the working directory, which may be the variant's.
    with processes.short_folder() as empty:
        while True:
            again = [part for item in failed.items() for part in ("--failed", *item)]
            call = processes.command("shrinkkit.measure.verify", *asked, *again)
            environment = processes.environment() | own
            ended = watchdog.run(call, limit_s=arguments.timeout, cwd=str(empty), env=environment, heard=heard)
            if ended.status in (0, 1, 2) or not trying or trying in failed:
                print(ended.output, end="")
                return 1 if ended.status not in (0, 1, 2) else ended.status
            late = f"took longer than {arguments.timeout:g} s and was stopped; `--timeout` allows more"
            failed[trying] = late if ended.status is None else f"ended its process with status {ended.status}"


def _notebooks(arguments: argparse.Namespace) -> int:
    from shrinkkit.pipeline import plan

    folder: Path = arguments.folder
    sources = sorted(plan.notebooks().glob("*.ipynb"))
    if existing := [s.name for s in sources if (folder / s.name).exists()]:
        raise InvalidInput(
            f"{folder} has {', '.join(existing)} already. Choose another folder; nothing is overwritten."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        shutil.copyfile(source, folder / source.name)
    print(f"{len(sources)} notebooks copied to {folder}; open them with: jupyter lab {folder}")
    return 0


class _Progress:
    """Prints progress: one line that changes on a terminal, only final lines elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()

    def __call__(self, line: str, final: bool) -> None:
        if self.live:
            print(f"\r\x1b[K{line}", end="\n" if final else "", flush=True)
        elif final:
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
