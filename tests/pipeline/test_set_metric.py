"""A whole study judged by a metric of the whole set where lower is better."""

import json
import re
import subprocess
import sys

import usertasks

from shrinkkit import load_results

BODY = """
of["score"] = Metric(lambda out, y: nn.functional.cross_entropy(out, y).exp(), "perplexity", higher_is_better=False)
of["metrics"] = {"accuracy": Metric(score, per_example=True)}
of["notes"] = ("A note of the task.",)
"""


def test_a_study_of_perplexity_states_the_true_numbers_and_the_direction(tmp_path):
    usertasks.write(tmp_path, head="from shrinkkit import Metric\n", body=BODY)
    options = "--recipe dynamic-int8 --target cpu/torch --accuracy-drop 0.5 --set budget.unit=score --threads 1".split()
    command = [sys.executable, "-m", "shrinkkit.cli", "run", "small.py", *options]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=900).stdout
    assert "score: perplexity (lower is better)" in " ".join(shown.split())
    assert "A note of the task." in " ".join(shown.split())
    run = tmp_path / "reports" / "small"
    lines = (run / "run.log").read_text().splitlines()
    assert [line for line in lines if not re.match(r"\d{4}-\d\d-\d\dT", line)] == [], "noise of libraries"
    assert shown.index("no estimate yet") < shown.index("[1/4] 1-baseline") < shown.index("best so far: ")
    found = load_results(run)
    row = found.row("dynamic-int8", "cpu/torch")
    assert (found.higher_is_better, found.is_fraction, row.accuracy_verdict) == (False, False, "within budget")
    accuracies = [m.accuracy for m in found.measured["cpu/torch"].measurements]
    assert all(1 < one.mean.value < 3 for one in accuracies)
    assert row.difference.value == accuracies[1].mean.value - accuracies[0].mean.value
    assert [one.metric for one in accuracies[1].further] == ["accuracy"]
    report = (run / "report.md").read_text()
    assert "perplexity (lower is better)" in report
    assert "Further metrics on the test split" in report
    assert report.count("A note of the task.") == 1
    assert not found.notes, "figures stated and derived again differ"
    written = json.loads((run / "results.json").read_text())
    assert (written["higher_is_better"], written["task_notes"]) == (False, ["A note of the task."])
    assert "replicates" not in json.dumps(written)
