"""Time by layer: what each operator of a model file takes in one call, by the layer that it belongs to.

An exported program is stepped through operator by operator, TorchScript runs under torch's profiler, and ONNX Runtime
and OpenVINO profile themselves. This tells where the time of one model goes; for how fast it is beside another see
`benchmark`.
"""

import json
import math
import re
import statistics
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from shrinkkit import quiet
from shrinkkit.core.measurement import LayerTime
from shrinkkit.errors import Unsupported
from shrinkkit.runtimes import loading
from shrinkkit.runtimes.inductor import compiled
from shrinkkit.runtimes.onnx.onnxnames import SCOPES
from shrinkkit.runtimes.openvino import openvinograph
from shrinkkit.runtimes.torch import scripting
from shrinkkit.runtimes.torch.scripting import NOWHERE
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example

CAP_S, FEWEST = 2.0, 3
"""Seconds for which a file is called, and the calls that a slower model gets all the same."""

CONVERSIONS = frozenset(
    "quantize_per_tensor quantize_per_tensor_dynamic quantize_per_channel dequantize to _to_copy contiguous "
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear Cast ReorderInput ReorderOutput "
    "FakeQuantize Quantize Dequantize Convert Reorder".split()
)
"""Operators that only change a number format or the order of numbers in memory."""

_profile = partial(torch.profiler.profile, activities=[torch.profiler.ProfilerActivity.CPU])
_ROUNDS = 4
_Calls = list[list[tuple[str, str, float]]]
"""For each call its operators in order: layer, operator, ms."""


def measure(
    path: Path, *, runtime: str, inputs: Example, threads: int, device: str = "cpu", calls: int = 20
) -> tuple[LayerTime, ...]:
    """Return what each operator of each layer of the model file at `path` takes in one call, in the order they run.

    A layer is the innermost module that an operator was called in, by its name in the task's model. Times are medians
    over calls after a warm-up; operators of one kind in a layer are one entry. What runs in no module but the model
    itself has the layer ''. So has what belongs to no layer with weights where a file does not tell more: TorchScript
    of a model that torch.fx traced, and quantized ONNX.

    Args:
        path: A `.pt2`, `.torchscript.pt`, `.onnx` or OpenVINO `.xml` file.
        runtime: `torch`, `inductor`, `onnxruntime` or `openvino`.
        inputs: Positional inputs of one call, CPU tensors, batch first.
        threads: Intra-op threads of ONNX Runtime and OpenVINO; torch's are a setting of the process.
        device: `cpu`, or `cuda` for a `.pt2` file that torch runs.
        calls: Most calls. Slow models get fewer, so that all of them take about `CAP_S` seconds, but at least `FEWEST`.

    Raises:
        ModelFileError: The file is missing or damaged.
        Unsupported: The file is TorchScript and the device is not the CPU, or its operators differ from call to call.

    Source: torch.fx.Interpreter; torch.profiler; ONNX Runtime, "Profiling Tools"; OpenVINO, "Performance Counters".
    """
    if runtime == "openvino":
        loading.load(path, runtime=runtime, threads=threads)
        return _summed(openvinograph.times(path, inputs, threads=threads, number=partial(_number, calls=calls)))
    if runtime == "inductor":
        return _summed(compiled.times(path, inputs, device=device, number=partial(_number, calls=calls)))
    if runtime == "onnxruntime":
        return _summed(_onnxruntime(path, inputs, threads, calls))
    if path.suffix == ".pt2":
        return _summed(_exported(path, inputs, device, calls))
    if device != "cpu":
        raise Unsupported(
            f"{path.name} is TorchScript, whose operators are timed on the CPU only, got `device` {device!r}. "
            "A model that torch.export can take is timed by layer on a GPU too."
        )
    return _summed(_torchscript(path, inputs, calls))


