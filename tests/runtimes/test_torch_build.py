import zipfile

import pytest
import torch
from tiny import Corner
from torch import nn

from shrinkkit.errors import ModelFileError, Unsupported
from shrinkkit.runtimes import base, files
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.onnxruntime import profile as ort_profile
from shrinkkit.runtimes.onnxruntime import quantize as ort_quantize
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.torch import quantize

EXAMPLE = (torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Counting(nn.Module):
    """Control flow that depends on the data, which torch.export cannot take."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.abs().sum() > 1):
            x = x * 0.5
        return self.fc(x)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Corner().eval()


def outputs_of(model, inputs):
    with torch.inference_mode():
        return model(*inputs)


def test_a_model_is_exported_whole_and_nothing_is_noted(model, tmp_path):
    path, kind, note = torch_build.write(model, EXAMPLE, tmp_path)
    assert (path.name, kind, note) == ("model.torchscript.pt", "torchscript", "")
    assert torch_build.write_program(model, EXAMPLE, tmp_path) == (tmp_path / "model.pt2", "")
    assert onnx_export.write(model, EXAMPLE, tmp_path / "model.onnx").note == ""


@pytest.mark.parametrize("fixed", [False, True])
def test_the_record_names_inputs_and_outputs_with_their_shapes(model, tmp_path, fixed):
    onnx_export.write(model, EXAMPLE, tmp_path / "model.onnx")
    loaded = files.load(tmp_path / "model.onnx", runtime="onnxruntime")
    file = base.describe(
        loaded,
        tmp_path,
        format="onnx",
        example=EXAMPLE,
        output=loaded(*EXAMPLE),
        fixed_batch=fixed,
        error=0.0,
        tolerance=1e-3,
    )
    first = 4 if fixed else "batch"
    assert [(p.name, p.dtype, p.shape) for p in file.inputs] == [("x", "float32", (first, 1, 8, 8))]
    assert [(p.dtype, p.shape) for p in file.outputs] == [("float32", (first, 4))]
    assert file.size_bytes == (tmp_path / "model.onnx").stat().st_size > file.compressed_bytes > 0


def test_a_file_in_two_parts_counts_and_hashes_both(tmp_path):
    path = tmp_path / "model.xml"
    path.write_bytes(b"<net/>")
    weights = path.with_suffix(".bin")
    with pytest.raises(ModelFileError, match=r"model\.bin is missing"):
        base.sha256(path, weights)
    weights.write_bytes(b"one")
    before = base.sha256(path, weights)
    weights.write_bytes(b"two")
    assert base.sha256(path, weights) != before


def test_onnx_weights_carry_the_names_of_their_layers(tmp_path):
    import onnx

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.second = nn.Linear(6, 4)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    onnx_export.write(Tokens().eval(), (torch.rand(2, 3, 4),), tmp_path / "m.onnx")
    names = {i.name for i in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert {"first.weight", "second.weight"} <= names


def test_an_int8_model_is_kept_as_torchscript_with_its_engine(model, tmp_path):
    made = quantize.static_int8(model, EXAMPLE, [EXAMPLE])
    path, kind, _ = torch_build.write(made, EXAMPLE, tmp_path)
    assert kind == "torchscript"
    with zipfile.ZipFile(path) as archive:
        engine = next(n for n in archive.namelist() if n.endswith("extra/quantized_engine"))
        assert archive.read(engine).decode() == quantize.engine_of(made)
    assert base.max_relative_error(outputs_of(made, EXAMPLE), files.load(path, runtime="torch")(*EXAMPLE)) == 0


def test_a_model_that_cannot_be_exported_is_scripted_and_it_is_said(tmp_path):
    model = Counting().eval()
    path, kind, note = torch_build.write(model, (torch.ones(2, 4),), tmp_path)
    assert kind == "torchscript"
    assert "torch.export cannot take this model" in note
    inputs = (torch.full((2, 4), 9.0),)
    assert torch.allclose(files.load(path, runtime="torch")(*inputs), outputs_of(model, inputs))


def test_a_model_that_cannot_be_exported_has_no_onnx_and_the_reason_is_given(tmp_path):
    with pytest.raises(Unsupported, match=r"cannot export this model.*Use the torch runtime"):
        onnx_export.write(Counting().eval(), (torch.ones(2, 4),), tmp_path / "m.onnx")


def test_several_inputs_and_a_dict_of_outputs_survive_the_round_trip(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, a, b):
            return {"sum": self.fc(a + b), "parts": (a, b)}

    model, inputs = Two().eval(), (torch.rand(3, 4), torch.rand(3, 4))
    like = outputs_of(model, inputs)
    onnx_export.write(model, inputs, tmp_path / "m.onnx")
    path, _, _ = torch_build.write(model, inputs, tmp_path)
    for found in (
        files.load(path, runtime="torch", like=like)(*inputs),
        files.load(tmp_path / "m.onnx", runtime="onnxruntime", like=like)(*inputs),
    ):
        assert found.keys() == like.keys()
        assert base.max_relative_error(like, found) < 1e-5


def test_deviation_refuses_other_shapes_and_values_that_are_not_finite():
    with pytest.raises(ModelFileError, match=r"shapes"):
        base.max_relative_error(torch.ones(2), torch.ones(3))
    with pytest.raises(ModelFileError, match=r"finite"):
        base.max_relative_error(torch.ones(2), torch.tensor([1.0, float("nan")]))
    assert base.max_relative_error(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0])) == 0.5


def test_only_weights_that_onnx_runtime_multiplies_as_integers_count(model, tmp_path):
    onnx_export.write(model, EXAMPLE, tmp_path / "float.onnx")
    ort_quantize.write(tmp_path / "float.onnx", tmp_path / "int8.onnx", precision="static-int8", calibration=[EXAMPLE])
    assert ort_profile.int8_weights(tmp_path / "float.onnx") == frozenset()
    assert {n.partition(".")[0] for n in ort_profile.int8_weights(tmp_path / "int8.onnx")} == {
        "conv1",
        "conv2",
        "head",
    }
    assert not (tmp_path / "int8.prepared.onnx").exists()


def test_a_pt2_file_does_not_hold_the_example_nor_what_it_is_a_view_of(model, tmp_path):
    few = torch.rand(5000, 1, 8, 8)[:4]
    path, _ = torch_build.write_program(model, (few,), tmp_path)
    assert path.stat().st_size < few.untyped_storage().nbytes() / 4
    with zipfile.ZipFile(path) as archive:
        pickled = [n for n in archive.namelist() if archive.read(n)[:1] in (b"\x80", b"P") and "model.pt" in n]
    assert pickled == []


def test_the_matrices_of_a_recurrent_layer_are_found_by_its_name_once_they_are_integers(tmp_path):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 16, num_layers=2, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0][:, -1]

    x = torch.randn(2, 5, 8)
    onnx_export.write(Reader().eval(), (x,), tmp_path / "float.onnx")
    ort_quantize.write(tmp_path / "float.onnx", tmp_path / "int8.onnx", precision="dynamic-int8")
    found = ort_profile.int8_weights(tmp_path / "int8.onnx")
    assert len(found) == 4
    assert all(name.startswith(("lstm.weight_ih", "lstm.weight_hh")) for name in found)


def test_a_file_says_nothing_of_the_disk_that_it_was_made_on(model, tmp_path):
    torch_build.write_program(model, EXAMPLE, tmp_path)
    onnx_export.write(model, EXAMPLE, tmp_path / "model.onnx")
    torch_build.write(quantize.static_int8(model, EXAMPLE, [EXAMPLE], engine="onednn"), EXAMPLE, tmp_path)
    held = {"model.onnx": (tmp_path / "model.onnx").read_bytes()}
    for name in ("model.pt2", "model.torchscript.pt"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            held[name] = b"".join(archive.read(entry) for entry in archive.namelist())
    for content in held.values():
        assert b"conv1" in content
        assert b"tiny.py" not in content
        assert b"site-packages" not in content
