"""Statistics of BatchNorm layers, measured again on a changed model."""

import random
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.data import Subset

from shrinkkit.tasks import modules
from shrinkkit.tasks.task import Task, batches

EXAMPLES = 1024
"""Training examples, at most, whose statistics replace the old ones."""


@torch.no_grad()
def reestimate(model: nn.Module, task: Task, *, batch_size: int = 32, seed: int = 0) -> str:
    """Set the running statistics in `model` itself to averages over training examples; no label is used.

    They belong to the activations of the model that was trained: fewer channels or other weights move them, and
    training updates them only by `momentum`, which may be 0, and not in frozen layers. Layers of any class that hold
    `running_mean` and `running_var` count; their momentum, mode and every weight stay. `model` is in eval mode, on any
    device; statistics are averaged over batches of `batch_size`, and `seed` is that of the choice of examples. Returns
    what was done, in words; '' if no layer has such statistics.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021 (PreciseBN).
    """
    layers = [m for m in model.modules() if len(_statistics(m)) == 2]
    if not layers:
        return ""
    sums: dict[nn.Module, list[Any]] = {layer: [] for layer in layers}
    hooks = (layer.register_forward_pre_hook(partial(_measure, sums)) for layer in layers)
    size, device = len(task.train), next(model.parameters()).device
    chosen = random.Random(seed).sample(range(size), min(size, EXAMPLES))
    with modules.hooked(hooks), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for inputs, _ in batches(Subset(task.train, chosen), batch_size):
            model(*(x.to(device) for x in inputs))
    for layer, found in sums.items():
        for statistic, total in zip(_statistics(layer), found[1:], strict=False):
            statistic.copy_(total / found[0])
    return f"BatchNorm statistics re-estimated on {len(chosen)} training examples"


def _statistics(module: nn.Module) -> list[Tensor]:
    found = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    return [] if isinstance(module, _InstanceNorm) else [t for t in found if isinstance(t, Tensor)]


def _measure(sums: dict[nn.Module, list[Any]], layer: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Let `layer` normalise by the statistics of this batch, and add them up."""
    x = given[0].transpose(0, 1).flatten(1)
    if x.shape[1] < 2:
        return
    x = x if x.device.type == "mps" else x.double()
    mean = x.mean(1)
    # Six times as fast as `torch.var_mean`.
    found = (mean, (x - mean[:, None]).square_().sum(1) / (x.shape[1] - 1))
    for statistic, value in zip(_statistics(layer), found, strict=True):
        statistic.copy_(value)
    before = sums[layer] or [0, 0, 0]
    sums[layer] = [before[0] + 1, *(total + value for total, value in zip(before[1:], found, strict=True))]
