import copy
import dataclasses
from random import Random

import numpy as np
import pytest
import torch
from clock import Clock
from torch import nn

from shrinkkit.core import store
from shrinkkit.core.evidence import PairedSamples, conclude
from shrinkkit.core.measurement import Comparison, Conditions
from shrinkkit.errors import InvalidInput, UnfairComparison
from shrinkkit.measure import benchmark, timing
from shrinkkit.measure.benchmark import TimedModel
from shrinkkit.measure.timing import Protocol
from shrinkkit.runtimes.torch import quantize

HERE = Conditions(
    device="cpu",
    hardware="a processor",
    runtime="torch",
    form="torchscript",
    threads=1,
    batch_size=8,
    inputs_sha256="0" * 64,
)
OTHER = {
    "device": "cuda",
    "hardware": "another",
    "runtime": "onnxruntime",
    "form": "eager",
    "threads": 2,
    "batch_size": 1,
    "inputs_sha256": "1" * 64,
}
INPUTS = (torch.linspace(-1, 1, 32).reshape(4, 8),)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def compare(make_reference, make_candidate, **options) -> Comparison:
    return benchmark.time_pair(
        TimedModel("baseline", make_reference, HERE),
        TimedModel("variant", make_candidate, HERE),
        protocol=Protocol(**options),
    )


@pytest.mark.parametrize("field", list(OTHER))
def test_models_under_different_conditions_are_refused(field):
    with pytest.raises(UnfairComparison, match=field):
        benchmark.time_pair(
            TimedModel("a", unused, HERE),
            TimedModel("b", unused, dataclasses.replace(HERE, **{field: OTHER[field]})),
        )


@pytest.mark.parametrize("field", [name for name in OTHER if name not in ("runtime", "form")])
def test_runtimes_under_different_conditions_are_refused(field):
    with pytest.raises(UnfairComparison, match=field):
        benchmark.time_pair(
            TimedModel("a", unused, HERE),
            TimedModel("b", unused, dataclasses.replace(HERE, runtime="onnxruntime", **{field: OTHER[field]})),
            across_runtimes=True,
        )


def unused():
    raise AssertionError("a model was loaded before the conditions were compared")


def test_every_condition_is_compared():
    assert set(OTHER) == {field.name for field in dataclasses.fields(Conditions)}


def test_runtimes_alone_may_differ_where_they_are_what_is_compared(clock):
    found = benchmark.time_pair(
        TimedModel("baseline", clock.models(lambda: 3.0), HERE),
        TimedModel("baseline", clock.models(lambda: 1.5), dataclasses.replace(HERE, runtime="onnxruntime")),
        across_runtimes=True,
    )
    assert (found.conditions.runtime, found.candidate_runtime) == ("torch", "onnxruntime")
    assert found.speedup.value == pytest.approx(2.0)


def test_a_planted_slow_down_is_found_with_the_right_direction_and_size(clock):
    found = compare(clock.models(lambda: 3.0), clock.models(lambda: 6.0))
    # Other work on the machine that runs this test may withhold the verdict, never turn it.
    assert found.verdict in ("slower", "too noisy")
    assert found.speedup.value == found.median_speedup.value == pytest.approx(0.5)
    assert (found.reference_ms.value, found.candidate_ms.value) == pytest.approx((3.0, 6.0))
    assert found.control_ratio.value == pytest.approx(1.0)


def test_more_real_work_takes_longer():
    def multiply(size):
        a = np.ones((size, size), dtype=np.float32)
        return lambda: lambda: a @ a

    found = compare(multiply(64), multiply(256), cap_s=0.3)
    assert found.speedup.value < 0.5
    assert found.verdict in ("slower", "too noisy")


def test_a_comparison_keeps_its_raw_samples_and_survives_the_disk(clock, tmp_path):
    random = Random(0)
    make = clock.models(lambda: random.uniform(1.0, 1.1))
    found = compare(make, make, seed=7)
    store.write(tmp_path / "comparison.json", found)
    assert store.read(tmp_path / "comparison.json", Comparison) == found
    assert found.seed == 7
    samples = [ms for slot in found.reference_samples_ms for ms in slot]
    assert all(ms == float(f"{ms:.6g}") for ms in samples)


