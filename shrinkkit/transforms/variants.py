"""Variants on disk: the verified model files of one recipe, and their layer report.

A transformed float model is also kept in the form of `checkpoint`, so that a later step can rebuild and lower it.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Subset

from shrinkkit import quiet
from shrinkkit.core import machines, stages, store
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.run_folder import CARD, README, RECORD, STRUCTURE, SUMS, RunFolder
from shrinkkit.core.stages import FLOAT32, Choice
from shrinkkit.core.variant import History, LayerPrecision, ModelFile, Variant
from shrinkkit.display import formats
from shrinkkit.errors import InvalidTask, ModelFileError, ShrinkkitError, Unsupported, brief
from shrinkkit.progress import Progress, no_progress
from shrinkkit.results import cards
from shrinkkit.runtimes import base, files, layers, registry
from shrinkkit.runtimes.base import BuildRequest, BuiltFile
from shrinkkit.tasks import copies, modules, outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task, batches
from shrinkkit.transforms import checkpoint

REFERENCE = "reference.safetensors"
_SMALLER = 0.95
"""Share of the float weights from which on the size of a file in fewer bits is explained."""
_JUDGED_EXAMPLES = 32
"""Calibration examples on which int8 forms that need none are compared."""


def write(
    folder: Path,
    task: Task,
    model: nn.Module,
    *,
    runtimes: Sequence[str] | None,
    precision: str | Mapping[str, Any] | Choice = FLOAT32,
    history: History = History(),  # noqa: B008
    seed: int = 0,
    progress: Progress = no_progress,
) -> Variant:
    """Lower `model` to a precision, write its file for each runtime, verify the files, and return the record.

    `model` is left unchanged. Earlier files in `folder` are replaced; the record is written last.

    Args:
        folder: The variant's folder; its name is the variant's name. Created if missing.
        task: What is compressed; its own model is what the audit compares with.
        model: Float model: the task's own or a transformed copy of it, in eval mode.
        runtimes: Names; a runtime that cannot have the variant is recorded with its reason. None takes
            `registry.default_runtimes`.
        precision: As in a recipe.
        history: How `model` was made.
        seed: Of the stages; recorded.
        progress: Called before each action and after the last: files done, their number, runtime and action.

    Raises Unsupported if no runtime can have the variant; the reason of each is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same_task(folder.parent / "baseline", task)
    runtimes = registry.default_runtimes() if runtimes is None else runtimes
    chosen = stages.precision(precision)
    model = copies.shallow_copy(model, device="cpu").eval()

    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as name:
        fresh = Path(name)
        made = _files(fresh, task, model, chosen, runtimes, progress)
        if not made.files:
            reasons = " ".join(f"{runtime}: {why}" for runtime, why in made.refusals.items())
            raise Unsupported(f"No runtime can have this variant. {reasons}")
        save_file(made.reference, fresh / REFERENCE)
        if history.stages and chosen == FLOAT32:
            checkpoint.save(fresh, task, model, history)
        companions = _save_companions(fresh, task.companions)
        record = _record(folder.name, task, model, chosen, history, seed, made, companions)
        store.write(fresh / RECORD, record)
        cards.write_unmeasured(fresh, record)
        _move(fresh, folder)
    return record


def _move(fresh: Path, folder: Path) -> None:
    """Put the files of `fresh` into `folder` in the place of those there, the record last."""
    store.check_lease()
    # An old record would vouch for new files.
    for name in (RECORD, STRUCTURE, CARD, README, SUMS):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(fresh.iterdir(), key=lambda path: path.name in (STRUCTURE, RECORD)):
        path.replace(folder / path.name)


