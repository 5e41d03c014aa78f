"""Metrics of a whole set, metrics where lower is better, and objects with `update` and `compute`."""

import dataclasses
import math

import pytest
import tiny
import torch
from torch.nn import functional

from shrinkkit import Metric, Task
from shrinkkit.core import estimate
from shrinkkit.core.estimate import Resampled
from shrinkkit.display import cells
from shrinkkit.errors import InvalidTask
from shrinkkit.measure import scoring
from shrinkkit.tasks import checks, outputs


def macro_f1(output, target):
    predicted = output.argmax(1)
    right = [((predicted == c) & (target == c)).sum() for c in range(4)]
    either = [(predicted == c).sum() + (target == c).sum() for c in range(4)]
    return sum(2 * a / b.clamp(min=1) for a, b in zip(right, either, strict=True)) / 4


def perplexity(output, target):
    return functional.cross_entropy(output, target).exp()


def nothing(output, target):
    return torch.tensor(0.0)


class Counted:
    """A metric as torchmetrics has them."""

    higher_is_better = True

    def reset(self):
        self.right = self.total = 0

    def update(self, output, target):
        self.right += int((output.argmax(1) == target).sum())
        self.total += len(target)

    def compute(self):
        return torch.tensor(self.right / self.total)


PERPLEXITY = Metric(perplexity, higher_is_better=False)


@pytest.fixture(scope="module")
def corner():
    return tiny.task()


def with_score(corner, score, **changes):
    return dataclasses.replace(corner, score=score, metric="", **changes)


def worse(corner, scale=0.6):
    """A model that answers as the original does, but less surely."""
    return lambda x: scale * corner.model(x)


def judged(task, model):
    before, after = (scoring.scores(one, task, task.test) for one in (task.model, model))
    return scoring.accuracy(task, before, None), scoring.accuracy(task, after, before)


def test_a_metric_of_the_whole_set_is_that_of_all_outputs_at_once(corner):
    task = with_score(corner, Metric(macro_f1, range=(0, 1)))
    baseline, same = judged(task, task.model)
    x, y = task.test.tensors
    assert baseline.metric == "macro_f1"
    assert baseline.mean.value == pytest.approx(float(macro_f1(task.model(x), y)))
    assert baseline.mean.low < baseline.mean.value <= baseline.mean.high <= 1
    assert (baseline.scores, baseline.examples, baseline.classes, same.regressions) == ((), 42, (), 0)
    assert (same.agreement, same.cosine) == (1.0, pytest.approx(1.0))
    assert not baseline.is_fraction


def test_where_lower_is_better_the_true_number_is_shown_and_the_gain_has_the_other_sign(corner):
    task = with_score(corner, PERPLEXITY)
    baseline, found = judged(task, worse(corner))
    assert found.difference.value == pytest.approx(found.mean.value - baseline.mean.value)
    assert found.gain.value == -found.difference.value
    assert found.title == "perplexity (lower is better)"
    assert found.difference.low < found.difference.value < found.difference.high


@pytest.mark.parametrize(("drop", "enough"), [(0.0, False), (5.0, True)])
def test_a_budget_of_a_metric_where_lower_is_better_is_an_increase(corner, drop, enough):
    baseline, found = judged(with_score(corner, PERPLEXITY), worse(corner, 0.3))
    assert found.difference.value > 0
    options = {"higher_is_better": False, "bounds": None}
    assert estimate.within(baseline.sample, [found.sample], drop, **options) == (enough,)


def test_a_score_of_examples_where_lower_is_better_regresses_when_it_rises(corner):
    each = Metric(
        lambda output, target: functional.cross_entropy(output, target, reduction="none"),
        "cross-entropy",
        higher_is_better=False,
        per_example=True,
    )
    _, found = judged(with_score(corner, each), lambda x: -corner.model(x))
    assert found.regressions > 30
    assert found.worst_regressions[0].score_after > found.worst_regressions[0].score_before


def test_an_object_with_update_and_compute_is_a_metric_and_keeps_nothing_between_calls(corner):
    task = with_score(corner, Counted())
    baseline, _ = judged(task, corner.model)
    assert baseline.metric == "Counted"
    assert baseline.mean.value == judged(corner, corner.model)[0].mean.value


def test_metrics_of_torchmetrics_are_taken_as_they_are(corner):
    classification = pytest.importorskip("torchmetrics.classification")
    task = with_score(corner, classification.MulticlassF1Score(num_classes=4))
    baseline, found = judged(task, lambda x: -corner.model(x))
    assert baseline.metric == "MulticlassF1Score"
    assert baseline.mean.value == pytest.approx(float(macro_f1(task.model(task.test.tensors[0]), task.test.tensors[1])))
    assert found.difference.high < 0


def test_an_object_that_does_not_say_which_way_is_better_is_refused():
    unknown = type("Unknown", (Counted,), {"higher_is_better": None})()
    with pytest.raises(InvalidTask, match="higher_is_better"):
        Metric(unknown)
    assert Metric(unknown, higher_is_better=False).higher_is_better is False


