"""Model files brought to run: loaded for one runtime on one device, ready to be called, timed, or copied.

What a file needs to run as it was measured (integer engine, precision) stands in the file itself.
"""

import copy
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from shrinkkit import quiet
from shrinkkit.errors import ModelFileError, Unsupported, brief
from shrinkkit.runtimes import vetting
from shrinkkit.runtimes.torch import quantize
from shrinkkit.tasks import outputs
from shrinkkit.tasks.modules import Example

PRECISION = "shrinkkit_precision"
"""Where an OpenVINO model says in which float it computes: `f32`, `f16` or `bf16`; without it, `f32`."""
GROUP_SIZE = "shrinkkit_group_size"
"""Where an OpenVINO model says how many numbers of an activation share a range; without it, activations stay floats."""
_REMEDY = "Run the step that makes it again."
_DAMAGED = (RuntimeError, ValueError, TypeError, AttributeError, OSError, KeyError, AssertionError)


@dataclass(frozen=True)
class Loaded:
    """A model file ready to run on one target.

    Call it with a batch of CPU tensors for CPU outputs; `prepare` gives a call without arguments for timing.
    """

    path: Path
    runtime: str
    device: str
    prepare: Callable[[Example], Callable[[], Any]]
    """From inputs to a call that computes them once and leaves the result on the device."""
    fetch: Callable[[Any], Any]
    """From what the call returned to CPU tensors."""
    again: Callable[[], "Loaded"]
    """Returns the same model at another place in memory."""
    form: str
    """What executes it: `torchscript`, `graph` (operators called from Python), `compiled`, or a runtime of its own."""
    source: Any
    """What the runtime itself made of the file: a torch module, an ONNX Runtime session, a compiled OpenVINO model."""

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Return the outputs for one batch of CPU tensors, as CPU tensors."""
        with torch.inference_mode():
            return self.fetch(self.prepare(inputs)())


def load(path: Path, *, runtime: str, device: str = "cpu", threads: int = 1, like: Any = None) -> Loaded:
    """Return the model file at `path`, loaded for `runtime` on `device`.

    Args:
        path: A `.pt2`, `.torchscript.pt`, `.onnx` or OpenVINO `.xml` file.
        runtime: `torch`, `inductor`, `onnxruntime` or `openvino`.
        device: `cpu`, `cuda` or `mps`.
        threads: Intra-op threads of ONNX Runtime and OpenVINO; torch's are a setting of the process.
        like: An output of the model before export, into whose structure the outputs are put. Files return plain tuples
            and dicts, those of ONNX Runtime and OpenVINO a flat list; None leaves a single tensor or a tuple of it.

    Raises:
        ModelFileError: The file is missing, damaged, or holds pickled objects.
        Unsupported: The runtime cannot run files of this kind.
    """
    if not path.is_file():
        raise ModelFileError(f"{path} must be a model file, and there is none. {_REMEDY}")
    if runtime in ("onnxruntime", "openvino"):
        vetting.check(path)
        return (
            _on_openvino(path, threads, like) if runtime == "openvino" else _on_onnxruntime(path, device, threads, like)
        )
    loaded = module(path, device=device)
    on_runtime = _on_inductor if runtime == "inductor" else _on_torch
    return on_runtime(loaded, path, device, like)


def module(path: Path, *, device: str = "cpu") -> Any:
    """Return the torch module in a `.pt2` or `.torchscript.pt` file, packed for the integer engine that it names.

    Raises:
        ModelFileError: The file is damaged, or holds pickled objects.
    """
    vetting.check(path)
    try:
        with quiet.libraries():
            if path.suffix == ".pt2":
                # Programs of int8 layers name operators that torch registers here.
                import_module("torch.ao.quantization.fx._decomposed")

                program = torch.export.load(path)
                return (move_to_device_pass(program, device) if device != "cpu" else program).module()
            with quantize.using_engine(engine(path)):
                # Packed weights are repacked for the engine in force when the file is read.
                script = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return script.to(device).eval()
    except (*_DAMAGED, zipfile.BadZipFile) as error:
        raise ModelFileError(
            f"{path.name} cannot be loaded: {brief(error)}. It is damaged or was made by another version of torch. "
            f"{_REMEDY}"
        ) from error


def engine(path: Path) -> str:
    """Return torch's quantized engine that a `.torchscript.pt` file was packed for, '' for a model in float."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/extra/quantized_engine")]
        return archive.read(names[0]).decode() if names else ""


