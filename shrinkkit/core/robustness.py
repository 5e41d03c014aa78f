"""Records of how variants hold up: on corrupted and attacked inputs, in their confidences, and in their arithmetic."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shrinkkit.core import estimate, evidence
from shrinkkit.core.estimate import Resampled, Sample
from shrinkkit.core.machines import Environment
from shrinkkit.core.measurement import Scores
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.display import formats
from shrinkkit.display.showable import Rich
from shrinkkit.display.tables import Shown, facts
from shrinkkit.errors import InvalidInput, options

CLEAN = "clean"
"""The condition without any change, of severity 0."""
ATTACKS: tuple[str, ...] = ("FGSM", "PGD")
SEVERITIES = (1, 2, 3, 4, 5)
OWN, TRANSFERRED = "along its own gradients", "transferred from the original model"
"""How an attack on a variant was found."""


@dataclass(frozen=True, repr=False)
class Condition(Rich):
    """The scores of a variant on inputs that were changed in one way."""

    name: str
    """Of the corruption or attack, or `CLEAN`."""
    severity: int
    """1 (slight) to 5 (strong)."""
    scores: Scores
    """Paired with the baseline's under the same condition."""
    is_attack: bool = False
    note: str = ""
    """Of an attack: whose gradients it follows."""


@dataclass(frozen=True, repr=False)
class Calibration(Rich):
    """How far a classifier's confidence agrees with how often it is right."""

    figures: tuple[Scores, ...]
    """Expected calibration error, negative log-likelihood and Brier score, paired with the baseline's."""
    bins: tuple[tuple[float, float, int], ...]
    """Mean confidence, share of right answers, and examples, of each bin of the confidence that has any."""
    temperature: float
    """What to divide logits by; fitted on the validation split."""
    error_at_temperature: float
    """Expected calibration error with the logits divided by it."""


@dataclass(frozen=True, repr=False)
class NumericCheck(Rich):
    """What a model file makes of inputs that should change nothing, or that are out of range."""

    name: str
    error: float | None = None
    """Largest difference of outputs that should be equal, relative to the largest output."""
    changed: float | None = None
    """Share of answers that differ: from those that should be equal, or from the original model's. None without
    classes."""
    finite: bool | None = None
    """Whether all outputs are finite; None where inputs are in range."""
    note: str = ""
    """Why it was not done."""


@dataclass(frozen=True, repr=False)
class Robustness(Rich):
    """How one variant's model file holds up on one target."""

    variant: str
    file_sha256: str = ""
    error: str = ""
    """Why nothing was measured; empty when something was."""
    conditions: tuple[Condition, ...] = ()
    calibration: Calibration | None = None
    checks: tuple[NumericCheck, ...] = ()

    def corruptions(self) -> tuple[str, ...]:
        """Return the names of the corruptions, in the order in which they were tried."""
        return tuple(dict.fromkeys(c.name for c in self.conditions if not c.is_attack and c.name != CLEAN))

    def attacks(self) -> tuple[str, ...]:
        """Return the names of the attacks."""
        return tuple(dict.fromkeys(c.name for c in self.conditions if c.is_attack))

    def tried(self) -> set[tuple[str, int]]:
        """Return name and severity of each condition under which it gave finite outputs."""
        return {(c.name, c.severity) for c in self.conditions}

    def sample(self, *names: str, shared: "Robustness | None" = None) -> Sample:
        """Return the raw scores, averaged over the severities of `names`; over those of `shared` only, if given."""
        known = (shared or self).tried()
        samples = [c.scores.sample for c in self.conditions if c.name in names and (c.name, c.severity) in known]
        if isinstance(first := samples[0], Resampled):
            whole = [sample for sample in samples if isinstance(sample, Resampled)]
            replicates = np.mean([sample.replicates for sample in whole], axis=0)
            return Resampled(float(np.mean([s.value for s in whole])), tuple(replicates.tolist()), first.examples)
        return tuple(np.mean([np.asarray(sample) for sample in samples], axis=0).tolist())

    def scores(self, *names: str, baseline: "Robustness | None" = None) -> Scores:
        """Return the scores averaged over the conditions `names`, paired with those of `baseline`."""
        like = next(c.scores for c in self.conditions if c.name in names)

        def averaged(sample: Sample) -> Scores:
            if isinstance(sample, Resampled):
                return replace(like, scores=(), resampled=sample)
            return replace(like, scores=tuple(sample), resampled=None)

        paired = averaged(baseline.sample(*names, shared=self)) if baseline else None
        return evidence.scores(averaged(self.sample(*names, shared=baseline)), paired)


