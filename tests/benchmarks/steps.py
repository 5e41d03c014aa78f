"""What does a step cost beyond its work, started cold and forked from a process with the imports, and is timing equal?

Each round executes a notebook both ways. It multiplies two matrices and times a small convolutional network, in torch
and in ONNX Runtime. Printed are the seconds of the whole step, those until the first cell and after the last, and the
ratio of the latencies (cold over warm) with a 95 % interval over rounds.

    python tests/benchmarks/steps.py --rounds 10
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import nbformat
import numpy as np
from scipy import stats

from shrinkkit.core import machines
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.pipeline import steps
from shrinkkit.pipeline.plan import Planned

TIMED = """
import json, pathlib, statistics, time
import torch
from torch import nn
from shrinkkit.runtimes import files
torch.set_num_threads(threads)
torch.manual_seed(0)
began = time.time()
torch.ones(64, 64) @ torch.ones(64, 64)
multiplied = time.time()
model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))).eval()
x = torch.randn(4, 32, 48, 48)
session = files.load(pathlib.Path(PATH), runtime="onnxruntime", threads=threads).clone().bind((x,))
latencies = {}
with torch.inference_mode():
    for name, call in (("torch", lambda: model(x)), ("onnxruntime", session)):
        for _ in range(30):
            call()
        times = []
        for _ in range(300):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        latencies[name] = statistics.median(times)
json.dump({"began": began, "multiplied": multiplied, "ended": time.time(), **latencies}, open(OUT, "w"))
"""


def main() -> None:
    """Run all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    threads = machines.cores()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        _write_model(folder / "model.onnx")
        source = TIMED.replace("PATH", repr(str(folder / "model.onnx"))).replace("OUT", repr(str(folder / "out.json")))
        cells = [
            nbformat.v4.new_code_cell("threads: int = 1  # of torch", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(source),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "timed.ipynb")
        step = Planned("4-timed", "4-timed", "", {"threads": threads}, (), "none")
        run = RunFolder(folder / "run")
        run.path.mkdir()
        start = time.time()
        warm_start = steps.WarmStart([step], threads, stack)
        warm_start.addresses(step, lambda *_: None)
        print(f"imports, once: {time.time() - start:.2f} s")
        found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for i in range(rounds):
            for kind in ("cold", "warm") if i % 2 else ("warm", "cold"):
                start = time.time()
                ended = steps.execute(
                    folder / "timed.ipynb",
                    step,
                    run,
                    timeout_s=300,
                    threads=threads,
                    tick=lambda *_: None,
                    warm_start=warm_start if kind == "warm" else None,
                )
                if ended.error:
                    raise SystemExit(ended.error)
                out = json.loads((folder / "out.json").read_text())
                found[kind].append(
                    out
                    | {
                        "whole step": time.time() - start,
                        "until the first operation": out["multiplied"] - start,
                        "over its work": time.time() - start - (out["ended"] - out["began"]),
                    }
                )
    for name in ("whole step", "until the first operation", "over its work"):
        print(name, *(f"{kind} {np.median([one[name] for one in found[kind]]):.2f} s" for kind in found))
    for name in ("torch", "onnxruntime"):
        logs = np.log([c[name] / w[name] for c, w in zip(found["cold"], found["warm"], strict=True)])
        half = stats.t.ppf(0.975, rounds - 1) * logs.std(ddof=1) / np.sqrt(rounds)
        low, mean, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
        print(f"{name}: latency cold over warm {mean:.4f} ({low:.4f}-{high:.4f})")


def _write_model(path: Path) -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))).eval()
    torch.onnx.export(model, (torch.randn(4, 32, 48, 48),), path, dynamo=True, external_data=False, verbose=False)


if __name__ == "__main__":
    main()
