"""Model files read for what could run code, before a runtime opens them.

torch evaluates strings of a `.pt2` file as Python, unpickles parts of it, and calls whatever operator it names;
TorchScript can write files. What shrinkkit writes needs none of that, so all but what it needs is refused.
"""

import ast
import json
import pickletools
import re
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shrinkkit.errors import ModelFileError, brief

_REMEDY = "It was not opened. Run the step that makes it again, or get it from whom you trust."
_MOST_INFLATED = 200
"""Times that an entry of an archive may grow when it is unpacked."""

_PT2_ENTRIES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id|alignment)|version"
    r"|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json))"
)
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|quantized_decomposed|prims|higher_order)\.\w+(\.\w+)?"
    r"|_operator\.\w+|math\.(ceil|floor|trunc|sqrt)|torch\.sym_\w+|torch\.ops\.\w*profiler\._record_function\w*"
)
_FORBIDDEN = re.compile(r"\b(save|from_file|from_buffer|load|_load\w*|manual_seed|set_data|open|hub|system)\b")
_EXPRESSION = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Name, ast.Constant, ast.Load, ast.operator,
    ast.unaryop, ast.boolop, ast.cmpop, ast.keyword,
)  # fmt: skip
_FUNCTIONS = frozenset(
    "Mod PythonMod FloorDiv CleanDiv CeilDiv IntTrueDiv FloatTrueDiv Max Min Eq Ne Lt Le Gt Ge And Or Not Piecewise "
    "ModularIndexing Where TruncToInt FloorToInt CeilToInt ToFloat PowByNatural Pow Abs Integer True False Symbol "
    "RoundToInt Identity Add Mul Rational Float Equality Unequality StrictLessThan StrictGreaterThan LessThan "
    "GreaterThan".split()
)
_GUARDS = frozenset("size stride L len not _guards torch sym_not".split())
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None}
_SCRIPT_ENTRIES = re.compile(
    r"code/.*\.py|data\.pkl|constants\.pkl|(data|constants)/\d+|version|byteorder|\.data/(version|serialization_id)"
    r"|extra/quantized_engine"
)
_SCRIPT_NAMESPACES = frozenset({"aten", "prim", "quantized"})
_SCRIPT_CLASSES = re.compile(r"__torch__\.torch\.classes\.(quantized\.\w+|rnn\.CellParamsBase)")
_PICKLED = re.compile(
    r"__torch__\..*|torch\._utils _rebuild_(tensor_v2|qtensor|parameter)|torch (\w+Storage|\w+)|collections OrderedDict"
    r"|torch\.jit\._pickle (build_\w+|restore_type_tag)"
)
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_OPSETS = re.compile(r"opset\d+|type_relaxed|ie_internal_opset")


def check(path: Path) -> None:
    """Return if nothing in the model file at `path` could run code when it is loaded or called.

    Args:
        path: A `.pt2`, `.torchscript.pt`, `.onnx` or OpenVINO `.xml` file.

    Raises:
        ModelFileError: Something in it has no place in a model file, or it is damaged.
    """
    checks = {".pt2": _pt2, ".pt": _torchscript, ".onnx": _onnx, ".xml": _openvino}
    if path.suffix not in checks:
        raise ModelFileError(f"{path.name} must be a .pt2, .torchscript.pt, .onnx or .xml file. {_REMEDY}")
    try:
        problem = next(checks[path.suffix](path), "")
    except (
        OSError,
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        RecursionError,
        SyntaxError,
        NotImplementedError,
    ) as error:
        raise ModelFileError(f"{path.name} cannot be read: {brief(error)}. It is damaged. {_REMEDY}") from error
    if problem:
        raise ModelFileError(f"{path.name} must hold nothing that can run code, but {problem}. {_REMEDY}")


