"""Records of a search for the best recipe: what was tried, what each trial gave, and what was found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shrinkkit.core.estimate import Estimate
from shrinkkit.core.machines import Environment
from shrinkkit.core.recipe import FOUND, Recipe
from shrinkkit.core.stages import transform
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.display import formats
from shrinkkit.display.formats import TIMES
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, facts

LONGER = 4
"""How many times as many epochs a recipe that was found has as its trial: a search spends its time on many trials."""
APART = 1.1
"""How much worse in what is wanted a more cautious recipe is than the one before it, at least."""


@dataclass(frozen=True, repr=False)
class Trial(Rich):
    """One recipe that a search tried on its target."""

    number: int
    choices: dict[str, Any]
    """What the search chose, by the names of its space."""
    recipe: dict[str, Any]
    """Its stages and precision, as plain settings."""
    state: str
    """`measured`, `failed`, or `not better` for one that was not trained, as its file is no better than the best."""
    reason: str = ""
    """Why it failed."""
    speedup: Estimate | None = None
    """Over the unchanged model's file on the same target."""
    gain: Estimate | None = None
    """Change of the score on unseen examples, more being better."""
    shortfall: float | None = None
    """How far its loss, at the bound of the interval, exceeds the budget; at most 0 if it holds."""
    drift: float | None = None
    """1 - the mean cosine of its outputs to the original's."""
    size_bytes: int | None = None
    duration_s: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether it keeps the budget on the examples that the search may see."""
        return self.shortfall is not None and self.shortfall <= 0

    def better(self, want: str) -> float:
        """Return what is to be as large as possible: its speed-up, or 1 / bytes; 0 if that is unknown."""
        if want == "smallest":
            return 1 / self.size_bytes if self.size_bytes else 0.0
        return self.speedup.value if self.speedup else 0.0


@dataclass(frozen=True, repr=False)
class SearchRecord(Rich):
    """A search on one target, which may still go on."""

    target: str
    want: str
    """`fastest` or `smallest`."""
    accuracy_drop: float
    metric: str
    examples: int
    """Validation and calibration examples that trials are scored on."""
    resolution: float
    """The loss that even an exact copy of the model could have, as far as so many examples tell."""
    limit_s: float
    elapsed_s: float
    trials: tuple[Trial, ...]
    found: tuple[int, ...]
    """Numbers of the trials whose recipes were found, the boldest first."""
    is_fraction: bool
    left_out: dict[str, str]
    """Why a precision or a technique was not searched, by its name."""
    environment: Environment
    schema_version: int = SCHEMA_VERSION

    def best(self) -> Trial | None:
        """Return the best trial that keeps the budget, None if none does."""
        return max((t for t in self.trials if t.holds), key=lambda trial: trial.better(self.want), default=None)

    def chosen(self) -> dict[str, Trial]:
        """Return the trials whose recipes were found, by the names of these, the boldest first."""
        by_number = {trial.number: trial for trial in self.trials}
        return {name: by_number[number] for name, number in zip(FOUND, self.found, strict=False)}

    def recipes(self) -> tuple[Recipe, ...]:
        """Return the recipes that were found, the boldest first, with `LONGER` training than the trials had."""
        longer = {name: _trained_longer(trial.recipe) for name, trial in self.chosen().items()}
        return tuple(Recipe.model_validate({"name": name, **recipe}, strict=False) for name, recipe in longer.items())

    def shown(self) -> Shown:
        """Return how far the search has come."""
        best = self.best()
        states = [trial.state for trial in self.trials]
        tried = f"{len(states)}: {states.count('measured')} measured, {states.count('not better')} not better before"
        pairs = [
            ("target", self.target),
            ("trials", f"{tried} training, {states.count('failed')} failed"),
            ("scored on", formats.counted(self.examples, "unseen example")),
            ("best", f"{best.speedup.value:.2f}{TIMES}" if best and best.speedup else "none keeps the budget yet"),
        ]
        return facts("Search", pairs)


def _trained_longer(recipe: Mapping[str, Any]) -> dict[str, Any]:
    stages = [
        {name: settings | ({"epochs": LONGER * settings["epochs"]} if "epochs" in settings else {})}
        for stage in recipe["stages"]
        for name, settings in stage.items()
    ]
    return {**recipe, "stages": stages}


def shortfall(gain: Estimate, drop: float, resolution: float) -> float:
    """Return how far a loss, at the bound of its interval, exceeds the budget `drop`; at most 0 if it holds.

    If the examples are so few that an exact copy could not be shown to hold it, the bound is forgiven what a copy's
    would be: `resolution`, the distance of its bound from 0.
    """
    return -gain.low - (resolution if resolution >= drop else 0.0) - drop


def found(trials: Sequence[Trial], want: str) -> tuple[int, ...]:
    """Return the numbers of the trials to make again and to evaluate on the test split, the boldest first.

    The best that keeps the budget, the next that loses less, and then those that drift at most half as much as the one
    before, since what looks best in a search does so by luck too. If none keeps it, the one that comes nearest.
    """
    unchanged = max((trial.better(want) for trial in trials if not parts(trial.recipe)), default=0.0)
    measured = [trial for trial in trials if trial.shortfall is not None and parts(trial.recipe)]
    holding = sorted((t for t in measured if t.holds), key=lambda trial: -trial.better(want))
    if not holding:
        nearest = sorted(measured, key=lambda trial: (trial.shortfall or 0.0, -trial.better(want)))
        return tuple(trial.number for trial in nearest[:1])
    chosen = holding[:1]
    for is_safer in (_loses_less, *[_drifts_less] * (len(FOUND) - 2)):
        last = chosen[-1]
        rest = [one for one in holding if last.better(want) > APART * one.better(want) > APART**2 * unchanged]
        chosen += [one for one in rest if is_safer(one, last)][:1]
    return tuple(trial.number for trial in chosen)


def _loses_less(one: Trial, other: Trial) -> bool:
    return (one.shortfall or 0.0, one.drift or 0.0) < (other.shortfall or 0.0, other.drift or 0.0)


def _drifts_less(one: Trial, other: Trial) -> bool:
    """Return whether a trial drifts at most half as much as another one, and shows no larger loss."""
    gains = (one.gain.value if one.gain else 0.0, other.gain.value if other.gain else 0.0)
    return (one.drift or 0.0) <= (other.drift or 0.0) / 2 and gains[0] >= min(0.0, gains[1])


def parts(recipe: Mapping[str, Any]) -> str:
    """Return a recipe's stages and precision in one line, without defaults; '' for the unchanged model's."""
    words = []
    for name, settings in (pair for stage in recipe["stages"] for pair in stage.items()):
        defaults = {key: field.default for key, field in transform(name).section.model_fields.items()}
        words.append(f"{name} {formats.settings({k: v for k, v in settings.items() if v != defaults.get(k)})}".strip())
    return " | ".join([*words, *(name for name in recipe["precision"] if name != "float32")])