def denormals(path: Path, *, runtime: str, inputs: Example | None = None) -> int:
    """Return how many denormal numbers the float weights of the model file at `path` hold.

    Denormal (subnormal in IEEE 754) is what float32 finds too small for full precision: not 0, and below 2^-126.
    Numbers in 16 bits count by what they are as float32, in which processors compute with them.

    Args:
        path: A `.pt2`, `.torchscript.pt`, `.onnx` or OpenVINO `.xml` file.
        runtime: `torch`, `inductor`, `onnxruntime` or `openvino`.
        inputs: Positional inputs of one call, CPU tensors. Given these, the outputs of a `.pt2` file's operators count
            too; those of other files cannot be seen.

    Raises:
        ModelFileError: The file is missing or damaged.
    """
    if runtime == "openvino":
        loading.load(path, runtime=runtime)
        return sum(_denormal(weight) for weight in openvinograph.weights(path))
    if runtime == "onnxruntime":
        import onnx

        loading.load(path, runtime=runtime)
        arrays = (onnx.numpy_helper.to_array(weight) for weight in onnx.load(str(path)).graph.initializer)
        return sum(_denormal(torch.from_numpy(array.copy())) for array in arrays if array.dtype.kind == "f")
    module = loading.module(path)
    found = sum(_denormal(t) for t in chain(module.parameters(), module.buffers()))
    if inputs is not None and path.suffix == ".pt2":
        with torch.inference_mode():
            (stepped := _Stepped(module, looks=True)).times(inputs)
        found += stepped.denormal
    return found


