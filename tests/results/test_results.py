"""A run folder as rows: whatever is missing from it, no variant and no target is left out."""

import dataclasses

import examples
import pytest

from shrinkkit.core import store
from shrinkkit.core.run_folder import RunFolder, Status, Step
from shrinkkit.core.variant import Variant
from shrinkkit.errors import InvalidInput
from shrinkkit.results import results

AWAY = f"cpu/torch @ {examples.ELSEWHERE}"


@pytest.fixture
def run(tmp_path):
    return examples.write_run(tmp_path / "run")


def states(found, variant):
    return {row.target: row.state for row in found.rows if row.variant == variant}


def test_every_variant_has_a_row_on_every_target(run):
    found = results.load(run)
    assert [(r.variant, r.target) for r in found.rows] == [(n, t) for n in found.names for t in examples.TARGETS]
    assert found.names[0] == "baseline"
    assert found.notes == ()


def test_a_failed_step_gives_failed_rows_with_the_cause(run):
    row = results.load(run).row("dynamic-int8", "cpu/torch")
    assert row.state == "failed"
    assert "found no layer to quantize" in row.reason


def test_a_refusal_is_no_failure(run):
    found = results.load(run)
    assert states(found, "float16") == {"cpu/torch": "measured", "cpu/onnxruntime": "unsupported"}
    assert {row.variant for row in results.failures(found)} == {"dynamic-int8"}


def test_a_pruned_intermediate_is_marked(run):
    assert {row.variant for row in results.load(run).rows if row.intermediate} == {"narrow-int8.stage-1"}


def test_a_step_skipped_for_another_names_the_cause_of_that_one(run):
    steps = list(examples.status().steps)
    at = {step.name: i for i, step in enumerate(steps)}
    broken, skipped = at["2-prune-narrow-int8.stage-1"], at["3-quantize-narrow-int8"]
    steps[broken] = Step("2-prune-narrow-int8.stage-1", "2-prune", "narrow-int8.stage-1", "failed", error="no room")
    why = "It needs 2-prune-narrow-int8.stage-1, which failed."
    steps[skipped] = Step("3-quantize-narrow-int8", "3-quantize", "narrow-int8", "skipped", error=why)
    store.write(run / "status.json", Status("", "", tuple(steps)))
    assert results.load(run).row("narrow-int8", "cpu/torch").reason.endswith("failed: no room")


def test_a_target_without_a_record_is_not_run_and_keeps_the_sizes(run):
    (run / RunFolder("").measurement("cpu/torch", examples.HERE).as_posix()).unlink()
    found = results.load(run)
    row = found.row("channels-50", "cpu/torch")
    assert (row.state, row.size_bytes, row.latency_ms) == ("not run", 292_000, None)
    assert found.row("channels-50", "cpu/onnxruntime").state == "measured"


def test_a_damaged_record_is_a_row_with_a_reason_and_a_note(run):
    (run / "variants" / "static-int8" / "variant.json").write_text("{")
    found = results.load(run)
    assert set(states(found, "static-int8").values()) == {"failed"}
    assert "static-int8/variant.json" in found.notes[0]
    assert str(run) not in found.notes[0]


def make_again(folder):
    """Put other files into a variant's folder, as its step does when it is taken again."""
    files = store.read(folder / "variant.json", Variant).files
    for file in files:
        (folder / file.path).write_text("other")
    other = store.sha256(folder / files[0].path)
    examples.change_json(folder / "variant.json", files=[dict(dataclasses.asdict(f), sha256=other) for f in files])


def test_a_file_that_changed_since_it_was_measured_has_no_numbers(run):
    make_again(run / "variants" / "channels-50")
    row = results.load(run).row("channels-50", "cpu/torch")
    assert row.state == "not run"
    assert "has changed" in row.reason


def test_an_interrupted_run_says_that_it_can_go_on(run):
    steps = [Step("3-quantize-static-int8", "3-quantize", "static-int8", "interrupted")]
    store.write(run / "status.json", Status("", "", tuple(steps)))
    (run / "variants" / "static-int8" / "variant.json").unlink()
    assert "again to resume" in results.load(run).row("static-int8", "cpu/torch").reason


