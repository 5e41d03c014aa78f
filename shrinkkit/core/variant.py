"""Records of a variant: its model files and its layer report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shrinkkit.core import store
from shrinkkit.core.machines import Environment
from shrinkkit.core.recipe import described
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Cell, Column, Shown, Table, facts

ANY_PROCESSOR = "any processor"
WITH_VNNI = "processors with VNNI or an equivalent (x86 VNNI or AMX, Arm dot product)"


@dataclass(frozen=True, repr=False)
class LayerPrecision(Rich):
    """How one runtime computes a layer, and why it was left in float if it was."""

    runs_as: str
    why: str = ""


@dataclass(frozen=True, repr=False)
class LayerAudit(Rich):
    """What changed in one layer, read from the result and not from the request.

    `channels` counts output channels or features; `zeroed` is the share of weights that are
    exactly zero; `precision` is keyed by runtime.
    """

    layer: str
    kind: str
    parameters_before: int
    parameters: int
    channels_before: int | None
    channels: int | None
    zeroed: float
    precision: dict[str, LayerPrecision]
    kept_because: str = ""
    """Why a layer that could have been changed was left as it was; empty if it changed or was not asked to."""
    change: str = ""
    """`added`, `removed`, or `was` and the type that it had before; empty for a layer that is still of its type."""

    @property
    def lost_channels(self) -> bool:
        """Whether it has fewer channels than before."""
        return None not in (self.channels, self.channels_before) and self.channels != self.channels_before


class Audit(Rich, tuple[LayerAudit, ...]):
    """The layer report of a variant: a tuple that is displayed as a table."""

    def to_dict(self) -> dict[str, Any]:
        """Return each layer's audit as a plain dict, by the layer's name."""
        return {layer.layer: layer.to_dict() for layer in self}

    def _rows(self) -> list[dict[str, Any]]:
        return [row for layer in self for row in layer._rows()]

    def shown(self) -> Shown:
        """Return a row for each layer."""
        return audit_table(self)


@dataclass(frozen=True, repr=False)
class Port(Rich):
    """An input or output of a model file."""

    name: str
    dtype: str
    """As torch spells it: `float32`."""
    shape: tuple[int | str, ...]
    """`batch` stands where any size will do."""


@dataclass(frozen=True, repr=False)
class ModelFile(Rich):
    """What a runtime loads. Runtimes may share a file; then each has its own entry with the same path."""

    runtime: str
    path: str
    """Relative to the variant's folder."""
    beside: tuple[str, ...]
    """Files that it needs next to it, such as the weights of an OpenVINO model; relative to the folder too."""
    format: str
    """`pt2`, `torchscript`, `onnx`, or `openvino`."""
    size_bytes: int
    """Of all its files, as are the next two."""
    compressed_bytes: int
    sha256: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_relative_error: float
    """Largest absolute difference between the outputs of the file loaded back from disk and
    those of the model in memory, as a share of the largest absolute output."""
    tolerance: float
    """Largest such difference from the stored outputs, in [0, 0.02], at which the file counts as verified on a CPU."""
    exact_on: str = ""
    """Processors whose int8 accumulators cannot saturate in this file, whatever the inputs: `ANY_PROCESSOR`, or
    `WITH_VNNI`. Empty for a file without int8."""

    def __post_init__(self) -> None:
        store._check_inside(self.path, *self.beside)


@dataclass(frozen=True, repr=False)
class History(Rich):
    """How a float model was made from the task's own; by default, it is that."""

    source: str | None = None
    """The last variant on the way, by its name; None for the task's own model."""
    stages: tuple[dict[str, Any], ...] = ()
    """As in a recipe, from the first to the last."""
    notes: tuple[str, ...] = ()
    left_alone: dict[str, str] = field(default_factory=dict)
    """Why a layer that a stage could have changed was left as it was, by layer."""
    validation_scores: tuple[float, ...] = ()
    """Mean score on the validation split after each epoch of training."""

    def shown(self) -> Shown:
        """Return the stages with their settings and what came of them."""
        stages = described({"stages": self.stages})
        return facts("Stages", [*stages, ("notes", " ".join(f"{note}." for note in self.notes))])


