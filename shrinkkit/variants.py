"""Variants on disk: the model files of one recipe, proved, with the audit of what happened.

A pruned variant is also kept as plain weights and changed layer attributes, so that a later step can rebuild
it from the task's own model and quantize it.
"""

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.utils.data import Subset

from shrinkkit import artifacts, audit, measure, outputs, quantize, records, targets
from shrinkkit.compress import Pruned
from shrinkkit.errors import InvalidTask, ModelFileError, NothingChanged, ShrinkkitError, Unsupported
from shrinkkit.records import Accuracy, LayerPrecision, ModelFile, Variant
from shrinkkit.tasks import Example, Task, batches, matching

RECORD, REFERENCE, WEIGHTS, STRUCTURE = "variant.json", "reference.safetensors", "weights.safetensors", "structure.json"


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
) -> Variant:
    """Quantize `model` as the recipe says, write its file for each runtime, prove the files, and return the record.

    `model` is left unchanged. Earlier files in `folder` are replaced; the record is written last.

    Args:
        folder: The variant's folder; its name is the variant's name. Created if missing.
        task: What is compressed; its own model is what the audit compares with.
        model: Float model: the task's own or a pruned copy of it, in eval mode.
        recipe: `prune` and `quantize` sections as plain values; empty for the baseline.
        runtimes: `torch`, `onnxruntime`; a runtime that cannot have the variant is recorded with its reason.
        source: The variant that `model` was rebuilt from.
        seed: The seed that pruning and fine-tuning used.
        ratio_asked: Pruning ratio that was asked for, in [0, 1).
        ratio_reached: Pruning ratio that was reached.
        validation_scores: Mean validation score after each epoch of fine-tuning.
        kept_because: Why a layer kept all its channels although the recipe asked for some, by layer.

    Raises:
        NothingChanged: The recipe left the model as it was.
        Unsupported: No runtime can have the variant; the reason of each is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # An old record beside new files would vouch for what it never saw.
    (folder / RECORD).unlink(missing_ok=True)
    _same_task(folder.parent / "baseline", task)
    model = copy.deepcopy(model).cpu().eval()
    example = tuple(x.cpu() for x in task.example)
    options = dict(recipe.get("quantize") or {})
    if recipe.get("prune") and not ratio_reached:
        raise NothingChanged(
            "The prune section removed nothing: 0.0 % of what it may prune. Raise `ratio` or drop `skip`."
        )

    files: list[ModelFile] = []
    refusals: dict[str, str] = {}
    precision: dict[str, Mapping[str, LayerPrecision]] = {}
    notes: list[str] = []
    reference = {f"input.{i}": x.contiguous() for i, x in enumerate(example)}
    makers = {"torch": _torch, "onnxruntime": _onnxruntime}
    for runtime in runtimes:
        try:
            file, found, note, output = makers[runtime](folder, task, model, example, options)
        except (Unsupported, ModelFileError) as error:
            refusals[runtime] = str(error)
            continue
        files.append(file)
        precision[runtime] = found
        reference |= {f"{runtime}.{i}": t.contiguous().clone() for i, t in enumerate(outputs.tensors(output))}
        notes += [f"{runtime}: {note}."] if note else []
    if not files:
        raise Unsupported("No runtime can have this variant. " + " ".join(f"{r}: {why}" for r, why in refusals.items()))
    save_file(reference, folder / REFERENCE)
    if recipe.get("prune") and not options:
        save(folder, task.model, model)

    record = Variant(
        name=folder.name,
        task=task.name,
        recipe=dict(recipe),
        source=source,
        seed=seed,
        files=tuple(files),
        refusals=refusals,
        parameters=measure.parameters(model),
        macs=measure.macs(model, example),
        sparsity=audit.share_zero(model),
        ratio_asked=ratio_asked,
        ratio_reached=ratio_reached,
        audit=audit.compare(task.model, model, precision, kept_because),
        validation_scores=tuple(validation_scores),
        notes=tuple(notes),
        environment=targets.environment(torch.get_num_threads()),
    )
    records.write(folder / RECORD, record)
    return record


def write_pruned(
    folder: Path,
    task: Task,
    pruned: Pruned,
    *,
    section: Mapping[str, Any],
    runtimes: Sequence[str],
    seed: int,
) -> Variant:
    """Write what `compress.prune_task` returned and return the record; see `write`.

    Args:
        folder: The variant's folder.
        task: What was pruned.
        pruned: The pruned model and what was reached.
        section: The recipe's `prune` section.
        runtimes: Runtimes to write a file for.
        seed: The seed that was used.
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
    )


def source(run: Path, name: str, task: Task) -> nn.Module:
    """Return the float model of the variant `name` of a run folder: the task's own for `baseline`, else rebuilt.

    Raises:
        ModelFileError: There is no such pruned variant, or it does not fit the task.
    """
    return task.model if name == "baseline" else rebuild(task, run / "variants" / name)


