import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import Subset, TensorDataset

from shrinkkit.errors import InvalidInput, InvalidTask
from shrinkkit.tasks import checks, loader, modules
from shrinkkit.tasks.task import SPLITS, Task, batches

NAMES = ("stem.0", "stages.0.conv1", "stages.0.bn1", "stages.1.conv1", "head")


def data(n, *, seed=0, features=4):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, features, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1) if n else torch.zeros(0, dtype=torch.int64))


def right():
    """A model that gives the right answers, and has something to learn."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3, 4))
        model[1].weight.copy_(torch.eye(3))
        model[1].bias.zero_()
    return model


def a_task(**changes):
    """A small task that keeps every rule but those broken by `changes`."""
    good = Task(
        name="small",
        model=right(),
        example=(torch.randn(5, 4),),
        train=data(12, seed=1),
        calibration=data(6, seed=2),
        validation=data(6, seed=3),
        test=data(7, seed=4),
        score=lambda output, target: (output.argmax(1) == target).float(),
        loss=functional.cross_entropy,
    )
    return dataclasses.replace(good, **changes)


class Jittered(TensorDataset):
    """Data that is augmented at random."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + torch.rand(()), target


class Function(nn.Module):
    """A model that computes what it is given."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *inputs):
        return self.function(*inputs)


def write_to(x):
    x[:, 0] = 1.0
    return x


def fog(inputs, severity):
    """A corruption, which may write to the inputs that it is given."""
    return inputs[0].mul_(1 - 0.1 * severity)


def test_a_corruption_may_write_to_its_inputs():
    task = a_task(corruptions={"fog": fog})
    before = task.test.tensors[0].clone()
    checks.check(task)
    assert torch.equal(task.test.tensors[0], before)


def test_a_task_that_keeps_the_rules_passes():
    checks.check(a_task())


def test_a_task_of_two_inputs_passes():
    def pairs(n, seed):
        x, y = data(n, seed=seed).tensors
        return [((x[i], x[i, :2]), y[i]) for i in range(n)]

    checks.check(
        a_task(
            model=Function(lambda a, b: a[:, :3] + b.sum(1, keepdim=True)),
            example=(torch.randn(5, 4), torch.randn(5, 2)),
            **{split: pairs(6, seed) for seed, split in enumerate(SPLITS)},
        )
    )


def test_a_task_with_random_augmentation_and_a_second_output_of_another_order_passes():
    lstm = nn.LSTM(4, 3, num_layers=2, batch_first=True).eval()
    model = Function(lambda x: (x[:, :3] + 0.01 * lstm(x.unsqueeze(1))[0][:, 0], lstm(x.unsqueeze(1))[1]))
    checks.check(
        a_task(
            model=model,
            train=Jittered(*data(12, seed=1).tensors),
            score=lambda output, target: -functional.cross_entropy(output[0], target, reduction="none"),
            loss=lambda output, target: functional.cross_entropy(output[0], target),
        )
    )


def test_check_leaves_the_weights_and_the_random_state_unchanged():
    task = a_task()
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    state = torch.get_rng_state()
    checks.check(task)
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in task.model.parameters())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": torch.relu}, "must be a torch.nn.Module, got builtin"),
        ({"model": nn.Linear(4, 3)}, r"in eval mode, but `model` is in training mode. Call `model.eval\(\)`"),
        ({"example": [torch.randn(5, 4)]}, r"a tuple of arguments or a mapping of keywords, got list"),
        ({"example": {"x": torch.randn(5, 4)}}, r"must accept `example` as keywords, but .* raised TypeError"),
        ({"example": ()}, "of one batch size"),
        ({"example": (torch.randn(5, 4), torch.randn(4, 4))}, r"one batch size.*\(5, 4\), \(4, 4\)"),
        ({"example": (torch.randn(5, 9),)}, "must accept `example`, but .* raised RuntimeError: mat1 and mat2"),
        ({"example": (torch.randn(5, 4, device="meta"),)}, "on the CPU, found meta"),
        ({"model": Function(lambda x: x.sum())}, r"batch first: `example` holds 5 examples.*shape \(\)"),
        ({"model": Function(lambda x: x[:3])}, r"batch first.*\(3, 4\)"),
        ({"model": Function(lambda x: "no")}, "the output holds no tensor"),
        ({"model": Function(lambda x: x / 0)}, "outputs must be finite, but on `example`"),
        ({"model": Function(lambda x: x * torch.rand(()))}, "same outputs for the same inputs"),
        ({"model": Function(lambda x: x - x.mean(0))}, "must not depend on the rest of its batch"),
        ({"model": Function(write_to)}, "must leave its inputs unchanged"),
        ({"model": Function(lambda x: x.view(5, 4))}, "batch of any size"),
        ({"test": data(0)}, "`test` must hold at least one example"),
        ({"validation": iter(())}, "`validation` must be a map-style dataset"),
        ({"train": [1, 2]}, r"`train\[0\]` must give \(inputs, target\)"),
        ({"train": [("text", 1)]}, r"inputs of `train\[0\]` must be a tensor"),
        ({"test": Jittered(*data(6).tensors)}, r"`test\[0\]` differs when read twice"),
        ({"calibration": data(6, features=5)}, r"`calibration\[0\]` has \[\(\(5,\), torch.float32\)\]"),
        ({"score": lambda output, target: output.mean()}, r"shape \(5,\) for `train\[.*\]`, got shape \(\)"),
        ({"score": lambda output, target: 0.5}, "got float"),
        ({"score": lambda output, target: target / 0}, "`score` must be finite"),
        ({"score": lambda output, target: output.nonsense}, "raised AttributeError"),
        ({"loss": lambda output, target: output.sum(1)}, r"`loss` must return a scalar tensor, got shape \(5,\)"),
        ({"loss": lambda output, target: output.sum() / 0}, "`loss` must be finite, got -?inf"),
        ({"loss": lambda output, target: output.detach().sum()}, "must be differentiable"),
        ({"corruptions": [torch.neg]}, "`corruptions` must map names to functions, got list"),
        ({"corruptions": {"two\nlines": fog}}, "`corruptions` must be a text of 1 to 80 characters on one line"),
        (
            {"corruptions": {"fog": 0.5}},
            r"`corruptions\['fog'\]` must be a function of \(inputs, severity\), got float",
        ),
        ({"corruptions": {"PGD": fog}}, "must not be called clean, FGSM or PGD, got 'PGD'"),
        ({"corruptions": {"fog": lambda inputs: inputs}}, "a severity from 1 to 5, such as 1, but it raised TypeError"),
        ({"corruptions": {"fog": lambda inputs, severity: inputs[0][:, :severity]}}, r"\(5, 1\).* at severity 1"),
        ({"corruptions": {"fog": lambda inputs, severity: inputs[0].double()}}, "same shapes and types.*float64"),
        ({"corruptions": {"fog": lambda inputs, severity: [0]}}, "same shapes and types.*int"),
        ({"corruptions": {"fog": lambda inputs, severity: inputs[0] / (severity < 4)}}, "finite.*severity 4"),
        ({"corruptions": {"fog": lambda inputs, severity: 1 / 0}}, "raised ZeroDivisionError"),
        (
            {"corruptions": {"fog": lambda inputs, severity: inputs[0] + torch.rand(())}},
            "must return the same.*manual_",
        ),
    ],
)
def test_a_broken_rule_is_named_with_its_value(changes, says):
    with pytest.raises(InvalidTask, match=says):
        checks.check(a_task(**changes))


def test_an_output_that_is_not_finite_is_found_by_split_and_batch():
    inputs, labels = data(7, seed=4).tensors
    inputs[6] = 1e38
    task = a_task(model=Function(lambda x: x * 100), test=TensorDataset(inputs, labels))
    with pytest.raises(InvalidTask, match=r"on `test\[.*6.*\]` some are not"):
        checks.check(task)


@given(shared=st.integers(1, 6))
def test_overlapping_splits_are_named_and_counted(shared):
    train, other = data(12, seed=1), data(7, seed=4)
    other.tensors[0][:shared] = train.tensors[0][:shared]
    with pytest.raises(InvalidTask, match=rf"`train` and `test` share {shared} input"):
        checks.check(a_task(train=train, test=other))


@given(size=st.integers(1, 20), batch_size=st.integers(1, 9))
def test_batches_give_every_example_once_and_in_order(size, batch_size):
    parts = list(batches(data(size), batch_size))
    assert all(isinstance(inputs, tuple) and len(inputs[0]) == len(target) for inputs, target in parts)
    assert torch.equal(torch.cat([inputs[0] for inputs, _ in parts]), data(size).tensors[0])
    assert [len(target) for _, target in parts[:-1]] == [batch_size] * (len(parts) - 1)


def test_batches_of_no_example_are_refused():
    with pytest.raises(InvalidInput, match="`batch_size` must be at least 1, got 0"):
        next(batches(data(3), 0))


def test_layers_are_the_modules_with_parameters_of_their_own():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()))
    assert modules.layers(model) == ("0", "2.0")


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["head"], ("head",)),
        (["stages.0"], ("stages.0.conv1", "stages.0.bn1")),
        (["*.conv1", "stem"], ("stem.0", "stages.0.conv1", "stages.1.conv1")),
        (["*"], NAMES),
        ([], ()),
    ],
)
def test_a_pattern_matches_layers_and_everything_in_a_parent(patterns, found):
    assert modules.matching(NAMES, patterns) == found


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name():
    with pytest.raises(InvalidInput, match=r"'stages\.0\.conv' matches none\. Did you mean `stages\.0\.conv1`\?"):
        modules.matching(NAMES, ["head", "stages.0.conv"])


def test_an_unknown_name_is_refused_with_the_nearest_and_all_allowed():
    with pytest.raises(InvalidInput, match=r"digits-cnn, digits-lstm.*got 'digits-cn'.*`digits-cnn`"):
        loader.load("digits-cn")


def test_a_missing_file_is_refused_with_the_nearest(tmp_path):
    (tmp_path / "my_task.py").touch()
    with pytest.raises(InvalidInput, match=r"no such file\. Did you mean `my_task\.py`\?"):
        loader.load(tmp_path / "my_tsk.py")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", r"must define a function `task\(\)`, found nothing"),
        ("def tasks():\n    pass\n", r"found tasks\. Did you mean `tasks`"),
        ("def task():\n    return 3\n", "must return a shrinkkit.tasks.Task, got int"),
        ("x = (\n", r"wrong\.py:1 raised SyntaxError"),
        ("x = 1\nimport nosuchmodule\n", r"wrong\.py:2 \(`import nosuchmodule`\) raised ModuleNotFoundError"),
        ("def task():\n    return int('x')\n", r"wrong\.py:2 \(`return int\('x'\)`\) raised ValueError: invalid"),
        ("import sys\nsys.exit(3)\n", r"wrong\.py:2 .* raised SystemExit: 3"),
    ],
)
def test_what_is_wrong_in_a_file_is_reported_with_its_line(tmp_path, text, says):
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(InvalidTask, match=says):
        loader.load(tmp_path / "wrong.py")


def test_the_cause_of_an_error_in_a_file_is_kept(tmp_path):
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    with pytest.raises(InvalidTask) as caught:
        loader.load(tmp_path / "wrong.py")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


TINY = """
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset
from shrinkkit import Task
from tiny_network import network

