"""A benchmark of the model files: is each as fast and as exact as what the runtime's own makers recommend?

For every target that can run here, the file that shrinkkit makes takes turns with the one that the runtime's
recommended pipeline makes of the same FP32 model and calibration data, all in one run, beside FP32 on every target:

    python tests/benchmarks/targets.py
    python tests/benchmarks/targets.py --model resnet18 --seconds 60 --json rows.json

Run it on a machine that does nothing else. The goals: latency at most 1.1 times that of the recommended pipeline, and a
cosine of the outputs that is not lower by more than 0.002.
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shrinkkit import quiet
from shrinkkit.core import estimate, machines
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.target import Target
from shrinkkit.measure import benchmark
from shrinkkit.runtimes import files as model_files
from shrinkkit.runtimes import registry
from shrinkkit.runtimes.base import BuildRequest, Loaded
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.tasks import loader, outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.transforms import variants

MODELS = ("digits-cnn", "resnet18", "digits-transformer")
METHODS = {"digits-cnn": "static-int8", "resnet18": "static-int8", "digits-transformer": "dynamic-int8"}
MOST_SLOWER, MOST_COSINE_LOST = 1.1, 0.002
OURS, THEIRS, FLOAT = "shrinkkit", "recommended", "FP32"
SLOT_MS = 6.0


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut around them."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


def resnet18() -> nn.Module:
    """Return a network of the shape of ResNet-18, with random weights and settled statistics.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Table 1.
    """
    torch.manual_seed(0)
    stages = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        *(Residual(*stage) for stage in [*stages, (512, 512, 1)]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 1000),
    )
    with torch.no_grad():
        for seed in range(8):
            model.train()(photographs(8, seed)[0])
    return model.eval()


def photographs(count: int, seed: int) -> Example:
    """Return images of (count, 3, 224, 224) with structure at several scales, as photographs have it."""
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.randn(count, 3, size, size, generator=generator) for size in (4, 14, 56, 224)]
    return (sum((F.interpolate(s, size=(224, 224), mode="bilinear") for s in scales[1:]), scales[0].mean()),)


@dataclass(frozen=True)
class Subject:
    """A model with the data that its compression and its judgement need."""

    name: str
    model: nn.Module
    example: Example
    calibration: Sequence[Example]
    unseen: Sequence[Example]

    @property
    def method(self) -> str:
        return METHODS[self.name]


def subject(name: str) -> Subject:
    if name == "resnet18":
        batches = [photographs(1, seed) for seed in range(100, 164)]
        return Subject(name, resnet18(), batches[0], batches[:32], batches[32:])
    task = loader.load(name)
    unseen = [(torch.stack([task.test[i][0] for i in range(at, at + 8)]),) for at in range(0, 400, 8)]
    return Subject(name, task.model, task.example, variants.calibration(task, 100), unseen)


def onnxruntime_file(subject: Subject, folder: Path) -> Loaded:
    """Return what ONNX Runtime's documentation recommends: pre-processing, then QDQ with per-channel weights.

    Source: ONNX Runtime, "Quantize ONNX Models".
    """
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, prepared, path = (folder / f"{name}.onnx" for name in ("plain", "prepared", "recommended"))
    onnx_export.write(subject.model, subject.example, plain)
    quant_pre_process(str(plain), str(prepared))
    if subject.method == "dynamic-int8":
        quantize_dynamic(str(prepared), str(path), per_channel=True)
        return model_files.load(path, runtime="onnxruntime", threads=torch.get_num_threads())
    names = [i.name for i in model_files.load(plain, runtime="onnxruntime").source.get_inputs()]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(subject.calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return {n: x.numpy() for n, x in zip(names, batch, strict=True)} if batch else None

    quantize_static(str(prepared), str(path), Reader(), per_channel=True)
    return model_files.load(path, runtime="onnxruntime", threads=torch.get_num_threads())


def openvino_file(subject: Subject, folder: Path) -> Loaded:
    """Return what OpenVINO's documentation recommends: NNCF on the OpenVINO model, with its defaults.

    Source: OpenVINO, "Post-training Quantization with NNCF", and "LLM Weight Compression" for weights alone.
    """
    import nncf
    import openvino

    plain, path = folder / "plain.onnx", folder / "recommended.xml"
    onnx_export.write(subject.model, subject.example, plain)
    model = openvino.Core().read_model(plain)
    if subject.method == "dynamic-int8":
        made = nncf.compress_weights(model)
    else:
        data = nncf.Dataset(list(subject.calibration), lambda batch: [x.numpy() for x in batch])
        made = nncf.quantize(model, data)
    openvino.save_model(made, path, compress_to_fp16=False)
    return model_files.load(path, runtime="openvino", threads=torch.get_num_threads())


def inductor_file(subject: Subject, folder: Path) -> Loaded:
    """Return what PyTorch's documentation recommends: PT2E with the quantizer for x86, compiled with freezing.

    Source: PyTorch, "PyTorch 2 Export Quantization with X86 Backend through Inductor".
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    dynamic = subject.method == "dynamic-int8"
    with torch.no_grad():
        program = torch.export.export(subject.model, subject.example).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
        observed = prepare_pt2e(program, quantizer)
        for batch in subject.calibration:
            observed(*batch)
        quantized = convert_pt2e(observed)
        path = folder / "recommended.pt2"
        made = torch.export.export(quantized, subject.example)
        made._example_inputs = None
        torch.export.save(made, path)
    return model_files.load(path, runtime="inductor")


