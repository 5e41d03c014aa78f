"""Records: to JSON and back, whole or not at all, and no ratio of unequal conditions."""

import dataclasses
import hashlib
import json
import typing

import examples
import pytest
from benchmarks import fuzz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shrinkkit.core import estimate, evidence, machines, measurement, robustness, run_folder, store, variant
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import Comparison, Conditions, Disturbance, TargetRecord, speedup
from shrinkkit.core.robustness import RobustnessRecord
from shrinkkit.core.run_folder import Status
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.core.variant import Variant
from shrinkkit.errors import InvalidInput, LeaseLost, UnfairComparison

STORED = (Variant, TargetRecord, Status, RobustnessRecord)
QUIET = Disturbance(1.9, 0.0, 0.0, 3.0, 0.4, ())
CONDITIONS = Conditions("cpu", "a cpu", "torch", "torchscript", 2, 8, "0" * 64)


def comparison(speedup=2.0, conditions=CONDITIONS, **changes):
    around = Estimate(speedup, speedup * 0.99, speedup * 1.01)
    one = Estimate(1.0, 0.99, 1.01)
    made = Comparison(
        reference="baseline",
        candidate="half",
        conditions=conditions,
        candidate_runtime=conditions.runtime,
        speedup=around,
        median_speedup=around,
        verdict="faster",
        reference_ms=one,
        candidate_ms=one,
        control_ratio=one,
        reference_samples_ms=((1.0, 1.1), (1.2,)),
        candidate_samples_ms=((0.5, 0.6), (0.7,)),
        control_samples_ms=((1.0,), (1.0,)),
        warmup_calls=10,
        steady=True,
        disturbance=QUIET,
        duration_s=1.5,
        seed=0,
    )
    return dataclasses.replace(made, **changes)


WORDS = st.text(max_size=5).map("_{}".format).filter(lambda text: ".." not in text)
"""Any text that may also be a path inside a folder."""


