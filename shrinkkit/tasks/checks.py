"""Checks of a task (its model, splits, score and loss) before any long work starts."""

import contextlib
import hashlib
import inspect
import keyword
import linecache
import math
import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.fx
from torch import Tensor, nn
from torch.utils.data import default_collate

from shrinkkit.core import estimate
from shrinkkit.core.robustness import ATTACKS, CLEAN, SEVERITIES
from shrinkkit.display import formats
from shrinkkit.errors import InvalidTask, brief, options
from shrinkkit.tasks import data, outputs
from shrinkkit.tasks.duplicates import Sketches
from shrinkkit.tasks.metrics import Metric, whole
from shrinkkit.tasks.modules import Example, raw_bytes
from shrinkkit.tasks.task import SPLITS, Task, batches, spaced

MOST_REPEATED = 0.05
"""Largest fraction of the examples of `validation` and `test` that may repeat the inputs of another."""
LARGEST_SCORE = 1e9
"""Scores beyond this magnitude lose differences when averaged."""

_EXAMPLES_COMPARED, _EXAMPLES_SCORED, _BATCH_CHECKED = 20_000, 2048, 32
_SHIFTS, _BATCHES_HALVED, _PERMUTATIONS = 4, 8, 20
_LONGEST_TEXT, _LONGEST_NAME = 80, 300
_CALLS, _CALLS_S = 40, 10.0
"""Repeated calls that must give equal outputs, and the seconds after which fewer are enough."""
_COPIES = 2.0
"""Copies of its weights that the runtime with the largest needs holds while it makes a file."""
_RESERVED = frozenset(dir(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()))) - frozenset(dir(nn.Module()))
"""Attribute names that an exported model uses itself."""
_CONDITIONS = (CLEAN, *ATTACKS)
"""Names that corruptions of the task's own cannot have."""
_SAME = "The model must give the same outputs for the same inputs"
_STATELESS = "Leave out what is random in eval mode, and state kept from one call to the next."
_MIXES = (
    "The output for an example must not depend on the rest of its batch, but {} gives another output. "
    "Use `batch_first=True` in recurrent layers, and no statistics over the batch."
)


def check(task: Task) -> None:
    """Check the rules that every step relies on; raises InvalidTask otherwise.

    Compares all examples of all splits for duplicates, at most 20,000 a split, evenly spaced. Scores the model on at
    most 2048 examples of each split (one batch of `train`): it must score better than with shuffled targets.

    Args:
        task: Task to check; it is left unchanged.

    Raises:
        InvalidTask: A rule is broken; the message names the rule, the value that broke it and the remedy.
    """
    score_range(task)


def score_range(task: Task) -> tuple[float, float]:
    """Check a task as `check` does, and return its lowest and highest score on validation and test."""
    check_model(task.model, task.example)
    _check_workloads(task)
    _check_texts_and_functions(task)
    _check_splits(task)
    _check_corruptions(task)
    _check_batch_independence(task.model, _mixed_batch(task))
    low_high = _set_range(task) if task.metrics or not task.score.per_example else (1.0, 1.0)
    if task.is_fidelity:
        for split in ("calibration", "validation", "test"):
            deque(_forwards(task, split), maxlen=0)
    if task.is_fidelity or not task.score.per_example:
        _check_loss(task)
        return low_high
    for split in ("train", "calibration"):
        if split not in task.unlabelled:
            _split_scores(task, split)
    parts = [_split_scores(task, split) for split in ("validation", "test")]
    scores, shuffled, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    _check_above_chance(scores, shuffled, zeros, task.score)
    _check_loss(task)
    return float(scores.min()), float(scores.max())


