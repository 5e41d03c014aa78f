"""A step's process: started, waited for, stopped in time, and its pages put where people look for them."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrinkkit.core import lease, processes
from shrinkkit.pipeline.journal import log
from shrinkkit.pipeline.plan import REPORT
from shrinkkit.pipeline.steps import ANSWER


@dataclass(frozen=True)
class Ended:
    """How a step ended."""

    error: str = ""
    """Why it failed; empty if it did not."""
    note: str = ""
    """Why a step that worked has no page; empty if it has one."""


def execute(
    notebook: Path,
    folder: Path,
    *,
    name: str,
    parameters: Mapping[str, Any],
    timeout_s: float,
    threads: int,
    tick: Callable[[float], None],
) -> Ended:
    """Execute a step's notebook in a process of its own, publish what it left, and return how it ended.

    The notebook works in a new folder inside the run folder. The executed notebook and its page go to the folder's
    `steps`; of the report, the pages go to the folder itself.

    Args:
        notebook: To execute; it is left unchanged.
        folder: The run folder, which this process holds.
        name: The step's name.
        parameters: Of the notebook, already checked.
        timeout_s: Seconds after which it is stopped.
        threads: Of every library, >= 1.
        tick: Called about twice a second with the seconds that have passed.
    """
    reports = notebook.stem == REPORT
    (folder / "steps").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".attempt-") as made, processes.short_folder() as runtime:
        attempt = Path(made).resolve()
        request = {
            "notebook": str(notebook),
            "parameters": dict(parameters),
            "title": folder.name if reports else f"{name} · {folder.name}",
            "home": "" if reports else "../report.html",
        }
        (attempt / "request.json").write_text(json.dumps(request), encoding="utf-8")
        with (attempt / "stderr.txt").open("w+", encoding="utf-8") as stderr:
            child = subprocess.Popen(
                processes.command("shrinkkit.pipeline.steps", str(attempt / "request.json")),
                cwd=attempt,
                env=_environment(threads, runtime, training=notebook.stem.startswith("2-")),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                # Ctrl-C is for the runner alone, which then stops the step in order.
                start_new_session=True,
            )
            timed_out = _wait(child, timeout_s, tick)
            stderr.seek(0)
            said = stderr.read()
            log(folder, said)
        lease.check()
        # Of a step, the page is enough; the report is also there to be pasted.
        for suffix in (".ipynb", ".html", ".md") if reports else (".ipynb", ".html"):
            if (attempt / f"notebook{suffix}").is_file():
                (attempt / f"notebook{suffix}").replace(folder / "steps" / f"{name}{suffix}")
        if reports:
            _publish_report(folder)
        if timed_out:
            return Ended(f"It took longer than {timeout_s:g} s and was stopped. Raise `timeout_s` in the study.")
        if (attempt / ANSWER).is_file():
            answer = Ended(**json.loads((attempt / ANSWER).read_text(encoding="utf-8")))
            # Of the report, the page is all there is.
            return Ended(answer.error or answer.note) if reports else answer
        last = (said.strip().splitlines() or ["see run.log"])[-1]
        return Ended(f"The step's process ended with status {child.returncode} and left no answer: {last}.")


def _wait(child: subprocess.Popen[bytes], timeout_s: float, tick: Callable[[float], None]) -> bool:
    """Wait for `child` and return whether it had to be stopped for time."""
    start = time.monotonic()
    try:
        while True:
            try:
                child.wait(timeout=0.5)
                return False
            except subprocess.TimeoutExpired:
                elapsed = time.monotonic() - start
                tick(elapsed)
                if elapsed > timeout_s:
                    return True
    finally:
        processes.end(child)


def _publish_report(folder: Path) -> None:
    """Put the report where people look for it; its links to the steps are relative to the run folder."""
    for suffix in (".html", ".md"):
        made = folder / "steps" / f"5-report{suffix}"
        if made.is_file():
            made.replace(folder / f"report{suffix}")


def _environment(threads: int, runtime: Path, *, training: bool) -> dict[str, str]:
    """Return the environment of a step: equal threads everywhere, and no start-up files of the user's."""
    count = str(threads)
    # Threads that spin for long while they wait make training on a shared machine many times slower. Where anything is
    # timed, an engine or a variant, they stay as users have them.
    patience = {"GOMP_SPINCOUNT": "10000"} if training else {}
    return (
        processes.environment()
        | lease.environment()
        | patience
        | {
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
            "JUPYTER_RUNTIME_DIR": str(runtime),
            "IPYTHONDIR": str(runtime / "ipython"),
            "MPLBACKEND": "Agg",
            # What was compiled once would start faster than it does where a model is deployed.
            "TORCHINDUCTOR_CACHE_DIR": str(runtime / "inductor"),
            # Notices of deprecation from inside torch would stand in the middle of a page.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
    )