@dataclass(frozen=True, repr=False)
class Variant(Rich):
    """One recipe applied to one task: model files and the layer report."""

    name: str
    task: str
    recipe: dict[str, Any]
    """`stages` and `precision`, as `Recipe.settings` gives them."""
    source: str | None
    seed: int
    files: tuple[ModelFile, ...]
    refusals: dict[str, str]
    """Why a runtime has no model file, by runtime."""
    parameters: int
    macs: int
    """Multiply-accumulates of one example."""
    sparsity: float
    """Share of weights that are exactly zero."""
    audit: tuple[LayerAudit, ...]
    validation_scores: tuple[float, ...]
    """Mean score on the validation split after each epoch of fine-tuning."""
    notes: tuple[str, ...]
    environment: Environment
    companions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Files that prepare the inputs, such as a tokenizer's, by the code that uses them."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "audit", Audit(self.audit))

    @property
    def precision(self) -> str:
        """The name of its precision."""
        precision = self.recipe.get("precision")
        return str(next(iter(precision), "float32")) if isinstance(precision, dict) else "float32"

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of its stages, from the first to the last."""
        stages = self.recipe.get("stages")
        return tuple(str(name) for stage in stages for name in stage) if isinstance(stages, (list, tuple)) else ()

    def shown(self) -> Shown:
        """Return the recipe and its result."""
        steps = [f"{name} {settings}".strip() for name, settings in described(self.recipe)]
        pairs = [
            ("recipe", "; ".join(steps) or "none (original model)"),
            ("made from", self.source or ""),
            ("parameters", formats.count(self.parameters)),
            ("MACs of one example", formats.count(self.macs)),
            ("weights that are zero", formats.percent(self.sparsity)),
            *((f"file for {file.runtime}", formats.size(file.size_bytes)) for file in self.files),
            *((f"no file for {name}", why) for name, why in self.refusals.items()),
            ("seed", str(self.seed)),
            ("notes", " ".join(f"{note.rstrip('.')}." for note in self.notes)),
        ]
        return facts(f"Variant {self.name}", pairs)


def files_table(of: "Variant") -> Table:
    """Return a variant's model files, and why a runtime has none."""
    titles = {"runtime": False, "file": False, "file size": True, "compressed": True, "max. relative error": True}
    columns = (*(Column(title, is_number) for title, is_number in titles.items()), Column("SHA-256"))
    rows: list[tuple[Cell, ...]] = []
    for file in of.files:
        sizes = (formats.size(file.size_bytes), formats.size(file.compressed_bytes))
        error = f"{file.max_relative_error:.1e}" if file.max_relative_error else "0"
        rows.append(tuple(map(Cell, (file.runtime, file.path, *sizes, error, file.sha256[:12]))))
    rows += [(Cell(name), Cell("no file: " + why, tone="warning", wide=True)) for name, why in of.refusals.items()]
    note = "Error of the outputs of the file, loaded back, against the model in memory, relative to the largest output."
    return Table(f"Model files of {of.name}", columns, tuple(rows), note)


def audit_table(layers: Sequence[LayerAudit], *, of: str = "", sparsity: float | None = None) -> Table:
    """Return the layer report of the variant `of`; the caption sums it up, with its `sparsity` if that is known."""
    runtimes = list(dict.fromkeys(name for layer in layers for name in layer.precision))
    alike: dict[tuple[str, ...], list[str]] = {}
    for runtime in runtimes:
        alike.setdefault(tuple(_runs_as(layer, runtime) for layer in layers), []).append(runtime)
    titles = {"layer": False, "kind": False, "channels": True, "parameters": True, "zeros": True}
    columns = (
        *(Column(title, is_number) for title, is_number in titles.items()),
        *(Column(title) for title in (*(f"in {', '.join(names)}" for names in alike.values()), "reason")),
    )
    summary, shown = _summary(layers, runtimes, sparsity), [names[0] for names in alike.values()]
    return Table(f"{of}: {summary}" if of else summary, columns, tuple(_audited(layer, shown) for layer in layers))


def _runs_as(layer: LayerAudit, runtime: str) -> str:
    return layer.precision.get(runtime, LayerPrecision("")).runs_as


def _audited(layer: LayerAudit, runtimes: Sequence[str]) -> tuple[Cell, ...]:
    lost = layer.lost_channels
    channels = "" if layer.channels is None else str(layer.channels)
    channels = f"{layer.channels_before} \N{RIGHTWARDS ARROW} {channels}" if lost else channels
    reasons = dict.fromkeys(filter(None, [layer.kept_because, *(p.why for p in layer.precision.values())]))
    return (
        Cell(layer.layer),
        Cell(f"{layer.kind}, {layer.change}" if layer.change else layer.kind, tone="" if layer.change else "quiet"),
        Cell(channels, tone="" if lost else "quiet"),
        Cell(formats.count(layer.parameters)),
        Cell(formats.percent(layer.zeroed), tone="" if layer.zeroed else "quiet"),
        *(Cell(kind, tone="quiet" if kind == "float32" else "") for kind in (_runs_as(layer, r) for r in runtimes)),
        Cell("; ".join(reasons)),
    )


def _summary(layers: Sequence[LayerAudit], runtimes: Sequence[str], sparsity: float | None) -> str:
    total = sum(layer.change != "removed" for layer in layers)
    parts = []
    if lost := sum(layer.lost_channels for layer in layers):
        parts.append(f"{lost} of {formats.counted(total, 'layer')} lost channels")
    for change in ("added", "removed"):
        if count := sum(layer.change == change for layer in layers):
            parts.append(f"{formats.counted(count, 'layer')} {change}")
    if sparsity is not None and sparsity >= 0.001:
        parts.append(f"{formats.percent(sparsity)} of the weights are zero")
    counts: dict[tuple[int, str], list[str]] = {}
    for name in runtimes:
        kinds = [_runs_as(layer, name) for layer in layers]
        for kind in dict.fromkeys(k for k in kinds if k not in ("float32", "folded", "")):
            counts.setdefault((kinds.count(kind), kind), []).append(name)
    for (count, kind), names in counts.items():
        parts.append(f"{count} of {total} run in {kind} in {', '.join(names)}")
    return "; ".join(parts) or f"{formats.counted(total, 'layer')}, none changed"