def _check_texts_and_functions(task: Task) -> None:
    if not (isinstance(task.class_names, tuple) and all(isinstance(name, str) for name in task.class_names)):
        raise InvalidTask(
            f'`class_names` must be a tuple of strings, got {task.class_names!r:.80}. Write `("a", "b")`.'
        )
    if not isinstance(task.corruptions, Mapping):
        kind = type(task.corruptions).__name__
        raise InvalidTask(f'`corruptions` must map names to functions, got {kind}. Write `{{"name": function}}`.')
    named = [("name", task.name), ("metric", task.metric), *(("class_names", n) for n in task.class_names)]
    for field, text in [*named, *((f, n) for f in ("metrics", "corruptions") for n in getattr(task, f))]:
        is_line = isinstance(text, str) and text.isprintable() and text == text.strip()
        if not is_line or not 1 <= len(text) <= _LONGEST_TEXT:
            rule = f"`{field}` must be a text of 1 to {_LONGEST_TEXT} characters on one line"
            raise InvalidTask(f"{rule}, got {text!r:.80}. It stands in tables and titles.")
    functions = {"score": task.score, "loss": task.loss}
    functions |= {f"corruptions[{name!r}]": change for name, change in task.corruptions.items()}
    for field, function in functions.items():
        if not callable(function):
            kind = type(function).__name__
            of = "(inputs, severity)" if field.startswith("corruptions") else "(output, targets)"
            raise InvalidTask(f"`{field}` must be a function of {of}, got {kind}. Pass it without a call.")
    if wrong := [name for name, metric in task.metrics.items() if not callable(metric)]:
        raise InvalidTask(f"`metrics[{wrong[0]!r}]` must be a function of a set's outputs and targets, or a `Metric`.")


def _check_corruptions(task: Task) -> None:
    """Check the task's own corruptions at each severity on a batch of `test`."""
    inputs = next(batches(data.without_outputs(task.test), len(task.example[0])))[0]
    for name, change in task.corruptions.items():
        if name in _CONDITIONS:
            raise InvalidTask(f"`corruptions` must not be called {options(_CONDITIONS)}, got {name!r}. Rename it.")
        for severity in SEVERITIES:
            first, second = (corrupted(name, change, inputs, severity) for _ in range(2))
            if list(map(raw_bytes, first)) != list(map(raw_bytes, second)):
                raise InvalidTask(
                    f"`corruptions[{name!r}]` must return the same for the same inputs and severity, because each "
                    f"variant must see the same inputs, but two calls at severity {severity} differ. Draw from "
                    "`torch.Generator().manual_seed(severity)`, and keep no state from call to call."
                )


def corrupted(name: str, change: Callable[[Example, int], Any], inputs: Example, severity: int) -> Example:
    """Return what a task's own corruption makes of a batch of inputs, which it gets a copy of.

    Raises:
        InvalidTask: It fails, or returns inputs of other shapes or types, or values that are not finite.
    """
    where = f"`corruptions[{name!r}]`"
    with blaming(f"{where} must accept a batch of inputs, a tuple, and a severity from 1 to 5, such as {severity}"):
        changed = change(tuple(x.clone() for x in inputs), severity)
        changed = (changed,) if isinstance(changed, Tensor) else tuple(changed)
    before, after = (
        [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else type(x) for x in xs] for xs in (inputs, changed)
    )
    if before != after:
        raise InvalidTask(
            f"{where} must return inputs of the same shapes and types, {before}, got {after} at severity {severity}. "
            "Return a tuple with one tensor for each input, and convert them with `.to(x.dtype)`."
        )
    if not all(map(_finite, changed)):
        raise InvalidTask(f"{where} must return finite values, but at severity {severity} some are not. Clamp them.")
    return changed


# --- the model


def check_model(model: nn.Module, example: Example) -> None:
    """Check that a model can be exported and timed with `example`; raises InvalidTask otherwise.

    It must be in eval mode and on the CPU, with names that can be saved, and give finite outputs, batch first, that
    depend on nothing but the example's own inputs. Both are left unchanged.
    """
    if isinstance(model, nn.Module):
        _check_memory(model)
    _check_module(model, example)
    _check_names(model)
    with blaming("The model must accept `example`"), torch.no_grad():
        before = [raw_bytes(x) for x in example]
        output, repeated = (outputs.tensors(model(*example)) for _ in range(2))
    if before != [raw_bytes(x) for x in example]:
        raise InvalidTask("The model must leave its inputs unchanged, but it wrote to `example`. Use no in-place step.")
    size = len(example[0])
    if not output or output[0].shape[:1] != (size,):
        got = f"has the shape {tuple(output[0].shape)}" if output else "holds no tensor"
        raise InvalidTask(
            f"The model must return a tensor with the batch first: `example` holds {size} examples, the output {got}. "
            "Use `batch_first=True` or move the batch dimension to the front."
        )
    if not all(map(_finite, output)):
        raise InvalidTask("The model's outputs must be finite, but on `example` some are not. Check its weights.")
    if not outputs.close(output, repeated):
        raise InvalidTask(f"{_SAME}, but two calls on `example` differ. {_STATELESS}")
    first = tuple(x[:1] for x in example)
    with blaming("The model must accept a batch of any size, such as the first of `example` alone"), torch.no_grad():
        alone = outputs.tensors(model(*first))
    if not outputs.close(alone[:1], [output[0][:1]]):
        raise InvalidTask(_MIXES.format("the first of `example` alone"))
    _check_repeated_calls(model, first)


