"""The checks of a variant's folder, which `verification.verify` runs as `python -m shrinkkit.measure.verify`.

The folder needs neither its run nor task or data. For the benchmark of a whole run, with accuracy, see `session`.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from shrinkkit.core import machines, run_folder
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.run_folder import CARD, RECORD
from shrinkkit.core.target import Target
from shrinkkit.core.variant import ModelFile, Variant
from shrinkkit.display import formats
from shrinkkit.errors import InvalidInput, ModelFileError, ShrinkkitError, Unsupported, brief
from shrinkkit.measure import benchmark, verification
from shrinkkit.measure.benchmark import TimedModel
from shrinkkit.measure.timing import Protocol
from shrinkkit.measure.verification import DAMAGED, DIFFERS, FAILS, NO_FILE, NOT_HERE, OK, Finding, Verification
from shrinkkit.progress import Progress, no_progress
from shrinkkit.results import cards
from shrinkkit.results.cards import Card
from shrinkkit.runtimes import files, registry
from shrinkkit.runtimes.base import Loaded
from shrinkkit.tasks.modules import Example
from shrinkkit.transforms import variants
from shrinkkit.transforms.variants import REFERENCE

Ran = files.Verification
_COPY_AGAIN = "Copy the folder again from its source."


def check(
    folder: Path,
    *,
    only: Sequence[str] = (),
    threads: int = 0,
    seconds: float = 4.0,
    failed: Mapping[str, str] = MappingProxyType({}),
    progress: Progress = no_progress,
) -> Verification:
    """Verify a variant's folder in this process, without a time limit; see `verification.verify`.

    Every file's hash is compared with `variant.json` and the model card, also if its runtime is missing. A file is
    timed for `seconds`, a slow one for three times that. Targets in `failed` are not tried, for the reason given.
    `progress` is called before a file is loaded, and again before it is timed.
    """
    if not (folder / RECORD).is_file():
        text = f"`folder` must be a variant's folder, with a {RECORD}, got {str(folder)!r}."
        raise InvalidInput(f"{text} Pass one like reports/digits-cnn/variants/static-int8.")
    if unknown := [name for name in only if name not in registry.targets()]:
        raise InvalidInput(f"A target must be one of {', '.join(registry.targets())}, got {unknown[0]!r}.")
    variant = variants.read(folder)
    card, problems = None, []
    try:
        card = cards.read(folder)
    except InvalidInput as error:
        problems.append(str(error))
    problems += _contradictions(folder, variant, card)
    notes = [] if card or problems else [f"There is no {CARD}, so there is no report to compare with."]
    baseline = folder.resolve().parent / BASELINE
    if folder.resolve() != baseline and not (baseline / RECORD).is_file():
        notes.append("There is no folder `../baseline`, so each file was timed alone, and there is no speed-up.")
    threads_before = torch.get_num_threads()
    try:
        threads = registry.use_threads(threads)
        made = [file.runtime for file in variant.files]
        refused = [str(Target("cpu", runtime)) for runtime in variant.refusals]
        here = [name for name in registry.targets() if Target.parse(name).runtime in made or name in refused]
        targets = only or here
        findings: list[Finding] = []
        for name in targets:
            start = partial(progress, len(findings), len(targets), name)
            start()
            checked = _Check(folder, variant, card, baseline, threads, seconds, start)
            findings.append(checked.finding(Target.parse(name), failed.get(name, "")))
        verified = verification.is_verified(findings, problems)
        environment = machines.environment(threads, packages=registry.packages())
        lists = (tuple(findings), tuple(problems), tuple(notes))
        return Verification(variant.name, verified, threads, environment, *lists)
    finally:
        torch.set_num_threads(threads_before)


@dataclass(frozen=True)
class _Check:
    """The check of one variant on this machine."""

    folder: Path
    variant: Variant
    card: Card | None
    baseline: Path
    """Folder of the baseline, if it exists."""
    threads: int
    seconds: float
    before_timing: Callable[[], None]

    def finding(self, target: Target, failure: str) -> Finding:
        """Return the check of the target's file, which is not run if `failure` names a failure of an earlier try."""
        file = _file(self.variant, target)
        finding = Finding(str(target), file.path if file else "", OK)
        try:
            inputs, ran = _run(self.folder, self.variant, target, self.threads, failure)
        except _Unusable as error:
            return replace(finding, state=error.state, why=str(error))
        on_integers = self.variant.precision.endswith("int8") and target.device == "cpu"
        path = self.folder / finding.file
        saturated = benchmark.saturated(path, target, inputs, self.threads) if on_integers else ()
        finding = replace(finding, saturated=saturated, notes=benchmark.saturation(saturated))
        finding = replace(finding, max_relative_error=ran.max_relative_error, limit=ran.limit)
        if ran.reason:
            return replace(finding, state=DIFFERS, why=ran.reason)
        self.before_timing()
        return self._timed(finding, ran.loaded, inputs, target)

    def _timed(self, finding: Finding, loaded: Loaded, inputs: Example, target: Target) -> Finding:
        """Return the finding with latency, and with the speed-up if the baseline's file is usable."""
        baseline, notes = self._load_baseline(inputs, target)

        def model(name: str, file: Loaded) -> TimedModel:
            conditions = benchmark.conditions(target, inputs, threads=self.threads, form=file.form)
            return TimedModel(name, lambda: file.clone().bind(inputs), conditions)

        candidate = model(self.variant.name, loaded)
        reference = model(BASELINE, baseline) if baseline else candidate
        try:
            timed = benchmark.time_pair(reference, candidate, protocol=Protocol(cap_s=self.seconds))
        except (ShrinkkitError, RuntimeError) as error:
            notes.append(f"It could not be timed: {brief(error)}.")
            return replace(finding, notes=(*finding.notes, *notes))
        ratio: dict[str, Any] = {"speedup": timed.speedup, "verdict": timed.verdict} if baseline else {}
        finding = replace(finding, latency_ms=timed.candidate_ms, **ratio)
        notes += [f"While it was timed, {sign}." for sign in timed.disturbance.signs]
        figures = self.card.figures if self.card else ()
        reported = [one for one in figures if one.state == "measured" and one.target == str(target)]
        notes += ["The report has no figures of this target."] if self.card and not reported else []
        machine, threads = machines.this_machine(target), self.threads
        notes += [verification.compare_with_report(one, finding, machine=machine, threads=threads) for one in reported]
        return replace(finding, notes=(*finding.notes, *notes))

    def _load_baseline(self, inputs: Example, target: Target) -> tuple[Loaded | None, list[str]]:
        """Return the baseline's verified file; or None, with a note if there is one that cannot be used."""
        if self.folder.resolve() == self.baseline or not (self.baseline / RECORD).is_file():
            return None, []
        try:
            own_inputs, ran = _run(self.baseline, variants.read(self.baseline), target, self.threads)
            if benchmark.inputs_sha256(own_inputs) != benchmark.inputs_sha256(inputs):
                raise ModelFileError("it was made for other inputs")
            if ran.reason:
                raise ModelFileError(ran.reason)
        except ShrinkkitError as error:
            return None, [f"It was timed alone, because the baseline could not be used: {brief(error)}."]
        return ran.loaded, []


