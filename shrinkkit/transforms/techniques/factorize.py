"""Low rank: a Linear layer or a 1x1 convolution becomes two with few channels between them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from shrinkkit.core.stages import Factorize
from shrinkkit.display import formats
from shrinkkit.errors import NothingChanged
from shrinkkit.progress import Progress, no_progress
from shrinkkit.runtimes import layers as layer_report
from shrinkkit.tasks import modules
from shrinkkit.tasks.modules import FORWARD_ERRORS
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import moments, variants
from shrinkkit.transforms.groups import is_linear
from shrinkkit.transforms.moments import Moments
from shrinkkit.transforms.transform import Made

Factor = nn.Linear | nn.Conv2d
DAMPING = 1e-3
"""Added to the variance of each input, as a share of their mean: what calibration data lack is not removed for free."""


@torch.inference_mode(False)
@torch.no_grad()
def apply(
    model: nn.Module, task: Task, settings: Factorize, *, seed: int = 0, progress: Progress = no_progress
) -> Made:
    """Apply the transform `factorize`: each layer's output is projected onto its principal components.

    For inputs like those of the calibration split that is the closest output of any layer of this rank; a bias takes
    up the mean. Nothing is random. Raises NothingChanged, with the reason of each layer, if none gets smaller.

    Source: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition", ICLR 2025.
    """
    layers = {name: layer for name, layer in model.named_modules() if name and _is_covered(layer)}
    skipped, tied = modules.matching(layers, settings.skip), layer_report.tied(model)
    ratios = {name: ratio for pattern, ratio in settings.layers.items() for name in modules.matching(layers, [pattern])}
    left_alone = {
        name: f"shares its weights with `{other}`" for name, names in tied.items() for other in names if name != other
    }
    left_alone |= dict.fromkeys(skipped, "is in `skip`")
    names = [name for name in layers if name not in left_alone]
    result, ranks, few = modules.duplicate(model), dict[str, int](), list[str]()
    inputs = variants.calibration(task, settings.calibration_examples)
    for done, (name, found) in enumerate(moments.of(model, names, inputs)):
        progress(done, len(names), name)
        factors, reason = _factors(layers[name], found, settings, ratios.get(name))
        if factors and not (reason := _replace(result, name, factors, task)):
            ranks[name] = len(factors[0].weight)
            few += [name] if found.rows < found.mean.shape[1] else []
        left_alone |= {name: reason} if reason else {}
    progress(len(names), len(names), "factorized")
    if not ranks:
        why = "; ".join(f"`{name}` {reason}" for name, reason in left_alone.items() if name in layers)
        raise NothingChanged(f"No layer can be factorized: {why or 'the model has none'}.")
    span = " to ".join(str(rank) for rank in sorted({min(ranks.values()), max(ranks.values())}))
    notes = [f"{formats.counted(len(ranks), 'layer')} factorized, with rank {span}"]
    if few:
        notes.append(f"fewer calibration inputs than input channels for {', '.join(few)}; raise `calibration_examples`")
    return Made(result.eval(), tuple(notes), {name: why for name, why in left_alone.items() if name in layers})


def _is_covered(layer: nn.Module) -> bool:
    is_pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    return is_linear(layer) or is_pointwise


def _factors(layer: nn.Module, found: Moments, settings: Factorize, ratio: float | None) -> tuple[list[Factor], str]:
    """Return the two layers in the place of `layer`; none, and the reason, if they would not be smaller."""
    if not found.rows:
        return [], "is not called as a layer when the model runs"
    weight, mean, second = moments.matrix(layer)[0].double(), found.mean[0], found.second[0]
    bias = layer.bias.detach().double() if isinstance(layer.bias, Tensor) else None
    covariance = second - mean[:, None] * mean if bias is not None else second
    variance = covariance.diagonal().mean()
    # Moments are sums of float32 products: smaller variances are rounding.
    if not variance > 1e-6 * second.diagonal().mean():
        return [], "has the same inputs for every calibration example"
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root = vectors * (eigenvalues.clamp(min=0) + DAMPING * variance).sqrt()
    left, values, _ = torch.linalg.svd(weight @ root, full_matrices=False)
    size, limit = weight.numel(), math.ceil(weight.numel() / sum(weight.shape))
    energies = values.square().cumsum(0) / values.square().sum()
    ratio = settings.ratio if ratio is None else ratio
    if ratio is not None:
        rank, asked = max(1, int((1 - ratio) * size / sum(weight.shape))), f"to lose {formats.percent(ratio)}"
    elif settings.energy is not None:
        rank = min(int((energies < settings.energy - 1e-12).sum()) + 1, len(values))
        asked = f"to keep {formats.percent(settings.energy)} of its output"
    else:
        rank, asked = settings.rank or 1, "by `rank`"
    if rank >= limit:
        return [], f"has rank {rank} {asked}, and two layers are smaller than one only below rank {limit}"
    wide = left[:, :rank]
    narrow = wide.T @ weight
    if bias is not None:
        bias = bias + (weight - wide @ narrow) @ mean
    return [_like(layer, narrow, None), _like(layer, wide, bias)], ""


def _like(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Factor:
    """Return a layer of the kind of `layer`; the first of the two, without bias, has its stride and padding."""
    outputs, inputs = weight.shape
    options: dict[str, Any] = {"bias": bias is not None, "dtype": layer.get_parameter("weight").dtype}
    new: Factor
    if isinstance(layer, nn.Conv2d):
        if inputs == layer.in_channels and bias is None:
            options |= {"stride": layer.stride, "padding": layer.padding, "padding_mode": layer.padding_mode}
        new = nn.Conv2d(inputs, outputs, 1, **options)
    else:
        new = nn.Linear(inputs, outputs, **options)
    new.weight.copy_(weight.reshape(new.weight.shape))
    if bias is not None:
        new.get_parameter("bias").copy_(bias)
    return new.requires_grad_(layer.get_parameter("weight").requires_grad)


def _replace(result: nn.Module, name: str, factors: list[Factor], task: Task) -> str:
    """Put `factors` in the place of a layer of `result`, or return why the model does not run with them."""
    layer, changed = result.get_submodule(name), list[tuple[nn.TransformerEncoderLayer, Any]]()
    places = [other for other, module in result.named_modules(remove_duplicate=False) if module is layer]
    if isinstance(result.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
        for module in result.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                # 0 switches off torch's fused path, which reads weights and calls no layer.
                changed.append((module, module.activation_relu_or_gelu))
                module.activation_relu_or_gelu = 0
    pair = nn.Sequential(*factors)
    for place in places:
        result.set_submodule(place, pair)
    try:
        result(*(x.cpu() for x in task.example))
    except FORWARD_ERRORS as error:
        for place in places:
            result.set_submodule(place, layer)
        for module, before in changed:
            module.activation_relu_or_gelu = before
        return f"is used by the model other than by calling it: {type(error).__name__}: {error}"
    return ""
