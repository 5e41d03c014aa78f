"""The commands `status`, `show`, `open`, `index` and `verify`: what a run is doing, and what it gave."""

import dataclasses
import sys
import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from shrinkkit.cli import terminal
from shrinkkit.cli.terminal import Json, Reports, Run, Targets
from shrinkkit.errors import InvalidInput

if TYPE_CHECKING:
    from shrinkkit.results.results import Results


def status(run: Run = None, reports: Reports = Path("reports"), as_json: Json = False) -> None:
    """Show the steps of a run, how long they took, and whether it is in progress."""
    from shrinkkit.core import store
    from shrinkkit.core.run_folder import Status
    from shrinkkit.pipeline import run_status

    folder = terminal.run_folder(run, reports)
    record, in_progress = store.read(folder.status, Status), store.is_held(folder.path)
    # The status is written when a step starts.
    seconds = time.time() - folder.status.stat().st_mtime
    running = {"duration_s": seconds} if in_progress else {"state": "interrupted", "error": run_status.INTERRUPTED}
    steps = tuple(dataclasses.replace(s, **running) if s.state == "running" else s for s in record.steps)
    if as_json:
        data = dataclasses.replace(record, steps=steps).to_dict()
        terminal.print_json({"run": str(folder.path), "in_progress": in_progress, **data})
        return
    current = next((step for step in steps if step.state in ("running", "interrupted")), steps[-1])
    progress = run_status.Progress(steps, current, expected_s=run_status.expected(steps, {}) if in_progress else {})
    print(f"{folder.path}: {'in progress' if in_progress else 'not in progress'}, started {record.started}")
    print(f"{record.command}\n")
    out = terminal.console()
    out.print(run_status.steps_table(progress, height=None, width=out.width))


def show(run: Run = None, reports: Reports = Path("reports"), as_json: Json = False) -> None:
    """Print the results and the summary of a run, from its records."""
    from shrinkkit.results import output, results

    loaded = results.load(terminal.run_folder(run, reports).path)
    if as_json:
        print(output.as_json(loaded), end="")
    else:
        print_results(loaded)


def print_results(loaded: "Results") -> None:
    """Print the table of each target and the summary."""
    from shrinkkit.results import output
    from shrinkkit.results.verdict import decide

    out = terminal.console()
    print(f"{output.table(loaded, width=out.width if out.is_terminal else output.WIDTH)}\n")
    out.print(repr(decide(loaded)), style="bold", markup=False, soft_wrap=not out.is_terminal)


def open_report(run: Run = None, reports: Reports = Path("reports")) -> None:
    """Open the report of a run in the browser; without one, print its path."""
    report = terminal.run_folder(run, reports).report
    if not report.is_file():
        raise InvalidInput(f"There is no {report}. Make it: `shrinkkit report {report.parent}`.")
    opened = webbrowser.open(report.resolve().as_uri())
    print(report if opened else f"There is no browser here; open {report.resolve()}")


def index(reports: Annotated[Path, Argument(metavar="REPORTS", help="Folder of runs.")] = Path("reports")) -> None:
    """Write one page over all runs of a folder."""
    from shrinkkit.report import index_page

    print(f"all runs: {index_page.write(reports)}")


def verify(
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
    if as_json:
        terminal.print_json(dataclasses.asdict(checked))
    else:
        print(verification.text(checked))
    raise typer.Exit(0 if checked.verified else 1)
