"""What a search may choose: what to remove of the model, layer by layer, how to train afterwards, and the precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from shrinkkit.core import machines, stages
from shrinkkit.core.recipe import Recipe
from shrinkkit.core.stages import PRECISIONS
from shrinkkit.core.target import Target
from shrinkkit.core.variant import History
from shrinkkit.errors import ShrinkkitError
from shrinkkit.runtimes import registry
from shrinkkit.tasks import modules
from shrinkkit.tasks.task import Task
from shrinkkit.transforms.groups import groups
from shrinkkit.transforms.transform import apply_stage

TRIED: Mapping[str, Mapping[str, Any]] = {
    "drop-blocks": {"ratio": 0.5},
    "prune-channels": {"ratio": 0.5, "scope": "layer"},
    "factorize": {"ratio": 0.5},
    "equalize": {},
}
"""The transforms of a search, and settings with which they show whether a model has a use for them."""
STRENGTHS = {"prune-channels": "channels", "factorize": "low rank", "drop-blocks": "blocks"}
"""The choice that says how much a transform removes."""
LEAST, MOST = 0.05, 0.95
"""Share of channels or weights below which none are removed, and the largest that is tried."""
SHIFT, MOST_SHIFTED = 0.3, 12
"""How far the share of a layer may be from that of all, and how many layers get an own one."""
MOST_EPOCHS = 40
RATES = (5e-4, 8e-3)
ROUNDED = 3
"""Decimals of what is chosen: a recipe is read by people."""


@dataclass(frozen=True)
class Space:
    """The choices of a search, and the recipes that they stand for."""

    precisions: tuple[str, ...]
    techniques: tuple[str, ...]
    """Transforms that change something of the model, of `TRIED`."""
    layers: tuple[str, ...]
    """One of each group of layers that must lose channels together; those with most multiply-accumulates."""
    blocks: int
    """That can be dropped."""
    dropped: frozenset[str]
    """Those of `layers` that may go with a block."""
    left_out: Mapping[str, str]
    """Why a precision or a technique is not in it, by its name."""

    @property
    def strengths(self) -> tuple[str, ...]:
        """The choices that say how much is removed, 0 for nothing."""
        return tuple(STRENGTHS[name] for name in self.techniques if name in STRENGTHS)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return what each choice may be."""
        found: dict[str, BaseDistribution] = {"precision": CategoricalDistribution(self.precisions)}
        if "prune-channels" in self.techniques:
            found |= {"channels": FloatDistribution(0.0, MOST), "scope": CategoricalDistribution(("layer", "global"))}
            found |= {f"shift of {name}": FloatDistribution(-SHIFT, SHIFT) for name in self.layers}
        if "factorize" in self.techniques:
            found["low rank"] = FloatDistribution(0.0, MOST)
        if "drop-blocks" in self.techniques:
            found["blocks"] = IntDistribution(0, self.blocks)
        if "equalize" in self.techniques:
            found["equalize"] = CategoricalDistribution((False, True))
        if self.strengths:
            found |= {
                "training": CategoricalDistribution(("fine-tune", "distil")),
                "epochs": IntDistribution(1, MOST_EPOCHS, log=True),
                "learning_rate": FloatDistribution(*RATES, log=True),
            }
        return found

    def plain(self, **choices: Any) -> dict[str, Any]:
        """Return choices that differ from an unchanged model only in `choices`."""
        start = {"channels": 0.0, "scope": "layer", "low rank": 0.0, "blocks": 0, "equalize": False}
        start |= {"precision": "float32", "training": "fine-tune", "epochs": 8, "learning_rate": 4e-3}
        return {name: choices.get(name, start.get(name, 0.0)) for name in self.distributions()}

    def bolder(self, choices: Mapping[str, Any], random: Random) -> dict[str, Any]:
        """Return choices that remove more: of a few layers, of all, a block, or of the rank."""
        bold, kind = dict(choices), random.choice(self.strengths)
        if kind == "blocks" and choices[kind] < self.blocks:
            bold[kind] += 1
        elif kind == "channels" and self.layers and choices[kind] and random.random() < 2 / 3:
            for name in random.sample(self.layers, min(len(self.layers), random.randint(1, 3))):
                shift = choices[f"shift of {name}"] + random.uniform(LEAST, SHIFT)
                bold[f"shift of {name}"] = min(shift, SHIFT)
        elif kind != "blocks":
            bold[kind] = min(max(choices[kind], LEAST) + random.uniform(0.02, 0.15), MOST)
        if random.random() < 1 / 3:
            bold["training"] = random.choice(("fine-tune", "distil"))
        return {**bold, "epochs": min(MOST_EPOCHS, round(choices["epochs"] * random.uniform(1, 1.5)))}

    def recipe(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """Return the recipe that choices stand for, as plain settings with defaults."""
        chosen: list[dict[str, Any]] = []
        if blocks := choices.get("blocks", 0):
            chosen.append({"drop-blocks": {"count": blocks}})
        if (ratio := choices.get("channels", 0.0)) >= LEAST:
            there = [name for name in self.layers if not (blocks and name in self.dropped)]
            shares = {name: ratio + choices[f"shift of {name}"] for name in there}
            own = {name: _rounded(share) for name, share in shares.items() if abs(share - ratio) >= LEAST}
            chosen.append({"prune-channels": {"ratio": _rounded(ratio), "scope": choices["scope"], "layers": own}})
        if (share := choices.get("low rank", 0.0)) >= LEAST:
            chosen.append({"factorize": {"ratio": _rounded(share)}})
        if chosen:
            rate = float(f"{choices['learning_rate']:.1e}")
            chosen.append({choices["training"]: {"epochs": choices["epochs"], "learning_rate": rate}})
        if choices.get("equalize") and "int8" in choices["precision"]:
            chosen.append({"equalize": {}})
        if not chosen and choices["precision"] == "float32":
            return {"stages": [], "precision": {"float32": {}}}
        given = {"name": "trial", "stages": chosen, "precision": choices["precision"]}
        return Recipe.model_validate(given, strict=False).settings()


def of_task(task: Task, target: Target) -> Space:
    """Return what can be varied in a task's model on a target, and why the rest cannot. Each technique is tried."""
    left_out: dict[str, str] = {}
    for name in PRECISIONS:
        lacking = target.device == "cpu" and machines.lacks(name)
        refused = registry.runtimes()[target.runtime].refuses(name, target.device)
        if name != "float32" and (lacking or refused):
            left_out[name] = refused or "no hardware support on this CPU"
    made: dict[str, tuple[nn.Module, History]] = {}
    for name, settings in TRIED.items():
        try:
            made[name] = apply_stage(task.model, task, stages.stage(name, settings))
        except ShrinkkitError as error:
            left_out[name] = str(error)
    layers = _layers(task, made["prune-channels"][1].left_alone) if "prune-channels" in made else ()
    blocks, dropped = 0, frozenset[str]()
    if "drop-blocks" in made:
        shallow, history = made["drop-blocks"]
        blocks = sum("dropped" in note for note in history.notes)
        dropped = frozenset(layers) - {name for name, _ in shallow.named_modules()}
    precisions = tuple(name for name in PRECISIONS if name not in left_out)
    return Space(precisions, tuple(made), layers, blocks, dropped, left_out)


def _layers(task: Task, kept: Mapping[str, str]) -> tuple[str, ...]:
    """Return a layer of each group that can lose channels, those with most multiply-accumulates first."""
    macs = modules.layer_macs(task.model, task.example)
    able = [group.layers for group in groups(task.model, task.example) if not {*group.layers} & {*kept}]
    able.sort(key=lambda names: -sum(macs.get(name, 0) for name in names))
    return tuple(names[0] for names in able[:MOST_SHIFTED])


def _rounded(share: float) -> float:
    return round(min(max(share, 0.0), MOST), ROUNDED)