def write_stage(
    run: Path,
    name: str,
    task: Task,
    model: nn.Module,
    *,
    runtimes: Sequence[str] | None,
    history: History,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Variant:
    """Write what a stage made: a variant, or, if `runtimes` is empty, only what the next stage needs; see `write`.

    Raises Unsupported if no runtime can have the variant, or the model cannot be kept without pickle.
    """
    if runtimes or runtimes is None:
        options: dict[str, Any] = {"runtimes": runtimes, "history": history, "seed": seed, "progress": progress}
        return write(RunFolder(run).variant(name), task, model, **options)
    _same_task(RunFolder(run).variant(BASELINE), task)
    folder = RunFolder(run).checkpoint_record(name).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as made:
        checkpoint.save(Path(made), task, model, history)
        _move(Path(made), folder)
    progress(1, 1, "kept without model files")
    return _record(name, task, model, FLOAT32, history, seed, _Files({}))


def _record(
    name: str,
    task: Task,
    model: nn.Module,
    precision: Choice,
    history: History,
    seed: int,
    files: "_Files",
    companions: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Variant:
    return Variant(
        name=name,
        task=task.name,
        recipe={"stages": list(history.stages), "precision": precision.to_dict()},
        source=history.source,
        seed=seed,
        files=tuple(files.files),
        refusals=files.refusals,
        parameters=modules.parameters(model),
        macs=modules.macs(model, tuple(x.cpu() for x in task.example)),
        sparsity=modules.sparsity(model),
        audit=layers.compare(task.model, model, files.precision, history.left_alone),
        validation_scores=history.validation_scores,
        notes=(*task.notes, *history.notes, *files.notes),
        environment=machines.environment(torch.get_num_threads(), packages=registry.packages()),
        companions=dict(companions),
    )


def _save_companions(folder: Path, companions: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Save what prepares the inputs, and return the names of its files by the code that uses them."""
    saved = {}
    for usage, companion in companions.items():
        before = {path.name for path in folder.iterdir()}
        with quiet.libraries():
            companion.save_pretrained(folder)
        saved[usage] = tuple(sorted({path.name for path in folder.iterdir()} - before))
    return saved


def source(run: Path, name: str, task: Task) -> tuple[nn.Module, History]:
    """Return a float model of the run folder `run`, and how it was made from the task's own, which `baseline` names.

    `name` is that of a variant, or of a checkpoint between two stages. Raises ModelFileError if there is no such model,
    or it does not fit the task.
    """
    if name == BASELINE:
        return task.model, History(BASELINE)
    folder = RunFolder(run)
    if (between := folder.checkpoint_record(name)).is_file():
        return checkpoint.load(task, between.parent)
    model, history = checkpoint.load(task, folder.variant(name))
    return model, replace(history, source=name)


def read(folder: Path) -> Variant:
    """Return the record of the variant in `folder`; raises InvalidInput if there is none, or it is not readable."""
    return store.read(folder / RECORD, Variant)


@dataclass
class _Files:
    """The model files of a variant, or why a runtime has none, and what belongs to them."""

    reference: dict[str, torch.Tensor]
    files: list[ModelFile] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    precision: dict[str, Mapping[str, LayerPrecision]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _files(
    folder: Path, task: Task, model: nn.Module, precision: Choice, runtimes: Sequence[str], progress: Progress
) -> _Files:
    """Make and prove the file for each runtime; one that cannot have it is refused with its reason."""
    # A view would take the whole tensor behind it into the file.
    example = tuple(x.cpu().clone() for x in task.example)
    made = _Files({f"input.{i}": x.contiguous() for i, x in enumerate(example)})
    method = precision.name if precision.name != "float32" else ""
    count = getattr(precision.settings, "calibration_examples", _JUDGED_EXAMPLES)
    skip = getattr(precision.settings, "skip", ())
    observed = calibration(task, count) if "int8" in method else []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        making = BuildRequest(folder, Path(scratch), model, example, method, skip, observed)
        for number, runtime in enumerate(runtimes):

            def announce(action: str, number: int = number, runtime: str = runtime) -> None:
                progress(number, len(runtimes), f"{runtime}: {action}")

            announce(f"quantize to {method}" if method else "export")
            try:
                one = files.build(runtime, replace(making, announce=announce))
            except (Unsupported, ModelFileError) as error:
                made.refusals[runtime] = str(error)
                continue
            except (ShrinkkitError, OSError):
                raise
            except Exception as error:  # what a runtime cannot do must not take the others along
                cause = f"{type(error).__name__}: {brief(error)}."
                made.refusals[runtime] = f"failed, by a bug or something unsupported, with {cause}"
                continue
            made.files.append(one.file)
            made.precision[runtime] = one.layers
            tensors = enumerate(outputs.tensors(one.output))
            made.reference |= {f"{runtime}.{i}": t.contiguous().clone() for i, t in tensors}
            notes = filter(None, (one.note, _why_not_smaller(model, one) if method else ""))
            made.notes += [f"{runtime}: {note}." for note in notes]
    progress(len(runtimes), len(runtimes), f"{len(made.files)} of {len(runtimes)} written and verified")
    return made


def _why_not_smaller(model: nn.Module, built: BuiltFile) -> str:
    """Return which layers in float32 keep a file of fewer bits from being smaller than float weights, '' if it is."""
    weights = sum(p.nbytes for p in model.parameters())
    if built.file.size_bytes < _SMALLER * weights:
        return ""
    shares: Counter[str] = Counter()
    for name, module in layers.parametrized(model).items():
        if built.layers.get(name, LayerPrecision("float32")).runs_as == "float32":
            shares[type(module).__name__] += sum(p.nbytes for p in module.parameters(recurse=False))
    named = ", ".join(f"{kind} {share / weights:.0%}" for kind, share in shares.most_common() if share >= weights / 100)
    cause = f"weights in float32 are {named} of them" if named else "the rest describes the graph"
    return f"the file takes {formats.size(built.file.size_bytes)}, and float weights {formats.size(weights)}: {cause}"


def _same_task(baseline: Path, task: Task) -> None:
    """Raise if the task's model is not the one of the baseline next to a variant."""
    if not (baseline / RECORD).is_file():
        return
    inputs, expected = reference(baseline, "torch")
    if not expected:
        return
    with torch.inference_mode():
        found = outputs.tensors(copies.shallow_copy(task.model, device="cpu")(*inputs))
    if not base.max_relative_error(expected, found) <= base.TOLERANCE:
        text = (
            f"The model of the task {task.name!r} must be the same each time, but its outputs are not the baseline's."
        )
        raise InvalidTask(f"{text} Load its weights from a file, or fix the seed that it is made with.")


def output_of(task: Task) -> Any:
    """Return what the task's own model returns for its example, on the CPU: the structure that every runtime gives."""
    with torch.inference_mode():
        return outputs.convert(task.model(*task.example), lambda t: t.cpu())


def calibration(task: Task, examples: int) -> list[Example]:
    """Return the first `examples` of the calibration split, in batches of the size of the task's example.

    A cache is empty in them, so that workloads, in which it is not, come first.
    """
    size, available = task.example[0].shape[0], len(task.calibration)
    # Fewer examples than a batch are repeated to fill one.
    chosen = Subset(task.calibration, [i % available for i in range(max(min(examples, available), size))])
    # A short last batch would not fit a graph whose batch is fixed.
    full = [inputs for inputs, _ in batches(chosen, size) if inputs[0].shape[0] == size]
    return [*(task.workloads.values() if not all(x.numel() for x in task.example) else ()), *full]


def reference(folder: Path, runtime: str) -> tuple[Example, list[torch.Tensor]]:
    """Return the inputs stored with a variant and the outputs that its file for `runtime` must give.

    Raises ModelFileError if they are missing or damaged.
    """
    try:
        stored = load_file(folder / REFERENCE)
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{folder / REFERENCE} cannot be read: {error}. {base.REMEDY}") from error

    def ordered(prefix: str) -> list[torch.Tensor]:
        names = [name for name in stored if name.startswith(f"{prefix}.")]
        return [stored[name] for name in sorted(names, key=lambda name: int(name.rpartition(".")[2]))]

    return tuple(ordered("input")), ordered(runtime)
