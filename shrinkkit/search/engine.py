"""The search: recipes are made into files, timed against the unchanged model's, trained and scored, until time is up.

Nothing is estimated: each trial is the file that its recipe gives on the target. A file is timed as soon as its
structure is known, which training does not change, and trained only if it is better than the best so far.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import optuna
from optuna.trial import TrialState
from torch import nn
from torch.utils.data import ConcatDataset

from shrinkkit.core import estimate, machines, search, stages, store
from shrinkkit.core.recipe import BASELINE, Budget
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.search import SearchRecord, Trial
from shrinkkit.core.variant import History
from shrinkkit.errors import InvalidInput, ShrinkkitError, brief
from shrinkkit.measure import scoring, session
from shrinkkit.measure.scoring import Scored
from shrinkkit.measure.session import LoadedVariant, Settings
from shrinkkit.measure.timing import Protocol
from shrinkkit.runtimes import registry
from shrinkkit.search import space as spaces
from shrinkkit.search.space import MOST, Space
from shrinkkit.transforms import variants
from shrinkkit.transforms.transform import apply_stage

TIMING = Protocol(width=0.02, cap_s=1.0, fresh_copies=2)
"""Of a trial: enough to rank it. What is found is timed again, as everything is that a report states."""
LADDER, WORTH = 5, 0.6
"""Steps by which the largest share of channels is found that training makes up for, and how much of the fastest
precision's speed another one must have for that."""
SAME, MOST_REPEATS = 1.01, 20
"""How much better than the best a file must be to be trained, and proposals of known recipes that end a search."""
TrialCallback = Callable[[SearchRecord], bool]
"""Called after each trial with the record so far; True ends the search."""


def never_stop(_record: SearchRecord) -> bool:
    """Trial callback that never ends the search."""
    return False


def run(
    folder: str | Path,
    settings: Settings,
    *,
    minutes: float,
    budget: Budget,
    callback: TrialCallback = never_stop,
    progress: Callable[[float, float, str], None] = lambda done, total, note: None,
) -> SearchRecord:
    """Search for the best recipe on a target, save the record after each trial, and return it.

    A search of the same task under the same conditions that was interrupted goes on for the rest of its time. An
    interrupt ends it with the best so far.

    Args:
        folder: Run folder; holds the baseline, made if missing.
        settings: Target, task, threads and seed.
        minutes: Time to search, above 0; the trial that runs when it is over is the last.
        budget: Largest loss of the mean score, at the bound of its interval, and what is wanted for it.
        callback: Called after each trial.
        progress: Called with the seconds passed, those in all, and what is being done.

    Raises InvalidInput if the baseline has no file for the target, or cannot be evaluated.
    """
    bench, path = _Bench.on(Path(folder), settings, budget), RunFolder(folder).search
    record = bench.record(60 * minutes)
    known = _saved(path, record)
    record = replace(known, limit_s=record.limit_s) if known else record
    study = optuna.create_study(direction="maximize", sampler=_sampler(settings.seed))
    distributions, begin = bench.space.distributions(), time.monotonic() - (known.elapsed_s if known else 0.0)
    trials = list(known.trials if known else ())

    def note(trial: Trial) -> SearchRecord:
        """Keep a trial, and save the record with it."""
        nonlocal record
        trials.append(trial)
        passed = time.monotonic() - begin
        record = replace(record, trials=tuple(trials), found=search.found(trials, budget.want), elapsed_s=passed)
        store.write(path, record)
        return record

    for trial in trials:
        study.enqueue_trial(trial.choices)
        _tell(study, study.ask(distributions), trial, budget.want)
    random = Random(settings.seed + len(trials))
    by_recipe, repeats = {_key(trial.recipe): trial for trial in trials}, 0
    ladders = _ladders(bench.space, trials, budget.want)
    try:
        while time.monotonic() - begin < 60 * minutes and repeats < MOST_REPEATS:
            best, chosen = record.best(), next(ladders, None)
            if chosen is None and bench.space.strengths and best and len(trials) % 2:
                # The sampler proposes much that is no faster than the best; this is.
                chosen = bench.space.bolder(best.choices, random)
            if chosen is not None:
                study.enqueue_trial(chosen)
            asked = study.ask(distributions)
            recipe = bench.space.recipe(asked.params)
            if (same := by_recipe.get(_key(recipe))) is not None:
                repeats += 1
                _tell(study, asked, same, budget.want)
                continue
            repeats = 0
            leader = f", best {best.speedup.value:.2f}x" if best and best.speedup else ""
            words = f"trial {len(trials) + 1}{leader}: {search.parts(recipe) or 'unchanged':.60}"
            progress(min(time.monotonic() - begin, 60 * minutes), 60 * minutes, words)
            trial = bench.trial(len(trials), asked.params, recipe, best.better(budget.want) if best else 0.0)
            by_recipe[_key(recipe)] = trial
            _tell(study, asked, trial, budget.want)
            if callback(note(trial)):
                break
    except KeyboardInterrupt:
        pass
    progress(60 * minutes, 60 * minutes, "")
    return record


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=5)


