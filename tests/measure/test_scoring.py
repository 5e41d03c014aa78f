import base64
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny import task as tiny_task
from torch import nn
from torch.utils.data import TensorDataset

from shrinkkit.errors import InvalidInput, InvalidTask
from shrinkkit.measure import scoring
from shrinkkit.measure.scoring import MOST_REGRESSIONS
from shrinkkit.tasks import modules
from shrinkkit.tasks.task import SPLITS, Task

NAMES = ("ant", "bee", "cat", "dog")


def right(output, target):
    return (output.argmax(1) == target).float()


def nearness(output, target):
    return -(output.squeeze(1) - target).abs()


def read_off(inputs, targets, *, names=NAMES, score=right):
    """Return a task whose model reads its answer off the input, so that a test says what every model answers."""

    def split():
        return TensorDataset(inputs.clone(), targets.clone())

    splits = [split() for _ in range(4)]
    loss = nn.functional.cross_entropy
    data = dict(zip(SPLITS, splits, strict=True))
    return Task(nn.Identity(), inputs[:4].clone(), "read-off", **data, score=score, loss=loss, class_names=names)


def logits(answers, *, sure=5.0, classes=4):
    return sure * nn.functional.one_hot(torch.as_tensor(answers), classes).float()


def judged(task, variant, baseline=None):
    """Return the accuracy of a model on the test split, paired with the task's own or with `baseline`."""
    expected = scoring.scores(baseline or task.model, task, task.test)
    return scoring.accuracy(task, scoring.scores(variant, task, task.test), expected)


def answering(task, changed):
    """Return a model that answers as the inputs say, but for the examples `changed`: index -> class."""
    rows = task.test.tensors[0].clone()
    for index, answer in changed.items():
        rows[index] = logits([answer])[0]
    return in_turn(rows)


def in_turn(rows):
    """Return a model that gives the next four of `rows` whatever it is called with."""
    given = iter(rows.split(4))
    return lambda x: next(given)


@pytest.fixture(scope="module")
def corner():
    return tiny_task()


def test_parameters_counts_tied_ones_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    assert modules.parameters(model) == 9


def test_macs_of_a_convolution_are_those_of_one_example():
    model = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    assert modules.macs(model, (torch.zeros(5, 2, 8, 8),)) == 4 * 2 * 9 * 64


def test_macs_of_an_lstm_are_those_of_its_matrices():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True, bias=False)

        def forward(self, x):
            return self.lstm(x)[0]

    assert modules.macs(Last().eval(), (torch.zeros(2, 7, 6),)) == 7 * 4 * 8 * (6 + 8)


def test_layer_macs_add_up_and_name_the_layers():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
    assert modules.layer_macs(model, (torch.zeros(3, 4),)) == {"0": 32, "1.1": 16}


def test_macs_counts_attention_of_torch():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    projections, products = 5 * 8 * 8 * 4, 2 * 5 * 5 * 8
    assert modules.macs(Self(), (torch.zeros(1, 5, 8),)) == projections + products


def test_scores_judge_every_example_in_order_whatever_the_batch(corner):
    found = scoring.scores(corner.model, corner, corner.test)
    images, labels = corner.test.tensors
    with torch.inference_mode():
        expected = corner.model(images)
    assert list(found.scores) == (expected.argmax(1) == labels).double().tolist()
    assert torch.allclose(found.outputs, expected, atol=1e-4)
    assert list(found.predictions) == expected.argmax(1).tolist()
    assert list(found.labels) == labels.tolist()
    assert found.span.shape == (2, 1)


def test_scores_that_are_not_finite_are_refused_with_the_batch(corner):
    broken = type(corner)(**{**vars(corner), "score": lambda output, target: torch.full((len(target),), math.nan)})
    with pytest.raises(InvalidTask, match=r"one finite number per example; for batch 0 of `test`"):
        scoring.scores(broken.model, broken, broken.test)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_refused_with_the_batch_even_if_the_score_is_finite(value):
    task = read_off(logits([0, 1, 2, 3] * 4), torch.tensor([0, 1, 2, 3] * 4))
    rows = task.test.tensors[0].clone()
    rows[9, 2] = value
    with pytest.raises(InvalidTask, match=r"for batch 2 of `test` 1 of 16 values are not"):
        scoring.scores(in_turn(rows), task, task.test)


