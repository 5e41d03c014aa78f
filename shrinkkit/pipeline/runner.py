"""The execution of a study, from its first notebook to its report.

Each step is a notebook in a separate process. A step whose inputs have not changed is cached, a step that fails stops
only those that need it, and every run ends in a report.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from shrinkkit.core import machines, processes, run_folder, store
from shrinkkit.core.recipe import BASELINE, CHAPTERS, FOUND, HUB, TASKS, Study, hub_parts, relocated
from shrinkkit.core.run_folder import RunFolder, Step
from shrinkkit.core.search import SearchRecord
from shrinkkit.core.stages import ENTRY_POINTS
from shrinkkit.core.store import PART
from shrinkkit.core.studies import check_patterns, check_unit, read_study
from shrinkkit.core.target import Target
from shrinkkit.core.variant import Variant
from shrinkkit.errors import InvalidInput, StepFailed, brief, nearest, options
from shrinkkit.pipeline import parameters, plan, run_status, steps
from shrinkkit.pipeline.plan import _REPORT, BENCHMARK, PACKAGE, REPORT, ROBUSTNESS, SEARCH, Planned
from shrinkkit.pipeline.run_status import SUCCEEDED, LineMonitor, Monitor, Progress, RunStatus
from shrinkkit.pipeline.steps import WarmStart
from shrinkkit.report import export, index_page
from shrinkkit.results import results
from shrinkkit.results.results import Results
from shrinkkit.runtimes import registry
from shrinkkit.runtimes.spec import not_installed
from shrinkkit.tasks import sources
from shrinkkit.tasks.sources import Inspection

REPORT_TIMEOUT_S, CHECK_TIMEOUT_S = 600.0, 300.0
_UNFINISHED = (".attempt-*", ".making-*", f".*{PART}")


@dataclass(frozen=True)
class PreparedRun:
    """A run whose study, task and targets have passed every check. Nothing has been written yet."""

    run: RunFolder
    steps: tuple[Planned, ...]
    command: str
    """The command line, for the report."""
    threads: int
    timeout_s: float
    fingerprint: str
    """Changes with the task and with the installed software."""
    task_files: Mapping[str, str]
    """Hashes of the files that the task reads."""
    force: bool
    """Whether the cache is ignored."""
    study: Study | None
    """Written to the run folder; None for a run that only measures, which keeps the folder's own."""
    planned: Callable[[Study], tuple[Planned, ...]] = lambda _: ()
    """Returns the steps of the study with the recipes that its search found."""

    def preview(self) -> dict[str, str]:
        """Return by step whether it is `cached` or would `run`, as it does if a step that it reads from has to run."""
        earlier = run_status.succeeded(self.run)
        states: dict[str, str] = {}
        for step in self.steps:
            sources_run = any(states.get(s.name) == "run" for s in self.steps if s.leaves in step.reads)
            cached = not self.force and not sources_run and self._is_cached(step, earlier)
            states[step.name] = "cached" if cached else "run"
        return states

    def execute(self, monitor: Monitor, warm_start: WarmStart | None = None) -> RunFolder:
        """Execute every step that is not cached and return the run folder; raises StepFailed if it has no report.

        Without `warm_start`, the processes that steps are forked from start and end with this run.
        """
        self.run.path.mkdir(parents=True, exist_ok=True)
        with index_page.listed(self.run.path, monitor.message), _exclusive(self.run):
            if self.study:
                write_study(self.run, self.study)
            pending = [step.in_state("pending") for step in self.steps]
            status = RunStatus(self.run, self.command, pending, monitor, partial=self.study is None)
            run_status.log(self.run, "\n".join([self.command, *(self.study.notes if self.study else ())]))
            try:
                states = self.preview()
                with ExitStack() as stack:
                    to_run = [step for step in self.steps if states[step.name] == "run"]
                    warm_start = warm_start or WarmStart(to_run, self.threads, stack)
                    for step in self._steps(status):
                        self._execute_step(step, status, warm_start)
            except KeyboardInterrupt:
                status.interrupt()
                raise
            _check_report(self.run, status[_REPORT.name].error)
        return self.run

    def _steps(self, status: RunStatus) -> Iterator[Planned]:
        """Yield the steps, and after a search those of the recipes that it found in place of what was planned."""
        for step in self.steps:
            yield step
            if step.notebook == SEARCH and self.study and status[step.name].state == "done":
                found = _with_found(self.study, self.run)
                write_study(self.run, found)
                before = self.steps[: self.steps.index(step) + 1]
                rest = [one for one in self.planned(found) if one.name not in {earlier.name for earlier in before}]
                status.plan([one.in_state("pending") for one in (*before, *rest)])
                yield from rest
                return

    def _execute_step(self, step: Planned, status: RunStatus, warm_start: WarmStart) -> None:
        if step.leaves and (error := sources.changed(self.task_files)):
            status.set(step.name, state="failed", error=error)
            return
        if missing := [name for name in step.needs if status[name].state not in SUCCEEDED]:
            status.set(step.name, state="skipped", error=f"It needs {missing[0]}, which {status[missing[0]].state}.")
            return
        if not self.force and self._is_cached(step, status.earlier):
            status.steps[step.name] = status.earlier[step.name]
            status.set(step.name, state="cached")
            return
        inputs, record = self._inputs_sha256(step), self.run.path / step.leaves
        status.set(step.name, state="running", inputs_sha256=inputs)
        if step.leaves and not self._resumes(step, inputs, status.before.get(step.name)):
            record.unlink(missing_ok=True)
        start = time.monotonic()
        # However little time a step is given, a run ends in a report.
        limit_s = self.timeout_s if step.leaves else max(self.timeout_s, REPORT_TIMEOUT_S)
        searches = step.notebook == SEARCH
        with _ended_early(self.run.stop, status.monitor) if searches else nullcontext():
            ended = steps.execute(
                *(step.path, step, self.run),
                # The time of a search is for its trials.
                timeout_s=limit_s + (60 * step.parameters["minutes"] if searches else 0),
                threads=self.threads,
                tick=lambda seconds, phase: status.tick(step.name, seconds, phase),
                warm_start=warm_start,
            )
        error = ended.error
        if not error and step.leaves and not record.is_file():
            error = f"The notebook ended without leaving {step.leaves}."
        if not error and step.leaves and (error := sources.changed(self.task_files)):
            record.unlink()
        changes: dict[str, Any] = {"error": error, "note": ended.note, "duration_s": time.monotonic() - start}
        # What a search or a benchmark saved before it failed is evidence too.
        files = {} if error and step.notebook not in (SEARCH, BENCHMARK) else self.run.step_files(step.leaves)
        status.set(step.name, state="failed" if error else "done", files=files, **changes)

    def _resumes(self, step: Planned, inputs_sha256: str, before: Step | None) -> bool:
        """Return whether a search or benchmark with the same inputs did not end well, so that what it saved is kept."""
        if self.force or before is None or step.notebook not in (SEARCH, BENCHMARK) or before.state in SUCCEEDED:
            return False
        return before.inputs_sha256 == inputs_sha256 and not run_folder.altered(self.run.path, before.files)

    def _is_cached(self, step: Planned, earlier: Mapping[str, Step]) -> bool:
        """Return whether a step ended well with the same inputs and every file that it left is unchanged."""
        known = earlier.get(step.name)
        if not step.leaves or known is None or known.inputs_sha256 != self._inputs_sha256(step):
            return False
        return step.leaves in known.files and not run_folder.altered(self.run.path, known.files)

    def _inputs_sha256(self, step: Planned) -> str:
        """Return the hash of everything that the step's outcome depends on."""
        digest = hashlib.sha256(self.fingerprint.encode())
        digest.update(step.path.read_bytes())
        digest.update(json.dumps(dict(step.parameters), sort_keys=True).encode())
        # Measurements depend on the machine, which the path of the record names.
        digest.update(step.leaves.encode())
        for record in step.reads:
            path = self.run.path / record
            digest.update(path.read_bytes() if path.is_file() else b"missing")
        return digest.hexdigest()


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
    command = f"shrinkkit.run({(study.name if isinstance(study, Study) else str(study))!r})"
    prepared = prepare(chosen, reports=Path(reports), command=command, threads=count, force=force, monitor=monitor)
    return results.load(prepared.execute(monitor).path)