def of_kind(kind):
    """Return a strategy of values of a record's field; sizes are small, because shapes matter and lengths do not."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {f.name: of_kind(hints[f.name]) for f in dataclasses.fields(kind) if f.name != "schema_version"}
        return st.builds(kind, **fields)
    if origin is tuple and arguments[1:] != (...,):
        return st.tuples(*map(of_kind, arguments))
    if origin is tuple:
        return st.lists(of_kind(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(WORDS, of_kind(arguments[1]), max_size=2)
    if arguments:
        return st.one_of(*(st.none() if a is type(None) else of_kind(a) for a in arguments))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    scalars = {str: WORDS, int: st.integers(0, 2**53), float: finite, bool: st.booleans()}
    return scalars.get(kind, st.integers(0, 9))


@pytest.mark.parametrize("kind", STORED)
def test_every_stored_record_survives_the_way_to_json_and_back(tmp_path, kind):
    @settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck), database=None)
    @given(record=of_kind(kind))
    def survives(record):
        store.write(tmp_path / "record.json", record)
        assert store.read(tmp_path / "record.json", kind) == record

    survives()


@pytest.mark.parametrize("kind", STORED)
def test_a_damaged_record_is_read_or_refused_and_nothing_else(tmp_path, kind):
    makers = {
        Variant: lambda: examples.variant("static-int8", examples.recipe_of(precision="static-int8")),
        TargetRecord: lambda: examples.target_record("cpu/torch"),
        Status: examples.status,
        RobustnessRecord: lambda: examples.robustness_record(["baseline", "static-int8"], count=20),
    }
    path, derive = tmp_path / "record.json", {TargetRecord: evidence.derive, RobustnessRecord: robustness.derive}
    store.write(path, makers[kind]())
    text, read = path.read_bytes(), 0

    @settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck), database=None)
    @given(draw=st.randoms(use_true_random=False), is_text=st.booleans())
    def survives(draw, is_text):
        nonlocal read
        path.write_bytes(
            fuzz.mangled(text, draw) if is_text else json.dumps(fuzz.damaged(json.loads(text), draw)).encode()
        )
        try:
            derive.get(kind, dataclasses.asdict)(store.read(path, kind))
        except InvalidInput:
            read += 1

    survives()
    assert read


@pytest.mark.parametrize("kind", STORED)
def test_every_stored_record_says_its_schema_version(kind):
    assert {f.name: f.default for f in dataclasses.fields(kind)}["schema_version"] == SCHEMA_VERSION


def test_records_are_frozen():
    modules = (estimate, machines, measurement, run_folder, variant)
    kinds = {kind for module in modules for kind in vars(module).values() if dataclasses.is_dataclass(kind)}
    assert len(kinds) >= 13
    assert all(kind.__dataclass_params__.frozen for kind in kinds)


def test_raw_samples_keep_their_slots_and_their_digits(tmp_path):
    made = comparison(candidate_samples_ms=((0.1, 0.2), (1 / 3,)))
    store.write(tmp_path / "comparison.json", made)
    assert store.read(tmp_path / "comparison.json", Comparison).candidate_samples_ms == ((0.1, 0.2), (1 / 3,))


def test_a_number_that_json_does_not_know_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "estimate.json"
    store.write(path, Estimate(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="JSON"):
        store.write(path, Estimate(float("nan"), 1.0, 1.0))
    assert store.read(path, Estimate).value == 1.0


def test_a_ratio_of_equal_conditions_is_the_quotient_of_both_speedups():
    assert speedup(comparison(2.0), comparison(3.0)) == 1.5


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Conditions)])
def test_measurements_of_unequal_conditions_are_not_compared(field):
    value = getattr(CONDITIONS, field)
    other = dataclasses.replace(CONDITIONS, **{field: value + 1 if isinstance(value, int) else f"{value}x"})
    candidate = comparison(conditions=other, candidate_runtime="torch")
    with pytest.raises(UnfairComparison, match=f"these differ in {field} .*Measure both on the same target"):
        speedup(comparison(), candidate)


@pytest.mark.parametrize(("field", "said"), [("reference", "baseline"), ("candidate_runtime", "candidate runtime")])
def test_measurements_against_unequal_baselines_or_runtimes_are_not_compared(field, said):
    with pytest.raises(UnfairComparison, match=f"these differ in {said} "):
        speedup(comparison(), comparison(**{field: "another"}))


def test_every_unequal_condition_is_named_at_once():
    other = dataclasses.replace(CONDITIONS, threads=1, batch_size=1)
    with pytest.raises(UnfairComparison, match=r"threads \(2 and 1\), batch_size \(8 and 1\)"):
        speedup(comparison(), comparison(conditions=other))


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_a_damaged_file_is_invalid_and_says_what_to_do(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"must be a JSON record.*Run its step again"):
        store.read(tmp_path / "record.json", Status)


def test_a_missing_file_is_invalid(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be read"):
        store.read(tmp_path / "none.json", Status)


@pytest.mark.parametrize("data", [[], {}, {"value": "fast", "low": 1, "high": 2}, {"value": 1.0, "low": 1.0}])
def test_json_that_is_another_record_is_invalid(tmp_path, data):
    (tmp_path / "record.json").write_text(json.dumps(data))
    with pytest.raises(InvalidInput, match="is not a Estimate record"):
        store.read(tmp_path / "record.json", Estimate)


@pytest.mark.parametrize(("version", "remedy"), [(99, "Update shrinkkit"), (0, "Run the study again")])
def test_a_record_of_another_schema_version_is_refused_with_the_remedy(tmp_path, version, remedy):
    (tmp_path / "status.json").write_text(json.dumps({"schema_version": version}))
    with pytest.raises(InvalidInput, match=f"has schema version {version}.*{remedy}"):
        store.read(tmp_path / "status.json", Status)


def test_write_text_makes_folders_replaces_whole_files_and_leaves_no_others(tmp_path):
    path = tmp_path / "a" / "b.txt"
    store.write_text(path, "first, and longer")
    store.write_text(path, "second ✓")
    assert path.read_text(encoding="utf-8") == "second ✓"
    assert [file.name for file in path.parent.iterdir()] == ["b.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_write_text_that_fails_leaves_the_old_file_and_no_others(tmp_path):
    store.write_text(tmp_path / "b.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        store.write_text(tmp_path / "b.txt", "new \ud800")
    assert (tmp_path / "b.txt").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["b.txt"]


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"weights")
    assert store.sha256(tmp_path / "x") == hashlib.sha256(b"weights").hexdigest()


def test_a_comparison_says_its_verdict_interval_and_noise_floor():
    said = repr(comparison(control_ratio=Estimate(1.0, 0.992, 1.003)))
    assert said.startswith("half vs. baseline: faster, 2.00")
    assert "noise floor 0.8 %" in said
    assert "WARNING" not in said


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"speedup": Estimate(2.0, 1.7, 2.3)}, "the interval is \N{PLUS-MINUS SIGN}16% wide"),
        ({"candidate_samples_ms": ((1.0, 2.0, 3.0, 4.0, 5.0),)}, "latency spread of half: IQR 100%"),
        ({"steady": False}, "the warm-up ended before times were steady"),
        (
            {"disturbance": dataclasses.replace(QUIET, signs=("other processes used 0.9 of 2 cores",))},
            "other processes",
        ),
    ],
)
def test_a_comparison_warns_of_what_makes_it_doubtful(changes, warning):
    assert f"WARNING: {warning}" in repr(dataclasses.replace(comparison(), **changes))


def test_a_process_that_gets_its_lease_after_the_import_keeps_to_it(tmp_path, monkeypatch):
    # As a kernel does that is forked from a process which imported this module for all.
    monkeypatch.setenv(store.VARIABLE, f"token {tmp_path / store.TOKEN}")
    assert store.lease_variable() == {store.VARIABLE: f"token {tmp_path / store.TOKEN}"}
    with pytest.raises(LeaseLost):
        store.write_text(tmp_path / "late.txt", "of a run that has ended")
