"""torch files read for what could run code, before torch opens them.

torch evaluates strings of a `.pt2` file as Python, unpickles parts of it, writes its names into Python code, and calls
whatever operator it names; TorchScript can write files. What shrinkkit writes needs none of that, so each format is
held to what it does need, and nothing of a file is unpickled, imported or evaluated to find out.

Source: torch 2.13, `torch.export.pt2_archive`, `torch._export.serde` and `torch.jit`.
"""

import ast
import json
import math
import pickletools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from shrinkkit.errors import ModelFileError
from shrinkkit.runtimes.base import REMEDY, refuse_content

_LARGE_BYTES, _MOST_INFLATED = 1 << 20, 200
"""An entry of an archive above this size may grow only so many times when it is unpacked."""
_RECORDS = r"version|byteorder|\.data/(version|serialization_id|alignment)"
_PT2_RECORDS = re.compile(
    rf"{_RECORDS}|archive_format|archive_version|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_SCRIPT_RECORDS = re.compile(
    rf"{_RECORDS}|extra/(quantized_engine|layers)|(data|constants|traced_inputs)(\.pkl|/\d+)|code/[\w/]+\.py(\.debug_pkl)?"
)

_FORBIDDEN = frozenset("save from_file _print record_stream dist_backward to_here local_value".split())
"""Of torch's tensor operators, those that touch files, the terminal or other machines."""
_SYMBOLIC = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|lshift|rshift|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\._?sym_(float|int|ite|max|min|not|sqrt|sum)"
)
_OF_TENSORS = re.compile(r"torch\.ops\.(aten|quantized_decomposed)\.([a-zA-Z_]\w*)\.([a-zA-Z]\w*)")
_OF_GRAPHS = re.compile(
    r"torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond|while_loop|scan|associative_scan"
    r"|map_impl)"
)
_NEVER = frozenset("as_custom_obj custom_obj custom_obj_values token constant_input treespec_namedtuple_fields".split())
"""What a program may say of objects that are no tensors."""
_METADATA = frozenset("nn_module_stack torch_fn from_node stack_trace".split())
_PLAIN = re.compile(r"[\w ./:+-]*")
_SPELLED = {
    # torch writes names into the code of a function, as they are.
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), re.compile(r"([A-Za-z_]\w*)?", re.ASCII)),
    "path_name": re.compile(r"(weight|tensor)_\d+"),
    "verifiers": re.compile(r"ATEN|TRAINING"),
}
_EXPRESSION = re.compile(r"[\w ,.()'=+-]*", re.ASCII)
_GUARD = re.compile(r"[\w ,.()'=+\-*/%<>!\[\]]*", re.ASCII)
_FUNCTIONS = frozenset(
    "Symbol Integer Float Rational Add Mul Pow Mod PythonMod Max Min Abs FloorDiv CleanDiv CeilDiv IntTrueDiv Where "
    "FloatTrueDiv ModularIndexing LShift RShift PowByNatural FloatPow TruncToInt FloorToInt CeilToInt RoundToInt "
    "TruncToFloat RoundDecimal ToFloat Identity IsNonOverlappingAndDenseIndicator And Or Not Equality Unequality "
    "StrictLessThan StrictGreaterThan LessThan GreaterThan Eq Ne Lt Le Gt Ge Piecewise ExprCondPair floor "
    "ceiling".split()
)
_POWERS = frozenset("Pow PowByNatural FloatPow LShift".split())
_MOST_BITS, _MOST_NODES, _MOST_DIGITS_BITS = 1 << 14, 4096, 10
"""Of a number that an expression gives, of the expression itself, and of a number of digits, so 1023 of them."""
_CONSTANTS = frozenset("oo int_oo true false".split())
_SIZES = frozenset("size stride storage_offset dim".split())
_COMPARED = (ast.BinOp | ast.BoolOp | ast.UnaryOp | ast.Compare | ast.Subscript | ast.operator | ast.boolop) | (
    ast.unaryop | ast.cmpop | ast.Expression | ast.Constant | ast.Load
)
_KEYED = frozenset({"builtins.dict", "collections.OrderedDict"})
_CONTAINERS: frozenset[str | None] = _KEYED | {None, "builtins.tuple", "builtins.list"}
"""Types that inputs and outputs are put into; None is a tensor."""

