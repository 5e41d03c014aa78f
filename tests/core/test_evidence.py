"""Every figure of a record follows from its raw samples, and every row agrees with the others of its target."""

import dataclasses
import json

import examples
import pytest

from shrinkkit.core import estimate, evidence, store
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import TargetRecord
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.errors import InvalidInput
from shrinkkit.results import results

TARGET = "cpu/onnxruntime"


@pytest.fixture(scope="module")
def record():
    return examples.target_record(TARGET)


def measurement(record, name):
    return next(m for m in record.measurements if m.variant == name)


def test_a_record_that_was_derived_is_derived_as_it_is(record):
    assert evidence.derive(record) == record
    assert evidence.contradictions(record, evidence.derive(record)) == ()


def test_every_latency_is_the_baseline_s_over_the_speed_up(record):
    base = measurement(record, "baseline").latency_ms.value
    timed = [m for m in record.measurements if m.latency]
    assert len(timed) >= 5
    for one in timed:
        assert one.latency_ms.value == pytest.approx(base / one.latency.speedup.value)
        assert one.latency_ms.low <= one.latency_ms.value <= one.latency_ms.high


def test_one_baseline_is_pooled_over_all_comparisons(record):
    compared = [m.latency.reference_ms.value for m in record.measurements if m.latency]
    assert min(compared) <= measurement(record, "baseline").latency_ms.value <= max(compared)
    assert len(set(compared)) == len(compared)


def test_the_module_of_today_takes_what_its_comparison_says(record):
    base = measurement(record, "baseline").latency_ms.value
    assert evidence.today_ms(record).value == pytest.approx(base * record.runtime.speedup.value)


def test_points_of_one_batch_share_a_baseline(record):
    alike = [p for p in record.sweep if (p.batch_size, p.threads) == (1, 2)]
    base = next(p.latency_ms.value for p in alike if p.variant == "baseline")
    point = next(p for p in alike if p.latency)
    assert point.latency_ms.value == pytest.approx(base / point.latency.speedup.value)


def edited(record, name, **changes):
    """Return the record with fields of one variant's measurement, comparison or accuracy changed."""

    def change(of):
        for part in ("latency", "accuracy"):
            own = {k: v for k, v in changes.items() if hasattr(getattr(of, part), k)}
            of = dataclasses.replace(of, **{part: dataclasses.replace(getattr(of, part), **own)})
        return dataclasses.replace(of, **{k: v for k, v in changes.items() if hasattr(of, k)})

    made = tuple(change(m) if m.variant == name else m for m in record.measurements)
    return dataclasses.replace(record, measurements=made)


EDITS = [
    {"speedup": Estimate(100.0, 99.0, 101.0)},
    {"speedup": Estimate(1.0, 0.999, 1.001)},
    {"verdict": "same"},
    {"control_ratio": Estimate(1.0, 1.0, 1.0)},
    {"latency_ms": Estimate(0.01, 0.01, 0.01)},
    {"mean": Estimate(1.0, 1.0, 1.0)},
    {"difference": Estimate(0.1, 0.09, 0.11)},
    {"difference": None},
    {"regressions": 0},
]


@pytest.mark.parametrize("changes", EDITS, ids=lambda changes: next(iter(changes)))
def test_an_edited_figure_is_replaced_by_what_the_samples_say_and_named(record, tmp_path, changes):
    folder = examples.write_run(tmp_path / "run")
    path = folder / RunFolder("").measurement(TARGET, record.machine).as_posix()
    store.write(path, edited(record, "channels-50", **changes))
    found = results.load(folder)
    assert found.measured[TARGET] == record
    (note,) = [note for note in found.notes if "contradict" in note]
    assert "channels-50" in note


@pytest.mark.parametrize(
    "samples",
    [((1.0,), (1.0,)), ((1.0,),) * 3, ((1.0,), (0.0,), (1.0,), (1.0,)), ((1.0,), (), (1.0,), (1.0,)), ((-1.0,),) * 4],
    ids=["one block", "half a block", "zero", "empty slot", "negative"],
)
def test_samples_that_are_no_blocks_of_times_are_refused(record, samples):
    with pytest.raises(InvalidInput, match=r"at least 2 blocks"):
        evidence.derive(edited(record, "channels-50", candidate_samples_ms=samples))


def test_a_record_whose_samples_are_cut_is_a_note_and_no_number(record, tmp_path):
    folder = examples.write_run(tmp_path / "run")
    path = folder / RunFolder("").measurement(TARGET, record.machine).as_posix()
    data = json.loads(path.read_text())
    timed = next(m for m in data["measurements"] if m["latency"])
    timed["latency"]["candidate_samples_ms"] = timed["latency"]["candidate_samples_ms"][:3]
    path.write_text(json.dumps(data))
    found = results.load(folder)
    assert TARGET not in found.measured
    assert any("cannot be used" in note for note in found.notes)
    assert {row.state for row in found.rows if row.target == TARGET} <= {"not run", "unsupported", "failed"}


def test_a_withheld_comparison_stays_without_a_verdict(record):
    own = measurement(record, "channels-50").latency
    withheld = dataclasses.replace(own, disturbance=dataclasses.replace(own.disturbance, withheld=True))
    assert evidence.comparison(withheld).verdict == "too noisy"
    assert evidence.comparison(dataclasses.replace(own, stopped=True)).verdict == "undecided"


def test_changes_within_rounding_are_none():
    assert evidence.changes([1.0, 0.5, 0.0], [1.0 + 1e-9, 0.4, 0.3]) == [0.0, pytest.approx(-0.1), 0.3]


def test_without_variants_the_baseline_s_latency_is_that_beside_the_module(record):
    alone = dataclasses.replace(record, measurements=(measurement(record, "baseline"),), sweep=())
    found = evidence.derive(alone)
    assert measurement(found, "baseline").latency_ms == found.runtime.candidate_ms
    assert evidence.today_ms(found).value == pytest.approx(found.runtime.reference_ms.value)


def test_speed_ups_and_latencies_of_every_row_agree(tmp_path):
    found = results.load(examples.write_run(tmp_path / "run"))
    for row in (row for row in found.rows if row.speedup):
        base = found.row("baseline", row.target)
        assert base.latency_ms.value / row.latency_ms.value == pytest.approx(row.speedup.value)
        today = evidence.today_ms(found.measured[row.target])
        assert today.value / row.latency_ms.value == pytest.approx(row.speedup_today.value)


def test_the_json_of_a_record_keeps_what_is_derived(record, tmp_path):
    store.write(tmp_path / "r.json", record)
    assert evidence.derive(store.read(tmp_path / "r.json", TargetRecord)) == record
    assert estimate.inverse(Estimate(2.0, 1.0, 4.0)) == Estimate(0.5, 0.25, 1.0)
