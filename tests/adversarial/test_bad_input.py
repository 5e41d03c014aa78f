"""Numbers, texts and files that no study, recipe, notebook or command may take: each is told in one sentence."""

import math
import os
import random
import time

import pytest
import usertasks

from shrinkkit import cli
from shrinkkit.core import machines, studies
from shrinkkit.core.recipe import TASKS, Budget
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.studies import Override
from shrinkkit.errors import InvalidInput, nearest
from shrinkkit.pipeline import parameters, runner
from shrinkkit.runtimes import registry

STUDY = "task: digits-cnn\nrecipes: [static-int8]\ntargets: [cpu/torch]\n"
NAN, INF = math.nan, math.inf


def complaint(capsys, *arguments):
    """Return what the command says as it refuses its arguments with status 2."""
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("shrinkkit: ")
    assert "Traceback" not in said
    return said


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(STUDY)
    return "s.yaml"


@pytest.mark.parametrize("what", ["s.yaml", "digits-cnn"])
@pytest.mark.parametrize(
    ("option", "named"),
    [
        *(
            (f"--accuracy-drop={n}", "accuracy_drop")
            for n in ("7", "-5", "-0.01", "1.0001", "inf", "-inf", "nan", "1e400")
        ),
        *((f"--threads={n}", "threads") for n in ("0", "-3", "1025", "10000000", "99999999999999999999999")),
        *((f"--set=budget.unit={unit}", "unit") for unit in ("points", "", "[share]")),
        *((f"--set=seed={n}", "seed") for n in ("-1", "x", "1.5", ".nan", "{a: 1}", "4294967296")),
        ("--set=", "--set"),
        ("--set=seed", "--set"),
        ("--set==1", "--set"),
        ("--set=.=1", "--set"),
        ("--set=seed=[", "--set"),
        ("--set=seed={a: 1, a: 2}", "twice"),
        (f"--set=seed={'[' * 200}", "levels"),
        ("--set=sed=1", "Did you mean `seed`"),
        ("--set=name=../x", "name"),
        ("--set=recipes.9=x", "recipes"),
        ("--set=recipes.x=x", "recipes"),
        ("--set=task=none.py", "none.py"),
    ],
)
def test_an_option_keeps_the_rules_of_a_study(study, capsys, what, option, named, tmp_path):
    assert named in complaint(capsys, "run", what, option)
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


@pytest.mark.parametrize("option", ["--accuracy-drop=x", "--threads=2.5", "--threads=two", "--accuracy-drop="])
def test_an_option_that_is_no_number_is_refused(study, capsys, option):
    assert cli.main(["run", study, option]) == 2


def test_options_change_nothing_else_of_a_study(study):
    whole = studies.read_study(study)
    changed = studies.read_study(study, [Override.parse("threads=2"), Override.parse("budget.accuracy_drop=0.2")])
    assert (changed.threads, changed.budget.accuracy_drop) == (2, 0.2)
    assert changed.model_copy(update={"threads": whole.threads, "budget": whole.budget}) == whole