def test_what_is_said_follows_from_the_samples_that_are_kept(clock):
    random = Random(0)
    found = compare(clock.models(lambda: random.uniform(1.0, 1.2)), clock.models(lambda: random.uniform(0.5, 0.6)))
    kept = PairedSamples(*map(list, (found.reference_samples_ms, found.candidate_samples_ms, found.control_samples_ms)))
    again = conclude(kept, seed=found.seed)
    assert again.speedup.value == pytest.approx(found.speedup.value, rel=1e-5)
    assert again.control_ratio.high == pytest.approx(found.control_ratio.high, rel=1e-5)


def layers(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4)).eval()


def time_models(reference, candidate, example=INPUTS, **options) -> Comparison:
    return benchmark.compare(reference, candidate, example, cap_s=0.1, threads=1, **options).latency


def test_two_modules_are_timed_as_they_are_and_left_unchanged():
    one, other = layers(), layers(512)
    before = copy.deepcopy(one.state_dict())
    threads = torch.get_num_threads()
    found = time_models(one, other, names=("narrow", "wide"))
    assert (found.reference, found.candidate) == ("narrow", "wide")
    assert (found.conditions.device, found.conditions.threads, found.conditions.batch_size) == ("cpu", 1, 4)
    assert found.speedup.value < 1
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert torch.get_num_threads() == threads


def test_a_quantized_module_is_timed_with_the_engine_it_was_packed_for():
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    for engine in ("onednn", "fbgemm"):
        if engine in torch.backends.quantized.supported_engines:
            quantized = quantize.dynamic_int8(model, INPUTS, engine=engine)
            assert time_models(model, quantized).candidate_ms.value > 0


@pytest.mark.parametrize("position", [0, 1])
def test_a_module_in_training_mode_is_refused_and_named(position):
    models = [layers(), layers()]
    models[position][1].train()
    with pytest.raises(InvalidInput, match=f"{('reference', 'candidate')[position]} must be in eval mode, but `1`"):
        time_models(*models)


def test_a_module_that_rejects_the_example_is_refused_and_named():
    with pytest.raises(InvalidInput, match=r"candidate must accept `example`, of shapes \[\(4, 8\)\]"):
        time_models(layers(), nn.Linear(9, 4).eval())


def test_a_module_that_gives_nan_is_refused_before_any_timing():
    broken = layers()
    broken[2].bias.data[1] = float("nan")
    with pytest.raises(InvalidInput, match="candidate gives NaN or infinity"):
        time_models(layers(), broken)


def test_a_module_that_is_random_in_eval_mode_is_refused():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(InvalidInput, match="two calls of reference on the same inputs differ"):
        time_models(Noisy().eval(), layers())


def test_a_module_that_writes_to_its_input_is_refused():
    example = (torch.ones(4, 8),)
    with pytest.raises(InvalidInput, match="candidate must leave its inputs unchanged"):
        time_models(layers(), nn.Sequential(nn.Threshold(2, 0, inplace=True)).eval(), example)


def test_modules_on_another_device_than_the_inputs_are_refused():
    with pytest.raises(UnfairComparison, match="must be on one device, found cpu, meta"):
        time_models(layers(), layers().to("meta"))


def test_inputs_of_other_values_or_another_memory_format_have_another_hash():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    hashes = {benchmark.inputs_sha256((t,)) for t in (x, x + 1, x.double(), x.to(memory_format=torch.channels_last))}
    assert len(hashes) == 4
    assert benchmark.inputs_sha256((x.clone(),)) == benchmark.inputs_sha256((x,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_more_work_on_a_gpu_takes_longer():
    def multiply(size):
        a = torch.ones(size, size, device="cuda")
        return lambda: lambda: a @ a

    there = dataclasses.replace(HERE, device="cuda")
    found = benchmark.time_pair(
        TimedModel("small", multiply(512), there),
        TimedModel("large", multiply(8192), there),
        protocol=Protocol(cap_s=1.0),
    )
    assert found.speedup.value < 0.5