def test_a_second_output_that_is_not_finite_is_refused_too():
    task = read_off(logits([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3]), score=lambda output, y: right(output[0], y))
    with pytest.raises(InvalidTask, match="outputs must be finite"):
        scoring.scores(lambda x: (x, torch.full_like(x, math.nan)), task, task.test)


def test_an_empty_split_is_refused_by_its_name():
    task = read_off(logits([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3]))
    empty = dataclasses.replace(task, validation=TensorDataset(torch.zeros(0, 4), torch.zeros(0).long()))
    with pytest.raises(InvalidTask, match="`validation` must hold at least one example"):
        scoring.scores(empty.model, empty, empty.validation)


def test_accuracy_pairs_the_variant_with_the_baseline(corner):
    baseline = scoring.scores(corner.model, corner, corner.test)
    constant = dataclasses.replace(baseline, sample=(1.0,) + (0.0,) * 41, outputs=torch.zeros(42, 4))
    found = scoring.accuracy(corner, constant, baseline)
    assert found.mean.value == pytest.approx(1 / 42)
    assert found.difference.value == pytest.approx(found.mean.value - sum(baseline.scores) / 42)
    assert found.cosine == 0


def test_the_baseline_agrees_with_itself_and_has_lost_nothing(corner):
    found = scoring.accuracy(corner, scoring.scores(corner.model, corner, corner.test), None)
    assert (found.agreement, found.divergence, found.difference) == (1.0, 0.0, None)
    assert found.cosine == pytest.approx(1)
    assert (found.worst_regressions, found.regressions, found.improvements) == ((), 0, 0)
    assert [row.name for row in found.classes] == list(corner.class_names)
    assert sum(row.examples for row in found.classes) == 42
    assert all(row.difference is None for row in found.classes)


def test_a_class_that_is_broken_is_found_in_that_class_only():
    targets = torch.arange(160) % 4
    inputs = logits(targets)
    inputs[[0, 4]] = logits([1, 1])
    task = read_off(inputs, targets)
    found = judged(task, lambda x: torch.where((x.argmax(1) == 2)[:, None], logits([3]), x))
    changed = {row.name: row.difference for row in found.classes if row.difference.high < 0}
    assert set(changed) == {"cat"}
    assert changed["cat"].value == -1
    assert [row.difference.value for row in found.classes if row.name != "cat"] == [0, 0, 0]
    assert {(one.label, one.before, one.after) for one in found.worst_regressions} == {("cat", "cat", "dog")}


def test_examples_that_are_flipped_are_listed_and_no_others():
    targets = torch.arange(40) % 4
    inputs = logits(targets)
    inputs[[5, 6]] = logits([0, 0])
    task = read_off(inputs, targets)
    found = judged(task, answering(task, {3: 0, 17: 2, 30: 1, 5: 1, 6: 3}))
    assert [(one.index, one.label, one.before, one.after) for one in found.worst_regressions] == [
        (3, "dog", "dog", "ant"),
        (17, "bee", "bee", "cat"),
        (30, "cat", "cat", "bee"),
    ]
    assert {(one.score_before, one.score_after) for one in found.worst_regressions} == {(1.0, 0.0)}
    # Example 6 was wrong and is wrong in another way: neither lost nor gained, but no longer the same answer.
    assert (found.regressions, found.improvements) == (3, 1)
    assert found.agreement == 35 / 40


def test_outputs_of_twice_the_size_agree_but_are_another_distribution():
    targets = torch.arange(12) % 4
    found = judged(read_off(logits(targets), targets), lambda x: 2 * x)
    assert found.agreement == 1
    assert found.cosine == pytest.approx(1)
    assert found.divergence > 0.01


def test_the_divergence_of_two_logits_is_that_of_their_probabilities():
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.6, 0.4]])
    expected = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    assert scoring.divergence(p.log() + 7, q.log() - 3) == pytest.approx(expected, rel=1e-5)
    assert scoring.divergence(p.log(), q.log()) == pytest.approx(expected, rel=1e-5)
    assert scoring.divergence(p, q) == pytest.approx(expected, rel=1e-5)


