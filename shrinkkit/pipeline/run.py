"""A whole study, run from Python."""

import os
from pathlib import Path

from rich.console import Console

from shrinkkit.core import machines
from shrinkkit.core.recipe import Study
from shrinkkit.core.studies import read_study
from shrinkkit.pipeline import runner
from shrinkkit.pipeline.run_status import Monitor
from shrinkkit.pipeline.terminal import LineMonitor
from shrinkkit.results import results
from shrinkkit.results.results import Results


def run(
    study: Study | str | os.PathLike[str],
    *,
    reports: str | os.PathLike[str] = "reports",
    threads: int | None = None,
    force: bool = False,
    quiet: bool = False,
) -> Results:
    """Compress a task by a study's recipes, benchmark every variant on this machine, and write the report.

    Every step is a notebook in a separate process; steps whose inputs have not changed since the last run are
    cached. The same as `shrinkkit run` on the command line. To compress one model in memory, without files, see
    `compress`.

    Args:
        study: A study, the path of its YAML file, or the name of a built-in one, such as `digits-cnn`.
        reports: Folder for run folders; this one is called as the study.
        threads: Intra-op threads, >= 1; None takes the study's, or else every core that this process may use.
        force: Run every step, cached or not.
        quiet: Print no progress.

    Returns:
        The rows, measurements and notes of the run folder. Failed steps are rows with their reason, not errors.

    Raises:
        InvalidInput: The study, its task's layers or an argument breaks a rule; nothing was started.
        InvalidTask: The task breaks a rule; nothing was started.
        StepFailed: The report could not be written.
    """
    chosen = study if isinstance(study, Study) else read_study(study)
    count = threads or chosen.threads or machines.cores()
    machines.check_threads(count, *chosen.thread_counts)
    monitor = Monitor() if quiet else LineMonitor(Console(markup=False, highlight=False, emoji=False))
    prepared = runner.prepare(
        chosen,
        reports=Path(reports),
        command=f"shrinkkit.run({str(study) if not isinstance(study, Study) else study.name!r})",
        threads=count,
        force=force,
        monitor=monitor,
    )
    return results.load(prepared.execute(monitor).path)
