"""Preview of pruning: what a stage removes from each layer, with controls for its settings.

The transform itself is applied, so the preview shows exactly what the stage does; nothing is trained or saved.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shrinkkit.core import stages
from shrinkkit.core.measurement import Accuracy
from shrinkkit.core.stages import SCOPES, PruneChannels, PruneWeights, Stage
from shrinkkit.core.variant import audit_table
from shrinkkit.display import formats
from shrinkkit.display.picture import COLOURS, FAINT, Picture, canvas, picture
from shrinkkit.display.tables import Command, Several, Shown, Statement
from shrinkkit.measure import scoring
from shrinkkit.report import accuracy, show
from shrinkkit.runtimes import layers as layer_report
from shrinkkit.tasks.modules import macs, parameters, sparsity
from shrinkkit.tasks.task import Task
from shrinkkit.transforms.groups import counted, widths
from shrinkkit.transforms.prune import PRUNABLE
from shrinkkit.transforms.transform import Made
from shrinkkit.widgets import live

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST_RATIO = 0.95
"""Upper end of the sliders, unless the stage has a larger ratio."""
NAMED, NUMBERED = 64, 14
"""Numbers of layers up to which each has its name below its bar, and its value above it."""
BINS = 60
"""Of the histogram of weights."""
NONE = "none"
"""The choice of no layer."""
WIDE: dict[str, Any] = {"style": {"description_width": "14em"}, "layout": {"width": "40em"}}
"""Style of a control."""
_REMOVED: dict[str, Any] = {"facecolor": "none", "edgecolor": COLOURS[1], "hatch": "/////", "linewidth": 0.6}


def preview(task: Task, model: nn.Module, stage: Stage, *, seed: int = 0) -> None:
    """Show what a pruning stage removes, with controls for its ratios and scope and a button to evaluate accuracy.

    If no person runs the cell, or the settings hold a pattern, which leaves nothing to choose, only the settings are
    shown and nothing is computed. `model` is left unchanged. Errors
    of the initial settings are raised; those of other settings are shown.
    """
    settings, is_pruning = stage.settings, isinstance(stage.settings, PruneChannels | PruneWeights)
    if not live.attended() or not is_pruning or getattr(settings, "pattern", None):
        live.Live(Command(json.dumps(stage.to_dict()), "Settings of this stage:"))
        return
    from ipywidgets import Dropdown, FloatSlider

    start = settings.model_dump()

    def chosen(ratio: float, scope: str, layer: str, override: float) -> Stage:
        layers = {pattern: value for pattern, value in start["layers"].items() if pattern != layer}
        if layer != NONE:
            layers[layer] = round(override, 10)  # steps of a slider add up to 0.6999999999999998
        return stages.stage(stage.name, {**start, "ratio": round(ratio, 10), "scope": scope, "layers": layers})

    @lru_cache(maxsize=1)  # each result holds a model
    def apply(**values: Any) -> Made:
        new = chosen(**values)
        result: Made = new.transform.function()(model, task, new.settings, seed=seed)
        return result

    def draw(**values: Any) -> Shown:
        return pruned(task, model, apply(**values), chosen(**values), layer=values["layer"])

    sliding = {"min": 0, "max": max(LARGEST_RATIO, start["ratio"]), "step": 0.01, "continuous_update": False, **WIDE}
    layers = [NONE, *prunable(model, stage)]
    controls = {
        "ratio": FloatSlider(start["ratio"], description="pruning ratio", **sliding),
        "scope": Dropdown(options=SCOPES, value=start["scope"], description="scope", **WIDE),
        "layer": Dropdown(options=layers, description="per-layer override", **WIDE),
        "override": FloatSlider(start["ratio"], description="override ratio", disabled=True, **sliding),
    }
    controls["layer"].observe(lambda to: setattr(controls["override"], "disabled", to["new"] == NONE), names="value")
    apply(**live.values(controls))
    live.explore(draw, **controls)
    live.apply_button(lambda: {"settings": _settings(chosen(**live.values(controls)))}, controls)
    accuracies: dict[str, Accuracy] = {}
    original = cache(lambda: scoring.scores(model, task, task.validation))

    def evaluate() -> Shown:
        values = live.values(controls)
        accuracies.setdefault("not pruned", scoring.accuracy(task, original(), None))
        scored = scoring.scores(apply(**values).model, task, task.validation)
        settings = formats.settings(chosen(**values).settings.model_dump(exclude_defaults=True))
        accuracies[settings] = scoring.accuracy(task, scored, original())
        return accuracy.fidelity(accuracies, of="settings, without fine-tuning")

    examples = formats.counted(len(task.validation), "validation example")
    before = Statement(f"Not evaluated yet. The button scores the pruned model on {examples}, without fine-tuning.")
    live.on_request(f"Evaluate {task.metric}", evaluate, before=before)


def prunable(model: nn.Module, stage: Stage) -> tuple[str, ...]:
    """Return the names of the layers that may have their own ratio in a stage."""
    layers = counted(model) if stage.name == "prune-channels" else dict(model.named_modules())
    return tuple(name for name, layer in layers.items() if name and isinstance(layer, PRUNABLE))


def pruned(task: Task, model: nn.Module, made: Made, stage: Stage, *, layer: str = NONE) -> Several:
    """Return a chart of what a stage keeps, the model's size before and after, a layer report, and the settings."""
    models = (model, made.model)
    work, zeros = [macs(one, task.example) for one in models], [*map(sparsity, models)]
    size = show.shrunk(parameters=[*map(parameters, models)], macs=work, sparsity=zeros)
    report = audit_table(layer_report.compare(*models, {}, made.left_alone), sparsity=sparsity(made.model))
    settings = _settings(stage)
    return Several(
        (
            chart(*models, layer=layer),
            replace(size, caption=f"Model size: {'; '.join(made.notes)}"),
            replace(report, folded=True),
            Command(f"settings: dict = {settings!r}", "To use these settings, copy this line to the parameters cell:"),
            Command(f"stages: [{{{stage.name}: {json.dumps(settings)}}}]", "The same in a recipe:"),
        )
    )


