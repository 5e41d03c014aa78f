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

MOST_FOUND = len(FOUND)
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

    def recipes(self) -> tuple[Recipe, ...]:
        """Return the recipes that were found, the boldest first."""
        by_number = {trial.number: trial for trial in self.trials}
        chosen = zip(FOUND, (by_number[number].recipe for number in self.found), strict=False)
        return tuple(Recipe.model_validate({"name": name, **recipe}, strict=False) for name, recipe in chosen)

    def shown(self) -> Shown:
        """Return how far the search has come."""
        best = self.best()
        states = [trial.state for trial in self.trials]
        tried = f"{len(states)}: {states.count('measured')} measured, {states.count('not better')} not better before"
        pairs = [
            ("target", self.target),
            ("trials", f"{tried} training, {states.count('failed')} failed"),
            ("scored on", formats.counted(self.examples, "unseen example")),
            ("best", f"{best.better(self.want):.2f}{TIMES}" if best and best.speedup else "none keeps the budget yet"),
        ]
        return facts("Search", pairs)


def shortfall(gain: Estimate, drop: float, resolution: float) -> float:
    """Return how far a loss, at the bound of its interval, exceeds the budget `drop`; at most 0 if it holds.

    If the examples are so few that an exact copy could not be shown to hold it, the bound is forgiven what a copy's
    would be: `resolution`, the distance of its bound from 0.
    """
    return -gain.low - (resolution if resolution >= drop else 0.0) - drop


def found(trials: Sequence[Trial], want: str) -> tuple[int, ...]:
    """Return the numbers of the trials to make again and to evaluate on the test split, the boldest first.

    The best that keeps the budget, one that loses less (or as much, and drifts less), and the one that drifts least,
    since what looks best in a search does so by luck too. If none keeps it, the one that comes nearest.
    """
    unchanged = max((trial.better(want) for trial in trials if not parts(trial.recipe)), default=0.0)
    measured = [trial for trial in trials if trial.shortfall is not None and parts(trial.recipe)]
    holding = sorted((t for t in measured if t.holds), key=lambda trial: -trial.better(want))
    if not holding:
        nearest = sorted(measured, key=lambda trial: (trial.shortfall or 0.0, -trial.better(want)))
        return tuple(trial.number for trial in nearest[:1])
    chosen = holding[:1]
    for order in (_risk, _drift):
        rest = [one for one in holding if chosen[-1].better(want) > APART * one.better(want) > APART**2 * unchanged]
        if safer := [one for one in rest if order(one) < order(chosen[-1])]:
            chosen.append(safer[0] if order is _risk else min(safer, key=order))
    return tuple(trial.number for trial in chosen)


def _risk(trial: Trial) -> tuple[float, ...]:
    return (trial.shortfall or 0.0, trial.drift or 0.0)


def _drift(trial: Trial) -> tuple[float, ...]:
    return (trial.drift or 0.0,)


def parts(recipe: Mapping[str, Any]) -> str:
    """Return a recipe's stages and precision in one line, without defaults; '' for the unchanged model's."""
    words = []
    for name, settings in (pair for stage in recipe["stages"] for pair in stage.items()):
        defaults = {key: field.default for key, field in transform(name).section.model_fields.items()}
        words.append(f"{name} {formats.settings({k: v for k, v in settings.items() if v != defaults.get(k)})}".strip())
    return " | ".join([*words, *(name for name in recipe["precision"] if name != "float32")])
