"""The tables of a report: complete for a whole run, and still there for one that got nowhere."""

import dataclasses

import examples
import pytest

from shrinkkit import overview, results

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
    return results.load(run)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_every_view_survives_a_run_that_got_nowhere(view, found):
    rows = tuple(results.Row(row.variant, row.target, "not run", "it was interrupted") for row in found.rows)
    empty = dataclasses.replace(found, rows=rows, variants={}, measured={}, status=None, study=None)
    shown = view(empty)
    assert shown._repr_html_()
    assert shown._repr_markdown_()
    assert repr(shown)


def test_the_variants_are_shown_target_by_target_with_failures_in_place(found):
    text = repr(overview.variants(found))
    assert text.count("failed: Unsupported") == 2
    assert "cpu/onnxruntime: FP32 takes 23.3 ms here" in text
    assert "the verdict" in text


def test_a_masked_variant_is_said_to_be_no_smaller(found):
    assert "weights-80: 79.7 % of the weights are zero, yet the file is no smaller" in repr(overview.variants(found))


def test_what_is_missing_is_listed_once_with_its_targets(found):
    text = overview.missing(found)._repr_markdown_()
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
    assert 'href="steps/1-baseline.html"' in overview.steps(found)._repr_html_()
    assert "(steps/4-benchmark-cpu-torch.html)" in overview.steps(found)._repr_markdown_()


def test_the_command_is_shown_as_it_was_given(found):
    assert "shrinkkit run digits-cnn" in repr(overview.commands(found))
