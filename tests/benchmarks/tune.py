"""Contest of searches: equal minutes on one target, and what each winner is worth on the test split.

    python tests/benchmarks/tune.py digits-cnn --target cpu/openvino --minutes 4

Printed are the trials of each, how much faster its winner is than the unchanged file, in the search and measured again
with narrow intervals, and the change of the score on the test split, which no search has seen. Built-in recipes are
the first contestant.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import optuna

import shrinkkit
from shrinkkit.core import estimate, stages
from shrinkkit.core.recipe import BASELINE, Budget
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.variant import History
from shrinkkit.measure import scoring, session
from shrinkkit.measure.session import Settings
from shrinkkit.measure.timing import Protocol
from shrinkkit.runtimes import registry
from shrinkkit.search import engine

BUILT_IN = ("dynamic-int8", "static-int8", "channels-50", "channels-50-static-int8")


def built_in(bench, seed):
    for name in BUILT_IN:
        yield {}, shrinkkit.read_recipe(name).settings()


def sweep(bench, seed):
    """Yield one share for all layers, by precision, from mild to strong."""
    for share, precision in itertools.product((0.25, 0.5, 0.625, 0.75, 0.875), bench.space.precisions[::-1]):
        choices = bench.space.plain(precision=precision, channels=share)
        yield choices, bench.space.recipe(choices)


def random(bench, seed):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    while True:
        choices = study.ask(bench.space.distributions()).params
        yield choices, bench.space.recipe(choices)


def tpe(bench, seed):
    """Yield what Optuna's sampler proposes with its defaults and the budget as a constraint."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    while True:
        asked = study.ask(bench.space.distributions())
        trial = yield asked.params, bench.space.recipe(asked.params)
        engine._tell(study, asked, trial, bench.budget.want)


def contest(name, bench, minutes, seed):
    """Return the trials of a contestant that trains whatever it proposes."""
    proposals, trials, begin = globals()[name](bench, seed), [], time.monotonic()
    proposed = next(proposals)
    while proposed and time.monotonic() - begin < 60 * minutes:
        trials.append(bench.trial(len(trials), *proposed, best=0.0))
        try:
            proposed = proposals.send(trials[-1])
        except StopIteration:
            break
    return trials


def final(bench, recipe):
    """Return the speed-up over the unchanged file and the change on the test split of a recipe made again."""
    task, settings = bench.settings.task, bench.settings
    with tempfile.TemporaryDirectory(dir=bench.run.path) as folder:
        steps = [stages.stage(name, values) for one in recipe["stages"] for name, values in one.items()]
        model, history = bench._applied(task.model, History(), steps)
        file = bench._file(RunFolder(folder), model, recipe["precision"], history)
        pair = {BASELINE: bench.baseline, "winner": file}
        compared, _ = session.compare_latency(pair, settings, protocol=Protocol(width=0.01))
        scores = [scoring.scores(one.loaded, task, task.test).sample for one in pair.values()]
    return compared["winner"].speedup, estimate.paired_difference(*scores, bounds=task.score.range), file.size_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--target", default="cpu/openvino")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--drop", type=float, default=0.01)
    chosen = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    threads, task = registry.use_threads(0), shrinkkit.load_task(chosen.task)
    for seed in range(chosen.seeds):
        settings = Settings(target=registry.resolve(chosen.target), task=task, threads=threads, seed=seed)
        budget = Budget(accuracy_drop=chosen.drop)
        with tempfile.TemporaryDirectory() as folder:
            bench = engine._Bench.on(Path(folder), settings, budget)
            for name in ("built_in", "sweep", "random", "tpe", "ours"):
                if name == "ours":
                    trials = engine.run(folder, settings, minutes=chosen.minutes, budget=budget).trials
                else:
                    trials = contest(name, bench, chosen.minutes, seed)
                best = max((t for t in trials if t.holds), key=lambda t: t.better(budget.want), default=None)
                if best is None:
                    print(f"{name:9} seed {seed}: {len(trials)} trials, none keeps the budget", flush=True)
                    continue
                speed, change, size = final(bench, best.recipe)
                print(
                    f"{name:9} seed {seed}: {len(trials):3} trials, {best.speedup.value:.2f}x in the search, "
                    f"{speed.value:.2f}x [{speed.low:.2f}, {speed.high:.2f}] again, change on the test split "
                    f"{100 * change.value:+.2f} [{100 * change.low:+.2f}, {100 * change.high:+.2f}], {size:,} bytes",
                    flush=True,
                )


if __name__ == "__main__":
    main()
