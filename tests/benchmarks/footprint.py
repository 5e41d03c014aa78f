"""How near is the peak memory that shrinkkit reads from the system to what torch's allocator handed out?

Each model runs in a fresh process. For comparison, the common method: resident memory after a call minus before it.

    python tests/benchmarks/footprint.py
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from shrinkkit.measure import peak_memory

MB = 2**20


def _layers(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(width, width), nn.GELU())))


def _convolutions(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU())


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "linear layers, 24,576 rows": lambda: (_layers(512, 3), torch.randn(24576, 512)),
    "linear layers, 102,400 rows": lambda: (_layers(512, 3), torch.randn(102400, 512)),
    "convolutions, 256 x 256 pixels": lambda: (_convolutions(32), torch.randn(8, 3, 256, 256)),
    "a transformer layer, 512 tokens": lambda: (
        nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0),
        torch.randn(32, 512, 256),
    ),
}


def one(name: str) -> dict[str, float]:
    """Return in MB what a call takes: by the system, by the allocator, and by resident memory after and before."""
    torch.set_num_threads(2)
    model, inputs = MODELS[name]()
    model.eval()
    with torch.inference_mode():
        model(inputs)  # the first call also makes what later ones reuse
        before = peak_memory._status("VmRSS")
        peak_memory._reset_peak()
        kept = model(inputs)
        system, after = peak_memory._status("VmHWM") - before, peak_memory._status("VmRSS") - before
        del kept
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            model(inputs)
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return {"system": system / MB, "allocator": peak / MB, "after minus before": after / MB}


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    # As `peak_memory` does: large blocks go back to the system when they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    rows = {}
    for name in MODELS:
        command = [sys.executable, __file__, "--one", name]
        rows[name] = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    if options.json:
        print(json.dumps(rows))
        return
    print("| model | allocator's peak, MB | shrinkkit | difference | resident memory after - before |")
    print("| --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        apart = row["system"] / row["allocator"] - 1
        after = row["after minus before"]
        print(f"| {name} | {row['allocator']:.1f} | {row['system']:.1f} | {apart:+.2%} | {after:.1f} |")


if __name__ == "__main__":
    main()
