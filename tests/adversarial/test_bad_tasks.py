"""Tasks that would make results meaningless or a step fail: each is rejected with the rule that it breaks."""

import dataclasses

import pytest
import torch
import usertasks
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from shrinkkit import Task
from shrinkkit.errors import InvalidInput, InvalidTask
from shrinkkit.tasks import checks, loader


def inputs(n, seed, features=6):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))


def split(n, seed):
    x = inputs(n, seed)
    return TensorDataset(x, x[:, :3].argmax(1))


class Right(nn.Module):
    """A linear model that gives the right answers, with `after` applied to them and `before` to its inputs."""

    def __init__(self, after=lambda self, x: x):
        super().__init__()
        self.head = nn.Linear(6, 3, bias=False)
        self.head.weight.data.copy_(torch.eye(3, 6))
        self.register_buffer("seen", torch.zeros(3))
        self.calls, self.after = 0, after
        self.eval()

    def forward(self, x):
        return self.after(self, self.head(x))


def right(output, target):
    return (output.argmax(1) == target).float()


def a_task(**changes):
    good = Task(
        name="small",
        model=Right(),
        example=(inputs(8, 9),),
        train=split(64, 1),
        calibration=split(32, 2),
        validation=split(60, 3),
        test=split(120, 4),
        score=right,
        loss=functional.cross_entropy,
    )
    return dataclasses.replace(good, **changes)


def refusal(**changes):
    with pytest.raises(InvalidTask) as caught:
        checks.check(a_task(**changes))
    return str(caught.value)


def test_the_task_that_all_others_are_made_of_is_good():
    checks.check(a_task())


class Counting:
    """A score that depends on how often it was called."""

    calls = 0

    def __call__(self, output, target):
        self.calls += 1
        return right(output, target) * (1 + self.calls % 2)


def in_place(output, target):
    output.neg_()
    return right(output, target)


SCORES = {
    "always 1": (lambda o, t: torch.ones(len(t)), "depend on the outputs"),
    "always 0": (lambda o, t: torch.zeros(len(t)), "at its worst"),
    "always half": (lambda o, t: torch.full((len(t),), 0.5), "depend on the outputs"),
    "of the target alone": (lambda o, t: t.float() / 2, "above chance"),
    "of the output alone": (lambda o, t: o.softmax(1).amax(1), "above chance"),
    "random": (lambda o, t: torch.rand(len(t)), "same scores for the same outputs"),
    "right, with noise": (lambda o, t: right(o, t) + 1e-3 * torch.rand(len(t)), "same scores"),
    "by the number of calls": (Counting(), "same scores for the same outputs"),
    "changing the outputs": (in_place, "same scores for the same outputs"),
    "the mean of the batch": (lambda o, t: right(o, t).mean().expand(len(t)), "rest of a batch"),
    "the rank in the batch": (lambda o, t: right(o, t) + o.amax(1).argsort().argsort() / len(t), "rest of a batch"),
    "a share of the batch": (lambda o, t: right(o, t) / len(t), "rest of a batch"),
    "centred over the batch": (lambda o, t: 3 * right(o, t) - o.sum(1).mean(), "rest of a batch"),
    "complex": (lambda o, t: torch.complex(right(o, t), right(o, t)), "real numbers"),
    "on no device": (lambda o, t: right(o, t).to("meta"), "on the CPU"),
    "in eight bits": (lambda o, t: (right(o, t) * 200).to(torch.uint8), "cannot overflow"),
    "in eight bits with a sign": (lambda o, t: (right(o, t) * 100).to(torch.int8), "cannot overflow"),
    "overflown": (lambda o, t: (right(o, t).long() + 1) * (2**62), "must lie within"),
    "huge": (lambda o, t: right(o, t) * 1e30, "must lie within"),
    "NaN": (lambda o, t: right(o, t) * float("nan"), "must be finite"),
    "infinite where it is right": (lambda o, t: right(o, t) / 0, "must be finite"),
    "NaN for one class": (lambda o, t: torch.where(t == 2, torch.nan, right(o, t)), "must be finite"),
    "the wrong way round": (lambda o, t: 1 - right(o, t), "at its worst"),
    "a loss": (lambda o, t: functional.cross_entropy(o, t, reduction="none"), "above chance"),
    "of labels off by one": (lambda o, t: (o.argmax(1) == (t + 1) % 3).float(), "at its worst"),
    "of the least likely class": (lambda o, t: (o.argmin(1) == t).float(), "at its worst"),
    "a number": (lambda o, t: 0.5, "one score per example"),
    "a list": (lambda o, t: right(o, t).tolist(), "one score per example"),
    "None": (lambda o, t: None, "one score per example"),
    "a mean": (lambda o, t: right(o, t).mean(), "one score per example"),
    "one too many": (lambda o, t: torch.ones(len(t) + 1), "one score per example"),
    "a column": (lambda o, t: right(o, t)[:, None], "one score per example"),
    "an error": (lambda o, t: 1 / 0, "ZeroDivisionError"),
    "an exit": (lambda o, t: exit(3), "SystemExit"),
    "an endless recursion": (lambda o, t: SCORES["an endless recursion"][0](o, t), "RecursionError"),
}


