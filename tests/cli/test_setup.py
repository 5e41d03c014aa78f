"""What `list` and `doctor` say of this machine."""

import json

import pytest

from shrinkkit import cli
from shrinkkit.core import machines, stages
from shrinkkit.runtimes import registry


def data(capsys, *arguments, status=0):
    assert cli.main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def checks(found):
    return {check["name"]: (check["state"], check["text"]) for check in found["checks"]}


def test_list_without_an_argument_has_a_section_for_each_kind(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    places = [lines.index(title) for title in ("Tasks", "Recipes", "Transforms", "Targets")]
    assert places == sorted(places)
    every = data(capsys, "list")
    assert every == {kind: data(capsys, "list", kind) for kind in ("tasks", "recipes", "transforms", "targets")}


def test_list_says_when_each_transform_helps_and_which_settings_it_has(capsys):
    transforms = data(capsys, "list", "transforms")
    assert list(transforms)[: len(stages.TRANSFORMS)] == list(stages.TRANSFORMS)
    assert all(len(text.partition(" Settings: ")[0]) > 40 for text in transforms.values())
    assert transforms["distil"].endswith(
        "Settings: epochs=3, learning_rate=0.001, batch_size=32, device=auto, keep_zeros=True, temperature=1.0, "
        "labels=0.0, features=1.0."
    )
    assert cli.main(["list", "transforms"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(transforms)


def test_doctor_and_list_say_the_same_of_targets(capsys):
    assert data(capsys, "doctor")["targets"] == data(capsys, "list", "targets")
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["list", "targets"]) == 0
    assert capsys.readouterr().out in shown


@pytest.mark.parametrize("precision", ["int8", "float16", "bfloat16"])
def test_doctor_says_which_arithmetic_this_processor_has(precision, capsys):
    state, text = checks(data(capsys, "doctor"))[precision]
    lacks = machines.lacks(precision)
    hidden = not machines.environment(1, packages=()).cpu_flags
    assert (state == "note") == (lacks or hidden)
    assert ("no arithmetic in it" in text) == lacks


@pytest.mark.parametrize(
    ("flags", "lacks"),
    [("avx2 fma", True), ("avx512_vnni", False), ("avx_vnni", False), ("amx_int8", False), ("asimd asimddp", False)],
)
def test_int8_is_fast_with_vnni_or_an_equivalent(flags, lacks):
    assert machines.lacks("int8", flags.split()) is lacks


def test_doctor_fails_where_no_run_could_write_and_names_the_option(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    state, text = checks(data(capsys, "doctor", "--reports", str(blocked / "reports"), status=1))["reports"]
    assert state == "failed"
    assert "--reports" in text
    assert checks(data(capsys, "doctor", "--reports", str(tmp_path / "new/reports")))["reports"][0] == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_doctor_passes_without_a_browser_and_says_what_needs_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    state, text = checks(data(capsys, "doctor"))["PDF"]
    assert state == "note"
    assert "chromium" in text


def test_doctor_fails_where_no_target_can_run(capsys, monkeypatch):
    # As on a machine whose torch is gone: a registry in which nothing is available.
    monkeypatch.setattr(registry, "_missing", lambda target: "torch is not installed")
    assert checks(data(capsys, "doctor", status=1))["targets"][0] == "failed"


def test_doctor_names_machine_and_versions_but_nobody(capsys):
    found = data(capsys, "doctor")
    assert found["machine"]["cores"] == machines.cores()
    assert found["machine"]["versions"]["torch"]
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "at the end" not in shown
    assert machines.environment(1, packages=()).cpu in shown
