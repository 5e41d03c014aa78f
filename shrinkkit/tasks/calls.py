"""How a user's model is called: inputs of any structure as positional tensors, outputs in plain containers."""

import copy
import inspect
import keyword
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from shrinkkit.errors import InvalidTask, options
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example

TARGET_KEYS = ("labels", "label", "target")
"""Keys of the target in an example that is one mapping, as Hugging Face datasets and collators name it."""


PRESENT = "present"
"""Name of the outputs that a causal language model takes back as its cache."""


@dataclass(frozen=True)
class Call:
    """The structure of a model's inputs: `example` is a tensor, a tuple of arguments, or a mapping of keywords."""

    example: Any
    is_keywords: bool
    """Whether the keys of a mapping are the names of arguments."""
    constants: Mapping[str, Any]
    """Keywords of every call."""

    def flat(self, inputs: Any, where: str = "The inputs") -> Example:
        """Return the tensors of `inputs`, which have the structure of the example; more keys of a mapping are ignored.

        Raises InvalidTask if one is missing, or is no tensor, array, number or list of numbers.
        """
        return tuple(_leaves(self.example, inputs, where))

    def __call__(self, forward: Any, *tensors: torch.Tensor) -> Any:
        """Return what `forward` returns for flat inputs, in plain containers."""
        inputs = outputs.restore(tensors, self.example)
        if self.is_keywords:
            return outputs.plain(forward(**inputs, **self.constants))
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        return outputs.plain(forward(*arguments, **self.constants))


def call_of(model: nn.Module, example: Any) -> Call:
    """Return how `model` is called with `example`, whose mappings become plain dicts."""
    example = _as_dict(example)
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    is_keywords = isinstance(example, dict) and (takes_any or set(example) <= set(parameters))
    # A cache of keys and values would be a second output, which only the next token needs.
    given = example if isinstance(example, dict) else ()
    constants = {"use_cache": False} if "use_cache" in parameters and "use_cache" not in given else {}
    return Call(example, is_keywords, constants)


def positional(model: nn.Module, call: Call) -> nn.Module:
    """Return `model`, sharing its modules and weights, with a forward of positional tensors and plain outputs.

    Layers keep their names. `model` itself is unchanged.
    """
    kind = type(model)
    if "forward" in vars(model):
        text = "`model.forward` must be the method of its class, but it was replaced on the instance: a copy would"
        raise InvalidTask(f"{text} call the original. Put the change into a module around the model.")
    names = ", ".join(_identifiers(outputs.names(call.example)))
    # The names become those of the inputs in exported files.
    known = {"call": call, "original": kind.forward}
    forward = eval(f"lambda self, {names}: call(original.__get__(self), {names})", known)
    result = copy.copy(model)
    for parts in ("_parameters", "_buffers", "_modules"):
        result.__dict__[parts] = dict(result.__dict__[parts])
    result.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return result


@dataclass(frozen=True)
class Varying:
    """The sizes of a model's inputs that vary."""

    dims: tuple[frozenset[int], ...] = ()
    """For each input the dimensions other than the batch; empty if none."""
    sample: Example = ()
    """Inputs whose varying sizes are all above 1, since exporters take 0 and 1 for constants; empty if none."""


def varying_in(dims: tuple[frozenset[int], ...], known: Iterable[Example]) -> Varying:
    """Return what varies, with the first of the `known` inputs that is a sample of it."""
    above_one = (
        inputs
        for inputs in known
        if all(x.shape[d] > 1 for x, own in zip(inputs, dims, strict=True) for d in own if d < x.dim())
    )
    return Varying(dims, next(above_one, ()))


def varying(model: nn.Module) -> Varying:
    """Return what varies in the inputs of a task's model."""
    return next((vars(module)["varying"] for module in model.modules() if "varying" in vars(module)), Varying())


def _as_dict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_dict(inner) for key, inner in value.items()}
    return type(value)(map(_as_dict, value)) if type(value) in (list, tuple) else value


def _identifiers(names: list[str]) -> list[str]:
    """Return `names` as distinct Python identifiers."""
    result: list[str] = []
    for name in names:
        word = re.sub(r"\W", "_", name)
        word = word if word.isidentifier() and not keyword.iskeyword(word) else f"input_{word}"
        while word in result or word == "self":
            word += "_"
        result.append(word)
    return result


def _leaves(like: Any, value: Any, where: str) -> Iterator[torch.Tensor]:
    if isinstance(like, torch.Tensor):
        yield value if isinstance(value, torch.Tensor) else _tensor(value, like.dtype, where)
    elif isinstance(like, dict):
        if not isinstance(value, Mapping) or (missing := [key for key in like if key not in value]):
            got = f"{options(missing)} is missing" if isinstance(value, Mapping) else f"got {type(value).__name__}"
            text = f"{where} must hold the keys of `example`, {', '.join(like)}, but {got}."
            raise InvalidTask(f"{text} Add what is missing.")
        for key, inner in like.items():
            yield from _leaves(inner, value[key], f"{where}[{key!r}]")
    elif isinstance(like, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) != len(like):
            got = f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__
            raise InvalidTask(f"{where} must hold {len(like)} values, as `example` does, got {got}.")
        for number, inner in enumerate(like):
            yield from _leaves(inner, value[number], f"{where}[{number}]")


def _tensor(value: Any, dtype: torch.dtype, where: str) -> torch.Tensor:
    try:
        array = np.asarray(value)
        # Python's numbers have 64 bits. Fractions must not become integers.
        return torch.as_tensor(array, dtype=dtype if dtype.is_floating_point or array.dtype.kind in "iub" else None)
    except (TypeError, ValueError) as error:
        text = f"{where} must be a tensor, an array or numbers, got {type(value).__name__} {value!r:.40}."
        raise InvalidTask(f"{text} Convert it in the dataset, or leave the key out of `example`.") from error