def _check_workloads(task: Task) -> None:
    """Check that workloads are inputs like `example`, of other sizes only where sizes vary, and can be computed."""
    parameters = list(inspect.signature(task.model.forward).parameters)
    names = [*parameters, *outputs.names(task.example)[len(parameters) :]]
    dims = task.varying or [frozenset[int]()] * len(task.example)
    for workload, inputs in task.workloads.items():
        for name, x, like, own in zip(names, inputs, task.example, dims, strict=False):
            where = f"The input `{name}` of `workloads[{workload!r}]`"
            if (x.dtype, x.dim(), x.device.type) != (like.dtype, like.dim(), "cpu"):
                raise InvalidTask(
                    f"{where} must have the dtype and number of dimensions of `example`, {like.dtype} and "
                    f"{like.dim()}, on the CPU, got {x.dtype} and {x.dim()} on {x.device}. Convert it."
                )
            if wrong := [d for d in range(1, x.dim()) if d not in own and x.shape[d] != like.shape[d]]:
                d = wrong[0]
                raise InvalidTask(
                    f"{where} must have the size of `example` in dimension {d}, which does not vary, {like.shape[d]}, "
                    f"got {x.shape[d]}. Pad or cut it; if sizes may differ there, give data that do and `collate`, or "
                    f"name the dimension in `varying`."
                )
            if len(x) != len(inputs[0]) or not len(x):
                raise InvalidTask(f"{where} must have the batch of the others, {len(inputs[0])}, got {len(x)}.")
        _output(task.model, inputs, f"workloads[{workload!r}]")