print("a user's own words")

def task():
    torch.manual_seed(0)

    def part():
        inputs = torch.randn(6, 4)
        return TensorDataset(inputs, inputs[:, :3].argmax(1))

    return Task(network().eval(), torch.randn(2, 4), "tiny", train=part(), calibration=part(), validation=part(),
                test=part(), score=lambda o, t: (o.argmax(1) == t).float(), loss=nn.functional.cross_entropy)
"""


NETWORK = """
from torch import eye, nn

def network():
    model = nn.Linear(4, 3, bias=False)
    model.weight.data.copy_(eye(3, 4))
    return model
"""


def write_tiny(folder: Path) -> Path:
    (folder / "tiny_network.py").write_text(NETWORK)
    (folder / "tiny.py").write_text(TINY)
    return folder / "tiny.py"


def test_a_file_may_import_modules_in_its_folder(tmp_path):
    path = list(sys.path)
    task = loader.load(write_tiny(tmp_path))
    checks.check(task)
    assert task.name == "tiny"
    assert sys.path == path


@pytest.mark.slow
def test_the_module_prints_layers_and_source_as_json(tmp_path):
    command = [sys.executable, "-m", "shrinkkit.tasks.loader", write_tiny(tmp_path)]
    first, again = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))
    assert first.stdout == again.stdout
    assert "a user's own words" in first.stderr
    (tmp_path / "tiny_network.py").write_text(f"{NETWORK}# changed\n")
    changed = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = json.loads(first.stdout), json.loads(changed.stdout)
    assert before["fingerprint"] != after["fingerprint"]


def test_the_fingerprint_changes_with_the_data_and_the_weights(tmp_path):
    path = write_tiny(tmp_path)
    task = loader.load(path)
    before = loader._contents(task)
    assert loader._contents(loader.load(path)) == before
    assert loader._contents(dataclasses.replace(task, test=Subset(task.test, range(3)))) != before
    other = dataclasses.replace(task, test=[(x + 1, y) for x, y in task.test])
    assert loader._contents(other) != before
    with torch.no_grad():
        next(task.model.parameters()).add_(1)
    assert loader._contents(task) != before


@pytest.mark.slow
def test_the_module_exits_with_2_and_the_reason():
    done = subprocess.run([sys.executable, "-m", "shrinkkit.tasks.loader", "digits-cn"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean `digits-cnn`?" in json.loads(done.stdout)["error"]
