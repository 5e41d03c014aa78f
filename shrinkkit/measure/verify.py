"""A variant's folder proved on this machine: whole files, the outputs that they must give, and their speed.

The folder may have come alone, without its run, task or data: what is compared with lies in it. For a benchmark of a
whole run, which also judges accuracy, see `trials`. `python -m shrinkkit.verify` is what the command line starts.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from shrinkkit.core import machines, run_folder
from shrinkkit.core.measurement import Comparison, Conditions
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.run_folder import CARD, RECORD
from shrinkkit.core.target import Target
from shrinkkit.core.variant import ModelFile, Variant
from shrinkkit.display import formats
from shrinkkit.errors import InvalidInput, ModelFileError, ShrinkkitError, Unsupported, brief
from shrinkkit.measure import benchmark, verification
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

_AGAIN = "Copy the folder again from where it was made."


def check(
    folder: Path,
    *,
    only: Sequence[str] = (),
    threads: int = 0,
    seconds: float = 4.0,
    failed: Mapping[str, str] = MappingProxyType({}),
    progress: Progress = no_progress,
) -> Verification:
    """Return whether the variant in `folder` is whole, answers as it must, and is as fast as its report says.

    Every file's hash is compared with `variant.json` and with the model card, also where its runtime is missing. What
    can run here is loaded, called on the stored inputs, compared with the stored outputs, and timed: in turns with the
    baseline's file if the folder `../baseline` has one, else alone. A speed that differs from the report's is told and
    counts as no failure.

    Args:
        folder: A variant's folder, with its variant.json.
        only: Targets to check; empty for all.
        threads: Threads of one call, 0 for every core that this process may use.
        seconds: That each file is timed for, above 0; slow models get three times that.
        failed: Targets that are not tried again, each with what its file did to the process that tried it.
        progress: Called with the targets done, their number and the next, and again before its file is timed.

    Returns:
        Whether everything checked here passed, with the finding for each target and what does not match the report.

    Raises:
        InvalidInput: There is no variant in `folder`, its record is damaged or was written by another version, or a
            name in `only` is no target.
    """
    if not (folder / RECORD).is_file():
        raise InvalidInput(
            f"`folder` must be a variant's folder, with a {RECORD}, got {str(folder)!r}. "
            "Pass one like reports/digits-cnn/variants/static-int8."
        )
    if unknown := [name for name in only if name not in registry.targets()]:
        raise InvalidInput(f"A target must be one of {', '.join(registry.targets())}, got {unknown[0]!r}.")
    variant = variants.read(folder)
    problems: list[str] = []
    card = _card(folder, problems)
    problems += _contradictions(folder, variant, card)
    notes = [] if card or problems else [f"There is no {CARD}, so there is no report to compare with."]
    beside = folder.resolve().parent / BASELINE
    if folder.resolve() != beside and not (beside / RECORD).is_file():
        notes.append("There is no folder `../baseline`, so each file was timed alone, and there is no speed-up.")
    with _computing_with(threads) as used:
        targets = only or _asked(variant)
        found: list[Finding] = []

        def starting(target: str) -> None:
            progress(len(found), len(targets), target)

        here = _Here(folder, variant, card, beside, used, seconds, failed, starting)
        for name in targets:
            starting(name)
            found.append(here.finding(Target.parse(name)))
        return Verification(
            variant=variant.name,
            verified=verification.is_verified(found, problems),
            threads=used,
            environment=machines.environment(used, packages=registry.packages()),
            findings=tuple(found),
            problems=tuple(problems),
            notes=tuple(notes),
        )


@dataclass(frozen=True)
class _Here:
    """One variant on this machine."""

    folder: Path
    variant: Variant
    card: Card | None
    beside: Path
    """Where the baseline's folder would be."""
    threads: int
    seconds: float
    failed: Mapping[str, str]
    progress: Callable[[str], None]
    """Called with a target before its file is loaded and before it is timed: each may take long."""

    def finding(self, target: Target) -> Finding:
        file = _file(self.variant, target)
        if file is None:
            why = self.variant.refusals.get(target.runtime, f"It was made without a file for {target.runtime}.")
            return Finding(str(target), "", NO_FILE, why)
        blank = Finding(str(target), file.path, OK)
        # Also where nothing can run it: a file may be damaged on any machine.
        if why := _damage(self.folder, file):
            return replace(blank, state=DAMAGED, why=why)
        if why := registry.refusal(self.variant.precision, target) or registry.available()[str(target)]:
            return replace(blank, state=NOT_HERE, why=f"{why}.")
        try:
            inputs, expected = _reference(self.folder, target)
        except ModelFileError as error:
            return replace(blank, state=DAMAGED, why=str(error))
        if why := self.failed.get(str(target), ""):
            return replace(blank, state=FAILS, why=f"{file.path} {why}.")
        try:
            ran = files.verify(self.folder, file, inputs, expected, device=target.device, threads=self.threads)
        except Unsupported as error:
            return replace(blank, state=NOT_HERE, why=str(error))
        except ModelFileError as error:
            return replace(blank, state=FAILS, why=str(error))
        saturated = _saturated(self.folder / file.path, self.variant, target, inputs, self.threads)
        named = [f"Integer kernels saturate on this processor in {', '.join(saturated)}."] if saturated else []
        found = replace(blank, limit=ran.limit, saturated=saturated, notes=tuple(named))
        if ran.reason:
            return replace(found, state=DIFFERS, why=ran.reason, max_relative_error=ran.max_relative_error)
        self.progress(str(target))
        return self._timed(replace(found, max_relative_error=ran.max_relative_error), ran.loaded, inputs, target)

    def _timed(self, found: Finding, own: Loaded, inputs: Example, target: Target) -> Finding:
        """Return `found` with its latency, and its speed-up if the baseline's file can take turns with it."""
        notes = list(found.notes)
        usual = self._baseline(inputs, target, notes)
        try:
            timed = self._compare(usual or own, own, inputs, target)
        except (ShrinkkitError, RuntimeError) as error:
            return replace(found, notes=(*notes, f"It could not be timed: {brief(error)}."))
        found = replace(found, latency_ms=timed.candidate_ms)
        if usual:
            found = replace(found, speedup=timed.speedup, verdict=timed.verdict)
        notes += [f"While it was timed, {sign}." for sign in timed.disturbance.signs]
        measured = [one for one in self.card.figures if one.state == "measured"] if self.card else []
        reported = [one for one in measured if one.target == str(target)]
        notes += ["The report has no figures of this target."] if self.card and not reported else []
        machine = machines.this_machine(target)
        notes += [
            verification.compare_with_report(one, found, machine=machine, threads=self.threads) for one in reported
        ]
        return replace(found, notes=tuple(notes))

    def _baseline(self, inputs: Example, target: Target, notes: list[str]) -> Loaded | None:
        """Return the baseline's file, proved; None where there is none, and with a note where it is of no use."""
        if self.folder.resolve() == self.beside or not (self.beside / RECORD).is_file():
            return None
        try:
            usual = variants.read(self.beside)
            file = _file(usual, target)
            if file is None:
                raise ModelFileError(f"it has no file for {target.runtime}")
            if why := _damage(self.beside, file):
                raise ModelFileError(why)
            own, expected = _reference(self.beside, target)
            if benchmark.inputs_sha256(own) != benchmark.inputs_sha256(inputs):
                raise ModelFileError("it was made for other inputs")
            ran = files.verify(self.beside, file, own, expected, device=target.device, threads=self.threads)
            if ran.reason:
                raise ModelFileError(ran.reason)
        except ShrinkkitError as error:
            notes.append(f"It was timed alone, because the baseline beside it is of no use: {brief(error)}.")
            return None
        return ran.loaded

    def _compare(self, usual: Loaded, own: Loaded, inputs: Example, target: Target) -> Comparison:
        here = Conditions(
            device=target.device,
            hardware=machines.hardware(target),
            runtime=target.runtime,
            form=usual.form,
            threads=self.threads,
            batch_size=inputs[0].shape[0],
            inputs_sha256=benchmark.inputs_sha256(inputs),
        )
        return benchmark.compare(
            lambda: usual.clone().bind(inputs),
            lambda: own.clone().bind(inputs),
            reference=self.variant.name if usual is own else BASELINE,
            candidate=self.variant.name,
            conditions=here,
            candidate_conditions=replace(here, form=own.form),
            protocol=Protocol(cap_s=self.seconds),
        )


