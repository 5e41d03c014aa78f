"""The runtimes that there are, and which targets can run on this machine. Imports torch only to use it."""

import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from shrinkkit.core import machines
from shrinkkit.core.recipe import BUILT_IN, Study
from shrinkkit.core.stages import METHODS
from shrinkkit.core.target import Target
from shrinkkit.errors import InvalidInput, Unsupported, nearest, options
from shrinkkit.runtimes.inductor.spec import Inductor
from shrinkkit.runtimes.onnxruntime.spec import OnnxRuntime
from shrinkkit.runtimes.openvino.spec import OpenVino
from shrinkkit.runtimes.spec import Runtime
from shrinkkit.runtimes.torch.spec import Torch

GROUP = "shrinkkit.runtimes"
"""Entry points that name a `Runtime`: `package.module:OBJECT`."""
_BUILT_IN: tuple[Runtime, ...] = (Torch(), Inductor(), OnnxRuntime(), OpenVino())
_DEVICES = ("cpu", "cuda", "mps")
_registered: dict[str, Runtime] = {}


def register(runtime: Runtime) -> None:
    """Make a runtime known to this process. To make it known to every process, declare an entry point of `GROUP`.

    Raises InvalidInput if there is another runtime of that name.
    """
    if runtimes().get(runtime.name, runtime) is not runtime:
        raise InvalidInput(f"`name` of a runtime must be unique, got {runtime.name!r}. Use another name.")
    _registered[runtime.name] = runtime


def runtimes() -> Mapping[str, Runtime]:
    """Return all runtimes by name: those that come with shrinkkit, those of entry points, and registered ones.

    Raises InvalidInput if an entry point cannot be loaded, or takes the name of another runtime.
    """
    return {runtime.name: runtime for runtime in _BUILT_IN} | _installed() | _registered


@cache
def _installed() -> dict[str, Runtime]:
    installed: dict[str, Runtime] = {}
    for entry in entry_points(group=GROUP):
        try:
            runtime: Runtime = pkgutil.resolve_name(entry.value)
        except (ImportError, AttributeError, ValueError) as error:
            problem = f"The entry point {entry.name!r} of {GROUP} must name a runtime, got {entry.value!r}: {error}."
            raise InvalidInput(f"{problem} Mend or uninstall its package.") from error
        if runtime.name in installed or any(runtime.name == other.name for other in _BUILT_IN):
            text = f"`name` of a runtime must be unique, got {runtime.name!r} from {entry.value}."
            raise InvalidInput(f"{text} Uninstall its package.")
        installed[runtime.name] = runtime
    return installed


def get(name: str) -> Runtime:
    """Return the runtime of that name; raises InvalidInput if there is none."""
    known = runtimes()
    if name not in known:
        raise InvalidInput(f"`runtime` must be {options(tuple(known))}, got {name!r}.{nearest(name, known)}")
    return known[name]


def targets() -> tuple[str, ...]:
    """Return the names of all targets, whether or not they can run on this machine."""
    return tuple(f"{d}/{name}" for d in _DEVICES for name, runtime in runtimes().items() if d in runtime.devices)


def available() -> dict[str, str]:
    """Return each target's name with the reason why it cannot run here and what helps, or '' when it can."""
    return {name: _missing(Target.parse(name)) for name in targets()}


def default_targets() -> list[str]:
    """Return the targets that are measured unless others are named: those available here without compiling."""
    return [name for name, reason in available().items() if not (reason or get(Target.parse(name).runtime).compiles)]


def default_runtimes() -> list[str]:
    """Return the runtimes of `default_targets`."""
    return list(dict.fromkeys(Target.parse(name).runtime for name in default_targets()))


def resolve(name: str) -> Target:
    """Return the target called `name`, `device/runtime`, which can run here.

    Raises:
        InvalidInput: There is no such target.
        Unsupported: It cannot run on this machine; the message says why, and what helps.
    """
    if name not in targets():
        raise InvalidInput(f"`target` must be {options(targets())}, got {name!r}.{nearest(name, targets())}")
    target = Target.parse(name)
    reason = _missing(target)
    if not reason and target.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            reason = "torch cannot start the GPU; see `torch.cuda.init()` for its reason. Use `cpu/torch`"
    if reason:
        raise Unsupported(f"`target` names {name!r}, but {reason}.")
    return target


def refusal(precision: str, target: Target) -> str:
    """Return why no model can run in the `precision` of a recipe on `target`, '' if one can."""
    return "" if precision in ("", "float32") else get(target.runtime).refuses(precision, target.device)


def check_targets(study: Study) -> None:
    """Check that the targets of a study exist, and that each of its recipes can run on one of them.

    Raises InvalidInput if a target does not exist, or a recipe can run on none of them; one line for each.
    """
    known = targets()
    problems = [
        f"`targets.{i}` must be {options(known)}, got {name!r}.{nearest(name, known)}"
        for i, name in enumerate(study.targets)
        if name not in known
    ]
    for recipe in study.recipes if not problems else ():
        precision = recipe.precision.name
        reasons = {name: refusal(precision, Target.parse(name)) for name in study.targets}
        if all(reasons.values()):
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            possible = [m for m in METHODS if any(not refusal(m, Target.parse(name)) for name in study.targets)]
            elsewhere = [name for name in known if not refusal(precision, Target.parse(name))]
            problems.append(
                f"`{precision}` of recipe {recipe.name!r} can run on no target of the study: {why}. "
                f"Possible there: {', '.join(possible) or 'float32'}. `{precision}` can run on {options(elsewhere)}."
            )
    if problems:
        raise InvalidInput("\n".join(problems))


def default_recipes(targets: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the built-in recipes to measure on `targets` unless others are named, and why any is left out.

    Precisions that this processor has no arithmetic for are left out if it is the only device.
    """
    on_cpu = all(Target.parse(target).device == "cpu" for target in targets)
    slow = [name for name in BUILT_IN if on_cpu and machines.lacks(name)]
    why = "no hardware support on this CPU, much slower than float32; add it with"
    notes = tuple(f"{name}: {why} `--recipe {name}` to measure it." for name in slow)
    return tuple(name for name in BUILT_IN if name not in slow), notes


def packages() -> tuple[str, ...]:
    """Return the distributions whose versions decide what a run gives, those of the runtimes first."""
    others = ("torch-pruning", "numpy", "papermill", "nbconvert")
    return tuple(dict.fromkeys([*(name for one in runtimes().values() for name in one.packages), *others]))


def use_threads(threads: int) -> int:
    """Make this process compute with `threads` threads and return their number; 0 stands for `cores()`.

    Raises InvalidInput for a number that `check_threads` does not allow.
    """
    machines.check_threads(threads)
    import torch

    torch.set_num_threads(threads or machines.cores())
    return threads or machines.cores()


def _missing(target: Target) -> str:
    return get(target.runtime).missing(target.device)


def backend(name: str) -> Any:
    """Return the `base.Backend` of the runtime of that name, which imports torch."""
    return get(name).backend()
