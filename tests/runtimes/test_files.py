"""Files brought to run: every runtime gives the model's outputs, copies are copies, and what is damaged says so."""

import pytest
import torch
from tiny import Corner
from torch import nn

from shrinkkit.errors import ModelFileError, Unsupported
from shrinkkit.runtimes import base, files, registry
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.openvino.spec import PRECISION
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.tasks import outputs

EXAMPLE = (torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)
RUNTIMES = {"torch": "model.torchscript.pt", "onnxruntime": "model.onnx", "openvino": "model.onnx"}


class Named(nn.Module):
    """Two inputs, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, left, right):
        return {"sum": self.fc(left + right), "pair": (left * 2, right)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Corner().eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch_build.write(model, EXAMPLE, folder)
    torch_build.write_program(model, EXAMPLE, folder)
    onnx_export.write(model, EXAMPLE, folder / "model.onnx")
    return folder


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_runtime_gives_the_outputs_of_the_model_at_any_batch(model, folder, runtime, batch):
    x = torch.rand(batch, 1, 8, 8)
    found = files.load(folder / RUNTIMES[runtime], runtime=runtime)(x)
    assert torch.allclose(found, model(x), atol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_copy_gives_the_same_and_shares_nothing_that_a_call_writes(folder, runtime):
    first = files.load(folder / RUNTIMES[runtime], runtime=runtime)
    second = first.clone()
    kept = first.bind(EXAMPLE)
    before = [t.clone() for t in outputs.tensors(first.to_cpu(kept()))]
    second(torch.zeros(4, 1, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, outputs.tensors(first.to_cpu(kept())), strict=True))
    assert second.source is not first.source


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_outputs_that_were_fetched_are_not_overwritten_by_the_next_call(folder, runtime):
    loaded = files.load(folder / RUNTIMES[runtime], runtime=runtime)
    first = loaded(*EXAMPLE)
    kept = first.clone()
    loaded(torch.ones(4, 1, 8, 8))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_inputs_need_not_be_contiguous(model, folder, runtime):
    x = torch.rand(4, 8, 8, 1).permute(0, 3, 2, 1)
    found = files.load(folder / RUNTIMES[runtime], runtime=runtime)(x)
    assert torch.allclose(found, model(x), atol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_several_inputs_and_nested_outputs_come_back_as_they_went(tmp_path, runtime):
    torch.manual_seed(0)
    model, example = Named().eval(), (torch.rand(2, 3), torch.rand(2, 3))
    torch_build.write(model, example, tmp_path)
    onnx_export.write(model, example, tmp_path / "model.onnx")
    like = model(*example)
    found = files.load(tmp_path / RUNTIMES[runtime], runtime=runtime, like=like)(*example)
    assert list(found) == ["sum", "pair"]
    assert type(found["pair"]) is tuple
    assert base.max_relative_error(like, found) < 1e-4


def test_inductor_compiles_an_exported_program_and_takes_other_batches(model, folder):
    loaded = files.load(folder / "model.pt2", runtime="inductor")
    for batch in (4, 3):
        x = torch.rand(batch, 1, 8, 8)
        assert torch.allclose(loaded(x), model(x), atol=1e-4)


def test_inductor_takes_no_torchscript(tmp_path):
    path = tmp_path / "model.torchscript.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    torch_build._make_reproducible(path)
    with pytest.raises(Unsupported, match="Use the torch runtime"):
        files.load(path, runtime="inductor")


@pytest.mark.parametrize("name", ["model.pt2", "model.torchscript.pt", "model.onnx", "model.xml"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a model")
    runtime = {".onnx": "onnxruntime", ".xml": "openvino"}.get(name[name.rindex(".") :], "torch")
    with pytest.raises(ModelFileError, match=name):
        files.load(tmp_path / name, runtime=runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_truncated_file_is_refused(folder, tmp_path, runtime):
    path = tmp_path / RUNTIMES[runtime]
    path.write_bytes((folder / path.name).read_bytes()[:-200])
    with pytest.raises(ModelFileError, match=path.name):
        files.load(path, runtime=runtime)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match=r"there is none"):
        files.load(tmp_path / "model.pt2", runtime="torch")


def test_openvino_computes_in_float32_unless_the_file_says_otherwise(folder, tmp_path):
    import openvino

    settings = registry.get("openvino").settings
    model = openvino.Core().read_model(folder / "model.onnx")
    assert settings(folder / "model.onnx", threads=1)["INFERENCE_PRECISION_HINT"] == "f32"
    model.set_rt_info("bf16", PRECISION)
    openvino.save_model(model, tmp_path / "model.xml")
    assert settings(tmp_path / "model.xml", threads=1)["INFERENCE_PRECISION_HINT"] == "bf16"


def test_outputs_of_a_class_that_nobody_else_knows_come_back_as_it_and_are_plain_in_the_file(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=11, max_position_embeddings=8, **sizes)).eval()
    example = (torch.randint(0, 11, (3, 6)), torch.ones(3, 6, dtype=torch.int64))
    path, format, _ = torch_build.write(model, example, tmp_path)
    assert format == "torchscript"
    with torch.inference_mode():
        like = model(*example)
    assert type(files.load(path, runtime="torch")(*example)) is tuple
    program, _ = torch_build.write_program(model, example, tmp_path)
    assert type(files.load(program, runtime="torch")(*example)) is dict
    found = files.load(path, runtime="torch", like=like)(*example)
    assert type(found) is type(like)
    assert torch.allclose(found.pooler_output, like.pooler_output, atol=1e-5)
