"""Recipes and studies: what reads well is read, and every mistake is told with its place and its remedy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shrinkkit.core import studies
from shrinkkit.core.recipe import BUILT_IN, TASKS, Study
from shrinkkit.errors import InvalidInput

HALF = "stages:\n- prune-channels:\n    ratio: 0.5\n"
STUDY = "task: digits-cnn\nrecipes: [channels-50]\ntargets: [cpu/torch]\n"


def recipe_file(folder, text, name="my.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def complaint_about(read, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    with pytest.raises(InvalidInput) as caught:
        read(path.name)
    return str(caught.value)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_recipe_reads_and_is_named_after_its_file(name):
    assert studies.read_recipe(name).name == name


def test_the_built_in_names_are_those_of_the_bundled_files():
    bundled = Path(studies.__file__).parent.parent / "tasks" / "bundled"
    assert {file.stem for file in (bundled / "recipes").glob("*.yaml")} == set(BUILT_IN)
    assert {file.stem for file in (bundled / "studies").glob("*.yaml")} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_every_built_in_study_reads_and_has_at_least_three_recipes(name):
    study = studies.read_study(name)
    assert (study.name, study.task, study.budget.accuracy_drop) == (name, name, 0.01)
    assert len(study.recipes) >= 3


def test_the_built_in_studies_need_no_arithmetic_that_few_processors_have():
    names = {task: [recipe.name for recipe in studies.read_study(task).recipes] for task in TASKS}
    assert not {name for recipes in names.values() for name in recipes} & {"float16", "bfloat16"}
    assert set(names["digits-cnn"]) < set(BUILT_IN)
    assert all(any("int8" in name for name in recipes) for recipes in names.values())


def test_channels_50_and_its_quantized_sibling_have_the_same_stages():
    assert studies.read_recipe("channels-50").stages == studies.read_recipe("channels-50-static-int8").stages


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    recipe = studies.read_recipe(recipe_file(tmp_path, "stages: [fine-tune: {learning_rate: 1e-3}]"))
    assert recipe.stages[0].settings.learning_rate == 0.001


def test_a_stage_and_a_precision_need_no_settings(tmp_path):
    recipe = studies.read_recipe(recipe_file(tmp_path, "stages: [fine-tune, fine-tune: ]\nprecision: static-int8"))
    assert [stage.settings.epochs for stage in recipe.stages] == [3, 3]
    assert recipe.precision.settings.calibration_examples == 128


def test_settings_hold_what_a_recipe_does_with_defaults_and_nothing_about_its_file(tmp_path):
    recipe = studies.read_recipe(recipe_file(tmp_path, HALF + "    skip: [head]\n"))
    pruning = {"ratio": 0.5, "scope": "global", "skip": ["head"], "layers": {}, "criterion": "magnitude", "round_to": 8}
    assert recipe.settings() == {"stages": [{"prune-channels": pruning}], "precision": {"float32": {}}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: [prune-channels: {ratio: 50}]", ("`stages.0.prune-channels.ratio`", "[0, 1)", "50", ":1)", "0.5")),
        ("stages:\n- prune-weights:\n    ratio: 80", ("stages.0.prune-weights.ratio", "my.yaml:3", "80 %, pass 0.8")),
        ("stages: [prune-channels: {ratio: true}]", ("ratio", "got true")),
        ("stages: [prune-channels: {ratio: .nan}]", ("ratio", "got nan")),
        ("stages: [prune-channels: {ratio: }]", ("ratio", "got nothing")),
        ("stages: [prune-channels]", ("`stages.0.prune-channels.ratio` is missing", "[0, 1)")),
        ("stages: [prune-channels: 0.5]", ("`stages.0`", "{...}", "got 0.5")),
        ("stages: [prune-channels: {ratio: 0.5}, x: 1]", ("`stages.1`", "fine-tune or distil", "got 'x'")),
        ("stages: [{prune-channels: {ratio: 0.5}, fine-tune: {}}]", ("`stages.0`", "{...}")),
        ("stages: [fine-tuning]", ("`stages.0`", "'fine-tuning'", "Did you mean `fine-tune`?")),
        ("stages: fine-tune", ("`stages`", "list", "'fine-tune'")),
        ("stages:\n- fine-tune\n- fine-tune:\n    epochs: 1.5", ("`stages.1.fine-tune.epochs`", "10000", "1.5", ":4)")),
        ("stages: [fine-tune: {epochs: true}]", ("`stages.0.fine-tune.epochs`", "got true")),
        ("stages: [fine-tune: {epochs: 0}]", (">= 1", "got 0")),
        ("stages: [fine-tune: {learning_rate: .inf}]", ("learning_rate", "> 0", "got inf")),
        ("stages: [fine-tune: {device: gpu}]", ("device", "auto, cpu, cuda or mps", "'gpu'")),
        (HALF + "    round_to: 0", ("round_to", "65536", "got 0", "my.yaml:4")),
        (HALF + "    skip: head", ("`stages.0.prune-channels.skip`", "list", "'head'")),
        (HALF + "    skip:\n    - head\n    - 3", ("`stages.0.prune-channels.skip.1`", "quotes", "got 3", "my.yaml:6")),
        (HALF + "    layers:\n      stem.0: 70", ("`stages.0.prune-channels.layers.stem.0`", "70", "0.7", "my.yaml:5")),
        (HALF + "    criterion: taylr", ("criterion", "lamp", "`package.module:function`", "Did you mean `taylor`?")),
        ("stages: [prune-weights: {ratio: 0.5, criterion: lamp}]", ("magnitude, random", "'lamp'")),
        (HALF + "    ration: 3", ("`stages.0.prune-channels.ration`", "Did you mean `ratio`?", "round_to", ":4)")),
        (HALF + "    biases: true", ("biases", "no key of prune-channels, but of prune-weights")),
        (
            "precision: {float16: {calibration_examples: 64}}",
            ("no key of float16, but of static-int8", "Allowed: skip."),
        ),
        ("precision: static-int3", ("`precision`", "Did you mean `static-int8`?", "no other widths")),
        ("precision: [float16]", ("`precision`", "{...}")),
        ("precision:", ("`precision`", "got nothing")),
        (HALF + "precison: float16", ("`precison`", "Did you mean `precision`?", "Allowed: name, stages, precision.")),
        (HALF + "where: {}", ("`where` is no key", "Allowed: name, stages, precision.")),
        ("name: half", ("`stages`", "`precision`", "my.yaml:1")),
        ("precision: float32", ("`stages`", "`precision`")),
        (HALF + "name: Baseline", ("`name`", "`baseline`", "my.yaml:4")),
        (HALF + "name: half.stage-2", ("`name`", "`.stage-`", "my.yaml:4")),
        (HALF + "name: ../half", ("`name`", "got '../half' (my.yaml:4)", "Set `name`")),
        (HALF + "    ratio: 0.6", ("`stages.0.prune-channels.ratio`", "twice", "line 3", "my.yaml:4")),
        ("", ("my.yaml is empty",)),
        ("# nothing yet", ("my.yaml is empty",)),
        ("- stages", ("mapping", "my.yaml:1")),
        ("stages:\n  ratio: [1", ("expected ',' or ']'", "my.yaml:2", "Indent")),
    ],
)
def test_a_mistake_in_a_recipe_is_told_with_its_place_and_remedy(tmp_path, monkeypatch, text, words):
    complaint = complaint_about(studies.read_recipe, recipe_file(tmp_path, text), monkeypatch)
    assert [word for word in words if word not in complaint] == [], complaint
    assert "\n" not in complaint


def test_all_mistakes_of_a_file_are_told_at_once_one_a_line(tmp_path, monkeypatch):
    text = "stages: [prune-weights: {ratio: 2}, fine-tune: {epochs: -1}]\nprecision: int4\nextra: 1"
    lines = complaint_about(studies.read_recipe, recipe_file(tmp_path, text), monkeypatch).splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        *("`stages.0.prune-weights.ratio`", "`stages.1.fine-tune.epochs`", "`precision`", "`extra`")
    ]


@pytest.mark.parametrize("name", ["channels50", "chanels-50"])
def test_an_unknown_recipe_name_is_told_the_nearest_one(name):
    with pytest.raises(InvalidInput, match=rf"got '{name}'\. Did you mean `channels-50`\?"):
        studies.read_recipe(name)


def test_a_recipe_file_that_is_missing_or_no_text_is_invalid(tmp_path):
    with pytest.raises(InvalidInput, match="There is no recipe file"):
        studies.read_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="cannot be read as text"):
        studies.read_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            STUDY + "budget: {accuracy_drop: 5}",
            "`budget.accuracy_drop` must be a share in [0, 1], got 5 (my.yaml:4). For 5 %, pass 0.05.",
        ),
        (
            STUDY + "budget: {target: cuda/torch}",
            "`budget.target` must be one of the study's targets (cpu/torch), got 'cuda/torch' (my.yaml:4). "
            "Did you mean `cpu/torch`?",
        ),
        (
            STUDY + "budget: {channels: 1}",
            "`budget.channels` is no key of budget (my.yaml:4). "
            "Allowed: unit, accuracy_drop, robustness_drop, want, target.",
        ),
        (
            STUDY + "budget: 5",
            "`budget` must be a section with `accuracy_drop`, `unit`, `want` or `target`, got 5 (my.yaml:4).",
        ),
        (STUDY + "threads: 0", "`threads` must be a whole number >= 1 and at most 1024, got 0 (my.yaml:4)."),
        (STUDY + "threads: true", "`threads` must be a whole number >= 1 and at most 1024, got true (my.yaml:4)."),
        (STUDY + "seed: -1", "`seed` must be a whole number in [0, 4294967296), got -1 (my.yaml:4)."),
        (
            STUDY + "batch_sizes: 8",
            "`batch_sizes` must be a list of at most 16 whole numbers >= 1 and at most 65536, got 8 (my.yaml:4).",
        ),
        (
            STUDY + "batch_sizes: [1, 0]",
            "`batch_sizes.1` must be a list of at most 16 whole numbers >= 1 and at most 65536, got 0 (my.yaml:4).",
        ),
        (
            STUDY + "thread_counts: [two]",
            "`thread_counts.0` must be a list of at most 16 whole numbers >= 1 and at most 1024, "
            "got 'two' (my.yaml:4).",
        ),
        (
            STUDY + "timeout_s: .inf",
            "`timeout_s` must be a number of seconds > 0 and at most 2678400, got inf (my.yaml:4).",
        ),
        (
            STUDY.replace("cpu/torch", "gpu"),
            "`targets.0` must be a list of at least one target, such as cpu/torch, got 'gpu' (my.yaml:3). "
            "A target is written device/runtime.",
        ),
        (
            STUDY.replace("[cpu/torch]", "[]"),
            "`targets` must be a list of at least one target, such as cpu/torch, got [] (my.yaml:3).",
        ),
        (
            STUDY.replace("[cpu/torch]", "[cpu/torch, cpu/torch]"),
            "`targets` names 'cpu/torch' twice (my.yaml:3). Keep one of them.",
        ),
        (
            STUDY.replace("[channels-50]", "[]"),
            "`recipes` must be a list of at least one recipe: a built-in name, the path of a YAML file, or a mapping "
            "with a `name`, got [] (my.yaml:2).",
        ),
        (
            STUDY.replace("[channels-50]", "\n- float16\n- name: Float16\n  precision: bfloat16"),
            "`recipes` holds two named 'Float16' (my.yaml:4). Give one of them another `name`.",
        ),
        (
            STUDY.replace("[channels-50]", "\n- none.yaml"),
            "There is no recipe file 'none.yaml' (my.yaml:3). Check the path. "
            "Paths in a study are relative to its file.",
        ),
        (
            STUDY.replace("[channels-50]", "\n- precision: float16"),
            "`name` is missing (my.yaml:3). It must be a folder name (letters, digits, `.`, `_` and `-`, "
            "at most 64, the first a letter or digit).",
        ),
        (
            STUDY.replace("digits-cnn", "digits-cn"),
            "`task` must be digits-cnn, digits-lstm, digits-transformer, the path of a Python file or "
            "hf:PATH?data=FILE, got 'digits-cn', but it is none of these (my.yaml:1). Did you mean `digits-cnn`?",
        ),
    ],
)
def test_a_mistake_in_a_study_is_told_with_its_place_and_remedy(tmp_path, monkeypatch, text, expected):
    assert complaint_about(studies.read_study, recipe_file(tmp_path, text), monkeypatch) == expected


def test_a_study_tells_mistakes_of_its_recipe_files_and_its_own_together(tmp_path, monkeypatch):
    recipe_file(tmp_path, "stages: [prune-weights: {ratio: 2}]", "bad.yaml")
    path = recipe_file(tmp_path, "task: digits-cnn\nrecipes: [bad.yaml]\ntargets: [cpu/torch, cpu/torch]\nsead: 1")
    lines = complaint_about(studies.read_study, path, monkeypatch).splitlines()
    assert [word in line for word, line in zip(("bad.yaml:1", "`sead`", "twice"), lines, strict=True)] == [True] * 3


def test_paths_in_a_study_are_relative_to_its_file(tmp_path, monkeypatch):
    folder = tmp_path / "studies"
    folder.mkdir()
    (folder / "my_task.py").write_text("")
    recipe_file(folder, HALF, "half.yaml")
    path = recipe_file(folder, "task: my_task.py\nrecipes: [half.yaml]\ntargets: [cpu/torch]", "mine.yaml")
    monkeypatch.chdir(tmp_path)
    study = studies.read_study(path)
    assert (study.name, study.task) == ("mine", str((folder / "my_task.py").resolve()))
    assert [recipe.name for recipe in study.recipes] == ["half"]


def test_a_study_survives_the_way_to_json_and_back(tmp_path):
    path = recipe_file(tmp_path, HALF + "    skip: [head]\n    layers: {stem.*: 0}\nprecision: static-int8")
    study = studies.study("digits-cnn", recipes=["float16", str(path)], targets=["cpu/torch"], threads=2)
    assert Study.model_validate_json(study.model_dump_json()) == study


def test_a_study_from_the_command_line_is_named_after_its_task_and_names_the_argument_in_errors():
    study = studies.study("digits-lstm", recipes=["dynamic-int8"], targets=["cpu/torch"], want="smallest")
    assert (study.name, study.budget.want) == ("digits-lstm", "smallest")
    with pytest.raises(InvalidInput, match=r"^`threads` must be a whole number >= 1 and at most 1024, got 0\.$"):
        studies.study("digits-lstm", recipes=["dynamic-int8"], targets=["cpu/torch"], threads=0)


def test_a_recipe_that_one_of_the_targets_can_run_is_allowed():
    targets = ["cpu/onnxruntime", "cpu/torch"]
    assert studies.study("digits-cnn", recipes=["float16"], targets=targets).targets == tuple(targets)


@pytest.mark.parametrize(
    ("pattern", "layer", "expected"),
    [
        ("stages.0", "stages.0.conv1", True),
        ("stages.*.conv1", "stages.0.conv1", True),
        ("stages.?", "stages.0.conv1", True),
        ("conv1", "stages.0.conv1", False),
        ("Stages.0", "stages.0.conv1", False),
        ("stages.1", "stages.10.conv1", False),
        ("*", "head", True),
    ],
)
def test_a_pattern_matches_a_layer_or_the_module_that_holds_it(pattern, layer, expected):
    assert studies.matches(pattern, layer) is expected


def test_a_pattern_that_matches_no_layer_is_told_with_its_line_and_the_nearest_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe_file(tmp_path, HALF + "    skip: [stem, stage.0]\n    layers:\n      headd: 0.1\n      stages.0: 0.2\n")
    study = studies.study("digits-cnn", recipes=["my.yaml"], targets=["cpu/torch"])
    layers = ["stem", "stages.0.conv1", "head"]
    with pytest.raises(InvalidInput) as caught:
        studies.check_patterns(study, layers)
    assert str(caught.value).splitlines() == [
        "`stages.0.prune-channels.skip` of recipe `my` names 'stage.0', which matches no layer (my.yaml:4). "
        "Did you mean `stages.0`? The layers are stem, stages.0.conv1, head.",
        "`stages.0.prune-channels.layers` of recipe `my` names 'headd', which matches no layer (my.yaml:6). "
        "Did you mean `head`? The layers are stem, stages.0.conv1, head.",
    ]
    studies.check_patterns(study, [*layers, "stage.0", "headd"])


def test_patterns_behind_a_stage_that_changes_layers_are_left_to_the_stage_that_uses_them(tmp_path):
    text = "stages:\n- factorize: {rank: 2, skip: [%s]}\n- prune-weights: {ratio: 0.5, skip: [head.0]}\n"
    recipes = [studies.read_recipe(recipe_file(tmp_path, text % layer)) for layer in ("stem", "stm")]
    good, bad = (studies.study("digits-cnn", recipes=[recipe], targets=["cpu/torch"]) for recipe in recipes)
    studies.check_patterns(good, ["stem", "head"])
    with pytest.raises(InvalidInput, match=r"`stages\.0\.factorize\.skip` of recipe `my` names 'stm'"):
        studies.check_patterns(bad, ["stem", "head"])


def test_the_lines_of_patterns_written_out_in_a_study_survive_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = STUDY.replace("[channels-50]", "\n- name: x\n  precision:\n    float16:\n      skip: [gone]")
    study = studies.read_study(recipe_file(tmp_path, text).name)
    again = Study.model_validate_json(study.model_dump_json())
    with pytest.raises(InvalidInput, match=r"'gone', which matches no layer \(my\.yaml:6\)"):
        studies.check_patterns(again, ["head"])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), max_size=60) | st.text("&*[]{}:,-!#\n a0.", max_size=40))
def test_whatever_the_file_says_nothing_but_invalid_input_is_raised(tmp_path, text):
    with pytest.raises(InvalidInput):
        studies.read_recipe(recipe_file(tmp_path, text))


def test_reading_recipes_leaves_torch_out():
    code = "import sys, shrinkkit.core.studies as r; r.read_study('digits-cnn'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_tasks_of_studies_are_the_bundled_ones():
    from shrinkkit.tasks.loader import BUNDLED

    assert set(TASKS) == set(BUNDLED)


FRACTIONS = st.floats(0, 1, exclude_max=True)
PATTERNS = st.lists(st.text("abc.*?[0]: {}#'", min_size=1, max_size=8), max_size=2)
STAGES = st.one_of(
    st.fixed_dictionaries(
        {"ratio": FRACTIONS},
        optional={"scope": st.sampled_from(["layer", "global"]), "skip": PATTERNS, "round_to": st.integers(1, 65536)},
    ).map(lambda section: {"prune-channels": section}),
    st.fixed_dictionaries(
        {"ratio": FRACTIONS}, optional={"layers": st.dictionaries(st.text("ab.*", min_size=1, max_size=4), FRACTIONS)}
    ).map(lambda section: {"prune-weights": section}),
    st.fixed_dictionaries(
        {}, optional={"epochs": st.integers(1, 10_000), "learning_rate": st.floats(0, 10, exclude_min=True)}
    ).map(lambda section: {"fine-tune": section}),
)
RECIPES = st.fixed_dictionaries(
    {"stages": st.lists(STAGES, min_size=1, max_size=3), "precision": st.sampled_from(["float32", "static-int8"])}
)
STUDIES = st.fixed_dictionaries(
    {"recipes": st.lists(RECIPES, min_size=1, max_size=3), "targets": st.just(["cpu/torch", "cpu/onnxruntime"])},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "threads": st.none() | st.integers(1, 1024),
        "batch_sizes": st.lists(st.integers(1, 65536), max_size=16),
        "timeout_s": st.floats(0, 2_678_400, exclude_min=True),
        "mode": st.sampled_from(["robust", "all"]),
        "budget": st.fixed_dictionaries({}, optional={"accuracy_drop": st.floats(0, 1)}),
    },
)


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck), database=None)
@given(data=STUDIES)
def test_a_study_survives_the_way_to_yaml_and_back(tmp_path, data):
    recipes = [{"name": f"recipe-{i}", **recipe} for i, recipe in enumerate(data["recipes"])]
    first = studies.read_study(recipe_file(tmp_path, json.dumps({"task": "digits-cnn", **data, "recipes": recipes})))
    again = studies.read_study(recipe_file(tmp_path, json.dumps(first.to_dict())))
    assert again.to_dict() == first.to_dict()
    assert first.to_dict().items() >= {key: value for key, value in data.items() if key == "seed"}.items()


OUT_OF_RANGE = {
    "seed": st.integers(max_value=-1) | st.integers(min_value=2**32) | st.floats(0.1, 0.9),
    "threads": st.integers(max_value=0) | st.integers(min_value=1025),
    "timeout_s": st.floats(max_value=0) | st.floats(min_value=2_678_401, allow_infinity=False),
    "batch_sizes": st.lists(st.integers(max_value=0), min_size=1),
    "effort": st.text(max_size=8).filter(lambda text: text not in ("quick", "standard", "thorough")),
    "mode": st.text(max_size=8).filter(lambda text: text not in ("compress", "robust", "all")),
    "budget.accuracy_drop": st.floats(1, exclude_min=True, allow_infinity=False) | st.floats(max_value=-1e-300),
    "budget.robustness_drop": st.floats(1, exclude_min=True, allow_infinity=False)
    | st.booleans()
    | st.text(max_size=3),
    "recipes.0.stages.0.prune-channels.ratio": st.floats(1) | st.floats(max_value=-1e-300) | st.none(),
    "recipes.0.stages.0.prune-channels.round_to": st.integers(max_value=0) | st.integers(min_value=65537),
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_its_key(tmp_path, key):
    @settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(value=OUT_OF_RANGE[key])
    def is_refused(value):
        recipe = {"name": "r", "stages": [{"prune-channels": {"ratio": 0.5}}]}
        study = {"task": "digits-cnn", "targets": ["cpu/torch"], "mode": "all", "recipes": [recipe]}
        *parents, last = key.split(".")
        place = study
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[last] = value
        with pytest.raises(InvalidInput, match=last):
            studies.read_study(recipe_file(tmp_path, json.dumps(study)))

    is_refused()
