"""Exported programs compiled by inductor."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shrinkkit import quiet
from shrinkkit.errors import Unsupported, brief
from shrinkkit.runtimes.base import Loaded
from shrinkkit.runtimes.inductor.spec import Inductor
from shrinkkit.runtimes.torch.load import input_names, read, to_cpu
from shrinkkit.tasks.modules import Example


def load(path: Path, *, device: str, threads: int, like: Any) -> Loaded:
    """Return a `.pt2` file, which is compiled for each kind of inputs as they are bound."""
    if path.suffix != ".pt2":
        text = f"{path.name} is TorchScript, because torch cannot export this model,"
        raise Unsupported(f"{text} and inductor compiles only exported ones. Use the torch runtime.")
    return _loaded(read(path, device=device), path, device, like)


def _loaded(module: Any, path: Path, device: str, like: Any) -> Loaded:
    # Compiled for batches of any size, int8 convolutions of one channel fail as they are called. As a module, and not
    # by its forward alone, it would check its inputs in every call, which takes 0.2 ms.
    compiled: Any = torch.compile(module.forward, fullgraph=True, dynamic=False)
    ready: set[Any] = set()

    def bind(inputs: Example) -> Callable[[], Any]:
        placed = tuple(x.to(device) for x in inputs)

        @torch.inference_mode()
        def call() -> Any:
            return compiled(*placed)

        # For any of these torch compiles again when it is called, and by then its settings are gone.
        kind = (torch.get_num_threads(), *((x.shape, x.stride(), x.dtype) for x in placed))
        if kind not in ready:
            for check in module._forward_pre_hooks.values():
                check(module, placed, {})
            _compile(call, path)
            ready.add(kind)
        return call

    def clone() -> Loaded:
        with quiet.libraries():
            return _loaded(copy.deepcopy(module), path, device, like)

    adapt = partial(to_cpu, like=like)
    return Loaded(path, "inductor", device, bind, adapt, clone, "compiled", module, input_names(module))


def _compile(call: Callable[[], Any], path: Path) -> None:
    """Call a function whose content torch compiles as it is first called, with the settings that it is measured with.

    Weights are folded and packed as a model is frozen, and only then become integer kernels.
    """
    freezing = Inductor().settings(path, threads=1)["freezing"]
    inductor = torch._inductor.config.patch(freezing=freezing, compile_threads=1)
    # Beyond a limit torch would silently run the program operator by operator.
    limit = torch._dynamo.config.patch(
        recompile_limit=1 << 10, accumulated_recompile_limit=1 << 20, fail_on_recompile_limit_hit=True
    )
    with inductor, limit, quiet.libraries():
        try:
            call()
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, AssertionError) as error:
            text = f"inductor cannot compile {path.name} for these inputs: {brief(error)}."
            raise Unsupported(f"{text} Use the torch runtime.") from error
