"""The tables of a report: complete for a whole run, and still there for one that got nowhere."""

import dataclasses

import examples
import pytest

from shrinkkit.report import overview
from shrinkkit.results import table
from shrinkkit.results.table import Row

VIEWS = (
    overview.title,
    overview.verdict,
    overview.variants,
    overview.missing,
    overview.factors,
    overview.tradeoff,
    overview.environment,
    overview.model_files,
    overview.steps,
    overview.commands,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return examples.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def found(run):
    return table.load(run)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_every_view_survives_a_run_that_got_nowhere(view, found):
    rows = tuple(Row(row.variant, row.target, "not run", "it was interrupted") for row in found.rows)
    empty = dataclasses.replace(found, rows=rows, variants={}, measured={}, status=None, study=None)
    shown = view(empty)
    assert shown.html()
    assert shown.markdown()
    assert repr(shown)


def test_the_variants_are_shown_target_by_target_with_failures_in_place(found):
    text = repr(overview.variants(found))
    assert text.count("failed: Unsupported") == 2
    assert "cpu/onnxruntime: the unchanged model takes 23.4 ms here" in text
    assert "the verdict" in text


def test_a_masked_variant_is_said_to_be_no_smaller(found):
    assert "weights-80: 79.7 % of the weights are zero, yet the file is no smaller" in repr(overview.variants(found))


def test_what_is_missing_is_listed_once_with_its_targets(found):
    text = overview.missing(found).markdown()
    assert text.count("| dynamic-int8 | cpu/torch, cpu/onnxruntime | failed |") == 1
    assert "| float16 | cpu/onnxruntime | refused |" in text


def test_a_complete_run_says_that_nothing_is_missing(found):
    complete = dataclasses.replace(found, rows=tuple(row for row in found.rows if row.state == "measured"))
    assert "Nothing is missing" in repr(overview.missing(complete))


def test_equal_machines_are_described_once(found):
    assert repr(overview.environment(found)).count(examples.CPU) == 1


def test_model_files_have_their_whole_hash(found):
    assert examples.digest("channels-50", "torch") in repr(overview.model_files(found))


def test_steps_link_to_their_pages_beside_the_report(found):
    assert 'href="steps/1-baseline.html"' in overview.steps(found).html()
    assert "(steps/4-benchmark-cpu-torch.html)" in overview.steps(found).markdown()


def test_the_command_is_shown_as_it_was_given(found):
    assert "shrinkkit run digits-cnn" in repr(overview.commands(found))


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """A run that was also measured on another machine, on one of its targets."""
    return table.load(examples.write_two_machines(tmp_path_factory.mktemp("run"), targets=("cpu/torch",)))


def test_each_of_several_machines_has_a_section_with_its_name_its_rows_and_its_facts(away):
    text = overview.variants(away).html()
    own, other = text.split("<h3>")[1:]
    assert own.startswith(f"{examples.HERE}: {examples.CPU}</h3>")
    assert other.startswith(f"{examples.ELSEWHERE}: {examples.OTHER_CPU}</h3>")
    assert "Linux-synthetic" in own
    assert "Linux-elsewhere" not in own
    assert "Linux-elsewhere" in other
    assert f"cpu/torch @ {examples.HERE}: the unchanged model takes 30.2 ms here" in own
    assert f"cpu/torch @ {examples.ELSEWHERE}: the unchanged model takes 7.55 ms here" in other
    assert other.count("<table") == 2
    assert "the verdict" in other


def test_one_machine_has_no_section_of_its_own(found):
    assert "<h3>" not in overview.variants(found).html()
    assert examples.HERE not in "".join(view(found).html() for view in VIEWS)


def test_the_title_says_which_machine_measured_what(away):
    said = f"on {examples.HERE} (cpu/torch, cpu/onnxruntime); {examples.ELSEWHERE} (cpu/torch)"
    assert said in repr(overview.title(away))


def test_figures_of_several_machines_name_the_machine(away):
    for view in (overview.factors, overview.tradeoff, overview.missing):
        text = view(away).html()
        assert examples.HERE in text
        assert f"cpu/torch @ {examples.ELSEWHERE}" in text


def test_the_command_of_another_machine_is_shown_with_its_targets(away):
    text = repr(overview.commands(away))
    assert f"Then on {examples.ELSEWHERE}" in text
    assert "shrinkkit run reports/synthetic --only benchmark --target cpu/torch" in text


def test_a_machine_that_measured_nothing_still_has_its_section(away):
    empty = dataclasses.replace(away, measured={})
    assert f"<h3>{examples.ELSEWHERE}</h3>" in overview.variants(empty).html()
