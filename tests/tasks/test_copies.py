import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from shrinkkit.measure import peak_memory
from shrinkkit.measure.peak_memory import STATUS
from shrinkkit.tasks import copies

linux = pytest.mark.skipif(not STATUS.exists(), reason="memory is counted by Linux's /proc")


class Several(nn.Module):
    """Recurrent layers, tied weights, vectors and a buffer that the model writes to."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 16)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.head(self.norm(self.lstm(self.embed(x))[0][:, -1]))


def several():
    torch.manual_seed(0)
    return Several().eval()


TOKENS = torch.arange(12).reshape(3, 4)


def test_a_shallow_copy_holds_the_matrices_of_the_model_and_computes_the_same():
    model = several()
    copied = copies.shallow_copy(model)
    shared = {n for n, p in copied.named_parameters(remove_duplicate=False) if p is model.get_parameter(n)}
    assert shared == {"embed.weight", "head.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    with torch.inference_mode():
        assert torch.equal(copied(TOKENS), model(TOKENS))


def test_running_or_rebuilding_the_copy_leaves_the_model_as_it_was():
    model = several()
    copied = copies.shallow_copy(model)
    with torch.inference_mode():
        copied(TOKENS)
        copied.head.bias += 1
    copied.head = nn.Identity()
    copied.train()
    assert model.calls == 0
    assert isinstance(model.head, nn.Linear)
    assert not model.training
    assert torch.equal(model.head.bias, several().head.bias)


def test_converted_parameters_are_copied_and_stay_tied():
    model = several()
    copied = copies.shallow_copy(model, dtype=torch.float64)
    assert {p.dtype for p in copied.parameters()} == {torch.float64}
    assert copied.norm.running_mean.dtype == torch.float64
    assert copied.norm.num_batches_tracked.dtype == torch.int64
    assert copied.head.weight is copied.embed.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_copy_that_owns_its_parameters_can_be_written_to():
    model = several()
    before = copy.deepcopy(model.state_dict())
    copied = copies.shallow_copy(model)
    copies.unshare(copied, model)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    assert copied.head.weight is copied.embed.weight
    with torch.inference_mode():
        expected = model(TOKENS)
        assert torch.equal(copied(TOKENS), expected)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(model(TOKENS), expected)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items() if name != "calls")


@linux
def test_memory_of_objects_that_only_refer_to_each_other_is_given_back():
    circle = [torch.ones(16 << 20)]
    circle.append(circle)
    held = peak_memory._status("VmRSS")
    del circle
    copies.trim_heap()
    assert held - peak_memory._status("VmRSS") > 60e6


@linux
def test_a_freed_block_is_given_back_although_a_later_one_is_in_use():
    # Once it has freed one of 24 MB, glibc keeps those of 4 MB for later, unless it is told not to. In a process of its
    # own, because memory that other tests left free would be used first.
    script = """
import torch
from shrinkkit.tasks import copies
from shrinkkit.measure import peak_memory as memory
torch.ones(6 << 20)
with copies.freeing_large_blocks():
    blocks = [torch.ones(1 << 20) for _ in range(16)]
    held = memory._status("VmRSS")
    del blocks[:-1]
    print(held - memory._status("VmRSS"))
"""
    freed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(freed) > 55e6
