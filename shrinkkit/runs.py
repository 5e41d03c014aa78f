"""A study from its first notebook to its report: which steps, in which order, and what became of them.

Each step is a notebook in a process of its own. A step whose inputs have not changed is not run again, a step that
fails stops only what needs it, and every run ends in a report.
"""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from shrinkkit import records, steps
from shrinkkit.errors import InvalidInput, StepFailed
from shrinkkit.recipes import TASKS, Recipe, Study, check_patterns, layer_patterns
from shrinkkit.records import Status, Step

PACKAGE = Path(__file__).parent
REPORT_TIMEOUT_S = 600.0
PACKAGES = ("torch", "torch-pruning", "onnx", "onnxruntime", "numpy", "papermill", "nbconvert")


@dataclass(frozen=True)
class Planned:
    """A step to take: its notebook and parameters, the steps it needs, and what it leaves behind."""

    name: str
    notebook: str
    subject: str
    parameters: Mapping[str, Any]
    needs: tuple[str, ...]
    leaves: str
    """The record, relative to the run folder, that proves that the step was taken; empty for the report."""


def notebooks() -> Path:
    """Return the folder of the step notebooks: in the installed package, or beside it in a checkout."""
    inside = PACKAGE / "notebooks"
    return inside if inside.is_dir() else PACKAGE.parent / "notebooks"


def plan(study: Study, *, task: str, threads: int) -> tuple[Planned, ...]:
    """Return the steps of a study in an order in which each comes after what it needs.

    A recipe that prunes and quantizes is two steps with the pruned variant between them, so that the report can say
    what each gave; recipes that prune alike share it.

    Args:
        study: What to do.
        task: The task's name or path, as the notebooks see it from the run folder.
        threads: Intra-op threads for every runtime.
    """
    runtimes = list(dict.fromkeys(t.partition("/")[2] for t in study.targets))
    common = {"task": task, "run": ".", "threads": threads, "seed": study.seed}
    steps_ = [
        Planned("1-baseline", "1-baseline", "baseline", {**common, "runtimes": runtimes}, (), _record("baseline"))
    ]
    variants = {"baseline": "1-baseline"}

    def add(kind: str, variant: str, source: str, section: Mapping[str, Any]) -> None:
        parameters = {**common, "runtimes": runtimes, "variant": variant, **section}
        if kind == "3-quantize":
            parameters["source"] = source
        name = f"{kind}-{variant}"
        steps_.append(Planned(name, kind, variant, parameters, (variants[source],), _record(variant)))
        variants[variant] = name

    pruned = {_key(recipe): recipe.name for recipe in study.recipes if recipe.prune and not recipe.quantize}
    for recipe in sorted(study.recipes, key=lambda r: r.quantize is not None):
        source = "baseline"
        if recipe.prune:
            source = pruned.setdefault(_key(recipe), f"{recipe.name}.pruned")
            if source not in variants:
                add("2-prune", source, "baseline", _section(recipe.prune))
        if recipe.quantize:
            add("3-quantize", recipe.name, source, _section(recipe.quantize))
    for target in study.targets:
        sizes = {"batch_sizes": list(study.batch_sizes), "thread_counts": list(study.thread_counts)}
        parameters = {**common, "target": target, "variants": list(variants), **sizes}
        name = f"4-benchmark-{target.replace('/', '-')}"
        leaves = f"measurements/{target.replace('/', '-')}.json"
        steps_.append(Planned(name, "4-benchmark", target, parameters, ("1-baseline",), leaves))
    steps_.append(Planned("5-report", "5-report", "", {"run": "."}, (), ""))
    return tuple(steps_)


def run(
    study: Study,
    *,
    reports: Path,
    command: str,
    threads: int,
    force: bool = False,
    say: Callable[[str, bool], None],
) -> Path:
    """Take every step of a study and return its run folder; go on where an earlier run stopped.

    Args:
        study: What to do; already checked.
        reports: Folder that holds the run folders.
        command: The command line, for the report.
        threads: Intra-op threads for every runtime.
        force: Take every step again, changed or not.
        say: Called with a line about the progress and whether it is final.

    Raises:
        InvalidInput: A layer pattern matches no layer, or a parameter does not fit its notebook; nothing was started.
        StepFailed: The report itself could not be made.
    """
    fingerprint, layers = _look_at(study.task) if _needs_a_look(study) else ("", ())
    if layers:
        check_patterns(study, layers)
    folder = reports / study.name
    task = study.task if study.task in TASKS else os.path.relpath(study.task, folder)
    planned = plan(study, task=task, threads=threads)
    for step in planned:
        steps.check_parameters(notebooks() / f"{step.notebook}.ipynb", step.parameters)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        # The run folder is passed around: it says nothing of where the study and the task lay.
        kept = study.model_copy(update={"task": task})
        text = kept.model_dump_json(indent=1, exclude={"recipes": {"__all__": {"where"}}})
        records.write_text(folder / "study.json", text + "\n")
        journal = _Journal(folder, command, planned, say)
        fingerprint += _software()
        try:
            for step in planned:
                _take(step, journal, folder, fingerprint, study.timeout_s, threads, force)
        except KeyboardInterrupt:
            journal.close()
            raise
    if journal.step("5-report").state != "done":
        raise StepFailed(f"The report could not be made: {journal.step('5-report').error} See {folder / 'run.log'}.")
    return folder


