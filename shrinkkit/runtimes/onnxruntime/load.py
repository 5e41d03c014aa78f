"""ONNX files brought to run by ONNX Runtime."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as states

from shrinkkit.errors import ModelFileError, Unsupported, brief
from shrinkkit.runtimes.base import REMEDY, Loaded, structured
from shrinkkit.runtimes.onnxruntime.spec import PROVIDERS, OnnxRuntime
from shrinkkit.tasks.modules import Example

ERRORS: tuple[type[Exception], ...] = (
    *(states.Fail, states.InvalidProtobuf, states.InvalidGraph, states.NotImplemented),
    *(states.RuntimeException, states.InvalidArgument, states.NoSuchFile),
)


def load(path: Path, *, device: str, threads: int, like: Any) -> Loaded:
    """Return an ONNX file as a session."""
    provider = PROVIDERS[device]
    try:
        session = onnxruntime.InferenceSession(str(path), options(path, threads), providers=[provider])
    except ERRORS as error:
        raise ModelFileError(f"{path.name} cannot be loaded by ONNX Runtime: {brief(error)}. {REMEDY}") from error
    if provider not in session.get_providers():
        text = f"ONNX Runtime cannot start {provider} for {path.name} and would run it on the CPU."
        raise Unsupported(f"{text} Check the versions of CUDA and cuDNN that onnxruntime-gpu asks for.")
    names, ends = (tuple(port.name for port in ports) for ports in (session.get_inputs(), session.get_outputs()))

    def bind(inputs: Example) -> Callable[[], Any]:
        feed = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        if device == "cpu":
            return lambda: session.run(None, feed)
        bound = session.io_binding()
        for name, array in feed.items():
            bound.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0))
        for name in ends:
            bound.bind_output(name, device)

        def call() -> Any:
            session.run_with_iobinding(bound)
            return bound

        return call

    def to_cpu(output: Any) -> Any:
        return structured(output if device == "cpu" else output.copy_outputs_to_cpu(), like)

    clone = partial(load, path, device=device, threads=threads, like=like)
    return Loaded(path, "onnxruntime", device, bind, to_cpu, clone, "onnxruntime", session, names, ends)


def options(path: Path, threads: int) -> Any:
    """Return the options of every session that is measured or inspected: the settings of the runtime."""
    return configured(OnnxRuntime().settings(path, threads=threads))


def configured(settings: Mapping[str, Any]) -> Any:
    """Return `SessionOptions` with some settings, which print no warnings."""
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    for name, value in settings.items():
        if name == "session_config_entries":
            for key, entry in value.items():
                session_options.add_session_config_entry(key, entry)
        else:
            setattr(session_options, name, value)
    return session_options