def prepare(
    study: Study, *, reports: Path, command: str, threads: int, monitor: Monitor, force: bool = False
) -> PreparedRun:
    """Check a study and its task, and return the run of all its steps; raises InvalidInput if one breaks a rule."""
    registry.check_targets(study)
    if study.search and (missing := not_installed("optuna", extra="tune")):
        raise InvalidInput(f"A search needs Optuna, but {missing}.")
    for note in study.notes:
        monitor.message(note)
    run = RunFolder(reports / study.name)
    monitor.message(f"mode {study.mode}: {run.report} will report {CHAPTERS[study.mode]}")
    export.templates()
    run.check_kinds()
    above = next(path for path in (run.path, *run.path.absolute().parents) if path.exists())
    if not above.is_dir():
        raise InvalidInput(f"`reports` must be a folder for run folders, but {above} is a file. Name another one.")
    inspection = _check_task(study, study.task, monitor)
    if inspection.layers:
        check_patterns(study, inspection.layers)
    check_unit(study, inspection.scores)
    task = _relative_task(run, study.task)

    def planned(study: Study, own: Sequence[str] = ()) -> tuple[Planned, ...]:
        return _checked(plan.plan(study, task=task, threads=threads, own=own))

    steps = planned(study)
    inputs = (inspection.fingerprint + _software(), inspection.files)
    # The run folder is passed on, so it must not tell where the study and the task lay.
    written = study.model_copy(update={"task": relocated(task, lambda path: path.removeprefix(f"..{os.sep}"))})
    options: dict[str, Any] = {"force": force, "study": written, "planned": planned}
    prepared = PreparedRun(run, steps, command, threads, study.timeout_s, *inputs, **options)
    preview = prepared.preview()
    if preview.get(SEARCH) == "cached":
        study, written = (_with_found(one, run) for one in (study, written))
    if preview[prepared.steps[0].name] == "cached":
        # The machine that made the cached baseline stays the run's own.
        own = machines.names(store.read(run.variant_record(BASELINE), Variant).environment)
        return replace(prepared, steps=planned(study, own), study=written, planned=partial(planned, own=own))
    return prepared


