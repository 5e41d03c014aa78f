"""Results for the terminal and for machines."""

import json
import subprocess
import sys

import examples
import pytest

from shrinkkit import results


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results.load(examples.write_run(tmp_path_factory.mktemp("run")))


def test_the_table_fits_a_terminal_and_names_every_cause(found):
    text = results.table(found)
    assert max(map(len, text.splitlines())) <= results.WIDTH
    assert "failed: Unsupported: `dynamic_int8` found no layer" in text
    assert "refused: ONNX Runtime has no float16 kernels" in text
    for row in found.rows:
        assert row.intermediate or row.variant in text


def test_results_json_holds_every_row_and_no_raw_sample(found, tmp_path):
    results.write_json(found, tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text()
    data = json.loads(text)
    assert data["schema_version"] == results.SCHEMA_VERSION
    assert len(data["rows"]) == len(found.rows)
    assert data["verdict"]["variant"] == "channels-50-static-int8"
    assert data["rows"][2]["recipe"]["prune"]["ratio"] == 0.5
    assert "samples_ms" not in text
    assert '"scores"' not in text


def test_results_are_read_without_torch():
    code = "import sys, shrinkkit.results, shrinkkit.show, shrinkkit.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