@dataclass(frozen=True, repr=False)
class RobustnessRecord(Rich):
    """The robustness of every variant on one target."""

    task: str
    target: str
    machine: str
    environment: Environment
    variants: tuple[Robustness, ...]
    examples: int
    """Of the test split that were used."""
    notes: tuple[str, ...] = ()
    """What could not be tried, and why."""
    classes: tuple[str, ...] = ()
    """Of each example, '' where it has none; empty without classes."""
    schema_version: int = SCHEMA_VERSION

    def by_name(self) -> dict[str, Robustness]:
        """Return what was measured by variant, the baseline first; empty without the baseline."""
        measured = {one.variant: one for one in self.variants if one.conditions}
        return {BASELINE: measured.pop(BASELINE), **measured} if BASELINE in measured else {}

    def shown(self) -> Shown:
        """Return the mean score of each variant on corrupted inputs, and its change."""
        known, pairs = self.by_name(), list[tuple[str, str]]()
        for name, one in known.items():
            if names := one.corruptions():
                scores = one.scores(*names, baseline=None if name == BASELINE else known[BASELINE])
                score = formats.score(scores.mean.value, is_fraction=scores.is_fraction)
                pairs.append((name, f"{score}, {scores.change_cell().plain()}"))
        return facts(f"Scores on corrupted inputs on {self.target}", pairs)

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"variant": one.variant, "condition": c.name, "severity": c.severity, **c.scores.mean.to_dict()}
            for one in self.variants
            for c in one.conditions
        ]


def derive(stated: RobustnessRecord) -> RobustnessRecord:
    """Return a record whose means and differences follow from its raw scores; raises InvalidInput if that fails."""
    _check(stated)
    baseline = next((one for one in stated.variants if one.variant == BASELINE), None)
    of = {(c.name, c.severity): c.scores for c in (baseline.conditions if baseline else ())}
    figures = {one.metric: one for one in (baseline.calibration.figures if baseline and baseline.calibration else ())}

    def derived(one: Robustness) -> Robustness:
        paired: Mapping[Any, Scores] = {} if one.variant == BASELINE else of
        conditions = tuple(
            replace(c, scores=evidence.scores(c.scores, paired.get((c.name, c.severity)))) for c in one.conditions
        )
        calibration = one.calibration
        if calibration:
            others = {} if one.variant == BASELINE else figures
            own = tuple(evidence.scores(figure, others.get(figure.metric)) for figure in calibration.figures)
            calibration = replace(calibration, figures=own)
        return replace(one, conditions=conditions, calibration=calibration)

    return replace(stated, variants=tuple(map(derived, stated.variants)))


def _check(record: RobustnessRecord) -> None:
    """Check that the scores of a record belong together."""
    again = "Run its step again."
    sizes: dict[bool, set[tuple[int, int]]] = {False: set(), True: set()}
    for one in record.variants:
        if one.conditions and (CLEAN, 0) not in one.tried():
            raise InvalidInput(f"The robustness of {one.variant} must hold scores on clean inputs, too. {again}")
        for c in one.conditions:
            if c.severity not in ((0,) if c.name == CLEAN else SEVERITIES):
                rule = f"The severity of {c.name} must be {options(list(map(str, SEVERITIES)))}"
                raise InvalidInput(f"{rule}, got {c.severity}. {again}")
            replicates = len(c.scores.resampled.replicates) if c.scores.resampled else 0
            sizes[c.is_attack].add((c.scores.examples, replicates))
    for counts in sizes.values():
        if len(counts) > 1:
            listed = options([str(count) for count, _ in sorted(counts)], "and")
            raise InvalidInput(f"Every condition must have scores of the same examples, got {listed} scores. {again}")
    if record.classes and sizes[False] and min(sizes[False])[0] != len(record.classes):
        text = f"`classes` must name the class of each of {min(sizes[False])[0]} examples, got {len(record.classes)}"
        raise InvalidInput(f"{text}. {again}")


