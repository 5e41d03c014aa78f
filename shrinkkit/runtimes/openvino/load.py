"""OpenVINO and ONNX files, scanned and compiled by OpenVINO.

Source: OpenVINO, "OpenVINO IR format".
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import openvino

from shrinkkit.errors import ModelFileError, Unsupported, brief
from shrinkkit.runtimes.base import REMEDY, Loaded, covers, refuse_content, structured
from shrinkkit.runtimes.onnx import scan as onnx_scan
from shrinkkit.runtimes.openvino.spec import OpenVino
from shrinkkit.tasks.modules import Example


def load(path: Path, *, device: str, threads: int, like: Any) -> Loaded:
    """Return a file compiled with the settings that it states."""
    core = openvino.Core()
    try:
        model = read(core, path)
        compiled = core.compile_model(model, "CPU", OpenVino().settings(path, threads=threads))
    except RuntimeError as error:
        raise ModelFileError(f"{path.name} cannot be loaded by OpenVINO: {brief(error)}. {REMEDY}") from error

    def bind(inputs: Example) -> Callable[[], Any]:
        request, feed = compiled.create_infer_request(), [x.contiguous().numpy() for x in inputs]
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)

    def to_cpu(output: Any) -> Any:
        # Memory of the request, which its next call overwrites.
        return structured([array.copy() for array in output.values()], like)

    clone = partial(load, path, device=device, threads=threads, like=like)
    names, ends = (tuple(port.get_any_name() for port in ports) for ports in (compiled.inputs, compiled.outputs))
    return Loaded(path, "openvino", "cpu", bind, to_cpu, clone, "openvino", compiled, names, ends)


def read(core: openvino.Core, path: Path) -> openvino.Model:
    """Return a file as OpenVINO's graph; raises Unsupported if it is ONNX with operators that cannot be converted."""
    try:
        return core.read_model(path)
    except RuntimeError as error:
        operators = re.search(r"Conversion is failed for: (.+)", str(error))
        if operators is None:
            raise
        names = ", ".join(dict.fromkeys(re.sub(r"-\d+", "", operators[1]).split(", ")))
        raise Unsupported(
            f"OpenVINO cannot convert these ONNX operators of this model: {names}. Use ONNX Runtime or torch."
        ) from error


def scan(path: Path) -> None:
    """Check an `.xml` file and its `.bin`, or an ONNX file; see `base.Backend`."""
    if path.suffix != ".xml":
        onnx_scan.scan(path)
        return
    text = path.read_text(encoding="utf-8")
    if "<!" in text:
        refuse_content("a document type, which can define entities")
    root = ET.fromstring(text)
    layers = list(root.iter("layer"))
    if root.tag != "net" or not layers:
        raise ValueError("there are no layers in it")
    covers(path.with_suffix(".bin"), 0, 0)
    for layer in layers:
        if not re.fullmatch(r"opset\d+", layer.get("version", "")):
            refuse_content("a layer that needs another library, of", layer.get("version"))
    for data in root.iter("data"):
        if {"offset", "size"} <= data.attrib.keys():
            covers(path.with_suffix(".bin"), int(data.attrib["offset"]), int(data.attrib["size"]))