@contextmanager
def _computing_with(threads: int) -> Iterator[int]:
    """Make torch compute with so many threads while the block runs."""
    before = torch.get_num_threads()
    try:
        yield registry.use_threads(threads)
    finally:
        torch.set_num_threads(before)


def _asked(variant: Variant) -> list[str]:
    """Return the targets that the variant has a file for, and those on the CPU that refused it."""
    runtimes = {file.runtime for file in variant.files}
    targets = [Target.parse(name) for name in registry.targets()]
    refused = [Target("cpu", runtime) for runtime in variant.refusals]
    return [str(target) for target in targets if target.runtime in runtimes or target in refused]


def _card(folder: Path, problems: list[str]) -> Card | None:
    try:
        return cards.read(folder)
    except InvalidInput as error:
        problems.append(str(error))
        return None


def _contradictions(folder: Path, variant: Variant, card: Card | None) -> list[str]:
    """Return where the folder's manifest, record and card contradict what lies there or each other."""
    changed = run_folder.altered(folder, run_folder.read_sums(folder))
    # A model file that is damaged or missing is a finding of its target, and another file that is missing is no lie.
    named = {path for file in variant.files for path in (file.path, *file.beside)}
    found = [f"{path} {what}." for path, what in changed.items() if what != "is missing" and path not in named]
    fields = cards.disagreements(variant, card) if card else ()
    if fields:
        found.append(f"{RECORD} and {CARD} differ in {', '.join(fields)}.")
    return [f"{problem} One of the files is not as it was written. {_AGAIN}" for problem in found]


