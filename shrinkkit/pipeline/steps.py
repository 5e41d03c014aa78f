"""One step of a run: papermill executes its notebook in a separate process with a time limit.

`python -m shrinkkit.pipeline.steps REQUEST.json` is that process. The request names the notebook and its parameters;
the answer is a file next to it, because after a dead kernel the notebook itself states nothing.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from shrinkkit import progress
from shrinkkit.core import processes, store, warm
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.errors import brief
from shrinkkit.pipeline.plan import BENCHMARK, REPORT, Planned
from shrinkkit.pipeline.run_status import duration, log

NOTEBOOK, ANSWER, ACTIVITY = "notebook.ipynb", "answer.json", "activity.txt"
IMPORTS = (
    # Notebooks are checked by jsonschema, which would build a grammar of addresses that they do not need: 1.4 s.
    *("-rfc3987_syntax", "shrinkkit.quiet", "papermill", "nbconvert", "ipykernel.kernelapp", "ipykernel.zmqshell"),
    *("ipywidgets", "matplotlib.pyplot", "scipy.stats", "torch.export", "torch.onnx._internal.exporter._core"),
    # The operators that exports to ONNX consist of: 0.7 s a step.
    *("onnx_ir.passes.common", "onnxscript.function_libs.torch_lib.ops", "openvino", "shrinkkit.measure.session"),
    *("shrinkkit.transforms.transform", "shrinkkit.report.export", "shrinkkit.report.layer_profile"),
    *(f"shrinkkit.widgets.{name}" for name in ("browse", "monitor", "pruning", "quantization")),
)
"""What steps import, but for ONNX Runtime, which starts a thread when it is imported, which a fork would lose."""
QUANTIZER = "nncf.quantization"
"""What only steps that time anything import too, so that the first step need not wait for it."""
MEMORY_IMPORTS = ("shrinkkit.measure.peak_memory", "shrinkkit.runtimes.torch.backend")
"""What the process that measures peak memory imports; more would count as memory of the runtime."""
SAVE_EVERY_S, SHUTDOWN_S = 2.0, 2.0
_PHASE = "shrinkkit phase: "
"""Starts a line of a step's standard error that names the section of the notebook which is being executed."""


@dataclass(frozen=True)
class Ended:
    """How a step ended."""

    error: str = ""
    """Why it failed; empty if it did not."""
    note: str = ""
    """Why a step that worked has no page; empty if it has one."""


class WarmStart:
    """The processes that a run's steps are forked from: one for what is timed, one for the rest, one for memory."""

    def __init__(self, steps: Sequence[Planned], threads: int, stack: ExitStack) -> None:
        """Start what the first two kinds of `steps` need, in the background; `stack` stops it."""
        # A report alone needs few of the imports.
        self._kinds = {kind: None for step in steps if step.leaves and warm.AVAILABLE for kind in _kinds(step)}
        self._threads, self._stack = threads, stack
        self._servers: dict[str, Callable[[warm.Tick], str]] = {}
        self._start(*list(self._kinds)[:2])

    def _start(self, *kinds: str) -> None:
        for kind in kinds:
            imports = {"untimed": IMPORTS, "timed": (*IMPORTS, QUANTIZER), "memory": MEMORY_IMPORTS}[kind]
            variables = _variables(self._threads, times=kind != "untimed")
            self._servers[kind] = self._stack.enter_context(warm.server(imports, variables))

    def addresses(self, step: Planned, tick: Callable[[float, str], None]) -> list[str]:
        """Wait for what a step and its measurement of memory are forked from, and return the addresses of both.

        '' stands for one that is to start cold.
        """
        kinds = [kind for kind in _kinds(step) if kind in self._kinds]
        self._start(*(kind for kind in kinds if kind not in self._servers))
        found = [self._servers[kind](lambda seconds: tick(seconds, "importing libraries")) for kind in kinds]
        # Not before, as three imports at a time would take longer than two.
        self._start(*[kind for kind in self._kinds if kind not in self._servers][:1])
        return [*found, "", ""][:2]