class _Unusable(ModelFileError):
    """A file cannot be checked by running it, and `state` says how."""

    def __init__(self, state: str, why: str) -> None:
        super().__init__(why)
        self.state = state


def _run(folder: Path, variant: Variant, target: Target, threads: int, failure: str = "") -> tuple[Example, Ran]:
    """Return the reference inputs and the variant's file after it ran on them, loaded; raises _Unusable."""
    file = _file(variant, target)
    if file is None:
        why = f"It was made without a file for {target.runtime}."
        raise _Unusable(NO_FILE, variant.refusals.get(target.runtime, why))
    # Also if nothing can run it: a file may be damaged on any machine.
    if links := [path for path in (file.path, *file.beside) if run_folder.is_linked(folder, path)]:
        raise _Unusable(DAMAGED, f"{', '.join(links)} is a link, which may lead to another model. {_COPY_AGAIN}")
    if why := files.damage(folder, file):
        raise _Unusable(DAMAGED, f"{why} {_COPY_AGAIN}")
    if why := registry.refusal(variant.precision, target) or registry.available()[str(target)]:
        raise _Unusable(NOT_HERE, f"{why}.")
    try:
        inputs, expected = _reference(folder, target)
    except ModelFileError as error:
        raise _Unusable(DAMAGED, str(error)) from error
    if failure:
        raise _Unusable(FAILS, f"{file.path} {failure}.")
    try:
        return inputs, files.verify(folder, file, inputs, expected, device=target.device, threads=threads)
    except (Unsupported, ModelFileError) as error:
        raise _Unusable(NOT_HERE if isinstance(error, Unsupported) else FAILS, str(error)) from error


def _contradictions(folder: Path, variant: Variant, card: Card | None) -> list[str]:
    """Return how manifest, record and card contradict the files or each other."""
    changed = run_folder.altered(folder, run_folder.read_sums(folder))
    # A damaged model file is a finding of its target, and a missing file of another kind is no contradiction.
    model_files = {path for file in variant.files for path in (file.path, *file.beside)}
    problems = [f"{path} {what}." for path, what in changed.items() if what != "is missing" and path not in model_files]
    if fields := cards.disagreements(variant, card) if card else ():
        problems.append(f"{RECORD} and {CARD} differ in {', '.join(fields)}.")
    return [f"{problem} A file has changed since it was written. {_COPY_AGAIN}" for problem in problems]


def _file(variant: Variant, target: Target) -> ModelFile | None:
    return next((file for file in variant.files if file.runtime == target.runtime), None)


def _reference(folder: Path, target: Target) -> tuple[Example, list[torch.Tensor]]:
    """Return the reference inputs and outputs; raises ModelFileError if they are missing or damaged."""
    if not (folder / REFERENCE).is_file():
        raise ModelFileError(f"{REFERENCE} is missing, so there is nothing to compare outputs with. {_COPY_AGAIN}")
    inputs, expected = variants.reference(folder, target.runtime)
    rule = f"{REFERENCE} must hold inputs and outputs for {target.runtime}"
    if not inputs or not expected:
        got = f"{formats.counted(len(inputs), 'input')} and {formats.counted(len(expected), 'output')}"
        raise ModelFileError(f"{rule}, got {got}. {_COPY_AGAIN}")
    if not all(x.numel() and torch.isfinite(x).all() for x in (*inputs, *expected)):
        raise ModelFileError(f"{rule}, all of them finite numbers: NaN or no numbers verify nothing. {_COPY_AGAIN}")
    return inputs, expected


def main(request: str) -> int:
    """Print the verification that a request of `verification.verify` asks for as JSON and return 0, or why not and 2.

    A line on standard error names each target whose file is about to run.
    """

    def starting(_done: float, _total: float, target: str) -> None:
        print(f"{target}{verification.STARTED}", file=sys.stderr, flush=True)

    arguments = json.loads(request)
    try:
        checked = check(Path(arguments.pop("folder")), **arguments, progress=starting)
    except InvalidInput as error:
        print(error)
        return 2
    print(json.dumps(dataclasses.asdict(checked), allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