def session_options(threads: int) -> Any:
    """Return the options of every ONNX Runtime session that is measured or looked into.

    Args:
        threads: Intra-op threads, >= 1.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Without this, ONNX Runtime's threads go on spinning after a call and slow whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def openvino_settings(model: Any, threads: int) -> dict[str, Any]:
    """Return the settings with which an OpenVINO model is compiled for the CPU.

    Left alone, OpenVINO computes FP32 models in bfloat16 on processors that are fast at it.

    Args:
        model: What `Core.read_model` returned.
        threads: Threads of one call, >= 1.
    """

    def noted(key: str, default: str) -> str:
        return str(model.get_rt_info(key).value) if model.has_rt_info(key) else default

    return {
        "INFERENCE_PRECISION_HINT": noted(PRECISION, "f32"),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": int(noted(GROUP_SIZE, "0")),
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


def _on_torch(module: Any, path: Path, device: str, like: Any) -> Loaded:
    scripted = isinstance(module, torch.jit.ScriptModule)
    packed = partial(quantize.using_engine, engine(path) if scripted else "")
    # Copies of int8 weights are packed anew, for the engine in force.
    with quiet.libraries(), packed():
        ready = torch.jit.freeze(module) if scripted else module

    def prepare(inputs: Example) -> Callable[[], Any]:
        placed = tuple(x.to(device) for x in inputs)

        @torch.inference_mode()
        def call() -> Any:
            return ready(*placed)

        return call

    def again() -> Loaded:
        with quiet.libraries(), packed():
            return _on_torch(copy.deepcopy(module), path, device, like)

    form = "torchscript" if scripted else "graph"
    return Loaded(path, "torch", device, prepare, partial(_to_cpu, like=like), again, form, module)


def _on_inductor(module: Any, path: Path, device: str, like: Any) -> Loaded:
    if path.suffix != ".pt2":
        raise Unsupported(
            f"{path.name} is TorchScript, because torch cannot export this model, and inductor compiles only exported "
            "ones. Use the torch runtime."
        )
    # Compiled for batches of any size, int8 convolutions of one channel fail as they are called. As a module, and not
    # by its forward alone, it would check its inputs in every call, which takes 0.2 ms.
    compiled: Any = torch.compile(module.forward, fullgraph=True, dynamic=False)
    ready: set[Any] = set()

    def prepare(inputs: Example) -> Callable[[], Any]:
        placed = tuple(x.to(device) for x in inputs)

        @torch.inference_mode()
        def call() -> Any:
            return compiled(*placed)

        def first() -> None:
            for check in module._forward_pre_hooks.values():
                check(module, placed, {})
            call()

        # For any of these torch compiles anew when it is called, and by then its settings are gone.
        kind = (torch.get_num_threads(), *((x.shape, x.stride(), x.dtype) for x in placed))
        if kind not in ready:
            _compile(first, path)
            ready.add(kind)
        return call

    def again() -> Loaded:
        with quiet.libraries():
            return _on_inductor(copy.deepcopy(module), path, device, like)

    return Loaded(path, "inductor", device, prepare, partial(_to_cpu, like=like), again, "compiled", module)


def _compile(call: Callable[[], Any], path: Path) -> None:
    """Call a function whose inside torch compiles as it is first called, with the settings that int8 needs."""
    # Weights are folded and packed as a model is frozen, and only then become integer kernels.
    frozen = torch._inductor.config.patch(freezing=True, compile_threads=1)
    # Beyond a limit torch would run the program operator by operator, and say nothing.
    limit = torch._dynamo.config.patch(
        recompile_limit=1 << 10, accumulated_recompile_limit=1 << 20, fail_on_recompile_limit_hit=True
    )
    with frozen, limit, quiet.libraries():
        try:
            call()
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, AssertionError) as error:
            raise Unsupported(
                f"inductor cannot compile {path.name} for these inputs: {brief(error)}. Use the torch runtime."
            ) from error


def _to_cpu(output: Any, like: Any) -> Any:
    found = outputs.convert(output, lambda t: t.cpu())
    return found if like is None else outputs.restore(outputs.tensors(found), like)


def _on_onnxruntime(path: Path, device: str, threads: int, like: Any) -> Loaded:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    try:
        session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=[provider])
    except (
        states.Fail,
        states.InvalidProtobuf,
        states.InvalidGraph,
        states.NotImplemented,
        states.RuntimeException,
        states.InvalidArgument,
        states.NoSuchFile,
    ) as error:
        raise ModelFileError(f"{path.name} cannot be loaded by ONNX Runtime: {brief(error)}. {_REMEDY}") from error
    if provider not in session.get_providers():
        raise Unsupported(
            f"ONNX Runtime cannot start {provider} for {path.name} and would run it on the CPU. Check the versions of "
            "CUDA and cuDNN that onnxruntime-gpu asks for."
        )
    names = [i.name for i in session.get_inputs()]

    def prepare(inputs: Example) -> Callable[[], Any]:
        feed = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        if device == "cpu":
            return lambda: session.run(None, feed)
        bound = session.io_binding()
        for name, array in feed.items():
            bound.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0))
        for output in session.get_outputs():
            bound.bind_output(output.name, device)

        def call() -> Any:
            session.run_with_iobinding(bound)
            return bound

        return call

    def fetch(output: Any) -> Any:
        return _structured(output if device == "cpu" else output.copy_outputs_to_cpu(), like)

    return Loaded(
        path,
        "onnxruntime",
        device,
        prepare,
        fetch,
        lambda: _on_onnxruntime(path, device, threads, like),
        "onnxruntime",
        session,
    )


def _on_openvino(path: Path, threads: int, like: Any) -> Loaded:
    import openvino

    core = openvino.Core()
    try:
        model = core.read_model(path)
        compiled = core.compile_model(model, "CPU", openvino_settings(model, threads))
    except RuntimeError as error:
        raise ModelFileError(f"{path.name} cannot be loaded by OpenVINO: {brief(error)}. {_REMEDY}") from error

    def prepare(inputs: Example) -> Callable[[], Any]:
        request, feed = compiled.create_infer_request(), [x.contiguous().numpy() for x in inputs]
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)

    def fetch(output: Any) -> Any:
        # The request's own memory, which its next call overwrites.
        return _structured([array.copy() for array in output.values()], like)

    return Loaded(
        path, "openvino", "cpu", prepare, fetch, lambda: _on_openvino(path, threads, like), "openvino", compiled
    )


def _structured(arrays: Any, like: Any) -> Any:
    tensors = [torch.from_numpy(array) for array in arrays]
    if like is not None:
        return outputs.restore(tensors, like)
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
