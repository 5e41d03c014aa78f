"""The speed-up that a form of file gives by itself: the same float model in each form, timed by shrinkkit.

Prints how fast each form is against the module as called today (eager), and the control: the model's file against the
same model written again, which must be the same within 1 %.

    python tests/benchmarks/forms.py [--seconds 8] [--threads 1]
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from shrinkkit import quiet
from shrinkkit.core import machines
from shrinkkit.core.measurement import Comparison, Conditions
from shrinkkit.core.target import Target
from shrinkkit.display.formats import interval, times
from shrinkkit.measure import benchmark
from shrinkkit.measure.benchmark import TimedModel
from shrinkkit.measure.timing import Make, Protocol
from shrinkkit.runtimes import files, registry
from shrinkkit.runtimes.base import Loaded
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.tasks import loader


def models() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """Return a model whose time is the interpreter's, one of many small operators, and the three bundled ones."""
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.ReLU())]
    convolutions = [layer for i in range(12) for layer in (nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.ReLU())]
    bundled = {name: loader.load(name) for name in ("digits-cnn", "digits-transformer", "digits-lstm")}
    return {
        "MLP of 8 layers, batch 1": (nn.Sequential(*layers).eval(), (torch.randn(1, 32),)),
        "CNN of 12 layers, batch 1": (nn.Sequential(*convolutions).eval(), (torch.randn(1, 3, 16, 16),)),
        **{name: (task.model, task.example) for name, task in bundled.items()},
    }


def compare(
    reference: Make, candidate: Make, example: tuple[torch.Tensor, ...], forms: tuple[str, str], seconds: float
) -> Comparison:
    """Return the paired timing of two makers of calls."""
    own = [
        Conditions(
            device="cpu",
            hardware=machines.hardware(Target("cpu", "torch")),
            runtime="torch",
            form=form,
            threads=torch.get_num_threads(),
            batch_size=len(example[0]),
            inputs_sha256=benchmark.inputs_sha256(example),
        )
        for form in forms
    ]
    return benchmark.time_pair(
        TimedModel(forms[0], reference, own[0]),
        TimedModel(forms[1], candidate, own[1]),
        across_runtimes=True,
        protocol=Protocol(cap_s=seconds),
    )


def fresh(file: Loaded, example: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """Return a new copy of a loaded file as a call."""
    return file.clone().bind(example)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    registry.use_threads(asked.threads)
    print("| model | `ep.module()`, as a .pt2 file loads | file for torch (TorchScript) | two exports of the model |")
    print("|---|---|---|---|")
    for name, (model, example) in models().items():
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second, quiet.libraries():
            paths = [torch_build.write(model, example, Path(folder))[0] for folder in (first, second)]
            program, _ = torch_build.write_program(model, example, Path(first))
            files = [files.load(path, runtime="torch") for path in (*paths, program)]
            makers = [partial(fresh, file, example) for file in files]
            eager = benchmark.copies(model, example)
            timed = [
                compare(eager, makers[2], example, ("eager", "graph"), asked.seconds),
                compare(eager, makers[0], example, ("eager", "torchscript"), asked.seconds),
                compare(makers[0], makers[1], example, ("torchscript", "torchscript"), asked.seconds),
            ]
        cells = [f"{times(one.speedup.value)} {interval(one.speedup)}" for one in timed]
        print(f"| {name} | {cells[0]} | {cells[1]} | {cells[2]} {timed[2].verdict} |", flush=True)


if __name__ == "__main__":
    main()
