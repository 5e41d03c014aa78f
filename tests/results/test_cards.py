"""Model cards and READMEs: what they say of a variant before and after it was measured."""

import dataclasses
import json
import subprocess
import sys

import examples
import pytest
from tiny import task as tiny_task

from shrinkkit.core import store
from shrinkkit.core.measurement import IntegerCheck, Measurement, Memory, TargetRecord
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.errors import InvalidInput
from shrinkkit.results import cards, results
from shrinkkit.transforms import variants

INT8 = {"static-int8": {"calibration_examples": 32, "skip": ["head"]}}
MACHINE = "synthetic-2-cores"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("run"), tiny_task()
    for name, precision, runtimes in (
        ("baseline", "float32", ["torch", "onnxruntime"]),
        ("int8", INT8, ["torch", "onnxruntime"]),
        ("half", "bfloat16", ["torch", "onnxruntime"]),
    ):
        made = variants.write(folder / "variants" / name, task, task.model, precision=precision, runtimes=runtimes)
        cards.write_unmeasured(folder / "variants" / name, made)
    return folder


@pytest.fixture(scope="module")
def run(made):
    """The same folder with a made-up measurement of two variants on torch, then reported."""
    own = {name: variants.read(made / "variants" / name).files[0].sha256 for name in ("baseline", "int8", "half")}
    compared = examples.comparison("int8", "torch", 30.0, 2.5)
    compared = dataclasses.replace(compared, steady=False)
    check = IntegerCheck(0.3, {"conv1": 0.3, "conv2": 0.0}, ("conv1",))
    found = (
        Measurement("baseline", "cpu/torch", "", own["baseline"], accuracy=examples.judged(0, None)),
        Measurement(
            "int8",
            "cpu/torch",
            "",
            own["int8"],
            load_ms=4.0,
            first_call_ms=5.0,
            accuracy=examples.judged(2, examples.EXAMPLES),
            latency=compared,
            latency_ms=compared.candidate_ms,
            memory=Memory(1, 2, 3_000_000, "resident"),
            integers=check,
            notes=("Time by layer: it has no names.",),
        ),
        Measurement("half", "cpu/torch", "model.pt2 must reproduce its reference outputs within 0.02, got 0.4."),
    )
    record = TargetRecord("corner", "cpu/torch", MACHINE, examples.ENVIRONMENT, found, None, (), ())
    store.write(made / RunFolder("").measurement("cpu/torch", MACHINE).as_posix(), record)
    cards.write(made)
    return made


def test_a_card_is_written_right_after_its_variant_was_made(made):
    folder = made / "variants/int8"
    variant, card = variants.read(folder), cards.read(folder)
    assert (card.files, card.refusals, card.recipe) == (variant.files, variant.refusals, variant.recipe)
    assert (folder / "README.md").is_file()


def test_before_it_was_measured_a_card_has_no_figures(tmp_path):
    task = tiny_task()
    made = variants.write(tmp_path / "v", task, task.model, runtimes=["torch"])
    card, page = cards.write_unmeasured(tmp_path / "v", made)
    assert (card, page) == (tmp_path / "v/model-card.json", tmp_path / "v/README.md")
    assert cards.read(tmp_path / "v").figures == ()
    assert "Not measured yet." in page.read_text()


def test_a_card_holds_the_figures_of_the_report_and_those_of_the_records(run):
    (row,) = [row for row in results.load(run).rows if row.variant == "int8"]
    one = cards.read(run / "variants/int8").figures[0]
    assert (one.target, one.machine, one.threads, one.batch_size) == ("cpu/torch", MACHINE, 2, 8)
    assert (one.processor, one.runtime_version) == (examples.CPU, "2.13.0")
    assert (one.accuracy, one.difference) == (row.accuracy, row.difference)
    assert (one.speedup, one.timing, one.timing_today) == (row.speedup, "faster", "")
    assert one.speedup_today == row.speedup_today
    assert one.latency_ms.low <= one.p50_ms <= 1.1 * one.latency_ms.high
    assert (one.peak_memory_bytes, one.load_ms, one.first_call_ms) == (3_000_000, 4.0, 5.0)
    assert one.saturated == ("conv1",)


