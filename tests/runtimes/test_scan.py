"""Files that would run code are refused before they are opened; attacks are first shown to work where nobody looks."""

import contextlib
import os
import pickle
import sys
import zipfile

import architectures
import pytest
import torch
from attacks import ATTACKS, PROGRAM, Touch, contents, edited, packed, pickled
from tiny import Corner, corners
from torch import nn

from shrinkkit.errors import ModelFileError
from shrinkkit.runtimes import files
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.torch import quantize
from shrinkkit.runtimes.torch.spec import engine

EXAMPLE = (corners(4, 2).tensors[0],)
FILES = ("model.pt2", "model.torchscript.pt", "model.onnx", "model.openvino.xml")


class Control(nn.Module):
    """Two inputs of sizes that belong together, branches, and outputs in containers."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"first part": nn.Linear(4, 4), "b-2": nn.Linear(4, 4)})

    def forward(self, x, y):
        with torch.no_grad():
            x = self.parts["first part"](x)
        x = torch.cond(x.sum() > 0, lambda x: self.parts["b-2"](x), lambda x: x * 2, (x,))
        batch = x.shape[0]
        return {"a b": x.reshape(batch * 2, -1), "c": [x[: y.shape[0]] + y, (x.new_zeros(batch * 2 - batch % 3 + 1),)]}


class Looping(nn.Module):
    """Control flow that only TorchScript takes, and texts that look like code."""

    def forward(self, x: torch.Tensor):
        n = 0
        while bool(x.abs().sum() > 1) and n < 9:
            x, n = x * 0.5, n + 1
        assert n < 20, "it's \"too\" many; # torch.save(x, 'a')\n\\"
        return x, float(n) ** 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a good file of each kind."""
    import openvino

    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = Corner().eval()
    torch_build.write_program(model, EXAMPLE, folder)
    torch_build.write(quantize.static_int8(model, EXAMPLE, [EXAMPLE]), EXAMPLE, folder)
    onnx_export.write(model, EXAMPLE, folder / "model.onnx")
    openvino.save_model(openvino.Core().read_model(folder / "model.onnx"), folder / "model.openvino.xml")
    return folder


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


def scan(path):
    """Scan a file for a runtime that reads its format."""
    files.scan(path, runtime={".onnx": "onnxruntime", ".xml": "openvino"}.get(path.suffix, "torch"))


def refused(path, what):
    """Both the check and whatever loads files refuse the one at `path`, by name and with the remedy."""
    for attempt in (
        lambda: scan(path),
        lambda: files.load(path, runtime={".onnx": "onnxruntime", ".xml": "openvino"}.get(path.suffix, "torch")),
    ):
        with pytest.raises(ModelFileError, match=what) as caught:
            attempt()
        assert path.name in str(caught.value)
        assert str(caught.value).endswith("Run the step that makes it again.")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda f: f.__name__)
def test_a_program_that_runs_code_is_refused_before_it_does(folder, tmp_path, marker, monkeypatch, attack):
    entries = contents(folder / "model.pt2")
    attack(entries, marker, monkeypatch)
    path = packed(tmp_path / "evil.pt2", entries)
    with contextlib.suppress(Exception):
        torch.export.load(path).module()(*EXAMPLE)
    assert marker.exists(), "the attack must work where nobody looks"
    marker.unlink()
    monkeypatch.delitem(sys.modules, "harmful", raising=False)
    refused(path, ATTACKS[attack])
    assert not marker.exists()


def test_a_program_in_the_format_of_older_files_is_refused_before_it_runs_code(folder, tmp_path, marker):
    from torch._export.serde.schema import SCHEMA_VERSION

    entries = {"version": ".".join(map(str, SCHEMA_VERSION)).encode()}
    entries["serialized_exported_program.json"] = contents(folder / "model.pt2")[PROGRAM]
    entries |= {f"serialized_{x}.pt": pickled(marker) for x in ("state_dict", "constants", "example_inputs")}
    path = packed(tmp_path / "evil.pt2", entries, root="")
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert marker.exists(), "the attack must work where nobody looks"
    marker.unlink()
    refused(path, "evil.pt2 cannot be read")
    assert not marker.exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load", "torch.load", "torch.os.system", "torch.ops.aten.save.default", "torch.ops.mine.act.default",
        "torch.ops.aten.conjure.default", "torch.ops.aten.relu.__call__", "torch.ops.aten.__class__.default",
        "torch.ops.higher_order.call_torchbind", "torch.ops.higher_order.triton_kernel_wrapper_mutation",
        "_operator.attrgetter", "_operator.call", "math.__loader__", "#mine:act", "os.system",
        "torch.ops.aten.relu.default; x", "torch.ops.aten.relu.default\n",
    ],
)  # fmt: skip
def test_operators_that_reach_beyond_tensors_are_refused(folder, tmp_path, target):
    entries = contents(folder / "model.pt2")
    with edited(entries) as program:
        program["graph_module"]["graph"]["nodes"][0]["target"] = target
    refused(packed(tmp_path / "evil.pt2", entries), "the operator")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guards_code", ["__import__('os').system('true')"]),
        ("guards_code", ["L['x'].numpy().tofile('marker')"]),
        ("guards_code", ["[c for c in ().__class__.__base__.__subclasses__()]"]),
        ("guards_code", ["L['x'].size()[0] == 4 # {evil}"]),
        ("forward_arg_names", ["x=exec('1')"]),
        ("in_spec", '[1, {"type": "builtins.dict", "context": "[\\"x=exec(1)\\"]", "children_spec": []}]'),
        ("out_spec", '[1, {"type": "builtins.dict", "context": "{\\"__enum__\\": true}", "children_spec": []}]'),
        ("as_string", "said\rimport os"),
        ("as_operator", "torch.hub.load"),
        ("as_custom_obj", {"name": "x", "class_fqn": "y"}),
        ("metadata", {"source_fn_stack": "torch.hub.load"}),
        ("expr_str", "Symbol('x').__class__"),
        ("expr_str", "Function('f')(Integer(1))"),
        ("verifiers", ["MINE"]),
        ("path_name", "custom_obj_0"),
    ],
)
def test_whatever_a_program_says_is_looked_at_wherever_it_says_it(folder, tmp_path, key, value):
    entries = contents(folder / "model.pt2")
    with edited(entries) as program:
        program["graph_module"]["graph"]["nodes"][0][key] = value
    refused(packed(tmp_path / "evil.pt2", entries), "must hold nothing that can run code")


