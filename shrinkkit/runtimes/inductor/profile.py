"""The code that inductor makes of an exported program: layers that it computes in integers, and time by layer.

A program can spell out integers that inductor then computes in float, so the code that inductor runs is inspected.
 That code is one Python function that calls kernels, and the weights it passes to them are those of the file
as they are stored, or packed, or scaled: they tell which layer a kernel belongs to.
"""

import ast
import hashlib
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from shrinkkit.core.measurement import IntegerCheck
from shrinkkit.core.variant import LayerPrecision
from shrinkkit.errors import Unsupported
from shrinkkit.runtimes.base import BuildRequest, Calls, Repeats
from shrinkkit.runtimes.inductor import load
from shrinkkit.runtimes.inductor.spec import holds_integers
from shrinkkit.runtimes.layers import RECURRENT, ROOT, no_recurrent, precisions, unchecked
from shrinkkit.tasks.modules import Example

_INTEGER, _WEIGHT = re.compile(r"torch\.ops\.onednn\.q(linear|conv)"), 3
"""oneDNN's operators on integers, all of which take their weights, packed, as their fourth argument."""
_KERNEL = re.compile(r"torch\.ops\.|aten\.|extern_kernels\.|cpp_")
_FUSED = "cpp_"
BETWEEN = "between kernels"
"""Time of a call outside of kernels: Python, memory, and the check that the code is for these inputs."""
_SCALED = 1e-3
"""Largest difference between weights that are equal up to a factor per output channel, as a share."""


@dataclass(frozen=True)
class Kernel:
    """One call of a kernel in the code that inductor wrote."""

    name: str
    """As inductor calls it, without name space and number: `qconv_pointwise`, `cpp_fused_mean_quantize_per_tensor`."""
    weights: tuple[torch.Tensor, ...]
    """What the code passes to it and holds itself."""
    integers: torch.Tensor | None
    """The weights of an integer product, unpacked; None for what computes in float."""


def int8_layers(path: Path, request: BuildRequest) -> dict[str, LayerPrecision]:
    """Return how inductor runs each layer of the model of `request`, by the code that it makes of the file.

    Raises:
        ModelFileError: The file is damaged.
        Unsupported: inductor cannot compile it.
    """
    program = _Program(path, request.example)
    expected: dict[str, list[bytes]] = defaultdict(list)
    for node in program.module.graph.nodes:
        if "dequantize_per_channel" in str(node.target):
            layer, weight = program.tensors[node.args[0]]
            expected[layer] += [_contents(weight)] * len(node.users)
    counts = Counter(chain.from_iterable(expected.values()))
    products = [kernel.integers for kernel in program.kernels if kernel.integers is not None]
    ran = Counter(key for weight in products for key in set(map(_contents, _forms(weight))) & set(counts))
    # Layers that are copies of each other have the same weights, so the kernels of all of them must be there.
    integer = {name for name, weights in expected.items() if all(ran[weight] >= counts[weight] for weight in weights)}
    kept = {layer for layer, _ in program.tensors.values()}

    def place(name: str) -> str:
        return "" if name == ROOT else name

    def runs_as(name: str) -> str:
        return "int8" if place(name) in integer else ""

    reason = no_recurrent("inductor", *RECURRENT)
    return precisions(request, "inductor", runs_as, folded=lambda name: place(name) not in kept, reason=reason)


def layers(path: Path, inputs: Example, *, device: str, threads: int, repeats: Repeats) -> Calls:
    """Return layer, kernel and ms of each kernel of each call, by a clock put into the code that inductor wrote.

    A kernel belongs to the layer whose weights it is given. Kernels without weights, and those into which inductor
    fused several layers, have the layer ''. So has the rest of a call, `BETWEEN`.
    """
    if device != "cpu":
        text = f"`device` must be 'cpu' for inductor's times by layer, got {device!r}."
        raise Unsupported(f"{text} The torch runtime has others.")
    program = _Program(path, inputs)
    names, calls = _layers(program), []
    with program.clocked() as marks:
        for _ in range(repeats(program.call)):
            marks.clear()
            start = time.perf_counter_ns()
            program.call()
            rest = time.perf_counter_ns() - start
            call = []
            for begin, end, kernel, layer in zip(marks[::2], marks[1::2], program.kernels, names, strict=True):
                call.append((layer, kernel.name, (end - begin) / 1e6))
                rest -= end - begin
            calls.append([*call, ("", BETWEEN, rest / 1e6)])
    return calls


def check_integers(path: Path, inputs: Example, *, threads: int) -> IntegerCheck | None:
    """Return None for a file in float; the kernels of other files cannot be compared."""
    if not holds_integers(path):
        return None
    raise unchecked(path, "inductor fuses integer layers with others; the outputs were compared when it was made")