def _denormal(tensor: torch.Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    x = tensor.detach()
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return int(((x != 0) & (x.abs() < torch.finfo(x.dtype).smallest_normal)).sum())


def _summed(calls: _Calls) -> tuple[LayerTime, ...]:
    """Return the median over calls of what each kind of operator takes in each layer."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(calls))
    for number, call in enumerate(calls):
        for layer, operator, ms in call:
            totals[layer, operator][number] += ms
    medians = {key: statistics.median(ms) for key, ms in totals.items()}
    return tuple(LayerTime(layer, operator, ms, operator in CONVERSIONS) for (layer, operator), ms in medians.items())


def _number(call: Callable[[], Any], calls: int) -> int:
    """Warm `call` up, and return how many calls fit into the time."""
    taken = [_timed(call)]
    while len(taken) < FEWEST and sum(taken) < 1e3 * CAP_S:
        taken.append(_timed(call))
    return max(FEWEST, min(calls, int(1e3 * CAP_S / taken[-1])))


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _exported(path: Path, inputs: Example, device: str, calls: int) -> _Calls:
    stepped = _Stepped(loading.module(path, device=device), device)
    placed = tuple(x.to(device) for x in inputs)
    with torch.inference_mode():
        return [stepped.times(placed) for _ in range(_number(lambda: stepped.times(placed), calls))]


class _Stepped(torch.fx.Interpreter):
    """Runs an exported program operator by operator, with a clock before and after each; it may look for denormals."""

    def __init__(self, module: torch.fx.GraphModule, device: str = "cpu", *, looks: bool = False) -> None:
        super().__init__(module)
        self.device, self.looks = device, looks
        self.marks: list[tuple[str, str, Any, Any]] = []
        self.denormal = 0

    def times(self, inputs: Example) -> list[tuple[str, str, float]]:
        """Return layer, operator and ms of each operator in one run."""
        self.marks = []
        self.run(*inputs)
        if self.device != "cuda":
            return [(layer, name, (end - start) / 1e6) for layer, name, start, end in self.marks]
        torch.cuda.synchronize()
        return [(layer, name, start.elapsed_time(end)) for layer, name, start, end in self.marks]

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run `n`, timed if it computes tensors."""
        if not isinstance(n.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        start = self._mark()
        result = n.target(*args, **kwargs)
        end = self._mark()
        if made := outputs.tensors(result):
            self.marks.append((scripting.layer_of(n), scripting.operator(n.target), start, end))
        if self.looks:
            known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            # A view holds what was counted before.
            self.denormal += sum(_denormal(t) for t in made if t.untyped_storage().data_ptr() not in known)
        return result

    def _mark(self) -> Any:
        """Return the time in ns, or on a GPU an event in its stream."""
        if self.device != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _torchscript(path: Path, inputs: Example, calls: int) -> _Calls:
    module = loading.module(path)
    call = partial(module, *inputs)
    with quiet.libraries(), torch.inference_mode():
        each = -(-_number(call, calls) // _ROUNDS)
        owners = _owners(module, call, _layers(path))
        plain, recorded, events = [], [], []
        for _ in range(_ROUNDS):
            plain += [_timed(call) for _ in range(each)]
            with _profile() as profile:
                recorded += [_timed(call) for _ in range(each)]
            events += _outermost(
                (e.name(), e.start_ns(), e.start_ns() + e.duration_ns())
                for e in profile.profiler.kineto_results.events()
                if e.scope() == 0
            )
    if len(events) != len(recorded) * len(owners):
        raise Unsupported(
            f"{path.name} must run the same operators in every call to be timed by layer, but their number differs. "
            "Use ONNX Runtime for times by layer."
        )
    cost = max(0.0, min(recorded) - min(plain)) * len(recorded) / sum(inside for *_, inside in events)
    owned = zip(owners * len(recorded), events, strict=True)
    times = [(layer, scripting.operator(event[0]), _unrecorded(event, cost)) for layer, event in owned]
    return [times[i : i + len(owners)] for i in range(0, len(times), len(owners))]


def _unrecorded(event: Sequence[Any], cost: float) -> float:
    """Return the ms of an event less what it takes to record it and all that it called, at `cost` ms each."""
    _, start, end, inside = event
    return float(max(0.0, (end - start) / 1e6 - cost * inside))


def _outermost(spans: Iterable[tuple[Any, float, float]]) -> list[list[Any]]:
    """Return the spans that lie in no other, in order, each with the number of spans in it, itself included."""
    found: list[list[Any]] = []
    for name, start, end in sorted(spans, key=lambda span: (span[1], -span[2])):
        if found and end <= found[-1][2]:
            found[-1][3] += 1
        else:
            found.append([name, start, end, 1])
    return found


def _layers(path: Path) -> list[tuple[str, str]]:
    """Return the operators and layers that a script of an exported program states, [] for any other."""
    with zipfile.ZipFile(path) as archive:
        stated = next((name for name in archive.namelist() if name.endswith("/extra/layers")), "")
        return [(operator, layer) for operator, layer in json.loads(archive.read(stated))] if stated else []


def _aligned(operators: Iterable[str], stated: Sequence[tuple[str, str]]) -> list[str]:
    """Return the layer of each operator that ran, where TorchScript has left some of the stated ones out."""
    place, found = 0, []
    for operator in operators:
        ahead = next((i for i in range(place, len(stated)) if stated[i][0] == operator), None)
        found.append("" if ahead is None else stated[ahead][1])
        place = place if ahead is None else ahead + 1
    return found


def _owners(module: Any, call: Callable[[], Any], stated: Sequence[tuple[str, str]]) -> list[str]:
    """Return the layer of each operator of one call, in order."""
    with _profile(with_modules=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(trace := str(Path(folder) / "trace.json"))
        events = json.loads(Path(trace).read_text())["traceEvents"]
    # Operators have a namespace, calls of methods do not.
    found = [e for e in events if e.get("cat") == "cpu_op" and "::" in e["name"]]
    spans = _outermost(((e["name"], e["args"]["Module Hierarchy"]), e["ts"], e["ts"] + e["dur"]) for e in found)
    if stated:
        return _aligned((scripting.operator(name) for (name, _), *_ in spans), stated)
    # A hierarchy reads like `TOP(Net)::forward.stem(Conv2d)::forward.SELF(Conv2d)::_conv_forward.`.
    places = [(name, re.findall(r"\b(?!TOP\(|SELF\()(\w+)\(\w+\)::", text)) for (name, text), *_ in spans]
    if module.original_name == "GraphModule":
        places = _completed(module, places)
    known = [name for name, _ in module.named_modules()]
    resolved = {tuple(path): _resolved(path, known) for _, path in places}
    return [resolved[tuple(path)] for _, path in places]


def _completed(module: Any, places: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Return the places in a model traced from torch.fx, where a path lacks all but the last name of what is called.

    Its graph calls layers one by one, so it is the next of that name, which begins where the last one's operators end.
    """
    called, modules = _called(module), dict(module.named_modules())
    found, current, left = [], -1, Counter[str]()
    for operator, path in places:
        if not path:
            left = Counter()
        elif not left or (operator in left and not left[operator]) or called[current].rpartition(".")[2] != path[0]:
            following = (i for i in range(current + 1, len(called)) if called[i].rpartition(".")[2] == path[0])
            current = next(following, current)
            left = Counter(node.kind() for node in modules[called[current]].inlined_graph.nodes())
        if operator in left:
            left[operator] -= 1
        found.append((operator, [*called[current].split("."), *path[1:]] if path else path))
    return found


def _resolved(path: Sequence[str], known: Sequence[str]) -> str:
    """Return the module that a path leads to, in which lists of modules are passed over; '' if it may be several."""

    def leads_to(name: str) -> bool:
        rest = iter(name.split("."))
        return name.rpartition(".")[2] == path[-1] and all(part in rest for part in path)

    found = [".".join(path)] if ".".join(path) in known else [name for name in known if leads_to(name)]
    return found[0] if len(found) == 1 else ""


def _called(module: Any) -> list[str]:
    """Return the modules that the model's own graph calls, in order."""
    names, order = {next(module.graph.inputs()).debugName(): ""}, []
    for node in module.graph.nodes():
        if node.kind() == "prim::GetAttr":
            parent = names.get(node.inputsAt(0).debugName(), "")
            names[node.output().debugName()] = f"{parent}.{node.s('name')}".removeprefix(".")
        elif node.kind() == "prim::CallMethod":
            order.append(names[node.inputsAt(0).debugName()])
    return order


def _onnxruntime(path: Path, inputs: Example, threads: int, calls: int) -> _Calls:
    import onnx
    import onnxruntime

    loading.load(path, runtime="onnxruntime", threads=threads)
    options = loading.session_options(threads)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {i.name: x.contiguous().numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
        number = _number(lambda: session.run(None, feed), calls)
        for _ in range(number):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        layers = _onnx_layers(onnx.load(str(path)).graph, onnx.load(options.optimized_model_filepath).graph)
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")[-number:]
    times = [
        (e["ts"], layers[name], e["args"]["op_name"], e["dur"] / 1e3)
        for e in events
        # What runs inside an If or a Loop is part of that one's own time.
        if e["cat"] == "Node" and (name := e["name"].removesuffix("_kernel_time")) in layers
    ]
    return [[(layer, op, ms) for at, layer, op, ms in times if start <= at <= end] for start, end in runs]


def _onnx_layers(file: Any, optimized: Any) -> dict[str, str]:
    """Return the layer of each node of the graph that ONNX Runtime made of `file`, by the node's name."""
    made_by = {name: node for node in file.node for name in node.output}
    sizes = {i.name: math.prod(i.dims) for i in chain(file.initializer, optimized.initializer)}
    weighted = {i.name.rpartition(".")[0] for i in file.initializer}
    layers: dict[str, str] = {}
    layer_of: dict[str, str] = {}
    for node in optimized.node:
        # A convolution in blocks of channels has weights of new names, and is named after what it computes.
        name = node.name.removesuffix("_nchwc")
        old = _convolution(made_by, name, sizes) if name != node.name else made_by.get(node.output[0])
        weights = [n for n in chain(node.input, old.input if old else ()) if n in sizes and "." in n]
        sources = {layer_of[n] for n in node.input if n in layer_of}
        if weights:
            # Weights are named after their layers, and what optimizers append to a name has no dot.
            layer = max(weights, key=sizes.__getitem__).rpartition(".")[0]
        elif old and (scope := _scope(old)) is not None:
            # What else a layer with weights does, quantized files do not tell.
            layer = "" if scope in weighted else scope
        else:
            layer = sources.pop() if node.op_type in CONVERSIONS and len(sources) == 1 else ""
        layers[node.name] = layer
        layer_of |= dict.fromkeys(node.output, layer)
    return layers


def _convolution(made_by: Mapping[str, Any], name: str, stored: Mapping[str, int]) -> Any:
    """Return the convolution that leads to the tensor `name` of a file through operators of one input, None if none."""
    while name in made_by and made_by[name].op_type != "Conv":
        sources = [source for source in made_by[name].input if source not in stored]
        name = sources[0] if len(sources) == 1 else ""
    return made_by.get(name)


def _scope(node: Any) -> str | None:
    """Return the name of the module that `node` was exported from, None where the file does not tell."""
    told = next((p.value for p in node.metadata_props if p.key == SCOPES), None)
    if told is None:
        return None
    # A list like `['', 'stem', 'conv2d']`: the model, its modules, and the operation.
    names = json.loads(told.replace("'", '"'))[:-1]
    return str(names[-1]) if names and NOWHERE not in names[-1] else ""