_STRING = re.compile(r'(?<![\w"])"(?:[^"\\\n]|\\.)*"(?!")')
_CODE = re.compile(r"[\w \n.,:()\[\]{}=+\-*/%<>@&|^~!]*", re.ASCII)
_PRIMITIVES = frozenset(
    "RaiseException NumToTensor dtype device layout data shape grad requires_grad is_cuda is_cpu is_mps is_sparse "
    "is_quantized is_nested itemsize nbytes min max abs tolist rangelist type name index id unchecked_cast EnumName "
    "EnumValue unchecked_unwrap_optional TupleIndex TupleUnpack StringIndex ChunkSizes ModuleContainerIndex".split()
)
_BUILT_IN = frozenset(
    "getattr hasattr isinstance annotate uninitialized unchecked_cast fork int float bool complex str list tuple dict "
    "range len min max abs all any sum sorted reversed enumerate zip divmod pow round ord chr hex oct bin hash".split()
)
_CUSTOM_CLASS = re.compile(r"__torch__\.torch\.classes\.(quantized\.\w+PackedParamsBase|rnn\.CellParamsBase)")
_PICKLED = re.compile(
    rf"{_CUSTOM_CLASS.pattern}|__torch__\.(?!torch\.classes\.)[\w.]+|torch\.\w+Storage|torch\.device"
    r"|torch\.per_(tensor|channel)_(affine|symmetric)(_float_qparams)?|torch\._utils\._rebuild_(tensor_v2|qtensor)"
    r"|torch\.jit\._pickle\.(build_\w+list|restore_type_tag)|collections\.OrderedDict"
)


def scan(path: Path) -> None:
    """Check a `.pt2` or `.torchscript.pt` file; see `base.Backend`."""
    if path.suffix not in (".pt2", ".pt"):
        raise ModelFileError(f"{path.name} must be a .pt2 or .torchscript.pt file. {REMEDY}")
    (_pt2 if path.suffix == ".pt2" else _torchscript)(path)


def _records(path: Path, allowed: re.Pattern[str]) -> Any:
    """Return the archive at `path` as torch reads it, if it holds nothing but `allowed` records."""
    with ZipFile(path) as archive:
        entries = archive.infolist()
    reader = torch._C.PyTorchFileReader(str(path))
    root = entries[0].filename.partition("/")[0]
    # torch turns to Python's reader where its own fails, and crafted archives look different to each.
    if sorted(e.filename for e in entries) != sorted({f"{root}/{name}" for name in reader.get_all_records()}):
        refuse_content("entries that are twice in it, or that only some readers of archives see")
    for entry in entries:
        if not allowed.fullmatch(entry.filename.removeprefix(f"{root}/")):
            refuse_content("the entry", entry.filename)
        if entry.file_size > max(_LARGE_BYTES, _MOST_INFLATED * entry.compress_size):
            refuse_content(f"an entry that grows {entry.file_size // max(1, entry.compress_size)} times when unpacked")
    return reader


def _pt2(path: Path) -> None:
    reader = _records(path, _PT2_RECORDS)
    if reader.get_record("data/sample_inputs/model.pt"):
        refuse_content("an example, which is a pickle")
    # Operators are known once their library is imported.
    import_module("torch.ao.quantization.fx._decomposed")
    for name in reader.get_all_records():
        if name.endswith(".json"):
            _program(json.loads(reader.get_record(name).decode()))


