import pytest
import torch
from builds import write_variants
from tiny import Corner
from tiny import task as tiny_task
from torch import nn

from shrinkkit import Task
from shrinkkit.core import store
from shrinkkit.core.measurement import TargetRecord
from shrinkkit.core.target import Target
from shrinkkit.errors import InvalidInput
from shrinkkit.measure import session
from shrinkkit.measure.session import Settings
from shrinkkit.transforms import variants

pytestmark = pytest.mark.usefixtures("same_threads")

TORCH, ONNX = Target("cpu", "torch"), Target("cpu", "onnxruntime")


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    precisions = {"baseline": "float32", "int8": {"static-int8": {"calibration_examples": 32}}}
    return write_variants(tmp_path_factory.mktemp("run"), task, precisions, ["torch", "onnxruntime"])


def swept(run, task, target, **options):
    loaded = session.load(run, [], Settings(target, task, threads=1))
    sizes = {"batch_sizes": [1, 4, 9], "thread_counts": [1, 2]} | options
    return session.sweep(loaded, Settings(target, task, threads=1), **sizes)


@pytest.mark.parametrize("target", [TORCH, ONNX], ids=lambda t: t.runtime)
def test_every_variant_has_a_point_at_each_other_batch_size_and_number_of_threads(run, task, target):
    points = swept(run, task, target)
    settings = [(1, 1), (9, 1), (4, 2)]
    assert [(p.variant, p.batch_size, p.threads) for p in points] == [
        (name, *setting) for setting in settings for name in ("baseline", "int8")
    ]
    assert all(p.error == "" and p.latency_ms.value > 0 for p in points)
    for p in points:
        if p.variant == "int8":
            here = p.latency.conditions
            assert (here.batch_size, here.threads, here.runtime) == (p.batch_size, p.threads, target.runtime)
    assert len({p.latency.conditions.inputs_sha256 for p in points if p.latency}) == 3
    assert torch.get_num_threads() == 1


def test_points_survive_the_disk(run, task, tmp_path):
    loaded = session.load(run, ["int8"], Settings(ONNX, task, threads=1))
    points = session.sweep(loaded, Settings(ONNX, task, threads=1), batch_sizes=[1], thread_counts=[])
    record = session.record(Settings(ONNX, task, threads=1), loaded, sweep=points)
    store.write(tmp_path / "record.json", record)
    assert store.read(tmp_path / "record.json", TargetRecord).sweep == points


def test_a_file_with_a_fixed_batch_says_so_and_the_others_go_on(task, tmp_path):
    class Fixed(Corner):
        def forward(self, x):
            return super().forward(x.reshape(4, *x.shape[1:]))

    fixed = Fixed()
    fixed.load_state_dict(task.model.state_dict())
    for name, model in (("baseline", task.model), ("fixed", fixed), ("free", task.model)):
        folder = tmp_path / "variants" / name
        variants.write(folder, task, model.eval(), runtimes=["torch"])
    points = {p.variant: p for p in swept(tmp_path, task, TORCH, batch_sizes=[9], thread_counts=[])}
    assert points["fixed"].error.startswith("It does not take a batch of 9")
    assert points["fixed"].latency is None
    assert points["free"].latency.conditions.batch_size == 9


def test_a_batch_that_the_model_itself_rejects_is_told_and_the_others_go_on(tmp_path):
    class NotNine(Corner):
        def forward(self, x):
            if x.shape[0] == 9:
                raise ValueError("nine is too many")
            return super().forward(x)

    task = tiny_task(NotNine())
    for name in ("baseline", "again"):
        variants.write(tmp_path / "variants" / name, task, task.model, runtimes=["torch", "onnxruntime"])
    points = swept(tmp_path, task, ONNX, batch_sizes=[9], thread_counts=[2])
    found = {(p.variant, p.batch_size, p.threads): p.error for p in points}
    assert found["again", 9, 1].startswith("The model itself does not take a batch of 9")
    assert found["again", 4, 2] == ""


def test_what_the_time_does_not_suffice_for_is_said(run, task):
    loaded = session.load(run, [], Settings(TORCH, task, threads=1))
    points = session.sweep(loaded, Settings(TORCH, task, threads=1), batch_sizes=[1], thread_counts=[2], budget_s=0.0)
    assert [p.error for p in points if p.variant == "int8"] == [
        "The time for workloads and other batch sizes and threads was used up."
    ] * 2
    assert all(p.latency is None for p in points)


@pytest.mark.parametrize("name", ["batch_sizes", "thread_counts"])
def test_sizes_below_one_are_refused_before_anything_is_timed(task, name):
    with pytest.raises(InvalidInput, match=f"`{name}` must be whole numbers >= 1, got 0"):
        session.sweep(
            {}, Settings(TORCH, task, threads=1), **({"batch_sizes": [], "thread_counts": []} | {name: [8, 0]})
        )


class Tokens(nn.Module):
    """A class of each token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, ids):
        return self.layers(ids)


IDS = torch.arange(24).reshape(2, 12) % 9
PRECISIONS = {"baseline": "float32", "int8": "dynamic-int8"}


def test_workloads_are_points_with_their_own_baseline_and_tokens_per_second(tmp_path):
    lengths = {"short": IDS[:, :3], "long": IDS.repeat(1, 40)}
    task = Task(Tokens().eval(), IDS, varying=(frozenset({1}),), workloads=lengths, counts_tokens=True)
    write_variants(tmp_path, task, PRECISIONS, ["onnxruntime"])
    points = swept(tmp_path, task, ONNX, batch_sizes=[1], thread_counts=[])
    settings = [("short", 2, 6), ("long", 2, 960), ("", 1, 12)]
    assert [(p.workload, p.batch_size, p.tokens, p.variant, p.error) for p in points] == [
        (*setting, name, "") for setting in settings for name in ("baseline", "int8")
    ]
    short, long = points[0], points[2]
    assert short.latency_ms.value < long.latency_ms.value
    assert long.throughput.value == pytest.approx(1e3 * 960 / long.latency_ms.value)
    assert long.throughput.low == pytest.approx(1e3 * 960 / long.latency_ms.high)


def test_a_workload_that_a_file_does_not_take_is_told_by_its_name(tmp_path):
    write_variants(tmp_path, Task(Tokens().eval(), IDS), PRECISIONS, ["onnxruntime"])
    task = Task(Tokens().eval(), IDS, varying=(frozenset({1}),), workloads={"short": IDS[:, :3]})
    baseline, other = swept(tmp_path, task, ONNX, batch_sizes=[], thread_counts=[])
    assert baseline.error == "No variant could be timed against it here."
    assert other.error.startswith("It does not take short: ")


def test_a_larger_batch_repeats_the_example_and_a_smaller_one_cuts_it():
    x = torch.arange(3).unsqueeze(1)
    (large,), (small,) = session.batch((x,), 5), session.batch((x,), 2)
    assert large.flatten().tolist() == [0, 1, 2, 0, 1]
    assert small.flatten().tolist() == [0, 1]
