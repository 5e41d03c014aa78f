"""How records look by themselves, in a notebook, as text and in a terminal, and what they convert to."""

import json

import examples
import pandas as pd
import pytest
from tiny import task as tiny_task

from shrinkkit.core import store
from shrinkkit.core.studies import read_recipe, read_study
from shrinkkit.core.variant import Variant
from shrinkkit.display.tables import STYLE
from shrinkkit.results import results, verdict


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results.load(examples.write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def record(found):
    return found.measured["cpu/torch"]


@pytest.fixture(scope="module")
def objects(found, record):
    timed = next(one for one in record.measurements if one.latency and one.variant == "static-int8")
    return {
        "task": tiny_task(),
        "recipe": read_recipe("channels-50-static-int8"),
        "study": read_study("digits-cnn"),
        "variant": found.variants["channels-50"],
        "audit": found.variants["channels-50"].audit,
        "record": record,
        "measurement": timed,
        "comparison": timed.latency,
        "accuracy": timed.accuracy,
        "estimate": timed.latency_ms,
        "environment": record.environment,
        "status": found.status,
        "results": found,
        "verdict": verdict.decide(found),
        "row": found.row("static-int8", "cpu/torch"),
    }


SAYS = {
    "task": "128 train, 32 calibration",
    "recipe": "calibration_examples 128",
    "study": "recipe channels-50",
    "variant": "prune-channels ratio 0.5",
    "audit": "32 \N{RIGHTWARDS ARROW} 16",
    "record": "Measured on cpu/torch",
    "measurement": "static-int8 on cpu/torch",
    "comparison": "faster, 1.84",
    "accuracy": "regressions and improvements",
    "estimate": "95 % CI 16.4",
    "environment": "Synthetic CPU",
    "status": "3-quantize-dynamic-int8",
    "results": "unsupported: ONNX Runtime",
    "verdict": "Summary: within budget",
    "row": "speedup.low",
}
ROWS = {
    "task": 1,
    "recipe": 1,
    "study": 3,
    "variant": 1,
    "audit": len(examples.LAYERS),
    "record": len(examples.MADE_UP) + 1,
    "measurement": 1,
    "comparison": 3 * 60 * 3,
    "accuracy": examples.EXAMPLES,
    "estimate": 1,
    "environment": 1,
    "status": 12,
    "results": 18,
    "verdict": 1,
    "row": 1,
}


@pytest.mark.parametrize("name", SAYS)
def test_an_object_says_what_matters_in_every_place(objects, name):
    one = objects[name]
    assert SAYS[name] in repr(one)
    assert one._repr_html_().startswith(STYLE)
    assert SAYS[name].split("[")[0] in one._repr_markdown_()
    assert len(repr(one)) < 8000


@pytest.mark.parametrize("name", SAYS)
def test_an_object_becomes_plain_values(objects, name):
    made = objects[name].to_dict()
    assert made
    assert json.loads(json.dumps(made)) == made


@pytest.mark.parametrize("name", SAYS)
def test_an_object_becomes_a_frame(objects, name):
    frame = objects[name].to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) == ROWS[name]
    assert len(frame.columns) >= 2


def test_a_frame_of_a_benchmark_has_figures_and_no_samples(record):
    frame = record.to_frame().set_index("variant")
    assert frame.loc["channels-50", "latency.speedup.value"] == pytest.approx(2.79, rel=0.01)
    assert not [name for name in frame.columns if "samples" in name or name.endswith("scores")]


def test_a_frame_of_a_timing_holds_the_raw_samples(objects):
    frame = objects["comparison"].to_frame()
    assert set(frame["model"]) == {"baseline", "static-int8", "baseline, a copy"}
    own = frame[frame["model"] == "static-int8"]["ms"]
    assert own.tolist() == [ms for slot in objects["comparison"].candidate_samples_ms for ms in slot]


def test_a_record_read_back_shows_its_audit(tmp_path, objects):
    store.write(tmp_path / "v.json", objects["variant"])
    again = store.read(tmp_path / "v.json", Variant)
    assert again == objects["variant"]
    assert repr(again.audit) == repr(objects["audit"])