def test_further_metrics_are_reported_with_intervals_and_decide_nothing(corner):
    task = dataclasses.replace(corner, metrics={"F1": macro_f1, "perplexity": PERPLEXITY})
    _, found = judged(task, worse(corner, 0.2))
    f1, other = found.further
    assert (f1.metric, f1.difference.value) == ("F1", 0.0)
    assert (other.higher_is_better, other.difference.value > 0) == (False, True)
    assert found.difference.value == 0.0


def test_resamples_are_the_same_for_every_model(corner):
    one, other = (PERPLEXITY.sample(*pairs(corner), 42) for _ in range(2))
    assert one.replicates[:200] == other.replicates[:200]
    assert 200 <= len(one.replicates) <= 1000


def pairs(corner):
    x, y = corner.test.tensors
    with torch.no_grad():
        return corner.model(x), y


def test_a_resample_on_which_a_metric_is_undefined_is_drawn_again():
    def needs_both(output, target):
        return output[target == 1].mean() - output[target == 0].mean()

    target = torch.tensor([1] + [0] * 9)
    found = Metric(needs_both).sample(torch.arange(10.0), target, 10)
    assert all(map(math.isfinite, found.replicates))
    with pytest.raises(InvalidTask, match="must be finite"):
        Metric(needs_both).sample(torch.arange(10.0), torch.zeros(10), 10)


def test_texts_and_examples_of_several_sizes_are_lists():
    assert outputs.concatenate([["a", "b"], ["c"]]) == ["a", "b", "c"]
    ragged = outputs.concatenate([torch.zeros(2, 3), torch.ones(1, 5)])
    assert [len(one) for one in outputs.select(ragged, [2, 0, 0])] == [5, 3, 3]
    both = outputs.concatenate(
        [{"x": torch.zeros(2), "n": torch.tensor(1)}, {"x": torch.ones(1), "n": torch.tensor(2)}]
    )
    assert outputs.select(both, [2, 2, 0])["x"].tolist() == [1.0, 1.0, 0.0]


def test_the_interval_of_an_identical_variant_is_not_empty():
    same = Resampled(0.9, (0.88, 0.91, 0.9) * 70, 100)
    found = estimate.paired_difference(same, same, bounds=(0, 1))
    assert found.low == pytest.approx(-0.037, abs=0.002)
    assert estimate.within(same, [same], 0.05, bounds=(0, 1)) == (True,)
    assert estimate.within(same, [same], 0.03, bounds=(0, 1)) == (False,)


@pytest.mark.parametrize("score", [Metric(macro_f1, range=(0, 1)), PERPLEXITY, Counted()])
def test_a_right_metric_passes_the_check(corner, score):
    low, high = checks.score_range(with_score(corner, score))
    assert low < high


@pytest.mark.parametrize(
    ("score", "rule"),
    [
        (Metric(nothing), "must not be at its worst"),
        (nothing, "one score per example"),
        (lambda output, target: torch.zeros(len(target)), "must not be at its worst"),
        (Metric(lambda output, target: 1 / torch.tensor(0.0), "ratio"), "`ratio` must be finite"),
        (Metric(lambda output, target: output.no_such, "odd"), r"`odd` must accept .*test_metrics.py:\d+.*no_such"),
        (Metric(perplexity), "better than chance, but its perplexity"),
        (Metric(macro_f1, range=(0, 0.5)), "must lie in its `range`"),
        (Metric(lambda output, target: output.max()), "better than chance"),
    ],
)
def test_a_wrong_metric_is_refused_before_any_work(corner, score, rule):
    with pytest.raises(InvalidTask, match=rule):
        checks.check(with_score(corner, score))


def test_fidelity_by_cosine_has_decimals_and_cannot_gain():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Unflatten(1, (2, 4))).eval()
    task = Task(model, torch.randn(4, 6), inputs=torch.randn(100, 6))
    baseline, found = judged(task, lambda x: model(x) + 0.01)
    assert (baseline.is_fraction, found.is_fraction) == (False, False)
    assert cells.score(found.mean, is_fraction=found.is_fraction).text.startswith("0.99")
    # Of 50 inputs none was ruined: the rule of three, for 97.5 %, and nothing above equality.
    assert found.difference.high == pytest.approx(0.0, abs=1e-6)
    assert -0.08 < found.difference.low < -0.06
    count = estimate.needed(baseline.sample, found.sample, 0.01, bounds=found.bounds)
    assert 370 < count < 420
    repeated = [one.scores * (count // 50 + 1) for one in (baseline, found)]
    assert estimate.within(repeated[0], [repeated[1]], 0.01, bounds=found.bounds) == (True,)


def test_a_drop_that_the_variant_has_is_shown_by_no_number_of_examples():
    assert estimate.needed([1.0] * 50, [0.9] * 50, 0.05) is None