def _settings(stage: Stage) -> dict[str, Any]:
    return stage.settings.model_dump(mode="json", exclude_defaults=True)


def chart(before: nn.Module, after: nn.Module, *, layer: str = NONE) -> Picture:
    """Return the fraction that each layer keeps, and a histogram of the weights of `layer` or of all layers."""
    noun, kept = _kept(before, after)
    weights, of = histogram(before, after, layer), "all layers" if layer == NONE else layer
    fractions = [count / total if total else 1.0 for total, count in kept.values()]
    few = len(kept) <= NUMBERED
    with canvas(9.2, 4.8) as figure:
        top, bottom = figure.subplots(2, 1, height_ratios=(1.2, 1))
        top.bar(range(len(kept)), fractions, color=COLOURS[0], linewidth=0, label="kept")
        rest, label = [1 - fraction for fraction in fractions], "removed" if noun == "channels" else "set to zero"
        top.bar(range(len(kept)), rest, bottom=fractions, label=label, **_REMOVED)
        top.set_title(f"{noun.capitalize()} kept by layer", loc="left", pad=24 if few else 6)
        top.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        top.set_ylim(0, 1)
        for place, (total, count) in enumerate(kept.values()) if few else ():
            text = f"{formats.count(count)}\nof {formats.count(total)}"
            top.annotate(text, (place, 1), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
        name_layers(top, list(kept))
        width = weights.edges[1] - weights.edges[0]
        removed = [before - after for before, after in zip(weights.before, weights.after, strict=True)]
        middles = [edge + width / 2 for edge in weights.edges[:-1]]
        bottom.bar(middles, weights.after, width=width, color=COLOURS[0], linewidth=0)
        bottom.bar(middles, removed, bottom=weights.after, width=width, **_REMOVED)
        bottom.set_xlim(weights.edges[0], weights.edges[-1])
        bottom.yaxis.set_major_formatter(lambda count, _: formats.count(count))
        bottom.locator_params(axis="y", nbins=4, integer=True)
        bottom.set_xlabel("weight value")
        bottom.grid(axis="y", color=FAINT)
        bottom.set_title(f"Weights of {of}", loc="left")
        figure.legend(*top.get_legend_handles_labels(), loc="outside upper right", ncols=2)
        share = formats.percent(sum(removed) / (sum(weights.before) or 1))
        counts = ", ".join(f"{name} {count:,} of {total:,}" for name, (total, count) in kept.items())
        return picture(
            figure,
            f"{noun.capitalize()} kept by layer: {counts}. {share} of the weights of {of} are {label}.",
            f"Top: fraction of {noun} kept, in model order. Bottom: number of weights by value; hatched weights are "
            f"{label} ({share}). The outermost bars include all values beyond them.",
        )


@dataclass(frozen=True)
class Histogram:
    """Numbers of weights by value, before and after pruning; the outermost bins include values beyond them."""

    edges: list[float]
    before: list[float]
    after: list[float]


def histogram(before: nn.Module, after: nn.Module, layer: str = NONE) -> Histogram:
    """Return the weights of `layer`, those of the layers in it included, or of all layers that can be pruned."""
    old, new = (_values(model, before, layer) for model in (before, after))
    new = new if len(new) < len(old) else new[new != 0]  # zeroed weights are stored
    # torch takes quantiles of at most 2^24 values.
    edge = float(old[:: 1 + (len(old) >> 24)].abs().quantile(0.998)) or 1.0
    edges = torch.linspace(-edge, edge, BINS + 1, dtype=torch.float64)
    counts = [torch.histogram(values.double().clamp(-edge, edge), edges).hist.tolist() for values in (old, new)]
    return Histogram(edges.tolist(), counts[0], [*map(min, *counts)])


def name_layers(axes: "Axes", names: Sequence[str]) -> None:
    """Label the horizontal axis with as many layer names as fit."""
    step = math.ceil(len(names) / NAMED) or 1
    size = 8 if len(names) <= NUMBERED else 7 if len(names) <= 32 else 6
    style: dict[str, Any] = {}
    if len(names) > NUMBERED:
        style = {"rotation": 90}
    elif len(names) > 8 or max(map(len, names), default=0) > 10:
        style = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(0, len(names), step), names[::step], fontsize=size, **style)
    axes.set_xlim(-0.6, len(names) - 0.4)


