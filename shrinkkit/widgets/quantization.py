"""Preview of quantization: the error of each layer of a copy quantized in torch, with controls for the precision."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from torch.utils.data import Subset

from shrinkkit.core import stages
from shrinkkit.core.measurement import Accuracy
from shrinkkit.core.stages import METHODS, Choice
from shrinkkit.display import cells, formats, tables
from shrinkkit.display.picture import COLOURS, FAINT, Picture, canvas, picture
from shrinkkit.display.tables import Cell, Command, Several, Shown, Statement, Table
from shrinkkit.errors import InvalidTask
from shrinkkit.measure import scoring
from shrinkkit.runtimes.spec import HALF
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks import copies
from shrinkkit.tasks.modules import plain_attention
from shrinkkit.tasks.task import Task, batches
from shrinkkit.transforms import sensitivity, variants
from shrinkkit.transforms.groups import counted
from shrinkkit.transforms.sensitivity import LayerError
from shrinkkit.widgets import live
from shrinkkit.widgets.pruning import NONE, NUMBERED, WIDE, name_layers

EXAMPLES = 128
"""Validation examples that layers are compared on, at most."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """How far a model quantized in torch is from the float model."""

    precision: Choice
    layers: tuple[LayerError, ...]
    """Convolution, linear, recurrent and attention layers, in the model's order."""
    output_error: float
    """Relative error of the model's first output."""
    accuracy: Accuracy | None
    """Paired with the float model; None if `reason` says why not."""
    reason: str
    examples: int
    """Validation examples that layers were compared on."""
    engine: str
    """torch's int8 engine; empty for 16 bits."""


def preview(task: Task, model: nn.Module, precision: Choice) -> None:
    """Show the error of each layer of a model quantized in torch, with controls for precision and a layer to skip.

    If no person runs the cell, only the settings are shown and nothing is computed. `model` is left unchanged.
    """
    if not (live.attended() and precision.name in METHODS):
        live.Live(Command(json.dumps(precision.to_dict()), "Precision:"))
        return
    from ipywidgets import Dropdown

    start = precision.settings.model_dump()
    progress = live.progress("Quantizing")

    def settings(name: str, layer: str) -> dict[str, Any]:
        skip = (*start["skip"], *([] if layer == NONE or name in HALF else [layer]))
        known = stages.PRECISIONS[name].model_fields
        return {key: value for key, value in {**start, "skip": [*skip]}.items() if key in known}

    @lru_cache
    def run(name: str, layer: str) -> Comparison:
        progress(0, 1, name)
        try:
            return compare(task, model, stages.lowered(name, settings(name, layer)))
        finally:
            progress(1, 1, name)

    def draw(name: str, layer: str) -> Shown:
        return quantized(run(name, NONE if name in HALF else layer))

    layers = [NONE, *filter(None, counted(model))]
    controls = {
        "name": Dropdown(options=METHODS, value=precision.name, description="precision", **WIDE),
        "layer": Dropdown(options=layers, description="layer to skip", disabled=precision.name in HALF, **WIDE),
    }
    controls["name"].observe(lambda to: setattr(controls["layer"], "disabled", to["new"] in HALF), names="value")
    live.explore(draw, **controls)

    def parameters() -> dict[str, Any]:
        now = live.values(controls)
        return {"precision": now["name"], "settings": settings(**now)}

    live.apply_button(parameters, controls)


def compare(task: Task, model: nn.Module, precision: Choice) -> Comparison:
    """Return how far a copy of `model` in a precision is from it, on the first validation examples.

    torch's preferred int8 engine is used; engines are not timed.
    """
    model = copies.shallow_copy(model, device="cpu").eval()
    made = _quantize(task, model, precision)
    split = Subset(task.validation, range(min(EXAMPLES, len(task.validation))))
    example = tuple(x.cpu() for x in task.example)
    # A short last batch would not fit a model whose batch size is fixed.
    full = [inputs for inputs, _ in batches(split, len(example[0])) if len(inputs[0]) == len(example[0])] or [example]
    accuracy, reason = None, ""
    with plain_attention(), quantize.using_engine(quantize.engine_of(made)):
        layers, output_error = sensitivity.compare(model, made, full)
        try:
            scored = [scoring.scores(one, task, split) for one in (made, model)]
            accuracy = scoring.accuracy(task, *scored)
        except InvalidTask as error:
            reason = str(error)
    examples, engine = sum(len(inputs[0]) for inputs in full), quantize.engine_of(made)
    return Comparison(precision, layers, output_error, accuracy, reason, examples, engine)


