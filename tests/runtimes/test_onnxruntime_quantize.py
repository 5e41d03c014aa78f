import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from shrinkkit import quiet
from shrinkkit.errors import Unsupported
from shrinkkit.runtimes import files
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.onnxruntime import profile
from shrinkkit.runtimes.onnxruntime import quantize as ort_quantize

METHODS = ("dynamic-int8", "static-int8")


class Reader(nn.Module):
    """Recurrent and wide layers, whose weights are large."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(64, 64, batch_first=True)
        self.wide = nn.Linear(64, 600)
        self.narrow = nn.Linear(600, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        rows = self.narrow(torch.relu(self.wide(self.lstm(x)[0])))
        return self.head(rows[:, -1])


ROWS = (torch.rand(2, 5, 64, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    onnx_export.write(Reader().eval(), ROWS, path)
    return path


def contents(path):
    graph = onnx.load(path).graph
    nodes = [(n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in graph.node]
    return nodes, {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


class Feed(CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x": ROWS[0].numpy()}])

    def get_next(self):
        return next(self.batches, None)


@pytest.mark.parametrize("method", METHODS)
def test_the_file_is_what_onnx_runtime_s_own_functions_make_of_the_whole_model(source, tmp_path, method):
    ours, theirs, prepared = (tmp_path / f"{name}.onnx" for name in ("ours", "theirs", "prepared"))
    ort_quantize.write(source, ours, precision=method, calibration=[ROWS])
    with quiet.libraries():
        quant_pre_process(str(source), str(prepared))
        if method == "dynamic-int8":
            operators = ["MatMul", "Gemm", "LSTM"]
            quantize_dynamic(str(prepared), str(theirs), op_types_to_quantize=operators, per_channel=True)
        else:
            quantize_static(
                str(prepared),
                str(theirs),
                Feed(),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                op_types_to_quantize=ort_quantize._static_operators(),
            )
    (nodes, found), (expected_nodes, expected) = contents(ours), contents(theirs)
    assert nodes == expected_nodes
    assert found.keys() == expected.keys()
    assert sum(array.dtype == np.int8 and array.size > 1000 for array in found.values()) >= 2
    assert all(np.allclose(found[name], expected[name], rtol=1e-5, atol=0) for name in found)
    assert [path.name for path in tmp_path.iterdir() if path not in (ours, theirs, prepared)] == []


class Tied(nn.Module):
    """A language model's head and embedding share their weight; outputs have unit norm, as embeddings do."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(1000, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 1000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        scores = self.head(self.hidden(self.embed(x)))
        return scores / scores.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("form", ort_quantize.FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("method", METHODS)
def test_a_tied_table_is_stored_once_in_int8_and_looked_up_row_by_row(tmp_path, method, form):
    torch.manual_seed(0)
    model, tokens = Tied().eval(), (torch.arange(10).reshape(2, 5),)
    model.embed.weight.data *= torch.logspace(-2, 2, 1000)[:, None]
    onnx_export.write(model, tokens, tmp_path / "float.onnx")
    path = tmp_path / "int8.onnx"
    ort_quantize.write(tmp_path / "float.onnx", path, precision=method, calibration=[tokens], form=form)
    assert path.stat().st_size < 0.35 * (tmp_path / "float.onnx").stat().st_size
    with torch.inference_mode():
        expected = model(*tokens)
    found = files.load(path, runtime="onnxruntime")(*tokens)
    # A scale for the whole table would lose its small rows.
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
    weights = profile.int8_weights(path)
    assert {name.partition(".")[0] for name in weights} == {"hidden", "head"}


def test_a_table_to_skip_stays_in_float(tmp_path):
    model, tokens = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64)).eval(), (torch.arange(10).reshape(2, 5),)
    onnx_export.write(model, tokens, tmp_path / "float.onnx")
    ort_quantize.write(tmp_path / "float.onnx", tmp_path / "int8.onnx", precision="dynamic-int8", skip=["0"])
    stored = contents(tmp_path / "int8.onnx")[1]
    assert stored["0.weight"].dtype == np.float32
    assert stored["1.weight_quantized"].dtype == np.int8


def test_a_layer_to_skip_keeps_its_weights_in_float(source, tmp_path):
    ort_quantize.write(source, tmp_path / "int8.onnx", precision="dynamic-int8", skip=["wide"])
    stored = contents(tmp_path / "int8.onnx")[1]
    kinds = {name.partition(".")[0]: array.dtype for name, array in stored.items() if array.size > 30_000}
    assert kinds["wide"] == np.float32
    assert kinds["narrow"] == np.int8


def test_products_of_two_activations_stay_in_float_because_integers_slow_them_down(tmp_path):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)

    x = (torch.randn(2, 5, 8),)
    onnx_export.write(Attending().eval(), x, tmp_path / "float.onnx")
    ort_quantize.write(tmp_path / "float.onnx", tmp_path / "int8.onnx", precision="static-int8", calibration=[x])
    nodes = onnx.load(str(tmp_path / "int8.onnx")).graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    products = [node for node in nodes if node.op_type == "MatMul"]
    integer = [[made_by.get(name) == "DequantizeLinear" for name in node.input] for node in products]
    assert integer.count([True, True]) == 2
    assert len(products) == 3


def test_what_the_quantizer_rejects_is_refused_with_its_reason(source, tmp_path):
    with pytest.raises(Unsupported, match=r"rejects this model for static-int8: "):
        ort_quantize.write(source, tmp_path / "int8.onnx", precision="static-int8", calibration=[])
    assert list(tmp_path.iterdir()) == []
