"""Further inputs of a task, of other sizes, whose latency is measured too."""

import dataclasses

import pytest
import torch
from small import classifier
from torch import nn

from shrinkkit import Task
from shrinkkit.errors import InvalidTask
from shrinkkit.runtimes.torch.export import export
from shrinkkit.tasks import calls, checks

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [torch.randint(1, 50, (3 + i % 20,), generator=torch.Generator().manual_seed(i)) for i in range(100)]


class Pooled(nn.Module):
    """Classes of padded token ids."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, ids, mask):
        return self.head((self.table(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def padded(texts):
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return {"ids": ids, "mask": (ids > 0).long()}


def task(**fields):
    return Task(Pooled().eval(), padded(TEXTS[:4]), inputs=TEXTS, collate=padded, **fields)


def given(name="short", **inputs):
    ids = torch.ones(2, 5, dtype=torch.int64)
    return {name: {"ids": ids, "mask": ids, **inputs}}


def test_by_default_latency_is_measured_at_percentiles_of_the_lengths_of_the_data():
    made = task()
    checks.check(made)
    lengths = sorted(len(made.calibration.dataset[i][0][0]) for i in range(len(made.calibration)))
    count = len(lengths)
    shown = {f"length {lengths[round(p / 100 * (count - 1))]} ({p}th percentile of {count})": p for p in (50, 90)}
    assert len(made.workloads) == 3
    assert set(shown) < set(made.workloads)
    for name, (ids, mask) in made.workloads.items():
        assert ids.shape == mask.shape == (4, int(name.split()[1]))
    assert task(workloads=given()).workloads.keys() == {"short"}
    assert not Task(classifier(), torch.randn(4, 6)).workloads


def test_workloads_keep_what_the_user_gave_when_a_field_of_the_task_is_replaced():
    made = task(workloads=given())
    again = dataclasses.replace(made, example=made.workloads["short"])
    assert [tuple(x.shape) for x in again.workloads["short"]] == [(2, 5), (2, 5)]
    assert again.model is made.model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.ones(2, 5)}, r"`ids` of `workloads\['short'\]` must have the dtype .* got torch.float32 and 2"),
        ({"mask": torch.ones(3, 5, dtype=torch.int64)}, r"`mask` of .* must have the batch of the others, 2, got 3"),
        ({"ids": torch.full((2, 5), 50)}, r"The model must accept `workloads\['short'\]`"),
    ],
)
def test_a_workload_unlike_the_example_is_refused_with_its_name_and_input(changes, message):
    with pytest.raises(InvalidTask, match=message):
        checks.check(task(workloads=given(**changes)))


def test_a_size_that_does_not_vary_is_refused_with_its_dimension_and_the_remedy():
    wide = Task(classifier(), torch.randn(4, 6), workloads={"wide": torch.randn(4, 7)})
    with pytest.raises(InvalidTask, match=r"`workloads\['wide'\]` .* in dimension 1, .* 6, got 7. Pad or cut it"):
        checks.check(wide)


def test_a_workload_of_other_inputs_is_refused_when_the_task_is_made():
    message = r"`workloads\['short'\]` must hold the keys of `example`.* but mask is missing"
    with pytest.raises(InvalidTask, match=message):
        task(workloads={"short": {"ids": TEXTS[0][None]}})
    with pytest.raises(InvalidTask, match=r"`workloads\['two'\]` must hold 1 values.* got 2"):
        Task(classifier(), torch.randn(4, 6), workloads={"two": (torch.randn(4, 6), torch.randn(4, 6))})


def test_the_exporter_is_given_inputs_without_sizes_of_zero_or_one():
    ids = torch.ones(2, 1, dtype=torch.int64)
    dims = (frozenset({1}), frozenset({1}))
    long = {"long": (ids.repeat(1, 6), ids.repeat(1, 6))}
    made = Task(Pooled().eval(), (ids, ids), varying=dims, workloads=long)
    assert calls.varying(made.model).sample[0].shape == (2, 6)
    program = export(made.model, made.example)[0].module(check_guards=False)
    for inputs in (made.example, (ids.repeat(1, 9), ids.repeat(1, 9))):
        assert torch.equal(program(*inputs), made.model(*inputs))