def _kept(before: nn.Module, after: nn.Module) -> tuple[str, dict[str, tuple[int, int]]]:
    """Return what was pruned, and how many each layer had and has: `channels`, or nonzero `weights`."""
    noun, old, new = "channels", widths(before), widths(after)
    if old == new:
        noun, old = "weights", {name: sum(p.numel() for p in ps) for name, ps in _weights(before).items()}
        new = {name: sum(int(torch.count_nonzero(p)) for p in ps) for name, ps in _weights(after).items()}
    return noun, {name: (count, new.get(name, 0)) for name, count in old.items()}


def _weights(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the weights of each layer that can be pruned, without biases."""
    return {
        name: [p.detach() for kind, p in layer.named_parameters(recurse=False) if "bias" not in kind]
        for name, layer in model.named_modules()
        if isinstance(layer, PRUNABLE)
    }


def _values(model: nn.Module, original: nn.Module, layer: str) -> Tensor:
    values = [
        _unscaled(tensor.float().cpu(), model.get_submodule(name), original.get_submodule(name)).flatten()
        for name, tensors in _weights(model).items()
        for tensor in tensors
        if layer == NONE or f"{name}.".startswith(f"{layer}.")
    ]
    return torch.cat(values)


def _unscaled(weights: Tensor, layer: nn.Module, original: nn.Module) -> Tensor:
    """Return weights of attention without the scale that compensates for smaller heads, others unchanged."""
    if not (isinstance(layer, nn.MultiheadAttention) and isinstance(original, nn.MultiheadAttention)):
        return weights
    sizes = [one.embed_dim / one.num_heads for one in (layer, original)]
    query = torch.arange(len(weights)).reshape(-1, *[1] * (weights.dim() - 1)) < layer.embed_dim
    return torch.where(query, weights / math.sqrt(sizes[0] / sizes[1]), weights)