def test_a_readme_shows_figures_with_intervals_where_they_were_measured(run):
    text = (run / "variants/int8/README.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| cpu/torch")]
    assert f"| {MACHINE}, 2 threads, batch 8 |" in row
    for part in ("99.5 %", "\N{MINUS SIGN}0.1 pts", "2.50\N{MULTIPLICATION SIGN}", "3.00 MB"):
        assert part in row


def test_a_readme_warns_of_what_must_be_known_before_use(run):
    text = (run / "variants/int8/README.md").read_text()
    assert f"- On cpu/torch ({MACHINE}), int8 accumulation saturates in conv1" in text
    assert "- cpu/torch: Time by layer: it has no names." in text
    assert "- cpu/torch: Timing warning: the warm-up ended before times were steady." in text
    text = (run / "variants/half/README.md").read_text()
    assert "- No file for onnxruntime: ONNX Runtime has no bfloat16 kernels" in text
    assert "- cpu/torch: failed: model.pt2 must reproduce its reference outputs" in text


def test_a_figure_that_was_not_measured_says_why(run):
    (one,) = cards.read(run / "variants/half").figures
    assert (one.state, one.speedup, one.p50_ms, one.accuracy) == ("failed", None, None, None)
    assert "must reproduce" in one.reason


def test_figures_of_another_file_are_not_passed_on(run):
    folder = run / "variants/half"
    record = variants.read(folder)
    other = dataclasses.replace(record, files=(dataclasses.replace(record.files[0], sha256="0" * 64),))
    cards.write_unmeasured(folder, other)
    assert cards.read(folder).figures == ()


def test_the_summary_counts_layers_by_the_format_that_each_runtime_computes_them_in(run):
    found = cards.read(run / "variants/int8").audit
    kinds = {kind.runs_as: kind for kind in found.precision["onnxruntime"]}
    assert (found.layers, kinds["int8"].layers, kinds["float32"].why) == (4, 2, {"in `skip`": 1})
    assert sum(kind.layers for kind in found.precision["torch"]) == 4
    text = (run / "variants/int8/README.md").read_text()
    assert "- onnxruntime: 2 layers in int8; " in text
    assert "1 layer in float32 (in `skip`)" in text


def test_settings_are_those_of_the_measurement(run):
    card = cards.read(run / "variants/int8")
    assert card.settings["torch"]["num_threads"] == 2
    assert card.settings["torch"]["quantized_engine"] in ("fbgemm", "x86", "onednn", "qnnpack")
    assert card.settings["onnxruntime"]["intra_op_num_threads"] == card.environment.threads


def test_names_dtypes_and_shapes_of_inputs_and_outputs_are_told(run):
    data = json.loads((run / "variants/int8/model-card.json").read_text())
    assert data["files"][1]["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]
    assert "In: `x float32 [batch, 1, 8, 8]`." in (run / "variants/int8/README.md").read_text()


def test_a_damaged_model_file_does_not_keep_the_others_from_their_cards(run):
    path = run / "variants/int8/model.torchscript.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert len(cards.write(run)) == 6
    path.write_bytes(whole)
    cards.write(run)


def test_a_card_of_a_newer_version_is_refused_and_a_missing_one_is_none(run, tmp_path):
    assert cards.read(tmp_path) is None
    (tmp_path / "model-card.json").write_bytes((run / "variants/int8/model-card.json").read_bytes())
    examples.change_json(tmp_path / "model-card.json", schema_version=99)
    with pytest.raises(InvalidInput, match=r"schema version 99.*Update shrinkkit"):
        cards.read(tmp_path)


def test_cards_are_written_without_torch():
    code = "import sys, shrinkkit.results.cards, shrinkkit.measure.verification; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