def rebuild_report(folder: Path, *, say: Callable[[str, bool], None]) -> None:
    """Make the report of a run folder again from what it holds.

    Raises:
        InvalidInput: The folder holds no run.
        StepFailed: The report could not be made.
    """
    if not (folder / "study.json").is_file():
        raise InvalidInput(f"{folder} must be a run folder, with a study.json. Run `shrinkkit run` first.")
    step = Planned("5-report", "5-report", "", {"run": "."}, (), "")
    with _alone(folder):
        error = _execute(
            step, folder, timeout_s=REPORT_TIMEOUT_S, threads=1, tick=lambda s: say(f"5-report · {s:.0f} s", False)
        )
    if error:
        raise StepFailed(f"The report could not be made: {error} See {folder / 'run.log'}.")


class _Journal:
    """The run's status file and log, and what the terminal shows."""

    def __init__(
        self, folder: Path, command: str, planned: tuple[Planned, ...], say: Callable[[str, bool], None]
    ) -> None:
        self.folder = folder
        self.say = say
        before = folder / "status.json"
        known: dict[str, Step] = {}
        # One that cannot be read, or is of an older version, vouches for no step: all are taken again.
        with suppress(InvalidInput):
            known = {s.name: s for s in records.read(before, Status).steps}
        self.steps = {p.name: Step(p.name, p.notebook, p.subject, "pending") for p in planned}
        self.hashes = {name: s.inputs_sha256 for name, s in known.items() if s.state in ("done", "reused")}
        self.durations = {name: s.duration_s for name, s in known.items()}
        self.command = command
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self._write()

    def step(self, name: str) -> Step:
        return self.steps[name]

    def set(self, name: str, **changes: Any) -> None:
        self.steps[name] = step = replace(self.steps[name], **changes)
        self._write()
        place = f"[{list(self.steps).index(name) + 1}/{len(self.steps)}] {name}"
        if step.state == "running":
            self.say(place, False)
            return
        text = f"{place} · {step.state} · {step.duration_s:.1f} s" + (f"\n    {step.error}" if step.error else "")
        self.say(text, True)
        log(self.folder, text)

    def tick(self, name: str, seconds: float) -> None:
        self.say(f"[{list(self.steps).index(name) + 1}/{len(self.steps)}] {name} · {seconds:.0f} s", False)

    def close(self) -> None:
        for name, step in self.steps.items():
            if step.state == "running":
                self.set(name, state="interrupted", error="Interrupted; the same command goes on from here.")

    def _write(self) -> None:
        records.write(self.folder / "status.json", Status(self.command, self.started, tuple(self.steps.values())))


def _take(
    step: Planned, journal: _Journal, folder: Path, fingerprint: str, timeout_s: float, threads: int, force: bool
) -> None:
    missing = [n for n in step.needs if journal.step(n).state not in ("done", "reused")]
    if missing:
        journal.set(step.name, state="skipped", error=f"It needs {missing[0]}, which {journal.step(missing[0]).state}.")
        return
    inputs = _inputs(step, folder, fingerprint)
    complete = step.leaves and (folder / step.leaves).is_file()
    if not force and complete and journal.hashes.get(step.name) == inputs:
        journal.set(step.name, state="reused", duration_s=journal.durations.get(step.name, 0.0), inputs_sha256=inputs)
        return
    journal.set(step.name, state="running")
    if step.leaves:
        (folder / step.leaves).unlink(missing_ok=True)
    start = time.monotonic()
    # However little time a step is given, a run ends in a report.
    limit_s = timeout_s if step.leaves else max(timeout_s, REPORT_TIMEOUT_S)
    error = _execute(step, folder, timeout_s=limit_s, threads=threads, tick=lambda s: journal.tick(step.name, s))
    if not error and step.leaves and not (folder / step.leaves).is_file():
        error = f"The notebook ended without leaving {step.leaves}."
    state = "failed" if error else "done"
    journal.set(step.name, state=state, duration_s=time.monotonic() - start, error=error, inputs_sha256=inputs)


