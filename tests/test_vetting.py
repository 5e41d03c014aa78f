"""Files that would run code are refused before they are opened; each attack is first shown to work where it does."""

import contextlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import Corner, corners
from torch import nn

from shrinkkit import artifacts, loading, quantize, vetting
from shrinkkit.errors import ModelFileError

EXAMPLE = (corners(4, 2).tensors[0],)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


class Saving(nn.Module):
    def forward(self, x: torch.Tensor, path: str = "marker") -> torch.Tensor:
        torch.save(x, path)
        return x


class Two(nn.Module):
    """Sizes that depend on each other, an embedding, and a dict for an output."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(7, 8), nn.LSTM(8, 8, batch_first=True)

    def forward(self, tokens, scale):
        x = self.inner(self.embed(tokens))[0]
        return {"last": x[:, -1] * scale, "both": (x.flatten(1), x.reshape(-1, 8).reshape(x.shape[0], -1))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a good file of each kind."""
    import openvino

    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = Corner().eval()
    artifacts.write_torch(model, EXAMPLE, folder)
    artifacts.write_torch(quantize.static_int8(model, EXAMPLE, [EXAMPLE]), EXAMPLE, folder)
    artifacts.write_onnx(model, EXAMPLE, folder / "model.onnx")
    openvino.save_model(openvino.Core().read_model(folder / "model.onnx"), folder / "model.openvino.xml")
    return folder


FILES = ("model.pt2", "model.torchscript.pt", "model.onnx", "model.openvino.xml")