def _quantize(task: Task, model: nn.Module, precision: Choice) -> nn.Module:
    example, name, settings = tuple(x.cpu() for x in task.example), precision.name, precision.settings.model_dump()
    if name in HALF:
        return quantize.half(model, example, dtype=name)
    options = {"skip": settings["skip"], "engine": quantize.supported_engines()[0]}
    if name == "dynamic-int8":
        return quantize.dynamic_int8(model, example, **options)
    calibration = variants.calibration(task, settings["calibration_examples"])
    return quantize.static_int8(model, example, calibration, **options)


def quantized(result: Comparison) -> Several:
    """Return the effect on the predictions, a chart of the errors by layer, and a table of them."""
    return Several((_effect(result), _chart(result), _table(result)))


def _effect(result: Comparison) -> Statement:
    skip = ", ".join(result.precision.settings.model_dump()["skip"])
    title = f"{result.precision.name}{f' without {skip}' if skip else ''}"
    engine = f" (int8 engine {result.engine})" if result.engine else ""
    remarks = [f"Relative error of the outputs: {_error(result.output_error)}, computed by PyTorch{engine}."]
    accuracy = result.accuracy
    if accuracy is None:
        return Statement(f"{title}: cannot be evaluated. {result.reason}", tuple(remarks), tone="bad")
    change = cells.change(accuracy.difference, is_fraction=accuracy.is_fraction)
    examples = formats.counted(accuracy.examples, "validation example")
    remarks.append(f"Change of {accuracy.title} on {examples}: {change.plain()}.")
    same = f"cosine similarity of outputs {accuracy.cosine:.4f}"
    if accuracy.agreement is not None:
        same = f"{formats.percent(accuracy.agreement)} of predictions unchanged"
    return Statement(f"{title}: {same}.", tuple(remarks))


def _chart(result: Comparison) -> Picture:
    errors = {one.layer: one.error for one in result.layers if one.error is not None}
    finite = [error for error in errors.values() if math.isfinite(error)]
    infinite = 1.15 * (max(finite, default=0.0) or 1.0)
    heights = [error if math.isfinite(error) else infinite for error in errors.values()]
    floats = [one.runs_as == "float32" for one in result.layers if one.error is not None]
    worst = max(range(len(heights)), key=heights.__getitem__, default=0)
    with canvas(9.2, 3.4) as figure:
        axes = figure.subplots()
        for place, (error, height) in enumerate(zip(errors.values(), heights, strict=True)):
            style: dict[str, Any] = {"color": COLOURS[1] if place == worst else COLOURS[0], "linewidth": 0}
            if floats[place]:
                style = {"facecolor": "none", "edgecolor": style["color"], "linewidth": 1}
            axes.bar(place, height, **style)
            if place == worst or len(errors) <= NUMBERED:
                text = f"{'worst: ' if place == worst else ''}{_error(error)}"
                axes.annotate(text, (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        name_layers(axes, list(errors))
        axes.set_ylim(0, 1.3 * max(heights, default=1.0) or 1.0)
        axes.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.3g} %")
        axes.set_title("Relative error of layer outputs", loc="left")
        axes.grid(axis="y", color=FAINT)
        summary = ", ".join(f"{name} {_error(error)}" for name, error in errors.items())
        return picture(
            figure,
            f"Relative error of the output by layer: {summary or 'no layer can be compared'}.",
            f"{result.precision.name} vs. float32 on {formats.counted(result.examples, 'validation example')}, in "
            "model order. Errors include those of earlier layers. Hollow: stays in float32.",
        )


def _table(result: Comparison) -> Table:
    rows: list[tables.Row] = [
        {"layer": one.layer, "runs as": one.runs_as, "relative error": _error(one.error)}
        if one.error is not None
        else {"layer": one.layer, "runs as": Cell(f"cannot be compared: it {one.why}", tone="warning", wide=True)}
        for one in result.layers
    ]
    return tables.table(f"Errors of {formats.counted(len(rows), 'layer')}", rows, text=("runs as",), folded=True)


def _error(fraction: float) -> str:
    return f"{formats.digits(100 * fraction)} %" if math.isfinite(fraction) else "not finite"
