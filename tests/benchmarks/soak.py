"""Does anything grow while a runner executes hundreds of steps: its memory, handles, processes, or files it leaves?

Each step is a small notebook in a kernel that is forked from a warm process. Printed is what the runner holds after the
first ten steps and at the end; exits with 1 if anything but memory has grown, or memory by more than 20 kB a step.

    python tests/benchmarks/soak.py --steps 200
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import nbformat
import psutil

from shrinkkit.core.run_folder import RunFolder
from shrinkkit.pipeline import steps
from shrinkkit.pipeline.plan import Planned

WARM_UP, LARGEST_KB = 10, 20.0
"""Steps before the first count, and kilobytes that a step may add to the memory of the runner."""


def held(folder: Path) -> dict[str, float]:
    """Return what this process and its children hold, and the files in `folder`, which all take for temporary ones."""
    own = psutil.Process()
    children = own.children(recursive=True)
    return {
        "memory of the runner (kB)": own.memory_full_info().uss / 1024,
        "memory of the process forked from (kB)": max((c.memory_info().rss for c in children), default=0) / 1024,
        "file handles": own.num_fds(),
        "threads": own.num_threads(),
        "child processes": len(children),
        "shared memory": len(os.listdir("/dev/shm")),
        "temporary files": sum(1 for _ in folder.rglob("*")),
    }


def main() -> None:
    """Execute the steps and print what grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    count = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        # What others leave in the common folders is not counted.
        os.environ["TMPDIR"] = tempfile.tempdir = name
        cells = [
            nbformat.v4.new_code_cell("threads: int = 1  # of torch", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("import torch\n(torch.ones(64, 64) @ torch.ones(64, 64)).sum()"),
        ]
        notebook = Path(name) / "soak.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
        step, run = Planned("4-soak", "4-soak", "", {"threads": 1}, (), "none"), RunFolder(Path(name) / "run")
        run.path.mkdir()
        warm_start = steps.WarmStart([step], 1, stack)
        start, first = time.monotonic(), dict[str, float]()
        for i in range(count):
            options = {"timeout_s": 300, "threads": 1, "tick": lambda *_: None, "warm_start": warm_start}
            if error := steps.execute(notebook, step, run, **options).error:
                raise SystemExit(error)
            first = held(Path(name)) if i == WARM_UP - 1 else first
        last = held(Path(name))
        seconds = (time.monotonic() - start) / count
    grown = {key: last[key] - first[key] for key in last}
    for key, growth in grown.items():
        print(
            f"{key:40s} {first[key]:9,.0f} {last[key]:9,.0f}  {growth:+9,.0f}  {growth / (count - WARM_UP):+.2f} a step"
        )
    print(f"{count} steps, {seconds:.2f} s each")
    limits = {key: LARGEST_KB * (count - WARM_UP) if "kB" in key else 0.0 for key in grown}
    sys.exit(1 if any(growth > limits[key] for key, growth in grown.items()) else 0)


if __name__ == "__main__":
    main()
