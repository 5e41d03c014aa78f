"""Results for the terminal and for machines."""

import json
import subprocess
import sys

import examples
import pytest

from shrinkkit.results import output, results
from shrinkkit.results.output import SCHEMA_VERSION, WIDTH


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results.load(examples.write_run(tmp_path_factory.mktemp("run")))


def test_the_table_fits_a_terminal_and_names_every_cause(found):
    text = output.table(found)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "dynamic-int8 (cpu/torch, cpu/onnxruntime) failed: Unsupported" in text
    assert "float16 (cpu/onnxruntime) unsupported: ONNX Runtime" in text
    for row in found.rows:
        assert row.intermediate or row.variant in text


def test_results_json_holds_every_row_and_no_raw_sample(found, tmp_path):
    output.write_json(found, tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text()
    data = json.loads(text)
    assert data["schema_version"] == SCHEMA_VERSION
    assert len(data["rows"]) == len(found.rows)
    assert data["verdict"]["variant"] == "channels-50-static-int8"
    assert data["rows"][2]["recipe"]["stages"][0]["prune-channels"]["ratio"] == 0.5
    assert "samples_ms" not in text
    assert '"scores"' not in text


def test_results_are_read_without_torch():
    modules = "shrinkkit.results.output, shrinkkit.report.show, shrinkkit.report.export"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_table_of_several_machines_still_fits_and_has_a_part_for_each(tmp_path):
    several = results.load(examples.write_two_machines(tmp_path / "run"))
    text = output.table(several)
    assert max(map(len, text.splitlines())) <= WIDTH
    here, elsewhere = text.index(examples.HERE), text.index(examples.ELSEWHERE)
    assert here < elsewhere
    assert text.count("channels-50 ") == 4
    assert text[here:elsewhere].count("2.79\N{MULTIPLICATION SIGN}") > 0
    assert text[elsewhere:].count("2.79\N{MULTIPLICATION SIGN}") == 0


def test_results_json_says_of_every_row_which_machine_it_is_from(tmp_path):
    several = results.load(examples.write_two_machines(tmp_path / "run", targets=("cpu/torch",)))
    output.write_json(several, tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["machines"] == [examples.HERE, examples.ELSEWHERE]
    machines = {(row["target"], row["machine"]) for row in data["rows"]}
    assert machines == {
        ("cpu/torch", examples.HERE),
        ("cpu/onnxruntime", examples.HERE),
        (f"cpu/torch @ {examples.ELSEWHERE}", examples.ELSEWHERE),
    }
    assert data["targets"].keys() == {target for target, _ in machines}
