"""Run folders and variants whose files are not those that were written: no number of theirs is quoted."""

import dataclasses
import json
import os
import shutil
import sys

import examples
import pytest
from tiny import task as tiny_task

from shrinkkit import cli
from shrinkkit.core import run_folder, store
from shrinkkit.core.measurement import TargetRecord
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.run_folder import SUMS, RunFolder, Status
from shrinkkit.core.variant import Variant
from shrinkkit.errors import InvalidInput
from shrinkkit.measure import verify
from shrinkkit.pipeline import run_status, runner
from shrinkkit.pipeline.plan import Planned
from shrinkkit.pipeline.runner import PreparedRun
from shrinkkit.report import index_page
from shrinkkit.results import cards, results, verdict
from shrinkkit.transforms import variants

NAME, TARGET = "channels-50", "cpu/torch"
MEASURED = RunFolder("").measurement(TARGET, examples.HERE).as_posix()
STEP = f"2-prune-{NAME}"

HALVED = {"stages": [{"prune-channels": {"ratio": 0.5}}], "precision": {"float32": {}}}


def leaves(step):
    if step.notebook == "5-report":
        return ""
    target = step.notebook == "4-benchmark"
    return (
        RunFolder("").measurement(step.subject, examples.HERE).as_posix()
        if target
        else f"variants/{step.subject}/variant.json"
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A synthetic run whose status vouches for every file, as the runner has it."""
    run = examples.write_run(tmp_path_factory.mktemp("reports") / "run")
    for name in ("reference.safetensors", "weights.safetensors", "structure.json"):
        (run / "variants" / NAME / name).write_text(name)
    cards.write(run)
    status = store.read(run / "status.json", Status)
    steps = [
        dataclasses.replace(s, state="done" if s.state == "running" else s.state, inputs_sha256="in",
                            files=RunFolder(run).step_files(leaves(s)))
        for s in status.steps
    ]  # fmt: skip
    store.write(run / "status.json", dataclasses.replace(status, steps=tuple(steps)))
    return run


@pytest.fixture
def run(written, tmp_path):
    return shutil.copytree(written, tmp_path / "reports/run")


def one_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def same_size(path):
    path.write_bytes(b"x" * path.stat().st_size)


def longer(path):
    path.write_bytes(path.read_bytes() + b"\n")


def shorter(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def gone(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def of_the_baseline(path):
    shutil.copyfile(path.parent.parent / BASELINE / path.name, path)


ALTERED = (one_byte, same_size, longer, shorter, empty, gone, a_folder, a_link)


def each_way(first, *others):
    """Return the first file with every alteration, and the others, which are hashed alike, with two."""
    return [(first, alter) for alter in ALTERED] + [(file, alter) for file in others for alter in (one_byte, a_link)]


def called(value):
    return value.__name__ if callable(value) else None


def numbers(row):
    return [row.accuracy, row.difference, row.latency_ms, row.speedup, row.speedup_today, row.load_ms]


def quoted(run, found, name, target):
    """Return what a run says of a variant on a target: in its row, in what other sections read, and in its card."""
    row = found.row(name, target)
    record = found.measured.get(target)
    own = [m for m in record.measurements if m.variant == name and not m.error] if record else []
    cards.write(run)
    told = run / "variants" / name / "model-card.json"
    figures = json.loads(told.read_text())["figures"] if told.is_file() and name in found.variants else []
    states = [f["state"] for f in figures if f["target"] == target]
    return row, [n for n in numbers(row) if n is not None], own, [s for s in states if s == "measured"]


def nothing_is_quoted(run, name, target, path):
    found = results.load(run)
    row, values, own, cards_ = quoted(run, found, name, target)
    assert row.state == "failed"
    assert path in row.reason
    assert (values, own, cards_) == ([], [], [])
    assert any(path in note for note in found.notes)


def test_a_run_as_it_was_written_has_its_numbers_and_no_note(run):
    found = results.load(run)
    assert found.notes == ()
    assert found.row(NAME, TARGET).state == "measured"
    assert quoted(run, found, NAME, TARGET)[3] == ["measured"]


@pytest.mark.parametrize("name", [NAME, BASELINE])
@pytest.mark.parametrize(("file", "alter"), each_way("model.torchscript.pt", "variant.json"), ids=called)
def test_no_number_of_an_altered_variant_is_quoted(run, name, file, alter):
    alter(run / "variants" / name / file)
    nothing_is_quoted(run, name, TARGET, file)


@pytest.mark.parametrize("file", ["model.torchscript.pt", "variant.json"])
def test_no_number_of_a_variant_with_a_file_of_the_baseline_is_quoted(run, file):
    of_the_baseline(run / "variants" / NAME / file)
    nothing_is_quoted(run, NAME, TARGET, file)


@pytest.mark.parametrize("file", ["model.torchscript.pt", "variant.json"])
def test_nothing_is_compared_with_a_baseline_that_is_not_there_any_more(run, file):
    one_byte(run / "variants" / BASELINE / file)
    found = results.load(run)
    assert {row.state for row in found.rows if row.target == TARGET and row.variant != "float16"} <= {"failed"}
    assert all(row.speedup_today is None for row in found.rows)
    assert verdict.decide(found).row is None or verdict.decide(found).row.target != TARGET


@pytest.mark.parametrize("alter", ALTERED, ids=called)
def test_no_number_of_an_altered_benchmark_is_quoted(run, alter):
    alter(run / MEASURED)
    nothing_is_quoted(run, NAME, TARGET, MEASURED)
    assert results.load(run).row(NAME, "cpu/onnxruntime").state == "measured"


def edited(path, field, value):
    data = json.loads(path.read_text())
    one = next(m for m in data["measurements"] if m["variant"] == NAME)
    *parents, last = field.split(".")
    for key in parents:
        one = one[key]
    one[last] = value
    path.write_text(json.dumps(data, indent=1) + "\n")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latency.speedup", {"value": 100.0, "low": 99.0, "high": 101.0}),
        ("latency.verdict", "slower"),
        ("latency_ms", {"value": 0.01, "low": 0.01, "high": 0.01}),
        ("latency.candidate_ms", {"value": 0.01, "low": 0.01, "high": 0.01}),
        ("accuracy.difference", {"value": 0.1, "low": 0.09, "high": 0.11}),
        ("accuracy.mean", {"value": 1.0, "low": 1.0, "high": 1.0}),
        ("memory", {"runtime_bytes": 1, "load_bytes": 1, "peak_bytes": 12, "method": "resident"}),
        ("load_ms", 0.001),
        ("variant", "static-int8"),
        ("file_sha256", "0" * 64),
    ],
)
def test_an_edited_figure_is_no_figure(run, field, value):
    edited(run / MEASURED, field, value)
    nothing_is_quoted(run, NAME, TARGET, MEASURED)


@pytest.mark.parametrize("field", ["parameters", "macs", "sparsity", "seed", "name", "task"])
def test_an_edited_record_of_a_variant_tells_nothing(run, field):
    examples.change_json(
        run / "variants" / NAME / "variant.json", **{field: 1 if field not in ("name", "task") else "x"}
    )
    row = results.load(run).row(NAME, TARGET)
    assert (row.parameters, row.macs, row.sparsity, row.size_bytes) == (None, None, None, None)
    nothing_is_quoted(run, NAME, TARGET, "variant.json")


@pytest.mark.parametrize(
    ("file", "alter"), each_way("model-card.json", "README.md", "SHA256SUMS", "reference.safetensors"), ids=called
)
def test_other_altered_files_are_noted(run, file, alter):
    path = f"variants/{NAME}/{file}"
    alter(run / path)
    assert [path in note for note in results.load(run).notes] == [True]


@pytest.mark.parametrize("alter", [one_byte, gone, a_link], ids=called)
@pytest.mark.parametrize(
    "file", ["variants/channels-50/model.torchscript.pt", MEASURED, "variants/baseline/variant.json"]
)
def test_the_index_calls_no_altered_run_finished(run, file, alter):
    alter(run / file)
    (found,) = index_page.read(run.parent)
    assert found.status in ("with failures", "unreadable")
    assert found.reason


def previewed(run, fingerprint="task"):
    """Return whether the step that prunes would be cached, in a run of it alone."""
    step = Planned(STEP, "2-prune", NAME, {}, (), f"variants/{NAME}/variant.json")
    folder = RunFolder(run)
    prepared = PreparedRun(folder, (step,), "", 1, 60.0, fingerprint, {}, force=False, study=None)
    return prepared, prepared.preview()[STEP]


@pytest.fixture
def recorded(run):
    """The run with the hash of the inputs that its step had."""
    status = store.read(run / "status.json", Status)
    inputs = previewed(run)[0]._inputs_sha256(previewed(run)[0].steps[0])
    steps = [dataclasses.replace(s, inputs_sha256=inputs) if s.name == STEP else s for s in status.steps]
    store.write(run / "status.json", dataclasses.replace(status, steps=tuple(steps)))
    return run


@pytest.mark.parametrize(
    ("file", "alter"),
    each_way(
        *("model.torchscript.pt", "model.onnx", "variant.json"),
        *("reference.safetensors", "weights.safetensors", "structure.json"),
    ),
    ids=called,
)
def test_a_step_with_an_altered_file_is_not_cached(recorded, file, alter):
    assert previewed(recorded)[1] == "cached"
    assert previewed(recorded, "another task")[1] == "run"
    alter(recorded / "variants" / NAME / file)
    assert previewed(recorded)[1] == "run"


def test_a_step_that_left_no_hashes_is_not_cached(recorded):
    data = json.loads((recorded / "status.json").read_text())
    for step in data["steps"]:
        del step["files"]
    (recorded / "status.json").write_text(json.dumps(data))
    assert previewed(recorded)[1] == "run"


@pytest.mark.parametrize("path", ["/etc/passwd", "../study.json", "a/../../b", "", ".", "C:/x", "//x/y/z"])
@pytest.mark.parametrize("field", ["path", "beside"])
def test_a_path_that_leaves_its_folder_is_no_record(run, path, field):
    file = run / "variants" / NAME / "variant.json"
    data = json.loads(file.read_text())
    data["files"][0][field] = path if field == "path" else [path]
    file.write_text(json.dumps(data))
    with pytest.raises(InvalidInput, match="must stay inside its folder"):
        store.read(file, Variant)
    examples.change_json(run / "status.json", steps=[])
    assert "must stay inside" in results.load(run).row(NAME, TARGET).reason


@pytest.mark.parametrize("path", ["/etc/passwd", "../../x"])
def test_a_manifest_of_files_elsewhere_is_no_record(run, path):
    data = json.loads((run / "status.json").read_text())
    data["steps"][0]["files"] = {path: "0" * 64}
    (run / "status.json").write_text(json.dumps(data))
    assert results.load(run).status is None


KINDS = {
    "link to a file": lambda at, away: at.symlink_to(away / "victim"),
    "link to a folder": lambda at, away: at.symlink_to(away),
    "link to nothing": lambda at, away: at.symlink_to(away / "nothing"),
    "pipe": lambda at, away: os.mkfifo(at),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "at",
    [
        "run.log",
        ".lock",
        ".lease",
        "steps",
        "status.json",
        "variants/x",
        "variants/baseline/model.torchscript.pt",
        "report.html",
    ],
)
def test_links_and_pipes_in_a_run_folder_are_refused_before_anything_is_written(run, tmp_path, at, kind, capsys):
    away = tmp_path / "away"
    away.mkdir()
    (away / "victim").write_text("precious")
    (run / at).unlink(missing_ok=True)
    KINDS[kind](run / at, away)
    for command in (["report", str(run)], ["run", str(run), "--only", "benchmark"]):
        assert cli.main(command) == 2
        assert str(run / at) in capsys.readouterr().err or "study.json" in at
    assert (away / "victim").read_text() == "precious"
    assert [path.name for path in away.iterdir()] == ["victim"]


@pytest.mark.parametrize("name", ["run.log", "status.json", ".lock", ".lease"])
def test_another_name_of_a_file_keeps_what_it_has(run, tmp_path, name):
    (run / name).write_text("precious")
    os.link(run / name, tmp_path / "copy")
    run_status.log(RunFolder(run), "a line")
    with runner._exclusive(RunFolder(run)):
        store.write_text(run / "status.json", "{}")
        run_status.log(RunFolder(run), "another")
    assert (tmp_path / "copy").read_text() == "precious"
    assert (run / "run.log").read_text().count("\n") >= 2


DAMAGE = {
    "nothing": "", "half": '{"schema_version": 3, ', "text": "hello", "a list": "[]", "null": "null", "a number": "3",
    "deep lists": "[" * 100_000, "deep dicts": '{"a":' * 100_000, "whole deep": "[" * 5000 + "]" * 5000,
    "version as text": '{"schema_version": "three"}', "version as list": '{"schema_version": [3]}',
    "no version": '{"schema_version": null}', "a later version": '{"schema_version": 99}',
    "an endless number": '{"schema_version": ' + "9" * 5000 + "}", "a half version": '{"schema_version": 3.5}',
    "a true version": '{"schema_version": true}', "not finite": '{"schema_version": NaN}', "no text": b"\xff\xfe\x00",
    "zeros": b"\x00" * 100, "surrogates": '{"\\ud800": "\\udfff"}',
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "what"),
    [
        *(("status.json", what) for what in DAMAGE),
        *(
            (file, what)
            for file in ("study.json", f"variants/{NAME}/variant.json", MEASURED)
            for what in ("half", "null", "whole deep", "a later version", "no text")
        ),
    ],
)
def test_damaged_json_is_told_and_nothing_breaks(run, file, what):
    data = DAMAGE[what]
    (run / file).write_bytes(data if isinstance(data, bytes) else data.encode())
    (listed,) = index_page.read(run.parent)
    assert listed.results.notes
    assert listed.status in ("with failures", "unreadable", "by hand")


@pytest.mark.parametrize("what", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_make_no_record(run, what):
    path = run / MEASURED
    path.write_text(path.read_text().replace('"load_average": 0.4', f'"load_average": {what}'))
    with pytest.raises(InvalidInput, match="no finite number"):
        store.read(path, TargetRecord)


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    task = tiny_task()
    folder = tmp_path_factory.mktemp("variants") / "zeros"
    variants.write(folder, task, task.model, runtimes=["torch"])
    return folder


@pytest.fixture
def alone(variant, tmp_path):
    return shutil.copytree(variant, tmp_path / "zeros")


def check(folder):
    return verify.check(folder, only=["cpu/torch"], threads=1, seconds=0.01)


def test_a_variant_as_it_was_written_is_verified_and_its_sums_are_those_of_sha256sum(alone):
    assert check(alone).problems == ()
    assert set(run_folder.read_sums(alone)) == {path.name for path in alone.iterdir()} - {SUMS}
    if shutil.which("sha256sum"):
        assert os.system(f"cd {alone} && sha256sum --check --quiet {SUMS}") == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parameters", 1), ("macs", 1), ("sparsity", 0.9), ("seed", 9), ("name", "other"), ("task", "other"),
        ("recipe", HALVED), ("source", "other"), ("refusals", {"openvino": "no"}), ("notes", ["x"]),
        ("files", []), ("audit", {"layers": 1, "pruned": 0, "zeroed": 0, "precision": {}}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fits", [False, True], ids=["the sums stay", "the sums are made to fit"])
def test_a_card_that_contradicts_the_record_is_a_problem(alone, field, value, fits):
    examples.change_json(alone / "model-card.json", **{field: value})
    if fits:
        (alone / SUMS).unlink()
        run_folder.write_sums(alone)
    found = check(alone)
    assert not found.verified
    assert any(f"differ in {field}" in problem for problem in found.problems)


@pytest.mark.parametrize("field", ["size_bytes", "sha256", "compressed_bytes", "max_relative_error", "format"])
def test_a_record_whose_file_is_another_is_not_verified(alone, field):
    data = json.loads((alone / "variant.json").read_text())
    data["files"][0][field] = "0" * 64 if field in ("sha256",) else "pt2x" if field == "format" else 12
    (alone / "variant.json").write_text(json.dumps(data))
    card = json.loads((alone / "model-card.json").read_text())
    card["files"] = data["files"]
    (alone / "model-card.json").write_text(json.dumps(card))
    assert not check(alone).verified if field != "format" else True
    assert check(alone).problems if field != "format" else True


@pytest.mark.parametrize("alter", [one_byte, longer, shorter, empty, a_link], ids=called)
@pytest.mark.parametrize("file", ["README.md", "model-card.json", "reference.safetensors", "model.torchscript.pt"])
def test_an_altered_file_of_a_variant_alone_is_not_verified(alone, file, alter):
    alter(alone / file)
    assert not check(alone).verified


@pytest.mark.parametrize("path", ["../other/model.torchscript.pt", "/tmp/model.torchscript.pt"])
def test_a_record_that_points_elsewhere_is_refused(alone, path):
    data = json.loads((alone / "variant.json").read_text())
    data["files"][0]["path"] = path
    (alone / "variant.json").write_text(json.dumps(data))
    with pytest.raises(InvalidInput, match="must stay inside its folder"):
        check(alone)


def test_a_file_over_a_linked_folder_is_damaged(alone, tmp_path):
    (tmp_path / "away").mkdir()
    (alone / "model.torchscript.pt").rename(tmp_path / "away/model.torchscript.pt")
    (alone / "sub").symlink_to(tmp_path / "away")
    for name in ("variant.json", "model-card.json"):
        data = json.loads((alone / name).read_text())
        data["files"][0]["path"] = "sub/model.torchscript.pt"
        (alone / name).write_text(json.dumps(data))
    assert "is a link" in check(alone).findings[0].why


def test_a_missing_readme_is_no_lie(alone):
    (alone / "README.md").unlink()
    assert check(alone).verified


def test_a_report_made_later_does_not_vouch_for_an_altered_model(alone):
    same_size(alone / "model.torchscript.pt")
    before = run_folder.read_sums(alone)
    run_folder.write_sums(alone)
    assert run_folder.read_sums(alone) == before
    (alone / "json.py").write_text("")
    run_folder.write_sums(alone)
    assert "json.py" not in run_folder.read_sums(alone)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_run_folder_behind_a_link_is_a_run_folder(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    RunFolder(tmp_path / "link").check_kinds()
    assert results.load(tmp_path / "link").notes == ()
