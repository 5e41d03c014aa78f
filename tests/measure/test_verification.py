"""What a verification says in words, and when two speeds are said to differ."""

import dataclasses

import examples
import pytest

from shrinkkit.measure import verification
from shrinkkit.measure.verification import WIDTH, Finding, Verification
from shrinkkit.results.cards import Figures

HERE = {"machine": "xeon-2-cores", "threads": 2}
NOTHING = {field.name: None for field in dataclasses.fields(Figures)}


def reported(value, **changes):
    """Return figures of a target with a speed-up and its latency."""
    latency = examples.around(12 / value, 0.004)
    found = {"machine": "xeon-2-cores", "threads": 2, "timing": "faster", "latency_ms": latency}
    return Figures(**NOTHING | found | {"speedup": examples.around(value, 0.02)} | changes)


def measured(value, *, share=0.02, verdict="faster"):
    """Return a finding with a speed-up here."""
    speedup = examples.around(value, share)
    return Finding("cpu/torch", "model.pt2", "ok", latency_ms=speedup, speedup=speedup, verdict=verdict)


def verified(*found, problems=(), notes=()):
    ok = verification.is_verified(found, problems)
    return Verification("int8", ok, 2, examples.ENVIRONMENT, found, problems, notes)


def test_a_speed_beyond_both_intervals_differs():
    said = verification.compare_with_report(reported(12.2), measured(5.1), **HERE)
    assert said.startswith("report (xeon-2-cores, 2 threads): 12.2")
    assert "here (the same machine and threads): 5.1" in said
    assert said.endswith(": differs.")


@pytest.mark.parametrize(("here", "share"), [(12.3, 0.02), (12.6, 0.03), (12.2, 0.001), (14.0, 0.2)])
def test_a_speed_within_what_the_intervals_allow_does_not_differ(here, share):
    said = verification.compare_with_report(reported(12.2), measured(here, share=share), **HERE)
    assert said.endswith(": no difference can be shown.")


def test_another_machine_and_other_threads_are_named():
    said = verification.compare_with_report(reported(12.2), measured(5.1), machine="epyc-8-cores", threads=8)
    assert "here (another machine, epyc-8-cores, 8 threads instead of 2): " in said


@pytest.mark.parametrize(
    ("before", "after", "where"), [("too noisy", "faster", "there"), ("faster", "too noisy", "here")]
)
def test_nothing_is_told_from_a_timing_that_was_too_noisy(before, after, where):
    said = verification.compare_with_report(reported(12.2, timing=before), measured(5.1, verdict=after), **HERE)
    assert said.endswith(f": inconclusive, too noisy {where}.")


def test_without_a_ratio_times_are_shown_and_nothing_is_concluded():
    said = verification.compare_with_report(reported(12.2, speedup=None), measured(5.1), **HERE)
    assert "0.984 ms (95" in said
    assert said.endswith("There is no ratio to compare.")
    assert "differs" not in said


def test_what_is_wrong_is_concluded_and_fits_a_terminal():
    wrong = Finding("cpu/onnxruntime", "model.onnx", "damaged", "model.onnx is not the file. " * 9)
    text = verification.text(verified(measured(5.1), wrong, notes=("There is no report. " * 9,)))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.splitlines()[0] == "int8 on synthetic-made-up-for-tests-2-cores, 2 threads"
    assert text.endswith("Not verified: cpu/onnxruntime (damaged).")


@pytest.mark.parametrize(
    ("found", "problems", "ok", "said"),
    [
        (
            [measured(2.0)],
            (),
            True,
            "Verified: the files are unchanged and reproduce their reference outputs on cpu/torch.",
        ),
        ([], (), False, "Nothing was verified"),
        ([Finding("cuda/torch", "model.pt2", "cannot run here", "no GPU.")], (), False, "Nothing was verified"),
        (
            [measured(2.0)],
            ("model-card.json is damaged.",),
            False,
            "the folder itself has changed since it was written.",
        ),
        ([measured(2.0), Finding("cpu/openvino", "m", "differs")], (), False, "Not verified: cpu/openvino (differs)."),
        ([measured(2.0), Finding("cpu/openvino", "", "no file", "Refused.")], (), True, "Verified: "),
    ],
)
def test_only_what_was_proved_counts_as_verified(found, problems, ok, said):
    shown = verified(*found, problems=problems)
    assert shown.verified == ok
    assert said in " ".join(verification.text(shown).split())
