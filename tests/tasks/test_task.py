import numpy as np
import pytest
import torch
from small import classifier, padded
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from shrinkkit.errors import InvalidTask
from shrinkkit.tasks import checks, data, fidelity, loader
from shrinkkit.tasks.task import SPLITS, Task, batches
from shrinkkit.transforms import finetune

X = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Keywords(nn.Module):
    """A model of keywords that returns a mapping with something that is no tensor, as Hugging Face models do."""

    def __init__(self):
        super().__init__()
        self.layer = classifier()

    def forward(self, features, mask=None, use_cache=True):
        scores = self.layer(features) * mask[:, None]
        return {"logits": scores, "cache": object() if use_cache else None}


class Stream(IterableDataset):
    """Examples that can only be iterated."""

    def __init__(self, *columns):
        self.columns = columns

    def __iter__(self):
        yield from zip(*self.columns, strict=True)


def right(output, target):
    return (output.argmax(1) == target).float()


def test_a_model_and_an_example_are_enough():
    task = Task(classifier(), X[:4])
    checks.check(task)
    assert task.metric == "top-1 agreement with the original"
    assert [len(getattr(task, split)) > 0 for split in SPLITS] == [True] * 4
    assert "no accuracy was measured" in task.notes[0]
    assert any("drawn at random" in note for note in task.notes)
    ((x,), output), _ = task.test[0], None
    assert torch.equal(output, task.model(x[None])[0])


def test_unlabelled_inputs_are_cut_into_disjoint_splits_that_are_the_same_each_time():
    first, again = (Task(classifier(), X[:4], inputs=X) for _ in range(2))
    checks.check(first)
    rows = [[x.numpy().tobytes() for (x,), _ in getattr(first, split)] for split in SPLITS]
    assert sorted(row for part in rows for row in part) == sorted(x.numpy().tobytes() for x in X)
    assert rows == [[x.numpy().tobytes() for (x,), _ in getattr(again, split)] for split in SPLITS]
    assert len(first.test) == 60


def test_fidelity_falls_when_a_weight_changes_and_is_one_for_the_original():
    task = Task(classifier(), X[:4], inputs=X)
    other = classifier()
    other.weight.data[0] = 0
    (inputs, target) = next(batches(task.test, 60))
    assert task.score(task.model(*inputs), target).mean() == 1
    assert 0.3 < task.score(other(*inputs), target).mean() < 0.9


@pytest.mark.parametrize(
    ("output", "is_classifier", "kind"),
    [
        (torch.randn(4, 3), True, "agreement"),
        (torch.randn(4, 3).softmax(1), False, "agreement"),
        (torch.randn(4, 3), False, "cosine"),
        (torch.randn(4, 5, 7), False, "cosine"),
        (torch.randn(4, 1), True, "error"),
        (torch.randn(4), False, "error"),
        (torch.ones(4, 3, dtype=torch.long), True, ""),
    ],
)
def test_outputs_are_compared_by_their_kind(output, is_classifier, kind):
    assert fidelity.kinds(output, ["output"], is_classifier=is_classifier) == [kind]


@pytest.mark.parametrize("kind", ["agreement", "cosine", "error"])
def test_a_measure_of_equal_outputs_is_one_and_of_others_less(kind):
    y = torch.randn(5, 4) if kind != "error" else torch.randn(5, 1)
    score = fidelity.score([kind])
    assert torch.allclose(score(y, y).double(), torch.ones(5, dtype=torch.double))
    assert (score(-y, y) < 1).all()


def test_an_error_of_several_times_a_small_number_loses_one_example_and_not_more():
    score, wanted = fidelity.score(["error"]), torch.tensor([[0.001], [0.8]])
    assert score(torch.tensor([[0.02], [0.8]]), wanted).tolist() == [0, 1]