def fidelity(folder: Path, task: Task, dataset: Any) -> dict[str, Accuracy]:
    """Return how each file of the variant in `folder` scores on `dataset`, paired with the task's own model.

    Args:
        folder: The variant's folder.
        task: Whose score is applied.
        dataset: One of the task's splits.
    """
    cpu = copy.deepcopy(task.model).cpu()
    expected = measure.scores(cpu, task, dataset)
    like = output_of(task)
    return {
        file.runtime: measure.accuracy(
            task,
            measure.scores(artifacts.load(folder / file.path, runtime=file.runtime, like=like), task, dataset),
            expected,
        )
        for file in read(folder).files
    }


def read(folder: Path) -> Variant:
    """Return the record of the variant in `folder`.

    Raises:
        InvalidInput: There is none, or it is not readable.
    """
    return records.read(folder / RECORD, Variant)


def save(folder: Path, before: nn.Module, after: nn.Module) -> None:
    """Write what `rebuild` needs to turn `before` into `after`: weights, and layer attributes that differ."""
    old = dict(before.named_modules())
    structure = {
        name: changed
        for name, module in after.named_modules()
        if (changed := {k: v for k, v in _plain(module).items() if _plain(old[name]).get(k) != v})
    }
    save_model(after, str(folder / WEIGHTS))
    records.write_text(folder / STRUCTURE, json.dumps(structure, indent=1) + "\n")


def rebuild(task: Task, folder: Path) -> nn.Module:
    """Return the float model that was saved in `folder`, rebuilt from a copy of the task's own model on the CPU.

    Raises:
        ModelFileError: The folder holds no such model, or it does not fit the task's.
    """
    if not (folder / STRUCTURE).is_file():
        raise ModelFileError(
            f"{folder} must hold a pruned variant, with {STRUCTURE} and {WEIGHTS}. Run its prune step."
        )
    model = copy.deepcopy(task.model).cpu()
    modules = dict(model.named_modules())
    try:
        for name, attributes in json.loads((folder / STRUCTURE).read_text()).items():
            for key, value in attributes.items():
                old = getattr(modules[name], key)
                setattr(modules[name], key, tuple(value) if isinstance(old, tuple) else value)
        _resize(model, load_file(folder / WEIGHTS))
        load_model(model, folder / WEIGHTS)
    except (KeyError, AttributeError, RuntimeError, OSError, ValueError) as error:
        raise ModelFileError(
            f"{folder} does not fit the model of the task {task.name!r}: {error}. Prune again; the task has changed."
        ) from error
    return model.eval()


def _resize(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Give each parameter and buffer the shape of its saved tensor; tied parameters stay tied."""
    resized: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            tensor = saved.get(f"{prefix}.{name}" if prefix else name)
            if id(parameter) not in resized and tensor is not None and tensor.shape != parameter.shape:
                resized[id(parameter)] = nn.Parameter(torch.empty_like(tensor), parameter.requires_grad)
        for name, buffer in list(module.named_buffers(recurse=False)):
            tensor = saved.get(f"{prefix}.{name}" if prefix else name)
            if tensor is not None and tensor.shape != buffer.shape:
                setattr(module, name, torch.empty_like(tensor))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in resized:
                setattr(module, name, resized[id(parameter)])


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of `module` that are numbers, or tuples or lists of numbers."""
    number = (bool, int, float)
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(module).items()
        if isinstance(value, number)
        or (isinstance(value, (tuple, list)) and value and all(isinstance(v, number) for v in value))
    }


Made = tuple[ModelFile, Mapping[str, LayerPrecision], str, Any]


def _same_task(baseline: Path, task: Task) -> None:
    """Raise if the task's model is not the one that the baseline beside a variant was made from."""
    if not (baseline / RECORD).is_file() or "torch.0" not in load_file(baseline / REFERENCE):
        return
    inputs, expected = reference(baseline, "torch")
    with torch.inference_mode():
        found = outputs.tensors(copy.deepcopy(task.model).cpu()(*inputs))
    if artifacts.deviation(expected, found) > artifacts.TOLERANCE["pt2"]:
        raise InvalidTask(
            f"The model of the task {task.name!r} must be the same each time the task is loaded, but it answers otherwise than "
            "when the baseline was made. Load its weights from a file, or fix the seed that it is made with."
        )


def output_of(task: Task) -> Any:
    """Return the outputs of the task's own model for its example, on the CPU; runtimes that give a flat list are put into their structure."""
    with torch.inference_mode():
        return outputs.convert(task.model(*task.example), lambda t: t.cpu())


