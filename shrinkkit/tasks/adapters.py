"""Tasks from what people have: a Hugging Face model and its data, a timm model, or a model and a DataLoader."""

import copy
import inspect
import itertools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from shrinkkit import quiet
from shrinkkit.errors import InvalidInput, InvalidTask, Unsupported, brief, options, require
from shrinkkit.tasks import data, outputs
from shrinkkit.tasks.calls import PRESENT, TARGET_KEYS
from shrinkkit.tasks.checks import blaming
from shrinkkit.tasks.task import Task

KINDS = {
    "text-classification": (("ForSequenceClassification",), "AutoModelForSequenceClassification"),
    "token-classification": (("ForTokenClassification",), "AutoModelForTokenClassification"),
    "causal-lm": (("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM"),
    "image-classification": (("ForImageClassification",), "AutoModelForImageClassification"),
    "object-detection": (("ForObjectDetection",), "AutoModelForObjectDetection"),
    "feature-extraction": (("Model",), "AutoModel"),
}
"""By task, in the order in which they are tried: endings of its architectures, and the class that loads them."""
COLUMNS = {
    "text": ("text", "sentence", "content", "tokens", "words", "input_ids"),
    "text_pair": ("text_pair", "sentence2"),
    "image": ("image", "img", "pixel_values"),
    "label": (*TARGET_KEYS, "ner_tags", "tags"),
}
"""Usual names of the columns of a dataset. `input_ids` and `pixel_values` are processed already."""
_CACHE = (
    f"The inputs past_key_values.* are the cache: empty for a prompt, then the outputs {PRESENT}.* of the call before; "
    "attention_mask covers the cache and input_ids."
)
IGNORED = -100
"""Label of a token that is not scored."""


def from_transformers(
    path_or_model: Any,
    dataset: Any,
    *,
    task: str = "",
    tokenizer: Any = None,
    processor: Any = None,
    columns: Mapping[str, str] = MappingProxyType({}),
    max_length: int | None = None,
    padding: str = "max_length",
    batch_size: int = 8,
    cache: bool = True,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **fields: Any,
) -> Task:
    """Return the task of a Hugging Face model and a dataset of texts or images, labelled or not.

    The score is accuracy for labelled classification, per-token accuracy for token classification, and the mean
    log-likelihood per token for `causal-lm` (perplexity is the exponential of its negative). Otherwise it is fidelity
    to the original. Repeated texts are left out. The tokenizer or processor is saved next to the model files.

    A causal language model has its cache as inputs `past_key_values.0.key` ..., (batch, heads, past, width), and as
    outputs `present.0.key` ...; the attention mask, (batch, past + length), covers both. One file thus reads a prompt
    (past 0, which is what `test` is scored on) and generates (length 1). Both are workloads, in tokens per second.

    Args:
        path_or_model: A folder of `save_pretrained`, a name on the Hugging Face hub, or a model in eval mode.
        dataset: A list of texts, images or dicts, or one split of a Hugging Face dataset.
        task: One of `KINDS`; by default that of the model's architecture.
        tokenizer: Of texts; by default the one in `path_or_model`.
        processor: Of images; by default the one in `path_or_model`.
        columns: The dataset's names for `text`, `text_pair`, `image` and `label`, where they differ from `COLUMNS`.
        max_length: Tokens to which texts are cut; by default the most that the model takes.
        padding: `max_length` pads texts to the longest of all, `longest` to the longest of their batch. Files then take
            any length, as those of a language model with a cache do, and latency is measured at several.
        batch_size: Of the task's example, >= 1.
        cache: Whether a causal language model has its cache as inputs and outputs. Without it, attention heads can be
            pruned, and every token that is generated costs a call on the whole text.
        settings: Of each call of the tokenizer or processor, such as `{"size": {"height": 224, "width": 224}}`.
        **fields: Of `Task`, such as `name`, `loss`, or a `score` of output and labels in place of the above.

    Returns:
        The task, not checked; see `check_task`.

    Raises:
        InvalidInput: There is no such folder and no such name on the hub, or no network; or `task` or `padding` is
            unknown.
        InvalidTask: The dataset is empty, lacks a column, or has labels or token ids that the model does not know.
        Unsupported: transformers is not installed, or the model's architecture has none of the tasks.
    """
    transformers = require("transformers", extra="transformers", purpose="A Hugging Face model")
    model, kind, stored = _pretrained_model(transformers, path_or_model, task)
    is_image = model.main_input_name == "pixel_values"
    role, auto = ("image", "AutoImageProcessor") if is_image else ("text", "AutoTokenizer")
    prepare = processor if is_image else tokenizer
    if prepare is None:
        if isinstance(path_or_model, nn.Module):
            argument = "processor" if is_image else "tokenizer"
            raise InvalidInput(f"`{argument}` must be given with a model that is loaded already. Pass the model's own.")
        prepare = _from_pretrained(getattr(transformers, auto), path_or_model)
    rows, config, is_own = _Rows(dataset, role, columns), model.config, fields.get("score") is not None
    is_scored = kind == "causal-lm" or (rows.is_labelled and (is_own or kind in _SCORES))

    def target(label: Any, row: int, inputs: Mapping[str, Tensor], words: Sequence[int | None]) -> Any:
        if not is_scored:
            return None
        if kind == "causal-lm":
            return _next_tokens(inputs, row)
        if kind == "token-classification":
            return _word_labels(label, words, config, row)
        return torch.as_tensor(label) if is_own else _class(label, config.label2id, config.num_labels, row)

    if is_image:
        notes: tuple[str, ...] = rows.notes
        prepared: Any = data.Mapped(len(rows), lambda i: _image(rows, i, prepare, model, settings, target))
        call = "images=[image], "
    else:
        if padding not in ("max_length", "longest"):
            raise InvalidInput(f"`padding` must be 'max_length' or 'longest', got {padding!r}.")
        is_cached = kind == "causal-lm" and cache
        by_batch = padding == "longest" and not is_cached
        prepare = _padding(prepare, kind)
        prepared, length, notes = _texts(rows, prepare, model, max_length, settings, target, by_batch=by_batch)
        call = f'text, padding="{padding}", max_length={length}, truncation=True, '
        if by_batch:
            fields = {"collate": partial(_collate, prepare)} | fields
        if is_cached:
            try:
                model, prepared, more = _cached(transformers, model, prepared, batch_size)
                fields, notes = more | fields, (*notes, _CACHE)
            except Exception as error:  # architectures differ in what they keep
                reason = f"The model's cache cannot be its inputs, so whole texts are computed: {brief(error)}."
                notes = (*notes, reason)
    if stored not in (None, torch.float32):
        notes = (*notes, f"The weights, stored in {str(stored).removeprefix('torch.')}, are computed in float32.")
    if rows.is_labelled and not is_scored:
        notes = (*notes, f"Labels are not used, because {kind} has no score by default. Pass `score`.")
    if is_scored and not is_own:
        fields |= dict(zip(("metric", "score"), _SCORES[kind], strict=True))
    if kind in ("text-classification", "image-classification"):
        names = (" ".join(str(config.id2label[i]).split())[:80].strip() for i in range(config.num_labels))
        fields = {"class_names": tuple(names)} | fields
    if not isinstance(path_or_model, nn.Module):
        fields = {"name": Path(os.path.abspath(path_or_model)).name} | fields
    call += "".join(f"{key}={value!r}, " for key, value in settings.items())
    companions = {f'transformers.{auto}.from_pretrained(".")({call}return_tensors="np")': prepare}
    return _task(model, prepared, is_scored, batch_size, notes, companions=companions, **fields)


def from_timm(
    name_or_model: Any,
    dataset: Any,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
    batch_size: int = 8,
    **fields: Any,
) -> Task:
    """Return the task of a timm model and a dataset of images, labelled with its classes or not.

    Images are transformed as the model's own data configuration says; tensors are taken as they are. The score is
    accuracy with labels, else fidelity to the original.

    Args:
        name_or_model: A name such as `resnet18.a1_in1k`, or a model in eval mode.
        dataset: A list of images, tensors, dicts or pairs of (image, label), a map-style dataset, or a loader of one.
        checkpoint: File with the weights of the model that is named; None loads its pretrained weights from the hub.
        num_classes: Of the weights in `checkpoint`; None takes the model's usual number.
        columns: The dataset's names for `image` and `label`, where they differ from `COLUMNS`.
        batch_size: Of the task's example, >= 1.
        **fields: Of `Task`, such as `name`, `class_names`, `loss`, or a `score` of output and labels.

    Returns:
        The task, not checked; see `check_task`.

    Raises:
        InvalidInput: The model cannot be made, or its weights not be loaded.
        InvalidTask: The dataset is empty, lacks a column, or has labels that are not classes of the model.
        Unsupported: timm is not installed.
    """
    timm = require("timm", extra="timm", purpose="A timm model")
    model = name_or_model
    if isinstance(model, str):
        weights: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        weights |= {"checkpoint_path": os.fspath(checkpoint)} if checkpoint else {"pretrained": True}
        try:
            with quiet.libraries():
                model = timm.create_model(name_or_model, **weights).eval()
        except Exception as error:  # of timm, the hub, torch.load or the network
            text = f"`name_or_model` must name a timm model with weights that load, got {model!r}: {brief(error)}."
            remedy = "Without a network, pass a file of weights as `checkpoint`, or a model."
            raise InvalidInput(f"{text} {remedy}") from error
        fields = {"name": name_or_model} | fields
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    rows = _Rows(dataset, "image", columns)

    is_own = fields.get("score") is not None

    def row(i: int) -> tuple[Tensor, Any]:
        image, label = rows[i]
        inputs = image if isinstance(image, Tensor) else transform(_opened(image))
        if not rows.is_labelled:
            return inputs, None
        return inputs, torch.as_tensor(label) if is_own else _class(label, {}, model.num_classes, i)

    if rows.is_labelled and not is_own:
        fields |= {"metric": "accuracy", "score": _accuracy}
    return _task(model, data.Mapped(len(rows), row), rows.is_labelled, batch_size, rows.notes, **fields)


def from_loader(
    model: nn.Module, test_loader: Any, *, score: Any = None, loss: Any = None, train_loader: Any = None, **fields: Any
) -> Task:
    """Return the task of a model and a DataLoader of its test data; its example is the first batch.

    Without a score it is accuracy, if targets are integer classes of the output's last dimension; fine-tuning on
    `train_loader` then minimises the cross-entropy. Otherwise it is fidelity to the original, and fine-tuning distils.

    Args:
        model: In eval mode, on the CPU.
        test_loader: A DataLoader, or any iterable of batches, of `(inputs, target)`, of `(*inputs, target)`, of
            mappings with the names of the model's arguments and `labels`, or of inputs alone.
        score: As in `Task`.
        loss: As in `Task`.
        train_loader: The same of training data.
        **fields: Of `Task`, such as `name`, `metric` or `class_names`.

    Returns:
        The task, not checked; see `check_task`.

    Raises:
        InvalidTask: A loader is empty, its batches have another form, or the model does not accept them.
    """
    rows, batch_size, notes = _loaded_rows(model, test_loader, "test_loader")
    is_labelled = rows[0][1] is not None
    if is_labelled and score is None and not any(module.training for module in model.modules()):
        inputs, target = default_collate([rows[i] for i in range(batch_size)])
        arguments = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        with blaming("The model must accept the first batch of `test_loader`"), torch.no_grad():
            output = model(**inputs) if isinstance(inputs, dict) else model(*arguments)
        if _are_classes(output, target):
            fields, score = {"metric": "accuracy"} | fields, _accuracy
            loss = _cross_entropy if loss is None and train_loader is not None else loss
        else:
            notes = (*notes, "Targets are not used, because they are not integer classes of the output. Pass `score`.")
    if train_loader is not None:
        train, _, more = _loaded_rows(model, train_loader, "train_loader")
        notes, fields = (*notes, *more), {"train": train} | fields
    return _task(model, rows, is_labelled and score is not None, batch_size, notes, score=score, loss=loss, **fields)


# --- data


class _Rows:
    """The rows of a dataset as (content, label): texts or words, or images; a mapping if it is processed already."""

    def __init__(self, dataset: Any, role: str, columns: Mapping[str, str]) -> None:
        if isinstance(dataset, Mapping):
            text = f"`dataset` must be one split, got {options([*dataset])}."
            raise InvalidTask(f"{text} Pass one, such as `dataset['test']`.")
        self._rows, note = data.map_style(dataset, "dataset")
        self.notes = (note,) if note else ()
        first = _first(self._rows, "dataset")
        self._columns: dict[str, str] = {}
        if isinstance(first, Mapping):
            for wanted, usual in COLUMNS.items():
                name = columns.get(wanted) or next((name for name in usual if name in first), "")
                if name in first:
                    self._columns[wanted] = name
                elif wanted == role or wanted in columns:
                    raise InvalidTask(
                        f"`dataset` must have a column {options([name] if name else list(usual))}, but its columns are "
                        f"{', '.join(map(str, first))}. Name yours: `columns={{{wanted!r}: ...}}`."
                    )
            self.is_labelled = "label" in self._columns
        else:
            self.is_labelled = isinstance(first, tuple) and len(first) == 2
        self._role = role

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._rows[index]
        if not self._columns:
            return row if self.is_labelled else (row, None)
        try:
            values = {wanted: row[name] for wanted, name in self._columns.items()}
        except (KeyError, TypeError) as error:
            text = "Every row of `dataset` must have the columns of the first,"
            raise InvalidTask(f"{text} but row {index} has not.") from error
        content, label = values[self._role], values.get("label")
        if self._columns[self._role] in ("input_ids", "pixel_values"):
            return {key: value for key, value in row.items() if key != self._columns.get("label")}, label
        return ((content, values["text_pair"]) if self._role == "text" and "text_pair" in values else content), label


def _first(rows: Any, name: str) -> Any:
    if not hasattr(rows, "__len__"):
        raise InvalidTask(f"`{name}` must be a sequence, a dataset or an iterable, got {type(rows).__name__}.")
    if not len(rows):
        text = f"`{name}` must hold at least one example, but it is empty."
        raise InvalidTask(f"{text} An iterator can be read only once: pass what it iterates over.")
    return rows[0]


def _task(model: nn.Module, prepared: Any, is_scored: bool, batch_size: int, notes: Any, **fields: Any) -> Task:
    """Return a task of rows (inputs, target): its test data if they are scored, else inputs to compare outputs on."""
    if batch_size < 1:
        raise InvalidInput(f"`batch_size` must be at least 1, got {batch_size}.")
    rows = prepared if is_scored else data.Mapped(len(prepared), lambda i: prepared[i][0])
    first = [prepared[i][0] for i in range(min(batch_size, len(prepared)))]
    example = (fields.get("collate") or default_collate)(first)
    fields |= {"notes": (*fields.get("notes", ()), *notes), "test" if is_scored else "inputs": rows}
    return Task(model, tuple(example) if isinstance(example, list) else example, **fields)


def _opened(image: Any, *, channels: int = 3) -> Any:
    """Return an image, an array or the path of one as an image that PIL holds; tensors as they are."""
    from PIL import Image

    if isinstance(image, (str, Path)):
        with blaming(f"{image} must be an image"), Image.open(image) as opened:
            opened.load()
            image = opened
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return image.convert("RGB") if channels == 3 and isinstance(image, Image.Image) else image


def _image(rows: _Rows, i: int, processor: Any, model: Any, settings: Any, target: Any) -> tuple[Any, Any]:
    content, label = rows[i]
    if not isinstance(content, Mapping):
        images = [_opened(content, channels=getattr(model.config, "num_channels", 3))]
        with blaming(f"The processor must accept the image of row {i}"):
            made = processor(images=images, return_tensors="pt", **settings)
        content = {key: value[0] for key, value in made.items()}
    accepted = inspect.signature(model.forward).parameters
    inputs = {key: torch.as_tensor(value) for key, value in content.items() if key in accepted}
    return inputs, target(label, i, inputs, ())


def _padding(tokenizer: Any, kind: str) -> Any:
    """Return a copy of a tokenizer that can pad, behind the text where the model reads from left to right."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            text = "The tokenizer must have a token for padding, but it has none."
            raise InvalidTask(f"{text} Set `tokenizer.pad_token`.")
        tokenizer.pad_token = tokenizer.eos_token
    if kind == "causal-lm":
        tokenizer.padding_side = "right"
    return tokenizer


def _texts(
    rows: _Rows,
    tokenizer: Any,
    model: Any,
    max_length: int | None,
    settings: Mapping[str, Any],
    target: Any,
    *,
    by_batch: bool,
) -> tuple[list[Any], int, tuple[str, ...]]:
    """Return (token ids by name, target) without repeated texts, the longest length, and what was cut or left out.

    Texts are padded to that length, unless batches are padded.
    """
    longest = getattr(model.config, "max_position_embeddings", 0)
    # A tokenizer without a limit says so by a number that it does not take.
    limit = min(filter(None, (max_length or tokenizer.model_max_length, longest, 1 << 31)))
    accepted, size = inspect.signature(model.forward).parameters, model.get_input_embeddings().num_embeddings
    found, cut = dict[tuple[int, ...], tuple[Any, Any, int]](), 0
    for i in range(len(rows)):
        encoded, label = rows[i]
        if not isinstance(encoded, Mapping):
            texts = encoded if isinstance(encoded, tuple) else (encoded,)
            options = {"is_split_into_words": not isinstance(texts[0], str), **settings}
            with blaming(f"The tokenizer must accept row {i}"):
                encoded = tokenizer(*texts, truncation=True, max_length=limit, **options)
            cut += bool(encoded.encodings and encoded.encodings[0].overflowing)
        ids = tuple(map(int, encoded["input_ids"]))
        if not ids or max(ids) >= size or min(ids) < 0:
            wrong = f"has the id {max(ids)}. Use the model's own tokenizer." if ids else "has none. Leave it out."
            text = f"Every text must have tokens of the model, ids from 0 to {size - 1}, but row {i}"
            raise InvalidTask(f"{text} {wrong}")
        found.setdefault(ids, (encoded, label, i))
    length = max(map(len, found))

    def padded(values: Any, fill: Any) -> list[Any]:
        more = [fill] * (0 if by_batch else length - len(values))
        return [*values, *more] if tokenizer.padding_side == "right" else [*more, *values]

    prepared = []
    for encoded, label, i in found.values():
        fills = dict.fromkeys(key for key in encoded if key in accepted) | {"input_ids": tokenizer.pad_token_id}
        inputs = {key: torch.tensor(padded(encoded[key], fill or 0)) for key, fill in fills.items()}
        has_words = getattr(encoded, "encodings", None)
        words = padded(encoded.word_ids(), None) if has_words else range(len(inputs["input_ids"]))
        prepared.append((inputs, target(label, i, inputs, words)))
    notes = [f"{len(rows) - len(found):,} repeated texts were left out."] if len(found) < len(rows) else []
    notes += [f"{cut:,} texts were cut to {limit} tokens."] if cut else []
    return prepared, length, (*rows.notes, *notes)


def _collate(tokenizer: Any, rows: Sequence[Any]) -> Any:
    """Return rows of `_texts`, with or without targets, as a batch that is padded to the longest text."""
    inputs, targets = zip(*rows, strict=True) if isinstance(rows[0], tuple) else (rows, ())
    side, fills = tokenizer.padding_side, {"input_ids": tokenizer.pad_token_id}

    def padded(values: list[Tensor], fill: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill, padding_side=side)

    batch = {key: padded([x[key] for x in inputs], fills.get(key, 0)) for key in inputs[0]}
    if not targets:
        return batch
    wanted = list(targets)
    per_token = isinstance(wanted[0], Tensor) and wanted[0].shape == inputs[0]["input_ids"].shape
    return batch, padded(wanted, IGNORED) if per_token else default_collate(wanted)


# --- causal language models


def _cached(
    transformers: Any, model: Any, prepared: Sequence[Any], batch_size: int
) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    """Return a language model with its cache as inputs and outputs, rows with an empty cache, and fields of its task.

    Modules and weights are shared with `model`, which is left unchanged. Any error may be raised for a model whose
    cache is not a key and a value of each layer.
    """
    kind = type(model)
    takes_positions = "position_ids" in inspect.signature(kind.forward).parameters

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any) -> Any:
        past = transformers.DynamicCache([(layer["key"], layer["value"]) for layer in past_key_values.values()])
        # Padding takes no position.
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        more = {"position_ids": positions} if takes_positions else {}
        options = {"attention_mask": attention_mask, "past_key_values": past, "use_cache": True, **more}
        output = kind.forward(self, input_ids=input_ids, **options)
        layers = enumerate(output.past_key_values.layers)
        return {"logits": output.logits, PRESENT: {str(i): {"key": x.keys, "value": x.values} for i, x in layers}}

    cached: Any = copy.copy(model)
    cached.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        layers = model(input_ids=prepared[0][0]["input_ids"][None], use_cache=True).past_key_values.layers
        empty = {str(i): {"key": x.keys[0, :, :0], "value": x.values[0, :, :0]} for i, x in enumerate(layers)}
        rows = [({**{key: x[key] for key in names}, "past_key_values": empty}, target) for x, target in prepared]
        whole = default_collate([inputs for inputs, _ in rows[: max(1, batch_size)]])
        ids, mask = whole["input_ids"], whole["attention_mask"]
        size = ids.shape[1]
        length = size // 2

        def tokens(start: int, end: int, past: Any) -> dict[str, Any]:
            return {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "past_key_values": past}

        past = cached(**(prompt := tokens(0, length, whole["past_key_values"])))[PRESENT]
        rest = tokens(length, size, past)
        first, second = cached(**whole)["logits"][:, length:], cached(**rest)["logits"]
    if length < 2 or not outputs.close([second], [first]):
        raise ValueError("a text has fewer than four tokens" if length < 2 else "it changes the logits")
    workloads = {
        f"prefill {length} tokens (time to first token)": prompt,
        f"decode 1 token after {length}": tokens(length, length + 1, past),
        f"prefill {size - length} tokens after {length}": rest,
    }
    dims = (frozenset({1}), frozenset({1}), *[frozenset({2})] * (2 * len(empty)))
    return cached, rows, {"workloads": workloads, "varying": dims, "counts_tokens": True}


# --- batches of loaders


def _loaded_rows(model: nn.Module, loader: Any, name: str) -> tuple[data.Mapped, int, tuple[str, ...]]:
    """Return the examples of a loader in the order of its dataset, the size of a batch, and a note on those unread."""
    given: Any = loader
    if isinstance(loader, DataLoader):
        size = loader.batch_size or 0
    else:
        batches = iter(loader)
        first = [*itertools.islice(batches, 1)]
        size = len(outputs.tensors(first)[0]) if first else 0
        given = itertools.chain.from_iterable(map(data.unbatched, itertools.chain(first, batches)))
    source, note = data.map_style(given, name)
    _first(source, name)
    required = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty and p.kind < 2]

    def split(i: int) -> tuple[Any, Any]:
        item = source[i]
        if isinstance(item, Mapping):
            label = next((item[key] for key in TARGET_KEYS if key in item), None)
            return {key: value for key, value in item.items() if key not in TARGET_KEYS}, label
        if not isinstance(item, (tuple, list)):
            return item, None
        if len(item) in (1, len(required)):
            return tuple(item) if len(item) > 1 else item[0], None
        if len(item) in (2, len(required) + 1):
            return item[0] if len(item) == 2 else tuple(item[:-1]), item[-1]
        rule = f"A batch of `{name}` must be (inputs, target), or the model's {len(required)} arguments and a target"
        raise InvalidTask(f"{rule}, got {len(item)} parts. Make the inputs one tuple.")

    return data.Mapped(len(source), split), min(size or 8, len(source)), (note,) if note else ()


# --- models, labels and scores


def _from_pretrained(cls: Any, path: Any, **options: Any) -> Any:
    """Return what `cls.from_pretrained` loads from a folder or the hub, quietly; raises InvalidInput if it fails."""
    try:
        with quiet.libraries():
            return cls.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError) as error:
        what = cls.__name__.removeprefix("Auto")
        if os.path.isdir(path):
            raise InvalidInput(f"The folder {path} must hold what {what} reads, but: {brief(error)}.") from error
        text = f"{os.fspath(path)!r} is no folder here, and the Hugging Face hub failed, as without a network:"
        remedy = "Pass the path of a local folder, which `save_pretrained` writes."
        raise InvalidInput(f"{text} {brief(error)}. {remedy}") from error


def _pretrained_model(transformers: Any, path: Any, task: str) -> tuple[Any, str, torch.dtype | None]:
    """Return the model, float32 and in eval mode, which of `KINDS` it is, and the dtype of the stored weights."""
    if task and task not in KINDS:
        raise InvalidInput(f"`task` must be {options([*KINDS])}, got {task!r}.")
    is_model = isinstance(path, nn.Module)
    config = path.config if is_model else _from_pretrained(transformers.AutoConfig, path)
    name = type(path).__name__ if is_model else (config.architectures or ["none"])[0]
    kind = task or next((kind for kind, (endings, _) in KINDS.items() if name.endswith(endings)), "")
    if not kind:
        text = f"The architecture must have a head for {options([*KINDS])}, but it is {name}."
        raise Unsupported(f"{text} Pass `task`, or make a Task of the model and an example.")
    if is_model:
        return path, kind, None
    loaded = {"dtype": torch.float32, "output_loading_info": True}
    model, info = _from_pretrained(getattr(transformers, KINDS[kind][1]), path, **loaded)
    if missing := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        raise InvalidInput(
            f"{os.fspath(path)} must hold all weights of {type(model).__name__}, but has none for {missing[0]} "
            f"({len(missing)} in all), which would be random. Choose another `task`, or pass a model."
        )
    return model.eval(), kind, config.dtype


def _class(label: Any, names: Mapping[str, int], classes: int, row: int) -> int:
    """Return the index of a class, given as such or by its name."""
    if isinstance(label, str):
        label = names[label] if label in names else int(label) if label.strip().lstrip("-").isdigit() else label
    try:
        index = operator.index(label)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < classes:
        known = sorted(names, key=names.__getitem__)
        named = f", or one of {', '.join(known[:5])}{', ...' * (len(known) > 5)}" if known else ""
        raise InvalidTask(
            f"A label must be the index of a class of the model, 0 to {classes - 1}{named}, but that of row {row} is "
            f"{label!r:.80}. Map the labels, or leave out rows without one; for other targets pass `score`."
        )
    return index


def _word_labels(labels: Any, words: Sequence[int | None], config: Any, row: int) -> Tensor:
    """Return a label for each token: its word's for the first token of a word, else `IGNORED`."""
    target = torch.full((len(words),), IGNORED)
    for i, word in enumerate(words):
        if word is None or word in words[:i] or word >= len(labels):
            continue
        label = labels[word]
        if isinstance(label, str) or int(label) != IGNORED:
            target[i] = _class(label, config.label2id, config.num_labels, row)
    if not (target != IGNORED).any():
        raise InvalidTask(f"Every row must have a token with a label, but row {row} has none. Leave it out.")
    return target


def _next_tokens(inputs: Mapping[str, Tensor], row: int) -> Tensor:
    mask = inputs["attention_mask"]
    if int(mask.sum()) < 2:
        raise InvalidTask(f"Every text must have two tokens, the second to be predicted, but row {row} has one.")
    return torch.where(mask > 0, inputs["input_ids"], IGNORED)


def _logits(output: Any) -> Tensor:
    return outputs.tensors(output)[0]


def _accuracy(output: Any, target: Tensor) -> Tensor:
    return (_logits(output).argmax(-1) == target).float()


def _token_accuracy(output: Any, target: Tensor) -> Tensor:
    counted = target != IGNORED
    return ((_logits(output).argmax(-1) == target) & counted).sum(1) / counted.sum(1)


def _log_likelihood(output: Any, target: Tensor) -> Tensor:
    wanted, counted = target[:, 1:], target[:, 1:] != IGNORED
    logs = _logits(output)[:, :-1].float().log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    return (logs * counted).sum(1) / counted.sum(1)


def _cross_entropy(output: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(_logits(output), target.long())


def _are_classes(output: Any, target: Any) -> bool:
    first = _logits(output)
    is_integer = isinstance(target, Tensor) and not (target.is_floating_point() or target.dtype == torch.bool)
    are_indices = is_integer and target.shape == first.shape[:-1] == first.shape[:1]
    return bool(are_indices and target.min() >= 0 and target.max() < first.shape[-1])


_SCORES: Mapping[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "text-classification": ("accuracy", _accuracy),
    "image-classification": ("accuracy", _accuracy),
    "token-classification": ("accuracy per token", _token_accuracy),
    "causal-lm": ("log-likelihood per token", _log_likelihood),
}
"""Metric and score by task, where there are labels."""