@pytest.mark.parametrize(("score", "says"), SCORES.values(), ids=SCORES)
def test_a_score_without_information_is_rejected(score, says):
    assert says in refusal(score=score)


@pytest.mark.parametrize(
    "score",
    [
        right,
        lambda o, t: o.argmax(1) == t,
        lambda o, t: (o.argmax(1) == t).long(),
        lambda o, t: (o.argmax(1) == t).to(torch.uint8),
        lambda o, t: (o.argmax(1) == t).half(),
        lambda o, t: 100 * right(o, t),
        lambda o, t: -functional.cross_entropy(o, t, reduction="none"),
        lambda o, t: o.softmax(1).gather(1, t[:, None])[:, 0],
    ],
)
def test_scores_that_people_use_are_let_through(score):
    checks.check(a_task(score=score))


class Untrained(nn.Linear):
    def __init__(self):
        torch.manual_seed(3)
        super().__init__(6, 3)
        self.eval()


class Constant(Right):
    def forward(self, x):
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3) + 0 * self.head(x)


@pytest.mark.parametrize("model", [Untrained(), Constant()], ids=["untrained", "constant"])
def test_a_model_at_chance_level_is_refused(model):
    wrong = TensorDataset(inputs(120, 4), torch.randint(0, 3, (120,), generator=torch.Generator().manual_seed(0)))
    assert "above chance" in refusal(model=model, test=wrong)


@pytest.mark.parametrize("shift", [1, 2, 17])
def test_labels_that_belong_to_other_examples_are_refused(shift):
    moved = {
        name: TensorDataset(data.tensors[0], data.tensors[1].roll(shift))
        for name, data in {"validation": split(60, 3), "test": split(120, 4)}.items()
    }
    assert "above chance" in refusal(**moved)


def test_a_rare_class_and_a_model_that_finds_it_are_let_through():
    x = inputs(600, 4)
    labels = (x[:, 0] > 1.6).long()
    model = Right(lambda self, y: torch.stack([torch.full_like(y[:, 0], 1.6), y[:, 0]], 1))
    few = {name: TensorDataset(x[part], labels[part]) for name, part in PARTS.items()}
    checks.check(a_task(model=model, **few))


PARTS = {
    "train": slice(0, 100), "calibration": slice(100, 150), "validation": slice(150, 300), "test": slice(300, 600)
}  # fmt: skip


def test_a_large_split_that_is_sorted_by_class_is_let_through():
    x = inputs(6000, 4)
    x = x[x[:, :3].argmax(1).argsort()]
    checks.check(a_task(test=TensorDataset(x, x[:, :3].argmax(1))))


def flips(after):
    def forward(self, y):
        self.calls += 1
        return y if self.calls <= after else -y

    return forward


def counted(self, y):
    self.seen += 1
    return torch.where(self.seen[0] > 12, -y, y)


def averaged(self, y):
    self.seen.mul_(0.9).add_(0.1 * y.mean(0))
    return y - 1e-9 * self.seen