def _file(variant: Variant, target: Target) -> ModelFile | None:
    return next((file for file in variant.files if file.runtime == target.runtime), None)


def _damage(folder: Path, file: ModelFile) -> str:
    """Return what is wrong with the bytes of a model file, '' if nothing is."""
    paths = (file.path, *file.beside)
    if links := [path for path in paths if run_folder.is_linked(folder, path)]:
        return f"{', '.join(links)} is a link, which may lead to another model. {_AGAIN}"
    problem = files.damage(folder, file)
    return f"{problem} {_AGAIN}" if problem else ""


def _reference(folder: Path, target: Target) -> tuple[Example, list[torch.Tensor]]:
    """Return the stored inputs and outputs.

    Raises:
        ModelFileError: They are missing or damaged.
    """
    if not (folder / REFERENCE).is_file():
        raise ModelFileError(f"{REFERENCE} is missing, so there is nothing to compare outputs with. {_AGAIN}")
    inputs, expected = variants.reference(folder, target.runtime)
    if not inputs or not expected:
        raise ModelFileError(
            f"{REFERENCE} must hold inputs and outputs for {target.runtime}, got "
            f"{formats.counted(len(inputs), 'input')} and {formats.counted(len(expected), 'output')}. {_AGAIN}"
        )
    if not all(x.numel() and torch.isfinite(x).all() for x in (*inputs, *expected)):
        raise ModelFileError(
            f"{REFERENCE} must hold finite numbers for {target.runtime}, and at least one in each input and "
            f"output, because nothing is proved by NaN, infinity or an empty batch. {_AGAIN}"
        )
    return inputs, expected


def _saturated(path: Path, variant: Variant, target: Target, inputs: Example, threads: int) -> tuple[str, ...]:
    """Return the layers whose integer kernels saturate here; none where that cannot be told."""
    if not variant.precision.endswith("int8") or target.device != "cpu":
        return ()
    try:
        found = files.check_integers(path, runtime=target.runtime, inputs=inputs, threads=threads)
    except (ShrinkkitError, RuntimeError, ValueError):
        return ()
    return found.saturated if found else ()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the verification of a folder as JSON and return 0, or an error about the arguments and return 2.

    `verification.verify` runs it. A line on standard error names each target whose file is about to run.
    """
    parser = argparse.ArgumentParser(prog="python -m shrinkkit.measure.verify")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--failed", action="append", nargs=2, default=[])
    arguments = parser.parse_args(argv)

    def starting(_done: float, _total: float, target: str) -> None:
        print(f"{target}{verification.STARTED}", file=sys.stderr, flush=True)

    only, failed = arguments.target, dict(arguments.failed)
    try:
        checked = check(arguments.folder, only=only, threads=arguments.threads, failed=failed, progress=starting)
    except InvalidInput as error:
        print(error)
        return 2
    print(json.dumps(dataclasses.asdict(checked), allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