def test_distillation_without_labels_brings_a_damaged_model_back():
    task = Task(classifier(), X[:4], inputs=torch.randn(1500, 6))
    damaged = classifier()
    damaged.weight.data[0] *= -1
    result = finetune.run(damaged, task, epochs=30, learning_rate=0.05)
    (inputs, target) = next(batches(task.test, 60))
    assert task.score(result.model(*inputs), target).mean() > task.score(damaged(*inputs), target).mean() + 0.1


def test_a_mapping_becomes_positional_tensors_and_layers_keep_their_names():
    model = Keywords().eval()
    example = {"features": X[:4], "mask": torch.ones(4)}
    rows = [{"features": x.tolist(), "mask": 1.0, "labels": y, "text": "ignored"} for x, y in zip(X, Y, strict=True)]
    task = Task(model, example, test=rows, score=lambda output, target: right(output["logits"], target))
    checks.check(task)
    assert [name for name, _ in task.model.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert set(task.model(*task.example)) == {"logits"}
    assert isinstance(task.model, Keywords)
    assert model(**example)["cache"] is not None
    assert set(task.unlabelled) == {"train"}


def test_a_dataset_of_tensors_is_taken_as_it_is_with_a_score_and_a_loss():
    task = Task(classifier(), X[:4], test=TensorDataset(X, Y), score=right, loss=nn.functional.cross_entropy)
    checks.check(task)
    assert sum(len(getattr(task, split)) for split in SPLITS) == len(X)


@pytest.mark.parametrize(
    "given",
    [
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True),
        DataLoader(Stream(X, Y), batch_size=7),
        Stream(X, Y),
        [(x.numpy(), int(y)) for x, y in zip(X, Y, strict=True)],
        [(x.tolist(), np.int64(y)) for x, y in zip(X, Y, strict=True)],
    ],
    ids=["map-style", "loader", "loader of a stream", "stream", "arrays", "lists"],
)
def test_labelled_data_of_any_kind_give_the_users_score(given):
    task = Task(classifier(), X[:4], test=given, score=right)
    checks.check(task)
    assert task.metric == "accuracy"
    scores = [task.score(task.model(*inputs), target) for inputs, target in batches(task.test, 16)]
    assert torch.cat(scores).mean() == 1
    assert sum(len(getattr(task, split)) for split in SPLITS) == 120


def test_a_loaders_own_function_prepares_each_example():
    def halved(items):
        return torch.stack([x / 2 for x, _ in items]), torch.tensor([y for _, y in items])

    task = Task(classifier(), X[:4], test=DataLoader(TensorDataset(X, Y), batch_size=7, collate_fn=halved), score=right)
    first = min(task.test.indices)
    (inputs,), target = task.test[0]
    assert torch.equal(inputs, X[first] / 2)
    assert target == Y[first]