def replaced(self, y):
    self.seen = self.seen + 1
    return y


def remembered(self, y):
    self.__dict__.setdefault("kept", []).append(len(y))
    return y


STATEFUL = {
    "flips after 12 calls": (flips(12), "same outputs for the same inputs"),
    "flips after 30 calls": (flips(30), "same outputs for the same inputs"),
    "will flip after 1000 calls": (flips(1000), "`calls` changes"),
    "counts in a buffer": (counted, "same outputs for the same inputs"),
    "averages in a buffer": (averaged, "`seen` changes"),
    "replaces a buffer": (replaced, "`seen` changes"),
    "keeps a list": (remembered, "`kept` changes"),
    "adds noise": (lambda self, y: y + torch.rand_like(y), "same outputs"),
    "drops out": (lambda self, y: functional.dropout(y, 0.5, training=True), "same outputs"),
}


@pytest.mark.parametrize(("after", "says"), STATEFUL.values(), ids=STATEFUL)
def test_a_model_that_keeps_state_is_refused(after, says):
    assert says in refusal(model=Right(after))


def test_what_a_model_keeps_from_its_first_call_on_is_no_state():
    def cached(self, y):
        if not hasattr(self, "scale"):
            self.scale = torch.ones(3)
        return y * self.scale

    checks.check(a_task(model=Right(cached)))


BATCHES = {
    "batch norm by function": lambda self, y: functional.batch_norm(y, None, None, training=True),
    "softmax over the batch": lambda self, y: y.softmax(0),
    "less the mean": lambda self, y: y - y.mean(0),
    "less the first": lambda self, y: y - 0.5 * y[:1],
    "summed along the batch": lambda self, y: y.cumsum(0),
    "by the place in the batch": lambda self, y: y * (1 + torch.arange(len(y))[:, None]),
    "of neighbours": lambda self, y: y + 0.3 * y.roll(1, 0),
    "otherwise in batches above 16": lambda self, y: y if len(y) <= 16 else y - y.mean(0),
    "by the size of the batch": lambda self, y: y * len(y),
}


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("after", BATCHES.values(), ids=BATCHES)
def test_a_model_that_mixes_the_examples_of_a_batch_is_refused(after, size):
    said = refusal(model=Right(after), example=(inputs(size, 9),))
    # Batch norm itself refuses a batch of one.
    assert "rest of its batch" in said or "Expected more than 1 value" in said


class Normed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6, **options), Right()
        self.eval()

    def forward(self, x):
        return self.head(self.norm(x))


def test_batch_norm_without_running_statistics_is_refused():
    checks.check(a_task(model=Normed()))
    assert "batch of any size" in refusal(model=Normed(track_running_stats=False), example=(inputs(2, 9),))


def noisy(n=120, noise=1e-6, seed=4):
    x, y = split(n, seed).tensors
    return TensorDataset(x + noise * torch.randn_like(x), y)


def picked(data, indices):
    return TensorDataset(*(x[indices] for x in data.tensors))


def joined(one, other):
    return TensorDataset(*(torch.cat(parts) for parts in zip(one.tensors, other.tensors, strict=True)))


SHUFFLED = torch.randperm(120, generator=torch.Generator().manual_seed(0))
COPIES = {
    "validation is test": {"validation": split(120, 4)},
    "validation is test with noise of 1e-6": {"validation": noisy()},
    "validation is test with noise of 1e-7, shuffled": {"validation": picked(noisy(noise=1e-7), SHUFFLED)},
    "train holds the test set with noise": {"train": noisy(noise=1e-6)},
    "calibration is validation": {"calibration": split(60, 3)},
    "one example is in both": {"train": joined(split(64, 1), picked(split(120, 4), [0]))},
}


@pytest.mark.parametrize("changes", COPIES.values(), ids=COPIES)
def test_splits_that_overlap_are_refused_with_and_without_noise(changes):
    assert "Splits must not overlap" in refusal(**changes)


