"""Time by layer of torch files: programs are run operator by operator, TorchScript under torch's profiler.

Source: torch.fx.Interpreter; torch.profiler.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from shrinkkit import quiet
from shrinkkit.core import processes
from shrinkkit.errors import Unsupported
from shrinkkit.runtimes.base import Calls, Repeats, count_denormals
from shrinkkit.runtimes.torch import export, load
from shrinkkit.runtimes.torch.spec import read_entry
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example

_profile = partial(torch.profiler.profile, activities=[torch.profiler.ProfilerActivity.CPU])
_ROUNDS = 4


def layers(path: Path, inputs: Example, *, device: str, threads: int, repeats: Repeats) -> Calls:
    """Return layer, operator and ms of each operator of each call."""
    if path.suffix == ".pt2":
        stepped = _Stepped(load.read(path, device=device), device)
        placed = tuple(x.to(device) for x in inputs)
        with torch.inference_mode():
            return [stepped.times(placed) for _ in range(repeats(lambda: stepped.times(placed)))]
    if device != "cpu":
        text = f"{path.name} is TorchScript, whose operators are timed on the CPU only, got `device` {device!r}."
        raise Unsupported(f"{text} A model that torch.export can take is timed by layer on a GPU too.")
    return _scripted(path, inputs, repeats)


def denormals(path: Path, inputs: Example | None) -> int:
    """Return the denormals in parameters and buffers; given inputs, also in the outputs of a program's operators."""
    module = load.read(path)
    count = count_denormals(chain(module.parameters(), module.buffers()))
    if inputs is None or path.suffix != ".pt2":
        return count
    with torch.inference_mode():
        (stepped := _Stepped(module, count=True)).times(inputs)
    return count + stepped.denormals


class _Stepped(torch.fx.Interpreter):
    """Runs an exported program operator by operator, with a clock before and after each; it may count denormals."""

    def __init__(self, module: torch.fx.GraphModule, device: str = "cpu", *, count: bool = False) -> None:
        super().__init__(module)
        self.device, self.count = device, count
        self.marks: list[tuple[str, str, Any, Any]] = []
        self.denormals = 0

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
        if tensors := outputs.tensors(result):
            self.marks.append((export.layer_of(n), export.operator(n.target), start, end))
        if self.count:
            known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            # A view holds numbers of a tensor that is there already.
            self.denormals += count_denormals(t for t in tensors if t.untyped_storage().data_ptr() not in known)
        return result

    def _mark(self) -> Any:
        """Return the time in ns, or on a GPU an event in its stream."""
        if self.device != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _scripted(path: Path, inputs: Example, repeats: Repeats) -> Calls:
    module = load.read(path)
    call = partial(module, *inputs)
    stated = [(name, layer) for name, layer in json.loads(read_entry(path, "/extra/layers") or "[]")]
    with quiet.libraries(), torch.inference_mode():
        each = -(-repeats(call) // _ROUNDS)
        owners = _owners(module, call, stated)
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
        text = f"{path.name} must run the same operators in every call to be timed by layer, but their number differs."
        raise Unsupported(f"{text} Use ONNX Runtime for times by layer.")
    cost = max(0.0, min(recorded) - min(plain)) * len(recorded) / sum(inside for *_, inside in events)
    owned = zip(owners * len(recorded), events, strict=True)
    times = [(layer, export.operator(event[0]), _unrecorded(event, cost)) for layer, event in owned]
    return [times[i : i + len(owners)] for i in range(0, len(times), len(owners))]


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _unrecorded(event: Sequence[Any], cost: float) -> float:
    """Return the ms of an event less what it takes to record it and all that it called, at `cost` ms each."""
    _, start, end, inside = event
    return float(max(0.0, (end - start) / 1e6 - cost * inside))


def _outermost(spans: Iterable[tuple[Any, float, float]]) -> list[list[Any]]:
    """Return the spans that lie in no other, in order, each with the number of spans in it, itself included."""
    outer: list[list[Any]] = []
    for name, start, end in sorted(spans, key=lambda span: (span[1], -span[2])):
        if outer and end <= outer[-1][2]:
            outer[-1][3] += 1
        else:
            outer.append([name, start, end, 1])
    return outer


def _aligned(operators: Iterable[str], stated: Sequence[tuple[str, str]]) -> list[str]:
    """Return the layer of each operator that ran, where TorchScript has left some of the stated ones out."""
    position, layers_ = 0, []
    for operator in operators:
        match = next((i for i in range(position, len(stated)) if stated[i][0] == operator), -1)
        layers_.append(stated[match][1] if match >= 0 else "")
        position = max(position, match + 1)
    return layers_


def _owners(module: Any, call: Callable[[], Any], stated: Sequence[tuple[str, str]]) -> list[str]:
    """Return the layer of each operator of one call, in order."""
    with _profile(with_modules=True) as profile:
        call()
    with processes.short_folder() as folder:
        profile.export_chrome_trace(trace := str(folder / "trace.json"))
        events = json.loads(Path(trace).read_text())["traceEvents"]
    # Operators have a namespace, calls of methods do not.
    operators = [e for e in events if e.get("cat") == "cpu_op" and "::" in e["name"]]
    spans = _outermost(((e["name"], e["args"]["Module Hierarchy"]), e["ts"], e["ts"] + e["dur"]) for e in operators)
    if stated:
        return _aligned((export.operator(name) for (name, _), *_ in spans), stated)
    # A hierarchy reads like `TOP(Net)::forward.stem(Conv2d)::forward.SELF(Conv2d)::_conv_forward.`.
    places = [(name, re.findall(r"\b(?!TOP\(|SELF\()(\w+)\(\w+\)::", text)) for (name, text), *_ in spans]
    known = [name for name, _ in module.named_modules()]
    resolved = {tuple(path): _resolved(path, known) for _, path in places}
    return [resolved[tuple(path)] for _, path in places]


def _resolved(path: Sequence[str], known: Sequence[str]) -> str:
    """Return the module that a path leads to, in which lists of modules are passed over; '' if it may be several."""

    def leads_to(name: str) -> bool:
        rest = iter(name.split("."))
        return name.rpartition(".")[2] == path[-1] and all(part in rest for part in path)

    names = [".".join(path)] if ".".join(path) in known else [name for name in known if leads_to(name)]
    return names[0] if len(names) == 1 else ""