def _check_module(model: nn.Module, example: Example) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidTask(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidTask(
            f"`model` must be Python code, which can be exported and pruned, got TorchScript ({model.original_name}). "
            "Build the model from its class, and load its weights."
        )
    if training := [name or "model" for name, m in model.named_modules() if m.training]:
        text = f"`model` must be in eval mode, but `{training[0]}` is in training mode."
        raise InvalidTask(f"{text} Call `model.eval()`.")
    if isinstance(example, Mapping):
        with blaming("The model must accept `example` as keywords"), torch.no_grad():
            model(**{str(key): value for key, value in example.items()})
    if not isinstance(example, tuple) or not all(isinstance(x, Tensor) for x in example):
        kind = type(example).__name__
        kind += f" of {', '.join(type(x).__name__ for x in example)}" if isinstance(example, tuple) else ""
        rule = "`example` must be a tensor, a tuple of arguments or a mapping of keywords"
        raise InvalidTask(f"{rule}, got {kind}. For one input write `example=inputs`.")
    shapes = [tuple(x.shape) for x in example]
    if not shapes or any(not s or s[0] != shapes[0][0] or not s[0] for s in shapes):
        raise InvalidTask(f"`example` must hold tensors of one batch size >= 1, got shapes {shapes}. Put it first.")
    tensors = [*example, *model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(t) for t in tensors):
        raise InvalidTask("Every parameter must have a shape, but some are lazy. Call the model once on `example`.")
    if devices := ", ".join(sorted({str(t.device) for t in tensors} - {"cpu"})):
        text = f"`model` and `example` must be on the CPU, found {devices}."
        raise InvalidTask(f"{text} Call `.cpu()`; a target names the device.")


def _check_memory(model: nn.Module) -> None:
    """Check that copies of the model fit into memory; raises InvalidTask with what they need otherwise."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    weights, unloaded = sum(t.nbytes for t in tensors), sum(t.nbytes for t in tensors if t.is_meta)
    needed, free = _COPIES * weights + unloaded, psutil.virtual_memory().available
    if needed > free:
        raise InvalidTask(
            f"A model of {formats.size(weights)} needs about {formats.size(round(needed))} of free memory to be "
            f"compressed: the variant, and what a runtime holds while it makes a file. {formats.size(free)} are free. "
            "Use a machine with more memory, or a smaller model."
        )


def _check_names(model: nn.Module) -> None:
    """Check that torch can write the names of modules, parameters and buffers into code and archives."""
    named = [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]
    for name in dict.fromkeys(name for name, _ in named):
        first, *rest = name.split(".")
        if first in _RESERVED or any(part in keyword.kwlist for part in (first, *rest)):
            why = "need themselves" if first in _RESERVED else "cannot spell"
            raise InvalidTask(
                f"The model's part `{name}` must have a name that torch.export can save, and {first!r} is one that its "
                f"graphs {why}. Rename it, for example to `{first}_`."
            )
        if len(name) > _LONGEST_NAME or not re.fullmatch(r"[\w ./:+-]*", name):
            rule = "Names in a model must be letters, digits, `_`, `-`, `/`, `:`, `+` and spaces, at most"
            raise InvalidTask(f"{rule} {_LONGEST_NAME} characters, got {name!r:.80}. Rename it.")


def _check_repeated_calls(model: nn.Module, inputs: Example) -> None:
    """Check that many calls give the same outputs and, after the first, leave the model unchanged."""
    before, start = _state(model), time.monotonic()
    with torch.no_grad():
        first = outputs.tensors(model(*inputs))
        for call in range(_CALLS):
            if not outputs.close(outputs.tensors(model(*inputs)), first):
                raise InvalidTask(f"{_SAME}, but call {call + 2} on the first of `example` differs. {_STATELESS}")
            if time.monotonic() - start > _CALLS_S:
                break
    after = _state(model)
    if changed := [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]:
        raise InvalidTask(
            f"The model must leave itself unchanged when it is called, but `{min(changed)}` changes from call to call. "
            f"A file of it would not, or not alike. {_STATELESS}"
        )


def _state(model: nn.Module) -> dict[str, object]:
    """Return what modules hold, by name: hashes of tensors, numbers, texts, and lengths of containers."""
    state: dict[str, object] = {}
    for prefix, module in model.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            key = f"{prefix}.{name}".removeprefix(".")
            if isinstance(value, Tensor):
                state[key] = hashlib.sha256(raw_bytes(value)).digest()
            elif isinstance(value, int | float | str):
                state[key] = value
            elif isinstance(value, list | tuple | dict | set | deque):
                state[key] = len(value)
    return state


def _check_batch_independence(model: nn.Module, inputs: Example) -> None:
    """Check that the output for an example depends neither on the order nor on the rest of its batch."""
    size = len(inputs[0])
    with blaming(f"The model must accept a batch of any size, such as {size} examples"), torch.no_grad():
        first = outputs.tensors(model(*inputs))[0]
        reverse = outputs.tensors(model(*(x.flip(0) for x in inputs)))[0].flip(0)
        half = outputs.tensors(model(*(x[::2].contiguous() for x in inputs)))[0]
    if not outputs.close([reverse], [first]):
        raise InvalidTask(_MIXES.format(f"a batch of {size} in reverse order"))
    if not outputs.close([half], [first[::2]]):
        raise InvalidTask(_MIXES.format(f"every second of a batch of {size}"))


# --- the splits


def _check_splits(task: Task) -> None:
    sketches = Sketches(task.example)
    for split in SPLITS:
        for inputs, _ in _examples(task, split, _EXAMPLES_COMPARED):
            sketches.add(split, inputs)
        dataset = data.without_outputs(getattr(task, split))
        reads = [outputs.tensors(list(dataset[0])) for _ in range(2 * (split != "train"))]
        if len({b"".join(map(raw_bytes, tensors)) for tensors in reads}) > 1:
            rule = f"`{split}` must give the same example each time, but `{split}[0]` differs when read twice."
            raise InvalidTask(f"{rule} Augment at random in `train` only.")
    for shared, how in ((sketches.equal(), "share"), (sketches.near(), "all but share")):
        if shared:
            numbers = {pair: formats.counted(n, "input") for pair, n in shared.items()}
            pairs = "; ".join(f"`{a}` and `{b}` {how} {number}" for (a, b), number in numbers.items())
            raise InvalidTask(f"Splits must not overlap, but {pairs}. Split once, and remove duplicates before.")
    for split in ("validation", "test"):
        size, repeated = sketches.splits.count(split), sketches.repeats(split)
        if repeated > MOST_REPEATED * size:
            raise InvalidTask(
                f"At most {MOST_REPEATED:.0%} of the examples of `{split}` may repeat the inputs of another, but "
                f"{repeated} of {size} do, so it proves less than its size says. Remove duplicates."
            )


def _examples(task: Task, split: str, most: int) -> Iterator[tuple[Example, Any]]:
    """Yield inputs (as a tuple) and target of at most `most` examples of a split, after checking each."""
    dataset = data.without_outputs(getattr(task, split))
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        kind = type(dataset).__name__
        raise InvalidTask(f"`{split}` must be a map-style dataset (`__len__`, `__getitem__`), got {kind}.")
    with blaming(f"`len({split})` must be a number of examples"):
        size, repeated = len(dataset), len(dataset)
    if size != repeated:
        raise InvalidTask(f"`len({split})` must be the same each time, got {size} and {repeated}. Fix its `__len__`.")
    if size == 0:
        raise InvalidTask(f"`{split}` must hold at least one example, but it is empty. Give each split its own.")
    dims = task.varying or [frozenset[int]()] * len(task.example)
    expected = [(_without(x.shape[1:], d), x.dtype) for x, d in zip(task.example, dims, strict=True)]
    for i in spaced(size, most):
        with blaming(f"`{split}[{i}]` must give (inputs, target), as `len({split})` is {size}"):
            inputs, target = dataset[i]
        inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
        if not isinstance(inputs, tuple | list) or not all(isinstance(x, Tensor) for x in inputs):
            kind = type(inputs).__name__
            raise InvalidTask(f"The inputs of `{split}[{i}]` must be a tensor or a tuple of tensors, got {kind}.")
        if devices := [str(x.device) for x in inputs if x.device.type != "cpu"]:
            raise InvalidTask(f"Each example must be on the CPU, but `{split}[{i}]` is on {devices[0]}. Call `.cpu()`.")
        if (actual := [(_without(x.shape, d), x.dtype) for x, d in zip(inputs, dims, strict=False)]) != expected:
            raise InvalidTask(
                f"Every example must have the shapes and dtypes of `example` without its batch dimension, {expected}, "
                f"but `{split}[{i}]` has {actual}. Make `example` a batch of the data."
            )
        yield tuple(inputs), target


def _without(shape: Sequence[int], varying: Collection[int]) -> tuple[int | None, ...]:
    """Return the shape of an example, None in dimensions that may vary; 1 is its first."""
    return tuple(None if number in varying else size for number, size in enumerate(shape, 1))


def _mixed_batch(task: Task) -> Example:
    """Return inputs of calibration and validation as one batch."""
    half = _BATCH_CHECKED // 2
    if task.varying:
        return data.batch(data.without_outputs(task.validation), range(min(half, len(task.validation))))[0]
    chosen = [inputs for split in ("calibration", "validation") for inputs, _ in _examples(task, split, half)]
    return tuple(torch.stack(tensors) for tensors in zip(*chosen, strict=True))


# --- score and loss

_ALWAYS_WORST = (
    "`{}` must not be at its worst for the original model, but it is {}. The function or the labels are wrong rather "
    "than the model: compare what it is given, such as `output.argmax(1)` and `target`, with their shapes and dtypes."
)


def _worst(metric: Metric) -> float:
    """Return the worst value of a metric; 0 if its range is not known and higher is better."""
    if metric.range:
        return metric.range[0 if metric.higher_is_better else 1]
    return 0.0 if metric.higher_is_better else math.inf


def _set_range(task: Task) -> tuple[float, float]:
    """Check metrics of a whole set on validation and test, and return the smallest and the largest possible value."""
    pairs = [pair for split in ("validation", "test") for pair in _forwards(task, split)]
    size = sum(len(outputs.tensors(output)[0]) for output, _ in pairs)
    with blaming("Outputs and targets of batches must concatenate to those of a set"):
        both = whole(pairs)
    for name, metric in task.metrics.items():
        with blaming(f"`metrics[{name!r}]` must accept the outputs and targets of a set"):
            metric.of_set(*both)
    metric = task.score
    if metric.per_example:
        return 0.0, 0.0
    with blaming(f"`{metric.name}` must accept the outputs and targets of {size} examples"):
        value, repeated = metric.of_set(*both), metric.of_set(*both)
    low, high = metric.range or (min(0.0, value), max(0.0, value))
    if not low <= value <= high:
        problem = f"`{metric.name}` must lie in its `range` {low:g} to {high:g}, got {value:g}."
        raise InvalidTask(f"{problem} Correct `range`.")
    if not math.isclose(value, repeated, rel_tol=1e-6):
        text = f"`{metric.name}` must give the same value for the same outputs, got {value:g} and {repeated:g}."
        raise InvalidTask(f"{text} Leave out what is random, and what it keeps from call to call.")
    if value == _worst(metric):
        raise InvalidTask(_ALWAYS_WORST.format(metric.name, f"{value:g} on {size} examples"))

    def by_chance(seed: int) -> float:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
        with blaming(f"`{metric.name}` must accept shuffled targets"):
            return float(metric.of_set(both[0], outputs.select(both[1], order)))

    chance = [*map(by_chance, range(_PERMUTATIONS))]
    best = max(chance) if metric.higher_is_better else min(chance)
    if not (value > best if metric.higher_is_better else value < best):
        raise InvalidTask(
            f"The model must be better than chance, but its {metric.name} on {size} examples is {value:.4g}, and up to "
            f"{best:.4g} with shuffled targets. Check the metric, its `higher_is_better`, the labels and their order, "
            "and that the model's weights are loaded."
        )
    return low, high


def _forwards(task: Task, split: str) -> Iterator[tuple[Any, Any]]:
    """Yield output and targets of batches of at most 2048 examples of a split; raises if an output is not finite."""
    dataset, batch = data.without_outputs(getattr(task, split)), len(task.example[0])
    chosen = spaced(len(dataset), _EXAMPLES_SCORED)
    for start in range(0, len(chosen), batch):
        where = f"{split}[{chosen[start]}, ...]"
        with blaming(f"The examples `{where}` must stack to a batch"):
            inputs, target = data.batch(dataset, chosen[start : start + batch])
        output = _output(task.model, inputs, where)
        yield output, output if task.is_fidelity else target


def _split_scores(task: Task, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores of at most 2048 examples of a split (one batch of train), in a fixed random order.

    They are scored with their own targets, (n,), with targets of other examples, (n, 4), and with outputs of zeros.
    """
    dataset, batch = getattr(task, split), len(task.example[0])
    chosen = spaced(len(dataset), batch if split == "train" else _EXAMPLES_SCORED)
    chosen = [chosen[i] for i in torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).tolist()]
    scored, halved, previous = list[tuple[Tensor, Tensor, Tensor]](), list[tuple[Tensor, Tensor]](), list[Any]()
    for start in range(0, len(chosen), batch):
        indices = chosen[start : start + batch]
        where = f"{split}[{', '.join(map(str, indices[:8]))}{', ...' * (len(indices) > 8)}]"
        with blaming(f"The examples `{where}` must stack to a batch"):
            # Each is read once, because `train` may be augmented at random.
            examples = [] if task.varying else [dataset[i] for i in indices]
            inputs, target = data.batch(dataset, indices) if task.varying else data.collated(examples)
            targets = [target for _, target in examples]
        output = _output(task.model, inputs, where)
        scores = _scores(task.score, output, target, len(indices), f"`{where}`")
        previous = (previous or targets * _SHIFTS)[-_SHIFTS:]
        shuffled = []
        for shift in range(1, _SHIFTS + 1):
            # Batches of other lengths cannot lend their targets.
            lent = [*previous, *targets][len(previous) - shift :][: len(targets)]
            rolled = partial(torch.roll, shifts=shift, dims=0)
            other = outputs.convert(target, rolled) if task.varying else default_collate(lent)
            shuffled.append(_scores(task.score, output, other, len(indices), f"`{where}` with other targets"))
        zeros = _scores_of_zeros(task.score, output, target, len(indices))
        scored.append((scores, torch.stack(shuffled, 1), zeros))
        if len(indices) > 1 and len(halved) < 2 * _BATCHES_HALVED and not task.varying:
            # With other targets too, because a mean over examples that are all right is right for each.
            size = len(indices) // 2
            inputs, target = data.collated(examples[:size])
            other = default_collate([*previous, *targets][len(previous) - 1 :][:size])
            output = _output(task.model, inputs, where)
            for together, wanted in ((scores, target), (shuffled[0], other)):
                halved.append((together[:size], _scores(task.score, output, wanted, size, f"half of `{where}`")))
        previous = [*previous, *targets]
    if halved:
        _check_score_independence(*(torch.cat(tensors) for tensors in zip(*halved, strict=True)))
    first, second, third = (torch.cat(tensors) for tensors in zip(*scored, strict=True))
    return first, second, third