def repeated(n, times, noise=0.0):
    x, y = split(n, 11).tensors
    x, y = x.repeat_interleave(times, 0), y.repeat_interleave(times, 0)
    return TensorDataset(x + noise * torch.randn_like(x), y)


@pytest.mark.parametrize("noise", [0.0, 1e-6], ids=["the same", "with noise"])
@pytest.mark.parametrize(("n", "times"), [(1, 120), (12, 10), (60, 2)])
@pytest.mark.parametrize("name", ["test", "validation"])
def test_examples_that_repeat_do_not_count_twice(name, n, times, noise):
    said = refusal(**{name: repeated(n, times, noise)})
    assert f"{n * times - n} of {n * times}" in said
    assert f"`{name}`" in said


def test_a_few_repeats_are_let_through():
    x, y = split(120, 4).tensors
    checks.check(a_task(test=TensorDataset(torch.cat([x, x[:5]]), torch.cat([y, y[:5]]))))


class Data:
    """A dataset whose length and examples come from functions."""

    def __init__(self, size=lambda: 40, example=lambda i: split(40, 8)[i]):
        self.size, self.example = size, example

    def __len__(self):
        return self.size()

    def __getitem__(self, index):
        return self.example(index)


def raising(error):
    def function(*_):
        raise error

    return function


class Wordless(Exception):
    """An error that cannot even be printed."""

    def __str__(self):
        raise RuntimeError("no words")


LENGTHS = iter(range(1, 1000))
DATA = {
    "a list": [1, 2, 3],
    "a function": split,
    "a dict": {},
    "an iterator": iter(()),
    "a number": 5,
    "a text": "train.csv",
    "a length that raises": Data(size=raising(ValueError("no length"))),
    "a length that is a text": Data(size=lambda: "40"),
    "a length that is a float": Data(size=lambda: 40.0),
    "a length below zero": Data(size=lambda: -1),
    "a length of nothing": Data(size=lambda: 0),
    "a length that is None": Data(size=lambda: None),
    "a length without end": Data(size=lambda: 10**30),
    "a length that lies": Data(size=lambda: 41),
    "a length that lies by far": Data(size=lambda: 10**12),
    "a length that changes": Data(size=lambda: next(LENGTHS)),
    "an example that raises": Data(example=raising(KeyError("x"))),
    "an example that exits": Data(example=raising(SystemExit(3))),
    "an example that raises without words": Data(example=raising(Wordless())),
    "an example that recurses": Data(example=lambda i: DATA["an example that recurses"][i]),
    "no target": Data(example=lambda i: inputs(1, i)[0]),
    "three parts": Data(example=lambda i: (*split(40, 8)[i], 1)),
    "an empty tuple": Data(example=lambda i: ()),
    "None": Data(example=lambda i: None),
    "texts": Data(example=lambda i: (["a"] * 6, 1)),
    "other shapes": Data(example=lambda i: (torch.ones(5 + i), 1)),
    "other types": Data(example=lambda i: (torch.ones(6, dtype=torch.float64), 1)),
    "on no device": Data(example=lambda i: (torch.ones(6, device="meta"), torch.tensor(1))),
    "random examples": Data(example=lambda i: (torch.rand(6), torch.tensor(1))),
    "random targets": Data(example=lambda i: (inputs(1, i)[0], torch.rand(()))),
    "targets that do not stack": Data(example=lambda i: (inputs(1, i)[0], torch.ones(i))),
    "NaN": Data(example=lambda i: (inputs(1, i)[0] * float("nan"), torch.tensor(1))),
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_an_invalid_dataset_is_named(data):
    assert "validation" in refusal(validation=data)


@pytest.mark.parametrize("field", ["score", "loss"])
@pytest.mark.parametrize("value", [0.5, "accuracy", torch.ones(2), [right]], ids=lambda v: type(v).__name__)
def test_an_invalid_function_is_named(field, value):
    assert refusal(**{field: value}).startswith(f"`{field}` must be a function")


@pytest.mark.parametrize("text", [" ", "a\nb", "x" * 300, "a\0b", 5, "a ", "\u202eabc"], ids=repr)
@pytest.mark.parametrize("field", ["name", "metric"])
def test_an_unprintable_name_is_rejected(field, text):
    assert refusal(**{field: text}).startswith(f"`{field}` must be a text")


@pytest.mark.parametrize("names", [["a", "b"], ("a", 1), ("a", ""), "ab", None, ("a\n", "b"), {"a"}], ids=repr)
def test_invalid_class_names_are_rejected(names):
    assert refusal(class_names=names).startswith("`class_names` must be")


@pytest.mark.parametrize("name", ["small", "ResNet-50 (v2)", "größe", "模型", "a/b", "😀"])
def test_names_of_any_language_are_let_through(name):
    checks.check(a_task(name=name, metric=name))


MODELS = {
    "a function": torch.relu,
    "a list": [nn.Linear(6, 3)],
    "a class": nn.Linear,
    "None": None,
    "weights": Right().state_dict(),
    "a text": "model.pt",
    "on no device": Right().to("meta"),
    "half on no device": nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3, device="meta")).eval(),
    "lazy": nn.Sequential(nn.LazyLinear(3)).eval(),
    "training": nn.Sequential(nn.Linear(6, 3)),
    "partly training": nn.Sequential(nn.Linear(6, 3).eval(), nn.Dropout()).eval().append(nn.Dropout()),
    "without forward": nn.Module().eval(),
    "a list of layers": nn.ModuleList([nn.Linear(6, 3)]).eval(),
    "of other inputs": nn.Linear(7, 3).eval(),
    "NaN": nn.Linear(6, 3).eval().requires_grad_(False),
}
MODELS["NaN"].weight.fill_(float("nan"))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_an_invalid_model_is_rejected_and_left_unchanged(model):
    assert refusal(model=model)
    if model is MODELS["lazy"]:
        assert nn.parameter.is_lazy(model[0].weight)


