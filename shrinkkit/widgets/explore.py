"""Pruning and quantization tried out in a notebook: what a preview found, drawn, with controls beside it."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shrinkkit.core import stages
from shrinkkit.core.measurement import change_cell
from shrinkkit.core.recipe import METHODS
from shrinkkit.core.stages import SCOPES, Choice, Stage
from shrinkkit.display import formats
from shrinkkit.display.picture import COLOURS, FAINT, Picture, canvas, picture
from shrinkkit.display.tables import Cell, Column, Command, Several, Shown, Statement, Table
from shrinkkit.runtimes.spec import HALF
from shrinkkit.widgets import live
from shrinkkit.widgets.live import Live, ProgressBar
from shrinkkit.widgets.preview import Histogram, Pruner, Pruning, Quantization, Quantizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn

    from shrinkkit.core.measurement import Accuracy
    from shrinkkit.tasks.task import Task


LARGEST_RATIO = 0.95
"""Of the sliders; a notebook's parameter may be larger."""
NAMED, NUMBERED = 64, 14
"""Layers up to which each is named below its bar, and has its numbers above it."""
REST, NONE = "as the rest", "no layer"
"""What a choice of layers begins with."""
_GONE: dict[str, Any] = {"facecolor": "none", "edgecolor": COLOURS[1], "hatch": "/////", "linewidth": 0.6}


UNATTENDED = Statement("The preview is computed when a person runs this cell.")
"""Shown in place of a preview that nobody looks at."""


def pruning(task: "Task", model: "nn.Module", stage: Stage, *, seed: int = 0) -> None:
    """Show what a pruning stage does before any fine-tuning, with controls for its ratios and scope.

    Below stands a button that scores the pruned model on the validation split. The model is left unchanged. Where no
    person runs the cell, nothing is computed.

    Args:
        task: Whose validation split is used.
        model: Float model to prune, in eval mode.
        stage: `prune-channels` or `prune-weights`, with the settings that the controls begin with.
        seed: Of pruning.

    Raises:
        InvalidInput: A value of the section is out of its range, or a pattern matches no layer.
        NothingToPrune: No layer could lose anything.
        Unsupported: A layer with a ratio of its own cannot be pruned, or the model cannot be copied or traced.
    """
    if not live.attended():
        Live(UNATTENDED)
        return
    from ipywidgets import Dropdown, FloatSlider

    pruner = Pruner(task, model, seed=seed)
    start = stage.settings.model_dump()
    # Of the last values only: a model is kept with each.
    known: dict[str, Any] = {"values": None}

    def asked(ratio: float, scope: str, layer: str, own: float) -> Stage:
        others = {pattern: share for pattern, share in start["layers"].items() if pattern != layer}
        # A slider's steps add up to 0.6999999999999998.
        alone = {} if layer == REST else {layer: round(own, 10)}
        return stages.stage(stage.name, {**start, "ratio": round(ratio, 10), "scope": scope, "layers": others | alone})

    def found(**values: Any) -> Pruning:
        if known["values"] != values:
            known.update(values=None, found=pruner.pruned(asked(**values)))
            known["values"] = values
        result: Pruning = known["found"]
        return result

    def draw(**values: Any) -> Shown:
        layer = "" if values["layer"] == REST else values["layer"]
        return pruned(found(**values), asked(**values), layer=layer)

    largest = max(LARGEST_RATIO, start["ratio"])
    wide: dict[str, Any] = {"style": {"description_width": "14em"}, "layout": {"width": "40em"}}
    sliding: dict[str, Any] = {"min": 0, "max": largest, "step": 0.01, "continuous_update": False, **wide}
    layers = [REST, *pruner.prunable(stage.name)]
    controls = {
        "ratio": FloatSlider(start["ratio"], description="share to remove", **sliding),
        "scope": Dropdown(options=SCOPES, value=start["scope"], description="layers are ranked", **wide),
        "layer": Dropdown(options=layers, description="layer with its own ratio", **wide),
        "own": FloatSlider(start["ratio"], description="share to remove of it", disabled=True, **sliding),
    }
    controls["layer"].observe(lambda now: setattr(controls["own"], "disabled", now["new"] == REST), names="value")
    found(**live.values(controls))
    live.explore(draw, **controls)
    tried: dict[str, Accuracy] = {}

    def judge() -> Shown:
        values = live.values(controls)
        tried[_settings(**values)] = pruner.accuracy(found(**values))
        return accuracies(pruner, tried)

    count = len(task.validation)  # type: ignore[arg-type]
    before = Statement(
        "Not judged yet. The button scores the model as it is shown above, pruned and not fine-tuned, on the "
        f"{count:,} validation examples."
    )
    live.on_request(f"Judge it by {task.metric}", judge, before=before)