def torch_file(subject: Subject, folder: Path) -> Loaded:
    """Return what PyTorch's documentation recommends for eager mode: FX static int8, or dynamic int8, with `x86`.

    Source: PyTorch, "FX Graph Mode Post Training Static Quantization" and "Dynamic Quantization".
    """
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    path = folder / "recommended.torchscript.pt"
    with torch.no_grad():
        if subject.method == "dynamic-int8":
            made: nn.Module = quantize_dynamic(subject.model, {nn.Linear}, torch.qint8)
        else:
            made = prepare_fx(subject.model, get_default_qconfig_mapping("x86"), subject.example)
            for batch in subject.calibration:
                made(*batch)
            made = convert_fx(made)
        script = torch.jit.trace(made, subject.example, check_trace=False)
        script.save(str(path), _extra_files={"quantized_engine": "x86"})
    return model_files.load(path, runtime="torch")


TODAY = ("today", "eager")

RECOMMENDED: dict[str, Callable[[Subject, Path], Loaded]] = {
    "torch": torch_file,
    "inductor": inductor_file,
    "onnxruntime": onnxruntime_file,
    "openvino": openvino_file,
}


@dataclass(frozen=True)
class Row:
    """One model file on one target."""

    model: str
    target: str
    file: str
    ms: float
    against_today: Estimate
    """Speed against the module as called in eager PyTorch, with its 95 % interval."""
    against_recommended: Estimate | None
    """Latency over that of the recommended pipeline: below 1 is faster."""
    cosine: float
    size_bytes: int
    note: str = ""


def files(subject: Subject, folder: Path) -> tuple[dict[tuple[str, str], Loaded], dict[tuple[str, str], str]]:
    """Return FP32, ours and the recommended file for each target that can run here, and what could not be made."""
    found: dict[tuple[str, str], Loaded] = {}
    missing: dict[tuple[str, str], str] = {}
    for target, reason in registry.available().items():
        device, runtime = (at := Target.parse(target)).device, at.runtime
        if device != "cpu":
            continue
        if reason:
            missing[target, OURS] = reason
            continue
        for file in (FLOAT, OURS, THEIRS):
            place = folder / runtime / file
            place.mkdir(parents=True)
            try:
                with quiet.libraries(), contextlib.redirect_stdout(io.StringIO()):
                    if file == THEIRS:
                        found[target, file] = RECOMMENDED[runtime](subject, place)
                        continue
                    method = subject.method if file == OURS else ""
                    scratch = place / "scratch"
                    scratch.mkdir()
                    made = model_files.build(
                        runtime,
                        BuildRequest(place, scratch, subject.model, subject.example, method, (), subject.calibration),
                    )
                    path = place / made.file.path
                    found[target, file] = model_files.load(path, runtime=runtime, threads=torch.get_num_threads())
            except Exception as error:  # whatever stops one file must not stop the others
                missing[target, file] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found, missing


