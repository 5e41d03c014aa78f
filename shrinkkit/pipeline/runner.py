"""A study from its first notebook to its report: which steps, in which order, and what became of them.

Each step is a notebook in a process of its own. A step whose inputs have not changed is not run again, a step that
fails stops only what needs it, and every run ends in a report.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from shrinkkit.core import lease, machines, processes, run_folder, store
from shrinkkit.core.machines import cores
from shrinkkit.core.recipe import TASKS, Study
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.status import Step
from shrinkkit.core.store import PART
from shrinkkit.core.studies import check_patterns, check_unit
from shrinkkit.core.target import Target
from shrinkkit.core.variant import Variant
from shrinkkit.errors import InvalidInput, StepFailed, brief, nearest, options
from shrinkkit.pipeline import execution, plan, steps, watchdog
from shrinkkit.pipeline.execution import Ended
from shrinkkit.pipeline.journal import Journal, done, keep, log
from shrinkkit.pipeline.plan import _REPORT, PACKAGE, Planned
from shrinkkit.report import export, index_page
from shrinkkit.runtimes.specs import available
from shrinkkit.tasks import sources
from shrinkkit.tasks.sources import Look

REPORT_TIMEOUT_S, LOOK_TIMEOUT_S = 600.0, 300.0
_UNFINISHED = (".attempt-*", ".making-*", f".*{PART}")
PACKAGES = (
    *("torch", "torch-pruning", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf"),
    *("numpy", "papermill", "nbconvert"),
)


def run(
    study: Study,
    *,
    reports: Path,
    command: str,
    threads: int,
    force: bool = False,
    say: Callable[[str, bool], None],
) -> Path:
    """Take every step of a study and return its run folder; go on where an earlier run stopped. See also `benchmark`.

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
    export.templates()
    folder = reports / study.name
    RunFolder(folder).check_kinds()
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise InvalidInput(f"`reports` must be a folder for run folders, but {above} is a file. Name another one.")
    seen = _look_at(study, study.task, say)
    if seen.layers:
        check_patterns(study, seen.layers)
    check_unit(study, seen.scores)
    task = _seen_from_inside(folder, study.task)
    fingerprint = seen.fingerprint + _software()
    planned = plan.plan(study, task=task, threads=threads)
    # Of variants that are kept, the run's own machine stays the one that made them.
    if not force and _unchanged(planned[0], folder, done(folder), _inputs(planned[0], folder, fingerprint)):
        own = machines.names(store.read(folder / plan._record("baseline"), Variant).environment)
        planned = plan.plan(study, task=task, threads=threads, own=own)
    for step in planned:
        steps.check_parameters(plan.notebooks() / f"{step.notebook}.ipynb", step.parameters)
    folder.mkdir(parents=True, exist_ok=True)
    with index_page.listed(folder, say), _alone(folder):
        # The run folder is passed around: it says nothing of where the study and the task lay.
        kept = study.model_copy(update={"task": task.removeprefix(f"..{os.sep}")})
        text = kept.model_dump_json(indent=1, exclude={"recipes": {"__all__": {"where"}}})
        store.write_text(RunFolder(folder).study, text + "\n")
        journal = Journal(folder, command, _pending(planned), say)
        _take_all(planned, journal, folder, fingerprint, study.timeout_s, threads, force, seen.files)
    return folder


def benchmark(
    folder: Path,
    *,
    targets: Sequence[str],
    command: str,
    threads: int | None,
    task: str | None = None,
    force: bool = False,
    say: Callable[[str, bool], None],
) -> None:
    """Measure the variants of a run folder on this machine, whichever made them, and make its report again.

    The variants stay as they are, and so does what other machines measured. See `run`, which also makes the variants.

    Args:
        folder: The run folder, or a copy of it.
        targets: Where to measure; empty takes those of the study that this machine can run.
        command: The command line, for the report of a folder that has none.
        threads: Intra-op threads for every runtime; None takes the study's, or else every core.
        task: The task: a bundled one's name, or the path of its file. The study in the folder says which one it was,
            but a file that is named there is not run unless it is passed here.
        force: Measure again, whatever changed.
        say: Called with a line about the progress and whether it is final.

    Raises:
        InvalidInput: The folder has no variants, its task is not here, or a target cannot be measured; nothing was
            started.
        StepFailed: The report itself could not be made.
    """
    export.templates()
    RunFolder(folder).check_kinds()
    study, baseline = _kept(folder)
    task = _own_task(folder, study.task, task)
    study = study.model_copy(update={"task": task})
    chosen = _measurable(study, baseline, targets, say)
    study = study.model_copy(update={"targets": chosen})
    threads = threads or study.threads or cores()
    seen = _look_at(study, task, say)
    own = machines.names(baseline.environment)
    whole = plan.plan(study, task=_seen_from_inside(folder, task), threads=threads, own=own)
    planned = tuple(replace(step, needs=()) for step in whole if step.notebook in ("4-benchmark", _REPORT.notebook))
    for step in planned:
        steps.check_parameters(plan.notebooks() / f"{step.notebook}.ipynb", step.parameters)
    with index_page.listed(folder, say), _alone(folder):
        journal = Journal(folder, command, _pending(planned), say, only=True)
        log(folder, f"{command} on {', '.join(dict.fromkeys(machines.this_machine(Target.parse(t)) for t in chosen))}")
        _take_all(planned, journal, folder, seen.fingerprint + _software(), study.timeout_s, threads, force, seen.files)


