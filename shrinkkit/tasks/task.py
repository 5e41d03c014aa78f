"""The task: a trained model, its data in four splits, a score and a loss; what is missing is made from the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, facts
from shrinkkit.errors import InvalidInput, InvalidTask
from shrinkkit.tasks import calls, data, fidelity, metrics, outputs
from shrinkkit.tasks.modules import Example

SPLITS = ("train", "calibration", "validation", "test")


@dataclass(frozen=True, eq=False, repr=False)
class Task(Rich):
    """A trained model, and as much as there is of its data, score and loss; `Task(model, example)` is enough.

    A split is a map-style dataset, a list, an iterable, a DataLoader or a Hugging Face dataset of `(inputs, target)`
    or of mappings with the keys of `example` and `labels`. Without a batch dimension, `inputs` has the structure of
    `example`. Missing splits are cut from `inputs`, or from `test`. Without a score the model's own outputs are the
    targets, and the score is fidelity: top-1 agreement for classes, else the cosine, or the relative error of single
    numbers. Without a loss, fine-tuning distils from those outputs. `check_task` checks all rules.

    Attributes are in the form that every step uses: `model(*example)` takes positional tensors and returns tensors in
    plain containers, and splits are datasets of (tuple of tensors, target).
    """

    model: nn.Module
    """Trained, in eval mode, on the CPU. Steps work on copies."""
    example: Any
    """A batch: a tensor, a tuple of arguments, or a mapping of keywords, each tensor with the batch first. Latency is
    measured at its batch size."""
    name: str = ""
    """Of results; by default the class of the model."""
    inputs: Any = None
    """Unlabelled inputs, for the splits that are missing."""
    collate: Callable[[Any], Any] | None = None
    """A list of examples -> a batch, for examples of several lengths: pads them, and masks the padding."""
    train: Any = None
    calibration: Any = None
    validation: Any = None
    test: Any = None
    score: Any = None
    """(output, targets) of a batch -> one score per example, shape (batch,), higher is better; or a `Metric`, such as
    one of a whole set or one where lower is better; or a `torchmetrics.Metric`."""
    loss: Any = None
    """(output, targets) of a batch -> scalar tensor that fine-tuning minimises."""
    metric: str = ""
    """Name of `score` in tables and figures, by default that of its `Metric`, or `accuracy`."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Further metrics by name, which are reported and decide nothing; functions are of the whole set."""
    corruptions: Mapping[str, Callable[[Example, int], Any]] = field(default_factory=dict)
    """Changes of inputs to test robustness on besides the built-in ones, by name: (a batch of inputs as a tuple, a
    severity from 1 to 5) -> inputs of the same shapes and types."""
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What was missing, and how it was filled."""
    is_fidelity: bool = False
    """Whether the score compares with the outputs of the original model."""
    companions: Mapping[str, Any] = field(default_factory=dict)
    """What prepares the inputs, saved with the model files: by the code that uses it there, an object with
    `save_pretrained(folder)`, such as a tokenizer."""
    unlabelled: tuple[str, ...] = ()
    """Splits whose targets are not those of `score`."""
    varying: tuple[frozenset[int], ...] = ()
    """For each input the dimensions, 0 being the batch, whose sizes may differ between calls; with `collate`, by
    default those whose sizes differ between examples."""
    workloads: Mapping[str, Any] = field(default_factory=dict)
    """Further inputs by name, like `example` but of other sizes where these vary, whose latency is measured too. By
    default, where lengths vary, batches of the 10th, 50th and 90th percentile of those of `calibration`."""
    counts_tokens: bool = False
    """Whether the first input holds tokens, (batch, length), so that throughput is in tokens per second."""

    def __post_init__(self) -> None:
        """Bring what was given into the form that steps use, and make what is missing."""
        for name, value in _completed(self).items():
            object.__setattr__(self, name, value)

    def shown(self) -> Shown:
        """Return a table of model, inputs, splits and metric."""
        facts_of = self.to_dict()
        inputs = ", ".join(f"{tuple(one['shape'])} {one['dtype']}" for one in facts_of["inputs"])
        pairs = [
            ("model", facts_of["model"]),
            ("parameters", formats.count(facts_of["parameters"])),
            ("inputs of one call", inputs),
            ("examples", ", ".join(f"{count:,} {split}" for split, count in facts_of["examples"].items())),
            ("metric", self.metric),
            ("classes", ", ".join(self.class_names)),
            ("notes", " ".join(self.notes)),
        ]
        return facts(f"Task {self.name}", pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return names, shapes and sizes, without tensors, data and functions."""
        return {
            "name": self.name,
            "model": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "inputs": [{"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for x in self.example],
            "examples": {split: len(getattr(self, split)) for split in SPLITS},
            "metric": self.metric,
            "class_names": list(self.class_names),
        }


def _completed(task: Task) -> dict[str, Any]:
    """Return the fields of a task that differ from what was given."""
    score = metrics.metric_of(task.score, "accuracy", per_example=True)
    further = {name: metrics.metric_of(one, name, per_example=False) for name, one in task.metrics.items()}
    metric = task.metric or (score.name if isinstance(score, metrics.Metric) else "accuracy")
    name = task.name or type(task.model).__name__.lower()
    fields: dict[str, Any] = {"name": name, "score": score, "metrics": further, "metric": metric}
    if not isinstance(task.model, nn.Module) or isinstance(task.model, torch.jit.ScriptModule):
        return fields
    example = (task.example,) if isinstance(task.example, torch.Tensor) else task.example
    call = calls.call_of(task.model, example)
    flat = call.flat(call.example)
    if not flat:
        return fields
    output = _output(task.model, example, call)
    if output is None:
        return fields | {"example": example}
    is_positional = isinstance(example, tuple) and all(isinstance(x, torch.Tensor) for x in example)
    declares = bool(task.varying) and not calls.varying(task.model).dims
    if task.collate or declares or not (is_positional and outputs.is_plain(output)):
        fields["model"] = calls.positional(task.model, call)
        fields["metrics"] = {name: metrics.restoring(one, output) for name, one in further.items()}
        if isinstance(score, metrics.Metric):
            fields["score"] = metrics.restoring(score, output)
        if task.loss:
            fields["loss"] = metrics.restored(task.loss, output)
    fields["example"] = flat
    workloads = {
        name: call.flat((x,) if isinstance(x, torch.Tensor) else x, f"`workloads[{name!r}]`")
        for name, x in task.workloads.items()
    }
    model, splits = fields.get("model", task.model), [getattr(task, split) for split in SPLITS]
    if (task.inputs, task.collate) != (None, None) or None in (*splits, task.score, task.loss):
        fields |= _filled(task, model, flat, call)
    varying = fields.get("varying", task.varying)
    if task.collate and not task.workloads:
        workloads = data.of_lengths(fields["calibration"], varying, len(flat[0]))
    if any(varying) and (task.collate or declares):
        vars(model)["varying"] = calls.varying_in(varying, (flat, *workloads.values()))
    return fields | {"workloads": workloads}


def _filled(task: Task, model: nn.Module, example: Example, call: calls.Call) -> dict[str, Any]:
    """Return the fields of a task that follow from its data and from what is missing, for its positional model."""
    scored, trained = task.score is not None, task.loss is not None
    given = {split: getattr(task, split) for split in SPLITS}
    options: dict[str, Any] = {"collate": task.collate, "scored": scored, "trained": trained}
    splits, unlabelled, notes = data.splits(given, task.inputs, example, call, **options)
    varying = task.varying or data.varying(splits.values(), example)
    if any(varying) and not (task.collate or task.varying):
        text = f"Every example must have the shapes of `example`, {[tuple(x.shape[1:]) for x in example]} without the"
        remedy = "Pass `collate`, a function that pads a list of examples to a batch."
        raise InvalidTask(f"{text} batch, but some have others. {remedy}")
    fields: dict[str, Any] = {**splits, "unlabelled": unlabelled, "inputs": None, "collate": None}
    if task.collate:
        fields["varying"] = varying
    compared = kinds_of(model, splits["test"], class_names=task.class_names)
    if not scored:
        score, count = fidelity.score(compared), formats.counted(len(splits["test"]), "input")  # type: ignore[arg-type]
        fields |= {"score": score, "metric": score.name, "is_fidelity": True}
        notes = (f"Fidelity on {count}; no accuracy was measured.", *notes)
    if not trained:
        fields["loss"] = fidelity.distillation(compared)
    for split in SPLITS:
        if not (trained if split == "train" else scored):
            fields[split] = data.WithOutputs(splits[split], model)
    return fields | {"notes": (*task.notes, *notes)}


def kinds_of(model: nn.Module, dataset: Dataset[Any], *, class_names: Sequence[str]) -> list[str]:
    """Return how each tensor of what `model` returns for a dataset's inputs is compared; see `fidelity.kinds`."""
    inputs, _ = data.batch(data.without_outputs(dataset), range(min(data.EXAMPLES_OF_SHAPE, len(dataset))))  # type: ignore[arg-type]
    with torch.no_grad():
        output = model(*inputs)
    is_classifier = bool(class_names) or _is_classifier(model, output)
    return fidelity.kinds(output, outputs.names(output), is_classifier=is_classifier)


def _output(model: nn.Module, example: Any, call: calls.Call) -> Any:
    """Return what the model returns for `example`; None if it cannot be called, which `check_task` explains."""
    if any(module.training for module in model.modules()) or any(map(nn.parameter.is_lazy, model.parameters())):
        return None
    arguments, keywords = ((), call.example) if call.is_keywords else (call.example, {})
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    copied = outputs.convert((arguments, keywords), torch.clone)
    try:
        with torch.no_grad():
            return model(*copied[0], **copied[1], **call.constants)
    except Exception:  # a user's model may raise anything
        return None


def _is_classifier(model: nn.Module, output: Any) -> bool:
    """Return whether the first output looks like the classes of a last Linear layer: not of unit length."""
    first = outputs.tensors(output)[0]
    weights = [module for module in model.modules() if isinstance(module, nn.Linear)]
    unit = bool(((first.norm(dim=-1) - 1).abs() < 1e-3).all()) if first.dim() == 2 else True
    return bool(weights) and not unit and weights[-1].out_features == first.shape[-1]


def batches(dataset: Dataset[Any], batch_size: int) -> Iterator[tuple[Example, Any]]:
    """Yield `(inputs, targets)` of consecutive examples, inputs as a tuple; the last batch may be smaller."""
    if batch_size < 1:
        raise InvalidInput(f"`batch_size` must be at least 1, got {batch_size}.")
    size = len(dataset)  # type: ignore[arg-type]
    for start in range(0, size, batch_size):
        yield data.batch(dataset, range(start, min(start + batch_size, size)))


def spaced(size: int, most: int) -> list[int]:
    """Return the indices below `size`, or `most` of them, evenly spaced."""
    return list(range(size)) if size <= most else [i * size // most for i in range(most)]