def _key(recipe: Mapping[str, Any]) -> str:
    return repr(recipe)


def _tell(study: optuna.Study, asked: optuna.Trial, trial: Trial, want: str) -> None:
    """Tell the sampler what a trial gave; what failed it never proposes for its value."""
    if trial.state == "failed" or not trial.better(want):
        study.tell(asked, state=TrialState.FAIL)
        return
    # What was not trained is no better than the best, whatever it loses.
    asked.set_constraint("loss", trial.shortfall or 0.0)
    study.tell(asked, trial.better(want))


def _saved(path: Path, fresh: SearchRecord) -> SearchRecord | None:
    """Return what an earlier search for the same thing under the same conditions saved, None if there is none."""
    try:
        earlier = store.read(path, SearchRecord)
    except InvalidInput:
        return None
    before = earlier.environment
    now = replace(fresh.environment, clock_mhz=before.clock_mhz, load_average=before.load_average)
    changes = {name: getattr(fresh, name) for name in ("trials", "found", "elapsed_s", "limit_s")}
    return earlier if replace(earlier, **changes) == replace(fresh, environment=now) else None


def _ladders(space: Space, trials: list[Trial], want: str) -> Iterator[dict[str, Any]]:
    """Yield the choices to start from: each precision alone, then halving steps to the most that training makes up for.

    `trials` grows as they are tried.
    """
    for precision in space.precisions:
        yield space.plain(precision=precision)
    alone = {t.choices["precision"]: t for t in trials if len(t.recipe["stages"]) == 0 and t.better(want)}
    order = sorted(alone, key=lambda name: -alone[name].better(want))
    # Of a model with few blocks each is a large step, which the bolder versions of the best try.
    strength = next((name for name in space.strengths if name != "blocks"), None)
    for precision in order if strength else ():
        if alone[precision].better(want) < WORTH * alone[order[0]].better(want) or not alone[precision].holds:
            continue
        low, high = 0.0, MOST
        for _ in range(LADDER):
            ratio = (low + high) / 2
            yield (chosen := space.plain(precision=precision, **{str(strength): ratio}))
            tried = next((t for t in reversed(trials) if t.choices == chosen), None)
            if tried is None or tried.state == "failed":
                break
            low, high = (low, ratio) if tried.state == "measured" and not tried.holds else (ratio, high)


