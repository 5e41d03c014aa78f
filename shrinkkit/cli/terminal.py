"""Options that commands share, completion of names in the shell, and output: rows, tables, JSON, progress."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from shrinkkit.errors import InvalidInput, message, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from shrinkkit.core.run_folder import RunFolder
    from shrinkkit.pipeline.run_status import LineMonitor


def complete_study() -> list[str]:
    """Return what `run` takes in this folder."""
    from shrinkkit.tasks.bundled import TASKS

    return [*TASKS, *(path.name for kind in ("*.yaml", "*.py") for path in Path().glob(kind))]


def complete_recipe() -> list[str]:
    """Return the recipes there are, and files that may hold one."""
    from shrinkkit.core.recipe import BUILT_IN

    return [*BUILT_IN, *(path.name for path in Path().glob("*.yaml"))]


def complete_target() -> list[str]:
    """Return the names of all targets."""
    from shrinkkit.runtimes import registry

    return list(registry.targets())


def complete_run() -> list[str]:
    """Return the run folders in `reports`."""
    return [str(path.parent) for path in Path("reports").glob("*/study.json")]


Json = Annotated[bool, Option("--json", help="Print the result as JSON, and progress on standard error.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print no progress and no tables, only errors.")]
Verbose = Annotated[bool, Option("--verbose", "-v", help="Also print the lines of run.log.")]
Targets = Annotated[
    list[str] | None,
    Option("--target", metavar="T", help="Such as cpu/torch; may be repeated.", autocompletion=complete_target),
]
Reports = Annotated[Path, Option("--reports", metavar="DIR", help="Folder of the run folders.")]
Run = Annotated[
    str | None,
    Argument(metavar="RUN", help="The run folder, or its name; by default the latest.", autocompletion=complete_run),
]


def run_folder(name: str | None, reports: Path) -> "RunFolder":
    """Return the run folder that is called `name` or lies there, by default the latest; raises InvalidInput if none."""
    from shrinkkit.core.run_folder import RunFolder

    runs = {path.parent.name: path.parent for path in reports.glob("*/study.json")}
    if name is None:
        if not runs:
            raise InvalidInput(f"{reports} holds no run. Make one with `shrinkkit run`, or name its folder.")
        # A copied folder may lack its status.json.
        states = {run: next(filter(Path.exists, (run / "status.json", run / "study.json"))) for run in runs.values()}
        name = str(max(states, key=lambda run: states[run].stat().st_mtime))
    folder = RunFolder(name if Path(name).exists() or name not in runs else reports / name)
    if not folder.path.exists():
        remedy = nearest(Path(name).name, runs)
        raise InvalidInput(message(f"`run` must be a run folder, but there is no {name}", remedy=remedy))
    folder.check_is_run()
    return folder


def console(*, stderr: bool = False) -> "Console":
    """Return a terminal or a log, in which text is shown as it is."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


@contextmanager
def monitor(*, as_json: bool, quiet: bool, verbose: bool = False) -> Iterator["LineMonitor"]:
    """Show the progress of a run: a live table in a terminal, lines elsewhere; if `verbose`, the log too."""
    from shrinkkit.pipeline import run_status

    # With --json, standard output is for the result alone.
    out = console(stderr=as_json)
    out.quiet = quiet
    live = out.is_terminal and not out.is_dumb_terminal and not quiet
    with run_status.LiveMonitor(out) if live else run_status.LineMonitor(out) as shown:
        handler = run_status.LogHandler(shown)
        if verbose:
            run_status.LOGGER.addHandler(handler)
            run_status.LOGGER.setLevel(logging.INFO)
        try:
            yield shown
        finally:
            run_status.LOGGER.removeHandler(handler)


def print_sections(sections: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
    """Print rows below titles."""
    for i, (title, rows) in enumerate(sections.items()):
        console().print(f"{'' if i == 0 else chr(10)}{title}", style="bold")
        print_rows(rows)


def print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned columns, of which the last one wraps at the width of a terminal."""
    out = console()
    if out.is_terminal:
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for row in rows:
            grid.add_row(*row)
        out.print(grid, markup=False)
        return
    print("\n".join(lines(rows)))


def lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def print_json(data: Any) -> None:
    """Print plain values as JSON."""
    print(json.dumps(data, indent=1))