def verdicts(record: RobustnessRecord, drop: float) -> dict[str, str]:
    """Return by variant whether its mean score on corrupted inputs keeps a budget; see `results.accuracy_verdicts`.

    One without finite outputs under a corruption that the baseline stands is over budget.
    """
    measured = record.by_name()
    baseline = measured.pop(BASELINE, None)
    names = baseline.corruptions() if baseline else ()
    if baseline is None or not names:
        return {}
    needed = {key for key in baseline.tried() if key[0] in names}
    broken = {name for name, one in measured.items() if needed - one.tried()}
    whole = {name: one for name, one in measured.items() if name not in broken}
    like = baseline.conditions[0].scores
    options: dict[str, Any] = {"higher_is_better": like.higher_is_better, "bounds": like.bounds}
    within = estimate.within(baseline.sample(*names), [one.sample(*names) for one in whole.values()], drop, **options)
    gains = {name: one.scores(*names, baseline=baseline).gain for name, one in whole.items()}
    return dict.fromkeys(broken, "over budget") | {
        name: estimate.budget_verdict(is_within, gain, drop)
        for (name, gain), is_within in zip(gains.items(), within, strict=True)
    }


def damaged(record: RobustnessRecord) -> dict[str, dict[str, int]]:
    """Return by variant the corruptions and attacks on which it is surely worse (-1) or better (1) than the baseline.

    *Surely* takes into account how many pairs of a variant and a condition are compared on the target (Holm). What
    clean inputs lose as well counts too: it is what a user sees. No variant is better under an attack that was
    transferred, because that is weaker than one along its own gradients.
    """
    measured = record.by_name()
    baseline = measured.pop(BASELINE, None)
    if baseline is None:
        return {}
    pairs = [(name, at) for name, one in measured.items() for at in _tried(one, baseline)]
    like = baseline.conditions[0].scores
    samples = [
        (baseline.sample(at, shared=measured[name]), measured[name].sample(at, shared=baseline)) for name, at in pairs
    ]
    signs = estimate.differing(samples, bounds=like.bounds)
    found: dict[str, dict[str, int]] = {name: {} for name in measured}
    for (name, at), sign in zip(pairs, signs, strict=True):
        better = sign if like.higher_is_better else -sign
        weaker = any(c.note == TRANSFERRED for c in measured[name].conditions if c.name == at)
        if better < 0 or (better and not weaker):
            found[name][at] = better
    return found


def by_class(record: RobustnessRecord) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Return by variant and class the mean scores on corrupted inputs of the baseline and of the variant.

    Scores are those of each example of the class, averaged over all corruptions and severities that both stood. Empty
    without classes, and for a metric of the whole set.
    """
    measured = record.by_name()
    baseline = measured.pop(BASELINE, None)
    names = baseline.corruptions() if baseline else ()
    if baseline is None or not names or not record.classes or not baseline.conditions[0].scores.scores:
        return {}
    places: dict[str, list[int]] = {}
    for i, name in enumerate(record.classes):
        places.setdefault(name, []).append(i)
    pairs = dict[str, dict[str, tuple[list[float], list[float]]]]()
    for name, one in measured.items():
        if any(at in names for at in _tried(one, baseline)):
            both = [np.array(x.sample(*names, shared=y)) for x, y in ((baseline, one), (one, baseline))]
            pairs[name] = {of: (both[0][at].tolist(), both[1][at].tolist()) for of, at in sorted(places.items()) if of}
    return pairs


def damaged_classes(record: RobustnessRecord, drop: float) -> dict[str, list[str]]:
    """Return by variant the classes on which it surely loses more than `drop` on corrupted inputs.

    *Surely* takes into account how many pairs of a variant and a class are compared (Holm).
    """
    pairs = [(name, of, both) for name, classes in by_class(record).items() for of, both in classes.items()]
    found: dict[str, list[str]] = {}
    if pairs:
        like = record.by_name()[BASELINE].conditions[0].scores
        signs = estimate.differing([both for *_, both in pairs], by=drop, bounds=like.bounds)
        for (name, of, _), sign in zip(pairs, signs, strict=True):
            if sign == (-1 if like.higher_is_better else 1):
                found.setdefault(name, []).append(of)
    return found


def _tried(one: Robustness, baseline: Robustness) -> Iterable[str]:
    """Return the corruptions and attacks that both were tried on, at one severity at least."""
    shared = {name for name, _ in one.tried() & baseline.tried()}
    return [name for name in (*baseline.corruptions(), *baseline.attacks()) if name in shared]