@dataclass(frozen=True)
class _Bench:
    """What trials are made and measured with."""

    run: RunFolder
    settings: Settings
    budget: Budget
    space: Space
    baseline: LoadedVariant
    scored: Scored
    """The baseline's file on the unseen examples."""
    resolution: float
    unseen: Any

    @classmethod
    def on(cls, folder: Path, settings: Settings, budget: Budget) -> "_Bench":
        session.write_missing_baseline(folder, settings)
        baseline = session.load(folder, [BASELINE], settings)[BASELINE]
        if baseline.loaded is None:
            raise InvalidInput(f"A search needs the unchanged model on {settings.target}: {baseline.error}")
        task = settings.task
        unseen: Any = ConcatDataset([task.validation, task.calibration])
        scored = scoring.scores(baseline.loaded, task, unseen)
        copy = estimate.paired_difference(scored.sample, scored.sample, bounds=task.score.range)
        gain = estimate.gain(copy, higher_is_better=task.score.higher_is_better)
        assert gain is not None
        space = spaces.of_task(task, settings.target)
        return cls(RunFolder(folder), settings, budget, space, baseline, scored, -gain.low, unseen)

    def record(self, limit_s: float) -> SearchRecord:
        """Return the record of a search that has tried nothing."""
        task = self.settings.task
        return SearchRecord(
            target=str(self.settings.target),
            want=self.budget.want,
            accuracy_drop=self.budget.accuracy_drop,
            metric=task.metric,
            examples=len(self.scored.outputs),
            resolution=self.resolution,
            limit_s=limit_s,
            elapsed_s=0.0,
            trials=(),
            found=(),
            is_fraction=task.score.percent,
            left_out=dict(self.space.left_out),
            environment=machines.environment(self.settings.threads, packages=registry.packages()),
        )

    def trial(self, number: int, choices: Mapping[str, Any], recipe: Mapping[str, Any], best: float) -> Trial:
        """Return what a recipe gives; without training if its file is no better than `best`."""
        start = time.monotonic()
        blank = Trial(number, dict(choices), dict(recipe), "measured")
        with tempfile.TemporaryDirectory(dir=self.run.path, prefix=".attempt-") as scratch:
            try:
                found = self._measured(blank, RunFolder(scratch), best)
            except (ShrinkkitError, RuntimeError, ValueError) as error:
                found = replace(blank, state="failed", reason=brief(error))
        return replace(found, duration_s=time.monotonic() - start)

    def _measured(self, trial: Trial, scratch: RunFolder, best: float) -> Trial:
        task, want = self.settings.task, self.budget.want
        # With a baseline, a variant is checked to be of the same task.
        shutil.copytree(self.run.variant(BASELINE), scratch.variant(BASELINE))
        steps = [stages.stage(name, values) for one in trial.recipe["stages"] for name, values in one.items()]
        first = next((i for i, stage in enumerate(steps) if stage.transform.trains), len(steps))
        model, history = self._applied(task.model, History(), steps[:first])
        precision = trial.recipe["precision"]
        file = self._file(scratch, model, precision, history)
        trial = replace(trial, size_bytes=file.size_bytes)
        compared, errors = session.compare_latency(
            {BASELINE: self.baseline, "trial": file}, self.settings, protocol=TIMING
        )
        if errors.get("trial") == session.STOPPED or ("trial" in compared and compared["trial"].stopped):
            # Timing ends at an interrupt with what it has; the search ends with it.
            raise KeyboardInterrupt
        if "trial" not in compared:
            raise InvalidInput(errors["trial"])
        trial = replace(trial, speedup=compared["trial"].speedup)
        if first < len(steps):
            if trial.better(want) < SAME * best:
                return replace(trial, state="not better")
            model, history = self._applied(model, history, steps[first:])
            file = self._file(scratch, model, precision, history)
        assert file.loaded is not None
        scored = scoring.scores(file.loaded, task, self.unseen)
        difference = estimate.paired_difference(self.scored.sample, scored.sample, bounds=task.score.range)
        gain = estimate.gain(difference, higher_is_better=task.score.higher_is_better)
        assert gain is not None
        return replace(
            trial,
            gain=gain,
            shortfall=search.shortfall(gain, self.budget.accuracy_drop, self.resolution),
            drift=1 - scoring.cosine(self.scored.outputs, scored.outputs),
            size_bytes=file.size_bytes,
        )

    def _applied(self, model: nn.Module, history: History, steps: list[stages.Stage]) -> tuple[nn.Module, History]:
        for stage in steps:
            model, history = apply_stage(model, self.settings.task, stage, history=history, seed=self.settings.seed)
        return model, history

    def _file(self, scratch: RunFolder, model: nn.Module, precision: Any, history: History) -> LoadedVariant:
        """Return the verified file of a model on the target."""
        options: dict[str, Any] = {"precision": precision, "history": history, "seed": self.settings.seed}
        runtimes = [self.settings.target.runtime]
        variants.write(scratch.variant("trial"), self.settings.task, model, runtimes=runtimes, **options)
        loaded = session.load(scratch.path, ["trial"], self.settings)["trial"]
        if loaded.loaded is None:
            raise InvalidInput(loaded.error)
        return loaded