def test_an_option_leaves_the_rest_of_the_budget():
    overrides = [Override.parse("budget.accuracy_drop=0.5")]
    arguments = {"recipes": ["static-int8"], "targets": ["cpu/torch"], "want": "smallest"}
    changed = studies.study("digits-cnn", **arguments, overrides=overrides)
    assert (changed.budget.want, changed.budget.accuracy_drop) == ("smallest", 0.5)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        *(
            (f"threads: {v}", "threads")
            for v in ("0", "-1", "1025", "1e9", "2.5", "true", ".nan", ".inf", "'2'", "[2]", "null x")
        ),
        *((f"seed: {v}", "seed") for v in ("-1", "4294967296", "1.5", ".nan", "true", "x")),
        *(
            (f"timeout_s: {v}", "timeout_s")
            for v in ("0", "-1", ".nan", ".inf", "-.inf", "1e999", "1e12", "x", "true", "null")
        ),
        *(
            (f"batch_sizes: {v}", "batch_sizes")
            for v in ("[0]", "[-1]", "[1.5]", "[100000]", "8", "x", "[.nan]", "[true]", f"[{', '.join(['1'] * 17)}]")
        ),
        *((f"thread_counts: {v}", "thread_counts") for v in ("[0]", "[-1]", "[10000000]", "1", "[.inf]", "[[1]]")),
        *(
            (f"budget: {{accuracy_drop: {v}}}", "accuracy_drop")
            for v in ("7", "-1", ".nan", ".inf", "1.001", "x", "[1]", "true")
        ),
        *((f"budget: {{unit: {v}}}", "unit") for v in ("points", "1", "null", "Share")),
        ("budget: {accuracy_drop: -1, unit: score}", "accuracy_drop"),
        ("budget: {accuracy_drop: .nan, unit: score}", "accuracy_drop"),
        ("budget: 5", "budget"),
        *(
            (f"name: {v}", "name")
            for v in (
                "a/b",
                '"a\\nb"',
                '"\\U0001F600"',
                '""',
                "x" * 300,
                "..",
                "-a",
                '"a b"',
                "5",
                '"\\ud800"',
                '"a\\0b"',
            )
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_setting_out_of_its_range_is_named(tmp_path, settings, key):
    (tmp_path / "s.yaml").write_text(STUDY + settings + "\n")
    with pytest.raises(InvalidInput) as caught:
        studies.read_study(str(tmp_path / "s.yaml"))
    assert key in str(caught.value)


@pytest.mark.parametrize("drop", [0.0, 2.0, 500.0])
def test_a_budget_in_the_unit_of_the_score_may_be_any_number(drop):
    study = studies.study(
        "digits-cnn", recipes=["static-int8"], targets=["cpu/torch"], accuracy_drop=drop, unit="score"
    )
    assert study.budget.accuracy_drop == drop


@pytest.mark.parametrize(("low", "high"), [(0, 100), (-3, 0), (-0.001, 1), (0, 1.01), (-5, 5), (NAN, NAN), (0, INF)])
def test_a_budget_in_shares_is_for_scores_in_shares(low, high):
    study = studies.study("digits-cnn", recipes=["static-int8"], targets=["cpu/torch"])
    with pytest.raises(InvalidInput, match="unit: score"):
        studies.check_unit(study, (low, high))
    studies.check_unit(study.model_copy(update={"budget": Budget(unit="score")}), (low, high))
    studies.check_unit(study, (0.0, 1.0))


@pytest.mark.parametrize(
    ("section", "key"),
    [
        *(
            (f"stages: [prune-channels: {{ratio: {v}}}]", "ratio")
            for v in ("1", "-0.1", ".nan", ".inf", "1.5", "50", "x", "true")
        ),
        *((f"stages: [fine-tune: {{epochs: {v}}}]", "epochs") for v in ("-1", "1.5", "10001", ".nan", "1e99")),
        *((f"stages: [fine-tune: {{learning_rate: {v}}}]", "learning_rate") for v in ("0", "-1", ".nan", ".inf")),
        *(
            (f"stages: [prune-channels: {{ratio: 0.5, round_to: {v}}}]", "round_to")
            for v in ("0", "-8", "65537", "1e30")
        ),
        *((f"stages: [prune-channels: {{ratio: 0.5, layers: {{a: {v}}}}}]", "layers") for v in ("1", ".nan", "-1")),
        *(
            (f"precision: {{static-int8: {{calibration_examples: {v}}}}}", "calibration_examples")
            for v in ("0", "-1", "1.5", "1e99")
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_recipe_out_of_its_range_is_named(tmp_path, section, key):
    (tmp_path / "r.yaml").write_text(section + "\n")
    with pytest.raises(InvalidInput) as caught:
        studies.read_recipe(tmp_path / "r.yaml")
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("threads", v) for v in (-1, 10_000_000, 2.5, NAN, True, None, "2")),
        *(("seed", v) for v in (-1, 2**32, NAN, 1.0, True)),
        *(("epochs", v) for v in (-1, 10**9)),
        *(("batch_sizes", v) for v in ([0], [-1], [2**40], [1] * 17, [NAN], [1.0], [None], "8")),
        *(("thread_counts", v) for v in ([0], [10_000_000], ["1"], [True])),
    ],
)
def test_a_parameter_of_a_notebook_out_of_its_range_is_named(name, value):
    kind = {"batch_sizes": "list[int]", "thread_counts": "list[int]"}.get(name, "int")
    with pytest.raises(InvalidInput, match=rf"`{name}(\.0)?`"):
        parameters.check({"In": [f"{name}: {kind} = 0"], name: value})


@pytest.mark.parametrize("threads", [-1, 4 * machines.cores() + 1, 10_000_000, 10**30])
def test_no_process_computes_with_threads_that_the_machine_has_not(threads):
    with pytest.raises(InvalidInput, match=f"{machines.cores()} cores"):
        registry.use_threads(threads)


def test_a_study_for_more_threads_than_this_machine_has_stops_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(STUDY + f"thread_counts: [{4 * machines.cores() + 1}]\n")
    assert "cores" in complaint(capsys, "run", "s.yaml")
    assert not (tmp_path / "reports").exists()


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
BAD_YAML = {
    "an alias bomb of lists": ALIASES,
    "an alias bomb of mappings": ALIASES.replace("[", "{").replace("]", "}").replace("x", "x: 1", 1),
    "aliases that hold themselves": "a: &a [*a, *a, *a, *a]",
    "lists without end": "a: " + "[" * 100_000,
    "lists 5000 deep": "a: " + "[" * 5000 + "]" * 5000,
    "mappings without end": "{a: " * 20_000,
    "blocks 1000 deep": "".join(" " * i + "a:\n" for i in range(1000)),
    "dashes": "- " * 50_000 + "x",
    "questions": "? " * 50_000,
    "keys without end": "".join(f"k{i}: 1\n" for i in range(25_000)),
    "megabytes": "a: 1\n" * 300_000,
    "an alias of nothing": "a: *b",
    "stars": "*" * 10_000,
    "colons": ":" * 10_000,
    "a directive": "%YAML 9.9\n---\na: 1",
    "a broken escape": '"\\x',
    "a NUL": "a: \0",
}


@pytest.mark.parametrize("text", BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_would_hang_or_overflow_is_refused_within_seconds(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(InvalidInput, match=r"s\.yaml"):
        studies.read_study(str(tmp_path / "s.yaml"))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "text",
    ["a: " + "9" * 10_000, "a: !!python/object/apply:os.system ['ls']", "a: !x 1", "a: 2001-99-99", "a: !!binary 'z'"],
)
def test_values_that_are_no_settings_run_nothing_and_are_told(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InvalidInput) as caught:
        studies.read_study(str(tmp_path / "s.yaml"))
    assert max(map(len, str(caught.value).splitlines())) < 600


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"\x80abc", b"task: \xc3\x28", b"\x00" * 100, b"PK\x03\x04" * 100]
)
def test_what_is_no_text_is_told(tmp_path, content):
    (tmp_path / "s.yaml").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"s\.yaml"):
        studies.read_study(str(tmp_path / "s.yaml"))


