"""What inductor makes of an exported program: which products it computes in integers, and the time of its kernels.

A program can spell out integers that inductor then computes in float; only the graph that it makes code of is believed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shrinkkit import loading
from shrinkkit.usermodel import Example


def integer_scales(path: Path, example: Example) -> list[torch.Tensor]:
    """Return the scales of the weights that inductor multiplies as integers, one tensor for each of its products.

    Args:
        path: A `.pt2` file.
        example: Positional inputs of one call, CPU tensors, batch first.

    Raises:
        ModelFileError: The file is damaged.
        Unsupported: inductor cannot compile it.
    """
    found: list[torch.Tensor] = []

    def look(graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            # inductor replaces a pattern by the function that makes the kernel's code, with what the pattern matched.
            matched = getattr(next(iter(getattr(node.target, "args", ())), None), "kwargs", {})
            scale = matched.get("w_scale")
            if isinstance(scale, torch.fx.Node) and scale.op == "get_attr" and graph.owning_module is not None:
                found.append(getattr(graph.owning_module, str(scale.target)).detach().clone())

    with torch._inductor.config.patch(post_grad_custom_post_pass=look, force_disable_caches=False):
        loading.load(path, runtime="inductor").prepare(example)
    return found


def times(
    path: Path, inputs: Example, *, device: str, number: Callable[[Callable[[], Any]], int]
) -> list[list[tuple[str, str, float]]]:
    """Return layer, kernel and ms of each kernel of each call, by torch's profiler.

    inductor fuses the operators of several layers into one kernel, so no kernel is told by layer: it is always ''.

    Args:
        path: A `.pt2` file.
        inputs: Positional inputs of one call, CPU tensors, batch first.
        device: `cpu` or `cuda`.
        number: From a call to how often it is to be made.

    Raises:
        ModelFileError: The file is damaged.
        Unsupported: inductor cannot compile it.
    """
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        call = loading.load(path, runtime="inductor", device=device).prepare(inputs)
    calls = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    for _ in range(number(call)):
        with torch.profiler.profile(activities=activities) as profile:
            call()
        calls.append([("", event.key, event.self_cpu_time_total / 1e3) for event in profile.key_averages()])
    return calls


def layer_of(node: torch.fx.Node) -> str:
    """Return the innermost module that `node` was exported from, '' for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""
