"""The transform of docs/techniques.md, installed from outside and taken through everything."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import task as tiny_task

from shrinkkit.core import stages, store, studies
from shrinkkit.core.run_folder import Status
from shrinkkit.core.variant import Variant
from shrinkkit.errors import InvalidInput
from shrinkkit.pipeline import plan, runner
from shrinkkit.pipeline.run_status import Monitor
from shrinkkit.results import breakdown, results
from shrinkkit.transforms import variants

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "techniques.md").read_text()
TASK = Path(__file__).parent.parent / "tiny.py"


def block(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    """Install the code of the page, here and in every process that a run starts."""
    site = tmp_path_factory.mktemp("site")
    for text in block("python"):
        name, code = re.match(r"# (\S+)\n(.*)", text, re.DOTALL).groups()
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(code)
    group, entry = re.match(r'\[project\.entry-points\."(.*?)"\]\n(.*)', block("toml")[0], re.DOTALL).groups()
    folder = site / "shrinkkit_clip-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: shrinkkit-clip\nVersion: 1\n")
    (folder / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, filter(None, [site, *sys.path]))))
        yield site


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The recipe of the page on the tests' task, and the same without its precision."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "clipped-int8.yaml").write_text(block("yaml")[0])
    recipe = str(folder / "clipped-int8.yaml")
    study = studies.study(str(TASK), recipes=[recipe], targets=["cpu/torch"], name="outside")
    return study.model_copy(update={"effort": "quick"})


@pytest.fixture(scope="module")
def run(study, tmp_path_factory):
    reports = tmp_path_factory.mktemp("reports")
    prepared = runner.prepare(study, reports=reports, command="test", threads=1, monitor=Monitor())
    return prepared.execute(Monitor()).path


def test_it_is_listed_and_its_mistakes_have_file_and_line(tmp_path, monkeypatch):
    assert stages.names()[-1] == "clip-weights"
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("stages:\n- clip-weights:\n    deviations: 0\n    deviation: 3\n- clip-weight\n")
    with pytest.raises(InvalidInput) as caught:
        studies.read_recipe("my.yaml")
    value, unknown, name = str(caught.value).splitlines()
    assert "`stages.0.clip-weights.deviations` must be a number > 0, got 0 (my.yaml:3)" in value
    assert "Did you mean `deviations`?" in unknown
    assert "Did you mean `clip-weights`?" in name


def test_it_is_a_step_of_its_own_measured_with_the_training_after_it(study):
    steps = plan.plan(study, task=str(TASK), threads=1)
    assert [step.name for step in steps][1:-2] == [
        *("2-transform-clipped-int8.stage-1", "2-transform-clipped-int8.stage-2", "2-train-clipped-int8.stage-3"),
        "3-quantize-clipped-int8",
    ]
    assert steps[-2].parameters["variants"] == [
        *("baseline", "clipped-int8.stage-1", "clipped-int8.stage-3", "clipped-int8")
    ]


def test_every_step_ends_well_and_the_report_is_written(run):
    failed = {s.name: s.error for s in store.read(run / "status.json", Status).steps if s.state != "done"}
    assert failed == {}
    assert "Linear, added" in (run / "report.html").read_text()


def test_the_layer_report_shows_one_layer_that_became_two(run):
    for name in ("clipped-int8.stage-3", "clipped-int8"):
        record = store.read(run / "variants" / name / "variant.json", Variant)
        changes = {row.layer: row.change for row in record.audit}
        assert (changes["head"], changes["head.0"], changes["head.1"]) == ("removed", "added", "added")
        assert record.parameters < 3700
    ran = {row.layer: row.precision["torch"].runs_as for row in record.audit if row.change != "removed"}
    assert ran["head.0"] == ran["head.1"] == "int8"
    assert record.stages == ("clip-weights", "factorize", "fine-tune")


def test_the_variant_is_rebuilt_from_its_folder_without_the_package_that_made_it(run):
    model, history = variants.source(run, "clipped-int8.stage-3", tiny_task())
    assert [type(layer) for layer in model.head] == [torch.nn.Linear] * 2
    assert [list(stage) for stage in history.stages] == [["clip-weights"], ["factorize"], ["fine-tune"]]


def test_the_speed_up_is_broken_down_by_transforms_and_precision(run):
    loaded = results.load(run)
    rows = {row.variant: row for row in breakdown.breakdown(loaded)}
    names = [[factor.name for factor in row.factors if factor.kind != "runtime"] for row in rows.values()]
    # Factors without a conclusion are joined.
    assert " + ".join(names[-1]) == "clip-weights + factorize + fine-tune + static-int8"