def test_a_probability_rounded_to_nothing_gives_a_finite_divergence():
    found = scoring.divergence(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    assert found == pytest.approx(math.log(0.5) - 0.5 * math.log(2.0**-24), rel=1e-4)
    assert scoring.divergence(torch.tensor([[0.5, 0.5]]), torch.zeros(1, 2)) == pytest.approx(0)


def test_zeros_agree_with_zeros_and_with_nothing_else():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert scoring.cosine(rows[:1], rows[:1]) == 1
    assert scoring.cosine(rows[:1], rows[1:]) == 0
    assert scoring.cosine(rows, rows.flip(0)) == 0
    assert scoring.cosine(rows, -rows) == pytest.approx(0)


@pytest.mark.parametrize("size", [1e-300, 1e-20, 1e300])
def test_the_cosine_is_that_of_directions_at_any_size(size):
    row = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert scoring.cosine(row, size * row) == pytest.approx(1)
    assert scoring.cosine(row, size * row.flip(1)) == pytest.approx(24 / 25)


def test_the_cosine_of_single_values_is_that_of_all_of_them_and_not_of_their_signs():
    before, after = torch.tensor([[0.01], [3.0], [-4.0]]), torch.tensor([[-0.01], [3.0], [-4.0]])
    assert scoring.cosine(before, after) > 0.9999
    assert scoring.cosine(before, torch.tensor([[0.0], [4.0], [-3.0]])) == pytest.approx(24 / 25, abs=1e-4)


def test_cosine_and_divergence_are_means_over_examples_however_many(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(10, 3, generator=generator) for _ in range(2))
    whole = scoring.cosine(before, after), scoring.divergence(before, after)
    monkeypatch.setattr(scoring, "_ROWS", 4)
    assert (scoring.cosine(before, after), scoring.divergence(before, after)) == pytest.approx(whole)
    alone = [scoring.cosine(before[i : i + 1], after[i : i + 1]) for i in range(10)]
    assert whole[0] == pytest.approx(sum(alone) / 10)


ROWS = arrays.arrays("float32", (5, 3), elements=st.floats(-(2.0**127), 2.0**127, width=32))


@settings(max_examples=50, deadline=None)
@given(ROWS, ROWS)
def test_whatever_two_models_answer_the_record_is_finite_and_in_range(first, second):
    targets = torch.tensor([0, 1, 2, 0, 1])
    task = read_off(torch.from_numpy(first), targets, names=NAMES[:3])
    before = scoring.scores(task.model, task, task.test)
    other = dataclasses.replace(
        before,
        outputs=torch.from_numpy(second),
        predictions=tuple(second.argmax(1).tolist()),
        sample=tuple(right(torch.from_numpy(second), targets).tolist()),
    )
    found, swapped = scoring.accuracy(task, other, before), scoring.accuracy(task, before, other)
    assert 0 <= found.agreement <= 1
    assert -1 <= found.cosine <= 1
    assert found.divergence >= 0
    assert (found.agreement, found.cosine) == pytest.approx((swapped.agreement, swapped.cosine))
    assert (found.regressions, found.improvements) == (swapped.improvements, swapped.regressions)
    assert found.difference.value == pytest.approx((found.improvements - found.regressions) / 5)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


@settings(max_examples=50, deadline=None)
@given(arrays.arrays("float64", (4, 3), elements=st.floats(-1.7e308, 1.7e308)))
def test_double_precision_leaves_nothing_infinite(rows):
    before = torch.from_numpy(rows)
    assert -1 <= scoring.cosine(before, before.flip(0)) <= 1
    assert 0 <= scoring.divergence(before, before.flip(0)) < math.inf


CLASSES = torch.tensor([0, 1, 2, 3])
SEVERAL = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
PIXELS = torch.zeros(4, 5, 5).long()


@pytest.mark.parametrize(
    ("inputs", "targets", "names", "score"),
    [
        (logits(CLASSES), CLASSES, (), right),
        (torch.zeros(4, 1), torch.zeros(4), (), nearness),
        (torch.randn(4, 4, 5, 5), PIXELS, NAMES, lambda o, y: (o.argmax(1) == y).float().mean((1, 2))),
        (torch.randn(4, 4, 5), CLASSES, NAMES, lambda o, y: right(o.mean(2), y)),
        (logits(CLASSES), SEVERAL, NAMES, lambda o, y: ((o > 0) == (y > 0)).float().mean(1)),
        (logits(CLASSES).long(), CLASSES.float(), NAMES, right),
        (torch.zeros(4, 1), torch.zeros(4), ("only",), nearness),
    ],
    ids=["no names", "regression", "segmentation", "sequence", "several labels", "integers", "one name"],
)
def test_answers_that_are_no_classes_are_not_guessed_at(inputs, targets, names, score):
    task = read_off(inputs, targets, names=names, score=score)
    found = judged(task, lambda x: x)
    assert (found.agreement, found.divergence, found.classes) == (None, None, ())
    assert found.cosine == pytest.approx(1)


def test_one_output_for_two_names_gives_scores_by_class_and_no_agreement():
    targets = torch.tensor([0, 1, 1, 0])
    task = read_off(torch.tensor([[-1.0], [1], [1], [-1]]), targets, names=("no", "yes"), score=signed)
    found = judged(task, lambda x: -x)
    assert (found.agreement, found.divergence) == (None, None)
    assert [(row.name, row.difference.value) for row in found.classes] == [("no", -1), ("yes", -1)]
    assert [(one.label, one.before, one.after) for one in found.worst_regressions[:2]] == [
        ("no", "", ""),
        ("yes", "", ""),
    ]


def signed(output, target):
    return ((output.squeeze(1) > 0) == (target == 1)).float()


def test_an_example_whose_target_is_no_class_counts_in_none():
    targets = torch.tensor([0, 1, -100, 7])
    found = judged(read_off(logits([0, 1, 2, 3]), targets), lambda x: x)
    assert [(row.name, row.examples) for row in found.classes] == [("ant", 1), ("bee", 1)]


def test_the_worst_come_first_and_equal_ones_in_order_and_no_more_than_fit():
    count = MOST_REGRESSIONS + 8
    task = read_off(torch.zeros(count, 1), torch.zeros(count), names=(), score=nearness)
    falls = torch.tensor([1.0] * count)
    falls[[4, 9]] = torch.tensor([2.0, 3.0])
    found = judged(task, in_turn(falls[:, None]))
    assert [one.index for one in found.worst_regressions] == [9, 4, 0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
    assert (found.regressions, found.improvements) == (count, 0)
    assert (
        found.worst_regressions[0].score_before,
        found.worst_regressions[0].score_after,
        found.worst_regressions[0].label,
    ) == (0, -3, "")


def test_scores_that_differ_by_rounding_are_neither_lost_nor_gained():
    targets = torch.linspace(1, 2, 8)
    task = read_off(torch.zeros(8, 1), targets, names=(), score=nearness)
    for shift, lost, gained in ((-1e-6, 0, 0), (1e-6, 0, 0), (-1e-3, 8, 0), (1e-3, 0, 8)):
        found = judged(task, lambda x, shift=shift: x + shift)
        assert found.difference.value != 0
        assert (found.regressions, found.improvements) == (lost, gained)


def test_what_was_wrong_and_stays_wrong_is_not_lost():
    task = read_off(logits([0, 1, 2, 3]), torch.tensor([1, 2, 3, 0]))
    found = judged(task, lambda x: x.roll(2, 1))
    assert (found.agreement, found.regressions, found.improvements) == (0, 0, 0)


def test_lost_images_come_as_pictures_and_other_inputs_without(corner):
    found = judged(corner, lambda x: -corner.model(x))
    assert found.regressions >= len(found.worst_regressions) == MOST_REGRESSIONS
    assert all(base64.b64decode(one.png).startswith(b"\x89PNG") for one in found.worst_regressions)
    targets = torch.arange(4)
    assert {one.png for one in judged(read_off(logits(targets), targets), lambda x: -x).worst_regressions} == {""}


def test_models_are_only_compared_on_the_same_examples(corner):
    test, validation = (scoring.scores(corner.model, corner, split) for split in (corner.test, corner.validation))
    with pytest.raises(InvalidInput, match="outputs of one shape"):
        scoring.accuracy(corner, test, validation)
    with pytest.raises(InvalidInput, match="outputs of one shape"):
        scoring.accuracy(corner, dataclasses.replace(test, outputs=test.outputs[:, :2]), test)