@pytest.mark.parametrize("entry", ["data/aotinductor/model/x.so", "data/constants/custom_obj_0", "../out", "setup.py"])
def test_entries_that_no_model_needs_are_refused(folder, tmp_path, entry):
    entries = contents(folder / "model.pt2") | {entry: b"x"}
    refused(packed(tmp_path / "evil.pt2", entries), "the entry|only some readers")


def test_an_entry_that_is_twice_in_an_archive_is_refused(folder, tmp_path):
    path = packed(tmp_path / "evil.pt2", contents(folder / "model.pt2"))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(f"model/{PROGRAM}", b"{}")
    refused(path, "twice")


def test_an_entry_that_grows_out_of_all_proportion_is_refused(folder, tmp_path):
    path = packed(tmp_path / "evil.pt2", contents(folder / "model.pt2"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/weights/weight_9999", bytes(1 << 24), zipfile.ZIP_DEFLATED)
    refused(path, "times when unpacked")


def script_with(folder, path, line):
    """Write the TorchScript file anew so that it runs `line` while it is loaded."""
    entries, place, count = contents(folder / "model.torchscript.pt"), b"    self.in_channels = (state)[0]\n", 0
    for name in entries:
        if name.endswith(".py"):
            count += entries[name].count(place)
            entries[name] = entries[name].replace(place, f"    {line}\n".encode() + place)
    assert count
    return packed(path, entries)


def test_torchscript_that_writes_a_file_while_it_is_loaded_is_refused(folder, tmp_path, marker):
    path = script_with(folder, tmp_path / "evil.torchscript.pt", f'torch.save((state)[0], "{marker}")')
    with quantize.using_engine(engine(path)):
        torch.jit.load(str(path))
    assert marker.exists(), "the attack must work where nobody looks"
    marker.unlink()
    refused(path, "the operator or class 'torch.save'")
    assert not marker.exists()


@pytest.mark.parametrize(
    "line",
    [
        'torch.from_file("a", True, 8)', '((state)[10]).save("a")', 'ops.aten.save(1, "a")', 'ops.prim.Print("a")',
        'print("a")', "_9 = print", "_9 = torch", 'getattr(torch, "save")(1, "a")',
        'getattr((state)[10], "save")("a")',
        "_9 = ops", 'ops.c10d.broadcast_("a")', 'rpc_async("a")', 'awaitable("a")', "import os",
        "from os import system",
        '_9 = __torch__.torch.classes.profiler._RecordFunction("a")', '_9 = getattr(__torch__.torch, "classes")',
        "_9 = 1  # torch.save", "_9 = r\"\\\"; torch.save(1, 'a')  # \"", '_9 = 1; torch.save(1, "a")',
        '_9 = """"""', "torch.save\\\n    (1)",
    ],
)  # fmt: skip
def test_torchscript_that_reaches_beyond_tensors_is_refused(folder, tmp_path, line):
    refused(script_with(folder, tmp_path / "evil.torchscript.pt", line), "must hold nothing that can run code")


@pytest.mark.parametrize("protocol", [2, 4])
def test_torchscript_whose_pickle_names_python_is_refused(folder, tmp_path, marker, protocol):
    entries = contents(folder / "model.torchscript.pt")
    entries["data.pkl"] = pickle.dumps(Touch(str(marker)), protocol=protocol)
    refused(packed(tmp_path / "evil.torchscript.pt", entries), "a pickle")
    assert not marker.exists()


@pytest.mark.parametrize("name", FILES)
def test_what_shrinkkit_writes_is_accepted(folder, name):
    scan(folder / name)


@pytest.mark.parametrize("make", [architectures.Recurrent, architectures.TorchTransformer])
@pytest.mark.parametrize("method", ["float", "dynamic-int8", "bfloat16"])
def test_files_of_recurrent_layers_and_of_attention_are_accepted(tmp_path, make, method):
    torch.manual_seed(0)
    model, example = make().eval(), (torch.rand(2, 5, 8),)
    if method == "dynamic-int8":
        model = quantize.dynamic_int8(model, example)
    elif method == "bfloat16":
        model = quantize.half(model, example, dtype=method)
    path, *_ = torch_build.write(model, example, tmp_path)
    scan(path)


@pytest.mark.parametrize(
    ("model", "inputs", "format"), [(Control(), 2, "pt2"), (Looping(), 1, "torchscript")], ids=["pt2", "torchscript"]
)
def test_control_flow_guards_containers_and_texts_are_accepted(tmp_path, model, inputs, format):
    path, found, _ = torch_build.write(model.eval(), (torch.rand(4, 4),) * inputs, tmp_path)
    assert found == format
    scan(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_damaged_and_named(folder, tmp_path, name, share):
    path, content = tmp_path / name, (folder / name).read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    if name.endswith(".xml"):
        path.with_suffix(".bin").write_bytes((folder / name).with_suffix(".bin").read_bytes())
    refused(path, "It is damaged")


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Touch(os.devnull)))
    with pytest.raises(ModelFileError, match=r"must be a \.pt2"):
        scan(path)


def in_a_branch(model):
    import onnx

    inner = onnx.helper.make_graph([onnx.helper.make_node("Act", ["x"], ["y"], domain="mine")], "inner", [], [])
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("then_branch", inner))