def changed(path, to, edit):
    """Write a copy of the archive at `path` whose entries are what `edit` makes of their names and contents."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, edit(entry.filename, old.read(entry)))
    return to


def program(edit):
    def change(name, content):
        if not name.endswith("models/model.json"):
            return content
        found = json.loads(content)
        edit(found)
        return json.dumps(found).encode()

    return change


def every(value, key):
    """Yield each dict that holds `key`, at any depth."""
    if isinstance(value, dict):
        if key in value:
            yield value
        for inner in value.values():
            yield from every(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from every(inner, key)


def refused(path, what):
    with pytest.raises(ModelFileError, match=what) as caught:
        vetting.check(path)
    assert path.name in str(caught.value)
    with pytest.raises(ModelFileError, match=what):
        loading.load(path, runtime={".onnx": "onnxruntime", ".xml": "openvino"}.get(path.suffix, "torch"))


@pytest.mark.parametrize("name", FILES)
def test_what_shrinkkit_writes_is_accepted(folder, name):
    vetting.check(folder / name)


@pytest.mark.parametrize("method", ["", "dynamic-int8", "bfloat16"])
def test_models_of_several_inputs_and_recurrent_layers_are_accepted(tmp_path, method):
    torch.manual_seed(0)
    model, example = Two().eval(), (torch.randint(0, 7, (3, 5)), torch.rand(3, 1))
    if method == "dynamic-int8":
        model = quantize.dynamic_int8(model, example)
    elif method:
        model = quantize.half(model, example, dtype=method)
    path, *_ = artifacts.write_torch(model, example, tmp_path)
    vetting.check(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_damaged_and_named(folder, tmp_path, name, share):
    path = tmp_path / name
    content = (folder / name).read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    if name.endswith(".xml"):
        path.with_suffix(".bin").write_bytes((folder / name).with_suffix(".bin").read_bytes())
    refused(path, "It is damaged" if not name.endswith(".onnx") or share < 0.9 else path.name)


def test_a_size_that_is_evaluated_as_python_is_refused(folder, tmp_path):
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch() or Symbol('s0', positive=True, integer=True)"

    def edit(found):
        sizes = list(every(found, "expr_str"))
        assert sizes
        for size in sizes:
            size["expr_str"] = code

    path = changed(folder / "model.pt2", tmp_path / "evil.pt2", program(edit))
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert marker.exists(), "the attack must work where nobody looks"
    marker.unlink()
    refused(path, "as the size of a dimension")
    assert not marker.exists()


def test_an_example_that_is_a_pickle_is_refused(folder, tmp_path):
    marker = tmp_path / "marker"
    torch.save(Touch(str(marker)), tmp_path / "example.pt")
    content = (tmp_path / "example.pt").read_bytes()
    path = changed(
        folder / "model.pt2",
        tmp_path / "evil.pt2",
        lambda name, old: content if name.endswith("sample_inputs/model.pt") else old,
    )
    with contextlib.suppress(Exception):
        torch.export.load(path)
    marker.unlink(missing_ok=True)
    refused(path, "a pickle")
    assert not marker.exists()


def test_weights_that_are_pickles_are_refused(folder, tmp_path):
    def edit(name, content):
        if not name.endswith("model_weights_config.json"):
            return content
        found = json.loads(content)
        for entry in found["config"].values():
            entry["use_pickle"] = True
        assert found["config"]
        return json.dumps(found).encode()

    refused(changed(folder / "model.pt2", tmp_path / "evil.pt2", edit), "names pickled tensors")


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load", "torch.load", "torch.ops.aten.save.default", "torch.ops.aten.from_file.default",
        "torch.ops.mine.act.default", "_operator.__import__.x", "os.system", "torch.ops.aten.relu.default; x",
    ],
)  # fmt: skip
def test_operators_that_reach_beyond_tensors_are_refused(folder, tmp_path, target):
    def edit(found):
        found["graph_module"]["graph"]["nodes"][0]["target"] = target

    refused(changed(folder / "model.pt2", tmp_path / "evil.pt2", program(edit)), "it calls")


def test_containers_that_torch_would_import_are_refused(folder, tmp_path):
    def edit(found):
        specs = list(every(found, "out_spec"))
        assert specs
        for holder in specs:
            holder["out_spec"] = json.dumps(
                [1, {"type": "collections.defaultdict", "context": '["os", "system"]', "children_spec": []}]
            )

    refused(changed(folder / "model.pt2", tmp_path / "evil.pt2", program(edit)), "no plain tuple, list or dict")


@pytest.mark.parametrize(
    ("code", "harmless"),
    [
        ("L['x'].size()[0] == L['y'].size()[0]", True),
        ("L['x'].size()[0] <= 64", True),
        ("__import__('os').system('true')", False),
        ("L['x'].numpy().tofile('marker')", False),
        ("[c for c in ().__class__.__base__.__subclasses__()]", False),
    ],
)
def test_guards_may_only_compare_sizes(code, harmless):
    assert vetting._is_guard(code) is harmless


@pytest.mark.parametrize("entry", ["data/aotinductor/model/x.so", "data/constants/custom_obj_0", "../out", "setup.py"])
def test_entries_that_no_model_needs_are_refused(folder, tmp_path, entry):
    path = tmp_path / "evil.pt2"
    path.write_bytes((folder / "model.pt2").read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"model/{entry}", b"x")
    refused(path, "it holds")


def test_an_entry_that_grows_out_of_all_proportion_is_refused(folder, tmp_path):
    path = tmp_path / "evil.pt2"
    path.write_bytes((folder / "model.pt2").read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/weights/weight_9999", bytes(1 << 24), zipfile.ZIP_DEFLATED)
    refused(path, "times when unpacked")


def test_torchscript_that_writes_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    torch.jit.script(Saving()).save(str(path))
    artifacts._forget_source(path)
    torch.jit.load(str(path))(torch.ones(1))
    assert (tmp_path / "marker").exists(), "the attack must work where nobody looks"
    refused(path, "calls aten::save")


def test_torchscript_whose_pickle_names_python_is_refused(folder, tmp_path):
    content = pickle.dumps(Touch(str(tmp_path / "marker")), protocol=2)
    path = changed(
        folder / "model.torchscript.pt",
        tmp_path / "evil.torchscript.pt",
        lambda name, old: content if name.endswith("data.pkl") else old,
    )
    refused(path, "a pickle that names")


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda m: setattr(m.graph.node[0], "domain", "com.evil"), "needs a library of its own"),
        (lambda m: setattr(m.graph.node[0], "op_type", "Conjure"), "it calls Conjure, an operator that ONNX does not"),
        (
            lambda m: m.graph.initializer[0].external_data.add(key="location", value="../../etc/passwd"),
            "its weights lie outside its folder",
        ),
    ],
)
def test_onnx_that_reaches_beyond_onnx_is_refused(folder, tmp_path, edit, what):
    import onnx

    model = onnx.load(folder / "model.onnx")
    edit(model)
    (tmp_path / "evil.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "evil.onnx", what)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('<?xml version="1.0"?>', '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a "b">]>', "defines entities"),
        ('version="opset1"', 'version="extension"', "needs a library of its own"),
        ('offset="0"', 'offset="99999999"', "is shorter than it says"),
    ],
)
def test_an_openvino_model_that_is_no_plain_graph_is_refused(folder, tmp_path, old, new, what):
    text = (folder / "model.openvino.xml").read_text()
    assert old in text
    path = tmp_path / "evil.xml"
    path.write_text(text.replace(old, new))
    path.with_suffix(".bin").write_bytes((folder / "model.openvino.bin").read_bytes())
    refused(path, what)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Touch(os.devnull)))
    with pytest.raises(ModelFileError, match=r"must be a \.pt2"):
        vetting.check(path)
