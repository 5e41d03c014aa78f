"""Attempts to get a false number past the report: forms of file, chance, classes, continuous scores."""

import dataclasses
import time

import architectures
import examples
import numpy as np
import pytest
import torch
from builds import write_variants
from tiny import task as tiny_task
from torch import nn

from shrinkkit.core import estimate
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import ClassScore
from shrinkkit.core.target import Target
from shrinkkit.errors import UnfairComparison
from shrinkkit.measure import benchmark, session
from shrinkkit.measure.benchmark import TimedModel
from shrinkkit.measure.session import Settings
from shrinkkit.measure.timing import Protocol
from shrinkkit.results import results, verdict
from shrinkkit.runtimes import base, files
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.torch import quantize
from shrinkkit.transforms import variants

pytestmark = pytest.mark.usefixtures("one_thread", "same_threads")

TORCH = Target("cpu", "torch")


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    """A run of float, int8 and 16-bit files on torch."""
    precisions = {"baseline": "float32", "dynamic-int8": "dynamic-int8", "bfloat16": "bfloat16"}
    precisions["static-int8"] = {"static-int8": {"calibration_examples": 32}}
    return write_variants(tmp_path_factory.mktemp("run"), task, precisions, ["torch"])


def test_baseline_and_every_variant_on_torch_run_in_one_form(run, task):
    loaded = session.load(run, [], Settings(TORCH, task, threads=1))
    assert {trial.loaded.form for trial in loaded.values()} == {"torchscript"}
    assert len(loaded) == 4


@pytest.mark.parametrize("name", sorted(architectures.MODELS))
def test_every_architecture_has_a_script_of_its_graph_that_takes_any_batch(name, tmp_path):
    make, example = architectures.MODELS[name]
    torch.manual_seed(0)
    model, inputs = make().eval(), example()
    path, form, note = torch_build.write(model, inputs, tmp_path)
    assert (form, note) == ("torchscript", "")
    loaded = files.load(path, runtime="torch")
    larger = tuple(torch.cat([x, x[:1]]) for x in inputs)
    with torch.inference_mode():
        for batch in (inputs, larger):
            assert base.max_relative_error(model(*batch), loaded(*batch)) < 1e-4


def test_another_form_of_the_same_file_is_refused(run, task, tmp_path):
    loaded = session.load(run, ["bfloat16"], Settings(TORCH, task, threads=1))
    path, _ = torch_build.write_program(task.model, task.example, tmp_path)
    program = files.load(path, runtime="torch")
    assert program.form == "graph"
    loaded["bfloat16"] = dataclasses.replace(loaded["bfloat16"], loaded=program)
    compared, errors = session.compare_latency(loaded, Settings(TORCH, task, threads=1))
    assert compared == {}
    assert "form" in errors["bfloat16"]


def test_the_module_is_compared_with_its_file_across_forms_only_where_that_is_asked():
    here = Settings(TORCH, tiny_task(), threads=1).conditions("eager")
    with pytest.raises(UnfairComparison, match="form"):
        benchmark.time_pair(
            TimedModel("a", lambda: None, here),
            TimedModel("b", lambda: None, dataclasses.replace(here, form="torchscript")),
        )


class Padded(nn.Module):
    """Does thirty times the work where it is exported, and answers the same."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        y = self.model(x)
        if torch.compiler.is_exporting():
            for _ in range(30):
                y = y + 1e-12 * self.model(x + 1e-12 * y.mean())
        return y


def test_a_model_that_does_more_work_once_it_is_exported_is_named(task, tmp_path):
    padded = dataclasses.replace(task, model=Padded(task.model).eval())
    variants.write(tmp_path / "variants/baseline", padded, padded.model, runtimes=["torch"])
    loaded = session.load(tmp_path, [], settings := Settings(TORCH, padded, threads=1, effort="quick"))
    found = session.compare_runtimes(loaded, settings)
    assert found.speedup.high < 0.5
    loaded = results.load(examples.write_run(tmp_path / "run"))
    slower = dataclasses.replace(loaded.measured["cpu/torch"], runtime=dataclasses.replace(found, verdict="slower"))
    told = verdict.decide(dataclasses.replace(loaded, measured=loaded.measured | {"cpu/torch": slower}))
    assert "Without compression" in told.sentence


class Slow(nn.Module):
    """Sleeps in Python, which no file of it does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        time.sleep(0.0 if torch.compiler.is_exporting() else 0.002)
        return self.model(x)


def test_what_only_the_user_s_module_spends_is_no_merit_of_a_compression(task, tmp_path):
    slow = dataclasses.replace(task, model=Slow(task.model).eval())
    for name, precision in (("baseline", "float32"), ("half", "bfloat16")):
        variants.write(tmp_path / "variants" / name, slow, slow.model, precision=precision, runtimes=["torch"])
    loaded = session.load(tmp_path, [], settings := Settings(TORCH, slow, threads=1, effort="quick"))
    assert session.compare_runtimes(loaded, settings).speedup.low > 2
    compared, _ = session.compare_latency(loaded, settings, protocol=Protocol(cap_s=1.0))
    assert compared["half"].speedup.value < 2