def _output(model: nn.Module, inputs: Example, where: str) -> Any:
    with blaming(f"The model must accept `{where}`"), torch.no_grad():
        output = model(*inputs)
    if not all(map(_finite, outputs.tensors(output))):
        raise InvalidTask(f"The model's outputs must be finite, but on `{where}` some are not. Check its weights.")
    return output


def _scores(score: Callable[[Any, Any], Tensor], output: Any, target: Any, size: int, where: str) -> Tensor:
    """Return the scores of a batch as float64, (size,), after checking that they are finite, real and repeatable."""
    with blaming(f"`score` must accept the output and targets of {where}"), torch.inference_mode():
        scores, repeated = score(output, target), score(output, target)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (size,):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise InvalidTask(
            f"`score` must return one score per example, a tensor of shape ({size},) for {where}, got {got}. "
            "Leave out the mean over the batch, and reduce all other dimensions; a metric of the whole set is "
            "`score=shrinkkit.Metric(function)`."
        )
    dtype = str(scores.dtype).removeprefix("torch.")
    if scores.is_complex() or scores.device.type != "cpu" or scores.is_quantized:
        problem = f"`score` must return real numbers on the CPU, got {dtype} on {scores.device}."
        raise InvalidTask(f"{problem} Take the real part.")
    overflows = scores.dtype in (torch.int8, torch.uint8, torch.int16)
    if overflows and not bool(((scores == 0) | (scores == 1)).all()):
        text = f"`score` must return numbers that cannot overflow, but {dtype} ends at {torch.iinfo(scores.dtype).max}."
        raise InvalidTask(f"{text} Return `.float()`, before anything is multiplied.")
    values = scores.double()
    if not _finite(values):
        raise InvalidTask(f"`score` must be finite for every example, but on {where} it is not. Define it there.")
    if not bool((values.abs() <= LARGEST_SCORE).all()):
        text = f"`score` must lie within ±{LARGEST_SCORE:g}, got {values.abs().max():g} on {where}."
        raise InvalidTask(f"{text} Use a smaller unit; an integer of that size has overflowed.")
    if not isinstance(repeated, Tensor) or not torch.equal(values, repeated.double()):
        raise InvalidTask(
            f"`score` must give the same scores for the same outputs and targets, but two calls on {where} differ. "
            "Leave out what is random, what it keeps from call to call, and in-place changes of its arguments."
        )
    return values