def execute(
    notebook: Path,
    step: Planned,
    run: RunFolder,
    *,
    timeout_s: float,
    threads: int,
    tick: Callable[[float, str], None],
    warm_start: WarmStart | None = None,
) -> Ended:
    """Execute a step's notebook in a new process, publish the pages that it left, and return how it ended.

    The notebook works in a new folder inside the run folder. The executed notebook and its page go to the folder's
    `steps`; the pages of the report go to the folder itself. `tick` is called several times a second with the seconds
    that have passed and what is being done: the section of the notebook, the action in it, and the time until the limit
    once half of it is over.
    """
    is_report = step.notebook == REPORT
    address, memory_address = warm_start.addresses(step, tick) if warm_start else ["", ""]
    run.steps.mkdir(exist_ok=True)
    phase = ""

    def on_line(line: str) -> bool:
        nonlocal phase
        if line.startswith(_PHASE):
            phase = line.removeprefix(_PHASE)
            activity.unlink(missing_ok=True)
        return False

    def doing(seconds: float) -> str:
        now = activity.read_text(encoding="utf-8", errors="replace") if activity.is_file() else ""
        left = f"stopped in {duration(timeout_s - seconds)}" if seconds > timeout_s / 2 else ""
        return " · ".join(filter(None, [phase, now, left]))

    with tempfile.TemporaryDirectory(dir=run, prefix=".attempt-") as folder, processes.short_folder() as sockets:
        attempt = Path(folder).resolve()
        activity = attempt / ACTIVITY
        request = {
            "notebook": str(notebook),
            "parameters": dict(step.parameters),
            "title": run.name if is_report else f"{step.name} · {run.name}",
            "home": "" if is_report else "../report.html",
            "warm": address,
        }
        (attempt / "request.json").write_text(json.dumps(request), encoding="utf-8")
        ended = processes.run(
            processes.command("shrinkkit.pipeline.steps", str(attempt / "request.json")),
            limit_s=timeout_s,
            cwd=attempt,
            variables={
                **store.lease_variable(),
                **_variables(threads, times=_times(step)),
                progress.VARIABLE: str(activity),
                warm.VARIABLE: memory_address,
                "JUPYTER_RUNTIME_DIR": str(sockets),
                "IPYTHONDIR": str(sockets / "ipython"),
                # A cache of compiled code would shorten the start that is measured.
                "TORCHINDUCTOR_CACHE_DIR": str(sockets / "compiled"),
            },
            start=partial(warm.start, address) if address else None,
            on_line=on_line,
            tick=lambda seconds: tick(seconds, doing(seconds)),
            patience_s=10.0,
        )
        lines = ended.output.splitlines() + ended.errors.splitlines()
        printed = [line for line in lines if not line.startswith(_PHASE)]
        log(run, "\n".join(printed))
        store.check_lease()
        # Links between the pages are relative to the run folder.
        pages = {".ipynb": run.steps / f"{step.name}.ipynb", ".html": run.steps / f"{step.name}.html"}
        pages |= {".html": run.report, ".md": run.report_markdown} if is_report else {}
        for suffix, path in pages.items():
            if (attempt / f"notebook{suffix}").is_file():
                (attempt / f"notebook{suffix}").replace(path)
        if ended.status is None:
            where = f" during: {doing(0)}" if doing(0) else ""
            return Ended(f"It took longer than {timeout_s:g} s and was stopped{where}. Raise `timeout_s` in the study.")
        if (attempt / ANSWER).is_file():
            answer = Ended(**json.loads((attempt / ANSWER).read_text(encoding="utf-8")))
            # The report is nothing but its page.
            return Ended(answer.error or answer.note) if is_report else answer
        last = next((line for line in reversed(printed) if line.strip()), "see run.log")
        return Ended(f"The step's process ended with status {ended.status} and left no answer: {last}.")


def _kinds(step: Planned) -> list[str]:
    """Return what a step needs to be forked from: by whether it times anything, and for memory."""
    return ["timed" if _times(step) else "untimed", *(["memory"] if step.notebook == BENCHMARK else [])]


def _times(step: Planned) -> bool:
    """Return whether a step times anything, an engine or a variant."""
    return not step.notebook.startswith(("1-", "2-"))


def _variables(threads: int, *, times: bool) -> dict[str, str]:
    """Return the environment variables that libraries read when they are loaded: equal threads everywhere."""
    # Threads that spin for long while they wait make training on a shared machine many times slower. Where anything is
    # timed, an engine or a variant, they stay as users have them.
    patience = {} if times else {"GOMP_SPINCOUNT": "10000"}
    return {
        **patience,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
        "MPLBACKEND": "Agg",
        # torch's own deprecation notices would appear in the middle of a page.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # `quiet` sets it in the process that steps are forked from, which is not the one that profiles.
        "KINETO_LOG_LEVEL": "99",
    }