@pytest.mark.parametrize("engine", torch.backends.quantized.supported_engines)
def test_copies_of_an_int8_file_compute_with_the_engine_that_it_was_packed_for(engine, tmp_path):
    if engine == "none":
        pytest.skip("no engine")
    make, example = architectures.MODELS["squeeze and excite"]
    torch.manual_seed(0)
    model, inputs = make().eval(), example()
    made = quantize.static_int8(model, inputs, [inputs], engine=engine)
    path, *_ = torch_build.write(made, inputs, tmp_path)
    loaded = files.load(path, runtime="torch")
    first, again = loaded(*inputs), loaded.clone()(*inputs)
    assert torch.equal(first, again)


def truly_losing(rng, baseline, points):
    """Return 0/1 scores of which so many in expectation are lost that the true change is -`points` / 100."""
    lost = (rng.random(len(baseline)) < points / 100 / baseline.mean()) & (baseline == 1)
    return np.where(lost, 0.0, baseline)


@pytest.mark.parametrize("count", [1, 7, 20])
def test_of_many_variants_that_cost_too_much_hardly_ever_is_one_called_within_the_budget(count):
    rng, studies = np.random.default_rng(count), 200
    wrong = 0
    for _ in range(studies):
        baseline = (rng.random(800) < 0.99).astype(float)
        wrong += any(estimate.within(baseline, [truly_losing(rng, baseline, 1.01) for _ in range(count)], 0.01))
    # 2.5 % of 200 is 5; more than 11 would come in one of 200 such tests.
    assert wrong <= 11


@pytest.mark.parametrize("count", [1, 7])
def test_variants_that_cost_nothing_are_mostly_called_within_the_budget(count):
    rng, found = np.random.default_rng(count), []
    for _ in range(50):
        baseline = (rng.random(1500) < 0.99).astype(float)
        found += estimate.within(baseline, [truly_losing(rng, baseline, 0.05) for _ in range(count)], 0.01)
    assert np.mean(found) > 0.8


@pytest.mark.parametrize("count", [20, 50, 100, 400])
def test_intervals_of_continuous_scores_cover_a_variant_that_ruins_few_examples(count):
    rng, covered = np.random.default_rng(count), 0
    for _ in range(200):
        before = rng.beta(8, 2, count)
        ruined = rng.random(count) < 0.03
        after = before + rng.normal(0, 0.002, count) - 0.5 * ruined
        found = estimate.paired_difference(before, after)
        covered += found.low <= -0.015 <= found.high
    assert covered >= 186


@pytest.mark.parametrize("count", [20, 50, 100])
def test_few_continuous_scores_are_never_enough_for_a_budget_of_a_point(count):
    before = np.random.default_rng(0).beta(8, 2, count)
    assert estimate.within(before, [before], 0.01) == (False,)


def test_one_variant_is_within_the_budget_exactly_where_its_interval_is():
    rng = np.random.default_rng(0)
    for _ in range(100):
        before = (rng.random(400) < 0.95).astype(float)
        after = np.where(rng.random(400) < 0.01, 1 - before, before)
        drop = float(rng.choice([0.005, 0.01, 0.02]))
        inside = estimate.paired_difference(before, after).low >= -drop
        assert estimate.within(before, [after], drop) == (inside,)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results.load(examples.write_run(tmp_path_factory.mktemp("run")))


def with_class(found, difference, examples_=12):
    """Return the results where the verdict's own variant has a class with this change."""
    row = verdict.decide(found).row
    record = found.measured[row.target]
    one = ClassScore("rare", examples_, Estimate(0.0, 0.0, 0.3), difference)
    made = tuple(
        dataclasses.replace(m, accuracy=dataclasses.replace(m.accuracy, classes=(one,)))
        if m.variant == row.variant
        else m
        for m in record.measurements
    )
    return dataclasses.replace(
        found, measured=found.measured | {row.target: dataclasses.replace(record, measurements=made)}
    )


def test_a_class_that_is_given_up_is_named_beside_the_headline(found):
    told = verdict.decide(with_class(found, Estimate(-1.0, -1.0, -0.6)))
    assert told.kind == "within budget"
    assert any("rare" in text and "12 examples" in text for cause in told.warnings for text in cause.sentences)


@pytest.mark.parametrize("difference", [Estimate(-0.1, -0.3, 0.1), Estimate(0.0, -0.2, 0.2), None])
def test_a_class_that_may_have_lost_nothing_is_not_named(found, difference):
    assert "rare" not in verdict.decide(with_class(found, difference)).sentence


def test_a_machine_whose_speed_changed_between_targets_is_told(found):
    assert "speed changed" not in verdict.decide(found).sentence
    record = found.measured["cpu/torch"]
    slower = tuple(
        dataclasses.replace(m, latency_ms=estimate.product(m.latency_ms, Estimate(1.5, 1.5, 1.5)))
        if m.latency_ms
        else m
        for m in record.measurements
    )
    drifted = found.measured | {"cpu/torch": dataclasses.replace(record, measurements=slower)}
    assert "speed changed" in verdict.decide(dataclasses.replace(found, measured=drifted)).sentence