def rebuild_report(folder: Path, *, say: Callable[[str, bool], None]) -> None:
    """Make the report of a run folder again from what it holds.

    Raises:
        InvalidInput: The folder holds no run.
        StepFailed: The report could not be made.
    """
    RunFolder(folder).check_is_run()
    export.templates()
    RunFolder(folder).check_kinds()
    with index_page.listed(folder, say), _alone(folder):
        ended = _execute(_REPORT, folder, REPORT_TIMEOUT_S, 1, lambda s: say(f"{_REPORT.name} · {s:.0f} s", False))
        if ended.error:
            raise StepFailed(f"The report could not be made: {ended.error} See {RunFolder(folder).log}.")
        keep(folder, _REPORT.name, RunFolder(folder).step_files(""))


def _kept(folder: Path) -> tuple[Study, Variant]:
    """Return the study of a run folder, and the record of its baseline, which everything is measured beside."""
    RunFolder(folder).check_is_run()
    path = RunFolder(folder).study
    if not (folder / plan._record("baseline")).is_file():
        raise InvalidInput(
            f"{folder} must hold variants to measure, but there is no {plan._record('baseline')}. Make them with "
            "`shrinkkit run`, or copy the folder `variants` of the run here as well."
        )
    try:
        study = Study.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read: {brief(error)}. Copy it again, or run the study again.") from error
    return study, store.read(folder / plan._record("baseline"), Variant)


def _own_task(folder: Path, named: str, given: str | None) -> str:
    """Return the task to run: what the user gave, or a bundled one that the study names, but no file that it names.

    Raises:
        InvalidInput: A file has to be given, or what was given is no task.
    """
    if given is None and named not in TASKS:
        raise InvalidInput(
            f"The task of this run is the file {named} (relative to {folder}). A folder that was copied here may name "
            "any file, so pass it yourself if you trust it: `--task FILE`."
        )
    task = given or named
    if task in TASKS:
        return task
    if not Path(task).is_file():
        raise InvalidInput(
            f"`--task` must be a bundled task or a Python file, but there is no {task}. Copy that file from the "
            "machine that made the run, with the modules and the data that it reads."
        )
    return os.path.abspath(task)


def _seen_from_inside(folder: Path, task: str) -> str:
    """Return a task's name or path as a notebook sees it, which works in a folder inside the run folder."""
    return task if task in TASKS else os.path.relpath(os.path.abspath(task), RunFolder(folder.resolve()).steps)


def _measurable(
    study: Study, baseline: Variant, targets: Sequence[str], say: Callable[[str, bool], None]
) -> tuple[str, ...]:
    """Return which of `targets`, or else of the study's targets, are to be measured here."""
    can = available()
    if unknown := [target for target in targets if target not in can]:
        remedy = nearest(unknown[0], list(can))
        raise InvalidInput(f"`target` must be {options(list(can))}, got {unknown[0]!r}.{remedy}")
    chosen = tuple(dict.fromkeys(targets or study.targets))
    made = [*(file.runtime for file in baseline.files), *baseline.refusals]
    for target in chosen:
        if Target.parse(target).runtime not in made:
            raise InvalidInput(
                f"`target` names {target!r}, but the variants were made for {' and '.join(made)} only. Add the target "
                "to the study and run it where they are made."
            )
    missing = [f"{target} cannot run here: {can[target]}." for target in chosen if can[target]]
    if missing and (targets or len(missing) == len(chosen)):
        raise InvalidInput(" ".join(missing))
    for line in missing:
        say(f"left out: {line}", True)
    return tuple(target for target in chosen if not can[target])


def _pending(planned: Sequence[Planned]) -> list[Step]:
    return [Step(step.name, step.notebook, step.subject, "pending") for step in planned]


def _take_all(
    planned: Sequence[Planned],
    journal: Journal,
    folder: Path,
    fingerprint: str,
    timeout_s: float,
    threads: int,
    force: bool,
    files: Mapping[str, str],
) -> None:
    try:
        for step in planned:
            if step.leaves and (error := sources.changed(files)):
                journal.set(step.name, state="failed", error=error)
                continue
            _take(step, journal, folder, fingerprint, timeout_s, threads, force)
            if step.leaves and journal.step(step.name).state == "done" and (error := sources.changed(files)):
                (folder / step.leaves).unlink()
                journal.set(step.name, state="failed", error=error)
    except KeyboardInterrupt:
        journal.close()
        raise
    report = journal.step(_REPORT.name)
    if report.state != "done":
        raise StepFailed(f"The report could not be made: {report.error} See {RunFolder(folder).log}.")


