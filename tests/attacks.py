"""Ways by which a `.pt2` file makes torch run code: each turns a good file into one that creates a marker."""

import contextlib
import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import torch

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def contents(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def packed(path, entries, root="model/"):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(root + name, content)
    return path


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


@contextlib.contextmanager
def edited(entries, name=PROGRAM):
    found = json.loads(entries[name])
    yield found
    entries[name] = json.dumps(found).encode()


def python(marker):
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def pickled(marker):
    buffer = io.BytesIO()
    torch.save(Touch(str(marker)), buffer)
    return buffer.getvalue()


def module_of(marker, monkeypatch):
    """Write a Python module that does its harm as it is imported, and return its name."""
    (marker.parent / "harmful.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    monkeypatch.syspath_prepend(str(marker.parent))
    monkeypatch.delitem(sys.modules, "harmful", raising=False)
    return "harmful"


def size(entries, marker, _):
    with edited(entries) as program:
        for holder in every(program, "expr_str"):
            holder["expr_str"] = python(marker)


def weight(entries, marker, _):
    with edited(entries, WEIGHTS) as weights:
        entry = next(iter(weights["config"].values()))
        entry["use_pickle"] = True
    entries[f"data/weights/{entry['path_name']}"] = pickled(marker)


def constant(entries, marker, _):
    entry = {"path_name": "tensor_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    entries[CONSTANTS] = json.dumps({"config": {"c": entry}}).encode()
    entries["data/constants/tensor_0"] = pickled(marker)


def opaque_object(entries, marker, _):
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
    entries[CONSTANTS] = json.dumps({"config": {"c": entry | {"use_pickle": True}}}).encode()
    entries["data/constants/opaque_obj_0"] = pickle.dumps(Touch(str(marker)))


def example(entries, marker, _):
    entries["data/sample_inputs/model.pt"] = pickled(marker)


def weights_of_older_files(entries, marker, _):
    entries["data/weights/model.pt"] = pickled(marker)


def constants_of_older_files(entries, marker, _):
    entries["data/constants/model.pt"] = pickled(marker)


def outputs_in(entries, **spec):
    leaf = {"type": None, "context": None, "children_spec": []}
    with edited(entries) as program:
        for holder in every(program, "out_spec"):
            holder["out_spec"] = json.dumps([1, {"children_spec": [leaf], **spec}])


def enumerated_key(entries, marker, monkeypatch):
    key = {"__enum__": True, "fqn": f"{module_of(marker, monkeypatch)}:A", "name": "b"}
    outputs_in(entries, type="builtins.dict", context=json.dumps([key]))


def container_with_a_factory(entries, marker, monkeypatch):
    name = module_of(marker, monkeypatch)
    context = {"default_factory_module": name, "default_factory_name": "x", "dict_context": ["a"]}
    outputs_in(entries, type="collections.defaultdict", context=context)


def name_of_an_input(entries, marker, _):
    entries[PROGRAM] = entries[PROGRAM].decode().replace('"x"', json.dumps(f"x={python(marker)}")).encode()


def name_of_a_weight(entries, marker, _):
    code = f'conv1.weight" + str(exec(bytes({list(python(marker).encode())})) or "") + "'
    for name in (PROGRAM, WEIGHTS):
        entries[name] = entries[name].decode().replace('"conv1.weight"', json.dumps(code)).encode()


def operator_that_opens_a_file(entries, marker, _):
    said = {"filename": {"as_string": str(marker)}, "shared": {"as_bool": True}, "size": {"as_int": 8}}
    inputs = [{"name": name, "arg": value, "kind": 1} for name, value in said.items()]
    inputs.append({"name": "dtype", "arg": {"as_scalar_type": 1}, "kind": 2})
    with edited(entries) as program:
        graph = program["graph_module"]["graph"]
        node = {"target": "torch.ops.aten.from_file.default", "inputs": inputs, "metadata": {}, "name": "extra"}
        graph["nodes"].insert(0, node | {"outputs": [{"as_tensor": {"name": "extra"}}]})
        graph["tensor_values"]["extra"] = graph["tensor_values"]["x"]


ATTACKS = {
    size: "the size", weight: "pickled tensors", constant: "pickled tensors", opaque_object: "the entry",
    example: "an example, which is a pickle", weights_of_older_files: "the entry",
    constants_of_older_files: "the entry", enumerated_key: "outputs named",
    container_with_a_factory: "outputs in a 'collections.defaultdict'",
    name_of_an_input: "a name that is not spelled like one", name_of_a_weight: "the name",
    operator_that_opens_a_file: "the operator 'torch.ops.aten.from_file.default'",
}  # fmt: skip
"""Each makes a program create the marker, and what is said of it then."""