def _with_found(study: Study, run: RunFolder) -> Study:
    """Return a study with the recipes that its search found in a run folder, besides its own."""
    found = store.read(run.search, SearchRecord).recipes()
    own = [recipe for recipe in study.recipes if recipe.name not in FOUND]
    return study.model_copy(update={"recipes": (*own, *found)})


def write_study(run: RunFolder, study: Study) -> None:
    """Write a study into a run folder, without where its recipes stood."""
    text = study.model_dump_json(indent=1, exclude={"recipes": {"__all__": {"where"}}})
    store.write_text(run.study, text + "\n")


def prepare_benchmark(
    folder: Path,
    *,
    targets: Sequence[str],
    command: str,
    threads: int | None,
    monitor: Monitor,
    task: str | None = None,
    effort: str | None = None,
    force: bool = False,
) -> PreparedRun:
    """Check a run folder, and return the run of the steps that measure its variants on this machine and report them.

    The variants and the measurements of other machines stay as they are. Without `targets`, those of the study that can
    run here are measured. A task's file that the study in the folder names is run only if it is passed as `task`.
    Raises InvalidInput if the folder has no variants, its task is not available, or a target cannot be measured.
    """
    export.templates()
    run = RunFolder(folder)
    run.check_kinds()
    study, baseline = _read_run(run)
    task = _trusted_task(run, study.task, task)
    chosen = _measurable(study, baseline, targets, monitor)
    study = study.model_copy(update={"task": task, "targets": chosen, "effort": effort or study.effort})
    threads = threads or study.threads or machines.cores()
    inspection = _check_task(study, task, monitor)
    own = machines.names(baseline.environment)
    whole = plan.plan(study, task=_relative_task(run, task), threads=threads, own=own)
    steps = _checked(replace(s, needs=()) for s in whole if s.notebook in (BENCHMARK, ROBUSTNESS, REPORT))
    inputs = (inspection.fingerprint + _software(), inspection.files)
    return PreparedRun(run, steps, command, threads, study.timeout_s, *inputs, force=force, study=None)