def _program(value: Any, key: str = "") -> None:
    """Look at all that a program says, wherever it says it, whether or not torch reads it there."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in _NEVER and inner:
                refuse_content("an object that is no tensor:", name)
            if key == "metadata" and name not in _METADATA:
                refuse_content("the metadata", name)
            if not _PLAIN.fullmatch(name):
                refuse_content("the name", name)
            _program(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _program(inner, key)
    elif key == "use_pickle" and value is not False:
        refuse_content("pickled tensors")
    elif isinstance(value, str):
        if key in _SAID:
            _SAID[key](value)
        elif not _SPELLED.get(key, _PLAIN).fullmatch(value):
            refuse_content(f"a {key or 'name'} that is not spelled like one:", value)


def _text(text: str) -> None:
    # Inductor may write it into a comment of its code, which must not end there.
    if not all(line.isprintable() for line in text.split("\n")):
        refuse_content("the text", text)


def _operator(target: str) -> None:
    known = bool(_SYMBOLIC.fullmatch(target) or _OF_GRAPHS.fullmatch(target))
    if match := _OF_TENSORS.fullmatch(target):
        namespace, name, overload = match.groups()
        packet = getattr(getattr(torch.ops, namespace), name, None)
        known = name not in _FORBIDDEN and isinstance(getattr(packet, overload, None), torch._ops.OpOverload)
    if not known:
        refuse_content("the operator", target)


def _evaluated(text: str, what: str, spelled: re.Pattern[str], allowed: Callable[[ast.AST], bool]) -> None:
    """Look at what torch evaluates as it reads it, in which no number may grow beyond bounds."""
    tree = ast.parse(text, mode="eval") if spelled.fullmatch(text) else None
    if tree is None or not all(map(allowed, ast.walk(tree))):
        refuse_content(f"the {what}", text)
    if sum(1 for _ in ast.walk(tree)) > _MOST_NODES or _bits(tree.body) > _MOST_BITS:
        refuse_content(f"the endless {what}", text)


def _bits(node: ast.AST) -> float:
    """Return how many bits an expression's value takes at most; a symbol is as long as any size."""
    if isinstance(node, ast.Constant):
        return _constant_bits(node.value)
    name, parts = _operation(node)
    if name in _POWERS:
        return max(map(_bits, parts)) * math.exp2(min(64, max(map(_bits, parts[1:] or parts))))
    if name == "Float" and len(parts) > 1:
        # The others are how many digits to compute.
        return _bits(parts[0]) if max(map(_bits, parts[1:])) <= _MOST_DIGITS_BITS else math.inf
    if name in ("Mul", "Mult"):
        return sum(map(_bits, parts))
    return max(map(_bits, parts)) + len(parts) if parts else 64.0


def _operation(node: ast.AST) -> tuple[str, list[ast.expr]]:
    """Return what a node does, by name, and with what."""
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        # Symbol('s0', integer=True), Integer(3), Float('0.5', precision=53)
        if name == "Symbol" or isinstance(node.func, ast.Attribute):
            return name, []
        return name, [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.BinOp):
        return type(node.op).__name__, [node.left, node.right]
    return type(node).__name__, [inner for inner in ast.iter_child_nodes(node) if isinstance(inner, ast.expr)]


def _constant_bits(value: Any) -> float:
    try:
        number = abs(float(value)) if not isinstance(value, str) or re.match(r"-?\d", value) else 1.0
    except OverflowError:
        return math.inf
    return math.log2(number + 1) if math.isfinite(number) else math.inf


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS | _CONSTANTS
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return bool(re.fullmatch(r"[A-Za-z_]\w*|-?\d+(\.\d+)?(e[+-]?\d+)?", node.value, re.ASCII))
    return isinstance(node, ast.Expression | ast.Constant | ast.keyword | ast.Load | ast.UnaryOp | ast.USub | ast.Tuple)


def _compares(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) or (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS)
    if isinstance(node, ast.Attribute):
        return node.attr in _SIZES
    if isinstance(node, ast.Name):
        return node.id == "L" or node.id in _FUNCTIONS
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return bool(_PLAIN.fullmatch(node.value))
    return isinstance(node, _COMPARED)