def test_what_a_task_file_draws_without_a_seed_is_the_same_each_time_it_is_loaded(tmp_path):
    path = tmp_path / "drawn.py"
    path.write_text(
        "import torch\nfrom shrinkkit import Task\n"
        "def task(): return Task(torch.nn.Linear(6, 3).eval(), torch.randn(4, 6), inputs=torch.randn(100, 6))"
    )
    first, state = loader._contents(loader.load(path)), torch.get_rng_state()
    torch.rand(7)
    assert loader._contents(loader.load(path)) == first
    torch.set_rng_state(state)
    loader.load(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fingerprint_reads_inputs_and_calls_no_model():
    task = Task(classifier(), X[:4], inputs=X)
    calls = []
    task.model.register_forward_hook(lambda *_: calls.append(1))
    loader._contents(task)
    assert not calls
    checks._check_splits(task)
    assert not calls
    assert task.test[0] is not None
    assert calls


def test_a_loader_gives_only_what_its_sampler_visits():
    sampled = DataLoader(TensorDataset(X, Y), sampler=torch.utils.data.SubsetRandomSampler(range(40)))
    task = Task(classifier(), X[:4], test=sampled, score=right)
    assert sum(len(getattr(task, split)) for split in SPLITS) == 40


def test_data_without_end_are_read_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(data, "MOST_MATERIALISED", 50)
    task = Task(classifier(), X[:4], inputs=(x for x in X))
    assert "the first 50 examples" in " ".join(task.notes)


class Shuffled(Stream):
    """Begins one example later in each pass."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        rows = list(super().__iter__())
        return iter(rows[self.passes :] + rows[: self.passes])


class Once(Stream):
    def __init__(self, *columns):
        super().__init__(*columns)
        self.rows = super().__iter__()

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize("is_loader", [False, True])
def test_a_stream_that_gives_another_order_in_each_pass_is_refused(is_loader):
    stream = DataLoader(Shuffled(X), batch_size=7) if is_loader else Shuffled(X)
    with pytest.raises(InvalidTask, match="`inputs` must give its examples in the same order each time"):
        Task(classifier(), X[:4], inputs=stream)


def test_a_stream_that_can_be_read_only_once_is_read_whole():
    task = Task(classifier(), X[:4], inputs=DataLoader(Once(X), batch_size=7))
    assert sum(len(getattr(task, split)) for split in SPLITS) == len(X)


def test_a_score_without_labelled_examples_is_refused():
    with pytest.raises(InvalidTask, match="`validation` must be given if a score is"):
        Task(classifier(), X[:4], inputs=X, score=right)


def test_a_missing_key_is_named():
    with pytest.raises(InvalidTask, match="must hold the keys of `example`, features, mask, but mask is missing"):
        checks.check(
            Task(Keywords().eval(), {"features": X[:4], "mask": torch.ones(4)}, inputs=[{"features": X[0]}] * 20)
        )


def test_too_few_inputs_are_refused():
    with pytest.raises(InvalidTask, match="at least 8 examples"):
        Task(classifier(), X[:4], inputs=X[:5])


class Pooled(nn.Module):
    """A model of sequences that leaves padding out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids, mask):
        return self.head((self.table(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_examples_of_several_lengths_are_padded_by_the_users_function():
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 50, (length,), generator=draw) for length in torch.randint(3, 12, (100,)).tolist()]
    model = Pooled().eval()
    task = Task(model, padded(texts[:4]), inputs=texts, collate=padded)
    checks.check(task)
    assert task.varying == (frozenset({1}), frozenset({1}))
    lengths = set()
    for inputs, target in batches(task.test, 4):
        lengths.add(inputs[0].shape[1])
        assert torch.equal(task.model(*inputs), target)
    assert len(lengths) > 1
    alone = model(**padded(texts[:1]))
    assert torch.allclose(alone, model(**padded(texts[:4]))[:1], atol=1e-6)


def test_examples_of_several_lengths_without_a_function_are_refused():
    with pytest.raises(InvalidTask, match="Pass `collate`, a function that pads"):
        Task(nn.Linear(1, 2).eval(), torch.randn(4, 5, 1), inputs=[torch.randn(n, 1) for n in range(3, 40)])


def test_a_scripted_model_is_refused_for_what_it_is():
    with pytest.raises(InvalidTask, match="got TorchScript"):
        checks.check(Task(torch.jit.script(classifier()), X[:4]))


def test_a_model_that_does_not_fit_into_memory_is_refused_with_what_it_needs():
    with torch.device("meta"):
        huge = nn.Sequential(*(nn.Linear(1 << 17, 1 << 17) for _ in range(64))).eval()
    with pytest.raises(InvalidTask, match=r"A model of 4,398 GB needs about 13,194 GB of free memory"):
        checks.check(Task(huge, torch.randn(4, 1 << 17)))


def test_a_classifier_that_always_gives_one_class_is_compared_by_its_outputs():
    model = classifier()
    model.bias.data[0] = 100.0
    task = Task(model, X[:4], inputs=X)
    checks.check(task)
    assert task.metric == "cosine similarity with the original"