def test_a_variant_that_the_study_does_not_name_is_noted(run):
    store.write(run / "variants" / "old" / "variant.json", examples.variant("weights-80", examples.recipe_of()))
    found = results.load(run)
    assert "old" not in found.names
    assert any("old" in note for note in found.notes)


def test_a_folder_filled_by_hand_has_rows_for_what_it_holds(run):
    (run / "study.json").unlink()
    (run / "status.json").unlink()
    found = results.load(run)
    assert set(found.targets) == set(examples.TARGETS)
    assert found.row("channels-50", "cpu/torch").state == "measured"
    assert "Created from notebooks" in found.notes[0]


def test_a_study_that_never_ran_is_all_rows_not_run(run):
    for path in [*run.glob("variants/*/variant.json"), *run.glob("measurements/*/*"), run / "status.json"]:
        path.unlink()
    found = results.load(run)
    assert {row.state for row in found.rows} == {"not run", "unsupported"}


def test_a_folder_without_a_run_is_unsupported_with_the_remedy(tmp_path):
    with pytest.raises(InvalidInput, match="shrinkkit run digits-cnn"):
        results.load(tmp_path)


def test_accuracy_is_within_budget_only_if_the_whole_interval_is(run):
    record = results.load(run).measured["cpu/torch"]
    verdicts = results.accuracy_verdicts(record, 0.01)
    assert (verdicts["weights-80"], verdicts["narrow-int8"]) == ("within budget", "over budget")
    assert set(results.accuracy_verdicts(record, 0.0).values()) <= {"cannot tell", "over budget"}


def test_speed_against_torch_is_the_product_with_the_runtime(run):
    row = results.load(run).row("channels-50", "cpu/onnxruntime")
    assert row.speedup_today.value == pytest.approx(3.31 * 30.1 / 23.3, rel=0.01)
    assert row.timing_today == "faster"


@pytest.fixture
def away(tmp_path):
    """A run that was also measured on another machine, on one of its targets."""
    return examples.write_two_machines(tmp_path / "away", targets=("cpu/torch",))


def test_what_another_machine_measured_has_rows_of_its_own(away):
    found = results.load(away)
    assert found.machines == (examples.HERE, examples.ELSEWHERE)
    own, other = found.row("channels-50", "cpu/torch"), found.row("channels-50", AWAY)
    assert (own.state, other.state) == ("measured", "measured")
    assert own.speedup.value == pytest.approx(2.79, rel=0.01)
    assert other.speedup.value == pytest.approx(2.79**0.5, rel=0.01)
    assert own.file_sha256 == other.file_sha256


def test_speed_against_torch_is_that_of_the_same_machine(tmp_path):
    found = results.load(examples.write_two_machines(tmp_path / "run"))
    for target in (t for t in found.targets if t.startswith("cpu/onnxruntime")):
        row, runtime = found.row("channels-50", target), found.measured[target].runtime
        assert row.speedup_today.value == pytest.approx(row.speedup.value * runtime.speedup.value)
        assert runtime.conditions.hardware == found.measured[target].environment.cpu


def test_what_no_recipe_can_have_on_a_target_is_unsupported_on_every_machine(tmp_path):
    found = results.load(examples.write_two_machines(tmp_path / "run"))
    assert states(found, "float16")[f"cpu/onnxruntime @ {examples.ELSEWHERE}"] == "unsupported"


def test_the_part_of_a_machine_holds_its_rows_alone_and_still_knows_of_the_others(away):
    part = results.load(away).of(examples.ELSEWHERE)
    assert part.targets == tuple(part.measured) == (AWAY,)
    assert {row.target for row in part.rows} == {AWAY}
    assert part.machines == (examples.HERE, examples.ELSEWHERE)


def test_a_reader_is_told_the_machine_only_where_there_are_several(away, run):
    assert results.load(run).where("cpu/torch") == "cpu/torch"
    assert results.load(away).where("cpu/torch") == f"cpu/torch @ {examples.HERE}"
    assert results.load(away).where(AWAY) == AWAY


def test_a_variant_that_changed_since_another_machine_measured_it_says_what_to_do_there(away):
    make_again(away / "variants" / "channels-50")
    row = results.load(away).row("channels-50", AWAY)
    assert row.state == "not run"
    assert f"Measure it on {examples.ELSEWHERE} again" in row.reason
