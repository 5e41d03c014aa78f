"""Changes of a batch of inputs that a deployed model has to live with, at five severities, by the kind of input.

Severities of images are those of ImageNet-C (contrast and brightness: CIFAR-10-C), in units of the range of values;
lengths are shares of an image's side.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019.
"""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset

from shrinkkit.core.robustness import SEVERITIES
from shrinkkit.errors import InvalidInput, options
from shrinkkit.measure import scoring
from shrinkkit.tasks import checks
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task, batches, spaced

AUDIO = 256
"""Values of a one-dimensional input from which on it counts as a waveform, not as a vector of features."""
OBSERVED = 256
"""Examples from which the range of values is taken."""


@dataclass(frozen=True)
class Range:
    """What values an input has, each of a shape that broadcasts to a batch."""

    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor

    @property
    def width(self) -> Tensor:
        """The largest minus the smallest value, at least a tiny number."""
        return (self.high - self.low).clamp(min=1e-12)


Change = Callable[[Tensor, float, Range, torch.Generator], Tensor]
"""(batch, strength, range, generator) -> batch of the same shape."""


@dataclass(frozen=True)
class Corruption:
    """One change of inputs: of one of them, or for a function of the task's own, of all."""

    name: str
    levels: tuple[float, ...]
    """Strength at each severity."""
    change: Change | Callable[[Example, int], Example]
    position: int | None
    """Of the input that it changes; None for a function of the task's own."""
    range: Range | None = None

    def __call__(self, inputs: Example, severity: int, *, seed: int) -> Example:
        """Return changed copies of a batch of inputs; the same for the same batch, severity and seed.

        Raises:
            InvalidInput: The severity is not one of 1 to 5.
            InvalidTask: The task's own function returns other shapes or types, or values that are not finite.
        """
        if severity not in SEVERITIES:
            raise InvalidInput(f"`severity` must be {options(list(map(str, SEVERITIES)))}, got {severity}.")
        if self.position is None:
            return checks.corrupted(self.name, self.change, inputs, severity)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed * 8 + severity)
        x = inputs[self.position]
        changed = self.change(x, self.levels[severity - 1], self.range, generator)  # type: ignore[call-arg,arg-type]
        return (*inputs[: self.position], changed.to(x.dtype), *inputs[self.position + 1 :])  # type: ignore[union-attr]


def of_task(task: Task) -> tuple[tuple[Corruption, ...], str]:
    """Return the corruptions that suit a task's inputs, its own ones last, and why there are none ('' if there are).

    One of the task's own takes the place of a built-in one of its name.
    """
    found = [(i, kind) for i, x in enumerate(task.example) if (kind := _kind(x))]
    own = {name: Corruption(name, (), change, None) for name, change in task.corruptions.items()}
    if not found:
        return tuple(
            own.values()
        ), "" if own else "No input is an image, a sequence, tokens or features. Give `Task(corruptions=...)`."
    # Of an image and features the image is what a model looks at; of tokens and a mask, the tokens.
    position, kind = min(found, key=lambda pair: (list(_KINDS).index(pair[1]), pair[0]))
    spread = observed(task, position) if kind != "tokens" else None
    kinds = _KINDS[kind].items()
    built_in = {name: Corruption(name, levels, change, position, spread) for name, (levels, change) in kinds}
    return tuple((built_in | own).values()), ""


def observed(task: Task, position: int) -> Range:
    """Return the range of the values of one input on the test split: of each channel or feature."""
    chosen = Subset(task.test, spaced(len(task.test), OBSERVED))
    parts = [_moments(inputs[position].double()) for inputs, _ in batches(chosen, task.example[0].shape[0])]
    low, high, mean, square, size = map(torch.stack, zip(*parts, strict=True))
    share = (size / size.sum()).view(-1, *[1] * (mean.dim() - 1))
    mean, square = (share * mean).sum(0), (share * square).sum(0)
    std = (square - mean**2).clamp(min=0).sqrt()
    return Range(low.amin(0).float(), high.amax(0).float(), mean.float(), std.float())


def _moments(x: Tensor) -> tuple[Tensor, ...]:
    """Return least, largest, mean and mean square of a batch, of each channel of images, each feature, or all."""
    own = {"image": 1, "features": 1}.get(_kind(x), x.dim() - 1 if x.dim() > 2 else 0)
    keep: dict[str, Any] = {"dim": [dim for dim in range(x.dim()) if dim == 0 or dim != own], "keepdim": True}
    return x.amin(**keep), x.amax(**keep), x.mean(**keep), (x**2).mean(**keep), torch.tensor(float(len(x)))


def floating(task: Task) -> int | None:
    """Return the position of the floating-point input that corruptions and attacks change; None without one."""
    found = [i for i, x in enumerate(task.example) if x.is_floating_point() and _kind(x)]
    return found[0] if found else None


def _kind(x: Tensor) -> str:
    """Return the kind of an input, '' for one that is left alone, such as a mask."""
    one = x[0]
    if scoring.is_image(one):
        return "image"
    if one.is_floating_point():
        return "features" if one.dim() == 1 and len(one) < AUDIO else "sequence" if one.dim() else ""
    integers = not one.is_complex() and x.dtype != torch.bool
    return "tokens" if integers and one.dim() == 1 and len(one) > 1 and len(set(x.flatten().tolist())) > 2 else ""