def _torch(folder: Path, task: Task, model: nn.Module, example: Example, options: Mapping[str, Any]) -> Made:
    """Return the file for torch, how it runs each layer, a note, and the outputs of the model in memory."""
    method, skip = options.get("method", ""), options.get("skip") or ()
    found: Mapping[str, LayerPrecision] = {}
    notes = []
    if method == "dynamic-int8":
        made = quantize.dynamic_int8(model, example, skip=skip)
    elif method == "static-int8":
        made = quantize.static_int8(model, example, calibration(task, options["calibration_examples"]), skip=skip)
    elif method:
        made = quantize.half(model, example, dtype=method)
        found = {name: LayerPrecision(method) for name in audit.layers(model)}
    else:
        made = model
    if engine := quantize.engine_of(made):
        found = audit.torch_int8(model, made, method=method, skipped=_names(model, skip))
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(quantize.engine_times_ms(made).items()))
        notes.append(f"the engine {engine} was the fastest of those tried here ({times})")
    path, format, note = artifacts.write_torch(made, example, folder)
    with torch.inference_mode(), quantize.plain_attention():
        expected = made(*example)
    file = _prove(path, folder, "torch", format, expected, example)
    return file, found, "; ".join(filter(None, [*notes, note])), expected


def _onnxruntime(folder: Path, task: Task, model: nn.Module, example: Example, options: Mapping[str, Any]) -> Made:
    """Return the file for ONNX Runtime, how it runs each layer, a note, and the outputs that the file must give."""
    method, skip = options.get("method", ""), options.get("skip") or ()
    path = folder / "model.onnx"
    if method in quantize.HALF:
        raise Unsupported(
            f"ONNX Runtime has no {method} kernels on the CPU: it would compute in float32 between casts. "
            f"Possible for {method}: the torch runtime."
        )
    if not method:
        note = artifacts.write_onnx(model, example, path)
        with torch.inference_mode():
            expected = model(*example)
        return _prove(path, folder, "onnxruntime", "onnx", expected, example), {}, note, expected
    skipped = _names(model, skip)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = Path(scratch) / "float.onnx"
        note = artifacts.write_onnx(model, example, source)
        observed = calibration(task, options["calibration_examples"]) if method == "static-int8" else ()
        quantize.onnx_int8(source, path, method=method, calibration=observed, skip=sorted(skipped))
    found = audit.onnx_int8(model, artifacts.onnx_int8_weights(path), method=method, skipped=skipped)
    if not any(p.runs_as == "int8" for p in found.values()):
        path.unlink()
        raise Unsupported(
            f"ONNX Runtime would run every layer of this model in float after {method}: "
            + "; ".join(sorted({p.why for p in found.values() if p.why}))
            + ". Possible: the torch runtime, or another method."
        )
    if ignored := [name for name in skipped if name in found and found[name].runs_as == "int8"]:
        path.unlink()
        raise Unsupported(f"ONNX Runtime quantized {', '.join(ignored)} although `skip` names them. Use the torch runtime.")
    # The graph exists only as a file; what it gives here is what it must give wherever it is loaded.
    expected = artifacts.load(path, runtime="onnxruntime")(*example)
    return _prove(path, folder, "onnxruntime", "onnx", expected, example), found, note, expected


def calibration(task: Task, examples: int) -> list[Example]:
    """Return the first `examples` of the calibration split, in batches of the size of the task's example."""
    chosen = Subset(task.calibration, range(min(examples, len(task.calibration))))  # type: ignore[arg-type]
    size = task.example[0].shape[0]
    # A short last batch would not fit a graph whose batch is fixed.
    return [inputs for inputs, _ in batches(chosen, size) if inputs[0].shape[0] == size]


def _names(model: nn.Module, skip: Sequence[str]) -> frozenset[str]:
    return frozenset(matching([name for name, _ in model.named_modules() if name], skip)) if skip else frozenset()


def _prove(path: Path, folder: Path, runtime: str, format: str, expected: Any, example: Example) -> ModelFile:
    """Load the file back, compare its outputs with `expected`, and return its record."""
    found = artifacts.load(path, runtime=runtime)(*example)
    error = artifacts.deviation(expected, found)
    if error > artifacts.TOLERANCE[format]:
        path.unlink()
        raise ModelFileError(
            f"{path.name} loaded back must give the outputs of the model in memory within {artifacts.TOLERANCE[format]:g} "
            f"of their size, but is {error:.2g} away. It is not kept; use another runtime."
        )
    return artifacts.describe(path, folder, runtime=runtime, format=format, deviation=error)


def reference(folder: Path, runtime: str) -> tuple[Example, list[torch.Tensor]]:
    """Return the inputs stored beside a variant and the outputs that its file for `runtime` must give.

    Raises:
        ModelFileError: The file is missing or damaged.
    """
    try:
        stored = load_file(folder / REFERENCE)
    except (OSError, ShrinkkitError, ValueError, RuntimeError) as error:
        raise ModelFileError(
            f"{folder / REFERENCE} cannot be read: {error}. Run the step that makes it again."
        ) from error

    def ordered(prefix: str) -> list[torch.Tensor]:
        names = [name for name in stored if name.startswith(f"{prefix}.")]
        return [stored[name] for name in sorted(names, key=lambda name: int(name.rpartition(".")[2]))]

    return tuple(ordered("input")), ordered(runtime)
