"""Variants on disk: the model files of one recipe, proved, with the audit of what happened.

A pruned variant is also kept in the form of `structure`, so that a later step can rebuild and quantize it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Subset

from shrinkkit.core import lease, machines, store
from shrinkkit.core.manifest import SUMS
from shrinkkit.core.variant import LayerPrecision, ModelFile, Variant
from shrinkkit.errors import InvalidTask, ModelFileError, NothingChanged, Unsupported
from shrinkkit.progress import Watch, unwatched
from shrinkkit.results import cards
from shrinkkit.results.cards import README
from shrinkkit.results.modelcard import CARD
from shrinkkit.runtimes import artifacts, audit, exports
from shrinkkit.runtimes.artifacts import TOLERANCE
from shrinkkit.runtimes.exports import Making
from shrinkkit.tasks import copies, modules, outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task, batches
from shrinkkit.transforms import checkpoint
from shrinkkit.transforms.apply import Pruned

RECORD, REFERENCE = "variant.json", "reference.safetensors"
_JUDGED_EXAMPLES = 32
"""Calibration examples on which forms of int8 are judged that need none to be made."""


def write(
    folder: Path,
    task: Task,
    model: nn.Module,
    *,
    recipe: Mapping[str, Any],
    runtimes: Sequence[str],
    source: str | None = None,
    seed: int = 0,
    ratio_asked: float | None = None,
    ratio_reached: float | None = None,
    validation_scores: Sequence[float] = (),
    kept_because: Mapping[str, str] = MappingProxyType({}),
    watch: Watch = unwatched,
) -> Variant:
    """Quantize `model` as the recipe says, write its file for each runtime, prove the files, and return the record.

    `model` is left unchanged. Earlier files in `folder` are replaced; the record is written last.

    Args:
        folder: The variant's folder; its name is the variant's name. Created if missing.
        task: What is compressed; its own model is what the audit compares with.
        model: Float model: the task's own or a pruned copy of it, in eval mode.
        recipe: `prune` and `quantize` sections as plain values; empty for the baseline.
        runtimes: Of `parameters.RUNTIMES`; a runtime that cannot have the variant is recorded with its reason.
        source: The variant that `model` was rebuilt from.
        seed: The seed that pruning and fine-tuning used.
        ratio_asked: Pruning ratio that was asked for, in [0, 1).
        ratio_reached: Pruning ratio that was reached.
        validation_scores: Mean validation score after each epoch of fine-tuning.
        kept_because: Why a layer kept all its channels although the recipe asked for some, by layer.
        watch: Called before each runtime's file and after the last with the files done, all of them, and which is next.

    Raises:
        NothingChanged: The recipe left the model as it was.
        Unsupported: No runtime can have the variant; the reason of each is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same_task(folder.parent / "baseline", task)
    model = copies.sharing(model, device="cpu").eval()
    # A view would take the whole tensor behind it into the file.
    example = tuple(x.cpu().clone() for x in task.example)
    options = dict(recipe.get("quantize") or {})
    if recipe.get("prune") and not ratio_reached:
        raise NothingChanged(
            "The prune section removed nothing: 0.0 % of what it may prune. Raise `ratio` or drop `skip`."
        )

    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as name:
        fresh = Path(name)
        made = _files(fresh, task, model, example, options, runtimes, watch)
        if not made.files:
            reasons = " ".join(f"{runtime}: {why}" for runtime, why in made.refusals.items())
            raise Unsupported(f"No runtime can have this variant. {reasons}")
        save_file(made.reference, fresh / REFERENCE)
        if recipe.get("prune") and not options:
            checkpoint.save(fresh, task.model, model)
        record = Variant(
            name=folder.name,
            task=task.name,
            recipe=dict(recipe),
            source=source,
            seed=seed,
            files=tuple(made.files),
            refusals=made.refusals,
            parameters=modules.parameters(model),
            macs=modules.macs(model, example),
            sparsity=audit.share_zero(model),
            ratio_asked=ratio_asked,
            ratio_reached=ratio_reached,
            audit=audit.compare(task.model, model, made.precision, kept_because),
            validation_scores=tuple(validation_scores),
            notes=tuple(made.notes),
            environment=machines.environment(torch.get_num_threads()),
        )
        store.write(fresh / RECORD, record)
        cards.write_unmeasured(fresh, record)
        _move(fresh, folder)
    return record


def _move(fresh: Path, folder: Path) -> None:
    """Put the files of `fresh` into `folder` in the place of those there, the record last."""
    lease.check()
    # An old record beside new files would vouch for what it never saw.
    for name in (RECORD, CARD, README, SUMS):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == RECORD):
        path.replace(folder / path.name)


def write_pruned(
    folder: Path,
    task: Task,
    pruned: Pruned,
    *,
    section: Mapping[str, Any],
    runtimes: Sequence[str],
    seed: int,
    watch: Watch = unwatched,
) -> Variant:
    """Write what `compress.prune_task` returned and return the record; see `write`.

    Args:
        folder: The variant's folder.
        task: What was pruned.
        pruned: The pruned model and what was reached.
        section: The recipe's `prune` section.
        runtimes: Runtimes to write a file for.
        seed: The seed that was used.
        watch: See `write`.
    """
    return write(
        folder,
        task,
        pruned.model,
        recipe={"prune": dict(section)},
        runtimes=runtimes,
        source="baseline",
        seed=seed,
        ratio_asked=pruned.ratio_asked,
        ratio_reached=pruned.ratio_reached,
        validation_scores=pruned.validation_scores,
        kept_because=pruned.kept_because,
        watch=watch,
    )


