"""The books of a run: what a later run keeps of an earlier one."""

import pytest

from shrinkkit.core import store
from shrinkkit.core.status import Status, Step
from shrinkkit.pipeline.journal import Journal, done, log, status

OWN = Step("4-benchmark-cpu-torch", "4-benchmark", "cpu/torch", "pending")
AWAY = Step("4-benchmark-cpu-torch-epyc", "4-benchmark", "cpu/torch @ epyc", "done", 2.0, inputs_sha256="ab")
PLANNED = [Step("1-baseline", "1-baseline", "baseline", "pending"), OWN, Step("5-report", "5-report", "", "pending")]


def silent(line, final):
    pass


def names(folder):
    return [step.name for step in status(folder).steps]


@pytest.fixture
def before(tmp_path):
    """A folder in which a run ended, measured on another machine too."""
    made = Step("1-baseline", "1-baseline", "baseline", "done", 3.0)
    failed = Step("3-quantize-old", "3-quantize", "old", "failed", error="no")
    steps = (made, failed, AWAY, Step("5-report", "5-report", "", "done"))
    store.write(tmp_path / "status.json", Status("shrinkkit run first", "2026-01-02", steps))
    return tmp_path


def test_a_new_journal_holds_every_step_as_pending(tmp_path):
    Journal(tmp_path, "shrinkkit run", PLANNED, silent)
    assert names(tmp_path) == [step.name for step in PLANNED]
    assert {step.state for step in status(tmp_path).steps} == {"pending"}
    assert done(tmp_path) == {}


def test_a_whole_run_forgets_steps_that_it_has_no_more_but_not_what_other_machines_measured(before):
    Journal(before, "shrinkkit run second", PLANNED, silent)
    assert names(before) == ["1-baseline", OWN.name, AWAY.name, "5-report"]
    assert status(before).command == "shrinkkit run second"
    assert status(before).steps[2] == AWAY


def test_a_part_of_a_run_leaves_everything_else_as_it_was(before):
    known = status(before)
    Journal(before, "shrinkkit run --only", PLANNED[1:], silent, only=True)
    assert names(before) == ["1-baseline", "3-quantize-old", AWAY.name, OWN.name, "5-report"]
    assert status(before).steps[:3] == known.steps[:3]
    assert (status(before).command, status(before).started) == (known.command, known.started)


def test_progress_counts_the_steps_to_take_alone(before):
    said = []
    journal = Journal(before, "", PLANNED[1:], lambda line, final: said.append((line, final)), only=True)
    journal.set(OWN.name, state="running")
    journal.tick(OWN.name, 3.2)
    journal.set(OWN.name, state="done", duration_s=4.0)
    assert said == [
        (f"[1/2] {OWN.name}", False),
        (f"[1/2] {OWN.name} · 3 s", False),
        (f"[1/2] {OWN.name} · done · 4.0 s", True),
    ]
    assert "done · 4.0 s" in (before / "run.log").read_text()


def test_an_interruption_is_written_down_for_the_step_that_ran(before):
    journal = Journal(before, "", PLANNED, silent)
    journal.set(OWN.name, state="running")
    journal.close()
    assert {step.name: step.state for step in status(before).steps}[OWN.name] == "interrupted"
    assert journal.step("1-baseline").state == "pending"


def test_a_status_that_cannot_be_read_vouches_for_nothing(tmp_path):
    (tmp_path / "status.json").write_text("{")
    assert status(tmp_path) is None
    assert done(tmp_path) == {}


def test_the_log_grows_by_lines_with_the_time_and_not_by_nothing(tmp_path):
    log(tmp_path, "one")
    log(tmp_path, " ")
    log(tmp_path, "two")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["one", "two"]
