"""One step of a run, in a process of its own: papermill executes a notebook, and what happened is written down.

`python -m shrinkkit.steps REQUEST.json` is what `runs` starts. The request names the notebook, its parameters and the
folders; the answer lands beside it, because after a dead kernel the notebook itself says nothing.
"""

import ast
import contextlib
import json
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from shrinkkit.core import processes
from shrinkkit.errors import InvalidInput, brief, nearest
from shrinkkit.pipeline.parameters import of_type

NOTEBOOK, ANSWER = "notebook.ipynb", "answer.json"


def parameters(notebook: Path) -> dict[str, tuple[str, Any, str]]:
    """Return the parameters of a notebook: annotation, default and comment, by name.

    Raises:
        InvalidInput: The notebook has no cell tagged `parameters`, or a line of it has another form.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise InvalidInput(f"{notebook.name} must have one cell tagged `parameters`, found {len(tagged)}. Tag it.")
    source = "".join(tagged[0]["source"])
    found = {}
    for line, node in zip(source.splitlines(), ast.parse(source).body, strict=False):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value and "#" in line):
            raise InvalidInput(
                f"{notebook.name}: a parameter must read `name: type = default  # comment`, got {line!r}. Rewrite it."
            )
        comment = line.rpartition("#")[2].strip()
        found[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value), comment)
    return found


def check_parameters(notebook: Path, values: Mapping[str, Any]) -> None:
    """Raise unless `values` are parameters of the notebook, each of the type that its cell declares.

    Raises:
        InvalidInput: A name is unknown or a value has another type; all of them are named.
    """
    known = parameters(notebook)
    problems = []
    for name, value in values.items():
        if name not in known:
            problems.append(f"{name!r} is no parameter.{nearest(name, list(known))} There are {', '.join(known)}.")
            continue
        if problem := of_type(name, known[name][0], value):
            problems.append(f"{problem.rstrip('.')} ({known[name][2]}).")
    if problems:
        raise InvalidInput(f"{notebook.name} was not started: " + " ".join(problems))


def execute(request: Mapping[str, Any], folder: Path) -> str:
    """Execute a copy of the requested notebook in `folder` and return why it failed, '' if it did not.

    Args:
        request: `notebook` (path), `parameters`, `title`, and `home` (address of the report, for the page of a step).
        folder: Where the kernel works and the executed notebook goes, as `NOTEBOOK`, saved after every cell. It was
            made for this, so that no file in it can change what the kernel does.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    shutil.copyfile(request["notebook"], folder / NOTEBOOK)
    try:
        # papermill takes braces in a path for a template, so it gets a bare name. The path of a socket must be short.
        with contextlib.chdir(folder), processes.short_folder() as sockets:
            kernel = {"transport": "ipc", "ip": str(sockets / "kernel")}
            papermill.execute_notebook(
                NOTEBOOK,
                NOTEBOOK,
                parameters=dict(request["parameters"]),
                kernel_name="python3",
                language="python",
                progress_bar=False,
                kernel_manager_class=_manager(),
                # Kernels on TCP race for ports when several start at once.
                config=Config({"KernelManager": kernel}),
            )
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


def _manager() -> type:
    """Return a manager of kernels that run by this interpreter; what Jupyter finds by name may be another's."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    options = ("--InteractiveShellApp.ignore_cwd=True", "--InteractiveShellApp.exec_PYTHONSTARTUP=False")
    call = processes.command(
        "ipykernel_launcher", "-f", "{connection_file}", *options, "--HistoryManager.enabled=False"
    )

    class Manager(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=call, display_name="Python 3", language="python")

    return Manager


def main(argv: list[str]) -> int:
    """Execute the request in the file `argv[0]`, write the answer beside it and return the exit status."""
    # The runner stops a step with SIGTERM; as an exception it lets papermill shut its kernel down.
    signal.signal(signal.SIGTERM, _interrupt)
    path = Path(argv[0]).resolve()
    request = json.loads(path.read_text(encoding="utf-8"))
    error = execute(request, path.parent)
    note = _export(request, path.parent) if (path.parent / NOTEBOOK).is_file() else ""
    (path.parent / ANSWER).write_text(json.dumps({"error": error, "note": note}), encoding="utf-8")
    return 1 if error else 0


def _export(request: Mapping[str, Any], folder: Path) -> str:
    """Write the pages of the executed notebook and return why that failed, '' if it did not."""
    try:
        from shrinkkit.report import export

        export.html(folder / NOTEBOOK, folder / "notebook.html", title=request["title"], home=request["home"])
        export.markdown(folder / NOTEBOOK, folder / "notebook.md")
    except Exception as error:  # whatever an exporter meets, the step itself has ended
        traceback.print_exc()
        return f"Its page could not be made: {brief(error)}. See run.log."
    return ""


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _plain(text: str) -> str:
    """Return `text` on one line, without terminal colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