def quantization(task: "Task", model: "nn.Module", precision: Choice) -> None:
    """Show how far each layer of a model quantized in torch is from the float one, with controls for the method.

    A method is computed when it is first chosen. The model is left unchanged. Where no person runs the cell, nothing is
    computed.

    Args:
        task: Whose validation and calibration examples are used.
        model: Float model in eval mode: the task's own, or a pruned copy of it.
        precision: What the controls begin with, and the layers to leave in float besides the one that is chosen.
    """
    if not live.attended() or precision.name == "float32":
        Live(UNATTENDED)
        return
    from ipywidgets import Dropdown

    method, settings = precision.name, precision.settings.model_dump()
    skip = settings.pop("skip")
    quantizer = Quantizer(task, model, **settings)
    status = Live(_working(method))

    def draw(method: str, left: str) -> Shown:
        left = "" if method in HALF or left == NONE else left
        new, start = not quantizer.known(method, skip, left), time.monotonic()
        if new:
            status.show(_working(method))
        try:
            return quantized(quantizer.quantized(method, skip, left))
        finally:
            took = time.monotonic() - start if new else 0.0
            status.show(_working(method, took))

    wide: dict[str, Any] = {"style": {"description_width": "14em"}, "layout": {"width": "40em"}}
    layers = [NONE, *quantizer.layers()]
    controls = {
        "method": Dropdown(options=METHODS, value=method, description="method", **wide),
        "left": Dropdown(options=layers, description="layer to leave in float", disabled=method in HALF, **wide),
    }
    controls["method"].observe(
        lambda change: setattr(controls["left"], "disabled", change["new"] in HALF), names="value"
    )
    live.explore(draw, **controls)


def pruned(found: Pruning, stage: Stage, *, layer: str = "") -> Several:
    """Return what a preview of pruning found: a picture, what it saves, each layer, and the settings to copy.

    Args:
        found: From `Pruner.pruned`.
        stage: What it was asked for.
        layer: Whose weights are drawn; '' draws those of all layers.
    """
    return Several((_pruned_picture(found, stage, layer), _saved(found), _layers(found, stage), *_to_copy(stage)))


def accuracies(pruner: Pruner, tried: "Mapping[str, Accuracy]") -> Table:
    """Return how the baseline and each pruned model that was judged do on the validation split.

    Args:
        pruner: That made them.
        tried: How they did, by their settings in words.
    """
    base = pruner.baseline()
    shares = formats.is_fraction(pruner.scored.scores)
    rows = [
        (
            Cell("as it is"),
            Cell(formats.score(base.value, is_fraction=shares), formats.interval(base, is_fraction=shares)),
            Cell("reference", tone="quiet"),
        )
    ]
    for settings, one in tried.items():
        mean = formats.score(one.mean.value, is_fraction=shares)
        rows.append((Cell(settings), Cell(mean, formats.interval(one.mean, is_fraction=shares)), change_cell(one)))
    metric = pruner.task.metric
    columns = (Column("settings"), Column(metric, True), Column("change", True))
    note = "Without fine-tuning, which wins much of a loss back. Brackets are 95 % intervals."
    examples = formats.counted(len(pruner.scored.scores), "validation example")
    return Table(f"{metric.capitalize()} on {examples}", columns, tuple(rows), note, folded=False)


def quantized(found: Quantization) -> Several:
    """Return what a preview of quantization found: a picture, what came out in the end, and each layer."""
    return Several((_answers(found), _errors_picture(found), _errors(found)))


def _settings(ratio: float, scope: str, layer: str, own: float) -> str:
    """Return the values of the controls in words."""
    alone = "" if layer == REST else f", {formats.percent(own)} of {layer}"
    return f"{formats.percent(ratio)} by {scope} ranking{alone}"


def _noun(stage: Stage) -> str:
    return stage.name.removeprefix("prune-")


