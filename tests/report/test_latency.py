"""How fast, and how surely: what a reader sees of a comparison."""

import dataclasses

import examples
import pytest

from shrinkkit.display import cells
from shrinkkit.report import latency
from shrinkkit.results import table


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return table.load(examples.write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def record(found):
    return found.measured["cpu/onnxruntime"]


@pytest.fixture(scope="module")
def latencies(record):
    return {m.variant: m.latency for m in record.measurements if m.latency}


def test_latencies_show_the_verdict_the_control_and_contention(latencies):
    text = repr(latency.latencies(latencies))
    assert "faster" in text
    assert "load average 1.7 on 2 cores" in text
    assert "median speed-up" in text
    assert "noise floor" in text
    assert "nothing to time" in repr(latency.latencies({}))


def test_a_machine_that_was_not_steady_is_named(latencies):
    shaky = dataclasses.replace(latencies["channels-50"], steady=False, verdict="too noisy")
    text = repr(latency.latencies({"shaky": shaky}))
    assert "ended before times were steady" in text
    assert "too noisy" in text


def test_distributions_are_pictures_or_a_sentence(latencies):
    assert "<svg" in latency.distributions(latencies).html()
    assert "no times" in repr(latency.distributions({}))


def test_the_factor_of_a_runtime_is_shown_where_there_is_one(record):
    assert "onnxruntime" in repr(latency.runtime(record.runtime))
    assert "no file here" in repr(latency.runtime(None))


def test_timings_of_a_run_survive_an_empty_one(found):
    assert len(latency.timings(found).parts) == 2 * len(found.measured)
    assert "Nothing was timed" in repr(latency.timings(dataclasses.replace(found, measured={})))


def test_a_speed_up_is_a_cell_with_interval_and_verdict(latencies):
    cell = cells.speedup(latencies["static-int8"].speedup, latencies["static-int8"].verdict)
    assert (cell.text, cell.tone) == ("2.16\N{MULTIPLICATION SIGN}", "good")
    assert cell.aside.endswith("faster")


def test_timings_of_several_machines_name_the_machine(tmp_path):
    away = table.load(examples.write_two_machines(tmp_path / "run", targets=("cpu/torch",)))
    text = repr(latency.timings(away))
    assert len(away.measured) == 3
    for target in away.measured:
        assert f"Every comparison on {away.where(target)}" in text