def test_yaml_of_random_characters_is_read_or_told(tmp_path):
    draw = random.Random(0)
    for _ in range(150):
        text = "".join(draw.choices("ab:-?[]{},&*!|>'\"%@` \n\t#1.\\~", k=draw.randrange(1, 60)))
        (tmp_path / "s.yaml").write_text(STUDY * draw.randrange(2) + text)
        try:
            studies.read_study(str(tmp_path / "s.yaml"))
        except InvalidInput:
            continue


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "loop", "missing"])
@pytest.mark.parametrize("name", ["s.yaml", "t.py"])
def test_what_is_no_file_is_told_and_never_waited_for(tmp_path, monkeypatch, capsys, kind, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
    assert name in complaint(capsys, "run", name)


@pytest.mark.parametrize(
    "task", ["", ".py", "a\0.py", "x" * 300 + ".py", "\ud800.py", "a/../../b.py", "\n", "😀", "digits-cnn.py", "/"]
)
def test_a_task_that_is_no_name_and_no_path_is_told(task):
    with pytest.raises(InvalidInput):
        studies.study(task, recipes=["static-int8"], targets=["cpu/torch"])


@pytest.mark.parametrize("value", ["", "x", "cpu", "cpu/", "/torch", "CPU/TORCH", "cpu/torch\n", "x" * 300, "😀/torch"])
def test_a_target_that_is_none_is_told(value):
    with pytest.raises(InvalidInput):
        studies.study("digits-cnn", recipes=["static-int8"], targets=[value])


@pytest.mark.parametrize("value", ["", "x.yaml", "a\0.yaml", "x" * 300 + ".yaml", "\n", "..", ".yaml", "static-int3"])
def test_a_recipe_that_is_none_is_told(value):
    with pytest.raises(InvalidInput):
        studies.study("digits-cnn", recipes=[value], targets=["cpu/torch"])


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", "{", '{"name": 5}', "[" * 100_000, '{"task":' * 50_000])
def test_a_run_folder_whose_study_is_damaged_is_told(tmp_path, content):
    (tmp_path / "study.json").write_text(content)
    (tmp_path / "variants/baseline").mkdir(parents=True)
    (tmp_path / "variants/baseline/variant.json").write_text("{}")
    with pytest.raises(InvalidInput):
        runner._read_run(RunFolder(tmp_path))


def test_a_word_that_is_close_is_suggested_and_others_are_not():
    assert "digits-cnn" in nearest("digit-cnn", TASKS)
    assert nearest("x" * 5000, TASKS) == ""


def test_a_study_of_an_unknown_mode_is_told_the_nearest(capsys, study, tmp_path):
    (tmp_path / "s.yaml").write_text(f"{STUDY}mode: robsut\n")
    assert "Did you mean `robust`?" in complaint(capsys, "run", study)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ("inputs[0][:, :severity]", "same shapes and types"),
        ("inputs[0] / 0", "finite"),
        ("inputs[0] + torch.rand(())", "same for the same inputs"),
        ("inputs.nonsense", "raised AttributeError"),
    ],
)
def test_a_run_refuses_a_task_with_a_wrong_corruption_before_any_step(change, rule, capsys, tmp_path):
    body = f'of["corruptions"] = {{"fog": lambda inputs, severity: {change}}}'
    task = usertasks.write(tmp_path, body=body)
    said = complaint(capsys, "run", str(task), "--mode", "robust", "--reports", str(tmp_path / "reports"))
    assert "`corruptions['fog']`" in said
    assert rule in said
    assert not (tmp_path / "reports").exists()