def _noise(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    return x + level * of.std * torch.randn(x.shape, generator=generator)


def _in_range(change: Change) -> Change:
    """Return a change of images whose values are brought to [0, 1] before, and back and into their range after."""

    def within(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
        unit = ((x.float() - of.low) / of.width).clamp(0, 1)
        return change(unit, level, of, generator).clamp(0, 1) * of.width + of.low

    return within


@_in_range
def _gaussian_noise(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    return x + level * torch.randn(x.shape, generator=generator)


@_in_range
def _shot_noise(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    return torch.poisson(x * level, generator=generator) / level


@_in_range
def _blur(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    sigma = level * min(x.shape[2:])
    radius = min(max(1, math.ceil(3 * sigma)), *(side - 1 for side in x.shape[2:]))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel, channels = kernel / kernel.sum(), x.shape[1]
    x = F.pad(x, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


@_in_range
def _contrast(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * level + mean


@_in_range
def _brightness(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    return x + level


@_in_range
def _shift(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    angle = 2 * math.pi * torch.rand(len(x), generator=generator)
    # The grid of `affine` is 2 wide.
    moved = 2 * level * torch.stack([angle.cos(), angle.sin()], 1)
    return _affine(x, torch.zeros(len(x)), moved)


@_in_range
def _rotation(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    return _affine(x, math.radians(level) * _sign(x, generator), torch.zeros(len(x), 2))


def _affine(x: Tensor, angle: Tensor, moved: Tensor) -> Tensor:
    """Return images turned by `angle` in radians, (n,), and moved by `moved` in half sides, (n, 2)."""
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([turned, moved[:, :, None]], 2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@_in_range
def _occlusion(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    height, width = x.shape[2:]
    tall, wide = max(1, round(level * height)), max(1, round(level * width))
    top = torch.randint(height - tall + 1, (len(x), 1, 1, 1), generator=generator)
    left = torch.randint(width - wide + 1, (len(x), 1, 1, 1), generator=generator)
    row, column = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    hidden = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
    return torch.where(hidden, x.mean((1, 2, 3), keepdim=True), x)


@_in_range
def _jpeg(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    from PIL import Image

    decoded = []
    for pixels in (255 * x).round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=int(level))
        decoded.append(np.asarray(Image.open(file), dtype=np.float32).reshape(pixels.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2) / 255


def _dropped_steps(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    """Return sequences in which a step that is lost is replaced by the last one that was received."""
    lost = torch.rand(x.shape[:2], generator=generator) < level
    lost[:, 0] = False
    kept = torch.where(lost, 0, torch.arange(x.shape[1])).cummax(1).values
    return _gathered(x, kept)


def _time_shift(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    steps = (level * x.shape[1] * _sign(x, generator)).round().long()
    return _gathered(x, (torch.arange(x.shape[1]) - steps[:, None]).clamp(0, x.shape[1] - 1))


def _gathered(x: Tensor, steps: Tensor) -> Tensor:
    return x[torch.arange(len(x))[:, None], steps]


def _gain(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    return x * level


def _sign(x: Tensor, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, (len(x),), generator=generator) - 1


def _lost_features(x: Tensor, level: float, of: Range, generator: torch.Generator) -> Tensor:
    return torch.where(torch.rand(x.shape, generator=generator) < level, of.mean, x)


def _dropped_tokens(x: Tensor, level: float, of: Range | None, generator: torch.Generator) -> Tensor:
    """Return texts without some tokens; the others move up, and the last one, padding or not, fills the end."""
    lost = torch.rand(x.shape, generator=generator) < level
    order = lost.int().argsort(dim=1, stable=True)
    filled = torch.where(torch.arange(x.shape[1]) < (~lost).sum(1, keepdim=True), order, x.shape[1] - 1)
    return x.gather(1, filled)


def _swapped_tokens(x: Tensor, level: float, of: Range | None, generator: torch.Generator) -> Tensor:
    order = torch.arange(x.shape[1]).expand(x.shape).clone()
    even = x.shape[1] // 2 * 2
    # Every second pair of neighbours, so that no token takes part in two swaps; a swap moves two.
    pairs = order[:, :even].view(len(x), -1, 2)
    swapped = torch.rand(pairs.shape[:2], generator=generator) < level
    order[:, :even] = torch.where(swapped[..., None], pairs.flip(2), pairs).flatten(1)
    return x.gather(1, order)


_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3)
_NOISE = (0.1, 0.2, 0.3, 0.4, 0.5)
_LENGTHS = (0.03, 0.06, 0.09, 0.12, 0.15)
_KINDS: Mapping[str, Mapping[str, tuple[tuple[float, ...], Change]]] = MappingProxyType(
    {
        "image": {
            "Gaussian noise": ((0.08, 0.12, 0.18, 0.26, 0.38), _gaussian_noise),
            "shot noise": ((60, 25, 12, 5, 3), _shot_noise),
            "blur": ((0.01, 0.02, 0.03, 0.045, 0.06), _blur),
            "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), _contrast),
            "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), _brightness),
            "shift": (_LENGTHS, _shift),
            "rotation": ((4, 8, 12, 16, 20), _rotation),
            "occlusion": (_NOISE, _occlusion),
            "JPEG": ((25, 18, 15, 10, 7), _jpeg),
        },
        "sequence": {
            "noise": (_NOISE, _noise),
            "dropped steps": (_SHARES, _dropped_steps),
            "time shift": (_LENGTHS, _time_shift),
            "gain": ((0.8, 0.65, 0.5, 0.35, 0.25), _gain),
        },
        "tokens": {"dropped tokens": (_SHARES, _dropped_tokens), "swapped tokens": (_SHARES, _swapped_tokens)},
        "features": {"noise": (_NOISE, _noise), "lost features": (_SHARES, _lost_features)},
    }
)
"""Built-in corruptions by kind of input, with the strength at each severity."""
