"""Do the paths that claim CUDA work, and what do they give? Prints a report in Markdown, with the name of the GPU.

Runs the tests marked `gpu`, then a study on every CUDA target of this machine: export and loading of files in 32 and 16
bits, training, timing by events, peak memory, time per layer, robustness. Without a GPU it says so and ends.

    python tests/benchmarks/cuda.py
    python tests/benchmarks/cuda.py --device cpu    # the same script, to try it without a GPU
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from shrinkkit.display import formats
from shrinkkit.results import results
from shrinkkit.runtimes import registry

RECIPES = ("channels-50", "weights-80", "dynamic-int8", "static-int8", "float16", "bfloat16")
"""Int8 is among them so that the report shows what is said where a target has none."""
TESTS = Path(__file__).parents[1]


def main() -> None:
    """Run tests and study, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--effort", choices=["quick", "standard", "thorough"], default="quick")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("Skipped: torch sees no GPU on this machine, so no path of CUDA was run.")
        return
    missing = {name: why for name, why in registry.available().items() if name.startswith(f"{options.device}/")}
    targets = [name for name, why in missing.items() if not why]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    print(f"# CUDA paths on {name}, torch {torch.__version__}\n")
    for target, why in missing.items():
        print(f"- {target}: {f'unavailable: {why}' if why else 'available'}")
    tests = [sys.executable, "-m", "pytest", str(TESTS), "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    tested = subprocess.run(tests, cwd=TESTS.parent, capture_output=True, text=True)
    print(f"\nTests marked `gpu`: {tested.stdout.strip().rpartition(chr(10))[2]}\n")
    with tempfile.TemporaryDirectory() as reports:
        command = [sys.executable, "-m", "shrinkkit.cli", "run", "digits-cnn", "--mode", "all", "--quiet"]
        command += ["--effort", options.effort, "--reports", reports]
        command += [part for recipe in RECIPES for part in ("--recipe", recipe)]
        command += [part for target in targets for part in ("--target", target)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if not (run := Path(reports) / "digits-cnn").is_dir():
            raise SystemExit(ran.stderr)
        found = results.load(run)
    print("| variant | target | state | accuracy | latency | vs FP32 | peak memory | layers timed |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found.rows:
        record = found.measured.get(row.target)
        one = next((m for m in record.measurements if m.variant == row.variant), None) if record else None
        cells = [
            *(row.variant, row.target, row.state if row.state == "measured" else f"{row.state}: {row.reason[:120]}"),
            formats.percent(row.accuracy.value) if row.accuracy else "",
            formats.milliseconds(row.latency_ms.value) if row.latency_ms else "",
            f"{row.speedup.value:.2f} ({row.timing})" if row.speedup else "",
            formats.size(one.memory.peak_bytes) if one and one.memory else "",
            str(len(one.layers)) if one and one.layers else "",
        ]
        print(f"| {' | '.join(cells)} |")
    robust = ", ".join(f"{at}: {len(record.by_name())} variants" for at, record in found.robust.items())
    print(f"\nRobustness: {robust or 'not measured'}. Training: {_trained(found)}")
    print("\n".join(f"- {note}" for note in found.notes))
    sys.exit(tested.returncode or ran.returncode)


def _trained(found: results.Results) -> str:
    notes = [note for variant in found.variants.values() for note in variant.notes if "train" in note.lower()]
    return "; ".join(notes) or "no note of the device."


if __name__ == "__main__":
    main()