def _take(
    step: Planned, journal: Journal, folder: Path, fingerprint: str, timeout_s: float, threads: int, force: bool
) -> None:
    missing = [n for n in step.needs if journal.step(n).state not in ("done", "reused")]
    if missing:
        journal.set(step.name, state="skipped", error=f"It needs {missing[0]}, which {journal.step(missing[0]).state}.")
        return
    inputs = _inputs(step, folder, fingerprint)
    if not force and _unchanged(step, folder, journal.done, inputs):
        journal.steps[step.name] = journal.done[step.name]
        journal.set(step.name, state="reused")
        return
    journal.set(step.name, state="running")
    if step.leaves:
        (folder / step.leaves).unlink(missing_ok=True)
    start = time.monotonic()
    # However little time a step is given, a run ends in a report.
    limit_s = timeout_s if step.leaves else max(timeout_s, REPORT_TIMEOUT_S)
    ended = _execute(step, folder, limit_s, threads, lambda s: journal.tick(step.name, s))
    error = ended.error
    if not error and step.leaves and not (folder / step.leaves).is_file():
        error = f"The notebook ended without leaving {step.leaves}."
    changes = {"duration_s": time.monotonic() - start, "inputs_sha256": inputs, "note": ended.note}
    if error:
        journal.set(step.name, state="failed", error=error, **changes)
    else:
        journal.set(step.name, state="done", files=RunFolder(folder).step_files(step.leaves), **changes)


def _unchanged(step: Planned, folder: Path, before: Mapping[str, Step], inputs: str) -> bool:
    """Return whether a step was taken before, by the same `inputs`, and every file that it left is as it was."""
    known = before.get(step.name)
    if not step.leaves or known is None or known.inputs_sha256 != inputs:
        return False
    return step.leaves in known.files and not run_folder.altered(folder, known.files)


def _execute(step: Planned, folder: Path, timeout_s: float, threads: int, tick: Callable[[float], None]) -> Ended:
    return execution.execute(
        plan.notebooks() / f"{step.notebook}.ipynb",
        folder,
        name=step.name,
        parameters=step.parameters,
        timeout_s=timeout_s,
        threads=threads,
        tick=tick,
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process, and remove what killed runs left unfinished."""
    with lease.hold(folder):
        for path in [p for pattern in _UNFINISHED for p in folder.rglob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def _needs_a_look(study: Study) -> bool:
    return study.task not in TASKS or any(recipe.patterns() for recipe in study.recipes)


def _look_at(study: Study, task: str, say: Callable[[str, bool], None]) -> Look:
    """Return what a study needs to know of its task, from a process that may import torch.

    It works in an empty folder, as no step works in this one, and has the time of a step, but no more than five minutes
    unless the study says so.

    Raises:
        InvalidInput: The task breaks a rule, ends its process, or takes too long.
    """
    if not _needs_a_look(study):
        return Look()
    limit_s = study.timeout_s if "timeout_s" in study.model_fields_set else min(study.timeout_s, LOOK_TIMEOUT_S)
    with tempfile.TemporaryDirectory() as empty:
        ended = watchdog.run(
            processes.command("shrinkkit.tasks.loader", task),
            limit_s=limit_s,
            cwd=empty,
            env=processes.environment(),
            tick=lambda s: say(f"loading and checking {task} \N{MIDDLE DOT} {s:.0f} s", False),
        )
    if ended.status is None:
        raise InvalidInput(
            f"The task {task} must load and pass its checks within {limit_s:g} s, and was stopped. Load weights that "
            "are trained already, or raise `timeout_s` in the study."
        )
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
    return Look(**answer)


def _software() -> str:
    """Return what a step depends on besides its inputs: this package's code and the versions of those it uses."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".safetensors"):
            digest.update(path.read_bytes())
    installed = {one.name: one.version for one in metadata.distributions()}
    versions = [f"{name}={installed.get(name)}" for name in PACKAGES]
    return digest.hexdigest() + ",".join([sys.version, *versions])


def _inputs(step: Planned, folder: Path, fingerprint: str) -> str:
    """Return the hash of everything that the step's outcome depends on."""
    digest = hashlib.sha256(fingerprint.encode())
    digest.update((plan.notebooks() / f"{step.notebook}.ipynb").read_bytes())
    digest.update(json.dumps(dict(step.parameters), sort_keys=True).encode())
    # What is measured depends on the machine, which the name of the record tells.
    digest.update(step.leaves.encode())
    for path in (folder / record for record in step.reads):
        digest.update(path.read_bytes() if path.is_file() else b"missing")
    return digest.hexdigest()