def named(*path):
    """A model with a layer at `path`."""
    model = outer = Right()
    for part in path[:-1]:
        inner = nn.Module()
        outer.add_module(part, inner)
        outer = inner
    outer.add_module(path[-1], nn.Linear(3, 3))
    return model.eval()


@pytest.mark.parametrize(
    "path",
    [
        *((name,) for name in "meta graph code print_readable recompile _graph _code add_submodule".split()),
        *((name,) for name in "class lambda None import a,b 😀 a'b a(b) a[0]".split()),
        ("a\nb",),
        ("x" * 400,),
        ("block", "class"),
        ("block", "a;b"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_layer_whose_name_cannot_be_saved_is_named_before_any_work(path):
    said = refusal(model=named(*path))
    assert "Rename it" in said
    assert repr(path[-1])[1:20] in said or repr(path[0])[1:20] in said


@pytest.mark.parametrize(
    "path", [("model",), ("block", "meta"), ("a/b",), ("x-y",), ("0",), ("größe",), ("weight",)], ids=repr
)
def test_layers_of_usual_names_are_let_through(path):
    checks.check_model(named(*path), (inputs(4, 9),))


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_parameter_whose_name_cannot_be_saved_is_named(kind):
    model = Right()
    if kind == "parameter":
        model.register_parameter("meta", nn.Parameter(torch.ones(2)))
    else:
        model.register_buffer("graph", torch.ones(2))
    assert "Rename it" in refusal(model=model)


EXAMPLES = {
    "a list": [inputs(4, 9)], "empty": (), "None": None, "an empty batch": (inputs(0, 9),),
    "a scalar": (torch.tensor(1.0),), "texts": ("a",), "on no device": (torch.ones(4, 6, device="meta"),),
    "NaN": (inputs(4, 9) * float("nan"),), "infinite": (inputs(4, 9) / 0,), "two sizes": (inputs(4, 9), inputs(3, 9)),
    "other features": (inputs(4, 9, 5),), "integers": (torch.ones(4, 6, dtype=torch.long),),
}  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_an_invalid_example_is_rejected(example):
    assert refusal(example=example)


LOSSES = {
    "None": lambda o, t: None, "a number": lambda o, t: 0.5, "a vector": lambda o, t: o[:, 0],
    "NaN": lambda o, t: o.sum() * float("nan"), "infinite": lambda o, t: o.sum() / 0,
    "detached": lambda o, t: functional.cross_entropy(o.detach(), t), "an error": lambda o, t: o.nonsense,
    "an exit": lambda o, t: exit(1),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_without_gradient_is_rejected(loss):
    assert refusal(loss=loss).startswith("`loss` must")


FILES = {
    "nothing": "",
    "a syntax error": "def task(:\n",
    "tabs and spaces": "if 1:\n\tx = 1\n        y = 2\n",
    "an exit": "import sys; sys.exit(0)",
    "an exit without a number": "raise SystemExit",
    "an interruption": "raise KeyboardInterrupt",
    "another end": "raise GeneratorExit",
    "an error of its own": "class E(BaseException): pass\nraise E('x')",
    "an error without words": "class E(Exception):\n    def __str__(self): 1 / 0\nraise E",
    "an endless recursion": "def f(): f()\nf()",
    "no memory": "raise MemoryError",
    "a NUL": "x = 1\0",
    "a missing module": "import nosuchmodule",
    "itself": "import small\nsmall.task",
    "a group": "raise ExceptionGroup('a', [ValueError()])",
    "a long message": "raise ValueError('x' * 10**6)",
    "many lines": "raise ValueError('a\\nb' * 1000)",
    "deep brackets": "x = " + "(" * 5000 + ")" * 5000,
    "task is a value": "task = 5",
    "task is a class": "class task: pass",
    "task needs arguments": "def task(x): pass",
    "task exits": "def task(): exit()",
    "task interrupts": "def task(): raise KeyboardInterrupt",
    "task recurses": "def task(): return task()",
    "task returns itself": "def task(): return task",
    "task returns nothing": "def task(): pass",
    "task yields": "def task(): yield 1",
    "task returns the class": "from shrinkkit import Task as task_\ndef task(): return task_",
    "a task without fields": "from shrinkkit import Task\ndef task(): return Task()",
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
@pytest.mark.filterwarnings("ignore")
def test_a_file_without_a_task_is_rejected_in_one_sentence(tmp_path, text):
    (tmp_path / "small.py").write_text(text)
    with pytest.raises(InvalidTask) as caught:
        loader.inspect(tmp_path / "small.py")
    usertasks.forget(tmp_path)
    assert "small.py" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"x = '\x80'", b"# coding: nonsense\n", b"\x00\x01\x02", b"PK\x03\x04"]
)
def test_a_binary_file_is_rejected(tmp_path, content):
    (tmp_path / "small.py").write_bytes(content)
    with pytest.raises(InvalidTask, match="small"):
        loader.inspect(tmp_path / "small.py")


@pytest.mark.parametrize(
    "name", ["x.py", "a b.py", "größe.py", "😀.py", "a.b.py", "-x.py", "class.py", "torch.py", "1.py", "é\n.py"]
)
def test_a_task_may_lie_in_a_file_of_any_name(tmp_path, name):
    assert (
        loader.inspect(usertasks.write(tmp_path, name=name)).layers == ("",)
        or loader.inspect(tmp_path / name).fingerprint
    )


@pytest.mark.parametrize("name", ["folder.py", "none.py", "x" * 300 + ".py", "a\0.py", "", ".", "a.txt", "digits"])
def test_a_missing_file_is_rejected(tmp_path, name):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(InvalidInput):
        loader.inspect(f"{tmp_path}/{name}" if name else "")


def test_scores_are_reported_with_their_range(tmp_path):
    path = usertasks.write(
        tmp_path, body="of['score'] = lambda o, t: 100 * score(o, t) - 50\nof['test'].tensors[1][0] = 2"
    )
    assert tuple(loader.inspect(path).scores) in ((-50, 50), (50, 50))


def test_bundled_tasks_are_looked_at_without_a_check():
    look = loader.inspect("digits-cnn")
    assert len(look.layers) > 10
    assert (look.files, tuple(look.scores)) == ({}, (0, 1))
