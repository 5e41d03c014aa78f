"""A benchmark of what is delivered: how much smaller and faster do the bundled studies make the bundled models?

Every recipe of a bundled study is applied, its file for every CPU target made, and all of them take turns in one run
with PyTorch today, with equal threads. Accuracy is that of the test split, against the model it came from:

    python tests/benchmarks/delivered.py
    python tests/benchmarks/delivered.py --task digits-lstm --seconds 30 --inductor

Run it on a machine that does nothing else. The goals, within one point of accuracy: digits-cnn at least 5 times faster
and 12 times smaller on disk, digits-transformer and digits-lstm at least 2 times faster and 3.5 times smaller.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import targets as files
import torch

from shrinkkit.core import machines, studies
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.stages import FLOAT32
from shrinkkit.core.target import Target
from shrinkkit.errors import ShrinkkitError
from shrinkkit.measure import benchmark, scoring
from shrinkkit.runtimes import files as model_files
from shrinkkit.runtimes import registry
from shrinkkit.runtimes.base import BuildRequest, Loaded
from shrinkkit.tasks import loader
from shrinkkit.transforms import variants
from shrinkkit.transforms.transform import apply_stage

GOALS = {"digits-cnn": (5.0, 12.0), "digits-transformer": (2.0, 3.5), "digits-lstm": (2.0, 3.5)}
MOST_LOST = 0.01
USUAL = ("FP32", "torch")


def delivered(name: str, runtimes: list[str], folder: Path) -> tuple[dict[tuple[str, str], Loaded], dict[str, str]]:
    """Return the loaded file of every recipe of a bundled study for every runtime, and why others are missing."""
    task = loader.load(name)
    pruned: dict[str, torch.nn.Module] = {"": task.model}
    found, missing = {}, {}
    for recipe in [None, *studies.read_study(name).recipes]:
        key = ""
        for stage in recipe.stages if recipe else ():
            before, key = key, f"{key} {stage.to_dict()}"
            if key not in pruned:
                pruned[key], _ = apply_stage(pruned[before], task, stage)
        precision = recipe.precision if recipe else FLOAT32
        method = precision.name.removeprefix("float32")
        label = recipe.name if recipe else "FP32"
        for runtime in runtimes:
            place = folder / label / runtime
            (place / "scratch").mkdir(parents=True)
            observed = variants.calibration(task, getattr(precision.settings, "calibration_examples", 128))
            making = BuildRequest(place, place / "scratch", pruned[key], task.example, method, (), observed)
            try:
                made = model_files.build(runtime, making)
                path = place / made.file.path
                found[label, runtime] = model_files.load(path, runtime=runtime, threads=torch.get_num_threads())
            except ShrinkkitError as error:
                missing[f"{label} on {runtime}"] = str(error).splitlines()[0]
    return found, missing


def show(name: str, seconds: float, runtimes: list[str]) -> bool:
    """Print a line for every file and return whether one of them reaches the goal."""
    task = loader.load(name)
    faster, smaller = GOALS[name]
    with tempfile.TemporaryDirectory() as folder:
        found, missing = delivered(name, runtimes, Path(folder))
        calls = {key: loaded.bind(task.example) for key, loaded in found.items()}
        today = benchmark.copies(task.model, task.example)()
        times = files.take_turns({files.TODAY: today, **calls}, seconds)
        reference = scoring.scores(found[USUAL], task, task.test)
        usual_bytes = found[USUAL].path.stat().st_size
        reached = []
        print(f"\n{name}: at least {faster:g} times faster and {smaller:g} times smaller than PyTorch today")
        for (label, runtime), loaded in found.items():
            speed: Estimate = files.ratio(times[files.TODAY], times[label, runtime])
            size = usual_bytes / sum(
                part.stat().st_size for part in (loaded.path, loaded.path.with_suffix(".bin")) if part.is_file()
            )
            change = scoring.accuracy(task, scoring.scores(loaded, task, task.test), reference).difference
            assert change is not None
            good = change.value >= -MOST_LOST and speed.value >= faster and size >= smaller
            reached += [f"{label} on {runtime}"] if good else []
            print(
                f"{label:28}{runtime:13}{statistics.median(times[label, runtime]):8.3f} ms{speed.value:8.2f} x "
                f"[{speed.low:.2f}, {speed.high:.2f}]{size:8.2f} x smaller{1e2 * change.value:+8.2f} points"
                f" [{1e2 * change.low:+.2f}, {1e2 * change.high:+.2f}]{'  *' if good else ''}"
            )
    for what, why in missing.items():
        print(f"{what}: {why}")
    print("reached by " + ", ".join(reached) if reached else "not reached")
    return bool(reached)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=sorted(GOALS), help="may be repeated (all)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of taking turns, per task (30)")
    parser.add_argument("--threads", type=int, default=0, help="of one call (every core)")
    parser.add_argument("--inductor", action="store_true", help="compile for inductor too, which takes minutes")
    arguments = parser.parse_args()
    threads = registry.use_threads(arguments.threads)
    print(f"{machines.hardware(Target('cpu', 'torch'))}, {threads} threads")
    runtimes = ["torch", "onnxruntime", "openvino", *["inductor"] * arguments.inductor]
    reached = {name: show(name, arguments.seconds, runtimes) for name in arguments.task or GOALS}
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