def shadowed(model):
    import onnx

    node, opset = onnx.helper.make_node("Relu", ["x"], ["y"]), onnx.helper.make_opsetid("", 20)
    model.functions.append(onnx.helper.make_function("com.microsoft", "EPContext", ["x"], ["y"], [node], [opset]))
    model.graph.node[0].op_type, model.graph.node[0].domain = "EPContext", "com.microsoft"


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda m: setattr(m.graph.node[0], "domain", "mine"), "the operator 'mine::"),
        (lambda m: setattr(m.graph.node[0], "op_type", "Conjure"), "the operator '::Conjure'"),
        (in_a_branch, "the operator 'mine::Act'"),
        (shadowed, "the operator 'com.microsoft::EPContext'"),
        (lambda m: m.graph.initializer[0].external_data.add(key="location", value="../passwd"), "outside its folder"),
        (lambda m: m.graph.initializer[0].external_data.add(key="location", value="/etc/passwd"), "outside its folder"),
        (
            lambda m: m.graph.initializer[0].external_data.add(key="location", value="beside"),
            "beside, where .* missing",
        ),
    ],
)
def test_onnx_that_reaches_beyond_onnx_is_refused(folder, tmp_path, edit, what):
    import onnx

    model = onnx.load(folder / "model.onnx")
    edit(model)
    (tmp_path / "evil.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "evil.onnx", what)


def test_onnx_with_weights_beside_it_is_accepted_and_refused_once_they_are_cut(folder, tmp_path):
    import onnx

    model, beside = onnx.load(folder / "model.onnx"), tmp_path / "weights"
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location=beside.name, size_threshold=0)
    scan(tmp_path / "model.onnx")
    beside.write_bytes(beside.read_bytes()[:-1])
    refused(tmp_path / "model.onnx", "shorter than it says")


def test_onnx_whose_own_functions_are_made_of_onnx_is_accepted(folder, tmp_path):
    import onnx

    model = onnx.load(folder / "model.onnx")
    node, opset = onnx.helper.make_node("Relu", ["x"], ["y"]), onnx.helper.make_opsetid("", 20)
    model.functions.append(onnx.helper.make_function("mine", "Act", ["x"], ["y"], [node], [opset]))
    changed = next(n for n in model.graph.node if n.op_type == "Relu")
    changed.op_type, changed.domain = "Act", "mine"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    scan(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('<?xml version="1.0"?>', '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a "b">]>', "a document type"),
        ('version="opset1"', 'version="extension"', "needs another library"),
        ('offset="0"', 'offset="99999999"', "is shorter than it says"),
        ('offset="0"', 'offset="-8"', "is shorter than it says"),
    ],
)
def test_an_openvino_model_that_is_no_plain_graph_is_refused(folder, tmp_path, old, new, what):
    text = (folder / "model.openvino.xml").read_text()
    assert old in text
    path = tmp_path / "evil.xml"
    path.write_text(text.replace(old, new))
    path.with_suffix(".bin").write_bytes((folder / "model.openvino.bin").read_bytes())
    refused(path, what)


@pytest.mark.parametrize(("kept", "what"), [(100, "shorter than it says"), (None, "is missing")])
def test_an_openvino_model_without_all_of_its_weights_is_refused(folder, tmp_path, kept, what):
    path = tmp_path / "model.xml"
    path.write_text((folder / "model.openvino.xml").read_text())
    if kept:
        path.with_suffix(".bin").write_bytes((folder / "model.openvino.bin").read_bytes()[:kept])
    refused(path, what)
