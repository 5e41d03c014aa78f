"""The status of a run: what a later run keeps of an earlier one, and the progress that is reported."""

from dataclasses import replace

import examples
import pytest

from shrinkkit.core import store
from shrinkkit.core.run_folder import RunFolder, Status, Step
from shrinkkit.pipeline.run_status import Monitor, RunStatus, describe, log, read, succeeded

OWN = Step("4-benchmark-cpu-torch", "4-benchmark", "cpu/torch", "pending")
AWAY = Step("4-benchmark-cpu-torch-epyc", "4-benchmark", "cpu/torch @ epyc", "done", 2.0, inputs_sha256="ab")
PLANNED = [Step("1-baseline", "1-baseline", "baseline", "pending"), OWN, Step("5-report", "5-report", "", "pending")]


class Recording(Monitor):
    def __init__(self):
        self.seen = []

    def step(self, progress):
        self.seen.append(progress)


def status(folder):
    return read(RunFolder(folder))


def names(folder):
    return [step.name for step in status(folder).steps]


@pytest.fixture
def before(tmp_path):
    """A folder in which a run ended, measured on another machine too."""
    made = Step("1-baseline", "1-baseline", "baseline", "done", 3.0)
    failed = Step("3-quantize-old", "3-quantize", "old", "failed", error="no")
    steps = (made, failed, AWAY, Step("5-report", "5-report", "", "done"))
    store.write(tmp_path / "status.json", Status("shrinkkit run first", "2026-01-02", steps))
    store.write(RunFolder(tmp_path).variant_record("baseline"), examples.variant("baseline", examples.recipe_of()))
    return tmp_path


def test_a_new_journal_holds_every_step_as_pending(tmp_path):
    RunStatus(RunFolder(tmp_path), "shrinkkit run", PLANNED, Monitor())
    assert names(tmp_path) == [step.name for step in PLANNED]
    assert {step.state for step in status(tmp_path).steps} == {"pending"}
    assert succeeded(RunFolder(tmp_path)) == {}


def test_a_whole_run_forgets_steps_that_it_has_no_more_but_not_what_other_machines_measured(before):
    RunStatus(RunFolder(before), "shrinkkit run second", PLANNED, Monitor())
    assert names(before) == ["1-baseline", OWN.name, AWAY.name, "5-report"]
    assert status(before).command == "shrinkkit run second"
    assert status(before).steps[2] == AWAY


def test_a_part_of_a_run_leaves_everything_else_as_it_was(before):
    known = status(before)
    RunStatus(RunFolder(before), "shrinkkit run --only", PLANNED[1:], Monitor(), partial=True)
    assert names(before) == ["1-baseline", "3-quantize-old", AWAY.name, OWN.name, "5-report"]
    assert status(before).steps[:3] == known.steps[:3]
    assert (status(before).command, status(before).started) == (known.command, known.started)


def test_progress_counts_the_planned_steps_alone_and_tells_phase_and_time(before):
    monitor = Recording()
    run_status = RunStatus(RunFolder(before), "", PLANNED[1:], monitor, partial=True)
    run_status.set(OWN.name, state="running")
    run_status.tick(OWN.name, 0.5, "Latency")
    run_status.set(OWN.name, state="done", duration_s=4.0)
    started, under_way, ended = monitor.seen
    assert [progress.position for progress in monitor.seen] == ["[1/2]"] * 3
    assert (under_way.phase, under_way.current.duration_s) == ("Latency", 0.5)
    # The benchmark of the other machine took 2 s.
    assert (started.left_s(started.current), under_way.left_s(under_way.current)) == (2.0, 1.5)
    assert under_way.left_s(under_way.steps[1]) is None
    assert ended.left_s(ended.current) == 0.0
    assert [progress.best for progress in monitor.seen] == ["", "", "best so far: none within the budget"]
    assert describe(ended.current) == f"{OWN.name} · done · 4.0 s"
    assert "done · 4.0 s" in (before / "run.log").read_text()


def test_what_a_step_takes_now_refines_what_is_expected_of_others_of_its_kind(tmp_path):
    kind = [Step(f"4-benchmark-{name}", "4-benchmark", name, "done", 10.0) for name in "abc"]
    report = Step("5-report", "5-report", "", "done", 4.0)
    store.write(tmp_path / "status.json", Status("", "", (*kind[:2], report)))
    store.write(RunFolder(tmp_path).variant_record("baseline"), examples.variant("baseline", examples.recipe_of()))
    monitor = Recording()
    planned = [replace(step, state="pending", duration_s=0.0) for step in (*kind, report)]
    run_status = RunStatus(RunFolder(tmp_path), "", planned, monitor)
    run_status.set("4-benchmark-a", state="running")
    assert [monitor.seen[-1].left_s(step) for step in monitor.seen[-1].steps] == [10.0, 10.0, 10.0, 4.0]
    run_status.set("4-benchmark-a", state="done", duration_s=30.0)
    assert [monitor.seen[-1].left_s(step) for step in monitor.seen[-1].steps] == [0.0, 30.0, 20.0, 4.0]


def test_an_interruption_is_written_down_for_the_step_that_ran(before):
    run_status = RunStatus(RunFolder(before), "", PLANNED, Monitor())
    run_status.set(OWN.name, state="running")
    run_status.interrupt()
    assert {step.name: step.state for step in status(before).steps}[OWN.name] == "interrupted"
    assert run_status["1-baseline"].state == "pending"


def test_a_status_that_cannot_be_read_vouches_for_nothing(tmp_path):
    (tmp_path / "status.json").write_text("{")
    assert status(tmp_path) is None
    assert succeeded(RunFolder(tmp_path)) == {}


def test_the_log_grows_by_lines_with_the_time_and_not_by_nothing(tmp_path):
    log(RunFolder(tmp_path), "one")
    log(RunFolder(tmp_path), " ")
    log(RunFolder(tmp_path), "two")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["one", "two"]
