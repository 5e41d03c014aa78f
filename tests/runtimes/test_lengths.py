"""Models whose inputs vary in length."""

import pytest
import torch
from small import padded
from torch import nn

from shrinkkit.errors import Unsupported
from shrinkkit.runtimes import files
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import variants


class Encoder(nn.Module):
    """An encoder with attention that leaves padding out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, ids, mask):
        kept = self.layer(self.table(ids), src_key_padding_mask=mask == 0) * mask[..., None]
        return self.head(kept.sum(1) / mask.sum(1, keepdim=True))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    texts = [torch.randint(1, 60, (length,)) for length in torch.randint(5, 20, (60,)).tolist()]
    return Task(Encoder().eval(), padded(texts[:4]), "lengths", inputs=texts, collate=padded)


@pytest.mark.parametrize(("precision", "least"), [("float32", 0.99999), ("dynamic-int8", 0.995), ("static-int8", 0.95)])
def test_files_take_inputs_of_every_length(tmp_path, task, precision, least):
    runtimes = ("torch", "onnxruntime", "openvino")
    record = variants.write(tmp_path / "it", task, task.model, runtimes=runtimes, precision=precision)
    assert not record.refusals
    for file in record.files:
        loaded = files.load(tmp_path / "it" / file.path, runtime=file.runtime, like=task.model(*task.example))
        for batch, length in ((4, 7), (4, 19), (2, 12)):
            inputs = padded([torch.randint(1, 60, (length - i,)) for i in range(batch)])
            expected, output = task.model(*inputs.values()), loaded(*inputs.values())
            assert torch.cosine_similarity(expected, output).mean() > least, (file.runtime, length)


def test_inductor_says_that_it_compiles_for_each_length(tmp_path, task):
    with pytest.raises(Unsupported, match="compiles for each length"):
        variants.write(tmp_path / "it", task, task.model, runtimes=("inductor",))