def _scores_of_zeros(score: Callable[[Any, Any], Tensor], output: Any, target: Any, size: int) -> Tensor:
    """Return the scores of outputs of zeros; -inf where they are undefined."""
    undefined = torch.full((size,), -math.inf, dtype=torch.float64)
    try:
        with torch.inference_mode():
            scores = score(outputs.convert(output, torch.zeros_like), target).double().reshape(size)
    except Exception:  # a user's score may raise anything for such an output
        return undefined
    return torch.where(torch.isfinite(scores), scores, undefined)


def _check_score_independence(together: Tensor, alone: Tensor) -> None:
    """Check that at most a fifth of the examples, for rounding, has another score in a smaller batch."""
    differ = (together - alone).abs() > 1e-3 * together.abs().clamp(min=1.0)
    if int(differ.sum()) > max(1, len(differ) // 5):
        raise InvalidTask(
            f"`score` must not depend on the rest of a batch, but {int(differ.sum())} of {len(differ)} examples have "
            "another score in a smaller one. Take no mean, rank or share over the batch."
        )


def _check_above_chance(scores: Tensor, shuffled: Tensor, zeros: Tensor, metric: Metric) -> None:
    """Check that outputs score better, (n,), than with targets of other examples, (n, several), and than zeros."""
    remedy = "Check the score function, the labels and their order, and that the model's weights are loaded."
    if bool((scores == _worst(metric)).all()) and (metric.range or bool((shuffled >= 0).all())):
        raise InvalidTask(_ALWAYS_WORST.format("score", f"{scores[0]:g} for each of {len(scores)} examples"))
    sign = 1 if metric.higher_is_better else -1
    values, by_others = (sign * scores).numpy(), (sign * shuffled).numpy()
    zeros, scores = torch.where(torch.isfinite(zeros), sign * zeros, zeros), sign * scores
    if not (by_others != values[:, None]).any() and bool((scores == zeros).all()):
        low, high = float(values.min()), float(values.max())
        got = f"{sign * low:g}" if low == high else f"{low:g} to {high:g}"
        raise InvalidTask(
            f"`score` must depend on the outputs, but each of {len(values)} examples has the same score, {got}, by "
            f"another's target and with outputs of zeros. {remedy}"
        )
    # Whether there is any gain at all, not how much might be lost on examples not seen.
    gain = estimate.mean((values - by_others.mean(axis=1)).tolist())
    if not gain.low > 0:
        raise InvalidTask(
            f"The model must score above chance, but over {len(values)} examples its mean score is "
            f"{sign * values.mean():.4g}, and {sign * by_others.mean():.4g} by the targets of other examples "
            f"(difference {gain.value:.4g}, 95 % interval {gain.low:.4g} to {gain.high:.4g}). {remedy}"
        )
    if not values.mean() > zeros.numpy().mean():
        raise InvalidTask(
            f"The model must score above outputs of nothing but zeros, but its mean score is "
            f"{sign * values.mean():.4g}, theirs {sign * zeros.mean():.4g}. {remedy}"
        )


def _check_loss(task: Task) -> None:
    inputs, target = next(batches(task.train, len(task.example[0])))
    with blaming("`loss` must accept the output and targets of a batch"), torch.enable_grad():
        loss = task.loss(task.model(*inputs), target)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidTask(f"`loss` must return a scalar tensor, got {got}. Take the mean over the batch.")
    if not _finite(loss):
        raise InvalidTask(f"`loss` must be finite, got {loss.item()} on the first batch of `train`. Check its targets.")
    if not loss.requires_grad and any(p.requires_grad for p in task.model.parameters()):
        raise InvalidTask("`loss` must be differentiable, but no gradient reaches the model. Compute it with torch.")


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


# --- errors in a user's code


@contextlib.contextmanager
def blaming(rule: str, path: Path | None = None) -> Iterator[None]:
    """Report any error of the user's code in the block as InvalidTask, with its file and line.

    `rule` says what the code must do, as the beginning of a sentence. With `path`, the user's file, the line is the
    last one of that file that was running.
    """
    try:
        yield
    except InvalidTask:
        raise
    # A file that calls sys.exit would otherwise end the caller without a message.
    except (Exception, SystemExit) as error:
        raise InvalidTask(f"{rule}, but {_place(error, path)} raised {type_and_message(error)}.") from error


def type_and_message(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, which a user's class may fail to give."""
    try:
        text = str(error)
    except Exception:  # whatever a user's class raises there
        text = ""
    return f"{type(error).__name__}: {brief(Exception(text))[:300]}" if text.strip() else type(error).__name__


def _place(error: BaseException, path: Path | None) -> str:
    if isinstance(error, SyntaxError) and error.filename and (path is None or error.filename == str(path)):
        return f"{Path(error.filename).name}:{error.lineno}"
    library = (str(Path(torch.__file__).parent), *(str(Path(__file__).with_name(f"{n}.py")) for n in _CALLERS))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(library)]
    frames = [f for f in frames if path is None or f.filename == str(path)] or frames
    if not frames:
        return "it"
    last = frames[-1]
    code = linecache.getline(last.filename, last.lineno or 0).strip()
    return f"{Path(last.filename).name}:{last.lineno}" + (f" (`{code}`)" if code else "")


_CALLERS: Sequence[str] = ("adapters", "checks", "data", "loader", "metrics", "task")
"""Modules here that call a user's code."""
