"""The parts of a report that go through the targets."""

import dataclasses

import examples
import pytest

from shrinkkit.report import sections
from shrinkkit.results import table


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return table.load(examples.write_run(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (sections.lost, "narrow-int8"),
        (sections.time, "QuantizeLinear"),
        (sections.deployment, "needs 662 calls"),
    ],
)
def test_every_target_has_its_own_part(found, part, says):
    text = part(found).html()
    for target in found.targets:
        assert f"<h3>{target}</h3>" in text
    assert says in text


@pytest.mark.parametrize("part", [sections.lost, sections.time, sections.deployment])
def test_a_run_without_measurements_says_so(found, part):
    assert "No" in repr(part(dataclasses.replace(found, measured={})))


@pytest.mark.parametrize("part", [sections.lost, sections.time, sections.deployment])
def test_parts_of_several_machines_are_headed_by_target_and_machine(part, tmp_path):
    away = table.load(examples.write_two_machines(tmp_path / "run", targets=("cpu/torch",)))
    text = part(away).html()
    assert len(away.targets) == 3
    for target in away.targets:
        assert f"<h3>{away.where(target)}</h3>" in text


def test_layers_on_another_machine_run_as_their_audit_says(tmp_path):
    away = table.load(examples.write_two_machines(tmp_path / "run", targets=("cpu/torch",)))
    own, other = (repr(sections.time(away.of(name))) for name in away.machines)
    in_torch = own[: own.index("cpu/onnxruntime @")]
    assert in_torch.count(" int8") > 20
    assert other.count(" int8") == in_torch.count(" int8")
