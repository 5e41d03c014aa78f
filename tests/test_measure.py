import math

import pytest
import torch
from tiny import task as tiny_task
from torch import nn

from shrinkkit import measure
from shrinkkit.errors import InvalidTask


def test_parameters_counts_tied_ones_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    assert measure.parameters(model) == 9


def test_macs_of_a_convolution_are_those_of_one_example():
    model = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    assert measure.macs(model, (torch.zeros(5, 2, 8, 8),)) == 4 * 2 * 9 * 64


def test_macs_of_an_lstm_are_those_of_its_matrices():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True, bias=False)

        def forward(self, x):
            return self.lstm(x)[0]

    assert measure.macs(Last().eval(), (torch.zeros(2, 7, 6),)) == 7 * 4 * 8 * (6 + 8)


def test_layer_macs_add_up_and_name_the_layers():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
    assert measure.layer_macs(model, (torch.zeros(3, 4),)) == {"0": 32, "1.1": 16}


def test_macs_counts_attention_of_torch():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    projections, products = 5 * 8 * 8 * 4, 2 * 5 * 5 * 8
    assert measure.macs(Self(), (torch.zeros(1, 5, 8),)) == projections + products


def test_scores_judge_every_example_in_order_whatever_the_batch():
    task = tiny_task()
    scores, answers = measure.scores(task.model, task, task.test)
    images, labels = task.test.tensors
    with torch.inference_mode():
        expected = task.model(images)
    assert list(scores) == (expected.argmax(1) == labels).double().tolist()
    assert torch.allclose(answers, expected, atol=1e-4)


def test_scores_that_are_not_finite_are_refused_with_the_batch():
    task = tiny_task()
    broken = type(task)(**{**vars(task), "score": lambda output, target: torch.full((len(target),), math.nan)})
    with pytest.raises(InvalidTask, match=r"one finite number per example; for batch 0"):
        measure.scores(broken.model, broken, broken.test)


def test_accuracy_pairs_the_variant_with_the_baseline():
    task = tiny_task()
    baseline = measure.scores(task.model, task, task.test)
    constant = ((1.0,) + (0.0,) * 41, torch.zeros(42, 4))
    found = measure.accuracy(task, constant, baseline)
    assert found.mean.value == pytest.approx(1 / 42)
    assert found.difference is not None
    assert found.difference.value == pytest.approx(found.mean.value - sum(baseline[0]) / 42)
    assert measure.accuracy(task, baseline, None).difference is None
    assert measure.accuracy(task, baseline, None).agreement == 1.0
