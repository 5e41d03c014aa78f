"""How much memory does compressing take, beyond the model that is compressed and the one that comes of it?

Each way of compressing runs for each runtime in a fresh process, as the steps of a study do: the task is loaded, the
model is compressed, its file is written and verified. What counts is the most that the process and its children ever
held, by the system's own count, above what it held before the model was made. By then it has compressed a tiny model in
the same way, so that libraries and their code are in memory already.

    python tests/benchmarks/memory.py
    python tests/benchmarks/memory.py --megabytes 200 --way dynamic-int8 --runtime torch

The goal: baseline + variant + 300 MB, where the baseline is the model's weights and the variant its file. A gigabyte of
weights wants up to 8 GB of free memory and 4 GB of disk.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.data import TensorDataset

from shrinkkit.core import store
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.stages import stage
from shrinkkit.core.variant import History
from shrinkkit.errors import Unsupported, brief
from shrinkkit.measure import peak_memory
from shrinkkit.measure.peak_memory import RESET
from shrinkkit.runtimes import registry
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import variants
from shrinkkit.transforms.transform import apply_stage

MB = 1_000_000
ALLOWED = 300 * MB
WIDTH = 2048
"""Of a layer: 17 MB of weights, a size that the system's allocator reuses badly."""
ROW, BEFORE = "row.json", "before"
PRUNE: dict[str, dict[str, Any]] = {
    "channels-50": {"prune-channels": {"ratio": 0.5}},
    "weights-80": {"prune-weights": {"ratio": 0.8}},
}
QUANTIZE = ("dynamic-int8", "static-int8", "float16", "bfloat16")
WAYS = ("baseline", *PRUNE, *QUANTIZE)
RUNTIMES = ("torch", "inductor", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Row:
    """What one way of compressing took for one runtime, in bytes."""

    way: str
    runtime: str
    baseline: int = 0
    variant: int = 0
    peak: int = 0
    duration_s: float = 0.0
    refused: str = ""
    """Why the runtime cannot have this variant; then nothing was measured."""
    failed: str = ""
    """How the process ended, if not as it should."""

    @property
    def allowed(self) -> int:
        return self.baseline + self.variant + ALLOWED


def score(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float()


def task(megabytes: float) -> Task:
    """Return a task of a few examples whose model is a plain MLP with `megabytes` of FP32 weights."""
    torch.manual_seed(0)
    width = WIDTH if megabytes > 100 else 64
    depth = max(2, round(megabytes * MB / (4 * width**2)))
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
    data = TensorDataset(torch.randn(8, width), torch.arange(8))
    return Task(
        name="wide",
        model=nn.Sequential(*layers, nn.Linear(width, 10)).eval(),
        example=(data.tensors[0][:4],),
        train=data,
        calibration=data,
        validation=data,
        test=data,
        score=score,
        loss=nn.functional.cross_entropy,
    )


def make(way: str, runtime: str, megabytes: float, run: Path) -> tuple[int, int]:
    """Compress as a study's step does, and return the bytes of the baseline's weights and of the variant's file."""
    the_task = task(megabytes)
    folder = run / "variants" / way
    if way in PRUNE:
        model, history = the_task.model, History(BASELINE)
        for name, settings in PRUNE[way].items():
            model, history = apply_stage(model, the_task, stage(name, settings), history=history)
        made = variants.write(folder, the_task, model, runtimes=[runtime], history=history)
    elif way in QUANTIZE:
        precision = {way: {"calibration_examples": 8} if way == "static-int8" else {}}
        made = variants.write(folder, the_task, the_task.model, precision=precision, runtimes=[runtime])
    else:
        made = variants.write(folder, the_task, the_task.model, runtimes=[runtime])
    return sum(p.nbytes for p in the_task.model.parameters()), sum(file.size_bytes for file in made.files)


def one(way: str, runtime: str, megabytes: float, folder: Path) -> None:
    """Write the row of one way and runtime into `folder`, and before it what the process held to begin with."""
    registry.use_threads(1)
    try:
        # A step finds the baseline's record beside what it makes.
        make("baseline", "torch", 1, folder / "tiny")
        make(way, runtime, 1, folder / "tiny")
    except Unsupported as error:
        store.write_text(folder / ROW, json.dumps(asdict(Row(way, runtime, refused=brief(error)))))
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, start = peak_memory._status("VmRSS"), time.perf_counter()
    RESET.write_text("5", encoding="ascii")
    store.write_text(folder / BEFORE, str(before))
    baseline, variant = make(way, runtime, megabytes, folder / "large")
    peak = peak_memory._status("VmHWM") - before
    row = Row(way, runtime, baseline, variant, peak, time.perf_counter() - start)
    store.write_text(folder / ROW, json.dumps(asdict(row)))


def watch(way: str, runtime: str, megabytes: float, folder: Path) -> Row:
    """Return the row of one way and runtime, measured in a process of its own and with what its children held."""
    command = [sys.executable, __file__, "--one", way, runtime, str(folder), "--megabytes", str(megabytes)]
    most = 0
    with (folder / "printed").open("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if (folder / BEFORE).is_file():
                most = max(most, _family(process.pid) - int((folder / BEFORE).read_text()))
            time.sleep(0.02)
        if process.returncode or not (folder / ROW).is_file():
            printed.seek(0)
            cause = (printed.read().strip().splitlines() or [""])[-1]
            return Row(way, runtime, failed=f"status {process.returncode}: {cause}")
    row = Row(**json.loads((folder / ROW).read_text()))
    return replace(row, peak=max(row.peak, most))


def _family(pid: int) -> int:
    """Return what a process and its children hold, 0 for one without children, which counts itself better."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        # A fork shares its pages with its parent, and they count once.
        return sum(p.memory_full_info().pss for p in [psutil.Process(pid), *children]) if children else 0
    except psutil.Error:
        return 0


def complaints(rows: Sequence[Row]) -> list[str]:
    """Return where the goal is missed, or could not be looked at."""
    found = [f"{r.way} for {r.runtime}: {r.failed}" for r in rows if r.failed]
    measured = [r for r in rows if r.peak]
    found += [
        f"{r.way} for {r.runtime}: {(r.peak - r.allowed) / MB:,.0f} MB above baseline + variant + {ALLOWED // MB} MB"
        for r in measured
        if r.peak > r.allowed
    ]
    return found if measured else [*found, "nothing was measured"]


def show(row: Row) -> None:
    said = row.refused or row.failed
    if said:
        print(f"{row.way:14}{row.runtime:13}  {'cannot be had' if row.refused else 'failed'}: {said}", flush=True)
        return
    figures = "".join(f"{value / MB:10,.0f}" for value in (row.baseline, row.variant, row.peak, row.allowed))
    print(f"{row.way:14}{row.runtime:13}{figures}{row.duration_s:8.0f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000, help="of the model's FP32 weights (1000)")
    parser.add_argument("--way", action="append", choices=WAYS, help="may be repeated (all)")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="may be repeated (all)")
    parser.add_argument("--folder", type=Path, help="where files go while they are made (the system's temporary one)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, runtime, folder = arguments.one
        one(way, runtime, arguments.megabytes, Path(folder))
        return 0
    print(f"{'way':14}{'runtime':13}{'baseline':>10}{'variant':>10}{'peak':>10}{'allowed':>10}  MB{'s':>4}")
    rows = []
    for way in arguments.way or WAYS:
        for runtime in arguments.runtime or RUNTIMES:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                rows.append(watch(way, runtime, arguments.megabytes, Path(folder)))
            show(rows[-1])
    if arguments.json:
        store.write_text(arguments.json, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    missed = complaints(rows)
    print("\n" + ("\n".join(f"missed: {text}" for text in missed) or "The goal is met."))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