def _pruned_picture(found: Pruning, stage: Stage, layer: str) -> Picture:
    noun, histogram = _noun(stage), found.histogram(layer)
    with canvas(9.2, 4.8) as figure:
        top, bottom = figure.subplots(2, 1, height_ratios=(1.2, 1))
        shares = [one.after / one.before if one.before else 1.0 for one in found.layers]
        places, label = range(len(shares)), "removed" if noun == "channels" else "set to zero"
        top.bar(places, shares, width=0.8, color=COLOURS[0], linewidth=0, label="kept")
        top.bar(places, [1 - share for share in shares], bottom=shares, width=0.8, label=label, **_GONE)
        top.set_title(
            f"{noun.capitalize()} that each layer keeps", loc="left", pad=24 if len(shares) <= NUMBERED else 6
        )
        top.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        top.set_ylim(0, 1)
        if len(shares) <= NUMBERED:
            for place, one in enumerate(found.layers):
                text = f"{formats.count(one.after)}\nof {formats.count(one.before)}"
                top.annotate(text, (place, 1), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
        _name_layers(top, [one.layer for one in found.layers])
        _draw_histogram(bottom, histogram)
        bottom.set_title(f"Weights of {layer or 'all layers'}", loc="left")
        figure.legend(*top.get_legend_handles_labels(), loc="outside upper right", ncols=2)
        gone = 1 - sum(histogram.after) / (sum(histogram.before) or 1)
        kept = ", ".join(f"{one.layer} {one.after:,} of {one.before:,}" for one in found.layers)
        return picture(
            figure,
            f"{noun.capitalize()} kept by layer: {kept}. Of the weights of {layer or 'all layers'}, "
            f"{formats.percent(gone)} go.",
            f"Above, the share of its {noun} that each layer keeps, in the model's order. Below, how many weights have "
            f"which value; the hatched ones go ({formats.percent(gone)}). The outermost bars hold what lies beyond.",
        )


def _draw_histogram(axes: "Axes", found: Histogram) -> None:
    middles = [(a + b) / 2 for a, b in zip(found.edges, found.edges[1:], strict=False)]
    width = found.edges[1] - found.edges[0]
    axes.bar(middles, found.after, width=width, color=COLOURS[0], linewidth=0)
    gone = [before - after for before, after in zip(found.before, found.after, strict=True)]
    axes.bar(middles, gone, bottom=found.after, width=width, **_GONE)
    axes.set_xlim(found.edges[0], found.edges[-1])
    axes.yaxis.set_major_formatter(lambda count, _: formats.count(count))
    axes.locator_params(axis="y", nbins=4, integer=True)
    axes.set_xlabel("value of a weight")
    axes.grid(axis="y", color=FAINT)


def _name_layers(axes: "Axes", names: Sequence[str]) -> None:
    step = math.ceil(len(names) / NAMED)
    size = 8 if len(names) <= NUMBERED else 7 if len(names) <= 32 else 6
    turned = len(names) > 8 or max(map(len, names), default=0) > 10
    slope: dict[str, Any] = {"rotation": 90} if len(names) > NUMBERED else {"rotation": 30, "ha": "right"}
    axes.set_xticks(range(0, len(names), step), names[::step], fontsize=size, **(slope if turned else {}))
    for label in axes.get_xticklabels():
        label.set_rotation_mode("anchor" if turned and len(names) <= NUMBERED else "default")
    axes.set_xlim(-0.6, len(names) - 0.4)


def _saved(found: Pruning) -> Table:
    before, after = found.before, found.after
    pairs = (
        ("parameters", before.parameters, after.parameters, formats.count),
        ("size in float32", before.size_bytes, after.size_bytes, formats.size),
        ("MACs of one example", before.macs, after.macs, formats.count),
    )
    rows = [
        (Cell(name), Cell(text(old)), Cell(text(new)), Cell(formats.percent(new / old) if old else ""))
        for name, old, new, text in pairs
    ]
    zeros = (formats.percent(before.sparsity), formats.percent(after.sparsity))
    rows.append((Cell("weights that are zero"), Cell(zeros[0]), Cell(zeros[1]), Cell("")))
    columns = (Column(""), Column("before", True), Column("after", True), Column("left", True))
    return Table(f"What it saves: {found.note}", columns, tuple(rows), folded=False)


def _layers(found: Pruning, stage: Stage) -> Table:
    rows = tuple(
        (
            Cell(one.layer),
            Cell(f"{one.before:,}"),
            Cell(f"{one.after:,}"),
            Cell(formats.percent(one.after / one.before) if one.before else ""),
            Cell(one.why, tone="quiet"),
        )
        for one in found.layers
    )
    columns = (Column("layer"), Column("before", True), Column("after", True), Column("left", True), Column("why all"))
    less = sum(one.after < one.before for one in found.layers)
    said = f"{_noun(stage).capitalize()} by layer: {less} of {formats.counted(len(rows), 'layer')} lose some"
    return Table(said, columns, rows, folded=True)


def _to_copy(stage: Stage) -> tuple[Command, ...]:
    values = stage.settings.model_dump(mode="json", exclude_defaults=True)
    settings = json.dumps(values)
    return (
        Command(f"settings: dict = {values}", "Copy this line into the parameters cell to prune like this:"),
        Command(f"stages: [{{{stage.name}: {settings}}}]", "The same in a recipe:"),
    )


def _working(method: str, took_s: float | None = None) -> ProgressBar:
    return ProgressBar(f"Quantizing by {method}", took_s is not None, 1, "", took_s or 0.0)


def _answers(found: Quantization) -> Statement:
    """Return how far the model's own answers moved."""
    what = f"In {found.method}" + (f" with {found.left} in float" if found.left else "")
    runs = f"torch's engine {found.engine}, the fastest here" if found.engine else "torch"
    remarks = [f"Relative error of the outputs: {_error(found.output_error)}. Computed by {runs}."]
    one = found.accuracy
    if one is None:
        return Statement(f"{what} the model cannot be judged. {found.refused}", tuple(remarks), tone="bad")
    change, examples = change_cell(one), formats.counted(len(one.scores), "validation example")
    remarks.append(f"{one.metric.capitalize()} changes by {change.text} {change.aside} on {examples}.")
    if one.agreement is None:
        return Statement(f"{what} outputs have a cosine of {one.cosine:.4f} with the float model's.", tuple(remarks))
    return Statement(f"{what} {formats.percent(one.agreement)} of the answers are the float model's.", tuple(remarks))


def _errors_picture(found: Quantization) -> Picture:
    drawn = [one for one in found.layers if one.error is not None]
    finite = [one.error for one in drawn if one.error is not None and math.isfinite(one.error)]
    largest = max(finite, default=0.0) or 1.0
    heights = [one.error if one.error is not None and math.isfinite(one.error) else 1.15 * largest for one in drawn]
    worst = max(range(len(heights)), key=heights.__getitem__, default=0)
    with canvas(9.2, 3.4) as figure:
        axes = figure.subplots()
        for place, (one, height) in enumerate(zip(drawn, heights, strict=True)):
            style: dict[str, Any] = {"color": COLOURS[1] if place == worst else COLOURS[0], "linewidth": 0}
            if one.runs_as == "float32":
                style = {"facecolor": "none", "edgecolor": style["color"], "linewidth": 1}
            axes.bar(place, height, width=0.8, **style)
            if place == worst or len(drawn) <= NUMBERED:
                text = f"worst: {_error(one.error)}" if place == worst else _error(one.error)
                axes.annotate(text, (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        _name_layers(axes, [one.layer for one in drawn])
        axes.set_ylim(0, 1.3 * max(heights, default=1.0) or 1.0)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
        axes.set_title("Relative error of each layer's output", loc="left")
        axes.grid(axis="y", color=FAINT)
        said = ", ".join(f"{one.layer} {_error(one.error)}" for one in drawn)
        return picture(
            figure,
            f"Relative error of the output by layer: {said or 'no layer can be compared'}.",
            f"{found.method}: how far the output of each layer is from the float model's, in the model's order, on "
            f"{formats.counted(found.examples, 'validation example')}. A layer inherits the errors of those before it. "
            "Hollow bars are layers that stay in float32.",
        )


def _errors(found: Quantization) -> Table:
    rows = tuple(
        (Cell(one.layer), Cell(one.runs_as), Cell(_error(one.error)))
        if one.error is not None
        else (Cell(one.layer), Cell(f"cannot be compared: it {one.why}", tone="warning", wide=True))
        for one in found.layers
    )
    missing = sum(one.error is None for one in found.layers)
    said = f", {missing} of which cannot be compared" if missing else ""
    columns = (Column("layer"), Column("runs as"), Column("relative error", True))
    return Table(f"Errors of {formats.counted(len(rows), 'layer')}{said}", columns, rows, folded=True)


def _error(share: float | None) -> str:
    if share is None or math.isinf(share):
        return "not finite"
    return f"{formats.digits(100 * share)} %"
