"""What the step notebooks display: every view of a record, with its reasons."""

import dataclasses
from types import SimpleNamespace

import examples
import pytest
from tiny import task as tiny_task
from torch import nn

from shrinkkit.measure import session
from shrinkkit.report import show
from shrinkkit.results import table
from shrinkkit.tasks import modules


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return table.load(examples.write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def record(found):
    return found.measured["cpu/onnxruntime"]


def test_a_task_is_shown_with_its_splits():
    made = tiny_task()
    text = repr(made.shown())
    assert "(4, 1, 8, 8) float32" in text
    assert "128 train, 32 calibration, 30 validation, 42 test" in text


def test_layers_are_listed_by_the_work_they_do():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 9))
    lines = repr(modules.layers_table(model, {"0": 6, "2": 18})).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["2", "0"]
    assert "75.0 %" in lines[2]


def test_no_fine_tuning_is_said():
    assert "No fine-tuning" in repr(show.training((), metric="accuracy"))
    assert "0.962" in repr(show.training((0.91, 0.962), metric="accuracy"))


def test_files_name_the_runtime_that_has_none_and_why(found):
    text = repr(show.files(found.variants["float16"]))
    assert "562 kB" in text
    assert "no file: ONNX Runtime has no float16 kernels" in text


def test_a_variant_says_what_was_asked_for_and_what_was_reached(found):
    assert "49.7 % of 50.0 % asked for" in repr(show.variant(found.variants["channels-50"]))
    assert "none: this is the model as it was" in repr(show.variant(found.variants["baseline"]))


def test_an_audit_has_every_layer_and_the_reason_for_those_left_alone(found):
    made = show.audit(found.variants["channels-50-static-int8"])
    assert len(made.rows) == len(examples.LAYERS)
    assert "16 of 18 layers lost channels" in made.caption
    assert "17 of 18 run in int8 in torch" in made.caption
    assert "its outputs are the model's; in `skip`" in repr(made)


def test_trials_say_why_a_variant_was_not_loaded():
    trial = {"error": "", "load_ms": 41.0, "first_call_ms": None, "file_sha256": "ab" * 32}
    loaded = {
        "half": SimpleNamespace(**trial),
        "gone": SimpleNamespace(**{**trial, "error": "There is no such variant."}),
    }
    text = repr(session.loaded_table(loaded))
    assert "41.0 ms" in text
    assert "There is no such variant." in text


def test_accuracies_are_paired_with_the_baseline(record):
    found = {m.variant: m.accuracy for m in record.measurements if m.accuracy}
    text = repr(show.accuracies(found, {"broken": "scores are not finite"}))
    assert "2000 examples" in text
    assert "reference" in text
    assert "scores are not finite" in text
    assert "2000 examples" in repr(show.fidelity({"torch": found["channels-50"]}))


def test_measurements_keep_errors_in_place(record):
    text = repr(show.measurements(record))
    assert "ONNX Runtime has no float16 kernels" in text
    assert "load average 1.7" in text


def test_audits_of_a_run_survive_an_empty_one(found):
    empty = dataclasses.replace(found, variants={})
    assert len(show.audits(found).parts) == len(found.variants) - 1
    assert "No variant was made" in repr(show.audits(empty))


def test_what_became_smaller_is_a_factor():
    assert "4.00\N{MULTIPLICATION SIGN}" in repr(show.shrunk(parameters=[800, 200], macs=[100, 50]))


def test_a_trade_names_speed_and_score_with_their_intervals(record):
    one = next(one for one in record.measurements if one.variant == "static-int8")
    text = repr(show.trade(one.latency, one.accuracy))
    assert "2.16" in text
    assert text.count("95 % CI") == 2