class _Program:
    """A file that inductor has compiled for some inputs, and the code that it wrote for them."""

    def __init__(self, path: Path, inputs: Example) -> None:
        from torch._inductor.codecache import PyCodeCache

        loaded = load.load(path, device="cpu", threads=torch.get_num_threads(), like=None)
        before = len(PyCodeCache.modules)
        self.call: Callable[[], Any] = loaded.bind(inputs)
        written: list[Any] = PyCodeCache.modules[before:]
        if len(written) != 1:
            name = path.name
            text = f"inductor must write one piece of code for {name}, not {len(written)}."
            raise Unsupported(f"{text} Use another runtime.")
        self.module: torch.fx.GraphModule = loaded.source
        self.tensors = _tensors(self.module)
        """What the program reads, and the layer that each tensor is named after, by node."""
        self._code = written[0]
        tree = ast.parse(Path(self._code.__file__).read_text(encoding="utf-8"))
        clocked = _Clocked()
        self._clocked = clocked.visit(next(n for n in ast.walk(tree) if getattr(n, "name", "") == "call"))
        self.kernels = [self._kernel(call) for call in clocked.kernels]

    @contextmanager
    def clocked(self) -> Iterator[list[int]]:
        """Give a list to which each call adds the time in ns before and after each kernel, while the block runs."""
        marks: list[int] = []
        names: dict[str, Any] = {}
        tree = ast.fix_missing_locations(ast.Module([self._clocked], []))
        exec(compile(tree, self._code.__file__, "exec"), vars(self._code), names)
        # A method, where inductor makes a class of its code.
        running = getattr(self._code.call, "__func__", self._code.call)
        before = running.__code__
        self._code._mark = lambda: marks.append(time.perf_counter_ns())
        running.__code__ = names["call"].__code__
        try:
            yield marks
        finally:
            running.__code__ = before

    def _kernel(self, call: ast.Call) -> Kernel:
        name = ast.unparse(call.func)
        inside = (getattr(self._code, n.id, None) for n in ast.walk(call) if isinstance(n, ast.Name))
        weights = tuple(x for x in inside if isinstance(x, torch.Tensor))
        packed = getattr(self._code, ast.unparse(call.args[_WEIGHT]), None) if _INTEGER.match(name) else None
        plain = re.sub(r"_\d+$", "", name) if name.startswith(_FUSED) else name.removeprefix("torch.ops.")
        return Kernel(plain.split(".")[-2 if plain.count(".") > 1 else -1], weights, packed)


class _Clocked(ast.NodeTransformer):
    """Puts a mark before and after each statement that calls a kernel, and lists the calls."""

    def __init__(self) -> None:
        self.kernels: list[ast.Call] = []

    def visit(self, node: ast.AST) -> Any:
        """Return a node, with its marks if it is a statement that calls a kernel."""
        if not isinstance(node, ast.Expr | ast.Assign):
            return super().visit(node)
        if not isinstance(node.value, ast.Call) or not _KERNEL.match(ast.unparse(node.value.func)):
            return node
        self.kernels.append(node.value)
        mark = ast.parse("_mark()").body
        return [*mark, node, *mark]


def _tensors(module: torch.fx.GraphModule) -> dict[torch.fx.Node, tuple[str, torch.Tensor]]:
    """Return the tensors that a program reads, each with the layer that it is named after, by node."""
    stacks = (list(node.meta.get("nn_module_stack", {}).values()) for node in module.graph.nodes)
    outermost = next((str(stack[0][1]) for stack in stacks if stack), "")
    # A 16-bit model is held in another module, as `model`.
    prefix = "model" if outermost.endswith(".HalfPrecision") else ""
    tensors = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            value = getattr(module.get_submodule(owner), leaf)
            if isinstance(value, torch.Tensor):
                tensors[node] = (owner.removeprefix(prefix).removeprefix("."), value.detach())
    return tensors


def _contents(tensor: torch.Tensor) -> bytes:
    """Return what tells a tensor from others of another type, shape, or content."""
    plain = tensor.detach().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def _forms(packed: torch.Tensor) -> list[torch.Tensor]:
    """Return what a packed weight may have been: itself, transposed, or of a convolution in groups."""
    weight = packed.to_dense() if packed.is_mkldnn else packed
    return [weight, weight.t()] if weight.dim() == 2 else [weight, weight.flatten(0, 1)]


def _layers(program: _Program) -> list[str]:
    """Return the layer of each kernel: the only one that all that is known of its weights belongs to, '' if none is."""
    known: dict[bytes, set[str]] = defaultdict(set)
    for layer, tensor in program.tensors.values():
        known[_contents(tensor)].add(layer)

    def owners(tensor: torch.Tensor) -> set[str]:
        forms = _forms(tensor) if tensor.is_mkldnn else [tensor]
        exact = set[str]().union(*(known[_contents(form)] for form in forms))
        if exact or not (tensor.is_mkldnn and tensor.is_floating_point()):
            return exact
        return {layer for layer, other in program.tensors.values() if any(_scaled(form, other) for form in forms)}

    layers_ = []
    for kernel in program.kernels:
        all_owners = [owners(tensor) for tensor in kernel.weights]
        known_owners = [names for names in all_owners if names]
        # One that computes for several layers must not go to the only one of them whose weights are known.
        unsure = kernel.name.startswith(_FUSED) and len(known_owners) < len(all_owners)
        common = set.intersection(*known_owners) if known_owners and not unsure else set()
        layers_.append(common.pop() if len(common) == 1 else "")
    return layers_


def _scaled(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether weights are equal up to a factor per output channel, as those with a folded BatchNorm are."""
    if a.shape != b.shape or a.dim() < 2:
        return False
    a, b = a.double().flatten(1), b.double().flatten(1)
    factor = (a * b).sum(1, keepdim=True) / (b * b).sum(1, keepdim=True).clamp(min=1e-30)
    return bool(a.norm() > 0 and (a - factor * b).norm() <= _SCALED * a.norm())