def write_quantized(
    folder: Path,
    task: Task,
    model: nn.Module,
    *,
    source: str,
    section: Mapping[str, Any],
    runtimes: Sequence[str],
    seed: int,
    watch: Watch = unwatched,
) -> Variant:
    """Quantize `model`, write the files and return the record, which also says how `source` was pruned; see `write`.

    Args:
        folder: The variant's folder, beside that of `source`.
        task: What is compressed.
        model: What `source` returned for the variant of that name.
        source: The variant that is quantized.
        section: The recipe's `quantize` section.
        runtimes: Runtimes to write a file for.
        seed: Recorded.
        watch: See `write`.
    """
    before = read(folder.parent / source) if source != "baseline" else None
    return write(
        folder,
        task,
        model,
        recipe={**(before.recipe if before else {}), "quantize": dict(section)},
        runtimes=runtimes,
        source=source,
        seed=seed,
        ratio_asked=before.ratio_asked if before else None,
        ratio_reached=before.ratio_reached if before else None,
        kept_because={row.layer: row.kept_because for row in before.audit} if before else {},
        watch=watch,
    )


def source(run: Path, name: str, task: Task) -> nn.Module:
    """Return the float model of the variant `name` of a run folder: the task's own for `baseline`, else rebuilt.

    Raises:
        ModelFileError: There is no such pruned variant, or it does not fit the task.
    """
    return task.model if name == "baseline" else checkpoint.rebuild(task, run / "variants" / name)


def read(folder: Path) -> Variant:
    """Return the record of the variant in `folder`.

    Raises:
        InvalidInput: There is none, or it is not readable.
    """
    return store.read(folder / RECORD, Variant)


@dataclass
class _Files:
    """The model files of a variant, or why a runtime has none, and what belongs beside them."""

    reference: dict[str, torch.Tensor]
    files: list[ModelFile] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    precision: dict[str, Mapping[str, LayerPrecision]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _files(
    folder: Path,
    task: Task,
    model: nn.Module,
    example: Example,
    options: Mapping[str, Any],
    runtimes: Sequence[str],
    watch: Watch,
) -> _Files:
    """Make and prove the file for each runtime; one that cannot have it is refused with its reason."""
    made = _Files({f"input.{i}": x.contiguous() for i, x in enumerate(example)})
    method = options.get("method", "")
    observed = calibration(task, options.get("calibration_examples", _JUDGED_EXAMPLES)) if "int8" in method else []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        making = Making(folder, Path(scratch), model, example, method, options.get("skip") or (), observed)
        for number, runtime in enumerate(runtimes):
            watch(number, len(runtimes), f"for {runtime}")
            try:
                one = exports.make(runtime, making)
            except (Unsupported, ModelFileError) as error:
                made.refusals[runtime] = str(error)
                continue
            made.files.append(one.file)
            made.precision[runtime] = one.precision
            tensors = enumerate(outputs.tensors(one.output))
            made.reference |= {f"{runtime}.{i}": t.contiguous().clone() for i, t in tensors}
            made.notes += [f"{runtime}: {one.note}."] if one.note else []
    watch(len(runtimes), len(runtimes), f"{len(made.files)} of {len(runtimes)} written and proved")
    return made


def _same_task(baseline: Path, task: Task) -> None:
    """Raise if the task's model is not the one that the baseline beside a variant was made from."""
    if not (baseline / RECORD).is_file():
        return
    inputs, expected = reference(baseline, "torch")
    if not expected:
        return
    with torch.inference_mode():
        found = outputs.tensors(copies.sharing(task.model, device="cpu")(*inputs))
    if not artifacts.deviation(expected, found) <= TOLERANCE["pt2"]:
        raise InvalidTask(
            f"The model of the task {task.name!r} must be the same each time it is loaded, but answers otherwise than "
            "when the baseline was made. Load its weights from a file, or fix the seed that it is made with."
        )


def output_of(task: Task) -> Any:
    """Return what the task's own model returns for its example, on the CPU: the structure that every runtime gives."""
    with torch.inference_mode():
        return outputs.convert(task.model(*task.example), lambda t: t.cpu())


def calibration(task: Task, examples: int) -> list[Example]:
    """Return the first `examples` of the calibration split, in batches of the size of the task's example."""
    chosen = Subset(task.calibration, range(min(examples, len(task.calibration))))  # type: ignore[arg-type]
    size = task.example[0].shape[0]
    # A short last batch would not fit a graph whose batch is fixed.
    return [inputs for inputs, _ in batches(chosen, size) if inputs[0].shape[0] == size]


def reference(folder: Path, runtime: str) -> tuple[Example, list[torch.Tensor]]:
    """Return the inputs stored beside a variant and the outputs that its file for `runtime` must give.

    Raises:
        ModelFileError: The file is missing or damaged.
    """
    try:
        stored = load_file(folder / REFERENCE)
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"{folder / REFERENCE} cannot be read: {error}. Run the step that makes it again."
        ) from error

    def ordered(prefix: str) -> list[torch.Tensor]:
        names = [name for name in stored if name.startswith(f"{prefix}.")]
        return [stored[name] for name in sorted(names, key=lambda name: int(name.rpartition(".")[2]))]

    return tuple(ordered("input")), ordered(runtime)