def take_turns(calls: dict[tuple[str, str], Callable[[], Any]], seconds: float) -> dict[tuple[str, str], list[float]]:
    """Return the fastest call, in ms, of each slot of each file; all take turns in a random order, there and back."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    random, start = Random(0), time.perf_counter()
    once = {}
    for key, call in calls.items():
        call()
        before = time.perf_counter()
        call()
        once[key] = 1e3 * (time.perf_counter() - before)
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < 20:
        order = random.sample(list(calls), len(calls))
        for key in [*order, *reversed(order)]:
            # Not recorded: it meets the caches and the threads that the file before it left.
            calls[key]()
            slot = []
            for _ in range(max(1, min(20, math.ceil(SLOT_MS / once[key])))):
                before = time.perf_counter_ns()
                calls[key]()
                slot.append((time.perf_counter_ns() - before) / 1e6)
            times[key].append(min(slot))
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> Estimate:
    """Return over / under from slots that were taken in the same rounds, with the 95 % interval."""
    logs = np.log(np.asarray(over) / np.asarray(under)).reshape(-1, 2).mean(1)
    return estimate.block_ratio(logs, seed=0)


def cosine(loaded: Loaded, subject: Subject) -> float:
    """Return the mean cosine between the outputs of a file and of the FP32 model on unseen data."""
    found = []
    for batch in subject.unseen:
        with torch.inference_mode():
            wanted = outputs.tensors(subject.model(*batch))[0].flatten(1).double()
        given = outputs.tensors(loaded(*batch))[0].flatten(1).double()
        found.append(F.cosine_similarity(wanted, given).mean().item())
    return statistics.mean(found)


def measure(subject: Subject, seconds: float) -> tuple[list[Row], dict[tuple[str, str], str]]:
    with tempfile.TemporaryDirectory() as folder:
        found, missing = files(subject, Path(folder))
        calls = {key: loaded.bind(subject.example) for key, loaded in found.items()}
        times = take_turns({TODAY: benchmark.copies(subject.model, subject.example)(), **calls}, seconds)
        rows = []
        for (target, file), loaded in found.items():
            own, theirs = times[target, file], times.get((target, THEIRS))
            rows.append(
                Row(
                    model=subject.name,
                    target=target,
                    file=file,
                    ms=statistics.median(own),
                    against_today=ratio(times[TODAY], own),
                    against_recommended=ratio(own, theirs) if file == OURS and theirs else None,
                    cosine=cosine(loaded, subject),
                    size_bytes=sum(
                        part.stat().st_size for part in (loaded.path, loaded.path.with_suffix(".bin")) if part.is_file()
                    ),
                )
            )
    return rows, missing


def complaints(rows: Sequence[Row], missing: dict[tuple[str, str], str]) -> list[str]:
    """Return where a goal is missed, or could not be looked at."""
    found = [f"no file of {file} on {target}: {reason}" for (target, file), reason in missing.items()]
    for row in rows:
        if row.against_recommended and row.against_recommended.low > MOST_SLOWER:
            found.append(f"{row.model} on {row.target}: {row.against_recommended.value:.2f} x the recommended latency")
        theirs = next((r for r in rows if (r.model, r.target, r.file) == (row.model, row.target, THEIRS)), None)
        if row.file == OURS and theirs and row.cosine < theirs.cosine - MOST_COSINE_LOST:
            found.append(f"{row.model} on {row.target}: cosine {row.cosine:.4f}, recommended {theirs.cosine:.4f}")
    return found


def show(rows: Sequence[Row], missing: dict[tuple[str, str], str]) -> None:
    print(
        f"{'target':18}{'file':14}{'ms':>8}{'size':>10}{'speed against PyTorch today':>30}{'cosine':>10}"
        "  latency / recommended"
    )
    for row in rows:
        against = row.against_recommended
        beside = f"{against.value:.3f} [{against.low:.3f}, {against.high:.3f}]" if against else ""
        speed = row.against_today
        print(
            f"{row.target:18}{row.file:14}{row.ms:8.3f}{row.size_bytes / 1e3:8.0f}kB"
            f"{f'{speed.value:.2f} [{speed.low:.2f}, {speed.high:.2f}]':>30}{row.cosine:10.5f}  {beside}"
        )
    for (target, file), reason in missing.items():
        print(f"{target:18}{file:14}  {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated (all)")
    parser.add_argument("--seconds", type=float, default=40.0, help="of taking turns, per model (40)")
    parser.add_argument("--threads", type=int, default=0, help="of one call (every core)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    threads = registry.use_threads(arguments.threads)
    print(f"{machines.hardware(Target('cpu', 'torch'))}, {threads} threads")
    every: list[Row] = []
    lacking: dict[tuple[str, str], str] = {}
    for name in arguments.model or MODELS:
        one = subject(name)
        print(f"\n{name}, {one.method}, batch {len(one.example[0])}")
        rows, missing = measure(one, arguments.seconds)
        show(rows, missing)
        every += rows
        lacking |= missing
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in every], indent=1) + "\n")
    missed = complaints(every, lacking)
    print("\n" + ("\n".join(f"missed: {text}" for text in missed) or "All goals are met."))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