def _execute(step: Planned, folder: Path, *, timeout_s: float, threads: int, tick: Callable[[float], None]) -> str:
    """Execute a step's notebook in a child process, publish what it left, and return why it failed ('' if not)."""
    (folder / "steps").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".attempt-") as attempt_name, _short_folder() as runtime:
        attempt = Path(attempt_name)
        request = {
            "notebook": str(notebooks() / f"{step.notebook}.ipynb"),
            "parameters": dict(step.parameters),
            "cwd": str(folder.resolve()),
            "title": f"{step.name} · {folder.name}" if step.leaves else folder.name,
            "home": "../report.html" if step.leaves else "",
        }
        (attempt / "request.json").write_text(json.dumps(request), encoding="utf-8")
        with (attempt / "stderr.txt").open("w+", encoding="utf-8") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", "shrinkkit.steps", str(attempt.resolve() / "request.json")],
                env=_environment(threads, runtime, training=step.notebook == "2-prune"),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                # Ctrl-C is for the runner alone, which then stops the step in order.
                start_new_session=True,
            )
            timed_out = _wait(child, timeout_s, tick)
            stderr.seek(0)
            log(folder, stderr.read())
        # Of a step, the page is enough; the report is also there to be pasted.
        for suffix in (".ipynb", ".html") if step.leaves else (".ipynb", ".html", ".md"):
            if (attempt / f"notebook{suffix}").is_file():
                (attempt / f"notebook{suffix}").replace(folder / "steps" / f"{step.name}{suffix}")
        if step.notebook == "5-report":
            _publish_report(folder)
        if timed_out:
            return f"It took longer than {timeout_s:g} s and was stopped. Raise `timeout_s` in the study."
        if (attempt / steps.ANSWER).is_file():
            error: str = json.loads((attempt / steps.ANSWER).read_text(encoding="utf-8"))["error"]
            return error or ("" if child.returncode == 0 else "Its notebook could not be exported; see run.log.")
        return f"The step's process ended with status {child.returncode} and left no answer; see run.log."


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
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


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
        os.environ
        | patience
        | {
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
            "JUPYTER_RUNTIME_DIR": str(runtime),
            "IPYTHONDIR": str(runtime / "ipython"),
            "MPLBACKEND": "Agg",
            # Notices of deprecation from inside torch would stand in the middle of a page.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
    )


@contextmanager
def _short_folder() -> Iterator[Path]:
    """A folder for sockets, whose paths must stay below about 100 characters."""
    with tempfile.TemporaryDirectory(prefix="sk-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInput(
                f"{folder} is in use by another run. Wait for it, or give this study another `name`."
            ) from error
        yield


def log(folder: Path, text: str) -> None:
    """Append `text` to the run's log, with the time."""
    if text.strip():
        with (folder / "run.log").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text.rstrip()}\n")


def _needs_a_look(study: Study) -> bool:
    return study.task not in TASKS or any(layer_patterns(recipe) for recipe in study.recipes)


def _look_at(task: str) -> tuple[str, tuple[str, ...]]:
    """Return a task's fingerprint and layer names, from a process that may import torch."""
    found = subprocess.run([sys.executable, "-m", "shrinkkit.tasks", task], capture_output=True, text=True, check=False)
    if found.returncode:
        raise InvalidInput(found.stderr.strip() or f"The task {task!r} could not be loaded.")
    answer = json.loads(found.stdout.splitlines()[-1])
    return answer["fingerprint"], tuple(answer["layers"])


def _software() -> str:
    """Return what a step depends on besides its inputs: this package's code and the versions of those it uses."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".safetensors"):
            digest.update(path.read_bytes())
    versions = [f"{name}={metadata.version(name)}" for name in PACKAGES]
    return digest.hexdigest() + ",".join([sys.version, *versions])


def _inputs(step: Planned, folder: Path, fingerprint: str) -> str:
    """Return the hash of everything that the step's outcome depends on."""
    digest = hashlib.sha256(fingerprint.encode())
    digest.update((notebooks() / f"{step.notebook}.ipynb").read_bytes())
    digest.update(json.dumps(dict(step.parameters), sort_keys=True).encode())
    read = [*step.parameters.get("variants", ()), step.parameters.get("source", "")]
    for variant in filter(None, read):
        path = folder / _record(variant)
        digest.update(path.read_bytes() if path.is_file() else b"missing")
    return digest.hexdigest()


def _record(variant: str) -> str:
    return f"variants/{variant}/variant.json"


def _key(recipe: Recipe) -> str:
    """Return a text that is equal for recipes that prune alike."""
    return json.dumps(_section(recipe.prune), sort_keys=True)


def _section(section: Any) -> dict[str, Any]:
    """Return a recipe's section as plain values, which are the parameters of its notebook."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in section.model_dump(mode="json").items()}