def _outputs(text: str, keys: re.Pattern[str] | None = None) -> None:
    """Look at the types that inputs or outputs are put into, which torch may import, and at the names in them."""
    version, spec = json.loads(text)
    if version != 1:
        raise ValueError(f"its outputs are described in version {version}, which is unknown")
    specs = [spec]
    for inner in specs:
        kind, context = inner["type"], inner["context"]
        if kind not in _CONTAINERS:
            refuse_content("inputs or outputs in a", kind)
        named = json.loads(context or "null") or []
        if type(named) is not list or (named and kind not in _KEYED) or any(isinstance(k, dict | list) for k in named):
            refuse_content("inputs or outputs named", context)
        if keys and not all(keys.fullmatch(str(key)) for key in named):
            refuse_content("inputs named", context)
        specs.extend(inner["children_spec"])


_expression = partial(_evaluated, what="size", spelled=_EXPRESSION, allowed=_is_arithmetic)
"""Look at the size of a dimension, by functions of symbols and numbers."""
_guard = partial(_evaluated, what="guard", spelled=_GUARD, allowed=_compares)
"""Look at a condition on inputs, which torch makes code of: comparisons of their sizes."""
_SAID: Mapping[str, Callable[[str], None]] = {
    **dict.fromkeys(("as_string", "as_strings", *_METADATA), _text),
    **dict.fromkeys(("target", "as_operator"), _operator),
    "expr_str": _expression,
    "guards_code": _guard,
    "in_spec": partial(_outputs, keys=_SPELLED["name"]),
    "out_spec": _outputs,
}
"""How to look at what a program says, by the field in which it stands."""


def _torchscript(path: Path) -> None:
    reader = _records(path, _SCRIPT_RECORDS)
    for name in reader.get_all_records():
        if name.endswith(".py"):
            _script(reader.get_record(name).decode())
        elif name.endswith("pkl"):
            _pickle(reader.get_record(name))


def _script(code: str) -> None:
    """Look at the operators and classes that TorchScript names."""
    # Outside of strings, what torch reads and what Python reads is then the same.
    if not _CODE.fullmatch(_STRING.sub("0", code)):
        refuse_content("code that is no TorchScript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            refuse_content("an import:", ast.unparse(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id not in _BUILT_IN and not re.fullmatch(r"_\d+", node.func.id):
                refuse_content("a call of", node.func.id)
            if node.func.id == "getattr" and getattr(node.args[1], "value", "save") in _FORBIDDEN:
                refuse_content("the operator", ast.unparse(node))
    for name in _names(tree):
        _script_name(name)


def _script_name(name: str) -> None:
    root, *parts = name.split(".")
    if root == "__torch__":
        custom = parts in ([], ["torch"]) or parts[:2] == ["torch", "classes"]
        allowed = not custom or bool(_CUSTOM_CLASS.fullmatch(name))
    elif root == "torch":
        allowed = len(parts) == 1 and parts[0] not in _FORBIDDEN
    elif root == "ops":
        of_tensors = parts[:1] in (["aten"], ["quantized"]) and not _FORBIDDEN.intersection(parts)
        allowed = len(parts) == 2 and (of_tensors or (parts[0] == "prim" and parts[1] in _PRIMITIVES))
    else:
        # A method of a tensor is an operator too.
        allowed = not _FORBIDDEN.intersection(parts) and root not in ("print", "rpc_async", "rpc_sync", "rpc_remote")
    if not allowed:
        refuse_content("the operator or class", name)


def _names(node: ast.AST) -> Iterator[str]:
    """Yield every name in `node` with its attributes, `torch.add`; those of anything else after a dot, `.forward`."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        yield ".".join([node.id, *reversed(parts)])
        return
    if parts:
        yield ".".join(["", *reversed(parts)])
    for inner in ast.iter_child_nodes(node):
        yield from _names(inner)


def _pickle(content: bytes) -> None:
    """Look at the classes and functions that a pickle names, without unpickling it."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and not _PICKLED.fullmatch(str(argument).replace(" ", ".")):
            refuse_content("a pickle that names", argument)
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            refuse_content("a pickle with", opcode.name)