def rebuild_report(folder: Path, *, monitor: Monitor) -> None:
    """Make the report of a run folder again; raises InvalidInput if it holds no run, StepFailed if that fails."""
    run = RunFolder(folder)
    run.check_is_run()
    export.templates()
    run.check_kinds()
    start, step = time.monotonic(), _REPORT.in_state("running")

    def tick(seconds: float, phase: str, **changes: Any) -> None:
        changed = replace(step, duration_s=seconds, **changes)
        monitor.step(Progress((changed,), changed, phase))

    with index_page.listed(folder, monitor.message), _exclusive(run):
        ended = steps.execute(_REPORT.path, _REPORT, run, timeout_s=REPORT_TIMEOUT_S, threads=1, tick=tick)
        tick(time.monotonic() - start, "", state="failed" if ended.error else "done", error=ended.error)
        _check_report(run, ended.error)
        run_status.record_files(run, step.name, run.step_files(""))


def _check_report(run: RunFolder, error: str) -> None:
    if error:
        raise StepFailed(f"The report could not be made: {error} See {run.log}.")


def _checked(planned: Iterable[Planned]) -> tuple[Planned, ...]:
    planned = tuple(planned)
    for step in planned:
        parameters.check_step(step.path, step.parameters)
    return planned


def _read_run(run: RunFolder) -> tuple[Study, Variant]:
    """Return the study of a run folder, and the record of its baseline."""
    run.check_is_run()
    record = run.variant_record(BASELINE)
    if not record.is_file():
        raise InvalidInput(
            f"{run.path} must hold variants to measure, but there is no {run.relative(record)}. Make them with "
            "`shrinkkit run`, or copy the folder `variants` of the run here as well."
        )
    if not run.study.is_file():
        raise InvalidInput(
            f"{run.path} must have a study.json, and notebooks write it with the first variant of a recipe. Run "
            "2-prune, 2-train or 3-quantize with this folder as `run`."
        )
    try:
        study = Study.model_validate_json(run.study.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        text = f"{run.study} cannot be read: {brief(error)}. Copy it again, or run the study again."
        raise InvalidInput(text) from error
    return study, store.read(record, Variant)


def _trusted_task(run: RunFolder, named: str, given: str | None) -> str:
    """Return the task to run: the one passed, or a bundled one that the study names; a file must be passed."""
    if given is None and named not in TASKS:
        raise InvalidInput(
            f"The task of this run is the file {named} (relative to {run.path}). A folder that was copied here may "
            "name any file, so pass it yourself if you trust it: `--task FILE`."
        )
    task = given or named
    paths = [path for path in hub_parts(task) if path] if task.startswith(HUB) else [task]
    if task not in TASKS and (missing := [path for path in paths if not Path(path).exists()]):
        raise InvalidInput(
            f"`--task` must be a bundled task, a Python file, or hf:PATH?data=FILE, but there is no {missing[0]}. Copy "
            "it from the machine that made the run, with the modules and the data that it reads."
        )
    return task if task in TASKS else relocated(task, os.path.abspath)


def _relative_task(run: RunFolder, task: str) -> str:
    """Return a task's name, or its path relative to the folders inside the run folder in which notebooks work."""
    return relocated(task, lambda path: os.path.relpath(os.path.abspath(path), RunFolder(run.path.resolve()).steps))


def _measurable(study: Study, baseline: Variant, targets: Sequence[str], monitor: Monitor) -> tuple[str, ...]:
    """Return which of `targets`, or else of the study's targets, are to be measured here."""
    reasons = registry.available()
    if unknown := [target for target in targets if target not in reasons]:
        remedy = nearest(unknown[0], list(reasons))
        raise InvalidInput(f"`target` must be {options(list(reasons))}, got {unknown[0]!r}.{remedy}")
    chosen = tuple(dict.fromkeys(targets or study.targets))
    runtimes = [*(file.runtime for file in baseline.files), *baseline.refusals]
    for target in chosen:
        if Target.parse(target).runtime not in runtimes:
            text = f"`target` names {target!r}, but the variants were made for {' and '.join(runtimes)} only."
            raise InvalidInput(f"{text} Add the target to the study and run it where they are made.")
    missing = [f"{target} cannot run here: {reasons[target]}." for target in chosen if reasons[target]]
    if missing and (targets or len(missing) == len(chosen)):
        raise InvalidInput(" ".join(missing))
    for line in missing:
        monitor.message(f"left out: {line}")
    return tuple(target for target in chosen if not reasons[target])


@contextmanager
def _exclusive(run: RunFolder) -> Iterator[None]:
    """Hold the run folder for this process, and remove what killed runs left unfinished."""
    with store.hold(run.path):
        for path in [p for pattern in _UNFINISHED for p in run.path.rglob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


@contextmanager
def _ended_early(stop: Path, monitor: Monitor) -> Iterator[None]:
    """Have the first Ctrl-C end a search with its best, by the file `stop`; the second one interrupts the run."""

    def end(number: int, frame: Any) -> None:
        if stop.exists():
            raise KeyboardInterrupt
        stop.touch()
        monitor.message("The search ends with its best after this trial. Ctrl-C again interrupts the run.")

    stop.unlink(missing_ok=True)
    before = signal.signal(signal.SIGINT, end) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        if before:
            signal.signal(signal.SIGINT, before)
        stop.unlink(missing_ok=True)


def _check_task(study: Study, task: str, monitor: Monitor) -> Inspection:
    """Return what a study needs to know of its task, from a process that may import torch; raises InvalidInput.

    It works in an empty folder, and has the time of a step, but at most five minutes unless the study sets it.
    """
    if study.task in TASKS and not any(recipe.patterns() for recipe in study.recipes):
        return Inspection()
    limit_s = study.timeout_s if "timeout_s" in study.model_fields_set else min(study.timeout_s, CHECK_TIMEOUT_S)

    def tick(seconds: float) -> None:
        monitor.activity(f"loading and checking {task} · {seconds:.0f} s")

    with tempfile.TemporaryDirectory() as empty:
        call = processes.command("shrinkkit.tasks.loader", task)
        ended = processes.run(call, limit_s=limit_s, cwd=Path(empty), tick=tick)
    if ended.status is None:
        text = f"The task {task} must load and pass its checks within {limit_s:g} s, and was stopped."
        raise InvalidInput(f"{text} Load weights that are trained already, or raise `timeout_s` in the study.")
    try:
        answer = json.loads(ended.output)
    except ValueError as error:
        last = ended.errors.strip().rpartition("\n")[2]
        raise InvalidInput(
            f"The task {task} must not end the process that loads it, but that ended with status {ended.status}"
            f"{f' after {last!r:.200}' if last else ''}. Raise an error instead of calling `os._exit`; below 0, the "
            "status is the signal of a crash or of too little memory."
        ) from error
    if "error" in answer:
        raise InvalidInput(answer["error"])
    return Inspection(**answer)


def _software() -> str:
    """Return the hash of this package's code, and the versions of Python and of the packages that it uses."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".safetensors"):
            digest.update(path.read_bytes())
    # Of two distributions of a name, the first on the path is imported.
    installed = {distribution.name: distribution.version for distribution in reversed(list(metadata.distributions()))}
    transforms = {entry.dist.name for entry in metadata.entry_points(group=ENTRY_POINTS) if entry.dist}
    versions = [f"{name}={installed.get(name)}" for name in (*registry.packages(), *sorted(transforms))]
    return digest.hexdigest() + ",".join([sys.version, *versions])