def execute_notebook(request: Mapping[str, Any], folder: Path) -> str:
    """Execute a copy of the requested notebook in the new folder `folder`; return why it failed, '' if it did not."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    shutil.copyfile(request["notebook"], folder / NOTEBOOK)
    try:
        # papermill takes braces in a path for a template, so it gets a bare name. The path of a socket must be short.
        with contextlib.chdir(folder), processes.short_folder() as sockets:
            # Kernels on TCP race for ports when several start at once. Windows has no such sockets.
            kernel: dict[str, Any] = {"transport": "ipc", "ip": str(sockets / "kernel")} if os.name == "posix" else {}
            # Now and then ipykernel waits for a thread that has ended, and is terminated after half of this.
            kernel["shutdown_wait_time"] = SHUTDOWN_S
            options = {"kernel_name": "python3", "language": "python", "progress_bar": False, "engine_name": _engine()}
            options |= {"kernel_manager_class": _kernel_manager(request["warm"]), "on_cell_start": _print_phase}
            options |= {"config": Config({"KernelManager": kernel}), "parameters": dict(request["parameters"])}
            papermill.execute_notebook(NOTEBOOK, NOTEBOOK, **options)
    except PapermillExecutionError as error:
        return f"{error.ename}: {_plain(error.evalue)} (cell {error.exec_count})"
    except DeadKernelError:
        return "the kernel died, as it does when memory runs out or native code crashes"
    except CellTimeoutError as error:
        return f"a cell ran out of time: {_plain(str(error))}"
    except KeyboardInterrupt:
        return "stopped by the runner"
    except OSError as error:
        return f"the notebook could not be saved: {error.strerror or brief(error)}"
    return ""


def _engine() -> str:
    """Return the name of an engine of papermill that saves the notebook every two seconds and at the end.

    papermill's own saves it twice a cell, which takes long where a notebook has many pictures.
    """
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):  # type: ignore[misc]
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, *arguments: Any, **options: Any) -> None:
            save, saved_s = nb_man.save, time.monotonic()

            def save_sometimes(**details: Any) -> None:
                nonlocal saved_s
                if time.monotonic() - saved_s > SAVE_EVERY_S:
                    save(**details)
                    saved_s = time.monotonic()

            nb_man.save = save_sometimes
            try:
                super().execute_managed_notebook(nb_man, *arguments, **options)
            finally:
                nb_man.save = save

    papermill_engines.register("shrinkkit", Engine)
    return "shrinkkit"


def _print_phase(cell: Mapping[str, Any], cell_index: int) -> None:
    heading = re.match(r"##+ (.+)", cell["source"])
    if cell["cell_type"] == "markdown" and heading:
        print(f"{_PHASE}{heading[1]}", file=sys.stderr, flush=True)


def _kernel_manager(address: str) -> type:
    """Return a manager of kernels that run by this interpreter; Jupyter's kernelspecs may belong to another one.

    They are forked from the process at `address`, or start cold if it is ''.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_client.provisioning.local_provisioner import LocalProvisioner

    options = ["--InteractiveShellApp.ignore_cwd=True", "--InteractiveShellApp.exec_PYTHONSTARTUP=False"]
    # Any other level prints how to connect to a kernel that was forked.
    options += ["--HistoryManager.enabled=False", "--IPKernelApp.log_level=CRITICAL"]
    call = processes.command("ipykernel_launcher", "-f", "{connection_file}", *options)

    class Provisioner(LocalProvisioner):
        async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
            # Without it ipykernel takes itself for one that a person started.
            env = options["env"] | {"JPY_PARENT_PID": str(os.getpid())}
            self.process = process = cast("subprocess.Popen[Any]", warm.start(address, cmd, env=env))
            self.pid = self.pgid = process.pid
            return self.connection_info

    class Manager(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=call, display_name="Python 3", language="python")

        async def _async_pre_start_kernel(self, **options: Any) -> Any:
            if address:
                self.provisioner = Provisioner(parent=self, kernel_spec=self.kernel_spec)
            return await super()._async_pre_start_kernel(**options)

    return Manager


def main(argv: list[str]) -> int:
    """Execute the request in the file `argv[0]`, write the answer next to it and return the exit status."""
    # The runner stops a step with SIGTERM; as an exception it lets papermill shut its kernel down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # As in IMPORTS, for one that starts cold.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    path = Path(argv[0]).resolve()
    request = json.loads(path.read_text(encoding="utf-8"))
    error = execute_notebook(request, path.parent)
    note = _export(request, path.parent) if (path.parent / NOTEBOOK).is_file() else ""
    (path.parent / ANSWER).write_text(json.dumps({"error": error, "note": note}), encoding="utf-8")
    return 1 if error else 0


def _export(request: Mapping[str, Any], folder: Path) -> str:
    """Write the pages of the executed notebook and return why that failed, '' if it did not."""
    try:
        from shrinkkit.report import export

        export.html(folder / NOTEBOOK, folder / "notebook.html", title=request["title"], home=request["home"])
        if not request["home"]:
            export.markdown(folder / NOTEBOOK, folder / "notebook.md")
    except Exception as error:  # the step itself has ended, whatever an exporter raises
        traceback.print_exc()
        return f"Its page could not be made: {brief(error)}. See run.log."
    return ""


def _plain(text: str) -> str:
    """Return `text` on one line, without terminal colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