def _pt2(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        yield from _entries(archive, _PT2_ENTRIES)
        for name in archive.namelist():
            text = archive.read(name) if name.endswith((".json", "sample_inputs/model.pt")) else b""
            if name.endswith("_config.json"):
                if any(entry.get("use_pickle") for entry in json.loads(text).get("config", {}).values()):
                    yield f"{name} names pickled tensors"
            elif name.endswith("sample_inputs/model.pt"):
                if len(text) > 2000:
                    yield "it holds an example, which is a pickle"
                yield from _torch_pickle(text, name)
            elif text:
                yield from _program(json.loads(text))


def _torch_pickle(content: bytes, name: str) -> Iterator[str]:
    """Look into what `torch.save` wrote, which is an archive around a pickle."""
    import io

    if not content:
        return
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        for entry in inner.namelist():
            if entry.endswith(".pkl"):
                yield from _pickle(inner.read(entry), f"{name}/{entry}")


def _program(program: Any) -> Iterator[str]:
    """Look at what torch evaluates, imports or calls of a program."""
    for key, value in _walk(program):
        if key in ("expr_str", "hint_expr") and isinstance(value, str) and not _is_expression(value):
            yield f"it names {value!r:.80} as the size of a dimension"
        if key in ("in_spec", "out_spec") and isinstance(value, str):
            yield from _containers(value)
        if key == "guards_code" and value:
            yield from (f"it names {code!r:.80} as a guard" for code in value if not _is_guard(str(code)))
        if key in ("as_custom_obj", "custom_obj_values") and value:
            yield "it holds objects of custom classes"
    graphs = [value for key, value in _walk(program) if key == "nodes" and isinstance(value, list)]
    for node in (node for nodes in graphs for node in nodes):
        target = str(node.get("target", "")).removeprefix("#")
        if not _OPERATORS.fullmatch(target) or _FORBIDDEN.search(target.replace(".", " ").replace("_operator", "")):
            yield f"it calls {target!r:.80}"


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _walk(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, key if isinstance(inner, list) else "")


def _is_expression(text: str) -> bool:
    """Return whether `text` is arithmetic on names and numbers, which nothing can be called by but such functions."""
    return _is_made_of(text, functions=_FUNCTIONS)


def _is_guard(text: str) -> bool:
    """Return whether `text` compares sizes of inputs and nothing else."""
    return _is_made_of(text, functions=_FUNCTIONS | _GUARDS, reads=True)


def _is_made_of(text: str, *, functions: frozenset[str], reads: bool = False) -> bool:
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            named = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if named not in functions or (isinstance(node.func, ast.Attribute) and not reads):
                return False
        elif isinstance(node, (ast.Attribute, ast.Subscript)):
            if not reads or (isinstance(node, ast.Attribute) and node.attr not in functions):
                return False
        elif not isinstance(node, _EXPRESSION):
            return False
        elif isinstance(node, (ast.Name, ast.Constant)):
            # A string can only be the name of a symbol.
            said = node.id if isinstance(node, ast.Name) else str(node.value)
            if "__" in said or not re.fullmatch(r"[\w.-]*", said):
                return False
    return True


def _containers(spec: str) -> Iterator[str]:
    """Look at the types that inputs and outputs are put into, which torch may import."""
    for key, value in _walk(json.loads(spec)):
        if key == "type" and value not in _CONTAINERS:
            yield f"it returns a {value}, which is no plain tuple, list or dict"


def _torchscript(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        yield from _entries(archive, _SCRIPT_ENTRIES)
        for name in archive.namelist():
            if name.endswith(".py"):
                yield from _script(archive.read(name).decode(), name)
            elif name.endswith(".pkl"):
                yield from _pickle(archive.read(name), name)


def _script(code: str, name: str) -> Iterator[str]:
    """Look at the operators and classes that TorchScript names."""
    for namespace, operator in re.findall(r"\bops\.(\w+)\.(\w+)", code):
        if namespace not in _SCRIPT_NAMESPACES or _FORBIDDEN.fullmatch(operator):
            yield f"{name} calls {namespace}::{operator}"
    for operator in re.findall(r"(?<![\w.])torch\.(\w+)\(", code):
        if _FORBIDDEN.fullmatch(operator):
            yield f"{name} calls aten::{operator}"
    for operator in re.findall(r"(?<![\w.])(print|open|exec|eval)\(", code):
        yield f"{name} calls {operator}"
    for found in re.findall(r"__torch__\.torch\.classes\.[\w.]+", code):
        if not _SCRIPT_CLASSES.match(found):
            yield f"{name} holds a {found}"


def _pickle(content: bytes, name: str) -> Iterator[str]:
    """Look at the classes and functions that a pickle names, without unpickling it."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(content):
        if isinstance(argument, str) and opcode.name in ("SHORT_BINUNICODE", "BINUNICODE", "UNICODE"):
            strings.append(argument)
        named = ""
        if opcode.name == "GLOBAL":
            named = str(argument)
        elif opcode.name == "STACK_GLOBAL":
            named = " ".join(strings[-2:])
        elif opcode.name in ("INST", "EXT1", "EXT2", "EXT4"):
            yield f"{name} is a pickle with {opcode.name}"
        if named and not _PICKLED.fullmatch(named) and not _PICKLED.fullmatch(named.replace(" ", ".", 1)):
            yield f"{name} is a pickle that names {named!r:.80}"


def _entries(archive: zipfile.ZipFile, allowed: re.Pattern[str]) -> Iterator[str]:
    """Look at the names and sizes of an archive's entries; the first part of a name is that of the archive."""
    if not archive.namelist():
        raise ValueError("the archive is empty")
    for entry in archive.infolist():
        inside = entry.filename.partition("/")[2]
        if not allowed.fullmatch(inside) or ".." in inside.split("/"):
            yield f"it holds {entry.filename!r:.80}"
        if entry.file_size > 1 << 20 and entry.file_size > _MOST_INFLATED * max(1, entry.compress_size):
            yield f"{entry.filename!r:.80} grows {entry.file_size // max(1, entry.compress_size)} times when unpacked"


def _onnx(path: Path) -> Iterator[str]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(brief(error)) from error
    if not model.graph.node and not model.graph.output:
        raise ValueError("there is no graph in it")
    local = {(function.domain, function.name) for function in model.functions}
    nodes = [*_nodes(model.graph), *(node for function in model.functions for node in function.node)]
    for node in nodes:
        if (node.domain, node.op_type) in local:
            continue
        if node.domain not in _DOMAINS:
            yield f"it calls {node.domain}::{node.op_type}, which needs a library of its own"
        elif node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            yield f"it calls {node.op_type}, an operator that ONNX does not know"
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and (Path(entry.value).is_absolute() or ".." in Path(entry.value).parts):
                yield f"its weights lie outside its folder, at {entry.value!r:.80}"


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _nodes(inner)


def _openvino(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if "<!" in text:
        yield "its description defines entities"
        return
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise ValueError(brief(error)) from error
    weights = path.with_suffix(".bin")
    held = weights.stat().st_size
    layers = list(root.iter("layer"))
    if not layers:
        raise ValueError("there are no layers in it")
    for layer in layers:
        if not _OPSETS.fullmatch(layer.get("version", "")):
            yield f"it holds a layer of {layer.get('version')!r:.80}, which needs a library of its own"
    for data in root.iter("data"):
        if int(data.get("offset", 0)) + int(data.get("size", 0) if "offset" in data.attrib else 0) > held:
            raise ValueError(f"{weights.name} is shorter than it says")
